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
-- Also here: the three ways in which an argument is refused, so that all refusals look alike.

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
            CONSTRAINT config_cron_log_keep_range CHECK (cron_log_keep >= '1 hour')
    );
    COMMENT ON TABLE spectrum.config IS
        'Settings, one row. Change one with spectrum.configure(setting, value); it takes effect with '
        'the next statement, nothing is restarted.';
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

    IF v_after IS DISTINCT FROM v_before THEN
        PERFORM spectrum._mark_stale();
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
            CHECK (step IN ('run', 'provision', 'process', 'refresh', 'upkeep')),
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
        'run (the whole), provision, process (one batch), refresh or upkeep.';
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
-- Room 20: staging. Events arrive in raw_events untouched and stay as they came; status says how
-- far each one is. What is claimed next is found without an index on status, because such an
-- index would make every status update write new index entries (655 against 84 bytes of WAL per
-- event). Instead:
--   seq      receive order, indexed. Claims walk it from spectrum.intake.head_seq on.
--   requeue  the exceptions, by seq: rows set back to pending, rows to retry, lapsed leases.
-- Pages are filled by half, so that all rows of a page can be marked in place (HOT).

CREATE FUNCTION spectrum._create_staging()
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
    ) WITH (fillfactor = 50);
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
        seen_xid xid8,
        patrol_seq bigint NOT NULL DEFAULT 0
    );
    COMMENT ON TABLE spectrum.intake IS 'Where claims begin, one row. Hints only: no event depends '
        'on them being right, a stale one costs time.';
    COMMENT ON COLUMN spectrum.intake.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.intake.head_seq IS
        'Everything below was claimed once, or was not visible yet. Claims begin here.';
    COMMENT ON COLUMN spectrum.intake.safe_seq IS
        'Nothing below is pending. Between here and head_seq lie late commits and rows of workers '
        'that were rolled back: swept when the head is drained.';
    COMMENT ON COLUMN spectrum.intake.seen_seq IS 'head_seq when seen_xid was noted.';
    COMMENT ON COLUMN spectrum.intake.seen_xid IS
        'Next transaction id at that time: once no older one runs, safe_seq may move to seen_seq.';
    COMMENT ON COLUMN spectrum.intake.patrol_seq IS
        'How far the slow round over all of raw_events has come.';
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
COMMENT ON FUNCTION spectrum._create_staging() IS
    'Room 20: makes raw_events, spectrum.requeue and spectrum.intake.';

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
    'Trigger of raw_events: notes a row to claim out of turn; a processing row once its lease ends.';
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
            WHEN txt.event_id ~ '^[0-9A-Fa-f]{8}-?(?:[0-9A-Fa-f]{4}-?){3}[0-9A-Fa-f]{12}$'
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
        END AS error_msg
    FROM @extschema@.raw_events AS raw
    CROSS JOIN spectrum.config
    CROSS JOIN LATERAL (
        SELECT
            raw.payload -> 'event_id' AS event_id,
            raw.payload -> 'event_type' AS event_type,
            raw.payload -> 'account_id' AS account_id,
            raw.payload -> 'user_id' AS user_id,
            raw.payload -> 'geo' AS geo,
            raw.payload #> '{geo,country}' AS country,
            raw.payload #> '{geo,region}' AS region,
            raw.payload #> '{geo,city}' AS city,
            raw.payload -> 'properties' AS properties,
            raw.payload -> 'properties' -> config.revenue_property AS revenue,
            coalesce(nullif(raw.payload -> 'occurred_at', 'null'), raw.payload -> 'timestamp')
                AS occurred_at,
            CASE WHEN raw.payload -> 'occurred_at' <> 'null' THEN 'occurred_at' ELSE 'timestamp' END
                AS time_field
        OFFSET 0
    ) AS part
    CROSS JOIN LATERAL (
        SELECT
            part.event_id #>> '{}' AS event_id,
            part.event_type #>> '{}' AS event_type,
            part.account_id #>> '{}' AS account_id,
            part.user_id #>> '{}' AS user_id,
            part.country #>> '{}' AS country,
            part.region #>> '{}' AS region,
            part.city #>> '{}' AS city,
            part.occurred_at #>> '{}' AS occurred_at,
            part.revenue #>> '{}' AS revenue
        OFFSET 0
    ) AS txt
    CROSS JOIN LATERAL (
        SELECT
            CASE
                WHEN txt.occurred_at IS NULL THEN raw.received_at
                WHEN jsonb_typeof(part.occurred_at) NOT IN ('string', 'number') THEN NULL
                -- A calendar day and a time of day with a zone, none meaning UTC ...
                WHEN txt.occurred_at ~ ('^[1-9]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])'
                    '(?:[T ](?:[01]\d|2[0-3]):[0-5]\d(?::(?:[0-5]\d|60)(?:\.\d{1,9})?)?'
                    '(?: ?(?:Z|[+-](?:0\d|1[0-5])(?::?[0-5]\d)?))?)?$')
                    THEN CASE
                        WHEN substr(txt.occurred_at, 6, 5)
                            IN ('02-30', '02-31', '04-31', '06-31', '09-31', '11-31')
                            THEN NULL
                        WHEN substr(txt.occurred_at, 6, 5) = '02-29'
                            AND extract(day FROM make_date(left(txt.occurred_at, 4)::integer, 3, 1)
                                - interval '1 day') <> 29
                            THEN NULL
                        WHEN substr(txt.occurred_at, 12) ~ '[Z+-]'
                            THEN txt.occurred_at::timestamptz
                        ELSE (txt.occurred_at || ' UTC')::timestamptz
                    END
                -- ... or epoch seconds; from 10^11 on (the year 5138) they are milliseconds.
                WHEN jsonb_typeof(part.occurred_at) = 'number'
                    OR txt.occurred_at ~ '^-?\d{1,15}(?:\.\d{1,9})?$'
                    THEN CASE
                        WHEN abs(txt.occurred_at::numeric) < 1e11
                            THEN to_timestamp(txt.occurred_at::numeric::double precision)
                        WHEN abs(txt.occurred_at::numeric) < 1e14
                            THEN to_timestamp((txt.occurred_at::numeric / 1000)::double precision)
                    END
            END AS occurred_at,
            CASE
                WHEN jsonb_typeof(part.revenue) = 'number'
                    OR (jsonb_typeof(part.revenue) = 'string' AND txt.revenue
                        ~ '^[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,2})?$')
                    THEN CASE
                        WHEN abs(txt.revenue::numeric) < 1e15 THEN txt.revenue::numeric
                    END
            END AS revenue
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
    row_ids := coalesce(row_ids, '{}');
END
$$;
COMMENT ON FUNCTION spectrum._claim_between(bigint, bigint, integer) IS
    'Locks at most p_limit pending rows with p_from <= seq < p_to, in receive order. The plan is '
    'pinned to the index on seq: statistics of a table that fills and drains are of no use.';

CREATE FUNCTION spectrum._claim_requeued(p_limit integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_seqs bigint[];
    v_rows tid[];
BEGIN
    SELECT array_agg(due.seq) INTO v_seqs
    FROM (
        SELECT requeue.seq FROM spectrum.requeue
        WHERE requeue.due_at <= now()
        ORDER BY requeue.seq
        LIMIT p_limit
        FOR UPDATE SKIP LOCKED
    ) AS due;
    IF v_seqs IS NULL THEN
        RETURN '{}';
    END IF;

    -- A row that another worker holds keeps its entry; one that is done needs none any more.
    WITH reachable AS MATERIALIZED (
        SELECT raw.seq, raw.ctid AS row_id, raw.status <> 'done' AS is_open
        FROM unnest(v_seqs) AS due (seq)
        JOIN @extschema@.raw_events AS raw USING (seq)
        ORDER BY raw.seq
        FOR UPDATE OF raw SKIP LOCKED
    ), settled AS (
        DELETE FROM spectrum.requeue WHERE requeue.seq IN (SELECT reachable.seq FROM reachable)
    )
    SELECT array_agg(reachable.row_id ORDER BY reachable.seq) FILTER (WHERE reachable.is_open)
    INTO v_rows FROM reachable;
    DELETE FROM spectrum.requeue
    WHERE requeue.seq = ANY (v_seqs)
        AND NOT EXISTS (SELECT FROM @extschema@.raw_events AS raw WHERE raw.seq = requeue.seq);
    RETURN coalesce(v_rows, '{}');
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
    r_intake record;
    r_claim record;
BEGIN
    SELECT intake.head_seq, intake.safe_seq INTO r_intake FROM spectrum.intake;

    IF cardinality(v_rows) < p_limit THEN
        r_claim := spectrum._claim_between(
            r_intake.head_seq, 9223372036854775807, p_limit - cardinality(v_rows)
        );
        v_rows := v_rows || r_claim.row_ids;
        PERFORM spectrum._advance_head(r_claim.last_seq + 1);
    END IF;

    IF cardinality(v_rows) < p_limit THEN
        r_claim := spectrum._claim_between(
            r_intake.safe_seq, r_intake.head_seq, p_limit - cardinality(v_rows)
        );
        v_rows := v_rows || r_claim.row_ids;
        PERFORM spectrum._advance_safe();
    END IF;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._claim(integer) IS
    'Locks the rows of one batch and returns their places: first what is due again, then from the '
    'head on, and when the head is drained what was left behind it.';

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

CREATE FUNCTION spectrum._advance_safe()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_snapshot pg_snapshot := pg_current_snapshot();
    r_intake record;
BEGIN
    SELECT intake.head_seq, intake.safe_seq, intake.seen_seq, intake.seen_xid INTO r_intake
    FROM spectrum.intake
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND OR r_intake.safe_seq = r_intake.head_seq THEN
        RETURN;
    END IF;

    -- An id from the future was noted by the cluster that this database was restored from.
    IF r_intake.seen_xid IS NULL OR r_intake.seen_xid > pg_snapshot_xmax(v_snapshot) THEN
        UPDATE spectrum.intake
        SET seen_seq = intake.head_seq, seen_xid = pg_snapshot_xmax(v_snapshot);
    ELSIF r_intake.seen_xid <= pg_snapshot_xmin(v_snapshot) AND NOT EXISTS (
        SELECT FROM @extschema@.raw_events AS raw
        WHERE raw.seq >= r_intake.safe_seq AND raw.seq < r_intake.seen_seq
            AND raw.status = 'pending'
    ) THEN
        UPDATE spectrum.intake
        SET safe_seq = intake.seen_seq,
            seen_seq = intake.head_seq,
            seen_xid = pg_snapshot_xmax(v_snapshot);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._advance_safe() IS
    'Moves the mark below which nothing is pending: up to where the head stood when the oldest '
    'transaction still running had not begun, once nothing is pending there.';

CREATE FUNCTION spectrum._patrol(p_rows bigint DEFAULT 100000)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
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
    RETURN v_found;
END
$$;
COMMENT ON FUNCTION spectrum._patrol(bigint) IS
    'Looks at the next p_rows of raw_events below the safe mark, round and round, and requeues '
    'what is open there. It finds the one case the marks cannot see: a COPY that drew receive '
    'numbers, then stalled before its first row was written.';
-- Room 30: dimensions. Who, where and what, each natural key once. Key 0 is the unknown member, so
-- a fact never points at NULL. Filled by process_batch (room 40) in a fixed order of tables and,
-- inside each, in order of the natural key: two workers that meet the same newcomers wait for
-- each other instead of deadlocking. first_seen and last_seen follow with the next refresh
-- (room 50), so that workers never queue behind the row of a popular event type.

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
        account_id text NOT NULL CONSTRAINT dim_accounts_account_id_key UNIQUE,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_accounts IS 'Accounts (tenants, customers) that events name.';
    COMMENT ON COLUMN warehouse.dim_accounts.account_key IS 'Key in facts; 0 is the unknown account.';
    COMMENT ON COLUMN warehouse.dim_accounts.account_id IS 'As sent; empty for the unknown account.';
    INSERT INTO warehouse.dim_accounts (account_key, account_id) VALUES (0, '');

    CREATE TABLE warehouse.dim_users (
        user_key bigserial NOT NULL CONSTRAINT dim_users_pkey PRIMARY KEY,
        user_id text NOT NULL CONSTRAINT dim_users_user_id_key UNIQUE,
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
        country text NOT NULL,
        region text NOT NULL,
        city text NOT NULL,
        first_seen timestamptz,
        last_seen timestamptz,
        CONSTRAINT dim_geography_place_key UNIQUE (country, region, city)
    );
    COMMENT ON TABLE warehouse.dim_geography IS 'Places that events name; empty parts are unknown.';
    COMMENT ON COLUMN warehouse.dim_geography.geo_key IS 'Key in facts; 0 is the unknown place.';
    INSERT INTO warehouse.dim_geography (geo_key, country, region, city) VALUES (0, '', '', '');

    CREATE TABLE warehouse.dim_event_types (
        event_type_key serial NOT NULL CONSTRAINT dim_event_types_pkey PRIMARY KEY,
        event_type text NOT NULL CONSTRAINT dim_event_types_event_type_key UNIQUE,
        first_seen timestamptz,
        last_seen timestamptz
    );
    COMMENT ON TABLE warehouse.dim_event_types IS 'Types of events, by name.';
    COMMENT ON COLUMN warehouse.dim_event_types.event_type_key IS
        'Key in facts; 0 is the unknown type, which no event has: one without a type fails.';
    INSERT INTO warehouse.dim_event_types (event_type_key, event_type) VALUES (0, '');

    PERFORM spectrum._comment_seen('warehouse.dim_accounts');
    PERFORM spectrum._comment_seen('warehouse.dim_users');
    PERFORM spectrum._comment_seen('warehouse.dim_geography');
    PERFORM spectrum._comment_seen('warehouse.dim_event_types');
END
$$;
COMMENT ON FUNCTION spectrum._create_dimensions() IS
    'Room 30: makes the dimensions, each with its unknown member at key 0.';

CREATE FUNCTION spectrum._comment_seen(p_dimension text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('COMMENT ON COLUMN %s.first_seen IS %L', p_dimension::regclass,
        'Earliest occurred_at met, as of the last refresh.');
    EXECUTE format('COMMENT ON COLUMN %s.last_seen IS %L', p_dimension::regclass,
        'Latest occurred_at met, as of the last refresh.');
END
$$;
COMMENT ON FUNCTION spectrum._comment_seen(text) IS
    'Comments the two columns that every dimension has.';

CREATE FUNCTION spectrum._add_members()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- The anti-join first: an upsert that conflicts would burn a key for each row.
    INSERT INTO warehouse.dim_accounts (account_id)
    SELECT newcomers.account_id
    FROM (SELECT DISTINCT batch.account_id FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL) AS newcomers
    WHERE NOT EXISTS (
        SELECT FROM warehouse.dim_accounts AS known WHERE known.account_id = newcomers.account_id
    )
    ORDER BY newcomers.account_id
    ON CONFLICT (account_id) DO NOTHING;

    INSERT INTO warehouse.dim_users (user_id, account_key)
    SELECT newcomers.user_id, accounts.account_key
    FROM (SELECT DISTINCT ON (batch.user_id) batch.user_id, batch.account_id
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL
        ORDER BY batch.user_id, batch.seq) AS newcomers
    JOIN warehouse.dim_accounts AS accounts USING (account_id)
    WHERE NOT EXISTS (
        SELECT FROM warehouse.dim_users AS known WHERE known.user_id = newcomers.user_id
    )
    ORDER BY newcomers.user_id
    ON CONFLICT (user_id) DO NOTHING;

    INSERT INTO warehouse.dim_geography (country, region, city)
    SELECT newcomers.country, newcomers.region, newcomers.city
    FROM (SELECT DISTINCT batch.country, batch.region, batch.city
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL) AS newcomers
    WHERE NOT EXISTS (
        SELECT FROM warehouse.dim_geography AS known
        WHERE known.country = newcomers.country AND known.region = newcomers.region
            AND known.city = newcomers.city
    )
    ORDER BY newcomers.country, newcomers.region, newcomers.city
    ON CONFLICT (country, region, city) DO NOTHING;

    INSERT INTO warehouse.dim_event_types (event_type)
    SELECT newcomers.event_type
    FROM (SELECT DISTINCT batch.event_type FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL) AS newcomers
    WHERE NOT EXISTS (
        SELECT FROM warehouse.dim_event_types AS known
        WHERE known.event_type = newcomers.event_type
    )
    ORDER BY newcomers.event_type
    ON CONFLICT (event_type) DO NOTHING;
END
$$;
COMMENT ON FUNCTION spectrum._add_members() IS
    'Adds what the batch names and the dimensions do not have yet. Keys are looked up afterwards, '
    'in statements of their own: only those see a member that another worker added meanwhile.';

CREATE FUNCTION spectrum._hold_members()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM FROM warehouse.dim_accounts AS dim
    WHERE dim.account_id IN (SELECT batch.account_id FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL)
    ORDER BY dim.account_id FOR KEY SHARE;

    PERFORM FROM warehouse.dim_users AS dim
    WHERE dim.user_id IN (SELECT batch.user_id FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL)
    ORDER BY dim.user_id FOR KEY SHARE;

    PERFORM FROM warehouse.dim_geography AS dim
    WHERE (dim.country, dim.region, dim.city) IN (
        SELECT batch.country, batch.region, batch.city FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL)
    ORDER BY dim.country, dim.region, dim.city FOR KEY SHARE;

    PERFORM FROM warehouse.dim_event_types AS dim
    WHERE dim.event_type IN (SELECT batch.event_type FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL)
    ORDER BY dim.event_type FOR KEY SHARE;
END
$$;
COMMENT ON FUNCTION spectrum._hold_members() IS
    'Locks the batch''s dimension rows against deletion until commit, once per row instead of once '
    'per fact: this takes the place of foreign keys, at 0.8 against 13 microseconds per event.';
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

CREATE FUNCTION spectrum._month_name(p_month date)
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'fact_events_' || to_char(p_month, 'YYYY_MM')
$$;
COMMENT ON FUNCTION spectrum._month_name(date) IS 'Name of the partition of a month.';

CREATE FUNCTION spectrum._add_month(p_month date)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_name text := spectrum._month_name(p_month);
    v_from timestamptz := p_month::timestamp AT TIME ZONE 'UTC';
    v_to timestamptz := (p_month + interval '1 month') AT TIME ZONE 'UTC';
    v_wait text := current_setting('lock_timeout');
BEGIN
    IF to_regclass('warehouse.' || v_name) IS NOT NULL THEN
        RETURN false;
    END IF;

    PERFORM set_config('lock_timeout',
        ceil(extract(epoch FROM config.lock_timeout) * 1000)::text || 'ms', true)
    FROM spectrum.config;
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('months'));
    IF to_regclass('warehouse.' || v_name) IS NULL THEN
        -- LIKE and ATTACH, because PARTITION OF would lock the readers of all months out.
        EXECUTE format('CREATE TABLE warehouse.%I (LIKE warehouse.fact_events INCLUDING DEFAULTS '
            'INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING COMPRESSION)', v_name);
        EXECUTE format('COMMENT ON TABLE warehouse.%I IS %L', v_name,
            format('Events of %s (UTC).', to_char(p_month, 'YYYY-MM')));
        EXECUTE format('ALTER TABLE warehouse.fact_events ATTACH PARTITION warehouse.%I '
            'FOR VALUES FROM (%L) TO (%L)', v_name, v_from, v_to);
    END IF;
    PERFORM set_config('lock_timeout', v_wait, true);
    RETURN true;
END
$$;
COMMENT ON FUNCTION spectrum._add_month(date) IS
    'Makes the partition of one month (its first day) unless it is there. Readers go on reading; '
    'raises 55P03 where a lock cannot be had within config.lock_timeout.';

CREATE FUNCTION spectrum.ensure_partitions(p_from timestamptz, p_to timestamptz)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_first date := date_trunc('month', p_from AT TIME ZONE 'UTC');
    v_last date := date_trunc('month', p_to AT TIME ZONE 'UTC');
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
    SELECT count(*) FILTER (WHERE spectrum._add_month(month::date)) INTO v_made
    FROM generate_series(v_first::timestamp, v_last::timestamp, interval '1 month') AS month;
    RETURN v_made;
END
$$;
COMMENT ON FUNCTION spectrum.ensure_partitions(timestamptz, timestamptz) IS
    'Makes the month partitions (UTC) from the month of p_from to the month of p_to, both '
    'included, and returns how many were missing.';
-- Room 40, the batch: claim, read, add months and dimension members, insert facts, mark. All of it
-- in the caller's transaction, so after a crash every row is either done with its fact or pending
-- as before. pg_temp.spectrum_batch holds what was read of the claimed rows between the steps.
--
-- Order of locks, the same in every worker: raw rows (passing over locked ones), months,
-- dimensions in order of their names, ledger in order of event_id.

CREATE FUNCTION spectrum._read_batch(p_rows tid[])
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
            properties jsonb,
            revenue numeric,
            currency text,
            error_msg text,
            can_pass boolean NOT NULL DEFAULT false,
            was_read boolean,
            is_first boolean,
            copy_of uuid
        ) ON COMMIT DELETE ROWS;
    END IF;
    DELETE FROM pg_temp.spectrum_batch;
    INSERT INTO pg_temp.spectrum_batch (
        row_id, seq, id, event_id, occurred_at, event_type, account_id, user_id,
        country, region, city, properties, revenue, currency, error_msg, was_read, is_first
    )
    SELECT
        reading.row_id, reading.seq, reading.id, reading.event_id, reading.occurred_at,
        reading.event_type, reading.account_id, reading.user_id,
        reading.country, reading.region, reading.city,
        reading.properties, reading.revenue, reading.currency, reading.error_msg,
        reading.attempts > 0,
        row_number() OVER (
            PARTITION BY reading.event_id, reading.error_msg IS NULL ORDER BY reading.seq
        ) = 1
    FROM spectrum.readings AS reading
    WHERE reading.row_id = ANY (p_rows);
END
$$;
COMMENT ON FUNCTION spectrum._read_batch(tid[]) IS
    'Reads the claimed rows into pg_temp.spectrum_batch and finds the first of each event_id.';

CREATE FUNCTION spectrum._add_months()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_month date;
BEGIN
    FOR v_month IN
        SELECT DISTINCT date_trunc('month', batch.occurred_at AT TIME ZONE 'UTC')::date
        FROM pg_temp.spectrum_batch AS batch
        WHERE batch.error_msg IS NULL
        ORDER BY 1
    LOOP
        BEGIN
            PERFORM spectrum._add_month(v_month);
        EXCEPTION
            WHEN lock_not_available THEN
                UPDATE pg_temp.spectrum_batch AS batch
                SET error_msg = format('occurred_at: the partition of %s could not be made within '
                        'config.lock_timeout, another session holds a lock',
                        to_char(v_month, 'YYYY-MM')),
                    can_pass = true
                WHERE batch.error_msg IS NULL
                    AND date_trunc('month', batch.occurred_at AT TIME ZONE 'UTC')::date = v_month;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._add_months() IS
    'Makes the months that the batch needs. A month that another session locks out fails its '
    'events for now; they are tried again.';

CREATE FUNCTION spectrum._withdraw(p_event_ids uuid[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    WITH entries AS (
        DELETE FROM warehouse.event_ledger AS ledger
        WHERE ledger.event_id = ANY (p_event_ids)
        RETURNING ledger.event_id, ledger.occurred_at, ledger.user_key
    ), facts AS (
        DELETE FROM warehouse.fact_events AS fact
        USING entries
        WHERE fact.user_key = entries.user_key
            AND fact.occurred_at = entries.occurred_at
            AND fact.event_id = entries.event_id
        RETURNING fact.user_key, fact.account_key, fact.event_type_key, fact.geo_key,
            fact.occurred_at
    )
    INSERT INTO spectrum.touched (
        user_key, account_key, event_type_key, geo_key, first_at, last_at
    )
    SELECT facts.user_key, facts.account_key, facts.event_type_key, facts.geo_key,
        min(facts.occurred_at), max(facts.occurred_at)
    FROM facts
    GROUP BY GROUPING SETS (
        (facts.user_key), (facts.account_key), (facts.event_type_key), (facts.geo_key)
    );
END
$$;
COMMENT ON FUNCTION spectrum._withdraw(uuid[]) IS
    'Takes facts back, with their ledger entries, so that they can be made again or not at all.';

CREATE FUNCTION spectrum._insert_facts()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_loaded bigint;
BEGIN
    WITH new_facts AS MATERIALIZED (
        SELECT
            batch.event_id, batch.seq, batch.occurred_at, batch.properties, batch.revenue,
            batch.currency, dim_accounts.account_key, dim_users.user_key,
            dim_event_types.event_type_key, dim_geography.geo_key
        FROM pg_temp.spectrum_batch AS batch
        JOIN warehouse.dim_accounts USING (account_id)
        JOIN warehouse.dim_users USING (user_id)
        JOIN warehouse.dim_event_types USING (event_type)
        JOIN warehouse.dim_geography USING (country, region, city)
        WHERE batch.error_msg IS NULL AND batch.is_first
            AND NOT EXISTS (
                SELECT FROM warehouse.event_ledger AS ledger
                WHERE ledger.event_id = batch.event_id
            )
        ORDER BY batch.event_id
    ), entries AS (
        INSERT INTO warehouse.event_ledger (event_id, seq, occurred_at, user_key)
        SELECT event_id, seq, occurred_at, user_key FROM new_facts
    ), notes AS (
        INSERT INTO spectrum.touched (
            user_key, account_key, event_type_key, geo_key, first_at, last_at
        )
        SELECT user_key, account_key, event_type_key, geo_key, min(occurred_at), max(occurred_at)
        FROM new_facts
        GROUP BY GROUPING SETS ((user_key), (account_key), (event_type_key), (geo_key))
    )
    INSERT INTO warehouse.fact_events (
        event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
        revenue, currency
    )
    SELECT
        event_id, occurred_at, account_key, user_key, event_type_key, geo_key, properties,
        revenue, currency
    FROM new_facts;
    GET DIAGNOSTICS v_loaded = ROW_COUNT;
    RETURN v_loaded;
END
$$;
COMMENT ON FUNCTION spectrum._insert_facts() IS
    'Inserts the batch''s events that the ledger does not know: ledger, facts and the notes of '
    'what they touch. Returns how many.';

CREATE FUNCTION spectrum._withdraw_reread()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_event_ids uuid[];
BEGIN
    SELECT array_agg(ledger.event_id ORDER BY ledger.event_id) INTO v_event_ids
    FROM pg_temp.spectrum_batch AS batch
    JOIN warehouse.event_ledger AS ledger
        ON ledger.event_id = batch.event_id AND ledger.seq = batch.seq
    WHERE batch.was_read;
    IF v_event_ids IS NULL THEN
        RETURN;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids);

    -- Where the row cannot be read any more, a copy of it may step in.
    UPDATE @extschema@.raw_events AS raw SET status = 'pending'
    FROM pg_temp.spectrum_batch AS batch
    WHERE batch.was_read AND batch.error_msg IS NOT NULL
        AND batch.event_id = ANY (v_event_ids) AND raw.copy_of = batch.id
        AND NOT EXISTS (SELECT FROM pg_temp.spectrum_batch AS own WHERE own.seq = raw.seq);
END
$$;
COMMENT ON FUNCTION spectrum._withdraw_reread() IS
    'A row read again has its own fact made again: takes back the facts of such rows.';

CREATE FUNCTION spectrum._take_over()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_event_ids uuid[];
BEGIN
    -- Rows that were counted although ours, with the same event_id, was received before them.
    WITH later_rows AS (
        SELECT ledger.event_id, ledger.seq, batch.id
        FROM pg_temp.spectrum_batch AS batch
        JOIN warehouse.event_ledger AS ledger
            ON ledger.event_id = batch.event_id AND ledger.seq > batch.seq
        WHERE batch.error_msg IS NULL AND batch.is_first
    ), copies AS (
        UPDATE @extschema@.raw_events AS raw SET copy_of = later_rows.id
        FROM later_rows
        WHERE raw.seq = later_rows.seq
            AND NOT EXISTS (SELECT FROM pg_temp.spectrum_batch AS own WHERE own.seq = raw.seq)
    )
    SELECT array_agg(later_rows.event_id ORDER BY later_rows.event_id) INTO v_event_ids
    FROM later_rows;
    IF v_event_ids IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM spectrum._withdraw(v_event_ids);
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
    UPDATE pg_temp.spectrum_batch AS batch
    SET copy_of = coalesce(
        (SELECT raw.id FROM @extschema@.raw_events AS raw WHERE raw.seq = ledger.seq),
        ledger.event_id
    )
    FROM warehouse.event_ledger AS ledger
    WHERE batch.error_msg IS NULL
        AND ledger.event_id = batch.event_id AND ledger.seq <> batch.seq;
    GET DIAGNOSTICS v_copies = ROW_COUNT;
    RETURN v_copies;
END
$$;
COMMENT ON FUNCTION spectrum._name_copies() IS
    'Notes for each copy in the batch which row it repeats (the event_id where that row was '
    'purged), and returns how many there are.';

CREATE FUNCTION spectrum._mark_rows()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE @extschema@.raw_events AS raw
    SET status = CASE WHEN batch.error_msg IS NULL THEN 'done' ELSE 'failed' END,
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
    SELECT raw.seq, raw.next_attempt_at
    FROM pg_temp.spectrum_batch AS batch
    JOIN @extschema@.raw_events AS raw USING (seq)
    WHERE batch.can_pass AND raw.next_attempt_at IS NOT NULL
    ON CONFLICT (seq) DO UPDATE SET due_at = excluded.due_at;
END
$$;
COMMENT ON FUNCTION spectrum._mark_rows() IS
    'Marks the claimed rows done or failed. A failure whose cause can pass is tried again, after '
    'a delay that doubles, up to config.max_attempts.';

CREATE FUNCTION spectrum._load_rows(
    p_rows tid[],
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_readable bigint;
BEGIN
    PERFORM spectrum._read_batch(p_rows);
    PERFORM spectrum._add_months();
    PERFORM spectrum._add_members();
    PERFORM spectrum._hold_members();
    PERFORM spectrum._withdraw_reread();
    loaded := spectrum._insert_facts();

    SELECT count(*) FILTER (WHERE error_msg IS NULL), count(*) FILTER (WHERE error_msg IS NOT NULL)
    INTO v_readable, failed FROM pg_temp.spectrum_batch;
    duplicates := 0;
    IF loaded < v_readable THEN
        loaded := loaded + spectrum._take_over();
        duplicates := spectrum._name_copies();
    END IF;
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._load_rows(tid[]) IS
    'Takes claimed rows all the way, set by set, and counts what became of them.';

CREATE FUNCTION spectrum._fail_row(p_row tid, p_reason text, p_can_pass boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._read_batch(ARRAY[p_row]);
    UPDATE pg_temp.spectrum_batch
    SET error_msg = translate(p_reason, E'\n\r', '  '), can_pass = p_can_pass;
    PERFORM spectrum._withdraw_reread();
    PERFORM spectrum._mark_rows();
END
$$;
COMMENT ON FUNCTION spectrum._fail_row(tid, text, boolean) IS
    'Marks one claimed row failed, for a reason that only the warehouse found.';

CREATE FUNCTION spectrum._load_safely(
    p_rows tid[],
    OUT loaded bigint,
    OUT duplicates bigint,
    OUT failed bigint
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_half integer := cardinality(p_rows) / 2;
    v_state text;
    v_reason text;
    r_left record;
    r_right record;
BEGIN
    FOR v_try IN 1 .. 3 LOOP
        BEGIN
            SELECT * INTO loaded, duplicates, failed FROM spectrum._load_rows(p_rows);
            RETURN;
        EXCEPTION
            -- Another worker brought the same event_id at the same moment: look again.
            WHEN unique_violation OR deadlock_detected THEN
                GET STACKED DIAGNOSTICS v_state = RETURNED_SQLSTATE, v_reason = MESSAGE_TEXT;
                IF v_try = 3 AND v_state = '40P01' THEN
                    RAISE;
                END IF;
            -- Something that reading could not foresee, say a constraint of the user's own.
            WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded
                OR raise_exception
            THEN
                GET STACKED DIAGNOSTICS v_state = RETURNED_SQLSTATE, v_reason = MESSAGE_TEXT;
                EXIT;
        END;
    END LOOP;

    IF v_half = 0 THEN
        PERFORM spectrum._fail_row(
            p_rows[1], format('%s (SQLSTATE %s)', v_reason, v_state), v_state ~ '^(23|P0)'
        );
        loaded := 0;
        duplicates := 0;
        failed := 1;
        RETURN;
    END IF;
    r_left := spectrum._load_safely(p_rows[:v_half]);
    r_right := spectrum._load_safely(p_rows[v_half + 1:]);
    loaded := r_left.loaded + r_right.loaded;
    duplicates := r_left.duplicates + r_right.duplicates;
    failed := r_left.failed + r_right.failed;
END
$$;
COMMENT ON FUNCTION spectrum._load_safely(tid[]) IS
    'Loads claimed rows; where a row makes the warehouse refuse the set, halves it until that row '
    'is found and fails alone. One such row costs its batch about two more passes.';

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
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_rows tid[];
BEGIN
    IF p_limit NOT BETWEEN 1 AND 1000000 THEN
        PERFORM spectrum._reject('p_limit', p_limit::text, 'a number from 1 to 1000000');
    END IF;
    v_rows := spectrum._claim(
        coalesce(p_limit, (SELECT config.batch_size FROM spectrum.config))
    );
    claimed := cardinality(v_rows);
    IF claimed = 0 THEN
        loaded := 0;
        duplicates := 0;
        failed := 0;
    ELSE
        SELECT * INTO loaded, duplicates, failed FROM spectrum._load_safely(v_rows);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._process_batch(integer) IS
    'One batch: what process_batch and run share. The settings pin every statement below to index '
    'look-ups, which are right for a batch whatever the size of the tables; statistics of tables '
    'that fill and drain are not to be relied on.';
-- Room 40, the doors: process_batch for anyone who owns the tables, reprocess for rows to read again.

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
    SELECT batch.claimed, batch.loaded, batch.duplicates, batch.failed
    INTO claimed, loaded, duplicates, failed
    FROM spectrum._log_batch(NULL, p_limit) AS batch;
END
$$;
COMMENT ON PROCEDURE spectrum.process_batch(integer, bigint, bigint, bigint, bigint) IS
    'Takes up to p_limit pending events (default config.batch_size) into the warehouse, in the '
    'caller''s transaction, and returns how many it claimed, loaded, found to be copies, failed. '
    'Any number of sessions may call it at once.';

CREATE PROCEDURE spectrum.reprocess(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_status text DEFAULT 'failed',
    p_event_type text DEFAULT NULL,
    INOUT requeued bigint DEFAULT NULL
)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_status', p_status, ARRAY['failed', 'done', 'all']);
    UPDATE @extschema@.raw_events AS raw
    SET status = 'pending'
    WHERE raw.status IN ('failed', 'done')
        AND (p_status = 'all' OR raw.status = p_status)
        AND (p_from IS NULL OR raw.received_at >= p_from)
        AND (p_to IS NULL OR raw.received_at < p_to)
        AND (p_event_type IS NULL OR raw.payload ->> 'event_type' = p_event_type);
    GET DIAGNOSTICS requeued = ROW_COUNT;
END
$$;
COMMENT ON PROCEDURE spectrum.reprocess(timestamptz, timestamptz, text, text, bigint) IS
    'Sets raw events back to pending and returns how many: those received in [p_from, p_to), of '
    'status failed (default), done or all, of one event type. The next batches read them again, '
    'with today''s rules and settings; nothing is counted twice.';
-- Room 50: what changed. Each batch notes, in its own transaction, which users, accounts, event
-- types and places its facts touch and when. The refresh folds these notes into the dimensions and
-- makes again the standing views that are out of date; refresh_state says how far each one is.

CREATE FUNCTION spectrum._create_rollups()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.touched') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.touched (
        user_key bigint,
        account_key bigint,
        event_type_key integer,
        geo_key integer,
        first_at timestamptz NOT NULL,
        last_at timestamptz NOT NULL,
        CONSTRAINT touched_names_one
        CHECK (num_nonnulls(user_key, account_key, event_type_key, geo_key) = 1)
    );
    COMMENT ON TABLE spectrum.touched IS
        'Notes of the batches since the last refresh: who and what got facts or lost them. One '
        'key a row; only ever inserted and deleted.';
    COMMENT ON COLUMN spectrum.touched.user_key IS 'dim_users.';
    COMMENT ON COLUMN spectrum.touched.account_key IS 'dim_accounts.';
    COMMENT ON COLUMN spectrum.touched.event_type_key IS 'dim_event_types.';
    COMMENT ON COLUMN spectrum.touched.geo_key IS 'dim_geography.';
    COMMENT ON COLUMN spectrum.touched.first_at IS 'Earliest occurred_at touched.';
    COMMENT ON COLUMN spectrum.touched.last_at IS 'Latest occurred_at touched.';

    CREATE TABLE spectrum.refresh_state (
        view_name text NOT NULL CONSTRAINT refresh_state_pkey PRIMARY KEY,
        position integer NOT NULL,
        follows_clock boolean NOT NULL,
        is_stale boolean NOT NULL DEFAULT true,
        as_of timestamptz,
        refreshed_at timestamptz,
        seconds double precision
    );
    COMMENT ON TABLE spectrum.refresh_state IS 'How far each materialized view of analytics is.';
    COMMENT ON COLUMN spectrum.refresh_state.view_name IS 'Materialized view in schema analytics.';
    COMMENT ON COLUMN spectrum.refresh_state.position IS 'Order of refresh.';
    COMMENT ON COLUMN spectrum.refresh_state.follows_clock IS
        'Whether it changes when a day begins, without any event.';
    COMMENT ON COLUMN spectrum.refresh_state.is_stale IS
        'Facts, definitions or settings changed since the last refresh.';
    COMMENT ON COLUMN spectrum.refresh_state.as_of IS
        'Watermark: every event received before is counted.';
    COMMENT ON COLUMN spectrum.refresh_state.refreshed_at IS 'When it was last made again.';
    COMMENT ON COLUMN spectrum.refresh_state.seconds IS 'How long that took.';
END
$$;
COMMENT ON FUNCTION spectrum._create_rollups() IS
    'Room 50: makes spectrum.touched and spectrum.refresh_state.';

CREATE FUNCTION spectrum._mark_stale(p_view text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE spectrum.refresh_state SET is_stale = true
    WHERE (p_view IS NULL OR view_name = p_view) AND NOT is_stale;
END
$$;
COMMENT ON FUNCTION spectrum._mark_stale(text) IS
    'Has the next refresh make a standing view again; all of them without an argument.';

CREATE FUNCTION spectrum._fold_touched()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_notes bigint;
BEGIN
    WITH notes AS (
        DELETE FROM spectrum.touched
        RETURNING user_key, account_key, event_type_key, geo_key, first_at, last_at
    ), hulls AS MATERIALIZED (
        SELECT user_key, account_key, event_type_key, geo_key,
            min(first_at) AS first_at, max(last_at) AS last_at, count(*) AS notes
        FROM notes
        GROUP BY user_key, account_key, event_type_key, geo_key
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
    ), places AS (
        UPDATE warehouse.dim_geography AS dim
        SET first_seen = least(dim.first_seen, hulls.first_at),
            last_seen = greatest(dim.last_seen, hulls.last_at)
        FROM hulls WHERE dim.geo_key = hulls.geo_key
            AND (dim.first_seen IS NULL OR hulls.first_at < dim.first_seen
                OR hulls.last_at > dim.last_seen)
    )
    SELECT coalesce(sum(hulls.notes), 0) INTO v_notes FROM hulls;
    RETURN v_notes;
END
$$;
COMMENT ON FUNCTION spectrum._fold_touched() IS
    'Takes the batches'' notes, widens first_seen and last_seen of the dimensions by them, and '
    'returns how many there were.';
-- Room 60, the events: every question reads analytics.events and nothing below it. The view runs
-- with its owner's rights and is a security barrier, so a role needs no right on the warehouse, and
-- whoever is to see less is shown less in this one place.

CREATE FUNCTION spectrum._create_events()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.events') IS NOT NULL THEN
        RETURN;
    END IF;

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
    FROM warehouse.fact_events AS fact
    JOIN warehouse.dim_event_types USING (event_type_key)
    JOIN warehouse.dim_accounts USING (account_key)
    JOIN warehouse.dim_users USING (user_key)
    JOIN warehouse.dim_geography USING (geo_key);
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
END
$$;
COMMENT ON FUNCTION spectrum._create_events() IS
    'Room 60: makes analytics.events and analytics.settings.';
-- Room 80, refresh: brings the standing views up to the facts. A view that nothing changed is left
-- alone, because REFRESH CONCURRENTLY costs the size of the view however little changed.

CREATE FUNCTION spectrum._pending_since()
RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
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

CREATE FUNCTION spectrum._refresh_view(p_view text, p_as_of timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
BEGIN
    EXECUTE format('REFRESH MATERIALIZED VIEW CONCURRENTLY analytics.%I', p_view);
    UPDATE spectrum.refresh_state
    SET is_stale = false,
        as_of = p_as_of,
        refreshed_at = now(),
        seconds = extract(epoch FROM clock_timestamp() - v_started_at)
    WHERE view_name = p_view;
END
$$;
COMMENT ON FUNCTION spectrum._refresh_view(text, timestamptz) IS
    'Makes one standing view again and notes how far it is.';

CREATE FUNCTION spectrum._refresh_analytics()
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_as_of timestamptz;
    v_today date;
    v_view text;
    v_refreshed integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('refresh'));
    v_as_of := least(now(), spectrum._pending_since());
    v_today := (SELECT (now() AT TIME ZONE config.timezone)::date FROM spectrum.config);

    IF spectrum._fold_touched() > 0 THEN
        PERFORM spectrum._mark_stale();
    END IF;
    FOR v_view IN
        SELECT state.view_name FROM spectrum.refresh_state AS state
        CROSS JOIN spectrum.config
        WHERE state.is_stale
            OR (state.follows_clock
                AND (state.refreshed_at AT TIME ZONE config.timezone)::date < v_today)
        ORDER BY state.position
    LOOP
        PERFORM spectrum._refresh_view(v_view, v_as_of);
        v_refreshed := v_refreshed + 1;
    END LOOP;
    UPDATE spectrum.refresh_state SET as_of = v_as_of WHERE as_of < v_as_of;
    RETURN v_refreshed;
END
$$;
COMMENT ON FUNCTION spectrum._refresh_analytics() IS
    'Brings the standing views up to the facts and returns how many were made again.';

CREATE PROCEDURE spectrum.refresh_analytics(INOUT refreshed integer DEFAULT NULL)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
BEGIN
    refreshed := spectrum._refresh_analytics();
    PERFORM spectrum._log_step(
        NULL, 'refresh', v_started_at, format('%s views made again', refreshed)
    );
END
$$;
COMMENT ON PROCEDURE spectrum.refresh_analytics(integer) IS
    'Brings every view of analytics up to the facts and returns how many had to be made again. '
    'A second one at the same time waits for the first.';
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
    v_deleted bigint := 0;
BEGIN
    IF to_regclass('cron.job_run_details') IS NOT NULL
        AND has_schema_privilege('cron', 'USAGE')
        AND has_table_privilege(to_regclass('cron.job_run_details'), 'DELETE')
    THEN
        EXECUTE 'DELETE FROM cron.job_run_details WHERE end_time < now() - $1 AND jobid IN ('
            'SELECT job.jobid FROM cron.job WHERE job.jobname = $2)'
            USING (SELECT config.cron_log_keep FROM spectrum.config), spectrum._job_name();
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
    RETURN format('%s run log rows and %s pg_cron log rows deleted, %s forgotten events found',
        v_log_rows, spectrum._clean_cron_log(), v_found);
END
$$;
COMMENT ON FUNCTION spectrum._upkeep() IS
    'Step of a run: old log rows, pg_cron''s log, and a look at a part of what lies behind.';

CREATE FUNCTION spectrum._do_step(p_run_id bigint, p_step text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
    v_message text;
    v_state text;
BEGIN
    IF p_step = 'process' THEN
        RETURN (SELECT batch.claimed > 0 FROM spectrum._log_batch(p_run_id, NULL) AS batch);
    END IF;
    PERFORM spectrum._log_step(p_run_id, p_step, v_started_at, CASE p_step
        WHEN 'provision' THEN spectrum._provision()
        WHEN 'refresh' THEN format('%s views made again', spectrum._refresh_analytics())
        WHEN 'upkeep' THEN spectrum._upkeep()
    END);
    RETURN false;
EXCEPTION
    WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS v_message = MESSAGE_TEXT, v_state = RETURNED_SQLSTATE;
        RAISE WARNING 'spectrum: step % of run % failed and was undone: % (SQLSTATE %)',
            p_step, p_run_id, v_message, v_state;
        PERFORM spectrum._log_step(p_run_id, p_step, v_started_at, NULL,
            format('%s (SQLSTATE %s)', v_message, v_state));
        RETURN false;
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
BEGIN
    -- The lock ended with the last commit; whoever came in between goes on instead.
    IF NOT spectrum._take_turn('run') THEN
        PERFORM spectrum._end_run(p_run_id, 'another run took over');
        RETURN NULL;
    END IF;
    v_has_more := spectrum._do_step(p_run_id, p_step);
    CASE p_step
        WHEN 'provision' THEN
            RETURN 'process';
        WHEN 'process' THEN
            SELECT clock_timestamp() < run.started_at + config.run_budget INTO v_in_budget
            FROM spectrum.run_log AS run CROSS JOIN spectrum.config
            WHERE run.log_id = p_run_id;
            RETURN CASE WHEN v_has_more AND v_in_budget THEN 'process' ELSE 'refresh' END;
        WHEN 'refresh' THEN
            RETURN 'upkeep';
        WHEN 'upkeep' THEN
            PERFORM spectrum._end_run(p_run_id, NULL);
            RETURN NULL;
    END CASE;
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
    'The tick: makes months ahead of need, processes batches until nothing is pending or '
    'config.run_budget is spent, refreshes the views, cleans up; a commit after each. A second '
    'run at the same time returns at once and says so. Call it outside of a transaction block.';
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
    IF to_regproc('cron.schedule') IS NOT NULL OR to_regnamespace('cron') IS NOT NULL THEN
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
        extract(epoch FROM now() - views.as_of)::double precision AS lag_seconds
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
        WHERE link.inhparent = to_regclass('warehouse.fact_events')
            AND month.relname > 'fact_events_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')
    ) AS months
    CROSS JOIN (
        SELECT max(state.refreshed_at) AS refreshed_at, min(state.as_of) AS as_of
        FROM spectrum.refresh_state AS state
    ) AS views;
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
    COMMENT ON COLUMN spectrum.pipeline.last_refresh_at IS 'When a view was last made again.';
    COMMENT ON COLUMN spectrum.pipeline.as_of IS
        'Every event received before this is counted in every view.';
    COMMENT ON COLUMN spectrum.pipeline.lag_seconds IS 'Age of as_of.';

    CREATE VIEW analytics.pipeline_status WITH (security_barrier) AS
    SELECT * FROM spectrum.pipeline;
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
        'The run log for dashboards, without error texts, which may quote values: see '
        'spectrum.run_log.';
    COMMENT ON COLUMN analytics.pipeline.seconds IS 'How long the step took; NULL under way.';
    COMMENT ON COLUMN analytics.pipeline.has_error IS 'Whether an error ended it.';
END
$$;
COMMENT ON FUNCTION spectrum._create_status() IS
    'Room 80: makes spectrum.pipeline and the two pipeline views of analytics.';

CREATE FUNCTION spectrum._cron_state(
    OUT schedule text,
    OUT is_active boolean,
    OUT last_end timestamptz,
    OUT last_status text,
    OUT remark text
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regnamespace('cron') IS NULL THEN
        remark := 'pg_cron is not in this database' || coalesce(
            (SELECT ', it lives in ' || quote_ident(setting) FROM pg_settings
            WHERE name = 'cron.database_name'), '');
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
    EXECUTE 'SELECT details.end_time, details.status FROM cron.job_run_details AS details '
        'JOIN cron.job USING (jobid) WHERE job.jobname = $1 ORDER BY details.runid DESC LIMIT 1'
    INTO last_end, last_status USING spectrum._job_name();
    remark := CASE WHEN is_active THEN 'scheduled' ELSE 'scheduled, but switched off' END;
END
$$;
COMMENT ON FUNCTION spectrum._cron_state() IS
    'What pg_cron knows about this database''s job, as far as the caller may see it.';

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
    OUT cron_last_end timestamptz
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT
        state.pending, state.processing, state.done, state.failed, state.to_retry,
        state.oldest_pending_seconds, state.last_batch_at, state.last_run_at,
        state.last_run_error, state.months_ready, state.last_refresh_at, state.as_of,
        state.lag_seconds, job.remark, job.schedule, job.last_status, job.last_end
    INTO
        pending, processing, done, failed, to_retry,
        oldest_pending_seconds, last_batch_at, last_run_at,
        last_run_error, months_ready, last_refresh_at, as_of,
        lag_seconds, cron, cron_schedule, cron_last_status, cron_last_end
    FROM spectrum.pipeline AS state
    CROSS JOIN spectrum._cron_state() AS job;
END
$$;
COMMENT ON FUNCTION spectrum.status() IS
    'How the pipeline is, one row: the columns of spectrum.pipeline and what pg_cron knows.';

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

CREATE FUNCTION spectrum.health()
RETURNS TABLE (check_name text, ok boolean, message text, what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_state record;
BEGIN
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

    RETURN QUERY SELECT 'schedule', coalesce(r_state.cron = 'scheduled'
            AND r_state.cron_last_status IS DISTINCT FROM 'failed', false),
        r_state.cron || coalesce(' ' || r_state.cron_schedule, '')
            || coalesce(', last run ' || r_state.cron_last_status, ''),
        'SELECT spectrum.schedule(); where pg_cron is missing, the error says what helps.';

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

    RETURN QUERY SELECT 'ownership', owner.ok, owner.message, owner.what_to_do
    FROM spectrum._check_ownership() AS owner;
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
    WHERE reading.status = 'done';

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
    v_view text;
    v_query text;
BEGIN
    RETURN QUERY
    SELECT facts.check_name, facts.expected, facts.actual, facts.expected = facts.actual
    FROM spectrum._verify_facts() AS facts;

    FOR v_view IN SELECT state.view_name FROM spectrum.refresh_state AS state ORDER BY position
    LOOP
        v_query := rtrim(pg_get_viewdef(format('analytics.%I', v_view)::regclass), ';');
        RETURN QUERY EXECUTE format(
            'WITH made_again AS MATERIALIZED (%s), differences AS ('
            '(SELECT * FROM made_again EXCEPT ALL SELECT * FROM analytics.%I) UNION ALL '
            '(SELECT * FROM analytics.%2$I EXCEPT ALL SELECT * FROM made_again)) '
            'SELECT %L, 0::bigint, count(*), count(*) = 0 FROM differences',
            v_query, v_view, format('%s: rows that differ when made again', v_view));
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum.verify() IS
    'Makes the facts again from the raw events and the standing views from the facts, and compares: '
    'one row a check. Reads everything, so its cost follows the history. A view is behind, not '
    'wrong, where events came since its last refresh.';
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
BEGIN
    PERFORM spectrum._create_config();
    PERFORM spectrum._create_run_log();
    PERFORM spectrum._create_staging();
    PERFORM spectrum._create_reading();
    PERFORM spectrum._create_dimensions();
    PERFORM spectrum._create_facts();
    PERFORM spectrum._create_rollups();
    PERFORM spectrum._create_events();
    PERFORM spectrum._create_status();
    PERFORM spectrum._provision();
    PERFORM spectrum._release_data();
END
$$;
COMMENT ON FUNCTION spectrum.setup() IS
    'Makes what is missing of Spectrum''s tables and views and gives it to the user. CREATE '
    'EXTENSION calls it; calling it again changes nothing.';
-- Room 90: privileges. Nothing is granted to PUBLIC. Roles are the user's own; these helpers give
-- one what its work needs and nothing else.

CREATE FUNCTION spectrum.grant_ingest(p_role regrole)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA @extschema@ TO %s', p_role);
    EXECUTE format('GRANT INSERT (payload) ON @extschema@.raw_events TO %s', p_role);
END
$$;
COMMENT ON FUNCTION spectrum.grant_ingest(regrole) IS
    'Lets a role insert payloads into raw_events, and nothing else: it reads nothing.';

CREATE FUNCTION spectrum.grant_reader(p_role regrole)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_view regclass;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA analytics TO %s', p_role);
    FOR v_view IN
        SELECT view.oid FROM pg_class AS view
        WHERE view.relnamespace = 'analytics'::regnamespace AND view.relkind = 'v'
            AND view.relname <> 'events'
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO %s', v_view, p_role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum.grant_reader(regrole) IS
    'Lets a role, say a dashboard''s, read the standing views of analytics, and nothing else.';

REVOKE ALL ON ALL ROUTINES IN SCHEMA spectrum, warehouse, analytics FROM PUBLIC;
-- The end of the script. A restore sets row_security to off before it creates the extension, and
-- brings the tables itself.
SELECT spectrum.setup()
WHERE pg_catalog.current_setting('row_security') OPERATOR(pg_catalog.=) 'on';
