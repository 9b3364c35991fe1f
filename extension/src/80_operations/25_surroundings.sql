-- Room 80, surroundings: what Spectrum depends on and does not own, for status() and health():
-- whether pg_cron runs and calls, and who keeps a transaction open.

CREATE FUNCTION spectrum._longest_pause(p_cron text)
RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN p_cron ~ '^[0-9]+ seconds?$' THEN p_cron::interval
        WHEN p_cron ~ '^@' THEN CASE p_cron
            WHEN '@hourly' THEN interval '1 hour'
            WHEN '@daily' THEN interval '1 day'
            WHEN '@midnight' THEN interval '1 day'
            WHEN '@weekly' THEN interval '7 days'
            WHEN '@monthly' THEN interval '31 days'
            WHEN '@yearly' THEN interval '366 days'
            WHEN '@annually' THEN interval '366 days'
        END
        WHEN parts.field[4] <> '*' THEN interval '366 days'
        WHEN parts.field[3] <> '*' THEN interval '31 days'
        WHEN parts.field[5] <> '*' THEN interval '7 days'
        WHEN parts.field[2] ~ '^\*/[0-9]{1,2}$'
            THEN make_interval(hours => substr(parts.field[2], 3)::integer)
        WHEN parts.field[2] <> '*' THEN interval '1 day'
        WHEN parts.field[1] ~ '^\*/[0-9]{1,2}$'
            THEN make_interval(mins => substr(parts.field[1], 3)::integer)
        WHEN parts.field[1] <> '*' THEN interval '1 hour'
        ELSE interval '1 minute'
    END
    FROM (
        SELECT string_to_array(regexp_replace(btrim(p_cron), '\s+', ' ', 'g'), ' ') AS field
    ) AS parts
$$;
COMMENT ON FUNCTION spectrum._longest_pause(text) IS
    'How long a cron schedule pauses at most, roughly and never too short; NULL where that cannot '
    'be said.';

CREATE FUNCTION spectrum._cron_is_down()
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Its launcher is no backend of any user, yet its name and database can be seen by all.
    RETURN NOT EXISTS (
        SELECT FROM pg_stat_activity AS activity
        WHERE activity.backend_type = 'pg_cron launcher'
            OR activity.application_name = 'pg_cron scheduler'
    ) AND NOT pg_is_in_recovery();
END
$$;
COMMENT ON FUNCTION spectrum._cron_is_down() IS
    'Whether no launcher of pg_cron runs in this server.';

CREATE FUNCTION spectrum._cron_advice(p_remark text, p_last_message text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE
        WHEN p_remark LIKE '%switched off' THEN format(
            'SELECT cron.alter_job(jobid, active => true) FROM cron.job WHERE jobname = %L;',
            spectrum._job_name())
        WHEN p_remark LIKE '%pg_cron does not run%' AND current_setting('cron.database_name', true)
            IS NULL THEN 'As the server''s administrator: add pg_cron to shared_preload_libraries '
            'and restart. Until then: CALL spectrum.run();'
        WHEN p_remark LIKE '%pg_cron does not run%' THEN 'As the server''s administrator: restart '
            'the server, which alone starts pg_cron''s launcher, and look into its log for why it '
            'ended. Until then: CALL spectrum.run();'
        WHEN p_last_message LIKE 'could not start background process%' THEN format(
            'All background workers of the server are taken: raise max_worker_processes (now %s) '
            'and restart, or end jobs: SELECT pid, datname, query FROM pg_stat_activity WHERE '
            'backend_type LIKE ''pg_cron%%'';', current_setting('max_worker_processes'))
        WHEN p_remark LIKE '%overdue%' THEN format(
            'pg_cron runs %s jobs at once (cron.max_running_jobs) and lets others wait: SELECT '
            'jobid, start_time, command FROM cron.job_run_details WHERE status = ''running''; and '
            'look into the server''s log. Until then: CALL spectrum.run();',
            coalesce(current_setting('cron.max_running_jobs', true), 'some'))
        ELSE 'SELECT spectrum.schedule(); where pg_cron is missing, the error says what helps.'
    END;
END
$$;
COMMENT ON FUNCTION spectrum._cron_advice(text, text) IS
    'What to do where pg_cron does not call, by what _cron_state() says of it.';

CREATE FUNCTION spectrum._cron_state(
    OUT schedule text,
    OUT is_active boolean,
    OUT last_end timestamptz,
    OUT last_status text,
    OUT remark text,
    OUT last_message text
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_down text := CASE WHEN spectrum._cron_is_down() THEN ', but pg_cron does not run' END;
    v_last_start timestamptz;
BEGIN
    IF to_regnamespace('cron') IS NULL THEN
        remark := 'pg_cron is not in this database' || coalesce(
            (SELECT ', it lives in ' || quote_ident(setting)
                || CASE WHEN v_down IS NULL THEN '' ELSE ' and does not run' END
            FROM pg_settings WHERE name = 'cron.database_name'), '');
        RETURN;
    ELSIF NOT has_schema_privilege('cron', 'USAGE') THEN
        remark := format('role %s may not look into pg_cron', current_user);
        RETURN;
    END IF;
    EXECUTE 'SELECT job.schedule, job.active FROM cron.job '
        'WHERE job.jobname = $1 ORDER BY job.active DESC, job.jobid LIMIT 1'
    INTO schedule, is_active USING spectrum._job_name();
    IF schedule IS NULL THEN
        remark := 'not scheduled';
        RETURN;
    END IF;
    EXECUTE 'SELECT details.start_time, details.end_time, details.status, details.return_message '
        'FROM cron.job_run_details AS details '
        'JOIN cron.job USING (jobid) WHERE job.jobname = $1 ORDER BY details.runid DESC LIMIT 1'
    INTO v_last_start, last_end, last_status, last_message USING spectrum._job_name();
    last_message := CASE WHEN last_status = 'failed'
        THEN btrim(translate(last_message, E'\n\r', '  ')) END;
    -- Where pg_cron keeps no log (cron.log_run = off), Spectrum's own says when a run began.
    v_last_start := greatest(v_last_start, last_end, (
        SELECT max(log.started_at) FROM spectrum.run_log AS log WHERE log.step = 'run'
    ));
    remark := 'scheduled' || CASE
        WHEN NOT is_active THEN ', but switched off'
        WHEN pg_is_in_recovery() THEN '; on a standby pg_cron begins with its promotion'
        WHEN v_down IS NOT NULL THEN v_down
        WHEN last_status IS DISTINCT FROM 'running' AND v_last_start
            < now() - interval '1 minute' - 3 * spectrum._longest_pause(schedule)
            THEN format(', but overdue: nothing began since %s', date_trunc('second', v_last_start))
        ELSE ''
    END;
END
$$;
COMMENT ON FUNCTION spectrum._cron_state() IS
    'What pg_cron knows about this database''s job, as far as the caller may see it, and whether '
    'it does its work.';

CREATE FUNCTION spectrum._idle_transactions()
RETURNS TABLE (who text, what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_until timestamptz := now() - (SELECT config.max_idle FROM spectrum.config);
BEGIN
    RETURN QUERY
    SELECT
        format('process %s of %s%s, %s since %s', activity.pid, activity.usename,
            coalesce(' (' || nullif(activity.application_name, '') || ')', ''), activity.state,
            date_trunc('second', activity.state_change)),
        format('SELECT pg_terminate_backend(%s);', activity.pid)
    FROM pg_stat_activity AS activity
    WHERE activity.datname = current_database() AND activity.pid <> pg_backend_pid()
        AND activity.state LIKE 'idle in transaction%' AND activity.state_change < v_until
    ORDER BY activity.state_change;
    RETURN QUERY
    SELECT
        format('transaction %L, prepared by %s, since %s', prepared.gid, prepared.owner,
            date_trunc('second', prepared.prepared)),
        format('ROLLBACK PREPARED %L;', prepared.gid)
    FROM pg_prepared_xacts AS prepared
    WHERE prepared.database = current_database() AND prepared.prepared < v_until
    ORDER BY prepared.prepared;
END
$$;
COMMENT ON FUNCTION spectrum._idle_transactions() IS
    'Transactions that are open in this database and have done nothing for config.max_idle: who, '
    'since when, what ends each. Sessions of other roles show to members of pg_read_all_stats.';
