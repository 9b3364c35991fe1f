-- Room 60, standing activity: the user-days that reports are kept by, and the sums of active users.
-- A refresh adds the user-days that its news bring and takes out those that lost their last event;
-- each changes the sums of at most 30 days to both sides, whatever the length of the history.

CREATE FUNCTION spectrum._create_active_users()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_active_users') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_user_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        CONSTRAINT rollup_user_days_pkey PRIMARY KEY (report_id, user_key, scope, day)
    );
    COMMENT ON TABLE spectrum.rollup_user_days IS
        'The days on which each user was active.';
    COMMENT ON COLUMN spectrum.rollup_user_days.report_id IS 'spectrum.reports, kind activity.';
    COMMENT ON COLUMN spectrum.rollup_user_days.user_key IS 'dim_users; never the unknown user.';
    COMMENT ON COLUMN spectrum.rollup_user_days.scope IS
        'For which accounts it counts. a > 0: for account a and for all together; 0: for all '
        'together; -a: for account a only, beside 0.';
    COMMENT ON COLUMN spectrum.rollup_user_days.day IS 'Calendar day in config.timezone.';

    CREATE TABLE analytics.mv_active_users (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        dau bigint NOT NULL,
        wau bigint NOT NULL,
        mau bigint NOT NULL,
        CONSTRAINT mv_active_users_pkey PRIMARY KEY (report_id, account_id, day)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_active_users IS
        'Active users per account and day, and for all accounts together (account_id *), kept by '
        'refreshes; days on which somebody counts, up to 29 after the last event. Read it through '
        'analytics.active_users.';
    COMMENT ON COLUMN analytics.mv_active_users.report_id IS 'spectrum.reports, kind activity.';
    COMMENT ON COLUMN analytics.mv_active_users.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_active_users.dau IS 'Distinct users of the day.';
    COMMENT ON COLUMN analytics.mv_active_users.wau IS
        'Distinct users of the 7 days that end with it.';
    COMMENT ON COLUMN analytics.mv_active_users.mau IS
        'Distinct users of the 30 days that end with it.';

    CREATE VIEW analytics.active_users WITH (security_barrier) AS
    SELECT
        scope.account_id,
        scope.first_day + calendar.number AS day,
        coalesce(sums.dau, 0) AS dau,
        coalesce(sums.wau, 0) AS wau,
        coalesce(sums.mau, 0) AS mau,
        sums.dau / nullif(sums.mau, 0)::double precision AS stickiness,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT known.report_id, known.account_id, min(known.day) AS first_day
        FROM analytics.mv_active_users AS known
        WHERE known.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'activity' AND report.state = 'served'
        ) AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR known.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)))
        GROUP BY known.report_id, known.account_id
    ) AS scope
    CROSS JOIN LATERAL generate_series(0, (
        SELECT last.day FROM warehouse.last_day AS last
    ) - scope.first_day) AS calendar (number)
    LEFT JOIN analytics.mv_active_users AS sums
        ON sums.report_id = scope.report_id AND sums.account_id = scope.account_id
            AND sums.day = scope.first_day + calendar.number;
    COMMENT ON VIEW analytics.active_users IS
        'Daily, weekly and monthly active users per account and day (account_id *: all accounts), '
        'from the first active day of each to the last day with an event anywhere.';
    COMMENT ON COLUMN analytics.active_users.stickiness IS 'dau / mau; NULL where mau is 0.';
    PERFORM spectrum._create_user_days();
    PERFORM spectrum._add_kind('activity', 20, '_maintain_active_users',
        '{spectrum.rollup_user_days, analytics.mv_active_users}', '{active_users}');
    PERFORM spectrum._begin_report('activity');
END
$$;
COMMENT ON FUNCTION spectrum._create_active_users() IS
    'Room 60: makes rollup_user_days, mv_active_users and its plain view.';

CREATE FUNCTION spectrum._create_user_days()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.user_days WITH (security_barrier) AS
    SELECT
        active.user_key,
        (active.day + time '12:00') AT TIME ZONE (SELECT config.timezone FROM spectrum.config)
            AS occurred_at,
        active.day
    FROM (
        SELECT kept.user_key, kept.day
        FROM spectrum.rollup_user_days AS kept
        WHERE kept.scope >= 0 AND kept.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'activity' AND report.state = 'served'
        ) AND (SELECT caller.sees_all FROM warehouse.caller) AND (kept.day >= (
            SELECT (settings.facts_from AT TIME ZONE settings.timezone)::date
            FROM analytics.settings
        )) IS NOT FALSE
        UNION ALL
        SELECT waiting.user_key, waiting.day
        FROM warehouse.waiting_days AS waiting
        WHERE waiting.user_key <> 0 AND (SELECT caller.sees_all FROM warehouse.caller)
    ) AS active;
    COMMENT ON VIEW analytics.user_days IS
        'When each user was active, to the day: the days that are kept, and those of events that '
        'no refresh has counted yet; without days whose facts are purged. A tenth of the '
        'events and less, for questions that ask on which days, not how often. Exact where '
        'user_days_state says so; empty for tenants, as it does not know accounts.';
    COMMENT ON COLUMN analytics.user_days.user_key IS 'As in analytics.events.';
    COMMENT ON COLUMN analytics.user_days.occurred_at IS 'Noon of the day.';
    COMMENT ON COLUMN analytics.user_days.day IS 'Calendar day in config.timezone.';

    CREATE VIEW analytics.user_day_counts WITH (security_barrier) AS
    SELECT kept.day, kept.dau AS users
    FROM analytics.mv_active_users AS kept
    WHERE kept.account_id = '*' AND kept.dau > 0 AND kept.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'activity' AND report.state = 'served'
    ) AND (SELECT caller.sees_all FROM warehouse.caller) AND (kept.day >= (
        SELECT (settings.facts_from AT TIME ZONE settings.timezone)::date
        FROM analytics.settings
    )) IS NOT FALSE
    UNION ALL
    SELECT came.day, count(*)
    FROM (
        SELECT DISTINCT waiting.user_key, waiting.day FROM warehouse.waiting_days AS waiting
        WHERE waiting.user_key <> 0 AND (SELECT caller.sees_all FROM warehouse.caller)
    ) AS came
    WHERE NOT EXISTS (
        SELECT FROM spectrum.rollup_user_days AS kept
        WHERE kept.user_key = came.user_key AND kept.scope >= 0 AND kept.day = came.day
            AND kept.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'activity' AND report.state = 'served'
            )
    )
    GROUP BY came.day;
    COMMENT ON VIEW analytics.user_day_counts IS
        'How many users analytics.user_days has of each day, to be summed up: the sums that are '
        'kept, and the users of events that no refresh has counted yet.';
    COMMENT ON COLUMN analytics.user_day_counts.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.user_day_counts.users IS 'Users that no other row counts.';

    CREATE VIEW analytics.user_days_state WITH (security_barrier) AS
    SELECT caller.sees_all AND NOT EXISTS (SELECT FROM spectrum.withdrawals) AND 2 = (
        SELECT count(*) FROM spectrum.reports AS report
        WHERE report.kind IN ('volume', 'activity') AND report.state = 'served'
            AND report.follows_news
            AND (report.complete_from IS NULL
                OR report.complete_from <= (SELECT settings.facts_from FROM analytics.settings))
    ) AND NOT EXISTS (
        SELECT FROM analytics.settings
        WHERE (settings.facts_from AT TIME ZONE settings.timezone)::time <> '00:00'
    ) AND NOT EXISTS (SELECT FROM spectrum.horizon WHERE horizon.packed_without = 'days')
        AND coalesce(current_setting('spectrum.hot_only', true), '') <> 'on' AS is_exact,
    caller.sees_all AND (SELECT coalesce(sum(news.events), 0) FROM spectrum.news) <= greatest(
        10000, (SELECT ledger.reltuples / 20 FROM pg_class AS ledger
            WHERE ledger.oid = 'warehouse.event_ledger'::regclass)
    ) AS is_near
    FROM warehouse.caller;
    COMMENT ON VIEW analytics.user_days_state IS
        'Whether analytics.user_days, user_day_counts and event_days say just what '
        'analytics.events says, one row: not while facts that were taken back are still counted, '
        'nor after a change of the calendar until the days are cut anew, nor where facts are '
        'purged up to the middle of a day, nor where some of a user were erased of packed ones or '
        'the days made anew without them, nor for who reads no packed ones, nor for a tenant.';
    COMMENT ON COLUMN analytics.user_days_state.is_exact IS 'Whether they do.';
    COMMENT ON COLUMN analytics.user_days_state.is_near IS
        'Whether few events wait for a refresh, 10,000 or a twentieth of all: to look up more of '
        'them takes longer than to read all events.';
END
$$;
COMMENT ON FUNCTION spectrum._create_user_days() IS
    'Room 60: makes analytics.user_days, user_day_counts and user_days_state.';

CREATE FUNCTION analytics._keeps_days(p_from timestamptz, p_to timestamptz)
RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN analytics._may_ask_kept()
        AND (SELECT state.is_exact AND state.is_near FROM analytics.user_days_state AS state)
        AND (p_from IS NULL OR p_from = spectrum.period_start('day', p_from))
        AND (p_to IS NULL OR p_to = spectrum.period_start('day', p_to));
END
$$;
COMMENT ON FUNCTION analytics._keeps_days(timestamptz, timestamptz) IS
    'Whether a question about [p_from, p_to), NULL for an open end, may be asked of '
    'analytics.user_days and event_days: they are exact, cheap, and the range is of whole days.';

CREATE FUNCTION analytics._news_days(OUT starts timestamptz[], OUT days date[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT d.starts, d.days INTO starts, days
    FROM (
        SELECT min(news.occurred_at) AS first_at, max(news.occurred_at) + interval '1 us' AS end_at
        FROM pg_temp.spectrum_news AS news
    ) AS held
    CROSS JOIN LATERAL analytics._calendar_days(held.first_at, held.end_at) AS d;
END
$$;
COMMENT ON FUNCTION analytics._news_days() IS
    'The calendar days of the news: starts, for width_bucket, and dates.';

CREATE FUNCTION analytics._add_user_days(
    p_report integer,
    p_built_to bigint,
    p_starts timestamptz[],
    p_days date[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- Also in a table that was empty when this was planned.
SET enable_seqscan = off
AS $$
BEGIN
    WITH came AS (
        SELECT DISTINCT news.user_key, news.scope,
            width_bucket(news.occurred_at, p_starts) AS number
        FROM pg_temp.spectrum_news AS news
        WHERE news.sign > 0
            AND news.user_key <> 0 AND news.user_key <= p_built_to
    ), added AS (
        INSERT INTO spectrum.rollup_user_days (report_id, user_key, scope, day)
        SELECT p_report, came.user_key, came.scope, p_days[came.number]
        FROM came
        LEFT JOIN LATERAL (
            SELECT true AS is_known FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_report AND known.user_key = came.user_key
                AND known.scope = came.scope AND known.day = p_days[came.number]
            OFFSET 0
        ) AS before ON true
        WHERE before.is_known IS NULL
        RETURNING user_key, scope, day
    )
    INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
    SELECT user_key, scope, day, true FROM added;
END
$$;
COMMENT ON FUNCTION analytics._add_user_days(integer, bigint, timestamptz[], date[]) IS
    'Adds to rollup_user_days the days that the news bring, and notes those that are new in '
    'pg_temp.spectrum_day_changes.';

CREATE FUNCTION analytics._move_user_days(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_day_changes',
        'user_key bigint, scope bigint, day date, is_added boolean');
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;

    PERFORM analytics._add_user_days(p_report, p_built_to, v_starts, v_days);

    WITH went AS (
        SELECT DISTINCT news.user_key, news.scope,
            width_bucket(news.occurred_at, v_starts) AS number
        FROM pg_temp.spectrum_news AS news
        WHERE news.sign <= 0 AND news.user_key <> 0 AND news.user_key <= p_built_to
    ), removed AS (
        DELETE FROM spectrum.rollup_user_days AS known
        USING went
        WHERE known.report_id = p_report AND known.user_key = went.user_key
            AND known.scope = went.scope AND known.day = v_days[went.number]
            AND NOT EXISTS (
                SELECT FROM warehouse.fact_events AS fact
                WHERE fact.user_key = went.user_key
                    AND fact.occurred_at >= v_starts[went.number]
                    AND fact.occurred_at < v_starts[went.number + 1]
                    AND (went.scope = 0 OR fact.account_key = abs(went.scope))
            )
        RETURNING known.user_key, known.scope, known.day
    ), undone AS (
        -- What came by the news and is gone by now, its own news still to come, never was.
        DELETE FROM pg_temp.spectrum_day_changes AS added
        USING removed
        WHERE (added.user_key, added.scope, added.day)
            = (removed.user_key, removed.scope, removed.day)
        RETURNING added.user_key, added.scope, added.day
    )
    INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
    SELECT user_key, scope, day, false
    FROM (SELECT * FROM removed EXCEPT ALL SELECT * FROM undone) AS gone;
END
$$;
COMMENT ON FUNCTION analytics._move_user_days(integer, bigint) IS
    'Brings rollup_user_days up to the news and leaves in pg_temp.spectrum_day_changes which user-'
    'days came and which went.';

CREATE FUNCTION analytics._maintain_active_users(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM analytics._move_user_days(p_report, p_built_to);

    WITH hulls AS (
        SELECT changes.user_key, changes.scope,
            min(changes.day) - 30 AS from_day, max(changes.day) + 30 AS until_day
        FROM pg_temp.spectrum_day_changes AS changes
        GROUP BY changes.user_key, changes.scope
    ),
    days AS (
        SELECT hulls.user_key, hulls.scope, known.day, changes.day IS NULL AS has_been,
            true AS is_now
        FROM hulls
        CROSS JOIN LATERAL (
            SELECT near.day FROM spectrum.rollup_user_days AS near
            WHERE near.report_id = p_report AND near.user_key = hulls.user_key
                AND near.scope = hulls.scope AND near.day BETWEEN hulls.from_day AND hulls.until_day
            OFFSET 0
        ) AS known
        LEFT JOIN pg_temp.spectrum_day_changes AS changes
            ON changes.user_key = hulls.user_key AND changes.scope = hulls.scope
                AND changes.day = known.day AND changes.is_added
        UNION ALL
        SELECT user_key, scope, day, true, false FROM pg_temp.spectrum_day_changes
        WHERE NOT is_added
    ),
    -- What each active day contributed and what it contributes, cf. analytics._active_spans.
    spans AS (
        SELECT scope, day, -1 AS sign,
            lead(day) OVER (PARTITION BY user_key, scope ORDER BY day) AS next_day
        FROM days WHERE has_been
        UNION ALL
        SELECT scope, day, 1, lead(day) OVER (PARTITION BY user_key, scope ORDER BY day)
        FROM days WHERE is_now
    ),
    changed_spans AS (
        SELECT scope, day, next_day, sum(sign) AS users
        FROM spans GROUP BY scope, day, next_day HAVING sum(sign) <> 0
    ),
    steps AS (
        SELECT scopes.account_id, step.day, sum(step.dau) AS dau, sum(step.wau) AS wau,
            sum(step.mau) AS mau
        FROM changed_spans AS span
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        CROSS JOIN LATERAL (
            VALUES
                (span.day, span.users, span.users, span.users),
                (least(span.day + 7, span.next_day), 0, -span.users, 0),
                (least(span.day + 30, span.next_day), 0, 0, -span.users)
        ) AS step (day, dau, wau, mau)
        GROUP BY scopes.account_id, step.day
    ),
    running AS (
        SELECT account_id, day, dau,
            sum(wau) OVER until_day AS wau,
            sum(mau) OVER until_day AS mau,
            lead(day, 1, day + 1) OVER until_day - day AS length
        FROM steps
        WINDOW until_day AS (PARTITION BY account_id ORDER BY day)
    )
    INSERT INTO analytics.mv_active_users AS sums (report_id, account_id, day, dau, wau, mau)
    SELECT p_report, running.account_id, running.day + number,
        CASE WHEN number = 0 THEN running.dau ELSE 0 END, running.wau, running.mau
    FROM running
    CROSS JOIN LATERAL generate_series(0, running.length - 1) AS number
    WHERE running.wau <> 0 OR running.mau <> 0 OR (running.dau <> 0 AND number = 0)
    ON CONFLICT (report_id, account_id, day) DO UPDATE SET
        dau = sums.dau + excluded.dau,
        wau = sums.wau + excluded.wau,
        mau = sums.mau + excluded.mau;

    IF EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added) THEN
        DELETE FROM analytics.mv_active_users AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id AND sums.mau = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_active_users(integer, bigint) IS
    'Moves mv_active_users by the user-days that came and went: before and after, each active day '
    'counts until the next one, for at most 7 and 30 days.';
