-- Room 60, recurring revenue: movements of MRR by period, and the events that it cannot read.
-- Reads the events through analytics._subscription_events and nothing else.

CREATE FUNCTION analytics._mrr_contributions(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text
)
RETURNS TABLE (
    account_key bigint,
    currency text,
    period_number integer,
    opening numeric,
    closing numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    new_times bigint,
    churn_times bigint,
    reactivation_times bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
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
    ),
    movements AS (
        SELECT m.account_key, m.currency, m.moved_at, m.movement, m.mrr_before, m.mrr_after,
            abs(m.mrr_after - m.mrr_before) AS amount,
            CASE WHEN m.moved_at < p_from THEN 0
                ELSE width_bucket(m.moved_at, p_starts) END AS number
        FROM histories AS h
        CROSS JOIN LATERAL analytics._mrr_movements(
            h.account_keys, h.times, h.places, h.event_ids, h.subscriptions, h.mrr, h.currencies
        ) AS m
        WHERE m.moved_at < p_to
    )
    SELECT m.account_key, m.currency, m.number,
        (array_agg(m.mrr_before ORDER BY m.moved_at))[1],
        (array_agg(m.mrr_after ORDER BY m.moved_at DESC))[1],
        coalesce(sum(m.amount) FILTER (WHERE m.movement = 'new'), 0),
        coalesce(sum(m.amount) FILTER (WHERE m.movement = 'expansion'), 0),
        coalesce(sum(m.amount) FILTER (WHERE m.movement = 'contraction'), 0),
        coalesce(sum(m.amount) FILTER (WHERE m.movement = 'churn'), 0),
        coalesce(sum(m.amount) FILTER (WHERE m.movement = 'reactivation'), 0),
        count(*) FILTER (WHERE m.movement = 'new'),
        count(*) FILTER (WHERE m.movement = 'churn'),
        count(*) FILTER (WHERE m.movement = 'reactivation')
    FROM movements AS m
    GROUP BY m.account_key, m.currency, m.number;
END
$$;
COMMENT ON FUNCTION analytics._mrr_contributions(timestamptz[], timestamptz, timestamptz, text) IS
    'What each account contributes to the periods in which its MRR moved: its MRR before the first '
    'and after the last movement there, the sums of the movements and how many. Period 0 is all '
    'time before p_from.';

CREATE FUNCTION analytics._mrr_report(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text
)
RETURNS TABLE (
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
    WITH sums AS (
        SELECT c.period_number, c.currency, sum(c.new) AS new, sum(c.expansion) AS expansion,
            sum(c.contraction) AS contraction, sum(c.churn) AS churn,
            sum(c.reactivation) AS reactivation, sum(c.closing - c.opening) AS change,
            sum(c.new_times) AS new_times, sum(c.churn_times) AS churn_times,
            sum(c.reactivation_times) AS reactivation_times,
            sum(sign(c.closing) - sign(c.opening)) AS accounts_change,
            -- Of the accounts with MRR at the start; those that did not move keep theirs.
            sum(c.closing - c.opening) FILTER (WHERE c.opening > 0) AS net_change,
            sum(least(c.closing - c.opening, 0)) FILTER (WHERE c.opening > 0) AS gross_change
        FROM analytics._mrr_contributions(p_starts, p_from, p_to, p_account) AS c
        GROUP BY c.period_number, c.currency
    ),
    periods AS (
        SELECT f.currency, n.number
        FROM (SELECT s.currency, min(s.period_number) AS number FROM sums AS s GROUP BY 1) AS f
        CROSS JOIN LATERAL generate_series(f.number, cardinality(p_starts) - 1) AS n (number)
    ),
    balances AS (
        SELECT p.number, p.currency,
            coalesce(s.new, 0) AS new, coalesce(s.expansion, 0) AS expansion,
            coalesce(s.contraction, 0) AS contraction, coalesce(s.churn, 0) AS churn,
            coalesce(s.reactivation, 0) AS reactivation, coalesce(s.change, 0) AS change,
            coalesce(s.new_times, 0)::bigint AS new_times,
            coalesce(s.churn_times, 0)::bigint AS churn_times,
            coalesce(s.reactivation_times, 0)::bigint AS reactivation_times,
            coalesce(s.accounts_change, 0)::bigint AS accounts_change,
            coalesce(s.net_change, 0) AS net_change, coalesce(s.gross_change, 0) AS gross_change,
            sum(s.change) OVER so_far AS end_mrr,
            (sum(s.accounts_change) OVER so_far)::bigint AS end_accounts
        FROM periods AS p
        LEFT JOIN sums AS s ON s.currency = p.currency AND s.period_number = p.number
        WINDOW so_far AS (PARTITION BY p.currency ORDER BY p.number)
    )
    SELECT b.number, b.currency, b.end_mrr - b.change, b.new, b.expansion, b.contraction, b.churn,
        b.reactivation, b.end_mrr, b.end_accounts - b.accounts_change, b.new_times, b.churn_times,
        b.reactivation_times, b.end_accounts, b.end_mrr - b.change + b.net_change,
        b.end_mrr - b.change + b.gross_change
    FROM balances AS b
    WHERE b.number > 0;
END
$$;
COMMENT ON FUNCTION analytics._mrr_report(timestamptz[], timestamptz, timestamptz, text) IS
    'The contributions summed up, period after period from the first movement of a currency on. '
    'kept_net, kept_gross: MRR at the end of the accounts that had MRR at the start, and the same '
    'with no account counted above what it had.';

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
DECLARE
    v_from timestamptz := p_from;
    v_to timestamptz := p_to;
    v_starts timestamptz[];
    v_dates date[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts(p_period, v_from, v_to);
    v_dates := analytics._period_dates(v_starts);

    RETURN QUERY
    SELECT v_dates[r.period_number], r.currency, trim_scale(r.start_mrr), trim_scale(r.new),
        trim_scale(r.expansion), trim_scale(r.contraction), trim_scale(r.churn),
        trim_scale(r.reactivation), trim_scale(r.end_mrr), r.start_accounts, r.new_accounts,
        r.churned_accounts, r.reactivated_accounts, r.end_accounts,
        trim_scale(r.kept_net / nullif(r.start_mrr, 0)),
        trim_scale(r.kept_gross / nullif(r.start_mrr, 0)),
        -- What an account pays in a month, by how many months it stays: 1 / (churned / start)
        -- periods, of which a year has so many.
        trim_scale(
            r.end_mrr * nullif(r.start_accounts, 0) * 12
            / nullif(r.end_accounts * r.churned_accounts * analytics._per_year(p_period), 0)
        )
    FROM analytics._mrr_report(v_starts, v_from, v_to, p_account) AS r
    ORDER BY r.period_number, r.currency;
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
