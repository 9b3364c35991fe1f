"""What is set back to pending is processed again: no number changes but where a rule did."""

from __future__ import annotations

import psycopg
import pytest
from pipeline import (
    BY_SEQ,
    FAILED,
    NOTHING,
    Counts,
    drain,
    event,
    facts,
    insert,
    many_events,
    only_body,
    process,
    prove,
    rows,
    value,
)

ALL_FACTS = """
    SELECT event_id, occurred_at, event_type, account_id, user_id, country, properties, revenue
    FROM analytics.events ORDER BY event_id
"""

SET_BACK = [
    "UPDATE raw_events SET status = 'pending'",
    "UPDATE raw_events SET status = 'pending', attempts = 0, processed_at = NULL,"
    " error_msg = NULL, next_attempt_at = NULL, copy_of = NULL",
]


@pytest.mark.parametrize("set_back", SET_BACK)
@pytest.mark.parametrize("limit", [37, 1_000])
def test_rows_set_back_change_no_number(db: psycopg.Connection, set_back: str, limit: int) -> None:
    insert(db, many_events(500))
    counts = process(db)
    before = rows(db, ALL_FACTS)
    for _ in range(2):
        db.execute(set_back)
        again = drain(db, limit)
        assert again == counts
        assert rows(db, ALL_FACTS) == before
        prove(db, views=limit == 37)
    assert value(db, "SELECT count(*) FROM spectrum.requeue") == 0


def test_a_single_row_set_back_below_the_marks(db: psycopg.Connection) -> None:
    insert(db, [event(event_id=f"e{n}") for n in range(50)])
    for _ in range(4):
        process(db)
    assert value(db, "SELECT safe_seq FROM spectrum.intake") == 51
    db.execute("UPDATE raw_events SET status = 'pending' WHERE seq IN (3, 17)")
    assert process(db) == Counts(2, 2, 0, 0)
    assert process(db) == NOTHING
    prove(db)


def test_a_new_rule_is_followed(db: psycopg.Connection) -> None:
    insert(
        db,
        [
            event(event_id="old", occurred_at="2003-01-01", properties={"revenue": 1, "price": 2}),
            event(event_id="new", occurred_at="2024-01-01", properties={"revenue": 3}),
            event(event_id="odd", occurred_at="2024-01-01", properties={"price": "much"}),
        ],
    )
    assert process(db) == Counts(3, 3, 0, 0)
    assert value(db, "SELECT sum(revenue) FROM warehouse.fact_events") == 4

    db.execute("SELECT spectrum.configure('revenue_property', 'price')")
    db.execute("SELECT spectrum.configure('earliest_event', '2001-01-01 00:00+00')")
    db.execute("CALL spectrum.reprocess(p_status => 'all')")
    assert process(db) == Counts(3, 2, 0, 1)
    assert rows(db, "SELECT revenue FROM warehouse.fact_events ORDER BY occurred_at") == [
        (2,),
        (None,),
    ]
    prove(db)

    db.execute("SELECT spectrum.configure('revenue_property', 'revenue')")
    db.execute("SELECT spectrum.configure('earliest_event', '2010-01-01 00:00+00')")
    db.execute("CALL spectrum.reprocess(p_status => 'all')")
    assert process(db) == Counts(3, 2, 0, 1)
    assert rows(db, FAILED) == [
        (
            1,
            "occurred_at: expected a time from 2010-01-01 00:00:00 UTC (config.earliest_event) on,"
            ' got "2003-01-01"',
        )
    ]
    prove(db)


def test_a_copy_steps_in_for_a_row_that_fails_now(db: psycopg.Connection) -> None:
    times = ["2003-01-01", "2004-01-01", "2024-01-01"]
    insert(db, [event(event_id="e", occurred_at=at, properties={"n": at}) for at in times])
    assert process(db) == Counts(3, 1, 2, 0)
    assert only_body(db) == "2003-01-01"

    db.execute("SELECT spectrum.configure('earliest_event', '2010-01-01 00:00+00')")
    db.execute("UPDATE raw_events SET status = 'pending' WHERE seq = 1")
    assert process(db) == Counts(1, 0, 0, 1)
    assert facts(db) == 0
    assert process(db) == Counts(2, 1, 0, 1)
    assert only_body(db) == "2024-01-01"
    prove(db)

    db.execute("SELECT spectrum.configure('earliest_event', '2000-01-01 00:00+00')")
    db.execute("CALL spectrum.reprocess()")
    assert process(db) == Counts(2, 1, 1, 0)
    assert only_body(db) == "2003-01-01"
    assert rows(db, BY_SEQ) == [(1, "done", None), (2, "done", 1), (3, "done", 1)]
    prove(db)


def test_copies_follow_when_another_row_counts(db: psycopg.Connection) -> None:
    """The row they repeat is read again together with one that was received before it."""
    times = ["2003-01-01", "2024-01-01", "2024-02-01"]
    db.execute("SELECT spectrum.configure('earliest_event', '2010-01-01 00:00+00')")
    insert(db, [event(event_id="e", occurred_at=at) for at in times])
    assert process(db) == Counts(3, 1, 1, 1)
    assert rows(db, BY_SEQ) == [(1, "failed", None), (2, "done", None), (3, "done", 2)]
    db.execute("SELECT spectrum.configure('earliest_event', '2000-01-01 00:00+00')")
    db.execute("UPDATE raw_events SET status = 'pending' WHERE seq IN (1, 2)")
    assert process(db) == Counts(2, 1, 1, 0)
    assert rows(db, BY_SEQ) == [(1, "done", None), (2, "done", 1), (3, "done", 1)]
    prove(db)


def test_reprocess_chooses(db: psycopg.Connection) -> None:
    db.execute(
        """
        INSERT INTO raw_events (payload, received_at) VALUES
        ('{"event_type": "a"}', '2024-01-01 00:00+00'),
        ('{"event_type": "b"}', '2024-01-02 00:00+00'),
        ('{"event_type": "b", "geo": 1}', '2024-01-02 00:00+00'),
        ('{"event_type": "a", "geo": 1}', '2024-01-03 00:00+00')
        """
    )
    assert process(db) == Counts(4, 2, 0, 2)
    for arguments, seqs in [
        ("", [3, 4]),
        ("p_status => 'done'", [1, 2]),
        ("p_status => 'all'", [1, 2, 3, 4]),
        ("p_status => 'all', p_event_type => 'b'", [2, 3]),
        ("'2024-01-02 00:00+00', p_status => 'all'", [2, 3, 4]),
        ("p_to => '2024-01-02 00:00+00', p_status => 'all'", [1]),
        ("p_status => 'done', p_event_type => 'c'", []),
    ]:
        assert value(db, f"CALL spectrum.reprocess({arguments})") == len(seqs), arguments
        pending = rows(db, "SELECT seq FROM raw_events WHERE status = 'pending' ORDER BY seq")
        assert pending == [(seq,) for seq in seqs]
        assert drain(db).claimed == len(seqs)
    assert facts(db) == 2
    prove(db)
