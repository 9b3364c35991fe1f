"""An operator looks after the pipeline and asks for work; he gains nothing else by it."""

from __future__ import annotations

import psycopg
import pytest
from conftest import Connect, MakeRole
from pipeline import event, insert, rows, statuses, value
from psycopg import errors
from psycopg.conninfo import make_conninfo
from tenancy import define, quoted


@pytest.fixture
def operator(
    owner_dsn: str, owner_db: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> psycopg.Connection:
    name = make_role("Odd operator; --")
    owner_db.execute(f"SELECT spectrum.grant_operator({quoted(name)})")
    return connect(make_conninfo(owner_dsn, user=name))


def test_operator_sees_how_it_is(
    owner_db: psycopg.Connection, operator: psycopg.Connection
) -> None:
    insert(owner_db, [event("seen"), event("")])
    owner_db.execute("CALL spectrum.run()")
    assert rows(operator, "SELECT done, failed FROM spectrum.status()") == [(1, 1)]
    assert rows(operator, "SELECT done, failed FROM spectrum.pipeline") == [(1, 1)]
    checks = "SELECT check_name, ok FROM spectrum.health() WHERE check_name <> 'schedule'"
    assert rows(operator, checks) == rows(owner_db, checks)
    assert rows(operator, "SELECT step FROM spectrum.run_log WHERE step = 'run'")
    assert rows(operator, "SELECT * FROM spectrum.progress") == []
    for query in (
        "raw_events", "spectrum.readings", "analytics.events", "analytics.daily_events",
        "warehouse.fact_events", "analytics.trend()", "spectrum.verify()", "spectrum.tenants",
    ):  # fmt: skip
        with pytest.raises(errors.InsufficientPrivilege):
            operator.execute(f"SELECT * FROM {query}")


def test_operator_defines_and_drops(
    owner_db: psycopg.Connection, operator: psycopg.Connection
) -> None:
    insert(owner_db, [event("visit", user_id="u"), event("buy", user_id="u")])
    for call in (
        """define_funnel('f', '["visit", "buy"]')""", "define_retention('r', 'visit')",
        "define_metric('m', 'proportion', 'buy')", "define_feature('x', 'buy')",
        """define_attribution('a', '"buy"')""", "define_paths('p')",
        """define_experiment('e', '{"a": 1, "b": 1}', 'a', '["m"]')""",
    ):  # fmt: skip
        operator.execute(f"SELECT spectrum.{call}")
    owner_db.execute("CALL spectrum.run()")
    assert value(owner_db, "SELECT count(*) FROM analytics.conversion_funnels") == 2
    assert value(operator, "SELECT count(*) FROM spectrum.experiments") == 1
    for call in (
        "experiment('e')", "feature('x')", "metric('m')", "retention('r')", "funnel('f')",
        "attribution('a')", "paths('p')",
    ):  # fmt: skip
        operator.execute(f"SELECT spectrum.drop_{call}")
    assert value(operator, "SELECT count(*) FROM spectrum.funnels") == 0
    # And with the owner's checks.
    with pytest.raises(errors.InvalidParameterValue):
        operator.execute("""SELECT spectrum.define_funnel('f', '"no steps"')""")
    with pytest.raises(errors.InvalidParameterValue):
        operator.execute("SELECT spectrum.drop_metric('unknown')")


def test_operator_asks_and_the_owner_carries_out(
    owner_db: psycopg.Connection, operator: psycopg.Connection
) -> None:
    insert(owner_db, [event("seen"), event("")])
    owner_db.execute("CALL spectrum.run()")
    task = value(operator, """SELECT spectrum.request('reprocess', '{"status": "all"}')""")
    assert statuses(owner_db) == {"done": 1, "failed": 1}
    owner_db.execute("CALL spectrum.run()")
    me = value(operator, "SELECT session_user")
    asked = "SELECT state, asked_by FROM spectrum.tasks WHERE task_id = %s"
    assert rows(operator, asked, task) == [("done", me)]
    again = value(operator, "SELECT spectrum.request('reprocess')")
    assert value(operator, "SELECT spectrum.cancel_task(%s)", again)
    owner_db.execute("CALL spectrum.run()")
    assert value(operator, "SELECT state FROM spectrum.tasks WHERE task_id = %s", again) == (
        "cancelled"
    )


def test_operator_has_things_deleted_by_the_owner_alone(
    owner_db: psycopg.Connection, operator: psycopg.Connection
) -> None:
    """Asking for purge and erasure is what he is for; doing it, and bringing back, is not."""
    insert(owner_db, [event("seen", user_id="ann"), event("seen", user_id="bob")])
    owner_db.execute("CALL spectrum.run()")
    for kind, arguments in (
        ("forget_user", '{"user_id": "ann"}'), ("purge_raw", '{"older_than": "0"}'),
        ("purge_facts", '{"older_than": "13 months"}'),
    ):  # fmt: skip
        operator.execute("SELECT spectrum.request(%s, %s)", (kind, arguments))
    for call in (
        "SELECT * FROM spectrum.forget_user('bob')", "SELECT spectrum.remember_user('ann')",
        "CALL spectrum.purge_raw('0')", "CALL spectrum.purge_facts('13 months')",
        "SELECT spectrum._work_on_task(1)", "SELECT * FROM spectrum.receipts",
    ):  # fmt: skip
        with pytest.raises(errors.InsufficientPrivilege):
            operator.execute(call)
    held = "SELECT (SELECT count(*) FROM raw_events), (SELECT count(*) FROM warehouse.event_ledger)"
    assert rows(owner_db, held) == [(2, 2)]
    owner_db.execute("CALL spectrum.run()")
    assert rows(owner_db, held) == [(0, 1)]
    assert rows(operator, "SELECT DISTINCT state FROM spectrum.tasks") == [("done",)]


REFUSED = [
    "SELECT spectrum.define_report('mine', 'pg_catalog.now')",
    "SELECT spectrum.drop_report('mine')",
    "SELECT spectrum.configure('batch_size', '1')",
    "UPDATE spectrum.config SET batch_size = 1",
    "INSERT INTO spectrum.tasks (kind) VALUES ('reprocess')",
    "UPDATE spectrum.tasks SET arguments = '{}'",
    "DELETE FROM spectrum.run_log",
    "INSERT INTO spectrum.report_definitions VALUES ('mine', 'public.mine')",
    "UPDATE spectrum.reports SET definition = '{}'",
    "UPDATE spectrum.report_kinds SET maintained_by = 'mine'",
    "CALL spectrum.run()",
    "CALL spectrum.reprocess()",
    "CALL spectrum.process_batch()",
    "SELECT spectrum._do_reprocess(1)",
    "SELECT spectrum._begin_report('funnel')",
    "SELECT spectrum.schedule()",
    "SELECT spectrum.grant_operator(current_user::regrole)",
    "SELECT spectrum.setup()",
]


def test_operator_may_not(operator: psycopg.Connection) -> None:
    for statement in REFUSED:
        with pytest.raises(errors.InsufficientPrivilege):
            operator.execute(statement)


HOSTILE = "x'); ALTER ROLE CURRENT_USER SUPERUSER; --"


def test_operator_does_not_become_the_owner(
    owner_db: psycopg.Connection, operator: psycopg.Connection
) -> None:
    """What runs with the owner's rights takes no code: not in names, not in arguments, not by a
    path to look things up in, not by temporary objects that are called like the owner's."""
    define(owner_db)
    insert(owner_db, [event("buy", user_id="u", account_id="a")])
    owner_db.execute("CALL spectrum.run()")
    trap = """
        CREATE FUNCTION pg_temp.{0}({1}) RETURNS {2} LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'ran as %', current_user; END $$
    """
    for name, arguments, returns in (
        ("to_jsonb", "anyelement", "jsonb"), ("clock_timestamp", "", "timestamptz"),
        ("format", "text, text", "text"), ("same", "text, text", "boolean"),
        ("jsonb_typeof", "jsonb", "text"), ("_check_name", "text, text", "void"),
    ):  # fmt: skip
        operator.execute(trap.format(name, arguments, returns))
    operator.execute("CREATE OPERATOR pg_temp.= (LEFTARG = text, RIGHTARG = text,"
                     " FUNCTION = pg_temp.same)")  # fmt: skip
    operator.execute("CREATE TEMP TABLE funnels (funnel text)")
    operator.execute("CREATE TEMP TABLE tasks (kind text)")
    operator.execute("SET search_path = pg_temp, public, pg_catalog, spectrum")
    literal = "'" + HOSTILE.replace("'", "''") + "'"
    event_name = '"' + HOSTILE.replace('"', '\\"') + '"'
    for call in (
        f"""define_funnel({literal}, '[{event_name.replace("'", "''")}]')""",
        f"define_retention({literal}, {literal}, {literal})",
        f"define_metric({literal}, 'mean', {literal}, {literal})",
        f"define_feature({literal}, {literal})",
        f"""define_attribution({literal}, '{event_name.replace("'", "''")}')""",
        f"define_paths({literal}, {literal})",
        f"""define_experiment({literal}, '{{"a": 1, "b": 1}}', 'a',
            jsonb_build_array({literal}))""",
    ):
        operator.execute(f"SELECT spectrum.{call}")
    # Nor by settings that change how the literals of a function are read.
    with_settings = psycopg.connect(
        operator.info.dsn,
        options="-c standard_conforming_strings=off -c backslash_quote=on",
        autocommit=True,
    )
    with with_settings as careless:
        for text in (HOSTILE + "2", "\\'; SELECT 1/0; --", "\\"):
            careless.execute("SELECT spectrum.define_metric(%s, 'mean', %s, %s)", [text] * 3)
            careless.execute("SELECT spectrum.drop_metric(%s)", (text,))
            asked = "SELECT spectrum.request('reprocess', jsonb_build_object('error', %s::text))"
            careless.execute(asked, (text,))
    for kind, arguments in (
        (HOSTILE, "{}"), ("reprocess'; --", "{}"), ("reprocess", '{"error": "\\\\"}'),
        ("reprocess", '{"from": "now()); DROP TABLE raw_events; --"}'),
        ("reprocess", '{"event_type": "x\'; DROP TABLE raw_events; --"}'),
        ("reprocess", '{"x\'; --": "1"}'), ("reprocess", '{"status": "done\'; --"}'),
    ):  # fmt: skip
        try:
            operator.execute("SELECT spectrum.request(%s, %s)", (kind, arguments))
        except errors.InvalidParameterValue:
            continue
    owner_db.execute("CALL spectrum.run()")
    assert statuses(owner_db) == {"done": 1}
    me = value(operator, "SELECT session_user")
    assert (
        rows(
            owner_db,
            "SELECT rolsuper, rolcreaterole, rolbypassrls FROM pg_roles WHERE rolname IN (%s, %s)",
            me,
            value(owner_db, "SELECT current_user"),
        )
        == [(False, False, False)] * 2
    )
    assert HOSTILE in {name for (name,) in rows(owner_db, "SELECT funnel FROM spectrum.funnels")}
    assert value(operator, "SELECT count(*) FROM pg_temp.funnels") == 0
    # A task that fails says so in one line.
    assert not rows(owner_db, "SELECT FROM spectrum.tasks WHERE error_msg ~ '[\\n\\r]'")
