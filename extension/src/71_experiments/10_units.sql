-- Room 71, units: who saw which variant, and what each did before and afterwards. A unit is a user;
-- his first exposure counts. Reads analytics.events only; read by the totals. What a unit is and
-- does follows from his own events alone, so both may be asked of some users only.

CREATE FUNCTION analytics._experiment_units(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_users bigint[] DEFAULT NULL
)
RETURNS TABLE (account_id text, user_key bigint, variant text, exposed_at timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_types integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('experiment_exposure', '$feature_flag_called')
    );
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
        WHERE e.event_type_key = ANY (v_types)
            AND e.user_key <> 0
            AND (p_users IS NULL OR e.user_key = ANY (p_users))
            AND (p_plan.starts_at IS NULL OR e.occurred_at >= p_plan.starts_at)
            AND (p_plan.ends_at IS NULL OR e.occurred_at < p_plan.ends_at)
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
    )
    SELECT
        f.scope,
        f.user_key,
        CASE WHEN min(f.variant) = max(f.variant) AND p_plan.variants ? min(f.variant)
            THEN min(f.variant)
        END,
        min(f.occurred_at)
    FROM flags AS f
    WHERE f.flag = p_plan.experiment AND f.variant <> ''
    GROUP BY f.scope, f.user_key;
END
$$;
COMMENT ON FUNCTION analytics._experiment_units(
    analytics._experiment_plan, text, boolean, bigint[]
) IS
    'The users of an experiment (of these, if given), each with his variant and first exposure. '
    'The variant of a unit that saw several, or one that is not planned, is NULL: it is left out.';

CREATE FUNCTION analytics._metric_sides(p_metrics text[])
RETURNS TABLE (
    metric text,
    is_upper boolean,
    event_type_key integer,
    property text,
    properties_filter jsonb,
    time_window interval,
    most integer
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 10
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT m.metric, s.is_upper, t.event_type_key, s.property, s.properties_filter, m.time_window,
        CASE WHEN m.kind = 'proportion' THEN 1 END
    FROM analytics.metrics AS m
    CROSS JOIN LATERAL (
        VALUES
            (true, m.event_type, m.property, m.properties_filter),
            (false, m.denominator_event_type, m.denominator_property, m.denominator_filter)
    ) AS s (is_upper, event_type, property, properties_filter)
    JOIN analytics.event_types AS t ON t.event_type = s.event_type
    WHERE m.metric = ANY (p_metrics);
END
$$;
COMMENT ON FUNCTION analytics._metric_sides(text[]) IS
    'What metrics count of which events: the upper side, and of a ratio the lower. most: a unit '
    'counts no more than this.';

CREATE FUNCTION analytics._experiment_contributions(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_users bigint[] DEFAULT NULL
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    variant text,
    metric text,
    has_converted boolean,
    amount numeric,
    denominator numeric,
    amount_before numeric,
    denominator_before numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET timezone = 'UTC'
SET jit = off
AS $$
DECLARE
    v_types integer[] := ARRAY(
        SELECT s.event_type_key FROM analytics._metric_sides(p_plan.metrics) AS s
    );
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT * FROM analytics._experiment_units(p_plan, p_account, p_by_account, p_users)
    ),
    happenings AS (
        SELECT u.*, e.event_type_key, e.occurred_at, e.properties
        FROM units AS u
        JOIN analytics.events AS e ON e.user_key = u.user_key
            AND e.occurred_at >= u.exposed_at - coalesce(p_plan.cuped, '0')
        WHERE u.variant IS NOT NULL
            AND e.event_type_key = ANY (v_types)
            AND (p_users IS NULL OR e.user_key = ANY (p_users))
            AND (NOT p_by_account OR e.account_id = u.account_id)
            AND (p_account IS NULL OR e.account_id = p_account)
        -- a fence: properties are looked into after the units are known
        OFFSET 0
    ),
    amounts AS (
        SELECT h.account_id, h.user_key, h.variant, s.metric, s.most, s.is_upper,
            h.occurred_at < h.exposed_at AS is_before,
            CASE
                WHEN s.property IS NULL THEN 1
                WHEN jsonb_typeof(h.properties -> s.property) = 'number'
                    THEN (h.properties -> s.property)::numeric
                WHEN jsonb_typeof(h.properties -> s.property) = 'string'
                    THEN analytics._text_number(h.properties ->> s.property)
            END AS amount
        FROM happenings AS h
        JOIN analytics._metric_sides(p_plan.metrics) AS s ON s.event_type_key = h.event_type_key
        WHERE
            -- A window runs on after the end of the experiment, else that end cuts.
            CASE
                WHEN s.time_window IS NOT NULL THEN h.occurred_at < h.exposed_at + s.time_window
                ELSE p_plan.ends_at IS NULL OR h.occurred_at < p_plan.ends_at
            END
            AND (s.properties_filter IS NULL OR h.properties @> s.properties_filter)
        OFFSET 0
    ),
    sums AS (
        SELECT a.account_id, a.user_key, a.variant, a.metric, a.most,
            coalesce(bool_or(a.is_upper) FILTER (WHERE NOT a.is_before), false) AS has_converted,
            coalesce(sum(a.amount) FILTER (WHERE a.is_upper AND NOT a.is_before), 0) AS x,
            coalesce(sum(a.amount) FILTER (WHERE NOT a.is_upper AND NOT a.is_before), 0) AS y,
            coalesce(sum(a.amount) FILTER (WHERE a.is_upper AND a.is_before), 0) AS w,
            coalesce(sum(a.amount) FILTER (WHERE NOT a.is_upper AND a.is_before), 0) AS v
        FROM amounts AS a
        WHERE abs(a.amount) < 1e15
        GROUP BY a.account_id, a.user_key, a.variant, a.metric, a.most
    )
    SELECT u.account_id, u.user_key, u.variant, NULL, false, NULL::numeric, NULL::numeric,
        NULL::numeric, NULL::numeric
    FROM units AS u
    UNION ALL
    -- Rounded, so that no product of them leaves the range of double precision.
    SELECT s.account_id, s.user_key, s.variant, s.metric, s.has_converted,
        trim_scale(round(least(s.x, s.most), 15)),
        trim_scale(round(s.y, 15)),
        trim_scale(round(least(s.w, s.most), 15)),
        trim_scale(round(s.v, 15))
    FROM sums AS s;
END
$$;
COMMENT ON FUNCTION analytics._experiment_contributions(
    analytics._experiment_plan, text, boolean, bigint[]
) IS
    'What each unit (of these users, if given) contributes: itself, in a row without a metric, and '
    'to each metric its sums from the first exposure on, inside the metric''s window, and with '
    'CUPED its sums before; 1 at most for a proportion. A unit that did nothing of a metric has no '
    'row for it and counts as 0.';
