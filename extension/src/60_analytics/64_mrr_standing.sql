-- Room 60, standing recurring revenue. Its unit is the account: a refresh brings the subscription
-- events of the accounts in the news up to date, makes what these accounts contribute to weeks and
-- months again, by the rule of analytics.mrr_movements, and moves the sums by the difference. What
-- an account contributed so far is what its own rows show.

CREATE FUNCTION spectrum._create_mrr()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_mrr_movements') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_subscription_events (
        report_id integer NOT NULL,
        account_key bigint NOT NULL,
        event_id uuid NOT NULL,
        occurred_at timestamptz NOT NULL,
        place integer NOT NULL,
        subscription text NOT NULL,
        mrr numeric NOT NULL,
        currency text COLLATE "C",
        CONSTRAINT rollup_subscription_events_pkey PRIMARY KEY (report_id, account_key, event_id)
    );
    COMMENT ON TABLE spectrum.rollup_subscription_events IS
        'The subscription events of each account, as analytics._read_subscription reads them; '
        'without those that it cannot read.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.report_id IS
        'spectrum.reports, kind mrr.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.account_key IS
        'dim_accounts; never the unknown account.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.place IS 'Among events of one time.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.mrr IS
        'What the subscription pays a month from then on.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.currency IS 'NULL where it is cancelled.';

    CREATE TABLE analytics.mv_mrr_movements (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        period_kind text COLLATE "C" NOT NULL,
        currency text COLLATE "C" NOT NULL,
        period date NOT NULL,
        movements bigint NOT NULL,
        new numeric NOT NULL,
        expansion numeric NOT NULL,
        contraction numeric NOT NULL,
        churn numeric NOT NULL,
        reactivation numeric NOT NULL,
        change numeric NOT NULL,
        net_change numeric NOT NULL,
        gross_change numeric NOT NULL,
        new_accounts bigint NOT NULL,
        churned_accounts bigint NOT NULL,
        reactivated_accounts bigint NOT NULL,
        accounts_change bigint NOT NULL,
        CONSTRAINT mv_mrr_movements_pkey
        PRIMARY KEY (report_id, account_id, period_kind, currency, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_mrr_movements IS
        'What moved MRR per account, week or month, and currency, and for all accounts together '
        '(account_id *), kept by refreshes; periods in which nothing moved are no rows. Read it '
        'through analytics.mrr_movements.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.report_id IS 'spectrum.reports, kind mrr.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.period_kind IS 'week or month.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.period IS 'First day, in config.timezone.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.movements IS 'How many; 0: the row goes.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.change IS 'MRR at the end less that at the start.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.net_change IS
        'The same of the accounts with MRR at the start.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.gross_change IS
        'The same again, with no account counted above what it had.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.accounts_change IS
        'Accounts with MRR at the end less those at the start.';

    PERFORM spectrum._create_mrr_view();
    PERFORM spectrum._add_kind('mrr', 85, '_maintain_mrr',
        '{spectrum.rollup_subscription_events, analytics.mv_mrr_movements}', '{mrr_movements}');
    PERFORM spectrum._begin_report('mrr');
END
$$;
COMMENT ON FUNCTION spectrum._create_mrr() IS
    'Room 60: makes rollup_subscription_events, mv_mrr_movements and its plain view.';

CREATE FUNCTION spectrum._create_mrr_view()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.mrr_movements WITH (security_barrier) AS
    SELECT
        b.account_id, b.period_kind, b.period, b.currency,
        trim_scale(b.end_mrr - b.change) AS start_mrr,
        trim_scale(b.new) AS new,
        trim_scale(b.expansion) AS expansion,
        trim_scale(b.contraction) AS contraction,
        trim_scale(b.churn) AS churn,
        trim_scale(b.reactivation) AS reactivation,
        trim_scale(b.end_mrr) AS end_mrr,
        b.end_accounts - b.accounts_change AS start_accounts,
        b.new_accounts, b.churned_accounts, b.reactivated_accounts, b.end_accounts,
        trim_scale(
            trim_scale(b.end_mrr - b.change + b.net_change)
            / nullif(trim_scale(b.end_mrr - b.change), 0)
        ) AS nrr,
        trim_scale(
            trim_scale(b.end_mrr - b.change + b.gross_change)
            / nullif(trim_scale(b.end_mrr - b.change), 0)
        ) AS grr,
        trim_scale(
            trim_scale(b.end_mrr) * nullif(b.end_accounts - b.accounts_change, 0) * 12
            / nullif(b.end_accounts * b.churned_accounts * b.per_year, 0)
        ) AS ltv,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT
            first.account_id, first.period_kind, calendar.start::date AS period, first.currency,
            kind.per_year,
            coalesce(sums.new, 0) AS new,
            coalesce(sums.expansion, 0) AS expansion,
            coalesce(sums.contraction, 0) AS contraction,
            coalesce(sums.churn, 0) AS churn,
            coalesce(sums.reactivation, 0) AS reactivation,
            coalesce(sums.change, 0) AS change,
            coalesce(sums.net_change, 0) AS net_change,
            coalesce(sums.gross_change, 0) AS gross_change,
            coalesce(sums.new_accounts, 0) AS new_accounts,
            coalesce(sums.churned_accounts, 0) AS churned_accounts,
            coalesce(sums.reactivated_accounts, 0) AS reactivated_accounts,
            coalesce(sums.accounts_change, 0) AS accounts_change,
            sum(sums.change) OVER so_far AS end_mrr,
            (sum(sums.accounts_change) OVER so_far)::bigint AS end_accounts
        FROM (
            SELECT known.report_id, known.account_id, known.period_kind, known.currency,
                min(known.period) AS period
            FROM analytics.mv_mrr_movements AS known
            WHERE known.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'mrr' AND report.state = 'served'
            ) AND ((SELECT caller.sees_all FROM warehouse.caller)
                OR known.account_id = ANY (ARRAY(
                    SELECT own.account_id FROM warehouse.own_accounts AS own)))
            GROUP BY known.report_id, known.account_id, known.period_kind, known.currency
        ) AS first
        JOIN (
            VALUES ('week', interval '1 week', 52), ('month', interval '1 month', 12)
        ) AS kind (name, step, per_year) ON kind.name = first.period_kind
        CROSS JOIN LATERAL generate_series(first.period::timestamp, (
            SELECT last.day FROM warehouse.last_day AS last
        )::timestamp, kind.step) AS calendar (start)
        LEFT JOIN LATERAL (
            SELECT known.* FROM analytics.mv_mrr_movements AS known
            WHERE known.report_id = first.report_id AND known.account_id = first.account_id
                AND known.period_kind = first.period_kind AND known.currency = first.currency
                AND known.period = calendar.start::date
            OFFSET 0
        ) AS sums ON true
        WINDOW so_far AS (
            PARTITION BY first.account_id, first.period_kind, first.currency
            ORDER BY calendar.start
        )
    ) AS b;
    COMMENT ON VIEW analytics.mrr_movements IS
        'How MRR moved, by account (* is all), week or month, and currency: from the first '
        'movement of each on to the last period with an event anywhere. As the function of this '
        'name tells.';
    COMMENT ON COLUMN analytics.mrr_movements.nrr IS
        'MRR at the end of the accounts that had MRR at the start, over that.';
    COMMENT ON COLUMN analytics.mrr_movements.grr IS
        'The same with no account counted above what it had.';
    COMMENT ON COLUMN analytics.mrr_movements.ltv IS
        'MRR per account at the end / share of the accounts at the start that churned in a month; '
        'NULL where none did.';
END
$$;
COMMENT ON FUNCTION spectrum._create_mrr_view() IS 'Room 60: makes analytics.mrr_movements.';

CREATE FUNCTION analytics._move_subscription_events(p_report integer, p_built_to bigint)
RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_currency text := (SELECT s.currency FROM analytics.settings AS s);
    v_keys integer[] := analytics._subscription_keys();
    v_accounts bigint[];
BEGIN
    -- Each fact is in one scope from 0 up.
    SELECT array_agg(DISTINCT news.account_key) INTO v_accounts
    FROM pg_temp.spectrum_news AS news
    WHERE news.event_type_key = ANY (v_keys) AND news.scope >= 0 AND news.account_key <> 0
        AND news.user_key <= p_built_to;
    IF v_accounts IS NULL THEN
        RETURN NULL;
    END IF;

    DELETE FROM spectrum.rollup_subscription_events AS known
    USING pg_temp.spectrum_news AS news
    WHERE news.sign < 0 AND news.event_type_key = ANY (v_keys) AND news.scope >= 0
        AND news.user_key <= p_built_to
        AND known.report_id = p_report AND known.account_key = news.account_key
        AND known.event_id = news.event_id;

    INSERT INTO spectrum.rollup_subscription_events (
        report_id, account_key, event_id, occurred_at, place, subscription, mrr, currency
    )
    SELECT p_report, news.account_key, news.event_id, news.occurred_at, r.place, r.subscription,
        r.mrr, r.currency
    FROM pg_temp.spectrum_news AS news
    JOIN analytics.event_types AS t USING (event_type_key)
    CROSS JOIN LATERAL analytics._read_subscription(
        t.event_type, news.properties, v_currency
    ) AS r
    WHERE news.sign > 0 AND news.event_type_key = ANY (v_keys)
        AND news.scope >= 0 AND news.account_key <> 0 AND news.user_key <= p_built_to
        AND r.problem IS NULL;
    RETURN v_accounts;
END
$$;
COMMENT ON FUNCTION analytics._move_subscription_events(integer, bigint) IS
    'Brings rollup_subscription_events up to the news and returns the accounts concerned.';

CREATE FUNCTION analytics._kept_mrr_contributions(p_report integer, p_account_keys bigint[])
RETURNS TABLE (
    account_key bigint,
    period_kind text,
    currency text,
    period date,
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
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH histories AS (
        SELECT array_agg(e.account_key) AS account_keys, array_agg(e.occurred_at) AS times,
            array_agg(e.place) AS places, array_agg(e.event_id) AS event_ids,
            array_agg(e.subscription) AS subscriptions, array_agg(e.mrr) AS mrr,
            array_agg(e.currency) AS currencies
        FROM unnest(p_account_keys) AS touched (account_key)
        CROSS JOIN LATERAL (
            SELECT known.* FROM spectrum.rollup_subscription_events AS known
            WHERE known.report_id = p_report AND known.account_key = touched.account_key
            OFFSET 0
        ) AS e
    ),
    movements AS (
        SELECT array_agg(m.account_key) AS account_keys, array_agg(m.currency) AS currencies,
            array_agg(m.moved_at) AS moved_at, array_agg(m.movement) AS movements,
            array_agg(m.mrr_before) AS mrr_before, array_agg(m.mrr_after) AS mrr_after,
            min(m.moved_at) AS first_at, max(m.moved_at) + interval '1 us' AS end_at
        FROM histories AS h
        CROSS JOIN LATERAL analytics._mrr_movements(
            h.account_keys, h.times, h.places, h.event_ids, h.subscriptions, h.mrr, h.currencies
        ) AS m
    ),
    calendars AS MATERIALIZED (
        SELECT kind.name, s.starts, spectrum.period_dates(s.starts) AS dates
        FROM movements AS m
        CROSS JOIN (VALUES ('week'), ('month')) AS kind (name)
        CROSS JOIN LATERAL spectrum.period_starts(kind.name, m.first_at, m.end_at) AS s (starts)
    )
    SELECT c.account_key, k.name, c.currency, k.dates[c.period_number], c.movements, c.new,
        c.expansion, c.contraction, c.churn, c.reactivation, c.change, c.net_change,
        c.gross_change, c.new_accounts, c.churned_accounts, c.reactivated_accounts,
        c.accounts_change
    FROM calendars AS k
    CROSS JOIN movements AS m
    CROSS JOIN LATERAL analytics._mrr_contributions(
        m.account_keys, m.currencies, m.moved_at, m.movements, m.mrr_before, m.mrr_after,
        k.starts, m.first_at, m.end_at
    ) AS c;
END
$$;
COMMENT ON FUNCTION analytics._kept_mrr_contributions(integer, bigint[]) IS
    'What some accounts contribute by rollup_subscription_events.';

CREATE FUNCTION analytics._maintain_mrr(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_account_keys bigint[] := analytics._move_subscription_events(p_report, p_built_to);
    v_account_ids text[];
BEGIN
    IF v_account_keys IS NULL THEN
        RETURN;
    END IF;
    v_account_ids := ARRAY(
        SELECT dim.account_id FROM warehouse.dim_accounts AS dim
        WHERE dim.account_key = ANY (v_account_keys)
    );

    INSERT INTO analytics.mv_mrr_movements AS sums
    SELECT p_report, scopes.account_id, moved.period_kind, moved.currency, moved.period,
        sum(moved.sign * moved.movements), sum(moved.sign * moved.new),
        sum(moved.sign * moved.expansion), sum(moved.sign * moved.contraction),
        sum(moved.sign * moved.churn), sum(moved.sign * moved.reactivation),
        sum(moved.sign * moved.change), sum(moved.sign * moved.net_change),
        sum(moved.sign * moved.gross_change), sum(moved.sign * moved.new_accounts),
        sum(moved.sign * moved.churned_accounts), sum(moved.sign * moved.reactivated_accounts),
        sum(moved.sign * moved.accounts_change)
    FROM (
        SELECT 1 AS sign, dim.account_id, c.period_kind, c.currency, c.period, c.movements, c.new,
            c.expansion, c.contraction, c.churn, c.reactivation, c.change, c.net_change,
            c.gross_change, c.new_accounts, c.churned_accounts, c.reactivated_accounts,
            c.accounts_change
        FROM analytics._kept_mrr_contributions(p_report, v_account_keys) AS c
        JOIN warehouse.dim_accounts AS dim USING (account_key)
        UNION ALL
        SELECT -1, known.account_id, known.period_kind, known.currency, known.period,
            known.movements, known.new, known.expansion, known.contraction, known.churn,
            known.reactivation, known.change, known.net_change, known.gross_change,
            known.new_accounts, known.churned_accounts, known.reactivated_accounts,
            known.accounts_change
        FROM analytics.mv_mrr_movements AS known
        WHERE known.report_id = p_report AND known.account_id = ANY (v_account_ids)
    ) AS moved
    CROSS JOIN LATERAL (VALUES (moved.account_id), ('*')) AS scopes (account_id)
    GROUP BY scopes.account_id, moved.period_kind, moved.currency, moved.period
    HAVING (
        sum(moved.sign * moved.movements), sum(moved.sign * moved.new),
        sum(moved.sign * moved.expansion), sum(moved.sign * moved.contraction),
        sum(moved.sign * moved.churn), sum(moved.sign * moved.reactivation),
        sum(moved.sign * moved.change), sum(moved.sign * moved.net_change),
        sum(moved.sign * moved.gross_change), sum(moved.sign * moved.new_accounts),
        sum(moved.sign * moved.churned_accounts), sum(moved.sign * moved.reactivated_accounts),
        sum(moved.sign * moved.accounts_change)
    ) <> (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    ON CONFLICT (report_id, account_id, period_kind, currency, period) DO UPDATE SET
        movements = sums.movements + excluded.movements,
        new = sums.new + excluded.new,
        expansion = sums.expansion + excluded.expansion,
        contraction = sums.contraction + excluded.contraction,
        churn = sums.churn + excluded.churn,
        reactivation = sums.reactivation + excluded.reactivation,
        change = sums.change + excluded.change,
        net_change = sums.net_change + excluded.net_change,
        gross_change = sums.gross_change + excluded.gross_change,
        new_accounts = sums.new_accounts + excluded.new_accounts,
        churned_accounts = sums.churned_accounts + excluded.churned_accounts,
        reactivated_accounts = sums.reactivated_accounts + excluded.reactivated_accounts,
        accounts_change = sums.accounts_change + excluded.accounts_change;

    DELETE FROM analytics.mv_mrr_movements AS sums
    WHERE sums.report_id = p_report AND sums.account_id = ANY (v_account_ids || '{*}')
        AND sums.movements = 0;
END
$$;
COMMENT ON FUNCTION analytics._maintain_mrr(integer, bigint) IS
    'Moves mv_mrr_movements by what the accounts in the news contribute now less what they did.';

CREATE FUNCTION analytics._standing_mrr_movements()
RETURNS TABLE (
    account_id text,
    period_kind text,
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
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT coalesce(accounts.account_id, '*'), kind.name, r.period, r.currency, r.start_mrr, r.new,
        r.expansion, r.contraction, r.churn, r.reactivation, r.end_mrr, r.start_accounts,
        r.new_accounts, r.churned_accounts, r.reactivated_accounts, r.end_accounts, r.nrr, r.grr,
        r.ltv
    FROM (VALUES ('week'), ('month')) AS kind (name)
    CROSS JOIN (VALUES (false), (true)) AS scope (by_account)
    CROSS JOIN LATERAL analytics._mrr_report(
        kind.name, NULL, NULL, NULL, scope.by_account
    ) AS r
    LEFT JOIN analytics.accounts ON accounts.account_key = r.account_key;
END
$$;
COMMENT ON FUNCTION analytics._standing_mrr_movements() IS
    'What analytics.mrr_movements has to show, out of all events: for verify().';
