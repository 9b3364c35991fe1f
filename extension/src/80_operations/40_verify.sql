-- Room 80, verify: the proof. Each check makes something again from what it came from and compares.

CREATE FUNCTION spectrum._verify_facts()
RETURNS TABLE (check_name text, expected bigint, actual bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
-- Whole tables against whole tables: statistics of an hour ago must not make it quadratic.
SET enable_nestloop = off
AS $$
DECLARE
    v_facts_from timestamptz := spectrum._readable_from();
    -- What is closed stays as it is, whatever its raw event says today.
    v_open_from timestamptz := (
        SELECT coalesce(horizon.open_from, '-infinity') FROM spectrum.horizon
    );
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
    WHERE reading.status = 'done' AND reading.refused_by IS NULL
        AND ledger.occurred_at >= v_open_from;

    RETURN QUERY
    SELECT 'ledger and facts name the same events', count(*),
        count(*) FILTER (WHERE ledger.event_id IS NOT NULL AND fact.event_id IS NOT NULL)
    FROM (
        SELECT known.* FROM warehouse.event_ledger AS known
        WHERE known.occurred_at >= v_facts_from
    ) AS ledger
    FULL JOIN (
        SELECT known.* FROM warehouse.visible_events AS known
        WHERE known.occurred_at >= v_facts_from
    ) AS fact USING (event_id, occurred_at, user_key);

    RETURN QUERY
    SELECT 'every key of a fact is in its dimension', count(*), count(*) FILTER (
        WHERE dim_accounts.account_key IS NOT NULL AND dim_users.user_key IS NOT NULL
            AND dim_event_types.event_type_key IS NOT NULL AND dim_geography.geo_key IS NOT NULL
    )
    FROM warehouse.visible_events AS fact
    LEFT JOIN warehouse.dim_accounts USING (account_key)
    LEFT JOIN warehouse.dim_users USING (user_key)
    LEFT JOIN warehouse.dim_event_types USING (event_type_key)
    LEFT JOIN warehouse.dim_geography USING (geo_key);
END
$$;
COMMENT ON FUNCTION spectrum._verify_facts() IS
    'Checks of verify(): facts against raw events, ledger and dimensions.';

CREATE FUNCTION spectrum._reproducible(p_view text, p_from date)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_names text[] := ARRAY(
        SELECT report.name FROM spectrum.reports AS report
        JOIN spectrum.report_kinds AS kind USING (kind)
        WHERE p_view = ANY (kind.views) AND report.state = 'served'
            AND report.complete_from = spectrum._facts_from()
            AND report.definition ->> 'unit' IS DISTINCT FROM 'session'
    );
BEGIN
    RETURN CASE
        WHEN p_from IS NULL OR p_view IN ('throughput_minutes', 'reports') THEN 'true'
        WHEN p_view = 'active_users' THEN format('day >= %L AND mau > 0', p_from)
        WHEN p_view IN ('daily_events', 'revenue_summary', 'operations', 'error_rates_daily',
            'sessions_daily', 'attributed_conversions', 'path_flows')
            THEN format('day >= %L', p_from)
        WHEN p_view = 'stickiness_periods' THEN format('period >= %L', p_from)
        -- Defined since the last purge, so made of what there is.
        WHEN p_view IN ('conversion_funnels', 'funnel_days')
            THEN format('funnel = ANY (%L)', v_names)
        WHEN p_view = 'experiment_results' THEN format('experiment = ANY (%L)', v_names)
        ELSE 'false'
    END;
END
$$;
COMMENT ON FUNCTION spectrum._reproducible(text, date) IS
    'Which rows of a standing view can be made again from the facts, as a condition. p_from: the '
    'first day around which all facts are there; NULL: they all are.';

CREATE FUNCTION spectrum.verify()
RETURNS TABLE (check_name text, expected bigint, actual bigint, ok boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    r_view record;
    v_source text := coalesce(current_setting('spectrum.from_facts', true), '');
    v_hot_only text := coalesce(current_setting('spectrum.hot_only', true), '');
    v_from date := (
        SELECT (horizon.open_from AT TIME ZONE config.timezone)::date + 1
        FROM spectrum.horizon CROSS JOIN spectrum.config
        WHERE horizon.facts_from IS NOT NULL
    );
    -- All facts are there, packed or not, as they were when they were counted.
    v_is_whole boolean := (
        SELECT horizon.packed_from = '-infinity' AND horizon.packed_without IS NULL
        FROM spectrum.horizon
    );
    v_frozen text[] := '{}'::text[];
BEGIN
    PERFORM set_config('spectrum.from_facts', 'on', true);
    RETURN QUERY
    SELECT facts.check_name, facts.expected, facts.actual, facts.expected = facts.actual
    FROM spectrum._verify_facts() AS facts;

    FOR r_view IN
        SELECT view.name, string_agg(format('%I', shown.attname), ', ' ORDER BY shown.attnum)
            AS columns, whole.is_whole,
            spectrum._reproducible(view.name, CASE WHEN NOT whole.is_whole THEN v_from END)
                AS condition
        FROM spectrum.report_kinds AS kind
        CROSS JOIN LATERAL unnest(kind.views) WITH ORDINALITY AS view (name, number)
        CROSS JOIN LATERAL (
            SELECT v_is_whole IS TRUE AND NOT EXISTS (
                SELECT FROM spectrum.reports AS report
                WHERE report.kind = kind.kind AND report.state = 'served'
                    AND report.complete_from IS NOT NULL
            ) AS is_whole
        ) AS whole
        JOIN pg_attribute AS shown
            ON shown.attrelid = format('analytics.%I', view.name)::regclass
                AND shown.attnum > 0 AND shown.attname <> 'as_of'
        GROUP BY kind.position, view.number, view.name, whole.is_whole
        ORDER BY kind.position, view.number
    LOOP
        IF r_view.condition <> 'true' THEN
            v_frozen := v_frozen || r_view.name;
            CONTINUE WHEN r_view.condition = 'false';
        END IF;
        PERFORM spectrum._read_hot_only(CASE WHEN NOT r_view.is_whole THEN 'on' END);
        RETURN QUERY EXECUTE format(
            'WITH made_again AS MATERIALIZED (SELECT %s FROM analytics.%I() WHERE %5$s), shown AS '
            'MATERIALIZED (SELECT %1$s FROM analytics.%3$I WHERE %5$s), differences AS ('
            '(SELECT * FROM made_again EXCEPT ALL SELECT * FROM shown) UNION ALL '
            '(SELECT * FROM shown EXCEPT ALL SELECT * FROM made_again)) '
            'SELECT %4$L, 0::bigint, count(*), count(*) = 0 FROM differences',
            r_view.columns, '_standing_' || r_view.name, r_view.name,
            r_view.name || ': rows that differ when made again', r_view.condition);
    END LOOP;
    IF v_frozen <> '{}' THEN
        RETURN QUERY SELECT format('frozen before %s, and not made again: %s', v_from,
            array_to_string(v_frozen, ', ')), 0::bigint, 0::bigint, true;
    END IF;
    PERFORM set_config('spectrum.from_facts', v_source, true);
    PERFORM spectrum._read_hot_only(v_hot_only);
END
$$;
COMMENT ON FUNCTION spectrum.verify() IS
    'Makes the facts again from the raw events and the standing views from the facts, and '
    'compares: one row a check. Reads everything, so its cost follows the history. A view is '
    'behind, not wrong, where events came since its last refresh. Where facts were purged, it '
    'compares what can be made again, and the last row names what is not, or only in part.';
