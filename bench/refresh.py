"""make bench-refresh: what a refresh costs as the history grows, and what the answers cost.

Three histories, each in a database of its own: BENCH_EVENTS events (default 1,000,000); ten times
as many of ten times the users; ten times as many of the same users, over ten times the days. In
each: BENCH_ROUNDS times 10,000 new events and a refresh, the same views from the facts, reads of
every standing view, and the functions beside the ClickHouse engine. Prints a table and writes
bench/results/refresh-<events>.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psycopg
from column_store import ColumnStore
from psycopg import sql
from questions import DEFINITIONS, FUNNEL
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from server import database

EVENTS = int(os.environ.get("BENCH_EVENTS", "1000000"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))
NEW_EVENTS = 10_000
READS = 200
CHUNK = 250_000
HERE = Path(__file__).parent

QUESTIONS = {
    "funnel": f"SELECT step, units FROM analytics.funnel('{FUNNEL}', p_window => '7 days')",
    "retention": "SELECT cohort, period, users FROM analytics.retention()",
    "active_users": "SELECT day, dau, wau, mau FROM analytics.active_users()",
    "trend": "SELECT period, value FROM analytics.trend('page_view')",
    "trend of users": "SELECT period, value FROM analytics.trend(p_measure => 'users')",
}
# Of a view that holds several series of an account, one.
ONE_OF = {
    "sessions_daily": " AND breakdown = 'all'",
    "feature_adoption": " AND feature = 'feature-1'",
    "lifecycle_periods": " AND period_kind = 'day'",
}


@dataclass(frozen=True)
class History:
    name: str
    events: int
    users: int
    days: int


HISTORIES = (
    History("base", EVENTS, EVENTS // 20, 90),
    History("more users", 10 * EVENTS, EVENTS // 2, 90),
    History("longer", 10 * EVENTS, EVENTS // 20, 900),
)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def refresh(connection: psycopg.Connection) -> None:
    """Refreshes until there is nothing left to do, however many calls that takes."""
    while True:
        row = connection.execute("CALL spectrum.refresh_analytics()").fetchone()
        assert row is not None
        if row[0] == 0:
            return


def process(connection: psycopg.Connection) -> None:
    """Processes what is pending."""
    while True:
        row = connection.execute("CALL spectrum.process_batch()").fetchone()
        assert row is not None
        if row[0] == 0:
            return


def prepare(connection: psycopg.Connection, history: History) -> None:
    """Spectrum, the stream of this history, and nothing of it loaded."""
    connection.execute("CREATE EXTENSION spectrum")
    connection.execute((HERE / "history.sql").read_text())
    connection.execute(
        "INSERT INTO bench.history SELECT %(events)s, %(users)s, 20, "
        "timestamptz '2026-04-01Z' - %(days)s * interval '1 day', '2026-04-01Z', 90",
        vars(history),
    )


def check_loading() -> None:
    """Proves that events loaded and events processed are the same, on 20,000 of them."""
    history = History("sample", 20_000, 1_000, 90)
    seen = []
    for ways in ("load", "send"):
        with database("spectrum_bench_sample") as connection:
            prepare(connection, history)
            connection.execute(f"SELECT bench.{ways}(0, 19999)")
            process(connection)
            connection.execute(DEFINITIONS)
            refresh(connection)
            wrong = connection.execute("SELECT * FROM spectrum.verify() WHERE NOT ok").fetchall()
            if wrong:
                raise SystemExit(f"verify(): {wrong}")
            seen.append(
                connection.execute(
                    "SELECT event_id, occurred_at, event_type, account_id, user_id, country, "
                    "region, city, properties, revenue, currency "
                    "FROM analytics.events ORDER BY event_id"
                ).fetchall()
            )
    if seen[0] != seen[1] or len(seen[0]) != 20_000:
        raise SystemExit("bench.load() does not make the facts that processing makes")


def load(connection: psycopg.Connection, history: History, progress: Progress) -> None:
    task = progress.add_task(f"{history.name}: loading", total=history.events)
    for first in range(0, history.events, CHUNK):
        last = min(first + CHUNK, history.events) - 1
        row = connection.execute("SELECT bench.load(%s, %s)", (first, last)).fetchone()
        if row != (last - first + 1,):
            raise SystemExit(f"{row} facts of events {first} to {last}")
        progress.update(task, completed=last + 1)
    connection.execute(f"ALTER TABLE raw_events ALTER seq RESTART WITH {history.events + 1}")
    connection.execute("VACUUM (ANALYZE)")


def refresh_rounds(
    connection: psycopg.Connection, history: History, progress: Progress
) -> list[dict[str, float]]:
    """New events, time and again; seconds to process and to refresh them."""
    task = progress.add_task(f"{history.name}: rounds", total=ROUNDS)
    rounds = []
    for number in range(ROUNDS):
        first = history.events + number * NEW_EVENTS
        connection.execute("SELECT bench.send(%s, %s)", (first, first + NEW_EVENTS - 1))
        rounds.append(
            {
                "process": seconds(lambda: process(connection)),
                "refresh": seconds(lambda: refresh(connection)),
            }
        )
        progress.update(task, completed=number + 1)
    return rounds


def from_facts(connection: psycopg.Connection, progress: Progress) -> dict[str, float]:
    """Seconds to compute each standing view from all facts, and from nothing that is kept."""
    connection.execute("SET spectrum.from_facts = on")
    names = [
        row[0]
        for row in connection.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'analytics'::regnamespace "
            r"AND proname LIKE '\_standing\_%' AND pronargs = 0 ORDER BY 1"
        )
    ]
    task = progress.add_task("views from the facts", total=len(names))
    costs = {}
    for name in names:
        query = sql.SQL("SELECT count(*) FROM analytics.{}()").format(sql.Identifier(name))
        costs[name] = seconds(lambda query=query: connection.execute(query))
        progress.advance(task)
    connection.execute("RESET spectrum.from_facts")
    return costs


def view_reads(connection: psycopg.Connection) -> dict[str, float]:
    """The 99th percentile, in seconds, of reading one account's rows, by standing view."""
    views = connection.execute(
        "SELECT unnest(views) FROM spectrum.report_kinds ORDER BY position"
    ).fetchall()
    costs = {}
    for (view,) in views:
        query = sql.SQL("SELECT * FROM analytics.{} WHERE account_id = %s{}").format(
            sql.Identifier(view), sql.SQL(ONE_OF.get(view, ""))
        )
        times = []
        for number in range(READS):
            account = "*" if number % 2 else f"account-{number % 20}"
            times.append(seconds(lambda q=query, a=account: connection.execute(q, (a,)).fetchall()))
        costs[view] = statistics.quantiles(times, n=100)[98]
    return costs


def questions(connection: psycopg.Connection, progress: Progress) -> dict[str, dict[str, float]]:
    """Medians of the functions and of the column store, asked in turns."""
    costs = {}
    with ColumnStore(connection, os.cpu_count() or 1) as store:
        task = progress.add_task("questions", total=len(QUESTIONS))
        for name, query in QUESTIONS.items():
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(5):
                ours.append(seconds(lambda q=query: connection.execute(q).fetchall()))
                theirs.append(seconds(lambda n=name: store.ask(n)))
            costs[name] = {
                "spectrum": statistics.median(ours),
                "column store": statistics.median(theirs),
            }
            progress.advance(task)
    return costs


def measure(history: History, progress: Progress) -> dict[str, object]:
    """Everything there is to know about one history."""
    with database("spectrum_bench") as connection:
        prepare(connection, history)
        load(connection, history, progress)
        connection.execute(DEFINITIONS)
        first = seconds(lambda: refresh(connection))
        connection.execute("VACUUM (ANALYZE)")
        return {
            "events": history.events,
            "users": history.users,
            "days": history.days,
            "first refresh": first,
            "rounds": refresh_rounds(connection, history, progress),
            "view reads p99": view_reads(connection),
            "from facts": from_facts(connection, progress),
            "questions": questions(connection, progress),
        }


# What is to be reached: (what, the most it may be).
TARGETS = {
    "refresh, to base": 1.5,
    "refresh, seconds": 1.0,
    "refresh, to from facts": 1 / 20,
    "view reads p99, ms": 10.0,
    "funnel, to column store": 3.0,
    "retention, to column store": 1.0,
    "active_users, to column store": 1.0,
    "trend, to column store": 1.0,
    "trend of users, to column store": 1.0,
}


def figures(result: dict, base: dict) -> dict[str, float]:
    """What the targets are about, of one history."""
    refreshing, at_base = (
        statistics.median(one["refresh"] for one in history["rounds"]) for history in (result, base)
    )
    return {
        "refresh, seconds": refreshing,
        "refresh, to base": refreshing / at_base,
        "refresh, to from facts": refreshing / sum(result["from facts"].values()),
        "view reads p99, ms": 1000 * max(result["view reads p99"].values()),
    } | {
        f"{name}, to column store": cost["spectrum"] / cost["column store"]
        for name, cost in result["questions"].items()
    }


def print_report(console: Console, results: dict[str, dict], ratios: dict[str, dict]) -> None:
    def table(title: str, rows: Iterable[tuple[str, Callable[[str], float]]], digits: int) -> None:
        lines = Table("what", *(f"{name}\n{one['events']:,}" for name, one in results.items()),
                      title=title)  # fmt: skip
        for what, value in rows:
            lines.add_row(what, *(f"{value(name):.{digits}f}" for name in results))
        console.print(lines)

    some = next(iter(results.values()))
    seconds_of: list[tuple[str, Callable[[str], float]]] = [
        ("first refresh", lambda name: results[name]["first refresh"]),
        (f"process {NEW_EVENTS:,}, median", lambda name: statistics.median(
            one["process"] for one in results[name]["rounds"])),
        (f"refresh {NEW_EVENTS:,}, median", lambda name: ratios[name]["refresh, seconds"]),
    ]  # fmt: skip
    for kind in ("from facts", "view reads p99"):
        seconds_of += [
            (f"{kind}: {what}", lambda name, k=kind, w=what: results[name][k][w])
            for what in some[kind]
        ]
    for question in some["questions"]:
        seconds_of += [
            (
                f"{question}: {whose}",
                lambda name, q=question, w=whose: results[name]["questions"][q][w],
            )
            for whose in ("spectrum", "column store")
        ]
    table("seconds", seconds_of, 4)
    table(
        "against what is to be reached",
        [(f"{what} (<= {most:g})", lambda name, w=what: ratios[name][w])
         for what, most in TARGETS.items()],
        3,
    )  # fmt: skip


def main() -> None:
    """Runs everything and writes the result."""
    console = Console()
    with Progress(console=console, transient=True) as progress:
        check_loading()
        results = {history.name: measure(history, progress) for history in HISTORIES}
    ratios = {name: figures(result, results["base"]) for name, result in results.items()}
    print_report(console, results, ratios)
    target = HERE / "results" / f"refresh-{EVENTS}.json"
    target.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "platform": platform.platform()}
    target.write_text(
        json.dumps(
            {"machine": machine, "new events": NEW_EVENTS, "histories": results,
             "figures": ratios, "targets": TARGETS},
            indent=2,
        ) + "\n"
    )  # fmt: skip
    console.print(f"written to {target}")


if __name__ == "__main__":
    main()
