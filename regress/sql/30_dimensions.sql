-- Room 30: every natural key once, an unknown member at key 0, and no way to lose one.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS spectrum;
RESET client_min_messages;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET intervalstyle = 'postgres';

SELECT account_key, account_id FROM warehouse.dim_accounts WHERE account_key = 0;
SELECT user_key, user_id, account_key FROM warehouse.dim_users WHERE user_key = 0;
SELECT event_type_key, event_type FROM warehouse.dim_event_types WHERE event_type_key = 0;
SELECT geo_key, country, region, city FROM warehouse.dim_geography WHERE geo_key = 0;

INSERT INTO raw_events (payload) VALUES
    ('{"event_type": "dim visit", "user_id": "dim ann", "account_id": "dim acme",
        "occurred_at": "2024-03-05T10:00:00Z", "geo": {"country": "DE"}}'),
    ('{"event_type": "dim visit", "user_id": "dim ann", "account_id": "dim zoo",
        "occurred_at": "2024-03-01T10:00:00Z", "geo": {"country": "DE", "city": "Bonn"}}'),
    ('{"event_type": "dim visit", "occurred_at": "2024-03-09T10:00:00Z"}');
CALL spectrum.process_batch();

-- One person across accounts; the account is that under which she was met first.
SELECT user_id, account_id FROM warehouse.dim_users JOIN warehouse.dim_accounts USING (account_key)
WHERE user_id LIKE 'dim %';
SELECT country, region, city FROM warehouse.dim_geography WHERE country = 'DE' ORDER BY city;

-- First and last seen follow with the refresh.
CALL spectrum.refresh_analytics();
SELECT user_id, first_seen, last_seen FROM warehouse.dim_users WHERE user_id LIKE 'dim %';
SELECT event_type, first_seen, last_seen FROM warehouse.dim_event_types
WHERE event_type LIKE 'dim %';
SELECT count(*) AS notes_left FROM spectrum.news;

-- Missing parts are the unknown member, shown as NULL.
SELECT account_id, user_id, country, user_key FROM analytics.events
WHERE event_type = 'dim visit' AND user_id IS NULL;

-- Members stay: facts point at them by key.
\set VERBOSITY default
DELETE FROM warehouse.dim_users WHERE user_id = 'dim ann';
UPDATE warehouse.dim_accounts SET account_key = 99 WHERE account_id = 'dim acme';
TRUNCATE warehouse.dim_event_types;
\set VERBOSITY terse

TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.requeue;
SELECT spectrum.rebuild_reports();
