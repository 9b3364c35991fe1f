-- Room 71, totals: sums over the units of each variant. Nothing but sums, so what is new is added
-- to what was there; only winsorizing needs to see each unit's amount. Read by the results.

CREATE FUNCTION analytics._winsorize_contributions(
    p_plan analytics._experiment_plan, p_account text, p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    variant text,
    metric text,
    has_converted boolean,
    x numeric,
    y numeric,
    w numeric,
    v numeric,
    low numeric,
    high numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH contributions AS MATERIALIZED (
        SELECT * FROM analytics._experiment_contributions(p_plan, p_account, p_by_account)
    ),
    crowds AS (
        SELECT c.account_id, count(*) AS units
        FROM contributions AS c
        WHERE c.metric IS NULL AND c.variant IS NOT NULL
        GROUP BY c.account_id
    ),
    bounds AS (
        SELECT c.account_id, c.metric, b.*
        FROM (
            SELECT c.account_id, c.metric, g.units - count(*) AS zeros,
                array_agg(c.amount) AS x, array_agg(c.denominator) AS y,
                array_agg(c.amount_before) AS w, array_agg(c.denominator_before) AS v
            FROM contributions AS c
            JOIN crowds AS g ON g.account_id = c.account_id
            JOIN analytics.metrics AS m ON m.metric = c.metric AND m.kind <> 'proportion'
            WHERE p_plan.winsorize IS NOT NULL
            GROUP BY c.account_id, c.metric, g.units
        ) AS c
        CROSS JOIN LATERAL (
            SELECT
                x.low AS x_low, x.high AS x_high, y.low AS y_low, y.high AS y_high,
                w.low AS w_low, w.high AS w_high, v.low AS v_low, v.high AS v_high
            FROM spectrum.winsor_bounds(c.x, p_plan.winsorize, c.zeros) AS x,
                spectrum.winsor_bounds(c.y, p_plan.winsorize, c.zeros) AS y,
                spectrum.winsor_bounds(c.w, p_plan.winsorize, c.zeros) AS w,
                spectrum.winsor_bounds(c.v, p_plan.winsorize, c.zeros) AS v
        ) AS b
    )
    SELECT c.account_id, c.variant, c.metric, c.has_converted,
        -- a bound that is NULL does not cut
        greatest(least(c.amount, b.x_high), b.x_low),
        greatest(least(c.denominator, b.y_high), b.y_low),
        greatest(least(c.amount_before, b.w_high), b.w_low),
        greatest(least(c.denominator_before, b.v_high), b.v_low),
        b.x_low, b.x_high
    FROM contributions AS c
    LEFT JOIN bounds AS b ON b.account_id = c.account_id AND b.metric = c.metric;
END
$$;
COMMENT ON FUNCTION analytics._winsorize_contributions(
    analytics._experiment_plan, text, boolean
) IS
    'The contributions, with amounts cut at percentiles over all units of the scope, whatever '
    'their variant, where the plan says so. Each of the four amounts has percentiles of its own.';

CREATE FUNCTION analytics._experiment_totals(
    p_plan analytics._experiment_plan, p_account text, p_by_account boolean
)
RETURNS SETOF analytics._experiment_total
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH contributions AS MATERIALIZED (
        SELECT * FROM analytics._winsorize_contributions(p_plan, p_account, p_by_account)
    ),
    counts AS (
        SELECT c.account_id, c.variant, count(*) AS units
        FROM contributions AS c
        WHERE c.metric IS NULL
        GROUP BY c.account_id, c.variant
    ),
    scopes AS (
        SELECT c.account_id,
            coalesce(sum(c.units) FILTER (WHERE c.variant IS NULL), 0)::bigint AS excluded_units
        FROM (
            SELECT * FROM counts
            UNION ALL
            SELECT coalesce(p_account, '*'), NULL, 0 WHERE NOT p_by_account
        ) AS c
        GROUP BY c.account_id
    ),
    cuts AS (
        SELECT c.account_id, c.metric, min(c.low) AS low, max(c.high) AS high
        FROM contributions AS c
        WHERE p_plan.winsorize IS NOT NULL
        GROUP BY c.account_id, c.metric
    ),
    sums AS (
        SELECT c.account_id, c.metric, c.variant,
            count(*) FILTER (WHERE c.has_converted) AS conversions,
            sum(c.x) AS x, sum(c.x * c.x) AS xx,
            sum(c.y) AS y, sum(c.y * c.y) AS yy, sum(c.x * c.y) AS xy,
            sum(c.w) AS w, sum(c.w * c.w) AS ww,
            sum(c.v) AS v, sum(c.v * c.v) AS vv, sum(c.w * c.v) AS wv,
            sum(c.x * c.w) AS xw, sum(c.x * c.v) AS xv, sum(c.y * c.w) AS yw, sum(c.y * c.v) AS yv
        FROM contributions AS c
        WHERE c.metric IS NOT NULL
        GROUP BY c.account_id, c.metric, c.variant
    )
    SELECT g.account_id, m.metric, v.variant, n.units, g.excluded_units,
        coalesce(s.conversions, 0), coalesce(s.x, 0), coalesce(s.xx, 0),
        -- but for a ratio, every unit has 1 below
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.y, 0) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.yy, 0) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.xy, 0) ELSE coalesce(s.x, 0) END,
        coalesce(s.w, 0), coalesce(s.ww, 0),
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.v, 0) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.vv, 0) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.wv, 0) ELSE coalesce(s.w, 0) END,
        coalesce(s.xw, 0),
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.xv, 0) ELSE coalesce(s.x, 0) END,
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.yw, 0) ELSE coalesce(s.w, 0) END,
        CASE WHEN m.kind = 'ratio' THEN coalesce(s.yv, 0) ELSE n.units END,
        CASE WHEN p_plan.winsorize < 1 AND m.kind <> 'proportion' THEN coalesce(b.low, 0) END,
        CASE WHEN p_plan.winsorize < 1 AND m.kind <> 'proportion' THEN coalesce(b.high, 0) END
    FROM scopes AS g
    CROSS JOIN analytics.metrics AS m
    CROSS JOIN jsonb_object_keys(p_plan.variants) AS v (variant)
    LEFT JOIN counts AS c ON c.account_id = g.account_id AND c.variant = v.variant
    CROSS JOIN LATERAL (SELECT coalesce(c.units, 0) AS units) AS n
    LEFT JOIN sums AS s
        ON s.account_id = g.account_id AND s.metric = m.metric AND s.variant = v.variant
    LEFT JOIN cuts AS b ON b.account_id = g.account_id AND b.metric = m.metric
    WHERE m.metric = ANY (p_plan.metrics);
END
$$;
COMMENT ON FUNCTION analytics._experiment_totals(
    analytics._experiment_plan, text, boolean
) IS
    'Units and sums of each scope, metric and planned variant: all that the statistics need.';
