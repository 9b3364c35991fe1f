-- Room 80, erasure: how somebody becomes nobody, and where else there are traces of him.

CREATE FUNCTION spectrum._anonymise_events(p_task_id bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_event_ids uuid[];
    v_seqs bigint[];
    v_names text[];
    v_count bigint;
BEGIN
    UPDATE warehouse.dim_users AS dim SET user_id = 'anonymous-' || gen_random_uuid()
    WHERE dim.user_key = ANY (r_erasure.user_keys);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM spectrum._note_rows(p_task_id, 'warehouse.dim_users', 'rows changed', v_count);

    SELECT array_agg(his.event_id ORDER BY his.event_id),
        array_agg(ledger.seq ORDER BY his.event_id), array_agg(his.user_id ORDER BY his.event_id)
    INTO v_event_ids, v_seqs, v_names
    FROM (
        SELECT fact.event_id, dim.user_id
        FROM warehouse.fact_events AS fact
        JOIN warehouse.dim_users AS dim USING (user_key)
        WHERE fact.user_key = ANY (r_erasure.user_keys)
    ) AS his
    CROSS JOIN LATERAL (
        SELECT known.seq FROM warehouse.event_ledger AS known
        WHERE known.event_id = his.event_id
        OFFSET 0
    ) AS ledger;
    IF r_erasure.properties <> '{}' AND EXISTS (SELECT FROM spectrum._rewrite_packed(
        r_erasure.user_keys, NULL, '-infinity', 'infinity', r_erasure.properties))
    THEN
        UPDATE spectrum.horizon SET packed_without = coalesce(packed_without, 'sums');
    END IF;
    IF v_event_ids IS NULL THEN
        RETURN;
    END IF;
    PERFORM spectrum._scrub_errors(spectrum._texts_in(v_seqs), 4);
    PERFORM spectrum._forget_values(v_event_ids, v_seqs);
    PERFORM spectrum._rewrite_payloads(p_task_id, v_seqs, v_event_ids, v_names);
    PERFORM spectrum._strip_facts(p_task_id, v_event_ids, r_erasure.properties);
END
$$;
COMMENT ON FUNCTION spectrum._anonymise_events(bigint) IS
    'Step of forget_user: another name for the user, in the dimension and in the raw events of his '
    'facts, and the properties that are to go, all at once.';

CREATE FUNCTION spectrum._rewrite_payloads(
    p_task_id bigint,
    p_seqs bigint[],
    p_event_ids uuid[],
    p_names text[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_seqscan = off
AS $$
DECLARE
    v_properties text[] := (SELECT properties FROM spectrum._erasure(p_task_id));
    v_count bigint;
BEGIN
    -- What readings do not know of may say anything: it goes too. So may the text of an event_id;
    -- what readings make of it stays.
    UPDATE @extschema@.raw_events AS raw
    SET treated = array_append(raw.treated, 'user_id'),
        payload = jsonb_build_object('event_id', wanted.event_id) || (
            SELECT coalesce(jsonb_object_agg(field.key, CASE field.key
                    WHEN 'user_id' THEN to_jsonb(wanted.name)
                    WHEN 'geo' THEN (
                        SELECT coalesce(jsonb_object_agg(part.key, part.value), '{}')
                        FROM jsonb_each(CASE jsonb_typeof(field.value) WHEN 'object'
                            THEN field.value ELSE '{}' END) AS part
                        WHERE part.key IN ('country', 'region', 'city')
                    )
                    WHEN 'properties' THEN CASE WHEN jsonb_typeof(field.value) <> 'object'
                        OR '*' = ANY (v_properties) THEN '{}' ELSE field.value - v_properties END
                    ELSE field.value
                END), '{}')
            FROM jsonb_each(raw.payload) AS field
            WHERE field.key IN ('event_type', 'account_id', 'user_id', 'occurred_at', 'timestamp',
                'geo', 'properties')
        )
    FROM unnest(p_seqs, p_event_ids, p_names) AS wanted (seq, event_id, name)
    WHERE raw.seq = wanted.seq;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM spectrum._note_rows(p_task_id, '@extschema@.raw_events', 'rows changed', v_count);
END
$$;
COMMENT ON FUNCTION spectrum._rewrite_payloads(bigint, bigint[], uuid[], text[]) IS
    'Puts other names into raw events, takes the properties that are to go from them, and fields '
    'that no reading looks at.';

CREATE FUNCTION spectrum._strip_facts(p_task_id bigint, p_event_ids uuid[], p_properties text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_event_ids uuid[];
    v_seqs bigint[];
    v_accounts text[];
    v_after bigint := nextval('spectrum.news_note_no_seq');
BEGIN
    SELECT array_agg(ledger.event_id ORDER BY ledger.event_id),
        array_agg(ledger.seq ORDER BY ledger.event_id)
    INTO v_event_ids, v_seqs
    FROM warehouse.event_ledger AS ledger
    JOIN warehouse.fact_events AS fact USING (event_id, occurred_at, user_key)
    WHERE ledger.event_id = ANY (p_event_ids)
        AND CASE WHEN '*' = ANY (p_properties) THEN fact.properties <> '{}'
            ELSE fact.properties ?| p_properties END;
    IF v_event_ids IS NULL THEN
        RETURN;
    END IF;
    v_accounts := spectrum._note_before(v_event_ids);
    PERFORM spectrum._withdraw(v_event_ids);
    -- Made again as readings would make them of what is left.
    WITH stripped AS MATERIALIZED (
        SELECT gone.event_id, known.seq, gone.occurred_at, gone.account_key, gone.user_key,
            gone.event_type_key, gone.geo_key,
            CASE WHEN '*' = ANY (p_properties) THEN '{}'
                ELSE gone.properties - p_properties END AS properties,
            CASE WHEN is_paid THEN gone.revenue END AS revenue,
            CASE WHEN NOT is_paid THEN NULL WHEN p_properties && '{*, currency}'
                AND gone.revenue IS NOT NULL THEN config.currency ELSE gone.currency END AS currency
        FROM unnest(v_event_ids, v_seqs) AS known (event_id, seq)
        JOIN spectrum.withdrawals AS gone
            ON gone.event_id = known.event_id AND gone.note_no > v_after
        CROSS JOIN spectrum.config
        CROSS JOIN LATERAL (
            SELECT NOT p_properties && ARRAY['*', config.revenue_property] AS is_paid
        ) AS money
    ), entries AS (
        INSERT INTO warehouse.event_ledger (event_id, seq, occurred_at, user_key)
        SELECT event_id, seq, occurred_at, user_key FROM stripped
    ), notes AS (
        INSERT INTO spectrum.news (events, first_at, last_at, user_keys, occurred_ats, event_ids)
        SELECT count(*), min(occurred_at), max(occurred_at), array_agg(user_key),
            array_agg(occurred_at), array_agg(event_id)
        FROM stripped
    )
    INSERT INTO warehouse.fact_events (
        event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
        revenue, currency
    )
    SELECT event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
        revenue, currency
    FROM stripped;
    PERFORM spectrum._note_rows(
        p_task_id, 'warehouse.fact_events', 'rows changed', cardinality(v_event_ids));
    PERFORM spectrum._note_after(p_task_id, v_accounts);
END
$$;
COMMENT ON FUNCTION spectrum._strip_facts(bigint, uuid[], text[]) IS
    'Takes properties from facts, has the views follow and notes by how much.';

CREATE FUNCTION spectrum._texts_in(p_seqs bigint[])
RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_errors text := concat_ws(E'\n',
        (SELECT string_agg(concat_ws(' ', log.error_msg, log.detail), E'\n')
        FROM spectrum.run_log AS log WHERE log.error_msg IS NOT NULL),
        (SELECT string_agg(task.error_msg, E'\n') FROM spectrum.tasks AS task),
        (SELECT string_agg(own.error_msg, E'\n') FROM spectrum.report_definitions AS own));
BEGIN
    IF v_errors = '' THEN
        RETURN ARRAY[]::text[];
    END IF;
    RETURN ARRAY(
        SELECT DISTINCT leaf #>> '{}'
        FROM @extschema@.raw_events AS raw
        CROSS JOIN LATERAL jsonb_path_query(
            raw.payload, 'strict $.** ? (@.type() == "string" || @.type() == "number")') AS leaf
        WHERE raw.seq = ANY (p_seqs) AND strpos(v_errors, leaf #>> '{}') > 0
    );
END
$$;
COMMENT ON FUNCTION spectrum._texts_in(bigint[]) IS
    'What raw events say that the text of an error says too.';

CREATE FUNCTION spectrum._scrub_errors(p_texts text[], p_least integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_text text;
    v_pattern text;
BEGIN
    FOREACH v_text IN ARRAY p_texts LOOP
        CONTINUE WHEN length(v_text) < p_least;
        v_pattern := '(?<!\w)' || regexp_replace(v_text, '([^\w\s])', '\\\1', 'g') || '(?!\w)';
        UPDATE spectrum.run_log
        SET error_msg = regexp_replace(error_msg, v_pattern, '(erased)', 'g'),
            detail = regexp_replace(detail, v_pattern, '(erased)', 'g')
        WHERE error_msg ~ v_pattern;
        UPDATE spectrum.tasks
        SET error_msg = regexp_replace(error_msg, v_pattern, '(erased)', 'g')
        WHERE error_msg ~ v_pattern;
        UPDATE spectrum.report_definitions
        SET error_msg = regexp_replace(error_msg, v_pattern, '(erased)', 'g')
        WHERE error_msg ~ v_pattern;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._scrub_errors(text[], integer) IS
    'Takes texts of at least some length out of the errors that were noted.';

CREATE FUNCTION spectrum._scrub_tasks(p_task_id bigint, p_names text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- An open one that names him does the same for itself at its end.
    UPDATE spectrum.tasks
    SET arguments = jsonb_build_object('erased', true) || (arguments - '{user_id, error}'::text[])
    WHERE (task_id = p_task_id OR state NOT IN ('waiting', 'running')) AND EXISTS (
        SELECT FROM unnest(p_names) AS known (name)
        WHERE arguments ->> 'user_id' = known.name OR strpos(arguments ->> 'error', known.name) > 0
    );
END
$$;
COMMENT ON FUNCTION spectrum._scrub_tasks(bigint, text[]) IS
    'Takes a user out of the arguments of tasks that are over.';

CREATE FUNCTION spectrum._forget_values(p_event_ids uuid[], p_seqs bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM spectrum.pii_values) THEN
        RETURN;
    END IF;
    -- An account is not his alone, nor is a place.
    DELETE FROM spectrum.pii_values AS kept
    USING (
        SELECT rule.field, said.properties #>> (string_to_array(rule.field, '.'))[2:] AS hash
        FROM spectrum.pii_rules AS rule
        CROSS JOIN (
            SELECT reading.properties FROM spectrum.readings AS reading
            WHERE reading.seq = ANY (p_seqs)
            UNION ALL
            SELECT fact.properties FROM warehouse.event_ledger AS ledger
            JOIN warehouse.fact_events AS fact USING (event_id, occurred_at, user_key)
            WHERE ledger.event_id = ANY (p_event_ids)
        ) AS said
        WHERE rule.field LIKE 'properties.%'
    ) AS his
    WHERE kept.field = his.field AND kept.hash = his.hash;
END
$$;
COMMENT ON FUNCTION spectrum._forget_values(uuid[], bigint[]) IS
    'Deletes what the hashes in properties of some events stand for.';

CREATE FUNCTION spectrum._forget_property_names()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- The catalog keeps the first 200 names of an event type. Where there are as many, what is
    -- over has been counted elsewhere, so their place stays taken.
    WITH unused AS MATERIALIZED (
        SELECT names.report_id, names.event_type_key, names.property
        FROM spectrum.rollup_property_names AS names
        WHERE NOT EXISTS (
            SELECT FROM analytics.mv_event_catalog AS kept
            WHERE kept.report_id = names.report_id AND kept.account_id = '*'
                AND kept.event_type_key = names.event_type_key AND kept.property = names.property
        )
    ), full_types AS MATERIALIZED (
        SELECT names.report_id, names.event_type_key
        FROM spectrum.rollup_property_names AS names
        GROUP BY names.report_id, names.event_type_key
        HAVING count(*) >= 200
    ), renamed AS (
        UPDATE spectrum.rollup_property_names AS names
        SET property = 'forgotten-' || gen_random_uuid()
        FROM unused JOIN full_types USING (report_id, event_type_key)
        WHERE names.report_id = unused.report_id AND names.property = unused.property
            AND names.event_type_key = unused.event_type_key
            AND names.property NOT LIKE 'forgotten-%'
    )
    DELETE FROM spectrum.rollup_property_names AS names
    USING unused LEFT JOIN full_types USING (report_id, event_type_key)
    WHERE full_types.report_id IS NULL AND names.report_id = unused.report_id
        AND names.event_type_key = unused.event_type_key AND names.property = unused.property;
END
$$;
COMMENT ON FUNCTION spectrum._forget_property_names() IS
    'Takes names of properties that no event has any more out of what the catalog keeps.';

CREATE FUNCTION spectrum.forget_members()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_users bigint;
    v_accounts bigint;
    v_places bigint;
    -- Of members older than what was purged nobody knows any more whether they had facts.
    v_since timestamptz;
BEGIN
    PERFORM spectrum._keep_batches_out();
    PERFORM spectrum._count_all_news();
    v_since := spectrum._readable_from();
    UPDATE warehouse.dim_users AS dim
    SET user_id = 'unused-' || gen_random_uuid(), account_key = 0, first_seen = NULL,
        last_seen = NULL
    WHERE dim.user_key <> 0 AND coalesce(dim.first_seen >= v_since, true)
        AND dim.user_id !~ '^(unused|forgotten)-[0-9a-f-]{36}$'
        AND NOT EXISTS (
            SELECT FROM warehouse.visible_events AS fact WHERE fact.user_key = dim.user_key);
    GET DIAGNOSTICS v_users = ROW_COUNT;
    UPDATE warehouse.dim_accounts AS dim
    SET account_id = 'unused-' || gen_random_uuid(), first_seen = NULL, last_seen = NULL
    WHERE dim.account_key <> 0 AND coalesce(dim.first_seen >= v_since, true)
        AND dim.account_id !~ '^unused-[0-9a-f-]{36}$'
        AND dim.account_key NOT IN (SELECT fact.account_key FROM warehouse.visible_events AS fact)
        AND dim.account_key NOT IN (SELECT users.account_key FROM warehouse.dim_users AS users);
    GET DIAGNOSTICS v_accounts = ROW_COUNT;
    UPDATE warehouse.dim_geography AS dim
    SET country = '', region = '', city = 'unused-' || gen_random_uuid(), first_seen = NULL,
        last_seen = NULL
    WHERE dim.geo_key <> 0 AND coalesce(dim.first_seen >= v_since, true)
        AND dim.city !~ '^unused-[0-9a-f-]{36}$'
        AND dim.geo_key NOT IN (SELECT fact.geo_key FROM warehouse.visible_events AS fact);
    GET DIAGNOSTICS v_places = ROW_COUNT;
    UPDATE spectrum.cap_notes AS note SET account_id = '*'
    WHERE note.account_id NOT IN ('', '*') AND NOT EXISTS (
        SELECT FROM warehouse.dim_accounts AS dim WHERE dim.account_id = note.account_id);
    RETURN v_users + v_accounts + v_places;
END
$$;
COMMENT ON FUNCTION spectrum.forget_members() IS
    'Takes the names of users, accounts and places that no fact names any more out of the '
    'dimensions, as after a PII rule and reprocessing, and returns how many. Keys stay. It reads '
    'all facts, and batches wait meanwhile.';
