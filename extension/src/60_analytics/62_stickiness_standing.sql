-- Room 60, standing stickiness: on how many days of each week and of each month users were active.
-- Follows the user-days that kind activity keeps (62_active_users_standing.sql): a user whose
-- number of days in a period changed leaves one number and joins another.

CREATE FUNCTION spectrum._create_stickiness()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_stickiness') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE analytics.mv_stickiness (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        period_kind text COLLATE "C" NOT NULL,
        period date NOT NULL,
        users bigint[] NOT NULL,
        CONSTRAINT mv_stickiness_pkey PRIMARY KEY (report_id, account_id, period_kind, period)
    ) WITH (fillfactor = 70);
    COMMENT ON TABLE analytics.mv_stickiness IS
        'Users by the number of their active days in a week or month, per account and for all '
        'accounts together (account_id *), kept by refreshes. Read it through '
        'analytics.stickiness_periods.';
    COMMENT ON COLUMN analytics.mv_stickiness.report_id IS 'spectrum.reports, kind stickiness.';
    COMMENT ON COLUMN analytics.mv_stickiness.period_kind IS 'week or month.';
    COMMENT ON COLUMN analytics.mv_stickiness.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.mv_stickiness.users IS
        'Element k: users active on exactly k days of it; as many elements as it has days.';

    CREATE VIEW analytics.stickiness_periods WITH (security_barrier) AS
    SELECT
        sums.account_id,
        sums.period_kind,
        sums.period,
        exactly.days::integer AS days,
        exactly.users AS users_exactly,
        (sum(exactly.users) OVER (
            PARTITION BY sums.account_id, sums.period_kind, sums.period ORDER BY exactly.days DESC
        ))::bigint AS users_at_least,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_stickiness AS sums
    CROSS JOIN LATERAL unnest(sums.users) WITH ORDINALITY AS exactly (users, days)
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'stickiness' AND report.state = 'served'
    ) AND ((SELECT caller.sees_all FROM warehouse.caller)
        OR sums.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.stickiness_periods IS
        'On how many days of a week or month users were active, by account (account_id *: all '
        'accounts): one row for each number of days that it has, in periods with an active user.';
    COMMENT ON COLUMN analytics.stickiness_periods.period_kind IS 'week or month.';
    COMMENT ON COLUMN analytics.stickiness_periods.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.stickiness_periods.days IS 'Number of active days in it, from 1.';
    COMMENT ON COLUMN analytics.stickiness_periods.users_exactly IS
        'Users active on just so many days of it.';
    COMMENT ON COLUMN analytics.stickiness_periods.users_at_least IS
        'Users active on so many days of it or more.';
    PERFORM spectrum._add_kind('stickiness', 24, '_maintain_stickiness',
        '{analytics.mv_stickiness}', '{stickiness_periods}');
    PERFORM spectrum._begin_report('stickiness');
END
$$;
COMMENT ON FUNCTION spectrum._create_stickiness() IS
    'Room 60: makes mv_stickiness and its plain view.';

CREATE FUNCTION analytics._move_stickiness(
    p_report integer,
    p_built_to bigint,
    p_activity integer,
    p_period text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
BEGIN
    WITH moves AS (
        SELECT scopes.account_id, cells.number, cells.days, sum(cells.users) AS users
        FROM (
            SELECT moved.scope, moved.number, version.days, sum(version.sign) AS users
            FROM analytics._changed_periods(p_activity, p_built_to, v_starts) AS moved
            CROSS JOIN LATERAL (
                VALUES (-1, moved.old_days), (1, moved.new_days)
            ) AS version (sign, days)
            WHERE version.days > 0
            GROUP BY 1, 2, 3
            HAVING sum(version.sign) <> 0
        ) AS cells
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cells.number, cells.days
    )
    INSERT INTO analytics.mv_stickiness AS sums (
        report_id, account_id, period_kind, period, users
    )
    SELECT p_report, touched.account_id, p_period, v_starts[touched.number], array_agg(
        coalesce(moves.users, 0)::bigint ORDER BY days.number)
    FROM (SELECT DISTINCT account_id, number FROM moves) AS touched
    CROSS JOIN LATERAL generate_series(
        1, (v_starts[touched.number] + ('1 ' || p_period)::interval)::date
            - v_starts[touched.number]
    ) AS days (number)
    LEFT JOIN moves ON moves.account_id = touched.account_id AND moves.number = touched.number
        AND moves.days = days.number
    GROUP BY touched.account_id, touched.number
    ON CONFLICT (report_id, account_id, period_kind, period) DO UPDATE SET
        -- Spelled out here it takes less than half the time of spectrum._add_arrays.
        users = ARRAY(
            SELECT pair.so_far + pair.more
            FROM unnest(sums.users, excluded.users) WITH ORDINALITY AS pair (so_far, more, days)
            ORDER BY pair.days
        );
END
$$;
COMMENT ON FUNCTION analytics._move_stickiness(integer, bigint, integer, text) IS
    'Moves the sums of weeks or of months.';

CREATE FUNCTION analytics._maintain_stickiness(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._follow_user_days(p_report, p_built_to);
BEGIN
    PERFORM analytics._move_stickiness(p_report, p_built_to, v_activity, kind)
    FROM unnest('{week, month}'::text[]) AS kind;

    IF EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added) THEN
        DELETE FROM analytics.mv_stickiness AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND 0 = ALL (sums.users);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_stickiness(integer, bigint) IS
    'Moves mv_stickiness by the user-days that came and went.';

CREATE FUNCTION analytics._standing_stickiness_periods()
RETURNS TABLE (
    account_id text,
    period_kind text,
    period date,
    days integer,
    users_exactly bigint,
    users_at_least bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[] := (
        SELECT h.starts FROM analytics._history_periods('day', NULL, NULL) AS h
    );
    v_days date[] := spectrum.period_dates(v_starts);
BEGIN
    RETURN QUERY
    WITH users AS (
        SELECT u.account_id, kinds.kind, first.day, count(*)::integer AS days
        FROM (VALUES (false), (true)) AS scopes (by_account)
        CROSS JOIN LATERAL analytics._active_periods(NULL, v_starts, NULL, scopes.by_account) AS u
        CROSS JOIN LATERAL unnest(u.numbers) AS a (number)
        CROSS JOIN unnest('{week, month}'::text[]) AS kinds (kind)
        CROSS JOIN analytics.settings AS setting
        CROSS JOIN LATERAL (
            SELECT spectrum._period_day(
                kinds.kind, v_days[a.number]::timestamp, setting.week_start
            )::date AS day
        ) AS first
        GROUP BY u.account_id, u.user_key, kinds.kind, first.day
    )
    SELECT users.account_id, users.kind, users.day, n.number,
        count(*) FILTER (WHERE users.days = n.number),
        count(*) FILTER (WHERE users.days >= n.number)
    FROM users
    CROSS JOIN LATERAL generate_series(
        1, (users.day + ('1 ' || users.kind)::interval)::date - users.day
    ) AS n (number)
    GROUP BY users.account_id, users.kind, users.day, n.number;
END
$$;
COMMENT ON FUNCTION analytics._standing_stickiness_periods() IS
    'What analytics.stickiness_periods has to show, out of all events: for verify().';
