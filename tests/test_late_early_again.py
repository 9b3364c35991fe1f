"""Events late by months, out of order, ahead of the clock, sent again with another time or body,
files replayed, rows set back by hand, in any batches and refreshes: every standing view shows what
a clean load of the events that count shows in a database that saw nothing else."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

import psycopg
from conftest import MakeDb
from histories import Payload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle_reading import Unreadable, read
from pipeline import drain, insert, process, rows
from standing import define_all, differences, shown

EXAMPLES = int(os.environ.get("SPECTRUM_EXAMPLES", "5"))
TYPES = [
    "signup", "purchase", "page_view", "feature_used", "request", "error", "refund",
    "subscription_started", "subscription_changed", "subscription_cancelled",
    "experiment_exposure", "experiment_exposure",
]  # fmt: skip
START = datetime(2024, 3, 30, tzinfo=UTC)
# Within hours, around a change of the clock, months before, and years.
OFFSETS = [0, 1, 29, 30, 31, 59, 60, 61, 90, 600, 1_439, 1_440, 2_000, 10_080, 43_200, 131_400]

properties = st.fixed_dictionaries(
    {},
    optional={
        "plan": st.sampled_from(["pro", "free", "x" * 300, 1]),
        "revenue": st.sampled_from([5, "7.50", -3, 0, "0.0000"]),
        "currency": st.sampled_from(["EUR", "usd"]),
        "amount": st.sampled_from([1, 2.5, "12", "no"]),
        "mrr": st.sampled_from([10, 20.25, 0]),
        "subscription_id": st.sampled_from(["s1", "s2"]),
        "feature": st.sampled_from(["search", "export"]),
        "endpoint": st.sampled_from(["/a", "/b"]),
        "service": st.sampled_from(["web", "api"]),
        "latency_ms": st.sampled_from([1, 20, 3.5]),
        "status": st.sampled_from([200, 500]),
        "n": st.sampled_from([1, 2]),
        "page": st.sampled_from(["/", "/pricing"]),
        "utm_source": st.sampled_from(["ads", "mail"]),
        "experiment": st.just("e"),
        "variant": st.sampled_from(["control", "treatment"]),
    },
)
histories = st.lists(
    st.fixed_dictionaries(
        {
            "event_type": st.sampled_from(TYPES),
            "user_id": st.sampled_from(["u1", "u2", "u3", "u4"]),
            "properties": properties,
        },
        optional={
            "account_id": st.sampled_from(["a1", "a1", "a2"]),
            "geo": st.sampled_from([{"country": "DE"}, {"country": "US", "city": "x"}]),
        },
    ),
    min_size=20,
    max_size=60,
)


def moment(randoms: Random) -> str:
    at = START + timedelta(minutes=randoms.choice([-1, 1]) * randoms.choice(OFFSETS))
    if randoms.random() < 0.05:
        at = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=randoms.choice([50, 70]))
    return at.isoformat()


def sent(history: Sequence[Payload], randoms: Random) -> list[Payload]:
    """What arrives, in order: each event, and again some of it, as it was or otherwise."""
    events = [
        each | {"event_id": str(uuid.UUID(int=randoms.getrandbits(128))),
                "occurred_at": moment(randoms)}
        for each in history
    ]  # fmt: skip
    arriving = list(events)
    for copy in randoms.choices(events, k=len(events) // 3):
        again = dict(copy)
        for name in randoms.sample(["occurred_at", "event_type", "user_id", "properties"], 2):
            if randoms.random() < 0.6:
                again[name] = (
                    moment(randoms) if name == "occurred_at" else randoms.choice(events)[name]
                )
        arriving.insert(randoms.randrange(len(arriving) + 1), again)
    if randoms.random() < 0.3:
        arriving += arriving
    return arriving


def that_count(db: psycopg.Connection) -> list[Payload]:
    """Of each event the row received first that can be read, by the oracle."""
    counting: dict[str, Payload] = {}
    for raw_id, text, received_at in rows(
        db, "SELECT id, payload::text, received_at FROM raw_events ORDER BY seq"
    ):
        try:
            read(json.loads(text, parse_float=Decimal, parse_int=Decimal), raw_id, received_at)
        except Unreadable:
            continue
        payload = json.loads(text)
        counting.setdefault(payload["event_id"], payload)
    return list(counting.values())


def arrive(db: psycopg.Connection, waiting: list[Payload], randoms: Random) -> None:
    while waiting:
        size = randoms.choice([1, 5, 20, 60])
        part, waiting = waiting[:size], waiting[size:]
        insert(db, part)
        # What another worker holds is passed over, so the order of work is not that of arrival.
        held = randoms.random() < 0.4
        if held:
            db.execute(
                "UPDATE raw_events SET status = 'processing' WHERE status = 'pending'"
                " AND seq %% 3 = %s",
                (randoms.randrange(3),),
            )
        for _ in range(randoms.randrange(3)):
            process(db, randoms.choice([1, 3, 100]))
        if held:
            db.execute("UPDATE raw_events SET status = 'pending' WHERE status = 'processing'")
        if randoms.random() < 0.3:
            db.execute(
                "UPDATE raw_events SET status = 'pending'"
                " WHERE status IN ('done', 'failed') AND seq %% 4 = %s",
                (randoms.randrange(4),),
            )
        if randoms.random() < 0.3:
            db.execute("SELECT spectrum._refresh_some(%s)", (randoms.choice([3, 20, 1_000]),))
    drain(db, randoms.choice([7, 1_000]))
    db.execute("CALL spectrum.refresh_analytics()")


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(history=histories, randoms=st.randoms(use_true_random=True))
def compare(
    db: psycopg.Connection, clean: psycopg.Connection, history: list[Payload], randoms: Random
) -> None:
    with db.transaction(force_rollback=True), clean.transaction(force_rollback=True):
        arrive(db, sent(history, randoms), randoms)
        counting = that_count(db)
        insert(clean, counting)
        assert process(clean, 10_000).loaded == len(counting)
        clean.execute("CALL spectrum.refresh_analytics()")
        assert differences(shown(db), shown(clean)) == {}


def test_every_view_equals_that_of_a_clean_load(make_db: MakeDb, connect: Any) -> None:
    db, clean = (connect(make_db(name)) for name in ("any", "clean"))
    for each in (db, clean):
        define_all(each)
        each.execute("CALL spectrum.refresh_analytics()")
        assert rows(each, "SELECT DISTINCT state FROM spectrum.reports") == [("served",)]
    compare(db, clean)


def test_a_whole_file_again_changes_no_number(db: psycopg.Connection) -> None:
    define_all(db)
    randoms = Random(1)
    file = [
        json.dumps(
            {"event_type": randoms.choice(TYPES), "event_id": f"e{n}", "user_id": f"u{n % 7}",
             "account_id": f"a{n % 3}", "occurred_at": moment(randoms),
             "properties": {"plan": "pro", "revenue": n, "n": 1}}
        )
        for n in range(150)
    ]  # fmt: skip
    insert(db, file)
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    before = shown(db)
    for _ in range(2):
        insert(db, file)
        assert drain(db, 150).loaded == 0
        db.execute("UPDATE raw_events SET status = 'pending' WHERE seq % 2 = 0")
        drain(db)
        db.execute("CALL spectrum.refresh_analytics()")
        assert differences(shown(db), before) == {}
