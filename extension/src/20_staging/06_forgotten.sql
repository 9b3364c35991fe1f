-- Room 20, who is forgotten: users whose events are kept out, known by a salted hash of the user_id
-- alone. spectrum.forget_user (80_operations/56_forget_user.sql) writes them down, spectrum.capture
-- and each batch (40_facts/07_privacy.sql) ask.

CREATE FUNCTION spectrum._create_forgotten()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.forgotten') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.forgotten (
        digest bytea NOT NULL,
        is_whole boolean NOT NULL,
        event_type text COLLATE "C",
        from_at timestamptz NOT NULL DEFAULT '-infinity',
        to_at timestamptz NOT NULL DEFAULT 'infinity',
        forgotten_at timestamptz NOT NULL DEFAULT now(),
        done_at timestamptz
    );
    CREATE INDEX forgotten_digest_idx ON spectrum.forgotten (digest);
    COMMENT ON TABLE spectrum.forgotten IS
        'Whose events are kept out. The names are not in it: whoever has a name and the salt in '
        'spectrum.privacy can tell whether it was forgotten.';
    COMMENT ON COLUMN spectrum.forgotten.digest IS 'SHA-256 of the salt and the user_id.';
    COMMENT ON COLUMN spectrum.forgotten.is_whole IS
        'All his events; else those of event_type in [from_at, to_at).';
    COMMENT ON COLUMN spectrum.forgotten.event_type IS 'NULL: any.';
    COMMENT ON COLUMN spectrum.forgotten.from_at IS 'By occurred_at.';
    COMMENT ON COLUMN spectrum.forgotten.to_at IS 'By occurred_at.';
    COMMENT ON COLUMN spectrum.forgotten.forgotten_at IS 'Since when they are kept out.';
    COMMENT ON COLUMN spectrum.forgotten.done_at IS
        'When all that was there of him was gone; NULL under way.';
END
$$;
COMMENT ON FUNCTION spectrum._create_forgotten() IS
    'Room 20: makes spectrum.forgotten.';

CREATE FUNCTION spectrum._digest(p_user_id text)
RETURNS bytea
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT sha256(privacy.salt || convert_to(p_user_id, 'UTF8')) FROM spectrum.privacy);
END
$$;
COMMENT ON FUNCTION spectrum._digest(text) IS 'What spectrum.forgotten knows a user by.';

CREATE FUNCTION spectrum._is_forgotten(p_payload jsonb)
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM spectrum.forgotten
        WHERE forgotten.is_whole AND forgotten.digest = spectrum._digest(p_payload ->> 'user_id')
    );
END
$$;
COMMENT ON FUNCTION spectrum._is_forgotten(jsonb) IS
    'Whether all events of the user that a payload names are kept out.';

CREATE FUNCTION spectrum._forgotten_payload()
RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb '{"forgotten": true}'
$$;
COMMENT ON FUNCTION spectrum._forgotten_payload() IS
    'What stands in the place of a payload of somebody who was forgotten.';
