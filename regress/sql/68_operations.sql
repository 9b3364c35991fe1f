-- Operations: latency, error rates, throughput.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

-- Percentiles out of counts are percentiles of the numbers themselves.
WITH numbers AS (
    SELECT (n * n % 17)::numeric / 4 AS number FROM generate_series(1, 100) AS n
),
counted AS (
    SELECT array_agg(number ORDER BY number) AS numbers, array_agg(so_far ORDER BY number) AS counts
    FROM (
        SELECT number, sum(count(*)) OVER (ORDER BY number)::bigint AS so_far
        FROM numbers GROUP BY number
    ) AS values
)
SELECT fraction, percentile_cont(fraction) WITHIN GROUP (ORDER BY number) AS expected,
    (SELECT analytics._counted_percentile(c.numbers, c.counts, fraction::numeric) FROM counted AS c)
FROM numbers CROSS JOIN unnest('{0, 0.25, 0.5, 0.95, 0.99, 1}'::float8[]) AS fraction
GROUP BY fraction ORDER BY fraction;

BEGIN;
SELECT spectrum.configure('timezone', 'Europe/Berlin');
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', kind, 'occurred_at', at, 'account_id', account, 'properties', properties
)
FROM (VALUES
    ('request', '2003-10-25T22:00:00Z', 'one', '{"endpoint": "/a", "latency_ms": 10}'::jsonb),
    ('request', '2003-10-26T00:30:00Z', 'one', '{"endpoint": "/a", "latency_ms": "30"}'),
    ('request', '2003-10-26T01:30:00Z', 'one', '{"endpoint": "/a", "latency_ms": 20, "status": 500}'),
    ('api_request', '2003-10-26T22:59:59Z', 'two', '{"endpoint": "/a", "latency_ms": "slow"}'),
    ('request', '2003-10-26T23:00:00Z', 'two', '{"endpoint": "/a", "latency_ms": 7, "error": true}'),
    ('request', '2003-10-26T23:00:30Z', 'two', '{"service": "api", "version": 2, "status": "499"}'),
    ('error', '2003-10-26T23:00:59Z', 'two', '{"service": "api", "version": "2"}')
) AS events (kind, at, account, properties);
CALL spectrum.process_batch() \gset

\set range '\'2003-10-25 22:00\', \'2003-10-27 01:00\''
SELECT * FROM analytics.latency(:range);
SELECT * FROM analytics.latency(:range, 'month', 'two');
SELECT * FROM analytics.error_rates(:range, 'week');
SELECT * FROM analytics.throughput('day', :range);
-- Two o'clock comes twice.
SELECT period, period AT TIME ZONE 'Europe/Berlin' AS local, events
FROM analytics.throughput('hour', :range) WHERE events > 0 OR period < '2003-10-26 03:00';
SELECT * FROM analytics.throughput('minute', '2003-10-26 22:58:30', '2003-10-26 23:00:45');
SELECT * FROM analytics.throughput('minute', '2003-10-26 22:59', '2003-10-26 23:01', 'request', 'two');
-- The standing views say the same, by account and for all.
CALL spectrum.refresh_analytics() \gset
SELECT account_id, day, endpoint, requests, p50, p95, p99, errors, measured
FROM analytics.operations WHERE day BETWEEN '2003-10-25' AND '2003-10-28'
ORDER BY account_id, day, endpoint;
SELECT account_id, day, service, version, requests, errors, error_events
FROM analytics.error_rates_daily WHERE day BETWEEN '2003-10-25' AND '2003-10-28'
ORDER BY account_id, day, service, version;
SELECT count(*) FROM analytics.throughput_minutes WHERE minute < '2003-10-28';
ROLLBACK;

SELECT * FROM analytics.latency(p_period => 'hour');
SELECT * FROM analytics.error_rates('2003-06-02', '2003-06-01');
SELECT * FROM analytics.throughput('second');
