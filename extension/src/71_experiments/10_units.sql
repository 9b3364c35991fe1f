-- Room 71, units: who saw which variant, and what each did afterwards. A unit is a user; his first
-- exposure counts. Reads analytics.events only; read by the results.

CREATE FUNCTION analytics._experiment_units(
    p_experiment text,
    p_variants jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, user_key bigint, variant text, exposed_at timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH flags AS (
        -- PostHog's clients report an exposure as the call of a feature flag.
        SELECT
            CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
            e.user_key,
            e.occurred_at,
            CASE e.event_type
                WHEN 'experiment_exposure' THEN e.properties ->> 'experiment'
                ELSE e.properties ->> '$feature_flag'
            END AS flag,
            CASE e.event_type
                WHEN 'experiment_exposure' THEN e.properties ->> 'variant'
                ELSE e.properties ->> '$feature_flag_response'
            END AS variant
        FROM analytics.events AS e
        WHERE e.event_type IN ('experiment_exposure', '$feature_flag_called')
            AND e.user_key <> 0
            AND (p_from IS NULL OR e.occurred_at >= p_from)
            AND (p_to IS NULL OR e.occurred_at < p_to)
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
    )
    SELECT
        f.scope,
        f.user_key,
        CASE WHEN min(f.variant) = max(f.variant) AND p_variants ? min(f.variant)
            THEN min(f.variant)
        END,
        min(f.occurred_at)
    FROM flags AS f
    WHERE f.flag = p_experiment AND f.variant <> ''
    GROUP BY f.scope, f.user_key;
END
$$;
COMMENT ON FUNCTION analytics._experiment_units(
    text, jsonb, timestamptz, timestamptz, text, boolean
) IS
    'The users of an experiment, each with his variant and first exposure in [p_from, p_to). The '
    'variant of a unit that saw several, or one that is not planned, is NULL: it is left out.';

CREATE FUNCTION analytics._experiment_contributions(
    p_experiment text,
    p_variants jsonb,
    p_metrics text[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    variant text,
    metric text,
    has_converted boolean,
    amount numeric,
    denominator numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET timezone = 'UTC'
AS $$
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT * FROM analytics._experiment_units(
            p_experiment, p_variants, p_from, p_to, p_account, p_by_account
        )
    ),
    sides AS (
        SELECT m.metric, m.time_window, s.*
        FROM analytics.metrics AS m
        CROSS JOIN LATERAL (
            VALUES
                (true, m.event_type, m.property, m.properties_filter),
                (false, m.denominator_event_type, m.denominator_property, m.denominator_filter)
        ) AS s (is_upper, event_type, property, properties_filter)
        WHERE m.metric = ANY (p_metrics) AND s.event_type IS NOT NULL
    ),
    amounts AS (
        SELECT u.account_id, u.user_key, u.variant, s.metric, s.is_upper,
            CASE
                WHEN s.property IS NULL THEN 1
                WHEN jsonb_typeof(e.properties -> s.property) = 'number'
                    THEN (e.properties -> s.property)::numeric
                WHEN jsonb_typeof(e.properties -> s.property) = 'string'
                    THEN analytics._text_number(e.properties ->> s.property)
            END AS amount
        FROM units AS u
        JOIN analytics.events AS e ON e.user_key = u.user_key AND e.occurred_at >= u.exposed_at
        JOIN sides AS s ON s.event_type = e.event_type
        WHERE u.variant IS NOT NULL
            AND e.event_type = ANY (ARRAY(SELECT s.event_type FROM sides AS s))
            AND (NOT p_by_account OR e.account_id = u.account_id)
            AND (p_account IS NULL OR e.account_id = p_account)
            -- A window runs on after the end of the experiment, else that end cuts.
            AND CASE
                WHEN s.time_window IS NOT NULL THEN e.occurred_at < u.exposed_at + s.time_window
                ELSE p_to IS NULL OR e.occurred_at < p_to
            END
            AND (s.properties_filter IS NULL OR e.properties @> s.properties_filter)
    )
    SELECT u.account_id, u.user_key, u.variant, NULL, false, NULL::numeric, NULL::numeric
    FROM units AS u
    UNION ALL
    SELECT a.account_id, a.user_key, a.variant, a.metric, bool_or(a.is_upper),
        -- Rounded, so that no product of them leaves the range of double precision.
        trim_scale(round(coalesce(sum(a.amount) FILTER (WHERE a.is_upper), 0), 15)),
        trim_scale(round(coalesce(sum(a.amount) FILTER (WHERE NOT a.is_upper), 0), 15))
    FROM amounts AS a
    WHERE abs(a.amount) < 1e15
    GROUP BY a.account_id, a.user_key, a.variant, a.metric;
END
$$;
COMMENT ON FUNCTION analytics._experiment_contributions(
    text, jsonb, text[], timestamptz, timestamptz, text, boolean
) IS
    'What each unit contributes: itself, in a row without a metric, and to each metric its sums '
    'from the first exposure on, inside the metric''s window. A unit that did nothing of a metric '
    'has no row for it and counts as 0.';

CREATE FUNCTION analytics._experiment_totals(
    p_experiment text,
    p_variants jsonb,
    p_metrics text[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    metric text,
    variant text,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    sum_x numeric,
    sum_xx numeric,
    sum_y numeric,
    sum_yy numeric,
    sum_xy numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    WITH contributions AS MATERIALIZED (
        SELECT * FROM analytics._experiment_contributions(
            p_experiment, p_variants, p_metrics, p_from, p_to, p_account, p_by_account
        )
    ),
    counts AS (
        SELECT c.account_id, c.variant, count(*) AS units
        FROM contributions AS c
        WHERE c.metric IS NULL
        GROUP BY c.account_id, c.variant
    ),
    scopes AS (
        SELECT DISTINCT c.account_id FROM counts AS c
        UNION
        SELECT coalesce(p_account, '*') WHERE NOT p_by_account
    ),
    sums AS (
        SELECT
            c.account_id,
            c.metric,
            c.variant,
            count(*) FILTER (WHERE c.has_converted) AS conversions,
            sum(c.amount) AS sum_x,
            sum(c.amount * c.amount) AS sum_xx,
            sum(c.denominator) AS sum_y,
            sum(c.denominator * c.denominator) AS sum_yy,
            sum(c.amount * c.denominator) AS sum_xy
        FROM contributions AS c
        WHERE c.metric IS NOT NULL
        GROUP BY c.account_id, c.metric, c.variant
    )
    SELECT
        g.account_id,
        m.metric,
        v.variant,
        coalesce(c.units, 0),
        coalesce(x.units, 0),
        coalesce(s.conversions, 0),
        coalesce(s.sum_x, 0),
        coalesce(s.sum_xx, 0),
        coalesce(s.sum_y, 0),
        coalesce(s.sum_yy, 0),
        coalesce(s.sum_xy, 0)
    FROM scopes AS g
    CROSS JOIN unnest(p_metrics) AS m (metric)
    CROSS JOIN jsonb_object_keys(p_variants) AS v (variant)
    LEFT JOIN counts AS c ON c.account_id = g.account_id AND c.variant = v.variant
    LEFT JOIN counts AS x ON x.account_id = g.account_id AND x.variant IS NULL
    LEFT JOIN sums AS s
        ON s.account_id = g.account_id AND s.metric = m.metric AND s.variant = v.variant;
END
$$;
COMMENT ON FUNCTION analytics._experiment_totals(
    text, jsonb, text[], timestamptz, timestamptz, text, boolean
) IS
    'Units and sums of each scope, metric and planned variant: all that the statistics need, and '
    'each of them a sum over units.';
