"""What must be true once all is processed, worked out from the clients' journal alone.

Nothing here asks Spectrum what an event means: payloads are read by oracle_reading, and the numbers
of the views are made by the oracles beside it, in plain Python. spectrum.verify() is asked too.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from oracle_active_users import standing_active_users
from oracle_events import Calendar, Event, scopes
from oracle_reading import Unreadable, read
from oracle_retention import Options, standing_retention
from oracle_revenue import standing_revenue

from .events import FUNNEL, mark_of
from .journal import Fate, Journal


class Raw(NamedTuple):
    seq: int
    id: UUID
    payload: Any
    received_at: datetime
    status: str
    error_msg: str | None
    copy_of: UUID | None
    attempts: int


class Reading(NamedTuple):
    raw: Raw
    fields: dict[str, Any] | None
    refused: str | None


@dataclass
class Finding:
    """What a check of one database found. All counts but the first four have to be zero."""

    events: int = 0
    facts: int = 0
    copies: int = 0
    failed: int = 0
    in_doubt: int = 0
    lost: int = 0
    doubled: int = 0
    left: int = 0
    views: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not (self.lost or self.doubled or self.left or self.views or self.wrong)


def decoded(payload: str) -> Any:
    return json.loads(payload, parse_float=Decimal, parse_int=Decimal)


def check(db: psycopg.Connection, journal: Journal) -> Finding:
    """Of a database in which nothing is under way and nothing waits."""
    found = Finding()
    raws = [
        Raw(seq, raw_id, decoded(payload), *rest)
        for seq, raw_id, payload, *rest in db.execute(
            "SELECT seq, id, payload::text, received_at, status, error_msg, copy_of, attempts"
            " FROM raw_events ORDER BY seq"
        )
    ]
    check_arrivals(raws, journal, found)
    readings = [reading_of(raw) for raw in raws]
    owners = first_readable(readings)
    check_rows(readings, owners, found)
    check_facts(db, owners, found)
    check_batches(db, raws, found)
    check_views(db, owners, found)
    return found


def check_arrivals(raws: list[Raw], journal: Journal, found: Finding) -> None:
    """All of what was acknowledged, nothing of what was not sent, in doubt all or nothing."""
    here = Counter(mark_of(raw.payload) for raw in raws)
    sent = {}
    for transaction in journal.transactions:
        marks = transaction.marks()
        sent |= dict(zip(marks, transaction.payloads, strict=True))
        there = sum(here[mark] > 0 for mark in marks)
        if transaction.fate is Fate.COMMITTED and there < len(marks):
            found.lost += len(marks) - there
            found.wrong.append(f"{transaction.client}: lost at the door: {marks}")
        elif transaction.fate is Fate.OPEN and there:
            found.wrong.append(f"{transaction.client}: rolled back, yet there: {marks}")
        elif transaction.fate is Fate.SENT:
            found.in_doubt += 1
            if there not in (0, len(marks)):
                found.wrong.append(f"{transaction.client}: {there} of {len(marks)} are there")
    found.events = len(raws)
    found.doubled += sum(count - 1 for count in here.values())
    for raw in raws:
        mark = mark_of(raw.payload)
        if mark not in sent:
            found.wrong.append(f"nobody sent {mark}")
        elif decoded(sent[mark]) != raw.payload:
            found.wrong.append(f"{mark} is not what was sent")


def reading_of(raw: Raw) -> Reading:
    try:
        return Reading(raw, read(raw.payload, raw.id, raw.received_at), None)
    except Unreadable as unreadable:
        return Reading(raw, None, str(unreadable))


def first_readable(readings: list[Reading]) -> dict[UUID, Reading]:
    """Of each event the row that counts: the first received that can be read."""
    owners: dict[UUID, Reading] = {}
    for reading in readings:
        if reading.fields:
            owners.setdefault(reading.fields["event_id"], reading)
    return owners


def check_rows(readings: list[Reading], owners: dict[UUID, Reading], found: Finding) -> None:
    """Each row is done or failed, a copy names the row it repeats, a failure its field."""
    for raw, fields, refused in readings:
        if raw.status in ("pending", "processing"):
            found.left += 1
            continue
        if fields is None:
            found.failed += 1
            if raw.status != "failed" or not (raw.error_msg or "").startswith(f"{refused}: "):
                found.wrong.append(f"row {raw.seq}: {raw.status} {raw.error_msg}, not {refused}")
            continue
        owner = owners[fields["event_id"]].raw
        copy_of = None if owner is raw else owner.id
        found.copies += copy_of is not None
        if (raw.status, raw.copy_of, raw.error_msg) != ("done", copy_of, None):
            found.wrong.append(
                f"row {raw.seq}: {raw.status}, copy of {raw.copy_of}, not {copy_of},"
                f" {raw.error_msg}"
            )


def check_facts(db: psycopg.Connection, owners: dict[UUID, Reading], found: Finding) -> None:
    """A fact for each event, with what its row says, and no other."""
    facts = Counter[UUID]()
    for event_id, *fact in db.execute(
        "SELECT event_id, event_type, coalesce(account_id, ''), coalesce(user_id, ''),"
        " occurred_at, coalesce(country, ''), coalesce(region, ''), coalesce(city, ''),"
        " revenue, currency FROM analytics.events"
    ):
        facts[event_id] += 1
        reading = owners.get(event_id)
        if reading is None or reading.fields is None:
            found.wrong.append(f"fact {event_id}: no event says so")
        elif fact != list(reading.fields.values())[1:]:
            found.wrong.append(f"fact {event_id} is not what row {reading.raw.seq} says: {fact}")
    found.facts = facts.total()
    found.doubled += sum(count - 1 for count in facts.values())
    missing = [owner for event_id, owner in owners.items() if not facts[event_id]]
    # A row that still waits is not lost.
    found.lost += sum(owner.raw.status in ("done", "failed") for owner in missing)
    ledger = dict(db.execute("SELECT event_id, seq FROM warehouse.event_ledger").fetchall())
    expected = {event_id: owner.raw.seq for event_id, owner in owners.items()}
    if ledger != expected:
        found.wrong.append(f"the ledger: {len(set(ledger.items()) ^ set(expected.items()))} differ")


def check_batches(db: psycopg.Connection, raws: list[Raw], found: Finding) -> None:
    """A batch and its row in the run log are one transaction, so what they say they claimed is what
    was marked: a row that two batches took at once was claimed twice and marked once."""
    ((claimed,),) = db.execute(
        "SELECT coalesce(sum(claimed), 0) FROM spectrum.run_log WHERE step = 'process'"
    )
    marked = sum(raw.attempts for raw in raws)
    if claimed != marked:
        found.wrong.append(f"{claimed} rows claimed, {marked} marked")
    ((twice,),) = db.execute("SELECT count(*) FROM public.marked_twice")
    if twice:
        found.wrong.append(f"{twice} rows marked by a batch although they did not wait")
    errors = db.execute(
        "SELECT DISTINCT step, error_msg FROM spectrum.run_log WHERE error_msg IS NOT NULL"
        # A month that could not be locked in time; the next run makes it.
        " AND step <> 'run' AND error_msg NOT LIKE '%(SQLSTATE 55P03)'"
    )
    found.wrong += [f"run log: {step}: {error}" for step, error in errors]


def check_views(db: psycopg.Connection, owners: dict[UUID, Reading], found: Finding) -> None:
    """By spectrum.verify() and, for some of them, once more by hand."""
    for name, expected, actual in db.execute(
        "SELECT check_name, expected, actual FROM spectrum.verify() WHERE NOT ok"
    ):
        found.views += 1
        found.wrong.append(f"verify(): {name}: expected {expected}, actual {actual}")
    for name, expected, shown in recomputed(db, owners):
        if expected != shown:
            found.views += 1
            differ = set(map(str, expected)) ^ set(map(str, shown))
            found.wrong.append(f"{name}: {len(differ)} rows differ: {sorted(differ)[:4]}")


def recomputed(
    db: psycopg.Connection, owners: dict[UUID, Reading]
) -> Iterator[tuple[str, list[Any], list[Any]]]:
    events = [event_of(reading.fields or {}) for reading in owners.values()]
    calendar = Calendar()
    ((now,),) = db.execute("SELECT now()")

    counts: Counter[tuple[Any, ...]] = Counter()
    for scope, mine in scopes(events):
        counts.update((scope, calendar.day(event.at), event.event_type) for event in mine)
    yield (
        "daily_events",
        sorted((*cell, count) for cell, count in counts.items()),
        sorted(
            db.execute("SELECT account_id, day, event_type, events FROM analytics.daily_events")
        ),
    )
    yield (
        "active_users",
        sorted(tuple(row[:5]) for row in standing_active_users(events, calendar)),
        sorted(db.execute("SELECT account_id, day, dau, wau, mau FROM analytics.active_users")),
    )
    yield (
        "revenue_summary",
        sorted(tuple(row[:9]) for row in standing_revenue(events, calendar)),
        sorted(db.execute(
            "SELECT account_id, day, currency, orders, gross, refunds, net, paying_users,"
            " active_users FROM analytics.revenue_summary"
        )),
    )  # fmt: skip
    yield (
        "retention_cohorts",
        sorted(tuple(row[:5]) for row in standing_retention(events, Options(), calendar, now)),
        sorted(db.execute(
            "SELECT account_id, cohort, period, cohort_size, users FROM analytics.retention_cohorts"
            " WHERE retention = 'default'"
        )),
    )  # fmt: skip
    yield (
        "conversion_funnels",
        sorted(funnel_users(events, FUNNEL)),
        sorted(db.execute(
            "SELECT account_id, step, users FROM analytics.conversion_funnels"
            " WHERE funnel = 'pays'"
        )),
    )  # fmt: skip


def event_of(fields: dict[str, Any]) -> Event:
    money = {} if fields["revenue"] is None else {"revenue": fields["revenue"]}
    return Event(
        fields["occurred_at"], fields["event_type"], fields["account_id"] or None,
        fields["user_id"] or None, money, {}, fields["currency"] or "USD",
    )  # fmt: skip


def funnel_users(events: list[Event], steps: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """How many users reach each step of an ordered funnel within two days."""
    for scope, mine in scopes(events):
        histories: defaultdict[str, list[Event]] = defaultdict(list)
        for event in mine:
            if event.user is not None and event.event_type in steps:
                histories[event.user].append(event)
        reached = Counter[int]()
        for history in histories.values():
            history.sort(key=lambda event: event.at)
            best = max(chain(history, n, steps) for n in range(len(history)))
            reached.update(range(1, best + 1))
        for number in range(1, len(steps) + 1):
            yield scope, number, reached[number]


def chain(history: list[Event], first: int, steps: Sequence[str]) -> int:
    """How far a user comes who enters with one event: the earliest next step is the best one."""
    if history[first].event_type != steps[0]:
        return 0
    entry, at, reached = history[first].at, history[first].at, 1
    for event in history[first + 1 :]:
        if event.at - entry > timedelta(days=2):
            break
        if reached < len(steps) and event.event_type == steps[reached] and event.at > at:
            at, reached = event.at, reached + 1
    return reached
