-- Feature adoption: named by feature_used or defined, by the week of the user's first event.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
-- Mondays are the 5th, 12th and 19th of May 2003.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', what, 'occurred_at', '2003-05-' || day || 'T12:00Z', 'user_id', who,
    'account_id', 'features', 'properties', properties
)
FROM (VALUES
    ('05', 'ann', 'visit', '{}'::jsonb),
    ('06', 'ann', 'feature_used', '{"feature": "export"}'),
    ('13', 'ann', 'feature_used', '{"feature": "export"}'),
    ('13', 'ann', 'feature_used', '{"feature": "export"}'),
    ('07', 'bob', 'visit', '{"plan": "pro"}'),
    ('14', 'bob', 'feature_used', '{"feature": "export"}'),
    ('12', 'eve', 'feature_used', '{"feature": ""}'),
    ('19', 'eve', 'export_done', '{"plan": "pro"}'),
    ('19', NULL, 'feature_used', '{"feature": "export"}')
) AS uses (day, who, what, properties);
CALL spectrum.process_batch() \gset

SELECT * FROM analytics.feature_adoption(p_account => 'features', p_to => '2003-05-26');
SELECT * FROM analytics.feature_adoption('export', 'month', p_account => 'features');
SELECT * FROM analytics.feature_adoption(
    'no such', 'day', '2003-05-13', '2003-05-14 12:00', 'features'
);

-- A definition takes the place of the value of the same name.
SELECT spectrum.define_feature('export', 'export_done');
SELECT spectrum.define_feature('professional', p_where => '{"plan": "pro"}');
SELECT feature, event_type, properties_filter FROM analytics.features ORDER BY feature;
SELECT feature, cohort_week, period, users FROM analytics.feature_adoption(
    p_account => 'features', p_to => '2003-05-26'
) WHERE users > 0;
SELECT spectrum.define_feature('export', 'visit', '{}');
SELECT spectrum.drop_feature('professional');
SELECT feature, cohort_week, period, users FROM analytics.feature_adoption(
    p_account => 'features', p_to => '2003-05-26'
) WHERE users > 0;

-- The standing view, before and after an event that puts ann into an earlier cohort.
SELECT spectrum.drop_feature('export');
CALL spectrum.refresh_analytics() \gset
SELECT feature, cohort_week, period, active_users, users, first_users, repeat_users, rate
FROM analytics.feature_adoption WHERE account_id = 'features'
ORDER BY feature, cohort_week, period;
INSERT INTO raw_events (payload) VALUES ('{"event_type": "visit", "user_id": "ann",
    "account_id": "features", "occurred_at": "2003-04-30T12:00:00Z"}');
CALL spectrum.process_batch() \gset
CALL spectrum.refresh_analytics() \gset
SELECT feature, cohort_week, period, active_users, users, first_users, repeat_users, rate
FROM analytics.feature_adoption WHERE account_id = 'features'
ORDER BY feature, cohort_week, period;
ROLLBACK;

SELECT * FROM analytics.feature_adoption(p_period => 'hour');
SELECT * FROM analytics.feature_adoption(p_from => '2003-03-02', p_to => '2003-03-01');
SELECT spectrum.define_feature('', 'visit');
SELECT spectrum.define_feature('f');
SELECT spectrum.define_feature('f', p_where => '"pro"');
SELECT spectrum.drop_feature('never defined');
