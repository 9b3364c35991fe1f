-- Room 72, glass of the attribution: which conversions are given to what.

CREATE FUNCTION analytics._attribution_measures(
    p_event text, p_revenue numeric, p_definition jsonb
)
RETURNS TABLE (measure text, unit text, amount numeric, rule text)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE ROWS 3
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT m.measure, m.unit, m.amount, format(
        'An event %s, given to the %s session with UTM tags or a referrer in the 30 days up to '
            'and including its own, else direct: %s.',
        p_definition ->> 'conversion', p_definition ->> 'model', m.counts)
    FROM (
        VALUES
            ('conversions', p_event, NULL, 'each counts once'),
            ('users', NULL, NULL, 'a user counts once a day'),
            ('revenue', p_event, p_revenue, 'its money')
    ) AS m (measure, unit, amount, counts)
    WHERE m.measure <> 'revenue' OR p_revenue IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._attribution_measures(text, numeric, jsonb) IS
    'The measures of attributed_conversions that a conversion counts in, what it makes count, and '
    'how.';

CREATE FUNCTION analytics._trace_attributed_conversions(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{attribution, day, channel}',
        '{conversions, users, revenue}', '{source, medium, campaign, currency}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_definition jsonb := analytics._served_definition('attribution', v_cell ->> 'attribution');
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    RETURN QUERY
    SELECT measures.rule, measures.unit, measures.amount, a.user_key, a.event_id, a.occurred_at
    FROM analytics._attributed(
        v_definition -> 'conversion', r_days.since, r_days.until, v_definition ->> 'model',
        nullif(v_cell ->> 'account_id', '*'), false, NULL
    ) AS a
    CROSS JOIN LATERAL analytics._attribution_measures(
        a.event_id::text, a.revenue, v_definition
    ) AS measures
    WHERE a.credit = ARRAY[
            v_cell ->> 'channel', v_cell ->> 'source', v_cell ->> 'medium', v_cell ->> 'campaign'
        ]
        AND a.currency IS NOT DISTINCT FROM v_cell ->> 'currency'
        AND measures.measure = v_cell ->> 'measure';
END
$$;
COMMENT ON FUNCTION analytics._trace_attributed_conversions(jsonb) IS
    'See analytics.trace: events behind a cell of attributed_conversions.';

CREATE FUNCTION analytics._cells_attributed_conversions(
    p_user bigint, p_at timestamptz, p_event uuid
)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_strip_nulls(jsonb_build_object('account_id', scope.account_id,
            'attribution', report.name, 'day', analytics._day_of(p_at), 'channel', a.credit[1],
            'source', a.credit[2], 'medium', a.credit[3], 'campaign', a.credit[4],
            'currency', a.currency, 'measure', measures.measure)),
        measures.rule
    FROM analytics.served_reports AS report
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._attributed(
        report.definition -> 'conversion', NULL, NULL, report.definition ->> 'model',
        nullif(scope.account_id, '*'), false, p_user
    ) AS a
    CROSS JOIN LATERAL analytics._attribution_measures(
        p_event::text, a.revenue, report.definition
    ) AS measures
    WHERE report.kind = 'attribution' AND p_user <> 0 AND a.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_attributed_conversions(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of attributed_conversions that count an event.';
