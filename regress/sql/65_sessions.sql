-- Sessions: where they are cut, what is said of one, sessions by day, attribution.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

-- The rule by itself: exactly 30 minutes and exactly 24 hours stay.
SELECT analytics._session_starts(ARRAY[
    '2003-05-05 10:00+00', '2003-05-05 10:30+00', '2003-05-05 11:00:00.000001+00'
]::timestamptz[]);
SELECT analytics._session_starts(array_agg(t ORDER BY t)) FROM generate_series(
    '2003-05-05 10:00+00'::timestamptz, '2003-05-06 11:00+00', interval '30 minutes'
) AS times (t);
SELECT analytics._session_starts('{}');

BEGIN;
INSERT INTO raw_events (payload)
SELECT jsonb_build_object(
    'event_id', 'sessions ' || number, 'event_type', what, 'user_id', 'sessions ' || who,
    'account_id', 'sessions ' || account, 'occurred_at', '2003-05-' || at,
    'geo', jsonb_build_object('country', country), 'properties', properties
)
FROM (VALUES
    (1, '05T23:50Z', 'ann', 'x', 'page_view', NULL,
        '{"path": "/", "utm_source": "letter", "utm_medium": "email"}'::jsonb),
    (2, '06T00:10Z', 'ann', 'x', 'page_view', 'DE', '{"url": "/offer", "utm_source": "late"}'),
    (3, '06T00:40Z', 'ann', 'y', 'buy', 'FR', '{"revenue": 10}'),
    (4, '06T12:00Z', 'ann', 'x', 'page_view', 'FR',
        '{"page": "home", "referrer": "https://www.google.com/search"}'),
    (5, '08T12:00Z', 'ann', 'x', 'buy', NULL, '{"revenue": "2.50", "currency": "EUR"}'),
    (6, '06T12:00Z', 'bob', 'x', 'buy', NULL, '{"plan": "pro"}'),
    (7, '06T12:00Z', 'bob', 'x', '$pageview', NULL, '{}')
) AS told (number, at, who, account, what, country, properties);
CALL spectrum.process_batch() \gset

\x on
SELECT * FROM analytics.sessions('2003-05-01', '2003-06-01');
\x off
SELECT started_at, ended_at, events
FROM analytics.sessions('2003-05-01', '2003-06-01', 'sessions x') WHERE user_id = 'sessions ann';
SELECT * FROM analytics.sessions_daily('2003-05-05', '2003-05-09');
SELECT day, breakdown, sessions, bounces
FROM analytics.sessions_daily('2003-05-05', '2003-05-09', p_breakdown => 'channel');
SELECT day, breakdown, sessions
FROM analytics.sessions_daily('2003-05-05', '2003-05-09', p_breakdown => 'country');
SELECT day, breakdown, sessions
FROM analytics.sessions_daily('2003-05-05', '2003-05-09', p_breakdown => 'exit_page');
SELECT * FROM analytics.sessions_daily('2003-05-05', '2003-05-06', 'sessions none');
-- The standing view: made by the first refresh, moved by the next ones.
CALL spectrum.refresh_analytics() \gset
SELECT account_id, day, value, sessions, users, bounces, bounce_rate, mean_seconds, events,
    page_views, as_of IS NOT NULL AS has_as_of
FROM analytics.sessions_daily
WHERE breakdown = 'all' AND day BETWEEN '2003-05-01' AND '2003-06-01'
ORDER BY account_id, day;
SELECT breakdown, value, sum(sessions) AS sessions, sum(users) AS user_days
FROM analytics.sessions_daily
WHERE account_id = '*' AND day BETWEEN '2003-05-01' AND '2003-06-01'
GROUP BY breakdown, value ORDER BY breakdown, value;
-- What each day's conversions are given to, once it is defined.
SELECT spectrum.define_attribution('buys', '"buy"');
SELECT spectrum.define_attribution('professionals', '{"event": "buy", "where": {"plan": "pro"}}',
    'first');
CALL spectrum.refresh_analytics() \gset
SELECT account_id, attribution, day, channel, source, medium, campaign, currency, conversions,
    users, revenue
FROM analytics.attributed_conversions ORDER BY attribution, account_id, day, currency;
-- A late event begins a session earlier and gives it a touch; a wrong one leaves for good.
SAVEPOINT later;
INSERT INTO raw_events (payload) VALUES ('{"event_id": "sessions 8", "event_type": "page_view",
    "user_id": "sessions bob", "account_id": "sessions x", "occurred_at": "2003-05-06T11:50Z",
    "properties": {"utm_source": "letter", "utm_medium": "email", "path": "/letter"}}');
UPDATE raw_events SET payload = payload - 'event_type', status = 'pending'
WHERE payload ->> 'event_id' = 'sessions 5';
CALL spectrum.process_batch() \gset
CALL spectrum.refresh_analytics() \gset
SELECT breakdown, value, sessions, users, bounces, mean_seconds
FROM analytics.sessions_daily
WHERE account_id = 'sessions x' AND day = '2003-05-06' AND breakdown IN ('entry_page', 'last_touch')
ORDER BY breakdown, value;
SELECT attribution, day, channel, currency, conversions, users, revenue
FROM analytics.attributed_conversions WHERE account_id = '*' ORDER BY attribution, day, currency;
SELECT count(*) FROM analytics.sessions_daily WHERE day = '2003-05-08';
SELECT check_name, ok FROM spectrum.verify()
WHERE check_name LIKE 'sessions_daily%' OR check_name LIKE 'attributed_conversions%';
SELECT spectrum.drop_attribution('buys');
SELECT count(*) FROM analytics.attributed_conversions WHERE attribution = 'buys';
ROLLBACK TO later;

SELECT spectrum.configure('timezone', 'Europe/Berlin');
SELECT day, sessions FROM analytics.sessions_daily('2003-05-05', '2003-05-09');

SELECT * FROM analytics.attribution('"buy"', '2003-05-01', '2003-06-01');
SELECT * FROM analytics.attribution('"buy"', '2003-05-01', '2003-06-01', 'first');
SELECT * FROM analytics.attribution('"buy"', '2003-05-01', '2003-06-01', p_account => 'sessions y');
SELECT channel, conversions
FROM analytics.attribution('{"event": "buy", "where": {"plan": "pro"}}', '2003-05-01', '2003-06-01');
SELECT * FROM analytics.attribution('"sessions none"');
ROLLBACK;

-- Channels.
SELECT touch, analytics._channel(touch) FROM (VALUES
    (NULL::text[]), ('{ads,CPC,NULL,NULL}'), ('{x,paid_social,NULL,NULL}'), ('{x,Banner,NULL,NULL}'),
    ('{x,newsletter,NULL,NULL}'), ('{x,social-media,NULL,NULL}'), ('{x,affiliate,NULL,NULL}'),
    ('{NULL,organic,NULL,NULL}'), ('{x,referral,NULL,NULL}'),
    ('{google,NULL,NULL,https://www.google.com/}'), ('{NULL,NULL,NULL,https://www.google.co.uk/}'),
    ('{NULL,NULL,NULL,duckduckgo.com}'), ('{NULL,NULL,NULL,https://m.facebook.com/x}'),
    ('{NULL,NULL,NULL,https://t.co/x}'), ('{NULL,NULL,NULL,https://mail.google.com/}'),
    ('{NULL,NULL,NULL,https://google.com.evil.example/}')
) AS touches (touch);
SELECT referrer, analytics._referrer_host(referrer) FROM (VALUES
    ('https://WWW.Forum.example:8080/a?b=http://c#d'), ('forum.example/a'), ('http://u@x.example'),
    ('android-app://com.example.app'), ('?'), ('')
) AS referrers (referrer);

-- What none of them takes.
SELECT * FROM analytics.sessions('2003-05-02', '2003-05-01');
SELECT * FROM analytics.sessions_daily(p_breakdown => 'plan');
SELECT * FROM analytics.attribution('"buy"', p_model => 'linear');
SELECT * FROM analytics.attribution('["buy"]');
SELECT * FROM analytics.attribution(NULL);
SELECT spectrum.define_attribution('', '"buy"');
SELECT spectrum.define_attribution('buys', NULL);
SELECT spectrum.define_attribution('buys', '"buy"', 'linear');
SELECT spectrum.drop_attribution('never defined');
