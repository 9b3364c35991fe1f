"""Several workers, each an operating-system process of its own, at once on the same events."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from typing import Any

import psycopg
import pytest
from pipeline import Counts, drain, event, insert, process, prove, rows, statuses, value

WORKERS = 4
START = datetime(2024, 1, 20, tzinfo=UTC)
UNREADABLE = event(geo="nowhere")


def events(number: int, seed: int) -> list[Any]:
    """A third are copies, all over; newcomers of all dimensions turn up for all workers at once."""
    chance = random.Random(seed)
    made: list[Any] = []
    for n in range(number):
        if chance.random() < 0.01:
            made.append(UNREADABLE)
            continue
        made.append(
            event(
                f"type {(n // 500 + chance.randrange(5)) % 100}",
                event_id=f"{seed} {chance.randrange(number)}",
                occurred_at=(START + timedelta(minutes=chance.randrange(60 * 24 * 60))).isoformat(),
                user_id=f"u{n // 10 + chance.randrange(200)}",
                account_id=f"a{(n // 100 + chance.randrange(20)) % 300}",
                geo={"country": f"c{chance.randrange(30)}", "city": f"x{chance.randrange(100)}"},
                properties={"n": n},
            )
        )
    return made


def work(dsn: str, limit: int, until: float) -> Counts:
    """Batches until nothing waits; a deadlock or any other error would end the worker here."""
    total = Counts(0, 0, 0, 0)
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("SET deadlock_timeout = '200ms'")
        while time.time() < until:
            batch = process(db, limit)
            total += batch
            if not batch.claimed:
                if not value(db, "SELECT count(*) FROM raw_events WHERE status = 'pending'"):
                    break
                time.sleep(0.01)
    return total


def insert_slowly(dsn: str, payloads: Sequence[Any]) -> None:
    """In many small transactions, some of which commit late."""
    with psycopg.connect(dsn) as db, psycopg.connect(dsn) as late:
        for at in range(0, len(payloads), 50):
            insert(db, payloads[at : at + 25])
            insert(late, payloads[at + 25 : at + 50])
            db.commit()
            if at % 500 == 0:
                late.commit()


def set_back(dsn: str, seed: int, until: float) -> None:
    """Rows set back to pending at random, while the rule that some of them meet comes and goes."""
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as db:
        while time.time() < until:
            earliest = chance.choice(["2000-01-01 00:00+00", "2024-02-01 00:00+00"])
            db.execute("SELECT spectrum.configure('earliest_event', %s)", (earliest,))
            db.execute(
                "UPDATE raw_events SET status = 'pending' WHERE status IN ('done', 'failed')"
                " AND seq %% 7 = %s AND seq IN (SELECT seq FROM raw_events"
                " WHERE status IN ('done', 'failed') FOR UPDATE SKIP LOCKED)",
                (chance.randrange(7),),
            )


@contextmanager
def at_once(count: int) -> Iterator[Callable[..., Future[Any]]]:
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield pool.submit


def retry_at_once(db: psycopg.Connection) -> None:
    """Events of a month that another worker is making may fail for the moment."""
    db.execute("SELECT spectrum.configure('retry_delay', '0')")
    db.execute("SELECT spectrum.configure('max_attempts', '100')")


def check(db: psycopg.Connection, payloads: Sequence[Any]) -> None:
    """Every event is one fact, made from the row received first, or one failed row."""
    received = rows(db, "SELECT payload FROM raw_events ORDER BY seq")
    assert len(received) == len(payloads)
    first: dict[str, int] = {}
    for (payload,) in received:
        if payload != UNREADABLE:
            first.setdefault(payload["event_id"], payload["properties"]["n"])
    unreadable = payloads.count(UNREADABLE)
    by_status = Counter(done=len(payloads) - unreadable, failed=unreadable)
    assert Counter(statuses(db)) == by_status
    counted = rows(db, "SELECT (properties ->> 'n')::int FROM warehouse.fact_events ORDER BY 1")
    assert [n for (n,) in counted] == sorted(first.values())
    copies = value(db, "SELECT count(*) FROM raw_events WHERE copy_of IS NOT NULL")
    assert copies == len(payloads) - unreadable - len(first)
    assert value(db, "SELECT count(*) FROM spectrum.requeue") == 0
    for table, key in [
        ("users", "user_id"), ("accounts", "account_id"), ("event_types", "event_type")
    ]:  # fmt: skip
        known = value(db, f"SELECT count(*) FROM warehouse.dim_{table} WHERE {key} <> ''")
        assert known == len({p[key] for p in payloads if p != UNREADABLE and key in p})
    prove(db)


def test_four_workers_while_events_come_in(db: psycopg.Connection, dsn: str) -> None:
    retry_at_once(db)
    waiting, coming = events(32_000, seed=1), events(8_000, seed=2)
    insert(db, waiting)
    until = time.time() + 120
    with at_once(WORKERS + 1) as start:
        source = start(insert_slowly, dsn, coming)
        workers = [start(work, dsn, 2_000, until) for _ in range(WORKERS)]
        source.result()
        counts = [worker.result() for worker in workers]
    assert sum(batch.claimed > 0 for batch in counts) > 1, "they did not work at once"
    drain(db)
    check(db, waiting + coming)


@pytest.mark.parametrize("limit", [40, 700])
def test_four_workers_that_meet_refused_events(
    db: psycopg.Connection, dsn: str, limit: int
) -> None:
    """What the warehouse refuses sends batches through the parts, where order is lost."""
    retry_at_once(db)
    payloads = [p for p in events(3_000, seed=3) if p != UNREADABLE]
    insert(db, payloads)
    db.execute(
        "ALTER TABLE warehouse.fact_events ADD CONSTRAINT refuse"
        " CHECK ((properties ->> 'n')::int % 500 <> 17)"
    )
    db.execute("SELECT spectrum.configure('max_attempts', '2')")
    with at_once(WORKERS) as start:
        workers = [start(work, dsn, limit, time.time() + 60) for _ in range(WORKERS)]
        for worker in workers:
            worker.result()
    drain(db)
    refused = {p["properties"]["n"] for p in payloads if p["properties"]["n"] % 500 == 17}
    failed = rows(
        db, "SELECT (payload #>> '{properties,n}')::int FROM raw_events WHERE status = 'failed'"
    )
    # A refused row fails; one that only repeats a row received before it is a copy all the same.
    assert {n for (n,) in failed} <= refused
    prove(db)
    db.execute("ALTER TABLE warehouse.fact_events DROP CONSTRAINT refuse")
    db.execute("CALL spectrum.reprocess()")
    drain(db)
    check(db, payloads)


def test_four_workers_while_rows_are_set_back(db: psycopg.Connection, dsn: str) -> None:
    """Facts are taken back, made again, and taken over by copies and from them, all at once."""
    retry_at_once(db)
    payloads = events(4_000, seed=4)
    insert(db, payloads)
    until = time.time() + 6
    with at_once(WORKERS + 1) as start:
        trouble = start(set_back, dsn, 5, until - 1)
        workers = [start(work_on, dsn, 300, until) for _ in range(WORKERS)]
        trouble.result()
        for worker in workers:
            worker.result()
    db.execute("SELECT spectrum.configure('earliest_event', '2000-01-01 00:00+00')")
    # Only what failed is read again: whatever else went wrong meanwhile would stay wrong.
    db.execute("CALL spectrum.reprocess()")
    drain(db, 1_000)
    check(db, payloads)


def work_on(dsn: str, limit: int, until: float) -> None:
    while time.time() < until:
        work(dsn, limit, until)
