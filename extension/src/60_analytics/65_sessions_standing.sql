-- Room 60, standing sessions: the sessions of each user, and the sums by day that dashboards read.
-- A refresh cuts again only the sessions around the news: from the last one that begins no later,
-- to the first one later on that begins after a gap. In between lies an unbroken island of events,
-- where the end of a session after 24 hours moves all that follow.

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
        PRIMARY KEY (report_id, account_id, day, breakdown, value_key)
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
    CREATE VIEW analytics.sessions_daily AS
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
    );
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

CREATE FUNCTION analytics._touch_sessions(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_session_windows (user_key, scope, is_leaving, since, until)
    WITH moments AS (
        SELECT news.user_key, news.scope, news.occurred_at,
            coalesce(news.occurred_at - lag(news.occurred_at) OVER unit > interval '30 minutes',
                true) AS is_apart
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to AND NOT news.is_leaving
        WINDOW unit AS (PARTITION BY news.user_key, news.scope ORDER BY news.occurred_at)
    ),
    bursts AS (
        SELECT user_key, scope, min(occurred_at) AS first_at, max(occurred_at) AS last_at
        FROM (
            SELECT moments.*, count(*) FILTER (WHERE is_apart) OVER (
                PARTITION BY user_key, scope ORDER BY occurred_at
            ) AS number
            FROM moments
        ) AS numbered
        GROUP BY user_key, scope, number
    ),
    windows AS (
        SELECT bursts.user_key, bursts.scope,
            CASE WHEN before.session_end >= bursts.first_at - interval '30 minutes'
                THEN before.session_start ELSE bursts.first_at END AS since,
            coalesce(later.session_start, 'infinity') AS until
        FROM bursts
        LEFT JOIN LATERAL (
            SELECT known.session_start, known.session_end FROM spectrum.rollup_sessions AS known
            WHERE known.report_id = p_report AND known.user_key = bursts.user_key
                AND known.scope = bursts.scope AND known.session_start <= bursts.first_at
            ORDER BY known.session_start DESC
            LIMIT 1
        ) AS before ON true
        LEFT JOIN LATERAL (
            SELECT known.session_start FROM spectrum.rollup_sessions AS known
            WHERE known.report_id = p_report AND known.user_key = bursts.user_key
                AND known.scope = bursts.scope AND known.session_start > bursts.last_at
                AND NOT EXISTS (
                    SELECT FROM warehouse.fact_events AS fact
                    WHERE fact.user_key = bursts.user_key
                        AND fact.occurred_at >= known.session_start - interval '30 minutes'
                        AND fact.occurred_at < known.session_start
                        AND (bursts.scope >= 0 OR fact.account_key = -bursts.scope)
                    OFFSET 0
                )
            ORDER BY known.session_start
            LIMIT 1
        ) AS later ON true
    ),
    disjoint_windows AS (
        SELECT windows.*, coalesce(since >= max(until) OVER (
            PARTITION BY user_key, scope ORDER BY since, until
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), true) AS is_apart
        FROM windows
    )
    SELECT user_key, scope, false, min(since), max(until)
    FROM (
        SELECT disjoint_windows.*, count(*) FILTER (WHERE is_apart) OVER (
            PARTITION BY user_key, scope ORDER BY since, until
        ) AS number
        FROM disjoint_windows
    ) AS numbered
    GROUP BY user_key, scope, number;
END
$$;
COMMENT ON FUNCTION analytics._touch_sessions(integer, bigint) IS
    'Lays out, in pg_temp.spectrum_session_windows, the times [since, until) whose sessions the '
    'news can change. since: the start of the session that a piece of news falls into or follows '
    'within 30 minutes, because a session begins where it does whatever comes later; else the news. '
    'until: of the first one later on with no event in the 30 minutes before, because that begins '
    'there whatever comes earlier.';

CREATE FUNCTION analytics._touch_sessions_whole(p_built_to bigint, p_is_build boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_windows',
        'user_key bigint, scope bigint, is_leaving boolean, since timestamptz, '
        'until timestamptz');
    INSERT INTO pg_temp.spectrum_session_windows (user_key, scope, is_leaving, since, until)
    SELECT DISTINCT news.user_key, news.scope, news.is_leaving,
        '-infinity'::timestamptz, 'infinity'::timestamptz
    FROM pg_temp.spectrum_news AS news
    WHERE (p_is_build OR news.is_leaving) AND news.user_key <> 0 AND news.user_key <= p_built_to;
END
$$;
COMMENT ON FUNCTION analytics._touch_sessions_whole(bigint, boolean) IS
    'Begins pg_temp.spectrum_session_windows with whom the news concern whole: users who leave a '
    'scope, or, in a report that is being built, all.';

CREATE FUNCTION analytics._find_session_changes(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    r_windows record;
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_changes',
        'sign integer, LIKE spectrum.rollup_sessions');
    SELECT array_agg(known.user_key) AS users, array_agg(known.scope) AS scopes,
        array_agg(known.since) AS sinces, array_agg(known.until) AS untils
    INTO r_windows
    FROM pg_temp.spectrum_session_windows AS known
    WHERE NOT known.is_leaving;

    INSERT INTO pg_temp.spectrum_session_changes
    WITH old_sessions AS (
        SELECT known.*
        FROM pg_temp.spectrum_session_windows AS touched
        CROSS JOIN LATERAL (
            SELECT kept.* FROM spectrum.rollup_sessions AS kept
            WHERE kept.report_id = p_report AND kept.user_key = touched.user_key
                AND kept.scope = touched.scope
                AND kept.session_start >= touched.since AND kept.session_start < touched.until
            OFFSET 0
        ) AS known
    ),
    new_sessions AS (
        SELECT p_report, s.user_key, s.scope, s.started_at, s.ended_at, s.events, s.page_views,
            s.is_bounce, s.place[1], s.place[2], s.place[3], s.entry_page, s.exit_page,
            s.touch[1], s.touch[2], s.touch[3], s.touch[4], s.channel,
            coalesce(old.first_touch, s.channel), coalesce(old.last_touch, s.channel)
        FROM (
            SELECT cut.*, analytics._channel(cut.touch) AS channel
            FROM analytics._sessions(
                NULL, NULL, r_windows.users, coalesce(r_windows.scopes, '{}'), r_windows.sinces,
                r_windows.untils, NULL, '{pages, touches, places}'
            ) AS cut
            OFFSET 0
        ) AS s
        LEFT JOIN old_sessions AS old
            ON old.user_key = s.user_key AND old.scope = s.scope AND old.session_start = s.started_at
    )
    SELECT -1, gone.* FROM (TABLE old_sessions EXCEPT TABLE new_sessions) AS gone
    UNION ALL
    SELECT 1, come.* FROM (TABLE new_sessions EXCEPT TABLE old_sessions) AS come;
END
$$;
COMMENT ON FUNCTION analytics._find_session_changes(integer) IS
    'Cuts the windows laid out again and leaves in pg_temp.spectrum_session_changes which sessions '
    'went (-1) and which came (1). A new one''s touches are its own so far.';

CREATE FUNCTION analytics._move_sessions(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    DELETE FROM spectrum.rollup_sessions AS known
    USING pg_temp.spectrum_session_changes AS gone
    WHERE gone.sign < 0 AND known.report_id = p_report AND known.user_key = gone.user_key
        AND known.scope = gone.scope AND known.session_start = gone.session_start
        AND NOT EXISTS (
            SELECT FROM pg_temp.spectrum_session_changes AS come
            WHERE come.sign > 0 AND come.user_key = gone.user_key AND come.scope = gone.scope
                AND come.session_start = gone.session_start
        );
    INSERT INTO spectrum.rollup_sessions AS known (
        report_id, user_key, scope, session_start, session_end, events, page_views, is_bounce,
        country, region, city, entry_page, exit_page, utm_source, utm_medium, utm_campaign,
        referrer, channel, first_touch, last_touch
    )
    SELECT come.report_id, come.user_key, come.scope, come.session_start, come.session_end,
        come.events, come.page_views, come.is_bounce, come.country, come.region, come.city,
        come.entry_page, come.exit_page, come.utm_source, come.utm_medium, come.utm_campaign,
        come.referrer, come.channel, come.first_touch, come.last_touch
    FROM pg_temp.spectrum_session_changes AS come
    WHERE come.sign > 0
    ON CONFLICT (report_id, user_key, scope, session_start) DO UPDATE SET (
        session_end, events, page_views, is_bounce, country, region, city, entry_page, exit_page,
        utm_source, utm_medium, utm_campaign, referrer, channel
    ) = ROW (
        excluded.session_end, excluded.events, excluded.page_views, excluded.is_bounce,
        excluded.country, excluded.region, excluded.city, excluded.entry_page, excluded.exit_page,
        excluded.utm_source, excluded.utm_medium, excluded.utm_campaign, excluded.referrer,
        excluded.channel
    );
END
$$;
COMMENT ON FUNCTION analytics._move_sessions(integer) IS
    'Brings rollup_sessions up to the changes found.';

CREATE FUNCTION analytics._find_touches(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_touches',
        'user_key bigint, scope bigint, session_start timestamptz, first_touch text, '
        'last_touch text');
    INSERT INTO pg_temp.spectrum_session_touches (
        user_key, scope, session_start, first_touch, last_touch
    )
    WITH windows AS (
        SELECT known.*, coalesce(since - interval '1440 hours' > max(until) OVER (
            PARTITION BY user_key, scope ORDER BY since
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), true) AS is_apart
        FROM pg_temp.spectrum_session_windows AS known
        WHERE NOT known.is_leaving
    ),
    spans AS (
        SELECT user_key, scope, min(since) AS since, max(until) + interval '720 hours' AS until
        FROM (
            SELECT windows.*, count(*) FILTER (WHERE is_apart) OVER (
                PARTITION BY user_key, scope ORDER BY since
            ) AS number
            FROM windows
        ) AS numbered
        GROUP BY user_key, scope, number
    ),
    near_sessions AS (
        SELECT spans.since, known.*
        FROM spans
        CROSS JOIN LATERAL (
            SELECT kept.user_key, kept.scope, kept.session_start, kept.channel, kept.first_touch,
                kept.last_touch
            FROM spectrum.rollup_sessions AS kept
            WHERE kept.report_id = p_report AND kept.user_key = spans.user_key
                AND kept.scope = spans.scope AND kept.session_start < spans.until
                AND kept.session_start >= spans.since - interval '720 hours'
            OFFSET 0
        ) AS known
    ),
    touches AS (
        SELECT user_key, scope, since, array_agg(session_start ORDER BY session_start) AS starts,
            array_agg(channel ORDER BY session_start) AS channels
        FROM near_sessions
        WHERE channel <> 'direct'
        GROUP BY user_key, scope, since
    ),
    found AS (
        SELECT near.user_key, near.scope, near.session_start,
            near.first_touch AS old_first_touch, near.last_touch AS old_last_touch,
            CASE WHEN place.first <= place.last THEN touches.channels[place.first] ELSE 'direct'
            END AS first_touch,
            CASE WHEN place.first <= place.last THEN touches.channels[place.last] ELSE 'direct'
            END AS last_touch
        FROM near_sessions AS near
        LEFT JOIN touches USING (user_key, scope, since)
        CROSS JOIN LATERAL (
            SELECT width_bucket(near.session_start, touches.starts) AS last, 1 + width_bucket(
                near.session_start - interval '720 hours 1 us', touches.starts
            ) AS first
        ) AS place
        WHERE near.session_start >= near.since
    )
    SELECT user_key, scope, session_start, first_touch, last_touch
    FROM found
    WHERE (first_touch, last_touch) <> (old_first_touch, old_last_touch);
END
$$;
COMMENT ON FUNCTION analytics._find_touches(integer) IS
    'Leaves in pg_temp.spectrum_session_touches which sessions have another first or last touch '
    'than rollup_sessions says: of those cut again, and of those in the 30 days after.';

CREATE FUNCTION analytics._move_touches(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_session_changes
    SELECT version.sign, known.*
    FROM pg_temp.spectrum_session_touches AS touched
    CROSS JOIN LATERAL (
        SELECT kept.* FROM spectrum.rollup_sessions AS kept
        WHERE kept.report_id = p_report AND kept.user_key = touched.user_key
            AND kept.scope = touched.scope AND kept.session_start = touched.session_start
        OFFSET 0
    ) AS known
    CROSS JOIN (VALUES (-1), (1)) AS version (sign)
    WHERE NOT EXISTS (
        SELECT FROM pg_temp.spectrum_session_changes AS come
        WHERE come.sign > 0 AND come.user_key = touched.user_key AND come.scope = touched.scope
            AND come.session_start = touched.session_start
    );
    UPDATE pg_temp.spectrum_session_changes AS come
    SET first_touch = touched.first_touch, last_touch = touched.last_touch
    FROM pg_temp.spectrum_session_touches AS touched
    WHERE come.sign > 0 AND come.user_key = touched.user_key AND come.scope = touched.scope
        AND come.session_start = touched.session_start;
    UPDATE spectrum.rollup_sessions AS known
    SET first_touch = touched.first_touch, last_touch = touched.last_touch
    FROM pg_temp.spectrum_session_touches AS touched
    WHERE known.report_id = p_report AND known.user_key = touched.user_key
        AND known.scope = touched.scope AND known.session_start = touched.session_start;
END
$$;
COMMENT ON FUNCTION analytics._move_touches(integer) IS
    'Brings the changes found and rollup_sessions up to the touches found.';

CREATE FUNCTION analytics._lay_out_session_cells(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_cells',
        'account_id text COLLATE "C", day date, breakdown text COLLATE "C", value_key bytea, '
        'value text, sessions bigint, users bigint, bounces bigint, microseconds bigint, '
        'events bigint, page_views bigint');
    SELECT spectrum.period_starts(
        'day', min(changed.session_start), max(changed.session_start) + interval '1 us'
    ) INTO v_starts
    FROM pg_temp.spectrum_session_changes AS changed;
    v_days := analytics._period_dates(v_starts);

    INSERT INTO pg_temp.spectrum_session_cells (
        account_id, day, breakdown, value_key, value, sessions, users, bounces, microseconds,
        events, page_views
    )
    WITH changes AS (
        SELECT changed.*, width_bucket(changed.session_start, v_starts) AS number
        FROM pg_temp.spectrum_session_changes AS changed
    ),
    -- Who has other sessions on the day, that stayed as they are, is one of its users anyway.
    others AS (
        SELECT 0 AS sign, known.*, days.number
        FROM (SELECT DISTINCT user_key, scope, number FROM changes) AS days
        CROSS JOIN LATERAL (
            SELECT kept.* FROM spectrum.rollup_sessions AS kept
            WHERE kept.report_id = p_report AND kept.user_key = days.user_key
                AND kept.scope = days.scope AND kept.session_start >= v_starts[days.number]
                AND kept.session_start < v_starts[days.number + 1]
            OFFSET 0
        ) AS known
        WHERE NOT EXISTS (
            SELECT FROM changes
            WHERE changes.sign > 0 AND changes.user_key = known.user_key
                AND changes.scope = known.scope AND changes.session_start = known.session_start
        )
    ),
    cells_of_users AS (
        SELECT version.scope, version.number, label.breakdown, label.value,
            sum(version.sign) AS sessions,
            bool_or(version.sign >= 0)::integer - bool_or(version.sign <= 0)::integer AS users,
            sum(version.sign) FILTER (WHERE version.is_bounce) AS bounces,
            sum(version.sign * version.microseconds)::bigint AS microseconds,
            sum(version.sign * version.events) AS events,
            sum(version.sign * version.page_views) AS page_views
        FROM (
            SELECT versions.*,
                (extract(epoch FROM session_end - session_start) * 1000000)::bigint AS microseconds
            FROM (TABLE changes UNION ALL TABLE others) AS versions
        ) AS version
        CROSS JOIN LATERAL (
            VALUES ('all', NULL), ('country', version.country), ('region', version.region),
                ('city', version.city), ('entry_page', version.entry_page),
                ('exit_page', version.exit_page), ('utm_source', version.utm_source),
                ('utm_medium', version.utm_medium), ('utm_campaign', version.utm_campaign),
                ('channel', version.channel), ('first_touch', version.first_touch),
                ('last_touch', version.last_touch)
        ) AS label (breakdown, value)
        GROUP BY version.user_key, version.scope, version.number, label.breakdown, label.value
    )
    SELECT scopes.account_id, v_days[cell.number], cell.breakdown,
        coalesce(substring(sha256(convert_to(cell.value, 'UTF8')) FOR 16), ''), cell.value,
        sum(cell.sessions), sum(cell.users), coalesce(sum(cell.bounces), 0),
        sum(cell.microseconds), sum(cell.events), sum(cell.page_views)
    FROM cells_of_users AS cell
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, cell.number, cell.breakdown, cell.value
    HAVING bool_or(cell.events <> 0 OR cell.sessions <> 0 OR cell.users <> 0
        OR cell.microseconds <> 0 OR cell.page_views <> 0 OR cell.bounces <> 0);
END
$$;
COMMENT ON FUNCTION analytics._lay_out_session_cells(integer) IS
    'Lays out, in pg_temp.spectrum_session_cells, by how much the changes found move the sums.';

CREATE FUNCTION analytics._maintain_sessions(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_is_build boolean := p_built_to = 9223372036854775807 AND EXISTS (
        SELECT FROM spectrum.reports WHERE report_id = p_report AND state = 'building'
    );
BEGIN
    PERFORM analytics._touch_sessions_whole(p_built_to, v_is_build);
    IF NOT v_is_build THEN
        PERFORM analytics._touch_sessions(p_report, p_built_to);
    END IF;
    PERFORM analytics._find_session_changes(p_report);
    PERFORM analytics._move_sessions(p_report);
    PERFORM analytics._find_touches(p_report);
    PERFORM analytics._move_touches(p_report);
    PERFORM analytics._lay_out_session_cells(p_report);

    INSERT INTO analytics.mv_sessions_daily AS sums (
        report_id, account_id, day, breakdown, value_key, value, sessions, users, bounces,
        microseconds, events, page_views
    )
    SELECT p_report, cell.account_id, cell.day, cell.breakdown, cell.value_key, cell.value,
        cell.sessions, cell.users, cell.bounces, cell.microseconds, cell.events, cell.page_views
    FROM pg_temp.spectrum_session_cells AS cell
    ON CONFLICT (report_id, account_id, day, breakdown, value_key) DO UPDATE SET
        sessions = sums.sessions + excluded.sessions,
        users = sums.users + excluded.users,
        bounces = sums.bounces + excluded.bounces,
        microseconds = sums.microseconds + excluded.microseconds,
        events = sums.events + excluded.events,
        page_views = sums.page_views + excluded.page_views;
    DELETE FROM analytics.mv_sessions_daily AS sums
    USING pg_temp.spectrum_session_cells AS cell
    WHERE cell.sessions < 0 AND sums.report_id = p_report AND sums.account_id = cell.account_id
        AND sums.day = cell.day AND sums.breakdown = cell.breakdown
        AND sums.value_key = cell.value_key AND sums.sessions = 0;
END
$$;
COMMENT ON FUNCTION analytics._maintain_sessions(integer, bigint) IS
    'Moves rollup_sessions and mv_sessions_daily by the news.';

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
    v_days date[] := analytics._period_dates(v_starts);
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
    WITH cut AS (
        SELECT '*' AS account_id, s.*
        FROM analytics._sessions(
            '-infinity', 'infinity', NULL, NULL, NULL, NULL, NULL, '{pages, touches, places}'
        ) AS s
        UNION ALL
        SELECT accounts.account_id, s.*
        FROM analytics._sessions(
            NULL, NULL, r_units.users, coalesce(r_units.scopes, '{}'), r_units.sinces,
            r_units.untils, NULL, '{pages, touches, places}'
        ) AS s
        JOIN analytics.accounts ON accounts.account_key = -s.scope
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
