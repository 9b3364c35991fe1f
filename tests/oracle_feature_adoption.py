"""Feature adoption, user by user: which features an event is a use of, and who was there before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

from oracle_events import Calendar, Event, contains, of_account
from oracle_lifecycle import users_by_period, whole_periods

# By name: an event type or any, and what the properties contain.
Definitions = Mapping[str, tuple[str | None, Mapping[str, Any] | None]]


class Cell(NamedTuple):
    feature: str
    cohort_week: date
    period: date
    active_users: int
    users: int
    first_users: int
    repeat_users: int
    rate: float


def features_of(event: Event, definitions: Definitions) -> set[str]:
    features = {
        name
        for name, (event_type, where) in definitions.items()
        if event_type in (None, event.event_type) and contains(event.properties, where or {})
    }
    if event.event_type == "feature_used":
        named = event.properties.get("feature")
        if named not in (None, "") and len(str(named)) <= 200 and str(named) not in definitions:
            features.add(str(named))
    return features


def feature_adoption(
    everywhere: Sequence[Event],
    calendar: Calendar,
    definitions: Definitions,
    feature: str | None = None,
    period: str = "week",
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
) -> list[Cell]:
    events = [event for event in of_account(everywhere, account) if event.user is not None]
    first_weeks = {
        event.user: calendar.start("week", calendar.day(event.at))
        for event in sorted(events, key=lambda event: event.at, reverse=True)
    }  # fmt: skip
    active = users_by_period(events, period, calendar)
    periods = whole_periods(everywhere, active, period, calendar, start, end)

    uses: dict[str, dict[date, set[str]]] = {name: {} for name in definitions}
    for event in events:
        at = calendar.start(period, calendar.day(event.at))
        if periods and at <= periods[-1] and event.user is not None:
            for name in features_of(event, definitions):
                uses.setdefault(name, {}).setdefault(at, set()).add(event.user)
    shown = sorted(uses) if feature is None else [feature]

    cells = []
    for name in shown:
        for week in sorted(set(first_weeks.values())):
            for at in periods:
                cohort = {user for user in active.get(at, ()) if first_weeks[user] == week}
                used = cohort & uses.get(name, {}).get(at, set())
                before = set().union(*(
                    users for other, users in uses.get(name, {}).items() if other < at
                ))  # fmt: skip
                first = used - before
                if cohort:
                    cells.append(
                        Cell(name, week, at, len(cohort), len(used), len(first),
                             len(used & before), len(used) / len(cohort))
                    )  # fmt: skip
    return cells
