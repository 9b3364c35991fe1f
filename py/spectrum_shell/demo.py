"""``spectrum demo``: from an empty database to the four main views, with pg_cron doing the work.

Every step looks first at what is there, so an interrupted demo goes on where it stopped and a
second one changes nothing.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any

import click
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.json import Jsonb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spectrum_shell import demo_show, operations
from spectrum_shell.connect import open_connection, staging_table
from spectrum_shell.demo_data import EXPERIMENT, FUNNEL
from spectrum_shell.demo_delivery import Row, launch_id, make_month
from spectrum_shell.errors import CannotConnect, Refused, SpectrumError

DATABASE = "spectrum"
EVERY_MINUTE = "* * * * *"
EVERY_FIVE_MINUTES = "*/5 * * * *"
# The first rows go in as an application sends them, one INSERT each; the rest by COPY.
INSERTED_ROWS = 200
COPIED_ROWS = 5000
# A tick comes every minute; two that are missed are no delay any more.
PATIENCE_SECONDS = 130
POLL_SECONDS = 0.5


@click.command()
@click.option(
    "--dsn",
    metavar="DSN",
    help="Connection string or URI; else SPECTRUM_DSN, else the PG* variables count."
    f' Where they name no database it is "{DATABASE}", made if it is missing.',
)
@click.option(
    "--until",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="DATE",
    help="Last day of the month of events; else yesterday (UTC).",
)
@click.option(
    "--no-cron",
    is_flag=True,
    help="Do without pg_cron: call spectrum.run() from here instead, and schedule nothing.",
)
@click.pass_context
def demo(ctx: click.Context, dsn: str | None, until: datetime | None, no_cron: bool) -> None:
    """Load a made-up month of a small SaaS, let pg_cron process it, and show the views."""
    console = Console()
    with open_demo_database(dsn or (ctx.obj or {}).get("dsn")) as connection:
        run_demo(connection, console, until.date() if until else None, with_cron=not no_cron)


def run_demo(
    connection: psycopg.Connection, console: Console, until: date | None, with_cron: bool
) -> None:
    prepare_database(connection, console, with_cron)
    with console.status("making a month of events"):
        month = make_month(month_to_load(connection, until))
    first, last = month.until - timedelta(days=29), month.until
    console.print(f"Month: {first:%d %b} to {last:%d %b %Y}, {month.made.rows:,} rows")
    if count_missing(connection, month.rows):
        define(connection)
        new = load(connection, console, month.rows)
        console.print(f"Loaded: {new:,} rows into raw_events, the first ones by INSERT, then COPY")
    else:
        console.print("Loaded: every row of it was there already, so nothing changes")
    process(connection, console, with_cron)

    console.print()
    demo_show.show_status(console, operations.status(connection))
    demo_show.show_comparison(console, demo_show.compare(connection, month.made))
    demo_show.show_funnel(console, connection)
    demo_show.show_retention(console, connection)
    demo_show.show_revenue(console, connection)
    demo_show.show_experiment(console, connection)
    demo_show.show_way_on(console, connection)


# The database ------------------------------------------------------------------------------------


def open_demo_database(dsn: str | None) -> psycopg.Connection:
    """The database that is named; where none is, `spectrum`, made if it is missing."""
    dsn = dsn or os.environ.get("SPECTRUM_DSN") or ""
    if os.environ.get("PGDATABASE") or "dbname" in conninfo_to_dict(dsn):
        return open_connection(dsn)
    wanted = make_conninfo(dsn, dbname=DATABASE)
    try:
        return open_connection(wanted)
    except CannotConnect as error:
        try:
            make_database(make_conninfo(dsn, dbname="postgres"))
        except SpectrumError:
            raise error from None
    return open_connection(wanted)


def make_database(dsn: str) -> None:
    with open_connection(dsn) as connection:
        statement = "CREATE DATABASE {} ENCODING 'UTF8' TEMPLATE template0"
        # If it is there already, the failure to connect had another cause: it comes up again.
        with suppress(psycopg.errors.DuplicateDatabase):
            connection.execute(sql.SQL(statement).format(sql.Identifier(DATABASE)))


def prepare_database(connection: psycopg.Connection, console: Console, with_cron: bool) -> None:
    if with_cron and connection.info.dbname == home_of_cron(connection):
        # Who may not make it is told by spectrum.schedule() who can.
        with suppress(psycopg.errors.InsufficientPrivilege):
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_cron")
    console.print(operations.install(connection, None))


def home_of_cron(connection: psycopg.Connection) -> str | None:
    """The database that pg_cron lives in, as far as this role may know."""
    try:
        row = connection.execute("SELECT current_setting('cron.database_name', true)").fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return None
    return row[0] if row else None


# The month ---------------------------------------------------------------------------------------


def month_to_load(connection: psycopg.Connection, until: date | None) -> date:
    """The month that is there, or else the one asked for, or else the one that just ended."""
    row = connection.execute(
        sql.SQL("SELECT payload #>> '{{properties,until}}' FROM {} WHERE id = %s").format(
            staging_table(connection)
        ),
        (launch_id(),),
    ).fetchone()
    if row is None:
        return until or datetime.now(UTC).date() - timedelta(days=1)
    present = date.fromisoformat(row[0])
    if until not in (None, present):
        raise Refused(
            f'database "{connection.info.dbname}" holds the demo\'s month until {present} already',
            "take that date, or another database: spectrum demo --dsn 'dbname=...'",
        )
    return present


def count_missing(connection: psycopg.Connection, rows: Sequence[Row]) -> int:
    return sum(len(chunk) for chunk in missing_chunks(connection, rows))


def missing_chunks(connection: psycopg.Connection, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows that are not in raw_events yet, some thousand at a time."""
    statement = sql.SQL("SELECT id FROM {} WHERE id = ANY(%s)").format(staging_table(connection))
    for start in range(0, len(rows), COPIED_ROWS):
        chunk = rows[start : start + COPIED_ROWS]
        found = connection.execute(statement, ([row.id for row in chunk],))
        present = {row[0] for row in found}
        yield [row for row in chunk if row.id not in present]


def define(connection: psycopg.Connection) -> None:
    """What the standing views show, before the first event: definitions may come first."""
    connection.execute("SELECT spectrum.define_funnel('sign_up', %s)", (Jsonb(FUNNEL),))
    connection.execute(
        "SELECT spectrum.define_funnel('teamwork', %s, p_window => '7 days')",
        (
            Jsonb(
                [
                    {"event": "project_created"},
                    {"event": "feature_used", "where": {"feature": "board"}},
                    {"event": "feature_used", "where": {"feature": "comments"}},
                ]
            ),
        ),
    )
    connection.execute(
        "SELECT spectrum.define_retention('use_after_signup', 'signup', 'feature_used', 'day')"
    )
    connection.execute(
        "SELECT spectrum.define_metric('project_created', 'proportion', 'project_created'),"
        " spectrum.define_metric('purchase', 'proportion', 'purchase'),"
        " spectrum.define_metric('revenue_per_user', 'mean', 'purchase', 'revenue')"
    )
    connection.execute(
        "SELECT spectrum.define_experiment(%s, %s, 'control', %s)",
        (
            EXPERIMENT,
            Jsonb({"control": 0.5, "treatment": 0.5}),
            Jsonb(["project_created", "purchase", "revenue_per_user"]),
        ),
    )


def load(connection: psycopg.Connection, console: Console, rows: Sequence[Row]) -> int:
    """Each chunk is one transaction; rows that are there already are left out."""
    table = staging_table(connection)
    insert = sql.SQL("INSERT INTO {} (id, payload) VALUES (%s, %s)").format(table)
    copy_in = sql.SQL("COPY {} (id, payload) FROM STDIN").format(table)
    new = 0
    with new_progress(console) as progress:
        task = progress.add_task("loading into raw_events", total=len(rows))
        for missing in missing_chunks(connection, rows[:INSERTED_ROWS]):
            for row in missing:
                connection.execute(insert, (row.id, row.payload))
                progress.advance(task)
            new += len(missing)
        for missing in missing_chunks(connection, rows[INSERTED_ROWS:]):
            with connection.transaction(), connection.cursor().copy(copy_in) as copy:
                for row in missing:
                    copy.write_row((row.id, row.payload))
            new += len(missing)
            progress.advance(task, len(missing))
        progress.update(task, completed=len(rows))
    return new


# Processing --------------------------------------------------------------------------------------


def process(connection: psycopg.Connection, console: Console, with_cron: bool) -> None:
    state = operations.status(connection)
    if not with_cron:
        if is_behind(state):
            with console.status("spectrum.run()"):
                connection.execute("CALL spectrum.run()")
        return
    if is_behind(state):
        watch_pg_cron(connection, console, state)
    operations.schedule(connection, EVERY_FIVE_MINUTES)
    console.print("Scheduled: pg_cron calls spectrum.run() every five minutes from now on")


def is_behind(state: dict[str, Any]) -> bool:
    """Events wait, or the views wait for what is processed."""
    batch, refresh = state["last_batch_at"], state["last_refresh_at"]
    return (
        state["pending"] + state["uncounted"] > 0
        or refresh is None
        or (batch is not None and refresh < batch)
    )


def watch_pg_cron(connection: psycopg.Connection, console: Console, before: dict[str, Any]) -> None:
    """Puts spectrum.run() on every minute and shows what it does, until all is processed.

    Raises SpectrumError where nothing moves any more. In the end, whatever it was, the schedule
    is every five minutes.
    """
    operations.schedule(connection, EVERY_MINUTE)
    console.print("Scheduled: pg_cron calls spectrum.run() every minute, for now")
    since = server_time(connection)
    last_log_id = newest_log_id(connection)
    moved = time.monotonic()
    done_before = before["done"] + before["failed"]
    try:
        with new_progress(console) as progress:
            task = progress.add_task("", total=before["pending"])
            while True:
                state = operations.status(connection)
                lines = read_run_log(connection, last_log_id)
                for line in lines:
                    progress.console.print(log_line(line), highlight=False)
                    last_log_id = line["log_id"]
                    moved = time.monotonic()
                done = state["done"] + state["failed"] - done_before
                progress.update(task, completed=done, description=describe(state, since))
                if state["last_run_at"] and state["last_run_at"] > since and not is_behind(state):
                    break
                complain_if_stuck(state, since, time.monotonic() - moved)
                time.sleep(POLL_SECONDS)
    finally:
        operations.schedule(connection, EVERY_FIVE_MINUTES)


def complain_if_stuck(state: dict[str, Any], since: datetime, still_for: float) -> None:
    if state["last_run_error"] and state["last_run_at"] > since:
        raise SpectrumError(
            f"spectrum.run() failed: {state['last_run_error']}",
            "look at: SELECT * FROM spectrum.run_log ORDER BY log_id DESC LIMIT 10",
        )
    ended = state["cron_last_end"]
    if state["cron_last_status"] == "failed" and ended and ended > since:
        raise SpectrumError(
            "pg_cron started the job and it failed",
            "look at: SELECT status, return_message FROM cron.job_run_details"
            " ORDER BY runid DESC LIMIT 5; and at the server's log",
        )
    if still_for > PATIENCE_SECONDS:
        raise SpectrumError(
            f"pg_cron did nothing for {PATIENCE_SECONDS} seconds",
            "look at: SELECT * FROM cron.job_run_details ORDER BY runid DESC LIMIT 5; at the"
            " server's log for 'pg_cron scheduler'; and whether cron.use_background_workers is on"
            " and max_worker_processes leaves room; or run: spectrum demo --no-cron",
        )


def server_time(connection: psycopg.Connection) -> datetime:
    return connection.execute("SELECT clock_timestamp()").fetchone()[0]


def newest_log_id(connection: psycopg.Connection) -> int:
    query = "SELECT coalesce(max(log_id), 0) FROM analytics.pipeline"
    return connection.execute(query).fetchone()[0]


def read_run_log(connection: psycopg.Connection, after: int) -> list[dict[str, Any]]:
    return demo_show.read(
        connection,
        "SELECT * FROM analytics.pipeline"
        " WHERE log_id > %s AND finished_at IS NOT NULL ORDER BY log_id",
        after,
    )


def describe(state: dict[str, Any], since: datetime) -> str:
    if state["pending"] and not (state["last_batch_at"] and state["last_batch_at"] > since):
        return f"next tick of pg_cron in {60 - datetime.now(UTC).second:2} s"
    return "processing" if state["pending"] else "refreshing the views"


def log_line(line: dict[str, Any]) -> str:
    text = f"  {line['finished_at']:%H:%M:%S}  {line['step']:<9}  {line['seconds']:6.2f} s  "
    if line["step"] == "process":
        text += (
            f"{line['claimed']:,} claimed: {line['loaded']:,} loaded,"
            f" {line['duplicates']:,} repeats, {line['failed']:,} failed"
        )
    else:
        text += line["detail"] or ""
    return text + ("  (an error: see spectrum.run_log)" if line["has_error"] else "")


def new_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
