"""Caps: what is over one fails with a reason, is kept and counted, and stops nothing else."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

import psycopg
import pytest
from histories import exploring
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import drain, event, facts, insert, process, prove, rows, value

Connect = Callable[..., psycopg.Connection]
EXAMPLES = count(1)


def configure(db: psycopg.Connection, **settings: Any) -> None:
    for name, setting in settings.items():
        db.execute("SELECT spectrum.configure(%s, %s)", (name, str(setting)))


def failures(db: psycopg.Connection) -> list[str]:
    found = rows(db, "SELECT error_msg FROM raw_events WHERE status = 'failed' ORDER BY seq")
    return [message for (message,) in found]


def refusals(db: psycopg.Connection) -> dict[tuple[str, str], int]:
    return {
        (account, cap): events
        for account, cap, events in rows(
            db, "SELECT account_id, cap, events FROM spectrum.refusals ORDER BY 1, 2"
        )
    }


def letters(length: int) -> str:
    """A text that does not compress."""
    return "".join(Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=length))


@pytest.mark.parametrize("text", [letters(3_000), "x" * 3_000], ids=["as it is", "compressed"])
def test_a_payload_that_is_too_large(db: psycopg.Connection, text: str) -> None:
    """By what it says, not by what it takes on disk: that depends on luck and on the server."""
    configure(db, max_payload_bytes=3_100)
    known = event(account_id="known")
    large = event(account_id="known", event_id="large", properties={"text": text + "x" * 200})
    insert(db, [known, large | {"properties": {"text": text[:-300]}}])
    assert drain(db) == (2, 2, 0, 0)
    # An event that fails does not use up its event_id: what is too large is no copy.
    insert(db, [large | {"event_id": "larger"}, large | {"account_id": "nobody"}, known])
    assert drain(db) == (3, 1, 0, 2)
    complaint = re.compile(
        r"payload: expected at most 3100 bytes \(config\.max_payload_bytes\), got 33\d\d"
    )
    assert [bool(complaint.fullmatch(message)) for message in failures(db)] == [True, True]
    assert value(db, "SELECT count(*) FROM raw_events WHERE next_attempt_at IS NOT NULL") == 0
    assert refusals(db) == {("*", "max_payload_bytes"): 1, ("known", "max_payload_bytes"): 1}
    kept = rows(db, "SELECT payload -> 'properties' ->> 'text' FROM raw_events"
        " WHERE status = 'failed'")  # fmt: skip
    assert kept == [(text + "x" * 200,)] * 2
    prove(db)

    configure(db, max_payload_bytes=1_048_576)
    db.execute("CALL spectrum.reprocess()")
    assert drain(db) == (2, 1, 1, 0), "one repeats the event_id of the shorter text"
    prove(db)


def test_the_usual_caps_let_pass_what_is_usual(db: psycopg.Connection) -> None:
    insert(db, [event(properties={"text": text}) for text in (letters(1_000_000), "x" * 10**6)])
    insert(db, [event(properties={f"p{n}": n for n in range(1_000)})])
    assert drain(db) == (3, 3, 0, 0)
    insert(db, [event(properties={"text": "x" * 1_100_000})])
    insert(db, [event(properties={f"p{n}": n for n in range(1_001)})])
    assert drain(db) == (2, 0, 0, 2)
    assert refusals(db) == {("", "max_payload_bytes"): 1, ("", "max_properties"): 1}


def test_too_many_properties(db: psycopg.Connection) -> None:
    configure(db, max_properties=5)
    insert(db, [event(properties={str(n): None for n in range(k)}) for k in (0, 4, 5, 6, 9)])
    insert(db, [event(properties={"nested": {str(n): 1 for n in range(50)}})])
    assert drain(db) == (6, 4, 0, 2)
    assert failures(db) == [
        "properties: expected at most 5 of them (config.max_properties), got 6",
        "properties: expected at most 5 of them (config.max_properties), got 9",
    ]
    prove(db)


def test_a_lower_cap_takes_back_what_is_read_again(db: psycopg.Connection) -> None:
    insert(db, [event(event_id=1, properties={"text": "x" * 4_000}), event(event_id=2)])
    assert drain(db) == (2, 2, 0, 0)
    configure(db, max_payload_bytes=2_000)
    prove(db)  # what is in stays in
    db.execute("CALL spectrum.reprocess(p_status => 'done')")
    assert drain(db) == (2, 1, 0, 1)
    assert facts(db) == 1
    prove(db, views=True)


def test_new_event_types_of_one_account(db: psycopg.Connection) -> None:
    configure(db, max_new_event_types=3)
    insert(db, [event(f"a{n}", account_id="a") for n in range(2)])
    assert drain(db) == (2, 2, 0, 0)
    # One more is new, what is known goes on, and b is not a: b0 comes in by b, and counts for both.
    insert(db, [event(name, account_id="a") for name in ("a2", "a3", "a4", "a0", "b0", "a4")])
    insert(db, [event(f"b{n}", account_id="b") for n in range(3)])
    assert drain(db) == (9, 6, 0, 3)
    assert failures(db) == [
        "event_type: expected at most 3 new ones a day from an account"
        f' (config.max_new_event_types), got "{name}"'
        for name in ("a3", "a4", "a4")
    ]
    assert refusals(db) == {("a", "max_new_event_types"): 3}
    refused = "SELECT count(*) FROM warehouse.dim_event_types WHERE event_type IN ('a3', 'a4')"
    assert value(db, refused) == 0
    prove(db)

    # Today again it is refused again; tomorrow there is room for both.
    db.execute("CALL spectrum.reprocess()")
    assert drain(db) == (3, 0, 0, 3)
    assert refusals(db) == {("a", "max_new_event_types"): 6}
    db.execute("UPDATE spectrum.cap_notes SET day = day - 1")
    db.execute("CALL spectrum.reprocess()")
    assert drain(db) == (3, 3, 0, 0)
    db.execute("CALL spectrum.run()")
    assert refusals(db) == {("a", "max_new_event_types"): 6}
    notes = "SELECT members, refused FROM spectrum.cap_notes WHERE cap = %s AND account_id = 'a'"
    assert rows(db, notes + " ORDER BY day", "max_new_event_types") == [(4, 6), (2, 0)]
    prove(db, views=True)


def test_no_new_event_types_at_all(db: psycopg.Connection) -> None:
    insert(db, [event("known")])
    drain(db)
    configure(db, max_new_event_types=0)
    insert(db, [event("known", account_id="new"), event("unknown")])
    assert drain(db) == (2, 1, 0, 1)


def test_new_places_and_accounts(db: psycopg.Connection) -> None:
    configure(db, max_new_places=2, max_new_accounts=3)
    insert(db, [event(account_id="a", geo={"country": "DE", "city": str(n)}) for n in range(4)])
    insert(db, [event(account_id="b", geo={"city": "2"})])
    insert(db, [event(account_id=name) for name in "acdea"] + [event()])
    assert drain(db) == (11, 7, 0, 4)
    assert failures(db) == [
        "geo: expected at most 2 new places a day from an account (config.max_new_places), got"
        f' {{"city": "{n}", "region": "", "country": "DE"}}'
        for n in (2, 3)
    ] + [
        "account_id: expected at most 3 new ones a day (config.max_new_accounts), got"
        f' "{name}"'
        for name in "de"
    ]  # fmt: skip
    assert refusals(db) == {("a", "max_new_places"): 2, ("*", "max_new_accounts"): 2}
    prove(db)


def test_upkeep_keeps_the_counts_short(db: psycopg.Connection) -> None:
    configure(db, max_new_event_types=1)
    for n in range(5):
        insert(db, [event(f"t{n}", account_id="a"), event(f"u{n}", account_id="b")])
        drain(db)
    before = refusals(db)
    assert before == {("a", "max_new_event_types"): 4, ("b", "max_new_event_types"): 4}
    db.execute("CALL spectrum.run()")
    assert refusals(db) == before
    assert value(db, "SELECT count(*) FROM spectrum.cap_notes") == 3
    db.execute("UPDATE spectrum.cap_notes SET day = day - 40")
    db.execute("CALL spectrum.run()")
    assert value(db, "SELECT count(*) FROM spectrum.cap_notes") == 0


def test_health_names_what_was_refused(db: psycopg.Connection) -> None:
    check = "SELECT ok, message FROM spectrum.health() WHERE check_name = 'caps'"
    assert rows(db, check) == [(True, "no event was over a cap since yesterday")]
    configure(db, max_properties=1)
    insert(db, [event(account_id="a")] + [event(account_id='"', properties={"a": 1, "b": 2})] * 2)
    insert(db, [event(account_id="a", properties={"a": 1, "b": 2})] * 3)
    drain(db)
    assert rows(db, check) == [
        (False, '5 events refused since yesterday, most by max_properties: 3 of account "a"')
    ]


def test_two_workers_exceed_a_cap_by_a_batch_at_most(
    db: psycopg.Connection, connect: Connect
) -> None:
    """And wait for each other only where both bring the same."""
    insert(db, [event("known", account_id="a")])
    drain(db)
    configure(db, max_new_event_types=6)
    insert(db, [event(f"t{n}", account_id="a") for n in range(20)])
    one, two = connect(), connect()
    for worker in one, two:
        worker.execute("BEGIN")
        worker.execute("SET LOCAL statement_timeout = '20s'")
    assert process(one, 5) == (5, 5, 0, 0)
    assert process(two, 10) == (10, 5, 0, 5), "it does not see what is not committed"
    for worker in one, two:
        worker.execute("COMMIT")
    assert drain(db) == (5, 0, 0, 5)
    assert refusals(db) == {("a", "max_new_event_types"): 10}
    prove(db)


# What a batch may bring, by the words of the documentation alone.

CAPS = {"account": "max_new_accounts", "type": "max_new_event_types", "place": "max_new_places"}


def expected(
    batches: list[list[dict[str, Any]]], caps: dict[str, int]
) -> tuple[list[bool], Counter]:
    """Whether each event becomes a fact, and the refusals by owner and cap."""
    known: dict[str, set] = {"account": {""}, "type": set(), "place": {("", "", "")}}
    used: Counter = Counter()
    refused: Counter = Counter()
    passed: list[bool] = []
    for batch in batches:
        reasons: list[str | None] = [None] * len(batch)
        for kind, cap in CAPS.items():
            named: dict[str, list] = {}
            for owner, member in newcomers(batch, reasons, kind, known):
                if member not in named.setdefault(owner, []):
                    named[owner].append(member)
            admitted = known[kind].union(
                *(new[: max(caps[cap] - used[owner, cap], 0)] for owner, new in named.items())
            )
            for at, each in enumerate(batch):
                if reasons[at] is None and members(each)[kind] not in admitted:
                    reasons[at] = cap
        for kind, cap in CAPS.items():
            for owner, member in set(newcomers(batch, reasons, kind, known)):
                used[owner, cap] += 1
                known[kind] |= {member}
        for reason, each in zip(reasons, batch, strict=True):
            is_known = each["account_id"] in known["account"] and reason != "max_new_accounts"
            if reason:
                refused[each["account_id"] if is_known else "*", reason] += 1
        passed += [reason is None for reason in reasons]
    return passed, refused


def newcomers(
    batch: list[dict[str, Any]], reasons: list[str | None], kind: str, known: dict[str, set]
) -> list[tuple[str, Any]]:
    """Owner and member of each event that is not refused and brings something new."""
    return [
        ("*" if kind == "account" else each["account_id"], members(each)[kind])
        for reason, each in zip(reasons, batch, strict=True)
        if reason is None and members(each)[kind] not in known[kind]
    ]


def members(each: dict[str, Any]) -> dict[str, Any]:
    geo = each.get("geo", {})
    return {
        "account": each["account_id"],
        "type": each["event_type"],
        "place": tuple(geo.get(part, "") for part in ("country", "region", "city")),
    }


@settings(exploring, max_examples=int(os.environ.get("CAP_EXAMPLES", "8")))
@given(randoms=st.randoms(use_true_random=False))
def test_any_newcomers(db: psycopg.Connection, randoms: random.Random) -> None:
    mark = f"{next(EXAMPLES)}."
    db.execute(
        "TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.cap_notes,"
        " spectrum.news, spectrum.withdrawals"
    )
    caps = {
        f"max_new_{what}": randoms.choice([0, 1, 2, 3, 5, 100])
        for what in ("accounts", "event_types", "places")
    }
    configure(db, account_share=1, **caps)
    payloads = []
    for _ in range(randoms.randrange(1, 60)):
        account = randoms.choice(["", mark + "a", mark + "b", mark + str(randoms.randrange(9))])
        payload = event(f"{mark}{randoms.randrange(12)}", account_id=account)
        if randoms.random() < 0.7:
            payload["geo"] = {"country": mark, "city": str(randoms.randrange(8))}
        payloads.append(payload)
    insert(db, payloads)
    left, batches = payloads, []
    while left:
        size = randoms.choice([1, 2, 5, 20, 100])
        batches.append(left[:size])
        left = left[size:]
        assert process(db, size).claimed == len(batches[-1])
    passed, refused = expected(batches, caps)
    found = rows(db, "SELECT status FROM raw_events ORDER BY seq")
    assert [status for (status,) in found] == ["done" if each else "failed" for each in passed]
    assert refusals(db) == dict(refused)
    prove(db)
