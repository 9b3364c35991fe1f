"""Trends: one measure by period and breakdown, from lists of events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

from oracle_events import Calendar, Event, contains, number, of_account, time_range

PERCENTILES = {"p50": Fraction(1, 2), "p95": Fraction(95, 100), "p99": Fraction(99, 100)}


def breakdown_of(event: Event, breakdown: str | None) -> str | None:
    if breakdown is None:
        return None
    if breakdown == "event_type":
        return event.event_type
    if breakdown == "account_id":
        return event.account
    if breakdown in ("country", "region", "city"):
        return event.geo.get(breakdown)
    value = event.properties.get(breakdown)
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def measure_of(events: Sequence[Event], measure: str, wanted: str | None) -> Fraction | None:
    if measure == "events":
        return Fraction(len(events))
    if measure == "users":
        return Fraction(len({event.user for event in events} - {None}))
    numbers = sorted(
        Fraction(amount)
        for event in events
        if (amount := number(event.properties.get(wanted))) is not None
    )
    if measure == "sum":
        return sum(numbers, Fraction(0))
    if not numbers:
        return None
    if measure == "avg":
        return sum(numbers) / len(numbers)
    place = PERCENTILES[measure] * (len(numbers) - 1)
    below, part = divmod(place, 1)
    above = min(below + 1, len(numbers) - 1)
    return numbers[below] * (1 - part) + numbers[above] * part


def trend(
    everywhere: Sequence[Event],
    calendar: Calendar,
    event: str | None = None,
    period: str = "day",
    start: datetime | None = None,
    end: datetime | None = None,
    measure: str = "events",
    wanted: str | None = None,
    breakdown: str | None = None,
    account: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> dict[tuple[date, str | None], Fraction | Decimal | None]:
    mine = of_account(everywhere, account)
    span = time_range(mine, everywhere, start, end)
    if span is None:
        return {}
    asked = [
        each
        for each in mine
        if span[0] <= each.at < span[1]
        and event in (None, each.event_type)
        and contains(each.properties, where or {})
    ]
    cells: dict[tuple[date, str | None], list[Event]] = {
        (start_of, value): []
        for start_of in calendar.periods(period, *span)
        for value in ({breakdown_of(each, breakdown) for each in asked} if breakdown else {None})
    }
    for each in asked:
        start_of = calendar.start(period, calendar.day(each.at))
        cells[start_of, breakdown_of(each, breakdown)].append(each)
    return {key: measure_of(events, measure, wanted) for key, events in cells.items()}
