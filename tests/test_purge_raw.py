"""purge_raw: raw events go by age, in steps; facts, ledger and every number stay."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from conftest import Connect
from pipeline import (
    drain,
    event,
    insert,
    kill_while_it_waits,
    process,
    prove,
    rows,
    statuses,
    value,
    wait_until,
    waits,
)


def age(db: psycopg.Connection, days: int, where: str = "true") -> None:
    db.execute(
        f"UPDATE raw_events SET received_at = received_at - make_interval(days => {days})"
        f" WHERE {where}"
    )


def test_what_is_done_and_old_goes_and_no_number_changes(db: psycopg.Connection) -> None:
    insert(db, [event(user_id=f"u{n}", event_id=f"e{n % 80}") for n in range(100)])
    insert(db, [event(""), event("young")])
    drain(db)
    insert(db, [event("waits")])
    db.execute("CALL spectrum.refresh_analytics()")
    age(db, 100, "payload ->> 'event_type' <> 'young'")
    before = rows(db, "SELECT * FROM analytics.active_users ORDER BY account_id, day")
    assert value(db, "CALL spectrum.purge_raw('90 days')") == 100
    assert statuses(db) == {"failed": 1, "pending": 1, "done": 1}
    assert rows(db, "SELECT * FROM analytics.active_users ORDER BY account_id, day") == before
    assert value(db, "SELECT count(*) FROM warehouse.event_ledger") == 81
    prove(db, views=True)


def test_a_copy_of_a_purged_event_is_still_a_copy(db: psycopg.Connection) -> None:
    """One that was here before names the event from then on; one that comes later does too."""
    insert(db, [event(event_id="same")])
    drain(db)
    insert(db, [event(event_id="same", user_id="other")])
    drain(db)
    age(db, 2, "seq = 1")
    assert value(db, "CALL spectrum.purge_raw('1 day')") == 1
    insert(db, [event(event_id="same", user_id="third")])
    assert process(db).duplicates == 1
    ledger = value(db, "SELECT event_id FROM warehouse.event_ledger")
    assert rows(db, "SELECT DISTINCT copy_of FROM raw_events") == [(ledger,)]
    db.execute("UPDATE raw_events SET status = 'pending'")
    assert drain(db).duplicates == 2
    prove(db)


def test_failed_events_go_only_where_asked_for(db: psycopg.Connection) -> None:
    insert(db, ["[1]", event("")])
    drain(db)
    db.execute("UPDATE raw_events SET next_attempt_at = now() + interval '1 day' WHERE seq = 2")
    assert value(db, "CALL spectrum.purge_raw('0')") == 0
    assert value(db, "CALL spectrum.purge_raw('0', p_failed => true)") == 1
    assert rows(db, "SELECT seq FROM raw_events") == [(2,)]


def test_the_setting_has_runs_purge(db: psycopg.Connection) -> None:
    insert(db, [event(user_id=f"u{n}") for n in range(10)])
    db.execute("CALL spectrum.run()")
    age(db, 40)
    db.execute("SELECT spectrum.configure('raw_keep', '30 days')")
    db.execute("CALL spectrum.run()")  # asks for it
    assert rows(db, "SELECT work FROM spectrum.progress") == [("purge_raw (task 1)",)]
    for _ in range(3):  # does it, and asks no more
        db.execute("CALL spectrum.run()")
    outcomes = rows(db, "SELECT state, outcome ->> 'deleted' FROM spectrum.tasks")
    assert outcomes == [("done", "10")]
    assert statuses(db) == {}
    db.execute("SELECT spectrum.configure('raw_keep', NULL)")
    prove(db)


def test_a_killed_purge_is_finished_by_the_tick(db: psycopg.Connection, connect: Connect) -> None:
    insert(db, [event(user_id=f"u{n % 100}") for n in range(21000)])
    drain(db, 100_000)
    holder, caller = connect(autocommit=False), connect()
    holder.execute("SELECT FROM raw_events WHERE seq = 21000 FOR UPDATE")
    kill_while_it_waits(db, caller, "CALL spectrum.purge_raw('0')")
    assert statuses(db) == {"done": 1000}
    holder.rollback()
    db.execute("CALL spectrum.run()")
    assert statuses(db) == {}
    ((state, outcome),) = rows(db, "SELECT state, outcome ->> 'deleted' FROM spectrum.tasks")
    assert (state, outcome) == ("done", "21000")
    prove(db)


def test_a_row_set_back_meanwhile_stays(db: psycopg.Connection, connect: Connect) -> None:
    """Purge against reprocess: whoever comes first; a row that waits again is not deleted."""
    insert(db, [event(user_id="a"), event(user_id="b")])
    drain(db)
    other, purger = connect(autocommit=False), connect()
    other.execute("UPDATE raw_events SET status = 'pending' WHERE seq = 2")
    with ThreadPoolExecutor() as threads:
        call = threads.submit(value, purger, "CALL spectrum.purge_raw('0')")
        wait_until(lambda: waits(db, purger))
        other.commit()
        assert call.result() == 1
    assert statuses(db) == {"pending": 1}
    assert drain(db).loaded == 1
    prove(db)


@pytest.mark.parametrize("older_than", ["NULL", "'-1 day'"])
def test_an_age_is_needed(db: psycopg.Connection, older_than: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_older_than"):
        db.execute(f"CALL spectrum.purge_raw({older_than})")
