"""The same questions, asked of the ClickHouse engine (chdb) over the same events.

It gets the four columns that the questions read, in the order that suits it best: by event type,
user and time. Each question is written as its own users would write it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import psycopg
from chdb.session import Session

COLUMNS = "event_type String, user_key UInt64, account_key UInt32, occurred_at DateTime64(3, 'UTC')"
EXPORT = """
COPY (
    SELECT event_type, user_key, account_key, occurred_at AT TIME ZONE 'UTC' FROM analytics.events
) TO STDOUT
"""
QUESTIONS = {
    "funnel": """
        SELECT level, count() FROM (
            SELECT user_key, windowFunnel(604800000, 'strict_increase')(
                toUInt64(toUnixTimestamp64Milli(occurred_at)),
                event_type = 'signup', event_type = 'project_created', event_type = 'purchase'
            ) AS level
            FROM events
            WHERE event_type IN ('signup', 'project_created', 'purchase')
            GROUP BY user_key
        )
        WHERE level > 0 GROUP BY level ORDER BY level""",
    "retention": """
        SELECT cohort, dateDiff('week', cohort, week) AS period, count() AS users FROM (
            SELECT min(toMonday(occurred_at)) AS cohort,
                groupUniqArray(toMonday(occurred_at)) AS weeks
            FROM events GROUP BY user_key
        )
        ARRAY JOIN weeks AS week
        WHERE period <= 12
        GROUP BY cohort, period ORDER BY cohort, period""",
    "active_users": """
        SELECT day,
            uniqExactIf(user_key, gap = 0), uniqExactIf(user_key, gap < 7), uniqExact(user_key)
        FROM (
            SELECT user_key, addDays(active, gap) AS day, gap
            FROM (SELECT DISTINCT user_key, toDate(occurred_at) AS active FROM events)
            ARRAY JOIN range(30) AS gap
        )
        GROUP BY day ORDER BY day""",
    "trend": """
        SELECT toDate(occurred_at) AS day, count() FROM events
        WHERE event_type = 'page_view' GROUP BY day ORDER BY day""",
    "trend of users": """
        SELECT toDate(occurred_at) AS day, uniqExact(user_key) FROM events
        GROUP BY day ORDER BY day""",
}


class ColumnStore:
    """A chdb session with a copy of all events."""

    def __init__(self, connection: psycopg.Connection, threads: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="spectrum-bench-")
        place = Path(self._directory.name)
        with (place / "events.tsv").open("wb") as file, connection.cursor().copy(EXPORT) as rows:
            for block in rows:
                file.write(block)
        self._session = Session(str(place / "chdb"))
        self._query("CREATE DATABASE bench")
        self._query(
            f"CREATE TABLE bench.events ({COLUMNS.replace('String', 'LowCardinality(String)')}) "
            "ENGINE = MergeTree ORDER BY (event_type, user_key, occurred_at)"
        )
        self._query(
            f"INSERT INTO bench.events SELECT * FROM file('{place}/events.tsv', TSV, "
            "'" + COLUMNS.replace("'", "''") + "')"
        )
        self._query("OPTIMIZE TABLE bench.events FINAL")
        (place / "events.tsv").unlink()
        self._query("USE bench")
        self._query(f"SET max_threads = {threads}")

    def _query(self, query: str) -> str:
        return str(self._session.query(query, "CSV"))

    def ask(self, question: str) -> list[list[str]]:
        return [line.split(",") for line in self._query(QUESTIONS[question]).splitlines()]

    def __enter__(self) -> ColumnStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._session.close()
        self._directory.cleanup()
