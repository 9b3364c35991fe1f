\echo Use "CREATE EXTENSION spectrum" to load this file. \quit

-- Spectrum: product analytics inside PostgreSQL.
--
-- Data flows one way, through rooms in the order of their numbers:
--   10 config, 15 calendar     settings; the one place that cuts time
--   20 staging                 raw_events and how a payload is read
--   30 dimensions, 40 facts    the warehouse, filled by process_batch
--   50 rollups                 what changed since the last refresh
--   60 analytics               the questions, one file each
--   70 statistics, 71 experiments
--   80 operations              run, schedule, status, verify
--   90 privileges
--
-- This script creates schemas and functions. Tables and views are made by spectrum.setup(), which
-- the last line calls, and are then released from the extension: the data belongs to the user.

CREATE SCHEMA spectrum;
COMMENT ON SCHEMA spectrum IS
    'Spectrum: configuration, definitions, procedures and the state of the pipeline.';

CREATE SCHEMA warehouse;
COMMENT ON SCHEMA warehouse IS
    'Spectrum: the star schema. fact_events in the centre, dim_* around it.';

CREATE SCHEMA analytics;
COMMENT ON SCHEMA analytics IS
    'Spectrum: answers. The only schema that a dashboard reads.';
-- Room 10: configuration. One typed row, checked by the table itself; every other room reads it.
-- Also here: the ways in which a call is refused, so that all refusals look alike.

CREATE FUNCTION spectrum._create_config()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.config') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.config (
        is_only boolean NOT NULL DEFAULT true
            CONSTRAINT config_pkey PRIMARY KEY
            CONSTRAINT config_is_one_row CHECK (is_only),
        batch_size integer NOT NULL DEFAULT 10000
            CONSTRAINT config_batch_size_range CHECK (batch_size BETWEEN 1 AND 1000000),
        run_budget interval NOT NULL DEFAULT '4 minutes'
            CONSTRAINT config_run_budget_range CHECK (run_budget BETWEEN '1 second' AND '1 day'),
        timezone text NOT NULL DEFAULT 'UTC'
            CONSTRAINT config_timezone_is_known
            CHECK (timezone(timezone, timestamptz '2000-01-01 00:00:00+00') IS NOT NULL),
        week_start integer NOT NULL DEFAULT 1
            CONSTRAINT config_week_start_range CHECK (week_start BETWEEN 1 AND 7),
        currency text NOT NULL DEFAULT 'USD'
            CONSTRAINT config_currency_form CHECK (currency ~ '^[A-Z]{3}$'),
        revenue_property text NOT NULL DEFAULT 'revenue'
            CONSTRAINT config_revenue_property_form CHECK (revenue_property <> ''),
        refund_events text[] NOT NULL DEFAULT '{refund}'
            CONSTRAINT config_refund_events_form
            CHECK (array_position(refund_events, NULL) IS NULL),
        earliest_event timestamptz NOT NULL DEFAULT '2000-01-01 00:00:00+00'
            CONSTRAINT config_earliest_event_range
            CHECK (earliest_event BETWEEN '1900-01-01 00:00:00+00' AND '2100-01-01 00:00:00+00'),
        max_clock_skew interval NOT NULL DEFAULT '1 hour'
            CONSTRAINT config_max_clock_skew_range CHECK (max_clock_skew BETWEEN '0' AND '31 days'),
        months_ahead integer NOT NULL DEFAULT 3
            CONSTRAINT config_months_ahead_range CHECK (months_ahead BETWEEN 0 AND 120),
        lock_timeout interval NOT NULL DEFAULT '2 seconds'
            CONSTRAINT config_lock_timeout_range CHECK (lock_timeout BETWEEN '1 ms' AND '1 hour'),
        max_attempts integer NOT NULL DEFAULT 5
            CONSTRAINT config_max_attempts_range CHECK (max_attempts BETWEEN 1 AND 100),
        retry_delay interval NOT NULL DEFAULT '1 minute'
            CONSTRAINT config_retry_delay_range CHECK (retry_delay BETWEEN '0' AND '1 day'),
        processing_lease interval NOT NULL DEFAULT '15 minutes'
            CONSTRAINT config_processing_lease_range
            CHECK (processing_lease BETWEEN '1 second' AND '7 days'),
        run_log_keep interval NOT NULL DEFAULT '30 days'
            CONSTRAINT config_run_log_keep_range CHECK (run_log_keep >= '1 hour'),
        cron_log_keep interval NOT NULL DEFAULT '7 days'
            CONSTRAINT config_cron_log_keep_range CHECK (cron_log_keep >= '1 hour'),
        raw_keep interval
            CONSTRAINT config_raw_keep_range CHECK (raw_keep >= '0'),
        max_payload_bytes integer NOT NULL DEFAULT 1048576
            CONSTRAINT config_max_payload_bytes_range
            CHECK (max_payload_bytes BETWEEN 2000 AND 1000000000),
        max_properties integer NOT NULL DEFAULT 1000
            CONSTRAINT config_max_properties_range CHECK (max_properties BETWEEN 1 AND 10000000),
        max_new_event_types integer NOT NULL DEFAULT 1000
            CONSTRAINT config_max_new_event_types_range CHECK (max_new_event_types >= 0),
        max_new_places integer NOT NULL DEFAULT 10000
            CONSTRAINT config_max_new_places_range CHECK (max_new_places >= 0),
        max_new_accounts integer NOT NULL DEFAULT 1000000
            CONSTRAINT config_max_new_accounts_range CHECK (max_new_accounts >= 0),
        account_share numeric NOT NULL DEFAULT 0.5
            CONSTRAINT config_account_share_range CHECK (account_share BETWEEN 0.05 AND 1),
        max_idle interval NOT NULL DEFAULT '5 minutes'
            CONSTRAINT config_max_idle_range CHECK (max_idle >= '1 ms')
    );
    COMMENT ON TABLE spectrum.config IS
        'Settings, one row. Change one with spectrum.configure(setting, value); it takes effect '
        'with the next statement, nothing is restarted.';
    COMMENT ON COLUMN spectrum.config.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.config.batch_size IS 'Events that process_batch claims at most.';
    COMMENT ON COLUMN spectrum.config.run_budget IS
        'Time after which spectrum.run() starts no further batch.';
    COMMENT ON COLUMN spectrum.config.timezone IS
        'Time zone in which days, weeks and months are cut (a name of pg_timezone_names).';
    COMMENT ON COLUMN spectrum.config.week_start IS 'First day of a week: 1 Monday to 7 Sunday.';
    COMMENT ON COLUMN spectrum.config.currency IS
        'Currency of money events that name none: three capital letters.';
    COMMENT ON COLUMN spectrum.config.revenue_property IS
        'Property whose presence makes an event carry money.';
    COMMENT ON COLUMN spectrum.config.refund_events IS
        'Event types whose amount is a refund, whatever its sign.';
    COMMENT ON COLUMN spectrum.config.earliest_event IS
        'Events that occurred before this fail.';
    COMMENT ON COLUMN spectrum.config.max_clock_skew IS
        'How far occurred_at may lie after received_at.';
    COMMENT ON COLUMN spectrum.config.months_ahead IS
        'Month partitions that are kept ready after the current one.';
    COMMENT ON COLUMN spectrum.config.lock_timeout IS
        'Longest wait for a lock when a month is attached.';
    COMMENT ON COLUMN spectrum.config.max_attempts IS
        'Attempts after which an event that failed for a passing cause is left failed.';
    COMMENT ON COLUMN spectrum.config.retry_delay IS
        'Delay before the second attempt; it doubles with each further one.';
    COMMENT ON COLUMN spectrum.config.processing_lease IS
        'How long an outside worker may leave a row in processing before it is taken back.';
    COMMENT ON COLUMN spectrum.config.run_log_keep IS 'Age at which run log rows are deleted.';
    COMMENT ON COLUMN spectrum.config.cron_log_keep IS
        'Age at which rows of pg_cron''s own log about Spectrum''s jobs are deleted.';
    COMMENT ON COLUMN spectrum.config.raw_keep IS
        'Age at which raw events that are done are deleted; NULL: never.';
    COMMENT ON COLUMN spectrum.config.max_payload_bytes IS
        'Events whose payload takes more bytes, before compression, fail.';
    COMMENT ON COLUMN spectrum.config.max_properties IS
        'Events with more properties (keys of properties itself) fail.';
    COMMENT ON COLUMN spectrum.config.max_new_event_types IS
        'Event types that an account may bring new per day; events of further ones fail.';
    COMMENT ON COLUMN spectrum.config.max_new_places IS
        'Places that an account may bring new per day; events of further ones fail.';
    COMMENT ON COLUMN spectrum.config.max_new_accounts IS
        'Accounts that may come new per day, all together; events of further ones fail.';
    COMMENT ON COLUMN spectrum.config.account_share IS
        'Part of a batch beyond which an account waits behind the others while events of theirs '
        'wait; 1 to take all events strictly in the order of receipt.';
    COMMENT ON COLUMN spectrum.config.max_idle IS
        'Age from which status() and health() name a transaction that is open and idle.';

    INSERT INTO spectrum.config DEFAULT VALUES;
END
$$;
COMMENT ON FUNCTION spectrum._create_config() IS 'Room 10: makes spectrum.config and its row.';

CREATE FUNCTION spectrum._reject(p_argument text, p_value text, p_expected text)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'invalid value for argument %: %',
        p_argument, coalesce(to_json(left(p_value, 200))::text, 'NULL')
        USING ERRCODE = 'invalid_parameter_value', HINT = format('Expected %s.', p_expected);
END
$$;
COMMENT ON FUNCTION spectrum._reject(text, text, text) IS
    'Raises 22023, naming the argument, its value and what was expected.';

CREATE FUNCTION spectrum._check_choice(p_argument text, p_value text, p_choices text[])
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_value IS NULL OR p_value <> ALL (p_choices) THEN
        PERFORM spectrum._reject(
            p_argument, p_value, 'one of: ' || array_to_string(p_choices, ', ')
        );
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_choice(text, text, text[]) IS
    'Raises 22023 unless the value is one of the choices.';

CREATE FUNCTION spectrum._check_name(p_argument text, p_value text)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_value IS NULL OR octet_length(p_value) NOT BETWEEN 1 AND 63 OR p_value ~ '[[:cntrl:]]' THEN
        PERFORM spectrum._reject(
            p_argument, p_value, 'a name of 1 to 63 bytes without control characters'
        );
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_name(text, text) IS
    'Raises 22023 unless the value can be the name of a definition.';

CREATE FUNCTION spectrum._require_primary()
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'this server is a standby: it can be read, not written'
            USING ERRCODE = 'read_only_sql_transaction',
                HINT = 'Call it on the primary. After SELECT pg_promote() it works here, and '
                    'pg_cron goes on here by itself.';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._require_primary() IS
    'Raises 25006 on a standby, before anything is tried.';

CREATE FUNCTION spectrum.configure(p_setting text, p_value text)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_settings text[] := ARRAY(
        SELECT attname FROM pg_attribute
        WHERE attrelid = 'spectrum.config'::regclass AND attnum > 0 AND NOT attisdropped
            AND attname <> 'is_only'
        ORDER BY attnum
    );
    v_type text;
    v_problem text;
    v_before text;
    v_after text;
BEGIN
    PERFORM spectrum._check_choice('p_setting', p_setting, v_settings);
    SELECT format_type(atttypid, atttypmod) INTO v_type FROM pg_attribute
    WHERE attrelid = 'spectrum.config'::regclass AND attname = p_setting;

    EXECUTE format('SELECT %I::text FROM spectrum.config', p_setting) INTO v_before;
    BEGIN
        EXECUTE format('UPDATE spectrum.config SET %I = $1::%s RETURNING %1$I::text',
            p_setting, v_type) INTO v_after USING p_value;
    EXCEPTION
        WHEN data_exception OR integrity_constraint_violation THEN
            GET STACKED DIAGNOSTICS v_problem = MESSAGE_TEXT;
            RAISE EXCEPTION 'invalid value for setting %: %',
                p_setting, coalesce(to_json(left(p_value, 200))::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value',
                    DETAIL = v_problem,
                    HINT = format('%s It is of type %s, now %s.', col_description(
                        'spectrum.config'::regclass,
                        (SELECT attnum FROM pg_attribute
                        WHERE attrelid = 'spectrum.config'::regclass AND attname = p_setting)
                    ), v_type, v_before);
    END;

    -- The rest shape how events are read and processed from now on, not the views.
    IF v_after <> v_before AND p_setting IN ('timezone', 'week_start') THEN
        PERFORM spectrum.rebuild_reports();
    ELSIF v_after <> v_before AND p_setting = 'refund_events' THEN
        PERFORM spectrum.rebuild_reports('revenue');
    ELSIF v_after <> v_before AND p_setting = 'currency' THEN
        -- Facts carry the currency of their money; subscription events are read anew.
        PERFORM spectrum.rebuild_reports('mrr');
    END IF;
    RETURN v_after;
END
$$;
COMMENT ON FUNCTION spectrum.configure(text, text) IS
    'Sets one setting of spectrum.config and returns its value as stored. The value is checked: '
    '22023 says what is wrong and what the setting means.';

CREATE FUNCTION spectrum._lock_key(p_name text)
RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT hashtextextended('spectrum: ' || p_name, 0)
$$;
COMMENT ON FUNCTION spectrum._lock_key(text) IS 'Advisory lock key of one of Spectrum''s turns.';
-- Room 12: the run log. A row per run, per step of a run and per batch: what, how many, how long,
-- and the error where there was one. Written by rooms 40 to 80, read by people and dashboards.

CREATE FUNCTION spectrum._create_run_log()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.run_log') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.run_log (
        log_id bigserial NOT NULL CONSTRAINT run_log_pkey PRIMARY KEY,
        run_id bigint,
        step text NOT NULL CONSTRAINT run_log_step_is_known
            CHECK (step IN ('run', 'provision', 'tasks', 'process', 'refresh', 'upkeep')),
        started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        finished_at timestamptz,
        claimed bigint,
        loaded bigint,
        duplicates bigint,
        failed bigint,
        detail text,
        error_msg text
    );
    CREATE INDEX run_log_run_idx ON spectrum.run_log (run_id, log_id);
    COMMENT ON TABLE spectrum.run_log IS
        'What ran: a row per run, per step of it and per batch; also batches called by hand.';
    COMMENT ON COLUMN spectrum.run_log.log_id IS 'Ascending in the order of begin.';
    COMMENT ON COLUMN spectrum.run_log.run_id IS
        'log_id of the run that the step belongs to; NULL where it was called by hand.';
    COMMENT ON COLUMN spectrum.run_log.step IS
        'run (the whole), provision, tasks (a step of one), process (one batch), refresh or '
        'upkeep.';
    COMMENT ON COLUMN spectrum.run_log.started_at IS 'Wall clock.';
    COMMENT ON COLUMN spectrum.run_log.finished_at IS
        'Wall clock; NULL while under way, and for ever if the server stopped meanwhile.';
    COMMENT ON COLUMN spectrum.run_log.claimed IS 'Rows of raw_events taken.';
    COMMENT ON COLUMN spectrum.run_log.loaded IS 'Facts made of them.';
    COMMENT ON COLUMN spectrum.run_log.duplicates IS 'Copies of events known already.';
    COMMENT ON COLUMN spectrum.run_log.failed IS 'Rows marked failed.';
    COMMENT ON COLUMN spectrum.run_log.detail IS 'What was done, in words.';
    COMMENT ON COLUMN spectrum.run_log.error_msg IS
        'The error that ended the step, with its SQLSTATE; what the step had done was undone.';
END
$$;
COMMENT ON FUNCTION spectrum._create_run_log() IS 'Room 12: makes spectrum.run_log.';

CREATE FUNCTION spectrum._log_step(
    p_run_id bigint,
    p_step text,
    p_started_at timestamptz,
    p_detail text,
    p_error_msg text DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO spectrum.run_log (run_id, step, started_at, finished_at, detail, error_msg)
    VALUES (p_run_id, p_step, p_started_at, clock_timestamp(), p_detail, p_error_msg);
END
$$;
COMMENT ON FUNCTION spectrum._log_step(bigint, text, timestamptz, text, text) IS
    'Writes one step that ended into the run log.';
-- Room 15, the calendar: the one place that cuts time. A day, week or month is a calendar one in
-- config.timezone, weeks begin on config.week_start. Reports ask once for the starts of all periods
-- they need and place each event by width_bucket(occurred_at, starts), so nothing else adds days
-- to an instant, and days of 23 or 25 hours are what they are.

CREATE FUNCTION spectrum._day_start(p_day timestamp, p_timezone text)
RETURNS timestamptz
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Where the clock skips midnight this is the instant at which it does.
    v_start timestamptz := p_day AT TIME ZONE p_timezone;
    v_set_back interval :=
        (v_start - interval '24 hours') AT TIME ZONE p_timezone + interval '24 hours' - p_day;
BEGIN
    -- Where the clock shows midnight twice the day begins with the first; the cast takes the last.
    IF v_set_back > interval '0' AND (v_start - v_set_back) AT TIME ZONE p_timezone = p_day THEN
        RETURN v_start - v_set_back;
    END IF;
    RETURN v_start;
END
$$;
COMMENT ON FUNCTION spectrum._day_start(timestamp, text) IS
    'The first instant of a calendar day in a time zone.';

CREATE FUNCTION spectrum._period_day(p_period text, p_day timestamp, p_week_start integer)
RETURNS timestamp
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_shift interval := make_interval(days => p_week_start - 1);
BEGIN
    IF p_period = 'week' THEN
        RETURN date_trunc('week', p_day - v_shift) + v_shift;
    END IF;
    RETURN date_trunc(p_period, p_day);
END
$$;
COMMENT ON FUNCTION spectrum._period_day(text, timestamp, integer) IS
    'The first day of the day, week or month that holds a local time.';

CREATE FUNCTION spectrum.period_starts(p_period text, p_from timestamptz, p_to timestamptz)
RETURNS timestamptz[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_timezone text;
    v_week_start integer;
    v_step interval;
    v_starts timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    IF NOT isfinite(p_from) THEN
        PERFORM spectrum._reject('p_from', p_from::text, 'a finite time');
    ELSIF NOT isfinite(p_to) THEN
        PERFORM spectrum._reject('p_to', p_to::text, 'a finite time');
    ELSIF p_from IS NULL OR p_to IS NULL OR p_from >= p_to THEN
        RETURN '{}'::timestamptz[];
    END IF;
    SELECT s.timezone, s.week_start INTO v_timezone, v_week_start FROM analytics.settings AS s;
    v_step := ('1 ' || p_period)::interval;

    -- One period more on both sides: around a change of the clock the local date of an instant and
    -- the day that holds it can differ.
    v_starts := ARRAY(
        SELECT DISTINCT spectrum._day_start(d.day, v_timezone) AS start
        FROM generate_series(
            spectrum._period_day(p_period, p_from AT TIME ZONE v_timezone, v_week_start) - v_step,
            p_to AT TIME ZONE v_timezone + 2 * v_step,
            v_step
        ) AS d (day)
        ORDER BY start
    );
    RETURN v_starts[
        width_bucket(p_from, v_starts) : width_bucket(p_to - interval '1 us', v_starts) + 1
    ];
END
$$;
COMMENT ON FUNCTION spectrum.period_starts(text, timestamptz, timestamptz) IS
    'The starts, ascending, of every calendar day, week or month that overlaps [p_from, p_to), and '
    'one more: the end of the last. So instant t lies in period width_bucket(t, starts). Empty '
    'where the range is empty or one of its ends is NULL.';

CREATE FUNCTION spectrum.period_start(p_period text, p_at timestamptz)
RETURNS timestamptz
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (spectrum.period_starts(p_period, p_at, p_at + interval '1 us'))[1];
END
$$;
COMMENT ON FUNCTION spectrum.period_start(text, timestamptz) IS
    'The start of the one calendar day, week or month that holds an instant. For many instants '
    'use period_starts and width_bucket.';

CREATE FUNCTION spectrum.period_date(p_start timestamptz)
RETURNS date
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT (p_start AT TIME ZONE s.timezone)::date FROM analytics.settings AS s);
END
$$;
COMMENT ON FUNCTION spectrum.period_date(timestamptz) IS
    'The calendar date that the start of a period stands for.';
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
        copy_of uuid
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
        'geo {country, region, city}, properties. Never changed after the insert.';
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
-- Room 20, reading: what a payload says, without ever raising. The view spectrum.readings is the
-- one place that knows the fields of an event; process_batch stores what it shows and verify()
-- compares with it. Each cast stands behind a test that makes it safe, so a bad event costs itself
-- and nothing else. LATERAL ... OFFSET 0 keeps each step from being evaluated more than once.

CREATE FUNCTION spectrum._complaint(p_field text, p_expected text, p_value jsonb)
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT p_field || ': expected ' || p_expected || ', got '
        || CASE
            WHEN p_value IS NULL THEN 'nothing'
            WHEN length(p_value::text) > 100 THEN left(p_value::text, 100) || '...'
            ELSE p_value::text
        END
$$;
COMMENT ON FUNCTION spectrum._complaint(text, text, jsonb) IS
    'The message of a failed event, in one line: field, what was expected, the value (its first '
    '100 characters).';

CREATE FUNCTION spectrum._create_reading()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.readings') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE VIEW spectrum.readings AS
    SELECT
        raw.ctid AS row_id,
        raw.seq,
        raw.id,
        raw.status,
        raw.attempts,
        CASE
            WHEN part.event_id IS NULL OR part.event_id IN ('null', '""') THEN raw.id
            WHEN jsonb_typeof(part.event_id) NOT IN ('string', 'number') THEN NULL
            -- Loops in a pattern, counts outside of it: a third of the time.
            WHEN txt.event_id LIKE '________-____-____-____-____________' AND txt.event_id
                ~ '^[0-9A-Fa-f]+-[0-9A-Fa-f]+-[0-9A-Fa-f]+-[0-9A-Fa-f]+-[0-9A-Fa-f]+$'
                THEN txt.event_id::uuid
            WHEN length(txt.event_id) = 32 AND txt.event_id ~ '^[0-9A-Fa-f]+$'
                THEN txt.event_id::uuid
            ELSE md5(txt.event_id)::uuid
        END AS event_id,
        typed.occurred_at,
        txt.event_type,
        coalesce(txt.account_id, '') AS account_id,
        coalesce(txt.user_id, '') AS user_id,
        coalesce(txt.country, '') AS country,
        coalesce(txt.region, '') AS region,
        coalesce(txt.city, '') AS city,
        CASE jsonb_typeof(part.properties) WHEN 'object' THEN part.properties ELSE '{}' END
            AS properties,
        typed.revenue,
        CASE WHEN typed.revenue IS NOT NULL
            THEN coalesce(upper(part.properties ->> 'currency'), config.currency)
        END AS currency,
        CASE
            WHEN typed.refused_by = 'max_payload_bytes'
                THEN spectrum._complaint('payload', 'at most ' || config.max_payload_bytes
                    || ' bytes (config.max_payload_bytes)',
                    to_jsonb(pg_column_size(raw.payload #> '{}')))
            WHEN typed.refused_by = 'max_properties'
                THEN spectrum._complaint('properties', 'at most ' || config.max_properties
                    || ' of them (config.max_properties)',
                    to_jsonb((SELECT count(*) FROM jsonb_object_keys(part.properties))))
            WHEN jsonb_typeof(raw.payload) <> 'object'
                THEN spectrum._complaint('payload', 'a JSON object', raw.payload)
            WHEN jsonb_typeof(part.event_type) IS DISTINCT FROM 'string'
                OR length(txt.event_type) NOT BETWEEN 1 AND 200
                THEN spectrum._complaint('event_type', 'a text of 1 to 200 characters',
                    part.event_type)
            WHEN jsonb_typeof(part.event_id) NOT IN ('string', 'number', 'null')
                OR length(txt.event_id) > 200
                THEN spectrum._complaint('event_id', 'a text of at most 200 characters',
                    part.event_id)
            WHEN jsonb_typeof(part.account_id) NOT IN ('string', 'number', 'null')
                OR length(txt.account_id) > 200
                THEN spectrum._complaint('account_id', 'a text of at most 200 characters',
                    part.account_id)
            WHEN txt.account_id = '*'
                THEN spectrum._complaint('account_id', 'a name other than the reserved *',
                    part.account_id)
            WHEN jsonb_typeof(part.user_id) NOT IN ('string', 'number', 'null')
                OR length(txt.user_id) > 200
                THEN spectrum._complaint('user_id', 'a text of at most 200 characters',
                    part.user_id)
            WHEN typed.occurred_at IS NULL
                THEN spectrum._complaint(part.time_field,
                    'an ISO 8601 timestamp or epoch seconds or milliseconds', part.occurred_at)
            WHEN typed.occurred_at < config.earliest_event
                THEN spectrum._complaint(part.time_field,
                    'a time from ' || (config.earliest_event AT TIME ZONE 'UTC')::text
                    || ' UTC (config.earliest_event) on', part.occurred_at)
            WHEN typed.occurred_at > raw.received_at + config.max_clock_skew
                THEN spectrum._complaint(part.time_field,
                    'a time up to received_at + ' || config.max_clock_skew::text
                    || ' (config.max_clock_skew)', part.occurred_at)
            WHEN jsonb_typeof(part.geo) NOT IN ('object', 'null')
                THEN spectrum._complaint('geo', 'an object', part.geo)
            WHEN jsonb_typeof(part.country) NOT IN ('string', 'null')
                OR length(txt.country) > 200
                THEN spectrum._complaint('geo.country', 'a text of at most 200 characters',
                    part.country)
            WHEN jsonb_typeof(part.region) NOT IN ('string', 'null')
                OR length(txt.region) > 200
                THEN spectrum._complaint('geo.region', 'a text of at most 200 characters',
                    part.region)
            WHEN jsonb_typeof(part.city) NOT IN ('string', 'null')
                OR length(txt.city) > 200
                THEN spectrum._complaint('geo.city', 'a text of at most 200 characters',
                    part.city)
            WHEN jsonb_typeof(part.properties) NOT IN ('object', 'null')
                THEN spectrum._complaint('properties', 'an object', part.properties)
            WHEN part.revenue <> 'null' AND typed.revenue IS NULL
                THEN spectrum._complaint('properties.' || config.revenue_property,
                    'a number below 10^15 in size', part.revenue)
            WHEN typed.revenue IS NOT NULL AND part.properties -> 'currency' <> 'null'
                AND (jsonb_typeof(part.properties -> 'currency') <> 'string'
                    OR part.properties ->> 'currency' !~ '^[A-Za-z]{3}$')
                THEN spectrum._complaint('properties.currency', 'three letters',
                    part.properties -> 'currency')
        END AS error_msg,
        typed.refused_by
    FROM @extschema@.raw_events AS raw
    CROSS JOIN spectrum.config
    CROSS JOIN LATERAL (
        -- What the server has compressed is unpacked here, once. Of an event that is too large
        -- nothing is read but which and whose it is.
        SELECT
            CASE
                WHEN stored.is_plain THEN raw.payload
                WHEN pg_column_size(raw.payload #> '{}') <= config.max_payload_bytes
                    THEN raw.payload #> '{}'
                ELSE jsonb_build_object('event_id', raw.payload -> 'event_id',
                    'account_id', raw.payload -> 'account_id')
            END AS payload,
            NOT stored.is_plain
                AND pg_column_size(raw.payload #> '{}') > config.max_payload_bytes AS is_too_large
        FROM (SELECT pg_column_size(raw.payload) < 2000
                AND pg_column_compression(raw.payload) IS NULL AS is_plain) AS stored
        OFFSET 0
    ) AS body
    CROSS JOIN LATERAL (
        SELECT
            body.payload -> 'event_id' AS event_id,
            body.payload -> 'event_type' AS event_type,
            body.payload -> 'account_id' AS account_id,
            body.payload -> 'user_id' AS user_id,
            body.payload -> 'geo' AS geo,
            body.payload -> 'geo' -> 'country' AS country,
            body.payload -> 'geo' -> 'region' AS region,
            body.payload -> 'geo' -> 'city' AS city,
            body.payload -> 'properties' AS properties,
            body.payload -> 'properties' -> config.revenue_property AS revenue,
            coalesce(nullif(body.payload -> 'occurred_at', 'null'), body.payload -> 'timestamp')
                AS occurred_at,
            CASE WHEN body.payload -> 'occurred_at' <> 'null' THEN 'occurred_at'
                ELSE 'timestamp' END AS time_field
        OFFSET 0
    ) AS part
    CROSS JOIN LATERAL (
        SELECT
            body.payload ->> 'event_id' AS event_id,
            body.payload ->> 'event_type' AS event_type,
            body.payload ->> 'account_id' AS account_id,
            body.payload ->> 'user_id' AS user_id,
            part.geo ->> 'country' AS country,
            part.geo ->> 'region' AS region,
            part.geo ->> 'city' AS city,
            part.occurred_at #>> '{}' AS occurred_at,
            part.revenue #>> '{}' AS revenue
        OFFSET 0
    ) AS txt
    CROSS JOIN LATERAL (
        SELECT
            CASE
                WHEN txt.occurred_at IS NULL THEN raw.received_at
                WHEN jsonb_typeof(part.occurred_at) NOT IN ('string', 'number') THEN NULL
                -- A calendar day and a time of day with a zone, none meaning UTC. The usual forms
                -- first: a pattern costs about as much as all the rest of the reading.
                WHEN (translate(txt.occurred_at, '123456789', '000000000') IN (
                        '0000-00-00T00:00:00Z', '0000-00-00T00:00:00.000Z',
                        '0000-00-00T00:00:00.000000Z', '0000-00-00T00:00:00',
                        '0000-00-00T00:00:00.000000', '0000-00-00 00:00:00',
                        '0000-00-00 00:00:00.000000', '0000-00-00T00:00:00+00:00',
                        '0000-00-00T00:00:00.000000+00:00', '0000-00-00 00:00:00+00')
                    AND txt.occurred_at COLLATE "C" >= '1000'
                    AND substr(txt.occurred_at, 6, 2) COLLATE "C" BETWEEN '01' AND '12'
                    AND substr(txt.occurred_at, 9, 2) COLLATE "C" BETWEEN '01' AND '31'
                    AND substr(txt.occurred_at, 12, 2) COLLATE "C" <= '23'
                    AND substr(txt.occurred_at, 15, 2) COLLATE "C" <= '59'
                    AND substr(txt.occurred_at, 18, 2) COLLATE "C" <= '60'
                    AND (strpos(txt.occurred_at, '+') = 0
                        OR split_part(txt.occurred_at, '+', 2) IN ('00:00', '00')))
                    OR txt.occurred_at
                    ~ ('^[1-9][0-9]{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])'
                    '(?:[T ](?:[01][0-9]|2[0-3]):[0-5][0-9]'
                    '(?::(?:[0-5][0-9]|60)(?:\.[0-9]{1,9})?)?'
                    '(?: ?(?:Z|[+-](?:0[0-9]|1[0-5])(?::?[0-5][0-9])?))?)?$')
                    THEN CASE
                        WHEN substr(txt.occurred_at, 6, 5)
                            IN ('02-30', '02-31', '04-31', '06-31', '09-31', '11-31')
                            THEN NULL
                        WHEN substr(txt.occurred_at, 6, 5) = '02-29'
                            AND extract(day FROM make_date(left(txt.occurred_at, 4)::integer, 3, 1)
                                - interval '1 day') <> 29
                            THEN NULL
                        -- A cast takes a leap second, but no part of one.
                        WHEN substr(txt.occurred_at, 17, 4) = ':60.'
                            THEN (overlay(txt.occurred_at PLACING '59' FROM 18 FOR 2)
                                || CASE WHEN substr(txt.occurred_at, 20) ~ '[Z+-]' THEN ''
                                    ELSE ' UTC'
                                END)::timestamptz + interval '1 second'
                        WHEN right(txt.occurred_at, 1) = 'Z' OR strpos(txt.occurred_at, '+') > 0
                            OR strpos(substr(txt.occurred_at, 12), '-') > 0
                            THEN txt.occurred_at::timestamptz
                        ELSE (txt.occurred_at || ' UTC')::timestamptz
                    END
                -- ... or epoch seconds; from 10^11 on (the year 5138) they are milliseconds.
                WHEN jsonb_typeof(part.occurred_at) = 'number'
                    OR txt.occurred_at ~ '^-?[0-9]{1,15}(?:\.[0-9]{1,9})?$'
                    THEN CASE
                        WHEN abs(txt.occurred_at::numeric) < 1e11
                            THEN to_timestamp(
                                round(txt.occurred_at::numeric, 6)::double precision)
                        WHEN abs(txt.occurred_at::numeric) < 1e14
                            THEN to_timestamp(
                                round(txt.occurred_at::numeric / 1000, 6)::double precision)
                    END
            END AS occurred_at,
            CASE
                WHEN jsonb_typeof(part.revenue) = 'number'
                    OR (jsonb_typeof(part.revenue) = 'string' AND txt.revenue
                        ~ ('^[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})'
                        '(?:[eE][+-]?[0-9]{1,2})?$'))
                    THEN CASE
                        WHEN abs(txt.revenue::numeric) < 1e15 THEN txt.revenue::numeric
                    END
            END AS revenue,
            CASE
                WHEN body.is_too_large THEN 'max_payload_bytes'
                -- A property takes more than 8 bytes: most events are too short to be counted.
                WHEN pg_column_size(body.payload) > 8 * config.max_properties
                    AND jsonb_typeof(part.properties) = 'object'
                    THEN CASE
                        WHEN (SELECT count(*) FROM jsonb_object_keys(part.properties))
                            > config.max_properties
                            THEN 'max_properties'
                    END
            END AS refused_by
        OFFSET 0
    ) AS typed;
    COMMENT ON VIEW spectrum.readings IS
        'What Spectrum reads in each row of raw_events: the typed fields, or in error_msg why it '
        'cannot. Nothing is stored; a corrected rule or setting shows here at once.';
    COMMENT ON COLUMN spectrum.readings.row_id IS 'Place of the row in raw_events.';
    COMMENT ON COLUMN spectrum.readings.event_id IS
        'The event''s id: a UUID, a text made one by md5, or the row''s id where there is none.';
    COMMENT ON COLUMN spectrum.readings.occurred_at IS
        'occurred_at, else timestamp, else received_at. A time without a zone is UTC.';
    COMMENT ON COLUMN spectrum.readings.account_id IS 'Empty where missing; so are user_id and the '
        'parts of geography.';
    COMMENT ON COLUMN spectrum.readings.revenue IS
        'Amount under config.revenue_property; NULL where the event carries no money.';
    COMMENT ON COLUMN spectrum.readings.currency IS
        'Three capital letters, from the property currency or config.currency.';
    COMMENT ON COLUMN spectrum.readings.error_msg IS
        'The first field that cannot be read, what was expected there and its value.';
    COMMENT ON COLUMN spectrum.readings.refused_by IS
        'The cap that the event is over: max_payload_bytes or max_properties of spectrum.config.';
END
$$;
COMMENT ON FUNCTION spectrum._create_reading() IS 'Room 20: makes the view spectrum.readings.';
-- Room 20, claiming: which rows a batch takes. A claim locks rows and changes none of them, so a
-- worker that dies leaves them as they were. Rows that another worker holds are passed over.

CREATE FUNCTION spectrum._claim_between(
    p_from bigint,
    p_to bigint,
    p_limit integer,
    OUT row_ids tid[],
    OUT last_seq bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
BEGIN
    SELECT array_agg(claimed.row_id), max(claimed.seq) INTO row_ids, last_seq
    FROM (
        SELECT raw.ctid AS row_id, raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= p_from AND raw.seq < p_to AND raw.status = 'pending'
        ORDER BY raw.seq
        LIMIT p_limit
        FOR UPDATE SKIP LOCKED
    ) AS claimed;
    row_ids := coalesce(row_ids, '{}'::tid[]);
END
$$;
COMMENT ON FUNCTION spectrum._claim_between(bigint, bigint, integer) IS
    'Locks at most p_limit pending rows with p_from <= seq < p_to, in receive order. The plan is '
    'pinned to the index on seq: statistics of a table that fills and drains are of no use.';

CREATE FUNCTION spectrum._claim_requeued(p_limit integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
DECLARE
    v_seqs bigint[];
    v_rows tid[];
BEGIN
    -- The raw row first, then its entry, as in an UPDATE that sets a row back: whoever has locked
    -- the row owns the entry. A row that is done, say by an outside worker, needs none any more.
    WITH reachable AS MATERIALIZED (
        SELECT requeue.seq, found.row_id, found.is_open
        FROM spectrum.requeue
        CROSS JOIN LATERAL (
            SELECT
                raw.ctid AS row_id,
                raw.status IN ('pending', 'processing') OR raw.next_attempt_at <= now()
                    AS is_open
            FROM @extschema@.raw_events AS raw
            WHERE raw.seq = requeue.seq
            FOR UPDATE SKIP LOCKED
        ) AS found
        WHERE requeue.due_at <= now()
        ORDER BY requeue.seq
        LIMIT p_limit
    )
    SELECT
        array_agg(reachable.seq),
        array_agg(reachable.row_id ORDER BY reachable.seq) FILTER (WHERE reachable.is_open)
    INTO v_seqs, v_rows FROM reachable;
    DELETE FROM spectrum.requeue WHERE requeue.seq = ANY (v_seqs);
    RETURN coalesce(v_rows, '{}'::tid[]);
END
$$;
COMMENT ON FUNCTION spectrum._claim_requeued(integer) IS
    'Locks at most p_limit rows whose turn in spectrum.requeue has come and takes them off it.';

CREATE FUNCTION spectrum._claim(p_limit integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rows tid[] := spectrum._claim_requeued(p_limit);
    v_may_repeat boolean := cardinality(v_rows) > 0;
    v_claimed tid[];
    v_is_fair boolean := false;
    r_intake record;
    r_claim record;
BEGIN
    IF cardinality(v_rows) < p_limit THEN
        v_claimed := spectrum._claim_fairly(p_limit - cardinality(v_rows));
        v_is_fair := v_claimed <> '{}';
        v_rows := v_rows || v_claimed;
    END IF;
    SELECT intake.head_seq, intake.safe_seq INTO r_intake FROM spectrum.intake;

    IF cardinality(v_rows) < p_limit THEN
        r_claim := spectrum._claim_between(
            r_intake.head_seq, 9223372036854775807, p_limit - cardinality(v_rows)
        );
        v_rows := v_rows || r_claim.row_ids;
        PERFORM spectrum._advance_head(r_claim.last_seq + 1);
    END IF;

    IF cardinality(v_rows) < p_limit AND EXISTS (SELECT FROM spectrum.floods) THEN
        v_rows := v_rows || spectrum._claim_left_behind(p_limit - cardinality(v_rows), false);
        v_may_repeat := true;
    ELSIF cardinality(v_rows) < p_limit THEN
        v_may_repeat := v_may_repeat OR v_is_fair;
        r_claim := spectrum._claim_between(
            r_intake.safe_seq, r_intake.head_seq, p_limit - cardinality(v_rows)
        );
        v_rows := v_rows || r_claim.row_ids;
        PERFORM spectrum._advance_safe();
    END IF;
    IF v_may_repeat THEN
        -- One's own locks are not skipped: a row that was due again, or was taken in front of a
        -- flood, is met a second time.
        v_rows := ARRAY(SELECT DISTINCT row_id FROM unnest(v_rows) AS row_id ORDER BY row_id);
    END IF;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._claim(integer) IS
    'Locks the rows of one batch and returns their places: first what is due again, then from the '
    'head on (during a flood both in front of and behind it), and when the head is drained what '
    'was left behind it.';

CREATE FUNCTION spectrum._advance_head(p_seq bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_seq IS NULL THEN
        RETURN;
    END IF;
    -- Whoever holds the row is moving the mark himself; never wait for him.
    PERFORM FROM spectrum.intake WHERE intake.head_seq < p_seq FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        UPDATE spectrum.intake SET head_seq = p_seq;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._advance_head(bigint) IS
    'Moves the mark where claims begin forward, unless another worker is doing so.';

CREATE FUNCTION spectrum._writers()
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Whoever has drawn a number below the head, and cannot be seen yet, holds this lock by now.
    -- Transaction ids would not do: they are drawn later, and not in the order of the numbers.
    RETURN (
        SELECT coalesce(array_agg(DISTINCT writer.virtualtransaction), '{}')
        FROM pg_locks AS writer
        WHERE writer.locktype = 'relation' AND writer.mode = 'RowExclusiveLock'
            AND writer.relation = '@extschema@.raw_events'::regclass
            AND writer.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND writer.pid IS DISTINCT FROM pg_backend_pid()
    );
END
$$;
COMMENT ON FUNCTION spectrum._writers() IS
    'The transactions of others that are writing to raw_events.';

CREATE FUNCTION spectrum._advance_safe()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    r_intake record;
    v_writers text[];
BEGIN
    SELECT intake.head_seq, intake.safe_seq, intake.seen_seq, intake.seen_writers INTO r_intake
    FROM spectrum.intake
    FOR UPDATE SKIP LOCKED;
    -- A snapshot that is older than this statement may miss what was written meanwhile.
    IF NOT FOUND OR r_intake.safe_seq = r_intake.head_seq
        OR current_setting('transaction_isolation') <> 'read committed'
    THEN
        RETURN;
    END IF;

    v_writers := spectrum._writers();
    IF r_intake.seen_writers IS NULL THEN
        UPDATE spectrum.intake SET seen_seq = intake.head_seq, seen_writers = v_writers;
    ELSIF NOT r_intake.seen_writers && v_writers AND NOT EXISTS (
        SELECT FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= r_intake.safe_seq AND raw.seq < r_intake.seen_seq
            AND raw.status = 'pending'
    ) THEN
        UPDATE spectrum.intake
        SET safe_seq = intake.seen_seq,
            seen_seq = intake.head_seq,
            seen_writers = v_writers;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._advance_safe() IS
    'Moves the mark below which nothing is pending: up to where the head stood earlier, once '
    'nothing is pending there and all who were writing to raw_events at that time have ended.';

CREATE FUNCTION spectrum._patrol(p_rows bigint DEFAULT 100000)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    r_intake record;
    v_from bigint;
    v_found bigint;
BEGIN
    SELECT intake.patrol_seq, intake.safe_seq INTO r_intake FROM spectrum.intake
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    v_from := CASE WHEN r_intake.patrol_seq < r_intake.safe_seq THEN r_intake.patrol_seq ELSE 0 END;
    INSERT INTO spectrum.requeue (seq, due_at)
    SELECT
        raw.seq,
        CASE raw.status WHEN 'pending' THEN now() ELSE now() + config.processing_lease END
    FROM @extschema@.raw_events AS raw
    CROSS JOIN spectrum.config
    WHERE raw.seq >= v_from AND raw.seq < least(v_from + p_rows, r_intake.safe_seq)
        AND raw.status IN ('pending', 'processing')
    ON CONFLICT (seq) DO NOTHING;
    GET DIAGNOSTICS v_found = ROW_COUNT;
    UPDATE spectrum.intake SET patrol_seq = v_from + p_rows;
    DELETE FROM spectrum.requeue
    WHERE requeue.due_at <= now()
        AND NOT EXISTS (SELECT FROM @extschema@.raw_events AS raw WHERE raw.seq = requeue.seq);
    RETURN v_found;
END
$$;
COMMENT ON FUNCTION spectrum._patrol(bigint) IS
    'Looks at the next p_rows of raw_events below the safe mark, round and round, and requeues '
    'what is open there. It finds what neither marks nor trigger can see: rows inserted as '
    'processing, rows set back while triggers were off.';
-- Room 20, floods: one account's flood does not stop the events of others. Where more rows wait
-- than a batch takes, and most of the next ones are of one account, claims pass over that account's
-- rows: the head moves on to what others sent, and spectrum.floods notes where each account's rows
-- were left. Half of a batch is for those in front, half for what was left behind, and each half
-- takes what the other does not need: so batches are as full as ever.
--
-- To pass over a row writes nothing: it stays pending in raw_events. The rows left lie between
-- safe_seq and head_seq of spectrum.intake, where the last sweep finds them even if spectrum.floods
-- were lost: like the marks of intake its rows are hints.

CREATE FUNCTION spectrum._create_floods()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.floods') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.floods (
        account_id text COLLATE "C" NOT NULL CONSTRAINT floods_pkey PRIMARY KEY,
        next_seq bigint NOT NULL,
        end_seq bigint NOT NULL,
        waiting bigint NOT NULL,
        begun_at timestamptz NOT NULL DEFAULT now(),
        served_at timestamptz
    ) WITH (
        fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000
    );
    COMMENT ON TABLE spectrum.floods IS
        'Accounts of which so many events wait that batches pass over them, in part: one row each. '
        'Hints only, like spectrum.intake.';
    COMMENT ON COLUMN spectrum.floods.account_id IS 'As sent; empty where events name none.';
    COMMENT ON COLUMN spectrum.floods.next_seq IS 'Where the first of its rows was left.';
    COMMENT ON COLUMN spectrum.floods.end_seq IS 'After the last one that was passed over.';
    COMMENT ON COLUMN spectrum.floods.waiting IS
        'About how many of its rows were passed over and not taken since.';
    COMMENT ON COLUMN spectrum.floods.begun_at IS 'When it was noticed.';
    COMMENT ON COLUMN spectrum.floods.served_at IS 'The last batch that took some of them.';

    CREATE VIEW spectrum.waiting AS
    SELECT
        raw.seq,
        left(coalesce(raw.payload ->> 'account_id', ''), 200) COLLATE "C" AS account_id,
        pg_column_size(raw.payload) AS bytes
    FROM @extschema@.raw_events AS raw
    WHERE raw.status = 'pending';
    COMMENT ON VIEW spectrum.waiting IS
        'Raw events that are pending, and whose they are. To read all of it costs a look at each.';
    COMMENT ON COLUMN spectrum.waiting.seq IS 'raw_events.seq.';
    COMMENT ON COLUMN spectrum.waiting.account_id IS 'As sent; empty where it names none.';
    COMMENT ON COLUMN spectrum.waiting.bytes IS 'Of the payload as stored.';
END
$$;
COMMENT ON FUNCTION spectrum._create_floods() IS
    'Room 20: makes spectrum.floods and spectrum.waiting.';

CREATE FUNCTION spectrum._sense_flood(
    p_limit integer,
    OUT is_flooded boolean,
    OUT rows_to_look integer
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    v_head bigint := (SELECT intake.head_seq FROM spectrum.intake);
    v_share numeric := (SELECT config.account_share FROM spectrum.config);
    v_samples integer := least(100, greatest(10, p_limit / 50));
    r_sample record;
BEGIN
    is_flooded := EXISTS (SELECT FROM spectrum.floods);
    IF NOT is_flooded AND (v_share = 1 OR NOT EXISTS (
        SELECT FROM @extschema@.raw_events AS raw WHERE raw.seq >= v_head + p_limit
    )) THEN
        RETURN;
    END IF;

    SELECT
        max(owner.events) > v_share * sum(owner.events) AS is_flooded,
        coalesce(sum(owner.events) FILTER (WHERE NOT owner.is_known
            AND owner.events <= v_share * owner.all_events), 0) / sum(owner.events) AS others,
        sum(owner.bytes) / sum(owner.events) AS bytes
    INTO r_sample
    FROM (
        SELECT count(*) AS events, sum(count(*)) OVER () AS all_events,
            sum(waiting.bytes) AS bytes,
            EXISTS (SELECT FROM spectrum.floods WHERE floods.account_id = waiting.account_id)
                AS is_known
        FROM spectrum.waiting
        WHERE waiting.seq = ANY (ARRAY(
            SELECT v_head + p_limit::bigint * n / v_samples
            FROM generate_series(0, v_samples - 1) AS n
        ))
        GROUP BY waiting.account_id
    ) AS owner;
    is_flooded := is_flooded OR coalesce(r_sample.is_flooded, false);
    -- As far as it takes to find enough in front; not so far that it costs more than the batch.
    rows_to_look := least(10::bigint * p_limit, greatest(
        p_limit,
        least(p_limit / greatest(r_sample.others, 0.1), 64e6 / greatest(r_sample.bytes, 1))
    ));
END
$$;
COMMENT ON FUNCTION spectrum._sense_flood(integer) IS
    'Whether claims have to pass over rows of an account, by a sample of the next p_limit rows '
    'where more than these wait; and how many rows to look at for others.';

CREATE FUNCTION spectrum._claim_named(p_seqs bigint[])
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    v_rows tid[];
BEGIN
    SELECT array_agg(claimed.row_id) INTO v_rows
    FROM (
        SELECT raw.ctid AS row_id FROM @extschema@.raw_events AS raw
        WHERE raw.seq = ANY (p_seqs) AND raw.status = 'pending'
        FOR UPDATE SKIP LOCKED
    ) AS claimed;
    RETURN coalesce(v_rows, '{}'::tid[]);
END
$$;
COMMENT ON FUNCTION spectrum._claim_named(bigint[]) IS 'Locks rows of raw_events that are pending.';

CREATE FUNCTION spectrum._claim_in_front(p_limit integer, p_look integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
DECLARE
    v_share numeric := (SELECT config.account_share FROM spectrum.config);
    v_front integer := p_limit - floor(p_limit * v_share);
    v_writers text[] := spectrum._writers();
    v_from bigint;
    v_stop bigint;
    v_seqs bigint[];
    r_intake record;
BEGIN
    SELECT intake.head_seq, intake.safe_seq, intake.seen_seq, intake.late_seq,
        intake.seen_writers IS NOT NULL AS is_noted,
        coalesce(NOT intake.seen_writers && v_writers, false) AS is_clear
    INTO r_intake FROM spectrum.intake;
    -- From a little behind the head on, for what was committed late.
    v_from := greatest(r_intake.safe_seq, CASE WHEN EXISTS (SELECT FROM spectrum.floods)
        THEN greatest(r_intake.late_seq, r_intake.head_seq - p_look / 2)
        ELSE r_intake.head_seq - p_limit END);

    WITH waiting AS (
        SELECT waiting.seq, waiting.account_id FROM spectrum.waiting
        WHERE waiting.seq >= v_from
        ORDER BY waiting.seq
        LIMIT p_look
    ), owners AS MATERIALIZED (
        SELECT waiting.account_id, array_agg(waiting.seq) AS seqs,
            min(waiting.seq) AS first_seq, max(waiting.seq) AS last_seq,
            count(*) > p_limit * v_share OR EXISTS (
                SELECT FROM spectrum.floods WHERE floods.account_id = waiting.account_id
            ) AS is_flood
        FROM waiting
        GROUP BY waiting.account_id
    ), in_front AS MATERIALIZED (
        SELECT event.seq
        FROM owners CROSS JOIN LATERAL unnest(owners.seqs) AS event (seq)
        WHERE NOT owners.is_flood
        ORDER BY event.seq
        LIMIT v_front
    ), looked AS MATERIALIZED (
        SELECT CASE WHEN count(*) = v_front THEN max(in_front.seq)
            ELSE (SELECT max(owners.last_seq) FROM owners) END AS last_seq
        FROM in_front
    ), left_behind AS (
        INSERT INTO spectrum.floods (account_id, next_seq, end_seq, waiting)
        SELECT owners.account_id, owners.first_seq, least(owners.last_seq, looked.last_seq) + 1,
            CASE
                WHEN owners.first_seq >= r_intake.head_seq AND owners.last_seq <= looked.last_seq
                    THEN cardinality(owners.seqs)
                ELSE (SELECT count(*) FROM unnest(owners.seqs) AS event (seq)
                    WHERE event.seq BETWEEN r_intake.head_seq AND looked.last_seq)
            END
        FROM owners CROSS JOIN looked
        WHERE owners.is_flood AND owners.first_seq <= looked.last_seq
        ON CONFLICT (account_id) DO UPDATE SET
            end_seq = greatest(floods.end_seq, excluded.end_seq),
            waiting = floods.waiting + excluded.waiting
    )
    SELECT looked.last_seq, ARRAY(SELECT in_front.seq FROM in_front) INTO v_stop, v_seqs
    FROM looked;

    IF v_stop IS NULL THEN
        RETURN '{}'::tid[];
    END IF;
    -- What lay below seen_seq is visible since all who were writing then have ended, and was
    -- looked at now.
    UPDATE spectrum.intake
    SET head_seq = greatest(intake.head_seq, v_stop + 1),
        late_seq = CASE
            WHEN v_writers = '{}' THEN v_stop + 1
            WHEN r_intake.is_clear THEN greatest(v_from, least(intake.seen_seq, v_stop + 1))
            ELSE v_from
        END;
    IF r_intake.is_clear OR NOT r_intake.is_noted OR r_intake.seen_seq < v_from THEN
        UPDATE spectrum.intake SET seen_seq = intake.head_seq, seen_writers = spectrum._writers();
    END IF;
    RETURN spectrum._claim_named(v_seqs);
END
$$;
COMMENT ON FUNCTION spectrum._claim_in_front(integer, integer) IS
    'Looks at the next p_look pending rows, locks those of accounts within their share, up to what '
    'a batch of p_limit has for them, and notes the others as left behind.';

CREATE FUNCTION spectrum._claim_of_account(
    p_account_id text,
    p_from bigint,
    p_to bigint,
    p_limit integer,
    OUT row_ids tid[],
    OUT last_seq bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
BEGIN
    -- The account as in spectrum.waiting; rows cannot be locked through it one by one.
    SELECT array_agg(claimed.row_id), max(claimed.seq) INTO row_ids, last_seq
    FROM (
        SELECT raw.ctid AS row_id, raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= p_from AND raw.seq < p_to AND raw.status = 'pending'
            AND left(coalesce(raw.payload ->> 'account_id', ''), 200) = p_account_id COLLATE "C"
        ORDER BY raw.seq
        LIMIT p_limit
        FOR UPDATE SKIP LOCKED
    ) AS claimed;
    row_ids := coalesce(row_ids, '{}'::tid[]);
END
$$;
COMMENT ON FUNCTION spectrum._claim_of_account(text, bigint, bigint, integer) IS
    'Locks at most p_limit pending rows of one account with p_from <= seq < p_to.';

CREATE FUNCTION spectrum._claim_left_behind(p_limit integer, p_is_keeper boolean)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rows tid[] := '{}'::tid[];
    v_wanted integer;
    r_flood record;
    r_claim record;
BEGIN
    FOR r_flood IN
        SELECT floods.account_id, floods.next_seq, floods.end_seq,
            count(*) OVER () + 1 - row_number() OVER (
                ORDER BY floods.served_at NULLS FIRST, floods.next_seq
            ) AS still_to_serve
        FROM spectrum.floods
        ORDER BY still_to_serve DESC
    LOOP
        v_wanted := ceil((p_limit - cardinality(v_rows))::numeric / r_flood.still_to_serve);
        EXIT WHEN v_wanted = 0;
        r_claim := spectrum._claim_of_account(
            r_flood.account_id, r_flood.next_seq, r_flood.end_seq, v_wanted
        );
        v_rows := v_rows || r_claim.row_ids;
        IF p_is_keeper AND cardinality(r_claim.row_ids) < v_wanted THEN
            DELETE FROM spectrum.floods WHERE floods.account_id = r_flood.account_id;
        ELSIF p_is_keeper THEN
            UPDATE spectrum.floods
            SET next_seq = r_claim.last_seq + 1,
                waiting = greatest(floods.waiting - v_wanted, 0),
                served_at = clock_timestamp()
            WHERE floods.account_id = r_flood.account_id;
        END IF;
    END LOOP;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._claim_left_behind(integer, boolean) IS
    'Locks rows that were left behind, of each account as many, in the order of receipt; only the '
    'keeper of the marks moves them.';

CREATE FUNCTION spectrum._claim_fairly(p_limit integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rows tid[];
    v_before integer;
    r_sense record;
BEGIN
    -- Under a snapshot that is older than the statement, the marks cannot be moved safely.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN '{}'::tid[];
    END IF;
    r_sense := spectrum._sense_flood(p_limit);
    IF NOT r_sense.is_flooded THEN
        RETURN '{}'::tid[];
    END IF;
    -- One worker at a time keeps the marks; others take what comes, and never wait for him.
    PERFORM FROM spectrum.intake FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN '{}'::tid[];
    END IF;
    v_rows := spectrum._claim_in_front(p_limit, r_sense.rows_to_look);
    LOOP
        v_before := cardinality(v_rows);
        v_rows := v_rows || spectrum._claim_left_behind(p_limit - v_before, true);
        EXIT WHEN cardinality(v_rows) IN (v_before, p_limit);
    END LOOP;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._claim_fairly(integer) IS
    'During the flood of an account: locks rows of others in front of it and of what was left '
    'behind; nothing where there is none, or another worker is at it.';
-- Room 30: dimensions. Who, where and what, each natural key once. Key 0 is the unknown member, so
-- a fact never points at NULL. Filled by process_batch (room 40) in a fixed order of tables and,
-- inside each, in order of the natural key: two workers that meet the same newcomers wait for
-- each other instead of deadlocking. first_seen and last_seen follow with the next refresh
-- (room 50), so that workers never queue behind the row of a popular event type.
--
-- Names are looked up, not sorted for people: COLLATE "C" compares them byte by byte.
-- Members are never deleted and keys never change: a trigger refuses it. This takes the place of
-- foreign keys from the facts, which would cost 13 microseconds an event, more than all the rest.

CREATE FUNCTION spectrum._create_dimensions()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('warehouse.dim_accounts') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE warehouse.dim_accounts (
        account_key bigserial NOT NULL CONSTRAINT dim_accounts_pkey PRIMARY KEY,
        account_id text COLLATE "C" NOT NULL CONSTRAINT dim_accounts_account_id_key UNIQUE,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_accounts IS 'Accounts (tenants, customers) that events name.';
    COMMENT ON COLUMN warehouse.dim_accounts.account_key IS 'Key in facts; 0 is unknown.';
    COMMENT ON COLUMN warehouse.dim_accounts.account_id IS 'As sent; empty for the unknown.';
    INSERT INTO warehouse.dim_accounts (account_key, account_id) VALUES (0, '');

    CREATE TABLE warehouse.dim_users (
        user_key bigserial NOT NULL CONSTRAINT dim_users_pkey PRIMARY KEY,
        user_id text COLLATE "C" NOT NULL CONSTRAINT dim_users_user_id_key UNIQUE,
        account_key bigint NOT NULL DEFAULT 0,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_users IS 'Users that events name, one person across accounts.';
    COMMENT ON COLUMN warehouse.dim_users.user_key IS 'Key in facts; 0 is the unknown user.';
    COMMENT ON COLUMN warehouse.dim_users.user_id IS 'As sent; empty for the unknown user.';
    COMMENT ON COLUMN warehouse.dim_users.account_key IS
        'Account under which the user was met first. Numbers per account follow each event''s own.';
    INSERT INTO warehouse.dim_users (user_key, user_id) VALUES (0, '');

    CREATE TABLE warehouse.dim_geography (
        geo_key serial NOT NULL CONSTRAINT dim_geography_pkey PRIMARY KEY,
        country text COLLATE "C" NOT NULL,
        region text COLLATE "C" NOT NULL,
        city text COLLATE "C" NOT NULL,
        first_seen timestamptz,
        last_seen timestamptz,
        CONSTRAINT dim_geography_place_key UNIQUE (country, region, city)
    );
    COMMENT ON TABLE warehouse.dim_geography IS 'Places that events name; empty parts are unknown.';
    COMMENT ON COLUMN warehouse.dim_geography.geo_key IS 'Key in facts; 0 is the unknown place.';
    INSERT INTO warehouse.dim_geography (geo_key, country, region, city) VALUES (0, '', '', '');

    CREATE TABLE warehouse.dim_event_types (
        event_type_key serial NOT NULL CONSTRAINT dim_event_types_pkey PRIMARY KEY,
        event_type text COLLATE "C" NOT NULL
            CONSTRAINT dim_event_types_event_type_key UNIQUE,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_event_types IS 'Types of events, by name.';
    COMMENT ON COLUMN warehouse.dim_event_types.event_type_key IS
        'Key in facts; 0 is the unknown type, which no event has: one without a type fails.';
    INSERT INTO warehouse.dim_event_types (event_type_key, event_type) VALUES (0, '');

    PERFORM spectrum._finish_dimension('warehouse.dim_accounts', 'account_key');
    PERFORM spectrum._finish_dimension('warehouse.dim_users', 'user_key');
    PERFORM spectrum._finish_dimension('warehouse.dim_geography', 'geo_key');
    PERFORM spectrum._finish_dimension('warehouse.dim_event_types', 'event_type_key');
END
$$;
COMMENT ON FUNCTION spectrum._create_dimensions() IS
    'Room 30: makes the dimensions, each with its unknown member at key 0.';

CREATE FUNCTION spectrum._finish_dimension(p_dimension text, p_key text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('COMMENT ON COLUMN %s.first_seen IS %L', p_dimension,
        'Earliest occurred_at met, as of the last refresh.');
    EXECUTE format('COMMENT ON COLUMN %s.last_seen IS %L', p_dimension,
        'Latest occurred_at met, as of the last refresh.');
    EXECUTE format('CREATE TRIGGER keep_members BEFORE DELETE OR TRUNCATE OR UPDATE OF %I ON %s '
        'FOR EACH STATEMENT EXECUTE FUNCTION spectrum._refuse_removal()', p_key, p_dimension);
    EXECUTE format('COMMENT ON TRIGGER keep_members ON %s IS %L', p_dimension,
        'Facts point at members by key, without a foreign key.');
END
$$;
COMMENT ON FUNCTION spectrum._finish_dimension(text, text) IS
    'Gives a dimension what all of them have: the comments on when, and the guard of its keys.';

CREATE FUNCTION spectrum._refuse_removal()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'members of %.% are kept for ever', tg_table_schema, tg_table_name
        USING ERRCODE = 'restrict_violation',
            DETAIL = 'Facts point at them by key.',
            HINT = 'Members that no fact names do no harm.';
END
$$;
COMMENT ON FUNCTION spectrum._refuse_removal() IS
    'Trigger of the dimensions: raises 23001 where members would go or change their key.';

CREATE FUNCTION spectrum._add_members()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_owners text[];
BEGIN
    WITH added AS (
        INSERT INTO warehouse.dim_accounts (account_id)
        SELECT DISTINCT batch.account_id
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.account_key IS NULL
        ORDER BY batch.account_id
        ON CONFLICT (account_id) DO NOTHING
        RETURNING account_id
    )
    SELECT array_agg('*'::text) INTO v_owners FROM added;
    PERFORM spectrum._note_members('max_new_accounts', v_owners);

    INSERT INTO warehouse.dim_users (user_id, account_key)
    SELECT newcomers.user_id, (
            SELECT accounts.account_key FROM warehouse.dim_accounts AS accounts
            WHERE accounts.account_id = newcomers.account_id
        )
    FROM (SELECT DISTINCT ON (batch.user_id) batch.user_id, batch.account_id
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.user_key IS NULL
        ORDER BY batch.user_id, batch.seq) AS newcomers
    ORDER BY newcomers.user_id
    ON CONFLICT (user_id) DO NOTHING;

    WITH added AS (
        INSERT INTO warehouse.dim_geography (country, region, city)
        SELECT DISTINCT batch.country, batch.region, batch.city
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.geo_key IS NULL
        ORDER BY batch.country, batch.region, batch.city
        ON CONFLICT (country, region, city) DO NOTHING
        RETURNING country, region, city
    )
    SELECT array_agg(owners.account_id) INTO v_owners
    FROM (
        SELECT DISTINCT batch.account_id, batch.country, batch.region, batch.city
        FROM pg_temp.spectrum_batch AS batch
        JOIN added USING (country, region, city)
        WHERE batch.is_readable
    ) AS owners;
    PERFORM spectrum._note_members('max_new_places', v_owners);

    WITH added AS (
        INSERT INTO warehouse.dim_event_types (event_type)
        SELECT DISTINCT batch.event_type
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.event_type_key IS NULL
        ORDER BY batch.event_type
        ON CONFLICT (event_type) DO NOTHING
        RETURNING event_type
    )
    SELECT array_agg(owners.account_id) INTO v_owners
    FROM (
        SELECT DISTINCT batch.account_id, batch.event_type
        FROM pg_temp.spectrum_batch AS batch
        JOIN added USING (event_type)
        WHERE batch.is_readable
    ) AS owners;
    PERFORM spectrum._note_members('max_new_event_types', v_owners);
END
$$;
COMMENT ON FUNCTION spectrum._add_members() IS
    'Adds what the batch names and the dimensions do not have yet. Keys are looked up later, in '
    'a statement of its own: only that sees a member that another worker added meanwhile. What '
    'this batch added counts for the caps of the accounts that name it.';
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
    IF to_regclass('warehouse.' || v_name) IS NOT NULL THEN
        RETURN false;
    END IF;

    -- For a worker whose batch makes months too, longer: this wait keeps nobody from reading.
    v_wait := spectrum._bound_lock_waits(10);
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('months'));
    PERFORM spectrum._bound_lock_waits();
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
    'Makes the partition of one month (its first day) unless it is there. Readers go on reading; '
    'raises 55P03 where a lock cannot be had within config.lock_timeout, or where another '
    'transaction that makes months does not end within ten times that.';

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
-- Room 40, news: what changed in the facts, for whoever keeps numbers that follow them (room 50).
-- Each batch leaves, in its own transaction, one row that names the facts it inserted, and one row
-- for each fact it took back, with its content: that can be read nowhere else any more. The
-- numbers of both come from one sequence, drawn while the ledger's rows are locked, so what
-- happened to one event is in the order of the numbers.
--
-- A row a batch, not a row an event: an array element takes 32 bytes of WAL, a row of its own 170
-- with its removal.

CREATE FUNCTION spectrum._create_news()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.news') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.news (
        note_no bigserial NOT NULL CONSTRAINT news_pkey PRIMARY KEY,
        events integer NOT NULL,
        first_at timestamptz NOT NULL,
        last_at timestamptz NOT NULL,
        user_keys bigint[] NOT NULL,
        occurred_ats timestamptz[] NOT NULL,
        event_ids uuid[] NOT NULL
    ) WITH (
        autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100,
        toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 5000
    );
    ALTER TABLE spectrum.news ALTER COLUMN user_keys SET STORAGE EXTERNAL,
        ALTER COLUMN occurred_ats SET STORAGE EXTERNAL, ALTER COLUMN event_ids SET STORAGE EXTERNAL;
    COMMENT ON TABLE spectrum.news IS
        'Facts that no refresh has counted yet, one row a batch. Consumed by the next refresh.';
    COMMENT ON COLUMN spectrum.news.note_no IS
        'Shared with spectrum.withdrawals: the order in which one event came and went.';
    COMMENT ON COLUMN spectrum.news.events IS 'Facts in this row: the length of its arrays.';
    COMMENT ON COLUMN spectrum.news.first_at IS 'Earliest occurred_at among them.';
    COMMENT ON COLUMN spectrum.news.last_at IS 'Latest occurred_at among them.';
    COMMENT ON COLUMN spectrum.news.user_keys IS 'With the same element of the other two arrays: '
        'the key of the fact.';

    CREATE TABLE spectrum.withdrawals (
        note_no bigint NOT NULL,
        event_id uuid NOT NULL,
        occurred_at timestamptz NOT NULL,
        account_key bigint NOT NULL,
        user_key bigint NOT NULL,
        event_type_key integer NOT NULL,
        geo_key integer NOT NULL,
        properties jsonb NOT NULL,
        revenue numeric,
        currency text
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
    COMMENT ON TABLE spectrum.withdrawals IS
        'Facts taken back that refreshes still count, as they were. Consumed by the next refresh.';
    COMMENT ON COLUMN spectrum.withdrawals.note_no IS 'See spectrum.news.';
END
$$;
COMMENT ON FUNCTION spectrum._create_news() IS
    'Room 40: makes spectrum.news and spectrum.withdrawals.';
-- Room 40, the steps of a batch: read, add months and dimension members, insert facts, take back
-- facts, name copies. pg_temp.spectrum_batch holds what was read of the claimed rows between them.

CREATE FUNCTION spectrum._clear_batch()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('pg_temp.spectrum_batch') IS NULL THEN
        CREATE TEMPORARY TABLE spectrum_batch (
            row_id tid,
            seq bigint,
            id uuid,
            event_id uuid,
            occurred_at timestamptz,
            event_type text,
            account_id text,
            user_id text,
            country text,
            region text,
            city text,
            account_key bigint,
            user_key bigint,
            geo_key integer,
            event_type_key integer,
            properties jsonb,
            revenue numeric,
            currency text,
            is_readable boolean,
            is_first boolean NOT NULL DEFAULT true,
            was_read boolean,
            can_pass boolean NOT NULL DEFAULT false,
            error_msg text,
            copy_of uuid,
            refused_by text
        ) ON COMMIT DELETE ROWS;
    ELSIF pg_relation_size('pg_temp.spectrum_batch') > 0 THEN
        -- Not DELETE: each part of a parted batch would wade through the rows of all before it.
        TRUNCATE pg_temp.spectrum_batch;
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._clear_batch() IS
    'Makes the session''s pg_temp.spectrum_batch, or empties it.';

CREATE FUNCTION spectrum._read_batch(p_rows tid[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    PERFORM spectrum._clear_batch();
    INSERT INTO pg_temp.spectrum_batch (
        row_id, seq, id, event_id, occurred_at, event_type, account_id, user_id,
        country, region, city, account_key, user_key, geo_key, event_type_key,
        properties, revenue, currency, is_readable, was_read, error_msg, refused_by
    )
    SELECT
        reading.row_id, reading.seq, reading.id, reading.event_id, reading.occurred_at,
        reading.event_type, reading.account_id, reading.user_id,
        reading.country, reading.region, reading.city,
        accounts.account_key, users.user_key, geography.geo_key, event_types.event_type_key,
        reading.properties, reading.revenue, reading.currency,
        reading.error_msg IS NULL, reading.attempts > 0, reading.error_msg, reading.refused_by
    FROM spectrum.readings AS reading
    LEFT JOIN warehouse.dim_accounts AS accounts USING (account_id)
    LEFT JOIN warehouse.dim_users AS users USING (user_id)
    LEFT JOIN warehouse.dim_geography AS geography USING (country, region, city)
    LEFT JOIN warehouse.dim_event_types AS event_types USING (event_type)
    WHERE reading.row_id = ANY (p_rows);
END
$$;
COMMENT ON FUNCTION spectrum._read_batch(tid[]) IS
    'Reads the claimed rows into pg_temp.spectrum_batch, with the keys of the members known.';

CREATE FUNCTION spectrum._find_firsts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE pg_temp.spectrum_batch AS batch
    SET is_first = false
    FROM (
        SELECT repeated.event_id, min(repeated.seq) AS seq
        FROM pg_temp.spectrum_batch AS repeated
        WHERE repeated.is_readable
        GROUP BY repeated.event_id
        HAVING count(*) > 1
    ) AS firsts
    WHERE batch.event_id = firsts.event_id AND batch.seq > firsts.seq;
END
$$;
COMMENT ON FUNCTION spectrum._find_firsts() IS
    'Of rows with one event_id inside the batch, only the first received may become a fact.';

CREATE FUNCTION spectrum._add_months(p_from timestamptz, p_to timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_month date;
    v_span tstzrange;
BEGIN
    FOR v_month IN
        SELECT month::date FROM spectrum._months(p_from, p_to) AS month
        WHERE to_regclass('warehouse.' || spectrum._month_name(month)) IS NULL
    LOOP
        v_span := tstzrange(
            v_month::timestamp AT TIME ZONE 'UTC', (v_month + interval '1 month') AT TIME ZONE 'UTC'
        );
        CONTINUE WHEN NOT EXISTS (
            SELECT FROM pg_temp.spectrum_batch AS batch
            WHERE batch.is_readable AND batch.occurred_at <@ v_span
        );
        BEGIN
            PERFORM spectrum._add_month(v_month);
        EXCEPTION
            WHEN lock_not_available THEN
                UPDATE pg_temp.spectrum_batch AS batch
                SET is_readable = false,
                    error_msg = format('occurred_at: the partition of %s could not be made within '
                        'config.lock_timeout, another session holds a lock',
                        to_char(v_month, 'YYYY-MM')),
                    can_pass = true
                WHERE batch.is_readable AND batch.occurred_at <@ v_span;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._add_months(timestamptz, timestamptz) IS
    'Makes the months that events of the batch, all between two times, need. A month that another '
    'session locks out fails its events for now; they are tried again.';

CREATE FUNCTION spectrum._withdraw(p_event_ids uuid[], p_seqs bigint[] DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    WITH entries AS (
        DELETE FROM warehouse.event_ledger AS ledger
        WHERE ledger.event_id = ANY (p_event_ids)
            AND (p_seqs IS NULL OR ledger.seq = ANY (p_seqs))
        RETURNING ledger.event_id, ledger.occurred_at, ledger.user_key
    ), facts AS (
        DELETE FROM warehouse.fact_events AS fact
        USING entries
        WHERE fact.user_key = entries.user_key
            AND fact.occurred_at = entries.occurred_at
            AND fact.event_id = entries.event_id
        RETURNING fact.*
    )
    INSERT INTO spectrum.withdrawals (
        note_no, event_id, occurred_at, account_key, user_key, event_type_key, geo_key,
        properties, revenue, currency
    )
    SELECT
        nextval('spectrum.news_note_no_seq'), facts.event_id, facts.occurred_at,
        facts.account_key, facts.user_key, facts.event_type_key, facts.geo_key,
        facts.properties, facts.revenue, facts.currency
    FROM facts;
END
$$;
COMMENT ON FUNCTION spectrum._withdraw(uuid[], bigint[]) IS
    'Takes facts back, with their ledger entries, so that they can be made again or not at all: '
    'where rows are named, only what is theirs, not what another worker has made of an earlier '
    'row meanwhile.';

CREATE FUNCTION spectrum._insert_facts()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_loaded bigint;
    v_events bigint;
BEGIN
    WITH new_facts AS MATERIALIZED (
        SELECT
            batch.event_id, batch.seq, batch.occurred_at, batch.properties, batch.revenue,
            batch.currency,
            coalesce(batch.account_key, (
                SELECT dim.account_key FROM warehouse.dim_accounts AS dim
                WHERE dim.account_id = batch.account_id
            )) AS account_key,
            coalesce(batch.user_key, (
                SELECT dim.user_key FROM warehouse.dim_users AS dim
                WHERE dim.user_id = batch.user_id
            )) AS user_key,
            coalesce(batch.event_type_key, (
                SELECT dim.event_type_key FROM warehouse.dim_event_types AS dim
                WHERE dim.event_type = batch.event_type
            )) AS event_type_key,
            coalesce(batch.geo_key, (
                SELECT dim.geo_key FROM warehouse.dim_geography AS dim
                WHERE dim.country = batch.country AND dim.region = batch.region
                    AND dim.city = batch.city
            )) AS geo_key
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.is_readable AND batch.is_first
            AND NOT EXISTS (
                SELECT FROM warehouse.event_ledger AS ledger
                WHERE ledger.event_id = batch.event_id
            )
    ), entries AS (
        INSERT INTO warehouse.event_ledger (event_id, seq, occurred_at, user_key)
        SELECT event_id, seq, occurred_at, user_key FROM new_facts
        ORDER BY event_id
    ), notes AS (
        INSERT INTO spectrum.news (
            events, first_at, last_at, user_keys, occurred_ats, event_ids
        )
        SELECT count(*), min(occurred_at), max(occurred_at), array_agg(user_key),
            array_agg(occurred_at), array_agg(event_id)
        FROM new_facts
        HAVING count(*) > 0
    ), facts AS (
        INSERT INTO warehouse.fact_events (
            event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
            revenue, currency
        )
        SELECT
            event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
            revenue, currency
        FROM new_facts
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM facts), (SELECT count(*) FROM new_facts) INTO v_loaded, v_events;
    IF v_loaded < v_events THEN
        RAISE EXCEPTION 'a trigger on warehouse.fact_events keeps the event out'
            USING ERRCODE = 'triggered_data_change_violation';
    END IF;
    RETURN v_loaded;
END
$$;
COMMENT ON FUNCTION spectrum._insert_facts() IS
    'Inserts the batch''s events that the ledger does not know: ledger, facts and the news of '
    'them. Returns how many; raises 27000 where a trigger of the user''s own keeps one out.';

CREATE FUNCTION spectrum._withdraw_reread(p_is_retry boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_event_ids uuid[];
    v_seqs bigint[];
BEGIN
    SELECT array_agg(batch.event_id ORDER BY batch.event_id), array_agg(batch.seq)
    INTO v_event_ids, v_seqs
    FROM pg_temp.spectrum_batch AS batch
    WHERE (batch.was_read OR p_is_retry) AND batch.seq = (
        SELECT ledger.seq FROM warehouse.event_ledger AS ledger
        WHERE ledger.event_id = batch.event_id
    );
    IF v_event_ids IS NULL THEN
        RETURN;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids, v_seqs);

    -- Where the row cannot be read any more, a copy of it may step in.
    UPDATE @extschema@.raw_events AS raw SET status = 'pending'
    WHERE raw.copy_of = ANY (ARRAY(
            SELECT batch.id FROM pg_temp.spectrum_batch AS batch
            WHERE NOT batch.is_readable AND batch.event_id = ANY (v_event_ids)
        ))
        AND raw.status = 'done';
END
$$;
COMMENT ON FUNCTION spectrum._withdraw_reread(boolean) IS
    'A row read again has its own fact made again: takes back the facts of such rows.';

CREATE FUNCTION spectrum._take_over()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_event_ids uuid[];
    v_first_ids uuid[];
    v_later_seqs bigint[];
BEGIN
    -- Events that count by a row received after ours.
    SELECT
        array_agg(batch.event_id ORDER BY batch.event_id),
        array_agg(batch.id ORDER BY batch.event_id),
        array_agg(ledger.seq ORDER BY batch.event_id)
    INTO v_event_ids, v_first_ids, v_later_seqs
    FROM pg_temp.spectrum_batch AS batch
    CROSS JOIN LATERAL (
        SELECT known.seq FROM warehouse.event_ledger AS known
        WHERE known.event_id = batch.event_id
        OFFSET 0
    ) AS ledger
    WHERE batch.is_readable AND batch.is_first AND ledger.seq > batch.seq;
    IF v_event_ids IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids, v_later_seqs);

    -- That row and its copies are copies of ours from now on; what is not done will find out.
    UPDATE @extschema@.raw_events AS raw SET copy_of = later.first_id
    FROM (
        SELECT owner.id, unnested.first_id
        FROM unnest(v_later_seqs, v_first_ids) AS unnested (seq, first_id)
        JOIN @extschema@.raw_events AS owner USING (seq)
    ) AS later
    WHERE (raw.id = later.id OR raw.copy_of = later.id) AND raw.status = 'done';
    RETURN spectrum._insert_facts();
END
$$;
COMMENT ON FUNCTION spectrum._take_over() IS
    'The first row received counts, whichever worker came first: replaces facts made from a later '
    'copy and returns how many.';

CREATE FUNCTION spectrum._name_copies()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_copies bigint;
BEGIN
    -- What a copy repeats must stay: until commit no other worker takes it back.
    UPDATE pg_temp.spectrum_batch AS batch
    SET copy_of = coalesce(
        (SELECT raw.id FROM @extschema@.raw_events AS raw WHERE raw.seq = copies.first_seq),
        batch.event_id
    )
    FROM (
        SELECT events.seq, ledger.seq AS first_seq
        FROM (
            SELECT readable.event_id, readable.seq FROM pg_temp.spectrum_batch AS readable
            WHERE readable.is_readable
            ORDER BY readable.event_id
        ) AS events
        CROSS JOIN LATERAL (
            SELECT known.seq FROM warehouse.event_ledger AS known
            WHERE known.event_id = events.event_id AND known.seq < events.seq
            FOR KEY SHARE
        ) AS ledger
    ) AS copies
    WHERE batch.seq = copies.seq;
    GET DIAGNOSTICS v_copies = ROW_COUNT;

    -- Whatever was a copy of one of them, while that counted, repeats the same row now.
    UPDATE @extschema@.raw_events AS raw
    SET copy_of = (
        SELECT batch.copy_of FROM pg_temp.spectrum_batch AS batch WHERE batch.id = raw.copy_of
    )
    WHERE raw.copy_of = ANY (ARRAY(
            SELECT batch.id FROM pg_temp.spectrum_batch AS batch WHERE batch.copy_of IS NOT NULL
        ))
        AND raw.status = 'done';
    RETURN v_copies;
END
$$;
COMMENT ON FUNCTION spectrum._name_copies() IS
    'Notes for each copy in the batch which row it repeats (the event_id where that row was '
    'purged), and returns how many there are.';
-- Room 40, the batch: claim, read, add months and dimension members, insert facts, mark. All of it
-- in the caller's transaction, so after a crash every row is either done with its fact or pending
-- as before.
--
-- Order of locks, the same in every worker: raw rows (passing over locked ones), months,
-- dimensions in order of their names, ledger in order of event_id.

CREATE FUNCTION spectrum._mark_rows()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    UPDATE @extschema@.raw_events AS raw
    SET status = CASE WHEN batch.is_readable THEN 'done' ELSE 'failed' END,
        processed_at = now(),
        error_msg = batch.error_msg,
        attempts = raw.attempts + 1,
        next_attempt_at = CASE WHEN batch.can_pass AND raw.attempts + 1 < config.max_attempts
            THEN now() + config.retry_delay * least(2 ^ raw.attempts, 1440)
        END,
        copy_of = batch.copy_of
    FROM pg_temp.spectrum_batch AS batch
    CROSS JOIN spectrum.config
    WHERE raw.ctid = batch.row_id;

    INSERT INTO spectrum.requeue (seq, due_at)
    SELECT batch.seq, marked.next_attempt_at
    FROM pg_temp.spectrum_batch AS batch
    CROSS JOIN LATERAL (
        SELECT raw.next_attempt_at FROM @extschema@.raw_events AS raw
        WHERE raw.seq = batch.seq
        OFFSET 0
    ) AS marked
    WHERE batch.can_pass AND marked.next_attempt_at IS NOT NULL
    ON CONFLICT (seq) DO UPDATE SET due_at = excluded.due_at;
END
$$;
COMMENT ON FUNCTION spectrum._mark_rows() IS
    'Marks the claimed rows done or failed. A failure whose cause can pass is tried again, after '
    'a delay that doubles, up to config.max_attempts.';

CREATE FUNCTION spectrum._load_rows(
    p_rows tid[],
    p_is_retry boolean,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_batch record;
    v_is_refused boolean;
BEGIN
    PERFORM spectrum._read_batch(p_rows);
    SELECT
        p_is_retry OR bool_or(batch.was_read) AS has_reread,
        bool_or(batch.is_readable AND batch.account_key IS NULL) AS has_accounts,
        bool_or(batch.is_readable AND batch.user_key IS NULL) AS has_users,
        bool_or(batch.is_readable AND batch.geo_key IS NULL) AS has_places,
        bool_or(batch.is_readable AND batch.event_type_key IS NULL) AS has_types,
        bool_or(batch.refused_by IS NOT NULL) AS has_refused,
        min(batch.occurred_at) FILTER (WHERE batch.is_readable) AS first_at,
        max(batch.occurred_at) FILTER (WHERE batch.is_readable) AS last_at
    INTO r_batch FROM pg_temp.spectrum_batch AS batch;

    PERFORM spectrum._add_months(r_batch.first_at, r_batch.last_at);
    v_is_refused := r_batch.has_refused;
    IF r_batch.has_accounts THEN
        v_is_refused := spectrum._refuse_newcomers('max_new_accounts') OR v_is_refused;
    END IF;
    IF r_batch.has_types THEN
        v_is_refused := spectrum._refuse_newcomers('max_new_event_types') OR v_is_refused;
    END IF;
    IF r_batch.has_places THEN
        v_is_refused := spectrum._refuse_newcomers('max_new_places') OR v_is_refused;
    END IF;
    IF r_batch.has_accounts OR r_batch.has_users OR r_batch.has_places OR r_batch.has_types THEN
        PERFORM spectrum._add_members();
    END IF;
    IF v_is_refused THEN
        PERFORM spectrum._note_refusals();
    END IF;
    PERFORM spectrum._find_firsts();
    IF r_batch.has_reread THEN
        PERFORM spectrum._withdraw_reread(p_is_retry);
    END IF;
    loaded := spectrum._insert_facts();
    failed := (SELECT count(*) FROM pg_temp.spectrum_batch AS batch WHERE NOT batch.is_readable);
    duplicates := 0;
    IF loaded + failed < cardinality(p_rows) THEN
        loaded := loaded + spectrum._take_over();
        duplicates := spectrum._name_copies();
    END IF;
    IF loaded + duplicates + failed <> cardinality(p_rows) THEN
        RAISE EXCEPTION 'the event is neither a fact nor a copy: another worker changed what it '
            'repeats'
            USING ERRCODE = 'triggered_data_change_violation';
    END IF;
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._load_rows(tid[], boolean) IS
    'Takes claimed rows all the way, set by set, and counts what became of them. Raises 27000 '
    'rather than leave one out. A retry looks for facts of all rows, whatever their attempts say.';

CREATE FUNCTION spectrum._fail_row(p_row tid, p_reason text, p_can_pass boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._clear_batch();
    BEGIN
        PERFORM spectrum._read_batch(ARRAY[p_row]);
    EXCEPTION
        -- Even its reading raises.
        WHEN data_exception OR program_limit_exceeded THEN
            INSERT INTO pg_temp.spectrum_batch (row_id, seq, id, event_id)
            SELECT raw.ctid, raw.seq, raw.id, ledger.event_id
            FROM @extschema@.raw_events AS raw
            LEFT JOIN warehouse.event_ledger AS ledger ON raw.attempts > 0 AND ledger.seq = raw.seq
            WHERE raw.ctid = p_row;
    END;
    UPDATE pg_temp.spectrum_batch
    SET is_readable = false,
        error_msg = translate(p_reason, E'\n\r', '  '),
        can_pass = p_can_pass;
    PERFORM spectrum._withdraw_reread(true);
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._fail_row(tid, text, boolean) IS
    'Marks one claimed row failed, for a reason that only the warehouse found.';

CREATE FUNCTION spectrum._load_patiently(
    p_rows tid[],
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_key text;
BEGIN
    FOR v_try IN 1 .. 3 LOOP
        BEGIN
            SELECT * INTO loaded, duplicates, failed
            FROM spectrum._load_rows(p_rows, v_try > 1);
            RETURN;
        EXCEPTION
            WHEN unique_violation OR triggered_data_change_violation THEN
                -- Of many rows, what is no race for an event_id is found by parts.
                GET STACKED DIAGNOSTICS v_key = CONSTRAINT_NAME;
                IF v_try = 3 OR (cardinality(p_rows) > 1 AND v_key NOT LIKE '%\_pkey') THEN
                    RAISE;
                END IF;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._load_patiently(tid[]) IS
    'Loads claimed rows; looks again where another worker brought the same event_id meanwhile.';

CREATE FUNCTION spectrum._is_refusal(p_state text)
RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT p_state ~ '^(22|23|27|54|P0|[689I-OQ-WYZ])'
$$;
COMMENT ON FUNCTION spectrum._is_refusal(text) IS
    'Whether an error, by its SQLSTATE, is about the rows: data, constraints, limits, what a '
    'trigger raises, in a class of its own too. Not: locks, resources, statements that are wrong.';

CREATE FUNCTION spectrum._load_in_parts(
    p_rows tid[],
    p_is_refused boolean,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint,
    OUT was_refused boolean
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rows integer := cardinality(p_rows);
    v_state text;
    v_reason text;
    r_part record;
BEGIN
    IF v_rows = 1 OR NOT p_is_refused THEN
        BEGIN
            SELECT * INTO loaded, duplicates, failed FROM spectrum._load_patiently(p_rows);
            was_refused := false;
            RETURN;
        EXCEPTION
            -- What reading could not foresee, say a constraint of the user's own.
            WHEN OTHERS OR assert_failure THEN
                GET STACKED DIAGNOSTICS v_state = RETURNED_SQLSTATE, v_reason = MESSAGE_TEXT;
                IF NOT spectrum._is_refusal(v_state) THEN
                    RAISE;
                END IF;
        END;
    END IF;

    loaded := 0;
    duplicates := 0;
    failed := 0;
    IF v_rows = 1 THEN
        PERFORM spectrum._fail_row(
            p_rows[1], format('%s (SQLSTATE %s)', v_reason, v_state), v_state !~ '^(22|54)'
        );
        failed := 1;
        was_refused := true;
        RETURN;
    END IF;
    was_refused := false;
    FOR v_part IN 0 .. 3 LOOP
        CONTINUE WHEN v_rows * v_part / 4 = v_rows * (v_part + 1) / 4;
        -- Where none was refused in the other parts, one is in the last: no use to try it whole.
        r_part := spectrum._load_in_parts(
            p_rows[v_rows * v_part / 4 + 1 : v_rows * (v_part + 1) / 4],
            v_part = 3 AND NOT was_refused
        );
        loaded := loaded + r_part.loaded;
        duplicates := duplicates + r_part.duplicates;
        failed := failed + r_part.failed;
        was_refused := was_refused OR r_part.was_refused;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._load_in_parts(tid[], boolean) IS
    'Loads claimed rows of which the warehouse refuses one: quarters them until it is found and '
    'fails alone. One such row costs its batch little more than one further pass.';

CREATE FUNCTION spectrum._wait_for_turn(p_is_alone boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_key bigint := spectrum._lock_key('batch');
    v_wait text := spectrum._bound_lock_waits(CASE WHEN p_is_alone THEN 10 ELSE 1 END);
BEGIN
    IF p_is_alone THEN
        PERFORM pg_advisory_xact_lock(v_key);
    ELSE
        PERFORM pg_advisory_xact_lock_shared(v_key);
    END IF;
    PERFORM set_config('lock_timeout', v_wait, true);
EXCEPTION
    -- Then beside the others: a deadlock is the worst that may come of it. It may have come
    -- already: who met rows of an earlier try sleeps until this transaction ends.
    WHEN lock_not_available OR deadlock_detected THEN
        PERFORM set_config('lock_timeout', v_wait, true);
END
$$;
COMMENT ON FUNCTION spectrum._wait_for_turn(boolean) IS
    'Lets a batch begin: beside others, or with none other under way; waits for that no longer '
    'than config.lock_timeout, or ten times that.';

CREATE FUNCTION spectrum._process_batch(
    p_limit integer,
    OUT claimed bigint,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET work_mem = '64MB'
SET datestyle = 'ISO'
SET intervalstyle = 'postgres'
SET enable_seqscan = off
SET enable_memoize = off
AS $$
DECLARE
    v_rows tid[];
    v_is_refused boolean;
BEGIN
    IF p_limit NOT BETWEEN 1 AND 1000000 THEN
        PERFORM spectrum._reject('p_limit', p_limit::text, 'a number from 1 to 1000000');
    END IF;
    -- Rows read again and parts take locks on the ledger out of order: where that led to a
    -- deadlock, or a batch must be parted, all is let go and done again with no other batch beside.
    FOR v_try IN 1 .. 10 LOOP
        BEGIN
            PERFORM spectrum._wait_for_turn(v_try > 1);
            v_rows := spectrum._claim(
                coalesce(p_limit, (SELECT config.batch_size FROM spectrum.config))
            );
            claimed := cardinality(v_rows);
            loaded := 0;
            duplicates := 0;
            failed := 0;
            IF claimed > 0 AND v_try = 1 THEN
                SELECT * INTO loaded, duplicates, failed FROM spectrum._load_patiently(v_rows);
            ELSIF claimed > 0 THEN
                SELECT parts.loaded, parts.duplicates, parts.failed
                INTO loaded, duplicates, failed
                FROM spectrum._load_in_parts(v_rows, v_is_refused) AS parts;
            END IF;
            RETURN;
        EXCEPTION
            WHEN OTHERS OR assert_failure THEN
                v_is_refused := spectrum._is_refusal(sqlstate);
                IF v_try = 10 OR NOT (v_is_refused OR sqlstate = '40P01') THEN
                    RAISE;
                END IF;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._process_batch(integer) IS
    'One batch: what process_batch and run share. The settings, and subqueries that name the row '
    'they look up, pin every statement below to index look-ups: right for a batch whatever the '
    'size of the tables, while statistics of tables that fill and drain mislead.';
-- Room 40, the door: process_batch, for anyone who owns the tables.

CREATE FUNCTION spectrum._log_batch(
    p_run_id bigint,
    p_limit integer,
    OUT claimed bigint,
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
BEGIN
    SELECT batch.claimed, batch.loaded, batch.duplicates, batch.failed
    INTO claimed, loaded, duplicates, failed
    FROM spectrum._process_batch(p_limit) AS batch;
    IF claimed > 0 THEN
        INSERT INTO spectrum.run_log (
            run_id, step, started_at, finished_at, claimed, loaded, duplicates, failed
        ) VALUES (
            p_run_id, 'process', v_started_at, clock_timestamp(),
            _log_batch.claimed, _log_batch.loaded, _log_batch.duplicates, _log_batch.failed
        );
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._log_batch(bigint, integer) IS
    'One batch and its row in the run log; an idle one leaves none.';

CREATE PROCEDURE spectrum.process_batch(
    p_limit integer DEFAULT NULL,
    INOUT claimed bigint DEFAULT NULL,
    INOUT loaded bigint DEFAULT NULL,
    INOUT duplicates bigint DEFAULT NULL,
    INOUT failed bigint DEFAULT NULL
)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._require_primary();
    SELECT batch.claimed, batch.loaded, batch.duplicates, batch.failed
    INTO claimed, loaded, duplicates, failed
    FROM spectrum._log_batch(NULL, p_limit) AS batch;
END
$$;
COMMENT ON PROCEDURE spectrum.process_batch(integer, bigint, bigint, bigint, bigint) IS
    'Takes up to p_limit pending events (default config.batch_size) into the warehouse, in the '
    'caller''s transaction, and returns how many it claimed, loaded, found to be copies, failed. '
    'Any number of sessions may call it at once.';
-- Room 50, reports: what the standing views are kept by. Every standing number is a sum of what
-- single users contribute to it. A report keeps its sums in tables (analytics.mv_*), and beside
-- them, where it needs more than the news to tell what a user contributed so far, a rollup table.
-- A refresh takes the news of the batches, and each report moves its sums by the difference.
--
-- A report that is new, or whose definition or calendar changed, is built from the history, some
-- users at a time in the order of their keys. It follows the news of the users it holds already;
-- the report that it replaces stays served until it is complete.

CREATE FUNCTION spectrum._create_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.reports') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.reports (
        report_id serial NOT NULL CONSTRAINT reports_pkey PRIMARY KEY,
        kind text NOT NULL,
        name text NOT NULL,
        definition jsonb NOT NULL DEFAULT '{}',
        built_to bigint NOT NULL DEFAULT -1,
        state text NOT NULL DEFAULT 'building'
            CONSTRAINT reports_state_is_known CHECK (state IN ('building', 'served', 'discarded')),
        follows_news boolean NOT NULL DEFAULT true,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    CREATE UNIQUE INDEX reports_state_key ON spectrum.reports (kind, name, state)
    WHERE state <> 'discarded';
    COMMENT ON TABLE spectrum.reports IS
        'The standing reports: which tables are kept for which definition. Two of one kind and '
        'name: the one that is served, and the one that will take its place once it is built.';
    COMMENT ON COLUMN spectrum.reports.report_id IS 'Key in the mv_ and rollup_ tables.';
    COMMENT ON COLUMN spectrum.reports.kind IS 'Which question: see spectrum.report_kinds.';
    COMMENT ON COLUMN spectrum.reports.name IS 'Of the definition; empty where there is only one.';
    COMMENT ON COLUMN spectrum.reports.definition IS
        'The definition as it was when the report was begun.';
    COMMENT ON COLUMN spectrum.reports.built_to IS
        'It counts the users with keys up to this one; the highest bigint: all, also future ones.';
    COMMENT ON COLUMN spectrum.reports.state IS
        'building; served: the views show it; discarded: refreshes delete what it kept.';
    COMMENT ON COLUMN spectrum.reports.follows_news IS
        'False from a change of the calendar on: shown as it was until its successor is complete.';
    COMMENT ON COLUMN spectrum.reports.created_at IS 'When it was defined.';

    CREATE TABLE spectrum.report_kinds (
        kind text NOT NULL CONSTRAINT report_kinds_pkey PRIMARY KEY,
        position integer NOT NULL,
        maintained_by text NOT NULL,
        tables text[] NOT NULL,
        views text[] NOT NULL
    );
    COMMENT ON TABLE spectrum.report_kinds IS
        'The questions that have standing views, in the order in which a refresh serves them.';
    COMMENT ON COLUMN spectrum.report_kinds.kind IS 'Name of the question.';
    COMMENT ON COLUMN spectrum.report_kinds.position IS
        'Order of refresh: a report may read what one before it keeps.';
    COMMENT ON COLUMN spectrum.report_kinds.maintained_by IS
        'Function of schema analytics that moves the tables by the news: (report_id, built_to).';
    COMMENT ON COLUMN spectrum.report_kinds.tables IS
        'Tables that hold rows of these reports, by report_id.';
    COMMENT ON COLUMN spectrum.report_kinds.views IS
        'Views of analytics that show them; analytics._standing_<view>() makes the same from all '
        'events, for verify().';

    CREATE TABLE spectrum.watermark (
        is_only boolean NOT NULL DEFAULT true
            CONSTRAINT watermark_pkey PRIMARY KEY
            CONSTRAINT watermark_is_one_row CHECK (is_only),
        as_of timestamptz,
        refreshed_at timestamptz,
        seconds double precision
    );
    COMMENT ON TABLE spectrum.watermark IS 'How far the standing views are, one row.';
    COMMENT ON COLUMN spectrum.watermark.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.watermark.as_of IS
        'Every event received before is counted in every standing view.';
    COMMENT ON COLUMN spectrum.watermark.refreshed_at IS 'When a refresh last ended.';
    COMMENT ON COLUMN spectrum.watermark.seconds IS 'How long it took.';
    INSERT INTO spectrum.watermark DEFAULT VALUES;

    CREATE TABLE spectrum.shared_users (
        user_key bigint NOT NULL CONSTRAINT shared_users_pkey PRIMARY KEY
    );
    COMMENT ON TABLE spectrum.shared_users IS
        'Users with events of an account other than dim_users.account_key. Only they contribute '
        'otherwise to all accounts together than to their one.';
    COMMENT ON COLUMN spectrum.shared_users.user_key IS 'dim_users.';
END
$$;
COMMENT ON FUNCTION spectrum._create_reports() IS
    'Room 50: makes the registry of reports, spectrum.watermark and spectrum.shared_users.';

CREATE FUNCTION spectrum._add_kind(
    p_kind text,
    p_position integer,
    p_maintained_by text,
    p_tables text[],
    p_views text[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO spectrum.report_kinds (kind, position, maintained_by, tables, views)
    VALUES (p_kind, p_position, p_maintained_by, p_tables, p_views);
END
$$;
COMMENT ON FUNCTION spectrum._add_kind(text, integer, text, text[], text[]) IS
    'Registers a question that has standing views.';

CREATE FUNCTION spectrum._hold_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('refresh'));
END
$$;
COMMENT ON FUNCTION spectrum._hold_reports() IS
    'Until the transaction ends, only it may change what reports there are or move their sums: a '
    'refresh must not take a report that was begun meanwhile for one that it has built.';

CREATE FUNCTION spectrum._discard_reports(p_kind text, p_name text, p_state text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    UPDATE spectrum.reports SET state = 'discarded'
    WHERE kind = p_kind AND name = p_name AND state <> 'discarded'
        AND (p_state IS NULL OR state = p_state);
END
$$;
COMMENT ON FUNCTION spectrum._discard_reports(text, text, text) IS
    'Gives up the reports of a definition, or the one in a state: no view shows them any more, and '
    'refreshes delete what they kept.';

CREATE FUNCTION spectrum._begin_report(
    p_kind text,
    p_name text DEFAULT '',
    p_definition jsonb DEFAULT '{}'
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._discard_reports(p_kind, p_name, 'building');
    INSERT INTO spectrum.reports (kind, name, definition) VALUES (p_kind, p_name, p_definition);
END
$$;
COMMENT ON FUNCTION spectrum._begin_report(text, text, jsonb) IS
    'Begins a report by a new or changed definition. Refreshes build it, and serve it when it is '
    'complete.';

CREATE FUNCTION spectrum.rebuild_reports(p_kind text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    IF p_kind IS NOT NULL THEN
        PERFORM spectrum._check_choice(
            'p_kind', p_kind,
            (SELECT array_agg(kind.kind ORDER BY kind.position) FROM spectrum.report_kinds AS kind)
        );
    END IF;
    PERFORM spectrum._begin_report(latest.kind, latest.name, latest.definition)
    FROM (
        SELECT DISTINCT ON (report.kind, report.name)
            report.kind, report.name, report.definition, kind.position
        FROM spectrum.reports AS report
        JOIN spectrum.report_kinds AS kind USING (kind)
        WHERE report.state <> 'discarded' AND (p_kind IS NULL OR report.kind = p_kind)
        ORDER BY report.kind, report.name, report.report_id DESC
    ) AS latest
    ORDER BY latest.position, latest.name;
    UPDATE spectrum.reports SET follows_news = false
    WHERE state = 'served' AND (p_kind IS NULL OR kind = p_kind);
END
$$;
COMMENT ON FUNCTION spectrum.rebuild_reports(text) IS
    'Has the next refreshes make the standing views of a kind (spectrum.report_kinds), or all, '
    'anew from the facts: after a setting that they are made by changed, or when facts were '
    'changed by hand. Until then the views show what they showed.';

CREATE FUNCTION spectrum._serve_report(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Not one that was dropped or defined anew meanwhile.
    PERFORM FROM spectrum.reports WHERE report_id = p_report AND state = 'building' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM spectrum._discard_reports(report.kind, report.name, 'served')
    FROM spectrum.reports AS report
    WHERE report.report_id = p_report;
    UPDATE spectrum.reports SET built_to = 9223372036854775807, state = 'served'
    WHERE report_id = p_report;
END
$$;
COMMENT ON FUNCTION spectrum._serve_report(integer) IS
    'Has the views show a report that is complete, in the place of the one before.';

CREATE FUNCTION spectrum._serve_first_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM warehouse.event_ledger) THEN
        PERFORM spectrum._serve_report(report_id) FROM spectrum.reports WHERE state = 'building';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._serve_first_reports() IS
    'Without any event there is nothing to build: reports are complete from the start.';

CREATE FUNCTION spectrum._clear_discarded(p_rows integer)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cleared bigint := 0;
    v_rows bigint;
    r_report record;
    v_table text;
BEGIN
    FOR r_report IN
        SELECT report.report_id, kind.tables
        FROM spectrum.reports AS report
        LEFT JOIN spectrum.report_kinds AS kind USING (kind)
        WHERE report.state = 'discarded'
        FOR UPDATE OF report SKIP LOCKED
    LOOP
        FOREACH v_table IN ARRAY r_report.tables LOOP
            EXECUTE format('DELETE FROM %s WHERE ctid = ANY (ARRAY('
                'SELECT ctid FROM %1$s WHERE report_id = $1 LIMIT $2))', v_table::regclass)
            USING r_report.report_id, p_rows - v_cleared;
            GET DIAGNOSTICS v_rows = ROW_COUNT;
            v_cleared := v_cleared + v_rows;
        END LOOP;
        IF v_cleared < p_rows THEN
            DELETE FROM spectrum.reports WHERE report_id = r_report.report_id;
        END IF;
    END LOOP;
    RETURN v_cleared;
END
$$;
COMMENT ON FUNCTION spectrum._clear_discarded(integer) IS
    'Deletes at most p_rows rows of reports that were given up, and returns how many it did.';
-- Room 50, news: what a refresh works on. It takes the notes of the batches and lays out, in
-- temporary tables that all reports read, which facts came (+) and went (-) and whom they concern.
--
-- Scope: for which accounts a user's events count. One number:
--   a > 0   all his events are of account a: they count for a and for all accounts together
--   0       for all accounts together only: he has events of several accounts, or of none
--   -a      his events of account a, for a only: beside scope 0
-- So a user of one account, as nearly all are, is looked at once, not twice. The unknown user is
-- no unit of any report; his events are in scope of their own account, for sums of events.

CREATE FUNCTION spectrum._empty_temporary(p_name text, p_columns text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass(format('pg_temp.%I', p_name)) IS NULL THEN
        EXECUTE format('CREATE TEMPORARY TABLE %I (%s) ON COMMIT DELETE ROWS', p_name, p_columns);
    ELSE
        EXECUTE format('TRUNCATE pg_temp.%I', p_name);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._empty_temporary(text, text) IS
    'Makes a temporary table of the session, or empties it.';

CREATE FUNCTION spectrum._clear_news()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_news',
        'sign integer, scope bigint, is_leaving boolean NOT NULL DEFAULT false, user_key bigint, '
        'account_key bigint, event_type_key integer, geo_key integer, occurred_at timestamptz, '
        'event_id uuid, properties jsonb, revenue numeric, currency text');
    PERFORM spectrum._empty_temporary('spectrum_scopes',
        'scope bigint, account_id text COLLATE "C", PRIMARY KEY (scope, account_id)');
END
$$;
COMMENT ON FUNCTION spectrum._clear_news() IS
    'Empties pg_temp.spectrum_news (facts that came: sign 1, went: -1, or both: 0, by scope; '
    'is_leaving: of a user who leaves the scope) and pg_temp.spectrum_scopes (accounts that a '
    'scope counts for).';

CREATE FUNCTION spectrum._last_note(p_events bigint)
RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_last_no bigint := (
        SELECT max(waiting.note_no)
        FROM (
            SELECT news.note_no,
                sum(news.events) OVER (ORDER BY news.note_no) - news.events AS before
            FROM spectrum.news
        ) AS waiting
        WHERE waiting.before < p_events
    );
BEGIN
    IF v_last_no IS NULL OR NOT EXISTS (SELECT FROM spectrum.news WHERE note_no > v_last_no) THEN
        RETURN 9223372036854775807;
    END IF;
    RETURN v_last_no;
END
$$;
COMMENT ON FUNCTION spectrum._last_note(bigint) IS
    'The number up to which notes name about p_events facts; the highest where no more wait.';

CREATE FUNCTION spectrum._lay_out_news(p_last_no bigint, OUT taken bigint, OUT missing bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
BEGIN
    -- One statement, so one snapshot: notes and facts that belong together are seen together.
    -- Nothing that an earlier one saw of the notes may limit it: a batch may commit in between.
    -- What an event was before is what its first note says was taken back; what it is now is the
    -- fact, or what a note that is still to come says was taken back.
    WITH notes AS (
        DELETE FROM spectrum.news WHERE note_no <= p_last_no
        RETURNING note_no, user_keys, occurred_ats, event_ids
    ),
    came AS MATERIALIZED (
        SELECT notes.note_no, came.user_key, came.occurred_at, came.event_id
        FROM notes
        CROSS JOIN LATERAL unnest(notes.user_keys, notes.occurred_ats, notes.event_ids)
            AS came (user_key, occurred_at, event_id)
    ),
    went AS (DELETE FROM spectrum.withdrawals WHERE note_no <= p_last_no RETURNING *),
    was AS (
        SELECT DISTINCT ON (went.event_id, went.user_key, went.occurred_at) went.*
        FROM went
        WHERE NOT EXISTS (
            SELECT FROM came
            WHERE (came.event_id, came.user_key, came.occurred_at)
                = (went.event_id, went.user_key, went.occurred_at) AND came.note_no < went.note_no
        )
        ORDER BY went.event_id, went.user_key, went.occurred_at, went.note_no
    ),
    still_to_come AS (
        SELECT DISTINCT ON (gone.event_id, gone.user_key, gone.occurred_at) gone.*
        FROM spectrum.withdrawals AS gone
        WHERE gone.note_no > p_last_no
        ORDER BY gone.event_id, gone.user_key, gone.occurred_at, gone.note_no
    ),
    stayed AS (
        SELECT DISTINCT came.user_key, came.occurred_at, came.event_id
        FROM came
        WHERE NOT EXISTS (
            SELECT FROM went
            WHERE (went.event_id, went.user_key, went.occurred_at)
                = (came.event_id, came.user_key, came.occurred_at) AND went.note_no > came.note_no
        )
    ),
    changes AS (
        SELECT -1 AS sign, was.* FROM was
        UNION ALL
        SELECT 1, 0, fact.*
        FROM stayed
        -- A subquery that names the row it looks up, so that this is a look-up in any plan.
        CROSS JOIN LATERAL (
            SELECT known.event_id, known.occurred_at, known.account_key, known.user_key,
                known.event_type_key, known.geo_key, known.properties, known.revenue, known.currency
            FROM warehouse.fact_events AS known
            WHERE known.user_key = stayed.user_key AND known.occurred_at = stayed.occurred_at
                AND known.event_id = stayed.event_id
            OFFSET 0
        ) AS fact
        WHERE NOT EXISTS (
            SELECT FROM still_to_come AS gone
            WHERE (gone.event_id, gone.user_key, gone.occurred_at)
                = (stayed.event_id, stayed.user_key, stayed.occurred_at)
        )
        UNION ALL
        SELECT 1, gone.* FROM still_to_come AS gone JOIN stayed
            USING (event_id, user_key, occurred_at)
        UNION ALL
        -- Came and went again: no sum moves, but who reads facts may have met it in between.
        SELECT 0, went.* FROM went JOIN came USING (event_id, user_key, occurred_at)
        WHERE came.note_no < went.note_no
    ), laid_out AS (
        INSERT INTO pg_temp.spectrum_news (sign, scope, user_key, account_key, event_type_key,
            geo_key, occurred_at, event_id, properties, revenue, currency)
        SELECT sign, account_key, user_key, account_key, event_type_key, geo_key, occurred_at,
            event_id, properties, revenue, currency
        FROM changes
        RETURNING sign
    )
    SELECT (SELECT count(*) FROM laid_out),
        (SELECT count(*) FROM stayed) - (SELECT count(*) FROM laid_out WHERE sign = 1)
    INTO taken, missing;
END
$$;
COMMENT ON FUNCTION spectrum._lay_out_news(bigint) IS
    'Takes the notes up to a number and lays out in pg_temp.spectrum_news what they changed, net: '
    'facts that count from now on (1), facts as they counted before (-1), and facts that came and '
    'went again (0). Returns how many, and how many facts it did not find.';

CREATE FUNCTION spectrum._take_news(p_last_no bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_news record;
BEGIN
    -- A statement is planned before its snapshot is taken: a month that a batch attached in
    -- between is not in the plan, while the notes of its facts are seen. Planned again it is.
    FOR v_try IN 1 .. 3 LOOP
        BEGIN
            r_news := spectrum._lay_out_news(p_last_no);
            -- What is missing in the end was deleted by hand.
            EXIT WHEN r_news.missing = 0 OR v_try = 3;
            RAISE EXCEPTION 'facts that the news name were not found'
                USING ERRCODE = 'triggered_data_change_violation';
        EXCEPTION
            WHEN triggered_data_change_violation THEN
                NULL;
        END;
    END LOOP;
    RETURN r_news.taken;
END
$$;
COMMENT ON FUNCTION spectrum._take_news(bigint) IS
    'Takes the notes up to a number, with all facts that they name. Returns how many changes.';

CREATE FUNCTION spectrum._add_history(
    p_after bigint,
    p_until bigint,
    p_users bigint[] DEFAULT NULL
)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_added bigint;
BEGIN
    -- Again one statement: facts that a note still to come will bring are left out, those that
    -- one will take back are put in.
    WITH still_to_come AS MATERIALIZED (
        SELECT news.note_no, came.user_key, came.occurred_at, came.event_id
        FROM spectrum.news
        CROSS JOIN LATERAL unnest(news.user_keys, news.occurred_ats, news.event_ids)
            AS came (user_key, occurred_at, event_id)
        WHERE came.user_key > p_after AND came.user_key <= p_until
            AND (p_users IS NULL OR came.user_key = ANY (p_users))
    ),
    history AS (
        SELECT fact.user_key, fact.account_key, fact.event_type_key, fact.geo_key,
            fact.occurred_at, fact.event_id, fact.properties, fact.revenue, fact.currency
        FROM warehouse.fact_events AS fact
        WHERE fact.user_key > p_after AND fact.user_key <= p_until
            AND (p_users IS NULL OR fact.user_key = ANY (p_users))
            AND NOT EXISTS (
                SELECT FROM still_to_come AS came
                WHERE came.event_id = fact.event_id AND came.user_key = fact.user_key
                    AND came.occurred_at = fact.occurred_at
            )
        UNION ALL
        SELECT gone.user_key, gone.account_key, gone.event_type_key, gone.geo_key,
            gone.occurred_at, gone.event_id, gone.properties, gone.revenue, gone.currency
        FROM (
            SELECT DISTINCT ON (event_id, user_key, occurred_at) withdrawals.*
            FROM spectrum.withdrawals
            WHERE user_key > p_after AND user_key <= p_until
                AND (p_users IS NULL OR user_key = ANY (p_users))
            ORDER BY event_id, user_key, occurred_at, note_no
        ) AS gone
        WHERE NOT EXISTS (
            SELECT FROM still_to_come AS came
            WHERE came.event_id = gone.event_id AND came.user_key = gone.user_key
                AND came.occurred_at = gone.occurred_at AND came.note_no < gone.note_no
        )
    )
    INSERT INTO pg_temp.spectrum_news (
        sign, scope, user_key, account_key, event_type_key, geo_key, occurred_at, event_id,
        properties, revenue, currency
    )
    SELECT 1, account_key, user_key, account_key, event_type_key, geo_key, occurred_at, event_id,
        properties, revenue, currency
    FROM history;
    GET DIAGNOSTICS v_added = ROW_COUNT;
    RETURN v_added;
END
$$;
COMMENT ON FUNCTION spectrum._add_history(bigint, bigint, bigint[]) IS
    'Lays out in pg_temp.spectrum_news, as if it came now, all that counts so far of the users '
    'with keys in (p_after, p_until], of some of them if a list is given. Returns how many facts.';

CREATE FUNCTION spectrum._scope_shared_users()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_news (
        sign, scope, is_leaving, user_key, account_key, event_type_key, geo_key, occurred_at,
        event_id, properties, revenue, currency
    )
    SELECT news.sign, -news.account_key, false, news.user_key, news.account_key,
        news.event_type_key, news.geo_key, news.occurred_at, news.event_id, news.properties,
        news.revenue, news.currency
    FROM pg_temp.spectrum_news AS news
    JOIN spectrum.shared_users USING (user_key)
    WHERE NOT news.is_leaving AND news.account_key <> 0;

    UPDATE pg_temp.spectrum_news AS news SET scope = 0
    FROM spectrum.shared_users
    WHERE shared_users.user_key = news.user_key AND NOT news.is_leaving AND news.scope > 0;
END
$$;
COMMENT ON FUNCTION spectrum._scope_shared_users() IS
    'Puts the news of users with several accounts into both of their scopes.';

CREATE FUNCTION spectrum._scope_news(p_is_history boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_newly_shared bigint[];
BEGIN
    WITH newly_shared AS (
        INSERT INTO spectrum.shared_users (user_key)
        SELECT DISTINCT news.user_key
        FROM pg_temp.spectrum_news AS news
        JOIN warehouse.dim_users AS dim USING (user_key)
        WHERE news.user_key <> 0 AND news.account_key <> dim.account_key
        ORDER BY news.user_key
        ON CONFLICT (user_key) DO NOTHING
        RETURNING shared_users.user_key
    )
    -- Who had no account so far was in scope 0 already, with nothing that counts for one.
    SELECT array_agg(newly_shared.user_key) INTO v_newly_shared
    FROM newly_shared
    JOIN warehouse.dim_users AS dim USING (user_key)
    WHERE dim.account_key <> 0;

    IF v_newly_shared IS NOT NULL AND NOT p_is_history THEN
        -- All that they contributed so far leaves its scope, all that is now enters the new ones.
        UPDATE pg_temp.spectrum_news AS news SET is_leaving = true, scope = dim.account_key
        FROM warehouse.dim_users AS dim
        WHERE dim.user_key = news.user_key AND news.user_key = ANY (v_newly_shared);
        PERFORM spectrum._add_history(0, 9223372036854775807, v_newly_shared);
        INSERT INTO pg_temp.spectrum_news (
            sign, scope, is_leaving, user_key, account_key, event_type_key, geo_key, occurred_at,
            event_id, properties, revenue, currency
        )
        SELECT -1, dim.account_key, true, news.user_key, news.account_key, news.event_type_key,
            news.geo_key, news.occurred_at, news.event_id, news.properties, news.revenue,
            news.currency
        FROM pg_temp.spectrum_news AS news
        JOIN warehouse.dim_users AS dim USING (user_key)
        WHERE NOT news.is_leaving AND news.user_key = ANY (v_newly_shared);
    END IF;
    IF EXISTS (SELECT FROM spectrum.shared_users) THEN
        PERFORM spectrum._scope_shared_users();
    END IF;

    INSERT INTO pg_temp.spectrum_scopes (scope, account_id)
    SELECT 0, '*'
    UNION ALL
    SELECT scopes.scope, scopes.account_id
    FROM (
        SELECT news.account_key FROM pg_temp.spectrum_news AS news
        UNION
        SELECT news.scope FROM pg_temp.spectrum_news AS news WHERE news.scope > 0
    ) AS accounts
    JOIN warehouse.dim_accounts AS dim USING (account_key)
    CROSS JOIN LATERAL (
        VALUES (dim.account_key, '*'), (dim.account_key, dim.account_id),
            (-dim.account_key, dim.account_id)
    ) AS scopes (scope, account_id)
    WHERE accounts.account_key <> 0;
END
$$;
COMMENT ON FUNCTION spectrum._scope_news(boolean) IS
    'Gives the news their scopes, and pg_temp.spectrum_scopes the accounts that each scope counts '
    'for. A user met in a second account is moved from one scope to two.';

CREATE FUNCTION spectrum._add_arrays(p_left bigint[], p_right bigint[])
RETURNS bigint[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(coalesce(pair.a, 0) + coalesce(pair.b, 0) ORDER BY pair.number)
    FROM unnest(p_left, p_right) WITH ORDINALITY AS pair (a, b, number)
$$;
COMMENT ON FUNCTION spectrum._add_arrays(bigint[], bigint[]) IS
    'Adds two arrays element by element; what one lacks is 0.';
-- Room 60, the events: every question reads analytics.events, or one of its narrower sisters, and
-- nothing below. These views run with their owner's rights and are security barriers, so a role
-- needs no right on the warehouse; and whoever is to see less is shown less in one place, which is
-- warehouse.visible_events, beneath all three.
--   events      everything about an event
--   event_keys  its keys alone. Joins that a query does not need cost events its index-only scans
--   timelines   the same by user and time, read in this order from an index, without a sort: of
--               one event type, or of all

CREATE FUNCTION spectrum._create_events()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.events') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE VIEW warehouse.visible_events AS
    SELECT
        fact.event_id, fact.occurred_at, fact.event_type_key, fact.account_key, fact.user_key,
        fact.geo_key, fact.properties, fact.revenue, fact.currency
    FROM warehouse.fact_events AS fact;
    COMMENT ON VIEW warehouse.visible_events IS
        'The facts that questions may see: beneath analytics.events, event_keys and timelines.';

    CREATE VIEW analytics.event_keys WITH (security_barrier) AS
    SELECT
        visible.event_id, visible.occurred_at, visible.event_type_key, visible.account_key,
        visible.user_key, visible.properties
    FROM warehouse.visible_events AS visible;
    COMMENT ON VIEW analytics.event_keys IS
        'analytics.events without names: faster where an index holds all that a question reads.';

    CREATE VIEW analytics.timelines WITH (security_barrier) AS
    SELECT
        visible.event_id, visible.occurred_at, visible.event_type_key, visible.account_key,
        visible.user_key, visible.properties
    FROM warehouse.visible_events AS visible
    ORDER BY visible.user_key, visible.occurred_at;
    COMMENT ON VIEW analytics.timelines IS
        'analytics.event_keys by user and time: faster where that is the order of an index.';

    CREATE VIEW analytics.events WITH (security_barrier) AS
    SELECT
        fact.event_id,
        fact.occurred_at,
        dim_event_types.event_type,
        fact.event_type_key,
        nullif(dim_accounts.account_id, '') AS account_id,
        fact.account_key,
        nullif(dim_users.user_id, '') AS user_id,
        fact.user_key,
        nullif(dim_geography.country, '') AS country,
        nullif(dim_geography.region, '') AS region,
        nullif(dim_geography.city, '') AS city,
        fact.properties,
        fact.revenue,
        fact.currency
    FROM warehouse.visible_events AS fact
    -- Every key has its member; LEFT, so that a plan leaves out the joins that a question does
    -- not read: it halves most of them.
    LEFT JOIN warehouse.dim_event_types USING (event_type_key)
    LEFT JOIN warehouse.dim_accounts USING (account_key)
    LEFT JOIN warehouse.dim_users USING (user_key)
    LEFT JOIN warehouse.dim_geography USING (geo_key);
    COMMENT ON VIEW analytics.events IS
        'Every event once, with its dimensions: what all questions are asked of.';
    COMMENT ON COLUMN analytics.events.event_id IS 'Identity of the event.';
    COMMENT ON COLUMN analytics.events.occurred_at IS 'When it happened.';
    COMMENT ON COLUMN analytics.events.event_type IS 'What happened.';
    COMMENT ON COLUMN analytics.events.event_type_key IS 'The same, short.';
    COMMENT ON COLUMN analytics.events.account_id IS 'Account; NULL unknown.';
    COMMENT ON COLUMN analytics.events.account_key IS 'The same, short; 0 unknown.';
    COMMENT ON COLUMN analytics.events.user_id IS 'User; NULL unknown.';
    COMMENT ON COLUMN analytics.events.user_key IS
        'The person that reports count; 0 unknown, which is never counted as a person.';
    COMMENT ON COLUMN analytics.events.country IS 'NULL unknown; so are region and city.';
    COMMENT ON COLUMN analytics.events.properties IS 'Properties as sent.';
    COMMENT ON COLUMN analytics.events.revenue IS 'Amount, NULL where it carries no money.';
    COMMENT ON COLUMN analytics.events.currency IS 'Of the amount.';

    CREATE VIEW analytics.settings WITH (security_barrier) AS
    SELECT config.timezone, config.week_start, config.currency, config.refund_events
    FROM spectrum.config;
    COMMENT ON VIEW analytics.settings IS
        'The settings that numbers depend on, one row, for all who may ask questions.';
    COMMENT ON COLUMN analytics.settings.timezone IS 'Time zone of days, weeks and months.';
    COMMENT ON COLUMN analytics.settings.week_start IS 'First day of a week: 1 Monday, 7 Sunday.';
    COMMENT ON COLUMN analytics.settings.currency IS 'Currency of money that names none.';
    COMMENT ON COLUMN analytics.settings.refund_events IS 'Event types that are refunds.';

    CREATE VIEW analytics.event_types WITH (security_barrier) AS
    SELECT dim_event_types.event_type_key, dim_event_types.event_type
    FROM warehouse.dim_event_types
    WHERE dim_event_types.event_type_key <> 0;
    COMMENT ON VIEW analytics.event_types IS
        'The event types by their keys, by which events are found fastest.';
    COMMENT ON COLUMN analytics.event_types.event_type_key IS 'As in analytics.events.';
    COMMENT ON COLUMN analytics.event_types.event_type IS 'As in analytics.events.';

    CREATE VIEW analytics.accounts WITH (security_barrier) AS
    SELECT dim_accounts.account_key, dim_accounts.account_id
    FROM warehouse.dim_accounts
    WHERE dim_accounts.account_key <> 0;
    COMMENT ON VIEW analytics.accounts IS
        'The accounts by their keys, by which events are found fastest.';
    COMMENT ON COLUMN analytics.accounts.account_key IS 'As in analytics.events.';
    COMMENT ON COLUMN analytics.accounts.account_id IS 'As in analytics.events.';
END
$$;
COMMENT ON FUNCTION spectrum._create_events() IS
    'Room 60: makes analytics.events and its sisters, analytics.settings, '
    'analytics.event_types and analytics.accounts.';

CREATE FUNCTION analytics._user_cuts()
RETURNS bigint[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_step bigint := 1;
    v_last bigint;
BEGIN
    WHILE EXISTS (SELECT FROM analytics.timelines AS t WHERE t.user_key >= 4 * v_step) LOOP
        v_step := v_step * 2;
    END LOOP;
    -- The last key is between the half of that and all of it.
    v_last := 4 * v_step;
    FOR v_look IN 1 .. 3 LOOP
        EXIT WHEN EXISTS (
            SELECT FROM analytics.timelines AS t WHERE t.user_key >= v_last - v_step / 2
        );
        v_last := v_last - v_step / 2;
    END LOOP;
    RETURN ARRAY[1, 1 + v_last / 16, 1 + v_last / 4, 1 + v_last / 2, 9223372036854775807];
END
$$;
COMMENT ON FUNCTION analytics._user_cuts() IS
    'Cuts the user keys, but for the unknown user, in four: starts of the parts, and an end. By a '
    'few looks into an index, so the parts differ; the first are small: keys follow the order '
    'of arrival and the oldest users have most of the events.';
-- Room 60, ranges: how a question's range of time is checked, how its open ends are settled and how
-- periods get their dates. Reads analytics.events; read by every question.
--
-- Nothing orders all events by time, so first and last come in two steps: the months that hold all
-- events are bisected, and only those at the two ends are looked at whole.

CREATE FUNCTION analytics._check_range(p_from timestamptz, p_to timestamptz)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT isfinite(p_from) THEN
        PERFORM spectrum._reject('p_from', p_from::text, 'a finite time or NULL');
    END IF;
    IF NOT isfinite(p_to) OR p_to < p_from THEN
        PERFORM spectrum._reject('p_to', p_to::text, 'a finite time not before p_from, or NULL');
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_range(timestamptz, timestamptz) IS
    'Raises 22023 unless [p_from, p_to) is a range of time; NULL leaves an end open.';

CREATE FUNCTION analytics._event_months(OUT first_at timestamptz, OUT end_at timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_months timestamptz[] := ARRAY(
        SELECT generate_series('1900-01-01'::timestamptz, '2200-01-01', interval '1 month')
    );
    v_low integer := 1;
    v_high integer := cardinality(v_months);
    v_middle integer;
BEGIN
    WHILE v_low < v_high LOOP
        v_middle := (v_low + v_high) / 2;
        IF EXISTS (
            SELECT FROM analytics.events AS e WHERE e.occurred_at < v_months[v_middle + 1]
        ) THEN
            v_high := v_middle;
        ELSE
            v_low := v_middle + 1;
        END IF;
    END LOOP;
    IF v_low = cardinality(v_months) THEN
        RETURN;
    END IF;
    first_at := v_months[v_low];

    v_high := cardinality(v_months);
    WHILE v_low < v_high LOOP
        v_middle := (v_low + v_high) / 2;
        IF EXISTS (
            SELECT FROM analytics.events AS e WHERE e.occurred_at >= v_months[v_middle + 1]
        ) THEN
            v_low := v_middle + 1;
        ELSE
            v_high := v_middle;
        END IF;
    END LOOP;
    end_at := v_months[v_low + 1];
END
$$;
COMMENT ON FUNCTION analytics._event_months() IS
    'The months, in UTC, that hold all events: bisected, since each look at one side of a month '
    'ends with the first event found, where the exact bounds would take a look at all. NULL where '
    'there are none.';

CREATE FUNCTION analytics._settle_range(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    OUT from_at timestamptz,
    OUT to_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_month timestamptz;
    v_end timestamptz;
BEGIN
    from_at := p_from;
    to_at := p_to;
    IF p_from IS NOT NULL AND p_to IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT m.first_at, m.end_at INTO v_month, v_end FROM analytics._event_months() AS m;
    IF p_to IS NULL THEN
        SELECT max(e.occurred_at) + interval '1 us' INTO to_at
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_end - interval '1 month' AND e.occurred_at < v_end;
    END IF;
    -- Month by month: an account may begin after the first.
    WHILE from_at IS NULL AND v_month < v_end LOOP
        SELECT min(e.occurred_at) INTO from_at
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_month AND e.occurred_at < v_month + interval '1 month'
            AND (p_account IS NULL OR e.account_id = p_account);
        v_month := v_month + interval '1 month';
    END LOOP;
END
$$;
COMMENT ON FUNCTION analytics._settle_range(timestamptz, timestamptz, text) IS
    'The range with its open ends settled, without a clock: from the first event of the account '
    '(NULL: of all) to just after the last event of any account, which is how far time is known to '
    'have come. An end stays NULL where there is no such event.';

CREATE FUNCTION analytics._history_periods(
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    OUT starts timestamptz[],
    OUT first_number integer
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_first timestamptz := (SELECT m.first_at FROM analytics._event_months() AS m);
    v_to timestamptz := (
        SELECT r.to_at FROM analytics._settle_range(coalesce(p_from, v_first), p_to, NULL) AS r
    );
BEGIN
    starts := '{}';
    IF p_from IS NULL OR p_from < v_to THEN
        starts := spectrum.period_starts(
            p_period, least(p_from, v_first, v_to - interval '1 us'), v_to
        );
        first_number := width_bucket(p_from, starts);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._history_periods(text, timestamptz, timestamptz) IS
    'For questions that look before their range: the starts of all periods from the first event '
    'of any account to the end of the range, and the number of the period in which the range '
    'begins, NULL where it is open. Empty where the range is.';

CREATE FUNCTION analytics._period_dates(p_starts timestamptz[])
RETURNS date[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        SELECT spectrum.period_date(s.start)
        FROM unnest(p_starts) WITH ORDINALITY AS s (start, number)
        ORDER BY s.number
    );
END
$$;
COMMENT ON FUNCTION analytics._period_dates(timestamptz[]) IS
    'The dates that period starts stand for, so that a row looks its date up by number.';
-- Room 60, walks: what one unit (a user, an account, a session) did in a funnel. Pure functions of
-- its history: p_times, ascending, and beside each time a mask of what the event can be: bit k - 1
-- for step k, bit 30 for an exclusion. They return the positions of the events that fill the steps
-- of the one entry that counts, or NULL. Read by the funnels.
--
-- The rule, in all orders: an entry begins with an event of step 1 inside [p_from, p_to) and goes
-- on, greedily, with the earliest event that reaches one step more, up to and including
-- entry + p_window. An exclusion strictly between its first and its last event voids it. The
-- longest entry counts, of equal ones the earliest; or, with p_first_entry, the first one alone.

CREATE FUNCTION analytics._session_starts(p_times timestamptz[])
RETURNS timestamptz[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[] := p_times[1:1];
    v_start timestamptz := p_times[1];
    v_last timestamptz := p_times[1];
    v_at timestamptz;
BEGIN
    FOREACH v_at IN ARRAY p_times LOOP
        IF v_at > v_last + interval '30 minutes' OR v_at > v_start + interval '24 hours' THEN
            v_start := v_at;
            v_starts := v_starts || v_at;
        END IF;
        v_last := v_at;
    END LOOP;
    RETURN v_starts;
END
$$;
COMMENT ON FUNCTION analytics._session_starts(timestamptz[]) IS
    'Cuts one user''s ascending event times into sessions: a new one begins after a gap of more '
    'than 30 minutes, or more than 24 hours after the start of the last. Event t belongs to '
    'session width_bucket(t, starts).';

CREATE FUNCTION analytics._walk_ordered(
    p_times timestamptz[],
    p_masks integer[],
    p_steps integer,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_is_strict boolean,
    p_first_entry boolean,
    p_has_exclusions boolean
)
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_count integer := cardinality(p_times);
    -- Where the search for each step stands: entries ascend, so it never has to go back.
    v_next integer[] := array_fill(1, ARRAY[p_steps]);
    -- The step behind which there is nothing left, for this entry and so for all later ones.
    v_possible integer := p_steps;
    v_exclusion integer := 1;
    v_deadline timestamptz;
    v_chain integer[];
    v_best integer[];
    v_at integer;
    v_found integer;
BEGIN
    FOR v_entry IN 1 .. v_count LOOP
        CONTINUE WHEN p_masks[v_entry] & 1 = 0
            OR p_times[v_entry] < p_from OR p_times[v_entry] >= p_to;
        v_deadline := p_times[v_entry] + p_window;
        v_chain := ARRAY[v_entry];
        v_at := v_entry;
        FOR v_step IN 2 .. p_steps LOOP
            v_found := greatest(v_next[v_step], v_at + 1);
            WHILE v_found <= v_count AND (
                p_masks[v_found] & (1 << (v_step - 1)) = 0 OR p_times[v_found] <= p_times[v_at]
            ) LOOP
                v_found := v_found + 1;
            END LOOP;
            v_next[v_step] := v_found;
            IF v_found > v_count THEN
                v_possible := v_step - 1;
                EXIT;
            END IF;
            EXIT WHEN p_times[v_found] > v_deadline;
            IF p_is_strict THEN
                -- Events at the time of either step do not stand between them.
                LOOP
                    v_at := v_at + 1;
                    EXIT WHEN p_times[v_at] > p_times[v_chain[v_step - 1]];
                END LOOP;
                EXIT WHEN p_times[v_at] < p_times[v_found];
            END IF;
            v_chain := v_chain || v_found;
            v_at := v_found;
        END LOOP;

        IF p_has_exclusions AND cardinality(v_chain) > 1 THEN
            WHILE v_exclusion <= v_count AND (
                p_masks[v_exclusion] & (1 << 30) = 0
                OR p_times[v_exclusion] <= p_times[v_entry]
            ) LOOP
                v_exclusion := v_exclusion + 1;
            END LOOP;
            IF p_times[v_exclusion] < p_times[v_chain[cardinality(v_chain)]] THEN
                v_chain := NULL;
            END IF;
        END IF;
        IF v_best IS NULL OR cardinality(v_chain) > cardinality(v_best) THEN
            v_best := v_chain;
        END IF;
        EXIT WHEN p_first_entry OR cardinality(v_best) >= v_possible;
    END LOOP;
    RETURN v_best;
END
$$;
COMMENT ON FUNCTION analytics._walk_ordered(
    timestamptz[], integer[], integer, timestamptz, timestamptz, interval, boolean, boolean, boolean
) IS
    'Steps in their order, each strictly later than the one before; p_is_strict: with no event of '
    'the history between, which must then hold them all, masks of 0 included.';

CREATE FUNCTION analytics._fill_step(p_filled integer[], p_mask integer)
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_filled integer[] := p_filled;
    v_mask integer := p_mask;
    v_queue integer[] := '{}'::integer[];
    -- By step: the step whose event would move here; 0 the new event; NULL not reached.
    v_from integer[] := array_fill(NULL::integer, ARRAY[cardinality(p_filled)]);
    v_at integer := 0;
    v_place integer := 1;
BEGIN
    LOOP
        FOR v_step IN 1 .. cardinality(p_filled) LOOP
            IF v_mask & (1 << (v_step - 1)) <> 0 AND v_from[v_step] IS NULL THEN
                v_from[v_step] := v_at;
                v_queue := v_queue || v_step;
            END IF;
        END LOOP;
        v_at := v_queue[v_place];
        v_place := v_place + 1;
        v_mask := p_filled[v_at];
        EXIT WHEN v_at IS NULL OR v_mask = 0;
    END LOOP;
    IF v_at IS NULL THEN
        RETURN NULL;
    END IF;
    WHILE v_from[v_at] <> 0 LOOP
        v_filled[v_at] := p_filled[v_from[v_at]];
        v_at := v_from[v_at];
    END LOOP;
    v_filled[v_at] := p_mask;
    RETURN v_filled;
END
$$;
COMMENT ON FUNCTION analytics._fill_step(integer[], integer) IS
    'Puts one more event into the steps that are open to it, moving those in place where that '
    'makes room (an augmenting path). p_filled: by step, the mask of the event in it, 0 open. '
    'NULL: no room.';

CREATE FUNCTION analytics._fill_steps(
    p_masks integer[], p_positions integer[], p_steps integer, p_most integer
)
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_filled integer[] := array_fill(0, ARRAY[p_steps]);
    v_fuller integer[];
    v_chain integer[] := '{}'::integer[];
    v_at integer;
BEGIN
    FOR v_at IN SELECT p.position FROM unnest(p_positions) AS p (position) ORDER BY p.position LOOP
        v_fuller := analytics._fill_step(v_filled, p_masks[v_at]);
        IF v_fuller IS NOT NULL THEN
            v_filled := v_fuller;
            v_chain := v_chain || v_at;
            EXIT WHEN cardinality(v_chain) = p_most;
        END IF;
    END LOOP;
    RETURN v_chain;
END
$$;
COMMENT ON FUNCTION analytics._fill_steps(integer[], integer[], integer, integer) IS
    'Those of the positions, in order, whose events each fill one step more, p_most at most.';

CREATE FUNCTION analytics._walk_any(
    p_times timestamptz[],
    p_masks integer[],
    p_steps integer,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_first_entry boolean,
    p_has_exclusions boolean
)
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_count integer := cardinality(p_times);
    v_step_bits integer := (1 << p_steps) - 1;
    -- Events of one kind (mask) are chained: v_head is the first from the entry on, v_follower
    -- the next one, 0 none. A kind fills at most v_room steps, so its first v_room events do.
    v_kinds integer[] := '{}'::integer[];
    v_room integer[] := '{}'::integer[];
    v_head integer[] := '{}'::integer[];
    v_follower integer[] := array_fill(0, ARRAY[v_count]);
    v_kind integer;
    v_at integer;
    v_last integer := 0;
    v_exclusion integer := 1;
    v_inside integer[];
    v_chain integer[];
    v_best integer[] := '{}'::integer[];
BEGIN
    FOR v_event IN REVERSE v_count .. 1 LOOP
        v_kind := array_position(v_kinds, p_masks[v_event] & v_step_bits);
        IF v_kind IS NULL THEN
            v_kinds := v_kinds || (p_masks[v_event] & v_step_bits);
            v_kind := cardinality(v_kinds);
            v_room[v_kind] := bit_count(v_kinds[v_kind]::bit(32));
        END IF;
        v_follower[v_event] := coalesce(v_head[v_kind], 0);
        v_head[v_kind] := v_event;
    END LOOP;

    FOR v_entry IN 1 .. v_count LOOP
        IF p_masks[v_entry] & v_step_bits <> 0
            AND p_times[v_entry] >= p_from AND p_times[v_entry] < p_to
        THEN
            WHILE p_times[v_last + 1] <= p_times[v_entry] + p_window LOOP
                v_last := v_last + 1;
            END LOOP;
            v_inside := '{}'::integer[];
            FOR v_each IN 1 .. cardinality(v_kinds) LOOP
                v_at := v_head[v_each];
                FOR v_number IN 1 .. v_room[v_each] LOOP
                    EXIT WHEN v_at = 0 OR v_at > v_last;
                    v_inside := v_inside || v_at;
                    v_at := v_follower[v_at];
                END LOOP;
            END LOOP;

            IF cardinality(v_inside) > cardinality(v_best) THEN
                v_chain := analytics._fill_steps(p_masks, v_inside, p_steps, p_steps);
                IF p_has_exclusions THEN
                    WHILE v_exclusion <= v_count AND (
                        p_masks[v_exclusion] & (1 << 30) = 0
                        OR p_times[v_exclusion] <= p_times[v_entry]
                    ) LOOP
                        v_exclusion := v_exclusion + 1;
                    END LOOP;
                    IF p_times[v_exclusion] < p_times[v_chain[cardinality(v_chain)]] THEN
                        v_chain := '{}'::integer[];
                    END IF;
                END IF;
                IF cardinality(v_chain) > cardinality(v_best) THEN
                    v_best := v_chain;
                END IF;
            END IF;
            -- Once the window reaches the end of the history, it only loses events.
            EXIT WHEN p_first_entry OR cardinality(v_best) = p_steps
                OR (v_last = v_count AND cardinality(v_inside) <= cardinality(v_best));
        END IF;
        v_kind := array_position(v_kinds, p_masks[v_entry] & v_step_bits);
        v_head[v_kind] := v_follower[v_entry];
    END LOOP;
    RETURN nullif(v_best, '{}');
END
$$;
COMMENT ON FUNCTION analytics._walk_any(
    timestamptz[], integer[], integer, timestamptz, timestamptz, interval, boolean, boolean
) IS
    'Steps in any order: an entry begins with an event of any step, and its step k is reached when '
    'its events can fill k of the steps, each event one of them.';
-- Room 60, chains: the plainest funnels, which are asked most, put together by set: users, ordered
-- steps of one event type each, without filter, exclusion, breakdown or account. The rule is that
-- of _walk_ordered (60_funnel_walks.sql), and the tests hold both to one oracle; what changes is
-- the cost, a quarter or less of that of walking each history. Read by the funnels.

CREATE FUNCTION analytics._hours_of(p_window interval)
RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN date_part('year', p_window) = 0 AND date_part('month', p_window) = 0
        THEN make_interval(secs => date_part('epoch', p_window))
        ELSE p_window
    END
$$;
COMMENT ON FUNCTION analytics._hours_of(interval) IS
    'A window with its days as 24 hours each, which they are in UTC: adding these is far cheaper. '
    'One with months stays.';

CREATE FUNCTION analytics._plain_keys(p_steps jsonb)
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        -- A type that is not there yet has no events, and no key.
        SELECT array_agg(coalesce(t.event_type_key, -1) ORDER BY s.step)
        FROM analytics._read_steps('p_steps', p_steps) AS s
        LEFT JOIN analytics.event_types AS t USING (event_type)
        HAVING count(s.filter) = 0 AND count(*) > 1
    );
END
$$;
COMMENT ON FUNCTION analytics._plain_keys(jsonb) IS
    'The keys of the steps'' event types, in order; NULL unless there are several steps, none with '
    'a filter.';

CREATE FUNCTION analytics._chains_query(p_steps integer)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- $1 event type keys, $2 from, $3 to, $4 until, $5 window, $6 and $7 users, $8 first entries
    v_times text := '(SELECT t.user_key, array_agg(t.occurred_at) AS times'
        ' FROM analytics.timelines AS t WHERE t.event_type_key = $1[%1$s]'
        ' AND t.user_key BETWEEN $6 AND $7 AND t.occurred_at >= $2 AND t.occurred_at %2$s'
        ' GROUP BY t.user_key) AS step_%1$s';
    v_joins text := format(v_times, 1, '< $3');
    v_columns text := 'unnest(CASE WHEN $8 THEN step_1.times[1:1] ELSE step_1.times END) AS at_1';
    v_chains text;
    v_reached text := '2';
    v_list text := 'c.at_1';
BEGIN
    FOR v_step IN 2 .. p_steps LOOP
        v_joins := v_joins || format(
            CASE v_step WHEN 2 THEN ' JOIN ' ELSE ' LEFT JOIN ' END || v_times
                || ' USING (user_key)', v_step, '<= $4'
        );
        v_columns := v_columns || format(', step_%1$s.times AS times_%1$s', v_step);
    END LOOP;
    v_chains := format('SELECT user_key, %s FROM %s', v_columns, v_joins);
    FOR v_step IN 2 .. p_steps LOOP
        v_chains := format(
            'SELECT c.*, c.times_%1$s[width_bucket(c.at_%2$s, c.times_%1$s) + 1] AS at_%1$s'
            ' FROM (%3$s) AS c OFFSET 0', v_step, v_step - 1, v_chains
        );
        IF v_step > 2 THEN
            v_reached := v_reached || format(
                ' + CASE WHEN c.at_%s <= c.at_1 + $5 THEN 1 ELSE 0 END', v_step
            );
        END IF;
        v_list := v_list || format(', c.at_%s', v_step);
    END LOOP;
    RETURN format(
        'SELECT (ARRAY[%1$s])[: c.reached], 1::bigint FROM ('
        'SELECT DISTINCT ON (c.user_key) %1$s, %2$s AS reached FROM (%3$s) AS c'
        ' WHERE c.at_2 <= c.at_1 + $5'
        ' ORDER BY c.user_key, reached DESC, c.at_1'
        ') AS c', v_list, v_reached, v_chains
    );
END
$$;
COMMENT ON FUNCTION analytics._chains_query(integer) IS
    'The query of _funnel_chains for a number of steps. Of each entry the chain is greedy: each '
    'step is the first event of its type after the step before, found by width_bucket in the '
    'user''s ascending times of that type.';

CREATE FUNCTION analytics._funnel_chains(
    p_keys integer[],
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_first_entry boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (step_times timestamptz[], units bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 100000000 ROWS 100000
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    v_window interval := analytics._hours_of(p_window);
    v_until timestamptz := CASE
        WHEN p_to < '9999-01-01' THEN p_to + v_window ELSE 'infinity'
    END;
    v_converted bigint;
BEGIN
    RETURN QUERY EXECUTE analytics._chains_query(cardinality(p_keys))
    USING p_keys, p_from, p_to, v_until, v_window, p_first_user, p_last_user, p_first_entry;
    GET DIAGNOSTICS v_converted = ROW_COUNT;
    RETURN QUERY
    SELECT ARRAY[NULL::timestamptz], count(*) - v_converted
    FROM (
        SELECT FROM analytics.timelines AS t
        WHERE t.event_type_key = p_keys[1]
            AND t.user_key BETWEEN p_first_user AND p_last_user
            AND t.occurred_at >= p_from AND t.occurred_at < p_to
        GROUP BY t.user_key
    ) AS starters
    HAVING count(*) > v_converted;
END
$$;
COMMENT ON FUNCTION analytics._funnel_chains(
    integer[], timestamptz, timestamptz, interval, boolean, bigint, bigint
) IS
    'The entries of the plainest funnels (users, ordered steps of one event type each, no filter, '
    'exclusion or breakdown) as _walk_ordered would find them, for users from p_first_user to '
    'p_last_user. Those who reach step 1 alone are one row, without its time. Read in the order of '
    'an index and put together by set: a tenth of the time that walks take.';

CREATE FUNCTION analytics._plain_entries(
    p_keys integer[],
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_first_entry boolean
)
RETURNS TABLE (step_times timestamptz[], units bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cuts bigint[] := analytics._user_cuts();
    v_from timestamptz := coalesce(p_from, '-infinity');
    v_to timestamptz := coalesce(p_to, 'infinity');
BEGIN
    -- An Append of functions is what several workers can share.
    RETURN QUERY
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[1], v_cuts[2] - 1
        )
        UNION ALL
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[2], v_cuts[3] - 1
        )
        UNION ALL
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[3], v_cuts[4] - 1
        )
        UNION ALL
        SELECT * FROM analytics._funnel_chains(
            p_keys, v_from, v_to, p_window, p_first_entry, v_cuts[4], v_cuts[5] - 1
        );
END
$$;
COMMENT ON FUNCTION analytics._plain_entries(
    integer[], timestamptz, timestamptz, interval, boolean
) IS
    'The entries of all users in one of the plainest funnels.';
-- Room 60, funnels: how many units take a series of steps, and how long they need. Reads
-- analytics.events; read by analytics.funnel and by the standing funnels.
--
-- Every number comes from _funnel_entries: one row a unit, its counted entry with the times of the
-- steps it reached. Histories are put together by set, walked one by one (60_funnel_walks.sql).

CREATE FUNCTION analytics._read_steps(p_argument text, p_steps jsonb)
RETURNS TABLE (step integer, event_type text, filter jsonb)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_form text := '"event type" or {"event": "event type", "where": {"property": value}}';
    v_item jsonb;
BEGIN
    IF jsonb_typeof(p_steps) <> 'array' OR jsonb_array_length(p_steps) > 30 THEN
        PERFORM spectrum._reject(
            p_argument, p_steps::text, 'a JSON array of at most 30 events, each ' || v_form
        );
    END IF;
    FOR step, v_item IN
        SELECT i.number, i.item
        FROM jsonb_array_elements(p_steps) WITH ORDINALITY AS i (item, number)
    LOOP
        IF jsonb_typeof(v_item) = 'string' THEN
            v_item := jsonb_build_object('event', v_item);
        END IF;
        IF jsonb_typeof(v_item) <> 'object'
            OR jsonb_typeof(v_item -> 'event') IS DISTINCT FROM 'string'
            OR v_item ->> 'event' = ''
            OR jsonb_typeof(coalesce(v_item -> 'where', '{}')) <> 'object'
            OR v_item - '{event, where}'::text[] <> '{}'
        THEN
            PERFORM spectrum._reject(format('%s[%s]', p_argument, step), v_item::text, v_form);
        END IF;
        event_type := v_item ->> 'event';
        filter := nullif(v_item -> 'where', '{}');
        RETURN NEXT;
    END LOOP;
END
$$;
COMMENT ON FUNCTION analytics._read_steps(text, jsonb) IS
    'The events that a JSON array names, checked; NULL names none.';

CREATE FUNCTION analytics._check_funnel(
    p_steps jsonb,
    p_window interval,
    p_order text,
    p_entry text,
    p_unit text,
    p_breakdown text,
    p_attribution text,
    p_exclude jsonb
)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._read_steps('p_steps', p_steps);
    IF p_steps IS NULL OR p_steps = '[]' THEN
        PERFORM spectrum._reject('p_steps', p_steps::text, 'a JSON array of at least one event');
    END IF;
    IF p_window IS NULL OR p_window NOT BETWEEN interval '0' AND interval '10 years' THEN
        PERFORM spectrum._reject('p_window', p_window::text, 'an interval from 0 to 10 years');
    END IF;
    PERFORM spectrum._check_choice('p_order', p_order, '{ordered, strict, any}');
    PERFORM spectrum._check_choice('p_entry', p_entry, '{best, first}');
    PERFORM spectrum._check_choice('p_unit', p_unit, '{user, account, session}');
    IF p_breakdown = '' THEN
        PERFORM spectrum._reject(
            'p_breakdown', p_breakdown,
            'country, region, city, account_id or the name of a property, or NULL'
        );
    END IF;
    PERFORM spectrum._check_choice('p_attribution', p_attribution, '{first, last}');
    PERFORM analytics._read_steps('p_exclude', p_exclude);
END
$$;
COMMENT ON FUNCTION analytics._check_funnel(
    jsonb, interval, text, text, text, text, text, jsonb
) IS
    'Raises 22023 unless the options describe a funnel.';

CREATE FUNCTION analytics._unit_histories(
    p_keys integer[],
    p_filters jsonb[],
    p_bits integer[],
    p_entry_bits integer,
    p_reads_all boolean,
    p_from timestamptz,
    p_until timestamptz,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text, unit bigint, times timestamptz[], masks integer[], labels text[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_is_filtered boolean := cardinality(array_remove(p_filters, NULL)) > 0;
BEGIN
    -- The arguments are constants of this plan: of each CASE over them one branch remains, and of
    -- the event view only the columns that it reads. The grouping is a prefix of the order, so the
    -- arrays are built in that order; nothing may come between the two that could sort again.
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN min(o.account_id) ELSE coalesce(p_account, '*') END,
        CASE WHEN p_unit = 'account' THEN o.account_key ELSE o.user_key END,
        array_agg(o.occurred_at),
        array_agg(o.mask),
        CASE WHEN p_breakdown IS NOT NULL THEN array_agg(o.label) END
    FROM (
        SELECT m.account_id, m.account_key, m.user_key, m.occurred_at, m.mask, m.label
        FROM (
            SELECT e.account_id, e.account_key, e.user_key, e.occurred_at, e.event_id,
                CASE WHEN v_is_filtered THEN (
                    SELECT coalesce(bit_or(k.bit), 0)
                    FROM unnest(p_keys, p_filters, p_bits) AS k (key, filter, bit)
                    WHERE k.key = e.event_type_key
                        AND (k.filter IS NULL OR e.properties @> k.filter)
                ) ELSE coalesce(p_bits[array_position(p_keys, e.event_type_key)], 0) END AS mask,
                CASE
                    WHEN p_breakdown = 'account_id' THEN e.account_id
                    WHEN p_breakdown = 'country' THEN e.country
                    WHEN p_breakdown = 'region' THEN e.region
                    WHEN p_breakdown = 'city' THEN e.city
                    ELSE nullif(left(e.properties ->> p_breakdown, 200), '')
                END AS label
            FROM analytics.events AS e
            WHERE e.user_key <> 0
                AND (p_reads_all OR e.event_type_key = ANY (p_keys))
                AND e.occurred_at BETWEEN p_from AND p_until
                AND (p_account IS NULL OR e.account_id = p_account)
                AND (NOT p_by_account AND p_unit <> 'account' OR e.account_key <> 0)
        ) AS m
        WHERE p_reads_all OR m.mask <> 0
        ORDER BY
            CASE WHEN p_by_account THEN m.account_key END,
            CASE WHEN p_unit = 'account' THEN m.account_key ELSE m.user_key END,
            m.occurred_at,
            CASE WHEN p_breakdown IS NOT NULL THEN m.event_id END
    ) AS o
    GROUP BY
        CASE WHEN p_by_account THEN o.account_key END,
        CASE WHEN p_unit = 'account' THEN o.account_key ELSE o.user_key END
    HAVING bit_or(o.mask) & p_entry_bits <> 0;
END
$$;
COMMENT ON FUNCTION analytics._unit_histories(
    integer[], jsonb[], integer[], integer, boolean, timestamptz, timestamptz, text, text, text,
    boolean
) IS
    'By unit, what _walk_* need: the times of its events in order, ties by event_id where a '
    'breakdown tells them apart, their masks, and their values of the breakdown. Only units that '
    'have an event that begins an entry; only matching events, unless p_reads_all.';

CREATE FUNCTION analytics._funnel_masks(
    p_steps jsonb,
    p_exclude jsonb,
    OUT keys integer[],
    OUT filters jsonb[],
    OUT bits integer[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT coalesce(array_agg(m.event_type_key), '{}'), coalesce(array_agg(m.filter), '{}'),
        coalesce(array_agg(m.bits), '{}')
    INTO keys, filters, bits
    FROM (
        SELECT t.event_type_key, n.filter, bit_or(n.bit) AS bits
        FROM (
            SELECT s.event_type, s.filter, 1 << (s.step - 1) AS bit
            FROM analytics._read_steps('p_steps', p_steps) AS s
            UNION ALL
            SELECT x.event_type, x.filter, 1 << 30
            FROM analytics._read_steps('p_exclude', p_exclude) AS x
        ) AS n
        JOIN analytics.event_types AS t USING (event_type)
        GROUP BY t.event_type_key, n.filter
    ) AS m;
END
$$;
COMMENT ON FUNCTION analytics._funnel_masks(jsonb, jsonb) IS
    'What an event can be in a funnel: bit k - 1 for step k, bit 30 for an exclusion, by the key '
    'of its type and the filter that its properties match.';

CREATE FUNCTION analytics._split_sessions(
    p_times timestamptz[],
    p_masks integer[],
    p_labels text[],
    p_entry_bits integer,
    p_keeps_all boolean
)
RETURNS TABLE (
    session_start timestamptz, times timestamptz[], masks integer[], labels text[]
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[] := analytics._session_starts(p_times);
BEGIN
    RETURN QUERY
    SELECT
        v_starts[width_bucket(e.occurred_at, v_starts)],
        array_agg(e.occurred_at ORDER BY e.position),
        array_agg(e.mask ORDER BY e.position),
        array_agg(e.label ORDER BY e.position)
    FROM unnest(p_times, p_masks, p_labels) WITH ORDINALITY
        AS e (occurred_at, mask, label, position)
    WHERE e.mask <> 0 OR p_keeps_all
    GROUP BY 1
    HAVING bit_or(e.mask) & p_entry_bits <> 0;
END
$$;
COMMENT ON FUNCTION analytics._split_sessions(
    timestamptz[], integer[], text[], integer, boolean
) IS
    'Cuts one user''s history into those of his sessions that have an event that begins an entry.';

CREATE FUNCTION analytics._funnel_histories(
    p_steps jsonb,
    p_exclude jsonb,
    p_from timestamptz,
    p_until timestamptz,
    p_order text,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    unit bigint,
    session_start timestamptz,
    times timestamptz[],
    masks integer[],
    labels text[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_masks record := analytics._funnel_masks(p_steps, p_exclude);
    v_entry_bits integer := CASE
        WHEN p_order = 'any' THEN (1 << jsonb_array_length(p_steps)) - 1 ELSE 1
    END;
BEGIN
    IF p_unit <> 'session' THEN
        RETURN QUERY
        SELECT h.account_id, h.unit, NULL::timestamptz, h.times, h.masks, h.labels
        FROM analytics._unit_histories(
            r_masks.keys, r_masks.filters, r_masks.bits, v_entry_bits, p_order = 'strict', p_from,
            p_until, p_unit, p_account, p_breakdown, p_by_account
        ) AS h;
        RETURN;
    END IF;

    -- Where a session begins depends on all that the user did before.
    RETURN QUERY
    SELECT h.account_id, h.unit, s.session_start, s.times, s.masks, s.labels
    FROM analytics._unit_histories(
        r_masks.keys, r_masks.filters, r_masks.bits, v_entry_bits, true, '-infinity', p_until,
        p_unit, p_account, p_breakdown, p_by_account
    ) AS h
    CROSS JOIN LATERAL analytics._split_sessions(
        h.times, h.masks, h.labels, v_entry_bits, p_order = 'strict'
    ) AS s;
END
$$;
COMMENT ON FUNCTION analytics._funnel_histories(
    jsonb, jsonb, timestamptz, timestamptz, text, text, text, text, boolean
) IS
    'The histories of all units that a funnel counts; a session is a unit of its user.';

CREATE FUNCTION analytics._funnel_entries(
    p_steps jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_order text,
    p_entry text,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_attribution text,
    p_exclude jsonb,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    unit bigint,
    session_start timestamptz,
    breakdown text,
    step_times timestamptz[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
-- A window of days is one of 24 hours each, whatever the session's time zone.
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_steps integer := jsonb_array_length(p_steps);
    v_from timestamptz := coalesce(p_from, '-infinity');
    v_to timestamptz := coalesce(p_to, 'infinity');
    v_until timestamptz := CASE
        WHEN v_to < '9999-01-01' THEN v_to + p_window ELSE 'infinity'
    END;
    v_has_exclusions boolean := coalesce(p_exclude, '[]') <> '[]';
BEGIN
    RETURN QUERY
    SELECT
        w.account_id,
        w.unit,
        w.session_start,
        w.labels[w.chain[CASE p_attribution WHEN 'last' THEN cardinality(w.chain) ELSE 1 END]],
        ARRAY(SELECT w.times[c.position] FROM unnest(w.chain) AS c (position))
    FROM (
        SELECT h.*, CASE WHEN p_order = 'any' THEN
            analytics._walk_any(
                h.times, h.masks, v_steps, v_from, v_to, p_window, p_entry = 'first',
                v_has_exclusions
            )
        ELSE
            analytics._walk_ordered(
                h.times, h.masks, v_steps, v_from, v_to, p_window, p_order = 'strict',
                p_entry = 'first', v_has_exclusions
            )
        END AS chain
        FROM analytics._funnel_histories(
            p_steps, p_exclude, v_from, v_until, p_order, p_unit, p_account, p_breakdown,
            p_by_account
        ) AS h
        OFFSET 0
    ) AS w
    WHERE w.chain IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._funnel_entries(
    jsonb, timestamptz, timestamptz, interval, text, text, text, text, text, text, jsonb, boolean
) IS
    'What each unit contributes to a funnel: its counted entry, with the time of each step it '
    'reached. unit: user_key or account_key; a session is its user and its start. For one account, '
    'for all together (*), or, with p_by_account, for each account by itself, out of its events '
    'alone.';

CREATE FUNCTION analytics._funnel_report(
    p_steps jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_window interval,
    p_order text,
    p_entry text,
    p_unit text,
    p_account text,
    p_breakdown text,
    p_attribution text,
    p_exclude jsonb,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    breakdown text,
    step integer,
    event_type text,
    units bigint,
    rate_from_start double precision,
    rate_from_previous double precision,
    median_seconds double precision,
    mean_seconds double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_keys integer[] := CASE
        WHEN p_order = 'ordered' AND p_unit = 'user' AND p_account IS NULL AND NOT p_by_account
            AND p_breakdown IS NULL AND coalesce(p_exclude, '[]') = '[]'
        THEN analytics._plain_keys(p_steps)
    END;
BEGIN
    RETURN QUERY
    WITH entries AS MATERIALIZED (
        SELECT e.account_id, e.breakdown, e.step_times, 1::bigint AS units
        FROM analytics._funnel_entries(
            p_steps, p_from, p_to, p_window, p_order, p_entry, p_unit, p_account, p_breakdown,
            p_attribution, p_exclude, p_by_account
        ) AS e
        WHERE v_keys IS NULL
        UNION ALL
        SELECT '*', NULL, c.step_times, c.units
        FROM analytics._plain_entries(v_keys, p_from, p_to, p_window, p_entry = 'first') AS c
        WHERE v_keys IS NOT NULL
    ),
    reached_steps AS (
        SELECT e.account_id, e.breakdown, e.units, s.step,
            date_part('epoch', e.step_times[s.step] - e.step_times[s.step - 1]) AS seconds
        FROM entries AS e
        CROSS JOIN LATERAL generate_series(1, cardinality(e.step_times)) AS s (step)
    ),
    step_counts AS (
        SELECT r.account_id, r.breakdown, r.step, sum(r.units)::bigint AS units,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY r.seconds) AS median_seconds,
            -- Of whole microseconds, so that it does not depend on the order of the rows.
            (avg((r.seconds * 1e6)::bigint) / 1e6)::double precision AS mean_seconds
        FROM reached_steps AS r
        GROUP BY r.account_id, r.breakdown, r.step
    ),
    groups AS (
        SELECT DISTINCT e.account_id, e.breakdown FROM entries AS e
        UNION ALL
        -- A single scope has its steps even where nobody came.
        SELECT coalesce(p_account, '*'), NULL
        WHERE NOT p_by_account AND NOT EXISTS (SELECT FROM entries)
    ),
    step_rows AS (
        SELECT g.account_id, g.breakdown, s.step, s.event_type, coalesce(c.units, 0) AS units,
            c.median_seconds, c.mean_seconds
        FROM groups AS g
        CROSS JOIN analytics._read_steps('p_steps', p_steps) AS s
        LEFT JOIN step_counts AS c ON c.account_id = g.account_id AND c.step = s.step
            AND c.breakdown IS NOT DISTINCT FROM g.breakdown
    )
    SELECT r.account_id, r.breakdown, r.step, r.event_type, r.units,
        coalesce(r.units / nullif(first_value(r.units) OVER steps, 0)::double precision, 0),
        coalesce(r.units / nullif(lag(r.units, 1, r.units) OVER steps, 0)::double precision, 0),
        r.median_seconds, r.mean_seconds
    FROM step_rows AS r
    WINDOW steps AS (PARTITION BY r.account_id, r.breakdown ORDER BY r.step);
END
$$;
COMMENT ON FUNCTION analytics._funnel_report(
    jsonb, timestamptz, timestamptz, interval, text, text, text, text, text, text, jsonb, boolean
) IS
    'Counts the entries: all steps of each account and value of the breakdown that has any.';

CREATE FUNCTION analytics.funnel(
    p_steps jsonb,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_window interval DEFAULT '14 days',
    p_order text DEFAULT 'ordered',
    p_entry text DEFAULT 'best',
    p_unit text DEFAULT 'user',
    p_account text DEFAULT NULL,
    p_breakdown text DEFAULT NULL,
    p_attribution text DEFAULT 'first',
    p_exclude jsonb DEFAULT NULL
)
RETURNS TABLE (
    breakdown text,
    step integer,
    event_type text,
    units bigint,
    rate_from_start double precision,
    rate_from_previous double precision,
    median_seconds double precision,
    mean_seconds double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_funnel(
        p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    RETURN QUERY
    SELECT r.breakdown, r.step, r.event_type, r.units, r.rate_from_start, r.rate_from_previous,
        r.median_seconds, r.mean_seconds
    FROM analytics._funnel_report(
        p_steps, p_from, p_to, p_window, p_order, p_entry, p_unit, p_account, p_breakdown,
        p_attribution, p_exclude, false
    ) AS r
    ORDER BY r.breakdown, r.step;
END
$$;
COMMENT ON FUNCTION analytics.funnel(
    jsonb, timestamptz, timestamptz, interval, text, text, text, text, text, text, jsonb
) IS
    'A funnel, exact over all events: how many users, accounts or sessions (p_unit) reach each '
    'step within p_window of step 1, the rates from the start and from the previous step, and the '
    'seconds since the previous step (median and mean of those who took it). p_steps: '
    '["signup", {"event": "purchase", "where": {"plan": "pro"}}]. [p_from, p_to) limits step 1. '
    'p_order: ordered, strict (nothing between) or any. p_entry: best (of all entries the one that '
    'goes furthest) or first. p_breakdown: a property, country, region, city or account_id, read '
    'at step 1 or, with p_attribution last, at the last step reached. p_exclude: events, written '
    'like steps, that void an entry when they occur before its last step.';
-- Room 60, standing funnels, how they are kept: of each unit that the news concern, the counted
-- entry is found again and takes the place of the one before. Inserts can only lengthen the best
-- entry of a funnel that nothing voids, so there only the entries within a window's length of the
-- news are walked again: users with long histories stay cheap. Where events were taken back, or
-- any event can end a chain (strict order, exclusions, sessions), the whole history is.

CREATE FUNCTION analytics._touch_funnel_units(
    p_report integer,
    p_built_to bigint,
    p_keys integer[],
    p_unit text,
    p_window interval,
    p_reads_all boolean,
    p_is_first boolean,
    p_is_whole boolean,
    p_is_build boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_funnel_units',
        'unit bigint, scope bigint, is_leaving boolean, read_from timestamptz, '
        'read_until timestamptz, enter_until timestamptz, old_at timestamptz');
    INSERT INTO pg_temp.spectrum_funnel_units (
        unit, scope, is_leaving, read_from, read_until, enter_until, old_at
    )
    SELECT touched.unit, touched.scope, touched.is_leaving,
        CASE
            WHEN range.is_all THEN '-infinity'
            WHEN p_is_first THEN least(old.entered_at, touched.first_at)
            ELSE touched.first_at - p_window
        END,
        CASE
            WHEN range.is_all THEN 'infinity'
            ELSE greatest(CASE WHEN p_is_first THEN old.entered_at END, touched.last_at) + p_window
        END,
        CASE WHEN range.is_all THEN 'infinity' ELSE touched.last_at + interval '1 us' END,
        old.entered_at
    FROM (
        SELECT unit.unit, unit.scope,
            bool_or(news.is_leaving AND p_unit <> 'account') AS is_leaving,
            bool_or(news.sign <= 0) AS is_less,
            min(news.occurred_at) AS first_at,
            max(news.occurred_at) AS last_at
        FROM pg_temp.spectrum_news AS news
        CROSS JOIN LATERAL (
            SELECT
                CASE WHEN p_unit = 'account' THEN news.account_key ELSE news.user_key END AS unit,
                CASE WHEN p_unit = 'account' THEN news.account_key ELSE news.scope END AS scope
        ) AS unit
        WHERE news.user_key <> 0 AND unit.unit <> 0
            AND news.user_key <= p_built_to
            AND (p_reads_all OR news.event_type_key = ANY (p_keys))
        GROUP BY unit.unit, unit.scope
    ) AS touched
    CROSS JOIN LATERAL (
        SELECT p_is_whole OR p_is_build OR touched.is_less AS is_all
    ) AS range
    LEFT JOIN LATERAL (
        SELECT entry.step_times[1] AS entered_at FROM spectrum.rollup_funnel_entries AS entry
        WHERE entry.report_id = p_report AND entry.unit = touched.unit
            AND entry.scope = touched.scope
        ORDER BY entry.session_start
        LIMIT 1
    ) AS old ON NOT range.is_all;
END
$$;
COMMENT ON FUNCTION analytics._touch_funnel_units(
    integer, bigint, integer[], text, interval, boolean, boolean, boolean, boolean
) IS
    'Lays out the units of a funnel that the news concern, and what of their history has to be '
    'walked again: events of [read_from, read_until], entries before enter_until.';

CREATE FUNCTION analytics._touched_histories(
    p_keys integer[],
    p_filters jsonb[],
    p_bits integer[],
    p_reads_all boolean,
    p_unit text,
    p_breakdown text
)
RETURNS TABLE (
    unit bigint, scope bigint, times timestamptz[], masks integer[], labels text[],
    read_from timestamptz, enter_until timestamptz
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_is_filtered boolean := cardinality(array_remove(p_filters, NULL)) > 0;
BEGIN
    RETURN QUERY
    SELECT touched.unit, touched.scope, history.times, history.masks, history.labels,
        touched.read_from, touched.enter_until
    FROM pg_temp.spectrum_funnel_units AS touched
    CROSS JOIN LATERAL (
        -- Ties are in order of event_id where a breakdown tells them apart; else an index holds all
        -- that is read.
        SELECT array_agg(m.occurred_at ORDER BY m.occurred_at, m.tie) AS times,
            array_agg(m.mask ORDER BY m.occurred_at, m.tie) AS masks,
            CASE WHEN p_breakdown IS NOT NULL
                THEN array_agg(m.label ORDER BY m.occurred_at, m.tie)
            END AS labels
        FROM (
            SELECT e.occurred_at, CASE WHEN p_breakdown IS NOT NULL THEN e.event_id END AS tie,
                CASE WHEN v_is_filtered THEN (
                    SELECT coalesce(bit_or(k.bit), 0)
                    FROM unnest(p_keys, p_filters, p_bits) AS k (key, filter, bit)
                    WHERE k.key = e.event_type_key
                        AND (k.filter IS NULL OR e.properties @> k.filter)
                ) ELSE coalesce(p_bits[array_position(p_keys, e.event_type_key)], 0) END AS mask,
                nullif(CASE
                    WHEN p_breakdown = 'account_id' THEN (
                        SELECT dim.account_id FROM warehouse.dim_accounts AS dim
                        WHERE dim.account_key = e.account_key
                    )
                    WHEN p_breakdown IN ('country', 'region', 'city') THEN (
                        SELECT CASE p_breakdown WHEN 'country' THEN dim.country
                            WHEN 'region' THEN dim.region ELSE dim.city END
                        FROM warehouse.dim_geography AS dim
                        WHERE dim.geo_key = e.geo_key
                    )
                    WHEN p_breakdown IS NOT NULL THEN left(e.properties ->> p_breakdown, 200)
                END, '') AS label
            FROM warehouse.visible_events AS e
            WHERE CASE WHEN p_unit = 'account' THEN e.account_key ELSE e.user_key END = touched.unit
                AND e.user_key <> 0
                AND e.occurred_at BETWEEN touched.read_from AND touched.read_until
                AND (p_reads_all OR e.event_type_key = ANY (p_keys))
                AND (touched.scope >= 0 OR e.account_key = -touched.scope)
        ) AS m
        WHERE p_reads_all OR m.mask <> 0
    ) AS history
    WHERE NOT touched.is_leaving AND history.times IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._touched_histories(
    integer[], jsonb[], integer[], boolean, text, text
) IS
    'By unit laid out: the events that have to be walked again, cf. analytics._unit_histories.';

CREATE FUNCTION analytics._find_funnel_entries(
    p_report integer,
    p_steps integer,
    p_keys integer[],
    p_filters jsonb[],
    p_bits integer[],
    p_window interval,
    p_order text,
    p_is_first boolean,
    p_unit text,
    p_breakdown text,
    p_is_last boolean,
    p_has_exclusions boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_entry_changes',
        'unit bigint, scope bigint, session_start timestamptz, old_breakdown text, '
        'old_times timestamptz[], new_breakdown text, new_times timestamptz[]');
    INSERT INTO pg_temp.spectrum_entry_changes (
        unit, scope, session_start, old_breakdown, old_times, new_breakdown, new_times
    )
    WITH histories AS (
        SELECT h.unit, h.scope, coalesce(s.session_start, '-infinity') AS session_start,
            coalesce(s.times, h.times) AS times, coalesce(s.masks, h.masks) AS masks,
            coalesce(s.labels, h.labels) AS labels, h.read_from, h.enter_until
        FROM analytics._touched_histories(
            p_keys, p_filters, p_bits, p_order = 'strict' OR p_unit = 'session', p_unit, p_breakdown
        ) AS h
        LEFT JOIN LATERAL analytics._split_sessions(
            h.times, h.masks, h.labels,
            CASE WHEN p_order = 'any' THEN (1 << p_steps) - 1 ELSE 1 END, p_order = 'strict'
        ) AS s ON p_unit = 'session'
        WHERE p_unit <> 'session' OR s.session_start IS NOT NULL
    ),
    walks AS (
        SELECT h.*, CASE WHEN p_order = 'any' THEN
            analytics._walk_any(
                h.times, h.masks, p_steps, h.read_from, h.enter_until, p_window, p_is_first,
                p_has_exclusions
            )
        ELSE
            analytics._walk_ordered(
                h.times, h.masks, p_steps, h.read_from, h.enter_until, p_window,
                p_order = 'strict', p_is_first, p_has_exclusions
            )
        END AS chain
        FROM histories AS h
        OFFSET 0
    ),
    found AS (
        SELECT w.unit, w.scope, w.session_start,
            coalesce(w.labels[w.chain[CASE WHEN p_is_last THEN cardinality(w.chain) ELSE 1 END]],
                '') AS breakdown,
            ARRAY(SELECT w.times[c.position] FROM unnest(w.chain) AS c (position)) AS step_times
        FROM walks AS w
        WHERE w.chain IS NOT NULL
    ),
    old AS (
        SELECT entry.unit, entry.scope, entry.session_start, entry.breakdown, entry.step_times
        FROM pg_temp.spectrum_funnel_units AS touched
        JOIN spectrum.rollup_funnel_entries AS entry USING (unit, scope)
        WHERE entry.report_id = p_report
    )
    SELECT unit, scope, session_start, old.breakdown, old.step_times,
        CASE WHEN pick.is_new THEN found.breakdown ELSE old.breakdown END,
        CASE WHEN pick.is_new THEN found.step_times ELSE old.step_times END
    FROM old
    FULL JOIN found USING (unit, scope, session_start)
    JOIN pg_temp.spectrum_funnel_units AS touched USING (unit, scope)
    CROSS JOIN LATERAL (
        SELECT touched.is_leaving OR old.unit IS NULL
            OR (old.step_times[1] >= touched.read_from
                AND old.step_times[1] < touched.enter_until)
            OR coalesce(cardinality(found.step_times) > cardinality(old.step_times), false)
            OR coalesce(cardinality(found.step_times) = cardinality(old.step_times)
                AND found.step_times[1] < old.step_times[1], false) AS is_new
    ) AS pick
    WHERE pick.is_new AND (old.breakdown, old.step_times)
        IS DISTINCT FROM (found.breakdown, found.step_times);
END
$$;
COMMENT ON FUNCTION analytics._find_funnel_entries(
    integer, integer, integer[], jsonb[], integer[], interval, text, boolean, text, text, boolean,
    boolean
) IS
    'Finds the counted entries of the units laid out again and leaves in '
    'pg_temp.spectrum_entry_changes which became others.';

CREATE FUNCTION analytics._keep_funnel_entries(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    DELETE FROM spectrum.rollup_funnel_entries AS entry
    USING pg_temp.spectrum_entry_changes AS changed
    WHERE entry.report_id = p_report AND entry.unit = changed.unit
        AND entry.scope = changed.scope AND entry.session_start = changed.session_start;
    INSERT INTO spectrum.rollup_funnel_entries (
        report_id, unit, scope, session_start, breakdown, step_times
    )
    SELECT p_report, unit, scope, session_start, new_breakdown, new_times
    FROM pg_temp.spectrum_entry_changes
    WHERE new_times IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._keep_funnel_entries(integer) IS
    'Brings rollup_funnel_entries up to the entries found.';
-- Room 60, standing funnels, their sums: moved by the entries that became others. A median is found
-- from where it was, among the times that units took: it moves by no more than came and went.

CREATE FUNCTION analytics._lay_out_funnel_steps()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_funnel_steps',
        'account_id text COLLATE "C", breakdown text COLLATE "C", step integer, '
        'microseconds bigint, units bigint');
    INSERT INTO pg_temp.spectrum_funnel_steps (account_id, breakdown, step, microseconds, units)
    SELECT scopes.account_id, moved.breakdown, moved.step, moved.microseconds, sum(moved.units)
    FROM (
        SELECT version.scope, version.breakdown, s.step,
            (extract(epoch FROM version.times[s.step] - version.times[s.step - 1]) * 1000000)
                ::bigint AS microseconds,
            sum(version.sign) AS units
        FROM (
            SELECT -1 AS sign, scope, old_breakdown AS breakdown, old_times AS times
            FROM pg_temp.spectrum_entry_changes
            UNION ALL
            SELECT 1, scope, new_breakdown, new_times FROM pg_temp.spectrum_entry_changes
        ) AS version
        CROSS JOIN LATERAL generate_series(1, cardinality(version.times)) AS s (step)
        GROUP BY 1, 2, 3, 4
        HAVING sum(version.sign) <> 0
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.breakdown, moved.step, moved.microseconds;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_funnel_steps() IS
    'Lays out, by account and step, how many units more or less took how long from the step '
    'before.';

CREATE FUNCTION analytics._median_seconds(p_lower bigint, p_upper bigint)
RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT low.seconds + 0.5 * (high.seconds - low.seconds)
    FROM (
        SELECT p_lower % 86400000000 / 1e6::double precision + p_lower / 86400000000 * 86400
            AS seconds
    ) AS low
    CROSS JOIN (
        SELECT p_upper % 86400000000 / 1e6::double precision + p_upper / 86400000000 * 86400
            AS seconds
    ) AS high
$$;
COMMENT ON FUNCTION analytics._median_seconds(bigint, bigint) IS
    'Half way between two times in microseconds, in seconds; to the bit what percentile_cont gives '
    'of the epochs of intervals.';

CREATE FUNCTION analytics._move_funnel_sums(p_report integer, p_steps integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO spectrum.rollup_funnel_seconds AS known (
        report_id, account_id, breakdown, step, microseconds, units
    )
    SELECT p_report, account_id, breakdown, step, microseconds, units
    FROM pg_temp.spectrum_funnel_steps
    WHERE step > 1
    ON CONFLICT (report_id, account_id, breakdown, step, microseconds) DO UPDATE SET
        units = known.units + excluded.units;
    DELETE FROM spectrum.rollup_funnel_seconds AS known
    USING pg_temp.spectrum_funnel_steps AS moved
    WHERE moved.units < 0 AND known.report_id = p_report AND known.account_id = moved.account_id
        AND known.breakdown = moved.breakdown AND known.step = moved.step
        AND known.microseconds = moved.microseconds AND known.units = 0;

    -- All steps of an account that has any, with zeros where nobody came.
    INSERT INTO analytics.mv_conversion_funnels (report_id, account_id, breakdown, step)
    SELECT p_report, groups.account_id, groups.breakdown, step
    FROM (SELECT DISTINCT account_id, breakdown FROM pg_temp.spectrum_funnel_steps) AS groups
    CROSS JOIN generate_series(1, p_steps) AS step
    ON CONFLICT (report_id, account_id, breakdown, step) DO NOTHING;
    UPDATE analytics.mv_conversion_funnels AS sums
    SET users = sums.users + moved.units,
        microseconds = sums.microseconds + coalesce(moved.microseconds, 0),
        below = sums.below + coalesce(moved.below, 0)
    FROM (
        SELECT steps.account_id, steps.breakdown, steps.step, sum(steps.units) AS units,
            sum(steps.units * steps.microseconds) AS microseconds,
            sum(steps.units) FILTER (WHERE steps.microseconds < cell.lower_median) AS below
        FROM pg_temp.spectrum_funnel_steps AS steps
        JOIN analytics.mv_conversion_funnels AS cell
            ON cell.report_id = p_report AND cell.account_id = steps.account_id
                AND cell.breakdown = steps.breakdown AND cell.step = steps.step
        GROUP BY steps.account_id, steps.breakdown, steps.step
    ) AS moved
    WHERE sums.report_id = p_report AND sums.account_id = moved.account_id
        AND sums.breakdown = moved.breakdown AND sums.step = moved.step;

    PERFORM analytics._move_funnel_median(p_report, cell.account_id, cell.breakdown, cell.step)
    FROM (
        SELECT DISTINCT account_id, breakdown, step FROM pg_temp.spectrum_funnel_steps
        WHERE step > 1
    ) AS cell;
END
$$;
COMMENT ON FUNCTION analytics._move_funnel_sums(integer, integer) IS
    'Moves the counts, times and medians of mv_conversion_funnels by the steps laid out.';

CREATE FUNCTION analytics._move_funnel_median(
    p_report integer,
    p_account_id text,
    p_breakdown text,
    p_step integer
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
DECLARE
    r_cell record;
    r_lower record;
    v_upper bigint;
BEGIN
    -- The middle is looked for from where it was: it moves by no more than came and went.
    SELECT cell.users, cell.below, coalesce(cell.lower_median, -1) AS pivot,
        (cell.users - 1) / 2 AS rank
    INTO r_cell
    FROM analytics.mv_conversion_funnels AS cell
    WHERE cell.report_id = p_report AND cell.account_id = p_account_id
        AND cell.breakdown = p_breakdown AND cell.step = p_step;

    IF r_cell.users > 0 AND r_cell.rank < r_cell.below THEN
        SELECT walk.microseconds, walk.below, walk.below + walk.units AS up_to INTO r_lower
        FROM (
            SELECT known.microseconds, known.units, r_cell.below
                - sum(known.units) OVER (ORDER BY known.microseconds DESC) AS below
            FROM spectrum.rollup_funnel_seconds AS known
            WHERE known.report_id = p_report AND known.account_id = p_account_id
                AND known.breakdown = p_breakdown AND known.step = p_step
                AND known.microseconds < r_cell.pivot
            ORDER BY known.microseconds DESC
        ) AS walk
        WHERE walk.below <= r_cell.rank
        LIMIT 1;
    ELSIF r_cell.users > 0 THEN
        SELECT walk.microseconds, walk.up_to - walk.units AS below, walk.up_to INTO r_lower
        FROM (
            SELECT known.microseconds, known.units, r_cell.below
                + sum(known.units) OVER (ORDER BY known.microseconds) AS up_to
            FROM spectrum.rollup_funnel_seconds AS known
            WHERE known.report_id = p_report AND known.account_id = p_account_id
                AND known.breakdown = p_breakdown AND known.step = p_step
                AND known.microseconds >= r_cell.pivot
            ORDER BY known.microseconds
        ) AS walk
        WHERE walk.up_to > r_cell.rank
        LIMIT 1;
    ELSE
        SELECT NULL::bigint AS microseconds, 0::numeric AS below, 0::numeric AS up_to INTO r_lower;
    END IF;

    v_upper := r_lower.microseconds;
    IF r_cell.users / 2 >= r_lower.up_to THEN
        v_upper := (
            SELECT known.microseconds FROM spectrum.rollup_funnel_seconds AS known
            WHERE known.report_id = p_report AND known.account_id = p_account_id
                AND known.breakdown = p_breakdown AND known.step = p_step
                AND known.microseconds > r_lower.microseconds
            ORDER BY known.microseconds
            LIMIT 1
        );
    END IF;
    UPDATE analytics.mv_conversion_funnels AS cell
    SET below = r_lower.below,
        lower_median = r_lower.microseconds,
        median_seconds = analytics._median_seconds(r_lower.microseconds, v_upper)
    WHERE cell.report_id = p_report AND cell.account_id = p_account_id
        AND cell.breakdown = p_breakdown AND cell.step = p_step;
END
$$;
COMMENT ON FUNCTION analytics._move_funnel_median(integer, text, text, integer) IS
    'Finds the middle of a step''s times again, after its counts were moved.';

CREATE FUNCTION analytics._move_funnel_days(p_report integer, p_steps integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT spectrum.period_starts(
        'day', min(entry.entered_at), max(entry.entered_at) + interval '1 us'
    ) INTO v_starts
    FROM pg_temp.spectrum_entry_changes AS changed
    CROSS JOIN LATERAL (
        VALUES (changed.old_times[1]), (changed.new_times[1])
    ) AS entry (entered_at);
    v_days := analytics._period_dates(v_starts);

    INSERT INTO analytics.mv_funnel_days AS sums (report_id, account_id, day, step, users)
    SELECT p_report, scopes.account_id, v_days[moved.number], s.step,
        coalesce(sum(moved.users) FILTER (WHERE moved.reached >= s.step), 0)
    FROM (
        SELECT version.scope, width_bucket(version.times[1], v_starts) AS number,
            cardinality(version.times) AS reached, sum(version.sign) AS users
        FROM (
            SELECT -1 AS sign, scope, old_times AS times FROM pg_temp.spectrum_entry_changes
            UNION ALL
            SELECT 1, scope, new_times FROM pg_temp.spectrum_entry_changes
        ) AS version
        WHERE version.times IS NOT NULL
        GROUP BY 1, 2, 3
        HAVING sum(version.sign) <> 0
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    CROSS JOIN generate_series(1, p_steps) AS s (step)
    GROUP BY scopes.account_id, moved.number, s.step
    ON CONFLICT (report_id, account_id, day, step) DO UPDATE SET
        users = sums.users + excluded.users;

    IF EXISTS (SELECT FROM pg_temp.spectrum_entry_changes WHERE old_times IS NOT NULL) THEN
        DELETE FROM analytics.mv_funnel_days AS sums
        USING analytics.mv_funnel_days AS entered
        WHERE entered.report_id = p_report AND entered.step = 1 AND entered.users = 0
            AND sums.report_id = p_report AND sums.account_id = entered.account_id
            AND sums.day = entered.day;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._move_funnel_days(integer, integer) IS
    'Moves mv_funnel_days by the entries that became others.';

CREATE FUNCTION analytics._drop_empty_funnels(p_report integer, p_steps integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM analytics.mv_conversion_funnels AS sums
    USING analytics.mv_conversion_funnels AS entered
    WHERE entered.report_id = p_report AND entered.step = 1 AND entered.users = 0
        AND sums.report_id = p_report AND sums.account_id = entered.account_id
        AND sums.breakdown = entered.breakdown;
    -- All accounts together have their steps even where nobody came.
    INSERT INTO analytics.mv_conversion_funnels (report_id, account_id, breakdown, step)
    SELECT p_report, '*', '', step
    FROM generate_series(1, p_steps) AS step
    WHERE NOT EXISTS (
        SELECT FROM analytics.mv_conversion_funnels AS known
        WHERE known.report_id = p_report AND known.account_id = '*'
    );
END
$$;
COMMENT ON FUNCTION analytics._drop_empty_funnels(integer, integer) IS
    'Takes out the accounts and values of a breakdown that nobody entered by any more.';

CREATE FUNCTION analytics._maintain_funnel(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_funnel record;
    r_masks record;
    v_steps integer;
    v_is_build boolean;
    v_has_exclusions boolean;
    v_built_to bigint := p_built_to;
BEGIN
    SELECT definition.*, report.built_to, report.state INTO r_funnel
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.funnels, report.definition)
        AS definition
    WHERE report.report_id = p_report;
    v_is_build := r_funnel.state = 'building' AND p_built_to = 9223372036854775807;
    v_steps := jsonb_array_length(r_funnel.steps);
    v_has_exclusions := coalesce(r_funnel.exclusions, '[]') <> '[]';
    r_masks := analytics._funnel_masks(r_funnel.steps, r_funnel.exclusions);
    -- An account is walked whole, whichever of its users brings it up.
    IF r_funnel.unit = 'account' AND p_built_to >= 0 THEN
        v_built_to := 9223372036854775807;
    END IF;

    PERFORM analytics._touch_funnel_units(
        p_report, v_built_to, r_masks.keys, r_funnel.unit, r_funnel.time_window,
        r_funnel.step_order = 'strict' OR r_funnel.unit = 'session', r_funnel.entry = 'first',
        r_funnel.step_order = 'strict' OR r_funnel.unit = 'session' OR v_has_exclusions, v_is_build
    );
    PERFORM analytics._find_funnel_entries(
        p_report, v_steps, r_masks.keys, r_masks.filters, r_masks.bits, r_funnel.time_window,
        r_funnel.step_order, r_funnel.entry = 'first', r_funnel.unit, r_funnel.breakdown,
        r_funnel.attribution = 'last', v_has_exclusions
    );
    PERFORM analytics._keep_funnel_entries(p_report);
    PERFORM analytics._lay_out_funnel_steps();
    PERFORM analytics._move_funnel_sums(p_report, v_steps);
    PERFORM analytics._move_funnel_days(p_report, v_steps);
    PERFORM analytics._drop_empty_funnels(p_report, v_steps);
END
$$;
COMMENT ON FUNCTION analytics._maintain_funnel(integer, bigint) IS
    'Moves the sums of a funnel by the news.';
-- Room 60, standing funnels: the user's own definitions, and the views that show them. Read by
-- dashboards. The numbers are those of analytics.funnel: the same entries, counted the same way.

CREATE FUNCTION spectrum._create_funnels()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.funnels') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.funnels (
        funnel text NOT NULL CONSTRAINT funnels_pkey PRIMARY KEY,
        steps jsonb NOT NULL,
        time_window interval NOT NULL,
        step_order text NOT NULL
            CONSTRAINT funnels_step_order_is_known
            CHECK (step_order IN ('ordered', 'strict', 'any')),
        entry text NOT NULL
            CONSTRAINT funnels_entry_is_known CHECK (entry IN ('best', 'first')),
        unit text NOT NULL
            CONSTRAINT funnels_unit_is_known CHECK (unit IN ('user', 'account', 'session')),
        breakdown text,
        attribution text NOT NULL
            CONSTRAINT funnels_attribution_is_known CHECK (attribution IN ('first', 'last')),
        exclusions jsonb,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.funnels IS
        'The funnels that analytics.conversion_funnels shows. Define one with '
        'spectrum.define_funnel().';
    COMMENT ON COLUMN spectrum.funnels.funnel IS 'Name.';
    COMMENT ON COLUMN spectrum.funnels.steps IS
        'Array of events: "event type" or {"event": "event type", "where": {...}}.';
    COMMENT ON COLUMN spectrum.funnels.time_window IS 'Longest time from step 1 to a later step.';
    COMMENT ON COLUMN spectrum.funnels.step_order IS 'ordered, strict or any.';
    COMMENT ON COLUMN spectrum.funnels.entry IS 'Which entry of a unit counts: best or first.';
    COMMENT ON COLUMN spectrum.funnels.unit IS 'What is counted: user, account or session.';
    COMMENT ON COLUMN spectrum.funnels.breakdown IS
        'country, region, city, account_id or a property; NULL none.';
    COMMENT ON COLUMN spectrum.funnels.attribution IS
        'Where the breakdown is read: first or last step reached.';
    COMMENT ON COLUMN spectrum.funnels.exclusions IS 'Events that void an entry, written as steps.';
    COMMENT ON COLUMN spectrum.funnels.changed_at IS 'When it was last defined.';

    CREATE TABLE spectrum.rollup_funnel_entries (
        report_id integer NOT NULL,
        unit bigint NOT NULL,
        scope bigint NOT NULL,
        session_start timestamptz NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        step_times timestamptz[] NOT NULL,
        CONSTRAINT rollup_funnel_entries_pkey PRIMARY KEY (report_id, unit, scope, session_start)
    );
    COMMENT ON TABLE spectrum.rollup_funnel_entries IS
        'The one entry of each unit that a funnel counts.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.report_id IS 'spectrum.reports, kind funnel.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.unit IS
        'dim_users; dim_accounts where the funnel counts accounts.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.session_start IS
        'Of a session; -infinity where sessions are not counted.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.breakdown IS 'Empty where there is none.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.step_times IS
        'When it reached step 1, step 2, ...; as long as the entry came.';

    CREATE TABLE spectrum.rollup_funnel_seconds (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        step integer NOT NULL,
        microseconds bigint NOT NULL,
        units bigint NOT NULL,
        CONSTRAINT rollup_funnel_seconds_pkey
        PRIMARY KEY (report_id, account_id, breakdown, step, microseconds)
    );
    COMMENT ON TABLE spectrum.rollup_funnel_seconds IS
        'How many units took how long from the step before: what medians are found in.';
    COMMENT ON COLUMN spectrum.rollup_funnel_seconds.report_id IS 'spectrum.reports, kind funnel.';

    CREATE TABLE analytics.mv_conversion_funnels (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        step integer NOT NULL,
        users bigint NOT NULL DEFAULT 0,
        microseconds numeric NOT NULL DEFAULT 0,
        below bigint NOT NULL DEFAULT 0,
        lower_median bigint,
        median_seconds double precision,
        CONSTRAINT mv_conversion_funnels_pkey
        PRIMARY KEY (report_id, account_id, breakdown, step)
    ) WITH (fillfactor = 70);
    COMMENT ON TABLE analytics.mv_conversion_funnels IS
        'Steps of each defined funnel, for all accounts together (account_id *) and for each '
        'account with an entry, kept by refreshes. Read it through analytics.conversion_funnels.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.report_id IS 'spectrum.reports, kind funnel.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.breakdown IS
        'Value of the breakdown; empty where there is none.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.users IS
        'Users (accounts, sessions) that reached the step; 0 where nobody did.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.microseconds IS
        'Sum of the times from the previous step.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.below IS
        'Units that took less time than lower_median.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.lower_median IS
        'The middle of the times, in microseconds: the lower one where there are two.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.median_seconds IS
        'Half way between it and the upper one, in seconds.';

    CREATE TABLE analytics.mv_funnel_days (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        step integer NOT NULL,
        users bigint NOT NULL,
        CONSTRAINT mv_funnel_days_pkey PRIMARY KEY (report_id, account_id, day, step)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_funnel_days IS
        'The standing funnels by the day of entry: summed over the days they are the whole. Days '
        'with an entry only. Read it through analytics.funnel_days.';
    COMMENT ON COLUMN analytics.mv_funnel_days.report_id IS 'spectrum.reports, kind funnel.';
    COMMENT ON COLUMN analytics.mv_funnel_days.day IS
        'Calendar day, in config.timezone, of step 1 of the counted entry.';
    COMMENT ON COLUMN analytics.mv_funnel_days.users IS
        'Users (accounts, sessions) that entered on the day and reached the step, whenever.';
    PERFORM spectrum._create_funnel_views();
    PERFORM spectrum._add_kind('funnel', 50, '_maintain_funnel',
        '{spectrum.rollup_funnel_entries, spectrum.rollup_funnel_seconds, '
        'analytics.mv_conversion_funnels, analytics.mv_funnel_days}',
        '{conversion_funnels, funnel_days}');
END
$$;
COMMENT ON FUNCTION spectrum._create_funnels() IS
    'Room 60: makes spectrum.funnels, the tables of the standing funnels and their plain views.';

CREATE FUNCTION spectrum._create_funnel_views()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.conversion_funnels AS
    SELECT
        sums.account_id,
        report.name AS funnel,
        sums.step,
        coalesce(report.definition -> 'steps' -> (sums.step - 1) ->> 'event',
            report.definition -> 'steps' ->> (sums.step - 1)) AS event_type,
        sums.users,
        coalesce(sums.users / nullif(first_value(sums.users) OVER steps, 0)::double precision, 0)
            AS rate_from_start,
        coalesce(sums.users / nullif(lag(sums.users, 1, sums.users) OVER steps, 0)
            ::double precision, 0) AS rate_from_previous,
        sums.median_seconds,
        CASE WHEN sums.step > 1 THEN
            (sums.microseconds / nullif(sums.users, 0) / 1e6)::double precision
        END AS mean_seconds,
        nullif(sums.breakdown, '') AS breakdown,
        report.definition ->> 'unit' AS unit,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_conversion_funnels AS sums USING (report_id)
    WHERE report.kind = 'funnel' AND report.state = 'served'
    WINDOW steps AS (PARTITION BY report.name, sums.account_id, sums.breakdown ORDER BY sums.step);
    COMMENT ON VIEW analytics.conversion_funnels IS
        'How many get from step to step of each defined funnel (account_id *: all accounts). One '
        'row a step, and a value of the breakdown where the funnel has one.';
    COMMENT ON COLUMN analytics.conversion_funnels.users IS
        'Users (accounts, sessions: see unit) that reached the step; 0 where nobody did.';
    COMMENT ON COLUMN analytics.conversion_funnels.rate_from_start IS
        'users / users of step 1; 0 where there are none.';
    COMMENT ON COLUMN analytics.conversion_funnels.rate_from_previous IS
        'users / users of the previous step; 0 where there are none.';
    COMMENT ON COLUMN analytics.conversion_funnels.median_seconds IS
        'Median time from the previous step, of those who took this one.';
    COMMENT ON COLUMN analytics.conversion_funnels.mean_seconds IS 'Their mean time.';
    COMMENT ON COLUMN analytics.conversion_funnels.unit IS
        'What is counted: user, account or session.';

    CREATE VIEW analytics.funnel_days AS
    SELECT
        sums.account_id,
        report.name AS funnel,
        sums.day,
        sums.step,
        sums.users,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_funnel_days AS sums USING (report_id)
    WHERE report.kind = 'funnel' AND report.state = 'served';
    COMMENT ON VIEW analytics.funnel_days IS
        'Each defined funnel by the day of entry (account_id *: all accounts).';
END
$$;
COMMENT ON FUNCTION spectrum._create_funnel_views() IS
    'Room 60: makes the plain views of the standing funnels.';

CREATE FUNCTION analytics._standing_conversion_funnels()
RETURNS TABLE (
    account_id text,
    funnel text,
    breakdown text,
    unit text,
    step integer,
    event_type text,
    users bigint,
    rate_from_start double precision,
    rate_from_previous double precision,
    median_seconds double precision,
    mean_seconds double precision
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.account_id, f.funnel, r.breakdown, f.unit, r.step, r.event_type,
        r.units, r.rate_from_start, r.rate_from_previous, r.median_seconds, r.mean_seconds
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.funnels, report.definition) AS f
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._funnel_report(
        f.steps, NULL, NULL, f.time_window, f.step_order, f.entry, f.unit, NULL, f.breakdown,
        f.attribution, f.exclusions, scopes.by_account
    ) AS r
    WHERE report.kind = 'funnel' AND report.state = 'served';
END
$$;
COMMENT ON FUNCTION analytics._standing_conversion_funnels() IS
    'What analytics.conversion_funnels has to show, out of all events: for verify().';

CREATE FUNCTION analytics._standing_funnel_days()
RETURNS TABLE (account_id text, funnel text, day date, step integer, users bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH entries AS MATERIALIZED (
        SELECT e.account_id, f.funnel, f.steps, e.step_times[1] AS entered_at,
            cardinality(e.step_times) AS reached
        FROM spectrum.reports AS report
        CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.funnels, report.definition) AS f
        CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
        CROSS JOIN LATERAL analytics._funnel_entries(
            f.steps, NULL, NULL, f.time_window, f.step_order, f.entry, f.unit, NULL, NULL,
            f.attribution, f.exclusions, scopes.by_account
        ) AS e
        WHERE report.kind = 'funnel' AND report.state = 'served'
    ),
    day_starts AS MATERIALIZED (
        SELECT spectrum.period_starts(
            'day', min(e.entered_at), max(e.entered_at) + interval '1 us'
        ) AS starts
        FROM entries AS e
    ),
    levels AS (
        SELECT e.account_id, e.funnel, e.steps, e.reached, count(*) AS users,
            d.starts[width_bucket(e.entered_at, d.starts)] AS day_start
        FROM entries AS e
        CROSS JOIN day_starts AS d
        GROUP BY e.account_id, e.funnel, e.steps, e.reached, day_start
    )
    SELECT l.account_id, l.funnel, spectrum.period_date(l.day_start), s.step,
        coalesce(sum(l.users) FILTER (WHERE l.reached >= s.step), 0)::bigint
    FROM levels AS l
    CROSS JOIN LATERAL generate_series(1, jsonb_array_length(l.steps)) AS s (step)
    GROUP BY l.account_id, l.funnel, l.day_start, s.step;
END
$$;
COMMENT ON FUNCTION analytics._standing_funnel_days() IS
    'What analytics.funnel_days has to show, out of all events: for verify().';

CREATE FUNCTION spectrum.define_funnel(
    p_name text,
    p_steps jsonb,
    p_window interval DEFAULT '14 days',
    p_order text DEFAULT 'ordered',
    p_entry text DEFAULT 'best',
    p_unit text DEFAULT 'user',
    p_breakdown text DEFAULT NULL,
    p_attribution text DEFAULT 'first',
    p_exclude jsonb DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_funnel(
        p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    DELETE FROM spectrum.funnels WHERE funnel = p_name;
    INSERT INTO spectrum.funnels (
        funnel, steps, time_window, step_order, entry, unit, breakdown, attribution, exclusions
    )
    VALUES (
        p_name, p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    PERFORM spectrum._begin_report('funnel', p_name, to_jsonb(definition))
    FROM spectrum.funnels AS definition WHERE funnel = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_funnel(
    text, jsonb, interval, text, text, text, text, text, jsonb
) IS
    'Defines a standing funnel or replaces it; the options are those of analytics.funnel. The next '
    'refresh shows it in analytics.conversion_funnels and analytics.funnel_days.';

CREATE FUNCTION spectrum.drop_funnel(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.funnels WHERE funnel = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.funnels');
    END IF;
    PERFORM spectrum._discard_reports('funnel', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_funnel(text) IS
    'Removes a standing funnel.';
-- Room 60, retention: of the users who began something in a period, how many come back in the
-- periods after it. Reads analytics.events; read by analytics.retention and the standing
-- retentions.
--
-- A user's history is folded into bit strings, one bit a calendar period (in which he started,
-- in which he returned), in one pass over the events. A cohort's row is a slice of them, so users
-- of the same pattern are counted together.

CREATE FUNCTION analytics._check_retention(
    p_period text, p_periods integer, p_cohort text, p_mode text, p_where jsonb
)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    IF p_periods IS NULL OR p_periods NOT BETWEEN 0 AND 1000 THEN
        PERFORM spectrum._reject('p_periods', p_periods::text, 'a number from 0 to 1000');
    END IF;
    PERFORM spectrum._check_choice('p_cohort', p_cohort, '{first, recurring}');
    PERFORM spectrum._check_choice('p_mode', p_mode, '{on, on_or_after}');
    PERFORM analytics._check_filter('p_where', p_where);
END
$$;
COMMENT ON FUNCTION analytics._check_retention(text, integer, text, text, jsonb) IS
    'Raises 22023 unless the options describe a retention.';

CREATE FUNCTION analytics._retention_users(
    p_start_key integer,
    p_return_key integer,
    p_starts timestamptz[],
    p_is_recurring boolean,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_where jsonb,
    p_by_account boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    first_start timestamptz,
    started bit varying,
    returned bit varying,
    returned_after bit varying
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_account_key bigint := (
        SELECT a.account_key FROM analytics.accounts AS a WHERE a.account_id = p_account
    );
    v_none bit varying := repeat('0', cardinality(p_starts) - 1)::bit varying;
    -- Where each start is a return itself, there is a return at or after it in its period.
    v_start_returns boolean := p_return_key IS NULL OR coalesce(p_return_key = p_start_key, false);
BEGIN
    -- The arguments are constants of this plan, see _unit_histories. Starts need a bit each, and
    -- the periods to be told apart, only in some retentions.
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN (
            SELECT a.account_id FROM analytics.accounts AS a WHERE a.account_key = f.scope_key
        ) ELSE coalesce(p_account, '*') END,
        f.user_key, min(f.first_start),
        CASE WHEN p_is_recurring THEN bit_or(f.started)::bit varying END,
        coalesce(bit_or(f.returned), v_none)::bit varying,
        coalesce(
            bit_or(f.returned) FILTER (WHERE v_start_returns OR f.last_return >= f.first_start),
            v_none
        )::bit varying
    FROM (
        SELECT CASE WHEN p_by_account THEN e.account_key END AS scope_key, e.user_key,
            min(e.occurred_at) FILTER (WHERE e.is_start) AS first_start,
            CASE WHEN NOT v_start_returns THEN
                max(e.occurred_at) FILTER (WHERE e.is_return)
            END AS last_return,
            CASE WHEN p_is_recurring THEN
                bit_or(set_bit(v_none, e.number - 1, 1)) FILTER (WHERE e.is_start)
            END AS started,
            bit_or(set_bit(v_none, e.number - 1, 1)) FILTER (WHERE e.is_return) AS returned
        FROM (
            SELECT e.account_key, e.user_key, e.occurred_at,
                width_bucket(e.occurred_at, p_starts) AS number,
                (p_start_key IS NULL OR e.event_type_key = p_start_key) AND (
                    NOT p_is_recurring
                    OR ((p_from IS NULL OR e.occurred_at >= p_from)
                        AND (p_to IS NULL OR e.occurred_at < p_to))
                ) AS is_start,
                p_return_key IS NULL OR e.event_type_key = p_return_key AS is_return
            FROM analytics.timelines AS e
            WHERE e.user_key BETWEEN p_first_user AND p_last_user
                AND (
                    p_start_key IS NULL OR p_return_key IS NULL
                    OR e.event_type_key IN (p_start_key, p_return_key)
                )
                AND e.occurred_at >= p_starts[1]
                AND e.occurred_at < p_starts[cardinality(p_starts)]
                AND (p_where IS NULL OR e.properties @> p_where)
                AND (p_account IS NULL OR e.account_key = v_account_key)
                AND (NOT p_by_account OR e.account_key <> 0)
        ) AS e
        GROUP BY
            CASE WHEN p_by_account THEN e.account_key END,
            e.user_key,
            CASE WHEN NOT v_start_returns THEN e.number END
    ) AS f
    GROUP BY f.scope_key, f.user_key
    HAVING min(f.first_start) IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._retention_users(
    integer, integer, timestamptz[], boolean, timestamptz, timestamptz, text, jsonb, boolean,
    bigint, bigint
) IS
    'Each user''s first start and, one bit a period of p_starts: started (if p_is_recurring: in '
    '[p_from, p_to)), returned, and returned at or after the first start of that period. A NULL '
    'key stands for any event. Users from p_first_user to p_last_user.';

CREATE FUNCTION analytics._retention_users_by_day(
    p_starts timestamptz[],
    p_is_recurring boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    first_start timestamptz,
    started bit varying,
    returned bit varying,
    returned_after bit varying
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_none bit varying := repeat('0', cardinality(p_starts) - 1)::bit varying;
BEGIN
    RETURN QUERY
    SELECT '*', u.user_key, u.first_at, CASE WHEN p_is_recurring THEN u.active END, u.active,
        u.active
    FROM (
        SELECT d.user_key, min(d.occurred_at) AS first_at,
            bit_or(set_bit(v_none, width_bucket(d.occurred_at, p_starts) - 1, 1))::bit varying
                AS active
        FROM analytics.user_days AS d
        WHERE d.user_key BETWEEN p_first_user AND p_last_user
        GROUP BY d.user_key
    ) AS u;
END
$$;
COMMENT ON FUNCTION analytics._retention_users_by_day(timestamptz[], boolean, bigint, bigint) IS
    'What _retention_users gives for any event of all time, out of the days that are kept.';

CREATE FUNCTION analytics._retention_patterns(
    p_start_key integer,
    p_return_key integer,
    p_starts timestamptz[],
    p_is_recurring boolean,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_where jsonb,
    p_by_account boolean,
    p_by_day boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (
    account_id text,
    first_number integer,
    started bit varying,
    returned bit varying,
    returned_after bit varying,
    users bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 100000000 ROWS 10000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
BEGIN
    RETURN QUERY
    SELECT u.account_id, n.number, u.started, u.returned, u.returned_after, count(*)
    FROM (
        SELECT * FROM analytics._retention_users(
            p_start_key, p_return_key, p_starts, p_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, p_first_user, p_last_user
        ) WHERE NOT p_by_day
        UNION ALL
        SELECT * FROM analytics._retention_users_by_day(
            p_starts, p_is_recurring, p_first_user, p_last_user
        ) WHERE p_by_day
    ) AS u
    CROSS JOIN LATERAL (
        SELECT CASE WHEN NOT p_is_recurring
            AND (p_from IS NULL OR u.first_start >= p_from)
            AND (p_to IS NULL OR u.first_start < p_to)
        THEN width_bucket(u.first_start, p_starts) END AS number
    ) AS n
    WHERE p_is_recurring OR n.number IS NOT NULL
    GROUP BY u.account_id, n.number, u.started, u.returned, u.returned_after;
END
$$;
COMMENT ON FUNCTION analytics._retention_patterns(
    integer, integer, timestamptz[], boolean, timestamptz, timestamptz, text, jsonb, boolean,
    boolean, bigint, bigint
) IS
    'How many users have the same bits of _retention_users, and (unless p_is_recurring) the same '
    'period of their first start, where that is in [p_from, p_to).';

CREATE FUNCTION analytics._retention_cohorts(
    p_start_event text,
    p_return_event text,
    p_period text,
    p_periods integer,
    p_from timestamptz,
    p_to timestamptz,
    p_cohort text,
    p_mode text,
    p_account text,
    p_where jsonb,
    p_by_account boolean
)
RETURNS TABLE (account_id text, cohort timestamptz, active bit varying, users bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_start_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = p_start_event
    );
    v_return_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = p_return_event
    );
    v_starts timestamptz[] := (
        SELECT spectrum.period_starts(p_period, m.first_at, m.end_at)
        FROM analytics._event_months() AS m
    );
    v_is_recurring boolean := p_cohort = 'recurring';
    -- All users in four parts, for the workers; not where one account's are few.
    v_is_cut boolean := p_account IS NULL AND NOT p_by_account;
    v_is_by_day boolean := v_is_cut AND analytics._has_user_days()
        AND num_nonnulls(p_start_event, p_return_event, p_where, p_from, p_to) = 0;
    v_cuts bigint[] := CASE WHEN v_is_cut THEN analytics._user_cuts()
        ELSE '{1, 9223372036854775807}'::bigint[] END;
    v_none bit varying := repeat('0', p_periods + 1)::bit varying;
    -- Back in the first n periods, by n + 1.
    v_until bit varying[] := ARRAY(
        SELECT rpad(repeat('1', n.number), p_periods + 1, '0')::bit varying
        FROM generate_series(0, p_periods + 1) AS n (number)
    );
BEGIN
    IF v_starts = '{}' OR (p_start_event IS NOT NULL AND v_start_key IS NULL) THEN
        RETURN;
    ELSIF p_return_event IS NOT NULL THEN
        v_return_key := coalesce(v_return_key, -1);
    END IF;
    RETURN QUERY
    SELECT u.account_id, v_starts[c.number],
        CASE
            WHEN p_mode = 'on' THEN set_bit(
                substring(u.returned || v_none FROM c.number FOR p_periods + 1),
                0, get_bit(u.returned_after, c.number - 1)
            )::bit varying
            WHEN l.number > c.number THEN v_until[least(l.number - c.number, p_periods) + 2]
            ELSE v_until[get_bit(u.returned_after, c.number - 1) + 1]
        END,
        u.users
    FROM (
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[1], v_cuts[2] - 1
        )
        UNION ALL
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[2], v_cuts[3] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[3], v_cuts[4] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[4], v_cuts[5] - 1
        ) WHERE v_is_cut
    ) AS u
    CROSS JOIN LATERAL (SELECT length(rtrim(u.returned::text, '0')) AS number) AS l
    CROSS JOIN LATERAL (
        SELECT u.first_number AS number WHERE NOT v_is_recurring
        UNION ALL
        SELECT n.number FROM generate_series(1, length(u.started)) AS n (number)
        WHERE v_is_recurring AND get_bit(u.started, n.number - 1) = 1
    ) AS c;
END
$$;
COMMENT ON FUNCTION analytics._retention_cohorts(
    text, text, text, integer, timestamptz, timestamptz, text, text, text, jsonb, boolean
) IS
    'What users contribute to a retention, those of one pattern together: the cohorts they are in, '
    'and for each a bit string, bit k (from 0) set if they count as back in period k. For one '
    'account, for all together (*), or, with p_by_account, for each account by itself, out of its '
    'events alone.';

CREATE FUNCTION analytics._retention_report(
    p_start_event text,
    p_return_event text,
    p_period text,
    p_periods integer,
    p_from timestamptz,
    p_to timestamptz,
    p_cohort text,
    p_mode text,
    p_account text,
    p_where jsonb,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    cohort date,
    period integer,
    cohort_size bigint,
    users bigint,
    rate double precision,
    is_complete boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH patterns AS MATERIALIZED (
        SELECT c.account_id, c.cohort, c.active, sum(c.users) AS users
        FROM analytics._retention_cohorts(
            p_start_event, p_return_event, p_period, p_periods, p_from, p_to, p_cohort, p_mode,
            p_account, p_where, p_by_account
        ) AS c
        GROUP BY c.account_id, c.cohort, c.active
    ),
    calendar AS MATERIALIZED (
        SELECT spectrum.period_starts(p_period, min(p.cohort), now() + interval '1 us') AS starts
        FROM patterns AS p
    ),
    cells AS (
        SELECT p.account_id, p.cohort, k.period,
            sum(p.users)::bigint AS cohort_size,
            coalesce(sum(p.users) FILTER (WHERE get_bit(p.active, k.period) = 1), 0)::bigint
                AS users
        FROM patterns AS p
        CROSS JOIN generate_series(0, p_periods) AS k (period)
        GROUP BY p.account_id, p.cohort, k.period
    )
    SELECT c.account_id, spectrum.period_date(c.cohort), c.period, c.cohort_size, c.users,
        c.users / c.cohort_size::double precision,
        p_mode = 'on' AND d.starts[n.number + c.period + 1] <= now()
    FROM cells AS c
    CROSS JOIN calendar AS d
    CROSS JOIN LATERAL (SELECT width_bucket(c.cohort, d.starts) AS number) AS n
    -- A period that has not begun is no row.
    WHERE d.starts[n.number + c.period] <= now();
END
$$;
COMMENT ON FUNCTION analytics._retention_report(
    text, text, text, integer, timestamptz, timestamptz, text, text, text, jsonb, boolean
) IS
    'Counts the cohorts of each scope by the periods that have begun.';

CREATE FUNCTION analytics.retention(
    p_start_event text DEFAULT NULL,
    p_return_event text DEFAULT NULL,
    p_period text DEFAULT 'week',
    p_periods integer DEFAULT 12,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_cohort text DEFAULT 'first',
    p_mode text DEFAULT 'on',
    p_account text DEFAULT NULL,
    p_where jsonb DEFAULT NULL
)
RETURNS TABLE (
    cohort date,
    period integer,
    cohort_size bigint,
    users bigint,
    rate double precision,
    is_complete boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_retention(p_period, p_periods, p_cohort, p_mode, p_where);
    RETURN QUERY
    SELECT r.cohort, r.period, r.cohort_size, r.users, r.rate, r.is_complete
    FROM analytics._retention_report(
        p_start_event, p_return_event, p_period, p_periods, p_from, p_to, p_cohort, p_mode,
        p_account, p_where, false
    ) AS r
    ORDER BY r.cohort, r.period;
END
$$;
COMMENT ON FUNCTION analytics.retention(
    text, text, text, integer, timestamptz, timestamptz, text, text, text, jsonb
) IS
    'Retention, exact over all events: of the users whose p_start_event (NULL: any event) falls in '
    'a period, how many have p_return_event in each of the p_periods after it. p_period: day, week '
    'or month. p_cohort: first (the period of the user''s first start ever) or recurring (each '
    'period with a start). p_mode: on (back in the period) or on_or_after (in it or later). '
    '[p_from, p_to) limits the starts, p_where the events: JSON containment in their properties. '
    'Period 0 asks for a return at or after the start.';
-- Room 60, standing retentions, how they are kept: the periods in which a user started and came
-- back are laid out as they were and as they are, and the cohorts move by the difference. Where any
-- event counts they come from rollup_user_days, else from days of their own.

CREATE FUNCTION analytics._known_periods(p_period text)
RETURNS date[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- By the event types, of which there are few: a day more on both sides, since the day of an
    -- instant depends on the time zone.
    RETURN ARRAY(
        SELECT start::date
        FROM (
            SELECT min(dim.first_seen) AS first_at, max(dim.last_seen) AS last_at
            FROM warehouse.dim_event_types AS dim
        ) AS known
        CROSS JOIN analytics.settings AS setting
        CROSS JOIN LATERAL generate_series(
            spectrum._period_day(p_period, known.first_at AT TIME ZONE setting.timezone
                - interval '1 day', setting.week_start),
            known.last_at AT TIME ZONE setting.timezone + interval '1 day',
            ('1 ' || p_period)::interval
        ) AS start
    );
END
$$;
COMMENT ON FUNCTION analytics._known_periods(text) IS
    'First days of all calendar periods that hold events, ascending and without a gap: a day is in '
    'period width_bucket(day, periods).';

CREATE FUNCTION analytics._retention_by_user_days(
    p_activity integer,
    p_built_to bigint,
    p_period text,
    p_is_build boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
BEGIN
    IF p_is_build THEN
        -- All that the chunk's users did is new to a report that is being built.
        PERFORM spectrum._empty_temporary('spectrum_day_changes',
            'user_key bigint, scope bigint, day date, is_added boolean');
        INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
        SELECT known.user_key, known.scope, known.day, true
        FROM (SELECT DISTINCT user_key, scope FROM pg_temp.spectrum_news) AS users
        JOIN spectrum.rollup_user_days AS known USING (user_key, scope)
        WHERE known.report_id = p_activity;
    END IF;

    INSERT INTO pg_temp.spectrum_retention_periods (
        sign, user_key, scope, period, first_start, last_return
    )
    WITH moved AS (
        SELECT user_key, scope, width_bucket(day, v_starts) AS number,
            sum(CASE WHEN is_added THEN 1 ELSE -1 END) AS days
        FROM pg_temp.spectrum_day_changes
        WHERE user_key <= p_built_to
        GROUP BY user_key, scope, number
    ),
    -- Users of whom a period became active, or no longer is.
    users AS (
        SELECT DISTINCT moved.user_key, moved.scope
        FROM moved
        CROSS JOIN LATERAL (
            SELECT count(*) AS days FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_activity AND known.user_key = moved.user_key
                AND known.scope = moved.scope AND known.day >= v_starts[moved.number]
                AND known.day < coalesce(v_starts[moved.number + 1], 'infinity')
            OFFSET 0
        ) AS now
        WHERE (now.days = 0) <> (now.days = moved.days)
    ),
    periods AS (
        SELECT users.user_key, users.scope, width_bucket(known.day, v_starts) AS number,
            count(*) AS days
        FROM users
        CROSS JOIN LATERAL (
            SELECT near.day FROM spectrum.rollup_user_days AS near
            WHERE near.report_id = p_activity AND near.user_key = users.user_key
                AND near.scope = users.scope
            OFFSET 0
        ) AS known
        GROUP BY users.user_key, users.scope, number
    )
    SELECT version.sign, user_key, scope, v_starts[number], '-infinity', 'infinity'
    FROM periods
    FULL JOIN (SELECT moved.* FROM moved JOIN users USING (user_key, scope)) AS moved
        USING (user_key, scope, number)
    CROSS JOIN LATERAL (
        VALUES (1, coalesce(periods.days, 0)),
            (-1, coalesce(periods.days, 0) - coalesce(moved.days, 0))
    ) AS version (sign, days)
    WHERE version.days > 0;
END
$$;
COMMENT ON FUNCTION analytics._retention_by_user_days(integer, bigint, text, boolean) IS
    'Lays out the periods of users of whom one became active or inactive: for retentions of any '
    'events, where each event is a start and a return.';

CREATE FUNCTION analytics._event_key(p_event text)
RETURNS integer
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_event IS NOT NULL THEN coalesce((
        SELECT types.event_type_key FROM analytics.event_types AS types
        WHERE types.event_type = p_event
    ), -1) END;
END
$$;
COMMENT ON FUNCTION analytics._event_key(text) IS
    'Key of an event type: NULL for NULL, which stands for any, -1 for one never seen.';

CREATE FUNCTION analytics._move_retention_days(
    p_report integer,
    p_built_to bigint,
    p_start_key integer,
    p_return_key integer,
    p_filter jsonb
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_any boolean := p_start_key IS NULL OR p_return_key IS NULL;
    v_starts timestamptz[];
    v_days date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_retention_days',
        'user_key bigint, scope bigint, day date, old_start timestamptz, old_return timestamptz, '
        'new_start timestamptz, new_return timestamptz');
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;

    INSERT INTO pg_temp.spectrum_retention_days (
        user_key, scope, day, old_start, old_return, new_start, new_return
    )
    SELECT touched.user_key, touched.scope, v_days[touched.number], known.first_start,
        known.last_return, found.first_start, found.last_return
    FROM (
        SELECT news.user_key, news.scope, width_bucket(news.occurred_at, v_starts) AS number,
            bool_or(news.is_leaving) AS is_leaving
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
            AND (v_any OR news.event_type_key IN (p_start_key, p_return_key))
        GROUP BY 1, 2, 3
    ) AS touched
    LEFT JOIN LATERAL (
        SELECT before.first_start, before.last_return
        FROM spectrum.rollup_retention_days AS before
        WHERE before.report_id = p_report AND before.user_key = touched.user_key
            AND before.scope = touched.scope AND before.day = v_days[touched.number]
        OFFSET 0
    ) AS known ON true
    LEFT JOIN LATERAL (
        SELECT
            min(fact.occurred_at) FILTER (
                WHERE p_start_key IS NULL OR fact.event_type_key = p_start_key) AS first_start,
            max(fact.occurred_at) FILTER (
                WHERE p_return_key IS NULL OR fact.event_type_key = p_return_key) AS last_return
        FROM warehouse.fact_events AS fact
        WHERE fact.user_key = touched.user_key
            AND fact.occurred_at >= v_starts[touched.number]
            AND fact.occurred_at < v_starts[touched.number + 1]
            AND (v_any OR fact.event_type_key IN (p_start_key, p_return_key))
            AND (touched.scope >= 0 OR fact.account_key = -touched.scope)
            AND (p_filter IS NULL OR fact.properties @> p_filter)
        OFFSET 0
    ) AS found ON NOT touched.is_leaving
    WHERE (known.first_start, known.last_return)
        IS DISTINCT FROM (found.first_start, found.last_return);

    DELETE FROM spectrum.rollup_retention_days AS known
    USING pg_temp.spectrum_retention_days AS changed
    WHERE known.report_id = p_report AND known.user_key = changed.user_key
        AND known.scope = changed.scope AND known.day = changed.day;
    INSERT INTO spectrum.rollup_retention_days (
        report_id, user_key, scope, day, first_start, last_return
    )
    SELECT p_report, user_key, scope, day, new_start, new_return
    FROM pg_temp.spectrum_retention_days
    WHERE new_start IS NOT NULL OR new_return IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._move_retention_days(integer, bigint, integer, integer, jsonb) IS
    'Brings rollup_retention_days up to the news and leaves in pg_temp.spectrum_retention_days '
    'which days changed, from what to what.';

CREATE FUNCTION analytics._retention_by_events(p_report integer, p_period text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
BEGIN
    INSERT INTO pg_temp.spectrum_retention_periods (
        sign, user_key, scope, period, first_start, last_return
    )
    WITH users AS (
        SELECT DISTINCT user_key, scope FROM pg_temp.spectrum_retention_days
    ),
    days AS (
        SELECT users.user_key, users.scope, known.day, known.first_start, known.last_return,
            changed.day IS NOT NULL AS is_changed
        FROM users
        CROSS JOIN LATERAL (
            SELECT near.day, near.first_start, near.last_return
            FROM spectrum.rollup_retention_days AS near
            WHERE near.report_id = p_report AND near.user_key = users.user_key
                AND near.scope = users.scope
            OFFSET 0
        ) AS known
        LEFT JOIN pg_temp.spectrum_retention_days AS changed
            ON changed.user_key = users.user_key AND changed.scope = users.scope
                AND changed.day = known.day
    )
    SELECT version.sign, version.user_key, version.scope,
        v_starts[width_bucket(version.day, v_starts)] AS period,
        min(version.first_start), max(version.last_return)
    FROM (
        SELECT 1 AS sign, user_key, scope, day, first_start, last_return FROM days
        UNION ALL
        SELECT -1, user_key, scope, day, first_start, last_return FROM days WHERE NOT is_changed
        UNION ALL
        SELECT -1, user_key, scope, day, old_start, old_return
        FROM pg_temp.spectrum_retention_days
        WHERE old_start IS NOT NULL OR old_return IS NOT NULL
    ) AS version
    GROUP BY version.sign, version.user_key, version.scope, period;
END
$$;
COMMENT ON FUNCTION analytics._retention_by_events(integer, text) IS
    'Lays out the periods of users of whom a day changed: for retentions of certain events.';

CREATE FUNCTION analytics._shown_periods(
    p_period text,
    p_periods integer,
    OUT first_number integer,
    OUT ends_at timestamptz[]
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT width_bucket(min(moved.period), analytics._known_periods(p_period)),
        (spectrum.period_starts(
            p_period,
            spectrum._day_start(min(moved.period), min(setting.timezone)),
            spectrum._day_start(max(moved.period) + (p_periods + 1) * ('1 ' || p_period)::interval,
                min(setting.timezone))
        ))[2:]
    INTO first_number, ends_at
    FROM pg_temp.spectrum_retention_periods AS moved
    CROSS JOIN analytics.settings AS setting;
END
$$;
COMMENT ON FUNCTION analytics._shown_periods(text, integer) IS
    'The periods from the first one laid out to p_periods after the last: the number of the first '
    'among all known periods, and when each ends.';

CREATE FUNCTION analytics._move_retention_cohorts(
    p_report integer,
    p_period text,
    p_periods integer,
    p_is_recurring boolean,
    p_is_on boolean,
    p_start_returns boolean
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
    r_shown record := analytics._shown_periods(p_period, p_periods);
BEGIN
    WITH periods AS MATERIALIZED (
        SELECT sign, user_key, scope, width_bucket(period, v_starts) AS number,
            first_start IS NOT NULL AS has_start,
            last_return IS NOT NULL AS has_return,
            -- Where each start is a return itself, there is a return at or after it.
            first_start IS NOT NULL AND (p_start_returns OR coalesce(last_return >= first_start,
                false)) AS has_return_after
        FROM pg_temp.spectrum_retention_periods
    ),
    users AS (
        SELECT sign, user_key, scope, min(number) FILTER (WHERE has_start) AS first_number,
            max(number) FILTER (WHERE has_return) AS last_number
        FROM periods
        GROUP BY sign, user_key, scope
    ),
    cohorts AS MATERIALIZED (
        SELECT periods.sign, periods.user_key, periods.scope, periods.number,
            periods.has_return_after, users.last_number
        FROM periods
        JOIN users USING (sign, user_key, scope)
        WHERE periods.has_start AND (p_is_recurring OR periods.number = users.first_number)
    ),
    contributions AS (
        SELECT sign, scope, number AS cohort, -1 AS k FROM cohorts
        UNION ALL
        SELECT sign, scope, number, 0 FROM cohorts
        WHERE has_return_after AND (p_is_on OR last_number <= number)
        UNION ALL
        SELECT cohorts.sign, cohorts.scope, cohorts.number, later.number - cohorts.number
        FROM cohorts
        JOIN periods AS later USING (sign, user_key, scope)
        WHERE p_is_on AND later.has_return
            AND later.number > cohorts.number AND later.number <= cohorts.number + p_periods
        UNION ALL
        SELECT cohorts.sign, cohorts.scope, cohorts.number, k
        FROM cohorts
        CROSS JOIN generate_series(0, least(cohorts.last_number - cohorts.number, p_periods)) AS k
        WHERE NOT p_is_on AND cohorts.last_number > cohorts.number
    ),
    moves AS (
        SELECT scopes.account_id, cells.cohort, cells.k, sum(cells.users)::bigint AS users
        FROM (
            SELECT scope, cohort, k, sum(sign) AS users FROM contributions
            GROUP BY scope, cohort, k HAVING sum(sign) <> 0
        ) AS cells
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cells.cohort, cells.k
    )
    INSERT INTO analytics.mv_retention_cohorts AS sums (
        report_id, account_id, cohort, cohort_size, users, period_ends
    )
    SELECT p_report, filled.account_id, v_starts[filled.cohort],
        sum(filled.users) FILTER (WHERE filled.k = -1),
        array_agg(filled.users ORDER BY filled.k) FILTER (WHERE filled.k >= 0),
        r_shown.ends_at[filled.cohort - r_shown.first_number + 1
            : filled.cohort - r_shown.first_number + p_periods + 1]
    FROM (
        SELECT moves.account_id, moves.cohort, k.number AS k,
            coalesce(sum(moves.users) FILTER (WHERE moves.k = k.number), 0)::bigint AS users
        FROM moves
        CROSS JOIN generate_series(-1, p_periods) AS k (number)
        GROUP BY moves.account_id, moves.cohort, k.number
    ) AS filled
    GROUP BY filled.account_id, filled.cohort
    ON CONFLICT (report_id, account_id, cohort) DO UPDATE SET
        cohort_size = sums.cohort_size + excluded.cohort_size,
        users = spectrum._add_arrays(sums.users, excluded.users);

    DELETE FROM analytics.mv_retention_cohorts WHERE report_id = p_report AND cohort_size = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_retention_cohorts(
    integer, text, integer, boolean, boolean, boolean
) IS
    'Moves mv_retention_cohorts by the periods laid out, as they were and as they are. The rule is '
    'that of analytics._retention_cohorts.';

CREATE FUNCTION analytics._maintain_retention(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_retention record;
    v_start_key integer;
    v_return_key integer;
BEGIN
    SELECT definition.*, report.state = 'building' AND p_built_to = 9223372036854775807 AS is_build
    INTO r_retention
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.retentions, report.definition)
        AS definition
    WHERE report.report_id = p_report;
    v_start_key := analytics._event_key(r_retention.start_event);
    v_return_key := analytics._event_key(r_retention.return_event);
    PERFORM spectrum._empty_temporary('spectrum_retention_periods',
        'sign integer, user_key bigint, scope bigint, period date, first_start timestamptz, '
        'last_return timestamptz');

    IF v_start_key IS NULL AND v_return_key IS NULL AND r_retention.properties_filter IS NULL THEN
        PERFORM analytics._retention_by_user_days(
            (SELECT max(report_id) FROM spectrum.reports
            WHERE kind = 'activity' AND state <> 'discarded'),
            p_built_to, r_retention.period_kind, r_retention.is_build
        );
    ELSE
        PERFORM analytics._move_retention_days(
            p_report, p_built_to, v_start_key, v_return_key, r_retention.properties_filter
        );
        PERFORM analytics._retention_by_events(p_report, r_retention.period_kind);
    END IF;
    PERFORM analytics._move_retention_cohorts(
        p_report, r_retention.period_kind, r_retention.periods,
        r_retention.cohort_kind = 'recurring', r_retention.mode = 'on',
        v_return_key IS NULL OR coalesce(v_return_key = v_start_key, false)
    );
END
$$;
COMMENT ON FUNCTION analytics._maintain_retention(integer, bigint) IS
    'Moves mv_retention_cohorts by the news: of each user concerned, the cohorts and periods that '
    'he was counted in are taken out, those that he is in now are put in.';
-- Room 60, standing retentions: the user's own definitions, and the view that shows them. Read by
-- dashboards. The numbers are those of analytics.retention: the same cohorts, counted the same way.

CREATE FUNCTION spectrum._create_retention()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.retentions') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.retentions (
        retention text NOT NULL CONSTRAINT retentions_pkey PRIMARY KEY,
        start_event text,
        return_event text,
        period_kind text NOT NULL
            CONSTRAINT retentions_period_kind_is_known
            CHECK (period_kind IN ('day', 'week', 'month')),
        periods integer NOT NULL
            CONSTRAINT retentions_periods_range CHECK (periods BETWEEN 0 AND 1000),
        cohort_kind text NOT NULL
            CONSTRAINT retentions_cohort_kind_is_known
            CHECK (cohort_kind IN ('first', 'recurring')),
        mode text NOT NULL
            CONSTRAINT retentions_mode_is_known CHECK (mode IN ('on', 'on_or_after')),
        properties_filter jsonb,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.retentions IS
        'The retentions that analytics.retention_cohorts shows. Define one with '
        'spectrum.define_retention().';
    COMMENT ON COLUMN spectrum.retentions.retention IS 'Name.';
    COMMENT ON COLUMN spectrum.retentions.start_event IS
        'Event that puts a user in a cohort; NULL any.';
    COMMENT ON COLUMN spectrum.retentions.return_event IS
        'Event that counts as coming back; NULL any.';
    COMMENT ON COLUMN spectrum.retentions.period_kind IS 'day, week or month.';
    COMMENT ON COLUMN spectrum.retentions.periods IS 'Last period; the cohort''s own is 0.';
    COMMENT ON COLUMN spectrum.retentions.cohort_kind IS
        'first: by the user''s first start ever; recurring: by each period with a start.';
    COMMENT ON COLUMN spectrum.retentions.mode IS
        'on: back in the period; on_or_after: back in it or later.';
    COMMENT ON COLUMN spectrum.retentions.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN spectrum.retentions.changed_at IS 'When it was last defined.';
    INSERT INTO spectrum.retentions (retention, period_kind, periods, cohort_kind, mode)
    VALUES ('default', 'week', 12, 'first', 'on');

    CREATE TABLE spectrum.rollup_retention_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        first_start timestamptz,
        last_return timestamptz,
        CONSTRAINT rollup_retention_days_pkey PRIMARY KEY (report_id, user_key, scope, day)
    );
    COMMENT ON TABLE spectrum.rollup_retention_days IS
        'What each user did in a day for a retention of certain events. Those of any events are '
        'kept by rollup_user_days.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.report_id IS
        'spectrum.reports, kind retention.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.first_start IS
        'First start event of the day; NULL none.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.last_return IS
        'Last return event of the day; NULL none.';

    CREATE TABLE analytics.mv_retention_cohorts (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cohort date NOT NULL,
        cohort_size bigint NOT NULL,
        users bigint[] NOT NULL,
        period_ends timestamptz[] NOT NULL,
        CONSTRAINT mv_retention_cohorts_pkey PRIMARY KEY (report_id, account_id, cohort)
    ) WITH (fillfactor = 70);
    COMMENT ON TABLE analytics.mv_retention_cohorts IS
        'Cohorts of each defined retention, for all accounts together (account_id *) and for each '
        'account, kept by refreshes. Read it through analytics.retention_cohorts.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.report_id IS
        'spectrum.reports, kind retention.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.cohort IS
        'First day of the period in which the users started.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.cohort_size IS 'Users of the cohort.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.users IS
        'Element k + 1: those who count as back k periods later.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.period_ends IS
        'Element k + 1: when the period k periods later ends.';

    CREATE VIEW analytics.retention_cohorts AS
    SELECT
        sums.account_id,
        report.name AS retention,
        report.definition ->> 'period_kind' AS period_kind,
        sums.cohort,
        back.number::integer - 1 AS period,
        sums.cohort_size,
        back.users,
        back.users / sums.cohort_size::double precision AS rate,
        report.definition ->> 'mode' = 'on' AND back.ends_at <= now() AS is_complete,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_retention_cohorts AS sums USING (report_id)
    CROSS JOIN LATERAL unnest(sums.users, sums.period_ends) WITH ORDINALITY
        AS back (users, ends_at, number)
    -- A period that has not begun is no row.
    WHERE report.kind = 'retention' AND report.state = 'served'
        AND (back.number = 1 OR sums.period_ends[back.number - 1] <= now());
    COMMENT ON VIEW analytics.retention_cohorts IS
        'How many users of each cohort come back, by period (account_id *: all accounts).';
    COMMENT ON COLUMN analytics.retention_cohorts.cohort IS
        'First day of the period in which the users started.';
    COMMENT ON COLUMN analytics.retention_cohorts.period IS
        'Periods since then; 0 is the cohort''s own. One that has not begun is no row.';
    COMMENT ON COLUMN analytics.retention_cohorts.users IS 'Users back in the period.';
    COMMENT ON COLUMN analytics.retention_cohorts.rate IS 'users / cohort_size.';
    COMMENT ON COLUMN analytics.retention_cohorts.is_complete IS
        'Whether the period has ended; never in mode on_or_after.';
    PERFORM spectrum._add_kind('retention', 40, '_maintain_retention',
        '{spectrum.rollup_retention_days, analytics.mv_retention_cohorts}', '{retention_cohorts}');
    PERFORM spectrum._begin_report('retention', 'default', to_jsonb(definition))
    FROM spectrum.retentions AS definition;
END
$$;
COMMENT ON FUNCTION spectrum._create_retention() IS
    'Room 60: makes spectrum.retentions with the retention default, mv_retention_cohorts and its '
    'plain view.';

CREATE FUNCTION analytics._standing_retention_cohorts()
RETURNS TABLE (
    account_id text,
    retention text,
    period_kind text,
    cohort date,
    period integer,
    cohort_size bigint,
    users bigint,
    rate double precision,
    is_complete boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.account_id, d.retention, d.period_kind, r.cohort, r.period, r.cohort_size, r.users,
        r.rate, r.is_complete
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.retentions, report.definition) AS d
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._retention_report(
        d.start_event, d.return_event, d.period_kind, d.periods, NULL, NULL, d.cohort_kind,
        d.mode, NULL, d.properties_filter, scopes.by_account
    ) AS r
    WHERE report.kind = 'retention' AND report.state = 'served';
END
$$;
COMMENT ON FUNCTION analytics._standing_retention_cohorts() IS
    'What analytics.retention_cohorts has to show, out of all events: for verify().';

CREATE FUNCTION spectrum.define_retention(
    p_name text,
    p_start_event text DEFAULT NULL,
    p_return_event text DEFAULT NULL,
    p_period text DEFAULT 'week',
    p_periods integer DEFAULT 12,
    p_cohort text DEFAULT 'first',
    p_mode text DEFAULT 'on',
    p_where jsonb DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_retention(p_period, p_periods, p_cohort, p_mode, p_where);
    DELETE FROM spectrum.retentions WHERE retention = p_name;
    INSERT INTO spectrum.retentions (
        retention, start_event, return_event, period_kind, periods, cohort_kind, mode,
        properties_filter
    )
    VALUES (
        p_name, p_start_event, p_return_event, p_period, p_periods, p_cohort, p_mode, p_where
    );
    PERFORM spectrum._begin_report('retention', p_name, to_jsonb(definition))
    FROM spectrum.retentions AS definition WHERE retention = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_retention(
    text, text, text, text, integer, text, text, jsonb
) IS
    'Defines a standing retention or replaces it; the options are those of analytics.retention. '
    'The next refresh shows it in analytics.retention_cohorts.';

CREATE FUNCTION spectrum.drop_retention(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.retentions WHERE retention = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.retentions');
    END IF;
    PERFORM spectrum._discard_reports('retention', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_retention(text) IS
    'Removes a standing retention; the next refresh removes its rows.';
-- Room 60, active users: exact distinct users of each day, of the 7 and of the 30 days that end
-- with it. Reads analytics.events; read by analytics.active_users and by verify().
--
-- Gaps and islands instead of a self join: an active day of a user makes him a weekly user on that
-- day and the six after it, but only up to his next active day, which takes over. So each user-day
-- carries the gap to the next one, users are counted by (day, gap), and each count is a running
-- sum over these few cells: + at the day, - where its share ends.


CREATE FUNCTION analytics._active_days(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, user_key bigint, day date, gap integer)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('day', p_from, p_to);
    v_days date[] := analytics._period_dates(v_starts);
    v_is_by_day boolean := p_account IS NULL AND NOT p_by_account AND analytics._has_user_days();
BEGIN
    RETURN QUERY
    WITH event_days AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS scope_key,
            e.user_key,
            width_bucket(e.occurred_at, v_starts) AS number
        FROM analytics.events AS e
        WHERE e.user_key <> 0
            AND e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
            AND NOT v_is_by_day
        UNION ALL
        SELECT '*', 0, d.user_key, width_bucket(d.occurred_at, v_starts)
        FROM analytics.user_days AS d
        WHERE v_is_by_day AND d.occurred_at >= p_from AND d.occurred_at < p_to
    ),
    successions AS (
        SELECT
            d.scope,
            d.user_key,
            d.number,
            lead(d.number) OVER (PARTITION BY d.scope_key, d.user_key ORDER BY d.number)
                AS next_number
        FROM event_days AS d
    )
    -- The last event of each day stands for the day: its successor lies on another one.
    SELECT
        s.scope,
        s.user_key,
        v_days[s.number],
        least(30, v_days[s.next_number] - v_days[s.number])
    FROM successions AS s
    WHERE s.next_number IS DISTINCT FROM s.number;
END
$$;
COMMENT ON FUNCTION analytics._active_days(timestamptz, timestamptz, text, boolean) IS
    'What each user contributes: his active days among the events of [p_from, p_to), each with the '
    'days until his next one, at most 30. For one account, for all together (*), or, with '
    'p_by_account, for each account by itself.';

CREATE FUNCTION analytics._count_active_users(
    p_first_day date,
    p_last_day date,
    p_read_from timestamptz,
    p_read_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, day date, dau bigint, wau bigint, mau bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    WITH cells AS MATERIALIZED (
        SELECT a.account_id, a.day, a.gap, count(*) AS users
        FROM analytics._active_days(p_read_from, p_read_to, p_account, p_by_account) AS a
        GROUP BY a.account_id, a.day, a.gap
    ),
    scopes AS (
        SELECT c.account_id, min(c.day) AS read_day FROM cells AS c GROUP BY c.account_id
        UNION ALL
        -- A single scope has the days that were asked for even where nobody came.
        SELECT coalesce(p_account, '*'), p_first_day
        WHERE NOT p_by_account AND NOT EXISTS (SELECT FROM cells)
    ),
    scope_days AS (
        SELECT s.account_id, s.read_day + n.number AS day
        FROM scopes AS s
        CROSS JOIN LATERAL generate_series(0, p_last_day - s.read_day) AS n (number)
        UNION
        SELECT s.account_id, p_first_day + n.number
        FROM scopes AS s
        CROSS JOIN LATERAL generate_series(0, p_last_day - p_first_day) AS n (number)
    ),
    changes AS (
        SELECT
            c.account_id,
            d.day,
            sum(d.dau)::bigint AS dau,
            sum(d.wau)::bigint AS wau,
            sum(d.mau)::bigint AS mau
        FROM cells AS c
        CROSS JOIN LATERAL (
            VALUES
                (c.day, c.users, c.users, c.users),
                (c.day + least(c.gap, 7), 0, -c.users, 0),
                (c.day + c.gap, 0, 0, -c.users)
        ) AS d (day, dau, wau, mau)
        GROUP BY c.account_id, d.day
    ),
    counts AS (
        SELECT
            d.account_id,
            d.day,
            coalesce(c.dau, 0) AS dau,
            coalesce(sum(c.wau) OVER until_day, 0)::bigint AS wau,
            coalesce(sum(c.mau) OVER until_day, 0)::bigint AS mau
        FROM scope_days AS d
        LEFT JOIN changes AS c ON c.account_id = d.account_id AND c.day = d.day
        WINDOW until_day AS (PARTITION BY d.account_id ORDER BY d.day)
    )
    SELECT c.account_id, c.day, c.dau, c.wau, c.mau
    FROM counts AS c
    WHERE c.day >= p_first_day OR p_first_day IS NULL;
END
$$;
COMMENT ON FUNCTION analytics._count_active_users(
    date, date, timestamptz, timestamptz, text, boolean
) IS
    'The counts of each day from p_first_day (NULL: the first active day of each scope) to '
    'p_last_day, out of the events of [p_read_from, p_read_to).';

CREATE FUNCTION analytics._active_users(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    day date,
    dau bigint,
    wau bigint,
    mau bigint,
    stickiness double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_first_day date := spectrum.period_date(spectrum.period_start('day', p_from));
    v_from timestamptz;
    v_to timestamptz;
    v_read_from timestamptz;
    v_last_day timestamptz[];
BEGIN
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    -- 30 days end with the first day asked for; 31, since days differ in length.
    v_read_from := spectrum.period_start('day', v_from)
        - CASE WHEN p_from IS NULL THEN interval '0' ELSE interval '31 days' END;
    IF v_to IS NULL OR v_read_from IS NULL OR v_to <= coalesce(p_from, v_read_from) THEN
        RETURN;
    END IF;
    v_last_day := spectrum.period_starts('day', v_to - interval '1 us', v_to);

    RETURN QUERY
    SELECT c.account_id, c.day, c.dau, c.wau, c.mau, c.dau / nullif(c.mau, 0)::double precision
    FROM analytics._count_active_users(
        v_first_day, spectrum.period_date(v_last_day[1]), v_read_from, v_last_day[2],
        p_account, p_by_account
    ) AS c;
END
$$;
COMMENT ON FUNCTION analytics._active_users(timestamptz, timestamptz, text, boolean) IS
    'Active users of each scope and day: settles the range, counts, divides.';

CREATE FUNCTION analytics._standing_active_users()
RETURNS TABLE (
    account_id text,
    day date,
    dau bigint,
    wau bigint,
    mau bigint,
    stickiness double precision
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT * FROM analytics._active_users(NULL, NULL, NULL, false);
    RETURN QUERY SELECT * FROM analytics._active_users(NULL, NULL, NULL, true);
END
$$;
COMMENT ON FUNCTION analytics._standing_active_users() IS
    'What analytics.active_users has to show, out of all events: for verify().';

CREATE FUNCTION analytics.active_users(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (day date, dau bigint, wau bigint, mau bigint, stickiness double precision)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT a.day, a.dau, a.wau, a.mau, a.stickiness
    FROM analytics._active_users(p_from, p_to, p_account, false) AS a
    ORDER BY a.day;
END
$$;
COMMENT ON FUNCTION analytics.active_users(timestamptz, timestamptz, text) IS
    'Exact daily, weekly (7 days) and monthly (30 days) active users: one row a calendar day that '
    '[p_from, p_to) touches, zero days included; each day counts whole and the windows look back '
    'before p_from. NULL p_from: from the first active day; NULL p_to: to the last day with an '
    'event. p_account NULL: all accounts.';
-- Room 60, standing activity: the user-days that reports are kept by, and the sums of active users.
-- A refresh adds the user-days that its news bring and takes out those that lost their last event;
-- each changes the sums of at most 30 days to both sides, whatever the length of the history.

CREATE FUNCTION spectrum._create_active_users()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_active_users') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_user_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        CONSTRAINT rollup_user_days_pkey PRIMARY KEY (report_id, user_key, scope, day)
    );
    COMMENT ON TABLE spectrum.rollup_user_days IS
        'The days on which each user was active.';
    COMMENT ON COLUMN spectrum.rollup_user_days.report_id IS 'spectrum.reports, kind activity.';
    COMMENT ON COLUMN spectrum.rollup_user_days.user_key IS 'dim_users; never the unknown user.';
    COMMENT ON COLUMN spectrum.rollup_user_days.scope IS
        'For which accounts it counts. a > 0: for account a and for all together; 0: for all '
        'together; -a: for account a only, beside 0.';
    COMMENT ON COLUMN spectrum.rollup_user_days.day IS 'Calendar day in config.timezone.';

    CREATE TABLE analytics.mv_active_users (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        dau bigint NOT NULL,
        wau bigint NOT NULL,
        mau bigint NOT NULL,
        CONSTRAINT mv_active_users_pkey PRIMARY KEY (report_id, account_id, day)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_active_users IS
        'Active users per account and day, and for all accounts together (account_id *), kept by '
        'refreshes; days on which somebody counts, up to 29 after the last event. Read it through '
        'analytics.active_users.';
    COMMENT ON COLUMN analytics.mv_active_users.report_id IS 'spectrum.reports, kind activity.';
    COMMENT ON COLUMN analytics.mv_active_users.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_active_users.dau IS 'Distinct users of the day.';
    COMMENT ON COLUMN analytics.mv_active_users.wau IS
        'Distinct users of the 7 days that end with it.';
    COMMENT ON COLUMN analytics.mv_active_users.mau IS
        'Distinct users of the 30 days that end with it.';

    CREATE VIEW analytics.active_users AS
    SELECT
        scope.account_id,
        scope.first_day + calendar.number AS day,
        coalesce(sums.dau, 0) AS dau,
        coalesce(sums.wau, 0) AS wau,
        coalesce(sums.mau, 0) AS mau,
        sums.dau / nullif(sums.mau, 0)::double precision AS stickiness,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT known.report_id, known.account_id, min(known.day) AS first_day
        FROM analytics.mv_active_users AS known
        WHERE known.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'activity' AND report.state = 'served'
        )
        GROUP BY known.report_id, known.account_id
    ) AS scope
    CROSS JOIN LATERAL generate_series(0, (
        SELECT max(events.day) FROM analytics.mv_daily_events AS events
        WHERE events.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'volume' AND report.state = 'served'
        ) AND events.account_id = '*'
    ) - scope.first_day) AS calendar (number)
    LEFT JOIN analytics.mv_active_users AS sums
        ON sums.report_id = scope.report_id AND sums.account_id = scope.account_id
            AND sums.day = scope.first_day + calendar.number;
    COMMENT ON VIEW analytics.active_users IS
        'Daily, weekly and monthly active users per account and day (account_id *: all accounts), '
        'from the first active day of each to the last day with an event anywhere.';
    COMMENT ON COLUMN analytics.active_users.stickiness IS 'dau / mau; NULL where mau is 0.';
    PERFORM spectrum._create_user_days();
    PERFORM spectrum._add_kind('activity', 20, '_maintain_active_users',
        '{spectrum.rollup_user_days, analytics.mv_active_users}', '{active_users}');
    PERFORM spectrum._begin_report('activity');
END
$$;
COMMENT ON FUNCTION spectrum._create_active_users() IS
    'Room 60: makes rollup_user_days, mv_active_users and its plain view.';

CREATE FUNCTION spectrum._create_user_days()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.user_days WITH (security_barrier) AS
    SELECT
        kept.user_key,
        (kept.day + time '12:00') AT TIME ZONE (SELECT config.timezone FROM spectrum.config)
            AS occurred_at
    FROM spectrum.rollup_user_days AS kept
    WHERE kept.scope >= 0 AND kept.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'activity' AND report.state = 'served'
    )
    UNION ALL
    SELECT came.user_key, came.occurred_at
    FROM spectrum.news
    CROSS JOIN LATERAL unnest(news.user_keys, news.occurred_ats) AS came (user_key, occurred_at)
    WHERE came.user_key <> 0;
    COMMENT ON VIEW analytics.user_days IS
        'When each user was active, to the day: the days that are kept, at noon, and the events '
        'that no refresh has counted yet. A tenth of the events and less, for questions that ask '
        'on which days, not how often. Exact where user_days_state says so.';
    COMMENT ON COLUMN analytics.user_days.user_key IS 'As in analytics.events.';
    COMMENT ON COLUMN analytics.user_days.occurred_at IS 'An instant of that calendar day.';

    CREATE VIEW analytics.user_days_state WITH (security_barrier) AS
    SELECT NOT EXISTS (SELECT FROM spectrum.withdrawals) AND EXISTS (
        SELECT FROM spectrum.reports AS report
        WHERE report.kind = 'activity' AND report.state = 'served' AND report.follows_news
    ) AS is_exact;
    COMMENT ON VIEW analytics.user_days_state IS
        'Whether analytics.user_days says just what analytics.events says, one row: not while '
        'facts that were taken back are still counted, nor after a change of the calendar until '
        'the days are cut anew.';
    COMMENT ON COLUMN analytics.user_days_state.is_exact IS 'Whether it does.';
END
$$;
COMMENT ON FUNCTION spectrum._create_user_days() IS
    'Room 60: makes analytics.user_days and analytics.user_days_state.';

CREATE FUNCTION analytics._has_user_days()
RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce(current_setting('spectrum.from_facts', true), '') <> 'on'
        AND (SELECT state.is_exact FROM analytics.user_days_state AS state);
END
$$;
COMMENT ON FUNCTION analytics._has_user_days() IS
    'Whether a question about all accounts may be asked of analytics.user_days. SET '
    'spectrum.from_facts = on has all questions asked of the events themselves, as verify() does.';

CREATE FUNCTION analytics._news_days(OUT starts timestamptz[], OUT days date[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT spectrum.period_starts(
        'day', min(news.occurred_at), max(news.occurred_at) + interval '1 us'
    ) INTO starts
    FROM pg_temp.spectrum_news AS news;
    days := analytics._period_dates(starts);
END
$$;
COMMENT ON FUNCTION analytics._news_days() IS
    'The calendar days of the news: starts, for width_bucket, and dates.';

CREATE FUNCTION analytics._move_user_days(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_day_changes',
        'user_key bigint, scope bigint, day date, is_added boolean');
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;

    WITH came AS (
        SELECT DISTINCT news.user_key, news.scope,
            width_bucket(news.occurred_at, v_starts) AS number
        FROM pg_temp.spectrum_news AS news
        WHERE news.sign > 0 AND NOT news.is_leaving
            AND news.user_key <> 0 AND news.user_key <= p_built_to
    ), added AS (
        INSERT INTO spectrum.rollup_user_days (report_id, user_key, scope, day)
        SELECT p_report, came.user_key, came.scope, v_days[came.number]
        FROM came
        LEFT JOIN LATERAL (
            SELECT true AS is_known FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_report AND known.user_key = came.user_key
                AND known.scope = came.scope AND known.day = v_days[came.number]
            OFFSET 0
        ) AS before ON true
        WHERE before.is_known IS NULL
        RETURNING user_key, scope, day
    )
    INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
    SELECT user_key, scope, day, true FROM added;

    WITH went AS (
        SELECT news.user_key, news.scope, width_bucket(news.occurred_at, v_starts) AS number,
            bool_or(news.is_leaving) AS is_leaving
        FROM pg_temp.spectrum_news AS news
        WHERE news.sign <= 0 AND news.user_key <> 0 AND news.user_key <= p_built_to
        GROUP BY 1, 2, 3
    ), removed AS (
        DELETE FROM spectrum.rollup_user_days AS known
        USING went
        WHERE known.report_id = p_report AND known.user_key = went.user_key
            AND known.scope = went.scope AND known.day = v_days[went.number]
            AND (went.is_leaving OR NOT EXISTS (
                SELECT FROM warehouse.fact_events AS fact
                WHERE fact.user_key = went.user_key
                    AND fact.occurred_at >= v_starts[went.number]
                    AND fact.occurred_at < v_starts[went.number + 1]
                    AND (went.scope >= 0 OR fact.account_key = -went.scope)
            ))
        RETURNING known.user_key, known.scope, known.day
    )
    INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
    SELECT user_key, scope, day, false FROM removed;
END
$$;
COMMENT ON FUNCTION analytics._move_user_days(integer, bigint) IS
    'Brings rollup_user_days up to the news and leaves in pg_temp.spectrum_day_changes which user-'
    'days came and which went.';

CREATE FUNCTION analytics._maintain_active_users(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM analytics._move_user_days(p_report, p_built_to);

    WITH hulls AS (
        SELECT changes.user_key, changes.scope,
            min(changes.day) - 30 AS from_day, max(changes.day) + 30 AS until_day
        FROM pg_temp.spectrum_day_changes AS changes
        GROUP BY changes.user_key, changes.scope
    ),
    days AS (
        SELECT hulls.user_key, hulls.scope, known.day, changes.day IS NULL AS has_been,
            true AS is_now
        FROM hulls
        CROSS JOIN LATERAL (
            SELECT near.day FROM spectrum.rollup_user_days AS near
            WHERE near.report_id = p_report AND near.user_key = hulls.user_key
                AND near.scope = hulls.scope AND near.day BETWEEN hulls.from_day AND hulls.until_day
            OFFSET 0
        ) AS known
        LEFT JOIN pg_temp.spectrum_day_changes AS changes
            ON changes.user_key = hulls.user_key AND changes.scope = hulls.scope
                AND changes.day = known.day AND changes.is_added
        UNION ALL
        SELECT user_key, scope, day, true, false FROM pg_temp.spectrum_day_changes
        WHERE NOT is_added
    ),
    -- What each active day contributed and what it contributes, cf. analytics._active_days.
    spans AS (
        SELECT scope, day, -1 AS sign,
            lead(day) OVER (PARTITION BY user_key, scope ORDER BY day) AS next_day
        FROM days WHERE has_been
        UNION ALL
        SELECT scope, day, 1, lead(day) OVER (PARTITION BY user_key, scope ORDER BY day)
        FROM days WHERE is_now
    ),
    changed_spans AS (
        SELECT scope, day, next_day, sum(sign) AS users
        FROM spans GROUP BY scope, day, next_day HAVING sum(sign) <> 0
    ),
    steps AS (
        SELECT scopes.account_id, step.day, sum(step.dau) AS dau, sum(step.wau) AS wau,
            sum(step.mau) AS mau
        FROM changed_spans AS span
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        CROSS JOIN LATERAL (
            VALUES
                (span.day, span.users, span.users, span.users),
                (least(span.day + 7, span.next_day), 0, -span.users, 0),
                (least(span.day + 30, span.next_day), 0, 0, -span.users)
        ) AS step (day, dau, wau, mau)
        GROUP BY scopes.account_id, step.day
    ),
    running AS (
        SELECT account_id, day, dau,
            sum(wau) OVER until_day AS wau,
            sum(mau) OVER until_day AS mau,
            lead(day, 1, day + 1) OVER until_day - day AS length
        FROM steps
        WINDOW until_day AS (PARTITION BY account_id ORDER BY day)
    )
    INSERT INTO analytics.mv_active_users AS sums (report_id, account_id, day, dau, wau, mau)
    SELECT p_report, running.account_id, running.day + number,
        CASE WHEN number = 0 THEN running.dau ELSE 0 END, running.wau, running.mau
    FROM running
    CROSS JOIN LATERAL generate_series(0, running.length - 1) AS number
    WHERE running.wau <> 0 OR running.mau <> 0 OR (running.dau <> 0 AND number = 0)
    ON CONFLICT (report_id, account_id, day) DO UPDATE SET
        dau = sums.dau + excluded.dau,
        wau = sums.wau + excluded.wau,
        mau = sums.mau + excluded.mau;

    IF EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added) THEN
        DELETE FROM analytics.mv_active_users AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id AND sums.mau = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_active_users(integer, bigint) IS
    'Moves mv_active_users by the user-days that came and went: before and after, each active day '
    'counts until the next one, for at most 7 and 30 days.';
-- Room 60, lifecycle: of the users of each period, who is new, who returns, who comes back after a
-- pause, and who stays away. Reads analytics.events. Also here: in which periods a user was active,
-- which stickiness and feature adoption count too.
--
-- An active period of a user tells on itself and on the next one, and how depends only on when he
-- was active before: analytics._lifecycle_rule. So users are counted by (period, time since their
-- last active one), and the rule is applied to these few cells.

CREATE FUNCTION analytics._active_periods(
    p_event text,
    p_starts timestamptz[],
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, user_key bigint, numbers integer[], first_at timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_event_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = p_event
    );
    v_is_by_day boolean := num_nonnulls(p_event, p_account) = 0 AND NOT p_by_account
        AND analytics._has_user_days();
BEGIN
    IF p_event IS NOT NULL AND v_event_key IS NULL THEN
        RETURN;
    END IF;

    -- Sorting events by user, and each user's few numbers by themselves, beats sorting by both.
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN min(e.account_id) ELSE coalesce(p_account, '*') END,
        e.user_key,
        array_agg(DISTINCT e.number ORDER BY e.number),
        min(e.occurred_at)
    FROM (
        SELECT
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS scope_key,
            e.account_id,
            e.user_key,
            e.occurred_at,
            width_bucket(e.occurred_at, p_starts) AS number
        FROM analytics.events AS e
        WHERE e.user_key <> 0
            AND e.occurred_at >= p_starts[1]
            AND e.occurred_at < p_starts[cardinality(p_starts)]
            AND (v_event_key IS NULL OR e.event_type_key = v_event_key)
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
            AND NOT v_is_by_day
        UNION ALL
        SELECT 0, '*', d.user_key, d.occurred_at, width_bucket(d.occurred_at, p_starts)
        FROM analytics.user_days AS d
        WHERE v_is_by_day
            AND d.occurred_at >= p_starts[1]
            AND d.occurred_at < p_starts[cardinality(p_starts)]
    ) AS e
    GROUP BY e.user_key, e.scope_key;
END
$$;
COMMENT ON FUNCTION analytics._active_periods(text, timestamptz[], text, boolean) IS
    'Each user''s periods (numbered by p_starts, ascending) with p_event (NULL: any event), and '
    'the first time of it. For one account, for all together (*), or, with p_by_account, for each '
    'account by itself.';

CREATE FUNCTION analytics._lifecycle_rule()
RETURNS TABLE (
    since integer,
    shift integer,
    new integer,
    "returning" integer,
    resurrecting integer,
    dormant integer
)
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    VALUES
        (0, 0, 1, 0, 0, 0),
        (0, 1, 0, 0, 0, -1),
        -- Dormant was noted by the period before, until this one says otherwise.
        (1, 0, 0, 1, 0, 1),
        (1, 1, 0, 0, 0, -1),
        (2, 0, 0, 0, 1, 0),
        (2, 1, 0, 0, 0, -1)
$$;
COMMENT ON FUNCTION analytics._lifecycle_rule() IS
    'What an active period of a user adds to itself (shift 0) and to the next period (shift 1), by '
    'the periods since his last active one: 0 there was none, 1 the period before, 2 longer ago.';

CREATE FUNCTION analytics._lifecycle(
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    p_event text,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    period date,
    new bigint,
    "returning" bigint,
    resurrecting bigint,
    dormant bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    v_starts timestamptz[];
    v_first_number integer;
    v_dates date[];
BEGIN
    SELECT h.starts, h.first_number INTO v_starts, v_first_number
    FROM analytics._history_periods(p_period, p_from, p_to) AS h;
    v_dates := analytics._period_dates(v_starts);

    RETURN QUERY
    WITH cells AS MATERIALIZED (
        SELECT
            u.account_id,
            a.number,
            least(2, coalesce(a.number - a.previous, 0)) AS since,
            count(*) AS users
        FROM analytics._active_periods(p_event, v_starts, p_account, p_by_account) AS u
        CROSS JOIN LATERAL unnest(u.numbers, array_prepend(NULL, u.numbers))
            AS a (number, previous)
        WHERE a.number IS NOT NULL
        GROUP BY u.account_id, a.number, since
    ),
    scopes AS (
        SELECT c.account_id, coalesce(v_first_number, min(c.number)) AS first_number
        FROM cells AS c
        GROUP BY c.account_id
        UNION
        -- A single scope has the periods that were asked for even where nobody came.
        SELECT coalesce(p_account, '*'), v_first_number
        WHERE NOT p_by_account
    ),
    amounts AS (
        SELECT
            c.account_id,
            c.number + r.shift AS number,
            c.users * r.new AS new,
            c.users * r."returning" AS "returning",
            c.users * r.resurrecting AS resurrecting,
            c.users * r.dormant AS dormant
        FROM cells AS c
        JOIN analytics._lifecycle_rule() AS r USING (since)
        UNION ALL
        SELECT s.account_id, n.number, 0, 0, 0, 0
        FROM scopes AS s
        CROSS JOIN generate_series(s.first_number, cardinality(v_starts) - 1) AS n (number)
    )
    SELECT
        a.account_id,
        v_dates[a.number],
        sum(a.new)::bigint,
        sum(a."returning")::bigint,
        sum(a.resurrecting)::bigint,
        sum(a.dormant)::bigint
    FROM amounts AS a
    WHERE a.number >= coalesce(v_first_number, 1) AND a.number < cardinality(v_starts)
    GROUP BY a.account_id, a.number;
END
$$;
COMMENT ON FUNCTION analytics._lifecycle(
    text, timestamptz, timestamptz, text, text, boolean
) IS
    'The lifecycle of each scope: every user''s whole history up to the end of the range, in the '
    'periods of the range; of an open one from the first active period of each scope.';

CREATE FUNCTION analytics.lifecycle(
    p_period text DEFAULT 'day',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_event text DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    new bigint,
    "returning" bigint,
    resurrecting bigint,
    dormant bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT l.period, l.new, l."returning", l.resurrecting, l.dormant
    FROM analytics._lifecycle(p_period, p_from, p_to, p_event, p_account, false) AS l
    ORDER BY l.period;
END
$$;
COMMENT ON FUNCTION analytics.lifecycle(text, timestamptz, timestamptz, text, text) IS
    'Users by what their activity (p_event; NULL: any event) is to them, one row a day, week or '
    'month that [p_from, p_to) touches, each whole: new (active for the first time ever, looking '
    'before p_from too), returning (active in the period before), resurrecting (active again after '
    'a pause), dormant (active in the period before and not in this one: a negative number). NULL '
    'p_from: from the first active period; NULL p_to: to the last period with an event.';
-- Room 60, standing lifecycle: of each day, week and month, who is new, returns, comes back, stays
-- away. Follows the user-days that kind activity keeps (62_active_users_standing.sql). What an
-- active period counts as depends on the active one before alone, so a period that became active
-- or no longer is changes itself and the next active one: both are looked up, no history is read.

CREATE FUNCTION spectrum._create_lifecycle()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_lifecycle') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE analytics.mv_lifecycle (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        period_kind text COLLATE "C" NOT NULL,
        period date NOT NULL,
        new bigint NOT NULL,
        "returning" bigint NOT NULL,
        resurrecting bigint NOT NULL,
        dormant bigint NOT NULL,
        CONSTRAINT mv_lifecycle_pkey PRIMARY KEY (report_id, account_id, period_kind, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_lifecycle IS
        'Users by what a period is to them, per account and for all accounts together (account_id '
        '*), kept by refreshes; periods in which somebody counts, up to the one after the last '
        'event. Read it through analytics.lifecycle_periods.';
    COMMENT ON COLUMN analytics.mv_lifecycle.report_id IS 'spectrum.reports, kind lifecycle.';
    COMMENT ON COLUMN analytics.mv_lifecycle.period_kind IS 'day, week or month.';
    COMMENT ON COLUMN analytics.mv_lifecycle.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.mv_lifecycle.new IS 'Users active for the first time ever.';
    COMMENT ON COLUMN analytics.mv_lifecycle."returning" IS
        'Users active here and in the period before.';
    COMMENT ON COLUMN analytics.mv_lifecycle.resurrecting IS 'Users active again after a pause.';
    COMMENT ON COLUMN analytics.mv_lifecycle.dormant IS
        'Users of the period before who are not active here, as a negative number.';

    -- Each period that is kept, and the empty ones from there to the next.
    CREATE VIEW analytics.lifecycle_periods AS
    SELECT
        sums.account_id,
        sums.period_kind,
        calendar.period::date AS period,
        CASE WHEN calendar.number = 1 THEN sums.new ELSE 0 END AS new,
        CASE WHEN calendar.number = 1 THEN sums."returning" ELSE 0 END AS "returning",
        CASE WHEN calendar.number = 1 THEN sums.resurrecting ELSE 0 END AS resurrecting,
        CASE WHEN calendar.number = 1 THEN sums.dormant ELSE 0 END AS dormant,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT kept.*, lead(kept.period) OVER (
                PARTITION BY kept.account_id, kept.period_kind ORDER BY kept.period
            ) AS next_period
        FROM analytics.mv_lifecycle AS kept
        WHERE kept.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'lifecycle' AND report.state = 'served'
        )
    ) AS sums
    CROSS JOIN LATERAL generate_series(
        sums.period::timestamp,
        least(sums.next_period - 1, (
            SELECT max(events.day) FROM analytics.mv_daily_events AS events
            WHERE events.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'volume' AND report.state = 'served'
            ) AND events.account_id = '*'
        ))::timestamp,
        ('1 ' || sums.period_kind)::interval
    ) WITH ORDINALITY AS calendar (period, number);
    COMMENT ON VIEW analytics.lifecycle_periods IS
        'Users by what their activity is to them, by account (account_id *: all accounts), kind of '
        'period and period, from the first active one of each account to the last with an event.';
    COMMENT ON COLUMN analytics.lifecycle_periods.period_kind IS 'day, week or month.';
    COMMENT ON COLUMN analytics.lifecycle_periods.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.lifecycle_periods.new IS 'Users active for the first time ever.';
    COMMENT ON COLUMN analytics.lifecycle_periods."returning" IS
        'Users active here and in the period before.';
    COMMENT ON COLUMN analytics.lifecycle_periods.resurrecting IS
        'Users active again after a pause.';
    COMMENT ON COLUMN analytics.lifecycle_periods.dormant IS
        'Users of the period before who are not active here, as a negative number.';
    PERFORM spectrum._add_kind('lifecycle', 22, '_maintain_lifecycle',
        '{analytics.mv_lifecycle}', '{lifecycle_periods}');
    PERFORM spectrum._begin_report('lifecycle');
END
$$;
COMMENT ON FUNCTION spectrum._create_lifecycle() IS
    'Room 60: makes mv_lifecycle and its plain view.';

CREATE FUNCTION analytics._is_build(p_report integer, p_built_to bigint)
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN p_built_to = 9223372036854775807 AND EXISTS (
        SELECT FROM spectrum.reports WHERE report_id = p_report AND state = 'building'
    );
END
$$;
COMMENT ON FUNCTION analytics._is_build(integer, bigint) IS
    'Whether a report is told of users that it does not hold yet, with all of their history.';

CREATE FUNCTION analytics._kept_by(p_kind text)
RETURNS integer
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT max(report_id) FROM spectrum.reports
        WHERE kind = p_kind AND name = '' AND state <> 'discarded'
    );
END
$$;
COMMENT ON FUNCTION analytics._kept_by(text) IS
    'The report whose rows other reports read in a refresh: the latest of its kind, which follows '
    'the news whether it is served or being built.';

CREATE FUNCTION analytics._follow_user_days(p_report integer, p_built_to bigint)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._kept_by('activity');
BEGIN
    IF analytics._is_build(p_report, p_built_to) THEN
        PERFORM spectrum._empty_temporary('spectrum_day_changes',
            'user_key bigint, scope bigint, day date, is_added boolean');
        INSERT INTO pg_temp.spectrum_day_changes (user_key, scope, day, is_added)
        SELECT units.user_key, units.scope, known.day, true
        FROM (
            SELECT DISTINCT news.user_key, news.scope FROM pg_temp.spectrum_news AS news
        ) AS units
        CROSS JOIN LATERAL (
            SELECT near.day FROM spectrum.rollup_user_days AS near
            WHERE near.report_id = v_activity AND near.user_key = units.user_key
                AND near.scope = units.scope
            OFFSET 0
        ) AS known;
    END IF;
    RETURN v_activity;
END
$$;
COMMENT ON FUNCTION analytics._follow_user_days(integer, bigint) IS
    'Sees to it that pg_temp.spectrum_day_changes says what changed for a report, all days where '
    'it is being built, and returns the report by which rollup_user_days are kept.';

CREATE FUNCTION analytics._changed_periods(
    p_activity integer,
    p_built_to bigint,
    p_starts date[]
)
RETURNS TABLE (
    user_key bigint,
    scope bigint,
    number integer,
    old_days bigint,
    new_days bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    SELECT moved.user_key, moved.scope, moved.number, now.days - moved.days, now.days
    FROM (
        SELECT changes.user_key, changes.scope, width_bucket(changes.day, p_starts) AS number,
            sum(CASE WHEN changes.is_added THEN 1 ELSE -1 END) AS days
        FROM pg_temp.spectrum_day_changes AS changes
        WHERE changes.user_key <= p_built_to
        GROUP BY 1, 2, 3
        HAVING sum(CASE WHEN changes.is_added THEN 1 ELSE -1 END) <> 0
    ) AS moved
    CROSS JOIN LATERAL (
        SELECT count(*) AS days FROM spectrum.rollup_user_days AS known
        WHERE known.report_id = p_activity AND known.user_key = moved.user_key
            AND known.scope = moved.scope AND known.day >= p_starts[moved.number]
            AND known.day < coalesce(p_starts[moved.number + 1], 'infinity')
        OFFSET 0
    ) AS now;
END
$$;
COMMENT ON FUNCTION analytics._changed_periods(integer, bigint, date[]) IS
    'The periods (numbered by p_starts) in which a user has more or less active days than before, '
    'by the changes laid out: how many he had and how many he has.';

CREATE FUNCTION analytics._changed_activity(
    p_activity integer,
    p_built_to bigint,
    p_starts date[],
    p_is_build boolean
)
RETURNS TABLE (
    user_key bigint,
    scope bigint,
    number integer,
    was_active boolean,
    is_active boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH changed AS MATERIALIZED (
        SELECT moved.user_key, moved.scope, moved.number, moved.old_days > 0 AS was_active,
            moved.new_days > 0 AS is_active
        FROM analytics._changed_periods(p_activity, p_built_to, p_starts) AS moved
        WHERE (moved.old_days > 0) <> (moved.new_days > 0)
    )
    SELECT near.user_key, near.scope, near.number, bool_and(near.was_active),
        bool_and(near.is_active)
    FROM (
        SELECT changed.* FROM changed
        UNION ALL
        SELECT changed.user_key, changed.scope, width_bucket(neighbour.day, p_starts), true, true
        FROM changed
        CROSS JOIN LATERAL (
            (SELECT known.day FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_activity AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.day < p_starts[changed.number]
            ORDER BY known.day DESC
            LIMIT 1)
            UNION ALL
            (SELECT known.day FROM spectrum.rollup_user_days AS known
            WHERE known.report_id = p_activity AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.day >= p_starts[changed.number + 1]
            ORDER BY known.day
            LIMIT 1)
        ) AS neighbour
        -- A report that is being built is told of all that there is.
        WHERE NOT p_is_build
    ) AS near
    GROUP BY near.user_key, near.scope, near.number;
END
$$;
COMMENT ON FUNCTION analytics._changed_activity(integer, bigint, date[], boolean) IS
    'The periods that became active or no longer are, and the next active ones on both sides of '
    'each. Of two that follow each other here, one of them changed, none lies between: so what '
    'depends on the active period before can be told from these, as it was and as it is. Of two '
    'unchanged ones others may lie between, but then both versions say the same.';

CREATE FUNCTION analytics._move_lifecycle(
    p_report integer,
    p_built_to bigint,
    p_activity integer,
    p_period text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
    v_last date := (v_starts[cardinality(v_starts)] + ('1 ' || p_period)::interval)::date;
BEGIN
    WITH active AS MATERIALIZED (
        SELECT known.* FROM analytics._changed_activity(
            p_activity, p_built_to, v_starts, analytics._is_build(p_report, p_built_to)
        ) AS known
    ),
    cells AS (
        SELECT version.scope, version.number,
            least(2, coalesce(version.number - version.previous, 0)) AS since,
            sum(version.sign) AS users
        FROM (
            SELECT scope, number, -1 AS sign,
                lag(number) OVER (PARTITION BY user_key, scope ORDER BY number) AS previous
            FROM active WHERE was_active
            UNION ALL
            SELECT scope, number, 1,
                lag(number) OVER (PARTITION BY user_key, scope ORDER BY number)
            FROM active WHERE is_active
        ) AS version
        GROUP BY 1, 2, 3
        HAVING sum(version.sign) <> 0
    )
    INSERT INTO analytics.mv_lifecycle AS sums (
        report_id, account_id, period_kind, period, new, "returning", resurrecting, dormant
    )
    SELECT p_report, scopes.account_id, p_period,
        coalesce(v_starts[cells.number + rule.shift], v_last),
        sum(cells.users * rule.new), sum(cells.users * rule."returning"),
        sum(cells.users * rule.resurrecting), sum(cells.users * rule.dormant)
    FROM cells
    JOIN analytics._lifecycle_rule() AS rule USING (since)
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, cells.number + rule.shift
    ON CONFLICT (report_id, account_id, period_kind, period) DO UPDATE SET
        new = sums.new + excluded.new,
        "returning" = sums."returning" + excluded."returning",
        resurrecting = sums.resurrecting + excluded.resurrecting,
        dormant = sums.dormant + excluded.dormant;
END
$$;
COMMENT ON FUNCTION analytics._move_lifecycle(integer, bigint, integer, text) IS
    'Moves the sums of one kind of period: each active one counts by the active one before it, cf. '
    'analytics._lifecycle_rule.';

CREATE FUNCTION analytics._maintain_lifecycle(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._follow_user_days(p_report, p_built_to);
BEGIN
    PERFORM analytics._move_lifecycle(p_report, p_built_to, v_activity, kind)
    FROM unnest('{day, week, month}'::text[]) AS kind;

    IF EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added) THEN
        DELETE FROM analytics.mv_lifecycle AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.new = 0 AND sums."returning" = 0 AND sums.resurrecting = 0
            AND sums.dormant = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_lifecycle(integer, bigint) IS
    'Moves mv_lifecycle by the user-days that came and went.';

CREATE FUNCTION analytics._standing_lifecycle_periods()
RETURNS TABLE (
    account_id text,
    period_kind text,
    period date,
    new bigint,
    "returning" bigint,
    resurrecting bigint,
    dormant bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT l.account_id, kinds.kind, l.period, l.new, l."returning", l.resurrecting, l.dormant
    FROM unnest('{day, week, month}'::text[]) AS kinds (kind)
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._lifecycle(
        kinds.kind, NULL, NULL, NULL, NULL, scopes.by_account
    ) AS l;
END
$$;
COMMENT ON FUNCTION analytics._standing_lifecycle_periods() IS
    'What analytics.lifecycle_periods has to show, out of all events: for verify().';
-- Room 60, stickiness: in how many periods of a range users were active. Reads analytics.events
-- through analytics._active_periods. A user adds himself to the one row that is his number of
-- distinct active periods.

CREATE FUNCTION analytics._stickiness(
    p_starts timestamptz[],
    p_is_open boolean,
    p_event text,
    p_account text
)
RETURNS TABLE (periods integer, users_exactly bigint, users_at_least bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH cells AS MATERIALIZED (
        SELECT
            cardinality(u.numbers) AS periods,
            count(*) AS users,
            min(u.numbers[1]) AS first_number
        FROM analytics._active_periods(p_event, p_starts, p_account, false) AS u
        GROUP BY cardinality(u.numbers)
    ),
    range_lengths AS (
        SELECT cardinality(p_starts) - CASE WHEN p_is_open THEN min(c.first_number) ELSE 1 END
            AS periods
        FROM cells AS c
    )
    SELECT
        n.number,
        coalesce(c.users, 0),
        coalesce(sum(c.users) OVER (ORDER BY n.number DESC), 0)::bigint
    FROM range_lengths AS r
    CROSS JOIN generate_series(1, r.periods) AS n (number)
    LEFT JOIN cells AS c ON c.periods = n.number;
END
$$;
COMMENT ON FUNCTION analytics._stickiness(timestamptz[], boolean, text, text) IS
    'Users by their number of active periods among those of p_starts; p_is_open: among those from '
    'the first in which anyone was active.';

CREATE FUNCTION analytics.stickiness(
    p_period text DEFAULT 'day',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_event text DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (periods integer, users_exactly bigint, users_at_least bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT h.starts[coalesce(h.first_number, 1) :] INTO v_starts
    FROM analytics._history_periods(p_period, p_from, p_to) AS h;
    RETURN QUERY
    SELECT s.periods, s.users_exactly, s.users_at_least
    FROM analytics._stickiness(v_starts, p_from IS NULL, p_event, p_account) AS s
    ORDER BY s.periods;
END
$$;
COMMENT ON FUNCTION analytics.stickiness(text, timestamptz, timestamptz, text, text) IS
    'How often users come: of the days, weeks or months that [p_from, p_to) touches, each whole, '
    'in how many was a user active (p_event; NULL: any event). One row for each possible number '
    'from 1 on: the users active in exactly that many periods, and in at least that many. NULL '
    'p_from: from the first active period; NULL p_to: to the last period with an event.';
-- Room 60, standing stickiness: on how many days of each week and of each month users were active.
-- Follows the user-days that kind activity keeps (62_active_users_standing.sql): a user whose
-- number of days in a period changed leaves one number and joins another.

CREATE FUNCTION spectrum._create_stickiness()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_stickiness') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE analytics.mv_stickiness (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        period_kind text COLLATE "C" NOT NULL,
        period date NOT NULL,
        users bigint[] NOT NULL,
        CONSTRAINT mv_stickiness_pkey PRIMARY KEY (report_id, account_id, period_kind, period)
    ) WITH (fillfactor = 70);
    COMMENT ON TABLE analytics.mv_stickiness IS
        'Users by the number of their active days in a week or month, per account and for all '
        'accounts together (account_id *), kept by refreshes. Read it through '
        'analytics.stickiness_periods.';
    COMMENT ON COLUMN analytics.mv_stickiness.report_id IS 'spectrum.reports, kind stickiness.';
    COMMENT ON COLUMN analytics.mv_stickiness.period_kind IS 'week or month.';
    COMMENT ON COLUMN analytics.mv_stickiness.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.mv_stickiness.users IS
        'Element k: users active on exactly k days of it; as many elements as it has days.';

    CREATE VIEW analytics.stickiness_periods AS
    SELECT
        sums.account_id,
        sums.period_kind,
        sums.period,
        exactly.days::integer AS days,
        exactly.users AS users_exactly,
        (sum(exactly.users) OVER (
            PARTITION BY sums.account_id, sums.period_kind, sums.period ORDER BY exactly.days DESC
        ))::bigint AS users_at_least,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_stickiness AS sums
    CROSS JOIN LATERAL unnest(sums.users) WITH ORDINALITY AS exactly (users, days)
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'stickiness' AND report.state = 'served'
    );
    COMMENT ON VIEW analytics.stickiness_periods IS
        'On how many days of a week or month users were active, by account (account_id *: all '
        'accounts): one row for each number of days that it has, in periods with an active user.';
    COMMENT ON COLUMN analytics.stickiness_periods.period_kind IS 'week or month.';
    COMMENT ON COLUMN analytics.stickiness_periods.period IS 'Its first day.';
    COMMENT ON COLUMN analytics.stickiness_periods.days IS 'Number of active days in it, from 1.';
    COMMENT ON COLUMN analytics.stickiness_periods.users_exactly IS
        'Users active on just so many days of it.';
    COMMENT ON COLUMN analytics.stickiness_periods.users_at_least IS
        'Users active on so many days of it or more.';
    PERFORM spectrum._add_kind('stickiness', 24, '_maintain_stickiness',
        '{analytics.mv_stickiness}', '{stickiness_periods}');
    PERFORM spectrum._begin_report('stickiness');
END
$$;
COMMENT ON FUNCTION spectrum._create_stickiness() IS
    'Room 60: makes mv_stickiness and its plain view.';

CREATE FUNCTION analytics._move_stickiness(
    p_report integer,
    p_built_to bigint,
    p_activity integer,
    p_period text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts date[] := analytics._known_periods(p_period);
BEGIN
    WITH moves AS (
        SELECT scopes.account_id, cells.number, cells.days, sum(cells.users) AS users
        FROM (
            SELECT moved.scope, moved.number, version.days, sum(version.sign) AS users
            FROM analytics._changed_periods(p_activity, p_built_to, v_starts) AS moved
            CROSS JOIN LATERAL (
                VALUES (-1, moved.old_days), (1, moved.new_days)
            ) AS version (sign, days)
            WHERE version.days > 0
            GROUP BY 1, 2, 3
            HAVING sum(version.sign) <> 0
        ) AS cells
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cells.number, cells.days
    )
    INSERT INTO analytics.mv_stickiness AS sums (
        report_id, account_id, period_kind, period, users
    )
    SELECT p_report, touched.account_id, p_period, v_starts[touched.number], array_agg(
        coalesce(moves.users, 0)::bigint ORDER BY days.number)
    FROM (SELECT DISTINCT account_id, number FROM moves) AS touched
    CROSS JOIN LATERAL generate_series(
        1, (v_starts[touched.number] + ('1 ' || p_period)::interval)::date
            - v_starts[touched.number]
    ) AS days (number)
    LEFT JOIN moves ON moves.account_id = touched.account_id AND moves.number = touched.number
        AND moves.days = days.number
    GROUP BY touched.account_id, touched.number
    ON CONFLICT (report_id, account_id, period_kind, period) DO UPDATE SET
        -- Spelled out here it takes less than half the time of spectrum._add_arrays.
        users = ARRAY(
            SELECT pair.so_far + pair.more
            FROM unnest(sums.users, excluded.users) WITH ORDINALITY AS pair (so_far, more, days)
            ORDER BY pair.days
        );
END
$$;
COMMENT ON FUNCTION analytics._move_stickiness(integer, bigint, integer, text) IS
    'Moves the sums of weeks or of months.';

CREATE FUNCTION analytics._maintain_stickiness(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._follow_user_days(p_report, p_built_to);
BEGIN
    PERFORM analytics._move_stickiness(p_report, p_built_to, v_activity, kind)
    FROM unnest('{week, month}'::text[]) AS kind;

    IF EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added) THEN
        DELETE FROM analytics.mv_stickiness AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND 0 = ALL (sums.users);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_stickiness(integer, bigint) IS
    'Moves mv_stickiness by the user-days that came and went.';

CREATE FUNCTION analytics._standing_stickiness_periods()
RETURNS TABLE (
    account_id text,
    period_kind text,
    period date,
    days integer,
    users_exactly bigint,
    users_at_least bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[] := (
        SELECT h.starts FROM analytics._history_periods('day', NULL, NULL) AS h
    );
    v_days date[] := analytics._period_dates(v_starts);
BEGIN
    RETURN QUERY
    WITH users AS (
        SELECT u.account_id, kinds.kind, first.day, count(*)::integer AS days
        FROM (VALUES (false), (true)) AS scopes (by_account)
        CROSS JOIN LATERAL analytics._active_periods(NULL, v_starts, NULL, scopes.by_account) AS u
        CROSS JOIN LATERAL unnest(u.numbers) AS a (number)
        CROSS JOIN unnest('{week, month}'::text[]) AS kinds (kind)
        CROSS JOIN analytics.settings AS setting
        CROSS JOIN LATERAL (
            SELECT spectrum._period_day(
                kinds.kind, v_days[a.number]::timestamp, setting.week_start
            )::date AS day
        ) AS first
        GROUP BY u.account_id, u.user_key, kinds.kind, first.day
    )
    SELECT users.account_id, users.kind, users.day, n.number,
        count(*) FILTER (WHERE users.days = n.number),
        count(*) FILTER (WHERE users.days >= n.number)
    FROM users
    CROSS JOIN LATERAL generate_series(
        1, (users.day + ('1 ' || users.kind)::interval)::date - users.day
    ) AS n (number)
    GROUP BY users.account_id, users.kind, users.day, n.number;
END
$$;
COMMENT ON FUNCTION analytics._standing_stickiness_periods() IS
    'What analytics.stickiness_periods has to show, out of all events: for verify().';
-- Room 60, trends: one measure of any events, by calendar period and, if asked, by the values of a
-- property. Reads analytics.events only. Also here: how a property is read as a number,
-- which is as money is read: a number below 10^15 in size, or a text that is exactly one.

CREATE FUNCTION analytics._check_filter(p_argument text, p_filter jsonb)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF jsonb_typeof(p_filter) <> 'object' THEN
        PERFORM spectrum._reject(
            p_argument, p_filter::text, 'a JSON object that the properties contain, or NULL'
        );
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_filter(text, jsonb) IS
    'Raises 22023 unless the value is NULL or a JSON object.';

CREATE FUNCTION analytics._text_number(p_text text)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Not \d, which is any script's digits in some locales: a cast takes ASCII alone.
    IF p_text ~ ('^[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})'
        '(?:[eE][+-]?[0-9]{1,2})?$')
    THEN
        RETURN p_text::numeric;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._text_number(text) IS
    'The number that a text exactly is, else NULL; the same texts that carry money.';

CREATE FUNCTION analytics._percentile(p_sorted numeric[], p_fraction numeric)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rank numeric := p_fraction * (array_length(p_sorted, 1) - 1);
    v_below integer := (floor(v_rank) + 1)::integer;
    v_above integer := (ceil(v_rank) + 1)::integer;
BEGIN
    RETURN trim_scale(
        p_sorted[v_below] + (p_sorted[v_above] - p_sorted[v_below]) * (v_rank - floor(v_rank))
    );
END
$$;
COMMENT ON FUNCTION analytics._percentile(numeric[], numeric) IS
    'percentile_cont over sorted numbers, but in numeric: exact, and for numbers of any size.';

CREATE FUNCTION analytics._trend(
    p_event text,
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_measure text,
    p_property text,
    p_breakdown text,
    p_account text,
    p_where jsonb
)
RETURNS TABLE (period_number integer, breakdown text, value numeric)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    -- What a period without events shows.
    v_nothing numeric := CASE WHEN p_measure IN ('events', 'users', 'sum') THEN 0::numeric END;
    v_percentile numeric := CASE p_measure WHEN 'p50' THEN 0.5 WHEN 'p95' THEN 0.95 ELSE 0.99 END;
BEGIN
    -- The arguments are constants of this plan: of each CASE over them one branch remains, and of
    -- the event view only the columns that this branch reads.
    RETURN QUERY
    WITH amounts AS (
        SELECT
            width_bucket(e.occurred_at, p_starts) AS number,
            CASE p_breakdown
                WHEN 'event_type' THEN e.event_type
                WHEN 'account_id' THEN e.account_id
                WHEN 'country' THEN e.country
                WHEN 'region' THEN e.region
                WHEN 'city' THEN e.city
                ELSE e.properties ->> p_breakdown
            END AS breakdown,
            nullif(e.user_key, 0) AS user_key,
            CASE WHEN p_measure NOT IN ('events', 'users') THEN
                CASE jsonb_typeof(e.properties -> p_property)
                    WHEN 'number' THEN (e.properties -> p_property)::numeric
                    WHEN 'string' THEN analytics._text_number(e.properties ->> p_property)
                END
            END AS amount
        FROM analytics.events AS e
        WHERE e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_event IS NULL OR e.event_type = p_event)
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (p_where IS NULL OR e.properties @> p_where)
    ),
    measures AS (
        SELECT
            a.number,
            a.breakdown,
            CASE p_measure
                WHEN 'events' THEN count(*)
                WHEN 'users' THEN count(DISTINCT a.user_key)
                WHEN 'sum' THEN sum(a.amount) FILTER (WHERE abs(a.amount) < 1e15)
                WHEN 'avg' THEN trim_scale(avg(a.amount) FILTER (WHERE abs(a.amount) < 1e15))
                ELSE analytics._percentile(
                    array_agg(a.amount ORDER BY a.amount) FILTER (WHERE abs(a.amount) < 1e15),
                    v_percentile
                )
            END AS value
        FROM amounts AS a
        GROUP BY a.number, a.breakdown
    ),
    series AS (
        SELECT DISTINCT m.breakdown FROM measures AS m WHERE p_breakdown IS NOT NULL
        UNION ALL
        SELECT NULL WHERE p_breakdown IS NULL
    ),
    cells AS (
        SELECT m.number, m.breakdown, m.value FROM measures AS m
        UNION ALL
        SELECT p.number, s.breakdown, v_nothing
        FROM generate_series(1, array_length(p_starts, 1) - 1) AS p (number)
        CROSS JOIN series AS s
    )
    SELECT c.number, c.breakdown, sum(c.value)
    FROM cells AS c
    GROUP BY c.number, c.breakdown;
END
$$;
COMMENT ON FUNCTION analytics._trend(
    text, timestamptz[], timestamptz, timestamptz, text, text, text, text, jsonb
) IS
    'The measure for each period (numbered by p_starts) and each breakdown value, empty ones too.';

CREATE FUNCTION analytics.trend(
    p_event text DEFAULT NULL,
    p_period text DEFAULT 'day',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_measure text DEFAULT 'events',
    p_property text DEFAULT NULL,
    p_breakdown text DEFAULT NULL,
    p_account text DEFAULT NULL,
    p_where jsonb DEFAULT NULL
)
RETURNS TABLE (period date, breakdown text, value numeric)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM spectrum._check_choice(
        'p_measure', p_measure, '{events, users, sum, avg, p50, p95, p99}'
    );
    PERFORM analytics._check_range(p_from, p_to);
    IF p_property IS NULL AND p_measure NOT IN ('events', 'users') THEN
        PERFORM spectrum._reject(
            'p_property', p_property, format('the property that %s is taken of', p_measure)
        );
    END IF;
    PERFORM analytics._check_filter('p_where', p_where);

    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts(p_period, v_from, v_to);

    RETURN QUERY
    SELECT spectrum.period_date(v_starts[t.period_number]) AS period, t.breakdown, t.value
    FROM analytics._trend(
        p_event, v_starts, v_from, v_to, p_measure, p_property, p_breakdown, p_account, p_where
    ) AS t
    ORDER BY t.period_number, t.breakdown;
END
$$;
COMMENT ON FUNCTION analytics.trend(
    text, text, timestamptz, timestamptz, text, text, text, text, jsonb
) IS
    'One measure by day, week or month over the events of [p_from, p_to) (NULL: from the first '
    'event of the account, to the last event of any). p_event NULL: any event. p_measure: events, '
    'users, or sum, avg, p50, p95, p99 of the numbers in p_property (below 10^15 in size, or a '
    'text that is exactly one; anything else there is left out). p_breakdown: event_type, '
    'account_id, country, region, city, or a top-level property. p_where: JSON containment. A '
    'period without events is a row too: 0, or NULL for avg and percentiles.';
-- Room 60, standing trend: events by day and type, a plain sum of the news.

CREATE FUNCTION spectrum._create_daily_events()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_daily_events') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE analytics.mv_daily_events (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        event_type_key integer NOT NULL,
        events bigint NOT NULL,
        CONSTRAINT mv_daily_events_pkey PRIMARY KEY (report_id, account_id, day, event_type_key)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_daily_events IS
        'Events per account, day and type, and for all accounts together (account_id *), kept by '
        'refreshes. Read it through analytics.daily_events.';
    COMMENT ON COLUMN analytics.mv_daily_events.report_id IS 'spectrum.reports, kind volume.';
    COMMENT ON COLUMN analytics.mv_daily_events.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_daily_events.event_type_key IS 'dim_event_types.';
    COMMENT ON COLUMN analytics.mv_daily_events.events IS 'Events, of the unknown user too.';

    CREATE VIEW analytics.daily_events AS
    SELECT
        sums.account_id,
        sums.day,
        dim_event_types.event_type,
        sums.events,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_daily_events AS sums
    JOIN warehouse.dim_event_types USING (event_type_key)
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'volume' AND report.state = 'served'
    );
    COMMENT ON VIEW analytics.daily_events IS
        'Events per account (* is all), day and type; days without such an event are no rows.';
    PERFORM spectrum._add_kind('volume', 10, '_maintain_daily_events',
        '{analytics.mv_daily_events}', '{daily_events}');
    PERFORM spectrum._begin_report('volume');
END
$$;
COMMENT ON FUNCTION spectrum._create_daily_events() IS
    'Room 60: makes mv_daily_events and its plain view.';

CREATE FUNCTION analytics._maintain_daily_events(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;
    INSERT INTO analytics.mv_daily_events AS sums (
        report_id, account_id, day, event_type_key, events
    )
    SELECT p_report, scopes.account_id, v_days[counts.number], counts.event_type_key,
        sum(counts.events)
    FROM (
        SELECT news.scope, width_bucket(news.occurred_at, v_starts) AS number,
            news.event_type_key, sum(news.sign) AS events
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <= p_built_to
        GROUP BY 1, 2, 3
    ) AS counts
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, counts.number, counts.event_type_key
    HAVING sum(counts.events) <> 0
    ON CONFLICT (report_id, account_id, day, event_type_key) DO UPDATE SET
        events = sums.events + excluded.events;

    IF EXISTS (SELECT FROM pg_temp.spectrum_news WHERE sign < 0) THEN
        DELETE FROM analytics.mv_daily_events AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.events = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_daily_events(integer, bigint) IS
    'Moves mv_daily_events by the news.';

CREATE FUNCTION analytics._standing_daily_events()
RETURNS TABLE (account_id text, day date, event_type text, events bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT scopes.account_id, t.period, t.breakdown, t.value::bigint
    FROM (
        SELECT '*' AS account_id, NULL AS account
        UNION ALL
        SELECT dim.account_id, dim.account_id FROM warehouse.dim_accounts AS dim
        WHERE dim.account_key <> 0
    ) AS scopes
    CROSS JOIN LATERAL analytics.trend(
        p_breakdown => 'event_type', p_account => scopes.account
    ) AS t
    WHERE t.value > 0;
END
$$;
COMMENT ON FUNCTION analytics._standing_daily_events() IS
    'What analytics.daily_events has to show, out of all events: for verify().';
-- Room 60, revenue: money by account, day and currency. Facts carry the amount as numeric and its
-- currency (room 20 reads them); here they become orders and refunds. Sums never mix currencies.
-- Reads analytics.events; read by analytics.revenue and by verify().

CREATE FUNCTION analytics._revenue_entries(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_currency text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    has_paid boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('day', p_from, p_to);
    v_days date[] := analytics._period_dates(v_starts);
    v_refund_events text[] := (SELECT s.refund_events FROM analytics.settings AS s);
BEGIN
    RETURN QUERY
    WITH money_events AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
            e.user_key,
            width_bucket(e.occurred_at, v_starts) AS number,
            e.currency,
            e.revenue,
            e.revenue < 0 OR e.event_type = ANY (v_refund_events) AS is_refund
        FROM analytics.events AS e
        WHERE e.revenue IS NOT NULL
            AND e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (p_currency IS NULL OR e.currency = p_currency)
            AND (NOT p_by_account OR e.account_key <> 0)
    )
    SELECT
        m.scope,
        m.user_key,
        v_days[m.number],
        m.currency,
        count(*) FILTER (WHERE NOT m.is_refund),
        coalesce(sum(m.revenue) FILTER (WHERE NOT m.is_refund), 0),
        coalesce(sum(abs(m.revenue)) FILTER (WHERE m.is_refund), 0),
        m.user_key <> 0 AND bool_or(NOT m.is_refund AND m.revenue > 0)
    FROM money_events AS m
    GROUP BY m.scope, m.user_key, m.number, m.currency;
END
$$;
COMMENT ON FUNCTION analytics._revenue_entries(
    timestamptz, timestamptz, text, text, boolean
) IS
    'What each user contributes: his money by day and currency. The unknown user''s (key 0) is '
    'money too, but he never is a paying user.';

CREATE FUNCTION analytics._revenue(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_currency text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    net numeric,
    paying_users bigint,
    active_users bigint,
    arpu numeric,
    arppu numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts('day', v_from, v_to);
    v_days := analytics._period_dates(v_starts);

    RETURN QUERY
    WITH sums AS (
        SELECT
            r.account_id,
            r.day,
            r.currency,
            sum(r.orders)::bigint AS orders,
            sum(r.gross) AS gross,
            sum(r.refunds) AS refunds,
            -- A quotient has digits by the zeros that its parts end with.
            trim_scale(sum(r.gross) - sum(r.refunds)) AS net,
            count(*) FILTER (WHERE r.has_paid) AS paying_users
        FROM analytics._revenue_entries(v_from, v_to, p_account, p_currency, p_by_account) AS r
        GROUP BY r.account_id, r.day, r.currency
    ),
    active AS (
        SELECT
            CASE WHEN p_by_account THEN t.breakdown ELSE coalesce(p_account, '*') END AS account_id,
            v_days[t.period_number] AS day,
            nullif(t.value, 0) AS users
        FROM analytics._trend(
            NULL, v_starts, v_from, v_to, 'users', NULL,
            CASE WHEN p_by_account THEN 'account_id' END, p_account, NULL
        ) AS t
    )
    SELECT
        s.account_id,
        s.day,
        s.currency,
        s.orders,
        s.gross,
        s.refunds,
        s.net,
        s.paying_users,
        coalesce(a.users, 0)::bigint,
        trim_scale(s.net / a.users),
        trim_scale(s.net / nullif(s.paying_users, 0))
    FROM sums AS s
    LEFT JOIN active AS a ON a.account_id = s.account_id AND a.day = s.day;
END
$$;
COMMENT ON FUNCTION analytics._revenue(timestamptz, timestamptz, text, text, boolean) IS
    'Revenue of each scope, day and currency: settles the range, sums the users up, divides.';

CREATE FUNCTION analytics._standing_revenue_summary()
RETURNS TABLE (
    account_id text,
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    net numeric,
    paying_users bigint,
    active_users bigint,
    arpu numeric,
    arppu numeric
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT * FROM analytics._revenue(NULL, NULL, NULL, NULL, false);
    RETURN QUERY SELECT * FROM analytics._revenue(NULL, NULL, NULL, NULL, true);
END
$$;
COMMENT ON FUNCTION analytics._standing_revenue_summary() IS
    'What analytics.revenue_summary has to show, out of all events: for verify().';

CREATE FUNCTION analytics.revenue(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL,
    p_currency text DEFAULT NULL
)
RETURNS TABLE (
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    net numeric,
    paying_users bigint,
    active_users bigint,
    arpu numeric,
    arppu numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    IF p_currency !~ '^[A-Za-z]{3}$' THEN
        PERFORM spectrum._reject('p_currency', p_currency, 'three letters, or NULL for each');
    END IF;

    RETURN QUERY
    SELECT
        r.day, r.currency, r.orders, r.gross, r.refunds, r.net, r.paying_users, r.active_users,
        r.arpu, r.arppu
    FROM analytics._revenue(p_from, p_to, p_account, upper(p_currency), false) AS r
    ORDER BY r.day, r.currency;
END
$$;
COMMENT ON FUNCTION analytics.revenue(timestamptz, timestamptz, text, text) IS
    'Orders, gross, refunds (positive), net, paying and active users, net per active user (arpu) '
    'and per paying user (arppu), by day and currency, over the events of [p_from, p_to); days and '
    'currencies without money are no rows. NULL: all time, all accounts, each currency.';
-- Room 60, standing revenue: sums of the news that carry money, and the user-days with an order.

CREATE FUNCTION spectrum._create_revenue()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_revenue_summary') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_paying_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        currency text COLLATE "C" NOT NULL,
        CONSTRAINT rollup_paying_days_pkey PRIMARY KEY (report_id, user_key, scope, day, currency)
    );
    COMMENT ON TABLE spectrum.rollup_paying_days IS
        'The days on which each user had an order above 0, by currency.';
    COMMENT ON COLUMN spectrum.rollup_paying_days.report_id IS 'spectrum.reports, kind revenue.';
    COMMENT ON COLUMN spectrum.rollup_paying_days.scope IS 'See rollup_user_days.scope.';

    CREATE TABLE analytics.mv_revenue_summary (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        currency text COLLATE "C" NOT NULL,
        money_events bigint NOT NULL DEFAULT 0,
        orders bigint NOT NULL DEFAULT 0,
        gross numeric NOT NULL DEFAULT 0,
        refunds numeric NOT NULL DEFAULT 0,
        paying_users bigint NOT NULL DEFAULT 0,
        CONSTRAINT mv_revenue_summary_pkey PRIMARY KEY (report_id, account_id, day, currency)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_revenue_summary IS
        'Money per account, day and currency, and for all accounts together (account_id *), kept '
        'by refreshes. Read it through analytics.revenue_summary.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.report_id IS 'spectrum.reports, kind revenue.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.money_events IS 'Orders and refunds.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.orders IS
        'Events with money that are no refunds.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.gross IS 'Sum of the orders.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.refunds IS
        'Sum of the refunds, as a positive amount: events of a type in config.refund_events, and '
        'negative amounts.';
    COMMENT ON COLUMN analytics.mv_revenue_summary.paying_users IS
        'Distinct users with an order above 0.';

    CREATE VIEW analytics.revenue_summary AS
    SELECT
        sums.account_id, sums.day, sums.currency, sums.orders, sums.gross, sums.refunds,
        sums.gross - sums.refunds AS net,
        sums.paying_users,
        coalesce(active.dau, 0) AS active_users,
        trim_scale(trim_scale(sums.gross - sums.refunds) / nullif(active.dau, 0)) AS arpu,
        trim_scale(trim_scale(sums.gross - sums.refunds) / nullif(sums.paying_users, 0)) AS arppu,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_revenue_summary AS sums
    LEFT JOIN analytics.mv_active_users AS active
        ON active.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'activity' AND report.state = 'served'
        ) AND active.account_id = sums.account_id AND active.day = sums.day
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'revenue' AND report.state = 'served'
    );
    COMMENT ON VIEW analytics.revenue_summary IS
        'Orders, refunds, net revenue, per user too, by account (* is all), day and currency.';
    COMMENT ON COLUMN analytics.revenue_summary.active_users IS
        'Distinct users of the account''s day, whatever they did.';
    COMMENT ON COLUMN analytics.revenue_summary.arpu IS
        'net / active_users; NULL where there are none.';
    COMMENT ON COLUMN analytics.revenue_summary.arppu IS
        'net / paying_users; NULL where there are none.';
    PERFORM spectrum._add_kind('revenue', 30, '_maintain_revenue',
        '{spectrum.rollup_paying_days, analytics.mv_revenue_summary}', '{revenue_summary}');
    PERFORM spectrum._begin_report('revenue');
END
$$;
COMMENT ON FUNCTION spectrum._create_revenue() IS
    'Room 60: makes rollup_paying_days, mv_revenue_summary and its plain view.';

CREATE FUNCTION analytics._move_paying_days(p_report integer, p_built_to bigint)
RETURNS TABLE (scope bigint, day date, currency text, users bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    v_starts timestamptz[];
    v_days date[];
    v_refund_keys integer[] := analytics._refund_keys();
BEGIN
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;
    RETURN QUERY
    WITH orders AS (
        SELECT news.sign, news.is_leaving, news.user_key, news.scope, news.currency,
            width_bucket(news.occurred_at, v_starts) AS number
        FROM pg_temp.spectrum_news AS news
        WHERE news.revenue > 0 AND news.event_type_key <> ALL (v_refund_keys)
            AND news.user_key <> 0 AND news.user_key <= p_built_to
    ), added AS (
        INSERT INTO spectrum.rollup_paying_days (report_id, user_key, scope, day, currency)
        SELECT DISTINCT p_report, orders.user_key, orders.scope, v_days[orders.number],
            orders.currency
        FROM orders
        WHERE orders.sign > 0 AND NOT orders.is_leaving
        ON CONFLICT DO NOTHING
        RETURNING rollup_paying_days.scope, rollup_paying_days.day, rollup_paying_days.currency
    ), went AS (
        SELECT orders.user_key, orders.scope, orders.number, orders.currency,
            bool_or(orders.is_leaving) AS is_leaving
        FROM orders
        WHERE orders.sign <= 0
        GROUP BY orders.user_key, orders.scope, orders.number, orders.currency
    ), removed AS (
        DELETE FROM spectrum.rollup_paying_days AS known
        USING went
        WHERE known.report_id = p_report AND known.user_key = went.user_key
            AND known.scope = went.scope AND known.day = v_days[went.number]
            AND known.currency = went.currency
            AND (went.is_leaving OR NOT EXISTS (
                SELECT FROM warehouse.fact_events AS fact
                WHERE fact.user_key = went.user_key
                    AND fact.occurred_at >= v_starts[went.number]
                    AND fact.occurred_at < v_starts[went.number + 1]
                    AND (went.scope >= 0 OR fact.account_key = -went.scope)
                    AND fact.revenue > 0 AND fact.currency = went.currency
                    AND fact.event_type_key <> ALL (v_refund_keys)
            ))
        RETURNING known.scope, known.day, known.currency
    )
    SELECT moved.scope, moved.day, moved.currency, sum(moved.users)::bigint
    FROM (
        SELECT added.*, 1 AS users FROM added
        UNION ALL
        SELECT removed.*, -1 FROM removed
    ) AS moved
    GROUP BY moved.scope, moved.day, moved.currency;
END
$$;
COMMENT ON FUNCTION analytics._move_paying_days(integer, bigint) IS
    'Brings rollup_paying_days up to the news and returns how many users that is more or less.';

CREATE FUNCTION analytics._refund_keys()
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        SELECT types.event_type_key FROM analytics.event_types AS types
        WHERE types.event_type = ANY ((SELECT s.refund_events FROM analytics.settings AS s)::text[])
    );
END
$$;
COMMENT ON FUNCTION analytics._refund_keys() IS
    'Keys of the event types whose amount is a refund, whatever its sign.';

CREATE FUNCTION analytics._maintain_revenue(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
    v_refund_keys integer[] := analytics._refund_keys();
BEGIN
    IF NOT EXISTS (SELECT FROM pg_temp.spectrum_news WHERE revenue IS NOT NULL) THEN
        RETURN;
    END IF;
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;
    INSERT INTO analytics.mv_revenue_summary AS sums (
        report_id, account_id, day, currency, money_events, orders, gross, refunds, paying_users
    )
    SELECT p_report, scopes.account_id, moved.day, moved.currency, sum(moved.money_events),
        sum(moved.orders), sum(moved.gross), sum(moved.refunds), sum(moved.paying_users)
    FROM (
        SELECT news.scope, v_days[width_bucket(news.occurred_at, v_starts)] AS day, news.currency,
            news.sign AS money_events,
            CASE WHEN kind.is_refund THEN 0 ELSE news.sign END AS orders,
            CASE WHEN kind.is_refund THEN 0 ELSE news.sign * news.revenue END AS gross,
            CASE WHEN kind.is_refund THEN news.sign * abs(news.revenue) ELSE 0 END AS refunds,
            0 AS paying_users
        FROM pg_temp.spectrum_news AS news
        CROSS JOIN LATERAL (
            SELECT news.revenue < 0 OR news.event_type_key = ANY (v_refund_keys) AS is_refund
        ) AS kind
        WHERE news.revenue IS NOT NULL AND news.user_key <= p_built_to
        UNION ALL
        SELECT payers.scope, payers.day, payers.currency, 0, 0, 0, 0, payers.users
        FROM analytics._move_paying_days(p_report, p_built_to) AS payers
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.day, moved.currency
    ON CONFLICT (report_id, account_id, day, currency) DO UPDATE SET
        money_events = sums.money_events + excluded.money_events,
        orders = sums.orders + excluded.orders,
        gross = sums.gross + excluded.gross,
        refunds = sums.refunds + excluded.refunds,
        paying_users = sums.paying_users + excluded.paying_users;

    DELETE FROM analytics.mv_revenue_summary AS sums
    USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
    WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
        AND sums.money_events = 0
        AND EXISTS (SELECT FROM pg_temp.spectrum_news WHERE sign <= 0);
END
$$;
COMMENT ON FUNCTION analytics._maintain_revenue(integer, bigint) IS
    'Moves mv_revenue_summary by the news that carry money.';
-- Room 60, recurring revenue: what subscription events say, and the rule that turns one account's
-- events into movements of its MRR. Both are pure: they see what they are given and no table. The
-- one reader of events here is analytics._subscription_events. Read by 64_mrr_report.sql.
--
-- An event sets the MRR of its subscription from its time on; a cancellation sets it to nothing.
-- What an account pays is the sum of its subscriptions, in each currency by itself.

CREATE FUNCTION analytics._per_year(p_interval text)
RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN lower(p_interval) IN ('day', 'daily') THEN 365
        WHEN lower(p_interval) IN ('week', 'weekly') THEN 52
        WHEN lower(p_interval) IN ('month', 'monthly') THEN 12
        WHEN lower(p_interval) IN ('quarter', 'quarterly') THEN 4
        WHEN lower(p_interval) IN ('year', 'yearly', 'annual', 'annually') THEN 1
    END
$$;
COMMENT ON FUNCTION analytics._per_year(text) IS
    'How often a year an amount is paid, by the name of its interval; NULL for no such name.';

CREATE FUNCTION analytics._property_number(p_value jsonb)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_number numeric := CASE jsonb_typeof(p_value)
        WHEN 'number' THEN p_value::numeric
        WHEN 'string' THEN analytics._text_number(p_value #>> '{}')
    END;
BEGIN
    RETURN CASE WHEN abs(v_number) < 1e15 THEN v_number END;
END
$$;
COMMENT ON FUNCTION analytics._property_number(jsonb) IS
    'The number that a property is: below 10^15 in size, or a text that is exactly one. Else NULL.';

CREATE FUNCTION analytics._read_subscription(
    p_event_type text,
    p_properties jsonb,
    p_currency text,
    OUT subscription text,
    OUT mrr numeric,
    OUT currency text,
    OUT place integer,
    OUT problem text
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_field text := CASE WHEN p_properties -> 'mrr' <> 'null' THEN 'mrr' ELSE 'amount' END;
    v_amount numeric := analytics._property_number(p_properties -> v_field);
    v_per_year integer := CASE v_field
        WHEN 'mrr' THEN 12
        ELSE analytics._per_year(p_properties ->> 'interval')
    END;
BEGIN
    place := array_position(
        '{subscription_cancelled, subscription_started, subscription_changed}', p_event_type
    );
    subscription := coalesce(p_properties ->> 'subscription_id', '');
    IF jsonb_typeof(p_properties -> 'subscription_id') NOT IN ('string', 'number', 'null') THEN
        problem := spectrum._complaint(
            'properties.subscription_id', 'a text', p_properties -> 'subscription_id'
        );
    ELSIF p_event_type = 'subscription_cancelled' THEN
        mrr := 0;
    ELSIF v_amount IS NULL OR v_amount < 0 THEN
        problem := spectrum._complaint(
            CASE WHEN p_properties -> v_field <> 'null' THEN 'properties.' || v_field
                ELSE 'properties.mrr or properties.amount' END,
            'a number from 0 to below 10^15', p_properties -> v_field
        );
    ELSIF v_per_year IS NULL THEN
        problem := spectrum._complaint(
            'properties.interval', 'day, week, month, quarter or year', p_properties -> 'interval'
        );
    ELSIF p_properties -> 'currency' <> 'null' AND (
        jsonb_typeof(p_properties -> 'currency') <> 'string'
        OR p_properties ->> 'currency' !~ '^[A-Za-z]{3}$'
    ) THEN
        problem := spectrum._complaint(
            'properties.currency', 'three letters', p_properties -> 'currency'
        );
    ELSE
        mrr := trim_scale(v_amount * v_per_year / 12);
        currency := coalesce(upper(p_properties ->> 'currency'), p_currency);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._read_subscription(text, jsonb, text) IS
    'What a subscription event sets: the MRR of one subscription (empty: the account''s only one) '
    'and its currency, NULL where it is cancelled; its place among events of the same time; or, '
    'in problem, why it cannot be read.';

CREATE FUNCTION analytics._subscription_events(p_account text)
RETURNS TABLE (
    account_id text,
    account_key bigint,
    event_id uuid,
    event_type text,
    occurred_at timestamptz,
    subscription text,
    mrr numeric,
    currency text,
    place integer,
    problem text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_currency text := (SELECT s.currency FROM analytics.settings AS s);
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN (
            'subscription_started', 'subscription_changed', 'subscription_cancelled'
        )
    );
BEGIN
    RETURN QUERY
    SELECT e.account_id, e.account_key, e.event_id, e.event_type, e.occurred_at,
        r.subscription, r.mrr, r.currency, r.place,
        CASE WHEN e.account_key = 0
            THEN spectrum._complaint('account_id', 'an account', NULL)
            ELSE r.problem
        END
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._read_subscription(
        e.event_type, e.properties, v_currency
    ) AS r
    WHERE e.event_type_key = ANY (v_keys)
        AND (p_account IS NULL OR e.account_id = p_account);
END
$$;
COMMENT ON FUNCTION analytics._subscription_events(text) IS
    'The subscription events of one account (NULL: of all), as they are read. Whether they name a '
    'user does not matter. One without an account is no account''s, which is a problem too.';

CREATE FUNCTION analytics._movement_starts(p_times timestamptz[])
RETURNS timestamptz[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_at timestamptz;
    v_start timestamptz;
    v_starts timestamptz[] := '{}'::timestamptz[];
BEGIN
    FOREACH v_at IN ARRAY p_times LOOP
        IF v_start IS NULL OR v_at >= v_start + interval '60 minutes' THEN
            v_start := v_at;
        END IF;
        v_starts := array_append(v_starts, v_start);
    END LOOP;
    RETURN v_starts;
END
$$;
COMMENT ON FUNCTION analytics._movement_starts(timestamptz[]) IS
    'For ascending times of changes: when the movement began that each is part of. The 60 minutes '
    'of a movement run from its first change.';

CREATE FUNCTION analytics._mrr_movements(
    p_account_keys bigint[],
    p_times timestamptz[],
    p_places integer[],
    p_event_ids uuid[],
    p_subscriptions text[],
    p_mrr numeric[],
    p_currencies text[]
)
RETURNS TABLE (
    account_key bigint,
    currency text,
    moved_at timestamptz,
    movement text,
    mrr_before numeric,
    mrr_after numeric
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH states AS (
        SELECT e.account_key, e.at, e.mrr, e.currency,
            lag(e.mrr) OVER subscriptions AS mrr_before,
            lag(e.currency) OVER subscriptions AS currency_before
        FROM unnest(
            p_account_keys, p_times, p_places, p_event_ids, p_subscriptions, p_mrr, p_currencies
        ) AS e (account_key, at, place, event_id, subscription, mrr, currency)
        WINDOW subscriptions AS (
            PARTITION BY e.account_key, e.subscription ORDER BY e.at, e.place, e.event_id
        )
    ),
    changes AS (
        -- What the account pays changed at this time. A subscription that changes its currency
        -- ends in one and begins in the other.
        SELECT s.account_key, c.currency, s.at, sum(c.change) AS change
        FROM states AS s
        CROSS JOIN LATERAL (
            VALUES (s.currency, s.mrr), (s.currency_before, -s.mrr_before)
        ) AS c (currency, change)
        WHERE c.change <> 0
        GROUP BY s.account_key, c.currency, s.at
        HAVING sum(c.change) <> 0
    ),
    histories AS (
        SELECT c.account_key, c.currency, array_agg(c.at ORDER BY c.at) AS times,
            array_agg(c.change ORDER BY c.at) AS changes
        FROM changes AS c
        GROUP BY c.account_key, c.currency
    ),
    movements AS (
        SELECT h.account_key, h.currency, m.moved_at, sum(m.change) AS change
        FROM histories AS h
        CROSS JOIN LATERAL unnest(
            analytics._movement_starts(h.times), h.changes
        ) AS m (moved_at, change)
        GROUP BY h.account_key, h.currency, m.moved_at
        HAVING sum(m.change) <> 0
    ),
    balances AS (
        SELECT m.account_key, m.currency, m.moved_at, m.change,
            row_number() OVER account AS number,
            sum(m.change) OVER account AS mrr_after
        FROM movements AS m
        WINDOW account AS (PARTITION BY m.account_key, m.currency ORDER BY m.moved_at)
    )
    SELECT b.account_key, b.currency, b.moved_at,
        CASE
            WHEN b.number = 1 THEN 'new'
            WHEN b.mrr_after = b.change THEN 'reactivation'
            WHEN b.mrr_after = 0 THEN 'churn'
            WHEN b.change > 0 THEN 'expansion'
            ELSE 'contraction'
        END,
        b.mrr_after - b.change,
        b.mrr_after
    FROM balances AS b;
END
$$;
COMMENT ON FUNCTION analytics._mrr_movements(
    bigint[], timestamptz[], integer[], uuid[], text[], numeric[], text[]
) IS
    'The rule: the movements of each account''s MRR by currency, out of all its readable '
    'subscription events, given as columns in any order. An account''s movements depend on its own '
    'events alone, so any accounts can be asked for together.';
-- Room 60, recurring revenue: movements of MRR by period, and the events that it cannot read.
-- Reads the events through analytics._subscription_events and nothing else.

CREATE FUNCTION analytics._mrr_contributions(
    p_account_keys bigint[],
    p_currencies text[],
    p_moved_at timestamptz[],
    p_movements text[],
    p_mrr_before numeric[],
    p_mrr_after numeric[],
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz
)
RETURNS TABLE (
    account_key bigint,
    currency text,
    period_number integer,
    movements bigint,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    change numeric,
    net_change numeric,
    gross_change numeric,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    accounts_change bigint
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH movements AS (
        SELECT m.account_key, m.currency, m.moved_at, m.movement, m.mrr_before, m.mrr_after,
            abs(m.mrr_after - m.mrr_before) AS amount,
            CASE WHEN m.moved_at < p_from THEN 0
                ELSE width_bucket(m.moved_at, p_starts) END AS number
        FROM unnest(
            p_account_keys, p_currencies, p_moved_at, p_movements, p_mrr_before, p_mrr_after
        ) AS m (account_key, currency, moved_at, movement, mrr_before, mrr_after)
        WHERE m.moved_at < p_to
    ),
    periods AS (
        SELECT m.account_key, m.currency, m.number, count(*) AS movements,
            (array_agg(m.mrr_before ORDER BY m.moved_at))[1] AS opening,
            (array_agg(m.mrr_after ORDER BY m.moved_at DESC))[1] AS closing,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'new'), 0) AS new,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'expansion'), 0) AS expansion,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'contraction'), 0) AS contraction,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'churn'), 0) AS churn,
            coalesce(sum(m.amount) FILTER (WHERE m.movement = 'reactivation'), 0) AS reactivation,
            count(*) FILTER (WHERE m.movement = 'new') AS new_times,
            count(*) FILTER (WHERE m.movement = 'churn') AS churn_times,
            count(*) FILTER (WHERE m.movement = 'reactivation') AS reactivation_times
        FROM movements AS m
        GROUP BY m.account_key, m.currency, m.number
    )
    SELECT p.account_key, p.currency, p.number, p.movements, p.new, p.expansion, p.contraction,
        p.churn, p.reactivation, p.closing - p.opening,
        -- Of the accounts with MRR at the start; those that did not move keep theirs.
        CASE WHEN p.opening > 0 THEN p.closing - p.opening ELSE 0 END,
        CASE WHEN p.opening > 0 THEN least(p.closing - p.opening, 0) ELSE 0 END,
        p.new_times, p.churn_times, p.reactivation_times,
        (sign(p.closing) - sign(p.opening))::bigint
    FROM periods AS p;
END
$$;
COMMENT ON FUNCTION analytics._mrr_contributions(
    bigint[], text[], timestamptz[], text[], numeric[], numeric[],
    timestamptz[], timestamptz, timestamptz
) IS
    'What each account contributes to the periods in which its MRR moved, out of the movements '
    'given as columns: their sums and how many, by how much its MRR changed from the start of the '
    'period to its end, and by how much where it had any at the start. All of it adds up over '
    'accounts. Period 0 is all time before p_from.';

CREATE FUNCTION analytics._account_movements(p_account text)
RETURNS TABLE (
    account_key bigint,
    currency text,
    moved_at timestamptz,
    movement text,
    mrr_before numeric,
    mrr_after numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    WITH histories AS (
        SELECT array_agg(e.account_key) AS account_keys, array_agg(e.occurred_at) AS times,
            array_agg(e.place) AS places, array_agg(e.event_id) AS event_ids,
            array_agg(e.subscription) AS subscriptions, array_agg(e.mrr) AS mrr,
            array_agg(e.currency) AS currencies
        FROM analytics._subscription_events(p_account) AS e
        WHERE e.problem IS NULL
    )
    SELECT m.account_key, m.currency, m.moved_at, m.movement, m.mrr_before, m.mrr_after
    FROM histories AS h
    CROSS JOIN LATERAL analytics._mrr_movements(
        h.account_keys, h.times, h.places, h.event_ids, h.subscriptions, h.mrr, h.currencies
    ) AS m;
END
$$;
COMMENT ON FUNCTION analytics._account_movements(text) IS
    'The movements of one account (NULL: of all), out of its events.';

CREATE FUNCTION analytics._mrr_balances(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_key bigint,
    period_number integer,
    currency text,
    start_mrr numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    end_mrr numeric,
    start_accounts bigint,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    end_accounts bigint,
    kept_net numeric,
    kept_gross numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH movements AS (
        SELECT array_agg(m.account_key) AS account_keys, array_agg(m.currency) AS currencies,
            array_agg(m.moved_at) AS moved_at, array_agg(m.movement) AS movements,
            array_agg(m.mrr_before) AS mrr_before, array_agg(m.mrr_after) AS mrr_after
        FROM analytics._account_movements(p_account) AS m
    ),
    sums AS (
        SELECT CASE WHEN p_by_account THEN c.account_key ELSE 0 END AS account_key,
            c.period_number, c.currency, sum(c.new) AS new, sum(c.expansion) AS expansion,
            sum(c.contraction) AS contraction, sum(c.churn) AS churn,
            sum(c.reactivation) AS reactivation, sum(c.change) AS change,
            sum(c.net_change) AS net_change, sum(c.gross_change) AS gross_change,
            sum(c.new_accounts)::bigint AS new_accounts,
            sum(c.churned_accounts)::bigint AS churned_accounts,
            sum(c.reactivated_accounts)::bigint AS reactivated_accounts,
            sum(c.accounts_change)::bigint AS accounts_change
        FROM movements AS m
        CROSS JOIN LATERAL analytics._mrr_contributions(
            m.account_keys, m.currencies, m.moved_at, m.movements, m.mrr_before, m.mrr_after,
            p_starts, p_from, p_to
        ) AS c
        GROUP BY 1, c.period_number, c.currency
    ),
    periods AS (
        SELECT f.account_key, f.currency, n.number
        FROM (
            SELECT s.account_key, s.currency, min(s.period_number) AS number
            FROM sums AS s GROUP BY 1, 2
        ) AS f
        CROSS JOIN LATERAL generate_series(f.number, cardinality(p_starts) - 1) AS n (number)
    ),
    balances AS (
        SELECT p.account_key, p.number, p.currency, s.new, s.expansion, s.contraction, s.churn,
            s.reactivation, coalesce(s.change, 0) AS change, s.net_change, s.gross_change,
            s.new_accounts, s.churned_accounts, s.reactivated_accounts,
            coalesce(s.accounts_change, 0) AS accounts_change,
            sum(s.change) OVER so_far AS end_mrr,
            (sum(s.accounts_change) OVER so_far)::bigint AS end_accounts
        FROM periods AS p
        LEFT JOIN sums AS s ON s.account_key = p.account_key AND s.currency = p.currency
            AND s.period_number = p.number
        WINDOW so_far AS (PARTITION BY p.account_key, p.currency ORDER BY p.number)
    )
    -- Without zeros at their end, equal amounts give ratios of equally many digits.
    SELECT b.account_key, b.number, b.currency, trim_scale(b.end_mrr - b.change),
        trim_scale(coalesce(b.new, 0)), trim_scale(coalesce(b.expansion, 0)),
        trim_scale(coalesce(b.contraction, 0)), trim_scale(coalesce(b.churn, 0)),
        trim_scale(coalesce(b.reactivation, 0)), trim_scale(b.end_mrr),
        b.end_accounts - b.accounts_change, coalesce(b.new_accounts, 0),
        coalesce(b.churned_accounts, 0), coalesce(b.reactivated_accounts, 0), b.end_accounts,
        trim_scale(b.end_mrr - b.change + coalesce(b.net_change, 0)),
        trim_scale(b.end_mrr - b.change + coalesce(b.gross_change, 0))
    FROM balances AS b
    WHERE b.number > 0;
END
$$;
COMMENT ON FUNCTION analytics._mrr_balances(
    timestamptz[], timestamptz, timestamptz, text, boolean
) IS
    'The contributions summed up, by account or all together (account_key 0), period after period '
    'from the first movement of a currency on. kept_net, kept_gross: MRR at the end of the '
    'accounts that had MRR at the start, and the same with no account counted above what it had.';

CREATE FUNCTION analytics._mrr_report(
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_key bigint,
    period date,
    currency text,
    start_mrr numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    end_mrr numeric,
    start_accounts bigint,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    end_accounts bigint,
    nrr numeric,
    grr numeric,
    ltv numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
    v_dates date[];
BEGIN
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    v_starts := spectrum.period_starts(p_period, v_from, v_to);
    v_dates := analytics._period_dates(v_starts);

    RETURN QUERY
    SELECT b.account_key, v_dates[b.period_number], b.currency, b.start_mrr, b.new, b.expansion,
        b.contraction, b.churn, b.reactivation, b.end_mrr, b.start_accounts, b.new_accounts,
        b.churned_accounts, b.reactivated_accounts, b.end_accounts,
        trim_scale(b.kept_net / nullif(b.start_mrr, 0)),
        trim_scale(b.kept_gross / nullif(b.start_mrr, 0)),
        -- What an account pays in a month, by how many months it stays: 1 / (churned / start)
        -- periods, of which a year has so many.
        trim_scale(
            b.end_mrr * nullif(b.start_accounts, 0) * 12
            / nullif(b.end_accounts * b.churned_accounts * analytics._per_year(p_period), 0)
        )
    FROM analytics._mrr_balances(v_starts, v_from, v_to, p_account, p_by_account) AS b
    WHERE v_from < v_to;
END
$$;
COMMENT ON FUNCTION analytics._mrr_report(text, timestamptz, timestamptz, text, boolean) IS
    'The rows of analytics.mrr_movements, of all accounts together (account_key 0) or of each.';

CREATE FUNCTION analytics.mrr_movements(
    p_period text DEFAULT 'month',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    currency text,
    start_mrr numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    end_mrr numeric,
    start_accounts bigint,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    end_accounts bigint,
    nrr numeric,
    grr numeric,
    ltv numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT r.period, r.currency, r.start_mrr, r.new, r.expansion, r.contraction, r.churn,
        r.reactivation, r.end_mrr, r.start_accounts, r.new_accounts, r.churned_accounts,
        r.reactivated_accounts, r.end_accounts, r.nrr, r.grr, r.ltv
    FROM analytics._mrr_report(p_period, p_from, p_to, p_account, false) AS r
    ORDER BY r.period, r.currency;
END
$$;
COMMENT ON FUNCTION analytics.mrr_movements(text, timestamptz, timestamptz, text) IS
    'How monthly recurring revenue moved by day, week or month inside [p_from, p_to) (NULL: as far '
    'as events go), in each currency from its first movement on: start + new + reactivation + '
    'expansion - contraction - churn = end, in amounts (and without expansion and contraction in '
    'accounts). nrr: MRR at the end of the accounts that had MRR at the start, over that; grr: the '
    'same with no account above what it had. ltv: MRR per account at the end / share of the '
    'accounts at the start that churned in a month; NULL where nobody churned.';

CREATE FUNCTION analytics.mrr_problems(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    event_id uuid,
    occurred_at timestamptz,
    event_type text,
    account_id text,
    problem text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT e.event_id, e.occurred_at, e.event_type, e.account_id, e.problem
    FROM analytics._subscription_events(p_account) AS e
    WHERE e.problem IS NOT NULL
        AND (p_from IS NULL OR e.occurred_at >= p_from)
        AND (p_to IS NULL OR e.occurred_at < p_to)
    ORDER BY e.occurred_at, e.event_id;
END
$$;
COMMENT ON FUNCTION analytics.mrr_problems(timestamptz, timestamptz, text) IS
    'The subscription events of [p_from, p_to) that MRR leaves out, and why: no account, or a '
    'property that cannot be read.';
-- Room 60, standing recurring revenue. Its unit is the account: a refresh brings the subscription
-- events of the accounts in the news up to date, makes what these accounts contribute to weeks and
-- months again, by the rule of analytics.mrr_movements, and moves the sums by the difference. What
-- an account contributed so far is what its own rows show.

CREATE FUNCTION spectrum._create_mrr()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_mrr_movements') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_subscription_events (
        report_id integer NOT NULL,
        account_key bigint NOT NULL,
        event_id uuid NOT NULL,
        occurred_at timestamptz NOT NULL,
        place integer NOT NULL,
        subscription text NOT NULL,
        mrr numeric NOT NULL,
        currency text COLLATE "C",
        CONSTRAINT rollup_subscription_events_pkey PRIMARY KEY (report_id, account_key, event_id)
    );
    COMMENT ON TABLE spectrum.rollup_subscription_events IS
        'The subscription events of each account, as analytics._read_subscription reads them; '
        'without those that it cannot read.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.report_id IS
        'spectrum.reports, kind mrr.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.account_key IS
        'dim_accounts; never the unknown account.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.place IS 'Among events of one time.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.mrr IS
        'What the subscription pays a month from then on.';
    COMMENT ON COLUMN spectrum.rollup_subscription_events.currency IS 'NULL where it is cancelled.';

    CREATE TABLE analytics.mv_mrr_movements (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        period_kind text COLLATE "C" NOT NULL,
        currency text COLLATE "C" NOT NULL,
        period date NOT NULL,
        movements bigint NOT NULL,
        new numeric NOT NULL,
        expansion numeric NOT NULL,
        contraction numeric NOT NULL,
        churn numeric NOT NULL,
        reactivation numeric NOT NULL,
        change numeric NOT NULL,
        net_change numeric NOT NULL,
        gross_change numeric NOT NULL,
        new_accounts bigint NOT NULL,
        churned_accounts bigint NOT NULL,
        reactivated_accounts bigint NOT NULL,
        accounts_change bigint NOT NULL,
        CONSTRAINT mv_mrr_movements_pkey
        PRIMARY KEY (report_id, account_id, period_kind, currency, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_mrr_movements IS
        'What moved MRR per account, week or month, and currency, and for all accounts together '
        '(account_id *), kept by refreshes; periods in which nothing moved are no rows. Read it '
        'through analytics.mrr_movements.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.report_id IS 'spectrum.reports, kind mrr.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.period_kind IS 'week or month.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.period IS 'First day, in config.timezone.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.movements IS 'How many; 0: the row goes.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.change IS 'MRR at the end less that at the start.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.net_change IS
        'The same of the accounts with MRR at the start.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.gross_change IS
        'The same again, with no account counted above what it had.';
    COMMENT ON COLUMN analytics.mv_mrr_movements.accounts_change IS
        'Accounts with MRR at the end less those at the start.';

    PERFORM spectrum._create_mrr_view();
    PERFORM spectrum._add_kind('mrr', 85, '_maintain_mrr',
        '{spectrum.rollup_subscription_events, analytics.mv_mrr_movements}', '{mrr_movements}');
    PERFORM spectrum._begin_report('mrr');
END
$$;
COMMENT ON FUNCTION spectrum._create_mrr() IS
    'Room 60: makes rollup_subscription_events, mv_mrr_movements and its plain view.';

CREATE FUNCTION spectrum._create_mrr_view()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.mrr_movements AS
    SELECT
        b.account_id, b.period_kind, b.period, b.currency,
        trim_scale(b.end_mrr - b.change) AS start_mrr,
        trim_scale(b.new) AS new,
        trim_scale(b.expansion) AS expansion,
        trim_scale(b.contraction) AS contraction,
        trim_scale(b.churn) AS churn,
        trim_scale(b.reactivation) AS reactivation,
        trim_scale(b.end_mrr) AS end_mrr,
        b.end_accounts - b.accounts_change AS start_accounts,
        b.new_accounts, b.churned_accounts, b.reactivated_accounts, b.end_accounts,
        trim_scale(
            trim_scale(b.end_mrr - b.change + b.net_change)
            / nullif(trim_scale(b.end_mrr - b.change), 0)
        ) AS nrr,
        trim_scale(
            trim_scale(b.end_mrr - b.change + b.gross_change)
            / nullif(trim_scale(b.end_mrr - b.change), 0)
        ) AS grr,
        trim_scale(
            trim_scale(b.end_mrr) * nullif(b.end_accounts - b.accounts_change, 0) * 12
            / nullif(b.end_accounts * b.churned_accounts * b.per_year, 0)
        ) AS ltv,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT
            first.account_id, first.period_kind, calendar.start::date AS period, first.currency,
            kind.per_year,
            coalesce(sums.new, 0) AS new,
            coalesce(sums.expansion, 0) AS expansion,
            coalesce(sums.contraction, 0) AS contraction,
            coalesce(sums.churn, 0) AS churn,
            coalesce(sums.reactivation, 0) AS reactivation,
            coalesce(sums.change, 0) AS change,
            coalesce(sums.net_change, 0) AS net_change,
            coalesce(sums.gross_change, 0) AS gross_change,
            coalesce(sums.new_accounts, 0) AS new_accounts,
            coalesce(sums.churned_accounts, 0) AS churned_accounts,
            coalesce(sums.reactivated_accounts, 0) AS reactivated_accounts,
            coalesce(sums.accounts_change, 0) AS accounts_change,
            sum(sums.change) OVER so_far AS end_mrr,
            (sum(sums.accounts_change) OVER so_far)::bigint AS end_accounts
        FROM (
            SELECT known.report_id, known.account_id, known.period_kind, known.currency,
                min(known.period) AS period
            FROM analytics.mv_mrr_movements AS known
            WHERE known.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'mrr' AND report.state = 'served'
            )
            GROUP BY known.report_id, known.account_id, known.period_kind, known.currency
        ) AS first
        JOIN (
            VALUES ('week', interval '1 week', 52), ('month', interval '1 month', 12)
        ) AS kind (name, step, per_year) ON kind.name = first.period_kind
        CROSS JOIN LATERAL generate_series(first.period::timestamp, (
            SELECT max(events.day) FROM analytics.mv_daily_events AS events
            WHERE events.report_id = (
                SELECT report.report_id FROM spectrum.reports AS report
                WHERE report.kind = 'volume' AND report.state = 'served'
            ) AND events.account_id = '*'
        )::timestamp, kind.step) AS calendar (start)
        LEFT JOIN LATERAL (
            SELECT known.* FROM analytics.mv_mrr_movements AS known
            WHERE known.report_id = first.report_id AND known.account_id = first.account_id
                AND known.period_kind = first.period_kind AND known.currency = first.currency
                AND known.period = calendar.start::date
            OFFSET 0
        ) AS sums ON true
        WINDOW so_far AS (
            PARTITION BY first.account_id, first.period_kind, first.currency
            ORDER BY calendar.start
        )
    ) AS b;
    COMMENT ON VIEW analytics.mrr_movements IS
        'How MRR moved, by account (* is all), week or month, and currency: from the first '
        'movement of each on to the last period with an event anywhere. As the function of this '
        'name tells.';
    COMMENT ON COLUMN analytics.mrr_movements.nrr IS
        'MRR at the end of the accounts that had MRR at the start, over that.';
    COMMENT ON COLUMN analytics.mrr_movements.grr IS
        'The same with no account counted above what it had.';
    COMMENT ON COLUMN analytics.mrr_movements.ltv IS
        'MRR per account at the end / share of the accounts at the start that churned in a month; '
        'NULL where none did.';
END
$$;
COMMENT ON FUNCTION spectrum._create_mrr_view() IS 'Room 60: makes analytics.mrr_movements.';

CREATE FUNCTION analytics._move_subscription_events(p_report integer, p_built_to bigint)
RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_currency text := (SELECT s.currency FROM analytics.settings AS s);
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN (
            'subscription_started', 'subscription_changed', 'subscription_cancelled'
        )
    );
    v_accounts bigint[];
BEGIN
    -- Each fact is in one scope from 0 up.
    SELECT array_agg(DISTINCT news.account_key) INTO v_accounts
    FROM pg_temp.spectrum_news AS news
    WHERE news.event_type_key = ANY (v_keys) AND news.scope >= 0 AND news.account_key <> 0
        AND news.user_key <= p_built_to;
    IF v_accounts IS NULL THEN
        RETURN NULL;
    END IF;

    DELETE FROM spectrum.rollup_subscription_events AS known
    USING pg_temp.spectrum_news AS news
    WHERE news.sign < 0 AND news.event_type_key = ANY (v_keys) AND news.scope >= 0
        AND news.user_key <= p_built_to
        AND known.report_id = p_report AND known.account_key = news.account_key
        AND known.event_id = news.event_id;

    INSERT INTO spectrum.rollup_subscription_events (
        report_id, account_key, event_id, occurred_at, place, subscription, mrr, currency
    )
    SELECT p_report, news.account_key, news.event_id, news.occurred_at, r.place, r.subscription,
        r.mrr, r.currency
    FROM pg_temp.spectrum_news AS news
    JOIN analytics.event_types AS t USING (event_type_key)
    CROSS JOIN LATERAL analytics._read_subscription(
        t.event_type, news.properties, v_currency
    ) AS r
    -- Who leaves a scope comes with all that is his into another.
    WHERE news.sign > 0 AND NOT news.is_leaving AND news.event_type_key = ANY (v_keys)
        AND news.scope >= 0 AND news.account_key <> 0 AND news.user_key <= p_built_to
        AND r.problem IS NULL;
    RETURN v_accounts;
END
$$;
COMMENT ON FUNCTION analytics._move_subscription_events(integer, bigint) IS
    'Brings rollup_subscription_events up to the news and returns the accounts concerned.';

CREATE FUNCTION analytics._kept_mrr_contributions(p_report integer, p_account_keys bigint[])
RETURNS TABLE (
    account_key bigint,
    period_kind text,
    currency text,
    period date,
    movements bigint,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    change numeric,
    net_change numeric,
    gross_change numeric,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    accounts_change bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH histories AS (
        SELECT array_agg(e.account_key) AS account_keys, array_agg(e.occurred_at) AS times,
            array_agg(e.place) AS places, array_agg(e.event_id) AS event_ids,
            array_agg(e.subscription) AS subscriptions, array_agg(e.mrr) AS mrr,
            array_agg(e.currency) AS currencies
        FROM unnest(p_account_keys) AS touched (account_key)
        CROSS JOIN LATERAL (
            SELECT known.* FROM spectrum.rollup_subscription_events AS known
            WHERE known.report_id = p_report AND known.account_key = touched.account_key
            OFFSET 0
        ) AS e
    ),
    movements AS (
        SELECT array_agg(m.account_key) AS account_keys, array_agg(m.currency) AS currencies,
            array_agg(m.moved_at) AS moved_at, array_agg(m.movement) AS movements,
            array_agg(m.mrr_before) AS mrr_before, array_agg(m.mrr_after) AS mrr_after,
            min(m.moved_at) AS first_at, max(m.moved_at) + interval '1 us' AS end_at
        FROM histories AS h
        CROSS JOIN LATERAL analytics._mrr_movements(
            h.account_keys, h.times, h.places, h.event_ids, h.subscriptions, h.mrr, h.currencies
        ) AS m
    ),
    calendars AS MATERIALIZED (
        SELECT kind.name, s.starts, analytics._period_dates(s.starts) AS dates
        FROM movements AS m
        CROSS JOIN (VALUES ('week'), ('month')) AS kind (name)
        CROSS JOIN LATERAL spectrum.period_starts(kind.name, m.first_at, m.end_at) AS s (starts)
    )
    SELECT c.account_key, k.name, c.currency, k.dates[c.period_number], c.movements, c.new,
        c.expansion, c.contraction, c.churn, c.reactivation, c.change, c.net_change,
        c.gross_change, c.new_accounts, c.churned_accounts, c.reactivated_accounts,
        c.accounts_change
    FROM calendars AS k
    CROSS JOIN movements AS m
    CROSS JOIN LATERAL analytics._mrr_contributions(
        m.account_keys, m.currencies, m.moved_at, m.movements, m.mrr_before, m.mrr_after,
        k.starts, m.first_at, m.end_at
    ) AS c;
END
$$;
COMMENT ON FUNCTION analytics._kept_mrr_contributions(integer, bigint[]) IS
    'What some accounts contribute by rollup_subscription_events.';

CREATE FUNCTION analytics._maintain_mrr(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_account_keys bigint[] := analytics._move_subscription_events(p_report, p_built_to);
    v_account_ids text[];
BEGIN
    IF v_account_keys IS NULL THEN
        RETURN;
    END IF;
    v_account_ids := ARRAY(
        SELECT dim.account_id FROM warehouse.dim_accounts AS dim
        WHERE dim.account_key = ANY (v_account_keys)
    );

    INSERT INTO analytics.mv_mrr_movements AS sums
    SELECT p_report, scopes.account_id, moved.period_kind, moved.currency, moved.period,
        sum(moved.sign * moved.movements), sum(moved.sign * moved.new),
        sum(moved.sign * moved.expansion), sum(moved.sign * moved.contraction),
        sum(moved.sign * moved.churn), sum(moved.sign * moved.reactivation),
        sum(moved.sign * moved.change), sum(moved.sign * moved.net_change),
        sum(moved.sign * moved.gross_change), sum(moved.sign * moved.new_accounts),
        sum(moved.sign * moved.churned_accounts), sum(moved.sign * moved.reactivated_accounts),
        sum(moved.sign * moved.accounts_change)
    FROM (
        SELECT 1 AS sign, dim.account_id, c.period_kind, c.currency, c.period, c.movements, c.new,
            c.expansion, c.contraction, c.churn, c.reactivation, c.change, c.net_change,
            c.gross_change, c.new_accounts, c.churned_accounts, c.reactivated_accounts,
            c.accounts_change
        FROM analytics._kept_mrr_contributions(p_report, v_account_keys) AS c
        JOIN warehouse.dim_accounts AS dim USING (account_key)
        UNION ALL
        SELECT -1, known.account_id, known.period_kind, known.currency, known.period,
            known.movements, known.new, known.expansion, known.contraction, known.churn,
            known.reactivation, known.change, known.net_change, known.gross_change,
            known.new_accounts, known.churned_accounts, known.reactivated_accounts,
            known.accounts_change
        FROM analytics.mv_mrr_movements AS known
        WHERE known.report_id = p_report AND known.account_id = ANY (v_account_ids)
    ) AS moved
    CROSS JOIN LATERAL (VALUES (moved.account_id), ('*')) AS scopes (account_id)
    GROUP BY scopes.account_id, moved.period_kind, moved.currency, moved.period
    HAVING (
        sum(moved.sign * moved.movements), sum(moved.sign * moved.new),
        sum(moved.sign * moved.expansion), sum(moved.sign * moved.contraction),
        sum(moved.sign * moved.churn), sum(moved.sign * moved.reactivation),
        sum(moved.sign * moved.change), sum(moved.sign * moved.net_change),
        sum(moved.sign * moved.gross_change), sum(moved.sign * moved.new_accounts),
        sum(moved.sign * moved.churned_accounts), sum(moved.sign * moved.reactivated_accounts),
        sum(moved.sign * moved.accounts_change)
    ) <> (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    ON CONFLICT (report_id, account_id, period_kind, currency, period) DO UPDATE SET
        movements = sums.movements + excluded.movements,
        new = sums.new + excluded.new,
        expansion = sums.expansion + excluded.expansion,
        contraction = sums.contraction + excluded.contraction,
        churn = sums.churn + excluded.churn,
        reactivation = sums.reactivation + excluded.reactivation,
        change = sums.change + excluded.change,
        net_change = sums.net_change + excluded.net_change,
        gross_change = sums.gross_change + excluded.gross_change,
        new_accounts = sums.new_accounts + excluded.new_accounts,
        churned_accounts = sums.churned_accounts + excluded.churned_accounts,
        reactivated_accounts = sums.reactivated_accounts + excluded.reactivated_accounts,
        accounts_change = sums.accounts_change + excluded.accounts_change;

    DELETE FROM analytics.mv_mrr_movements AS sums
    WHERE sums.report_id = p_report AND sums.account_id = ANY (v_account_ids || '{*}')
        AND sums.movements = 0;
END
$$;
COMMENT ON FUNCTION analytics._maintain_mrr(integer, bigint) IS
    'Moves mv_mrr_movements by what the accounts in the news contribute now less what they did.';

CREATE FUNCTION analytics._standing_mrr_movements()
RETURNS TABLE (
    account_id text,
    period_kind text,
    period date,
    currency text,
    start_mrr numeric,
    new numeric,
    expansion numeric,
    contraction numeric,
    churn numeric,
    reactivation numeric,
    end_mrr numeric,
    start_accounts bigint,
    new_accounts bigint,
    churned_accounts bigint,
    reactivated_accounts bigint,
    end_accounts bigint,
    nrr numeric,
    grr numeric,
    ltv numeric
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT coalesce(accounts.account_id, '*'), kind.name, r.period, r.currency, r.start_mrr, r.new,
        r.expansion, r.contraction, r.churn, r.reactivation, r.end_mrr, r.start_accounts,
        r.new_accounts, r.churned_accounts, r.reactivated_accounts, r.end_accounts, r.nrr, r.grr,
        r.ltv
    FROM (VALUES ('week'), ('month')) AS kind (name)
    CROSS JOIN (VALUES (false), (true)) AS scope (by_account)
    CROSS JOIN LATERAL analytics._mrr_report(
        kind.name, NULL, NULL, NULL, scope.by_account
    ) AS r
    LEFT JOIN analytics.accounts ON accounts.account_key = r.account_key;
END
$$;
COMMENT ON FUNCTION analytics._standing_mrr_movements() IS
    'What analytics.mrr_movements has to show, out of all events: for verify().';
-- Room 60, sessions: what a user did at one sitting, where he came in and went out, and what had
-- brought him. Reads analytics.events; read by analytics.sessions and sessions_daily, by
-- attribution and paths.
--
-- analytics._session_starts (60_funnel_walks.sql) is the one rule that cuts. It only looks back: a
-- session begins where it does whatever comes later, and nothing before its start matters. So a
-- cut that begins where a session does, or after a gap of more than 30 minutes, is exact.

CREATE AGGREGATE analytics._cut_sessions(timestamptz) (
    SFUNC = pg_catalog.array_append,
    STYPE = timestamptz[],
    FINALFUNC = analytics._session_starts,
    INITCOND = '{}',
    PARALLEL = SAFE
);
COMMENT ON AGGREGATE analytics._cut_sessions(timestamptz) IS
    '_session_starts of a column: OVER all rows of one user, which have to come in their order.';

CREATE FUNCTION analytics._read_touch(p_properties jsonb)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_touch text[] := ARRAY[
        nullif(p_properties ->> 'utm_source', ''),
        nullif(p_properties ->> 'utm_medium', ''),
        nullif(p_properties ->> 'utm_campaign', ''),
        nullif(p_properties ->> 'referrer', '')
    ];
BEGIN
    RETURN CASE WHEN num_nonnulls(VARIADIC v_touch) > 0 THEN v_touch END;
END
$$;
COMMENT ON FUNCTION analytics._read_touch(jsonb) IS
    'UTM source, medium and campaign, and the referrer, of an event: an array as text. NULL where '
    'it has none of them.';

CREATE FUNCTION analytics._sessions(
    p_since timestamptz, p_until timestamptz, p_users bigint[], p_scopes bigint[],
    p_sinces timestamptz[], p_untils timestamptz[], p_account text, p_parts text[]
)
RETURNS TABLE (
    scope bigint, user_key bigint, user_id text, started_at timestamptz, ended_at timestamptz,
    events integer, page_views integer, is_bounce boolean, entry_page text, exit_page text,
    touch text[], place text[], last_place text[], steps integer[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_page_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('page_view', '$pageview')
    );
    v_first timestamptz := (SELECT min(w.since) FROM unnest(p_sinces) AS w (since));
    v_last timestamptz := (SELECT max(w.until) FROM unnest(p_untils) AS w (until));
BEGIN
    -- The arguments are constants of this plan: of the event view it reads only what the parts ask
    -- for. The last grouping is a prefix of the order below it, so arrays are built in that order.
    RETURN QUERY
    SELECT
        CASE WHEN p_scopes IS NOT NULL THEN s.scope END, s.user_key, min(s.user_id),
        min(s.occurred_at), max(s.occurred_at), count(*)::integer, count(s.page)::integer,
        CASE WHEN count(s.page) > 0 THEN count(s.page) ELSE count(*) END = 1,
        nullif((array_agg(s.page) FILTER (WHERE s.page IS NOT NULL))[1], ''),
        nullif((array_agg(s.page) FILTER (WHERE s.page IS NOT NULL))[count(s.page)], ''),
        ((array_agg(s.touch))[1])::text[],
        ((array_agg(s.place) FILTER (WHERE s.place IS NOT NULL))[1])::text[],
        ((array_agg(s.place) FILTER (WHERE s.place IS NOT NULL))[count(s.place)])::text[],
        CASE WHEN 'steps' = ANY (p_parts) THEN array_agg(s.event_type_key) END
    FROM (
        SELECT o.*, width_bucket(o.occurred_at, analytics._cut_sessions(o.occurred_at) OVER (
            PARTITION BY CASE WHEN p_scopes IS NOT NULL THEN o.scope END, o.user_key
            ORDER BY o.occurred_at, o.event_id
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
        )) AS number
        FROM (
            SELECT
                e.scope, e.user_key, e.occurred_at, e.event_id,
                CASE WHEN 'users' = ANY (p_parts) THEN e.user_id END AS user_id,
                CASE WHEN 'steps' = ANY (p_parts) THEN e.event_type_key END AS event_type_key,
                CASE WHEN 'pages' = ANY (p_parts) AND e.event_type_key = ANY (v_page_keys) THEN
                    coalesce(nullif(e.properties ->> 'path', ''),
                        nullif(e.properties ->> 'url', ''), e.properties ->> 'page', '')
                END AS page,
                CASE WHEN 'touches' = ANY (p_parts)
                    AND e.properties ?| '{utm_source, utm_medium, utm_campaign, referrer}'
                THEN analytics._read_touch(e.properties) END AS touch,
                CASE WHEN 'places' = ANY (p_parts)
                    AND num_nonnulls(e.country, e.region, e.city) > 0
                THEN ARRAY[e.country, e.region, e.city]::text END AS place
            FROM (
                SELECT a.*, NULL::bigint AS scope FROM analytics.events AS a
                WHERE a.occurred_at >= p_since AND a.occurred_at < p_until
                UNION ALL
                SELECT a.*, NULL
                FROM unnest(p_users, p_sinces, p_untils) AS w (user_key, since, until)
                JOIN analytics.events AS a
                    ON a.user_key = w.user_key
                    AND a.occurred_at >= w.since AND a.occurred_at < w.until
                -- Tells the planner which months to leave out.
                WHERE p_scopes IS NULL AND a.occurred_at >= v_first AND a.occurred_at < v_last
                UNION ALL
                SELECT a.*, w.scope
                FROM unnest(p_users, p_scopes, p_sinces, p_untils)
                    AS w (user_key, scope, since, until)
                -- Many short windows anywhere: a look-up each, in any plan.
                CROSS JOIN LATERAL (
                    SELECT known.* FROM analytics.events AS known
                    WHERE known.user_key = w.user_key
                        AND known.occurred_at >= w.since AND known.occurred_at < w.until
                        AND (w.scope >= 0 OR known.account_key = -w.scope)
                    OFFSET 0
                ) AS a
                WHERE p_scopes IS NOT NULL
            ) AS e
            WHERE e.user_key <> 0 AND (p_account IS NULL OR e.account_id = p_account)
        ) AS o
        ORDER BY CASE WHEN p_scopes IS NOT NULL THEN o.scope END, o.user_key, number,
            o.occurred_at, o.event_id
    ) AS s
    GROUP BY CASE WHEN p_scopes IS NOT NULL THEN s.scope END, s.user_key, s.number;
END
$$;
COMMENT ON FUNCTION analytics._sessions(
    timestamptz, timestamptz, bigint[], bigint[], timestamptz[], timestamptz[], text, text[]
) IS
    'Cuts events into sessions: those of [p_since, p_until) (NULL: none) and, of each of p_users, '
    'those of [since, until), which must not overlap them. For one account or (NULL) for all '
    'together; or, with p_scopes beside p_users, for each user and scope by itself (scope -a: his '
    'events of account a alone; else all of them). What p_parts does not name is left out: '
    'users (user_id), pages (page_views, entry_page and exit_page; without them a bounce is one '
    'event), touches (UTM source, medium, campaign and referrer of the first event), places '
    '(country, region, city of the first and last event that has one), steps (event types in '
    'order). Events at one time are in the order of their ids.';

CREATE FUNCTION analytics._session_users_across(p_at timestamptz)
RETURNS bigint[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN ARRAY(
        SELECT e.user_key
        FROM analytics.events AS e
        WHERE e.user_key <> 0
            AND e.occurred_at >= p_at
            AND e.occurred_at < p_at + interval '24 hours'
        GROUP BY e.user_key
        HAVING bit_or(
            1::bigint << floor(extract(epoch FROM e.occurred_at - p_at) / 1800)::integer
        ) = (1::bigint << 48) - 1
    );
END
$$;
COMMENT ON FUNCTION analytics._session_users_across(timestamptz) IS
    'The users who may have gone on from before p_at to 24 hours after it with no gap of more than '
    '30 minutes: who have an event in each half hour. For all others a cut that begins at p_at is '
    'exact from 24 hours after it on.';

CREATE FUNCTION analytics._sessions_between(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_parts text[]
)
RETURNS TABLE (
    scope bigint, user_key bigint, user_id text, started_at timestamptz, ended_at timestamptz,
    events integer, page_views integer, is_bounce boolean, entry_page text, exit_page text,
    touch text[], place text[], last_place text[], steps integer[]
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_since timestamptz := '-infinity'::timestamptz;
    v_until timestamptz := 'infinity'::timestamptz;
    v_users bigint[] := '{}'::bigint[];
BEGIN
    IF p_from > '0001-01-01 00:00+00' THEN
        v_since := p_from - interval '24 hours';
        v_users := analytics._session_users_across(v_since);
    END IF;
    -- An event more than 24 hours after the start of a session is not part of it.
    IF p_to < '9999-01-01 00:00+00' THEN
        v_until := p_to + interval '24 hours';
    END IF;
    RETURN QUERY
    SELECT s.*
    FROM analytics._sessions(
        v_since, v_until, v_users, NULL,
        array_fill('-infinity'::timestamptz, ARRAY[cardinality(v_users)]),
        array_fill(v_since, ARRAY[cardinality(v_users)]),
        p_account, p_parts
    ) AS s
    WHERE (p_from IS NULL OR s.started_at >= p_from) AND (p_to IS NULL OR s.started_at < p_to);
END
$$;
COMMENT ON FUNCTION analytics._sessions_between(
    timestamptz, timestamptz, text, text[]
) IS
    'The sessions that begin in [p_from, p_to), see _sessions: reads the events of that time and '
    'of 24 hours on either side, and the history only of users who were active throughout.';

CREATE FUNCTION analytics._referrer_host(p_referrer text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN substring(
        lower(p_referrer) FROM '^(?:[a-z][a-z0-9+.-]*://)?(?:[^/?#@]*@)?(?:www\.)?([^/?#:]+)'
    );
END
$$;
COMMENT ON FUNCTION analytics._referrer_host(text) IS
    'The host that a referrer names, without www.; NULL where it names none.';

CREATE FUNCTION analytics._channel(p_touch text[])
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_medium text := translate(lower(p_touch[2]), '_- ', '');
    v_host text;
BEGIN
    IF p_touch IS NULL THEN
        RETURN 'direct';
    ELSIF num_nonnulls(p_touch[1], p_touch[2], p_touch[3]) > 0 THEN
        RETURN CASE
            WHEN v_medium IN ('cpc', 'ppc', 'sem', 'paid', 'paidsearch') THEN 'paid search'
            WHEN v_medium = 'paidsocial' THEN 'paid social'
            WHEN v_medium IN ('display', 'banner', 'cpm') THEN 'display'
            WHEN v_medium IN ('email', 'newsletter') THEN 'email'
            WHEN v_medium IN ('social', 'socialmedia', 'socialnetwork') THEN 'social'
            WHEN v_medium IN ('affiliate', 'affiliates') THEN 'affiliate'
            WHEN v_medium = 'organic' THEN 'organic search'
            WHEN v_medium = 'referral' THEN 'referral'
            ELSE 'other'
        END;
    END IF;
    v_host := analytics._referrer_host(p_touch[4]);
    RETURN CASE
        WHEN v_host ~ (
            '^(?:(?:[a-z]{2}|m|search)\.)?'
            '(?:google|bing|duckduckgo|yahoo|yandex|baidu|ecosia|qwant)\.[a-z]{2,3}(?:\.[a-z]{2})?$'
        ) THEN 'organic search'
        WHEN v_host ~ (
            '^(?:[a-z]{1,3}\.)?'
            '(?:facebook|instagram|linkedin|pinterest|reddit|tiktok|twitter|youtube)\.com$'
        ) OR v_host IN ('t.co', 'x.com', 'lnkd.in', 'youtu.be') THEN 'social'
        ELSE 'referral'
    END;
END
$$;
COMMENT ON FUNCTION analytics._channel(text[]) IS
    'The channel of a touch: by its UTM medium where it has UTM tags, else by the host of its '
    'referrer; direct where there is no touch.';

CREATE FUNCTION analytics._session_label(
    p_breakdown text, p_touch text[], p_place text[], p_entry_page text, p_exit_page text
)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE p_breakdown
        WHEN 'country' THEN p_place[1]
        WHEN 'region' THEN p_place[2]
        WHEN 'city' THEN p_place[3]
        WHEN 'entry_page' THEN p_entry_page
        WHEN 'exit_page' THEN p_exit_page
        WHEN 'utm_source' THEN p_touch[1]
        WHEN 'utm_medium' THEN p_touch[2]
        WHEN 'utm_campaign' THEN p_touch[3]
        WHEN 'channel' THEN analytics._channel(p_touch)
    END;
END
$$;
COMMENT ON FUNCTION analytics._session_label(text, text[], text[], text, text) IS
    'The value of a session in a breakdown of sessions_daily.';

CREATE FUNCTION analytics.sessions(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    user_id text,
    started_at timestamptz,
    ended_at timestamptz,
    seconds double precision,
    events integer,
    page_views integer,
    is_bounce boolean,
    entry_page text,
    exit_page text,
    channel text,
    utm_source text,
    utm_medium text,
    utm_campaign text,
    referrer text,
    country text,
    region text,
    city text,
    last_country text,
    last_region text,
    last_city text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT
        s.user_id, s.started_at, s.ended_at,
        extract(epoch FROM s.ended_at - s.started_at)::double precision,
        s.events, s.page_views, s.is_bounce, s.entry_page, s.exit_page,
        analytics._channel(s.touch), s.touch[1], s.touch[2], s.touch[3], s.touch[4],
        s.place[1], s.place[2], s.place[3], s.last_place[1], s.last_place[2], s.last_place[3]
    FROM analytics._sessions_between(
        p_from, p_to, p_account, '{users, pages, touches, places}'
    ) AS s
    ORDER BY s.started_at, s.user_id;
END
$$;
COMMENT ON FUNCTION analytics.sessions(timestamptz, timestamptz, text) IS
    'The sessions that begin in [p_from, p_to), one row each, exact: a new one begins after a gap '
    'of more than 30 minutes, and with an event more than 24 hours after the start. A bounce has '
    'one page view (event type page_view or $pageview) or, where there are none, one event. Pages '
    'are the property path, else url, else page, of the first and the last page view. UTM tags '
    'and referrer are those of the first event, places those of the first and the last event with '
    'a known one. p_account: of the events of that account alone.';

CREATE FUNCTION analytics.sessions_daily(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL,
    p_breakdown text DEFAULT NULL
)
RETURNS TABLE (
    day date, breakdown text, sessions bigint, users bigint, bounces bigint,
    bounce_rate double precision, mean_seconds double precision, median_seconds double precision,
    events bigint, page_views bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
    v_days date[];
    v_parts text[] := CASE
        WHEN p_breakdown IN ('country', 'region', 'city') THEN '{pages, places}'::text[]
        WHEN p_breakdown IN ('utm_source', 'utm_medium', 'utm_campaign', 'channel')
            THEN '{pages, touches}'::text[]
        ELSE '{pages}'::text[]
    END;
    v_model text := CASE p_breakdown WHEN 'first_touch' THEN 'first' WHEN 'last_touch' THEN 'last'
    END;
    v_users bigint[];
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    IF p_breakdown IS NOT NULL THEN
        PERFORM spectrum._check_choice(
            'p_breakdown', p_breakdown,
            '{country, region, city, entry_page, exit_page, utm_source, utm_medium, utm_campaign, '
            'channel, first_touch, last_touch}'
        );
    END IF;
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts('day', v_from, v_to);
    v_days := analytics._period_dates(v_starts);
    v_users := ARRAY(
        SELECT DISTINCT e.user_key FROM analytics.event_keys AS e
        WHERE v_model IS NOT NULL AND e.user_key <> 0
            AND e.occurred_at >= v_from AND e.occurred_at < v_to
    );

    RETURN QUERY
    WITH begun AS (
        SELECT
            width_bucket(s.started_at, v_starts) AS number,
            CASE WHEN v_model IS NOT NULL THEN analytics._channel(t.touch)
            ELSE analytics._session_label(
                p_breakdown, s.touch, s.place, s.entry_page, s.exit_page
            ) END AS breakdown,
            user_key, s.is_bounce, extract(epoch FROM s.ended_at - s.started_at) AS seconds,
            s.events, s.page_views
        FROM analytics._sessions_between(p_from, p_to, p_account, v_parts) AS s
        LEFT JOIN analytics._touched_sessions(v_users, p_from, p_to, v_model, p_account) AS t
            USING (user_key, started_at)
        UNION ALL
        -- A day without sessions is a row too, where there is one row a day.
        SELECT d.number, NULL, NULL, NULL, NULL, NULL, NULL
        FROM generate_series(1, cardinality(v_starts) - 1) AS d (number)
        WHERE p_breakdown IS NULL
    )
    SELECT
        v_days[b.number],
        b.breakdown,
        count(b.user_key),
        count(DISTINCT b.user_key),
        count(*) FILTER (WHERE b.is_bounce),
        avg(b.is_bounce::integer)::double precision,
        avg(b.seconds)::double precision,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY b.seconds::double precision),
        coalesce(sum(b.events), 0),
        coalesce(sum(b.page_views), 0)
    FROM begun AS b
    GROUP BY b.number, b.breakdown
    ORDER BY b.number, b.breakdown;
END
$$;
COMMENT ON FUNCTION analytics.sessions_daily(timestamptz, timestamptz, text, text) IS
    'The sessions that begin in [p_from, p_to) (NULL: from the first event of the account, to the '
    'last of any) by the day of their first event, as analytics.sessions gives them. p_breakdown: '
    'country, region, city (of the first known place), entry_page, exit_page, utm_source, '
    'utm_medium, utm_campaign, channel, first_touch or last_touch (the channel of the first or '
    'last touch in the 30 days up to and including the session). Without one a day without '
    'sessions is a row of zeros, rates and times NULL.';
-- Room 60, attribution: which visit brought a conversion. A touch is a session with UTM tags or a
-- referrer; the first or the last one in the 30 days up to and including the session of the
-- conversion gets it, or, where there is none, direct. Reads analytics.events and the sessions cut
-- from them (65_sessions.sql).

CREATE FUNCTION analytics._conversions(
    p_event_key integer,
    p_filter jsonb,
    p_from timestamptz,
    p_to timestamptz,
    p_account text
)
RETURNS TABLE (user_key bigint, occurred_at timestamptz, revenue numeric, currency text)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    SELECT e.user_key, e.occurred_at, e.revenue, e.currency
    FROM analytics.events AS e
    WHERE e.user_key <> 0
        AND e.event_type_key = p_event_key
        AND (p_filter IS NULL OR e.properties @> p_filter)
        AND (p_from IS NULL OR e.occurred_at >= p_from)
        AND (p_to IS NULL OR e.occurred_at < p_to)
        AND (p_account IS NULL OR e.account_id = p_account);
END
$$;
COMMENT ON FUNCTION analytics._conversions(integer, jsonb, timestamptz, timestamptz, text) IS
    'The events that convert, with their money.';

CREATE FUNCTION analytics._touched_sessions(
    p_users bigint[],
    p_from timestamptz,
    p_to timestamptz,
    p_model text,
    p_account text
)
RETURNS TABLE (user_key bigint, started_at timestamptz, touch text[])
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_since timestamptz := '-infinity'::timestamptz;
    v_across bigint[] := '{}'::bigint[];
    v_sinces timestamptz[];
BEGIN
    -- A conversion is up to 24 hours into its session, its touch up to 30 days before that, and
    -- the cut is exact 24 hours after its begin.
    IF p_from > '0001-01-01 00:00+00' THEN
        v_since := p_from - interval '768 hours';
        v_across := analytics._session_users_across(v_since);
    END IF;
    v_sinces := ARRAY(
        SELECT CASE WHEN a.user_key IS NULL THEN v_since ELSE '-infinity' END
        FROM unnest(p_users) WITH ORDINALITY AS u (user_key, position)
        LEFT JOIN unnest(v_across) AS a (user_key) USING (user_key)
        ORDER BY u.position
    );

    RETURN QUERY
    WITH visits AS MATERIALIZED (
        SELECT
            s.user_key,
            s.started_at,
            s.touch,
            CASE
                WHEN p_model = 'first' THEN min(s.started_at) FILTER (WHERE s.touch IS NOT NULL)
                    OVER recent
                ELSE max(s.started_at) FILTER (WHERE s.touch IS NOT NULL) OVER recent
            END AS touched_at
        FROM analytics._sessions(
            NULL, NULL, p_users, NULL, v_sinces,
            array_fill(coalesce(p_to, 'infinity'), ARRAY[cardinality(p_users)]),
            p_account, '{touches}'
        ) AS s
        WINDOW recent AS (
            PARTITION BY s.user_key ORDER BY s.started_at
            RANGE BETWEEN interval '720 hours' PRECEDING AND CURRENT ROW
        )
    )
    SELECT v.user_key, v.started_at, t.touch
    FROM visits AS v
    LEFT JOIN visits AS t ON t.user_key = v.user_key AND t.started_at = v.touched_at;
END
$$;
COMMENT ON FUNCTION analytics._touched_sessions(
    bigint[], timestamptz, timestamptz, text, text
) IS
    'Every session of the users that a conversion in [p_from, p_to) can be in, and the touch that '
    'gets such a conversion; NULL is direct. (Of earlier sessions it also gives some.)';

CREATE FUNCTION analytics.attribution(
    p_conversion jsonb,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_model text DEFAULT 'last',
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    channel text,
    source text,
    medium text,
    campaign text,
    currency text,
    conversions bigint,
    users bigint,
    revenue numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_key integer;
    v_filter jsonb;
    v_users bigint[];
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM spectrum._check_choice('p_model', p_model, '{last, first}');
    SELECT t.event_type_key, s.filter INTO v_key, v_filter
    FROM analytics._read_steps('p_conversion', jsonb_build_array(p_conversion)) AS s
    LEFT JOIN analytics.event_types AS t USING (event_type);
    v_users := ARRAY(
        SELECT DISTINCT c.user_key
        FROM analytics._conversions(v_key, v_filter, p_from, p_to, p_account) AS c
    );

    RETURN QUERY
    WITH touched AS MATERIALIZED (
        SELECT t.user_key, t.started_at, t.touch
        FROM analytics._touched_sessions(v_users, p_from, p_to, p_model, p_account) AS t
    ),
    histories AS (
        SELECT t.user_key, array_agg(t.started_at ORDER BY t.started_at) AS starts
        FROM touched AS t
        GROUP BY t.user_key
    ),
    attributed AS (
        SELECT
            c.user_key, c.revenue,
            CASE WHEN c.revenue IS NOT NULL THEN c.currency END AS currency,
            t.touch
        FROM analytics._conversions(v_key, v_filter, p_from, p_to, p_account) AS c
        JOIN histories AS h USING (user_key)
        JOIN touched AS t
            ON t.user_key = c.user_key
            AND t.started_at = h.starts[width_bucket(c.occurred_at, h.starts)]
    )
    SELECT
        analytics._channel(a.touch) AS channel,
        CASE
            WHEN num_nonnulls(a.touch[1], a.touch[2], a.touch[3]) > 0 THEN a.touch[1]
            ELSE analytics._referrer_host(a.touch[4])
        END AS source,
        a.touch[2] AS medium,
        a.touch[3] AS campaign,
        a.currency,
        count(*) AS conversions,
        count(DISTINCT a.user_key) AS users,
        sum(a.revenue) AS revenue
    FROM attributed AS a
    GROUP BY 1, 2, 3, 4, 5
    ORDER BY 6 DESC, 1, 2, 3, 4, 5;
END
$$;
COMMENT ON FUNCTION analytics.attribution(jsonb, timestamptz, timestamptz, text, text) IS
    'Who brought the conversions of [p_from, p_to): for each touch their number, the users and the '
    'sum of their revenue by currency (NULL: conversions without money). p_conversion: "purchase" '
    'or {"event": "purchase", "where": {"plan": "pro"}}. p_model: the last or the first session '
    'with UTM tags or a referrer in the 30 days up to and including the session of the conversion, '
    'else direct. source is utm_source, or the host of the referrer where there are no UTM tags. '
    'p_account: of the events of that account alone.';
-- Room 60, standing sessions, how they are kept: a refresh cuts again only the sessions around the
-- news, from the one that they fall into or follow, to the first one later on that begins after a
-- gap. In between lies an unbroken island of events, where the end of a session after 24 hours
-- moves all that follow. What changed about sessions moves the sums.

CREATE FUNCTION analytics._touch_sessions(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_session_windows (user_key, scope, is_leaving, since, until)
    WITH moments AS (
        SELECT news.user_key, news.scope, news.occurred_at,
            coalesce(news.occurred_at - lag(news.occurred_at) OVER unit > interval '30 minutes',
                true) AS is_apart
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to AND NOT news.is_leaving
        WINDOW unit AS (PARTITION BY news.user_key, news.scope ORDER BY news.occurred_at)
    ),
    bursts AS (
        SELECT user_key, scope, min(occurred_at) AS first_at, max(occurred_at) AS last_at
        FROM (
            SELECT moments.*, count(*) FILTER (WHERE is_apart) OVER (
                PARTITION BY user_key, scope ORDER BY occurred_at
            ) AS number
            FROM moments
        ) AS numbered
        GROUP BY user_key, scope, number
    ),
    windows AS (
        SELECT bursts.user_key, bursts.scope,
            CASE WHEN before.session_end >= bursts.first_at - interval '30 minutes'
                THEN before.session_start ELSE bursts.first_at END AS since,
            coalesce(later.session_start, 'infinity') AS until
        FROM bursts
        LEFT JOIN LATERAL (
            SELECT known.session_start, known.session_end
            FROM spectrum.rollup_sessions AS known
            WHERE known.report_id = p_report AND known.user_key = bursts.user_key
                AND known.scope = bursts.scope AND known.session_start <= bursts.first_at
            ORDER BY known.session_start DESC
            LIMIT 1
        ) AS before ON true
        LEFT JOIN LATERAL (
            SELECT known.session_start FROM spectrum.rollup_sessions AS known
            WHERE known.report_id = p_report AND known.user_key = bursts.user_key
                AND known.scope = bursts.scope AND known.session_start > bursts.last_at
                AND NOT EXISTS (
                    SELECT FROM warehouse.fact_events AS fact
                    WHERE fact.user_key = bursts.user_key
                        AND fact.occurred_at >= known.session_start - interval '30 minutes'
                        AND fact.occurred_at < known.session_start
                        AND (bursts.scope >= 0 OR fact.account_key = -bursts.scope)
                    OFFSET 0
                )
            ORDER BY known.session_start
            LIMIT 1
        ) AS later ON true
    ),
    disjoint_windows AS (
        SELECT windows.*, coalesce(since >= max(until) OVER (
            PARTITION BY user_key, scope ORDER BY since, until
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), true) AS is_apart
        FROM windows
    )
    SELECT user_key, scope, false, min(since), max(until)
    FROM (
        SELECT disjoint_windows.*, count(*) FILTER (WHERE is_apart) OVER (
            PARTITION BY user_key, scope ORDER BY since, until
        ) AS number
        FROM disjoint_windows
    ) AS numbered
    GROUP BY user_key, scope, number;
END
$$;
COMMENT ON FUNCTION analytics._touch_sessions(integer, bigint) IS
    'Lays out, in pg_temp.spectrum_session_windows, the times [since, until) whose sessions the '
    'news can change. since: the start of the session that the news fall into or follow within 30 '
    'minutes, because a session begins where it does whatever comes later; else the news. until: '
    'the first start later on with no event in the 30 minutes before, because a session begins '
    'there whatever comes earlier.';

CREATE FUNCTION analytics._touch_sessions_whole(p_built_to bigint, p_is_build boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_windows',
        'user_key bigint, scope bigint, is_leaving boolean, since timestamptz, '
        'until timestamptz');
    INSERT INTO pg_temp.spectrum_session_windows (user_key, scope, is_leaving, since, until)
    SELECT DISTINCT news.user_key, news.scope, news.is_leaving,
        '-infinity'::timestamptz, 'infinity'::timestamptz
    FROM pg_temp.spectrum_news AS news
    WHERE (p_is_build OR news.is_leaving) AND news.user_key <> 0 AND news.user_key <= p_built_to;
END
$$;
COMMENT ON FUNCTION analytics._touch_sessions_whole(bigint, boolean) IS
    'Begins pg_temp.spectrum_session_windows with whom the news concern whole: users who leave a '
    'scope, or, in a report that is being built, all.';

CREATE FUNCTION analytics._find_session_changes(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    r_windows record;
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_changes',
        'sign integer, LIKE spectrum.rollup_sessions');
    SELECT array_agg(known.user_key) AS users, array_agg(known.scope) AS scopes,
        array_agg(known.since) AS sinces, array_agg(known.until) AS untils
    INTO r_windows
    FROM pg_temp.spectrum_session_windows AS known
    WHERE NOT known.is_leaving;

    INSERT INTO pg_temp.spectrum_session_changes
    WITH old_sessions AS (
        SELECT known.*
        FROM pg_temp.spectrum_session_windows AS touched
        CROSS JOIN LATERAL (
            SELECT kept.* FROM spectrum.rollup_sessions AS kept
            WHERE kept.report_id = p_report AND kept.user_key = touched.user_key
                AND kept.scope = touched.scope
                AND kept.session_start >= touched.since AND kept.session_start < touched.until
            OFFSET 0
        ) AS known
    ),
    new_sessions AS (
        SELECT p_report, s.user_key, s.scope, s.started_at, s.ended_at, s.events, s.page_views,
            s.is_bounce, s.place[1], s.place[2], s.place[3], s.entry_page, s.exit_page,
            s.touch[1], s.touch[2], s.touch[3], s.touch[4], s.channel,
            coalesce(old.first_touch, s.channel), coalesce(old.last_touch, s.channel)
        FROM (
            SELECT cut.*, analytics._channel(cut.touch) AS channel
            FROM analytics._sessions(
                NULL, NULL, r_windows.users, coalesce(r_windows.scopes, '{}'), r_windows.sinces,
                r_windows.untils, NULL, '{pages, touches, places}'
            ) AS cut
            OFFSET 0
        ) AS s
        LEFT JOIN old_sessions AS old
            ON old.user_key = s.user_key AND old.scope = s.scope
                AND old.session_start = s.started_at
    )
    SELECT -1, gone.* FROM (TABLE old_sessions EXCEPT TABLE new_sessions) AS gone
    UNION ALL
    SELECT 1, come.* FROM (TABLE new_sessions EXCEPT TABLE old_sessions) AS come;
END
$$;
COMMENT ON FUNCTION analytics._find_session_changes(integer) IS
    'Cuts the windows laid out again and leaves in pg_temp.spectrum_session_changes which sessions '
    'went (-1) and which came (1). A new one''s touches are its own so far.';

CREATE FUNCTION analytics._move_sessions(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    DELETE FROM spectrum.rollup_sessions AS known
    USING pg_temp.spectrum_session_changes AS gone
    WHERE gone.sign < 0 AND known.report_id = p_report AND known.user_key = gone.user_key
        AND known.scope = gone.scope AND known.session_start = gone.session_start
        AND NOT EXISTS (
            SELECT FROM pg_temp.spectrum_session_changes AS come
            WHERE come.sign > 0 AND come.user_key = gone.user_key AND come.scope = gone.scope
                AND come.session_start = gone.session_start
        );
    INSERT INTO spectrum.rollup_sessions AS known (
        report_id, user_key, scope, session_start, session_end, events, page_views, is_bounce,
        country, region, city, entry_page, exit_page, utm_source, utm_medium, utm_campaign,
        referrer, channel, first_touch, last_touch
    )
    SELECT come.report_id, come.user_key, come.scope, come.session_start, come.session_end,
        come.events, come.page_views, come.is_bounce, come.country, come.region, come.city,
        come.entry_page, come.exit_page, come.utm_source, come.utm_medium, come.utm_campaign,
        come.referrer, come.channel, come.first_touch, come.last_touch
    FROM pg_temp.spectrum_session_changes AS come
    WHERE come.sign > 0
    ON CONFLICT (report_id, user_key, scope, session_start) DO UPDATE SET (
        session_end, events, page_views, is_bounce, country, region, city, entry_page, exit_page,
        utm_source, utm_medium, utm_campaign, referrer, channel
    ) = ROW (
        excluded.session_end, excluded.events, excluded.page_views, excluded.is_bounce,
        excluded.country, excluded.region, excluded.city, excluded.entry_page, excluded.exit_page,
        excluded.utm_source, excluded.utm_medium, excluded.utm_campaign, excluded.referrer,
        excluded.channel
    );
END
$$;
COMMENT ON FUNCTION analytics._move_sessions(integer) IS
    'Brings rollup_sessions up to the changes found.';

CREATE FUNCTION analytics._find_touches(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_touches',
        'user_key bigint, scope bigint, session_start timestamptz, first_touch text, '
        'last_touch text');
    INSERT INTO pg_temp.spectrum_session_touches (
        user_key, scope, session_start, first_touch, last_touch
    )
    WITH windows AS (
        SELECT known.*, coalesce(since - interval '1440 hours' > max(until) OVER (
            PARTITION BY user_key, scope ORDER BY since
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), true) AS is_apart
        FROM pg_temp.spectrum_session_windows AS known
        WHERE NOT known.is_leaving
    ),
    spans AS (
        SELECT user_key, scope, min(since) AS since, max(until) + interval '720 hours' AS until
        FROM (
            SELECT windows.*, count(*) FILTER (WHERE is_apart) OVER (
                PARTITION BY user_key, scope ORDER BY since
            ) AS number
            FROM windows
        ) AS numbered
        GROUP BY user_key, scope, number
    ),
    near_sessions AS (
        SELECT spans.since, known.*
        FROM spans
        CROSS JOIN LATERAL (
            SELECT kept.user_key, kept.scope, kept.session_start, kept.channel, kept.first_touch,
                kept.last_touch
            FROM spectrum.rollup_sessions AS kept
            WHERE kept.report_id = p_report AND kept.user_key = spans.user_key
                AND kept.scope = spans.scope AND kept.session_start < spans.until
                AND kept.session_start >= spans.since - interval '720 hours'
            OFFSET 0
        ) AS known
    ),
    touches AS (
        SELECT user_key, scope, since, array_agg(session_start ORDER BY session_start) AS starts,
            array_agg(channel ORDER BY session_start) AS channels
        FROM near_sessions
        WHERE channel <> 'direct'
        GROUP BY user_key, scope, since
    ),
    found AS (
        SELECT near.user_key, near.scope, near.session_start,
            near.first_touch AS old_first_touch, near.last_touch AS old_last_touch,
            CASE WHEN place.first <= place.last THEN touches.channels[place.first] ELSE 'direct'
            END AS first_touch,
            CASE WHEN place.first <= place.last THEN touches.channels[place.last] ELSE 'direct'
            END AS last_touch
        FROM near_sessions AS near
        LEFT JOIN touches USING (user_key, scope, since)
        CROSS JOIN LATERAL (
            SELECT width_bucket(near.session_start, touches.starts) AS last, 1 + width_bucket(
                near.session_start - interval '720 hours 1 us', touches.starts
            ) AS first
        ) AS place
        WHERE near.session_start >= near.since
    )
    SELECT user_key, scope, session_start, first_touch, last_touch
    FROM found
    WHERE (first_touch, last_touch) <> (old_first_touch, old_last_touch);
END
$$;
COMMENT ON FUNCTION analytics._find_touches(integer) IS
    'Leaves in pg_temp.spectrum_session_touches which sessions have another first or last touch '
    'than rollup_sessions says: of those cut again, and of those in the 30 days after.';

CREATE FUNCTION analytics._move_touches(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_session_changes
    SELECT version.sign, known.*
    FROM pg_temp.spectrum_session_touches AS touched
    CROSS JOIN LATERAL (
        SELECT kept.* FROM spectrum.rollup_sessions AS kept
        WHERE kept.report_id = p_report AND kept.user_key = touched.user_key
            AND kept.scope = touched.scope AND kept.session_start = touched.session_start
        OFFSET 0
    ) AS known
    CROSS JOIN (VALUES (-1), (1)) AS version (sign)
    WHERE NOT EXISTS (
        SELECT FROM pg_temp.spectrum_session_changes AS come
        WHERE come.sign > 0 AND come.user_key = touched.user_key AND come.scope = touched.scope
            AND come.session_start = touched.session_start
    );
    UPDATE pg_temp.spectrum_session_changes AS come
    SET first_touch = touched.first_touch, last_touch = touched.last_touch
    FROM pg_temp.spectrum_session_touches AS touched
    WHERE come.sign > 0 AND come.user_key = touched.user_key AND come.scope = touched.scope
        AND come.session_start = touched.session_start;
    UPDATE spectrum.rollup_sessions AS known
    SET first_touch = touched.first_touch, last_touch = touched.last_touch
    FROM pg_temp.spectrum_session_touches AS touched
    WHERE known.report_id = p_report AND known.user_key = touched.user_key
        AND known.scope = touched.scope AND known.session_start = touched.session_start;
END
$$;
COMMENT ON FUNCTION analytics._move_touches(integer) IS
    'Brings the changes found and rollup_sessions up to the touches found.';

CREATE FUNCTION analytics._lay_out_session_cells(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_session_cells',
        'account_id text COLLATE "C", day date, breakdown text COLLATE "C", value_key bytea, '
        'value text, sessions bigint, users bigint, bounces bigint, microseconds bigint, '
        'events bigint, page_views bigint');
    SELECT spectrum.period_starts(
        'day', min(changed.session_start), max(changed.session_start) + interval '1 us'
    ) INTO v_starts
    FROM pg_temp.spectrum_session_changes AS changed;
    v_days := analytics._period_dates(v_starts);

    INSERT INTO pg_temp.spectrum_session_cells (
        account_id, day, breakdown, value_key, value, sessions, users, bounces, microseconds,
        events, page_views
    )
    WITH changes AS (
        SELECT changed.*, width_bucket(changed.session_start, v_starts) AS number
        FROM pg_temp.spectrum_session_changes AS changed
    ),
    -- Who has other sessions on the day, that stayed as they are, is one of its users anyway.
    others AS (
        SELECT 0 AS sign, known.*, days.number
        FROM (SELECT DISTINCT user_key, scope, number FROM changes) AS days
        CROSS JOIN LATERAL (
            SELECT kept.* FROM spectrum.rollup_sessions AS kept
            WHERE kept.report_id = p_report AND kept.user_key = days.user_key
                AND kept.scope = days.scope AND kept.session_start >= v_starts[days.number]
                AND kept.session_start < v_starts[days.number + 1]
            OFFSET 0
        ) AS known
        WHERE NOT EXISTS (
            SELECT FROM changes
            WHERE changes.sign > 0 AND changes.user_key = known.user_key
                AND changes.scope = known.scope AND changes.session_start = known.session_start
        )
    ),
    cells_of_users AS (
        SELECT version.scope, version.number, label.breakdown, label.value,
            sum(version.sign) AS sessions,
            bool_or(version.sign >= 0)::integer - bool_or(version.sign <= 0)::integer AS users,
            sum(version.sign) FILTER (WHERE version.is_bounce) AS bounces,
            sum(version.sign * version.microseconds)::bigint AS microseconds,
            sum(version.sign * version.events) AS events,
            sum(version.sign * version.page_views) AS page_views
        FROM (
            SELECT versions.*,
                (extract(epoch FROM session_end - session_start) * 1000000)::bigint AS microseconds
            FROM (TABLE changes UNION ALL TABLE others) AS versions
        ) AS version
        CROSS JOIN LATERAL (
            VALUES ('all', NULL), ('country', version.country), ('region', version.region),
                ('city', version.city), ('entry_page', version.entry_page),
                ('exit_page', version.exit_page), ('utm_source', version.utm_source),
                ('utm_medium', version.utm_medium), ('utm_campaign', version.utm_campaign),
                ('channel', version.channel), ('first_touch', version.first_touch),
                ('last_touch', version.last_touch)
        ) AS label (breakdown, value)
        GROUP BY version.user_key, version.scope, version.number, label.breakdown, label.value
    )
    SELECT scopes.account_id, v_days[cell.number], cell.breakdown,
        coalesce(substring(sha256(convert_to(cell.value, 'UTF8')) FOR 16), ''), cell.value,
        sum(cell.sessions), sum(cell.users), coalesce(sum(cell.bounces), 0),
        sum(cell.microseconds), sum(cell.events), sum(cell.page_views)
    FROM cells_of_users AS cell
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, cell.number, cell.breakdown, cell.value
    HAVING bool_or(cell.events <> 0 OR cell.sessions <> 0 OR cell.users <> 0
        OR cell.microseconds <> 0 OR cell.page_views <> 0 OR cell.bounces <> 0);
END
$$;
COMMENT ON FUNCTION analytics._lay_out_session_cells(integer) IS
    'Lays out, in pg_temp.spectrum_session_cells, by how much the changes found move the sums.';

CREATE FUNCTION analytics._maintain_sessions(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_is_build boolean := p_built_to = 9223372036854775807 AND EXISTS (
        SELECT FROM spectrum.reports WHERE report_id = p_report AND state = 'building'
    );
BEGIN
    PERFORM analytics._touch_sessions_whole(p_built_to, v_is_build);
    IF NOT v_is_build THEN
        PERFORM analytics._touch_sessions(p_report, p_built_to);
    END IF;
    PERFORM analytics._find_session_changes(p_report);
    PERFORM analytics._move_sessions(p_report);
    PERFORM analytics._find_touches(p_report);
    PERFORM analytics._move_touches(p_report);
    PERFORM analytics._lay_out_session_cells(p_report);

    INSERT INTO analytics.mv_sessions_daily AS sums (
        report_id, account_id, day, breakdown, value_key, value, sessions, users, bounces,
        microseconds, events, page_views
    )
    SELECT p_report, cell.account_id, cell.day, cell.breakdown, cell.value_key, cell.value,
        cell.sessions, cell.users, cell.bounces, cell.microseconds, cell.events, cell.page_views
    FROM pg_temp.spectrum_session_cells AS cell
    ON CONFLICT (report_id, account_id, day, breakdown, value_key) DO UPDATE SET
        sessions = sums.sessions + excluded.sessions,
        users = sums.users + excluded.users,
        bounces = sums.bounces + excluded.bounces,
        microseconds = sums.microseconds + excluded.microseconds,
        events = sums.events + excluded.events,
        page_views = sums.page_views + excluded.page_views;
    DELETE FROM analytics.mv_sessions_daily AS sums
    USING pg_temp.spectrum_session_cells AS cell
    WHERE cell.sessions < 0 AND sums.report_id = p_report AND sums.account_id = cell.account_id
        AND sums.day = cell.day AND sums.breakdown = cell.breakdown
        AND sums.value_key = cell.value_key AND sums.sessions = 0;
END
$$;
COMMENT ON FUNCTION analytics._maintain_sessions(integer, bigint) IS
    'Moves rollup_sessions and mv_sessions_daily by the news.';
-- Room 60, standing sessions: the sessions of each user, and the sums by day that dashboards read.

CREATE FUNCTION spectrum._create_sessions()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_sessions_daily') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_sessions (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        session_start timestamptz NOT NULL,
        session_end timestamptz NOT NULL,
        events integer NOT NULL,
        page_views integer NOT NULL,
        is_bounce boolean NOT NULL,
        country text,
        region text,
        city text,
        entry_page text,
        exit_page text,
        utm_source text,
        utm_medium text,
        utm_campaign text,
        referrer text,
        channel text NOT NULL,
        first_touch text NOT NULL,
        last_touch text NOT NULL,
        CONSTRAINT rollup_sessions_pkey PRIMARY KEY (report_id, user_key, scope, session_start)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_sessions IS
        'The sessions of each user, as analytics.sessions gives them.';
    COMMENT ON COLUMN spectrum.rollup_sessions.report_id IS 'spectrum.reports, kind sessions.';
    COMMENT ON COLUMN spectrum.rollup_sessions.user_key IS 'dim_users; never the unknown user.';
    COMMENT ON COLUMN spectrum.rollup_sessions.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_sessions.session_start IS 'Time of its first event.';
    COMMENT ON COLUMN spectrum.rollup_sessions.session_end IS 'Time of its last event.';
    COMMENT ON COLUMN spectrum.rollup_sessions.channel IS 'direct: it has no touch.';
    COMMENT ON COLUMN spectrum.rollup_sessions.first_touch IS
        'Channel of the first touch in the 30 days up to and including it, else direct.';
    COMMENT ON COLUMN spectrum.rollup_sessions.last_touch IS 'The same of the last touch.';

    CREATE TABLE analytics.mv_sessions_daily (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        value_key bytea NOT NULL,
        value text,
        sessions bigint NOT NULL,
        users bigint NOT NULL,
        bounces bigint NOT NULL,
        microseconds bigint NOT NULL,
        events bigint NOT NULL,
        page_views bigint NOT NULL,
        CONSTRAINT mv_sessions_daily_pkey
        PRIMARY KEY (report_id, account_id, breakdown, day, value_key)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_sessions_daily IS
        'Sessions per account and day of their start, and for all accounts together (account_id '
        '*), in each breakdown, kept by refreshes. Read it through analytics.sessions_daily.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.report_id IS 'spectrum.reports, kind sessions.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.breakdown IS 'all: no breakdown.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.value_key IS
        'What stands for the value in the key: 16 bytes of its SHA-256. A page may be longer than '
        'an index can hold.';
    COMMENT ON COLUMN analytics.mv_sessions_daily.microseconds IS 'Sum of the durations.';
    PERFORM spectrum._create_sessions_view();
    PERFORM spectrum._add_kind('sessions', 70, '_maintain_sessions',
        '{spectrum.rollup_sessions, analytics.mv_sessions_daily}', '{sessions_daily}');
    PERFORM spectrum._begin_report('sessions');
END
$$;
COMMENT ON FUNCTION spectrum._create_sessions() IS
    'Room 60: makes rollup_sessions, mv_sessions_daily and its plain view.';

CREATE FUNCTION spectrum._create_sessions_view()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.sessions_daily AS
    SELECT
        sums.account_id,
        sums.day,
        sums.breakdown,
        sums.value,
        sums.sessions,
        sums.users,
        sums.bounces,
        sums.bounces / sums.sessions::double precision AS bounce_rate,
        sums.microseconds / (sums.sessions * 1e6::double precision) AS mean_seconds,
        sums.events,
        sums.page_views,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_sessions_daily AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'sessions' AND report.state = 'served'
    );
    COMMENT ON VIEW analytics.sessions_daily IS
        'The sessions that begin on a day, per account (* is all), in each breakdown; days without '
        'sessions are no rows.';
    COMMENT ON COLUMN analytics.sessions_daily.breakdown IS
        'all (every session once), country, region, city, entry_page, exit_page, utm_source, '
        'utm_medium, utm_campaign, channel, first_touch or last_touch: filter by one.';
    COMMENT ON COLUMN analytics.sessions_daily.value IS
        'Of the first known place, the first or last page view, the first event; for first_touch '
        'and last_touch the channel of the first or last touch in the 30 days up to and including '
        'the session. NULL unknown, and for all.';
    COMMENT ON COLUMN analytics.sessions_daily.users IS 'Distinct users of these sessions.';
    COMMENT ON COLUMN analytics.sessions_daily.bounces IS
        'Sessions of one page view or, where there are none, of one event.';
    COMMENT ON COLUMN analytics.sessions_daily.bounce_rate IS 'bounces / sessions.';
    COMMENT ON COLUMN analytics.sessions_daily.mean_seconds IS 'From first to last event.';
END
$$;
COMMENT ON FUNCTION spectrum._create_sessions_view() IS
    'Room 60: makes the plain view of the standing sessions.';

CREATE FUNCTION analytics._standing_sessions_daily()
RETURNS TABLE (
    account_id text, day date, breakdown text, value text, sessions bigint, users bigint,
    bounces bigint, bounce_rate double precision, mean_seconds double precision, events bigint,
    page_views bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := (
        SELECT h.starts FROM analytics._history_periods('day', NULL, NULL) AS h
    );
    v_days date[] := analytics._period_dates(v_starts);
    r_units record;
BEGIN
    SELECT array_agg(unit.user_key) AS users, array_agg(-unit.account_key) AS scopes,
        array_agg('-infinity'::timestamptz) AS sinces, array_agg('infinity'::timestamptz) AS untils
    INTO r_units
    FROM (
        SELECT DISTINCT e.user_key, e.account_key FROM analytics.event_keys AS e
        WHERE e.user_key <> 0 AND e.account_key <> 0
    ) AS unit;

    RETURN QUERY
    WITH cut AS (
        SELECT '*' AS account_id, s.*
        FROM analytics._sessions(
            '-infinity', 'infinity', NULL, NULL, NULL, NULL, NULL, '{pages, touches, places}'
        ) AS s
        UNION ALL
        SELECT accounts.account_id, s.*
        FROM analytics._sessions(
            NULL, NULL, r_units.users, coalesce(r_units.scopes, '{}'), r_units.sinces,
            r_units.untils, NULL, '{pages, touches, places}'
        ) AS s
        JOIN analytics.accounts ON accounts.account_key = -s.scope
    ),
    visits AS (
        SELECT cut.*, touches.channels[1] AS first_touch,
            touches.channels[cardinality(touches.channels)] AS last_touch
        FROM (
            SELECT cut.*, array_agg(analytics._channel(cut.touch)) FILTER (
                WHERE cut.touch IS NOT NULL
            ) OVER (
                PARTITION BY cut.account_id, cut.user_key ORDER BY cut.started_at
                RANGE BETWEEN interval '720 hours' PRECEDING AND CURRENT ROW
            ) AS channels
            FROM cut
        ) AS cut
        CROSS JOIN LATERAL (SELECT coalesce(cut.channels, '{direct}') AS channels) AS touches
    )
    SELECT v.account_id, v_days[width_bucket(v.started_at, v_starts)], label.breakdown,
        CASE label.breakdown
            WHEN 'first_touch' THEN v.first_touch
            WHEN 'last_touch' THEN v.last_touch
            ELSE analytics._session_label(
                label.breakdown, v.touch, v.place, v.entry_page, v.exit_page
            )
        END,
        count(*), count(DISTINCT v.user_key), count(*) FILTER (WHERE v.is_bounce),
        count(*) FILTER (WHERE v.is_bounce) / count(*)::double precision,
        (sum(extract(epoch FROM v.ended_at - v.started_at)) * 1000000)::bigint
            / (count(*) * 1e6::double precision),
        sum(v.events), sum(v.page_views)
    FROM visits AS v
    CROSS JOIN unnest(
        '{all, country, region, city, entry_page, exit_page, utm_source, utm_medium, '
        'utm_campaign, channel, first_touch, last_touch}'::text[]
    ) AS label (breakdown)
    GROUP BY 1, 2, 3, 4;
END
$$;
COMMENT ON FUNCTION analytics._standing_sessions_daily() IS
    'What analytics.sessions_daily has to show, cut from all events.';
-- Room 60, paths: what follows what inside a session. Reads analytics.events through the sessions
-- cut from them (65_sessions.sql).

CREATE FUNCTION analytics.paths(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_start_event text DEFAULT NULL,
    p_max_steps integer DEFAULT 5,
    p_account text DEFAULT NULL
)
RETURNS TABLE (step integer, source text, target text, transitions bigint, users bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_start_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type = p_start_event
    );
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    IF p_max_steps IS NULL OR p_max_steps NOT BETWEEN 1 AND 100 THEN
        PERFORM spectrum._reject('p_max_steps', p_max_steps::text, 'a number from 1 to 100');
    END IF;
    IF p_start_event IS NOT NULL AND v_start_key IS NULL THEN
        RETURN;
    END IF;

    RETURN QUERY
    WITH walks AS (
        -- A path of one event has no edge; array_position is NULL where the start is not in it.
        SELECT w.user_key, w.steps[w.first : w.first + p_max_steps] AS steps
        FROM (
            SELECT
                s.user_key,
                s.steps,
                CASE WHEN p_start_event IS NULL THEN 1 ELSE array_position(s.steps, v_start_key)
                END AS first
            FROM analytics._sessions_between(p_from, p_to, p_account, '{steps}') AS s
            WHERE s.events > 1
        ) AS w
        WHERE w.first IS NOT NULL
    ),
    edges_of_users AS (
        SELECT w.user_key, n.step, w.steps[n.step] AS source, w.steps[n.step + 1] AS target,
            count(*) AS transitions
        FROM walks AS w
        CROSS JOIN LATERAL generate_series(1, cardinality(w.steps) - 1) AS n (step)
        GROUP BY w.user_key, n.step, w.steps[n.step], w.steps[n.step + 1]
    ),
    edges AS (
        SELECT e.step, e.source, e.target, sum(e.transitions)::bigint AS transitions,
            count(*) AS users
        FROM edges_of_users AS e
        GROUP BY e.step, e.source, e.target
    )
    SELECT e.step, f.event_type, t.event_type, e.transitions, e.users
    FROM edges AS e
    JOIN analytics.event_types AS f ON f.event_type_key = e.source
    JOIN analytics.event_types AS t ON t.event_type_key = e.target
    ORDER BY e.step, e.transitions DESC, f.event_type, t.event_type;
END
$$;
COMMENT ON FUNCTION analytics.paths(timestamptz, timestamptz, text, integer, text) IS
    'What follows what: of the sessions that begin in [p_from, p_to), each pair of successive '
    'events, by its place in the path (step 1 leads from the first event to the second), with how '
    'often it was taken and by how many users. p_start_event: paths begin with the first such '
    'event of a session. p_max_steps: as many pairs of each path, 1 to 100. p_account: of the '
    'events of that account alone.';
-- Room 60, feature adoption: who uses a feature, of those who were active, by the week of the
-- user's first event. Each value of the property feature of feature_used is a feature;
-- spectrum.features holds those that the user defines by an event type, a filter, or both.
-- Reads analytics.events and analytics.features.

CREATE FUNCTION spectrum._create_features()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.features') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.features (
        feature text NOT NULL CONSTRAINT features_pkey PRIMARY KEY,
        event_type text,
        properties_filter jsonb,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT features_say_what_counts
        CHECK (num_nonnulls(event_type, properties_filter) > 0)
    );
    COMMENT ON TABLE spectrum.features IS
        'The features that are told by other events than feature_used. Define one with '
        'spectrum.define_feature().';
    COMMENT ON COLUMN spectrum.features.feature IS 'Name.';
    COMMENT ON COLUMN spectrum.features.event_type IS 'Event that is a use of it; NULL any.';
    COMMENT ON COLUMN spectrum.features.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN spectrum.features.changed_at IS 'When it was last defined.';

    CREATE VIEW analytics.features WITH (security_barrier) AS
    SELECT features.feature, features.event_type, features.properties_filter, features.changed_at
    FROM spectrum.features;
    COMMENT ON VIEW analytics.features IS
        'The defined features, for all who may ask questions.';
    COMMENT ON COLUMN analytics.features.feature IS 'Name.';
    COMMENT ON COLUMN analytics.features.event_type IS 'Event that is a use of it; NULL any.';
    COMMENT ON COLUMN analytics.features.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN analytics.features.changed_at IS 'When it was last defined.';
END
$$;
COMMENT ON FUNCTION spectrum._create_features() IS
    'Room 60: makes spectrum.features and its plain view.';

CREATE FUNCTION spectrum.define_feature(
    p_name text,
    p_event text DEFAULT NULL,
    p_where jsonb DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_filter('p_where', p_where);
    IF p_event = '' OR (p_event IS NULL AND p_where IS NULL) THEN
        PERFORM spectrum._reject('p_event', p_event, 'an event type, or NULL with a p_where');
    END IF;

    INSERT INTO spectrum.features (feature, event_type, properties_filter)
    VALUES (p_name, p_event, p_where)
    ON CONFLICT ON CONSTRAINT features_pkey DO UPDATE SET
        event_type = excluded.event_type,
        properties_filter = excluded.properties_filter,
        changed_at = excluded.changed_at;
    PERFORM spectrum._begin_report('feature', p_name, to_jsonb(definition))
    FROM spectrum.features AS definition WHERE feature = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_feature(text, text, jsonb) IS
    'Defines a feature or replaces it: used by each event of type p_event (NULL: of any) whose '
    'properties contain p_where (NULL: whatever they are). It takes the place of the value of the '
    'same name in feature_used; in the view, once a refresh has built it.';

CREATE FUNCTION spectrum.drop_feature(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.features WHERE feature = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a feature in spectrum.features');
    END IF;
    PERFORM spectrum._discard_reports('feature', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_feature(text) IS
    'Forgets the definition of a feature, not its events; 22023 if there is none of that name.';

CREATE FUNCTION analytics._feature_definitions()
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT coalesce(jsonb_agg(to_jsonb(f)), '[]') FROM analytics.features AS f);
END
$$;
COMMENT ON FUNCTION analytics._feature_definitions() IS 'The defined features.';

CREATE FUNCTION analytics._feature_rules(p_definitions jsonb)
RETURNS TABLE (event_type_key integer, feature text, properties_filter jsonb)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT t.event_type_key, f.feature, f.properties_filter
    FROM analytics.event_types AS t
    JOIN jsonb_to_recordset(p_definitions)
        AS f (feature text, event_type text, properties_filter jsonb)
        ON f.event_type IS NULL OR f.event_type = t.event_type
    UNION ALL
    SELECT t.event_type_key, NULL, NULL
    FROM analytics.event_types AS t
    WHERE t.event_type = 'feature_used';
END
$$;
COMMENT ON FUNCTION analytics._feature_rules(jsonb) IS
    'Which events are a use of which feature: of this type, with properties that contain the '
    'filter, if any. feature NULL: the one that the event names, unless that name is defined.';

CREATE FUNCTION analytics._feature_uses(
    p_feature text,
    p_starts timestamptz[],
    p_account text,
    p_by_account boolean,
    p_definitions jsonb
)
RETURNS TABLE (account_id text, user_key bigint, feature text, numbers integer[])
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_defined text[] := ARRAY(
        SELECT f.definition ->> 'feature' FROM jsonb_array_elements(p_definitions) AS f (definition)
    );
    v_event_keys integer[] := ARRAY(
        SELECT r.event_type_key FROM analytics._feature_rules(p_definitions) AS r
        WHERE p_feature IS NULL OR r.feature = p_feature
            OR (r.feature IS NULL AND p_feature <> ALL (v_defined))
    );
BEGIN
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN min(u.account_id) ELSE coalesce(p_account, '*') END,
        u.user_key,
        u.feature,
        array_agg(DISTINCT u.number ORDER BY u.number)
    FROM (
        SELECT
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS scope_key,
            e.account_id,
            e.user_key,
            coalesce(r.feature, e.properties ->> 'feature') AS feature,
            width_bucket(e.occurred_at, p_starts) AS number
        FROM analytics.events AS e
        JOIN analytics._feature_rules(p_definitions) AS r ON r.event_type_key = e.event_type_key
        WHERE e.user_key <> 0
            AND e.event_type_key = ANY (v_event_keys)
            AND e.occurred_at >= p_starts[1]
            AND e.occurred_at < p_starts[cardinality(p_starts)]
            AND (r.properties_filter IS NULL OR e.properties @> r.properties_filter)
            AND (r.feature IS NOT NULL OR e.properties ->> 'feature' <> ALL (v_defined))
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
    ) AS u
    -- The length that an id may have.
    WHERE length(u.feature) BETWEEN 1 AND 200 AND (p_feature IS NULL OR u.feature = p_feature)
    GROUP BY u.user_key, u.feature, u.scope_key;
END
$$;
COMMENT ON FUNCTION analytics._feature_uses(text, timestamptz[], text, boolean, jsonb) IS
    'Each user''s periods (numbered by p_starts, ascending) with a use of each feature (p_feature '
    'NULL: all). For one account, for all together (*), or, with p_by_account, for each account by '
    'itself.';

CREATE FUNCTION analytics._feature_adoption(
    p_feature text,
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean,
    p_definitions jsonb
)
RETURNS TABLE (
    account_id text,
    feature text,
    cohort_week date,
    period date,
    active_users bigint,
    users bigint,
    first_users bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    v_starts timestamptz[];
    v_first_number integer;
    v_dates date[];
    v_weeks timestamptz[];
    v_week_dates date[];
    v_named text[] := CASE
        WHEN p_feature IS NULL THEN ARRAY(
            SELECT f.definition ->> 'feature'
            FROM jsonb_array_elements(p_definitions) AS f (definition)
        )
        ELSE ARRAY[p_feature]
    END;
BEGIN
    SELECT h.starts, coalesce(h.first_number, 1) INTO v_starts, v_first_number
    FROM analytics._history_periods(p_period, p_from, p_to) AS h;
    v_dates := analytics._period_dates(v_starts);
    v_weeks := spectrum.period_starts('week', v_starts[1], v_starts[cardinality(v_starts)]);
    v_week_dates := analytics._period_dates(v_weeks);

    RETURN QUERY
    WITH cohort_users AS MATERIALIZED (
        SELECT u.account_id, u.user_key, width_bucket(u.first_at, v_weeks) AS week, u.numbers
        FROM analytics._active_periods(NULL, v_starts, p_account, p_by_account) AS u
    ),
    active_cells AS MATERIALIZED (
        SELECT c.account_id, c.week, a.number, count(*) AS users
        FROM cohort_users AS c
        CROSS JOIN LATERAL unnest(c.numbers) AS a (number)
        WHERE a.number >= v_first_number
        GROUP BY c.account_id, c.week, a.number
    ),
    uses AS MATERIALIZED (
        SELECT u.account_id, u.user_key, u.feature, u.numbers
        FROM analytics._feature_uses(
            p_feature, v_starts, p_account, p_by_account, p_definitions
        ) AS u
    ),
    use_cells AS (
        SELECT u.account_id, u.feature, c.week, a.number, count(*) AS users,
            count(*) FILTER (WHERE a.number = u.numbers[1]) AS first_users
        FROM uses AS u
        JOIN cohort_users AS c ON c.user_key = u.user_key AND c.account_id = u.account_id
        CROSS JOIN LATERAL unnest(u.numbers) AS a (number)
        GROUP BY u.account_id, u.feature, c.week, a.number
    ),
    features AS (
        SELECT u.account_id, u.feature FROM uses AS u
        UNION
        SELECT a.account_id, n.feature
        FROM active_cells AS a
        CROSS JOIN unnest(v_named) AS n (feature)
    )
    SELECT a.account_id, f.feature, v_week_dates[a.week], v_dates[a.number], a.users,
        coalesce(u.users, 0), coalesce(u.first_users, 0)
    FROM active_cells AS a
    JOIN features AS f ON f.account_id = a.account_id
    LEFT JOIN use_cells AS u ON u.account_id = a.account_id AND u.feature = f.feature
        AND u.week = a.week AND u.number = a.number;
END
$$;
COMMENT ON FUNCTION analytics._feature_adoption(
    text, text, timestamptz, timestamptz, text, boolean, jsonb
) IS
    'Adoption in each scope: a user''s use in a period counts in the week of his first event, and '
    'as his first if he did not use the feature in a period before.';

CREATE FUNCTION analytics.feature_adoption(
    p_feature text DEFAULT NULL,
    p_period text DEFAULT 'week',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    feature text,
    cohort_week date,
    period date,
    active_users bigint,
    users bigint,
    first_users bigint,
    repeat_users bigint,
    rate double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT a.feature, a.cohort_week, a.period, a.active_users, a.users, a.first_users,
        a.users - a.first_users, a.users / a.active_users::double precision
    FROM analytics._feature_adoption(
        p_feature, p_period, p_from, p_to, p_account, false, analytics._feature_definitions()
    ) AS a
    ORDER BY a.feature, a.cohort_week, a.period;
END
$$;
COMMENT ON FUNCTION analytics.feature_adoption(text, text, timestamptz, timestamptz, text) IS
    'Of the users whose first event ever fell in cohort_week and who were active in a day, week or '
    'month that [p_from, p_to) touches (each whole), how many used the feature in it, how many of '
    'them in no period before (first_users), and rate = users / active_users. One row for each '
    'feature, cohort and period with an active user. p_feature NULL: every feature that is defined '
    'or was used up to the end of the range. p_account: its events alone.';
-- Room 60, cohorts: of each user the week of his first event, and how many users of a cohort were
-- active in each week. Follows the user-days that kind activity keeps. Where an earlier event
-- arrives late, or the first one is withdrawn, the user's weeks change their cohort. Read by
-- feature adoption.

CREATE FUNCTION spectrum._create_cohorts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.rollup_cohorts') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_cohorts (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        cohort_week date NOT NULL,
        CONSTRAINT rollup_cohorts_pkey PRIMARY KEY (report_id, user_key, scope)
    );
    COMMENT ON TABLE spectrum.rollup_cohorts IS 'The week of each user''s first event.';
    COMMENT ON COLUMN spectrum.rollup_cohorts.report_id IS 'spectrum.reports, kind cohort.';
    COMMENT ON COLUMN spectrum.rollup_cohorts.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_cohorts.cohort_week IS 'First day of the week.';

    CREATE TABLE spectrum.rollup_cohort_weeks (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cohort_week date NOT NULL,
        period date NOT NULL,
        active_users bigint NOT NULL,
        CONSTRAINT rollup_cohort_weeks_pkey
        PRIMARY KEY (report_id, account_id, cohort_week, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_cohort_weeks IS
        'Active users of each week by the week of their first event: what feature adoption is a '
        'part of.';
    COMMENT ON COLUMN spectrum.rollup_cohort_weeks.report_id IS 'spectrum.reports, kind cohort.';
    COMMENT ON COLUMN spectrum.rollup_cohort_weeks.period IS 'First day of the week.';
    COMMENT ON COLUMN spectrum.rollup_cohort_weeks.active_users IS
        'Users of the cohort with any event in the week.';
    PERFORM spectrum._add_kind('cohort', 78, '_maintain_cohorts',
        '{spectrum.rollup_cohorts, spectrum.rollup_cohort_weeks}', '{}');
    PERFORM spectrum._begin_report('cohort');
END
$$;
COMMENT ON FUNCTION spectrum._create_cohorts() IS
    'Room 60: makes rollup_cohorts and rollup_cohort_weeks.';

CREATE FUNCTION analytics._find_cohort_moves(
    p_report integer,
    p_built_to bigint,
    p_activity integer,
    p_weeks date[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_cohort_moves',
        'user_key bigint, scope bigint, old_week date, new_week date');
    INSERT INTO pg_temp.spectrum_cohort_moves (user_key, scope, old_week, new_week)
    SELECT touched.user_key, touched.scope, known.cohort_week, found.week
    FROM (
        SELECT DISTINCT changes.user_key, changes.scope
        FROM pg_temp.spectrum_day_changes AS changes
        WHERE changes.user_key <= p_built_to
    ) AS touched
    LEFT JOIN LATERAL (
        SELECT before.cohort_week FROM spectrum.rollup_cohorts AS before
        WHERE before.report_id = p_report AND before.user_key = touched.user_key
            AND before.scope = touched.scope
        OFFSET 0
    ) AS known ON true
    LEFT JOIN LATERAL (
        SELECT p_weeks[width_bucket(active.day, p_weeks)] AS week
        FROM spectrum.rollup_user_days AS active
        WHERE active.report_id = p_activity AND active.user_key = touched.user_key
            AND active.scope = touched.scope
        ORDER BY active.day
        LIMIT 1
    ) AS found ON true
    WHERE known.cohort_week IS DISTINCT FROM found.week;
END
$$;
COMMENT ON FUNCTION analytics._find_cohort_moves(integer, bigint, integer, date[]) IS
    'Lays out in pg_temp.spectrum_cohort_moves which users have their first event in another week '
    'than before; NULL where they had none, or have none any more.';

CREATE FUNCTION analytics._maintain_cohorts(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_activity integer := analytics._follow_user_days(p_report, p_built_to);
    v_weeks date[] := analytics._known_periods('week');
BEGIN
    PERFORM analytics._find_cohort_moves(p_report, p_built_to, v_activity, v_weeks);

    WITH weeks AS (
        SELECT near.user_key, near.scope, near.number, bool_and(near.was_active) AS was_active,
            bool_and(near.is_active) AS is_active
        FROM (
            SELECT changed.user_key, changed.scope, changed.number,
                changed.old_days > 0 AS was_active, changed.new_days > 0 AS is_active
            FROM analytics._changed_periods(v_activity, p_built_to, v_weeks) AS changed
            WHERE (changed.old_days > 0) <> (changed.new_days > 0)
            UNION ALL
            -- Who changes the cohort takes all weeks along.
            SELECT DISTINCT moves.user_key, moves.scope, width_bucket(known.day, v_weeks), true,
                true
            FROM pg_temp.spectrum_cohort_moves AS moves
            CROSS JOIN LATERAL (
                SELECT active.day FROM spectrum.rollup_user_days AS active
                WHERE active.report_id = v_activity AND active.user_key = moves.user_key
                    AND active.scope = moves.scope
                OFFSET 0
            ) AS known
        ) AS near
        GROUP BY near.user_key, near.scope, near.number
    ),
    cells AS (
        SELECT weeks.scope, version.cohort_week, weeks.number, sum(version.sign) AS users
        FROM weeks
        LEFT JOIN pg_temp.spectrum_cohort_moves AS moves USING (user_key, scope)
        LEFT JOIN LATERAL (
            SELECT known.cohort_week FROM spectrum.rollup_cohorts AS known
            WHERE known.report_id = p_report AND known.user_key = weeks.user_key
                AND known.scope = weeks.scope
            OFFSET 0
        ) AS before ON true
        CROSS JOIN LATERAL (
            VALUES (-1, weeks.was_active, before.cohort_week), (1, weeks.is_active,
                CASE WHEN moves.user_key IS NULL THEN before.cohort_week ELSE moves.new_week END)
        ) AS version (sign, counts, cohort_week)
        WHERE version.counts AND version.cohort_week IS NOT NULL
        GROUP BY 1, 2, 3
        HAVING sum(version.sign) <> 0
    )
    INSERT INTO spectrum.rollup_cohort_weeks AS sums (
        report_id, account_id, cohort_week, period, active_users
    )
    SELECT p_report, scopes.account_id, cells.cohort_week, v_weeks[cells.number], sum(cells.users)
    FROM cells
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, cells.cohort_week, cells.number
    ON CONFLICT (report_id, account_id, cohort_week, period) DO UPDATE SET
        active_users = sums.active_users + excluded.active_users;

    PERFORM analytics._keep_cohorts(p_report);
END
$$;
COMMENT ON FUNCTION analytics._maintain_cohorts(integer, bigint) IS
    'Moves rollup_cohort_weeks by the user-days that came and went.';

CREATE FUNCTION analytics._keep_cohorts(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    DELETE FROM spectrum.rollup_cohorts AS known
    USING pg_temp.spectrum_cohort_moves AS moves
    WHERE known.report_id = p_report AND known.user_key = moves.user_key
        AND known.scope = moves.scope AND moves.old_week IS NOT NULL;
    INSERT INTO spectrum.rollup_cohorts (report_id, user_key, scope, cohort_week)
    SELECT p_report, moves.user_key, moves.scope, moves.new_week
    FROM pg_temp.spectrum_cohort_moves AS moves
    WHERE moves.new_week IS NOT NULL;

    -- Only who was in a cohort before can leave one empty, or a week of it.
    IF EXISTS (SELECT FROM pg_temp.spectrum_cohort_moves WHERE old_week IS NOT NULL)
        OR EXISTS (SELECT FROM pg_temp.spectrum_day_changes WHERE NOT is_added)
    THEN
        DELETE FROM spectrum.rollup_cohort_weeks AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.active_users = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._keep_cohorts(integer) IS
    'Keeps the cohorts that were found, and clears the sums that nobody is in any more.';
-- Room 60, standing feature adoption, by weeks: in which weeks each user used a feature. One report
-- for each defined feature, and one, without a name, for all those that feature_used names. A use
-- counts in the cohort that 67_cohorts.sql has the user in.

CREATE FUNCTION spectrum._create_feature_adoption()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_feature_adoption') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_feature_weeks (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        feature text COLLATE "C" NOT NULL,
        period date NOT NULL,
        CONSTRAINT rollup_feature_weeks_pkey
        PRIMARY KEY (report_id, user_key, scope, feature, period)
    );
    COMMENT ON TABLE spectrum.rollup_feature_weeks IS
        'The weeks in which each user used a feature.';
    COMMENT ON COLUMN spectrum.rollup_feature_weeks.report_id IS 'spectrum.reports, kind feature.';
    COMMENT ON COLUMN spectrum.rollup_feature_weeks.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_feature_weeks.period IS 'First day of the week.';

    CREATE TABLE spectrum.rollup_features (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        feature text COLLATE "C" NOT NULL,
        user_weeks bigint NOT NULL,
        CONSTRAINT rollup_features_pkey PRIMARY KEY (report_id, account_id, feature)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_features IS
        'Which features were used in each account, and in any (account_id *).';
    COMMENT ON COLUMN spectrum.rollup_features.report_id IS 'spectrum.reports, kind feature.';
    COMMENT ON COLUMN spectrum.rollup_features.user_weeks IS
        'Weeks with a use, of all users together: at 0 the row goes.';

    CREATE TABLE analytics.mv_feature_adoption (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        feature text COLLATE "C" NOT NULL,
        cohort_week date NOT NULL,
        period date NOT NULL,
        users bigint NOT NULL,
        first_users bigint NOT NULL,
        CONSTRAINT mv_feature_adoption_pkey
        PRIMARY KEY (report_id, account_id, feature, cohort_week, period)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_feature_adoption IS
        'Users of each feature by week and by the week of their first event, per account and for '
        'all accounts together (account_id *), kept by refreshes. Read it through '
        'analytics.feature_adoption.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.report_id IS 'spectrum.reports, kind feature.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.period IS 'First day of the week.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.users IS
        'Users of the cohort who used the feature in the week.';
    COMMENT ON COLUMN analytics.mv_feature_adoption.first_users IS
        'Those of them who did in no week before.';
    PERFORM spectrum._show_feature_adoption();
    PERFORM spectrum._add_kind('feature', 80, '_maintain_features',
        '{spectrum.rollup_feature_weeks, spectrum.rollup_features, '
        'analytics.mv_feature_adoption}', '{feature_adoption}');
    PERFORM spectrum._begin_report('feature');
    PERFORM spectrum._begin_report('feature', definition.feature, to_jsonb(definition))
    FROM spectrum.features AS definition;
END
$$;
COMMENT ON FUNCTION spectrum._create_feature_adoption() IS
    'Room 60: makes the tables that feature adoption is kept by, and its plain view.';

CREATE FUNCTION spectrum._show_feature_adoption()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.feature_adoption AS
    SELECT
        shown.account_id,
        shown.feature,
        shown.cohort_week,
        shown.period,
        shown.active_users,
        coalesce(sums.users, 0) AS users,
        coalesce(sums.first_users, 0) AS first_users,
        coalesce(sums.users - sums.first_users, 0) AS repeat_users,
        coalesce(sums.users, 0) / shown.active_users::double precision AS rate,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT defined.report_id, cells.account_id, defined.name AS feature, cells.cohort_week,
            cells.period, cells.active_users
        FROM spectrum.reports AS cohorts
        JOIN spectrum.rollup_cohort_weeks AS cells USING (report_id)
        JOIN spectrum.reports AS defined
            ON defined.kind = 'feature' AND defined.state = 'served' AND defined.name <> ''
        WHERE cohorts.kind = 'cohort' AND cohorts.state = 'served'
        UNION ALL
        SELECT named.report_id, cells.account_id, known.feature, cells.cohort_week, cells.period,
            cells.active_users
        FROM spectrum.reports AS cohorts
        JOIN spectrum.rollup_cohort_weeks AS cells USING (report_id)
        JOIN spectrum.reports AS named
            ON named.kind = 'feature' AND named.state = 'served' AND named.name = ''
        JOIN spectrum.rollup_features AS known
            ON known.report_id = named.report_id AND known.account_id = cells.account_id
        WHERE cohorts.kind = 'cohort' AND cohorts.state = 'served'
            -- A definition takes the place of the value of its name.
            AND NOT EXISTS (
                SELECT FROM spectrum.reports AS defined
                WHERE defined.kind = 'feature' AND defined.state = 'served'
                    AND defined.name = known.feature
            )
    ) AS shown
    LEFT JOIN analytics.mv_feature_adoption AS sums
        ON sums.report_id = shown.report_id AND sums.account_id = shown.account_id
            AND sums.feature = shown.feature AND sums.cohort_week = shown.cohort_week
            AND sums.period = shown.period;
    COMMENT ON VIEW analytics.feature_adoption IS
        'Who of those who were active in a week used a feature, by account (account_id *: all '
        'accounts), feature and week of the user''s first event. Each feature that is defined or '
        'was used in the account, with each cohort and week that has an active user.';
    COMMENT ON COLUMN analytics.feature_adoption.feature IS
        'In spectrum.features, or what an event feature_used names.';
    COMMENT ON COLUMN analytics.feature_adoption.cohort_week IS
        'First day of the week of the user''s first event.';
    COMMENT ON COLUMN analytics.feature_adoption.period IS 'First day of the week.';
    COMMENT ON COLUMN analytics.feature_adoption.active_users IS
        'Users of the cohort with any event in the week.';
    COMMENT ON COLUMN analytics.feature_adoption.users IS
        'Those of them who used the feature in it.';
    COMMENT ON COLUMN analytics.feature_adoption.first_users IS
        'Those of them who did in no week before.';
    COMMENT ON COLUMN analytics.feature_adoption.repeat_users IS 'users - first_users.';
    COMMENT ON COLUMN analytics.feature_adoption.rate IS 'users / active_users.';
END
$$;
COMMENT ON FUNCTION spectrum._show_feature_adoption() IS
    'Room 60: makes the view analytics.feature_adoption.';

CREATE FUNCTION analytics._move_feature_weeks(
    p_report integer,
    p_built_to bigint,
    p_feature text,
    p_event_key integer,
    p_filter jsonb
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_weeks date[];
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_feature_uses',
        'sign integer, is_leaving boolean, user_key bigint, scope bigint, feature text, '
        'number integer');
    PERFORM spectrum._empty_temporary('spectrum_feature_changes',
        'user_key bigint, scope bigint, feature text COLLATE "C", period date, is_added boolean');
    SELECT spectrum.period_starts('week', min(news.occurred_at),
        max(news.occurred_at) + interval '1 us') INTO v_starts
    FROM pg_temp.spectrum_news AS news;
    v_weeks := analytics._period_dates(v_starts);

    INSERT INTO pg_temp.spectrum_feature_uses (
        sign, is_leaving, user_key, scope, feature, number
    )
    SELECT DISTINCT uses.* FROM (
        SELECT news.sign, news.is_leaving, news.user_key, news.scope,
            coalesce(p_feature, news.properties ->> 'feature') AS feature,
            width_bucket(news.occurred_at, v_starts)
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
            AND (p_event_key IS NULL OR news.event_type_key = p_event_key)
            AND (p_filter IS NULL OR news.properties @> p_filter)
    ) AS uses
    WHERE length(uses.feature) BETWEEN 1 AND 200;

    WITH added AS (
        INSERT INTO spectrum.rollup_feature_weeks (report_id, user_key, scope, feature, period)
        SELECT p_report, uses.user_key, uses.scope, uses.feature, v_weeks[uses.number]
        FROM pg_temp.spectrum_feature_uses AS uses
        WHERE uses.sign > 0 AND NOT uses.is_leaving
        ON CONFLICT DO NOTHING
        RETURNING user_key, scope, feature, period
    )
    INSERT INTO pg_temp.spectrum_feature_changes (user_key, scope, feature, period, is_added)
    SELECT added.*, true FROM added;

    WITH went AS (
        SELECT user_key, scope, feature, number, bool_or(is_leaving) AS is_leaving
        FROM pg_temp.spectrum_feature_uses
        WHERE sign <= 0
        GROUP BY user_key, scope, feature, number
    ), removed AS (
        DELETE FROM spectrum.rollup_feature_weeks AS known
        USING went
        WHERE known.report_id = p_report AND known.user_key = went.user_key
            AND known.scope = went.scope AND known.feature = went.feature
            AND known.period = v_weeks[went.number]
            AND (went.is_leaving OR NOT EXISTS (
                SELECT FROM warehouse.fact_events AS fact
                WHERE fact.user_key = went.user_key
                    AND fact.occurred_at >= v_starts[went.number]
                    AND fact.occurred_at < v_starts[went.number + 1]
                    AND (went.scope >= 0 OR fact.account_key = -went.scope)
                    AND (p_event_key IS NULL OR fact.event_type_key = p_event_key)
                    AND (p_filter IS NULL OR fact.properties @> p_filter)
                    AND (p_feature IS NOT NULL OR fact.properties ->> 'feature' = went.feature)
            ))
        RETURNING known.user_key, known.scope, known.feature, known.period
    )
    INSERT INTO pg_temp.spectrum_feature_changes (user_key, scope, feature, period, is_added)
    SELECT removed.*, false FROM removed;
END
$$;
COMMENT ON FUNCTION analytics._move_feature_weeks(integer, bigint, text, integer, jsonb) IS
    'Brings rollup_feature_weeks up to the news and leaves in pg_temp.spectrum_feature_changes '
    'which weeks of use came and which went. p_feature NULL: of the features that events name.';

CREATE FUNCTION analytics._changed_features(p_report integer, p_is_build boolean)
RETURNS TABLE (
    user_key bigint,
    scope bigint,
    feature text,
    period date,
    was_used boolean,
    is_used boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH changed AS MATERIALIZED (
        SELECT c.user_key, c.scope, c.feature, c.period, NOT bool_and(c.is_added) AS was_used,
            bool_and(c.is_added) AS is_used
        FROM pg_temp.spectrum_feature_changes AS c
        GROUP BY c.user_key, c.scope, c.feature, c.period
        HAVING count(*) = 1
    )
    SELECT near.user_key, near.scope, near.feature, near.period, bool_and(near.was_used),
        bool_and(near.is_used)
    FROM (
        SELECT changed.* FROM changed
        UNION ALL
        SELECT changed.user_key, changed.scope, changed.feature, neighbour.period, true, true
        FROM changed
        CROSS JOIN LATERAL (
            (SELECT known.period FROM spectrum.rollup_feature_weeks AS known
            WHERE known.report_id = p_report AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.feature = changed.feature
                AND known.period < changed.period
            ORDER BY known.period DESC
            LIMIT 1)
            UNION ALL
            (SELECT known.period FROM spectrum.rollup_feature_weeks AS known
            WHERE known.report_id = p_report AND known.user_key = changed.user_key
                AND known.scope = changed.scope AND known.feature = changed.feature
                AND known.period > changed.period
            ORDER BY known.period
            LIMIT 1)
        ) AS neighbour
        WHERE NOT p_is_build
        UNION ALL
        -- Who changes the cohort takes all weeks along.
        SELECT moves.user_key, moves.scope, taken.feature, taken.period, true, true
        FROM pg_temp.spectrum_cohort_moves AS moves
        CROSS JOIN LATERAL (
            SELECT known.feature, known.period FROM spectrum.rollup_feature_weeks AS known
            WHERE known.report_id = p_report AND known.user_key = moves.user_key
                AND known.scope = moves.scope
            OFFSET 0
        ) AS taken
        WHERE NOT p_is_build
    ) AS near
    GROUP BY near.user_key, near.scope, near.feature, near.period;
END
$$;
COMMENT ON FUNCTION analytics._changed_features(integer, boolean) IS
    'The weeks of use that came and went, the next ones on both sides of each, and all of users '
    'who change their cohort: what a use was counted as before and now can be told from these, cf. '
    'analytics._changed_activity.';

CREATE FUNCTION analytics._move_feature_adoption(p_report integer, p_is_build boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cohorts integer := analytics._kept_by('cohort');
BEGIN
    WITH weeks AS MATERIALIZED (
        SELECT used.*, now.cohort_week AS new_week,
            CASE WHEN moves.user_key IS NULL THEN now.cohort_week ELSE moves.old_week END
                AS old_week
        FROM analytics._changed_features(p_report, p_is_build) AS used
        LEFT JOIN pg_temp.spectrum_cohort_moves AS moves
            ON moves.user_key = used.user_key AND moves.scope = used.scope AND NOT p_is_build
        LEFT JOIN LATERAL (
            SELECT known.cohort_week FROM spectrum.rollup_cohorts AS known
            WHERE known.report_id = v_cohorts AND known.user_key = used.user_key
                AND known.scope = used.scope
            OFFSET 0
        ) AS now ON true
    ),
    cells AS MATERIALIZED (
        SELECT scopes.account_id, version.feature, version.cohort_week, version.period,
            sum(version.sign) AS users,
            coalesce(sum(version.sign) FILTER (WHERE version.number = 1), 0) AS first_users
        FROM (
            SELECT -1 AS sign, scope, feature, old_week AS cohort_week, period,
                row_number() OVER (PARTITION BY user_key, scope, feature ORDER BY period) AS number
            FROM weeks WHERE was_used
            UNION ALL
            SELECT 1, scope, feature, new_week, period,
                row_number() OVER (PARTITION BY user_key, scope, feature ORDER BY period)
            FROM weeks WHERE is_used
        ) AS version
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE version.cohort_week IS NOT NULL
        GROUP BY 1, 2, 3, 4
    ),
    features AS (
        INSERT INTO spectrum.rollup_features AS sums (report_id, account_id, feature, user_weeks)
        SELECT p_report, cells.account_id, cells.feature, sum(cells.users)
        FROM cells
        GROUP BY cells.account_id, cells.feature
        HAVING sum(cells.users) <> 0
        ON CONFLICT (report_id, account_id, feature) DO UPDATE SET
            user_weeks = sums.user_weeks + excluded.user_weeks
    )
    INSERT INTO analytics.mv_feature_adoption AS sums (
        report_id, account_id, feature, cohort_week, period, users, first_users
    )
    SELECT p_report, cells.account_id, cells.feature, cells.cohort_week, cells.period,
        cells.users, cells.first_users
    FROM cells
    WHERE cells.users <> 0 OR cells.first_users <> 0
    ON CONFLICT (report_id, account_id, feature, cohort_week, period) DO UPDATE SET
        users = sums.users + excluded.users,
        first_users = sums.first_users + excluded.first_users;
END
$$;
COMMENT ON FUNCTION analytics._move_feature_adoption(integer, boolean) IS
    'Moves the sums of a feature by the weeks of use that changed: each counts in the user''s '
    'cohort, the first one as such.';

CREATE FUNCTION analytics._maintain_features(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_is_build boolean := analytics._is_build(p_report, p_built_to);
BEGIN
    IF to_regclass('pg_temp.spectrum_cohort_moves') IS NULL THEN
        PERFORM spectrum._empty_temporary('spectrum_cohort_moves',
            'user_key bigint, scope bigint, old_week date, new_week date');
    END IF;
    PERFORM analytics._move_feature_weeks(
        p_report, p_built_to, nullif(report.name, ''),
        analytics._event_key(
            CASE report.name WHEN '' THEN 'feature_used' ELSE definition.event_type END
        ),
        definition.properties_filter
    )
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.features, report.definition)
        AS definition
    WHERE report.report_id = p_report;
    PERFORM analytics._move_feature_adoption(p_report, v_is_build);

    IF EXISTS (SELECT FROM pg_temp.spectrum_feature_changes WHERE NOT is_added)
        OR EXISTS (SELECT FROM pg_temp.spectrum_cohort_moves WHERE old_week IS NOT NULL)
    THEN
        DELETE FROM analytics.mv_feature_adoption AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.users = 0;
        DELETE FROM spectrum.rollup_features AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.user_weeks = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_features(integer, bigint) IS
    'Moves the sums of a defined feature, or of those that events name, by the news.';

CREATE FUNCTION analytics._standing_feature_adoption()
RETURNS TABLE (
    account_id text,
    feature text,
    cohort_week date,
    period date,
    active_users bigint,
    users bigint,
    first_users bigint,
    repeat_users bigint,
    rate double precision
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definitions jsonb := (
        SELECT coalesce(jsonb_agg(report.definition), '[]') FROM spectrum.reports AS report
        WHERE report.kind = 'feature' AND report.state = 'served' AND report.name <> ''
    );
BEGIN
    RETURN QUERY
    SELECT a.account_id, a.feature, a.cohort_week, a.period, a.active_users, a.users,
        a.first_users, a.users - a.first_users, a.users / a.active_users::double precision
    FROM (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._feature_adoption(
        NULL, 'week', NULL, NULL, NULL, scopes.by_account, v_definitions
    ) AS a;
END
$$;
COMMENT ON FUNCTION analytics._standing_feature_adoption() IS
    'What analytics.feature_adoption has to show, out of all events: for verify().';
-- Room 60, operations: latency and errors of requests, and how many events come in. A request is an
-- event request or api_request; its properties are endpoint, latency_ms, status, error, service and
-- version. It is an error when its status is 500 or more, or its error is true. Events of the type
-- error are no requests: they stand beside the requests of their service, in a column of their own.
-- Of endpoint, service and version 200 characters count, and an empty one is none; of latency_ms
-- six decimals: so that what is kept of them (68_operations_standing.sql) fits into an index.
-- Percentiles are taken from how often each value occurs, so they are exact, and counts of several
-- days can be added up first. Reads analytics.events.

CREATE FUNCTION analytics._counted_percentile(
    p_values numeric[],
    p_counts_so_far bigint[],
    p_fraction numeric
)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rank numeric := p_fraction * (p_counts_so_far[cardinality(p_counts_so_far)] - 1);
    v_below numeric := p_values[width_bucket(floor(v_rank)::bigint, p_counts_so_far) + 1];
    v_above numeric := p_values[width_bucket(ceil(v_rank)::bigint, p_counts_so_far) + 1];
BEGIN
    RETURN trim_scale(v_below + (v_above - v_below) * (v_rank - floor(v_rank)));
END
$$;
COMMENT ON FUNCTION analytics._counted_percentile(numeric[], bigint[], numeric) IS
    'analytics._percentile of ascending values that occur more than once: beside each value how '
    'many numbers there are up to and with it.';

CREATE FUNCTION analytics._request_counts(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean,
    p_by_service boolean
)
RETURNS TABLE (
    account_key bigint,
    period_number integer,
    endpoint text,
    latency numeric,
    service text,
    version text,
    requests bigint,
    errors bigint,
    error_events bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_error_key integer := coalesce((
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = 'error'
    ), -1);
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('request', 'api_request')
            OR (p_by_service AND t.event_type = 'error')
    );
BEGIN
    -- The arguments are constants of this plan: of each CASE over them one branch remains.
    RETURN QUERY
    WITH requests AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS account_key,
            width_bucket(e.occurred_at, p_starts) AS number,
            CASE WHEN NOT p_by_service THEN
                nullif(left(e.properties ->> 'endpoint', 200), '')
            END COLLATE "C" AS endpoint,
            CASE WHEN NOT p_by_service THEN
                CASE jsonb_typeof(e.properties -> 'latency_ms')
                    WHEN 'number' THEN (e.properties -> 'latency_ms')::numeric
                    WHEN 'string' THEN analytics._text_number(e.properties ->> 'latency_ms')
                END
            END AS latency,
            CASE WHEN p_by_service THEN
                nullif(left(e.properties ->> 'service', 200), '')
            END COLLATE "C" AS service,
            CASE WHEN p_by_service THEN
                nullif(left(e.properties ->> 'version', 200), '')
            END COLLATE "C" AS version,
            e.event_type_key <> v_error_key AS is_request,
            CASE jsonb_typeof(e.properties -> 'status')
                WHEN 'number' THEN (e.properties -> 'status')::numeric >= 500
                WHEN 'string' THEN analytics._text_number(e.properties ->> 'status') >= 500
            END IS TRUE OR e.properties -> 'error' = 'true' AS is_error
        FROM analytics.events AS e
        WHERE e.event_type_key = ANY (v_keys)
            AND e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
        -- Rows without the properties are what is sorted.
        OFFSET 0
    )
    SELECT r.account_key, r.number, r.endpoint,
        CASE WHEN r.latency >= 0 AND r.latency < 1e15 THEN round(r.latency, 6) END AS measured,
        r.service, r.version,
        count(*) FILTER (WHERE r.is_request),
        count(*) FILTER (WHERE r.is_request AND r.is_error),
        count(*) FILTER (WHERE NOT r.is_request)
    FROM requests AS r
    GROUP BY r.account_key, r.number, r.endpoint, measured, r.service, r.version;
END
$$;
COMMENT ON FUNCTION analytics._request_counts(
    timestamptz[], timestamptz, timestamptz, text, boolean, boolean
) IS
    'How many requests, and how many of them errors, of all accounts (account_key 0) or of each, '
    'by period, endpoint and latency (NULL where it is no number from 0 to below 10^15), or by '
    'period, service and version; then also how many events of type error.';

CREATE FUNCTION analytics._latencies(
    p_starts timestamptz[],
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_key bigint,
    period date,
    endpoint text,
    requests bigint,
    p50 numeric,
    p95 numeric,
    p99 numeric,
    errors bigint,
    error_rate double precision,
    measured bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_dates date[] := analytics._period_dates(p_starts);
BEGIN
    RETURN QUERY
    WITH counts AS (
        SELECT c.account_key, c.period_number, c.endpoint, c.latency, c.requests, c.errors,
            (sum(c.requests) FILTER (WHERE c.latency IS NOT NULL) OVER ascending)::bigint AS so_far
        FROM analytics._request_counts(
            p_starts, p_from, p_to, p_account, p_by_account, false
        ) AS c
        WINDOW ascending AS (
            PARTITION BY c.account_key, c.period_number, c.endpoint ORDER BY c.latency
        )
    ),
    endpoints AS (
        SELECT c.account_key, c.period_number, c.endpoint, sum(c.requests)::bigint AS requests,
            sum(c.errors)::bigint AS errors, coalesce(max(c.so_far), 0) AS measured,
            array_agg(c.latency ORDER BY c.latency)
                FILTER (WHERE c.latency IS NOT NULL) AS latencies,
            array_agg(c.so_far ORDER BY c.latency)
                FILTER (WHERE c.latency IS NOT NULL) AS so_far
        FROM counts AS c
        GROUP BY c.account_key, c.period_number, c.endpoint
    )
    SELECT e.account_key, v_dates[e.period_number], e.endpoint, e.requests,
        analytics._counted_percentile(e.latencies, e.so_far, 0.5),
        analytics._counted_percentile(e.latencies, e.so_far, 0.95),
        analytics._counted_percentile(e.latencies, e.so_far, 0.99),
        e.errors, e.errors / e.requests::double precision, e.measured
    FROM endpoints AS e;
END
$$;
COMMENT ON FUNCTION analytics._latencies(
    timestamptz[], timestamptz, timestamptz, text, boolean
) IS
    'The rows of analytics.latency, of all accounts together (account_key 0) or of each.';

CREATE FUNCTION analytics.latency(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_period text DEFAULT 'day',
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    endpoint text,
    requests bigint,
    p50 numeric,
    p95 numeric,
    p99 numeric,
    errors bigint,
    error_rate double precision,
    measured bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT l.period, l.endpoint, l.requests, l.p50, l.p95, l.p99, l.errors, l.error_rate, l.measured
    FROM analytics._latencies(
        spectrum.period_starts(p_period, v_from, v_to), v_from, v_to, p_account, false
    ) AS l
    ORDER BY l.period, l.endpoint;
END
$$;
COMMENT ON FUNCTION analytics.latency(timestamptz, timestamptz, text, text) IS
    'Requests by day, week or month and endpoint inside [p_from, p_to) (NULL: as far as events '
    'go): how many, exact percentiles of latency_ms in milliseconds over the measured ones (those '
    'with a number from 0 to below 10^15 there), errors, and errors / requests. A period without '
    'requests of an endpoint is no row.';

CREATE FUNCTION analytics.error_rates(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_period text DEFAULT 'day',
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    service text,
    version text,
    requests bigint,
    errors bigint,
    error_rate double precision,
    error_events bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts(p_period, v_from, v_to);

    RETURN QUERY
    SELECT spectrum.period_date(v_starts[c.period_number]), c.service, c.version, c.requests,
        c.errors, c.errors / nullif(c.requests, 0)::double precision, c.error_events
    FROM analytics._request_counts(v_starts, v_from, v_to, p_account, false, true) AS c
    ORDER BY c.period_number, c.service, c.version;
END
$$;
COMMENT ON FUNCTION analytics.error_rates(timestamptz, timestamptz, text, text) IS
    'Requests by day, week or month, service and version inside [p_from, p_to) (NULL: as far as '
    'events go): how many, how many of them errors, errors / requests (NULL without requests), and '
    'beside them the events of type error, which are no requests.';

CREATE FUNCTION analytics.throughput(
    p_period text DEFAULT 'minute',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_event text DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (period timestamptz, events bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    -- Longer than any day: a day is one piece.
    v_step interval := (
        CASE p_period WHEN 'day' THEN '72 hours' ELSE '1 ' || p_period END
    )::interval;
    v_days timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{minute, hour, day}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_days := spectrum.period_starts('day', v_from, v_to);

    RETURN QUERY
    WITH counts AS (
        SELECT
            date_bin(v_step, e.occurred_at, v_days[width_bucket(e.occurred_at, v_days)]) AS start,
            count(*) AS events
        FROM analytics.events AS e
        WHERE e.occurred_at >= v_from
            AND e.occurred_at < v_to
            AND (p_event IS NULL OR e.event_type = p_event)
            AND (p_account IS NULL OR e.account_id = p_account)
        GROUP BY 1
    ),
    pieces AS (
        SELECT p.start
        FROM generate_series(1, cardinality(v_days) - 1) AS d (number)
        CROSS JOIN LATERAL generate_series(
            v_days[d.number], v_days[d.number + 1] - interval '1 us', v_step
        ) AS p (start)
        WHERE p.start + v_step > v_from AND p.start < v_to
    )
    SELECT p.start, coalesce(c.events, 0)
    FROM pieces AS p
    LEFT JOIN counts AS c USING (start)
    ORDER BY p.start;
END
$$;
COMMENT ON FUNCTION analytics.throughput(text, timestamptz, timestamptz, text, text) IS
    'Events (p_event NULL: of any type) by minute, hour or day inside [p_from, p_to) (NULL: as far '
    'as events go), by the instant at which each begins; one without events is a row too. Minutes '
    'and hours are counted off from the start of the calendar day, so an hour that the clock shows '
    'twice is two, and those of a day add up to the day.';
-- Room 60, standing operations: counts of requests, sums of the news. Beside them stands how often
-- each latency occurs in a cell, which is one endpoint's day: of the cells in the news, and no
-- others, the percentiles are found again.
--
-- Minutes are kept for a week only: they would be as many as the events. Days are for ever, in
-- analytics.daily_events, and analytics.throughput counts the minutes of any time.

CREATE FUNCTION spectrum._create_operations()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_operations') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_latencies (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        endpoint text COLLATE "C" NOT NULL,
        latency numeric NOT NULL,
        requests bigint NOT NULL,
        CONSTRAINT rollup_latencies_pkey
        PRIMARY KEY (report_id, account_id, day, endpoint, latency)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_latencies IS
        'How often each latency occurs by account (* is all), day and endpoint.';
    COMMENT ON COLUMN spectrum.rollup_latencies.report_id IS 'spectrum.reports, kind operations.';
    COMMENT ON COLUMN spectrum.rollup_latencies.latency IS 'latency_ms, to six decimals.';

    CREATE TABLE analytics.mv_operations (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        endpoint text COLLATE "C" NOT NULL,
        requests bigint NOT NULL,
        errors bigint NOT NULL,
        measured bigint NOT NULL,
        p50 numeric,
        p95 numeric,
        p99 numeric,
        CONSTRAINT mv_operations_pkey PRIMARY KEY (report_id, account_id, day, endpoint)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_operations IS
        'Requests per account, day and endpoint, and for all accounts together (account_id *), '
        'kept by refreshes. Read it through analytics.operations.';
    COMMENT ON COLUMN analytics.mv_operations.report_id IS 'spectrum.reports, kind operations.';
    COMMENT ON COLUMN analytics.mv_operations.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_operations.endpoint IS 'Empty where requests name none.';
    COMMENT ON COLUMN analytics.mv_operations.measured IS 'Requests that have a latency.';

    CREATE TABLE analytics.mv_error_rates (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        service text COLLATE "C" NOT NULL,
        version text COLLATE "C" NOT NULL,
        requests bigint NOT NULL,
        errors bigint NOT NULL,
        error_events bigint NOT NULL,
        CONSTRAINT mv_error_rates_pkey PRIMARY KEY (report_id, account_id, day, service, version)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_error_rates IS
        'Requests and errors per account, day, service and version, and for all accounts together '
        '(account_id *), kept by refreshes. Read it through analytics.error_rates_daily.';
    COMMENT ON COLUMN analytics.mv_error_rates.report_id IS 'spectrum.reports, kind operations.';
    COMMENT ON COLUMN analytics.mv_error_rates.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_error_rates.service IS 'Empty where none is named.';
    COMMENT ON COLUMN analytics.mv_error_rates.error_events IS
        'Events of type error, which are no requests.';

    CREATE TABLE analytics.mv_throughput (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        minute timestamptz NOT NULL,
        events bigint NOT NULL,
        CONSTRAINT mv_throughput_pkey PRIMARY KEY (report_id, account_id, minute)
    ) WITH (fillfactor = 80);
    CREATE INDEX mv_throughput_minute_idx ON analytics.mv_throughput (report_id, minute);
    COMMENT ON TABLE analytics.mv_throughput IS
        'Events per account and minute of the last eight days, and for all accounts together '
        '(account_id *), kept by refreshes. Read it through analytics.throughput_minutes.';
    COMMENT ON COLUMN analytics.mv_throughput.report_id IS 'spectrum.reports, kind operations.';

    PERFORM spectrum._create_operations_views();
    PERFORM spectrum._add_kind('operations', 86, '_maintain_operations',
        '{spectrum.rollup_latencies, analytics.mv_operations, analytics.mv_error_rates, '
        'analytics.mv_throughput}',
        '{operations, error_rates_daily, throughput_minutes}');
    PERFORM spectrum._begin_report('operations');
END
$$;
COMMENT ON FUNCTION spectrum._create_operations() IS
    'Room 60: makes rollup_latencies, mv_operations, mv_error_rates, mv_throughput and their '
    'plain views.';

CREATE FUNCTION spectrum._create_operations_views()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.operations AS
    SELECT
        sums.account_id, sums.day, nullif(sums.endpoint, '') AS endpoint, sums.requests,
        sums.p50, sums.p95, sums.p99, sums.errors,
        sums.errors / sums.requests::double precision AS error_rate,
        sums.measured,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_operations AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'operations' AND report.state = 'served'
    );
    COMMENT ON VIEW analytics.operations IS
        'Requests by account (* is all), day and endpoint: how many, exact percentiles of '
        'latency_ms, errors. As analytics.latency tells.';
    COMMENT ON COLUMN analytics.operations.endpoint IS 'Its first 200 characters; NULL: none.';
    COMMENT ON COLUMN analytics.operations.error_rate IS 'errors / requests.';
    COMMENT ON COLUMN analytics.operations.measured IS 'Requests that the percentiles are of.';

    CREATE VIEW analytics.error_rates_daily AS
    SELECT
        sums.account_id, sums.day, nullif(sums.service, '') AS service,
        nullif(sums.version, '') AS version, sums.requests, sums.errors,
        sums.errors / nullif(sums.requests, 0)::double precision AS error_rate,
        sums.error_events,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_error_rates AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'operations' AND report.state = 'served'
    );
    COMMENT ON VIEW analytics.error_rates_daily IS
        'Requests and errors by account (* is all), day, service and version, and the events of '
        'type error beside them. As analytics.error_rates tells.';
    COMMENT ON COLUMN analytics.error_rates_daily.error_rate IS
        'errors / requests; NULL without requests.';

    CREATE VIEW analytics.throughput_minutes AS
    SELECT
        sums.account_id, sums.minute, sums.events,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_throughput AS sums
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'operations' AND report.state = 'served'
    ) AND sums.minute >= now() - interval '7 days';
    COMMENT ON VIEW analytics.throughput_minutes IS
        'Events by account (* is all) and minute of the last seven days; a minute without events '
        'is no row. For other times ask analytics.throughput.';
END
$$;
COMMENT ON FUNCTION spectrum._create_operations_views() IS
    'Room 60: makes analytics.operations, error_rates_daily and throughput_minutes.';

CREATE FUNCTION analytics._lay_out_requests(p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('request', 'api_request', 'error')
    );
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_requests',
        'sign integer, scope bigint, day date, is_request boolean, is_error boolean, '
        'endpoint text COLLATE "C", latency numeric, service text COLLATE "C", '
        'version text COLLATE "C"');
    -- Read as in analytics._request_counts.
    INSERT INTO pg_temp.spectrum_requests (
        sign, scope, day, is_request, is_error, endpoint, latency, service, version
    )
    SELECT news.sign, news.scope, c.days[width_bucket(news.occurred_at, c.starts)],
        t.event_type <> 'error',
        CASE jsonb_typeof(news.properties -> 'status')
            WHEN 'number' THEN (news.properties -> 'status')::numeric >= 500
            WHEN 'string' THEN analytics._text_number(news.properties ->> 'status') >= 500
        END IS TRUE OR news.properties -> 'error' = 'true',
        coalesce(left(news.properties ->> 'endpoint', 200), ''),
        CASE WHEN read.latency >= 0 AND read.latency < 1e15 THEN round(read.latency, 6) END,
        coalesce(left(news.properties ->> 'service', 200), ''),
        coalesce(left(news.properties ->> 'version', 200), '')
    FROM pg_temp.spectrum_news AS news
    JOIN analytics.event_types AS t USING (event_type_key)
    CROSS JOIN analytics._news_days() AS c
    CROSS JOIN LATERAL (
        SELECT CASE jsonb_typeof(news.properties -> 'latency_ms')
            WHEN 'number' THEN (news.properties -> 'latency_ms')::numeric
            WHEN 'string' THEN analytics._text_number(news.properties ->> 'latency_ms')
        END AS latency
        OFFSET 0
    ) AS read
    WHERE news.sign <> 0 AND news.event_type_key = ANY (v_keys) AND news.user_key <= p_built_to;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_requests(bigint) IS
    'Lays out in pg_temp.spectrum_requests the requests and errors among the news, as read.';

CREATE FUNCTION analytics._move_latencies(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO spectrum.rollup_latencies AS known (
        report_id, account_id, day, endpoint, latency, requests
    )
    SELECT p_report, scopes.account_id, moved.day, moved.endpoint, moved.latency,
        sum(moved.requests)
    FROM (
        SELECT scope, day, endpoint, latency, sum(sign) AS requests
        FROM pg_temp.spectrum_requests
        WHERE is_request AND latency IS NOT NULL
        GROUP BY scope, day, endpoint, latency
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.day, moved.endpoint, moved.latency
    HAVING sum(moved.requests) <> 0
    ORDER BY scopes.account_id, moved.day, moved.endpoint, moved.latency
    ON CONFLICT (report_id, account_id, day, endpoint, latency) DO UPDATE SET
        requests = known.requests + excluded.requests;

    DELETE FROM spectrum.rollup_latencies AS known
    USING (
        SELECT DISTINCT scopes.account_id, moved.day, moved.endpoint, moved.latency
        FROM pg_temp.spectrum_requests AS moved
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE moved.sign < 0 AND moved.is_request AND moved.latency IS NOT NULL
    ) AS went
    WHERE known.report_id = p_report AND known.account_id = went.account_id
        AND known.day = went.day AND known.endpoint = went.endpoint
        AND known.latency = went.latency AND known.requests = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_latencies(integer) IS
    'Moves rollup_latencies by the requests laid out.';

CREATE FUNCTION analytics._move_endpoints(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO analytics.mv_operations AS sums (
        report_id, account_id, day, endpoint, requests, errors, measured, p50, p95, p99
    )
    SELECT p_report, moved.account_id, moved.day, moved.endpoint, moved.requests, moved.errors,
        moved.measured,
        analytics._counted_percentile(now.latencies, now.so_far, 0.5),
        analytics._counted_percentile(now.latencies, now.so_far, 0.95),
        analytics._counted_percentile(now.latencies, now.so_far, 0.99)
    FROM (
        SELECT scopes.account_id, cell.day, cell.endpoint, sum(cell.requests) AS requests,
            sum(cell.errors) AS errors, sum(cell.measured) AS measured
        FROM (
            SELECT scope, day, endpoint, sum(sign) AS requests,
                coalesce(sum(sign) FILTER (WHERE is_error), 0) AS errors,
                coalesce(sum(sign) FILTER (WHERE latency IS NOT NULL), 0) AS measured
            FROM pg_temp.spectrum_requests
            WHERE is_request
            GROUP BY scope, day, endpoint
        ) AS cell
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cell.day, cell.endpoint
    ) AS moved
    CROSS JOIN LATERAL (
        SELECT array_agg(value.latency ORDER BY value.latency) AS latencies,
            array_agg(value.so_far ORDER BY value.latency) AS so_far
        FROM (
            SELECT known.latency, (sum(known.requests) OVER (ORDER BY known.latency))::bigint
                AS so_far
            FROM spectrum.rollup_latencies AS known
            WHERE known.report_id = p_report AND known.account_id = moved.account_id
                AND known.day = moved.day AND known.endpoint = moved.endpoint
        ) AS value
        OFFSET 0
    ) AS now
    ON CONFLICT (report_id, account_id, day, endpoint) DO UPDATE SET
        requests = sums.requests + excluded.requests,
        errors = sums.errors + excluded.errors,
        measured = sums.measured + excluded.measured,
        p50 = excluded.p50,
        p95 = excluded.p95,
        p99 = excluded.p99;

    DELETE FROM analytics.mv_operations AS sums
    USING (
        SELECT DISTINCT scopes.account_id, moved.day
        FROM pg_temp.spectrum_requests AS moved
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE moved.sign < 0
    ) AS went
    WHERE sums.report_id = p_report AND sums.account_id = went.account_id
        AND sums.day = went.day AND sums.requests = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_endpoints(integer) IS
    'Moves mv_operations by the requests laid out, and finds the percentiles of their cells again.';

CREATE FUNCTION analytics._move_error_rates(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO analytics.mv_error_rates AS sums (
        report_id, account_id, day, service, version, requests, errors, error_events
    )
    SELECT p_report, scopes.account_id, moved.day, moved.service, moved.version,
        sum(moved.requests), sum(moved.errors), sum(moved.error_events)
    FROM (
        SELECT scope, day, service, version,
            coalesce(sum(sign) FILTER (WHERE is_request), 0) AS requests,
            coalesce(sum(sign) FILTER (WHERE is_request AND is_error), 0) AS errors,
            coalesce(sum(sign) FILTER (WHERE NOT is_request), 0) AS error_events
        FROM pg_temp.spectrum_requests
        GROUP BY scope, day, service, version
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.day, moved.service, moved.version
    HAVING (sum(moved.requests), sum(moved.errors), sum(moved.error_events)) <> (0, 0, 0)
    ON CONFLICT (report_id, account_id, day, service, version) DO UPDATE SET
        requests = sums.requests + excluded.requests,
        errors = sums.errors + excluded.errors,
        error_events = sums.error_events + excluded.error_events;

    DELETE FROM analytics.mv_error_rates AS sums
    USING (
        SELECT DISTINCT scopes.account_id, moved.day
        FROM pg_temp.spectrum_requests AS moved
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE moved.sign < 0
    ) AS went
    WHERE sums.report_id = p_report AND sums.account_id = went.account_id
        AND sums.day = went.day AND sums.requests = 0 AND sums.error_events = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_error_rates(integer) IS
    'Moves mv_error_rates by the requests and errors laid out.';

CREATE FUNCTION analytics._move_throughput(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    -- A day more than the view shows: a reader's clock may have stopped before this one.
    v_from timestamptz := date_bin('1 minute', now() - interval '8 days', '2000-01-01 00:00+00');
BEGIN
    INSERT INTO analytics.mv_throughput AS sums (report_id, account_id, minute, events)
    SELECT p_report, scopes.account_id, moved.minute, sum(moved.events)
    FROM (
        SELECT news.scope, date_bin('1 minute', news.occurred_at, v_from) AS minute,
            sum(news.sign) AS events
        FROM pg_temp.spectrum_news AS news
        WHERE news.occurred_at >= v_from AND news.user_key <= p_built_to
        GROUP BY 1, 2
    ) AS moved
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.minute
    HAVING sum(moved.events) <> 0
    ON CONFLICT (report_id, account_id, minute) DO UPDATE SET
        events = sums.events + excluded.events;

    DELETE FROM analytics.mv_throughput AS sums
    WHERE sums.report_id = p_report AND sums.minute < v_from;
    IF EXISTS (SELECT FROM pg_temp.spectrum_news WHERE sign < 0 AND occurred_at >= v_from) THEN
        DELETE FROM analytics.mv_throughput AS sums
        USING (
            SELECT DISTINCT date_bin('1 minute', news.occurred_at, v_from) AS minute
            FROM pg_temp.spectrum_news AS news
            WHERE news.sign < 0 AND news.occurred_at >= v_from
        ) AS went
        WHERE sums.report_id = p_report AND sums.minute = went.minute AND sums.events = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._move_throughput(integer, bigint) IS
    'Moves mv_throughput by the news of the last eight days, and lets go of what is older.';

CREATE FUNCTION analytics._maintain_operations(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._lay_out_requests(p_built_to);
    IF EXISTS (SELECT FROM pg_temp.spectrum_requests) THEN
        PERFORM analytics._move_latencies(p_report);
        PERFORM analytics._move_endpoints(p_report);
        PERFORM analytics._move_error_rates(p_report);
    END IF;
    PERFORM analytics._move_throughput(p_report, p_built_to);
END
$$;
COMMENT ON FUNCTION analytics._maintain_operations(integer, bigint) IS
    'Moves the tables of operations by the news.';

CREATE FUNCTION analytics._standing_operations()
RETURNS TABLE (
    account_id text,
    day date,
    endpoint text,
    requests bigint,
    p50 numeric,
    p95 numeric,
    p99 numeric,
    errors bigint,
    error_rate double precision,
    measured bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT coalesce(accounts.account_id, '*'), l.period, l.endpoint, l.requests, l.p50, l.p95,
        l.p99, l.errors, l.error_rate, l.measured
    FROM analytics._settle_range(NULL, NULL, NULL) AS r
    CROSS JOIN (VALUES (false), (true)) AS scope (by_account)
    CROSS JOIN LATERAL analytics._latencies(
        spectrum.period_starts('day', r.from_at, r.to_at), r.from_at, r.to_at, NULL,
        scope.by_account
    ) AS l
    LEFT JOIN analytics.accounts ON accounts.account_key = l.account_key;
END
$$;
COMMENT ON FUNCTION analytics._standing_operations() IS
    'What analytics.operations has to show, out of all events: for verify().';

CREATE FUNCTION analytics._standing_error_rates_daily()
RETURNS TABLE (
    account_id text,
    day date,
    service text,
    version text,
    requests bigint,
    errors bigint,
    error_rate double precision,
    error_events bigint
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT coalesce(accounts.account_id, '*'), spectrum.period_date(s.starts[c.period_number]),
        c.service, c.version, c.requests, c.errors,
        c.errors / nullif(c.requests, 0)::double precision, c.error_events
    FROM analytics._settle_range(NULL, NULL, NULL) AS r
    CROSS JOIN LATERAL spectrum.period_starts('day', r.from_at, r.to_at) AS s (starts)
    CROSS JOIN (VALUES (false), (true)) AS scope (by_account)
    CROSS JOIN LATERAL analytics._request_counts(
        s.starts, r.from_at, r.to_at, NULL, scope.by_account, true
    ) AS c
    LEFT JOIN analytics.accounts ON accounts.account_key = c.account_key;
END
$$;
COMMENT ON FUNCTION analytics._standing_error_rates_daily() IS
    'What analytics.error_rates_daily has to show, out of all events: for verify().';

CREATE FUNCTION analytics._standing_throughput_minutes()
RETURNS TABLE (account_id text, minute timestamptz, events bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz := date_bin(
        '1 minute', now() - interval '7 days' + interval '1 minute' - interval '1 us',
        '2000-01-01 00:00+00'
    );
BEGIN
    RETURN QUERY
    SELECT scope.account_id, date_bin('1 minute', e.occurred_at, v_from) AS minute, count(*)
    FROM analytics.events AS e
    CROSS JOIN LATERAL (VALUES ('*'), (e.account_id)) AS scope (account_id)
    WHERE e.occurred_at >= v_from AND scope.account_id IS NOT NULL
    GROUP BY scope.account_id, 2;
END
$$;
COMMENT ON FUNCTION analytics._standing_throughput_minutes() IS
    'What analytics.throughput_minutes has to show, out of all events: for verify().';
-- Room 60, the catalog: which event types there are, with which properties, of which JSON types.
-- Names and counts only: values may be private and stay in the events. Reads analytics.events once.

CREATE FUNCTION analytics._catalog_counts(p_account text, p_by_account boolean)
RETURNS TABLE (
    account_key bigint,
    event_type_key integer,
    property text,
    json_type text,
    events bigint,
    first_seen timestamptz,
    last_seen timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    SELECT CASE WHEN p_by_account THEN e.account_key ELSE 0 END, e.event_type_key, p.name,
        p.json_type, count(*), min(e.occurred_at), max(e.occurred_at)
    FROM analytics.events AS e
    CROSS JOIN LATERAL (
        SELECT NULL AS name, NULL AS json_type
        UNION ALL
        SELECT each.key COLLATE "C", jsonb_typeof(each.value)
        FROM jsonb_each(e.properties) AS each
    ) AS p
    WHERE (p_account IS NULL OR e.account_id = p_account)
        AND (NOT p_by_account OR e.account_key <> 0)
    GROUP BY 1, e.event_type_key, p.name, p.json_type;
END
$$;
COMMENT ON FUNCTION analytics._catalog_counts(text, boolean) IS
    'What the catalog is made of: events and their first and last time, of all accounts '
    '(account_key 0) or of each, by event type, property and JSON type; without property and JSON '
    'type those of the event type itself.';

CREATE FUNCTION analytics.event_catalog(p_account text DEFAULT NULL)
RETURNS TABLE (
    event_type text,
    property text,
    types jsonb,
    events bigint,
    first_seen timestamptz,
    last_seen timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT t.event_type, c.property,
        jsonb_object_agg(c.json_type, c.events) FILTER (WHERE c.json_type IS NOT NULL),
        sum(c.events)::bigint, min(c.first_seen), max(c.last_seen)
    FROM analytics._catalog_counts(p_account, false) AS c
    JOIN analytics.event_types AS t USING (event_type_key)
    GROUP BY t.event_type, c.property
    ORDER BY t.event_type, c.property NULLS FIRST;
END
$$;
COMMENT ON FUNCTION analytics.event_catalog(text) IS
    'The event types of an account (NULL: of all) and their top-level properties: events that have '
    'it, by JSON type too, the first and the last time. A row without property is the event type '
    'itself. Values are not shown.';
-- Room 60, reports: the user's own questions as standing views. A question is a name and a function
-- that says, for some users, what each of them contributes to which cell. A refresh calls it for
-- the users that the news concern, takes out what they contributed before and puts in what they
-- contribute now. It reads these users whole: that is the price for not having to say more.

CREATE FUNCTION spectrum._create_own_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.report_definitions') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.report_definitions (
        report text NOT NULL CONSTRAINT report_definitions_pkey PRIMARY KEY,
        contributions text NOT NULL,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        error_msg text
    );
    COMMENT ON TABLE spectrum.report_definitions IS
        'The user''s own questions that analytics.reports shows. Define one with '
        'spectrum.define_report().';
    COMMENT ON COLUMN spectrum.report_definitions.report IS 'Name.';
    COMMENT ON COLUMN spectrum.report_definitions.contributions IS
        'The function that says what users contribute.';
    COMMENT ON COLUMN spectrum.report_definitions.changed_at IS 'When it was last defined.';
    COMMENT ON COLUMN spectrum.report_definitions.error_msg IS
        'What the function failed with: the report was given up, until it is defined again.';

    CREATE TABLE spectrum.rollup_contributions (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cell text[] COLLATE "C" NOT NULL,
        amount numeric NOT NULL
            CONSTRAINT rollup_contributions_amount_is_finite
            CHECK (amount > '-infinity' AND amount < 'infinity'),
        CONSTRAINT rollup_contributions_pkey PRIMARY KEY (report_id, user_key, account_id, cell)
    );
    COMMENT ON TABLE spectrum.rollup_contributions IS
        'What each user contributes to the user''s own reports.';
    COMMENT ON COLUMN spectrum.rollup_contributions.report_id IS 'spectrum.reports, kind custom.';
    COMMENT ON COLUMN spectrum.rollup_contributions.account_id IS 'As the function says; * is all.';
    COMMENT ON COLUMN spectrum.rollup_contributions.cell IS 'As the function says.';
    COMMENT ON COLUMN spectrum.rollup_contributions.amount IS 'Sum of what the function says.';

    CREATE TABLE analytics.mv_reports (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cell text[] COLLATE "C" NOT NULL,
        users bigint NOT NULL,
        amount numeric NOT NULL,
        CONSTRAINT mv_reports_pkey PRIMARY KEY (report_id, account_id, cell)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_reports IS
        'Cells of the user''s own reports, kept by refreshes. Read it through analytics.reports.';
    COMMENT ON COLUMN analytics.mv_reports.report_id IS 'spectrum.reports, kind custom.';
    COMMENT ON COLUMN analytics.mv_reports.users IS 'Users who contribute.';
    COMMENT ON COLUMN analytics.mv_reports.amount IS 'Sum of what they contribute.';

    CREATE VIEW analytics.reports AS
    SELECT
        sums.account_id,
        report.name AS report,
        sums.cell,
        sums.users,
        trim_scale(sums.amount) AS amount,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_reports AS sums USING (report_id)
    WHERE report.kind = 'custom' AND report.state = 'served';
    COMMENT ON VIEW analytics.reports IS
        'The user''s own reports, by account as their functions say (account_id *: all accounts).';
    COMMENT ON COLUMN analytics.reports.report IS 'Name in spectrum.report_definitions.';
    COMMENT ON COLUMN analytics.reports.cell IS 'What is counted, as the function says.';
    COMMENT ON COLUMN analytics.reports.users IS 'Users who contribute.';
    COMMENT ON COLUMN analytics.reports.amount IS 'Sum of what they contribute.';
    PERFORM spectrum._add_kind('custom', 90, '_maintain_own_report',
        '{spectrum.rollup_contributions, analytics.mv_reports}', '{reports}');
END
$$;
COMMENT ON FUNCTION spectrum._create_own_reports() IS
    'Room 60: makes report_definitions, rollup_contributions, mv_reports and its plain view.';

CREATE FUNCTION spectrum._check_contributions(p_function text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_proc AS routine
        JOIN pg_class AS kept ON kept.oid = 'spectrum.report_definitions'::regclass
        WHERE routine.oid = to_regproc(p_function)
            AND routine.prokind = 'f' AND routine.provolatile IN ('s', 'i')
            AND pg_get_function_identity_arguments(routine.oid) = 'p_users bigint[]'
            AND pg_get_function_result(routine.oid)
                = 'TABLE(account_id text, user_key bigint, cell text[], amount numeric)'
            -- It runs with the rights of who refreshes: nobody else may be able to replace it.
            AND pg_has_role(routine.proowner, kept.relowner, 'MEMBER')
    ) THEN
        PERFORM spectrum._reject('p_contributions', p_function,
            'a STABLE function (p_users bigint[]) RETURNS TABLE (account_id text, user_key bigint, '
            'cell text[], amount numeric) that belongs to the owner of Spectrum''s tables');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_contributions(text) IS
    'Raises 22023 unless it is a function that says what users contribute.';

CREATE FUNCTION spectrum.define_report(p_name text, p_contributions regproc)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM spectrum._check_contributions(p_contributions::text);
    -- First of all: a refresh that gives the report up notes so in its definition.
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.report_definitions WHERE report = p_name;
    INSERT INTO spectrum.report_definitions (report, contributions)
    VALUES (p_name, p_contributions::text);
    PERFORM spectrum._begin_report(
        'custom', p_name, jsonb_build_object('contributions', p_contributions::text)
    );
END
$$;
COMMENT ON FUNCTION spectrum.define_report(text, regproc) IS
    'Defines a report of the user''s own or replaces it; define it again too where its function '
    'changed. The function (p_users bigint[]) says for these users (user_key), from all their '
    'events in analytics.events, who contributes how much to which cell of which account '
    '(account_id; * is all). The next refresh shows the sums in analytics.reports.';

CREATE FUNCTION spectrum.drop_report(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.report_definitions WHERE report = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a report in spectrum.report_definitions');
    END IF;
    PERFORM spectrum._discard_reports('custom', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_report(text) IS
    'Removes a report of the user''s own; the next refresh removes its rows. The function stays.';

CREATE FUNCTION analytics._own_contributions(p_function text, p_users bigint[])
RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT said.account_id, said.user_key, said.cell, sum(said.amount) '
        'FROM %s($1) AS said WHERE said.user_key = ANY ($1) GROUP BY 1, 2, 3',
        to_regproc(p_function))
    USING p_users;
END
$$;
COMMENT ON FUNCTION analytics._own_contributions(text, bigint[]) IS
    'What a user''s own function says about these users, and about nobody else.';

CREATE FUNCTION analytics._replace_contributions(
    p_report integer,
    p_function text,
    p_users bigint[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_contributions',
        'sign integer, user_key bigint, account_id text, cell text[], amount numeric');
    WITH removed AS (
        DELETE FROM spectrum.rollup_contributions AS known
        WHERE known.report_id = p_report AND known.user_key = ANY (p_users)
        RETURNING known.user_key, known.account_id, known.cell, known.amount
    )
    INSERT INTO pg_temp.spectrum_contributions (sign, user_key, account_id, cell, amount)
    SELECT -1, removed.* FROM removed;
    WITH added AS (
        INSERT INTO spectrum.rollup_contributions (report_id, user_key, account_id, cell, amount)
        SELECT p_report, said.user_key, said.account_id, said.cell, said.amount
        FROM analytics._own_contributions(p_function, p_users) AS said
        RETURNING user_key, account_id, cell, amount
    )
    INSERT INTO pg_temp.spectrum_contributions (sign, user_key, account_id, cell, amount)
    SELECT 1, added.* FROM added;

    INSERT INTO analytics.mv_reports AS sums (report_id, account_id, cell, users, amount)
    SELECT p_report, moved.account_id, moved.cell, sum(moved.sign), sum(moved.sign * moved.amount)
    FROM pg_temp.spectrum_contributions AS moved
    GROUP BY moved.account_id, moved.cell
    HAVING sum(moved.sign) <> 0 OR sum(moved.sign * moved.amount) <> 0
    ON CONFLICT (report_id, account_id, cell) DO UPDATE SET
        users = sums.users + excluded.users,
        amount = sums.amount + excluded.amount;
    DELETE FROM analytics.mv_reports AS sums
    USING (
        SELECT DISTINCT account_id, cell FROM pg_temp.spectrum_contributions WHERE sign < 0
    ) AS touched
    WHERE sums.report_id = p_report AND sums.account_id = touched.account_id
        AND sums.cell = touched.cell AND sums.users = 0;
END
$$;
COMMENT ON FUNCTION analytics._replace_contributions(integer, text, bigint[]) IS
    'Takes out what users contributed so far, and puts in what the function says now.';

CREATE FUNCTION analytics._maintain_own_report(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_users bigint[] := ARRAY(
        SELECT DISTINCT news.user_key FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
        ORDER BY news.user_key
    );
    v_name text;
    v_function text;
BEGIN
    SELECT name, definition ->> 'contributions' INTO v_name, v_function
    FROM spectrum.reports WHERE report_id = p_report;
    PERFORM spectrum._check_contributions(v_function);
    PERFORM analytics._replace_contributions(p_report, v_function, v_users);
EXCEPTION
    -- A fault of the function must not keep all other views from being refreshed. What passes by
    -- itself, as a cancel or a full disk, is no fault of it.
    WHEN data_exception OR cardinality_violation OR integrity_constraint_violation
        OR syntax_error_or_access_rule_violation OR program_limit_exceeded
        OR plpgsql_error OR feature_not_supported
    THEN
        UPDATE spectrum.report_definitions SET error_msg = SQLERRM WHERE report = v_name;
        PERFORM spectrum._discard_reports('custom', v_name);
        RAISE WARNING 'report % is given up: %', v_name, SQLERRM
            USING HINT = 'Mend its function, then call spectrum.define_report() again.';
END
$$;
COMMENT ON FUNCTION analytics._maintain_own_report(integer, bigint) IS
    'Moves mv_reports by what the users whom the news concern contribute now, and did before. If '
    'the function fails, the report is given up and its definition says why.';

CREATE FUNCTION analytics._standing_reports()
RETURNS TABLE (account_id text, report text, cell text[], users bigint, amount numeric)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_users bigint[] := ARRAY(
        SELECT dim.user_key FROM warehouse.dim_users AS dim WHERE dim.user_key <> 0
    );
BEGIN
    RETURN QUERY
    SELECT said.account_id, own.name, said.cell, count(*), trim_scale(sum(said.amount))
    FROM spectrum.reports AS own
    CROSS JOIN LATERAL analytics._own_contributions(
        own.definition ->> 'contributions', v_users
    ) AS said
    WHERE own.kind = 'custom' AND own.state = 'served'
    GROUP BY said.account_id, own.name, said.cell;
END
$$;
COMMENT ON FUNCTION analytics._standing_reports() IS
    'What analytics.reports has to show, out of all events: for verify().';
-- Room 60, standing catalog: how many events have which property, a sum of the news, and when the
-- first and the last of them occurred. News move these two outwards only. Where the first or last
-- event itself is taken back, the next one is looked for in the facts, month by month from that
-- end: what a withdrawal costs, and arriving events do not.
--
-- Names of properties are data too. Of each event type, the first 200 names are kept; all others,
-- those longer than 200 characters among them, share a row (other properties).

CREATE FUNCTION spectrum._create_event_catalog()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_event_catalog') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_property_names (
        report_id integer NOT NULL,
        event_type_key integer NOT NULL,
        property text COLLATE "C" NOT NULL,
        CONSTRAINT rollup_property_names_pkey PRIMARY KEY (report_id, event_type_key, property)
    );
    COMMENT ON TABLE spectrum.rollup_property_names IS
        'The properties of each event type that the catalog has rows for. Names only come: what '
        'was counted under other properties stays there.';
    COMMENT ON COLUMN spectrum.rollup_property_names.report_id IS 'spectrum.reports, kind catalog.';

    CREATE TABLE analytics.mv_event_catalog (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        event_type_key integer NOT NULL,
        property text COLLATE "C" NOT NULL,
        json_type text COLLATE "C" NOT NULL,
        events bigint NOT NULL,
        first_at timestamptz,
        last_at timestamptz,
        CONSTRAINT mv_event_catalog_pkey
        PRIMARY KEY (report_id, account_id, event_type_key, property, json_type)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_event_catalog IS
        'Event types and their properties per account, and for all accounts together (account_id '
        '*), kept by refreshes. Read it through analytics.event_catalog.';
    COMMENT ON COLUMN analytics.mv_event_catalog.report_id IS 'spectrum.reports, kind catalog.';
    COMMENT ON COLUMN analytics.mv_event_catalog.event_type_key IS 'dim_event_types.';
    COMMENT ON COLUMN analytics.mv_event_catalog.json_type IS
        'Of the property; empty: the row is the event type itself.';
    COMMENT ON COLUMN analytics.mv_event_catalog.first_at IS
        'Of the first event; NULL while the facts that say so are being withdrawn.';
    COMMENT ON COLUMN analytics.mv_event_catalog.last_at IS 'Of the last.';

    CREATE VIEW analytics.event_catalog AS
    SELECT
        sums.account_id,
        dim_event_types.event_type,
        CASE WHEN sums.is_property THEN sums.property END AS property,
        sums.types, sums.events, sums.first_seen, sums.last_seen,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM (
        SELECT
            kept.account_id, kept.event_type_key, kept.property, kept.json_type <> ''
                AS is_property,
            jsonb_object_agg(kept.json_type, kept.events) FILTER (WHERE kept.json_type <> '')
                AS types,
            sum(kept.events)::bigint AS events,
            min(kept.first_at) AS first_seen,
            max(kept.last_at) AS last_seen
        FROM analytics.mv_event_catalog AS kept
        WHERE kept.report_id = (
            SELECT report.report_id FROM spectrum.reports AS report
            WHERE report.kind = 'catalog' AND report.state = 'served'
        )
        GROUP BY kept.account_id, kept.event_type_key, kept.property, kept.json_type <> ''
    ) AS sums
    JOIN warehouse.dim_event_types USING (event_type_key);
    COMMENT ON VIEW analytics.event_catalog IS
        'The event types by account (* is all) and their top-level properties. A row without '
        'property is the event type itself. Values are not shown.';
    COMMENT ON COLUMN analytics.event_catalog.property IS
        'Its name; (other properties): those past 200 names of the event type, each counted.';
    COMMENT ON COLUMN analytics.event_catalog.types IS 'Events by the JSON type of the property.';
    COMMENT ON COLUMN analytics.event_catalog.events IS 'Events that have it.';
    COMMENT ON COLUMN analytics.event_catalog.first_seen IS 'When the first of them occurred.';
    COMMENT ON COLUMN analytics.event_catalog.last_seen IS 'When the last did.';
    PERFORM spectrum._add_kind('catalog', 87, '_maintain_event_catalog',
        '{spectrum.rollup_property_names, analytics.mv_event_catalog}', '{event_catalog}');
    PERFORM spectrum._begin_report('catalog');
END
$$;
COMMENT ON FUNCTION spectrum._create_event_catalog() IS
    'Room 60: makes rollup_property_names, mv_event_catalog and its plain view.';

CREATE FUNCTION analytics._lay_out_properties(p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_properties',
        'scope bigint, event_type_key integer, property text COLLATE "C", '
        'json_type text COLLATE "C", events bigint, first_at timestamptz, last_at timestamptz');
    INSERT INTO pg_temp.spectrum_properties (
        scope, event_type_key, property, json_type, events, first_at, last_at
    )
    SELECT news.scope, news.event_type_key, each.key, jsonb_typeof(each.value),
        sum(news.sign), min(news.occurred_at) FILTER (WHERE NOT news.is_leaving),
        max(news.occurred_at) FILTER (WHERE NOT news.is_leaving)
    FROM pg_temp.spectrum_news AS news
    CROSS JOIN LATERAL jsonb_each(news.properties) AS each
    WHERE news.sign <> 0 AND news.user_key <= p_built_to
    GROUP BY 1, 2, 3, 4
    UNION ALL
    SELECT news.scope, news.event_type_key, '', '', sum(news.sign),
        min(news.occurred_at) FILTER (WHERE NOT news.is_leaving),
        max(news.occurred_at) FILTER (WHERE NOT news.is_leaving)
    FROM pg_temp.spectrum_news AS news
    WHERE news.sign <> 0 AND news.user_key <= p_built_to
    GROUP BY 1, 2;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_properties(bigint) IS
    'Lays out in pg_temp.spectrum_properties what the news say of event types and properties. The '
    'times are of what came and what went: what went is inside the times kept. Who leaves a scope '
    'comes with all that is his into another.';

CREATE FUNCTION analytics._keep_property_names(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    INSERT INTO spectrum.rollup_property_names (report_id, event_type_key, property)
    SELECT p_report, numbered.event_type_key, numbered.property
    FROM (
        SELECT met.event_type_key, met.property, row_number() OVER (
            PARTITION BY met.event_type_key ORDER BY met.property
        ) + (
            SELECT count(*) FROM spectrum.rollup_property_names AS kept
            WHERE kept.report_id = p_report AND kept.event_type_key = met.event_type_key
        ) AS number
        FROM (
            SELECT DISTINCT news.event_type_key, news.property
            FROM pg_temp.spectrum_properties AS news
            WHERE news.json_type <> '' AND length(news.property) <= 200
                AND news.property <> '(other properties)'
        ) AS met
        WHERE NOT EXISTS (
            SELECT FROM spectrum.rollup_property_names AS kept
            WHERE kept.report_id = p_report AND kept.event_type_key = met.event_type_key
                AND kept.property = met.property
        )
    ) AS numbered
    WHERE numbered.number <= 200;

    UPDATE pg_temp.spectrum_properties AS news SET property = '(other properties)'
    WHERE news.json_type <> '' AND NOT EXISTS (
        SELECT FROM spectrum.rollup_property_names AS kept
        WHERE kept.report_id = p_report AND kept.event_type_key = news.event_type_key
            AND kept.property = news.property
    );
END
$$;
COMMENT ON FUNCTION analytics._keep_property_names(integer) IS
    'Gives new properties a row of their own as long as there are not too many, and puts the '
    'others of pg_temp.spectrum_properties together.';

CREATE FUNCTION analytics._lay_out_lost_ends(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_lost_ends',
        'is_first boolean, account_id text COLLATE "C", account_key bigint, '
        'event_type_key integer, property text COLLATE "C", json_type text COLLATE "C", '
        'lost_at timestamptz, until_at timestamptz');
    WITH times AS MATERIALIZED (
        SELECT DISTINCT event_type_key, occurred_at FROM pg_temp.spectrum_news WHERE sign < 0
    ),
    changes AS (
        SELECT news.scope, news.event_type_key, p.property, p.json_type, news.occurred_at,
            sum(news.sign) AS events
        FROM pg_temp.spectrum_news AS news
        JOIN times USING (event_type_key, occurred_at)
        CROSS JOIN LATERAL (
            SELECT '' AS property, '' AS json_type
            UNION ALL
            SELECT coalesce(kept.property, '(other properties)'), jsonb_typeof(each.value)
            FROM jsonb_each(news.properties) AS each
            LEFT JOIN spectrum.rollup_property_names AS kept
                ON kept.report_id = p_report AND kept.event_type_key = news.event_type_key
                    AND kept.property = each.key
        ) AS p
        WHERE news.user_key <= p_built_to
        GROUP BY 1, 2, 3, 4, 5
    )
    INSERT INTO pg_temp.spectrum_lost_ends (
        is_first, account_id, event_type_key, property, json_type, lost_at, until_at
    )
    SELECT side.is_first, sums.account_id, sums.event_type_key, sums.property, sums.json_type,
        side.lost_at, side.until_at
    FROM (
        SELECT scopes.account_id, changes.event_type_key, changes.property, changes.json_type,
            changes.occurred_at
        FROM changes
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY 1, 2, 3, 4, 5
        HAVING sum(changes.events) < 0
    ) AS went
    CROSS JOIN LATERAL (
        SELECT kept.* FROM analytics.mv_event_catalog AS kept
        WHERE kept.report_id = p_report AND kept.account_id = went.account_id
            AND kept.event_type_key = went.event_type_key AND kept.property = went.property
            AND kept.json_type = went.json_type
        OFFSET 0
    ) AS sums
    CROSS JOIN LATERAL (
        VALUES (true, sums.first_at, sums.last_at), (false, sums.last_at, sums.first_at)
    ) AS side (is_first, lost_at, until_at)
    WHERE side.lost_at = went.occurred_at;
    UPDATE pg_temp.spectrum_lost_ends AS lost SET account_key = dim.account_key
    FROM warehouse.dim_accounts AS dim
    WHERE dim.account_id = lost.account_id AND lost.account_id <> '*';


    UPDATE analytics.mv_event_catalog AS sums
    SET first_at = CASE WHEN NOT lost.is_first THEN sums.first_at END,
        last_at = CASE WHEN NOT lost.is_last THEN sums.last_at END
    FROM (
        SELECT account_id, event_type_key, property, json_type, bool_or(is_first) AS is_first,
            bool_or(NOT is_first) AS is_last
        FROM pg_temp.spectrum_lost_ends
        GROUP BY account_id, event_type_key, property, json_type
    ) AS lost
    WHERE sums.report_id = p_report AND sums.account_id = lost.account_id
        AND sums.event_type_key = lost.event_type_key AND sums.property = lost.property
        AND sums.json_type = lost.json_type;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_lost_ends(integer, bigint) IS
    'Lays out in pg_temp.spectrum_lost_ends the rows of the catalog whose first or last event was '
    'withdrawn, and empties these times.';

CREATE FUNCTION analytics._find_ends(
    p_report integer,
    p_built_to bigint,
    p_is_first boolean,
    p_month timestamptz
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_end timestamptz := (p_month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC';
    v_keys integer[] := ARRAY(
        SELECT DISTINCT event_type_key FROM pg_temp.spectrum_lost_ends
        WHERE is_first = p_is_first
    );
BEGIN
    -- Facts that a note still to come will bring do not count yet.
    WITH still_to_come AS MATERIALIZED (
        SELECT unnest(event_ids) AS event_id FROM spectrum.news
        WHERE last_at >= p_month AND first_at < v_end
    ),
    found AS (
        SELECT lost.account_id, lost.event_type_key, lost.property, lost.json_type,
            CASE WHEN p_is_first THEN min(fact.occurred_at) ELSE max(fact.occurred_at) END AS at
        FROM warehouse.fact_events AS fact
        CROSS JOIN LATERAL (
            SELECT '' AS property, '' AS json_type
            UNION ALL
            SELECT coalesce(kept.property, '(other properties)'), jsonb_typeof(each.value)
            FROM jsonb_each(fact.properties) AS each
            LEFT JOIN spectrum.rollup_property_names AS kept
                ON kept.report_id = p_report AND kept.event_type_key = fact.event_type_key
                    AND kept.property = each.key
        ) AS p
        JOIN pg_temp.spectrum_lost_ends AS lost
            ON lost.is_first = p_is_first AND lost.event_type_key = fact.event_type_key
                AND lost.property = p.property AND lost.json_type = p.json_type
                AND coalesce(lost.account_key, fact.account_key) = fact.account_key
        WHERE fact.event_type_key = ANY (v_keys)
            AND fact.occurred_at >= p_month AND fact.occurred_at < v_end
            AND fact.user_key <= p_built_to
            AND NOT EXISTS (
                SELECT FROM still_to_come WHERE still_to_come.event_id = fact.event_id
            )
        GROUP BY lost.account_id, lost.event_type_key, lost.property, lost.json_type
    ),
    moved AS (
        UPDATE analytics.mv_event_catalog AS sums
        SET first_at = CASE WHEN p_is_first THEN found.at ELSE sums.first_at END,
            last_at = CASE WHEN p_is_first THEN sums.last_at ELSE found.at END
        FROM found
        WHERE sums.report_id = p_report AND sums.account_id = found.account_id
            AND sums.event_type_key = found.event_type_key AND sums.property = found.property
            AND sums.json_type = found.json_type
        RETURNING sums.account_id, sums.event_type_key, sums.property, sums.json_type
    )
    DELETE FROM pg_temp.spectrum_lost_ends AS lost
    USING moved
    WHERE lost.is_first = p_is_first AND lost.account_id = moved.account_id
        AND lost.event_type_key = moved.event_type_key AND lost.property = moved.property
        AND lost.json_type = moved.json_type;
END
$$;
COMMENT ON FUNCTION analytics._find_ends(integer, bigint, boolean, timestamptz) IS
    'Finds those of the first (or last) times that were lost which lie in one month, in UTC.';

CREATE FUNCTION analytics._find_lost_ends(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_earliest timestamptz := (SELECT config.earliest_event FROM spectrum.config);
    v_is_first boolean;
    v_month timestamptz;
    v_until timestamptz;
BEGIN
    FOREACH v_is_first IN ARRAY '{true, false}'::boolean[] LOOP
        SELECT
            date_trunc('month',
                CASE WHEN v_is_first THEN min(lost_at) ELSE max(lost_at) END, 'UTC'),
            CASE WHEN v_is_first THEN max(coalesce(until_at, now() + interval '1 month'))
                ELSE min(coalesce(until_at, v_earliest)) END
        INTO v_month, v_until
        FROM pg_temp.spectrum_lost_ends
        WHERE is_first = v_is_first;
        WHILE EXISTS (SELECT FROM pg_temp.spectrum_lost_ends WHERE is_first = v_is_first)
            AND CASE WHEN v_is_first THEN v_month <= v_until
                ELSE v_month >= date_trunc('month', v_until, 'UTC') END
        LOOP
            PERFORM analytics._find_ends(p_report, p_built_to, v_is_first, v_month);
            v_month := (
                v_month AT TIME ZONE 'UTC' + CASE WHEN v_is_first THEN 1 ELSE -1 END
                    * interval '1 month'
            ) AT TIME ZONE 'UTC';
        END LOOP;
    END LOOP;
END
$$;
COMMENT ON FUNCTION analytics._find_lost_ends(integer, bigint) IS
    'Finds the first and last times that were lost, month by month from where they were. One that '
    'is not found is of facts that further notes take back; it stays empty until they come.';

CREATE FUNCTION analytics._maintain_event_catalog(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM analytics._lay_out_properties(p_built_to);
    PERFORM analytics._keep_property_names(p_report);
    INSERT INTO analytics.mv_event_catalog AS sums (
        report_id, account_id, event_type_key, property, json_type, events, first_at, last_at
    )
    SELECT p_report, scopes.account_id, news.event_type_key, news.property, news.json_type,
        sum(news.events), min(news.first_at), max(news.last_at)
    FROM pg_temp.spectrum_properties AS news
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, news.event_type_key, news.property, news.json_type
    ON CONFLICT (report_id, account_id, event_type_key, property, json_type) DO UPDATE SET
        events = sums.events + excluded.events,
        first_at = least(sums.first_at, excluded.first_at),
        last_at = greatest(sums.last_at, excluded.last_at);

    IF EXISTS (SELECT FROM pg_temp.spectrum_news WHERE sign < 0 AND user_key <= p_built_to) THEN
        DELETE FROM analytics.mv_event_catalog AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.events = 0;
        PERFORM analytics._lay_out_lost_ends(p_report, p_built_to);
        PERFORM analytics._find_lost_ends(p_report, p_built_to);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_event_catalog(integer, bigint) IS
    'Moves mv_event_catalog by the news.';

CREATE FUNCTION analytics._standing_event_catalog()
RETURNS TABLE (
    account_id text,
    event_type text,
    property text,
    types jsonb,
    events bigint,
    first_seen timestamptz,
    last_seen timestamptz
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_report integer := (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'catalog' AND report.state = 'served'
    );
BEGIN
    RETURN QUERY
    WITH counts AS (
        SELECT coalesce(accounts.account_id, '*') AS account_id, c.event_type_key,
            CASE WHEN c.property IS NOT NULL THEN coalesce(kept.property, '(other properties)') END
                AS property,
            c.json_type, sum(c.events)::bigint AS events, min(c.first_seen) AS first_seen,
            max(c.last_seen) AS last_seen
        FROM (VALUES (false), (true)) AS scope (by_account)
        CROSS JOIN LATERAL analytics._catalog_counts(NULL, scope.by_account) AS c
        LEFT JOIN analytics.accounts ON accounts.account_key = c.account_key
        -- Which names have a row of their own depends on the order in which they came.
        LEFT JOIN spectrum.rollup_property_names AS kept
            ON kept.report_id = v_report AND kept.event_type_key = c.event_type_key
                AND kept.property = c.property
        GROUP BY 1, 2, 3, 4
    )
    SELECT c.account_id, t.event_type, c.property,
        jsonb_object_agg(c.json_type, c.events) FILTER (WHERE c.json_type IS NOT NULL),
        sum(c.events)::bigint, min(c.first_seen), max(c.last_seen)
    FROM counts AS c
    JOIN analytics.event_types AS t USING (event_type_key)
    GROUP BY c.account_id, t.event_type, c.property;
END
$$;
COMMENT ON FUNCTION analytics._standing_event_catalog() IS
    'What analytics.event_catalog has to show, out of all events: for verify().';
-- Room 70, incomplete beta: the one function behind every distribution, in logarithms. No data;
-- read by distributions.sql alone.
--
-- A point x of (0, 1) is given by the logarithm of its odds, w = ln(x / y) with y = 1 - x, and by
-- its excess over the mean, d = b x - a y = (a + b) x - a. The excess follows from w, but the
-- caller knows it without the rounding error that decides the tails of large shapes. Over w every
-- beta density is log-concave with its peak at the mean x = a / (a + b). No formula takes the
-- difference of nearly equal numbers, and none can leave the range of a float8.

CREATE FUNCTION spectrum._check_number(
    p_argument text, p_value double precision, p_is_possible boolean, p_expected text
)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT p_is_possible AND p_value <> 'NaN' THEN
        PERFORM spectrum._reject(p_argument, p_value::text, p_expected);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_number(text, double precision, boolean, text) IS
    'Raises 22023 unless the number is possible; NaN and NULL pass.';

CREATE FUNCTION spectrum._check_positive(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        p_argument, p_value, p_value > 0 AND p_value < 'Infinity', 'a positive finite number'
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_positive(text, double precision) IS
    'Raises 22023 unless the number is positive and finite; NaN and NULL pass.';

CREATE FUNCTION spectrum._check_probability(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        p_argument, p_value, p_value BETWEEN 0 AND 1, 'a probability, from 0 to 1'
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_probability(text, double precision) IS
    'Raises 22023 unless the number is a probability; NaN and NULL pass.';

CREATE FUNCTION spectrum._exponential(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE
        WHEN p_x < -707 THEN 0
        WHEN p_x > 709.78 AND p_x <> 'NaN' THEN 'Infinity'
        ELSE exp(p_x)
    END;
END
$$;
COMMENT ON FUNCTION spectrum._exponential(double precision) IS
    'exp(x), with 0 and Infinity where exp raises underflow and overflow.';

CREATE FUNCTION spectrum._log_one_plus(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN asinh((p_x + p_x / (1 + p_x)) / 2);
END
$$;
COMMENT ON FUNCTION spectrum._log_one_plus(double precision) IS
    'ln(1 + x) for x > -1, exact for small x too: sinh of it is (1 + x - 1 / (1 + x)) / 2.';

CREATE FUNCTION spectrum._stirling_error(p_a double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := p_a;
    v_steps double precision := 0;
    v_inverse double precision;
    v_square double precision;
BEGIN
    IF p_a > 1e8 THEN
        RETURN 1 / p_a / 12;
    END IF;
    WHILE v_a < 10 LOOP
        v_steps := v_steps + (v_a + 0.5) * (ln(v_a + 1) - ln(v_a)) - 1;
        v_a := v_a + 1;
    END LOOP;
    v_inverse := 1 / v_a;
    v_square := v_inverse * v_inverse;
    RETURN v_steps + v_inverse * (1.0 / 12 - v_square * (1.0 / 360 - v_square * (
        1.0 / 1260 - v_square * (1.0 / 1680 - v_square * (1.0 / 1188 - v_square * (
            691.0 / 360360 - v_square / 156))))));
END
$$;
COMMENT ON FUNCTION spectrum._stirling_error(double precision) IS
    'ln Gamma(a) - ((a - 1/2) ln a - a + ln(2 pi) / 2) for a > 0: what Stirling''s formula leaves. '
    'Its series (DLMF 5.11.1) from a = 10 on, reached by Gamma(a + 1) = a Gamma(a).';

CREATE FUNCTION spectrum._deviance(
    p_a double precision, p_d double precision, p_log_ratio double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_s double precision;
    v_square double precision;
    v_sum double precision := 0;
BEGIN
    IF abs(p_d) < p_a * 1e-60 THEN
        RETURN 0;
    ELSIF p_d < p_a * -0.9 OR p_d > p_a * 10 THEN
        RETURN p_d - p_a * p_log_ratio;
    ELSIF abs(p_d) > p_a * 0.4 THEN
        RETURN p_d - p_a * ln(1 + p_d / p_a);
    END IF;
    -- u - ln(1 + u) = s u - 2 (s^3 / 3 + s^5 / 5 + ...) with s = u / (2 + u)
    v_s := p_d / (2 * p_a + p_d);
    v_square := v_s * v_s;
    FOR v_odd IN REVERSE 25..3 BY 2 LOOP
        v_sum := v_sum * v_square + 1.0 / v_odd;
    END LOOP;
    RETURN p_d * v_s - 2 * p_a * v_square * v_s * v_sum;
END
$$;
COMMENT ON FUNCTION spectrum._deviance(double precision, double precision, double precision) IS
    'd - a ln(1 + d / a), never negative, without cancellation (Loader 2000, Fast and accurate '
    'computation of binomial probabilities, bd0). p_log_ratio is ln(1 + d / a), used far from 0.';

CREATE FUNCTION spectrum._log_beta_density(
    p_log_odds double precision,
    p_excess double precision,
    p_a double precision,
    p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_n double precision := p_a + p_b;
    v_rest double precision := spectrum._log_one_plus(exp(greatest(-abs(p_log_odds), -700)));
    v_log_nx double precision := ln(v_n) + least(p_log_odds, 0) - v_rest;
    v_log_ny double precision := ln(v_n) + least(-p_log_odds, 0) - v_rest;
BEGIN
    RETURN (ln(p_a) + ln(p_b) - ln(v_n) - ln(2 * pi())) / 2
        + spectrum._stirling_error(v_n)
        - spectrum._stirling_error(p_a) - spectrum._stirling_error(p_b)
        - spectrum._deviance(p_a, p_excess, v_log_nx - ln(p_a))
        - spectrum._deviance(p_b, -p_excess, v_log_ny - ln(p_b));
END
$$;
COMMENT ON FUNCTION spectrum._log_beta_density(
    double precision, double precision, double precision, double precision
) IS
    'ln(x^a y^b / B(a, b)): the log density of the log odds of a beta variable. Saddle-point form '
    '(Loader 2000), with no difference of large logarithms of gamma functions.';

CREATE FUNCTION spectrum._log_beta_integral(
    p_log_odds double precision,
    p_excess double precision,
    p_a double precision,
    p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    c_step CONSTANT double precision := 0.125;
    v_odds double precision := exp(greatest(least(p_log_odds, 650), -350));
    v_slope double precision := least(v_odds - p_excess * (1 + v_odds), 1e140);
    v_curvature double precision := greatest(p_b - 1, 0) * v_odds * (1 + v_odds);
    v_scale double precision := least(
        1, 1 / v_odds, 2 / (v_slope + sqrt(v_slope * v_slope + 2 * v_curvature))
    );
    v_s double precision := -3.625;
    v_start double precision;
    v_log_growth double precision;
    v_v double precision;
    v_fall double precision;
    v_rise double precision;
    v_log_rise double precision;
    v_log_value double precision;
    v_sum double precision := 0;
BEGIN
    LOOP
        v_s := v_s + c_step;
        v_start := exp(-least(v_s, 700));
        v_log_growth := v_s - v_start;
        v_v := v_scale * exp(v_log_growth / 2) * exp(v_log_growth / 2);
        v_fall := 2 * tanh(v_v / 2) / (1 + tanh(v_v / 2));
        v_rise := v_odds * v_fall;
        v_log_rise := asinh((v_rise + v_rise / (1 + v_rise)) / 2);
        IF least(p_a, p_b) < 1000 THEN
            v_log_value := (p_b - 1) * v_log_rise - p_a * greatest(v_v, 1e-200);
        ELSE
            v_log_value := -v_slope * v_v - (p_b - 1) * (
                v_odds * spectrum._deviance(1, -v_fall, -v_v)
                + spectrum._deviance(1, v_rise, v_log_rise)
            );
        END IF;
        EXIT WHEN v_log_value + v_log_growth < -50 AND v_s > 0;
        v_sum := v_sum + exp(v_log_value + v_log_growth) * (1 + v_start);
    END LOOP;
    RETURN least(0, ln(v_sum * c_step * v_scale) + ln(1 + v_odds)
        + spectrum._log_beta_density(p_log_odds, p_excess, p_a, p_b));
END
$$;
COMMENT ON FUNCTION spectrum._log_beta_integral(
    double precision, double precision, double precision, double precision
) IS
    'ln I_x(a, b) by quadrature, for x not far above the mean. With t = x e^-v in DLMF 8.17.1, '
    'I_x(a, b) = x^a y^(b - 1) / B(a, b) * integral over v > 0 of e^(-a v) (1 + odds * fall)'
    '^(b - 1), fall = 1 - e^-v: smooth for all a and b, and done to full precision by some 65 '
    'points of the trapezoidal rule after v = scale * exp(s - exp(-s)) (Takahasi and Mori 1974). '
    'For large shapes the logarithms of both factors, which nearly cancel, are taken relative to '
    'their common slope at v = 0.';

CREATE FUNCTION spectrum._log_beta_cdf(
    p_log_odds double precision,
    p_excess double precision,
    p_a double precision,
    p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_log_upper double precision;
BEGIN
    IF p_excess > 0 THEN
        v_log_upper := spectrum._log_beta_integral(-p_log_odds, -p_excess, p_b, p_a);
        IF v_log_upper < ln(0.99) THEN
            RETURN spectrum._log_one_plus(-spectrum._exponential(v_log_upper));
        END IF;
    END IF;
    RETURN spectrum._log_beta_integral(p_log_odds, p_excess, p_a, p_b);
END
$$;
COMMENT ON FUNCTION spectrum._log_beta_cdf(
    double precision, double precision, double precision, double precision
) IS
    'ln I_x(a, b), above the mean by I_x(a, b) = 1 - I_y(b, a) (DLMF 8.17.4), unless that would '
    'leave next to nothing.';

CREATE FUNCTION spectrum._beta_log_odds(
    p_log_p double precision,
    p_a double precision,
    p_b double precision,
    p_start double precision DEFAULT NULL
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_w double precision := coalesce(p_start, ln(p_a) - sqrt(-2 * p_log_p / p_a)
        - ln(p_b + sqrt(-2 * p_log_p * p_b) - p_log_p));
    v_odds double precision;
    v_excess double precision;
    v_log_cdf double precision;
    v_log_width double precision;
    v_step double precision;
BEGIN
    FOR v_try IN 1..200 LOOP
        v_odds := exp(greatest(least(v_w, 400), -400));
        v_excess := p_b / (1 + 1 / v_odds) - p_a / (1 + v_odds);
        v_log_cdf := spectrum._log_beta_cdf(v_w, v_excess, p_a, p_b);
        v_log_width := v_log_cdf - spectrum._log_beta_density(v_w, v_excess, p_a, p_b);
        v_step := (p_log_p - v_log_cdf) * exp(greatest(least(v_log_width, 231), -231));
        v_w := v_w + v_step;
        -- one more step squares the error; still climbing past e^2000, any quantile is at its end
        EXIT WHEN abs(p_log_p - v_log_cdf) < 1e-6
            OR abs(v_step) < 1e-15 * greatest(abs(v_w), 1)
            OR (v_w > 2000 AND v_step > 0);
    END LOOP;
    RETURN v_w;
END
$$;
COMMENT ON FUNCTION spectrum._beta_log_odds(
    double precision, double precision, double precision, double precision
) IS
    'The log odds at which ln I_x(a, b) is p_log_p. ln I_x is concave in the log odds, so that '
    'Newton''s method climbs to the root from any start below it, where its first step also leads '
    'from a start above. Unless given, the start is near the tail bounds of the two gamma '
    'variables whose ratio the odds are (Laurent and Massart 2000, lemma 1).';

CREATE FUNCTION spectrum._beta_excess(
    p_x double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_n double precision := p_a + p_b;
    v_n_rest double precision;
    v_n_high double precision;
    v_x_high double precision;
    v_nx double precision;
    v_nx_rest double precision;
BEGIN
    IF p_x < 1e-200 THEN
        RETURN -p_a;
    END IF;
    v_nx := v_n * p_x;
    IF v_nx < p_a / 2 OR v_nx > p_a * 2 THEN
        RETURN v_nx - p_a;
    END IF;
    -- what rounding took from a + b, and from n x (its factors split into halves of 26 bits)
    v_n_rest := least(p_a, p_b) - (v_n - greatest(p_a, p_b));
    v_n_high := v_n * 134217729 - (v_n * 134217729 - v_n);
    v_x_high := p_x * 134217729 - (p_x * 134217729 - p_x);
    v_nx_rest := v_n_high * v_x_high - v_nx
        + v_n_high * (p_x - v_x_high) + (v_n - v_n_high) * v_x_high
        + (v_n - v_n_high) * (p_x - v_x_high);
    RETURN v_nx - p_a + (v_nx_rest + v_n_rest * p_x);
END
$$;
COMMENT ON FUNCTION spectrum._beta_excess(double precision, double precision, double precision) IS
    '(a + b) x - a, rounded once: the sum and the product are kept exact (Dekker 1971).';
-- Room 70, distributions: normal, Student t, chi-square and beta, each as cdf, sf (upper tail,
-- 1 - cdf) and quantile. No data; read by tests.sql, by the experiments and by anyone.
--
-- All are the regularized incomplete beta function I_x(a, b) of incomplete_beta.sql:
--   Student t    P(|T| > t) = I_x(df / 2, 1 / 2) at the odds df : t^2 (A&S 26.5.27)
--   normal       its limit: double precision sees no difference from df = 1e30
--   chi-square   P(X <= x) = P(df / 2, x / 2) (DLMF 8.2.4), and the incomplete gamma function
--                P(a, g) is the limit of I_x(a, B) at the odds g : B for large B
--
-- Relative errors stay below 1e-12 wherever the result is at least 1e-300, for shapes and degrees
-- of freedom from 1e-8 to 1e12; smaller results may be 0. NULL gives NULL, NaN gives NaN, an
-- impossible parameter raises 22023, and nothing else does. Parameters below 1e-100 are read as
-- 1e-100, shapes above 1e100 as 1e100, Student's degrees of freedom above 1e30 as 1e30.

CREATE FUNCTION spectrum._beta_tail(
    p_x double precision,
    p_a double precision,
    p_b double precision,
    p_is_upper boolean
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(least(p_a, 1e100), 1e-100);
    v_b double precision := greatest(least(p_b, 1e100), 1e-100);
    v_log_odds double precision;
    v_excess double precision;
BEGIN
    PERFORM spectrum._check_positive('p_a', p_a);
    PERFORM spectrum._check_positive('p_b', p_b);
    IF 'NaN' IN (p_x, p_a, p_b) THEN
        RETURN double precision 'NaN';
    ELSIF p_x <= 0 OR p_x >= 1 THEN
        RETURN CASE WHEN (p_x >= 1) = p_is_upper THEN 0 ELSE 1 END;
    END IF;

    v_log_odds := ln(p_x / (1 - p_x));
    v_excess := CASE
        WHEN p_x <= 0.5 THEN spectrum._beta_excess(p_x, v_a, v_b)
        ELSE -spectrum._beta_excess(1 - p_x, v_b, v_a)
    END;
    RETURN spectrum._exponential(CASE
        WHEN p_is_upper THEN spectrum._log_beta_cdf(-v_log_odds, -v_excess, v_b, v_a)
        ELSE spectrum._log_beta_cdf(v_log_odds, v_excess, v_a, v_b)
    END);
END
$$;
COMMENT ON FUNCTION spectrum._beta_tail(
    double precision, double precision, double precision, boolean
) IS
    'P(X > x) or P(X <= x) of a beta variable.';

CREATE FUNCTION spectrum._chi_square_limit(p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN 1e18 * greatest(p_df, 1) * greatest(p_df, 1);
END
$$;
COMMENT ON FUNCTION spectrum._chi_square_limit(double precision) IS
    'A second shape B so large that B times the odds of a beta variable (df / 2, B) is a gamma '
    'variable of shape df / 2 in double precision.';

CREATE FUNCTION spectrum._chi_square_tail(
    p_x double precision, p_df double precision, p_is_upper boolean
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(p_df, 2e-100) / 2;
    v_b double precision;
    v_x double precision;
    v_log_odds double precision;
    v_excess double precision;
BEGIN
    PERFORM spectrum._check_positive('p_df', p_df);
    IF 'NaN' IN (p_x, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_x <= 0 THEN
        RETURN CASE WHEN p_is_upper THEN 1 ELSE 0 END;
    ELSIF p_df > 1e32 THEN
        -- neighbours among the numbers of this size are standard deviations apart
        RETURN CASE WHEN p_x = p_df THEN 0.5 WHEN (p_x > p_df) = p_is_upper THEN 0 ELSE 1 END;
    END IF;

    -- from 100 (df + 100) on the upper tail is 0, and x must stay far below B
    v_x := least(p_x, 100 * (p_df + 100));
    v_b := spectrum._chi_square_limit(p_df);
    v_log_odds := ln(v_x) - ln(2 * v_b);
    v_excess := greatest(v_x, 1e-200) / 2 - v_a;
    RETURN spectrum._exponential(CASE
        WHEN p_is_upper THEN spectrum._log_beta_cdf(-v_log_odds, -v_excess, v_b, v_a)
        ELSE spectrum._log_beta_cdf(v_log_odds, v_excess, v_a, v_b)
    END);
END
$$;
COMMENT ON FUNCTION spectrum._chi_square_tail(double precision, double precision, boolean) IS
    'P(X > x) or P(X <= x) of a chi-square variable, as the limit of the beta distribution.';

CREATE FUNCTION spectrum.beta_cdf(
    p_x double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._beta_tail(p_x, p_a, p_b, false);
END
$$;
COMMENT ON FUNCTION spectrum.beta_cdf(double precision, double precision, double precision) IS
    'P(X <= x) of a beta variable with shapes a > 0 and b > 0: the regularized incomplete beta '
    'function I_x(a, b) (DLMF 8.17.2); 0 for x <= 0, 1 for x >= 1.';

CREATE FUNCTION spectrum.beta_sf(
    p_x double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._beta_tail(p_x, p_a, p_b, true);
END
$$;
COMMENT ON FUNCTION spectrum.beta_sf(double precision, double precision, double precision) IS
    'P(X > x) of a beta variable with shapes a > 0 and b > 0, exact where beta_cdf is near 1.';

CREATE FUNCTION spectrum.beta_quantile(
    p_p double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(least(p_a, 1e100), 1e-100);
    v_b double precision := greatest(least(p_b, 1e100), 1e-100);
    v_log_odds double precision;
    v_lesser double precision;
BEGIN
    PERFORM spectrum._check_probability('p_p', p_p);
    PERFORM spectrum._check_positive('p_a', p_a);
    PERFORM spectrum._check_positive('p_b', p_b);
    IF 'NaN' IN (p_p, p_a, p_b) THEN
        RETURN double precision 'NaN';
    ELSIF p_p IN (0, 1) THEN
        RETURN p_p;
    END IF;

    v_log_odds := CASE
        WHEN p_p <= 0.5 THEN spectrum._beta_log_odds(ln(p_p), v_a, v_b)
        ELSE -spectrum._beta_log_odds(ln(1 - p_p), v_b, v_a)
    END;
    v_lesser := spectrum._exponential(-abs(v_log_odds));
    RETURN CASE WHEN v_log_odds < 0 THEN v_lesser ELSE 1 END / (1 + v_lesser);
END
$$;
COMMENT ON FUNCTION spectrum.beta_quantile(double precision, double precision, double precision) IS
    'The x in [0, 1] with beta_cdf(x, a, b) = p, for p in [0, 1]. Newton''s method on ln I_x(a, b) '
    'over the log odds of x.';

CREATE FUNCTION spectrum.chi_square_cdf(p_x double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._chi_square_tail(p_x, p_df, false);
END
$$;
COMMENT ON FUNCTION spectrum.chi_square_cdf(double precision, double precision) IS
    'P(X <= x) of a chi-square variable with df > 0 degrees of freedom: the regularized incomplete '
    'gamma function P(df / 2, x / 2) (DLMF 8.2.4); 0 for x <= 0.';

CREATE FUNCTION spectrum.chi_square_sf(p_x double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._chi_square_tail(p_x, p_df, true);
END
$$;
COMMENT ON FUNCTION spectrum.chi_square_sf(double precision, double precision) IS
    'P(X > x) of a chi-square variable with df > 0 degrees of freedom, the p-value of a chi-square '
    'test: Q(df / 2, x / 2) (DLMF 8.2.4); 1 for x <= 0.';

CREATE FUNCTION spectrum.chi_square_quantile(p_p double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(p_df, 2e-100) / 2;
    v_b double precision;
BEGIN
    PERFORM spectrum._check_probability('p_p', p_p);
    PERFORM spectrum._check_positive('p_df', p_df);
    IF 'NaN' IN (p_p, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_p IN (0, 1) THEN
        RETURN CASE WHEN p_p = 0 THEN 0 ELSE double precision 'Infinity' END;
    ELSIF p_df > 1e32 THEN
        RETURN p_df;
    END IF;

    v_b := spectrum._chi_square_limit(p_df);
    RETURN spectrum._exponential(ln(2 * v_b) + CASE
        WHEN p_p <= 0.5 THEN spectrum._beta_log_odds(ln(p_p), v_a, v_b)
        ELSE -spectrum._beta_log_odds(ln(1 - p_p), v_b, v_a)
    END);
END
$$;
COMMENT ON FUNCTION spectrum.chi_square_quantile(double precision, double precision) IS
    'The x with chi_square_cdf(x, df) = p, for p in [0, 1]; Infinity for p = 1. Newton''s method, '
    'as in beta_quantile.';

CREATE FUNCTION spectrum.student_t_sf(p_t double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_df double precision := greatest(least(p_df, 1e30), 1e-100);
    v_square double precision := greatest(least(abs(p_t), 1e100), 1e-100) ^ 2;
    v_log_odds double precision;
    v_half_tail double precision;
BEGIN
    PERFORM spectrum._check_number('p_df', p_df, p_df > 0, 'a positive number, or Infinity');
    IF 'NaN' IN (p_t, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_t = 0 THEN
        RETURN 0.5;
    ELSIF abs(p_t) = 'Infinity' THEN
        RETURN CASE WHEN p_t > 0 THEN 0 ELSE 1 END;
    END IF;

    v_log_odds := ln(v_df) - 2 * ln(abs(p_t));
    v_half_tail := spectrum._exponential(spectrum._log_beta_cdf(
        v_log_odds, (1 - v_square) / (1 + v_square / v_df) / 2, v_df / 2, 0.5
    ) - ln(2::double precision));
    RETURN CASE WHEN p_t > 0 THEN v_half_tail ELSE 1 - v_half_tail END;
END
$$;
COMMENT ON FUNCTION spectrum.student_t_sf(double precision, double precision) IS
    'P(T > t) of Student''s t with df > 0 degrees of freedom (Infinity: normal): for t > 0 it is '
    'I_x(df / 2, 1 / 2) / 2 with x = df / (df + t^2) (A&S 26.5.27). The two-sided p-value of t is '
    '2 * student_t_sf(abs(t), df).';

CREATE FUNCTION spectrum.student_t_cdf(p_t double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.student_t_sf(-p_t, p_df);
END
$$;
COMMENT ON FUNCTION spectrum.student_t_cdf(double precision, double precision) IS
    'P(T <= t) of Student''s t with df > 0 degrees of freedom: student_t_sf(-t, df).';

CREATE FUNCTION spectrum._student_t_guess(p_tail double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_root double precision := sqrt(-2 * ln(p_tail));
    v_z double precision := v_root - (2.515517 + v_root * (0.802853 + v_root * 0.010328))
        / (1 + v_root * (1.432788 + v_root * (0.189269 + v_root * 0.001308)));
BEGIN
    RETURN v_z + (v_z ^ 3 + v_z) / (4 * p_df)
        + (5 * v_z ^ 5 + 16 * v_z ^ 3 + 3 * v_z) / (96 * p_df ^ 2);
END
$$;
COMMENT ON FUNCTION spectrum._student_t_guess(double precision, double precision) IS
    'About the t whose upper tail is p_tail < 0.25: the normal quantile to 4.5e-4 (A&S 26.2.23) '
    'and two terms of its expansion in 1 / df (A&S 26.7.5), good where df is large against t^2.';

CREATE FUNCTION spectrum.student_t_quantile(p_p double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_df double precision := greatest(least(p_df, 1e30), 1e-100);
    v_tail double precision := least(p_p, 1 - p_p);
    v_guess double precision;
    v_log_square double precision;
BEGIN
    PERFORM spectrum._check_probability('p_p', p_p);
    PERFORM spectrum._check_number('p_df', p_df, p_df > 0, 'a positive number, or Infinity');
    IF 'NaN' IN (p_p, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_p IN (0, 0.5, 1) THEN
        RETURN CASE WHEN p_p = 0.5 THEN 0 ELSE sign(p_p - 0.5) * 'Infinity' END;
    END IF;

    IF v_tail BETWEEN 1e-6 AND 0.25 AND p_df > 10 THEN
        v_guess := ln(v_df) - 2 * ln(spectrum._student_t_guess(v_tail, v_df));
    END IF;
    -- near the centre by the probability between -t and t, which is as exact as p - 1/2
    v_log_square := ln(v_df) + CASE
        WHEN v_tail < 0.25
            THEN -spectrum._beta_log_odds(
                ln(v_tail) + ln(2::double precision), v_df / 2, 0.5, v_guess)
        ELSE spectrum._beta_log_odds(ln(abs(2 * p_p - 1)), 0.5, v_df / 2)
    END;
    RETURN sign(p_p - 0.5) * spectrum._exponential(v_log_square / 2);
END
$$;
COMMENT ON FUNCTION spectrum.student_t_quantile(double precision, double precision) IS
    'The t with student_t_cdf(t, df) = p, for p in [0, 1]; -Infinity for 0, Infinity for 1 and '
    'beyond the range of double precision. Newton''s method as in beta_quantile.';

CREATE FUNCTION spectrum.normal_cdf(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.student_t_sf(-p_x, 'Infinity');
END
$$;
COMMENT ON FUNCTION spectrum.normal_cdf(double precision) IS
    'P(X <= x) of the standard normal distribution: Student''s t with infinite df.';

CREATE FUNCTION spectrum.normal_sf(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.student_t_sf(p_x, 'Infinity');
END
$$;
COMMENT ON FUNCTION spectrum.normal_sf(double precision) IS
    'P(X > x) of the standard normal distribution. The two-sided p-value of z is '
    '2 * normal_sf(abs(z)).';

CREATE FUNCTION spectrum.normal_quantile(p_p double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.student_t_quantile(p_p, 'Infinity');
END
$$;
COMMENT ON FUNCTION spectrum.normal_quantile(double precision) IS
    'The x with normal_cdf(x) = p, for p in [0, 1]; -Infinity for 0, Infinity for 1.';
-- Room 70, tests: intervals, tests and corrections for two groups, from counts and moments alone.
-- No data; read by the experiments and by anyone.
--
-- Whatever compares two groups gives the first minus (or over) the second, as SciPy does: the
-- treatment comes first, the control second. Counts are double precision, so that bigint and
-- numeric are taken as they are. An empty group, or no variance at all, gives NULL where there is
-- no answer, never an error; NULL gives NULL; an impossible argument raises 22023.

CREATE FUNCTION spectrum._check_count(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        p_argument, p_value, p_value >= 0 AND p_value < 'Infinity', 'a count, 0 or more'
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_count(text, double precision) IS
    'Raises 22023 unless the number can be a count; NaN and NULL pass.';

CREATE FUNCTION spectrum._check_variance(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(p_argument, p_value, p_value >= 0, 'a variance, 0 or more');
END
$$;
COMMENT ON FUNCTION spectrum._check_variance(text, double precision) IS
    'Raises 22023 unless the number can be a variance; NaN and NULL pass.';

CREATE FUNCTION spectrum._outer_tail(p_confidence double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        'p_confidence', p_confidence, p_confidence > 0 AND p_confidence < 1,
        'a number between 0 and 1, such as 0.95'
    );
    RETURN (1 - p_confidence) / 2;
END
$$;
COMMENT ON FUNCTION spectrum._outer_tail(double precision) IS
    'The probability that an equal-tail interval leaves out on each side.';

CREATE FUNCTION spectrum.wilson_interval(
    p_successes double precision,
    p_n double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_z double precision := -spectrum.normal_quantile(spectrum._outer_tail(p_confidence));
    v_root double precision;
BEGIN
    PERFORM spectrum._check_count('p_n', p_n);
    PERFORM spectrum._check_number(
        'p_successes', p_successes, p_successes BETWEEN 0 AND p_n,
        format('a count from 0 to p_n (%s)', p_n)
    );
    IF p_n = 0 THEN
        RETURN;
    END IF;
    -- the lower root by the product of both: no cancellation
    v_root := v_z * sqrt(p_successes * ((p_n - p_successes) / p_n) + v_z * v_z / 4);
    low := CASE
        WHEN p_successes = 0 THEN 0
        ELSE p_successes * (p_successes / p_n) / (p_successes + v_z * v_z / 2 + v_root)
    END;
    high := CASE
        WHEN p_successes = p_n THEN 1
        ELSE (p_successes + v_z * v_z / 2 + v_root) / (p_n + v_z * v_z)
    END;
END
$$;
COMMENT ON FUNCTION spectrum.wilson_interval(
    double precision, double precision, double precision
) IS
    'Score interval of a proportion (Wilson 1927): all p with '
    '|successes / n - p| <= z sqrt(p (1 - p) / n), z the normal quantile of equal tails; no '
    'continuity correction. NULL for n = 0.';

CREATE FUNCTION spectrum.two_proportion_test(
    p_x1 double precision,
    p_n1 double precision,
    p_x2 double precision,
    p_n2 double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT z double precision,
    OUT p_value double precision,
    OUT difference double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_n double precision;
    v_error double precision;
    r_first record;
    r_second record;
BEGIN
    PERFORM spectrum._outer_tail(p_confidence);
    PERFORM spectrum._check_count('p_n1', p_n1);
    PERFORM spectrum._check_count('p_n2', p_n2);
    PERFORM spectrum._check_number(
        'p_x1', p_x1, p_x1 BETWEEN 0 AND p_n1, format('a count from 0 to p_n1 (%s)', p_n1)
    );
    PERFORM spectrum._check_number(
        'p_x2', p_x2, p_x2 BETWEEN 0 AND p_n2, format('a count from 0 to p_n2 (%s)', p_n2)
    );
    IF p_n1 = 0 OR p_n2 = 0 THEN
        RETURN;
    END IF;

    difference := p_x1 / p_n1 - p_x2 / p_n2;
    v_n := p_n1 + p_n2;
    v_error := sqrt(
        (p_x1 + p_x2) / v_n * ((p_n1 - p_x1 + p_n2 - p_x2) / v_n) * (1 / p_n1 + 1 / p_n2)
    );
    z := difference / nullif(v_error, 0);
    p_value := 2 * spectrum.normal_sf(abs(z));

    SELECT w.low, w.high INTO r_first
    FROM spectrum.wilson_interval(p_x1, p_n1, p_confidence) AS w;
    SELECT w.low, w.high INTO r_second
    FROM spectrum.wilson_interval(p_x2, p_n2, p_confidence) AS w;
    low := difference - sqrt((p_x1 / p_n1 - r_first.low) ^ 2 + (r_second.high - p_x2 / p_n2) ^ 2);
    high := difference + sqrt((r_first.high - p_x1 / p_n1) ^ 2 + (p_x2 / p_n2 - r_second.low) ^ 2);
END
$$;
COMMENT ON FUNCTION spectrum.two_proportion_test(
    double precision, double precision, double precision, double precision, double precision
) IS
    'Two-sided z-test of x1 / n1 = x2 / n2 with the pooled proportion in the standard error, no '
    'continuity correction; difference = x1 / n1 - x2 / n2 with the hybrid score interval of '
    'Newcombe (1998, Statistics in Medicine 17, 873, method 10). All NULL where a group is empty; '
    'z and p_value NULL where all or none succeeded.';

CREATE FUNCTION spectrum.welch_t_test(
    p_n1 double precision,
    p_mean1 double precision,
    p_var1 double precision,
    p_n2 double precision,
    p_mean2 double precision,
    p_var2 double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT t double precision,
    OUT df double precision,
    OUT p_value double precision,
    OUT difference double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_tail double precision := spectrum._outer_tail(p_confidence);
    v_square1 double precision;
    v_square2 double precision;
    v_error double precision;
    v_margin double precision;
BEGIN
    PERFORM spectrum._check_count('p_n1', p_n1);
    PERFORM spectrum._check_count('p_n2', p_n2);
    PERFORM spectrum._check_variance('p_var1', p_var1);
    PERFORM spectrum._check_variance('p_var2', p_var2);
    IF p_n1 = 0 OR p_n2 = 0 THEN
        RETURN;
    END IF;

    difference := p_mean1 - p_mean2;
    v_square1 := p_var1 / p_n1;
    v_square2 := p_var2 / p_n2;
    IF p_n1 <= 1 OR p_n2 <= 1 OR v_square1 + v_square2 = 0 THEN
        RETURN;
    END IF;
    v_error := sqrt(v_square1 + v_square2);
    t := difference / v_error;
    -- by shares of the squared error, which cannot leave the range of a float8
    df := 1 / (
        greatest(v_square1 / (v_square1 + v_square2), 1e-100) ^ 2 / (p_n1 - 1)
        + greatest(v_square2 / (v_square1 + v_square2), 1e-100) ^ 2 / (p_n2 - 1)
    );
    p_value := 2 * spectrum.student_t_sf(abs(t), df);
    v_margin := -v_error * spectrum.student_t_quantile(v_tail, df);
    low := difference - v_margin;
    high := difference + v_margin;
END
$$;
COMMENT ON FUNCTION spectrum.welch_t_test(
    double precision, double precision, double precision,
    double precision, double precision, double precision, double precision
) IS
    'Two-sided t-test of equal means without equal variances (Welch 1947), from the size, mean and '
    'sample variance (var_samp) of two groups; degrees of freedom by Welch and Satterthwaite; '
    'difference = mean1 - mean2 with its t interval. All NULL where a group is empty; all but the '
    'difference NULL where a group has one member or neither has any variance.';

CREATE FUNCTION spectrum._lift_error(
    p_n1 double precision,
    p_mean1 double precision,
    p_var1 double precision,
    p_n2 double precision,
    p_mean2 double precision,
    p_var2 double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN nullif(
        sqrt(p_var1 / p_n1 + (p_mean1 / p_mean2) ^ 2 * (p_var2 / p_n2)) / abs(p_mean2), 0
    );
END
$$;
COMMENT ON FUNCTION spectrum._lift_error(
    double precision, double precision, double precision,
    double precision, double precision, double precision
) IS
    'Standard error of mean1 / mean2 - 1 by the delta method; NULL without any variance.';

CREATE FUNCTION spectrum.lift_interval(
    p_n1 double precision,
    p_mean1 double precision,
    p_var1 double precision,
    p_n2 double precision,
    p_mean2 double precision,
    p_var2 double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT lift double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_z double precision := -spectrum.normal_quantile(spectrum._outer_tail(p_confidence));
    v_error double precision;
BEGIN
    PERFORM spectrum._check_count('p_n1', p_n1);
    PERFORM spectrum._check_count('p_n2', p_n2);
    PERFORM spectrum._check_variance('p_var1', p_var1);
    PERFORM spectrum._check_variance('p_var2', p_var2);
    IF p_n1 = 0 OR p_n2 = 0 OR p_mean2 = 0 THEN
        RETURN;
    END IF;

    lift := (p_mean1 - p_mean2) / p_mean2;
    v_error := spectrum._lift_error(p_n1, p_mean1, p_var1, p_n2, p_mean2, p_var2);
    low := lift - v_z * v_error;
    high := lift + v_z * v_error;
END
$$;
COMMENT ON FUNCTION spectrum.lift_interval(
    double precision, double precision, double precision,
    double precision, double precision, double precision, double precision
) IS
    'Relative lift mean1 / mean2 - 1 of independent groups with its delta-method interval: '
    'variance = (var1 / n1 + (mean1 / mean2)^2 var2 / n2) / mean2^2 (Deng, Knoblich and Lu 2018, '
    'Applying the delta method in metric analytics), normal quantile. For proportions the mean is '
    'p and the variance p (1 - p). All NULL where a group is empty or mean2 is 0; bounds NULL '
    'without any variance.';

CREATE FUNCTION spectrum.ratio_variance(
    p_n double precision,
    p_mean_x double precision,
    p_var_x double precision,
    p_mean_y double precision,
    p_var_y double precision,
    p_cov_xy double precision,
    OUT ratio double precision,
    OUT variance double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_count('p_n', p_n);
    PERFORM spectrum._check_variance('p_var_x', p_var_x);
    PERFORM spectrum._check_variance('p_var_y', p_var_y);
    IF p_n = 0 OR p_mean_y = 0 THEN
        RETURN;
    END IF;
    ratio := p_mean_x / p_mean_y;
    variance := greatest(0, p_var_x - 2 * ratio * p_cov_xy + ratio * ratio * p_var_y)
        / p_mean_y / p_mean_y / p_n;
END
$$;
COMMENT ON FUNCTION spectrum.ratio_variance(
    double precision, double precision, double precision,
    double precision, double precision, double precision
) IS
    'Ratio R = mean_x / mean_y of two sums over the same n units and, by the delta method, the '
    'variance of R: (var_x - 2 R cov_xy + R^2 var_y) / (n mean_y^2) (Deng, Knoblich and Lu 2018). '
    'n * variance is the variance per unit that welch_t_test and lift_interval take beside n and '
    'R. NULL for n = 0 or mean_y = 0.';

CREATE FUNCTION spectrum.sample_ratio_mismatch(
    p_counts bigint[],
    p_weights double precision[],
    OUT chi_square double precision,
    OUT df integer,
    OUT p_value double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_per_weight double precision;
BEGIN
    IF cardinality(p_counts) < 2 THEN
        PERFORM spectrum._reject('p_counts', p_counts::text, 'two or more counts');
    ELSIF 0 > ANY (p_counts) THEN
        PERFORM spectrum._reject('p_counts', p_counts::text, 'counts, each 0 or more');
    ELSIF cardinality(p_weights) <> cardinality(p_counts) THEN
        PERFORM spectrum._reject('p_weights', p_weights::text, 'one weight for each count');
    ELSIF 0 >= ANY (p_weights) OR 'Infinity' = ANY (p_weights) THEN
        PERFORM spectrum._reject('p_weights', p_weights::text, 'positive finite weights');
    END IF;
    SELECT sum(c.count) / nullif(sum(c.weight), 0) INTO v_per_weight
    FROM unnest(p_counts, p_weights) AS c (count, weight)
    HAVING count(c.count) = count(*) AND count(c.weight) = count(*) AND sum(c.count) > 0;
    IF v_per_weight IS NULL THEN
        RETURN;
    END IF;

    SELECT sum((c.count - v_per_weight * c.weight) ^ 2 / (v_per_weight * c.weight))
    INTO chi_square
    FROM unnest(p_counts, p_weights) AS c (count, weight);
    df := cardinality(p_counts) - 1;
    p_value := spectrum.chi_square_sf(chi_square, df);
END
$$;
COMMENT ON FUNCTION spectrum.sample_ratio_mismatch(bigint[], double precision[]) IS
    'Pearson''s chi-square test (1900) that counts follow the planned split, given by weights of '
    'any sum. A p-value below 0.001 says that the assignment or the logging is broken. NULL where '
    'nothing was counted or an element is NULL.';

CREATE FUNCTION spectrum.adjust_p_values(
    p_values double precision[], p_method text DEFAULT 'holm'
)
RETURNS double precision[]
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_method', p_method, ARRAY['holm', 'benjamini_hochberg']);
    PERFORM spectrum._check_probability('p_values', v.p) FROM unnest(p_values) AS v (p);
    RETURN coalesce((
        WITH ranked_values AS (
            SELECT v.place, v.p, count(nullif(v.p, 'NaN')) OVER () AS family,
                row_number() OVER (ORDER BY nullif(v.p, 'NaN')) AS rank
            FROM unnest(p_values) WITH ORDINALITY AS v (p, place)
        ),
        adjusted_values AS (
            SELECT place, p, CASE p_method
                WHEN 'holm' THEN max(p * (family - rank + 1)) OVER (ORDER BY rank)
                ELSE min(p * family / rank) OVER (ORDER BY rank DESC)
            END AS adjusted
            FROM ranked_values
        )
        SELECT array_agg(
            CASE WHEN p IS NULL OR p = 'NaN' THEN p ELSE least(adjusted, 1) END ORDER BY place
        )
        FROM adjusted_values
    ), '{}');
END
$$;
COMMENT ON FUNCTION spectrum.adjust_p_values(double precision[], text) IS
    'p-values corrected for their number, in the order given. holm: step-down, controls the '
    'probability of any false discovery (Holm 1979). benjamini_hochberg: step-up, controls the '
    'expected share of false discoveries (Benjamini and Hochberg 1995). NULL and NaN stay as they '
    'are and are not counted.';
-- Room 70, methods: what may be asked beside a plain test. An interval that may be looked at as
-- often as one likes, the chance that the better-looking one is better, and where long tails are
-- cut. No data; read by the experiments and by anyone.

CREATE FUNCTION spectrum.sequential_test(
    p_n double precision,
    p_estimate double precision,
    p_error double precision,
    p_tuning double precision DEFAULT 5000,
    p_confidence double precision DEFAULT 0.95,
    OUT p_value double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_bar double precision := -2 * ln(2 * spectrum._outer_tail(p_confidence));
    v_mixture double precision;
    v_margin double precision;
    v_log_p double precision;
BEGIN
    PERFORM spectrum._check_count('p_n', p_n);
    PERFORM spectrum._check_number('p_error', p_error, p_error >= 0, 'a standard error, 0 or more');
    PERFORM spectrum._check_positive('p_tuning', p_tuning);
    IF p_n = 0 OR p_error = 0 THEN
        RETURN;
    END IF;
    -- n rho^2, with the rho that makes the interval narrowest at n = p_tuning
    v_mixture := p_n / p_tuning * (v_bar + ln(v_bar + 1));
    v_margin := p_error * sqrt((1 + 1 / v_mixture) * (ln(v_mixture + 1) + v_bar));
    low := p_estimate - v_margin;
    high := p_estimate + v_margin;
    v_log_p := (
        ln(v_mixture + 1) - (p_estimate / p_error) ^ 2 * (v_mixture / (v_mixture + 1))
    ) / 2;
    p_value := CASE
        WHEN v_log_p BETWEEN 0 AND 1e300 THEN 1
        ELSE spectrum._exponential(v_log_p)
    END;
END
$$;
COMMENT ON FUNCTION spectrum.sequential_test(
    double precision, double precision, double precision, double precision, double precision
) IS
    'Always-valid interval and two-sided p-value of an estimate from n observations with this '
    'standard error: they hold at every look at once, so one may stop at any. The asymptotic '
    'confidence sequence of Waudby-Smith et al. (2024, Annals of Statistics 52, 2613), which is '
    'the mixture SPRT with a normal mixture (Robbins 1970; Johari et al. 2017). p_tuning: the n at '
    'which it is narrowest. NULL without observations or error.';

CREATE FUNCTION spectrum.normal_posterior(
    p_difference double precision,
    p_error double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT chance_to_win double precision,
    OUT low double precision,
    OUT high double precision,
    OUT expected_loss double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_z double precision;
    v_margin double precision := -p_error
        * spectrum.normal_quantile(spectrum._outer_tail(p_confidence));
BEGIN
    PERFORM spectrum._check_number('p_error', p_error, p_error >= 0, 'a standard error, 0 or more');
    IF p_error = 0 THEN
        RETURN;
    END IF;
    v_z := p_difference / p_error;
    chance_to_win := spectrum.normal_cdf(v_z);
    low := p_difference - v_margin;
    high := p_difference + v_margin;
    expected_loss := p_error * greatest(
        0, spectrum._exponential(-v_z * v_z / 2) / sqrt(2 * pi()) - v_z * spectrum.normal_sf(v_z)
    );
END
$$;
COMMENT ON FUNCTION spectrum.normal_posterior(
    double precision, double precision, double precision
) IS
    'What a flat prior and a normal likelihood say of a difference: its posterior is normal around '
    'p_difference with deviation p_error. chance_to_win: that it is above 0; low, high: credible '
    'interval of equal tails; expected_loss: mean of what is lost by choosing it, 0 where it is '
    'above 0. NULL without error.';

CREATE FUNCTION spectrum._quantile(
    p_sorted numeric[], p_below bigint, p_zeros bigint, p_share numeric
)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_place numeric := (cardinality(p_sorted) + p_zeros - 1) * p_share;
    v_ends numeric[] := ARRAY(
        SELECT CASE
            WHEN r.rank < p_below THEN p_sorted[r.rank + 1]
            WHEN r.rank < p_below + p_zeros THEN 0
            ELSE p_sorted[r.rank - p_zeros + 1]
        END
        FROM unnest(ARRAY[floor(v_place), ceil(v_place)]::integer[]) AS r (rank)
    );
BEGIN
    RETURN v_ends[1] + (v_ends[2] - v_ends[1]) * (v_place - floor(v_place));
END
$$;
COMMENT ON FUNCTION spectrum._quantile(numeric[], bigint, bigint, numeric) IS
    'Quantile, linear between two neighbours, of sorted amounts (p_below of them negative, none 0) '
    'with so many zeros in their midst.';

CREATE FUNCTION spectrum.winsor_bounds(
    p_amounts numeric[],
    p_percentile double precision DEFAULT 0.99,
    p_zeros bigint DEFAULT 0,
    OUT low numeric,
    OUT high numeric
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_sorted numeric[] := ARRAY(
        SELECT a.amount FROM unnest(p_amounts) AS a (amount) WHERE a.amount <> 0 ORDER BY a.amount
    );
    v_below bigint;
    v_zeros bigint;
BEGIN
    PERFORM spectrum._check_number(
        'p_percentile', p_percentile, p_percentile > 0.5 AND p_percentile <= 1,
        'a number above 0.5 and at most 1, such as 0.99'
    );
    PERFORM spectrum._check_count('p_zeros', p_zeros);
    SELECT count(*) FILTER (WHERE a.amount < 0), p_zeros + count(*) FILTER (WHERE a.amount = 0)
    INTO v_below, v_zeros FROM unnest(p_amounts) AS a (amount);
    IF cardinality(v_sorted) + v_zeros = 0 THEN
        RETURN;
    END IF;
    low := trim_scale(
        least(0, spectrum._quantile(v_sorted, v_below, v_zeros, 1 - p_percentile::numeric))
    );
    high := trim_scale(
        greatest(0, spectrum._quantile(v_sorted, v_below, v_zeros, p_percentile::numeric))
    );
END
$$;
COMMENT ON FUNCTION spectrum.winsor_bounds(numeric[], double precision, bigint) IS
    'Where winsorizing cuts: amounts above high become high, those below low become low. high is '
    'the percentile, linear between neighbours as in percentile_cont, low the one as far from the '
    'other end; but high is at least 0 and low at most 0, so that amounts of one sign are cut at '
    'their far end only. p_zeros: so many more amounts that are 0. NULL amounts are none.';
-- Room 71, definitions: metrics, and the experiments that are judged by them. Rows of the user's
-- own, checked when they are defined; a name defined again is replaced. Read by the results.

CREATE FUNCTION spectrum._create_experiments()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.metrics') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.metrics (
        metric text NOT NULL CONSTRAINT metrics_pkey PRIMARY KEY,
        kind text NOT NULL
            CONSTRAINT metrics_kind_is_known CHECK (kind IN ('proportion', 'mean', 'ratio')),
        event_type text NOT NULL,
        property text,
        properties_filter jsonb,
        time_window interval,
        denominator_event_type text
            CONSTRAINT metrics_ratio_has_denominator
            CHECK ((kind = 'ratio') = (denominator_event_type IS NOT NULL)),
        denominator_property text,
        denominator_filter jsonb,
        is_guardrail boolean NOT NULL DEFAULT false,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.metrics IS
        'What experiments measure, one row a metric. Define one with spectrum.define_metric().';
    COMMENT ON COLUMN spectrum.metrics.metric IS 'Name.';
    COMMENT ON COLUMN spectrum.metrics.kind IS
        'proportion: share of users with the event; mean: sum per user; ratio: sum over all users '
        '/ sum of the denominator over all users.';
    COMMENT ON COLUMN spectrum.metrics.event_type IS 'Event that counts.';
    COMMENT ON COLUMN spectrum.metrics.property IS
        'Property whose number is summed; NULL counts the events.';
    COMMENT ON COLUMN spectrum.metrics.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN spectrum.metrics.time_window IS
        'How long after the first exposure events count; NULL: to the end of the experiment.';
    COMMENT ON COLUMN spectrum.metrics.denominator_event_type IS 'Of a ratio: its lower event.';
    COMMENT ON COLUMN spectrum.metrics.denominator_property IS
        'Of a ratio: the property summed below; NULL counts the events.';
    COMMENT ON COLUMN spectrum.metrics.denominator_filter IS
        'Of a ratio: only lower events whose properties contain this.';
    COMMENT ON COLUMN spectrum.metrics.is_guardrail IS
        'Watched, but not part of the family that p-values are adjusted over.';
    COMMENT ON COLUMN spectrum.metrics.changed_at IS 'When it was last defined.';

    CREATE TABLE spectrum.experiments (
        experiment text NOT NULL CONSTRAINT experiments_pkey PRIMARY KEY,
        variants jsonb NOT NULL,
        control text NOT NULL,
        metrics text[] NOT NULL,
        starts_at timestamptz,
        ends_at timestamptz,
        confidence double precision NOT NULL
            CONSTRAINT experiments_confidence_range CHECK (confidence > 0 AND confidence < 1),
        correction text NOT NULL
            CONSTRAINT experiments_correction_is_known
            CHECK (correction IN ('holm', 'benjamini_hochberg')),
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        winsorize double precision
            CONSTRAINT experiments_winsorize_range CHECK (winsorize > 0.5 AND winsorize < 1),
        cuped interval
            CONSTRAINT experiments_cuped_is_positive CHECK (cuped > interval '0'),
        sequential bigint
            CONSTRAINT experiments_sequential_is_positive CHECK (sequential > 0),
        CONSTRAINT experiments_control_is_variant CHECK (variants ? control)
    );
    COMMENT ON TABLE spectrum.experiments IS
        'The experiments, one row each. Define one with spectrum.define_experiment().';
    COMMENT ON COLUMN spectrum.experiments.experiment IS 'Name, as the exposure events give it.';
    COMMENT ON COLUMN spectrum.experiments.variants IS 'Planned split: weight of each variant.';
    COMMENT ON COLUMN spectrum.experiments.control IS 'Variant that the others are compared with.';
    COMMENT ON COLUMN spectrum.experiments.metrics IS 'Metrics it is judged by, in this order.';
    COMMENT ON COLUMN spectrum.experiments.starts_at IS 'Exposures before this do not count.';
    COMMENT ON COLUMN spectrum.experiments.ends_at IS
        'Exposures from here on do not count, nor do events of metrics without a window.';
    COMMENT ON COLUMN spectrum.experiments.confidence IS 'Of all intervals.';
    COMMENT ON COLUMN spectrum.experiments.correction IS
        'How p-values are adjusted for several metrics and variants.';
    COMMENT ON COLUMN spectrum.experiments.changed_at IS 'When it was last defined.';
    COMMENT ON COLUMN spectrum.experiments.winsorize IS
        'Percentile at which the units'' amounts are cut; NULL: they are not.';
    COMMENT ON COLUMN spectrum.experiments.cuped IS
        'How long before the first exposure the covariate is measured; NULL: no CUPED.';
    COMMENT ON COLUMN spectrum.experiments.sequential IS
        'Units at which always-valid intervals are narrowest; NULL: intervals for one look.';

    PERFORM spectrum._create_experiment_views();
END
$$;
COMMENT ON FUNCTION spectrum._create_experiments() IS
    'Room 71: makes the definition tables of experiments, then the views.';

CREATE FUNCTION spectrum.define_metric(
    p_name text,
    p_kind text,
    p_event text,
    p_property text DEFAULT NULL,
    p_window interval DEFAULT NULL,
    p_where jsonb DEFAULT NULL,
    p_denominator_event text DEFAULT NULL,
    p_denominator_property text DEFAULT NULL,
    p_denominator_where jsonb DEFAULT NULL,
    p_guardrail boolean DEFAULT false
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM spectrum._check_choice('p_kind', p_kind, '{proportion, mean, ratio}');
    IF p_event IS NULL OR p_event = '' THEN
        PERFORM spectrum._reject('p_event', p_event, 'an event type');
    END IF;
    IF p_kind = 'proportion' AND p_property IS NOT NULL THEN
        PERFORM spectrum._reject(
            'p_property', p_property, 'NULL: a proportion counts the users with the event'
        );
    END IF;
    IF p_window NOT BETWEEN interval '1 us' AND interval '10 years' THEN
        PERFORM spectrum._reject(
            'p_window', p_window::text, 'an interval above 0, of at most 10 years, or NULL'
        );
    END IF;
    PERFORM analytics._check_filter('p_where', p_where);
    PERFORM analytics._check_filter('p_denominator_where', p_denominator_where);
    IF p_kind = 'ratio' AND coalesce(p_denominator_event, '') = '' THEN
        PERFORM spectrum._reject(
            'p_denominator_event', p_denominator_event, 'an event type: a ratio has two'
        );
    ELSIF p_kind <> 'ratio' AND num_nonnulls(
        p_denominator_event, p_denominator_property, p_denominator_where
    ) > 0 THEN
        PERFORM spectrum._reject('p_kind', p_kind, 'ratio, since a denominator is given');
    END IF;
    IF p_guardrail IS NULL THEN
        PERFORM spectrum._reject('p_guardrail', p_guardrail::text, 'true or false');
    END IF;

    INSERT INTO spectrum.metrics (
        metric, kind, event_type, property, properties_filter, time_window,
        denominator_event_type, denominator_property, denominator_filter, is_guardrail
    )
    VALUES (
        p_name, p_kind, p_event, p_property, p_where, p_window,
        p_denominator_event, p_denominator_property, p_denominator_where, p_guardrail
    )
    ON CONFLICT ON CONSTRAINT metrics_pkey DO UPDATE SET
        kind = excluded.kind,
        event_type = excluded.event_type,
        property = excluded.property,
        properties_filter = excluded.properties_filter,
        time_window = excluded.time_window,
        denominator_event_type = excluded.denominator_event_type,
        denominator_property = excluded.denominator_property,
        denominator_filter = excluded.denominator_filter,
        is_guardrail = excluded.is_guardrail,
        changed_at = excluded.changed_at;
    PERFORM spectrum._begin_report(
        'experiment', experiment, to_jsonb(analytics._experiment_plan(experiment)))
    FROM spectrum.experiments WHERE p_name = ANY (metrics);
END
$$;
COMMENT ON FUNCTION spectrum.define_metric(
    text, text, text, text, interval, jsonb, text, text, jsonb, boolean
) IS
    'Defines a metric or replaces it. p_kind: proportion (share of users with p_event), mean (per '
    'user, the sum of p_property over p_event, or the number of events) or ratio (that sum over '
    'all users / the same of p_denominator_event). p_where: JSON containment. p_window: how long '
    'after the first exposure. p_guardrail: watched, but left out of the adjusted p-values.';

CREATE FUNCTION spectrum.drop_metric(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_users text := (
        SELECT string_agg(experiment, ', ' ORDER BY experiment) FROM spectrum.experiments
        WHERE p_name = ANY (metrics)
    );
BEGIN
    IF v_users IS NOT NULL THEN
        PERFORM spectrum._reject(
            'p_name', p_name, 'a metric that no experiment is judged by; this one is by ' || v_users
        );
    END IF;
    DELETE FROM spectrum.metrics WHERE metric = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a metric in spectrum.metrics');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum.drop_metric(text) IS
    'Forgets a metric; 22023 if there is none of that name or an experiment is judged by it.';

CREATE FUNCTION spectrum._check_variants(p_variants jsonb, p_control text)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_form text := 'a JSON object of two or more variants with their planned weights, each above '
        '0 and at most 1000000, such as {"control": 0.5, "treatment": 0.5}';
    r_variant record;
    v_count integer := 0;
BEGIN
    IF p_variants IS NULL OR jsonb_typeof(p_variants) <> 'object' THEN
        PERFORM spectrum._reject('p_variants', p_variants::text, v_form);
    END IF;
    FOR r_variant IN SELECT v.key, v.value FROM jsonb_each(p_variants) AS v LOOP
        v_count := v_count + 1;
        PERFORM spectrum._check_name('p_variants', r_variant.key);
        IF jsonb_typeof(r_variant.value) <> 'number'
            OR r_variant.value::numeric NOT BETWEEN 0.000001 AND 1000000
        THEN
            PERFORM spectrum._reject('p_variants', p_variants::text, v_form);
        END IF;
    END LOOP;
    IF v_count < 2 THEN
        PERFORM spectrum._reject('p_variants', p_variants::text, v_form);
    END IF;
    PERFORM spectrum._check_choice(
        'p_control', p_control, ARRAY(SELECT k.key FROM jsonb_object_keys(p_variants) AS k (key))
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_variants(jsonb, text) IS
    'Raises 22023 unless the variants are a planned split of which control is one.';

CREATE FUNCTION spectrum._read_metrics(p_metrics jsonb)
RETURNS text[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_form text := 'a JSON array of one or more names in spectrum.metrics, each once';
    v_metrics text[];
    v_unknown text;
BEGIN
    IF p_metrics IS NULL OR jsonb_typeof(p_metrics) <> 'array' OR p_metrics = '[]' THEN
        PERFORM spectrum._reject('p_metrics', p_metrics::text, v_form);
    END IF;
    v_metrics := ARRAY(
        SELECT m.name FROM jsonb_array_elements_text(p_metrics) WITH ORDINALITY AS m (name, number)
        ORDER BY m.number
    );
    IF cardinality(v_metrics) <> (SELECT count(DISTINCT m.name) FROM unnest(v_metrics) AS m (name))
    THEN
        PERFORM spectrum._reject('p_metrics', p_metrics::text, v_form);
    END IF;
    SELECT m.name INTO v_unknown FROM unnest(v_metrics) AS m (name)
    WHERE NOT EXISTS (SELECT FROM spectrum.metrics AS d WHERE d.metric = m.name)
    LIMIT 1;
    IF FOUND THEN
        PERFORM spectrum._reject('p_metrics', v_unknown, v_form);
    END IF;
    RETURN v_metrics;
END
$$;
COMMENT ON FUNCTION spectrum._read_metrics(jsonb) IS
    'The names of a JSON array of metrics; raises 22023 unless all are defined.';

CREATE FUNCTION analytics._check_methods(
    p_winsorize double precision, p_cuped interval, p_sequential bigint
)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT (p_winsorize > 0.5 AND p_winsorize <= 1) THEN
        PERFORM spectrum._reject(
            'p_winsorize', p_winsorize::text,
            'a percentile above 0.5 and below 1, such as 0.99, or 1 not to winsorize'
        );
    END IF;
    IF p_cuped NOT BETWEEN interval '0' AND interval '10 years' THEN
        PERFORM spectrum._reject(
            'p_cuped', p_cuped::text, 'an interval of at most 10 years, or 0 for no CUPED'
        );
    END IF;
    IF p_sequential NOT BETWEEN 0 AND 1000000000000 THEN
        PERFORM spectrum._reject(
            'p_sequential', p_sequential::text,
            'the number of units at which intervals are narrowest, such as 5000, or 0 for '
            'intervals that hold for one look'
        );
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_methods(double precision, interval, bigint) IS
    'Raises 22023 unless the optional methods of an experiment can be applied.';

CREATE FUNCTION spectrum.define_experiment(
    p_name text,
    p_variants jsonb,
    p_control text,
    p_metrics jsonb,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_confidence double precision DEFAULT 0.95,
    p_correction text DEFAULT 'holm',
    p_winsorize double precision DEFAULT NULL,
    p_cuped interval DEFAULT NULL,
    p_sequential bigint DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_metrics text[];
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM spectrum._check_variants(p_variants, p_control);
    v_metrics := spectrum._read_metrics(p_metrics);
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_confidence(p_confidence);
    PERFORM spectrum._check_choice('p_correction', p_correction, '{holm, benjamini_hochberg}');
    PERFORM analytics._check_methods(p_winsorize, p_cuped, p_sequential);

    INSERT INTO spectrum.experiments (
        experiment, variants, control, metrics, starts_at, ends_at, confidence, correction,
        winsorize, cuped, sequential
    )
    VALUES (
        p_name, p_variants, p_control, v_metrics, p_from, p_to, p_confidence, p_correction,
        nullif(p_winsorize, 1), nullif(p_cuped, '0'), nullif(p_sequential, 0)
    )
    ON CONFLICT ON CONSTRAINT experiments_pkey DO UPDATE SET
        variants = excluded.variants,
        control = excluded.control,
        metrics = excluded.metrics,
        starts_at = excluded.starts_at,
        ends_at = excluded.ends_at,
        confidence = excluded.confidence,
        correction = excluded.correction,
        winsorize = excluded.winsorize,
        cuped = excluded.cuped,
        sequential = excluded.sequential,
        changed_at = excluded.changed_at;
    PERFORM spectrum._begin_report(
        'experiment', p_name, to_jsonb(analytics._experiment_plan(p_name)));
END
$$;
COMMENT ON FUNCTION spectrum.define_experiment(
    text, jsonb, text, jsonb, timestamptz, timestamptz, double precision, text, double precision,
    interval, bigint
) IS
    'Defines an experiment or replaces it. p_name: as its exposure events give it. p_variants: the '
    'planned split, {"control": 0.5, "treatment": 0.5}. p_metrics: names of metrics, ["signup"]. '
    'p_from, p_to: when exposures count (NULL: always). p_correction: holm or benjamini_hochberg. '
    'p_winsorize: percentile to cut amounts at; p_cuped: how long before the exposure the metric '
    'is its own covariate; p_sequential: units at which always-valid intervals are narrowest.';

CREATE FUNCTION spectrum.drop_experiment(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.experiments WHERE experiment = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'an experiment in spectrum.experiments');
    END IF;
    PERFORM spectrum._discard_reports('experiment', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_experiment(text) IS
    'Forgets an experiment, not its events; 22023 if there is none of that name.';
-- Room 71, the plan: an experiment as it is asked about, made from its definition and from what the
-- question says otherwise; and the totals, all that its answer is made of. Everything behind
-- analytics.experiment takes a plan; the answer takes the plan and the totals alone.

CREATE TYPE analytics._experiment_plan AS (
    experiment text,
    variants jsonb,
    control text,
    metrics text[],
    starts_at timestamptz,
    ends_at timestamptz,
    confidence double precision,
    correction text,
    winsorize double precision,
    cuped interval,
    sequential bigint,
    measures jsonb
);
COMMENT ON TYPE analytics._experiment_plan IS
    'An experiment as it is asked about: the columns of analytics.experiments, and its metrics as '
    'they were when it was: rows of analytics.metrics.';

CREATE TYPE analytics._experiment_total AS (
    account_id text,
    metric text,
    variant text,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    sum_x numeric,
    sum_xx numeric,
    sum_y numeric,
    sum_yy numeric,
    sum_xy numeric,
    sum_w numeric,
    sum_ww numeric,
    sum_v numeric,
    sum_vv numeric,
    sum_wv numeric,
    sum_xw numeric,
    sum_xv numeric,
    sum_yw numeric,
    sum_yv numeric,
    winsor_low numeric,
    winsor_high numeric
);
COMMENT ON TYPE analytics._experiment_total IS
    'A metric in one variant and scope: units, and sums over them of what each did since the first '
    'exposure (x over y) and before it (w over v), and of products of two. y and v are 1 but for a '
    'ratio, so that every metric is one. Bounds that x was cut at.';

CREATE FUNCTION analytics._experiment_plan(
    p_experiment text,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_confidence double precision DEFAULT NULL,
    p_correction text DEFAULT NULL,
    p_winsorize double precision DEFAULT NULL,
    p_cuped interval DEFAULT NULL,
    p_sequential bigint DEFAULT NULL
)
RETURNS analytics._experiment_plan
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_plan analytics._experiment_plan;
BEGIN
    SELECT e.experiment, e.variants, e.control, e.metrics,
        coalesce(p_from, e.starts_at), coalesce(p_to, e.ends_at),
        coalesce(p_confidence, e.confidence), coalesce(p_correction, e.correction),
        nullif(coalesce(p_winsorize, e.winsorize), 1),
        nullif(coalesce(p_cuped, e.cuped), '0'),
        nullif(coalesce(p_sequential, e.sequential), 0),
        (SELECT jsonb_agg(to_jsonb(m) - 'changed_at' ORDER BY m.metric)
        FROM analytics.metrics AS m WHERE m.metric = ANY (e.metrics))
    INTO v_plan
    FROM analytics.experiments AS e
    WHERE e.experiment = p_experiment;
    RETURN v_plan;
END
$$;
COMMENT ON FUNCTION analytics._experiment_plan(
    text, timestamptz, timestamptz, double precision, text, double precision, interval, bigint
) IS
    'The plan of an experiment: what is NULL is as defined, 1 or 0 switches a method off.';

CREATE FUNCTION analytics._measures(p_measures jsonb)
RETURNS TABLE (
    metric text,
    kind text,
    event_type text,
    property text,
    properties_filter jsonb,
    time_window interval,
    denominator_event_type text,
    denominator_property text,
    denominator_filter jsonb,
    is_guardrail boolean
)
LANGUAGE sql IMMUTABLE PARALLEL SAFE ROWS 3
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT * FROM jsonb_to_recordset(p_measures) AS m (
        metric text, kind text, event_type text, property text, properties_filter jsonb,
        time_window interval, denominator_event_type text, denominator_property text,
        denominator_filter jsonb, is_guardrail boolean
    )
$$;
COMMENT ON FUNCTION analytics._measures(jsonb) IS
    'The metrics of a plan, as rows of analytics.metrics.';
-- Room 71, units: who saw which variant, and what each did before and afterwards. A unit is a user;
-- his first exposure counts. Reads analytics.events only; read by the totals. What a unit is and
-- does follows from his own events alone, so both may be asked of some users only.

CREATE FUNCTION analytics._exposure_types()
RETURNS TABLE (event_type_key integer, flag_property text, variant_property text)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 2
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- PostHog's clients report an exposure as the call of a feature flag.
    RETURN QUERY
    SELECT t.event_type_key, x.flag_property, x.variant_property
    FROM (
        VALUES
            ('experiment_exposure', 'experiment', 'variant'),
            ('$feature_flag_called', '$feature_flag', '$feature_flag_response')
    ) AS x (event_type, flag_property, variant_property)
    JOIN analytics.event_types AS t USING (event_type);
END
$$;
COMMENT ON FUNCTION analytics._exposure_types() IS
    'The event types that are exposures, with the properties that name experiment and variant.';

CREATE FUNCTION analytics._experiment_units(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_users bigint[] DEFAULT NULL
)
RETURNS TABLE (
    account_id text,
    account_key bigint,
    user_key bigint,
    variant text,
    exposed_at timestamptz,
    low_variant text,
    high_variant text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_types integer[] := ARRAY(SELECT t.event_type_key FROM analytics._exposure_types() AS t);
BEGIN
    RETURN QUERY
    WITH flags AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
            CASE WHEN p_by_account OR p_account IS NOT NULL THEN e.account_key ELSE 0 END
                AS scope_key,
            e.user_key,
            e.occurred_at,
            e.properties ->> t.flag_property AS flag,
            e.properties ->> t.variant_property AS variant
        FROM analytics.events AS e
        JOIN analytics._exposure_types() AS t ON t.event_type_key = e.event_type_key
        WHERE e.event_type_key = ANY (v_types)
            AND e.user_key <> 0
            AND (p_users IS NULL OR e.user_key = ANY (p_users))
            AND (p_plan.starts_at IS NULL OR e.occurred_at >= p_plan.starts_at)
            AND (p_plan.ends_at IS NULL OR e.occurred_at < p_plan.ends_at)
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
    )
    SELECT
        f.scope,
        f.scope_key,
        f.user_key,
        analytics._counted_variant(p_plan.variants, min(f.variant), max(f.variant)),
        min(f.occurred_at),
        min(f.variant),
        max(f.variant)
    FROM flags AS f
    WHERE f.flag = p_plan.experiment AND f.variant <> ''
    GROUP BY f.scope, f.scope_key, f.user_key;
END
$$;
COMMENT ON FUNCTION analytics._experiment_units(
    analytics._experiment_plan, text, boolean, bigint[]
) IS
    'The users of an experiment (of these, if given), each with his variant and first exposure. '
    'The variant of a unit that saw several, or one that is not planned, is NULL: it is left out. '
    'account_key: whose events count, 0 all.';

CREATE FUNCTION analytics._counted_variant(p_variants jsonb, p_low text, p_high text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE WHEN p_low = p_high AND p_variants ? p_low THEN p_low END;
END
$$;
COMMENT ON FUNCTION analytics._counted_variant(jsonb, text, text) IS
    'The variant that a unit counts for, by the lowest and the highest name that it saw; NULL '
    'where it saw several, or one that is not planned.';

CREATE FUNCTION analytics._metric_sides(p_measures jsonb)
RETURNS TABLE (
    metric text,
    is_upper boolean,
    event_type_key integer,
    property text,
    properties_filter jsonb,
    time_window interval,
    most integer
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 10
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT m.metric, s.is_upper, t.event_type_key, s.property, s.properties_filter, m.time_window,
        CASE WHEN m.kind = 'proportion' THEN 1 END
    FROM analytics._measures(p_measures) AS m
    CROSS JOIN LATERAL (
        VALUES
            (true, m.event_type, m.property, m.properties_filter),
            (false, m.denominator_event_type, m.denominator_property, m.denominator_filter)
    ) AS s (is_upper, event_type, property, properties_filter)
    JOIN analytics.event_types AS t ON t.event_type = s.event_type;
END
$$;
COMMENT ON FUNCTION analytics._metric_sides(jsonb) IS
    'What metrics count of which events: the upper side, and of a ratio the lower. most: a unit '
    'counts no more than this.';

CREATE FUNCTION analytics._experiment_happenings(
    p_plan analytics._experiment_plan,
    p_users bigint[],
    p_accounts bigint[],
    p_exposed_ats timestamptz[],
    p_sinces timestamptz[],
    p_untils timestamptz[]
)
RETURNS TABLE (
    user_key bigint,
    account_key bigint,
    occurred_at timestamptz,
    event_id uuid,
    metric text,
    most integer,
    is_upper boolean,
    is_before boolean,
    amount numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 1000000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET timezone = 'UTC'
SET jit = off
AS $$
DECLARE
    v_types integer[] := ARRAY(
        SELECT s.event_type_key FROM analytics._metric_sides(p_plan.measures) AS s
    );
BEGIN
    RETURN QUERY
    WITH happenings AS (
        SELECT u.user_key, u.account_key, u.exposed_at, e.event_type_key, e.occurred_at,
            e.event_id, e.properties
        FROM unnest(p_users, p_accounts, p_exposed_ats, p_sinces, p_untils)
            AS u (user_key, account_key, exposed_at, since, until)
        JOIN analytics.events AS e ON e.user_key = u.user_key
            AND e.occurred_at >= u.since AND e.occurred_at < u.until
        WHERE e.event_type_key = ANY (v_types)
            AND (u.account_key = 0 OR e.account_key = u.account_key)
        -- a fence: properties are looked into after the units are known
        OFFSET 0
    ),
    amounts AS (
        SELECT h.*, s.metric, s.most, s.is_upper,
            CASE
                WHEN s.property IS NULL THEN 1
                WHEN jsonb_typeof(h.properties -> s.property) = 'number'
                    THEN (h.properties -> s.property)::numeric
                WHEN jsonb_typeof(h.properties -> s.property) = 'string'
                    THEN analytics._text_number(h.properties ->> s.property)
            END AS amount
        FROM happenings AS h
        JOIN analytics._metric_sides(p_plan.measures) AS s ON s.event_type_key = h.event_type_key
        WHERE
            -- A window runs on after the end of the experiment, else that end cuts.
            CASE
                WHEN s.time_window IS NOT NULL THEN h.occurred_at < h.exposed_at + s.time_window
                ELSE p_plan.ends_at IS NULL OR h.occurred_at < p_plan.ends_at
            END
            AND (s.properties_filter IS NULL OR h.properties @> s.properties_filter)
        OFFSET 0
    )
    SELECT a.user_key, a.account_key, a.occurred_at, a.event_id, a.metric, a.most, a.is_upper,
        a.occurred_at < a.exposed_at, a.amount
    FROM amounts AS a
    WHERE abs(a.amount) < 1e15;
END
$$;
COMMENT ON FUNCTION analytics._experiment_happenings(
    analytics._experiment_plan, bigint[], bigint[], timestamptz[], timestamptz[], timestamptz[]
) IS
    'The events that metrics count of units, given by user, account (0: all) and first exposure, '
    'inside [since, until) of each: the one place that says which do, and with what amount.';

CREATE FUNCTION analytics._experiment_contributions(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_users bigint[] DEFAULT NULL
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    variant text,
    metric text,
    has_converted boolean,
    amount numeric,
    denominator numeric,
    amount_before numeric,
    denominator_before numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT * FROM analytics._experiment_units(p_plan, p_account, p_by_account, p_users)
    ),
    sums AS (
        SELECT h.user_key, h.account_key, h.metric, h.most,
            coalesce(bool_or(h.is_upper) FILTER (WHERE NOT h.is_before), false) AS has_converted,
            coalesce(sum(h.amount) FILTER (WHERE h.is_upper AND NOT h.is_before), 0) AS x,
            coalesce(sum(h.amount) FILTER (WHERE NOT h.is_upper AND NOT h.is_before), 0) AS y,
            coalesce(sum(h.amount) FILTER (WHERE h.is_upper AND h.is_before), 0) AS w,
            coalesce(sum(h.amount) FILTER (WHERE NOT h.is_upper AND h.is_before), 0) AS v
        FROM (
            SELECT array_agg(u.user_key) AS users, array_agg(u.account_key) AS accounts,
                array_agg(u.exposed_at) AS exposed_ats,
                array_agg(u.exposed_at - coalesce(p_plan.cuped, '0')) AS sinces,
                array_agg('infinity'::timestamptz) AS untils
            FROM units AS u
            WHERE u.variant IS NOT NULL
        ) AS counted
        CROSS JOIN LATERAL analytics._experiment_happenings(
            p_plan, counted.users, counted.accounts, counted.exposed_ats, counted.sinces,
            counted.untils
        ) AS h
        GROUP BY h.user_key, h.account_key, h.metric, h.most
    )
    SELECT u.account_id, u.user_key, u.variant, NULL, false, NULL::numeric, NULL::numeric,
        NULL::numeric, NULL::numeric
    FROM units AS u
    UNION ALL
    SELECT u.account_id, u.user_key, u.variant, s.metric, s.has_converted,
        analytics._unit_amount(s.x, s.most), analytics._unit_amount(s.y, NULL),
        analytics._unit_amount(s.w, s.most), analytics._unit_amount(s.v, NULL)
    FROM sums AS s
    JOIN units AS u ON u.user_key = s.user_key AND u.account_key = s.account_key;
END
$$;
COMMENT ON FUNCTION analytics._experiment_contributions(
    analytics._experiment_plan, text, boolean, bigint[]
) IS
    'What each unit (of these users, if given) contributes: itself, in a row without a metric, and '
    'to each metric its sums from the first exposure on, inside the metric''s window, and with '
    'CUPED its sums before; 1 at most for a proportion. A unit that did nothing of a metric has no '
    'row for it and counts as 0.';

CREATE FUNCTION analytics._unit_amount(p_sum numeric, p_most integer)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN trim_scale(round(least(p_sum, p_most), 15));
END
$$;
COMMENT ON FUNCTION analytics._unit_amount(numeric, integer) IS
    'What a unit''s sum counts: at most p_most, and rounded, so that no product of two leaves the '
    'range of double precision.';
-- Room 71, totals: sums over the units of each variant. Nothing but sums, so what is new is added
-- to what was there; only winsorizing needs to see each unit's amount. Read by the results.

CREATE FUNCTION analytics._winsorize_contributions(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_report integer,
    p_accounts text[]
)
RETURNS TABLE (
    account_id text,
    variant text,
    metric text,
    has_converted boolean,
    x numeric,
    y numeric,
    w numeric,
    v numeric,
    low numeric,
    high numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH contributions AS MATERIALIZED (
        SELECT c.* FROM analytics._experiment_contributions(p_plan, p_account, p_by_account) AS c
        WHERE p_report IS NULL
        UNION ALL
        SELECT k.* FROM analytics._kept_contributions(p_report, p_accounts) AS k
        WHERE p_report IS NOT NULL
    ),
    crowds AS (
        SELECT c.account_id, count(*) AS units
        FROM contributions AS c
        WHERE c.metric IS NULL AND c.variant IS NOT NULL
        GROUP BY c.account_id
    ),
    bounds AS (
        SELECT c.account_id, c.metric, b.*
        FROM (
            SELECT c.account_id, c.metric, g.units - count(*) AS zeros,
                array_agg(c.amount) AS x, array_agg(c.denominator) AS y,
                array_agg(c.amount_before) AS w, array_agg(c.denominator_before) AS v
            FROM contributions AS c
            JOIN crowds AS g ON g.account_id = c.account_id
            JOIN analytics._measures(p_plan.measures) AS m
                ON m.metric = c.metric AND m.kind <> 'proportion'
            WHERE p_plan.winsorize IS NOT NULL
            GROUP BY c.account_id, c.metric, g.units
        ) AS c
        CROSS JOIN LATERAL (
            SELECT
                x.low AS x_low, x.high AS x_high, y.low AS y_low, y.high AS y_high,
                w.low AS w_low, w.high AS w_high, v.low AS v_low, v.high AS v_high
            FROM spectrum.winsor_bounds(c.x, p_plan.winsorize, c.zeros) AS x,
                spectrum.winsor_bounds(c.y, p_plan.winsorize, c.zeros) AS y,
                spectrum.winsor_bounds(c.w, p_plan.winsorize, c.zeros) AS w,
                spectrum.winsor_bounds(c.v, p_plan.winsorize, c.zeros) AS v
        ) AS b
    )
    SELECT c.account_id, c.variant, c.metric, c.has_converted,
        -- a bound that is NULL does not cut
        greatest(least(c.amount, b.x_high), b.x_low),
        greatest(least(c.denominator, b.y_high), b.y_low),
        greatest(least(c.amount_before, b.w_high), b.w_low),
        greatest(least(c.denominator_before, b.v_high), b.v_low),
        b.x_low, b.x_high
    FROM contributions AS c
    LEFT JOIN bounds AS b ON b.account_id = c.account_id AND b.metric = c.metric;
END
$$;
COMMENT ON FUNCTION analytics._winsorize_contributions(
    analytics._experiment_plan, text, boolean, integer, text[]
) IS
    'The contributions, with amounts cut at percentiles over all units of the scope, whatever '
    'their variant, where the plan says so. Each of the four amounts has percentiles of its own. '
    'Of a standing report, if one is given: those it keeps, of these accounts.';

CREATE FUNCTION analytics._experiment_sums(
    p_plan analytics._experiment_plan,
    p_account text,
    p_by_account boolean,
    p_report integer DEFAULT NULL,
    p_accounts text[] DEFAULT NULL
)
RETURNS SETOF analytics._experiment_total
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    SELECT c.account_id, coalesce(c.metric, ''), coalesce(c.variant, ''), count(*), 0::bigint,
        count(*) FILTER (WHERE c.has_converted),
        sum(c.x), sum(c.x * c.x), sum(c.y), sum(c.y * c.y), sum(c.x * c.y),
        sum(c.w), sum(c.w * c.w), sum(c.v), sum(c.v * c.v), sum(c.w * c.v),
        sum(c.x * c.w), sum(c.x * c.v), sum(c.y * c.w), sum(c.y * c.v),
        min(c.low), max(c.high)
    FROM analytics._winsorize_contributions(
        p_plan, p_account, p_by_account, p_report, p_accounts
    ) AS c
    GROUP BY c.account_id, c.metric, c.variant;
END
$$;
COMMENT ON FUNCTION analytics._experiment_sums(
    analytics._experiment_plan, text, boolean, integer, text[]
) IS
    'Sums over the contributions of each scope, metric and variant. The units of a variant are the '
    'row without a metric; those left out the one without a variant either.';

CREATE FUNCTION analytics._experiment_totals(
    p_plan analytics._experiment_plan, p_scope text, p_sums analytics._experiment_total[]
)
RETURNS SETOF analytics._experiment_total
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH sums AS MATERIALIZED (SELECT * FROM unnest(p_sums)),
    scopes AS (
        SELECT c.account_id, coalesce(sum(c.units), 0)::bigint AS excluded_units
        FROM (
            SELECT s.account_id, CASE WHEN s.metric = '' AND s.variant = '' THEN s.units END
                AS units
            FROM sums AS s
            UNION ALL
            SELECT p_scope, NULL WHERE p_scope IS NOT NULL
        ) AS c
        GROUP BY c.account_id
    ),
    cuts AS (
        SELECT s.account_id, s.metric, min(s.winsor_low) AS low, max(s.winsor_high) AS high
        FROM sums AS s
        GROUP BY s.account_id, s.metric
    )
    SELECT g.account_id, m.metric, v.variant, n.units, g.excluded_units,
        coalesce(s.conversions, 0), trim_scale(coalesce(s.sum_x, 0)),
        trim_scale(coalesce(s.sum_xx, 0)),
        -- but for a ratio, every unit has 1 below
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_y, 0)) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_yy, 0)) ELSE n.units END,
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_xy ELSE s.sum_x END, 0)),
        trim_scale(coalesce(s.sum_w, 0)), trim_scale(coalesce(s.sum_ww, 0)),
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_v, 0)) ELSE n.units END,
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_vv, 0)) ELSE n.units END,
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_wv ELSE s.sum_w END, 0)),
        trim_scale(coalesce(s.sum_xw, 0)),
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_xv ELSE s.sum_x END, 0)),
        trim_scale(coalesce(CASE WHEN m.kind = 'ratio' THEN s.sum_yw ELSE s.sum_w END, 0)),
        CASE WHEN m.kind = 'ratio' THEN trim_scale(coalesce(s.sum_yv, 0)) ELSE n.units END,
        CASE WHEN p_plan.winsorize < 1 AND m.kind <> 'proportion' THEN coalesce(b.low, 0) END,
        CASE WHEN p_plan.winsorize < 1 AND m.kind <> 'proportion' THEN coalesce(b.high, 0) END
    FROM scopes AS g
    CROSS JOIN analytics._measures(p_plan.measures) AS m
    CROSS JOIN jsonb_object_keys(p_plan.variants) AS v (variant)
    LEFT JOIN sums AS c
        ON c.account_id = g.account_id AND c.metric = '' AND c.variant = v.variant
    CROSS JOIN LATERAL (SELECT coalesce(c.units, 0) AS units) AS n
    LEFT JOIN sums AS s
        ON s.account_id = g.account_id AND s.metric = m.metric AND s.variant = v.variant
    LEFT JOIN cuts AS b ON b.account_id = g.account_id AND b.metric = m.metric;
END
$$;
COMMENT ON FUNCTION analytics._experiment_totals(
    analytics._experiment_plan, text, analytics._experiment_total[]
) IS
    'Units and sums of each scope, metric and planned variant, with zeros where nobody came: all '
    'that the statistics need. p_scope is there even without units.';
-- Room 71, results: what an experiment says. Its totals become values, intervals and tests by the
-- mathematics of room 70. Reads no events; read by analytics.experiment and by
-- mv_experiment_results (30_standing.sql).

CREATE FUNCTION analytics._check_confidence(p_confidence double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_confidence IS NULL OR p_confidence <= 0 OR p_confidence >= 1 THEN
        PERFORM spectrum._reject(
            'p_confidence', p_confidence::text, 'a number between 0 and 1, such as 0.95'
        );
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_confidence(double precision) IS
    'Raises 22023 unless the number can be a confidence.';

CREATE FUNCTION analytics._residual_covariance(
    p_n numeric,
    p_x numeric,
    p_y numeric,
    p_w numeric,
    p_v numeric,
    p_xw numeric,
    p_yw numeric,
    p_xv numeric,
    p_yv numeric
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_n > 1 AND p_y <> 0 AND p_v <> 0 THEN
        RETURN (
            (p_xw * p_y * p_v - p_x * p_v * p_yw - p_w * p_y * p_xv + p_x * p_w * p_yv)
            * p_n * p_n / ((p_n - 1) * p_y * p_y * p_v * p_v)
        )::double precision;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._residual_covariance(
    numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric
) IS
    'Sample covariance of two ratios by the delta method, from sums over n units: of what a unit '
    'has beyond x / y and beyond w / v, over the means of y and v. In numeric, so that nothing '
    'cancels. NULL below two units or without a ratio.';

CREATE FUNCTION analytics._cuped_theta(
    p_n numeric,
    p_x numeric,
    p_y numeric,
    p_w numeric,
    p_v numeric,
    p_ww numeric,
    p_vv numeric,
    p_wv numeric,
    p_xw numeric,
    p_xv numeric,
    p_yw numeric,
    p_yv numeric
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_variance double precision := analytics._residual_covariance(
        p_n, p_w, p_v, p_w, p_v, p_ww, p_wv, p_wv, p_vv
    );
BEGIN
    RETURN coalesce(analytics._residual_covariance(
        p_n, p_x, p_y, p_w, p_v, p_xw, p_yw, p_xv, p_yv
    ) / nullif(v_variance, 0), 0);
END
$$;
COMMENT ON FUNCTION analytics._cuped_theta(
    numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric,
    numeric, numeric
) IS
    'Slope of a metric over itself before the exposure: covariance / variance before; 0 where '
    'nothing varied before (Deng, Xu, Kohavi and Walker 2013; ratios by the delta method).';

CREATE FUNCTION analytics._experiment_moments(
    p_kind text,
    p_total analytics._experiment_total,
    p_theta double precision,
    p_before numeric,
    OUT value double precision,
    OUT variance double precision,
    OUT variance_reduction double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rest double precision;
BEGIN
    value := p_total.sum_x / nullif(p_total.sum_y, 0);
    IF p_kind = 'proportion' AND coalesce(p_theta, 0) = 0 THEN
        variance := value * (1 - value);
    ELSE
        variance := analytics._residual_covariance(
            p_total.units, p_total.sum_x, p_total.sum_y, p_total.sum_x, p_total.sum_y,
            p_total.sum_xx, p_total.sum_xy, p_total.sum_xy, p_total.sum_yy
        );
    END IF;
    v_rest := variance;
    IF p_theta <> 0 THEN
        value := value - p_theta * (p_total.sum_w / nullif(p_total.sum_v, 0) - p_before);
        v_rest := variance
            - 2 * p_theta * analytics._residual_covariance(
                p_total.units, p_total.sum_x, p_total.sum_y, p_total.sum_w, p_total.sum_v,
                p_total.sum_xw, p_total.sum_yw, p_total.sum_xv, p_total.sum_yv
            )
            + p_theta * p_theta * analytics._residual_covariance(
                p_total.units, p_total.sum_w, p_total.sum_v, p_total.sum_w, p_total.sum_v,
                p_total.sum_ww, p_total.sum_wv, p_total.sum_wv, p_total.sum_vv
            );
        -- what is left by rounding alone is nothing
        v_rest := CASE WHEN v_rest > 1e-12 * variance THEN v_rest ELSE 0 * v_rest END;
    END IF;
    IF p_theta IS NOT NULL THEN
        variance_reduction := 1 - v_rest / nullif(variance, 0);
    END IF;
    variance := v_rest;
END
$$;
COMMENT ON FUNCTION analytics._experiment_moments(
    text, analytics._experiment_total, double precision, numeric
) IS
    'Value of a metric in one arm and its variance per unit. With a theta both are adjusted by how '
    'far the arm was from all (p_before) before the exposure, and the share of the variance that '
    'this takes away is told.';

CREATE FUNCTION analytics._experiment_interval(
    p_plan analytics._experiment_plan,
    p_is_rate boolean,
    p_units bigint,
    p_conversions bigint,
    p_value double precision,
    p_variance double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_error double precision := sqrt(p_variance / p_units);
    v_margin double precision;
BEGIN
    IF p_plan.sequential IS NOT NULL THEN
        SELECT t.low, t.high INTO low, high
        FROM spectrum.sequential_test(
            p_units, p_value, v_error, p_plan.sequential, p_plan.confidence
        ) AS t;
    ELSIF p_is_rate THEN
        SELECT w.low, w.high INTO low, high
        FROM spectrum.wilson_interval(p_conversions, p_units, p_plan.confidence) AS w;
    ELSIF v_error > 0 THEN
        v_margin := v_error
            * spectrum.student_t_quantile((1 + p_plan.confidence) / 2, p_units - 1);
        low := p_value - v_margin;
        high := p_value + v_margin;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._experiment_interval(
    analytics._experiment_plan, boolean, bigint, bigint, double precision, double precision
) IS
    'Interval of a metric in one arm: Wilson for a rate, Student t for the rest, or an '
    'always-valid one; NULL where the units do not vary.';

CREATE FUNCTION analytics._experiment_arms(
    p_plan analytics._experiment_plan, p_totals analytics._experiment_total[]
)
RETURNS TABLE (
    account_id text,
    metric text,
    kind text,
    is_guardrail boolean,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    variance double precision,
    low double precision,
    high double precision,
    is_rate boolean,
    is_enough boolean,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH covariates AS (
        SELECT t.account_id, t.metric, sum(t.sum_w) / nullif(sum(t.sum_v), 0) AS before,
            -- an arm without a value before cannot be adjusted, so none is
            CASE WHEN bool_and(t.sum_v <> 0 OR t.units = 0) THEN analytics._cuped_theta(
                sum(t.units), sum(t.sum_x), sum(t.sum_y), sum(t.sum_w), sum(t.sum_v),
                sum(t.sum_ww), sum(t.sum_vv), sum(t.sum_wv), sum(t.sum_xw), sum(t.sum_xv),
                sum(t.sum_yw), sum(t.sum_yv)
            ) ELSE 0 END AS theta
        FROM unnest(p_totals) AS t
        WHERE p_plan.cuped IS NOT NULL
        GROUP BY t.account_id, t.metric
    ),
    estimates AS (
        SELECT t, m.kind, m.is_guardrail, v.theta, s.*,
            m.kind = 'proportion' AND coalesce(v.theta, 0) = 0 AS is_rate
        FROM unnest(p_totals) AS t
        JOIN analytics._measures(p_plan.measures) AS m ON m.metric = t.metric
        LEFT JOIN covariates AS v ON v.account_id = t.account_id AND v.metric = t.metric
        CROSS JOIN LATERAL analytics._experiment_moments(m.kind, t, v.theta, v.before) AS s
    )
    SELECT (e.t).account_id, (e.t).metric, e.kind, e.is_guardrail, (e.t).variant,
        (e.t).variant = p_plan.control, (e.t).units, (e.t).excluded_units, (e.t).conversions,
        e.value, e.variance, i.low, i.high, e.is_rate,
        -- A mean does not need units that did nothing, a proportion does.
        (e.t).units >= 50 AND (e.t).conversions >= 5
            AND (e.kind <> 'proportion' OR (e.t).units - (e.t).conversions >= 5),
        (e.t).winsor_low, (e.t).winsor_high, e.theta, e.variance_reduction
    FROM estimates AS e
    CROSS JOIN LATERAL analytics._experiment_interval(
        p_plan, e.is_rate, (e.t).units, (e.t).conversions, e.value, e.variance
    ) AS i;
END
$$;
COMMENT ON FUNCTION analytics._experiment_arms(
    analytics._experiment_plan, analytics._experiment_total[]
) IS
    'Each metric of an experiment in each variant and scope: units, value, interval, and whether '
    'there is enough of it to rely on. theta is one for all variants of a metric.';
-- Room 71, comparisons: each arm of an experiment beside its control, and all that is said of both.
-- From a plan and its totals alone.

CREATE FUNCTION analytics._experiment_comparison(
    p_plan analytics._experiment_plan,
    p_is_rate boolean,
    p_units bigint,
    p_conversions bigint,
    p_estimate double precision,
    p_variance double precision,
    p_control_units bigint,
    p_control_conversions bigint,
    p_control_estimate double precision,
    p_control_variance double precision,
    OUT difference double precision,
    OUT difference_low double precision,
    OUT difference_high double precision,
    OUT lift double precision,
    OUT lift_low double precision,
    OUT lift_high double precision,
    OUT p_value double precision,
    OUT chance_to_win double precision,
    OUT credible_low double precision,
    OUT credible_high double precision,
    OUT expected_loss double precision
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_units bigint := p_units + p_control_units;
    v_error double precision := sqrt(
        p_variance / p_units + p_control_variance / p_control_units
    );
BEGIN
    difference := p_estimate - p_control_estimate;
    IF difference IS NULL THEN
        RETURN;
    END IF;
    lift := difference / nullif(p_control_estimate, 0);
    SELECT b.chance_to_win, b.low, b.high, b.expected_loss
    INTO chance_to_win, credible_low, credible_high, expected_loss
    FROM spectrum.normal_posterior(difference, v_error, p_plan.confidence) AS b;

    IF p_plan.sequential IS NOT NULL THEN
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.sequential_test(
            v_units, difference, v_error, p_plan.sequential, p_plan.confidence
        ) AS t;
        SELECT t.low, t.high INTO lift_low, lift_high
        FROM spectrum.sequential_test(
            v_units, lift, spectrum._lift_error(
                p_units, p_estimate, p_variance,
                p_control_units, nullif(p_control_estimate, 0), p_control_variance
            ), p_plan.sequential, p_plan.confidence
        ) AS t;
        RETURN;
    ELSIF p_is_rate THEN
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.two_proportion_test(
            p_conversions, p_units, p_control_conversions, p_control_units, p_plan.confidence
        ) AS t;
    ELSE
        SELECT t.low, t.high, t.p_value INTO difference_low, difference_high, p_value
        FROM spectrum.welch_t_test(
            p_units, p_estimate, p_variance,
            p_control_units, p_control_estimate, p_control_variance, p_plan.confidence
        ) AS t;
    END IF;
    SELECT l.low, l.high INTO lift_low, lift_high
    FROM spectrum.lift_interval(
        p_units, p_estimate, p_variance,
        p_control_units, p_control_estimate, p_control_variance, p_plan.confidence
    ) AS l;
END
$$;
COMMENT ON FUNCTION analytics._experiment_comparison(
    analytics._experiment_plan, boolean, bigint, bigint, double precision, double precision,
    bigint, bigint, double precision, double precision
) IS
    'An arm against control: pooled z-test and Newcombe''s interval for a rate, Welch''s t for the '
    'rest, delta-method lift for all, or always-valid ones instead; and what the posterior says.';

CREATE FUNCTION analytics._experiment_results(
    p_plan analytics._experiment_plan, p_totals analytics._experiment_total[]
)
RETURNS TABLE (
    account_id text,
    experiment text,
    metric text,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    ci_low double precision,
    ci_high double precision,
    difference double precision,
    difference_low double precision,
    difference_high double precision,
    lift double precision,
    lift_low double precision,
    lift_high double precision,
    p_value double precision,
    p_adjusted double precision,
    srm_p_value double precision,
    is_reliable boolean,
    kind text,
    is_guardrail boolean,
    chance_to_win double precision,
    credible_low double precision,
    credible_high double precision,
    expected_loss double precision,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision,
    is_sequential boolean
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
-- thousands of accounts look like a few rows
SET enable_nestloop = off
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH arms AS MATERIALIZED (SELECT * FROM analytics._experiment_arms(p_plan, p_totals)),
    splits AS (
        SELECT a.account_id, (spectrum.sample_ratio_mismatch(
            array_agg(a.units ORDER BY a.variant),
            array_agg((p_plan.variants ->> a.variant)::double precision ORDER BY a.variant)
        )).p_value
        FROM arms AS a WHERE a.metric = p_plan.metrics[1] GROUP BY a.account_id
    ),
    comparisons AS MATERIALIZED (
        SELECT a.*, t.*, a.is_enough AND c.is_enough AS are_enough
        FROM arms AS a
        JOIN arms AS c ON c.account_id = a.account_id AND c.metric = a.metric AND c.is_control
        LEFT JOIN LATERAL analytics._experiment_comparison(
            p_plan, a.is_rate, a.units, a.conversions,
            -- control is not compared with itself
            CASE WHEN NOT a.is_control THEN a.value END, a.variance,
            c.units, c.conversions, c.value, c.variance
        ) AS t ON true
    ),
    families AS (
        SELECT c.account_id,
            array_agg(c.metric ORDER BY c.metric, c.variant) AS metrics,
            array_agg(c.variant ORDER BY c.metric, c.variant) AS variants,
            spectrum.adjust_p_values(
                array_agg(c.p_value ORDER BY c.metric, c.variant), p_plan.correction
            ) AS p_values
        FROM comparisons AS c WHERE NOT (c.is_control OR c.is_guardrail) GROUP BY c.account_id
    ),
    adjustments AS (
        SELECT f.account_id, a.* FROM families AS f,
            unnest(f.metrics, f.variants, f.p_values) AS a (metric, variant, p_value)
    )
    SELECT c.account_id, p_plan.experiment, c.metric, c.variant, c.is_control, c.units,
        c.excluded_units, c.conversions, c.value, c.low, c.high, c.difference, c.difference_low,
        c.difference_high, c.lift, c.lift_low, c.lift_high, c.p_value, a.p_value, s.p_value,
        c.are_enough AND coalesce(s.p_value >= 0.001, false), c.kind, c.is_guardrail,
        c.chance_to_win, c.credible_low, c.credible_high, c.expected_loss, c.winsor_low,
        c.winsor_high, c.theta, c.variance_reduction, p_plan.sequential IS NOT NULL
    FROM comparisons AS c
    JOIN splits AS s ON s.account_id = c.account_id
    LEFT JOIN adjustments AS a
        ON a.account_id = c.account_id AND a.metric = c.metric AND a.variant = c.variant;
END
$$;
COMMENT ON FUNCTION analytics._experiment_results(
    analytics._experiment_plan, analytics._experiment_total[]
) IS
    'The results of an experiment in each scope of its totals: arms, their comparison with '
    'control, the split against the plan, and p-values adjusted over all metrics and variants but '
    'guardrails.';
-- Room 71, standing experiments, how they are kept: of each user that the news concern, what he
-- contributed is taken out of the totals, and what he contributes now is put in. Kept are his
-- exposure and, by day, what he did of each metric: a heavy user is read on the days of the news
-- alone, unless his exposure changed. Results are made again, from the totals, of the accounts
-- whose totals moved; winsorized ones from the amounts of all units of these accounts.

CREATE FUNCTION analytics._touch_experiment_units(
    p_report integer,
    p_built_to bigint,
    p_plan analytics._experiment_plan
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_types integer[] := ARRAY(
        SELECT x.event_type_key FROM analytics._exposure_types() AS x
        UNION
        SELECT s.event_type_key FROM analytics._metric_sides(p_plan.measures) AS s
    );
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_experiment_units',
        'user_key bigint, scope bigint, is_leaving boolean, is_less boolean, '
        'old_variant text, old_exposed_at timestamptz, variant text, exposed_at timestamptz, '
        'low_variant text, high_variant text');
    INSERT INTO pg_temp.spectrum_experiment_units (
        user_key, scope, is_leaving, is_less, old_variant, old_exposed_at, exposed_at,
        low_variant, high_variant, variant
    )
    SELECT touched.user_key, touched.scope, touched.is_leaving, touched.is_less, known.variant,
        known.exposed_at,
        seen.exposed_at, seen.low_variant, seen.high_variant,
        analytics._counted_variant(p_plan.variants, seen.low_variant, seen.high_variant)
    FROM (
        SELECT news.user_key, news.scope, bool_or(news.is_leaving) AS is_leaving,
            coalesce(bool_or(news.sign <= 0) FILTER (WHERE seen.variant <> ''), false) AS is_less,
            min(news.occurred_at) FILTER (WHERE news.sign > 0 AND seen.variant <> '')
                AS exposed_at,
            min(seen.variant COLLATE "C") FILTER (WHERE news.sign > 0 AND seen.variant <> '')
                AS low_variant,
            max(seen.variant COLLATE "C") FILTER (WHERE news.sign > 0 AND seen.variant <> '')
                AS high_variant
        FROM pg_temp.spectrum_news AS news
        LEFT JOIN analytics._exposure_types() AS x USING (event_type_key)
        CROSS JOIN LATERAL (
            SELECT CASE WHEN news.properties ->> x.flag_property = p_plan.experiment
                AND (p_plan.starts_at IS NULL OR news.occurred_at >= p_plan.starts_at)
                AND (p_plan.ends_at IS NULL OR news.occurred_at < p_plan.ends_at)
            THEN news.properties ->> x.variant_property END AS variant
        ) AS seen
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
            AND (news.is_leaving OR news.event_type_key = ANY (v_types))
        GROUP BY news.user_key, news.scope
    ) AS touched
    LEFT JOIN LATERAL (
        SELECT before.variant, before.exposed_at, before.low_variant, before.high_variant
        FROM spectrum.rollup_experiment_units AS before
        WHERE before.report_id = p_report AND before.user_key = touched.user_key
            AND before.scope = touched.scope
        OFFSET 0
    ) AS known ON true
    -- Exposures that were taken back: what is left of them is in the facts alone, see below.
    LEFT JOIN LATERAL (
        SELECT
            least(known.exposed_at, touched.exposed_at) AS exposed_at,
            least(known.low_variant, touched.low_variant) AS low_variant,
            greatest(known.high_variant, touched.high_variant) AS high_variant
    ) AS seen ON NOT touched.is_leaving AND NOT touched.is_less
    WHERE known.exposed_at IS NOT NULL
        OR (touched.exposed_at IS NOT NULL AND NOT touched.is_leaving);

    IF NOT EXISTS (SELECT FROM pg_temp.spectrum_experiment_units WHERE is_less) THEN
        RETURN;
    END IF;
    UPDATE pg_temp.spectrum_experiment_units AS touched
    SET exposed_at = found.exposed_at, low_variant = found.low_variant,
        high_variant = found.high_variant, variant = found.variant
    FROM (VALUES (false), (true)) AS modes (by_account)
    CROSS JOIN LATERAL analytics._experiment_units(p_plan, NULL, modes.by_account, ARRAY(
        SELECT less.user_key FROM pg_temp.spectrum_experiment_units AS less
        WHERE less.is_less AND NOT less.is_leaving AND (less.scope < 0) = modes.by_account
    )) AS found
    WHERE touched.is_less AND NOT touched.is_leaving AND touched.user_key = found.user_key
        AND CASE WHEN modes.by_account THEN touched.scope = -found.account_key
            ELSE touched.scope >= 0 END;
END
$$;
COMMENT ON FUNCTION analytics._touch_experiment_units(
    integer, bigint, analytics._experiment_plan
) IS
    'Lays out the units that the news concern, exposed or not as they were and as they are. A user '
    'without an exposure is none.';

CREATE FUNCTION analytics._kept_contributions(p_report integer, p_accounts text[])
RETURNS TABLE (
    account_id text,
    user_key bigint,
    variant text,
    metric text,
    has_converted boolean,
    amount numeric,
    denominator numeric,
    amount_before numeric,
    denominator_before numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 100000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT '*' AS account_id, unit.user_key, unit.scope, unit.variant
        FROM spectrum.rollup_experiment_units AS unit
        WHERE '*' = ANY (p_accounts) AND unit.report_id = p_report AND unit.scope >= 0
        UNION ALL
        SELECT dim.account_id, unit.user_key, unit.scope, unit.variant
        FROM warehouse.dim_accounts AS dim
        CROSS JOIN (VALUES (1), (-1)) AS sign (factor)
        JOIN spectrum.rollup_experiment_units AS unit
            ON unit.report_id = p_report AND unit.scope = dim.account_key * sign.factor
        WHERE dim.account_id = ANY (p_accounts) AND dim.account_key <> 0
    )
    SELECT unit.account_id, unit.user_key, unit.variant, NULL, false, NULL::numeric,
        NULL::numeric, NULL::numeric, NULL::numeric
    FROM units AS unit
    UNION ALL
    SELECT unit.account_id, unit.user_key, unit.variant, did.metric, bool_or(did.has_converted),
        analytics._unit_amount(sum(did.x), did.most), analytics._unit_amount(sum(did.y), NULL),
        analytics._unit_amount(sum(did.w), did.most), analytics._unit_amount(sum(did.v), NULL)
    FROM units AS unit
    JOIN spectrum.rollup_experiment_days AS did
        ON did.report_id = p_report AND did.user_key = unit.user_key AND did.scope = unit.scope
    GROUP BY unit.account_id, unit.user_key, unit.variant, did.metric, did.most;
END
$$;
COMMENT ON FUNCTION analytics._kept_contributions(integer, text[]) IS
    'What analytics._experiment_contributions says, from what a standing report keeps of some '
    'accounts.';

CREATE FUNCTION analytics._move_experiment_days(
    p_report integer, p_plan analytics._experiment_plan
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET timezone = 'UTC'
-- What is read is told unit by unit.
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_types integer[] := ARRAY(
        SELECT s.event_type_key FROM analytics._metric_sides(p_plan.measures) AS s
    );
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_experiment_reads',
        'user_key bigint, scope bigint, exposed_at timestamptz, day date, since timestamptz, '
        'until timestamptz');
    INSERT INTO pg_temp.spectrum_experiment_reads (
        user_key, scope, exposed_at, day, since, until
    )
    SELECT unit.user_key, unit.scope, unit.exposed_at, NULL,
        unit.exposed_at - coalesce(p_plan.cuped, '0'), 'infinity'
    FROM pg_temp.spectrum_experiment_units AS unit
    WHERE (unit.variant, unit.exposed_at)
        IS DISTINCT FROM (unit.old_variant, unit.old_exposed_at)
    UNION ALL
    SELECT unit.user_key, unit.scope, unit.exposed_at, days.day,
        greatest(days.day, unit.exposed_at - coalesce(p_plan.cuped, '0')),
        days.day + interval '1 day'
    FROM pg_temp.spectrum_experiment_units AS unit
    JOIN (
        SELECT DISTINCT news.user_key, news.scope, news.occurred_at::date AS day
        FROM pg_temp.spectrum_news AS news
        WHERE news.event_type_key = ANY (v_types)
    ) AS days USING (user_key, scope)
    WHERE unit.variant = unit.old_variant AND unit.exposed_at = unit.old_exposed_at
        AND days.day + interval '1 day' > unit.exposed_at - coalesce(p_plan.cuped, '0');
    IF NOT EXISTS (SELECT FROM pg_temp.spectrum_experiment_reads) THEN
        RETURN;
    END IF;

    DELETE FROM spectrum.rollup_experiment_days AS did
    USING pg_temp.spectrum_experiment_reads AS reads
    WHERE did.report_id = p_report AND did.user_key = reads.user_key AND did.scope = reads.scope
        AND (reads.day IS NULL OR did.day = reads.day);
    INSERT INTO spectrum.rollup_experiment_days (
        report_id, user_key, scope, day, metric, most, has_converted, x, y, w, v
    )
    SELECT p_report, unit.user_key, unit.scope, did.occurred_at::date, did.metric, did.most,
        coalesce(bool_or(did.is_upper) FILTER (WHERE NOT did.is_before), false),
        coalesce(sum(did.amount) FILTER (WHERE did.is_upper AND NOT did.is_before), 0),
        coalesce(sum(did.amount) FILTER (WHERE NOT did.is_upper AND NOT did.is_before), 0),
        coalesce(sum(did.amount) FILTER (WHERE did.is_upper AND did.is_before), 0),
        coalesce(sum(did.amount) FILTER (WHERE NOT did.is_upper AND did.is_before), 0)
    FROM (
        SELECT array_agg(reads.user_key) AS users,
            array_agg(greatest(0, -reads.scope)) AS accounts,
            array_agg(reads.exposed_at) AS exposed_ats, array_agg(reads.since) AS sinces,
            array_agg(reads.until) AS untils
        FROM pg_temp.spectrum_experiment_reads AS reads
        JOIN pg_temp.spectrum_experiment_units AS unit USING (user_key, scope)
        WHERE unit.variant IS NOT NULL
    ) AS known
    CROSS JOIN LATERAL analytics._experiment_happenings(
        p_plan, known.users, known.accounts, known.exposed_ats, known.sinces, known.untils
    ) AS did
    JOIN pg_temp.spectrum_experiment_units AS unit ON unit.user_key = did.user_key
        AND greatest(0, -unit.scope) = did.account_key
    WHERE unit.variant IS NOT NULL
    GROUP BY unit.user_key, unit.scope, did.occurred_at::date, did.metric, did.most;
END
$$;
COMMENT ON FUNCTION analytics._move_experiment_days(
    integer, analytics._experiment_plan
) IS
    'Brings rollup_experiment_days up to the facts: on the days of the news, or, of units whose '
    'exposure or variant changed, on all.';

CREATE FUNCTION analytics._note_experiment_moves(p_report integer, p_sign integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_experiment_moves (
        sign, scope, variant, metric, has_converted, x, y, w, v
    )
    SELECT p_sign, unit.scope, part.*
    FROM pg_temp.spectrum_experiment_units AS unit
    CROSS JOIN LATERAL (
        SELECT
            CASE WHEN p_sign < 0 THEN unit.old_variant ELSE unit.variant END AS variant,
            CASE WHEN p_sign < 0 THEN unit.old_exposed_at ELSE unit.exposed_at END AS exposed_at
    ) AS seen
    CROSS JOIN LATERAL (
        SELECT coalesce(seen.variant, ''), '', false, 0::numeric, 0::numeric, 0::numeric,
            0::numeric
        UNION ALL
        SELECT seen.variant, did.metric, bool_or(did.has_converted),
            analytics._unit_amount(sum(did.x), did.most), analytics._unit_amount(sum(did.y), NULL),
            analytics._unit_amount(sum(did.w), did.most), analytics._unit_amount(sum(did.v), NULL)
        FROM spectrum.rollup_experiment_days AS did
        WHERE did.report_id = p_report AND did.user_key = unit.user_key
            AND did.scope = unit.scope
        GROUP BY did.metric, did.most
        OFFSET 0
    ) AS part
    WHERE seen.exposed_at IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._note_experiment_moves(integer, integer) IS
    'Lays out what the units laid out contribute by what is kept of them: with sign -1 before they '
    'are brought up to the news, with 1 afterwards.';

CREATE FUNCTION analytics._move_experiment_units(
    p_report integer, p_plan analytics._experiment_plan
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_experiment_moves',
        'sign integer, scope bigint, variant text, metric text, has_converted boolean, '
        'x numeric, y numeric, w numeric, v numeric');
    PERFORM analytics._note_experiment_moves(p_report, -1);

    DELETE FROM spectrum.rollup_experiment_units AS known
    USING pg_temp.spectrum_experiment_units AS unit
    WHERE known.report_id = p_report AND known.user_key = unit.user_key
        AND known.scope = unit.scope AND unit.exposed_at IS NULL;
    INSERT INTO spectrum.rollup_experiment_units AS known (
        report_id, user_key, scope, variant, exposed_at, low_variant, high_variant
    )
    SELECT p_report, unit.user_key, unit.scope, unit.variant, unit.exposed_at, unit.low_variant,
        unit.high_variant
    FROM pg_temp.spectrum_experiment_units AS unit
    WHERE unit.exposed_at IS NOT NULL
    ON CONFLICT (report_id, user_key, scope) DO UPDATE SET
        variant = excluded.variant,
        exposed_at = excluded.exposed_at,
        low_variant = excluded.low_variant,
        high_variant = excluded.high_variant
    WHERE (known.exposed_at, known.low_variant, known.high_variant)
        <> (excluded.exposed_at, excluded.low_variant, excluded.high_variant);

    PERFORM analytics._move_experiment_days(p_report, p_plan);
    PERFORM analytics._note_experiment_moves(p_report, 1);
END
$$;
COMMENT ON FUNCTION analytics._move_experiment_units(
    integer, analytics._experiment_plan
) IS
    'Brings what is kept of the units laid out up to the news and leaves in '
    'pg_temp.spectrum_experiment_moves what they contributed and what they contribute.';

CREATE FUNCTION analytics._move_experiment_totals(p_report integer)
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_accounts text[];
BEGIN
    WITH moved AS (
        SELECT scope, metric, variant, sum(sign) AS units,
            coalesce(sum(sign) FILTER (WHERE has_converted), 0) AS conversions,
            sum(sign * x) AS x, sum(sign * x * x) AS xx,
            sum(sign * y) AS y, sum(sign * y * y) AS yy, sum(sign * x * y) AS xy,
            sum(sign * w) AS w, sum(sign * w * w) AS ww,
            sum(sign * v) AS v, sum(sign * v * v) AS vv, sum(sign * w * v) AS wv,
            sum(sign * x * w) AS xw, sum(sign * x * v) AS xv,
            sum(sign * y * w) AS yw, sum(sign * y * v) AS yv
        FROM pg_temp.spectrum_experiment_moves
        GROUP BY scope, metric, variant
    ), changed AS (
        INSERT INTO analytics.mv_experiment_totals AS sums (
            report_id, account_id, metric, variant, units, conversions, sum_x, sum_xx, sum_y,
            sum_yy, sum_xy, sum_w, sum_ww, sum_v, sum_vv, sum_wv, sum_xw, sum_xv, sum_yw, sum_yv
        )
        SELECT p_report, scopes.account_id, moved.metric, moved.variant, sum(units),
            sum(conversions), sum(x), sum(xx), sum(y), sum(yy), sum(xy), sum(w), sum(ww),
            sum(v), sum(vv), sum(wv), sum(xw), sum(xv), sum(yw), sum(yv)
        FROM moved
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, moved.metric, moved.variant
        HAVING (
            sum(units), sum(conversions), sum(x), sum(xx), sum(y), sum(yy), sum(xy), sum(w),
            sum(ww), sum(v), sum(vv), sum(wv), sum(xw), sum(xv), sum(yw), sum(yv)
        ) <> (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        ON CONFLICT (report_id, account_id, metric, variant) DO UPDATE SET
            units = sums.units + excluded.units,
            conversions = sums.conversions + excluded.conversions,
            sum_x = sums.sum_x + excluded.sum_x,
            sum_xx = sums.sum_xx + excluded.sum_xx,
            sum_y = sums.sum_y + excluded.sum_y,
            sum_yy = sums.sum_yy + excluded.sum_yy,
            sum_xy = sums.sum_xy + excluded.sum_xy,
            sum_w = sums.sum_w + excluded.sum_w,
            sum_ww = sums.sum_ww + excluded.sum_ww,
            sum_v = sums.sum_v + excluded.sum_v,
            sum_vv = sums.sum_vv + excluded.sum_vv,
            sum_wv = sums.sum_wv + excluded.sum_wv,
            sum_xw = sums.sum_xw + excluded.sum_xw,
            sum_xv = sums.sum_xv + excluded.sum_xv,
            sum_yw = sums.sum_yw + excluded.sum_yw,
            sum_yv = sums.sum_yv + excluded.sum_yv
        RETURNING sums.account_id
    )
    SELECT array_agg(DISTINCT changed.account_id) INTO v_accounts FROM changed;
    DELETE FROM analytics.mv_experiment_totals
    WHERE report_id = p_report AND account_id = ANY (v_accounts) AND units = 0;
    RETURN v_accounts;
END
$$;
COMMENT ON FUNCTION analytics._move_experiment_totals(integer) IS
    'Moves mv_experiment_totals by what is laid out and returns the accounts whose totals changed.';

CREATE FUNCTION analytics._make_experiment_results(
    p_report integer, p_plan analytics._experiment_plan, p_accounts text[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_sums analytics._experiment_total[];
BEGIN
    IF p_plan.winsorize IS NULL THEN
        SELECT array_agg((
            sums.account_id, sums.metric, sums.variant, sums.units, 0, sums.conversions,
            sums.sum_x, sums.sum_xx, sums.sum_y, sums.sum_yy, sums.sum_xy, sums.sum_w,
            sums.sum_ww, sums.sum_v, sums.sum_vv, sums.sum_wv, sums.sum_xw, sums.sum_xv,
            sums.sum_yw, sums.sum_yv, NULL, NULL
        )::analytics._experiment_total) INTO v_sums
        FROM analytics.mv_experiment_totals AS sums
        WHERE sums.report_id = p_report AND sums.account_id = ANY (p_accounts);
    ELSE
        v_sums := ARRAY(
            SELECT s FROM analytics._experiment_sums(p_plan, NULL, true, p_report, p_accounts) AS s
        );
    END IF;
    DELETE FROM analytics.mv_experiment_results
    WHERE report_id = p_report AND account_id = ANY (p_accounts);
    INSERT INTO analytics.mv_experiment_results
    SELECT p_report, results.*
    FROM analytics._experiment_results(p_plan, ARRAY(
        SELECT t FROM analytics._experiment_totals(
            p_plan, CASE WHEN '*' = ANY (p_accounts) THEN '*' END, v_sums
        ) AS t
    )) AS results;
END
$$;
COMMENT ON FUNCTION analytics._make_experiment_results(
    integer, analytics._experiment_plan, text[]
) IS
    'Makes the results of some accounts again, from the totals; for all accounts together (*) they '
    'are there even without a unit.';

CREATE FUNCTION analytics._maintain_experiment(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_state text;
    r_plan analytics._experiment_plan;
    v_accounts text[];
BEGIN
    SELECT report.state INTO v_state FROM spectrum.reports AS report
    WHERE report.report_id = p_report;
    r_plan := (
        SELECT jsonb_populate_record(NULL::analytics._experiment_plan, report.definition)
        FROM spectrum.reports AS report
        WHERE report.report_id = p_report
    );
    IF EXISTS (SELECT FROM pg_temp.spectrum_news) THEN
        PERFORM analytics._touch_experiment_units(p_report, p_built_to, r_plan);
        IF EXISTS (SELECT FROM pg_temp.spectrum_experiment_units) THEN
            PERFORM analytics._move_experiment_units(p_report, r_plan);
            v_accounts := analytics._move_experiment_totals(p_report);
        END IF;
    ELSE
        -- The last call for a report that is being built: results cost more than totals, so they
        -- are made once.
        v_accounts := ARRAY(
            SELECT DISTINCT sums.account_id FROM analytics.mv_experiment_totals AS sums
            WHERE sums.report_id = p_report
            UNION
            SELECT '*'
        );
        v_state := 'served';
    END IF;
    IF v_state = 'served' AND v_accounts IS NOT NULL THEN
        PERFORM analytics._make_experiment_results(p_report, r_plan, v_accounts);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_experiment(integer, bigint) IS
    'Moves the totals of an experiment by the news, and makes the results again of the accounts '
    'whose totals changed. Without news: the results of all accounts.';
-- Room 71, the answers: analytics.experiment for any question at once, mv_experiment_results for
-- dashboards. Both show what _experiment_results says.

CREATE FUNCTION spectrum._create_experiment_views()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.metrics AS
    SELECT
        metric, kind, event_type, property, properties_filter, time_window,
        denominator_event_type, denominator_property, denominator_filter, is_guardrail, changed_at
    FROM spectrum.metrics;
    COMMENT ON VIEW analytics.metrics IS 'The defined metrics, for all who may ask questions.';

    CREATE VIEW analytics.experiments AS
    SELECT
        experiment, variants, control, metrics, starts_at, ends_at, confidence, correction,
        changed_at, winsorize, cuped, sequential
    FROM spectrum.experiments;
    COMMENT ON VIEW analytics.experiments IS
        'The defined experiments, for all who may ask questions.';

    PERFORM spectrum._create_experiment_tables();
    PERFORM spectrum._comment_experiment_results();

    CREATE VIEW analytics.experiment_results AS
    SELECT
        v.account_id, v.experiment, v.metric, v.variant, v.is_control, v.units, v.excluded_units,
        v.conversions, v.value, v.ci_low, v.ci_high, v.difference, v.difference_low,
        v.difference_high, v.lift, v.lift_low, v.lift_high, v.p_value, v.p_adjusted,
        v.srm_p_value, v.is_reliable, v.kind, v.is_guardrail,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of, v.chance_to_win,
        v.credible_low, v.credible_high, v.expected_loss, v.winsor_low, v.winsor_high, v.theta,
        v.variance_reduction, v.is_sequential
    FROM spectrum.reports AS report
    JOIN analytics.mv_experiment_results AS v USING (report_id)
    WHERE report.kind = 'experiment' AND report.state = 'served';
    COMMENT ON VIEW analytics.experiment_results IS
        'Each metric of each defined experiment in each variant, compared with control '
        '(account_id *: all accounts).';
    COMMENT ON COLUMN analytics.experiment_results.as_of IS 'Events up to here are counted.';
    PERFORM spectrum._add_kind('experiment', 60, '_maintain_experiment',
        '{spectrum.rollup_experiment_units, spectrum.rollup_experiment_days, '
        'analytics.mv_experiment_totals, analytics.mv_experiment_results}',
        '{experiment_results}');
END
$$;
COMMENT ON FUNCTION spectrum._create_experiment_views() IS
    'Room 71: makes the views of the definitions, and the tables and the plain view of the '
    'standing results.';

CREATE FUNCTION spectrum._create_experiment_tables()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE TABLE spectrum.rollup_experiment_units (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        variant text COLLATE "C",
        exposed_at timestamptz NOT NULL,
        low_variant text COLLATE "C" NOT NULL,
        high_variant text COLLATE "C" NOT NULL,
        CONSTRAINT rollup_experiment_units_pkey PRIMARY KEY (report_id, user_key, scope)
    );
    CREATE INDEX rollup_experiment_units_scope_idx
    ON spectrum.rollup_experiment_units (report_id, scope);
    COMMENT ON TABLE spectrum.rollup_experiment_units IS 'The users that an experiment saw.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.report_id IS
        'spectrum.reports, kind experiment.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.variant IS
        'The one he counts for; NULL: left out.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.exposed_at IS 'First exposure.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.low_variant IS
        'First by name of the variants that he saw; another one than high_variant: several.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.high_variant IS 'Last by name.';

    CREATE TABLE spectrum.rollup_experiment_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        metric text COLLATE "C" NOT NULL,
        most integer,
        has_converted boolean NOT NULL,
        x numeric NOT NULL,
        y numeric NOT NULL,
        w numeric NOT NULL,
        v numeric NOT NULL,
        CONSTRAINT rollup_experiment_days_pkey
        PRIMARY KEY (report_id, user_key, scope, day, metric)
    );
    COMMENT ON TABLE spectrum.rollup_experiment_days IS
        'What each counted unit of an experiment did in a day.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.report_id IS
        'spectrum.reports, kind experiment.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.day IS 'In UTC.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.most IS
        'A unit counts no more than this for the metric; NULL: what it did.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.has_converted IS
        'Whether an event of the metric followed the exposure.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.x IS
        'Sum of the metric from the first exposure on.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.y IS 'Of a ratio: that of its denominator.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.w IS 'With CUPED: as x, before.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.v IS 'As y, before.';

    CREATE TABLE analytics.mv_experiment_totals (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        metric text COLLATE "C" NOT NULL,
        variant text COLLATE "C" NOT NULL,
        units bigint NOT NULL,
        conversions bigint NOT NULL,
        sum_x numeric NOT NULL,
        sum_xx numeric NOT NULL,
        sum_y numeric NOT NULL,
        sum_yy numeric NOT NULL,
        sum_xy numeric NOT NULL,
        sum_w numeric NOT NULL,
        sum_ww numeric NOT NULL,
        sum_v numeric NOT NULL,
        sum_vv numeric NOT NULL,
        sum_wv numeric NOT NULL,
        sum_xw numeric NOT NULL,
        sum_xv numeric NOT NULL,
        sum_yw numeric NOT NULL,
        sum_yv numeric NOT NULL,
        CONSTRAINT mv_experiment_totals_pkey PRIMARY KEY (report_id, account_id, metric, variant)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_experiment_totals IS
        'Sums over the units of each experiment: all that its results are made of.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.report_id IS
        'spectrum.reports, kind experiment.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.metric IS
        'Empty: the row that counts the units of the variant.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.variant IS 'Empty: units that are left out.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.units IS
        'Units; of a metric, those that did anything of it.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.sum_x IS
        'Sums over units of x, y, w and v (rollup_experiment_days) and of products of two.';

    CREATE TABLE analytics.mv_experiment_results (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        experiment text NOT NULL,
        metric text COLLATE "C" NOT NULL,
        variant text COLLATE "C" NOT NULL,
        is_control boolean NOT NULL,
        units bigint NOT NULL,
        excluded_units bigint NOT NULL,
        conversions bigint NOT NULL,
        value double precision,
        ci_low double precision,
        ci_high double precision,
        difference double precision,
        difference_low double precision,
        difference_high double precision,
        lift double precision,
        lift_low double precision,
        lift_high double precision,
        p_value double precision,
        p_adjusted double precision,
        srm_p_value double precision,
        is_reliable boolean NOT NULL,
        kind text NOT NULL,
        is_guardrail boolean NOT NULL,
        chance_to_win double precision,
        credible_low double precision,
        credible_high double precision,
        expected_loss double precision,
        winsor_low numeric,
        winsor_high numeric,
        theta double precision,
        variance_reduction double precision,
        is_sequential boolean NOT NULL,
        CONSTRAINT mv_experiment_results_pkey PRIMARY KEY (report_id, account_id, metric, variant)
    ) WITH (fillfactor = 70);
END
$$;
COMMENT ON FUNCTION spectrum._create_experiment_tables() IS
    'Room 71: makes what standing experiments are kept in.';

CREATE FUNCTION spectrum._comment_experiment_results()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    COMMENT ON TABLE analytics.mv_experiment_results IS
        'Results of the defined experiments, for all accounts together (account_id *) and for each '
        'account with a unit. Read it through analytics.experiment_results.';
    COMMENT ON COLUMN analytics.mv_experiment_results.account_id IS 'Account; * is all accounts.';
    COMMENT ON COLUMN analytics.mv_experiment_results.experiment IS 'Name of the experiment.';
    COMMENT ON COLUMN analytics.mv_experiment_results.metric IS 'Name of the metric.';
    COMMENT ON COLUMN analytics.mv_experiment_results.variant IS 'Planned variant.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_control IS
        'Whether the others are compared with it.';
    COMMENT ON COLUMN analytics.mv_experiment_results.units IS
        'Users who saw this variant and no other.';
    COMMENT ON COLUMN analytics.mv_experiment_results.excluded_units IS
        'Users of the experiment left out: they saw two variants, or one that is not planned.';
    COMMENT ON COLUMN analytics.mv_experiment_results.conversions IS
        'Units with an event of the metric.';
    COMMENT ON COLUMN analytics.mv_experiment_results.value IS
        'Share of units, mean per unit, or ratio; NULL without units.';
    COMMENT ON COLUMN analytics.mv_experiment_results.ci_low IS 'Lower end of its interval.';
    COMMENT ON COLUMN analytics.mv_experiment_results.ci_high IS 'Upper end of its interval.';
    COMMENT ON COLUMN analytics.mv_experiment_results.difference IS 'value - value of control.';
    COMMENT ON COLUMN analytics.mv_experiment_results.difference_low IS 'Lower end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.difference_high IS 'Upper end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.lift IS 'difference / value of control.';
    COMMENT ON COLUMN analytics.mv_experiment_results.lift_low IS 'Lower end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.lift_high IS 'Upper end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.p_value IS
        'Two-sided, of no difference from control.';
    COMMENT ON COLUMN analytics.mv_experiment_results.p_adjusted IS
        'The same, adjusted over all metrics and variants of the experiment but guardrails.';
    COMMENT ON COLUMN analytics.mv_experiment_results.srm_p_value IS
        'Of units that follow the planned split; below 0.001 the split is broken.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_reliable IS
        'Whether this arm and control have 50 units and 5 conversions (for a proportion also 5 '
        'without) and the split holds.';
    COMMENT ON COLUMN analytics.mv_experiment_results.kind IS 'proportion, mean or ratio.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_guardrail IS
        'Watched only: not in the family of adjusted p-values.';
    COMMENT ON COLUMN analytics.mv_experiment_results.chance_to_win IS
        'Probability that the value is above that of control, from the data alone (flat prior).';
    COMMENT ON COLUMN analytics.mv_experiment_results.credible_low IS
        'Lower end of the credible interval of the difference.';
    COMMENT ON COLUMN analytics.mv_experiment_results.credible_high IS 'Upper end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.expected_loss IS
        'What choosing this variant loses on average, if the higher value is the better one.';
    COMMENT ON COLUMN analytics.mv_experiment_results.winsor_low IS
        'Sums of units were cut below here; NULL: not winsorized.';
    COMMENT ON COLUMN analytics.mv_experiment_results.winsor_high IS 'Cut above here.';
    COMMENT ON COLUMN analytics.mv_experiment_results.theta IS
        'Weight of the covariate of CUPED; NULL: not asked for; 0: nothing to adjust by.';
    COMMENT ON COLUMN analytics.mv_experiment_results.variance_reduction IS
        'Share of the variance in this arm that CUPED takes away.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_sequential IS
        'Whether intervals and p-values hold at every look (always-valid), not at one alone.';
END
$$;
COMMENT ON FUNCTION spectrum._comment_experiment_results() IS
    'Room 71: says what each column of mv_experiment_results means.';

CREATE FUNCTION analytics._standing_experiment_results()
RETURNS TABLE (
    account_id text,
    experiment text,
    metric text,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    ci_low double precision,
    ci_high double precision,
    difference double precision,
    difference_low double precision,
    difference_high double precision,
    lift double precision,
    lift_low double precision,
    lift_high double precision,
    p_value double precision,
    p_adjusted double precision,
    srm_p_value double precision,
    is_reliable boolean,
    kind text,
    is_guardrail boolean,
    chance_to_win double precision,
    credible_low double precision,
    credible_high double precision,
    expected_loss double precision,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision,
    is_sequential boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.*
    FROM (
        SELECT jsonb_populate_record(NULL::analytics._experiment_plan, report.definition) AS plan
        FROM spectrum.reports AS report
        WHERE report.kind = 'experiment' AND report.state = 'served'
    ) AS e
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._experiment_results(
        e.plan,
        ARRAY(
            SELECT t FROM analytics._experiment_totals(
                e.plan,
                CASE WHEN NOT scopes.by_account THEN '*' END,
                ARRAY(
                    SELECT s FROM analytics._experiment_sums(e.plan, NULL, scopes.by_account) AS s
                )
            ) AS t
        )
    ) AS r;
END
$$;
COMMENT ON FUNCTION analytics._standing_experiment_results() IS
    'What analytics.experiment_results has to show, out of all events: for verify().';

CREATE FUNCTION analytics.experiment(
    p_experiment text,
    p_account text DEFAULT NULL,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_confidence double precision DEFAULT NULL,
    p_correction text DEFAULT NULL,
    p_winsorize double precision DEFAULT NULL,
    p_cuped interval DEFAULT NULL,
    p_sequential bigint DEFAULT NULL
)
RETURNS TABLE (
    account_id text,
    experiment text,
    metric text,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    ci_low double precision,
    ci_high double precision,
    difference double precision,
    difference_low double precision,
    difference_high double precision,
    lift double precision,
    lift_low double precision,
    lift_high double precision,
    p_value double precision,
    p_adjusted double precision,
    srm_p_value double precision,
    is_reliable boolean,
    kind text,
    is_guardrail boolean,
    chance_to_win double precision,
    credible_low double precision,
    credible_high double precision,
    expected_loss double precision,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision,
    is_sequential boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_plan analytics._experiment_plan := analytics._experiment_plan(
        p_experiment, p_from, p_to, p_confidence, p_correction, p_winsorize, p_cuped, p_sequential
    );
BEGIN
    IF v_plan.experiment IS NULL THEN
        PERFORM spectrum._reject(
            'p_experiment', p_experiment, 'the name of an experiment in analytics.experiments'
        );
    END IF;
    PERFORM analytics._check_range(p_from, p_to);
    IF p_confidence IS NOT NULL THEN
        PERFORM analytics._check_confidence(p_confidence);
    END IF;
    IF p_correction IS NOT NULL THEN
        PERFORM spectrum._check_choice(
            'p_correction', p_correction, '{holm, benjamini_hochberg}'
        );
    END IF;
    PERFORM analytics._check_methods(p_winsorize, p_cuped, p_sequential);

    RETURN QUERY
    SELECT r.*
    FROM analytics._experiment_results(
        v_plan,
        ARRAY(
            SELECT t FROM analytics._experiment_totals(
                v_plan,
                coalesce(p_account, '*'),
                ARRAY(SELECT s FROM analytics._experiment_sums(v_plan, p_account, false) AS s)
            ) AS t
        )
    ) AS r
    ORDER BY array_position(v_plan.metrics, r.metric), r.is_control DESC, r.variant;
END
$$;
COMMENT ON FUNCTION analytics.experiment(
    text, text, timestamptz, timestamptz, double precision, text, double precision, interval,
    bigint
) IS
    'Results of a defined experiment, one row a metric and variant, exact over the events: units, '
    'value and interval, difference and lift against control, p-value, p-value adjusted for their '
    'number, p-value of the split. NULL arguments: as the experiment is defined, all accounts. '
    '[p_from, p_to) limits the exposures, and the events of metrics without a window. p_winsorize: '
    'percentile to cut amounts at; p_cuped: how long before the exposure the covariate is '
    'measured; p_sequential: units at which always-valid intervals are narrowest; 1, 0, 0: off.';
-- Room 72, glass: from any cell of a standing view to the events behind it, and from an event to
-- the cells it counts in. For each view there are two functions, found by their names:
--   analytics._trace_<view>(cell)           the events that a cell counts, and the rule in words
--   analytics._cells_<view>(user, at, event)  the cells that count an event
-- Both ask the events as they are now. A view is behind them by what no refresh has counted yet.

CREATE FUNCTION spectrum._create_glass()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.served_reports') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE VIEW analytics.served_reports WITH (security_barrier) AS
    SELECT report.kind, report.name, report.definition, report.created_at
    FROM spectrum.reports AS report
    WHERE report.state = 'served';
    COMMENT ON VIEW analytics.served_reports IS
        'What the standing views show, by which definition.';
    COMMENT ON COLUMN analytics.served_reports.kind IS 'The question: funnel, retention, ...';
    COMMENT ON COLUMN analytics.served_reports.name IS
        'Of the definition; empty where there is only one.';
    COMMENT ON COLUMN analytics.served_reports.definition IS
        'The definition that is shown; one that was changed since is shown once it is built.';
    COMMENT ON COLUMN analytics.served_reports.created_at IS 'When it was defined.';
END
$$;
COMMENT ON FUNCTION spectrum._create_glass() IS 'Room 72: makes analytics.served_reports.';

CREATE FUNCTION analytics._read_cell(
    p_cell jsonb, p_keys text[], p_measures text[], p_optional text[] DEFAULT '{}'
)
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb;
    v_form text := format('a JSON object with %s, and if wanted account_id%s and measure',
        array_to_string(p_keys, ', '), array_to_string(ARRAY[''] || p_optional, ', '));
    v_missing text[];
BEGIN
    IF p_cell IS NULL OR jsonb_typeof(p_cell) <> 'object' THEN
        PERFORM spectrum._reject('p_cell', p_cell::text, v_form);
    END IF;
    v_cell := jsonb_build_object('account_id', '*', 'measure', p_measures[1])
        || jsonb_strip_nulls(p_cell);
    v_missing := ARRAY(SELECT k.key FROM unnest(p_keys) AS k (key) WHERE NOT v_cell ? k.key);
    IF v_missing <> '{}' OR v_cell - p_keys - p_optional - '{account_id, measure}'::text[] <> '{}'
    THEN
        PERFORM spectrum._reject('p_cell', p_cell::text, v_form);
    END IF;
    PERFORM spectrum._check_choice('p_cell.measure', v_cell ->> 'measure', p_measures);
    RETURN v_cell;
END
$$;
COMMENT ON FUNCTION analytics._read_cell(jsonb, text[], text[], text[]) IS
    'A cell with what it leaves out: all accounts, the first measure. Raises 22023 unless it has '
    'the keys, and no others but optional ones.';

CREATE FUNCTION analytics._cell_day(p_cell jsonb, p_key text)
RETURNS date
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO'
AS $$
DECLARE
    v_day date;
BEGIN
    IF p_cell ->> p_key ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}$' THEN
        v_day := (p_cell ->> p_key)::date;
    ELSE
        PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key, 'a day, such as 2026-03-01');
    END IF;
    RETURN v_day;
EXCEPTION WHEN datetime_field_overflow THEN
    PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key, 'a day, such as 2026-03-01');
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._cell_day(jsonb, text) IS
    'The day that a key of a cell names; raises 22023 unless it is one.';

CREATE FUNCTION analytics._cell_number(p_cell jsonb, p_key text)
RETURNS integer
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT p_cell ->> p_key ~ '^[0-9]{1,9}$' THEN
        PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key, 'a number from 0 on');
    END IF;
    RETURN (p_cell ->> p_key)::integer;
END
$$;
COMMENT ON FUNCTION analytics._cell_number(jsonb, text) IS
    'The number that a key of a cell names; raises 22023 unless it is one.';

CREATE FUNCTION analytics._cell_account(p_cell jsonb)
RETURNS bigint
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE p_cell ->> 'account_id' WHEN '*' THEN 0 ELSE coalesce((
        SELECT known.account_key FROM analytics.accounts AS known
        WHERE known.account_id = p_cell ->> 'account_id'
    ), -1) END;
END
$$;
COMMENT ON FUNCTION analytics._cell_account(jsonb) IS
    'Key of the account of a cell: 0 for all together, -1 for one never seen.';

CREATE FUNCTION analytics._cell_scope(p_cell jsonb)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE p_cell ->> 'account_id' WHEN '*' THEN '' ELSE
        format(' of account %s', p_cell ->> 'account_id')
    END;
END
$$;
COMMENT ON FUNCTION analytics._cell_scope(jsonb) IS
    'Whose events a cell counts, for its rule: nothing, or " of account ...".';

CREATE FUNCTION analytics._days_between(
    p_first date, p_last date, OUT since timestamptz, OUT until timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT spectrum._day_start(p_first, setting.timezone),
        spectrum._day_start(p_last + 1, setting.timezone)
    INTO since, until
    FROM analytics.settings AS setting;
END
$$;
COMMENT ON FUNCTION analytics._days_between(date, date) IS
    'When the days from p_first to p_last begin and end, in the time zone of reports.';

CREATE FUNCTION analytics._day_of(p_at timestamptz)
RETURNS date
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.period_date(spectrum.period_start('day', p_at));
END
$$;
COMMENT ON FUNCTION analytics._day_of(timestamptz) IS
    'The calendar day that holds an instant, in the time zone of reports.';

CREATE FUNCTION analytics._event_accounts(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (account_id text, account_key bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 2
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT '*', 0::bigint
    UNION ALL
    SELECT event.account_id, event.account_key
    FROM analytics.events AS event
    WHERE event.user_key = p_user AND event.occurred_at = p_at AND event.event_id = p_event
        AND event.account_key <> 0;
END
$$;
COMMENT ON FUNCTION analytics._event_accounts(bigint, timestamptz, uuid) IS
    'The scopes that an event counts in: all accounts together (*, 0), and its own.';

CREATE FUNCTION analytics._sees_raw_events()
RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN has_schema_privilege('warehouse', 'USAGE')
        AND has_table_privilege('warehouse.event_ledger', 'SELECT')
        AND has_schema_privilege('@extschema@', 'USAGE')
        AND has_table_privilege('@extschema@.raw_events', 'SELECT');
END
$$;
COMMENT ON FUNCTION analytics._sees_raw_events() IS
    'Whether the caller may read raw_events, and the ledger that leads there.';

CREATE FUNCTION analytics.trace(p_view text, p_cell jsonb, p_limit integer DEFAULT 1000)
RETURNS TABLE (
    rule text,
    unit text,
    amount numeric,
    user_id text,
    event_id uuid,
    occurred_at timestamptz,
    event_type text,
    raw_id uuid
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    v_sees_raw boolean := analytics._sees_raw_events();
BEGIN
    IF p_view IS NULL
        OR to_regprocedure(format('analytics.%I(jsonb)', '_trace_' || p_view)) IS NULL
    THEN
        PERFORM spectrum._check_choice('p_view', p_view, ARRAY(
            SELECT substr(routine.proname, 8) FROM pg_proc AS routine
            WHERE routine.pronamespace = 'analytics'::regnamespace
                AND routine.proname LIKE '\_trace\_%'
            ORDER BY routine.proname
        ));
    ELSIF p_limit < 0 THEN
        PERFORM spectrum._reject('p_limit', p_limit::text, 'a number of rows, or NULL for all');
    END IF;
    RETURN QUERY EXECUTE format(
        'SELECT found.rule, coalesce(found.unit, event.user_id), found.amount, event.user_id, '
        'found.event_id, found.occurred_at, event.event_type, %s '
        'FROM (SELECT * FROM analytics.%I($1) ORDER BY occurred_at, event_id LIMIT $2) AS found '
        'JOIN analytics.events AS event ON event.user_key = found.user_key '
        'AND event.occurred_at = found.occurred_at AND event.event_id = found.event_id %s '
        'ORDER BY found.occurred_at, found.event_id, found.unit',
        CASE WHEN v_sees_raw THEN 'raw.id' ELSE 'NULL::uuid' END,
        '_trace_' || p_view,
        CASE WHEN v_sees_raw THEN
            'LEFT JOIN warehouse.event_ledger AS ledger ON ledger.event_id = found.event_id '
            'LEFT JOIN @extschema@.raw_events AS raw ON raw.seq = ledger.seq '
        END)
    USING p_cell, p_limit;
END
$$;
COMMENT ON FUNCTION analytics.trace(text, jsonb, integer) IS
    'The events that a cell of a standing view counts, in the order of time, at most p_limit '
    '(NULL: all), and the rule that counts them. p_view: active_users; p_cell: the columns that '
    'name the row, and measure where it has several numbers: {"account_id": "*", "day": '
    '"2026-03-01", "measure": "wau"}. unit: what the event makes count (a user, the event itself, '
    '...): the number of distinct units is the cell. amount: its share, where the cell is a sum. '
    'raw_id: row of raw_events, for roles that may read that.';
-- Room 72, glass of the counts: events, active users, money. What counts in a cell is what happened
-- in its days.

CREATE FUNCTION analytics._trace_daily_events(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day, event_type}', '{events}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account bigint := analytics._cell_account(v_cell);
    v_type integer := analytics._event_key(v_cell ->> 'event_type');
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    RETURN QUERY
    SELECT format('Every event %s%s on %s counts once, also of unknown users.',
            v_cell ->> 'event_type', analytics._cell_scope(v_cell), v_day),
        e.event_id::text, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    WHERE e.event_type_key = v_type AND e.occurred_at >= r_days.since
        AND e.occurred_at < r_days.until AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_daily_events(jsonb) IS
    'See analytics.trace: events behind a cell of daily_events.';

CREATE FUNCTION analytics._cells_daily_events(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'day', analytics._day_of(p_at),
            'event_type', e.event_type, 'measure', 'events'),
        'An event of its day and type.'
    FROM analytics.events AS e
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_daily_events(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of daily_events that count an event.';

CREATE FUNCTION analytics._trace_active_users(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day}', '{dau, wau, mau}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account bigint := analytics._cell_account(v_cell);
    v_length integer := CASE v_cell ->> 'measure' WHEN 'dau' THEN 1 WHEN 'wau' THEN 7 ELSE 30 END;
    r_days record := analytics._days_between(v_day - v_length + 1, v_day);
BEGIN
    RETURN QUERY
    SELECT format('A user counts once if he has any event%s from %s to %s, both days included; '
            'unknown users never do.',
            analytics._cell_scope(v_cell), v_day - v_length + 1, v_day),
        NULL, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    WHERE e.user_key <> 0 AND e.occurred_at >= r_days.since AND e.occurred_at < r_days.until
        AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_active_users(jsonb) IS
    'See analytics.trace: events behind a cell of active_users.';

CREATE FUNCTION analytics._cells_active_users(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_day date := analytics._day_of(p_at);
    v_last date := (
        SELECT max(shown.day) FROM analytics.daily_events AS shown WHERE shown.account_id = '*'
    );
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'day', v_day + later.days,
            'measure', span.measure),
        format('Makes its user active on %s, which is one of the %s days that end with this day.',
            v_day, span.length)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN (VALUES ('dau', 1), ('wau', 7), ('mau', 30)) AS span (measure, length)
    CROSS JOIN LATERAL generate_series(0, span.length - 1) AS later (days)
    WHERE p_user <> 0 AND v_day + later.days <= v_last;
END
$$;
COMMENT ON FUNCTION analytics._cells_active_users(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of active_users that count an event.';

CREATE FUNCTION analytics._money_measures(
    p_revenue numeric, p_event_type_key integer, p_user bigint
)
RETURNS TABLE (measure text, amount numeric, is_of_user boolean)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 3
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_is_refund boolean := p_revenue < 0 OR p_event_type_key = ANY (analytics._refund_keys());
BEGIN
    RETURN QUERY
    SELECT m.measure, m.amount, m.is_of_user
    FROM (
        VALUES
            ('orders', NULL::numeric, false, NOT v_is_refund),
            ('gross', p_revenue, false, NOT v_is_refund),
            ('refunds', abs(p_revenue), false, v_is_refund),
            ('net', CASE WHEN v_is_refund THEN -abs(p_revenue) ELSE p_revenue END, false, true),
            ('paying_users', NULL, true, NOT v_is_refund AND p_revenue > 0 AND p_user <> 0)
    ) AS m (measure, amount, is_of_user, counts)
    WHERE m.counts;
END
$$;
COMMENT ON FUNCTION analytics._money_measures(numeric, integer, bigint) IS
    'The measures of revenue_summary that an event with money counts in, and what it adds to a '
    'sum.';

CREATE FUNCTION analytics._trace_revenue_summary(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day, currency}',
        '{net, orders, gross, refunds, paying_users, active_users}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account bigint := analytics._cell_account(v_cell);
    v_measure text := v_cell ->> 'measure';
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    IF v_measure = 'active_users' THEN
        RETURN QUERY
        SELECT * FROM analytics._trace_active_users(
            v_cell - 'currency' || '{"measure": "dau"}'
        );
        RETURN;
    END IF;
    RETURN QUERY
    SELECT format('Events in %s%s on %s: %s.', v_cell ->> 'currency',
            analytics._cell_scope(v_cell), v_day, CASE v_measure
                WHEN 'orders' THEN 'each with money that is no refund counts once'
                WHEN 'gross' THEN 'the amounts of those that are no refunds'
                WHEN 'refunds' THEN 'the amounts, without sign, of refunds: events of a type in '
                    'config.refund_events, and negative amounts'
                WHEN 'net' THEN 'the amounts, refunds taken off'
                ELSE 'a user counts once if he has one above 0 that is no refund; unknown users '
                    'never do'
            END),
        CASE WHEN NOT measures.is_of_user THEN e.event_id::text END,
        measures.amount, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._money_measures(e.revenue, e.event_type_key, e.user_key)
        AS measures
    WHERE e.revenue IS NOT NULL AND e.currency = v_cell ->> 'currency'
        AND e.occurred_at >= r_days.since AND e.occurred_at < r_days.until
        AND (v_account = 0 OR e.account_key = v_account)
        AND measures.measure = v_measure;
END
$$;
COMMENT ON FUNCTION analytics._trace_revenue_summary(jsonb) IS
    'See analytics.trace: events behind a cell of revenue_summary.';

CREATE FUNCTION analytics._cells_revenue_summary(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_day date := analytics._day_of(p_at);
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'day', v_day,
            'currency', e.currency, 'measure', measures.measure),
        CASE
            WHEN measures.is_of_user THEN 'Makes its user a paying one of the day.'
            WHEN measures.amount IS NULL THEN 'An order of the day.'
            ELSE format('Adds %s.', measures.amount)
        END
    FROM analytics.events AS e
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._money_measures(e.revenue, e.event_type_key, e.user_key)
        AS measures
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
        AND e.revenue IS NOT NULL;

    -- The users of the day stand beside the money of each currency.
    RETURN QUERY
    SELECT jsonb_build_object('account_id', shown.account_id, 'day', v_day,
            'currency', shown.currency, 'measure', 'active_users'),
        'Makes its user active on the day.'
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    JOIN analytics.revenue_summary AS shown
        ON shown.account_id = scope.account_id AND shown.day = v_day
    WHERE p_user <> 0;
END
$$;
COMMENT ON FUNCTION analytics._cells_revenue_summary(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of revenue_summary that count an event.';
-- Room 72, glass of the cohorts: which events make a user start, and which make him count as back.

CREATE FUNCTION analytics._retention_evidence(
    p_definition jsonb,
    p_account bigint,
    p_users bigint[]
)
RETURNS TABLE (
    user_key bigint, cohort date, period integer, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_start_key integer := analytics._event_key(p_definition ->> 'start_event');
    v_return_key integer := analytics._event_key(p_definition ->> 'return_event');
    v_filter jsonb := nullif(p_definition -> 'properties_filter', 'null');
    v_is_recurring boolean := p_definition ->> 'cohort_kind' = 'recurring';
    v_is_on boolean := p_definition ->> 'mode' = 'on';
    v_starts timestamptz[] := (
        SELECT spectrum.period_starts(p_definition ->> 'period_kind', min(e.occurred_at),
            max(e.occurred_at) + interval '1 us')
        FROM analytics.event_keys AS e
        WHERE e.user_key = ANY (p_users) AND e.user_key <> 0
    );
    v_days date[] := analytics._period_dates(v_starts);
BEGIN
    RETURN QUERY
    WITH deeds AS MATERIALIZED (
        SELECT e.user_key, e.event_id, e.occurred_at,
            width_bucket(e.occurred_at, v_starts) AS number,
            v_start_key IS NULL OR e.event_type_key = v_start_key AS is_start,
            v_return_key IS NULL OR e.event_type_key = v_return_key AS is_return
        FROM analytics.event_keys AS e
        WHERE e.user_key = ANY (p_users) AND e.user_key <> 0
            AND (p_account = 0 OR e.account_key = p_account)
            AND (v_filter IS NULL OR e.properties @> v_filter)
    ),
    cohorts AS (
        SELECT d.user_key, d.number, min(d.occurred_at) AS first_at,
            min(d.number) OVER (PARTITION BY d.user_key) AS first_number
        FROM deeds AS d
        WHERE d.is_start
        GROUP BY d.user_key, d.number
    )
    SELECT c.user_key, v_days[c.number], k.number, d.event_id, d.occurred_at
    FROM cohorts AS c
    JOIN deeds AS d ON d.user_key = c.user_key AND d.number >= c.number
    CROSS JOIN LATERAL (
        SELECT -1 AS number
        WHERE d.is_start AND d.number = c.number
            AND (v_is_recurring OR d.occurred_at = c.first_at)
        UNION ALL
        SELECT k.number
        FROM generate_series(
            CASE WHEN v_is_on THEN d.number - c.number ELSE 0 END,
            least(d.number - c.number, (p_definition ->> 'periods')::integer)
        ) AS k (number)
        WHERE d.is_return AND (d.number > c.number OR d.occurred_at >= c.first_at)
    ) AS k
    WHERE v_is_recurring OR c.number = c.first_number;
END
$$;
COMMENT ON FUNCTION analytics._retention_evidence(jsonb, bigint, bigint[]) IS
    'The events of users by which a retention counts them, in which cohort and period; period -1: '
    'those by which they are in the cohort. p_account: 0 all. The rule is that of '
    'analytics._retention_cohorts.';

CREATE FUNCTION analytics._retention_rule(p_definition jsonb, p_period integer)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_kind text := p_definition ->> 'period_kind';
    v_start text := coalesce(p_definition ->> 'start_event', 'of any type');
    v_return text := coalesce(p_definition ->> 'return_event', 'of any type');
    v_where text := coalesce(
        ' with properties ' || nullif(p_definition ->> 'properties_filter', 'null'), '');
    v_is_on boolean := p_definition ->> 'mode' = 'on';
BEGIN
    RETURN CASE
        WHEN p_period < 0 AND p_definition ->> 'cohort_kind' = 'first' THEN format(
            'A user is in the cohort of the %s of his first event %s%s ever.',
            v_kind, v_start, v_where)
        WHEN p_period < 0 THEN format(
            'A user is in the cohort of each %s with an event %s%s.', v_kind, v_start, v_where)
        WHEN p_period = 0 AND v_is_on THEN format(
            'A user of the cohort counts once if he has an event %s%s in its %s, at or after his '
            'start.', v_return, v_where, v_kind)
        WHEN v_is_on THEN format(
            'A user of the cohort counts once if he has an event %s%s in the %s that is %s after '
            'its own.', v_return, v_where, v_kind, p_period)
        ELSE format(
            'A user of the cohort counts once if he has an event %s%s in the %s that is %s after '
            'its own, or later, and not before his start.', v_return, v_where, v_kind, p_period)
    END;
END
$$;
COMMENT ON FUNCTION analytics._retention_rule(jsonb, integer) IS
    'By what a retention counts a user in a period, or, for -1, in a cohort, in words.';

CREATE FUNCTION analytics._served_definition(p_kind text, p_name text)
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definition jsonb := (
        SELECT report.definition FROM analytics.served_reports AS report
        WHERE report.kind = p_kind AND report.name = p_name
    );
BEGIN
    IF v_definition IS NULL THEN
        PERFORM spectrum._reject(
            'p_cell.' || p_kind, p_name, format('the name of a standing %s', p_kind)
        );
    END IF;
    RETURN v_definition;
END
$$;
COMMENT ON FUNCTION analytics._served_definition(text, text) IS
    'The definition that a standing view shows; raises 22023 where there is none of the name.';

CREATE FUNCTION analytics._trace_retention_cohorts(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(
        p_cell, '{retention, cohort, period}', '{users, cohort_size}');
    v_cohort date := analytics._cell_day(v_cell, 'cohort');
    v_period integer := CASE v_cell ->> 'measure'
        WHEN 'users' THEN analytics._cell_number(v_cell, 'period') ELSE -1 END;
    v_account bigint := analytics._cell_account(v_cell);
    v_definition jsonb := analytics._served_definition('retention', v_cell ->> 'retention');
    v_start_key integer := analytics._event_key(v_definition ->> 'start_event');
    r_days record := analytics._days_between(v_cohort, (
        v_cohort + ('1 ' || (v_definition ->> 'period_kind'))::interval - interval '1 day')::date);
BEGIN
    RETURN QUERY
    SELECT analytics._retention_rule(v_definition, v_period), NULL, NULL::numeric,
        found.user_key, found.event_id, found.occurred_at
    FROM analytics._retention_evidence(v_definition, v_account, ARRAY(
        SELECT DISTINCT e.user_key FROM analytics.event_keys AS e
        WHERE e.occurred_at >= r_days.since AND e.occurred_at < r_days.until
            AND (v_start_key IS NULL OR e.event_type_key = v_start_key)
            AND (v_account = 0 OR e.account_key = v_account)
    )) AS found
    WHERE found.cohort = v_cohort AND found.period = v_period;
END
$$;
COMMENT ON FUNCTION analytics._trace_retention_cohorts(jsonb) IS
    'See analytics.trace: events behind a cell of retention_cohorts.';

CREATE FUNCTION analytics._cells_retention_cohorts(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A row that is shown holds both numbers: the size of its cohort stands in each period.
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'retention', report.name,
            'cohort', found.cohort, 'period', shown.period,
            'measure', CASE WHEN found.period < 0 THEN 'cohort_size' ELSE 'users' END),
        analytics._retention_rule(report.definition, found.period)
    FROM analytics.served_reports AS report
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._retention_evidence(
        report.definition, scope.account_key, ARRAY[p_user]
    ) AS found
    JOIN analytics.retention_cohorts AS shown
        ON shown.account_id = scope.account_id AND shown.retention = report.name
            AND shown.cohort = found.cohort
            AND (found.period < 0 OR shown.period = found.period)
    WHERE report.kind = 'retention' AND found.occurred_at = p_at AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_retention_cohorts(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of retention_cohorts that count an event.';
-- Room 72, glass of the funnels: which events are the steps of the entries that count.

CREATE FUNCTION analytics._funnel_step_events(
    p_definition jsonb,
    p_account bigint,
    p_units bigint[],
    p_sessions timestamptz[],
    p_numbers integer[],
    p_times timestamptz[]
)
RETURNS TABLE (
    unit bigint,
    session_start timestamptz,
    number integer,
    user_key bigint,
    user_id text,
    account_id text,
    event_id uuid,
    occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_by_account boolean := p_definition ->> 'unit' = 'account';
    v_is_any boolean := p_definition ->> 'step_order' = 'any';
    v_first timestamptz := (SELECT min(t.at) FROM unnest(p_times) AS t (at));
    v_last timestamptz := (SELECT max(t.at) FROM unnest(p_times) AS t (at));
    r_masks record := analytics._funnel_masks(p_definition -> 'steps', NULL);
BEGIN
    RETURN QUERY
    SELECT f.unit, f.session_start, f.number, f.user_key, f.user_id, f.account_id, f.event_id,
        f.occurred_at
    FROM (
        SELECT s.unit, s.session_start, s.number, e.user_key, e.user_id, e.account_id, e.event_id,
            e.occurred_at,
            row_number() OVER (
                PARTITION BY s.unit, s.session_start, s.number ORDER BY e.event_id
            ) AS tie
        FROM unnest(p_units, p_sessions, p_numbers, p_times)
            AS s (unit, session_start, number, at)
        JOIN analytics.events AS e ON e.occurred_at = s.at
            AND CASE WHEN v_by_account THEN e.account_key ELSE e.user_key END = s.unit
        WHERE e.occurred_at BETWEEN v_first AND v_last AND e.user_key <> 0
            AND e.event_type_key = ANY (r_masks.keys)
            AND (v_by_account OR e.user_key = ANY (p_units))
            AND (p_account = 0 OR e.account_key = p_account)
            AND EXISTS (
                SELECT FROM unnest(r_masks.keys, r_masks.filters, r_masks.bits)
                    AS m (key, filter, bits)
                WHERE m.key = e.event_type_key
                    AND (m.filter IS NULL OR e.properties @> m.filter)
                    AND (v_is_any OR m.bits & (1 << (s.number - 1)) <> 0)
            )
    ) AS f
    -- In order, of several events of one step at one time any could stand for it.
    WHERE v_is_any OR f.tie = 1;
END
$$;
COMMENT ON FUNCTION analytics._funnel_step_events(
    jsonb, bigint, bigint[], timestamptz[], integer[], timestamptz[]
) IS
    'The events that are the steps of entries, given by unit, session, number and time of each '
    'step. p_account: whose events count, 0 all.';

CREATE FUNCTION analytics._funnel_rule(p_definition jsonb, p_step integer)
RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_step jsonb := p_definition -> 'steps' -> (p_step - 1);
    v_unit text := CASE p_definition ->> 'unit' WHEN 'account' THEN 'An account'
        WHEN 'session' THEN 'A session' ELSE 'A user' END;
BEGIN
    RETURN format('%s counts once if its %s reached step %s%s: %s, within %s of step 1%s.',
        v_unit,
        CASE p_definition ->> 'entry' WHEN 'first' THEN 'first entry' ELSE 'longest entry' END,
        p_step,
        CASE WHEN p_definition ->> 'step_order' <> 'any'
            THEN format(' (%s)', coalesce(v_step ->> 'event', v_step #>> '{}')) ELSE '' END,
        CASE p_definition ->> 'step_order'
            WHEN 'any' THEN 'as many of the steps, in any order'
            WHEN 'strict' THEN 'the steps in order and nothing between'
            ELSE 'the steps in order'
        END,
        p_definition ->> 'time_window',
        CASE WHEN coalesce(nullif(p_definition -> 'exclusions', 'null'), '[]') <> '[]'
            THEN ', without ' || (p_definition ->> 'exclusions') || ' in between' ELSE '' END);
END
$$;
COMMENT ON FUNCTION analytics._funnel_rule(jsonb, integer) IS
    'By what a funnel counts a unit in a step, in words.';

CREATE FUNCTION analytics._funnel_step_trace(
    p_cell jsonb, p_day date, p_breakdown text, p_has_breakdown boolean
)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definition jsonb := analytics._served_definition('funnel', p_cell ->> 'funnel');
    v_step integer := analytics._cell_number(p_cell, 'step');
    r_funnel record;
    r_days record := analytics._days_between(p_day, p_day);
BEGIN
    SELECT f.* INTO r_funnel
    FROM jsonb_to_record(v_definition) AS f (
        steps jsonb, time_window interval, step_order text, entry text, unit text,
        breakdown text, attribution text, exclusions jsonb
    );
    RETURN QUERY
    SELECT analytics._funnel_rule(v_definition, v_step),
        CASE r_funnel.unit
            WHEN 'account' THEN did.account_id
            WHEN 'session' THEN did.user_id || ' from '
                || to_char(did.session_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')
        END,
        NULL::numeric, did.user_key, did.event_id, did.occurred_at
    FROM (
        SELECT array_agg(e.unit) AS units, array_agg(e.session_start) AS sessions,
            array_agg(s.number) AS numbers, array_agg(e.step_times[s.number]) AS times
        FROM analytics._funnel_entries(
            r_funnel.steps, NULL, NULL, r_funnel.time_window, r_funnel.step_order, r_funnel.entry,
            r_funnel.unit, nullif(p_cell ->> 'account_id', '*'),
            CASE WHEN p_has_breakdown THEN r_funnel.breakdown END, r_funnel.attribution,
            r_funnel.exclusions, false
        ) AS e
        CROSS JOIN LATERAL generate_series(1, v_step) AS s (number)
        WHERE cardinality(e.step_times) >= v_step
            AND (p_day IS NULL
                OR (e.step_times[1] >= r_days.since AND e.step_times[1] < r_days.until))
            AND (NOT p_has_breakdown OR coalesce(e.breakdown, '') = coalesce(p_breakdown, ''))
    ) AS entries
    CROSS JOIN LATERAL analytics._funnel_step_events(
        v_definition, analytics._cell_account(p_cell), entries.units, entries.sessions,
        entries.numbers, entries.times
    ) AS did;
END
$$;
COMMENT ON FUNCTION analytics._funnel_step_trace(jsonb, date, text, boolean) IS
    'The events by which units count in a step of a standing funnel: of those that entered on a '
    'day, or of those with a value of the breakdown.';

CREATE FUNCTION analytics._trace_conversion_funnels(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{funnel, step}', '{users}', '{breakdown}');
BEGIN
    RETURN QUERY
    SELECT * FROM analytics._funnel_step_trace(v_cell, NULL, v_cell ->> 'breakdown', true);
END
$$;
COMMENT ON FUNCTION analytics._trace_conversion_funnels(jsonb) IS
    'See analytics.trace: events behind a cell of conversion_funnels.';

CREATE FUNCTION analytics._trace_funnel_days(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{funnel, day, step}', '{users}');
    v_day date := analytics._cell_day(v_cell, 'day');
BEGIN
    RETURN QUERY
    SELECT format('%s Its step 1 was on %s.', found.rule, v_day), found.unit, found.amount,
        found.user_key, found.event_id, found.occurred_at
    FROM analytics._funnel_step_trace(v_cell, v_day, NULL, false) AS found;
END
$$;
COMMENT ON FUNCTION analytics._trace_funnel_days(jsonb) IS
    'See analytics.trace: events behind a cell of funnel_days.';

CREATE FUNCTION analytics._funnel_cells(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (
    account_id text,
    funnel text,
    breakdown text,
    entered_at timestamptz,
    step integer,
    rule text
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_account bigint := (
        SELECT e.account_key FROM analytics.event_keys AS e
        WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
    );
BEGIN
    -- The counted entry of a unit is kept, so that only one need be looked at.
    RETURN QUERY
    SELECT scope.account_id, report.name, entry.breakdown, entry.step_times[1], reached.step,
        analytics._funnel_rule(report.definition, reached.step)
    FROM spectrum.reports AS report
    JOIN spectrum.rollup_funnel_entries AS entry ON entry.report_id = report.report_id
        AND entry.unit
            = CASE report.definition ->> 'unit' WHEN 'account' THEN v_account ELSE p_user END
    CROSS JOIN LATERAL (
        SELECT ARRAY[cardinality(entry.step_times)] AS steps,
            ARRAY(SELECT generate_series(1, cardinality(entry.step_times))) AS numbers
    ) AS walked
    CROSS JOIN LATERAL (
        SELECT min(did.number) AS number
        FROM analytics._funnel_step_events(
            report.definition, greatest(0, -entry.scope), array_fill(entry.unit, walked.steps),
            array_fill(entry.session_start, walked.steps), walked.numbers, entry.step_times
        ) AS did
        WHERE did.event_id = p_event
    ) AS filled
    CROSS JOIN LATERAL generate_series(filled.number, cardinality(entry.step_times))
        AS reached (step)
    CROSS JOIN LATERAL (
        SELECT '*' AS account_id WHERE entry.scope >= 0
        UNION ALL
        SELECT known.account_id FROM analytics.accounts AS known
        WHERE known.account_key = abs(entry.scope)
    ) AS scope
    WHERE report.kind = 'funnel' AND report.state = 'served' AND p_user <> 0
        AND p_at = ANY (entry.step_times);
END
$$;
COMMENT ON FUNCTION analytics._funnel_cells(bigint, timestamptz, uuid) IS
    'The steps of standing funnels in which an event makes its unit count.';

CREATE FUNCTION analytics._cells_conversion_funnels(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', c.account_id, 'funnel', c.funnel, 'step', c.step,
            'breakdown', nullif(c.breakdown, ''), 'measure', 'users'),
        c.rule
    FROM analytics._funnel_cells(p_user, p_at, p_event) AS c
    GROUP BY 1, 2;
END
$$;
COMMENT ON FUNCTION analytics._cells_conversion_funnels(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of conversion_funnels that count an event.';

CREATE FUNCTION analytics._cells_funnel_days(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', c.account_id, 'funnel', c.funnel,
            'day', d.day, 'step', c.step, 'measure', 'users'),
        format('%s Its step 1 was on %s.', c.rule, d.day)
    FROM analytics._funnel_cells(p_user, p_at, p_event) AS c
    CROSS JOIN LATERAL (SELECT analytics._day_of(c.entered_at) AS day) AS d
    GROUP BY 1, 2;
END
$$;
COMMENT ON FUNCTION analytics._cells_funnel_days(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of funnel_days that count an event.';
-- Room 72, glass of the experiments: which exposures make a user a unit, and what he did since.

CREATE FUNCTION analytics._experiment_evidence(
    p_plan analytics._experiment_plan,
    p_account text,
    p_users bigint[]
)
RETURNS TABLE (
    measure text,
    metric text,
    variant text,
    user_key bigint,
    event_id uuid,
    occurred_at timestamptz,
    amount numeric
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT * FROM analytics._experiment_units(p_plan, p_account, false, p_users)
    ),
    exposures AS (
        SELECT u.user_key, u.variant, e.event_id, e.occurred_at,
            row_number() OVER (PARTITION BY u.user_key ORDER BY e.occurred_at, e.event_id)
                AS number
        FROM units AS u
        JOIN analytics.event_keys AS e ON e.user_key = u.user_key
            AND e.occurred_at >= u.exposed_at
            AND (u.account_key = 0 OR e.account_key = u.account_key)
        JOIN analytics._exposure_types() AS t ON t.event_type_key = e.event_type_key
        WHERE e.properties ->> t.flag_property = p_plan.experiment
            AND e.properties ->> t.variant_property <> ''
            AND (p_plan.ends_at IS NULL OR e.occurred_at < p_plan.ends_at)
    )
    SELECT 'units', NULL, x.variant, x.user_key, x.event_id, x.occurred_at, NULL::numeric
    FROM exposures AS x
    WHERE x.variant IS NOT NULL AND x.number = 1
    UNION ALL
    SELECT 'excluded_units', NULL, NULL, x.user_key, x.event_id, x.occurred_at, NULL
    FROM exposures AS x
    WHERE x.variant IS NULL
    UNION ALL
    SELECT m.measure, did.metric, u.variant, did.user_key, did.event_id, did.occurred_at,
        CASE WHEN m.measure = 'value' THEN did.amount END
    FROM (
        SELECT array_agg(u.user_key) AS users, array_agg(u.account_key) AS accounts,
            array_agg(u.exposed_at) AS exposed_ats, array_agg('infinity'::timestamptz) AS untils
        FROM units AS u
        WHERE u.variant IS NOT NULL
    ) AS counted
    CROSS JOIN LATERAL analytics._experiment_happenings(
        p_plan, counted.users, counted.accounts, counted.exposed_ats, counted.exposed_ats,
        counted.untils
    ) AS did
    JOIN units AS u ON u.user_key = did.user_key
    CROSS JOIN (VALUES ('conversions'), ('value')) AS m (measure)
    WHERE did.is_upper;
END
$$;
COMMENT ON FUNCTION analytics._experiment_evidence(
    analytics._experiment_plan, text, bigint[]
) IS
    'The events of users (NULL: all) by which an experiment counts them: of a unit its first '
    'exposure, of one that is left out all of them, and what was done of each metric since.';

CREATE FUNCTION analytics._experiment_rule(
    p_plan analytics._experiment_plan, p_measure text, p_metric text
)
RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_metric text := (
        SELECT format('event %s%s, from his first exposure on%s', m.event_type,
            coalesce(' with properties ' || m.properties_filter::text, ''),
            CASE
                WHEN m.time_window IS NOT NULL THEN ' for ' || m.time_window::text
                WHEN p_plan.ends_at IS NOT NULL THEN ' until the end of the experiment'
                ELSE ''
            END)
        FROM analytics._measures(p_plan.measures) AS m
        WHERE m.metric = p_metric
    );
BEGIN
    RETURN CASE p_measure
        WHEN 'units' THEN 'A user counts once, from his first exposure on, for the one planned '
            'variant that he saw.'
        WHEN 'excluded_units' THEN 'A user is left out who saw several variants, or one that is '
            'not planned.'
        WHEN 'conversions' THEN format('A unit counts once if it has any %s.', v_metric)
        ELSE format('The sum, by unit, of what each %s adds%s.', v_metric,
            CASE WHEN p_plan.winsorize IS NOT NULL THEN ' (the value cuts the sums of units at '
                'percentiles)' ELSE '' END)
    END;
END
$$;
COMMENT ON FUNCTION analytics._experiment_rule(
    analytics._experiment_plan, text, text
) IS
    'By what an experiment counts, in words.';

CREATE FUNCTION analytics._trace_experiment_results(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{experiment, metric, variant}',
        '{units, excluded_units, conversions, value}');
    v_definition jsonb := analytics._served_definition('experiment', v_cell ->> 'experiment');
    v_measure text := v_cell ->> 'measure';
    r_plan analytics._experiment_plan;
BEGIN
    r_plan := jsonb_populate_record(NULL::analytics._experiment_plan, v_definition);
    RETURN QUERY
    SELECT analytics._experiment_rule(r_plan, v_measure, v_cell ->> 'metric'), NULL, found.amount,
        found.user_key, found.event_id, found.occurred_at
    FROM analytics._experiment_evidence(
        r_plan, nullif(v_cell ->> 'account_id', '*'), NULL
    ) AS found
    WHERE found.measure = v_measure
        AND (found.metric IS NULL OR found.metric = v_cell ->> 'metric')
        AND (found.variant IS NULL OR found.variant = v_cell ->> 'variant');
END
$$;
COMMENT ON FUNCTION analytics._trace_experiment_results(jsonb) IS
    'See analytics.trace: events behind a cell of experiment_results.';

CREATE FUNCTION analytics._cells_experiment_results(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'experiment', known.name,
            'metric', metric.name, 'variant', variant.name, 'measure', found.measure),
        analytics._experiment_rule(known.plan, found.measure, metric.name)
    FROM (
        SELECT report.name,
            jsonb_populate_record(NULL::analytics._experiment_plan, report.definition) AS plan
        FROM analytics.served_reports AS report
        WHERE report.kind = 'experiment'
    ) AS known
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._experiment_evidence(
        known.plan, nullif(scope.account_id, '*'), ARRAY[p_user]
    ) AS found
    -- Units stand beside each metric, those left out beside each variant too.
    JOIN LATERAL unnest((known.plan).metrics) AS metric (name)
        ON found.metric IS NULL OR found.metric = metric.name
    JOIN LATERAL jsonb_object_keys((known.plan).variants) AS variant (name)
        ON found.variant IS NULL OR found.variant = variant.name
    WHERE p_user <> 0 AND found.occurred_at = p_at AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_experiment_results(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of experiment_results that count an event.';
-- Room 72, glass of the sessions: which events a session is made of, and what it counts under.

CREATE FUNCTION analytics._session_values(
    p_breakdowns text[],
    p_account text,
    p_from timestamptz,
    p_to timestamptz,
    p_user bigint
)
RETURNS TABLE (
    user_key bigint, started_at timestamptz, ended_at timestamptz, is_bounce boolean,
    breakdown text, value text
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    -- What touched a session may lie 30 days before it.
    v_from timestamptz := CASE
        WHEN p_breakdowns && '{first_touch, last_touch}' THEN p_from - interval '720 hours'
        ELSE p_from
    END;
    v_parts text[] := '{pages, touches, places}'::text[];
BEGIN
    RETURN QUERY
    WITH visits AS (
        SELECT s.*, array_agg(analytics._channel(s.touch)) FILTER (WHERE s.touch IS NOT NULL) OVER (
                PARTITION BY s.user_key ORDER BY s.started_at
                RANGE BETWEEN interval '720 hours' PRECEDING AND CURRENT ROW
            ) AS channels
        FROM (
            SELECT cut.*
            FROM analytics._sessions_between(v_from, p_to, p_account, v_parts) AS cut
            WHERE p_user IS NULL
            UNION ALL
            SELECT cut.*
            FROM analytics._sessions(
                NULL, NULL, ARRAY[p_user], NULL, '{-infinity}', '{infinity}', p_account, v_parts
            ) AS cut
            WHERE p_user IS NOT NULL
        ) AS s
    )
    SELECT v.user_key, v.started_at, v.ended_at, v.is_bounce, label.breakdown,
        CASE label.breakdown
            WHEN 'first_touch' THEN coalesce(v.channels[1], 'direct')
            WHEN 'last_touch' THEN coalesce(v.channels[cardinality(v.channels)], 'direct')
            ELSE analytics._session_label(
                label.breakdown, v.touch, v.place, v.entry_page, v.exit_page
            )
        END
    FROM visits AS v
    CROSS JOIN unnest(p_breakdowns) AS label (breakdown)
    WHERE v.started_at >= p_from AND v.started_at < p_to;
END
$$;
COMMENT ON FUNCTION analytics._session_values(text[], text, timestamptz, timestamptz, bigint) IS
    'The sessions that begin in [p_from, p_to), of one user or (NULL) of all, cut from the events '
    'of one account or (NULL) of all, with what they count under in some breakdowns. The rule is '
    'that of sessions_daily.';

CREATE FUNCTION analytics._session_breakdowns()
RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT '{all, country, region, city, entry_page, exit_page, utm_source, utm_medium, '
        'utm_campaign, channel, first_touch, last_touch}'::text[]
$$;
COMMENT ON FUNCTION analytics._session_breakdowns() IS 'The breakdowns of sessions_daily.';

CREATE FUNCTION analytics._session_measures(
    p_event text, p_event_type text, p_user_id text, p_started_at timestamptz, p_is_bounce boolean
)
RETURNS TABLE (measure text, unit text, rule text)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 4
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_session text := format('%s %s', p_user_id, p_started_at);
BEGIN
    RETURN QUERY
    SELECT m.measure, m.unit, m.rule
    FROM (
        VALUES
            ('sessions', v_session, 'a session counts once', true),
            ('users', p_user_id, 'a user counts once who has such a session', true),
            ('bounces', v_session, 'a session counts once that has one page view or, where it has '
                'none, one event', p_is_bounce),
            ('events', p_event, 'each event of a session counts', true),
            ('page_views', p_event, 'each page_view or $pageview of a session counts',
                p_event_type IN ('page_view', '$pageview'))
    ) AS m (measure, unit, rule, counts)
    WHERE m.counts;
END
$$;
COMMENT ON FUNCTION analytics._session_measures(text, text, text, timestamptz, boolean) IS
    'The measures of sessions_daily that an event of a session counts in, what it makes count, and '
    'how.';

CREATE FUNCTION analytics._session_rule(p_breakdown text, p_value text, p_day date, p_rule text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('Sessions that begin on %s%s: %s. A session ends after 30 minutes without an '
        'event of its user, or after 24 hours; unknown users have none.', p_day,
        CASE WHEN p_breakdown <> 'all' THEN
            format(', whose %s is %s', p_breakdown, coalesce(p_value, 'unknown'))
        ELSE '' END,
        p_rule);
END
$$;
COMMENT ON FUNCTION analytics._session_rule(text, text, date, text) IS
    'By what sessions_daily counts, in words.';

CREATE FUNCTION analytics._trace_sessions_daily(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day, breakdown}',
        '{sessions, users, bounces, events, page_views}', '{value}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account text := nullif(v_cell ->> 'account_id', '*');
    v_breakdown text := v_cell ->> 'breakdown';
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    PERFORM spectrum._check_choice(
        'p_cell.breakdown', v_breakdown, analytics._session_breakdowns()
    );
    RETURN QUERY
    SELECT analytics._session_rule(v_breakdown, v_cell ->> 'value', v_day, measures.rule),
        measures.unit, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics._session_values(
        ARRAY[v_breakdown], v_account, r_days.since, r_days.until, NULL
    ) AS s
    JOIN analytics.events AS e ON e.user_key = s.user_key
        AND e.occurred_at >= s.started_at AND e.occurred_at <= s.ended_at
    CROSS JOIN LATERAL analytics._session_measures(
        e.event_id::text, e.event_type, e.user_id, s.started_at, s.is_bounce
    ) AS measures
    WHERE s.value IS NOT DISTINCT FROM v_cell ->> 'value'
        -- A session begun on the day is over a day after it.
        AND e.occurred_at >= r_days.since
        AND e.occurred_at < r_days.until + interval '25 hours'
        AND (v_account IS NULL OR e.account_id = v_account)
        AND measures.measure = v_cell ->> 'measure';
END
$$;
COMMENT ON FUNCTION analytics._trace_sessions_daily(jsonb) IS
    'See analytics.trace: events behind a cell of sessions_daily.';

CREATE FUNCTION analytics._cells_sessions_daily(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_strip_nulls(jsonb_build_object('account_id', scope.account_id, 'day', d.day,
            'breakdown', s.breakdown, 'value', s.value, 'measure', measures.measure)),
        analytics._session_rule(s.breakdown, s.value, d.day, measures.rule)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._session_values(
        analytics._session_breakdowns(), nullif(scope.account_id, '*'), '-infinity', 'infinity',
        p_user
    ) AS s
    JOIN analytics.events AS e
        ON e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
    CROSS JOIN LATERAL (SELECT analytics._day_of(s.started_at) AS day OFFSET 0) AS d
    CROSS JOIN LATERAL analytics._session_measures(
        p_event::text, e.event_type, e.user_id, s.started_at, s.is_bounce
    ) AS measures
    WHERE p_user <> 0 AND p_at >= s.started_at AND p_at <= s.ended_at;
END
$$;
COMMENT ON FUNCTION analytics._cells_sessions_daily(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of sessions_daily that count an event.';
-- Room 72, glass of recurring revenue: which events moved the MRR of an account, and how. Before it
-- the periods of cells, which other views have too.

CREATE FUNCTION analytics._cell_period(
    p_cell jsonb, p_key text, p_kind text, OUT since timestamptz, OUT until timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_day date := analytics._cell_day(p_cell, p_key);
    v_starts timestamptz[];
BEGIN
    since := (analytics._days_between(v_day, v_day)).since;
    v_starts := spectrum.period_starts(p_kind, since, since + interval '1 us');
    IF spectrum.period_date(v_starts[1]) <> v_day THEN
        PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key,
            format('the first day of a %s', p_kind));
    END IF;
    until := v_starts[2];
END
$$;
COMMENT ON FUNCTION analytics._cell_period(jsonb, text, text) IS
    'When the day, week or month begins and ends that a key of a cell names; raises 22023 unless '
    'it is the first day of one.';

CREATE FUNCTION analytics._cell_period_kind(p_cell jsonb, p_kinds text[])
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_cell.period_kind', p_cell ->> 'period_kind', p_kinds);
    RETURN p_cell ->> 'period_kind';
END
$$;
COMMENT ON FUNCTION analytics._cell_period_kind(jsonb, text[]) IS
    'The kind of period that a cell names; raises 22023 unless it is one of these.';

CREATE FUNCTION analytics._mrr_evidence(p_account bigint)
RETURNS TABLE (
    account_key bigint, currency text, moved_at timestamptz, movement text, change numeric,
    user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_currency text := (SELECT s.currency FROM analytics.settings AS s);
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN (
            'subscription_started', 'subscription_changed', 'subscription_cancelled'
        )
    );
BEGIN
    RETURN QUERY
    WITH told AS MATERIALIZED (
        SELECT e.account_key, e.user_key, e.event_id, e.occurred_at, r.place, r.subscription,
            r.mrr, r.currency
        FROM analytics.events AS e
        CROSS JOIN LATERAL analytics._read_subscription(
            e.event_type, e.properties, v_currency
        ) AS r
        WHERE e.event_type_key = ANY (v_keys) AND e.account_key <> 0 AND r.problem IS NULL
            AND (p_account = 0 OR e.account_key = p_account)
    ),
    movements AS (
        SELECT m.*
        FROM (
            SELECT array_agg(t.account_key) AS account_keys, array_agg(t.occurred_at) AS times,
                array_agg(t.place) AS places, array_agg(t.event_id) AS event_ids,
                array_agg(t.subscription) AS subscriptions, array_agg(t.mrr) AS mrr,
                array_agg(t.currency) AS currencies
            FROM told AS t
        ) AS h
        CROSS JOIN LATERAL analytics._mrr_movements(
            h.account_keys, h.times, h.places, h.event_ids, h.subscriptions, h.mrr, h.currencies
        ) AS m
    ),
    changes AS (
        SELECT s.account_key, c.currency, s.user_key, s.event_id, s.occurred_at,
            sum(c.change) AS change
        FROM (
            SELECT t.*, lag(t.mrr) OVER subscriptions AS mrr_before,
                lag(t.currency) OVER subscriptions AS currency_before
            FROM told AS t
            WINDOW subscriptions AS (
                PARTITION BY t.account_key, t.subscription
                ORDER BY t.occurred_at, t.place, t.event_id
            )
        ) AS s
        CROSS JOIN LATERAL (
            VALUES (s.currency, s.mrr), (s.currency_before, -s.mrr_before)
        ) AS c (currency, change)
        WHERE c.change <> 0
        GROUP BY s.account_key, c.currency, s.user_key, s.event_id, s.occurred_at
        HAVING sum(c.change) <> 0
    )
    SELECT m.account_key, m.currency, m.moved_at, m.movement, c.change, c.user_key, c.event_id,
        c.occurred_at
    FROM movements AS m
    JOIN changes AS c ON c.account_key = m.account_key AND c.currency = m.currency
        AND c.occurred_at >= m.moved_at
        AND c.occurred_at < m.moved_at + interval '60 minutes';
END
$$;
COMMENT ON FUNCTION analytics._mrr_evidence(bigint) IS
    'The events of an account (0: of all) that moved its MRR, by how much each, and the movement '
    'that they are part of. The rule is that of analytics._mrr_movements.';

CREATE FUNCTION analytics._mrr_measures(
    p_movement text, p_change numeric, p_account_id text, p_moved_at timestamptz
)
RETURNS TABLE (measure text, unit text, amount numeric, rule text)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 2
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_what text := CASE p_movement
        WHEN 'new' THEN 'the first MRR that an account ever has'
        WHEN 'expansion' THEN 'by what the MRR of an account grows'
        WHEN 'contraction' THEN 'by what the MRR of an account shrinks, but not to nothing'
        WHEN 'churn' THEN 'the MRR that an account has no more, when it comes to nothing'
        ELSE 'the MRR of an account that had none any more'
    END;
BEGIN
    RETURN QUERY
    SELECT p_movement, p_account_id,
        CASE WHEN p_movement IN ('contraction', 'churn') THEN -p_change ELSE p_change END,
        format('%s; the amounts of its events add up', v_what)
    UNION ALL
    SELECT m.measure, format('%s %s', p_account_id, p_moved_at), NULL,
        format('each time counts: %s', v_what)
    FROM (
        VALUES ('new', 'new_accounts'), ('churn', 'churned_accounts'),
            ('reactivation', 'reactivated_accounts')
    ) AS m (movement, measure)
    WHERE m.movement = p_movement;
END
$$;
COMMENT ON FUNCTION analytics._mrr_measures(text, numeric, text, timestamptz) IS
    'The measures of mrr_movements that an event of a movement counts in, what it makes count, '
    'what it adds, and how.';

CREATE FUNCTION analytics._mrr_rule(
    p_rule text, p_kind text, p_period date, p_currency text
)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('Movements in %s that begin in the %s of %s: %s. What changes within 60 minutes '
        'of the first change is one movement.', p_currency, p_kind, p_period, p_rule);
END
$$;
COMMENT ON FUNCTION analytics._mrr_rule(text, text, date, text) IS
    'By what mrr_movements counts, in words.';

CREATE FUNCTION analytics._trace_mrr_movements(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{period_kind, period, currency}',
        '{new, expansion, contraction, churn, reactivation, new_accounts, churned_accounts, '
        'reactivated_accounts}');
    v_kind text := analytics._cell_period_kind(v_cell, '{week, month}');
    r_period record := analytics._cell_period(v_cell, 'period', v_kind);
BEGIN
    RETURN QUERY
    SELECT analytics._mrr_rule(
            measures.rule, v_kind, (v_cell ->> 'period')::date, found.currency
        ),
        measures.unit, measures.amount, found.user_key, found.event_id, found.occurred_at
    FROM analytics._mrr_evidence(analytics._cell_account(v_cell)) AS found
    JOIN analytics.accounts AS known ON known.account_key = found.account_key
    CROSS JOIN LATERAL analytics._mrr_measures(
        found.movement, found.change, known.account_id, found.moved_at
    ) AS measures
    WHERE found.currency = v_cell ->> 'currency' AND found.moved_at >= r_period.since
        AND found.moved_at < r_period.until AND measures.measure = v_cell ->> 'measure';
END
$$;
COMMENT ON FUNCTION analytics._trace_mrr_movements(jsonb) IS
    'See analytics.trace: events behind a cell of mrr_movements.';

CREATE FUNCTION analytics._cells_mrr_movements(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'period_kind', kind.name,
            'period', p.period, 'currency', found.currency, 'measure', measures.measure),
        analytics._mrr_rule(measures.rule, kind.name, p.period, found.currency)
        || CASE WHEN measures.amount IS NOT NULL THEN format(' This adds %s.', measures.amount)
            ELSE '' END
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._mrr_evidence(e.account_key) AS found
    CROSS JOIN LATERAL analytics._mrr_measures(
        found.movement, found.change, e.account_id, found.moved_at
    ) AS measures
    CROSS JOIN (VALUES ('week'), ('month')) AS kind (name)
    CROSS JOIN LATERAL (
        SELECT spectrum.period_date(spectrum.period_start(kind.name, found.moved_at)) AS period
        OFFSET 0
    ) AS p
    CROSS JOIN LATERAL (VALUES ('*'), (e.account_id)) AS scope (account_id)
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
        AND e.account_key <> 0 AND e.event_type LIKE 'subscription\_%'
        AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_mrr_movements(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of mrr_movements that count an event.';
-- Room 72, glass of operations: requests, errors, and what came in.

CREATE FUNCTION analytics._request_measures(p_event_type text, p_properties jsonb)
RETURNS TABLE (
    view_name text, measure text, endpoint text, service text, version text, rule text
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE ROWS 5
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_is_request boolean := p_event_type IN ('request', 'api_request');
    v_is_error boolean := CASE jsonb_typeof(p_properties -> 'status')
        WHEN 'number' THEN (p_properties -> 'status')::numeric >= 500
        WHEN 'string' THEN analytics._text_number(p_properties ->> 'status') >= 500
    END IS TRUE OR p_properties -> 'error' = 'true';
    v_latency numeric := CASE jsonb_typeof(p_properties -> 'latency_ms')
        WHEN 'number' THEN (p_properties -> 'latency_ms')::numeric
        WHEN 'string' THEN analytics._text_number(p_properties ->> 'latency_ms')
    END;
    v_requests text := 'Each request or api_request counts';
    v_errors text := 'Each request or api_request counts whose status is 500 or more, or whose '
        'error is true';
BEGIN
    RETURN QUERY
    SELECT m.view_name, m.measure,
        CASE WHEN m.view_name = 'operations' THEN
            nullif(left(p_properties ->> 'endpoint', 200), '') END,
        CASE WHEN m.view_name <> 'operations' THEN
            nullif(left(p_properties ->> 'service', 200), '') END,
        CASE WHEN m.view_name <> 'operations' THEN
            nullif(left(p_properties ->> 'version', 200), '') END,
        m.rule
    FROM (
        VALUES
            ('operations', 'requests', v_requests, v_is_request),
            ('operations', 'errors', v_errors, v_is_request AND v_is_error),
            ('operations', 'measured', v_requests || ' whose latency_ms is a number from 0 to '
                'below 10^15', v_is_request AND v_latency >= 0 AND v_latency < 1e15),
            ('error_rates_daily', 'requests', v_requests, v_is_request),
            ('error_rates_daily', 'errors', v_errors, v_is_request AND v_is_error),
            ('error_rates_daily', 'error_events', 'Each event of type error counts',
                p_event_type = 'error')
    ) AS m (view_name, measure, rule, counts)
    WHERE m.counts;
END
$$;
COMMENT ON FUNCTION analytics._request_measures(text, jsonb) IS
    'The measures of operations and error_rates_daily that an event counts in, under which '
    'endpoint, or service and version, and how. Read as in analytics._request_counts.';

CREATE FUNCTION analytics._trace_requests(p_view text, p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_day date := analytics._cell_day(p_cell, 'day');
    v_account bigint := analytics._cell_account(p_cell);
    v_keys integer[] := ARRAY(
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type IN ('request', 'api_request', 'error')
    );
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    RETURN QUERY
    SELECT format('%s, on %s%s.', m.rule, v_day, analytics._cell_scope(p_cell)),
        e.event_id::text, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._request_measures(e.event_type, e.properties) AS m
    WHERE e.event_type_key = ANY (v_keys) AND e.occurred_at >= r_days.since
        AND e.occurred_at < r_days.until AND (v_account = 0 OR e.account_key = v_account)
        AND m.view_name = p_view AND m.measure = p_cell ->> 'measure'
        AND m.endpoint IS NOT DISTINCT FROM p_cell ->> 'endpoint'
        AND m.service IS NOT DISTINCT FROM p_cell ->> 'service'
        AND m.version IS NOT DISTINCT FROM p_cell ->> 'version';
END
$$;
COMMENT ON FUNCTION analytics._trace_requests(text, jsonb) IS
    'The events behind a cell of operations or error_rates_daily, which has been read.';

CREATE FUNCTION analytics._cells_requests(
    p_view text, p_user bigint, p_at timestamptz, p_event uuid
)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_strip_nulls(jsonb_build_object('account_id', scope.account_id,
            'day', analytics._day_of(p_at), 'endpoint', m.endpoint, 'service', m.service,
            'version', m.version, 'measure', m.measure)),
        m.rule || '.'
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._request_measures(e.event_type, e.properties) AS m
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
        AND m.view_name = p_view;
END
$$;
COMMENT ON FUNCTION analytics._cells_requests(text, bigint, timestamptz, uuid) IS
    'The cells of operations or error_rates_daily that count an event.';

CREATE FUNCTION analytics._trace_operations(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT found.* FROM analytics._trace_requests('operations', analytics._read_cell(
        p_cell, '{day}', '{requests, errors, measured}', '{endpoint}'
    )) AS found;
END
$$;
COMMENT ON FUNCTION analytics._trace_operations(jsonb) IS
    'See analytics.trace: events behind a cell of operations.';

CREATE FUNCTION analytics._cells_operations(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT c.cell, c.rule FROM analytics._cells_requests('operations', p_user, p_at, p_event) AS c;
END
$$;
COMMENT ON FUNCTION analytics._cells_operations(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of operations that count an event.';

CREATE FUNCTION analytics._trace_error_rates_daily(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT found.* FROM analytics._trace_requests('error_rates_daily', analytics._read_cell(
        p_cell, '{day}', '{errors, requests, error_events}', '{service, version}'
    )) AS found;
END
$$;
COMMENT ON FUNCTION analytics._trace_error_rates_daily(jsonb) IS
    'See analytics.trace: events behind a cell of error_rates_daily.';

CREATE FUNCTION analytics._cells_error_rates_daily(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT c.cell, c.rule
    FROM analytics._cells_requests('error_rates_daily', p_user, p_at, p_event) AS c;
END
$$;
COMMENT ON FUNCTION analytics._cells_error_rates_daily(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of error_rates_daily that count an event.';

CREATE FUNCTION analytics._cell_minute(p_cell jsonb)
RETURNS timestamptz
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO'
AS $$
DECLARE
    v_minute timestamptz;
BEGIN
    IF p_cell ->> 'minute' ~ ('^[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}(:00)?'
        '(Z|[+-][0-9]{2}(:?[0-9]{2})?)?$')
    THEN
        v_minute := (p_cell ->> 'minute')::timestamptz;
    ELSE
        PERFORM spectrum._reject('p_cell.minute', p_cell ->> 'minute',
            'the time at which a minute begins, such as 2026-03-01T10:00:00Z');
    END IF;
    RETURN v_minute;
EXCEPTION WHEN datetime_field_overflow OR invalid_time_zone_displacement_value THEN
    PERFORM spectrum._reject('p_cell.minute', p_cell ->> 'minute',
        'the time at which a minute begins, such as 2026-03-01T10:00:00Z');
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._cell_minute(jsonb) IS
    'The start of the minute that a cell names; raises 22023 unless it is one.';

CREATE FUNCTION analytics._trace_throughput_minutes(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{minute}', '{events}');
    v_minute timestamptz := analytics._cell_minute(v_cell);
    v_account bigint := analytics._cell_account(v_cell);
BEGIN
    RETURN QUERY
    SELECT format('Every event%s in the minute from %s counts once, also of unknown users.',
            analytics._cell_scope(v_cell), v_minute),
        e.event_id::text, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    WHERE e.occurred_at >= v_minute AND e.occurred_at < v_minute + interval '1 minute'
        AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_throughput_minutes(jsonb) IS
    'See analytics.trace: events behind a cell of throughput_minutes.';

CREATE FUNCTION analytics._cells_throughput_minutes(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_minute timestamptz := date_bin('1 minute', p_at, '2000-01-01 00:00+00');
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'minute', v_minute,
            'measure', 'events'),
        'An event of its minute, which is one of the last seven days.'
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE v_minute >= now() - interval '7 days';
END
$$;
COMMENT ON FUNCTION analytics._cells_throughput_minutes(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of throughput_minutes that count an event.';
-- Room 72, glass of activity by periods: what makes a user new, returning, resurrecting or dormant,
-- and on how many days he came.

CREATE FUNCTION analytics._trace_lifecycle_periods(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(
        p_cell, '{period_kind, period}', '{new, returning, resurrecting, dormant}');
    v_kind text := analytics._cell_period_kind(v_cell, '{day, week, month}');
    v_measure text := v_cell ->> 'measure';
    v_account bigint := analytics._cell_account(v_cell);
    r_period record := analytics._cell_period(v_cell, 'period', v_kind);
    v_before timestamptz := spectrum.period_start(v_kind, r_period.since - interval '1 us');
BEGIN
    RETURN QUERY
    WITH active AS (
        SELECT e.user_key, bool_or(e.occurred_at >= r_period.since) AS is_here,
            bool_or(e.occurred_at < r_period.since) AS was_before
        FROM analytics.event_keys AS e
        WHERE e.user_key <> 0 AND e.occurred_at >= v_before AND e.occurred_at < r_period.until
            AND (v_account = 0 OR e.account_key = v_account)
        GROUP BY e.user_key
    )
    SELECT analytics._lifecycle_words(v_measure, v_kind, (v_cell ->> 'period')::date), NULL,
        NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM active AS a
    JOIN analytics.event_keys AS e ON e.user_key = a.user_key
    WHERE v_measure = CASE
            WHEN NOT a.is_here THEN 'dormant'
            WHEN a.was_before THEN 'returning'
            WHEN EXISTS (
                SELECT FROM analytics.event_keys AS earlier
                WHERE earlier.user_key = a.user_key AND earlier.occurred_at < v_before
                    AND (v_account = 0 OR earlier.account_key = v_account)
            ) THEN 'resurrecting'
            ELSE 'new'
        END
        AND (v_account = 0 OR e.account_key = v_account)
        AND e.occurred_at >= v_before AND e.occurred_at < r_period.until;
END
$$;
COMMENT ON FUNCTION analytics._trace_lifecycle_periods(jsonb) IS
    'See analytics.trace: events behind a cell of lifecycle_periods.';

CREATE FUNCTION analytics._lifecycle_words(p_measure text, p_kind text, p_period date)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('A user counts once, for the %s of %s, if ', p_kind, p_period)
    || CASE p_measure
        WHEN 'new' THEN 'his first event ever is in it.'
        WHEN 'returning' THEN format('he has events in it and in the %s before.', p_kind)
        WHEN 'resurrecting' THEN format(
            'he has events in it, earlier ones too, but none in the %s before.', p_kind)
        ELSE format('he has events in the %s before and none in it; the view shows the number '
            'below zero.', p_kind)
    END;
END
$$;
COMMENT ON FUNCTION analytics._lifecycle_words(text, text, date) IS
    'By what lifecycle_periods counts a user, in words.';

CREATE FUNCTION analytics._cells_lifecycle_periods(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_last date := (
        SELECT max(shown.day) FROM analytics.daily_events AS shown WHERE shown.account_id = '*'
    );
BEGIN
    -- An event counts in its own period and in the next one. s.starts: of the period before, its
    -- own, the next, and the end of that.
    RETURN QUERY
    SELECT jsonb_build_object('account_id', f.account_id, 'period_kind', f.kind,
            'period', f.period, 'measure', f.measure),
        analytics._lifecycle_words(f.measure, f.kind, f.period)
    FROM (
        SELECT scope.account_id, kind.name AS kind, spectrum.period_date(s.starts[n.number])
                AS period,
            CASE
                WHEN NOT near.active[n.number] THEN 'dormant'
                WHEN near.active[n.number - 1] THEN 'returning'
                -- That of its own period tells also of what came before that.
                WHEN n.number = 2 AND EXISTS (
                    SELECT FROM analytics.event_keys AS earlier
                    WHERE earlier.user_key = p_user AND earlier.occurred_at < s.starts[1]
                        AND (scope.account_key = 0 OR earlier.account_key = scope.account_key)
                ) THEN 'resurrecting'
                ELSE 'new'
            END AS measure
        FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
        CROSS JOIN unnest('{day, week, month}'::text[]) AS kind (name)
        CROSS JOIN LATERAL (
            SELECT spectrum.period_starts(kind.name, p_at, p_at + interval '1 us') AS starts
            OFFSET 0
        ) AS own
        CROSS JOIN LATERAL (
            SELECT spectrum.period_starts(
                kind.name, own.starts[1] - interval '1 us', own.starts[2] + interval '1 us'
            ) AS starts
            OFFSET 0
        ) AS s
        CROSS JOIN LATERAL (
            SELECT array_agg(EXISTS (
                SELECT FROM analytics.event_keys AS e
                WHERE e.user_key = p_user AND e.occurred_at >= s.starts[p.number]
                    AND e.occurred_at < s.starts[p.number + 1]
                    AND (scope.account_key = 0 OR e.account_key = scope.account_key)
            ) ORDER BY p.number) AS active
            FROM generate_series(1, 3) AS p (number)
        ) AS near
        CROSS JOIN (VALUES (2), (3)) AS n (number)
    ) AS f
    WHERE p_user <> 0 AND f.period <= v_last;
END
$$;
COMMENT ON FUNCTION analytics._cells_lifecycle_periods(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of lifecycle_periods that count an event.';

CREATE FUNCTION analytics._stickiness_rule(
    p_measure text, p_kind text, p_period date, p_days integer
)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('A user counts once if he has events on %s %s of the days of the %s of %s.',
        CASE p_measure WHEN 'users_exactly' THEN 'exactly' ELSE 'at least' END, p_days, p_kind,
        p_period);
END
$$;
COMMENT ON FUNCTION analytics._stickiness_rule(text, text, date, integer) IS
    'By what stickiness_periods counts a user, in words.';

CREATE FUNCTION analytics._stickiness_days(
    p_account bigint, p_users bigint[], p_since timestamptz, p_until timestamptz
)
RETURNS TABLE (user_key bigint, days integer)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('day', p_since, p_until);
BEGIN
    RETURN QUERY
    SELECT e.user_key, count(DISTINCT width_bucket(e.occurred_at, v_starts))::integer
    FROM analytics.event_keys AS e
    WHERE e.user_key <> 0 AND (p_users IS NULL OR e.user_key = ANY (p_users))
        AND e.occurred_at >= p_since AND e.occurred_at < p_until
        AND (p_account = 0 OR e.account_key = p_account)
    GROUP BY e.user_key;
END
$$;
COMMENT ON FUNCTION analytics._stickiness_days(bigint, bigint[], timestamptz, timestamptz) IS
    'On how many days users (NULL: all) were active in [p_since, p_until), in one account or (0) '
    'in any.';

CREATE FUNCTION analytics._trace_stickiness_periods(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(
        p_cell, '{period_kind, period, days}', '{users_exactly, users_at_least}');
    v_kind text := analytics._cell_period_kind(v_cell, '{week, month}');
    v_measure text := v_cell ->> 'measure';
    v_days integer := analytics._cell_number(v_cell, 'days');
    v_account bigint := analytics._cell_account(v_cell);
    r_period record := analytics._cell_period(v_cell, 'period', v_kind);
BEGIN
    RETURN QUERY
    SELECT analytics._stickiness_rule(
            v_measure, v_kind, (v_cell ->> 'period')::date, v_days
        ),
        NULL, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics._stickiness_days(v_account, NULL, r_period.since, r_period.until) AS known
    JOIN analytics.event_keys AS e ON e.user_key = known.user_key
    WHERE (known.days = v_days OR v_measure = 'users_at_least' AND known.days > v_days)
        AND e.occurred_at >= r_period.since AND e.occurred_at < r_period.until
        AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_stickiness_periods(jsonb) IS
    'See analytics.trace: events behind a cell of stickiness_periods.';

CREATE FUNCTION analytics._cells_stickiness_periods(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'period_kind', kind.name,
            'period', d.period, 'days', m.days, 'measure', m.measure),
        analytics._stickiness_rule(m.measure, kind.name, d.period, m.days)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN (VALUES ('week'), ('month')) AS kind (name)
    CROSS JOIN LATERAL (
        SELECT spectrum.period_starts(kind.name, p_at, p_at + interval '1 us') AS starts
        OFFSET 0
    ) AS own
    CROSS JOIN LATERAL (SELECT spectrum.period_date(own.starts[1]) AS period OFFSET 0) AS d
    CROSS JOIN LATERAL analytics._stickiness_days(
        scope.account_key, ARRAY[p_user], own.starts[1], own.starts[2]
    ) AS known
    CROSS JOIN LATERAL (
        SELECT 'users_exactly' AS measure, known.days
        UNION ALL
        SELECT 'users_at_least', k.days FROM generate_series(1, known.days) AS k (days)
    ) AS m;
END
$$;
COMMENT ON FUNCTION analytics._cells_stickiness_periods(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of stickiness_periods that count an event.';
-- Room 72, glass of features and of the catalog: who used a feature and since when he is with us;
-- which events have a property.

CREATE FUNCTION analytics._served_feature(p_feature text)
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce((
        SELECT report.definition FROM analytics.served_reports AS report
        WHERE report.kind = 'feature' AND report.name = p_feature AND report.name <> ''
    ), jsonb_build_object('event_type', 'feature_used', 'named', p_feature));
END
$$;
COMMENT ON FUNCTION analytics._served_feature(text) IS
    'What is a use of a feature in feature_adoption: its definition or, where it has none, events '
    'feature_used that name it.';

CREATE FUNCTION analytics._feature_evidence(
    p_feature text, p_account bigint, p_users bigint[], p_since timestamptz, p_until timestamptz
)
RETURNS TABLE (
    measure text, user_key bigint, first_at timestamptz, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_definition jsonb := analytics._served_feature(p_feature);
    v_key integer := analytics._event_key(v_definition ->> 'event_type');
    v_filter jsonb := nullif(v_definition -> 'properties_filter', 'null');
    v_named text := v_definition ->> 'named';
BEGIN
    RETURN QUERY
    SELECT m.measure, u.user_key, started.first_at, e.event_id, e.occurred_at
    FROM unnest(p_users) AS u (user_key)
    CROSS JOIN LATERAL (
        SELECT min(own.occurred_at) AS first_at
        FROM analytics.event_keys AS own
        WHERE own.user_key = u.user_key AND (p_account = 0 OR own.account_key = p_account)
    ) AS started
    CROSS JOIN LATERAL (
        SELECT EXISTS (
            SELECT FROM analytics.event_keys AS earlier
            WHERE earlier.user_key = u.user_key AND earlier.occurred_at < p_since
                AND (p_account = 0 OR earlier.account_key = p_account)
                AND (v_key IS NULL OR earlier.event_type_key = v_key)
                AND (v_filter IS NULL OR earlier.properties @> v_filter)
                AND (v_named IS NULL OR earlier.properties ->> 'feature' = v_named)
        ) AS has_used
    ) AS past
    JOIN analytics.event_keys AS e ON e.user_key = u.user_key
        AND e.occurred_at >= p_since AND e.occurred_at < p_until
        AND (p_account = 0 OR e.account_key = p_account)
    CROSS JOIN LATERAL (
        SELECT (v_key IS NULL OR e.event_type_key = v_key)
            AND (v_filter IS NULL OR e.properties @> v_filter)
            AND (v_named IS NULL OR e.properties ->> 'feature' = v_named) IS TRUE AS is_use
    ) AS did
    JOIN (
        VALUES ('active_users'), ('users'), ('first_users'), ('repeat_users')
    ) AS m (measure) ON CASE m.measure
        WHEN 'active_users' THEN true
        WHEN 'users' THEN did.is_use
        WHEN 'first_users' THEN did.is_use AND NOT past.has_used
        ELSE did.is_use AND past.has_used
    END
    WHERE u.user_key <> 0;
END
$$;
COMMENT ON FUNCTION analytics._feature_evidence(
    text, bigint, bigint[], timestamptz, timestamptz
) IS
    'The events of users in one week by which feature_adoption counts them, with the time of each '
    'one''s first event. p_account: 0 all.';

CREATE FUNCTION analytics._feature_rule(
    p_feature text, p_measure text, p_cohort date, p_period date
)
RETURNS text
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_definition jsonb := analytics._served_feature(p_feature);
    v_use text := format('an event %s%s%s',
        coalesce(v_definition ->> 'event_type', 'of any type'),
        ' that names the feature ' || (v_definition ->> 'named'),
        ' with properties ' || nullif(v_definition -> 'properties_filter', 'null')::text);
BEGIN
    RETURN format('A user whose first event is in the week of %s counts once if he has %s in the '
        'week of %s%s.', p_cohort,
        CASE p_measure WHEN 'active_users' THEN 'any event' ELSE v_use END, p_period,
        CASE p_measure
            WHEN 'first_users' THEN ', and had none in a week before'
            WHEN 'repeat_users' THEN ', and had one in a week before'
            ELSE ''
        END);
END
$$;
COMMENT ON FUNCTION analytics._feature_rule(text, text, date, date) IS
    'By what feature_adoption counts a user, in words.';

CREATE FUNCTION analytics._trace_feature_adoption(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{feature, cohort_week, period}',
        '{users, active_users, first_users, repeat_users}');
    v_feature text := v_cell ->> 'feature';
    v_account bigint := analytics._cell_account(v_cell);
    r_cohort record := analytics._cell_period(v_cell, 'cohort_week', 'week');
    r_period record := analytics._cell_period(v_cell, 'period', 'week');
    v_rule text := analytics._feature_rule(v_feature, v_cell ->> 'measure',
        analytics._cell_day(v_cell, 'cohort_week'), analytics._cell_day(v_cell, 'period'));
BEGIN
    RETURN QUERY
    SELECT v_rule, NULL, NULL::numeric, found.user_key, found.event_id, found.occurred_at
    FROM analytics._feature_evidence(v_feature, v_account, ARRAY(
        SELECT DISTINCT e.user_key FROM analytics.event_keys AS e
        WHERE e.occurred_at >= r_cohort.since AND e.occurred_at < r_cohort.until
            AND (v_account = 0 OR e.account_key = v_account)
    ), r_period.since, r_period.until) AS found
    WHERE found.first_at >= r_cohort.since AND found.measure = v_cell ->> 'measure';
END
$$;
COMMENT ON FUNCTION analytics._trace_feature_adoption(jsonb) IS
    'See analytics.trace: events behind a cell of feature_adoption.';

CREATE FUNCTION analytics._cells_feature_adoption(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('week', p_at, p_at + interval '1 us');
    v_week date := spectrum.period_date(v_starts[1]);
BEGIN
    -- The active users of a week stand beside each feature that is shown.
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'feature', shown.feature,
            'cohort_week', shown.cohort_week, 'period', v_week, 'measure', found.measure),
        analytics._feature_rule(shown.feature, found.measure, shown.cohort_week, v_week)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL (
        SELECT spectrum.period_date(spectrum.period_start('week', min(own.occurred_at))) AS week
        FROM analytics.event_keys AS own
        WHERE own.user_key = p_user
            AND (scope.account_key = 0 OR own.account_key = scope.account_key)
    ) AS cohort
    JOIN analytics.feature_adoption AS shown ON shown.account_id = scope.account_id
        AND shown.cohort_week = cohort.week AND shown.period = v_week
    CROSS JOIN LATERAL analytics._feature_evidence(
        shown.feature, scope.account_key, ARRAY[p_user], v_starts[1], v_starts[2]
    ) AS found
    WHERE p_user <> 0 AND found.occurred_at = p_at AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_feature_adoption(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of feature_adoption that count an event.';

CREATE FUNCTION analytics._catalog_rule(p_event_type text, p_property text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('Every event %s%s counts once%s.', p_event_type,
        ' that has the property ' || CASE p_property
            WHEN '(other properties)' THEN 'past the 200 names kept' ELSE p_property END,
        CASE p_property WHEN '(other properties)' THEN ' for each of these' ELSE '' END);
END
$$;
COMMENT ON FUNCTION analytics._catalog_rule(text, text) IS
    'By what event_catalog counts an event, in words.';

CREATE FUNCTION analytics._trace_event_catalog(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{event_type}', '{events}', '{property}');
    v_type text := v_cell ->> 'event_type';
    v_type_key integer := analytics._event_key(v_type);
    v_property text := v_cell ->> 'property';
    v_account bigint := analytics._cell_account(v_cell);
    v_rule text := analytics._catalog_rule(v_type, v_property);
    -- Names of the others are known only by not being shown; other than that one key is all.
    v_shown text[] := ARRAY(
        SELECT known.property FROM analytics.event_catalog AS known
        WHERE known.account_id = '*' AND known.event_type = v_type AND known.property IS NOT NULL
    );
BEGIN
    RETURN QUERY
    SELECT v_rule, concat_ws(' ', e.event_id, each.key), NULL::numeric, e.user_key, e.event_id,
        e.occurred_at
    FROM analytics.event_keys AS e
    CROSS JOIN LATERAL (
        SELECT NULL AS key WHERE v_property IS NULL
        UNION ALL
        SELECT names.key FROM jsonb_object_keys(e.properties) AS names (key)
        WHERE names.key = v_property
            OR v_property = '(other properties)' AND names.key <> ALL (v_shown)
    ) AS each
    WHERE e.event_type_key = v_type_key AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_event_catalog(jsonb) IS
    'See analytics.trace: events behind a cell of event_catalog.';

CREATE FUNCTION analytics._cells_event_catalog(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_strip_nulls(jsonb_build_object('account_id', scope.account_id,
            'event_type', e.event_type, 'property', found.property, 'measure', 'events')),
        analytics._catalog_rule(e.event_type, found.property)
    FROM analytics.events AS e
    CROSS JOIN LATERAL (
        SELECT NULL AS property
        UNION
        SELECT coalesce(shown.property, '(other properties)')
        FROM jsonb_object_keys(e.properties) AS names (key)
        LEFT JOIN analytics.event_catalog AS shown ON shown.account_id = '*'
            AND shown.event_type = e.event_type AND shown.property = names.key
    ) AS found
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_event_catalog(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of event_catalog that count an event.';
-- Room 72, explain: all that is known of one event, from its raw row to each cell it counts in.

CREATE FUNCTION spectrum._find_raw_event(p_event_id uuid, OUT raw_seq bigint, OUT fact_id uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT ledger.seq, ledger.event_id INTO raw_seq, fact_id
    FROM warehouse.event_ledger AS ledger
    WHERE ledger.event_id = p_event_id;
    IF FOUND THEN
        RETURN;
    END IF;
    -- Not an event that counts: perhaps a raw row, one that failed or repeats another.
    SELECT raw.seq, ledger.event_id INTO raw_seq, fact_id
    FROM @extschema@.raw_events AS raw
    LEFT JOIN @extschema@.raw_events AS first_row ON first_row.id = raw.copy_of
    LEFT JOIN spectrum.readings AS reading ON reading.seq = coalesce(first_row.seq, raw.seq)
    LEFT JOIN warehouse.event_ledger AS ledger
        ON ledger.event_id = reading.event_id AND ledger.seq = reading.seq
    WHERE raw.id = p_event_id;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_event_id', p_event_id::text,
            'the event_id of an event that counts, or the id of a row of raw_events');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._find_raw_event(uuid) IS
    'The raw row of an event, given by its event_id or by the row''s id, and, if it or the row it '
    'repeats counts, the event_id that it counts as; raises 22023 where there is none.';

CREATE FUNCTION spectrum.explain_event(p_event_id uuid)
RETURNS TABLE (what text, view_name text, cell jsonb, rule text, detail jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    r_found record := spectrum._find_raw_event(p_event_id);
    r_fact record;
    v_view text;
BEGIN
    RETURN QUERY
    SELECT CASE WHEN raw.seq = r_found.raw_seq THEN 'raw event' ELSE 'copy' END,
        NULL::text, NULL::jsonb,
        CASE
            WHEN raw.status = 'failed' THEN 'It cannot be read, so it counts nowhere.'
            WHEN raw.status <> 'done' THEN 'It waits to be processed.'
            WHEN raw.copy_of IS NOT NULL THEN 'It repeats an event_id: the first row received '
                'counts, this one changes no number.'
            ELSE 'It is the first row received with its event_id, so it counts.'
        END,
        jsonb_strip_nulls(to_jsonb(raw) - 'next_attempt_at')
    FROM @extschema@.raw_events AS raw
    WHERE raw.seq = r_found.raw_seq
        OR raw.copy_of = (
            SELECT first_row.id FROM @extschema@.raw_events AS first_row
            WHERE first_row.seq = r_found.raw_seq
        )
    ORDER BY raw.seq;

    SELECT event.* INTO r_fact
    FROM warehouse.event_ledger AS ledger
    JOIN analytics.events AS event ON event.user_key = ledger.user_key
        AND event.occurred_at = ledger.occurred_at AND event.event_id = ledger.event_id
    WHERE ledger.event_id = r_found.fact_id;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT 'fact', NULL::text, NULL::jsonb, 'What all questions are asked of.',
        jsonb_strip_nulls(to_jsonb(r_fact));

    RETURN QUERY
    SELECT 'session', NULL::text, NULL::jsonb,
        'A session ends after 30 minutes without an event of its user, or after 24 hours.',
        jsonb_strip_nulls(to_jsonb(s) - '{scope, user_key, user_id, steps}'::text[])
    FROM analytics._sessions(
        NULL, NULL, ARRAY[r_fact.user_key], '{0}', '{-infinity}', '{infinity}', NULL,
        '{pages, touches, places}'
    ) AS s
    WHERE r_fact.user_key <> 0 AND r_fact.occurred_at BETWEEN s.started_at AND s.ended_at;

    FOR v_view IN
        SELECT view.name
        FROM spectrum.report_kinds AS kind
        CROSS JOIN LATERAL unnest(kind.views) WITH ORDINALITY AS view (name, number)
        WHERE to_regprocedure(format(
            'analytics.%I(bigint, timestamptz, uuid)', '_cells_' || view.name)) IS NOT NULL
        ORDER BY kind.position, view.number
    LOOP
        RETURN QUERY EXECUTE format(
            'SELECT ''cell'', $1, counted.cell, counted.rule, NULL::jsonb '
            'FROM analytics.%I($2, $3, $4) AS counted ORDER BY counted.cell',
            '_cells_' || v_view)
        USING v_view, r_fact.user_key, r_fact.occurred_at, r_fact.event_id;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum.explain_event(uuid) IS
    'What became of an event, given by its event_id or by the id of its raw row: the raw row '
    '(detail: status, seq, payload, ...) and its copies, the fact, its session, and each cell of '
    'a standing view that counts it, with the rule. A cell as it stands here can be given to '
    'analytics.trace(view_name, cell).';
-- Room 80, refresh: brings the standing views up to the facts, in steps of bounded work: the news
-- of some batches, or some users of a report that is being built. Its cost follows the news.

CREATE FUNCTION spectrum._pending_since()
RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
BEGIN
    RETURN least(
        (SELECT min(raw.received_at) FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= (SELECT intake.safe_seq FROM spectrum.intake)
            AND raw.status IN ('pending', 'processing')),
        (SELECT min(raw.received_at) FROM spectrum.requeue
        JOIN @extschema@.raw_events AS raw USING (seq)
        WHERE raw.status IN ('pending', 'processing'))
    );
END
$$;
COMMENT ON FUNCTION spectrum._pending_since() IS
    'When the oldest event that waits was received; NULL where none waits. Its cost follows what '
    'came lately, not the history.';

CREATE FUNCTION spectrum._widen_seen()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    WITH hulls AS MATERIALIZED (
        SELECT user_key, account_key, event_type_key, geo_key,
            min(occurred_at) AS first_at, max(occurred_at) AS last_at
        FROM pg_temp.spectrum_news
        WHERE sign > 0
        GROUP BY GROUPING SETS ((user_key), (account_key), (event_type_key), (geo_key))
    ), users AS (
        UPDATE warehouse.dim_users AS dim
        SET first_seen = least(dim.first_seen, hulls.first_at),
            last_seen = greatest(dim.last_seen, hulls.last_at)
        FROM hulls WHERE dim.user_key = hulls.user_key
            AND (dim.first_seen IS NULL OR hulls.first_at < dim.first_seen
                OR hulls.last_at > dim.last_seen)
    ), accounts AS (
        UPDATE warehouse.dim_accounts AS dim
        SET first_seen = least(dim.first_seen, hulls.first_at),
            last_seen = greatest(dim.last_seen, hulls.last_at)
        FROM hulls WHERE dim.account_key = hulls.account_key
            AND (dim.first_seen IS NULL OR hulls.first_at < dim.first_seen
                OR hulls.last_at > dim.last_seen)
    ), event_types AS (
        UPDATE warehouse.dim_event_types AS dim
        SET first_seen = least(dim.first_seen, hulls.first_at),
            last_seen = greatest(dim.last_seen, hulls.last_at)
        FROM hulls WHERE dim.event_type_key = hulls.event_type_key
            AND (dim.first_seen IS NULL OR hulls.first_at < dim.first_seen
                OR hulls.last_at > dim.last_seen)
    )
    UPDATE warehouse.dim_geography AS dim
    SET first_seen = least(dim.first_seen, hulls.first_at),
        last_seen = greatest(dim.last_seen, hulls.last_at)
    FROM hulls WHERE dim.geo_key = hulls.geo_key
        AND (dim.first_seen IS NULL OR hulls.first_at < dim.first_seen
            OR hulls.last_at > dim.last_seen);
END
$$;
COMMENT ON FUNCTION spectrum._widen_seen() IS
    'Widens first_seen and last_seen of the dimensions by the news.';

CREATE FUNCTION spectrum._tell_reports(p_states text[], p_built integer[] DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_report record;
BEGIN
    FOR r_report IN
        SELECT report.report_id, report.built_to, kind.maintained_by
        FROM spectrum.reports AS report
        JOIN spectrum.report_kinds AS kind USING (kind)
        WHERE report.state = ANY (p_states) AND report.follows_news
            AND (p_built IS NULL OR report.report_id = ANY (p_built))
        ORDER BY kind.position, report.report_id
    LOOP
        EXECUTE format('SELECT analytics.%I($1, $2)', r_report.maintained_by)
        USING r_report.report_id,
            CASE WHEN p_built IS NULL THEN r_report.built_to ELSE 9223372036854775807 END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._tell_reports(text[], integer[]) IS
    'Has the reports in some states move their sums by the news laid out: of the users they hold, '
    'or, those that are being built here, of all.';

CREATE FUNCTION spectrum._count_news(p_events bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_counted bigint;
BEGIN
    PERFORM spectrum._clear_news();
    v_counted := spectrum._take_news(spectrum._last_note(p_events));
    IF v_counted > 0 THEN
        PERFORM spectrum._widen_seen();
        PERFORM spectrum._scope_news(false);
        PERFORM spectrum._tell_reports('{served, building}');
    END IF;
    RETURN v_counted;
END
$$;
COMMENT ON FUNCTION spectrum._count_news(bigint) IS
    'Step of a refresh: counts the news of the next batches, about p_events facts.';

CREATE FUNCTION spectrum._build_reports(p_events bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_after bigint;
    v_built integer[];
    v_users bigint;
    v_until bigint;
    v_added bigint := 0;
BEGIN
    -- Which they are is settled here: one that is defined while these are at it has its own turn.
    SELECT report.built_to, array_agg(report.report_id) INTO v_after, v_built
    FROM spectrum.reports AS report
    WHERE report.state = 'building'
    GROUP BY report.built_to
    ORDER BY report.built_to
    LIMIT 1;
    -- As many users as have about p_events facts, by the statistics of both tables.
    SELECT greatest(100, p_events * sum(greatest(part.reltuples, 1))
            FILTER (WHERE part.oid = 'warehouse.dim_users'::regclass)
        / greatest(1, sum(part.reltuples) FILTER (WHERE part.relispartition)))::bigint
    INTO v_users
    FROM pg_class AS part
    WHERE part.oid = 'warehouse.dim_users'::regclass OR part.oid IN (
        SELECT link.inhrelid FROM pg_inherits AS link
        WHERE link.inhparent = 'warehouse.fact_events'::regclass
    );
    SELECT max(chunk.user_key) INTO v_until
    FROM (
        SELECT dim.user_key FROM warehouse.dim_users AS dim
        WHERE dim.user_key > v_after
        ORDER BY dim.user_key
        LIMIT v_users
    ) AS chunk;
    -- Reports meet where another stands: from there on they go together.
    v_until := least(v_until, (
        SELECT min(report.built_to) FROM spectrum.reports AS report
        WHERE report.state = 'building' AND report.built_to > v_after
    ));
    IF v_until IS NULL THEN
        -- A last call, without news, for those that finish only what is complete.
        PERFORM spectrum._clear_news();
        PERFORM spectrum._tell_reports('{building}', v_built);
        PERFORM spectrum._serve_report(report_id) FROM unnest(v_built) AS report_id;
        RETURN 0;
    END IF;

    PERFORM spectrum._clear_news();
    v_added := spectrum._add_history(v_after, v_until);
    PERFORM spectrum._scope_news(true);
    PERFORM spectrum._tell_reports('{building}', v_built);
    UPDATE spectrum.reports SET built_to = v_until
    WHERE state = 'building' AND report_id = ANY (v_built);
    RETURN v_added;
END
$$;
COMMENT ON FUNCTION spectrum._build_reports(bigint) IS
    'Step of a refresh: adds the next users, with about p_events facts, to the reports that are '
    'being built and have come least far; serves them where there are no further users.';

CREATE FUNCTION spectrum._refresh_some(
    p_events bigint,
    OUT counted bigint,
    OUT has_more boolean,
    OUT detail text
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
    v_as_of timestamptz;
    v_news_left boolean;
    v_built bigint;
    v_cleared bigint;
BEGIN
    PERFORM spectrum._hold_reports();
    v_as_of := least(now(), spectrum._pending_since());

    counted := spectrum._count_news(p_events);
    v_news_left := EXISTS (SELECT FROM spectrum.news) OR EXISTS (SELECT FROM spectrum.withdrawals);
    IF counted < p_events / 2 AND EXISTS (SELECT FROM spectrum.reports WHERE state = 'building')
    THEN
        v_built := spectrum._build_reports(p_events);
    ELSIF counted = 0 AND EXISTS (SELECT FROM spectrum.reports WHERE state = 'discarded') THEN
        v_cleared := spectrum._clear_discarded(p_events::integer);
    END IF;

    UPDATE spectrum.watermark
    SET as_of = CASE WHEN v_news_left OR EXISTS (
            SELECT FROM spectrum.reports WHERE state = 'served' AND NOT follows_news
        ) THEN as_of ELSE greatest(as_of, v_as_of) END,
        refreshed_at = now(),
        seconds = extract(epoch FROM clock_timestamp() - v_started_at);
    has_more := (counted > 0 OR v_built IS NOT NULL OR v_cleared > 0)
        AND (v_news_left OR EXISTS (SELECT FROM spectrum.reports WHERE state <> 'served'));
    detail := concat_ws(', ', format('%s facts counted', counted),
        'reports built from ' || v_built || ' facts',
        v_cleared || ' rows of former reports deleted');
    counted := counted + coalesce(v_built, 0);
END
$$;
COMMENT ON FUNCTION spectrum._refresh_some(bigint) IS
    'One step of a refresh, of about p_events facts: how many, and whether more is waiting. A '
    'second one at the same time waits for the first.';

CREATE PROCEDURE spectrum.refresh_analytics(INOUT counted bigint DEFAULT NULL)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
    r_step record;
BEGIN
    PERFORM spectrum._require_primary();
    counted := 0;
    LOOP
        r_step := spectrum._refresh_some(200000);
        counted := counted + r_step.counted;
        EXIT WHEN NOT r_step.has_more;
    END LOOP;
    PERFORM spectrum._log_step(NULL, 'refresh', v_started_at, format('%s facts counted', counted));
END
$$;
COMMENT ON PROCEDURE spectrum.refresh_analytics(bigint) IS
    'Brings every standing view up to the facts, in the caller''s transaction, and returns how '
    'many facts it counted: those that came or went since the last refresh, and the history of '
    'reports that were built. A second one at the same time waits for the first.';
-- Room 80, tasks: long work in bounded steps. A task is a row that says what is to be done and how
-- far it is. Each step is one transaction, so a kill loses at most the step under way, and whoever
-- comes next, the tick or the one who asked, goes on from there.
--
-- A kind of task is two functions: spectrum._check_<kind>(arguments) refuses what cannot be done
-- when it is asked for; spectrum._do_<kind>(task_id) does one step, moves position and done, and
-- returns whether there is more to do.

CREATE FUNCTION spectrum._create_tasks()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.tasks') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.tasks (
        task_id bigint NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT tasks_pkey PRIMARY KEY,
        kind text NOT NULL,
        arguments jsonb NOT NULL DEFAULT '{}',
        state text NOT NULL DEFAULT 'waiting'
            CONSTRAINT tasks_state_is_known
            CHECK (state IN ('waiting', 'running', 'done', 'failed', 'cancelled')),
        asked_by text NOT NULL DEFAULT current_user,
        asked_at timestamptz NOT NULL DEFAULT now(),
        started_at timestamptz,
        finished_at timestamptz,
        position bigint NOT NULL DEFAULT 0,
        done bigint NOT NULL DEFAULT 0,
        total bigint,
        unit text,
        outcome jsonb NOT NULL DEFAULT '{}',
        error_msg text,
        next_step_at timestamptz
    );
    CREATE INDEX tasks_open_idx ON spectrum.tasks (task_id)
    WHERE state IN ('waiting', 'running');
    COMMENT ON TABLE spectrum.tasks IS
        'Long work that was asked for, done in steps by spectrum.run() or by who asked. Kept.';
    COMMENT ON COLUMN spectrum.tasks.task_id IS 'In the order in which they were asked for.';
    COMMENT ON COLUMN spectrum.tasks.kind IS 'What is to be done.';
    COMMENT ON COLUMN spectrum.tasks.arguments IS 'To what: see the procedure of that name.';
    COMMENT ON COLUMN spectrum.tasks.state IS
        'waiting, running, done, failed (a step raised an error) or cancelled.';
    COMMENT ON COLUMN spectrum.tasks.asked_by IS 'The role that asked for it.';
    COMMENT ON COLUMN spectrum.tasks.asked_at IS 'When.';
    COMMENT ON COLUMN spectrum.tasks.started_at IS 'Begin of the first step.';
    COMMENT ON COLUMN spectrum.tasks.finished_at IS 'End of the last step.';
    COMMENT ON COLUMN spectrum.tasks.position IS
        'Where the next step begins; what it counts is the business of the kind.';
    COMMENT ON COLUMN spectrum.tasks.done IS 'How much is done, in units.';
    COMMENT ON COLUMN spectrum.tasks.total IS 'Of how much, about; NULL where that is not known.';
    COMMENT ON COLUMN spectrum.tasks.unit IS 'What done and total count.';
    COMMENT ON COLUMN spectrum.tasks.outcome IS 'What came of it, as far as it is done.';
    COMMENT ON COLUMN spectrum.tasks.error_msg IS
        'What ended it, or what held its last step up; with the SQLSTATE.';
    COMMENT ON COLUMN spectrum.tasks.next_step_at IS
        'Where a step was held up: not before. NULL: at once.';
END
$$;
COMMENT ON FUNCTION spectrum._create_tasks() IS 'Room 80: makes spectrum.tasks.';

CREATE FUNCTION spectrum._task_kinds()
RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT ARRAY['reprocess', 'purge_raw']
$$;
COMMENT ON FUNCTION spectrum._task_kinds() IS 'The kinds of tasks there are.';

CREATE FUNCTION spectrum.request(p_kind text, p_arguments jsonb DEFAULT '{}')
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_arguments jsonb := coalesce(jsonb_strip_nulls(p_arguments), '{}');
    v_task_id bigint;
BEGIN
    PERFORM spectrum._check_choice('p_kind', p_kind, spectrum._task_kinds());
    IF jsonb_typeof(v_arguments) <> 'object' THEN
        PERFORM spectrum._reject('p_arguments', p_arguments::text, 'a JSON object');
    END IF;
    EXECUTE format('SELECT spectrum.%I($1)', '_check_' || p_kind) USING v_arguments;
    INSERT INTO spectrum.tasks (kind, arguments) VALUES (p_kind, v_arguments)
    RETURNING tasks.task_id INTO v_task_id;
    RETURN v_task_id;
END
$$;
COMMENT ON FUNCTION spectrum.request(text, jsonb) IS
    'Asks for long work, which the next runs carry out in steps, and returns its task_id: see '
    'spectrum.tasks and spectrum.progress. The arguments are those of the procedure of the same '
    'name, without p_.';

CREATE FUNCTION spectrum._check_arguments(p_arguments jsonb, p_types jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_argument record;
BEGIN
    FOR r_argument IN
        SELECT given.name, given.value, p_types ->> given.name AS type
        FROM jsonb_each_text(p_arguments) AS given (name, value)
        ORDER BY given.name
    LOOP
        IF r_argument.type IS NULL THEN
            PERFORM spectrum._reject('p_arguments', r_argument.name, 'arguments called: '
                || (SELECT string_agg(known.name, ', ') FROM jsonb_object_keys(p_types)
                    AS known (name)));
        END IF;
        BEGIN
            EXECUTE format('SELECT %L::%s', r_argument.value, r_argument.type::regtype);
        EXCEPTION
            WHEN data_exception THEN
                PERFORM spectrum._reject(
                    'p_' || r_argument.name, r_argument.value, 'a value of type ' || r_argument.type
                );
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._check_arguments(jsonb, jsonb) IS
    'Raises 22023 unless every argument of a task is one of those in p_types (name: type) and its '
    'value reads as that type.';

CREATE FUNCTION spectrum._work_on_task(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_kind text;
    v_has_more boolean;
    v_state text;
    v_message text;
BEGIN
    -- Who else works on it has the row: step by step, never both at once.
    UPDATE spectrum.tasks
    SET state = 'running', started_at = coalesce(started_at, clock_timestamp()), error_msg = NULL
    WHERE task_id = p_task_id AND state IN ('waiting', 'running')
    RETURNING kind INTO v_kind;
    IF v_kind IS NULL THEN
        RETURN false;
    END IF;
    BEGIN
        EXECUTE format('SELECT spectrum.%I($1)', '_do_' || v_kind)
        INTO STRICT v_has_more USING p_task_id;
        IF v_has_more THEN
            RETURN true;
        END IF;
        v_state := 'done';
    EXCEPTION
        -- Passes: the step is tried again after a while.
        WHEN lock_not_available OR deadlock_detected THEN
            v_state := 'running';
            v_message := format('%s (SQLSTATE %s)', sqlerrm, sqlstate);
        WHEN OTHERS THEN
            v_state := 'failed';
            v_message := format('%s (SQLSTATE %s)', sqlerrm, sqlstate);
    END;
    UPDATE spectrum.tasks
    SET state = v_state,
        finished_at = CASE WHEN v_state <> 'running' THEN clock_timestamp() END,
        error_msg = translate(v_message, E'\n\r', '  '),
        next_step_at = CASE WHEN v_state = 'running'
            THEN clock_timestamp() + (SELECT config.retry_delay FROM spectrum.config) END
    WHERE task_id = p_task_id;
    RETURN false;
END
$$;
COMMENT ON FUNCTION spectrum._work_on_task(bigint) IS
    'One step of a task: true where it may go on at once. An error undoes the step and ends the '
    'task, unless it can pass: then the task stays open.';

CREATE FUNCTION spectrum._task_outcome(p_task_id bigint)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_task record;
BEGIN
    SELECT task.kind, task.state, task.outcome, task.error_msg INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    IF r_task.state <> 'done' THEN
        RAISE EXCEPTION '% (task %) is %: %', r_task.kind, p_task_id, r_task.state,
            coalesce(r_task.error_msg, 'it was not finished')
            USING
                ERRCODE = coalesce(
                    substring(r_task.error_msg FROM 'SQLSTATE (.{5})\)$'), 'query_canceled'
                ),
                HINT = CASE r_task.state
                    WHEN 'running' THEN 'What is done is done; spectrum.run() goes on with it.'
                    ELSE 'What is done is done; call it again for the rest.'
                END;
    END IF;
    RETURN r_task.outcome;
END
$$;
COMMENT ON FUNCTION spectrum._task_outcome(bigint) IS
    'What came of a task that was carried out at once; raises what ended it before its end.';

CREATE FUNCTION spectrum.cancel_task(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE spectrum.tasks SET state = 'cancelled', finished_at = clock_timestamp()
    WHERE task_id = p_task_id AND state IN ('waiting', 'running');
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION spectrum.cancel_task(bigint) IS
    'Has no further step of a task done; what is done stays. False where it is not open.';

CREATE FUNCTION spectrum._work_on_tasks()
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_task_id bigint;
    v_kind text;
BEGIN
    SELECT task.task_id, task.kind INTO v_task_id, v_kind
    FROM spectrum.tasks AS task
    WHERE task.state IN ('waiting', 'running')
        AND (task.next_step_at IS NULL OR task.next_step_at <= clock_timestamp())
    ORDER BY task.task_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED;
    IF v_task_id IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM spectrum._work_on_task(v_task_id);
    RETURN format('task %s, %s', v_task_id, v_kind);
END
$$;
COMMENT ON FUNCTION spectrum._work_on_tasks() IS
    'Step of a run: one step of the oldest open task; NULL where there is none.';
-- Room 80, run: the tick. run() only loops and commits; each step is one function call and one
-- transaction, so that a crash loses at most the step under way. Turns are taken by advisory
-- locks that end with the transaction: a cancelled run leaves none behind.

CREATE FUNCTION spectrum._take_turn(p_name text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN pg_try_advisory_xact_lock(spectrum._lock_key(p_name));
END
$$;
COMMENT ON FUNCTION spectrum._take_turn(text) IS
    'Whether this transaction may do what only one at a time may do.';

CREATE FUNCTION spectrum._begin_run()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_run_id bigint;
BEGIN
    PERFORM spectrum._require_primary();
    PERFORM spectrum._require_release();
    IF NOT spectrum._take_turn('run') THEN
        RAISE NOTICE 'another spectrum.run() is under way: this one does nothing';
        PERFORM spectrum._log_step(NULL, 'run', clock_timestamp(), 'another run was under way');
        RETURN NULL;
    END IF;
    INSERT INTO spectrum.run_log (step) VALUES ('run') RETURNING run_log.log_id INTO v_run_id;
    UPDATE spectrum.run_log SET run_id = v_run_id WHERE log_id = v_run_id;
    RETURN v_run_id;
END
$$;
COMMENT ON FUNCTION spectrum._begin_run() IS
    'Opens a run in the run log and returns its id; NULL where another one is under way.';

CREATE FUNCTION spectrum._provision()
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_ahead integer := (SELECT config.months_ahead FROM spectrum.config);
BEGIN
    RETURN format('%s months made',
        spectrum.ensure_partitions(now(), now() + make_interval(months => v_ahead)));
END
$$;
COMMENT ON FUNCTION spectrum._provision() IS 'Step of a run: months ahead of need.';

CREATE FUNCTION spectrum._clean_cron_log()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_log regclass;
    v_deleted bigint := 0;
BEGIN
    -- Step by step: to look for a table in a schema that one may not use is an error.
    IF to_regnamespace('cron') IS NOT NULL AND has_schema_privilege('cron', 'USAGE') THEN
        v_log := to_regclass('cron.job_run_details');
    END IF;
    IF v_log IS NOT NULL AND has_table_privilege(v_log, 'DELETE') THEN
        -- By what was run, not by job: the rows of a job that is gone are to go too.
        EXECUTE 'DELETE FROM cron.job_run_details WHERE end_time < now() - $1 '
            'AND database = current_database() AND command = $2'
            USING (SELECT config.cron_log_keep FROM spectrum.config), 'CALL spectrum.run()';
        GET DIAGNOSTICS v_deleted = ROW_COUNT;
    END IF;
    RETURN v_deleted;
END
$$;
COMMENT ON FUNCTION spectrum._clean_cron_log() IS
    'Deletes old rows about Spectrum''s jobs from pg_cron''s log, which pg_cron never does; where '
    'pg_cron is in this database and the caller may.';

CREATE FUNCTION spectrum._upkeep()
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_log_rows bigint;
    v_found bigint := spectrum._patrol();
BEGIN
    DELETE FROM spectrum.run_log
    WHERE started_at < now() - (SELECT config.run_log_keep FROM spectrum.config);
    GET DIAGNOSTICS v_log_rows = ROW_COUNT;
    PERFORM spectrum._request_purge_raw();
    PERFORM spectrum._tidy_cap_notes();
    RETURN format('%s run log rows and %s pg_cron log rows deleted, %s forgotten events found',
        v_log_rows, spectrum._clean_cron_log(), v_found);
END
$$;
COMMENT ON FUNCTION spectrum._upkeep() IS
    'Step of a run: old log rows, pg_cron''s log, old raw events, and a look at a part of what '
    'lies behind.';

CREATE FUNCTION spectrum._do_step(p_run_id bigint, p_step text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
    v_message text;
    v_state text;
    v_detail text;
    r_refresh record;
BEGIN
    IF p_step = 'process' THEN
        RETURN (SELECT batch.claimed > 0 FROM spectrum._log_batch(p_run_id, NULL) AS batch);
    ELSIF p_step = 'tasks' THEN
        v_detail := spectrum._work_on_tasks();
        IF v_detail IS NOT NULL THEN
            PERFORM spectrum._log_step(p_run_id, p_step, v_started_at, v_detail);
        END IF;
        RETURN v_detail IS NOT NULL;
    ELSIF p_step IN ('refresh', 'refresh between') THEN
        r_refresh := spectrum._refresh_some(200000);
        PERFORM spectrum._log_step(p_run_id, 'refresh', v_started_at, r_refresh.detail);
        RETURN r_refresh.has_more;
    END IF;
    PERFORM spectrum._log_step(p_run_id, p_step, v_started_at, CASE p_step
        WHEN 'provision' THEN spectrum._provision()
        WHEN 'upkeep' THEN spectrum._upkeep()
    END);
    RETURN false;
EXCEPTION
    WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS v_message = MESSAGE_TEXT, v_state = RETURNED_SQLSTATE;
        RAISE WARNING 'spectrum: step % of run % failed and was undone: % (SQLSTATE %)',
            p_step, p_run_id, v_message, v_state;
        PERFORM spectrum._log_step(p_run_id, split_part(p_step, ' ', 1), v_started_at, NULL,
            format('%s (SQLSTATE %s)', v_message, v_state));
        -- Somebody else won a deadlock: it is gone with this transaction.
        RETURN v_state = '40P01';
END
$$;
COMMENT ON FUNCTION spectrum._do_step(bigint, text) IS
    'Does one step of a run and logs it; true where doing it once more may find more to do. An '
    'error undoes the step, is logged, and leaves the run to its further steps.';

CREATE FUNCTION spectrum._end_run(p_run_id bigint, p_detail text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE spectrum.run_log AS run
    SET finished_at = clock_timestamp(),
        detail = p_detail,
        claimed = steps.claimed,
        loaded = steps.loaded,
        duplicates = steps.duplicates,
        failed = steps.failed,
        error_msg = steps.error_msg
    FROM (
        SELECT
            coalesce(sum(step.claimed), 0) AS claimed,
            coalesce(sum(step.loaded), 0) AS loaded,
            coalesce(sum(step.duplicates), 0) AS duplicates,
            coalesce(sum(step.failed), 0) AS failed,
            string_agg(step.step || ': ' || step.error_msg, '; ' ORDER BY step.log_id) AS error_msg
        FROM spectrum.run_log AS step
        WHERE step.run_id = p_run_id AND step.log_id <> p_run_id
    ) AS steps
    WHERE run.log_id = p_run_id;
END
$$;
COMMENT ON FUNCTION spectrum._end_run(bigint, text) IS
    'Closes a run in the run log with the sums of its steps and their errors.';

CREATE FUNCTION spectrum._run_step(p_run_id bigint, p_step text)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_has_more boolean;
    v_in_budget boolean;
    v_in_task_budget boolean;
BEGIN
    -- The lock ended with the last commit; whoever came in between goes on instead.
    IF NOT spectrum._take_turn('run') THEN
        PERFORM spectrum._end_run(p_run_id, 'another run took over');
        RETURN NULL;
    END IF;
    v_has_more := spectrum._do_step(p_run_id, p_step);
    IF p_step = 'upkeep' THEN
        PERFORM spectrum._end_run(p_run_id, NULL);
        RETURN NULL;
    END IF;
    SELECT clock_timestamp() < run.started_at + config.run_budget,
        clock_timestamp() < run.started_at + config.run_budget / 4
    INTO v_in_budget, v_in_task_budget
    FROM spectrum.run_log AS run CROSS JOIN spectrum.config
    WHERE run.log_id = p_run_id;
    RETURN CASE
        -- Not too much news at once: what a refresh works on has to fit into memory.
        WHEN p_step = 'process' AND v_has_more AND v_in_budget
            AND (SELECT sum(news.events) FROM spectrum.news) >= 200000 THEN 'refresh between'
        -- Tasks first, so that the views follow in the same run, but events wait for no task long.
        WHEN p_step = 'provision' OR (p_step = 'tasks' AND v_has_more AND v_in_task_budget)
            THEN 'tasks'
        WHEN p_step IN ('tasks', 'refresh between')
            OR (p_step = 'process' AND v_has_more AND v_in_budget) THEN 'process'
        WHEN p_step = 'process' OR (p_step = 'refresh' AND v_has_more AND v_in_budget)
            THEN 'refresh'
        ELSE 'upkeep'
    END;
END
$$;
COMMENT ON FUNCTION spectrum._run_step(bigint, text) IS
    'One transaction of a run: does the step and names the next one, NULL at the end.';

CREATE PROCEDURE spectrum.run()
LANGUAGE plpgsql
AS $$
DECLARE
    v_run_id bigint;
    v_step text := 'provision';
BEGIN
    -- Inside a transaction block this fails, before anything is done.
    COMMIT;
    v_run_id := spectrum._begin_run();
    IF v_run_id IS NULL THEN
        RETURN;
    END IF;
    WHILE v_step IS NOT NULL LOOP
        COMMIT;
        v_step := spectrum._run_step(v_run_id, v_step);
    END LOOP;
END
$$;
COMMENT ON PROCEDURE spectrum.run() IS
    'The tick: makes months ahead of need, works on open tasks, processes batches until nothing is '
    'pending or config.run_budget is spent, refreshes the views, cleans up; a commit after each. A '
    'second run at the same time returns at once and says so. Call it outside of a transaction '
    'block.';
-- Room 80, the schedule: pg_cron, where it is. All calls to it stand behind a look whether it is
-- there, so that Spectrum works without it and in databases other than pg_cron's own.

CREATE FUNCTION spectrum._job_name()
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'spectrum ' || current_database()
$$;
COMMENT ON FUNCTION spectrum._job_name() IS 'Name of this database''s job in pg_cron.';

CREATE FUNCTION spectrum._require_cron()
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- NULL where pg_cron is not loaded, and for roles that may not see its settings.
    v_home text := (SELECT setting FROM pg_settings WHERE name = 'cron.database_name');
    v_hint text;
BEGIN
    IF to_regnamespace('cron') IS NOT NULL THEN
        IF has_schema_privilege('cron', 'USAGE') THEN
            RETURN;
        END IF;
        RAISE EXCEPTION 'role % may not use pg_cron', current_user
            USING ERRCODE = 'insufficient_privilege', HINT = format(
                'As a superuser: GRANT USAGE ON SCHEMA cron TO %I;', current_user);
    END IF;

    IF v_home IS NULL THEN
        v_hint := format('Where this server has pg_cron, as a superuser in its database (SHOW '
            'cron.database_name): SELECT cron.schedule_in_database(%L, ''*/5 * * * *'', '
            '''CALL spectrum.run()'', %L, %L); Without it, have any scheduler run: '
            'CALL spectrum.run();',
            spectrum._job_name(), current_database(), current_user);
    ELSIF v_home = current_database() THEN
        v_hint := 'As a superuser, in this database: CREATE EXTENSION pg_cron;';
    ELSE
        v_hint := format('As a superuser, in database %I: SELECT cron.schedule_in_database('
            '%L, ''*/5 * * * *'', ''CALL spectrum.run()'', %L, %L);',
            v_home, spectrum._job_name(), current_database(), current_user);
    END IF;
    RAISE EXCEPTION 'pg_cron is not in database %', current_database()
        USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = CASE WHEN v_home <> current_database()
                THEN format('In this cluster pg_cron lives in database %I.', v_home)
                ELSE 'Everything but the schedule works without it.'
            END,
            HINT = v_hint;
END
$$;
COMMENT ON FUNCTION spectrum._require_cron() IS
    'Raises 55000 where pg_cron is not in this database, 42501 where the role may not use it; the '
    'hint is the statement that helps.';

CREATE FUNCTION spectrum.schedule(p_cron text DEFAULT '*/5 * * * *')
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_job_id bigint;
    v_problem text;
BEGIN
    PERFORM spectrum._require_cron();
    BEGIN
        EXECUTE 'SELECT cron.schedule($1, $2, $3)' INTO v_job_id
        USING spectrum._job_name(), p_cron, 'CALL spectrum.run()';
    EXCEPTION
        WHEN invalid_parameter_value OR internal_error THEN
            GET STACKED DIAGNOSTICS v_problem = MESSAGE_TEXT;
            RAISE EXCEPTION 'invalid value for argument p_cron: %',
                coalesce(to_json(left(p_cron, 200))::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value', DETAIL = v_problem,
                    HINT = 'Expected a cron schedule: minute hour day month weekday, such as '
                        '*/5 * * * *';
    END;
    RETURN v_job_id;
END
$$;
COMMENT ON FUNCTION spectrum.schedule(text) IS
    'Has pg_cron CALL spectrum.run() by a cron schedule (default every five minutes) as the '
    'current role, and returns the job''s id. Calling it again changes the schedule.';

CREATE FUNCTION spectrum.unschedule()
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_exists boolean;
BEGIN
    PERFORM spectrum._require_cron();
    EXECUTE 'SELECT EXISTS (SELECT FROM cron.job WHERE jobname = $1 AND username = current_user)'
    INTO v_exists USING spectrum._job_name();
    IF v_exists THEN
        EXECUTE 'SELECT cron.unschedule($1)' USING spectrum._job_name();
    END IF;
    RETURN v_exists;
END
$$;
COMMENT ON FUNCTION spectrum.unschedule() IS
    'Takes Spectrum''s job off pg_cron; false where there was none.';
-- Room 80, surroundings: what Spectrum depends on and does not own, for status() and health():
-- whether pg_cron runs and calls, and who keeps a transaction open.

CREATE FUNCTION spectrum._longest_pause(p_cron text)
RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN p_cron ~ '^[0-9]+ seconds?$' THEN p_cron::interval
        WHEN p_cron ~ '^@' THEN CASE p_cron
            WHEN '@hourly' THEN interval '1 hour'
            WHEN '@daily' THEN interval '1 day'
            WHEN '@midnight' THEN interval '1 day'
            WHEN '@weekly' THEN interval '7 days'
            WHEN '@monthly' THEN interval '31 days'
            WHEN '@yearly' THEN interval '366 days'
            WHEN '@annually' THEN interval '366 days'
        END
        WHEN parts.field[4] <> '*' THEN interval '366 days'
        WHEN parts.field[3] <> '*' THEN interval '31 days'
        WHEN parts.field[5] <> '*' THEN interval '7 days'
        WHEN parts.field[2] ~ '^\*/[0-9]{1,2}$'
            THEN make_interval(hours => substr(parts.field[2], 3)::integer)
        WHEN parts.field[2] <> '*' THEN interval '1 day'
        WHEN parts.field[1] ~ '^\*/[0-9]{1,2}$'
            THEN make_interval(mins => substr(parts.field[1], 3)::integer)
        WHEN parts.field[1] <> '*' THEN interval '1 hour'
        ELSE interval '1 minute'
    END
    FROM (
        SELECT string_to_array(regexp_replace(btrim(p_cron), '\s+', ' ', 'g'), ' ') AS field
    ) AS parts
$$;
COMMENT ON FUNCTION spectrum._longest_pause(text) IS
    'How long a cron schedule pauses at most, roughly and never too short; NULL where that cannot '
    'be said.';

CREATE FUNCTION spectrum._cron_is_down()
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Its launcher is no backend of any user, yet its name and database can be seen by all.
    RETURN NOT EXISTS (
        SELECT FROM pg_stat_activity AS activity
        WHERE activity.backend_type = 'pg_cron launcher'
            OR activity.application_name = 'pg_cron scheduler'
    ) AND NOT pg_is_in_recovery();
END
$$;
COMMENT ON FUNCTION spectrum._cron_is_down() IS
    'Whether no launcher of pg_cron runs in this server.';

CREATE FUNCTION spectrum._cron_advice(p_remark text, p_last_message text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE
        WHEN p_remark LIKE '%switched off' THEN format(
            'SELECT cron.alter_job(jobid, active => true) FROM cron.job WHERE jobname = %L;',
            spectrum._job_name())
        WHEN p_remark LIKE '%pg_cron does not run%' AND current_setting('cron.database_name', true)
            IS NULL THEN 'As the server''s administrator: add pg_cron to shared_preload_libraries '
            'and restart. Until then: CALL spectrum.run();'
        WHEN p_remark LIKE '%pg_cron does not run%' THEN 'As the server''s administrator: restart '
            'the server, which alone starts pg_cron''s launcher, and look into its log for why it '
            'ended. Until then: CALL spectrum.run();'
        WHEN p_last_message LIKE 'could not start background process%' THEN format(
            'All background workers of the server are taken: raise max_worker_processes (now %s) '
            'and restart, or end jobs: SELECT pid, datname, query FROM pg_stat_activity WHERE '
            'backend_type LIKE ''pg_cron%%'';', current_setting('max_worker_processes'))
        WHEN p_remark LIKE '%overdue%' THEN format(
            'pg_cron runs %s jobs at once (cron.max_running_jobs) and lets others wait: SELECT '
            'jobid, start_time, command FROM cron.job_run_details WHERE status = ''running''; and '
            'look into the server''s log. Until then: CALL spectrum.run();',
            coalesce(current_setting('cron.max_running_jobs', true), 'some'))
        ELSE 'SELECT spectrum.schedule(); where pg_cron is missing, the error says what helps.'
    END;
END
$$;
COMMENT ON FUNCTION spectrum._cron_advice(text, text) IS
    'What to do where pg_cron does not call, by what _cron_state() says of it.';

CREATE FUNCTION spectrum._cron_state(
    OUT schedule text,
    OUT is_active boolean,
    OUT last_end timestamptz,
    OUT last_status text,
    OUT remark text,
    OUT last_message text
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_down text := CASE WHEN spectrum._cron_is_down() THEN ', but pg_cron does not run' END;
    v_last_start timestamptz;
BEGIN
    IF to_regnamespace('cron') IS NULL THEN
        remark := 'pg_cron is not in this database' || coalesce(
            (SELECT ', it lives in ' || quote_ident(setting)
                || CASE WHEN v_down IS NULL THEN '' ELSE ' and does not run' END
            FROM pg_settings WHERE name = 'cron.database_name'), '');
        RETURN;
    ELSIF NOT has_schema_privilege('cron', 'USAGE') THEN
        remark := format('role %s may not look into pg_cron', current_user);
        RETURN;
    END IF;
    EXECUTE 'SELECT job.schedule, job.active FROM cron.job '
        'WHERE job.jobname = $1 ORDER BY job.active DESC, job.jobid LIMIT 1'
    INTO schedule, is_active USING spectrum._job_name();
    IF schedule IS NULL THEN
        remark := 'not scheduled';
        RETURN;
    END IF;
    EXECUTE 'SELECT details.start_time, details.end_time, details.status, details.return_message '
        'FROM cron.job_run_details AS details '
        'JOIN cron.job USING (jobid) WHERE job.jobname = $1 ORDER BY details.runid DESC LIMIT 1'
    INTO v_last_start, last_end, last_status, last_message USING spectrum._job_name();
    last_message := CASE WHEN last_status = 'failed'
        THEN btrim(translate(last_message, E'\n\r', '  ')) END;
    -- Where pg_cron keeps no log (cron.log_run = off), Spectrum's own says when a run began.
    v_last_start := greatest(v_last_start, last_end, (
        SELECT max(log.started_at) FROM spectrum.run_log AS log WHERE log.step = 'run'
    ));
    remark := 'scheduled' || CASE
        WHEN NOT is_active THEN ', but switched off'
        WHEN pg_is_in_recovery() THEN '; on a standby pg_cron begins with its promotion'
        WHEN v_down IS NOT NULL THEN v_down
        WHEN last_status IS DISTINCT FROM 'running' AND v_last_start
            < now() - interval '1 minute' - 3 * spectrum._longest_pause(schedule)
            THEN format(', but overdue: nothing began since %s', date_trunc('second', v_last_start))
        ELSE ''
    END;
END
$$;
COMMENT ON FUNCTION spectrum._cron_state() IS
    'What pg_cron knows about this database''s job, as far as the caller may see it, and whether '
    'it does its work.';

CREATE FUNCTION spectrum._idle_transactions()
RETURNS TABLE (who text, what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_until timestamptz := now() - (SELECT config.max_idle FROM spectrum.config);
BEGIN
    RETURN QUERY
    SELECT
        format('process %s of %s%s, %s since %s', activity.pid, activity.usename,
            coalesce(' (' || nullif(activity.application_name, '') || ')', ''), activity.state,
            date_trunc('second', activity.state_change)),
        format('SELECT pg_terminate_backend(%s);', activity.pid)
    FROM pg_stat_activity AS activity
    WHERE activity.datname = current_database() AND activity.pid <> pg_backend_pid()
        AND activity.state LIKE 'idle in transaction%' AND activity.state_change < v_until
    ORDER BY activity.state_change;
    RETURN QUERY
    SELECT
        format('transaction %L, prepared by %s, since %s', prepared.gid, prepared.owner,
            date_trunc('second', prepared.prepared)),
        format('ROLLBACK PREPARED %L;', prepared.gid)
    FROM pg_prepared_xacts AS prepared
    WHERE prepared.database = current_database() AND prepared.prepared < v_until
    ORDER BY prepared.prepared;
END
$$;
COMMENT ON FUNCTION spectrum._idle_transactions() IS
    'Transactions that are open in this database and have done nothing for config.max_idle: who, '
    'since when, what ends each. Sessions of other roles show to members of pg_read_all_stats.';
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
                LIMIT 3) AS flood) AS flooded_by
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
    FROM spectrum.pipeline AS state;
    COMMENT ON VIEW analytics.pipeline_status IS
        'The state of the pipeline, one row, for dashboards: see spectrum.pipeline.';

    CREATE VIEW analytics.pipeline WITH (security_barrier) AS
    SELECT
        log.log_id, log.run_id, log.step, log.started_at, log.finished_at,
        extract(epoch FROM log.finished_at - log.started_at)::double precision AS seconds,
        log.claimed, log.loaded, log.duplicates, log.failed, log.detail,
        log.error_msg IS NOT NULL AS has_error
    FROM spectrum.run_log AS log;
    COMMENT ON VIEW analytics.pipeline IS
        'The run log for dashboards, without the texts of errors: see spectrum.run_log.';
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
    OUT idle_transactions text
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
        (SELECT string_agg(idle.who, '; ') FROM spectrum._idle_transactions() AS idle)
    INTO
        pending, processing, done, failed, to_retry,
        oldest_pending_seconds, last_batch_at, last_run_at,
        last_run_error, months_ready, last_refresh_at, as_of,
        lag_seconds, cron, cron_schedule, cron_last_status, cron_last_end,
        uncounted, reports_building, flooded_by, cron_last_message, idle_transactions
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
    WHERE recent.day >= spectrum.period_date(now()) - 1
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

    RETURN QUERY SELECT 'tasks', count(*) = 0,
        coalesce(string_agg(format('%s (task %s): %s', task.kind, task.task_id, task.error_msg),
            '; '), 'none failed in a day'),
        'SELECT * FROM spectrum.tasks; and once the cause is gone, ask for it again.'
    FROM spectrum.tasks AS task
    WHERE task.error_msg IS NOT NULL AND (task.finished_at > now() - interval '1 day'
        OR task.state = 'running');

    RETURN QUERY SELECT 'floods', r_state.flooded_by IS NULL,
        coalesce(r_state.flooded_by, 'no account holds up the others'),
        'The events of others go before. Ask the sender; for more workers at once call '
        'spectrum.process_batch() from further sessions.';

    RETURN QUERY SELECT 'caps', refused.ok, refused.message, refused.what_to_do
    FROM spectrum._check_caps() AS refused;

    RETURN QUERY SELECT 'ownership', owner.ok, owner.message, owner.what_to_do
    FROM spectrum._check_ownership() AS owner;

    RETURN QUERY SELECT 'standby', standby.ok, standby.message, standby.what_to_do
    FROM spectrum._check_standby() AS standby;
END
$$;
COMMENT ON FUNCTION spectrum.health() IS
    'What is wrong and what to do about it, one row a check.';
-- Room 80, verify: the proof. Each check makes something again from what it came from and compares.

CREATE FUNCTION spectrum._verify_facts()
RETURNS TABLE (check_name text, expected bigint, actual bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT 'raw events done are facts or copies',
        count(*),
        count(*) FILTER (WHERE raw.copy_of IS NOT NULL OR ledger.event_id IS NOT NULL)
    FROM @extschema@.raw_events AS raw
    LEFT JOIN warehouse.event_ledger AS ledger USING (seq)
    WHERE raw.status = 'done';

    RETURN QUERY
    SELECT 'raw events not done are no facts', 0::bigint, count(*)
    FROM @extschema@.raw_events AS raw
    JOIN warehouse.event_ledger AS ledger USING (seq)
    WHERE raw.status = 'failed';

    RETURN QUERY
    SELECT 'facts equal what their raw events say', count(*), count(*) FILTER (
        WHERE (fact.event_id, fact.occurred_at, fact.event_type, fact.account_id, fact.user_id,
            fact.country, fact.region, fact.city, fact.properties, fact.revenue, fact.currency)
        IS NOT DISTINCT FROM (reading.event_id, reading.occurred_at, reading.event_type,
            nullif(reading.account_id, ''), nullif(reading.user_id, ''),
            nullif(reading.country, ''), nullif(reading.region, ''), nullif(reading.city, ''),
            reading.properties, reading.revenue, reading.currency)
    )
    FROM warehouse.event_ledger AS ledger
    JOIN spectrum.readings AS reading USING (seq)
    LEFT JOIN analytics.events AS fact
        ON fact.event_id = ledger.event_id AND fact.occurred_at = ledger.occurred_at
            AND fact.user_key = ledger.user_key
    WHERE reading.status = 'done' AND reading.refused_by IS NULL;

    RETURN QUERY
    SELECT 'ledger and facts name the same events', count(*),
        count(*) FILTER (WHERE ledger.event_id IS NOT NULL AND fact.event_id IS NOT NULL)
    FROM warehouse.event_ledger AS ledger
    FULL JOIN warehouse.fact_events AS fact USING (event_id, occurred_at, user_key);

    RETURN QUERY
    SELECT 'every key of a fact is in its dimension', count(*), count(*) FILTER (
        WHERE dim_accounts.account_key IS NOT NULL AND dim_users.user_key IS NOT NULL
            AND dim_event_types.event_type_key IS NOT NULL AND dim_geography.geo_key IS NOT NULL
    )
    FROM warehouse.fact_events AS fact
    LEFT JOIN warehouse.dim_accounts USING (account_key)
    LEFT JOIN warehouse.dim_users USING (user_key)
    LEFT JOIN warehouse.dim_event_types USING (event_type_key)
    LEFT JOIN warehouse.dim_geography USING (geo_key);
END
$$;
COMMENT ON FUNCTION spectrum._verify_facts() IS
    'Checks of verify(): facts against raw events, ledger and dimensions.';

CREATE FUNCTION spectrum.verify()
RETURNS TABLE (check_name text, expected bigint, actual bigint, ok boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_view record;
    v_source text := coalesce(current_setting('spectrum.from_facts', true), '');
BEGIN
    PERFORM set_config('spectrum.from_facts', 'on', true);
    RETURN QUERY
    SELECT facts.check_name, facts.expected, facts.actual, facts.expected = facts.actual
    FROM spectrum._verify_facts() AS facts;

    FOR r_view IN
        SELECT view.name, string_agg(format('%I', shown.attname), ', ' ORDER BY shown.attnum)
            AS columns
        FROM spectrum.report_kinds AS kind
        CROSS JOIN LATERAL unnest(kind.views) WITH ORDINALITY AS view (name, number)
        JOIN pg_attribute AS shown
            ON shown.attrelid = format('analytics.%I', view.name)::regclass
                AND shown.attnum > 0 AND shown.attname <> 'as_of'
        GROUP BY kind.position, view.number, view.name
        ORDER BY kind.position, view.number
    LOOP
        RETURN QUERY EXECUTE format(
            'WITH made_again AS MATERIALIZED (SELECT %s FROM analytics.%I()), '
            'shown AS MATERIALIZED (SELECT %1$s FROM analytics.%3$I), differences AS ('
            '(SELECT * FROM made_again EXCEPT ALL SELECT * FROM shown) UNION ALL '
            '(SELECT * FROM shown EXCEPT ALL SELECT * FROM made_again)) '
            'SELECT %4$L, 0::bigint, count(*), count(*) = 0 FROM differences',
            r_view.columns, '_standing_' || r_view.name, r_view.name,
            r_view.name || ': rows that differ when made again');
    END LOOP;
    PERFORM set_config('spectrum.from_facts', v_source, true);
END
$$;
COMMENT ON FUNCTION spectrum.verify() IS
    'Makes the facts again from the raw events and the standing views from the facts, and '
    'compares: one row a check. Reads everything, so its cost follows the history. A view is '
    'behind, not wrong, where events came since its last refresh.';
-- Room 80, reprocess: raw events that are to be read again, with today's rules and settings.

CREATE FUNCTION spectrum._check_reprocess(p_arguments jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_arguments(p_arguments, '{"from": "timestamptz", "to": "timestamptz", '
        '"status": "text", "event_type": "text", "error": "text"}');
    PERFORM spectrum._check_choice(
        'p_status', coalesce(p_arguments ->> 'status', 'failed'), ARRAY['failed', 'done', 'all']
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_reprocess(jsonb) IS 'Refuses what reprocess cannot take.';

CREATE FUNCTION spectrum._do_reprocess(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    r_task record;
    v_until bigint;
    v_rows bigint;
BEGIN
    SELECT task.position, task.total, task.arguments, task.started_at INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    IF r_task.total IS NULL THEN
        SELECT coalesce(min(raw.seq) - 1, 0), coalesce(max(raw.seq), 0)
        INTO r_task.position, r_task.total
        FROM @extschema@.raw_events AS raw;
    END IF;
    SELECT max(chunk.seq), count(*) INTO v_until, v_rows
    FROM (
        SELECT raw.seq FROM @extschema@.raw_events AS raw
        WHERE raw.seq > r_task.position AND raw.seq <= r_task.total
        ORDER BY raw.seq
        LIMIT 20000
    ) AS chunk;

    WITH set_back AS (
        UPDATE @extschema@.raw_events AS raw
        SET status = 'pending'
        WHERE raw.seq > r_task.position AND raw.seq <= v_until
            AND raw.status IN ('failed', 'done')
            AND coalesce(r_task.arguments ->> 'status', 'failed') IN ('all', raw.status)
            AND raw.received_at >= coalesce((r_task.arguments ->> 'from')::timestamptz, '-infinity')
            AND raw.received_at < coalesce((r_task.arguments ->> 'to')::timestamptz, 'infinity')
            AND (NOT r_task.arguments ? 'event_type'
                OR raw.payload ->> 'event_type' = r_task.arguments ->> 'event_type')
            AND (NOT r_task.arguments ? 'error' OR raw.error_msg LIKE r_task.arguments ->> 'error')
        RETURNING raw.seq
    )
    UPDATE spectrum.tasks AS task
    SET position = coalesce(v_until, r_task.total),
        done = task.done + v_rows,
        total = r_task.total,
        unit = 'raw events',
        outcome = jsonb_build_object('requeued',
            coalesce((task.outcome ->> 'requeued')::bigint, 0) + (SELECT count(*) FROM set_back))
    WHERE task.task_id = p_task_id;
    RETURN coalesce(v_until < r_task.total, false);
END
$$;
COMMENT ON FUNCTION spectrum._do_reprocess(bigint) IS
    'Step of reprocess: the next 20,000 raw events. Its position is the last seq looked at.';

CREATE PROCEDURE spectrum.reprocess(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_status text DEFAULT 'failed',
    p_event_type text DEFAULT NULL,
    p_error text DEFAULT NULL,
    INOUT requeued bigint DEFAULT NULL
)
LANGUAGE plpgsql
AS $$
DECLARE
    v_task_id bigint;
    v_has_more boolean := true;
BEGIN
    -- Inside a transaction block this fails, before anything is done.
    COMMIT;
    v_task_id := spectrum.request('reprocess', pg_catalog.jsonb_build_object(
        'from', p_from, 'to', p_to, 'status', p_status, 'event_type', p_event_type, 'error', p_error
    ));
    WHILE v_has_more LOOP
        COMMIT;
        v_has_more := spectrum._work_on_task(v_task_id);
    END LOOP;
    COMMIT;
    requeued := pg_catalog.jsonb_extract_path_text(
        spectrum._task_outcome(v_task_id), 'requeued'
    )::pg_catalog.int8;
END
$$;
COMMENT ON PROCEDURE spectrum.reprocess(timestamptz, timestamptz, text, text, text, bigint) IS
    'Sets raw events back to pending and returns how many: those received in [p_from, p_to), of '
    'status failed (default), done or all, of one event type, with an error_msg LIKE p_error. The '
    'next batches read them again, with today''s rules and settings; nothing is counted twice. '
    'Done in steps, a commit after each: call it outside of a transaction block.';
-- Room 80, purge_raw: raw events that are done may go after a while. Their facts stay, and so do
-- their entries in the ledger: a copy that comes later is still a copy. What goes with them is the
-- way back: they cannot be read again, and nothing can be compared with them.

CREATE FUNCTION spectrum._check_purge_raw(p_arguments jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_age text := p_arguments ->> 'older_than';
BEGIN
    PERFORM spectrum._check_arguments(
        p_arguments, '{"older_than": "interval", "failed": "boolean"}'
    );
    IF v_age IS NULL OR v_age::interval < interval '0' THEN
        PERFORM spectrum._reject('p_older_than', v_age, 'an age, such as 90 days');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_purge_raw(jsonb) IS 'Refuses what purge_raw cannot take.';

CREATE FUNCTION spectrum._first_seq(p_received_at timestamptz)
RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    v_low bigint;
    v_high bigint;
    v_middle bigint;
    r_row record;
BEGIN
    SELECT min(raw.seq), max(raw.seq) + 1 INTO v_low, v_high FROM @extschema@.raw_events AS raw;
    WHILE v_low < v_high LOOP
        v_middle := v_low + (v_high - v_low) / 2;
        SELECT raw.seq, raw.received_at INTO r_row FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= v_middle
        ORDER BY raw.seq
        LIMIT 1;
        IF r_row.received_at < p_received_at THEN
            v_low := r_row.seq + 1;
        ELSE
            v_high := v_middle;
        END IF;
    END LOOP;
    RETURN v_low;
END
$$;
COMMENT ON FUNCTION spectrum._first_seq(timestamptz) IS
    'About the seq from which on raw events were received at or after a time, by halving: the '
    'order of the two differs by the length of inserting transactions. NULL without raw events.';

CREATE FUNCTION spectrum._do_purge_raw(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    r_task record;
    v_before timestamptz;
    v_seqs bigint[];
    v_ids uuid[];
    v_until bigint;
BEGIN
    SELECT task.position, task.done, task.total, task.arguments, task.asked_at INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    v_before := r_task.asked_at - (r_task.arguments ->> 'older_than')::interval;
    -- total is the last seq to look at, less the first: rows that went before leave gaps.
    IF r_task.total IS NULL THEN
        SELECT min(raw.seq) - 1 INTO r_task.position FROM @extschema@.raw_events AS raw;
        r_task.total := coalesce(spectrum._first_seq(v_before) - 1 - r_task.position, 0);
        r_task.position := coalesce(r_task.position, 0);
    END IF;
    SELECT max(chunk.seq), array_agg(chunk.seq) FILTER (WHERE chunk.may_go),
        array_agg(chunk.id) FILTER (WHERE chunk.may_go)
    INTO v_until, v_seqs, v_ids
    FROM (
        SELECT raw.seq, raw.id, raw.received_at < v_before AND (raw.status = 'done'
                OR (raw.status = 'failed' AND raw.next_attempt_at IS NULL
                    AND (r_task.arguments ->> 'failed')::boolean)) AS may_go
        FROM @extschema@.raw_events AS raw
        WHERE raw.seq > r_task.position
            AND raw.seq <= r_task.position + r_task.total - r_task.done
        ORDER BY raw.seq
        LIMIT 20000
    ) AS chunk;

    -- What repeats a row that goes names the event itself from now on.
    UPDATE @extschema@.raw_events AS raw SET copy_of = reading.event_id
    FROM spectrum.readings AS reading
    WHERE raw.copy_of = ANY (v_ids) AND raw.seq <> ALL (v_seqs) AND reading.seq = raw.seq;
    WITH gone AS (
        -- As they are now: one that was set back meanwhile stays.
        DELETE FROM @extschema@.raw_events AS raw
        WHERE raw.seq = ANY (v_seqs) AND raw.status IN ('done', 'failed')
        RETURNING raw.status
    )
    UPDATE spectrum.tasks AS task
    SET position = coalesce(v_until, r_task.position),
        done = CASE WHEN v_until IS NULL THEN r_task.total
            ELSE r_task.done + v_until - r_task.position END,
        total = r_task.total,
        unit = 'places in the receive order',
        outcome = jsonb_build_object(
            'received_before', v_before,
            'deleted', coalesce((task.outcome ->> 'deleted')::bigint, 0)
                + (SELECT count(*) FROM gone)
        )
    WHERE task.task_id = p_task_id;
    RETURN v_until IS NOT NULL;
END
$$;
COMMENT ON FUNCTION spectrum._do_purge_raw(bigint) IS
    'Step of purge_raw: the next 20,000 raw events. Its position is the last seq looked at.';

CREATE PROCEDURE spectrum.purge_raw(
    p_older_than interval,
    p_failed boolean DEFAULT false,
    INOUT deleted bigint DEFAULT NULL
)
LANGUAGE plpgsql
AS $$
DECLARE
    v_task_id bigint;
    v_has_more boolean := true;
BEGIN
    -- Inside a transaction block this fails, before anything is done.
    COMMIT;
    v_task_id := spectrum.request('purge_raw', pg_catalog.jsonb_build_object(
        'older_than', p_older_than, 'failed', p_failed
    ));
    WHILE v_has_more LOOP
        COMMIT;
        v_has_more := spectrum._work_on_task(v_task_id);
    END LOOP;
    COMMIT;
    deleted := pg_catalog.jsonb_extract_path_text(
        spectrum._task_outcome(v_task_id), 'deleted'
    )::pg_catalog.int8;
END
$$;
COMMENT ON PROCEDURE spectrum.purge_raw(interval, boolean, bigint) IS
    'Deletes raw events that are done, and failed ones if asked for, received longer ago than '
    'p_older_than, and returns how many. Facts, ledger and every number stay; what is deleted '
    'cannot be read again. Done in steps, a commit after each: call it outside of a transaction '
    'block. config.raw_keep has it done by the runs.';

CREATE FUNCTION spectrum._request_purge_raw()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    v_keep interval := (SELECT config.raw_keep FROM spectrum.config);
BEGIN
    -- A tenth more than is kept, so that it is some purges in that time, not one a run.
    IF v_keep IS NOT NULL
        AND NOT EXISTS (
            SELECT FROM spectrum.tasks AS task
            WHERE task.kind = 'purge_raw' AND task.state IN ('waiting', 'running')
        )
        AND EXISTS (
            SELECT FROM (
                SELECT raw.received_at FROM @extschema@.raw_events AS raw
                WHERE raw.seq > coalesce((
                        SELECT max(task.position) FROM spectrum.tasks AS task
                        WHERE task.kind = 'purge_raw' AND task.state = 'done'
                    ), 0)
                    AND raw.status = 'done'
                ORDER BY raw.seq
                LIMIT 1
            ) AS oldest
            WHERE oldest.received_at < now() - v_keep * 1.1
        )
    THEN
        PERFORM spectrum.request('purge_raw', jsonb_build_object('older_than', v_keep));
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._request_purge_raw() IS
    'Asks for a purge where config.raw_keep is set and older raw events are there.';
-- Room 80, migrations: what happens once to tables and views that a user has from an earlier
-- release. They are his, so neither ALTER EXTENSION UPDATE nor the restore of an old dump makes
-- them anew: setup() looks which release they are of and brings them to this one.
--
-- A new table, index or view needs nothing here where it has a _create_ function of its own. The
-- text of every view and comment is taken from the _create_ functions. All else that changed in
-- tables that exist already stands in _migrate_tables().

CREATE FUNCTION spectrum._release()
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT '1.1'
$$;
COMMENT ON FUNCTION spectrum._release() IS 'The release that these functions are of.';

CREATE FUNCTION spectrum._create_releases()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.releases') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.releases (
        release_id serial NOT NULL CONSTRAINT releases_pkey PRIMARY KEY,
        release text NOT NULL,
        since timestamptz NOT NULL DEFAULT clock_timestamp(),
        migrated_from text,
        grants text[] NOT NULL DEFAULT '{}'
    );
    COMMENT ON TABLE spectrum.releases IS
        'The releases that made or migrated the tables; they are of the last one.';
    COMMENT ON COLUMN spectrum.releases.release_id IS 'Ascending.';
    COMMENT ON COLUMN spectrum.releases.release IS 'Such as 1.1.';
    COMMENT ON COLUMN spectrum.releases.since IS 'When.';
    COMMENT ON COLUMN spectrum.releases.migrated_from IS
        'The release that the tables were of; NULL where they were made.';
    COMMENT ON COLUMN spectrum.releases.grants IS
        'The grants to roles that were given again, so that they cover what is new.';

    CREATE CONSTRAINT TRIGGER renew_grants AFTER INSERT ON spectrum.releases
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW
    WHEN (new.grants <> '{}')
    EXECUTE FUNCTION spectrum._renew_grants();
    COMMENT ON TRIGGER renew_grants ON spectrum.releases IS
        'Grants at the end of the transaction: what a script of an extension grants is taken for '
        'a part of the extension, and left out of dumps.';
END
$$;
COMMENT ON FUNCTION spectrum._create_releases() IS
    'Room 80: makes spectrum.releases and the trigger that renews grants.';

CREATE FUNCTION spectrum._renew_grants()
RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_grant text;
BEGIN
    FOREACH v_grant IN ARRAY new.grants LOOP
        EXECUTE 'SELECT ' || v_grant;
    END LOOP;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION spectrum._renew_grants() IS
    'Trigger of releases: gives roles again what they had been granted, with all that is new.';

CREATE FUNCTION spectrum._granted_roles()
RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_for_analysts text[] := ARRAY['events', 'event_keys', 'timelines', 'user_days'];
    v_waiting text[];
BEGIN
    -- An update over several releases: what the one before renews at the end of the transaction.
    IF to_regclass('spectrum.releases') IS NOT NULL THEN
        v_waiting := ARRAY(
            SELECT unnest(made.grants) FROM spectrum.releases AS made WHERE made.since >= now());
    END IF;
    -- Who holds all that a grant covered; a part of it was granted by hand and is left alone.
    RETURN ARRAY(
        WITH held AS (
            SELECT acl.grantee, relation.relname::text AS relname
            FROM pg_class AS relation
            CROSS JOIN LATERAL aclexplode(relation.relacl) AS acl
            WHERE relation.relnamespace = 'analytics'::regnamespace AND relation.relkind = 'v'
                AND acl.privilege_type = 'SELECT' AND acl.grantee NOT IN (0, relation.relowner)
        ), readers AS (
            SELECT held.grantee, count(*) FILTER (WHERE held.relname = ANY (v_for_analysts))
                = cardinality(v_for_analysts) AS is_analyst
            FROM held
            GROUP BY held.grantee
            HAVING count(*) FILTER (WHERE held.relname <> ALL (v_for_analysts)) = (
                SELECT count(*) FROM pg_class AS relation
                WHERE relation.relnamespace = 'analytics'::regnamespace
                    AND relation.relkind = 'v' AND relation.relname::text <> ALL (v_for_analysts)
            )
        ), grants AS (
            SELECT CASE WHEN is_analyst THEN 'analyst' ELSE 'reader' END AS kind, grantee
            FROM readers
            UNION ALL
            SELECT 'ingest', acl.grantee
            FROM pg_attribute AS payload
            CROSS JOIN LATERAL aclexplode(payload.attacl) AS acl
            WHERE payload.attrelid = '@extschema@.raw_events'::regclass
                AND payload.attname = 'payload' AND acl.privilege_type = 'INSERT'
                AND acl.grantee <> 0
        )
        SELECT format('spectrum.grant_%s(%L)', grants.kind, grants.grantee::regrole)
        FROM grants
        UNION
        SELECT unnest(v_waiting)
        ORDER BY 1
    );
END
$$;
COMMENT ON FUNCTION spectrum._granted_roles() IS
    'The calls of grant_* that gave roles what they hold of the tables and views as they are.';

CREATE FUNCTION spectrum._tables_release()
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.config') IS NULL THEN
        RETURN NULL;
    ELSIF to_regclass('spectrum.releases') IS NULL THEN
        RETURN '1.0';
    END IF;
    RETURN (
        SELECT made.release FROM spectrum.releases AS made
        ORDER BY made.release_id DESC
        LIMIT 1
    );
END
$$;
COMMENT ON FUNCTION spectrum._tables_release() IS
    'The release that the tables are of; NULL where there are none.';

CREATE FUNCTION spectrum._require_release()
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF spectrum._tables_release() <> spectrum._release() THEN
        RAISE EXCEPTION 'the tables are of release %, the functions of %',
            spectrum._tables_release(), spectrum._release()
            USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'As their owner: SELECT spectrum.setup();';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._require_release() IS
    'Raises 55000 where the tables wait for their migration, as after the restore of an old dump.';

CREATE FUNCTION spectrum._migrate_tables()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Nobody else works meanwhile; a step under way is waited for.
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('run'));
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('refresh'));

    -- 1.0 to 1.1. Each step can be taken again; one that cannot asks spectrum._tables_release().
    ALTER TABLE spectrum.config
        ADD COLUMN IF NOT EXISTS raw_keep interval
            CONSTRAINT config_raw_keep_range CHECK (raw_keep >= '0'),
        ADD COLUMN IF NOT EXISTS max_payload_bytes integer NOT NULL DEFAULT 1048576
            CONSTRAINT config_max_payload_bytes_range
            CHECK (max_payload_bytes BETWEEN 2000 AND 1000000000),
        ADD COLUMN IF NOT EXISTS max_properties integer NOT NULL DEFAULT 1000
            CONSTRAINT config_max_properties_range CHECK (max_properties BETWEEN 1 AND 10000000),
        ADD COLUMN IF NOT EXISTS max_new_event_types integer NOT NULL DEFAULT 1000
            CONSTRAINT config_max_new_event_types_range CHECK (max_new_event_types >= 0),
        ADD COLUMN IF NOT EXISTS max_new_places integer NOT NULL DEFAULT 10000
            CONSTRAINT config_max_new_places_range CHECK (max_new_places >= 0),
        ADD COLUMN IF NOT EXISTS max_new_accounts integer NOT NULL DEFAULT 1000000
            CONSTRAINT config_max_new_accounts_range CHECK (max_new_accounts >= 0),
        ADD COLUMN IF NOT EXISTS account_share numeric NOT NULL DEFAULT 0.5
            CONSTRAINT config_account_share_range CHECK (account_share BETWEEN 0.05 AND 1),
        ADD COLUMN IF NOT EXISTS max_idle interval NOT NULL DEFAULT '5 minutes'
            CONSTRAINT config_max_idle_range CHECK (max_idle >= '1 ms');
    ALTER TABLE spectrum.intake ADD COLUMN IF NOT EXISTS late_seq bigint NOT NULL DEFAULT 0;
    ALTER TABLE spectrum.run_log DROP CONSTRAINT IF EXISTS run_log_step_is_known;
    ALTER TABLE spectrum.run_log ADD CONSTRAINT run_log_step_is_known
        CHECK (step IN ('run', 'provision', 'tasks', 'process', 'refresh', 'upkeep'));
    ALTER TABLE @extschema@.raw_events SET (
        autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05
    );
END
$$;
COMMENT ON FUNCTION spectrum._migrate_tables() IS
    'Brings tables of an earlier release to this one, before what is new is made: columns, '
    'constraints, indexes, triggers, storage.';

CREATE FUNCTION spectrum._replace_views(p_room text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_source text := (SELECT prosrc FROM pg_proc
        WHERE pronamespace = 'spectrum'::regnamespace AND proname = p_room);
    v_view regclass;
    r_statement record;
BEGIN
    FOR r_statement IN
        SELECT piece.words[1] AS text, piece.words[2] AS view
        FROM regexp_split_to_table(v_source, ';\n') WITH ORDINALITY AS part (text, number)
        CROSS JOIN LATERAL regexp_match(part.text,
            '^(?:\s|--[^\n]*\n)*((?:CREATE VIEW (\S+)|COMMENT ON)\s.*)$') AS piece (words)
        WHERE piece.words IS NOT NULL
        ORDER BY part.number
    LOOP
        v_view := to_regclass(r_statement.view);
        -- In an update's script only what belongs to the extension may be replaced; setup()
        -- releases it again.
        IF v_view IS NOT NULL AND EXISTS (SELECT FROM pg_extension WHERE extname = 'spectrum')
            AND NOT EXISTS (SELECT FROM pg_depend
                WHERE classid = 'pg_class'::regclass AND objid = v_view AND deptype = 'e')
        THEN
            EXECUTE format('ALTER EXTENSION spectrum ADD VIEW %s', v_view);
        END IF;
        EXECUTE regexp_replace(r_statement.text, '^CREATE VIEW', 'CREATE OR REPLACE VIEW');
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._replace_views(text) IS
    'Gives the views of a room the definition, and all it has the comments, that stand in its '
    '_create_ function: new columns come last, grants and what depends on a view stay.';
-- Room 80, setup: makes the tables and views, room by room, and gives them to the user. Members of
-- an extension are left out of dumps and vanish with DROP EXTENSION; events must not.

CREATE FUNCTION spectrum._release_data()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_member record;
BEGIN
    FOR r_member IN
        SELECT
            member.oid::regclass AS name,
            CASE member.relkind
                WHEN 'v' THEN 'VIEW'
                WHEN 'm' THEN 'MATERIALIZED VIEW'
                WHEN 'S' THEN 'SEQUENCE'
                ELSE 'TABLE'
            END AS kind
        FROM pg_extension AS extension
        JOIN pg_depend AS depend
            ON depend.refclassid = 'pg_extension'::regclass AND depend.refobjid = extension.oid
                AND depend.classid = 'pg_class'::regclass AND depend.deptype = 'e'
        JOIN pg_class AS member ON member.oid = depend.objid
        WHERE extension.extname = 'spectrum'
        ORDER BY member.oid
    LOOP
        EXECUTE format('ALTER EXTENSION spectrum DROP %s %s', r_member.kind, r_member.name);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._release_data() IS
    'Takes every table, view and sequence out of the extension, so that dumps hold them whole and '
    'DROP EXTENSION refuses while they exist.';

CREATE FUNCTION spectrum.setup()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from text := spectrum._tables_release();
    v_migrates boolean := v_from IS NOT NULL AND v_from <> spectrum._release();
    v_grants text[] := ARRAY[]::text[];
    v_room text;
BEGIN
    IF v_migrates THEN
        v_grants := spectrum._granted_roles();
        PERFORM spectrum._migrate_tables();
    END IF;
    -- In the order of the rooms: each one's views may read what stands before it.
    FOREACH v_room IN ARRAY ARRAY[
        'releases', 'config', 'run_log', 'raw_events', 'intake', 'reading', 'floods',
        'dimensions', 'caps', 'facts', 'news', 'reports', 'events', 'daily_events',
        'active_users', 'lifecycle', 'stickiness', 'revenue', 'funnels', 'retention',
        'sessions', 'features', 'cohorts', 'feature_adoption', 'own_reports', 'mrr',
        'operations', 'event_catalog', 'experiments', 'glass', 'tasks', 'status'
    ] LOOP
        EXECUTE format('SELECT spectrum.%I()', '_create_' || v_room);
        IF v_migrates THEN
            PERFORM spectrum._replace_views('_create_' || v_room);
        END IF;
    END LOOP;
    PERFORM spectrum._provision();
    PERFORM spectrum._serve_first_reports();
    PERFORM spectrum._release_data();
    IF v_from IS NULL OR v_migrates THEN
        INSERT INTO spectrum.releases (release, migrated_from, grants)
        VALUES (spectrum._release(), v_from, v_grants);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum.setup() IS
    'Makes what is missing of Spectrum''s tables and views and gives it to the user; brings those '
    'of an earlier release to this one. CREATE EXTENSION and ALTER EXTENSION UPDATE call it; after '
    'the restore of an earlier release''s dump call it by hand. Calling it again changes nothing.';
-- Room 90: privileges. Nothing is granted to PUBLIC. Roles are the user's own; grant_* gives one
-- what its work needs and nothing else, revoke_* takes the same away again.

CREATE FUNCTION spectrum._set_privilege(p_privilege text, p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_role IS NULL THEN
        PERFORM spectrum._reject('p_role', NULL, 'a role');
    END IF;
    EXECUTE CASE WHEN p_is_granted
        THEN format('GRANT %s TO %s', p_privilege, p_role)
        ELSE format('REVOKE %s FROM %s', p_privilege, p_role)
    END;
END
$$;
COMMENT ON FUNCTION spectrum._set_privilege(text, regrole, boolean) IS
    'Grants or revokes one privilege, written as between GRANT and TO.';

CREATE FUNCTION spectrum._set_ingest(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege(
        'INSERT (payload) ON @extschema@.raw_events', p_role, p_is_granted);
    -- The schema is the user's: what others grant there is not ours to revoke.
    IF p_is_granted THEN
        PERFORM spectrum._set_privilege('USAGE ON SCHEMA @extschema@', p_role, true);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._set_ingest(regrole, boolean) IS 'What grant_ingest covers.';

CREATE FUNCTION spectrum._set_reader(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege('USAGE ON SCHEMA analytics', p_role, p_is_granted);
    PERFORM spectrum._set_privilege(
        format('SELECT ON %s', view.oid::regclass), p_role, p_is_granted)
    FROM pg_class AS view
    WHERE view.relnamespace = 'analytics'::regnamespace AND view.relkind = 'v'
        AND view.relname NOT IN ('events', 'event_keys', 'timelines', 'user_days');
END
$$;
COMMENT ON FUNCTION spectrum._set_reader(regrole, boolean) IS 'What grant_reader covers.';

CREATE FUNCTION spectrum._set_analyst(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_reader(p_role, p_is_granted);
    PERFORM spectrum._set_privilege(
        'SELECT ON analytics.events, analytics.event_keys, analytics.timelines, '
        'analytics.user_days', p_role, p_is_granted);
    PERFORM spectrum._set_privilege('USAGE ON SCHEMA spectrum', p_role, p_is_granted);
    -- All questions, and what they call: mathematics, checks, the calendar. They may stand in a
    -- parallel plan; what works the pipeline or keeps the standing views may not.
    PERFORM spectrum._set_privilege(
        format('EXECUTE ON FUNCTION %s', routine.oid::regprocedure), p_role, p_is_granted)
    FROM pg_proc AS routine
    WHERE routine.prokind IN ('f', 'a') AND routine.proparallel IN ('s', 'r')
        AND routine.pronamespace IN ('analytics'::regnamespace, 'spectrum'::regnamespace);
END
$$;
COMMENT ON FUNCTION spectrum._set_analyst(regrole, boolean) IS 'What grant_analyst covers.';

CREATE FUNCTION spectrum.grant_ingest(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_ingest(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_ingest(regrole) IS
    'Lets a role insert payloads into raw_events, and nothing else: it reads nothing.';

CREATE FUNCTION spectrum.revoke_ingest(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_ingest(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_ingest(regrole) IS
    'Takes back what grant_ingest gave, but for USAGE of the schema of raw_events.';

CREATE FUNCTION spectrum.grant_reader(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_reader(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_reader(regrole) IS
    'Lets a role, say a dashboard''s, read the standing views of analytics, and nothing else.';

CREATE FUNCTION spectrum.revoke_reader(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_reader(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_reader(regrole) IS 'Takes back what grant_reader gave.';

CREATE FUNCTION spectrum.grant_analyst(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_analyst(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_analyst(regrole) IS
    'Lets a role read the standing views, ask any question by the functions of analytics, and read '
    'the event view that they read.';

CREATE FUNCTION spectrum.revoke_analyst(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_analyst(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_analyst(regrole) IS 'Takes back what grant_analyst gave.';

REVOKE ALL ON ALL ROUTINES IN SCHEMA spectrum, warehouse, analytics FROM PUBLIC;
-- The end of the script. A restore sets row_security to off before it creates the extension, and
-- brings the tables itself.
SELECT spectrum.setup()
WHERE pg_catalog.current_setting('row_security') OPERATOR(pg_catalog.=) 'on';
