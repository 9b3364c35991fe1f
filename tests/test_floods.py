"""Floods: what one account sends in bulk does not hold up the events of others, and loses none."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

import psycopg
import pytest
from histories import exploring
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import drain, event, facts, insert, process, prove, rows, statuses, value

Connect = Callable[..., psycopg.Connection]
EXAMPLES = count(1)


def of(account: str, number: int, **fields: Any) -> list[dict[str, Any]]:
    return [event(account_id=account, properties={"n": n}, **fields) for n in range(number)]


def waiting(db: psycopg.Connection, account: str) -> int:
    return value(db, "SELECT count(*) FROM spectrum.waiting WHERE account_id = %s", account)


def batches_until_done(db: psycopg.Connection, account: str, limit: int) -> int:
    for number in range(1, 1000):
        assert process(db, limit).claimed == limit, "a batch is full while events wait"
        if not waiting(db, account):
            return number
    raise AssertionError(f"{account} waits for ever")


def share(db: psycopg.Connection, part: float) -> None:
    db.execute("SELECT spectrum.configure('account_share', %s)", (str(part),))


def test_a_flood_does_not_hold_up_others(db: psycopg.Connection) -> None:
    insert(db, of("a", 6_000) + of("b", 50) + of("a", 1_000) + of("c", 20))
    assert batches_until_done(db, "b", 100) <= 8
    assert batches_until_done(db, "c", 100) <= 3
    for _ in range(3):
        insert(db, of("d", 30) + of("", 10))
        assert batches_until_done(db, "d", 100) == 1
        assert not waiting(db, "")
    assert waiting(db, "a") > 5_000
    insert(db, of("a", 500) + of("e", 10))
    assert batches_until_done(db, "e", 100) <= 2
    while waiting(db, "a") >= 100:
        assert process(db, 100).claimed == 100
    drain(db, 100)
    assert statuses(db) == {"done": 7_700}
    assert value(db, "SELECT count(*) FROM spectrum.floods") == 0
    prove(db)


def test_in_the_order_of_receipt_where_that_is_wanted(db: psycopg.Connection) -> None:
    share(db, 1)
    insert(db, of("a", 1_000) + of("b", 10))
    assert batches_until_done(db, "b", 101) == 10
    assert value(db, "SELECT count(*) FROM spectrum.floods") == 0


def test_one_account_alone_is_taken_in_order(db: psycopg.Connection) -> None:
    insert(db, of("a", 2_000))
    done = "SELECT max(seq), count(*) FROM raw_events WHERE status = 'done'"
    for number in range(1, 21):
        assert process(db, 100).claimed == 100
        assert rows(db, done) == [(100 * number, 100 * number)]
        if number == 5:
            insert(db, of("a", 300))
    drain(db)
    assert statuses(db) == {"done": 2_300}


def test_a_burst_is_not_put_behind_a_flood(db: psycopg.Connection) -> None:
    """Two accounts that are over their share are served alike, whoever came first."""
    insert(db, of("a", 5_000))
    process(db, 100)
    insert(db, of("c", 300) + of("d", 10))
    assert batches_until_done(db, "d", 100) <= 7
    assert batches_until_done(db, "c", 100) <= 12
    assert waiting(db, "a") > 3_000


def test_a_late_commit_of_another_account(db: psycopg.Connection, connect: Connect) -> None:
    insert(db, of("a", 3_000))
    process(db, 100)
    late = connect(autocommit=False)
    insert(late, of("b", 10))
    insert(db, of("a", 100) + of("c", 10))
    assert batches_until_done(db, "c", 100) <= 5
    process(db, 100)
    late.commit()
    assert batches_until_done(db, "b", 100) <= 2
    assert waiting(db, "a") > 1_000


def test_a_batch_that_is_undone_loses_nothing(db: psycopg.Connection, connect: Connect) -> None:
    insert(db, of("a", 1_000) + of("b", 40))
    worker = connect()
    for _ in range(3):
        worker.execute("BEGIN")
        assert process(worker, 100).claimed == 100
        worker.execute("ROLLBACK")
        assert process(worker, 100).claimed == 100
    # Whatever becomes of the marks: they are hints.
    db.execute("DELETE FROM spectrum.floods")
    drain(db, 100)
    assert statuses(db) == {"done": 1_040}
    prove(db)


def test_a_second_worker_goes_on_beside(db: psycopg.Connection, connect: Connect) -> None:
    insert(db, of("a", 1_000) + of("b", 40))
    one, two = connect(), connect()
    process(db, 100)
    for _ in range(4):
        one.execute("BEGIN")
        assert process(one, 100).claimed == 100
        two.execute("SET lock_timeout = '1s'")
        assert process(two, 100).claimed == 100
        one.execute("COMMIT")
    drain(two, 100)
    assert statuses(db) == {"done": 1_040}
    prove(db)


def test_the_first_received_counts_though_it_was_passed_over(db: psycopg.Connection) -> None:
    insert(db, [*of("a", 500), event("first", event_id="x", account_id="a"), *of("a", 500)])
    insert(db, [event("second", event_id="x", account_id="b")])
    assert batches_until_done(db, "b", 50) <= 4
    named = "SELECT event_type FROM analytics.events WHERE event_type <> 'seen'"
    assert rows(db, named) == [("second",)]
    drain(db, 50)
    assert rows(db, named) == [("first",)]
    prove(db, views=True)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_batch_under_an_old_snapshot(db: psycopg.Connection, isolation: str) -> None:
    insert(db, of("a", 300) + of("b", 10))
    process(db, 50)
    assert value(db, "SELECT count(*) FROM spectrum.floods") == 1
    for _ in range(3):
        with db.transaction():
            db.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
            assert process(db, 50).claimed == 50
    drain(db, 50)
    assert statuses(db) == {"done": 310}
    prove(db)


def test_who_floods_is_named(db: psycopg.Connection) -> None:
    check = "SELECT ok, message FROM spectrum.health() WHERE check_name = 'floods'"
    insert(db, of('a "quoted"', 1_000) + of("b", 10))
    assert rows(db, check) == [(True, "no account holds up the others")]
    process(db, 90)
    named = 'account "a \\"quoted\\"" has about 810 of 920 waiting events'
    assert rows(db, check) == [(False, named)]
    assert value(db, "SELECT flooded_by FROM spectrum.status()") == named
    drain(db)
    assert rows(db, check) == [(True, "no account holds up the others")]


@pytest.mark.parametrize("rule", ["hmac", "drop"])
def test_who_floods_is_named_as_a_rule_leaves_it(db: psycopg.Connection, rule: str) -> None:
    """Also where it is defined during the flood, and senders hash some themselves (capture)."""
    insert(db, of("secret-1", 1_000) + of("b", 10))
    process(db, 90)
    db.execute("SELECT spectrum.define_pii('account_id', %s)", (rule,))
    db.execute("SELECT spectrum.capture(%s::jsonb) FROM generate_series(1, 300)",
        ('{"event_type": "seen", "account_id": "secret-1"}',))  # fmt: skip
    insert(db, of("secret-2", 40))
    waits = "SELECT count(*) FROM spectrum.waiting GROUP BY account_id ORDER BY 1"
    assert rows(db, waits) == ([(10,), (40,), (1_210,)] if rule == "hmac" else [(1_260,)])
    named = "SELECT string_agg(account_id, ' ') FROM spectrum.floods"
    shown = "SELECT string_agg(message, ' ') FROM spectrum.health()"
    flood = value(db, "SELECT spectrum.pii_hash('secret-1')") if rule == "hmac" else ""
    assert value(db, named) is None
    for _ in range(4):
        process(db, 90)
        assert value(db, named) == flood
        assert f'account "{flood}" has about' in value(db, shown)
    assert rows(db, waits) == [(900,)]
    drain(db, 90)
    assert statuses(db) == {"done": 1_350}
    assert value(db, "SELECT count(*) FROM spectrum.floods") == 0


def test_large_payloads_are_not_all_looked_at(db: psycopg.Connection) -> None:
    text = "".join(Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=200_000))
    insert(db, [event(account_id="a", properties={"text": text})] * 60 + of("b", 5))
    db.execute("SELECT spectrum.configure('account_share', '0.2')")
    # Looked at piece by piece: at most 64 MB of them for a batch.
    assert batches_until_done(db, "b", 20) <= 2


def some(randoms: Random, mark: str) -> list[Any]:
    """A piece of what an account sends: copies of anything, and now and then what cannot pass."""
    account = randoms.choice(["a", "a", "a", "b", "", "c"])
    made: list[Any] = []
    for _ in range(randoms.choice([1, 5, 60])):
        made.append(
            event(event_id=f"{mark} {randoms.randrange(300)}", account_id=account, user_id="u")
        )
        if randoms.random() < 0.05:
            made[-1] = randoms.choice([17, event(account_id=[account])])
    return made


@pytest.fixture
def sessions(connect: Connect) -> list[psycopg.Connection]:
    """One that commits late, and two workers."""
    return [connect(autocommit=False), connect(), connect()]


def play(
    db: psycopg.Connection, sessions: list[psycopg.Connection], randoms: Random, mark: str
) -> list[Any]:
    """Late commits, two workers, batches that are undone; returns what was committed."""
    sent: list[Any] = []
    unsure: list[Any] = []
    late, *workers = sessions
    opened: psycopg.Connection | None = None
    for _ in range(randoms.randrange(5, 40)):
        action = randoms.choice(["send", "send", "late", "commit", "work", "work", "end"])
        if action == "send":
            insert(db, part := some(randoms, mark))
            sent += part
        elif action == "late":
            insert(late, part := some(randoms, mark))
            unsure += part
        elif action == "commit":
            late.commit()
            sent, unsure = sent + unsure, []
        elif action == "work" and opened is None:
            worker = randoms.choice(workers)
            if randoms.random() < 0.3:
                worker.execute("BEGIN")
                opened = worker
            process(worker, randoms.choice([1, 3, 10, 40]))
        elif action == "end" and opened is not None:
            opened.execute(randoms.choice(["COMMIT", "ROLLBACK"]))
            opened = None
    late.commit()
    return sent + unsure


@settings(exploring, max_examples=int(os.environ.get("FLOOD_EXAMPLES", "4")))
@given(randoms=st.randoms(use_true_random=False))
def test_any_interleaving(
    db: psycopg.Connection, sessions: list[psycopg.Connection], randoms: Random
) -> None:
    """Each event is one fact or failed, and the first received counts."""
    mark = str(next(EXAMPLES))
    for session in sessions:
        session.rollback()
    db.execute(
        "TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.requeue,"
        " spectrum.floods, spectrum.news, spectrum.withdrawals"
    )
    db.execute(
        "UPDATE spectrum.intake SET head_seq = 0, safe_seq = 0, late_seq = 0, seen_seq = 0,"
        " seen_writers = NULL, patrol_seq = 0"
    )
    share(db, randoms.choice([0.05, 0.3, 0.5, 0.9, 1]))
    sent = play(db, sessions, randoms, mark)
    for session in sessions:
        session.rollback()
    drain(db, randoms.choice([5, 40, 1000]))
    readable = [each for each in sent if each != 17 and isinstance(each["account_id"], str)]
    found = statuses(db)
    assert sum(found.values()) == len(sent)
    assert found.get("done", 0) == len(readable)
    assert found.get("failed", 0) == len(sent) - len(readable)
    assert facts(db) == len({each["event_id"] for each in readable})
    earlier = """
        SELECT count(*) FROM warehouse.event_ledger AS ledger
        JOIN spectrum.readings AS reading USING (event_id)
        WHERE reading.seq < ledger.seq AND reading.error_msg IS NULL
    """
    assert value(db, earlier) == 0
    assert value(db, "SELECT count(*) FROM spectrum.floods") == 0
    prove(db)
