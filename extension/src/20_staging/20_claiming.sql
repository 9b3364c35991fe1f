-- Room 20, claiming: which rows a batch takes. A claim locks rows and changes none of them, so a
-- worker that dies leaves them as they were. Rows that another worker holds are passed over.

CREATE FUNCTION spectrum._claim_between(
    p_from bigint,
    p_to bigint,
    p_limit integer,
    p_account_id text DEFAULT NULL,
    OUT row_ids tid[],
    OUT last_seq bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
BEGIN
    -- By way of spectrum.waiting, because rows cannot be locked through it one by one.
    SELECT array_agg(claimed.row_id), max(claimed.seq) INTO row_ids, last_seq
    FROM (
        SELECT raw.ctid AS row_id, raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= p_from AND raw.seq < p_to AND raw.status = 'pending'
            AND (p_account_id IS NULL OR p_account_id = (
                SELECT waiting.account_id FROM spectrum.waiting WHERE waiting.seq = raw.seq))
        ORDER BY raw.seq
        LIMIT p_limit
        FOR UPDATE SKIP LOCKED
    ) AS claimed;
    row_ids := coalesce(row_ids, '{}'::tid[]);
END
$$;
COMMENT ON FUNCTION spectrum._claim_between(bigint, bigint, integer, text) IS
    'Locks at most p_limit pending rows with p_from <= seq < p_to, of one account if p_account_id '
    'names it as spectrum.waiting does (empty: without one), in receive order. The plan is pinned '
    'to the index on seq: statistics of a table that fills and drains are of no use.';

CREATE FUNCTION spectrum._claim_requeued(p_limit integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
DECLARE
    v_seqs bigint[];
    v_rows tid[];
BEGIN
    -- The raw row first, then its entry, as in an UPDATE that sets a row back: whoever has locked
    -- the row owns the entry. A row that is done, say by an outside worker, needs none any more.
    WITH reachable AS MATERIALIZED (
        SELECT requeue.seq, found.row_id, found.is_open
        FROM spectrum.requeue
        CROSS JOIN LATERAL (
            SELECT
                raw.ctid AS row_id,
                raw.status IN ('pending', 'processing') OR raw.next_attempt_at <= now()
                    AS is_open
            FROM @extschema@.raw_events AS raw
            WHERE raw.seq = requeue.seq
            FOR UPDATE SKIP LOCKED
        ) AS found
        WHERE requeue.due_at <= now()
        ORDER BY requeue.seq
        LIMIT p_limit
    )
    SELECT
        array_agg(reachable.seq),
        array_agg(reachable.row_id ORDER BY reachable.seq) FILTER (WHERE reachable.is_open)
    INTO v_seqs, v_rows FROM reachable;
    DELETE FROM spectrum.requeue WHERE requeue.seq = ANY (v_seqs);
    RETURN coalesce(v_rows, '{}'::tid[]);
END
$$;
COMMENT ON FUNCTION spectrum._claim_requeued(integer) IS
    'Locks at most p_limit rows whose turn in spectrum.requeue has come and takes them off it.';

CREATE FUNCTION spectrum._claim(p_limit integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rows tid[] := spectrum._claim_requeued(p_limit);
    v_may_repeat boolean := cardinality(v_rows) > 0;
    v_claimed tid[];
    v_is_fair boolean := false;
    r_intake record;
    r_claim record;
BEGIN
    IF cardinality(v_rows) < p_limit THEN
        v_claimed := spectrum._claim_fairly(p_limit - cardinality(v_rows));
        v_is_fair := v_claimed <> '{}';
        v_rows := v_rows || v_claimed;
    END IF;
    SELECT intake.head_seq, intake.safe_seq INTO r_intake FROM spectrum.intake;

    IF cardinality(v_rows) < p_limit THEN
        r_claim := spectrum._claim_between(
            r_intake.head_seq, 9223372036854775807, p_limit - cardinality(v_rows)
        );
        v_rows := v_rows || r_claim.row_ids;
        PERFORM spectrum._advance_head(r_claim.last_seq + 1);
    END IF;

    IF cardinality(v_rows) < p_limit AND EXISTS (SELECT FROM spectrum.floods) THEN
        v_rows := v_rows || spectrum._claim_left_behind(p_limit - cardinality(v_rows), false);
        v_may_repeat := true;
    ELSIF cardinality(v_rows) < p_limit THEN
        v_may_repeat := v_may_repeat OR v_is_fair;
        r_claim := spectrum._claim_between(
            r_intake.safe_seq, r_intake.head_seq, p_limit - cardinality(v_rows)
        );
        v_rows := v_rows || r_claim.row_ids;
        PERFORM spectrum._advance_safe();
    END IF;
    IF v_may_repeat THEN
        -- One's own locks are not skipped: a row that was due again, or was taken in front of a
        -- flood, is met a second time.
        v_rows := ARRAY(SELECT DISTINCT row_id FROM unnest(v_rows) AS row_id ORDER BY row_id);
    END IF;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._claim(integer) IS
    'Locks the rows of one batch and returns their places: first what is due again, then from the '
    'head on (during a flood both in front of and behind it), and when the head is drained what '
    'was left behind it.';

CREATE FUNCTION spectrum._advance_head(p_seq bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_seq IS NULL THEN
        RETURN;
    END IF;
    -- Whoever holds the row is moving the mark himself; never wait for him.
    PERFORM FROM spectrum.intake WHERE intake.head_seq < p_seq FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        UPDATE spectrum.intake SET head_seq = p_seq;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._advance_head(bigint) IS
    'Moves the mark where claims begin forward, unless another worker is doing so.';

CREATE FUNCTION spectrum._writers()
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Whoever has drawn a number below the head, and cannot be seen yet, holds this lock by now.
    -- Transaction ids would not do: they are drawn later, and not in the order of the numbers.
    RETURN (
        SELECT coalesce(array_agg(DISTINCT writer.virtualtransaction), '{}')
        FROM pg_locks AS writer
        WHERE writer.locktype = 'relation' AND writer.mode = 'RowExclusiveLock'
            AND writer.relation = '@extschema@.raw_events'::regclass
            AND writer.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND writer.pid IS DISTINCT FROM pg_backend_pid()
    );
END
$$;
COMMENT ON FUNCTION spectrum._writers() IS
    'The transactions of others that are writing to raw_events.';

CREATE FUNCTION spectrum._advance_safe()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    r_intake record;
    v_writers text[];
BEGIN
    SELECT intake.head_seq, intake.safe_seq, intake.seen_seq, intake.seen_writers INTO r_intake
    FROM spectrum.intake
    FOR UPDATE SKIP LOCKED;
    -- A snapshot that is older than this statement may miss what was written meanwhile.
    IF NOT FOUND OR r_intake.safe_seq = r_intake.head_seq
        OR current_setting('transaction_isolation') <> 'read committed'
    THEN
        RETURN;
    END IF;

    v_writers := spectrum._writers();
    IF r_intake.seen_writers IS NULL THEN
        UPDATE spectrum.intake SET seen_seq = intake.head_seq, seen_writers = v_writers;
    ELSIF NOT r_intake.seen_writers && v_writers AND NOT EXISTS (
        SELECT FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= r_intake.safe_seq AND raw.seq < r_intake.seen_seq
            AND raw.status = 'pending'
    ) THEN
        UPDATE spectrum.intake
        SET safe_seq = intake.seen_seq,
            seen_seq = intake.head_seq,
            seen_writers = v_writers;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._advance_safe() IS
    'Moves the mark below which nothing is pending: up to where the head stood earlier, once '
    'nothing is pending there and all who were writing to raw_events at that time have ended.';

CREATE FUNCTION spectrum._patrol(p_rows bigint DEFAULT 100000)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    r_intake record;
    v_from bigint;
    v_found bigint;
BEGIN
    SELECT intake.patrol_seq, intake.safe_seq INTO r_intake FROM spectrum.intake
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    v_from := CASE WHEN r_intake.patrol_seq < r_intake.safe_seq THEN r_intake.patrol_seq ELSE 0 END;
    INSERT INTO spectrum.requeue (seq, due_at)
    SELECT
        raw.seq,
        CASE raw.status WHEN 'pending' THEN now() ELSE now() + config.processing_lease END
    FROM @extschema@.raw_events AS raw
    CROSS JOIN spectrum.config
    WHERE raw.seq >= v_from AND raw.seq < least(v_from + p_rows, r_intake.safe_seq)
        AND raw.status IN ('pending', 'processing')
    ON CONFLICT (seq) DO NOTHING;
    GET DIAGNOSTICS v_found = ROW_COUNT;
    UPDATE spectrum.intake SET patrol_seq = v_from + p_rows;
    DELETE FROM spectrum.requeue
    WHERE requeue.due_at <= now()
        AND NOT EXISTS (SELECT FROM @extschema@.raw_events AS raw WHERE raw.seq = requeue.seq);
    RETURN v_found;
END
$$;
COMMENT ON FUNCTION spectrum._patrol(bigint) IS
    'Looks at the next p_rows of raw_events below the safe mark, round and round, and requeues '
    'what is open there. It finds what neither marks nor trigger can see: rows inserted as '
    'processing, rows set back while triggers were off.';
