-- Room 71, results: what an experiment says. Sums over its units become values, intervals and tests
-- by the mathematics of room 70. Reads the definitions and the units; read by analytics.experiment
-- and by mv_experiment_results (30_standing.sql).

CREATE FUNCTION analytics._check_confidence(p_confidence double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_confidence IS NULL OR p_confidence <= 0 OR p_confidence >= 1 THEN
        PERFORM spectrum._reject(
            'p_confidence', p_confidence::text, 'a number between 0 and 1, such as 0.95'
        );
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_confidence(double precision) IS
    'Raises 22023 unless the number can be a confidence.';

CREATE FUNCTION analytics._covariance(
    p_n numeric, p_sum_a numeric, p_sum_b numeric, p_sum_ab numeric
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_n > 1 THEN
        RETURN ((p_n * p_sum_ab - p_sum_a * p_sum_b) / (p_n * (p_n - 1)))::double precision;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._covariance(numeric, numeric, numeric, numeric) IS
    'Sample covariance from sums, in numeric: exact up to its last step. NULL below two units.';

CREATE FUNCTION analytics._experiment_estimate(
    p_kind text,
    p_confidence double precision,
    p_units bigint,
    p_conversions bigint,
    p_sum_x numeric,
    p_sum_xx numeric,
    p_sum_y numeric,
    p_sum_yy numeric,
    p_sum_xy numeric,
    OUT value double precision,
    OUT variance double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_margin double precision;
BEGIN
    IF p_units = 0 THEN
        RETURN;
    ELSIF p_kind = 'proportion' THEN
        value := p_conversions / p_units::double precision;
        variance := value * (1 - value);
        SELECT w.low, w.high INTO low, high
        FROM spectrum.wilson_interval(p_conversions, p_units, p_confidence) AS w;
        RETURN;
    ELSIF p_kind = 'mean' THEN
        value := (p_sum_x / p_units)::double precision;
        variance := analytics._covariance(p_units, p_sum_x, p_sum_x, p_sum_xx);
    ELSE
        value := (p_sum_x / nullif(p_sum_y, 0))::double precision;
        -- Of a unit's amounts only its residual x - value * y matters: its variance is made here,
        -- in numeric, where nothing cancels.
        SELECT r.variance * p_units INTO variance
        FROM spectrum.ratio_variance(
            p_units,
            p_sum_x / p_units,
            analytics._covariance(p_units, 0, 0, (
                p_sum_xx * p_sum_y * p_sum_y - 2 * p_sum_xy * p_sum_x * p_sum_y
                + p_sum_yy * p_sum_x * p_sum_x
            ) / nullif(p_sum_y * p_sum_y, 0)),
            p_sum_y / p_units,
            0,
            0
        ) AS r;
    END IF;
    IF variance > 0 THEN
        v_margin := sqrt(variance / p_units)
            * spectrum.student_t_quantile((1 + p_confidence) / 2, p_units - 1);
        low := value - v_margin;
        high := value + v_margin;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._experiment_estimate(
    text, double precision, bigint, bigint, numeric, numeric, numeric, numeric, numeric
) IS
    'Value of a metric in one arm, its variance per unit, and its interval: Wilson for a '
    'proportion, Student t for a mean and a ratio; NULL where the units do not vary.';

CREATE FUNCTION analytics._experiment_comparison(
    p_kind text,
    p_confidence double precision,
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
    OUT p_value double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    difference := p_estimate - p_control_estimate;
    lift := difference / nullif(p_control_estimate, 0);
    IF p_kind = 'proportion' THEN
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.two_proportion_test(
            p_conversions, p_units, p_control_conversions, p_control_units, p_confidence
        ) AS t;
    ELSE
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.welch_t_test(
            p_units, p_estimate, p_variance,
            p_control_units, p_control_estimate, p_control_variance,
            p_confidence
        ) AS t;
    END IF;
    SELECT l.low, l.high INTO lift_low, lift_high
    FROM spectrum.lift_interval(
        p_units, p_estimate, p_variance,
            p_control_units, p_control_estimate, p_control_variance,
        p_confidence
    ) AS l;
END
$$;
COMMENT ON FUNCTION analytics._experiment_comparison(
    text, double precision, bigint, bigint, double precision, double precision, bigint, bigint,
    double precision, double precision
) IS
    'An arm against control: pooled z-test and Newcombe''s interval for a proportion, Welch''s t '
    'for a mean and a ratio, delta-method lift for all.';

CREATE FUNCTION analytics._experiment_arms(
    p_experiment text,
    p_account text,
    p_from timestamptz,
    p_to timestamptz,
    p_confidence double precision,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    metric text,
    kind text,
    is_guardrail boolean,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    variance double precision,
    low double precision,
    high double precision,
    is_enough boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT
        t.account_id, t.metric, m.kind, m.is_guardrail, t.variant, t.variant = e.control,
        t.units, t.excluded_units, t.conversions, s.value, s.variance, s.low, s.high,
        -- A mean does not need units that did nothing, a proportion does.
        t.units >= 50 AND t.conversions >= 5
            AND (m.kind <> 'proportion' OR t.units - t.conversions >= 5)
    FROM analytics.experiments AS e
    CROSS JOIN LATERAL analytics._experiment_totals(
        e.experiment, e.variants, e.metrics, coalesce(p_from, e.starts_at),
        coalesce(p_to, e.ends_at), p_account, p_by_account
    ) AS t
    JOIN analytics.metrics AS m ON m.metric = t.metric
    CROSS JOIN LATERAL analytics._experiment_estimate(
        m.kind, coalesce(p_confidence, e.confidence), t.units, t.conversions,
        t.sum_x, t.sum_xx, t.sum_y, t.sum_yy, t.sum_xy
    ) AS s
    WHERE e.experiment = p_experiment;
END
$$;
COMMENT ON FUNCTION analytics._experiment_arms(
    text, text, timestamptz, timestamptz, double precision, boolean
) IS
    'Each metric of an experiment in each variant and scope: units, value, interval, and whether '
    'there is enough of it to rely on. NULL arguments: as the experiment is defined.';

CREATE FUNCTION analytics._experiment_results(
    p_experiment text,
    p_account text,
    p_from timestamptz,
    p_to timestamptz,
    p_confidence double precision,
    p_correction text,
    p_by_account boolean
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
    is_guardrail boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_plan record;
BEGIN
    SELECT e.variants, e.metrics, coalesce(p_confidence, e.confidence) AS confidence,
        coalesce(p_correction, e.correction) AS correction
    INTO r_plan FROM analytics.experiments AS e WHERE e.experiment = p_experiment;
    RETURN QUERY
    WITH arms AS MATERIALIZED (
        SELECT * FROM analytics._experiment_arms(
            p_experiment, p_account, p_from, p_to, p_confidence, p_by_account
        )
    ),
    splits AS (
        SELECT a.account_id, (spectrum.sample_ratio_mismatch(
            array_agg(a.units ORDER BY a.variant),
            array_agg((r_plan.variants ->> a.variant)::double precision ORDER BY a.variant)
        )).p_value
        FROM arms AS a WHERE a.metric = r_plan.metrics[1] GROUP BY a.account_id
    ),
    comparisons AS MATERIALIZED (
        SELECT a.*, t.*, a.is_enough AND c.is_enough AS are_enough
        FROM arms AS a
        JOIN arms AS c ON c.account_id = a.account_id AND c.metric = a.metric AND c.is_control
        LEFT JOIN LATERAL analytics._experiment_comparison(
            a.kind, r_plan.confidence, a.units, a.conversions, a.value, a.variance,
            c.units, c.conversions, c.value, c.variance
        ) AS t ON NOT a.is_control
    ),
    families AS (
        SELECT c.account_id,
            array_agg(c.metric ORDER BY c.metric, c.variant) AS metrics,
            array_agg(c.variant ORDER BY c.metric, c.variant) AS variants,
            spectrum.adjust_p_values(
                array_agg(c.p_value ORDER BY c.metric, c.variant), r_plan.correction
            ) AS p_values
        FROM comparisons AS c WHERE NOT c.is_control AND NOT c.is_guardrail GROUP BY c.account_id
    ),
    adjustments AS (
        SELECT f.account_id, a.* FROM families AS f
        CROSS JOIN unnest(f.metrics, f.variants, f.p_values) AS a (metric, variant, p_value)
    )
    SELECT c.account_id, p_experiment, c.metric, c.variant, c.is_control, c.units,
        c.excluded_units, c.conversions, c.value, c.low, c.high, c.difference, c.difference_low,
        c.difference_high, c.lift, c.lift_low, c.lift_high, c.p_value, a.p_value, s.p_value,
        c.are_enough AND coalesce(s.p_value >= 0.001, false), c.kind, c.is_guardrail
    FROM comparisons AS c
    JOIN splits AS s ON s.account_id = c.account_id
    LEFT JOIN adjustments AS a
        ON a.account_id = c.account_id AND a.metric = c.metric AND a.variant = c.variant;
END
$$;
COMMENT ON FUNCTION analytics._experiment_results(
    text, text, timestamptz, timestamptz, double precision, text, boolean
) IS
    'The results of an experiment in each scope: arms, their comparison with control, the split '
    'against the plan, and p-values adjusted over all metrics and variants but guardrails.';
