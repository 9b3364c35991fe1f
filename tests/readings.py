"""What becomes of each raw event: the fields that count, or the message it fails with."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from pipeline import insert, process, prove, rows

sys.set_int_max_str_digits(0)

FIELDS = (
    "event_id", "event_type", "account_id", "user_id", "occurred_at", "country", "region", "city",
    "revenue", "currency",
)  # fmt: skip
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MESSAGE = re.compile(
    r"(payload|event_type|event_id|account_id|user_id|occurred_at|timestamp"
    r"|geo(\.country|\.region|\.city)?|properties(\.revenue|\.order total|\.currency)?): expected"
    r" [^\n\r]+, got [^\n\r]{1,103}"
)


class Outcome(NamedTuple):
    id: UUID
    received_at: datetime
    error_msg: str | None
    fields: dict[str, Any]


def outcomes(db: psycopg.Connection) -> list[Outcome]:
    """What became of every raw event, in order; a time as microseconds, which have no end."""
    found = rows(
        db,
        """
        SELECT raw.id, raw.received_at, raw.status, raw.error_msg, reading.error_msg,
            reading.event_id, reading.event_type, reading.account_id, reading.user_id,
            extract(epoch FROM reading.occurred_at) * 1000000,
            reading.country, reading.region, reading.city, reading.revenue, reading.currency
        FROM raw_events AS raw JOIN spectrum.readings AS reading USING (seq) ORDER BY raw.seq
        """,
    )
    read_rows = []
    for raw_id, received_at, status, error_msg, reading_error, *values in found:
        assert error_msg == reading_error
        assert status == ("done" if error_msg is None else "failed")
        assert error_msg is None or MESSAGE.fullmatch(error_msg), error_msg
        fields = dict(zip(FIELDS, values, strict=True))
        read_rows.append(Outcome(raw_id, received_at, error_msg, fields))
    return read_rows


def process_all(
    db: psycopg.Connection, payloads: Sequence[Any], session: Mapping[str, str] | None = None
) -> list[Outcome]:
    insert(db, payloads)
    with db.transaction():
        for name, setting in (session or {}).items():
            db.execute(f"SET LOCAL {name} = '{setting}'")
        assert process(db, len(payloads)).claimed == len(payloads)
    prove(db)
    return outcomes(db)


def microseconds(text: str) -> int:
    return (datetime.fromisoformat(text) - EPOCH) // timedelta(microseconds=1)
