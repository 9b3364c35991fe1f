"""What the benches share: databases of their own, and what it costs to run something in them."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psycopg
from psycopg import sql

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("shared_buffers", "fsync", "synchronous_commit", "full_page_writes", "max_wal_size",
            "checkpoint_timeout", "max_parallel_workers_per_gather", "jit")  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, seconds of processor time of the server's sessions, bytes of WAL."""

    seconds: float
    cpu_seconds: float
    wal_bytes: int


def value(connection: psycopg.Connection, query: str) -> object:
    """The one value that a query returns."""
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def wal_position(connection: psycopg.Connection) -> int:
    position = value(
        connection, "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
    )
    assert isinstance(position, int)
    return position


def processor_time(connection: psycopg.Connection) -> float:
    """Seconds of processor time that this session's backend has used."""
    line = Path(f"/proc/{connection.info.backend_pid}/stat").read_text()
    fields = line.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cost(work: Callable[[], object], *connections: psycopg.Connection) -> Cost:
    """What `work` costs, which runs in these connections."""
    wal, cpu = wal_position(connections[0]), sum(map(processor_time, connections))
    started = time.perf_counter()
    work()
    spent = time.perf_counter() - started
    return Cost(
        spent,
        sum(map(processor_time, connections)) - cpu,
        wal_position(connections[0]) - wal,
    )


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def database(name: str) -> Iterator[psycopg.Connection]:
    """A new database, dropped afterwards, and an autocommit connection to it."""
    with psycopg.connect(dbname="postgres", autocommit=True) as admin:
        admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        admin.execute(f'CREATE DATABASE "{name}"')
        try:
            with psycopg.connect(dbname=name, autocommit=True) as connection:
                yield connection
        finally:
            admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def again(connection: psycopg.Connection) -> psycopg.Connection:
    """One more connection to the same database."""
    return psycopg.connect(dbname=connection.info.dbname, autocommit=True)


def process(connection: psycopg.Connection) -> int:
    """Processes what is pending; returns the number of facts made."""
    loaded = 0
    while True:
        row = connection.execute("CALL spectrum.process_batch()").fetchone()
        assert row is not None
        if row[0] == 0:
            return loaded
        loaded += row[1]


def refresh(connection: psycopg.Connection) -> None:
    """Refreshes until there is nothing left to do, however many calls that takes."""
    while value(connection, "CALL spectrum.refresh_analytics()"):
        pass


def _of_file(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, content = line.partition(":")
        if name.strip() == key:
            return content.strip()
    return "unknown"


def machine() -> dict[str, object]:
    """What this runs on: hardware, versions, settings."""
    with psycopg.connect(dbname="postgres", autocommit=True) as connection:
        settings = {
            name: value(connection, sql.SQL("SHOW {}").format(sql.Identifier(name)).as_string())
            for name in SETTINGS
        }
        server = value(connection, "SHOW server_version")
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "processor": _of_file("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory": _of_file("/proc/meminfo", "MemTotal"),
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "PostgreSQL": str(server).split()[0],
        "settings": settings,
        "Spectrum": commit.stdout.strip() or "unknown",
        "Python": platform.python_version(),
        "packages": {name: version(name) for name in ("psycopg", "chdb", "duckdb")},
    }
