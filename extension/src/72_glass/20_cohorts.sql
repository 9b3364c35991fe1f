-- Room 72, glass of the cohorts: which events make a user start, and which make him count as back.

CREATE FUNCTION analytics._retention_evidence(
    p_definition jsonb,
    p_account bigint,
    p_users bigint[]
)
RETURNS TABLE (
    user_key bigint, cohort date, period integer, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_start_key integer := analytics._event_key(p_definition ->> 'start_event');
    v_return_key integer := analytics._event_key(p_definition ->> 'return_event');
    v_filter jsonb := nullif(p_definition -> 'properties_filter', 'null');
    v_is_recurring boolean := p_definition ->> 'cohort_kind' = 'recurring';
    v_is_on boolean := p_definition ->> 'mode' = 'on';
    v_starts timestamptz[] := (
        SELECT spectrum.period_starts(p_definition ->> 'period_kind', min(e.occurred_at),
            max(e.occurred_at) + interval '1 us')
        FROM analytics.event_keys AS e
        WHERE e.user_key = ANY (p_users) AND e.user_key <> 0
    );
    v_days date[] := spectrum.period_dates(v_starts);
BEGIN
    RETURN QUERY
    WITH deeds AS MATERIALIZED (
        SELECT e.user_key, e.event_id, e.occurred_at,
            width_bucket(e.occurred_at, v_starts) AS number,
            v_start_key IS NULL OR e.event_type_key = v_start_key AS is_start,
            v_return_key IS NULL OR e.event_type_key = v_return_key AS is_return
        FROM analytics.event_keys AS e
        WHERE e.user_key = ANY (p_users) AND e.user_key <> 0
            AND (p_account = 0 OR e.account_key = p_account)
            AND (v_filter IS NULL OR e.properties @> v_filter)
    ),
    cohorts AS (
        SELECT d.user_key, d.number, min(d.occurred_at) AS first_at,
            min(d.number) OVER (PARTITION BY d.user_key) AS first_number
        FROM deeds AS d
        WHERE d.is_start
        GROUP BY d.user_key, d.number
    )
    SELECT c.user_key, v_days[c.number], k.number, d.event_id, d.occurred_at
    FROM cohorts AS c
    JOIN deeds AS d ON d.user_key = c.user_key AND d.number >= c.number
    CROSS JOIN LATERAL (
        SELECT -1 AS number
        WHERE d.is_start AND d.number = c.number
            AND (v_is_recurring OR d.occurred_at = c.first_at)
        UNION ALL
        SELECT k.number
        FROM generate_series(
            CASE WHEN v_is_on THEN d.number - c.number ELSE 0 END,
            least(d.number - c.number, (p_definition ->> 'periods')::integer)
        ) AS k (number)
        WHERE d.is_return AND (d.number > c.number OR d.occurred_at >= c.first_at)
    ) AS k
    WHERE v_is_recurring OR c.number = c.first_number;
END
$$;
COMMENT ON FUNCTION analytics._retention_evidence(jsonb, bigint, bigint[]) IS
    'The events of users by which a retention counts them, in which cohort and period; period -1: '
    'those by which they are in the cohort. p_account: 0 all. The rule is that of '
    'analytics._retention_cohorts.';

CREATE FUNCTION analytics._retention_rule(p_definition jsonb, p_period integer)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_kind text := p_definition ->> 'period_kind';
    v_start text := coalesce(p_definition ->> 'start_event', 'of any type');
    v_return text := coalesce(p_definition ->> 'return_event', 'of any type');
    v_where text := coalesce(
        ' with properties ' || nullif(p_definition ->> 'properties_filter', 'null'), '');
    v_is_on boolean := p_definition ->> 'mode' = 'on';
BEGIN
    RETURN CASE
        WHEN p_period < 0 AND p_definition ->> 'cohort_kind' = 'first' THEN format(
            'A user is in the cohort of the %s of his first event %s%s ever.',
            v_kind, v_start, v_where)
        WHEN p_period < 0 THEN format(
            'A user is in the cohort of each %s with an event %s%s.', v_kind, v_start, v_where)
        WHEN p_period = 0 AND v_is_on THEN format(
            'A user of the cohort counts once if he has an event %s%s in its %s, at or after his '
            'start.', v_return, v_where, v_kind)
        WHEN v_is_on THEN format(
            'A user of the cohort counts once if he has an event %s%s in the %s that is %s after '
            'its own.', v_return, v_where, v_kind, p_period)
        ELSE format(
            'A user of the cohort counts once if he has an event %s%s in the %s that is %s after '
            'its own, or later, and not before his start.', v_return, v_where, v_kind, p_period)
    END;
END
$$;
COMMENT ON FUNCTION analytics._retention_rule(jsonb, integer) IS
    'By what a retention counts a user in a period, or, for -1, in a cohort, in words.';

CREATE FUNCTION analytics._served_definition(p_kind text, p_name text)
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definition jsonb := (
        SELECT report.definition FROM analytics.served_reports AS report
        WHERE report.kind = p_kind AND report.name = p_name
    );
BEGIN
    IF v_definition IS NULL THEN
        PERFORM spectrum._reject(
            'p_cell.' || p_kind, p_name, format('the name of a standing %s', p_kind)
        );
    END IF;
    RETURN v_definition;
END
$$;
COMMENT ON FUNCTION analytics._served_definition(text, text) IS
    'The definition that a standing view shows; raises 22023 where there is none of the name.';

CREATE FUNCTION analytics._trace_retention_cohorts(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(
        p_cell, '{retention, cohort, period}', '{users, cohort_size}');
    v_cohort date := analytics._cell_day(v_cell, 'cohort');
    v_period integer := CASE v_cell ->> 'measure'
        WHEN 'users' THEN analytics._cell_number(v_cell, 'period') ELSE -1 END;
    v_account bigint := analytics._cell_account(v_cell);
    v_definition jsonb := analytics._served_definition('retention', v_cell ->> 'retention');
    v_start_key integer := analytics._event_key(v_definition ->> 'start_event');
    r_days record := analytics._days_between(v_cohort, (
        v_cohort + ('1 ' || (v_definition ->> 'period_kind'))::interval - interval '1 day')::date);
BEGIN
    RETURN QUERY
    SELECT analytics._retention_rule(v_definition, v_period), NULL, NULL::numeric,
        found.user_key, found.event_id, found.occurred_at
    FROM analytics._retention_evidence(v_definition, v_account, ARRAY(
        SELECT DISTINCT e.user_key FROM analytics.event_keys AS e
        WHERE e.occurred_at >= r_days.since AND e.occurred_at < r_days.until
            AND (v_start_key IS NULL OR e.event_type_key = v_start_key)
            AND (v_account = 0 OR e.account_key = v_account)
    )) AS found
    WHERE found.cohort = v_cohort AND found.period = v_period;
END
$$;
COMMENT ON FUNCTION analytics._trace_retention_cohorts(jsonb) IS
    'See analytics.trace: events behind a cell of retention_cohorts.';

CREATE FUNCTION analytics._cells_retention_cohorts(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Materialized: else the events of the user are read once for each row that is shown.
    -- Such a row holds both numbers: the size of its cohort stands in each period.
    RETURN QUERY
    WITH found AS MATERIALIZED (
        SELECT scope.account_id, report.name, report.definition, evidence.cohort, evidence.period
        FROM analytics.served_reports AS report
        CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
        CROSS JOIN LATERAL analytics._retention_evidence(
            report.definition, scope.account_key, ARRAY[p_user]
        ) AS evidence
        WHERE report.kind = 'retention' AND evidence.occurred_at = p_at
            AND evidence.event_id = p_event
    )
    SELECT jsonb_build_object('account_id', found.account_id, 'retention', found.name,
            'cohort', found.cohort, 'period', shown.period,
            'measure', CASE WHEN found.period < 0 THEN 'cohort_size' ELSE 'users' END),
        analytics._retention_rule(found.definition, found.period)
    FROM found
    JOIN analytics.retention_cohorts AS shown
        ON shown.account_id = found.account_id AND shown.retention = found.name
            AND shown.cohort = found.cohort
            AND (found.period < 0 OR shown.period = found.period);
END
$$;
COMMENT ON FUNCTION analytics._cells_retention_cohorts(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of retention_cohorts that count an event.';
