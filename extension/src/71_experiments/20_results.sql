-- Room 71, results: what an experiment says. Totals of its units become values, intervals and tests
-- by the mathematics of room 70. Reads the definitions and the units; read by
-- analytics.experiment and by mv_experiment_results (30_standing.sql).

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

CREATE FUNCTION analytics._experiment_arms(
    p_experiment text,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    metric text,
    variant text,
    kind text,
    is_guardrail boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    mean double precision,
    variance double precision,
    estimate double precision,
    estimate_variance double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    WITH moments AS (
        SELECT
            t.*,
            (t.sum_x / nullif(t.units, 0))::double precision AS mean_x,
            (t.sum_y / nullif(t.units, 0))::double precision AS mean_y,
            ((t.sum_xx - t.sum_x * t.sum_x / nullif(t.units, 0)) / nullif(t.units - 1, 0))
                ::double precision AS variance_x,
            ((t.sum_yy - t.sum_y * t.sum_y / nullif(t.units, 0)) / nullif(t.units - 1, 0))
                ::double precision AS variance_y,
            ((t.sum_xy - t.sum_x * t.sum_y / nullif(t.units, 0)) / nullif(t.units - 1, 0))
                ::double precision AS covariance
        FROM analytics.experiments AS e
        CROSS JOIN LATERAL analytics._experiment_totals(
            e.experiment, e.variants, e.metrics, coalesce(p_from, e.starts_at),
            coalesce(p_to, e.ends_at), p_account, p_by_account
        ) AS t
        WHERE e.experiment = p_experiment
    )
    SELECT m.account_id, m.metric, m.variant, d.kind, d.is_guardrail, m.units, m.excluded_units,
        m.conversions, m.mean_x, m.variance_x
    FROM moments AS m
    JOIN analytics.metrics AS d ON d.metric = m.metric;
END
$$;
