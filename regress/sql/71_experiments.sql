-- Experiments: definitions, units, and results by the statistics of room 70.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET intervalstyle = 'postgres';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
SELECT spectrum.define_metric('bought', 'proportion', 'purchase', p_window => '7 days');
SELECT spectrum.define_metric('spent', 'mean', 'purchase', 'amount');
SELECT spectrum.define_metric('per visit', 'ratio', 'purchase', 'amount',
    p_denominator_event => 'visit');
SELECT spectrum.define_metric('complained', 'proportion', 'complaint', p_guardrail => true);
SELECT spectrum.define_experiment(
    'button', '{"green": 0.5, "red": 0.25, "blue": 0.25}', 'green',
    '["bought", "spent", "per visit", "complained"]'
);
SELECT experiment, control, metrics, confidence, correction FROM analytics.experiments
WHERE experiment = 'button';
SELECT metric, kind, event_type, time_window, is_guardrail FROM analytics.metrics
WHERE metric IN ('bought', 'spent', 'per visit', 'complained') ORDER BY metric;

-- 200 users see green, 100 red, 80 blue (to PostHog's way of saying); 3 saw two, one saw pink.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', 'experiment_exposure', 'occurred_at', '2003-07-01T00:00:00Z',
    'user_id', variant || n, 'account_id', 'lab',
    'properties', jsonb_build_object('experiment', 'button', 'variant', variant)
)
FROM (VALUES ('green', 203), ('red', 100), ('pink', 1)) AS seen (variant, users),
    generate_series(1, users) AS n;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', '$feature_flag_called', 'occurred_at', '2003-07-01T01:00:00Z',
    'user_id', CASE WHEN n <= 80 THEN 'blue' || n ELSE 'green' || n + 120 END,
    'account_id', 'lab',
    'properties', jsonb_build_object('$feature_flag', 'button', '$feature_flag_response', 'blue')
)
FROM generate_series(1, 83) AS n;
-- Everybody visits; every fourth of green, every third of red and every second of blue buys, once
-- in time and once too late to have bought within 7 days; a purchase before counts for nobody.
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', event_type, 'occurred_at', timestamptz '2003-07-01 02:00+00' + after,
    'user_id', variant || n, 'account_id', 'lab',
    'properties', jsonb_build_object('amount', 5 + n % 7)
)
FROM (VALUES ('green', 200, 4), ('red', 100, 3), ('blue', 80, 2)) AS arms (variant, users, every),
    (VALUES
        ('visit', interval '1 hour', 1), ('visit', '2 days', 3), ('purchase', '3 days', 0),
        ('purchase', '8 days', 10), ('purchase', '-1 day', 1), ('complaint', '1 day', 20)
    ) AS deeds (event_type, after, one_in),
    generate_series(1, users) AS n
WHERE n % coalesce(nullif(one_in, 0), every) = 0;
CALL spectrum.process_batch() \gset

SELECT metric, variant, is_control, units, excluded_units, conversions, round(value::numeric, 6)
    AS value, round(ci_low::numeric, 6) AS ci_low, round(ci_high::numeric, 6) AS ci_high,
    round(srm_p_value::numeric, 6) AS srm_p_value, is_reliable
FROM analytics.experiment('button');
SELECT metric, variant, round(difference::numeric, 6) AS difference,
    round(difference_low::numeric, 6) AS low, round(difference_high::numeric, 6) AS high,
    round(lift::numeric, 6) AS lift, round(lift_low::numeric, 6) AS lift_low,
    round(lift_high::numeric, 6) AS lift_high, round(p_value::numeric, 9) AS p_value,
    round(p_adjusted::numeric, 9) AS p_adjusted
FROM analytics.experiment('button') WHERE NOT is_control;
SELECT metric, variant, round(p_adjusted::numeric, 9) AS p_adjusted
FROM analytics.experiment('button', p_correction => 'benjamini_hochberg')
WHERE p_adjusted IS NOT NULL;

-- The optional methods, asked for one by one and all at once; then defined and switched off.
SELECT metric, variant, round(chance_to_win::numeric, 6) AS chance_to_win,
    round(credible_low::numeric, 6) AS low, round(credible_high::numeric, 6) AS high,
    round(expected_loss::numeric, 9) AS expected_loss
FROM analytics.experiment('button') WHERE NOT is_control;
SELECT metric, variant, round(value::numeric, 6) AS value, winsor_low, winsor_high,
    round(p_value::numeric, 9) AS p_value
FROM analytics.experiment('button', p_winsorize => 0.95) WHERE winsor_high IS NOT NULL;
SELECT metric, variant, round(value::numeric, 6) AS value, round(theta::numeric, 6) AS theta,
    round(variance_reduction::numeric, 6) AS reduction, round(p_value::numeric, 9) AS p_value
FROM analytics.experiment('button', p_cuped => '7 days');
SELECT metric, variant, round(ci_low::numeric, 6) AS ci_low, round(ci_high::numeric, 6) AS ci_high,
    round(difference_low::numeric, 6) AS low, round(difference_high::numeric, 6) AS high,
    round(p_value::numeric, 9) AS p_value, is_sequential
FROM analytics.experiment('button', p_sequential => 400);
CREATE TEMP TABLE plain ON COMMIT DROP AS SELECT * FROM analytics.experiment('button');
CREATE TEMP TABLE asked ON COMMIT DROP AS SELECT *
FROM analytics.experiment('button', p_winsorize => 0.95, p_cuped => '7 days', p_sequential => 400);
SELECT spectrum.define_experiment(
    'button', '{"green": 0.5, "red": 0.25, "blue": 0.25}', 'green',
    '["bought", "spent", "per visit", "complained"]',
    p_winsorize => 0.95, p_cuped => '7 days', p_sequential => 400
);
SELECT winsorize, cuped, sequential FROM analytics.experiments WHERE experiment = 'button';
SELECT count(*) AS differing FROM (
    (TABLE asked EXCEPT ALL SELECT * FROM analytics.experiment('button'))
    UNION ALL
    (TABLE plain EXCEPT ALL SELECT *
        FROM analytics.experiment('button', p_winsorize => 1, p_cuped => '0', p_sequential => 0))
) AS differing_rows;

-- An hour later only PostHog's users are seen for the first time.
SELECT DISTINCT variant, units, excluded_units
FROM analytics.experiment('button', p_from => '2003-07-01 00:30+00') ORDER BY variant;

-- The standing view has the same rows, for all accounts and for this one.
CALL spectrum.refresh_analytics() \gset
SELECT v.account_id, count(*), bool_and(to_jsonb(v) - 'as_of' - 'account_id'
    = to_jsonb(f) - 'account_id') AS is_same
FROM analytics.experiment_results AS v
JOIN analytics.experiment('button') AS f USING (metric, variant)
WHERE v.experiment = 'button'
GROUP BY v.account_id ORDER BY v.account_id;
ROLLBACK;

SELECT * FROM analytics.experiment('unknown');
SELECT spectrum.define_metric('m', 'median', 'purchase');
SELECT spectrum.define_metric('m', 'ratio', 'purchase');
SELECT spectrum.define_experiment('x', '{"a": 0.5, "b": 0}', 'a', '["m"]');
SELECT spectrum.define_experiment('x', '{"a": 0.5, "b": 0.5}', 'c', '["m"]');
SELECT spectrum.define_experiment('x', '{"a": 0.5, "b": 0.5}', 'a', '["m"]');
SELECT spectrum.drop_metric('m');
SELECT spectrum.drop_experiment('x');
