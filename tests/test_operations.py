"""Latency, error rates, throughput and the event catalog: against oracles, and by hand."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import psycopg
import pytest
from histories import (
    Payload,
    epochs,
    exploring,
    instants,
    load,
    loaded,
    payloads,
    properties,
    ranges,
    timezones,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from oracle_events import Calendar, read_events
from oracle_operations import error_rates, event_catalog, latency, throughput

requests = properties(
    endpoint=st.sampled_from(["/a", "/B", "", 7]),
    latency_ms=st.one_of(st.sampled_from([1, 2, 2, 3.5, 120, "120.0"]), values),
    status=st.sampled_from([200, 499, 500, 503.5, "502", "404", "down", True, None, [500]]),
    error=st.sampled_from([True, False, "true", 1, None]),
    service=st.sampled_from(["api", "web"]),
    version=st.sampled_from(["1.0", "1.1", 2]),
)
kinds = ["request", "request", "api_request", "error", "visit"]


def plain(value: Any) -> Any:
    """Local times that the clock shows twice equal no time of another zone."""
    if isinstance(value, Decimal):
        return Fraction(value)
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def check(rows: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    assert [tuple(map(plain, row)) for row in rows] == expected


@exploring
@given(data=st.data(), timezone=timezones, epoch=epochs, week_start=st.sampled_from([1, 7]))
def test_any_history(
    db: psycopg.Connection,
    data: st.DataObject,
    timezone: str,
    epoch: datetime,
    week_start: int,
) -> None:
    history = data.draw(payloads(epoch, kinds, requests))
    events, calendar = read_events(history), Calendar(timezone, week_start)
    with loaded(db, history, timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        start, end = data.draw(ranges(epoch))
        account = data.draw(st.sampled_from([None, "a1", "nobody"]))
        period = data.draw(st.sampled_from(["day", "week", "month"]))
        arguments = (start, end, period, account)
        for name, oracle in {"latency": latency, "error_rates": error_rates}.items():
            rows = db.execute(f"SELECT * FROM analytics.{name}(%s, %s, %s, %s)", arguments)
            check(rows.fetchall(), oracle(events, calendar, *arguments))

        piece = data.draw(st.sampled_from(["hour", "day"]))
        event_type = data.draw(st.sampled_from([None, "request", "never_seen"]))
        counted = (piece, start, end, event_type, account)
        rows = db.execute("SELECT * FROM analytics.throughput(%s, %s, %s, %s, %s)", counted)
        check(rows.fetchall(), throughput(events, calendar, *counted))

        rows = db.execute("SELECT * FROM analytics.event_catalog(%s)", (account,))
        check(rows.fetchall(), event_catalog(events, account))


@exploring
@given(data=st.data(), timezone=timezones, epoch=epochs)
def test_any_minute(
    db: psycopg.Connection, data: st.DataObject, timezone: str, epoch: datetime
) -> None:
    history = data.draw(payloads(epoch, kinds, properties()))
    events, calendar = read_events(history), Calendar(timezone)
    start = data.draw(instants(epoch)) + timedelta(seconds=data.draw(st.sampled_from([0, 1, 59])))
    end = start + data.draw(st.sampled_from([0, 1, 59, 60, 61, 3600, 7230])) * timedelta(seconds=1)
    with loaded(db, history, timezone):
        rows = db.execute("SELECT * FROM analytics.throughput('minute', %s, %s)", (start, end))
        check(rows.fetchall(), throughput(events, calendar, "minute", start, end))


def request(at: str, kind: str = "request", **properties: object) -> Payload:
    return {"event_type": kind, "occurred_at": at, "properties": properties}


def test_percentiles_are_exact(db: psycopg.Connection) -> None:
    at = "2024-05-01T12:00:00Z"
    load(db, [request(at, endpoint="/", latency_ms=n) for n in range(1, 101)])
    load(db, [request(at, endpoint="/one", latency_ms="0.1"),
              request(at, endpoint="/none", latency_ms=-1), request(at)])  # fmt: skip
    day = date(2024, 5, 1)
    assert db.execute("SELECT * FROM analytics.latency()").fetchall() == [
        (day, "/", 100, Decimal("50.5"), Decimal("95.05"), Decimal("99.01"), 0, 0, 100),
        (day, "/none", 1, None, None, None, 0, 0, 0),
        (day, "/one", 1, Decimal("0.1"), Decimal("0.1"), Decimal("0.1"), 0, 0, 1),
        (day, None, 1, None, None, None, 0, 0, 0),
    ]


def test_what_an_error_is(db: psycopg.Connection) -> None:
    at = "2024-05-01T12:00:00Z"
    load(db, [
        *(request(at, service="api", version=1, status=status) for status in (200, 499, 500)),
        request(at, service="api", version="1", status="503"),
        request(at, "api_request", service="api", version="1", status=200, error=True),
        request(at, service="api", version="1", error="timeout"),
        request(at, service="api", version="1", status=500, error=True),
        request(at, "error", service="api", version="1", status=500),
        request(at, "error", service="job"),
        request(at, service="odd", error="true", status="500 or so"),
        request(at, "visit", service="web", status=500),
    ])  # fmt: skip
    day = date(2024, 5, 1)
    assert db.execute("SELECT * FROM analytics.error_rates()").fetchall() == [
        (day, "api", "1", 7, 4, 4 / 7, 1),
        (day, "job", None, 0, 0, None, 1),
        (day, "odd", None, 1, 0, 0, 0),
    ]
    ask = "SELECT requests, errors, error_rate FROM analytics.latency(p_period => 'month')"
    assert db.execute(ask).fetchall() == [(8, 4, 4 / 8)]


@pytest.mark.parametrize(
    ("timezone", "midnight", "hours"),
    [
        ("Europe/Berlin", datetime(2024, 10, 26, 22, tzinfo=UTC), 25),
        ("Europe/Berlin", datetime(2024, 3, 30, 23, tzinfo=UTC), 23),
        ("Asia/Kathmandu", datetime(2024, 3, 30, 18, 15, tzinfo=UTC), 24),
    ],
)
def test_hours_of_a_day(
    db: psycopg.Connection, timezone: str, midnight: datetime, hours: int
) -> None:
    db.execute("SELECT spectrum.configure('timezone', %s)", (timezone,))
    starts = [midnight + timedelta(hours=number) for number in range(hours)]
    load(db, [request((start + timedelta(minutes=59)).isoformat()) for start in starts])
    span = (midnight, midnight + timedelta(hours=hours))
    for period, expected in {
        "hour": [(start, 1) for start in starts],
        "day": [(midnight, hours)],
    }.items():
        ask = "SELECT * FROM analytics.throughput(%s, %s, %s)"
        assert db.execute(ask, (period, *span)).fetchall() == expected
    second = (starts[1], starts[2])
    rows = db.execute("SELECT * FROM analytics.throughput('hour', %s, %s)", second).fetchall()
    assert rows == [(starts[1], 1)]
    minutes = db.execute("SELECT events FROM analytics.throughput('minute', %s, %s)", span)
    assert [count for (count,) in minutes] == ([0] * 59 + [1]) * hours


def test_the_catalog_counts_types_and_shows_no_values(db: psycopg.Connection) -> None:
    first, last = datetime(2024, 5, 1, tzinfo=UTC), datetime(2024, 5, 2, tzinfo=UTC)
    load(db, [
        request(last.isoformat(), "sale", price=1, coupon="secret"),
        request(first.isoformat(), "sale", price="2", tags=["a"], **{"": None}),
        request(first.isoformat(), "login"),
    ])  # fmt: skip
    rows = db.execute("SELECT * FROM analytics.event_catalog()").fetchall()
    assert rows == [
        ("login", None, None, 1, first, first),
        ("sale", None, None, 2, first, last),
        ("sale", "", {"null": 1}, 1, first, first),
        ("sale", "coupon", {"string": 1}, 1, last, last),
        ("sale", "price", {"number": 1, "string": 1}, 2, first, last),
        ("sale", "tags", {"array": 1}, 1, first, first),
    ]
    assert "secret" not in str(rows)


def test_nothing_there(db: psycopg.Connection) -> None:
    for question in ("latency", "error_rates", "throughput", "event_catalog"):
        assert db.execute(f"SELECT * FROM analytics.{question}()").fetchall() == []


def test_wrong_arguments_are_named(db: psycopg.Connection) -> None:
    for call, named in {
        "latency(p_period => 'hour')": "p_period",
        "latency('2024-05-02', '2024-05-01')": "p_to",
        "error_rates(p_period => 'hour')": "p_period",
        "error_rates('2024-05-02', '2024-05-01')": "p_to",
        "throughput('week')": "p_period",
        "throughput(NULL)": "p_period",
        "throughput(p_to => 'infinity')": "p_to",
    }.items():
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=named):
            db.execute(f"SELECT * FROM analytics.{call}")
