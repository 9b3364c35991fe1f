-- Room 60, tenants: which accounts a role may see. The rule is positive, and in one place:
--   who may SELECT from analytics.all_accounts sees every account, and the rows of all together;
--   everyone else sees the accounts in spectrum.tenants of roles that he is a member of;
--   who has neither sees nothing, whatever else was granted to him.
-- Views of cells say it in their WHERE; warehouse.fact_events says it by row-level security, which
-- is decided when a query is planned: so nothing changes in the plans of those who see all.
-- current_user is the caller, also inside a view that runs with its owner's rights.

CREATE FUNCTION spectrum._create_tenants()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.tenants') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.tenants (
        role_name text COLLATE "C" NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        granted_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT tenants_pkey PRIMARY KEY (role_name, account_id)
    );
    COMMENT ON TABLE spectrum.tenants IS
        'Which accounts roles see that do not see all: see spectrum.grant_tenant().';
    -- A name, since oids mean nothing in a restored dump, and a regrole there is an error where
    -- the role is missing.
    COMMENT ON COLUMN spectrum.tenants.role_name IS
        'The role. It counts while the role holds what grant_tenant gave it, so not for another '
        'role that is called so later.';
    COMMENT ON COLUMN spectrum.tenants.account_id IS 'The account, which need not have events yet.';
    COMMENT ON COLUMN spectrum.tenants.granted_at IS 'Since when.';

    CREATE VIEW analytics.all_accounts WITH (security_barrier) AS
    SELECT dim_accounts.account_id, dim_accounts.first_seen, dim_accounts.last_seen
    FROM warehouse.dim_accounts
    WHERE dim_accounts.account_key <> 0;
    COMMENT ON VIEW analytics.all_accounts IS
        'Every account. Who may read this view sees every account in all other views and answers '
        'too: it is for readers and analysts, not for tenants.';

    -- analytics.settings is what every reader and every tenant may read.
    CREATE VIEW warehouse.own_accounts AS
    SELECT tenant.account_id
    FROM spectrum.tenants AS tenant
    JOIN pg_roles AS role ON role.rolname = tenant.role_name
    WHERE pg_has_role(role.oid, 'USAGE')
        AND has_table_privilege(role.oid, 'analytics.settings'::regclass, 'SELECT');
    COMMENT ON VIEW warehouse.own_accounts IS
        'The accounts that the caller was given as a tenant, or a role that he is a member of.';

    CREATE VIEW warehouse.own_account_keys AS
    SELECT dim_accounts.account_key
    FROM warehouse.own_accounts AS own
    JOIN warehouse.dim_accounts ON dim_accounts.account_id = own.account_id;
    COMMENT ON VIEW warehouse.own_account_keys IS 'warehouse.own_accounts by their keys in facts.';

    CREATE VIEW warehouse.caller AS
    SELECT has_table_privilege('analytics.all_accounts'::regclass, 'SELECT') AS sees_all;
    COMMENT ON VIEW warehouse.caller IS 'Whether the caller sees all accounts, one row.';

    ALTER TABLE warehouse.fact_events ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own_accounts ON warehouse.fact_events FOR SELECT USING (
        (SELECT caller.sees_all FROM warehouse.caller)
        OR account_key IN (SELECT own.account_key FROM warehouse.own_account_keys AS own)
    );
    COMMENT ON POLICY own_accounts ON warehouse.fact_events IS
        'Who sees which events. It does not hold for the owner.';
END
$$;
COMMENT ON FUNCTION spectrum._create_tenants() IS
    'Room 60: makes spectrum.tenants and the views that say what the caller may see.';

CREATE FUNCTION spectrum._guard_facts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Who may ask and sees all, each by a grant of his own, since what he has as a member of
    -- another role may end unnoticed. For these PostgreSQL plans without any filter.
    v_roles oid[] := ARRAY(
        SELECT entry.grantee
        FROM pg_class AS events
        CROSS JOIN LATERAL aclexplode(events.relacl) AS entry
        WHERE events.oid IN (
                'warehouse.fact_events'::regclass, 'analytics.all_accounts'::regclass
            ) AND entry.grantee NOT IN (0, events.relowner) AND entry.privilege_type = 'SELECT'
        GROUP BY entry.grantee
        HAVING count(DISTINCT events.oid) = 2
        ORDER BY entry.grantee
    );
    v_named oid[] := ARRAY(
        SELECT named.oid
        FROM pg_policy AS policy
        CROSS JOIN LATERAL unnest(policy.polroles) AS named (oid)
        WHERE policy.polrelid = 'warehouse.fact_events'::regclass
            AND policy.polname = 'all_accounts'
        ORDER BY named.oid
    );
    v_wait text := spectrum._bound_lock_waits();
BEGIN
    IF v_named <> v_roles AND v_named <> '{}' THEN
        DROP POLICY all_accounts ON warehouse.fact_events;
    END IF;
    IF v_named <> v_roles AND v_roles <> '{}' THEN
        EXECUTE format(
            'CREATE POLICY all_accounts ON warehouse.fact_events FOR SELECT TO %s USING (true)',
            (SELECT string_agg(role.oid::regrole::text, ', ') FROM unnest(v_roles) AS role (oid))
        );
    END IF;
    PERFORM set_config('lock_timeout', v_wait, true);
END
$$;
COMMENT ON FUNCTION spectrum._guard_facts() IS
    'Keeps the policy all_accounts of warehouse.fact_events up to who sees all accounts: it shows '
    'no more than own_accounts, but saves analysts its price. Takes a short lock where that '
    'changed; raises 55P03 where it cannot be had within config.lock_timeout.';
