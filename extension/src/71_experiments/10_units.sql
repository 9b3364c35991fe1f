-- Room 71, units: who saw which variant, and what each did before and afterwards. A unit is a user;
-- his first exposure counts. Reads analytics.events only; read by the totals. What a unit is and
-- does follows from his own events alone, so both may be asked of some users only.

CREATE FUNCTION analytics._exposure_types()
RETURNS TABLE (event_type_key integer, flag_property text, variant_property text)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 2
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- PostHog's clients report an exposure as the call of a feature flag.
    RETURN QUERY
    SELECT t.event_type_key, x.flag_property, x.variant_property
    FROM (
        VALUES
            ('experiment_exposure', 'experiment', 'variant'),
            ('$feature_flag_called', '$feature_flag', '$feature_flag_response')
    ) AS x (event_type, flag_property, variant_property)
    JOIN analytics.event_types AS t USING (event_type);
END
$$;
COMMENT ON FUNCTION analytics._exposure_types() IS
    'The event types that are exposures, with the properties that name experiment and variant.';

CREATE FUNCTION analytics._experiment_units(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_users bigint[] DEFAULT NULL
)
RETURNS TABLE (
    account_id text,
    account_key bigint,
    user_key bigint,
    variant text,
    exposed_at timestamptz,
    low_variant text,
    high_variant text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_types integer[] := ARRAY(SELECT t.event_type_key FROM analytics._exposure_types() AS t);
BEGIN
    RETURN QUERY
    WITH flags AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
            CASE WHEN p_by_account OR p_account IS NOT NULL THEN e.account_key ELSE 0 END
                AS scope_key,
            e.user_key,
            e.occurred_at,
            e.properties ->> t.flag_property AS flag,
            e.properties ->> t.variant_property AS variant
        FROM analytics.events AS e
        JOIN analytics._exposure_types() AS t ON t.event_type_key = e.event_type_key
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
        f.scope_key,
        f.user_key,
        analytics._counted_variant(p_plan.variants, min(f.variant), max(f.variant)),
        min(f.occurred_at),
        min(f.variant),
        max(f.variant)
    FROM flags AS f
    WHERE f.flag = p_plan.experiment AND f.variant <> ''
    GROUP BY f.scope, f.scope_key, f.user_key;
END
$$;
COMMENT ON FUNCTION analytics._experiment_units(
    analytics._experiment_plan, text, boolean, bigint[]
) IS
    'The users of an experiment (of these, if given), each with his variant and first exposure. '
    'The variant of a unit that saw several, or one that is not planned, is NULL: it is left out. '
    'account_key: whose events count, 0 all.';

CREATE FUNCTION analytics._counted_variant(p_variants jsonb, p_low text, p_high text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_low = p_high AND p_variants ? p_low THEN p_low END;
END
$$;
COMMENT ON FUNCTION analytics._counted_variant(jsonb, text, text) IS
    'The variant that a unit counts for, by the lowest and the highest name that it saw; NULL '
    'where it saw several, or one that is not planned.';

CREATE FUNCTION analytics._metric_sides(p_measures jsonb)
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
    FROM analytics._measures(p_measures) AS m
    CROSS JOIN LATERAL (
        VALUES
            (true, m.event_type, m.property, m.properties_filter),
            (false, m.denominator_event_type, m.denominator_property, m.denominator_filter)
    ) AS s (is_upper, event_type, property, properties_filter)
    JOIN analytics.event_types AS t ON t.event_type = s.event_type;
END
$$;
COMMENT ON FUNCTION analytics._metric_sides(jsonb) IS
    'What metrics count of which events: the upper side, and of a ratio the lower. most: a unit '
    'counts no more than this.';

CREATE FUNCTION analytics._experiment_happenings(
    p_plan analytics._experiment_plan,
    p_users bigint[],
    p_accounts bigint[],
    p_exposed_ats timestamptz[],
    p_sinces timestamptz[],
    p_untils timestamptz[],
    p_are_few boolean
)
RETURNS TABLE (
    user_key bigint,
    account_key bigint,
    occurred_at timestamptz,
    event_id uuid,
    metric text,
    most integer,
    is_upper boolean,
    is_before boolean,
    amount numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 1000000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET timezone = 'UTC'
SET jit = off
AS $$
DECLARE
    v_types integer[] := ARRAY(
        SELECT s.event_type_key FROM analytics._metric_sides(p_plan.measures) AS s
    );
BEGIN
    RETURN QUERY
    WITH units AS (
        SELECT * FROM unnest(p_users, p_accounts, p_exposed_ats, p_sinces, p_untils)
            AS u (user_key, account_key, exposed_at, since, until)
    ),
    happenings AS (
        SELECT u.user_key, u.account_key, u.exposed_at, e.event_type_key, e.occurred_at,
            e.event_id, e.properties
        FROM units AS u
        JOIN analytics.events AS e ON e.user_key = u.user_key
            AND e.occurred_at >= u.since AND e.occurred_at < u.until
        WHERE NOT p_are_few AND e.event_type_key = ANY (v_types)
            AND (u.account_key = 0 OR e.account_key = u.account_key)
        UNION ALL
        SELECT u.user_key, u.account_key, u.exposed_at, e.*
        FROM units AS u
        -- A look-up each, in any plan.
        CROSS JOIN LATERAL (
            SELECT known.event_type_key, known.occurred_at, known.event_id, known.properties
            FROM analytics.events AS known
            WHERE known.user_key = u.user_key AND known.event_type_key = ANY (v_types)
                AND known.occurred_at >= u.since AND known.occurred_at < u.until
                AND (u.account_key = 0 OR known.account_key = u.account_key)
            OFFSET 0
        ) AS e
        WHERE p_are_few
        -- a fence: properties are looked into after the units are known
        OFFSET 0
    ),
    amounts AS (
        SELECT h.*, s.metric, s.most, s.is_upper,
            CASE
                WHEN s.property IS NULL THEN 1
                WHEN jsonb_typeof(h.properties -> s.property) = 'number'
                    THEN (h.properties -> s.property)::numeric
                WHEN jsonb_typeof(h.properties -> s.property) = 'string'
                    THEN analytics._text_number(h.properties ->> s.property)
            END AS amount
        FROM happenings AS h
        JOIN analytics._metric_sides(p_plan.measures) AS s ON s.event_type_key = h.event_type_key
        WHERE
            -- A window runs on after the end of the experiment, else that end cuts.
            CASE
                WHEN s.time_window IS NOT NULL THEN h.occurred_at < h.exposed_at + s.time_window
                ELSE p_plan.ends_at IS NULL OR h.occurred_at < p_plan.ends_at
            END
            AND (s.properties_filter IS NULL OR h.properties @> s.properties_filter)
        OFFSET 0
    )
    SELECT a.user_key, a.account_key, a.occurred_at, a.event_id, a.metric, a.most, a.is_upper,
        a.occurred_at < a.exposed_at, a.amount
    FROM amounts AS a
    WHERE abs(a.amount) < 1e15;
END
$$;
COMMENT ON FUNCTION analytics._experiment_happenings(
    analytics._experiment_plan, bigint[], bigint[], timestamptz[], timestamptz[], timestamptz[],
    boolean
) IS
    'The events that metrics count of units, given by user, account (0: all) and first exposure, '
    'inside [since, until) of each: the one place that says which do, and with what amount. Few '
    'units are looked up one by one, many are joined.';

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
SET timezone = 'UTC'
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT * FROM analytics._experiment_units(p_plan, p_account, p_by_account, p_users)
    ),
    sums AS (
        SELECT h.user_key, h.account_key, h.metric, h.most,
            coalesce(bool_or(h.is_upper) FILTER (WHERE NOT h.is_before), false) AS has_converted,
            coalesce(sum(h.amount) FILTER (WHERE h.is_upper AND NOT h.is_before), 0) AS x,
            coalesce(sum(h.amount) FILTER (WHERE NOT h.is_upper AND NOT h.is_before), 0) AS y,
            coalesce(sum(h.amount) FILTER (WHERE h.is_upper AND h.is_before), 0) AS w,
            coalesce(sum(h.amount) FILTER (WHERE NOT h.is_upper AND h.is_before), 0) AS v
        FROM (
            SELECT array_agg(u.user_key) AS users, array_agg(u.account_key) AS accounts,
                array_agg(u.exposed_at) AS exposed_ats,
                array_agg(u.exposed_at - coalesce(p_plan.cuped, '0')) AS sinces,
                array_agg('infinity'::timestamptz) AS untils
            FROM units AS u
            WHERE u.variant IS NOT NULL
        ) AS counted
        CROSS JOIN LATERAL analytics._experiment_happenings(
            p_plan, counted.users, counted.accounts, counted.exposed_ats, counted.sinces,
            counted.untils, p_users IS NOT NULL
        ) AS h
        GROUP BY h.user_key, h.account_key, h.metric, h.most
    )
    SELECT u.account_id, u.user_key, u.variant, NULL, false, NULL::numeric, NULL::numeric,
        NULL::numeric, NULL::numeric
    FROM units AS u
    UNION ALL
    SELECT u.account_id, u.user_key, u.variant, s.metric, s.has_converted,
        analytics._unit_amount(s.x, s.most), analytics._unit_amount(s.y, NULL),
        analytics._unit_amount(s.w, s.most), analytics._unit_amount(s.v, NULL)
    FROM sums AS s
    JOIN units AS u ON u.user_key = s.user_key AND u.account_key = s.account_key;
END
$$;
COMMENT ON FUNCTION analytics._experiment_contributions(
    analytics._experiment_plan, text, boolean, bigint[]
) IS
    'What each unit (of these users, if given) contributes: itself, in a row without a metric, and '
    'to each metric its sums from the first exposure on, inside the metric''s window, and with '
    'CUPED its sums before; 1 at most for a proportion. A unit that did nothing of a metric has no '
    'row for it and counts as 0.';

CREATE FUNCTION analytics._unit_amount(p_sum numeric, p_most integer)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN trim_scale(round(least(p_sum, p_most), 15));
END
$$;
COMMENT ON FUNCTION analytics._unit_amount(numeric, integer) IS
    'What a unit''s sum counts: at most p_most, and rounded, so that no product of two leaves the '
    'range of double precision.';
