"""How the demo's month arrives: ids, the order of arrival, repeats, late and broken payloads.

`make_month()` gives the rows for raw_events and, beside them, what a right reading must count.
The same seed and the same last day give the same rows, byte for byte.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid5

from spectrum_shell.demo_data import DAYS, FUNNEL, SEED, Event, Story
from spectrum_shell.payload import encode_json

NAMESPACE = UUID("5bec7a11-0000-4000-8000-7469646c696e")
REPEAT_SHARE = 0.01
LATE_SHARE = 0.004
BROKEN_SHARE = 0.003


@dataclass(frozen=True, slots=True)
class Row:
    """A row for raw_events. Its id is derived, so that a second load finds the row there."""

    id: UUID
    payload: str


@dataclass(slots=True)
class Made:
    """What a right reading of the rows counts."""

    rows: int = 0
    events: int = 0
    repeats: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    by_type: Counter[str] = field(default_factory=Counter)
    users: int = 0
    accounts: int = 0
    funnel: dict[str, int] = field(default_factory=dict)
    units: Counter[str] = field(default_factory=Counter)
    units_left_out: int = 0
    gross: dict[str, Decimal] = field(default_factory=dict)
    refunds: dict[str, Decimal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Month:
    until: date
    rows: list[Row]
    made: Made


def make_month(until: date, seed: int = SEED, days: int = DAYS) -> Month:
    """The rows of the month that ends with the day `until`, in the order of their arrival."""
    story = Story(until, seed, days)
    events = [event for event in story.events() if story.starts <= event.at < story.ends]
    made = count(events)
    delivery = Delivery(story, events)
    rows = [row for _, row in sorted(delivery.arrivals(), key=lambda arrival: arrival[0])]
    made.rows, made.repeats, made.broken = len(rows), delivery.repeats, delivery.broken
    return Month(until, rows, made)


def launch_id(seed: int = SEED) -> UUID:
    """The id of the month's first row, the same for every last day: a later run looks for it."""
    return uuid5(NAMESPACE, f"{seed}/launch")


class Delivery:
    def __init__(self, story: Story, events: list[Event]) -> None:
        self.story = story
        self.events = events
        self.run = f"{story.seed}/{story.until}"
        self.repeats = 0
        self.broken: Counter[str] = Counter()

    def arrivals(self) -> Iterator[tuple[float, Row]]:
        """Rows with the time of their arrival: most within seconds, some days late, some twice."""
        rng = self.story.random("delivery")
        yield 0, Row(launch_id(self.story.seed), encode(payload(self.events[0], self.id(0))))
        for number, event in enumerate(self.events[1:], start=1):
            text = encode(payload(event, self.id(number)))
            arrives = event.at.timestamp() + rng.uniform(0, 5)
            if rng.random() < LATE_SHARE:
                arrives += rng.uniform(1, 6) * 86400
            yield arrives, Row(self.id(number, "row"), text)
            if rng.random() < REPEAT_SHARE:
                self.repeats += 1
                yield arrives + rng.expovariate(1 / 600), Row(self.id(number, "again"), text)
            if rng.random() < BROKEN_SHARE:
                kind = list(BREAKS)[self.broken.total() % len(BREAKS)]
                self.broken[kind] += 1
                broken = BREAKS[kind](payload(event, self.id(number, "broken")))
                yield arrives + 1, Row(self.id(number, "broken row"), encode(broken))

    def id(self, number: int, what: str = "event") -> UUID:
        return uuid5(NAMESPACE, f"{self.run}/{number}/{what}")


def payload(event: Event, event_id: UUID) -> dict[str, Any]:
    """The event as its tracker writes it: browsers send text, the API gateway milliseconds."""
    fields: dict[str, Any] = {"event_id": str(event_id), "event_type": event.event_type}
    if event.account:
        fields["account_id"] = event.account.account_id
    if event.person:
        place = event.person.place
        fields["user_id"] = event.person.user_id
        fields["geo"] = {"country": place.country, "region": place.region, "city": place.city}
    if event.event_type == "api_request":
        fields["timestamp"] = int(event.at.timestamp() * 1000)
    else:
        at = event.at.astimezone(UTC).replace(tzinfo=None)
        fields["occurred_at"] = at.isoformat(timespec="milliseconds") + "Z"
    fields["properties"] = event.properties
    return fields


def encode(value: Any) -> str:
    return encode_json(value).decode()


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda good: {**good, **fields}


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda good: {key: value for key, value in good.items() if key != name}


# What trackers get wrong. The first word of each name is the field that the failed row must name.
BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "payload is an array": lambda good: [good],
    "payload is text": encode,
    "payload is a number": lambda good: 42,
    "payload is null": lambda good: None,
    "event_type is missing": without("event_type"),
    "event_type is empty": changed(event_type=""),
    "event_type is an object": changed(event_type={"name": "page_view"}),
    "event_type is too long": changed(event_type="page_view_" * 40),
    "occurred_at is a word": changed(occurred_at="yesterday"),
    "occurred_at is infinite": changed(occurred_at="infinity"),
    "occurred_at is no date": changed(occurred_at="2026-13-45T25:61:61Z"),
    "occurred_at is too early": changed(occurred_at="1969-07-20T20:17:40Z"),
    "occurred_at is in the future": changed(occurred_at="2099-01-01T00:00:00Z"),
    "occurred_at is an object": changed(occurred_at={"seconds": 1767225600}),
    "user_id is an object": changed(user_id={"id": 7}),
    "user_id is too long": changed(user_id="u" * 201),
    "account_id is reserved": changed(account_id="*"),
    "account_id is an array": changed(account_id=["Acorn Robotics", "Bluefin Travel"]),
    "revenue is no number": changed(properties={"revenue": "nineteen dollars"}),
    "revenue is too large": changed(properties={"revenue": 1e15}),
    "currency is no code": changed(properties={"revenue": 19, "currency": "Dollars"}),
    "properties is an array": changed(properties=["plan", "team"]),
    "properties is text": changed(properties="plan=team"),
    "geo is text": changed(geo="Berlin, Germany"),
}


def count(events: Iterable[Event]) -> Made:
    """Count by the story itself, not by the rows: the other half of "made / counted"."""
    made = Made()
    users, accounts = set(), set()
    seen: dict[str, set[str]] = defaultdict(set)
    variants: dict[str, set[str]] = defaultdict(set)
    gross: dict[str, Decimal] = defaultdict(Decimal)
    refunds: dict[str, Decimal] = defaultdict(Decimal)
    for event in events:
        made.events += 1
        made.by_type[event.event_type] += 1
        if event.account:
            accounts.add(event.account.account_id)
        if event.person:
            users.add(event.person.user_id)
            seen[event.event_type].add(event.person.user_id)
        if event.event_type == "experiment_exposure":
            variants[event.person.user_id].add(event.properties["variant"])
        if "revenue" in event.properties:
            sums = refunds if event.event_type == "refund" else gross
            sums[event.properties["currency"]] += Decimal(str(event.properties["revenue"]))

    made.users, made.accounts = len(users), len(accounts)
    reached = users
    for step in FUNNEL:
        # A story takes the steps in their order, so whoever was seen at all of them went through.
        reached = reached & seen[step]
        made.funnel[step] = len(reached)
    made.units = Counter(next(iter(of_user)) for of_user in variants.values() if len(of_user) == 1)
    made.units_left_out = sum(len(of_user) > 1 for of_user in variants.values())
    made.gross, made.refunds = dict(gross), dict(refunds)
    return made
