-- Room 72, glass of operations: requests, errors, and what came in.

CREATE FUNCTION analytics._request_measures(p_event_type text, p_properties jsonb)
RETURNS TABLE (
    view_name text, measure text, endpoint text, service text, version text, rule text
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE ROWS 5
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_is_request boolean := p_event_type IN ('request', 'api_request');
    v_is_error boolean := CASE jsonb_typeof(p_properties -> 'status')
        WHEN 'number' THEN (p_properties -> 'status')::numeric >= 500
        WHEN 'string' THEN analytics._text_number(p_properties ->> 'status') >= 500
    END IS TRUE OR p_properties -> 'error' = 'true';
    v_latency numeric := CASE jsonb_typeof(p_properties -> 'latency_ms')
        WHEN 'number' THEN (p_properties -> 'latency_ms')::numeric
        WHEN 'string' THEN analytics._text_number(p_properties ->> 'latency_ms')
    END;
    v_requests text := 'Each request or api_request counts';
    v_errors text := 'Each request or api_request counts whose status is 500 or more, or whose '
        'error is true';
BEGIN
    RETURN QUERY
    SELECT m.view_name, m.measure,
        CASE WHEN m.view_name = 'operations' THEN
            nullif(left(p_properties ->> 'endpoint', 200), '') END,
        CASE WHEN m.view_name <> 'operations' THEN
            nullif(left(p_properties ->> 'service', 200), '') END,
        CASE WHEN m.view_name <> 'operations' THEN
            nullif(left(p_properties ->> 'version', 200), '') END,
        m.rule
    FROM (
        VALUES
            ('operations', 'requests', v_requests, v_is_request),
            ('operations', 'errors', v_errors, v_is_request AND v_is_error),
            ('operations', 'measured', v_requests || ' whose latency_ms is a number from 0 to '
                'below 10^15', v_is_request AND v_latency >= 0 AND v_latency < 1e15),
            ('error_rates_daily', 'requests', v_requests, v_is_request),
            ('error_rates_daily', 'errors', v_errors, v_is_request AND v_is_error),
            ('error_rates_daily', 'error_events', 'Each event of type error counts',
                p_event_type = 'error')
    ) AS m (view_name, measure, rule, counts)
    WHERE m.counts;
END
$$;
COMMENT ON FUNCTION analytics._request_measures(text, jsonb) IS
    'The measures of operations and error_rates_daily that an event counts in, under which '
    'endpoint, or service and version, and how. Read as in analytics._request_counts.';

CREATE FUNCTION analytics._trace_requests(p_view text, p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_day date := analytics._cell_day(p_cell, 'day');
    v_account bigint := analytics._cell_account(p_cell);
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('request', 'api_request', 'error')
    );
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    RETURN QUERY
    SELECT format('%s, on %s%s.', m.rule, v_day, analytics._cell_scope(p_cell)),
        e.event_id::text, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._request_measures(e.event_type, e.properties) AS m
    WHERE e.event_type_key = ANY (v_keys) AND e.occurred_at >= r_days.since
        AND e.occurred_at < r_days.until AND (v_account = 0 OR e.account_key = v_account)
        AND m.view_name = p_view AND m.measure = p_cell ->> 'measure'
        AND m.endpoint IS NOT DISTINCT FROM p_cell ->> 'endpoint'
        AND m.service IS NOT DISTINCT FROM p_cell ->> 'service'
        AND m.version IS NOT DISTINCT FROM p_cell ->> 'version';
END
$$;
COMMENT ON FUNCTION analytics._trace_requests(text, jsonb) IS
    'The events behind a cell of operations or error_rates_daily, which has been read.';

CREATE FUNCTION analytics._cells_requests(
    p_view text, p_user bigint, p_at timestamptz, p_event uuid
)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_strip_nulls(jsonb_build_object('account_id', scope.account_id,
            'day', analytics._day_of(p_at), 'endpoint', m.endpoint, 'service', m.service,
            'version', m.version, 'measure', m.measure)),
        m.rule || '.'
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._request_measures(e.event_type, e.properties) AS m
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
        AND m.view_name = p_view;
END
$$;
COMMENT ON FUNCTION analytics._cells_requests(text, bigint, timestamptz, uuid) IS
    'The cells of operations or error_rates_daily that count an event.';

CREATE FUNCTION analytics._trace_operations(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT found.* FROM analytics._trace_requests('operations', analytics._read_cell(
        p_cell, '{day}', '{requests, errors, measured}', '{endpoint}'
    )) AS found;
END
$$;
COMMENT ON FUNCTION analytics._trace_operations(jsonb) IS
    'See analytics.trace: events behind a cell of operations.';

CREATE FUNCTION analytics._cells_operations(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT c.cell, c.rule FROM analytics._cells_requests('operations', p_user, p_at, p_event) AS c;
END
$$;
COMMENT ON FUNCTION analytics._cells_operations(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of operations that count an event.';

CREATE FUNCTION analytics._trace_error_rates_daily(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT found.* FROM analytics._trace_requests('error_rates_daily', analytics._read_cell(
        p_cell, '{day}', '{errors, requests, error_events}', '{service, version}'
    )) AS found;
END
$$;
COMMENT ON FUNCTION analytics._trace_error_rates_daily(jsonb) IS
    'See analytics.trace: events behind a cell of error_rates_daily.';

CREATE FUNCTION analytics._cells_error_rates_daily(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT c.cell, c.rule
    FROM analytics._cells_requests('error_rates_daily', p_user, p_at, p_event) AS c;
END
$$;
COMMENT ON FUNCTION analytics._cells_error_rates_daily(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of error_rates_daily that count an event.';

CREATE FUNCTION analytics._cell_minute(p_cell jsonb)
RETURNS timestamptz
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO'
AS $$
DECLARE
    v_minute timestamptz;
BEGIN
    IF p_cell ->> 'minute' ~ ('^[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}(:00)?'
        '(Z|[+-][0-9]{2}(:?[0-9]{2})?)?$')
    THEN
        v_minute := (p_cell ->> 'minute')::timestamptz;
    ELSE
        PERFORM spectrum._reject('p_cell.minute', p_cell ->> 'minute',
            'the time at which a minute begins, such as 2026-03-01T10:00:00Z');
    END IF;
    RETURN v_minute;
EXCEPTION WHEN datetime_field_overflow OR invalid_time_zone_displacement_value THEN
    PERFORM spectrum._reject('p_cell.minute', p_cell ->> 'minute',
        'the time at which a minute begins, such as 2026-03-01T10:00:00Z');
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._cell_minute(jsonb) IS
    'The start of the minute that a cell names; raises 22023 unless it is one.';

CREATE FUNCTION analytics._trace_throughput_minutes(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{minute}', '{events}');
    v_minute timestamptz := analytics._cell_minute(v_cell);
    v_account bigint := analytics._cell_account(v_cell);
BEGIN
    RETURN QUERY
    SELECT format('Every event%s in the minute from %s counts once, also of unknown users.',
            analytics._cell_scope(v_cell), v_minute),
        e.event_id::text, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    WHERE e.occurred_at >= v_minute AND e.occurred_at < v_minute + interval '1 minute'
        AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_throughput_minutes(jsonb) IS
    'See analytics.trace: events behind a cell of throughput_minutes.';

CREATE FUNCTION analytics._cells_throughput_minutes(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_minute timestamptz := date_bin('1 minute', p_at, '2000-01-01 00:00+00');
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'minute', v_minute,
            'measure', 'events'),
        'An event of its minute, which is one of the last seven days.'
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE v_minute >= now() - interval '7 days';
END
$$;
COMMENT ON FUNCTION analytics._cells_throughput_minutes(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of throughput_minutes that count an event.';
