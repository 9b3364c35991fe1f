-- Room 90: privileges. Nothing is granted to PUBLIC. Roles are the user's own; grant_* gives one
-- what its work needs and nothing else, revoke_* takes the same away again.

CREATE FUNCTION spectrum._set_privilege(p_privilege text, p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_role IS NULL THEN
        PERFORM spectrum._reject('p_role', NULL, 'a role');
    END IF;
    EXECUTE CASE WHEN p_is_granted
        THEN format('GRANT %s TO %s', p_privilege, p_role)
        ELSE format('REVOKE %s FROM %s', p_privilege, p_role)
    END;
END
$$;
COMMENT ON FUNCTION spectrum._set_privilege(text, regrole, boolean) IS
    'Grants or revokes one privilege, written as between GRANT and TO.';

CREATE FUNCTION spectrum._set_ingest(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege(
        'INSERT (payload) ON @extschema@.raw_events', p_role, p_is_granted);
    -- The schema is the user's: what others grant there is not ours to revoke.
    IF p_is_granted THEN
        PERFORM spectrum._set_privilege('USAGE ON SCHEMA @extschema@', p_role, true);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._set_ingest(regrole, boolean) IS 'What grant_ingest covers.';

CREATE FUNCTION spectrum._set_reader(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege('USAGE ON SCHEMA analytics', p_role, p_is_granted);
    PERFORM spectrum._set_privilege(
        format('SELECT ON %s', view.oid::regclass), p_role, p_is_granted)
    FROM pg_class AS view
    WHERE view.relnamespace = 'analytics'::regnamespace AND view.relkind = 'v'
        AND view.relname NOT IN ('events', 'event_keys', 'timelines', 'user_days');
END
$$;
COMMENT ON FUNCTION spectrum._set_reader(regrole, boolean) IS 'What grant_reader covers.';

CREATE FUNCTION spectrum._set_analyst(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_reader(p_role, p_is_granted);
    PERFORM spectrum._set_privilege(
        'SELECT ON analytics.events, analytics.event_keys, analytics.timelines, '
        'analytics.user_days', p_role, p_is_granted);
    PERFORM spectrum._set_privilege('USAGE ON SCHEMA spectrum', p_role, p_is_granted);
    -- All questions, and what they call: mathematics, checks, the calendar. They may stand in a
    -- parallel plan; what works the pipeline or keeps the standing views may not.
    PERFORM spectrum._set_privilege(
        format('EXECUTE ON FUNCTION %s', routine.oid::regprocedure), p_role, p_is_granted)
    FROM pg_proc AS routine
    WHERE routine.prokind IN ('f', 'a') AND routine.proparallel IN ('s', 'r')
        AND routine.pronamespace IN ('analytics'::regnamespace, 'spectrum'::regnamespace);
END
$$;
COMMENT ON FUNCTION spectrum._set_analyst(regrole, boolean) IS 'What grant_analyst covers.';

CREATE FUNCTION spectrum.grant_ingest(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_ingest(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_ingest(regrole) IS
    'Lets a role insert payloads into raw_events, and nothing else: it reads nothing.';

CREATE FUNCTION spectrum.revoke_ingest(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_ingest(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_ingest(regrole) IS
    'Takes back what grant_ingest gave, but for USAGE of the schema of raw_events.';

CREATE FUNCTION spectrum.grant_reader(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_reader(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_reader(regrole) IS
    'Lets a role, say a dashboard''s, read the standing views of analytics, and nothing else.';

CREATE FUNCTION spectrum.revoke_reader(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_reader(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_reader(regrole) IS 'Takes back what grant_reader gave.';

CREATE FUNCTION spectrum.grant_analyst(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_analyst(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_analyst(regrole) IS
    'Lets a role read the standing views, ask any question by the functions of analytics, and read '
    'the event view that they read.';

CREATE FUNCTION spectrum.revoke_analyst(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_analyst(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_analyst(regrole) IS 'Takes back what grant_analyst gave.';

REVOKE ALL ON ALL ROUTINES IN SCHEMA spectrum, warehouse, analytics FROM PUBLIC;
