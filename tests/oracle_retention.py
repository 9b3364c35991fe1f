"""Retention, user by user and period by period, straight from its meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, NamedTuple

from oracle_events import Calendar, Event, contains, of_account, scopes


class Cell(NamedTuple):
    cohort: date
    period: int
    cohort_size: int
    users: int
    rate: float
    is_complete: bool


@dataclass(frozen=True)
class Options:
    start_event: str | None = None
    return_event: str | None = None
    period: str = "week"
    periods: int = 12
    start: datetime | None = None
    end: datetime | None = None
    cohort: str = "first"
    mode: str = "on"
    where: Mapping[str, Any] | None = None


def retention(
    everywhere: Sequence[Event],
    options: Options,
    calendar: Calendar,
    now: datetime,
    account: str | None = None,
) -> list[Cell]:
    histories: dict[str, list[Event]] = {}
    for event in of_account(everywhere, account):
        if event.user is not None and contains(event.properties, options.where or {}):
            histories.setdefault(event.user, []).append(event)

    def period_of(at: datetime) -> date:
        return calendar.start(options.period, calendar.day(at))

    # By cohort, each user of it with his first start in it.
    cohorts: dict[date, dict[str, datetime]] = {}
    for user, history in histories.items():
        starts = sorted(
            event.at
            for event in history
            if options.start_event in (None, event.event_type)
        )  # fmt: skip
        if options.cohort == "first":
            starts = starts[:1]
        for at in starts:
            inside = (options.start is None or at >= options.start) and (
                options.end is None or at < options.end
            )
            if inside:
                cohorts.setdefault(period_of(at), {}).setdefault(user, at)

    cells = []
    today = period_of(now)
    for cohort, first_starts in sorted(cohorts.items()):
        period, following = cohort, calendar.following(options.period, cohort)
        for number in range(options.periods + 1):
            if period > today:
                break
            users = sum(
                any(
                    counts(event, options, first_start, cohort, period, period_of(event.at))
                    for event in histories[user]
                )
                for user, first_start in first_starts.items()
            )
            size = len(first_starts)
            complete = options.mode == "on" and following <= today
            cells.append(Cell(cohort, number, size, users, users / size, complete))
            period, following = following, calendar.following(options.period, following)
    return cells


def counts(
    event: Event,
    options: Options,
    first_start: datetime,
    cohort: date,
    period: date,
    period_of_event: date,
) -> bool:
    """Whether the event brings its user back in a period."""
    if options.return_event not in (None, event.event_type):
        return False
    if period == cohort and event.at < first_start:
        return False
    return period_of_event == period or (
        options.mode == "on_or_after" and period_of_event > period
    )  # fmt: skip


def standing_retention(
    everywhere: Sequence[Event], options: Options, calendar: Calendar, now: datetime
) -> list[tuple[Any, ...]]:
    return [
        (scope, *cell)
        for scope, _ in scopes(everywhere)
        for cell in retention(
            everywhere, options, calendar, now, account=None if scope == "*" else scope
        )
    ]  # fmt: skip
