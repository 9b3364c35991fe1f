-- Room 20, personal data: what is done to fields that identify people, before anything is made of
-- them. Rules are applied where a payload is read (spectrum.readings), so facts, dimensions and
-- whatever follows never hold what a rule takes away; and at the door by spectrum.capture, for what
-- must not be stored in clear at all.
--
-- The key of the hashes is in a table that stays a member of the extension, so that no dump holds
-- it. With the data goes only what tells the right key from a wrong one.

CREATE FUNCTION spectrum._random_bytes()
RETURNS bytea
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
        || uuid_send(gen_random_uuid()))
$$;
COMMENT ON FUNCTION spectrum._random_bytes() IS
    '32 bytes from the server''s strong random source: 366 random bits, hashed.';

CREATE FUNCTION spectrum._create_pii_key()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.pii_key') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.pii_key (
        is_only boolean NOT NULL DEFAULT true
            CONSTRAINT pii_key_pkey PRIMARY KEY
            CONSTRAINT pii_key_is_one_row CHECK (is_only),
        secret bytea NOT NULL,
        inner_pad bytea NOT NULL,
        outer_pad bytea NOT NULL,
        set_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.pii_key IS
        'The key of the hashes that PII rules make, one row or none. A member of the extension: '
        'dumps leave it out. Keep a copy elsewhere; set it with spectrum.set_pii_key.';
    COMMENT ON COLUMN spectrum.pii_key.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.pii_key.secret IS 'The key.';
    COMMENT ON COLUMN spectrum.pii_key.inner_pad IS 'The key as HMAC puts it before a text.';
    COMMENT ON COLUMN spectrum.pii_key.outer_pad IS 'The key as HMAC puts it before that hash.';
    COMMENT ON COLUMN spectrum.pii_key.set_at IS 'When it was set.';
END
$$;
COMMENT ON FUNCTION spectrum._create_pii_key() IS
    'Room 20: makes spectrum.pii_key. Called by the extension''s script also where a restore '
    'brings all other tables.';

CREATE FUNCTION spectrum._create_privacy()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._create_pii_key();
    IF to_regclass('spectrum.privacy') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.pii_rules (
        field text COLLATE "C" NOT NULL CONSTRAINT pii_rules_pkey PRIMARY KEY,
        rule text NOT NULL
            CONSTRAINT pii_rules_rule_is_known CHECK (rule IN ('drop', 'keep', 'hmac')),
        keeps_clear boolean NOT NULL DEFAULT false,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.pii_rules IS
        'What is done to fields of events before anything is made of them. Set with '
        'spectrum.define_pii.';
    COMMENT ON COLUMN spectrum.pii_rules.field IS
        'user_id, account_id, geo.city, properties.email, properties.billing.iban, ...';
    COMMENT ON COLUMN spectrum.pii_rules.rule IS
        'drop: as if it had not been sent; hmac: its HMAC-SHA-256 in its place; keep: as it is.';
    COMMENT ON COLUMN spectrum.pii_rules.keeps_clear IS
        'hmac: what was hashed is kept in spectrum.pii_values.';
    COMMENT ON COLUMN spectrum.pii_rules.changed_at IS 'When it was defined.';

    CREATE TABLE spectrum.pii_values (
        field text COLLATE "C" NOT NULL,
        hash text COLLATE "C" NOT NULL,
        value text NOT NULL,
        kept_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pii_values_pkey PRIMARY KEY (field, hash)
    );
    COMMENT ON TABLE spectrum.pii_values IS
        'What hashes stand for, where a rule says to keep that. For the owner alone.';
    COMMENT ON COLUMN spectrum.pii_values.field IS 'spectrum.pii_rules.';
    COMMENT ON COLUMN spectrum.pii_values.hash IS 'What the warehouse holds.';
    COMMENT ON COLUMN spectrum.pii_values.value IS 'What was sent.';
    COMMENT ON COLUMN spectrum.pii_values.kept_at IS 'When it was first met.';

    CREATE TABLE spectrum.privacy (
        is_only boolean NOT NULL DEFAULT true
            CONSTRAINT privacy_pkey PRIMARY KEY
            CONSTRAINT privacy_is_one_row CHECK (is_only),
        rules jsonb,
        key_check text,
        salt bytea NOT NULL,
        forgotten_at timestamptz
    );
    COMMENT ON TABLE spectrum.privacy IS 'What reading and forgetting need to know, one row.';
    COMMENT ON COLUMN spectrum.privacy.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.privacy.rules IS
        'spectrum.pii_rules but for keep, as readings take them; NULL: none.';
    COMMENT ON COLUMN spectrum.privacy.key_check IS
        'What the key that the hashes were made with makes of a known text.';
    COMMENT ON COLUMN spectrum.privacy.salt IS 'Before each user_id hashed in spectrum.forgotten.';
    COMMENT ON COLUMN spectrum.privacy.forgotten_at IS 'When somebody was last forgotten.';
    INSERT INTO spectrum.privacy (salt) VALUES (spectrum._random_bytes());
END
$$;
COMMENT ON FUNCTION spectrum._create_privacy() IS
    'Room 20: makes spectrum.pii_rules, pii_values and privacy, and pii_key where it is missing.';

CREATE FUNCTION spectrum._hmac_pad(p_key bytea, p_byte integer)
RETURNS bytea
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_key bytea := CASE WHEN length(p_key) > 64 THEN sha256(p_key) ELSE p_key END;
    v_pad bytea := decode(repeat(lpad(to_hex(p_byte), 2, '0'), 64), 'hex');
BEGIN
    FOR v_place IN 0 .. length(v_key) - 1 LOOP
        v_pad := set_byte(v_pad, v_place, get_byte(v_key, v_place) # p_byte);
    END LOOP;
    RETURN v_pad;
END
$$;
COMMENT ON FUNCTION spectrum._hmac_pad(bytea, integer) IS
    'The key, filled up to 64 bytes, XOR a byte: what RFC 2104 calls K XOR ipad (54) or opad (92).';

CREATE FUNCTION spectrum._hmac_sha256(p_key bytea, p_message bytea)
RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT sha256(
        spectrum._hmac_pad(p_key, 92) || sha256(spectrum._hmac_pad(p_key, 54) || p_message)
    )
$$;
COMMENT ON FUNCTION spectrum._hmac_sha256(bytea, bytea) IS 'HMAC-SHA-256 (RFC 2104, RFC 6234).';

CREATE FUNCTION spectrum._key_check(p_key bytea)
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT encode(spectrum._hmac_sha256(p_key, 'spectrum'), 'hex')
$$;
COMMENT ON FUNCTION spectrum._key_check(bytea) IS 'What tells one key from another.';

CREATE FUNCTION spectrum._pii_hash(p_text text, p_inner_pad bytea, p_outer_pad bytea)
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT encode(sha256(p_outer_pad || sha256(p_inner_pad || convert_to(p_text, 'UTF8'))), 'hex')
$$;
COMMENT ON FUNCTION spectrum._pii_hash(text, bytea, bytea) IS
    'HMAC-SHA-256 of a text as 64 hexadecimal digits, by the pads of the key.';

CREATE FUNCTION spectrum.pii_hash(p_text text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT spectrum._pii_hash(p_text, known.inner_pad, known.outer_pad)
        FROM spectrum.pii_key AS known);
END
$$;
COMMENT ON FUNCTION spectrum.pii_hash(text) IS
    'What a rule hmac makes of a text; NULL without a key. For the owner alone.';

CREATE FUNCTION spectrum._protect(
    p_payload jsonb,
    p_treated text[],
    p_rules jsonb,
    p_inner_pad bytea,
    p_outer_pad bytea
)
RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_payload jsonb := p_payload;
    v_rule jsonb;
    v_path text[];
    v_value jsonb;
BEGIN
    IF jsonb_typeof(p_payload) <> 'object' THEN
        RETURN p_payload;
    END IF;
    FOR v_rule IN SELECT rule FROM jsonb_array_elements(p_rules) AS rule LOOP
        v_path := string_to_array(v_rule ->> 'field', '.');
        v_value := v_payload #> v_path;
        CONTINUE WHEN v_value IS NULL OR v_value IN ('null', '""')
            OR (v_rule ->> 'rule' = 'hmac' AND v_rule ->> 'field' = ANY (p_treated));
        -- Without the key it goes; the batch does not take such events in.
        v_payload := CASE WHEN v_rule ->> 'rule' = 'drop' OR p_inner_pad IS NULL
            THEN v_payload #- v_path
            ELSE jsonb_set(v_payload, v_path, to_jsonb(
                spectrum._pii_hash(v_value #>> '{}', p_inner_pad, p_outer_pad)))
        END;
    END LOOP;
    RETURN v_payload;
END
$$;
COMMENT ON FUNCTION spectrum._protect(jsonb, text[], jsonb, bytea, bytea) IS
    'A payload as the rules leave it. Fields in p_treated hold hashes already.';
