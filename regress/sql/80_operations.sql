-- Room 80: the tick and what it leaves behind, status, health, the proof, the schedule.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS spectrum;
RESET client_min_messages;
TRUNCATE spectrum.run_log RESTART IDENTITY;

INSERT INTO raw_events (payload)
SELECT jsonb_build_object('event_type', 'tick', 'user_id', number % 3, 'occurred_at', '2024-01-01')
FROM generate_series(1, 25) AS number;
SELECT spectrum.configure('batch_size', '10');
CALL spectrum.run();
SELECT log_id, run_id, step, claimed, loaded, duplicates, failed,
    regexp_replace(detail, '\d+ rows of former', 'N rows of former') AS detail, error_msg
FROM spectrum.run_log ORDER BY log_id;
SELECT spectrum.configure('batch_size', '10000');

-- A second refresh finds nothing to do.
CALL spectrum.refresh_analytics();

SELECT pending, processing, to_retry, oldest_pending_seconds, last_run_error, months_ready
FROM spectrum.status();
SELECT check_name FROM spectrum.health() ORDER BY check_name;
SELECT check_name, ok FROM spectrum.verify();

-- setup() again changes nothing.
SELECT spectrum.setup();
SELECT count(*) FROM analytics.events WHERE event_type = 'tick';

-- The data is the user's: none of it is a member of the extension, and DROP EXTENSION refuses. The
-- key of the hashes is, so that no dump holds it.
SELECT string_agg(objid::regclass::text, ', ') AS relations_in_extension
FROM pg_depend
WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e' AND classid = 'pg_class'::regclass
    AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'spectrum');
\set VERBOSITY sqlstate
DROP EXTENSION spectrum;
-- Without pg_cron in this database there is no schedule, and the error says what helps.
SELECT spectrum.schedule();
SELECT spectrum.unschedule();
-- A run cannot commit inside a transaction block, and says so before it does anything.
BEGIN;
CALL spectrum.run();
ROLLBACK;
\set VERBOSITY terse

TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.requeue;
SELECT spectrum.rebuild_reports();
