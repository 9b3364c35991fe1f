-- Lifecycle: new, returning, resurrecting, dormant, by day, week and month.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
SELECT spectrum.configure('timezone', 'Europe/Berlin');

-- ann comes twice in the night the clocks go forward, the day after, and again after a pause; bob
-- once, in two accounts; somebody unknown is nobody.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', what, 'occurred_at', at, 'user_id', who, 'account_id', 'lifecycle ' || account
)
FROM (VALUES
    ('2003-03-29T23:30:00Z', 'visit', 'ann', 'first'),
    ('2003-03-30T21:59:59Z', 'visit', 'ann', 'first'),
    ('2003-03-30T22:00:00Z', 'visit', NULL, 'first'),
    ('2003-03-31T12:00:00Z', 'order', 'ann', 'first'),
    ('2003-03-31T12:00:00Z', 'visit', 'bob', 'first'),
    ('2003-04-01T12:00:00Z', 'visit', 'bob', 'second'),
    ('2003-04-03T12:00:00Z', 'visit', 'ann', 'first')
) AS visits (at, what, who, account);
CALL spectrum.process_batch() \gset

SELECT * FROM analytics.lifecycle(p_from => '2003-03-29 00:00+01', p_to => '2003-04-06 00:00+02');
SELECT * FROM analytics.lifecycle(p_to => '2003-04-06 00:00+02', p_account => 'lifecycle second');

-- Periods count whole, and the past is looked at.
SELECT * FROM analytics.lifecycle('week', '2003-03-31 12:00+02', '2003-04-07 00:01+02');
SELECT * FROM analytics.lifecycle('month', '2003-04-30 12:00+02', '2003-05-31 12:00+02');

-- One kind of activity; one that never was.
SELECT * FROM analytics.lifecycle(
    p_to => '2003-04-02 12:00+02', p_event => 'order', p_account => 'lifecycle first'
);
SELECT * FROM analytics.lifecycle('week', '2003-04-01', '2003-04-02', 'lifecycle none');
SELECT * FROM analytics.lifecycle(p_event => 'lifecycle none');

-- The standing view says the same, and follows an event that comes late.
CALL spectrum.refresh_analytics() \gset
SELECT period_kind, period, new, "returning", resurrecting, dormant
FROM analytics.lifecycle_periods
WHERE account_id = 'lifecycle first' AND period < '2003-04-07'
ORDER BY period_kind, period;
INSERT INTO raw_events (payload) VALUES ('{"event_type": "visit", "user_id": "ann",
    "account_id": "lifecycle first", "occurred_at": "2003-04-02T12:00:00Z"}');
CALL spectrum.process_batch() \gset
CALL spectrum.refresh_analytics() \gset
SELECT period, new, "returning", resurrecting, dormant
FROM analytics.lifecycle_periods
WHERE account_id = 'lifecycle first' AND period_kind = 'day' AND period < '2003-04-07'
ORDER BY period;
ROLLBACK;

SELECT * FROM analytics.lifecycle('year');
SELECT * FROM analytics.lifecycle(p_from => '2003-03-02', p_to => '2003-03-01');
SELECT * FROM analytics.lifecycle(p_to => 'infinity');
