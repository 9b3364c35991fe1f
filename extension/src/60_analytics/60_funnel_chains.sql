-- Room 60, chains: the plainest funnels, which are asked most, put together by set: users, ordered
-- steps of one event type each, without filter, exclusion, breakdown or account. The rule is that
-- of _walk_ordered (60_funnel_walks.sql), and the tests hold both to one oracle; what changes is
-- the cost, a quarter or less of that of walking each history. Read by the funnels.

CREATE FUNCTION analytics._hours_of(p_window interval)
RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN date_part('year', p_window) = 0 AND date_part('month', p_window) = 0
        THEN make_interval(secs => date_part('epoch', p_window))
        ELSE p_window
    END
$$;
COMMENT ON FUNCTION analytics._hours_of(interval) IS
    'A window with its days as 24 hours each, which they are in UTC: adding these is far cheaper. '
    'One with months stays.';

CREATE FUNCTION analytics._plain_keys(p_steps jsonb)
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        -- A type that is not there yet has no events, and no key.
        SELECT array_agg(coalesce(t.event_type_key, -1) ORDER BY s.step)
        FROM analytics._read_steps('p_steps', p_steps) AS s
        LEFT JOIN analytics.event_types AS t USING (event_type)
        HAVING count(s.filter) = 0 AND count(*) > 1
    );
END
$$;
COMMENT ON FUNCTION analytics._plain_keys(jsonb) IS
    'The keys of the steps'' event types, in order; NULL unless there are several steps, none with '
    'a filter.';

CREATE FUNCTION analytics._chains_query(p_steps integer)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- $1 event type keys, $2 from, $3 to, $4 until, $5 window, $6 and $7 users, $8 first entries
    v_times text := '(SELECT t.user_key, array_agg(t.occurred_at) AS times'
        ' FROM analytics.timelines AS t WHERE t.event_type_key = $1[%1$s]'
        ' AND t.user_key BETWEEN $6 AND $7 AND t.occurred_at >= $2 AND t.occurred_at %2$s'
        ' GROUP BY t.user_key) AS step_%1$s';
    v_joins text := format(v_times, 1, '< $3');
    v_columns text := 'unnest(CASE WHEN $8 THEN step_1.times[1:1] ELSE step_1.times END) AS at_1';
    v_chains text;
    v_reached text := '2';
    v_list text := 'c.at_1';
BEGIN
    FOR v_step IN 2 .. p_steps LOOP
        v_joins := v_joins || format(
            CASE v_step WHEN 2 THEN ' JOIN ' ELSE ' LEFT JOIN ' END || v_times
                || ' USING (user_key)', v_step, '<= $4'
        );
        v_columns := v_columns || format(', step_%1$s.times AS times_%1$s', v_step);
    END LOOP;
    v_chains := format('SELECT user_key, %s FROM %s', v_columns, v_joins);
    FOR v_step IN 2 .. p_steps LOOP
        v_chains := format(
            'SELECT c.*, c.times_%1$s[width_bucket(c.at_%2$s, c.times_%1$s) + 1] AS at_%1$s'
            ' FROM (%3$s) AS c OFFSET 0', v_step, v_step - 1, v_chains
        );
        IF v_step > 2 THEN
            v_reached := v_reached || format(
                ' + CASE WHEN c.at_%s <= c.at_1 + $5 THEN 1 ELSE 0 END', v_step
            );
        END IF;
        v_list := v_list || format(', c.at_%s', v_step);
    END LOOP;
    RETURN format(
        'SELECT (ARRAY[%1$s])[: c.reached], 1::bigint FROM ('
        'SELECT DISTINCT ON (c.user_key) %1$s, %2$s AS reached FROM (%3$s) AS c'
        ' WHERE c.at_2 <= c.at_1 + $5'
        ' ORDER BY c.user_key, reached DESC, c.at_1'
        ') AS c', v_list, v_reached, v_chains
    );
END
$$;
COMMENT ON FUNCTION analytics._chains_query(integer) IS
    'The query of _funnel_chains for a number of steps. Of each entry the chain is greedy: each '
    'step is the first event of its type after the step before, found by width_bucket in the '
    'user''s ascending times of that type.';

CREATE FUNCTION analytics._funnel_chains(
    p_keys integer[],
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_first_entry boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (step_times timestamptz[], units bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 100000000 ROWS 100000
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    v_window interval := analytics._hours_of(p_window);
    v_until timestamptz := CASE
        WHEN p_to < '9999-01-01' THEN p_to + v_window ELSE 'infinity'
    END;
    v_converted bigint;
BEGIN
    RETURN QUERY EXECUTE analytics._chains_query(cardinality(p_keys))
    USING p_keys, p_from, p_to, v_until, v_window, p_first_user, p_last_user, p_first_entry;
    GET DIAGNOSTICS v_converted = ROW_COUNT;
    RETURN QUERY
    SELECT ARRAY[NULL::timestamptz], count(*) - v_converted
    FROM (
        SELECT FROM analytics.timelines AS t
        WHERE t.event_type_key = p_keys[1]
            AND t.user_key BETWEEN p_first_user AND p_last_user
            AND t.occurred_at >= p_from AND t.occurred_at < p_to
        GROUP BY t.user_key
    ) AS starters
    HAVING count(*) > v_converted;
END
$$;
COMMENT ON FUNCTION analytics._funnel_chains(
    integer[], timestamptz, timestamptz, interval, boolean, bigint, bigint
) IS
    'The entries of the plainest funnels (users, ordered steps of one event type each, no filter, '
    'exclusion or breakdown) as _walk_ordered would find them, for users from p_first_user to '
    'p_last_user. Those who reach step 1 alone are one row, without its time. Read in the order of '
    'an index and put together by set: a tenth of the time that walks take.';

CREATE FUNCTION analytics._plain_entries(
    p_keys integer[],
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_first_entry boolean
)
RETURNS TABLE (step_times timestamptz[], units bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_from timestamptz := coalesce(p_from, '-infinity');
    v_cuts bigint[] := analytics._user_cuts(v_from);
    v_is_cut boolean := cardinality(v_cuts) > 2;
    v_to timestamptz := coalesce(p_to, 'infinity');
BEGIN
    -- An Append of functions is what several workers can share.
    RETURN QUERY
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[1], v_cuts[2] - 1
        )
        UNION ALL
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[2], v_cuts[3] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[3], v_cuts[4] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[4], v_cuts[5] - 1
        ) WHERE v_is_cut;
END
$$;
COMMENT ON FUNCTION analytics._plain_entries(
    integer[], timestamptz, timestamptz, interval, boolean
) IS
    'The entries of all users in one of the plainest funnels.';
