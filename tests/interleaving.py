"""How a history reaches the standing views: in any parts, batches and refreshes, with copies,
corrections and withdrawals, while reports are built anew and the calendar changes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import psycopg
from histories import Payload
from pipeline import drain, insert, process

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"]


def arrive(
    db: psycopg.Connection,
    history: Sequence[Payload],
    randoms: Random,
    kind: str,
    corrected: Callable[[Payload], Payload],
) -> tuple[list[Payload], str]:
    """Plays it, and returns the payloads that count in the end and the time zone."""
    waiting = [
        each | {"event_id": str(uuid.UUID(int=randoms.getrandbits(128)))} for each in history
    ]
    here: dict[str, Payload] = {}
    timezone = ZONES[0]
    while waiting:
        size = randoms.choice([1, 3, 10, 40])
        part, waiting = waiting[:size], waiting[size:]
        here |= {each["event_id"]: each for each in part}
        insert(db, part + randoms.sample(part, randoms.randrange(2)))
        for _ in range(randoms.randrange(3)):
            process(db, randoms.choice([2, 100]))
        if randoms.random() < 0.5:
            drain(db)
            for name in randoms.sample(sorted(here), min(len(here), randoms.randrange(4))):
                if randoms.random() < 0.3:
                    change(db, here.pop(name) | {"event_type": None})
                else:
                    here[name] = corrected(here[name])
                    change(db, here[name])
        if randoms.random() < 0.1:
            timezone = randoms.choice(ZONES)
            db.execute("SELECT spectrum.configure('timezone', %s)", (timezone,))
        if randoms.random() < 0.1:
            db.execute("SELECT spectrum.rebuild_reports(%s)", (kind,))
        if randoms.random() < 0.6:
            db.execute("SELECT spectrum._refresh_some(%s)", (randoms.choice([5, 20, 1000]),))
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    return list(here.values()), timezone


def change(db: psycopg.Connection, payload: Payload) -> None:
    """What was sent is found to be otherwise, in all copies, and processed again."""
    db.execute(
        "UPDATE raw_events SET payload = %s, status = 'pending' WHERE payload ->> 'event_id' = %s",
        (json.dumps(payload), payload["event_id"]),
    )


def other(randoms: Random, payloads: Sequence[Payload]) -> Callable[[Payload], Payload]:
    """A correction: some of what it said becomes what another event says."""

    def corrected(payload: Payload) -> Payload:
        source: dict[str, Any] = randoms.choice(payloads)
        fields = ["event_type", "occurred_at", "account_id", "user_id", "properties"]
        changed = dict(payload)
        for name in randoms.sample(fields, randoms.randrange(4)):
            changed.pop(name, None)
            if name in source:
                changed[name] = source[name]
        return changed

    return corrected
