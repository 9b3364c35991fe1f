"""Stickiness: each user's active periods, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime
from typing import NamedTuple

from oracle_events import Calendar, Event, of_account
from oracle_lifecycle import users_by_period, whole_periods


class Cell(NamedTuple):
    periods: int
    users_exactly: int
    users_at_least: int


def stickiness(
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
    periods = whole_periods(everywhere, active, period, calendar, start, end)
    times = Counter(user for at in periods for user in active.get(at, set()))
    return [
        Cell(
            number,
            sum(count == number for count in times.values()),
            sum(count >= number for count in times.values()),
        )
        for number in range(1, len(periods) + 1)
    ]


class PeriodCell(NamedTuple):
    period: date
    days: int
    users_exactly: int
    users_at_least: int


def stickiness_periods(
    events: Sequence[Event], calendar: Calendar, period: str, account: str | None = None
) -> list[PeriodCell]:
    """Of each week or month with an active user, whose days are counted, all numbers of days."""
    cells = []
    by_day = users_by_period(of_account(events, account), "day", calendar)
    for start in sorted({calendar.start(period, day) for day in by_day}):
        end = calendar.following(period, start)
        times = Counter(
            user for day, users in by_day.items() if start <= day < end for user in users
        )
        for number in range(1, (end - start).days + 1):
            exactly = sum(count == number for count in times.values())
            at_least = sum(count >= number for count in times.values())
            cells.append(PeriodCell(start, number, exactly, at_least))
    return cells
