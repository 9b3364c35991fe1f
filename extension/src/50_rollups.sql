-- Room 50: what changed. Each batch notes, in its own transaction, which users, accounts, event
-- types and places its facts touch and when. The refresh folds these notes into the dimensions and
-- makes again the standing views that are out of date; refresh_state says how far each one is.

CREATE FUNCTION spectrum._create_rollups()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.touched') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.touched (
        user_key bigint,
        account_key bigint,
        event_type_key integer,
        geo_key integer,
        first_at timestamptz NOT NULL,
        last_at timestamptz NOT NULL,
        CONSTRAINT touched_names_one
        CHECK (num_nonnulls(user_key, account_key, event_type_key, geo_key) = 1)
    );
    COMMENT ON TABLE spectrum.touched IS
        'Notes of the batches since the last refresh: who and what got facts or lost them. One '
        'key a row; only ever inserted and deleted.';
    COMMENT ON COLUMN spectrum.touched.user_key IS 'dim_users.';
    COMMENT ON COLUMN spectrum.touched.account_key IS 'dim_accounts.';
    COMMENT ON COLUMN spectrum.touched.event_type_key IS 'dim_event_types.';
    COMMENT ON COLUMN spectrum.touched.geo_key IS 'dim_geography.';
    COMMENT ON COLUMN spectrum.touched.first_at IS 'Earliest occurred_at touched.';
    COMMENT ON COLUMN spectrum.touched.last_at IS 'Latest occurred_at touched.';

    CREATE TABLE spectrum.refresh_state (
        view_name text NOT NULL CONSTRAINT refresh_state_pkey PRIMARY KEY,
        position integer NOT NULL,
        follows_clock boolean NOT NULL,
        is_stale boolean NOT NULL DEFAULT true,
        as_of timestamptz,
        refreshed_at timestamptz,
        seconds double precision
    );
    COMMENT ON TABLE spectrum.refresh_state IS 'How far each materialized view of analytics is.';
    COMMENT ON COLUMN spectrum.refresh_state.view_name IS 'Materialized view in schema analytics.';
    COMMENT ON COLUMN spectrum.refresh_state.position IS 'Order of refresh.';
    COMMENT ON COLUMN spectrum.refresh_state.follows_clock IS
        'Whether it changes when a day begins, without any event.';
    COMMENT ON COLUMN spectrum.refresh_state.is_stale IS
        'Facts, definitions or settings changed since the last refresh.';
    COMMENT ON COLUMN spectrum.refresh_state.as_of IS
        'Watermark: every event received before is counted.';
    COMMENT ON COLUMN spectrum.refresh_state.refreshed_at IS 'When it was last made again.';
    COMMENT ON COLUMN spectrum.refresh_state.seconds IS 'How long that took.';
END
$$;
COMMENT ON FUNCTION spectrum._create_rollups() IS
    'Room 50: makes spectrum.touched and spectrum.refresh_state.';

CREATE FUNCTION spectrum._mark_stale(p_view text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE spectrum.refresh_state SET is_stale = true
    WHERE (p_view IS NULL OR view_name = p_view) AND NOT is_stale;
END
$$;
COMMENT ON FUNCTION spectrum._mark_stale(text) IS
    'Has the next refresh make a standing view again; all of them without an argument.';

CREATE FUNCTION spectrum._fold_touched()
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_notes bigint;
BEGIN
    WITH notes AS (
        DELETE FROM spectrum.touched
        RETURNING user_key, account_key, event_type_key, geo_key, first_at, last_at
    ), hulls AS MATERIALIZED (
        SELECT user_key, account_key, event_type_key, geo_key,
            min(first_at) AS first_at, max(last_at) AS last_at, count(*) AS notes
        FROM notes
        GROUP BY user_key, account_key, event_type_key, geo_key
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
    ), places AS (
        UPDATE warehouse.dim_geography AS dim
        SET first_seen = least(dim.first_seen, hulls.first_at),
            last_seen = greatest(dim.last_seen, hulls.last_at)
        FROM hulls WHERE dim.geo_key = hulls.geo_key
            AND (dim.first_seen IS NULL OR hulls.first_at < dim.first_seen
                OR hulls.last_at > dim.last_seen)
    )
    SELECT coalesce(sum(hulls.notes), 0) INTO v_notes FROM hulls;
    RETURN v_notes;
END
$$;
COMMENT ON FUNCTION spectrum._fold_touched() IS
    'Takes the batches'' notes, widens first_seen and last_seen of the dimensions by them, and '
    'returns how many there were.';
