"""Any payload at all ends as a fact, a copy or a failed row, exactly as an oracle reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle_reading import Unreadable, read
from pipeline import drain, insert, prove
from readings import EPOCH, Outcome, outcomes

EXAMPLES = int(os.environ.get("SPECTRUM_PAYLOADS", "2000"))

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
long_texts = st.builds(
    lambda unit, times: unit * times,
    st.sampled_from(["x", "\u00e9", "\U0001d11e", "\\", '"', "\n", "a\u0300"]),
    st.sampled_from([100, 199, 200, 201, 5_000]),
)
numbers = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.integers(1_600_000_000, 1_800_000_000).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(
        ["0", "-0", "0.0", "-0.0", "1e400", "-1e400", "1e-400", "1E+10", "1e15", "999999999999999",
         "1e11", "99999999999", "99999999999999", "1.5e9", "9" * 250, "0." + "0" * 300 + "1",
         "1e100000", "1e-16000"]
    ),
)  # fmt: skip
strings = st.one_of(texts, long_texts, numbers).map(json.dumps)
scalars = st.one_of(st.sampled_from(["null", "true", "false", '""', "{}", "[]"]), numbers, strings)


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """As text, so that names may repeat."""
    members = st.lists(st.tuples(texts.map(json.dumps), values), max_size=3)
    return members.map(lambda pairs: "{" + ",".join(f"{k}:{v}" for k, v in pairs) + "}")


anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]"), objects(inner)
    ),
    max_leaves=6,
)
odd_times = st.builds(
    lambda *parts: json.dumps("".join(parts)),
    st.sampled_from(["2023", "2024", "2000", "1999", "1900", "2100", "9999", "0001", "24"]),
    st.sampled_from(["-01", "-02", "-02", "-04", "-12", "-00", "-13", "-2"]),
    st.sampled_from(["-01", "-28", "-29", "-30", "-31", "-00", "-32", "-5"]),
    st.sampled_from(["T", " ", "t", "  ", ""]),
    st.sampled_from(["00:00", "12:30", "23:59", "24:00", "7:00", "12:60", ""]),
    st.sampled_from(["", ":00", ":59", ":60", ":61", ":5"])
    | st.integers(0, 10**9).map(lambda n: f":30.{n}"),
    st.sampled_from(
        ["", "Z", "z", "+00", "-00:00", "+05:30", "-0330", " +01", "+15:59", "+16", "-15:59",
         "+5", "+05:60", " UTC", "+01:00:00"]
    ),
)  # fmt: skip
odd_amounts = st.builds(
    lambda *parts: json.dumps("".join(parts)),
    st.sampled_from(["", "+", "-", " "]),
    st.sampled_from(["", "0", "12", "999999999999999", "1000000000000000"]),
    st.sampled_from(["", ".", ".5", ".123456789012345"]),
    st.sampled_from(["", "e2", "E-3", "e14", "e99", "e-99", "e"]),
)


def assemble(number: int, spoilt: Sequence[tuple[str, str | None]]) -> str:
    """A good event in which some members hold something else or are not there."""
    members: dict[str, str | None] = {
        "event_type": f'"type {number % 7}"',
        "event_id": f'"event {number if number % 20 else 0}"',
        "occurred_at": f'"2024-{number % 12 + 1:02}-{number % 28 + 1:02}T12:{number % 60:02}Z"',
        "user_id": str(number % 50),
        "geo.country": '"DE"',
        "geo.city": f'"city {number % 9}"',
        "properties.revenue": f"{number}.25",
        **dict(spoilt),
    }

    def write(prefix: str) -> str:
        inside = {
            name.removeprefix(prefix): text
            for name, text in members.items()
            if name.startswith(prefix) and text is not None
        }
        if not prefix:
            inside = {name: text for name, text in inside.items() if "." not in name}
            inside = {"geo": write("geo."), "properties": write("properties.")} | inside
        return "{" + ",".join(f'"{name}":{text}' for name, text in inside.items()) + "}"

    return write("")


odd_members = st.one_of(
    [
        st.tuples(st.just(name), odd)
        for name, odd in {
            "event_type": st.one_of(strings, anything),
            "event_id": st.one_of(strings, scalars, anything),
            "account_id": st.one_of(strings, scalars, anything),
            "user_id": st.one_of(strings, scalars, anything, st.none()),
            "occurred_at": st.one_of(odd_times, numbers, anything, st.none()),
            "timestamp": st.one_of(odd_times, numbers, anything),
            "geo": st.one_of(objects(strings), anything),
            "geo.country": st.one_of(strings, anything, st.none()),
            "geo.region": st.one_of(strings, anything),
            "geo.city": st.one_of(strings, anything),
            "properties": st.one_of(objects(anything), anything),
            "properties.revenue": st.one_of(odd_amounts, numbers, anything, st.none()),
            "properties.currency": st.sampled_from(
                ['"EUR"', '"usd"', "null", '"EURO"', '"\u00e9ur"', "1", '""', "[]"]
            ),
        }.items()
    ]
)
spoils = st.one_of(anything, *[st.lists(odd_members, min_size=1, max_size=2)] * 9)


def expected_of(text: str, outcome: Outcome) -> dict[str, Any] | str:
    """What the oracle reads, or the field at which it gives up."""
    payload = json.loads(text, parse_float=Decimal, parse_int=Decimal)
    try:
        fields = read(payload, outcome.id, outcome.received_at)
    except Unreadable as field:
        return str(field)
    return fields | {"occurred_at": (fields["occurred_at"] - EPOCH) // timedelta(microseconds=1)}


def test_any_payload(db: psycopg.Connection) -> None:
    """Each ends as a fact, a copy or a failed row, exactly as the oracle reads it."""
    made: list[str] = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(spoils)
    def make(spoilt: str | list[tuple[str, str | None]]) -> None:
        made.append(spoilt if isinstance(spoilt, str) else assemble(len(made), spoilt))

    make()
    insert(db, made)
    counts = drain(db, 500)
    assert counts.claimed == len(made) == counts.loaded + counts.duplicates + counts.failed
    prove(db)

    wrong = []
    for text, outcome in zip(made, outcomes(db), strict=True):
        expected = expected_of(text, outcome)
        actual: dict[str, Any] | str = outcome.fields
        if outcome.error_msg is not None:
            actual = outcome.error_msg.partition(": expected")[0]
        elif (
            # Digits beyond the microsecond are rounded, in binary.
            isinstance(expected, dict)
            and abs(expected["occurred_at"] - outcome.fields["occurred_at"]) <= 1
        ):
            actual = outcome.fields | {"occurred_at": expected["occurred_at"]}
        if actual != expected:
            wrong.append((text[:300], expected, actual))
    assert wrong == []
    # Neither outcome is rare, or else this shows nothing.
    assert min(counts.loaded, counts.failed) > len(made) / 10
