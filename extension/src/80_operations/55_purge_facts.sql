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

CREATE FUNCTION spectrum._freeze_month(p_ends_at timestamptz, p_is_packed boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    v_from timestamptz := (p_ends_at AT TIME ZONE 'UTC' - interval '1 month') AT TIME ZONE 'UTC';
    v_hot_only text := spectrum._read_hot_only('on');
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
    UPDATE spectrum.horizon
    SET facts_from = p_ends_at,
        packed_from = CASE WHEN p_is_packed
            THEN coalesce(packed_from, facts_from, '-infinity') END;
    PERFORM spectrum._begin_report(own.kind, own.name, own.definition)
    FROM spectrum.reports AS own
    WHERE own.kind = 'custom' AND own.state = 'served';
    PERFORM spectrum._read_hot_only(v_hot_only);
END
$$;
COMMENT ON FUNCTION spectrum._freeze_month(timestamptz, boolean) IS
    'Has each report keep what it will have to know of the month that ends then, and moves the '
    'horizon to its end: from here on its facts are gone for all who keep numbers, and, unless '
    'they are to be packed, for all who ask.';

CREATE FUNCTION spectrum._freeze_one_step(p_ends_at timestamptz, p_is_packed boolean)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Refreshes wait, so what counts and what is built stays as it is found here.
    PERFORM spectrum._hold_reports();
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
    ELSIF (SELECT open_from FROM spectrum.horizon) < spectrum._closed_until(p_ends_at) THEN
        -- A definition came that looks further back.
        PERFORM spectrum._close_months(p_ends_at);
        RETURN 'closed';
    END IF;
    PERFORM spectrum._freeze_month(p_ends_at, p_is_packed);
    RETURN 'frozen';
END
$$;
COMMENT ON FUNCTION spectrum._freeze_one_step(timestamptz, boolean) IS
    'Does the next thing so that the month that ends then is frozen, and says what: counts what is '
    'in it, closes more of the guard, or freezes it.';

CREATE FUNCTION spectrum._drop_detached()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_month text;
    v_dropped bigint := 0;
BEGIN
    FOR v_month IN
        SELECT month.name FROM spectrum._fact_months() AS month WHERE NOT month.is_attached
    LOOP
        EXECUTE format('DROP TABLE IF EXISTS warehouse.%I', v_month);
        v_dropped := v_dropped + 1;
    END LOOP;
    RETURN v_dropped;
END
$$;
COMMENT ON FUNCTION spectrum._drop_detached() IS
    'Drops the months that nobody reads any more, and returns how many.';

CREATE FUNCTION spectrum._purge_packed(p_facts_from timestamptz)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_month date;
BEGIN
    UPDATE spectrum.horizon
    SET packed_from = CASE WHEN p_facts_from < facts_from THEN p_facts_from END,
        packed_without = CASE WHEN p_facts_from < facts_from THEN packed_without END
    WHERE packed_from < p_facts_from;
    SELECT min(chunk.month) INTO v_month FROM warehouse.packed_events AS chunk
    WHERE (chunk.month + interval '1 month') AT TIME ZONE 'UTC' <= spectrum._readable_from();
    IF v_month IS NULL THEN
        RETURN NULL;
    END IF;
    DELETE FROM warehouse.packed_events AS chunk WHERE chunk.month = v_month;
    PERFORM spectrum._show_packed();
    RETURN 'dropped';
END
$$;
COMMENT ON FUNCTION spectrum._purge_packed(timestamptz) IS
    'Deletes the oldest packed month before p_facts_from; NULL where there is none.';

CREATE FUNCTION spectrum._purge_one_step(p_facts_from timestamptz)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_packed text := spectrum._purge_packed(p_facts_from);
    v_facts_from timestamptz := spectrum._facts_from();
    r_month record;
BEGIN
    IF v_packed IS NOT NULL THEN
        RETURN v_packed;
    ELSIF spectrum._drop_detached() > 0 THEN
        RETURN 'dropped';
    END IF;
    SELECT month.* INTO r_month FROM spectrum._fact_months() AS month
    WHERE month.ends_at <= greatest(p_facts_from, spectrum._readable_from())
    ORDER BY month.ends_at
    LIMIT 1;
    IF r_month.name IS NULL THEN
        -- The last months may have been empty, and without a partition.
        UPDATE spectrum.horizon SET facts_from = greatest(facts_from, p_facts_from);
        RETURN NULL;
    ELSIF r_month.ends_at <= v_facts_from THEN
        EXECUTE format(
            'ALTER TABLE warehouse.fact_events DETACH PARTITION warehouse.%I', r_month.name
        );
        RETURN 'detached';
    END IF;

    RETURN spectrum._freeze_one_step(r_month.ends_at, false);
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
            SELECT count(*)
            FROM (
                SELECT month.ends_at FROM spectrum._fact_months() AS month
                UNION
                SELECT (chunk.month + interval '1 month') AT TIME ZONE 'UTC'
                FROM warehouse.packed_events AS chunk
            ) AS known
            WHERE known.ends_at <= v_facts_from
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

CREATE FUNCTION spectrum._request_months(p_kind text, p_age interval)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET intervalstyle = 'postgres'
AS $$
DECLARE
    v_until timestamptz := date_trunc('month', now() - p_age, 'UTC');
BEGIN
    IF (
        EXISTS (SELECT FROM spectrum._fact_months() AS month WHERE month.ends_at <= v_until)
        OR (p_kind = 'purge_facts' AND EXISTS (
            SELECT FROM warehouse.packed_events AS chunk
            WHERE (chunk.month + interval '1 month') AT TIME ZONE 'UTC' <= v_until
        ))
    ) AND NOT EXISTS (
        SELECT FROM spectrum.tasks AS task
        WHERE task.kind = p_kind
            AND (task.state IN ('waiting', 'running') OR task.asked_at > now() - interval '1 day')
    ) THEN
        PERFORM spectrum.request(p_kind, jsonb_build_object('older_than', p_age));
    END IF;
EXCEPTION
    -- The rest of the upkeep goes on; health() names the task.
    WHEN invalid_parameter_value OR object_not_in_prerequisite_state THEN
        INSERT INTO spectrum.tasks (kind, arguments, state, finished_at, error_msg)
        VALUES (p_kind, jsonb_build_object('older_than', p_age), 'failed',
            clock_timestamp(), spectrum._one_line(format('%s (SQLSTATE %s)', sqlerrm, sqlstate)));
END
$$;
COMMENT ON FUNCTION spectrum._request_months(text, interval) IS
    'Asks for the purge or the packing (p_kind) of months of facts older than p_age, NULL never; '
    'once a day at most.';

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
