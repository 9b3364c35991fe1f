"""Lifecycle and stickiness: against oracles over random histories, and the edges by hand."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from histories import Payload, epochs, exploring, load, loaded, timezones
from hypothesis import given, note
from hypothesis import strategies as st
from oracle_events import Calendar, read_events, scopes
from oracle_lifecycle import lifecycle
from oracle_stickiness import stickiness

ASK_LIFECYCLE = "SELECT * FROM analytics.lifecycle(%s, %s, %s, %s, %s)"
ASK_STICKINESS = "SELECT * FROM analytics.stickiness(%s, %s, %s, %s, %s)"
ASK_EACH = """
    SELECT * FROM analytics._lifecycle(%s, %s, %s, %s, NULL, true)
    ORDER BY account_id COLLATE "C", period
"""

# Hypothesis left to itself draws the same few over and over. False has a failure shrunk.
randoms = st.randoms(use_true_random=True)


def some_history(random: Random, epoch: datetime) -> list[Payload]:
    """Days around a change of the clock, hours around midnight, runs of days and pauses; one event
    in ten has no user, one in ten is sent twice."""
    history = []
    for number in range(random.choice([0, 1, 10, 40, 80])):
        at = epoch + timedelta(
            days=random.choice([-1, 0, 0, 1, 1, 2, 3, 4, 6, 7, 8, 14, 21, 27, 28, 35, 60]),
            hours=random.choice([0, 1, 3, 4, 5, 6, 12, 21, 22, 23]),
            minutes=random.choice([0, 15, 30, 59]),
        )
        event = {
            "event_id": f"e{number}",
            "event_type": random.choice(["visit", "visit", "click"]),
            "occurred_at": at.isoformat(),
            "user_id": f"u{random.randrange(5)}",
            "account_id": f"a{random.randrange(2)}",
        }
        for field in ("user_id", "account_id"):
            if not random.randrange(10):
                del event[field]
        history += [event] * random.choice([1] * 9 + [2])
    return history


def once(history: list[Payload]) -> list[Payload]:
    return list({event["event_id"]: event for event in history}.values())


def some_range(random: Random, epoch: datetime) -> tuple[datetime | None, datetime | None]:
    """On and off the boundaries of days, before, after and inside the history."""
    first, last = sorted(random.choice([-999, 0, 5, 24, 48, 150, 168, 600, 1999]) for _ in "ab")
    ends = (epoch + timedelta(hours=first), epoch + timedelta(hours=last, minutes=1))
    return random.choice([None, ends[0]]), random.choice([None, ends[1]])


@exploring
@given(random=randoms, timezone=timezones, epoch=epochs, week_start=st.sampled_from([1, 1, 3, 7]))
def test_any_history(
    db: psycopg.Connection, random: Random, timezone: str, epoch: datetime, week_start: int
) -> None:
    history = some_history(random, epoch)
    events, calendar = read_events(once(history)), Calendar(timezone, week_start)
    with loaded(db, history, timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        for _ in range(6):
            period = random.choice(["day", "day", "week", "month"])
            start, end = some_range(random, epoch)
            event_type = random.choice([None, None, "visit", "click", "no such"])
            account = random.choice([None, None, None, "a1", "nobody"])
            note(f"{period} {start} {end} {event_type} {account}")
            asked = (period, start, end, event_type, account)
            found = db.execute(ASK_LIFECYCLE, asked).fetchall()
            assert found == lifecycle(events, calendar, *asked)
            found = db.execute(ASK_STICKINESS, asked).fetchall()
            assert found == stickiness(events, calendar, *asked)
        each = [
            (scope, *cell)
            for scope, of_scope in scopes(events)
            if scope != "*" and any(event.user for event in of_scope)
            for cell in lifecycle(events, calendar, "week", account=scope)
        ]
        assert db.execute(ASK_EACH, ("week", None, None, None)).fetchall() == each


def event(at: str, user: str | None = "u1", **rest: object) -> dict[str, object]:
    at = f"2024-{at}" if "T" in at else f"2024-{at}T12:00:00"
    event = {"event_type": "visit", "occurred_at": f"{at}Z"} | rest
    return event | ({"user_id": user} if user else {})


def ask(db: psycopg.Connection, question: str, **options: object) -> list[Any]:
    named = ", ".join(f"p_{name} => %({name})s" for name in options)
    return db.execute(f"SELECT * FROM analytics.{question}({named})", options).fetchall()


def told(db: psycopg.Connection, **options: object) -> dict[str, tuple[int, ...]]:
    return {f"{row[0]:%m-%d}": tuple(row[1:]) for row in ask(db, "lifecycle", **options)}


def test_each_stage(db: psycopg.Connection) -> None:
    load(db, [event("05-06"), event("05-07"), event("05-07", "u2"), event("05-10")])
    assert told(db) == {
        "05-06": (1, 0, 0, 0), "05-07": (1, 1, 0, 0), "05-08": (0, 0, 0, -2),
        "05-09": (0, 0, 0, 0), "05-10": (0, 0, 1, 0),
    }  # fmt: skip
    assert told(db, period="week") == {"05-06": (2, 0, 0, 0)}
    # Dormant once, in the period after; the range may go on beyond the last event.
    assert told(db, **{"from": "2024-05-10", "to": "2024-05-13"}) == {
        "05-10": (0, 0, 1, 0), "05-11": (0, 0, 0, -1), "05-12": (0, 0, 0, 0)
    }  # fmt: skip


def test_the_range_looks_back(db: psycopg.Connection) -> None:
    """The periods of a range have the numbers that they have without it."""
    days = ["01-31", "02-01", "02-29", "03-01", "03-31", "05-01"]
    load(db, [event(day, user) for user in ("u1", "u2", "u3") for day in days
              if hash_of(user + day) % 3])  # fmt: skip
    for period in ("day", "week", "month"):
        whole = told(db, period=period)
        part = told(db, period=period, **{"from": "2024-02-29T12:00Z", "to": "2024-03-31T00:01Z"})
        assert len(part) == {"day": 32, "week": 5, "month": 2}[period]
        assert part.items() <= whole.items()


def hash_of(text: str) -> int:
    return sum(map(ord, text))


def test_dormant_is_what_did_not_return(db: psycopg.Connection) -> None:
    """Users of a period = those who return in the next one + those who are dormant there."""
    random = Random(4)
    load(db, [event((date(2024, 1, 1) + timedelta(days=random.randrange(90))).strftime("%m-%d"),
                    f"u{random.randrange(40)}") for _ in range(400)])  # fmt: skip
    for period in ("day", "week", "month"):
        rows = ask(db, "lifecycle", period=period, to="2024-06-01")
        before = 0
        for _, new, returning, resurrecting, dormant in rows:
            assert returning - dormant == before
            before = new + returning + resurrecting
        assert before == 0 and sum(row[1] for row in rows) == 40


def test_days_of_23_and_25_hours_are_days(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('timezone', 'America/New_York')")
    # The evenings of 2 and 3 November 2024 there, 24 hours and 30 minutes apart, and then the 4th.
    load(db, [event("11-03T03:30:00"), event("11-04T04:59:00"), event("11-04T05:00:00")])
    assert told(db) == {"11-02": (1, 0, 0, 0), "11-03": (0, 1, 0, 0), "11-04": (0, 1, 0, 0)}


def test_activity_can_be_one_event(db: psycopg.Connection) -> None:
    load(db, [event("05-06"), event("05-07", event_type="buy"), event("05-08"),
              event("05-08", event_type="buy", account_id="x")])  # fmt: skip
    assert told(db, event="buy") == {"05-07": (1, 0, 0, 0), "05-08": (0, 1, 0, 0)}
    assert told(db, event="buy", account="x") == {"05-08": (1, 0, 0, 0)}
    assert told(db, event="no such") == {}
    asked = {"from": "2024-05-06", "to": "2024-05-08"}
    assert told(db, event="no such", **asked) == {"05-06": (0,) * 4, "05-07": (0,) * 4}


def test_the_unknown_user_is_nobody(db: psycopg.Connection) -> None:
    load(db, [event("05-05", None), event("05-06"), event("05-08", None)])
    # But the last event of all is how far time has come.
    assert [*told(db)] == ["05-06", "05-07", "05-08"]
    assert [row[1:] for row in ask(db, "stickiness")] == [(1, 1), (0, 0), (0, 0)]


def test_stickiness_counts_distinct_periods(db: psycopg.Connection) -> None:
    load(db, [event("05-06"), event("05-06T13:00:00"), event("05-07"), event("05-13"),
              event("05-07", "u2")])  # fmt: skip
    asked = {"from": "2024-05-06", "to": "2024-05-10"}
    assert ask(db, "stickiness", **asked) == [(1, 1, 2), (2, 1, 1), (3, 0, 0), (4, 0, 0)]
    assert ask(db, "stickiness", period="week") == [(1, 1, 2), (2, 1, 1)]
    assert ask(db, "stickiness", period="month") == [(1, 2, 2)]
    # A range asked for is answered whole, also where nobody came.
    asked = {"from": "2024-05-08", "to": "2024-05-10"}
    assert ask(db, "stickiness", **asked) == [(1, 0, 0), (2, 0, 0)]
    assert ask(db, "stickiness", account="nobody") == []


def test_no_events_no_rows(db: psycopg.Connection) -> None:
    for question in ("lifecycle", "stickiness"):
        assert ask(db, question) == []
        assert ask(db, question, **{"from": "2024-05-08"}) == []
        assert ask(db, question, to="2024-05-08") == []
    asked = {"from": "2024-05-08", "to": "2024-05-09"}
    assert told(db, **asked) == {"05-08": (0, 0, 0, 0)}
    assert ask(db, "stickiness", **asked) == [(1, 0, 0)]


def test_an_open_range_ends_inside_the_first_period(db: psycopg.Connection) -> None:
    """Periods count whole: the first event may lie behind the end of the range."""
    load(db, [event("05-03")])
    end = datetime(2024, 4, 30, tzinfo=UTC)
    assert told(db, period="week", to=end) == {"04-29": (1, 0, 0, 0)}
    assert ask(db, "stickiness", period="week", to=end) == [(1, 1, 1)]
    assert told(db, period="day", to=end) == {}


@pytest.mark.parametrize("question", ["lifecycle", "stickiness"])
@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("p_period", {"period": "year"}),
        ("p_period", {"period": None}),
        ("p_from", {"from": "infinity"}),
        ("p_to", {"from": "2024-05-02", "to": "2024-05-01"}),
    ],
)
def test_refused(
    db: psycopg.Connection, question: str, named: str, options: dict[str, object]
) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=named):
        ask(db, question, **options)
