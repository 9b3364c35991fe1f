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
        PERFORM spectrum._scope_news();
        PERFORM spectrum._tell_reports('{served, building}');
    END IF;
    RETURN v_counted;
END
$$;
COMMENT ON FUNCTION spectrum._count_news(bigint) IS
    'Step of a refresh: counts the news of the next batches, about p_events facts.';

CREATE FUNCTION spectrum._lay_out_units(p_after bigint, p_until bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_units',
        'user_key bigint, scope bigint, PRIMARY KEY (user_key, scope)');
    INSERT INTO pg_temp.spectrum_units (user_key, scope)
    SELECT news.user_key, news.scope FROM pg_temp.spectrum_news AS news
    UNION
    -- Days outlive facts.
    SELECT known.user_key, known.scope FROM spectrum.rollup_user_days AS known
    WHERE known.report_id = analytics._kept_by('activity')
        AND known.user_key > p_after AND known.user_key <= p_until
        AND isfinite(spectrum._facts_from());

    INSERT INTO pg_temp.spectrum_scopes (scope, account_id)
    SELECT units.scope, shown.account_id
    FROM (SELECT DISTINCT scope FROM pg_temp.spectrum_units WHERE scope <> 0) AS units
    JOIN warehouse.dim_accounts AS dim ON dim.account_key = abs(units.scope)
    CROSS JOIN LATERAL (
        SELECT dim.account_id
        UNION ALL
        SELECT '*' WHERE units.scope > 0
    ) AS shown
    ON CONFLICT DO NOTHING;
END
$$;
COMMENT ON FUNCTION spectrum._lay_out_units(bigint, bigint) IS
    'Lays out in pg_temp.spectrum_units the units of the users in (p_after, p_until], for reports '
    'that are built from the days that are kept: those of the news, and those whose facts were '
    'purged; with their scopes.';

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
    UPDATE spectrum.reports AS report SET complete_from = horizon.facts_from
    FROM spectrum.horizon
    WHERE report.report_id = ANY (v_built) AND report.built_to = -1
        AND report.complete_from IS DISTINCT FROM horizon.facts_from;
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
        PERFORM spectrum._lay_out_units(v_after, v_after);
        PERFORM spectrum._tell_reports('{building}', v_built);
        PERFORM spectrum._serve_report(report_id) FROM unnest(v_built) AS report_id;
        RETURN 0;
    END IF;

    PERFORM spectrum._clear_news();
    v_added := spectrum._add_history(v_after, v_until);
    PERFORM spectrum._scope_news();
    PERFORM spectrum._lay_out_units(v_after, v_until);
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
-- What the news touch is looked up, not found in a scan that grows with the history.
SET random_page_cost = 1.1
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
    v_as_of timestamptz;
    v_news_left boolean;
    v_built bigint;
    v_cleared bigint;
    v_hot_only text := spectrum._read_hot_only('on');
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
    PERFORM spectrum._read_hot_only(v_hot_only);
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
