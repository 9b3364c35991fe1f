-- Room 60, recurring revenue: movements of MRR by period, and the events that it cannot read.
-- Reads the events through analytics._subscription_events and nothing else.

CREATE FUNCTION analytics._mrr_contributions(
    p_account_keys bigint[],
    p_currencies text[],
    p_moved_at timestamptz[],
    p_movements text[],
    p_mrr_before numeric[],
    p_mrr_after numeric[],
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz
)
RETURNS TABLE (
    account_key bigint,
    currency text,
    period_number integer,
    movements bigint,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    change numeric,
    net_change numeric,
    gross_change numeric,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    accounts_change bigint
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH movements AS (
        SELECT m.account_key, m.currency, m.moved_at, m.movement, m.mrr_before, m.mrr_after,
            abs(m.mrr_after - m.mrr_before) AS amount,
            CASE WHEN m.moved_at < p_from THEN 0
                ELSE width_bucket(m.moved_at, p_starts) END AS number
        FROM unnest(
            p_account_keys, p_currencies, p_moved_at, p_movements, p_mrr_before, p_mrr_after
        ) AS m (account_key, currency, moved_at, movement, mrr_before, mrr_after)
        WHERE m.moved_at < p_to
    ),
    periods AS (
        SELECT m.account_key, m.currency, m.number, count(*) AS movements,
            (array_agg(m.mrr_before ORDER BY m.moved_at))[1] AS opening,
            (array_agg(m.mrr_after ORDER BY m.moved_at DESC))[1] AS closing,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'new'), 0) AS new,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'expansion'), 0) AS expansion,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'contraction'), 0) AS contraction,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'churn'), 0) AS churn,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'reactivation'), 0) AS reactivation,
            count(*) FILTER (WHERE m.movement = 'new') AS new_times,
            count(*) FILTER (WHERE m.movement = 'churn') AS churn_times,
            count(*) FILTER (WHERE m.movement = 'reactivation') AS reactivation_times
        FROM movements AS m
        GROUP BY m.account_key, m.currency, m.number
    )
    SELECT p.account_key, p.currency, p.number, p.movements, p.new, p.expansion, p.contraction,
        p.churn, p.reactivation, p.closing - p.opening,
        -- Of the accounts with MRR at the start; those that did not move keep theirs.
        CASE WHEN p.opening > 0 THEN p.closing - p.opening ELSE 0 END,
        CASE WHEN p.opening > 0 THEN least(p.closing - p.opening, 0) ELSE 0 END,
        p.new_times, p.churn_times, p.reactivation_times,
        (sign(p.closing) - sign(p.opening))::bigint
    FROM periods AS p;
END
$$;
COMMENT ON FUNCTION analytics._mrr_contributions(
    bigint[], text[], timestamptz[], text[], numeric[], numeric[],
    timestamptz[], timestamptz, timestamptz
) IS
    'What each account contributes to the periods in which its MRR moved, out of the movements '
    'given as columns: their sums and how many, by how much its MRR changed from the start of the '
    'period to its end, and by how much where it had any at the start. All of it adds up over '
    'accounts. Period 0 is all time before p_from.';

CREATE FUNCTION analytics._account_movements(p_account text)
RETURNS TABLE (
    account_key bigint,
    currency text,
    moved_at timestamptz,
    movement text,
    mrr_before numeric,
    mrr_after numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    WITH histories AS (
        SELECT array_agg(e.account_key) AS account_keys, array_agg(e.occurred_at) AS times,
            array_agg(e.place) AS places, array_agg(e.event_id) AS event_ids,
            array_agg(e.subscription) AS subscriptions, array_agg(e.mrr) AS mrr,
            array_agg(e.currency) AS currencies
        FROM analytics._subscription_events(p_account) AS e
        WHERE e.problem IS NULL
    )
    SELECT m.account_key, m.currency, m.moved_at, m.movement, m.mrr_before, m.mrr_after
    FROM histories AS h
    CROSS JOIN LATERAL analytics._mrr_movements(
        h.account_keys, h.times, h.places, h.event_ids, h.subscriptions, h.mrr, h.currencies
    ) AS m;
END
$$;
COMMENT ON FUNCTION analytics._account_movements(text) IS
    'The movements of one account (NULL: of all), out of its events.';

CREATE FUNCTION analytics._mrr_balances(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_key bigint,
    period_number integer,
    currency text,
    start_mrr numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    end_mrr numeric,
    start_accounts bigint,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    end_accounts bigint,
    kept_net numeric,
    kept_gross numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH movements AS (
        SELECT array_agg(m.account_key) AS account_keys, array_agg(m.currency) AS currencies,
            array_agg(m.moved_at) AS moved_at, array_agg(m.movement) AS movements,
            array_agg(m.mrr_before) AS mrr_before, array_agg(m.mrr_after) AS mrr_after
        FROM analytics._account_movements(p_account) AS m
    ),
    sums AS (
        SELECT CASE WHEN p_by_account THEN c.account_key ELSE 0 END AS account_key,
            c.period_number, c.currency, sum(c.new) AS new, sum(c.expansion) AS expansion,
            sum(c.contraction) AS contraction, sum(c.churn) AS churn,
            sum(c.reactivation) AS reactivation, sum(c.change) AS change,
            sum(c.net_change) AS net_change, sum(c.gross_change) AS gross_change,
            sum(c.new_accounts)::bigint AS new_accounts,
            sum(c.churned_accounts)::bigint AS churned_accounts,
            sum(c.reactivated_accounts)::bigint AS reactivated_accounts,
            sum(c.accounts_change)::bigint AS accounts_change
        FROM movements AS m
        CROSS JOIN LATERAL analytics._mrr_contributions(
            m.account_keys, m.currencies, m.moved_at, m.movements, m.mrr_before, m.mrr_after,
            p_starts, p_from, p_to
        ) AS c
        GROUP BY 1, c.period_number, c.currency
    ),
    periods AS (
        SELECT f.account_key, f.currency, n.number
        FROM (
            SELECT s.account_key, s.currency, min(s.period_number) AS number
            FROM sums AS s GROUP BY 1, 2
        ) AS f
        CROSS JOIN LATERAL generate_series(f.number, cardinality(p_starts) - 1) AS n (number)
    ),
    balances AS (
        SELECT p.account_key, p.number, p.currency, s.new, s.expansion, s.contraction, s.churn,
            s.reactivation, coalesce(s.change, 0) AS change, s.net_change, s.gross_change,
            s.new_accounts, s.churned_accounts, s.reactivated_accounts,
            coalesce(s.accounts_change, 0) AS accounts_change,
            sum(s.change) OVER so_far AS end_mrr,
            (sum(s.accounts_change) OVER so_far)::bigint AS end_accounts
        FROM periods AS p
        LEFT JOIN sums AS s ON s.account_key = p.account_key AND s.currency = p.currency
            AND s.period_number = p.number
        WINDOW so_far AS (PARTITION BY p.account_key, p.currency ORDER BY p.number)
    )
    -- Without zeros at their end, equal amounts give ratios of equally many digits.
    SELECT b.account_key, b.number, b.currency, trim_scale(b.end_mrr - b.change),
        trim_scale(coalesce(b.new, 0)), trim_scale(coalesce(b.expansion, 0)),
        trim_scale(coalesce(b.contraction, 0)), trim_scale(coalesce(b.churn, 0)),
        trim_scale(coalesce(b.reactivation, 0)), trim_scale(b.end_mrr),
        b.end_accounts - b.accounts_change, coalesce(b.new_accounts, 0),
        coalesce(b.churned_accounts, 0), coalesce(b.reactivated_accounts, 0), b.end_accounts,
        trim_scale(b.end_mrr - b.change + coalesce(b.net_change, 0)),
        trim_scale(b.end_mrr - b.change + coalesce(b.gross_change, 0))
    FROM balances AS b
    WHERE b.number > 0;
END
$$;
COMMENT ON FUNCTION analytics._mrr_balances(
    timestamptz[], timestamptz, timestamptz, text, boolean
) IS
    'The contributions summed up, by account or all together (account_key 0), period after period '
    'from the first movement of a currency on. kept_net, kept_gross: MRR at the end of the '
    'accounts that had MRR at the start, and the same with no account counted above what it had.';

CREATE FUNCTION analytics._mrr_report(
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_key bigint,
    period date,
    currency text,
    start_mrr numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    end_mrr numeric,
    start_accounts bigint,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    end_accounts bigint,
    nrr numeric,
    grr numeric,
    ltv numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
    v_dates date[];
BEGIN
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    v_starts := spectrum.period_starts(p_period, v_from, v_to);
    v_dates := spectrum.period_dates(v_starts);

    RETURN QUERY
    SELECT b.account_key, v_dates[b.period_number], b.currency, b.start_mrr, b.new, b.expansion,
        b.contraction, b.churn, b.reactivation, b.end_mrr, b.start_accounts, b.new_accounts,
        b.churned_accounts, b.reactivated_accounts, b.end_accounts,
        trim_scale(b.kept_net / nullif(b.start_mrr, 0)),
        trim_scale(b.kept_gross / nullif(b.start_mrr, 0)),
        -- What an account pays in a month, by how many months it stays: 1 / (churned / start)
        -- periods, of which a year has so many.
        trim_scale(
            b.end_mrr * nullif(b.start_accounts, 0) * 12
            / nullif(b.end_accounts * b.churned_accounts * analytics._per_year(p_period), 0)
        )
    FROM analytics._mrr_balances(v_starts, v_from, v_to, p_account, p_by_account) AS b
    WHERE v_from < v_to;
END
$$;
COMMENT ON FUNCTION analytics._mrr_report(text, timestamptz, timestamptz, text, boolean) IS
    'The rows of analytics.mrr_movements, of all accounts together (account_key 0) or of each.';

CREATE FUNCTION analytics.mrr_movements(
    p_period text DEFAULT 'month',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    currency text,
    start_mrr numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    end_mrr numeric,
    start_accounts bigint,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    end_accounts bigint,
    nrr numeric,
    grr numeric,
    ltv numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT r.period, r.currency, r.start_mrr, r.new, r.expansion, r.contraction, r.churn,
        r.reactivation, r.end_mrr, r.start_accounts, r.new_accounts, r.churned_accounts,
        r.reactivated_accounts, r.end_accounts, r.nrr, r.grr, r.ltv
    FROM analytics._mrr_report(p_period, p_from, p_to, p_account, false) AS r
    ORDER BY r.period, r.currency;
END
$$;
COMMENT ON FUNCTION analytics.mrr_movements(text, timestamptz, timestamptz, text) IS
    'How monthly recurring revenue moved by day, week or month inside [p_from, p_to) (NULL: as far '
    'as events go), in each currency from its first movement on: start + new + reactivation + '
    'expansion - contraction - churn = end, in amounts (and without expansion and contraction in '
    'accounts). nrr: MRR at the end of the accounts that had MRR at the start, over that; grr: the '
    'same with no account above what it had. ltv: MRR per account at the end / share of the '
    'accounts at the start that churned in a month; NULL where nobody churned.';

CREATE FUNCTION analytics.mrr_problems(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    event_id uuid,
    occurred_at timestamptz,
    event_type text,
    account_id text,
    problem text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT e.event_id, e.occurred_at, e.event_type, e.account_id, e.problem
    FROM analytics._subscription_events(p_account) AS e
    WHERE e.problem IS NOT NULL
        AND (p_from IS NULL OR e.occurred_at >= p_from)
        AND (p_to IS NULL OR e.occurred_at < p_to)
    ORDER BY e.occurred_at, e.event_id;
END
$$;
COMMENT ON FUNCTION analytics.mrr_problems(timestamptz, timestamptz, text) IS
    'The subscription events of [p_from, p_to) that MRR leaves out, and why: no account, or a '
    'property that cannot be read.';
