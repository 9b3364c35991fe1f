-- Room 72, glass of the sessions: which events a session is made of, and what it counts under.

CREATE FUNCTION analytics._session_values(
    p_breakdowns text[],
    p_account text,
    p_from timestamptz,
    p_to timestamptz,
    p_user bigint
)
RETURNS TABLE (
    user_key bigint, started_at timestamptz, ended_at timestamptz, is_bounce boolean,
    breakdown text, value text
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    -- What touched a session may lie 30 days before it.
    v_from timestamptz := CASE
        WHEN p_breakdowns && '{first_touch, last_touch}' THEN p_from - interval '720 hours'
        ELSE p_from
    END;
    v_parts text[] := '{pages, touches, places}'::text[];
BEGIN
    RETURN QUERY
    WITH visits AS (
        SELECT s.*, array_agg(analytics._channel(s.touch)) FILTER (WHERE s.touch IS NOT NULL) OVER (
                PARTITION BY s.user_key ORDER BY s.started_at
                RANGE BETWEEN interval '720 hours' PRECEDING AND CURRENT ROW
            ) AS channels
        FROM (
            SELECT cut.*
            FROM analytics._sessions_between(v_from, p_to, p_account, v_parts) AS cut
            WHERE p_user IS NULL
            UNION ALL
            SELECT cut.*
            FROM analytics._sessions(
                NULL, NULL, ARRAY[p_user], NULL, '{-infinity}', '{infinity}', p_account, v_parts
            ) AS cut
            WHERE p_user IS NOT NULL
        ) AS s
    )
    SELECT v.user_key, v.started_at, v.ended_at, v.is_bounce, label.breakdown,
        CASE label.breakdown
            WHEN 'first_touch' THEN coalesce(v.channels[1], 'direct')
            WHEN 'last_touch' THEN coalesce(v.channels[cardinality(v.channels)], 'direct')
            ELSE analytics._session_label(
                label.breakdown, v.touch, v.place, v.entry_page, v.exit_page
            )
        END
    FROM visits AS v
    CROSS JOIN unnest(p_breakdowns) AS label (breakdown)
    WHERE v.started_at >= p_from AND v.started_at < p_to;
END
$$;
COMMENT ON FUNCTION analytics._session_values(text[], text, timestamptz, timestamptz, bigint) IS
    'The sessions that begin in [p_from, p_to), of one user or (NULL) of all, cut from the events '
    'of one account or (NULL) of all, with what they count under in some breakdowns. The rule is '
    'that of sessions_daily.';

CREATE FUNCTION analytics._session_breakdowns()
RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT '{all, country, region, city, entry_page, exit_page, utm_source, utm_medium, '
        'utm_campaign, channel, first_touch, last_touch}'::text[]
$$;
COMMENT ON FUNCTION analytics._session_breakdowns() IS 'The breakdowns of sessions_daily.';

CREATE FUNCTION analytics._session_measures(
    p_event text, p_event_type text, p_user_id text, p_started_at timestamptz, p_is_bounce boolean
)
RETURNS TABLE (measure text, unit text, rule text)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 4
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_session text := format('%s %s', p_user_id, p_started_at);
BEGIN
    RETURN QUERY
    SELECT m.measure, m.unit, m.rule
    FROM (
        VALUES
            ('sessions', v_session, 'a session counts once', true),
            ('users', p_user_id, 'a user counts once who has such a session', true),
            ('bounces', v_session, 'a session counts once that has one page view or, where it has '
                'none, one event', p_is_bounce),
            ('events', p_event, 'each event of a session counts', true),
            ('page_views', p_event, 'each page_view or $pageview of a session counts',
                p_event_type IN ('page_view', '$pageview'))
    ) AS m (measure, unit, rule, counts)
    WHERE m.counts;
END
$$;
COMMENT ON FUNCTION analytics._session_measures(text, text, text, timestamptz, boolean) IS
    'The measures of sessions_daily that an event of a session counts in, what it makes count, and '
    'how.';

CREATE FUNCTION analytics._session_rule(p_breakdown text, p_value text, p_day date, p_rule text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('Sessions that begin on %s%s: %s. A session ends after 30 minutes without an '
        'event of its user, or after 24 hours; unknown users have none.', p_day,
        CASE WHEN p_breakdown <> 'all' THEN
            format(', whose %s is %s', p_breakdown, coalesce(p_value, 'unknown'))
        ELSE '' END,
        p_rule);
END
$$;
COMMENT ON FUNCTION analytics._session_rule(text, text, date, text) IS
    'By what sessions_daily counts, in words.';

CREATE FUNCTION analytics._trace_sessions_daily(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day, breakdown}',
        '{sessions, users, bounces, events, page_views}', '{value}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account text := nullif(v_cell ->> 'account_id', '*');
    v_breakdown text := v_cell ->> 'breakdown';
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    PERFORM spectrum._check_choice(
        'p_cell.breakdown', v_breakdown, analytics._session_breakdowns()
    );
    RETURN QUERY
    SELECT analytics._session_rule(v_breakdown, v_cell ->> 'value', v_day, measures.rule),
        measures.unit, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics._session_values(
        ARRAY[v_breakdown], v_account, r_days.since, r_days.until, NULL
    ) AS s
    JOIN analytics.events AS e ON e.user_key = s.user_key
        AND e.occurred_at >= s.started_at AND e.occurred_at <= s.ended_at
    CROSS JOIN LATERAL analytics._session_measures(
        e.event_id::text, e.event_type, e.user_id, s.started_at, s.is_bounce
    ) AS measures
    WHERE s.value IS NOT DISTINCT FROM v_cell ->> 'value'
        -- A session begun on the day is over a day after it.
        AND e.occurred_at >= r_days.since
        AND e.occurred_at < r_days.until + interval '25 hours'
        AND (v_account IS NULL OR e.account_id = v_account)
        AND measures.measure = v_cell ->> 'measure';
END
$$;
COMMENT ON FUNCTION analytics._trace_sessions_daily(jsonb) IS
    'See analytics.trace: events behind a cell of sessions_daily.';

CREATE FUNCTION analytics._cells_sessions_daily(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_strip_nulls(jsonb_build_object('account_id', scope.account_id, 'day', d.day,
            'breakdown', s.breakdown, 'value', s.value, 'measure', measures.measure)),
        analytics._session_rule(s.breakdown, s.value, d.day, measures.rule)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._session_values(
        analytics._session_breakdowns(), nullif(scope.account_id, '*'), '-infinity', 'infinity',
        p_user
    ) AS s
    JOIN analytics.events AS e
        ON e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
    CROSS JOIN LATERAL (SELECT analytics._day_of(s.started_at) AS day OFFSET 0) AS d
    CROSS JOIN LATERAL analytics._session_measures(
        p_event::text, e.event_type, e.user_id, s.started_at, s.is_bounce
    ) AS measures
    WHERE p_user <> 0 AND p_at >= s.started_at AND p_at <= s.ended_at;
END
$$;
COMMENT ON FUNCTION analytics._cells_sessions_daily(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of sessions_daily that count an event.';
