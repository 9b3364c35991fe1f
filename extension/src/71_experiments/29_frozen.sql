-- Room 71, standing experiments, what is frozen of them: who was exposed in a month that is purged
-- keeps that exposure, whatever becomes of later ones. What units did by day is kept anyway.

CREATE FUNCTION analytics._open_plan(
    p_plan analytics._experiment_plan,
    p_from timestamptz,
    p_until timestamptz
)
RETURNS analytics._experiment_plan
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN jsonb_populate_record(p_plan, jsonb_build_object(
        'starts_at', greatest(p_plan.starts_at, p_from), 'ends_at', least(p_plan.ends_at, p_until)
    ));
END
$$;
COMMENT ON FUNCTION analytics._open_plan(
    analytics._experiment_plan, timestamptz, timestamptz
) IS
    'The same experiment with exposures of [p_from, p_until) alone.';

CREATE FUNCTION analytics._freeze_experiment(
    p_report integer,
    p_from timestamptz,
    p_until timestamptz
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_plan analytics._experiment_plan := analytics._open_plan((
        SELECT jsonb_populate_record(NULL::analytics._experiment_plan, report.definition)
        FROM spectrum.reports AS report
        WHERE report.report_id = p_report
    ), p_from, p_until);
BEGIN
    UPDATE spectrum.rollup_experiment_units AS unit
    SET frozen_at = least(unit.frozen_at, seen.exposed_at),
        frozen_low = least(unit.frozen_low, seen.low_variant COLLATE "C"),
        frozen_high = greatest(unit.frozen_high, seen.high_variant COLLATE "C")
    FROM (VALUES (false), (true)) AS modes (by_account)
    CROSS JOIN LATERAL analytics._experiment_units(v_plan, NULL, modes.by_account) AS seen
    WHERE unit.report_id = p_report AND unit.user_key = seen.user_key
        AND CASE WHEN modes.by_account THEN abs(unit.scope) = seen.account_key
            ELSE unit.scope = 0 END;
END
$$;
COMMENT ON FUNCTION analytics._freeze_experiment(integer, timestamptz, timestamptz) IS
    'Keeps the exposures of [p_from, p_until), before their facts are purged.';
