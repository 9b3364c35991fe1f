-- Room 80, forgetting: a user goes out of everything, or becomes nobody, and does not come back.
-- Who was forgotten is known by a salted hash of his user_id alone. Erasure itself, step by step,
-- is in 57_erasure.sql; what changed by it is written down in 59_receipts.sql.

CREATE FUNCTION spectrum._user_names(p_user_id text)
RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN array_remove(ARRAY[p_user_id, spectrum.pii_hash(p_user_id)], NULL);
END
$$;
COMMENT ON FUNCTION spectrum._user_names(text) IS
    'What a user may be called here: as sent, and its hash where there is a key.';

CREATE FUNCTION spectrum._check_forget_user(p_arguments jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_mode text := coalesce(p_arguments ->> 'mode', 'remove');
BEGIN
    PERFORM spectrum._check_arguments(p_arguments, '{"user_id": "text", "mode": "text", '
        '"event_type": "text", "from": "timestamptz", "to": "timestamptz", '
        '"properties": "jsonb"}');
    IF (length(p_arguments ->> 'user_id') BETWEEN 1 AND 200) IS NOT TRUE THEN
        PERFORM spectrum._reject(
            'p_user_id', p_arguments ->> 'user_id', 'a text of 1 to 200 characters');
    END IF;
    PERFORM spectrum._check_choice('p_mode', v_mode, ARRAY['remove', 'anonymise']);
    IF v_mode = 'anonymise' AND p_arguments ?| '{event_type, from, to}' THEN
        PERFORM spectrum._reject('p_mode', v_mode,
            'remove, where only some events are meant: a user is anonymised as a whole');
    ELSIF p_arguments ? 'properties' AND (v_mode = 'remove' OR NOT spectrum._is_text_array(
        p_arguments -> 'properties')) THEN
        PERFORM spectrum._reject('p_properties', p_arguments ->> 'properties',
            'names of properties, or * for all of them, with p_mode anonymise');
    ELSIF (p_arguments ->> 'to')::timestamptz <= (p_arguments ->> 'from')::timestamptz THEN
        PERFORM spectrum._reject('p_to', p_arguments ->> 'to', 'a time after p_from');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_forget_user(jsonb) IS 'Refuses what forget_user cannot take.';

CREATE FUNCTION spectrum._is_text_array(p_value jsonb)
RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_typeof(p_value) = 'array'
        AND NOT jsonb_path_exists(p_value, 'strict $[*] ? (@.type() != "string")')
$$;
COMMENT ON FUNCTION spectrum._is_text_array(jsonb) IS 'Whether it is an array of texts.';

CREATE FUNCTION spectrum.forget_user(
    p_user_id text,
    p_mode text DEFAULT 'remove',
    p_event_type text DEFAULT NULL,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_properties text[] DEFAULT NULL
)
RETURNS TABLE (
    object text,
    what text,
    cell jsonb,
    before jsonb,
    after jsonb,
    change numeric
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_task_id bigint := spectrum.request('forget_user', jsonb_build_object(
        'user_id', p_user_id, 'mode', p_mode, 'event_type', p_event_type, 'from', p_from,
        'to', p_to, 'properties', p_properties
    ));
BEGIN
    IF (SELECT count(*) FROM (
        SELECT FROM warehouse.fact_events AS fact
        WHERE fact.user_key = ANY (spectrum._user_keys(spectrum._user_names(p_user_id)))
        LIMIT 100001) AS facts) > 100000
    THEN
        RAISE EXCEPTION 'the user has more than 100000 events: too many for one transaction'
            USING ERRCODE = 'program_limit_exceeded',
                HINT = 'Have it done in steps: SELECT spectrum.request(''forget_user'', '
                    '''{"user_id": "..."}''); the next run begins with it.';
    END IF;
    UPDATE spectrum.tasks AS task SET state = 'running', started_at = clock_timestamp()
    WHERE task.task_id = v_task_id;
    WHILE spectrum._do_forget_user(v_task_id) LOOP
        NULL;
    END LOOP;
    UPDATE spectrum.tasks AS task SET state = 'done', finished_at = clock_timestamp()
    WHERE task.task_id = v_task_id;
    RETURN QUERY
    SELECT line.object, line.what, line.cell, line.before, line.after, line.change
    FROM spectrum.receipts AS line
    WHERE line.task_id = v_task_id
    ORDER BY line.line_no;
END
$$;
COMMENT ON FUNCTION spectrum.forget_user(text, text, text, timestamptz, timestamptz, text[]) IS
    'Forgets a user, in the caller''s transaction, and returns the receipt: each table and each '
    'standing number that changed. remove: all his events go out of everything, or those of '
    'p_event_type that occurred in [p_from, p_to). anonymise: he becomes nobody, numbers stay; '
    'p_properties ({*}: all) are taken from his events. Later events of his are kept out. Batches '
    'wait meanwhile; inserts do not. For more than 100,000 events: spectrum.request.';

CREATE FUNCTION spectrum.remember_user(p_user_id text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('forget'));
    IF EXISTS (
        SELECT FROM spectrum.tasks AS task
        WHERE task.kind = 'forget_user' AND task.state IN ('waiting', 'running')
            AND task.arguments ->> 'user_id' = p_user_id
    ) THEN
        RAISE EXCEPTION 'the user is being forgotten'
            USING ERRCODE = 'object_in_use',
                HINT = 'Wait for the task in spectrum.tasks, or spectrum.cancel_task() it.';
    END IF;
    DELETE FROM spectrum.forgotten WHERE digest = ANY (ARRAY(
        SELECT spectrum._digest(known.name)
        FROM unnest(spectrum._user_names(p_user_id)) AS known (name)));
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION spectrum.remember_user(text) IS
    'Lets events of a user who was forgotten in again, as those of somebody new, and returns '
    'whether he was kept out. What was erased stays so.';
