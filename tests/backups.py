"""What the tests of backups and upgrades share: a history that stands in the middle of everything,
and the proof that a copy of it goes on where it stood."""

from __future__ import annotations

import os
import re
import subprocess

import psycopg
import pytest
from conftest import run_sql
from pipeline import drain, event, facts, insert, prove, rows, statuses, value
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from servers import pg_config

DAYS = ("2024-01-30T10:00:00Z", "2024-02-02T11:00:00Z", "2024-03-03T12:00:00Z")
STANDING = ("conversion_funnels", "funnel_days", "retention_cohorts", "revenue_summary")
STANDING += ("active_users", "sessions_daily", "experiment_results")
USERS = 12
# What fill and half_done send: events, and of those that become facts the copies and the broken.
EVENTS, COPIES, FAILED = USERS * 4 + sum(n % 3 for n in range(USERS)) + 1 + 4, 1, 2
TABLES = """
    SELECT nspname, relname FROM pg_class JOIN pg_namespace AS schema ON schema.oid = relnamespace
    WHERE relkind = 'r'
        AND (relname = 'raw_events' OR nspname IN ('spectrum', 'warehouse', 'analytics'))
"""
DIGEST = "SELECT count(*), md5(string_agg(t::text, ',' ORDER BY t::text)) FROM ONLY {} AS t"


def need_pg_dump(program: str, dsn: str) -> None:
    """Skips the test where the pg_dump at hand is older than the server."""
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    client = int(re.findall(r"\d+", version.stdout)[0])
    ((server,),) = run_sql(dsn, "SELECT current_setting('server_version_num')::int / 10000")
    if client < server:
        pytest.skip(f"pg_dump {client} does not dump a server {server}, and no newer one is here")


def tool(name: str, dsn: str, *arguments: str) -> str:
    """Runs one of PostgreSQL's programs against a database; what it prints, complaints too."""
    bindir = os.environ.get("SPECTRUM_DUMP_BINDIR") or pg_config("--bindir")
    if name == "pg_dump":
        need_pg_dump(f"{bindir}/{name}", dsn)
    settings = conninfo_to_dict(dsn)
    env = os.environ | {"PGPASSWORD": str(settings.pop("password", ""))}
    done = subprocess.run(
        [
            f"{bindir}/{name}",
            "-d",
            " ".join(f"{k}={v}" for k, v in settings.items()),
            *arguments,
        ],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def fill(db: psycopg.Connection) -> None:
    """A little of everything: months, money, an experiment, a failure, a copy, a user's index."""
    db.execute("""SELECT spectrum.define_funnel('sale', '["visit", "buy"]')""")
    db.execute("SELECT spectrum.define_metric('bought', 'proportion', 'buy')")
    db.execute(
        """SELECT spectrum.define_experiment('button', '{"a": 0.5, "b": 0.5}', 'a', '["bought"]')"""
    )
    for number in range(USERS):
        who = {"user_id": f"u{number}", "account_id": f"acme {number % 2}"}
        variant = {"experiment": "button", "variant": "ab"[number % 2]}
        insert(db, [event("experiment_exposure", **who, properties=variant)])
        insert(db, [event("visit", **who, occurred_at=day) for day in DAYS])
        insert(db, [event("buy", **who, properties={"revenue": "9.99"})] * (number % 3))
    insert(db, [{"event_type": 1}, event("visit", event_id="x"), event("visit", event_id="x")])
    drain(db)
    db.execute("CREATE INDEX users_own ON warehouse.fact_events (account_key)")
    db.execute("CALL spectrum.refresh_analytics()")


def views(db: psycopg.Connection) -> dict[str, list[tuple]]:
    return {
        view: sorted(map(repr, rows(db, f"SELECT * FROM analytics.{view}"))) for view in STANDING
    }


def contents(db: psycopg.Connection) -> dict[str, tuple]:
    """Every table of Spectrum: how many rows, and a hash of them."""
    return {
        f"{schema}.{name}": db.execute(
            sql.SQL(DIGEST).format(sql.Identifier(schema, name))
        ).fetchone()
        for schema, name in rows(db, TABLES)
    }  # fmt: skip


def half_done(db: psycopg.Connection) -> None:
    """A history that stands in the middle of everything: facts counted and not, events that wait,
    failed, are set back; a report half built."""
    fill(db)
    db.execute("SELECT spectrum.define_retention('again', 'visit', 'visit')")
    value(db, "SELECT has_more FROM spectrum._refresh_some(1)")
    insert(db, [event("visit", user_id="late", event_id=f"l{number}") for number in range(3)])
    db.execute("CALL spectrum.process_batch(2)")
    db.execute("UPDATE raw_events SET status = 'pending' WHERE seq = 5")
    insert(db, [event("visit", user_id="waits", event_id="w"), {"event_type": 1}])


def assert_finishes(db: psycopg.Connection) -> None:
    """What half_done left is done, once; further events come in; and every proof holds."""
    db.execute("CALL spectrum.run()")
    assert rows(db, "SELECT last_run_error FROM spectrum.status()") == [(None,)]
    assert statuses(db) == {"done": EVENTS + COPIES, "failed": FAILED}
    assert facts(db) == EVENTS
    late = "SELECT count(*) FROM analytics.events WHERE user_id IN ('late', 'waits')"
    assert value(db, late) == 4
    insert(db, [event("visit", user_id="late", event_id="l1"), event("visit", user_id="late")])
    assert drain(db)[1:3] == (1, 1)
    db.execute("CALL spectrum.run()")
    assert value(db, late) == 5 and facts(db) == EVENTS + 1
    prove(db, views=True)
    assert value(db, "SELECT count(*) FROM spectrum.reports WHERE state <> 'served'") == 0
