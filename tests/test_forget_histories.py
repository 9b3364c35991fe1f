"""Random histories in which users are forgotten, wholly or in part, or become nobody, between
batches, refreshes, copies and corrections: in the end every standing view says what the oracles say
of the payloads that remain."""

from __future__ import annotations

import json
import os
import uuid
from datetime import datetime
from random import Random

import psycopg
from histories import Payload, epochs, exploring, payloads, properties, timezones
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_active_users import standing_active_users
from oracle_events import Calendar, read_events, scopes
from oracle_lifecycle import lifecycle
from oracle_revenue import standing_revenue
from pipeline import drain, insert, process, rows, value
from test_activity_standing import shown
from test_revenue import same

EXAMPLES = int(os.environ.get("FORGET_EXAMPLES", "5"))
USERS = ["u1", "u2", "u3", "u4"]
some_properties = properties(
    revenue=st.sampled_from([5, -3, "7.5"]), plan=st.sampled_from(["a", "b"]),
    url=st.sampled_from(["/x", "/y?utm_campaign=z"]), feature=st.sampled_from(["f", "g"]),
)  # fmt: skip
TYPES = ["visit", "buy", "feature_used", "refund"]


class Life:
    """The pipeline, and beside it what should count."""

    def __init__(self, db: psycopg.Connection, random: Random) -> None:
        self.db, self.random = db, random
        self.counting: dict[str, Payload] = {}  # by event_id, also of what waits
        self.rules: list[tuple[str, str | None, str, str]] = []
        self.nobody = 0

    def is_out(self, payload: Payload) -> bool:
        at = datetime.fromisoformat(payload["occurred_at"])
        return any(
            payload.get("user_id") == user
            and kind in (None, payload["event_type"])
            and datetime.fromisoformat(start) <= at < datetime.fromisoformat(end)
            for user, kind, start, end in self.rules
        )

    def arrive(self, some: list[Payload]) -> None:
        again = self.random.sample(some, min(len(some), self.random.randrange(3)))
        insert(self.db, some + again)
        for payload in some:
            if not self.is_out(payload):
                self.counting[payload["event_id"]] = payload

    def process(self) -> None:
        process(self.db, self.random.choice([2, 5, 100]))

    def loaded(self) -> set[str]:
        return {
            str(name) for (name,) in rows(self.db, "SELECT event_id FROM warehouse.event_ledger")
        }

    def correct(self) -> None:
        """An event turns out to be another user's."""
        done = sorted(set(self.counting) & self.loaded())
        for name in self.random.sample(done, min(len(done), 2)):
            payload = self.counting[name] | {"user_id": self.random.choice(USERS)}
            if str(self.counting[name].get("user_id", "")).startswith("anonymous"):
                continue
            self.db.execute(
                "UPDATE raw_events SET payload = %s, status = 'pending'"
                " WHERE payload ->> 'event_id' = %s", (json.dumps(payload), name),
            )  # fmt: skip
            self.counting.pop(name)
            if not self.is_out(payload):
                self.counting[name] = payload
        drain(self.db)

    def forget(self) -> None:
        user = self.random.choice(USERS)
        way = self.random.choice(["remove", "remove", "anonymise", "some"])
        always = ("0001-01-01T00:00:00+00:00", "9999-01-01T00:00:00+00:00")
        rule: tuple[str, str | None, str, str] = (user, None, *always)
        options = {"user_id": user}
        if way == "some":
            times = sorted(each["occurred_at"] for each in self.counting.values()) or [always[0]]
            kind = self.random.choice([None, *TYPES])
            rule = (user, kind, self.random.choice(times), always[1])
            options |= {"from": rule[2]} | ({"event_type": kind} if kind else {})
        if way == "anonymise":
            options |= {"mode": "anonymise"}
            self.nobody += 1
            for name in self.loaded() & {
                n for n, p in self.counting.items() if p.get("user_id") == user
            }:
                self.counting[name] = self.counting[name] | {"user_id": f"anonymous {self.nobody}"}
        self.rules.append(rule)
        self.counting = {n: p for n, p in self.counting.items() if not self.is_out(p)}
        if self.random.random() < 0.5:
            names = {"user_id": "p_user_id", "from": "p_from", "mode": "p_mode"}
            arguments = ", ".join(f"{names.get(k, 'p_' + k)} => %({k})s" for k in options)
            self.db.execute(f"SELECT * FROM spectrum.forget_user({arguments})", options)
            return
        task = value(self.db, "SELECT spectrum.request('forget_user', %s)", json.dumps(options))
        while value(self.db, "SELECT spectrum._work_on_task(%s)", task):
            # From its first step on he is kept out.
            self.random.choice([self.process, self.refresh, lambda: None])()
        assert value(self.db, "SELECT state FROM spectrum.tasks WHERE task_id = %s", task) == "done"

    def refresh(self) -> None:
        self.db.execute("SELECT spectrum._refresh_some(%s)", (self.random.choice([3, 1000]),))

    def remember(self) -> None:
        user = self.random.choice(USERS)
        self.db.execute("SELECT spectrum.remember_user(%s)", (user,))
        drain(self.db)
        self.rules = [rule for rule in self.rules if rule[0] != user]


@settings(exploring, max_examples=EXAMPLES)
@given(
    history=epochs.flatmap(lambda epoch: payloads(epoch, TYPES, some_properties, 40)),
    random=st.randoms(use_true_random=True),
    timezone=timezones,
)
def test_whoever_is_forgotten_whenever(
    db: psycopg.Connection, history: list[Payload], random: Random, timezone: str
) -> None:
    with db.transaction(force_rollback=True):
        db.execute("SELECT spectrum.configure('timezone', %s)", (timezone,))
        db.execute("""SELECT spectrum.define_funnel('f', '["visit", "buy"]')""")
        db.execute("""SELECT spectrum.define_attribution('a', '"buy"')""")
        db.execute("SELECT spectrum.define_paths('p', p_max_steps => 2)")
        told = Life(db, random)
        waiting = [p | {"event_id": str(uuid.UUID(int=random.getrandbits(128)))} for p in history]
        while waiting:
            size = random.choice([1, 5, 20])
            part, waiting = waiting[:size], waiting[size:]
            # What waits is in before the rules change: who is remembered meanwhile is not.
            told.arrive(part)
            for step in random.choices(
                [told.process, told.refresh, lambda: drain(db), told.forget], [3, 2, 2, 2], k=3
            ):
                step()
            if random.random() < 0.3:
                drain(db)
                told.correct()
            if random.random() < 0.2:
                drain(db)
                told.remember()
        drain(db)
        db.execute("CALL spectrum.refresh_analytics()")

        events, calendar = read_events(told.counting.values()), Calendar(timezone)
        standing = rows(
            db, "SELECT account_id, day, dau, wau, mau, stickiness FROM analytics.active_users"
            ' ORDER BY account_id COLLATE "C", day'
        )  # fmt: skip
        assert standing == standing_active_users(events, calendar)
        known = [scope for scope, some in scopes(events) if any(event.user for event in some)]
        assert shown(db, "lifecycle_periods", 3) == sorted(
            (scope, kind, *cell)
            for scope in known
            for kind in ("day", "week", "month")
            for cell in lifecycle(events, calendar, kind, account=None if scope == "*" else scope)
        )
        money = rows(
            db, "SELECT account_id, day, currency, orders, gross, refunds, net, paying_users,"
            " active_users, arpu, arppu FROM analytics.revenue_summary"
            ' ORDER BY account_id COLLATE "C", day, currency'
        )  # fmt: skip
        assert same(money, standing_revenue(events, calendar))
        assert rows(db, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []
