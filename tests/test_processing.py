"""process_batch: every event becomes one fact, one copy or one failed row with its reason, in
whatever order, company and state of the server it is met."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from conftest import Connect
from pipeline import (
    BY_SEQ,
    NOTHING,
    Counts,
    bodies,
    drain,
    event,
    facts,
    insert,
    many_events,
    only_body,
    process,
    prove,
    rows,
    statuses,
    value,
)

# Counts ------------------------------------------------------------------------------------------


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
        late.execute("SET statement_timeout = '20s'")
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
