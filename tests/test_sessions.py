"""Sessions, attribution and paths: against an oracle over random histories, the edges by hand."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from math import isclose
from random import Random
from typing import Any
from uuid import UUID

import oracle_sessions as oracle
import psycopg
import pytest
from histories import Payload, epochs, exploring, load, loaded, timezones
from hypothesis import given, note
from hypothesis import strategies as st
from oracle_events import Calendar

SESSIONS = "SELECT * FROM analytics.sessions(%(start)s, %(end)s, %(account)s)"
DAILY = "SELECT * FROM analytics.sessions_daily(%(start)s, %(end)s, %(account)s, %(breakdown)s)"
ATTRIBUTION = """
    SELECT * FROM analytics.attribution(
        %(conversion)s, %(start)s, %(end)s, %(model)s, %(account)s
    )
"""
PATHS = """
    SELECT * FROM analytics.paths(
        %(start)s, %(end)s, %(start_event)s, %(max_steps)s, %(account)s
    )
"""
BY_ACCOUNT = """
    WITH units AS (
        SELECT array_agg(user_key) AS users, array_agg(-account_key) AS scopes,
            array_agg('-infinity'::timestamptz) AS since,
            array_agg('infinity'::timestamptz) AS until
        FROM (SELECT DISTINCT user_key, account_key FROM analytics.events) AS unit
        WHERE account_key <> 0
    )
    SELECT account_id, user_id, started_at AT TIME ZONE 'UTC', ended_at AT TIME ZONE 'UTC'
    FROM units
    CROSS JOIN analytics._sessions(
        NULL, NULL, units.users, units.scopes, units.since, units.until, NULL, '{users}'
    ) AS s
    JOIN analytics.accounts ON accounts.account_key = -s.scope
    ORDER BY account_id, user_id, started_at
"""
PART = """
    SELECT s.started_at, s.ended_at
    FROM analytics._sessions(
        NULL, NULL,
        ARRAY(SELECT min(user_key) FROM analytics.events WHERE user_id = %(user)s),
        NULL, ARRAY[%(since)s], ARRAY[%(until)s], NULL, '{}'
    ) AS s
    ORDER BY s.started_at
"""
REFERRERS = [f"https://{host}/x?q=http://a.b" for host in oracle.HOSTS] + [
    "https://www.google.com/", "http://u@x.example:8080#f", "forum.example", "https://T.co/abc", "?"
]  # fmt: skip

randoms = st.randoms(use_true_random=True)

MINUTE, TICK = timedelta(minutes=1), timedelta(microseconds=1)
# Between two events: none, inside a session, its edge to the tick, and the edge of 30 days.
GAPS = [
    timedelta(), TICK, MINUTE, 12 * MINUTE, 30 * MINUTE - TICK, 30 * MINUTE, 30 * MINUTE + TICK,
    31 * MINUTE, 150 * MINUTE, timedelta(hours=24), timedelta(hours=719, minutes=59),
]  # fmt: skip
RESTLESS = [20 * MINUTE, 29 * MINUTE, 30 * MINUTE]


def some_properties(random: Random) -> Payload:
    offered: Payload = {
        "path": ["/", "/a", "/b", ""], "url": ["https://x.example/"], "page": ["home", ""],
        "revenue": [10, "2.50", -1, 0], "currency": ["EUR", "USD"], "plan": ["pro", "free"],
        "utm_source": ["mail", "ads", ""], "utm_medium": [*oracle.MEDIUMS, "odd"],
        "utm_campaign": ["may"], "referrer": REFERRERS,
    }  # fmt: skip
    chance = random.choice([0, 2, 4])
    return {
        name: random.choice(values)
        for name, values in offered.items()
        if random.randrange(10) < (5 if name == "path" else chance)
    }  # fmt: skip


def some_walk(random: Random, epoch: datetime, user: str) -> list[Payload]:
    """What one user did, in order: some stay on for days without a gap."""
    at = epoch + random.choice([timedelta(), timedelta(hours=-30), timedelta(hours=5)])
    walk = []
    is_complete = random.randrange(3)
    accounts = random.choice([["a1"], ["a1", "a1", "a2"]])
    gaps = random.choices(GAPS, k=random.choice([1, 5, 25]))
    if not random.randrange(2):
        restless = random.choices(RESTLESS, k=1) * random.choice([49, 110])
        place = random.randrange(len(gaps))
        gaps[place:place] = restless
    for gap in gaps:
        at += gap
        event = {
            "event_id": str(UUID(int=random.getrandbits(128))),
            "event_type": random.choice(["page_view", "$pageview", "click", "buy"]),
            "occurred_at": at.isoformat(),
            "user_id": user,
            "account_id": random.choice(accounts),
            "geo": {
                name: random.choice(["A", "B"])
                for name in ("country", "region", "city")
                if random.randrange(2)
            },
            "properties": some_properties(random),
        }
        for field in ("user_id", "account_id", "geo", "properties"):
            if not is_complete and not random.randrange(6):
                del event[field]
        walk.append(event)
    return walk


def some_history(random: Random, epoch: datetime) -> list[Payload]:
    """Out of order and some of it twice."""
    history = [
        event
        for number in range(random.choice([1, 2, 4]))
        for event in some_walk(random, epoch, f"u{number}")
    ]
    random.shuffle(history)
    return history + random.choices(history, k=len(history) // 8)


def some_range(random: Random, history: list[Payload]) -> dict[str, datetime | None]:
    """Its ends are on an event, just past one, or open."""
    ends = sorted(
        oracle.at_of(random.choice(history)) + random.choice([timedelta(), TICK, 5 * MINUTE])
        for _ in range(2)
    )
    return dict(zip(("start", "end"), (random.choice([None, end]) for end in ends), strict=True))


def some_scope(random: Random, history: list[Payload]) -> dict[str, Any]:
    account = random.choice([None, None, "a1", "a2", "nobody"])
    return {**some_range(random, history), "account": account}


def in_utc(value: object) -> object:
    """Where a clock is set back, the same instant of two zones is not equal for Python."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return len(found) == len(expected) and all(
        isclose(f, e, rel_tol=1e-12) if isinstance(e, float) else f == e
        for f, e in zip(found, expected, strict=True)
    )


@exploring
@given(random=randoms, timezone=timezones, epoch=epochs)
def test_sessions_of_any_history(
    db: psycopg.Connection, random: Random, timezone: str, epoch: datetime
) -> None:
    history = some_history(random, epoch)
    with loaded(db, history, timezone):
        for _ in range(4):
            scope = some_scope(random, history)
            note(f"{scope}")
            found = [tuple(map(in_utc, row)) for row in db.execute(SESSIONS, scope)]
            assert found == [visit.row() for visit in oracle.sessions(history, **scope)]
        for breakdown in [None, *random.sample([*oracle.BREAKDOWNS, *oracle.TOUCHES], 4)]:
            scope = some_scope(random, history) | {"breakdown": breakdown}
            note(f"{scope}")
            rows = db.execute(DAILY, scope).fetchall()
            daily = {row[:2]: row[2:] for row in rows}
            expected = oracle.sessions_daily(history, Calendar(timezone), **scope)
            assert len(rows) == len(daily)
            assert daily.keys() == expected.keys()
            assert [k for k in daily if not same(daily[k], expected[k])] == []
            assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@exploring
@given(random=randoms, epoch=epochs)
def test_any_part_of_a_history_is_cut_like_the_whole(
    db: psycopg.Connection, random: Random, epoch: datetime
) -> None:
    """Each account by itself, in one go; and of one user what lies between two sessions' starts."""
    history = some_history(random, epoch)
    with loaded(db, history):
        found = db.execute(BY_ACCOUNT).fetchall()
        assert found == [
            (account, visit.user, *(at.replace(tzinfo=None) for at in visit.span))
            for account in ("a1", "a2")
            for visit in sorted(oracle.visits(history, account), key=lambda v: v.user)
        ]
        visits = oracle.visits(history)
        for user in {visit.user for visit in visits}:
            mine = [visit for visit in visits if visit.user == user]
            first, end = sorted(random.choices(range(len(mine) + 1), k=2))
            starts = [visit.started_at for visit in mine] + [mine[-1].ended_at + TICK]
            part = {"user": user, "since": starts[first], "until": starts[end]}
            rows = db.execute(PART, part).fetchall()
            assert [tuple(map(in_utc, row)) for row in rows] == [
                visit.span for visit in mine[first:end]
            ]


@exploring
@given(random=randoms, timezone=timezones, epoch=epochs)
def test_attribution_and_paths_of_any_history(
    db: psycopg.Connection, random: Random, timezone: str, epoch: datetime
) -> None:
    history = some_history(random, epoch)
    with loaded(db, history, timezone):
        for _ in range(6):
            scope = some_scope(random, history)
            where = random.choice([{}, {"plan": "pro"}])
            event, model = random.choice(["buy", "click"]), random.choice(["last", "first"])
            conversion = json.dumps(event if not where else {"event": event, "where": where})
            asked = scope | {"conversion": conversion, "model": model}
            note(f"{asked}")
            rows = db.execute(ATTRIBUTION, asked).fetchall()
            expected = oracle.attribution(history, event, where, model, **scope)
            assert {row[:5]: row[5:] for row in rows} == expected
            assert len(rows) == len(expected)

            asked = scope | {
                "start_event": random.choice([None, "buy", "page_view", "no such"]),
                "max_steps": random.choice([1, 2, 5, 100]),
            }
            note(f"{asked}")
            rows = db.execute(PATHS, asked).fetchall()
            assert {row[:3]: row[3:] for row in rows} == oracle.paths(history, **asked)


def event(at: str, event_type: str = "page_view", user: str = "ann", **rest: Any) -> Payload:
    """At a time of 2024; what else is given are properties, but for the account."""
    moment = at if "T" in at else f"06-03T{at}"
    found = {"event_type": event_type, "occurred_at": f"2024-{moment}Z", "user_id": user}
    if "account" in rest:
        found["account_id"] = rest.pop("account")
    return found | {"properties": rest}


def cuts(db: psycopg.Connection, **options: Any) -> list[tuple[str, int]]:
    named = ", ".join(f"p_{name} => %({name})s" for name in options)
    rows = db.execute(f"SELECT started_at, events FROM analytics.sessions({named})", options)
    return [(f"{at:%d %H:%M}", events) for at, events in rows]


@pytest.fixture
def db(db: psycopg.Connection) -> psycopg.Connection:
    db.execute("SET timezone = 'UTC'")
    return db


def test_exactly_30_minutes_stay(db: psycopg.Connection) -> None:
    load(db, [event("10:00"), event("10:30"), event("11:00:00.000001"), event("11:30:00.000001")])
    assert cuts(db) == [("03 10:00", 2), ("03 11:00", 2)]
    # A late event joins what was apart.
    load(db, [event("10:45")])
    assert cuts(db) == [("03 10:00", 5)]


def test_24_hours_are_the_longest(db: psycopg.Connection) -> None:
    """Whatever the range begins with: also for a user who has not rested for a week."""
    start = datetime.fromisoformat("2024-06-03T00:00:00")
    load(db, [
        event(f"{start + timedelta(minutes=30 * number):%m-%dT%H:%M:%S}") for number in range(337)
    ])  # fmt: skip
    expected = [
        ("03 00:00", 49), ("04 00:30", 49), ("05 01:00", 49), ("06 01:30", 49), ("07 02:00", 49),
        ("08 02:30", 49), ("09 03:00", 43),
    ]  # fmt: skip
    assert cuts(db) == expected
    assert cuts(db, **{"from": "2024-06-05 01:00Z"}) == expected[2:]
    assert cuts(db, **{"from": "2024-06-05 01:01Z", "to": "2024-06-07 02:00Z"}) == expected[3:4]
    assert cuts(db, to="2024-06-03 00:30Z") == expected[:1]


def test_a_user_of_two_accounts(db: psycopg.Connection) -> None:
    """Together one session, in each account what happened there."""
    load(db, [
        event("10:00", account="x"), event("10:20", account="y"), event("10:40", account="x"),
        event("11:00", account="y"), event("11:10", user="bob", account="y"),
    ])  # fmt: skip
    assert cuts(db) == [("03 10:00", 4), ("03 11:10", 1)]
    assert cuts(db, account="x") == [("03 10:00", 1), ("03 10:40", 1)]
    assert cuts(db, account="y") == [("03 10:20", 1), ("03 11:00", 1), ("03 11:10", 1)]


def test_bounces_and_pages(db: psycopg.Connection) -> None:
    load(db, [
        event("10:00", "click", "one"),
        event("10:00", "click", "two"), event("10:01", "click", "two"),
        event("10:00", "click", "page"), event("10:01", "$pageview", "page", url="u", page="p"),
        event("10:00", user="pages", path="/a"), event("10:01", user="pages", path="", page="p"),
        event("10:00", user="none", path="/a"), event("10:01", user="none"),
    ])  # fmt: skip
    rows = db.execute(
        "SELECT user_id, page_views, is_bounce, entry_page, exit_page FROM analytics.sessions()"
    )
    assert {row[0]: row[1:] for row in rows} == {
        "one": (0, True, None, None), "two": (0, False, None, None),
        "page": (1, True, "u", "u"), "pages": (2, False, "/a", "p"), "none": (2, False, "/a", None),
    }  # fmt: skip


def test_a_session_belongs_to_the_day_of_its_first_event(db: psycopg.Connection) -> None:
    load(db, [event("03-30T22:59"), event("03-30T23:10"), event("03-31T22:00"),
              event("04-02T12:00")])  # fmt: skip
    daily = "SELECT day::text, sessions, events FROM analytics.sessions_daily()"
    assert db.execute(daily).fetchall() == [
        ("2024-03-30", 1, 2), ("2024-03-31", 1, 1), ("2024-04-01", 0, 0), ("2024-04-02", 1, 1)
    ]  # fmt: skip
    # The last of March has 23 hours there: from 23:00 to 22:00, as UTC has it.
    db.execute("SELECT spectrum.configure('timezone', 'Europe/Berlin')")
    assert db.execute(daily).fetchall() == [
        ("2024-03-30", 1, 2), ("2024-03-31", 0, 0), ("2024-04-01", 1, 1), ("2024-04-02", 1, 1)
    ]  # fmt: skip


def test_touches_of_30_days(db: psycopg.Connection) -> None:
    """The 30 days run between the starts of the two sessions and include their end."""
    load(db, [
        event("06-01T10:00", utm_source="letter", utm_medium="email"),
        event("06-20T10:00", referrer="https://www.forum.example/t/1"),
        event("06-25T10:00"),
        event("07-01T10:00"), event("07-01T10:20", "buy", revenue=10),
        event("07-01T10:00:00.000001", user="bob"),
        event("06-01T10:00", user="bob", utm_source="letter", utm_medium="email"),
        event("07-01T10:20", "buy", "bob", revenue=5, currency="EUR"),
    ])  # fmt: skip
    ask = "SELECT channel, source, currency, conversions, users, revenue FROM analytics.attribution"
    direct = ("direct", None, "EUR", 1, 1, 5)
    assert db.execute(f"""{ask}('"buy"')""").fetchall() == [
        direct, ("referral", "forum.example", "USD", 1, 1, 10)
    ]  # fmt: skip
    first = [direct, ("email", "letter", "USD", 1, 1, 10)]
    assert db.execute(f"""{ask}('"buy"', p_model => 'first')""").fetchall() == first
    # A range that begins in the middle of the session sees the same.
    asked = f"""{ask}('"buy"', '2024-07-01 10:20Z', '2024-07-01 10:21Z', 'first')"""
    assert db.execute(asked).fetchall() == first


def test_touches_of_a_user_who_does_not_rest(db: psycopg.Connection) -> None:
    """Where his sessions begin depends on days before those in which a touch can be."""
    start = datetime.fromisoformat("2024-05-28T00:00:00")
    times = [start + timedelta(minutes=30 * number) for number in range(49 * 6)]
    load(db, [event(f"{at:%m-%dT%H:%M:%S}") for at in times])
    load(db, [
        event("06-03T03:00", utm_source="letter", utm_medium="email"), event("07-03T03:00", "buy")
    ])  # fmt: skip
    for at in (None, "2024-07-03 00:00Z"):
        found = db.execute("SELECT channel FROM analytics.attribution('\"buy\"', %s)", (at,))
        assert found.fetchall() == [("email",)]


def test_paths(db: psycopg.Connection) -> None:
    load(db, [
        event("10:00", "a"), event("10:01", "b"), event("10:02", "a"), event("10:03", "b"),
        event("12:00", "a"), event("12:01", "b"),
        event("10:00", "b", "bob"), event("10:01", "a", "bob"), event("10:02", "a", "bob"),
        {"event_type": "a", "occurred_at": "2024-06-03T10:00Z"},
        {"event_type": "b", "occurred_at": "2024-06-03T10:01Z"},
    ])  # fmt: skip
    assert db.execute("SELECT * FROM analytics.paths()").fetchall() == [
        (1, "a", "b", 2, 1), (1, "b", "a", 1, 1), (2, "a", "a", 1, 1), (2, "b", "a", 1, 1),
        (3, "a", "b", 1, 1),
    ]  # fmt: skip
    begun = "SELECT * FROM analytics.paths(p_start_event => 'b', p_max_steps => 1)"
    assert db.execute(begun).fetchall() == [(1, "b", "a", 2, 2)]


REFUSED: list[tuple[str, str]] = [
    ("p_to", "sessions('2024-05-02', '2024-05-01')"),
    ("p_from", "sessions('-infinity')"),
    ("p_to", "sessions_daily('2024-05-02', '2024-05-01')"),
    ("p_breakdown", "sessions_daily(p_breakdown => 'plan')"),
    ("p_model", "attribution('\"buy\"', p_model => 'linear')"),
    ("p_model", "attribution('\"buy\"', p_model => NULL)"),
    ("p_conversion", "attribution('[\"buy\"]')"),
    ("p_conversion", "attribution(NULL)"),
    ("p_conversion", 'attribution(\'{"event": "buy", "when": 1}\')'),
    ("p_to", "attribution('\"buy\"', '2024-05-02', '2024-05-01')"),
    ("p_max_steps", "paths(p_max_steps => 0)"),
    ("p_max_steps", "paths(p_max_steps => NULL)"),
    ("p_to", "paths('2024-05-02', '2024-05-01')"),
]


def test_invalid_arguments(db: psycopg.Connection) -> None:
    for argument, call in REFUSED:
        with pytest.raises(psycopg.errors.InvalidParameterValue) as refusal:
            db.execute(f"SELECT * FROM analytics.{call}")
        assert f"argument {argument}" in str(refusal.value), call
        assert str(refusal.value.diag.message_hint).startswith("Expected ")


def test_nothing_there(db: psycopg.Connection) -> None:
    for call in ("sessions()", "sessions_daily()", "attribution('\"buy\"')", "paths()",
                 "paths(p_start_event => 'buy')"):  # fmt: skip
        assert db.execute(f"SELECT * FROM analytics.{call}").fetchall() == []
