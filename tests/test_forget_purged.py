"""Forgetting where something was purged before: of facts, of raw events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import md5
from typing import Any
from uuid import UUID

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


@pytest.mark.parametrize(
    ("only", "left"),
    [
        ("", set()),
        (", p_to => now() - interval '100 days'", {f"{USER} 10"}),
        (", p_from => now() - interval '100 days'", {f"{USER} 200"}),
        # No event type is known of what is purged.
        (", p_event_type => 'seen'", {f"{USER} 200"}),
    ],
)
def test_entries_of_the_ledger_go_too(
    purged: psycopg.Connection, only: str, left: set[str]
) -> None:
    purged.execute("CALL spectrum.purge_raw('0')")
    receipt = rows(
        purged,
        "SELECT object, change::integer FROM spectrum.forget_user(%s" + only + ")"
        " WHERE cell IS NULL",
        USER,
    )
    known = {id for (id,) in rows(purged, "SELECT event_id FROM warehouse.event_ledger")}
    stays = left | {"eve 200", "bob 10"}
    assert known == {UUID(md5(name.encode()).hexdigest()) for name in stays}
    assert ("warehouse.event_ledger", len(known) - 4) in receipt
    prove(purged, views=True)


def test_a_long_ledger_is_looked_at_to_its_end(purged: psycopg.Connection) -> None:
    purged.execute("CALL spectrum.purge_raw('0')")
    purged.execute(
        "INSERT INTO warehouse.event_ledger"
        " SELECT gen_random_uuid(), n, now() - interval '1 year', (SELECT user_key"
        " FROM warehouse.dim_users WHERE user_id = CASE WHEN n = 130000 THEN %s ELSE 'eve' END)"
        " FROM generate_series(1001, 130000) AS n",
        (USER,),
    )
    assert ("warehouse.event_ledger", "rows removed", -3) in rows(purged, FORGET, USER, "remove")


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
