"""make soak: load, process, refresh, purge in a loop, and what grows although it should not.

For SOAK_SECONDS (default 600) events of the same users and days come in, spectrum.run() takes them
all the way, and raw events go after 20 seconds. After the first half, raw_events, its indexes and
every table of state have to stay within 1.3 times their size (the ledger, dimensions and facts are
kept for ever; the logs are kept by age), no transaction may be open longer than a step of the run,
and what the views show has to be what verify() makes again. Exit code 1 where that is not so.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from server import database
from stream import DEFINITIONS

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
EVENTS_A_ROUND = 5_000
USERS, ACCOUNTS, DAYS = 2_000, 10, 1
LIMIT = 1.3
SMALL = 1 << 20  # below this many bytes a few pages are a large part
DATABASE = "spectrum_soak"
TYPES = ["page_view"] * 12 + ["feature_used"] * 4 + ["api_request"] * 3 + ["signup", "purchase"]

SIZES = """
    SELECT format('%I.%I', nspname, relname),
        CASE WHEN relname = 'raw_events' THEN pg_table_size(pg_class.oid)
            ELSE pg_total_relation_size(pg_class.oid) END
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relkind = 'r' AND (relname = 'raw_events'
        OR nspname IN ('spectrum', 'analytics') AND relname NOT IN ('run_log', 'tasks'))
    UNION ALL
    SELECT 'indexes of raw_events', pg_indexes_size('raw_events')
"""
OLDEST = """
    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend'
"""
LONGEST_STEP = """
    SELECT coalesce(max(extract(epoch FROM finished_at - started_at)), 0)::float8
    FROM spectrum.run_log WHERE step <> 'run'
"""


def payloads(rng: random.Random, start: datetime) -> Iterator[str]:
    """Events of the same users and days each time; every hundredth cannot be read, every
    fiftieth comes twice."""
    for number in range(EVENTS_A_ROUND):
        user = int(USERS * rng.random() ** 2)
        event_type = rng.choice(TYPES)
        event = {
            "event_id": str(uuid.UUID(int=rng.getrandbits(128))),
            "event_type": "" if number % 100 == 99 else event_type,
            "account_id": f"account-{user % ACCOUNTS}",
            "user_id": f"user-{user}",
            "occurred_at": (start + timedelta(seconds=rng.randrange(DAYS * 86400))).isoformat(),
            "properties": {"path": f"/p/{rng.randrange(40)}", "latency_ms": rng.randrange(5, 900)},
        }
        if event_type == "purchase":
            event["properties"] |= {"revenue": rng.randrange(1, 50), "currency": "USD"}
        yield json.dumps(event)
        if number % 50 == 49:
            yield json.dumps(event)


def expose(connection: psycopg.Connection, start: datetime) -> None:
    """Puts every user into one arm of the experiment, once."""
    with connection.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
        for user in range(USERS):
            properties = {"experiment": "checkout", "variant": ("control", "treatment")[user % 2]}
            event = {
                "event_type": "experiment_exposure",
                "account_id": f"account-{user % ACCOUNTS}",
                "user_id": f"user-{user}",
                "occurred_at": start.isoformat(),
                "properties": properties,
            }
            copy.write_row((json.dumps(event),))


class Watch(threading.Thread):
    """Looks every 100 ms how long the oldest transaction of the others is open."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest = 0.0
        self._is_over = threading.Event()

    def run(self) -> None:
        with psycopg.connect(dbname=DATABASE, autocommit=True) as connection:
            while not self._is_over.wait(0.1):
                ((seconds,),) = connection.execute(OLDEST).fetchall()
                self.longest = max(self.longest, seconds)

    def end(self) -> float:
        self._is_over.set()
        self.join()
        return self.longest


def soak(connection: psycopg.Connection, progress: Progress) -> tuple[dict, dict, int]:
    """Sizes when half of the time is over, the largest ones after it, and the rounds made."""
    rng = random.Random(1)
    start = datetime.now(UTC) - timedelta(days=DAYS)
    began = time.monotonic()
    bar = progress.add_task("load, process, refresh, purge", total=SECONDS)
    expose(connection, start)
    at_half: dict[str, int] = {}
    largest: dict[str, int] = {}
    rounds, next_purge = 0, 60.0
    while (spent := time.monotonic() - began) < SECONDS:
        with connection.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
            for payload in payloads(rng, start):
                copy.write_row((payload,))
        connection.execute("CALL spectrum.run()")
        if spent > next_purge:
            connection.execute("CALL spectrum.purge_raw('20 seconds', p_failed => true)")
            next_purge += 60
        rounds += 1
        if spent > SECONDS / 2:
            sizes = dict(connection.execute(SIZES).fetchall())
            at_half = at_half or sizes
            largest = {name: max(size, largest.get(name, 0)) for name, size in sizes.items()}
        progress.update(bar, completed=spent)
    return at_half, largest, rounds


def report(console: Console, at_half: dict[str, int], largest: dict[str, int]) -> list[str]:
    """Prints the tables that are not small; returns those that grew."""
    table = Table(title="bytes after the first half, and the most in the second")
    for heading in ("what", "half", "most", "times"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    grown = []
    for name, most in sorted(largest.items(), key=lambda each: -each[1]):
        ratio = most / max(at_half.get(name, 0), SMALL)
        if most >= SMALL:
            table.add_row(name, f"{at_half.get(name, 0):,}", f"{most:,}", f"{ratio:.2f}")
        if ratio > LIMIT:
            grown.append(name)
    console.print(table)
    return grown


def main() -> int:
    console = Console()
    with (
        Progress(console=console, transient=True) as progress,
        database(DATABASE) as connection,
    ):
        connection.execute("CREATE EXTENSION spectrum")
        connection.execute(DEFINITIONS)
        connection.execute("SELECT spectrum.configure('raw_keep', '20 seconds')")
        watch = Watch()
        watch.start()
        at_half, largest, rounds = soak(connection, progress)
        longest = watch.end()
        ((step,),) = connection.execute(LONGEST_STEP).fetchall()
        connection.execute("CALL spectrum.run()")
        failed_steps = connection.execute(
            "SELECT step, error_msg FROM spectrum.run_log WHERE error_msg IS NOT NULL LIMIT 5"
        ).fetchall()
        wrong = connection.execute("SELECT * FROM spectrum.verify() WHERE NOT ok").fetchall()
        ((facts,),) = connection.execute("SELECT count(*) FROM warehouse.fact_events").fetchall()
    grown = report(console, at_half, largest)
    console.print(
        f"{rounds} rounds, {facts:,} facts; longest transaction {longest:.2f} s, "
        f"longest step {step:.2f} s; failed steps {len(failed_steps)}; wrong in verify(): {wrong}"
    )
    problems = [f"{name} grew beyond {LIMIT} times" for name in grown]
    problems += [f"step {name}: {message}" for name, message in failed_steps]
    if longest > 1.2 * step + 1:
        problems.append("a transaction was open longer than any step")
    if wrong:
        problems.append("verify() finds differences")
    for problem in problems:
        console.print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
