"""make bench-history: what processing an event costs with a long history, and with a short one."""

from __future__ import annotations

import operator
import statistics
from dataclasses import asdict

import click
import psycopg
from results import Results, Row, ratio
from rich.console import Console
from rich.progress import Progress
from server import Cost, cost, database, machine, process
from stream import History, check_loading, copy_in, load, payloads, prepare

ROUNDS, ROUND_EVENTS = 7, 50_000
LONG = 10_000_000


def batch(connection: psycopg.Connection, history: History, number: int) -> Cost:
    """What it costs to process some events that come after the history."""
    lines = payloads(connection, history.events + number * ROUND_EVENTS, ROUND_EVENTS)
    copy_in(connection, lines)
    loaded: list[int] = []
    spent = cost(lambda: loaded.append(process(connection)), connection)
    if loaded != [ROUND_EVENTS]:
        raise SystemExit(f"{loaded} facts of {ROUND_EVENTS} events")
    return spent


def rows(histories: list[History], rounds: list[tuple[Cost, Cost]]) -> list[Row]:
    group = f"process_batch of {ROUND_EVENTS:,} new events, one worker"
    made = []
    # A shorter history says nothing about what is to be reached.
    most_time = 1.2 if histories[1].events >= LONG else None
    for what, figure, unit, most in (
        ("time", lambda one: 1e6 * one.seconds / ROUND_EVENTS, "us/event", most_time),
        ("processor time", lambda one: 1e6 * one.cpu_seconds / ROUND_EVENTS, "us/event", None),
        ("WAL", lambda one: one.wal_bytes / ROUND_EVENTS, "B/event", None),
    ):
        short, long = ([figure(one) for one in costs] for costs in zip(*rounds, strict=True))
        made.append(
            Row(group, f"{what} with {histories[1].name} of history, to {histories[0].name}",
                statistics.median(map(operator.truediv, long, short)), "times", most=most,
                made_of=ratio(statistics.median(long), statistics.median(short), unit))
        )  # fmt: skip
    return made


@click.command(context_settings={"show_default": True})
@click.option("--history", envvar="BENCH_HISTORY", show_envvar=True, default=LONG,
              type=click.IntRange(min=10_000), help="Events of the long history.")  # fmt: skip
@click.option("--events", envvar="BENCH_EVENTS", show_envvar=True, default=1_000_000,
              type=click.IntRange(min=1_000), help="Events of the short one.")  # fmt: skip
def main(history: int, events: int) -> None:
    """Measures what processing costs with a long history, and with a short one, by turns.

    Loads both (which takes a while, and about 0.5 kB of disk an event), then processes the same
    number of new events in each, time and again.
    """
    command = f"make bench-history BENCH_HISTORY={history} BENCH_EVENTS={events}"
    results = Results.begin(f"history-{history}", command, machine())
    both = [History.of(events), History.of(history)]
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        database("spectrum_bench") as short,
        database("spectrum_bench_long") as long,
    ):
        check_loading()
        for connection, one in zip((short, long), both, strict=True):
            prepare(connection, one)
            load(connection, one, progress)
        task = progress.add_task("new events", total=ROUNDS)
        rounds = []
        for number in range(ROUNDS):
            rounds.append((batch(short, both[0], number), batch(long, both[1], number)))
            progress.advance(task)
    measures = [[asdict(one) for one in pair] for pair in rounds]
    results.add("history", (measures, rows(both, rounds)))
    results.print()


if __name__ == "__main__":
    main()
