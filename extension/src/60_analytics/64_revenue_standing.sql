-- Room 60, standing revenue: sums of the news that carry money, and the user-days with an order.

CREATE FUNCTION spectrum._create_revenue()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_revenue_summary') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_paying_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        currency text COLLATE "C" NOT NULL,
        CONSTRAINT rollup_paying_days_pkey PRIMARY KEY (report_id, user_key, scope, day, currency)
    );
    COMMENT ON TABLE spectrum.rollup_paying_days IS
        'The days on which each user had an order above 0, by currency.';
    COMMENT ON COLUMN spectrum.rollup_paying_days.report_id IS 'spectrum.reports, kind revenue.';
    COMMENT ON COLUMN spectrum.rollup_paying_days.scope IS 'See rollup_user_days.scope.';

    CREATE TABLE analytics.mv_revenue_summary (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        currency text COLLATE "C" NOT NULL,
        money_events bigint NOT NULL DEFAULT 0,
        orders bigint NOT NULL DEFAULT 0,
        gross numeric NOT NULL DEFAULT 0,
        refunds numeric NOT NULL DEFAULT 0,
        paying_users bigint NOT NULL DEFAULT 0,
        CONSTRAINT mv_revenue_summary_pkey PRIMARY KEY (report_id, account_id, day, currency)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_revenue_summary IS
        'Money per account, day and currency, and for all accounts together (account_id *), kept '
        'by refreshes. Read it through analytics.revenue_summary.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.report_id IS 'spectrum.reports, kind revenue.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.money_events IS 'Orders and refunds.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.orders IS
        'Events with money that are no refunds.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.gross IS 'Sum of the orders.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.refunds IS
        'Sum of the refunds, as a positive amount: events of a type in config.refund_events, and '
        'negative amounts.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.paying_users IS
        'Distinct users with an order above 0.';

    CREATE VIEW analytics.revenue_summary WITH (security_barrier) AS
    SELECT
        sums.account_id, sums.day, sums.currency, sums.orders, sums.gross, sums.refunds,
        sums.gross - sums.refunds AS net,
        sums.paying_users,
        coalesce(active.dau, 0) AS active_users,
        trim_scale(trim_scale(sums.gross - sums.refunds) / nullif(active.dau, 0)) AS arpu,
        trim_scale(trim_scale(sums.gross - sums.refunds) / nullif(sums.paying_users, 0)) AS arppu,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_revenue_summary AS sums
    LEFT JOIN analytics.mv_active_users AS active
        ON active.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'activity' AND report.state = 'served'
        ) AND active.account_id = sums.account_id AND active.day = sums.day
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'revenue' AND report.state = 'served'
    ) AND sums.money_events > 0 AND ((SELECT caller.sees_all FROM warehouse.caller)
        OR sums.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.revenue_summary IS
        'Orders, refunds, net revenue, per user too, by account (* is all), day and currency.';
    COMMENT ON COLUMN analytics.revenue_summary.active_users IS
        'Distinct users of the account''s day, whatever they did.';
    COMMENT ON COLUMN analytics.revenue_summary.arpu IS
        'net / active_users; NULL where there are none.';
    COMMENT ON COLUMN analytics.revenue_summary.arppu IS
        'net / paying_users; NULL where there are none.';
    PERFORM spectrum._add_kind('revenue', 30, '_maintain_revenue',
        '{spectrum.rollup_paying_days, analytics.mv_revenue_summary}', '{revenue_summary}');
    PERFORM spectrum._begin_report('revenue');
END
$$;
COMMENT ON FUNCTION spectrum._create_revenue() IS
    'Room 60: makes rollup_paying_days, mv_revenue_summary and its plain view.';

CREATE FUNCTION analytics._move_paying_days(p_report integer, p_built_to bigint)
RETURNS TABLE (scope bigint, day date, currency text, users bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    v_starts timestamptz[];
    v_days date[];
    v_refund_keys integer[] := analytics._refund_keys();
BEGIN
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;
    RETURN QUERY
    WITH orders AS (
        SELECT news.sign, news.user_key, news.scope, news.currency,
            width_bucket(news.occurred_at, v_starts) AS number
        FROM pg_temp.spectrum_news AS news
        WHERE news.revenue > 0 AND news.event_type_key <> ALL (v_refund_keys)
            AND news.user_key <> 0 AND news.user_key <= p_built_to
    ), added AS (
        INSERT INTO spectrum.rollup_paying_days (report_id, user_key, scope, day, currency)
        SELECT DISTINCT p_report, orders.user_key, orders.scope, v_days[orders.number],
            orders.currency
        FROM orders
        WHERE orders.sign > 0
        ON CONFLICT DO NOTHING
        RETURNING rollup_paying_days.scope, rollup_paying_days.day, rollup_paying_days.currency
    ), went AS (
        SELECT DISTINCT orders.user_key, orders.scope, orders.number, orders.currency
        FROM orders
        WHERE orders.sign <= 0
    ), removed AS (
        DELETE FROM spectrum.rollup_paying_days AS known
        USING went
        WHERE known.report_id = p_report AND known.user_key = went.user_key
            AND known.scope = went.scope AND known.day = v_days[went.number]
            AND known.currency = went.currency
            AND NOT EXISTS (
                SELECT FROM warehouse.fact_events AS fact
                WHERE fact.user_key = went.user_key
                    AND fact.occurred_at >= v_starts[went.number]
                    AND fact.occurred_at < v_starts[went.number + 1]
                    AND (went.scope = 0 OR fact.account_key = abs(went.scope))
                    AND fact.revenue > 0 AND fact.currency = went.currency
                    AND fact.event_type_key <> ALL (v_refund_keys)
            )
        RETURNING known.scope, known.day, known.currency
    )
    SELECT moved.scope, moved.day, moved.currency, sum(moved.users)::bigint
    FROM (
        SELECT added.*, 1 AS users FROM added
        UNION ALL
        SELECT removed.*, -1 FROM removed
    ) AS moved
    GROUP BY moved.scope, moved.day, moved.currency;
END
$$;
COMMENT ON FUNCTION analytics._move_paying_days(integer, bigint) IS
    'Brings rollup_paying_days up to the news and returns how many users that is more or less.';

CREATE FUNCTION analytics._refund_keys()
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        SELECT types.event_type_key FROM analytics.event_types AS types
        WHERE types.event_type = ANY ((SELECT s.refund_events FROM analytics.settings AS s)::text[])
    );
END
$$;
COMMENT ON FUNCTION analytics._refund_keys() IS
    'Keys of the event types whose amount is a refund, whatever its sign.';

CREATE FUNCTION analytics._maintain_revenue(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
    v_refund_keys integer[] := analytics._refund_keys();
BEGIN
    IF NOT EXISTS (SELECT FROM pg_temp.spectrum_news WHERE revenue IS NOT NULL) THEN
        RETURN;
    END IF;
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;
    INSERT INTO analytics.mv_revenue_summary AS sums (
        report_id, account_id, day, currency, money_events, orders, gross, refunds, paying_users
    )
    SELECT p_report, scopes.account_id, moved.day, moved.currency, sum(moved.money_events),
        sum(moved.orders), sum(moved.gross), sum(moved.refunds), sum(moved.paying_users)
    FROM (
        SELECT news.scope, v_days[width_bucket(news.occurred_at, v_starts)] AS day, news.currency,
            news.sign AS money_events,
            CASE WHEN kind.is_refund THEN 0 ELSE news.sign END AS orders,
            CASE WHEN kind.is_refund THEN 0 ELSE news.sign * news.revenue END AS gross,
            CASE WHEN kind.is_refund THEN news.sign * abs(news.revenue) ELSE 0 END AS refunds,
            0 AS paying_users
        FROM pg_temp.spectrum_news AS news
        CROSS JOIN LATERAL (
            SELECT news.revenue < 0 OR news.event_type_key = ANY (v_refund_keys) AS is_refund
        ) AS kind
        WHERE news.revenue IS NOT NULL AND news.user_key <= p_built_to
        UNION ALL
        SELECT payers.scope, payers.day, payers.currency, 0, 0, 0, 0, payers.users
        FROM analytics._move_paying_days(p_report, p_built_to) AS payers
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.day, moved.currency
    ON CONFLICT (report_id, account_id, day, currency) DO UPDATE SET
        money_events = sums.money_events + excluded.money_events,
        orders = sums.orders + excluded.orders,
        gross = sums.gross + excluded.gross,
        refunds = sums.refunds + excluded.refunds,
        paying_users = sums.paying_users + excluded.paying_users;

    DELETE FROM analytics.mv_revenue_summary AS sums
    USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
    WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
        -- A payer may be kept for an order that was made again, whose news is still to come.
        AND sums.money_events = 0 AND sums.paying_users = 0
        AND EXISTS (SELECT FROM pg_temp.spectrum_news WHERE sign <= 0);
END
$$;
COMMENT ON FUNCTION analytics._maintain_revenue(integer, bigint) IS
    'Moves mv_revenue_summary by the news that carry money.';
