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

CREATE FUNCTION analytics._move_funnel_seconds(p_report integer)
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
    MERGE INTO spectrum.rollup_funnel_seconds AS known
    USING (SELECT * FROM pg_temp.spectrum_funnel_steps WHERE step > 1) AS moved
    ON known.report_id = p_report AND known.account_id = moved.account_id
        AND known.breakdown = moved.breakdown AND known.step = moved.step
        AND known.microseconds = moved.microseconds
    WHEN MATCHED THEN UPDATE SET units = known.units + moved.units
    WHEN NOT MATCHED THEN INSERT (report_id, account_id, breakdown, step, microseconds, units)
    VALUES (p_report, moved.account_id, moved.breakdown, moved.step, moved.microseconds,
        moved.units);
    DELETE FROM spectrum.rollup_funnel_seconds AS known
    USING pg_temp.spectrum_funnel_steps AS moved
    WHERE moved.units < 0 AND known.report_id = p_report AND known.account_id = moved.account_id
        AND known.breakdown = moved.breakdown AND known.step = moved.step
        AND known.microseconds = moved.microseconds AND known.units = 0;
END
$$;
COMMENT ON FUNCTION analytics._move_funnel_seconds(integer) IS
    'Moves rollup_funnel_seconds by the steps laid out.';

CREATE FUNCTION analytics._move_funnel_sums(p_report integer, p_steps integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM analytics._move_funnel_seconds(p_report);

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
SET plan_cache_mode = force_generic_plan
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
    v_accounts text[];
    v_emptied date[];
BEGIN
    SELECT spectrum.period_starts(
        'day', min(entry.entered_at), max(entry.entered_at) + interval '1 us'
    ) INTO v_starts
    FROM pg_temp.spectrum_entry_changes AS changed
    CROSS JOIN LATERAL (
        VALUES (changed.old_times[1]), (changed.new_times[1])
    ) AS entry (entered_at);
    v_days := spectrum.period_dates(v_starts);

    WITH changed AS (
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
            users = sums.users + excluded.users
        WHERE excluded.users <> 0
        RETURNING sums.account_id, sums.day, sums.step, sums.users
    )
    SELECT array_agg(changed.account_id), array_agg(changed.day) INTO v_accounts, v_emptied
    FROM changed
    WHERE changed.step = 1 AND changed.users = 0;
    DELETE FROM analytics.mv_funnel_days AS sums
    USING unnest(v_accounts, v_emptied) AS emptied (account_id, day)
    WHERE sums.report_id = p_report AND sums.account_id = emptied.account_id
        AND sums.day = emptied.day;
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
        p_report, v_built_to, v_steps, r_masks.keys, r_funnel.unit, r_funnel.time_window,
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
