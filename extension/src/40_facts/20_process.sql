-- Room 40, the door: process_batch, for anyone who owns the tables.

CREATE FUNCTION spectrum._log_batch(
    p_run_id bigint,
    p_limit integer,
    OUT claimed bigint,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
BEGIN
    SELECT batch.claimed, batch.loaded, batch.duplicates, batch.failed
    INTO claimed, loaded, duplicates, failed
    FROM spectrum._process_batch(p_limit) AS batch;
    IF claimed > 0 THEN
        INSERT INTO spectrum.run_log (
            run_id, step, started_at, finished_at, claimed, loaded, duplicates, failed
        ) VALUES (
            p_run_id, 'process', v_started_at, clock_timestamp(),
            _log_batch.claimed, _log_batch.loaded, _log_batch.duplicates, _log_batch.failed
        );
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._log_batch(bigint, integer) IS
    'One batch and its row in the run log; an idle one leaves none.';

CREATE PROCEDURE spectrum.process_batch(
    p_limit integer DEFAULT NULL,
    INOUT claimed bigint DEFAULT NULL,
    INOUT loaded bigint DEFAULT NULL,
    INOUT duplicates bigint DEFAULT NULL,
    INOUT failed bigint DEFAULT NULL
)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._require_primary();
    SELECT batch.claimed, batch.loaded, batch.duplicates, batch.failed
    INTO claimed, loaded, duplicates, failed
    FROM spectrum._log_batch(NULL, p_limit) AS batch;
END
$$;
COMMENT ON PROCEDURE spectrum.process_batch(integer, bigint, bigint, bigint, bigint) IS
    'Takes up to p_limit pending events (default config.batch_size) into the warehouse, in the '
    'caller''s transaction, and returns how many it claimed, loaded, found to be copies, failed. '
    'Any number of sessions may call it at once.';
