"""Several workers, each an operating-system process of its own, at once on the same events."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from typing import Any

import psycopg
import pytest
from conftest import Connect
from pipeline import (
    Counts,
    drain,
    event,
    insert,
    process,
    prove,
    rows,
    statuses,
    value,
    wait_until,
)

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


@contextmanager
def refresh_that_waits(
    db: psycopg.Connection, connect: Connect, lock: str, end: str = "ROLLBACK"
) -> Iterator[None]:
    """A refresh, held up by a lock while the block runs; and one more after it."""
    blocker, refresher = connect(autocommit=False), connect()
    blocker.execute(lock)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
    with ThreadPoolExecutor(1) as threads:
        refresh = threads.submit(refresher.execute, "CALL spectrum.refresh_analytics()")
        try:
            wait_until(lambda: value(db, waiting, refresher.info.backend_pid))
            yield
        finally:
            blocker.execute(end)
        refresh.result()
    db.execute("CALL spectrum.refresh_analytics()")


@pytest.mark.parametrize(
    "lock",
    [
        # Before the statement that takes the notes, and between its planning and its snapshot.
        "LOCK TABLE spectrum.withdrawals IN SHARE MODE",
        "LOCK TABLE warehouse.fact_events_2024_02 IN ACCESS EXCLUSIVE MODE",
    ],
)
def test_a_batch_that_commits_while_a_refresh_begins(
    db: psycopg.Connection, connect: Connect, lock: str
) -> None:
    """What it adds, in a month that was not there, is taken by this refresh or left for the next:
    never passed over."""
    insert(db, [event(event_id="before", user_id="u1", occurred_at="2024-02-10T12:00:00Z")])
    drain(db)
    with refresh_that_waits(db, connect, lock):
        insert(db, [event(event_id="amid", user_id="u2", occurred_at="2024-03-11T12:00:00Z")])
        drain(db)
    days = "SELECT day::text, events FROM analytics.daily_events WHERE account_id = '*' ORDER BY 1"
    assert rows(db, days) == [("2024-02-10", 1), ("2024-03-11", 1)]
    prove(db, views=True)


def test_a_month_attached_between_two_refreshes_of_a_transaction(
    db: psycopg.Connection, connect: Connect
) -> None:
    """Whose locks are all held already hears of nothing new by himself."""
    insert(db, [event(event_id="before", user_id="u1", occurred_at="2024-02-10T12:00:00Z")])
    drain(db)
    refresher = connect(autocommit=False)
    for month in range(3, 6):
        for _ in range(2):
            refresher.execute("CALL spectrum.refresh_analytics()")
        amid = event(
            event_id=f"in {month}", user_id="u2", occurred_at=f"2024-0{month}-11T12:00:00Z"
        )
        insert(db, [amid])
        drain(db)
        refresher.execute("CALL spectrum.refresh_analytics()")
    refresher.commit()
    assert value(db, "SELECT sum(events) FROM analytics.daily_events WHERE account_id = '*'") == 4
    prove(db, views=True)


def test_a_month_attached_between_two_batches_of_a_transaction(
    db: psycopg.Connection, connect: Connect
) -> None:
    worker = connect(autocommit=False)
    for month in range(2, 6):
        insert(db, [event(event_id=f"in {month}", occurred_at=f"2024-0{month}-11T12:00:00Z")])
        drain(db)
        insert(db, [event(event_id=f"too {month}", occurred_at=f"2024-0{month}-12T12:00:00Z")])
        assert process(worker).loaded == 1
    worker.commit()
    assert statuses(db) == {"done": 8}
    db.execute("CALL spectrum.refresh_analytics()")
    prove(db, views=True)


BUILDING = "LOCK TABLE analytics.mv_retention_cohorts IN SHARE MODE"


def test_a_report_defined_while_another_is_built(db: psycopg.Connection, connect: Connect) -> None:
    """It waits for the step of the refresh that is under way."""
    insert(db, [event(event_id="e", user_id="u1")])
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    db.execute("SELECT spectrum.define_retention('first')")
    definer = connect()
    with ThreadPoolExecutor(1) as threads:
        with refresh_that_waits(db, connect, BUILDING):
            defined = threads.submit(definer.execute, "SELECT spectrum.define_retention('amid')")
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
            wait_until(lambda: value(db, waiting, definer.info.backend_pid))
        defined.result()
    db.execute("CALL spectrum.refresh_analytics()")
    sizes = "SELECT DISTINCT retention, cohort_size FROM analytics.retention_cohorts ORDER BY 1"
    assert rows(db, sizes) == [("amid", 1), ("default", 1), ("first", 1)]
    prove(db, views=True)


def test_a_report_dropped_while_it_is_served(db: psycopg.Connection, connect: Connect) -> None:
    insert(db, [event(event_id="e", user_id="u1")])
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    db.execute("SELECT spectrum.define_retention('dropped')")
    db.execute("SELECT spectrum._refresh_some(1000)")  # built, and served by the next
    drop = "SELECT spectrum.drop_retention('dropped')"
    with refresh_that_waits(db, connect, drop, end="COMMIT"):
        pass
    assert rows(db, "SELECT DISTINCT retention FROM analytics.retention_cohorts") == [("default",)]
    assert value(db, "SELECT count(*) FROM spectrum.reports WHERE state <> 'served'") == 0
    prove(db, views=True)


def test_an_event_that_changes_hands_while_its_row_is_read_again(
    db: psycopg.Connection, connect: Connect
) -> None:
    """It counts by its second row, which is read again. Between that worker's look whose it is and
    his taking it back, another one gives it to the first row: there it has to stay."""
    first, second, blocker, holder = (connect(autocommit=False) for _ in range(4))
    insert(db, [event(event_id="e", user_id=user) for user in ("of row 1", "of row 2")])
    holder.execute("SELECT FROM raw_events WHERE seq = 1 FOR UPDATE")
    drain(db)
    holder.rollback()
    db.execute("UPDATE raw_events SET status = 'pending' WHERE seq = 2")
    holder.execute("SELECT FROM raw_events WHERE seq = 2 FOR UPDATE")
    assert process(first).loaded == 1
    holder.rollback()

    def waits(session: psycopg.Connection) -> bool:
        query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
        return value(db, query, session.info.backend_pid) > 0

    with ThreadPoolExecutor(2) as threads:
        # The lock comes after the first worker's and before the second one's.
        lock = threads.submit(blocker.execute, "LOCK TABLE spectrum.withdrawals IN SHARE MODE")
        wait_until(lambda: waits(blocker))
        again = threads.submit(process, second)
        wait_until(lambda: waits(second))
        first.commit()
        lock.result()
        blocker.rollback()
        again.result()
        second.commit()
    assert rows(db, "SELECT user_id FROM analytics.events") == [("of row 1",)]
    prove(db, views=True)
