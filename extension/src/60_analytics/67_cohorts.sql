-- Room 60, cohorts: of each user the week of his first event, and how many users of a cohort were
-- active in each week. Follows the user-days that kind activity keeps. Where an earlier event
-- arrives late, or the first one is withdrawn, the user's weeks change their cohort. Read by
-- feature adoption.

CREATE FUNCTION spectrum._create_cohorts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.rollup_cohorts') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_cohorts (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        cohort_week date NOT NULL,
        CONSTRAINT rollup_cohorts_pkey PRIMARY KEY (report_id, user_key, scope)
    );
    COMMENT ON TABLE spectrum.rollup_cohorts IS 'The week of each user''s first event.';
    COMMENT ON COLUMN spectrum.rollup_cohorts.report_id IS 'spectrum.reports, kind cohort.';
    COMMENT ON COLUMN spectrum.rollup_cohorts.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_cohorts.cohort_week IS 'First day of the week.';

    CREATE TABLE spectrum.rollup_cohort_weeks (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cohort_week date NOT NULL,
        period date NOT NULL,
        active_users bigint NOT NULL,
        CONSTRAINT rollup_cohort_weeks_pkey
        PRIMARY KEY (report_id, account_id, cohort_week, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_cohort_weeks IS
        'Active users of each week by the week of their first event: what feature adoption is a '
        'part of.';
    COMMENT ON COLUMN spectrum.rollup_cohort_weeks.report_id IS 'spectrum.reports, kind cohort.';
    COMMENT ON COLUMN spectrum.rollup_cohort_weeks.period IS 'First day of the week.';
    COMMENT ON COLUMN spectrum.rollup_cohort_weeks.active_users IS
        'Users of the cohort with any event in the week.';
    PERFORM spectrum._add_kind('cohort', 78, '_maintain_cohorts',
        '{spectrum.rollup_cohorts, spectrum.rollup_cohort_weeks}', '{}');
    PERFORM spectrum._begin_report('cohort');
END
$$;
COMMENT ON FUNCTION spectrum._create_cohorts() IS
    'Room 60: makes rollup_cohorts and rollup_cohort_weeks.';

CREATE FUNCTION analytics._find_cohort_moves(
    p_report integer,
    p_built_to bigint,
    p_activity integer,
    p_weeks date[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_cohort_moves',
        'user_key bigint, scope bigint, old_week date, new_week date');
    INSERT INTO pg_temp.spectrum_cohort_moves (user_key, scope, old_week, new_week)
    SELECT touched.user_key, touched.scope, known.cohort_week, found.week
    FROM (
        SELECT DISTINCT changes.user_key, changes.scope
        FROM pg_temp.spectrum_day_changes AS changes
        WHERE changes.user_key <= p_built_to
    ) AS touched
    LEFT JOIN LATERAL (
        SELECT before.cohort_week FROM spectrum.rollup_cohorts AS before
        WHERE before.report_id = p_report AND before.user_key = touched.user_key
            AND before.scope = touched.scope
        OFFSET 0
    ) AS known ON true
    LEFT JOIN LATERAL (
        SELECT p_weeks[width_bucket(active.day, p_weeks)] AS week
        FROM spectrum.rollup_user_days AS active
        WHERE active.report_id = p_activity AND active.user_key = touched.user_key
            AND active.scope = touched.scope
        ORDER BY active.day
        LIMIT 1
    ) AS found ON true
    WHERE known.cohort_week IS DISTINCT FROM found.week;
END
$$;
COMMENT ON FUNCTION analytics._find_cohort_moves(integer, bigint, integer, date[]) IS
    'Lays out in pg_temp.spectrum_cohort_moves which users have their first event in another week '
    'than before; NULL where they had none, or have none any more.';

CREATE FUNCTION analytics._maintain_cohorts(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._follow_user_days(p_report, p_built_to);
    v_weeks date[] := analytics._known_periods('week');
BEGIN
    PERFORM analytics._find_cohort_moves(p_report, p_built_to, v_activity, v_weeks);

    WITH weeks AS (
        SELECT near.user_key, near.scope, near.number, bool_and(near.was_active) AS was_active,
            bool_and(near.is_active) AS is_active
        FROM (
            SELECT changed.user_key, changed.scope, changed.number,
                changed.old_days > 0 AS was_active, changed.new_days > 0 AS is_active
            FROM analytics._changed_periods(v_activity, p_built_to, v_weeks) AS changed
            WHERE (changed.old_days > 0) <> (changed.new_days > 0)
            UNION ALL
            -- Who changes the cohort takes all weeks along.
            SELECT DISTINCT moves.user_key, moves.scope, width_bucket(known.day, v_weeks), true,
                true
            FROM pg_temp.spectrum_cohort_moves AS moves
            CROSS JOIN LATERAL (
                SELECT active.day FROM spectrum.rollup_user_days AS active
                WHERE active.report_id = v_activity AND active.user_key = moves.user_key
                    AND active.scope = moves.scope
                OFFSET 0
            ) AS known
        ) AS near
        GROUP BY near.user_key, near.scope, near.number
    ),
    cells AS (
        SELECT weeks.scope, version.cohort_week, weeks.number, sum(version.sign) AS users
        FROM weeks
        LEFT JOIN pg_temp.spectrum_cohort_moves AS moves USING (user_key, scope)
        LEFT JOIN LATERAL (
            SELECT known.cohort_week FROM spectrum.rollup_cohorts AS known
            WHERE known.report_id = p_report AND known.user_key = weeks.user_key
                AND known.scope = weeks.scope
            OFFSET 0
        ) AS before ON true
        CROSS JOIN LATERAL (
            VALUES (-1, weeks.was_active, before.cohort_week), (1, weeks.is_active,
                CASE WHEN moves.user_key IS NULL THEN before.cohort_week ELSE moves.new_week END)
        ) AS version (sign, counts, cohort_week)
        WHERE version.counts AND version.cohort_week IS NOT NULL
        GROUP BY 1, 2, 3
        HAVING sum(version.sign) <> 0
    )
    INSERT INTO spectrum.rollup_cohort_weeks AS sums (
        report_id, account_id, cohort_week, period, active_users
    )
    SELECT p_report, scopes.account_id, cells.cohort_week, v_weeks[cells.number], sum(cells.users)
    FROM cells
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, cells.cohort_week, cells.number
    ON CONFLICT (report_id, account_id, cohort_week, period) DO UPDATE SET
        active_users = sums.active_users + excluded.active_users;

    PERFORM analytics._keep_cohorts(p_report);
END
$$;
COMMENT ON FUNCTION analytics._maintain_cohorts(integer, bigint) IS
    'Moves rollup_cohort_weeks by the user-days that came and went.';

CREATE FUNCTION analytics._keep_cohorts(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    DELETE FROM spectrum.rollup_cohorts AS known
    USING pg_temp.spectrum_cohort_moves AS moves
    WHERE known.report_id = p_report AND known.user_key = moves.user_key
        AND known.scope = moves.scope AND moves.old_week IS NOT NULL;
    INSERT INTO spectrum.rollup_cohorts (report_id, user_key, scope, cohort_week)
    SELECT p_report, moves.user_key, moves.scope, moves.new_week
    FROM pg_temp.spectrum_cohort_moves AS moves
    WHERE moves.new_week IS NOT NULL;

    -- Only who was in a cohort before can leave one empty, or a week of it.
    IF EXISTS (SELECT FROM pg_temp.spectrum_cohort_moves WHERE old_week IS NOT NULL)
        OR EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added)
    THEN
        DELETE FROM spectrum.rollup_cohort_weeks AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.active_users = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._keep_cohorts(integer) IS
    'Keeps the cohorts that were found, and clears the sums that nobody is in any more.';
