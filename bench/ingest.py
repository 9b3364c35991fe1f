"""From COPY to the views: what a batch and a refresh cost, beside the COPY of the same events."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import naive
import psycopg
from results import Row, ratio, short
from rich.progress import Progress
from server import Cost, again, cost, database, process, refresh, seconds
from stream import DEFINITIONS, History, copy_in, payloads, prepare

LOOP_ROUNDS, BATCH_EVENTS, LOOP_EVENTS = 5, 50_000, 4_000
LOOP_NAME = "loop, commit every {}"
BATCH_TARGETS = {1: 1.7, 2: 1.2}
BATCH_NOTE = (
    "a COPY writes one heap and two indexes; a batch reads the JSON, marks the row, and writes "
    "fact, ledger and note with three indexes"
)
WAL_NOTE = "most of it is the fact and its two indexes, then the ledger and its index"
REFRESH_NOTE = "a refresh writes what it knows of single users: their days, sessions, steps"


@dataclass(frozen=True)
class Round:
    """COPY of some events, their processing, and the refresh that followed it, if one did."""

    events: int
    workers: int
    copy: Cost
    batch: Cost
    refresh: Cost | None


def together(connections: list[psycopg.Connection]) -> int:
    """Processes with all connections at once; returns the number of facts made."""
    with ThreadPoolExecutor(len(connections)) as workers:
        return sum(workers.map(process, connections))


def measure(
    connection: psycopg.Connection, history: History, pairs: int, progress: Progress
) -> list[Round]:
    """Takes the history in, in equal parts: one worker and two by turns, then a refresh."""
    prepare(connection, history)
    connection.execute(DEFINITIONS)
    refresh(connection)
    size = history.events // (2 * pairs)
    task = progress.add_task(f"{history.name}: COPY, batch, refresh", total=2 * pairs)
    rounds = []
    with again(connection) as second:
        for number in range(2 * pairs):
            workers = [connection, second][: number % 2 + 1]
            lines = payloads(connection, number * size, size)
            copied = cost(lambda lines=lines: copy_in(connection, lines), connection)
            loaded: list[int] = []
            batch = cost(lambda w=workers, to=loaded: to.append(together(w)), *workers)
            if loaded != [size]:
                raise SystemExit(f"{loaded} facts of {size} events: what it took means nothing")
            refreshed = None
            if len(workers) == 2:
                refreshed = cost(lambda: refresh(connection), connection)
            rounds.append(Round(size, len(workers), copied, batch, refreshed))
            progress.advance(task)
    return rounds


def median(rounds: list[Round], figure: Callable[[Round], float]) -> float:
    return statistics.median(map(figure, rounds))


def report(history: History, rounds: list[Round]) -> tuple[list[dict], list[Row]]:
    return [asdict(each) for each in rounds], rows(history.is_wide, rounds)


def rows(is_wide: bool, rounds: list[Round]) -> list[Row]:
    """The figures of one payload size."""
    of = {
        workers: [each for each in rounds if each.workers == workers] for workers in BATCH_TARGETS
    }
    group = f"ingest, payloads of {'1 kB' if is_wide else '365 bytes'}"
    made = []
    for workers, most in BATCH_TARGETS.items():
        mine = of[workers]
        batch = median(mine, lambda r: 1e6 * r.batch.seconds / r.events)
        copied = median(mine, lambda r: 1e6 * r.copy.seconds / r.events)
        who = "one worker" if workers == 1 else "two workers at once"
        made.append(
            Row(group, f"process_batch, {who}, to COPY",
                median(mine, lambda r: r.batch.seconds / r.copy.seconds), "times", most=most,
                made_of=ratio(batch, copied, "us/event"), note=BATCH_NOTE)
        )  # fmt: skip
    # Processor time is steady where the machine is not, and is told in hundredths of a second.
    mine = of[1]
    events = sum(r.events for r in mine) / 1e6
    batch = sum(r.batch.cpu_seconds for r in mine) / events
    copied = sum(r.copy.cpu_seconds for r in mine) / events
    made.append(
        Row(group, "one worker to COPY in processor time of the server",
            batch / copied, "times", made_of=ratio(batch, copied, "us/event"))
    )  # fmt: skip
    refreshes = [(r.refresh, 2 * r.events) for r in rounds if r.refresh]
    refresh_time = statistics.median(1e6 * one.seconds / events for one, events in refreshes)
    refresh_wal = statistics.median(one.wal_bytes / events for one, events in refreshes)
    batch_wal = median(mine, lambda r: r.batch.wal_bytes / r.events)
    return [
        *made,
        Row(group, f"refresh of {refreshes[0][1]:,} new events", refresh_time, "us/event"),
        Row(group, "WAL of COPY", median(rounds, lambda r: r.copy.wal_bytes / r.events),
            "B/event"),
        Row(group, "WAL of batch", batch_wal, "B/event", most=None if is_wide else 800,
            note=WAL_NOTE),
        Row(group, "WAL of batch and refresh together", batch_wal + refresh_wal, "B/event",
            most=None if is_wide else 1050, note=REFRESH_NOTE,
            made_of=f"{short(batch_wal)} + {short(refresh_wal)} B/event"),
    ]  # fmt: skip


def against_loop(progress: Progress) -> tuple[dict[str, list[float]], list[Row]]:
    """Batches of one worker beside the per-event loop over the same events, by turns."""
    history = History.of(LOOP_ROUNDS * BATCH_EVENTS)
    task = progress.add_task("a loop in Python", total=LOOP_ROUNDS)
    with (
        database("spectrum_bench") as connection,
        database("naive_bench_1") as one,
        database("naive_bench_100") as hundred,
    ):
        prepare(connection, history)
        loops = {every: naive.Loop(to, every) for every, to in ((1, one), (100, hundred))}
        rates: dict[str, list[float]] = {"batch": []} | {LOOP_NAME.format(n): [] for n in loops}
        for number in range(LOOP_ROUNDS):
            lines = payloads(connection, number * BATCH_EVENTS, BATCH_EVENTS)
            copy_in(connection, lines)
            rates["batch"].append(BATCH_EVENTS / seconds(lambda: process(connection)))
            for every, loop in loops.items():
                loop.stage(lines)
                rates[LOOP_NAME.format(every)].append(loop.process(LOOP_EVENTS))
            progress.advance(task)
    batch = statistics.median(rates["batch"])
    made = []
    for every, least in ((1, 40), (100, None)):
        theirs = rates[LOOP_NAME.format(every)]
        made.append(
            Row("against a loop in Python",
                f"process_batch, one worker, to {LOOP_NAME.format(every)}",
                statistics.median(map(operator.truediv, rates["batch"], theirs)), "times",
                least=least, made_of=ratio(batch, statistics.median(theirs), "events/s"))
        )  # fmt: skip
    return rates, made
