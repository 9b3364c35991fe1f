"""The command ``spectrum``: options in, calls out. What a command does lives in its module."""

import logging
import os
import sys
import traceback
from typing import Any

import click
import psycopg

from spectrum_shell import __version__, operations, pgregress, render
from spectrum_shell.client import Client
from spectrum_shell.connect import open_connection, require_schema, staging_table
from spectrum_shell.demo import demo
from spectrum_shell.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    Interrupted,
    Usage,
    explain,
    format_error,
    one_line,
)
from spectrum_shell.load import FORMATS, LoadOptions, LoadResult, find_format, load_file
from spectrum_shell.mapping import parse_mapping
from spectrum_shell.meter import Meter, spinner
from spectrum_shell.options import parse_delimiter, parse_payload, parse_time

EXIT_CODES = """\b
Exit codes:
  0    done
  1    refused: a file, a value or a definition; or, for test, a test failed
  2    usage: the command was given something that it does not take
  3    the database: no connection, a connection lost, Spectrum not installed,
       a right missing, an error of the server
  70   a fault of this command itself
  130  interrupted with Ctrl-C; what was under way is rolled back
  141  whoever read the output has gone

Errors are one line on standard error, with the SQLSTATE where there is one."""


class _Commands(click.Group):
    """Commands whose every error ends as one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()
            return value
        except click.exceptions.Exit:
            raise
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "spectrum"
            _say(f"spectrum: {one_line(error.format_message())} - see {command} --help")
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            # Else Python meets the same error again when it flushes standard output at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_BROKEN_PIPE)
        except KeyboardInterrupt:
            _say("spectrum: interrupted; what was under way is rolled back")
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            known = explain(error)
            _say(format_error(known))
            ctx.exit(known.exit_code)


_dsn_option = click.option(
    "--dsn",
    metavar="DSN",
    help="Connection string or URI; else SPECTRUM_DSN, else the PG* variables count.",
)


@click.group(
    cls=_Commands,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--debug", is_flag=True, help="Show Python's traceback with an error.")
@click.version_option(__version__, prog_name="spectrum")
def cli(debug: bool) -> None:
    """Product analytics inside PostgreSQL: install Spectrum, feed it, look after it.

    The numbers themselves are read with SQL, from the views in schema analytics.
    """
    if not debug:
        # What it warns of reaches us as an exception, too.
        logging.getLogger("psycopg").setLevel(logging.CRITICAL)


@cli.command()
@_dsn_option
@click.option(
    "--schema",
    metavar="NAME",
    help="Where raw_events goes; else the first of the"
    " search_path, usually public. The schema must exist.",
)
def install(dsn: str | None, schema: str | None) -> None:
    """Create the extension in the database, if it is not there."""
    with _connect(dsn) as connection:
        click.echo(operations.install(connection, schema))


@cli.command()
@_dsn_option
@click.option(
    "--cron",
    default="*/5 * * * *",
    show_default=True,
    metavar="'M H D M W'",
    help="How often, in pg_cron's notation.",
)
def schedule(dsn: str | None, cron: str) -> None:
    """Let pg_cron process and refresh regularly."""
    with _connect(dsn) as connection:
        require_schema(connection)
        job = operations.schedule(connection, cron)
    click.echo(f"Scheduled: pg_cron job {job}, {cron}")


@cli.command()
@_dsn_option
def unschedule(dsn: str | None) -> None:
    """Take Spectrum off pg_cron."""
    with _connect(dsn) as connection:
        require_schema(connection)
        found = operations.unschedule(connection)
    click.echo("Unscheduled" if found else "Nothing was scheduled")


@cli.command()
@_dsn_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object: status, health. Times in ISO 8601, intervals in seconds.",
)
@click.option("--check", is_flag=True, help="Exit with 1 if a health check is not ok.")
def status(dsn: str | None, as_json: bool, check: bool) -> None:
    """Show what is pending, how far behind it is, and what is wrong."""
    with _connect(dsn) as connection:
        require_schema(connection)
        state = operations.status(connection)
        checks = operations.health(connection)
    if as_json:
        render.print_json({"status": state, "health": checks})
    else:
        render.print_record("Status", state)
        render.print_rows(
            "Health", [row | {"what_to_do": ""} if row["ok"] else row for row in checks]
        )
    if check and not all(row["ok"] for row in checks):
        click.get_current_context().exit(EXIT_REFUSED)


@cli.command()
@_dsn_option
@click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True),
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Else by the ending: .ndjson .jsonl .json, .csv .tsv, each also .gz.",
)
@click.option(
    "--map",
    "pairs",
    metavar="COLUMN=FIELD",
    multiple=True,
    help="Which column or field is which payload field: event=event_type,"
    " land=geo.country, price=properties.revenue. Repeatable.",
)
@click.option(
    "--delimiter",
    metavar="CHAR",
    callback=parse_delimiter,
    help="Between CSV cells; else a comma, a tab for .tsv. 'tab' is one too.",
)
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Leave out lines that are no events, and name them on standard error.",
)
@click.option("--process", is_flag=True, help="Then process what is pending.")
@click.option("--refresh", is_flag=True, help="Then bring the analytics views up to date.")
def load(
    dsn: str | None,
    files: tuple[str, ...],
    form: str | None,
    pairs: tuple[str, ...],
    delimiter: str | None,
    skip_bad: bool,
    process: bool,
    refresh: bool,
) -> None:
    """Copy events from files into raw_events. FILE - is standard input.

    Newline-delimited JSON, or CSV with a header, plain or gzip. Each file is one transaction:
    all of it or nothing. CSV columns that are no payload fields become properties, as text.

    A line without an event_id gets one derived from what it says and how often its file said it
    before, so loading a file again changes no number. Equal lines of two files are therefore the
    same event: let lines carry a time, or ids of their own.
    """
    options = LoadOptions(form, delimiter, parse_mapping(pairs), skip_bad)
    if files.count("-") > 1:
        raise Usage("standard input can be read once only")
    for path in files:
        find_format(path, form)
    with _connect(dsn) as connection:
        table = staging_table(connection)
        done: list[LoadResult] = []
        for path in files:
            try:
                with Meter() as meter:
                    done.append(load_file(connection, table, path, options, meter.open))
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted: nothing of {path} was loaded, it is rolled back;"
                    f" {len(done)} of {len(files)} files are loaded",
                    "loading them again changes nothing",
                ) from None
            _report_load(done[-1])
        if process:
            _process(connection)
        if refresh:
            operations.refresh(connection)
            click.echo("analytics views are up to date")


def _report_load(result: LoadResult) -> None:
    for bad in result.first_bad_lines:
        _say(f"spectrum: {result.name}, line {bad.number}: {one_line(bad.reason)}; left out")
    if result.bad_lines > len(result.first_bad_lines):
        _say(f"spectrum: {result.name}: {result.bad_lines:,} bad lines in all were left out")
    for source in result.unused_sources:
        _say(f'spectrum: {result.name}: no line has the field "{source}" that --map names')
    rate = result.events / result.seconds if result.seconds else 0
    click.echo(
        f"{result.name}: {result.events:,} events in {result.seconds:.1f} s ({rate:,.0f} events/s)"
    )


def _process(connection: psycopg.Connection) -> None:
    with spinner("processing") as show:
        totals = operations.process_pending(
            connection, lambda sums: show(f"processed {sums['claimed']:,} events")
        )
    click.echo("processed: " + ", ".join(f"{name} {count:,}" for name, count in totals.items()))
    if totals["failed"]:
        _say(
            "spectrum: failed events say why: SELECT payload, error_msg FROM raw_events"
            " WHERE status = 'failed'"
        )


@cli.command()
@_dsn_option
@click.argument("event_type", required=False)
@click.option("--user", "user_id", metavar="ID")
@click.option("--account", "account_id", metavar="ID")
@click.option(
    "--at",
    "occurred_at",
    metavar="TIME",
    callback=parse_time,
    help="ISO 8601 (without a zone: UTC) or epoch seconds or milliseconds; else now.",
)
@click.option(
    "--property",
    "properties",
    metavar="NAME=VALUE",
    multiple=True,
    help="The value is JSON if it reads as JSON (3, true, null, [1]), else text. Repeatable.",
)
@click.option("--event-id", metavar="ID", help="Else a new UUID. An id counts once.")
@click.option(
    "--json",
    "document",
    metavar="PAYLOAD",
    help="A whole payload as a JSON object; the other options add to it.",
)
def track(
    dsn: str | None,
    event_type: str | None,
    properties: tuple[str, ...],
    document: str | None,
    **given: str | None,
) -> None:
    """Send one event and print its event_id."""
    payload = parse_payload({"event_type": event_type, **given}, properties, document)
    with _connect(dsn) as connection:
        Client(connection).send(payload)
    click.echo(payload["event_id"])


@cli.command(name="test")
@_dsn_option
@click.argument("tests", nargs=-1)
@click.option("--checkout", metavar="DIRECTORY", help="Else the one around the current directory.")
def test(dsn: str | None, tests: tuple[str, ...], checkout: str | None) -> None:
    """Run the regression tests with pg_regress and show how they differ.

    They run on the server of --dsn, in a database of their own that is made anew
    (contrib_regression). The extension must be installed on that server. Exits as pg_regress
    does: 0 all passed, 1 some failed, 2 they could not be run.
    """
    place = pgregress.find_checkout(checkout)
    with _connect(dsn) as connection:
        server = pgregress.Server.of(connection)
    click.get_current_context().exit(pgregress.run_regress(place, tests, server))


cli.add_command(demo)


def main() -> None:
    """The entry point of the command."""
    cli(prog_name="spectrum")


def _connect(dsn: str | None) -> psycopg.Connection:
    """A connection; the server's notices go to standard error."""
    connection = open_connection(dsn)
    connection.add_notice_handler(
        lambda notice: _say(f"{notice.severity.lower()}: {one_line(notice.message_primary or '')}")
    )
    return connection


def _say(line: str) -> None:
    click.echo(line, err=True)
