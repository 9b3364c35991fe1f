-- Room 60, standing paths: the user's own definitions, and what follows what in the sessions of
-- each day. Of each session it keeps the path, and cuts again those around the news that kind
-- sessions cuts again (65_sessions_kept.sql).

CREATE FUNCTION spectrum._create_paths()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.paths') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.paths (
        paths text NOT NULL CONSTRAINT paths_pkey PRIMARY KEY,
        start_event text,
        max_steps integer NOT NULL
            CONSTRAINT paths_max_steps_range CHECK (max_steps BETWEEN 1 AND 100),
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.paths IS
        'The paths that analytics.path_flows shows. Define some with spectrum.define_paths().';
    COMMENT ON COLUMN spectrum.paths.paths IS 'Name.';
    COMMENT ON COLUMN spectrum.paths.start_event IS
        'Event that they begin with; NULL: the first of a session, whatever it is.';
    COMMENT ON COLUMN spectrum.paths.max_steps IS 'How many transitions of each count.';
    COMMENT ON COLUMN spectrum.paths.changed_at IS 'When they were last defined.';

    CREATE TABLE spectrum.rollup_paths (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        session_start timestamptz NOT NULL,
        steps integer[] NOT NULL,
        CONSTRAINT rollup_paths_pkey PRIMARY KEY (report_id, user_key, scope, session_start)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_paths IS
        'The path of each session of each user, where it has a transition.';
    COMMENT ON COLUMN spectrum.rollup_paths.report_id IS 'spectrum.reports, kind paths.';
    COMMENT ON COLUMN spectrum.rollup_paths.user_key IS 'dim_users; never the unknown user.';
    COMMENT ON COLUMN spectrum.rollup_paths.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_paths.session_start IS 'Time of the session''s first event.';
    COMMENT ON COLUMN spectrum.rollup_paths.steps IS 'dim_event_types, in order.';

    CREATE TABLE analytics.mv_path_flows (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        step integer NOT NULL,
        source integer NOT NULL,
        target integer NOT NULL,
        transitions bigint NOT NULL,
        users bigint NOT NULL,
        CONSTRAINT mv_path_flows_pkey
        PRIMARY KEY (report_id, account_id, day, step, source, target)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_path_flows IS
        'What follows what in the sessions that begin on a day, per account and for all accounts '
        'together (account_id *), kept by refreshes. Read it through analytics.path_flows.';
    COMMENT ON COLUMN analytics.mv_path_flows.report_id IS 'spectrum.reports, kind paths.';
    COMMENT ON COLUMN analytics.mv_path_flows.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_path_flows.source IS 'dim_event_types.';
    COMMENT ON COLUMN analytics.mv_path_flows.target IS 'dim_event_types.';

    CREATE VIEW analytics.path_flows WITH (security_barrier) AS
    SELECT
        sums.account_id,
        report.name AS paths,
        sums.day,
        sums.step,
        source.event_type AS source,
        target.event_type AS target,
        sums.transitions,
        sums.users,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_path_flows AS sums USING (report_id)
    JOIN warehouse.dim_event_types AS source ON source.event_type_key = sums.source
    JOIN warehouse.dim_event_types AS target ON target.event_type_key = sums.target
    WHERE report.kind = 'paths' AND report.state = 'served'
        AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR sums.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.path_flows IS
        'What follows what in the sessions that begin on a day, by account (account_id *: all '
        'accounts) and defined paths, as analytics.paths says of the day.';
    COMMENT ON COLUMN analytics.path_flows.paths IS 'Name in spectrum.paths.';
    COMMENT ON COLUMN analytics.path_flows.step IS
        'Place in the path: 1 leads from its first event to the second.';
    COMMENT ON COLUMN analytics.path_flows.source IS 'Event type.';
    COMMENT ON COLUMN analytics.path_flows.target IS 'Event type that follows it.';
    COMMENT ON COLUMN analytics.path_flows.transitions IS 'How often it did.';
    COMMENT ON COLUMN analytics.path_flows.users IS 'Distinct users of whom it did.';
    PERFORM spectrum._add_kind('paths', 74, '_maintain_paths',
        '{spectrum.rollup_paths, analytics.mv_path_flows}', '{path_flows}');
END
$$;
COMMENT ON FUNCTION spectrum._create_paths() IS
    'Room 60: makes spectrum.paths, the tables of the standing paths and their plain view.';

CREATE FUNCTION spectrum.define_paths(
    p_name text,
    p_start_event text DEFAULT NULL,
    p_max_steps integer DEFAULT 5
)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_max_steps(p_max_steps);
    IF p_start_event = '' THEN
        PERFORM spectrum._reject('p_start_event', p_start_event, 'an event type, or NULL');
    END IF;
    -- First of all: who defines the name meanwhile is waited for, and replaced.
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.paths WHERE paths = p_name;
    INSERT INTO spectrum.paths (paths, start_event, max_steps)
    VALUES (p_name, p_start_event, p_max_steps);
    PERFORM spectrum._begin_report('paths', p_name, to_jsonb(definition))
    FROM spectrum.paths AS definition WHERE paths = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_paths(text, text, integer) IS
    'Defines standing paths or replaces them: p_start_event and p_max_steps are those of '
    'analytics.paths. The next refresh shows them in analytics.path_flows.';

CREATE FUNCTION spectrum.drop_paths(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.paths WHERE paths = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.paths');
    END IF;
    PERFORM spectrum._discard_reports('paths', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_paths(text) IS
    'Removes standing paths.';

CREATE FUNCTION analytics._find_path_changes(
    p_report integer,
    p_built_to bigint,
    p_start_key integer,
    p_max_steps integer
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    r_windows record;
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_path_changes',
        'sign integer, LIKE spectrum.rollup_paths');
    SELECT array_agg(known.user_key) AS users, array_agg(known.scope) AS scopes,
        array_agg(known.since) AS sinces, array_agg(known.until) AS untils
    INTO r_windows
    FROM pg_temp.spectrum_session_windows AS known
    WHERE known.user_key <= p_built_to;

    INSERT INTO pg_temp.spectrum_path_changes
    WITH old_paths AS (
        SELECT known.*
        FROM unnest(r_windows.users, r_windows.scopes, r_windows.sinces, r_windows.untils)
            AS touched (user_key, scope, since, until)
        CROSS JOIN LATERAL (
            SELECT kept.* FROM spectrum.rollup_paths AS kept
            WHERE kept.report_id = p_report AND kept.user_key = touched.user_key
                AND kept.scope = touched.scope
                AND kept.session_start >= touched.since AND kept.session_start < touched.until
            OFFSET 0
        ) AS known
    ),
    new_paths AS (
        SELECT p_report, s.user_key, s.scope, s.started_at, s.path
        FROM (
            SELECT cut.*, analytics._path(cut.steps, p_start_key, p_max_steps) AS path
            FROM analytics._sessions(
                NULL, NULL, r_windows.users, coalesce(r_windows.scopes, '{}'), r_windows.sinces,
                r_windows.untils, NULL, '{steps}'
            ) AS cut
            OFFSET 0
        ) AS s
        WHERE cardinality(s.path) > 1
    )
    SELECT -1, gone.* FROM (TABLE old_paths EXCEPT TABLE new_paths) AS gone
    UNION ALL
    SELECT 1, come.* FROM (TABLE new_paths EXCEPT TABLE old_paths) AS come;
END
$$;
COMMENT ON FUNCTION analytics._find_path_changes(integer, bigint, integer, integer) IS
    'Cuts the windows laid out again and leaves in pg_temp.spectrum_path_changes which paths went '
    '(-1) and which came (1).';

CREATE FUNCTION analytics._move_paths(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_material = off
AS $$
BEGIN
    MERGE INTO spectrum.rollup_paths AS known
    USING (
        SELECT DISTINCT ON (changed.user_key, changed.scope, changed.session_start) changed.*
        FROM pg_temp.spectrum_path_changes AS changed
        ORDER BY changed.user_key, changed.scope, changed.session_start, changed.sign DESC
    ) AS come
    ON known.report_id = p_report AND known.user_key = come.user_key
        AND known.scope = come.scope AND known.session_start = come.session_start
    WHEN MATCHED AND come.sign < 0 THEN DELETE
    WHEN MATCHED THEN UPDATE SET steps = come.steps
    WHEN NOT MATCHED AND come.sign > 0 THEN
        INSERT (report_id, user_key, scope, session_start, steps)
        VALUES (p_report, come.user_key, come.scope, come.session_start, come.steps);
END
$$;
COMMENT ON FUNCTION analytics._move_paths(integer) IS
    'Brings rollup_paths up to the changes found.';

CREATE FUNCTION analytics._move_path_sums(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT spectrum.period_starts(
        'day', min(changed.session_start), max(changed.session_start) + interval '1 us'
    ) INTO v_starts
    FROM pg_temp.spectrum_path_changes AS changed;
    v_days := spectrum.period_dates(v_starts);

    WITH moved AS MATERIALIZED (
        SELECT changed.user_key, changed.scope, days.number, n.step,
            changed.steps[n.step] AS source, changed.steps[n.step + 1] AS target,
            sum(changed.sign) AS transitions
        FROM pg_temp.spectrum_path_changes AS changed
        CROSS JOIN LATERAL (SELECT width_bucket(changed.session_start, v_starts)) AS days (number)
        CROSS JOIN LATERAL generate_series(1, cardinality(changed.steps) - 1) AS n (step)
        GROUP BY 1, 2, 3, 4, 5, 6
        HAVING sum(changed.sign) <> 0
    ),
    now AS MATERIALIZED (
        SELECT days.user_key, days.scope, days.number, n.step, kept.steps[n.step] AS source,
            kept.steps[n.step + 1] AS target, count(*) AS transitions
        FROM (SELECT DISTINCT user_key, scope, number FROM moved) AS days
        CROSS JOIN LATERAL (
            SELECT known.steps FROM spectrum.rollup_paths AS known
            WHERE known.report_id = p_report AND known.user_key = days.user_key
                AND known.scope = days.scope AND known.session_start >= v_starts[days.number]
                AND known.session_start < v_starts[days.number + 1]
            OFFSET 0
        ) AS kept
        CROSS JOIN LATERAL generate_series(1, cardinality(kept.steps) - 1) AS n (step)
        GROUP BY 1, 2, 3, 4, 5, 6
    )
    INSERT INTO analytics.mv_path_flows AS sums (
        report_id, account_id, day, step, source, target, transitions, users
    )
    SELECT p_report, scopes.account_id, v_days[moved.number], moved.step, moved.source,
        moved.target, sum(moved.transitions),
        -- Of whom it is taken now, and of whom it was before.
        sum((now.transitions IS NOT NULL)::integer
            - (coalesce(now.transitions, 0) > moved.transitions)::integer)
    FROM moved
    LEFT JOIN now USING (user_key, scope, number, step, source, target)
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.number, moved.step, moved.source, moved.target
    ON CONFLICT (report_id, account_id, day, step, source, target) DO UPDATE SET
        transitions = sums.transitions + excluded.transitions,
        users = sums.users + excluded.users;
    IF EXISTS (SELECT FROM pg_temp.spectrum_path_changes WHERE sign < 0) THEN
        DELETE FROM analytics.mv_path_flows AS sums
        WHERE sums.report_id = p_report AND sums.transitions = 0 AND sums.day = ANY (v_days)
            AND sums.account_id = ANY (ARRAY(SELECT account_id FROM pg_temp.spectrum_scopes));
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._move_path_sums(integer) IS
    'Moves mv_path_flows by the changes found.';

CREATE FUNCTION analytics._maintain_paths(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF analytics._is_build(p_report, p_built_to) THEN
        PERFORM analytics._touch_sessions_whole(true);
    END IF;
    PERFORM analytics._find_path_changes(
        p_report, p_built_to, analytics._event_key(report.definition ->> 'start_event'),
        (report.definition ->> 'max_steps')::integer
    )
    FROM spectrum.reports AS report WHERE report.report_id = p_report;
    IF EXISTS (SELECT FROM pg_temp.spectrum_path_changes) THEN
        PERFORM analytics._move_paths(p_report);
        PERFORM analytics._move_path_sums(p_report);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_paths(integer, bigint) IS
    'Moves rollup_paths and mv_path_flows by the news.';

CREATE FUNCTION analytics._standing_path_flows()
RETURNS TABLE (
    account_id text, paths text, day date, step integer, source text, target text,
    transitions bigint, users bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := (
        SELECT h.starts FROM analytics._history_periods('day', NULL, NULL) AS h
    );
    v_days date[] := spectrum.period_dates(v_starts);
BEGIN
    RETURN QUERY
    SELECT s.account_id, s.paths, v_days[width_bucket(s.started_at, v_starts)], n.step,
        f.event_type, t.event_type, count(*), count(DISTINCT s.user_key)
    FROM (
        SELECT cut.account_id, cut.user_key, cut.started_at, report.name AS paths, analytics._path(
            cut.steps, analytics._event_key(report.definition ->> 'start_event'),
            (report.definition ->> 'max_steps')::integer
        ) AS steps
        FROM spectrum.reports AS report
        CROSS JOIN analytics._all_sessions('{steps}') AS cut
        WHERE report.kind = 'paths' AND report.state = 'served'
        OFFSET 0
    ) AS s
    CROSS JOIN LATERAL generate_series(1, cardinality(s.steps) - 1) AS n (step)
    JOIN analytics.event_types AS f ON f.event_type_key = s.steps[n.step]
    JOIN analytics.event_types AS t ON t.event_type_key = s.steps[n.step + 1]
    GROUP BY 1, 2, 3, 4, 5, 6;
END
$$;
COMMENT ON FUNCTION analytics._standing_path_flows() IS
    'What analytics.path_flows has to show, cut from all events: for verify().';
