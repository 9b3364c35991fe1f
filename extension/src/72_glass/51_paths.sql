-- Room 72, glass of the paths: which two events a transition leads from and to.

CREATE FUNCTION analytics._path_evidence(
    p_definition jsonb, p_account text, p_from timestamptz, p_to timestamptz, p_user bigint
)
RETURNS TABLE (
    user_key bigint, started_at timestamptz, step integer, source text, target text,
    event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_start_key integer := analytics._event_key(p_definition ->> 'start_event');
    v_max_steps integer := (p_definition ->> 'max_steps')::integer;
BEGIN
    RETURN QUERY
    WITH visits AS MATERIALIZED (
        -- What comes before the path is as long as the session is longer than its rest.
        SELECT s.user_key, s.started_at, s.ended_at, rest.steps,
            cardinality(s.steps) - cardinality(rest.steps) AS before
        FROM (
            SELECT cut.* FROM analytics._sessions_between(p_from, p_to, p_account, '{steps}') AS cut
            WHERE p_user IS NULL
            UNION ALL
            SELECT cut.*
            FROM analytics._sessions(
                NULL, NULL, ARRAY[p_user], NULL, '{-infinity}', '{infinity}', p_account, '{steps}'
            ) AS cut
            WHERE p_user IS NOT NULL
        ) AS s
        CROSS JOIN LATERAL (
            SELECT analytics._path(s.steps, v_start_key, s.events) AS steps
        ) AS rest
    ),
    numbered AS (
        SELECT v.*, e.event_id, e.occurred_at, row_number() OVER (
                PARTITION BY v.user_key, v.started_at ORDER BY e.occurred_at, e.event_id
            ) - v.before AS number
        FROM visits AS v
        JOIN analytics.events AS e ON e.user_key = v.user_key
            AND e.occurred_at >= v.started_at AND e.occurred_at <= v.ended_at
        WHERE p_account IS NULL OR e.account_id = p_account
    )
    SELECT n.user_key, n.started_at, edge.step::integer, f.event_type, t.event_type, n.event_id,
        n.occurred_at
    FROM numbered AS n
    CROSS JOIN LATERAL (VALUES (n.number), (n.number - 1)) AS edge (step)
    JOIN analytics.event_types AS f ON f.event_type_key = n.steps[edge.step]
    JOIN analytics.event_types AS t ON t.event_type_key = n.steps[edge.step + 1]
    WHERE edge.step <= v_max_steps;
END
$$;
COMMENT ON FUNCTION analytics._path_evidence(
    jsonb, text, timestamptz, timestamptz, bigint
) IS
    'The transitions of the sessions that begin in [p_from, p_to), or of all of one user, each '
    'with both of its events. p_account: of the events of that account alone.';

CREATE FUNCTION analytics._path_rule(p_definition jsonb, p_measure text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('Two successive events of a session that begins on the day, at this place of '
        'its path, which begins with %s: %s.',
        coalesce('its first event ' || (p_definition ->> 'start_event'), 'its first event'),
        CASE p_measure WHEN 'users' THEN 'a user counts once who has such a session'
            ELSE 'each such session counts once' END);
END
$$;
COMMENT ON FUNCTION analytics._path_rule(jsonb, text) IS
    'By what path_flows counts, in words.';

CREATE FUNCTION analytics._trace_path_flows(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(
        p_cell, '{paths, day, step, source, target}', '{transitions, users}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_step integer := analytics._cell_number(v_cell, 'step');
    v_definition jsonb := analytics._served_definition('paths', v_cell ->> 'paths');
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    RETURN QUERY
    SELECT analytics._path_rule(v_definition, v_cell ->> 'measure'),
        CASE v_cell ->> 'measure' WHEN 'transitions' THEN
            format('%s %s', found.user_key, found.started_at)
        END,
        NULL::numeric, found.user_key, found.event_id, found.occurred_at
    FROM analytics._path_evidence(
        v_definition, nullif(v_cell ->> 'account_id', '*'), r_days.since, r_days.until, NULL
    ) AS found
    WHERE found.step = v_step AND found.source = v_cell ->> 'source'
        AND found.target = v_cell ->> 'target';
END
$$;
COMMENT ON FUNCTION analytics._trace_path_flows(jsonb) IS
    'See analytics.trace: events behind a cell of path_flows.';

CREATE FUNCTION analytics._cells_path_flows(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'paths', report.name,
            'day', analytics._day_of(found.started_at), 'step', found.step,
            'source', found.source, 'target', found.target, 'measure', m.measure),
        analytics._path_rule(report.definition, m.measure)
    FROM analytics.served_reports AS report
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._path_evidence(
        report.definition, nullif(scope.account_id, '*'), NULL, NULL, p_user
    ) AS found
    CROSS JOIN (VALUES ('transitions'), ('users')) AS m (measure)
    WHERE report.kind = 'paths' AND p_user <> 0 AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_path_flows(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of path_flows that count an event.';
