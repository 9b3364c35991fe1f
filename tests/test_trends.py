"""Trends: against an oracle, and by hand what a property may hold."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction

import psycopg
import pytest
from histories import (
    epochs,
    exploring,
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
from oracle_trends import trend
from psycopg.types.json import Jsonb

ASK = """SELECT * FROM analytics.trend(
    p_event => %(event)s, p_period => %(period)s, p_from => %(start)s, p_to => %(end)s,
    p_measure => %(measure)s, p_property => %(wanted)s, p_breakdown => %(breakdown)s,
    p_account => %(account)s, p_where => %(where)s)"""

plans = st.sampled_from(["free", "pro", 1, True, None])
histories_of = properties(plan=plans, latency=values)
questions = st.fixed_dictionaries(
    {
        "event": st.sampled_from([None, "visit", "click", "never_seen"]),
        "period": st.sampled_from(["day", "week", "month"]),
        "measure": st.sampled_from(["events", "users", "sum", "avg", "p50", "p95", "p99"]),
        "wanted": st.sampled_from(["latency", "plan"]),
        "breakdown": st.sampled_from([None, "plan", "event_type", "country", "account_id", "x"]),
        "account": st.sampled_from([None, "a1", "nobody"]),
        "where": st.sampled_from([None, {}, {"plan": "pro"}, {"plan": 1}]),
    }
)


def same(value: Decimal | None, expected: Fraction | None) -> bool:
    if value is None or expected is None:
        return value is expected
    return Fraction(value) == expected or abs(Fraction(value) / expected - 1) < Fraction(1, 10**14)


@exploring
@given(data=st.data(), timezone=timezones, epoch=epochs, week_start=st.sampled_from([1, 7]))
def test_any_history(
    db: psycopg.Connection,
    data: st.DataObject,
    timezone: str,
    epoch: datetime,
    week_start: int,
) -> None:
    history = data.draw(payloads(epoch, ["visit", "click"], histories_of))
    events, calendar = read_events(history), Calendar(timezone, week_start)
    with loaded(db, history, timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        for _ in range(4):
            question = data.draw(questions)
            question["start"], question["end"] = data.draw(ranges(epoch))
            where = question["where"]
            asked = question | {"where": None if where is None else Jsonb(where)}
            rows = db.execute(ASK, asked).fetchall()
            expected = trend(events, calendar, **question)
            answer = {(period, breakdown): value for period, breakdown, value in rows}
            assert len(rows) == len(answer)
            assert answer.keys() == expected.keys()
            wrong = {key for key in expected if not same(answer[key], expected[key])}
            assert not wrong, (question, answer, expected)


@pytest.fixture
def latencies(db: psycopg.Connection) -> psycopg.Connection:
    amounts = [10, 20, "30", 40.5, "fast", None, [1], {"ms": 1}, True, "", "1e400"]
    load(db, [
        {"event_type": "request", "occurred_at": "2024-05-01T12:00:00Z", "properties": {"ms": ms}}
        for ms in amounts
    ] + [{"event_type": "request", "occurred_at": "2024-05-03T12:00:00Z"}])  # fmt: skip
    return db


def test_what_is_no_number_is_left_out(latencies: psycopg.Connection) -> None:
    ask = "SELECT value FROM analytics.trend('request', p_measure => %s, p_property => 'ms')"
    for measure, expected in {
        "events": [11, 0, 1],
        "users": [0, 0, 0],
        "sum": [Decimal("100.5"), 0, 0],
        "avg": [Decimal("25.125"), None, None],
        "p50": [25, None, None],
        "p95": [Decimal("38.925"), None, None],
    }.items():
        assert [value for (value,) in latencies.execute(ask, (measure,))] == expected, measure


def test_numbers_beyond_double_precision(db: psycopg.Connection) -> None:
    db.execute(
        "INSERT INTO raw_events (payload) SELECT jsonb_build_object('event_type', 'odd',"
        " 'occurred_at', '2024-05-01', 'properties', jsonb_build_object('x', n))"
        " FROM unnest(ARRAY[1e400, -1e131000, 1e-400, 5]) AS n"
    )
    db.execute("CALL spectrum.process_batch()")
    ask = "SELECT round(value, 9) FROM analytics.trend('odd', p_measure => %s, p_property => 'x')"
    for measure, expected in {"sum": 5, "avg": 2.5, "p50": 2.5}.items():
        assert db.execute(ask, (measure,)).fetchall() == [(Decimal(expected),)]


def test_an_unknown_event_counts_zero_over_all_time(latencies: psycopg.Connection) -> None:
    rows = latencies.execute("SELECT value FROM analytics.trend('no_such_event')").fetchall()
    assert rows == [(0,), (0,), (0,)]


def test_the_range_cuts_events_not_periods(latencies: psycopg.Connection) -> None:
    noon = datetime(2024, 5, 1, 12, tzinfo=UTC)
    ask = "SELECT period, value FROM analytics.trend(p_period => 'week', p_from => %s, p_to => %s)"
    late = noon.replace(day=3, hour=13)
    assert latencies.execute(ask, (noon, late)).fetchall() == [(date(2024, 4, 29), 12)]
    assert latencies.execute(ask, (noon, noon.replace(day=3))).fetchall() == [
        (date(2024, 4, 29), 11)
    ]
    assert latencies.execute(ask, (noon, noon)).fetchall() == []


def test_wrong_arguments_are_named(db: psycopg.Connection) -> None:
    for arguments, named in {
        "p_period => 'fortnight'": "p_period",
        "p_period => NULL": "p_period",
        "p_measure => 'p90'": "p_measure",
        "p_measure => 'sum'": "p_property",
        "p_where => '[1]'": "p_where",
        "p_from => '2024-05-02', p_to => '2024-05-01'": "p_to",
    }.items():
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=named) as caught:
            db.execute(f"SELECT * FROM analytics.trend({arguments})")
        assert caught.value.diag.message_hint
