-- Room 20, capture: a second door, for payloads that must not be stored as they are sent. And what
-- a batch asks before it takes events in: may they come in, and can they be hashed?

CREATE FUNCTION spectrum._fields_to_hash(p_payload jsonb, p_treated text[], p_rules jsonb)
RETURNS TABLE (field text, value text, keeps_clear boolean)
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT rule ->> 'field', found.value #>> '{}', (rule ->> 'keeps')::boolean
    FROM jsonb_array_elements(p_rules) AS rule
    CROSS JOIN LATERAL (
        SELECT p_payload #> string_to_array(rule ->> 'field', '.') AS value
    ) AS found
    WHERE jsonb_typeof(p_payload) = 'object' AND rule ->> 'rule' = 'hmac'
        AND (rule ->> 'field' = ANY (p_treated)) IS NOT TRUE
        AND found.value NOT IN ('null', '""')
$$;
COMMENT ON FUNCTION spectrum._fields_to_hash(jsonb, text[], jsonb) IS
    'The fields of a payload that a rule hmac takes, with what they say.';

CREATE FUNCTION spectrum._forgotten_payload()
RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb '{"forgotten": true}'
$$;
COMMENT ON FUNCTION spectrum._forgotten_payload() IS
    'What stands in the place of a payload of somebody who was forgotten.';

CREATE FUNCTION spectrum.capture(p_payload jsonb)
RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_privacy record;
    r_key record;
    v_payload jsonb;
    v_treated text[];
    v_id uuid;
BEGIN
    IF p_payload IS NULL OR jsonb_typeof(p_payload) <> 'object' THEN
        RAISE EXCEPTION 'invalid value for argument p_payload: it is no JSON object'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Send one event.';
    END IF;
    SELECT privacy.rules INTO r_privacy FROM spectrum.privacy;
    SELECT known.inner_pad, known.outer_pad INTO r_key FROM spectrum.pii_key AS known;
    IF r_key.inner_pad IS NULL AND EXISTS (
        SELECT FROM spectrum._fields_to_hash(p_payload, NULL, r_privacy.rules)
    ) THEN
        RAISE EXCEPTION 'the PII key is missing: nothing was stored'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'The owner sets it: SELECT spectrum.set_pii_key(...).';
    END IF;

    v_payload := p_payload;
    IF r_privacy.rules IS NOT NULL THEN
        v_payload := spectrum._protect(
            p_payload, NULL, r_privacy.rules, r_key.inner_pad, r_key.outer_pad);
        v_treated := ARRAY(
            SELECT rule ->> 'field' FROM jsonb_array_elements(r_privacy.rules) AS rule
            WHERE rule ->> 'rule' = 'hmac'
        );
    END IF;
    IF spectrum._is_forgotten(p_payload) OR spectrum._is_forgotten(v_payload) THEN
        v_payload := spectrum._forgotten_payload();
    ELSE
        INSERT INTO spectrum.pii_values (field, hash, value)
        SELECT found.field, spectrum._pii_hash(found.value, r_key.inner_pad, r_key.outer_pad),
            found.value
        FROM spectrum._fields_to_hash(p_payload, NULL, r_privacy.rules) AS found
        WHERE found.keeps_clear
        ORDER BY found.field
        ON CONFLICT (field, hash) DO NOTHING;
    END IF;
    INSERT INTO @extschema@.raw_events (payload, treated) VALUES (v_payload, v_treated)
    RETURNING raw_events.id INTO v_id;
    RETURN v_id;
END
$$;
COMMENT ON FUNCTION spectrum.capture(jsonb) IS
    'Takes an event in as the PII rules leave it, so that what they take away is never stored, and '
    'returns the id of its raw event. SECURITY DEFINER: callers need no right on the key, the '
    'rules or raw_events; give it to a role with spectrum.grant_capture.';

CREATE FUNCTION spectrum._set_capture(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege(
        'EXECUTE ON FUNCTION spectrum.capture(jsonb)', p_role, p_is_granted);
    -- Other grants may need the schema too: it stays.
    IF p_is_granted THEN
        PERFORM spectrum._set_privilege('USAGE ON SCHEMA spectrum', p_role, true);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._set_capture(regrole, boolean) IS 'What grant_capture covers.';

CREATE FUNCTION spectrum.grant_capture(p_role regrole)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_capture(p_role, true);
END
$$;
COMMENT ON FUNCTION spectrum.grant_capture(regrole) IS
    'Lets a role send events through spectrum.capture, and nothing else: it reads nothing. In the '
    'place of grant_ingest, not beside it, where nothing may be stored as it is sent.';

CREATE FUNCTION spectrum.revoke_capture(p_role regrole)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_capture(p_role, false);
END
$$;
COMMENT ON FUNCTION spectrum.revoke_capture(regrole) IS
    'Takes back what grant_capture gave, but for USAGE of the schema spectrum.';

CREATE FUNCTION spectrum._withhold_unhashed()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM spectrum.pii_key) THEN
        UPDATE pg_temp.spectrum_batch AS batch
        SET is_readable = false,
            can_pass = true,
            error_msg = needing.field || ': the PII key is missing (spectrum.set_pii_key)'
        FROM @extschema@.raw_events AS raw
        CROSS JOIN spectrum.privacy
        CROSS JOIN LATERAL (
            SELECT min(found.field) AS field
            FROM spectrum._fields_to_hash(raw.payload, raw.treated, privacy.rules) AS found
        ) AS needing
        WHERE raw.seq = batch.seq AND needing.field IS NOT NULL AND NOT batch.is_forgotten;
        RETURN;
    END IF;

    INSERT INTO spectrum.pii_values (field, hash, value)
    SELECT DISTINCT found.field,
        spectrum._pii_hash(found.value, known.inner_pad, known.outer_pad) AS hash, found.value
    FROM pg_temp.spectrum_batch AS batch
    JOIN @extschema@.raw_events AS raw ON raw.seq = batch.seq
    CROSS JOIN spectrum.privacy
    CROSS JOIN spectrum.pii_key AS known
    CROSS JOIN LATERAL spectrum._fields_to_hash(raw.payload, raw.treated, privacy.rules) AS found
    WHERE found.keeps_clear AND batch.is_readable
    ORDER BY found.field, hash
    ON CONFLICT (field, hash) DO NOTHING;
END
$$;
COMMENT ON FUNCTION spectrum._withhold_unhashed() IS
    'Of a batch that was read: fails the events, for now, that a rule wants hashed where there is '
    'no key; and where a rule says so keeps what was hashed.';

CREATE FUNCTION spectrum._withhold_forgotten()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Who is forgotten altogether is no member of the dimension any more, once that is done.
    v_are_known boolean := EXISTS (
        SELECT FROM spectrum.forgotten WHERE NOT is_whole OR done_at IS NULL
    );
BEGIN
    UPDATE pg_temp.spectrum_batch AS batch
    SET is_readable = false,
        can_pass = false,
        is_forgotten = true,
        error_msg = 'user_id: was forgotten on request'
    FROM @extschema@.raw_events AS raw
    CROSS JOIN spectrum.privacy
    WHERE raw.ctid = batch.row_id AND (v_are_known OR coalesce(batch.user_key, 0) = 0)
        AND EXISTS (
            SELECT FROM spectrum.forgotten
            WHERE forgotten.digest IN (
                    sha256(privacy.salt || convert_to(raw.payload ->> 'user_id', 'UTF8')),
                    sha256(privacy.salt || convert_to(batch.user_id, 'UTF8')))
                AND (forgotten.is_whole OR (
                    (forgotten.event_type IS NULL OR forgotten.event_type = batch.event_type)
                    AND batch.occurred_at >= forgotten.from_at
                    AND batch.occurred_at < forgotten.to_at))
        );
END
$$;
COMMENT ON FUNCTION spectrum._withhold_forgotten() IS
    'Of a batch that was read: fails the events of users who were forgotten.';

CREATE FUNCTION spectrum._withhold()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    IF EXISTS (SELECT FROM spectrum.forgotten) THEN
        PERFORM spectrum._withhold_forgotten();
    END IF;
    IF (SELECT privacy.rules FROM spectrum.privacy) IS NOT NULL THEN
        PERFORM spectrum._withhold_unhashed();
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._withhold() IS
    'What a batch asks about privacy, once it was read. Costs two looks where nothing is defined.';

CREATE FUNCTION spectrum._scrub_forgotten()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_temp.spectrum_batch AS batch WHERE batch.is_forgotten) THEN
        UPDATE @extschema@.raw_events AS raw SET payload = spectrum._forgotten_payload()
        FROM pg_temp.spectrum_batch AS batch
        WHERE raw.seq = batch.seq AND batch.is_forgotten;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._scrub_forgotten() IS
    'Of a batch that is marked: nothing is kept of what came of users who were forgotten.';
