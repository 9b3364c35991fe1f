"""make bench-refresh: what a refresh costs as the history grows, and what the answers cost."""

from __future__ import annotations

import statistics

import click
import psycopg
import questions
from psycopg import sql
from results import Results, Row, ratio
from rich.console import Console
from rich.progress import Progress
from server import database, machine, refresh, seconds
from standing import NEW_EVENTS, from_facts, refresh_rounds
from stream import DEFINITIONS, History, check_loading, load, prepare

READS = 200
# Of a view that holds several series of an account, one.
ONE_OF = {
    "sessions_daily": " AND breakdown = 'all'",
    "feature_adoption": " AND feature = 'feature-1'",
    "lifecycle_periods": " AND period_kind = 'day'",
}


def histories(events: int) -> tuple[History, ...]:
    users = events // 20
    return (
        History("base", events, users),
        History("more users", 10 * events, 10 * users),
        History("longer", 10 * events, users, days=900),
    )


def view_reads(connection: psycopg.Connection) -> dict[str, float]:
    """The 99th percentile, in seconds, of reading one account's rows, by standing view."""
    views = connection.execute(
        "SELECT unnest(views) FROM spectrum.report_kinds ORDER BY position"
    ).fetchall()
    costs = {}
    for (view,) in views:
        query = sql.SQL("SELECT * FROM analytics.{} WHERE account_id = %s{}").format(
            sql.Identifier(view), sql.SQL(ONE_OF.get(view, ""))
        )
        times = []
        for number in range(READS):
            account = "*" if number % 2 else f"account-{number % 20}"
            times.append(seconds(lambda q=query, a=account: connection.execute(q, (a,)).fetchall()))
        costs[view] = statistics.quantiles(times, n=100)[98]
    return costs


def measure(history: History, times: int, progress: Progress) -> dict[str, object]:
    """Everything there is to know about one history."""
    with database("spectrum_bench") as connection:
        prepare(connection, history)
        load(connection, history, progress)
        connection.execute(DEFINITIONS)
        first = seconds(lambda: refresh(connection))
        connection.execute("VACUUM (ANALYZE)")
        return {
            "events": history.events,
            "users": history.users,
            "days": history.days,
            "first refresh": first,
            "rounds": refresh_rounds(connection, history, times, progress),
            "view reads p99": view_reads(connection),
            "from facts": from_facts(connection, progress),
            "questions": questions.ask_all(connection, progress),
        }


def rows(name: str, result: dict, base: dict) -> list[Row]:
    """What is to be reached, of one history."""
    group = f"{name}: {result['events']:,} events, {result['users']:,} users, {result['days']} days"
    processing, refreshing = (
        statistics.median(one[step] for one in result["rounds"]) for step in ("process", "refresh")
    )
    at_base = statistics.median(one["refresh"] for one in base["rounds"])
    anew = sum(result["from facts"].values())
    slowest = max(result["view reads p99"], key=result["view reads p99"].get)
    made = [
        Row(group, "first refresh", 1e6 * result["first refresh"] / result["events"], "us/event"),
        Row(group, f"processing of {NEW_EVENTS:,} new events", processing, "s"),
        Row(group, f"refresh of {NEW_EVENTS:,} new events", refreshing, "s", most=1),
        Row(group, "refresh, to all views from the facts", refreshing / anew, "times", most=1 / 20,
            made_of=ratio(refreshing, anew, "s")),
        Row(group, f"slowest read of a view, p99 ({slowest})",
            1000 * result["view reads p99"][slowest], "ms", most=10),
    ]  # fmt: skip
    if result is not base:
        made.insert(3, Row(group, "refresh, to that of the base", refreshing / at_base, "times",
                           most=1.5, made_of=ratio(refreshing, at_base, "s")))  # fmt: skip
    return made + questions.rows(group, result["questions"])


@click.command(context_settings={"show_default": True})
@click.option("--events", envvar="BENCH_EVENTS", show_envvar=True, default=1_000_000,
              type=click.IntRange(min=1_000), help="Events of the smallest history.")  # fmt: skip
@click.option("--rounds", envvar="BENCH_ROUNDS", show_envvar=True, default=7,
              type=click.IntRange(min=1), help="Refreshes measured in each.")  # fmt: skip
def main(events: int, rounds: int) -> None:
    """Measures refreshes, reads and questions as the history grows.

    Three histories, each in a database of its own: the base; ten times as many events of ten times
    the users; ten times as many of the same users, over ten times the days. In each: new events
    and a refresh, time and again, the same views from the facts, reads of every standing view, and
    the functions beside the column stores. Prints a table and writes it to bench/results/.
    """
    command = f"make bench-refresh BENCH_EVENTS={events}"
    results = Results.begin(f"refresh-{events}", command, machine())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        check_loading()
        base = None
        for history in histories(events):
            result = measure(history, rounds, progress)
            base = base or result
            results.add(history.name, (result, rows(history.name, result, base)))
    results.print()


if __name__ == "__main__":
    main()
