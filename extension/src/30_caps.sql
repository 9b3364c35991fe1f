-- Room 30, caps: how much of what is new one account may bring in a day: event types and places;
-- and how many accounts all together. An event over a cap fails and stays as it came, and it is
-- counted. Users are not capped: there is no end to them by nature.
--
-- What is new is counted when it is let in, in rows that are only added: two workers never wait
-- for each other here. What both let in at the same time may exceed a cap, by a batch each.

CREATE FUNCTION spectrum._create_caps()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.cap_notes') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.cap_notes (
        day date NOT NULL,
        cap text NOT NULL CONSTRAINT cap_notes_cap_is_known CHECK (cap IN (
            'max_payload_bytes', 'max_properties',
            'max_new_event_types', 'max_new_places', 'max_new_accounts'
        )),
        account_id text COLLATE "C" NOT NULL,
        members bigint NOT NULL DEFAULT 0,
        refused bigint NOT NULL DEFAULT 0
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
    CREATE INDEX cap_notes_day_cap_idx ON spectrum.cap_notes (day, cap, account_id);
    COMMENT ON TABLE spectrum.cap_notes IS
        'What the caps of spectrum.config let in and refused, rows of sums: each batch adds its '
        'own, upkeep makes one of them.';
    COMMENT ON COLUMN spectrum.cap_notes.day IS 'Day of processing, in config.timezone.';
    COMMENT ON COLUMN spectrum.cap_notes.cap IS 'The setting.';
    COMMENT ON COLUMN spectrum.cap_notes.account_id IS
        'Whose; empty where events name no account, * where the account is not among the known.';
    COMMENT ON COLUMN spectrum.cap_notes.members IS 'New members that were let in.';
    COMMENT ON COLUMN spectrum.cap_notes.refused IS 'Events that failed because of the cap.';

    CREATE VIEW spectrum.refusals AS
    SELECT note.account_id, note.day, note.cap, sum(note.refused)::bigint AS events
    FROM spectrum.cap_notes AS note
    GROUP BY note.account_id, note.day, note.cap
    HAVING sum(note.refused) > 0;
    COMMENT ON VIEW spectrum.refusals IS
        'How many events failed because they were over a cap, per account, day and cap. An event '
        'that is tried again and refused again counts again.';
    COMMENT ON COLUMN spectrum.refusals.account_id IS
        'Whose; empty where events name no account, * where the account is not among the known.';
    COMMENT ON COLUMN spectrum.refusals.day IS 'Day of processing, in config.timezone.';
    COMMENT ON COLUMN spectrum.refusals.cap IS 'The setting of spectrum.config.';
    COMMENT ON COLUMN spectrum.refusals.events IS 'Events that failed.';
END
$$;
COMMENT ON FUNCTION spectrum._create_caps() IS
    'Room 30: makes spectrum.cap_notes and spectrum.refusals.';

CREATE FUNCTION spectrum._room_left(p_cap text, p_account_id text)
RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT CASE p_cap
            WHEN 'max_new_event_types' THEN config.max_new_event_types
            WHEN 'max_new_places' THEN config.max_new_places
            WHEN 'max_new_accounts' THEN config.max_new_accounts
        END FROM spectrum.config
    ) - (
        SELECT coalesce(sum(note.members), 0) FROM spectrum.cap_notes AS note
        WHERE note.day = spectrum.period_date(now()) AND note.cap = p_cap
            AND note.account_id = p_account_id
    );
END
$$;
COMMENT ON FUNCTION spectrum._room_left(text, text) IS
    'How many new members a cap still lets in today; negative where workers exceeded it.';

CREATE FUNCTION spectrum._refuse_newcomers(p_cap text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- An account's newcomers count in the order of receipt. One that several accounts name in
    -- this batch comes in where one of them has room for it.
    WITH newcomers AS MATERIALIZED (
        SELECT
            batch.seq,
            CASE p_cap WHEN 'max_new_accounts' THEN '*' ELSE batch.account_id END AS owner,
            CASE p_cap
                WHEN 'max_new_accounts' THEN to_jsonb(batch.account_id)
                WHEN 'max_new_event_types' THEN to_jsonb(batch.event_type)
                ELSE jsonb_build_object(
                    'country', batch.country, 'region', batch.region, 'city', batch.city)
            END AS member
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND CASE p_cap
            WHEN 'max_new_accounts' THEN batch.account_key IS NULL
            WHEN 'max_new_event_types' THEN batch.event_type_key IS NULL
            ELSE batch.geo_key IS NULL
        END
    ), named AS (
        SELECT newcomers.owner, newcomers.member, row_number() OVER (
                PARTITION BY newcomers.owner ORDER BY min(newcomers.seq)
            ) AS place
        FROM newcomers
        GROUP BY newcomers.owner, newcomers.member
    ), rooms AS MATERIALIZED (
        SELECT owners.owner, spectrum._room_left(p_cap, owners.owner) AS places
        FROM (SELECT DISTINCT newcomers.owner FROM newcomers) AS owners
    ), admitted AS (
        SELECT DISTINCT named.member
        FROM named JOIN rooms USING (owner)
        WHERE named.place <= rooms.places
    ), refused AS (
        SELECT newcomers.seq, newcomers.member
        FROM newcomers LEFT JOIN admitted USING (member)
        WHERE admitted.member IS NULL
    )
    UPDATE pg_temp.spectrum_batch AS batch
    SET is_readable = false,
        refused_by = p_cap,
        error_msg = spectrum._complain_of_cap(p_cap, refused.member)
    FROM refused
    WHERE batch.seq = refused.seq;
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION spectrum._refuse_newcomers(text) IS
    'Fails the events of the batch whose event type, place or account is new and over a cap. True '
    'where there are any.';

CREATE FUNCTION spectrum._complain_of_cap(p_cap text, p_member jsonb)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT CASE p_cap
            WHEN 'max_new_accounts' THEN spectrum._complaint('account_id', format(
                'at most %s new ones a day (config.%s)', config.max_new_accounts, p_cap), p_member)
            WHEN 'max_new_event_types' THEN spectrum._complaint('event_type', format(
                'at most %s new ones a day from an account (config.%s)',
                config.max_new_event_types, p_cap), p_member)
            ELSE spectrum._complaint('geo', format(
                'at most %s new places a day from an account (config.%s)',
                config.max_new_places, p_cap), p_member)
        END
        FROM spectrum.config
    );
END
$$;
COMMENT ON FUNCTION spectrum._complain_of_cap(text, jsonb) IS
    'The message of an event that a cap on what is new refused.';

CREATE FUNCTION spectrum._note_members(p_cap text, p_account_ids text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO spectrum.cap_notes (day, cap, account_id, members)
    SELECT spectrum.period_date(now()), p_cap, owner.account_id, count(*)
    FROM unnest(p_account_ids) AS owner (account_id)
    GROUP BY owner.account_id;
END
$$;
COMMENT ON FUNCTION spectrum._note_members(text, text[]) IS
    'Notes the members that were let in, each by the account that it counts for.';

CREATE FUNCTION spectrum._note_refusals()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- By account only where it is known: names that somebody makes up are not to fill a table.
    INSERT INTO spectrum.cap_notes (day, cap, account_id, refused)
    SELECT spectrum.period_date(now()), refused.refused_by, refused.owner, count(*)
    FROM (
        SELECT batch.refused_by, coalesce((
            SELECT dim.account_id FROM warehouse.dim_accounts AS dim
            WHERE dim.account_id = batch.account_id AND batch.refused_by <> 'max_new_accounts'
        ), '*') AS owner
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.refused_by IS NOT NULL
    ) AS refused
    GROUP BY refused.refused_by, refused.owner;
END
$$;
COMMENT ON FUNCTION spectrum._note_refusals() IS
    'Notes how many events of the batch the caps refused.';

CREATE FUNCTION spectrum._tidy_cap_notes()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_today date := spectrum.period_date(now());
BEGIN
    WITH taken AS (
        DELETE FROM spectrum.cap_notes AS note
        WHERE (note.day < v_today AND note.refused = 0)
            OR note.day < v_today - (SELECT config.run_log_keep FROM spectrum.config)
            OR (note.day, note.cap, note.account_id) IN (
                SELECT several.day, several.cap, several.account_id
                FROM spectrum.cap_notes AS several
                GROUP BY several.day, several.cap, several.account_id
                HAVING count(*) > 1
            )
        RETURNING note.day, note.cap, note.account_id, note.members, note.refused
    )
    INSERT INTO spectrum.cap_notes (day, cap, account_id, members, refused)
    SELECT taken.day, taken.cap, taken.account_id, sum(taken.members), sum(taken.refused)
    FROM taken
    WHERE taken.day >= v_today - (SELECT config.run_log_keep FROM spectrum.config)
    GROUP BY taken.day, taken.cap, taken.account_id
    HAVING taken.day = v_today OR sum(taken.refused) > 0;
END
$$;
COMMENT ON FUNCTION spectrum._tidy_cap_notes() IS
    'Makes one row of what batches noted of an account, day and cap; forgets days that refused '
    'nothing, and what is older than config.run_log_keep.';
