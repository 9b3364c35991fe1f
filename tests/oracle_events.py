"""What an event says and which calendar period holds it: plain Python, no SQL.

The oracles beside this file answer a question once more, event by event, from the payloads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

ALL = "*"


@dataclass(frozen=True)
class Calendar:
    timezone: str = "UTC"
    week_start: int = 1

    def day(self, at: datetime) -> date:
        return at.astimezone(ZoneInfo(self.timezone)).date()

    def start(self, period: str, day: date) -> date:
        if period == "day":
            return day
        if period == "month":
            return day.replace(day=1)
        return day - timedelta(days=(day.isoweekday() - self.week_start) % 7)

    def following(self, period: str, start: date) -> date:
        if period == "month":
            return (start + timedelta(days=31)).replace(day=1)
        return start + timedelta(days=7 if period == "week" else 1)

    def periods(self, period: str, first_at: datetime, end_at: datetime) -> list[date]:
        """The periods that [first_at, end_at) touches."""
        start = self.start(period, self.day(first_at))
        last = self.start(period, self.day(end_at - timedelta(microseconds=1)))
        periods = []
        while start <= last:
            periods.append(start)
            start = self.following(period, start)
        return periods


def number(value: object) -> Decimal | None:
    """The number that a property is."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    text = str(value)
    if isinstance(value, str) and not (text.isascii() and text.strip("0123456789.-+eE") == ""):
        return None
    try:
        amount = Decimal(text)
    except ArithmeticError:
        return None
    return amount if abs(amount) < Decimal(10) ** 15 else None


@dataclass(frozen=True)
class Event:
    at: datetime
    event_type: str
    account: str | None
    user: str | None
    properties: Mapping[str, Any]
    geo: Mapping[str, str]
    currency: str

    @property
    def revenue(self) -> Decimal | None:
        return number(self.properties.get("revenue"))


def read_events(payloads: Iterable[Mapping[str, Any]], currency: str = "USD") -> list[Event]:
    return [
        Event(
            at=datetime.fromisoformat(payload["occurred_at"]).astimezone(UTC),
            event_type=payload["event_type"],
            account=payload.get("account_id"),
            user=payload.get("user_id"),
            properties=payload.get("properties", {}),
            geo=payload.get("geo", {}),
            currency=payload.get("properties", {}).get("currency", currency).upper(),
        )
        for payload in payloads
    ]


def of_account(events: Iterable[Event], account: str | None) -> list[Event]:
    return [event for event in events if account in (None, event.account)]


def scopes(events: Iterable[Event]) -> Iterator[tuple[str, list[Event]]]:
    """All accounts together, then each by itself."""
    events = list(events)
    yield ALL, events
    for account in sorted({event.account for event in events if event.account is not None}):
        yield account, of_account(events, account)


def contains(properties: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """JSON containment, for objects whose values are scalars."""
    return all(
        key in properties
        and properties[key] == value
        and isinstance(properties[key], bool) == isinstance(value, bool)
        for key, value in wanted.items()
    )


def time_range(
    events: Iterable[Event],
    everywhere: Iterable[Event],
    start: datetime | None,
    end: datetime | None,
) -> tuple[datetime, datetime] | None:
    """An open range begins with the first event asked about and ends with the last of all."""
    first = start or min((event.at for event in events), default=None)
    last = max((event.at for event in everywhere), default=None)
    stop = end or (last + timedelta(microseconds=1) if last else None)
    if first is None or stop is None or first >= stop:
        return None
    return first, stop
