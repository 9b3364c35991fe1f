-- Glass: from cells to events and back.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET intervalstyle = 'postgres';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
SELECT spectrum.define_funnel('glass', '["look", "take"]', '2 days');
SELECT spectrum.define_retention('glass', 'look', 'take', 'day', 2);
INSERT INTO raw_events (payload)
SELECT jsonb_build_object('event_id', e.id, 'event_type', e.kind, 'account_id', 'glazier',
    'user_id', e.who, 'occurred_at', e.at, 'properties', e.properties)
FROM (VALUES
    ('glass 1', 'look', 'ann', '2004-03-01T10:00:00Z', '{}'::jsonb),
    ('glass 2', 'take', 'ann', '2004-03-02T10:00:00Z', '{"revenue": 12.5}'),
    ('glass 3', 'look', 'bob', '2004-03-01T11:00:00Z', '{}'),
    ('glass 2', 'take', 'bob', '2004-03-02T10:00:00Z', '{}')) AS e (id, kind, who, at, properties);
CALL spectrum.process_batch();
\o /dev/null
CALL spectrum.refresh_analytics();
\o

SELECT unit, amount, user_id, event_id = md5('glass 2')::uuid AS is_2, occurred_at, event_type,
    raw_id IS NOT NULL AS has_raw
FROM analytics.trace('conversion_funnels', '{"funnel": "glass", "step": 2}');
SELECT unit, rule FROM analytics.trace('funnel_days',
    '{"account_id": "glazier", "funnel": "glass", "day": "2004-03-01", "step": 1}');
SELECT unit, event_type, rule FROM analytics.trace('retention_cohorts',
    '{"retention": "glass", "cohort": "2004-03-01", "period": 1, "account_id": "glazier"}');
SELECT unit, event_type, rule FROM analytics.trace('retention_cohorts', '{"retention": "glass",
    "cohort": "2004-03-01", "period": 0, "measure": "cohort_size", "account_id": "glazier"}');
SELECT amount, rule FROM analytics.trace('revenue_summary',
    '{"account_id": "glazier", "day": "2004-03-02", "currency": "USD"}');
SELECT count(*), count(DISTINCT unit) FROM analytics.trace('active_users',
    '{"account_id": "glazier", "day": "2004-03-02", "measure": "mau"}', NULL);

SELECT what, view_name, rule FROM spectrum.explain_event(md5('glass 2')::uuid)
WHERE cell IS NULL OR cell @> '{"account_id": "glazier"}' AND view_name NOT IN (
    'active_users', 'lifecycle_periods', 'stickiness_periods', 'sessions_daily');
SELECT cell FROM spectrum.explain_event(md5('glass 2')::uuid)
WHERE view_name IN ('funnel_days', 'conversion_funnels');
ROLLBACK;

SELECT * FROM analytics.trace('sesions', '{}');
SELECT * FROM analytics.trace('active_users', '{"month": "2004-03"}');
SELECT * FROM analytics.trace('active_users', '{"day": "2004-02-30"}');
SELECT * FROM spectrum.explain_event('00000000-0000-0000-0000-00000000dead');
