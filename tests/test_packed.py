"""Packed months: whoever asks gets the answer that he would get were nothing packed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from conftest import Connect, MakeDb
from forgetting import traces
from histories import exploring, timezones
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import drain, insert, prove, rows, value
from purging import Twins, differences, purge, standing
from tenancy import QUESTIONS, VARYING, question

NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
MICROSECOND = timedelta(microseconds=1)
EXAMPLES = int(os.environ.get("SPECTRUM_PACKED_EXAMPLES", "1"))
EVENTS = "SELECT count(*) FROM analytics.events"
IN_PLACE = "SELECT count(*) FROM warehouse.fact_events"
KEPT = "SELECT analytics._keeps_days(NULL, NULL)"
# What the days that are kept can tell.
BY_DAY = [
    "analytics.trend()",
    "analytics.trend('a', 'month')",
    "analytics.trend(NULL, 'week', p_breakdown => 'event_type')",
    "analytics.trend(p_measure => 'users')",
    "analytics.trend(NULL, 'month', p_measure => 'users')",
    "analytics.active_users()",
    "analytics.retention()",
    "analytics.retention(p_period => 'month', p_cohort => 'recurring')",
    "analytics.lifecycle('month')",
    "analytics.stickiness('month')",
    "analytics._settle_days(NULL, NULL, NULL)",
]


@pytest.fixture
def twin(make_db: MakeDb, connect: Connect) -> Iterator[psycopg.Connection]:
    return connect(make_db("twin"))


ALL = [*QUESTIONS, *BY_DAY, "analytics.events"]


def answers(db: psycopg.Connection, questions: list[str] = ALL) -> dict[str, list[str]]:
    """Without what keys differ in."""
    told = {}
    for template in questions:
        asked = question(template).replace("'visit'", "'a'").replace("'button'", "'e'")
        asked = asked.replace('"visit"', '"a"').replace('"buy"', '"b"').replace("'buy'", "'b'")
        if "experiment(" in asked and not value(db, "SELECT count(*) FROM spectrum.experiments"):
            continue
        cursor = db.execute(f"SELECT * FROM {asked}")
        assert cursor.description is not None
        shown = [n for n, c in enumerate(cursor.description) if c.name not in VARYING]
        told[asked] = sorted(repr([row[n] for n in shown]) for row in cursor)
    return told


def disagreements(
    db: psycopg.Connection, twin: psycopg.Connection, questions: list[str] = ALL
) -> list[str]:
    here, there = answers(db, questions), answers(twin, questions)
    return [asked for asked in here if here[asked] != there[asked]]


def untrue_days(db: psycopg.Connection) -> list[str]:
    """Where the days that are kept say other than the facts, packed or not."""
    wrong = []
    for asked in BY_DAY[:-1]:
        told = sorted(map(repr, rows(db, f"SELECT * FROM {asked}")))
        db.execute("SET spectrum.from_facts = on")
        if told != sorted(map(repr, rows(db, f"SELECT * FROM {asked}"))):
            wrong.append(asked)
        db.execute("SET spectrum.from_facts = off")
    return wrong


def explained(db: psycopg.Connection, twin: psycopg.Connection) -> list[str]:
    """Of what is packed some events, where the two say other cells of them."""
    names = "SELECT event_id::text FROM warehouse.packed_rows ORDER BY md5(event_id::text) LIMIT 2"
    # Copies came to one of the two alone: Twins.knock.
    query = (
        "SELECT what, view_name, cell, rule FROM spectrum.explain_event(%s) WHERE what <> 'copy'"
    )
    return [
        name for (name,) in rows(db, names)
        if sorted(map(repr, rows(db, query, name))) != sorted(map(repr, rows(twin, query, name)))
    ]  # fmt: skip


@settings(exploring, max_examples=EXAMPLES)
@given(randoms=st.randoms(use_true_random=True), timezone=timezones)
def test_a_twin_that_never_packs_says_the_same(
    db: psycopg.Connection, twin: psycopg.Connection, randoms: Random, timezone: str
) -> None:
    with db.transaction(force_rollback=True), twin.transaction(force_rollback=True):
        twins = Twins(db, twin, randoms, timezone)
        kinds = [randoms.choice(["pack_facts", "pack_facts", "purge_facts"]) for _ in range(3)]
        age = 6
        for number in range(4):
            twins.send(randoms.choice([20, 60]))
            twins.correct()
            twins.knock()
            if number > 0:
                age = max(3, age - randoms.choice([0, 1, 2]))
                twins.settle()
                purge(db, f"{age} months", randoms.choice([4, 9, 1000]), kinds[number - 1])
        twins.settle()
        assert differences(db, twin) == {}
        assert rows(db, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []
        assert untrue_days(db) == []
        if value(db, "SELECT facts_from IS NULL FROM analytics.settings"):
            assert value(db, KEPT)
            assert disagreements(db, twin) == []
            assert explained(db, twin) == []
            frozen = "SELECT check_name FROM spectrum.verify() WHERE check_name LIKE 'frozen%'"
            if value(db, "SELECT packed_from IS NOT NULL FROM spectrum.horizon"):
                assert rows(db, frozen) == []


def happened(days: float, event_type: str = "a", **fields: Any) -> dict[str, Any]:
    """So long ago."""
    at = (NOW - timedelta(days=days)).isoformat()
    return {
        "event_id": f"{fields.get('user_id', 'u1')} {days}",
        "event_type": event_type,
        "occurred_at": at,
        "user_id": "u1",
        "account_id": "one",
    } | fields


# Three events of old months, one of 10 days ago.
OLD = [
    happened(200, "start", properties={"secret": "zanzibar", "revenue": 3}),
    happened(199, "b", properties={"plan": "pro"}),
    happened(199, "b", user_id="u2", account_id="two", properties={"revenue": 5}),
    happened(10),
]


def count(db: psycopg.Connection, *events: dict[str, Any]) -> None:
    insert(db, list(events))
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")


@pytest.fixture
def old(db: psycopg.Connection) -> psycopg.Connection:
    count(db, *OLD)
    return db


def test_what_is_packed_is_read_still(old: psycopg.Connection) -> None:
    before, said = standing(old), answers(old)
    assert value(old, "CALL spectrum.pack_facts('3 months')") in (1, 2)
    assert value(old, IN_PLACE) == 1
    assert value(old, "SELECT sum(events) FROM warehouse.packed_events") == 3
    assert value(old, "SELECT packed_events FROM spectrum.status()") == 3
    assert standing(old) == before
    assert answers(old) == said
    prove(old, views=True)
    told = "SELECT what, detail ->> 'event_type' FROM spectrum.explain_event(%s)"
    (event_id,) = rows(old, "SELECT event_id FROM analytics.events WHERE event_type = 'start'")[0]
    assert ("fact", "start") in rows(old, told, event_id)
    # Once more there is nothing to do; and what is closed is closed.
    assert value(old, "CALL spectrum.pack_facts('3 months')") == 0
    insert(old, [happened(198, "late"), happened(200, "other")])
    assert drain(old)[1:] == (0, 1, 1)
    # A purge of the same months leaves the view as it was at first.
    old.execute("CALL spectrum.purge_facts('3 months')")
    assert value(old, "SELECT count(*) FROM warehouse.packed_events") == 0
    assert value(old, EVENTS) == 1
    assert "packed" not in value(old, "SELECT pg_get_viewdef('warehouse.visible_events')")
    assert standing(old) == before
    prove(old, views=True)


@pytest.mark.parametrize("is_late", [True, False])
def test_forgetting_who_is_packed(old: psycopg.Connection, is_late: bool) -> None:
    """Between two steps of the packing, or afterwards."""
    purge(old, "3 months", 1000 if is_late else 3, "pack_facts")
    before = standing(old)
    old.execute("SELECT spectrum.forget_user('u1', p_event_type => 'b')")
    assert value(old, EVENTS) == 3
    old.execute("SELECT spectrum.forget_user('u1', 'anonymise', p_properties => '{secret}')")
    assert traces(old, "zanzibar") == set()
    assert value(old, "SELECT sum(revenue) FROM analytics.events") == 8
    old.execute("SELECT spectrum.forget_user('u2')")
    assert traces(old, "u2") == set()
    assert standing(old)["daily_events"] == before["daily_events"]
    assert value(old, EVENTS) == 2
    purge(old, "3 months", kind="pack_facts")
    assert value(old, EVENTS) == 2
    assert value(old, IN_PLACE) == 1
    prove(old, views=True)
    # Days that are kept would say more than events do.
    assert value(old, "SELECT sum(dau) FROM analytics.active_users()") == 2


def test_days_tell_of_packed_months(old: psycopg.Connection, twin: psycopg.Connection) -> None:
    more = [happened(days, user_id=name) for days in (240, 230, 170, 40) for name in ("u1", "u3")]
    count(old, *more)
    count(twin, *OLD, *more)
    old.execute("CALL spectrum.pack_facts('3 months')")
    assert value(old, "SELECT sum(events) FROM warehouse.packed_events") == 9
    for db in (old, twin):
        # No refresh has counted it.
        insert(db, [happened(9, user_id="u3")])
        drain(db)
    assert value(old, KEPT)
    assert disagreements(old, twin, BY_DAY) == []
    assert value(old, "SELECT sum(value) FROM analytics.trend()") == 13


def test_days_follow_who_is_forgotten(old: psycopg.Connection, twin: psycopg.Connection) -> None:
    """They are told still, and as of a history without him."""
    others = [happened(days, user_id="u3", account_id="two") for days in (240, 199, 40)]
    his = [happened(days, "c", user_id="u2", account_id="one") for days in (230, 20)]
    count(old, *others, *his)
    value(old, "CALL spectrum.pack_facts('3 months')")
    count(twin, *[e for e in OLD if e["user_id"] != "u2"], *others)
    seen = "SELECT object, what, change::int FROM spectrum.forget_user('u2') WHERE cell IS NULL"
    receipt = rows(old, seen)
    assert ("warehouse.packed_rows", "rows removed", -2) in receipt
    assert ("warehouse.event_ledger", "rows removed", -3) in receipt
    assert rows(old, "SELECT FROM spectrum.receipts WHERE object = 'analytics.active_users'")
    assert value(old, KEPT)
    assert untrue_days(old) == []
    here, there = standing(old), standing(twin)
    assert here["daily_events"] == there["daily_events"]
    assert here["active_users"] == there["active_users"]
    assert traces(old, "u2") == set()
    assert rows(old, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []


def test_who_is_packed_becomes_nobody(old: psycopg.Connection) -> None:
    value(old, "CALL spectrum.pack_facts('3 months')")
    old.execute("SELECT spectrum.forget_user('u1', 'anonymise', p_properties => '{revenue}')")
    assert value(old, "SELECT sum(revenue) FROM analytics.events") == 5
    assert rows(old, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []
    assert value(old, KEPT)


@pytest.mark.parametrize("what", ["events", "rebuilt", "hot"])
def test_days_are_not_asked_where_they_count_more_or_less(
    old: psycopg.Connection, what: str
) -> None:
    value(old, "CALL spectrum.pack_facts('3 months')")
    assert value(old, KEPT)
    events = {"events": 3, "rebuilt": 4, "hot": 1}[what]
    match what:
        case "events":
            old.execute("SELECT spectrum.forget_user('u1', p_event_type => 'b')")
        case "rebuilt":
            old.execute("SELECT spectrum.rebuild_reports(p_lose_frozen => true)")
        case "hot":
            old.execute("SET spectrum.hot_only = on")
    old.execute("CALL spectrum.refresh_analytics()")
    assert not value(old, KEPT)
    assert value(old, EVENTS) == events
    assert value(old, "SELECT sum(value) FROM analytics.trend()") == events


def test_a_day_is_packed_in_part(old: psycopg.Connection) -> None:
    """And the other part of it is forgotten."""
    old.execute("SELECT spectrum.configure('timezone', 'America/New_York')")
    border = value(old, "SELECT date_trunc('month', now() - interval '3 months', 'UTC')")
    hour = timedelta(hours=1)
    count(
        old,
        happened(0, "evening", user_id="u3", event_id="1", occurred_at=str(border - hour)),
        happened(0, "night", user_id="u3", event_id="2", occurred_at=str(border + hour)),
    )
    value(old, "CALL spectrum.pack_facts('3 months')")
    assert value(old, KEPT)
    old.execute("SELECT spectrum.forget_user('u3', p_event_type => 'night')")
    old.execute("CALL spectrum.refresh_analytics()")
    assert value(old, "SELECT sum(dau) FROM analytics.active_users()") == 5


def test_accounts_are_told_apart_when_packed(
    old: psycopg.Connection, connect: Connect, make_role: Any
) -> None:
    tenant, analyst = make_role(), make_role()
    old.execute(f"SELECT spectrum.grant_tenant('{tenant}', 'two')")
    old.execute(f"SELECT spectrum.grant_analyst('{analyst}')")
    insert(old, [happened(240)])
    drain(old)
    value(old, "CALL spectrum.pack_facts('3 months')")
    month = "SELECT date_trunc('month', %s, 'UTC')"
    expected = {tenant: (1, 199, 199), analyst: (5, 240, 10), "NONE": (5, 240, 10)}
    for role, (seen, first, last) in expected.items():
        old.execute(f"SET ROLE {role}")
        assert value(old, EVENTS) == seen
        assert value(old, "SELECT count(*) FROM analytics.timelines") == seen
        for from_facts in ("off", "on"):
            old.execute(f"SET spectrum.from_facts = {from_facts}")
            for bounds in ("_months_of_events", "_event_bounds"):
                first_at, end_at = rows(old, f"SELECT * FROM analytics.{bounds}()")[0]
                assert value(old, month, first_at) == value(old, month, NOW - timedelta(first))
                assert value(old, month, end_at - timedelta(seconds=1)) == value(
                    old, month, NOW - timedelta(last)
                )
            (ends,) = rows(old, "SELECT * FROM analytics._settle_range(NULL, NULL, NULL)")
            assert ends == (NOW - timedelta(first), NOW - timedelta(last) + MICROSECOND)
        if role != "NONE":
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                old.execute("SELECT FROM warehouse.packed_events")
        old.execute("RESET ROLE")
    # What he brings along is shown his rows alone, however cheap it says it is.
    shown: list[str] = []
    old.add_notice_handler(lambda notice: shown.append(str(notice.message_primary)))
    old.execute(
        "CREATE FUNCTION public.shows(jsonb) RETURNS boolean LANGUAGE plpgsql COST 0.0001"
        " AS $$ BEGIN RAISE NOTICE '%', $1; RETURN true; END $$"
    )
    old.execute(f"SET ROLE {tenant}")
    assert value(old, EVENTS + " WHERE public.shows(properties)") == 1
    assert shown == ['{"revenue": 5}']
    old.execute("RESET ROLE")


def test_killed_at_any_step_nothing_is_lost_or_doubled(
    old: psycopg.Connection, connect: Connect
) -> None:
    before = standing(old)
    task = value(old, """SELECT spectrum.request('pack_facts', '{"older_than": "3 months"}')""")
    for _ in range(30):
        victim = connect(autocommit=False)
        victim.execute("SELECT spectrum._work_on_task(%s)", (task,))
        value(old, "SELECT pg_terminate_backend(%s)", victim.info.backend_pid)
        victim.close()
        assert value(old, EVENTS) == 4
        if not value(old, "SELECT spectrum._work_on_task(%s)", task):
            break
        assert value(old, EVENTS) == 4
    assert rows(old, "SELECT state FROM spectrum.tasks") == [("done",)]
    assert value(old, IN_PLACE) == 1
    assert standing(old) == before
    prove(old, views=True)


def test_an_older_snapshot_is_waited_for(old: psycopg.Connection, connect: Connect) -> None:
    old.execute("SELECT spectrum.configure('retry_delay', '0')")
    old.execute("SELECT spectrum.configure('lock_timeout', '20 ms')")
    reader = connect(autocommit=False)
    reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    reader.execute("SELECT FROM spectrum.config")
    with pytest.raises(psycopg.errors.LockNotAvailable, match="began before the last events"):
        old.execute("CALL spectrum.pack_facts('3 months')")
    progress = "SELECT done > 0, total, unit FROM spectrum.progress WHERE work LIKE 'pack_facts%'"
    assert rows(old, progress) == [(True, 3, "events")]
    assert value(reader, EVENTS) == 4
    assert value(old, EVENTS) == 4
    reader.rollback()
    old.execute("CALL spectrum.run()")
    assert rows(old, "SELECT state FROM spectrum.tasks") == [("done",)]
    assert value(old, IN_PLACE) == 1


def test_readers_count_the_same_all_the_while(old: psycopg.Connection, connect: Connect) -> None:
    insert(old, [happened(190 + n / 100, event_id=f"m{n}") for n in range(500)])
    drain(old)
    counts, stop, reader = set(), threading.Event(), connect()

    def read() -> None:
        while not stop.is_set():
            counts.add(value(reader, EVENTS))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        old.execute("CALL spectrum.pack_facts('3 months')")
    finally:
        stop.set()
        thread.join()
    assert counts == {504}
    assert value(old, IN_PLACE) == 1


def test_facts_changed_by_hand_are_noticed(old: psycopg.Connection) -> None:
    purge(old, "3 months", 3, "pack_facts")
    old.execute("DELETE FROM warehouse.fact_events WHERE revenue = 5")
    with pytest.raises(psycopg.errors.DataCorrupted, match="are packed") as refused:
        old.execute("CALL spectrum.pack_facts('3 months')")
    assert refused.value.diag.message_hint
    assert value(old, "SELECT min(facts_from) IS NULL FROM analytics.settings")


def test_the_tick_packs_what_is_older_than_wanted(old: psycopg.Connection) -> None:
    old.execute("SELECT spectrum.configure('pack_facts_after', '3 months')")
    old.execute("CALL spectrum.run()")
    old.execute("CALL spectrum.run()")
    assert rows(old, "SELECT kind, state FROM spectrum.tasks") == [("pack_facts", "done")]
    assert value(old, IN_PLACE) == 1
    assert value(old, EVENTS) == 4


def test_a_packed_event_takes_60_bytes(db: psycopg.Connection) -> None:
    """With 85 bytes of properties, of 8,000 events of 400 users in one month."""
    month = (NOW - timedelta(days=150)).replace(day=1)
    db.execute("SELECT spectrum.ensure_partitions(%s, %s)", (month, month))
    db.execute(
        """
        INSERT INTO raw_events (payload)
        SELECT jsonb_build_object(
            'event_id', md5(n::text)::uuid, 'user_id', 'user-' || n * 7919 %% 400,
            'account_id', 'account-' || n * 7919 %% 40, 'event_type', types.name,
            'occurred_at', %s + n * n %% 2419200 * interval '1.000007 s',
            'properties', jsonb_build_object('path', '/projects/' || n * n %% 400 || '/board',
                'plan', (ARRAY['free', 'team', 'pro'])[1 + n %% 3], 'latency', n * 31 %% 900,
                'visit', left(md5((n / 5)::text), 10)))
        FROM generate_series(1, 8000) AS n
        JOIN unnest('{page_view, feature_used, api_request, sign_in}'::text[])
            WITH ORDINALITY AS types (name, number) ON number = 1 + n %% 4
        """,
        (month,),
    )
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    assert 80 <= value(db, "SELECT avg(length(properties::text)) FROM warehouse.fact_events") <= 90
    hot = value(db, "SELECT pg_total_relation_size(%s)", f"warehouse.fact_events_{month:%Y_%m}")
    db.execute("CALL spectrum.pack_facts('3 months')")
    db.execute("VACUUM warehouse.packed_events")
    packed = value(db, "SELECT pg_total_relation_size('warehouse.packed_events')")
    assert value(db, EVENTS) == 8000
    assert packed / 8000 <= 60
    assert hot / packed >= 3.5
