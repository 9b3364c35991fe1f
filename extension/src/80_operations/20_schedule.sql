-- Room 80, the schedule: pg_cron, where it is. All calls to it stand behind a look whether it is
-- there, so that Spectrum works without it and in databases other than pg_cron's own.

CREATE FUNCTION spectrum._job_name()
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'spectrum ' || current_database()
$$;
COMMENT ON FUNCTION spectrum._job_name() IS 'Name of this database''s job in pg_cron.';

CREATE FUNCTION spectrum._require_cron()
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- NULL where pg_cron is not loaded, and for roles that may not see its settings.
    v_home text := (SELECT setting FROM pg_settings WHERE name = 'cron.database_name');
    v_hint text;
BEGIN
    IF to_regnamespace('cron') IS NOT NULL THEN
        IF has_schema_privilege('cron', 'USAGE') THEN
            RETURN;
        END IF;
        RAISE EXCEPTION 'role % may not use pg_cron', current_user
            USING ERRCODE = 'insufficient_privilege', HINT = format(
                'As a superuser: GRANT USAGE ON SCHEMA cron TO %I;', current_user);
    END IF;

    IF v_home IS NULL THEN
        v_hint := format('Where this server has pg_cron, as a superuser in its database (SHOW '
            'cron.database_name): SELECT cron.schedule_in_database(%L, ''*/5 * * * *'', '
            '''CALL spectrum.run()'', %L, %L); Without it, have any scheduler run: '
            'CALL spectrum.run();',
            spectrum._job_name(), current_database(), current_user);
    ELSIF v_home = current_database() THEN
        v_hint := 'As a superuser, in this database: CREATE EXTENSION pg_cron;';
    ELSE
        v_hint := format('As a superuser, in database %I: SELECT cron.schedule_in_database('
            '%L, ''*/5 * * * *'', ''CALL spectrum.run()'', %L, %L);',
            v_home, spectrum._job_name(), current_database(), current_user);
    END IF;
    RAISE EXCEPTION 'pg_cron is not in database %', current_database()
        USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = CASE WHEN v_home <> current_database()
                THEN format('In this cluster pg_cron lives in database %I.', v_home)
                ELSE 'Everything but the schedule works without it.'
            END,
            HINT = v_hint;
END
$$;
COMMENT ON FUNCTION spectrum._require_cron() IS
    'Raises 55000 where pg_cron is not in this database, 42501 where the role may not use it; the '
    'hint is the statement that helps.';

CREATE FUNCTION spectrum.schedule(p_cron text DEFAULT '*/5 * * * *')
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_job_id bigint;
    v_problem text;
BEGIN
    PERFORM spectrum._require_cron();
    BEGIN
        EXECUTE 'SELECT cron.schedule($1, $2, $3)' INTO v_job_id
        USING spectrum._job_name(), p_cron, 'CALL spectrum.run()';
    EXCEPTION
        WHEN invalid_parameter_value OR internal_error THEN
            GET STACKED DIAGNOSTICS v_problem = MESSAGE_TEXT;
            RAISE EXCEPTION 'invalid value for argument p_cron: %',
                coalesce(to_json(left(p_cron, 200))::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value', DETAIL = v_problem,
                    HINT = 'Expected a cron schedule: minute hour day month weekday, such as '
                        '*/5 * * * *';
    END;
    RETURN v_job_id;
END
$$;
COMMENT ON FUNCTION spectrum.schedule(text) IS
    'Has pg_cron CALL spectrum.run() by a cron schedule (default every five minutes) as the '
    'current role, and returns the job''s id. Calling it again changes the schedule.';

CREATE FUNCTION spectrum.unschedule()
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_exists boolean;
BEGIN
    PERFORM spectrum._require_cron();
    EXECUTE 'SELECT EXISTS (SELECT FROM cron.job WHERE jobname = $1 AND username = current_user)'
    INTO v_exists USING spectrum._job_name();
    IF v_exists THEN
        EXECUTE 'SELECT cron.unschedule($1)' USING spectrum._job_name();
    END IF;
    RETURN v_exists;
END
$$;
COMMENT ON FUNCTION spectrum.unschedule() IS
    'Takes Spectrum''s job off pg_cron; false where there was none.';
