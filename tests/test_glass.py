"""Glass: every cell of a standing view is made of the events that trace() shows, and an event tells
all cells it counts in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

import psycopg
import pytest
from histories import Payload, exploring, load
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

# Each number of each view: its cell, and how often it counts or how much.
NUMBERS = {
    "daily_events": "day, event_type; events",
    "active_users": "day; dau, wau, mau",
    "revenue_summary": "day, currency; orders, gross, refunds, net, paying_users, active_users",
    "retention_cohorts": "retention, cohort, period; users, cohort_size",
    "conversion_funnels": "funnel, step, breakdown; users",
    "funnel_days": "funnel, day, step; users",
    "experiment_results": "experiment, metric, variant; units, excluded_units, conversions, value",
}
MORE_NUMBERS = {
    "sessions_daily": "day, breakdown, value; sessions, users, bounces, events, page_views",
    "attributed_conversions": "attribution, day, channel, source, medium, campaign, currency;"
    " conversions, users, revenue",
    "path_flows": "paths, day, step, source, target; transitions, users",
    "mrr_movements": "period_kind, period, currency; new, expansion, contraction, churn,"
    " reactivation, new_accounts, churned_accounts, reactivated_accounts",
    "operations": "day, endpoint; requests, errors, measured",
    "error_rates_daily": "day, service, version; requests, errors, error_events",
    "throughput_minutes": "minute; events",
    "lifecycle_periods": "period_kind, period; new, returning, resurrecting, dormant",
    "stickiness_periods": "period_kind, period, days; users_exactly, users_at_least",
    "feature_adoption": "feature, cohort_week, period;"
    " active_users, users, first_users, repeat_users",
    "event_catalog": "event_type, property; events",
}
ALL_NUMBERS = NUMBERS | MORE_NUMBERS
SUMS = (
    "gross", "refunds", "net", "value", "revenue",
    "new", "expansion", "contraction", "churn", "reactivation",
)  # fmt: skip
START = datetime(2024, 3, 25, tzinfo=UTC)


def cells_of(view: str) -> str:
    """A query for the cells of a view and their values."""
    keys, measures = (part.split(", ") for part in ALL_NUMBERS[view].split("; "))
    names = ", ".join(f"'{key}', {view}.{key}" for key in ["account_id", *keys])
    # Dormant users are shown below zero.
    values = ", ".join(
        f"('{measure}', {'-' if measure == 'dormant' else ''}{view}.{measure}::float8)"
        for measure in measures
    )
    value = "m.value * CASE WHEN m.measure = 'value' THEN units ELSE 1 END" if (
        view == "experiment_results") else "m.value"  # fmt: skip
    kind = "kind" if view == "experiment_results" else "''"
    return (
        f"SELECT jsonb_strip_nulls(jsonb_build_object({names}, 'measure', m.measure)) AS cell,"
        f" {value} AS value, {kind} AS kind"
        f" FROM analytics.{view} CROSS JOIN (VALUES (0)) AS one (one)"
        f" CROSS JOIN LATERAL (VALUES {values}) AS m (measure, value)"
    )


def frozen(view: str, cell: Payload, event: object) -> tuple:
    return view, tuple(sorted((k, v) for k, v in cell.items() if v is not None)), event


def is_sum(view: str, measure: str) -> bool:
    return measure in SUMS and view != "lifecycle_periods"


def traced(db: psycopg.Connection, views: Iterable[str]) -> Iterator[tuple]:
    """What stands behind every cell; each is made of that."""
    for view in views:
        rows = db.execute(
            "SELECT cells.cell, cells.value, cells.kind, count(DISTINCT t.unit), sum(t.amount),"
            " coalesce(array_agg(t.event_id) FILTER (WHERE t.event_id IS NOT NULL), '{}'),"
            " bool_and(t.rule <> '' AND t.raw_id IS NOT NULL AND t.event_type <> '')"
            f" FROM ({cells_of(view)}) AS cells"
            " LEFT JOIN LATERAL analytics.trace(%s, cells.cell, NULL) AS t ON true"
            " GROUP BY cells.cell, cells.value, cells.kind",
            (view,),
        ).fetchall()
        for cell, value, kind, units, amount, events, is_told in rows:
            if not is_sum(view, cell["measure"]):
                assert units == value, (view, cell)
            elif cell["measure"] != "value" or kind == "mean":
                assert float(amount or 0) == pytest.approx(value or 0), (view, cell)
            assert is_told or not events
            for event in events:
                yield frozen(view, cell, event)


def explained(db: psycopg.Connection, views: Iterable[str]) -> Iterator[tuple]:
    for view, cell, event in db.execute(
        "SELECT x.view_name, x.cell, e.event_id FROM analytics.events AS e,"
        " spectrum.explain_event(e.event_id) AS x WHERE x.what = 'cell' AND x.rule <> ''"
        " AND x.view_name = ANY (%s)",
        (list(views),),
    ):
        yield frozen(view, cell, event)


def define(db: psycopg.Connection, random: Random) -> None:
    any_step = lambda: random.choice(  # noqa: E731
        ["visit", "buy", {"event": "visit", "where": {"plan": "pro"}}, "refund"]
    )
    for number in range(3):
        db.execute(
            "SELECT spectrum.define_funnel(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                f"funnel {number}", Jsonb([any_step() for _ in range(random.randint(1, 3))]),
                random.choice(["1 hour", "3 days"]),
                random.choice(["ordered", "strict", "any"]), random.choice(["best", "first"]),
                random.choice(["user", "user", "account", "session"]),
                random.choice([None, None, "plan"]), random.choice(["first", "last"]),
                random.choice([None, None, Jsonb(["refund"])]),
            ),
        )  # fmt: skip
        db.execute(
            "SELECT spectrum.define_retention(%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                f"retention {number}", random.choice([None, "visit"]),
                random.choice([None, "visit", "buy"]), random.choice(["day", "week", "month"]),
                random.choice([0, 2, 5]), random.choice(["first", "recurring"]),
                random.choice(["on", "on_or_after"]),
                random.choice([None, None, Jsonb({"plan": "pro"})]),
            ),
        )  # fmt: skip
    metrics = {
        "bought": {"p_kind": "proportion", "p_event": "buy"},
        "spent": {"p_kind": "mean", "p_event": "buy", "p_property": "revenue"},
        "per visit": {"p_kind": "ratio", "p_event": "buy", "p_denominator_event": "visit"},
    }
    for name, options in metrics.items():
        named = ", ".join(f"{option} => %s" for option in options)
        db.execute(
            f"SELECT spectrum.define_metric(%s, {named}, p_window => %s)",
            (name, *options.values(), random.choice([None, timedelta(days=2)])),
        )
    db.execute(
        "SELECT spectrum.define_experiment('exp', %s, 'a', %s, p_to => %s)",
        (
            Jsonb({"a": 1, "b": 1}), Jsonb(list(metrics)),
            random.choice([None, START + timedelta(days=3)]),
        ),
    )  # fmt: skip


def any_event(random: Random) -> Payload:
    user = random.randrange(7)
    kind = random.choice(["visit", "visit", "visit", "buy", "buy", "refund", "experiment_exposure"])
    properties: dict[str, Any] = {"plan": random.choice(["pro", "free"])}
    if kind in ("buy", "refund") and random.random() < 0.8:
        properties["revenue"] = random.choice([0, 5, 7.5, -2])
        properties["currency"] = random.choice(["USD", "USD", "EUR"])
    if kind == "experiment_exposure":
        seen = "ab"[user % 2] if random.random() < 0.9 else random.choice("abc")
        properties |= {"experiment": "exp", "variant": seen}
    at = START + timedelta(minutes=random.choice([1, 15, 60]) * random.randrange(5 * 24))
    account = f"x{user % 2}" if random.random() < 0.9 else random.choice(["x1", None])
    event = {"event_type": kind, "occurred_at": at.isoformat(), "properties": properties}
    if user:
        event["user_id"] = f"u{user}"
    if account:
        event["account_id"] = account
    return event


@settings(exploring, max_examples=3)
@given(random=st.randoms(use_true_random=True), size=st.sampled_from([5, 20, 60]))
def test_cells_and_events_tell_the_same(db: psycopg.Connection, random: Random, size: int) -> None:
    with db.transaction(force_rollback=True):
        db.execute("SET LOCAL timezone = 'America/St_Johns'")
        zone = random.choice(["UTC", "Europe/Berlin", "Asia/Kathmandu"])
        db.execute("SELECT spectrum.configure('timezone', %s)", (zone,))
        define(db, random)
        for _ in range(2):
            load(db, [any_event(random) for _ in range(size)])
            db.execute("CALL spectrum.refresh_analytics()")
        assert db.execute("SELECT * FROM spectrum.verify() WHERE NOT ok").fetchall() == []
        behind = list(traced(db, NUMBERS))
        assert len(set(behind)) == len(behind)
        assert set(explained(db, NUMBERS)) == set(behind)


PROPERTIES: dict[str, dict[str, list[Any]]] = {
    "page_view": {"path": ["/", "/a", ""], "utm_source": ["ads"], "utm_medium": ["cpc", "email"],
                  "referrer": ["https://google.com/", "https://x.org/"]},
    "click": {"a": [1, "x", None], "(other properties)": [1], "revenue": [5, -2]},
    "feature_used": {"feature": ["search", "export", "buy", 5, "", None]},
    "request": {"endpoint": ["/x", "/y", ""], "latency_ms": [5, "7.5", -1, "x"],
                "status": [200, 500, "503"], "error": [True, False], "service": ["web", ""],
                "version": ["1", "2"]},
    "api_request": {"endpoint": ["/x"], "status": [200, 500], "version": ["1"]},
    "error": {"service": ["web"], "version": ["1"]},
    "subscription_started": {"mrr": [10, 20], "subscription_id": ["s", "t"],
                             "currency": ["USD", "EUR"]},
    "subscription_changed": {"mrr": [0, 10, 15, "x"], "subscription_id": ["s", "t"],
                             "currency": ["USD", "EUR"]},
    "subscription_cancelled": {"subscription_id": ["s", "t"]},
}  # fmt: skip


def any_deed(random: Random, start: datetime) -> Payload:
    user = random.randrange(4)
    kind = random.choice([*PROPERTIES, "page_view", "subscription_changed"])
    sure = ("mrr", "feature")
    properties = {
        name: random.choice(values)
        for name, values in PROPERTIES[kind].items()
        if name in sure or random.random() < 0.6
    }
    at = start + timedelta(days=random.choice([0, 0, 1, 1, 2, 5, 8, 9, 33]), hours=12)
    at += timedelta(minutes=random.choice([1, 7, 60]) * random.randrange(20))
    event = {"event_type": kind, "occurred_at": at.isoformat(), "properties": properties}
    if user:
        event["user_id"] = f"u{user}"
    if random.random() < 0.9:
        event["account_id"] = f"x{user % 2}" if random.random() < 0.8 else "x1"
    if random.random() < 0.5:
        event["geo"] = {"country": random.choice(["DE", "US"])}
    return event


@pytest.mark.parametrize("seed", range(3))
def test_more_cells_and_events_tell_the_same(db: psycopg.Connection, seed: int) -> None:
    random, size = Random(seed), (4, 8, 12)[seed % 3]
    # Of minutes the last week is kept.
    start = random.choice([datetime(2024, 3, 20), datetime.now() - timedelta(days=9, hours=12)])
    with db.transaction(force_rollback=True):
        db.execute("SET LOCAL timezone = 'America/St_Johns'")
        zone = random.choice(["UTC", "Europe/Berlin", "Asia/Kathmandu"])
        db.execute("SELECT spectrum.configure('timezone', %s)", (zone,))
        db.execute("SELECT spectrum.define_feature('export', 'click')")
        db.execute("SELECT spectrum.define_feature('fast', NULL, %s)", (Jsonb({"version": "1"}),))
        db.execute("SELECT spectrum.define_attribution('clicks', %s)", (Jsonb("click"),))
        db.execute("SELECT spectrum.define_paths('after a page', 'page_view', 2)")
        db.execute("SELECT spectrum.define_attribution('uses', %s, 'first')",
                   (Jsonb({"event": "feature_used", "where": {"feature": "buy"}}),))  # fmt: skip
        for _ in range(2):
            load(db, [any_deed(random, start.replace(tzinfo=UTC)) for _ in range(size)])
            db.execute("CALL spectrum.refresh_analytics()")
        assert db.execute("SELECT * FROM spectrum.verify() WHERE NOT ok").fetchall() == []
        behind = list(traced(db, MORE_NUMBERS))
        assert len(set(behind)) == len(behind)
        assert set(explained(db, MORE_NUMBERS)) == set(behind)


def test_rare_cells_and_events_tell_the_same(db: psycopg.Connection) -> None:
    """A movement of several events, one that shrinks, a user who comes back, too many names."""
    paid = [("started", 0, 10), ("changed", 45, 30), ("changed", 3000, 20), ("cancelled", 9000, 0),
            ("started", 99000, 5)]  # fmt: skip
    events = [
        {"event_type": f"subscription_{kind}", "user_id": "u", "account_id": "x",
         "occurred_at": (START + timedelta(minutes=at)).isoformat(), "properties": {"mrr": mrr}}
        for kind, at, mrr in paid
    ]  # fmt: skip
    many = {f"p{number}": number for number in range(202)}
    load(db, [*events, events[0] | {"event_type": "many", "properties": many}])
    db.execute("CALL spectrum.refresh_analytics()")
    views = ("mrr_movements", "lifecycle_periods", "event_catalog")
    behind = set(traced(db, views))
    assert set(explained(db, views)) == behind
    measures = {dict(cell)["measure"] for _, cell, _ in behind}
    assert measures >= {"contraction", "churn", "reactivation", "resurrecting"}
    assert "(other properties)" in {dict(cell).get("property") for _, cell, _ in behind}


def test_steps_at_one_time_stand_once_each(db: psycopg.Connection) -> None:
    """In any order, two events of one instant are two steps of an entry together."""
    db.execute("""SELECT spectrum.define_funnel('twice', '["visit", "visit"]', '1 hour', 'any')""")
    visit = {"event_type": "visit", "user_id": "u", "occurred_at": "2024-03-25T12:00:00Z"}
    load(db, [visit, visit | {"geo": {"country": "DE"}}])
    db.execute("CALL spectrum.refresh_analytics()")
    behind = list(traced(db, ["conversion_funnels", "funnel_days"]))
    assert len(set(behind)) == len(behind) > 0
    assert set(explained(db, ["conversion_funnels", "funnel_days"])) == set(behind)


def test_an_event_from_raw_to_cells(db: psycopg.Connection) -> None:
    event = {
        "event_id": str(UUID(int=1)), "event_type": "buy", "user_id": "u", "account_id": "x",
        "occurred_at": "2024-03-25T12:00:00Z", "properties": {"revenue": 5},
    }  # fmt: skip
    load(db, [event, event | {"user_id": "other"}, {"user_id": "no type"}])
    db.execute("CALL spectrum.refresh_analytics()")
    query = "SELECT what, view_name, rule, detail FROM spectrum.explain_event(%s)"
    rows = db.execute(query, (UUID(int=1),)).fetchall()
    assert [row[0] for row in rows[:4]] == ["raw event", "copy", "fact", "session"]
    assert {row[1] for row in rows[4:]} == {
        "daily_events", "active_users", "revenue_summary", "retention_cohorts", "sessions_daily",
        "lifecycle_periods", "stickiness_periods", "event_catalog",
    }  # fmt: skip
    raw, copy, fact, session = (row[3] for row in rows[:4])
    assert (raw["status"], raw["payload"], raw["seq"] < copy["seq"]) == ("done", event, True)
    assert (copy["copy_of"], fact["user_id"], session["events"]) == (raw["id"], "u", 1)
    # By the id of a raw row: of the event itself, of a copy, of one that failed.
    assert db.execute(query, (raw["id"],)).fetchall() == rows
    told = db.execute(query, (copy["id"],)).fetchall()
    assert [row[0] for row in told[:2]] == ["raw event", "fact"]
    assert told[0][2].startswith("It repeats") and told[1:] == rows[2:]
    failed = db.execute("SELECT id FROM raw_events WHERE status = 'failed'").fetchone()
    ((what, _, rule, detail),) = db.execute(query, failed).fetchall()
    assert (what, rule[:17], detail["status"]) == ("raw event", "It cannot be read", "failed")
    assert "event_type" in detail["error_msg"]
    load(db, [])
    db.execute("INSERT INTO raw_events (id, payload) VALUES (%s, '{}')", (UUID(int=9),))
    ((what, _, rule, _),) = db.execute(query, (UUID(int=9),)).fetchall()
    assert (what, rule) == ("raw event", "It waits to be processed.")


def test_limit_takes_the_first(db: psycopg.Connection) -> None:
    load(db, [{"event_type": "visit", "user_id": "u", "occurred_at": f"2024-03-25T{hour}:00:00Z"}
              for hour in range(10, 20)])  # fmt: skip
    query = "SELECT occurred_at FROM analytics.trace('active_users', %s, %s) ORDER BY occurred_at"
    found = db.execute(query, (Jsonb({"day": "2024-03-25"}), 3)).fetchall()
    assert [at.hour for (at,) in found] == [10, 11, 12]
    assert db.execute(query, (Jsonb({"day": "2024-03-25"}), 0)).fetchall() == []


ERRORS = {
    "trace('unknown', '{}')": "p_view",
    "trace(NULL, '{}')": "p_view",
    "trace('active_users', NULL)": "p_cell",
    "trace('active_users', '[]')": "p_cell",
    "trace('active_users', '{}')": "p_cell",
    "trace('active_users', '{\"day\": \"2024-03-25\", \"step\": 1}')": "p_cell",
    "trace('active_users', '{\"day\": \"2024-02-30\"}')": "p_cell.day",
    "trace('active_users', '{\"day\": \"yesterday\"}')": "p_cell.day",
    "trace('active_users', '{\"day\": \"2024-03-25\", \"measure\": \"x\"}')": "p_cell.measure",
    "trace('active_users', '{\"day\": \"2024-03-25\"}', -1)": "p_limit",
    "trace('sessions_daily', '{\"day\": \"2024-03-25\", \"breakdown\": \"x\"}')":
        "p_cell.breakdown",
    "trace('throughput_minutes', '{\"minute\": \"2024-03-25T10:00:07Z\"}')": "p_cell.minute",
    "trace('throughput_minutes', '{\"minute\": \"2024-02-30T10:00Z\"}')": "p_cell.minute",
    "trace('lifecycle_periods', '{\"period_kind\": \"year\", \"period\": \"2024-01-01\"}')":
        "p_cell.period_kind",
    "trace('lifecycle_periods', '{\"period_kind\": \"month\", \"period\": \"2024-01-02\"}')":
        "p_cell.period",
    "trace('conversion_funnels', '{\"funnel\": \"x\", \"step\": 1}')": "p_cell.funnel",
    "trace('retention_cohorts', '{\"retention\": \"x\", \"cohort\": \"2024-03-25\","
    " \"period\": 0}')": "p_cell.retention",
    "trace('retention_cohorts', '{\"retention\": \"default\", \"cohort\": \"2024-03-25\","
    " \"period\": -1}')": "p_cell.period",
}  # fmt: skip


def test_wrong_arguments_are_named(db: psycopg.Connection) -> None:
    db.execute("CALL spectrum.refresh_analytics()")
    for call, named in ERRORS.items():
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=named) as caught:
            db.execute(f"SELECT * FROM analytics.{call}")
        assert caught.value.diag.message_hint, call
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_event_id"):
        db.execute("SELECT * FROM spectrum.explain_event(%s)", (UUID(int=5),))


def test_a_view_without_glass_is_left_out(db: psycopg.Connection) -> None:
    """Every standing view is either traced both ways or not at all."""
    found = db.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'analytics'::regnamespace"
        " AND proname ~ '^_(trace|cells)_'"
    ).fetchall()
    names = {name for (name,) in found}
    views = {name.removeprefix("_trace_") for name in names if name.startswith("_trace_")}
    assert views >= set(ALL_NUMBERS)
    assert names == {f"_{way}_{view}" for way in ("trace", "cells") for view in views}
