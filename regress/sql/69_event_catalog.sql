-- The catalog: event types, their properties and JSON types.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_type', kind, 'occurred_at', at, 'account_id', account, 'properties', properties
)
FROM (VALUES
    ('catalog_sale', '2003-06-02', 'one', '{"price": 1, "gift": true}'::jsonb),
    ('catalog_sale', '2003-06-01', 'one', '{"price": "2", "gift": null}'),
    ('catalog_sale', '2003-06-04', 'two', '{"price": 3, "Items": [1], "to": {"city": "Rome"}}'),
    ('catalog_login', '2003-06-03', NULL, '{}')
) AS events (kind, at, account, properties);
CALL spectrum.process_batch() \gset

SELECT * FROM analytics.event_catalog() WHERE event_type ^@ 'catalog';
SELECT * FROM analytics.event_catalog('one') WHERE event_type ^@ 'catalog';
SELECT * FROM analytics.event_catalog('nobody');
-- The standing views say the same, by account and for all.
CALL spectrum.refresh_analytics() \gset
SELECT account_id, event_type, property, types, events, first_seen, last_seen
FROM analytics.event_catalog WHERE event_type ^@ 'catalog'
ORDER BY account_id, event_type, property NULLS FIRST;
ROLLBACK;
