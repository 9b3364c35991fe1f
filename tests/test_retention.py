"""Retention: against an oracle over random histories, and the edges by hand."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from histories import Payload, epochs, exploring, load, loaded, timezones
from hypothesis import given, note
from hypothesis import strategies as st
from oracle_events import Calendar, read_events
from oracle_retention import Options, retention, standing_retention

ASK = """
    SELECT * FROM analytics.retention(
        %(start_event)s, %(return_event)s, %(period)s, %(periods)s, %(start)s, %(end)s,
        p_cohort => %(cohort)s, p_mode => %(mode)s, p_account => %(account)s, p_where => %(where)s
    )
"""
DEFINE = """
    SELECT spectrum.define_retention(
        'r', %(start_event)s, %(return_event)s, %(period)s, %(periods)s, p_cohort => %(cohort)s,
        p_mode => %(mode)s, p_where => %(where)s
    )
"""
STANDING = """
    SELECT account_id, cohort, period, cohort_size, users, rate, is_complete
    FROM analytics.retention_cohorts WHERE retention = 'r'
    ORDER BY account_id COLLATE "C", cohort, period
"""

# Hypothesis left to itself draws the same few over and over. False has a failure shrunk.
randoms = st.randoms(use_true_random=True)


def some_history(random: Random, epoch: datetime) -> list[Payload]:
    """Days around a change of the clock, hours around midnight; one event in ten has no user."""
    history = []
    for _ in range(random.choice([1, 10, 30, 60])):
        at = epoch + timedelta(
            days=random.choice([-1, 0, 0, 1, 2, 4, 6, 7, 8, 14, 27, 28, 30, 40]),
            hours=random.choice([0, 1, 3, 4, 5, 6, 12, 21, 22, 23]),
            minutes=random.choice([0, 15, 30, 59]),
        )
        event = {
            "event_type": random.choice(["start", "back", "other"]),
            "occurred_at": at.isoformat(),
            "user_id": f"u{random.randrange(5)}",
            "account_id": f"a{random.randrange(2)}",
            "properties": {"plan": random.choice(["pro", "free"])},
        }
        for field in ("user_id", "account_id", "properties"):
            if not random.randrange(10):
                del event[field]
        history.append(event)
    return history


def some_options(random: Random, epoch: datetime | None = None) -> Options:
    """With ends of the range only around an epoch, and so none without."""
    ends: list[datetime | None] = [None, None]
    if epoch is not None:
        hours = sorted(random.randrange(-24, 800) for _ in ends)
        ends = [random.choice([None, epoch + timedelta(hours=hour)]) for hour in hours]
    return Options(
        start_event=random.choice([None, None, "start", "back", "no such"]),
        return_event=random.choice([None, None, "start", "back", "no such"]),
        period=random.choice(["day", "day", "week", "month"]),
        periods=random.randint(0, 6),
        cohort=random.choice(["first", "recurring"]),
        mode=random.choice(["on", "on_or_after"]),
        where=random.choice([None, None, {}, {"plan": "pro"}]),
        start=ends[0],
        end=ends[1],
    )


def arguments(options: Options, account: str | None = None) -> dict[str, object]:
    where = None if options.where is None else json.dumps(options.where)
    return vars(options) | {"where": where, "account": account}


@exploring
@given(random=randoms, timezone=timezones, epoch=epochs, week_start=st.sampled_from([1, 1, 3, 7]))
def test_any_retention_of_any_history(
    db: psycopg.Connection, random: Random, timezone: str, epoch: datetime, week_start: int
) -> None:
    history = some_history(random, epoch)
    events, calendar = read_events(history), Calendar(timezone, week_start)
    now = datetime.now(UTC)
    with loaded(db, history, timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        for _ in range(6):
            options = some_options(random, epoch)
            account = random.choice([None, None, None, "a1", "nobody"])
            note(f"{options} {account}")
            found = db.execute(ASK, arguments(options, account)).fetchall()
            assert found == retention(events, options, calendar, now, account)
        options = some_options(random)
        note(f"standing: {options}")
        db.execute(DEFINE, arguments(options))
        db.execute("CALL spectrum.refresh_analytics()")
        standing = db.execute(STANDING).fetchall()
        assert standing == standing_retention(events, options, calendar, now)


@exploring
@given(random=randoms, timezone=timezones)
def test_periods_that_have_not_begun(db: psycopg.Connection, random: Random, timezone: str) -> None:
    now = datetime.now(UTC)
    history = [
        {
            "event_type": "start",
            "user_id": f"u{number % 4}",
            "occurred_at": (now - timedelta(hours=random.randrange(1000))).isoformat(),
        }
        for number in range(12)
    ]
    with loaded(db, history, timezone):
        for _ in range(4):
            options = some_options(random)
            found = db.execute(ASK, arguments(options)).fetchall()
            assert found == retention(read_events(history), options, Calendar(timezone), now)


def event(event_type: str, at: str, user: str = "u1", **rest: object) -> dict[str, object]:
    at = f"2024-{at}" if "T" in at else f"2024-{at}T12:00:00"
    return {"event_type": event_type, "user_id": user, "occurred_at": f"{at}Z"} | rest


def ask(db: psycopg.Connection, **options: object) -> list[Any]:
    named = ", ".join(f"p_{name} => %({name})s" for name in options)
    return db.execute(f"SELECT * FROM analytics.retention({named})", options).fetchall()


def users(db: psycopg.Connection, **options: object) -> dict[str, list[int]]:
    """By cohort, its size and its users by period."""
    found: dict[str, list[int]] = {}
    for cohort, _, size, count, *_ in ask(db, **options):
        found.setdefault(f"{cohort:%m-%d}", [size]).append(count)
    return found


def test_first_cohorts_look_before_the_range(db: psycopg.Connection) -> None:
    load(db, [event("a", "05-06"), event("a", "05-13"), event("a", "05-13", "u2"),
              event("a", "05-27", "u2")])  # fmt: skip
    assert users(db, periods=2) == {"05-06": [1, 1, 1, 0], "05-13": [1, 1, 0, 1]}
    asked = {"periods": 2, "from": "2024-05-13"}
    assert users(db, **asked) == {"05-13": [1, 1, 0, 1]}
    assert users(db, **asked, cohort="recurring") == {
        "05-13": [2, 2, 0, 1], "05-27": [1, 1, 0, 0]
    }  # fmt: skip


def test_period_0_asks_for_a_return_after_the_start(db: psycopg.Connection) -> None:
    load(db, [
        event("b", "05-06"), event("a", "05-07"),
        event("a", "05-07", "u2"), event("b", "05-07", "u2"),
        event("a", "05-07", "u3"), event("b", "05-15", "u3"),
    ])  # fmt: skip
    asked = {"start_event": "a", "return_event": "b", "periods": 1}
    assert users(db, **asked) == {"05-06": [3, 1, 1]}
    assert users(db, **asked, mode="on_or_after") == {"05-06": [3, 2, 1]}
    assert users(db, start_event="a", return_event="a", periods=0) == {"05-06": [3, 3]}
    assert users(db, start_event="a", periods=0) == {"05-06": [3, 3]}


def test_on_or_after_counts_what_comes_later(db: psycopg.Connection) -> None:
    load(db, [event("a", "05-06"), event("a", "07-01")])
    assert users(db, periods=9) == {"05-06": [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]}
    assert users(db, periods=9, mode="on_or_after") == {"05-06": [1] * 10 + [0]}
    assert not any(row[5] for row in ask(db, mode="on_or_after"))
    assert all(row[5] for row in ask(db))


def test_weeks_begin_where_they_are_said_to(db: psycopg.Connection) -> None:
    load(db, [event("a", "05-05"), event("a", "05-06")])
    assert users(db, periods=1) == {"04-29": [1, 1, 1]}
    db.execute("SELECT spectrum.configure('week_start', '7')")
    assert users(db, periods=1) == {"05-05": [1, 1, 0]}
    db.execute("SELECT spectrum.configure('timezone', 'America/New_York')")
    load(db, [event("a", "05-12T03:59:59"), event("a", "05-12T04:00:00", "u2")])
    assert users(db, periods=1) == {"05-05": [1, 1, 0], "05-12": [1, 1, 0]}


def test_filters_unknown_users_and_accounts(db: psycopg.Connection) -> None:
    load(db, [
        event("a", "05-06", account_id="x"), event("a", "05-13", account_id="y"),
        event("a", "05-13", properties={"plan": "pro"}),
        {key: value for key, value in event("a", "05-06").items() if key != "user_id"},
    ])  # fmt: skip
    assert users(db, periods=1) == {"05-06": [1, 1, 1]}
    assert users(db, periods=1, account="y") == {"05-13": [1, 1, 0]}
    assert users(db, periods=1, where='{"plan": "pro"}') == {"05-13": [1, 1, 0]}
    assert users(db, periods=1, start_event="no such") == {}
    assert users(db, periods=1, return_event="no such") == {"05-06": [1, 0, 0]}
    db.execute("CALL spectrum.refresh_analytics()")
    standing = "SELECT account_id, cohort, cohort_size FROM analytics.retention_cohorts"
    assert set(db.execute(f"{standing} WHERE retention = 'default' AND period = 0")) == {
        ("*", date(2024, 5, 6), 1), ("x", date(2024, 5, 6), 1), ("y", date(2024, 5, 13), 1)
    }  # fmt: skip


def test_years_of_days(db: psycopg.Connection) -> None:
    """More periods than fit in a number, and events in the oldest and the newest month there is."""
    this_month = datetime.now(UTC).replace(day=1)
    load(db, [event("a", "05-06"), event("a", "05-06") | {"occurred_at": "2000-01-01T00:00:00Z"},
              event("a", "05-06") | {"occurred_at": this_month.isoformat()}])  # fmt: skip
    rows = ask(db, period="day", periods=1000)
    assert len(rows) == 1001
    assert [row[3] for row in rows] == [1] + [0] * 1000
    assert {row[0] for row in rows} == {date(2000, 1, 1)}
    assert [row[3] for row in ask(db, period="month", periods=300) if row[3]] == [1, 1]


REFUSED: list[tuple[str, dict[str, object]]] = [
    ("p_period", {"period": "year"}),
    ("p_period", {"period": None}),
    ("p_periods", {"periods": -1}),
    ("p_periods", {"periods": 1001}),
    ("p_periods", {"periods": None}),
    ("p_cohort", {"cohort": "last"}),
    ("p_mode", {"mode": None}),
    ("p_where", {"where": '"pro"'}),
]


def test_invalid_options(db: psycopg.Connection) -> None:
    for argument, options in REFUSED:
        named = ", ".join(f"p_{name} => %({name})s" for name in options)
        for call in ("analytics.retention(", "spectrum.define_retention('r', "):
            with pytest.raises(psycopg.errors.InvalidParameterValue) as refusal:
                db.execute(f"SELECT {call}{named})", options)
            assert f"argument {argument}:" in str(refusal.value)
            assert str(refusal.value.diag.message_hint).startswith("Expected ")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_to"):
        ask(db, **{"from": "2024-05-02", "to": "2024-05-01"})


@pytest.mark.parametrize("back", [None, "b"])
def test_the_last_period_shown_and_the_one_after(db: psycopg.Connection, back: str | None) -> None:
    """A refresh passes over who is past the periods of his cohort, and over nobody else."""
    db.execute("SELECT spectrum.define_retention('r', %s, %s, 'day', 3)", (back and "a", back))
    for at, counted in (("05-06", 0), ("05-09", 1), ("05-10", 1), ("05-03", back is None)):
        load(db, [event("a" if at in ("05-06", "05-03") else "b", at)])
        db.execute("CALL spectrum.refresh_analytics()")
        assert db.execute(
            "SELECT users FROM analytics.retention_cohorts "
            "WHERE retention = 'r' AND account_id = '*' AND period = 3"
        ).fetchall() == [(counted,)]


def test_definitions(db: psycopg.Connection) -> None:
    known = "SELECT retention, start_event, period_kind FROM spectrum.retentions ORDER BY 1"
    assert db.execute(known).fetchall() == [("default", None, "week")]
    db.execute("SELECT spectrum.define_retention('default', 'a', p_period => 'day')")
    assert db.execute(known).fetchall() == [("default", "a", "day")]
    load(db, [event("a", "05-06")])
    db.execute("CALL spectrum.refresh_analytics()")
    assert db.execute(
        "SELECT DISTINCT period_kind FROM analytics.retention_cohorts"
    ).fetchall() == [("day",)]
    db.execute("SELECT spectrum.drop_retention('default')")
    db.execute("CALL spectrum.refresh_analytics()")
    assert db.execute("SELECT count(*) FROM analytics.retention_cohorts").fetchone() == (0,)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_name"):
        db.execute("SELECT spectrum.drop_retention('default')")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_name"):
        db.execute("SELECT spectrum.define_retention(NULL)")
