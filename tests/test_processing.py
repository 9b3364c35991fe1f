"""process_batch: every event becomes one fact, one copy or one failed row with its reason, in
whatever order, company and state of the server it is met."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import Connect
from pipeline import (
    NOTHING,
    Counts,
    drain,
    event,
    facts,
    insert,
    process,
    prove,
    rows,
    statuses,
    value,
    wait_until,
)

ALL_FACTS = """
    SELECT event_id, occurred_at, event_type, account_id, user_id, country, properties, revenue
    FROM analytics.events ORDER BY event_id
"""
BY_SEQ = """
    SELECT raw.seq, raw.status, original.seq AS copy_of
    FROM raw_events AS raw LEFT JOIN raw_events AS original ON original.id = raw.copy_of
    ORDER BY raw.seq
"""
FAILED = "SELECT seq, error_msg FROM raw_events WHERE status = 'failed' ORDER BY seq"


def bodies(db: psycopg.Connection) -> dict[str, Any]:
    """The property n of every fact, by event_id as text."""
    return dict(rows(db, "SELECT event_id::text, properties -> 'n' FROM warehouse.fact_events"))


def only_body(db: psycopg.Connection) -> Any:
    (body,) = bodies(db).values()
    return body


# Counts ------------------------------------------------------------------------------------------


def many_events(number: int) -> list[Any]:
    """1% that cannot be read, 5% copies with another body, some of them in another month."""
    chance = random.Random(7)
    start = datetime(2023, 11, 1, tzinfo=UTC)
    poison: list[Any] = [
        17, ["no", "object"], {}, {"event_type": ""}, event(occurred_at="yesterday"),
        event(account_id="*"), event(properties=[1]), event(properties={"revenue": "a lot"}),
    ]  # fmt: skip
    made: list[Any] = []
    for n in range(number):
        dice = chance.random()
        if dice < 0.01:
            made.append(chance.choice(poison))
            continue
        # A copy may repeat any event before it; one in ten of those came as poison at first.
        which = chance.randrange(n) if dice < 0.06 and n else n
        made.append(
            event(
                chance.choice(["viewed", "clicked", "bought"]),
                event_id=f"event {which}",
                occurred_at=(start + timedelta(seconds=chance.randrange(90 * 86_400))).isoformat(),
                user_id=f"u{chance.randrange(number // 20)}",
                account_id=f"a{chance.randrange(50)}",
                properties={"n": n, "revenue": chance.randrange(10_000) / 100},
            )
        )
    return made


def test_a_large_batch_counts_exactly(db: psycopg.Connection) -> None:
    payloads = many_events(100_000)
    insert(db, payloads)
    counts = process(db, 100_000)

    first: dict[str, Any] = {}
    good = [
        payload
        for payload in payloads
        if isinstance(payload, dict) and isinstance(payload.get("event_id"), str)
    ]
    for payload in good:
        first.setdefault(payload["event_id"], payload)
    assert 900 < len(payloads) - len(good) < 1_100
    assert 4_500 < len(good) - len(first) < 5_500
    assert counts == Counts(100_000, len(first), len(good) - len(first), len(payloads) - len(good))
    assert statuses(db) == {"done": len(good), "failed": len(payloads) - len(good)}

    counted = rows(db, "SELECT (properties ->> 'n')::int FROM warehouse.fact_events ORDER BY 1")
    assert [n for (n,) in counted] == sorted(body["properties"]["n"] for body in first.values())
    cents = value(db, "SELECT sum(revenue) * 100 FROM warehouse.fact_events")
    assert cents == sum(round(body["properties"]["revenue"] * 100) for body in first.values())
    months = rows(
        db, "SELECT tableoid::regclass::text, count(*) FROM warehouse.fact_events GROUP BY 1"
    )
    expected_months: dict[str, int] = {}
    for body in first.values():
        name = f"warehouse.fact_events_{body['occurred_at'][:7].replace('-', '_')}"
        expected_months[name] = expected_months.get(name, 0) + 1
    assert dict(months) == expected_months
    assert process(db) == NOTHING
    prove(db)


def test_small_batches_come_to_the_same(db: psycopg.Connection) -> None:
    payloads = many_events(3_000)
    insert(db, payloads)
    in_one = process(db, 3_000)
    expected = bodies(db)
    db.execute("TRUNCATE raw_events, warehouse.event_ledger, warehouse.fact_events")
    insert(db, payloads)
    assert drain(db, 277) == in_one
    assert bodies(db) == expected
    prove(db)


def test_bad_payloads_and_copies_stay_on_the_fast_path(db: psycopg.Connection) -> None:
    """Set-based, in one attempt: what makes a batch slow is only what the warehouse refuses."""
    insert(db, many_events(2_000))
    with db.transaction():
        db.execute("SET LOCAL track_functions = 'pl'")
        process(db)
        calls = rows(
            db,
            "SELECT funcname, calls FROM pg_stat_xact_user_functions"
            " WHERE funcname IN ('_load_rows', '_load_in_parts', '_fail_row')",
        )
    assert calls == [("_load_rows", 1)]


# Copies ------------------------------------------------------------------------------------------

MONTHS = ["2024-02-10T12:00:00Z", "2024-02-10T12:00:00Z", "2024-05-01T00:00:00Z"]


@pytest.mark.parametrize("limit", [1, 2, 10])
def test_the_first_received_counts(db: psycopg.Connection, limit: int) -> None:
    """In one batch, over batches, over months."""
    insert(
        db,
        [
            event(event_id="e", occurred_at=at, user_id=f"u{n}", properties={"n": n})
            for n, at in enumerate(MONTHS)
        ],
    )
    assert drain(db, limit) == Counts(3, 1, 2, 0)
    assert only_body(db) == 0
    assert rows(db, BY_SEQ) == [(1, "done", None), (2, "done", 1), (3, "done", 1)]
    prove(db)


def test_a_failed_row_repeats_nothing(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="e", occurred_at="never"), event(event_id="e")])
    assert process(db) == Counts(2, 1, 0, 1)
    assert rows(db, BY_SEQ) == [(1, "failed", None), (2, "done", None)]
    prove(db)


@contextmanager
def held(connect: Connect, *seqs: int) -> Iterator[None]:
    """Another worker has these raw rows."""
    other = connect(autocommit=False)
    other.execute("SELECT FROM raw_events WHERE seq = ANY (%s) FOR UPDATE", (list(seqs),))
    yield
    other.rollback()


def test_the_first_received_counts_when_met_last(db: psycopg.Connection, connect: Connect) -> None:
    insert(
        db,
        [
            event(event_id="e", occurred_at=at, user_id=f"u{n}", properties={"n": n})
            for n, at in enumerate(reversed(MONTHS))
        ],
    )
    with held(connect, 1, 2):
        assert process(db) == Counts(1, 1, 0, 0)
        assert only_body(db) == 2
    with held(connect, 1):
        assert process(db) == Counts(1, 1, 0, 0)
        assert only_body(db) == 1
    assert process(db) == Counts(1, 1, 0, 0)
    assert only_body(db) == 0
    assert rows(db, BY_SEQ) == [(1, "done", None), (2, "done", 1), (3, "done", 1)]
    prove(db)


def test_a_copy_of_a_purged_row_is_a_copy(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="e", properties={"n": 0})])
    process(db)
    db.execute("DELETE FROM raw_events")
    insert(db, [event(event_id="e", properties={"n": 1})])
    assert process(db) == Counts(1, 0, 1, 0)
    assert value(db, "SELECT copy_of = event_id FROM raw_events, warehouse.event_ledger")
    assert only_body(db) == 0
    prove(db)


# Again -------------------------------------------------------------------------------------------

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


# Causes that pass --------------------------------------------------------------------------------


@pytest.fixture
def months_locked(db: psycopg.Connection, connect: Connect) -> psycopg.Connection:
    """No month can be attached until this connection rolls back."""
    db.execute("SELECT spectrum.configure('lock_timeout', '20 ms')")
    db.execute("SELECT spectrum.configure('retry_delay', '1 hour')")
    other = connect(autocommit=False)
    other.execute("LOCK TABLE warehouse.fact_events IN SHARE UPDATE EXCLUSIVE MODE")
    return other


def make_due(db: psycopg.Connection) -> None:
    db.execute("UPDATE spectrum.requeue SET due_at = now()")
    db.execute("UPDATE raw_events SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")


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


# Locks -------------------------------------------------------------------------------------------


def test_months_are_made_past_open_readers(db: psycopg.Connection, connect: Connect) -> None:
    db.execute("SELECT spectrum.configure('lock_timeout', '100 ms')")
    insert(db, [event(event_id="e")])
    process(db)
    reader = connect(autocommit=False)
    assert facts(reader) == 1

    insert(db, [event(event_id="f", occurred_at="2024-07-01T00:00:00Z")])
    with db.transaction():
        assert process(db) == Counts(1, 1, 0, 0)
        # ... and nobody who comes to read now has to wait.
        late = connect()
        late.execute("SET statement_timeout = '2s'")
        assert facts(late) == 1
        assert value(late, "SELECT count(*) FROM analytics.events") == 1
    assert facts(reader) == 2
    prove(db)


def test_months_are_utc_in_any_session(db: psycopg.Connection) -> None:
    """Written in this session's style, the bounds would be misread: its IST is Israel's time."""
    db.execute("SET timezone = 'Asia/Kolkata'")
    db.execute("SET datestyle = 'SQL, DMY'")
    assert value(db, "SELECT spectrum.ensure_partitions('2024-03-05', '2024-03-31 23:00+00')") == 1
    db.execute("SET timezone = 'UTC'")
    db.execute("SET datestyle = 'ISO'")
    bounds = value(
        db,
        "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'fact_events_2024_03'",
    )
    assert bounds == "FOR VALUES FROM ('2024-03-01 00:00:00+00') TO ('2024-04-01 00:00:00+00')"


def test_workers_do_not_wait_for_each_others_months(
    db: psycopg.Connection, connect: Connect
) -> None:
    """A month that is there needs no lock; only its maker is waited for, and not for long."""
    db.execute("SELECT spectrum.configure('lock_timeout', '100 ms')")
    insert(db, [event(event_id="e")])
    process(db)
    insert(db, [event(event_id="f", occurred_at="2024-07-01"), event(event_id="g")])
    other = connect()
    with db.transaction():
        assert process(db, 1) == Counts(1, 1, 0, 0)
        assert process(other) == Counts(1, 1, 0, 0)
    prove(db)


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


# Dimensions --------------------------------------------------------------------------------------


def test_members_are_kept(db: psycopg.Connection) -> None:
    insert(db, [event(user_id="u", account_id="a", geo={"country": "DE"})])
    process(db)
    for table, key in [
        ("dim_users", "user_key"),
        ("dim_accounts", "account_key"),
        ("dim_geography", "geo_key"),
        ("dim_event_types", "event_type_key"),
    ]:
        for statement in (
            f"DELETE FROM warehouse.{table}",
            f"UPDATE warehouse.{table} SET {key} = {key} + 1000",
            f"TRUNCATE warehouse.{table}",
        ):
            with pytest.raises(psycopg.errors.RestrictViolation):
                db.execute(statement)
    prove(db)
