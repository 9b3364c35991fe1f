-- Room 72, glass of the funnels: which events are the steps of the entries that count.

CREATE FUNCTION analytics._funnel_step_events(
    p_definition jsonb,
    p_account bigint,
    p_units bigint[],
    p_sessions timestamptz[],
    p_numbers integer[],
    p_times timestamptz[]
)
RETURNS TABLE (
    unit bigint,
    session_start timestamptz,
    number integer,
    user_key bigint,
    user_id text,
    account_id text,
    event_id uuid,
    occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_by_account boolean := p_definition ->> 'unit' = 'account';
    v_is_any boolean := p_definition ->> 'step_order' = 'any';
    v_first timestamptz := (SELECT min(t.at) FROM unnest(p_times) AS t (at));
    v_last timestamptz := (SELECT max(t.at) FROM unnest(p_times) AS t (at));
    r_masks record := analytics._funnel_masks(p_definition -> 'steps', NULL);
BEGIN
    RETURN QUERY
    SELECT f.unit, f.session_start, f.number, f.user_key, f.user_id, f.account_id, f.event_id,
        f.occurred_at
    FROM (
        SELECT s.unit, s.session_start, s.number, e.user_key, e.user_id, e.account_id, e.event_id,
            e.occurred_at,
            row_number() OVER (
                PARTITION BY s.unit, s.session_start,
                    CASE WHEN v_is_any THEN e.event_id END, CASE WHEN NOT v_is_any THEN s.number END
                ORDER BY s.number, e.event_id
            ) AS tie
        FROM unnest(p_units, p_sessions, p_numbers, p_times)
            AS s (unit, session_start, number, at)
        JOIN analytics.events AS e ON e.occurred_at = s.at
            AND CASE WHEN v_by_account THEN e.account_key ELSE e.user_key END = s.unit
        WHERE e.occurred_at BETWEEN v_first AND v_last AND e.user_key <> 0
            AND e.event_type_key = ANY (r_masks.keys)
            AND (v_by_account OR e.user_key = ANY (p_units))
            AND (p_account = 0 OR e.account_key = p_account)
            AND EXISTS (
                SELECT FROM unnest(r_masks.keys, r_masks.filters, r_masks.bits)
                    AS m (key, filter, bits)
                WHERE m.key = e.event_type_key
                    AND (m.filter IS NULL OR e.properties @> m.filter)
                    AND (v_is_any OR m.bits & (1 << (s.number - 1)) <> 0)
            )
    ) AS f
    -- In order, of several events of one step at one time any could stand for it; in any order they
    -- are steps together, each once.
    WHERE f.tie = 1;
END
$$;
COMMENT ON FUNCTION analytics._funnel_step_events(
    jsonb, bigint, bigint[], timestamptz[], integer[], timestamptz[]
) IS
    'The events that are the steps of entries, given by unit, session, number and time of each '
    'step. p_account: whose events count, 0 all.';

CREATE FUNCTION analytics._funnel_rule(p_definition jsonb, p_step integer)
RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_step jsonb := p_definition -> 'steps' -> (p_step - 1);
    v_unit text := CASE p_definition ->> 'unit' WHEN 'account' THEN 'An account'
        WHEN 'session' THEN 'A session' ELSE 'A user' END;
BEGIN
    RETURN format('%s counts once if its %s reached step %s%s: %s, within %s of step 1%s.',
        v_unit,
        CASE p_definition ->> 'entry' WHEN 'first' THEN 'first entry' ELSE 'longest entry' END,
        p_step,
        CASE WHEN p_definition ->> 'step_order' <> 'any'
            THEN format(' (%s)', coalesce(v_step ->> 'event', v_step #>> '{}')) ELSE '' END,
        CASE p_definition ->> 'step_order'
            WHEN 'any' THEN 'as many of the steps, in any order'
            WHEN 'strict' THEN 'the steps in order and nothing between'
            ELSE 'the steps in order'
        END,
        p_definition ->> 'time_window',
        CASE WHEN coalesce(nullif(p_definition -> 'exclusions', 'null'), '[]') <> '[]'
            THEN ', without ' || (p_definition ->> 'exclusions') || ' in between' ELSE '' END);
END
$$;
COMMENT ON FUNCTION analytics._funnel_rule(jsonb, integer) IS
    'By what a funnel counts a unit in a step, in words.';

CREATE FUNCTION analytics._funnel_step_trace(
    p_cell jsonb, p_day date, p_breakdown text, p_has_breakdown boolean
)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definition jsonb := analytics._served_definition('funnel', p_cell ->> 'funnel');
    v_step integer := analytics._cell_number(p_cell, 'step');
    r_funnel record;
    r_days record := analytics._days_between(p_day, p_day);
BEGIN
    SELECT f.* INTO r_funnel
    FROM jsonb_to_record(v_definition) AS f (
        steps jsonb, time_window interval, step_order text, entry text, unit text,
        breakdown text, attribution text, exclusions jsonb
    );
    RETURN QUERY
    SELECT analytics._funnel_rule(v_definition, v_step),
        CASE r_funnel.unit
            WHEN 'account' THEN did.account_id
            WHEN 'session' THEN did.user_id || ' from '
                || to_char(did.session_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')
        END,
        NULL::numeric, did.user_key, did.event_id, did.occurred_at
    FROM (
        SELECT array_agg(e.unit) AS units, array_agg(e.session_start) AS sessions,
            array_agg(s.number) AS numbers, array_agg(e.step_times[s.number]) AS times
        FROM analytics._funnel_entries(
            r_funnel.steps, NULL, NULL, r_funnel.time_window, r_funnel.step_order, r_funnel.entry,
            r_funnel.unit, nullif(p_cell ->> 'account_id', '*'),
            CASE WHEN p_has_breakdown THEN r_funnel.breakdown END, r_funnel.attribution,
            r_funnel.exclusions, false
        ) AS e
        CROSS JOIN LATERAL generate_series(1, v_step) AS s (number)
        WHERE cardinality(e.step_times) >= v_step
            AND (p_day IS NULL
                OR (e.step_times[1] >= r_days.since AND e.step_times[1] < r_days.until))
            AND (NOT p_has_breakdown OR coalesce(e.breakdown, '') = coalesce(p_breakdown, ''))
    ) AS entries
    CROSS JOIN LATERAL analytics._funnel_step_events(
        v_definition, analytics._cell_account(p_cell), entries.units, entries.sessions,
        entries.numbers, entries.times
    ) AS did;
END
$$;
COMMENT ON FUNCTION analytics._funnel_step_trace(jsonb, date, text, boolean) IS
    'The events by which units count in a step of a standing funnel: of those that entered on a '
    'day, or of those with a value of the breakdown.';

CREATE FUNCTION analytics._trace_conversion_funnels(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{funnel, step}', '{users}', '{breakdown}');
BEGIN
    RETURN QUERY
    SELECT * FROM analytics._funnel_step_trace(v_cell, NULL, v_cell ->> 'breakdown', true);
END
$$;
COMMENT ON FUNCTION analytics._trace_conversion_funnels(jsonb) IS
    'See analytics.trace: events behind a cell of conversion_funnels.';

CREATE FUNCTION analytics._trace_funnel_days(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{funnel, day, step}', '{users}');
    v_day date := analytics._cell_day(v_cell, 'day');
BEGIN
    RETURN QUERY
    SELECT format('%s Its step 1 was on %s.', found.rule, v_day), found.unit, found.amount,
        found.user_key, found.event_id, found.occurred_at
    FROM analytics._funnel_step_trace(v_cell, v_day, NULL, false) AS found;
END
$$;
COMMENT ON FUNCTION analytics._trace_funnel_days(jsonb) IS
    'See analytics.trace: events behind a cell of funnel_days.';

CREATE FUNCTION analytics._funnel_cells(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (
    account_id text,
    funnel text,
    breakdown text,
    entered_at timestamptz,
    step integer,
    rule text
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_account bigint := (
        SELECT e.account_key FROM analytics.event_keys AS e
        WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
    );
BEGIN
    -- The counted entry of a unit is kept, so that only one need be looked at.
    RETURN QUERY
    SELECT scope.account_id, report.name, entry.breakdown, entry.step_times[1], reached.step,
        analytics._funnel_rule(report.definition, reached.step)
    FROM spectrum.reports AS report
    JOIN spectrum.rollup_funnel_entries AS entry ON entry.report_id = report.report_id
        AND entry.unit
            = CASE report.definition ->> 'unit' WHEN 'account' THEN v_account ELSE p_user END
    CROSS JOIN LATERAL (
        SELECT ARRAY[cardinality(entry.step_times)] AS steps,
            ARRAY(SELECT generate_series(1, cardinality(entry.step_times))) AS numbers
    ) AS walked
    CROSS JOIN LATERAL (
        SELECT min(did.number) AS number
        FROM analytics._funnel_step_events(
            report.definition, greatest(0, -entry.scope), array_fill(entry.unit, walked.steps),
            array_fill(entry.session_start, walked.steps), walked.numbers, entry.step_times
        ) AS did
        WHERE did.event_id = p_event
    ) AS filled
    CROSS JOIN LATERAL generate_series(filled.number, cardinality(entry.step_times))
        AS reached (step)
    CROSS JOIN LATERAL (
        SELECT '*' AS account_id WHERE entry.scope >= 0
        UNION ALL
        SELECT known.account_id FROM analytics.accounts AS known
        WHERE known.account_key = abs(entry.scope)
    ) AS scope
    WHERE report.kind = 'funnel' AND report.state = 'served' AND p_user <> 0
        AND p_at = ANY (entry.step_times);
END
$$;
COMMENT ON FUNCTION analytics._funnel_cells(bigint, timestamptz, uuid) IS
    'The steps of standing funnels in which an event makes its unit count.';

CREATE FUNCTION analytics._cells_conversion_funnels(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', c.account_id, 'funnel', c.funnel, 'step', c.step,
            'breakdown', nullif(c.breakdown, ''), 'measure', 'users'),
        c.rule
    FROM analytics._funnel_cells(p_user, p_at, p_event) AS c
    GROUP BY 1, 2;
END
$$;
COMMENT ON FUNCTION analytics._cells_conversion_funnels(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of conversion_funnels that count an event.';

CREATE FUNCTION analytics._cells_funnel_days(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', c.account_id, 'funnel', c.funnel,
            'day', d.day, 'step', c.step, 'measure', 'users'),
        format('%s Its step 1 was on %s.', c.rule, d.day)
    FROM analytics._funnel_cells(p_user, p_at, p_event) AS c
    CROSS JOIN LATERAL (SELECT analytics._day_of(c.entered_at) AS day) AS d
    GROUP BY 1, 2;
END
$$;
COMMENT ON FUNCTION analytics._cells_funnel_days(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of funnel_days that count an event.';
