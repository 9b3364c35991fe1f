-- Room 60, standing operations: counts of requests, sums of the news. Beside them stands how often
-- each latency occurs in a cell, which is one endpoint's day: of the cells in the news, and no
-- others, the percentiles are found again.
--
-- Minutes are kept for a week only: they would be as many as the events. Days are for ever, in
-- analytics.daily_events, and analytics.throughput counts the minutes of any time.

CREATE FUNCTION spectrum._create_operations()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_operations') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_latencies (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        endpoint text COLLATE "C" NOT NULL,
        latency numeric NOT NULL,
        requests bigint NOT NULL,
        CONSTRAINT rollup_latencies_pkey
        PRIMARY KEY (report_id, account_id, day, endpoint, latency)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_latencies IS
        'How often each latency occurs by account (* is all), day and endpoint.';
    COMMENT ON COLUMN spectrum.rollup_latencies.report_id IS 'spectrum.reports, kind operations.';
    COMMENT ON COLUMN spectrum.rollup_latencies.latency IS 'latency_ms, to six decimals.';

    CREATE TABLE analytics.mv_operations (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        endpoint text COLLATE "C" NOT NULL,
        requests bigint NOT NULL,
        errors bigint NOT NULL,
        measured bigint NOT NULL,
        p50 numeric,
        p95 numeric,
        p99 numeric,
        CONSTRAINT mv_operations_pkey PRIMARY KEY (report_id, account_id, day, endpoint)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_operations IS
        'Requests per account, day and endpoint, and for all accounts together (account_id *), '
        'kept by refreshes. Read it through analytics.operations.';
    COMMENT ON COLUMN analytics.mv_operations.report_id IS 'spectrum.reports, kind operations.';
    COMMENT ON COLUMN analytics.mv_operations.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_operations.endpoint IS 'Empty where requests name none.';
    COMMENT ON COLUMN analytics.mv_operations.measured IS 'Requests that have a latency.';

    CREATE TABLE analytics.mv_error_rates (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        service text COLLATE "C" NOT NULL,
        version text COLLATE "C" NOT NULL,
        requests bigint NOT NULL,
        errors bigint NOT NULL,
        error_events bigint NOT NULL,
        CONSTRAINT mv_error_rates_pkey PRIMARY KEY (report_id, account_id, day, service, version)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_error_rates IS
        'Requests and errors per account, day, service and version, and for all accounts together '
        '(account_id *), kept by refreshes. Read it through analytics.error_rates_daily.';
    COMMENT ON COLUMN analytics.mv_error_rates.report_id IS 'spectrum.reports, kind operations.';
    COMMENT ON COLUMN analytics.mv_error_rates.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_error_rates.service IS 'Empty where none is named.';
    COMMENT ON COLUMN analytics.mv_error_rates.error_events IS
        'Events of type error, which are no requests.';

    CREATE TABLE analytics.mv_throughput (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        minute timestamptz NOT NULL,
        events bigint NOT NULL,
        CONSTRAINT mv_throughput_pkey PRIMARY KEY (report_id, account_id, minute)
    ) WITH (fillfactor = 80);
    CREATE INDEX mv_throughput_minute_idx ON analytics.mv_throughput (report_id, minute);
    COMMENT ON TABLE analytics.mv_throughput IS
        'Events per account and minute of the last eight days, and for all accounts together '
        '(account_id *), kept by refreshes. Read it through analytics.throughput_minutes.';
    COMMENT ON COLUMN analytics.mv_throughput.report_id IS 'spectrum.reports, kind operations.';

    PERFORM spectrum._create_operations_views();
    PERFORM spectrum._add_kind('operations', 86, '_maintain_operations',
        '{spectrum.rollup_latencies, analytics.mv_operations, analytics.mv_error_rates, '
        'analytics.mv_throughput}',
        '{operations, error_rates_daily, throughput_minutes}');
    PERFORM spectrum._begin_report('operations');
END
$$;
COMMENT ON FUNCTION spectrum._create_operations() IS
    'Room 60: makes rollup_latencies, mv_operations, mv_error_rates, mv_throughput and their '
    'plain views.';

CREATE FUNCTION spectrum._create_operations_views()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.operations WITH (security_barrier) AS
    SELECT
        sums.account_id, sums.day, nullif(sums.endpoint, '') AS endpoint, sums.requests,
        sums.p50, sums.p95, sums.p99, sums.errors,
        sums.errors / sums.requests::double precision AS error_rate,
        sums.measured,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_operations AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'operations' AND report.state = 'served'
    ) AND ((SELECT caller.sees_all FROM warehouse.caller)
        OR sums.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.operations IS
        'Requests by account (* is all), day and endpoint: how many, exact percentiles of '
        'latency_ms, errors. As analytics.latency tells.';
    COMMENT ON COLUMN analytics.operations.endpoint IS 'Its first 200 characters; NULL: none.';
    COMMENT ON COLUMN analytics.operations.error_rate IS 'errors / requests.';
    COMMENT ON COLUMN analytics.operations.measured IS 'Requests that the percentiles are of.';

    CREATE VIEW analytics.error_rates_daily WITH (security_barrier) AS
    SELECT
        sums.account_id, sums.day, nullif(sums.service, '') AS service,
        nullif(sums.version, '') AS version, sums.requests, sums.errors,
        sums.errors / nullif(sums.requests, 0)::double precision AS error_rate,
        sums.error_events,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_error_rates AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'operations' AND report.state = 'served'
    ) AND ((SELECT caller.sees_all FROM warehouse.caller)
        OR sums.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.error_rates_daily IS
        'Requests and errors by account (* is all), day, service and version, and the events of '
        'type error beside them. As analytics.error_rates tells.';
    COMMENT ON COLUMN analytics.error_rates_daily.error_rate IS
        'errors / requests; NULL without requests.';

    CREATE VIEW analytics.throughput_minutes WITH (security_barrier) AS
    SELECT
        sums.account_id, sums.minute, sums.events,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_throughput AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'operations' AND report.state = 'served'
    ) AND sums.minute >= now() - interval '7 days'
    AND ((SELECT caller.sees_all FROM warehouse.caller)
        OR sums.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.throughput_minutes IS
        'Events by account (* is all) and minute of the last seven days; a minute without events '
        'is no row. For other times ask analytics.throughput.';
END
$$;
COMMENT ON FUNCTION spectrum._create_operations_views() IS
    'Room 60: makes analytics.operations, error_rates_daily and throughput_minutes.';

CREATE FUNCTION analytics._lay_out_requests(p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('request', 'api_request', 'error')
    );
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_requests',
        'sign integer, scope bigint, day date, is_request boolean, is_error boolean, '
        'endpoint text COLLATE "C", latency numeric, service text COLLATE "C", '
        'version text COLLATE "C"');
    -- Read as in analytics._request_counts.
    INSERT INTO pg_temp.spectrum_requests (
        sign, scope, day, is_request, is_error, endpoint, latency, service, version
    )
    SELECT news.sign, news.scope, c.days[width_bucket(news.occurred_at, c.starts)],
        t.event_type <> 'error',
        CASE jsonb_typeof(news.properties -> 'status')
            WHEN 'number' THEN (news.properties -> 'status')::numeric >= 500
            WHEN 'string' THEN analytics._text_number(news.properties ->> 'status') >= 500
        END IS TRUE OR news.properties -> 'error' = 'true',
        coalesce(left(news.properties ->> 'endpoint', 200), ''),
        CASE WHEN read.latency >= 0 AND read.latency < 1e15 THEN round(read.latency, 6) END,
        coalesce(left(news.properties ->> 'service', 200), ''),
        coalesce(left(news.properties ->> 'version', 200), '')
    FROM pg_temp.spectrum_news AS news
    JOIN analytics.event_types AS t USING (event_type_key)
    CROSS JOIN analytics._news_days() AS c
    CROSS JOIN LATERAL (
        SELECT CASE jsonb_typeof(news.properties -> 'latency_ms')
            WHEN 'number' THEN (news.properties -> 'latency_ms')::numeric
            WHEN 'string' THEN analytics._text_number(news.properties ->> 'latency_ms')
        END AS latency
        OFFSET 0
    ) AS read
    WHERE news.sign <> 0 AND news.event_type_key = ANY (v_keys) AND news.user_key <= p_built_to;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_requests(bigint) IS
    'Lays out in pg_temp.spectrum_requests the requests and errors among the news, as read.';

CREATE FUNCTION analytics._move_latencies(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    MERGE INTO spectrum.rollup_latencies AS known
    USING (
        SELECT scopes.account_id, cell.day, cell.endpoint, cell.latency,
            sum(cell.requests) AS requests
        FROM (
            SELECT scope, day, endpoint, latency, sum(sign) AS requests
            FROM pg_temp.spectrum_requests
            WHERE is_request AND latency IS NOT NULL
            GROUP BY scope, day, endpoint, latency
        ) AS cell
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cell.day, cell.endpoint, cell.latency
        HAVING sum(cell.requests) <> 0
        ORDER BY scopes.account_id, cell.day, cell.endpoint, cell.latency
    ) AS moved
    ON known.report_id = p_report AND known.account_id = moved.account_id
        AND known.day = moved.day AND known.endpoint = moved.endpoint
        AND known.latency = moved.latency
    WHEN MATCHED THEN UPDATE SET requests = known.requests + moved.requests
    WHEN NOT MATCHED THEN INSERT (report_id, account_id, day, endpoint, latency, requests)
    VALUES (p_report, moved.account_id, moved.day, moved.endpoint, moved.latency, moved.requests);

    DELETE FROM spectrum.rollup_latencies AS known
    USING (
        SELECT DISTINCT scopes.account_id, moved.day, moved.endpoint, moved.latency
        FROM pg_temp.spectrum_requests AS moved
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE moved.sign < 0 AND moved.is_request AND moved.latency IS NOT NULL
    ) AS went
    WHERE known.report_id = p_report AND known.account_id = went.account_id
        AND known.day = went.day AND known.endpoint = went.endpoint
        AND known.latency = went.latency AND known.requests = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_latencies(integer) IS
    'Moves rollup_latencies by the requests laid out.';

CREATE FUNCTION analytics._move_endpoints(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO analytics.mv_operations AS sums (
        report_id, account_id, day, endpoint, requests, errors, measured, p50, p95, p99
    )
    SELECT p_report, moved.account_id, moved.day, moved.endpoint, moved.requests, moved.errors,
        moved.measured,
        analytics._counted_percentile(now.latencies, now.so_far, 0.5),
        analytics._counted_percentile(now.latencies, now.so_far, 0.95),
        analytics._counted_percentile(now.latencies, now.so_far, 0.99)
    FROM (
        SELECT scopes.account_id, cell.day, cell.endpoint, sum(cell.requests) AS requests,
            sum(cell.errors) AS errors, sum(cell.measured) AS measured
        FROM (
            SELECT scope, day, endpoint, sum(sign) AS requests,
                coalesce(sum(sign) FILTER (WHERE is_error), 0) AS errors,
                coalesce(sum(sign) FILTER (WHERE latency IS NOT NULL), 0) AS measured
            FROM pg_temp.spectrum_requests
            WHERE is_request
            GROUP BY scope, day, endpoint
        ) AS cell
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cell.day, cell.endpoint
    ) AS moved
    CROSS JOIN LATERAL (
        SELECT array_agg(value.latency ORDER BY value.latency) AS latencies,
            array_agg(value.so_far ORDER BY value.latency) AS so_far
        FROM (
            SELECT known.latency, (sum(known.requests) OVER (ORDER BY known.latency))::bigint
                AS so_far
            FROM spectrum.rollup_latencies AS known
            WHERE known.report_id = p_report AND known.account_id = moved.account_id
                AND known.day = moved.day AND known.endpoint = moved.endpoint
        ) AS value
        OFFSET 0
    ) AS now
    ON CONFLICT (report_id, account_id, day, endpoint) DO UPDATE SET
        requests = sums.requests + excluded.requests,
        errors = sums.errors + excluded.errors,
        measured = sums.measured + excluded.measured,
        p50 = excluded.p50,
        p95 = excluded.p95,
        p99 = excluded.p99;

    DELETE FROM analytics.mv_operations AS sums
    USING (
        SELECT DISTINCT scopes.account_id, moved.day
        FROM pg_temp.spectrum_requests AS moved
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE moved.sign < 0
    ) AS went
    WHERE sums.report_id = p_report AND sums.account_id = went.account_id
        AND sums.day = went.day AND sums.requests = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_endpoints(integer) IS
    'Moves mv_operations by the requests laid out, and finds the percentiles of their cells again.';

CREATE FUNCTION analytics._move_error_rates(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO analytics.mv_error_rates AS sums (
        report_id, account_id, day, service, version, requests, errors, error_events
    )
    SELECT p_report, scopes.account_id, moved.day, moved.service, moved.version,
        sum(moved.requests), sum(moved.errors), sum(moved.error_events)
    FROM (
        SELECT scope, day, service, version,
            coalesce(sum(sign) FILTER (WHERE is_request), 0) AS requests,
            coalesce(sum(sign) FILTER (WHERE is_request AND is_error), 0) AS errors,
            coalesce(sum(sign) FILTER (WHERE NOT is_request), 0) AS error_events
        FROM pg_temp.spectrum_requests
        GROUP BY scope, day, service, version
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.day, moved.service, moved.version
    HAVING (sum(moved.requests), sum(moved.errors), sum(moved.error_events)) <> (0, 0, 0)
    ON CONFLICT (report_id, account_id, day, service, version) DO UPDATE SET
        requests = sums.requests + excluded.requests,
        errors = sums.errors + excluded.errors,
        error_events = sums.error_events + excluded.error_events;

    DELETE FROM analytics.mv_error_rates AS sums
    USING (
        SELECT DISTINCT scopes.account_id, moved.day
        FROM pg_temp.spectrum_requests AS moved
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE moved.sign < 0
    ) AS went
    WHERE sums.report_id = p_report AND sums.account_id = went.account_id
        AND sums.day = went.day AND sums.requests = 0 AND sums.error_events = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_error_rates(integer) IS
    'Moves mv_error_rates by the requests and errors laid out.';

CREATE FUNCTION analytics._move_throughput(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    -- A day more than the view shows: a reader's clock may have stopped before this one.
    v_from timestamptz := date_bin('1 minute', now() - interval '8 days', '2000-01-01 00:00+00');
BEGIN
    INSERT INTO analytics.mv_throughput AS sums (report_id, account_id, minute, events)
    SELECT p_report, scopes.account_id, moved.minute, sum(moved.events)
    FROM (
        SELECT news.scope, date_bin('1 minute', news.occurred_at, v_from) AS minute,
            sum(news.sign) AS events
        FROM pg_temp.spectrum_news AS news
        WHERE news.occurred_at >= v_from AND news.user_key <= p_built_to
        GROUP BY 1, 2
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.minute
    HAVING sum(moved.events) <> 0
    ON CONFLICT (report_id, account_id, minute) DO UPDATE SET
        events = sums.events + excluded.events;

    DELETE FROM analytics.mv_throughput AS sums
    WHERE sums.report_id = p_report AND sums.minute < v_from;
    IF EXISTS (SELECT FROM pg_temp.spectrum_news WHERE sign < 0 AND occurred_at >= v_from) THEN
        DELETE FROM analytics.mv_throughput AS sums
        USING (
            SELECT DISTINCT date_bin('1 minute', news.occurred_at, v_from) AS minute
            FROM pg_temp.spectrum_news AS news
            WHERE news.sign < 0 AND news.occurred_at >= v_from
        ) AS went
        WHERE sums.report_id = p_report AND sums.minute = went.minute AND sums.events = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._move_throughput(integer, bigint) IS
    'Moves mv_throughput by the news of the last eight days, and lets go of what is older.';

CREATE FUNCTION analytics._maintain_operations(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._lay_out_requests(p_built_to);
    IF EXISTS (SELECT FROM pg_temp.spectrum_requests) THEN
        PERFORM analytics._move_latencies(p_report);
        PERFORM analytics._move_endpoints(p_report);
        PERFORM analytics._move_error_rates(p_report);
    END IF;
    PERFORM analytics._move_throughput(p_report, p_built_to);
END
$$;
COMMENT ON FUNCTION analytics._maintain_operations(integer, bigint) IS
    'Moves the tables of operations by the news.';

CREATE FUNCTION analytics._standing_operations()
RETURNS TABLE (
    account_id text,
    day date,
    endpoint text,
    requests bigint,
    p50 numeric,
    p95 numeric,
    p99 numeric,
    errors bigint,
    error_rate double precision,
    measured bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT coalesce(accounts.account_id, '*'), l.period, l.endpoint, l.requests, l.p50, l.p95,
        l.p99, l.errors, l.error_rate, l.measured
    FROM analytics._settle_range(NULL, NULL, NULL) AS r
    CROSS JOIN (VALUES (false), (true)) AS scope (by_account)
    CROSS JOIN LATERAL analytics._latencies(
        spectrum.period_starts('day', r.from_at, r.to_at), r.from_at, r.to_at, NULL,
        scope.by_account
    ) AS l
    LEFT JOIN analytics.accounts ON accounts.account_key = l.account_key;
END
$$;
COMMENT ON FUNCTION analytics._standing_operations() IS
    'What analytics.operations has to show, out of all events: for verify().';

CREATE FUNCTION analytics._standing_error_rates_daily()
RETURNS TABLE (
    account_id text,
    day date,
    service text,
    version text,
    requests bigint,
    errors bigint,
    error_rate double precision,
    error_events bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT coalesce(accounts.account_id, '*'), spectrum.period_date(s.starts[c.period_number]),
        c.service, c.version, c.requests, c.errors,
        c.errors / nullif(c.requests, 0)::double precision, c.error_events
    FROM analytics._settle_range(NULL, NULL, NULL) AS r
    CROSS JOIN LATERAL spectrum.period_starts('day', r.from_at, r.to_at) AS s (starts)
    CROSS JOIN (VALUES (false), (true)) AS scope (by_account)
    CROSS JOIN LATERAL analytics._request_counts(
        s.starts, r.from_at, r.to_at, NULL, scope.by_account, true
    ) AS c
    LEFT JOIN analytics.accounts ON accounts.account_key = c.account_key;
END
$$;
COMMENT ON FUNCTION analytics._standing_error_rates_daily() IS
    'What analytics.error_rates_daily has to show, out of all events: for verify().';

CREATE FUNCTION analytics._standing_throughput_minutes()
RETURNS TABLE (account_id text, minute timestamptz, events bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz := date_bin(
        '1 minute', now() - interval '7 days' + interval '1 minute' - interval '1 us',
        '2000-01-01 00:00+00'
    );
BEGIN
    RETURN QUERY
    SELECT scope.account_id, date_bin('1 minute', e.occurred_at, v_from) AS minute, count(*)
    FROM analytics.events AS e
    CROSS JOIN LATERAL (VALUES ('*'), (e.account_id)) AS scope (account_id)
    WHERE e.occurred_at >= v_from AND scope.account_id IS NOT NULL
    GROUP BY scope.account_id, 2;
END
$$;
COMMENT ON FUNCTION analytics._standing_throughput_minutes() IS
    'What analytics.throughput_minutes has to show, out of all events: for verify().';
