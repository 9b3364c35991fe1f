"""What is read in a payload, and what a payload that cannot be read fails with. No payload may
abort its batch, whatever it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pipeline import event, insert, process, prove, rows, statuses, value
from readings import EPOCH, microseconds, outcomes, process_all


def check(
    db: psycopg.Connection,
    cases: Sequence[tuple[Any, Any]],
    session: Mapping[str, str] | None = None,
) -> None:
    """Each case: a payload, and either the fields that count or the message it fails with."""
    found = process_all(db, [payload for payload, _ in cases], session)
    wrong = []
    for (payload, expected), outcome in zip(cases, found, strict=True):
        if isinstance(expected, str):
            actual: Any = outcome.error_msg
        elif outcome.error_msg is None:
            actual = {name: outcome.fields[name] for name in expected}
        else:
            actual = outcome.error_msg
        if actual != expected:
            wrong.append((str(payload)[:200], expected, actual))
    assert wrong == []


def with_field(name: str, cases: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Cases that give a field's value and what is read there; a message names the field itself."""
    return [
        (
            event(**{name: given}),
            f"{name}: {read_as}" if str(read_as).startswith("expected") else {name: read_as},
        )
        for given, read_as in cases
    ]


def md5(text: str) -> UUID:
    return UUID(hashlib.md5(text.encode()).hexdigest())


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


# Field by field ----------------------------------------------------------------------------------


def test_payload(db: psycopg.Connection) -> None:
    check(
        db,
        [
            ("17", "payload: expected a JSON object, got 17"),
            ("null", "payload: expected a JSON object, got null"),
            ("true", "payload: expected a JSON object, got true"),
            ('"{}"', 'payload: expected a JSON object, got "{}"'),
            ('[{"event_type": "a"}]', 'payload: expected a JSON object, got [{"event_type": "a"}]'),
            (nested(5_000), f"payload: expected a JSON object, got {'[' * 100}..."),
            ('"one\\ntwo"', 'payload: expected a JSON object, got "one\\ntwo"'),
            ("{}", "event_type: expected a text of 1 to 200 characters, got nothing"),
            # Names are as written, of two equal ones the last counts, and further ones are free.
            (
                '{"Event_Type": "a"}',
                "event_type: expected a text of 1 to 200 characters, got nothing",
            ),
            ('{"event_type": 1, "event_type": "a", "x": {}}', {"event_type": "a"}),
        ],
    )


def test_event_type(db: psycopg.Connection) -> None:
    expected = "expected a text of 1 to 200 characters, got "
    check(
        db,
        with_field(
            "event_type",
            [
                ("a", "a"),
                (" ", " "),
                ("0", "0"),
                ("'; DROP TABLE raw_events; --", "'; DROP TABLE raw_events; --"),
                ("zwei\nZeilen", "zwei\nZeilen"),
                ("\U0001d11e" * 200, "\U0001d11e" * 200),
                ("x" * 201, expected + '"' + "x" * 99 + "..."),
                ("", expected + '""'),
                (None, expected + "null"),
                (1, expected + "1"),
                (True, expected + "true"),
                (["a"], expected + '["a"]'),
                ({"a": 1}, expected + '{"a": 1}'),
            ],
        ),
    )


def test_ids(db: psycopg.Connection) -> None:
    expected = "expected a text of at most 200 characters, got "
    uuid = "6BA7B810-9DAD-11D1-80B4-00C04FD430C8"
    cases = [
        ("a", "a"),
        ("", ""),
        (None, ""),
        (" ", " "),
        ("-", "-"),
        (uuid, uuid),
        (0, "0"),
        (-17, "-17"),
        (10**30, "1" + "0" * 30),
        (1.50, "1.5"),
        ("x" * 200, "x" * 200),
        ("\u00e9" * 200, "\u00e9" * 200),
        ("x" * 201, expected + '"' + "x" * 99 + "..."),
        ("x" * 1_000_000, expected + '"' + "x" * 99 + "..."),
        (10**200, expected + "1" + "0" * 99 + "..."),
        (True, expected + "true"),
        (["a"], expected + '["a"]'),
        ({}, expected + "{}"),
    ]
    reserved = "expected a name other than the reserved *, got "
    check(
        db,
        with_field("user_id", [*cases, ("*", "*")])
        + with_field("account_id", [*cases, ("*", reserved + '"*"'), ("**", "**")])
        + [('{"event_type": "a", "user_id": 1.50}', {"user_id": "1.50"})]
        + [('{"event_type": "a", "user_id": 1e3}', {"user_id": "1000"})]
        + [
            (
                f'{{"event_type": "a", "user_id": {nested(5_000)}}}',
                f"user_id: {expected}{'[' * 100}...",
            )
        ],
    )


def test_event_id(db: psycopg.Connection) -> None:
    """What is no UUID becomes one by md5; what is missing is the raw row's own id."""
    expected = "expected a text of at most 200 characters, got "
    uuid = UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
    check(
        db,
        with_field(
            "event_id",
            [
                (str(uuid).upper(), uuid),
                ("a", UUID("0cc175b9-c0f1-b6a8-31c3-99e269772661")),
                ("0", UUID("cfcd2084-95d5-65ef-66e7-dff9f98764da")),
                ("\u00e9", md5("\u00e9")),
                (str(uuid)[:-1], md5(str(uuid)[:-1])),
                (str(uuid)[:-1] + "g", md5(str(uuid)[:-1] + "g")),
                (str(uuid) + "\n", md5(str(uuid) + "\n")),
                ("{" + str(uuid) + "}", md5("{" + str(uuid) + "}")),
                ("-" * 36, md5("-" * 36)),
                ("x" * 201, expected + '"' + "x" * 99 + "..."),
                (False, expected + "false"),
                ([str(uuid)], expected + f'["{uuid}"]'),
            ],
        ),
    )
    db.execute("DELETE FROM raw_events")
    found = process_all(
        db,
        [
            event(),
            event(event_id=None),
            event(event_id=""),
            event(event_id=uuid.hex),
            event(event_id=12),
            event(event_id="12"),
            '{"event_type": "a", "event_id": 12.0}',
        ],
    )
    ids = [outcome.fields["event_id"] for outcome in found]
    assert ids[:3] == [outcome.id for outcome in found[:3]]
    assert ids[3:] == [uuid, md5("12"), md5("12"), md5("12.0")]
    assert statuses(db) == {"done": 7}


TIMES = [
    # With a zone, without one, without a time, without seconds.
    ("2024-02-29T12:34:56.789Z", "2024-02-29T12:34:56.789+00:00"),
    ("2024-02-29 12:34:56.123456+05:30", "2024-02-29T07:04:56.123456+00:00"),
    ("2024-02-29T12:34:56 -0330", "2024-02-29T16:04:56+00:00"),
    ("2024-02-29T12:34+14", "2024-02-28T22:34:00+00:00"),
    ("2024-02-29T12:34:56", "2024-02-29T12:34:56+00:00"),
    ("2024-02-29T12:34", "2024-02-29T12:34:00+00:00"),
    ("2024-02-29", "2024-02-29T00:00:00+00:00"),
    ("2000-01-01T00:00:00Z", "2000-01-01T00:00:00+00:00"),
    ("1999-12-31T23:00:00-02:00", "2000-01-01T01:00:00+00:00"),
    ("2000-02-29", "2000-02-29T00:00:00+00:00"),
    ("2024-03-31T02:30:00+01:00", "2024-03-31T01:30:00+00:00"),
    # Fractions are rounded to microseconds; a leap second is the next one.
    ("2024-01-01T00:00:00.1234567Z", "2024-01-01T00:00:00.123457+00:00"),
    ("2024-01-01T00:00:00.123456789", "2024-01-01T00:00:00.123457+00:00"),
    ("2023-12-31T23:59:59.9999999Z", "2024-01-01T00:00:00+00:00"),
    ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00+00:00"),
    # Epoch seconds, with a fraction, and milliseconds, as number and as text.
    (1709210096, "2024-02-29T12:34:56+00:00"),
    (1709210096.123456, "2024-02-29T12:34:56.123456+00:00"),
    (1709210096123, "2024-02-29T12:34:56.123+00:00"),
    ("1709210096", "2024-02-29T12:34:56+00:00"),
    ("1709210096123", "2024-02-29T12:34:56.123+00:00"),
    ("1709210096.5", "2024-02-29T12:34:56.500+00:00"),
]
NO_TIMES = [
    "", " ", "now", "today", "epoch", "infinity", "-infinity", "yesterday", "allballs", "NaN",
    "2023-02-29", "2100-02-29", "2024-02-30", "2024-04-31", "2024-00-10", "2024-13-01",
    "2024-01-00", "2024-01-32", "2024-1-1", "24-01-01", "99999-01-01", "0000-01-01", "-2024-01-01",
    "2024-01-01T24:00:00Z", "2024-01-01T12:60:00Z", "2024-01-01T12:00:61Z", "2024-01-01T12",
    "2024-01-01T12:00:00+16:00", "2024-01-01T12:00:00+05:60", "2024-01-01T12:00:00 Europe/Berlin",
    "2024-01-01T12:00:00 CET", "2024-01-01T12:00:00.Z", "2024-01-01T12:00:00.1234567890Z",
    "2024-01-01T12:00:00Z ", " 2024-01-01", "2024-01-01\n", "2024-01-01T12:00:00ZZ", "01/02/2024",
    "Feb 29 2024", "2024-01-01 BC", "2024-W01-1", "20240229T123456Z", "1709210096s", "0x10",
    "\u0662\u0660\u0662\u0664-01-01", "1e9", "--1", 10**14, -(10**14), 10**400, 1e300, True,
    ["2024-01-01"], {"seconds": 1},
]  # fmt: skip
OUT_OF_RANGE = [
    "1999-12-31T23:59:59.999999Z", "1970-01-01", "1000-01-01", 0, -1, "-1", 1e-300, 20240229,
    "20240229", 946684799.999999, "2000-01-01T00:30:00+01:00",
]  # fmt: skip
TOO_LATE = ["9999-12-31T23:59:59Z", "9999-12-31T23:59:60-15:59", 99999999999, 99999999999999]
NO_TIME = "expected an ISO 8601 timestamp or epoch seconds or milliseconds, got "
TOO_EARLY = "expected a time from 2000-01-01 00:00:00 UTC (config.earliest_event) on, got "
FUTURE = "expected a time up to received_at + 01:00:00 (config.max_clock_skew), got "


def shown(given: Any) -> str:
    """As a message shows it: JSON, numbers without an exponent, at most 100 characters."""
    if isinstance(given, float):
        text = format(Decimal(repr(given)), "f")
    else:
        text = json.dumps(given, ensure_ascii=False)
    return text if len(text) <= 100 else text[:100] + "..."


@pytest.mark.parametrize("field", ["occurred_at", "timestamp"])
def test_time(db: psycopg.Connection, field: str) -> None:
    cases: list[tuple[Any, Any]] = [
        ({"event_type": "a", field: given}, {"occurred_at": microseconds(read_as)})
        for given, read_as in TIMES
    ]
    for givens, expected in ((NO_TIMES, NO_TIME), (OUT_OF_RANGE, TOO_EARLY), (TOO_LATE, FUTURE)):
        cases += [
            ({"event_type": "a", field: given}, f"{field}: {expected}{shown(given)}")
            for given in givens
        ]
    tiny = f"1e-{16_000}"
    cases.append(
        (f'{{"event_type": "a", "{field}": {tiny}}}', f"{field}: {TOO_EARLY}0.{'0' * 98}...")
    )
    # Neither the session's time zone nor its styles matter.
    settings = {"timezone": "Asia/Kolkata", "datestyle": "SQL, DMY", "intervalstyle": "iso_8601"}
    check(db, cases, settings)


def test_which_time(db: psycopg.Connection) -> None:
    """occurred_at before timestamp before received_at; null is missing, empty is not."""
    day = {"occurred_at": microseconds("2024-01-01T00:00:00+00:00")}
    check(
        db,
        [
            ({"event_type": "a", "occurred_at": "2024-01-01", "timestamp": "2023-01-01"}, day),
            ({"event_type": "a", "occurred_at": None, "timestamp": "2024-01-01"}, day),
            ({"event_type": "a", "occurred_at": "2024-01-01", "timestamp": "never"}, day),
            (
                {"event_type": "a", "occurred_at": "", "timestamp": "2024-01-01"},
                f'occurred_at: {NO_TIME}""',
            ),
        ],
    )
    db.execute("DELETE FROM raw_events")
    for outcome in process_all(db, [{"event_type": "a"}, {"event_type": "a", "timestamp": None}]):
        assert outcome.fields["occurred_at"] == (outcome.received_at - EPOCH) // timedelta(
            microseconds=1
        )


def test_the_range_of_times_follows_the_settings(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('earliest_event', '2024-06-01 12:00+00')")
    db.execute("SELECT spectrum.configure('max_clock_skew', '1 day')")
    received = datetime(2024, 6, 2, tzinfo=UTC)
    times = {
        "2024-06-01T11:59:59.999999Z": False,
        "2024-06-01T12:00:00Z": True,
        "2024-06-03T00:00:00Z": True,
        "2024-06-03T00:00:00.000001Z": False,
    }
    insert(db, [event(occurred_at=at) for at in times])
    db.execute("UPDATE raw_events SET received_at = %s", (received,))
    process(db)
    assert [outcome.error_msg is None for outcome in outcomes(db)] == list(times.values())


def test_geography(db: psycopg.Connection) -> None:
    expected = "expected a text of at most 200 characters, got "
    nowhere = {"country": "", "region": "", "city": ""}
    check(
        db,
        [
            (event(geo={"country": "DE", "region": "BE", "city": "Berlin", "zip": 1}),
                {"country": "DE", "region": "BE", "city": "Berlin"}),
            (event(geo={"city": "x" * 200}), {"country": "", "region": "", "city": "x" * 200}),
            (event(geo={"country": "\U0001d11e" * 200, "region": "\U0001d11e" * 200,
                        "city": "\U0001d11e" * 200}), {"city": "\U0001d11e" * 200}),
            (event(geo={"country": None, "region": ""}), nowhere),
            (event(geo={}), nowhere),
            (event(geo=None), nowhere),
            (event(geo="Berlin"), 'geo: expected an object, got "Berlin"'),
            (event(geo=["DE"]), 'geo: expected an object, got ["DE"]'),
            (event(geo=0), "geo: expected an object, got 0"),
            (event(geo={"country": 49}), f"geo.country: {expected}49"),
            (event(geo={"region": ["BE"]}), f'geo.region: {expected}["BE"]'),
            (event(geo={"city": {"name": "x"}}), f'geo.city: {expected}{{"name": "x"}}'),
            (event(geo={"city": "x" * 201}), f'geo.city: {expected}"{"x" * 99}...'),
        ],
    )  # fmt: skip


def test_properties(db: psycopg.Connection) -> None:
    deep = '{"a": ' * 5_000 + "1" + "}" * 5_000
    check(
        db,
        [
            (event(properties="x"), 'properties: expected an object, got "x"'),
            (event(properties=[{}]), "properties: expected an object, got [{}]"),
            (event(properties=False), "properties: expected an object, got false"),
            (event(properties={"a": [1, {"b": None}]}), {}),
            (event(properties=None), {}),
            (event(), {}),
            (f'{{"event_type": "a", "properties": {deep}}}', {}),
            (event(properties={"text": "x" * 1_000_000}), {}),
        ],
    )
    # As sent, whole; and an object where there are none.
    assert value(
        db,
        """
        SELECT bool_and(fact.properties
            = coalesce(nullif(raw.payload -> 'properties', 'null'), '{}'))
        FROM warehouse.fact_events AS fact
        JOIN warehouse.event_ledger USING (event_id)
        JOIN raw_events AS raw USING (seq)
        """,
    )


MONEY = [
    (12, "12"),
    (12.5, "12.5"),
    (-3, "-3"),
    (0, "0"),
    ("12.50", "12.50"),
    ("+1", "1"),
    ("-.5", "-0.5"),
    ("1.", "1"),
    ("1e2", "100"),
    ("1E-2", "0.01"),
    (999999999999999, "999999999999999"),
    ("999999999999999.99", "999999999999999.99"),
    ("-999999999999999.99", "-999999999999999.99"),
    ("0" * 950 + "1." + "9" * 48, "1." + "9" * 48),
    ("0." + "3" * 998, "0." + "3" * 998),
]
NO_MONEY = [
    "", " ", "1 ", " 1", "1,5", "1_000", "12 EUR", "$1", "NaN", "Infinity", "-inf", "0x1F", "1e",
    ".", "+", "--1", "\u0661", "1e15", "1000000000000000", "1e999", "0." + "3" * 999,
    "9" * 131_073, 10**15, -(10**15), 10**400,
    1e300, True, False, [1], {"amount": 1},
]  # fmt: skip


def test_money(db: psycopg.Connection) -> None:
    expected = "properties.revenue: expected a number below 10^15 in size, got "
    cases: list[tuple[Any, Any]] = [
        (
            event(properties={"revenue": given}),
            {"revenue": Decimal(read_as), "currency": "USD"},
        )
        for given, read_as in MONEY
    ]
    cases += [(event(properties={"revenue": given}), expected + shown(given)) for given in NO_MONEY]
    none = {"revenue": None, "currency": None}
    cases += [
        ('{"event_type": "a", "properties": {"revenue": 1e-400}}', {"revenue": Decimal("1e-400")}),
        (event(properties={"revenue": None}), none),
        (event(properties={"amount": 5, "currency": 5}), none),
    ]
    check(db, cases)


def test_currency(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('currency', 'CHF')")
    expected = "properties.currency: expected three letters, got "
    given_read: list[tuple[Any, Any]] = [
        ("EUR", {"currency": "EUR"}),
        ("eur", {"currency": "EUR"}),
        (None, {"currency": "CHF"}),
        ("", expected + '""'),
        ("EURO", expected + '"EURO"'),
        ("EU", expected + '"EU"'),
        ("E R", expected + '"E R"'),
        ("\u0130ST", expected + '"\u0130ST"'),
        ("EUR\n", expected + '"EUR\\n"'),
        (978, expected + "978"),
        (["EUR"], expected + '["EUR"]'),
    ]
    check(
        db,
        [(event(properties={"revenue": 1, "currency": c}), read_as) for c, read_as in given_read]
        + [(event(properties={"revenue": 1}), {"currency": "CHF"})],
    )


def test_the_property_that_carries_money_is_a_setting(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('revenue_property', 'order total')")
    check(
        db,
        [
            (event(properties={"order total": 5, "revenue": "x"}), {"revenue": Decimal(5)}),
            (event(properties={"revenue": 5}), {"revenue": None}),
            (
                event(properties={"order total": "x"}),
                'properties.order total: expected a number below 10^15 in size, got "x"',
            ),
        ],
    )


def test_the_slow_path_says_the_same(db: psycopg.Connection) -> None:
    """A batch is parted where the warehouse refuses an event; what others end as stays equal."""
    cases = [event(event_id=f"e{n}", occurred_at=at) for n, (at, _) in enumerate(TIMES)]
    cases += [event(occurred_at=at) for at in (*NO_TIMES, *OUT_OF_RANGE, *TOO_LATE)]
    cases += [event(properties={"revenue": amount}) for amount in (*NO_MONEY, *dict(MONEY))]
    cases += [17, {}, event(geo=1), event(account_id="*"), event(event_id="e1")]
    fast = process_all(db, cases)
    db.execute(
        "ALTER TABLE warehouse.fact_events ADD CONSTRAINT refuse"
        " CHECK (properties -> 'refuse' IS NULL)"
    )
    insert(db, [event(properties={"refuse": True})])
    db.execute("UPDATE raw_events SET status = 'pending'")
    assert process(db).claimed == len(cases) + 1
    *slow, refused = rows(
        db,
        """
        SELECT raw.error_msg, fact.event_id, fact.occurred_at, fact.revenue
        FROM raw_events AS raw LEFT JOIN warehouse.event_ledger USING (seq)
        LEFT JOIN warehouse.fact_events AS fact USING (event_id, occurred_at, user_key)
        ORDER BY seq
        """,
    )
    assert "refuse" in refused[0]
    assert [message for message, *_ in slow] == [outcome.error_msg for outcome in fast]
    prove(db)
