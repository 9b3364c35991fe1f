-- Room 60, the catalog: which event types there are, with which properties, of which JSON types.
-- Names and counts only: values may be private and stay in the events. Reads analytics.events once.

CREATE FUNCTION analytics._catalog_counts(p_account text, p_by_account boolean)
RETURNS TABLE (
    account_key bigint,
    event_type_key integer,
    property text,
    json_type text,
    events bigint,
    first_seen timestamptz,
    last_seen timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    SELECT CASE WHEN p_by_account THEN e.account_key ELSE 0 END, e.event_type_key, p.name,
        p.json_type, count(*), min(e.occurred_at), max(e.occurred_at)
    FROM analytics.events AS e
    CROSS JOIN LATERAL (
        SELECT NULL AS name, NULL AS json_type
        UNION ALL
        SELECT each.key COLLATE "C", jsonb_typeof(each.value)
        FROM jsonb_each(e.properties) AS each
    ) AS p
    WHERE (p_account IS NULL OR e.account_id = p_account)
        AND (NOT p_by_account OR e.account_key <> 0)
    GROUP BY 1, e.event_type_key, p.name, p.json_type;
END
$$;
COMMENT ON FUNCTION analytics._catalog_counts(text, boolean) IS
    'What the catalog is made of: events and their first and last time, of all accounts '
    '(account_key 0) or of each, by event type, property and JSON type; without property and JSON '
    'type those of the event type itself.';

CREATE FUNCTION analytics.event_catalog(p_account text DEFAULT NULL)
RETURNS TABLE (
    event_type text,
    property text,
    types jsonb,
    events bigint,
    first_seen timestamptz,
    last_seen timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT t.event_type, c.property,
        jsonb_object_agg(c.json_type, c.events) FILTER (WHERE c.json_type IS NOT NULL),
        sum(c.events)::bigint, min(c.first_seen), max(c.last_seen)
    FROM analytics._catalog_counts(p_account, false) AS c
    JOIN analytics.event_types AS t USING (event_type_key)
    GROUP BY t.event_type, c.property
    ORDER BY t.event_type, c.property NULLS FIRST;
END
$$;
COMMENT ON FUNCTION analytics.event_catalog(text) IS
    'The event types of an account (NULL: of all) and their top-level properties: events that have '
    'it, by JSON type too, the first and the last time. A row without property is the event type '
    'itself. Values are not shown.';
