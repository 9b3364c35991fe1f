-- Room 60, standing lifecycle: of each day, week and month, who is new, returns, comes back, stays
-- away. Follows the user-days that kind activity keeps (62_active_users_standing.sql). What an
-- active period counts as depends on the active one before alone, so a period that became active
-- or no longer is changes itself and the next active one: both are looked up, no history is read.

CREATE FUNCTION spectrum._create_lifecycle()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_lifecycle') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE analytics.mv_lifecycle (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        period_kind text COLLATE "C" NOT NULL,
        period date NOT NULL,
        new bigint NOT NULL,
        "returning" bigint NOT NULL,
        resurrecting bigint NOT NULL,
        dormant bigint NOT NULL,
        CONSTRAINT mv_lifecycle_pkey PRIMARY KEY (report_id, account_id, period_kind, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_lifecycle IS
        'Users by what a period is to them, per account and for all accounts together (account_id '
        '*), kept by refreshes; periods in which somebody counts, up to the one after the last '
        'event. Read it through analytics.lifecycle_periods.';
    COMMENT ON COLUMN analytics.mv_lifecycle.report_id IS 'spectrum.reports, kind lifecycle.';
    COMMENT ON COLUMN analytics.mv_lifecycle.period_kind IS 'day, week or month.';
    COMMENT ON COLUMN analytics.mv_lifecycle.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.mv_lifecycle.new IS 'Users active for the first time ever.';
    COMMENT ON COLUMN analytics.mv_lifecycle."returning" IS
        'Users active here and in the period before.';
    COMMENT ON COLUMN analytics.mv_lifecycle.resurrecting IS 'Users active again after a pause.';
    COMMENT ON COLUMN analytics.mv_lifecycle.dormant IS
        'Users of the period before who are not active here, as a negative number.';

    -- Each period that is kept, and the empty ones from there to the next.
    CREATE VIEW analytics.lifecycle_periods WITH (security_barrier) AS
    SELECT
        sums.account_id,
        sums.period_kind,
        calendar.period::date AS period,
        CASE WHEN calendar.number = 1 THEN sums.new ELSE 0 END AS new,
        CASE WHEN calendar.number = 1 THEN sums."returning" ELSE 0 END AS "returning",
        CASE WHEN calendar.number = 1 THEN sums.resurrecting ELSE 0 END AS resurrecting,
        CASE WHEN calendar.number = 1 THEN sums.dormant ELSE 0 END AS dormant,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT kept.*, lead(kept.period) OVER (
                PARTITION BY kept.account_id, kept.period_kind ORDER BY kept.period
            ) AS next_period
        FROM analytics.mv_lifecycle AS kept
        WHERE kept.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'lifecycle' AND report.state = 'served'
        ) AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR kept.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)))
    ) AS sums
    CROSS JOIN LATERAL generate_series(
        sums.period::timestamp,
        least(sums.next_period - 1, (
            SELECT last.day FROM warehouse.last_day AS last
        ))::timestamp,
        ('1 ' || sums.period_kind)::interval
    ) WITH ORDINALITY AS calendar (period, number);
    COMMENT ON VIEW analytics.lifecycle_periods IS
        'Users by what their activity is to them, by account (account_id *: all accounts), kind of '
        'period and period, from the first active one of each account to the last with an event.';
    COMMENT ON COLUMN analytics.lifecycle_periods.period_kind IS 'day, week or month.';
    COMMENT ON COLUMN analytics.lifecycle_periods.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.lifecycle_periods.new IS 'Users active for the first time ever.';
    COMMENT ON COLUMN analytics.lifecycle_periods."returning" IS
        'Users active here and in the period before.';
    COMMENT ON COLUMN analytics.lifecycle_periods.resurrecting IS
        'Users active again after a pause.';
    COMMENT ON COLUMN analytics.lifecycle_periods.dormant IS
        'Users of the period before who are not active here, as a negative number.';
    PERFORM spectrum._add_kind('lifecycle', 22, '_maintain_lifecycle',
        '{analytics.mv_lifecycle}', '{lifecycle_periods}');
    PERFORM spectrum._begin_report('lifecycle');
END
$$;
COMMENT ON FUNCTION spectrum._create_lifecycle() IS
    'Room 60: makes mv_lifecycle and its plain view.';

CREATE FUNCTION analytics._is_build(p_report integer, p_built_to bigint)
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN p_built_to = 9223372036854775807 AND EXISTS (
        SELECT FROM spectrum.reports WHERE report_id = p_report AND state = 'building'
    );
END
$$;
COMMENT ON FUNCTION analytics._is_build(integer, bigint) IS
    'Whether a report is told of users that it does not hold yet, with all of their history.';

CREATE FUNCTION analytics._kept_by(p_kind text)
RETURNS integer
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT max(report_id) FROM spectrum.reports
        WHERE kind = p_kind AND name = '' AND state <> 'discarded'
    );
END
$$;
COMMENT ON FUNCTION analytics._kept_by(text) IS
    'The report whose rows other reports read in a refresh: the latest of its kind, which follows '
    'the news whether it is served or being built.';

CREATE FUNCTION analytics._follow_user_days(p_report integer, p_built_to bigint)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._kept_by('activity');
BEGIN
    IF analytics._is_build(p_report, p_built_to) THEN
        PERFORM spectrum._empty_temporary('spectrum_day_changes',
            'user_key bigint, scope bigint, day date, is_added boolean');
        INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
        SELECT units.user_key, units.scope, known.day, true
        FROM pg_temp.spectrum_units AS units
        CROSS JOIN LATERAL (
            SELECT near.day FROM spectrum.rollup_user_days AS near
            WHERE near.report_id = v_activity AND near.user_key = units.user_key
                AND near.scope = units.scope
            OFFSET 0
        ) AS known;
    END IF;
    RETURN v_activity;
END
$$;
COMMENT ON FUNCTION analytics._follow_user_days(integer, bigint) IS
    'Sees to it that pg_temp.spectrum_day_changes says what changed for a report, all days where '
    'it is being built, and returns the report by which rollup_user_days are kept.';

CREATE FUNCTION analytics._changed_periods(
    p_activity integer,
    p_built_to bigint,
    p_starts date[]
)
RETURNS TABLE (
    user_key bigint,
    scope bigint,
    number integer,
    old_days bigint,
    new_days bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    SELECT moved.user_key, moved.scope, moved.number, now.days - moved.days, now.days
    FROM (
        SELECT changes.user_key, changes.scope, width_bucket(changes.day, p_starts) AS number,
            sum(CASE WHEN changes.is_added THEN 1 ELSE -1 END) AS days
        FROM pg_temp.spectrum_day_changes AS changes
        WHERE changes.user_key <= p_built_to
        GROUP BY 1, 2, 3
        HAVING sum(CASE WHEN changes.is_added THEN 1 ELSE -1 END) <> 0
    ) AS moved
    CROSS JOIN LATERAL (
        SELECT count(*) AS days FROM spectrum.rollup_user_days AS known
        WHERE known.report_id = p_activity AND known.user_key = moved.user_key
            AND known.scope = moved.scope AND known.day >= p_starts[moved.number]
            AND known.day < coalesce(p_starts[moved.number + 1], 'infinity')
        OFFSET 0
    ) AS now;
END
$$;
COMMENT ON FUNCTION analytics._changed_periods(integer, bigint, date[]) IS
    'The periods (numbered by p_starts) in which a user has more or less active days than before, '
    'by the changes laid out: how many he had and how many he has.';

CREATE FUNCTION analytics._changed_activity(
    p_activity integer,
    p_built_to bigint,
    p_starts date[],
    p_is_build boolean
)
RETURNS TABLE (
    user_key bigint,
    scope bigint,
    number integer,
    was_active boolean,
    is_active boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH changed AS MATERIALIZED (
        SELECT moved.user_key, moved.scope, moved.number, moved.old_days > 0 AS was_active,
            moved.new_days > 0 AS is_active
        FROM analytics._changed_periods(p_activity, p_built_to, p_starts) AS moved
        WHERE (moved.old_days > 0) <> (moved.new_days > 0)
    )
    SELECT near.user_key, near.scope, near.number, bool_and(near.was_active),
        bool_and(near.is_active)
    FROM (
        SELECT changed.* FROM changed
        UNION ALL
        SELECT changed.user_key, changed.scope, width_bucket(neighbour.day, p_starts), true, true
        FROM changed
        CROSS JOIN LATERAL (
            (SELECT known.day FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_activity AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.day < p_starts[changed.number]
            ORDER BY known.day DESC
            LIMIT 1)
            UNION ALL
            (SELECT known.day FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_activity AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.day >= p_starts[changed.number + 1]
            ORDER BY known.day
            LIMIT 1)
        ) AS neighbour
        -- A report that is being built is told of all that there is.
        WHERE NOT p_is_build
    ) AS near
    GROUP BY near.user_key, near.scope, near.number;
END
$$;
COMMENT ON FUNCTION analytics._changed_activity(integer, bigint, date[], boolean) IS
    'The periods that became active or no longer are, and the next active ones on both sides of '
    'each. Of two that follow each other here, one of them changed, none lies between: so what '
    'depends on the active period before can be told from these, as it was and as it is. Of two '
    'unchanged ones others may lie between, but then both versions say the same.';

CREATE FUNCTION analytics._move_lifecycle(
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
    v_last date := (v_starts[cardinality(v_starts)] + ('1 ' || p_period)::interval)::date;
BEGIN
    WITH active AS MATERIALIZED (
        SELECT known.* FROM analytics._changed_activity(
            p_activity, p_built_to, v_starts, analytics._is_build(p_report, p_built_to)
        ) AS known
    ),
    cells AS (
        SELECT version.scope, version.number,
            least(2, coalesce(version.number - version.previous, 0)) AS since,
            sum(version.sign) AS users
        FROM (
            SELECT scope, number, -1 AS sign,
                lag(number) OVER (PARTITION BY user_key, scope ORDER BY number) AS previous
            FROM active WHERE was_active
            UNION ALL
            SELECT scope, number, 1,
                lag(number) OVER (PARTITION BY user_key, scope ORDER BY number)
            FROM active WHERE is_active
        ) AS version
        GROUP BY 1, 2, 3
        HAVING sum(version.sign) <> 0
    )
    INSERT INTO analytics.mv_lifecycle AS sums (
        report_id, account_id, period_kind, period, new, "returning", resurrecting, dormant
    )
    SELECT p_report, scopes.account_id, p_period,
        coalesce(v_starts[cells.number + rule.shift], v_last),
        sum(cells.users * rule.new), sum(cells.users * rule."returning"),
        sum(cells.users * rule.resurrecting), sum(cells.users * rule.dormant)
    FROM cells
    JOIN analytics._lifecycle_rule() AS rule USING (since)
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, cells.number + rule.shift
    ON CONFLICT (report_id, account_id, period_kind, period) DO UPDATE SET
        new = sums.new + excluded.new,
        "returning" = sums."returning" + excluded."returning",
        resurrecting = sums.resurrecting + excluded.resurrecting,
        dormant = sums.dormant + excluded.dormant;
END
$$;
COMMENT ON FUNCTION analytics._move_lifecycle(integer, bigint, integer, text) IS
    'Moves the sums of one kind of period: each active one counts by the active one before it, cf. '
    'analytics._lifecycle_rule.';

CREATE FUNCTION analytics._maintain_lifecycle(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._follow_user_days(p_report, p_built_to);
BEGIN
    PERFORM analytics._move_lifecycle(p_report, p_built_to, v_activity, kind)
    FROM unnest('{day, week, month}'::text[]) AS kind;

    IF EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added) THEN
        DELETE FROM analytics.mv_lifecycle AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.new = 0 AND sums."returning" = 0 AND sums.resurrecting = 0
            AND sums.dormant = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_lifecycle(integer, bigint) IS
    'Moves mv_lifecycle by the user-days that came and went.';

CREATE FUNCTION analytics._standing_lifecycle_periods()
RETURNS TABLE (
    account_id text,
    period_kind text,
    period date,
    new bigint,
    "returning" bigint,
    resurrecting bigint,
    dormant bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT l.account_id, kinds.kind, l.period, l.new, l."returning", l.resurrecting, l.dormant
    FROM unnest('{day, week, month}'::text[]) AS kinds (kind)
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._lifecycle(
        kinds.kind, NULL, NULL, NULL, NULL, scopes.by_account
    ) AS l;
END
$$;
COMMENT ON FUNCTION analytics._standing_lifecycle_periods() IS
    'What analytics.lifecycle_periods has to show, out of all events: for verify().';
