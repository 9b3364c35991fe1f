"""Sessions beside each other, in any order: no lock that keeps readers out, no deadlock that
reaches a user, and each committed event once.

`make test-poison` runs the machine at length (SPECTRUM_RACES runs)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from conftest import Connect, MakeDb
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pipeline import (
    drain,
    event,
    insert,
    process,
    prove,
    rows,
    statuses,
    value,
    wait_until,
    waits,
)
from psycopg.pq import TransactionStatus

RUNS = int(os.environ.get("SPECTRUM_RACES", "4"))

# Locks -------------------------------------------------------------------------------------------

WORK = {
    "a batch that makes months and members": "CALL spectrum.process_batch(10)",
    "months": "SELECT spectrum.ensure_partitions('2031-01-01', '2031-03-01')",
    "a refresh": "CALL spectrum.refresh_analytics()",
    "a definition": "SELECT spectrum.define_funnel('f', '[\"seen\"]', p_breakdown => 'plan')",
    "a refresh that builds": "CALL spectrum.refresh_analytics()",
    "the calendar": "SELECT spectrum.configure('timezone', 'Asia/Tokyo')",
    "a rebuilt history": "CALL spectrum.refresh_analytics()",
    "rows set back": "UPDATE raw_events SET status = 'pending'",
    "a second reading": "CALL spectrum.process_batch(1000)",
    "what it took back": "CALL spectrum.refresh_analytics()",
    "a drop": "SELECT spectrum.drop_funnel('f')",
    "what is cleared": "CALL spectrum.refresh_analytics()",
    "upkeep": "SELECT spectrum._upkeep()",
    "setup again": "SELECT spectrum.setup()",
    "the proof": "SELECT count(*) FROM spectrum.verify()",
}


def test_no_work_locks_readers_out(db: psycopg.Connection, connect: Connect) -> None:
    """Readers are kept out by ACCESS EXCLUSIVE alone: nothing that they could read is locked so,
    not for a moment, so no time limit is needed. Locks stay until commit: all are seen."""
    worker = connect(autocommit=False)
    insert(db, [event(user_id=f"u{n}", occurred_at=f"2024-0{n % 9 + 1}-05") for n in range(20)])
    readable = {
        oid for (oid,) in rows(db, "SELECT oid FROM pg_class WHERE relkind IN ('r', 'p', 'i', 'v')")
    }
    for name, statement in WORK.items():
        worker.execute(statement)
        locked = rows(
            db,
            "SELECT relation::oid, relation::regclass::text FROM pg_locks WHERE pid = %s"
            " AND locktype = 'relation' AND mode = 'AccessExclusiveLock'",
            worker.info.backend_pid,
        )
        assert [(name, table) for oid, table in locked if oid in readable] == []
        worker.commit()


def test_behind_a_writer_who_waits_for_a_reader(db: psycopg.Connection, connect: Connect) -> None:
    """An ALTER TABLE queues behind a reader, all others behind it, a batch too. What the batch
    holds meanwhile keeps nobody from reading, and all goes on with the reader's end."""
    db.execute("SELECT spectrum.configure('lock_timeout', '300 ms')")
    insert(db, [event(event_id="new", occurred_at="2024-07-01T00:00:00Z")])
    reader, writer, worker = connect(autocommit=False), connect(), connect()
    reader.execute("SELECT count(*) FROM warehouse.fact_events")
    with ThreadPoolExecutor(2) as pool:
        alter = pool.submit(
            writer.execute,
            "ALTER TABLE warehouse.fact_events ALTER COLUMN currency SET STORAGE MAIN",
        )
        wait_until(lambda: waits(db, writer))
        batch = pool.submit(process, worker)
        wait_until(lambda: waits(db, worker))
        db.execute("SET statement_timeout = '20s'")
        for table in ("analytics.active_users", "raw_events", "warehouse.event_ledger"):
            db.execute(f"SELECT count(*) FROM {table}")
        reader.commit()
        alter.result(timeout=20)
        assert batch.result(timeout=20).claimed == 1
    db.execute("CALL spectrum.reprocess()")
    process(db)
    assert rows(db, "SELECT status FROM raw_events") == [("done",)]
    prove(db)


def test_months_of_another_batch_are_waited_for(db: psycopg.Connection, connect: Connect) -> None:
    """Its batch may take longer than config.lock_timeout: events must not fail for that."""
    db.execute("SELECT spectrum.configure('lock_timeout', '200 ms')")
    insert(db, [event(event_id=f"e{n}", occurred_at="2024-07-01") for n in range(2)])
    first, second = connect(autocommit=False), connect()
    assert process(first, 1).loaded == 1
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(process, second, 1)
        wait_until(lambda: waits(db, second))
        time.sleep(0.6)
        first.commit()
        assert batch.result(timeout=10).loaded == 1
    prove(db)


def test_two_who_schedule_at_once(
    cron_dsn: str, cron_db: psycopg.Connection, connect: Connect
) -> None:
    one, other = connect(cron_dsn, autocommit=False), connect(cron_dsn, autocommit=False)
    first = value(one, "SELECT spectrum.schedule('1 * * * *')")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(value, other, "SELECT spectrum.schedule('2 * * * *')")
        wait_until(lambda: second.done() or waits(cron_db, other))
        one.commit()
        assert second.result(timeout=10) == first
        other.commit()
    assert rows(cron_db, "SELECT schedule FROM cron.job WHERE command LIKE '%spectrum.run%'") == [
        ("2 * * * *",)
    ]
    cron_db.execute("SELECT spectrum.unschedule()")


def test_a_batch_that_must_be_alone_is_waited_for(db: psycopg.Connection, connect: Connect) -> None:
    """Longer than config.lock_timeout, because that is what it takes; but not for ever."""
    db.execute("SELECT spectrum.configure('lock_timeout', '100 ms')")
    insert(db, [event(), event()])
    alone, worker = connect(autocommit=False), connect()
    alone.execute("SELECT pg_advisory_xact_lock(spectrum._lock_key('batch'))")
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(process, worker, 1)
        wait_until(lambda: waits(db, worker))
        time.sleep(0.4)
        assert not batch.done()
        assert batch.result(timeout=10).loaded == 1
        batch = pool.submit(process, worker)
        wait_until(lambda: waits(db, worker))
        alone.rollback()
        assert batch.result(timeout=10).loaded == 1
    prove(db)


def test_batches_of_rows_set_back_lock_events_in_one_order(
    db: psycopg.Connection, connect: Connect
) -> None:
    """Each reads one event again and a copy of the other's. A third holds up both at the first."""
    ids = [f"00000000-0000-0000-0000-00000000000{n}" for n in range(2)]
    insert(db, [event(event_id=ids[n], properties={"n": n}) for n in (0, 1, 1, 0)])
    drain(db)
    blocker, *workers = connect(autocommit=False), connect(), connect()
    blocker.execute("SELECT FROM warehouse.event_ledger WHERE event_id = %s FOR UPDATE", (ids[0],))
    with ThreadPoolExecutor(2) as pool:
        batches = []
        for worker, seqs in zip(workers, ([1, 3], [2, 4]), strict=True):
            worker.execute("SET deadlock_timeout = '1min'; SET statement_timeout = '20s'")
            db.execute("UPDATE raw_events SET status = 'pending' WHERE seq = ANY (%s)", (seqs,))
            batches.append(pool.submit(process, worker, 2))
            wait_until(lambda link=worker: waits(db, link))
        blocker.rollback()
        assert [batch.result().claimed for batch in batches] == [2, 2]
    drain(db)
    assert statuses(db) == {"done": 4}
    prove(db, views=True)


@pytest.mark.parametrize(
    "define",
    ["define_funnel('f', '[\"{}\"]')", "define_retention('f', '{}')",
     "define_feature('f', '{}')", "define_metric('f', 'proportion', '{}')",
     "define_attribution('f', '\"{}\"')", "define_paths('f', '{}')"],
)  # fmt: skip
def test_two_who_define_the_same_at_once(
    db: psycopg.Connection, connect: Connect, define: str
) -> None:
    """The second waits for the first, and replaces what that defined."""
    one, other = connect(autocommit=False), connect()
    one.execute("SELECT spectrum." + define.format("one"))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(other.execute, "SELECT spectrum." + define.format("other"))
        wait_until(lambda: second.done() or waits(db, other))
        one.commit()
        second.result(timeout=10)
    kind = define[len("define_") : define.index("(")]
    defined = value(db, f"SELECT to_jsonb(known)::text FROM spectrum.{kind.rstrip('s')}s AS known"
        f" WHERE {kind} = 'f'")  # fmt: skip
    assert '"other"' in defined
    assert '"one"' not in defined


# Any interleaving --------------------------------------------------------------------------------

SESSIONS = 3
sessions = st.integers(0, SESSIONS - 1)
RETRIED = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)


class Machine(RuleBasedStateMachine):
    """Three sessions, each in a thread. A step that waits for another session's lock is left to
    wait, and its session takes no further step until it is through.

    The model is a list per session of what it inserted and did not commit yet, and the list of
    what is committed: event_id, number of the copy, readable or not. In the end each event_id is
    one fact, of the copy received first, and each row that cannot be read has failed."""

    dsn: str

    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPoolExecutor(SESSIONS)
        self.links = [psycopg.connect(self.dsn, autocommit=True) for _ in range(SESSIONS)]
        for link in self.links:
            link.execute("SET statement_timeout = '20s'; SET deadlock_timeout = '100ms'")
        self.running: list[Future[Any] | None] = [None] * SESSIONS
        self.open: list[list[dict[str, Any]]] = [[] for _ in range(SESSIONS)]
        self.committed: list[dict[str, Any]] = []
        self.made = 0
        self.has_transactions = False

    @initialize()
    def begin_anew(self) -> None:
        self.links[0].execute(
            "TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.requeue,"
            " spectrum.news, spectrum.withdrawals RESTART IDENTITY;"
            "UPDATE spectrum.intake SET head_seq = 0, safe_seq = 0, seen_writers = NULL;"
            "SELECT spectrum.configure('timezone', 'UTC');"
            "SELECT spectrum.rebuild_reports()"
        )

    def start(self, number: int, work: Callable[[psycopg.Connection], None]) -> bool:
        """Begins the step unless the session still waits; a moment later whoever waits, waits."""
        self.settle(number, 0.0)
        if self.running[number] is not None:
            return False
        self.running[number] = self.pool.submit(work, self.links[number])
        self.settle(number, 0.15)
        return True

    def settle(self, number: int, timeout: float | None) -> None:
        future = self.running[number]
        if future is None:
            return
        try:
            future.result(timeout)
        except TimeoutError:
            return
        except psycopg.errors.DeadlockDetected:
            # Only who does several things in one transaction may meet one, or cause it.
            assert self.has_transactions
            self.end(number, "ROLLBACK")
        except RETRIED:
            self.end(number, "ROLLBACK")
        self.running[number] = None

    def end(self, number: int, how: str) -> None:
        if self.links[number].info.transaction_status != TransactionStatus.IDLE:
            self.links[number].execute(how)
        if how == "COMMIT":
            self.committed += self.open[number]
        self.open[number] = []

    @precondition(lambda self: self.has_transactions or self.made > 20)
    @rule(number=sessions)
    def begin(self, number: int) -> None:
        if self.links[number].info.transaction_status == TransactionStatus.IDLE:
            self.has_transactions = True
            self.start(number, lambda link: link.execute("BEGIN") and None)

    @rule(number=sessions, how=st.sampled_from(["COMMIT", "COMMIT", "ROLLBACK"]))
    def finish(self, number: int, how: str) -> None:
        self.settle(number, 0.0)
        if self.running[number] is None:
            if self.links[number].info.transaction_status == TransactionStatus.INERROR:
                how = "ROLLBACK"
            self.end(number, how)

    @rule(number=sessions, names=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6))
    def insert(self, number: int, names: list[str]) -> None:
        payloads = []
        for name in names:
            self.made += 1
            payloads.append(
                event(f"t{self.made % 3}", event_id=name, user_id=f"u {name} {self.made % 2}",
                      account_id=f"a{self.made % 2}",
                      occurred_at=f"20{10 + self.made % 13}-0{self.made % 9 + 1}-01",
                      geo=1 if self.made % 7 == 0 else None, properties={"n": self.made})
            )  # fmt: skip
        if self.start(number, lambda link: insert(link, payloads)):
            # An insert waits for nobody.
            self.settle(number, None)
            self.open[number] += payloads
            if self.links[number].info.transaction_status == TransactionStatus.IDLE:
                self.end(number, "COMMIT")

    @rule(number=sessions, limit=st.sampled_from([1, 3, 100]))
    def process(self, number: int, limit: int) -> None:
        self.start(number, lambda link: process(link, limit) and None)

    @rule(
        number=sessions,
        statement=st.sampled_from(
            ["CALL spectrum.refresh_analytics()", "SELECT spectrum._refresh_some(3)",
             "CALL spectrum.reprocess(p_status => 'all')", "CALL spectrum.reprocess()",
             "SELECT spectrum.ensure_partitions('2010-01-01', '2010-06-01')",
             "SELECT spectrum.configure('timezone', 'Asia/Tokyo')",
             "SELECT spectrum.configure('timezone', 'UTC')",
             "SELECT spectrum.define_funnel('f', '[\"t0\", \"t1\"]')",
             "SELECT spectrum.define_funnel('f', '[\"t2\"]')",
             "UPDATE raw_events SET status = 'pending' WHERE seq IN (SELECT seq FROM raw_events"
             " WHERE status IN ('done', 'failed') AND seq % 2 = 0 FOR UPDATE SKIP LOCKED)"]
        ),
    )  # fmt: skip
    def do(self, number: int, statement: str) -> None:
        self.start(number, lambda link: link.execute(statement) and None)

    def teardown(self) -> None:
        try:
            for _ in range(200):
                for number in range(SESSIONS):
                    self.settle(number, 0.1)
                    if self.running[number] is None:
                        broken = self.links[number].info.transaction_status
                        self.end(
                            number,
                            "ROLLBACK" if broken == TransactionStatus.INERROR else "COMMIT",
                        )
                if not any(self.running):
                    break
            assert not any(self.running), "a session waits for ever"
            self.check(self.links[0])
        finally:
            for link in self.links:
                link.close()
            self.pool.shutdown()

    def check(self, db: psycopg.Connection) -> None:
        db.execute("UPDATE spectrum.requeue SET due_at = now()")
        db.execute("CALL spectrum.reprocess()")
        drain(db)
        received = rows(db, "SELECT payload::text FROM raw_events ORDER BY seq")
        stored = sorted(json.loads(text)["properties"]["n"] for (text,) in received)
        assert stored == sorted(sent["properties"]["n"] for sent in self.committed)
        first: dict[str, int] = {}
        unreadable = 0
        for (text,) in received:
            payload = json.loads(text)
            if payload["geo"] is None:
                first.setdefault(payload["event_id"], payload["properties"]["n"])
            else:
                unreadable += 1
        counted = rows(db, "SELECT (properties ->> 'n')::int FROM warehouse.fact_events ORDER BY 1")
        assert [n for (n,) in counted] == sorted(first.values())
        assert value(db, "SELECT count(*) FROM raw_events WHERE status = 'failed'") == unreadable
        prove(db, views=True)


def test_any_interleaving(make_db: MakeDb) -> None:
    dsn = make_db("races")
    with psycopg.connect(dsn, autocommit=True) as db:
        for setting, wanted in [("lock_timeout", "300 ms"), ("retry_delay", "0"),
                                ("max_attempts", "100")]:  # fmt: skip
            db.execute("SELECT spectrum.configure(%s, %s)", (setting, wanted))
    run_state_machine_as_test(
        type("MachineHere", (Machine,), {"dsn": dsn}),
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
