-- Room 40, privacy of a batch: what was read and may not come in. Whose event is it, and is there a
-- key for what is to be hashed? Called by 10_batch.sql and 15_load.sql.

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
            -- spectrum._digest() as it stands: a call costs each event 2.5 us, twice.
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
