-- Room 60, ranges: how a question's range of time is checked and how its open ends are settled.
-- Reads analytics.events; read by every question.
--
-- Nothing orders all events by time. Where the days that are kept are exact (room 60, user days),
-- they say which were the first and the last. Else the months that hold all events are bisected,
-- and who needs more than that looks at those at the two ends whole.

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
    IF v_facts_from > coalesce(p_from, '-infinity') AND analytics._may_ask_kept() THEN
        RAISE NOTICE 'events before % are purged: this answer is without them', v_facts_from
            USING HINT = 'The standing views count them still.';
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_range(timestamptz, timestamptz) IS
    'Raises 22023 unless [p_from, p_to) is a range of time; NULL leaves an end open. Says so where '
    'events of it are purged.';

CREATE FUNCTION analytics._calendar_days(
    p_from timestamptz,
    p_to timestamptz,
    OUT starts timestamptz[],
    OUT days date[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    starts := spectrum.period_starts('day', p_from, p_to);
    days := spectrum.period_dates(starts);
END
$$;
COMMENT ON FUNCTION analytics._calendar_days(timestamptz, timestamptz) IS
    'The days of [p_from, p_to): starts, for width_bucket, and dates.';

CREATE FUNCTION analytics._months_of_events(OUT first_at timestamptz, OUT end_at timestamptz)
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
COMMENT ON FUNCTION analytics._months_of_events() IS
    'The months, in UTC, that hold all events: bisected, since each look at one side of a month '
    'ends with the first event found, where the exact bounds would take a look at all. NULL where '
    'there are none.';

CREATE FUNCTION analytics._event_bounds(OUT first_at timestamptz, OUT end_at timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    IF analytics._keeps_days(NULL, NULL) THEN
        SELECT spectrum._day_start(min(d.day), min(s.timezone)),
            spectrum._day_start(max(d.day) + 1, min(s.timezone))
        INTO first_at, end_at
        FROM analytics.event_days AS d
        CROSS JOIN analytics.settings AS s
        WHERE d.account_id = '*';
    ELSE
        SELECT m.first_at, m.end_at INTO first_at, end_at FROM analytics._months_of_events() AS m;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._event_bounds() IS
    'Instants between which all events lie: the first and the last day, or, where days are not '
    'kept, month. NULL where there are none.';

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
    v_next timestamptz;
    v_end timestamptz;
BEGIN
    from_at := p_from;
    to_at := p_to;
    IF p_from IS NOT NULL AND p_to IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT m.first_at, m.end_at INTO v_month, v_end FROM analytics._event_bounds() AS m;
    -- Bounds that the planner knows: by them it leaves out months, packed ones too.
    IF p_to IS NULL THEN
        v_next := v_end - interval '1 month';
        SELECT max(e.occurred_at) + interval '1 us' INTO to_at
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_next AND e.occurred_at < v_end;
    END IF;
    -- Month by month: an account may begin after the first.
    WHILE from_at IS NULL AND v_month < v_end LOOP
        v_next := v_month + interval '1 month';
        SELECT min(e.occurred_at) INTO from_at
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_month AND e.occurred_at < v_next
            AND (p_account IS NULL OR e.account_id = p_account);
        v_month := v_next;
    END LOOP;
END
$$;
COMMENT ON FUNCTION analytics._settle_range(timestamptz, timestamptz, text) IS
    'The range with its open ends settled, without a clock: from the first event of the account '
    '(NULL: of all) to just after the last event of any account, which is how far time is known to '
    'have come. An end stays NULL where there is no such event.';

CREATE FUNCTION analytics._settle_days(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    OUT from_at timestamptz,
    OUT to_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    IF p_from IS NOT NULL AND p_to IS NOT NULL OR NOT analytics._keeps_days(p_from, p_to) THEN
        SELECT r.from_at, r.to_at INTO from_at, to_at
        FROM analytics._settle_range(p_from, p_to, p_account) AS r;
        RETURN;
    END IF;
    SELECT coalesce(p_from, b.first_at), coalesce(p_to, b.end_at) INTO from_at, to_at
    FROM analytics._event_bounds() AS b;
    IF p_from IS NULL AND p_account IS NOT NULL THEN
        from_at := (
            SELECT spectrum._day_start(min(d.day), min(s.timezone))
            FROM analytics.event_days AS d
            CROSS JOIN analytics.settings AS s
            WHERE d.account_id = p_account
        );
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._settle_days(timestamptz, timestamptz, text) IS
    '_settle_range for questions by day or longer: where days are kept, from the start of the day '
    'of the first event to the end of that of the last, found without a look at any event.';

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
    v_first timestamptz := (SELECT m.first_at FROM analytics._event_bounds() AS m);
    v_to timestamptz := (
        SELECT r.to_at FROM analytics._settle_days(coalesce(p_from, v_first), p_to, NULL) AS r
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
