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
        ORDER BY member.oid
    LOOP
        EXECUTE format('ALTER EXTENSION spectrum DROP %s %s', r_member.kind, r_member.name);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._release_data() IS
    'Takes every table, view and sequence out of the extension, so that dumps hold them whole and '
    'DROP EXTENSION refuses while they exist.';

CREATE FUNCTION spectrum.setup()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._create_config();
    PERFORM spectrum._create_run_log();
    PERFORM spectrum._create_raw_events();
    PERFORM spectrum._create_intake();
    PERFORM spectrum._create_horizon();
    PERFORM spectrum._create_reading();
    PERFORM spectrum._create_dimensions();
    PERFORM spectrum._create_facts();
    PERFORM spectrum._create_news();
    PERFORM spectrum._create_reports();
    PERFORM spectrum._create_events();
    PERFORM spectrum._create_daily_events();
    PERFORM spectrum._create_active_users();
    PERFORM spectrum._create_lifecycle();
    PERFORM spectrum._create_stickiness();
    PERFORM spectrum._create_revenue();
    PERFORM spectrum._create_funnels();
    PERFORM spectrum._create_retention();
    PERFORM spectrum._create_sessions();
    PERFORM spectrum._create_features();
    PERFORM spectrum._create_cohorts();
    PERFORM spectrum._create_feature_adoption();
    PERFORM spectrum._create_own_reports();
    PERFORM spectrum._create_mrr();
    PERFORM spectrum._create_operations();
    PERFORM spectrum._create_event_catalog();
    PERFORM spectrum._create_experiments();
    PERFORM spectrum._create_glass();
    PERFORM spectrum._create_tasks();
    PERFORM spectrum._create_status();
    PERFORM spectrum._provision();
    PERFORM spectrum._serve_first_reports();
    PERFORM spectrum._release_data();
END
$$;
COMMENT ON FUNCTION spectrum.setup() IS
    'Makes what is missing of Spectrum''s tables and views and gives it to the user. CREATE '
    'EXTENSION calls it; calling it again changes nothing.';
