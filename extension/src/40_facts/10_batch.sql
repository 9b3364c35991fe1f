-- Room 40, the steps of a batch: read, add months and dimension members, insert facts, take back
-- facts, name copies. pg_temp.spectrum_batch holds what was read of the claimed rows between them.

CREATE FUNCTION spectrum._clear_batch()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_batch',
        'row_id tid, seq bigint, id uuid, event_id uuid, occurred_at timestamptz, event_type '
        'text, account_id text, user_id text, country text, region text, city text, '
        'account_key bigint, user_key bigint, geo_key integer, event_type_key integer, '
        'properties jsonb, revenue numeric, currency text, is_readable boolean, was_read '
        'boolean, can_pass boolean NOT NULL DEFAULT false, error_msg text, copy_of uuid, '
        'refused_by text, is_forgotten boolean NOT NULL DEFAULT false',
        -- A part of a batch that is divided takes less time than its plans.
        200000);
END
$$;
COMMENT ON FUNCTION spectrum._clear_batch() IS
    'Makes the session''s pg_temp.spectrum_batch, or empties it.';

CREATE FUNCTION spectrum._read_batch(p_rows tid[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    PERFORM spectrum._clear_batch();
    INSERT INTO pg_temp.spectrum_batch (
        row_id, seq, id, event_id, occurred_at, event_type, account_id, user_id,
        country, region, city, account_key, user_key, geo_key, event_type_key,
        properties, revenue, currency, is_readable, was_read, error_msg, refused_by
    )
    SELECT
        reading.row_id, reading.seq, reading.id, reading.event_id, reading.occurred_at,
        reading.event_type, reading.account_id, reading.user_id,
        reading.country, reading.region, reading.city,
        accounts.account_key, users.user_key, geography.geo_key, event_types.event_type_key,
        reading.properties, reading.revenue, reading.currency,
        reading.error_msg IS NULL, reading.attempts > 0, reading.error_msg, reading.refused_by
    -- OFFSET 0: error_msg is looked at twice, and is not to be found out twice.
    FROM (
        SELECT * FROM spectrum.readings AS known WHERE known.row_id = ANY (p_rows) OFFSET 0
    ) AS reading
    LEFT JOIN warehouse.dim_accounts AS accounts USING (account_id)
    LEFT JOIN warehouse.dim_users AS users USING (user_id)
    LEFT JOIN warehouse.dim_geography AS geography USING (country, region, city)
    LEFT JOIN warehouse.dim_event_types AS event_types USING (event_type);
    PERFORM spectrum._withhold();
END
$$;
COMMENT ON FUNCTION spectrum._read_batch(tid[]) IS
    'Reads the claimed rows into pg_temp.spectrum_batch, with the keys of the members known.';

CREATE FUNCTION spectrum._settle_closed()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_open_from timestamptz := (SELECT horizon.open_from FROM spectrum.horizon);
    v_reason text := ': expected ' || spectrum._closed_expectation(v_open_from);
    v_places tid[];
    v_rows tid[];
    v_copies_of uuid[];
BEGIN
    IF v_open_from IS NULL THEN
        RETURN 0;
    END IF;
    SELECT array_agg(batch.ctid), array_agg(batch.row_id), array_agg(
        CASE WHEN ledger.seq <> batch.seq THEN coalesce(
            (SELECT raw.id FROM @extschema@.raw_events AS raw WHERE raw.seq = ledger.seq),
            batch.event_id
        ) END)
    INTO v_places, v_rows, v_copies_of
    FROM pg_temp.spectrum_batch AS batch
    CROSS JOIN LATERAL (
        SELECT known.seq FROM warehouse.event_ledger AS known
        WHERE known.event_id = batch.event_id AND known.occurred_at < v_open_from
        OFFSET 0
    ) AS ledger
    WHERE ledger.seq = batch.seq OR batch.error_msg IS NULL
        OR starts_with(batch.error_msg, 'occurred_at' || v_reason)
        OR starts_with(batch.error_msg, 'timestamp' || v_reason);
    IF v_places IS NULL THEN
        RETURN 0;
    END IF;

    UPDATE @extschema@.raw_events AS raw
    SET status = 'done',
        processed_at = now(),
        error_msg = NULL,
        attempts = raw.attempts + 1,
        next_attempt_at = NULL,
        copy_of = closed.copy_of
    FROM unnest(v_rows, v_copies_of) AS closed (row_id, copy_of)
    WHERE raw.ctid = closed.row_id;
    DELETE FROM pg_temp.spectrum_batch WHERE ctid = ANY (v_places);
    RETURN cardinality(v_places);
END
$$;
COMMENT ON FUNCTION spectrum._settle_closed() IS
    'Rows of the batch whose event is closed (see spectrum.horizon) are done, as they were or as '
    'copies, whatever they say now: takes them out of the batch and returns how many.';

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

CREATE FUNCTION spectrum._withdraw(p_event_ids uuid[], p_seqs bigint[] DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    WITH entries AS (
        DELETE FROM warehouse.event_ledger AS ledger
        WHERE ledger.event_id = ANY (p_event_ids)
            AND (p_seqs IS NULL OR ledger.seq = ANY (p_seqs))
        RETURNING ledger.event_id, ledger.occurred_at, ledger.user_key
    ), facts AS (
        DELETE FROM warehouse.fact_events AS fact
        USING entries
        WHERE fact.user_key = entries.user_key
            AND fact.occurred_at = entries.occurred_at
            AND fact.event_id = entries.event_id
        RETURNING fact.*
    )
    INSERT INTO spectrum.withdrawals (
        note_no, event_id, occurred_at, account_key, user_key, event_type_key, geo_key,
        properties, revenue, currency
    )
    SELECT
        nextval('spectrum.news_note_no_seq'), facts.event_id, facts.occurred_at,
        facts.account_key, facts.user_key, facts.event_type_key, facts.geo_key,
        facts.properties, facts.revenue, facts.currency
    FROM facts;
END
$$;
COMMENT ON FUNCTION spectrum._withdraw(uuid[], bigint[]) IS
    'Takes facts back, with their ledger entries, so that they can be made again or not at all: '
    'where rows are named, only what is theirs, not what another worker has made of an earlier '
    'row meanwhile.';

CREATE FUNCTION spectrum._insert_facts()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_loaded bigint;
    v_events bigint;
BEGIN
    -- Of rows with one event_id inside the batch, only the first received may become a fact. All
    -- is looked up and inserted in the order of the indexes: neighbours meet the same pages.
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
        FROM (
            SELECT DISTINCT ON (readable.event_id) readable.*
            FROM pg_temp.spectrum_batch AS readable
            WHERE readable.is_readable
            ORDER BY readable.event_id, readable.seq
        ) AS batch
        WHERE NOT EXISTS (
            SELECT FROM warehouse.event_ledger AS ledger
            WHERE ledger.event_id = batch.event_id
        )
    ), entries AS (
        INSERT INTO warehouse.event_ledger (event_id, seq, occurred_at, user_key)
        SELECT event_id, seq, occurred_at, user_key FROM new_facts
        ORDER BY event_id
    ), notes AS (
        INSERT INTO spectrum.news (
            events, first_at, last_at, user_keys, occurred_ats, event_ids
        )
        SELECT count(*), min(occurred_at), max(occurred_at), array_agg(user_key),
            array_agg(occurred_at), array_agg(event_id)
        FROM new_facts
        HAVING count(*) > 0
    ), facts AS (
        INSERT INTO warehouse.fact_events (
            event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
            revenue, currency
        )
        SELECT
            event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
            revenue, currency
        FROM new_facts
        ORDER BY user_key, occurred_at, event_id
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM facts), (SELECT count(*) FROM new_facts) INTO v_loaded, v_events;
    IF v_loaded < v_events THEN
        RAISE EXCEPTION 'a trigger on warehouse.fact_events keeps the event out'
            USING ERRCODE = 'triggered_data_change_violation';
    END IF;
    RETURN v_loaded;
END
$$;
COMMENT ON FUNCTION spectrum._insert_facts() IS
    'Inserts the batch''s events that the ledger does not know: ledger, facts and the news of '
    'them. Returns how many; raises 27000 where a trigger of the user''s own keeps one out.';

CREATE FUNCTION spectrum._withdraw_reread(p_is_retry boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_event_ids uuid[];
    v_seqs bigint[];
BEGIN
    -- At once and in order, also what copies repeat, which is locked later: batches of rows that
    -- are read again would wait for each other's events.
    PERFORM FROM warehouse.event_ledger AS ledger
    WHERE ledger.event_id = ANY (ARRAY(SELECT batch.event_id FROM pg_temp.spectrum_batch AS batch))
    ORDER BY ledger.event_id
    FOR UPDATE;
    SELECT array_agg(batch.event_id ORDER BY batch.event_id), array_agg(batch.seq)
    INTO v_event_ids, v_seqs
    FROM pg_temp.spectrum_batch AS batch
    WHERE (batch.was_read OR p_is_retry) AND batch.seq = (
        SELECT ledger.seq FROM warehouse.event_ledger AS ledger
        WHERE ledger.event_id = batch.event_id
    );
    IF v_event_ids IS NULL THEN
        RETURN;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids, v_seqs);

    -- Where the row cannot be read any more, a copy of it may step in.
    UPDATE @extschema@.raw_events AS raw SET status = 'pending'
    WHERE raw.copy_of = ANY (ARRAY(
            SELECT batch.id FROM pg_temp.spectrum_batch AS batch
            WHERE NOT batch.is_readable AND batch.event_id = ANY (v_event_ids)
        ))
        AND raw.status = 'done';
END
$$;
COMMENT ON FUNCTION spectrum._withdraw_reread(boolean) IS
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
    v_first_ids uuid[];
    v_later_seqs bigint[];
BEGIN
    -- Events that count by a row received after ours.
    SELECT array_agg(first.event_id), array_agg(first.id), array_agg(ledger.seq)
    INTO v_event_ids, v_first_ids, v_later_seqs
    FROM (
        SELECT DISTINCT ON (batch.event_id) batch.event_id, batch.id, batch.seq
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable
        ORDER BY batch.event_id, batch.seq
    ) AS first
    CROSS JOIN LATERAL (
        SELECT known.seq FROM warehouse.event_ledger AS known
        WHERE known.event_id = first.event_id
        OFFSET 0
    ) AS ledger
    WHERE ledger.seq > first.seq;
    IF v_event_ids IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids, v_later_seqs);

    -- That row and its copies are copies of ours from now on; what is not done will find out.
    UPDATE @extschema@.raw_events AS raw SET copy_of = later.first_id
    FROM (
        SELECT owner.id, unnested.first_id
        FROM unnest(v_later_seqs, v_first_ids) AS unnested (seq, first_id)
        JOIN @extschema@.raw_events AS owner USING (seq)
    ) AS later
    WHERE (raw.id = later.id OR raw.copy_of = later.id) AND raw.status = 'done';
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
AS $$
DECLARE
    v_copies bigint;
BEGIN
    -- What a copy repeats must stay: until commit no other worker takes it back.
    UPDATE pg_temp.spectrum_batch AS batch
    SET copy_of = coalesce(
        (SELECT raw.id FROM @extschema@.raw_events AS raw WHERE raw.seq = copies.first_seq),
        batch.event_id
    )
    FROM (
        SELECT events.seq, ledger.seq AS first_seq
        FROM (
            SELECT readable.event_id, readable.seq FROM pg_temp.spectrum_batch AS readable
            WHERE readable.is_readable
            ORDER BY readable.event_id
        ) AS events
        CROSS JOIN LATERAL (
            SELECT known.seq FROM warehouse.event_ledger AS known
            WHERE known.event_id = events.event_id AND known.seq < events.seq
            FOR KEY SHARE
        ) AS ledger
    ) AS copies
    WHERE batch.seq = copies.seq;
    GET DIAGNOSTICS v_copies = ROW_COUNT;

    -- Whatever was a copy of one of them, while that counted, repeats the same row now.
    UPDATE @extschema@.raw_events AS raw
    SET copy_of = (
        SELECT batch.copy_of FROM pg_temp.spectrum_batch AS batch WHERE batch.id = raw.copy_of
    )
    WHERE raw.copy_of = ANY (ARRAY(
            SELECT batch.id FROM pg_temp.spectrum_batch AS batch WHERE batch.copy_of IS NOT NULL
        ))
        AND raw.status = 'done';
    RETURN v_copies;
END
$$;
COMMENT ON FUNCTION spectrum._name_copies() IS
    'Notes for each copy in the batch which row it repeats (the event_id where that row was '
    'purged), and returns how many there are.';
