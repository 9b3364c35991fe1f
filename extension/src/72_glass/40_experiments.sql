-- Room 72, glass of the experiments: which exposures make a user a unit, and what he did since.

CREATE FUNCTION analytics._experiment_evidence(
    p_plan analytics._experiment_plan,
    p_account text,
    p_users bigint[]
)
RETURNS TABLE (
    measure text,
    metric text,
    variant text,
    user_key bigint,
    event_id uuid,
    occurred_at timestamptz,
    amount numeric
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT * FROM analytics._experiment_units(p_plan, p_account, false, p_users)
    ),
    exposures AS (
        SELECT u.user_key, u.variant, e.event_id, e.occurred_at,
            row_number() OVER (PARTITION BY u.user_key ORDER BY e.occurred_at, e.event_id)
                AS number
        FROM units AS u
        JOIN analytics.event_keys AS e ON e.user_key = u.user_key
            AND e.occurred_at >= u.exposed_at
            AND (u.account_key = 0 OR e.account_key = u.account_key)
        JOIN analytics._exposure_types() AS t ON t.event_type_key = e.event_type_key
        WHERE e.properties ->> t.flag_property = p_plan.experiment
            AND e.properties ->> t.variant_property <> ''
            AND (p_plan.ends_at IS NULL OR e.occurred_at < p_plan.ends_at)
    )
    SELECT 'units', NULL, x.variant, x.user_key, x.event_id, x.occurred_at, NULL::numeric
    FROM exposures AS x
    WHERE x.variant IS NOT NULL AND x.number = 1
    UNION ALL
    SELECT 'excluded_units', NULL, NULL, x.user_key, x.event_id, x.occurred_at, NULL
    FROM exposures AS x
    WHERE x.variant IS NULL
    UNION ALL
    SELECT m.measure, did.metric, u.variant, did.user_key, did.event_id, did.occurred_at,
        CASE WHEN m.measure = 'value' THEN did.amount END
    FROM (
        SELECT array_agg(u.user_key) AS users, array_agg(u.account_key) AS accounts,
            array_agg(u.exposed_at) AS exposed_ats, array_agg('infinity'::timestamptz) AS untils
        FROM units AS u
        WHERE u.variant IS NOT NULL
    ) AS counted
    CROSS JOIN LATERAL analytics._experiment_happenings(
        p_plan, counted.users, counted.accounts, counted.exposed_ats, counted.exposed_ats,
        counted.untils, p_users IS NOT NULL
    ) AS did
    JOIN units AS u ON u.user_key = did.user_key
    CROSS JOIN (VALUES ('conversions'), ('value')) AS m (measure)
    WHERE did.is_upper;
END
$$;
COMMENT ON FUNCTION analytics._experiment_evidence(
    analytics._experiment_plan, text, bigint[]
) IS
    'The events of users (NULL: all) by which an experiment counts them: of a unit its first '
    'exposure, of one that is left out all of them, and what was done of each metric since.';

CREATE FUNCTION analytics._experiment_rule(
    p_plan analytics._experiment_plan, p_measure text, p_metric text
)
RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_metric text := (
        SELECT format('event %s%s, from his first exposure on%s', m.event_type,
            coalesce(' with properties ' || m.properties_filter::text, ''),
            CASE
                WHEN m.time_window IS NOT NULL THEN ' for ' || m.time_window::text
                WHEN p_plan.ends_at IS NOT NULL THEN ' until the end of the experiment'
                ELSE ''
            END)
        FROM analytics._measures(p_plan.measures) AS m
        WHERE m.metric = p_metric
    );
BEGIN
    RETURN CASE p_measure
        WHEN 'units' THEN 'A user counts once, from his first exposure on, for the one planned '
            'variant that he saw.'
        WHEN 'excluded_units' THEN 'A user is left out who saw several variants, or one that is '
            'not planned.'
        WHEN 'conversions' THEN format('A unit counts once if it has any %s.', v_metric)
        ELSE format('The sum, by unit, of what each %s adds%s.', v_metric,
            CASE WHEN p_plan.winsorize IS NOT NULL THEN ' (the value cuts the sums of units at '
                'percentiles)' ELSE '' END)
    END;
END
$$;
COMMENT ON FUNCTION analytics._experiment_rule(
    analytics._experiment_plan, text, text
) IS
    'By what an experiment counts, in words.';

CREATE FUNCTION analytics._trace_experiment_results(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{experiment, metric, variant}',
        '{units, excluded_units, conversions, value}');
    v_definition jsonb := analytics._served_definition('experiment', v_cell ->> 'experiment');
    v_measure text := v_cell ->> 'measure';
    r_plan analytics._experiment_plan;
BEGIN
    r_plan := jsonb_populate_record(NULL::analytics._experiment_plan, v_definition);
    RETURN QUERY
    SELECT analytics._experiment_rule(r_plan, v_measure, v_cell ->> 'metric'), NULL, found.amount,
        found.user_key, found.event_id, found.occurred_at
    FROM analytics._experiment_evidence(
        r_plan, nullif(v_cell ->> 'account_id', '*'), NULL
    ) AS found
    WHERE found.measure = v_measure
        AND (found.metric IS NULL OR found.metric = v_cell ->> 'metric')
        AND (found.variant IS NULL OR found.variant = v_cell ->> 'variant');
END
$$;
COMMENT ON FUNCTION analytics._trace_experiment_results(jsonb) IS
    'See analytics.trace: events behind a cell of experiment_results.';

CREATE FUNCTION analytics._cells_experiment_results(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'experiment', known.name,
            'metric', metric.name, 'variant', variant.name, 'measure', found.measure),
        analytics._experiment_rule(known.plan, found.measure, metric.name)
    FROM (
        SELECT report.name,
            jsonb_populate_record(NULL::analytics._experiment_plan, report.definition) AS plan
        FROM analytics.served_reports AS report
        WHERE report.kind = 'experiment'
    ) AS known
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._experiment_evidence(
        known.plan, nullif(scope.account_id, '*'), ARRAY[p_user]
    ) AS found
    -- Units stand beside each metric, those left out beside each variant too.
    JOIN LATERAL unnest((known.plan).metrics) AS metric (name)
        ON found.metric IS NULL OR found.metric = metric.name
    JOIN LATERAL jsonb_object_keys((known.plan).variants) AS variant (name)
        ON found.variant IS NULL OR found.variant = variant.name
    WHERE p_user <> 0 AND found.occurred_at = p_at AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_experiment_results(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of experiment_results that count an event.';
