-- Room 20, capture: a second door, for payloads that must not be stored as they are sent.

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
