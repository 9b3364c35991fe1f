-- Paths: what follows what inside a session.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_id', 'paths ' || number, 'event_type', what, 'user_id', 'paths ' || who,
    'account_id', 'paths ' || account, 'occurred_at', '2003-05-05T' || at
)
FROM (VALUES
    (1, '10:00Z', 'ann', 'x', 'open'), (2, '10:01Z', 'ann', 'x', 'search'),
    (3, '10:02Z', 'ann', 'x', 'search'), (4, '10:03Z', 'ann', 'y', 'buy'),
    (5, '10:34Z', 'ann', 'x', 'open'), (6, '10:35Z', 'ann', 'x', 'search'),
    (7, '12:00Z', 'bob', 'x', 'open'), (8, '12:30Z', 'bob', 'x', 'search')
) AS told (number, at, who, account, what);
-- Nobody's events are nobody's path.
INSERT INTO raw_events (payload) VALUES
    ('{"event_type": "open", "occurred_at": "2003-05-05T10:00Z"}'),
    ('{"event_type": "buy", "occurred_at": "2003-05-05T10:01Z"}');
CALL spectrum.process_batch() \gset

SELECT * FROM analytics.paths('2003-05-05', '2003-05-06');
SELECT * FROM analytics.paths('2003-05-05', '2003-05-06', p_max_steps => 1);
SELECT * FROM analytics.paths('2003-05-05', '2003-05-06', 'search');
SELECT * FROM analytics.paths('2003-05-05', '2003-05-06', p_account => 'paths x');
-- The whole of each session that begins in the range.
SELECT * FROM analytics.paths('2003-05-05 10:01+00', '2003-05-05 12:01+00');
SELECT * FROM analytics.paths('2003-05-05', '2003-05-06', 'paths none');

-- By day, once they are defined; a late event begins a session earlier, a wrong one leaves it.
SELECT spectrum.define_paths('first steps', p_max_steps => 2);
SELECT spectrum.define_paths('from a search', 'search');
CALL spectrum.refresh_analytics() \gset
SELECT account_id, day, step, source, target, transitions, users, as_of IS NOT NULL AS has_as_of
FROM analytics.path_flows WHERE paths = 'first steps'
ORDER BY account_id, day, step, transitions DESC, source, target;
INSERT INTO raw_events (payload) VALUES ('{"event_id": "paths 9", "event_type": "open",
    "user_id": "paths bob", "account_id": "paths x", "occurred_at": "2003-05-05T11:45Z"}');
UPDATE raw_events SET payload = payload - 'event_type', status = 'pending'
WHERE payload ->> 'event_id' = 'paths 3';
CALL spectrum.process_batch() \gset
CALL spectrum.refresh_analytics() \gset
SELECT paths, step, source, target, transitions, users
FROM analytics.path_flows WHERE account_id = '*'
ORDER BY paths, step, transitions DESC, source, target;
SELECT check_name, ok FROM spectrum.verify() WHERE check_name LIKE 'path_flows%';
SELECT spectrum.drop_paths('first steps');
SELECT DISTINCT paths FROM analytics.path_flows;
ROLLBACK;

SELECT spectrum.define_paths('');
SELECT spectrum.define_paths('p', '');
SELECT spectrum.define_paths('p', p_max_steps => 0);
SELECT spectrum.drop_paths('never defined');
SELECT * FROM analytics.paths(p_max_steps => 0);
SELECT * FROM analytics.paths(p_max_steps => 101);
SELECT * FROM analytics.paths('2003-05-02', '2003-05-01');
