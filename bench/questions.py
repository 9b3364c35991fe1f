"""The same questions of the same events, asked of every engine by turns."""

from __future__ import annotations

import statistics
from itertools import zip_longest

import psycopg
from engines import CLICKHOUSE, FROM_FACTS, SPECTRUM, THREADS, Answer, Engine, Spectrum, engines
from results import Row, ratio
from rich.progress import Progress
from server import seconds

TIMES = 5
# Seconds of Spectrum to seconds of ClickHouse.
TARGETS = {"funnel": 3.0, "retention": 1.0, "retention by day": 1.0, "active users": 1.0,
           "trend": 1.0, "trend of users": 1.0}  # fmt: skip
NOTE = "rows of 9 columns against 4 packed columns, read one by one against a vector at a time"


def difference(question: str, answers: dict[str, Answer]) -> str | None:
    """What is not the same in the answers, if anything is."""
    first, ours = next(iter(answers.items()))
    for name, theirs in answers.items():
        if question == "active users":
            # The column stores go on until the last user is out of the last window.
            theirs = theirs[: len(ours)]
        if theirs != ours:
            pairs = [pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1]]
            return f"{question}: {first} and {name} differ in {len(pairs)} rows, as {pairs[:3]}"
    return None


def ask_all(connection: psycopg.Connection, progress: Progress) -> dict[str, dict[str, float]]:
    """Medians of seconds by question and engine, once all agree on the answers."""
    costs = {}
    with engines(connection) as asked:
        task = progress.add_task("questions", total=len(Spectrum.QUESTIONS))
        for question in Spectrum.QUESTIONS:
            answers = {name: engine.ask(question) for name, engine in asked.items()}
            if problem := difference(question, answers):
                raise SystemExit(problem)
            costs[question] = _by_turns(asked, question)
            progress.advance(task)
    return costs


def _by_turns(asked: dict[str, Engine], question: str) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(TIMES):
        for name, engine in asked.items():
            spent[name].append(seconds(lambda e=engine: e.ask(question)))
    return {name: statistics.median(times) for name, times in spent.items()}


def measure(
    connection: psycopg.Connection, progress: Progress
) -> tuple[dict[str, dict[str, float]], list[Row]]:
    costs = ask_all(connection, progress)
    return costs, rows(f"questions over all events, {THREADS} threads each", costs)


def rows(group: str, costs: dict[str, dict[str, float]]) -> list[Row]:
    made = []
    for question, by_engine in costs.items():
        for asked, ours, most in (
            (question, by_engine[SPECTRUM], TARGETS[question]),
            (f"{question}, from the facts alone", by_engine[FROM_FACTS], None),
        ):
            for name, theirs in by_engine.items():
                if name in (SPECTRUM, FROM_FACTS) or (most is None and name != CLICKHOUSE):
                    continue
                made.append(
                    Row(group, f"{asked}, to {name}", ours / theirs, "times",
                        most=most if name == CLICKHOUSE else None, note=NOTE,
                        made_of=ratio(1000 * ours, 1000 * theirs, "ms"))
                )  # fmt: skip
    return made
