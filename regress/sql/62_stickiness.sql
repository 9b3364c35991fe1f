-- Stickiness: users by the number of periods in which they were active.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
-- ann on three days of two weeks, bob on two, eve on one, somebody unknown on all.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', 'visit', 'occurred_at', '2003-05-' || day || 'T' || hour || ':00Z',
    'user_id', who, 'account_id', 'stickiness'
)
FROM (VALUES
    ('05', '00', 'ann'),
    ('05', '23', 'ann'),
    ('06', '12', 'ann'),
    ('12', '12', 'ann'),
    ('05', '12', 'bob'),
    ('07', '12', 'bob'),
    ('07', '12', 'eve'),
    ('05', '12', NULL),
    ('06', '12', NULL),
    ('07', '12', NULL)
) AS visits (day, hour, who);
CALL spectrum.process_batch() \gset

SELECT * FROM analytics.stickiness(p_from => '2003-05-05', p_to => '2003-05-10');
SELECT * FROM analytics.stickiness('week', '2003-05-05', '2003-05-13', 'visit', 'stickiness');
SELECT * FROM analytics.stickiness('month', p_to => '2003-05-31', p_account => 'stickiness');
SELECT * FROM analytics.stickiness(p_from => '2003-05-08', p_to => '2003-05-10');
SELECT * FROM analytics.stickiness(p_event => 'stickiness none');

-- The standing view: on how many days of each week and month.
CALL spectrum.refresh_analytics() \gset
SELECT period_kind, period, days, users_exactly, users_at_least
FROM analytics.stickiness_periods
WHERE account_id = 'stickiness' AND days < 5
ORDER BY period_kind, period, days;
UPDATE raw_events SET status = 'pending', payload = payload - 'event_type'
WHERE payload ->> 'account_id' = 'stickiness' AND payload ->> 'user_id' = 'bob';
CALL spectrum.process_batch() \gset
CALL spectrum.refresh_analytics() \gset
SELECT period_kind, period, days, users_exactly, users_at_least
FROM analytics.stickiness_periods
WHERE account_id = 'stickiness' AND days < 4
ORDER BY period_kind, period, days;
ROLLBACK;

SELECT * FROM analytics.stickiness(NULL);
SELECT * FROM analytics.stickiness(p_from => '2003-03-02', p_to => '2003-03-01');
