"""What the INSERT of one event adds to a transaction of the application, beside nothing added.

Four transactions by turns, prepared, through the Unix socket: an empty one and one that inserts an
event; one that writes a row of the application's own, and one that does both. The second pair is
what applications do: their own write waits for the disk anyway.
"""

from __future__ import annotations

import random
import statistics
import time

import psycopg
from results import Row, short
from rich.progress import Progress
from server import database
from stream import History, prepare

TIMES = 5_000
OWN = "UPDATE own SET seen = seen + 1 WHERE id = %s"
INSERT = "INSERT INTO raw_events (payload) VALUES (%s)"
KINDS = {"empty": (), "event": ("event",), "own": ("own",), "own and event": ("own", "event")}


def transaction(connection: psycopg.Connection, kind: str, row: int, payload: str) -> float:
    """Seconds of one transaction."""
    cursor = connection.cursor()
    started = time.perf_counter()
    cursor.execute("BEGIN", prepare=False)
    for statement in KINDS[kind]:
        if statement == "own":
            cursor.execute(OWN, (row,), prepare=True)
        else:
            cursor.execute(INSERT, (payload,), prepare=True)
    cursor.execute("COMMIT", prepare=False)
    return time.perf_counter() - started


def measure(progress: Progress) -> tuple[dict[str, dict[str, float]], list[Row]]:
    rng = random.Random(1)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    task = progress.add_task("INSERT from an application", total=TIMES)
    with database("spectrum_bench") as connection:
        prepare(connection, History.of(TIMES))
        payloads = connection.execute("SELECT bench.payloads(0, %s)::text", (TIMES - 1,)).fetchall()
        connection.execute("CREATE TABLE own (id integer PRIMARY KEY, seen integer NOT NULL)")
        connection.execute("INSERT INTO own SELECT generate_series(1, 1000), 0")
        connection.execute("VACUUM (ANALYZE)")
        order = list(KINDS)
        for number, (payload,) in enumerate(payloads):
            rng.shuffle(order)
            for kind in order:
                spent = transaction(connection, kind, rng.randrange(1, 1001), payload)
                times[kind].append(spent)
            if number % 100 == 0:
                progress.update(task, completed=number)
        progress.update(task, completed=TIMES)
    at = {
        kind: dict(zip(("p50", "p99"), (cuts[49], cuts[98]), strict=True))
        for kind, spent in times.items()
        for cuts in [statistics.quantiles(spent, n=100)]
    }
    return at, rows(at)


def rows(at: dict[str, dict[str, float]]) -> list[Row]:
    group = "INSERT of one event, added to the application's transaction"
    made = []
    for kind, without, name, note in (
        ("event", "empty", "an empty transaction",
         "its commit waits for the disk, that of an empty one does not"),
        ("own and event", "own", "one that writes a row of its own",
         "both wait for disk and processor: a tail is as long as what else the machine does"),
    ):  # fmt: skip
        for quantile in ("p50", "p99"):
            with_it, usual = 1000 * at[kind][quantile], 1000 * at[without][quantile]
            most = 0.3 if quantile == "p99" else None
            made.append(
                Row(group, f"INSERT, {quantile} added to {name}", with_it - usual, "ms", most=most,
                    made_of=f"{short(with_it)} - {short(usual)} ms", note=note)
            )  # fmt: skip
    return made
