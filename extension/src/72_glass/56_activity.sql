-- Room 72, glass of activity by periods: what makes a user new, returning, resurrecting or dormant,
-- and on how many days he came.

CREATE FUNCTION analytics._trace_lifecycle_periods(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(
        p_cell, '{period_kind, period}', '{new, returning, resurrecting, dormant}');
    v_kind text := analytics._cell_period_kind(v_cell, '{day, week, month}');
    v_measure text := v_cell ->> 'measure';
    v_account bigint := analytics._cell_account(v_cell);
    r_period record := analytics._cell_period(v_cell, 'period', v_kind);
    v_before timestamptz := spectrum.period_start(v_kind, r_period.since - interval '1 us');
BEGIN
    RETURN QUERY
    WITH active AS (
        SELECT e.user_key, bool_or(e.occurred_at >= r_period.since) AS is_here,
            bool_or(e.occurred_at < r_period.since) AS was_before
        FROM analytics.event_keys AS e
        WHERE e.user_key <> 0 AND e.occurred_at >= v_before AND e.occurred_at < r_period.until
            AND (v_account = 0 OR e.account_key = v_account)
        GROUP BY e.user_key
    )
    SELECT analytics._lifecycle_words(v_measure, v_kind, (v_cell ->> 'period')::date), NULL,
        NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM active AS a
    JOIN analytics.event_keys AS e ON e.user_key = a.user_key
    WHERE v_measure = CASE
            WHEN NOT a.is_here THEN 'dormant'
            WHEN a.was_before THEN 'returning'
            WHEN EXISTS (
                SELECT FROM analytics.event_keys AS earlier
                WHERE earlier.user_key = a.user_key AND earlier.occurred_at < v_before
                    AND (v_account = 0 OR earlier.account_key = v_account)
            ) THEN 'resurrecting'
            ELSE 'new'
        END
        AND (v_account = 0 OR e.account_key = v_account)
        AND e.occurred_at >= v_before AND e.occurred_at < r_period.until;
END
$$;
COMMENT ON FUNCTION analytics._trace_lifecycle_periods(jsonb) IS
    'See analytics.trace: events behind a cell of lifecycle_periods.';

CREATE FUNCTION analytics._lifecycle_words(p_measure text, p_kind text, p_period date)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('A user counts once, for the %s of %s, if ', p_kind, p_period)
    || CASE p_measure
        WHEN 'new' THEN 'his first event ever is in it.'
        WHEN 'returning' THEN format('he has events in it and in the %s before.', p_kind)
        WHEN 'resurrecting' THEN format(
            'he has events in it, earlier ones too, but none in the %s before.', p_kind)
        ELSE format('he has events in the %s before and none in it; the view shows the number '
            'below zero.', p_kind)
    END;
END
$$;
COMMENT ON FUNCTION analytics._lifecycle_words(text, text, date) IS
    'By what lifecycle_periods counts a user, in words.';

CREATE FUNCTION analytics._cells_lifecycle_periods(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_last date := (
        SELECT max(shown.day) FROM analytics.daily_events AS shown WHERE shown.account_id = '*'
    );
BEGIN
    -- An event counts in its own period and in the next one. s.starts: of the period before, its
    -- own, the next, and the end of that.
    RETURN QUERY
    SELECT jsonb_build_object('account_id', f.account_id, 'period_kind', f.kind,
            'period', f.period, 'measure', f.measure),
        analytics._lifecycle_words(f.measure, f.kind, f.period)
    FROM (
        SELECT scope.account_id, kind.name AS kind, spectrum.period_date(s.starts[n.number])
                AS period,
            CASE
                WHEN NOT near.active[n.number] THEN 'dormant'
                WHEN near.active[n.number - 1] THEN 'returning'
                -- That of its own period tells also of what came before that.
                WHEN n.number = 2 AND EXISTS (
                    SELECT FROM analytics.event_keys AS earlier
                    WHERE earlier.user_key = p_user AND earlier.occurred_at < s.starts[1]
                        AND (scope.account_key = 0 OR earlier.account_key = scope.account_key)
                ) THEN 'resurrecting'
                ELSE 'new'
            END AS measure
        FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
        CROSS JOIN unnest('{day, week, month}'::text[]) AS kind (name)
        CROSS JOIN LATERAL (
            SELECT spectrum.period_starts(kind.name, p_at, p_at + interval '1 us') AS starts
            OFFSET 0
        ) AS own
        CROSS JOIN LATERAL (
            SELECT spectrum.period_starts(
                kind.name, own.starts[1] - interval '1 us', own.starts[2] + interval '1 us'
            ) AS starts
            OFFSET 0
        ) AS s
        CROSS JOIN LATERAL (
            SELECT array_agg(EXISTS (
                SELECT FROM analytics.event_keys AS e
                WHERE e.user_key = p_user AND e.occurred_at >= s.starts[p.number]
                    AND e.occurred_at < s.starts[p.number + 1]
                    AND (scope.account_key = 0 OR e.account_key = scope.account_key)
            ) ORDER BY p.number) AS active
            FROM generate_series(1, 3) AS p (number)
        ) AS near
        CROSS JOIN (VALUES (2), (3)) AS n (number)
    ) AS f
    WHERE p_user <> 0 AND f.period <= v_last;
END
$$;
COMMENT ON FUNCTION analytics._cells_lifecycle_periods(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of lifecycle_periods that count an event.';

CREATE FUNCTION analytics._stickiness_rule(
    p_measure text, p_kind text, p_period date, p_days integer
)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('A user counts once if he has events on %s %s of the days of the %s of %s.',
        CASE p_measure WHEN 'users_exactly' THEN 'exactly' ELSE 'at least' END, p_days, p_kind,
        p_period);
END
$$;
COMMENT ON FUNCTION analytics._stickiness_rule(text, text, date, integer) IS
    'By what stickiness_periods counts a user, in words.';

CREATE FUNCTION analytics._stickiness_days(
    p_account bigint, p_users bigint[], p_since timestamptz, p_until timestamptz
)
RETURNS TABLE (user_key bigint, days integer)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('day', p_since, p_until);
BEGIN
    RETURN QUERY
    SELECT e.user_key, count(DISTINCT width_bucket(e.occurred_at, v_starts))::integer
    FROM analytics.event_keys AS e
    WHERE e.user_key <> 0 AND (p_users IS NULL OR e.user_key = ANY (p_users))
        AND e.occurred_at >= p_since AND e.occurred_at < p_until
        AND (p_account = 0 OR e.account_key = p_account)
    GROUP BY e.user_key;
END
$$;
COMMENT ON FUNCTION analytics._stickiness_days(bigint, bigint[], timestamptz, timestamptz) IS
    'On how many days users (NULL: all) were active in [p_since, p_until), in one account or (0) '
    'in any.';

CREATE FUNCTION analytics._trace_stickiness_periods(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(
        p_cell, '{period_kind, period, days}', '{users_exactly, users_at_least}');
    v_kind text := analytics._cell_period_kind(v_cell, '{week, month}');
    v_measure text := v_cell ->> 'measure';
    v_days integer := analytics._cell_number(v_cell, 'days');
    v_account bigint := analytics._cell_account(v_cell);
    r_period record := analytics._cell_period(v_cell, 'period', v_kind);
BEGIN
    RETURN QUERY
    SELECT analytics._stickiness_rule(
            v_measure, v_kind, (v_cell ->> 'period')::date, v_days
        ),
        NULL, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics._stickiness_days(v_account, NULL, r_period.since, r_period.until) AS known
    JOIN analytics.event_keys AS e ON e.user_key = known.user_key
    WHERE (known.days = v_days OR v_measure = 'users_at_least' AND known.days > v_days)
        AND e.occurred_at >= r_period.since AND e.occurred_at < r_period.until
        AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_stickiness_periods(jsonb) IS
    'See analytics.trace: events behind a cell of stickiness_periods.';

CREATE FUNCTION analytics._cells_stickiness_periods(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'period_kind', kind.name,
            'period', d.period, 'days', m.days, 'measure', m.measure),
        analytics._stickiness_rule(m.measure, kind.name, d.period, m.days)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN (VALUES ('week'), ('month')) AS kind (name)
    CROSS JOIN LATERAL (
        SELECT spectrum.period_starts(kind.name, p_at, p_at + interval '1 us') AS starts
        OFFSET 0
    ) AS own
    CROSS JOIN LATERAL (SELECT spectrum.period_date(own.starts[1]) AS period OFFSET 0) AS d
    CROSS JOIN LATERAL analytics._stickiness_days(
        scope.account_key, ARRAY[p_user], own.starts[1], own.starts[2]
    ) AS known
    CROSS JOIN LATERAL (
        SELECT 'users_exactly' AS measure, known.days
        UNION ALL
        SELECT 'users_at_least', k.days FROM generate_series(1, known.days) AS k (days)
    ) AS m;
END
$$;
COMMENT ON FUNCTION analytics._cells_stickiness_periods(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of stickiness_periods that count an event.';
