-- Room 40: facts. One row an event, in month partitions (UTC) of warehouse.fact_events. The key
-- (user_key, occurred_at, event_id) is at once the user's timeline; that an event_id counts once
-- across all months is kept by warehouse.event_ledger, which also leads from a fact to its raw row.

CREATE FUNCTION spectrum._create_facts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('warehouse.fact_events') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE warehouse.fact_events (
        event_id uuid NOT NULL,
        occurred_at timestamptz NOT NULL,
        account_key bigint NOT NULL,
        user_key bigint NOT NULL,
        event_type_key integer NOT NULL,
        geo_key integer NOT NULL,
        properties jsonb NOT NULL,
        revenue numeric,
        currency text,
        CONSTRAINT fact_events_pkey PRIMARY KEY (user_key, occurred_at, event_id),
        CONSTRAINT fact_events_money_has_currency CHECK ((revenue IS NULL) = (currency IS NULL))
    ) PARTITION BY RANGE (occurred_at);
    CREATE INDEX fact_events_type_user_time_idx
    ON warehouse.fact_events (event_type_key, user_key, occurred_at);

    COMMENT ON TABLE warehouse.fact_events IS
        'Events, each once, by month (UTC). Every key exists in its dimension: process_batch holds '
        'the dimension rows while it inserts, spectrum.verify() proves it.';
    COMMENT ON COLUMN warehouse.fact_events.event_id IS 'Unique for ever: see event_ledger.';
    COMMENT ON COLUMN warehouse.fact_events.occurred_at IS 'When it happened, by the sender.';
    COMMENT ON COLUMN warehouse.fact_events.account_key IS 'dim_accounts; 0 unknown.';
    COMMENT ON COLUMN warehouse.fact_events.user_key IS 'dim_users; 0 unknown.';
    COMMENT ON COLUMN warehouse.fact_events.event_type_key IS 'dim_event_types.';
    COMMENT ON COLUMN warehouse.fact_events.geo_key IS 'dim_geography; 0 unknown.';
    COMMENT ON COLUMN warehouse.fact_events.properties IS 'As sent; an object, {} where missing.';
    COMMENT ON COLUMN warehouse.fact_events.revenue IS 'Amount, NULL where it carries no money.';
    COMMENT ON COLUMN warehouse.fact_events.currency IS 'Of the amount, three capital letters.';

    CREATE TABLE warehouse.event_ledger (
        event_id uuid NOT NULL CONSTRAINT event_ledger_pkey PRIMARY KEY,
        seq bigint NOT NULL,
        occurred_at timestamptz NOT NULL,
        user_key bigint NOT NULL
    );
    COMMENT ON TABLE warehouse.event_ledger IS
        'Every event_id that counts, once: the guard against copies, and the way from an event_id '
        'to its raw row (seq) and its fact (user_key, occurred_at).';
    COMMENT ON COLUMN warehouse.event_ledger.event_id IS 'The event.';
    COMMENT ON COLUMN warehouse.event_ledger.seq IS 'raw_events.seq of the row that counts.';
    COMMENT ON COLUMN warehouse.event_ledger.occurred_at IS 'As in the fact.';
    COMMENT ON COLUMN warehouse.event_ledger.user_key IS 'As in the fact.';
END
$$;
COMMENT ON FUNCTION spectrum._create_facts() IS
    'Room 40: makes warehouse.fact_events (without months) and warehouse.event_ledger.';

CREATE FUNCTION spectrum._months(p_from timestamptz, p_to timestamptz)
RETURNS SETOF date
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT generate_series(
        date_trunc('month', p_from AT TIME ZONE 'UTC'),
        date_trunc('month', p_to AT TIME ZONE 'UTC'),
        interval '1 month'
    )::date
$$;
COMMENT ON FUNCTION spectrum._months(timestamptz, timestamptz) IS
    'First days of the months (UTC) from that of p_from to that of p_to, both included.';

CREATE FUNCTION spectrum._month_name(p_month date)
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'fact_events_' || to_char(p_month, 'YYYY_MM')
$$;
COMMENT ON FUNCTION spectrum._month_name(date) IS 'Name of the partition of a month.';

CREATE FUNCTION spectrum._fact_months()
RETURNS TABLE (name text, ends_at timestamptz, is_attached boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT month.relname::text,
        (to_date(right(month.relname, 7), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC',
        month.relispartition
    FROM pg_class AS month
    WHERE month.relnamespace = 'warehouse'::regnamespace AND month.relkind = 'r'
        AND month.relname ~ '^fact_events_[0-9]{4}_[0-9]{2}$';
END
$$;
COMMENT ON FUNCTION spectrum._fact_months() IS
    'The months of facts; one that is not attached is about to be dropped.';

CREATE FUNCTION spectrum._bound_lock_waits(p_times integer DEFAULT 1)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_before text := current_setting('lock_timeout');
BEGIN
    PERFORM set_config('lock_timeout',
        ceil(extract(epoch FROM config.lock_timeout) * 1000 * p_times)::text || 'ms', true)
    FROM spectrum.config;
    RETURN v_before;
END
$$;
COMMENT ON FUNCTION spectrum._bound_lock_waits(integer) IS
    'Sets lock_timeout to so many times config.lock_timeout and returns what it was, for who sets '
    'it back.';

CREATE FUNCTION spectrum._wait_for_lock(p_name text, p_times integer, p_is_shared boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_wait text := spectrum._bound_lock_waits(p_times);
BEGIN
    IF p_is_shared THEN
        PERFORM pg_advisory_xact_lock_shared(spectrum._lock_key(p_name));
    ELSE
        PERFORM pg_advisory_xact_lock(spectrum._lock_key(p_name));
    END IF;
    PERFORM set_config('lock_timeout', v_wait, true);
END
$$;
COMMENT ON FUNCTION spectrum._wait_for_lock(text, integer, boolean) IS
    'Takes an advisory lock until the transaction ends; raises 55P03 where others do not let go of '
    'it within so many times config.lock_timeout.';

CREATE FUNCTION spectrum._add_month(p_month date)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO'
AS $$
DECLARE
    v_name text := spectrum._month_name(p_month);
    v_from timestamptz := p_month::timestamp AT TIME ZONE 'UTC';
    v_to timestamptz := (p_month + interval '1 month') AT TIME ZONE 'UTC';
    v_wait text;
    v_is_made boolean := true;
BEGIN
    IF to_regclass('warehouse.' || v_name) IS NOT NULL OR v_to <= spectrum._facts_from() THEN
        RETURN false;
    END IF;

    -- For a worker whose batch makes months too, longer: this wait keeps nobody from reading.
    PERFORM spectrum._wait_for_lock('months', 10, false);
    v_wait := spectrum._bound_lock_waits();
    BEGIN
        -- LIKE and ATTACH, because PARTITION OF would lock the readers of all months out.
        EXECUTE format('CREATE TABLE warehouse.%I (LIKE warehouse.fact_events INCLUDING DEFAULTS '
            'INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING COMPRESSION)', v_name);
        EXECUTE format('COMMENT ON TABLE warehouse.%I IS %L', v_name,
            format('Events of %s (UTC).', to_char(p_month, 'YYYY-MM')));
        EXECUTE format('ALTER TABLE warehouse.fact_events ATTACH PARTITION warehouse.%I '
            'FOR VALUES FROM (%L) TO (%L)', v_name, v_from, v_to);
    EXCEPTION
        -- Another worker made it while this one waited for its turn. To look again would not do:
        -- that a name is missing is remembered.
        WHEN duplicate_table THEN
            v_is_made := false;
    END;
    PERFORM set_config('lock_timeout', v_wait, true);
    RETURN v_is_made;
END
$$;
COMMENT ON FUNCTION spectrum._add_month(date) IS
    'Makes the partition of one month (its first day) unless it is there, or was purged. Readers '
    'go on reading; raises 55P03 where a lock cannot be had within config.lock_timeout, or where '
    'another transaction that makes months does not end within ten times that.';

CREATE FUNCTION spectrum.ensure_partitions(p_from timestamptz, p_to timestamptz)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_made integer;
BEGIN
    IF p_from IS NULL OR NOT isfinite(p_from) OR extract(year FROM p_from) < 1900 THEN
        PERFORM spectrum._reject('p_from', p_from::text, 'a time from the year 1900 on');
    END IF;
    IF p_to IS NULL OR NOT isfinite(p_to) OR p_to < p_from
        OR p_to > p_from + interval '200 years'
    THEN
        PERFORM spectrum._reject('p_to', p_to::text, 'a time from p_from to 200 years later');
    END IF;
    SELECT count(*) FILTER (WHERE spectrum._add_month(month)) INTO v_made
    FROM spectrum._months(p_from, p_to) AS month;
    RETURN v_made;
END
$$;
COMMENT ON FUNCTION spectrum.ensure_partitions(timestamptz, timestamptz) IS
    'Makes the month partitions (UTC) from the month of p_from to the month of p_to, both '
    'included, and returns how many were missing.';
