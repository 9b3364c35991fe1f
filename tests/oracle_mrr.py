"""Recurring revenue: each account's subscription events replayed one instant after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from itertools import groupby
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from oracle_events import Calendar, Event, number, of_account, time_range

KINDS = ("subscription_cancelled", "subscription_started", "subscription_changed")
MONTHS = {
    "month": Fraction(1), "monthly": Fraction(1), "year": Fraction(12), "annual": Fraction(12),
    "quarter": Fraction(3), "week": Fraction(12, 52), "day": Fraction(12, 365),
}  # fmt: skip
FLOWS = ("new", "expansion", "contraction", "churn", "reactivation")


class Problem(Exception):
    """Its text is the field that cannot be read."""


def read(event: Event, default_currency: str) -> tuple[str, Fraction, str | None]:
    """Subscription, MRR, currency."""
    properties = event.properties
    if event.account is None:
        raise Problem("account_id")
    subscription = properties.get("subscription_id")
    if isinstance(subscription, bool | list | dict):
        raise Problem("subscription_id")
    subscription = "" if subscription is None else str(subscription)
    if event.event_type == KINDS[0]:
        return subscription, Fraction(0), None
    name = "mrr" if properties.get("mrr") is not None else "amount"
    amount = number(properties.get(name))
    if amount is None or amount < 0:
        raise Problem(name)
    months = Fraction(1)
    if name == "amount":
        interval = properties.get("interval")
        if not isinstance(interval, str) or interval.lower() not in MONTHS:
            raise Problem("interval")
        months = MONTHS[interval.lower()]
    currency = properties.get("currency")
    if currency is None:
        currency = default_currency
    if not (isinstance(currency, str) and len(currency) == 3 and currency.isalpha()):
        raise Problem("currency")
    return subscription, Fraction(amount) / months, currency.upper()


def problems(events: Iterable[Event], default_currency: str = "USD") -> Iterator[tuple[Event, str]]:
    for event in events:
        if event.event_type in KINDS:
            try:
                read(event, default_currency)
            except Problem as problem:
                yield event, str(problem)


class Movement(NamedTuple):
    at: datetime
    before: Fraction
    after: Fraction


@dataclass
class Ledger:
    """What one account pays in one currency: movements that are closed, and the open one."""

    movements: list[Movement] = field(default_factory=list)
    opened: datetime | None = None
    before: Fraction = Fraction(0)
    now: Fraction = Fraction(0)

    def close(self) -> None:
        if self.opened is not None and self.now != self.before:
            self.movements.append(Movement(self.opened, self.before, self.now))
        self.opened, self.before = None, self.now

    def pay(self, at: datetime, mrr: Fraction) -> None:
        if mrr == self.now:
            return
        if self.opened is not None and at - self.opened >= timedelta(minutes=60):
            self.close()
        if self.opened is None:
            self.opened = at
        self.now = mrr


def movements_of(events: Iterable[Event], default_currency: str) -> dict[str, list[Movement]]:
    """One account's, by currency."""
    readable = []
    for event in events:
        try:
            readable.append(
                (event.at, KINDS.index(event.event_type), read(event, default_currency))
            )
        except (Problem, ValueError):
            continue
    paid: dict[str, tuple[Fraction, str | None]] = {}
    ledgers: dict[str, Ledger] = {}
    for at, together in groupby(sorted(readable, key=lambda each: each[:2]), lambda each: each[0]):
        for _, _, (subscription, mrr, currency) in together:
            paid[subscription] = mrr, currency
        for currency in {currency for _, currency in paid.values() if currency} | ledgers.keys():
            total = sum((mrr for mrr, paid_in in paid.values() if paid_in == currency), Fraction(0))
            ledgers.setdefault(currency, Ledger()).pay(at, total)
    for ledger in ledgers.values():
        ledger.close()
    return {currency: ledger.movements for currency, ledger in ledgers.items()}


def kind(movement: Movement, is_first: bool) -> str:
    if movement.before == 0:
        return "new" if is_first else "reactivation"
    if movement.after == 0:
        return "churn"
    return "expansion" if movement.after > movement.before else "contraction"


def mrr_at(movements: Sequence[Movement], at: datetime) -> Fraction:
    return next((each.after for each in reversed(movements) if each.at < at), Fraction(0))


def mrr_movements(
    everywhere: Sequence[Event],
    calendar: Calendar,
    period: str = "month",
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
    default_currency: str = "USD",
) -> list[dict[str, Any]]:
    mine = of_account(everywhere, account)
    span = time_range(mine, everywhere, start, end)
    if span is None:
        return []
    accounts = {event.account for event in mine} - {None}
    histories: dict[str, list[list[Movement]]] = {}
    for name in sorted(accounts):
        for currency, movements in movements_of(of_account(mine, name), default_currency).items():
            histories.setdefault(currency, []).append(movements)
    rows = []
    for first_day in calendar.periods(period, *span):
        bounds = calendar_bounds(calendar, period, first_day)
        begin, finish = max(bounds[0], span[0]), min(bounds[1], span[1])
        for currency, ledgers in sorted(histories.items()):
            if any(movements and movements[0].at < finish for movements in ledgers):
                rows.append(period_row(ledgers, begin, finish, period)
                            | {"period": first_day, "currency": currency})  # fmt: skip
    return rows


def day_begins(calendar: Calendar, day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(calendar.timezone)).astimezone(
        UTC
    )


def calendar_bounds(calendar: Calendar, period: str, first_day: date) -> tuple[datetime, datetime]:
    following = calendar.following(period, first_day)
    return day_begins(calendar, first_day), day_begins(calendar, following)


def period_row(
    ledgers: Sequence[Sequence[Movement]], begin: datetime, finish: datetime, period: str
) -> Mapping[str, Any]:
    flows, times = dict.fromkeys(FLOWS, Fraction(0)), dict.fromkeys(FLOWS, 0)
    for movements in ledgers:
        for place, movement in enumerate(movements):
            if begin <= movement.at < finish:
                flows[kind(movement, place == 0)] += abs(movement.after - movement.before)
                times[kind(movement, place == 0)] += 1
    starts = [mrr_at(movements, begin) for movements in ledgers]
    ends = [mrr_at(movements, finish) for movements in ledgers]
    kept = [(was, became) for was, became in zip(starts, ends, strict=True) if was > 0]
    at_start, at_end = len(kept), sum(became > 0 for became in ends)
    ltv = None
    if at_start and at_end and times["churn"]:
        months = {"day": Fraction(12, 365), "week": Fraction(12, 52), "month": Fraction(1)}[period]
        ltv = sum(ends) / at_end / (Fraction(times["churn"], at_start) / months)
    return flows | {
        "start_mrr": sum(starts), "end_mrr": sum(ends),
        "start_accounts": at_start, "end_accounts": at_end,
        "new_accounts": times["new"], "churned_accounts": times["churn"],
        "reactivated_accounts": times["reactivation"],
        "nrr": sum(became for _, became in kept) / sum(starts) if kept else None,
        "grr": sum(min(pair) for pair in kept) / sum(starts) if kept else None,
        "ltv": ltv,
    }  # fmt: skip
