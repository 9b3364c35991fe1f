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

CREATE FUNCTION spectrum._gather_pii_rules()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE spectrum.privacy SET rules = (
        SELECT jsonb_agg(jsonb_build_object('field', field, 'rule', rule, 'keeps', keeps_clear)
            ORDER BY field)
        FROM spectrum.pii_rules
        WHERE rule <> 'keep'
    );
    IF EXISTS (SELECT FROM warehouse.event_ledger) THEN
        RAISE NOTICE 'facts made before keep what they hold until their raw events are read again'
            USING HINT = 'CALL spectrum.reprocess(p_status => ''done''); and see docs/privacy.md '
                'for what remains.';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._gather_pii_rules() IS
    'Has readings follow the rules as they are now, and says what that means for older facts.';

CREATE FUNCTION spectrum.define_pii(p_field text, p_rule text, p_keep boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_path text[] := string_to_array(p_field, '.');
BEGIN
    PERFORM spectrum._check_choice('p_rule', p_rule, ARRAY['drop', 'hmac', 'keep']);
    IF p_field IS NULL OR length(p_field) NOT BETWEEN 1 AND 200 OR '' = ANY (v_path)
        OR v_path[1] IN ('event_id', 'event_type', 'occurred_at', 'timestamp')
        OR (v_path[1] IN ('user_id', 'account_id') AND cardinality(v_path) > 1)
        OR (p_field IN ('geo', 'properties') AND p_rule = 'hmac')
    THEN
        PERFORM spectrum._reject('p_field', p_field, 'user_id, account_id, geo.country, '
            'geo.region, geo.city, properties.<name>, or another field of the payload; not '
            'event_id, event_type or the time');
    ELSIF p_rule = 'hmac' AND p_field = (
        SELECT 'properties.' || config.revenue_property FROM spectrum.config)
    THEN
        PERFORM spectrum._reject('p_rule', p_rule, 'drop or keep: a hash is no amount of money');
    ELSIF coalesce(p_keep, false) AND p_rule <> 'hmac' THEN
        PERFORM spectrum._reject('p_keep', p_keep::text, 'true only with the rule hmac');
    END IF;

    IF p_rule = 'hmac' AND NOT EXISTS (SELECT FROM spectrum.pii_key)
        AND (SELECT privacy.key_check FROM spectrum.privacy) IS NULL
    THEN
        PERFORM spectrum.set_pii_key();
    END IF;
    INSERT INTO spectrum.pii_rules AS known (field, rule, keeps_clear)
    VALUES (p_field, p_rule, coalesce(p_keep, false))
    ON CONFLICT (field) DO UPDATE SET rule = excluded.rule, keeps_clear = excluded.keeps_clear,
        changed_at = clock_timestamp();
    PERFORM spectrum._gather_pii_rules();
END
$$;
COMMENT ON FUNCTION spectrum.define_pii(text, text, boolean) IS
    'What is done to a field from now on, wherever events are read: drop (as if it had not been '
    'sent), hmac (its HMAC-SHA-256 takes its place; p_keep keeps what was sent, for the owner '
    'alone, in spectrum.pii_values) or keep. The first rule hmac makes a key.';

CREATE FUNCTION spectrum.drop_pii(p_field text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.pii_rules WHERE field = p_field;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_field', p_field, 'a field that has a rule: '
            || coalesce((SELECT string_agg(field, ', ' ORDER BY field) FROM spectrum.pii_rules),
                'none has'));
    END IF;
    PERFORM spectrum._gather_pii_rules();
END
$$;
COMMENT ON FUNCTION spectrum.drop_pii(text) IS 'Takes the rule of a field away.';

CREATE FUNCTION spectrum.set_pii_key(p_key bytea DEFAULT NULL, p_replace boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_key bytea := coalesce(p_key, spectrum._random_bytes());
    v_check text := spectrum._key_check(v_key);
    v_known text := (SELECT privacy.key_check FROM spectrum.privacy FOR UPDATE);
BEGIN
    IF length(v_key) < 16 THEN
        PERFORM spectrum._reject('p_key', length(v_key) || ' bytes', 'at least 16 bytes');
    ELSIF v_known <> v_check AND NOT coalesce(p_replace, false) THEN
        RAISE EXCEPTION 'this is not the key that the hashes here were made with'
            USING ERRCODE = 'invalid_parameter_value',
                HINT = 'Set that key. Or, with p_replace => true, begin anew: the same value then '
                    'has another hash than before, so users and accounts seem new.';
    END IF;
    INSERT INTO spectrum.pii_key AS known (secret, inner_pad, outer_pad)
    VALUES (v_key, spectrum._hmac_pad(v_key, 54), spectrum._hmac_pad(v_key, 92))
    ON CONFLICT (is_only) DO UPDATE SET secret = excluded.secret, inner_pad = excluded.inner_pad,
        outer_pad = excluded.outer_pad, set_at = excluded.set_at;
    UPDATE spectrum.privacy SET key_check = v_check;
    IF v_known IS NOT NULL THEN
        -- Whoever waited for the key and gave up comes again.
        PERFORM spectrum.request('reprocess',
            '{"status": "failed", "error": "%: the PII key is missing%"}');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum.set_pii_key(bytea, boolean) IS
    'Sets the key of the hashes; without one, a random key is made. A key other than the one that '
    'hashes were made with is refused unless p_replace. No dump holds it: keep a copy.';

CREATE FUNCTION spectrum._check_pii_key(OUT ok boolean, OUT message text, OUT what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_check text;
BEGIN
    IF NOT has_table_privilege('spectrum.pii_key', 'SELECT') THEN
        ok := true;
        message := 'the owner alone can tell';
        what_to_do := '';
        RETURN;
    END IF;
    SELECT spectrum._key_check(known.secret) INTO v_check
    FROM spectrum.pii_key AS known;
    SELECT privacy.key_check IS NOT DISTINCT FROM v_check,
        CASE
            WHEN v_check IS NULL AND privacy.key_check IS NULL THEN 'none is needed'
            WHEN v_check IS NULL THEN 'it is missing, as after a restore: events that need it wait'
            WHEN v_check = privacy.key_check THEN 'it is the one that the hashes were made with'
            ELSE 'it is not the one that the hashes were made with'
        END
    INTO ok, message FROM spectrum.privacy;
    what_to_do := 'SELECT spectrum.set_pii_key(the key that you kept);';
END
$$;
COMMENT ON FUNCTION spectrum._check_pii_key() IS 'Check of health(): the key, and that it fits.';
