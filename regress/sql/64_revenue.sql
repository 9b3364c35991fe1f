-- Revenue: orders and refunds by day and currency, exact in numeric.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', kind, 'occurred_at', at, 'user_id', who, 'account_id', account,
    'properties', properties
)
FROM (VALUES
    ('purchase', '2003-06-01T08:00:00Z', 'ann', 'shop', '{"revenue": 0.1}'::jsonb),
    ('purchase', '2003-06-01T09:00:00Z', 'ann', 'shop', '{"revenue": "0.2"}'),
    ('purchase', '2003-06-01T10:00:00Z', 'bob', 'shop', '{"revenue": 0}'),
    ('purchase', '2003-06-01T11:00:00Z', NULL, 'shop', '{"revenue": 10}'),
    ('purchase', '2003-06-01T12:00:00Z', 'bob', 'shop', '{"revenue": 5, "currency": "eur"}'),
    ('refund', '2003-06-01T13:00:00Z', 'ann', 'shop', '{"revenue": 0.1}'),
    ('purchase', '2003-06-01T14:00:00Z', 'cid', 'shop', '{"revenue": -0.1}'),
    ('visit', '2003-06-01T15:00:00Z', 'dan', 'shop', '{}'),
    ('visit', '2003-06-02T15:00:00Z', 'dan', 'shop', '{}'),
    ('chargeback', '2003-06-03T15:00:00Z', 'eve', 'other', '{"revenue": 7}')
) AS events (kind, at, who, account, properties);
CALL spectrum.process_batch() \gset

\set range '\'2003-06-01\', \'2003-07-01\''
SELECT day, currency, orders, gross, refunds, net, paying_users, active_users,
    round(arpu, 6) AS arpu, round(arppu, 6) AS arppu
FROM analytics.revenue(:range);
SELECT day, currency, net FROM analytics.revenue(:range, 'other');
SELECT day, currency, net FROM analytics.revenue(:range, p_currency => 'eur');
SELECT day, currency, net FROM analytics.revenue(:range, 'nobody');

-- The standing view says the same, by account and for all.
CALL spectrum.refresh_analytics() \gset
SELECT account_id, day, currency, orders, gross, refunds, net, as_of IS NOT NULL AS has_as_of
FROM analytics.revenue_summary
WHERE day BETWEEN '2003-06-01' AND '2003-06-30'
ORDER BY account_id, day, currency;

-- What a refund is can change.
SELECT spectrum.configure('refund_events', '{refund,chargeback}');
SELECT day, currency, orders, refunds FROM analytics.revenue(:range, 'other');
ROLLBACK;

SELECT * FROM analytics.revenue(p_currency => 'dollars');
SELECT * FROM analytics.revenue('2003-06-02', '2003-06-01');
