-- Room 60, standing funnels, what is frozen of them: before a month of facts is purged, the entries
-- that began in it are walked a last time. Where they end is behind them by no more than a window,
-- so inside the guard of spectrum.horizon: nothing can change them. Of each unit the one that would
-- count is kept, and stands from then on beside what the remaining facts say.

CREATE FUNCTION spectrum._create_frozen_funnels()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.rollup_frozen_entries') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.rollup_frozen_entries (
        report_id integer NOT NULL,
        unit bigint NOT NULL,
        scope bigint NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        step_times timestamptz[] NOT NULL,
        CONSTRAINT rollup_frozen_entries_pkey PRIMARY KEY (report_id, unit, scope)
    );
    COMMENT ON TABLE spectrum.rollup_frozen_entries IS
        'Of each unit the one entry that a funnel would count of those that began before '
        'spectrum.horizon.facts_from: what its facts said that are purged.';
    COMMENT ON COLUMN spectrum.rollup_frozen_entries.report_id IS 'spectrum.reports, kind funnel.';
    COMMENT ON COLUMN spectrum.rollup_frozen_entries.unit IS 'See rollup_funnel_entries.';
    COMMENT ON COLUMN spectrum.rollup_frozen_entries.step_times IS
        'As there; empty: the first entry, which alone counts, was voided.';
END
$$;
COMMENT ON FUNCTION spectrum._create_frozen_funnels() IS
    'Room 60: makes spectrum.rollup_frozen_entries.';

CREATE FUNCTION analytics._lay_out_frozen_units(
    p_keys integer[],
    p_unit text,
    p_window interval,
    p_from timestamptz,
    p_until timestamptz
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM analytics._empty_funnel_units();
    INSERT INTO pg_temp.spectrum_funnel_units (unit, scope, read_from, read_until, enter_until)
    SELECT DISTINCT touched.unit, touched.scope, p_from, p_until + p_window, p_until
    FROM (
        SELECT DISTINCT fact.user_key, fact.account_key
        FROM warehouse.fact_events AS fact
        WHERE fact.occurred_at >= p_from AND fact.occurred_at < p_until
            AND fact.event_type_key = ANY (p_keys) AND fact.user_key <> 0
    ) AS active
    LEFT JOIN spectrum.shared_users USING (user_key)
    CROSS JOIN LATERAL (
        SELECT active.account_key AS unit, active.account_key AS scope
        WHERE p_unit = 'account' AND active.account_key <> 0
        UNION ALL
        SELECT active.user_key, active.account_key
        WHERE p_unit <> 'account' AND shared_users.user_key IS NULL
        UNION ALL
        SELECT active.user_key, split.scope
        FROM unnest(ARRAY[0, -active.account_key]) AS split (scope)
        WHERE p_unit <> 'account' AND shared_users.user_key IS NOT NULL
    ) AS touched;
END
$$;
COMMENT ON FUNCTION analytics._lay_out_frozen_units(
    integer[], text, interval, timestamptz, timestamptz
) IS
    'Lays out the units that may have entered a funnel in [p_from, p_until), to be walked as far '
    'as these entries go.';

CREATE FUNCTION analytics._freeze_funnel(
    p_report integer,
    p_from timestamptz,
    p_until timestamptz
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    r_funnel record;
    r_masks record;
BEGIN
    SELECT definition.* INTO r_funnel
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.funnels, report.definition)
        AS definition
    WHERE report.report_id = p_report;
    -- Each session counts by itself; those that began before are not looked at again.
    IF r_funnel.unit = 'session' THEN
        RETURN;
    END IF;
    r_masks := analytics._funnel_masks(r_funnel.steps, r_funnel.exclusions);
    PERFORM analytics._lay_out_frozen_units(
        r_masks.keys, r_funnel.unit, r_funnel.time_window, p_from, p_until
    );
    INSERT INTO spectrum.rollup_frozen_entries AS kept (
        report_id, unit, scope, breakdown, step_times
    )
    SELECT p_report, walked.unit, walked.scope, walked.breakdown, walked.step_times
    FROM analytics._walk_funnel_units(
        jsonb_array_length(r_funnel.steps), r_masks.keys, r_masks.filters, r_masks.bits,
        r_funnel.time_window, r_funnel.step_order, r_funnel.entry = 'first', r_funnel.unit,
        r_funnel.breakdown, r_funnel.attribution = 'last',
        coalesce(r_funnel.exclusions, '[]') <> '[]'
    ) AS walked
    ON CONFLICT (report_id, unit, scope) DO UPDATE SET
        breakdown = excluded.breakdown,
        step_times = excluded.step_times
    WHERE r_funnel.entry <> 'first'
        AND cardinality(excluded.step_times) > cardinality(kept.step_times);
END
$$;
COMMENT ON FUNCTION analytics._freeze_funnel(integer, timestamptz, timestamptz) IS
    'Keeps the entries of [p_from, p_until) that count, before their facts are purged.';
