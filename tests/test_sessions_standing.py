"""The standing sessions: against an oracle, however batches and refreshes follow each other."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import oracle_sessions as oracle
import psycopg
from histories import Payload, epochs, exploring, load, timezones
from hypothesis import given, note
from oracle_events import Calendar
from test_sessions import GAPS, event, randoms, same, some_history

DAILY = """
    SELECT account_id, day, breakdown, value, sessions, users, bounces, bounce_rate, mean_seconds,
        events, page_views
    FROM analytics.sessions_daily
"""
ATTRIBUTED = """
    SELECT account_id, day, channel, source, medium, campaign, currency, conversions, users, revenue
    FROM analytics.attributed_conversions WHERE attribution = %s
"""
ATTRIBUTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "last buy": ("buy", {}, "last"),
    "first professional click": ("click", {"plan": "pro"}, "first"),
}
FLOWS = """
    SELECT account_id, day, step, source, target, transitions, users
    FROM analytics.path_flows WHERE paths = %s
"""
PATHS: dict[str, tuple[str | None, int]] = {"all": (None, 5), "from a click": ("click", 2)}
SEND_AGAIN = """
    UPDATE raw_events SET payload = %(payload)s, status = 'pending'
    WHERE payload ->> 'event_id' = %(event_id)s AND status IN ('done', 'failed')
"""
REFRESHES = (
    "CALL spectrum.refresh_analytics()", "SELECT spectrum._refresh_some(1)",
    "SELECT spectrum._refresh_some(30)",
)  # fmt: skip


def changed(random: Random, payload: Payload) -> Payload:
    """The event as a correction has it: elsewhere, later, somebody else's, or not at all."""
    at = oracle.at_of(payload) + random.choice([-1, 1]) * random.choice(GAPS)
    return payload | random.choice([
        {"event_type": ""}, {"occurred_at": at.isoformat()}, {"user_id": "u0"},
        {"account_id": "a2"}, {"properties": {"path": "/late"}},
    ])  # fmt: skip


def define(db: psycopg.Connection) -> None:
    for name, (event_type, where, model) in ATTRIBUTIONS.items():
        conversion = json.dumps({"event": event_type, "where": where} if where else event_type)
        db.execute("SELECT spectrum.define_attribution(%s, %s, %s)", (name, conversion, model))
    for name, asked in PATHS.items():
        db.execute("SELECT spectrum.define_paths(%s, %s, %s)", (name, *asked))


def live(random: Random, db: psycopg.Connection, history: list[Payload]) -> list[Payload]:
    """Sends the history in pieces, corrects some of it, and refreshes now and then: what the events
    are in the end. All copies of an event say the same. Somewhere in between attributions and
    paths are defined."""
    left, sent = list(history), {}
    defined_at = random.choice([0, len(history), len(history) // 2])
    while left:
        if defined_at is not None and len(left) <= len(history) - defined_at:
            defined_at = None
            define(db)
        size = random.choice([1, 3, 30, 300])
        piece, left = left[:size], left[size:]
        load(db, [sent.setdefault(payload["event_id"], payload) for payload in piece])
        for event_id in random.sample(sorted(sent), k=min(len(sent), random.choice([0, 0, 1, 3]))):
            sent[event_id] = changed(random, sent[event_id])
            db.execute(SEND_AGAIN, {"event_id": event_id, "payload": json.dumps(sent[event_id])})
        for _ in range(random.choice([0, 1, 2])):
            db.execute("CALL spectrum.process_batch(%s)", (random.choice([1, 10_000]),))
        for refresh in random.choices(REFRESHES, k=random.choice([0, 1, 2])):
            db.execute(refresh)
        # What is made anew has no past: seldom.
        if not random.randrange(30):
            db.execute("SELECT spectrum.rebuild_reports('sessions')")
    if defined_at is not None:
        define(db)
    return [payload for payload in sent.values() if payload["event_type"]]


def named(
    db: psycopg.Connection, query: str, name: str, keys: int
) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    rows = db.execute(query, (name,)).fetchall()
    found = {row[:keys]: row[keys:] for row in rows}
    assert len(found) == len(rows)
    return found


def standing(db: psycopg.Connection) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    db.execute("CALL spectrum.process_batch()")
    db.execute("CALL spectrum.refresh_analytics()")
    rows = db.execute(DAILY).fetchall()
    found = {row[:4]: row[4:] for row in rows}
    assert len(found) == len(rows)
    return found


@exploring
@given(random=randoms, timezone=timezones, later_zone=timezones, epoch=epochs)
def test_any_life(
    db: psycopg.Connection, random: Random, timezone: str, later_zone: str, epoch: datetime
) -> None:
    with db.transaction(force_rollback=True):
        db.execute("SELECT spectrum.configure('timezone', %s)", (timezone,))
        history = live(random, db, some_history(random, epoch))
        for zone in (timezone, later_zone):
            db.execute("SELECT spectrum.configure('timezone', %s)", (zone,))
            found = standing(db)
            expected = oracle.standing_sessions_daily(history, Calendar(zone))
            note(f"{zone}: {found.keys() ^ expected.keys()}")
            assert found.keys() == expected.keys()
            assert [key for key in found if not same(found[key], expected[key])] == []
            for name, wanted in ATTRIBUTIONS.items():
                assert named(db, ATTRIBUTED, name, 7) == oracle.standing_attribution(
                    history, Calendar(zone), *wanted
                ), name
            for name, asked in PATHS.items():
                assert named(db, FLOWS, name, 5) == oracle.standing_paths(
                    history, Calendar(zone), *asked
                ), name


def spans(db: psycopg.Connection) -> list[tuple[str, str, int]]:
    db.execute("CALL spectrum.refresh_analytics()")
    kept = db.execute(
        "SELECT session_start, session_end, events FROM spectrum.rollup_sessions ORDER BY 1"
    )
    return [(f"{start:%d %H:%M}", f"{end:%d %H:%M}", events) for start, end, events in kept]


def test_a_late_event_moves_all_of_its_island(db: psycopg.Connection) -> None:
    """Three days without a rest, begun half an hour earlier than was known; then a rest in it."""
    start = datetime(2024, 6, 3, tzinfo=UTC)
    db.execute("SET timezone = 'UTC'")
    day = [event(f"{start + timedelta(minutes=30 * n):%m-%dT%H:%M}") for n in range(145)]
    load(db, [*day[1:60], *day[61:], event("06-07T12:00")])
    assert spans(db) == [
        ("03 00:30", "04 00:30", 49), ("04 01:00", "04 05:30", 10), ("04 06:30", "05 06:30", 49),
        ("05 07:00", "06 00:00", 35), ("07 12:00", "07 12:00", 1),
    ]  # fmt: skip
    load(db, [day[0], day[60]])
    assert spans(db) == [
        ("03 00:00", "04 00:00", 49), ("04 00:30", "05 00:30", 49), ("05 01:00", "06 00:00", 47),
        ("07 12:00", "07 12:00", 1),
    ]  # fmt: skip


def test_an_event_that_came_and_went_between_two_refreshes(db: psycopg.Connection) -> None:
    """A refresh of the batch before may have met it: it must not stay."""
    db.execute("SET timezone = 'UTC'")
    load(db, [event("10:00")])
    load(db, [event("10:10") | {"event_id": "gone"}])
    assert db.execute("SELECT has_more FROM spectrum._refresh_some(1)").fetchone() == (True,)
    db.execute(
        "UPDATE raw_events SET status = 'pending', payload = payload || '{\"user_id\": \"bob\"}' "
        "WHERE payload ->> 'event_id' = 'gone'"
    )
    db.execute("CALL spectrum.process_batch()")
    assert spans(db) == [("03 10:00", "03 10:00", 1), ("03 10:10", "03 10:10", 1)]


def test_a_page_longer_than_an_index_can_hold(db: psycopg.Connection) -> None:
    noise = Random(1)
    pages = ["".join(chr(noise.randrange(0x4E00, 0x9FFF)) for _ in range(9_000)) for _ in range(2)]
    load(db, [event("10:00", path=pages[0]), event("11:00", path=pages[1])])
    db.execute("CALL spectrum.refresh_analytics()")
    shown = db.execute(
        "SELECT value, sessions FROM analytics.sessions_daily WHERE breakdown = 'entry_page'"
    ).fetchall()
    assert sorted(shown) == sorted((page, 1) for page in pages)


def test_touches_that_come_late_change_and_go(db: psycopg.Connection) -> None:
    """As far before a conversion as can be: 30 days from start to start of the sessions, and 24
    hours from there."""
    db.execute("SET timezone = 'UTC'")
    db.execute("""SELECT spectrum.define_attribution('sale', '"buy"')""")
    stay = [
        event(f"{at:%m-%dT%H:%M}", "buy" if hours == 24 else "page_view")
        for hours in (n / 2 for n in range(49))
        for at in [datetime(2024, 7, 3, 10) + timedelta(hours=hours)]
    ]
    ask = "SELECT day, channel, source FROM analytics.attributed_conversions"

    def told(*events: Payload) -> list[tuple[Any, ...]]:
        load(db, events)
        db.execute("CALL spectrum.refresh_analytics()")
        return [(f"{day:%m-%d}", *credit) for day, *credit in db.execute(ask).fetchall()]

    letter = event("06-03T10:00", utm_source="letter", utm_medium="email") | {"event_id": "late"}
    assert told(*stay) == [("07-04", "direct", None)]
    assert told(letter) == [("07-04", "email", "letter")]
    for at, properties, credit in (
        ("10:00", {"utm_source": "ads", "utm_medium": "email"}, ("email", "ads")),
        ("09:59", {"utm_source": "ads"}, ("direct", None)),
        ("10:01", {"referrer": "https://x.example/"}, ("referral", "x.example")),
        ("10:01", {}, ("direct", None)),
    ):
        again = event(f"06-03T{at}") | {"event_id": "late", "properties": properties}
        db.execute(SEND_AGAIN, {"event_id": "late", "payload": json.dumps(again)})
        assert told() == [("07-04", *credit)], at
