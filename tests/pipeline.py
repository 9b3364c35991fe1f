"""What the tests of the pipeline share: events in, batches, and the proof that all is well."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import errors


class Counts(NamedTuple):
    """What process_batch says it did."""

    claimed: int
    loaded: int
    duplicates: int
    failed: int

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*map(sum, zip(self, other, strict=True)))


NOTHING = Counts(0, 0, 0, 0)
BY_SEQ = """
    SELECT raw.seq, raw.status, original.seq AS copy_of
    FROM raw_events AS raw LEFT JOIN raw_events AS original ON original.id = raw.copy_of
    ORDER BY raw.seq
"""
FAILED = "SELECT seq, error_msg FROM raw_events WHERE status = 'failed' ORDER BY seq"


def event(event_type: str = "seen", **fields: Any) -> dict[str, Any]:
    return {"event_type": event_type, "occurred_at": "2024-02-10T12:00:00Z", **fields}


def many_events(number: int) -> list[Any]:
    """1% that cannot be read, 5% copies with another body, some of them in another month."""
    chance = random.Random(7)
    start = datetime(2023, 11, 1, tzinfo=UTC)
    poison: list[Any] = [
        17, ["no", "object"], {}, {"event_type": ""}, event(occurred_at="yesterday"),
        event(account_id="*"), event(properties=[1]), event(properties={"revenue": "a lot"}),
    ]  # fmt: skip
    made: list[Any] = []
    for n in range(number):
        dice = chance.random()
        if dice < 0.01:
            made.append(chance.choice(poison))
            continue
        # A copy may repeat any event before it; one in ten of those came as poison at first.
        which = chance.randrange(n) if dice < 0.06 and n else n
        made.append(
            event(
                chance.choice(["viewed", "clicked", "bought"]),
                event_id=f"event {which}",
                occurred_at=(start + timedelta(seconds=chance.randrange(90 * 86_400))).isoformat(),
                user_id=f"u{chance.randrange(number // 20)}",
                account_id=f"a{chance.randrange(50)}",
                properties={"n": n, "revenue": chance.randrange(10_000) / 100},
            )
        )
    return made


def insert(db: psycopg.Connection, payloads: Iterable[Any]) -> None:
    """By COPY, in order; a text is taken as the JSON that it is."""
    with db.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
        for payload in payloads:
            copy.write_row([payload if isinstance(payload, str) else json.dumps(payload)])


def process(db: psycopg.Connection, limit: int | None = None) -> Counts:
    row = db.execute("CALL spectrum.process_batch(%s)", (limit,)).fetchone()
    assert row is not None
    return Counts(*row)


def drain(db: psycopg.Connection, limit: int | None = None) -> Counts:
    """Batches until one finds nothing: the sum of them."""
    total = NOTHING
    while (batch := process(db, limit)).claimed:
        total += batch
    return total


def rows(db: psycopg.Connection, query: str, *parameters: Any) -> list[tuple]:
    return db.execute(query, parameters or None).fetchall()


def value(db: psycopg.Connection, query: str, *parameters: Any) -> Any:
    ((only,),) = rows(db, query, *parameters)
    return only


def statuses(db: psycopg.Connection) -> dict[str, int]:
    return dict(rows(db, "SELECT status, count(*) FROM raw_events GROUP BY status"))


def facts(db: psycopg.Connection) -> int:
    return value(db, "SELECT count(*) FROM warehouse.fact_events")


def bodies(db: psycopg.Connection) -> dict[str, Any]:
    """The property n of every fact, by event_id as text."""
    return dict(rows(db, "SELECT event_id::text, properties -> 'n' FROM warehouse.fact_events"))


def only_body(db: psycopg.Connection) -> Any:
    (body,) = bodies(db).values()
    return body


def make_due(db: psycopg.Connection) -> None:
    db.execute("UPDATE spectrum.requeue SET due_at = now()")
    db.execute("UPDATE raw_events SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")


def prove(db: psycopg.Connection, views: bool = False) -> None:
    """verify() finds nothing, and what it does not look at: every copy names the row that counts,
    and nothing is left half done. The standing views are made again only where asked for."""
    if views:
        db.execute("CALL spectrum.refresh_analytics()")
        wrong = rows(db, "SELECT check_name, expected, actual FROM spectrum.verify() WHERE NOT ok")
    else:
        wrong = rows(db, "SELECT * FROM spectrum._verify_facts() WHERE expected <> actual")
    assert wrong == []
    misnamed = rows(
        db,
        """
        SELECT raw.seq, raw.copy_of, original.id
        FROM raw_events AS raw
        JOIN spectrum.readings AS reading USING (seq)
        JOIN warehouse.event_ledger AS ledger ON ledger.event_id = reading.event_id
        LEFT JOIN raw_events AS original ON original.seq = ledger.seq
        WHERE raw.status = 'done'
            AND raw.copy_of IS DISTINCT FROM nullif(coalesce(original.id, ledger.event_id), raw.id)
        """,
    )
    assert misnamed == []
    unexplained = rows(
        db,
        """
        SELECT seq, status, error_msg FROM raw_events
        WHERE (status = 'failed') <> (error_msg IS NOT NULL)
            OR (status IN ('done', 'failed')) <> (processed_at IS NOT NULL)
            OR status = 'done' AND next_attempt_at IS NOT NULL
            OR error_msg ~ '[\\n\\r]'
        """,
    )
    assert unexplained == []


def wait_until(condition: Callable[[], Any], timeout: float = 20, every: float = 0.05) -> Any:
    end = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < end, f"did not come true within {timeout} s: {condition}"
        time.sleep(every)
    return result


def waits(db: psycopg.Connection, other: psycopg.Connection) -> bool:
    """Whether the session waits for a lock."""
    return value(db, "SELECT cardinality(pg_blocking_pids(%s)) > 0", other.info.backend_pid)


def kill_while_it_waits(db: psycopg.Connection, victim: psycopg.Connection, statement: str) -> None:
    """Runs the statement, and terminates its session where it waits for a lock."""
    with ThreadPoolExecutor() as threads:
        call = threads.submit(victim.execute, statement)
        wait_until(lambda: waits(db, victim))
        value(db, "SELECT pg_terminate_backend(%s)", victim.info.backend_pid)
        with pytest.raises(errors.AdminShutdown):
            call.result()
