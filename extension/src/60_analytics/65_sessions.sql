-- Room 60, sessions: what a user did at one sitting, where he came in and went out, and what had
-- brought him. Reads analytics.events; read by analytics.sessions and sessions_daily, by
-- attribution and paths.
--
-- analytics._session_starts (60_funnel_walks.sql) is the one rule that cuts. It only looks back: a
-- session begins where it does whatever comes later, and nothing before its start matters. So a
-- cut that begins where a session does, or after a gap of more than 30 minutes, is exact.

CREATE AGGREGATE analytics._cut_sessions(timestamptz) (
    SFUNC = pg_catalog.array_append,
    STYPE = timestamptz[],
    FINALFUNC = analytics._session_starts,
    INITCOND = '{}',
    PARALLEL = SAFE
);
COMMENT ON AGGREGATE analytics._cut_sessions(timestamptz) IS
    '_session_starts of a column: OVER all rows of one user, which have to come in their order.';

CREATE FUNCTION analytics._read_touch(p_properties jsonb)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_touch text[] := ARRAY[
        nullif(p_properties ->> 'utm_source', ''),
        nullif(p_properties ->> 'utm_medium', ''),
        nullif(p_properties ->> 'utm_campaign', ''),
        nullif(p_properties ->> 'referrer', '')
    ];
BEGIN
    RETURN CASE WHEN num_nonnulls(VARIADIC v_touch) > 0 THEN v_touch END;
END
$$;
COMMENT ON FUNCTION analytics._read_touch(jsonb) IS
    'UTM source, medium and campaign, and the referrer, of an event: an array as text. NULL where '
    'it has none of them.';

CREATE FUNCTION analytics._sessions(
    p_since timestamptz, p_until timestamptz, p_users bigint[], p_scopes bigint[],
    p_sinces timestamptz[], p_untils timestamptz[], p_account text, p_parts text[]
)
RETURNS TABLE (
    scope bigint, user_key bigint, user_id text, started_at timestamptz, ended_at timestamptz,
    events integer, page_views integer, is_bounce boolean, entry_page text, exit_page text,
    touch text[], place text[], last_place text[], steps integer[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_page_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('page_view', '$pageview')
    );
    v_first timestamptz := (SELECT min(w.since) FROM unnest(p_sinces) AS w (since));
    v_last timestamptz := (SELECT max(w.until) FROM unnest(p_untils) AS w (until));
BEGIN
    -- The arguments are constants of this plan: of the event view it reads only what the parts ask
    -- for. The last grouping is a prefix of the order below it, so arrays are built in that order.
    RETURN QUERY
    SELECT
        CASE WHEN p_scopes IS NOT NULL THEN s.scope END, s.user_key, min(s.user_id),
        min(s.occurred_at), max(s.occurred_at), count(*)::integer, count(s.page)::integer,
        CASE WHEN count(s.page) > 0 THEN count(s.page) ELSE count(*) END = 1,
        nullif((array_agg(s.page) FILTER (WHERE s.page IS NOT NULL))[1], ''),
        nullif((array_agg(s.page) FILTER (WHERE s.page IS NOT NULL))[count(s.page)], ''),
        ((array_agg(s.touch))[1])::text[],
        ((array_agg(s.place) FILTER (WHERE s.place IS NOT NULL))[1])::text[],
        ((array_agg(s.place) FILTER (WHERE s.place IS NOT NULL))[count(s.place)])::text[],
        CASE WHEN 'steps' = ANY (p_parts) THEN array_agg(s.event_type_key) END
    FROM (
        SELECT o.*, width_bucket(o.occurred_at, analytics._cut_sessions(o.occurred_at) OVER (
            PARTITION BY CASE WHEN p_scopes IS NOT NULL THEN o.scope END, o.user_key
            ORDER BY o.occurred_at, o.event_id
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
        )) AS number
        FROM (
            SELECT
                e.scope, e.user_key, e.occurred_at, e.event_id,
                CASE WHEN 'users' = ANY (p_parts) THEN e.user_id END AS user_id,
                CASE WHEN 'steps' = ANY (p_parts) THEN e.event_type_key END AS event_type_key,
                CASE WHEN 'pages' = ANY (p_parts) AND e.event_type_key = ANY (v_page_keys) THEN
                    coalesce(nullif(e.properties ->> 'path', ''),
                        nullif(e.properties ->> 'url', ''), e.properties ->> 'page', '')
                END AS page,
                CASE WHEN 'touches' = ANY (p_parts)
                    AND e.properties ?| '{utm_source, utm_medium, utm_campaign, referrer}'
                THEN analytics._read_touch(e.properties) END AS touch,
                CASE WHEN 'places' = ANY (p_parts)
                    AND num_nonnulls(e.country, e.region, e.city) > 0
                THEN ARRAY[e.country, e.region, e.city]::text END AS place
            FROM (
                SELECT a.*, NULL::bigint AS scope FROM analytics.events AS a
                WHERE a.occurred_at >= p_since AND a.occurred_at < p_until
                UNION ALL
                SELECT a.*, NULL
                FROM unnest(p_users, p_sinces, p_untils) AS w (user_key, since, until)
                JOIN analytics.events AS a
                    ON a.user_key = w.user_key
                    AND a.occurred_at >= w.since AND a.occurred_at < w.until
                -- Tells the planner which months to leave out.
                WHERE p_scopes IS NULL AND a.occurred_at >= v_first AND a.occurred_at < v_last
                UNION ALL
                SELECT a.*, w.scope
                FROM unnest(p_users, p_scopes, p_sinces, p_untils)
                    AS w (user_key, scope, since, until)
                -- Many short windows anywhere: a look-up each, in any plan.
                CROSS JOIN LATERAL (
                    SELECT known.* FROM analytics.events AS known
                    WHERE known.user_key = w.user_key
                        AND known.occurred_at >= w.since AND known.occurred_at < w.until
                        AND (w.scope = 0 OR known.account_key = abs(w.scope))
                    OFFSET 0
                ) AS a
                WHERE p_scopes IS NOT NULL
            ) AS e
            WHERE e.user_key <> 0 AND (p_account IS NULL OR e.account_id = p_account)
        ) AS o
        ORDER BY CASE WHEN p_scopes IS NOT NULL THEN o.scope END, o.user_key, number,
            o.occurred_at, o.event_id
    ) AS s
    GROUP BY CASE WHEN p_scopes IS NOT NULL THEN s.scope END, s.user_key, s.number;
END
$$;
COMMENT ON FUNCTION analytics._sessions(
    timestamptz, timestamptz, bigint[], bigint[], timestamptz[], timestamptz[], text, text[]
) IS
    'Cuts events into sessions: those of [p_since, p_until) (NULL: none) and, of each of p_users, '
    'those of [since, until), which must not overlap them. For one account or (NULL) for all '
    'together; or, with p_scopes beside p_users, for each user and scope by itself (a or -a: his '
    'events of account a alone; 0: all of them). What p_parts does not name is left out: '
    'users (user_id), pages (page_views, entry_page and exit_page; without them a bounce is one '
    'event), touches (UTM source, medium, campaign and referrer of the first event), places '
    '(country, region, city of the first and last event that has one), steps (event types in '
    'order). Events at one time are in the order of their ids.';

CREATE FUNCTION analytics._session_users_across(p_at timestamptz)
RETURNS bigint[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN ARRAY(
        SELECT e.user_key
        FROM analytics.events AS e
        WHERE e.user_key <> 0
            AND e.occurred_at >= p_at
            AND e.occurred_at < p_at + interval '24 hours'
        GROUP BY e.user_key
        HAVING bit_or(
            1::bigint << floor(extract(epoch FROM e.occurred_at - p_at) / 1800)::integer
        ) = (1::bigint << 48) - 1
    );
END
$$;
COMMENT ON FUNCTION analytics._session_users_across(timestamptz) IS
    'The users who may have gone on from before p_at to 24 hours after it with no gap of more than '
    '30 minutes: who have an event in each half hour. For all others a cut that begins at p_at is '
    'exact from 24 hours after it on.';

CREATE FUNCTION analytics._sessions_between(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_parts text[]
)
RETURNS TABLE (
    scope bigint, user_key bigint, user_id text, started_at timestamptz, ended_at timestamptz,
    events integer, page_views integer, is_bounce boolean, entry_page text, exit_page text,
    touch text[], place text[], last_place text[], steps integer[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_since timestamptz := '-infinity'::timestamptz;
    v_until timestamptz := 'infinity'::timestamptz;
    v_users bigint[] := '{}'::bigint[];
BEGIN
    IF p_from > '0001-01-01 00:00+00' THEN
        v_since := p_from - interval '24 hours';
        v_users := analytics._session_users_across(v_since);
    END IF;
    -- An event more than 24 hours after the start of a session is not part of it.
    IF p_to < '9999-01-01 00:00+00' THEN
        v_until := p_to + interval '24 hours';
    END IF;
    RETURN QUERY
    SELECT s.*
    FROM analytics._sessions(
        v_since, v_until, v_users, NULL,
        array_fill('-infinity'::timestamptz, ARRAY[cardinality(v_users)]),
        array_fill(v_since, ARRAY[cardinality(v_users)]),
        p_account, p_parts
    ) AS s
    WHERE (p_from IS NULL OR s.started_at >= p_from) AND (p_to IS NULL OR s.started_at < p_to);
END
$$;
COMMENT ON FUNCTION analytics._sessions_between(
    timestamptz, timestamptz, text, text[]
) IS
    'The sessions that begin in [p_from, p_to), see _sessions: reads the events of that time and '
    'of 24 hours on either side, and the history only of users who were active throughout.';

CREATE FUNCTION analytics._referrer_host(p_referrer text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN substring(
        lower(p_referrer) FROM '^(?:[a-z][a-z0-9+.-]*://)?(?:[^/?#@]*@)?(?:www\.)?([^/?#:]+)'
    );
END
$$;
COMMENT ON FUNCTION analytics._referrer_host(text) IS
    'The host that a referrer names, without www.; NULL where it names none.';

CREATE FUNCTION analytics._channel(p_touch text[])
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_medium text := translate(lower(p_touch[2]), '_- ', '');
    v_host text;
BEGIN
    IF p_touch IS NULL THEN
        RETURN 'direct';
    ELSIF num_nonnulls(p_touch[1], p_touch[2], p_touch[3]) > 0 THEN
        RETURN CASE
            WHEN v_medium IN ('cpc', 'ppc', 'sem', 'paid', 'paidsearch') THEN 'paid search'
            WHEN v_medium = 'paidsocial' THEN 'paid social'
            WHEN v_medium IN ('display', 'banner', 'cpm') THEN 'display'
            WHEN v_medium IN ('email', 'newsletter') THEN 'email'
            WHEN v_medium IN ('social', 'socialmedia', 'socialnetwork') THEN 'social'
            WHEN v_medium IN ('affiliate', 'affiliates') THEN 'affiliate'
            WHEN v_medium = 'organic' THEN 'organic search'
            WHEN v_medium = 'referral' THEN 'referral'
            ELSE 'other'
        END;
    END IF;
    v_host := analytics._referrer_host(p_touch[4]);
    RETURN CASE
        WHEN v_host ~ (
            '^(?:(?:[a-z]{2}|m|search)\.)?'
            '(?:google|bing|duckduckgo|yahoo|yandex|baidu|ecosia|qwant)\.[a-z]{2,3}(?:\.[a-z]{2})?$'
        ) THEN 'organic search'
        WHEN v_host ~ (
            '^(?:[a-z]{1,3}\.)?'
            '(?:facebook|instagram|linkedin|pinterest|reddit|tiktok|twitter|youtube)\.com$'
        ) OR v_host IN ('t.co', 'x.com', 'lnkd.in', 'youtu.be') THEN 'social'
        ELSE 'referral'
    END;
END
$$;
COMMENT ON FUNCTION analytics._channel(text[]) IS
    'The channel of a touch: by its UTM medium where it has UTM tags, else by the host of its '
    'referrer; direct where there is no touch.';

CREATE FUNCTION analytics._session_label(
    p_breakdown text, p_touch text[], p_place text[], p_entry_page text, p_exit_page text
)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE p_breakdown
        WHEN 'country' THEN p_place[1]
        WHEN 'region' THEN p_place[2]
        WHEN 'city' THEN p_place[3]
        WHEN 'entry_page' THEN p_entry_page
        WHEN 'exit_page' THEN p_exit_page
        WHEN 'utm_source' THEN p_touch[1]
        WHEN 'utm_medium' THEN p_touch[2]
        WHEN 'utm_campaign' THEN p_touch[3]
        WHEN 'channel' THEN analytics._channel(p_touch)
    END;
END
$$;
COMMENT ON FUNCTION analytics._session_label(text, text[], text[], text, text) IS
    'The value of a session in a breakdown of sessions_daily.';

CREATE FUNCTION analytics.sessions(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    user_id text,
    started_at timestamptz,
    ended_at timestamptz,
    seconds double precision,
    events integer,
    page_views integer,
    is_bounce boolean,
    entry_page text,
    exit_page text,
    channel text,
    utm_source text,
    utm_medium text,
    utm_campaign text,
    referrer text,
    country text,
    region text,
    city text,
    last_country text,
    last_region text,
    last_city text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT
        s.user_id, s.started_at, s.ended_at,
        extract(epoch FROM s.ended_at - s.started_at)::double precision,
        s.events, s.page_views, s.is_bounce, s.entry_page, s.exit_page,
        analytics._channel(s.touch), s.touch[1], s.touch[2], s.touch[3], s.touch[4],
        s.place[1], s.place[2], s.place[3], s.last_place[1], s.last_place[2], s.last_place[3]
    FROM analytics._sessions_between(
        p_from, p_to, p_account, '{users, pages, touches, places}'
    ) AS s
    ORDER BY s.started_at, s.user_id;
END
$$;
COMMENT ON FUNCTION analytics.sessions(timestamptz, timestamptz, text) IS
    'The sessions that begin in [p_from, p_to), one row each, exact: a new one begins after a gap '
    'of more than 30 minutes, and with an event more than 24 hours after the start. A bounce has '
    'one page view (event type page_view or $pageview) or, where there are none, one event. Pages '
    'are the property path, else url, else page, of the first and the last page view. UTM tags '
    'and referrer are those of the first event, places those of the first and the last event with '
    'a known one. p_account: of the events of that account alone.';

CREATE FUNCTION analytics.sessions_daily(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL,
    p_breakdown text DEFAULT NULL
)
RETURNS TABLE (
    day date, breakdown text, sessions bigint, users bigint, bounces bigint,
    bounce_rate double precision, mean_seconds double precision, median_seconds double precision,
    events bigint, page_views bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
    v_days date[];
    v_parts text[] := CASE
        WHEN p_breakdown IN ('country', 'region', 'city') THEN '{pages, places}'::text[]
        WHEN p_breakdown IN ('utm_source', 'utm_medium', 'utm_campaign', 'channel')
            THEN '{pages, touches}'::text[]
        ELSE '{pages}'::text[]
    END;
    v_model text := CASE p_breakdown WHEN 'first_touch' THEN 'first' WHEN 'last_touch' THEN 'last'
    END;
    v_users bigint[];
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    IF p_breakdown IS NOT NULL THEN
        PERFORM spectrum._check_choice(
            'p_breakdown', p_breakdown,
            '{country, region, city, entry_page, exit_page, utm_source, utm_medium, utm_campaign, '
            'channel, first_touch, last_touch}'
        );
    END IF;
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts('day', v_from, v_to);
    v_days := spectrum.period_dates(v_starts);
    v_users := ARRAY(
        SELECT DISTINCT e.user_key FROM analytics.event_keys AS e
        WHERE v_model IS NOT NULL AND e.user_key <> 0
            AND e.occurred_at >= v_from AND e.occurred_at < v_to
    );

    RETURN QUERY
    WITH begun AS (
        SELECT
            width_bucket(s.started_at, v_starts) AS number,
            CASE WHEN v_model IS NOT NULL THEN analytics._channel(t.touch)
            ELSE analytics._session_label(
                p_breakdown, s.touch, s.place, s.entry_page, s.exit_page
            ) END AS breakdown,
            user_key, s.is_bounce, extract(epoch FROM s.ended_at - s.started_at) AS seconds,
            s.events, s.page_views
        FROM analytics._sessions_between(p_from, p_to, p_account, v_parts) AS s
        LEFT JOIN analytics._touched_sessions(
            v_users, NULL, p_from, p_to, v_model, p_account
        ) AS t USING (user_key, started_at)
        UNION ALL
        -- A day without sessions is a row too, where there is one row a day.
        SELECT d.number, NULL, NULL, NULL, NULL, NULL, NULL
        FROM generate_series(1, cardinality(v_starts) - 1) AS d (number)
        WHERE p_breakdown IS NULL
    )
    SELECT
        v_days[b.number],
        b.breakdown,
        count(b.user_key),
        count(DISTINCT b.user_key),
        count(*) FILTER (WHERE b.is_bounce),
        avg(b.is_bounce::integer)::double precision,
        avg(b.seconds)::double precision,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY b.seconds::double precision),
        coalesce(sum(b.events), 0),
        coalesce(sum(b.page_views), 0)
    FROM begun AS b
    GROUP BY b.number, b.breakdown
    ORDER BY b.number, b.breakdown;
END
$$;
COMMENT ON FUNCTION analytics.sessions_daily(timestamptz, timestamptz, text, text) IS
    'The sessions that begin in [p_from, p_to) (NULL: from the first event of the account, to the '
    'last of any) by the day of their first event, as analytics.sessions gives them. p_breakdown: '
    'country, region, city (of the first known place), entry_page, exit_page, utm_source, '
    'utm_medium, utm_campaign, channel, first_touch or last_touch (the channel of the first or '
    'last touch in the 30 days up to and including the session). Without one a day without '
    'sessions is a row of zeros, rates and times NULL.';
