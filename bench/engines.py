"""The engines that are asked the same questions over the same events: Spectrum, chdb, DuckDB.

The column stores get the four columns that the questions read, in the order that suits them best:
by event type, user and time. Each question is written as the engine's own users would write it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, Protocol

import duckdb
import psycopg
from chdb.session import Session
from stream import FUNNEL

THREADS = 2
SPECTRUM, FROM_FACTS, CLICKHOUSE = "Spectrum", "Spectrum, from facts", "ClickHouse (chdb)"
EXPORT = """
COPY (
    SELECT event_type, user_key, account_key,
        to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.MS')
    FROM analytics.events
) TO STDOUT
"""
Answer = list[tuple[str, ...]]


class Engine(Protocol):
    """Answers a question: its rows, as texts, in their order."""

    def ask(self, question: str) -> Answer: ...


class Spectrum:
    """The functions of `analytics`, as they come."""

    QUESTIONS: ClassVar[dict[str, str]] = {
        "funnel": f"""
            SELECT step, units FROM analytics.funnel('{FUNNEL}', p_window => '7 days')
            ORDER BY step""",
        "retention": """
            SELECT cohort, period, users FROM analytics.retention() WHERE users > 0
            ORDER BY cohort, period""",
        # The one before stands in every database, this one does not.
        "retention by day": """
            SELECT cohort, period, users
            FROM analytics.retention(p_period => 'day', p_periods => 30) WHERE users > 0
            ORDER BY cohort, period""",
        "active users": """
            SELECT day, dau, wau, mau FROM analytics.active_users() ORDER BY day""",
        "trend": """
            SELECT period, value FROM analytics.trend('page_view') WHERE value > 0
            ORDER BY period""",
        "trend of users": """
            SELECT period, value FROM analytics.trend(p_measure => 'users') WHERE value > 0
            ORDER BY period""",
    }

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def ask(self, question: str) -> Answer:
        rows = self._connection.execute(self.QUESTIONS[question]).fetchall()
        return [tuple(map(str, row)) for row in rows]


class FromFacts(Spectrum):
    """The same, with all questions asked of the events themselves."""

    def ask(self, question: str) -> Answer:
        with self._connection.transaction():
            self._connection.execute("SET LOCAL spectrum.from_facts = on")
            return super().ask(question)


class ClickHouse:
    """A chdb session with a copy of all events."""

    COLUMNS = (
        "event_type {}, user_key UInt64, account_key UInt32, occurred_at DateTime64(3, ''UTC'')"
    )
    QUESTIONS: ClassVar[dict[str, str]] = {
        "funnel": """
            SELECT arrayJoin(range(1, level + 1)) AS step, count() FROM (
                SELECT windowFunnel(604800000, 'strict_increase')(
                    toUInt64(toUnixTimestamp64Milli(occurred_at)),
                    event_type = 'signup', event_type = 'project_created', event_type = 'purchase'
                ) AS level
                FROM events
                WHERE event_type IN ('signup', 'project_created', 'purchase')
                GROUP BY user_key
            )
            GROUP BY step ORDER BY step""",
        "retention": """
            SELECT cohort, dateDiff('week', cohort, week) AS period, count() AS users FROM (
                SELECT min(toMonday(occurred_at)) AS cohort,
                    groupUniqArray(toMonday(occurred_at)) AS weeks
                FROM events GROUP BY user_key
            )
            ARRAY JOIN weeks AS week
            WHERE period <= 12
            GROUP BY cohort, period ORDER BY cohort, period""",
        "retention by day": """
            SELECT cohort, dateDiff('day', cohort, day) AS period, count() AS users FROM (
                SELECT min(toDate(occurred_at)) AS cohort,
                    groupUniqArray(toDate(occurred_at)) AS days
                FROM events GROUP BY user_key
            )
            ARRAY JOIN days AS day
            WHERE period <= 30
            GROUP BY cohort, period ORDER BY cohort, period""",
        "active users": """
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

    def __init__(self, place: Path, events: Path) -> None:
        self._session = Session(str(place / "chdb"))
        self._query("CREATE DATABASE bench")
        columns = self.COLUMNS.format("LowCardinality(String)").replace("''", "'")
        self._query(
            f"CREATE TABLE bench.events ({columns}) "
            "ENGINE = MergeTree ORDER BY (event_type, user_key, occurred_at)"
        )
        self._query(
            f"INSERT INTO bench.events "
            f"SELECT * FROM file('{events}', TSV, '{self.COLUMNS.format('String')}')"
        )
        self._query("OPTIMIZE TABLE bench.events FINAL")
        self._query("USE bench")
        self._query(f"SET max_threads = {THREADS}")

    def _query(self, query: str) -> str:
        return str(self._session.query(query, "TSV"))

    def ask(self, question: str) -> Answer:
        rows = self._query(self.QUESTIONS[question]).splitlines()
        return [tuple(row.split("\t")) for row in rows]

    def close(self) -> None:
        self._session.close()


class DuckDB:
    """A DuckDB file with a copy of all events."""

    QUESTIONS: ClassVar[dict[str, str]] = {
        # Of the entries before a step, the latest is the one most likely to be within the window.
        "funnel": """
            WITH entered AS (
                SELECT user_key, event_type, epoch_ms(occurred_at) AS ms,
                    max(CASE event_type WHEN 'signup' THEN epoch_ms(occurred_at) END) OVER (
                        PARTITION BY user_key ORDER BY epoch_ms(occurred_at)
                        RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS entry
                FROM events
                WHERE event_type IN ('signup', 'project_created', 'purchase')
            ), created AS (
                SELECT user_key, event_type, ms, entry,
                    max(CASE event_type WHEN 'project_created' THEN entry END) OVER (
                        PARTITION BY user_key ORDER BY ms
                        RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS entry_of_created
                FROM entered
            ), levels AS (
                SELECT user_key, max(CASE
                    WHEN event_type = 'purchase' AND ms - entry_of_created <= 604800000 THEN 3
                    WHEN event_type = 'project_created' AND ms - entry <= 604800000 THEN 2
                    WHEN event_type = 'signup' THEN 1
                END) AS level
                FROM created GROUP BY user_key
            )
            SELECT step, count(*) FROM levels, range(1, 4) AS steps (step)
            WHERE level >= step GROUP BY step ORDER BY step""",
        "retention": """
            WITH weeks AS (
                SELECT DISTINCT user_key, date_trunc('week', occurred_at)::date AS week FROM events
            ), cohorts AS (
                SELECT user_key, min(week) AS cohort FROM weeks GROUP BY user_key
            )
            SELECT cohort, (week - cohort) // 7 AS period, count(*)
            FROM weeks JOIN cohorts USING (user_key)
            WHERE (week - cohort) // 7 <= 12
            GROUP BY ALL ORDER BY ALL""",
        "retention by day": """
            WITH days AS (
                SELECT DISTINCT user_key, occurred_at::date AS day FROM events
            ), cohorts AS (
                SELECT user_key, min(day) AS cohort FROM days GROUP BY user_key
            )
            SELECT cohort, day - cohort AS period, count(*)
            FROM days JOIN cohorts USING (user_key)
            WHERE day - cohort <= 30
            GROUP BY ALL ORDER BY ALL""",
        "active users": """
            SELECT day, count(DISTINCT user_key) FILTER (gap = 0),
                count(DISTINCT user_key) FILTER (gap < 7), count(DISTINCT user_key)
            FROM (
                SELECT user_key, active + gap::integer AS day, gap
                FROM (SELECT DISTINCT user_key, occurred_at::date AS active FROM events),
                    range(30) AS gaps (gap)
            )
            GROUP BY day ORDER BY day""",
        "trend": """
            SELECT occurred_at::date AS day, count(*) FROM events
            WHERE event_type = 'page_view' GROUP BY day ORDER BY day""",
        "trend of users": """
            SELECT occurred_at::date AS day, count(DISTINCT user_key) FROM events
            GROUP BY day ORDER BY day""",
    }

    def __init__(self, place: Path, events: Path) -> None:
        self._connection = duckdb.connect(str(place / "duckdb"), config={"threads": THREADS})
        self._connection.execute(f"""
            CREATE TABLE events AS SELECT * FROM read_csv('{events}', delim = '\t', header = false,
                columns = {{'event_type': 'VARCHAR', 'user_key': 'UBIGINT',
                    'account_key': 'UINTEGER', 'occurred_at': 'TIMESTAMP'}})
            ORDER BY event_type, user_key, occurred_at""")

    def ask(self, question: str) -> Answer:
        rows = self._connection.execute(self.QUESTIONS[question]).fetchall()
        return [tuple(map(str, row)) for row in rows]

    def close(self) -> None:
        self._connection.close()


@contextmanager
def engines(connection: psycopg.Connection) -> Iterator[dict[str, Engine]]:
    """All of them, with the facts of this database."""
    with (
        tempfile.TemporaryDirectory(prefix="spectrum-bench-") as directory,
        ExitStack() as opened,
    ):
        place = Path(directory)
        events = place / "events.tsv"
        with events.open("wb") as file, connection.cursor().copy(EXPORT) as rows:
            for block in rows:
                file.write(block)
        clickhouse, duck = ClickHouse(place, events), DuckDB(place, events)
        opened.callback(clickhouse.close)
        opened.callback(duck.close)
        events.unlink()
        yield {
            SPECTRUM: Spectrum(connection),
            FROM_FACTS: FromFacts(connection),
            CLICKHOUSE: clickhouse,
            "DuckDB": duck,
        }
