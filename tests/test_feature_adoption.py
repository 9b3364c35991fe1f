"""Feature adoption: against an oracle over random histories, and the edges by hand."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from histories import Payload, epochs, exploring, load, loaded, timezones
from hypothesis import given, note
from hypothesis import strategies as st
from oracle_events import Calendar, read_events, scopes
from oracle_feature_adoption import Definitions, feature_adoption
from test_lifecycle import once, randoms, some_range

ASK = "SELECT * FROM analytics.feature_adoption(%s, %s, %s, %s, %s)"
ASK_EACH = """
    SELECT account_id, feature, cohort_week, period, active_users, users, first_users
    FROM analytics._feature_adoption(
        NULL, 'month', NULL, NULL, NULL, true, analytics._feature_definitions()
    )
    ORDER BY account_id COLLATE "C", feature COLLATE "C", cohort_week, period
"""
DEFINE = "SELECT spectrum.define_feature(%s, %s, %s)"


def some_history(random: Random, epoch: datetime) -> list[Payload]:
    history = []
    for number in range(random.choice([0, 1, 20, 60])):
        at = epoch + timedelta(
            days=random.choice([-1, 0, 0, 1, 2, 6, 7, 8, 14, 27, 28, 35]),
            hours=random.choice([0, 1, 3, 4, 5, 6, 12, 21, 22, 23]),
            minutes=random.choice([0, 15, 30, 59]),
        )
        properties = {
            "feature": random.choice(["export", "export", "search", "", None, 3, "long" * 51]),
            "plan": random.choice(["pro", "free"]),
        }
        for name in list(properties):
            if not random.randrange(5):
                del properties[name]
        event = {
            "event_id": f"e{number}",
            "event_type": random.choice(["feature_used", "feature_used", "visit", "buy"]),
            "occurred_at": at.isoformat(),
            "user_id": f"u{random.randrange(5)}",
            "account_id": f"a{random.randrange(2)}",
            "properties": properties,
        }
        for field in ("user_id", "account_id"):
            if not random.randrange(10):
                del event[field]
        history += [event] * random.choice([1] * 9 + [2])
    return history


def some_definitions(random: Random) -> Definitions:
    possible: list[tuple[str, str | None, dict[str, str] | None]] = [
        ("export", "buy", None),
        ("search", "feature_used", {"feature": "search", "plan": "pro"}),
        ("pro", None, {"plan": "pro"}),
        ("visits", "visit", {}),
        ("never", "no such", None),
        ("3", None, {"feature": "export"}),
    ]
    chosen = random.sample(possible, random.choice([0, 0, 1, 3]))
    return {name: (event_type, where) for name, event_type, where in chosen}


@exploring
@given(random=randoms, timezone=timezones, epoch=epochs, week_start=st.sampled_from([1, 1, 3, 7]))
def test_any_history(
    db: psycopg.Connection, random: Random, timezone: str, epoch: datetime, week_start: int
) -> None:
    history, definitions = some_history(random, epoch), some_definitions(random)
    note(f"{definitions}")
    events, calendar = read_events(once(history)), Calendar(timezone, week_start)
    with loaded(db, history, timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        for name, (event_type, where) in definitions.items():
            db.execute(DEFINE, (name, event_type, None if where is None else json.dumps(where)))
        for _ in range(5):
            feature = random.choice([None, None, "export", "3", "pro", "no such"])
            period = random.choice(["day", "week", "week", "month"])
            start, end = some_range(random, epoch)
            account = random.choice([None, None, None, "a1", "nobody"])
            note(f"{feature} {period} {start} {end} {account}")
            found = db.execute(ASK, (feature, period, start, end, account)).fetchall()
            assert found == feature_adoption(
                events, calendar, definitions, feature, period, start, end, account
            )
        each = [
            (scope, *cell[:6])
            for scope, _ in scopes(events)
            if scope != "*"
            for cell in feature_adoption(
                events, calendar, definitions, period="month", account=scope
            )
        ]  # fmt: skip
        assert db.execute(ASK_EACH).fetchall() == each


def event(at: str, feature: str | None, user: str | None = "u1", **rest: Any) -> dict[str, Any]:
    event = {
        "event_type": "feature_used" if feature else "visit",
        "occurred_at": f"2024-{at}T12:00:00Z",
        "properties": {"feature": feature} if feature else {},
    }
    return event | ({"user_id": user} if user else {}) | rest


def told(db: psycopg.Connection, *arguments: object) -> dict[str, list[tuple[Any, ...]]]:
    """By feature: cohort week, period, active users, users, first users."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    asked = (*arguments, *[None] * (5 - len(arguments)))
    asked = (asked[0], asked[1] or "week", *asked[2:])
    for feature, week, period, active, users, first, repeat, rate in db.execute(ASK, asked):
        assert users == first + repeat and rate == users / active
        found.setdefault(feature, []).append((f"{week:%m-%d}", f"{period:%m-%d}", active, users,
                                              first))  # fmt: skip
    return found


def test_first_and_repeated_use(db: psycopg.Connection) -> None:
    load(db, [event("05-06", None), event("05-07", "export"), event("05-13", "export"),
              event("05-20", "search"), event("05-06", None, "u2"), event("05-13", "export", "u2"),
              event("05-13", None, "u3")])  # fmt: skip
    assert told(db) == {
        "export": [
            ("05-06", "05-06", 2, 1, 1), ("05-06", "05-13", 2, 2, 1), ("05-06", "05-20", 1, 0, 0),
            ("05-13", "05-13", 1, 0, 0),
        ],
        "search": [
            ("05-06", "05-06", 2, 0, 0), ("05-06", "05-13", 2, 0, 0), ("05-06", "05-20", 1, 1, 1),
            ("05-13", "05-13", 1, 0, 0),
        ],
    }  # fmt: skip
    # The first use, and the first event, are looked for before the range.
    assert told(db, "export", "day", "2024-05-13", "2024-05-14") == {
        "export": [("05-06", "05-13", 2, 2, 1), ("05-13", "05-13", 1, 0, 0)]
    }
    # A feature that nobody used has its rows, of zeros.
    assert told(db, "none", "month") == {
        "none": [("05-06", "05-01", 2, 0, 0), ("05-13", "05-01", 1, 0, 0)]
    }
    # One that is first used behind the range is none of it.
    assert [*told(db, None, "week", None, "2024-05-20")] == ["export"]


def test_definitions(db: psycopg.Connection) -> None:
    load(db, [event("05-06", "export"), event("05-06", None, "u2", properties={"plan": "pro"}),
              event("05-06", None, "u3", event_type="buy")])  # fmt: skip
    week = ("05-06", "05-06", 3)
    assert told(db) == {"export": [(*week, 1, 1)]}
    db.execute("SELECT spectrum.define_feature('pro', p_where => '{\"plan\": \"pro\"}')")
    db.execute("SELECT spectrum.define_feature('never', 'no such')")
    # A definition takes the place of the value of the same name, until it is dropped.
    db.execute("SELECT spectrum.define_feature('export', 'buy')")
    db.execute("SELECT spectrum.define_feature('export', 'visit')")
    assert told(db) == {
        "export": [(*week, 1, 1)], "never": [(*week, 0, 0)], "pro": [(*week, 1, 1)]
    }  # fmt: skip
    assert told(db, "export", "day", None, None) == {"export": [(*week, 1, 1)]}
    assert db.execute("SELECT feature, event_type FROM analytics.features ORDER BY 1").fetchall() \
        == [("export", "visit"), ("never", "no such"), ("pro", None)]  # fmt: skip
    for name in ("export", "never", "pro"):
        db.execute("SELECT spectrum.drop_feature(%s)", (name,))
    assert told(db) == {"export": [(*week, 1, 1)]}


def test_unknown_users_and_accounts(db: psycopg.Connection) -> None:
    load(db, [event("05-06", "export", None), event("05-06", None, account_id="x"),
              event("05-13", "export", account_id="y")])  # fmt: skip
    assert told(db) == {"export": [("05-06", "05-06", 1, 0, 0), ("05-06", "05-13", 1, 1, 1)]}
    # An account knows its own events: its user begins with the first of them.
    assert told(db, None, "week", None, None, "y") == {"export": [("05-13", "05-13", 1, 1, 1)]}
    assert told(db, None, "week", None, None, "x") == {}
    assert told(db, None, "week", None, None, "nobody") == {}


def test_no_events_no_rows(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.define_feature('never', 'no such')")
    assert told(db) == {} and told(db, "never", "day", "2024-05-06", "2024-05-07") == {}


@pytest.mark.parametrize(
    ("named", "call"),
    [
        ("p_period", "analytics.feature_adoption(p_period => 'hour')"),
        ("p_to", "analytics.feature_adoption(p_from => '2024-05-02', p_to => '2024-05-01')"),
        ("p_name", "spectrum.define_feature('', 'visit')"),
        ("p_event", "spectrum.define_feature('f')"),
        ("p_event", "spectrum.define_feature('f', '', '{}')"),
        ("p_where", "spectrum.define_feature('f', 'visit', '[]')"),
        ("p_name", "spectrum.drop_feature('f')"),
    ],
)
def test_refused(db: psycopg.Connection, named: str, call: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=named):
        db.execute(f"SELECT * FROM {call}")
