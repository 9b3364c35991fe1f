-- Room 71, totals: sums over the units of each variant. Nothing but sums, so what is new is added
-- to what was there; only winsorizing needs to see each unit's amount. Read by the results.

CREATE FUNCTION analytics._winsorize_contributions(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_report integer,
    p_accounts text[]
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
        SELECT c.* FROM analytics._experiment_contributions(p_plan, p_account, p_by_account) AS c
        WHERE p_report IS NULL
        UNION ALL
        SELECT k.* FROM analytics._kept_contributions(p_report, p_accounts) AS k
        WHERE p_report IS NOT NULL
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
            JOIN analytics._measures(p_plan.measures) AS m
                ON m.metric = c.metric AND m.kind <> 'proportion'
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
    analytics._experiment_plan, text, boolean, integer, text[]
) IS
    'The contributions, with amounts cut at percentiles over all units of the scope, whatever '
    'their variant, where the plan says so. Each of the four amounts has percentiles of its own. '
    'Of a standing report, if one is given: those it keeps, of these accounts.';

CREATE FUNCTION analytics._experiment_sums(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_report integer DEFAULT NULL,
    p_accounts text[] DEFAULT NULL
)
RETURNS SETOF analytics._experiment_total
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    SELECT c.account_id, coalesce(c.metric, ''), coalesce(c.variant, ''), count(*), 0::bigint,
        count(*) FILTER (WHERE c.has_converted),
        sum(c.x), sum(c.x * c.x), sum(c.y), sum(c.y * c.y), sum(c.x * c.y),
        sum(c.w), sum(c.w * c.w), sum(c.v), sum(c.v * c.v), sum(c.w * c.v),
        sum(c.x * c.w), sum(c.x * c.v), sum(c.y * c.w), sum(c.y * c.v),
        min(c.low), max(c.high)
    FROM analytics._winsorize_contributions(
        p_plan, p_account, p_by_account, p_report, p_accounts
    ) AS c
    GROUP BY c.account_id, c.metric, c.variant;
END
$$;
COMMENT ON FUNCTION analytics._experiment_sums(
    analytics._experiment_plan, text, boolean, integer, text[]
) IS
    'Sums over the contributions of each scope, metric and variant. The units of a variant are the '
    'row without a metric; those left out the one without a variant either.';

CREATE FUNCTION analytics._experiment_totals(
    p_plan analytics._experiment_plan, p_scope text, p_sums analytics._experiment_total[]
)
RETURNS SETOF analytics._experiment_total
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH sums AS MATERIALIZED (SELECT * FROM unnest(p_sums)),
    scopes AS (
        SELECT c.account_id, coalesce(sum(c.units), 0)::bigint AS excluded_units
        FROM (
            SELECT s.account_id, CASE WHEN s.metric = '' AND s.variant = '' THEN s.units END
                AS units
            FROM sums AS s
            UNION ALL
            SELECT p_scope, NULL WHERE p_scope IS NOT NULL
        ) AS c
        GROUP BY c.account_id
    ),
    cuts AS (
        SELECT s.account_id, s.metric, min(s.winsor_low) AS low, max(s.winsor_high) AS high
        FROM sums AS s
        GROUP BY s.account_id, s.metric
    )
    SELECT g.account_id, m.metric, v.variant, n.units, g.excluded_units,
        coalesce(s.conversions, 0), trim_scale(coalesce(s.sum_x, 0)),
        trim_scale(coalesce(s.sum_xx, 0)),
        -- but for a ratio, every unit has 1 below
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_y, 0)) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_yy, 0)) ELSE n.units END,
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_xy ELSE s.sum_x END, 0)),
        trim_scale(coalesce(s.sum_w, 0)), trim_scale(coalesce(s.sum_ww, 0)),
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_v, 0)) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_vv, 0)) ELSE n.units END,
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_wv ELSE s.sum_w END, 0)),
        trim_scale(coalesce(s.sum_xw, 0)),
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_xv ELSE s.sum_x END, 0)),
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_yw ELSE s.sum_w END, 0)),
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_yv, 0)) ELSE n.units END,
        CASE WHEN p_plan.winsorize < 1 AND m.kind <> 'proportion' THEN coalesce(b.low, 0) END,
        CASE WHEN p_plan.winsorize < 1 AND m.kind <> 'proportion' THEN coalesce(b.high, 0) END
    FROM scopes AS g
    CROSS JOIN analytics._measures(p_plan.measures) AS m
    CROSS JOIN jsonb_object_keys(p_plan.variants) AS v (variant)
    LEFT JOIN sums AS c
        ON c.account_id = g.account_id AND c.metric = '' AND c.variant = v.variant
    CROSS JOIN LATERAL (SELECT coalesce(c.units, 0) AS units) AS n
    LEFT JOIN sums AS s
        ON s.account_id = g.account_id AND s.metric = m.metric AND s.variant = v.variant
    LEFT JOIN cuts AS b ON b.account_id = g.account_id AND b.metric = m.metric;
END
$$;
COMMENT ON FUNCTION analytics._experiment_totals(
    analytics._experiment_plan, text, analytics._experiment_total[]
) IS
    'Units and sums of each scope, metric and planned variant, with zeros where nobody came: all '
    'that the statistics need. p_scope is there even without units.';
