"""The benches' events: one made-up stream, made inside the server by stream.sql."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg
from rich.progress import Progress
from server import database, process, refresh, value

HERE = Path(__file__).parent
CHUNK = 250_000
FUNNEL = '["signup", "project_created", "purchase"]'
# What stands while it is measured, beside the views that need no definition.
DEFINITIONS = f"""
SELECT spectrum.define_funnel('activation', '{FUNNEL}', p_window => '7 days');
SELECT spectrum.define_funnel(
    'adoption', '["page_view", "feature_used", "purchase"]', p_window => '1 day');
SELECT spectrum.define_retention('buyers', 'signup', 'purchase');
SELECT spectrum.define_metric('buying', 'proportion', 'purchase');
SELECT spectrum.define_experiment(
    'checkout', '{{"control": 0.5, "treatment": 0.5}}', 'control', '["buying"]');
"""


@dataclass(frozen=True)
class History:
    """A stream of so many events of so many users over so many days, and what goes on after it."""

    name: str
    events: int
    users: int
    days: int = 90
    is_wide: bool = False

    @classmethod
    def of(cls, events: int, is_wide: bool = False) -> History:
        """20 events a user."""
        return cls(f"{events:,} events", events, max(events // 20, 1), is_wide=is_wide)


def prepare(connection: psycopg.Connection, history: History) -> None:
    """Spectrum, the stream of this history, and nothing of it loaded."""
    connection.execute("CREATE EXTENSION spectrum")
    connection.execute((HERE / "stream.sql").read_text())
    connection.execute(
        "INSERT INTO bench.history SELECT %(events)s, %(users)s, 20, "
        "timestamptz '2026-04-01Z' - %(days)s * interval '1 day', '2026-04-01Z', 90, %(is_wide)s",
        asdict(history),
    )


def payloads(connection: psycopg.Connection, first: int, count: int) -> bytes:
    """The events from the `first` on, as COPY wants them: a line each."""
    copy = f"COPY (SELECT bench.payloads({first}, {first + count - 1})) TO STDOUT"
    with connection.cursor().copy(copy) as rows:
        return b"".join(rows)


def copy_in(connection: psycopg.Connection, lines: bytes) -> None:
    """COPYs such lines into raw_events, as any client does."""
    with connection.cursor().copy("COPY raw_events (payload) FROM STDIN") as copy:
        copy.write(lines)


def send(connection: psycopg.Connection, first: int, count: int) -> None:
    """Sends events without leaving the server."""
    connection.execute(
        "INSERT INTO raw_events (payload) SELECT bench.payloads(%s, %s)", (first, first + count - 1)
    )


def load(connection: psycopg.Connection, history: History, progress: Progress) -> None:
    """Makes the facts of a whole history, as processing does but without raw events."""
    task = progress.add_task(f"{history.name}: loading", total=history.events)
    for first in range(0, history.events, CHUNK):
        count = min(CHUNK, history.events - first)
        loaded = value(connection, f"SELECT bench.load({first}, {first + count - 1})")
        if loaded != count:
            raise SystemExit(f"{loaded} facts of {count} events")
        progress.update(task, advance=count)
    connection.execute(f"ALTER TABLE raw_events ALTER seq RESTART WITH {history.events + 1}")
    connection.execute("VACUUM (ANALYZE)")


def _facts_made(is_loaded: bool) -> list[tuple]:
    history = History.of(20_000)
    with database("spectrum_bench_sample") as connection:
        prepare(connection, history)
        if is_loaded:
            connection.execute("SELECT bench.load(0, %s)", (history.events - 1,))
        else:
            send(connection, 0, history.events)
            process(connection)
        connection.execute(DEFINITIONS)
        refresh(connection)
        wrong = connection.execute("SELECT * FROM spectrum.verify() WHERE NOT ok").fetchall()
        if wrong:
            raise SystemExit(f"verify(): {wrong}")
        return connection.execute(
            "SELECT event_id, occurred_at, event_type, account_id, user_id, country, "
            "region, city, properties, revenue, currency FROM analytics.events ORDER BY event_id"
        ).fetchall()


def check_loading() -> None:
    """Proves that events loaded and events processed are the same, on 20,000 of them."""
    loaded, processed = _facts_made(True), _facts_made(False)
    if loaded != processed or len(loaded) != 20_000:
        raise SystemExit("bench.load() does not make the facts that processing makes")
