-- Room 90: privileges. Nothing is granted to PUBLIC. Roles are the user's own; these helpers give
-- one what its work needs and nothing else.

CREATE FUNCTION spectrum.grant_ingest(p_role regrole)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA @extschema@ TO %s', p_role);
    EXECUTE format('GRANT INSERT (payload) ON @extschema@.raw_events TO %s', p_role);
END
$$;
COMMENT ON FUNCTION spectrum.grant_ingest(regrole) IS
    'Lets a role insert payloads into raw_events, and nothing else: it reads nothing.';

CREATE FUNCTION spectrum.grant_reader(p_role regrole)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_view regclass;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA analytics TO %s', p_role);
    FOR v_view IN
        SELECT view.oid FROM pg_class AS view
        WHERE view.relnamespace = 'analytics'::regnamespace AND view.relkind = 'v'
            AND view.relname <> 'events'
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO %s', v_view, p_role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum.grant_reader(regrole) IS
    'Lets a role, say a dashboard''s, read the standing views of analytics, and nothing else.';

REVOKE ALL ON ALL ROUTINES IN SCHEMA spectrum, warehouse, analytics FROM PUBLIC;
