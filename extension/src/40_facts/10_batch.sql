-- Room 40, the batch: claim, read, add months and dimension members, insert facts, mark. All of it
-- in the caller's transaction, so after a crash every row is either done with its fact or pending
-- as before. pg_temp.spectrum_batch holds what was read of the claimed rows between the steps.
--
-- Order of locks, the same in every worker: raw rows (passing over locked ones), months,
-- dimensions in order of their names, ledger in order of event_id.

CREATE FUNCTION spectrum._read_batch(p_rows tid[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    IF to_regclass('pg_temp.spectrum_batch') IS NULL THEN
        CREATE TEMPORARY TABLE spectrum_batch (
            row_id tid,
            seq bigint,
            id uuid,
            event_id uuid,
            occurred_at timestamptz,
            event_type text,
            account_id text,
            user_id text,
            country text,
            region text,
            city text,
            account_key bigint,
            user_key bigint,
            geo_key integer,
            event_type_key integer,
            properties jsonb,
            revenue numeric,
            currency text,
            is_readable boolean,
            is_first boolean NOT NULL DEFAULT true,
            was_read boolean,
            can_pass boolean NOT NULL DEFAULT false,
            error_msg text,
            copy_of uuid
        ) ON COMMIT DELETE ROWS;
    END IF;
    DELETE FROM pg_temp.spectrum_batch;
    INSERT INTO pg_temp.spectrum_batch (
        row_id, seq, id, event_id, occurred_at, event_type, account_id, user_id,
        country, region, city, account_key, user_key, geo_key, event_type_key,
        properties, revenue, currency, is_readable, was_read, error_msg
    )
    SELECT
        reading.row_id, reading.seq, reading.id, reading.event_id, reading.occurred_at,
        reading.event_type, reading.account_id, reading.user_id,
        reading.country, reading.region, reading.city,
        accounts.account_key, users.user_key, geography.geo_key, event_types.event_type_key,
        reading.properties, reading.revenue, reading.currency,
        reading.error_msg IS NULL, reading.attempts > 0, reading.error_msg
    FROM spectrum.readings AS reading
    LEFT JOIN warehouse.dim_accounts AS accounts USING (account_id)
    LEFT JOIN warehouse.dim_users AS users USING (user_id)
    LEFT JOIN warehouse.dim_geography AS geography USING (country, region, city)
    LEFT JOIN warehouse.dim_event_types AS event_types USING (event_type)
    WHERE reading.row_id = ANY (p_rows);
END
$$;
COMMENT ON FUNCTION spectrum._read_batch(tid[]) IS
    'Reads the claimed rows into pg_temp.spectrum_batch, with the keys of the members known.';

CREATE FUNCTION spectrum._find_firsts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE pg_temp.spectrum_batch AS batch
    SET is_first = false
    FROM (
        SELECT repeated.event_id, min(repeated.seq) AS seq
        FROM pg_temp.spectrum_batch AS repeated
        WHERE repeated.is_readable
        GROUP BY repeated.event_id
        HAVING count(*) > 1
    ) AS firsts
    WHERE batch.event_id = firsts.event_id AND batch.seq > firsts.seq;
END
$$;
COMMENT ON FUNCTION spectrum._find_firsts() IS
    'Of rows with one event_id inside the batch, only the first received may become a fact.';

CREATE FUNCTION spectrum._add_months(p_from timestamptz, p_to timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_month date;
    v_span tstzrange;
BEGIN
    FOR v_month IN
        SELECT month::date FROM spectrum._months(p_from, p_to) AS month
        WHERE to_regclass('warehouse.' || spectrum._month_name(month)) IS NULL
    LOOP
        v_span := tstzrange(
            v_month::timestamp AT TIME ZONE 'UTC', (v_month + interval '1 month') AT TIME ZONE 'UTC'
        );
        CONTINUE WHEN NOT EXISTS (
            SELECT FROM pg_temp.spectrum_batch AS batch
            WHERE batch.is_readable AND batch.occurred_at <@ v_span
        );
        BEGIN
            PERFORM spectrum._add_month(v_month);
        EXCEPTION
            WHEN lock_not_available THEN
                UPDATE pg_temp.spectrum_batch AS batch
                SET is_readable = false,
                    error_msg = format('occurred_at: the partition of %s could not be made within '
                        'config.lock_timeout, another session holds a lock',
                        to_char(v_month, 'YYYY-MM')),
                    can_pass = true
                WHERE batch.is_readable AND batch.occurred_at <@ v_span;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._add_months(timestamptz, timestamptz) IS
    'Makes the months that events of the batch, all between two times, need. A month that another '
    'session locks out fails its events for now; they are tried again.';

CREATE FUNCTION spectrum._withdraw(p_event_ids uuid[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    WITH entries AS (
        DELETE FROM warehouse.event_ledger AS ledger
        WHERE ledger.event_id = ANY (p_event_ids)
        RETURNING ledger.event_id, ledger.occurred_at, ledger.user_key
    ), facts AS (
        DELETE FROM warehouse.fact_events AS fact
        USING entries
        WHERE fact.user_key = entries.user_key
            AND fact.occurred_at = entries.occurred_at
            AND fact.event_id = entries.event_id
        RETURNING fact.user_key, fact.account_key, fact.event_type_key, fact.geo_key,
            fact.occurred_at
    )
    INSERT INTO spectrum.touched (
        user_key, account_key, event_type_key, geo_key, first_at, last_at
    )
    SELECT facts.user_key, facts.account_key, facts.event_type_key, facts.geo_key,
        min(facts.occurred_at), max(facts.occurred_at)
    FROM facts
    GROUP BY GROUPING SETS (
        (facts.user_key), (facts.account_key), (facts.event_type_key), (facts.geo_key)
    );
END
$$;
COMMENT ON FUNCTION spectrum._withdraw(uuid[]) IS
    'Takes facts back, with their ledger entries, so that they can be made again or not at all.';

CREATE FUNCTION spectrum._insert_facts()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_loaded bigint;
BEGIN
    WITH new_facts AS MATERIALIZED (
        SELECT
            batch.event_id, batch.seq, batch.occurred_at, batch.properties, batch.revenue,
            batch.currency,
            coalesce(batch.account_key, (
                SELECT dim.account_key FROM warehouse.dim_accounts AS dim
                WHERE dim.account_id = batch.account_id
            )) AS account_key,
            coalesce(batch.user_key, (
                SELECT dim.user_key FROM warehouse.dim_users AS dim
                WHERE dim.user_id = batch.user_id
            )) AS user_key,
            coalesce(batch.event_type_key, (
                SELECT dim.event_type_key FROM warehouse.dim_event_types AS dim
                WHERE dim.event_type = batch.event_type
            )) AS event_type_key,
            coalesce(batch.geo_key, (
                SELECT dim.geo_key FROM warehouse.dim_geography AS dim
                WHERE dim.country = batch.country AND dim.region = batch.region
                    AND dim.city = batch.city
            )) AS geo_key
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.is_first
            AND NOT EXISTS (
                SELECT FROM warehouse.event_ledger AS ledger
                WHERE ledger.event_id = batch.event_id
            )
    ), entries AS (
        INSERT INTO warehouse.event_ledger (event_id, seq, occurred_at, user_key)
        SELECT event_id, seq, occurred_at, user_key FROM new_facts
        ORDER BY event_id
    ), notes AS (
        INSERT INTO spectrum.touched (
            user_key, account_key, event_type_key, geo_key, first_at, last_at
        )
        SELECT user_key, account_key, event_type_key, geo_key, min(occurred_at), max(occurred_at)
        FROM new_facts
        GROUP BY GROUPING SETS ((user_key), (account_key), (event_type_key), (geo_key))
    )
    INSERT INTO warehouse.fact_events (
        event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
        revenue, currency
    )
    SELECT
        event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
        revenue, currency
    FROM new_facts;
    GET DIAGNOSTICS v_loaded = ROW_COUNT;
    RETURN v_loaded;
END
$$;
COMMENT ON FUNCTION spectrum._insert_facts() IS
    'Inserts the batch''s events that the ledger does not know: ledger, facts and the notes of '
    'what they touch. Returns how many.';

CREATE FUNCTION spectrum._withdraw_reread()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_event_ids uuid[];
BEGIN
    SELECT array_agg(ledger.event_id ORDER BY ledger.event_id) INTO v_event_ids
    FROM pg_temp.spectrum_batch AS batch
    JOIN warehouse.event_ledger AS ledger
        ON ledger.event_id = batch.event_id AND ledger.seq = batch.seq
    WHERE batch.was_read;
    IF v_event_ids IS NULL THEN
        RETURN;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids);

    -- Where the row cannot be read any more, a copy of it may step in.
    UPDATE @extschema@.raw_events AS raw SET status = 'pending'
    FROM pg_temp.spectrum_batch AS batch
    WHERE batch.was_read AND NOT batch.is_readable
        AND batch.event_id = ANY (v_event_ids) AND raw.copy_of = batch.id
        AND NOT EXISTS (SELECT FROM pg_temp.spectrum_batch AS own WHERE own.seq = raw.seq);
END
$$;
COMMENT ON FUNCTION spectrum._withdraw_reread() IS
    'A row read again has its own fact made again: takes back the facts of such rows.';

CREATE FUNCTION spectrum._take_over()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_event_ids uuid[];
BEGIN
    -- Rows that were counted although ours, with the same event_id, was received before them.
    WITH later_rows AS (
        SELECT ledger.event_id, ledger.seq, batch.id
        FROM pg_temp.spectrum_batch AS batch
        JOIN warehouse.event_ledger AS ledger
            ON ledger.event_id = batch.event_id AND ledger.seq > batch.seq
        WHERE batch.is_readable AND batch.is_first
    ), copies AS (
        UPDATE @extschema@.raw_events AS raw SET copy_of = later_rows.id
        FROM later_rows
        WHERE raw.seq = later_rows.seq
            AND NOT EXISTS (SELECT FROM pg_temp.spectrum_batch AS own WHERE own.seq = raw.seq)
    )
    SELECT array_agg(later_rows.event_id ORDER BY later_rows.event_id) INTO v_event_ids
    FROM later_rows;
    IF v_event_ids IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids);
    RETURN spectrum._insert_facts();
END
$$;
COMMENT ON FUNCTION spectrum._take_over() IS
    'The first row received counts, whichever worker came first: replaces facts made from a later '
    'copy and returns how many.';

CREATE FUNCTION spectrum._name_copies()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_copies bigint;
BEGIN
    UPDATE pg_temp.spectrum_batch AS batch
    SET copy_of = coalesce(
        (SELECT raw.id FROM @extschema@.raw_events AS raw WHERE raw.seq = ledger.seq),
        ledger.event_id
    )
    FROM warehouse.event_ledger AS ledger
    WHERE batch.is_readable
        AND ledger.event_id = batch.event_id AND ledger.seq <> batch.seq;
    GET DIAGNOSTICS v_copies = ROW_COUNT;
    RETURN v_copies;
END
$$;
COMMENT ON FUNCTION spectrum._name_copies() IS
    'Notes for each copy in the batch which row it repeats (the event_id where that row was '
    'purged), and returns how many there are.';

CREATE FUNCTION spectrum._mark_rows()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
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
    WHERE raw.ctid = batch.row_id;

    INSERT INTO spectrum.requeue (seq, due_at)
    SELECT raw.seq, raw.next_attempt_at
    FROM pg_temp.spectrum_batch AS batch
    JOIN @extschema@.raw_events AS raw USING (seq)
    WHERE batch.can_pass AND raw.next_attempt_at IS NOT NULL
    ON CONFLICT (seq) DO UPDATE SET due_at = excluded.due_at;
END
$$;
COMMENT ON FUNCTION spectrum._mark_rows() IS
    'Marks the claimed rows done or failed. A failure whose cause can pass is tried again, after '
    'a delay that doubles, up to config.max_attempts.';

CREATE FUNCTION spectrum._load_rows(
    p_rows tid[],
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_batch record;
BEGIN
    PERFORM spectrum._read_batch(p_rows);
    SELECT
        bool_or(batch.was_read) AS has_reread,
        bool_or(batch.is_readable AND num_nulls(
            batch.account_key, batch.user_key, batch.geo_key, batch.event_type_key) > 0)
            AS has_newcomers,
        min(batch.occurred_at) FILTER (WHERE batch.is_readable) AS first_at,
        max(batch.occurred_at) FILTER (WHERE batch.is_readable) AS last_at
    INTO r_batch FROM pg_temp.spectrum_batch AS batch;

    PERFORM spectrum._add_months(r_batch.first_at, r_batch.last_at);
    IF r_batch.has_newcomers THEN
        PERFORM spectrum._add_members();
    END IF;
    PERFORM spectrum._find_firsts();
    IF r_batch.has_reread THEN
        PERFORM spectrum._withdraw_reread();
    END IF;
    loaded := spectrum._insert_facts();
    failed := (SELECT count(*) FROM pg_temp.spectrum_batch AS batch WHERE NOT batch.is_readable);
    duplicates := 0;
    IF loaded + failed < cardinality(p_rows) THEN
        loaded := loaded + spectrum._take_over();
        duplicates := spectrum._name_copies();
    END IF;
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._load_rows(tid[]) IS
    'Takes claimed rows all the way, set by set, and counts what became of them.';

CREATE FUNCTION spectrum._fail_row(p_row tid, p_reason text, p_can_pass boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._read_batch(ARRAY[p_row]);
    UPDATE pg_temp.spectrum_batch
    SET is_readable = false,
        error_msg = translate(p_reason, E'\n\r', '  '),
        can_pass = p_can_pass;
    PERFORM spectrum._withdraw_reread();
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._fail_row(tid, text, boolean) IS
    'Marks one claimed row failed, for a reason that only the warehouse found.';

CREATE FUNCTION spectrum._load_safely(
    p_rows tid[],
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_half integer := cardinality(p_rows) / 2;
    v_state text;
    v_reason text;
    r_left record;
    r_right record;
BEGIN
    FOR v_try IN 1 .. 3 LOOP
        BEGIN
            SELECT * INTO loaded, duplicates, failed FROM spectrum._load_rows(p_rows);
            RETURN;
        EXCEPTION
            -- Another worker brought the same event_id at the same moment: look again.
            WHEN unique_violation OR deadlock_detected THEN
                GET STACKED DIAGNOSTICS v_state = RETURNED_SQLSTATE, v_reason = MESSAGE_TEXT;
                IF v_try = 3 AND v_state = '40P01' THEN
                    RAISE;
                END IF;
            -- Something that reading could not foresee, say a constraint of the user's own.
            WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded
                OR raise_exception
            THEN
                GET STACKED DIAGNOSTICS v_state = RETURNED_SQLSTATE, v_reason = MESSAGE_TEXT;
                EXIT;
        END;
    END LOOP;

    IF v_half = 0 THEN
        PERFORM spectrum._fail_row(
            p_rows[1], format('%s (SQLSTATE %s)', v_reason, v_state), v_state ~ '^(23|P0)'
        );
        loaded := 0;
        duplicates := 0;
        failed := 1;
        RETURN;
    END IF;
    r_left := spectrum._load_safely(p_rows[:v_half]);
    r_right := spectrum._load_safely(p_rows[v_half + 1:]);
    loaded := r_left.loaded + r_right.loaded;
    duplicates := r_left.duplicates + r_right.duplicates;
    failed := r_left.failed + r_right.failed;
END
$$;
COMMENT ON FUNCTION spectrum._load_safely(tid[]) IS
    'Loads claimed rows; where a row makes the warehouse refuse the set, halves it until that row '
    'is found and fails alone. One such row costs its batch about two more passes.';

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
SET enable_seqscan = off
SET enable_memoize = off
AS $$
DECLARE
    v_rows tid[];
BEGIN
    IF p_limit NOT BETWEEN 1 AND 1000000 THEN
        PERFORM spectrum._reject('p_limit', p_limit::text, 'a number from 1 to 1000000');
    END IF;
    v_rows := spectrum._claim(
        coalesce(p_limit, (SELECT config.batch_size FROM spectrum.config))
    );
    claimed := cardinality(v_rows);
    IF claimed = 0 THEN
        loaded := 0;
        duplicates := 0;
        failed := 0;
    ELSE
        SELECT * INTO loaded, duplicates, failed FROM spectrum._load_safely(v_rows);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._process_batch(integer) IS
    'One batch: what process_batch and run share. The settings pin every statement below to index '
    'look-ups, which are right for a batch whatever the size of the tables; statistics of tables '
    'that fill and drain are not to be relied on.';
