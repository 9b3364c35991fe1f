-- Room 60, ranges: how a question's range of time is checked, how its open ends are settled and how
-- periods get their dates. Reads analytics.events; read by every question.
--
-- Nothing orders all events by time, so first and last come in two steps: the months that hold all
-- events are bisected, and only those at the two ends are looked at whole.

CREATE FUNCTION analytics._check_range(p_from timestamptz, p_to timestamptz)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_facts_from timestamptz;
BEGIN
    IF NOT isfinite(p_from) THEN
        PERFORM spectrum._reject('p_from', p_from::text, 'a finite time or NULL');
    END IF;
    IF NOT isfinite(p_to) OR p_to < p_from THEN
        PERFORM spectrum._reject('p_to', p_to::text, 'a finite time not before p_from, or NULL');
    END IF;
    SELECT s.facts_from INTO v_facts_from FROM analytics.settings AS s;
    IF v_facts_from > coalesce(p_from, '-infinity')
        AND coalesce(current_setting('spectrum.from_facts', true), '') <> 'on'
    THEN
        RAISE NOTICE 'events before % are purged: this answer is without them', v_facts_from
            USING HINT = 'The standing views count them still.';
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_range(timestamptz, timestamptz) IS
    'Raises 22023 unless [p_from, p_to) is a range of time; NULL leaves an end open. Says so where '
    'events of it are purged.';

CREATE FUNCTION analytics._event_months(OUT first_at timestamptz, OUT end_at timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_months timestamptz[] := ARRAY(
        SELECT generate_series('1900-01-01'::timestamptz, '2200-01-01', interval '1 month')
    );
    v_low integer := 1;
    v_high integer := cardinality(v_months);
    v_middle integer;
BEGIN
    WHILE v_low < v_high LOOP
        v_middle := (v_low + v_high) / 2;
        IF EXISTS (
            SELECT FROM analytics.events AS e WHERE e.occurred_at < v_months[v_middle + 1]
        ) THEN
            v_high := v_middle;
        ELSE
            v_low := v_middle + 1;
        END IF;
    END LOOP;
    IF v_low = cardinality(v_months) THEN
        RETURN;
    END IF;
    first_at := v_months[v_low];

    v_high := cardinality(v_months);
    WHILE v_low < v_high LOOP
        v_middle := (v_low + v_high) / 2;
        IF EXISTS (
            SELECT FROM analytics.events AS e WHERE e.occurred_at >= v_months[v_middle + 1]
        ) THEN
            v_low := v_middle + 1;
        ELSE
            v_high := v_middle;
        END IF;
    END LOOP;
    end_at := v_months[v_low + 1];
END
$$;
COMMENT ON FUNCTION analytics._event_months() IS
    'The months, in UTC, that hold all events: bisected, since each look at one side of a month '
    'ends with the first event found, where the exact bounds would take a look at all. NULL where '
    'there are none.';

CREATE FUNCTION analytics._settle_range(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    OUT from_at timestamptz,
    OUT to_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_month timestamptz;
    v_end timestamptz;
BEGIN
    from_at := p_from;
    to_at := p_to;
    IF p_from IS NOT NULL AND p_to IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT m.first_at, m.end_at INTO v_month, v_end FROM analytics._event_months() AS m;
    IF p_to IS NULL THEN
        SELECT max(e.occurred_at) + interval '1 us' INTO to_at
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_end - interval '1 month' AND e.occurred_at < v_end;
    END IF;
    -- Month by month: an account may begin after the first.
    WHILE from_at IS NULL AND v_month < v_end LOOP
        SELECT min(e.occurred_at) INTO from_at
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_month AND e.occurred_at < v_month + interval '1 month'
            AND (p_account IS NULL OR e.account_id = p_account);
        v_month := v_month + interval '1 month';
    END LOOP;
END
$$;
COMMENT ON FUNCTION analytics._settle_range(timestamptz, timestamptz, text) IS
    'The range with its open ends settled, without a clock: from the first event of the account '
    '(NULL: of all) to just after the last event of any account, which is how far time is known to '
    'have come. An end stays NULL where there is no such event.';

CREATE FUNCTION analytics._history_periods(
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    OUT starts timestamptz[],
    OUT first_number integer
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_first timestamptz := (SELECT m.first_at FROM analytics._event_months() AS m);
    v_to timestamptz := (
        SELECT r.to_at FROM analytics._settle_range(coalesce(p_from, v_first), p_to, NULL) AS r
    );
BEGIN
    starts := '{}';
    IF p_from IS NULL OR p_from < v_to THEN
        starts := spectrum.period_starts(
            p_period, least(p_from, v_first, v_to - interval '1 us'), v_to
        );
        first_number := width_bucket(p_from, starts);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._history_periods(text, timestamptz, timestamptz) IS
    'For questions that look before their range: the starts of all periods from the first event '
    'of any account to the end of the range, and the number of the period in which the range '
    'begins, NULL where it is open. Empty where the range is.';

CREATE FUNCTION analytics._period_dates(p_starts timestamptz[])
RETURNS date[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        -- As spectrum.period_date: in one look at the settings.
        SELECT (s.start AT TIME ZONE settings.timezone)::date
        FROM unnest(p_starts) WITH ORDINALITY AS s (start, number)
        CROSS JOIN analytics.settings
        ORDER BY s.number
    );
END
$$;
COMMENT ON FUNCTION analytics._period_dates(timestamptz[]) IS
    'The dates that period starts stand for, so that a row looks its date up by number.';
