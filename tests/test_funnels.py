"""Funnels: against brute force over random histories, and the edges by hand."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

import psycopg
import pytest
from histories import Payload, exploring, load, loaded, timezones
from hypothesis import given, note
from hypothesis import strategies as st
from oracle_events import Calendar
from oracle_funnel import Options, Step, funnel, read_events, standing_days, standing_funnel

EPOCH = datetime(2024, 3, 30, 22, tzinfo=UTC)  # the next night is an hour short in Berlin
ASK = """
    SELECT * FROM analytics.funnel(
        %(steps)s, p_from => %(start)s, p_to => %(end)s, p_window => %(window)s,
        p_order => %(order)s, p_entry => %(entry)s, p_unit => %(unit)s, p_account => %(account)s,
        p_breakdown => %(breakdown)s, p_attribution => %(attribution)s, p_exclude => %(exclude)s
    )
"""
DEFINE = """
    SELECT spectrum.define_funnel(
        'f', %(steps)s, p_window => %(window)s, p_order => %(order)s, p_entry => %(entry)s,
        p_unit => %(unit)s, p_breakdown => %(breakdown)s, p_attribution => %(attribution)s,
        p_exclude => %(exclude)s
    )
"""

# Few instants and few types, so that ties, repeats and events of several steps are the rule.
TICKS = (0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12, 20, 40, 150, 159, 160)
PLANS = ("pro", "free", "", None, 1, True)
WHERES: tuple[Payload, ...] = ({}, {"plan": "pro"}, {"plan": "free"}, {"plan": 1})
# Hypothesis left to itself draws the same few over and over. False has a failure shrunk.
randoms = st.randoms(use_true_random=True)


def some_event(random: Random) -> Payload:
    """One in ten has no user; the other fields come and go."""
    event: Payload = {
        "event_type": random.choice("AABBCX"),
        "occurred_at": (EPOCH + timedelta(minutes=10 * random.choice(TICKS))).isoformat(),
    }
    if random.randrange(10):
        event["user_id"] = f"u{random.randrange(6)}"
    if random.randrange(4):
        event["account_id"] = f"a{random.randrange(2)}"
    if random.randrange(2):
        event["geo"] = {"country": random.choice(["DE", "US"])}
    if random.randrange(3):
        event["properties"] = {"plan": random.choice(PLANS)}
    return event


def some_history(random: Random) -> list[Payload]:
    """Many users at once. Ids order ties at random."""
    history = [some_event(random) for _ in range(random.choice([1, 10, 30, 60, 60, 80]))]
    for event, number in zip(history, random.sample(range(1000), len(history)), strict=True):
        event["event_id"] = str(UUID(int=number))
    return history


def some_steps(random: Random, most: int = 4) -> list[Step]:
    steps: list[Step] = []
    for _ in range(random.randint(1, most)):
        filtered = {"event": random.choice("AAB"), "where": random.choice(WHERES)}
        steps.append(random.choice([random.choice("AABBCZ"), filtered]))
    return steps


def some_options(random: Random, range_of_step_1: bool = True) -> Options:
    ends = sorted(EPOCH + timedelta(minutes=10 * random.choice(TICKS)) for _ in "se")
    return Options(
        window=timedelta(minutes=random.choice([0, 10, 20, 30, 60, 300, 20160])),
        order=random.choice(["ordered", "strict", "any"]),
        entry=random.choice(["best", "best", "first"]),
        unit=random.choice(["user", "user", "account", "session"]),
        breakdown=random.choice([None, None, "plan", "country", "account_id", "nothing"]),
        attribution=random.choice(["first", "last"]),
        exclude=random.choice([[], [], ["X"], some_steps(random, 2)]),
        start=ends[0] if range_of_step_1 and random.randrange(2) else None,
        end=ends[1] if range_of_step_1 and random.randrange(2) else None,
    )


def arguments(
    steps: Sequence[Step], options: Options, account: str | None = None
) -> dict[str, object]:
    return vars(options) | {
        "steps": json.dumps(steps),
        "exclude": json.dumps(options.exclude) if options.exclude else None,
        "account": account,
    }


def assert_same(found: Sequence[tuple[Any, ...]], wanted: Sequence[tuple[Any, ...]]) -> None:
    """Equal, but for the last digits of means."""
    assert [row[:-1] for row in found] == [row[:-1] for row in wanted]
    assert [row[-1] for row in found] == [
        None if row[-1] is None else pytest.approx(row[-1], rel=1e-12) for row in wanted
    ]


@exploring
@given(random=randoms)
def test_any_funnel_of_any_history(db: psycopg.Connection, random: Random) -> None:
    history = some_history(random)
    known = read_events(history)
    with loaded(db, history):
        for _ in range(10):
            steps, options = some_steps(random), some_options(random)
            account = random.choice([None, None, None, "a1", "nobody"])
            note(f"{steps} {options} {account}")
            found = db.execute(ASK, arguments(steps, options, account)).fetchall()
            assert_same(found, funnel(known, steps, options, account))


@exploring
@given(random=randoms, timezone=timezones)
def test_standing_funnels_agree(db: psycopg.Connection, random: Random, timezone: str) -> None:
    history = some_history(random)
    known = read_events(history)
    steps, options = some_steps(random), some_options(random, range_of_step_1=False)
    note(f"{steps} {options}")
    with loaded(db, history, timezone):
        db.execute(DEFINE, arguments(steps, options))
        db.execute("CALL spectrum.refresh_analytics()")
        found = db.execute(
            "SELECT account_id, breakdown, step, event_type, users, rate_from_start,"
            " rate_from_previous, median_seconds, mean_seconds FROM analytics.conversion_funnels"
            ' ORDER BY account_id COLLATE "C", breakdown COLLATE "C", step'
        ).fetchall()
        assert_same(found, standing_funnel(known, steps, options))
        days = db.execute(
            "SELECT account_id, day, step, users FROM analytics.funnel_days"
            ' ORDER BY account_id COLLATE "C", day, step'
        ).fetchall()
        assert days == standing_days(known, steps, options, Calendar(timezone))


def test_a_crowd(db: psycopg.Connection) -> None:
    """Long histories that arrive in no order: whoever puts them in order must not lose it."""
    random = Random(60)
    history = [
        {
            "event_type": random.choice("AAABBC"),
            "user_id": f"u{random.randrange(150)}",
            "occurred_at": (EPOCH + timedelta(seconds=random.randrange(200_000))).isoformat(),
        }
        for _ in range(9_000)
    ]
    load(db, history)
    times: dict[tuple[str, str], list[datetime]] = {}
    for each in sorted(history, key=lambda each: each["occurred_at"]):
        at = datetime.fromisoformat(each["occurred_at"])
        times.setdefault((each["user_id"], each["event_type"]), []).append(at)

    def reached(user: str, start: datetime, window: timedelta) -> int:
        last = start
        for level, step in enumerate("BC", start=1):
            candidates = times.get((user, step), [])
            place = bisect_right(candidates, last)
            if place == len(candidates) or candidates[place] > start + window:
                return level
            last = candidates[place]
        return 3

    for minutes in (20, 40, 80):
        levels = [
            max(reached(user, start, timedelta(minutes=minutes)) for start in starts)
            for (user, event_type), starts in times.items()
            if event_type == "A"
        ]
        wanted = [sum(level >= step for level in levels) for step in (1, 2, 3)]
        assert units(db, "ABC", window=f"{minutes} minutes") == wanted
        assert wanted[0] > wanted[2] > 0


def event(
    event_type: str, clock: str, user: str = "u1", number: int | None = None, **properties: object
) -> Payload:
    return {
        "event_type": event_type,
        "user_id": user,
        "occurred_at": f"2024-05-01T{clock}Z",
        "properties": properties,
    } | ({} if number is None else {"event_id": str(UUID(int=number))})


def units(db: psycopg.Connection, steps: Sequence[Step], **options: object) -> list[int]:
    return [row[3] for row in ask(db, steps, **options)]


def ask(db: psycopg.Connection, steps: Sequence[Step], **options: object) -> list[Any]:
    named = ", ".join(f"p_{name} => %({name})s" for name in options)
    query = f"SELECT * FROM analytics.funnel(%(steps)s{', ' * bool(named)}{named})"
    return db.execute(query, {"steps": json.dumps(list(steps))} | options).fetchall()


def test_best_and_first_entry(db: psycopg.Connection) -> None:
    """The worked example: A 1:00, A 1:30, B 1:45, C 2:15 with a window of one hour."""
    load(db, [event("A", "01:00"), event("A", "01:30"), event("B", "01:45"), event("C", "02:15")])
    assert ask(db, "ABC", window="1 hour") == [
        (None, 1, "A", 1, 1.0, 1.0, None, None),
        (None, 2, "B", 1, 1.0, 1.0, 900.0, 900.0),
        (None, 3, "C", 1, 1.0, 1.0, 1800.0, 1800.0),
    ]
    assert ask(db, "ABC", window="1 hour", entry="first") == [
        (None, 1, "A", 1, 1.0, 1.0, None, None),
        (None, 2, "B", 1, 1.0, 1.0, 2700.0, 2700.0),
        (None, 3, "C", 0, 0.0, 0.0, None, None),
    ]


def test_the_window_is_inclusive(db: psycopg.Connection) -> None:
    load(db, [event("A", "01:00"), event("B", "02:00")])
    assert units(db, "AB", window="1 hour") == [1, 1]
    assert units(db, "AB", window="59 minutes 59.999999 seconds") == [1, 0]


def test_a_day_of_the_window_has_24_hours(db: psycopg.Connection) -> None:
    db.execute("SET timezone = 'Europe/Berlin'")
    load(db, [
        event("A", "12:00") | {"occurred_at": "2024-03-30T12:00:00Z"},
        event("B", "12:00") | {"occurred_at": "2024-03-31T12:00:00Z"},
    ])  # fmt: skip
    assert units(db, "AB", window="1 day") == [1, 1]


def test_ties_do_not_advance(db: psycopg.Connection) -> None:
    load(db, [event("A", "01:00"), event("B", "01:00"), event("B", "01:05", "u2")])
    assert units(db, "AB") == [1, 0]
    assert units(db, "AB", order="any") == [2, 1]


def test_two_steps_of_one_type_need_two_events(db: psycopg.Connection) -> None:
    load(db, [event("A", "01:00"), event("A", "01:00", "u2"), event("A", "01:10", "u2")])
    assert units(db, "AA") == units(db, "AA", order="any") == [2, 1]
    assert units(db, "AAA", order="any") == [2, 1, 0]


def test_any_order_fills_as_many_steps_as_it_can(db: psycopg.Connection) -> None:
    """The event that fits both steps takes the one that the other event leaves."""
    load(db, [event("A", "01:00", plan="pro"), event("A", "01:10", plan="free")])
    pro = {"event": "A", "where": {"plan": "pro"}}
    assert units(db, ["A", pro], order="any") == [1, 1]
    assert units(db, ["A", pro]) == [1, 0]
    assert units(db, [pro, "A"]) == [1, 1]


def test_any_order_moves_an_event_twice(db: psycopg.Connection) -> None:
    load(db, [event("A", "01:00", p=1, q=1), event("A", "01:10"), event("A", "01:20", p=1)])
    steps: list[Step] = ["A", {"event": "A", "where": {"p": 1}}, {"event": "A", "where": {"q": 1}}]
    assert units(db, steps, order="any") == [1, 1, 1]


def test_strict_allows_nothing_between(db: psycopg.Connection) -> None:
    load(db, [
        event("A", "01:00"), event("X", "01:01"), event("B", "01:02"),
        event("A", "01:00", "u2"), event("B", "01:02", "u2"), event("X", "01:02", "u2"),
        event("A", "01:00", "u3"), event("A", "01:01", "u3"), event("B", "01:02", "u3"),
    ])  # fmt: skip
    assert units(db, "AB", order="strict") == [3, 2]
    assert units(db, "AB", order="strict", entry="first") == [3, 1]


def test_exclusions_void_an_entry(db: psycopg.Connection) -> None:
    load(db, [
        event("A", "01:00"), event("X", "01:01"), event("B", "01:02"),
        event("A", "01:00", "u2"), event("X", "01:01", "u2"),
        event("A", "01:00", "u3"), event("X", "01:01", "u3"), event("A", "01:02", "u3"),
        event("B", "01:03", "u3"), event("X", "01:03", "u3"),
    ])  # fmt: skip
    excluded = json.dumps([{"event": "X"}])
    assert units(db, "AB", exclude=excluded) == [2, 1]
    assert units(db, "AB", exclude=excluded, entry="first") == [1, 0]
    assert units(db, "AB", exclude="[]") == [3, 2]


def test_the_range_limits_step_1(db: psycopg.Connection) -> None:
    load(db, [event("A", "01:00"), event("A", "02:00", "u2"), event("B", "03:00"),
              event("B", "03:00", "u2")])  # fmt: skip
    hour = {"from": "2024-05-01 01:00+00", "to": "2024-05-01 02:00+00"}
    assert units(db, "AB", **hour) == [1, 1]
    assert units(db, "AB", **{"from": "2024-05-01 02:00+00"}) == [1, 1]
    assert units(db, "AB", to="2024-05-01 01:00+00") == [0, 0]


def test_breakdown_at_the_first_or_last_step(db: psycopg.Connection) -> None:
    load(db, [
        event("A", "01:00", number=2, plan="free"), event("A", "01:00", number=1, plan="trial"),
        event("B", "01:01", plan="pro"), event("A", "01:00", "u2"),
    ])  # fmt: skip
    by_plan = [(row[0], row[1], row[3]) for row in ask(db, "AB", breakdown="plan")]
    assert by_plan == [("trial", 1, 1), ("trial", 2, 1), (None, 1, 1), (None, 2, 0)]
    at_last = [(row[0], row[3]) for row in ask(db, "AB", breakdown="plan", attribution="last")]
    assert at_last == [("pro", 1), ("pro", 1), (None, 1), (None, 0)]


def test_sessions_as_units(db: psycopg.Connection) -> None:
    """Exactly 30 minutes stay one session, a second more begins the next; so does a day's end."""
    load(db, [event("A", "01:00"), event("B", "01:30"), event("A", "02:00:01"),
              event("B", "02:30:02")])  # fmt: skip
    assert units(db, "AB", unit="session") == [2, 1]
    chatty = [
        event("P", "00:00", "u2") | {"occurred_at": f"2024-06-{1 + m // 1440:02}"
        f"T{m // 60 % 24:02}:{m % 60:02}:00Z"} for m in range(0, 1500, 30)
    ]  # fmt: skip
    load(db, chatty)
    assert units(db, "P", unit="session") == [2]


def test_nobody_is_zeros(db: psycopg.Connection) -> None:
    rows = [(None, 1, "no such", 0, 0.0, 0.0, None, None), (None, 2, "B", 0, 0.0, 0.0, None, None)]
    assert ask(db, ["no such", "B"]) == rows
    load(db, [event("B", "01:00"), {**event("A", "01:00"), "user_id": None}])
    assert ask(db, ["no such", "B"]) == rows
    assert units(db, "AB", account="nobody") == [0, 0]


REFUSED: list[tuple[str, dict[str, object]]] = [
    ("p_steps", {"steps": None}),
    ("p_steps", {"steps": "[]"}),
    ("p_steps", {"steps": '{"event": "A"}'}),
    ("p_steps", {"steps": json.dumps(["A"] * 31)}),
    ("p_steps[1]", {"steps": "[null]"}),
    ("p_steps[2]", {"steps": '["A", ""]'}),
    ("p_steps[2]", {"steps": '["A", {"where": {}}]'}),
    ("p_steps[1]", {"steps": '[{"event": 7}]'}),
    ("p_steps[1]", {"steps": '[{"event": "A", "where": []}]'}),
    ("p_steps[1]", {"steps": '[{"event": "A", "where": null}]'}),
    ("p_steps[1]", {"steps": '[{"event": "A", "were": {}}]'}),
    ("p_exclude[1]", {"exclude": "[3]"}),
    ("p_exclude", {"exclude": '"X"'}),
    ("p_window", {"window": "-1 second"}),
    ("p_window", {"window": None}),
    ("p_window", {"window": "11 years"}),
    ("p_order", {"order": "sorted"}),
    ("p_order", {"order": None}),
    ("p_entry", {"entry": "last"}),
    ("p_unit", {"unit": "users"}),
    ("p_breakdown", {"breakdown": ""}),
    ("p_attribution", {"attribution": None}),
]


def test_invalid_options(db: psycopg.Connection) -> None:
    for argument, wrong in REFUSED:
        options = {"steps": '["A"]'} | wrong
        named = ", ".join(f"p_{name} => %({name})s" for name in options)
        for call in ("analytics.funnel(", "spectrum.define_funnel('f', "):
            with pytest.raises(psycopg.errors.InvalidParameterValue) as refusal:
                db.execute(f"SELECT {call}{named})", options)
            assert f"argument {argument}:" in str(refusal.value)
            assert str(refusal.value.diag.message_hint).startswith("Expected ")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_to"):
        ask(db, "A", **{"from": "2024-05-02", "to": "2024-05-01"})


def test_definitions_replace_and_go(db: psycopg.Connection) -> None:
    load(db, [event("A", "01:00"), event("B", "01:01")])
    shown = "SELECT step, event_type, users FROM analytics.conversion_funnels ORDER BY step"
    for steps, rows in (
        ('["A"]', [(1, "A", 1)]),
        ('["B", "A"]', [(1, "B", 1), (2, "A", 0)]),
    ):
        db.execute("SELECT spectrum.define_funnel('f', %s)", (steps,))
        db.execute("CALL spectrum.refresh_analytics()")
        assert db.execute(shown).fetchall() == rows
    db.execute("SELECT spectrum.drop_funnel('f')")
    db.execute("CALL spectrum.refresh_analytics()")
    assert db.execute(shown).fetchall() == []
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_name"):
        db.execute("SELECT spectrum.drop_funnel('f')")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_name"):
        db.execute("SELECT spectrum.define_funnel('', '[\"A\"]')")
