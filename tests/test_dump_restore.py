"""A dump holds everything and a restore needs nothing: the data is the user's own."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from backups import assert_finishes, fill, half_done, tool, views
from conftest import OWNER, Connect, MakeDb, MakeRole, run_sql
from pipeline import drain, event, insert, prove, rows, value
from psycopg.conninfo import conninfo_to_dict

STATE = """
    SELECT 'raw' AS what, count(*)::text AS value FROM raw_events
    UNION ALL SELECT 'done', count(*)::text FROM raw_events WHERE status = 'done'
    UNION ALL SELECT 'facts', count(*)::text FROM warehouse.fact_events
    UNION ALL SELECT 'ledger', count(*)::text FROM warehouse.event_ledger
    UNION ALL SELECT 'months', string_agg(inhrelid::regclass::text, ' '
            ORDER BY inhrelid::regclass::text)
        FROM (SELECT inhrelid FROM pg_inherits
            WHERE inhparent = 'warehouse.fact_events'::regclass) AS months
    UNION ALL SELECT 'indexes', count(*)::text FROM pg_indexes
        WHERE schemaname IN ('public', 'spectrum', 'warehouse', 'analytics')
    UNION ALL SELECT 'sequences', string_agg(sequencename || '=' || coalesce(last_value, 0), ' '
        ORDER BY sequencename) FROM pg_sequences WHERE schemaname <> 'cron'
"""


def assert_goes_on(db: psycopg.Connection) -> None:
    """New events become facts under new keys, and every proof holds."""
    before = value(db, "SELECT count(*) FROM warehouse.fact_events")
    insert(db, [event("visit", user_id="newcomer"), event("visit", event_id="x")])
    assert drain(db)[1:3] == (1, 1)
    assert value(db, "SELECT count(*) FROM warehouse.fact_events") == before + 1
    db.execute("CALL spectrum.refresh_analytics()")
    assert rows(db, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []
    assert value(db, "SELECT max(seq) = count(*) FROM raw_events")


@pytest.mark.parametrize("form", ["custom", "plain"])
def test_restored_it_is_the_same_and_goes_on(
    form: str, make_db: MakeDb, connect: Connect, tmp_path: Path
) -> None:
    source = make_db("source", template="owner")
    with connect(source) as db:
        fill(db)
        state, shown = rows(db, STATE), views(db)
    assert all(shown.values()), "every view should have rows to lose"
    target = make_db("target", template="")
    run_sql(target, f'ALTER DATABASE "{conninfo_to_dict(target)["dbname"]}" OWNER TO {OWNER}')
    target += f" user={OWNER}"
    dump = tmp_path / "dump"
    if form == "custom":
        tool("pg_dump", source, "-Fc", "-f", str(dump))
        tool("pg_restore", target, "-1", "-e", str(dump))
    else:
        tool("pg_dump", source, "-f", str(dump))
        tool("psql", target, "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", str(dump))
    with connect(target) as db:
        assert rows(db, STATE) == state
        assert views(db) == shown
        assert_goes_on(db)


@pytest.mark.parametrize("who", ["owner", "superuser", "superuser as the owner"])
def test_restored_by_whomever_it_goes_on_where_it_stood(
    who: str, make_db: MakeDb, connect: Connect, tmp_path: Path
) -> None:
    source, target = make_db("source", template="owner"), make_db("target", template="")
    run_sql(target, f'ALTER DATABASE "{conninfo_to_dict(target)["dbname"]}" OWNER TO {OWNER}')
    with connect(source) as db:
        half_done(db)
    as_owner, dump = f"{target} user={OWNER}", tmp_path / "dump"
    tool("pg_dump", source, "-Fc", "-f", str(dump))
    role = [f"--role={OWNER}"] if who == "superuser as the owner" else []
    tool("pg_restore", as_owner if who == "owner" else target, "-1", "-e", *role, str(dump))
    health = "SELECT ok, what_to_do FROM spectrum.health() WHERE check_name = %s"
    with connect(target) as superuser:
        ((ok, cure),) = rows(superuser, health, "ownership")
        assert ok == (who != "superuser")
        if not ok:
            superuser.execute(cure.removeprefix("As a superuser: "))
    with connect(as_owner) as db:
        assert rows(db, health, "schedule")[0][0] is False
        assert_finishes(db)
        assert rows(db, health, "ownership")[0][0]


def test_what_waits_and_what_was_granted_come_along(
    make_db: MakeDb, make_role: MakeRole, connect: Connect, tmp_path: Path
) -> None:
    ingest, analyst = make_role("ingest"), make_role("analyst")
    source = make_db("source")
    with connect(source) as db, connect(source, autocommit=False) as writer:
        db.execute(f"SELECT spectrum.grant_ingest('{ingest}'), spectrum.grant_analyst('{analyst}')")
        insert(db, [event("visit", event_id=f"e{number}") for number in range(5)])
        # A writer holds the marks back; one row is set back, one waits, one is another worker's.
        insert(writer, [event("visit")])
        drain(db)
        insert(db, [event("visit", event_id="waits"), event("visit", event_id="held")])
        db.execute("UPDATE raw_events SET status = 'pending' WHERE seq = 2")
        db.execute(
            "UPDATE raw_events SET status = 'processing' WHERE payload ->> 'event_id' = 'held'"
        )
        dump = tmp_path / "dump"
        tool("pg_dump", source, "-Fc", "-f", str(dump))
    target = make_db("target", template="")
    tool("pg_restore", target, "-1", "-e", str(dump))
    with connect(target) as db:
        assert drain(db)[:2] == (2, 2)
        db.execute("UPDATE spectrum.requeue SET due_at = now()")
        assert drain(db)[:2] == (1, 1)
        prove(db, views=True)
    with connect(f"{target} user={ingest}") as db:
        insert(db, [event("visit", event_id="new")])
    with connect(target) as db:
        assert drain(db)[:2] == (1, 1)
    with connect(f"{target} user={analyst}") as db:
        assert value(db, "SELECT sum(value) FROM analytics.trend('visit')") == 8
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute("SELECT * FROM raw_events")


def test_the_definitions_come_back_to_the_letter(
    make_db: MakeDb, connect: Connect, tmp_path: Path
) -> None:
    source = make_db("source")
    with connect(source) as db:
        fill(db)
    target = make_db("target", template="")
    dump = tmp_path / "dump"
    tool("pg_dump", source, "-Fc", "-f", str(dump))
    tool("pg_restore", target, "-1", "-e", str(dump))

    def schema(dsn: str) -> list[str]:
        text = tool("pg_dump", dsn, "-s")
        return [
            line
            for line in text.splitlines()
            if not line.startswith(("\\restrict", "\\unrestrict"))
        ]

    assert schema(target) == schema(source)


def test_after_a_superusers_restore_health_names_what_mends_it(
    make_db: MakeDb, connect: Connect, tmp_path: Path
) -> None:
    source = make_db("source", template="owner")
    with connect(source) as db:
        fill(db)
    target = make_db("target", template="")
    dump = tmp_path / "dump"
    tool("pg_dump", source, "-Fc", "-f", str(dump))
    tool("pg_restore", target, "-1", "-e", str(dump))
    run_sql(target, f'ALTER DATABASE "{conninfo_to_dict(target)["dbname"]}" OWNER TO {OWNER}')
    as_owner = target + f" user={OWNER}"
    with connect(as_owner) as db, pytest.raises(psycopg.errors.InsufficientPrivilege):
        drain(db)
    query = "SELECT ok, what_to_do FROM spectrum.health() WHERE check_name = 'ownership'"
    with connect(target) as superuser:
        ((ok, cure),) = rows(superuser, query)
        assert not ok
        superuser.execute(cure.removeprefix("As a superuser: "))
        assert value(superuser, query.replace(", what_to_do", ""))
    with connect(as_owner) as db:
        assert_goes_on(db)


def test_dropping_the_extension_is_refused_while_there_is_data(
    owner_db: psycopg.Connection,
) -> None:
    insert(owner_db, [event()])
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        owner_db.execute("DROP EXTENSION spectrum")
    assert value(owner_db, "SELECT count(*) FROM raw_events") == 1
