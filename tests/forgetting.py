"""What the tests of forgetting share: a life that leaves traces everywhere, a search for them."""

from __future__ import annotations

from typing import Any

import psycopg
from pipeline import event, insert, rows
from psycopg import sql

USER = "ann.marker@example.org"
MARKER = "zanzibar-4711"  # planted in the user's properties, in nobody else's

# Tables with a trace of USER or MARKER once all has been processed; what only passes by is not.
TRACES = {
    "public.raw_events",
    "warehouse.dim_users",
    "warehouse.fact_events_2024_02",
    "spectrum.tasks",
    "spectrum.run_log",
    "spectrum.rollup_sessions",
    "spectrum.rollup_funnel_entries",
    "spectrum.rollup_funnel_seconds",
    "spectrum.rollup_feature_weeks",
    "spectrum.rollup_features",
    "spectrum.rollup_latencies",
    "spectrum.rollup_contributions",
    "spectrum.rollup_conversions",
    "spectrum.rollup_property_names",
    "spectrum.rollup_experiment_units",
    "spectrum.rollup_subscription_events",
    "analytics.mv_attributed_conversions",
    "analytics.mv_conversion_funnels",
    "analytics.mv_event_catalog",
    "analytics.mv_feature_adoption",
    "analytics.mv_operations",
    "analytics.mv_error_rates",
    "analytics.mv_reports",
    "analytics.mv_sessions_daily",
}

OWN_REPORT = """
    CREATE FUNCTION public.plans(p_users bigint[])
    RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
    LANGUAGE sql STABLE
    AS $$
        SELECT DISTINCT '*', user_key, ARRAY[properties ->> 'plan'], 1.0 FROM analytics.events
        WHERE user_key = ANY (p_users) AND properties ? 'plan'
    $$
"""


def traces(db: psycopg.Connection, text: str) -> set[str]:
    """The tables, of all that there are, with a row that says it in any column."""
    tables = rows(
        db,
        """
        SELECT nspname, relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE relkind IN ('r', 'm') AND relpersistence <> 't'
            AND nspname !~ '^(pg_catalog|pg_toast|information_schema)'
        """,
    )
    return {
        f"{schema}.{table}"
        for schema, table in tables
        if db.execute(
            sql.SQL("SELECT FROM {} AS t WHERE strpos(t::text, {}) > 0 LIMIT 1").format(
                sql.Identifier(schema, table), sql.Literal(text)
            )
        ).rowcount
    }


def life(user: str, mark: str, day: int = 10) -> list[dict[str, Any]]:
    """One event of each kind that a question looks at."""

    def at(hour: int, event_type: str, **properties: Any) -> dict[str, Any]:
        return event(
            event_type,
            event_id=f"{user} {day} {hour}",
            user_id=user,
            account_id="acme",
            occurred_at=f"2024-02-{day:02}T{hour:02}:10:00Z",
            geo={"country": "DE", "city": "Berlin"},
            properties=properties,
        )

    return [
        at(1, "visit", url=f"https://shop/{mark}", utm_campaign=mark, plan=mark, **{mark: 1}),
        at(2, "buy", plan=mark, revenue=12),
        at(3, "feature_used", feature=mark),
        at(4, "experiment_exposure", experiment="button", variant=mark),
        at(5, "request", endpoint=f"/{mark}", latency_ms=7, service=mark, status=500),
        at(6, "error", service=mark, version=mark),
        at(7, "subscription_started", subscription_id=mark, mrr=5),
    ]


def define(db: psycopg.Connection) -> None:
    db.execute(
        """SELECT spectrum.define_funnel('sale', '["visit", "buy"]', p_breakdown => 'plan')"""
    )
    db.execute("SELECT spectrum.define_metric('bought', 'proportion', 'buy')")
    db.execute(
        """SELECT spectrum.define_experiment('button', '{"a": 0.5, "b": 0.5}', 'a', '["bought"]')"""
    )
    db.execute("""SELECT spectrum.define_attribution('buys', '"buy"')""")
    db.execute("SELECT spectrum.define_paths('any')")
    db.execute(OWN_REPORT)
    db.execute("SELECT spectrum.define_report('plans', 'public.plans')")


def settle(db: psycopg.Connection) -> None:
    """Events of three users, one of them USER, processed and counted, with errors that quote him
    and a task that names him."""
    define(db)
    db.execute(
        f"""
        CREATE FUNCTION public.complain() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION 'no refund: {MARKER} of {USER}' USING ERRCODE = '58000'; END $$;
        CREATE TRIGGER complain BEFORE INSERT ON spectrum.news EXECUTE FUNCTION public.complain()
        """
    )
    insert(db, life(USER, MARKER) + life("bob", "pro") + life("eve", "free", 12))
    insert(db, life(USER, MARKER)[:2])  # copies
    insert(db, life(USER, MARKER, 10)[:1] + life(USER, MARKER, 14))
    insert(db, [event(user_id=USER, properties={"revenue": MARKER}), {"user_id": USER}])
    insert(db, [event("visit", user_id="bob", account_id="acme")])
    db.execute("CALL spectrum.run()")
    db.execute("DROP TRIGGER complain ON spectrum.news")
    db.execute("DROP FUNCTION public.complain")
    db.execute("SELECT spectrum.request('reprocess', %s)", (f'{{"error": "%{USER}%"}}',))
    db.execute("CALL spectrum.run()")


def views(db: psycopg.Connection) -> dict[tuple[str, str], dict[str, Any]]:
    """Every number of every standing view: by view and cell, as JSON reads them."""
    named = rows(
        db,
        "SELECT view, columns FROM spectrum._standing_views() WHERE is_cell",
    )
    found = {}
    for view, keys in named:
        for (row,) in rows(db, f"SELECT to_jsonb(v) - 'as_of' FROM analytics.{view} AS v"):
            cell = {key: row.pop(key) for key in keys}
            found[view, repr(sorted(cell.items()))] = row
    return found
