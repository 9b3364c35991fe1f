-- Room 40, the batch: claim, read, add months and dimension members, insert facts, mark. All of it
-- in the caller's transaction, so after a crash every row is either done with its fact or pending
-- as before.
--
-- Order of locks, the same in every worker: raw rows (passing over locked ones), months,
-- dimensions in order of their names, ledger in order of event_id. Before these, advisory ones,
-- in an order that holds for all: run, purge, refresh, batch, forget, horizon, months.

CREATE FUNCTION spectrum._mark_rows()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    -- Most rows became facts: without a join, for four fifths of the price.
    UPDATE @extschema@.raw_events AS raw
    SET status = 'done',
        processed_at = now(),
        error_msg = NULL,
        attempts = raw.attempts + 1,
        next_attempt_at = NULL,
        copy_of = NULL
    WHERE raw.ctid = ANY (ARRAY(
        SELECT batch.row_id FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.copy_of IS NULL
    ));
    IF NOT EXISTS (
        SELECT FROM pg_temp.spectrum_batch AS batch
        WHERE NOT batch.is_readable OR batch.copy_of IS NOT NULL
    ) THEN
        RETURN;
    END IF;

    UPDATE @extschema@.raw_events AS raw
    SET status = CASE WHEN batch.is_readable THEN 'done' ELSE 'failed' END,
        processed_at = now(),
        error_msg = batch.error_msg,
        attempts = raw.attempts + 1,
        next_attempt_at = CASE WHEN batch.can_pass AND raw.attempts + 1 < config.max_attempts
            THEN now() + config.retry_delay * least(2 ^ raw.attempts, 1440)
        END,
        copy_of = batch.copy_of
    FROM pg_temp.spectrum_batch AS batch
    CROSS JOIN spectrum.config
    WHERE raw.ctid = batch.row_id AND (NOT batch.is_readable OR batch.copy_of IS NOT NULL);

    INSERT INTO spectrum.requeue (seq, due_at)
    SELECT batch.seq, marked.next_attempt_at
    FROM pg_temp.spectrum_batch AS batch
    CROSS JOIN LATERAL (
        SELECT raw.next_attempt_at FROM @extschema@.raw_events AS raw
        WHERE raw.seq = batch.seq
        OFFSET 0
    ) AS marked
    WHERE batch.can_pass AND marked.next_attempt_at IS NOT NULL
    ON CONFLICT (seq) DO UPDATE SET due_at = excluded.due_at;
    PERFORM spectrum._scrub_forgotten();
END
$$;
COMMENT ON FUNCTION spectrum._mark_rows() IS
    'Marks the claimed rows done or failed. A failure whose cause can pass is tried again, after '
    'a delay that doubles, up to config.max_attempts.';

CREATE FUNCTION spectrum._count_own_facts()
RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    RETURN (
        SELECT count(*)
        FROM pg_temp.spectrum_batch AS batch
        CROSS JOIN LATERAL (
            SELECT ledger.user_key, ledger.occurred_at, ledger.event_id
            FROM warehouse.event_ledger AS ledger
            WHERE ledger.event_id = batch.event_id AND ledger.seq = batch.seq
            OFFSET 0
        ) AS own
        CROSS JOIN LATERAL (
            SELECT FROM warehouse.fact_events AS known
            WHERE known.user_key = own.user_key AND known.occurred_at = own.occurred_at
                AND known.event_id = own.event_id
            OFFSET 0
        ) AS fact
        WHERE batch.is_readable
    );
END
$$;
COMMENT ON FUNCTION spectrum._count_own_facts() IS
    'How many rows of the batch have a fact of their own by now.';

CREATE FUNCTION spectrum._load_rows(
    p_rows tid[],
    p_is_retry boolean,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_settled bigint;
    r_batch record;
    v_is_refused boolean;
BEGIN
    PERFORM spectrum._read_batch(p_rows);
    v_settled := spectrum._settle_closed();
    SELECT
        p_is_retry OR bool_or(batch.was_read) AS has_reread,
        bool_or(batch.is_readable AND batch.account_key IS NULL) AS has_accounts,
        bool_or(batch.is_readable AND batch.user_key IS NULL) AS has_users,
        bool_or(batch.is_readable AND batch.geo_key IS NULL) AS has_places,
        bool_or(batch.is_readable AND batch.event_type_key IS NULL) AS has_types,
        bool_or(batch.refused_by IS NOT NULL) AS has_refused,
        min(batch.occurred_at) FILTER (WHERE batch.is_readable) AS first_at,
        max(batch.occurred_at) FILTER (WHERE batch.is_readable) AS last_at
    INTO r_batch FROM pg_temp.spectrum_batch AS batch;

    PERFORM spectrum._add_months(r_batch.first_at, r_batch.last_at);
    v_is_refused := r_batch.has_refused;
    IF r_batch.has_accounts THEN
        v_is_refused := spectrum._refuse_newcomers('max_new_accounts') OR v_is_refused;
    END IF;
    IF r_batch.has_types THEN
        v_is_refused := spectrum._refuse_newcomers('max_new_event_types') OR v_is_refused;
    END IF;
    IF r_batch.has_places THEN
        v_is_refused := spectrum._refuse_newcomers('max_new_places') OR v_is_refused;
    END IF;
    IF r_batch.has_accounts OR r_batch.has_users OR r_batch.has_places OR r_batch.has_types THEN
        PERFORM spectrum._add_members();
    END IF;
    IF v_is_refused THEN
        PERFORM spectrum._note_refusals();
    END IF;
    IF r_batch.has_reread THEN
        PERFORM spectrum._withdraw_reread(p_is_retry);
    END IF;
    loaded := spectrum._insert_facts();
    failed := (SELECT count(*) FROM pg_temp.spectrum_batch AS batch WHERE NOT batch.is_readable);
    duplicates := v_settled;
    IF loaded + failed + v_settled < cardinality(p_rows) THEN
        loaded := loaded + spectrum._take_over();
        duplicates := v_settled + spectrum._name_copies();
    END IF;
    IF loaded + duplicates + failed <> cardinality(p_rows) THEN
        RAISE EXCEPTION 'the event is neither a fact nor a copy: another worker changed what it '
            'repeats'
            USING
                ERRCODE = 'triggered_data_change_violation',
                -- Rows that were read before, and do not say so: once more, as such.
                CONSTRAINT = CASE WHEN NOT p_is_retry AND spectrum._count_own_facts() > loaded
                    THEN 'event_ledger_pkey' ELSE '' END;
    END IF;
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._load_rows(tid[], boolean) IS
    'Takes claimed rows all the way, set by set, and counts what became of them. Raises 27000 '
    'rather than leave one out. A retry looks for facts of all rows, whatever their attempts say.';

CREATE FUNCTION spectrum._fail_row(p_row tid, p_reason text, p_can_pass boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._clear_batch();
    BEGIN
        PERFORM spectrum._read_batch(ARRAY[p_row]);
    EXCEPTION
        -- Even its reading raises.
        WHEN data_exception OR program_limit_exceeded THEN
            INSERT INTO pg_temp.spectrum_batch (row_id, seq, id, event_id)
            SELECT raw.ctid, raw.seq, raw.id, ledger.event_id
            FROM @extschema@.raw_events AS raw
            LEFT JOIN warehouse.event_ledger AS ledger ON raw.attempts > 0 AND ledger.seq = raw.seq
            WHERE raw.ctid = p_row;
            PERFORM spectrum._withhold();
    END;
    IF spectrum._settle_closed() > 0 THEN
        RETURN;
    END IF;
    UPDATE pg_temp.spectrum_batch
    SET is_readable = false,
        error_msg = spectrum._one_line(p_reason),
        can_pass = p_can_pass
    WHERE NOT is_forgotten;
    PERFORM spectrum._withdraw_reread(true);
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._fail_row(tid, text, boolean) IS
    'Marks one claimed row failed, for a reason that only the warehouse found.';

CREATE FUNCTION spectrum._load_patiently(
    p_rows tid[],
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_key text;
BEGIN
    FOR v_try IN 1 .. 3 LOOP
        BEGIN
            SELECT * INTO loaded, duplicates, failed
            FROM spectrum._load_rows(p_rows, v_try > 1);
            RETURN;
        EXCEPTION
            WHEN unique_violation OR triggered_data_change_violation THEN
                -- Of many rows, what is no race for an event_id is found by parts.
                GET STACKED DIAGNOSTICS v_key = CONSTRAINT_NAME;
                IF v_try = 3 OR (cardinality(p_rows) > 1 AND v_key NOT LIKE '%\_pkey') THEN
                    RAISE;
                END IF;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._load_patiently(tid[]) IS
    'Loads claimed rows; looks again where another worker brought the same event_id meanwhile.';

CREATE FUNCTION spectrum._is_refusal(p_state text)
RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT p_state ~ '^(22|23|27|54|P0|[689I-OQ-WYZ])'
$$;
COMMENT ON FUNCTION spectrum._is_refusal(text) IS
    'Whether an error, by its SQLSTATE, is about the rows: data, constraints, limits, what a '
    'trigger raises, in a class of its own too. Not: locks, resources, statements that are wrong.';

CREATE FUNCTION spectrum._load_in_parts(
    p_rows tid[],
    p_is_refused boolean,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint,
    OUT was_refused boolean
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- More would try fewer rows twice, but make more calls: of 4, 8 and 12, 8 cost least.
    v_parts CONSTANT integer := 8;
    v_rows integer := cardinality(p_rows);
    v_state text;
    v_reason text;
    r_part record;
BEGIN
    IF v_rows = 1 OR NOT p_is_refused THEN
        BEGIN
            SELECT * INTO loaded, duplicates, failed FROM spectrum._load_patiently(p_rows);
            was_refused := false;
            RETURN;
        EXCEPTION
            -- What reading could not foresee, say a constraint of the user's own.
            WHEN OTHERS OR assert_failure THEN
                GET STACKED DIAGNOSTICS v_state = RETURNED_SQLSTATE, v_reason = MESSAGE_TEXT;
                IF NOT spectrum._is_refusal(v_state) THEN
                    RAISE;
                END IF;
        END;
    END IF;

    loaded := 0;
    duplicates := 0;
    failed := 0;
    IF v_rows = 1 THEN
        PERFORM spectrum._fail_row(
            p_rows[1], format('%s (SQLSTATE %s)', v_reason, v_state), v_state !~ '^(22|54)'
        );
        failed := 1;
        was_refused := true;
        RETURN;
    END IF;
    was_refused := false;
    FOR v_part IN 0 .. v_parts - 1 LOOP
        CONTINUE WHEN v_rows * v_part / v_parts = v_rows * (v_part + 1) / v_parts;
        -- Where none was refused in the other parts, one is in the last: no use to try it whole.
        r_part := spectrum._load_in_parts(
            p_rows[v_rows * v_part / v_parts + 1 : v_rows * (v_part + 1) / v_parts],
            v_part = v_parts - 1 AND NOT was_refused
        );
        loaded := loaded + r_part.loaded;
        duplicates := duplicates + r_part.duplicates;
        failed := failed + r_part.failed;
        was_refused := was_refused OR r_part.was_refused;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._load_in_parts(tid[], boolean) IS
    'Loads claimed rows of which the warehouse refuses one: divides them until it is found and '
    'fails alone. One such row costs its batch little more than one further pass.';

CREATE FUNCTION spectrum._wait_for_turn(p_is_alone boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Both for as long: a batch that is parted takes its time, and others beside it, which go to
    -- sleep until its transaction ends, could keep it from ever getting there.
    PERFORM spectrum._wait_for_lock('batch', 10, NOT p_is_alone);
EXCEPTION
    -- Then beside the others: a deadlock is the worst that may come of it. It may have come
    -- already: who met rows of an earlier try sleeps until this transaction ends.
    WHEN lock_not_available OR deadlock_detected THEN
        NULL;
END
$$;
COMMENT ON FUNCTION spectrum._wait_for_turn(boolean) IS
    'Lets a batch begin: beside others, or with none other under way; waits for that no longer '
    'than ten times config.lock_timeout.';

CREATE FUNCTION spectrum._wait_for_erasure()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._wait_for_lock('forget', 10, true);
    -- An older snapshot does not show who was forgotten meanwhile: this raises 40001 then.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        PERFORM FROM spectrum.privacy FOR SHARE;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._wait_for_erasure() IS
    'Before a batch claims: a step of forgetting somebody is either over or waits for the batch, '
    'so none takes events in that the other does not see. Raises 55P03 where a transaction left '
    'open in which somebody was forgotten does not end within ten times config.lock_timeout.';

CREATE FUNCTION spectrum._process_batch(
    p_limit integer,
    OUT claimed bigint,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET work_mem = '64MB'
SET datestyle = 'ISO'
SET intervalstyle = 'postgres'
SET enable_seqscan = off
SET enable_memoize = off
AS $$
DECLARE
    v_rows tid[];
    v_is_refused boolean;
BEGIN
    IF p_limit NOT BETWEEN 1 AND 1000000 THEN
        PERFORM spectrum._reject('p_limit', p_limit::text, 'a number from 1 to 1000000');
    END IF;
    -- Rows read again and parts take locks on the ledger out of order: where that led to a
    -- deadlock, or a batch must be parted, all is let go and done again with no other batch beside.
    FOR v_try IN 1 .. 10 LOOP
        BEGIN
            PERFORM spectrum._wait_for_turn(v_try > 1);
            PERFORM spectrum._wait_for_erasure();
            PERFORM spectrum._hold_horizon();
            v_rows := spectrum._claim(
                coalesce(p_limit, (SELECT config.batch_size FROM spectrum.config))
            );
            claimed := cardinality(v_rows);
            loaded := 0;
            duplicates := 0;
            failed := 0;
            IF claimed > 0 AND v_try = 1 THEN
                SELECT * INTO loaded, duplicates, failed FROM spectrum._load_patiently(v_rows);
            ELSIF claimed > 0 THEN
                SELECT parts.loaded, parts.duplicates, parts.failed
                INTO loaded, duplicates, failed
                FROM spectrum._load_in_parts(v_rows, v_is_refused) AS parts;
            END IF;
            RETURN;
        EXCEPTION
            WHEN OTHERS OR assert_failure THEN
                v_is_refused := spectrum._is_refusal(sqlstate);
                IF v_try = 10 OR NOT (v_is_refused OR sqlstate = '40P01') THEN
                    RAISE;
                END IF;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._process_batch(integer) IS
    'One batch: what process_batch and run share. The settings, and subqueries that name the row '
    'they look up, pin every statement below to index look-ups: right for a batch whatever the '
    'size of the tables, while statistics of tables that fill and drain mislead.';
