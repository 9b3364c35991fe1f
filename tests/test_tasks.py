"""Tasks: long work in steps, asked for or carried out at once, cancelled, held up, and failing."""

from __future__ import annotations

import psycopg
import pytest
from conftest import Connect
from pipeline import (
    drain,
    event,
    insert,
    kill_while_it_waits,
    prove,
    rows,
    statuses,
    value,
)

STATES = "SELECT state, done, total, outcome, error_msg FROM spectrum.tasks ORDER BY task_id"


@pytest.fixture
def many(db: psycopg.Connection) -> psycopg.Connection:
    """21,000 events that are facts: two steps of a reprocessing."""
    insert(db, [event(user_id=f"u{number % 100}") for number in range(21000)])
    drain(db, 100_000)
    return db


def test_a_request_is_carried_out_by_the_tick_in_steps(many: psycopg.Connection) -> None:
    value(many, """SELECT spectrum.request('reprocess', '{"status": "done"}')""")
    assert rows(
        many, "SELECT work, done, unit FROM spectrum.progress WHERE work LIKE '%task%'"
    ) == [("reprocess (task 1)", 0, None)]
    assert statuses(many) == {"done": 21000}
    many.execute("CALL spectrum.run()")
    assert rows(many, STATES) == [("done", 21000, 21000, {"requeued": 21000}, None)]
    steps = rows(many, "SELECT detail, error_msg FROM spectrum.run_log WHERE step = 'tasks'")
    assert steps == [("task 1, reprocess", None)] * 2
    assert statuses(many) == {"done": 21000}
    prove(many)


def test_a_killed_call_is_finished_by_the_tick(many: psycopg.Connection, connect: Connect) -> None:
    """The second step waits for a lock when its session is terminated; the first is done."""
    holder, caller = connect(autocommit=False), connect()
    holder.execute("SELECT FROM raw_events WHERE seq = 21000 FOR UPDATE")
    kill_while_it_waits(many, caller, "CALL spectrum.reprocess(p_status => 'done')")
    assert rows(many, STATES) == [("running", 20000, 21000, {"requeued": 20000}, None)]
    holder.rollback()
    many.execute("CALL spectrum.run()")
    assert rows(many, STATES) == [("done", 21000, 21000, {"requeued": 21000}, None)]
    prove(many)


def test_a_cancelled_task_goes_no_further(db: psycopg.Connection) -> None:
    insert(db, [event()])
    drain(db)
    task = value(db, """SELECT spectrum.request('reprocess', '{"status": "done"}')""")
    assert value(db, "SELECT spectrum.cancel_task(%s)", task) is True
    assert value(db, "SELECT spectrum.cancel_task(%s)", task) is False
    db.execute("CALL spectrum.run()")
    assert value(db, "SELECT state FROM spectrum.tasks") == "cancelled"
    assert statuses(db) == {"done": 1}


def test_a_step_that_fails_ends_its_task_and_says_why(db: psycopg.Connection) -> None:
    insert(db, [event()])
    drain(db)
    db.execute("""
        CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION E'not\\nnow' USING ERRCODE = 'ZZ001'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON raw_events EXECUTE FUNCTION public.refuse()
    """)
    with pytest.raises(
        psycopg.errors.DatabaseError, match=r"reprocess \(task 1\) is failed"
    ) as call:
        db.execute("CALL spectrum.reprocess(p_status => 'done')")
    assert call.value.sqlstate == "ZZ001"
    assert call.value.diag.message_hint == "What is done is done; call it again for the rest."
    ((state, message),) = rows(db, "SELECT state, error_msg FROM spectrum.tasks")
    assert (state, message) == ("failed", "not now (SQLSTATE ZZ001)")
    health = "SELECT ok, message FROM spectrum.health() WHERE check_name = 'tasks'"
    assert rows(db, health) == [(False, "reprocess (task 1): not now (SQLSTATE ZZ001)")]


def test_a_step_that_is_locked_out_is_tried_again(db: psycopg.Connection, connect: Connect) -> None:
    insert(db, [event()])
    drain(db)
    db.execute("SELECT spectrum.configure('retry_delay', '0')")
    task = value(db, """SELECT spectrum.request('reprocess', '{"status": "done"}')""")
    holder = connect(autocommit=False)
    holder.execute("SELECT FROM raw_events FOR UPDATE")
    db.execute("SET lock_timeout = '100ms'")
    assert value(db, "SELECT spectrum._work_on_task(%s)", task) is False
    ((state, message),) = rows(db, "SELECT state, error_msg FROM spectrum.tasks")
    assert state == "running" and "55P03" in message
    holder.rollback()
    db.execute("CALL spectrum.run()")
    assert rows(db, STATES) == [("done", 1, 1, {"requeued": 1}, None)]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("purge_all", "{}", 'p_kind: "purge_all"'),
        ("reprocess", "[]", "p_arguments"),
        ("reprocess", '{"form": "2024-01-01"}', 'p_arguments: "form"'),
        ("reprocess", '{"from": "soon"}', 'p_from: "soon"'),
        ("reprocess", '{"status": "pending"}', 'p_status: "pending"'),
        ("purge_raw", "{}", "p_older_than"),
        ("purge_raw", '{"older_than": "-1 day"}', 'p_older_than: "-1 day"'),
        ("purge_raw", '{"older_than": "1000001 years"}', 'p_older_than: "1000001 years"'),
        ("purge_facts", '{"older_than": "1000001 years"}', 'p_older_than: "1000001 years"'),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    db: psycopg.Connection, kind: str, arguments: str, message: str
) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
        db.execute("SELECT spectrum.request(%s, %s)", (kind, arguments))
    assert rows(db, "SELECT * FROM spectrum.tasks") == []


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_stricter_default_ends_no_task(
    db: psycopg.Connection, connect: Connect, level: str
) -> None:
    insert(db, [event(user_id="anna"), event(user_id="ben")])
    drain(db)
    task = value(db, """SELECT spectrum.request('forget_user', '{"user_id": "anna"}')""")
    strict = connect()
    strict.execute(f"SET default_transaction_isolation = '{level}'")
    strict.execute("CALL spectrum.run()")
    state = "SELECT state FROM spectrum.tasks WHERE task_id = %s"
    assert value(db, state, task) == "done"
    strict.execute("CALL spectrum.reprocess(p_status => 'done')")
    assert statuses(db) == {"pending": 1}


def test_reprocess_refuses_a_transaction_block(db: psycopg.Connection) -> None:
    insert(db, [event()])
    drain(db)
    with pytest.raises(psycopg.errors.InvalidTransactionTermination), db.transaction():
        db.execute("CALL spectrum.reprocess(p_status => 'done')")
    assert statuses(db) == {"done": 1}
    assert rows(db, "SELECT * FROM spectrum.tasks") == []


def test_reprocess_by_error(db: psycopg.Connection) -> None:
    insert(db, ["[1]", event(""), event("x", properties={"revenue": "much"})])
    drain(db)
    assert value(db, "CALL spectrum.reprocess(p_error => 'event_type:%')") == 1
    assert statuses(db) == {"failed": 2, "pending": 1}


def test_times_are_those_of_who_asked(db: psycopg.Connection) -> None:
    """Whoever carries it out, in whatever time zone and on whatever day."""
    db.execute("SET timezone = 'Asia/Tokyo'")
    task = value(
        db,
        "SELECT spectrum.request('reprocess', %s)",
        '{"from": "2024-02-10 09:00", "to": "today"}',
    )
    (asked,) = rows(
        db,
        "SELECT (arguments ->> 'from')::timestamptz = '2024-02-10T00:00:00Z',"
        " arguments ->> 'to' ~ '^[0-9-]{10}T00:00:00[+]09:00$'"
        " FROM spectrum.tasks WHERE task_id = %s",
        task,
    )
    assert asked == (True, True)
