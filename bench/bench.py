"""make bench: what Spectrum costs from the INSERT to the answer, against what is to be reached."""

from __future__ import annotations

import click
import ingest
import latency
import packed
import plot
import questions
import sizes
import standing
import sustained
from results import Results
from rich.console import Console
from rich.progress import Progress
from server import database, machine, refresh
from stream import History

# Those of the first line look at what `ingest` has made; `packed` leaves nothing for others.
PARTS = ("ingest", "sizes", "standing", "questions", "packed",
         "wide", "loop", "latency", "sustained")  # fmt: skip
ROUNDS = 5


def run(results: Results, wanted: set[str], events: int, rate: int, sustain: int) -> None:
    """Measures the parts that are wanted, one after the other."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if wanted & set(PARTS[:5]):
            history = History.of(events)
            with database("spectrum_bench") as connection:
                rounds = ingest.measure(connection, history, ROUNDS, progress)
                results.add("ingest", ingest.report(history, rounds))
                refresh(connection)
                if "sizes" in wanted:
                    results.add("sizes", sizes.measure(connection))
                if "standing" in wanted:
                    results.add("standing", standing.measure(connection, history, ROUNDS, progress))
                if "questions" in wanted:
                    results.add("questions", questions.measure(connection, progress))
                if "packed" in wanted:
                    results.add("packed", packed.measure(connection, progress))
        if "wide" in wanted:
            history = History.of(max(events // 5, 20_000), is_wide=True)
            with database("spectrum_bench") as connection:
                rounds = ingest.measure(connection, history, ROUNDS, progress)
                results.add("wide", ingest.report(history, rounds))
        if "loop" in wanted:
            results.add("loop", ingest.against_loop(progress))
        if "latency" in wanted:
            results.add("latency", latency.measure(progress))
        if "sustained" in wanted:
            results.add("sustained", sustained.measure(rate, sustain, progress))


@click.command(context_settings={"show_default": True})
@click.option("--events", envvar="BENCH_EVENTS", show_envvar=True, default=1_000_000,
              type=click.IntRange(min=10_000), help="Events of the history.")  # fmt: skip
@click.option("--sustain", envvar="BENCH_SUSTAIN", show_envvar=True, default=60,
              type=click.IntRange(min=10), help="Seconds of the end-to-end run.")  # fmt: skip
@click.option("--rate", envvar="BENCH_RATE", show_envvar=True, default=26_000,
              type=click.IntRange(min=10), help="Events sent a second in it.")  # fmt: skip
@click.option("--only", envvar="BENCH_ONLY", show_envvar=True, default="",
              help=f"Some parts instead of all, with commas: {', '.join(PARTS)}.")  # fmt: skip
def main(events: int, sustain: int, rate: int, only: str) -> None:
    """Measures what Spectrum costs from the INSERT to the answer, against what is to be reached.

    Every comparison is a ratio of what ran by turns in one run. Databases of its own are made and
    dropped in the server of PGHOST, PGPORT and PGUSER. Prints a table; writes it, with all
    measurements and a plot, to bench/results/.
    """
    wanted = set(filter(None, only.split(","))) or set(PARTS)
    if wanted - set(PARTS):
        raise click.BadParameter(f"no such part: {', '.join(sorted(wanted - set(PARTS)))}")
    settings = {"BENCH_EVENTS": (events, 1_000_000), "BENCH_SUSTAIN": (sustain, 60),
                "BENCH_RATE": (rate, 26_000), "BENCH_ONLY": (only, "")}  # fmt: skip
    command = " ".join(
        ["make bench"] + [f"{name}={it}" for name, (it, usual) in settings.items() if it != usual]
    )
    name = "-".join([f"bench-{events}", *sorted(wanted if only else ())])
    results = Results.begin(name, command, machine())
    run(results, wanted, events, rate, sustain)
    results.print()
    if not only:
        plot.draw(results)


if __name__ == "__main__":
    main()
