-- Room 80, setup: makes the tables and views, room by room, and gives them to the user. Members of
-- an extension are left out of dumps and vanish with DROP EXTENSION; events must not.

CREATE FUNCTION spectrum._release_data()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_member record;
BEGIN
    FOR r_member IN
        SELECT
            member.oid::regclass AS name,
            CASE member.relkind
                WHEN 'v' THEN 'VIEW'
                WHEN 'm' THEN 'MATERIALIZED VIEW'
                WHEN 'S' THEN 'SEQUENCE'
                ELSE 'TABLE'
            END AS kind
        FROM pg_extension AS extension
        JOIN pg_depend AS depend
            ON depend.refclassid = 'pg_extension'::regclass AND depend.refobjid = extension.oid
                AND depend.classid = 'pg_class'::regclass AND depend.deptype = 'e'
        JOIN pg_class AS member ON member.oid = depend.objid
        WHERE extension.extname = 'spectrum'
            -- No dump is to hold the key of the hashes.
            AND member.oid IS DISTINCT FROM to_regclass('spectrum.pii_key')
        ORDER BY member.oid
    LOOP
        EXECUTE format('ALTER EXTENSION spectrum DROP %s %s', r_member.kind, r_member.name);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._release_data() IS
    'Takes every table, view and sequence out of the extension, but for the key of the hashes, so '
    'that dumps hold them whole and DROP EXTENSION refuses while they exist.';

CREATE FUNCTION spectrum.setup()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from text := spectrum._tables_release();
    v_migrates boolean := v_from IS NOT NULL AND v_from <> spectrum._release();
    v_grants text[] := ARRAY[]::text[];
    v_room text;
BEGIN
    IF v_migrates THEN
        v_grants := spectrum._granted_roles();
        PERFORM spectrum._migrate_tables();
    END IF;
    -- In the order of the rooms: each one's views may read what stands before it.
    FOREACH v_room IN ARRAY ARRAY[
        'releases', 'config', 'run_log', 'horizon', 'settings', 'raw_events', 'intake',
        'privacy', 'forgotten', 'reading', 'floods', 'dimensions', 'caps', 'facts', 'news',
        'reports', 'tenants', 'packed', 'served_reports', 'daily_events', 'events',
        'active_users', 'lifecycle', 'stickiness', 'revenue', 'funnels', 'frozen_funnels',
        'retention', 'sessions', 'attributions', 'paths', 'features', 'cohorts',
        'feature_adoption', 'own_reports', 'mrr', 'operations', 'event_catalog', 'experiments',
        'tasks', 'receipts', 'status'
    ] LOOP
        EXECUTE format('SELECT spectrum.%I()', '_create_' || v_room);
        IF v_migrates THEN
            PERFORM spectrum._replace_views('_create_' || v_room);
        END IF;
    END LOOP;
    IF v_migrates THEN
        PERFORM spectrum._migrate_reports(v_from);
        PERFORM spectrum._show_packed();
    END IF;
    PERFORM spectrum._provision();
    PERFORM spectrum._serve_first_reports();
    PERFORM spectrum._release_data();
    IF v_from IS NULL OR v_migrates THEN
        INSERT INTO spectrum.releases (release, migrated_from, grants)
        VALUES (spectrum._release(), v_from, v_grants);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum.setup() IS
    'Makes what is missing of Spectrum''s tables and views and gives it to the user; brings those '
    'of an earlier release to this one. CREATE EXTENSION and ALTER EXTENSION UPDATE call it; after '
    'the restore of an earlier release''s dump call it by hand. Calling it again changes nothing.';
