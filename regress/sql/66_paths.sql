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
ROLLBACK;

SELECT * FROM analytics.paths(p_max_steps => 0);
SELECT * FROM analytics.paths(p_max_steps => 101);
SELECT * FROM analytics.paths('2003-05-02', '2003-05-01');
