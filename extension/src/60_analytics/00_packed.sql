-- Room 60, packed facts: months that are closed (13_horizon.sql), kept small and still read. A row
-- holds up to a thousand events of one event type and month, in the order of users and times, a
-- column of theirs an array. Alike values side by side compress well where those of one event do
-- not: PostgreSQL compresses nothing in rows below 2 kB. Properties stay jsonb: nobody parses.
--
-- A month is packed while its partition is still read; then, in one transaction, the view that
-- all questions read (warehouse.visible_events) changes over from the one to the other. While
-- nothing is packed the view is what it would be without this room.

CREATE FUNCTION spectrum._create_packed()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_column text;
BEGIN
    IF to_regclass('warehouse.packed_events') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE warehouse.packed_events (
        month date NOT NULL,
        event_type_key integer NOT NULL,
        chunk_no integer NOT NULL,
        events integer NOT NULL,
        user_from bigint NOT NULL,
        user_to bigint NOT NULL,
        event_ids uuid[] NOT NULL,
        occurred_ats timestamptz[] NOT NULL,
        account_keys bigint[] NOT NULL,
        user_keys bigint[] NOT NULL,
        geo_keys integer[] NOT NULL,
        properties jsonb[] NOT NULL,
        revenues numeric[],
        currencies text[],
        CONSTRAINT packed_events_pkey PRIMARY KEY (month, event_type_key, chunk_no)
    );
    FOREACH v_column IN ARRAY '{event_ids, occurred_ats, account_keys, user_keys, geo_keys,
        properties, revenues, currencies}'::text[]
    LOOP
        -- Statistics of arrays would cost much and help nobody.
        EXECUTE format('ALTER TABLE warehouse.packed_events ALTER COLUMN %I SET STATISTICS 0',
            v_column);
        IF 'lz4' = ANY ((SELECT setting.enumvals FROM pg_settings AS setting
            WHERE setting.name = 'default_toast_compression')::text[])
        THEN
            EXECUTE format('ALTER TABLE warehouse.packed_events ALTER COLUMN %I '
                'SET COMPRESSION lz4', v_column);
        END IF;
    END LOOP;
    COMMENT ON TABLE warehouse.packed_events IS
        'Facts of closed months, many in a row: see spectrum.pack_facts. An event is the elements '
        'of one number of all arrays.';
    COMMENT ON COLUMN warehouse.packed_events.month IS 'First day of the month (UTC).';
    COMMENT ON COLUMN warehouse.packed_events.event_type_key IS 'Of all events of the row.';
    COMMENT ON COLUMN warehouse.packed_events.chunk_no IS
        'In the order of (user_key, occurred_at, event_id), in which the elements are too.';
    COMMENT ON COLUMN warehouse.packed_events.events IS 'How many: the length of the arrays.';
    COMMENT ON COLUMN warehouse.packed_events.user_from IS 'The lowest of user_keys.';
    COMMENT ON COLUMN warehouse.packed_events.user_to IS 'The highest of user_keys.';
    COMMENT ON COLUMN warehouse.packed_events.event_ids IS 'As in fact_events; so are the others.';
    COMMENT ON COLUMN warehouse.packed_events.revenues IS 'NULL: none has any.';
    COMMENT ON COLUMN warehouse.packed_events.currencies IS 'NULL: none has any.';

    -- All in one list of columns: unnest() in FROM would write each array down before it is read.
    -- The planner takes unnest() for 10 rows, generate_series() for 1000, as there are.
    CREATE VIEW warehouse.packed_rows WITH (security_barrier) AS
    SELECT packed.*
    FROM (
        SELECT
            chunk.month, chunk.event_type_key,
            unnest(chunk.event_ids) AS event_id,
            unnest(chunk.occurred_ats) AS occurred_at,
            unnest(chunk.account_keys) AS account_key,
            unnest(chunk.user_keys) AS user_key,
            unnest(chunk.geo_keys) AS geo_key,
            unnest(chunk.properties) AS properties,
            unnest(chunk.revenues) AS revenue,
            unnest(chunk.currencies) AS currency,
            generate_series(1, chunk.events) AS number
        FROM warehouse.packed_events AS chunk
        WHERE coalesce(current_setting('spectrum.hot_only', true), '') <> 'on'
            AND coalesce(nullif(current_setting('spectrum.packed_user', true), '')::bigint
                BETWEEN chunk.user_from AND chunk.user_to, true)
    ) AS packed
    WHERE (SELECT caller.sees_all FROM warehouse.caller)
        OR packed.account_key IN (SELECT own.account_key FROM warehouse.own_account_keys AS own);
    COMMENT ON VIEW warehouse.packed_rows IS
        'Packed facts, a row an event, of the accounts that the caller sees. None for who works '
        'on facts that are not packed alone, as refreshes do: they SET spectrum.hot_only = on. Who '
        'wants those of one user SETs spectrum.packed_user, and is given a few others with them.';
END
$$;
COMMENT ON FUNCTION spectrum._create_packed() IS
    'Room 60: makes warehouse.packed_events and the view that reads it.';

CREATE FUNCTION spectrum._readable_from()
RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce(
        (SELECT coalesce(horizon.packed_from, horizon.facts_from) FROM spectrum.horizon),
        '-infinity'
    );
END
$$;
COMMENT ON FUNCTION spectrum._readable_from() IS
    'From when on facts can be read, packed or not; -infinity where none were purged.';

CREATE FUNCTION spectrum._read_hot_only(p_hot_only text)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_before text := coalesce(current_setting('spectrum.hot_only', true), '');
BEGIN
    -- No SET clause of a function: who is no superuser may not make one with a name of ours.
    PERFORM set_config('spectrum.hot_only', p_hot_only, true);
    RETURN v_before;
END
$$;
COMMENT ON FUNCTION spectrum._read_hot_only(text) IS
    'on: from here on this transaction reads no packed facts. Returns what it was, for who sets '
    'it back.';

CREATE FUNCTION spectrum._read_packed_of(p_user text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM set_config('spectrum.packed_user', p_user, true);
END
$$;
COMMENT ON FUNCTION spectrum._read_packed_of(text) IS
    'From here on this transaction wants packed facts of one user (his key); NULL of all.';

CREATE FUNCTION spectrum._show_packed(p_also date DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO'
AS $$
DECLARE
    v_columns text := 'fact.event_id, fact.occurred_at, fact.event_type_key, fact.account_key, '
        'fact.user_key, fact.geo_key, fact.properties, fact.revenue, fact.currency';
    v_months date[] := ARRAY(
        SELECT DISTINCT chunk.month FROM warehouse.packed_events AS chunk
        WHERE chunk.month = p_also OR NOT EXISTS (
            SELECT FROM spectrum._fact_months() AS month
            WHERE month.is_attached AND month.name = spectrum._month_name(chunk.month)
        )
        ORDER BY chunk.month DESC
    );
    v_month date;
    v_view text := format('SELECT %s FROM warehouse.fact_events AS fact', v_columns);
BEGIN
    -- The planner leaves out a part whose times contradict those of a question, if it is a part of
    -- an Append: so each month is one.
    FOREACH v_month IN ARRAY v_months LOOP
        v_view := v_view || format(
            ' UNION ALL SELECT %1$s FROM (SELECT * FROM warehouse.packed_rows UNION ALL '
            'SELECT (NULL::warehouse.packed_rows).* WHERE false) AS fact '
            'WHERE fact.month = %2$L AND fact.occurred_at >= %3$L AND fact.occurred_at < %4$L',
            v_columns, v_month, v_month::timestamp AT TIME ZONE 'UTC',
            (v_month + interval '1 month') AT TIME ZONE 'UTC');
    END LOOP;
    EXECUTE 'CREATE OR REPLACE VIEW warehouse.visible_events WITH (security_invoker) AS ' || v_view;
END
$$;
COMMENT ON FUNCTION spectrum._show_packed(date) IS
    'Has all questions read the packed months that have no partition any more, and p_also.';

CREATE FUNCTION spectrum._pack_type(p_month date, p_event_type integer, p_limit bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET work_mem = '64MB'
AS $$
DECLARE
    v_from timestamptz := p_month::timestamp AT TIME ZONE 'UTC';
    v_to timestamptz := (p_month + interval '1 month') AT TIME ZONE 'UTC';
    v_last_no integer;
    v_user bigint;
    v_at timestamptz;
    v_event uuid;
    v_packed bigint;
BEGIN
    SELECT chunk.chunk_no, chunk.user_keys[chunk.events], chunk.occurred_ats[chunk.events],
        chunk.event_ids[chunk.events]
    INTO v_last_no, v_user, v_at, v_event
    FROM warehouse.packed_events AS chunk
    WHERE chunk.month = p_month AND chunk.event_type_key = p_event_type
    ORDER BY chunk.chunk_no DESC
    LIMIT 1;
    WITH facts AS (
        SELECT next.*, row_number() OVER (
            ORDER BY next.user_key, next.occurred_at, next.event_id) AS number
        FROM (
            SELECT known.* FROM warehouse.fact_events AS known
            WHERE known.occurred_at >= v_from AND known.occurred_at < v_to
                AND known.event_type_key = p_event_type
                AND (known.user_key, known.occurred_at, known.event_id) > (coalesce(v_user, -1),
                    coalesce(v_at, '-infinity'),
                    coalesce(v_event, '00000000-0000-0000-0000-000000000000'))
            ORDER BY known.user_key, known.occurred_at, known.event_id
            LIMIT p_limit
        ) AS next
    ), parted AS (
        SELECT facts.*, (number - 1) / 1000 + sum(pg_column_size(properties)) OVER (
            ORDER BY number ROWS UNBOUNDED PRECEDING) / 1000000 AS part
        FROM facts
    ), packed AS (
        INSERT INTO warehouse.packed_events (
            month, event_type_key, chunk_no, events, user_from, user_to, event_ids,
            occurred_ats, account_keys, user_keys, geo_keys, properties, revenues, currencies
        )
        SELECT p_month, p_event_type,
            coalesce(v_last_no, 0) + row_number() OVER (ORDER BY fact.part), count(*),
            min(fact.user_key), max(fact.user_key),
            array_agg(fact.event_id ORDER BY fact.number),
            array_agg(fact.occurred_at ORDER BY fact.number),
            array_agg(fact.account_key ORDER BY fact.number),
            array_agg(fact.user_key ORDER BY fact.number),
            array_agg(fact.geo_key ORDER BY fact.number),
            array_agg(fact.properties ORDER BY fact.number),
            CASE WHEN count(fact.revenue) > 0
                THEN array_agg(fact.revenue ORDER BY fact.number) END,
            CASE WHEN count(fact.currency) > 0
                THEN array_agg(fact.currency ORDER BY fact.number) END
        FROM parted AS fact
        GROUP BY fact.part
        RETURNING events
    )
    SELECT coalesce(sum(packed.events), 0) INTO v_packed FROM packed;
    RETURN v_packed;
END
$$;
COMMENT ON FUNCTION spectrum._pack_type(date, integer, bigint) IS
    'Packs the next events of one type of a month, up to p_limit, and returns how many. Rows hold '
    'fewer where properties are long.';

CREATE FUNCTION spectrum._pack_some(p_month date, p_limit bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_from timestamptz := p_month::timestamp AT TIME ZONE 'UTC';
    v_to timestamptz := (p_month + interval '1 month') AT TIME ZONE 'UTC';
    v_type integer := (
        SELECT max(chunk.event_type_key) FROM warehouse.packed_events AS chunk
        WHERE chunk.month = p_month
    );
    v_packed bigint := 0;
BEGIN
    LOOP
        v_packed := v_packed
            + spectrum._pack_type(p_month, coalesce(v_type, -1), p_limit - v_packed);
        EXIT WHEN v_packed >= p_limit;
        v_type := (
            SELECT min(known.event_type_key) FROM warehouse.fact_events AS known
            WHERE known.occurred_at >= v_from AND known.occurred_at < v_to
                AND known.event_type_key > coalesce(v_type, -1)
        );
        EXIT WHEN v_type IS NULL;
    END LOOP;
    RETURN v_packed;
END
$$;
COMMENT ON FUNCTION spectrum._pack_some(date, bigint) IS
    'Packs the next events of a month, up to p_limit, and returns how many: 0 where all are.';

CREATE FUNCTION spectrum._rewrite_packed(
    p_users bigint[],
    p_event_type integer,
    p_from timestamptz,
    p_to timestamptz,
    p_properties text[] DEFAULT NULL
)
RETURNS TABLE (
    event_id uuid,
    occurred_at timestamptz,
    account_key bigint,
    user_key bigint,
    event_type_key integer
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH touched AS (
        DELETE FROM warehouse.packed_events AS chunk
        WHERE chunk.user_to >= (SELECT min(key) FROM unnest(p_users) AS key)
            AND chunk.user_from <= (SELECT max(key) FROM unnest(p_users) AS key)
            AND chunk.user_keys && p_users
            AND (p_event_type IS NULL OR chunk.event_type_key = p_event_type)
        RETURNING chunk.*
    ), facts AS MATERIALIZED (
        SELECT touched.month, touched.event_type_key, touched.chunk_no, fact.*, his.is_his,
            his.is_his AND p_properties && ARRAY['*', config.revenue_property] AS is_unpaid,
            config.currency AS default_currency
        FROM touched
        CROSS JOIN spectrum.config
        CROSS JOIN LATERAL unnest(touched.event_ids, touched.occurred_ats, touched.account_keys,
            touched.user_keys, touched.geo_keys, touched.properties, touched.revenues,
            touched.currencies) WITH ORDINALITY AS fact (event_id, occurred_at, account_key,
            user_key, geo_key, properties, revenue, currency, number)
        CROSS JOIN LATERAL (
            SELECT fact.user_key = ANY (p_users) AND fact.occurred_at >= p_from
                AND fact.occurred_at < p_to AS is_his
        ) AS his
    ), forgotten AS (
        DELETE FROM spectrum.pii_values AS value
        USING facts JOIN spectrum.pii_rules AS rule ON rule.field LIKE 'properties.%'
        WHERE facts.is_his AND value.field = rule.field
            AND value.hash = facts.properties #>> (string_to_array(rule.field, '.'))[2:]
    ), kept AS (
        INSERT INTO warehouse.packed_events (
            month, event_type_key, chunk_no, events, user_from, user_to, event_ids,
            occurred_ats, account_keys, user_keys, geo_keys, properties, revenues, currencies
        )
        SELECT fact.month, fact.event_type_key, fact.chunk_no, count(*), min(fact.user_key),
            max(fact.user_key),
            array_agg(fact.event_id ORDER BY fact.number),
            array_agg(fact.occurred_at ORDER BY fact.number),
            array_agg(fact.account_key ORDER BY fact.number),
            array_agg(fact.user_key ORDER BY fact.number),
            array_agg(fact.geo_key ORDER BY fact.number),
            array_agg(CASE WHEN NOT fact.is_his THEN fact.properties
                WHEN '*' = ANY (p_properties) THEN '{}'
                ELSE fact.properties - p_properties END ORDER BY fact.number),
            array_agg(CASE WHEN fact.is_unpaid IS NOT TRUE THEN fact.revenue END
                ORDER BY fact.number),
            array_agg(CASE WHEN fact.is_unpaid THEN NULL
                WHEN fact.is_his AND fact.revenue IS NOT NULL AND p_properties && '{*, currency}'
                THEN fact.default_currency ELSE fact.currency END ORDER BY fact.number)
        FROM facts AS fact
        WHERE p_properties IS NOT NULL OR NOT fact.is_his
        GROUP BY fact.month, fact.event_type_key, fact.chunk_no
    )
    SELECT fact.event_id, fact.occurred_at, fact.account_key, fact.user_key, fact.event_type_key
    FROM facts AS fact
    WHERE fact.is_his;
END
$$;
COMMENT ON FUNCTION spectrum._rewrite_packed(
    bigint[], integer, timestamptz, timestamptz, text[]
) IS
    'Takes packed events of users, of one type or (NULL) all, that occurred in [p_from, p_to) out, '
    'or, where p_properties are given, these from their properties; and what the hashes in their '
    'properties stand for. Returns which they are.';
