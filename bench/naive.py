"""What a first version would do: one event at a time, one round trip a step.

Claim a row, upsert each dimension, insert the fact, mark the row, on a star schema with declared
foreign keys. It is timed twice: with a commit after each event, as a loop that survives a crash
has it, and after every hundred, so that fsync is not all that is compared.
"""

from __future__ import annotations

import json
import time

import psycopg

SCHEMA = """
CREATE TABLE raw_events (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), payload jsonb NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(), status text NOT NULL DEFAULT 'pending');
CREATE INDEX ON raw_events (received_at) WHERE status = 'pending';
CREATE TABLE dim_accounts (account_key bigserial PRIMARY KEY, account_id text UNIQUE);
CREATE TABLE dim_users (user_key bigserial PRIMARY KEY, user_id text UNIQUE);
CREATE TABLE dim_geography (
    geo_key bigserial PRIMARY KEY, country text, region text, city text,
    UNIQUE (country, region, city));
CREATE TABLE dim_event_types (event_type_key bigserial PRIMARY KEY, event_type text UNIQUE);
CREATE TABLE fact_events (
    event_id uuid PRIMARY KEY, occurred_at timestamptz NOT NULL,
    account_key bigint REFERENCES dim_accounts, user_key bigint REFERENCES dim_users,
    geo_key bigint REFERENCES dim_geography, event_type_key bigint REFERENCES dim_event_types,
    properties jsonb);
CREATE INDEX ON fact_events (event_type_key, user_key, occurred_at);
"""
CLAIM = """
SELECT id, payload::text FROM raw_events WHERE status = 'pending'
ORDER BY received_at LIMIT 1 FOR UPDATE SKIP LOCKED"""
UPSERT = """
INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT ({columns})
DO UPDATE SET {first} = excluded.{first} RETURNING {key}"""


def _upsert(cursor: psycopg.Cursor, table: str, key: str, columns: str, *values: object) -> int:
    """Returns the key of one dimension member, adding it where it is new."""
    statement = UPSERT.format(
        table=table,
        columns=columns,
        key=key,
        values=", ".join(["%s"] * len(values)),
        first=columns.split(",")[0],
    )
    row = cursor.execute(statement, values).fetchone()
    assert row is not None
    return row[0]


def _process_one(cursor: psycopg.Cursor) -> None:
    """Takes the oldest pending event into the star schema."""
    claimed = cursor.execute(CLAIM).fetchone()
    assert claimed is not None
    event = json.loads(claimed[1])
    geo = event["geo"]
    account = _upsert(cursor, "dim_accounts", "account_key", "account_id", event["account_id"])
    user = _upsert(cursor, "dim_users", "user_key", "user_id", event["user_id"])
    place = _upsert(
        cursor,
        "dim_geography",
        "geo_key",
        "country, region, city",
        geo["country"],
        geo["region"],
        geo["city"],
    )
    kind = _upsert(cursor, "dim_event_types", "event_type_key", "event_type", event["event_type"])
    cursor.execute(
        "INSERT INTO fact_events VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (
            event["event_id"],
            event["occurred_at"],
            account,
            user,
            place,
            kind,
            json.dumps(event["properties"]),
        ),
    )
    cursor.execute("UPDATE raw_events SET status = 'done' WHERE id = %s", (claimed[0],))


def rate(connection: psycopg.Connection, events: list[str], commit_every: int) -> float:
    """Returns events per second of the loop over `events`, staged beforehand."""
    cursor = connection.cursor()
    cursor.execute(SCHEMA)
    with cursor.copy("COPY raw_events (payload) FROM STDIN") as copy:
        for event in events:
            copy.write_row((event,))
    connection.commit()
    cursor.execute("ANALYZE raw_events")
    connection.commit()
    started = time.perf_counter()
    for number in range(1, len(events) + 1):
        _process_one(cursor)
        if number % commit_every == 0:
            connection.commit()
    connection.commit()
    return len(events) / (time.perf_counter() - started)
