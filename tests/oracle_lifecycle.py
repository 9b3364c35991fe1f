"""Lifecycle, period by period: who of the users of a period was active when before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from typing import NamedTuple

from oracle_events import Calendar, Event, of_account


class Cell(NamedTuple):
    period: date
    new: int
    returning: int
    resurrecting: int
    dormant: int


def users_by_period(
    events: Iterable[Event], period: str, calendar: Calendar
) -> dict[date, set[str]]:
    users: dict[date, set[str]] = {}
    for event in events:
        if event.user is not None:
            start = calendar.start(period, calendar.day(event.at))
            users.setdefault(start, set()).add(event.user)
    return users


def whole_periods(
    everywhere: Sequence[Event],
    active: Iterable[date],
    period: str,
    calendar: Calendar,
    start: datetime | None,
    end: datetime | None,
) -> list[date]:
    """Those that the range touches; an open one begins with the first active one and ends with the
    last event of all."""
    last_at = max((event.at for event in everywhere), default=None)
    stop = end or (last_at + timedelta(microseconds=1) if last_at else None)
    if stop is None or (start is not None and start >= stop):
        return []
    last = calendar.start(period, calendar.day(stop - timedelta(microseconds=1)))
    first = calendar.start(period, calendar.day(start)) if start else min(active, default=None)
    periods, at = [], first
    while at is not None and at <= last:
        periods.append(at)
        at = calendar.following(period, at)
    return periods


def lifecycle(
    everywhere: Sequence[Event],
    calendar: Calendar,
    period: str,
    start: datetime | None = None,
    end: datetime | None = None,
    event_type: str | None = None,
    account: str | None = None,
) -> list[Cell]:
    active = users_by_period(
        (e for e in of_account(everywhere, account) if event_type in (None, e.event_type)),
        period, calendar,
    )  # fmt: skip
    cells = []
    for at in whole_periods(everywhere, active, period, calendar, start, end):
        now = active.get(at, set())
        before = active.get(calendar.start(period, at - timedelta(days=1)), set())
        ever = set().union(*(users for other, users in active.items() if other < at))
        cells.append(
            Cell(at, len(now - ever), len(now & before), len((now & ever) - before),
                 -len(before - now))
        )  # fmt: skip
    return cells
