-- Room 60, standing sessions: the sessions of each user, and the sums by day that dashboards read.

CREATE FUNCTION spectrum._create_sessions()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_sessions_daily') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_sessions (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        session_start timestamptz NOT NULL,
        session_end timestamptz NOT NULL,
        events integer NOT NULL,
        page_views integer NOT NULL,
        is_bounce boolean NOT NULL,
        country text,
        region text,
        city text,
        entry_page text,
        exit_page text,
        utm_source text,
        utm_medium text,
        utm_campaign text,
        referrer text,
        channel text NOT NULL,
        first_touch text NOT NULL,
        last_touch text NOT NULL,
        CONSTRAINT rollup_sessions_pkey PRIMARY KEY (report_id, user_key, scope, session_start)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_sessions IS
        'The sessions of each user, as analytics.sessions gives them.';
    COMMENT ON COLUMN spectrum.rollup_sessions.report_id IS 'spectrum.reports, kind sessions.';
    COMMENT ON COLUMN spectrum.rollup_sessions.user_key IS 'dim_users; never the unknown user.';
    COMMENT ON COLUMN spectrum.rollup_sessions.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_sessions.session_start IS 'Time of its first event.';
    COMMENT ON COLUMN spectrum.rollup_sessions.session_end IS 'Time of its last event.';
    COMMENT ON COLUMN spectrum.rollup_sessions.channel IS 'direct: it has no touch.';
    COMMENT ON COLUMN spectrum.rollup_sessions.first_touch IS
        'Channel of the first touch in the 30 days up to and including it, else direct.';
    COMMENT ON COLUMN spectrum.rollup_sessions.last_touch IS 'The same of the last touch.';

    CREATE TABLE analytics.mv_sessions_daily (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        value_key bytea NOT NULL,
        value text,
        sessions bigint NOT NULL,
        users bigint NOT NULL,
        bounces bigint NOT NULL,
        microseconds bigint NOT NULL,
        events bigint NOT NULL,
        page_views bigint NOT NULL,
        CONSTRAINT mv_sessions_daily_pkey
        PRIMARY KEY (report_id, account_id, breakdown, day, value_key)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_sessions_daily IS
        'Sessions per account and day of their start, and for all accounts together (account_id '
        '*), in each breakdown, kept by refreshes. Read it through analytics.sessions_daily.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.report_id IS 'spectrum.reports, kind sessions.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.breakdown IS 'all: no breakdown.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.value_key IS
        'What stands for the value in the key: 16 bytes of its SHA-256. A page may be longer than '
        'an index can hold.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.microseconds IS 'Sum of the durations.';
    PERFORM spectrum._create_sessions_view();
    PERFORM spectrum._add_kind('sessions', 70, '_maintain_sessions',
        '{spectrum.rollup_sessions, analytics.mv_sessions_daily}', '{sessions_daily}');
    PERFORM spectrum._begin_report('sessions');
END
$$;
COMMENT ON FUNCTION spectrum._create_sessions() IS
    'Room 60: makes rollup_sessions, mv_sessions_daily and its plain view.';

CREATE FUNCTION spectrum._create_sessions_view()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.sessions_daily WITH (security_barrier) AS
    SELECT
        sums.account_id,
        sums.day,
        sums.breakdown,
        sums.value,
        sums.sessions,
        sums.users,
        sums.bounces,
        sums.bounces / sums.sessions::double precision AS bounce_rate,
        sums.microseconds / (sums.sessions * 1e6::double precision) AS mean_seconds,
        sums.events,
        sums.page_views,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_sessions_daily AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'sessions' AND report.state = 'served'
    ) AND ((SELECT caller.sees_all FROM warehouse.caller)
        OR sums.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.sessions_daily IS
        'The sessions that begin on a day, per account (* is all), in each breakdown; days without '
        'sessions are no rows.';
    COMMENT ON COLUMN analytics.sessions_daily.breakdown IS
        'all (every session once), country, region, city, entry_page, exit_page, utm_source, '
        'utm_medium, utm_campaign, channel, first_touch or last_touch: filter by one.';
    COMMENT ON COLUMN analytics.sessions_daily.value IS
        'Of the first known place, the first or last page view, the first event; for first_touch '
        'and last_touch the channel of the first or last touch in the 30 days up to and including '
        'the session. NULL unknown, and for all.';
    COMMENT ON COLUMN analytics.sessions_daily.users IS 'Distinct users of these sessions.';
    COMMENT ON COLUMN analytics.sessions_daily.bounces IS
        'Sessions of one page view or, where there are none, of one event.';
    COMMENT ON COLUMN analytics.sessions_daily.bounce_rate IS 'bounces / sessions.';
    COMMENT ON COLUMN analytics.sessions_daily.mean_seconds IS 'From first to last event.';
END
$$;
COMMENT ON FUNCTION spectrum._create_sessions_view() IS
    'Room 60: makes the plain view of the standing sessions.';

CREATE FUNCTION analytics._all_sessions(p_parts text[])
RETURNS TABLE (
    account_id text, user_key bigint, started_at timestamptz, ended_at timestamptz,
    events integer, page_views integer, is_bounce boolean, entry_page text, exit_page text,
    touch text[], place text[], steps integer[]
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    r_units record;
BEGIN
    SELECT array_agg(unit.user_key) AS users, array_agg(-unit.account_key) AS scopes,
        array_agg('-infinity'::timestamptz) AS sinces, array_agg('infinity'::timestamptz) AS untils
    INTO r_units
    FROM (
        SELECT DISTINCT e.user_key, e.account_key FROM analytics.event_keys AS e
        WHERE e.user_key <> 0 AND e.account_key <> 0
    ) AS unit;

    RETURN QUERY
    SELECT coalesce(known.account_id, '*'), s.user_key, s.started_at, s.ended_at, s.events,
        s.page_views, s.is_bounce, s.entry_page, s.exit_page, s.touch, s.place, s.steps
    FROM (
        SELECT cut.*
        FROM analytics._sessions(
            '-infinity', 'infinity', NULL, NULL, NULL, NULL, NULL, p_parts
        ) AS cut
        UNION ALL
        SELECT cut.*
        FROM analytics._sessions(
            NULL, NULL, r_units.users, coalesce(r_units.scopes, '{}'), r_units.sinces,
            r_units.untils, NULL, p_parts
        ) AS cut
    ) AS s
    LEFT JOIN analytics.accounts AS known ON known.account_key = -s.scope;
END
$$;
COMMENT ON FUNCTION analytics._all_sessions(text[]) IS
    'The sessions of all users, cut from all their events (account_id *) and from those of each '
    'account by itself, see _sessions: what standing views are made again from, for verify().';

CREATE FUNCTION analytics._standing_sessions_daily()
RETURNS TABLE (
    account_id text, day date, breakdown text, value text, sessions bigint, users bigint,
    bounces bigint, bounce_rate double precision, mean_seconds double precision, events bigint,
    page_views bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := (
        SELECT h.starts FROM analytics._history_periods('day', NULL, NULL) AS h
    );
    v_days date[] := spectrum.period_dates(v_starts);
BEGIN
    RETURN QUERY
    WITH cut AS (
        SELECT * FROM analytics._all_sessions('{pages, touches, places}')
    ),
    visits AS (
        SELECT cut.*, touches.channels[1] AS first_touch,
            touches.channels[cardinality(touches.channels)] AS last_touch
        FROM (
            SELECT cut.*, array_agg(analytics._channel(cut.touch)) FILTER (
                WHERE cut.touch IS NOT NULL
            ) OVER (
                PARTITION BY cut.account_id, cut.user_key ORDER BY cut.started_at
                RANGE BETWEEN interval '720 hours' PRECEDING AND CURRENT ROW
            ) AS channels
            FROM cut
        ) AS cut
        CROSS JOIN LATERAL (SELECT coalesce(cut.channels, '{direct}') AS channels) AS touches
    )
    SELECT v.account_id, v_days[width_bucket(v.started_at, v_starts)], label.breakdown,
        CASE label.breakdown
            WHEN 'first_touch' THEN v.first_touch
            WHEN 'last_touch' THEN v.last_touch
            ELSE analytics._session_label(
                label.breakdown, v.touch, v.place, v.entry_page, v.exit_page
            )
        END,
        count(*), count(DISTINCT v.user_key), count(*) FILTER (WHERE v.is_bounce),
        count(*) FILTER (WHERE v.is_bounce) / count(*)::double precision,
        (sum(extract(epoch FROM v.ended_at - v.started_at)) * 1000000)::bigint
            / (count(*) * 1e6::double precision),
        sum(v.events), sum(v.page_views)
    FROM visits AS v
    CROSS JOIN unnest(
        '{all, country, region, city, entry_page, exit_page, utm_source, utm_medium, '
        'utm_campaign, channel, first_touch, last_touch}'::text[]
    ) AS label (breakdown)
    GROUP BY 1, 2, 3, 4;
END
$$;
COMMENT ON FUNCTION analytics._standing_sessions_daily() IS
    'What analytics.sessions_daily has to show, cut from all events.';
