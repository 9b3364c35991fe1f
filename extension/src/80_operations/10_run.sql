-- Room 80, run: the tick. run() only loops and commits; each step is one function call and one
-- transaction, so that a crash loses at most the step under way. Turns are taken by advisory
-- locks that end with the transaction: a cancelled run leaves none behind.

CREATE FUNCTION spectrum._take_turn(p_name text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN pg_try_advisory_xact_lock(spectrum._lock_key(p_name));
END
$$;
COMMENT ON FUNCTION spectrum._take_turn(text) IS
    'Whether this transaction may do what only one at a time may do.';

CREATE FUNCTION spectrum._begin_run()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run_id bigint;
BEGIN
    PERFORM spectrum._require_primary();
    PERFORM spectrum._require_release();
    IF NOT spectrum._take_turn('run') THEN
        RAISE NOTICE 'another spectrum.run() is under way: this one does nothing';
        PERFORM spectrum._log_step(NULL, 'run', clock_timestamp(), 'another run was under way');
        RETURN NULL;
    END IF;
    INSERT INTO spectrum.run_log (step) VALUES ('run') RETURNING run_log.log_id INTO v_run_id;
    UPDATE spectrum.run_log SET run_id = v_run_id WHERE log_id = v_run_id;
    RETURN v_run_id;
END
$$;
COMMENT ON FUNCTION spectrum._begin_run() IS
    'Opens a run in the run log and returns its id; NULL where another one is under way.';

CREATE FUNCTION spectrum._provision()
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_ahead integer := (SELECT config.months_ahead FROM spectrum.config);
BEGIN
    RETURN format('%s months made',
        spectrum.ensure_partitions(now(), now() + make_interval(months => v_ahead)));
END
$$;
COMMENT ON FUNCTION spectrum._provision() IS 'Step of a run: months ahead of need.';

CREATE FUNCTION spectrum._clean_cron_log()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_log regclass;
    v_deleted bigint := 0;
BEGIN
    -- Step by step: to look for a table in a schema that one may not use is an error.
    IF to_regnamespace('cron') IS NOT NULL AND has_schema_privilege('cron', 'USAGE') THEN
        v_log := to_regclass('cron.job_run_details');
    END IF;
    IF v_log IS NOT NULL AND has_table_privilege(v_log, 'DELETE') THEN
        -- By what was run, not by job: the rows of a job that is gone are to go too.
        EXECUTE 'DELETE FROM cron.job_run_details WHERE end_time < now() - $1 '
            'AND database = current_database() AND command = $2'
            USING (SELECT config.cron_log_keep FROM spectrum.config), 'CALL spectrum.run()';
        GET DIAGNOSTICS v_deleted = ROW_COUNT;
    END IF;
    RETURN v_deleted;
END
$$;
COMMENT ON FUNCTION spectrum._clean_cron_log() IS
    'Deletes old rows about Spectrum''s jobs from pg_cron''s log, which pg_cron never does; where '
    'pg_cron is in this database and the caller may.';

CREATE FUNCTION spectrum._upkeep()
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_log_rows bigint;
    v_found bigint := spectrum._patrol();
BEGIN
    DELETE FROM spectrum.run_log
    WHERE started_at < now() - (SELECT config.run_log_keep FROM spectrum.config);
    GET DIAGNOSTICS v_log_rows = ROW_COUNT;
    PERFORM spectrum._request_purge_raw();
    PERFORM spectrum._request_months('purge_facts', config.facts_keep),
        spectrum._request_months('pack_facts', config.pack_facts_after)
    FROM spectrum.config;
    PERFORM spectrum._tidy_cap_notes();
    RETURN format('%s run log rows and %s pg_cron log rows deleted, %s forgotten events found',
        v_log_rows, spectrum._clean_cron_log(), v_found);
END
$$;
COMMENT ON FUNCTION spectrum._upkeep() IS
    'Step of a run: old log rows, pg_cron''s log, and a look at a part of what lies behind. Asks '
    'for the purge of raw events and facts that are older than is wanted, and for packing.';

CREATE FUNCTION spectrum._do_step(p_run_id bigint, p_step text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
    v_message text;
    v_state text;
    v_detail text;
    r_refresh record;
BEGIN
    IF p_step = 'process' THEN
        RETURN (SELECT batch.claimed > 0 FROM spectrum._log_batch(p_run_id, NULL) AS batch);
    ELSIF p_step = 'tasks' THEN
        v_detail := spectrum._work_on_tasks();
        IF v_detail IS NOT NULL THEN
            PERFORM spectrum._log_step(p_run_id, p_step, v_started_at, v_detail);
        END IF;
        RETURN v_detail IS NOT NULL;
    ELSIF p_step IN ('refresh', 'refresh between') THEN
        PERFORM spectrum._wait_for_reports();
        r_refresh := spectrum._refresh_some(200000);
        PERFORM spectrum._log_step(p_run_id, 'refresh', v_started_at, r_refresh.detail);
        RETURN r_refresh.has_more;
    END IF;
    PERFORM spectrum._log_step(p_run_id, p_step, v_started_at, CASE p_step
        WHEN 'provision' THEN spectrum._provision()
        WHEN 'upkeep' THEN spectrum._upkeep()
    END);
    RETURN false;
EXCEPTION
    WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS v_message = MESSAGE_TEXT, v_state = RETURNED_SQLSTATE;
        v_message := spectrum._one_line(v_message);
        RAISE WARNING 'spectrum: step % of run % failed and was undone: % (SQLSTATE %)',
            p_step, p_run_id, v_message, v_state;
        PERFORM spectrum._log_step(p_run_id, split_part(p_step, ' ', 1), v_started_at, NULL,
            format('%s (SQLSTATE %s)', v_message, v_state));
        -- Somebody else won a deadlock: it is gone with this transaction.
        RETURN v_state = '40P01';
END
$$;
COMMENT ON FUNCTION spectrum._do_step(bigint, text) IS
    'Does one step of a run and logs it; true where doing it once more may find more to do. An '
    'error undoes the step, is logged, and leaves the run to its further steps.';

CREATE FUNCTION spectrum._end_run(p_run_id bigint, p_detail text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE spectrum.run_log AS run
    SET finished_at = clock_timestamp(),
        detail = p_detail,
        claimed = steps.claimed,
        loaded = steps.loaded,
        duplicates = steps.duplicates,
        failed = steps.failed,
        error_msg = steps.error_msg
    FROM (
        SELECT
            coalesce(sum(step.claimed), 0) AS claimed,
            coalesce(sum(step.loaded), 0) AS loaded,
            coalesce(sum(step.duplicates), 0) AS duplicates,
            coalesce(sum(step.failed), 0) AS failed,
            string_agg(step.step || ': ' || step.error_msg, '; ' ORDER BY step.log_id) AS error_msg
        FROM spectrum.run_log AS step
        WHERE step.run_id = p_run_id AND step.log_id <> p_run_id
    ) AS steps
    WHERE run.log_id = p_run_id;
END
$$;
COMMENT ON FUNCTION spectrum._end_run(bigint, text) IS
    'Closes a run in the run log with the sums of its steps and their errors.';

CREATE FUNCTION spectrum._run_step(p_run_id bigint, p_step text)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_has_more boolean;
    v_in_budget boolean;
    v_in_task_budget boolean;
BEGIN
    -- The lock ended with the last commit; whoever came in between goes on instead.
    IF NOT spectrum._take_turn('run') THEN
        PERFORM spectrum._end_run(p_run_id, 'another run took over');
        RETURN NULL;
    END IF;
    v_has_more := spectrum._do_step(p_run_id, p_step);
    IF p_step = 'upkeep' THEN
        PERFORM spectrum._end_run(p_run_id, NULL);
        RETURN NULL;
    END IF;
    SELECT clock_timestamp() < run.started_at + config.run_budget,
        clock_timestamp() < run.started_at + config.run_budget / 4
    INTO v_in_budget, v_in_task_budget
    FROM spectrum.run_log AS run CROSS JOIN spectrum.config
    WHERE run.log_id = p_run_id;
    RETURN CASE
        -- Not too much news at once: what a refresh works on has to fit into memory.
        WHEN p_step = 'process' AND v_has_more AND v_in_budget
            AND (SELECT sum(news.events) FROM spectrum.news) >= 200000 THEN 'refresh between'
        -- Tasks first, so that the views follow in the same run, but events wait for no task long.
        WHEN p_step = 'provision' OR (p_step = 'tasks' AND v_has_more AND v_in_task_budget)
            THEN 'tasks'
        WHEN p_step IN ('tasks', 'refresh between')
            OR (p_step = 'process' AND v_has_more AND v_in_budget) THEN 'process'
        WHEN p_step = 'process' OR (p_step = 'refresh' AND v_has_more AND v_in_budget)
            THEN 'refresh'
        ELSE 'upkeep'
    END;
END
$$;
COMMENT ON FUNCTION spectrum._run_step(bigint, text) IS
    'One transaction of a run: does the step and names the next one, NULL at the end.';

CREATE PROCEDURE spectrum.run()
LANGUAGE plpgsql
AS $$
DECLARE
    v_run_id bigint;
    v_step text := 'provision';
BEGIN
    -- Inside a transaction block this fails, before anything is done.
    COMMIT;
    -- Whatever the default is here: a step that waited must see what it waited for.
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
    v_run_id := spectrum._begin_run();
    IF v_run_id IS NULL THEN
        RETURN;
    END IF;
    WHILE v_step IS NOT NULL LOOP
        COMMIT;
        SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
        v_step := spectrum._run_step(v_run_id, v_step);
    END LOOP;
END
$$;
COMMENT ON PROCEDURE spectrum.run() IS
    'The tick: makes months ahead of need, works on open tasks, processes batches until nothing is '
    'pending or config.run_budget is spent, refreshes the views, cleans up; a commit after each. A '
    'second run at the same time returns at once and says so. Call it outside of a transaction '
    'block.';
