"""Each role can do its own job and nothing else; PUBLIC can do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
import pytest
from conftest import Connect, MakeRole
from pipeline import Counts, drain, event, insert, rows, statuses, value
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo

# What analysts read and readers do not.
OF_EVENTS = {
    "analytics.events",
    "analytics.event_keys",
    "analytics.timelines",
    "analytics.event_days",
    "analytics.user_days",
    "analytics.user_day_counts",
}
RELATIONS = """
    SELECT oid::regclass::text, relkind::text FROM pg_class
    WHERE relkind IN ('r', 'p', 'v', 'm', 'S') AND relnamespace IN (
        'public'::regnamespace, 'spectrum'::regnamespace, 'warehouse'::regnamespace,
        'analytics'::regnamespace)
"""
ROUTINES = """
    SELECT oid::regprocedure::text, proname FROM pg_proc
    WHERE pronamespace IN ('spectrum'::regnamespace, 'warehouse'::regnamespace,
        'analytics'::regnamespace)
"""
QUESTIONS = [
    """analytics.funnel('["visit", "buy"]')""",
    "analytics.retention()",
    "analytics.trend()",
    "analytics.trend('visit', p_measure => 'users', p_period => 'month', p_breakdown => 'plan')",
    "analytics.active_users()",
    "analytics.lifecycle()",
    "analytics.stickiness()",
    "analytics.feature_adoption()",
    "analytics.revenue()",
    "analytics.mrr_movements()",
    "analytics.mrr_problems()",
    "analytics.latency()",
    "analytics.error_rates()",
    "analytics.throughput('day')",
    "analytics.event_catalog()",
    "analytics.experiment('button')",
    "analytics.sessions()",
    "analytics.sessions_daily()",
    """analytics.attribution('"buy"')""",
    "analytics.paths()",
    "spectrum.wilson_interval(5, 10, 0.95)",
    "spectrum.two_proportion_test(5, 10, 6, 10)",
    "spectrum.welch_t_test(10, 1, 1, 10, 2, 1)",
    "spectrum.sample_ratio_mismatch('{10, 20}', '{0.5, 0.5}')",
]

REFUSED_TO_INGEST = [
    "INSERT INTO raw_events (payload, status) VALUES ('{}', 'done')",
    "INSERT INTO raw_events (payload, received_at) VALUES ('{}', now())",
    "INSERT INTO raw_events (payload, id) VALUES ('{}', gen_random_uuid())",
    "INSERT INTO raw_events (payload, seq) OVERRIDING SYSTEM VALUE VALUES ('{}', 1)",
    "INSERT INTO raw_events (payload) VALUES ('{}') RETURNING id",
    "INSERT INTO raw_events (payload) VALUES ('{}') ON CONFLICT (id) DO NOTHING",
    "INSERT INTO raw_events (payload) SELECT payload FROM raw_events",
    "SELECT count(*) FROM raw_events",
    "SELECT payload FROM raw_events",
    "COPY raw_events (payload) TO STDOUT",
    "UPDATE raw_events SET payload = '{}'",
    "DELETE FROM raw_events",
    "TRUNCATE raw_events",
    "LOCK TABLE raw_events IN ACCESS EXCLUSIVE MODE",
    "SELECT nextval('raw_events_seq_seq')",
    "ALTER TABLE raw_events DISABLE TRIGGER ALL",
    "CREATE TABLE warehouse.mine ()",
    "CALL spectrum.process_batch()",
    "CALL spectrum.run()",
    "SELECT spectrum.configure('batch_size', '1')",
    "SELECT * FROM spectrum.config",
    "SELECT * FROM spectrum.readings",
    "SELECT * FROM analytics.active_users",
    "SELECT spectrum.normal_cdf(0)",
    "SELECT spectrum.grant_ingest(current_user::regrole)",
]


@pytest.fixture
def filled(owner_db: psycopg.Connection) -> psycopg.Connection:
    """As the owner, who is no superuser: a row in every view."""
    db = owner_db
    db.execute("""SELECT spectrum.define_funnel('sale', '["visit", "buy"]')""")
    db.execute("SELECT spectrum.define_metric('bought', 'proportion', 'buy')")
    db.execute("SELECT spectrum.define_feature('buying', 'buy')")
    db.execute("""SELECT spectrum.define_attribution('buys', '"buy"')""")
    db.execute("SELECT spectrum.define_paths('any')")
    db.execute(
        """
        CREATE FUNCTION public.everybody(p_users bigint[])
        RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
        LANGUAGE sql STABLE
        AS $$ SELECT '*', unnest(p_users), '{users}'::text[], 1.0 $$
        """
    )
    db.execute("SELECT spectrum.define_report('everybody', 'public.everybody')")
    db.execute(
        """SELECT spectrum.define_experiment('button', '{"a": 0.5, "b": 0.5}', 'a', '["bought"]')"""
    )
    for user, variant in (("u1", "a"), ("u2", "b")):
        shown = {"experiment": "button", "variant": variant}
        insert(
            db,
            [
                event("experiment_exposure", user_id=user, account_id="acme", properties=shown),
                event("visit", user_id=user, account_id="acme"),
                event("buy", user_id=user, account_id="acme", properties={"revenue": 5}),
            ],
        )
    insert(
        db,
        [
            event("subscription_started", account_id="acme", properties={"mrr": 5}),
            event("subscription_changed", account_id="acme", properties={"mrr": "more"}),
            event("request", account_id="acme", properties={"endpoint": "/", "latency_ms": 5}),
            event("visit", occurred_at=datetime.now(UTC).isoformat()),
        ],
    )
    db.execute("CALL spectrum.run()")
    return db


Role = tuple[str, psycopg.Connection]


@pytest.fixture
def roles(
    filled: psycopg.Connection, owner_dsn: str, make_role: MakeRole, connect: Connect
) -> Iterator[dict[str, Role]]:
    """A role of each kind, granted by the owner, and one that was granted nothing."""
    made = {}
    for kind in ("ingest", "reader", "analyst", "nobody"):
        name = make_role(f"Odd {kind}; --")
        made[kind] = name, connect(make_conninfo(owner_dsn, user=name))
        if kind != "nobody":
            grant(filled, "grant", kind, name)
    yield made


def grant(db: psycopg.Connection, verb: str, kind: str, role: str) -> None:
    statement = sql.SQL("SELECT spectrum.{}({}::regrole)").format(
        sql.Identifier(f"{verb}_{kind}"), sql.Literal(sql.Identifier(role).as_string())
    )
    db.execute(statement)


def held(db: psycopg.Connection, role: str) -> set[tuple[str, str]]:
    """Every privilege that the role has on Spectrum's relations and routines."""
    tables = rows(
        db,
        f"""
        SELECT name, privilege FROM ({RELATIONS}) AS relations (name, kind)
        CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
        WHERE kind <> 'S' AND has_any_column_privilege(%(role)s, name, privilege)
        UNION SELECT name, privilege FROM ({RELATIONS}) AS relations (name, kind)
        CROSS JOIN unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']) AS privilege
        WHERE kind <> 'S' AND has_table_privilege(%(role)s, name, privilege)
        UNION SELECT name, privilege FROM ({RELATIONS}) AS relations (name, kind)
        CROSS JOIN unnest(ARRAY['SELECT', 'UPDATE', 'USAGE']) AS privilege
        WHERE kind = 'S' AND has_sequence_privilege(%(role)s, name, privilege)
        UNION SELECT signature, 'EXECUTE' FROM ({ROUTINES}) AS routines (signature, name)
        WHERE has_function_privilege(%(role)s, signature, 'EXECUTE')
        UNION SELECT schema, privilege
        FROM unnest(ARRAY['spectrum', 'warehouse', 'analytics']) AS schema,
            unnest(ARRAY['USAGE', 'CREATE']) AS privilege
        WHERE has_schema_privilege(%(role)s, schema, privilege)
        """.replace("%(role)s", sql.Literal(role).as_string()),
    )
    return set(tables)


def plain_views(db: psycopg.Connection) -> set[str]:
    found = rows(db, f"SELECT name FROM ({RELATIONS}) AS relations (name, kind) WHERE kind = 'v'")
    return {name for (name,) in found if name.startswith("analytics.")}


def test_public_has_nothing(db: psycopg.Connection) -> None:
    """Also where an object's privileges are the defaults, which let PUBLIC execute functions."""
    assert rows(
        db,
        f"""
        SELECT 'relation', oid::regclass::text FROM pg_class, aclexplode(relacl) AS entry
        WHERE entry.grantee = 0
            AND oid::regclass::text IN (SELECT name FROM ({RELATIONS}) AS relations (name, kind))
        UNION SELECT 'column', attrelid::regclass::text FROM pg_attribute, aclexplode(attacl) AS e
        WHERE e.grantee = 0
            AND attrelid::regclass::text IN (SELECT name FROM ({RELATIONS}) AS r (name, kind))
        UNION SELECT 'routine', oid::regprocedure::text
        FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner))) AS entry
        WHERE entry.grantee = 0
            AND oid::regprocedure::text IN (SELECT signature FROM ({ROUTINES}) AS r (signature, n))
        UNION SELECT 'schema', nspname FROM pg_namespace, aclexplode(nspacl) AS entry
        WHERE entry.grantee = 0 AND nspname IN ('spectrum', 'warehouse', 'analytics')
        """,
    ) == []  # fmt: skip
    # What runs with the owner's rights is what operators call, and capture, and no more.
    assert {name for (name,) in rows(db, "SELECT proname FROM pg_proc AS p, pg_namespace AS n"
        " WHERE n.oid = p.pronamespace AND prosecdef"
        " AND nspname IN ('spectrum', 'warehouse', 'analytics')")} == {
            f"{verb}_{what}" for verb in ("define", "drop")
            for what in (
                "funnel", "retention", "metric", "feature", "attribution", "paths", "experiment")
        } | {"request", "cancel_task", "capture"}  # fmt: skip


def test_analysts_call_nothing_that_writes(
    filled: psycopg.Connection, roles: dict[str, Role]
) -> None:
    """What each role holds stands in docs/security.md: see test_roles.py."""
    analyst = held(filled, roles["analyst"][0])
    functions = {(name, privilege) for name, privilege in analyst if privilege == "EXECUTE"}
    assert len(functions) > 100
    # Whatever writes, or works the pipeline, is volatile or a procedure.
    may_not = rows(
        filled,
        f"""
        SELECT signature FROM ({ROUTINES}) AS routines (signature, name)
        JOIN pg_proc ON oid = signature::regprocedure
        WHERE provolatile = 'v' OR prokind = 'p' OR prorettype = 'trigger'::regtype
        """,
    )
    assert {name for (name,) in may_not} & {name for name, _ in functions} == set()


def test_ingest_can_insert_a_payload(filled: psycopg.Connection, roles: dict[str, Role]) -> None:
    _, db = roles["ingest"]
    insert(db, [event("copied"), event("copied")])
    db.execute("""INSERT INTO raw_events (payload) VALUES ('{"event_type": "inserted"}')""")
    with db.transaction():
        db.execute("""INSERT INTO raw_events (payload) SELECT '{"event_type": "inserted"}'""")
    assert drain(filled) == Counts(4, 4, 0, 0)


def test_ingest_can_do_nothing_else(roles: dict[str, Role]) -> None:
    _, db = roles["ingest"]
    for statement in REFUSED_TO_INGEST:
        with pytest.raises(errors.InsufficientPrivilege), db.transaction():
            db.execute(statement)


def test_reader_reads_every_plain_view_and_nothing_else(
    filled: psycopg.Connection, roles: dict[str, Role]
) -> None:
    _, db = roles["reader"]
    for view in plain_views(filled) - OF_EVENTS:
        assert rows(db, f"SELECT * FROM {view}"), f"{view} is empty, so this shows nothing"
    others = rows(filled, f"SELECT name, kind FROM ({RELATIONS}) AS relations (name, kind)")
    closed = {name for name, kind in others if kind != "S"} - plain_views(filled)
    for relation in closed | OF_EVENTS:
        with pytest.raises(errors.InsufficientPrivilege):
            db.execute(f"SELECT * FROM {relation}")
    for question in QUESTIONS:
        with pytest.raises(errors.InsufficientPrivilege):
            db.execute(f"SELECT * FROM {question}")


def test_analyst_asks_every_question(filled: psycopg.Connection, roles: dict[str, Role]) -> None:
    _, db = roles["analyst"]
    for question in QUESTIONS:
        answer = rows(db, f"SELECT * FROM {question}")
        assert answer == rows(filled, f"SELECT * FROM {question}")
        assert answer, question
    asked = {question.split("(")[0].split(".")[1] for question in QUESTIONS}
    to_ask = rows(
        filled,
        "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'analytics'::regnamespace"
        " AND NOT starts_with(proname, '_')",
    )
    assert {name for (name,) in to_ask} <= asked | {"trace"}
    traced = rows(
        db,
        "SELECT event_id IS NOT NULL, raw_id FROM analytics.revenue_summary AS cell, "
        "analytics.trace('revenue_summary', jsonb_build_object('day', cell.day, "
        "'currency', cell.currency)) WHERE cell.account_id = '*'",
    )
    assert set(traced) == {(True, None)}  # The raw events are not his to see.
    assert value(db, "SELECT count(*) FROM analytics.events") == 10
    for statement in (
        "SELECT * FROM warehouse.fact_events",
        "SELECT payload FROM raw_events",
        "SELECT * FROM spectrum.config",
        "SELECT * FROM analytics.mv_active_users",
        "SELECT spectrum.configure('batch_size', '1')",
        "SELECT spectrum.define_metric('mine', 'proportion', 'buy')",
        "SELECT spectrum.schedule()",
        "SELECT * FROM spectrum.status()",
        "SELECT * FROM spectrum.verify()",
        "CALL spectrum.refresh_analytics()",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            db.execute(statement)


def test_what_was_granted_can_be_taken_back(
    filled: psycopg.Connection, roles: dict[str, Role]
) -> None:
    for kind in ("ingest", "reader", "analyst"):
        role, db = roles[kind]
        # Twice is no error, neither way.
        for verb in ("grant", "revoke", "revoke"):
            grant(filled, verb, kind, role)
        assert held(filled, role) == set()
        with pytest.raises(errors.InsufficientPrivilege):
            db.execute("SELECT * FROM analytics.active_users")


@pytest.mark.parametrize("kind", ["ingest", "reader", "analyst"])
@pytest.mark.parametrize("verb", ["grant", "revoke"])
def test_no_role_is_refused(db: psycopg.Connection, verb: str, kind: str) -> None:
    with pytest.raises(errors.InvalidParameterValue) as refused:
        db.execute(f"SELECT spectrum.{verb}_{kind}(NULL)")
    assert refused.value.diag.message_primary == "invalid value for argument p_role: NULL"
    assert refused.value.diag.message_hint == "Expected a role."


def test_a_reader_cannot_grant(roles: dict[str, Role], filled: psycopg.Connection) -> None:
    """Nor can anyone who owns nothing of it, even where he may call the helper."""
    role, db = roles["reader"]
    filled.execute(sql.SQL("GRANT USAGE ON SCHEMA spectrum TO {0}").format(sql.Identifier(role)))
    filled.execute(
        sql.SQL("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA spectrum TO {0}").format(
            sql.Identifier(role)
        )
    )
    with pytest.raises(errors.InsufficientPrivilege):
        grant(db, "grant", "ingest", role)
    assert statuses(filled) == {"done": 10}
