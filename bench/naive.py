"""What one would write without Spectrum: a loop over the events, each in steps of its own.

It is written well. Keys of the dimensions are remembered, so that a known user costs no round
trip; an event is claimed and marked in one statement that needs no lock of its own and lets other
loops work beside; statements are prepared (psycopg does that by itself). The star schema has
declared foreign keys, as one writes it, and the event_id is unique.

It is timed twice: with a commit after each event, as a loop that survives a crash has it, and after
every hundred, so that fsync is not all that is compared.
"""

from __future__ import annotations

import json
import time

import psycopg

SCHEMA = """
CREATE SCHEMA naive;
SET search_path = naive;
CREATE TABLE raw_events (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), payload jsonb NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(), status text NOT NULL DEFAULT 'pending');
CREATE INDEX ON raw_events (received_at) WHERE status = 'pending';
CREATE TABLE dim_accounts (account_key bigserial PRIMARY KEY, name text UNIQUE);
CREATE TABLE dim_users (user_key bigserial PRIMARY KEY, name text UNIQUE);
CREATE TABLE dim_geography (geo_key bigserial PRIMARY KEY, name text UNIQUE);
CREATE TABLE dim_event_types (event_type_key bigserial PRIMARY KEY, name text UNIQUE);
CREATE TABLE fact_events (
    event_id uuid PRIMARY KEY, occurred_at timestamptz NOT NULL,
    account_key bigint REFERENCES dim_accounts, user_key bigint REFERENCES dim_users,
    geo_key bigint REFERENCES dim_geography, event_type_key bigint REFERENCES dim_event_types,
    properties jsonb);
CREATE INDEX ON fact_events (event_type_key, user_key, occurred_at);
"""
CLAIM = """
UPDATE raw_events SET status = 'done'
WHERE id = (
    SELECT id FROM raw_events WHERE status = 'pending'
    ORDER BY received_at LIMIT 1 FOR UPDATE SKIP LOCKED
)
RETURNING payload::text"""
ADD = """
INSERT INTO {table} (name) VALUES (%s) ON CONFLICT (name) DO UPDATE SET name = excluded.name
RETURNING {key}"""
INSERT = "INSERT INTO fact_events VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"


class Dimension:
    """Keys of names, remembered."""

    def __init__(self, table: str, key: str) -> None:
        self._add = ADD.format(table=table, key=key)
        self._keys: dict[str, int] = {}

    def key(self, cursor: psycopg.Cursor, name: str) -> int:
        if name not in self._keys:
            row = cursor.execute(self._add, (name,)).fetchone()
            assert row is not None
            self._keys[name] = row[0]
        return self._keys[name]


class Loop:
    """Takes events into the star schema, one at a time."""

    def __init__(self, connection: psycopg.Connection, commit_every: int) -> None:
        connection.execute(SCHEMA)
        self._connection = connection
        self._cursor = connection.cursor()
        self._commit_every = commit_every
        self._accounts = Dimension("dim_accounts", "account_key")
        self._users = Dimension("dim_users", "user_key")
        self._places = Dimension("dim_geography", "geo_key")
        self._types = Dimension("dim_event_types", "event_type_key")

    def stage(self, lines: bytes) -> None:
        """Inserts events, a line each."""
        with self._connection.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
            copy.write(lines)
        self._connection.execute("VACUUM (ANALYZE)")

    def process(self, count: int) -> float:
        """Takes so many pending events, the oldest first; returns how many a second."""
        self._connection.autocommit = False
        started = time.perf_counter()
        for number in range(1, count + 1):
            self._process_one()
            if number % self._commit_every == 0:
                self._connection.commit()
        self._connection.commit()
        spent = time.perf_counter() - started
        self._connection.autocommit = True
        return count / spent

    def _process_one(self) -> None:
        cursor = self._cursor
        claimed = cursor.execute(CLAIM).fetchone()
        assert claimed is not None
        event = json.loads(claimed[0])
        cursor.execute(
            INSERT,
            (
                event["event_id"],
                event["occurred_at"],
                self._accounts.key(cursor, event["account_id"]),
                self._users.key(cursor, event["user_id"]),
                self._places.key(cursor, json.dumps(event["geo"])),
                self._types.key(cursor, event["event_type"]),
                json.dumps(event["properties"]),
            ),
        )
