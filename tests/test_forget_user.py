"""Forgetting: nothing is left of him, the numbers say what they would have said without him, the
receipt says by how much they changed, and he does not come back."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Connect, MakeDb
from forgetting import MARKER, TRACES, USER, define, life, settle, traces, views
from oracle_active_users import standing_active_users
from oracle_events import Calendar, read_events
from oracle_revenue import standing_revenue
from pipeline import (
    drain,
    event,
    insert,
    kill_while_it_waits,
    process,
    prove,
    rows,
    statuses,
    value,
)

FORGOTTEN = "user_id: was forgotten on request"
REQUEST = "SELECT spectrum.request('forget_user', %s)"


def forget(db: psycopg.Connection, user: str = USER, **options: Any) -> list[tuple]:
    arguments = "".join(f", p_{name} => %({name})s" for name in options)
    return db.execute(
        f"SELECT object, what, cell, before, after, change"
        f" FROM spectrum.forget_user(%(user)s{arguments})", {"user": user} | options,
    ).fetchall()  # fmt: skip


def request(db: psycopg.Connection, **arguments: Any) -> int:
    return value(db, REQUEST, json.dumps({"user_id": USER} | arguments))


def changes(before: dict, after: dict) -> set[tuple[str, str, Any, Any]]:
    """View, column, before, after of each number that differs; what a cell is called left out."""
    return {
        (f"analytics.{key[0]}", name, key[1], str(old.get(name)), str(new.get(name)))
        for key in before | after
        for old, new in [(before.get(key, {}), after.get(key, {}))]
        for name in old | new
        if old.get(name) != new.get(name)
    }


def test_nothing_of_him_is_left_in_any_table(db: psycopg.Connection) -> None:
    settle(db)
    insert(db, [*life(USER, MARKER, 15), {"user_id": USER, "x": MARKER}])
    assert traces(db, USER) | traces(db, MARKER) == TRACES
    forget(db)
    assert traces(db, USER) | traces(db, MARKER) == set()
    assert value(db, "SELECT count(*) FROM warehouse.dim_users WHERE user_id ~ '^forgotten-'") == 1
    assert value(db, "SELECT count(*) FROM warehouse.fact_events") == 15
    assert statuses(db) == {"done": 15}
    prove(db, views=True)
    assert rows(db, "SELECT error_msg FROM spectrum.run_log WHERE error_msg ~ 'refund'") == [
        ("no refund: (erased) of (erased) (SQLSTATE 58000)",),
        ("process: no refund: (erased) of (erased) (SQLSTATE 58000)",),
    ]


def assert_told_alike(db: psycopg.Connection, other: psycopg.Connection) -> None:
    """What is left here, told to a database that knows of nobody else, gives the same views."""
    define(other)
    for payload in rows(db, "SELECT payload FROM raw_events ORDER BY seq"):
        insert(other, payload)
    other.execute("CALL spectrum.run()")
    assert views(other) == views(db)


def test_the_numbers_are_those_of_a_history_without_him(
    db: psycopg.Connection, make_db: MakeDb, connect: Connect
) -> None:
    """In another database he never was."""
    settle(db)
    forget(db)
    assert_told_alike(db, connect(make_db("without")))


def test_the_receipt_says_what_changed_by_how_much(db: psycopg.Connection) -> None:
    settle(db)
    payloads = [p for (p,) in rows(db, "SELECT payload FROM raw_events WHERE status = 'done'"
                                       " AND copy_of IS NULL ORDER BY seq")]  # fmt: skip
    before = views(db)
    receipt = forget(db)
    after = views(db)

    cells = [line for line in receipt if line[2] is not None]
    told = {
        (view, what, repr(sorted(cell.items())), str(old), str(new))
        for view, what, cell, old, new, _ in cells
        if "(erased)" not in cell.values()
    }
    expected = changes(before, after)
    gone = {line for line in expected if line[2] not in {key for _, key in after}}
    assert told <= expected
    assert expected - told <= gone
    assert len(cells) == len(expected)
    assert MARKER not in str(receipt) and USER not in str(receipt)

    # By hand, and by other code: two views, from the payloads with him and without.
    with_him = read_events(payloads)
    without = read_events(p for p in payloads if p.get("user_id") != USER)
    for view, oracle, names in (
        ("active_users", standing_active_users, ["dau", "wau", "mau"]),
        ("revenue_summary", standing_revenue, ["orders", "gross", "refunds", "net"]),
    ):
        keys = ["account_id", "day"] + (["currency"] if view == "revenue_summary" else [])
        numbers = [
            {
                tuple(map(str, row[: len(keys)])): row[len(keys) : len(keys) + len(names)]
                for row in oracle(events, Calendar())
            }
            for events in (with_him, without)
        ]
        assert {
            (*(cell[key] for key in keys), what): change
            for object_, what, cell, *_, change in cells
            if object_ == f"analytics.{view}" and what in names
        } == {
            (*key, name): Decimal(new) - Decimal(old)
            for key in numbers[0] | numbers[1]
            for name, old, new in zip(
                names,
                numbers[0].get(key, [0] * 4),
                numbers[1].get(key, [0] * 4),
                strict=False,
            )
            if old != new or key not in numbers[1]
        }
    tables = {(object_, what): change for object_, what, cell, *_, change in receipt if not cell}
    assert tables["public.raw_events", "rows removed"] == -19
    assert tables["warehouse.fact_events", "rows removed"] == -14
    assert tables["warehouse.event_ledger", "rows removed"] == -14
    assert tables["warehouse.dim_users", "rows changed"] == 1
    assert tables["spectrum.rollup_user_days", "rows removed"] == -2
    outcome = value(db, "SELECT outcome FROM spectrum.tasks WHERE kind = 'forget_user'")
    assert outcome["tables"]["warehouse.fact_events: rows removed"] == -14
    assert sum(outcome["numbers"].values()) == len(cells)


def test_he_does_not_come_back_until_he_is_asked_to(db: psycopg.Connection) -> None:
    insert(db, life(USER, MARKER) + life("bob", "pro"))
    drain(db)
    forget(db)
    # The same file again, and what no reading understands.
    insert(
        db, [*life(USER, MARKER), {"user_id": USER, "event_type": [MARKER]}, event(user_id=USER)]
    )
    assert drain(db).failed == 9
    assert traces(db, USER) | traces(db, MARKER) == set()
    failed = "SELECT DISTINCT payload, error_msg FROM raw_events WHERE status = 'failed'"
    assert rows(db, failed) == [({"forgotten": True}, FORGOTTEN)]
    db.execute("CALL spectrum.reprocess()")
    assert drain(db).failed == 9
    assert rows(db, failed) == [({"forgotten": True}, FORGOTTEN)]
    prove(db, views=True)
    assert value(db, "SELECT spectrum.capture(%s) IS NOT NULL", json.dumps(life(USER, MARKER)[0]))
    assert traces(db, USER) == set(), "not even while it waits"

    assert value(db, "SELECT spectrum.remember_user(%s)", USER) is True
    assert value(db, "SELECT spectrum.remember_user(%s)", USER) is False
    drain(db)
    insert(db, life(USER, MARKER))
    assert drain(db).loaded == 7
    assert value(db, "SELECT count(*) FROM warehouse.dim_users WHERE user_key <> 0") == 3
    prove(db, views=True)


def test_a_copy_by_somebody_else_steps_in(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="x", user_id=USER), event(event_id="x", user_id="bob")])
    drain(db)
    forget(db)
    db.execute("CALL spectrum.run()")
    assert rows(db, "SELECT user_id FROM analytics.events") == [("bob",)]
    prove(db, views=True)


def test_his_copy_of_what_counts_for_another_goes(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="x", user_id="bob"), event(event_id="x", user_id=USER)])
    drain(db)
    forget(db)
    assert rows(db, "SELECT payload ->> 'user_id', status FROM raw_events") == [("bob", "done")]
    prove(db, views=True)


def test_anonymised_he_counts_and_is_nobody(db: psycopg.Connection) -> None:
    settle(db)
    before = views(db)
    receipt = forget(db, mode="anonymise", properties=[])
    db.execute("CALL spectrum.run()")
    assert views(db) == before
    assert [line for line in receipt if line[2]] == []
    assert traces(db, USER) == set()
    assert value(db, "SELECT count(*) FROM analytics.events WHERE user_id ~ '^anonymous-'") == 14
    prove(db, views=True)
    insert(db, life(USER, MARKER, 20))
    assert drain(db).failed == 7
    # Read again, the raw events say the same.
    db.execute("CALL spectrum.reprocess(p_status => 'done')")
    db.execute("CALL spectrum.run()")
    assert views(db) == before
    prove(db, views=True)


@pytest.mark.parametrize("properties", [["plan", "currency"], ["*"]])
def test_anonymised_without_some_properties(
    db: psycopg.Connection, properties: list[str], make_db: MakeDb, connect: Connect
) -> None:
    insert(db, [event(user_id=USER, account_id="acme",
                      properties={"plan": MARKER, "revenue": 7, "currency": "EUR"})])  # fmt: skip
    settle(db)
    forget(db, mode="anonymise", properties=properties)
    db.execute("CALL spectrum.run()")
    prove(db, views=True)
    if properties == ["*"]:
        assert traces(db, MARKER) == set()
    assert_told_alike(db, connect(make_db("stripped")))


def test_what_no_reading_knows_goes_with_the_name(db: psycopg.Connection) -> None:
    told = {"email": MARKER, "geo": {"country": "DE", "street": MARKER}}
    insert(db, [event(user_id=USER, **told)])
    drain(db)
    forget(db, mode="anonymise")
    assert traces(db, MARKER) == set()
    prove(db, views=True)


def test_some_events_of_a_user(db: psycopg.Connection) -> None:
    settle(db)
    of_him = "SELECT event_type, count(*) FROM analytics.events WHERE user_id = %s GROUP BY 1"
    assert dict(rows(db, of_him, USER))["buy"] == 2
    scope = {"event_type": "buy", "from": "2024-02-01", "to": "2024-02-12"}
    receipt = forget(db, **scope)
    assert ("warehouse.fact_events", "rows removed", -1) in {(*r[:2], r[5]) for r in receipt}
    assert dict(rows(db, of_him, USER))["buy"] == 1
    prove(db, views=True)
    # Those do not come back; others do.
    insert(db, [each | {"event_id": f"again {n}"} for n, each in enumerate(life(USER, MARKER))])
    assert drain(db) == (7, 6, 0, 1)
    insert(db, [event("buy", user_id="bob"), event("buy", user_id=USER, occurred_at="2024-02-12")])
    assert drain(db).loaded == 2
    prove(db, views=True)
    # Later all of him goes, and the rule for some with it.
    forget(db)
    assert traces(db, USER) | traces(db, MARKER) == set()
    assert rows(db, "SELECT is_whole FROM spectrum.forgotten") == [(True,)]
    prove(db, views=True)


def finish(db: psycopg.Connection) -> dict:
    db.execute("CALL spectrum.run()")
    assert traces(db, USER) | traces(db, MARKER) == set()
    prove(db, views=True)
    return views(db)


def test_interrupted_at_any_step_it_ends_the_same(
    db: psycopg.Connection, make_db: MakeDb, connect: Connect
) -> None:
    settle(db)
    other = connect(make_db("at_once"))
    settle(other)
    forget(other)
    task = request(db)
    steps = 0
    more = True
    while more:
        with db.transaction(force_rollback=True):
            db.execute("SELECT spectrum._work_on_task(%s)", (task,))
        assert traces(db, USER), "a step that was undone left nothing undone"
        more = value(db, "SELECT spectrum._work_on_task(%s)", task)
        steps += 1
        # All raw events that are done are facts, after each step.
        prove(db)
        insert(db, [*life(USER, MARKER, 15), event("visit", user_id="bob")])
        drain(db)
    assert steps >= 6
    insert(other, [event("visit", user_id="bob")] * steps)
    assert finish(db) == finish(other)


def test_a_killed_step_is_done_again_by_the_tick(db: psycopg.Connection, connect: Connect) -> None:
    settle(db)
    holder, caller = connect(autocommit=False), connect()
    holder.execute("SELECT FROM raw_events WHERE payload ->> 'user_id' = %s FOR UPDATE", (USER,))
    request(db)
    kill_while_it_waits(db, caller, "CALL spectrum.run()")
    holder.rollback()
    assert value(db, "SELECT state FROM spectrum.tasks ORDER BY task_id DESC LIMIT 1") == "running"
    finish(db)


def test_his_events_come_in_all_the_while(
    db: psycopg.Connection, connect: Connect, dsn: str
) -> None:
    """Two workers process, one inserts, one refreshes, two forget him at once."""
    settle(db)
    sessions = [connect() for _ in range(5)]

    def send(session: psycopg.Connection) -> None:
        for day in range(1, 25):
            insert(session, life(USER, MARKER, day) + life("bob", "pro", day))

    def work(session: psycopg.Connection) -> None:
        for _ in range(40):
            process(session, 10)

    def refresh(session: psycopg.Connection) -> None:
        for _ in range(10):
            session.execute("SELECT spectrum._refresh_some(20)")

    request(db)
    request(db, mode="anonymise")
    with ThreadPoolExecutor() as threads:
        jobs = [threads.submit(job, session) for job, session in
                zip((send, work, work, refresh), sessions, strict=False)]  # fmt: skip
        jobs.append(threads.submit(sessions[4].execute, "CALL spectrum.run()"))
        for job in jobs:
            job.result()
    db.execute("CALL spectrum.run()")
    states = rows(db, "SELECT state, error_msg FROM spectrum.tasks WHERE kind = 'forget_user'")
    assert states == [("done", None)] * 2
    finish(db)
    assert value(db, "SELECT count(*) FROM analytics.events WHERE user_id = 'bob'") == 169


def test_a_batch_of_an_older_snapshot_is_refused(db: psycopg.Connection, connect: Connect) -> None:
    """It brings the event itself, so it sees that, and does not see that he was forgotten."""
    worker = connect(autocommit=False)
    worker.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    worker.execute("SELECT FROM raw_events")
    forget(db)
    insert(worker, life(USER, MARKER))
    with pytest.raises(psycopg.errors.SerializationFailure):
        process(worker)
    worker.rollback()
    finish(db)


def test_an_older_snapshot_forgets_nobody(db: psycopg.Connection, connect: Connect) -> None:
    caller = connect(autocommit=False)
    caller.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    with pytest.raises(psycopg.errors.InvalidTransactionState) as call:
        forget(caller)
    assert call.value.diag.message_hint


def test_a_batch_that_does_not_end_is_not_waited_for(
    db: psycopg.Connection, connect: Connect
) -> None:
    insert(db, life(USER, MARKER))
    db.execute("SELECT spectrum.configure('lock_timeout', '50 ms')")
    worker = connect(autocommit=False)
    process(worker, 1)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        forget(db)
    request(db)
    db.execute("SELECT spectrum.configure('retry_delay', '0')")
    assert (
        value(db, "SELECT spectrum._work_on_task((SELECT max(task_id) FROM spectrum.tasks))")
        is False
    )
    worker.commit()
    finish(db)


def test_a_batch_does_not_wait_for_ever(db: psycopg.Connection, connect: Connect) -> None:
    """Somebody forgets a user by hand and leaves the transaction open."""
    db.execute("SELECT spectrum.configure('lock_timeout', '20 ms')")
    insert(db, life(USER, MARKER))
    drain(db)
    idle = connect(autocommit=False)
    idle.execute("SELECT spectrum.forget_user(%s)", (USER,))
    insert(db, [event("view", user_id="another")])
    db.execute("SET statement_timeout = '10 s'")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        process(db)
    db.execute("CALL spectrum.run()")
    assert "process: canceling statement due to lock timeout (SQLSTATE 55P03)" in value(
        db, "SELECT last_run_error FROM spectrum.status()"
    )
    idle.rollback()
    assert process(db).loaded == 1


def test_what_is_kept_of_facts_that_are_gone_is_frozen(db: psycopg.Connection) -> None:
    """As after a month of facts went: his own rows go, and the receipt says so."""
    settle(db)
    db.execute("ALTER TABLE warehouse.fact_events DETACH PARTITION warehouse.fact_events_2024_02")
    db.execute("DELETE FROM warehouse.event_ledger")
    db.execute("DELETE FROM raw_events")
    receipt = forget(db)
    frozen = {line[0]: line[5] for line in receipt if line[1] == "frozen rows removed"}
    assert frozen["spectrum.rollup_user_days"] == -2
    assert frozen["spectrum.rollup_sessions"] < 0
    keys = "SELECT user_key FROM warehouse.dim_users WHERE user_id ~ '^forgotten-'"
    for table in ("rollup_user_days", "rollup_sessions", "rollup_feature_weeks"):
        assert rows(db, f"SELECT FROM spectrum.{table} WHERE user_key IN ({keys})") == []


def test_names_of_properties_go_where_a_type_has_many(db: psycopg.Connection) -> None:
    """The catalog keeps 200 names of a type: the place of one that goes stays taken."""
    many = {f"p{number:03}": 1 for number in range(199)}
    insert(db, [event(user_id=USER, properties=many | {MARKER: 1})])
    insert(db, [event(user_id="bob", properties=many | {"other": 1})])
    db.execute("CALL spectrum.run()")
    forget(db)
    insert(db, [event(user_id="bob", properties={"third": 1})])
    db.execute("CALL spectrum.run()")
    assert traces(db, MARKER) == set()
    prove(db, views=True)


def test_a_user_of_too_many_events_is_left_to_the_tick(db: psycopg.Connection) -> None:
    insert(db, [event(user_id=USER)])
    drain(db)
    db.execute(
        "INSERT INTO warehouse.fact_events SELECT gen_random_uuid(), occurred_at, account_key,"
        " user_key, event_type_key, geo_key, properties FROM warehouse.fact_events,"
        " generate_series(1, 100000)"
    )
    with pytest.raises(psycopg.errors.ProgramLimitExceeded) as call:
        forget(db)
    assert "spectrum.request('forget_user'" in str(call.value.diag.message_hint)
    assert rows(db, "SELECT * FROM spectrum.forgotten") == []


def test_in_a_transaction_that_is_rolled_back_nobody_was_forgotten(db: psycopg.Connection) -> None:
    settle(db)
    before = views(db)
    with db.transaction(force_rollback=True):
        forget(db)
    assert views(db) == before
    assert traces(db, USER) | traces(db, MARKER) == TRACES
    insert(db, life(USER, MARKER, 20))
    assert drain(db).loaded == 7
    prove(db, views=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "p_user_id: NULL"),
    ({"user_id": ""}, 'p_user_id: ""'),
    ({"user_id": "x" * 201}, "p_user_id"),
    ({"user_id": "x", "mode": "hide"}, 'p_mode: "hide"'),
    ({"user_id": "x", "mode": "anonymise", "event_type": "buy"}, 'p_mode: "anonymise"'),
    ({"user_id": "x", "properties": ["a"]}, "p_properties"),
    ({"user_id": "x", "mode": "anonymise", "properties": [1]}, "p_properties"),
    ({"user_id": "x", "from": "2024-02-01", "to": "2024-02-01"}, "p_to"),
    ({"user_id": "x", "from": "soon"}, "p_from"),
    ({"user": "x"}, "p_arguments"),
]


def test_what_cannot_be_forgotten_is_refused(db: psycopg.Connection) -> None:
    for arguments, message in REFUSED:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
            db.execute(REQUEST, (json.dumps(arguments),))
    assert rows(db, "SELECT * FROM spectrum.tasks") == []


def test_who_is_being_forgotten_cannot_be_remembered(db: psycopg.Connection) -> None:
    task = request(db)
    with pytest.raises(psycopg.errors.ObjectInUse) as call:
        db.execute("SELECT spectrum.remember_user(%s)", (USER,))
    assert call.value.diag.message_hint
    value(db, "SELECT spectrum.cancel_task(%s)", task)
    assert value(db, "SELECT spectrum.remember_user(%s)", USER) is False
