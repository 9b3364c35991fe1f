-- Room 60, attribution: which visit brought a conversion. A touch is a session with UTM tags or a
-- referrer; the first or the last one in the 30 days up to and including the session of the
-- conversion gets it, or, where there is none, direct. Reads analytics.events and the sessions cut
-- from them (65_sessions.sql).

CREATE FUNCTION analytics._conversions(
    p_event_key integer,
    p_filter jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_account text
)
RETURNS TABLE (user_key bigint, occurred_at timestamptz, revenue numeric, currency text)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    SELECT e.user_key, e.occurred_at, e.revenue, e.currency
    FROM analytics.events AS e
    WHERE e.user_key <> 0
        AND e.event_type_key = p_event_key
        AND (p_filter IS NULL OR e.properties @> p_filter)
        AND (p_from IS NULL OR e.occurred_at >= p_from)
        AND (p_to IS NULL OR e.occurred_at < p_to)
        AND (p_account IS NULL OR e.account_id = p_account);
END
$$;
COMMENT ON FUNCTION analytics._conversions(integer, jsonb, timestamptz, timestamptz, text) IS
    'The events that convert, with their money.';

CREATE FUNCTION analytics._touched_sessions(
    p_users bigint[],
    p_from timestamptz,
    p_to timestamptz,
    p_model text,
    p_account text
)
RETURNS TABLE (user_key bigint, started_at timestamptz, touch text[])
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_since timestamptz := '-infinity'::timestamptz;
    v_across bigint[] := '{}'::bigint[];
    v_sinces timestamptz[];
BEGIN
    -- A conversion is up to 24 hours into its session, its touch up to 30 days before that, and
    -- the cut is exact 24 hours after its begin.
    IF p_from > '0001-01-01 00:00+00' THEN
        v_since := p_from - interval '768 hours';
        v_across := analytics._session_users_across(v_since);
    END IF;
    v_sinces := ARRAY(
        SELECT CASE WHEN a.user_key IS NULL THEN v_since ELSE '-infinity' END
        FROM unnest(p_users) WITH ORDINALITY AS u (user_key, position)
        LEFT JOIN unnest(v_across) AS a (user_key) USING (user_key)
        ORDER BY u.position
    );

    RETURN QUERY
    WITH visits AS MATERIALIZED (
        SELECT
            s.user_key,
            s.started_at,
            s.touch,
            CASE
                WHEN p_model = 'first' THEN min(s.started_at) FILTER (WHERE s.touch IS NOT NULL)
                    OVER recent
                ELSE max(s.started_at) FILTER (WHERE s.touch IS NOT NULL) OVER recent
            END AS touched_at
        FROM analytics._sessions(
            NULL, NULL, p_users, NULL, v_sinces,
            array_fill(coalesce(p_to, 'infinity'), ARRAY[cardinality(p_users)]),
            p_account, '{touches}'
        ) AS s
        WINDOW recent AS (
            PARTITION BY s.user_key ORDER BY s.started_at
            RANGE BETWEEN interval '720 hours' PRECEDING AND CURRENT ROW
        )
    )
    SELECT v.user_key, v.started_at, t.touch
    FROM visits AS v
    LEFT JOIN visits AS t ON t.user_key = v.user_key AND t.started_at = v.touched_at;
END
$$;
COMMENT ON FUNCTION analytics._touched_sessions(
    bigint[], timestamptz, timestamptz, text, text
) IS
    'Every session of the users that a conversion in [p_from, p_to) can be in, and the touch that '
    'gets such a conversion; NULL is direct. (Of earlier sessions it also gives some.)';

CREATE FUNCTION analytics.attribution(
    p_conversion jsonb,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_model text DEFAULT 'last',
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    channel text,
    source text,
    medium text,
    campaign text,
    currency text,
    conversions bigint,
    users bigint,
    revenue numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_key integer;
    v_filter jsonb;
    v_users bigint[];
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM spectrum._check_choice('p_model', p_model, '{last, first}');
    SELECT t.event_type_key, s.filter INTO v_key, v_filter
    FROM analytics._read_steps('p_conversion', jsonb_build_array(p_conversion)) AS s
    LEFT JOIN analytics.event_types AS t USING (event_type);
    v_users := ARRAY(
        SELECT DISTINCT c.user_key
        FROM analytics._conversions(v_key, v_filter, p_from, p_to, p_account) AS c
    );

    RETURN QUERY
    WITH touched AS MATERIALIZED (
        SELECT t.user_key, t.started_at, t.touch
        FROM analytics._touched_sessions(v_users, p_from, p_to, p_model, p_account) AS t
    ),
    histories AS (
        SELECT t.user_key, array_agg(t.started_at ORDER BY t.started_at) AS starts
        FROM touched AS t
        GROUP BY t.user_key
    ),
    attributed AS (
        SELECT
            c.user_key, c.revenue,
            CASE WHEN c.revenue IS NOT NULL THEN c.currency END AS currency,
            t.touch
        FROM analytics._conversions(v_key, v_filter, p_from, p_to, p_account) AS c
        JOIN histories AS h USING (user_key)
        JOIN touched AS t
            ON t.user_key = c.user_key
            AND t.started_at = h.starts[width_bucket(c.occurred_at, h.starts)]
    )
    SELECT
        analytics._channel(a.touch) AS channel,
        CASE
            WHEN num_nonnulls(a.touch[1], a.touch[2], a.touch[3]) > 0 THEN a.touch[1]
            ELSE analytics._referrer_host(a.touch[4])
        END AS source,
        a.touch[2] AS medium,
        a.touch[3] AS campaign,
        a.currency,
        count(*) AS conversions,
        count(DISTINCT a.user_key) AS users,
        sum(a.revenue) AS revenue
    FROM attributed AS a
    GROUP BY 1, 2, 3, 4, 5
    ORDER BY 6 DESC, 1, 2, 3, 4, 5;
END
$$;
COMMENT ON FUNCTION analytics.attribution(jsonb, timestamptz, timestamptz, text, text) IS
    'Who brought the conversions of [p_from, p_to): for each touch their number, the users and the '
    'sum of their revenue by currency (NULL: conversions without money). p_conversion: "purchase" '
    'or {"event": "purchase", "where": {"plan": "pro"}}. p_model: the last or the first session '
    'with UTM tags or a referrer in the 30 days up to and including the session of the conversion, '
    'else direct. source is utm_source, or the host of the referrer where there are no UTM tags. '
    'p_account: of the events of that account alone.';
