-- Active users: distinct users of the day, of 7 days, of 30 days.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
SELECT spectrum.configure('timezone', 'Europe/Berlin');

-- ann comes on the night the clocks go forward, again after 3 and after 10 days; bob once, in two
-- accounts; somebody unknown is nobody.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', 'visit', 'occurred_at', at, 'user_id', who, 'account_id', account
)
FROM (VALUES
    ('2003-03-29T23:30:00Z', 'ann', 'first'),
    ('2003-03-30T21:59:59Z', 'ann', 'first'),
    ('2003-03-30T22:00:00Z', NULL, 'first'),
    ('2003-04-02T12:00:00Z', 'ann', 'first'),
    ('2003-04-02T12:00:00Z', 'bob', 'first'),
    ('2003-04-02T13:00:00Z', 'bob', 'second'),
    ('2003-04-12T12:00:00Z', 'ann', 'first')
) AS visits (at, who, account);
CALL spectrum.process_batch() \gset

SELECT * FROM analytics.active_users('2003-03-29 00:00+01', '2003-04-14 00:00+02');

-- 30 days after the last visit, and one account only.
SELECT * FROM analytics.active_users('2003-05-10 12:00+02', '2003-05-13 12:00+02');
SELECT * FROM analytics.active_users('2003-04-02 12:00+02', '2003-04-02 12:01+02', 'second');
SELECT * FROM analytics.active_users('2003-04-02 12:00+02', '2003-04-02 12:01+02', 'third');

-- The standing view starts with each account's first active day.
CALL spectrum.refresh_analytics() \gset
SELECT account_id, day, dau, wau, mau, as_of IS NOT NULL AS has_as_of
FROM analytics.active_users
WHERE account_id IN ('first', 'second') AND day < '2003-04-04'
ORDER BY account_id, day;
SELECT day, dau, wau, mau, stickiness FROM analytics.active_users
WHERE account_id = '*' AND day >= '2003-03-29' AND day < '2003-04-14'
EXCEPT
SELECT * FROM analytics.active_users('2003-03-29 00:00+01', '2003-04-14 00:00+02');
ROLLBACK;

SELECT * FROM analytics.active_users('2003-03-02', '2003-03-01');
SELECT * FROM analytics.active_users('-infinity');
