"""The matrix of docs/security.md, tried: every object as every kind of role."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from conftest import Connect, MakeRole
from pipeline import event, insert, rows
from psycopg import sql
from psycopg.conninfo import make_conninfo
from tenancy import define, quoted

DOCS = Path(__file__).resolve().parents[1] / "docs" / "security.md"
KINDS = {
    "ingest": "grant_ingest({})",
    "capture": "grant_capture({})",
    "reader": "grant_reader({})",
    "analyst": "grant_analyst({})",
    "operator": "grant_operator({})",
    "tenant as reader": "grant_tenant({}, 'acme', 'reader')",
    "tenant as analyst": "grant_tenant({}, 'acme')",
}
NOBODY = "nobody"
OBJECTS = """
    SELECT 'schema', nspname::text, nspname::text, '', ''
    FROM pg_namespace WHERE nspname IN ('spectrum', 'warehouse', 'analytics')
    UNION ALL
    SELECT CASE relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' ELSE 'table' END,
        relnamespace::regnamespace::text, relname::text, oid::regclass::text, ''
    FROM pg_class
    WHERE relkind IN ('r', 'p', 'v', 'm', 'S') AND (
        relnamespace IN ('spectrum'::regnamespace, 'warehouse'::regnamespace,
            'analytics'::regnamespace)
        OR relnamespace = 'public'::regnamespace AND relname LIKE 'raw_events%'
    )
    UNION ALL
    SELECT CASE prokind WHEN 'p' THEN 'procedure' ELSE 'function' END,
        pronamespace::regnamespace::text, proname::text, oid::regprocedure::text,
        CASE WHEN proparallel IN ('s', 'r') THEN 'reads' ELSE '' END
    FROM pg_proc
    WHERE pronamespace IN ('spectrum'::regnamespace, 'warehouse'::regnamespace,
        'analytics'::regnamespace)
"""


class Object(NamedTuple):
    kind: str
    schema: str
    name: str
    full_name: str
    trait: str


def among(schema: str, names: str) -> Callable[[Object], bool]:
    return lambda thing: thing.schema == schema and thing.name in names.split()


RELATIONS = {"table", "view", "sequence"}
ROUTINES = {"function", "procedure"}
OPERATORS_CALL = among(
    "spectrum",
    "status health request cancel_task define_funnel define_retention define_metric define_feature"
    " define_experiment drop_funnel drop_retention drop_metric drop_feature drop_experiment"
    " define_attribution drop_attribution define_paths drop_paths"
    " _cron_state _cron_is_down _cron_advice _longest_pause _job_name _idle_transactions _release"
    " _tables_release _check_ownership _check_standby _check_tasks _check_caps"
    " _check_pii_key",
)
EVENT_VIEWS = "events event_keys timelines event_days user_days user_day_counts"
# The rows of the table in their order; an object belongs to the first that it fits.
ROWS: list[Callable[[Object], bool]] = [
    lambda o: o.kind == "schema" and o.name == "analytics",
    lambda o: o.kind == "schema" and o.name == "spectrum",
    lambda o: o.kind == "schema" and o.name == "warehouse",
    lambda o: o.kind == "table" and o.full_name == "raw_events",
    lambda o: o.full_name == "analytics.all_accounts",
    lambda o: o.kind == "view" and among("analytics", EVENT_VIEWS)(o),
    lambda o: o.kind == "view" and o.schema == "analytics",
    among(
        "warehouse",
        "fact_events packed_rows visible_events caller own_account_keys event_type_names"
        " account_names user_names place_names",
    ),
    lambda o: (
        o.kind in RELATIONS
        and among(
            "spectrum",
            "pipeline progress run_log tasks config releases refusals reports report_kinds funnels"
            " retentions metrics features attributions paths experiments",
        )(o)
    ),
    lambda o: o.kind in RELATIONS,
    lambda o: o.kind == "function" and among("spectrum", "capture")(o),
    lambda o: o.kind == "function" and OPERATORS_CALL(o),
    lambda o: o.kind == "function" and o.trait == "reads",
    lambda o: o.kind in ROUTINES,
]


def documented() -> list[dict[str, str]]:
    """The table: a row for each of ROWS, what each kind of role holds there."""
    section = DOCS.read_text().split("## The matrix")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:] == list(KINDS)
    table = [dict(zip(KINDS, row[1:], strict=True)) for row in cells[2:]]
    assert len(table) == len(ROWS)
    return table


def row_of(thing: Object) -> int:
    return next(number for number, fits in enumerate(ROWS) if fits(thing))


HELD = {
    "schema": ("has_schema_privilege", ["USAGE", "CREATE"]),
    "table": (
        "has_table_privilege",
        ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"],
    ),
    "sequence": ("has_sequence_privilege", ["SELECT", "USAGE", "UPDATE"]),
    "function": ("has_function_privilege", ["EXECUTE"]),
}
ALIKE = {"view": "table", "procedure": "function"}


def held(db: psycopg.Connection, role: str, objects: list[Object]) -> dict[Object, str]:
    """What a role holds on each object, columns included."""
    found = {}
    with db.pipeline():
        cursors = []
        for thing in objects:
            check, privileges = HELD[ALIKE.get(thing.kind, thing.kind)]
            query = f"SELECT array_agg(p) FROM unnest(%s::text[]) AS p WHERE {check}(%s, %s, p)"
            name = thing.full_name or thing.name
            cursors.append((thing, db.execute(query, (privileges, role, name))))
        for thing, cursor in cursors:
            ((privileges,),) = cursor.fetchall()
            found[thing] = ", ".join(privileges or [])
    columns = rows(
        db,
        """
        SELECT class.oid::regclass::text, string_agg(privilege || ' (' || attname || ')', ', ')
        FROM pg_class AS class
        JOIN pg_attribute ON attrelid = class.oid AND attnum > 0 AND NOT attisdropped
        CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
        WHERE relkind IN ('r', 'p', 'v', 'm')
            AND class.oid::regclass::text = ANY (%s)
            AND has_column_privilege(%s, class.oid, attname, privilege)
            AND NOT has_table_privilege(%s, class.oid, privilege)
        GROUP BY class.oid
        """,
        [thing.full_name for thing in objects if thing.kind in ("table", "view")],
        role,
        role,
    )
    for name, privileges in columns:
        thing = next(each for each in objects if each.full_name == name)
        found[thing] = ", ".join(filter(None, [found[thing], privileges]))
    return found


@pytest.fixture
def cast(
    owner_dsn: str, owner_db: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> dict[str, tuple[str, psycopg.Connection]]:
    """A role of each kind and one that was granted nothing, each with a session."""
    define(owner_db)
    insert(owner_db, [event("buy", account_id="acme", user_id="u", properties={"revenue": 1})])
    owner_db.execute("CALL spectrum.run()")
    made = {}
    for kind in (*KINDS, NOBODY):
        name = make_role(f"Odd {kind}; --")
        if kind != NOBODY:
            owner_db.execute(f"SELECT spectrum.{KINDS[kind].format(quoted(name))}")
        made[kind] = name, connect(make_conninfo(owner_dsn, user=name))
    return made


Cast = dict[str, tuple[str, psycopg.Connection]]


def objects_of(db: psycopg.Connection) -> list[Object]:
    found = [Object(*row) for row in rows(db, OBJECTS)]
    assert {thing.kind for thing in found} == {*RELATIONS, *ROUTINES, "schema"}
    return found


def test_each_role_holds_what_the_table_says(owner_db: psycopg.Connection, cast: Cast) -> None:
    table = documented()
    objects = objects_of(owner_db)
    fitted = {row_of(thing) for thing in objects}
    assert fitted == set(range(len(ROWS))), "a row of the table that nothing fits"
    for kind, (role, _) in cast.items():
        wrong = []
        for thing, privileges in held(owner_db, role, objects).items():
            expected = "" if kind == NOBODY else table[row_of(thing)][kind]
            if thing.full_name == "raw_events" and expected:
                expected += " (payload)"
            if privileges != expected:
                wrong.append((thing.full_name or thing.name, privileges, expected))
        assert wrong == [], kind


def attempts(db: psycopg.Connection, thing: Object) -> list[str]:
    """Statements that use an object: a role without the right is refused at once."""
    if thing.kind == "sequence":
        return [f"SELECT nextval('{thing.full_name}')", f"SELECT * FROM {thing.full_name}"]
    if thing.kind in RELATIONS:
        return [
            f"EXPLAIN SELECT * FROM {thing.full_name}",
            f"EXPLAIN DELETE FROM {thing.full_name}",
        ]
    ((arguments, returns),) = rows(
        db,
        "SELECT ARRAY(SELECT format_type(a, NULL) FROM unnest(proargtypes) WITH ORDINALITY"
        " AS t (a, n) ORDER BY n), prorettype::regtype::text FROM pg_proc"
        " WHERE oid = %s::regprocedure",
        thing.full_name,
    )
    if returns == "trigger":
        return []
    given = ", ".join(f"(SELECT NULL::{each})" for each in arguments)
    name = f'{thing.schema}."{thing.name}"'
    if thing.kind == "procedure":
        return [f"CALL {name}({', '.join(f'NULL::{each}' for each in arguments)})"]
    # EXPLAIN looks whether it may be called, and does not call it.
    return [f"EXPLAIN SELECT {name}({given})"]


def outcome(db: psycopg.Connection, statement: str) -> str:
    try:
        if statement.startswith("COPY"):
            with db.cursor().copy(statement) as copy:
                list(copy)
        else:
            db.execute(statement)
    except psycopg.Error as error:
        return error.sqlstate or ""
    return ""


def outcomes(db: psycopg.Connection, statements: list[str]) -> list[str]:
    """The SQLSTATE of each, empty where it went well; undone in any case."""
    states: list[str] = []
    db.add_notice_handler(lambda told: states.append(str(told.message_primary)))
    listed = sql.Literal(statements).as_string(db)
    db.execute(
        f"""
        DO $tried$
        DECLARE
            v_statement text;
        BEGIN
            FOREACH v_statement IN ARRAY {listed}::text[] LOOP
                BEGIN
                    EXECUTE v_statement;
                    RAISE EXCEPTION USING ERRCODE = 'ZZ000';
                EXCEPTION WHEN OTHERS THEN
                    RAISE NOTICE '%', replace(sqlstate, 'ZZ000', 'went well');
                END;
            END LOOP;
        END
        $tried$
        """
    )
    assert len(states) == len(statements)
    return [state.replace("went well", "") for state in states]


def test_each_role_can_do_what_the_table_says(owner_db: psycopg.Connection, cast: Cast) -> None:
    """By statements: what may be named and used, not only what was granted."""
    table = documented()
    named: dict[str, set[str]] = {"public": set(cast)}
    for number, schema in enumerate(("analytics", "spectrum", "warehouse")):
        named[schema] = {kind for kind in KINDS if table[number][kind] == "USAGE"}
    tried = [
        (thing, statement)
        for thing in objects_of(owner_db)
        if thing.kind != "schema"
        for statement in attempts(owner_db, thing)
    ]
    for kind, (_, db) in cast.items():
        states = outcomes(db, [statement for _, statement in tried])
        for (thing, statement), state in zip(tried, states, strict=True):
            privilege = "" if kind == NOBODY else table[row_of(thing)][kind]
            may = kind in named[thing.schema] and (
                privilege == "EXECUTE"
                or (privilege == "SELECT" and statement.startswith("EXPLAIN SELECT"))
            )
            # A view that cannot be written to says that before it looks for the right.
            expected = {""} if may else {"42501", "55000", "42809"}
            assert state in expected, (kind, statement, state)
    of_owner = [statement for thing, statement in tried if thing.kind != "procedure"]
    assert "42501" not in outcomes(owner_db, of_owner)


def test_the_table_would_be_found_wrong(owner_db: psycopg.Connection, cast: Cast) -> None:
    """One privilege too many, or one too few, of each kind of object."""
    name, _ = cast["reader"]
    for grant, thing in (
        ("SELECT (payload) ON raw_events", "raw_events"),
        ("SELECT ON analytics.mv_daily_events", "analytics.mv_daily_events"),
        ("EXECUTE ON FUNCTION spectrum.verify()", "spectrum.verify()"),
        ("USAGE ON SEQUENCE warehouse.dim_users_user_key_seq", "warehouse.dim_users_user_key_seq"),
    ):
        owner_db.execute(f'GRANT {grant} TO "{name}"')
        objects = [each for each in objects_of(owner_db) if each.full_name == thing]
        assert list(held(owner_db, name, objects).values()) != [""], thing


def test_revoke_takes_all_of_it_back(owner_db: psycopg.Connection, cast: Cast) -> None:
    objects = objects_of(owner_db)
    for kind, (role, _) in cast.items():
        if kind != NOBODY:
            call = "revoke_" + kind.split()[0]
            for _ in range(2):
                owner_db.execute(f"SELECT spectrum.{call}({quoted(role)})")
        # Other grants may need the schema too: it stays.
        left = {"spectrum": "USAGE"} if kind == "capture" else {}
        found = held(owner_db, role, objects)
        assert {thing.name: what for thing, what in found.items() if what} == left, kind
    assert rows(owner_db, "SELECT * FROM spectrum.tenants") == []
    assert rows(owner_db, "SELECT polname::text FROM pg_policy ORDER BY 1") == [("own_accounts",)]


def test_ingest_by_copy_and_insert_alone(cast: Cast) -> None:
    _, db = cast["ingest"]
    insert(db, [event("copied")])
    db.execute("""INSERT INTO raw_events (payload) VALUES ('{"event_type": "inserted"}')""")
    for column, given in (
        ("id", "gen_random_uuid()"), ("received_at", "now()"), ("status", "'done'"),
        ("processed_at", "now()"), ("error_msg", "'none'"), ("attempts", "1"), ("copy_of", "NULL"),
    ):  # fmt: skip
        statement = f"INSERT INTO raw_events (payload, {column}) VALUES ('{{}}', {given})"
        assert outcome(db, statement) == "42501", column
    assert (
        outcome(db, "INSERT INTO raw_events (payload) VALUES ('{}') RETURNING payload") == "42501"
    )
    assert outcome(db, "COPY raw_events (payload) TO STDOUT") == "42501"
