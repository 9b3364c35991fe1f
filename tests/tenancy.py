"""Two accounts in one database, and one of them alone in another: what the tests of tenants share.

Everything of the other account carries a mark, so that whatever shows it shows the mark.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from pipeline import insert, rows
from psycopg import sql
from psycopg.conninfo import make_conninfo

OWN, OTHER = "acme", "zz_other"
# Texts carry the one, amounts the other, and its events lie on days of its own.
MARKS = ("zz_", "98765")
YESTERDAY = (datetime.now(UTC) - timedelta(days=1)).replace(
    hour=12, minute=0, second=0, microsecond=0
)

# Views that say nothing of any account, and are the same for all.
OF_THE_PRODUCT = {"settings", "features", "metrics", "experiments", "served_reports"}
# Views of all accounts together, where a tenant finds no row.
OF_ALL = {"pipeline", "pipeline_status", "event_days", "user_days", "user_day_counts"}
# What a tenant may not even open.
CLOSED = {"all_accounts"}

# Every function that answers a question, with arguments that give it rows. {account} is where
# p_account goes, if the function knows it.
QUESTIONS = [
    """analytics.funnel('["visit", "buy"]'{account})""",
    """analytics.funnel('["visit", "buy"]', p_unit => 'account'{account})""",
    "analytics.retention({account})",
    "analytics.retention('visit', 'buy', 'day'{account})",
    "analytics.trend({account})",
    "analytics.trend('visit', p_measure => 'users', p_breakdown => 'account_id'{account})",
    "analytics.trend('buy', p_measure => 'sum', p_property => 'revenue'{account})",
    "analytics.active_users({account})",
    "analytics.lifecycle({account})",
    "analytics.stickiness({account})",
    "analytics.feature_adoption({account})",
    "analytics.revenue({account})",
    "analytics.mrr_movements({account})",
    "analytics.mrr_problems({account})",
    "analytics.latency({account})",
    "analytics.error_rates({account})",
    "analytics.throughput('day'{account})",
    "analytics.event_catalog({account})",
    "analytics.experiment('button'{account})",
    "analytics.sessions({account})",
    "analytics.sessions_daily({account})",
    """analytics.attribution('"buy"'{account})""",
    "analytics.paths({account})",
]
# Keys are numbered over all accounts, and these say when, not what.
VARYING = {
    "is_current",  # of what waits, also of others: never to a tenant
    "user_key", "event_type_key", "account_key", "as_of", "changed_at", "created_at", "raw_id",
    "granted_at",
}  # fmt: skip


def question(template: str, account: str | None = None) -> str:
    if account is None:
        return template.format(account="")
    lead = "" if "({" in template else ", "
    literal = sql.Literal(account).as_string()
    return template.format(account=f"{lead}p_account => {literal}")


def history(account: str, mark: str, days: list[int], amount: float) -> list[dict[str, Any]]:
    """A bit of everything. Users of both accounts have the same names, so they are shared."""
    told: list[dict[str, Any]] = []

    def tell(kind: str, user: str | None, at: datetime, **properties: Any) -> None:
        told.append(
            {
                "event_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{account} {len(told)}")),
                "event_type": kind,
                "account_id": account,
                "occurred_at": at.isoformat(),
                "geo": {"country": mark + "land", "city": mark + "ville"},
                "properties": {mark + "key": mark + "value", "plan": mark + "plan"} | properties,
            }
            | ({"user_id": user} if user else {})
        )

    for day in days:
        start = YESTERDAY - timedelta(days=day)
        for number, user in enumerate((mark + "u1", mark + "u2", "shared")):
            at = start + timedelta(minutes=10 * number)
            shown = {"experiment": "button", "variant": "ab"[number % 2]}
            tell("experiment_exposure", user, at, **shown)
            tell("visit", user, at + timedelta(minutes=1), utm_source=mark + "source")
            tell(mark + "look", user, at + timedelta(minutes=2), feature=mark + "feature")
            tell("buy", user, at + timedelta(minutes=3), revenue=amount)
            tell("request", user, at + timedelta(minutes=4), endpoint="/" + mark, latency_ms=amount,
                 service=mark + "service", version=mark + "1", status=500)  # fmt: skip
            tell("feature_used", user, at + timedelta(minutes=5), feature=mark + "feature")
        tell("subscription_started", None, start, mrr=amount, plan=mark + "plan")
        tell("subscription_changed", None, start + timedelta(hours=1), mrr=mark + "much")
    return told


OWN_EVENTS = history(OWN, "", [40, 9, 8, 1], 5)
OTHER_EVENTS = history(OTHER, "zz_", [50, 20, 8, 2, 0], 98765)
NOBODYS = [
    {key: each for key, each in event.items() if key not in ("account_id", "event_id")}
    for event in history("", "zz_nobodys_", [3], 98765)
]


def define(db: psycopg.Connection) -> None:
    db.execute("""SELECT spectrum.define_funnel('sale', '["visit", "buy"]')""")
    db.execute("SELECT spectrum.define_metric('bought', 'proportion', 'buy')")
    db.execute("SELECT spectrum.define_metric('paid', 'mean', 'buy', 'revenue')")
    db.execute("SELECT spectrum.define_feature('buying', 'buy')")
    db.execute("""SELECT spectrum.define_attribution('buys', '"buy"')""")
    db.execute("SELECT spectrum.define_paths('any')")
    db.execute(
        "SELECT spectrum.define_experiment("
        """'button', '{"a": 0.5, "b": 0.5}', 'a', '["bought", "paid"]')"""
    )
    db.execute(
        """
        CREATE FUNCTION public.told(p_users bigint[])
        RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
        LANGUAGE sql STABLE
        AS $$
            SELECT scope, e.user_key, ARRAY[e.event_type], count(*)
            FROM analytics.events AS e, LATERAL (VALUES ('*'), (e.account_id)) AS s (scope)
            WHERE e.user_key = ANY (p_users) AND scope IS NOT NULL
            GROUP BY 1, 2, 3
        $$
        """
    )
    db.execute("SELECT spectrum.define_report('told', 'public.told')")


def fill(db: psycopg.Connection, *histories: list[dict[str, Any]]) -> None:
    define(db)
    for each in histories:
        insert(db, each)
    db.execute("CALL spectrum.run()")


def quoted(role: str) -> str:
    """A role's name as grant_* take it."""
    return sql.Literal(sql.Identifier(role).as_string()).as_string()


def views(db: psycopg.Connection) -> list[str]:
    """Every view of analytics there is: a new one is under test from the start."""
    found = rows(
        db,
        "SELECT relname FROM pg_class WHERE relnamespace = 'analytics'::regnamespace"
        " AND relkind IN ('v', 'm') ORDER BY relname",
    )
    return [name for (name,) in found]


def shown(db: psycopg.Connection, query: str, where: str = "true") -> list[str]:
    """The rows of a view or function as texts, in an order of their own, without what varies."""
    with db.cursor() as cursor:
        cursor.execute(f"SELECT * FROM {query} AS answer WHERE {where}")
        names = [column.name for column in cursor.description or ()]
        return sorted(
            json.dumps(
                {
                    n: re.sub(r"'changed_at': '[^']*'", "", str(v))
                    for n, v in zip(names, row, strict=True)
                    if n not in VARYING
                },
                sort_keys=True,
            )
            for row in cursor
        )


def marked(texts: list[str]) -> list[str]:
    """Those that tell something of the other account."""
    return [text for text in texts if any(mark in text for mark in MARKS)]


class Party:
    """The database with both accounts, its owner, and roles that he grants."""

    def __init__(
        self, dsn: str, connect: Callable[..., psycopg.Connection], make_role: Callable[..., str]
    ) -> None:
        self.dsn, self.connect, self.make_role = dsn, connect, make_role
        self.owner = connect(dsn)

    def superuser(self) -> psycopg.Connection:
        return psycopg.connect(make_conninfo(self.dsn, user=os.environ["PGUSER"]), autocommit=True)

    def give_schema(self, schema: str, role: str) -> None:
        """As a superuser: an owner who is none cannot give objects away."""
        with self.superuser() as admin:
            admin.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
            admin.execute(f'CREATE SCHEMA {schema} AUTHORIZATION "{role}"')

    def role(self, *calls: str) -> tuple[str, psycopg.Connection]:
        """A new role, given what the calls give ("{}" is the role), and a session of it."""
        name = self.make_role("Odd tenant; --")
        for call in calls:
            self.owner.execute(f"SELECT spectrum.{call.format(quoted(name))}")
        return name, self.connect(make_conninfo(self.dsn, user=name))
