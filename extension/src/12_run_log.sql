-- Room 12: the run log. A row per run, per step of a run and per batch: what, how many, how long,
-- and the error where there was one. Written by rooms 40 to 80, read by people and dashboards.

CREATE FUNCTION spectrum._create_run_log()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.run_log') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.run_log (
        log_id bigserial NOT NULL CONSTRAINT run_log_pkey PRIMARY KEY,
        run_id bigint,
        step text NOT NULL CONSTRAINT run_log_step_is_known
            CHECK (step IN ('run', 'provision', 'tasks', 'process', 'refresh', 'upkeep')),
        started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        finished_at timestamptz,
        claimed bigint,
        loaded bigint,
        duplicates bigint,
        failed bigint,
        detail text,
        error_msg text
    );
    CREATE INDEX run_log_run_idx ON spectrum.run_log (run_id, log_id);
    COMMENT ON TABLE spectrum.run_log IS
        'What ran: a row per run, per step of it and per batch; also batches called by hand.';
    COMMENT ON COLUMN spectrum.run_log.log_id IS 'Ascending in the order of begin.';
    COMMENT ON COLUMN spectrum.run_log.run_id IS
        'log_id of the run that the step belongs to; NULL where it was called by hand.';
    COMMENT ON COLUMN spectrum.run_log.step IS
        'run (the whole), provision, tasks (a step of one), process (one batch), refresh or '
        'upkeep.';
    COMMENT ON COLUMN spectrum.run_log.started_at IS 'Wall clock.';
    COMMENT ON COLUMN spectrum.run_log.finished_at IS
        'Wall clock; NULL while under way, and for ever if the server stopped meanwhile.';
    COMMENT ON COLUMN spectrum.run_log.claimed IS 'Rows of raw_events taken.';
    COMMENT ON COLUMN spectrum.run_log.loaded IS 'Facts made of them.';
    COMMENT ON COLUMN spectrum.run_log.duplicates IS 'Copies of events known already.';
    COMMENT ON COLUMN spectrum.run_log.failed IS 'Rows marked failed.';
    COMMENT ON COLUMN spectrum.run_log.detail IS 'What was done, in words.';
    COMMENT ON COLUMN spectrum.run_log.error_msg IS
        'The error that ended the step, with its SQLSTATE; what the step had done was undone.';
END
$$;
COMMENT ON FUNCTION spectrum._create_run_log() IS 'Room 12: makes spectrum.run_log.';

CREATE FUNCTION spectrum._log_step(
    p_run_id bigint,
    p_step text,
    p_started_at timestamptz,
    p_detail text,
    p_error_msg text DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO spectrum.run_log (run_id, step, started_at, finished_at, detail, error_msg)
    VALUES (p_run_id, p_step, p_started_at, clock_timestamp(), p_detail, p_error_msg);
END
$$;
COMMENT ON FUNCTION spectrum._log_step(bigint, text, timestamptz, text, text) IS
    'Writes one step that ended into the run log.';
