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
            WHEN length(p_value::text) > 100
                THEN spectrum._one_line(left(p_value::text, 100)) || '...'
            ELSE spectrum._one_line(p_value::text)
        END
$$;
COMMENT ON FUNCTION spectrum._complaint(text, text, jsonb) IS
    'The message of a failed event, in one line: field, what was expected, the value (its first '
    '100 characters).';

CREATE FUNCTION spectrum._spellings(p_form text, p_step interval, p_count integer)
RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(to_char(timestamp '2001-01-01 00:00:00' + n * p_step, p_form))
    FROM generate_series(0, p_count - 1) AS n
$$;
COMMENT ON FUNCTION spectrum._spellings(text, interval, integer) IS
    'How to_char writes moments, p_step apart, from the beginning of 2001 on. Of constants it is a '
    'constant, and = ANY of it is a look into a table of hashes.';

CREATE FUNCTION spectrum._number_pattern()
RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    -- Not \d, which is any script's digits in some locales: a cast takes ASCII alone.
    SELECT '^[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?$'
$$;
COMMENT ON FUNCTION spectrum._number_pattern() IS
    'Texts of at most 1,000 characters that are read as a number: as money, and as what questions '
    'measure. Far longer ones numeric does not hold. A constant of the plan.';

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
            -- The usual first. Of a pattern each state that it meets costs; LIKE next to nothing.
            WHEN txt.event_id LIKE '________-____-____-____-____________'
                AND txt.event_id NOT LIKE '%-%-%-%-%-%' AND txt.event_id !~ '[^0-9A-Fa-f-]'
                THEN txt.event_id::uuid
            WHEN part.event_id IS NULL OR part.event_id IN ('null', '""') THEN raw.id
            WHEN jsonb_typeof(part.event_id) NOT IN ('string', 'number') THEN NULL
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
                THEN CASE WHEN said.payload = spectrum._forgotten_payload()
                    THEN 'user_id: was forgotten on request'
                    ELSE spectrum._complaint('event_type', 'a text of 1 to 200 characters',
                        part.event_type)
                END
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
                THEN spectrum._complaint(rare.time_field,
                    'an ISO 8601 timestamp or epoch seconds or milliseconds', rare.occurred_at)
            WHEN typed.occurred_at < config.earliest_event
                THEN spectrum._complaint(rare.time_field,
                    'a time from ' || (config.earliest_event AT TIME ZONE 'UTC')::text
                    || ' UTC (config.earliest_event) on', rare.occurred_at)
            WHEN typed.occurred_at > raw.received_at + config.max_clock_skew
                THEN spectrum._complaint(rare.time_field,
                    'a time up to received_at + ' || config.max_clock_skew::text
                    || ' (config.max_clock_skew)', rare.occurred_at)
            WHEN jsonb_typeof(part.geo) NOT IN ('object', 'null')
                THEN spectrum._complaint('geo', 'an object', part.geo)
            WHEN jsonb_typeof(rare.country) NOT IN ('string', 'null')
                OR length(txt.country) > 200
                THEN spectrum._complaint('geo.country', 'a text of at most 200 characters',
                    rare.country)
            WHEN jsonb_typeof(rare.region) NOT IN ('string', 'null')
                OR length(txt.region) > 200
                THEN spectrum._complaint('geo.region', 'a text of at most 200 characters',
                    rare.region)
            WHEN jsonb_typeof(rare.city) NOT IN ('string', 'null')
                OR length(txt.city) > 200
                THEN spectrum._complaint('geo.city', 'a text of at most 200 characters',
                    rare.city)
            WHEN jsonb_typeof(part.properties) NOT IN ('object', 'null')
                THEN spectrum._complaint('properties', 'an object', part.properties)
            WHEN txt.revenue IS NOT NULL AND typed.revenue IS NULL
                THEN spectrum._complaint('properties.' || config.revenue_property,
                    'a number below 10^15 in size', rare.revenue)
            WHEN typed.revenue IS NOT NULL AND part.properties -> 'currency' <> 'null'
                AND (jsonb_typeof(part.properties -> 'currency') <> 'string'
                    OR part.properties ->> 'currency' !~ '^[A-Za-z]{3}$')
                THEN spectrum._complaint('properties.currency', 'three letters',
                    part.properties -> 'currency')
            -- Last, so that who finds this complaint knows that it is the only one.
            WHEN typed.occurred_at < horizon.open_from
                THEN spectrum._complaint(rare.time_field,
                    spectrum._closed_expectation(horizon.open_from), coalesce(rare.occurred_at,
                        to_jsonb(raw.received_at)))
        END AS error_msg,
        typed.refused_by
    FROM @extschema@.raw_events AS raw
    CROSS JOIN spectrum.config
    CROSS JOIN spectrum.horizon
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
    -- Personal data as the rules leave it. Whether there are rules is asked once a query.
    CROSS JOIN LATERAL (
        SELECT CASE WHEN (SELECT privacy.rules FROM spectrum.privacy) IS NULL THEN body.payload
            ELSE spectrum._protect(body.payload, raw.treated,
                (SELECT privacy.rules FROM spectrum.privacy),
                (SELECT known.inner_pad FROM spectrum.pii_key AS known),
                (SELECT known.outer_pad FROM spectrum.pii_key AS known))
        END AS payload
        OFFSET 0
    ) AS said
    CROSS JOIN LATERAL (
        SELECT
            said.payload -> 'event_id' AS event_id,
            said.payload -> 'event_type' AS event_type,
            said.payload -> 'account_id' AS account_id,
            said.payload -> 'user_id' AS user_id,
            said.payload -> 'geo' AS geo,
            said.payload -> 'properties' AS properties
        OFFSET 0
    ) AS part
    -- No OFFSET 0: wanted of few events.
    CROSS JOIN LATERAL (
        SELECT
            part.geo -> 'country' AS country,
            part.geo -> 'region' AS region,
            part.geo -> 'city' AS city,
            part.properties -> config.revenue_property AS revenue,
            coalesce(nullif(said.payload -> 'occurred_at', 'null'), said.payload -> 'timestamp')
                AS occurred_at,
            CASE WHEN said.payload -> 'occurred_at' <> 'null' THEN 'occurred_at'
                ELSE 'timestamp' END AS time_field
    ) AS rare
    CROSS JOIN LATERAL (
        SELECT
            said.payload ->> 'event_id' AS event_id,
            said.payload ->> 'event_type' AS event_type,
            said.payload ->> 'account_id' AS account_id,
            said.payload ->> 'user_id' AS user_id,
            part.geo ->> 'country' AS country,
            part.geo ->> 'region' AS region,
            part.geo ->> 'city' AS city,
            coalesce(said.payload ->> 'occurred_at', said.payload ->> 'timestamp') AS occurred_at,
            part.properties ->> config.revenue_property AS revenue
        OFFSET 0
    ) AS txt
    CROSS JOIN LATERAL (
        SELECT
            CASE
                -- The usual forms first, place by place: a pattern costs as much as all the rest of
                -- the reading.
                WHEN txt.occurred_at LIKE '____-__-__T__:__:__%'
                    AND left(txt.occurred_at, 4)
                        = ANY (spectrum._spellings('YYYY', '1 year', 100))
                    AND substr(txt.occurred_at, 6, 5)
                        = ANY (spectrum._spellings('MM-DD', '1 day', 365))
                    AND substr(txt.occurred_at, 12, 2)
                        = ANY (spectrum._spellings('HH24', '1 hour', 24))
                    AND substr(txt.occurred_at, 15, 2)
                        = ANY (spectrum._spellings('MI', '1 minute', 60))
                    AND substr(txt.occurred_at, 18, 2)
                        = ANY (spectrum._spellings('SS', '1 second', 60))
                    AND (substr(txt.occurred_at, 20) IN ('Z', '+00:00')
                        OR (substr(txt.occurred_at, 20) LIKE ANY ('{.______+00:00,.______Z}')
                            AND substr(txt.occurred_at, 21, 6) !~ '[^0-9]')
                        OR (substr(txt.occurred_at, 20) LIKE '.___Z'
                            AND substr(txt.occurred_at, 21, 3) !~ '[^0-9]'))
                    THEN txt.occurred_at::timestamptz
                WHEN txt.occurred_at IS NULL THEN raw.received_at
                WHEN jsonb_typeof(rare.occurred_at) NOT IN ('string', 'number') THEN NULL
                -- A calendar day and a time of day with a zone, none meaning UTC.
                WHEN txt.occurred_at
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
                WHEN jsonb_typeof(rare.occurred_at) = 'number'
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
                WHEN txt.revenue IS NULL THEN NULL
                WHEN jsonb_typeof(rare.revenue) = 'number'
                    OR (jsonb_typeof(rare.revenue) = 'string'
                        AND char_length(txt.revenue) <= 1000
                        AND txt.revenue ~ spectrum._number_pattern())
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
