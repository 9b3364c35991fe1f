"""Random histories of events, small enough to shrink and rich in what is hard: ties, days on which
the clock changes, windows that end to the minute, unknown users, users of several accounts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

Payload = dict[str, Any]

# One database serves all examples of a test: each example is rolled back.
exploring = settings(
    max_examples=int(os.environ.get("SPECTRUM_HISTORIES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# The nights of these days are 23 or 25 hours long somewhere.
CLOCK_CHANGES = (
    datetime(2024, 3, 10, tzinfo=UTC),
    datetime(2024, 3, 31, tzinfo=UTC),
    datetime(2024, 10, 27, tzinfo=UTC),
    datetime(2024, 11, 3, tzinfo=UTC),
)
timezones = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"])

hours = st.sampled_from([0, 1, 3, 4, 5, 6, 12, 21, 22, 23])
minutes = st.sampled_from([0, 15, 30, 59])
days = st.sampled_from([0, 0, 1, 2, 3, 5, 6, 7, 8, 14, 28, 29, 30, 31, 40])


def instants(epoch: datetime) -> st.SearchStrategy[datetime]:
    return st.builds(
        lambda day, hour, minute: epoch + timedelta(days=day - 1, hours=hour, minutes=minute),
        days, hours, minutes,
    )  # fmt: skip


epochs = st.sampled_from(CLOCK_CHANGES)

amounts = st.sampled_from(
    [0, 1, 2, 5, 10, -3, 7.25, 19.99, 0.1, "12.50", "-4", "1e2", ".5", 123456789012345]
)
no_numbers = st.sampled_from(["", "n/a", "12,5", "1e999", "0x10", True, None, [1], {"a": 1}, 1e15])
values = st.one_of(amounts, amounts, no_numbers)


def properties(**of_each: st.SearchStrategy[Any]) -> st.SearchStrategy[Payload]:
    return st.fixed_dictionaries({}, optional=of_each)


def payloads(
    epoch: datetime,
    event_types: Sequence[str],
    properties: st.SearchStrategy[Payload],
    max_size: int = 40,
) -> st.SearchStrategy[list[Payload]]:
    optional = {
        "user_id": st.sampled_from(["u1", "u2", "u3", "u4"]),
        "account_id": st.sampled_from(["a1", "a2"]),
        "geo": st.fixed_dictionaries({}, optional={"country": st.sampled_from(["DE", "US"])}),
        "properties": properties,
    }
    event = st.fixed_dictionaries(
        {
            "event_type": st.sampled_from(event_types),
            "occurred_at": instants(epoch).map(datetime.isoformat),
        },
        optional=optional,
    )
    return dense_lists(event, max_size)


def dense_lists(items: st.SearchStrategy[Any], max_size: int) -> st.SearchStrategy[list[Any]]:
    """Lists alone are mostly of less than five: too few for what needs several events to show."""
    least = st.sampled_from([0, max_size // 2, max_size])
    return least.flatmap(lambda size: st.lists(items, min_size=size, max_size=max_size))


def ranges(epoch: datetime) -> st.SearchStrategy[tuple[datetime | None, datetime | None]]:
    """Ends on and off the boundaries of days, open or closed."""
    ends = st.one_of(st.none(), instants(epoch))
    return st.tuples(ends, ends).filter(lambda r: None in r or r[0] <= r[1])


@contextmanager
def loaded(
    db: psycopg.Connection, payloads: Sequence[Mapping[str, Any]], timezone: str = "UTC"
) -> Iterator[None]:
    """The payloads as facts, received in two batches, until the block ends."""
    with db.transaction(force_rollback=True):
        # The session's own time zone must not matter.
        db.execute("SET LOCAL timezone = 'America/St_Johns'")
        db.execute("SELECT spectrum.configure('timezone', %s)", (timezone,))
        half = len(payloads) // 2
        for part in (payloads[half:], payloads[:half]):
            load(db, part)
        yield


def load(db: psycopg.Connection, payloads: Sequence[Mapping[str, Any]]) -> None:
    with db.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
        for payload in payloads:
            copy.write_row((json.dumps(payload),))
    db.execute("CALL spectrum.process_batch()")
