-- Room 20: what arrives is kept as it came; what Spectrum reads in it can be seen before and after.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS spectrum;
RESET client_min_messages;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET intervalstyle = 'postgres';

-- Anything that is JSON gets in.
INSERT INTO raw_events (payload, received_at)
SELECT payload, '2024-06-01 12:00:00+00' FROM (VALUES
    (1, '{"event_type": "visit", "user_id": "u1", "account_id": "acme",
        "occurred_at": "2024-05-01T10:00:00Z", "geo": {"country": "DE", "city": "Bonn"},
        "properties": {"path": "/"}}'::jsonb),
    (2, '{"event_type": "visit", "user_id": 42, "timestamp": "2024-05-01 12:30:00+02:00"}'),
    (3, '{"event_type": "buy", "occurred_at": 1714557600, "properties": {"revenue": "9.90"}}'),
    (4, '{"event_type": "buy", "occurred_at": "1714557600123",
        "properties": {"revenue": 5, "currency": "eur"}}'),
    (5, '{"event_type": "visit"}'),
    (6, '"hello"'),
    (7, '{"user_id": "u1"}'),
    (8, '{"event_type": "visit", "user_id": ["u1"]}'),
    (9, '{"event_type": "visit", "account_id": "*"}'),
    (10, '{"event_type": "visit", "occurred_at": "2024-02-30"}'),
    (11, '{"event_type": "visit", "occurred_at": "infinity"}'),
    (12, '{"event_type": "visit", "occurred_at": "2024-06-01T13:00:00.001Z"}'),
    (13, '{"event_type": "visit", "occurred_at": "1999-12-31"}'),
    (14, '{"event_type": "visit", "geo": {"city": 7}}'),
    (15, '{"event_type": "visit", "properties": [1]}'),
    (16, '{"event_type": "buy", "properties": {"revenue": "ten\nfifty"}}'),
    (17, '{"event_type": "buy", "properties": {"revenue": 1e15}}'),
    (18, '{"event_type": "buy", "properties": {"revenue": 1, "currency": "euros"}}'),
    (19, '{"event_type": "visit", "event_id": {}}')
) AS sent (number, payload)
ORDER BY number;

-- What is read, or why it cannot be.
SELECT event_type, user_id, account_id, country, city, occurred_at, revenue, currency
FROM spectrum.readings WHERE error_msg IS NULL ORDER BY seq;
SELECT error_msg FROM spectrum.readings WHERE error_msg IS NOT NULL ORDER BY seq;

-- event_id: a UUID in any of its spellings, another text by md5, the row's own id where none is.
TRUNCATE raw_events;
INSERT INTO raw_events (id, payload)
SELECT md5(number::text)::uuid, jsonb_build_object('event_type', 'visit') || payload FROM (VALUES
    (1, '{"event_id": "6BA7B810-9DAD-11D1-80B4-00C04FD430C8"}'::jsonb),
    (2, '{"event_id": "6ba7b8109dad11d180b400c04fd430c8"}'),
    (3, '{"event_id": "order-17"}'),
    (4, '{"event_id": 17}'),
    (5, '{"event_id": "6ba7b810-9dad-11d1-80b4-00c04fd430cg"}'),
    (6, '{"event_id": ""}'),
    (7, '{"event_id": null}'),
    (8, '{}')
) AS sent (number, payload)
ORDER BY number;
SELECT payload -> 'event_id' AS sent, event_id, event_id = id AS is_the_rows
FROM spectrum.readings JOIN raw_events USING (id)
ORDER BY raw_events.seq;

-- A row set back to pending, or taken by an outside worker, is noted by its receive order.
UPDATE raw_events SET status = 'processing' WHERE payload @> '{"event_id": "order-17"}';
SELECT count(*), min(requeue.due_at) > now() AS after_its_lease FROM spectrum.requeue;
UPDATE raw_events SET status = 'pending' WHERE status = 'processing';
SELECT count(*), min(requeue.due_at) <= now() AS at_once FROM spectrum.requeue;

\set VERBOSITY terse
-- The status is one of four.
UPDATE raw_events SET status = 'gone';

TRUNCATE raw_events, spectrum.requeue;
