"""Everybody at work on one database: clients that insert, workers, refreshes, a keeper.

Each session is a thread with a connection of its own. When a fault takes the connection away, it
connects again and goes on, as an application does, until the round is over.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from random import Random

import psycopg
from psycopg import errors

from .events import KnownIds, Source
from .journal import Fate, Journal
from .server import Server

# What a fault, or another session, may do to a statement: all else is a defect.
BY_A_FAULT = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.QueryCanceled,
)
# A lock on the months that could not be had in time, and what the keeper's own updates may meet.
BY_EACH_OTHER = (errors.LockNotAvailable, errors.DeadlockDetected)


class Session(threading.Thread):
    """Does its step again and again until told to stop."""

    pause = 0.0

    def __init__(self, round_: Work, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.round, self.random = round_, Random(f"{round_.seed} {name}")
        self.interrupted = self.steps = 0
        self.met: Counter[str] = Counter()
        self.defects: list[str] = []

    def run(self) -> None:
        while not self.round.over.is_set():
            try:
                with self.round.server.session(self.round.dbname, self.name) as db:
                    self._go_on(db)
            except psycopg.OperationalError:
                time.sleep(0.02)  # the server is down, or has just taken the connection away
            except Exception as error:
                self.defects.append(f"{self.name}: {error!r}")
                return

    def _go_on(self, db: psycopg.Connection) -> None:
        while not self.round.over.is_set():
            try:
                self.step(db)
                self.steps += 1
            except psycopg.Error as error:
                self._take(error)
                if db.closed or db.broken:
                    return
                db.rollback()
            if self.pause:
                self.round.over.wait(self.pause * self.random.random() * 2)

    def _take(self, error: psycopg.Error) -> None:
        name = type(error).__name__
        self.met[name] += 1
        if isinstance(error, BY_A_FAULT) or error.sqlstate is None:
            self.interrupted += 1
        elif not (isinstance(error, BY_EACH_OTHER) and self.bears_others()):
            self.defects.append(f"{self.name}: {name}: {error}".strip())

    def bears_others(self) -> bool:
        return False

    def step(self, db: psycopg.Connection) -> None:
        raise NotImplementedError


class Client(Session):
    """Inserts, and keeps its journal: what it sent before each COMMIT, and whether that came."""

    pause = 0.04

    def __init__(self, round_: Work, name: str) -> None:
        super().__init__(round_, name)
        seed = f"{round_.seed} {name} events"
        self.source = Source(
            f"{round_.seed}.{name}", seed, round_.known_ids, datetime.fromisoformat(round_.today)
        )

    def events(self, number: int) -> list[str]:
        return [self.source.payload(**self.mix) for _ in range(number)]

    mix: dict[str, float] = {}  # noqa: RUF012

    def insert(self, db: psycopg.Connection, payloads: list[str]) -> None:
        db.execute(
            "INSERT INTO raw_events (payload) SELECT event::jsonb FROM unnest(%s::text[]) AS event",
            (payloads,),
        )


class Single(Client):
    """One event, one commit."""

    pause = 0.02

    def step(self, db: psycopg.Connection) -> None:
        payloads = self.events(1)
        with self.round.journal.committing(self.round.journal.enter(self.name, payloads)):
            self.insert(db, payloads)


class Shop(Client):
    """Several statements a transaction, some rolled back, some to a savepoint."""

    def step(self, db: psycopg.Connection) -> None:
        journal, random = self.round.journal, self.random
        kept = self.events(random.randint(1, 10))
        transaction = journal.enter(self.name, kept)
        db.execute("BEGIN")
        self.insert(db, kept)
        if random.random() < 0.3:
            dropped = self.events(random.randint(1, 5))
            journal.enter(self.name, dropped)
            db.execute("SAVEPOINT doubt")
            self.insert(db, dropped)
            db.execute("ROLLBACK TO doubt")
        if random.random() < 0.3:
            time.sleep(random.random() * 0.1)
        if random.random() < 0.25:
            db.execute("ROLLBACK")
            return
        more = self.events(random.randint(1, 5))
        transaction.payloads = kept + more
        self.insert(db, more)
        with journal.committing(transaction):
            db.execute("COMMIT")


class Loader(Client):
    """COPY, some of which the client itself breaks off."""

    pause = 0.15

    def step(self, db: psycopg.Connection) -> None:
        payloads = self.events(self.random.choice([5, 30, 90]))
        transaction = self.round.journal.enter(self.name, payloads)
        breaks_off = self.random.random() < 0.2
        with (
            contextlib.suppress(BrokenOff),
            db.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy,
        ):
            for payload in payloads:
                copy.write_row((payload,))
            if breaks_off:
                raise BrokenOff
            transaction.fate = Fate.SENT
        if not breaks_off:
            transaction.fate = Fate.COMMITTED


class BrokenOff(Exception):
    pass


class Repeater(Client):
    """Sends again, with other words, what was sent by others: copies, and much that is unreadable.
    All ids of a step in one statement: two of one event come in one batch, too."""

    mix = {"copies": 0.6, "unreadable": 0.15}  # noqa: RUF012

    def step(self, db: psycopg.Connection) -> None:
        payloads = self.events(self.random.randint(1, 8))
        with self.round.journal.committing(self.round.journal.enter(self.name, payloads)):
            self.insert(db, payloads)


class Worker(Session):
    """process_batch() in a loop, with any limit."""

    def __init__(self, round_: Work, name: str) -> None:
        super().__init__(round_, name)
        self.hurried = threading.Event()

    def step(self, db: psycopg.Connection) -> None:
        if self.hurried.is_set():
            db.execute(f"SET statement_timeout = {self.random.randint(3, 60)}")
        limit = self.random.choice([1, 7, 40, 150, 1000])
        row = db.execute("CALL spectrum.process_batch(%s)", (limit,)).fetchone()
        if row and row[0] == 0:
            self.round.over.wait(0.02)


class Ticker(Session):
    """What pg_cron does: run() again and again."""

    pause = 0.05

    def step(self, db: psycopg.Connection) -> None:
        db.execute("CALL spectrum.run()")


class Refresher(Session):
    """Refreshes, in one go or in small steps, now and then in a transaction that is undone."""

    pause = 0.03

    def step(self, db: psycopg.Connection) -> None:
        chance = self.random.random()
        if chance < 0.5:
            db.execute("CALL spectrum.refresh_analytics()")
        elif chance < 0.9:
            db.execute("SELECT spectrum._refresh_some(%s)", (self.random.choice([5, 50, 500]),))
        else:
            db.execute("BEGIN")
            db.execute("SELECT spectrum._refresh_some(100)")
            db.execute("ROLLBACK")


class Keeper(Session):
    """Makes months, defines anew what is counted, sets rows back by hand."""

    pause = 0.08

    def bears_others(self) -> bool:
        return True

    def step(self, db: psycopg.Connection) -> None:
        random = self.random
        self.choose(random)(db, random)

    def choose(self, random: Random) -> Callable[[psycopg.Connection, Random], None]:
        kinds = [self.make_months, self.set_back, self.reprocess, self.define]
        return random.choices(kinds, weights=[5, 5, 1, 2])[0]

    def make_months(self, db: psycopg.Connection, random: Random) -> None:
        first = datetime.fromisoformat(self.round.today) - timedelta(days=random.randrange(270))
        last = first + timedelta(days=random.randrange(70))
        db.execute("SELECT spectrum.ensure_partitions(%s, %s)", (first, last))

    def set_back(self, db: psycopg.Connection, random: Random) -> None:
        db.execute(
            "UPDATE raw_events SET status = 'pending'"
            " WHERE status IN ('done', 'failed') AND seq %% %s = %s",
            (modulus := random.choice([11, 50, 200]), random.randrange(modulus)),
        )

    def reprocess(self, db: psycopg.Connection, random: Random) -> None:
        db.execute("CALL spectrum.reprocess(p_event_type => %s, p_status => 'all')",
                   (random.choice(["signup", "refund"]),))  # fmt: skip

    def define(self, db: psycopg.Connection, random: Random) -> None:
        if random.random() < 0.5:
            steps = random.choice(FUNNELS)
            db.execute("SELECT spectrum.define_funnel('buys', %s, '2 days')", (json.dumps(steps),))
        else:
            event = random.choice(["visit", "purchase", None])
            db.execute("SELECT spectrum.define_retention('back', %s, %s, 'week')", (event, event))


FUNNELS = (["visit", "cart"], ["visit", "cart", "purchase"], ["view", "purchase"])


class Work:
    """All sessions of a round, from start to join."""

    def __init__(
        self, server: Server, dbname: str, seed: str, today: str, journal: Journal,
        known_ids: KnownIds, workers: int = 4, refreshers: int = 1,
    ) -> None:  # fmt: skip
        self.server, self.dbname, self.seed, self.today = server, dbname, seed, today
        self.journal, self.known_ids = journal, known_ids
        self.over = threading.Event()
        self.workers = [Worker(self, f"worker {n}") for n in range(1, workers + 1)]
        self.sessions: list[Session] = [
            Single(self, "single"),
            Shop(self, "shop 1"),
            Shop(self, "shop 2"),
            Loader(self, "loader"),
            Repeater(self, "repeater"),
            *self.workers,
            Ticker(self, "ticker"),
            *(Refresher(self, f"refresher {n}") for n in range(1, refreshers + 1)),
            Keeper(self, "keeper"),
        ]

    def start(self) -> None:
        for session in self.sessions:
            session.start()

    def end(self, timeout: float = 60) -> None:
        self.over.set()
        end = time.monotonic() + timeout
        for session in self.sessions:
            session.join(max(0.1, end - time.monotonic()))
            if session.is_alive():
                session.defects.append(f"{session.name}: still at work after {timeout} s")

    @property
    def interrupted(self) -> int:
        return sum(session.interrupted for session in self.sessions)

    @property
    def defects(self) -> list[str]:
        return [defect for session in self.sessions for defect in session.defects]
