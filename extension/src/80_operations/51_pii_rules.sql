-- Room 80, personal data: rules and the key, set and checked. What they do is in
-- 20_staging/05_pii.sql.

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
    -- Hints, which name accounts as they were called until now.
    DELETE FROM spectrum.floods;
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
