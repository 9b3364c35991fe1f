-- Room 40: a raw row becomes one fact, a copy of one, or failed with a reason.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS spectrum;
RESET client_min_messages;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET intervalstyle = 'postgres';

INSERT INTO raw_events (payload) VALUES
    ('{"event_id": "f1", "event_type": "fact a", "user_id": "fact u", "occurred_at": "2023-01-31T23:59:59.999Z"}'),
    ('{"event_id": "f2", "event_type": "fact a", "user_id": "fact u", "occurred_at": "2023-02-01T00:00:00Z"}'),
    ('{"event_id": "f1", "event_type": "fact b", "user_id": "fact v", "occurred_at": "2023-05-01T00:00:00Z"}'),
    ('{"event_id": "f3", "event_type": "fact a", "occurred_at": "yesterday"}'),
    ('{"event_id": "f4", "event_type": "fact pay", "user_id": "fact u", "occurred_at": "2023-02-02T00:00:00Z",
        "properties": {"revenue": 19.90, "plan": "pro"}}');
CALL spectrum.process_batch();

SELECT payload ->> 'event_id' AS event_id, status, copy_of IS NOT NULL AS is_copy, attempts, error_msg
FROM raw_events WHERE payload ->> 'event_type' LIKE 'fact %' ORDER BY seq;
SELECT event_type, occurred_at, user_id, revenue, currency, properties FROM analytics.events
WHERE event_type LIKE 'fact %' ORDER BY occurred_at;

-- Months are UTC; those that events need are made when they come.
SELECT tableoid::regclass AS month, occurred_at FROM warehouse.fact_events
WHERE user_key = (SELECT user_key FROM warehouse.dim_users WHERE user_id = 'fact u')
ORDER BY occurred_at;
SELECT spectrum.ensure_partitions('2023-01-15', '2023-04-02') AS made;
SELECT spectrum.ensure_partitions('2023-01-15', '2023-04-02') AS made;

-- A copy is known across batches and months.
INSERT INTO raw_events (payload) VALUES
    ('{"event_id": "f2", "event_type": "fact a", "user_id": "fact u", "occurred_at": "2023-04-01T00:00:00Z"}');
CALL spectrum.process_batch();

-- Set back to pending: read again, counted once.
UPDATE raw_events SET status = 'pending' WHERE payload ->> 'event_type' LIKE 'fact %';
CALL spectrum.process_batch();
SELECT count(*) FROM analytics.events WHERE event_type LIKE 'fact %';

-- A corrected rule takes effect when rows are read again, and only then.
SELECT spectrum.configure('revenue_property', 'price');
CALL spectrum.reprocess(p_status => 'all', p_event_type => 'fact pay');
CALL spectrum.process_batch();
SELECT revenue FROM analytics.events WHERE event_type = 'fact pay';
SELECT spectrum.configure('revenue_property', 'revenue');
CALL spectrum.reprocess(p_status => 'all', p_event_type => 'fact pay');
CALL spectrum.process_batch();
SELECT revenue FROM analytics.events WHERE event_type = 'fact pay';

-- Where the row that counted cannot be read any more, its copy steps in.
SELECT spectrum.configure('earliest_event', '2023-02-01 00:00:00+00');
CALL spectrum.reprocess(p_status => 'all', p_event_type => 'fact a');
CALL spectrum.process_batch();
CALL spectrum.process_batch();
SELECT event_type, user_id, occurred_at FROM analytics.events
WHERE event_type LIKE 'fact %' ORDER BY occurred_at;

-- And gives way again to the first one received.
SELECT spectrum.configure('earliest_event', '2000-01-01 00:00:00+00');
CALL spectrum.reprocess(p_event_type => 'fact a');
CALL spectrum.process_batch();
SELECT event_type, user_id, occurred_at FROM analytics.events
WHERE event_type LIKE 'fact %' ORDER BY occurred_at;

-- One event that a constraint of the user's own refuses fails alone, and is tried again later.
ALTER TABLE warehouse.fact_events ADD CONSTRAINT no_coupons
CHECK (NOT properties @> '{"coupon": "X"}') NOT VALID;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object('event_type', 'fact many', 'occurred_at', '2023-02-03',
    'properties', jsonb_build_object('coupon', CASE number WHEN 7 THEN 'X' ELSE 'Y' END))
FROM generate_series(1, 20) AS number;
CALL spectrum.process_batch();
SELECT status, next_attempt_at > now() AS will_be_tried, error_msg, count(*) FROM raw_events
WHERE payload ->> 'event_type' = 'fact many' GROUP BY 1, 2, 3 ORDER BY 1;
ALTER TABLE warehouse.fact_events DROP CONSTRAINT no_coupons;
CALL spectrum.reprocess();
CALL spectrum.process_batch();
SELECT count(*) FROM analytics.events WHERE event_type = 'fact many';

CALL spectrum.refresh_analytics() \gset
SELECT * FROM spectrum.verify() WHERE NOT ok;

\set VERBOSITY default
CALL spectrum.process_batch(0);
CALL spectrum.reprocess(p_status => 'pending');
SELECT spectrum.ensure_partitions('infinity', now());
SELECT spectrum.ensure_partitions('2024-01-01', '2023-01-01');
\set VERBOSITY terse

TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.requeue;
SELECT spectrum.rebuild_reports();
