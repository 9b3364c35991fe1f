-- Room 72, glass of features and of the catalog: who used a feature and since when he is with us;
-- which events have a property.

CREATE FUNCTION analytics._served_feature(p_feature text)
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce((
        SELECT report.definition FROM analytics.served_reports AS report
        WHERE report.kind = 'feature' AND report.name = p_feature AND report.name <> ''
    ), jsonb_build_object('event_type', 'feature_used', 'named', p_feature));
END
$$;
COMMENT ON FUNCTION analytics._served_feature(text) IS
    'What is a use of a feature in feature_adoption: its definition or, where it has none, events '
    'feature_used that name it.';

CREATE FUNCTION analytics._feature_evidence(
    p_feature text, p_account bigint, p_users bigint[], p_since timestamptz, p_until timestamptz
)
RETURNS TABLE (
    measure text, user_key bigint, first_at timestamptz, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_definition jsonb := analytics._served_feature(p_feature);
    v_key integer := analytics._event_key(v_definition ->> 'event_type');
    v_filter jsonb := nullif(v_definition -> 'properties_filter', 'null');
    v_named text := v_definition ->> 'named';
BEGIN
    RETURN QUERY
    SELECT m.measure, u.user_key, started.first_at, e.event_id, e.occurred_at
    FROM unnest(p_users) AS u (user_key)
    CROSS JOIN LATERAL (
        SELECT min(own.occurred_at) AS first_at
        FROM analytics.event_keys AS own
        WHERE own.user_key = u.user_key AND (p_account = 0 OR own.account_key = p_account)
    ) AS started
    CROSS JOIN LATERAL (
        SELECT EXISTS (
            SELECT FROM analytics.event_keys AS earlier
            WHERE earlier.user_key = u.user_key AND earlier.occurred_at < p_since
                AND (p_account = 0 OR earlier.account_key = p_account)
                AND (v_key IS NULL OR earlier.event_type_key = v_key)
                AND (v_filter IS NULL OR earlier.properties @> v_filter)
                AND (v_named IS NULL OR earlier.properties ->> 'feature' = v_named)
        ) AS has_used
    ) AS past
    JOIN analytics.event_keys AS e ON e.user_key = u.user_key
        AND e.occurred_at >= p_since AND e.occurred_at < p_until
        AND (p_account = 0 OR e.account_key = p_account)
    CROSS JOIN LATERAL (
        SELECT (v_key IS NULL OR e.event_type_key = v_key)
            AND (v_filter IS NULL OR e.properties @> v_filter)
            AND (v_named IS NULL OR e.properties ->> 'feature' = v_named) IS TRUE AS is_use
    ) AS did
    JOIN (
        VALUES ('active_users'), ('users'), ('first_users'), ('repeat_users')
    ) AS m (measure) ON CASE m.measure
        WHEN 'active_users' THEN true
        WHEN 'users' THEN did.is_use
        WHEN 'first_users' THEN did.is_use AND NOT past.has_used
        ELSE did.is_use AND past.has_used
    END
    WHERE u.user_key <> 0;
END
$$;
COMMENT ON FUNCTION analytics._feature_evidence(
    text, bigint, bigint[], timestamptz, timestamptz
) IS
    'The events of users in one week by which feature_adoption counts them, with the time of each '
    'one''s first event. p_account: 0 all.';

CREATE FUNCTION analytics._feature_rule(
    p_feature text, p_measure text, p_cohort date, p_period date
)
RETURNS text
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definition jsonb := analytics._served_feature(p_feature);
    v_use text := format('an event %s%s%s',
        coalesce(v_definition ->> 'event_type', 'of any type'),
        ' that names the feature ' || (v_definition ->> 'named'),
        ' with properties ' || nullif(v_definition -> 'properties_filter', 'null')::text);
BEGIN
    RETURN format('A user whose first event is in the week of %s counts once if he has %s in the '
        'week of %s%s.', p_cohort,
        CASE p_measure WHEN 'active_users' THEN 'any event' ELSE v_use END, p_period,
        CASE p_measure
            WHEN 'first_users' THEN ', and had none in a week before'
            WHEN 'repeat_users' THEN ', and had one in a week before'
            ELSE ''
        END);
END
$$;
COMMENT ON FUNCTION analytics._feature_rule(text, text, date, date) IS
    'By what feature_adoption counts a user, in words.';

CREATE FUNCTION analytics._trace_feature_adoption(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{feature, cohort_week, period}',
        '{users, active_users, first_users, repeat_users}');
    v_feature text := v_cell ->> 'feature';
    v_account bigint := analytics._cell_account(v_cell);
    r_cohort record := analytics._cell_period(v_cell, 'cohort_week', 'week');
    r_period record := analytics._cell_period(v_cell, 'period', 'week');
    v_rule text := analytics._feature_rule(v_feature, v_cell ->> 'measure',
        analytics._cell_day(v_cell, 'cohort_week'), analytics._cell_day(v_cell, 'period'));
BEGIN
    RETURN QUERY
    SELECT v_rule, NULL, NULL::numeric, found.user_key, found.event_id, found.occurred_at
    FROM analytics._feature_evidence(v_feature, v_account, ARRAY(
        SELECT DISTINCT e.user_key FROM analytics.event_keys AS e
        WHERE e.occurred_at >= r_cohort.since AND e.occurred_at < r_cohort.until
            AND (v_account = 0 OR e.account_key = v_account)
    ), r_period.since, r_period.until) AS found
    WHERE found.first_at >= r_cohort.since AND found.measure = v_cell ->> 'measure';
END
$$;
COMMENT ON FUNCTION analytics._trace_feature_adoption(jsonb) IS
    'See analytics.trace: events behind a cell of feature_adoption.';

CREATE FUNCTION analytics._cells_feature_adoption(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('week', p_at, p_at + interval '1 us');
    v_week date := spectrum.period_date(v_starts[1]);
BEGIN
    -- The active users of a week stand beside each feature that is shown.
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'feature', shown.feature,
            'cohort_week', shown.cohort_week, 'period', v_week, 'measure', found.measure),
        analytics._feature_rule(shown.feature, found.measure, shown.cohort_week, v_week)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL (
        SELECT spectrum.period_date(spectrum.period_start('week', min(own.occurred_at))) AS week
        FROM analytics.event_keys AS own
        WHERE own.user_key = p_user
            AND (scope.account_key = 0 OR own.account_key = scope.account_key)
    ) AS cohort
    JOIN analytics.feature_adoption AS shown ON shown.account_id = scope.account_id
        AND shown.cohort_week = cohort.week AND shown.period = v_week
    CROSS JOIN LATERAL analytics._feature_evidence(
        shown.feature, scope.account_key, ARRAY[p_user], v_starts[1], v_starts[2]
    ) AS found
    WHERE p_user <> 0 AND found.occurred_at = p_at AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_feature_adoption(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of feature_adoption that count an event.';

CREATE FUNCTION analytics._catalog_rule(p_event_type text, p_property text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('Every event %s%s counts once%s.', p_event_type,
        ' that has the property ' || CASE p_property
            WHEN '(other properties)' THEN 'past the 200 names kept' ELSE p_property END,
        CASE p_property WHEN '(other properties)' THEN ' for each of these' ELSE '' END);
END
$$;
COMMENT ON FUNCTION analytics._catalog_rule(text, text) IS
    'By what event_catalog counts an event, in words.';

CREATE FUNCTION analytics._trace_event_catalog(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{event_type}', '{events}', '{property}');
    v_type text := v_cell ->> 'event_type';
    v_type_key integer := analytics._event_key(v_type);
    v_property text := v_cell ->> 'property';
    v_account bigint := analytics._cell_account(v_cell);
    v_rule text := analytics._catalog_rule(v_type, v_property);
    -- Names of the others are known only by not being shown; other than that one key is all.
    v_shown text[] := ARRAY(
        SELECT known.property FROM analytics.event_catalog AS known
        WHERE known.account_id = '*' AND known.event_type = v_type AND known.property IS NOT NULL
    );
BEGIN
    RETURN QUERY
    SELECT v_rule, concat_ws(' ', e.event_id, each.key), NULL::numeric, e.user_key, e.event_id,
        e.occurred_at
    FROM analytics.event_keys AS e
    CROSS JOIN LATERAL (
        SELECT NULL AS key WHERE v_property IS NULL
        UNION ALL
        SELECT names.key FROM jsonb_object_keys(e.properties) AS names (key)
        WHERE names.key = v_property
            OR v_property = '(other properties)' AND names.key <> ALL (v_shown)
    ) AS each
    WHERE e.event_type_key = v_type_key AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_event_catalog(jsonb) IS
    'See analytics.trace: events behind a cell of event_catalog.';

CREATE FUNCTION analytics._cells_event_catalog(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_strip_nulls(jsonb_build_object('account_id', scope.account_id,
            'event_type', e.event_type, 'property', found.property, 'measure', 'events')),
        analytics._catalog_rule(e.event_type, found.property)
    FROM analytics.events AS e
    CROSS JOIN LATERAL (
        SELECT NULL AS property
        UNION
        SELECT coalesce(shown.property, '(other properties)')
        FROM jsonb_object_keys(e.properties) AS names (key)
        LEFT JOIN analytics.event_catalog AS shown ON shown.account_id = '*'
            AND shown.event_type = e.event_type AND shown.property = names.key
    ) AS found
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_event_catalog(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of event_catalog that count an event.';
