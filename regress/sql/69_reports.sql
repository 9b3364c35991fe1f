-- Reports of the user's own: a function says what users contribute, refreshes keep the sums.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
-- Users by the number of their visits.
CREATE FUNCTION public.visitors(p_users bigint[])
RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
LANGUAGE sql STABLE
AS $$
    SELECT e.account_id, e.user_key, ARRAY[count(*)::text], sum((e.properties ->> 'worth')::numeric)
    FROM analytics.events AS e
    WHERE e.user_key = ANY (p_users) AND e.account_id = 'reports'
    GROUP BY e.account_id, e.user_key
$$;
SELECT spectrum.define_report('visitors', 'public.visitors');
SELECT report, contributions, error_msg FROM spectrum.report_definitions;

INSERT INTO raw_events (payload)
SELECT jsonb_build_object('event_type', 'visit', 'user_id', who, 'account_id', account,
    'occurred_at', at, 'properties', jsonb_build_object('worth', worth))
FROM (VALUES
    ('ann', 'reports', '2003-06-02', 1.5),
    ('ann', 'reports', '2003-06-03', 2.5),
    ('bob', 'reports', '2003-06-02', 1),
    ('bob', 'reports other', '2003-06-02', 1)
) AS visits (who, account, at, worth);
CALL spectrum.process_batch() \gset
CALL spectrum.refresh_analytics() \gset
SELECT account_id, report, cell, users, amount FROM analytics.reports ORDER BY cell;
INSERT INTO raw_events (payload) VALUES ('{"event_type": "visit", "user_id": "bob",
    "account_id": "reports", "occurred_at": "2003-06-01", "properties": {"worth": 3}}');
CALL spectrum.process_batch() \gset
CALL spectrum.refresh_analytics() \gset
SELECT account_id, report, cell, users, amount FROM analytics.reports ORDER BY cell;
SELECT check_name, ok FROM spectrum.verify() WHERE check_name LIKE 'reports%';

-- A function that fails costs its report, and nothing else.
INSERT INTO raw_events (payload) VALUES ('{"event_type": "visit", "user_id": "eve",
    "account_id": "reports", "occurred_at": "2003-06-01", "properties": {"worth": "much"}}');
CALL spectrum.process_batch() \gset
SET LOCAL client_min_messages = error;
CALL spectrum.refresh_analytics() \gset
SELECT account_id, report, cell, users, amount FROM analytics.reports ORDER BY cell;
SELECT report, contributions, error_msg FROM spectrum.report_definitions;
SELECT spectrum.drop_report('visitors');
ROLLBACK;

SELECT spectrum.define_report('r', NULL);
SELECT spectrum.define_report('r', 'pg_catalog.pg_sleep');
SELECT spectrum.drop_report('never defined');
