"""What the benches share: databases of their own, and time and WAL of what runs in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg


class Measure:
    """Seconds and bytes of WAL of what runs inside `with`."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self.seconds = 0.0
        self.wal = 0

    def _position(self) -> int:
        row = self._connection.execute(
            "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
        ).fetchone()
        assert row is not None
        return row[0]

    def __enter__(self) -> Measure:
        self._wal = self._position()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.wal = self._position() - self._wal


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
