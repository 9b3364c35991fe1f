-- Room 80, reprocess: raw events that are to be read again, with today's rules and settings.

CREATE FUNCTION spectrum._check_reprocess(p_arguments jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_arguments(p_arguments, '{"from": "timestamptz", "to": "timestamptz", '
        '"status": "text", "event_type": "text", "error": "text"}');
    PERFORM spectrum._check_choice(
        'p_status', coalesce(p_arguments ->> 'status', 'failed'), ARRAY['failed', 'done', 'all']
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_reprocess(jsonb) IS 'Refuses what reprocess cannot take.';

CREATE FUNCTION spectrum._do_reprocess(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    r_task record;
    v_until bigint;
    v_rows bigint;
BEGIN
    SELECT task.position, task.total, task.arguments, task.started_at INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    IF r_task.total IS NULL THEN
        SELECT coalesce(min(raw.seq) - 1, 0), coalesce(max(raw.seq), 0)
        INTO r_task.position, r_task.total
        FROM @extschema@.raw_events AS raw;
    END IF;
    SELECT max(chunk.seq), count(*) INTO v_until, v_rows
    FROM (
        SELECT raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.seq > r_task.position AND raw.seq <= r_task.total
        ORDER BY raw.seq
        LIMIT 20000
    ) AS chunk;

    WITH set_back AS (
        UPDATE @extschema@.raw_events AS raw
        SET status = 'pending'
        WHERE raw.seq > r_task.position AND raw.seq <= v_until
            AND raw.status IN ('failed', 'done')
            AND coalesce(r_task.arguments ->> 'status', 'failed') IN ('all', raw.status)
            AND raw.received_at >= coalesce((r_task.arguments ->> 'from')::timestamptz, '-infinity')
            AND raw.received_at < coalesce((r_task.arguments ->> 'to')::timestamptz, 'infinity')
            AND (NOT r_task.arguments ? 'event_type'
                OR raw.payload ->> 'event_type' = r_task.arguments ->> 'event_type')
            AND (NOT r_task.arguments ? 'error' OR raw.error_msg LIKE r_task.arguments ->> 'error')
        RETURNING raw.seq
    )
    UPDATE spectrum.tasks AS task
    SET position = coalesce(v_until, r_task.total),
        done = task.done + v_rows,
        total = r_task.total,
        unit = 'raw events',
        outcome = jsonb_build_object('requeued',
            coalesce((task.outcome ->> 'requeued')::bigint, 0) + (SELECT count(*) FROM set_back))
    WHERE task.task_id = p_task_id;
    RETURN coalesce(v_until < r_task.total, false);
END
$$;
COMMENT ON FUNCTION spectrum._do_reprocess(bigint) IS
    'Step of reprocess: the next 20,000 raw events. Its position is the last seq looked at.';

CREATE PROCEDURE spectrum.reprocess(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_status text DEFAULT 'failed',
    p_event_type text DEFAULT NULL,
    p_error text DEFAULT NULL,
    INOUT requeued bigint DEFAULT NULL
)
LANGUAGE plpgsql
AS $$
BEGIN
    CALL spectrum._carry_out('reprocess', pg_catalog.jsonb_build_object(
        'from', p_from, 'to', p_to, 'status', p_status, 'event_type', p_event_type, 'error', p_error
    ), 'requeued', requeued);
END
$$;
COMMENT ON PROCEDURE spectrum.reprocess(timestamptz, timestamptz, text, text, text, bigint) IS
    'Sets raw events back to pending and returns how many: those received in [p_from, p_to), of '
    'status failed (default), done or all, of one event type, with an error_msg LIKE p_error. The '
    'next batches read them again, with today''s rules and settings; nothing is counted twice. '
    'Done in steps, a commit after each: call it outside of a transaction block.';
