-- Room 60, the events: every question reads analytics.events, or one of its narrower sisters, and
-- nothing below. Whoever is to see less is shown less in one place beneath all three: the policies
-- of warehouse.fact_events (room 60, tenants). So these views run with the rights of the caller,
-- who is granted what they read but not USAGE of schema warehouse; names come from views that run
-- with their owner's rights. All are security barriers.
--   events      everything about an event
--   event_keys  its keys alone. Joins that a query does not need cost events its index-only scans
--   timelines   the same by user and time, read in this order from an index, without a sort: of
--               one event type, or of all

CREATE FUNCTION spectrum._create_events()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.events') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE VIEW warehouse.visible_events WITH (security_invoker) AS
    SELECT
        fact.event_id, fact.occurred_at, fact.event_type_key, fact.account_key, fact.user_key,
        fact.geo_key, fact.properties, fact.revenue, fact.currency
    FROM warehouse.fact_events AS fact;
    COMMENT ON VIEW warehouse.visible_events IS
        'The facts that questions may see: beneath analytics.events, event_keys and timelines.';

    PERFORM spectrum._create_names();

    CREATE VIEW analytics.event_keys WITH (security_barrier, security_invoker) AS
    SELECT
        visible.event_id, visible.occurred_at, visible.event_type_key, visible.account_key,
        visible.user_key, visible.properties
    FROM warehouse.visible_events AS visible;
    COMMENT ON VIEW analytics.event_keys IS
        'analytics.events without names: faster where an index holds all that a question reads.';

    CREATE VIEW analytics.timelines WITH (security_barrier, security_invoker) AS
    SELECT
        visible.event_id, visible.occurred_at, visible.event_type_key, visible.account_key,
        visible.user_key, visible.properties
    FROM warehouse.visible_events AS visible
    ORDER BY visible.user_key, visible.occurred_at;
    COMMENT ON VIEW analytics.timelines IS
        'analytics.event_keys by user and time: faster where that is the order of an index.';

    CREATE VIEW analytics.events WITH (security_barrier, security_invoker) AS
    SELECT
        fact.event_id,
        fact.occurred_at,
        type.event_type,
        fact.event_type_key,
        nullif(account.account_id, '') AS account_id,
        fact.account_key,
        nullif(person.user_id, '') AS user_id,
        fact.user_key,
        nullif(place.country, '') AS country,
        nullif(place.region, '') AS region,
        nullif(place.city, '') AS city,
        fact.properties,
        fact.revenue,
        fact.currency
    FROM warehouse.visible_events AS fact
    -- Every key has its member; LEFT, so that a plan leaves out the joins that a question does
    -- not read: it halves most of them.
    LEFT JOIN warehouse.event_type_names AS type USING (event_type_key)
    LEFT JOIN warehouse.account_names AS account USING (account_key)
    LEFT JOIN warehouse.user_names AS person USING (user_key)
    LEFT JOIN warehouse.place_names AS place USING (geo_key);
    COMMENT ON VIEW analytics.events IS
        'Every event once, with its dimensions: what all questions are asked of.';
    COMMENT ON COLUMN analytics.events.event_id IS 'Identity of the event.';
    COMMENT ON COLUMN analytics.events.occurred_at IS 'When it happened.';
    COMMENT ON COLUMN analytics.events.event_type IS 'What happened.';
    COMMENT ON COLUMN analytics.events.event_type_key IS 'The same, short.';
    COMMENT ON COLUMN analytics.events.account_id IS 'Account; NULL unknown.';
    COMMENT ON COLUMN analytics.events.account_key IS 'The same, short; 0 unknown.';
    COMMENT ON COLUMN analytics.events.user_id IS 'User; NULL unknown.';
    COMMENT ON COLUMN analytics.events.user_key IS
        'The person that reports count; 0 unknown, which is never counted as a person.';
    COMMENT ON COLUMN analytics.events.country IS 'NULL unknown; so are region and city.';
    COMMENT ON COLUMN analytics.events.properties IS 'Properties as sent.';
    COMMENT ON COLUMN analytics.events.revenue IS 'Amount, NULL where it carries no money.';
    COMMENT ON COLUMN analytics.events.currency IS 'Of the amount.';

    PERFORM spectrum._create_lookups();
END
$$;
COMMENT ON FUNCTION spectrum._create_events() IS
    'Room 60: makes analytics.events and its sisters, and what they read.';

CREATE FUNCTION spectrum._create_names()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW warehouse.event_type_names AS
    SELECT dim.event_type_key, dim.event_type FROM warehouse.dim_event_types AS dim;
    COMMENT ON VIEW warehouse.event_type_names IS 'For analytics.events: names by key.';

    CREATE VIEW warehouse.account_names AS
    SELECT dim.account_key, dim.account_id FROM warehouse.dim_accounts AS dim;
    COMMENT ON VIEW warehouse.account_names IS 'For analytics.events: names by key.';

    CREATE VIEW warehouse.user_names AS
    SELECT dim.user_key, dim.user_id FROM warehouse.dim_users AS dim;
    COMMENT ON VIEW warehouse.user_names IS 'For analytics.events: names by key.';

    CREATE VIEW warehouse.place_names AS
    SELECT dim.geo_key, dim.country, dim.region, dim.city FROM warehouse.dim_geography AS dim;
    COMMENT ON VIEW warehouse.place_names IS 'For analytics.events: names by key.';
END
$$;
COMMENT ON FUNCTION spectrum._create_names() IS
    'Room 60: makes what analytics.events reads its names from. A grant on the dimensions '
    'themselves would open their statistics in pg_stats.';

CREATE FUNCTION spectrum._create_lookups()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- By the sums: to look among the events of all accounts for those of one would take long.
    CREATE VIEW analytics.event_types WITH (security_barrier) AS
    SELECT dim_event_types.event_type_key, dim_event_types.event_type
    FROM warehouse.dim_event_types
    WHERE dim_event_types.event_type_key <> 0 AND (
        (SELECT caller.sees_all FROM warehouse.caller)
        OR dim_event_types.event_type_key IN (
            SELECT kept.event_type_key
            FROM warehouse.own_accounts AS own
            JOIN spectrum.reports AS report ON report.kind = 'volume' AND report.state = 'served'
            JOIN analytics.mv_daily_events AS kept
                ON kept.report_id = report.report_id AND kept.account_id = own.account_id
        )
    );
    COMMENT ON VIEW analytics.event_types IS
        'The event types by their keys, by which events are found fastest. A tenant sees those '
        'that a refresh has counted for his account.';
    COMMENT ON COLUMN analytics.event_types.event_type_key IS 'As in analytics.events.';
    COMMENT ON COLUMN analytics.event_types.event_type IS 'As in analytics.events.';

    CREATE VIEW analytics.accounts WITH (security_barrier) AS
    SELECT dim_accounts.account_key, dim_accounts.account_id
    FROM warehouse.dim_accounts
    WHERE dim_accounts.account_key <> 0 AND (
        (SELECT caller.sees_all FROM warehouse.caller)
        OR dim_accounts.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own))
    );
    COMMENT ON VIEW analytics.accounts IS
        'The accounts that the caller sees, by their keys, by which events are found fastest.';
    COMMENT ON COLUMN analytics.accounts.account_key IS 'As in analytics.events.';
    COMMENT ON COLUMN analytics.accounts.account_id IS 'As in analytics.events.';
END
$$;
COMMENT ON FUNCTION spectrum._create_lookups() IS
    'Room 60: makes analytics.event_types and analytics.accounts.';

CREATE FUNCTION analytics._is_user_behind(p_user bigint, p_from timestamptz)
RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM analytics.timelines AS t WHERE t.user_key >= p_user AND t.occurred_at >= p_from
    );
END
$$;
COMMENT ON FUNCTION analytics._is_user_behind(bigint, timestamptz) IS
    'Whether there is an event of that user or one behind, from p_from on.';

CREATE FUNCTION analytics._user_cuts(p_from timestamptz)
RETURNS bigint[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_packed timestamptz := (SELECT s.packed_before FROM analytics.settings AS s);
    v_step bigint := 1;
    v_last bigint;
BEGIN
    -- What is packed would be read whole for each part.
    IF v_packed > p_from THEN
        RETURN ARRAY[1, 9223372036854775807];
    END IF;
    WHILE CASE WHEN v_packed IS NULL
        THEN EXISTS (SELECT FROM analytics.timelines AS t WHERE t.user_key >= 4 * v_step)
        ELSE analytics._is_user_behind(4 * v_step, v_packed) END
    LOOP
        v_step := v_step * 2;
    END LOOP;
    -- The last key is between the half of that and all of it.
    v_last := 4 * v_step;
    FOR v_look IN 1 .. 3 LOOP
        EXIT WHEN CASE WHEN v_packed IS NULL
            THEN EXISTS (
                SELECT FROM analytics.timelines AS t WHERE t.user_key >= v_last - v_step / 2
            )
            ELSE analytics._is_user_behind(v_last - v_step / 2, v_packed) END;
        v_last := v_last - v_step / 2;
    END LOOP;
    IF v_last <= 4096 THEN
        RETURN ARRAY[1, 9223372036854775807];
    END IF;
    RETURN ARRAY[1, 1 + v_last / 16, 1 + v_last / 4, 1 + v_last / 2, 9223372036854775807];
END
$$;
COMMENT ON FUNCTION analytics._user_cuts(timestamptz) IS
    'Cuts the user keys, but for the unknown user, in four, for the workers: starts of the parts, '
    'and an end. One part where they are a few thousand, or where events from p_from on (NULL: '
    'none are read) are packed. By a few looks into an index, so the parts differ; the first are '
    'small: keys follow the order of arrival and the oldest users have most of the events.';
