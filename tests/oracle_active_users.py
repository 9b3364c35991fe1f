"""Daily, weekly and monthly active users, counted day by day."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import NamedTuple

from oracle_events import Calendar, Event, of_account, scopes


class ActiveDay(NamedTuple):
    day: date
    dau: int
    wau: int
    mau: int
    stickiness: float | None


def active_users(
    everywhere: Sequence[Event],
    calendar: Calendar,
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
) -> list[ActiveDay]:
    users: dict[date, set[str]] = {}
    for event in of_account(everywhere, account):
        if event.user is not None:
            users.setdefault(calendar.day(event.at), set()).add(event.user)

    # Whole days count: an open range begins with the first active day, not with its first event.
    last = max((event.at for event in everywhere), default=None)
    stop = end or (last + timedelta(microseconds=1) if last else None)
    if stop is None or (start is None and not users) or (start and start >= stop):
        return []
    day = calendar.day(start) if start else min(users)
    rows = []
    while day <= calendar.day(stop - timedelta(microseconds=1)):
        rows.append(count_day(users, day))
        day += timedelta(days=1)
    return rows


def count_day(users: dict[date, set[str]], day: date) -> ActiveDay:
    def during(days: int) -> int:
        window = (day - timedelta(days=back) for back in range(days))
        return len(set().union(*(users.get(each, set()) for each in window)))

    dau, mau = during(1), during(30)
    return ActiveDay(day, dau, during(7), mau, dau / mau if mau else None)


def standing_active_users(
    everywhere: Sequence[Event], calendar: Calendar
) -> list[tuple[str, *tuple[object, ...]]]:
    return [
        (scope, *row)
        for scope, _ in scopes(everywhere)
        for row in active_users(
            everywhere, calendar, account=None if scope == "*" else scope
        )
    ]  # fmt: skip
