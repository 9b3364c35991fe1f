-- Room 90: nothing for PUBLIC; each role what its work needs and no more.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS spectrum;
DROP ROLE IF EXISTS regress_spectrum_ingest, regress_spectrum_reader, regress_spectrum_analyst,
    regress_spectrum_tenant, regress_spectrum_operator;
RESET client_min_messages;
CREATE ROLE regress_spectrum_ingest;
CREATE ROLE regress_spectrum_reader;
CREATE ROLE regress_spectrum_analyst;
CREATE ROLE regress_spectrum_tenant;
CREATE ROLE regress_spectrum_operator;

SELECT count(*) AS open_to_public FROM pg_proc
WHERE pronamespace IN ('spectrum'::regnamespace, 'analytics'::regnamespace)
    AND has_function_privilege('regress_spectrum_ingest', oid, 'EXECUTE');

SELECT spectrum.grant_ingest('regress_spectrum_ingest');
SELECT spectrum.grant_reader('regress_spectrum_reader');
SELECT spectrum.grant_analyst('regress_spectrum_analyst');
SELECT spectrum.grant_tenant('regress_spectrum_tenant', 'acme');
SELECT spectrum.grant_operator('regress_spectrum_operator');
\set VERBOSITY sqlstate

-- Ingest inserts a payload. It reads nothing, sets nothing else, calls nothing.
SET ROLE regress_spectrum_ingest;
INSERT INTO raw_events (payload) VALUES ('{"event_type": "granted"}');
INSERT INTO raw_events (payload) VALUES ('{"event_type": "own", "account_id": "acme"}');
INSERT INTO raw_events (payload, status) VALUES ('{}', 'done');
INSERT INTO raw_events (payload) VALUES ('{}') RETURNING id;
SELECT count(*) FROM raw_events;
UPDATE raw_events SET status = 'done';
CALL spectrum.process_batch();
SELECT * FROM analytics.conversion_funnels;
RESET ROLE;
CALL spectrum.process_batch();

-- A reader reads the standing views, not the events, and asks no questions.
SET ROLE regress_spectrum_reader;
SELECT count(*) FROM analytics.pipeline_status;
SELECT count(*) >= 0 AS ok FROM analytics.active_users;
SELECT count(*) FROM analytics.events;
SELECT * FROM analytics.trend('granted');
SELECT count(*) FROM warehouse.fact_events;
SELECT count(*) FROM raw_events;

-- An analyst asks, and reads the events behind the answers, never the payloads.
SET ROLE regress_spectrum_analyst;
SELECT sum(value) FROM analytics.trend('granted');
SELECT count(*) FROM analytics.events WHERE event_type = 'granted';
SELECT round(spectrum.normal_cdf(1.96)::numeric, 3);
SELECT count(*) FROM raw_events;
SELECT spectrum.configure('batch_size', '1');
SELECT spectrum.grant_analyst('regress_spectrum_reader');

-- A tenant asks the same, of one account.
SET ROLE regress_spectrum_tenant;
SELECT event_type, account_id FROM analytics.events;
SELECT sum(value) FROM analytics.trend();
SELECT count(*) FROM analytics.all_accounts;

-- An operator looks after the pipeline, and reads no event.
SET ROLE regress_spectrum_operator;
SELECT done, failed FROM spectrum.status();
SELECT spectrum.define_retention('regress', 'own');
SELECT spectrum.drop_retention('regress');
SELECT spectrum.cancel_task(spectrum.request('reprocess'));
SELECT spectrum.define_report('regress', 'pg_catalog.now');
SELECT count(*) FROM analytics.events;
RESET ROLE;

-- And back.
\set VERBOSITY terse
SELECT spectrum.revoke_ingest('regress_spectrum_ingest');
SELECT spectrum.revoke_reader('regress_spectrum_reader');
SELECT spectrum.grant_tenant('regress_spectrum_analyst', 'acme');
SELECT spectrum.revoke_analyst('regress_spectrum_analyst');
SELECT spectrum.grant_analyst('regress_spectrum_tenant');
SELECT spectrum.revoke_tenant('regress_spectrum_tenant');
SELECT spectrum.revoke_operator('regress_spectrum_operator');
SELECT spectrum.grant_ingest(NULL);
REVOKE USAGE ON SCHEMA public FROM regress_spectrum_ingest, regress_spectrum_operator;
DROP ROLE regress_spectrum_ingest, regress_spectrum_reader, regress_spectrum_analyst,
    regress_spectrum_tenant, regress_spectrum_operator;

TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.requeue;
SELECT spectrum.rebuild_reports();
