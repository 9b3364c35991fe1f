-- Room 80, erasure: forget_user, step by step. Each step is whole in itself: it takes raw events
-- out together with the facts made of them, has the standing views follow, and writes down by how
-- much. From the first step on no batch takes events of the user in; so what is found goes, and
-- nothing comes after.
--
--   begin    from here on he is kept out
--   count    the views are brought up to the facts, so that what changes later is his doing
--   events   his facts, 10,000 a step (anonymise: all in one), with their raw events
--   rows     a look at every raw event, 50,000 a step: what failed, waits, or repeats others
--   entries  a look at the ledger, 1,000 pages a step: his events whose facts were purged
--   settle   refreshes until no table of a former report is left
--   end      his name goes, and what else holds a trace
-- Anonymise looks at the rows first, because names change all at once.

CREATE FUNCTION spectrum._user_keys(p_names text[])
RETURNS bigint[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(SELECT dim.user_key FROM warehouse.dim_users AS dim
        WHERE dim.user_id = ANY (p_names) AND dim.user_key <> 0 ORDER BY dim.user_key);
END
$$;
COMMENT ON FUNCTION spectrum._user_keys(text[]) IS 'The members of dim_users of these names.';

CREATE FUNCTION spectrum._erasure(
    p_task_id bigint,
    OUT names text[],
    OUT user_keys bigint[],
    OUT is_whole boolean,
    OUT anonymises boolean,
    OUT event_type text,
    OUT from_at timestamptz,
    OUT to_at timestamptz,
    OUT properties text[],
    OUT phase text,
    OUT looked_to bigint,
    OUT total bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT spectrum._user_names(task.arguments ->> 'user_id'),
        ARRAY(
            SELECT key::bigint FROM jsonb_array_elements_text(task.outcome -> 'user_keys') AS key
        ),
        NOT task.arguments ?| '{event_type, from, to}',
        task.arguments ->> 'mode' IS NOT DISTINCT FROM 'anonymise',
        task.arguments ->> 'event_type',
        coalesce((task.arguments ->> 'from')::timestamptz, '-infinity'),
        coalesce((task.arguments ->> 'to')::timestamptz, 'infinity'),
        -- A hash that rules make of a property still tells people apart.
        ARRAY(SELECT jsonb_array_elements_text(task.arguments -> 'properties')
            UNION SELECT split_part(rule.field, '.', 2) FROM spectrum.pii_rules AS rule
            WHERE rule.field LIKE 'properties.%' AND rule.rule = 'hmac'),
        coalesce(task.outcome ->> 'phase', 'begin'), task.position, task.total
    INTO names, user_keys, is_whole, anonymises, event_type, from_at, to_at, properties, phase,
        looked_to, total
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
END
$$;
COMMENT ON FUNCTION spectrum._erasure(bigint) IS
    'What a task forget_user is to do, and where it is.';

CREATE FUNCTION spectrum._keep_batches_out()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'in a transaction of isolation % the latest facts would not be seen',
            current_setting('transaction_isolation')
            USING ERRCODE = 'invalid_transaction_state',
                HINT = 'Call it in a transaction of isolation read committed.';
    END IF;
    -- First of all, so that who holds refreshes up does not hold up batches.
    PERFORM spectrum._wait_for_reports();
    PERFORM spectrum._wait_for_lock('forget', 1, false);
END
$$;
COMMENT ON FUNCTION spectrum._keep_batches_out() IS
    'Waits for a refresh under way, then for the batches, no longer than config.lock_timeout, and '
    'has others wait until this transaction ends: what one side takes in, the other would not see.';

CREATE FUNCTION spectrum._do_forget_user(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_phases text[] := CASE WHEN r_erasure.anonymises
        THEN '{begin, count, rows, events, settle, end}'::text[]
        ELSE '{begin, count, events, rows, entries, settle, end}'::text[] END;
    v_is_over boolean := true;
BEGIN
    IF r_erasure.phase IN ('count', 'settle') THEN
        PERFORM spectrum._wait_for_reports();
        v_is_over := (SELECT NOT step.has_more FROM spectrum._refresh_some(200000) AS step);
    ELSE
        PERFORM spectrum._keep_batches_out();
        IF r_erasure.phase = 'begin' THEN
            PERFORM spectrum._begin_erasure(p_task_id);
        ELSIF r_erasure.phase = 'events' AND r_erasure.anonymises THEN
            PERFORM spectrum._anonymise_events(p_task_id);
        ELSIF r_erasure.phase = 'events' THEN
            v_is_over := NOT spectrum._erase_events(p_task_id);
        ELSIF r_erasure.phase = 'rows' THEN
            v_is_over := NOT spectrum._erase_rows(p_task_id);
        ELSIF r_erasure.phase = 'entries' THEN
            v_is_over := NOT spectrum._erase_entries(p_task_id);
        ELSE
            PERFORM spectrum._end_erasure(p_task_id);
            RETURN false;
        END IF;
    END IF;
    IF v_is_over THEN
        IF r_erasure.phase = 'count' THEN
            PERFORM spectrum._note_state(p_task_id, r_erasure.user_keys, 1);
        ELSIF r_erasure.phase = 'settle' THEN
            PERFORM spectrum._note_state(p_task_id, r_erasure.user_keys, -1);
        END IF;
        UPDATE spectrum.tasks AS task
        SET position = CASE r_erasure.phase WHEN 'rows' THEN 0 ELSE task.position END,
            outcome = task.outcome || jsonb_build_object(
                'phase', v_phases[array_position(v_phases, r_erasure.phase) + 1])
        WHERE task.task_id = p_task_id;
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION spectrum._do_forget_user(bigint) IS 'Step of forget_user.';

CREATE FUNCTION spectrum._begin_erasure(p_task_id bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
BEGIN
    IF NOT EXISTS (SELECT FROM spectrum.pii_key)
        AND EXISTS (SELECT FROM spectrum.pii_rules WHERE field = 'user_id' AND rule = 'hmac')
    THEN
        RAISE EXCEPTION 'the PII key is missing: the user cannot be found without it'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'SELECT spectrum.set_pii_key(...);';
    END IF;
    UPDATE spectrum.privacy SET forgotten_at = clock_timestamp();
    INSERT INTO spectrum.forgotten (digest, is_whole, event_type, from_at, to_at)
    SELECT wanted.digest, r_erasure.is_whole, r_erasure.event_type, r_erasure.from_at,
        r_erasure.to_at
    FROM (
        SELECT spectrum._digest(known.name) AS digest
        FROM unnest(r_erasure.names) AS known (name)
    ) AS wanted
    WHERE NOT EXISTS (
        SELECT FROM spectrum.forgotten AS known
        WHERE (known.digest, known.is_whole, known.event_type, known.from_at, known.to_at)
            IS NOT DISTINCT FROM (wanted.digest, r_erasure.is_whole, r_erasure.event_type,
                r_erasure.from_at, r_erasure.to_at)
    );
    -- What cells that are gone were called stays in no receipt, also of what was not finished.
    PERFORM spectrum._close_receipt(task.task_id)
    FROM spectrum.tasks AS task
    WHERE task.kind = 'forget_user' AND task.state IN ('failed', 'cancelled')
        AND EXISTS (SELECT FROM spectrum.receipts WHERE receipts.task_id = task.task_id);
    UPDATE spectrum.tasks AS task
    SET outcome = jsonb_build_object('user_keys', to_jsonb(spectrum._user_keys(r_erasure.names))),
        position = coalesce((SELECT min(raw.seq) - 1 FROM @extschema@.raw_events AS raw), 0),
        total = coalesce((SELECT max(raw.seq) FROM @extschema@.raw_events AS raw), 0),
        unit = 'raw events'
    WHERE task.task_id = p_task_id;
END
$$;
COMMENT ON FUNCTION spectrum._begin_erasure(bigint) IS
    'First step of forget_user: from its commit on, no batch takes events of the user in.';

CREATE FUNCTION spectrum._erase_events(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_event_ids uuid[];
    v_seqs bigint[];
BEGIN
    SELECT array_agg(found.event_id ORDER BY found.event_id), array_agg(ledger.seq)
    INTO v_event_ids, v_seqs
    FROM (
        SELECT fact.event_id FROM warehouse.fact_events AS fact
        WHERE fact.user_key = ANY (r_erasure.user_keys)
            AND fact.occurred_at >= r_erasure.from_at AND fact.occurred_at < r_erasure.to_at
            AND (r_erasure.event_type IS NULL
                OR fact.event_type_key = analytics._event_key(r_erasure.event_type))
        LIMIT 10000
    ) AS found
    CROSS JOIN LATERAL (
        SELECT known.seq FROM warehouse.event_ledger AS known
        WHERE known.event_id = found.event_id
        OFFSET 0
    ) AS ledger;
    IF v_event_ids IS NULL THEN
        PERFORM spectrum._erase_packed(p_task_id);
        RETURN false;
    END IF;
    PERFORM spectrum._erase(p_task_id, v_event_ids, v_seqs);
    RETURN true;
END
$$;
COMMENT ON FUNCTION spectrum._erase_events(bigint) IS
    'Step of forget_user: his next facts and their raw events; where there are none, what is '
    'packed, and false.';

CREATE FUNCTION spectrum._erase_rows(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_facts_from timestamptz := spectrum._facts_from();
    v_until bigint;
    v_looked bigint;
    v_event_ids uuid[];
    v_seqs bigint[];
    v_nameless bigint[];
    v_nameless_ids uuid[];
BEGIN
    SELECT max(chunk.seq), count(*) INTO v_until, v_looked
    FROM (
        SELECT raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.seq > r_erasure.looked_to AND raw.seq <= r_erasure.total
        ORDER BY raw.seq
        LIMIT 50000
    ) AS chunk;
    IF v_until IS NULL THEN
        RETURN false;
    END IF;

    -- A batch that holds one of them is waited for here, and looked at afterwards.
    v_seqs := ARRAY(
        SELECT raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.seq > r_erasure.looked_to AND raw.seq <= v_until
            AND raw.payload ->> 'user_id' = ANY (r_erasure.names)
        ORDER BY raw.seq
        FOR UPDATE
    );
    WITH found AS MATERIALIZED (
        SELECT reading.seq, ledger.event_id,
            r_erasure.anonymises AND (ledger.user_key <> ALL (r_erasure.user_keys)
                OR ledger.occurred_at < v_facts_from) AS is_nameless
        FROM unnest(v_seqs) AS wanted (seq)
        CROSS JOIN LATERAL (
            SELECT known.seq, known.event_id, known.event_type, known.occurred_at
            FROM spectrum.readings AS known WHERE known.seq = wanted.seq
            OFFSET 0
        ) AS reading
        LEFT JOIN LATERAL (
            SELECT known.event_id, known.user_key, known.occurred_at
            FROM warehouse.event_ledger AS known
            WHERE known.event_id = reading.event_id AND known.seq = reading.seq
            OFFSET 0
        ) AS ledger ON true
        WHERE r_erasure.is_whole OR (
            (r_erasure.event_type IS NULL OR reading.event_type = r_erasure.event_type)
            AND reading.occurred_at >= r_erasure.from_at
            AND reading.occurred_at < r_erasure.to_at)
    )
    SELECT
        array_agg(found.event_id ORDER BY found.event_id) FILTER (
            WHERE found.event_id IS NOT NULL AND NOT r_erasure.anonymises),
        array_agg(found.seq) FILTER (WHERE found.event_id IS NULL OR NOT r_erasure.anonymises),
        array_agg(found.seq ORDER BY found.seq) FILTER (WHERE found.is_nameless),
        array_agg(found.event_id ORDER BY found.seq) FILTER (WHERE found.is_nameless)
    INTO v_event_ids, v_seqs, v_nameless, v_nameless_ids FROM found;
    IF v_seqs IS NOT NULL THEN
        PERFORM spectrum._erase(p_task_id, v_event_ids, v_seqs);
    END IF;
    IF v_nameless IS NOT NULL THEN
        -- They count for the unknown user, because a rule took the name away; or did count for
        -- him, and their facts are purged.
        PERFORM spectrum._rewrite_payloads(p_task_id, v_nameless, v_nameless_ids,
            array_fill(NULL::text, ARRAY[cardinality(v_nameless)]));
    END IF;
    UPDATE spectrum.tasks SET position = v_until, done = done + v_looked WHERE task_id = p_task_id;
    RETURN true;
END
$$;
COMMENT ON FUNCTION spectrum._erase_rows(bigint) IS
    'Step of forget_user: of the next raw events those that name him and do not count, or count '
    'for others; false at the end.';

CREATE FUNCTION spectrum._erase_entries(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_readable_from timestamptz := spectrum._readable_from();
    v_event_ids uuid[];
    v_seqs bigint[];
BEGIN
    -- No event type is known of them any more.
    IF v_readable_from = '-infinity' OR r_erasure.event_type IS NOT NULL
        OR r_erasure.looked_to >= pg_relation_size('warehouse.event_ledger')
            / current_setting('block_size')::bigint
    THEN
        RETURN false;
    END IF;
    SELECT array_agg(ledger.event_id ORDER BY ledger.event_id), array_agg(ledger.seq)
    INTO v_event_ids, v_seqs
    FROM warehouse.event_ledger AS ledger
    WHERE ledger.ctid >= format('(%s,0)', r_erasure.looked_to)::tid
        AND ledger.ctid < format('(%s,0)', r_erasure.looked_to + 1000)::tid
        AND ledger.user_key = ANY (r_erasure.user_keys)
        AND ledger.occurred_at < least(v_readable_from, r_erasure.to_at)
        AND ledger.occurred_at >= r_erasure.from_at;
    IF v_event_ids IS NOT NULL THEN
        PERFORM spectrum._erase(p_task_id, v_event_ids, v_seqs);
    END IF;
    UPDATE spectrum.tasks SET position = r_erasure.looked_to + 1000 WHERE task_id = p_task_id;
    RETURN true;
END
$$;
COMMENT ON FUNCTION spectrum._erase_entries(bigint) IS
    'Step of forget_user: of the next pages of the ledger what names him and has no fact any more '
    'because that was purged; false at the end.';

CREATE FUNCTION spectrum._erase(p_task_id bigint, p_event_ids uuid[], p_seqs bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_repeated uuid[];
    v_seqs bigint[];
    v_accounts text[];
    v_count bigint;
    v_facts bigint;
BEGIN
    IF p_event_ids IS NOT NULL THEN
        v_accounts := spectrum._note_before(p_event_ids);
    END IF;
    -- What a copy may name: the row, or the event where the row was purged.
    v_repeated := ARRAY(SELECT raw.id FROM @extschema@.raw_events AS raw
        WHERE raw.seq = ANY (p_seqs) ORDER BY raw.seq FOR UPDATE) || p_event_ids;
    v_seqs := p_seqs || ARRAY(SELECT raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.copy_of = ANY (v_repeated) AND r_erasure.is_whole
            AND raw.payload ->> 'user_id' = ANY (r_erasure.names)
        ORDER BY raw.seq FOR UPDATE);
    PERFORM spectrum._scrub_errors(spectrum._texts_in(v_seqs), 4);
    PERFORM spectrum._forget_values(p_event_ids, v_seqs);

    PERFORM spectrum._withdraw(p_event_ids);
    v_facts := (SELECT count(*) FROM spectrum.withdrawals AS gone
        WHERE gone.event_id = ANY (p_event_ids));
    -- What is being packed is frozen, and the day in which it ends may hold one of his still.
    UPDATE spectrum.horizon SET packed_without = 'days'
    WHERE packed_from IS NOT NULL AND EXISTS (
        SELECT FROM spectrum.withdrawals AS gone
        WHERE gone.event_id = ANY (p_event_ids) AND gone.occurred_at
            < facts_from + CASE WHEN r_erasure.is_whole THEN '0' ELSE '25 hours' END::interval);
    DELETE FROM @extschema@.raw_events AS raw WHERE raw.seq = ANY (v_seqs);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM spectrum._note_rows(p_task_id, '@extschema@.raw_events', 'rows removed', -v_count);
    DELETE FROM spectrum.requeue WHERE requeue.seq = ANY (v_seqs);
    -- Who repeated what is gone, and is somebody else, may step in.
    UPDATE @extschema@.raw_events AS raw SET status = 'pending'
    WHERE raw.copy_of = ANY (v_repeated) AND raw.status = 'done';

    IF p_event_ids IS NOT NULL THEN
        PERFORM spectrum._note_rows(
            p_task_id, 'warehouse.fact_events', 'rows removed', -v_facts);
        PERFORM spectrum._note_rows(
            p_task_id, 'warehouse.event_ledger', 'rows removed', -cardinality(p_event_ids));
        PERFORM spectrum._note_after(p_task_id, v_accounts);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._erase(bigint, uuid[], bigint[]) IS
    'Takes facts and raw events out, has the views follow and notes by how much.';

CREATE FUNCTION spectrum._end_erasure(p_task_id bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_count bigint;
BEGIN
    IF r_erasure.is_whole AND NOT r_erasure.anonymises THEN
        PERFORM spectrum._erase_frozen(p_task_id, r_erasure.user_keys);
        UPDATE warehouse.dim_users AS dim
        SET user_id = 'forgotten-' || gen_random_uuid(), account_key = 0, first_seen = NULL,
            last_seen = NULL
        WHERE dim.user_key = ANY (r_erasure.user_keys);
        GET DIAGNOSTICS v_count = ROW_COUNT;
        PERFORM spectrum._note_rows(p_task_id, 'warehouse.dim_users', 'rows changed', v_count);
    END IF;
    PERFORM spectrum._forget_property_names();
    PERFORM spectrum._drop_detached();
    IF r_erasure.is_whole THEN
        DELETE FROM spectrum.pii_values
        WHERE field = 'user_id' AND hash = ANY (r_erasure.names);
        PERFORM spectrum._scrub_errors(r_erasure.names, 1);
        PERFORM spectrum._scrub_tasks(p_task_id, r_erasure.names);
    END IF;
    -- All his events are more than some of them.
    DELETE FROM spectrum.forgotten
    WHERE r_erasure.is_whole AND NOT is_whole AND digest = ANY (ARRAY(
        SELECT spectrum._digest(known.name) FROM unnest(r_erasure.names) AS known (name)));
    UPDATE spectrum.forgotten SET done_at = clock_timestamp()
    WHERE done_at IS NULL AND digest = ANY (ARRAY(
            SELECT spectrum._digest(known.name) FROM unnest(r_erasure.names) AS known (name)))
        AND (is_whole, event_type, from_at, to_at) IS NOT DISTINCT FROM
            (r_erasure.is_whole, r_erasure.event_type, r_erasure.from_at, r_erasure.to_at);
    PERFORM spectrum._close_receipt(p_task_id);
    UPDATE spectrum.tasks SET outcome = spectrum._sum_up_receipt(p_task_id)
    WHERE task_id = p_task_id;
END
$$;
COMMENT ON FUNCTION spectrum._end_erasure(bigint) IS
    'Last step of forget_user: his name, what is kept by his key, texts of errors, tasks.';
