"""Funnels by brute force: every entry and every choice of events, straight from their meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cache
from statistics import fmean, median
from typing import Any
from uuid import UUID

from oracle_events import ALL, Calendar, contains

Step = str | Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    at: datetime
    event_id: UUID
    event_type: str
    account: str | None = field(compare=False)
    user: str | None = field(compare=False)
    properties: Mapping[str, Any] = field(compare=False)
    geo: Mapping[str, str] = field(compare=False)

    def __lt__(self, other: Event) -> bool:
        return (self.at, self.event_id) < (other.at, other.event_id)


@dataclass(frozen=True)
class Options:
    window: timedelta = timedelta(days=14)
    order: str = "ordered"
    entry: str = "best"
    unit: str = "user"
    breakdown: str | None = None
    attribution: str = "first"
    exclude: Sequence[Step] = ()
    start: datetime | None = None
    end: datetime | None = None


@dataclass(frozen=True)
class Entry:
    """What a unit did: when it reached each step, and its value of the breakdown."""

    times: tuple[datetime, ...]
    breakdown: str | None


def read_events(payloads: Sequence[Mapping[str, Any]]) -> list[Event]:
    return [
        Event(
            at=datetime.fromisoformat(payload["occurred_at"]).astimezone(UTC),
            event_id=UUID(payload["event_id"]),
            event_type=payload["event_type"],
            account=payload.get("account_id"),
            user=payload.get("user_id"),
            properties=payload.get("properties", {}),
            geo=payload.get("geo", {}),
        )
        for payload in payloads
    ]


def fills(event: Event, step: Step) -> bool:
    if isinstance(step, str):
        return event.event_type == step
    return event.event_type == step["event"] and contains(
        event.properties, step.get("where", {})
    )  # fmt: skip


def label(event: Event, breakdown: str | None) -> str | None:
    """Its value of a breakdown as text; an empty text is none."""
    if breakdown is None:
        return None
    if breakdown == "account_id":
        return event.account
    if breakdown in ("country", "region", "city"):
        return event.geo.get(breakdown)
    value = event.properties.get(breakdown)
    return value or None if isinstance(value, str | None) else json.dumps(value)


def sessions(events: Sequence[Event]) -> Iterator[list[Event]]:
    current: list[Event] = []
    for event in sorted(events):
        if current and (
            event.at - current[-1].at > timedelta(minutes=30)
            or event.at - current[0].at > timedelta(hours=24)
        ):
            yield current
            current = []
        current.append(event)
    if current:
        yield current


def unit_histories(events: Sequence[Event], unit: str) -> Iterator[list[Event]]:
    histories: dict[str, list[Event]] = {}
    for event in events:
        key = event.account if unit == "account" else event.user
        if event.user is not None and key is not None:
            histories.setdefault(key, []).append(event)
    for history in histories.values():
        if unit == "session":
            yield from sessions(history)
        else:
            yield sorted(history)


def ordered_chain(
    history: Sequence[Event], entry: Event, steps: Sequence[Step], options: Options
) -> list[Event]:
    """The longest chain from an entry; of equal ones that of the earliest events."""

    def follows(event: Event, last: Event) -> bool:
        if not last.at < event.at <= entry.at + options.window:
            return False
        between = any(last.at < other.at < event.at for other in history)
        return not (options.order == "strict" and between)

    def longest(last: Event, step: int) -> list[Event]:
        """Of the chains that go on from an event, having filled a number of steps."""
        if step == len(steps):
            return []
        chains = [
            [event, *longest(event, step + 1)]
            for event in history
            if follows(event, last) and fills(event, steps[step])
        ]
        return min(chains, key=lambda chain: (-len(chain), chain), default=[])

    chain = [entry, *longest(entry, 1)]
    # A step is reached at the first event that can reach it, whatever comes of it later.
    for place in range(1, len(chain)):
        chain[place] = min(
            event
            for event in history
            if follows(event, chain[place - 1]) and fills(event, steps[place])
        )
    return chain


def any_order_chain(
    history: Sequence[Event], entry: Event, steps: Sequence[Step], options: Options
) -> list[Event]:
    """The events with each of which one step more can be filled."""

    @cache
    def most(events: tuple[Event, ...], open_steps: frozenset[int]) -> int:
        if not events:
            return 0
        first, rest = events[0], events[1:]
        taken = (most(rest, open_steps - {i}) + 1 for i in open_steps if fills(first, steps[i]))
        return max([most(rest, open_steps), *taken])

    everything = frozenset(range(len(steps)))
    inside = [
        event
        for event in history
        if entry.at <= event.at <= entry.at + options.window
        and any(fills(event, step) for step in steps)
    ]
    chain: list[Event] = []
    for count, event in enumerate(inside, start=1):
        if most(tuple(inside[:count]), everything) > len(chain):
            chain.append(event)
    return chain


def counted_entry(
    history: Sequence[Event], steps: Sequence[Step], options: Options
) -> Entry | None:
    begins = steps if options.order == "any" else steps[:1]
    find = any_order_chain if options.order == "any" else ordered_chain
    entries = [
        event
        for event in history
        if any(fills(event, step) for step in begins)
        and (options.start is None or event.at >= options.start)
        and (options.end is None or event.at < options.end)
    ]
    if options.entry == "first":
        entries = entries[:1]
    chains = [find(history, entry, steps, options) for entry in entries]
    valid = [
        chain
        for chain in chains
        if not any(
            fills(event, step) and chain[0].at < event.at < chain[-1].at
            for event in history
            for step in options.exclude
        )
    ]
    if not valid:
        return None
    best = min(valid, key=lambda chain: (-len(chain), chain[0]))
    labelled = best[-1] if options.attribution == "last" else best[0]
    return Entry(tuple(event.at for event in best), label(labelled, options.breakdown))


def entries_of(events: Sequence[Event], steps: Sequence[Step], options: Options) -> list[Entry]:
    entries = (
        counted_entry(history, steps, options)
        for history in unit_histories(events, options.unit)
    )  # fmt: skip
    return [entry for entry in entries if entry is not None]


def step_rows(entries: Sequence[Entry], steps: Sequence[Step]) -> Iterator[tuple[Any, ...]]:
    start = previous = len(entries)
    for number, step in enumerate(steps, start=1):
        reached = [entry for entry in entries if len(entry.times) >= number]
        seconds = [
            (entry.times[number - 1] - entry.times[number - 2]).total_seconds()
            for entry in reached
            if number > 1
        ]
        yield (
            number,
            step if isinstance(step, str) else step["event"],
            len(reached),
            len(reached) / start if start else 0.0,
            len(reached) / previous if previous else 0.0,
            median(seconds) if seconds else None,
            fmean(seconds) if seconds else None,
        )
        previous = len(reached)


def funnel(
    events: Sequence[Event],
    steps: Sequence[Step],
    options: Options = Options(),
    account: str | None = None,
) -> list[tuple[Any, ...]]:
    """The rows of analytics.funnel()."""
    scope = [event for event in events if account in (None, event.account)]
    entries = entries_of(scope, steps, options)
    labels = {entry.breakdown for entry in entries} or {None}
    return [
        (each, *row)
        for each in sorted(labels, key=lambda text: (text is None, text or ""))
        for row in step_rows([entry for entry in entries if entry.breakdown == each], steps)
    ]


def accounts_of(events: Sequence[Event]) -> list[str | None]:
    return [None, *sorted({event.account for event in events if event.account is not None})]


def standing_funnel(
    events: Sequence[Event], steps: Sequence[Step], options: Options
) -> list[tuple[Any, ...]]:
    """The rows of analytics.conversion_funnels: an account without an entry has none."""
    rows: list[tuple[Any, ...]] = []
    for account in accounts_of(events):
        of_account = funnel(events, steps, options, account)
        if account is None or of_account[0][3] > 0:
            rows += [(account or ALL, *row) for row in of_account]
    return rows


def standing_days(
    events: Sequence[Event], steps: Sequence[Step], options: Options, calendar: Calendar
) -> list[tuple[str, date, int, int]]:
    """The rows of analytics.funnel_days."""
    rows = []
    for account in accounts_of(events):
        scope = [event for event in events if account in (None, event.account)]
        entries = entries_of(scope, steps, options)
        for day in sorted({calendar.day(entry.times[0]) for entry in entries}):
            of_day = [entry for entry in entries if calendar.day(entry.times[0]) == day]
            for number in range(1, len(steps) + 1):
                users = sum(len(entry.times) >= number for entry in of_day)
                rows.append((account or ALL, day, number, users))
    return rows
