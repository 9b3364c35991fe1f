-- Room 60, standing sessions, how they are kept: a refresh cuts again only the sessions around the
-- news, from the one that they fall into or follow, to the first one later on that begins after a
-- gap. In between lies an unbroken island of events, where the end of a session after 24 hours
-- moves all that follow. What changed about sessions moves the sums.

CREATE FUNCTION analytics._touch_sessions(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_session_windows (user_key, scope, since, until)
    WITH moments AS (
        SELECT news.user_key, news.scope, news.occurred_at,
            coalesce(news.occurred_at - lag(news.occurred_at) OVER unit > interval '30 minutes',
                true) AS is_apart
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
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
            SELECT known.session_start, known.session_end
            FROM spectrum.rollup_sessions AS known
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
                        AND (bursts.scope = 0 OR fact.account_key = abs(bursts.scope))
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
    SELECT user_key, scope, min(since), max(until)
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
    'news can change. since: the start of the session that the news fall into or follow within 30 '
    'minutes, because a session begins where it does whatever comes later; else the news. until: '
    'the first start later on with no event in the 30 minutes before, because a session begins '
    'there whatever comes earlier.';

CREATE FUNCTION analytics._touch_sessions_whole(p_is_build boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_windows',
        'user_key bigint, scope bigint, since timestamptz, until timestamptz');
    INSERT INTO pg_temp.spectrum_session_windows (user_key, scope, since, until)
    SELECT DISTINCT news.user_key, news.scope, spectrum._facts_from(), 'infinity'::timestamptz
    FROM pg_temp.spectrum_news AS news
    WHERE p_is_build AND news.user_key <> 0;
END
$$;
COMMENT ON FUNCTION analytics._touch_sessions_whole(boolean) IS
    'Begins pg_temp.spectrum_session_windows, in a report that is being built with all there is of '
    'the users.';

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
    FROM pg_temp.spectrum_session_windows AS known;

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
            ON old.user_key = s.user_key AND old.scope = s.scope
                AND old.session_start = s.started_at
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
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_material = off
AS $$
BEGIN
    MERGE INTO spectrum.rollup_sessions AS known
    USING (
        SELECT DISTINCT ON (changed.user_key, changed.scope, changed.session_start) changed.*
        FROM pg_temp.spectrum_session_changes AS changed
        ORDER BY changed.user_key, changed.scope, changed.session_start, changed.sign DESC
    ) AS come
    ON known.report_id = p_report AND known.user_key = come.user_key
        AND known.scope = come.scope AND known.session_start = come.session_start
    WHEN MATCHED AND come.sign < 0 THEN DELETE
    WHEN MATCHED THEN UPDATE SET
        session_end = come.session_end,
        events = come.events,
        page_views = come.page_views,
        is_bounce = come.is_bounce,
        country = come.country,
        region = come.region,
        city = come.city,
        entry_page = come.entry_page,
        exit_page = come.exit_page,
        utm_source = come.utm_source,
        utm_medium = come.utm_medium,
        utm_campaign = come.utm_campaign,
        referrer = come.referrer,
        channel = come.channel
    WHEN NOT MATCHED AND come.sign > 0 THEN INSERT (
        report_id, user_key, scope, session_start, session_end, events, page_views, is_bounce,
        country, region, city, entry_page, exit_page, utm_source, utm_medium, utm_campaign,
        referrer, channel, first_touch, last_touch
    ) VALUES (
        come.report_id, come.user_key, come.scope, come.session_start, come.session_end,
        come.events, come.page_views, come.is_bounce, come.country, come.region, come.city,
        come.entry_page, come.exit_page, come.utm_source, come.utm_medium, come.utm_campaign,
        come.referrer, come.channel, come.first_touch, come.last_touch
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
    -- Where no session that came or went has a touch, nor the one before it had, all stay direct.
    WITH units AS (
        SELECT DISTINCT changed.user_key, changed.scope
        FROM pg_temp.spectrum_session_changes AS changed
        LEFT JOIN LATERAL (
            SELECT known.last_touch FROM spectrum.rollup_sessions AS known
            WHERE known.report_id = p_report AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.session_start < changed.session_start
            ORDER BY known.session_start DESC
            LIMIT 1
        ) AS before ON changed.sign > 0
        WHERE before.last_touch <> 'direct'
            OR (changed.channel, changed.first_touch, changed.last_touch)
                <> ('direct', 'direct', 'direct')
    ),
    windows AS (
        SELECT known.*, coalesce(since - interval '1440 hours' > max(until) OVER (
            PARTITION BY user_key, scope ORDER BY since
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), true) AS is_apart
        FROM pg_temp.spectrum_session_windows AS known
        JOIN units USING (user_key, scope)
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
    v_days := spectrum.period_dates(v_starts);

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

CREATE FUNCTION analytics._move_session_sums(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_material = off
AS $$
BEGIN
    MERGE INTO analytics.mv_sessions_daily AS sums
    USING pg_temp.spectrum_session_cells AS cell
    ON sums.report_id = p_report AND sums.account_id = cell.account_id AND sums.day = cell.day
        AND sums.breakdown = cell.breakdown AND sums.value_key = cell.value_key
    WHEN MATCHED THEN UPDATE SET
        sessions = sums.sessions + cell.sessions,
        users = sums.users + cell.users,
        bounces = sums.bounces + cell.bounces,
        microseconds = sums.microseconds + cell.microseconds,
        events = sums.events + cell.events,
        page_views = sums.page_views + cell.page_views
    WHEN NOT MATCHED THEN INSERT (
        report_id, account_id, day, breakdown, value_key, value, sessions, users, bounces,
        microseconds, events, page_views
    ) VALUES (
        p_report, cell.account_id, cell.day, cell.breakdown, cell.value_key, cell.value,
        cell.sessions, cell.users, cell.bounces, cell.microseconds, cell.events, cell.page_views
    );
    DELETE FROM analytics.mv_sessions_daily AS sums
    USING pg_temp.spectrum_session_cells AS cell
    WHERE cell.sessions < 0 AND sums.report_id = p_report AND sums.account_id = cell.account_id
        AND sums.day = cell.day AND sums.breakdown = cell.breakdown
        AND sums.value_key = cell.value_key AND sums.sessions = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_session_sums(integer) IS
    'Moves mv_sessions_daily by the cells laid out.';

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
    PERFORM analytics._touch_sessions_whole(v_is_build);
    IF NOT v_is_build THEN
        PERFORM analytics._touch_sessions(p_report, p_built_to);
    END IF;
    PERFORM analytics._find_session_changes(p_report);
    PERFORM analytics._move_sessions(p_report);
    PERFORM analytics._find_touches(p_report);
    PERFORM analytics._move_touches(p_report);
    PERFORM analytics._lay_out_session_cells(p_report);
    PERFORM analytics._move_session_sums(p_report);
END
$$;
COMMENT ON FUNCTION analytics._maintain_sessions(integer, bigint) IS
    'Moves rollup_sessions and mv_sessions_daily by the news.';
