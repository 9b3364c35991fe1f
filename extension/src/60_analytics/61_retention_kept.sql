-- Room 60, standing retentions, how they are kept: the periods in which a user started and came
-- back are laid out as they were and as they are, and the cohorts move by the difference. Where any
-- event counts they come from rollup_user_days, else from days of their own.

CREATE FUNCTION analytics._known_periods(p_period text)
RETURNS date[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- By the event types, of which there are few: a day more on both sides, since the day of an
    -- instant depends on the time zone.
    RETURN ARRAY(
        SELECT start::date
        FROM (
            SELECT min(dim.first_seen) AS first_at, max(dim.last_seen) AS last_at
            FROM warehouse.dim_event_types AS dim
        ) AS known
        CROSS JOIN analytics.settings AS setting
        CROSS JOIN LATERAL generate_series(
            spectrum._period_day(p_period, known.first_at AT TIME ZONE setting.timezone
                - interval '1 day', setting.week_start),
            known.last_at AT TIME ZONE setting.timezone + interval '1 day',
            ('1 ' || p_period)::interval
        ) AS start
    );
END
$$;
COMMENT ON FUNCTION analytics._known_periods(text) IS
    'First days of all calendar periods that hold events, ascending and without a gap: a day is in '
    'period width_bucket(day, periods).';

CREATE FUNCTION analytics._retention_by_user_days(
    p_activity integer,
    p_built_to bigint,
    p_period text,
    p_reach integer,
    p_is_build boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
BEGIN
    IF p_is_build THEN
        -- All that the chunk's users did is new to a report that is being built.
        PERFORM spectrum._empty_temporary('spectrum_day_changes',
            'user_key bigint, scope bigint, day date, is_added boolean');
        INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
        SELECT known.user_key, known.scope, known.day, true
        FROM pg_temp.spectrum_units
        JOIN spectrum.rollup_user_days AS known USING (user_key, scope)
        WHERE known.report_id = p_activity;
    END IF;

    INSERT INTO pg_temp.spectrum_retention_periods (
        sign, user_key, scope, period, first_start, last_return
    )
    WITH moved AS (
        SELECT user_key, scope, width_bucket(day, v_starts) AS number,
            sum(CASE WHEN is_added THEN 1 ELSE -1 END) AS days
        FROM pg_temp.spectrum_day_changes
        WHERE user_key <= p_built_to
        GROUP BY user_key, scope, number
    ),
    -- Users of whom a period became active, or no longer is.
    users AS (
        SELECT DISTINCT moved.user_key, moved.scope
        FROM moved
        CROSS JOIN LATERAL (
            SELECT count(*) AS days FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_activity AND known.user_key = moved.user_key
                AND known.scope = moved.scope AND known.day >= v_starts[moved.number]
                AND known.day < coalesce(v_starts[moved.number + 1], 'infinity')
            OFFSET 0
        ) AS now
        LEFT JOIN LATERAL (
            SELECT known.day FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_activity AND known.user_key = moved.user_key
                AND known.scope = moved.scope
            ORDER BY known.day
            LIMIT 1
        ) AS first ON p_reach IS NOT NULL
        WHERE (now.days = 0) <> (now.days = moved.days)
            AND (moved.number > width_bucket(first.day, v_starts) + p_reach) IS NOT TRUE
    ),
    periods AS (
        SELECT users.user_key, users.scope, width_bucket(known.day, v_starts) AS number,
            count(*) AS days
        FROM users
        CROSS JOIN LATERAL (
            SELECT near.day FROM spectrum.rollup_user_days AS near
            WHERE near.report_id = p_activity AND near.user_key = users.user_key
                AND near.scope = users.scope
            OFFSET 0
        ) AS known
        GROUP BY users.user_key, users.scope, number
    )
    SELECT version.sign, user_key, scope, v_starts[number], '-infinity', 'infinity'
    FROM periods
    FULL JOIN (SELECT moved.* FROM moved JOIN users USING (user_key, scope)) AS moved
        USING (user_key, scope, number)
    CROSS JOIN LATERAL (
        VALUES (1, coalesce(periods.days, 0)),
            (-1, coalesce(periods.days, 0) - coalesce(moved.days, 0))
    ) AS version (sign, days)
    WHERE version.days > 0;
END
$$;
COMMENT ON FUNCTION analytics._retention_by_user_days(
    integer, bigint, text, integer, boolean
) IS
    'Lays out the periods of users of whom one became active or inactive: for retentions of any '
    'events, where each event is a start and a return. p_reach: how many periods after a user''s '
    'first one can count; NULL: all.';

CREATE FUNCTION analytics._event_key(p_event text)
RETURNS integer
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_event IS NOT NULL THEN coalesce((
        SELECT types.event_type_key FROM analytics.event_types AS types
        WHERE types.event_type = p_event
    ), -1) END;
END
$$;
COMMENT ON FUNCTION analytics._event_key(text) IS
    'Key of an event type: NULL for NULL, which stands for any, -1 for one never seen.';

CREATE FUNCTION analytics._move_retention_days(
    p_report integer,
    p_built_to bigint,
    p_start_key integer,
    p_return_key integer,
    p_filter jsonb
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_any boolean := p_start_key IS NULL OR p_return_key IS NULL;
    v_starts timestamptz[];
    v_days date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_retention_days',
        'user_key bigint, scope bigint, day date, old_start timestamptz, old_return timestamptz, '
        'new_start timestamptz, new_return timestamptz');
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;

    INSERT INTO pg_temp.spectrum_retention_days (
        user_key, scope, day, old_start, old_return, new_start, new_return
    )
    SELECT touched.user_key, touched.scope, v_days[touched.number], known.first_start,
        known.last_return, found.first_start, found.last_return
    FROM (
        SELECT DISTINCT news.user_key, news.scope,
            width_bucket(news.occurred_at, v_starts) AS number
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
            AND (v_any OR news.event_type_key IN (p_start_key, p_return_key))
    ) AS touched
    LEFT JOIN LATERAL (
        SELECT before.first_start, before.last_return
        FROM spectrum.rollup_retention_days AS before
        WHERE before.report_id = p_report AND before.user_key = touched.user_key
            AND before.scope = touched.scope AND before.day = v_days[touched.number]
        OFFSET 0
    ) AS known ON true
    LEFT JOIN LATERAL (
        SELECT
            min(fact.occurred_at) FILTER (
                WHERE p_start_key IS NULL OR fact.event_type_key = p_start_key) AS first_start,
            max(fact.occurred_at) FILTER (
                WHERE p_return_key IS NULL OR fact.event_type_key = p_return_key) AS last_return
        FROM warehouse.fact_events AS fact
        WHERE fact.user_key = touched.user_key
            AND fact.occurred_at >= v_starts[touched.number]
            AND fact.occurred_at < v_starts[touched.number + 1]
            AND (v_any OR fact.event_type_key IN (p_start_key, p_return_key))
            AND (touched.scope = 0 OR fact.account_key = abs(touched.scope))
            AND (p_filter IS NULL OR fact.properties @> p_filter)
        OFFSET 0
    ) AS found ON true
    WHERE (known.first_start, known.last_return)
        IS DISTINCT FROM (found.first_start, found.last_return);

    DELETE FROM spectrum.rollup_retention_days AS known
    USING pg_temp.spectrum_retention_days AS changed
    WHERE known.report_id = p_report AND known.user_key = changed.user_key
        AND known.scope = changed.scope AND known.day = changed.day;
    INSERT INTO spectrum.rollup_retention_days (
        report_id, user_key, scope, day, first_start, last_return
    )
    SELECT p_report, user_key, scope, day, new_start, new_return
    FROM pg_temp.spectrum_retention_days
    WHERE new_start IS NOT NULL OR new_return IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._move_retention_days(integer, bigint, integer, integer, jsonb) IS
    'Brings rollup_retention_days up to the news and leaves in pg_temp.spectrum_retention_days '
    'which days changed, from what to what.';

CREATE FUNCTION analytics._retention_by_events(
    p_report integer,
    p_period text,
    p_reach integer
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
BEGIN
    INSERT INTO pg_temp.spectrum_retention_periods (
        sign, user_key, scope, period, first_start, last_return
    )
    WITH users AS (
        SELECT DISTINCT changed.user_key, changed.scope
        FROM pg_temp.spectrum_retention_days AS changed
        LEFT JOIN LATERAL (
            SELECT known.day FROM spectrum.rollup_retention_days AS known
            WHERE known.report_id = p_report AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.first_start IS NOT NULL
            ORDER BY known.day
            LIMIT 1
        ) AS first ON p_reach IS NOT NULL
        WHERE (width_bucket(changed.day, v_starts) > width_bucket(first.day, v_starts) + p_reach)
            IS NOT TRUE
    ),
    days AS (
        SELECT users.user_key, users.scope, known.day, known.first_start, known.last_return,
            changed.day IS NOT NULL AS is_changed
        FROM users
        CROSS JOIN LATERAL (
            SELECT near.day, near.first_start, near.last_return
            FROM spectrum.rollup_retention_days AS near
            WHERE near.report_id = p_report AND near.user_key = users.user_key
                AND near.scope = users.scope
            OFFSET 0
        ) AS known
        LEFT JOIN pg_temp.spectrum_retention_days AS changed
            ON changed.user_key = users.user_key AND changed.scope = users.scope
                AND changed.day = known.day
    )
    SELECT version.sign, version.user_key, version.scope,
        v_starts[width_bucket(version.day, v_starts)] AS period,
        min(version.first_start), max(version.last_return)
    FROM (
        SELECT 1 AS sign, user_key, scope, day, first_start, last_return FROM days
        UNION ALL
        SELECT -1, user_key, scope, day, first_start, last_return FROM days WHERE NOT is_changed
        UNION ALL
        SELECT -1, user_key, scope, day, old_start, old_return
        FROM pg_temp.spectrum_retention_days
        JOIN users USING (user_key, scope)
        WHERE old_start IS NOT NULL OR old_return IS NOT NULL
    ) AS version
    GROUP BY version.sign, version.user_key, version.scope, period;
END
$$;
COMMENT ON FUNCTION analytics._retention_by_events(integer, text, integer) IS
    'Lays out the periods of users of whom a day changed: for retentions of certain events. '
    'p_reach: as above.';

CREATE FUNCTION analytics._shown_periods(
    p_period text,
    p_periods integer,
    OUT first_number integer,
    OUT ends_at timestamptz[]
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT width_bucket(min(moved.period), analytics._known_periods(p_period)),
        (spectrum.period_starts(
            p_period,
            spectrum._day_start(min(moved.period), min(setting.timezone)),
            spectrum._day_start(max(moved.period) + (p_periods + 1) * ('1 ' || p_period)::interval,
                min(setting.timezone))
        ))[2:]
    INTO first_number, ends_at
    FROM pg_temp.spectrum_retention_periods AS moved
    CROSS JOIN analytics.settings AS setting;
END
$$;
COMMENT ON FUNCTION analytics._shown_periods(text, integer) IS
    'The periods from the first one laid out to p_periods after the last: the number of the first '
    'among all known periods, and when each ends.';

CREATE FUNCTION analytics._move_retention_cohorts(
    p_report integer,
    p_period text,
    p_periods integer,
    p_is_recurring boolean,
    p_is_on boolean,
    p_start_returns boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
    r_shown record := analytics._shown_periods(p_period, p_periods);
BEGIN
    WITH periods AS MATERIALIZED (
        SELECT sign, user_key, scope, width_bucket(period, v_starts) AS number,
            first_start IS NOT NULL AS has_start,
            last_return IS NOT NULL AS has_return,
            -- Where each start is a return itself, there is a return at or after it.
            first_start IS NOT NULL AND (p_start_returns OR coalesce(last_return >= first_start,
                false)) AS has_return_after
        FROM pg_temp.spectrum_retention_periods
    ),
    users AS (
        SELECT sign, user_key, scope, min(number) FILTER (WHERE has_start) AS first_number,
            max(number) FILTER (WHERE has_return) AS last_number
        FROM periods
        GROUP BY sign, user_key, scope
    ),
    cohorts AS MATERIALIZED (
        SELECT periods.sign, periods.user_key, periods.scope, periods.number,
            periods.has_return_after, users.last_number
        FROM periods
        JOIN users USING (sign, user_key, scope)
        WHERE periods.has_start AND (p_is_recurring OR periods.number = users.first_number)
    ),
    contributions AS (
        SELECT sign, scope, number AS cohort, -1 AS k FROM cohorts
        UNION ALL
        SELECT sign, scope, number, 0 FROM cohorts
        WHERE has_return_after AND (p_is_on OR last_number <= number)
        UNION ALL
        SELECT cohorts.sign, cohorts.scope, cohorts.number, later.number - cohorts.number
        FROM cohorts
        JOIN periods AS later USING (sign, user_key, scope)
        WHERE p_is_on AND later.has_return
            AND later.number > cohorts.number AND later.number <= cohorts.number + p_periods
        UNION ALL
        SELECT cohorts.sign, cohorts.scope, cohorts.number, k
        FROM cohorts
        CROSS JOIN generate_series(0, least(cohorts.last_number - cohorts.number, p_periods)) AS k
        WHERE NOT p_is_on AND cohorts.last_number > cohorts.number
    ),
    moves AS (
        SELECT scopes.account_id, cells.cohort, cells.k, sum(cells.users)::bigint AS users
        FROM (
            SELECT scope, cohort, k, sum(sign) AS users FROM contributions
            GROUP BY scope, cohort, k HAVING sum(sign) <> 0
        ) AS cells
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cells.cohort, cells.k
    )
    INSERT INTO analytics.mv_retention_cohorts AS sums (
        report_id, account_id, cohort, cohort_size, users, period_ends
    )
    SELECT p_report, filled.account_id, v_starts[filled.cohort],
        sum(filled.users) FILTER (WHERE filled.k = -1),
        array_agg(filled.users ORDER BY filled.k) FILTER (WHERE filled.k >= 0),
        r_shown.ends_at[filled.cohort - r_shown.first_number + 1
            : filled.cohort - r_shown.first_number + p_periods + 1]
    FROM (
        SELECT moves.account_id, moves.cohort, k.number AS k,
            coalesce(sum(moves.users) FILTER (WHERE moves.k = k.number), 0)::bigint AS users
        FROM moves
        CROSS JOIN generate_series(-1, p_periods) AS k (number)
        GROUP BY moves.account_id, moves.cohort, k.number
    ) AS filled
    GROUP BY filled.account_id, filled.cohort
    ON CONFLICT (report_id, account_id, cohort) DO UPDATE SET
        cohort_size = sums.cohort_size + excluded.cohort_size,
        users = spectrum._add_arrays(sums.users, excluded.users);

    DELETE FROM analytics.mv_retention_cohorts WHERE report_id = p_report AND cohort_size = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_retention_cohorts(
    integer, text, integer, boolean, boolean, boolean
) IS
    'Moves mv_retention_cohorts by the periods laid out, as they were and as they are. The rule is '
    'that of analytics._retention_cohorts.';

CREATE FUNCTION analytics._maintain_retention(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_retention record;
    v_start_key integer;
    v_return_key integer;
    v_reach integer;
BEGIN
    SELECT definition.*, report.state = 'building' AND p_built_to = 9223372036854775807 AS is_build
    INTO r_retention
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.retentions, report.definition)
        AS definition
    WHERE report.report_id = p_report;
    v_start_key := analytics._event_key(r_retention.start_event);
    v_return_key := analytics._event_key(r_retention.return_event);
    -- Of a first cohort, what comes later than the periods shown moves none of them.
    IF r_retention.cohort_kind = 'first' AND r_retention.mode = 'on' THEN
        v_reach := r_retention.periods;
    END IF;
    PERFORM spectrum._empty_temporary('spectrum_retention_periods',
        'sign integer, user_key bigint, scope bigint, period date, first_start timestamptz, '
        'last_return timestamptz');

    IF v_start_key IS NULL AND v_return_key IS NULL AND r_retention.properties_filter IS NULL THEN
        PERFORM analytics._retention_by_user_days(
            (SELECT max(report_id) FROM spectrum.reports
            WHERE kind = 'activity' AND state <> 'discarded'),
            p_built_to, r_retention.period_kind, v_reach, r_retention.is_build
        );
    ELSE
        PERFORM analytics._move_retention_days(
            p_report, p_built_to, v_start_key, v_return_key, r_retention.properties_filter
        );
        PERFORM analytics._retention_by_events(p_report, r_retention.period_kind, v_reach);
    END IF;
    PERFORM analytics._move_retention_cohorts(
        p_report, r_retention.period_kind, r_retention.periods,
        r_retention.cohort_kind = 'recurring', r_retention.mode = 'on',
        v_return_key IS NULL OR coalesce(v_return_key = v_start_key, false)
    );
END
$$;
COMMENT ON FUNCTION analytics._maintain_retention(integer, bigint) IS
    'Moves mv_retention_cohorts by the news: of each user concerned, the cohorts and periods that '
    'he was counted in are taken out, those that he is in now are put in.';
