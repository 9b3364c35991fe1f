-- Room 60, feature adoption: who uses a feature, of those who were active, by the week of the
-- user's first event. Each value of the property feature of feature_used is a feature;
-- spectrum.features holds those that the user defines by an event type, a filter, or both.
-- Reads analytics.events and analytics.features.

CREATE FUNCTION spectrum._create_features()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.features') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.features (
        feature text NOT NULL CONSTRAINT features_pkey PRIMARY KEY,
        event_type text,
        properties_filter jsonb,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT features_say_what_counts
        CHECK (num_nonnulls(event_type, properties_filter) > 0)
    );
    COMMENT ON TABLE spectrum.features IS
        'The features that are told by other events than feature_used. Define one with '
        'spectrum.define_feature().';
    COMMENT ON COLUMN spectrum.features.feature IS 'Name.';
    COMMENT ON COLUMN spectrum.features.event_type IS 'Event that is a use of it; NULL any.';
    COMMENT ON COLUMN spectrum.features.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN spectrum.features.changed_at IS 'When it was last defined.';

    CREATE VIEW analytics.features WITH (security_barrier) AS
    SELECT features.feature, features.event_type, features.properties_filter, features.changed_at
    FROM spectrum.features;
    COMMENT ON VIEW analytics.features IS
        'The defined features, for all who may ask questions.';
    COMMENT ON COLUMN analytics.features.feature IS 'Name.';
    COMMENT ON COLUMN analytics.features.event_type IS 'Event that is a use of it; NULL any.';
    COMMENT ON COLUMN analytics.features.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN analytics.features.changed_at IS 'When it was last defined.';
END
$$;
COMMENT ON FUNCTION spectrum._create_features() IS
    'Room 60: makes spectrum.features and its plain view.';

CREATE FUNCTION spectrum.define_feature(
    p_name text,
    p_event text DEFAULT NULL,
    p_where jsonb DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_filter('p_where', p_where);
    IF p_event = '' OR (p_event IS NULL AND p_where IS NULL) THEN
        PERFORM spectrum._reject('p_event', p_event, 'an event type, or NULL with a p_where');
    END IF;

    INSERT INTO spectrum.features (feature, event_type, properties_filter)
    VALUES (p_name, p_event, p_where)
    ON CONFLICT ON CONSTRAINT features_pkey DO UPDATE SET
        event_type = excluded.event_type,
        properties_filter = excluded.properties_filter,
        changed_at = excluded.changed_at;
    PERFORM spectrum._begin_report('feature', p_name, to_jsonb(definition))
    FROM spectrum.features AS definition WHERE feature = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_feature(text, text, jsonb) IS
    'Defines a feature or replaces it: used by each event of type p_event (NULL: of any) whose '
    'properties contain p_where (NULL: whatever they are). It takes the place of the value of the '
    'same name in feature_used; in the view, once a refresh has built it.';

CREATE FUNCTION spectrum.drop_feature(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.features WHERE feature = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a feature in spectrum.features');
    END IF;
    PERFORM spectrum._discard_reports('feature', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_feature(text) IS
    'Forgets the definition of a feature, not its events; 22023 if there is none of that name.';

CREATE FUNCTION analytics._feature_definitions()
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT coalesce(jsonb_agg(to_jsonb(f)), '[]') FROM analytics.features AS f);
END
$$;
COMMENT ON FUNCTION analytics._feature_definitions() IS 'The defined features.';

CREATE FUNCTION analytics._feature_rules(p_definitions jsonb)
RETURNS TABLE (event_type_key integer, feature text, properties_filter jsonb)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT t.event_type_key, f.feature, f.properties_filter
    FROM analytics.event_types AS t
    JOIN jsonb_to_recordset(p_definitions)
        AS f (feature text, event_type text, properties_filter jsonb)
        ON f.event_type IS NULL OR f.event_type = t.event_type
    UNION ALL
    SELECT t.event_type_key, NULL, NULL
    FROM analytics.event_types AS t
    WHERE t.event_type = 'feature_used';
END
$$;
COMMENT ON FUNCTION analytics._feature_rules(jsonb) IS
    'Which events are a use of which feature: of this type, with properties that contain the '
    'filter, if any. feature NULL: the one that the event names, unless that name is defined.';

CREATE FUNCTION analytics._feature_uses(
    p_feature text,
    p_starts timestamptz[],
    p_account text,
    p_by_account boolean,
    p_definitions jsonb
)
RETURNS TABLE (account_id text, user_key bigint, feature text, numbers integer[])
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_defined text[] := ARRAY(
        SELECT f.definition ->> 'feature' FROM jsonb_array_elements(p_definitions) AS f (definition)
    );
    v_event_keys integer[] := ARRAY(
        SELECT r.event_type_key FROM analytics._feature_rules(p_definitions) AS r
        WHERE p_feature IS NULL OR r.feature = p_feature
            OR (r.feature IS NULL AND p_feature <> ALL (v_defined))
    );
BEGIN
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN min(u.account_id) ELSE coalesce(p_account, '*') END,
        u.user_key,
        u.feature,
        array_agg(DISTINCT u.number ORDER BY u.number)
    FROM (
        SELECT
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS scope_key,
            e.account_id,
            e.user_key,
            coalesce(r.feature, e.properties ->> 'feature') AS feature,
            width_bucket(e.occurred_at, p_starts) AS number
        FROM analytics.events AS e
        JOIN analytics._feature_rules(p_definitions) AS r ON r.event_type_key = e.event_type_key
        WHERE e.user_key <> 0
            AND e.event_type_key = ANY (v_event_keys)
            AND e.occurred_at >= p_starts[1]
            AND e.occurred_at < p_starts[cardinality(p_starts)]
            AND (r.properties_filter IS NULL OR e.properties @> r.properties_filter)
            AND (r.feature IS NOT NULL OR e.properties ->> 'feature' <> ALL (v_defined))
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
    ) AS u
    -- The length that an id may have.
    WHERE length(u.feature) BETWEEN 1 AND 200 AND (p_feature IS NULL OR u.feature = p_feature)
    GROUP BY u.user_key, u.feature, u.scope_key;
END
$$;
COMMENT ON FUNCTION analytics._feature_uses(text, timestamptz[], text, boolean, jsonb) IS
    'Each user''s periods (numbered by p_starts, ascending) with a use of each feature (p_feature '
    'NULL: all). For one account, for all together (*), or, with p_by_account, for each account by '
    'itself.';

CREATE FUNCTION analytics._feature_adoption(
    p_feature text,
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean,
    p_definitions jsonb
)
RETURNS TABLE (
    account_id text,
    feature text,
    cohort_week date,
    period date,
    active_users bigint,
    users bigint,
    first_users bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    v_starts timestamptz[];
    v_first_number integer;
    v_dates date[];
    v_weeks timestamptz[];
    v_week_dates date[];
    v_named text[] := CASE
        WHEN p_feature IS NULL THEN ARRAY(
            SELECT f.definition ->> 'feature'
            FROM jsonb_array_elements(p_definitions) AS f (definition)
        )
        ELSE ARRAY[p_feature]
    END;
BEGIN
    SELECT h.starts, coalesce(h.first_number, 1) INTO v_starts, v_first_number
    FROM analytics._history_periods(p_period, p_from, p_to) AS h;
    v_dates := spectrum.period_dates(v_starts);
    v_weeks := spectrum.period_starts('week', v_starts[1], v_starts[cardinality(v_starts)]);
    v_week_dates := spectrum.period_dates(v_weeks);

    RETURN QUERY
    WITH cohort_users AS MATERIALIZED (
        SELECT u.account_id, u.user_key, width_bucket(u.first_at, v_weeks) AS week, u.numbers
        FROM analytics._active_periods(NULL, v_starts, p_account, p_by_account) AS u
    ),
    active_cells AS MATERIALIZED (
        SELECT c.account_id, c.week, a.number, count(*) AS users
        FROM cohort_users AS c
        CROSS JOIN LATERAL unnest(c.numbers) AS a (number)
        WHERE a.number >= v_first_number
        GROUP BY c.account_id, c.week, a.number
    ),
    uses AS MATERIALIZED (
        SELECT u.account_id, u.user_key, u.feature, u.numbers
        FROM analytics._feature_uses(
            p_feature, v_starts, p_account, p_by_account, p_definitions
        ) AS u
    ),
    use_cells AS (
        SELECT u.account_id, u.feature, c.week, a.number, count(*) AS users,
            count(*) FILTER (WHERE a.number = u.numbers[1]) AS first_users
        FROM uses AS u
        JOIN cohort_users AS c ON c.user_key = u.user_key AND c.account_id = u.account_id
        CROSS JOIN LATERAL unnest(u.numbers) AS a (number)
        GROUP BY u.account_id, u.feature, c.week, a.number
    ),
    features AS (
        SELECT u.account_id, u.feature FROM uses AS u
        UNION
        SELECT a.account_id, n.feature
        FROM active_cells AS a
        CROSS JOIN unnest(v_named) AS n (feature)
    )
    SELECT a.account_id, f.feature, v_week_dates[a.week], v_dates[a.number], a.users,
        coalesce(u.users, 0), coalesce(u.first_users, 0)
    FROM active_cells AS a
    JOIN features AS f ON f.account_id = a.account_id
    LEFT JOIN use_cells AS u ON u.account_id = a.account_id AND u.feature = f.feature
        AND u.week = a.week AND u.number = a.number;
END
$$;
COMMENT ON FUNCTION analytics._feature_adoption(
    text, text, timestamptz, timestamptz, text, boolean, jsonb
) IS
    'Adoption in each scope: a user''s use in a period counts in the week of his first event, and '
    'as his first if he did not use the feature in a period before.';

CREATE FUNCTION analytics.feature_adoption(
    p_feature text DEFAULT NULL,
    p_period text DEFAULT 'week',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    feature text,
    cohort_week date,
    period date,
    active_users bigint,
    users bigint,
    first_users bigint,
    repeat_users bigint,
    rate double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT a.feature, a.cohort_week, a.period, a.active_users, a.users, a.first_users,
        a.users - a.first_users, a.users / a.active_users::double precision
    FROM analytics._feature_adoption(
        p_feature, p_period, p_from, p_to, p_account, false, analytics._feature_definitions()
    ) AS a
    ORDER BY a.feature, a.cohort_week, a.period;
END
$$;
COMMENT ON FUNCTION analytics.feature_adoption(text, text, timestamptz, timestamptz, text) IS
    'Of the users whose first event ever fell in cohort_week and who were active in a day, week or '
    'month that [p_from, p_to) touches (each whole), how many used the feature in it, how many of '
    'them in no period before (first_users), and rate = users / active_users. One row for each '
    'feature, cohort and period with an active user. p_feature NULL: every feature that is defined '
    'or was used up to the end of the range. p_account: its events alone.';
