"""What fails: causes that pass are tried again, and what only the warehouse refuses fails alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from conftest import Connect
from pipeline import (
    BY_SEQ,
    FAILED,
    NOTHING,
    Counts,
    event,
    facts,
    insert,
    make_due,
    only_body,
    process,
    prove,
    rows,
    statuses,
    value,
)

# Causes that pass --------------------------------------------------------------------------------


@pytest.fixture
def months_locked(db: psycopg.Connection, connect: Connect) -> psycopg.Connection:
    """No month can be attached until this connection rolls back."""
    db.execute("SELECT spectrum.configure('lock_timeout', '20 ms')")
    db.execute("SELECT spectrum.configure('retry_delay', '1 hour')")
    other = connect(autocommit=False)
    other.execute("LOCK TABLE warehouse.fact_events IN SHARE UPDATE EXCLUSIVE MODE")
    return other


RETRY = """
    SELECT attempts, next_attempt_at - processed_at, requeue.due_at = next_attempt_at
    FROM raw_events LEFT JOIN spectrum.requeue USING (seq) WHERE status = 'failed'
"""


def test_a_month_that_is_locked_out_is_tried_again(
    db: psycopg.Connection, months_locked: psycopg.Connection
) -> None:
    db.execute("SELECT spectrum.configure('max_attempts', '4')")
    now = datetime.now(UTC).isoformat()
    insert(db, [event(event_id="this month", occurred_at=now), event(event_id="e")])
    assert process(db) == Counts(2, 1, 0, 1)
    assert value(db, "SELECT error_msg FROM raw_events WHERE status = 'failed'") == (
        "occurred_at: the partition of 2024-02 could not be made within config.lock_timeout,"
        " another session holds a lock"
    )
    for attempt in (1, 2, 3):
        assert process(db) == NOTHING
        delay = timedelta(hours=2 ** (attempt - 1))
        assert rows(db, RETRY) == [(attempt, delay, True)]
        make_due(db)
        assert process(db) == Counts(1, 0, 0, 1)
    # The limit.
    assert rows(db, RETRY) == [(4, None, None)]
    assert value(db, "SELECT count(*) FROM spectrum.requeue") == 0
    months_locked.rollback()
    assert process(db) == NOTHING
    db.execute("CALL spectrum.reprocess()")
    assert process(db) == Counts(1, 1, 0, 0)
    prove(db)


def test_a_retry_that_succeeds(db: psycopg.Connection, months_locked: psycopg.Connection) -> None:
    """Meanwhile a copy for another month stood in."""
    now = datetime.now(UTC).isoformat()
    insert(
        db,
        [
            event(event_id="e", properties={"n": 1}),
            event(event_id="e", occurred_at=now, properties={"n": 2}),
        ],
    )
    assert process(db) == Counts(2, 1, 0, 1)
    assert only_body(db) == 2
    months_locked.rollback()
    make_due(db)
    assert process(db) == Counts(1, 1, 0, 0)
    assert only_body(db) == 1
    assert rows(db, BY_SEQ) == [(1, "done", None), (2, "done", 1)]
    prove(db)


def test_a_cause_that_cannot_pass_is_not_tried_again(db: psycopg.Connection) -> None:
    insert(db, [event(geo="Berlin")])
    assert process(db) == Counts(1, 0, 0, 1)
    assert rows(db, RETRY) == [(1, None, None)]
    assert rows(db, "SELECT error_msg FROM raw_events") == [
        ('geo: expected an object, got "Berlin"',)
    ]
    prove(db)


# What only the warehouse refuses -----------------------------------------------------------------

REFUSALS = {
    "check": (
        "ALTER TABLE warehouse.fact_events ADD CONSTRAINT not_too_much CHECK (revenue < 1000)",
        "ALTER TABLE warehouse.fact_events DROP CONSTRAINT not_too_much",
        "not_too_much",
    ),
    "trigger that raises": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION E'too much:\n%', new.revenue; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON warehouse.fact_events
        FOR EACH ROW WHEN (new.revenue >= 1000) EXECUTE FUNCTION refuse()
        """,
        "DROP TRIGGER refuse ON warehouse.fact_events",
        "too much: 5000 (SQLSTATE P0001)",
    ),
    "trigger in silence": (
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER refuse BEFORE INSERT ON warehouse.fact_events
        FOR EACH ROW WHEN (new.revenue >= 1000) EXECUTE FUNCTION refuse()
        """,
        "DROP TRIGGER refuse ON warehouse.fact_events",
        "trigger on warehouse.fact_events",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_an_event_that_the_warehouse_refuses_fails_alone(
    db: psycopg.Connection, refusal: str
) -> None:
    make, unmake, reason = REFUSALS[refusal]
    db.execute(make)
    insert(
        db,
        [
            event(event_id=f"e{n % 190}", properties={"revenue": 5_000 if n in (7, 130) else n})
            for n in range(200)
        ],
    )
    # 197 repeats 7: where the first is refused, the copy counts.
    assert process(db) == Counts(200, 189, 9, 2)
    failed = rows(db, FAILED)
    assert [seq for seq, _ in failed] == [8, 131]
    assert all(reason in message for _, message in failed)
    prove(db)

    db.execute(unmake)
    make_due(db)
    assert process(db) == Counts(2, 2, 0, 0)
    assert facts(db) == 190
    prove(db)


def test_a_row_whose_reading_raises_fails_alone(db: psycopg.Connection) -> None:
    """received_at is the server's own, but it may be set by hand: this one overflows."""
    insert(db, [event(event_id=f"e{n}") for n in range(20)])
    process(db)
    insert(db, [event(event_id=f"f{n}") for n in range(20)])
    db.execute(
        "UPDATE raw_events SET status = 'pending', received_at = '294276-12-31 23:30+00'"
        " WHERE seq IN (5, 25)"
    )
    assert process(db) == Counts(21, 19, 0, 2)
    assert rows(db, FAILED) == [
        (5, "timestamp out of range (SQLSTATE 22008)"),
        (25, "timestamp out of range (SQLSTATE 22008)"),
    ]
    assert facts(db) == 38
    prove(db)


def test_a_parted_batch_loses_no_row_that_it_touched(db: psycopg.Connection) -> None:
    """The first part promotes, or takes over from, a raw row that waits in another."""
    db.execute(REFUSALS["check"][0])
    copies = [
        event(event_id="e", occurred_at="2003-01-01"),
        event(event_id="x"),
        event(event_id="e", occurred_at="2024-01-01"),
        event(event_id="y"),
    ]
    insert(db, copies)
    process(db)
    db.execute("SELECT spectrum.configure('earliest_event', '2010-01-01 00:00+00')")
    insert(db, [event(event_id="z", properties={"revenue": 1_000})])
    db.execute("UPDATE raw_events SET status = 'pending'")
    assert process(db) == Counts(5, 3, 0, 2)
    assert statuses(db) == {"done": 3, "failed": 2}

    db.execute("SELECT spectrum.configure('earliest_event', '2000-01-01 00:00+00')")
    db.execute("UPDATE raw_events SET status = 'pending'")
    assert process(db) == Counts(5, 3, 1, 1)
    assert statuses(db) == {"done": 4, "failed": 1}
    prove(db)
