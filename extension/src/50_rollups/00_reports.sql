-- Room 50, reports: what the standing views are kept by. Every standing number is a sum of what
-- single users contribute to it. A report keeps its sums in tables (analytics.mv_*), and beside
-- them, where it needs more than the news to tell what a user contributed so far, a rollup table.
-- A refresh takes the news of the batches, and each report moves its sums by the difference.
--
-- A report that is new, or whose definition or calendar changed, is built from the history, some
-- users at a time in the order of their keys. It follows the news of the users it holds already;
-- the report that it replaces stays served until it is complete.

CREATE FUNCTION spectrum._create_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.reports') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.reports (
        report_id serial NOT NULL CONSTRAINT reports_pkey PRIMARY KEY,
        kind text NOT NULL,
        name text NOT NULL,
        definition jsonb NOT NULL DEFAULT '{}',
        built_to bigint NOT NULL DEFAULT -1,
        state text NOT NULL DEFAULT 'building'
            CONSTRAINT reports_state_is_known CHECK (state IN ('building', 'served', 'discarded')),
        follows_news boolean NOT NULL DEFAULT true,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        complete_from timestamptz
    );
    CREATE UNIQUE INDEX reports_state_key ON spectrum.reports (kind, name, state)
    WHERE state <> 'discarded';
    COMMENT ON TABLE spectrum.reports IS
        'The standing reports: which tables are kept for which definition. Two of one kind and '
        'name: the one that is served, and the one that will take its place once it is built.';
    COMMENT ON COLUMN spectrum.reports.report_id IS 'Key in the mv_ and rollup_ tables.';
    COMMENT ON COLUMN spectrum.reports.kind IS 'Which question: see spectrum.report_kinds.';
    COMMENT ON COLUMN spectrum.reports.name IS 'Of the definition; empty where there is only one.';
    COMMENT ON COLUMN spectrum.reports.definition IS
        'The definition as it was when the report was begun.';
    COMMENT ON COLUMN spectrum.reports.built_to IS
        'It counts the users with keys up to this one; the highest bigint: all, also future ones.';
    COMMENT ON COLUMN spectrum.reports.state IS
        'building; served: the views show it; discarded: refreshes delete what it kept.';
    COMMENT ON COLUMN spectrum.reports.follows_news IS
        'False from a change of the calendar on: shown as it was until its successor is complete.';
    COMMENT ON COLUMN spectrum.reports.created_at IS 'When it was defined.';
    COMMENT ON COLUMN spectrum.reports.complete_from IS
        'It was built when facts that occurred before were purged, and does not count them. NULL: '
        'it counts all that ever was.';

    CREATE TABLE spectrum.report_kinds (
        kind text NOT NULL CONSTRAINT report_kinds_pkey PRIMARY KEY,
        position integer NOT NULL,
        maintained_by text NOT NULL,
        tables text[] NOT NULL,
        views text[] NOT NULL
    );
    COMMENT ON TABLE spectrum.report_kinds IS
        'The questions that have standing views, in the order in which a refresh serves them.';
    COMMENT ON COLUMN spectrum.report_kinds.kind IS 'Name of the question.';
    COMMENT ON COLUMN spectrum.report_kinds.position IS
        'Order of refresh: a report may read what one before it keeps.';
    COMMENT ON COLUMN spectrum.report_kinds.maintained_by IS
        'Function of schema analytics that moves the tables by the news: (report_id, built_to).';
    COMMENT ON COLUMN spectrum.report_kinds.tables IS
        'Tables that hold rows of these reports, by report_id.';
    COMMENT ON COLUMN spectrum.report_kinds.views IS
        'Views of analytics that show them; analytics._standing_<view>() makes the same from all '
        'events, for verify().';

    CREATE TABLE spectrum.watermark (
        is_only boolean NOT NULL DEFAULT true
            CONSTRAINT watermark_pkey PRIMARY KEY
            CONSTRAINT watermark_is_one_row CHECK (is_only),
        as_of timestamptz,
        refreshed_at timestamptz,
        seconds double precision
    );
    COMMENT ON TABLE spectrum.watermark IS 'How far the standing views are, one row.';
    COMMENT ON COLUMN spectrum.watermark.is_only IS 'Always true: keeps the table at one row.';
    COMMENT ON COLUMN spectrum.watermark.as_of IS
        'Every event received before is counted in every standing view.';
    COMMENT ON COLUMN spectrum.watermark.refreshed_at IS 'When a refresh last ended.';
    COMMENT ON COLUMN spectrum.watermark.seconds IS 'How long it took.';
    INSERT INTO spectrum.watermark DEFAULT VALUES;

    CREATE TABLE spectrum.shared_users (
        user_key bigint NOT NULL CONSTRAINT shared_users_pkey PRIMARY KEY
    );
    COMMENT ON TABLE spectrum.shared_users IS
        'Users with events of an account other than dim_users.account_key. Only they contribute '
        'otherwise to all accounts together than to their one.';
    COMMENT ON COLUMN spectrum.shared_users.user_key IS 'dim_users.';
END
$$;
COMMENT ON FUNCTION spectrum._create_reports() IS
    'Room 50: makes the registry of reports, spectrum.watermark and spectrum.shared_users.';

CREATE FUNCTION spectrum._add_kind(
    p_kind text,
    p_position integer,
    p_maintained_by text,
    p_tables text[],
    p_views text[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO spectrum.report_kinds (kind, position, maintained_by, tables, views)
    VALUES (p_kind, p_position, p_maintained_by, p_tables, p_views);
END
$$;
COMMENT ON FUNCTION spectrum._add_kind(text, integer, text, text[], text[]) IS
    'Registers a question that has standing views.';

CREATE FUNCTION spectrum._hold_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(spectrum._lock_key('refresh'));
END
$$;
COMMENT ON FUNCTION spectrum._hold_reports() IS
    'Until the transaction ends, only it may change what reports there are or move their sums: a '
    'refresh must not take a report that was begun meanwhile for one that it has built.';

CREATE FUNCTION spectrum._wait_for_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_wait text := spectrum._bound_lock_waits(10);
BEGIN
    PERFORM spectrum._hold_reports();
    PERFORM set_config('lock_timeout', v_wait, true);
END
$$;
COMMENT ON FUNCTION spectrum._wait_for_reports() IS
    'The same for what others wait for: raises 55P03 where a refresh, or a transaction left open '
    'in which a definition changed, does not end within ten times config.lock_timeout.';

CREATE FUNCTION spectrum._discard_reports(p_kind text, p_name text, p_state text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    UPDATE spectrum.reports SET state = 'discarded'
    WHERE kind = p_kind AND name = p_name AND state <> 'discarded'
        AND (p_state IS NULL OR state = p_state);
END
$$;
COMMENT ON FUNCTION spectrum._discard_reports(text, text, text) IS
    'Gives up the reports of a definition, or the one in a state: no view shows them any more, and '
    'refreshes delete what they kept.';

CREATE FUNCTION spectrum._begin_report(
    p_kind text,
    p_name text DEFAULT '',
    p_definition jsonb DEFAULT '{}'
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_facts_from timestamptz := (SELECT horizon.facts_from FROM spectrum.horizon);
BEGIN
    PERFORM spectrum._discard_reports(p_kind, p_name, 'building');
    INSERT INTO spectrum.reports (kind, name, definition, complete_from)
    VALUES (p_kind, p_name, p_definition, v_facts_from);
    IF EXISTS (
        SELECT FROM spectrum.reports AS served
        WHERE served.kind = p_kind AND served.name = p_name AND served.state = 'served'
            AND served.complete_from IS DISTINCT FROM v_facts_from
    ) THEN
        RAISE WARNING '% is built from the facts since %, what it counts from before is lost',
            concat_ws(' ', p_kind, nullif(p_name, '')), v_facts_from
            USING HINT = 'Facts before were purged: see spectrum.horizon. To keep the numbers, '
                'give the new definition another name.';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._begin_report(text, text, jsonb) IS
    'Begins a report by a new or changed definition. Refreshes build it, and serve it when it is '
    'complete.';

CREATE FUNCTION spectrum._kinds_kept_with(p_kind text)
RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT p_kind || CASE p_kind
        WHEN 'activity' THEN '{lifecycle, stickiness, retention, cohort, feature}'
        WHEN 'cohort' THEN '{feature}'
        WHEN 'sessions' THEN '{attribution, paths}'
        ELSE '{}'
    END::text[]
$$;
COMMENT ON FUNCTION spectrum._kinds_kept_with(text) IS
    'A kind, and those that are moved by the rows it keeps: they are made anew together, since '
    'these rows are not all there meanwhile.';

CREATE FUNCTION spectrum.rebuild_reports(
    p_kind text DEFAULT NULL,
    p_lose_frozen boolean DEFAULT false
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_kinds text[] := spectrum._kinds_kept_with(p_kind);
BEGIN
    PERFORM spectrum._hold_reports();
    IF p_kind IS NOT NULL THEN
        PERFORM spectrum._check_choice(
            'p_kind', p_kind,
            (SELECT array_agg(kind.kind ORDER BY kind.position) FROM spectrum.report_kinds AS kind)
        );
    END IF;
    IF NOT coalesce(p_lose_frozen, false) AND EXISTS (
        SELECT FROM spectrum.reports AS report
        CROSS JOIN spectrum.horizon
        WHERE report.state = 'served' AND (p_kind IS NULL OR report.kind = ANY (v_kinds))
            AND report.complete_from IS DISTINCT FROM horizon.facts_from
    ) THEN
        RAISE EXCEPTION 'the standing views count facts before % that are purged: made anew, they '
            'would lose them', (SELECT horizon.facts_from FROM spectrum.horizon)
            USING
                ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'To have them made of the facts that remain: p_lose_frozen => true.';
    END IF;
    PERFORM spectrum._begin_report(latest.kind, latest.name, latest.definition)
    FROM (
        SELECT DISTINCT ON (report.kind, report.name)
            report.kind, report.name, report.definition, kind.position
        FROM spectrum.reports AS report
        JOIN spectrum.report_kinds AS kind USING (kind)
        WHERE report.state <> 'discarded' AND (p_kind IS NULL OR report.kind = ANY (v_kinds))
        ORDER BY report.kind, report.name, report.report_id DESC
    ) AS latest
    ORDER BY latest.position, latest.name;
    UPDATE spectrum.reports SET follows_news = false
    WHERE state = 'served' AND (p_kind IS NULL OR kind = ANY (v_kinds));
END
$$;
COMMENT ON FUNCTION spectrum.rebuild_reports(text, boolean) IS
    'Has the next refreshes make the standing views of a kind (spectrum.report_kinds), with what '
    'is kept by them, or all, anew from the facts: after a setting that they are made by changed, '
    'or when facts were changed by hand. Until then the views show what they showed. Where facts '
    'were purged it raises 55000, unless p_lose_frozen.';

CREATE FUNCTION spectrum._serve_report(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Not one that was dropped or defined anew meanwhile.
    PERFORM FROM spectrum.reports WHERE report_id = p_report AND state = 'building' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM spectrum._discard_reports(report.kind, report.name, 'served')
    FROM spectrum.reports AS report
    WHERE report.report_id = p_report;
    UPDATE spectrum.reports SET built_to = 9223372036854775807, state = 'served'
    WHERE report_id = p_report;
END
$$;
COMMENT ON FUNCTION spectrum._serve_report(integer) IS
    'Has the views show a report that is complete, in the place of the one before.';

CREATE FUNCTION spectrum._serve_first_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM warehouse.event_ledger) THEN
        PERFORM spectrum._serve_report(report_id) FROM spectrum.reports WHERE state = 'building';
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._serve_first_reports() IS
    'Without any event there is nothing to build: reports are complete from the start.';

CREATE FUNCTION spectrum._clear_discarded(p_rows integer)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cleared bigint := 0;
    v_rows bigint;
    r_report record;
    v_table text;
BEGIN
    FOR r_report IN
        SELECT report.report_id, kind.tables
        FROM spectrum.reports AS report
        LEFT JOIN spectrum.report_kinds AS kind USING (kind)
        WHERE report.state = 'discarded'
        FOR UPDATE OF report SKIP LOCKED
    LOOP
        FOREACH v_table IN ARRAY r_report.tables LOOP
            EXECUTE format('DELETE FROM %s WHERE ctid = ANY (ARRAY('
                'SELECT ctid FROM %1$s WHERE report_id = $1 LIMIT $2))', v_table::regclass)
            USING r_report.report_id, p_rows - v_cleared;
            GET DIAGNOSTICS v_rows = ROW_COUNT;
            v_cleared := v_cleared + v_rows;
        END LOOP;
        IF v_cleared < p_rows THEN
            DELETE FROM spectrum.reports WHERE report_id = r_report.report_id;
        END IF;
    END LOOP;
    RETURN v_cleared;
END
$$;
COMMENT ON FUNCTION spectrum._clear_discarded(integer) IS
    'Deletes at most p_rows rows of reports that were given up, and returns how many it did.';
