-- Trends: one measure by period, with and without a breakdown.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', 'request', 'occurred_at', at, 'user_id', who, 'account_id', 'trend',
    'geo', jsonb_build_object('country', country),
    'properties', jsonb_build_object('ms', ms, 'plan', plan)
)
FROM (VALUES
    ('2003-05-01T08:00:00Z', 'ann', 'DE', '10'::jsonb, 'pro'),
    ('2003-05-01T09:00:00Z', 'ann', 'DE', '20', 'free'),
    ('2003-05-01T10:00:00Z', 'bob', 'US', '"40.5"', 'pro'),
    ('2003-05-01T11:00:00Z', NULL, 'US', '"slow"', 'pro'),
    ('2003-05-04T00:00:00Z', 'bob', 'US', '[1]', NULL),
    ('2003-05-05T00:00:00Z', 'bob', NULL, '1e400', 'pro')
) AS requests (at, who, country, ms, plan);
CALL spectrum.process_batch() \gset

-- Every day is there; a sum of nothing is 0, an average of nothing is NULL.
SELECT * FROM analytics.trend('request', 'day', '2003-05-01', '2003-05-06');
SELECT * FROM analytics.trend('request', 'day', '2003-05-01', '2003-05-06', 'users');
SELECT * FROM analytics.trend('request', 'day', '2003-05-01', '2003-05-06', 'sum', 'ms');
SELECT * FROM analytics.trend('request', 'day', '2003-05-01', '2003-05-06', 'avg', 'ms');
SELECT * FROM analytics.trend('request', 'month', '2003-05-01', '2003-06-01', 'p50', 'ms');
SELECT * FROM analytics.trend('request', 'month', '2003-05-01', '2003-06-01', 'p95', 'ms');
SELECT * FROM analytics.trend('request', 'month', '2003-05-01', '2003-06-01', 'p99', 'ms');
SELECT * FROM analytics.trend('no such event', 'week', '2003-05-01', '2003-05-06');

-- Breakdowns: an event without the property is a series of its own.
SELECT * FROM analytics.trend(
    'request', 'week', '2003-05-01', '2003-05-06', p_breakdown => 'plan'
);
SELECT * FROM analytics.trend(
    'request', 'week', '2003-05-01', '2003-05-06', 'users', p_breakdown => 'country'
);
SELECT * FROM analytics.trend(
    NULL, 'month', '2003-05-01', '2003-06-01', p_breakdown => 'event_type', p_account => 'trend'
);
SELECT * FROM analytics.trend(
    'request', 'month', '2003-05-01', '2003-06-01', p_account => 'trend',
    p_where => '{"plan": "pro"}'
);

-- Weeks may start on Sunday, and a range may cut a week.
SELECT spectrum.configure('week_start', '7');
SELECT * FROM analytics.trend('request', 'week', '2003-05-01 09:00+00', '2003-05-05 00:00+00');
ROLLBACK;

SELECT * FROM analytics.trend(p_period => 'fortnight');
SELECT * FROM analytics.trend(p_measure => 'median');
SELECT * FROM analytics.trend(p_measure => 'p95');
SELECT * FROM analytics.trend(p_where => '"pro"');
