-- Room 14, the settings that numbers depend on, for all who may ask questions: spectrum.config and
-- spectrum.horizon are for the owner.

CREATE FUNCTION spectrum._create_settings()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.settings') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE VIEW analytics.settings WITH (security_barrier) AS
    SELECT config.timezone, config.week_start, config.currency, config.refund_events,
        nullif(coalesce(horizon.packed_from, horizon.facts_from), '-infinity') AS facts_from,
        CASE WHEN horizon.packed_from IS NOT NULL THEN horizon.facts_from END AS packed_before
    FROM spectrum.config
    CROSS JOIN spectrum.horizon;
    COMMENT ON VIEW analytics.settings IS
        'The settings that numbers depend on, one row, for all who may ask questions.';
    COMMENT ON COLUMN analytics.settings.timezone IS 'Time zone of days, weeks and months.';
    COMMENT ON COLUMN analytics.settings.week_start IS 'First day of a week: 1 Monday, 7 Sunday.';
    COMMENT ON COLUMN analytics.settings.currency IS 'Currency of money that names none.';
    COMMENT ON COLUMN analytics.settings.refund_events IS 'Event types that are refunds.';
    COMMENT ON COLUMN analytics.settings.facts_from IS
        'Events that occurred before are purged: questions are answered without them, standing '
        'views count them still. NULL: none are.';
    COMMENT ON COLUMN analytics.settings.packed_before IS
        'Events that occurred before are packed: they take longer to read. NULL: none are.';
END
$$;
COMMENT ON FUNCTION spectrum._create_settings() IS 'Room 14: makes analytics.settings.';
