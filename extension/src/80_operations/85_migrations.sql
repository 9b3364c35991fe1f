-- Room 80, migrations: what happens once to tables and views that a user has from an earlier
-- release. They are his, so neither ALTER EXTENSION UPDATE nor the restore of an old dump makes
-- them anew: setup() looks which release they are of and brings them to this one.
--
-- A new table, index or view needs nothing here where it has a _create_ function of its own. The
-- text of every view and comment is taken from the _create_ functions. All else that changed in
-- tables that exist already stands in _migrate_tables().

CREATE FUNCTION spectrum._release()
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT '1.1'
$$;
COMMENT ON FUNCTION spectrum._release() IS 'The release that these functions are of.';

CREATE FUNCTION spectrum._create_releases()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.releases') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.releases (
        release_id serial NOT NULL CONSTRAINT releases_pkey PRIMARY KEY,
        release text NOT NULL,
        since timestamptz NOT NULL DEFAULT clock_timestamp(),
        migrated_from text,
        grants text[] NOT NULL DEFAULT '{}'
    );
    COMMENT ON TABLE spectrum.releases IS
        'The releases that made or migrated the tables; they are of the last one.';
    COMMENT ON COLUMN spectrum.releases.release_id IS 'Ascending.';
    COMMENT ON COLUMN spectrum.releases.release IS 'Such as 1.1.';
    COMMENT ON COLUMN spectrum.releases.since IS 'When.';
    COMMENT ON COLUMN spectrum.releases.migrated_from IS
        'The release that the tables were of; NULL where they were made.';
    COMMENT ON COLUMN spectrum.releases.grants IS
        'The grants to roles that were given again, so that they cover what is new.';

    CREATE CONSTRAINT TRIGGER renew_grants AFTER INSERT ON spectrum.releases
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW
    WHEN (new.grants <> '{}')
    EXECUTE FUNCTION spectrum._renew_grants();
    COMMENT ON TRIGGER renew_grants ON spectrum.releases IS
        'Grants at the end of the transaction: what a script of an extension grants is taken for '
        'a part of the extension, and left out of dumps.';
END
$$;
COMMENT ON FUNCTION spectrum._create_releases() IS
    'Room 80: makes spectrum.releases and the trigger that renews grants.';

CREATE FUNCTION spectrum._renew_grants()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_grant text;
BEGIN
    FOREACH v_grant IN ARRAY new.grants LOOP
        EXECUTE 'SELECT ' || v_grant;
    END LOOP;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION spectrum._renew_grants() IS
    'Trigger of releases: gives roles again what they had been granted, with all that is new.';

CREATE FUNCTION spectrum._granted_roles()
RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Those that this release has.
    v_for_analysts text[] := ARRAY(
        SELECT relation.relname FROM pg_class AS relation
        WHERE relation.relnamespace = 'analytics'::regnamespace AND relation.relname IN (
            'events', 'event_keys', 'timelines', 'user_days', 'user_day_counts', 'event_days')
    );
    v_waiting text[];
    v_tenants text[];
BEGIN
    IF to_regclass('spectrum.tenants') IS NOT NULL THEN
        v_tenants := ARRAY(
            SELECT format('spectrum.grant_tenant(%L, %L, %L)', role.oid::regrole, tenant.account_id,
                CASE WHEN has_table_privilege(role.oid, 'analytics.events', 'SELECT')
                    THEN 'analyst' ELSE 'reader' END)
            FROM spectrum.tenants AS tenant
            JOIN pg_roles AS role ON role.rolname = tenant.role_name
            WHERE has_table_privilege(role.oid, 'analytics.settings', 'SELECT')
        );
    END IF;
    -- An update over several releases: what the one before renews at the end of the transaction.
    IF to_regclass('spectrum.releases') IS NOT NULL THEN
        v_waiting := ARRAY(
            SELECT unnest(made.grants) FROM spectrum.releases AS made WHERE made.since >= now());
    END IF;
    -- Who holds all that a grant covered; a part of it was granted by hand and is left alone.
    RETURN ARRAY(
        WITH held AS (
            SELECT acl.grantee, relation.relname::text AS relname
            FROM pg_class AS relation
            CROSS JOIN LATERAL aclexplode(relation.relacl) AS acl
            WHERE relation.relnamespace = 'analytics'::regnamespace AND relation.relkind = 'v'
                AND acl.privilege_type = 'SELECT' AND acl.grantee NOT IN (0, relation.relowner)
        ), readers AS (
            SELECT held.grantee, count(*) FILTER (WHERE held.relname = ANY (v_for_analysts))
                = cardinality(v_for_analysts) AS is_analyst
            FROM held
            GROUP BY held.grantee
            HAVING count(*) FILTER (WHERE held.relname <> ALL (v_for_analysts)) = (
                SELECT count(*) FROM pg_class AS relation
                WHERE relation.relnamespace = 'analytics'::regnamespace
                    AND relation.relkind = 'v' AND relation.relname::text <> ALL (v_for_analysts)
            )
        ), grants AS (
            SELECT CASE WHEN is_analyst THEN 'analyst' ELSE 'reader' END AS kind, grantee
            FROM readers
            UNION ALL
            SELECT 'ingest', acl.grantee
            FROM pg_attribute AS payload
            CROSS JOIN LATERAL aclexplode(payload.attacl) AS acl
            WHERE payload.attrelid = '@extschema@.raw_events'::regclass
                AND payload.attname = 'payload' AND acl.privilege_type = 'INSERT'
                AND acl.grantee <> 0
            UNION ALL
            SELECT CASE routine.proname WHEN 'request' THEN 'operator' ELSE 'capture' END,
                acl.grantee
            FROM pg_proc AS routine
            CROSS JOIN LATERAL aclexplode(routine.proacl) AS acl
            WHERE routine.oid IN (to_regprocedure('spectrum.request(text, jsonb)'),
                    to_regprocedure('spectrum.capture(jsonb)'))
                AND acl.grantee NOT IN (0, routine.proowner)
        )
        SELECT format('spectrum.grant_%s(%L)', grants.kind, grants.grantee::regrole)
        FROM grants
        UNION
        SELECT unnest(v_tenants || v_waiting)
        ORDER BY 1
    );
END
$$;
COMMENT ON FUNCTION spectrum._granted_roles() IS
    'The calls of grant_* that gave roles what they hold of the tables and views as they are.';

CREATE FUNCTION spectrum._tables_release()
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.config') IS NULL THEN
        RETURN NULL;
    ELSIF to_regclass('spectrum.releases') IS NULL THEN
        RETURN '1.0';
    END IF;
    RETURN (
        SELECT made.release FROM spectrum.releases AS made
        ORDER BY made.release_id DESC
        LIMIT 1
    );
END
$$;
COMMENT ON FUNCTION spectrum._tables_release() IS
    'The release that the tables are of; NULL where there are none.';

CREATE FUNCTION spectrum._require_release()
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF spectrum._tables_release() <> spectrum._release() THEN
        RAISE EXCEPTION 'the tables are of release %, the functions of %',
            spectrum._tables_release(), spectrum._release()
            USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'As their owner: SELECT spectrum.setup();';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._require_release() IS
    'Raises 55000 where the tables wait for their migration, as after the restore of an old dump.';

CREATE FUNCTION spectrum._migrate_tables()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Nobody else works meanwhile; a step under way is waited for.
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('run'));
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('refresh'));

    -- 1.0 to 1.1. Each step can be taken again; one that cannot asks spectrum._tables_release().
    ALTER TABLE spectrum.config
        ADD COLUMN IF NOT EXISTS raw_keep interval
            CONSTRAINT config_raw_keep_range CHECK (raw_keep >= '0'),
        ADD COLUMN IF NOT EXISTS max_payload_bytes integer NOT NULL DEFAULT 1048576
            CONSTRAINT config_max_payload_bytes_range
            CHECK (max_payload_bytes BETWEEN 2000 AND 1000000000),
        ADD COLUMN IF NOT EXISTS max_properties integer NOT NULL DEFAULT 1000
            CONSTRAINT config_max_properties_range CHECK (max_properties BETWEEN 1 AND 10000000),
        ADD COLUMN IF NOT EXISTS max_new_event_types integer NOT NULL DEFAULT 1000
            CONSTRAINT config_max_new_event_types_range CHECK (max_new_event_types >= 0),
        ADD COLUMN IF NOT EXISTS max_new_places integer NOT NULL DEFAULT 10000
            CONSTRAINT config_max_new_places_range CHECK (max_new_places >= 0),
        ADD COLUMN IF NOT EXISTS max_new_accounts integer NOT NULL DEFAULT 1000000
            CONSTRAINT config_max_new_accounts_range CHECK (max_new_accounts >= 0),
        ADD COLUMN IF NOT EXISTS account_share numeric NOT NULL DEFAULT 0.5
            CONSTRAINT config_account_share_range CHECK (account_share BETWEEN 0.05 AND 1),
        ADD COLUMN IF NOT EXISTS max_idle interval NOT NULL DEFAULT '5 minutes'
            CONSTRAINT config_max_idle_range CHECK (max_idle >= '1 ms'),
        ADD COLUMN IF NOT EXISTS facts_keep interval
            CONSTRAINT config_facts_keep_range CHECK (facts_keep >= '1 month'),
        ADD COLUMN IF NOT EXISTS pack_facts_after interval
            CONSTRAINT config_pack_facts_after_range CHECK (pack_facts_after >= '1 month');
    ALTER TABLE IF EXISTS spectrum.horizon
        ADD COLUMN IF NOT EXISTS packed_from timestamptz
            CONSTRAINT horizon_packs_what_is_frozen
            CHECK (packed_from IS NULL OR (facts_from IS NOT NULL AND packed_from < facts_from)),
        ADD COLUMN IF NOT EXISTS packed_without text
            CONSTRAINT horizon_packed_without_is_known
            CHECK (packed_without IN ('sums', 'days'));
    ALTER TABLE spectrum.intake ADD COLUMN IF NOT EXISTS late_seq bigint NOT NULL DEFAULT 0;
    ALTER TABLE spectrum.run_log DROP CONSTRAINT IF EXISTS run_log_step_is_known;
    ALTER TABLE spectrum.run_log ADD CONSTRAINT run_log_step_is_known
        CHECK (step IN ('run', 'provision', 'tasks', 'process', 'refresh', 'upkeep'));
    ALTER TABLE spectrum.reports ADD COLUMN IF NOT EXISTS complete_from timestamptz;
    ALTER TABLE spectrum.rollup_experiment_units
        ADD COLUMN IF NOT EXISTS frozen_at timestamptz,
        ADD COLUMN IF NOT EXISTS frozen_low text COLLATE "C",
        ADD COLUMN IF NOT EXISTS frozen_high text COLLATE "C";
    ALTER TABLE analytics.mv_event_catalog ADD COLUMN IF NOT EXISTS frozen_last_at timestamptz;
    ALTER TABLE analytics.mv_operations
        ADD COLUMN IF NOT EXISTS lows numeric[] NOT NULL DEFAULT '{}',
        ADD COLUMN IF NOT EXISTS belows bigint[] NOT NULL DEFAULT '{}';
    UPDATE spectrum.report_kinds
    SET tables = '{spectrum.rollup_funnel_entries, spectrum.rollup_frozen_entries, '
        'spectrum.rollup_funnel_seconds, analytics.mv_conversion_funnels, analytics.mv_funnel_days}'
    WHERE kind = 'funnel';
    ALTER TABLE @extschema@.raw_events ADD COLUMN IF NOT EXISTS treated text[];
    ALTER TABLE @extschema@.raw_events SET (
        autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05
    );
END
$$;
COMMENT ON FUNCTION spectrum._migrate_tables() IS
    'Brings tables of an earlier release to this one, before what is new is made: columns, '
    'constraints, indexes, triggers, storage.';

CREATE FUNCTION spectrum._migrate_reports(p_from text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_from = '1.0' THEN
        -- Of a unit left out 1.0 kept no amounts; by first entry it passed over earlier ones.
        PERFORM spectrum.rebuild_reports('experiment');
        PERFORM spectrum.rebuild_reports('funnel');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._migrate_reports(text) IS
    'Has refreshes build anew what an earlier release kept otherwise.';

CREATE FUNCTION spectrum._replace_views(p_room text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_source text := (SELECT prosrc FROM pg_proc
        WHERE pronamespace = 'spectrum'::regnamespace AND proname = p_room);
    v_view regclass;
    r_statement record;
BEGIN
    FOR r_statement IN
        SELECT piece.words[1] AS text, piece.words[2] AS view, piece.words[3] AS part
        FROM regexp_split_to_table(v_source, ';\n') WITH ORDINALITY AS part (text, number)
        CROSS JOIN LATERAL regexp_match(part.text,
            '^(?:\s|BEGIN\n|--[^\n]*\n)*((?:CREATE VIEW (\S+)|COMMENT ON|'
            'PERFORM spectrum\.(_(?:create|show)_\w+))[\s(].*)$') AS piece (words)
        WHERE piece.words IS NOT NULL
        ORDER BY part.number
    LOOP
        IF r_statement.part IS NOT NULL THEN
            PERFORM spectrum._replace_views(r_statement.part);
            CONTINUE;
        END IF;
        v_view := to_regclass(r_statement.view);
        -- In an update's script only what belongs to the extension may be replaced; setup()
        -- releases it again.
        IF v_view IS NOT NULL AND EXISTS (SELECT FROM pg_extension WHERE extname = 'spectrum')
            AND NOT EXISTS (SELECT FROM pg_depend
                WHERE classid = 'pg_class'::regclass AND objid = v_view AND deptype = 'e')
        THEN
            EXECUTE format('ALTER EXTENSION spectrum ADD VIEW %s', v_view);
        END IF;
        EXECUTE regexp_replace(r_statement.text, '^CREATE VIEW', 'CREATE OR REPLACE VIEW');
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._replace_views(text) IS
    'Gives the views of a room the definition, and all it has the comments, that stand in its '
    '_create_ function: new columns come last, grants and what depends on a view stay.';
