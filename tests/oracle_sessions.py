"""Sessions, their days, what brought them and what follows what inside them: plain Python over the
payloads, user by user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from oracle_events import Calendar, contains, number

Payload = Mapping[str, Any]
Place = tuple[str | None, str | None, str | None]

BREAKDOWNS = (
    None, "country", "region", "city", "entry_page", "exit_page", "utm_source", "utm_medium",
    "utm_campaign", "channel",
)  # fmt: skip
TOUCHES = {"first_touch": 0, "last_touch": -1}
GAP, LONGEST, LOOKBACK = timedelta(minutes=30), timedelta(hours=24), timedelta(hours=720)
MEDIUMS = {
    "cpc": "paid search", "ppc": "paid search", "paid_search": "paid search",
    "paid-social": "paid social", "display": "display", "CPM": "display", "Email": "email",
    "newsletter": "email", "social": "social", "social media": "social",
    "affiliate": "affiliate", "organic": "organic search", "referral": "referral",
}  # fmt: skip
HOSTS = {
    "google.com": "organic search", "google.co.uk": "organic search",
    "m.bing.com": "organic search",
    "mail.google.com": "referral", "google.com.evil.example": "referral",
    "l.facebook.com": "social", "t.co": "social", "notfacebook.com": "referral",
}  # fmt: skip


def at_of(payload: Payload) -> datetime:
    return datetime.fromisoformat(payload["occurred_at"]).astimezone(UTC)


def said(payload: Payload, *names: str) -> str | None:
    properties = payload.get("properties", {})
    return next((properties[name] for name in names if properties.get(name)), None)


@dataclass(frozen=True)
class Touch:
    source: str | None
    medium: str | None
    campaign: str | None
    referrer: str | None

    @property
    def is_tagged(self) -> bool:
        return (self.source, self.medium, self.campaign) != (None, None, None)

    @property
    def is_touch(self) -> bool:
        return self.is_tagged or self.referrer is not None

    @property
    def host(self) -> str | None:
        if self.referrer is None:
            return None
        address = self.referrer if "//" in self.referrer else f"//{self.referrer}"
        host = urlsplit(address).hostname
        return host.removeprefix("www.") if host else None

    @property
    def channel(self) -> str:
        if self.is_tagged:
            return MEDIUMS.get(self.medium or "", "other")
        if self.referrer is not None:
            return HOSTS.get(self.host or "", "referral")
        return "direct"


@dataclass(frozen=True)
class Visit:
    """One session of a user: its events in order."""

    user: str
    payloads: Sequence[Payload]

    @property
    def started_at(self) -> datetime:
        return at_of(self.payloads[0])

    @property
    def ended_at(self) -> datetime:
        return at_of(self.payloads[-1])

    @property
    def span(self) -> tuple[datetime, datetime]:
        return self.started_at, self.ended_at

    @property
    def seconds(self) -> float:
        return (self.ended_at - self.started_at).total_seconds()

    @property
    def pages(self) -> list[str | None]:
        return [
            said(payload, "path", "url", "page")
            for payload in self.payloads
            if payload["event_type"] in ("page_view", "$pageview")
        ]

    @property
    def is_bounce(self) -> bool:
        return len(self.pages or self.payloads) == 1

    @property
    def touch(self) -> Touch:
        names = ("utm_source", "utm_medium", "utm_campaign", "referrer")
        return Touch(*(said(self.payloads[0], name) for name in names))

    @property
    def places(self) -> tuple[Place, Place]:
        nowhere: Place = (None, None, None)
        known = [
            place
            for payload in self.payloads
            if (place := tuple(map(payload.get("geo", {}).get, ("country", "region", "city"))))
            != nowhere
        ]
        return (known[0], known[-1]) if known else (nowhere, nowhere)

    def row(self) -> tuple[Any, ...]:
        """As analytics.sessions shows it."""
        pages, touch = self.pages or [None], self.touch
        return (
            self.user, self.started_at, self.ended_at, self.seconds, len(self.payloads),
            len(self.pages), self.is_bounce, pages[0], pages[-1], touch.channel, touch.source,
            touch.medium, touch.campaign, touch.referrer, *self.places[0], *self.places[1],
        )  # fmt: skip

    def breakdown(self, name: str | None) -> str | None:
        if name is None:
            return None
        if name in ("country", "region", "city"):
            return self.places[0][("country", "region", "city").index(name)]
        if name in ("entry_page", "exit_page"):
            pages = self.pages or [None]
            return pages[0 if name == "entry_page" else -1]
        return str(found) if (found := getattr(self.touch, name.removeprefix("utm_"))) else None


def visits(payloads: Iterable[Payload], account: str | None = None) -> list[Visit]:
    """Of the account's events alone; an event that came twice is one."""
    histories: dict[str, dict[str, Payload]] = {}
    for payload in payloads:
        user = payload.get("user_id")
        if user is not None and account in (None, payload.get("account_id")):
            histories.setdefault(user, {}).setdefault(payload["event_id"], payload)
    found = [
        Visit(user, session)
        for user, history in histories.items()
        for session in cut(sorted(history.values(), key=lambda p: (at_of(p), p["event_id"])))
    ]
    return sorted(found, key=lambda visit: (visit.started_at, visit.user))


def cut(history: Sequence[Payload]) -> Iterator[list[Payload]]:
    session: list[Payload] = []
    for payload in history:
        at = at_of(payload)
        if session and (at - at_of(session[-1]) > GAP or at - at_of(session[0]) > LONGEST):
            yield session
            session = []
        session.append(payload)
    if session:
        yield session


def inside(at: datetime, start: datetime | None, end: datetime | None) -> bool:
    return (start is None or at >= start) and (end is None or at < end)


def sessions(
    payloads: Iterable[Payload],
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
) -> list[Visit]:
    return [v for v in visits(payloads, account) if inside(v.started_at, start, end)]


def sessions_daily(
    payloads: Sequence[Payload],
    calendar: Calendar,
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
    breakdown: str | None = None,
) -> dict[tuple[date, str | None], tuple[Any, ...]]:
    cells: dict[tuple[date, str | None], list[Visit]] = {}
    times = [at_of(p) for p in payloads if account in (None, p.get("account_id"))]
    first = start or min(times, default=None)
    latest = max(map(at_of, payloads), default=None)
    stop = end or (latest + timedelta(microseconds=1) if latest else None)
    if breakdown is None and first and stop and first < stop:
        cells = {(day, None): [] for day in calendar.periods("day", first, stop)}
    everything = visits(payloads, account)
    for visit in sessions(payloads, start, end, account):
        if breakdown in TOUCHES:
            label = touches_before(visit, everything)[TOUCHES[breakdown]].channel
        else:
            label = visit.breakdown(breakdown)
        key = (calendar.day(visit.started_at), label)
        cells.setdefault(key, []).append(visit)
    return {key: summary(visits_of_day) for key, visits_of_day in cells.items()}


def summary(some: Sequence[Visit]) -> tuple[Any, ...]:
    bounces = sum(visit.is_bounce for visit in some)
    seconds = [Fraction(visit.seconds).limit_denominator(10**6) for visit in some]
    return (
        len(some),
        len({visit.user for visit in some}),
        bounces,
        bounces / len(some) if some else None,
        float(sum(seconds) / len(some)) if some else None,
        float(median(seconds)) if some else None,
        sum(len(visit.payloads) for visit in some),
        sum(len(visit.pages) for visit in some),
    )


def touches_before(visit: Visit, everything: Sequence[Visit]) -> list[Touch]:
    """Those of the 30 days up to and including the visit, in their order."""
    return [
        earlier.touch
        for earlier in everything
        if earlier.user == visit.user
        and visit.started_at - LOOKBACK <= earlier.started_at <= visit.started_at
        and earlier.touch.is_touch
    ] or [Touch(None, None, None, None)]


def standing_sessions_daily(
    payloads: Sequence[Payload], calendar: Calendar
) -> dict[tuple[str, date, str, str | None], tuple[Any, ...]]:
    """By account (* is all), day, breakdown (all is none) and value; medians are not kept."""
    cells: dict[tuple[str, date, str, str | None], list[Visit]] = {}
    for account in {None, *(payload.get("account_id") for payload in payloads)}:
        everything = visits(payloads, account)
        for visit in everything:
            touches = touches_before(visit, everything)
            labels = {name or "all": visit.breakdown(name) for name in BREAKDOWNS}
            labels |= {name: touches[index].channel for name, index in TOUCHES.items()}
            for name, label in labels.items():
                key = (account or "*", calendar.day(visit.started_at), name, label)
                cells.setdefault(key, []).append(visit)
    return {key: (*(found := summary(some))[:5], *found[6:]) for key, some in cells.items()}


Credit = tuple[str | None, ...]
Amounts = tuple[int, int, Decimal | None]


def conversions(
    payloads: Sequence[Payload],
    event: str,
    where: Mapping[str, Any],
    model: str,
    account: str | None = None,
) -> Iterator[tuple[datetime, Credit, str, Decimal | None]]:
    """When, what it is given to (with its currency), by whom, and its money."""
    everything = visits(payloads, account)
    for visit in everything:
        for payload in visit.payloads:
            properties = payload.get("properties", {})
            if payload["event_type"] == event and contains(properties, where):
                touch = touches_before(visit, everything)[0 if model == "first" else -1]
                amount = number(properties.get("revenue"))
                currency = None if amount is None else properties.get("currency", "USD")
                source = touch.source if touch.is_tagged else touch.host
                credit = (touch.channel, source, touch.medium, touch.campaign, currency)
                yield at_of(payload), credit, visit.user, amount


def added_up(found: Mapping[Any, Sequence[tuple[str, Decimal | None]]]) -> dict[Any, Amounts]:
    return {
        key: (
            len(conversions),
            len({user for user, _ in conversions}),
            None if key[-1] is None else sum((a for _, a in conversions if a), Decimal(0)),
        )
        for key, conversions in found.items()
    }


def attribution(
    payloads: Sequence[Payload],
    event: str,
    where: Mapping[str, Any],
    model: str,
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
) -> dict[Credit, Amounts]:
    found: dict[Credit, list[tuple[str, Decimal | None]]] = {}
    for at, credit, user, amount in conversions(payloads, event, where, model, account):
        if inside(at, start, end):
            found.setdefault(credit, []).append((user, amount))
    return added_up(found)


def standing_attribution(
    payloads: Sequence[Payload],
    calendar: Calendar,
    event: str,
    where: Mapping[str, Any],
    model: str,
) -> dict[tuple[Any, ...], Amounts]:
    """By account (* is all), day and what a conversion is given to."""
    found: dict[tuple[Any, ...], list[tuple[str, Decimal | None]]] = {}
    for account in {None, *(payload.get("account_id") for payload in payloads)}:
        for at, credit, user, amount in conversions(payloads, event, where, model, account):
            key = (account or "*", calendar.day(at), *credit)
            found.setdefault(key, []).append((user, amount))
    return added_up(found)


def edges(visit: Visit, start_event: str | None, max_steps: int) -> Iterator[tuple[int, str, str]]:
    types = [payload["event_type"] for payload in visit.payloads]
    if start_event is not None:
        types = types[types.index(start_event) :] if start_event in types else []
    for step in range(1, min(max_steps + 1, len(types))):
        yield step, types[step - 1], types[step]


def standing_paths(
    payloads: Sequence[Payload], calendar: Calendar, start_event: str | None, max_steps: int
) -> dict[tuple[str, date, int, str, str], tuple[int, int]]:
    """By account (* is all), day of the session, step, source and target."""
    found: dict[tuple[str, date, int, str, str], list[str]] = {}
    for account in {None, *(payload.get("account_id") for payload in payloads)}:
        for visit in visits(payloads, account):
            for edge in edges(visit, start_event, max_steps):
                key = (account or "*", calendar.day(visit.started_at), *edge)
                found.setdefault(key, []).append(visit.user)
    return {key: (len(users), len(set(users))) for key, users in found.items()}


def paths(
    payloads: Sequence[Payload],
    start_event: str | None = None,
    max_steps: int = 5,
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
) -> dict[tuple[int, str, str], tuple[int, int]]:
    transitions: Counter[tuple[int, str, str]] = Counter()
    users: dict[tuple[int, str, str], set[str]] = {}
    for visit in sessions(payloads, start, end, account):
        for edge in edges(visit, start_event, max_steps):
            transitions[edge] += 1
            users.setdefault(edge, set()).add(visit.user)
    return {edge: (count, len(users[edge])) for edge, count in transitions.items()}
