"""Revenue by day and currency, event by event."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from oracle_events import Calendar, Event, of_account, scopes, time_range


class RevenueDay(NamedTuple):
    day: date
    currency: str
    orders: int
    gross: Decimal
    refunds: Decimal
    net: Decimal
    paying_users: int
    active_users: int
    arpu: Fraction | None
    arppu: Fraction | None


def revenue(
    everywhere: Sequence[Event],
    calendar: Calendar,
    start: datetime | None = None,
    end: datetime | None = None,
    account: str | None = None,
    currency: str | None = None,
    refund_events: Collection[str] = ("refund",),
) -> list[RevenueDay]:
    mine = of_account(everywhere, account)
    span = time_range(mine, everywhere, start, end)
    if span is None:
        return []
    active: dict[date, set[str]] = defaultdict(set)
    money: dict[tuple[date, str], list[Event]] = defaultdict(list)
    for event in mine:
        if not span[0] <= event.at < span[1]:
            continue
        day = calendar.day(event.at)
        if event.user is not None:
            active[day].add(event.user)
        if event.revenue is not None and currency in (None, event.currency):
            money[day, event.currency].append(event)
    return [
        sum_up(day, code, events, len(active[day]), refund_events)
        for (day, code), events in sorted(money.items())
    ]


def sum_up(
    day: date,
    currency: str,
    events: Sequence[Event],
    active_users: int,
    refund_events: Collection[str],
) -> RevenueDay:
    orders, gross, refunds, paying = 0, Decimal(0), Decimal(0), set()
    for event in events:
        amount = event.revenue or Decimal(0)
        if event.event_type in refund_events or amount < 0:
            refunds += abs(amount)
            continue
        orders += 1
        gross += amount
        if amount > 0 and event.user is not None:
            paying.add(event.user)
    net = gross - refunds
    return RevenueDay(
        day, currency, orders, gross, refunds, net, len(paying), active_users,
        Fraction(net) / active_users if active_users else None,
        Fraction(net) / len(paying) if paying else None,
    )  # fmt: skip


def standing_revenue(
    everywhere: Sequence[Event], calendar: Calendar
) -> list[tuple[str, *tuple[object, ...]]]:
    return [
        (scope, *row)
        for scope, _ in scopes(everywhere)
        for row in revenue(everywhere, calendar, account=None if scope == "*" else scope)
    ]
