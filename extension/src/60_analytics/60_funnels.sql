-- Room 60, funnels: how many units take a series of steps, and how long they need. Reads
-- analytics.events; read by analytics.funnel and by the standing funnels.
--
-- Every number comes from _funnel_entries: one row a unit, its counted entry with the times of the
-- steps it reached. Histories are put together by set, walked one by one (60_funnel_walks.sql).

CREATE FUNCTION analytics._read_steps(p_argument text, p_steps jsonb)
RETURNS TABLE (step integer, event_type text, filter jsonb)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_form text := '"event type" or {"event": "event type", "where": {"property": value}}';
    v_item jsonb;
BEGIN
    IF jsonb_typeof(p_steps) <> 'array' OR jsonb_array_length(p_steps) > 30 THEN
        PERFORM spectrum._reject(
            p_argument, p_steps::text, 'a JSON array of at most 30 events, each ' || v_form
        );
    END IF;
    FOR step, v_item IN
        SELECT i.number, i.item
        FROM jsonb_array_elements(p_steps) WITH ORDINALITY AS i (item, number)
    LOOP
        IF jsonb_typeof(v_item) = 'string' THEN
            v_item := jsonb_build_object('event', v_item);
        END IF;
        IF jsonb_typeof(v_item) <> 'object'
            OR jsonb_typeof(v_item -> 'event') IS DISTINCT FROM 'string'
            OR v_item ->> 'event' = ''
            OR jsonb_typeof(coalesce(v_item -> 'where', '{}')) <> 'object'
            OR v_item - '{event, where}'::text[] <> '{}'
        THEN
            PERFORM spectrum._reject(format('%s[%s]', p_argument, step), v_item::text, v_form);
        END IF;
        event_type := v_item ->> 'event';
        filter := nullif(v_item -> 'where', '{}');
        RETURN NEXT;
    END LOOP;
END
$$;
COMMENT ON FUNCTION analytics._read_steps(text, jsonb) IS
    'The events that a JSON array names, checked; NULL names none.';

CREATE FUNCTION analytics._check_funnel(
    p_steps jsonb,
    p_window interval,
    p_order text,
    p_entry text,
    p_unit text,
    p_breakdown text,
    p_attribution text,
    p_exclude jsonb
)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._read_steps('p_steps', p_steps);
    IF p_steps IS NULL OR p_steps = '[]' THEN
        PERFORM spectrum._reject('p_steps', p_steps::text, 'a JSON array of at least one event');
    END IF;
    IF p_window IS NULL OR p_window NOT BETWEEN interval '0' AND interval '10 years' THEN
        PERFORM spectrum._reject('p_window', p_window::text, 'an interval from 0 to 10 years');
    END IF;
    PERFORM spectrum._check_choice('p_order', p_order, '{ordered, strict, any}');
    PERFORM spectrum._check_choice('p_entry', p_entry, '{best, first}');
    PERFORM spectrum._check_choice('p_unit', p_unit, '{user, account, session}');
    IF p_breakdown = '' THEN
        PERFORM spectrum._reject(
            'p_breakdown', p_breakdown,
            'country, region, city, account_id or the name of a property, or NULL'
        );
    END IF;
    PERFORM spectrum._check_choice('p_attribution', p_attribution, '{first, last}');
    PERFORM analytics._read_steps('p_exclude', p_exclude);
END
$$;
COMMENT ON FUNCTION analytics._check_funnel(
    jsonb, interval, text, text, text, text, text, jsonb
) IS
    'Raises 22023 unless the options describe a funnel.';

CREATE FUNCTION analytics._unit_histories(
    p_keys integer[],
    p_filters jsonb[],
    p_bits integer[],
    p_entry_bits integer,
    p_reads_all boolean,
    p_from timestamptz,
    p_until timestamptz,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text, unit bigint, times timestamptz[], masks integer[], labels text[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_is_filtered boolean := cardinality(array_remove(p_filters, NULL)) > 0;
BEGIN
    -- The arguments are constants of this plan: of each CASE over them one branch remains, and of
    -- the event view only the columns that it reads. The grouping is a prefix of the order, so the
    -- arrays are built in that order; nothing may come between the two that could sort again.
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN min(o.account_id) ELSE coalesce(p_account, '*') END,
        CASE WHEN p_unit = 'account' THEN o.account_key ELSE o.user_key END,
        array_agg(o.occurred_at),
        array_agg(o.mask),
        CASE WHEN p_breakdown IS NOT NULL THEN array_agg(o.label) END
    FROM (
        SELECT m.account_id, m.account_key, m.user_key, m.occurred_at, m.mask, m.label
        FROM (
            SELECT e.account_id, e.account_key, e.user_key, e.occurred_at, e.event_id,
                CASE WHEN v_is_filtered THEN (
                    SELECT coalesce(bit_or(k.bit), 0)
                    FROM unnest(p_keys, p_filters, p_bits) AS k (key, filter, bit)
                    WHERE k.key = e.event_type_key
                        AND (k.filter IS NULL OR e.properties @> k.filter)
                ) ELSE coalesce(p_bits[array_position(p_keys, e.event_type_key)], 0) END AS mask,
                CASE
                    WHEN p_breakdown = 'account_id' THEN e.account_id
                    WHEN p_breakdown = 'country' THEN e.country
                    WHEN p_breakdown = 'region' THEN e.region
                    WHEN p_breakdown = 'city' THEN e.city
                    ELSE nullif(left(e.properties ->> p_breakdown, 200), '')
                END AS label
            FROM analytics.events AS e
            WHERE e.user_key <> 0
                AND (p_reads_all OR e.event_type_key = ANY (p_keys))
                AND e.occurred_at BETWEEN p_from AND p_until
                AND (p_account IS NULL OR e.account_id = p_account)
                AND (NOT p_by_account AND p_unit <> 'account' OR e.account_key <> 0)
        ) AS m
        WHERE p_reads_all OR m.mask <> 0
        ORDER BY
            CASE WHEN p_by_account THEN m.account_key END,
            CASE WHEN p_unit = 'account' THEN m.account_key ELSE m.user_key END,
            m.occurred_at,
            CASE WHEN p_breakdown IS NOT NULL THEN m.event_id END
    ) AS o
    GROUP BY
        CASE WHEN p_by_account THEN o.account_key END,
        CASE WHEN p_unit = 'account' THEN o.account_key ELSE o.user_key END
    HAVING bit_or(o.mask) & p_entry_bits <> 0;
END
$$;
COMMENT ON FUNCTION analytics._unit_histories(
    integer[], jsonb[], integer[], integer, boolean, timestamptz, timestamptz, text, text, text,
    boolean
) IS
    'By unit, what _walk_* need: the times of its events in order, ties by event_id where a '
    'breakdown tells them apart, their masks, and their values of the breakdown. Only units that '
    'have an event that begins an entry; only matching events, unless p_reads_all.';

CREATE FUNCTION analytics._funnel_masks(
    p_steps jsonb,
    p_exclude jsonb,
    OUT keys integer[],
    OUT filters jsonb[],
    OUT bits integer[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT coalesce(array_agg(m.event_type_key), '{}'), coalesce(array_agg(m.filter), '{}'),
        coalesce(array_agg(m.bits), '{}')
    INTO keys, filters, bits
    FROM (
        SELECT t.event_type_key, n.filter, bit_or(n.bit) AS bits
        FROM (
            SELECT s.event_type, s.filter, 1 << (s.step - 1) AS bit
            FROM analytics._read_steps('p_steps', p_steps) AS s
            UNION ALL
            SELECT x.event_type, x.filter, 1 << 30
            FROM analytics._read_steps('p_exclude', p_exclude) AS x
        ) AS n
        JOIN analytics.event_types AS t USING (event_type)
        GROUP BY t.event_type_key, n.filter
    ) AS m;
END
$$;
COMMENT ON FUNCTION analytics._funnel_masks(jsonb, jsonb) IS
    'What an event can be in a funnel: bit k - 1 for step k, bit 30 for an exclusion, by the key '
    'of its type and the filter that its properties match.';

CREATE FUNCTION analytics._split_sessions(
    p_times timestamptz[],
    p_masks integer[],
    p_labels text[],
    p_entry_bits integer,
    p_keeps_all boolean
)
RETURNS TABLE (
    session_start timestamptz, times timestamptz[], masks integer[], labels text[]
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[] := analytics._session_starts(p_times);
BEGIN
    RETURN QUERY
    SELECT
        v_starts[width_bucket(e.occurred_at, v_starts)],
        array_agg(e.occurred_at ORDER BY e.position),
        array_agg(e.mask ORDER BY e.position),
        array_agg(e.label ORDER BY e.position)
    FROM unnest(p_times, p_masks, p_labels) WITH ORDINALITY
        AS e (occurred_at, mask, label, position)
    WHERE e.mask <> 0 OR p_keeps_all
    GROUP BY 1
    HAVING bit_or(e.mask) & p_entry_bits <> 0;
END
$$;
COMMENT ON FUNCTION analytics._split_sessions(
    timestamptz[], integer[], text[], integer, boolean
) IS
    'Cuts one user''s history into those of his sessions that have an event that begins an entry.';

CREATE FUNCTION analytics._funnel_histories(
    p_steps jsonb,
    p_exclude jsonb,
    p_from timestamptz,
    p_until timestamptz,
    p_order text,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    unit bigint,
    session_start timestamptz,
    times timestamptz[],
    masks integer[],
    labels text[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_masks record := analytics._funnel_masks(p_steps, p_exclude);
    v_entry_bits integer := CASE
        WHEN p_order = 'any' THEN (1 << jsonb_array_length(p_steps)) - 1 ELSE 1
    END;
BEGIN
    IF p_unit <> 'session' THEN
        RETURN QUERY
        SELECT h.account_id, h.unit, NULL::timestamptz, h.times, h.masks, h.labels
        FROM analytics._unit_histories(
            r_masks.keys, r_masks.filters, r_masks.bits, v_entry_bits, p_order = 'strict', p_from,
            p_until, p_unit, p_account, p_breakdown, p_by_account
        ) AS h;
        RETURN;
    END IF;

    -- Where a session begins depends on all that the user did before.
    RETURN QUERY
    SELECT h.account_id, h.unit, s.session_start, s.times, s.masks, s.labels
    FROM analytics._unit_histories(
        r_masks.keys, r_masks.filters, r_masks.bits, v_entry_bits, true, '-infinity', p_until,
        p_unit, p_account, p_breakdown, p_by_account
    ) AS h
    CROSS JOIN LATERAL analytics._split_sessions(
        h.times, h.masks, h.labels, v_entry_bits, p_order = 'strict'
    ) AS s;
END
$$;
COMMENT ON FUNCTION analytics._funnel_histories(
    jsonb, jsonb, timestamptz, timestamptz, text, text, text, text, boolean
) IS
    'The histories of all units that a funnel counts; a session is a unit of its user.';

CREATE FUNCTION analytics._funnel_entries(
    p_steps jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_order text,
    p_entry text,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_attribution text,
    p_exclude jsonb,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    unit bigint,
    session_start timestamptz,
    breakdown text,
    step_times timestamptz[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
-- A window of days is one of 24 hours each, whatever the session's time zone.
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_steps integer := jsonb_array_length(p_steps);
    v_from timestamptz := coalesce(p_from, '-infinity');
    v_to timestamptz := coalesce(p_to, 'infinity');
    v_until timestamptz := CASE
        WHEN v_to < '9999-01-01' THEN v_to + p_window ELSE 'infinity'
    END;
    v_has_exclusions boolean := coalesce(p_exclude, '[]') <> '[]';
BEGIN
    RETURN QUERY
    SELECT
        w.account_id,
        w.unit,
        w.session_start,
        w.labels[w.chain[CASE p_attribution WHEN 'last' THEN cardinality(w.chain) ELSE 1 END]],
        ARRAY(SELECT w.times[c.position] FROM unnest(w.chain) AS c (position))
    FROM (
        SELECT h.*, CASE WHEN p_order = 'any' THEN
            analytics._walk_any(
                h.times, h.masks, v_steps, v_from, v_to, p_window, p_entry = 'first',
                v_has_exclusions
            )
        ELSE
            analytics._walk_ordered(
                h.times, h.masks, v_steps, v_from, v_to, p_window, p_order = 'strict',
                p_entry = 'first', v_has_exclusions
            )
        END AS chain
        FROM analytics._funnel_histories(
            p_steps, p_exclude, v_from, v_until, p_order, p_unit, p_account, p_breakdown,
            p_by_account
        ) AS h
        OFFSET 0
    ) AS w
    WHERE w.chain IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._funnel_entries(
    jsonb, timestamptz, timestamptz, interval, text, text, text, text, text, text, jsonb, boolean
) IS
    'What each unit contributes to a funnel: its counted entry, with the time of each step it '
    'reached. unit: user_key or account_key; a session is its user and its start. For one account, '
    'for all together (*), or, with p_by_account, for each account by itself, out of its events '
    'alone.';

CREATE FUNCTION analytics._funnel_report(
    p_steps jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_order text,
    p_entry text,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_attribution text,
    p_exclude jsonb,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    breakdown text,
    step integer,
    event_type text,
    units bigint,
    rate_from_start double precision,
    rate_from_previous double precision,
    median_seconds double precision,
    mean_seconds double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_keys integer[] := CASE
        WHEN p_order = 'ordered' AND p_unit = 'user' AND p_account IS NULL AND NOT p_by_account
            AND p_breakdown IS NULL AND coalesce(p_exclude, '[]') = '[]'
        THEN analytics._plain_keys(p_steps)
    END;
BEGIN
    RETURN QUERY
    WITH entries AS MATERIALIZED (
        SELECT e.account_id, e.breakdown, e.step_times, 1::bigint AS units
        FROM analytics._funnel_entries(
            p_steps, p_from, p_to, p_window, p_order, p_entry, p_unit, p_account, p_breakdown,
            p_attribution, p_exclude, p_by_account
        ) AS e
        WHERE v_keys IS NULL
        UNION ALL
        SELECT '*', NULL, c.step_times, c.units
        FROM analytics._plain_entries(v_keys, p_from, p_to, p_window, p_entry = 'first') AS c
        WHERE v_keys IS NOT NULL
    ),
    reached_steps AS (
        SELECT s.account_id, s.breakdown, s.units, s.step,
            date_part('epoch', s.step_times[s.step] - s.step_times[s.step - 1]) AS seconds
        FROM (SELECT *, generate_series(1, cardinality(step_times)) AS step FROM entries) AS s
    ),
    step_counts AS (
        SELECT r.account_id, r.breakdown, r.step, sum(r.units)::bigint AS units,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY r.seconds) AS median_seconds,
            -- Of whole microseconds, so that it does not depend on the order of the rows.
            (avg((r.seconds * 1e6)::bigint) / 1e6)::double precision AS mean_seconds
        FROM reached_steps AS r
        GROUP BY r.step, r.account_id, r.breakdown
    ),
    groups AS (
        SELECT DISTINCT e.account_id, e.breakdown FROM entries AS e
        UNION ALL
        -- A single scope has its steps even where nobody came.
        SELECT coalesce(p_account, '*'), NULL
        WHERE NOT p_by_account AND NOT EXISTS (SELECT FROM entries)
    ),
    step_rows AS (
        SELECT g.account_id, g.breakdown, s.step, s.event_type, coalesce(c.units, 0) AS units,
            c.median_seconds, c.mean_seconds
        FROM groups AS g
        CROSS JOIN analytics._read_steps('p_steps', p_steps) AS s
        LEFT JOIN step_counts AS c ON c.account_id = g.account_id AND c.step = s.step
            AND c.breakdown IS NOT DISTINCT FROM g.breakdown
    )
    SELECT r.account_id, r.breakdown, r.step, r.event_type, r.units,
        coalesce(r.units / nullif(first_value(r.units) OVER steps, 0)::double precision, 0),
        coalesce(r.units / nullif(lag(r.units, 1, r.units) OVER steps, 0)::double precision, 0),
        r.median_seconds, r.mean_seconds
    FROM step_rows AS r
    WINDOW steps AS (PARTITION BY r.account_id, r.breakdown ORDER BY r.step);
END
$$;
COMMENT ON FUNCTION analytics._funnel_report(
    jsonb, timestamptz, timestamptz, interval, text, text, text, text, text, text, jsonb, boolean
) IS
    'Counts the entries: all steps of each account and value of the breakdown that has any.';

CREATE FUNCTION analytics.funnel(
    p_steps jsonb,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_window interval DEFAULT '14 days',
    p_order text DEFAULT 'ordered',
    p_entry text DEFAULT 'best',
    p_unit text DEFAULT 'user',
    p_account text DEFAULT NULL,
    p_breakdown text DEFAULT NULL,
    p_attribution text DEFAULT 'first',
    p_exclude jsonb DEFAULT NULL
)
RETURNS TABLE (
    breakdown text,
    step integer,
    event_type text,
    units bigint,
    rate_from_start double precision,
    rate_from_previous double precision,
    median_seconds double precision,
    mean_seconds double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_funnel(
        p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    RETURN QUERY
    SELECT r.breakdown, r.step, r.event_type, r.units, r.rate_from_start, r.rate_from_previous,
        r.median_seconds, r.mean_seconds
    FROM analytics._funnel_report(
        p_steps, p_from, p_to, p_window, p_order, p_entry, p_unit, p_account, p_breakdown,
        p_attribution, p_exclude, false
    ) AS r
    ORDER BY r.breakdown, r.step;
END
$$;
COMMENT ON FUNCTION analytics.funnel(
    jsonb, timestamptz, timestamptz, interval, text, text, text, text, text, text, jsonb
) IS
    'A funnel, exact over all events: how many users, accounts or sessions (p_unit) reach each '
    'step within p_window of step 1, the rates from the start and from the previous step, and the '
    'seconds since the previous step (median and mean of those who took it). p_steps: '
    '["signup", {"event": "purchase", "where": {"plan": "pro"}}]. [p_from, p_to) limits step 1. '
    'p_order: ordered, strict (nothing between) or any. p_entry: best (of all entries the one that '
    'goes furthest) or first. p_breakdown: a property, country, region, city or account_id, read '
    'at step 1 or, with p_attribution last, at the last step reached. p_exclude: events, written '
    'like steps, that void an entry when they occur before its last step.';
