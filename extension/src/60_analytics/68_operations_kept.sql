-- Room 60, standing operations, how they are kept: counts of requests, sums of the news. Beside
-- them stands how often each latency occurs in a cell, which is one endpoint's day: of the cells in
-- the news, and no others, the percentiles are found again, each from where it was: it moves by no
-- more than came and went.

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
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_material = off
AS $$
BEGIN
    MERGE INTO spectrum.rollup_latencies AS known
    USING (
        SELECT scopes.account_id, cell.day, cell.endpoint, cell.latency,
            sum(cell.requests) AS requests
        FROM (
            SELECT scope, day, endpoint, latency, sum(sign) AS requests
            FROM pg_temp.spectrum_requests
            WHERE is_request AND latency IS NOT NULL
            GROUP BY scope, day, endpoint, latency
        ) AS cell
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        GROUP BY scopes.account_id, cell.day, cell.endpoint, cell.latency
        HAVING sum(cell.requests) <> 0
        ORDER BY scopes.account_id, cell.day, cell.endpoint, cell.latency
    ) AS moved
    ON known.report_id = p_report AND known.account_id = moved.account_id
        AND known.day = moved.day AND known.endpoint = moved.endpoint
        AND known.latency = moved.latency
    WHEN MATCHED THEN UPDATE SET requests = known.requests + moved.requests
    WHEN NOT MATCHED THEN INSERT (report_id, account_id, day, endpoint, latency, requests)
    VALUES (p_report, moved.account_id, moved.day, moved.endpoint, moved.latency, moved.requests);

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

CREATE FUNCTION analytics._moved_endpoints(p_report integer)
RETURNS TABLE (
    account_id text, day date, endpoint text, requests bigint, errors bigint, measured bigint,
    lows numeric[], belows bigint[], percentiles numeric[]
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- Latencies are read in the order of their index, and no further than needed.
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
BEGIN
    RETURN QUERY
    SELECT moved.account_id, moved.day, moved.endpoint, moved.requests, moved.errors,
        moved.measured, now.*
    FROM (
        SELECT scopes.account_id, request.day, request.endpoint, sum(request.sign) AS requests,
            coalesce(sum(request.sign) FILTER (WHERE request.is_error), 0) AS errors,
            coalesce(sum(request.sign) FILTER (WHERE request.latency IS NOT NULL), 0)
                AS measured,
            array_agg(request.latency) AS latencies, array_agg(request.sign) AS signs
        FROM pg_temp.spectrum_requests AS request
        JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
        WHERE request.is_request
        GROUP BY scopes.account_id, request.day, request.endpoint
    ) AS moved
    LEFT JOIN LATERAL (
        SELECT known.measured, known.lows, known.belows
        FROM analytics.mv_operations AS known
        WHERE known.report_id = p_report AND known.account_id = moved.account_id
            AND known.day = moved.day AND known.endpoint = moved.endpoint
        OFFSET 0
    ) AS old ON true
    CROSS JOIN LATERAL (
        SELECT array_agg(low.latency ORDER BY at.number) AS lows,
            array_agg(low.below::bigint ORDER BY at.number) AS belows,
            array_agg(trim_scale(low.latency + (coalesce(high.latency, low.latency)
                - low.latency) * (at.rank - floor(at.rank))) ORDER BY at.number) AS percentiles
        FROM (
            SELECT f.number, f.fraction * (coalesce(old.measured, 0) + moved.measured - 1)
                    AS rank,
                coalesce(old.lows[f.number], -1) AS pivot,
                coalesce(old.belows[f.number], 0) + (
                    SELECT coalesce(sum(m.sign), 0)
                    FROM unnest(moved.latencies, moved.signs) AS m (latency, sign)
                    WHERE m.latency < old.lows[f.number]
                ) AS below
            FROM unnest('{0.5, 0.95, 0.99}'::numeric[]) WITH ORDINALITY AS f (fraction, number)
        ) AS at
        LEFT JOIN LATERAL (
            (SELECT walk.latency, walk.up_to - walk.requests AS below, walk.up_to
            FROM (
                SELECT known.latency, known.requests, at.below
                    + sum(known.requests) OVER (ORDER BY known.latency) AS up_to
                FROM spectrum.rollup_latencies AS known
                WHERE known.report_id = p_report AND known.account_id = moved.account_id
                    AND known.day = moved.day AND known.endpoint = moved.endpoint
                    AND known.latency >= at.pivot
                ORDER BY known.latency
            ) AS walk
            WHERE at.rank >= at.below AND walk.up_to > floor(at.rank)
            LIMIT 1)
            UNION ALL
            (SELECT walk.latency, walk.below, walk.below + walk.requests
            FROM (
                SELECT known.latency, known.requests, at.below
                    - sum(known.requests) OVER (ORDER BY known.latency DESC) AS below
                FROM spectrum.rollup_latencies AS known
                WHERE known.report_id = p_report AND known.account_id = moved.account_id
                    AND known.day = moved.day AND known.endpoint = moved.endpoint
                    AND known.latency < at.pivot
                ORDER BY known.latency DESC
            ) AS walk
            WHERE at.rank < at.below AND walk.below <= at.rank
            LIMIT 1)
        ) AS low ON true
        LEFT JOIN LATERAL (
            SELECT known.latency FROM spectrum.rollup_latencies AS known
            WHERE known.report_id = p_report AND known.account_id = moved.account_id
                AND known.day = moved.day AND known.endpoint = moved.endpoint
                AND known.latency > low.latency
            ORDER BY known.latency
            LIMIT 1
        ) AS high ON ceil(at.rank) >= low.up_to
    ) AS now;
END
$$;
COMMENT ON FUNCTION analytics._moved_endpoints(integer) IS
    'By how much the requests laid out move the counts of mv_operations, and the percentiles that '
    'its cells have now.';

CREATE FUNCTION analytics._move_endpoints(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_material = off
AS $$
BEGIN
    MERGE INTO analytics.mv_operations AS sums
    USING analytics._moved_endpoints(p_report) AS cell
    ON sums.report_id = p_report AND sums.account_id = cell.account_id AND sums.day = cell.day
        AND sums.endpoint = cell.endpoint
    WHEN MATCHED THEN UPDATE SET
        requests = sums.requests + cell.requests,
        errors = sums.errors + cell.errors,
        measured = sums.measured + cell.measured,
        p50 = cell.percentiles[1],
        p95 = cell.percentiles[2],
        p99 = cell.percentiles[3],
        lows = cell.lows,
        belows = cell.belows
    WHEN NOT MATCHED THEN INSERT (
        report_id, account_id, day, endpoint, requests, errors, measured, p50, p95, p99, lows,
        belows
    ) VALUES (
        p_report, cell.account_id, cell.day, cell.endpoint, cell.requests, cell.errors,
        cell.measured, cell.percentiles[1], cell.percentiles[2], cell.percentiles[3], cell.lows,
        cell.belows
    );

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

