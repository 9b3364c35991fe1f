-- Funnels: which entry counts, what stands between, who is counted, and the standing views.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
-- ann is the worked example; bob comes back once more and is excluded on the way; eve is quick.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_id', 'funnel ' || number, 'event_type', 'funnel ' || what, 'user_id', 'funnel ' || who,
    'account_id', 'funnel ' || account, 'occurred_at', '2003-05-' || at,
    'properties', properties, 'geo', '{"country": "NO"}'::jsonb
)
FROM (VALUES
    (1, '01T01:00Z', 'ann', 'x', 'A', '{"plan": "free"}'::jsonb),
    (2, '01T01:30Z', 'ann', 'x', 'A', '{"plan": "pro"}'),
    (3, '01T01:45Z', 'ann', 'x', 'B', '{"plan": "pro"}'),
    (4, '01T02:15Z', 'ann', 'x', 'C', '{"plan": "max"}'),
    (5, '02T01:00Z', 'bob', 'x', 'A', '{"plan": "free"}'),
    (6, '02T01:10Z', 'bob', 'x', 'X', '{}'),
    (7, '02T01:20Z', 'bob', 'y', 'B', '{}'),
    (8, '02T23:00Z', 'bob', 'y', 'A', '{}'),
    (9, '03T01:00Z', 'eve', 'y', 'A', '{"plan": "pro"}'),
    (10, '03T01:00Z', 'eve', 'y', 'B', '{"plan": "pro"}'),
    (11, '03T01:00:01Z', 'eve', 'y', 'B', '{"plan": "free"}')
) AS told (number, at, who, account, what, properties);
CALL spectrum.process_batch() \gset

\set abc '\'["funnel A", "funnel B", "funnel C"]\''
\set ab '\'["funnel A", "funnel B"]\''
SELECT * FROM analytics.funnel(:abc, p_window => '1 hour');
SELECT * FROM analytics.funnel(:abc, p_window => '1 hour', p_entry => 'first');
SELECT * FROM analytics.funnel(:abc, '2003-05-01', '2003-05-02', p_window => '1 hour');

-- Strictly one after the other, in any order, without those who did X in between.
SELECT step, units FROM analytics.funnel(:ab, p_order => 'strict');
SELECT step, event_type, units, median_seconds
FROM analytics.funnel('["funnel C", "funnel B", "funnel B", "funnel A"]', p_order => 'any');
SELECT step, units FROM analytics.funnel(:ab, p_exclude => '["funnel X"]');
SELECT step, units FROM analytics.funnel(:ab, p_exclude => '["funnel X"]', p_entry => 'first');

-- Filters on steps, two steps of one event type, one event type that nobody sent.
SELECT step, units FROM analytics.funnel(
    '[{"event": "funnel A", "where": {"plan": "pro"}}, "funnel B", {"event": "funnel none"}]'
);
SELECT step, units FROM analytics.funnel('["funnel A", "funnel A"]');

-- Accounts and sessions as units, one account, breakdowns at the first and at the last step.
SELECT step, units FROM analytics.funnel(:ab, p_unit => 'account');
SELECT step, units FROM analytics.funnel(:ab, p_unit => 'session');
SELECT step, units FROM analytics.funnel(:ab, p_account => 'funnel y');
SELECT breakdown, step, units FROM analytics.funnel(:ab, p_breakdown => 'plan');
SELECT breakdown, step, units
FROM analytics.funnel(:ab, p_breakdown => 'plan', p_attribution => 'last');
SELECT breakdown, step, units FROM analytics.funnel(:ab, p_breakdown => 'country');
SELECT breakdown, step, units FROM analytics.funnel(:ab, p_breakdown => 'account_id');

-- The standing funnels are the same, for all and for each account, and by the day of entry.
SELECT spectrum.define_funnel('funnel ab', :ab, '1 hour');
SELECT spectrum.define_funnel('funnel plans', :ab, p_breakdown => 'plan', p_exclude => '[]');
CALL spectrum.refresh_analytics() \gset
SELECT account_id, step, event_type, users, rate_from_start, median_seconds,
    as_of IS NOT NULL AS has_as_of
FROM analytics.conversion_funnels WHERE funnel = 'funnel ab' ORDER BY account_id, step;
SELECT account_id, breakdown, step, users
FROM analytics.conversion_funnels WHERE funnel = 'funnel plans' AND account_id = '*'
ORDER BY breakdown, step;
SELECT account_id, day, step, users
FROM analytics.funnel_days WHERE funnel = 'funnel ab' ORDER BY account_id, day, step;
SELECT spectrum.define_funnel('funnel ab', '["funnel C"]');
SELECT spectrum.drop_funnel('funnel plans');
CALL spectrum.refresh_analytics() \gset
SELECT account_id, funnel, step, users
FROM analytics.conversion_funnels WHERE funnel LIKE 'funnel %' ORDER BY account_id, step;
ROLLBACK;

-- What no funnel is.
SELECT * FROM analytics.funnel(NULL);
SELECT * FROM analytics.funnel('[]');
SELECT * FROM analytics.funnel('["A", {"event": "B", "filter": {}}]');
SELECT * FROM analytics.funnel('["A"]', p_from => '2003-05-02', p_to => '2003-05-01');
SELECT * FROM analytics.funnel('["A"]', p_window => '-1 hour');
SELECT * FROM analytics.funnel('["A"]', p_order => 'sorted');
SELECT * FROM analytics.funnel('["A"]', p_entry => NULL);
SELECT * FROM analytics.funnel('["A"]', p_unit => 'company');
SELECT * FROM analytics.funnel('["A"]', p_breakdown => '');
SELECT * FROM analytics.funnel('["A"]', p_attribution => 'middle');
SELECT * FROM analytics.funnel('["A"]', p_exclude => '[1]');
SELECT spectrum.define_funnel(NULL, '["A"]');
SELECT spectrum.define_funnel('f', '"A"');
SELECT spectrum.drop_funnel('never defined');
