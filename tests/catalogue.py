"""All that the catalogue says of Spectrum's objects, as lines that can be compared between two
databases: no oids, no names of the database."""

from __future__ import annotations

import psycopg

SCHEMAS = "'spectrum'::regnamespace, 'warehouse'::regnamespace, 'analytics'::regnamespace"
# raw_events lives elsewhere, with its sequence.
RELATIONS = f"""
    SELECT * FROM pg_class
    WHERE relnamespace IN ({SCHEMAS}) OR relname ~ '^raw_events'
"""
ACL = """(
    SELECT string_agg(concat_ws(' ', grantor::regrole, grantee::regrole, privilege_type,
        is_grantable), ', ' ORDER BY grantor::regrole::text, grantee::regrole::text, privilege_type)
    FROM aclexplode({acl})
)"""
PARTS = {
    "schema": f"""
        SELECT nspname, nspowner::regrole, {ACL.format(acl="nspacl")},
            obj_description(oid, 'pg_namespace')
        FROM pg_namespace WHERE oid IN ({SCHEMAS})
    """,
    "relation": f"""
        SELECT relation.oid::regclass, relation.relkind, relation.relowner::regrole,
            relation.relpersistence, ARRAY(SELECT unnest(relation.reloptions) ORDER BY 1),
            ARRAY(SELECT unnest(toast.reloptions) ORDER BY 1), relation.relreplident,
            relation.relrowsecurity, relation.relforcerowsecurity,
            {ACL.format(acl="relation.relacl")}, obj_description(relation.oid, 'pg_class'),
            pg_get_expr(relation.relpartbound, relation.oid),
            pg_get_partkeydef(relation.oid), link.inhparent::regclass,
            CASE WHEN relation.relkind = 'v' THEN pg_get_viewdef(relation.oid) END,
            CASE WHEN relation.relkind IN ('i', 'I') THEN pg_get_indexdef(relation.oid) END
        FROM ({RELATIONS}) AS relation
        LEFT JOIN pg_class AS toast ON toast.oid = relation.reltoastrelid
        LEFT JOIN pg_inherits AS link ON link.inhrelid = relation.oid
        WHERE relation.relkind <> 'c'
    """,
    "column": f"""
        SELECT relation.oid::regclass,
            row_number() OVER (PARTITION BY relation.oid ORDER BY attnum), attname,
            format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, attstorage,
            attcompression, attstattarget, attcollation::regcollation, attislocal,
            -- But for the stamp that releases of PostgreSQL from 2026 on put there.
            ARRAY(SELECT option FROM unnest(attoptions) AS option WHERE option !~ '^pg_attver='),
            {ACL.format(acl="attacl")}, pg_get_expr(adbin, adrelid),
            col_description(relation.oid, attnum)
        FROM ({RELATIONS}) AS relation
        JOIN pg_attribute ON attrelid = relation.oid AND attnum > 0 AND NOT attisdropped
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relation.relkind NOT IN ('i', 'I', 'S')
    """,
    "sequence": f"""
        SELECT seqrelid::regclass, seqtypid::regtype, seqstart, seqincrement, seqmax, seqmin,
            seqcache, seqcycle, refobjid::regclass, refobjsubid, deptype
        FROM ({RELATIONS}) AS relation
        JOIN pg_sequence ON seqrelid = relation.oid
        JOIN pg_depend ON objid = seqrelid AND refobjsubid > 0 AND classid = 'pg_class'::regclass
    """,
    "constraint": f"""
        SELECT conrelid::regclass, conname, pg_get_constraintdef(constraints.oid), convalidated,
            condeferrable, condeferred, conislocal, coninhcount,
            obj_description(constraints.oid, 'pg_constraint')
        FROM pg_constraint AS constraints JOIN ({RELATIONS}) AS relation ON relation.oid = conrelid
    """,
    "trigger": f"""
        SELECT tgrelid::regclass, tgname, pg_get_triggerdef(trigger.oid), tgenabled,
            obj_description(trigger.oid, 'pg_trigger')
        FROM pg_trigger AS trigger JOIN ({RELATIONS}) AS relation ON relation.oid = tgrelid
        WHERE NOT tgisinternal
    """,
    "rule and policy": f"""
        SELECT 'policy', polrelid::regclass, polname FROM pg_policy
        UNION ALL
        SELECT 'statistics', stxrelid::regclass, pg_get_statisticsobjdef(oid)
        FROM pg_statistic_ext WHERE stxnamespace IN ({SCHEMAS})
        UNION ALL
        SELECT 'rule', ev_class::regclass, rulename FROM pg_rewrite
        JOIN ({RELATIONS}) AS relation ON relation.oid = ev_class
    """,
    "routine": f"""
        SELECT routine.oid::regprocedure, prokind, pg_get_function_arguments(routine.oid),
            pg_get_function_result(routine.oid), lanname, provolatile, proparallel, proisstrict,
            prosecdef, proleakproof, procost, prorows, prosupport, proconfig, proowner::regrole,
            {ACL.format(acl="proacl")}, obj_description(routine.oid, 'pg_proc'), prosrc, probin,
            aggtransfn, aggfinalfn, aggcombinefn, aggtranstype::regtype, agginitval, aggkind
        FROM pg_proc AS routine
        JOIN pg_language AS language ON language.oid = prolang
        LEFT JOIN pg_aggregate ON aggfnoid = routine.oid
        WHERE pronamespace IN ({SCHEMAS})
    """,
    "type": f"""
        SELECT type.oid::regtype, typtype, typowner::regrole, {ACL.format(acl="typacl")},
            obj_description(type.oid, 'pg_type'),
            (SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), ', '
                ORDER BY attnum) FROM pg_attribute WHERE attrelid = typrelid AND NOT attisdropped)
        FROM pg_type AS type JOIN pg_class AS relation ON relation.oid = typrelid
        WHERE typnamespace IN ({SCHEMAS}) AND relkind = 'c'
    """,
    "member": """
        SELECT pg_describe_object(classid, objid, objsubid), deptype
        FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND refobjid = (
            SELECT oid FROM pg_extension WHERE extname = 'spectrum')
    """,
    # What dumps leave out because the extension brings it.
    "initial right": f"""
        SELECT pg_describe_object(classoid, objoid, objsubid), {ACL.format(acl="initprivs")}
        FROM pg_init_privs WHERE privtype = 'e' AND objoid > 16383
    """,
    "kind of report": "SELECT * FROM spectrum.report_kinds",
    "setting": "SELECT * FROM spectrum.config",
}


def snapshot(db: psycopg.Connection) -> list[str]:
    with db.transaction():
        db.execute("SET LOCAL search_path = pg_catalog")
        return sorted(
            f"{part}: {' | '.join(map(str, row))}"
            for part, query in PARTS.items()
            for row in db.execute(query)
        )


def differences(expected: list[str], actual: list[str]) -> str:
    missing, surplus = set(expected) - set(actual), set(actual) - set(expected)
    lines = [*(f"- {line[:500]}" for line in missing), *(f"+ {line[:500]}" for line in surplus)]
    return "\n".join(sorted(lines, key=lambda line: (line[2:], line)))
