"""That rows are looked up, also where the planner believes that a table is empty."""

from __future__ import annotations

from typing import Any

import psycopg
from pipeline import event, insert, process, rows

TOUCHED = """
    SELECT io.relname,
        (io.heap_blks_hit + io.heap_blks_read)::float
            / (changed.n_tup_ins + changed.n_tup_upd + changed.n_tup_del) AS pages
    FROM pg_statio_user_tables AS io
    JOIN pg_stat_user_tables AS changed USING (relid)
    WHERE changed.n_tup_ins + changed.n_tup_upd + changed.n_tup_del > 500
    ORDER BY pages DESC
"""
EVENTS = 6_000


def a_lot() -> list[dict[str, Any]]:
    """Many sessions, pages, features and latencies of many users."""
    return [
        event(
            ("visit", "request", "feature_used", "purchase")[n % 4],
            event_id=f"e{n}",
            user_id=f"u{n % 1_500}",
            account_id=f"a{n % 40}",
            occurred_at=f"2024-02-{1 + n % 9:02}T{n % 24:02}:{n % 60:02}:00Z",
            properties={
                "path": f"/{n % 700}", "latency_ms": n % 900, "endpoint": f"/api/{n % 30}",
                "feature": f"f{n % 60}", "revenue": n % 90, "status": 200,
            },
        )
        for n in range(EVENTS)
    ]  # fmt: skip


def test_a_table_that_was_vacuumed_empty_is_not_scanned_for_each_row(
    db: psycopg.Connection,
) -> None:
    """What VACUUM found empty, the planner takes for empty while a statement fills it: a scan for
    each new row then costs the square of the news."""
    db.execute("""SELECT spectrum.define_funnel('shop', '["visit", "purchase"]', '9 days')""")
    db.execute("""SELECT spectrum.define_attribution('sales', '"purchase"')""")
    db.execute("VACUUM (ANALYZE)")
    insert(db, a_lot())
    assert process(db, EVENTS).loaded == EVENTS
    db.execute("CALL spectrum.refresh_analytics()")
    db.execute("SELECT pg_stat_force_next_flush()")
    touched = rows(db, TOUCHED)
    assert len(touched) > 15
    assert [table for table in touched if table[1] > 20] == []
