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
        frozen_last_at timestamptz,
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
    COMMENT ON COLUMN analytics.mv_event_catalog.frozen_last_at IS
        'Of the last one whose fact is purged; NULL: none is.';

    CREATE VIEW analytics.event_catalog WITH (security_barrier) AS
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
        ) AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR kept.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)))
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
        sum(news.sign), min(news.occurred_at), max(news.occurred_at)
    FROM pg_temp.spectrum_news AS news
    CROSS JOIN LATERAL jsonb_each(news.properties) AS each
    WHERE news.sign <> 0 AND news.user_key <= p_built_to
    GROUP BY 1, 2, 3, 4
    UNION ALL
    SELECT news.scope, news.event_type_key, '', '', sum(news.sign), min(news.occurred_at),
        max(news.occurred_at)
    FROM pg_temp.spectrum_news AS news
    WHERE news.sign <> 0 AND news.user_key <= p_built_to
    GROUP BY 1, 2;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_properties(bigint) IS
    'Lays out in pg_temp.spectrum_properties what the news say of event types and properties. The '
    'times are of what came and what went: what went is inside the times kept.';

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
    v_earliest timestamptz := (
        SELECT greatest(config.earliest_event, spectrum._facts_from()) FROM spectrum.config
    );
    v_is_first boolean;
    v_month timestamptz;
    v_until timestamptz;
BEGIN
    FOREACH v_is_first IN ARRAY '{true, false}'::boolean[] LOOP
        SELECT
            date_trunc('month',
                CASE WHEN v_is_first THEN min(lost_at) ELSE max(lost_at) END, 'UTC'),
            CASE WHEN v_is_first THEN max(coalesce(until_at, now() + interval '1 month'))
                ELSE min(greatest(until_at, v_earliest)) END
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

    UPDATE analytics.mv_event_catalog AS sums SET last_at = sums.frozen_last_at
    FROM pg_temp.spectrum_lost_ends AS lost
    WHERE NOT lost.is_first AND sums.frozen_last_at IS NOT NULL
        AND sums.report_id = p_report AND sums.account_id = lost.account_id
        AND sums.event_type_key = lost.event_type_key AND sums.property = lost.property
        AND sums.json_type = lost.json_type;
END
$$;
COMMENT ON FUNCTION analytics._find_lost_ends(integer, bigint) IS
    'Finds the first and last times that were lost, month by month from where they were. One that '
    'is not found is of facts that further notes take back; it stays empty until they come.';

CREATE FUNCTION analytics._freeze_catalog(
    p_report integer,
    p_from timestamptz,
    p_until timestamptz
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    WITH found AS (
        SELECT fact.account_key, fact.event_type_key, p.property, p.json_type,
            max(fact.occurred_at) AS at
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
        WHERE fact.occurred_at >= p_from AND fact.occurred_at < p_until
        GROUP BY 1, 2, 3, 4
    )
    UPDATE analytics.mv_event_catalog AS sums
    SET frozen_last_at = greatest(sums.frozen_last_at, last.at)
    FROM (
        SELECT scopes.account_id, found.event_type_key, found.property, found.json_type,
            max(found.at) AS at
        FROM found
        JOIN warehouse.dim_accounts AS dim USING (account_key)
        CROSS JOIN LATERAL (VALUES ('*'), (dim.account_id)) AS scopes (account_id)
        GROUP BY 1, 2, 3, 4
    ) AS last
    WHERE sums.report_id = p_report AND sums.account_id = last.account_id
        AND sums.event_type_key = last.event_type_key AND sums.property = last.property
        AND sums.json_type = last.json_type;
END
$$;
COMMENT ON FUNCTION analytics._freeze_catalog(integer, timestamptz, timestamptz) IS
    'Keeps when the last event of [p_from, p_until) was, before these facts are purged.';

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
