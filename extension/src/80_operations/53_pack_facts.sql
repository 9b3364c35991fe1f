-- Room 80, packing: months that are old enough are closed and frozen, as for a purge
-- (55_purge_facts.sql), but their facts stay to be asked for, in a sixth of the space
-- (60_analytics/00_packed.sql). Month by month from the oldest:
--   freeze    what was counted of it stays as it is; nobody but questions reads its facts any more
--   pack      100,000 events a step are written down packed, and read by nobody yet
--   wait      until all transactions are over that may not see the last of these
--   change    the questions' view reads what is packed, and the partition is detached
--   drop      the partition
-- So an event is never in two places, nor in none, for anybody.

CREATE FUNCTION spectrum._check_pack_facts(p_arguments jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- What holds for those who keep numbers holds here.
    PERFORM spectrum._check_purge_facts(p_arguments);
END
$$;
COMMENT ON FUNCTION spectrum._check_pack_facts(jsonb) IS 'Refuses what pack_facts cannot take.';

CREATE FUNCTION spectrum._open_transactions()
RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        SELECT held.virtualxid
        FROM pg_locks AS held
        JOIN pg_stat_activity AS session USING (pid)
        WHERE held.locktype = 'virtualxid' AND held.granted AND held.pid <> pg_backend_pid()
            AND session.backend_type IS DISTINCT FROM 'autovacuum worker'
            AND session.datid = (
                SELECT own.oid FROM pg_database AS own WHERE own.datname = current_database()
            )
        ORDER BY held.virtualxid
    );
END
$$;
COMMENT ON FUNCTION spectrum._open_transactions() IS
    'The transactions of other sessions in this database: each may read by an older snapshot.';

CREATE FUNCTION spectrum._are_over(p_transactions jsonb)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_until timestamptz := clock_timestamp()
        + (SELECT config.lock_timeout FROM spectrum.config);
BEGIN
    WHILE p_transactions ?| spectrum._open_transactions() LOOP
        IF clock_timestamp() >= v_until THEN
            RETURN false;
        END IF;
        PERFORM pg_sleep(0.02);
    END LOOP;
    RETURN true;
END
$$;
COMMENT ON FUNCTION spectrum._are_over(jsonb) IS
    'Whether transactions are over; waits for them for config.lock_timeout.';

CREATE FUNCTION spectrum._change_over(p_name text, p_month date)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_facts bigint := (
        SELECT count(*) FROM warehouse.fact_events AS fact
        WHERE fact.occurred_at >= p_month::timestamp AT TIME ZONE 'UTC'
            AND fact.occurred_at < (p_month + interval '1 month') AT TIME ZONE 'UTC'
    );
    v_packed bigint := (
        SELECT coalesce(sum(chunk.events), 0) FROM warehouse.packed_events AS chunk
        WHERE chunk.month = p_month
    );
BEGIN
    IF v_facts <> v_packed THEN
        RAISE EXCEPTION '% of % events of % are packed', v_packed, v_facts, p_name
            USING
                ERRCODE = 'data_corrupted',
                HINT = 'Nothing is lost. Facts of a closed month were changed by hand: have it '
                    'packed anew, DELETE FROM warehouse.packed_events WHERE month = '
                    || quote_literal(p_month) || ';';
    END IF;
    -- The view first, as readers do.
    PERFORM spectrum._show_packed(p_month);
    EXECUTE format('ALTER TABLE warehouse.fact_events DETACH PARTITION warehouse.%I', p_name);
END
$$;
COMMENT ON FUNCTION spectrum._change_over(text, date) IS
    'Has questions read the packed events of a month, and not its partition, from the commit on. '
    'Raises XX001 where they are not as many.';

CREATE FUNCTION spectrum._pack_one_step(p_until timestamptz, p_outcome jsonb, OUT outcome jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_facts_from timestamptz := spectrum._facts_from();
    v_readable_from timestamptz := spectrum._readable_from();
    v_packed bigint;
    v_month date;
    r_month record;
BEGIN
    outcome := p_outcome || '{"step": null}';
    IF spectrum._drop_detached() > 0 THEN
        outcome := outcome || '{"step": "dropped"}';
        RETURN;
    END IF;
    SELECT month.* INTO r_month FROM spectrum._fact_months() AS month
    WHERE month.ends_at > v_readable_from AND month.ends_at <= greatest(p_until, v_facts_from)
    ORDER BY month.ends_at
    LIMIT 1;
    IF r_month.name IS NULL THEN
        RETURN;
    ELSIF r_month.ends_at > v_facts_from THEN
        outcome := outcome || jsonb_build_object(
            'step', spectrum._freeze_one_step(r_month.ends_at, true));
        RETURN;
    END IF;

    IF NOT spectrum._are_over(nullif(outcome -> 'open', 'null')) THEN
        RAISE EXCEPTION 'transactions are open that began before the last events of % were packed',
            r_month.name
            USING ERRCODE = 'lock_not_available',
                HINT = 'It goes on when they are over. Which are old: spectrum.health().';
    END IF;
    -- Who is forgotten is so in what is packed too: one after the other.
    PERFORM spectrum._hold_reports();
    v_month := to_date(right(r_month.name, 7), 'YYYY_MM');
    v_packed := spectrum._pack_some(v_month, 100000);
    IF v_packed > 0 THEN
        outcome := outcome || jsonb_build_object('step', 'packed', 'open', NULL,
            'events', coalesce((outcome ->> 'events')::bigint, 0) + v_packed);
    ELSIF nullif(outcome -> 'open', 'null') IS NULL THEN
        outcome := outcome || jsonb_build_object('step', 'waiting',
            'open', to_jsonb(spectrum._open_transactions()));
    ELSE
        PERFORM spectrum._change_over(r_month.name, v_month);
        outcome := outcome || jsonb_build_object('step', 'changed', 'open', NULL,
            'months', coalesce((outcome ->> 'months')::bigint, 0) + 1);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._pack_one_step(timestamptz, jsonb) IS
    'Does the next thing on the way of the oldest month before p_until, and says what it did '
    '(step; NULL where no month is left) and what came of all so far.';

CREATE FUNCTION spectrum._do_pack_facts(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_task record;
    v_until timestamptz;
    v_has_months boolean;
    v_outcome jsonb;
    v_wait text := spectrum._bound_lock_waits();
BEGIN
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('purge'));
    SELECT task.position, task.total, task.arguments, task.outcome INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    PERFORM spectrum._check_pack_facts(r_task.arguments);
    IF r_task.total IS NULL THEN
        v_until := date_trunc(
            'month', now() - (r_task.arguments ->> 'older_than')::interval, 'UTC'
        );
        v_has_months := EXISTS (
            SELECT FROM spectrum._fact_months() AS month
            WHERE month.is_attached AND month.ends_at > spectrum._readable_from()
                AND month.ends_at <= greatest(v_until, spectrum._facts_from())
        );
        r_task.total := (
            SELECT count(*) FROM warehouse.fact_events AS fact
            WHERE fact.occurred_at >= spectrum._readable_from()
                AND fact.occurred_at < greatest(v_until, spectrum._facts_from())
        );
        IF v_has_months THEN
            PERFORM spectrum._close_months(v_until);
        END IF;
        v_outcome := jsonb_build_object('months', 0, 'events', 0,
            'step', CASE WHEN v_has_months THEN 'closed' END);
    ELSE
        v_until := to_timestamp(r_task.position);
        v_outcome := spectrum._pack_one_step(v_until, r_task.outcome);
    END IF;
    PERFORM set_config('lock_timeout', v_wait, true);

    UPDATE spectrum.tasks AS task
    SET position = extract(epoch FROM v_until)::bigint,
        total = r_task.total,
        done = (v_outcome ->> 'events')::bigint,
        unit = 'events',
        outcome = CASE WHEN v_outcome ->> 'step' IS NULL
            THEN v_outcome - '{step, open}'::text[] ELSE v_outcome END
    WHERE task.task_id = p_task_id;
    RETURN v_outcome ->> 'step' IS NOT NULL;
END
$$;
COMMENT ON FUNCTION spectrum._do_pack_facts(bigint) IS
    'Step of pack_facts. Its position is the second up to which months are packed.';

CREATE PROCEDURE spectrum.pack_facts(
    p_older_than interval,
    p_own_reports text DEFAULT 'refuse',
    INOUT months bigint DEFAULT NULL
)
LANGUAGE plpgsql
AS $$
BEGIN
    CALL spectrum._carry_out('pack_facts', pg_catalog.jsonb_build_object(
        'older_than', p_older_than, 'own_reports', p_own_reports
    ), 'months', months);
END
$$;
COMMENT ON PROCEDURE spectrum.pack_facts(interval, text, bigint) IS
    'Packs the facts of whole months (UTC) that lie before now() - p_older_than, and returns how '
    'many months. They are closed, and what the standing views count of them is frozen, as by '
    'purge_facts; but all questions read them still. Done in steps, a commit after each: call it '
    'outside of a transaction block.';
