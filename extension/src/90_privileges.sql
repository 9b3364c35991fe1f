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

CREATE FUNCTION spectrum._set_capture(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege(
        'EXECUTE ON FUNCTION spectrum.capture(jsonb)', p_role, p_is_granted);
    -- Other grants may need the schema too: it stays.
    IF p_is_granted THEN
        PERFORM spectrum._set_privilege('USAGE ON SCHEMA spectrum', p_role, true);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._set_capture(regrole, boolean) IS 'What grant_capture covers.';

CREATE FUNCTION spectrum._set_views(p_role regrole, p_is_granted boolean)
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
        AND view.relname NOT IN (
            'all_accounts', 'events', 'event_keys', 'timelines', 'user_days', 'user_day_counts',
            'event_days'
        );
END
$$;
COMMENT ON FUNCTION spectrum._set_views(regrole, boolean) IS
    'The standing views: what readers and tenants have in common.';

CREATE FUNCTION spectrum._set_questions(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege('SELECT ON analytics.events, analytics.event_keys, '
        'analytics.timelines, analytics.user_days, analytics.user_day_counts, '
        'analytics.event_days', p_role, p_is_granted);
    -- What these read, with the rights of the caller; without USAGE of warehouse he cannot name it.
    PERFORM spectrum._set_privilege('SELECT ON warehouse.visible_events, warehouse.fact_events, '
        'warehouse.packed_rows, warehouse.caller, warehouse.own_account_keys, '
        'warehouse.event_type_names, warehouse.account_names, warehouse.user_names, '
        'warehouse.place_names',
        p_role, p_is_granted);
    PERFORM spectrum._set_privilege('USAGE ON SCHEMA spectrum', p_role, p_is_granted);
    -- All questions, and what they call: mathematics, checks, the calendar. They may stand in a
    -- parallel plan; what works the pipeline or keeps the standing views may not.
    PERFORM spectrum._set_privilege(
        format('EXECUTE ON FUNCTION %s', routine.oid::regprocedure), p_role, p_is_granted)
    FROM pg_proc AS routine
    WHERE routine.prokind IN ('f', 'a') AND routine.proparallel IN ('s', 'r')
        AND routine.pronamespace IN ('analytics'::regnamespace, 'spectrum'::regnamespace);
    PERFORM spectrum._guard_facts();
END
$$;
COMMENT ON FUNCTION spectrum._set_questions(regrole, boolean) IS
    'The events and the functions: what analysts and tenants have in common.';

CREATE FUNCTION spectrum._set_reader(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege('SELECT ON analytics.all_accounts', p_role, p_is_granted);
    PERFORM spectrum._set_views(p_role, p_is_granted);
    PERFORM spectrum._guard_facts();
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
    PERFORM spectrum._set_questions(p_role, p_is_granted);
END
$$;
COMMENT ON FUNCTION spectrum._set_analyst(regrole, boolean) IS 'What grant_analyst covers.';

CREATE FUNCTION spectrum._refuse_tenants(p_role regrole)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_accounts text := (
        SELECT string_agg(quote_literal(tenant.account_id), ', ' ORDER BY tenant.account_id)
        FROM spectrum.tenants AS tenant
        JOIN pg_roles AS role ON role.rolname = tenant.role_name
        WHERE role.oid = p_role AND has_table_privilege(role.oid, 'analytics.settings', 'SELECT')
    );
BEGIN
    IF v_accounts IS NOT NULL THEN
        RAISE EXCEPTION 'role % is a tenant', p_role
            USING ERRCODE = 'object_not_in_prerequisite_state',
                DETAIL = 'It sees the accounts ' || v_accounts || ', and would see all.',
                HINT = format('If it shall: SELECT spectrum.revoke_tenant(%L);', p_role::text);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._refuse_tenants(regrole) IS
    'Raises 55000 where a role is a tenant: what it is given next would open all accounts to it.';

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

CREATE FUNCTION spectrum.grant_capture(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_capture(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_capture(regrole) IS
    'Lets a role send events through spectrum.capture, and nothing else: it reads nothing. In the '
    'place of grant_ingest, not beside it, where nothing may be stored as it is sent.';

CREATE FUNCTION spectrum.revoke_capture(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_capture(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_capture(regrole) IS
    'Takes back what grant_capture gave, but for USAGE of the schema spectrum.';

CREATE FUNCTION spectrum.grant_reader(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._refuse_tenants(p_role);
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
    SELECT spectrum._refuse_tenants(p_role);
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

CREATE FUNCTION spectrum._set_operator(p_role regrole, p_is_granted boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._set_privilege('USAGE ON SCHEMA spectrum', p_role, p_is_granted);
    -- health() names raw_events, and reads nothing of it. Cf. _set_ingest.
    IF p_is_granted THEN
        PERFORM spectrum._set_privilege('USAGE ON SCHEMA @extschema@', p_role, true);
    END IF;
    PERFORM spectrum._set_privilege('SELECT ON spectrum.pipeline, spectrum.progress, '
        'spectrum.run_log, spectrum.tasks, spectrum.config, spectrum.releases, spectrum.refusals, '
        'spectrum.reports, '
        'spectrum.report_kinds, spectrum.funnels, spectrum.retentions, spectrum.metrics, '
        'spectrum.features, spectrum.attributions, spectrum.paths, spectrum.experiments',
        p_role, p_is_granted);
    -- Not define_report: it names a function, which the owner's runs would call.
    PERFORM spectrum._set_privilege(
        format('EXECUTE ON FUNCTION %s', routine.oid::regprocedure), p_role, p_is_granted)
    FROM pg_proc AS routine
    WHERE routine.pronamespace = 'spectrum'::regnamespace AND routine.proname IN (
        'status', 'health', '_cron_state', '_cron_is_down', '_cron_advice',
        '_longest_pause', '_job_name', '_idle_transactions', '_release', '_tables_release',
        '_check_ownership', '_check_standby', '_check_tasks', '_check_caps', '_check_pii_key',
        'request',
        'cancel_task', 'define_funnel', 'drop_funnel', 'define_retention', 'drop_retention',
        'define_metric', 'drop_metric', 'define_feature', 'drop_feature', 'define_attribution',
        'drop_attribution', 'define_paths', 'drop_paths', 'define_experiment', 'drop_experiment'
    );
END
$$;
COMMENT ON FUNCTION spectrum._set_operator(regrole, boolean) IS 'What grant_operator covers.';

CREATE FUNCTION spectrum.grant_operator(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_operator(p_role, true)
$$;
COMMENT ON FUNCTION spectrum.grant_operator(regrole) IS
    'Lets a role look after the pipeline: status, health, the run log, progress, definitions, and '
    'asking for long work, which the owner''s runs carry out. It reads no event and no answer.';

CREATE FUNCTION spectrum.revoke_operator(p_role regrole)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT spectrum._set_operator(p_role, false)
$$;
COMMENT ON FUNCTION spectrum.revoke_operator(regrole) IS 'Takes back what grant_operator gave.';

CREATE FUNCTION spectrum._check_tenant(p_role regrole, p_account text, p_as text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_role IS NULL THEN
        PERFORM spectrum._reject('p_role', NULL, 'a role');
    ELSIF p_account IS NULL OR p_account IN ('', '*') OR length(p_account) > 200 THEN
        PERFORM spectrum._reject('p_account', p_account, 'the account_id of one account');
    END IF;
    PERFORM spectrum._check_choice('p_as', p_as, '{analyst, reader}');
    IF has_table_privilege(p_role, 'analytics.all_accounts', 'SELECT')
        OR (SELECT rolbypassrls FROM pg_roles WHERE oid = p_role)
    THEN
        RAISE EXCEPTION 'role % sees all accounts already', p_role
            USING ERRCODE = 'object_not_in_prerequisite_state',
                DETAIL = 'It, or a role that it is a member of, owns Spectrum, was granted reader '
                    'or analyst, may read all data or pass row-level security.',
                HINT = format('If it was granted so: SELECT spectrum.revoke_analyst(%L);',
                    p_role::text);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_tenant(regrole, text, text) IS
    'Raises 22023 unless the arguments are a role, an account and a kind, 55000 where the role '
    'sees all accounts.';

CREATE FUNCTION spectrum.grant_tenant(
    p_role regrole,
    p_account text,
    p_as text DEFAULT 'analyst'
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_name text := (SELECT rolname FROM pg_roles WHERE oid = p_role);
BEGIN
    PERFORM spectrum._check_tenant(p_role, p_account, p_as);
    -- What is left of another role of this name opens nothing to this one.
    IF NOT has_table_privilege(p_role, 'analytics.settings', 'SELECT') THEN
        DELETE FROM spectrum.tenants WHERE role_name = v_name;
    END IF;
    INSERT INTO spectrum.tenants (role_name, account_id) VALUES (v_name, p_account)
    ON CONFLICT (role_name, account_id) DO NOTHING;
    PERFORM spectrum._set_views(p_role, true);
    IF p_as = 'analyst' THEN
        PERFORM spectrum._set_questions(p_role, true);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum.grant_tenant(regrole, text, text) IS
    'Lets a role see one account and nothing of others: as analyst the standing views, the event '
    'view and the functions, as reader the standing views alone. Again with another account: it '
    'sees both, each with its own rows.';

CREATE FUNCTION spectrum.revoke_tenant(p_role regrole, p_account text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_name text := (SELECT rolname FROM pg_roles WHERE oid = p_role);
BEGIN
    IF p_role IS NULL THEN
        PERFORM spectrum._reject('p_role', NULL, 'a role');
    END IF;
    DELETE FROM spectrum.tenants
    WHERE role_name = v_name AND (p_account IS NULL OR account_id = p_account);
    IF NOT FOUND OR EXISTS (SELECT FROM spectrum.tenants WHERE role_name = v_name) THEN
        RETURN;
    END IF;
    PERFORM spectrum._set_views(p_role, false);
    PERFORM spectrum._set_questions(p_role, false);
END
$$;
COMMENT ON FUNCTION spectrum.revoke_tenant(regrole, text) IS
    'Takes one account from a tenant, or all of them (p_account NULL); with the last one all that '
    'grant_tenant gave.';

REVOKE ALL ON ALL ROUTINES IN SCHEMA spectrum, warehouse, analytics FROM PUBLIC;
