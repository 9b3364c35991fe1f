-- Room 60, served reports: which questions stand, and whether what they show is what the events say
-- by now. Read by glass, and by functions that are asked what stands already.

CREATE FUNCTION spectrum._create_served_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.served_reports') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE VIEW analytics.served_reports WITH (security_barrier) AS
    SELECT
        report.kind,
        report.name,
        report.definition,
        report.created_at,
        (SELECT caller.sees_all FROM warehouse.caller)
            AND report.follows_news
            AND NOT EXISTS (SELECT FROM spectrum.news)
            AND NOT EXISTS (SELECT FROM spectrum.withdrawals)
            AND report.complete_from IS NULL
            AND EXISTS (
                SELECT FROM spectrum.horizon
                WHERE horizon.facts_from IS NULL
                    OR (horizon.packed_from = '-infinity' AND horizon.packed_without IS NULL)
            ) AS is_current
    FROM spectrum.reports AS report
    WHERE report.state = 'served';
    COMMENT ON VIEW analytics.served_reports IS
        'What the standing views show, by which definition.';
    COMMENT ON COLUMN analytics.served_reports.kind IS 'The question: funnel, retention, ...';
    COMMENT ON COLUMN analytics.served_reports.name IS
        'Of the definition; empty where there is only one.';
    COMMENT ON COLUMN analytics.served_reports.definition IS
        'The definition that is shown; one that was changed since is shown once it is built.';
    COMMENT ON COLUMN analytics.served_reports.created_at IS 'When it was defined.';
    COMMENT ON COLUMN analytics.served_reports.is_current IS
        'Whether its view says just what the events say: none waits to be counted, no change of '
        'the calendar either, and none was purged, nor erased where it is packed, which the view '
        'counts still. Never to a tenant.';
END
$$;
COMMENT ON FUNCTION spectrum._create_served_reports() IS
    'Room 60: makes analytics.served_reports.';

CREATE FUNCTION analytics._may_ask_kept()
RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce(current_setting('spectrum.from_facts', true), '') <> 'on';
END
$$;
COMMENT ON FUNCTION analytics._may_ask_kept() IS
    'Whether a question may be asked of what refreshes keep. SET spectrum.from_facts = on has all '
    'asked of the events themselves, as verify() does.';
