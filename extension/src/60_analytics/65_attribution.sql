-- Room 60, attribution: which visit brought a conversion. A touch is a session with UTM tags or a
-- referrer; the first or the last one in the 30 days up to and including the session of the
-- conversion gets it, or, where there is none, direct. Reads analytics.events and the sessions cut
-- from them (65_sessions.sql).

CREATE FUNCTION analytics._conversions(
    p_event_key integer,
    p_filter jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean,
    p_user bigint
)
RETURNS TABLE (
    account_id text, scope bigint, user_key bigint, occurred_at timestamptz, event_id uuid,
    revenue numeric, currency text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END,
        CASE WHEN p_by_account THEN -e.account_key ELSE 0 END,
        e.user_key, e.occurred_at, e.event_id, e.revenue,
        CASE WHEN e.revenue IS NOT NULL THEN e.currency END
    FROM analytics.events AS e
    WHERE e.user_key <> 0
        AND e.event_type_key = p_event_key
        AND (p_filter IS NULL OR e.properties @> p_filter)
        AND (p_from IS NULL OR e.occurred_at >= p_from)
        AND (p_to IS NULL OR e.occurred_at < p_to)
        AND (p_account IS NULL OR e.account_id = p_account)
        AND (p_user IS NULL OR e.user_key = p_user)
        AND (NOT p_by_account OR e.account_key <> 0);
END
$$;
COMMENT ON FUNCTION analytics._conversions(
    integer, jsonb, timestamptz, timestamptz, text, boolean, bigint
) IS
    'The events that convert, with their money. For one account, for all together (*), or, with '
    'p_by_account, for each account by itself: the scope that its sessions are cut in.';

CREATE FUNCTION analytics._touched_sessions(
    p_users bigint[],
    p_scopes bigint[],
    p_from timestamptz,
    p_to timestamptz,
    p_model text,
    p_account text
)
RETURNS TABLE (scope bigint, user_key bigint, started_at timestamptz, touch text[])
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
            coalesce(s.scope, 0) AS scope,
            s.user_key,
            s.started_at,
            s.touch,
            CASE
                WHEN p_model = 'first' THEN min(s.started_at) FILTER (WHERE s.touch IS NOT NULL)
                    OVER recent
                ELSE max(s.started_at) FILTER (WHERE s.touch IS NOT NULL) OVER recent
            END AS touched_at
        FROM analytics._sessions(
            NULL, NULL, p_users, p_scopes, v_sinces,
            array_fill(coalesce(p_to, 'infinity'), ARRAY[cardinality(p_users)]),
            p_account, '{touches}'
        ) AS s
        WINDOW recent AS (
            PARTITION BY s.scope, s.user_key ORDER BY s.started_at
            RANGE BETWEEN interval '720 hours' PRECEDING AND CURRENT ROW
        )
    )
    SELECT v.scope, v.user_key, v.started_at, t.touch
    FROM visits AS v
    LEFT JOIN visits AS t
        ON t.user_key = v.user_key AND t.scope = v.scope AND t.started_at = v.touched_at;
END
$$;
COMMENT ON FUNCTION analytics._touched_sessions(
    bigint[], bigint[], timestamptz, timestamptz, text, text
) IS
    'Every session of the users that a conversion in [p_from, p_to) can be in, and the touch that '
    'gets such a conversion; NULL is direct. (Of earlier sessions it also gives some.) With '
    'p_scopes, for each user and scope by itself, see _sessions.';

CREATE FUNCTION analytics._credit(p_touch text[])
RETURNS text[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY[
        analytics._channel(p_touch),
        CASE
            WHEN num_nonnulls(p_touch[1], p_touch[2], p_touch[3]) > 0 THEN p_touch[1]
            ELSE analytics._referrer_host(p_touch[4])
        END,
        p_touch[2],
        p_touch[3]
    ];
END
$$;
COMMENT ON FUNCTION analytics._credit(text[]) IS
    'Channel, source, medium and campaign that a touch gives a conversion to; NULL is direct.';

CREATE FUNCTION analytics._attributed(
    p_conversion jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_model text,
    p_account text,
    p_by_account boolean,
    p_user bigint
)
RETURNS TABLE (
    account_id text, user_key bigint, occurred_at timestamptz, event_id uuid, revenue numeric,
    currency text, credit text[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_key integer;
    v_filter jsonb;
    r_units record;
BEGIN
    SELECT t.event_type_key, s.filter INTO v_key, v_filter
    FROM analytics._read_steps('p_conversion', jsonb_build_array(p_conversion)) AS s
    LEFT JOIN analytics.event_types AS t USING (event_type);
    SELECT coalesce(array_agg(unit.user_key), '{}') AS users,
        CASE WHEN p_by_account THEN coalesce(array_agg(unit.scope), '{}') END AS scopes
    INTO r_units
    FROM (
        SELECT DISTINCT c.user_key, c.scope
        FROM analytics._conversions(
            v_key, v_filter, p_from, p_to, p_account, p_by_account, p_user
        ) AS c
    ) AS unit;

    RETURN QUERY
    WITH touched AS MATERIALIZED (
        SELECT t.scope, t.user_key, t.started_at, coalesce(t.touch, '{}') AS touch
        FROM analytics._touched_sessions(
            r_units.users, r_units.scopes, p_from, p_to, p_model, p_account
        ) AS t
    ),
    -- Many conversions have the same one.
    touches AS MATERIALIZED (
        SELECT d.touch, analytics._credit(nullif(d.touch, '{}')) AS credit
        FROM (SELECT DISTINCT t.touch FROM touched AS t) AS d
    ),
    histories AS (
        SELECT t.scope, t.user_key, array_agg(t.started_at ORDER BY t.started_at) AS starts
        FROM touched AS t
        GROUP BY t.scope, t.user_key
    )
    SELECT c.account_id, c.user_key, c.occurred_at, c.event_id, c.revenue, c.currency,
        touches.credit
    FROM analytics._conversions(
        v_key, v_filter, p_from, p_to, p_account, p_by_account, p_user
    ) AS c
    JOIN histories AS h ON h.user_key = c.user_key AND h.scope = c.scope
    JOIN touched AS t
        ON t.user_key = c.user_key AND t.scope = c.scope
        AND t.started_at = h.starts[width_bucket(c.occurred_at, h.starts)]
    JOIN touches ON touches.touch = t.touch;
END
$$;
COMMENT ON FUNCTION analytics._attributed(
    jsonb, timestamptz, timestamptz, text, text, boolean, bigint
) IS
    'The conversions of [p_from, p_to), of one user or (NULL) of all, and what each is given to. '
    'For one account, for all together (*), or, with p_by_account, for each account by itself.';

CREATE FUNCTION analytics._check_attribution(p_conversion jsonb, p_model text)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_model', p_model, '{last, first}');
    PERFORM analytics._read_steps('p_conversion', jsonb_build_array(p_conversion));
END
$$;
COMMENT ON FUNCTION analytics._check_attribution(jsonb, text) IS
    'Raises 22023 unless they say what is attributed, and how.';

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
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_attribution(p_conversion, p_model);
    RETURN QUERY
    SELECT
        a.credit[1],
        a.credit[2],
        a.credit[3],
        a.credit[4],
        a.currency,
        count(*),
        count(DISTINCT a.user_key),
        sum(a.revenue)
    FROM analytics._attributed(
        p_conversion, p_from, p_to, p_model, p_account, false, NULL
    ) AS a
    GROUP BY a.credit, a.currency
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
