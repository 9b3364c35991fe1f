"""What comes late and what other workers leave behind is found and processed."""

from __future__ import annotations

import json

import psycopg
import pytest
from conftest import Connect
from pipeline import (
    NOTHING,
    Counts,
    event,
    facts,
    insert,
    make_due,
    process,
    prove,
    rows,
    statuses,
    value,
    wait_until,
)

# What comes late ---------------------------------------------------------------------------------


def test_a_late_committer_is_found(db: psycopg.Connection, connect: Connect) -> None:
    late = connect(autocommit=False)
    insert(late, [event(event_id="late")])
    insert(db, [event(event_id="e")])
    for _ in range(3):
        process(db)
    assert facts(db) == 1
    late.commit()
    assert process(db) == Counts(1, 1, 0, 0)
    prove(db)


def test_a_late_committer_with_a_younger_transaction_id_is_found(
    db: psycopg.Connection, connect: Connect
) -> None:
    """Receive numbers and transaction ids are drawn in different orders."""
    early, late = connect(autocommit=False), connect(autocommit=False)
    early.execute("SELECT pg_current_xact_id()")
    insert(late, [event(event_id="late")])
    insert(early, [event(event_id="e")])
    early.commit()
    for _ in range(4):
        process(db)
    assert facts(db) == 1
    late.commit()
    assert process(db) == Counts(1, 1, 0, 0)
    prove(db)


def test_a_copy_that_stalls_is_found(db: psycopg.Connection, connect: Connect) -> None:
    """COPY draws receive numbers long before its first row is written."""
    late = connect(autocommit=False)
    with late.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
        # The second is long, or else the client would keep the first to itself.
        for n in (1, 20_000):
            copy.write(json.dumps(event("late", properties={"n": "x" * n})) + "\n")
        wait_until(lambda: value(db, "SELECT is_called FROM raw_events_seq_seq"))
        insert(db, [event(event_id="e")])
        for _ in range(4):
            process(db)
        assert rows(db, "SELECT min(seq) > 1 FROM raw_events") == [(True,)]
    late.commit()
    assert process(db) == Counts(2, 2, 0, 0)
    prove(db)


def test_the_safe_mark_moves_on_when_nobody_writes(
    db: psycopg.Connection, connect: Connect
) -> None:
    insert(db, [event(event_id=f"e{n}") for n in range(10)])
    writer = connect(autocommit=False)
    insert(writer, [event(event_id="w")])
    for _ in range(4):
        process(db)
    assert value(db, "SELECT safe_seq FROM spectrum.intake") == 0
    writer.rollback()
    # Whoever writes from now on is not waited for.
    insert(writer, [event(event_id="v")])
    for _ in range(3):
        process(db)
    assert value(db, "SELECT safe_seq FROM spectrum.intake") == 11
    writer.commit()
    assert process(db) == Counts(1, 1, 0, 0)


def test_rows_of_a_worker_that_was_rolled_back_are_found(
    db: psycopg.Connection, connect: Connect
) -> None:
    # What the worker would be waited for is there: the month, the event type.
    insert(db, [event(event_id="first")])
    process(db)
    insert(db, [event(event_id=f"e{n}") for n in range(30)])
    worker = connect(autocommit=False)
    assert process(worker, 10) == Counts(10, 10, 0, 0)
    other = connect()
    assert process(other, 10) == Counts(10, 10, 0, 0)
    assert process(other) == Counts(10, 10, 0, 0)
    assert process(other) == NOTHING
    worker.rollback()
    assert facts(db) == 21
    assert process(other) == Counts(10, 10, 0, 0)
    prove(db)


def test_a_rolled_back_batch_leaves_nothing(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="e", user_id="u"), event(geo=1)])
    with db.transaction(force_rollback=True):
        assert process(db) == Counts(2, 1, 0, 1)
    assert statuses(db) == {"pending": 2}
    assert facts(db) == 0
    assert value(db, "SELECT count(*) FROM warehouse.dim_users") == 1
    assert process(db) == Counts(2, 1, 0, 1)
    prove(db)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_insert_and_process_in_one_transaction(db: psycopg.Connection, isolation: str) -> None:
    insert(db, [event(event_id="e"), event(event_id="f", occurred_at="2024-09-01")])
    with db.transaction():
        db.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
        insert(db, [event(event_id="e"), event(event_id="g")])
        assert process(db, 3) == Counts(3, 2, 1, 0)
        assert process(db) == Counts(1, 1, 0, 0)
        assert process(db) == NOTHING
    prove(db)


# Outside workers ---------------------------------------------------------------------------------


def test_what_an_outside_worker_leaves_is_taken_back(db: psycopg.Connection) -> None:
    insert(db, [event(event_id=f"e{n}") for n in range(4)])
    db.execute("UPDATE raw_events SET status = 'processing'")
    assert process(db) == NOTHING
    # It ends two of them itself: those are none of our business, whatever became of them.
    db.execute(
        "UPDATE raw_events SET status = CASE seq WHEN 1 THEN 'done' ELSE 'failed' END,"
        " error_msg = CASE seq WHEN 2 THEN 'mine' END, processed_at = now() WHERE seq <= 2"
    )
    assert value(
        db,
        "SELECT DISTINCT due_at - now() < '15 minutes' AND due_at - now() > '14 minutes'"
        " FROM spectrum.requeue",
    )
    make_due(db)
    assert process(db) == Counts(2, 2, 0, 0)
    assert rows(db, "SELECT seq, status, error_msg FROM raw_events ORDER BY seq") == [
        (1, "done", None),
        (2, "failed", "mine"),
        (3, "done", None),
        (4, "done", None),
    ]
    assert value(db, "SELECT count(*) FROM spectrum.requeue") == 0


def test_rows_inserted_as_processing_are_found_by_the_patrol(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="e")])
    db.execute(
        "INSERT INTO raw_events (payload, status) VALUES ('{\"event_type\": \"a\"}', 'processing')"
    )
    insert(db, [event(event_id="f")])
    for _ in range(4):
        process(db)
    db.execute("SELECT spectrum._patrol()")
    make_due(db)
    assert process(db) == Counts(1, 1, 0, 0)
    prove(db)


def test_a_row_that_was_deleted_while_it_waited(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="e"), event(event_id="f")])
    process(db)
    db.execute("UPDATE raw_events SET status = 'pending'")
    db.execute("DELETE FROM raw_events WHERE seq = 1")
    assert process(db) == Counts(1, 1, 0, 0)
    db.execute("SELECT spectrum._patrol()")
    assert value(db, "SELECT count(*) FROM spectrum.requeue") == 0
    prove(db)
