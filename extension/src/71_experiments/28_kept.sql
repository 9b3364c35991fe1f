-- Room 71, standing experiments, how they are kept: of each user that the news concern, what he
-- contributed is taken out of the totals, and what he contributes now is put in. Kept are his
-- exposure and, by day, what he did of each metric: a heavy user is read on the days of the news
-- alone, unless his exposure changed. Results are made again, from the totals, of the accounts
-- whose totals moved; winsorized ones from the amounts of all units of these accounts.

CREATE FUNCTION analytics._find_exposures(p_report integer, p_plan analytics._experiment_plan)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    UPDATE pg_temp.spectrum_experiment_units AS touched
    SET exposed_at = found.exposed_at, low_variant = found.low_variant,
        high_variant = found.high_variant, variant = found.variant
    FROM (VALUES (false), (true)) AS modes (by_account)
    CROSS JOIN LATERAL analytics._experiment_units(
        analytics._open_plan(p_plan, spectrum._facts_from(), NULL), NULL, modes.by_account, ARRAY(
            SELECT less.user_key FROM pg_temp.spectrum_experiment_units AS less
            WHERE less.is_less AND (less.scope <> 0) = modes.by_account
        )
    ) AS found
    WHERE touched.is_less AND touched.user_key = found.user_key
        AND CASE WHEN modes.by_account THEN abs(touched.scope) = found.account_key
            ELSE touched.scope = 0 END;
    UPDATE pg_temp.spectrum_experiment_units AS touched
    SET exposed_at = least(touched.exposed_at, kept.frozen_at),
        low_variant = least(touched.low_variant, kept.frozen_low),
        high_variant = greatest(touched.high_variant, kept.frozen_high),
        variant = analytics._counted_variant(p_plan.variants,
            least(touched.low_variant, kept.frozen_low),
            greatest(touched.high_variant, kept.frozen_high))
    FROM spectrum.rollup_experiment_units AS kept
    WHERE touched.is_less AND kept.report_id = p_report AND kept.user_key = touched.user_key
        AND kept.scope = touched.scope AND kept.frozen_at IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._find_exposures(integer, analytics._experiment_plan) IS
    'Units laid out of which exposures were taken back: what is left of them is in the facts, and '
    'in what is frozen.';

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
        'user_key bigint, scope bigint, is_less boolean, old_variant text, '
        'old_exposed_at timestamptz, variant text, exposed_at timestamptz, '
        'low_variant text COLLATE "C", high_variant text COLLATE "C"');
    INSERT INTO pg_temp.spectrum_experiment_units (
        user_key, scope, is_less, old_variant, old_exposed_at, exposed_at,
        low_variant, high_variant, variant
    )
    SELECT touched.user_key, touched.scope, touched.is_less, known.variant, known.exposed_at,
        seen.exposed_at, seen.low_variant, seen.high_variant,
        analytics._counted_variant(p_plan.variants, seen.low_variant, seen.high_variant)
    FROM (
        SELECT news.user_key, news.scope,
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
            AND news.event_type_key = ANY (v_types)
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
    ) AS seen ON NOT touched.is_less
    WHERE known.exposed_at IS NOT NULL OR touched.exposed_at IS NOT NULL;

    IF EXISTS (SELECT FROM pg_temp.spectrum_experiment_units WHERE is_less) THEN
        PERFORM analytics._find_exposures(p_report, p_plan);
    END IF;
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
    WHERE unit.variant IS NOT NULL
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
    -- What was done before is frozen. A month in UTC, so a day is on one side of it.
    v_facts_from timestamptz := spectrum._facts_from();
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_experiment_reads',
        'user_key bigint, scope bigint, exposed_at timestamptz, day date, since timestamptz, '
        'until timestamptz');
    INSERT INTO pg_temp.spectrum_experiment_reads (
        user_key, scope, exposed_at, day, since, until
    )
    SELECT unit.user_key, unit.scope, unit.exposed_at, NULL,
        greatest(unit.exposed_at - coalesce(p_plan.cuped, '0'), v_facts_from), 'infinity'
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
    WHERE unit.variant IS NOT DISTINCT FROM unit.old_variant
        AND unit.exposed_at = unit.old_exposed_at
        AND days.day + interval '1 day' > unit.exposed_at - coalesce(p_plan.cuped, '0');
    IF NOT EXISTS (SELECT FROM pg_temp.spectrum_experiment_reads) THEN
        RETURN;
    END IF;

    DELETE FROM spectrum.rollup_experiment_days AS did
    USING pg_temp.spectrum_experiment_reads AS reads
    WHERE did.report_id = p_report AND did.user_key = reads.user_key AND did.scope = reads.scope
        AND (did.day = reads.day OR (reads.day IS NULL AND did.day >= v_facts_from));
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
            array_agg(abs(reads.scope)) AS accounts,
            array_agg(reads.exposed_at) AS exposed_ats, array_agg(reads.since) AS sinces,
            array_agg(reads.until) AS untils
        FROM pg_temp.spectrum_experiment_reads AS reads
        WHERE reads.exposed_at IS NOT NULL
    ) AS known
    CROSS JOIN LATERAL analytics._experiment_happenings(
        p_plan, known.users, known.accounts, known.exposed_ats, known.sinces, known.untils,
        true
    ) AS did
    JOIN pg_temp.spectrum_experiment_units AS unit ON unit.user_key = did.user_key
        AND abs(unit.scope) = did.account_key
    GROUP BY unit.user_key, unit.scope, did.occurred_at::date, did.metric, did.most;
END
$$;
COMMENT ON FUNCTION analytics._move_experiment_days(
    integer, analytics._experiment_plan
) IS
    'Brings rollup_experiment_days up to the facts: on the days of the news, or, of units whose '
    'exposure or variant changed, on all that are not frozen. Units that are left out have theirs '
    'too: they may be counted again, when their facts are purged.';

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
            AND did.scope = unit.scope AND seen.variant IS NOT NULL
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
