-- Room 60, paths: what follows what inside a session. Reads analytics.events through the sessions
-- cut from them (65_sessions.sql).

CREATE FUNCTION analytics._path(p_steps integer[], p_start_key integer, p_max_steps integer)
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_first integer := CASE WHEN p_start_key IS NULL THEN 1
        ELSE array_position(p_steps, p_start_key) END;
BEGIN
    RETURN p_steps[v_first : v_first + p_max_steps];
END
$$;
COMMENT ON FUNCTION analytics._path(integer[], integer, integer) IS
    'The path in a session: its event types from the first start event on (NULL: from the first '
    'event), as many as p_max_steps transitions have; NULL where there is no start event.';

CREATE FUNCTION analytics._check_max_steps(p_max_steps integer)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_max_steps IS NULL OR p_max_steps NOT BETWEEN 1 AND 100 THEN
        PERFORM spectrum._reject('p_max_steps', p_max_steps::text, 'a number from 1 to 100');
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_max_steps(integer) IS
    'Raises 22023 unless paths can be as long.';

CREATE FUNCTION analytics.paths(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_start_event text DEFAULT NULL,
    p_max_steps integer DEFAULT 5,
    p_account text DEFAULT NULL
)
RETURNS TABLE (step integer, source text, target text, transitions bigint, users bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_start_key integer := analytics._event_key(p_start_event);
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_max_steps(p_max_steps);
    IF v_start_key = -1 THEN
        RETURN;
    END IF;

    RETURN QUERY
    WITH walks AS MATERIALIZED (
        SELECT s.user_key, analytics._path(s.steps, v_start_key, p_max_steps) AS steps
        FROM analytics._sessions_between(p_from, p_to, p_account, '{steps}') AS s
        WHERE s.events > 1
    ),
    edges_of_users AS (
        SELECT w.user_key, n.step, w.steps[n.step] AS source, w.steps[n.step + 1] AS target,
            count(*) AS transitions
        FROM walks AS w
        CROSS JOIN LATERAL generate_series(1, cardinality(w.steps) - 1) AS n (step)
        GROUP BY w.user_key, n.step, w.steps[n.step], w.steps[n.step + 1]
    ),
    edges AS (
        SELECT e.step, e.source, e.target, sum(e.transitions)::bigint AS transitions,
            count(*) AS users
        FROM edges_of_users AS e
        GROUP BY e.step, e.source, e.target
    )
    SELECT e.step, f.event_type, t.event_type, e.transitions, e.users
    FROM edges AS e
    JOIN analytics.event_types AS f ON f.event_type_key = e.source
    JOIN analytics.event_types AS t ON t.event_type_key = e.target
    ORDER BY e.step, e.transitions DESC, f.event_type, t.event_type;
END
$$;
COMMENT ON FUNCTION analytics.paths(timestamptz, timestamptz, text, integer, text) IS
    'What follows what: of the sessions that begin in [p_from, p_to), each pair of successive '
    'events, by its place in the path (step 1 leads from the first event to the second), with how '
    'often it was taken and by how many users. p_start_event: paths begin with the first such '
    'event of a session. p_max_steps: as many pairs of each path, 1 to 100. p_account: of the '
    'events of that account alone.';
