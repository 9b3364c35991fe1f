-- Room 13, the horizon: how far back facts go. Months of facts that are old enough can be purged
-- (80_operations/55_purge_facts.sql); the sums that were made of them stay. Between what is
-- purged and what is open lies a guard: facts that are still there, as far as any report looks back
-- around a new event. Nothing that occurred before the end of the guard comes, goes or
-- changes any more, so a sum never depends on a fact that is gone.
--
--        purged              guard                     open
--   ------------------|-----------------|------------------------------->  occurred_at
--                facts_from         open_from
--
-- Months can be packed instead (53_pack_facts.sql): frozen in the same way, so nothing that keeps
-- sums reads them any more, but questions do. These lie between packed_from and facts_from.

CREATE FUNCTION spectrum._create_horizon()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.horizon') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.horizon (
        is_only boolean NOT NULL DEFAULT true
            CONSTRAINT horizon_pkey PRIMARY KEY
            CONSTRAINT horizon_is_one_row CHECK (is_only),
        facts_from timestamptz,
        open_from timestamptz
            CONSTRAINT horizon_guards_what_is_purged
            CHECK (facts_from IS NULL OR (open_from IS NOT NULL AND open_from > facts_from)),
        packed_from timestamptz
            CONSTRAINT horizon_packs_what_is_frozen
            CHECK (packed_from IS NULL OR (facts_from IS NOT NULL AND packed_from < facts_from)),
        packed_without text
            CONSTRAINT horizon_packed_without_is_known
            CHECK (packed_without IN ('sums', 'days'))
    );
    COMMENT ON TABLE spectrum.horizon IS
        'How far back facts go, one row. Moved by purge_facts() and pack_facts() alone.';
    COMMENT ON COLUMN spectrum.horizon.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.horizon.facts_from IS
        'Facts that occurred before are purged or packed: what the standing views count of them '
        'is frozen. NULL: none are.';
    COMMENT ON COLUMN spectrum.horizon.open_from IS
        'Events that occurred before are closed: they fail, and raw events that were such events '
        'stay what they are. NULL: all are open.';
    COMMENT ON COLUMN spectrum.horizon.packed_from IS
        'Facts that occurred from here to facts_from are packed, or about to be: questions read '
        'them still. NULL: none are.';
    COMMENT ON COLUMN spectrum.horizon.packed_without IS
        'What counts packed facts that were erased still: sums, but for those of days; or days '
        'too, and questions by day read the facts. NULL: nothing.';
    INSERT INTO spectrum.horizon DEFAULT VALUES;
END
$$;
COMMENT ON FUNCTION spectrum._create_horizon() IS 'Room 13: makes spectrum.horizon and its row.';

CREATE FUNCTION spectrum._facts_from()
RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce((SELECT horizon.facts_from FROM spectrum.horizon), '-infinity');
END
$$;
COMMENT ON FUNCTION spectrum._facts_from() IS
    'From when on there are facts that are neither purged nor packed; -infinity where all are.';

CREATE FUNCTION spectrum._hold_horizon()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(spectrum._lock_key('horizon'));
    -- A snapshot older than the lock may not show the row as it is: then 40001.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        PERFORM FROM spectrum.horizon FOR SHARE;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._hold_horizon() IS
    'Keeps what is open open until the end of the transaction.';

CREATE FUNCTION spectrum._closed_expectation(p_open_from timestamptz)
RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO'
AS $$
    SELECT 'a time from ' || (p_open_from AT TIME ZONE 'UTC')::text
        || ' UTC (what is older is closed, see spectrum.horizon) on'
$$;
COMMENT ON FUNCTION spectrum._closed_expectation(timestamptz) IS
    'What is expected of the time of an event, where older ones are closed.';
