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
            CONSTRAINT config_max_idle_range CHECK (max_idle >= '1 ms'),
        facts_keep interval
            CONSTRAINT config_facts_keep_range CHECK (facts_keep >= '1 month'),
        pack_facts_after interval
            CONSTRAINT config_pack_facts_after_range CHECK (pack_facts_after >= '1 month')
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
    COMMENT ON COLUMN spectrum.config.facts_keep IS
        'Age at which whole months of facts are purged: see spectrum.purge_facts. NULL: never.';
    COMMENT ON COLUMN spectrum.config.pack_facts_after IS
        'Age at which whole months of facts are packed: see spectrum.pack_facts. NULL: never.';

    INSERT INTO spectrum.config DEFAULT VALUES;
END
$$;
COMMENT ON FUNCTION spectrum._create_config() IS 'Room 10: makes spectrum.config and its row.';

CREATE FUNCTION spectrum._one_line(p_text text)
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT regexp_replace(p_text, '[\u0001-\u001f\u007f-\u009f\u2028\u2029]+', ' ', 'g')
$$;
COMMENT ON FUNCTION spectrum._one_line(text) IS
    'A message as it is kept: without line feeds and other control characters, which could make '
    'a log say what nobody wrote.';

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

CREATE FUNCTION spectrum.configure(
    p_setting text,
    p_value text,
    p_lose_frozen boolean DEFAULT false
)
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
        PERFORM spectrum.rebuild_reports(NULL, p_lose_frozen);
    ELSIF v_after <> v_before AND p_setting = 'refund_events' THEN
        PERFORM spectrum.rebuild_reports('revenue', p_lose_frozen);
    ELSIF v_after <> v_before AND p_setting = 'currency' THEN
        -- Facts carry the currency of their money; subscription events are read anew.
        PERFORM spectrum.rebuild_reports('mrr', p_lose_frozen);
    END IF;
    RETURN v_after;
END
$$;
COMMENT ON FUNCTION spectrum.configure(text, text, boolean) IS
    'Sets one setting of spectrum.config and returns its value as stored. The value is checked: '
    '22023 says what is wrong and what the setting means. One that views are made by raises 55000 '
    'where facts were purged, unless p_lose_frozen: then the views are made of what remains.';

CREATE FUNCTION spectrum._lock_key(p_name text)
RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT hashtextextended('spectrum: ' || p_name, 0)
$$;
COMMENT ON FUNCTION spectrum._lock_key(text) IS 'Advisory lock key of one of Spectrum''s turns.';
