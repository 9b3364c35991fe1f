-- Room 60, trends: one measure of any events, by calendar period and, if asked, by the values of a
-- property. Reads analytics.events, or the days that are kept where these tell it all. Also here:
-- how a property is read as a number, which is as money is read: a number below 10^15 in size, or a
-- text that is exactly one.

CREATE FUNCTION analytics._check_filter(p_argument text, p_filter jsonb)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF jsonb_typeof(p_filter) <> 'object' THEN
        PERFORM spectrum._reject(
            p_argument, p_filter::text, 'a JSON object that the properties contain, or NULL'
        );
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_filter(text, jsonb) IS
    'Raises 22023 unless the value is NULL or a JSON object.';

CREATE FUNCTION analytics._text_number(p_text text)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF char_length(p_text) <= 1000 AND p_text ~ spectrum._number_pattern() THEN
        RETURN p_text::numeric;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._text_number(text) IS
    'The number that a text exactly is, else NULL; the same texts that carry money.';

CREATE FUNCTION analytics._percentile(p_sorted numeric[], p_fraction numeric)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rank numeric := p_fraction * (array_length(p_sorted, 1) - 1);
    v_below integer := (floor(v_rank) + 1)::integer;
    v_above integer := (ceil(v_rank) + 1)::integer;
BEGIN
    RETURN trim_scale(
        p_sorted[v_below] + (p_sorted[v_above] - p_sorted[v_below]) * (v_rank - floor(v_rank))
    );
END
$$;
COMMENT ON FUNCTION analytics._percentile(numeric[], numeric) IS
    'percentile_cont over sorted numbers, but in numeric: exact, and for numbers of any size.';

CREATE FUNCTION analytics._trend_by_days(
    p_event text,
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_measure text,
    p_breakdown text,
    p_account text
)
RETURNS TABLE (period_number integer, breakdown text, value numeric)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_days date[] := spectrum.period_dates(p_starts);
    v_periods integer := cardinality(p_starts) - 1;
    v_from date := spectrum.period_date(p_from);
    v_to date := spectrum.period_date(p_to);
BEGIN
    IF p_measure = 'events' THEN
        RETURN QUERY
        SELECT width_bucket(d.day, v_days), CASE WHEN p_breakdown IS NOT NULL THEN t.event_type END,
            sum(d.events)
        FROM analytics.event_days AS d
        JOIN analytics.event_types AS t USING (event_type_key)
        WHERE d.account_id = coalesce(p_account, '*')
            AND d.day >= v_from AND d.day < v_to
            AND (p_event IS NULL OR t.event_type = p_event)
        GROUP BY 1, 2;
    ELSIF v_days[v_periods + 1] - v_days[1] = v_periods THEN
        RETURN QUERY
        SELECT width_bucket(d.day, v_days), NULL, sum(d.users)
        FROM analytics.user_day_counts AS d
        WHERE d.day >= v_from AND d.day < v_to
        GROUP BY 1;
    ELSE
        RETURN QUERY
        SELECT width_bucket(d.day, v_days), NULL, count(DISTINCT d.user_key)::numeric
        FROM analytics.user_days AS d
        WHERE d.day >= v_from AND d.day < v_to
        GROUP BY 1;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._trend_by_days(
    text, timestamptz[], timestamptz, timestamptz, text, text, text
) IS
    'What _trend measures, of whole days, out of the days that are kept: events of all types or '
    'one, of all accounts or one, by type; users of any event of all accounts.';

CREATE FUNCTION analytics._trend(
    p_event text,
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_measure text,
    p_property text,
    p_breakdown text,
    p_account text,
    p_where jsonb
)
RETURNS TABLE (period_number integer, breakdown text, value numeric)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    -- What a period without events shows.
    v_nothing numeric := CASE WHEN p_measure IN ('events', 'users', 'sum') THEN 0::numeric END;
    v_percentile numeric := CASE p_measure WHEN 'p50' THEN 0.5 WHEN 'p95' THEN 0.95 ELSE 0.99 END;
    v_is_by_day boolean := p_where IS NULL AND (
        p_measure = 'events' AND coalesce(p_breakdown, 'event_type') = 'event_type'
        OR p_measure = 'users' AND num_nonnulls(p_event, p_breakdown, p_account) = 0
    ) AND analytics._keeps_days(p_from, p_to);
BEGIN
    -- The arguments are constants of this plan: of each CASE over them one branch remains, and of
    -- the event view only the columns that this branch reads.
    RETURN QUERY
    WITH amounts AS (
        SELECT
            width_bucket(e.occurred_at, p_starts) AS number,
            CASE p_breakdown
                WHEN 'event_type' THEN e.event_type
                WHEN 'account_id' THEN e.account_id
                WHEN 'country' THEN e.country
                WHEN 'region' THEN e.region
                WHEN 'city' THEN e.city
                ELSE e.properties ->> p_breakdown
            END AS breakdown,
            nullif(e.user_key, 0) AS user_key,
            CASE WHEN p_measure NOT IN ('events', 'users') THEN
                CASE jsonb_typeof(e.properties -> p_property)
                    WHEN 'number' THEN (e.properties -> p_property)::numeric
                    WHEN 'string' THEN analytics._text_number(e.properties ->> p_property)
                END
            END AS amount
        FROM analytics.events AS e
        WHERE e.occurred_at >= p_from AND e.occurred_at < p_to
            AND (p_event IS NULL OR e.event_type = p_event)
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (p_where IS NULL OR e.properties @> p_where)
            AND NOT v_is_by_day
    ),
    measures AS (
        SELECT
            a.number,
            a.breakdown,
            CASE p_measure
                WHEN 'events' THEN count(*)
                WHEN 'users' THEN count(DISTINCT a.user_key)
                WHEN 'sum' THEN sum(a.amount) FILTER (WHERE abs(a.amount) < 1e15)
                WHEN 'avg' THEN trim_scale(avg(a.amount) FILTER (WHERE abs(a.amount) < 1e15))
                ELSE analytics._percentile(
                    array_agg(a.amount ORDER BY a.amount) FILTER (WHERE abs(a.amount) < 1e15),
                    v_percentile
                )
            END AS value
        FROM amounts AS a
        GROUP BY a.number, a.breakdown
        UNION ALL
        SELECT * FROM analytics._trend_by_days(
            p_event, p_starts, p_from, p_to, p_measure, p_breakdown, p_account
        ) WHERE v_is_by_day
    ),
    series AS (
        SELECT DISTINCT m.breakdown FROM measures AS m WHERE p_breakdown IS NOT NULL
        UNION ALL
        SELECT NULL WHERE p_breakdown IS NULL
    ),
    cells AS (
        SELECT m.number, m.breakdown, m.value FROM measures AS m
        UNION ALL
        SELECT p.number, s.breakdown, v_nothing
        FROM generate_series(1, array_length(p_starts, 1) - 1) AS p (number)
        CROSS JOIN series AS s
    )
    SELECT c.number, c.breakdown, sum(c.value)
    FROM cells AS c GROUP BY c.number, c.breakdown;
END
$$;
COMMENT ON FUNCTION analytics._trend(
    text, timestamptz[], timestamptz, timestamptz, text, text, text, text, jsonb
) IS
    'The measure for each period (numbered by p_starts) and each breakdown value, empty ones too.';

CREATE FUNCTION analytics.trend(
    p_event text DEFAULT NULL,
    p_period text DEFAULT 'day',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_measure text DEFAULT 'events',
    p_property text DEFAULT NULL,
    p_breakdown text DEFAULT NULL,
    p_account text DEFAULT NULL,
    p_where jsonb DEFAULT NULL
)
RETURNS TABLE (period date, breakdown text, value numeric)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
    v_dates date[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM spectrum._check_choice(
        'p_measure', p_measure, '{events, users, sum, avg, p50, p95, p99}'
    );
    PERFORM analytics._check_range(p_from, p_to);
    IF p_property IS NULL AND p_measure NOT IN ('events', 'users') THEN
        PERFORM spectrum._reject(
            'p_property', p_property, format('the property that %s is taken of', p_measure)
        );
    END IF;
    PERFORM analytics._check_filter('p_where', p_where);

    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_days(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts(p_period, v_from, v_to);
    v_dates := spectrum.period_dates(v_starts);

    RETURN QUERY
    SELECT v_dates[t.period_number], t.breakdown, t.value
    FROM analytics._trend(
        p_event, v_starts, v_from, v_to, p_measure, p_property, p_breakdown, p_account, p_where
    ) AS t
    ORDER BY t.period_number, t.breakdown;
END
$$;
COMMENT ON FUNCTION analytics.trend(
    text, text, timestamptz, timestamptz, text, text, text, text, jsonb
) IS
    'One measure by day, week or month over the events of [p_from, p_to) (NULL: from the first '
    'event of the account, to the last event of any). p_event NULL: any event. p_measure: events, '
    'users, or sum, avg, p50, p95, p99 of the numbers in p_property (below 10^15 in size, or a '
    'text that is exactly one; anything else there is left out). p_breakdown: event_type, '
    'account_id, country, region, city, or a top-level property. p_where: JSON containment. A '
    'period without events is a row too: 0, or NULL for avg and percentiles.';
