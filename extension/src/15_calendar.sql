-- Room 15, the calendar: the one place that cuts time. A day, week or month is a calendar one in
-- config.timezone, weeks begin on config.week_start. Reports ask once for the starts of all periods
-- they need and place each event by width_bucket(occurred_at, starts), so nothing else adds days
-- to an instant, and days of 23 or 25 hours are what they are.

CREATE FUNCTION spectrum._day_start(p_day timestamp, p_timezone text)
RETURNS timestamptz
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Where the clock skips midnight this is the instant at which it does.
    v_start timestamptz := p_day AT TIME ZONE p_timezone;
    v_set_back interval :=
        (v_start - interval '24 hours') AT TIME ZONE p_timezone + interval '24 hours' - p_day;
BEGIN
    -- Where the clock shows midnight twice the day begins with the first; the cast takes the last.
    IF v_set_back > interval '0' AND (v_start - v_set_back) AT TIME ZONE p_timezone = p_day THEN
        RETURN v_start - v_set_back;
    END IF;
    RETURN v_start;
END
$$;
COMMENT ON FUNCTION spectrum._day_start(timestamp, text) IS
    'The first instant of a calendar day in a time zone.';

CREATE FUNCTION spectrum._period_day(p_period text, p_day timestamp, p_week_start integer)
RETURNS timestamp
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_shift interval := make_interval(days => p_week_start - 1);
BEGIN
    IF p_period = 'week' THEN
        RETURN date_trunc('week', p_day - v_shift) + v_shift;
    END IF;
    RETURN date_trunc(p_period, p_day);
END
$$;
COMMENT ON FUNCTION spectrum._period_day(text, timestamp, integer) IS
    'The first day of the day, week or month that holds a local time.';

CREATE FUNCTION spectrum.period_starts(p_period text, p_from timestamptz, p_to timestamptz)
RETURNS timestamptz[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_timezone text;
    v_week_start integer;
    v_step interval;
    v_starts timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    IF NOT isfinite(p_from) THEN
        PERFORM spectrum._reject('p_from', p_from::text, 'a finite time');
    ELSIF NOT isfinite(p_to) THEN
        PERFORM spectrum._reject('p_to', p_to::text, 'a finite time');
    ELSIF p_from IS NULL OR p_to IS NULL OR p_from >= p_to THEN
        RETURN '{}'::timestamptz[];
    END IF;
    SELECT s.timezone, s.week_start INTO v_timezone, v_week_start FROM analytics.settings AS s;
    v_step := ('1 ' || p_period)::interval;

    -- One period more on both sides: around a change of the clock the local date of an instant and
    -- the day that holds it can differ.
    v_starts := ARRAY(
        SELECT DISTINCT spectrum._day_start(d.day, v_timezone) AS start
        FROM generate_series(
            spectrum._period_day(p_period, p_from AT TIME ZONE v_timezone, v_week_start) - v_step,
            p_to AT TIME ZONE v_timezone + 2 * v_step,
            v_step
        ) AS d (day)
        ORDER BY start
    );
    RETURN v_starts[
        width_bucket(p_from, v_starts) : width_bucket(p_to - interval '1 us', v_starts) + 1
    ];
END
$$;
COMMENT ON FUNCTION spectrum.period_starts(text, timestamptz, timestamptz) IS
    'The starts, ascending, of every calendar day, week or month that overlaps [p_from, p_to), and '
    'one more: the end of the last. So instant t lies in period width_bucket(t, starts). Empty '
    'where the range is empty or one of its ends is NULL.';

CREATE FUNCTION spectrum.period_start(p_period text, p_at timestamptz)
RETURNS timestamptz
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (spectrum.period_starts(p_period, p_at, p_at + interval '1 us'))[1];
END
$$;
COMMENT ON FUNCTION spectrum.period_start(text, timestamptz) IS
    'The start of the one calendar day, week or month that holds an instant. For many instants '
    'use period_starts and width_bucket.';

CREATE FUNCTION spectrum.period_dates(p_starts timestamptz[])
RETURNS date[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        SELECT (p.start AT TIME ZONE s.timezone)::date
        FROM analytics.settings AS s
        CROSS JOIN unnest(p_starts) WITH ORDINALITY AS p (start, number)
        ORDER BY p.number
    );
END
$$;
COMMENT ON FUNCTION spectrum.period_dates(timestamptz[]) IS
    'The calendar dates that the starts of periods stand for: each event looks its date up by the '
    'number of its period.';

CREATE FUNCTION spectrum.period_date(p_start timestamptz)
RETURNS date
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (spectrum.period_dates(ARRAY[p_start]))[1];
END
$$;
COMMENT ON FUNCTION spectrum.period_date(timestamptz) IS
    'The same of one period.';
