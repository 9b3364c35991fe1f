"""All standing views at once: a definition of every kind, and what every view shows, to be held
against another database."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import psycopg
from pipeline import rows

OWN_REPORT = """
    CREATE FUNCTION public.worth(p_users bigint[])
    RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
    LANGUAGE sql STABLE
    AS $$
        SELECT '*', e.user_key, ARRAY[e.event_type], count(*)::numeric
        FROM analytics.events AS e
        WHERE e.user_key = ANY (p_users)
        GROUP BY e.user_key, e.event_type
    $$
"""

DEFINITIONS: dict[str, list[dict[str, Any]]] = {
    "funnel": [
        {"p_name": "plain", "p_steps": ["signup", "purchase"]},
        {"p_name": "by plan", "p_steps": ["page_view", "feature_used", "purchase"],
         "p_breakdown": "plan", "p_window": "3 days", "p_entry": "first"},
        {"p_name": "last page", "p_steps": ["page_view", {"event": "request", "where": {"n": 1}}],
         "p_breakdown": "page", "p_attribution": "last", "p_order": "any"},
        {"p_name": "sessions", "p_steps": ["page_view", "request"], "p_unit": "session",
         "p_breakdown": "country", "p_exclude": ["error"]},
        {"p_name": "accounts", "p_steps": ["signup", "purchase"], "p_unit": "account",
         "p_order": "strict", "p_breakdown": "service"},
    ],
    "retention": [
        {"p_name": "bought", "p_start_event": "signup", "p_return_event": "purchase",
         "p_period": "day", "p_periods": 5, "p_mode": "on_or_after"},
        {"p_name": "months", "p_period": "month", "p_cohort": "recurring",
         "p_where": {"plan": "pro"}},
    ],
    "feature": [
        {"p_name": "pages", "p_event": "page_view"},
        {"p_name": "pro", "p_where": {"plan": "pro"}},
    ],
    "attribution": [
        {"p_name": "bought", "p_conversion": {"event": "purchase"}},
        {"p_name": "signed up", "p_conversion": {"event": "signup"}, "p_model": "first"},
    ],
    "paths": [
        {"p_name": "all"}, {"p_name": "from a page", "p_start_event": "page_view"},
    ],
    "metric": [
        {"p_name": "bought", "p_kind": "proportion", "p_event": "purchase"},
        {"p_name": "paid", "p_kind": "mean", "p_event": "purchase", "p_property": "amount",
         "p_window": "3 days"},
        {"p_name": "latency", "p_kind": "ratio", "p_event": "request",
         "p_property": "latency_ms", "p_denominator_event": "page_view",
         "p_denominator_property": "n", "p_denominator_where": {"plan": "pro"}},
    ],
    "experiment": [
        {"p_name": "e", "p_variants": {"control": 0.5, "treatment": 0.5}, "p_control": "control",
         "p_metrics": ["bought", "paid", "latency"], "p_winsorize": 0.95, "p_cuped": "14 days"},
        {"p_name": "plain", "p_variants": {"control": 1, "treatment": 1}, "p_control": "control",
         "p_metrics": ["paid"], "p_sequential": 100},
    ],
}  # fmt: skip


def define_all(db: psycopg.Connection) -> None:
    for kind, definitions in DEFINITIONS.items():
        for definition in definitions:
            arguments = ", ".join(f"{name} => %({name})s" for name in definition)
            values = {
                name: json.dumps(given) if isinstance(given, dict | list) else given
                for name, given in definition.items()
            }
            db.execute(f"SELECT spectrum.define_{kind}({arguments})", values)
    db.execute(OWN_REPORT)
    db.execute("SELECT spectrum.define_report('worth', 'public.worth')")


def shown(db: psycopg.Connection) -> dict[str, list[tuple]]:
    """The rows of every standing view; not as_of, which tells when and not what."""
    views = rows(
        db,
        """
        SELECT view.name, string_agg(format('%I', attname), ', ' ORDER BY attnum)
        FROM spectrum.report_kinds AS kind CROSS JOIN LATERAL unnest(kind.views) AS view (name)
        JOIN pg_attribute ON attrelid = format('analytics.%I', view.name)::regclass
            AND attnum > 0 AND attname <> 'as_of'
        GROUP BY view.name
        """,
    )
    return {
        name: sorted(map(exact, rows(db, f"SELECT {columns} FROM analytics.{name}")), key=repr)
        for name, columns in views
    }


def exact(row: tuple) -> tuple:
    """Numbers by what they are worth, not by how many zeros they end with."""
    return tuple(Fraction(cell) if isinstance(cell, Decimal) else cell for cell in row)


def differences(
    left: dict[str, list[tuple]], right: dict[str, list[tuple]]
) -> dict[str, tuple[list[tuple], list[tuple]]]:
    """By view, up to three rows that only one side has."""
    found = {}
    for name in left.keys() | right.keys():
        mine, theirs = left.get(name, []), right.get(name, [])
        if mine != theirs:
            only = [row for row in mine if row not in theirs][:3]
            found[name] = (only, [row for row in theirs if row not in mine][:3])
    return found
