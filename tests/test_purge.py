"""Purge of facts: numbers outlive what they were made of, whatever comes afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import psycopg
import pytest
from conftest import Connect, MakeDb
from histories import exploring, timezones
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import drain, event, insert, prove, rows, statuses, value, wait_until, waits
from purging import Twins, differences, open_from, purge, standing

NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
EXAMPLES = int(os.environ.get("SPECTRUM_PURGE_EXAMPLES", "4"))


@pytest.fixture
def twin(make_db: MakeDb, connect: Connect) -> Iterator[psycopg.Connection]:
    return connect(make_db("twin"))


@settings(exploring, max_examples=EXAMPLES)
@given(randoms=st.randoms(use_true_random=True), timezone=timezones)
def test_a_twin_that_never_purges_says_the_same(
    db: psycopg.Connection, twin: psycopg.Connection, randoms: Random, timezone: str
) -> None:
    with db.transaction(force_rollback=True), twin.transaction(force_rollback=True):
        twins = Twins(db, twin, randoms, timezone)
        age = 6
        for number in range(5):
            twins.send(randoms.choice([20, 80]))
            twins.correct()
            twins.knock()
            if number in (1, 2, 3):
                age = max(3, age - randoms.choice([0, 1, 2]))
                drain(db)
                drain(twin)
                purge(db, f"{age} months", randoms.choice([2, 5, 1000]))
            if randoms.random() < 0.5:
                twins.both("SELECT spectrum._refresh_some(20)")
        twins.settle()
        assert differences(db, twin) == {}
        assert rows(db, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []


def happened(days: float, event_type: str = "a", **fields: Any) -> dict[str, Any]:
    """So long ago."""
    at = (NOW - timedelta(days=days)).isoformat()
    return {
        "event_type": event_type,
        "occurred_at": at,
        "user_id": "u1",
        "account_id": "one",
    } | fields


@pytest.fixture
def old(db: psycopg.Connection) -> psycopg.Connection:
    """Events of 200, 190 and 10 days ago, counted."""
    insert(db, [
        happened(200, "start", event_id="1"),
        happened(190, "b", event_id="2", user_id="u2", properties={"revenue": 5}),
        happened(10, "a", event_id="3"),
    ])  # fmt: skip
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    return db


def months(db: psycopg.Connection) -> list[str]:
    return [name for (name,) in rows(db, "SELECT name FROM spectrum._fact_months() ORDER BY name")]


def test_facts_go_and_numbers_stay(old: psycopg.Connection) -> None:
    before, had = standing(old), len(months(old))
    purged = value(old, "CALL spectrum.purge_facts('3 months')")
    assert purged == had - len(months(old)) and purged in (1, 2)
    assert value(old, "SELECT count(*) FROM warehouse.fact_events") == 1
    assert value(old, "SELECT count(*) FROM warehouse.event_ledger") == 3
    assert standing(old) == before
    facts_from, opened = rows(old, "SELECT facts_from, open_from FROM spectrum.horizon")[0]
    assert facts_from <= NOW - timedelta(days=88)
    assert timedelta(days=33) <= opened - facts_from <= timedelta(days=35)
    ((state, done, total, unit),) = rows(old, "SELECT state, done, total, unit FROM spectrum.tasks")
    assert (state, done, total, unit) == ("done", purged, purged, "months")
    prove(old, views=True)
    ((frozen, ok),) = rows(
        old, "SELECT check_name, ok FROM spectrum.verify() WHERE check_name LIKE 'frozen before%'"
    )
    assert ok and "lifecycle_periods" in frozen and "throughput_minutes" not in frozen
    # Nothing more to do, and nothing comes back.
    assert value(old, "CALL spectrum.purge_facts('3 months')") == 0
    here = months(old)
    value(old, "SELECT spectrum.ensure_partitions(now() - interval '1 year', now())")
    assert min(months(old)) == facts_from.strftime("fact_events_%Y_%m")
    assert set(here) <= set(months(old))


def test_what_is_closed_stays_as_it_is(old: psycopg.Connection) -> None:
    value(old, "CALL spectrum.purge_facts('3 months')")
    before = standing(old)
    old.execute(
        "UPDATE raw_events SET status = 'pending', payload = payload || '{\"event_type\": 1}'"
        " WHERE seq < 3"
    )
    insert(old, [
        happened(200, "x", event_id="1"),
        happened(1, "x", event_id="2"),
        happened(150, "x", event_id="4"),
    ])  # fmt: skip
    batch = drain(old)
    assert (batch.claimed, batch.loaded, batch.duplicates, batch.failed) == (5, 0, 4, 1)
    assert statuses(old) == {"done": 5, "failed": 1}
    ((message,),) = rows(old, "SELECT error_msg FROM raw_events WHERE status = 'failed'")
    opened = open_from(old)
    assert opened is not None
    assert message.startswith(
        f"occurred_at: expected a time from {opened.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC (what is"
        " older is closed, see spectrum.horizon) on, got "
    )
    assert rows(
        old,
        "SELECT raw.seq, first.seq FROM raw_events AS raw JOIN raw_events AS first"
        " ON first.id = raw.copy_of ORDER BY 1",
    ) == [(4, 1), (5, 2)]
    old.execute("CALL spectrum.refresh_analytics()")
    assert standing(old) == before
    prove(old)


def test_an_earlier_row_does_not_take_over_what_is_closed(old: psycopg.Connection) -> None:
    """The first row received counts; not where it is processed when the event is closed."""
    insert(old, [happened(9, event_id="5")])
    old.execute("UPDATE raw_events SET status = 'processing' WHERE seq = 4")
    insert(old, [happened(180, "late", event_id="5")])
    drain(old)
    value(old, "CALL spectrum.purge_facts('3 months')")
    before = standing(old)
    old.execute("UPDATE raw_events SET status = 'pending' WHERE seq = 4")
    assert drain(old).duplicates == 1
    assert rows(old, "SELECT seq FROM warehouse.event_ledger ORDER BY seq DESC LIMIT 1") == [(5,)]
    old.execute("CALL spectrum.refresh_analytics()")
    assert standing(old) == before
    prove(old)


def test_numbers_fall_back_to_what_is_frozen(db: psycopg.Connection) -> None:
    """What came after the purge is taken back: a funnel's entry, an exposure, a last event."""
    db.execute("""
        SELECT spectrum.define_funnel('f', '["a", "b", "c"]');
        SELECT spectrum.define_funnel(
            'first', '["a", "b"]', p_entry => 'first', p_exclude => '["d"]');
        SELECT spectrum.define_metric('m', 'mean', 'b');
        SELECT spectrum.define_experiment('e', '{"x": 0.5, "y": 0.5}', 'x', '["m"]')
    """)
    exposed = {"experiment": "e", "variant": "x"}
    insert(db, [
        happened(200, "experiment_exposure", properties=exposed),
        happened(200, "a"), happened(199, "b", properties={"rare": 1}),
        happened(200, "a", user_id="u2"), happened(199.5, "d", user_id="u2"),
        happened(199, "b", user_id="u2"),
    ])  # fmt: skip
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    value(db, "CALL spectrum.purge_facts('3 months')")
    before = standing(db)
    insert(db, [
        happened(6, "a"), happened(5, "b"), happened(4, "c"),
        happened(6, "a", user_id="u2"), happened(5, "b", user_id="u2"),
        happened(3, "experiment_exposure", properties=exposed | {"variant": "y"}),
        happened(2, "b", properties={"rare": 2}, account_id="two"),
    ])  # fmt: skip
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    funnel = (
        "SELECT users FROM analytics.conversion_funnels"
        " WHERE funnel = %s AND account_id = '*' ORDER BY step"
    )
    assert rows(db, funnel, "f") == [(2,), (2,), (1,)]
    assert rows(db, funnel, "first") == [(1,), (1,)]
    units = "SELECT units, excluded_units FROM analytics.experiment_results WHERE variant = 'x'"
    assert (0, 1) in rows(db, units)
    db.execute(
        "UPDATE raw_events SET status = 'pending', payload = payload - 'event_type' WHERE seq > 6"
    )
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    assert standing(db) == before
    prove(db, views=True)


def test_frozen_numbers_are_not_computed_away(old: psycopg.Connection) -> None:
    value(old, "CALL spectrum.purge_facts('3 months')")
    before = standing(old)
    for call in (
        "SELECT spectrum.rebuild_reports()",
        "SELECT spectrum.configure('timezone', 'Asia/Tokyo')",
        "SELECT spectrum.configure('week_start', '7')",
        "SELECT spectrum.configure('refund_events', '{x}')",
        "SELECT spectrum.configure('currency', 'EUR')",
    ):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refused:
            old.execute(call)
        assert "that are purged: made anew, they would lose" in str(refused.value)
        assert "p_lose_frozen => true" in (refused.value.diag.message_hint or "")
    old.execute("CALL spectrum.refresh_analytics()")
    assert standing(old) == before
    # Unless one insists: then they are what the facts say.
    old.execute("SELECT spectrum.configure('timezone', 'Asia/Tokyo', p_lose_frozen => true)")
    old.execute("CALL spectrum.refresh_analytics()")
    assert value(old, "SELECT sum(dau) FROM analytics.active_users WHERE account_id = '*'") == 1
    prove(old, views=True)


def test_a_definition_made_after_the_purge_says_from_when(old: psycopg.Connection) -> None:
    old.execute("""SELECT spectrum.define_funnel('f', '["start", "a"]')""")
    old.execute("CALL spectrum.refresh_analytics()")
    value(old, "CALL spectrum.purge_facts('3 months')")
    warnings: list[str] = []
    old.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
    old.execute("""SELECT spectrum.define_funnel('g', '["start", "a"]')""")
    old.execute("SELECT spectrum.define_retention('any', p_period => 'month')")
    assert warnings == []
    old.execute("CALL spectrum.refresh_analytics()")
    horizon = value(old, "SELECT facts_from FROM spectrum.horizon")
    complete = dict(rows(old, "SELECT name, complete_from FROM spectrum.reports WHERE name <> ''"))
    assert complete == {"default": None, "f": None, "g": horizon, "any": horizon}
    users = dict(rows(
        old, "SELECT funnel, users FROM analytics.conversion_funnels"
        " WHERE account_id = '*' AND step = 1",
    ))  # fmt: skip
    assert users == {"f": 1, "g": 0}
    prove(old, views=True)
    old.execute("""SELECT spectrum.define_funnel('f', '["start", "b"]')""")
    assert len(warnings) == 1 and "funnel f is built from the facts since" in warnings[0]


def test_a_retention_of_any_events_knows_the_days_of_purged_facts(old: psycopg.Connection) -> None:
    ask = """SELECT account_id, cohort, period, users FROM analytics.retention_cohorts
        WHERE retention = %s"""
    old.execute("SELECT spectrum.define_retention('before', p_period => 'month', p_periods => 9)")
    old.execute("CALL spectrum.refresh_analytics()")
    value(old, "CALL spectrum.purge_facts('3 months')")
    old.execute("SELECT spectrum.define_retention('after', p_period => 'month', p_periods => 9)")
    old.execute("CALL spectrum.refresh_analytics()")
    assert sorted(rows(old, ask, "after")) == sorted(rows(old, ask, "before")) != []
    # ... and goes on from there.
    insert(old, [happened(3, user_id="u2"), happened(3, user_id="u1", account_id="two")])
    drain(old)
    old.execute("CALL spectrum.refresh_analytics()")
    assert sorted(rows(old, ask, "after")) == sorted(rows(old, ask, "before"))


def test_a_report_of_ones_own_cannot_outlive_its_facts(old: psycopg.Connection) -> None:
    old.execute("""
        CREATE FUNCTION public.events_of(p_users bigint[])
        RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
        LANGUAGE sql STABLE AS $$
            SELECT '*', e.user_key, ARRAY['events'], count(*) FROM analytics.events AS e
            WHERE e.user_key = ANY (p_users) GROUP BY e.user_key
        $$;
        SELECT spectrum.define_report('own', 'public.events_of')
    """)
    old.execute("CALL spectrum.refresh_analytics()")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="report own") as refused:
        old.execute("CALL spectrum.purge_facts('3 months')")
    assert (
        refused.value.diag.message_hint is not None and "rebuild" in refused.value.diag.message_hint
    )
    amount = "SELECT amount FROM analytics.reports"
    assert rows(old, amount) == [(3,)]
    value(old, "CALL spectrum.purge_facts('3 months', 'rebuild')")
    old.execute("CALL spectrum.refresh_analytics()")
    assert rows(old, amount) == [(1,)]
    prove(old, views=True)


def test_what_cannot_be_purged_is_refused(old: psycopg.Connection) -> None:
    for arguments, message in (
        ("'20 days'", 'p_older_than: "20 days"'),
        ("NULL", "p_older_than: NULL"),
        ("'-1 day'", "p_older_than"),
        ("'3 months', 'freeze'", 'p_own_reports: "freeze"'),
    ):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
            old.execute(f"CALL spectrum.purge_facts({arguments})")
    assert rows(old, "SELECT facts_from, open_from FROM spectrum.horizon") == [(None, None)]


def test_the_guard_is_as_long_as_the_longest_window(old: psycopg.Connection) -> None:
    old.execute("""SELECT spectrum.define_funnel('f', '["a", "b"]', p_window => '80 days')""")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_older_than"):
        old.execute("CALL spectrum.purge_facts('2 months')")
    value(old, "CALL spectrum.purge_facts('4 months')")
    guard = value(old, "SELECT open_from - facts_from FROM spectrum.horizon")
    assert guard == timedelta(days=82)


def test_purge_refuses_a_transaction_block(old: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidTransactionTermination), old.transaction():
        old.execute("CALL spectrum.purge_facts('3 months')")
    assert rows(old, "SELECT * FROM spectrum.tasks") == []


def test_the_tick_purges_what_is_older_than_wanted(old: psycopg.Connection) -> None:
    old.execute("CALL spectrum.run()")
    assert open_from(old) is None
    before = standing(old)
    old.execute("SELECT spectrum.configure('facts_keep', '3 months')")
    old.execute("CALL spectrum.run()")
    assert rows(old, "SELECT work, unit FROM spectrum.progress") == [("purge_facts (task 1)", None)]
    old.execute("CALL spectrum.run()")
    assert rows(old, "SELECT kind, state FROM spectrum.tasks") == [("purge_facts", "done")]
    assert value(old, "SELECT count(*) FROM warehouse.fact_events") == 1
    assert standing(old) == before
    assert value(old, "SELECT spectrum.configure('facts_keep', NULL)") is None


def test_interrupted_anywhere_it_is_finished_by_the_tick(
    old: psycopg.Connection, connect: Connect
) -> None:
    """Killed at each of its steps, the fact that came meanwhile counted."""
    before = standing(old)
    task = value(old, """SELECT spectrum.request('purge_facts', '{"older_than": "3 months"}')""")
    for _ in range(20):
        victim = connect(autocommit=False)
        victim.execute("SELECT spectrum._work_on_task(%s)", (task,))
        value(old, "SELECT pg_terminate_backend(%s)", victim.info.backend_pid)
        victim.close()
        old.execute("CALL spectrum.refresh_analytics()")
        assert standing(old) == before
        prove(old)
        if not value(old, "SELECT spectrum._work_on_task(%s)", task):
            break
    assert rows(old, "SELECT state FROM spectrum.tasks") == [("done",)]
    assert value(old, "SELECT count(*) FROM warehouse.fact_events") == 1


def test_a_reader_holds_it_up_and_nothing_else(old: psycopg.Connection, connect: Connect) -> None:
    """Detaching waits for readers, no longer than lock_timeout; who comes then waits no longer."""
    old.execute("SELECT spectrum.configure('lock_timeout', '300 ms')")
    old.execute("SELECT spectrum.configure('retry_delay', '0')")
    before = standing(old)
    reader = connect(autocommit=False)
    reader.execute("SELECT count(*) FROM analytics.events")
    with pytest.raises(psycopg.errors.LockNotAvailable, match="is running"):
        old.execute("CALL spectrum.purge_facts('3 months')")
    # The horizon is where it will be; the partition waits.
    assert value(old, "SELECT facts_from IS NOT NULL FROM spectrum.horizon")
    assert value(old, "SELECT count(*) FROM warehouse.fact_events") == 3
    prove(old, views=True)
    insert(old, [happened(1)])
    assert drain(old).loaded == 1
    reader.rollback()
    old.execute(
        "UPDATE raw_events SET status = 'pending', payload = payload - 'event_type' WHERE seq > 3"
    )
    drain(old)
    old.execute("CALL spectrum.run()")
    assert rows(old, "SELECT state, error_msg FROM spectrum.tasks") == [("done", None)]
    assert standing(old) == before
    prove(old, views=True)


def test_a_batch_under_way_brings_its_events_first(
    old: psycopg.Connection, connect: Connect
) -> None:
    """What is open to a batch when it begins is counted before its month is frozen."""
    insert(old, [happened(180, "late"), happened(170, "late")])
    worker = connect(autocommit=False)
    worker.execute("CALL spectrum.process_batch(1)")
    with ThreadPoolExecutor() as threads:
        purging = connect()
        call = threads.submit(purging.execute, "CALL spectrum.purge_facts('3 months')")
        wait_until(lambda: waits(old, purging))
        worker.commit()
        call.result()
    assert drain(old).failed == 1
    assert value(old, "SELECT count(*) FROM warehouse.event_ledger") == 4
    assert value(
        old,
        "SELECT sum(events) FROM analytics.daily_events"
        " WHERE event_type = 'late' AND account_id = '*'",
    ) == 1  # fmt: skip
    prove(old, views=True)


def test_an_old_snapshot_does_not_reopen(old: psycopg.Connection, connect: Connect) -> None:
    insert(old, [happened(180, "late")])
    worker = connect(autocommit=False)
    worker.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    worker.execute("SELECT FROM spectrum.config")
    value(old, "CALL spectrum.purge_facts('3 months')")
    with pytest.raises(psycopg.errors.SerializationFailure):
        worker.execute("CALL spectrum.process_batch()")
    worker.rollback()
    assert drain(old).failed == 1


def test_reprocessing_everything_beside_it(old: psycopg.Connection) -> None:
    value(old, "CALL spectrum.purge_facts('3 months')")
    before = standing(old)
    value(old, "CALL spectrum.reprocess(p_status => 'all')")
    batch = drain(old)
    assert (batch.loaded, batch.duplicates, batch.failed) == (1, 2, 0)
    old.execute("CALL spectrum.refresh_analytics()")
    assert standing(old) == before
    prove(old, views=True)


def test_questions_and_traces_say_what_is_missing(old: psycopg.Connection) -> None:
    value(old, "CALL spectrum.purge_facts('3 months')")
    notices: list[str] = []
    old.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    assert value(old, "SELECT count(*) FROM analytics.active_users()") == 1
    assert len(notices) == 1 and "are purged: this answer is without them" in notices[0]
    value(old, "SELECT count(*) FROM analytics.active_users(now() - interval '20 days')")
    assert len(notices) == 1
    day = (NOW - timedelta(days=200)).date().isoformat()
    cell = f'{{"day": "{day}", "event_type": "start"}}'
    assert rows(old, "SELECT * FROM analytics.trace('daily_events', %s)", cell) == []
    assert len(notices) == 2 and "is frozen, and cannot be listed" in notices[1]
    event_id = value(old, "SELECT event_id FROM warehouse.event_ledger WHERE seq = 1")
    told = rows(old, "SELECT what, rule FROM spectrum.explain_event(%s)", event_id)
    assert [what for what, _ in told] == ["raw event", "fact"]
    assert "frozen" in told[1][1]
    # Asked for days alone, the kept ones answer: those of facts that are there.
    old.execute("SET spectrum.from_facts = 'on'")
    slow = rows(old, "SELECT * FROM analytics.retention()")
    old.execute("SET spectrum.from_facts = 'off'")
    assert rows(old, "SELECT * FROM analytics.retention()") == slow


def test_an_earlier_first_entry_counts_however_short(db: psycopg.Connection) -> None:
    """It comes late, and behind it nothing: the entry that counted went further."""
    db.execute("""SELECT spectrum.define_funnel('f', '["a", "b"]', '3 days', p_entry => 'first')""")
    insert(db, [happened(10, "a"), happened(9, "b")])
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    insert(db, [happened(60, "a")])
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    assert rows(
        db,
        "SELECT step, users FROM analytics.conversion_funnels WHERE account_id = '*' ORDER BY step",
    ) == [(1, 1), (2, 0)]
    prove(db, views=True)


def test_a_purge_that_cannot_be_is_named_and_holds_up_no_upkeep(db: psycopg.Connection) -> None:
    """facts_keep is set, and a funnel looks back further: the task says so, the run goes on."""
    insert(db, [event(user_id="u", occurred_at="2023-01-05T12:00:00Z")])
    db.execute("CALL spectrum.run()")
    db.execute("""SELECT spectrum.define_funnel('long', '["a", "b"]', p_window => '5 years')""")
    db.execute("SELECT spectrum.configure('facts_keep', '13 months')")
    db.execute("CALL spectrum.run()")
    assert rows(db, "SELECT last_run_error FROM spectrum.status()") == [(None,)]
    ((kind, state, message),) = rows(db, "SELECT kind, state, error_msg FROM spectrum.tasks")
    assert (kind, state) == ("purge_facts", "failed") and "p_older_than" in message
    assert rows(db, "SELECT ok FROM spectrum.health() WHERE check_name = 'tasks'") == [(False,)]


def test_members_older_than_what_is_purged_keep_their_names(db: psycopg.Connection) -> None:
    insert(db, [event(user_id="old", account_id="a", occurred_at="2023-01-05T12:00:00Z")])
    db.execute("CALL spectrum.run()")
    db.execute("CALL spectrum.purge_facts('13 months')")
    assert value(db, "SELECT count(*) FROM warehouse.fact_events") == 0
    assert value(db, "SELECT spectrum.forget_members()") == 0
    assert value(db, "SELECT count(*) FROM warehouse.dim_users WHERE user_id = 'old'") == 1
