"""Latency, errors, throughput and the catalog of events, from lists of events."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

from oracle_events import Calendar, Event, number, of_account, time_range

REQUESTS = ("request", "api_request")
JSON_TYPES = {
    str: "string", int: "number", float: "number", bool: "boolean", type(None): "null",
    list: "array", dict: "object",
}  # fmt: skip


def is_error(event: Event) -> bool:
    status = number(event.properties.get("status"))
    return (status is not None and status >= 500) or event.properties.get("error") is True


def text_of(value: object) -> str | None:
    """The values of the histories: texts and numbers. An empty name is none."""
    return None if value is None else str(value)[:200] or None


def in_order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Texts that are missing come last."""
    return tuple((part is None, part or "") if not isinstance(part, date) else part for part in key)


def percentile(ascending: Sequence[Fraction], fraction: Fraction) -> Fraction | None:
    if not ascending:
        return None
    below, part = divmod(fraction * (len(ascending) - 1), 1)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] * (1 - part) + ascending[above] * part


def grouped(
    everywhere: Sequence[Event],
    calendar: Calendar,
    period: str,
    start: datetime | None,
    end: datetime | None,
    account: str | None,
    names: Sequence[str],
    event_types: Sequence[str],
) -> Iterable[tuple[tuple[Any, ...], list[Event]]]:
    mine = of_account(everywhere, account)
    span = time_range(mine, everywhere, start, end)
    groups: dict[tuple[Any, ...], list[Event]] = defaultdict(list)
    for event in mine if span else []:
        if span[0] <= event.at < span[1] and event.event_type in event_types:
            first_day = calendar.start(period, calendar.day(event.at))
            values = (text_of(event.properties.get(name)) for name in names)
            groups[first_day, *values].append(event)
    return sorted(groups.items(), key=lambda group: in_order(group[0]))


def latency(
    everywhere: Sequence[Event],
    calendar: Calendar,
    start: datetime | None = None,
    end: datetime | None = None,
    period: str = "day",
    account: str | None = None,
) -> list[tuple[Any, ...]]:
    rows = []
    for key, events in grouped(
        everywhere, calendar, period, start, end, account, ["endpoint"], REQUESTS
    ):
        measured = sorted(
            Fraction(value)
            for event in events
            if (value := number(event.properties.get("latency_ms"))) is not None and value >= 0
        )
        errors = sum(map(is_error, events))
        parts = [percentile(measured, Fraction(part, 100)) for part in (50, 95, 99)]
        rows.append((*key, len(events), *parts, errors, errors / len(events), len(measured)))
    return rows


def error_rates(
    everywhere: Sequence[Event],
    calendar: Calendar,
    start: datetime | None = None,
    end: datetime | None = None,
    period: str = "day",
    account: str | None = None,
) -> list[tuple[Any, ...]]:
    rows = []
    for key, events in grouped(
        everywhere, calendar, period, start, end, account, ["service", "version"],
        [*REQUESTS, "error"],
    ):  # fmt: skip
        requests = [event for event in events if event.event_type != "error"]
        errors = sum(map(is_error, requests))
        rate = errors / len(requests) if requests else None
        rows.append((*key, len(requests), errors, rate, len(events) - len(requests)))
    return rows


def throughput(
    everywhere: Sequence[Event],
    calendar: Calendar,
    period: str = "minute",
    start: datetime | None = None,
    end: datetime | None = None,
    event_type: str | None = None,
    account: str | None = None,
) -> list[tuple[datetime, int]]:
    mine = of_account(everywhere, account)
    span = time_range(mine, everywhere, start, end)
    if span is None:
        return []
    zone = ZoneInfo(calendar.timezone)
    rows = []
    # From the midnight before on, by real time, and anew at each midnight.
    day = calendar.day(span[0])
    while (begin := datetime.combine(day, time(), zone).astimezone(UTC)) < span[1]:
        day += timedelta(days=1)
        midnight = datetime.combine(day, time(), zone).astimezone(UTC)
        while begin < midnight:
            finish = midnight if period == "day" else begin + timedelta(**{f"{period}s": 1})
            if finish > span[0] and begin < span[1]:
                low, high = max(begin, span[0]), min(finish, span[1])
                events = sum(
                    low <= event.at < high and event_type in (None, event.event_type)
                    for event in mine
                )
                rows.append((begin, events))
            begin = finish
    return rows


def event_catalog(everywhere: Sequence[Event], account: str | None = None) -> list[tuple[Any, ...]]:
    found: dict[tuple[str, str | None], list[tuple[datetime, str | None]]] = defaultdict(list)
    for event in of_account(everywhere, account):
        found[event.event_type, None].append((event.at, None))
        for name, value in event.properties.items():
            found[event.event_type, name].append((event.at, JSON_TYPES[type(value)]))
    return [
        (
            event_type, name, dict(Counter(kind for _, kind in seen)) if name is not None else None,
            len(seen), min(at for at, _ in seen), max(at for at, _ in seen),
        )
        for (event_type, name), seen in sorted(
            found.items(), key=lambda each: (each[0][0], each[0][1] is not None, each[0][1] or "")
        )
    ]  # fmt: skip
