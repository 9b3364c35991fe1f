"""make bench: what processing costs, against COPY and against a per-event loop, in one run.

Reads the usual PG* variables and BENCH_EVENTS (default 1,000,000). Databases of its own are made
and dropped. Prints a table and writes bench/results/<events>.json.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import naive
import psycopg
from events import payloads
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from server import Measure, database

EVENTS = int(os.environ.get("BENCH_EVENTS", "1000000"))
LOOP_EVENTS = min(EVENTS, 10_000)
RESULTS = Path(__file__).parent / "results"


def copy_in(connection: psycopg.Connection, lines: Iterable[str], progress: Progress) -> None:
    """COPYs JSON texts into raw_events."""
    task = progress.add_task("COPY into raw_events", total=EVENTS)
    with connection.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
        for number, line in enumerate(lines, 1):
            copy.write_row((line,))
            if number % 10_000 == 0:
                progress.update(task, completed=number)
    progress.update(task, completed=EVENTS)


def process_all(connection: psycopg.Connection, progress: Progress) -> int:
    """Calls process_batch until nothing is claimed; returns the number of facts made."""
    task = progress.add_task("process_batch", total=EVENTS)
    loaded = 0
    while True:
        row = connection.execute("CALL spectrum.process_batch()").fetchone()
        assert row is not None
        if row[0] == 0:
            return loaded
        loaded += row[1]
        progress.update(task, advance=row[0])


def spectrum_costs(progress: Progress) -> dict[str, Measure]:
    """Measures COPY, processing and a refresh of the same events in a new database."""
    with database("spectrum_bench") as connection:
        connection.execute("CREATE EXTENSION spectrum")
        costs = {name: Measure(connection) for name in ("COPY", "process", "refresh")}
        lines = list(payloads(EVENTS))
        with costs["COPY"]:
            copy_in(connection, lines, progress)
        with costs["process"]:
            loaded = process_all(connection, progress)
        if loaded != EVENTS:
            raise SystemExit(f"{loaded} facts of {EVENTS} events: the numbers below mean nothing")
        task = progress.add_task("refresh_analytics", total=1)
        with costs["refresh"]:
            connection.execute("CALL spectrum.refresh_analytics()")
        progress.update(task, completed=1)
        return costs


def loop_rates(progress: Progress) -> dict[str, float]:
    """Measures the per-event loop on a part of the same events; events per second by name."""
    rates = {}
    for commit_every in (1, 100):
        name = f"loop, commit every {commit_every}"
        task = progress.add_task(f"{name}, over {LOOP_EVENTS:,}", total=1)
        with database("naive_bench") as connection:
            connection.autocommit = False
            rates[name] = naive.rate(connection, list(payloads(LOOP_EVENTS)), commit_every)
        progress.update(task, completed=1)
    return rates


def report(
    console: Console, costs: dict[str, Measure], rates: dict[str, float]
) -> dict[str, object]:
    """Prints the table and returns it as plain values."""
    table = Table(title=f"{EVENTS:,} events, one worker")
    for heading in ("what", "s", "us/event", "events/s", "WAL B/event"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, cost in costs.items():
        each = cost.seconds / EVENTS
        table.add_row(
            name,
            f"{cost.seconds:.1f}",
            f"{each * 1e6:.1f}",
            f"{1 / each:,.0f}",
            f"{cost.wal / EVENTS:.0f}",
        )
    for name, rate in rates.items():
        table.add_row(name, "", f"{1e6 / rate:.0f}", f"{rate:,.0f}", "")
    console.print(table)
    process = costs["process"].seconds / EVENTS
    ratios = {
        "process / COPY": costs["process"].seconds / costs["COPY"].seconds,
    } | {f"{name} / process": 1 / rate / process for name, rate in rates.items()}
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.2f}")
    return {
        "events": EVENTS,
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        "costs": {
            name: {"seconds": cost.seconds, "wal_bytes": cost.wal} for name, cost in costs.items()
        },
        "loop_events_per_second": rates,
        "ratios": ratios,
    }


def main() -> None:
    """Runs everything and writes the result."""
    console = Console()
    with Progress(console=console, transient=True) as progress:
        costs = spectrum_costs(progress)
        rates = loop_rates(progress)
    result = report(console, costs, rates)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{EVENTS}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {target}")


if __name__ == "__main__":
    main()
