"""Closed months, packed: how much room they take, and what the questions cost then."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import psycopg
from engines import FromFacts
from results import Row, ratio
from rich.progress import Progress
from server import cost, seconds, value

TIMES = 5
GROUP = "closed months, packed"
# One that no function answers: every event is looked at, and into its properties.
SCAN = """
SELECT properties ->> 'plan' AS plan, count(*), sum(revenue) FROM analytics.events GROUP BY plan"""
TOO_YOUNG = "the history is younger than three months, by the clock of this machine"
NOT_HERE = "not in this version: a closed month is kept as it was while it was open"


def measure(
    connection: psycopg.Connection, progress: Progress
) -> tuple[dict[str, object], list[Row]]:
    """Packs all months of the history. What comes later cannot be about them any more."""
    if value(connection, "SELECT to_regclass('warehouse.packed_events')") is None:
        return {}, [Row(GROUP, "size on disk per event", None, "B", most=60, note=NOT_HERE)]
    events = value(connection, "SELECT count(*) FROM warehouse.visible_events")
    assert isinstance(events, int)
    connection.execute("VACUUM (ANALYZE)")
    hot = _times(connection, progress)
    packing = cost(lambda: connection.execute("CALL spectrum.pack_facts('3 months')"), connection)
    connection.execute("VACUUM (ANALYZE)")
    packed = value(connection, "SELECT sum(events) FROM warehouse.packed_events")
    if packed != events:
        return {}, [Row(GROUP, "size on disk per event", None, "B", most=60, note=TOO_YOUNG)]
    size = value(connection, "SELECT pg_total_relation_size('warehouse.packed_events')")
    assert isinstance(size, int)
    cold = _times(connection, progress)
    made = [
        Row(GROUP, "size on disk per event", size / events, "B", most=60),
        Row(GROUP, "to pack them", 1e6 * packing.seconds / events, "us/event"),
    ]
    for question in cold:
        now, before = (1000 * statistics.median(of[question]) for of in (cold, hot))
        made.append(
            Row(GROUP, f"{question}, from the facts alone, to the same before", now / before,
                "times", most=4, made_of=ratio(now, before, "ms"))
        )  # fmt: skip
    return {"bytes": size, "packing": packing.seconds, "hot": hot, "cold": cold}, made


def _times(connection: psycopg.Connection, progress: Progress) -> dict[str, list[float]]:
    """Seconds of each question, several times."""
    engine = FromFacts(connection)
    asked: dict[str, Callable[[], object]] = {
        question: partial(engine.ask, question) for question in engine.QUESTIONS
    }
    asked["events by a property"] = lambda: connection.execute(SCAN).fetchall()
    task = progress.add_task(GROUP, total=len(asked))
    spent = {}
    for question, ask in asked.items():
        ask()
        spent[question] = [seconds(ask) for _ in range(TIMES)]
        progress.advance(task)
    return spent
