-- Room 60, standing funnels, how they are kept: of each unit that the news concern, the counted
-- entry is found again and takes the place of the one before. Inserts can only lengthen the best
-- entry of a funnel that nothing voids, so there only the entries within a window's length of the
-- news are walked again, and none after one that is complete: users with long histories stay
-- cheap. Where events were taken back, or any event can end a chain (strict order, exclusions,
-- sessions), the whole history is.

CREATE FUNCTION analytics._empty_funnel_units()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_funnel_units',
        'unit bigint, scope bigint, read_from timestamptz, read_until timestamptz, '
        'enter_until timestamptz');
END
$$;
COMMENT ON FUNCTION analytics._empty_funnel_units() IS
    'Empties pg_temp.spectrum_funnel_units: which histories are to be walked, and how far.';

CREATE FUNCTION analytics._first_open_session(p_user bigint, p_scope bigint)
RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_facts_from timestamptz := spectrum._facts_from();
    -- What began before is over by then, and what begins up to there is counted: it is closed.
    v_until timestamptz := v_facts_from + interval '48 hours';
BEGIN
    IF NOT isfinite(v_facts_from) THEN
        RETURN v_facts_from;
    END IF;
    RETURN coalesce((
        SELECT min(known.session_start) FROM spectrum.rollup_sessions AS known
        WHERE known.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'sessions' AND report.state = 'served'
            )
            AND known.user_key = p_user AND known.scope = p_scope
            AND known.session_start >= v_facts_from AND known.session_start < v_until
    ), v_until);
END
$$;
COMMENT ON FUNCTION analytics._first_open_session(bigint, bigint) IS
    'When the first session of a user begins whose facts are all there: from there on his history '
    'can be cut into the same sessions as ever.';

CREATE FUNCTION analytics._touch_funnel_units(
    p_report integer,
    p_built_to bigint,
    p_steps integer,
    p_keys integer[],
    p_unit text,
    p_window interval,
    p_reads_all boolean,
    p_is_first boolean,
    p_is_whole boolean,
    p_is_build boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    -- What began before is frozen.
    v_facts_from timestamptz := spectrum._facts_from();
BEGIN
    PERFORM analytics._empty_funnel_units();
    INSERT INTO pg_temp.spectrum_funnel_units (
        unit, scope, read_from, read_until, enter_until
    )
    SELECT touched.unit, touched.scope,
        CASE
            WHEN p_unit = 'session' THEN analytics._first_open_session(touched.unit, touched.scope)
            WHEN range.is_all THEN v_facts_from
            WHEN p_is_first THEN greatest(least(old.entered_at, touched.first_at), v_facts_from)
            ELSE greatest(touched.first_at - p_window, v_facts_from)
        END,
        CASE WHEN range.is_all THEN 'infinity' ELSE until.last_at + p_window END,
        CASE WHEN range.is_all THEN 'infinity' ELSE until.last_at + interval '1 us' END
    FROM (
        SELECT unit.unit, unit.scope,
            bool_or(news.sign <= 0) AS is_less,
            min(news.occurred_at) AS first_at,
            max(news.occurred_at) AS last_at
        FROM pg_temp.spectrum_news AS news
        CROSS JOIN LATERAL (
            SELECT
                CASE WHEN p_unit = 'account' THEN news.account_key ELSE news.user_key END AS unit,
                CASE WHEN p_unit = 'account' THEN news.account_key ELSE news.scope END AS scope
        ) AS unit
        WHERE news.user_key <> 0 AND unit.unit <> 0
            AND news.user_key <= p_built_to
            AND (p_reads_all OR news.event_type_key = ANY (p_keys))
        GROUP BY unit.unit, unit.scope
    ) AS touched
    CROSS JOIN LATERAL (
        SELECT p_is_whole OR p_is_build OR touched.is_less AS is_all
    ) AS range
    LEFT JOIN LATERAL (
        SELECT entry.step_times[1] AS entered_at,
            -- No entry that begins later can count instead.
            CASE WHEN p_is_first OR cardinality(entry.step_times) = p_steps
                THEN entry.step_times[1]
            END AS settled_at
        FROM spectrum.rollup_funnel_entries AS entry
        WHERE entry.report_id = p_report AND entry.unit = touched.unit
            AND entry.scope = touched.scope
        ORDER BY entry.session_start
        LIMIT 1
    ) AS old ON NOT range.is_all
    CROSS JOIN LATERAL (SELECT least(touched.last_at, old.settled_at) AS last_at) AS until
    WHERE old.settled_at IS NULL OR touched.first_at <= old.settled_at + p_window;
END
$$;
COMMENT ON FUNCTION analytics._touch_funnel_units(
    integer, bigint, integer, integer[], text, interval, boolean, boolean, boolean, boolean
) IS
    'Lays out the units of a funnel that the news concern, and what of their history has to be '
    'walked again: events of [read_from, read_until], entries before enter_until.';

CREATE FUNCTION analytics._touched_histories(
    p_keys integer[],
    p_filters jsonb[],
    p_bits integer[],
    p_reads_all boolean,
    p_unit text,
    p_breakdown text
)
RETURNS TABLE (
    unit bigint, scope bigint, times timestamptz[], masks integer[], labels text[],
    read_from timestamptz, enter_until timestamptz
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_is_filtered boolean := cardinality(array_remove(p_filters, NULL)) > 0;
BEGIN
    RETURN QUERY
    SELECT touched.unit, touched.scope, history.times, history.masks, history.labels,
        touched.read_from, touched.enter_until
    FROM pg_temp.spectrum_funnel_units AS touched
    CROSS JOIN LATERAL (
        -- Ties are in order of event_id where a breakdown tells them apart; else an index holds all
        -- that is read.
        SELECT array_agg(m.occurred_at ORDER BY m.occurred_at, m.tie) AS times,
            array_agg(m.mask ORDER BY m.occurred_at, m.tie) AS masks,
            CASE WHEN p_breakdown IS NOT NULL
                THEN array_agg(m.label ORDER BY m.occurred_at, m.tie)
            END AS labels
        FROM (
            SELECT e.occurred_at, CASE WHEN p_breakdown IS NOT NULL THEN e.event_id END AS tie,
                CASE WHEN v_is_filtered THEN (
                    SELECT coalesce(bit_or(k.bit), 0)
                    FROM unnest(p_keys, p_filters, p_bits) AS k (key, filter, bit)
                    WHERE k.key = e.event_type_key
                        AND (k.filter IS NULL OR e.properties @> k.filter)
                ) ELSE coalesce(p_bits[array_position(p_keys, e.event_type_key)], 0) END AS mask,
                nullif(CASE
                    WHEN p_breakdown = 'account_id' THEN (
                        SELECT dim.account_id FROM warehouse.dim_accounts AS dim
                        WHERE dim.account_key = e.account_key
                    )
                    WHEN p_breakdown IN ('country', 'region', 'city') THEN (
                        SELECT CASE p_breakdown WHEN 'country' THEN dim.country
                            WHEN 'region' THEN dim.region ELSE dim.city END
                        FROM warehouse.dim_geography AS dim
                        WHERE dim.geo_key = e.geo_key
                    )
                    WHEN p_breakdown IS NOT NULL THEN left(e.properties ->> p_breakdown, 200)
                END, '') AS label
            FROM warehouse.visible_events AS e
            WHERE CASE WHEN p_unit = 'account' THEN e.account_key ELSE e.user_key END = touched.unit
                AND e.user_key <> 0
                AND e.occurred_at BETWEEN touched.read_from AND touched.read_until
                AND (p_reads_all OR e.event_type_key = ANY (p_keys))
                AND (touched.scope = 0 OR e.account_key = abs(touched.scope))
        ) AS m
        WHERE p_reads_all OR m.mask <> 0
    ) AS history
    WHERE history.times IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._touched_histories(
    integer[], jsonb[], integer[], boolean, text, text
) IS
    'By unit laid out: the events that have to be walked again, cf. analytics._unit_histories.';

CREATE FUNCTION analytics._walk_funnel_units(
    p_steps integer,
    p_keys integer[],
    p_filters jsonb[],
    p_bits integer[],
    p_window interval,
    p_order text,
    p_is_first boolean,
    p_unit text,
    p_breakdown text,
    p_is_last boolean,
    p_has_exclusions boolean
)
RETURNS TABLE (
    unit bigint, scope bigint, session_start timestamptz, breakdown text, step_times timestamptz[]
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH histories AS (
        SELECT h.unit, h.scope, coalesce(s.session_start, '-infinity') AS session_start,
            coalesce(s.times, h.times) AS times, coalesce(s.masks, h.masks) AS masks,
            coalesce(s.labels, h.labels) AS labels, h.read_from, h.enter_until
        FROM analytics._touched_histories(
            p_keys, p_filters, p_bits, p_order = 'strict' OR p_unit = 'session', p_unit, p_breakdown
        ) AS h
        LEFT JOIN LATERAL analytics._split_sessions(
            h.times, h.masks, h.labels,
            CASE WHEN p_order = 'any' THEN (1 << p_steps) - 1 ELSE 1 END, p_order = 'strict'
        ) AS s ON p_unit = 'session'
        WHERE p_unit <> 'session' OR s.session_start IS NOT NULL
    ),
    walks AS (
        SELECT h.*, CASE WHEN p_order = 'any' THEN
            analytics._walk_any(
                h.times, h.masks, p_steps, h.read_from, h.enter_until, p_window, p_is_first,
                p_has_exclusions
            )
        ELSE
            analytics._walk_ordered(
                h.times, h.masks, p_steps, h.read_from, h.enter_until, p_window,
                p_order = 'strict', p_is_first, p_has_exclusions
            )
        END AS chain
        FROM histories AS h
        OFFSET 0
    )
    SELECT w.unit, w.scope, w.session_start,
        coalesce(w.labels[w.chain[CASE WHEN p_is_last THEN cardinality(w.chain) ELSE 1 END]], ''),
        ARRAY(SELECT w.times[c.position] FROM unnest(w.chain) AS c (position))
    FROM walks AS w
    WHERE w.chain IS NOT NULL
        -- A first entry that was voided is an entry all the same: no other one counts.
        OR (p_is_first AND EXISTS (
            SELECT FROM unnest(w.times, w.masks) AS e (at, mask)
            WHERE e.at >= w.read_from AND e.at < w.enter_until
                AND e.mask & CASE WHEN p_order = 'any' THEN (1 << p_steps) - 1 ELSE 1 END <> 0
        ));
END
$$;
COMMENT ON FUNCTION analytics._walk_funnel_units(
    integer, integer[], jsonb[], integer[], interval, text, boolean, text, text, boolean, boolean
) IS
    'The counted entries of the units laid out. Where the first entry alone counts and was voided, '
    'one without steps.';

CREATE FUNCTION analytics._find_funnel_entries(
    p_report integer,
    p_steps integer,
    p_keys integer[],
    p_filters jsonb[],
    p_bits integer[],
    p_window interval,
    p_order text,
    p_is_first boolean,
    p_unit text,
    p_breakdown text,
    p_is_last boolean,
    p_has_exclusions boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_entry_changes',
        'unit bigint, scope bigint, session_start timestamptz, old_breakdown text, '
        'old_times timestamptz[], new_breakdown text, new_times timestamptz[]');
    INSERT INTO pg_temp.spectrum_entry_changes (
        unit, scope, session_start, old_breakdown, old_times, new_breakdown, new_times
    )
    WITH frozen AS (
        SELECT unit, scope, '-infinity'::timestamptz AS session_start, kept.breakdown,
            kept.step_times
        FROM pg_temp.spectrum_funnel_units
        JOIN spectrum.rollup_frozen_entries AS kept USING (unit, scope)
        WHERE kept.report_id = p_report
    ),
    found AS (
        SELECT unit, scope, session_start,
            CASE WHEN pick.is_frozen THEN frozen.breakdown ELSE walked.breakdown END AS breakdown,
            CASE WHEN pick.is_frozen THEN frozen.step_times ELSE walked.step_times END
                AS step_times
        FROM analytics._walk_funnel_units(
            p_steps, p_keys, p_filters, p_bits, p_window, p_order, p_is_first, p_unit,
            p_breakdown, p_is_last, p_has_exclusions
        ) AS walked
        FULL JOIN frozen USING (unit, scope, session_start)
        -- The longest, of equal ones the earliest, or the first: a frozen one is earlier.
        CROSS JOIN LATERAL (
            SELECT frozen.unit IS NOT NULL AND (p_is_first OR walked.unit IS NULL
                OR cardinality(frozen.step_times) >= cardinality(walked.step_times)) AS is_frozen
        ) AS pick
        WHERE cardinality(
            CASE WHEN pick.is_frozen THEN frozen.step_times ELSE walked.step_times END
        ) > 0
    ),
    old AS (
        SELECT entry.unit, entry.scope, entry.session_start, entry.breakdown, entry.step_times
        FROM pg_temp.spectrum_funnel_units AS touched
        JOIN spectrum.rollup_funnel_entries AS entry USING (unit, scope)
        WHERE entry.report_id = p_report
            AND (p_unit <> 'session' OR entry.session_start >= touched.read_from)
    )
    SELECT unit, scope, session_start, old.breakdown, old.step_times,
        CASE WHEN pick.is_new THEN found.breakdown ELSE old.breakdown END,
        CASE WHEN pick.is_new THEN found.step_times ELSE old.step_times END
    FROM old
    FULL JOIN found USING (unit, scope, session_start)
    JOIN pg_temp.spectrum_funnel_units AS touched USING (unit, scope)
    CROSS JOIN LATERAL (
        SELECT old.unit IS NULL
            OR (old.step_times[1] >= touched.read_from
                AND old.step_times[1] < touched.enter_until)
            OR (p_is_first AND coalesce(found.step_times[1] < old.step_times[1], false))
            OR coalesce(cardinality(found.step_times) > cardinality(old.step_times), false)
            OR coalesce(cardinality(found.step_times) = cardinality(old.step_times)
                AND found.step_times[1] < old.step_times[1], false) AS is_new
    ) AS pick
    WHERE pick.is_new AND (old.breakdown, old.step_times)
        IS DISTINCT FROM (found.breakdown, found.step_times);
END
$$;
COMMENT ON FUNCTION analytics._find_funnel_entries(
    integer, integer, integer[], jsonb[], integer[], interval, text, boolean, text, text, boolean,
    boolean
) IS
    'Finds the counted entries of the units laid out again and leaves in '
    'pg_temp.spectrum_entry_changes which became others.';

CREATE FUNCTION analytics._keep_funnel_entries(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    DELETE FROM spectrum.rollup_funnel_entries AS entry
    USING pg_temp.spectrum_entry_changes AS changed
    WHERE entry.report_id = p_report AND entry.unit = changed.unit
        AND entry.scope = changed.scope AND entry.session_start = changed.session_start;
    INSERT INTO spectrum.rollup_funnel_entries (
        report_id, unit, scope, session_start, breakdown, step_times
    )
    SELECT p_report, unit, scope, session_start, new_breakdown, new_times
    FROM pg_temp.spectrum_entry_changes
    WHERE new_times IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._keep_funnel_entries(integer) IS
    'Brings rollup_funnel_entries up to the entries found.';
