-- Room 80, purge_raw: raw events that are done may go after a while. Their facts stay, and so do
-- their entries in the ledger: a copy that comes later is still a copy. What goes with them is the
-- way back: they cannot be read again, and nothing can be compared with them.

CREATE FUNCTION spectrum._check_purge_raw(p_arguments jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_arguments(
        p_arguments, '{"older_than": "interval", "failed": "boolean"}'
    );
    PERFORM spectrum._check_age(p_arguments ->> 'older_than');
END
$$;
COMMENT ON FUNCTION spectrum._check_purge_raw(jsonb) IS 'Refuses what purge_raw cannot take.';

CREATE FUNCTION spectrum._first_seq(p_received_at timestamptz)
RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    v_low bigint;
    v_high bigint;
    v_middle bigint;
    r_row record;
BEGIN
    SELECT min(raw.seq), max(raw.seq) + 1 INTO v_low, v_high FROM @extschema@.raw_events AS raw;
    WHILE v_low < v_high LOOP
        v_middle := v_low + (v_high - v_low) / 2;
        SELECT raw.seq, raw.received_at INTO r_row FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= v_middle
        ORDER BY raw.seq
        LIMIT 1;
        IF r_row.received_at < p_received_at THEN
            v_low := r_row.seq + 1;
        ELSE
            v_high := v_middle;
        END IF;
    END LOOP;
    RETURN v_low;
END
$$;
COMMENT ON FUNCTION spectrum._first_seq(timestamptz) IS
    'About the seq from which on raw events were received at or after a time, by halving: the '
    'order of the two differs by the length of inserting transactions. NULL without raw events.';

CREATE FUNCTION spectrum._do_purge_raw(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    r_task record;
    v_before timestamptz;
    v_seqs bigint[];
    v_ids uuid[];
    v_until bigint;
BEGIN
    SELECT task.position, task.done, task.total, task.arguments, task.asked_at INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    v_before := r_task.asked_at - (r_task.arguments ->> 'older_than')::interval;
    -- total is the last seq to look at, less the first: rows that went before leave gaps.
    IF r_task.total IS NULL THEN
        SELECT min(raw.seq) - 1 INTO r_task.position FROM @extschema@.raw_events AS raw;
        r_task.total := coalesce(spectrum._first_seq(v_before) - 1 - r_task.position, 0);
        r_task.position := coalesce(r_task.position, 0);
    END IF;
    SELECT max(chunk.seq), array_agg(chunk.seq) FILTER (WHERE chunk.may_go),
        array_agg(chunk.id) FILTER (WHERE chunk.may_go)
    INTO v_until, v_seqs, v_ids
    FROM (
        SELECT raw.seq, raw.id, raw.received_at < v_before AND (raw.status = 'done'
                OR (raw.status = 'failed' AND raw.next_attempt_at IS NULL
                    AND (r_task.arguments ->> 'failed')::boolean)) AS may_go
        FROM @extschema@.raw_events AS raw
        WHERE raw.seq > r_task.position
            AND raw.seq <= r_task.position + r_task.total - r_task.done
        ORDER BY raw.seq
        LIMIT 20000
    ) AS chunk;

    -- What repeats a row that goes names the event itself from now on.
    UPDATE @extschema@.raw_events AS raw SET copy_of = reading.event_id
    FROM spectrum.readings AS reading
    WHERE raw.copy_of = ANY (v_ids) AND raw.seq <> ALL (v_seqs) AND reading.seq = raw.seq;
    WITH gone AS (
        -- As they are now: one that was set back meanwhile stays.
        DELETE FROM @extschema@.raw_events AS raw
        WHERE raw.seq = ANY (v_seqs) AND raw.status IN ('done', 'failed')
        RETURNING raw.status
    )
    UPDATE spectrum.tasks AS task
    SET position = coalesce(v_until, r_task.position),
        done = CASE WHEN v_until IS NULL THEN r_task.total
            ELSE r_task.done + v_until - r_task.position END,
        total = r_task.total,
        unit = 'places in the receive order',
        outcome = jsonb_build_object(
            'received_before', v_before,
            'deleted', coalesce((task.outcome ->> 'deleted')::bigint, 0)
                + (SELECT count(*) FROM gone)
        )
    WHERE task.task_id = p_task_id;
    RETURN v_until IS NOT NULL;
END
$$;
COMMENT ON FUNCTION spectrum._do_purge_raw(bigint) IS
    'Step of purge_raw: the next 20,000 raw events. Its position is the last seq looked at.';

CREATE PROCEDURE spectrum.purge_raw(
    p_older_than interval,
    p_failed boolean DEFAULT false,
    INOUT deleted bigint DEFAULT NULL
)
LANGUAGE plpgsql
AS $$
BEGIN
    CALL spectrum._carry_out('purge_raw', pg_catalog.jsonb_build_object(
        'older_than', p_older_than, 'failed', p_failed
    ), 'deleted', deleted);
END
$$;
COMMENT ON PROCEDURE spectrum.purge_raw(interval, boolean, bigint) IS
    'Deletes raw events that are done, and failed ones if asked for, received longer ago than '
    'p_older_than, and returns how many. Facts, ledger and every number stay; what is deleted '
    'cannot be read again. Done in steps, a commit after each: call it outside of a transaction '
    'block. config.raw_keep has it done by the runs.';

CREATE FUNCTION spectrum._request_purge_raw()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    v_keep interval := (SELECT config.raw_keep FROM spectrum.config);
BEGIN
    -- A tenth more than is kept, so that it is some purges in that time, not one a run.
    IF v_keep IS NOT NULL
        AND NOT EXISTS (
            SELECT FROM spectrum.tasks AS task
            WHERE task.kind = 'purge_raw' AND task.state IN ('waiting', 'running')
        )
        AND EXISTS (
            SELECT FROM (
                SELECT raw.received_at FROM @extschema@.raw_events AS raw
                WHERE raw.seq > coalesce((
                        SELECT max(task.position) FROM spectrum.tasks AS task
                        WHERE task.kind = 'purge_raw' AND task.state = 'done'
                    ), 0)
                    AND raw.status = 'done'
                ORDER BY raw.seq
                LIMIT 1
            ) AS oldest
            WHERE oldest.received_at < now() - v_keep * 1.1
        )
    THEN
        PERFORM spectrum.request('purge_raw', jsonb_build_object('older_than', v_keep));
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._request_purge_raw() IS
    'Asks for a purge where config.raw_keep is set and older raw events are there.';
