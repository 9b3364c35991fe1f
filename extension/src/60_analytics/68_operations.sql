-- Room 60, operations: latency and errors of requests, and how many events come in. A request is an
-- event request or api_request; its properties are endpoint, latency_ms, status, error, service and
-- version. It is an error when its status is 500 or more, or its error is true. Events of the type
-- error are no requests: they stand beside the requests of their service, in a column of their own.
-- Of endpoint, service and version 200 characters count, and an empty one is none; of latency_ms
-- six decimals: so that what is kept of them (68_operations_standing.sql) fits into an index.
-- Percentiles are taken from how often each value occurs, so they are exact, and counts of several
-- days can be added up first. Reads analytics.events.

CREATE FUNCTION analytics._counted_percentile(
    p_values numeric[],
    p_counts_so_far bigint[],
    p_fraction numeric
)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rank numeric := p_fraction * (p_counts_so_far[cardinality(p_counts_so_far)] - 1);
    v_below numeric := p_values[width_bucket(floor(v_rank)::bigint, p_counts_so_far) + 1];
    v_above numeric := p_values[width_bucket(ceil(v_rank)::bigint, p_counts_so_far) + 1];
BEGIN
    RETURN trim_scale(v_below + (v_above - v_below) * (v_rank - floor(v_rank)));
END
$$;
COMMENT ON FUNCTION analytics._counted_percentile(numeric[], bigint[], numeric) IS
    'analytics._percentile of ascending values that occur more than once: beside each value how '
    'many numbers there are up to and with it.';

CREATE FUNCTION analytics._request_counts(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean,
    p_by_service boolean
)
RETURNS TABLE (
    account_key bigint,
    period_number integer,
    endpoint text,
    latency numeric,
    service text,
    version text,
    requests bigint,
    errors bigint,
    error_events bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_error_key integer := coalesce((
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = 'error'
    ), -1);
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('request', 'api_request')
            OR (p_by_service AND t.event_type = 'error')
    );
BEGIN
    -- The arguments are constants of this plan: of each CASE over them one branch remains.
    RETURN QUERY
    WITH requests AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS account_key,
            width_bucket(e.occurred_at, p_starts) AS number,
            CASE WHEN NOT p_by_service THEN
                nullif(left(e.properties ->> 'endpoint', 200), '')
            END COLLATE "C" AS endpoint,
            CASE WHEN NOT p_by_service THEN
                CASE jsonb_typeof(e.properties -> 'latency_ms')
                    WHEN 'number' THEN (e.properties -> 'latency_ms')::numeric
                    WHEN 'string' THEN analytics._text_number(e.properties ->> 'latency_ms')
                END
            END AS latency,
            CASE WHEN p_by_service THEN
                nullif(left(e.properties ->> 'service', 200), '')
            END COLLATE "C" AS service,
            CASE WHEN p_by_service THEN
                nullif(left(e.properties ->> 'version', 200), '')
            END COLLATE "C" AS version,
            e.event_type_key <> v_error_key AS is_request,
            CASE jsonb_typeof(e.properties -> 'status')
                WHEN 'number' THEN (e.properties -> 'status')::numeric >= 500
                WHEN 'string' THEN analytics._text_number(e.properties ->> 'status') >= 500
            END IS TRUE OR e.properties -> 'error' = 'true' AS is_error
        FROM analytics.events AS e
        WHERE e.event_type_key = ANY (v_keys)
            AND e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
        -- Rows without the properties are what is sorted.
        OFFSET 0
    )
    SELECT r.account_key, r.number, r.endpoint,
        CASE WHEN r.latency >= 0 AND r.latency < 1e15 THEN round(r.latency, 6) END AS measured,
        r.service, r.version,
        count(*) FILTER (WHERE r.is_request),
        count(*) FILTER (WHERE r.is_request AND r.is_error),
        count(*) FILTER (WHERE NOT r.is_request)
    FROM requests AS r
    GROUP BY r.account_key, r.number, r.endpoint, measured, r.service, r.version;
END
$$;
COMMENT ON FUNCTION analytics._request_counts(
    timestamptz[], timestamptz, timestamptz, text, boolean, boolean
) IS
    'How many requests, and how many of them errors, of all accounts (account_key 0) or of each, '
    'by period, endpoint and latency (NULL where it is no number from 0 to below 10^15), or by '
    'period, service and version; then also how many events of type error.';

CREATE FUNCTION analytics._latencies(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_key bigint,
    period date,
    endpoint text,
    requests bigint,
    p50 numeric,
    p95 numeric,
    p99 numeric,
    errors bigint,
    error_rate double precision,
    measured bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_dates date[] := spectrum.period_dates(p_starts);
BEGIN
    RETURN QUERY
    WITH counts AS (
        SELECT c.account_key, c.period_number, c.endpoint, c.latency, c.requests, c.errors,
            (sum(c.requests) FILTER (WHERE c.latency IS NOT NULL) OVER ascending)::bigint AS so_far
        FROM analytics._request_counts(
            p_starts, p_from, p_to, p_account, p_by_account, false
        ) AS c
        WINDOW ascending AS (
            PARTITION BY c.account_key, c.period_number, c.endpoint ORDER BY c.latency
        )
    ),
    endpoints AS (
        SELECT c.account_key, c.period_number, c.endpoint, sum(c.requests)::bigint AS requests,
            sum(c.errors)::bigint AS errors, coalesce(max(c.so_far), 0) AS measured,
            array_agg(c.latency ORDER BY c.latency)
                FILTER (WHERE c.latency IS NOT NULL) AS latencies,
            array_agg(c.so_far ORDER BY c.latency)
                FILTER (WHERE c.latency IS NOT NULL) AS so_far
        FROM counts AS c
        GROUP BY c.account_key, c.period_number, c.endpoint
    )
    SELECT e.account_key, v_dates[e.period_number], e.endpoint, e.requests,
        analytics._counted_percentile(e.latencies, e.so_far, 0.5),
        analytics._counted_percentile(e.latencies, e.so_far, 0.95),
        analytics._counted_percentile(e.latencies, e.so_far, 0.99),
        e.errors, e.errors / e.requests::double precision, e.measured
    FROM endpoints AS e;
END
$$;
COMMENT ON FUNCTION analytics._latencies(
    timestamptz[], timestamptz, timestamptz, text, boolean
) IS
    'The rows of analytics.latency, of all accounts together (account_key 0) or of each.';

CREATE FUNCTION analytics.latency(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_period text DEFAULT 'day',
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    endpoint text,
    requests bigint,
    p50 numeric,
    p95 numeric,
    p99 numeric,
    errors bigint,
    error_rate double precision,
    measured bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT l.period, l.endpoint, l.requests, l.p50, l.p95, l.p99, l.errors, l.error_rate, l.measured
    FROM analytics._latencies(
        spectrum.period_starts(p_period, v_from, v_to), v_from, v_to, p_account, false
    ) AS l
    ORDER BY l.period, l.endpoint;
END
$$;
COMMENT ON FUNCTION analytics.latency(timestamptz, timestamptz, text, text) IS
    'Requests by day, week or month and endpoint inside [p_from, p_to) (NULL: as far as events '
    'go): how many, exact percentiles of latency_ms in milliseconds over the measured ones (those '
    'with a number from 0 to below 10^15 there), errors, and errors / requests. A period without '
    'requests of an endpoint is no row.';

CREATE FUNCTION analytics.error_rates(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_period text DEFAULT 'day',
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    service text,
    version text,
    requests bigint,
    errors bigint,
    error_rate double precision,
    error_events bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts(p_period, v_from, v_to);

    RETURN QUERY
    SELECT spectrum.period_date(v_starts[c.period_number]), c.service, c.version, c.requests,
        c.errors, c.errors / nullif(c.requests, 0)::double precision, c.error_events
    FROM analytics._request_counts(v_starts, v_from, v_to, p_account, false, true) AS c
    ORDER BY c.period_number, c.service, c.version;
END
$$;
COMMENT ON FUNCTION analytics.error_rates(timestamptz, timestamptz, text, text) IS
    'Requests by day, week or month, service and version inside [p_from, p_to) (NULL: as far as '
    'events go): how many, how many of them errors, errors / requests (NULL without requests), and '
    'beside them the events of type error, which are no requests.';

CREATE FUNCTION analytics.throughput(
    p_period text DEFAULT 'minute',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_event text DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (period timestamptz, events bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    -- Longer than any day: a day is one piece.
    v_step interval := (
        CASE p_period WHEN 'day' THEN '72 hours' ELSE '1 ' || p_period END
    )::interval;
    v_days timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{minute, hour, day}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_days := spectrum.period_starts('day', v_from, v_to);

    RETURN QUERY
    WITH counts AS (
        SELECT
            date_bin(v_step, e.occurred_at, v_days[width_bucket(e.occurred_at, v_days)]) AS start,
            count(*) AS events
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_from
            AND e.occurred_at < v_to
            AND (p_event IS NULL OR e.event_type = p_event)
            AND (p_account IS NULL OR e.account_id = p_account)
        GROUP BY 1
    ),
    pieces AS (
        SELECT p.start
        FROM generate_series(1, cardinality(v_days) - 1) AS d (number)
        CROSS JOIN LATERAL generate_series(
            v_days[d.number], v_days[d.number + 1] - interval '1 us', v_step
        ) AS p (start)
        WHERE p.start + v_step > v_from AND p.start < v_to
    )
    SELECT p.start, coalesce(c.events, 0)
    FROM pieces AS p
    LEFT JOIN counts AS c USING (start)
    ORDER BY p.start;
END
$$;
COMMENT ON FUNCTION analytics.throughput(text, timestamptz, timestamptz, text, text) IS
    'Events (p_event NULL: of any type) by minute, hour or day inside [p_from, p_to) (NULL: as far '
    'as events go), by the instant at which each begins; one without events is a row too. Minutes '
    'and hours are counted off from the start of the calendar day, so an hour that the clock shows '
    'twice is two, and those of a day add up to the day.';
