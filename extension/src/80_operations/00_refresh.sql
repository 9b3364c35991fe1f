-- Room 80, refresh: brings the standing views up to the facts. A view that nothing changed is left
-- alone, because REFRESH CONCURRENTLY costs the size of the view however little changed.

CREATE FUNCTION spectrum._register_views()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO spectrum.refresh_state (view_name, position, follows_clock) VALUES
        ('mv_active_users', 1, false),
        ('mv_revenue_summary', 2, false),
        ('mv_conversion_funnels', 3, false),
        ('mv_funnel_days', 4, false),
        ('mv_retention_cohorts', 5, true),
        ('mv_experiment_results', 6, false)
    ON CONFLICT (view_name) DO NOTHING;
END
$$;
COMMENT ON FUNCTION spectrum._register_views() IS
    'Lists the standing views in the order of their refresh.';

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

CREATE FUNCTION spectrum._is_populated(p_view text)
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT view.relispopulated FROM pg_class AS view
        WHERE view.oid = to_regclass(format('analytics.%I', p_view))
    );
END
$$;
COMMENT ON FUNCTION spectrum._is_populated(text) IS
    'Whether a materialized view of analytics holds rows; NULL where there is no such view.';

CREATE FUNCTION spectrum._refresh_view(p_view text, p_as_of timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_started_at timestamptz := clock_timestamp();
BEGIN
    -- One that a restore left empty cannot be refreshed beside its readers; it has none.
    EXECUTE format('REFRESH MATERIALIZED VIEW %s analytics.%I',
        CASE WHEN spectrum._is_populated(p_view) THEN 'CONCURRENTLY' ELSE '' END, p_view);
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
            OR NOT spectrum._is_populated(state.view_name)
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
