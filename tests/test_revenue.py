"""Revenue: against an oracle, and by hand what is an order, a refund, a payer."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction

import psycopg
import pytest
from histories import amounts, epochs, exploring, load, loaded, payloads, properties, ranges
from histories import timezones as zones
from hypothesis import given
from hypothesis import strategies as st
from oracle_events import Calendar, read_events
from oracle_revenue import revenue, standing_revenue

ASK = "SELECT * FROM analytics.revenue(%s, %s, %s, %s)"
money = properties(revenue=amounts, currency=st.sampled_from(["USD", "EUR", "eur"]))


def same(rows: list[tuple[object, ...]], expected: list[tuple[object, ...]]) -> bool:
    """Equal; quotients, which numeric rounds, to 15 digits."""
    return len(rows) == len(expected) and all(
        tuple(row[:-2]) == tuple(wanted[:-2])
        and all(map(same_quotient, row[-2:], wanted[-2:]))
        for row, wanted in zip(rows, expected, strict=True)
    )  # fmt: skip


def same_quotient(value: Decimal | None, expected: Fraction | None) -> bool:
    if value is None or expected is None:
        return value is expected
    return abs(Fraction(value) - expected) <= abs(expected) / 10**15 + Fraction(1, 10**15)


@exploring
@given(data=st.data(), timezone=zones, epoch=epochs)
def test_any_history(
    db: psycopg.Connection, data: st.DataObject, timezone: str, epoch: datetime
) -> None:
    history = data.draw(payloads(epoch, ["visit", "purchase", "refund"], money))
    start, end = data.draw(ranges(epoch))
    account = data.draw(st.sampled_from([None, "a1", "nobody"]))
    currency = data.draw(st.sampled_from([None, "EUR", "usd", "JPY"]))
    events, calendar = read_events(history), Calendar(timezone)
    with loaded(db, history, timezone):
        rows = db.execute(ASK, (start, end, account, currency)).fetchall()
        code = currency and currency.upper()
        assert same(rows, revenue(events, calendar, start, end, account, code))
        db.execute("CALL spectrum.refresh_analytics()")
        standing = db.execute(
            "SELECT account_id, day, currency, orders, gross, refunds, net, paying_users,"
            " active_users, arpu, arppu FROM analytics.revenue_summary"
            ' ORDER BY account_id COLLATE "C", day, currency'
        ).fetchall()
        assert same(standing, standing_revenue(events, calendar))


def sale(amount: object, user: str | None = "u1", **more: object) -> dict[str, object]:
    payload = {
        "event_type": "purchase", "occurred_at": "2024-05-01T12:00:00Z", "account_id": "a1",
        "properties": {"revenue": amount},
    }  # fmt: skip
    return payload | ({"user_id": user} if user else {}) | more


def test_orders_refunds_and_payers(db: psycopg.Connection) -> None:
    load(db, [
        sale("19.99"), sale(0.1), sale(0.2), sale(0, "u2"), sale(5, None),
        sale(-3, "u3"), sale(4, "u4", event_type="refund"), sale(-1, "u4", event_type="refund"),
        {"event_type": "visit", "occurred_at": "2024-05-01T13:00:00Z", "user_id": "u5"},
        {"event_type": "visit", "occurred_at": "2024-05-02T13:00:00Z", "user_id": "u5"},
    ])  # fmt: skip
    rows = db.execute("SELECT * FROM analytics.revenue()").fetchall()
    gross, refunds = Decimal("25.29"), Decimal(8)
    net = gross - refunds
    assert [row[:-2] for row in rows] == [(date(2024, 5, 1), "USD", 5, gross, refunds, net, 1, 5)]
    assert same_quotient(rows[0][-2], Fraction(net) / 5)
    assert same_quotient(rows[0][-1], Fraction(net))


def test_currencies_and_settings(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('currency', 'EUR')")
    db.execute("SELECT spectrum.configure('refund_events', '{chargeback}')")
    load(db, [sale(2), sale(3, event_type="chargeback"), sale(4, event_type="refund"),
              sale(9, properties={"revenue": 9, "currency": "usd"})])  # fmt: skip
    rows = db.execute("SELECT currency, orders, gross, refunds FROM analytics.revenue()").fetchall()
    assert rows == [("EUR", 2, 6, 3), ("USD", 1, 9, 0)]
    only = "SELECT currency FROM analytics.revenue(p_currency => 'usd')"
    assert db.execute(only).fetchall() == [("USD",)]


def test_nobody_active_no_quotient(db: psycopg.Connection) -> None:
    load(db, [sale(7, None)])
    quotients = "SELECT active_users, paying_users, arpu, arppu FROM analytics.revenue()"
    assert db.execute(quotients).fetchall() == [(0, 0, None, None)]


def test_wrong_arguments_are_named(db: psycopg.Connection) -> None:
    for arguments, named in {
        "p_currency => 'euro'": "p_currency",
        "'2024-05-02', '2024-05-01'": "p_to",
    }.items():
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=named):
            db.execute(f"SELECT * FROM analytics.revenue({arguments})")


def test_an_order_made_again_while_a_refresh_is_at_work(db: psycopg.Connection) -> None:
    """One step is told that an order went, the next that it came, and its fact is there all the
    time: a batch read it again. Laid out by hand: it is a race."""
    order = {"event_type": "buy", "user_id": "u", "occurred_at": "2024-02-01T00:00:00Z"}
    db.execute(
        "INSERT INTO raw_events (payload) VALUES (%s)",
        (json.dumps(order | {"properties": {"revenue": 5}}),),
    )
    db.execute("CALL spectrum.process_batch()")
    db.execute("CALL spectrum.refresh_analytics()")
    shown = "SELECT orders, gross, paying_users FROM analytics.revenue_summary"
    assert db.execute(shown).fetchall() == [(1, 5, 1)]
    with db.transaction():
        for sign in (-1, 1):
            db.execute("SELECT spectrum._clear_news()")
            db.execute(
                """
                INSERT INTO pg_temp.spectrum_news (sign, scope, user_key, account_key,
                    event_type_key, geo_key, occurred_at, event_id, properties, revenue, currency)
                SELECT %s, account_key, user_key, account_key, event_type_key, geo_key,
                    occurred_at, event_id, properties, revenue, currency
                FROM warehouse.fact_events
                """,
                (sign,),
            )
            db.execute("SELECT spectrum._scope_news()")
            db.execute("""
                SELECT analytics._maintain_revenue(report_id, 9223372036854775807)
                FROM spectrum.reports WHERE kind = 'revenue' AND state = 'served'
            """)
    assert db.execute(shown).fetchall() == [(1, 5, 1)]
