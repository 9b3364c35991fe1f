"""The tick: what spectrum.run() does, leaves and survives, and how pg_cron comes to call it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest
from conftest import Connect, MakeRole, dsn_of, run_sql
from pipeline import drain, event, insert, prove, rows, statuses, value, wait_until
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict

LOG = """
    SELECT step, claimed, loaded, duplicates, failed, error_msg IS NOT NULL
    FROM spectrum.run_log WHERE run_id IS NOT NULL ORDER BY log_id
"""
SLOW = """
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep({seconds}); RETURN new; END $$;
    CREATE TRIGGER dawdle BEFORE INSERT ON warehouse.fact_events
    FOR EACH ROW EXECUTE FUNCTION dawdle()
"""
FAST = "DROP TRIGGER dawdle ON warehouse.fact_events; DROP FUNCTION dawdle()"


def run(db: psycopg.Connection) -> float:
    began = time.monotonic()
    db.execute("CALL spectrum.run()")
    return time.monotonic() - began


@contextmanager
def running(db: psycopg.Connection, look: psycopg.Connection) -> Iterator[list[Exception]]:
    """A run in the background, in the middle of a batch; then what it ended with, if an error."""
    problems: list[Exception] = []

    def work() -> None:
        try:
            run(db)
        except psycopg.Error as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_until(
            lambda: value(
                look, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            )
        )
        yield problems
    finally:
        thread.join(timeout=60)
        assert not thread.is_alive()


# What a run does ---------------------------------------------------------------------------------


def test_a_run_does_all_there_is_to_do(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('batch_size', '10')")
    months = value(db, "SELECT months_ready FROM spectrum.status()")
    db.execute("SELECT spectrum.configure('months_ahead', '7')")
    insert(db, [event(event_id=f"e{n}", user_id=f"u{n % 4}") for n in range(23)])
    insert(db, [event(event_id="e1"), event(geo=1)])
    run(db)
    assert rows(db, LOG) == [
        ("run", 25, 23, 1, 1, False),
        ("provision", None, None, None, None, False),
        ("process", 10, 10, 0, 0, False),
        ("process", 10, 10, 0, 0, False),
        ("process", 5, 3, 1, 1, False),
        ("refresh", None, None, None, None, False),
        ("upkeep", None, None, None, None, False),
    ]
    assert value(db, "SELECT bool_and(finished_at >= started_at) FROM spectrum.run_log")
    assert months < 7 == value(db, "SELECT months_ready FROM spectrum.status()")
    day = rows(db, "SELECT account_id, dau FROM analytics.active_users WHERE day = '2024-02-10'")
    assert day == [("*", 4)]
    assert rows(
        db, "SELECT pending, failed, last_run_error, lag_seconds < 60 FROM spectrum.status()"
    ) == [(0, 1, None, True)]
    prove(db, views=True)


def test_an_idle_run_counts_nothing_again(db: psycopg.Connection) -> None:
    insert(db, [event()])
    run(db)
    before = value(db, "SELECT max(log_id) FROM spectrum.run_log")
    as_of = value(db, "SELECT as_of FROM spectrum.status()")
    run(db)
    assert rows(
        db,
        "SELECT step, detail FROM spectrum.run_log WHERE log_id > %s AND step <> 'run'"
        " ORDER BY log_id",
        before,
    ) == [
        ("provision", "0 months made"),
        ("refresh", "0 facts counted"),
        (
            "upkeep",
            "0 run log rows and 0 pg_cron log rows deleted, 0 forgotten events found",
        ),
    ]
    # And still everything is counted up to now.
    assert value(db, "SELECT as_of FROM spectrum.status()") > as_of


def test_the_budget(db: psycopg.Connection) -> None:
    """No further batch begins once it is spent; what was done stays, and the run ends in order."""
    db.execute("SELECT spectrum.configure('batch_size', '1')")
    db.execute("SELECT spectrum.configure('run_budget', '1 second')")
    db.execute(SLOW.format(seconds=0.3))
    insert(db, [event(event_id=f"e{n}") for n in range(20)])
    assert run(db) < 10
    steps = [step for step, *_ in rows(db, LOG)]
    batches = steps.count("process")
    assert 1 <= batches <= 4
    assert steps == ["run", "provision", *["process"] * batches, "refresh", "upkeep"]
    assert statuses(db) == {"done": batches, "pending": 20 - batches}
    # As far as the views are concerned, the rest has not happened yet.
    oldest, as_of = rows(
        db, "SELECT min(received_at), (spectrum.status()).as_of FROM raw_events"
        " WHERE status = 'pending'",
    )[0]  # fmt: skip
    assert as_of == oldest


def test_each_step_is_committed_before_the_next(db: psycopg.Connection, connect: Connect) -> None:
    db.execute("SELECT spectrum.configure('batch_size', '1')")
    db.execute(SLOW.format(seconds="CASE new.properties ->> 'n' WHEN '2' THEN 3 ELSE 0 END"))
    insert(db, [event(event_id=f"e{n}", properties={"n": n}) for n in range(4)])
    look = connect()
    with running(db, look):
        assert statuses(look) == {"done": 2, "pending": 2}
        assert [step for step, *_ in rows(look, LOG)] == ["run", "provision", "process", "process"]
    assert statuses(look) == {"done": 4}


def test_a_second_run_returns_at_once_and_says_so(db: psycopg.Connection, connect: Connect) -> None:
    db.execute(SLOW.format(seconds=3))
    insert(db, [event()])
    other = connect()
    notices: list[str | None] = []
    other.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    with running(db, other) as problems:
        assert run(other) < 2
    assert notices == ["another spectrum.run() is under way: this one does nothing"]
    assert problems == []
    assert rows(
        db, "SELECT run_id IS NULL, detail FROM spectrum.run_log WHERE step = 'run' ORDER BY log_id"
    ) == [(False, None), (True, "another run was under way")]
    assert statuses(db) == {"done": 1}


def test_a_definition_left_open_holds_up_no_run(db: psycopg.Connection, connect: Connect) -> None:
    db.execute("SELECT spectrum.configure('lock_timeout', '10 ms')")
    idle = connect(autocommit=False)
    idle.execute("SELECT spectrum.define_feature('f', 'visit')")
    db.execute("SET statement_timeout = '20s'")
    insert(db, [event(user_id="bob")])
    db.execute("CALL spectrum.run()")
    assert value(db, "SELECT count(*) FROM warehouse.fact_events") == 1
    assert "55P03" in value(db, "SELECT last_run_error FROM spectrum.status()")
    idle.commit()
    db.execute("CALL spectrum.run()")
    assert value(db, "SELECT last_run_error FROM spectrum.status()") is None
    prove(db, views=True)


def test_inside_a_transaction_block_it_fails_before_it_does_anything(
    db: psycopg.Connection,
) -> None:
    insert(db, [event()])
    with pytest.raises(errors.InvalidTransactionTermination), db.transaction():
        run(db)
    assert statuses(db) == {"pending": 1}
    assert rows(db, "SELECT * FROM spectrum.run_log") == []


# What it survives --------------------------------------------------------------------------------


def test_an_error_in_a_step_is_logged_and_the_others_go_on(
    db: psycopg.Connection, connect: Connect
) -> None:
    db.execute(
        "UPDATE spectrum.report_kinds SET maintained_by = '_maintain_gone' WHERE kind = 'volume'"
    )
    db.execute("SELECT spectrum.configure('lock_timeout', '20 ms')")
    db.execute("SELECT spectrum.configure('months_ahead', '5')")
    blocker = connect(autocommit=False)
    blocker.execute("LOCK TABLE warehouse.fact_events IN SHARE UPDATE EXCLUSIVE MODE")
    insert(db, [event(occurred_at=None)])
    run(db)
    assert statuses(db) == {"done": 1}
    assert [(step, has_error) for step, *_, has_error in rows(db, LOG)] == [
        ("run", True),
        ("provision", True),
        ("process", False),
        ("refresh", True),
        ("upkeep", False),
    ]
    message = (
        "provision: canceling statement due to lock timeout (SQLSTATE 55P03);"
        " refresh: function analytics._maintain_gone(integer, bigint) does not exist"
        " (SQLSTATE 42883)"
    )
    assert value(db, "SELECT last_run_error FROM spectrum.status()") == message
    assert rows(db, "SELECT ok, message FROM spectrum.health() WHERE check_name = 'last run'") == [
        (False, message)
    ]

    blocker.rollback()
    db.execute(
        "UPDATE spectrum.report_kinds SET maintained_by = '_maintain_daily_events'"
        " WHERE kind = 'volume'"
    )
    run(db)
    assert value(db, "SELECT last_run_error FROM spectrum.status()") is None
    assert value(db, "SELECT ok FROM spectrum.health() WHERE check_name = 'last run'")
    prove(db, views=True)


def test_a_batch_that_fails_whole_leaves_its_events_waiting(db: psycopg.Connection) -> None:
    """Not an event's fault: say, somebody dropped what a trigger of his own needs."""
    db.execute(
        """
        CREATE FUNCTION break_down() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM FROM no_such_table; RETURN new; END $$;
        CREATE TRIGGER break_down BEFORE INSERT ON warehouse.fact_events
        FOR EACH ROW EXECUTE FUNCTION break_down()
        """
    )
    insert(db, [event(event_id=f"e{n}") for n in range(3)])
    run(db)
    assert statuses(db) == {"pending": 3}
    assert "no_such_table" in value(db, "SELECT last_run_error FROM spectrum.status()")
    db.execute("DROP TRIGGER break_down ON warehouse.fact_events")
    run(db)
    assert statuses(db) == {"done": 3}
    prove(db)


@pytest.mark.parametrize("end", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_run_that_is_ended_leaves_no_lock(
    db: psycopg.Connection, connect: Connect, end: str
) -> None:
    db.execute("SELECT spectrum.configure('batch_size', '1')")
    db.execute(SLOW.format(seconds="CASE new.properties ->> 'n' WHEN '1' THEN 60 ELSE 0 END"))
    insert(db, [event(event_id=f"e{n}", properties={"n": n}) for n in range(3)])
    worker = connect()
    with running(worker, db) as problems:
        db.execute(f"SELECT {end}(%s)", (worker.info.backend_pid,))
    assert [type(problem) for problem in problems] == [
        errors.QueryCanceled if end == "pg_cancel_backend" else errors.AdminShutdown
    ]
    assert statuses(db) == {"done": 1, "pending": 2}
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    wait_until(lambda: value(db, locks) == 0)

    db.execute(FAST)
    if end == "pg_cancel_backend":
        run(worker)
    else:
        run(db)
    assert statuses(db) == {"done": 3}
    # The one that was ended stays open in the log, and is not mistaken for the last.
    assert rows(
        db, "SELECT finished_at IS NULL FROM spectrum.run_log WHERE step = 'run' ORDER BY log_id"
    ) == [(True,), (False,)]
    assert value(db, "SELECT last_run_error FROM spectrum.status()") is None
    prove(db)


def test_old_rows_of_the_run_log_go(db: psycopg.Connection) -> None:
    db.execute(
        "INSERT INTO spectrum.run_log (step, started_at) VALUES"
        " ('process', now() - interval '31 days'), ('process', now() - interval '29 days')"
    )
    run(db)
    assert value(
        db, "SELECT count(*) FROM spectrum.run_log WHERE started_at < now() - interval '1 day'"
    ) == 1  # fmt: skip


def test_status_and_health_follow(db: psycopg.Connection) -> None:
    insert(db, [event(event_id=f"e{n}") for n in range(3)] + [event(geo=1)])
    db.execute("UPDATE raw_events SET received_at = now() - interval '1 hour' WHERE seq = 2")

    def state() -> tuple:
        return rows(
            db,
            "SELECT pending, processing, done, failed, to_retry, oldest_pending_seconds > 3599,"
            " last_batch_at IS NOT NULL FROM spectrum.status()",
        )[0]

    def unwell() -> set[str]:
        checks = rows(db, "SELECT check_name, ok FROM spectrum.health()")
        return {name for name, ok in checks if not ok}

    assert state() == (4, 0, 0, 0, 0, True, False)
    assert unwell() == {"backlog", "last run", "schedule"}
    assert drain(db).claimed == 4
    assert state() == (0, 0, 3, 1, 0, False, True)
    run(db)
    assert unwell() == {"failed events"}


# pg_cron -----------------------------------------------------------------------------------------

JOBS = "SELECT jobid, jobname, schedule, command, database, username, active FROM cron.job"
RUN = "CALL spectrum.run()"


def test_pg_cron_ticks(cron_dsn: str, cron_db: psycopg.Connection) -> None:
    """Scheduled, scheduled anew, ticked, cleaned up after, unscheduled: pg_cron knows minutes only,
    so all of it shares one."""
    db = cron_db
    database = conninfo_to_dict(cron_dsn)["dbname"]
    job = value(db, "SELECT spectrum.schedule()")
    assert rows(db, JOBS) == [
        (job, f"spectrum {database}", "*/5 * * * *", RUN, database, "postgres", True)
    ]
    for wrong in ("often", "61 * * * *", "", None):
        with pytest.raises(errors.InvalidParameterValue) as refused:
            db.execute("SELECT spectrum.schedule(%s)", (wrong,))
        assert "p_cron" in str(refused.value) and refused.value.diag.message_hint
    assert value(db, "SELECT spectrum.schedule('* * * * *')") == job
    assert value(db, "SELECT schedule FROM cron.job") == "* * * * *"
    assert rows(db, "SELECT cron, cron_schedule, cron_last_status FROM spectrum.status()") == [
        ("scheduled", "* * * * *", None)
    ]

    # Of pg_cron's own log the tick deletes what is old and about Spectrum.
    db.execute(
        """
        INSERT INTO cron.job_run_details
            (jobid, runid, database, username, command, status, end_time)
        VALUES (%(job)s, -1, %(db)s, 'postgres', %(run)s, 'succeeded', now() - interval '8 days'),
            (%(job)s, -2, %(db)s, 'postgres', %(run)s, 'succeeded', now() - interval '6 days'),
            (-9, -3, %(db)s, 'postgres', %(run)s, 'succeeded', now() - interval '8 days'),
            (-9, -4, %(db)s, 'postgres', 'VACUUM', 'succeeded', now() - interval '8 days')
        """,
        {"job": job, "db": database, "run": RUN},
    )
    insert(db, [event()])
    wait_until(
        lambda: value(
            db, "SELECT count(*) FROM cron.job_run_details WHERE status = 'succeeded' AND runid > 0"
        ),
        timeout=120,
        every=0.5,
    )
    assert statuses(db) == {"done": 1}
    assert [step for step, *_ in rows(db, LOG)][:5] == [
        "run", "provision", "process", "refresh", "upkeep"
    ]  # fmt: skip
    kept = rows(db, "SELECT runid FROM cron.job_run_details WHERE runid < 0 ORDER BY 1")
    assert kept == [(-4,), (-2,)]
    assert value(db, "SELECT ok FROM spectrum.health() WHERE check_name = 'schedule'")

    db.execute("SELECT cron.alter_job(%s, active => false)", (job,))
    assert value(db, "SELECT cron FROM spectrum.status()") == "scheduled, but switched off"
    assert value(db, "SELECT spectrum.unschedule()") is True
    assert value(db, "SELECT spectrum.unschedule()") is False
    assert rows(db, JOBS) == []
    assert value(db, "SELECT cron FROM spectrum.status()") == "not scheduled"


def test_in_another_database_the_error_holds_the_statement_that_helps(
    db: psycopg.Connection, dsn: str, cron_db: psycopg.Connection
) -> None:
    name = conninfo_to_dict(dsn)["dbname"]
    for call in ("schedule", "unschedule"):
        with pytest.raises(errors.ObjectNotInPrerequisiteState) as refused:
            db.execute(f"SELECT spectrum.{call}()")
    diagnosis = refused.value.diag
    assert diagnosis.message_primary == f"pg_cron is not in database {name}"
    assert diagnosis.message_detail == "In this cluster pg_cron lives in database postgres."
    assert diagnosis.message_hint
    cron_db.execute(diagnosis.message_hint.partition(": ")[2])
    assert rows(cron_db, JOBS)[0][1:] == (
        f"spectrum {name}", "*/5 * * * *", RUN, name, "postgres", True
    )  # fmt: skip
    assert value(db, "SELECT cron FROM spectrum.status()") == (
        "pg_cron is not in this database, it lives in postgres"
    )
    # All the rest works.
    insert(db, [event()])
    run(db)
    assert statuses(db) == {"done": 1}


@pytest.fixture
def cron_owner(
    cron_dsn: str, make_role: MakeRole, connect: Connect
) -> Iterator[psycopg.Connection]:
    """Spectrum in pg_cron's database, made by a role that is no superuser and may not use it."""
    role = make_role("cron_owner")
    database = conninfo_to_dict(cron_dsn)["dbname"]
    run_sql(
        cron_dsn,
        "DROP EXTENSION spectrum CASCADE",
        "DROP SCHEMA IF EXISTS analytics, warehouse, spectrum, public CASCADE",
        f"CREATE SCHEMA public AUTHORIZATION {role}",
        f"GRANT CREATE ON DATABASE {database} TO {role}",
    )
    try:
        owner = connect(dsn_of(database, role))
        owner.execute("CREATE EXTENSION spectrum")
        yield owner
    finally:
        run_sql(
            cron_dsn,
            f"SELECT cron.unschedule(jobid) FROM cron.job WHERE username = '{role}'",
            "DROP EXTENSION IF EXISTS spectrum CASCADE",
            f"DROP OWNED BY {role} CASCADE",
        )


def test_an_owner_who_is_no_superuser(cron_owner: psycopg.Connection, cron_dsn: str) -> None:
    db, role = cron_owner, cron_owner.info.user
    for call in ("schedule", "unschedule"):
        with pytest.raises(errors.InsufficientPrivilege) as refused:
            db.execute(f"SELECT spectrum.{call}()")
    assert refused.value.diag.message_primary == f"role {role} may not use pg_cron"
    hint = refused.value.diag.message_hint
    assert hint == f"As a superuser: GRANT USAGE ON SCHEMA cron TO {role};"
    state = value(db, "SELECT cron FROM spectrum.status()")
    assert state == f"role {role} may not look into pg_cron"
    insert(db, [event()])
    run(db)
    assert statuses(db) == {"done": 1}
    assert value(db, "SELECT last_run_error FROM spectrum.status()") is None

    run_sql(cron_dsn, hint.partition(": ")[2])
    job = value(db, "SELECT spectrum.schedule('7 * * * *')")
    assert rows(db, "SELECT jobid, schedule, username FROM cron.job") == [(job, "7 * * * *", role)]
    assert value(db, "SELECT cron FROM spectrum.status()") == "scheduled"
    run_sql(
        cron_dsn,
        "INSERT INTO cron.job_run_details (jobid, runid, database, username, command, status,"
        f" end_time) SELECT {job}, -1, current_database(), '{role}', '{RUN}', 'succeeded',"
        " now() - interval '8 days'",
    )
    run(db)
    assert value(db, "SELECT last_run_error FROM spectrum.status()") is None
    assert run_sql(cron_dsn, "SELECT count(*) FROM cron.job_run_details WHERE runid = -1") == [(0,)]
    assert value(db, "SELECT spectrum.unschedule()") is True
    prove(db)


def test_an_owner_elsewhere_learns_what_to_ask_for(owner_db: psycopg.Connection) -> None:
    with pytest.raises(errors.ObjectNotInPrerequisiteState) as refused:
        owner_db.execute("SELECT spectrum.schedule()")
    hint = refused.value.diag.message_hint or ""
    name, role = owner_db.info.dbname, owner_db.info.user
    assert (
        f"SELECT cron.schedule_in_database('spectrum {name}', '*/5 * * * *',"
        f" '{RUN}', '{name}', '{role}');" in hint
    )
    assert owner_db.execute("CALL spectrum.run()") and timedelta(0) <= value(
        owner_db, "SELECT finished_at - started_at FROM spectrum.run_log WHERE step = 'run'"
    )
