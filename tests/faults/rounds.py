"""One round after the other: work, a fault, recovery, work to the end, the proof. And their table.

A database serves several rounds, so that each round meets a history; each round's proof is of all
of it. The seed decides what is sent, which fault comes and when; what it meets there is chance.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random

import psycopg

from .checker import Finding, check
from .events import FUNNEL, KnownIds
from .faults import FAULTS
from .journal import Journal
from .server import Server
from .sessions import Work

TEMPLATE = "faults_template"
# A witness in the database: rows that a batch marks although they do not wait.
MARKED_TWICE = """
    CREATE TABLE public.marked_twice (seq bigint);
    CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO public.marked_twice VALUES (new.seq); RETURN NULL; END $$;
    CREATE TRIGGER note AFTER UPDATE ON raw_events FOR EACH ROW
    WHEN (new.attempts > old.attempts AND old.status <> 'pending' AND old.next_attempt_at IS NULL)
    EXECUTE FUNCTION public.note();
"""
Patch = Callable[[psycopg.Connection], None]


@dataclass
class Database:
    """One that rounds are played in, with what the clients know of it."""

    name: str
    today: str
    journal: Journal = field(default_factory=Journal)
    known_ids: KnownIds = field(default_factory=KnownIds)
    proven: Finding = field(default_factory=Finding)


@dataclass
class Outcome:
    """Of one round: what the fault met, and what the proof found, less what was there before."""

    seed: str
    fault: str
    interrupted: int
    seconds: float
    finding: Finding
    before: Finding

    def more(self, count: str) -> int:
        return getattr(self.finding, count) - getattr(self.before, count)

    @property
    def is_well(self) -> bool:
        return self.finding.is_well


def make_template(server: Server) -> None:
    with server.session() as db:
        db.execute(f"CREATE DATABASE {TEMPLATE}")
    with server.session(TEMPLATE) as db:
        db.execute("CREATE EXTENSION spectrum")
        for setting, value in {
            "run_budget": "1 second",
            "retry_delay": "100 ms",
            "max_attempts": "100",
            "batch_size": "200",
        }.items():
            db.execute("SELECT spectrum.configure(%s, %s)", (setting, value))
        db.execute("SELECT spectrum.define_funnel('pays', %s, '2 days')", (json.dumps(FUNNEL),))
        db.execute(MARKED_TWICE)


@contextmanager
def database(server: Server, name: str, patch: Patch | None = None) -> Iterator[Database]:
    """A new one with Spectrum, the same but for a patch."""
    with server.session() as db:
        # Copied by wal_log, the default, sequences go back in a crash: their copies claim numbers
        # that are in no WAL (seen in PostgreSQL 15.20).
        db.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY file_copy")
    if patch:
        with server.session(name) as db:
            patch(db)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        yield Database(name, (today - timedelta(days=1)).isoformat())
    finally:
        with server.session() as db:
            db.execute(f"DROP DATABASE {name} WITH (FORCE)")


def play(
    server: Server, database: Database, seed: str, fault: str, refreshers: int = 1,
    patience: float = 60,
) -> Outcome:  # fmt: skip
    """One round."""
    began, random = time.monotonic(), Random(seed)
    before = database.proven
    work = Work(
        server, database.name, seed, database.today, database.journal, database.known_ids,
        refreshers=refreshers,
    )  # fmt: skip
    work.start()
    try:
        time.sleep(random.uniform(0.3, 0.9))
        FAULTS[fault][0](server, work, random)
        time.sleep(random.uniform(0, 0.4))
    finally:
        work.end()
    defects = work.defects
    with server.session(database.name, "proof") as db:
        try:
            finish(db, random, patience)
        except (psycopg.Error, TimeoutError) as error:
            defects.append(f"work does not come to its end: {error}")
        finding = check(db, database.journal)
    finding.wrong += defects
    database.proven = finding
    return Outcome(seed, fault, work.interrupted, time.monotonic() - began, finding, before)


def finish(db: psycopg.Connection, random: Random, timeout: float) -> None:
    """Batches until nothing waits, then a refresh: by hand or by run()."""
    end = time.monotonic() + timeout
    by_run = random.random() < 0.5
    waiting = (
        "SELECT count(*) FROM raw_events WHERE status IN ('pending', 'processing')"
        " OR next_attempt_at IS NOT NULL"
    )
    db.execute("SET lock_timeout = '20s'")
    while True:
        if by_run:
            db.execute("CALL spectrum.run()")
        else:
            while (db.execute("CALL spectrum.process_batch()").fetchone() or [0])[0]:
                pass
        ((left,),) = db.execute(waiting)
        if not left:
            break
        if time.monotonic() > end:
            return  # the proof counts them
        time.sleep(0.1)
    db.execute("CALL spectrum.refresh_analytics()")


def play_all(
    server: Server, seed: str, faults: Sequence[str], rounds_a_database: int,
    tell: Callable[[Outcome], None],
) -> None:  # fmt: skip
    """All rounds of a plan. After a round that is not well the next one gets a new database."""
    played = 0
    while played < len(faults):
        with database(server, f"faults_{played}") as place:
            for fault in faults[played : played + rounds_a_database]:
                outcome = play(server, place, f"{seed}-{played}", fault)
                played += 1
                tell(outcome)
                if not outcome.is_well:
                    break


COLUMNS = (
    "fault", "rounds", "broke off", "events", "facts", "copies", "failed", "in doubt",
    "lost", "doubled", "left claimed", "views off", "seconds",
)  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> str:
    """By kind of fault and in all; what has to be zero is counted, not assumed."""
    lines = [COLUMNS]
    kinds = [kind for kind in FAULTS if any(outcome.fault == kind for outcome in outcomes)]
    for kind in [*kinds, "all"]:
        mine = [outcome for outcome in outcomes if kind in (outcome.fault, "all")]
        sums = [
            sum(outcome.more(count) for outcome in mine)
            for count in ("events", "facts", "copies", "failed", "in_doubt", "lost", "doubled")
        ]
        views = sum(outcome.finding.views for outcome in mine)
        left = sum(outcome.finding.left for outcome in mine)
        cells = [kind, len(mine), sum(outcome.interrupted for outcome in mine), *sums, left, views]
        lines.append((*map(str, cells), f"{sum(outcome.seconds for outcome in mine):.0f}"))
    widths = [max(len(line[n]) for line in lines) for n in range(len(COLUMNS))]
    rows = [
        "| " + " | ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ) + " |"
        for line in lines
    ]  # fmt: skip
    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for n, w in enumerate(widths)) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])
