"""Bytes on disk per event, by table and index, after VACUUM."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
from results import Row
from server import value

# Months and their indexes under the name of the table they belong to.
SIZES = """
    WITH relations AS (
        SELECT coalesce(parent.oid, c.oid) AS place, c.oid AS relation, c.relkind = 'i' AS is_index
        FROM pg_class AS c
        LEFT JOIN pg_inherits ON inhrelid = c.oid
        LEFT JOIN pg_class AS parent ON parent.oid = inhparent
        WHERE c.relkind IN ('r', 'i')
    )
    SELECT n.nspname AS schema, p.relname AS name, relations.is_index,
        coalesce(t.relname, p.relname) AS of_table,
        sum(CASE WHEN is_index THEN pg_relation_size(relation) ELSE pg_table_size(relation) END)
            ::bigint AS bytes
    FROM relations
    JOIN pg_class AS p ON p.oid = place
    JOIN pg_namespace AS n ON n.oid = p.relnamespace
    LEFT JOIN pg_index AS x ON x.indexrelid = place
    LEFT JOIN pg_class AS t ON t.oid = x.indrelid
    WHERE n.nspname IN ('warehouse', 'analytics', 'spectrum') OR n.nspname = 'public'
        AND coalesce(t.relname, p.relname) = 'raw_events'
    GROUP BY 1, 2, 3, 4
    HAVING sum(pg_relation_size(relation)) > 0
    ORDER BY 1, 4, 3, 2
"""
HOT_NOTE = (
    "of a row, 84 B are properties, 48 B keys, id and time, 28 B PostgreSQL's own; both indexes "
    "repeat user and time"
)


def measure(connection: psycopg.Connection) -> tuple[list[dict], list[Row]]:
    connection.execute("VACUUM (ANALYZE)")
    events = value(connection, "SELECT count(*) FROM warehouse.fact_events")
    assert isinstance(events, int)
    places = [
        dict(zip(("schema", "name", "is_index", "table", "bytes"), row, strict=True))
        for row in connection.execute(SIZES)
    ]

    def each(is_it: Callable[[dict], bool]) -> float:
        return sum(place["bytes"] for place in places if is_it(place)) / events

    def part(table: str, is_index: bool) -> float:
        return each(lambda place: (place["table"], place["is_index"]) == (table, is_index))

    group = "size on disk per event"
    indexes = [p for p in places if p["table"] == "fact_events" and p["is_index"]]
    made = [
        Row(group, "facts, heap", part("fact_events", False), "B"),
        *(Row(group, f"facts, index {one['name']}", one["bytes"] / events, "B") for one in indexes),
        Row(group, "facts with indexes", each(lambda place: place["table"] == "fact_events"), "B",
            most=200, note=HOT_NOTE),
        Row(group, "ledger with index", each(lambda place: place["table"] == "event_ledger"), "B"),
        Row(group, "raw events, heap", part("raw_events", False), "B"),
        Row(group, "raw events, indexes", part("raw_events", True), "B"),
        Row(group, "dimensions with indexes",
            each(lambda place: place["table"].startswith("dim_")), "B"),
        Row(group, "standing tables with indexes",
            each(lambda place: place["schema"] == "analytics"), "B"),
        Row(group, "tables of spectrum (state of users, notes, logs) with indexes",
            each(lambda place: place["schema"] == "spectrum"), "B"),
    ]  # fmt: skip
    return places, made
