"""The standing views: to refresh them after new events, against making them from all facts."""

from __future__ import annotations

import statistics

import psycopg
from psycopg import sql
from results import Row, ratio
from rich.progress import Progress
from server import process, refresh, seconds
from stream import History, send

NEW_EVENTS = 10_000
# Some that are computed from the whole history, by the queries that verify() compares them with.
PLAIN = ("active_users", "conversion_funnels", "retention_cohorts", "revenue_summary")


def refresh_rounds(
    connection: psycopg.Connection, history: History, times: int, progress: Progress
) -> list[dict[str, float]]:
    """New events, time and again; seconds to process and to refresh them."""
    task = progress.add_task(f"{history.name}: new events", total=times)
    rounds = []
    for number in range(times):
        send(connection, history.events + number * NEW_EVENTS, NEW_EVENTS)
        rounds.append(
            {
                "process": seconds(lambda: process(connection)),
                "refresh": seconds(lambda: refresh(connection)),
            }
        )
        progress.advance(task)
    return rounds


def from_facts(connection: psycopg.Connection, progress: Progress) -> dict[str, float]:
    """Seconds to compute each standing view from all facts, and from nothing that is kept."""
    connection.execute("SET spectrum.from_facts = on")
    names = [
        row[0]
        for row in connection.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'analytics'::regnamespace "
            r"AND proname LIKE '\_standing\_%' AND pronargs = 0 ORDER BY 1"
        )
    ]
    task = progress.add_task("views from the facts", total=len(names))
    costs = {}
    for name in names:
        query = sql.SQL("SELECT count(*) FROM analytics.{}()").format(sql.Identifier(name))
        costs[name] = seconds(lambda query=query: connection.execute(query))
        progress.advance(task)
    connection.execute("RESET spectrum.from_facts")
    return costs


def plain_refreshes(
    connection: psycopg.Connection, times: int, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of REFRESH MATERIALIZED VIEW of some views' queries over all facts."""
    connection.execute("SET spectrum.from_facts = on")
    task = progress.add_task("REFRESH MATERIALIZED VIEW", total=times * len(PLAIN))
    costs: dict[str, list[float]] = {}
    for name in PLAIN:
        view = sql.Identifier("bench", name)
        connection.execute(
            sql.SQL("CREATE MATERIALIZED VIEW {} AS SELECT * FROM analytics.{}() WITH NO DATA")
            .format(view, sql.Identifier(f"_standing_{name}"))
        )  # fmt: skip
        statement = sql.SQL("REFRESH MATERIALIZED VIEW {}").format(view)
        costs[name] = []
        for _ in range(times):
            costs[name].append(seconds(lambda s=statement: connection.execute(s)))
            progress.advance(task)
        connection.execute(sql.SQL("DROP MATERIALIZED VIEW {}").format(view))
    connection.execute("RESET spectrum.from_facts")
    return costs


def measure(
    connection: psycopg.Connection, history: History, times: int, progress: Progress
) -> tuple[dict, list[Row]]:
    rounds = refresh_rounds(connection, history, times, progress)
    plain = plain_refreshes(connection, max(times // 2, 1), progress)
    ours = statistics.median(each["refresh"] for each in rounds)
    theirs = {name: statistics.median(spent) for name, spent in plain.items()}
    group = f"{NEW_EVENTS:,} new events on {history.events:,}"
    made = [
        Row(group, "process_batch", statistics.median(each["process"] for each in rounds), "s"),
        Row(group, "refresh of all standing views", ours, "s"),
    ]
    made += [
        Row(group, f"refresh of all, to REFRESH MATERIALIZED VIEW of {name} alone", ours / spent,
            "times", made_of=ratio(ours, spent, "s"))
        for name, spent in theirs.items()
    ]  # fmt: skip
    return {"rounds": rounds, "plain": plain}, made
