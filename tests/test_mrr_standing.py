"""Standing recurring revenue, whatever way the events came."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from random import Random
from typing import Any

import psycopg
from histories import epochs, exploring
from hypothesis import given
from hypothesis import strategies as st
from interleaving import arrive, other
from oracle_events import ALL, Calendar
from oracle_mrr import mrr_movements
from psycopg.rows import dict_row
from test_mrr import check, load, odd_events, read_subscriptions, subscribed, subscription_events

ACCOUNTS = (ALL, "a1", "a2")


def shown(db: psycopg.Connection, account: str, kind: str) -> list[dict[str, Any]]:
    rows = db.cursor(row_factory=dict_row).execute(
        "SELECT * FROM analytics.mrr_movements WHERE account_id = %s AND period_kind = %s"
        " ORDER BY period, currency", (account, kind),
    ).fetchall()  # fmt: skip
    hidden = ("account_id", "period_kind", "as_of")
    return [{name: row[name] for name in row if name not in hidden} for row in rows]


@exploring
@given(
    data=st.data(),
    randoms=st.randoms(use_true_random=True),
    epoch=epochs,
    week_start=st.sampled_from([1, 7]),
)
def test_any_way_to_arrive(
    db: psycopg.Connection, data: st.DataObject, randoms: Random, epoch: datetime, week_start: int
) -> None:
    is_odd = data.draw(st.booleans())
    history = data.draw(odd_events(epoch)) if is_odd else subscription_events(epoch, randoms)
    history = [
        each | randoms.choice([{}, {"user_id": randoms.choice(["u1", "u2", "u3"])}])
        for each in history
    ]
    history.append({"event_type": "visit", "occurred_at": (epoch + timedelta(days=50)).isoformat()})
    with db.transaction(force_rollback=True):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        counted, timezone = arrive(db, history, randoms, "mrr", other(randoms, history))
        # Two events of one time, place and subscription are in the order of their event_id.
        counted.sort(key=lambda each: each["event_id"])
        events, calendar = read_subscriptions(counted), Calendar(timezone, week_start)
        for account in ACCOUNTS:
            for kind in ("week", "month"):
                name = None if account == ALL else account
                check(shown(db, account, kind), mrr_movements(events, calendar, kind, account=name))
        others = db.execute(
            "SELECT DISTINCT account_id FROM analytics.mrr_movements WHERE account_id <> ALL (%s)",
            (list(ACCOUNTS),),
        ).fetchall()
        assert others == []


def test_the_default_currency_can_change(db: psycopg.Connection) -> None:
    load(db, [subscribed("started", "2024-01-10", mrr=10),
              subscribed("started", "2024-01-11", "two", mrr=5, currency="USD")])  # fmt: skip
    ask = (
        "SELECT account_id, currency, new FROM analytics.mrr_movements WHERE period_kind = 'month'"
    )
    db.execute("CALL spectrum.refresh_analytics()")
    before = {("*", "USD", 15), ("acme", "USD", 10), ("two", "USD", 5)}
    assert set(db.execute(ask)) == before
    db.execute("SELECT spectrum.configure('currency', 'EUR')")
    assert set(db.execute(ask)) == before
    db.execute("CALL spectrum.refresh_analytics()")
    assert set(db.execute(ask)) == {
        ("*", "EUR", 10), ("*", "USD", 5), ("acme", "EUR", 10), ("two", "USD", 5),
    }  # fmt: skip


def test_what_was_withdrawn_leaves_no_row(db: psycopg.Connection) -> None:
    load(db, [subscribed("started", "2024-01-10", mrr=10),
              subscribed("changed", "2024-03-10", mrr=20)])  # fmt: skip
    ask = "SELECT account_id, period, new FROM analytics.mrr_movements WHERE period_kind = 'month'"
    for mrr, expected in ((10, {("*", date(2024, 3, 1), 20), ("acme", date(2024, 3, 1), 20)}),
                          (20, set())):  # fmt: skip
        db.execute("CALL spectrum.refresh_analytics()")
        assert db.execute(ask).fetchall()
        db.execute(
            "UPDATE raw_events SET payload = payload - 'event_type', status = 'pending'"
            " WHERE payload -> 'properties' -> 'mrr' = %s::text::jsonb", (mrr,),
        )  # fmt: skip
        db.execute("CALL spectrum.process_batch()")
        db.execute("CALL spectrum.refresh_analytics()")
        assert set(db.execute(ask)) == expected
