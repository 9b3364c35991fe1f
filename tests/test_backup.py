"""Copies of a whole server: standby, promotion, point-in-time recovery, pg_upgrade, replication.

Each stands in the middle of everything when it is taken, and goes on where it stood. The
statements of docs/backup.md are run as they stand there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from backups import assert_finishes, contents, half_done
from catalogue import differences, snapshot
from pipeline import drain, event, insert, process, rows, value, wait_until
from psycopg import errors
from servers import Place, Server, pg_config, run, servers
from test_privileges import QUESTIONS

STATEMENTS = re.compile(
    r"<!-- not run: tests/test_backup.py does, on the (\w+) -->\n```sql\n(.*?)```", re.DOTALL
)
DOC = Path(__file__).resolve().parents[1] / "docs" / "backup.md"
HAS_CRON = (pg_config("--pkglibdir") / "pg_cron.so").exists()
CRON = {
    "shared_preload_libraries": "pg_cron",
    "cron__database_name": "shop",
    "cron__use_background_workers": "on",
}
CRON_WORKS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_cron launcher'"
pytestmark = pytest.mark.skipif(
    not (pg_config("--bindir") / "pg_basebackup").exists(), reason="a server without its clients"
)
HEALTH = "SELECT ok, message FROM spectrum.health() WHERE check_name = %s"


def connect(server: Server, dbname: str = "shop") -> psycopg.Connection:
    return psycopg.connect(server.dsn(dbname), autocommit=True)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with servers() as place:
        yield place


@pytest.fixture(scope="module")
def primary(place: Place) -> Server:
    archive = place.base / "archive"
    run("mkdir", archive)
    server = place.initdb("primary").start(
        wal_level="logical", archive_mode="on", archive_command=f"cp %p {archive}/%f",
        **CRON if HAS_CRON else {},
    )  # fmt: skip
    with connect(server, "postgres") as db:
        db.execute("CREATE DATABASE shop")
    with connect(server) as db:
        db.execute("CREATE EXTENSION spectrum")
        if HAS_CRON:
            db.execute("CREATE EXTENSION pg_cron")
            db.execute("SELECT spectrum.schedule('0 0 1 1 *')")
        db.execute("CREATE ROLE ana")
        db.execute("SELECT spectrum.grant_analyst('ana')")
        half_done(db)
    return server


@pytest.fixture(scope="module")
def standby(place: Place, primary: Server) -> Server:
    # Promoted, it would write its own history into the primary's archive.
    return place.keep(primary.base_backup("standby", "-R")).start(archive_mode="off")


@pytest.fixture(scope="module")
def promoted(standby: Server) -> Server:
    standby.control("promote")
    return standby


def wait_for(standby: Server, primary: Server) -> None:
    with connect(primary) as db, connect(standby) as copy:
        end = value(db, "SELECT pg_current_wal_lsn()")
        wait_until(lambda: value(copy, "SELECT pg_last_wal_replay_lsn() >= %s", end))


def test_a_standby_answers(primary: Server, standby: Server) -> None:
    wait_for(standby, primary)
    with connect(primary) as db, connect(standby) as copy:
        assert contents(copy) == contents(db)
        views = rows(
            db,
            "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'v' AND relnamespace IN"
            " ('spectrum'::regnamespace, 'warehouse'::regnamespace, 'analytics'::regnamespace)",
        )
        assert len(views) > 30
        for (view,) in views:
            assert copy.execute(f"SELECT * FROM {view}").description
        for question in QUESTIONS:
            assert rows(copy, f"SELECT * FROM {question}") == rows(db, f"SELECT * FROM {question}")
        for query in (
            "SELECT pending, done, failed, uncounted, reports_building FROM spectrum.status()",
            "SELECT * FROM spectrum.verify()",
        ):
            assert rows(copy, query) == rows(db, query)
        ((ok, message),) = rows(copy, HEALTH, "standby")
        assert ok and message.startswith("this server is a standby: to be read, not written; it")
        assert rows(db, HEALTH, "standby") == [(True, "this server is no standby")]
        assert value(copy, CRON_WORKS) == 0
        if HAS_CRON:
            assert value(copy, "SELECT cron FROM spectrum.status()") == (
                "scheduled; on a standby pg_cron begins with its promotion"
            )


def test_a_standby_that_is_paused_is_named(primary: Server, standby: Server) -> None:
    with connect(standby) as copy:
        copy.execute("SELECT pg_wal_replay_pause()")
        ((ok, message),) = rows(copy, HEALTH, "standby")
        copy.execute("SELECT pg_wal_replay_resume()")
    assert not ok and message.endswith("is paused")


@pytest.mark.parametrize(
    "statement",
    ["CALL spectrum.run()", "CALL spectrum.process_batch()", "CALL spectrum.refresh_analytics()"],
)
def test_on_a_standby_a_call_says_what_to_do(standby: Server, statement: str) -> None:
    with connect(standby) as copy, pytest.raises(errors.ReadOnlySqlTransaction) as refused:
        copy.execute(statement)
    assert refused.value.diag.message_primary == (
        "this server is a standby: it can be read, not written"
    )
    assert refused.value.diag.message_hint == (
        "Call it on the primary. After SELECT pg_promote() it works here, and pg_cron goes on "
        "here by itself."
    )


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO raw_events (payload) VALUES ('{}')",
        "CALL spectrum.reprocess()",
        "SELECT spectrum.configure('batch_size', '1')",
        "SELECT spectrum.ensure_partitions(now(), now() + interval '1 year')",
    ],
)
def test_on_a_standby_nothing_is_written(standby: Server, statement: str) -> None:
    with connect(standby) as copy, pytest.raises(errors.ReadOnlySqlTransaction):
        copy.execute(statement)


def test_promoted_it_goes_on_where_it_stood(primary: Server, promoted: Server) -> None:
    with connect(primary) as db, connect(promoted) as copy:
        assert contents(copy) == contents(db)
        assert_finishes(copy)
        assert value(db, "SELECT count(*) FROM raw_events WHERE status = 'pending'") > 0
        if HAS_CRON:
            wait_until(lambda: value(copy, CRON_WORKS) == 1)
            assert value(copy, "SELECT cron FROM spectrum.status()") == "scheduled"


@pytest.fixture(scope="module")
def restored(place: Place, primary: Server) -> Server:
    """The primary as it was between two batches, from a base backup and the archive."""
    copy = place.keep(primary.base_backup("restored", "-X", "none"))
    with connect(primary) as db:
        assert process(db, 2).claimed == 2
        expected = contents(db)
        then = value(db, "SELECT clock_timestamp()::text")
        assert process(db, 2).claimed == 2
        assert value(db, "SELECT has_more IS NOT NULL FROM spectrum._refresh_some(10)")
        assert contents(db) != expected
        last = value(db, "SELECT pg_walfile_name(pg_switch_wal())")
    wait_until((place.base / "archive" / last).exists)
    run("touch", copy.data / "recovery.signal")
    copy.start(
        archive_mode="off", restore_command=f"cp {place.base}/archive/%f %p",
        recovery_target_time=then, recovery_target_action="promote",
    )  # fmt: skip
    with connect(copy) as db:
        wait_until(lambda: not value(db, "SELECT pg_is_in_recovery()"))
        assert contents(db) == expected
    return copy


@pytest.fixture(scope="module")
def upgraded(place: Place, restored: Server) -> Server:
    new = place.initdb("upgraded")
    if HAS_CRON:
        new.settings(**CRON)
    restored.stop()
    bindir, work = pg_config("--bindir"), place.base / "work"
    run("mkdir", work)
    run(bindir / "pg_upgrade", "-b", bindir, "-B", bindir, "-d", restored.data, "-D", new.data,
        "-U", "postgres", "-N", "-s", work, cwd=work)  # fmt: skip
    restored.start()
    return new.start()


def test_upgraded_it_goes_on_where_it_stood(restored: Server, upgraded: Server) -> None:
    with connect(restored) as db, connect(upgraded) as new:
        assert contents(new) == contents(db)
        assert differences(snapshot(db), snapshot(new)) == ""
        assert_finishes(new)


def test_restored_to_a_time_it_goes_on_where_it_stood(restored: Server) -> None:
    with connect(restored) as db:
        assert_finishes(db)


def test_facts_follow_to_another_server(primary: Server, promoted: Server) -> None:
    """By the statements of docs/backup.md; with months that are made later, and corrections."""
    statements = dict(STATEMENTS.findall(DOC.read_text()))
    with connect(promoted, "postgres") as other:
        other.execute("CREATE DATABASE reports")
    with connect(primary) as db, connect(promoted, "reports") as other:
        db.execute(statements["primary"])
        connection = primary.dsn("shop")
        subscribe = statements["other"].replace(
            "host=primary dbname=shop user=replicator", connection
        )
        assert connection in subscribe
        *tables, subscription = subscribe.split(";\n")[:-1]
        for statement in [*tables, subscription]:
            other.execute(statement)
        wait_until(lambda: followed(db) == followed(other))
        assert value(db, "SELECT to_regclass('warehouse.fact_events_2020_05')") is None
        insert(db, [
            event("visit", user_id="new month", occurred_at="2020-05-05T05:05:05Z"),
            event("visit", user_id="newcomer", account_id="new", event_id="corrected"),
        ])  # fmt: skip
        drain(db)
        db.execute(
            'UPDATE raw_events SET payload = payload || \'{"event_type": "buy"}\', '
            "status = 'pending' WHERE payload ->> 'event_id' = 'corrected'"
        )
        drain(db)
        db.execute("CALL spectrum.refresh_analytics()")
        wait_until(lambda: followed(db) == followed(other))
        assert value(
            other,
            "SELECT event_type FROM warehouse.fact_events JOIN warehouse.dim_event_types"
            " USING (event_type_key) JOIN warehouse.dim_users USING (user_key)"
            " WHERE user_id = 'newcomer'",
        ) == "buy"  # fmt: skip
        other.execute("DROP SUBSCRIPTION spectrum_facts")
        db.execute("DROP PUBLICATION spectrum_facts")
        assert value(db, "SELECT count(*) FROM pg_replication_slots") == 0


def followed(db: psycopg.Connection) -> list[tuple]:
    return [
        (table, *db.execute(f"SELECT count(*), md5(string_agg(t::text, ',' ORDER BY t::text))"
                            f" FROM warehouse.{table} AS t").fetchone())
        for table in ("fact_events", "dim_accounts", "dim_users", "dim_event_types",
                      "dim_geography")
    ]  # fmt: skip
