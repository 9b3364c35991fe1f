-- Recurring revenue: movements by period, and the events that cannot be read.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

-- The reading, by itself.
SELECT number, r.*
FROM (VALUES
    (1, 'subscription_started', '{"mrr": 20}'::jsonb),
    (2, 'subscription_started', '{"amount": "2000", "interval": "Year", "currency": "eur"}'),
    (3, 'subscription_changed', '{"amount": 90, "interval": "quarter", "subscription_id": 7}'),
    (4, 'subscription_changed', '{"amount": 12, "interval": "weekly", "mrr": null}'),
    (5, 'subscription_cancelled', '{"mrr": "?"}'),
    (6, 'subscription_changed', '{"amount": 12}'),
    (7, 'subscription_changed', '{"mrr": -12}'),
    (8, 'subscription_changed', '{"mrr": 12, "currency": "euro"}'),
    (9, 'subscription_changed', '{"mrr": 12, "subscription_id": true}')
) AS events (number, event_type, properties)
CROSS JOIN LATERAL analytics._read_subscription(event_type, properties, 'USD') AS r
ORDER BY number;

-- The sixty minutes, by themselves.
SELECT analytics._movement_starts(ARRAY[
    '2003-01-01 10:00', '2003-01-01 10:59', '2003-01-01 11:00', '2003-01-01 11:59:59',
    '2003-01-01 12:00'
]::timestamptz[]);
SELECT analytics._movement_starts('{}');

BEGIN;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', 'subscription_' || kind, 'occurred_at', at, 'account_id', account,
    'properties', properties
)
FROM (VALUES
    ('started', '2003-01-10', 'ann', '{"amount": 2000, "interval": "year"}'::jsonb),
    ('changed', '2003-02-10', 'ann', '{"amount": 2720, "interval": "year"}'),
    ('changed', '2003-03-10', 'ann', '{"amount": 2000, "interval": "year"}'),
    ('cancelled', '2003-04-10', 'ann', '{}'),
    ('started', '2003-05-10', 'ann', '{"amount": 2000, "interval": "year"}'),
    ('started', '2003-02-01', 'bob', '{"mrr": 10, "currency": "EUR"}'),
    ('started', '2003-02-02', 'bob', '{"mrr": 30, "subscription_id": "two", "currency": "EUR"}'),
    ('changed', '2003-03-01 00:00', 'bob', '{"mrr": 99, "currency": "EUR"}'),
    ('changed', '2003-03-01 00:59', 'bob', '{"mrr": 5, "currency": "EUR"}'),
    ('changed', '2003-05-31 23:59', 'bob', '{"mrr": 5}'),
    ('changed', '2003-05-20', 'bob', '{"mrr": "five"}'),
    ('started', '2003-05-21', NULL, '{"mrr": 5}')
) AS events (kind, at, account, properties);
CALL spectrum.process_batch() \gset

\set range '\'2003-01-01\', \'2003-06-01\''
SELECT period, currency, round(start_mrr, 2) AS start_mrr, round(new, 2) AS new, expansion,
    contraction, round(churn, 2) AS churn, round(reactivation, 2) AS reactivation,
    round(end_mrr, 2) AS end_mrr,
    start_mrr + new + reactivation + expansion - contraction - churn = end_mrr AS adds_up
FROM analytics.mrr_movements('month', :range);
SELECT period, currency, start_accounts AS start, new_accounts AS new, churned_accounts AS churned,
    reactivated_accounts AS reactivated, end_accounts AS end, round(nrr, 4) AS nrr,
    round(grr, 4) AS grr, round(ltv, 2) AS ltv
FROM analytics.mrr_movements('month', :range);
SELECT period, start_mrr, new, expansion, contraction, end_mrr
FROM analytics.mrr_movements('week', '2003-02-01', '2003-03-04', 'bob');
SELECT * FROM analytics.mrr_movements('month', :range, 'nobody');
SELECT occurred_at, event_type, account_id, problem FROM analytics.mrr_problems(:range);
SELECT problem FROM analytics.mrr_problems(:range, 'bob');
-- The standing view says the same, by account and for all.
CALL spectrum.refresh_analytics() \gset
SELECT account_id, period_kind, period, currency, start_mrr, new, expansion, contraction, churn,
    reactivation, round(end_mrr, 2) AS end_mrr, end_accounts, round(nrr, 6) AS nrr, round(grr, 6) AS grr
FROM analytics.mrr_movements WHERE period_kind = 'month' AND period < '2004-01-01'
ORDER BY account_id, period, currency;
ROLLBACK;

SELECT * FROM analytics.mrr_movements('quarter');
SELECT * FROM analytics.mrr_movements('month', '2003-06-02', '2003-06-01');
SELECT * FROM analytics.mrr_problems('2003-06-02', '2003-06-01');
