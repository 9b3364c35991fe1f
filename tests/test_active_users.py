"""Active users: against an oracle, and the edges of days, windows and ranges by hand."""

from __future__ import annotations

from datetime import UTC, date, datetime

import psycopg
import pytest
from histories import epochs, exploring, load, loaded, payloads, properties, ranges, timezones
from hypothesis import given
from hypothesis import strategies as st
from oracle_active_users import active_users, standing_active_users
from oracle_events import Calendar, read_events

ASK = "SELECT * FROM analytics.active_users(%s, %s, %s)"


def event(at: str, user: str | None = "u1", account: str | None = "a1") -> dict[str, object]:
    ids = {"user_id": user, "account_id": account}
    return {"event_type": "visit", "occurred_at": at} | {k: v for k, v in ids.items() if v}


@exploring
@given(data=st.data(), timezone=timezones, epoch=epochs)
def test_any_history(
    db: psycopg.Connection, data: st.DataObject, timezone: str, epoch: datetime
) -> None:
    history = data.draw(payloads(epoch, ["visit", "click"], properties()))
    start, end = data.draw(ranges(epoch))
    account = data.draw(st.sampled_from([None, "a1", "nobody"]))
    events, calendar = read_events(history), Calendar(timezone)
    with loaded(db, history, timezone):
        assert db.execute(ASK, (start, end, account)).fetchall() == active_users(
            events, calendar, start, end, account
        )
        db.execute("CALL spectrum.refresh_analytics()")
        standing = db.execute(
            "SELECT account_id, day, dau, wau, mau, stickiness FROM analytics.active_users"
            ' ORDER BY account_id COLLATE "C", day'
        ).fetchall()
        assert standing == standing_active_users(events, calendar)


def test_windows_end_to_the_day(db: psycopg.Connection) -> None:
    load(db, [event("2024-05-01T23:59:59Z"), event("2024-06-02T00:00:00Z", "u2")])
    rows = {row[0]: row[1:4] for row in db.execute("SELECT * FROM analytics.active_users()")}
    assert rows[date(2024, 5, 1)] == (1, 1, 1)
    assert rows[date(2024, 5, 7)] == (0, 1, 1)
    assert rows[date(2024, 5, 8)] == (0, 0, 1)
    assert rows[date(2024, 5, 30)] == (0, 0, 1)
    assert rows[date(2024, 5, 31)] == (0, 0, 0)
    assert rows[date(2024, 6, 2)] == (1, 1, 1)
    assert len(rows) == 33
    stickiness = db.execute(
        "SELECT stickiness FROM analytics.active_users('2024-05-30', '2024-06-01')"
    ).fetchall()
    assert stickiness == [(0.0,), (None,)]


def test_the_day_is_the_local_one(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('timezone', 'America/New_York')")
    times = ["2024-03-10T04:59:00Z", "2024-03-10T05:00:00Z", "2024-03-11T03:59:00Z",
             "2024-03-11T04:00:00Z"]  # fmt: skip
    load(db, [event(at, f"u{number}") for number, at in enumerate(times)])
    days = db.execute("SELECT day, dau FROM analytics.active_users()").fetchall()
    assert days == [(date(2024, 3, 9), 1), (date(2024, 3, 10), 2), (date(2024, 3, 11), 1)]


def test_range_and_scope(db: psycopg.Connection) -> None:
    load(db, [
        event("2024-05-01T12:00:00Z", None, None), event("2024-05-02T12:00:00Z"),
        event("2024-05-02T13:00:00Z", "u2", None), event("2024-05-04T12:00:00Z", None),
    ])  # fmt: skip
    # From the first active day (the unknown user is none) to the last event of all.
    assert [row[:2] for row in db.execute(ASK, (None, None, None))] == [
        (date(2024, 5, 2), 2), (date(2024, 5, 3), 0), (date(2024, 5, 4), 0),
    ]  # fmt: skip
    assert [row[1] for row in db.execute(ASK, (None, None, "a1"))] == [1, 0, 0]
    assert db.execute(ASK, (None, None, "nobody")).fetchall() == []
    # A range asked for is answered whole: zeros before, after and for nobody.
    asked = (datetime(2024, 5, 1, tzinfo=UTC), datetime(2024, 5, 7, tzinfo=UTC))
    assert [row[1] for row in db.execute(ASK, (*asked, "a1"))] == [0, 1, 0, 0, 0, 0]
    assert [row[1] for row in db.execute(ASK, (*asked, "nobody"))] == [0] * 6
    # Days count whole, and the windows look back before the range.
    noon, later = datetime(2024, 5, 3, 12, tzinfo=UTC), datetime(2024, 5, 3, 13, tzinfo=UTC)
    assert [row[:4] for row in db.execute(ASK, (noon, later, None))] == [
        (date(2024, 5, 3), 0, 2, 2)
    ]


def test_no_events_no_rows(db: psycopg.Connection) -> None:
    assert db.execute("SELECT * FROM analytics.active_users()").fetchall() == []
    assert db.execute("SELECT * FROM analytics.active_users").fetchall() == []


def test_a_range_has_two_ends_in_order(db: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_to"):
        db.execute("SELECT * FROM analytics.active_users('2024-05-02', '2024-05-01')")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_from"):
        db.execute("SELECT * FROM analytics.active_users('infinity')")
