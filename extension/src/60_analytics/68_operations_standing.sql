-- Room 60, standing operations: the requests of each endpoint and of each service by day.
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
        lows numeric[] NOT NULL DEFAULT '{}',
        belows bigint[] NOT NULL DEFAULT '{}',
        CONSTRAINT mv_operations_pkey PRIMARY KEY (report_id, account_id, day, endpoint)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_operations IS
        'Requests per account, day and endpoint, and for all accounts together (account_id *), '
        'kept by refreshes. Read it through analytics.operations.';
    COMMENT ON COLUMN analytics.mv_operations.report_id IS 'spectrum.reports, kind operations.';
    COMMENT ON COLUMN analytics.mv_operations.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_operations.endpoint IS 'Empty where requests name none.';
    COMMENT ON COLUMN analytics.mv_operations.measured IS 'Requests that have a latency.';
    COMMENT ON COLUMN analytics.mv_operations.lows IS
        'Of p50, p95 and p99: the latency at their rank, or the one just before.';
    COMMENT ON COLUMN analytics.mv_operations.belows IS 'How many requests have less than that.';

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
