"""Recurring revenue: against an oracle, by a published example, and by hand where it is easy to go
wrong: several subscriptions and currencies, the sixty minutes, periods, what cannot be read."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import psycopg
import pytest
from histories import Payload, dense_lists, epochs, exploring, instants, load, loaded, ranges
from histories import timezones as zones
from hypothesis import given
from hypothesis import strategies as st
from oracle_events import Calendar, Event, read_events
from oracle_mrr import KINDS, mrr_movements, problems
from psycopg.rows import dict_row

FLOWS = ("new", "expansion", "contraction", "churn", "reactivation")

prices = st.sampled_from([
    {"mrr": 10}, {"mrr": 20}, {"mrr": "60"}, {"mrr": 166.25}, {"mrr": 0},
    {"amount": 2000, "interval": "year"}, {"amount": 7, "interval": "Week"},
    {"amount": 20, "interval": "monthly"}, {"amount": 60, "interval": "quarter", "mrr": None},
    {"amount": 20}, {"mrr": "n/a"}, {"mrr": -5}, {}, {"amount": 5, "interval": "fortnight"},
])  # fmt: skip
names = st.sampled_from([{}, {}, {"subscription_id": "a"}, {"subscription_id": 7}] * 3
                        + [{"subscription_id": [1]}, {"subscription_id": None}])  # fmt: skip
currencies = st.sampled_from([{}] * 4 + [{"currency": c} for c in ("EUR", "eur", "euro", 1, None)])


def subscription_events(epoch: datetime, randoms: Any) -> list[Payload]:
    """Close together as often as far apart; no two of a kind at one time, whose order would be
    that of their ids."""
    events: dict[tuple[object, ...], Payload] = {}
    at = epoch - timedelta(days=3)
    for _ in range(randoms.choice([3, 12, 40])):
        minutes = randoms.choice([0, 0, 20, 40, 59, 60, 61, 600, 1440, 9000, 30000])
        at += timedelta(minutes=minutes)
        properties = dict(randoms.choice([
            {"mrr": 10}, {"mrr": 20}, {"mrr": "60"}, {"mrr": 166.25}, {"mrr": 0},
            {"amount": 2000, "interval": "year"}, {"amount": 7, "interval": "Week"},
        ]))  # fmt: skip
        properties |= randoms.choice([{}, {"subscription_id": "a"}, {"subscription_id": 7}])
        properties |= randoms.choice([{}, {}, {"currency": "eur"}])
        event = {
            "event_type": randoms.choice([*KINDS, KINDS[2]]),
            "occurred_at": at.isoformat(), "properties": properties,
            "account_id": randoms.choice(["a1", "a1", "a2"]),
        }  # fmt: skip
        events[key_of(event)] = event
    history = list(events.values())
    randoms.shuffle(history)
    return history


def key_of(event: Payload) -> tuple[object, ...]:
    subscription = event["properties"].get("subscription_id")
    return event.get("account_id"), str(subscription), event["event_type"], event["occurred_at"]


def odd_events(epoch: datetime) -> st.SearchStrategy[list[Payload]]:
    event = st.builds(
        lambda kind, at, price, name, currency, who: {
            "event_type": kind, "occurred_at": at.isoformat(),
            "properties": price | name | currency, **who,
        },
        st.sampled_from([*KINDS, "visit"]), instants(epoch), prices, names, currencies,
        st.sampled_from([{"account_id": "a1"}, {"account_id": "a2"}, {}]),
    )  # fmt: skip
    return dense_lists(event, 20).map(
        lambda events: list({key_of(each): each for each in events}.values())
    )


def close(value: Decimal | int | None, expected: Fraction | int | None) -> bool:
    if value is None or expected is None:
        return value is expected
    return abs(Fraction(value) - expected) <= Fraction(1, 10**9)


def ask(db: psycopg.Connection, *arguments: object) -> list[dict[str, Any]]:
    question = f"SELECT * FROM analytics.mrr_movements({', '.join(['%s'] * len(arguments))})"
    return db.cursor(row_factory=dict_row).execute(question, arguments).fetchall()


def check(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    def place(row: dict[str, Any]) -> tuple[object, object]:
        return row["period"], row["currency"]

    assert list(map(place, rows)) == list(map(place, expected))
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        wrong = [
            name for name in row
            if name not in ("period", "currency") and not close(row[name], wanted[name])
        ]  # fmt: skip
        assert not wrong, (wrong, row, wanted)
        adds_up(row)


def adds_up(row: dict[str, Any]) -> None:
    """Exactly, not to so many digits."""
    assert row["end_mrr"] == (
        row["start_mrr"] + row["new"] + row["reactivation"] + row["expansion"]
        - row["contraction"] - row["churn"]
    )  # fmt: skip
    assert row["end_accounts"] == (
        row["start_accounts"] + row["new_accounts"] + row["reactivated_accounts"]
        - row["churned_accounts"]
    )  # fmt: skip


@exploring
@given(
    data=st.data(),
    randoms=st.randoms(use_true_random=True),
    timezone=zones,
    epoch=epochs,
    week_start=st.sampled_from([1, 7]),
)
def test_any_history(
    db: psycopg.Connection,
    data: st.DataObject,
    randoms: Any,
    timezone: str,
    epoch: datetime,
    week_start: int,
) -> None:
    is_odd = data.draw(st.booleans())
    history = data.draw(odd_events(epoch)) if is_odd else subscription_events(epoch, randoms)
    history.append({"event_type": "visit", "occurred_at": (epoch + timedelta(days=50)).isoformat()})
    events, calendar = read_subscriptions(history), Calendar(timezone, week_start)
    with loaded(db, history, timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        for _ in range(3):
            period = data.draw(st.sampled_from(["day", "week", "month"]))
            start, end = data.draw(ranges(epoch))
            account = data.draw(st.sampled_from([None, "a1", "a2", "nobody"]))
            rows = ask(db, period, start, end, account)
            check(rows, mrr_movements(events, calendar, period, start, end, account))
        told = db.execute("SELECT occurred_at, problem FROM analytics.mrr_problems()").fetchall()
        expected = sorted((event.at, field) for event, field in problems(events))
        # In UTC: a local time that the clock shows twice equals no time of another zone.
        assert sorted((at.astimezone(UTC), field_of(problem)) for at, problem in told) == expected


def field_of(problem: str) -> str:
    return problem.split(":")[0].removeprefix("properties.mrr or ").removeprefix("properties.")


def read_subscriptions(history: list[Payload]) -> list[Event]:
    """The oracle of events takes a currency for a text; here it is whatever was sent."""
    events = read_events([each | {"properties": {}} for each in history])
    return [
        replace(event, properties=each.get("properties", {}))
        for event, each in zip(events, history, strict=True)
    ]


def subscribed(kind: str, at: str, account: str | None = "acme", **properties: object) -> Payload:
    return {
        "event_type": f"subscription_{kind}", "occurred_at": at, "properties": properties,
        **({"account_id": account} if account else {}),
    }  # fmt: skip


def moved(db: psycopg.Connection, *arguments: object) -> list[tuple[Any, ...]]:
    """Per row what moved, by the month's number."""
    return [
        (row["period"].month, row["currency"], {name: row[name] for name in FLOWS if row[name]})
        for row in ask(db, *arguments)
    ]


def test_a_published_example(db: psycopg.Connection) -> None:
    """ChartMogul's: 2,000 a year is 166.67 of new MRR; then 60 more, 60 less, gone, and back."""
    load(db, [
        subscribed("started", "2024-01-10", amount=2000, interval="year"),
        subscribed("changed", "2024-02-10", amount=2720, interval="year"),
        subscribed("changed", "2024-03-10", amount=2000, interval="year"),
        subscribed("cancelled", "2024-04-10"),
        subscribed("started", "2024-05-10", amount=2000, interval="year"),
    ])  # fmt: skip
    rows = ask(db)
    for row in rows:
        adds_up(row)
    assert [
        tuple(round(row[name], 2) for name in ("start_mrr", *FLOWS, "end_mrr")) for row in rows
    ] == [
        tuple(map(Decimal, line.split()))
        for line in (
            "0      166.67 0  0  0      0      166.67",
            "166.67 0      60 0  0      0      226.67",
            "226.67 0      0  60 0      0      166.67",
            "166.67 0      0  0  166.67 0      0",
            "0      0      0  0  0      166.67 166.67",
        )
    ]
    assert [row["start_accounts"] for row in rows] == [0, 1, 1, 1, 0]
    assert [row["nrr"] and round(row["nrr"], 4) for row in rows] == [
        None, Decimal("1.36"), Decimal("0.7353"), 0, None,
    ]  # fmt: skip
    assert [row["grr"] and round(row["grr"], 4) for row in rows] == [
        None, 1, Decimal("0.7353"), 0, None,
    ]  # fmt: skip


def test_sixty_minutes_run_from_the_first_change(db: psycopg.Connection) -> None:
    load(db, [
        subscribed("started", "2024-01-10T10:00:00Z", mrr=10),
        subscribed("changed", "2024-01-10T10:40:00Z", mrr=30),
        subscribed("changed", "2024-01-10T10:59:59.999999Z", mrr=20),
        subscribed("changed", "2024-01-10T11:00:00Z", mrr=25),
        subscribed("changed", "2024-01-10T11:20:00Z", mrr=40),
        # Nothing changes here, so nothing begins here.
        subscribed("changed", "2024-01-11T10:00:00Z", mrr=40),
        subscribed("changed", "2024-01-11T10:50:00Z", mrr=50),
        subscribed("changed", "2024-01-11T11:10:00Z", mrr=40),
    ])  # fmt: skip
    assert moved(db, "day") == [(1, "USD", {"new": 20, "expansion": 20}), (1, "USD", {})]


def test_a_movement_belongs_to_its_first_change(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('timezone', 'America/New_York')")
    load(db, [
        subscribed("started", "2024-02-01T04:30:00Z", mrr=10),  # 31 January, 23:30
        subscribed("changed", "2024-02-01T05:20:00Z", mrr=30),  # 1 February, 0:20
        subscribed("changed", "2024-02-01T05:30:00Z", mrr=35),  # an hour after the first
    ])  # fmt: skip
    assert moved(db) == [(1, "USD", {"new": 30}), (2, "USD", {"expansion": 5})]
    # Where the range ends does not change the movement, nor does where it begins.
    assert moved(db, "month", None, "2024-02-01T05:00:00Z") == [(1, "USD", {"new": 30})]
    (row,) = ask(db, "month", "2024-02-01T05:10:00Z", "2024-02-01T05:30:00Z")
    assert (row["start_mrr"], row["end_mrr"]) == (30, 30)
    (row,) = ask(db, "month", "2024-02-01T05:31:00Z", "2024-02-02T00:00:00Z")
    assert (row["start_mrr"], row["expansion"], row["end_mrr"]) == (35, 0, 35)


def test_the_account_is_what_moves(db: psycopg.Connection) -> None:
    """Not its subscriptions: one goes and another comes."""
    load(db, [
        subscribed("started", "2024-01-10T10:00:00Z", subscription_id="a", mrr=10),
        subscribed("started", "2024-01-20T10:00:00Z", subscription_id=1, mrr=20),
        subscribed("cancelled", "2024-02-10T10:00:00Z", subscription_id="a"),
        subscribed("started", "2024-02-10T10:30:00Z", subscription_id="c", mrr=10),
        subscribed("cancelled", "2024-03-10T10:00:00Z", subscription_id="1"),
        subscribed("cancelled", "2024-03-12T10:00:00Z", subscription_id="c"),
        subscribed("cancelled", "2024-03-14T10:00:00Z", subscription_id="c"),
        subscribed("cancelled", "2024-03-15T10:00:00Z"),
    ])  # fmt: skip
    assert moved(db) == [
        (1, "USD", {"new": 10, "expansion": 20}),
        (2, "USD", {}),
        (3, "USD", {"contraction": 20, "churn": 10}),
    ]


def test_currencies_are_apart(db: psycopg.Connection) -> None:
    load(db, [
        subscribed("started", "2024-01-10", mrr=10),
        subscribed("started", "2024-01-11", subscription_id="b", mrr=5, currency="eur"),
        subscribed("changed", "2024-02-10", mrr=9, currency="EUR"),
        subscribed("cancelled", "2024-03-10", currency="GBP"),
    ])  # fmt: skip
    assert moved(db) == [
        (1, "EUR", {"new": 5}), (1, "USD", {"new": 10}),
        (2, "EUR", {"expansion": 9}), (2, "USD", {"churn": 10}),
        (3, "EUR", {"contraction": 9}), (3, "USD", {}),
    ]  # fmt: skip


def test_any_order_of_arrival_and_any_first_event(db: psycopg.Connection) -> None:
    load(db, [subscribed("cancelled", "2024-03-10"), subscribed("changed", "2024-02-10", mrr=8)])
    assert moved(db) == [(2, "USD", {"new": 8}), (3, "USD", {"churn": 8})]
    load(db, [subscribed("started", "2024-02-20", mrr=9), subscribed("cancelled", "2024-01-01")])
    assert moved(db) == [(2, "USD", {"new": 8, "expansion": 1}), (3, "USD", {"churn": 9})]


def test_events_of_one_time(db: psycopg.Connection) -> None:
    """A plan ends and the next begins: cancelled, started, changed; of a kind by event_id."""
    at = "2024-01-10T10:00:00Z"
    load(db, [
        subscribed("changed", at, mrr=3), subscribed("started", at, mrr=2),
        subscribed("cancelled", at),
        subscribed("started", at, "two", mrr=2)
        | {"event_id": "00000000-0000-0000-0000-000000000002"},
        subscribed("started", at, "two", mrr=1)
        | {"event_id": "00000000-0000-0000-0000-000000000001"},
    ])  # fmt: skip
    assert moved(db, "month", None, None, "acme") == [(1, "USD", {"new": 3})]
    assert moved(db, "month", None, None, "two") == [(1, "USD", {"new": 2})]


def test_retention_and_lifetime_value(db: psycopg.Connection) -> None:
    load(db, [
        *(subscribed("started", "2024-01-10", name, mrr=100) for name in "abcd"),
        subscribed("changed", "2024-02-10", "a", mrr=150),
        subscribed("changed", "2024-02-10", "b", mrr=70),
        subscribed("cancelled", "2024-02-10", "c"),
        subscribed("started", "2024-02-10", "e", mrr=500),
        subscribed("started", "2024-02-10", "f", mrr=80),
        {"event_type": "visit", "occurred_at": "2024-03-05", "account_id": "a"},
    ])  # fmt: skip
    january, february, march = ask(db)
    assert (february["nrr"], february["grr"]) == (Decimal("0.8"), Decimal("0.675"))
    # 900 of five accounts, and one of four accounts left.
    assert february["ltv"] == 720
    assert (january["ltv"], march["ltv"], march["nrr"]) == (None, None, 1)
    (day,) = [row for row in ask(db, "day") if row["period"] == date(2024, 2, 10)]
    assert round(day["ltv"] * 365, 9) == 720 * 12
    assert [row["end_mrr"] for row in ask(db, "month", None, None, "a")] == [100, 150, 150]


def test_what_cannot_be_read_is_named_and_left_out(db: psycopg.Connection) -> None:
    load(db, [
        subscribed("started", "2024-01-01", mrr=10),
        subscribed("changed", "2024-01-02"),
        subscribed("changed", "2024-01-03", mrr="ten"),
        subscribed("changed", "2024-01-04", mrr=-1, amount=5, interval="month"),
        subscribed("changed", "2024-01-05", amount=5),
        subscribed("changed", "2024-01-06", amount=5, interval="fortnight"),
        subscribed("changed", "2024-01-07", mrr=5, currency="euro"),
        subscribed("changed", "2024-01-08", mrr=5, subscription_id={"id": 1}),
        subscribed("changed", "2024-01-09", mrr=10**15),
        subscribed("started", "2024-01-10", None, mrr=5),
        subscribed("cancelled", "2024-01-11", mrr="none", currency="?"),
    ])  # fmt: skip
    assert moved(db) == [(1, "USD", {"new": 10, "churn": 10})]
    question = "SELECT problem FROM analytics.mrr_problems(%s, %s, %s)"
    told = [problem for (problem,) in db.execute(question, (None, None, None))]
    assert told == [
        "properties.mrr or properties.amount: expected a number from 0 to below 10^15, got nothing",
        'properties.mrr: expected a number from 0 to below 10^15, got "ten"',
        "properties.mrr: expected a number from 0 to below 10^15, got -1",
        "properties.interval: expected day, week, month, quarter or year, got nothing",
        'properties.interval: expected day, week, month, quarter or year, got "fortnight"',
        'properties.currency: expected three letters, got "euro"',
        'properties.subscription_id: expected a text, got {"id": 1}',
        "properties.mrr: expected a number from 0 to below 10^15, got 1000000000000000",
        "account_id: expected an account, got nothing",
    ]
    range_of = (datetime(2024, 1, 3, tzinfo=UTC), datetime(2024, 1, 5, tzinfo=UTC), "acme")
    assert len(db.execute(question, range_of).fetchall()) == 2


def test_nothing_subscribed(db: psycopg.Connection) -> None:
    assert ask(db) == []
    load(db, [{"event_type": "visit", "occurred_at": "2024-01-01", "account_id": "acme"},
              subscribed("started", "2024-01-02", mrr=0)])  # fmt: skip
    assert ask(db) == []
    assert ask(db, "month", None, None, "nobody") == []


def test_wrong_arguments_are_named(db: psycopg.Connection) -> None:
    for call, named in {
        "mrr_movements('year')": "p_period",
        "mrr_movements(NULL)": "p_period",
        "mrr_movements(p_from => '2024-05-02', p_to => '2024-05-01')": "p_to",
        "mrr_movements(p_from => '-infinity')": "p_from",
        "mrr_problems('2024-05-02', '2024-05-01')": "p_to",
    }.items():
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=named):
            db.execute(f"SELECT * FROM analytics.{call}")
