"""pg_cron down, switched off, late or out of workers; transactions left open: status() and health()
say so, with what to do. On a server of its own, whose launcher may be ended."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from conftest import Connect
from faults.server import Server
from pipeline import event, insert, rows, statuses, value, wait_until

LAUNCHER = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_cron launcher'"
# What pg_cron writes about a run, which no test has the minutes to wait for.
DETAILS = """
    INSERT INTO cron.job_run_details
        (jobid, runid, database, username, command, status, return_message, start_time, end_time)
    SELECT jobid, %s, database, username, command, %s, %s, now() - %s::interval,
        now() - %s::interval
    FROM cron.job
"""
NO_WORKER = "could not start background process; more details may be available in the server log"


@pytest.fixture
def cron(private_server: Server) -> Iterator[psycopg.Connection]:
    """The database that pg_cron lives in, with Spectrum scheduled in it."""
    if "cron.use_background_workers" not in private_server.settings:
        pytest.skip("this PostgreSQL has no pg_cron")
    with private_server.session() as db:
        db.execute("CREATE EXTENSION pg_cron")
        db.execute("CREATE EXTENSION spectrum")
        db.execute("SELECT spectrum.schedule('*/5 * * * *')")
        yield db
    with private_server.session() as db:  # another one: the server may have been restarted
        db.execute("SELECT cron.unschedule(jobid) FROM cron.job")
        db.execute("SET client_min_messages = warning")
        db.execute("DROP EXTENSION spectrum CASCADE")
        db.execute("DROP TABLE raw_events")
        db.execute("DROP EXTENSION pg_cron")


def schedule_check(db: psycopg.Connection) -> tuple[bool, str, str]:
    ((ok, message, what_to_do),) = rows(
        db, "SELECT ok, message, what_to_do FROM spectrum.health() WHERE check_name = 'schedule'"
    )
    return ok, message, what_to_do


def details(db: psycopg.Connection, run: int, status: str, message: str, ago: str) -> None:
    db.execute(DETAILS, (run, status, message, ago, ago))


def test_what_pg_cron_says(cron: psycopg.Connection) -> None:
    db = cron
    assert schedule_check(db)[:2] == (True, "scheduled */5 * * * *")
    details(db, 1, "succeeded", "CALL", "4 minutes")
    assert schedule_check(db)[:2] == (True, "scheduled */5 * * * *, last run succeeded")

    details(db, 2, "failed", f"{NO_WORKER}\n", "1 minute")
    ok, message, advice = schedule_check(db)
    assert not ok and message == f"scheduled */5 * * * *, last run failed: {NO_WORKER}"
    assert "raise max_worker_processes (now 20)" in advice
    assert value(db, "SELECT cron_last_message FROM spectrum.status()") == NO_WORKER

    # Other jobs have all of its places: this one waits, and pg_cron writes nothing.
    db.execute("DELETE FROM cron.job_run_details")
    details(db, 3, "succeeded", "CALL", "17 minutes")
    ok, message, advice = schedule_check(db)
    assert not ok and message.startswith("scheduled, but overdue: nothing began since ")
    assert "pg_cron runs 5 jobs at once (cron.max_running_jobs)" in advice
    assert rows(db, advice.partition(": ")[2].partition("; and")[0]) == []
    # By its own run log where pg_cron keeps none; and a run that takes long is not late.
    db.execute("CALL spectrum.run()")
    assert schedule_check(db)[0]
    db.execute("UPDATE spectrum.run_log SET started_at = now() - interval '17 minutes'")
    assert not schedule_check(db)[0]
    details(db, 4, "running", "", "17 minutes")
    assert schedule_check(db)[0]
    db.execute("DELETE FROM cron.job_run_details WHERE status = 'running'")
    db.execute("SELECT spectrum.schedule('0 4 * * *')")
    assert schedule_check(db)[0]

    db.execute("SELECT cron.alter_job(jobid, active => false) FROM cron.job")
    ok, message, advice = schedule_check(db)
    assert not ok and message.startswith("scheduled, but switched off 0 4 * * *")
    db.execute(advice)
    assert schedule_check(db)[0]


def test_pg_cron_down(cron: psycopg.Connection, private_server: Server) -> None:
    # Its launcher ended by hand does not come back, but with a restart.
    cron.execute(f"SELECT pg_terminate_backend(({LAUNCHER}))")
    wait_until(lambda: rows(cron, LAUNCHER) == [])
    down = "scheduled, but pg_cron does not run"
    assert value(cron, "SELECT cron FROM spectrum.status()") == down
    ok, message, advice = schedule_check(cron)
    assert not ok and message == f"{down} */5 * * * *" and "restart the server" in advice
    private_server.stop()
    private_server.start(shared_preload_libraries="")
    with private_server.session() as db:
        ok, message, advice = schedule_check(db)
        assert not ok and message.startswith(down)
        assert "add pg_cron to shared_preload_libraries" in advice
    private_server.stop()
    private_server.start()
    with private_server.session() as db:
        wait_until(lambda: rows(db, LAUNCHER))
        assert schedule_check(db)[0]


PAUSES = {
    "* * * * *": "00:01:00",
    "*/5 * * * *": "00:05:00",
    " 7  * * * * ": "01:00:00",
    "0 */6 * * *": "06:00:00",
    "0 4 * * *": "1 day",
    "0 4 * * mon": "7 days",
    "0 4 1 * *": "31 days",
    "0 4 1 1 *": "366 days",
    "30 seconds": "00:00:30",
    "@daily": "1 day",
    "@reboot": None,
}


def test_the_longest_pause(db: psycopg.Connection) -> None:
    query = "SELECT spectrum._longest_pause(%s)::text"
    assert {schedule: value(db, query, schedule) for schedule in PAUSES} == PAUSES


def test_idle_transactions_stop_nothing_and_are_named(
    db: psycopg.Connection, connect: Connect
) -> None:
    """One has read everything, one has inserted, one holds a row that waits, and none goes on."""
    idle_check = "SELECT ok, message, what_to_do FROM spectrum.health()" \
        " WHERE check_name = 'idle transactions'"  # fmt: skip
    db.execute("SELECT spectrum.configure('max_idle', '1 ms')")
    insert(db, [event(event_id=f"e{n}", user_id=f"u{n}") for n in range(10)])
    assert rows(db, idle_check)[0][:2] == (True, "none")
    reader, writer, holder = (
        connect(autocommit=False, application_name=name) for name in ("reader", "writer", "holder")
    )
    reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    for table in ("raw_events", "analytics.events", "analytics.active_users", "spectrum.news"):
        reader.execute(f"SELECT count(*) FROM {table}")
    insert(writer, [event(event_id="open", user_id="u1")])
    holder.execute("SELECT FROM raw_events WHERE seq = 3 FOR UPDATE")

    # All but that row goes on: months are made, views follow, later events too.
    for month in ("2024-03", "2024-05"):
        insert(db, [event(event_id=month, user_id="u1", occurred_at=f"{month}-01T00:00:00Z")])
        db.execute("CALL spectrum.run()")
    assert value(db, "SELECT last_run_error FROM spectrum.status()") is None
    assert statuses(db) == {"done": 11, "pending": 1}
    counted = "SELECT sum(events) FROM analytics.daily_events WHERE account_id = '*'"
    assert value(db, counted) == 11

    named = value(db, "SELECT idle_transactions FROM spectrum.status()").split("; ")
    assert all(" of postgres (" in who and "idle in transaction since " in who for who in named)
    assert {text.split("(")[1].split(")")[0] for text in named} == {"reader", "writer", "holder"}
    ok, message, advice = rows(db, idle_check)[0]
    assert not ok and message.split("; ") == named
    assert advice.count("pg_terminate_backend") == 3
    for session in (reader, writer, holder):
        assert f"SELECT pg_terminate_backend({session.info.backend_pid});" in advice
        session.rollback()
    assert rows(db, idle_check)[0][:2] == (True, "none")
    db.execute("CALL spectrum.run()")
    assert statuses(db) == {"done": 12}
