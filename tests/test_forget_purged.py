"""Forgetting where something was purged before: of facts, of raw events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import Connect
from forgetting import USER, traces
from pipeline import drain, event, insert, process, prove, rows, value
from purging import purge

FORGET = "SELECT object, what, change::integer FROM spectrum.forget_user(%s, %s) WHERE cell IS NULL"


def happened(days: int, user: str, **fields: Any) -> dict[str, Any]:
    """So many days ago, an event that names itself."""
    at = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    return event(event_id=f"{user} {days}", user_id=user, occurred_at=at, **fields)


@pytest.fixture
def purged(db: psycopg.Connection) -> psycopg.Connection:
    """Events of 200 days ago, of which the raw events alone are left, and of 10 days ago."""
    insert(db, [
        happened(200, USER, account_id="acme", geo={"city": "Bonn"}),
        happened(200, "eve", account_id="old", geo={"city": "Rome"}),
        happened(10, USER, account_id="acme"),
        happened(10, "bob", account_id="acme"),
    ])  # fmt: skip
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    purge(db, "3 months")
    assert value(db, "SELECT count(*) FROM warehouse.fact_events") == 2
    return db


def test_no_raw_event_of_a_purged_fact_names_him(purged: psycopg.Connection) -> None:
    purged.execute(FORGET, (USER, "anonymise"))
    assert traces(purged, USER) == set()
    named = "SELECT payload ->> 'user_id' FROM raw_events ORDER BY seq"
    (old, _, recent, _) = [name for (name,) in rows(purged, named)]
    assert old is None
    assert recent.startswith("anonymous-")
    purged.execute("CALL spectrum.reprocess(p_status => 'all')")
    drain(purged)
    prove(purged, views=True)


def test_the_receipt_counts_the_facts_that_there_were(purged: psycopg.Connection) -> None:
    receipt = rows(purged, FORGET, USER, "remove")
    assert ("warehouse.fact_events", "rows removed", -1) in receipt
    assert ("warehouse.event_ledger", "rows removed", -2) in receipt
    assert ("public.raw_events", "rows removed", -2) in receipt
    assert traces(purged, USER) == set()
    prove(purged, views=True)


def test_a_copy_steps_in_for_a_row_that_was_purged(db: psycopg.Connection) -> None:
    insert(db, [event(event_id="x", user_id=USER)])
    drain(db)
    db.execute("CALL spectrum.purge_raw('0')")
    insert(db, [event(event_id="x", user_id=USER), event(event_id="x", user_id="bob")])
    assert drain(db).duplicates == 2
    db.execute(FORGET, (USER, "remove"))
    db.execute("CALL spectrum.run()")
    assert rows(db, "SELECT user_id FROM analytics.events") == [("bob",)]
    assert traces(db, USER) == set()
    prove(db, views=True)


def test_who_holds_refreshes_up_does_not_hold_batches_up(
    db: psycopg.Connection, connect: Connect
) -> None:
    insert(db, [event(user_id=USER)])
    drain(db)
    db.execute("SELECT spectrum.configure('lock_timeout', '10 ms')")
    idle = connect(autocommit=False)
    idle.execute("SELECT spectrum.define_feature('f', 'visit')")
    eraser = connect(autocommit=False)
    eraser.execute("SET statement_timeout = '20s'")
    eraser.commit()
    with pytest.raises(psycopg.errors.LockNotAvailable), eraser.transaction():
        eraser.execute(FORGET, (USER, "remove"))
    insert(db, [event(user_id="bob")])
    assert process(db).loaded == 1
    idle.commit()
    db.execute(FORGET, (USER, "remove"))
    prove(db, views=True)
