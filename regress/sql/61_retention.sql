-- Retention: cohorts of both kinds, both modes, period 0, and the standing view.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
-- Mondays are the 5th, 12th, 19th and 26th of May 2003.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_id', 'retention ' || number, 'event_type', 'retention ' || what,
    'user_id', 'retention ' || who, 'account_id', 'retention ' || account,
    'occurred_at', '2003-05-' || at, 'properties', properties
)
FROM (VALUES
    (1, '05T12:00Z', 'ann', 'x', 'start', '{}'::jsonb),
    (2, '11T23:59:59.999999Z', 'ann', 'x', 'back', '{"plan": "pro"}'),
    (3, '12T00:00Z', 'ann', 'y', 'start', '{"plan": "pro"}'),
    (4, '30T12:00Z', 'ann', 'x', 'back', '{}'),
    (5, '06T12:00Z', 'bob', 'x', 'back', '{}'),
    (6, '07T12:00Z', 'bob', 'x', 'start', '{}'),
    (7, '19T12:00Z', 'eve', 'x', 'start', '{}'),
    (8, '19T12:00Z', 'eve', 'x', 'back', '{}')
) AS told (number, at, who, account, what, properties);
CALL spectrum.process_batch() \gset

SELECT * FROM analytics.retention('retention start', 'retention back', p_periods => 4);
SELECT * FROM analytics.retention(
    'retention start', 'retention back', p_periods => 4, p_mode => 'on_or_after'
);
SELECT * FROM analytics.retention(
    'retention start', p_periods => 1, p_cohort => 'recurring', p_from => '2003-05-05 13:00+00'
);
SELECT * FROM analytics.retention('retention start', 'retention start', 'day', 7, p_where => '{}')
WHERE users > 0;
SELECT * FROM analytics.retention('retention start', p_period => 'month', p_periods => 1);
SELECT * FROM analytics.retention('retention start', p_periods => 1, p_account => 'retention y');
SELECT * FROM analytics.retention(p_periods => 1, p_where => '{"plan": "pro"}');
SELECT * FROM analytics.retention('retention none');

-- A period that has not begun is no row; one that goes on is not complete.
INSERT INTO raw_events (payload)
VALUES ('{"event_type": "retention now", "user_id": "retention now"}');
CALL spectrum.process_batch() \gset
SELECT period, users, is_complete FROM analytics.retention('retention now', p_period => 'month');

-- The standing view; its default retention is there from the start.
SELECT retention, start_event, return_event, period_kind, periods, cohort_kind, mode
FROM spectrum.retentions WHERE retention = 'default';
SELECT spectrum.define_retention(
    'retention test', 'retention start', 'retention back', 'week', p_periods => 1
);
CALL spectrum.refresh_analytics() \gset
SELECT account_id, period_kind, cohort, period, cohort_size, users, rate, is_complete,
    as_of IS NOT NULL AS has_as_of
FROM analytics.retention_cohorts WHERE retention = 'retention test'
ORDER BY account_id, cohort, period;
SELECT count(*) > 0 AS has_default
FROM analytics.retention_cohorts WHERE retention = 'default' AND account_id = 'retention x';
SELECT spectrum.drop_retention('retention test');
CALL spectrum.refresh_analytics() \gset
SELECT count(*) FROM analytics.retention_cohorts WHERE retention = 'retention test';
ROLLBACK;

-- What no retention is.
SELECT * FROM analytics.retention(p_period => 'quarter');
SELECT * FROM analytics.retention(p_periods => -1);
SELECT * FROM analytics.retention(p_cohort => 'all');
SELECT * FROM analytics.retention(p_mode => NULL);
SELECT * FROM analytics.retention(p_where => '[]');
SELECT * FROM analytics.retention(p_from => '2003-05-02', p_to => '2003-05-01');
SELECT spectrum.define_retention('', 'A');
SELECT spectrum.define_retention('r', p_period => 'hour');
SELECT spectrum.drop_retention('never defined');
