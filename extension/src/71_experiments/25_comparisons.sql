-- Room 71, comparisons: each arm of an experiment beside its control, and all that is said of both.
-- From a plan and its totals alone.

CREATE FUNCTION analytics._experiment_comparison(
    p_plan analytics._experiment_plan,
    p_is_rate boolean,
    p_units bigint,
    p_conversions bigint,
    p_estimate double precision,
    p_variance double precision,
    p_control_units bigint,
    p_control_conversions bigint,
    p_control_estimate double precision,
    p_control_variance double precision,
    OUT difference double precision,
    OUT difference_low double precision,
    OUT difference_high double precision,
    OUT lift double precision,
    OUT lift_low double precision,
    OUT lift_high double precision,
    OUT p_value double precision,
    OUT chance_to_win double precision,
    OUT credible_low double precision,
    OUT credible_high double precision,
    OUT expected_loss double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_units bigint := p_units + p_control_units;
    v_error double precision := sqrt(
        p_variance / p_units + p_control_variance / p_control_units
    );
BEGIN
    difference := p_estimate - p_control_estimate;
    IF difference IS NULL THEN
        RETURN;
    END IF;
    lift := difference / nullif(p_control_estimate, 0);
    SELECT b.chance_to_win, b.low, b.high, b.expected_loss
    INTO chance_to_win, credible_low, credible_high, expected_loss
    FROM spectrum.normal_posterior(difference, v_error, p_plan.confidence) AS b;

    IF p_plan.sequential IS NOT NULL THEN
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.sequential_test(
            v_units, difference, v_error, p_plan.sequential, p_plan.confidence
        ) AS t;
        SELECT t.low, t.high INTO lift_low, lift_high
        FROM spectrum.sequential_test(
            v_units, lift, spectrum._lift_error(
                p_units, p_estimate, p_variance,
                p_control_units, nullif(p_control_estimate, 0), p_control_variance
            ), p_plan.sequential, p_plan.confidence
        ) AS t;
        RETURN;
    ELSIF p_is_rate THEN
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.two_proportion_test(
            p_conversions, p_units, p_control_conversions, p_control_units, p_plan.confidence
        ) AS t;
    ELSE
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.welch_t_test(
            p_units, p_estimate, p_variance,
            p_control_units, p_control_estimate, p_control_variance, p_plan.confidence
        ) AS t;
    END IF;
    SELECT l.low, l.high INTO lift_low, lift_high
    FROM spectrum.lift_interval(
        p_units, p_estimate, p_variance,
        p_control_units, p_control_estimate, p_control_variance, p_plan.confidence
    ) AS l;
END
$$;
COMMENT ON FUNCTION analytics._experiment_comparison(
    analytics._experiment_plan, boolean, bigint, bigint, double precision, double precision,
    bigint, bigint, double precision, double precision
) IS
    'An arm against control: pooled z-test and Newcombe''s interval for a rate, Welch''s t for the '
    'rest, delta-method lift for all, or always-valid ones instead; and what the posterior says.';

CREATE FUNCTION analytics._experiment_results(
    p_plan analytics._experiment_plan, p_totals analytics._experiment_total[]
)
RETURNS TABLE (
    account_id text,
    experiment text,
    metric text,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    ci_low double precision,
    ci_high double precision,
    difference double precision,
    difference_low double precision,
    difference_high double precision,
    lift double precision,
    lift_low double precision,
    lift_high double precision,
    p_value double precision,
    p_adjusted double precision,
    srm_p_value double precision,
    is_reliable boolean,
    kind text,
    is_guardrail boolean,
    chance_to_win double precision,
    credible_low double precision,
    credible_high double precision,
    expected_loss double precision,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision,
    is_sequential boolean
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
-- thousands of accounts look like a few rows
SET enable_nestloop = off
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH arms AS MATERIALIZED (SELECT * FROM analytics._experiment_arms(p_plan, p_totals)),
    splits AS (
        SELECT a.account_id, (spectrum.sample_ratio_mismatch(
            array_agg(a.units ORDER BY a.variant),
            array_agg((p_plan.variants ->> a.variant)::double precision ORDER BY a.variant)
        )).p_value
        FROM arms AS a WHERE a.metric = p_plan.metrics[1] GROUP BY a.account_id
    ),
    comparisons AS MATERIALIZED (
        SELECT a.*, t.*, a.is_enough AND c.is_enough AS are_enough
        FROM arms AS a
        JOIN arms AS c ON c.account_id = a.account_id AND c.metric = a.metric AND c.is_control
        LEFT JOIN LATERAL analytics._experiment_comparison(
            p_plan, a.is_rate, a.units, a.conversions,
            -- control is not compared with itself
            CASE WHEN NOT a.is_control THEN a.value END, a.variance,
            c.units, c.conversions, c.value, c.variance
        ) AS t ON true
    ),
    families AS (
        SELECT c.account_id,
            array_agg(c.metric ORDER BY c.metric, c.variant) AS metrics,
            array_agg(c.variant ORDER BY c.metric, c.variant) AS variants,
            spectrum.adjust_p_values(
                array_agg(c.p_value ORDER BY c.metric, c.variant), p_plan.correction
            ) AS p_values
        FROM comparisons AS c WHERE NOT (c.is_control OR c.is_guardrail) GROUP BY c.account_id
    ),
    adjustments AS (
        SELECT f.account_id, a.* FROM families AS f,
            unnest(f.metrics, f.variants, f.p_values) AS a (metric, variant, p_value)
    )
    SELECT c.account_id, p_plan.experiment, c.metric, c.variant, c.is_control, c.units,
        c.excluded_units, c.conversions, c.value, c.low, c.high, c.difference, c.difference_low,
        c.difference_high, c.lift, c.lift_low, c.lift_high, c.p_value, a.p_value, s.p_value,
        c.are_enough AND coalesce(s.p_value >= 0.001, false), c.kind, c.is_guardrail,
        c.chance_to_win, c.credible_low, c.credible_high, c.expected_loss, c.winsor_low,
        c.winsor_high, c.theta, c.variance_reduction, p_plan.sequential IS NOT NULL
    FROM comparisons AS c
    JOIN splits AS s ON s.account_id = c.account_id
    LEFT JOIN adjustments AS a
        ON a.account_id = c.account_id AND a.metric = c.metric AND a.variant = c.variant;
END
$$;
COMMENT ON FUNCTION analytics._experiment_results(
    analytics._experiment_plan, analytics._experiment_total[]
) IS
    'The results of an experiment in each scope of its totals: arms, their comparison with '
    'control, the split against the plan, and p-values adjusted over all metrics and variants but '
    'guardrails.';
