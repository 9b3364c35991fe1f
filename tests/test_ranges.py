"""How the open ends of a range are settled: the first and the last event, found in few looks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random

import psycopg
from histories import exploring, load, loaded, timezones
from hypothesis import given, note
from hypothesis import strategies as st
from oracle_events import of_account, read_events, time_range

SETTLE = "SELECT * FROM analytics._settle_range(%s, %s, %s)"


@exploring
@given(random=st.randoms(use_true_random=True), timezone=timezones)
def test_any_history(db: psycopg.Connection, random: Random, timezone: str) -> None:
    """Months apart and around the ends of months, from the first possible one on."""
    history = [
        {
            "event_type": "visit",
            "occurred_at": (
                datetime(2000, 1, 1, tzinfo=UTC)
                + timedelta(
                    days=random.choice([0, 30, 31, 59, 60, 366, 4000, 9000, 9700]),
                    seconds=random.choice([0, 1, 86399]),
                    microseconds=random.choice([0, 999999]),
                )
            ).isoformat(),
            "account_id": random.choice(["a1", "a2"]),
        }
        for _ in range(random.choice([0, 1, 2, 5]))
    ]
    events = read_events(history)
    note(f"{history}")
    with loaded(db, history, timezone):
        for account in (None, "a1", "nobody"):
            (found,) = db.execute(SETTLE, (None, None, account)).fetchall()
            of_it = of_account(events, account)
            assert (found if of_it else None) == time_range(of_it, events, None, None)
            assert of_it or found[0] is None


def test_an_end_that_is_given_stays(db: psycopg.Connection) -> None:
    start, end = datetime(1990, 1, 1, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)
    assert db.execute(SETTLE, (start, end, None)).fetchall() == [(start, end)]
    assert db.execute(SETTLE, (start, None, None)).fetchall() == [(start, None)]
    assert db.execute(SETTLE, (None, end, None)).fetchall() == [(None, end)]
    at = datetime(2024, 5, 6, 12, tzinfo=UTC)
    load(db, [{"event_type": "visit", "occurred_at": at.isoformat()}])
    just_after = at + timedelta(microseconds=1)
    assert db.execute(SETTLE, (start, None, None)).fetchall() == [(start, just_after)]
    assert db.execute(SETTLE, (None, end, None)).fetchall() == [(at, end)]
    assert db.execute(SETTLE, (None, end, "a1")).fetchall() == [(None, end)]


def test_months_are_those_of_utc(db: psycopg.Connection) -> None:
    """A month back from 31 March, 21:30, in Newfoundland is 29 February: 1 March, 01:00, in UTC."""
    db.execute("SET timezone = 'America/St_Johns'")
    at = datetime(2024, 3, 1, 0, 30, tzinfo=UTC)
    load(db, [{"event_type": "visit", "occurred_at": at.isoformat()}])
    expected = [(at, at + timedelta(microseconds=1))]
    assert db.execute(SETTLE, (None, None, None)).fetchall() == expected
