-- Room 71, results: what an experiment says. Its totals become values, intervals and tests by the
-- mathematics of room 70. Reads no events; read by analytics.experiment and by
-- mv_experiment_results (30_standing.sql).

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

CREATE FUNCTION analytics._residual_covariance(
    p_n numeric,
    p_x numeric,
    p_y numeric,
    p_w numeric,
    p_v numeric,
    p_xw numeric,
    p_yw numeric,
    p_xv numeric,
    p_yv numeric
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_n > 1 AND p_y <> 0 AND p_v <> 0 THEN
        RETURN (
            (p_xw * p_y * p_v - p_x * p_v * p_yw - p_w * p_y * p_xv + p_x * p_w * p_yv)
            * p_n * p_n / ((p_n - 1) * p_y * p_y * p_v * p_v)
        )::double precision;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._residual_covariance(
    numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric
) IS
    'Sample covariance of two ratios by the delta method, from sums over n units: of what a unit '
    'has beyond x / y and beyond w / v, over the means of y and v. In numeric, so that nothing '
    'cancels. NULL below two units or without a ratio.';

CREATE FUNCTION analytics._cuped_theta(
    p_n numeric,
    p_x numeric,
    p_y numeric,
    p_w numeric,
    p_v numeric,
    p_ww numeric,
    p_vv numeric,
    p_wv numeric,
    p_xw numeric,
    p_xv numeric,
    p_yw numeric,
    p_yv numeric
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_variance double precision := analytics._residual_covariance(
        p_n, p_w, p_v, p_w, p_v, p_ww, p_wv, p_wv, p_vv
    );
BEGIN
    RETURN coalesce(analytics._residual_covariance(
        p_n, p_x, p_y, p_w, p_v, p_xw, p_yw, p_xv, p_yv
    ) / nullif(v_variance, 0), 0);
END
$$;
COMMENT ON FUNCTION analytics._cuped_theta(
    numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric,
    numeric, numeric
) IS
    'Slope of a metric over itself before the exposure: covariance / variance before; 0 where '
    'nothing varied before (Deng, Xu, Kohavi and Walker 2013; ratios by the delta method).';

CREATE FUNCTION analytics._experiment_moments(
    p_kind text,
    p_total analytics._experiment_total,
    p_theta double precision,
    p_before numeric,
    OUT value double precision,
    OUT variance double precision,
    OUT variance_reduction double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rest double precision;
BEGIN
    value := p_total.sum_x / nullif(p_total.sum_y, 0);
    IF p_kind = 'proportion' AND coalesce(p_theta, 0) = 0 THEN
        variance := value * (1 - value);
    ELSE
        variance := analytics._residual_covariance(
            p_total.units, p_total.sum_x, p_total.sum_y, p_total.sum_x, p_total.sum_y,
            p_total.sum_xx, p_total.sum_xy, p_total.sum_xy, p_total.sum_yy
        );
    END IF;
    v_rest := variance;
    IF p_theta <> 0 THEN
        value := value - p_theta * (p_total.sum_w / nullif(p_total.sum_v, 0) - p_before);
        v_rest := variance
            - 2 * p_theta * analytics._residual_covariance(
                p_total.units, p_total.sum_x, p_total.sum_y, p_total.sum_w, p_total.sum_v,
                p_total.sum_xw, p_total.sum_yw, p_total.sum_xv, p_total.sum_yv
            )
            + p_theta * p_theta * analytics._residual_covariance(
                p_total.units, p_total.sum_w, p_total.sum_v, p_total.sum_w, p_total.sum_v,
                p_total.sum_ww, p_total.sum_wv, p_total.sum_wv, p_total.sum_vv
            );
        -- what is left by rounding alone is nothing
        v_rest := CASE WHEN v_rest > 1e-12 * variance THEN v_rest ELSE 0 * v_rest END;
    END IF;
    IF p_theta IS NOT NULL THEN
        variance_reduction := 1 - v_rest / nullif(variance, 0);
    END IF;
    variance := v_rest;
END
$$;
COMMENT ON FUNCTION analytics._experiment_moments(
    text, analytics._experiment_total, double precision, numeric
) IS
    'Value of a metric in one arm and its variance per unit. With a theta both are adjusted by how '
    'far the arm was from all (p_before) before the exposure, and the share of the variance that '
    'this takes away is told.';

CREATE FUNCTION analytics._experiment_interval(
    p_plan analytics._experiment_plan,
    p_is_rate boolean,
    p_units bigint,
    p_conversions bigint,
    p_value double precision,
    p_variance double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_error double precision := sqrt(p_variance / p_units);
    v_margin double precision;
BEGIN
    IF p_plan.sequential IS NOT NULL THEN
        SELECT t.low, t.high INTO low, high
        FROM spectrum.sequential_test(
            p_units, p_value, v_error, p_plan.sequential, p_plan.confidence
        ) AS t;
    ELSIF p_is_rate THEN
        SELECT w.low, w.high INTO low, high
        FROM spectrum.wilson_interval(p_conversions, p_units, p_plan.confidence) AS w;
    ELSIF v_error > 0 THEN
        v_margin := v_error
            * spectrum.student_t_quantile((1 + p_plan.confidence) / 2, p_units - 1);
        low := p_value - v_margin;
        high := p_value + v_margin;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._experiment_interval(
    analytics._experiment_plan, boolean, bigint, bigint, double precision, double precision
) IS
    'Interval of a metric in one arm: Wilson for a rate, Student t for the rest, or an '
    'always-valid one; NULL where the units do not vary.';

CREATE FUNCTION analytics._experiment_arms(
    p_plan analytics._experiment_plan, p_totals analytics._experiment_total[]
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
    is_rate boolean,
    is_enough boolean,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH covariates AS (
        SELECT t.account_id, t.metric, sum(t.sum_w) / nullif(sum(t.sum_v), 0) AS before,
            -- an arm without a value before cannot be adjusted, so none is
            CASE WHEN bool_and(t.sum_v <> 0 OR t.units = 0) THEN analytics._cuped_theta(
                sum(t.units), sum(t.sum_x), sum(t.sum_y), sum(t.sum_w), sum(t.sum_v),
                sum(t.sum_ww), sum(t.sum_vv), sum(t.sum_wv), sum(t.sum_xw), sum(t.sum_xv),
                sum(t.sum_yw), sum(t.sum_yv)
            ) ELSE 0 END AS theta
        FROM unnest(p_totals) AS t
        WHERE p_plan.cuped IS NOT NULL
        GROUP BY t.account_id, t.metric
    ),
    estimates AS (
        SELECT t, m.kind, m.is_guardrail, v.theta, s.*,
            m.kind = 'proportion' AND coalesce(v.theta, 0) = 0 AS is_rate
        FROM unnest(p_totals) AS t
        JOIN analytics._measures(p_plan.measures) AS m ON m.metric = t.metric
        LEFT JOIN covariates AS v ON v.account_id = t.account_id AND v.metric = t.metric
        CROSS JOIN LATERAL analytics._experiment_moments(m.kind, t, v.theta, v.before) AS s
    )
    SELECT (e.t).account_id, (e.t).metric, e.kind, e.is_guardrail, (e.t).variant,
        (e.t).variant = p_plan.control, (e.t).units, (e.t).excluded_units, (e.t).conversions,
        e.value, e.variance, i.low, i.high, e.is_rate,
        -- A mean does not need units that did nothing, a proportion does.
        (e.t).units >= 50 AND (e.t).conversions >= 5
            AND (e.kind <> 'proportion' OR (e.t).units - (e.t).conversions >= 5),
        (e.t).winsor_low, (e.t).winsor_high, e.theta, e.variance_reduction
    FROM estimates AS e
    CROSS JOIN LATERAL analytics._experiment_interval(
        p_plan, e.is_rate, (e.t).units, (e.t).conversions, e.value, e.variance
    ) AS i;
END
$$;
COMMENT ON FUNCTION analytics._experiment_arms(
    analytics._experiment_plan, analytics._experiment_total[]
) IS
    'Each metric of an experiment in each variant and scope: units, value, interval, and whether '
    'there is enough of it to rely on. theta is one for all variants of a metric.';
