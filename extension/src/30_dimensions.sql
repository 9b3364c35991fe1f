-- Room 30: dimensions. Who, where and what, each natural key once. Key 0 is the unknown member, so
-- a fact never points at NULL. Filled by process_batch (room 40) in a fixed order of tables and,
-- inside each, in order of the natural key: two workers that meet the same newcomers wait for
-- each other instead of deadlocking. first_seen and last_seen follow with the next refresh
-- (room 50), so that workers never queue behind the row of a popular event type.
--
-- Names are looked up, not sorted for people: COLLATE "C" compares them byte by byte.
-- Members are never deleted and keys never change: a trigger refuses it. This takes the place of
-- foreign keys from the facts, which would cost 13 microseconds an event, more than all the rest.

CREATE FUNCTION spectrum._create_dimensions()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('warehouse.dim_accounts') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE warehouse.dim_accounts (
        account_key bigserial NOT NULL CONSTRAINT dim_accounts_pkey PRIMARY KEY,
        account_id text COLLATE "C" NOT NULL CONSTRAINT dim_accounts_account_id_key UNIQUE,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_accounts IS 'Accounts (tenants, customers) that events name.';
    COMMENT ON COLUMN warehouse.dim_accounts.account_key IS 'Key in facts; 0 is unknown.';
    COMMENT ON COLUMN warehouse.dim_accounts.account_id IS 'As sent; empty for the unknown.';
    INSERT INTO warehouse.dim_accounts (account_key, account_id) VALUES (0, '');

    CREATE TABLE warehouse.dim_users (
        user_key bigserial NOT NULL CONSTRAINT dim_users_pkey PRIMARY KEY,
        user_id text COLLATE "C" NOT NULL CONSTRAINT dim_users_user_id_key UNIQUE,
        account_key bigint NOT NULL DEFAULT 0,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_users IS 'Users that events name, one person across accounts.';
    COMMENT ON COLUMN warehouse.dim_users.user_key IS 'Key in facts; 0 is the unknown user.';
    COMMENT ON COLUMN warehouse.dim_users.user_id IS 'As sent; empty for the unknown user.';
    COMMENT ON COLUMN warehouse.dim_users.account_key IS
        'Account under which the user was met first. Numbers per account follow each event''s own.';
    INSERT INTO warehouse.dim_users (user_key, user_id) VALUES (0, '');

    CREATE TABLE warehouse.dim_geography (
        geo_key serial NOT NULL CONSTRAINT dim_geography_pkey PRIMARY KEY,
        country text COLLATE "C" NOT NULL,
        region text COLLATE "C" NOT NULL,
        city text COLLATE "C" NOT NULL,
        first_seen timestamptz,
        last_seen timestamptz,
        CONSTRAINT dim_geography_place_key UNIQUE (country, region, city)
    );
    COMMENT ON TABLE warehouse.dim_geography IS 'Places that events name; empty parts are unknown.';
    COMMENT ON COLUMN warehouse.dim_geography.geo_key IS 'Key in facts; 0 is the unknown place.';
    INSERT INTO warehouse.dim_geography (geo_key, country, region, city) VALUES (0, '', '', '');

    CREATE TABLE warehouse.dim_event_types (
        event_type_key serial NOT NULL CONSTRAINT dim_event_types_pkey PRIMARY KEY,
        event_type text COLLATE "C" NOT NULL
            CONSTRAINT dim_event_types_event_type_key UNIQUE,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_event_types IS 'Types of events, by name.';
    COMMENT ON COLUMN warehouse.dim_event_types.event_type_key IS
        'Key in facts; 0 is the unknown type, which no event has: one without a type fails.';
    INSERT INTO warehouse.dim_event_types (event_type_key, event_type) VALUES (0, '');

    PERFORM spectrum._finish_dimension('warehouse.dim_accounts', 'account_key');
    PERFORM spectrum._finish_dimension('warehouse.dim_users', 'user_key');
    PERFORM spectrum._finish_dimension('warehouse.dim_geography', 'geo_key');
    PERFORM spectrum._finish_dimension('warehouse.dim_event_types', 'event_type_key');
END
$$;
COMMENT ON FUNCTION spectrum._create_dimensions() IS
    'Room 30: makes the dimensions, each with its unknown member at key 0.';

CREATE FUNCTION spectrum._finish_dimension(p_dimension text, p_key text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('COMMENT ON COLUMN %s.first_seen IS %L', p_dimension,
        'Earliest occurred_at met, as of the last refresh.');
    EXECUTE format('COMMENT ON COLUMN %s.last_seen IS %L', p_dimension,
        'Latest occurred_at met, as of the last refresh.');
    EXECUTE format('CREATE TRIGGER keep_members BEFORE DELETE OR TRUNCATE OR UPDATE OF %I ON %s '
        'FOR EACH STATEMENT EXECUTE FUNCTION spectrum._refuse_removal()', p_key, p_dimension);
    EXECUTE format('COMMENT ON TRIGGER keep_members ON %s IS %L', p_dimension,
        'Facts point at members by key, without a foreign key.');
END
$$;
COMMENT ON FUNCTION spectrum._finish_dimension(text, text) IS
    'Gives a dimension what all of them have: the comments on when, and the guard of its keys.';

CREATE FUNCTION spectrum._refuse_removal()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'members of %.% are kept for ever', tg_table_schema, tg_table_name
        USING ERRCODE = 'restrict_violation',
            DETAIL = 'Facts point at them by key.',
            HINT = 'Members that no fact names do no harm.';
END
$$;
COMMENT ON FUNCTION spectrum._refuse_removal() IS
    'Trigger of the dimensions: raises 23001 where members would go or change their key.';

CREATE FUNCTION spectrum._add_members()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_owners text[];
BEGIN
    WITH added AS (
        INSERT INTO warehouse.dim_accounts (account_id)
        SELECT DISTINCT batch.account_id
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.account_key IS NULL
        ORDER BY batch.account_id
        ON CONFLICT (account_id) DO NOTHING
        RETURNING account_id
    )
    SELECT array_agg('*'::text) INTO v_owners FROM added;
    PERFORM spectrum._note_members('max_new_accounts', v_owners);

    INSERT INTO warehouse.dim_users (user_id, account_key)
    SELECT newcomers.user_id, (
            SELECT accounts.account_key FROM warehouse.dim_accounts AS accounts
            WHERE accounts.account_id = newcomers.account_id
        )
    FROM (SELECT DISTINCT ON (batch.user_id) batch.user_id, batch.account_id
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.user_key IS NULL
        ORDER BY batch.user_id, batch.seq) AS newcomers
    ORDER BY newcomers.user_id
    ON CONFLICT (user_id) DO NOTHING;

    WITH added AS (
        INSERT INTO warehouse.dim_geography (country, region, city)
        SELECT DISTINCT batch.country, batch.region, batch.city
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.geo_key IS NULL
        ORDER BY batch.country, batch.region, batch.city
        ON CONFLICT (country, region, city) DO NOTHING
        RETURNING country, region, city
    )
    SELECT array_agg(owners.account_id) INTO v_owners
    FROM (
        SELECT DISTINCT batch.account_id, batch.country, batch.region, batch.city
        FROM pg_temp.spectrum_batch AS batch
        JOIN added USING (country, region, city)
        WHERE batch.is_readable
    ) AS owners;
    PERFORM spectrum._note_members('max_new_places', v_owners);

    WITH added AS (
        INSERT INTO warehouse.dim_event_types (event_type)
        SELECT DISTINCT batch.event_type
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.event_type_key IS NULL
        ORDER BY batch.event_type
        ON CONFLICT (event_type) DO NOTHING
        RETURNING event_type
    )
    SELECT array_agg(owners.account_id) INTO v_owners
    FROM (
        SELECT DISTINCT batch.account_id, batch.event_type
        FROM pg_temp.spectrum_batch AS batch
        JOIN added USING (event_type)
        WHERE batch.is_readable
    ) AS owners;
    PERFORM spectrum._note_members('max_new_event_types', v_owners);
END
$$;
COMMENT ON FUNCTION spectrum._add_members() IS
    'Adds what the batch names and the dimensions do not have yet. Keys are looked up later, in '
    'a statement of its own: only that sees a member that another worker added meanwhile. What '
    'this batch added counts for the caps of the accounts that name it.';
