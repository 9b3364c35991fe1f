-- Room 80, purge of facts: months that are old enough go, what was counted of them stays. First
-- the time up to the end of the guard is closed (13_horizon.sql), and what is in it is counted.
-- Then, month by month from the oldest, each report keeps what it will have to know
-- (analytics._freeze_<kind>), facts_from moves, and the partition is detached and dropped. Only the
-- detaching locks readers out: for an instant, in a transaction of its own.

CREATE FUNCTION spectrum._closed_until(p_facts_from timestamptz)
RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
AS $$
BEGIN
    -- A month, as long as any calendar period, any session and attribution look back; or longer,
    -- where a definition does; and what time zones and a tie may take.
    RETURN interval '2 days' + greatest(p_facts_from + interval '32 days', (
        SELECT max(p_facts_from + (report.definition ->> looks.back)::interval)
        FROM spectrum.reports AS report
        JOIN (VALUES ('funnel', 'time_window'), ('experiment', 'cuped')) AS looks (kind, back)
            USING (kind)
        WHERE report.state <> 'discarded'
    ));
END
$$;
COMMENT ON FUNCTION spectrum._closed_until(timestamptz) IS
    'The end of the guard: how far time must be closed so that facts before p_facts_from can go.';

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
    'The months of facts; one that is not attached is being purged.';

CREATE FUNCTION spectrum._check_purge_facts(p_arguments jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET intervalstyle = 'postgres'
AS $$
DECLARE
    v_facts_from timestamptz;
    v_report text;
BEGIN
    PERFORM spectrum._check_arguments(
        p_arguments, '{"older_than": "interval", "own_reports": "text"}'
    );
    PERFORM spectrum._check_age(p_arguments ->> 'older_than');
    PERFORM spectrum._check_choice('p_own_reports',
        coalesce(p_arguments ->> 'own_reports', 'refuse'), '{refuse, rebuild}');
    v_facts_from := date_trunc(
        'month', now() - (p_arguments ->> 'older_than')::interval, 'UTC'
    );
    IF spectrum._closed_until(v_facts_from) > now() - interval '1 day' THEN
        PERFORM spectrum._reject('p_older_than', p_arguments ->> 'older_than', format(
            'an interval of %s days or more: as far as reports look back around a new event, '
            'and whole months', 32 + extract(day FROM
                spectrum._closed_until(now()) - (now() - interval '1 day'))::integer));
    END IF;
    SELECT min(report.name) INTO v_report FROM spectrum.reports AS report
    WHERE report.kind = 'custom' AND report.state <> 'discarded';
    IF v_report IS NOT NULL AND p_arguments ->> 'own_reports' IS DISTINCT FROM 'rebuild' THEN
        RAISE EXCEPTION 'report % is made of all events of its users: it cannot outlive their '
            'facts', v_report
            USING
                ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'Drop it, or have it made of the facts that remain: p_own_reports => '
                    '''rebuild''.';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_purge_facts(jsonb) IS 'Refuses what purge_facts cannot take.';

CREATE FUNCTION spectrum._close_months(p_facts_from timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Batches under way may still bring what is open to them.
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('horizon'));
    UPDATE spectrum.horizon
    SET open_from = greatest(open_from, spectrum._closed_until(p_facts_from));
END
$$;
COMMENT ON FUNCTION spectrum._close_months(timestamptz) IS
    'Closes the time before p_facts_from, and the guard behind it.';

CREATE FUNCTION spectrum._freeze_month(p_ends_at timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    v_from timestamptz := (p_ends_at AT TIME ZONE 'UTC' - interval '1 month') AT TIME ZONE 'UTC';
    r_report record;
BEGIN
    FOR r_report IN
        SELECT report.report_id, report.kind
        FROM spectrum.reports AS report
        JOIN spectrum.report_kinds AS kind USING (kind)
        WHERE report.state = 'served' AND to_regprocedure(format(
            'analytics.%I(integer, timestamptz, timestamptz)', '_freeze_' || report.kind
        )) IS NOT NULL
        ORDER BY kind.position, report.report_id
    LOOP
        EXECUTE format('SELECT analytics.%I($1, $2, $3)', '_freeze_' || r_report.kind)
        USING r_report.report_id, v_from, p_ends_at;
    END LOOP;
    UPDATE spectrum.horizon SET facts_from = p_ends_at;
    PERFORM spectrum._begin_report(own.kind, own.name, own.definition)
    FROM spectrum.reports AS own
    WHERE own.kind = 'custom' AND own.state = 'served';
END
$$;
COMMENT ON FUNCTION spectrum._freeze_month(timestamptz) IS
    'Has each report keep what it will have to know of the month that ends then, and moves the '
    'horizon to its end: from here on its facts are gone for all who keep numbers.';

CREATE FUNCTION spectrum._purge_one_step(p_facts_from timestamptz)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_facts_from timestamptz := spectrum._facts_from();
    r_month record;
BEGIN
    SELECT month.* INTO r_month FROM spectrum._fact_months() AS month
    WHERE month.ends_at <= greatest(p_facts_from, v_facts_from)
    ORDER BY month.is_attached, month.ends_at
    LIMIT 1;
    IF r_month.name IS NULL THEN
        -- The last months may have been empty, and without a partition.
        UPDATE spectrum.horizon SET facts_from = greatest(facts_from, p_facts_from);
        RETURN NULL;
    ELSIF NOT r_month.is_attached THEN
        EXECUTE format('DROP TABLE warehouse.%I', r_month.name);
        RETURN 'dropped';
    ELSIF r_month.ends_at <= v_facts_from THEN
        EXECUTE format(
            'ALTER TABLE warehouse.fact_events DETACH PARTITION warehouse.%I', r_month.name
        );
        RETURN 'detached';
    END IF;

    -- Refreshes wait, so what counts and what is built stays as it is found here.
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('refresh'));
    IF EXISTS (SELECT FROM spectrum.news CROSS JOIN spectrum.horizon WHERE first_at < open_from)
        OR EXISTS (
            SELECT FROM spectrum.withdrawals CROSS JOIN spectrum.horizon
            WHERE occurred_at < open_from
        )
        OR EXISTS (SELECT FROM spectrum.reports WHERE state = 'building')
        OR EXISTS (SELECT FROM spectrum.reports WHERE state = 'served' AND NOT follows_news)
    THEN
        PERFORM spectrum._refresh_some(200000);
        RETURN 'counted';
    ELSIF (SELECT open_from FROM spectrum.horizon) < spectrum._closed_until(r_month.ends_at) THEN
        -- A definition came that looks further back.
        PERFORM spectrum._close_months(r_month.ends_at);
        RETURN 'closed';
    END IF;
    PERFORM spectrum._freeze_month(r_month.ends_at);
    RETURN 'frozen';
END
$$;
COMMENT ON FUNCTION spectrum._purge_one_step(timestamptz) IS
    'Does the next thing on the way of the oldest month before p_facts_from: counts what is in it, '
    'freezes, detaches or drops it, and says what it did; NULL where no month is left.';

CREATE FUNCTION spectrum._do_purge_facts(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_task record;
    v_facts_from timestamptz;
    v_done text;
    v_wait text := spectrum._bound_lock_waits();
BEGIN
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('purge'));
    SELECT task.position, task.total, task.arguments INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    PERFORM spectrum._check_purge_facts(r_task.arguments);
    IF r_task.total IS NULL THEN
        v_facts_from := date_trunc(
            'month', now() - (r_task.arguments ->> 'older_than')::interval, 'UTC'
        );
        r_task.total := (
            SELECT count(*) FROM spectrum._fact_months() AS month
            WHERE month.ends_at <= v_facts_from
        );
        IF r_task.total > 0 THEN
            PERFORM spectrum._close_months(v_facts_from);
        END IF;
        v_done := CASE WHEN r_task.total > 0 THEN 'closed' END;
    ELSE
        v_facts_from := to_timestamp(r_task.position);
        v_done := spectrum._purge_one_step(v_facts_from);
    END IF;
    PERFORM set_config('lock_timeout', v_wait, true);

    UPDATE spectrum.tasks AS task
    SET position = extract(epoch FROM v_facts_from)::bigint,
        total = r_task.total,
        done = task.done + (coalesce(v_done, '') = 'dropped')::integer,
        unit = 'months',
        outcome = jsonb_build_object(
            'months', task.done + (coalesce(v_done, '') = 'dropped')::integer,
            'facts_from', horizon.facts_from
        )
    FROM spectrum.horizon
    WHERE task.task_id = p_task_id;
    RETURN v_done IS NOT NULL;
END
$$;
COMMENT ON FUNCTION spectrum._do_purge_facts(bigint) IS
    'Step of purge_facts. Its position is the second from which on facts are kept.';

CREATE FUNCTION spectrum._request_purge_facts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET intervalstyle = 'postgres'
AS $$
DECLARE
    v_keep interval := (SELECT config.facts_keep FROM spectrum.config);
BEGIN
    IF EXISTS (
        SELECT FROM spectrum._fact_months() AS month
        WHERE month.ends_at <= date_trunc('month', now() - v_keep, 'UTC')
    ) AND NOT EXISTS (
        SELECT FROM spectrum.tasks AS task
        WHERE task.kind = 'purge_facts'
            AND (task.state IN ('waiting', 'running') OR task.asked_at > now() - interval '1 day')
    ) THEN
        PERFORM spectrum.request('purge_facts', jsonb_build_object('older_than', v_keep));
    END IF;
EXCEPTION
    -- The rest of the upkeep goes on; health() names the task.
    WHEN invalid_parameter_value OR object_not_in_prerequisite_state THEN
        INSERT INTO spectrum.tasks (kind, arguments, state, finished_at, error_msg)
        VALUES ('purge_facts', jsonb_build_object('older_than', v_keep), 'failed',
            clock_timestamp(), spectrum._one_line(format('%s (SQLSTATE %s)', sqlerrm, sqlstate)));
END
$$;
COMMENT ON FUNCTION spectrum._request_purge_facts() IS
    'Asks for the purge of months older than config.facts_keep, once a day at most.';

CREATE PROCEDURE spectrum.purge_facts(
    p_older_than interval,
    p_own_reports text DEFAULT 'refuse',
    INOUT months bigint DEFAULT NULL
)
LANGUAGE plpgsql
AS $$
BEGIN
    CALL spectrum._carry_out('purge_facts', pg_catalog.jsonb_build_object(
        'older_than', p_older_than, 'own_reports', p_own_reports
    ), 'months', months);
END
$$;
COMMENT ON PROCEDURE spectrum.purge_facts(interval, text, bigint) IS
    'Purges the facts of whole months (UTC) that lie before now() - p_older_than, and returns how '
    'many months. The standing views go on as if nothing had happened: what they count of these '
    'facts is frozen. The ledger and the dimensions stay. The user''s own reports (define_report) '
    'cannot go on: with p_own_reports rebuild they are made of the facts that remain. Done in '
    'steps, a commit after each: call it outside of a transaction block.';
