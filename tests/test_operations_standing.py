"""The standing views of operations and of the event catalog, whatever way the events came."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from histories import Payload, epochs, exploring, load, payloads
from hypothesis import given
from hypothesis import strategies as st
from interleaving import arrive, other
from oracle_events import Calendar, Event, read_events, scopes
from oracle_operations import error_rates, event_catalog, latency
from pipeline import insert, process
from test_operations import check, kinds, request, requests

OTHERS = "(other properties)"
CATALOG = (
    "SELECT account_id, event_type, property, types, events, first_seen, last_seen"
    " FROM analytics.event_catalog"
    ' ORDER BY account_id COLLATE "C", event_type, property COLLATE "C" NULLS FIRST'
)
LATENCIES = (
    "SELECT account_id, day, endpoint, requests, p50, p95, p99, errors, error_rate, measured"
    ' FROM analytics.operations ORDER BY account_id COLLATE "C", day, endpoint'
)
ERRORS = (
    "SELECT account_id, day, service, version, requests, errors, error_rate, error_events"
    ' FROM analytics.error_rates_daily ORDER BY account_id COLLATE "C", day, service, version'
)
MINUTES = "SELECT account_id, minute, events FROM analytics.throughput_minutes"


def by_scope(rows: Any, events: list[Event]) -> list[tuple[Any, ...]]:
    return [
        (name, *row)
        for name, _ in sorted(scopes(events))
        for row in rows(None if name == "*" else name)
    ]


@exploring
@given(data=st.data(), randoms=st.randoms(use_true_random=True), epoch=epochs)
def test_any_way_to_arrive(
    db: psycopg.Connection, data: st.DataObject, randoms: Random, epoch: datetime
) -> None:
    history = data.draw(payloads(epoch, kinds, requests))
    kind = data.draw(st.sampled_from(["operations", "catalog"]))
    with db.transaction(force_rollback=True):
        (now,) = db.execute("SELECT now()").fetchone()
        for each in history:
            if randoms.random() < 0.2:
                ago = timedelta(seconds=randoms.choice([0, 1, 59, 60, 61, 86400 * 6, 86400 * 7]))
                each["occurred_at"] = (now - ago).isoformat()
        counted, timezone = arrive(db, history, randoms, kind, other(randoms, history))
        events, calendar = read_events(counted), Calendar(timezone)
        check(
            db.execute(LATENCIES).fetchall(),
            by_scope(lambda name: latency(events, calendar, account=name), events),
        )
        check(
            db.execute(ERRORS).fetchall(),
            by_scope(lambda name: error_rates(events, calendar, account=name), events),
        )
        check(
            db.execute(CATALOG).fetchall(),
            by_scope(lambda name: event_catalog(events, name), events),
        )
        minutes = Counter(
            (name, event.at.replace(second=0, microsecond=0))
            for name, mine in scopes(events)
            for event in mine
        )
        assert {
            (name, at.astimezone(UTC)): count for name, at, count in db.execute(MINUTES)
        } == {
            key: count for key, count in minutes.items() if key[1] >= now - timedelta(days=7)
        }  # fmt: skip


def refreshed(db: psycopg.Connection, history: list[Payload]) -> None:
    load(db, history)
    db.execute("CALL spectrum.refresh_analytics()")


def withdraw(db: psycopg.Connection, condition: str) -> None:
    db.execute(
        "UPDATE raw_events SET payload = payload - 'event_type', status = 'pending'"
        f" WHERE {condition}"
    )
    process(db)
    db.execute("CALL spectrum.refresh_analytics()")


def test_names_beyond_two_hundred_share_a_row(db: psycopg.Connection) -> None:
    at = "2024-05-01T12:00:00Z"
    first = {f"p{number:03}": 1 for number in range(199)} | {OTHERS: 1, "x" * 201: "long"}
    refreshed(db, [request(at, "wide", **first), request(at, "narrow", p=1)])
    refreshed(db, [request(at, "wide", last=1), request(at, "wide", late=True, p000="text")])
    ask = "SELECT types, events FROM analytics.event_catalog WHERE account_id = '*' AND property ="
    assert db.execute(f"{ask} '{OTHERS}'").fetchall() == [
        ({"number": 1, "string": 1, "boolean": 1}, 3)
    ]
    assert db.execute(f"{ask} 'last'").fetchall() == [({"number": 1}, 1)]
    assert db.execute(f"{ask} 'late'").fetchall() == []
    assert db.execute(f"{ask} 'p000'").fetchall() == [({"number": 1, "string": 1}, 2)]
    # Room that becomes free is not given to a name that was counted with others.
    withdraw(db, "payload -> 'properties' ? 'last'")
    refreshed(db, [request(at, "wide", late=True)])
    assert db.execute(f"{ask} '{OTHERS}'").fetchall() == [
        ({"number": 1, "string": 1, "boolean": 2}, 4)
    ]
    assert db.execute("SELECT * FROM spectrum.verify() WHERE NOT ok").fetchall() == []


def test_the_ends_of_the_catalog_are_found_again(db: psycopg.Connection) -> None:
    days = [datetime(2024, month, 15, tzinfo=UTC) for month in (1, 2, 7, 12)]
    refreshed(db, [request(day.isoformat(), "sale", price=1, day=day.month) for day in days])
    ask = (
        "SELECT account_id, first_seen, last_seen FROM analytics.event_catalog"
        " WHERE event_type = 'sale' AND property = 'price'"
    )
    for gone, first, last in ((1, 1, 3), (12, 1, 2), (7, 1, 1)):
        withdraw(db, f"payload -> 'properties' -> 'day' = '{gone}'")
        assert db.execute(ask).fetchall() == [("*", days[first], days[last])]
    withdraw(db, "true")
    assert db.execute(ask).fetchall() == []


def test_names_of_any_length(db: psycopg.Connection) -> None:
    """What would fit no index: names that are data, numbers with thousands of digits."""
    at = "2024-05-01T12:00:00Z"
    endpoint = "".join(chr(0x4E00 + number * 7919 % 20000) for number in range(5000))
    digits = "".join(str(number * 7 % 10) for number in range(16000))
    names = dict.fromkeys(["endpoint", "service", "version", endpoint], endpoint)
    payload = json.dumps(request(at, **names, latency_ms="number"))
    insert(db, [payload.replace('"number"', f"0.{digits}")])
    assert process(db).loaded == 1
    db.execute("CALL spectrum.refresh_analytics()")
    rows = db.execute("SELECT endpoint, p50 FROM analytics.operations").fetchall()
    assert [(name, str(p50)) for name, p50 in rows] == [(endpoint[:200], "0.074185")]
    assert db.execute("SELECT * FROM spectrum.verify() WHERE NOT ok").fetchall() == []


@pytest.mark.parametrize("rows", [1, 10])
def test_minutes_are_let_go(db: psycopg.Connection, rows: int) -> None:
    now = datetime.now(UTC)
    ages = [timedelta(minutes=number) for number in range(rows)]
    refreshed(db, [request((now - age).isoformat()) for age in ages])
    kept = "SELECT count(*) FROM analytics.mv_throughput WHERE account_id = '*'"
    assert db.execute(kept).fetchone() == (rows,)
    db.execute("UPDATE analytics.mv_throughput SET minute = minute - interval '9 days'")
    assert db.execute(MINUTES).fetchall() == []
    refreshed(db, [request((now - timedelta(days=20)).isoformat())])
    assert db.execute(kept).fetchone() == (0,)
