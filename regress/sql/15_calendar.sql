-- The calendar: days, weeks and months in config.timezone, over every kind of clock change.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS spectrum;

BEGIN;
-- The periods that overlap the range, and the end of the last.
SELECT spectrum.period_starts('day', '2024-02-28 12:00+00', '2024-03-01 00:00+00');
SELECT spectrum.period_starts('day', '2024-02-28 00:00+00', '2024-03-01 00:00:00.000001+00');
SELECT spectrum.period_starts('week', '2024-02-28 12:00+00', '2024-02-28 12:00:00.000001+00');
SELECT spectrum.period_starts('month', '2024-01-31 12:00+00', '2024-03-01 00:00+00');
SELECT spectrum.period_starts('day', '2024-03-01 00:00+00', '2024-03-01 00:00+00');
SELECT spectrum.period_starts('day', NULL, '2024-03-01 00:00+00');

-- Weeks begin where they are said to.
SELECT spectrum.configure('week_start', '7');
SELECT spectrum.period_start('week', '2024-03-02 23:59:59+00');
SELECT spectrum.period_start('week', '2024-03-03 00:00+00');

-- A day of 23 and one of 25 hours; the month that holds it; whatever the session's own zone.
SELECT spectrum.configure('timezone', 'Europe/Berlin');
SET timezone = 'America/New_York';
SELECT start AT TIME ZONE 'UTC' AS start_utc, lead(start) OVER (ORDER BY start) - start AS lasts,
    spectrum.period_date(start)
FROM unnest(spectrum.period_starts('day', '2024-03-30 12:00+00', '2024-04-01 12:00+00')) AS start;
SELECT start AT TIME ZONE 'UTC' AS start_utc, lead(start) OVER (ORDER BY start) - start AS lasts
FROM unnest(spectrum.period_starts('day', '2024-10-26 12:00+00', '2024-10-27 12:00+00')) AS start;
SET timezone = 'UTC';
SELECT spectrum.period_starts('month', '2024-03-15 00:00+00', '2024-03-15 00:00:01+00');

-- The clock skips midnight, shows it twice, goes back over it, or skips a whole day.
SELECT spectrum.configure('timezone', 'America/Sao_Paulo');
SELECT spectrum.period_starts('day', '2018-11-04 12:00+00', '2018-11-04 12:01+00');
SELECT spectrum.period_date('2018-11-04 03:00+00');
SELECT spectrum.period_starts('day', '2018-02-18 12:00+00', '2018-02-18 12:01+00');
SELECT spectrum.configure('timezone', 'America/Havana');
SELECT spectrum.period_starts('day', '2019-11-03 04:30+00', '2019-11-03 04:31+00');
SELECT spectrum.configure('timezone', 'Pacific/Apia');
SELECT spectrum.period_starts('day', '2011-12-29 20:00+00', '2011-12-30 20:00+00');
ROLLBACK;

SELECT spectrum.period_starts('fortnight', '2024-01-01', '2024-02-01');
SELECT spectrum.period_starts(NULL, '2024-01-01', '2024-02-01');
SELECT spectrum.period_starts('day', '-infinity', '2024-02-01');
SELECT spectrum.period_starts('day', '2024-01-01', 'infinity');
