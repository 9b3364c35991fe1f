"""End to end: events come in at a steady rate, two workers process, a refresh ticks each minute."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
from results import Row
from rich.progress import Progress
from server import database, process, refresh, seconds, wal_position
from stream import CHUNK, DEFINITIONS, History, payloads, prepare

DATABASE = "spectrum_bench"
FIRST_TICK, TICK = 30, 60
FEED_EVERY, LOOK_EVERY = 0.1, 0.5
NOTE = "feeder, workers and refresh share the cores of the machine"


class Counts:
    """How many events were sent and claimed so far."""

    def __init__(self) -> None:
        self.sent = 0
        self.claimed = [0, 0]
        self.refreshes: list[tuple[float, float]] = []

    def at(self, moment: float) -> dict[str, float]:
        return {"at": moment, "sent": self.sent, "backlog": self.sent - sum(self.claimed)}


class Job(threading.Thread):
    """Does something with a connection of its own, again and again until it is told to end.

    `once` returns how many seconds to wait before the next time.
    """

    def __init__(self, once: Callable[[psycopg.Connection], float], wait: float = 0) -> None:
        super().__init__(daemon=True)
        self._once, self._wait = once, wait
        self._is_over = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        wait = self._wait
        try:
            with psycopg.connect(dbname=DATABASE, autocommit=True) as connection:
                while not self._is_over.wait(wait):
                    wait = self._once(connection)
        except BaseException as failure:
            self.failure = failure

    def end(self) -> None:
        self._is_over.set()
        self.join()
        if self.failure:
            raise self.failure


class Feeder:
    """Sends lines at a steady rate, each tenth of a second a COPY."""

    def __init__(self, lines: Iterator[bytes], rate: int, counts: Counts) -> None:
        self._lines, self._rate, self._counts = lines, rate, counts
        self._started: float | None = None

    def __call__(self, connection: psycopg.Connection) -> float:
        self._started = self._started or time.perf_counter()
        due = int((time.perf_counter() - self._started + FEED_EVERY) * self._rate)
        # What it is behind with, it does not send at once: there are more clients than one.
        size = min(due - self._counts.sent, int(FEED_EVERY * self._rate))
        block = list(itertools.islice(self._lines, max(size, 0)))
        if block:
            with connection.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
                copy.write(b"".join(block))
            self._counts.sent += len(block)
        next_at = self._started + self._counts.sent / self._rate
        return max(0, next_at - time.perf_counter()) if block else FEED_EVERY


def worker(counts: Counts, number: int) -> Callable[[psycopg.Connection], float]:
    def once(connection: psycopg.Connection) -> float:
        row = connection.execute("CALL spectrum.process_batch()").fetchone()
        assert row is not None
        counts.claimed[number] += row[0]
        return 0 if row[0] else 0.02

    return once


def ticker(counts: Counts, started: float) -> Callable[[psycopg.Connection], float]:
    def once(connection: psycopg.Connection) -> float:
        began = time.perf_counter()
        connection.execute("CALL spectrum.refresh_analytics()")
        spent = time.perf_counter() - began
        counts.refreshes.append((began - started, spent))
        return max(0, TICK - spent)

    return once


def write_lines(connection: psycopg.Connection, path: Path, count: int, progress: Progress) -> None:
    task = progress.add_task("end to end: making events", total=count)
    with path.open("wb") as file:
        for first in range(0, count, CHUNK):
            size = min(CHUNK, count - first)
            file.write(payloads(connection, first, size))
            progress.update(task, advance=size)


def watch(counts: Counts, started: float, duration: int, progress: Progress) -> list[dict]:
    """What there was twice a second, until the time is over."""
    task = progress.add_task("end to end", total=duration)
    seen = []
    while (at := time.perf_counter() - started) < duration:
        seen.append(counts.at(at))
        progress.update(task, completed=at)
        time.sleep(LOOK_EVERY)
    seen.append(counts.at(at))
    return seen


def measure(rate: int, duration: int, progress: Progress) -> tuple[dict, list[Row]]:
    history = History.of(rate * duration)
    with (
        tempfile.TemporaryDirectory(prefix="spectrum-bench-") as directory,
        database(DATABASE) as connection,
    ):
        prepare(connection, history)
        connection.execute(DEFINITIONS)
        refresh(connection)
        path = Path(directory) / "events"
        write_lines(connection, path, rate * duration, progress)
        wal = wal_position(connection)
        counts, started = Counts(), time.perf_counter()
        with path.open("rb") as lines:
            jobs = [
                Job(Feeder(lines, rate, counts)),
                *(Job(worker(counts, number)) for number in range(2)),
                Job(ticker(counts, started), wait=min(FIRST_TICK, duration / 2)),
            ]
            for job in jobs:
                job.start()
            seen = watch(counts, started, duration, progress)
            for job in jobs:
                job.end()
        made = {
            "rate": rate,
            "seconds": duration,
            "seen": seen,
            "refreshes": counts.refreshes,
            "wal_bytes": (wal_position(connection) - wal) / max(counts.sent, 1),
            "seconds to drain": _drain(connection, counts),
        }
    return made, rows(made)


def _drain(connection: psycopg.Connection, counts: Counts) -> float:
    """Seconds until nothing is pending, and the proof that nothing was lost."""
    drained = seconds(lambda: process(connection))
    facts = connection.execute("SELECT count(*) FROM warehouse.fact_events").fetchone()
    if facts != (counts.sent,):
        raise SystemExit(f"{facts} facts of {counts.sent} events")
    return drained


def rows(made: dict) -> list[Row]:
    group = f"end to end, {made['rate']:,} events/s sent for {made['seconds']} s"
    seen = made["seen"]
    last = seen[-1]
    middle = next(one for one in seen if one["at"] >= last["at"] / 2)
    growth = (last["backlog"] - middle["backlog"]) / (last["at"] - middle["at"])
    return [
        Row(group, "events sent", last["sent"] / last["at"], "events/s"),
        Row(group, "events processed, two workers beside it",
            (last["sent"] - last["backlog"]) / last["at"], "events/s", least=25_000, note=NOTE),
        Row(group, "backlog in the second half, growing by", growth, "events/s",
            most=made["rate"] / 100, note=NOTE),
        Row(group, "longest refresh", max((spent for _, spent in made["refreshes"]), default=None),
            "s"),
        Row(group, "WAL of all", made["wal_bytes"], "B/event"),
    ]  # fmt: skip
