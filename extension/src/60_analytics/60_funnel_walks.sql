-- Room 60, walks: what one unit (a user, an account, a session) did in a funnel. Pure functions of
-- its history: p_times, ascending, and beside each time a mask of what the event can be: bit k - 1
-- for step k, bit 30 for an exclusion. They return the positions of the events that fill the steps
-- of the one entry that counts, or NULL. Read by the funnels.
--
-- The rule, in all orders: an entry begins with an event of step 1 inside [p_from, p_to) and goes
-- on, greedily, with the earliest event that reaches one step more, up to and including
-- entry + p_window. An exclusion strictly between its first and its last event voids it. The
-- longest entry counts, of equal ones the earliest; or, with p_first_entry, the first one alone.

CREATE FUNCTION analytics._session_starts(p_times timestamptz[])
RETURNS timestamptz[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[] := p_times[1:1];
    v_start timestamptz := p_times[1];
    v_last timestamptz := p_times[1];
    v_at timestamptz;
BEGIN
    FOREACH v_at IN ARRAY p_times LOOP
        IF v_at > v_last + interval '30 minutes' OR v_at > v_start + interval '24 hours' THEN
            v_start := v_at;
            v_starts := v_starts || v_at;
        END IF;
        v_last := v_at;
    END LOOP;
    RETURN v_starts;
END
$$;
COMMENT ON FUNCTION analytics._session_starts(timestamptz[]) IS
    'Cuts one user''s ascending event times into sessions: a new one begins after a gap of more '
    'than 30 minutes, or more than 24 hours after the start of the last. Event t belongs to '
    'session width_bucket(t, starts).';

CREATE FUNCTION analytics._walk_ordered(
    p_times timestamptz[],
    p_masks integer[],
    p_steps integer,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_is_strict boolean,
    p_first_entry boolean,
    p_has_exclusions boolean
)
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_count integer := cardinality(p_times);
    -- Where the search for each step stands: entries ascend, so it never has to go back.
    v_next integer[] := array_fill(1, ARRAY[p_steps]);
    -- The step behind which there is nothing left, for this entry and so for all later ones.
    v_possible integer := p_steps;
    v_exclusion integer := 1;
    v_deadline timestamptz;
    v_chain integer[];
    v_best integer[];
    v_at integer;
    v_found integer;
BEGIN
    FOR v_entry IN 1 .. v_count LOOP
        CONTINUE WHEN p_masks[v_entry] & 1 = 0
            OR p_times[v_entry] < p_from OR p_times[v_entry] >= p_to;
        v_deadline := p_times[v_entry] + p_window;
        v_chain := ARRAY[v_entry];
        v_at := v_entry;
        FOR v_step IN 2 .. p_steps LOOP
            v_found := greatest(v_next[v_step], v_at + 1);
            WHILE v_found <= v_count AND (
                p_masks[v_found] & (1 << (v_step - 1)) = 0 OR p_times[v_found] <= p_times[v_at]
            ) LOOP
                v_found := v_found + 1;
            END LOOP;
            v_next[v_step] := v_found;
            IF v_found > v_count THEN
                v_possible := v_step - 1;
                EXIT;
            END IF;
            EXIT WHEN p_times[v_found] > v_deadline;
            IF p_is_strict THEN
                -- Events at the time of either step do not stand between them.
                LOOP
                    v_at := v_at + 1;
                    EXIT WHEN p_times[v_at] > p_times[v_chain[v_step - 1]];
                END LOOP;
                EXIT WHEN p_times[v_at] < p_times[v_found];
            END IF;
            v_chain := v_chain || v_found;
            v_at := v_found;
        END LOOP;

        IF p_has_exclusions AND cardinality(v_chain) > 1 THEN
            WHILE v_exclusion <= v_count AND (
                p_masks[v_exclusion] & (1 << 30) = 0
                OR p_times[v_exclusion] <= p_times[v_entry]
            ) LOOP
                v_exclusion := v_exclusion + 1;
            END LOOP;
            IF p_times[v_exclusion] < p_times[v_chain[cardinality(v_chain)]] THEN
                v_chain := NULL;
            END IF;
        END IF;
        IF v_best IS NULL OR cardinality(v_chain) > cardinality(v_best) THEN
            v_best := v_chain;
        END IF;
        EXIT WHEN p_first_entry OR cardinality(v_best) >= v_possible;
    END LOOP;
    RETURN v_best;
END
$$;
COMMENT ON FUNCTION analytics._walk_ordered(
    timestamptz[], integer[], integer, timestamptz, timestamptz, interval, boolean, boolean, boolean
) IS
    'Steps in their order, each strictly later than the one before; p_is_strict: with no event of '
    'the history between, which must then hold them all, masks of 0 included.';

CREATE FUNCTION analytics._fill_step(p_filled integer[], p_mask integer)
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_filled integer[] := p_filled;
    v_mask integer := p_mask;
    v_queue integer[] := '{}'::integer[];
    -- By step: the step whose event would move here; 0 the new event; NULL not reached.
    v_from integer[] := array_fill(NULL::integer, ARRAY[cardinality(p_filled)]);
    v_at integer := 0;
    v_place integer := 1;
BEGIN
    LOOP
        FOR v_step IN 1 .. cardinality(p_filled) LOOP
            IF v_mask & (1 << (v_step - 1)) <> 0 AND v_from[v_step] IS NULL THEN
                v_from[v_step] := v_at;
                v_queue := v_queue || v_step;
            END IF;
        END LOOP;
        v_at := v_queue[v_place];
        v_place := v_place + 1;
        v_mask := p_filled[v_at];
        EXIT WHEN v_at IS NULL OR v_mask = 0;
    END LOOP;
    IF v_at IS NULL THEN
        RETURN NULL;
    END IF;
    WHILE v_from[v_at] <> 0 LOOP
        v_filled[v_at] := p_filled[v_from[v_at]];
        v_at := v_from[v_at];
    END LOOP;
    v_filled[v_at] := p_mask;
    RETURN v_filled;
END
$$;
COMMENT ON FUNCTION analytics._fill_step(integer[], integer) IS
    'Puts one more event into the steps that are open to it, moving those in place where that '
    'makes room (an augmenting path). p_filled: by step, the mask of the event in it, 0 open. '
    'NULL: no room.';

CREATE FUNCTION analytics._fill_steps(
    p_masks integer[], p_positions integer[], p_steps integer, p_most integer
)
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_filled integer[] := array_fill(0, ARRAY[p_steps]);
    v_fuller integer[];
    v_chain integer[] := '{}'::integer[];
    v_at integer;
BEGIN
    FOR v_at IN SELECT p.position FROM unnest(p_positions) AS p (position) ORDER BY p.position LOOP
        v_fuller := analytics._fill_step(v_filled, p_masks[v_at]);
        IF v_fuller IS NOT NULL THEN
            v_filled := v_fuller;
            v_chain := v_chain || v_at;
            EXIT WHEN cardinality(v_chain) = p_most;
        END IF;
    END LOOP;
    RETURN v_chain;
END
$$;
COMMENT ON FUNCTION analytics._fill_steps(integer[], integer[], integer, integer) IS
    'Those of the positions, in order, whose events each fill one step more, p_most at most.';

CREATE FUNCTION analytics._walk_any(
    p_times timestamptz[],
    p_masks integer[],
    p_steps integer,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_first_entry boolean,
    p_has_exclusions boolean
)
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_count integer := cardinality(p_times);
    v_step_bits integer := (1 << p_steps) - 1;
    -- Events of one kind (mask) are chained: v_head is the first from the entry on, v_follower
    -- the next one, 0 none. A kind fills at most v_room steps, so its first v_room events do.
    v_kinds integer[] := '{}'::integer[];
    v_room integer[] := '{}'::integer[];
    v_head integer[] := '{}'::integer[];
    v_follower integer[] := array_fill(0, ARRAY[v_count]);
    v_kind integer;
    v_at integer;
    v_last integer := 0;
    v_exclusion integer := 1;
    v_inside integer[];
    v_chain integer[];
    v_best integer[] := '{}'::integer[];
BEGIN
    FOR v_event IN REVERSE v_count .. 1 LOOP
        v_kind := array_position(v_kinds, p_masks[v_event] & v_step_bits);
        IF v_kind IS NULL THEN
            v_kinds := v_kinds || (p_masks[v_event] & v_step_bits);
            v_kind := cardinality(v_kinds);
            v_room[v_kind] := bit_count(v_kinds[v_kind]::bit(32));
        END IF;
        v_follower[v_event] := coalesce(v_head[v_kind], 0);
        v_head[v_kind] := v_event;
    END LOOP;

    FOR v_entry IN 1 .. v_count LOOP
        IF p_masks[v_entry] & v_step_bits <> 0
            AND p_times[v_entry] >= p_from AND p_times[v_entry] < p_to
        THEN
            WHILE p_times[v_last + 1] <= p_times[v_entry] + p_window LOOP
                v_last := v_last + 1;
            END LOOP;
            v_inside := '{}'::integer[];
            FOR v_each IN 1 .. cardinality(v_kinds) LOOP
                v_at := v_head[v_each];
                FOR v_number IN 1 .. v_room[v_each] LOOP
                    EXIT WHEN v_at = 0 OR v_at > v_last;
                    v_inside := v_inside || v_at;
                    v_at := v_follower[v_at];
                END LOOP;
            END LOOP;

            IF cardinality(v_inside) > cardinality(v_best) THEN
                v_chain := analytics._fill_steps(p_masks, v_inside, p_steps, p_steps);
                IF p_has_exclusions THEN
                    WHILE v_exclusion <= v_count AND (
                        p_masks[v_exclusion] & (1 << 30) = 0
                        OR p_times[v_exclusion] <= p_times[v_entry]
                    ) LOOP
                        v_exclusion := v_exclusion + 1;
                    END LOOP;
                    IF p_times[v_exclusion] < p_times[v_chain[cardinality(v_chain)]] THEN
                        v_chain := '{}'::integer[];
                    END IF;
                END IF;
                IF cardinality(v_chain) > cardinality(v_best) THEN
                    v_best := v_chain;
                END IF;
            END IF;
            -- Once the window reaches the end of the history, it only loses events.
            EXIT WHEN p_first_entry OR cardinality(v_best) = p_steps
                OR (v_last = v_count AND cardinality(v_inside) <= cardinality(v_best));
        END IF;
        v_kind := array_position(v_kinds, p_masks[v_entry] & v_step_bits);
        v_head[v_kind] := v_follower[v_entry];
    END LOOP;
    RETURN nullif(v_best, '{}');
END
$$;
COMMENT ON FUNCTION analytics._walk_any(
    timestamptz[], integer[], integer, timestamptz, timestamptz, interval, boolean, boolean
) IS
    'Steps in any order: an entry begins with an event of any step, and its step k is reached when '
    'its events can fill k of the steps, each event one of them.';
