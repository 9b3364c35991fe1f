-- Room 60, standing feature adoption, by weeks: in which weeks each user used a feature. One report
-- for each defined feature, and one, without a name, for all those that feature_used names. A use
-- counts in the cohort that 67_cohorts.sql has the user in.

CREATE FUNCTION spectrum._create_feature_adoption()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_feature_adoption') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_feature_weeks (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        feature text COLLATE "C" NOT NULL,
        period date NOT NULL,
        CONSTRAINT rollup_feature_weeks_pkey
        PRIMARY KEY (report_id, user_key, scope, feature, period)
    );
    COMMENT ON TABLE spectrum.rollup_feature_weeks IS
        'The weeks in which each user used a feature.';
    COMMENT ON COLUMN spectrum.rollup_feature_weeks.report_id IS 'spectrum.reports, kind feature.';
    COMMENT ON COLUMN spectrum.rollup_feature_weeks.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_feature_weeks.period IS 'First day of the week.';

    CREATE TABLE spectrum.rollup_features (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        feature text COLLATE "C" NOT NULL,
        user_weeks bigint NOT NULL,
        CONSTRAINT rollup_features_pkey PRIMARY KEY (report_id, account_id, feature)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_features IS
        'Which features were used in each account, and in any (account_id *).';
    COMMENT ON COLUMN spectrum.rollup_features.report_id IS 'spectrum.reports, kind feature.';
    COMMENT ON COLUMN spectrum.rollup_features.user_weeks IS
        'Weeks with a use, of all users together: at 0 the row goes.';

    CREATE TABLE analytics.mv_feature_adoption (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        feature text COLLATE "C" NOT NULL,
        cohort_week date NOT NULL,
        period date NOT NULL,
        users bigint NOT NULL,
        first_users bigint NOT NULL,
        CONSTRAINT mv_feature_adoption_pkey
        PRIMARY KEY (report_id, account_id, feature, cohort_week, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_feature_adoption IS
        'Users of each feature by week and by the week of their first event, per account and for '
        'all accounts together (account_id *), kept by refreshes. Read it through '
        'analytics.feature_adoption.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.report_id IS 'spectrum.reports, kind feature.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.period IS 'First day of the week.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.users IS
        'Users of the cohort who used the feature in the week.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.first_users IS
        'Those of them who did in no week before.';
    PERFORM spectrum._show_feature_adoption();
    PERFORM spectrum._add_kind('feature', 80, '_maintain_features',
        '{spectrum.rollup_feature_weeks, spectrum.rollup_features, '
        'analytics.mv_feature_adoption}', '{feature_adoption}');
    PERFORM spectrum._begin_report('feature');
    PERFORM spectrum._begin_report('feature', definition.feature, to_jsonb(definition))
    FROM spectrum.features AS definition;
END
$$;
COMMENT ON FUNCTION spectrum._create_feature_adoption() IS
    'Room 60: makes the tables that feature adoption is kept by, and its plain view.';

CREATE FUNCTION spectrum._show_feature_adoption()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.feature_adoption WITH (security_barrier) AS
    SELECT
        shown.account_id,
        shown.feature,
        shown.cohort_week,
        shown.period,
        shown.active_users,
        coalesce(sums.users, 0) AS users,
        coalesce(sums.first_users, 0) AS first_users,
        coalesce(sums.users - sums.first_users, 0) AS repeat_users,
        coalesce(sums.users, 0) / shown.active_users::double precision AS rate,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT defined.report_id, cells.account_id, defined.name AS feature, cells.cohort_week,
            cells.period, cells.active_users
        FROM spectrum.rollup_cohort_weeks AS cells
        JOIN spectrum.reports AS defined
            ON defined.kind = 'feature' AND defined.state = 'served' AND defined.name <> ''
        WHERE cells.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'cohort' AND report.state = 'served'
        )
        UNION ALL
        SELECT known.report_id, cells.account_id, known.feature, cells.cohort_week, cells.period,
            cells.active_users
        FROM spectrum.rollup_cohort_weeks AS cells
        JOIN spectrum.rollup_features AS known USING (account_id)
        WHERE cells.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'cohort' AND report.state = 'served'
            )
            AND known.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'feature' AND report.state = 'served' AND report.name = ''
            )
            -- A definition takes the place of the value of its name.
            AND known.feature <> ALL (ARRAY(
                SELECT report.name FROM spectrum.reports AS report
                WHERE report.kind = 'feature' AND report.state = 'served'
            ))
    ) AS shown
    LEFT JOIN analytics.mv_feature_adoption AS sums
        ON sums.report_id = shown.report_id AND sums.account_id = shown.account_id
            AND sums.feature = shown.feature AND sums.cohort_week = shown.cohort_week
            AND sums.period = shown.period
            -- With that, one look at an account's rows finds all.
            AND sums.report_id = ANY (ARRAY(
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'feature' AND report.state = 'served'
            ))
    WHERE ((SELECT caller.sees_all FROM warehouse.caller)
        OR shown.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.feature_adoption IS
        'Who of those who were active in a week used a feature, by account (account_id *: all '
        'accounts), feature and week of the user''s first event. Each feature that is defined or '
        'was used in the account, with each cohort and week that has an active user.';
    COMMENT ON COLUMN analytics.feature_adoption.feature IS
        'In spectrum.features, or what an event feature_used names.';
    COMMENT ON COLUMN analytics.feature_adoption.cohort_week IS
        'First day of the week of the user''s first event.';
    COMMENT ON COLUMN analytics.feature_adoption.period IS 'First day of the week.';
    COMMENT ON COLUMN analytics.feature_adoption.active_users IS
        'Users of the cohort with any event in the week.';
    COMMENT ON COLUMN analytics.feature_adoption.users IS
        'Those of them who used the feature in it.';
    COMMENT ON COLUMN analytics.feature_adoption.first_users IS
        'Those of them who did in no week before.';
    COMMENT ON COLUMN analytics.feature_adoption.repeat_users IS 'users - first_users.';
    COMMENT ON COLUMN analytics.feature_adoption.rate IS 'users / active_users.';
END
$$;
COMMENT ON FUNCTION spectrum._show_feature_adoption() IS
    'Room 60: makes the view analytics.feature_adoption.';

CREATE FUNCTION analytics._add_feature_weeks(p_report integer, p_weeks date[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- Also in a table that was empty when this was planned.
SET enable_seqscan = off
AS $$
BEGIN
    WITH added AS (
        INSERT INTO spectrum.rollup_feature_weeks (report_id, user_key, scope, feature, period)
        SELECT p_report, uses.user_key, uses.scope, uses.feature, p_weeks[uses.number]
        FROM pg_temp.spectrum_feature_uses AS uses
        LEFT JOIN LATERAL (
            SELECT true AS is_known FROM spectrum.rollup_feature_weeks AS known
            WHERE known.report_id = p_report AND known.user_key = uses.user_key
                AND known.scope = uses.scope AND known.feature = uses.feature
                AND known.period = p_weeks[uses.number]
            OFFSET 0
        ) AS before ON true
        WHERE uses.sign > 0 AND before.is_known IS NULL
        RETURNING user_key, scope, feature, period
    )
    INSERT INTO pg_temp.spectrum_feature_changes (user_key, scope, feature, period, is_added)
    SELECT added.*, true FROM added;
END
$$;
COMMENT ON FUNCTION analytics._add_feature_weeks(integer, date[]) IS
    'Adds to rollup_feature_weeks what pg_temp.spectrum_feature_uses brings, and notes what is new '
    'in pg_temp.spectrum_feature_changes.';

CREATE FUNCTION analytics._move_feature_weeks(
    p_report integer,
    p_built_to bigint,
    p_feature text,
    p_event_key integer,
    p_filter jsonb
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_weeks date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_feature_uses',
        'sign integer, user_key bigint, scope bigint, feature text, number integer');
    PERFORM spectrum._empty_temporary('spectrum_feature_changes',
        'user_key bigint, scope bigint, feature text COLLATE "C", period date, is_added boolean');
    SELECT spectrum.period_starts('week', min(news.occurred_at),
        max(news.occurred_at) + interval '1 us') INTO v_starts
    FROM pg_temp.spectrum_news AS news;
    v_weeks := spectrum.period_dates(v_starts);

    INSERT INTO pg_temp.spectrum_feature_uses (
        sign, user_key, scope, feature, number
    )
    SELECT DISTINCT uses.* FROM (
        SELECT news.sign, news.user_key, news.scope,
            coalesce(p_feature, news.properties ->> 'feature') AS feature,
            width_bucket(news.occurred_at, v_starts)
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
            AND (p_event_key IS NULL OR news.event_type_key = p_event_key)
            AND (p_filter IS NULL OR news.properties @> p_filter)
    ) AS uses
    WHERE length(uses.feature) BETWEEN 1 AND 200;

    PERFORM analytics._add_feature_weeks(p_report, v_weeks);

    WITH went AS (
        SELECT DISTINCT user_key, scope, feature, number FROM pg_temp.spectrum_feature_uses
        WHERE sign <= 0
    ), removed AS (
        DELETE FROM spectrum.rollup_feature_weeks AS known
        USING went
        WHERE known.report_id = p_report AND known.user_key = went.user_key
            AND known.scope = went.scope AND known.feature = went.feature
            AND known.period = v_weeks[went.number]
            AND NOT EXISTS (
                SELECT FROM warehouse.fact_events AS fact
                WHERE fact.user_key = went.user_key
                    AND fact.occurred_at >= v_starts[went.number]
                    AND fact.occurred_at < v_starts[went.number + 1]
                    AND (went.scope = 0 OR fact.account_key = abs(went.scope))
                    AND (p_event_key IS NULL OR fact.event_type_key = p_event_key)
                    AND (p_filter IS NULL OR fact.properties @> p_filter)
                    AND (p_feature IS NOT NULL OR fact.properties ->> 'feature' = went.feature)
            )
        RETURNING known.user_key, known.scope, known.feature, known.period
    )
    INSERT INTO pg_temp.spectrum_feature_changes (user_key, scope, feature, period, is_added)
    SELECT removed.*, false FROM removed;
END
$$;
COMMENT ON FUNCTION analytics._move_feature_weeks(integer, bigint, text, integer, jsonb) IS
    'Brings rollup_feature_weeks up to the news and leaves in pg_temp.spectrum_feature_changes '
    'which weeks of use came and which went. p_feature NULL: of the features that events name.';

CREATE FUNCTION analytics._changed_features(p_report integer, p_is_build boolean)
RETURNS TABLE (
    user_key bigint,
    scope bigint,
    feature text,
    period date,
    was_used boolean,
    is_used boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH changed AS MATERIALIZED (
        SELECT c.user_key, c.scope, c.feature, c.period, NOT bool_and(c.is_added) AS was_used,
            bool_and(c.is_added) AS is_used
        FROM pg_temp.spectrum_feature_changes AS c
        GROUP BY c.user_key, c.scope, c.feature, c.period
        HAVING count(*) = 1
    )
    SELECT near.user_key, near.scope, near.feature, near.period, bool_and(near.was_used),
        bool_and(near.is_used)
    FROM (
        SELECT changed.* FROM changed
        UNION ALL
        SELECT changed.user_key, changed.scope, changed.feature, neighbour.period, true, true
        FROM changed
        CROSS JOIN LATERAL (
            (SELECT known.period FROM spectrum.rollup_feature_weeks AS known
            WHERE known.report_id = p_report AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.feature = changed.feature
                AND known.period < changed.period
            ORDER BY known.period DESC
            LIMIT 1)
            UNION ALL
            (SELECT known.period FROM spectrum.rollup_feature_weeks AS known
            WHERE known.report_id = p_report AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.feature = changed.feature
                AND known.period > changed.period
            ORDER BY known.period
            LIMIT 1)
        ) AS neighbour
        WHERE NOT p_is_build
        UNION ALL
        -- Who changes the cohort takes all weeks along.
        SELECT moves.user_key, moves.scope, taken.feature, taken.period, true, true
        FROM pg_temp.spectrum_cohort_moves AS moves
        CROSS JOIN LATERAL (
            SELECT known.feature, known.period FROM spectrum.rollup_feature_weeks AS known
            WHERE known.report_id = p_report AND known.user_key = moves.user_key
                AND known.scope = moves.scope
            OFFSET 0
        ) AS taken
        WHERE NOT p_is_build
    ) AS near
    GROUP BY near.user_key, near.scope, near.feature, near.period;
END
$$;
COMMENT ON FUNCTION analytics._changed_features(integer, boolean) IS
    'The weeks of use that came and went, the next ones on both sides of each, and all of users '
    'who change their cohort: what a use was counted as before and now can be told from these, cf. '
    'analytics._changed_activity.';

CREATE FUNCTION analytics._move_feature_adoption(p_report integer, p_is_build boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cohorts integer := analytics._kept_by('cohort');
BEGIN
    WITH weeks AS MATERIALIZED (
        SELECT used.*, now.cohort_week AS new_week,
            CASE WHEN moves.user_key IS NULL THEN now.cohort_week ELSE moves.old_week END
                AS old_week
        FROM analytics._changed_features(p_report, p_is_build) AS used
        LEFT JOIN pg_temp.spectrum_cohort_moves AS moves
            ON moves.user_key = used.user_key AND moves.scope = used.scope AND NOT p_is_build
        LEFT JOIN LATERAL (
            SELECT known.cohort_week FROM spectrum.rollup_cohorts AS known
            WHERE known.report_id = v_cohorts AND known.user_key = used.user_key
                AND known.scope = used.scope
            OFFSET 0
        ) AS now ON true
    ),
    cells AS MATERIALIZED (
        SELECT scopes.account_id, version.feature, version.cohort_week, version.period,
            sum(version.sign) AS users,
            coalesce(sum(version.sign) FILTER (WHERE version.number = 1), 0) AS first_users
        FROM (
            SELECT -1 AS sign, scope, feature, old_week AS cohort_week, period,
                row_number() OVER (PARTITION BY user_key, scope, feature ORDER BY period) AS number
            FROM weeks WHERE was_used
            UNION ALL
            SELECT 1, scope, feature, new_week, period,
                row_number() OVER (PARTITION BY user_key, scope, feature ORDER BY period)
            FROM weeks WHERE is_used
        ) AS version
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE version.cohort_week IS NOT NULL
        GROUP BY 1, 2, 3, 4
    ),
    features AS (
        INSERT INTO spectrum.rollup_features AS sums (report_id, account_id, feature, user_weeks)
        SELECT p_report, cells.account_id, cells.feature, sum(cells.users)
        FROM cells
        GROUP BY cells.account_id, cells.feature
        HAVING sum(cells.users) <> 0
        ON CONFLICT (report_id, account_id, feature) DO UPDATE SET
            user_weeks = sums.user_weeks + excluded.user_weeks
    )
    INSERT INTO analytics.mv_feature_adoption AS sums (
        report_id, account_id, feature, cohort_week, period, users, first_users
    )
    SELECT p_report, cells.account_id, cells.feature, cells.cohort_week, cells.period,
        cells.users, cells.first_users
    FROM cells
    WHERE cells.users <> 0 OR cells.first_users <> 0
    ON CONFLICT (report_id, account_id, feature, cohort_week, period) DO UPDATE SET
        users = sums.users + excluded.users,
        first_users = sums.first_users + excluded.first_users;
END
$$;
COMMENT ON FUNCTION analytics._move_feature_adoption(integer, boolean) IS
    'Moves the sums of a feature by the weeks of use that changed: each counts in the user''s '
    'cohort, the first one as such.';

CREATE FUNCTION analytics._maintain_features(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_is_build boolean := analytics._is_build(p_report, p_built_to);
BEGIN
    IF to_regclass('pg_temp.spectrum_cohort_moves') IS NULL THEN
        PERFORM spectrum._empty_temporary('spectrum_cohort_moves',
            'user_key bigint, scope bigint, old_week date, new_week date');
    END IF;
    PERFORM analytics._move_feature_weeks(
        p_report, p_built_to, nullif(report.name, ''),
        analytics._event_key(
            CASE report.name WHEN '' THEN 'feature_used' ELSE definition.event_type END
        ),
        definition.properties_filter
    )
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.features, report.definition)
        AS definition
    WHERE report.report_id = p_report;
    PERFORM analytics._move_feature_adoption(p_report, v_is_build);

    IF EXISTS (SELECT FROM pg_temp.spectrum_feature_changes WHERE NOT is_added)
        OR EXISTS (SELECT FROM pg_temp.spectrum_cohort_moves WHERE old_week IS NOT NULL)
    THEN
        DELETE FROM analytics.mv_feature_adoption AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.users = 0;
        DELETE FROM spectrum.rollup_features AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.user_weeks = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_features(integer, bigint) IS
    'Moves the sums of a defined feature, or of those that events name, by the news.';

CREATE FUNCTION analytics._standing_feature_adoption()
RETURNS TABLE (
    account_id text,
    feature text,
    cohort_week date,
    period date,
    active_users bigint,
    users bigint,
    first_users bigint,
    repeat_users bigint,
    rate double precision
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definitions jsonb := (
        SELECT coalesce(jsonb_agg(report.definition), '[]') FROM spectrum.reports AS report
        WHERE report.kind = 'feature' AND report.state = 'served' AND report.name <> ''
    );
BEGIN
    RETURN QUERY
    SELECT a.account_id, a.feature, a.cohort_week, a.period, a.active_users, a.users,
        a.first_users, a.users - a.first_users, a.users / a.active_users::double precision
    FROM (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._feature_adoption(
        NULL, 'week', NULL, NULL, NULL, scopes.by_account, v_definitions
    ) AS a;
END
$$;
COMMENT ON FUNCTION analytics._standing_feature_adoption() IS
    'What analytics.feature_adoption has to show, out of all events: for verify().';
