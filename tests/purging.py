"""Two databases that get the same history; one of them purges facts now and then. What the other
one says is what the first has to go on saying."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import psycopg
from histories import Payload
from pipeline import drain, insert, process, rows, value

TYPES = ["a", "b", "c", "d"]
# Its minutes are of the last week, which is never purged.
NOT_COMPARED = "throughput_minutes"


def standing(db: psycopg.Connection) -> dict[str, list[str]]:
    """All that the standing views show."""
    shown = {}
    for (view,) in rows(db, "SELECT unnest(views) FROM spectrum.report_kinds"):
        if view == NOT_COMPARED:
            continue
        columns = value(
            db,
            "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute"
            " WHERE attrelid = ('analytics.' || %s)::regclass AND attnum > 0"
            " AND attname <> 'as_of'",
            view,
        )
        shown[view] = sorted(map(repr, rows(db, f"SELECT {columns} FROM analytics.{view}")))
    return shown


def differences(db: psycopg.Connection, twin: psycopg.Connection) -> dict[str, Any]:
    here, there = standing(db), standing(twin)
    return {
        view: (set(here[view]) - set(there[view]), set(there[view]) - set(here[view]))
        for view in here
        if here[view] != there[view]
    }


def purge(
    db: psycopg.Connection, older_than: str, steps: int = 1000, kind: str = "purge_facts"
) -> int:
    """As purge_facts does it, inside the caller's transaction; how many steps it took."""
    task = value(
        db,
        "SELECT spectrum.request(%s, jsonb_build_object('older_than', %s::text))",
        kind,
        older_than,
    )
    taken = 1
    while taken <= steps and value(db, "SELECT spectrum._work_on_task(%s)", task):
        taken += 1
    assert value(db, "SELECT error_msg FROM spectrum.tasks WHERE task_id = %s", task) is None
    return taken


def open_from(db: psycopg.Connection) -> datetime | None:
    return value(db, "SELECT open_from FROM spectrum.horizon")


class Twins:
    """Random users, definitions and events of half a year, sent to both."""

    def __init__(
        self, db: psycopg.Connection, twin: psycopg.Connection, randoms: Random, timezone: str
    ) -> None:
        self.db, self.twin, self.randoms = db, twin, randoms
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.since = self.now - timedelta(days=200)
        self.times: dict[str, datetime] = {}
        self.both("SELECT spectrum.configure('timezone', %s)", timezone)
        for _ in range(3):
            self.define_funnel()
        self.define_others()

    def both(self, statement: str, *parameters: Any) -> None:
        for each in (self.db, self.twin):
            each.execute(statement, parameters or None)

    def define_funnel(self) -> None:
        choose = self.randoms.choice
        steps = [
            choose([choose(TYPES), {"event": choose(TYPES), "where": {"p": choose("12")}}])
            for _ in range(choose([1, 2, 3]))
        ]
        self.both(
            "SELECT spectrum.define_funnel(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            choose(["f1", "f2", "f3"]), json.dumps(steps), choose(["1 hour", "14 days", "1 month"]),
            choose(["ordered", "strict", "any"]), choose(["best", "first"]),
            choose(["user", "user", "account", "session"]), choose([None, "p"]),
            choose(["first", "last"]), choose([None, '["d"]']),
        )  # fmt: skip

    def define_others(self) -> None:
        choose = self.randoms.choice
        self.both(
            "SELECT spectrum.define_retention('r', %s, %s, %s, 5, %s)",
            choose([None, "a"]), choose([None, "b"]), choose(["day", "week", "month"]),
            choose(["first", "recurring"]),
        )  # fmt: skip
        self.both("SELECT spectrum.define_feature('ft', 'c')")
        self.both("SELECT spectrum.define_paths('p', %s)", choose([None, "a"]))
        self.both("SELECT spectrum.define_attribution('at', %s, %s)",
                  choose(['"a"', '"b"']), choose(["last", "first"]))  # fmt: skip
        self.both("SELECT spectrum.define_metric('m1', 'proportion', 'a', p_window => '60 days')")
        self.both("SELECT spectrum.define_metric('m2', 'mean', 'b', p_property => 'revenue')")
        self.both(
            """SELECT spectrum.define_experiment('e', '{"x": 0.5, "y": 0.5}', 'x', '["m1", "m2"]',
            p_cuped => %s)""",
            choose([None, "20 days"]),
        )

    def moment(self) -> datetime:
        since = max(open_from(self.db) or self.since, self.since)
        length = int((self.now - since).total_seconds()) - 60
        # Just behind the horizon, or anywhere.
        short = self.randoms.random() < 0.3
        return since + timedelta(
            seconds=self.randoms.randrange(min(length, 500_000 if short else length))
        )

    def an_event(self) -> Payload:
        choose, chance = self.randoms.choice, self.randoms.random
        known = self.open_events()
        if known and chance() < 0.06:
            event_id = choose(known)
        else:
            event_id = str(uuid.UUID(int=self.randoms.getrandbits(128)))
            self.times[event_id] = self.moment()
        number = self.randoms.randrange(8)
        properties: Payload = {"p": choose("12")}
        event_type = choose([*TYPES, *TYPES, "exposed", "subscription_started", "feature_used"])
        if event_type == "exposed":
            event_type = "experiment_exposure"
            properties |= {"experiment": "e", "variant": choose(["x", "y", "xy"[number % 2]])}
        elif event_type == "subscription_started":
            properties |= {"mrr": choose([10, 20])}
        elif event_type == "feature_used":
            properties |= {"feature": choose("kl")}
        if chance() < 0.3:
            properties |= {"revenue": choose([5, -3, 0])}
        if chance() < 0.05:
            properties |= {"rare": True}
        return {
            "event_id": event_id,
            "event_type": event_type,
            "occurred_at": self.times[event_id].isoformat(),
            "user_id": f"u{number}",
            "account_id": f"acc{self.randoms.randrange(3) if chance() < 0.03 else number % 3}",
            "properties": properties,
        }

    def open_events(self) -> list[str]:
        since = open_from(self.db) or self.since
        return [name for name, at in self.times.items() if at >= since]

    def send(self, count: int) -> None:
        payloads = [self.an_event() for _ in range(count)]
        for each in (self.db, self.twin):
            insert(each, payloads)
        if self.randoms.random() < 0.5:
            limit = self.randoms.choice([10, 1000])
            for each in (self.db, self.twin):
                process(each, limit)

    def correct(self) -> None:
        """What was sent is changed and set back, or cannot be read any more."""
        names = self.open_events()
        for name in self.randoms.sample(names, len(names) // 10):
            payload, *parameters = self.randoms.choice([
                ("payload",),
                ("payload - 'event_type'",),
                ("jsonb_set(payload, '{user_id}', to_jsonb(%s::text))", f"u{name[0]}"),
                ("jsonb_set(payload, '{event_type}', to_jsonb(%s::text))", TYPES[0]),
            ])  # fmt: skip
            self.both(
                f"UPDATE raw_events SET status = 'pending', payload = {payload}"
                " WHERE payload ->> 'event_id' = %s AND status IN ('done', 'failed')",
                *parameters,
                name,
            )

    def knock(self) -> None:
        """At what is closed, at the one that purges: it stays what it is, and says so."""
        closed = sorted(set(self.times) - set(self.open_events()))
        if not closed:
            return
        drain(self.db)
        known = rows(
            self.db, "SELECT event_id::text FROM warehouse.event_ledger WHERE event_id = ANY (%s)",
            closed,
        )  # fmt: skip
        if known:
            (name,) = self.randoms.choice(known)
            self.db.execute(
                "UPDATE raw_events SET status = 'pending', payload = payload - 'event_type'"
                " WHERE payload ->> 'event_id' = %s AND status = 'done' AND copy_of IS NULL",
                (name,),
            )
            insert(self.db, [
                {"event_id": name, "event_type": "a", "occurred_at": at.isoformat()}
                for at in (self.times[name], self.now)
            ])  # fmt: skip
        insert(self.db, [{"event_type": "a", "occurred_at": self.since.isoformat()}])
        counts = drain(self.db)
        assert (counts.loaded, counts.failed) == (0, 1)

    def settle(self) -> None:
        for each in (self.db, self.twin):
            drain(each)
            each.execute("CALL spectrum.refresh_analytics()")
