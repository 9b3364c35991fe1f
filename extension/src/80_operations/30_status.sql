-- Room 80, status: how the pipeline is, as views for dashboards, as status() for people, and as
-- health(), which says what is wrong and what to do about it.

CREATE FUNCTION spectrum._create_status()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.pipeline') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE VIEW spectrum.pipeline AS
    SELECT
        rows_by_status.*,
        last_batch.finished_at AS last_batch_at,
        last_run.finished_at AS last_run_at,
        last_run.error_msg AS last_run_error,
        months.months_ready,
        views.refreshed_at AS last_refresh_at,
        views.as_of,
        extract(epoch FROM now() - views.as_of)::double precision AS lag_seconds,
        (SELECT coalesce(sum(news.events), 0) FROM spectrum.news)::bigint AS uncounted,
        (SELECT count(*) FROM spectrum.reports AS report WHERE report.state = 'building')
            AS reports_building,
        (SELECT string_agg(format('account %s has about %s of %s waiting events',
                to_json(flood.account_id), flood.waiting, rows_by_status.pending),
                '; ' ORDER BY flood.waiting DESC)
            FROM (SELECT floods.account_id, floods.waiting FROM spectrum.floods
                ORDER BY floods.waiting DESC
                LIMIT 3) AS flood) AS flooded_by,
        (SELECT coalesce(sum(chunk.events), 0)::bigint FROM warehouse.packed_events AS chunk)
            AS packed_events,
        (SELECT settings.packed_before FROM analytics.settings) AS packed_before
    FROM (
        SELECT
            count(*) FILTER (WHERE raw.status = 'pending') AS pending,
            count(*) FILTER (WHERE raw.status = 'processing') AS processing,
            count(*) FILTER (WHERE raw.status = 'done') AS done,
            count(*) FILTER (WHERE raw.status = 'failed') AS failed,
            count(*) FILTER (WHERE raw.next_attempt_at IS NOT NULL) AS to_retry,
            coalesce(extract(epoch FROM now() - min(raw.received_at)
                FILTER (WHERE raw.status IN ('pending', 'processing'))), 0)::double precision
                AS oldest_pending_seconds
        FROM @extschema@.raw_events AS raw
    ) AS rows_by_status
    LEFT JOIN LATERAL (
        SELECT log.finished_at FROM spectrum.run_log AS log
        WHERE log.step = 'process' AND log.error_msg IS NULL
        ORDER BY log.log_id DESC
        LIMIT 1
    ) AS last_batch ON true
    LEFT JOIN LATERAL (
        SELECT log.finished_at, log.error_msg FROM spectrum.run_log AS log
        WHERE log.step = 'run' AND log.finished_at IS NOT NULL AND log.run_id IS NOT NULL
        ORDER BY log.log_id DESC
        LIMIT 1
    ) AS last_run ON true
    CROSS JOIN (
        SELECT count(*) AS months_ready
        FROM pg_inherits AS link
        JOIN pg_class AS month ON month.oid = link.inhrelid
        WHERE link.inhparent = 'warehouse.fact_events'::regclass
            AND month.relname > 'fact_events_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')
    ) AS months
    CROSS JOIN spectrum.watermark AS views;
    COMMENT ON VIEW spectrum.pipeline IS
        'The state of the pipeline, one row. It counts raw_events: 0.1 s per million rows kept.';
    COMMENT ON COLUMN spectrum.pipeline.pending IS 'Raw events that wait.';
    COMMENT ON COLUMN spectrum.pipeline.processing IS 'Raw events that an outside worker holds.';
    COMMENT ON COLUMN spectrum.pipeline.done IS 'Raw events that are facts, or copies of one.';
    COMMENT ON COLUMN spectrum.pipeline.failed IS 'Raw events that failed; error_msg says why.';
    COMMENT ON COLUMN spectrum.pipeline.to_retry IS 'Failed ones that will be tried again.';
    COMMENT ON COLUMN spectrum.pipeline.oldest_pending_seconds IS
        'How long the oldest event has waited; 0 where none waits.';
    COMMENT ON COLUMN spectrum.pipeline.last_batch_at IS 'End of the last batch that did work.';
    COMMENT ON COLUMN spectrum.pipeline.last_run_at IS 'End of the last run.';
    COMMENT ON COLUMN spectrum.pipeline.last_run_error IS 'What failed in it; NULL if nothing.';
    COMMENT ON COLUMN spectrum.pipeline.months_ready IS 'Month partitions after this month.';
    COMMENT ON COLUMN spectrum.pipeline.last_refresh_at IS 'When a refresh last ended.';
    COMMENT ON COLUMN spectrum.pipeline.as_of IS
        'Every event received before this is counted in every view.';
    COMMENT ON COLUMN spectrum.pipeline.lag_seconds IS 'Age of as_of.';
    COMMENT ON COLUMN spectrum.pipeline.uncounted IS
        'Facts that the standing views do not count yet.';
    COMMENT ON COLUMN spectrum.pipeline.reports_building IS
        'Reports that are being built: see spectrum.progress.';
    COMMENT ON COLUMN spectrum.pipeline.flooded_by IS
        'Accounts of which batches pass over events, the largest three; NULL where there is none.';
    COMMENT ON COLUMN spectrum.pipeline.packed_events IS
        'Facts that are packed: see spectrum.pack_facts.';
    COMMENT ON COLUMN spectrum.pipeline.packed_before IS
        'Facts that occurred before are packed, or being packed; NULL: none are.';

    CREATE VIEW spectrum.progress AS
    SELECT
        'build of ' || report.kind || coalesce(' ' || nullif(report.name, ''), '') AS work,
        report.created_at AS begun_at,
        count(dim.user_key) FILTER (WHERE dim.user_key <= report.built_to) AS done,
        count(dim.user_key) AS total,
        'users' AS unit
    FROM spectrum.reports AS report
    CROSS JOIN warehouse.dim_users AS dim
    WHERE report.state = 'building'
    GROUP BY report.report_id
    UNION ALL
    SELECT format('%s (task %s)', task.kind, task.task_id), task.asked_at, task.done, task.total,
        task.unit
    FROM spectrum.tasks AS task
    WHERE task.state IN ('waiting', 'running');
    COMMENT ON VIEW spectrum.progress IS
        'Long work under way, one row each: how much of it is done. It goes on with each run.';
    COMMENT ON COLUMN spectrum.progress.work IS 'What is being done.';
    COMMENT ON COLUMN spectrum.progress.begun_at IS 'Since when.';
    COMMENT ON COLUMN spectrum.progress.done IS 'Of total.';
    COMMENT ON COLUMN spectrum.progress.total IS 'About; NULL where not known yet.';
    COMMENT ON COLUMN spectrum.progress.unit IS 'What is counted.';

    -- An error's text may quote values: readers learn that there was one, not what it says.
    CREATE VIEW analytics.pipeline_status WITH (security_barrier) AS
    SELECT
        state.pending, state.processing, state.done, state.failed, state.to_retry,
        state.oldest_pending_seconds, state.last_batch_at, state.last_run_at,
        state.last_run_error IS NOT NULL AS last_run_has_error, state.months_ready,
        state.last_refresh_at, state.as_of, state.lag_seconds, state.uncounted,
        state.reports_building
    FROM spectrum.pipeline AS state
    WHERE (SELECT caller.sees_all FROM warehouse.caller);
    COMMENT ON VIEW analytics.pipeline_status IS
        'The state of the pipeline, one row, for dashboards: see spectrum.pipeline. None for '
        'tenants.';

    CREATE VIEW analytics.pipeline WITH (security_barrier) AS
    SELECT
        log.log_id, log.run_id, log.step, log.started_at, log.finished_at,
        extract(epoch FROM log.finished_at - log.started_at)::double precision AS seconds,
        log.claimed, log.loaded, log.duplicates, log.failed, log.detail,
        log.error_msg IS NOT NULL AS has_error
    FROM spectrum.run_log AS log
    WHERE (SELECT caller.sees_all FROM warehouse.caller);
    COMMENT ON VIEW analytics.pipeline IS
        'The run log for dashboards, without the texts of errors: see spectrum.run_log. Empty for '
        'tenants.';
    COMMENT ON COLUMN analytics.pipeline.seconds IS 'How long the step took; NULL under way.';
    COMMENT ON COLUMN analytics.pipeline.has_error IS 'Whether an error ended it.';
END
$$;
COMMENT ON FUNCTION spectrum._create_status() IS
    'Room 80: makes spectrum.pipeline and the two pipeline views of analytics.';

CREATE FUNCTION spectrum.status(
    OUT pending bigint,
    OUT processing bigint,
    OUT done bigint,
    OUT failed bigint,
    OUT to_retry bigint,
    OUT oldest_pending_seconds double precision,
    OUT last_batch_at timestamptz,
    OUT last_run_at timestamptz,
    OUT last_run_error text,
    OUT months_ready bigint,
    OUT last_refresh_at timestamptz,
    OUT as_of timestamptz,
    OUT lag_seconds double precision,
    OUT cron text,
    OUT cron_schedule text,
    OUT cron_last_status text,
    OUT cron_last_end timestamptz,
    OUT uncounted bigint,
    OUT reports_building bigint,
    OUT flooded_by text,
    OUT cron_last_message text,
    OUT idle_transactions text,
    OUT packed_events bigint,
    OUT packed_before timestamptz
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT
        state.pending, state.processing, state.done, state.failed, state.to_retry,
        state.oldest_pending_seconds, state.last_batch_at, state.last_run_at,
        state.last_run_error, state.months_ready, state.last_refresh_at, state.as_of,
        state.lag_seconds, job.remark, job.schedule, job.last_status, job.last_end,
        state.uncounted, state.reports_building, state.flooded_by, job.last_message,
        (SELECT string_agg(idle.who, '; ') FROM spectrum._idle_transactions() AS idle),
        state.packed_events, state.packed_before
    INTO
        pending, processing, done, failed, to_retry,
        oldest_pending_seconds, last_batch_at, last_run_at,
        last_run_error, months_ready, last_refresh_at, as_of,
        lag_seconds, cron, cron_schedule, cron_last_status, cron_last_end,
        uncounted, reports_building, flooded_by, cron_last_message, idle_transactions,
        packed_events, packed_before
    FROM spectrum.pipeline AS state
    CROSS JOIN spectrum._cron_state() AS job;
END
$$;
COMMENT ON FUNCTION spectrum.status() IS
    'How the pipeline is, one row: the columns of spectrum.pipeline, what pg_cron knows, and who '
    'keeps a transaction open and idle.';

CREATE FUNCTION spectrum._check_ownership(OUT ok boolean, OUT message text, OUT what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_owner oid := (SELECT relowner FROM pg_class
        WHERE oid = '@extschema@.raw_events'::regclass);
    v_statements text[];
BEGIN
    SELECT array_agg(stray.statement ORDER BY stray.statement) INTO v_statements
    FROM (
        SELECT format('ALTER SCHEMA %I OWNER TO %s', nspname, v_owner::regrole) AS statement
        FROM pg_namespace
        WHERE nspname IN ('spectrum', 'warehouse', 'analytics') AND nspowner <> v_owner
        UNION ALL
        SELECT format('ALTER %s %s OWNER TO %s',
            CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END,
            oid::regclass, v_owner::regrole)
        FROM pg_class
        WHERE relnamespace IN (SELECT oid FROM pg_namespace
                WHERE nspname IN ('spectrum', 'warehouse', 'analytics'))
            AND relkind IN ('r', 'p', 'v', 'm') AND relowner <> v_owner
        UNION ALL
        SELECT format('ALTER ROUTINE %s OWNER TO %s', oid::regprocedure, v_owner::regrole)
        FROM pg_proc
        WHERE pronamespace IN (SELECT oid FROM pg_namespace
                WHERE nspname IN ('spectrum', 'warehouse', 'analytics'))
            AND proowner <> v_owner
    ) AS stray;
    ok := v_statements IS NULL;
    message := CASE WHEN ok THEN 'one role owns everything'
        ELSE format('%s objects belong to another role than raw_events, say after a restore by a '
            'superuser', cardinality(v_statements)) END;
    what_to_do := 'As a superuser: ' || array_to_string(v_statements, '; ') || ';';
END
$$;
COMMENT ON FUNCTION spectrum._check_ownership() IS
    'Check of health(): one owner, or the statements that mend it.';

CREATE FUNCTION spectrum._check_caps(OUT ok boolean, OUT message text, OUT what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT format('%s events refused since yesterday, most by %s: %s of account %s',
        sum(recent.events) OVER (), recent.cap, recent.events, to_json(recent.account_id))
    INTO message
    FROM spectrum.refusals AS recent
    CROSS JOIN spectrum.config
    WHERE recent.day >= (now() AT TIME ZONE config.timezone)::date - 1
    ORDER BY recent.events DESC, recent.cap, recent.account_id
    LIMIT 1;
    ok := message IS NULL;
    message := coalesce(message, 'no event was over a cap since yesterday');
    what_to_do := 'SELECT * FROM spectrum.refusals; where they are wanted, raise the cap with '
        'spectrum.configure(), then CALL spectrum.reprocess();';
END
$$;
COMMENT ON FUNCTION spectrum._check_caps() IS
    'Check of health(): whether caps refused events, whose and which most.';

CREATE FUNCTION spectrum._check_standby(OUT ok boolean, OUT message text, OUT what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_replayed timestamptz := pg_last_xact_replay_timestamp();
BEGIN
    IF NOT pg_is_in_recovery() THEN
        ok := true;
        message := 'this server is no standby';
        what_to_do := '';
        RETURN;
    END IF;
    -- It streams; or it takes the archive's files, and did lately.
    ok := pg_get_wal_replay_pause_state() = 'not paused'
        AND (EXISTS (SELECT FROM pg_stat_wal_receiver)
            OR coalesce(v_replayed > now() - interval '15 minutes', false));
    message := format('this server is a standby: to be read, not written; it replayed up to %s%s',
        coalesce(v_replayed::text, 'its start'),
        CASE pg_get_wal_replay_pause_state() WHEN 'not paused' THEN '' ELSE ' and is paused' END);
    what_to_do := 'Insert, process and refresh on the primary. To go on here instead: '
        'SELECT pg_promote();';
END
$$;
COMMENT ON FUNCTION spectrum._check_standby() IS
    'Check of health(): whether this server is a standby, and follows.';

CREATE FUNCTION spectrum.health()
RETURNS TABLE (check_name text, ok boolean, message text, what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_owner record;
    r_state record;
BEGIN
    RETURN QUERY SELECT 'release', made.release = spectrum._release(),
        format('the tables are of release %s, the functions of %s', made.release,
            spectrum._release()),
        'As the owner of the tables: SELECT spectrum.setup();'
    FROM spectrum._tables_release() AS made (release);
    IF spectrum._tables_release() <> spectrum._release() THEN
        -- The further checks may read what is not there yet.
        RETURN;
    END IF;

    SELECT owner.* INTO r_owner FROM spectrum._check_ownership() AS owner;
    RETURN QUERY SELECT 'ownership', r_owner.ok, r_owner.message, r_owner.what_to_do;
    IF NOT r_owner.ok THEN
        -- The further checks may read what belongs to another.
        RETURN;
    END IF;
    SELECT state.* INTO r_state FROM spectrum.status() AS state;

    RETURN QUERY SELECT 'backlog', r_state.oldest_pending_seconds < 900,
        format('%s events wait, the oldest for %s s', r_state.pending + r_state.processing,
            round(r_state.oldest_pending_seconds::numeric)),
        'CALL spectrum.run(), and look at spectrum.run_log for errors.';

    RETURN QUERY SELECT 'failed events', r_state.failed <= (r_state.done + r_state.failed) / 100,
        format('%s of %s events failed, %s will be tried again', r_state.failed,
            r_state.done + r_state.failed, r_state.to_retry),
        'SELECT error_msg, count(*) FROM @extschema@.raw_events WHERE status = ''failed'' '
        'GROUP BY 1; and once the cause is gone: CALL spectrum.reprocess();';

    RETURN QUERY SELECT 'last run', r_state.last_run_at IS NOT NULL
            AND r_state.last_run_error IS NULL,
        coalesce(r_state.last_run_error, 'ended ' || r_state.last_run_at, 'never ran'),
        'CALL spectrum.run() and read its messages.';

    -- Without a job here, runs that come all the same come from a scheduler elsewhere.
    RETURN QUERY SELECT 'schedule', coalesce(CASE WHEN r_state.cron_schedule IS NULL
            THEN r_state.last_run_at > now() - interval '15 minutes'
            ELSE r_state.cron NOT LIKE 'scheduled, but%'
                AND r_state.cron_last_status IS DISTINCT FROM 'failed'
        END, false),
        r_state.cron || coalesce(' ' || r_state.cron_schedule, '')
            || coalesce(', last run ' || r_state.cron_last_status, '')
            || coalesce(': ' || r_state.cron_last_message, ''),
        spectrum._cron_advice(r_state.cron, r_state.cron_last_message);

    RETURN QUERY SELECT 'months ahead', r_state.months_ready > 0,
        format('%s months are ready after this one', r_state.months_ready),
        'SELECT spectrum.ensure_partitions(now(), now() + interval ''3 months'');';

    RETURN QUERY SELECT 'long transactions', count(*) = 0,
        coalesce(string_agg(format('process %s of %s, for %s', activity.pid, activity.usename,
            date_trunc('second', now() - activity.xact_start)), '; '), 'none over an hour'),
        'It holds back vacuum, not the pipeline. End it: SELECT pg_terminate_backend(pid);'
    FROM pg_stat_activity AS activity
    WHERE activity.datname = current_database() AND activity.pid <> pg_backend_pid()
        AND activity.xact_start < now() - interval '1 hour';

    RETURN QUERY SELECT 'idle transactions', r_state.idle_transactions IS NULL,
        coalesce(r_state.idle_transactions, 'none'),
        'It holds back vacuum, not the pipeline. End it: '
            || coalesce(string_agg(idle.what_to_do, ' '), 'SELECT pg_terminate_backend(pid);')
            || ' and see idle_in_transaction_session_timeout.'
    FROM spectrum._idle_transactions() AS idle;

    RETURN QUERY SELECT 'tasks', task.ok, task.message, task.what_to_do
    FROM spectrum._check_tasks() AS task;

    RETURN QUERY SELECT 'floods', r_state.flooded_by IS NULL,
        coalesce(r_state.flooded_by, 'no account holds up the others'),
        'The events of others go before. Ask the sender; for more workers at once call '
        'spectrum.process_batch() from further sessions.';

    RETURN QUERY SELECT 'caps', refused.ok, refused.message, refused.what_to_do
    FROM spectrum._check_caps() AS refused;

    RETURN QUERY SELECT 'standby', standby.ok, standby.message, standby.what_to_do
    FROM spectrum._check_standby() AS standby;
    RETURN QUERY SELECT 'key of hashes', known.ok, known.message, known.what_to_do
    FROM spectrum._check_pii_key() AS known;
END
$$;
COMMENT ON FUNCTION spectrum.health() IS
    'What is wrong and what to do about it, one row a check.';
