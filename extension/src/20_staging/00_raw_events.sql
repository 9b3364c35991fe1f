-- Room 20: staging. Events arrive in raw_events untouched and stay as they came; status says how
-- far each one is. What is claimed next is found without an index on status, because such an
-- index would make every status update write new index entries (655 against 84 bytes of WAL per
-- event). Instead:
--   seq      receive order, indexed. Claims walk it from spectrum.intake.head_seq on.
--   requeue  the exceptions, by seq: rows set back to pending, rows to retry, lapsed leases.
-- Pages are filled by half, so that all rows of a page can be marked in place (HOT).

CREATE FUNCTION spectrum._create_raw_events()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('@extschema@.raw_events') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE @extschema@.raw_events (
        id uuid NOT NULL DEFAULT gen_random_uuid() CONSTRAINT raw_events_pkey PRIMARY KEY,
        payload jsonb NOT NULL,
        received_at timestamptz NOT NULL DEFAULT now(),
        status text NOT NULL DEFAULT 'pending'
            CONSTRAINT raw_events_status_is_known
            CHECK (status IN ('pending', 'processing', 'done', 'failed')),
        processed_at timestamptz,
        error_msg text,
        seq bigint NOT NULL GENERATED ALWAYS AS IDENTITY
            CONSTRAINT raw_events_seq_key UNIQUE,
        attempts integer NOT NULL DEFAULT 0,
        next_attempt_at timestamptz,
        copy_of uuid,
        treated text[]
    ) WITH (
        fillfactor = 50,
        autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05
    );
    -- NULL for all but copies, so marking an ordinary event does not touch this index.
    CREATE INDEX raw_events_copy_of_idx ON @extschema@.raw_events (copy_of)
    WHERE copy_of IS NOT NULL;

    COMMENT ON TABLE @extschema@.raw_events IS
        'Events as they arrived, one row each. Insert a payload; the rest is Spectrum''s.';
    COMMENT ON COLUMN @extschema@.raw_events.id IS
        'Identity of the row; also the event_id where the payload has none.';
    COMMENT ON COLUMN @extschema@.raw_events.payload IS
        'The event as sent: event_id, event_type, account_id, user_id, occurred_at (or timestamp), '
        'geo {country, region, city}, properties. Never changed after the insert, except by '
        'spectrum.forget_user.';
    COMMENT ON COLUMN @extschema@.raw_events.received_at IS 'Start of the inserting transaction.';
    COMMENT ON COLUMN @extschema@.raw_events.status IS
        'pending, processing (outside workers only), done or failed. Set it back to pending to '
        'have the event read again.';
    COMMENT ON COLUMN @extschema@.raw_events.processed_at IS 'When it became done or failed.';
    COMMENT ON COLUMN @extschema@.raw_events.error_msg IS
        'Why it failed: the field, what was expected, the value.';
    COMMENT ON COLUMN @extschema@.raw_events.seq IS
        'Receive order. Of several rows with one event_id the lowest counts.';
    COMMENT ON COLUMN @extschema@.raw_events.attempts IS 'How often it was processed.';
    COMMENT ON COLUMN @extschema@.raw_events.next_attempt_at IS
        'When a failed event is tried again; NULL where its cause cannot pass.';
    COMMENT ON COLUMN @extschema@.raw_events.copy_of IS
        'id of the row whose event_id this one repeats; a copy is done and changes no number.';
    COMMENT ON COLUMN @extschema@.raw_events.treated IS
        'Fields of the payload that hold hashes, made by PII rules at the door (spectrum.capture).';
END
$$;
COMMENT ON FUNCTION spectrum._create_raw_events() IS
    'Room 20: makes raw_events.';

CREATE FUNCTION spectrum._create_intake()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.requeue') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.requeue (
        seq bigint NOT NULL CONSTRAINT requeue_pkey PRIMARY KEY,
        due_at timestamptz NOT NULL
    );
    COMMENT ON TABLE spectrum.requeue IS
        'Rows of raw_events to claim out of turn: set back to pending, due for a retry, or left in '
        'processing by an outside worker.';
    COMMENT ON COLUMN spectrum.requeue.seq IS 'raw_events.seq.';
    COMMENT ON COLUMN spectrum.requeue.due_at IS 'Not claimed before.';

    CREATE TABLE spectrum.intake (
        is_only boolean NOT NULL DEFAULT true
            CONSTRAINT intake_pkey PRIMARY KEY
            CONSTRAINT intake_is_one_row CHECK (is_only),
        head_seq bigint NOT NULL DEFAULT 0,
        safe_seq bigint NOT NULL DEFAULT 0,
        seen_seq bigint NOT NULL DEFAULT 0,
        seen_writers text[],
        patrol_seq bigint NOT NULL DEFAULT 0,
        late_seq bigint NOT NULL DEFAULT 0
    );
    COMMENT ON TABLE spectrum.intake IS 'Where claims begin, one row. Hints only: no event depends '
        'on them being right, a stale one costs time.';
    COMMENT ON COLUMN spectrum.intake.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.intake.head_seq IS
        'Everything below was claimed once, was left behind (spectrum.floods), or was not visible '
        'yet. Claims begin here.';
    COMMENT ON COLUMN spectrum.intake.safe_seq IS
        'Nothing below is pending. Between here and head_seq lie late commits, rows of workers '
        'that were rolled back, and what floods left behind: swept when the head is drained.';
    COMMENT ON COLUMN spectrum.intake.seen_seq IS 'head_seq when seen_writers was noted.';
    COMMENT ON COLUMN spectrum.intake.seen_writers IS
        'Transactions that were writing to raw_events then, as in pg_locks: once none of them '
        'runs, safe_seq may move to seen_seq.';
    COMMENT ON COLUMN spectrum.intake.patrol_seq IS
        'How far the slow round over all of raw_events has come.';
    COMMENT ON COLUMN spectrum.intake.late_seq IS
        'During a flood: between here and head_seq may be late commits of others.';
    INSERT INTO spectrum.intake DEFAULT VALUES;

    CREATE TRIGGER raw_events_requeue
    AFTER UPDATE OF status ON @extschema@.raw_events
    FOR EACH ROW
    WHEN (new.status IN ('pending', 'processing') AND old.status <> new.status)
    EXECUTE FUNCTION spectrum._requeue_row();
    COMMENT ON TRIGGER raw_events_requeue ON @extschema@.raw_events IS
        'A row set back to pending, or taken by an outside worker, is found again by its seq.';
END
$$;
COMMENT ON FUNCTION spectrum._create_intake() IS
    'Room 20: makes spectrum.requeue and spectrum.intake, and the trigger that feeds the one.';

CREATE FUNCTION spectrum._requeue_row()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO spectrum.requeue AS known (seq, due_at)
    SELECT
        new.seq,
        CASE new.status WHEN 'pending' THEN now() ELSE now() + config.processing_lease END
    FROM spectrum.config
    ON CONFLICT (seq) DO UPDATE SET due_at = excluded.due_at;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION spectrum._requeue_row() IS
    'Trigger of raw_events: notes a row to claim out of turn, a processing row for the end of its '
    'lease.';
