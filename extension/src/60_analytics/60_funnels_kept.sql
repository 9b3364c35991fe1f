-- Room 60, standing funnels, how they are kept: of each unit that the news concern, the counted
-- entry is found again and takes the place of the one before. Inserts can only lengthen the best
-- entry of a funnel that nothing voids, so there only the entries within a window's length of the
-- news are walked again: users with long histories stay cheap. Where events were taken back, or
-- any event can end a chain (strict order, exclusions, sessions), the whole history is.

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

CREATE FUNCTION analytics._touch_funnel_units(
    p_report integer,
    p_built_to bigint,
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
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_funnel_units',
        'unit bigint, scope bigint, is_leaving boolean, read_from timestamptz, '
        'read_until timestamptz, enter_until timestamptz, old_at timestamptz');
    INSERT INTO pg_temp.spectrum_funnel_units (
        unit, scope, is_leaving, read_from, read_until, enter_until, old_at
    )
    SELECT touched.unit, touched.scope, touched.is_leaving,
        CASE
            WHEN range.is_all THEN '-infinity'
            WHEN p_is_first THEN least(old.entered_at, touched.first_at)
            ELSE touched.first_at - p_window
        END,
        CASE
            WHEN range.is_all THEN 'infinity'
            ELSE greatest(CASE WHEN p_is_first THEN old.entered_at END, touched.last_at) + p_window
        END,
        CASE WHEN range.is_all THEN 'infinity' ELSE touched.last_at + interval '1 us' END,
        old.entered_at
    FROM (
        SELECT unit.unit, unit.scope,
            bool_or(news.is_leaving AND p_unit <> 'account') AS is_leaving,
            bool_or(news.sign < 0) AS is_less,
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
        SELECT entry.step_times[1] AS entered_at FROM spectrum.rollup_funnel_entries AS entry
        WHERE entry.report_id = p_report AND entry.unit = touched.unit
            AND entry.scope = touched.scope
        ORDER BY entry.session_start
        LIMIT 1
    ) AS old ON NOT range.is_all;
END
$$;
COMMENT ON FUNCTION analytics._touch_funnel_units(
    integer, bigint, integer[], text, interval, boolean, boolean, boolean, boolean
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
        SELECT array_agg(m.occurred_at ORDER BY m.occurred_at, m.event_id) AS times,
            array_agg(m.mask ORDER BY m.occurred_at, m.event_id) AS masks,
            CASE WHEN p_breakdown IS NOT NULL
                THEN array_agg(m.label ORDER BY m.occurred_at, m.event_id)
            END AS labels
        FROM (
            SELECT e.occurred_at, e.event_id,
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
                    WHEN p_breakdown IS NOT NULL THEN nullif(e.properties ->> p_breakdown, '')
                END AS label
            FROM analytics.events AS e
            WHERE CASE WHEN p_unit = 'account' THEN e.account_key ELSE e.user_key END = touched.unit
                AND e.user_key <> 0
                AND e.occurred_at BETWEEN touched.read_from AND touched.read_until
                AND (p_reads_all OR e.event_type_key = ANY (p_keys))
                AND (touched.scope >= 0 OR e.account_key = -touched.scope)
        ) AS m
        WHERE p_reads_all OR m.mask <> 0
    ) AS history
    WHERE NOT touched.is_leaving AND history.times IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._touched_histories(
    integer[], jsonb[], integer[], boolean, text, text
) IS
    'By unit laid out: the events that have to be walked again, cf. analytics._unit_histories.';

CREATE FUNCTION analytics._split_sessions(
    p_times timestamptz[], p_masks integer[], p_labels text[], p_keeps_all boolean
)
RETURNS TABLE (
    session_start timestamptz, times timestamptz[], masks integer[], labels text[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
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
    GROUP BY 1;
END
$$;
COMMENT ON FUNCTION analytics._split_sessions(timestamptz[], integer[], text[], boolean) IS
    'Cuts one user''s history into those of his sessions.';

CREATE FUNCTION analytics._move_funnel_entries(
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
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_entry_changes',
        'unit bigint, scope bigint, session_start timestamptz, old_breakdown text, '
        'old_times timestamptz[], new_breakdown text, new_times timestamptz[]');
    INSERT INTO pg_temp.spectrum_entry_changes (
        unit, scope, session_start, old_breakdown, old_times, new_breakdown, new_times
    )
    WITH histories AS (
        SELECT h.unit, h.scope, coalesce(s.session_start, '-infinity') AS session_start,
            coalesce(s.times, h.times) AS times, coalesce(s.masks, h.masks) AS masks,
            coalesce(s.labels, h.labels) AS labels, h.read_from, h.enter_until
        FROM analytics._touched_histories(
            p_keys, p_filters, p_bits, p_order = 'strict' OR p_unit = 'session', p_unit, p_breakdown
        ) AS h
        LEFT JOIN LATERAL analytics._split_sessions(
            h.times, h.masks, h.labels, p_order = 'strict'
        ) AS s ON p_unit = 'session'
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
    ),
    found AS (
        SELECT w.unit, w.scope, w.session_start,
            coalesce(w.labels[w.chain[CASE WHEN p_is_last THEN cardinality(w.chain) ELSE 1 END]],
                '') AS breakdown,
            ARRAY(SELECT w.times[c.position] FROM unnest(w.chain) AS c (position)) AS step_times
        FROM walks AS w
        WHERE w.chain IS NOT NULL
    ),
    old AS (
        SELECT entry.unit, entry.scope, entry.session_start, entry.breakdown, entry.step_times
        FROM pg_temp.spectrum_funnel_units AS touched
        JOIN spectrum.rollup_funnel_entries AS entry USING (unit, scope)
        WHERE entry.report_id = p_report
    )
    SELECT unit, scope, session_start, old.breakdown, old.step_times,
        CASE WHEN pick.is_new THEN found.breakdown ELSE old.breakdown END,
        CASE WHEN pick.is_new THEN found.step_times ELSE old.step_times END
    FROM old
    FULL JOIN found USING (unit, scope, session_start)
    JOIN pg_temp.spectrum_funnel_units AS touched USING (unit, scope)
    CROSS JOIN LATERAL (
        SELECT touched.is_leaving OR old.unit IS NULL
            OR (old.step_times[1] >= touched.read_from
                AND old.step_times[1] < touched.enter_until)
            OR coalesce(cardinality(found.step_times) > cardinality(old.step_times), false)
            OR coalesce(cardinality(found.step_times) = cardinality(old.step_times)
                AND found.step_times[1] < old.step_times[1], false) AS is_new
    ) AS pick
    WHERE pick.is_new AND (old.breakdown, old.step_times)
        IS DISTINCT FROM (found.breakdown, found.step_times);

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
COMMENT ON FUNCTION analytics._move_funnel_entries(
    integer, integer, integer[], jsonb[], integer[], interval, text, boolean, text, text, boolean,
    boolean
) IS
    'Finds the counted entries of the units laid out again, keeps them in rollup_funnel_entries, '
    'and leaves in pg_temp.spectrum_entry_changes which became others.';

CREATE FUNCTION analytics._lay_out_funnel_steps()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_funnel_steps',
        'account_id text COLLATE "C", breakdown text COLLATE "C", step integer, '
        'microseconds bigint, units bigint');
    INSERT INTO pg_temp.spectrum_funnel_steps (account_id, breakdown, step, microseconds, units)
    SELECT scopes.account_id, moved.breakdown, moved.step, moved.microseconds, sum(moved.units)
    FROM (
        SELECT version.scope, version.breakdown, s.step,
            (extract(epoch FROM version.times[s.step] - version.times[s.step - 1]) * 1000000)
                ::bigint AS microseconds,
            sum(version.sign) AS units
        FROM (
            SELECT -1 AS sign, scope, old_breakdown AS breakdown, old_times AS times
            FROM pg_temp.spectrum_entry_changes
            UNION ALL
            SELECT 1, scope, new_breakdown, new_times FROM pg_temp.spectrum_entry_changes
        ) AS version
        CROSS JOIN LATERAL generate_series(1, cardinality(version.times)) AS s (step)
        GROUP BY 1, 2, 3, 4
        HAVING sum(version.sign) <> 0
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.breakdown, moved.step, moved.microseconds;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_funnel_steps() IS
    'Lays out, by account and step, how many units more or less took how long from the step '
    'before.';

CREATE FUNCTION analytics._move_funnel_sums(p_report integer, p_steps integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO spectrum.rollup_funnel_seconds AS known (
        report_id, account_id, breakdown, step, microseconds, units
    )
    SELECT p_report, account_id, breakdown, step, microseconds, units
    FROM pg_temp.spectrum_funnel_steps
    WHERE step > 1
    ON CONFLICT (report_id, account_id, breakdown, step, microseconds) DO UPDATE SET
        units = known.units + excluded.units;
    DELETE FROM spectrum.rollup_funnel_seconds AS known
    USING pg_temp.spectrum_funnel_steps AS moved
    WHERE moved.units < 0 AND known.report_id = p_report AND known.account_id = moved.account_id
        AND known.breakdown = moved.breakdown AND known.step = moved.step
        AND known.microseconds = moved.microseconds AND known.units = 0;

    -- All steps of an account that has any, with zeros where nobody came.
    INSERT INTO analytics.mv_conversion_funnels (report_id, account_id, breakdown, step)
    SELECT p_report, groups.account_id, groups.breakdown, step
    FROM (SELECT DISTINCT account_id, breakdown FROM pg_temp.spectrum_funnel_steps) AS groups
    CROSS JOIN generate_series(1, p_steps) AS step
    ON CONFLICT (report_id, account_id, breakdown, step) DO NOTHING;
    UPDATE analytics.mv_conversion_funnels AS sums
    SET users = sums.users + moved.units,
        microseconds = sums.microseconds + coalesce(moved.microseconds, 0),
        below = sums.below + coalesce(moved.below, 0)
    FROM (
        SELECT steps.account_id, steps.breakdown, steps.step, sum(steps.units) AS units,
            sum(steps.units * steps.microseconds) AS microseconds,
            sum(steps.units) FILTER (WHERE steps.microseconds < cell.lower_median) AS below
        FROM pg_temp.spectrum_funnel_steps AS steps
        JOIN analytics.mv_conversion_funnels AS cell
            ON cell.report_id = p_report AND cell.account_id = steps.account_id
                AND cell.breakdown = steps.breakdown AND cell.step = steps.step
        GROUP BY steps.account_id, steps.breakdown, steps.step
    ) AS moved
    WHERE sums.report_id = p_report AND sums.account_id = moved.account_id
        AND sums.breakdown = moved.breakdown AND sums.step = moved.step;

    PERFORM analytics._move_funnel_median(p_report, cell.account_id, cell.breakdown, cell.step)
    FROM (
        SELECT DISTINCT account_id, breakdown, step FROM pg_temp.spectrum_funnel_steps
        WHERE step > 1
    ) AS cell;
END
$$;
COMMENT ON FUNCTION analytics._move_funnel_sums(integer, integer) IS
    'Moves the counts, times and medians of mv_conversion_funnels by the steps laid out.';

CREATE FUNCTION analytics._move_funnel_median(
    p_report integer,
    p_account_id text,
    p_breakdown text,
    p_step integer
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
DECLARE
    r_cell record;
    r_lower record;
    v_upper bigint;
BEGIN
    -- The middle is looked for from where it was: it moves by no more than came and went.
    SELECT cell.users, cell.below, coalesce(cell.lower_median, -1) AS pivot,
        (cell.users - 1) / 2 AS rank
    INTO r_cell
    FROM analytics.mv_conversion_funnels AS cell
    WHERE cell.report_id = p_report AND cell.account_id = p_account_id
        AND cell.breakdown = p_breakdown AND cell.step = p_step;

    IF r_cell.users > 0 AND r_cell.rank < r_cell.below THEN
        SELECT walk.microseconds, walk.below, walk.below + walk.units AS up_to INTO r_lower
        FROM (
            SELECT known.microseconds, known.units, r_cell.below
                - sum(known.units) OVER (ORDER BY known.microseconds DESC) AS below
            FROM spectrum.rollup_funnel_seconds AS known
            WHERE known.report_id = p_report AND known.account_id = p_account_id
                AND known.breakdown = p_breakdown AND known.step = p_step
                AND known.microseconds < r_cell.pivot
            ORDER BY known.microseconds DESC
        ) AS walk
        WHERE walk.below <= r_cell.rank
        LIMIT 1;
    ELSIF r_cell.users > 0 THEN
        SELECT walk.microseconds, walk.up_to - walk.units AS below, walk.up_to INTO r_lower
        FROM (
            SELECT known.microseconds, known.units, r_cell.below
                + sum(known.units) OVER (ORDER BY known.microseconds) AS up_to
            FROM spectrum.rollup_funnel_seconds AS known
            WHERE known.report_id = p_report AND known.account_id = p_account_id
                AND known.breakdown = p_breakdown AND known.step = p_step
                AND known.microseconds >= r_cell.pivot
            ORDER BY known.microseconds
        ) AS walk
        WHERE walk.up_to > r_cell.rank
        LIMIT 1;
    ELSE
        SELECT NULL::bigint AS microseconds, 0::numeric AS below, 0::numeric AS up_to INTO r_lower;
    END IF;

    v_upper := r_lower.microseconds;
    IF r_cell.users / 2 >= r_lower.up_to THEN
        v_upper := (
            SELECT known.microseconds FROM spectrum.rollup_funnel_seconds AS known
            WHERE known.report_id = p_report AND known.account_id = p_account_id
                AND known.breakdown = p_breakdown AND known.step = p_step
                AND known.microseconds > r_lower.microseconds
            ORDER BY known.microseconds
            LIMIT 1
        );
    END IF;
    UPDATE analytics.mv_conversion_funnels AS cell
    SET below = r_lower.below, lower_median = r_lower.microseconds, upper_median = v_upper
    WHERE cell.report_id = p_report AND cell.account_id = p_account_id
        AND cell.breakdown = p_breakdown AND cell.step = p_step;
END
$$;
COMMENT ON FUNCTION analytics._move_funnel_median(integer, text, text, integer) IS
    'Finds the middle of a step''s times again, after its counts were moved.';

CREATE FUNCTION analytics._move_funnel_days(p_report integer, p_steps integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT spectrum.period_starts(
        'day', min(entry.entered_at), max(entry.entered_at) + interval '1 us'
    ) INTO v_starts
    FROM pg_temp.spectrum_entry_changes AS changed
    CROSS JOIN LATERAL (
        VALUES (changed.old_times[1]), (changed.new_times[1])
    ) AS entry (entered_at);
    v_days := analytics._period_dates(v_starts);

    INSERT INTO analytics.mv_funnel_days AS sums (report_id, account_id, day, step, users)
    SELECT p_report, scopes.account_id, v_days[moved.number], s.step,
        coalesce(sum(moved.users) FILTER (WHERE moved.reached >= s.step), 0)
    FROM (
        SELECT version.scope, width_bucket(version.times[1], v_starts) AS number,
            cardinality(version.times) AS reached, sum(version.sign) AS users
        FROM (
            SELECT -1 AS sign, scope, old_times AS times FROM pg_temp.spectrum_entry_changes
            UNION ALL
            SELECT 1, scope, new_times FROM pg_temp.spectrum_entry_changes
        ) AS version
        WHERE version.times IS NOT NULL
        GROUP BY 1, 2, 3
        HAVING sum(version.sign) <> 0
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    CROSS JOIN generate_series(1, p_steps) AS s (step)
    GROUP BY scopes.account_id, moved.number, s.step
    ON CONFLICT (report_id, account_id, day, step) DO UPDATE SET
        users = sums.users + excluded.users;

    IF EXISTS (SELECT FROM pg_temp.spectrum_entry_changes WHERE old_times IS NOT NULL) THEN
        DELETE FROM analytics.mv_funnel_days AS sums
        USING analytics.mv_funnel_days AS entered
        WHERE entered.report_id = p_report AND entered.step = 1 AND entered.users = 0
            AND sums.report_id = p_report AND sums.account_id = entered.account_id
            AND sums.day = entered.day;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._move_funnel_days(integer, integer) IS
    'Moves mv_funnel_days by the entries that became others.';

CREATE FUNCTION analytics._drop_empty_funnels(p_report integer, p_steps integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM analytics.mv_conversion_funnels AS sums
    USING analytics.mv_conversion_funnels AS entered
    WHERE entered.report_id = p_report AND entered.step = 1 AND entered.users = 0
        AND sums.report_id = p_report AND sums.account_id = entered.account_id
        AND sums.breakdown = entered.breakdown;
    -- All accounts together have their steps even where nobody came.
    INSERT INTO analytics.mv_conversion_funnels (report_id, account_id, breakdown, step)
    SELECT p_report, '*', '', step
    FROM generate_series(1, p_steps) AS step
    WHERE NOT EXISTS (
        SELECT FROM analytics.mv_conversion_funnels AS known
        WHERE known.report_id = p_report AND known.account_id = '*'
    );
END
$$;
COMMENT ON FUNCTION analytics._drop_empty_funnels(integer, integer) IS
    'Takes out the accounts and values of a breakdown that nobody entered by any more.';

CREATE FUNCTION analytics._maintain_funnel(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_funnel record;
    r_masks record;
    v_steps integer;
    v_is_build boolean;
    v_has_exclusions boolean;
    v_built_to bigint := p_built_to;
BEGIN
    SELECT definition.*, report.built_to, report.state INTO r_funnel
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.funnels, report.definition)
        AS definition
    WHERE report.report_id = p_report;
    v_is_build := r_funnel.state = 'building' AND p_built_to = 9223372036854775807;
    v_steps := jsonb_array_length(r_funnel.steps);
    v_has_exclusions := coalesce(r_funnel.exclusions, '[]') <> '[]';
    r_masks := analytics._funnel_masks(r_funnel.steps, r_funnel.exclusions);
    -- An account is walked whole, whichever of its users brings it up.
    IF r_funnel.unit = 'account' AND p_built_to >= 0 THEN
        v_built_to := 9223372036854775807;
    END IF;

    PERFORM analytics._touch_funnel_units(
        p_report, v_built_to, r_masks.keys, r_funnel.unit, r_funnel.time_window,
        r_funnel.step_order = 'strict' OR r_funnel.unit = 'session', r_funnel.entry = 'first',
        r_funnel.step_order = 'strict' OR r_funnel.unit = 'session' OR v_has_exclusions, v_is_build
    );
    PERFORM analytics._move_funnel_entries(
        p_report, v_steps, r_masks.keys, r_masks.filters, r_masks.bits, r_funnel.time_window,
        r_funnel.step_order, r_funnel.entry = 'first', r_funnel.unit, r_funnel.breakdown,
        r_funnel.attribution = 'last', v_has_exclusions
    );
    PERFORM analytics._lay_out_funnel_steps();
    PERFORM analytics._move_funnel_sums(p_report, v_steps);
    PERFORM analytics._move_funnel_days(p_report, v_steps);
    PERFORM analytics._drop_empty_funnels(p_report, v_steps);
END
$$;
COMMENT ON FUNCTION analytics._maintain_funnel(integer, bigint) IS
    'Moves the sums of a funnel by the news.';
