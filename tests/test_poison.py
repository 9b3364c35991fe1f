"""Payloads that mean harm: none aborts its batch, each ends as a fact or fails with field and
value, the same way on every path, and none that became a fact breaks a standing view.

`make test-poison` runs it at length (SPECTRUM_POISON payloads)."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import poison
import psycopg
import pytest
from oracle_reading import Unreadable, read
from pipeline import Counts, drain, event, insert, process, prove, rows, value
from standing import define_all

COUNT = int(os.environ.get("SPECTRUM_POISON", "600"))
LONG = "SPECTRUM_POISON" in os.environ
SEED = os.environ.get("SPECTRUM_SEED", "1")
# Long texts are rare, and a few make a short run long.
SIZE = poison.MEGABYTE if LONG else 100_000
MARKED = '{"event_type": "marked", "properties": {"refuse": true}}'

sys.set_int_max_str_digits(0)


# The same on every path --------------------------------------------------------------------------

WAYS = ("batch", "single", "parts")
OUTCOMES = """
    CREATE TABLE outcomes_{way} AS
    SELECT input.n, raw.status, raw.error_msg, original.n AS copy_of,
        md5(row(fact.event_id, fact.occurred_at, fact.event_type, fact.account_id, fact.user_id,
            fact.country, fact.region, fact.city, fact.properties, fact.revenue,
            fact.currency)::text) AS fact
    FROM inputs AS input
    JOIN raw_events AS raw USING (id)
    LEFT JOIN inputs AS original ON original.id = raw.copy_of
    LEFT JOIN warehouse.event_ledger AS ledger ON ledger.seq = raw.seq
    LEFT JOIN analytics.events AS fact
        ON fact.event_id = ledger.event_id AND fact.occurred_at = ledger.occurred_at
"""


def keep_inputs(db: psycopg.Connection, payloads: list[str]) -> None:
    insert(db, payloads)
    db.execute(
        "CREATE TABLE inputs AS SELECT seq AS n, id, payload, received_at FROM raw_events;"
        "CREATE UNIQUE INDEX ON inputs (n); CREATE UNIQUE INDEX ON inputs (id)"
    )


def load_inputs(db: psycopg.Connection, count: int, mark_every: int = 0) -> None:
    """The first rows once more, as if nothing had been before; marked ones in between."""
    db.execute(
        "TRUNCATE raw_events, warehouse.fact_events, warehouse.event_ledger, spectrum.requeue,"
        " spectrum.news, spectrum.withdrawals RESTART IDENTITY;"
        "UPDATE spectrum.intake SET head_seq = 0, safe_seq = 0, seen_writers = NULL"
    )
    db.execute(
        "INSERT INTO raw_events (id, payload, received_at) SELECT coalesce(id,"
        " gen_random_uuid()), payload, coalesce(received_at, now()) FROM (SELECT * FROM inputs"
        " WHERE n <= %s UNION ALL SELECT n, NULL, %s, NULL FROM generate_series(1,"
        " CASE WHEN %s > 0 THEN %s ELSE 0 END, greatest(%s, 1)) AS n) AS all_rows ORDER BY n",
        (count, MARKED, mark_every, count, mark_every),
    )


@contextmanager
def refusing(db: psycopg.Connection) -> Iterator[None]:
    db.execute(
        "ALTER TABLE warehouse.fact_events ADD CONSTRAINT refuse"
        " CHECK (properties -> 'refuse' IS DISTINCT FROM 'true')"
    )
    yield
    db.execute("ALTER TABLE warehouse.fact_events DROP CONSTRAINT refuse")


def expected_of(payload: str, raw_id: Any, received_at: Any) -> str | None:
    """The field at which the oracle gives up, or None."""
    try:
        read(
            json.loads(poison.shallow(payload), parse_float=Decimal, parse_int=Decimal),
            raw_id,
            received_at,
        )
    except Unreadable as field:
        return str(field)
    return None


def check_against_the_oracle(db: psycopg.Connection, payloads: list[str]) -> None:
    wrong = []
    found = rows(
        db,
        "SELECT payload_of.id, payload_of.received_at, split_part(outcome.error_msg, ': exp', 1)"
        " FROM inputs AS payload_of JOIN outcomes_batch AS outcome USING (n) ORDER BY n",
    )
    for payload, (raw_id, received_at, field) in zip(payloads, found, strict=True):
        if (expected := expected_of(payload, raw_id, received_at)) != field:
            wrong.append((payload[:300], expected, field))
    assert wrong == []


def uncap(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.configure('max_payload_bytes', '1000000000')")
    db.execute("SELECT spectrum.configure('max_properties', '10000000')")
    for what in ("event_types", "places", "accounts"):
        db.execute("SELECT spectrum.configure(%s, '1000000000')", (f"max_new_{what}",))


def test_every_path_says_the_same(db: psycopg.Connection) -> None:
    """In one batch, row by row, and where a refused row has each batch taken apart."""
    db.execute("SELECT spectrum.configure('retry_delay', '1 day')")  # each is claimed once
    uncap(db)
    payloads = poison.payloads(SEED, COUNT, SIZE)
    keep_inputs(db, payloads)
    counts = drain(db, 10_000)
    assert counts.claimed == COUNT == counts.loaded + counts.duplicates + counts.failed
    assert min(counts.loaded, counts.failed, 20 * counts.duplicates) > COUNT / 5
    prove(db)
    db.execute(OUTCOMES.format(way="batch"))

    # Row by row costs as much a row as a batch of a hundred: the first ones only, if many.
    alone = min(COUNT, 20_000)
    load_inputs(db, alone)
    for _ in range(alone):
        assert process(db, 1).claimed == 1
    db.execute(OUTCOMES.format(way="single"))

    marks = -(-COUNT // 500)
    load_inputs(db, COUNT, mark_every=500)
    with refusing(db):
        parted = drain(db, 10_000)
    # Where a copy comes before the first row, both are loaded, one after the other.
    assert (parted.claimed, parted.failed) == (counts.claimed + marks, counts.failed + marks)
    assert parted.loaded + parted.duplicates == counts.loaded + counts.duplicates
    db.execute(OUTCOMES.format(way="parts"))
    prove(db)

    for way in ("single", "parts"):
        differing = rows(
            db,
            f"SELECT batch.*, other.* FROM outcomes_batch AS batch"
            f" JOIN outcomes_{way} AS other USING (n) WHERE batch IS DISTINCT FROM other",
        )
        assert differing == []
    compared = [value(db, f"SELECT count(*) FROM outcomes_{way}") for way in WAYS]
    assert compared == [COUNT, alone, COUNT]
    check_against_the_oracle(db, payloads)


def test_a_failed_row_names_field_and_value(db: psycopg.Connection) -> None:
    uncap(db)
    insert(db, poison.payloads(f"{SEED} named", min(COUNT, 20_000), SIZE))
    drain(db)
    unnamed = rows(
        db,
        """
        SELECT raw.error_msg, left(raw.payload::text, 300)
        FROM raw_events AS raw
        CROSS JOIN LATERAL (SELECT split_part(raw.error_msg, ': expected ', 1) AS field) AS named
        CROSS JOIN LATERAL (
            SELECT CASE named.field WHEN 'payload' THEN raw.payload
                ELSE raw.payload #> string_to_array(named.field, '.') END::text AS value
        ) AS given
        CROSS JOIN LATERAL (
            SELECT 'got ' || coalesce(spectrum._one_line(left(given.value, 100)), 'nothing')
                || CASE WHEN length(given.value) > 100 THEN '...' ELSE '' END AS ending
        ) AS expected
        WHERE raw.status = 'failed'
            AND right(raw.error_msg, length(expected.ending)) <> expected.ending
        """,
    )
    assert unnamed == []
    assert value(db, "SELECT count(*) FROM raw_events WHERE error_msg ~ '[\\n\\r]'") == 0


@pytest.mark.parametrize(
    "payload",
    ['{"event_type": "a\\u0000b"}', '{"event_type": "\\ud800"}', '{"n": 1e200000}', "{", "nan"],
)
def test_what_is_no_jsonb_is_refused_at_the_insert(db: psycopg.Connection, payload: str) -> None:
    """By the server, to the sender, who gets to know it."""
    with pytest.raises(psycopg.errors.DataError):
        db.execute("INSERT INTO raw_events (payload) VALUES (%s)", (payload,))
    assert value(db, "SELECT count(*) FROM raw_events") == 0


# What standing views make of it ------------------------------------------------------------------


def test_no_fact_breaks_a_standing_view(db: psycopg.Connection) -> None:
    """Facts with anything in the properties that reports read: counted, taken back, read again."""
    define_all(db)
    uncap(db)
    count = min(20_000, COUNT // 2)
    insert(db, poison.facts(SEED, count, 30_000 if LONG else 5_000))
    assert drain(db) == Counts(count, count, 0, 0)
    db.execute("CALL spectrum.refresh_analytics()")
    db.execute(
        "UPDATE raw_events SET status = 'pending', payload = CASE WHEN seq % 2 = 0 THEN payload"
        " ELSE jsonb_set(payload, '{user_id}', to_jsonb(seq % 7)) END WHERE seq % 10 < 3;"
        "UPDATE raw_events SET status = 'pending', payload = payload - 'event_type'"
        " WHERE seq % 10 = 4"
    )
    drain(db)
    prove(db, views=True)


def test_long_values_of_a_breakdown(db: psycopg.Connection) -> None:
    """They stand in keys: the first 200 characters count, in the question and in the view."""
    db.execute(
        "SELECT spectrum.define_funnel('long', '[\"seen\", \"bought\"]', p_breakdown => 'plan')"
    )
    noise = [poison.Poison(n, 100).short_text(n % 3) for n in range(3)]
    plans = [noise[0] + "x" * 9_000, noise[0] + "y" * 9_000, noise[1] * 20, noise[2][:199]]
    insert(
        db,
        [
            event(kind, user_id=f"u{n}", occurred_at=at, properties={"plan": plan})
            for n, plan in enumerate(plans)
            for kind, at in (("seen", "2024-02-10T12:00:00Z"), ("bought", "2024-02-10T13:00:00Z"))
        ],
    )
    drain(db)
    prove(db, views=True)
    shown = 'SELECT breakdown, step, {} FROM {} WHERE step = 2 {} ORDER BY breakdown COLLATE "C"'
    expected = sorted([(noise[0], 2, 2), (noise[1], 2, 1), (noise[2][:199], 2, 1)])
    assert (
        rows(db, shown.format("users", "analytics.conversion_funnels", "AND account_id = '*'"))
        == expected
    )
    assert rows(db, shown.format(
        "units", "analytics.funnel('[\"seen\", \"bought\"]', p_breakdown => 'plan')", "")
    ) == expected  # fmt: skip


def test_quotients_do_not_hang_on_zeros_at_the_end(db: psycopg.Connection) -> None:
    """A sum that holds 0.000 has more digits than the same without; its quotient had so too."""
    amounts = [10, -10, "0.0000000000000000000000000000000001", 1]
    for n, amount in enumerate(amounts):
        insert(db, [event(event_id=f"e{n}", user_id=f"u{n % 3}", properties={"revenue": amount})])
        drain(db)
        db.execute("CALL spectrum.refresh_analytics()")
    db.execute(
        "UPDATE raw_events SET status = 'pending', payload = payload - 'event_type' WHERE seq = 3"
    )
    drain(db)
    prove(db, views=True)


def test_digits_of_other_scripts_are_no_number(db: psycopg.Connection) -> None:
    """In a locale that takes them for digits a pattern would let them through to a cast."""
    digits = ["\u0663", "\u06f3", "\uff13", "\u0969"]
    for digit in digits:
        found = value(
            db, 'SELECT analytics._text_number(%s::text COLLATE "und-x-icu")', digit + "0"
        )
        assert found is None


# Refusals ----------------------------------------------------------------------------------------


def test_an_error_class_of_ones_own_is_a_refusal(db: psycopg.Connection) -> None:
    """A trigger may raise what it likes: the row fails alone and is tried again."""
    for state in ("MY001", "P0004", "99999"):
        db.execute(
            f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'not here' USING ERRCODE = '{state}'; END $$;
            CREATE TRIGGER refuse BEFORE INSERT ON warehouse.fact_events
            FOR EACH ROW WHEN (new.properties ? 'refuse') EXECUTE FUNCTION refuse()
            """
        )
        good = [event(event_id=f"{state} {n}") for n in range(30)]
        insert(db, [*good[:20], MARKED, *good[20:]])
        assert process(db) == Counts(31, 30, 0, 1)
        assert rows(
            db,
            "SELECT error_msg, next_attempt_at IS NOT NULL FROM raw_events"
            " WHERE status = 'failed' ORDER BY seq DESC LIMIT 1",
        ) == [(f"not here (SQLSTATE {state})", True)]
        db.execute("DROP TRIGGER refuse ON warehouse.fact_events; DROP FUNCTION refuse()")
    prove(db)


def test_an_error_that_no_row_is_to_blame_for_fails_none(db: psycopg.Connection) -> None:
    """A trigger that calls what is not there: the batch ends, and every row stays pending."""
    db.execute(
        """
        CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM nowhere.nothing(); RETURN new; END $$;
        CREATE TRIGGER broken BEFORE INSERT ON warehouse.fact_events
        FOR EACH ROW EXECUTE FUNCTION broken()
        """
    )
    insert(db, [event(event_id=f"e{n}") for n in range(30)])
    with pytest.raises(psycopg.errors.InvalidSchemaName):
        process(db)
    assert rows(db, "SELECT DISTINCT status FROM raw_events") == [("pending",)]


TRIGGER = (
    "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$;"
    "CREATE TRIGGER refuse BEFORE INSERT ON warehouse.fact_events"
    " FOR EACH ROW WHEN (new.properties ? 'refuse') EXECUTE FUNCTION refuse()"
)
UNDO = (
    "DROP TRIGGER IF EXISTS refuse ON warehouse.fact_events; DROP FUNCTION IF EXISTS refuse();"
    "ALTER TABLE warehouse.fact_events DROP CONSTRAINT IF EXISTS refuse;"
    "TRUNCATE spectrum.requeue"
)
# What makes a row poison: the row, what is done to the warehouse, what to the row once it is in.
KINDS = {
    "a field that cannot be read": (event(geo=1), "", ""),
    "a megabyte": (event(properties={"x": "\u00e9" * 500_000}), "", ""),
    "a nest of 5,000": (
        '{"event_type": "a", "properties": {"x": ' + "[" * 5_000 + "]" * 5_000 + "}}", "", "",
    ),
    "a reading that raises": (
        event(), "",
        "UPDATE raw_events SET received_at = '294276-12-31 23:30+00' WHERE seq = {seq}",
    ),
    "a constraint": (
        MARKED,
        "ALTER TABLE warehouse.fact_events ADD CONSTRAINT refuse"
        " CHECK (properties -> 'refuse' IS NULL)", "",
    ),
    "a trigger that raises": (MARKED, TRIGGER.format("RAISE EXCEPTION 'no';"), ""),
    "a trigger in silence": (MARKED, TRIGGER.format("RETURN NULL;"), ""),
}  # fmt: skip


class Meter:
    """Batches of `size` events, by the processor time that their server process takes: others on
    the machine do not disturb it as they do the clock."""

    def __init__(self, db: psycopg.Connection, size: int) -> None:
        self.db, self.size, self.made = db, size, 0
        self.stat = Path(f"/proc/{value(db, 'SELECT pg_backend_pid()')}/stat")
        if not self.stat.exists():
            pytest.skip("the server is not on this machine, or it is no Linux")

    def seconds(self) -> float:
        fields = self.stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def batch(self, spoilt: Any = None, after: str = "", at: int = 0) -> float:
        payloads: list[Any] = []
        for _ in range(self.size):
            self.made += 1
            n = self.made
            payloads.append(
                event(f"t{n % 20}", event_id=f"e{n}", user_id=f"u{n % 3_000}",
                      account_id=f"a{n % 50}", properties={"revenue": n, "text": "x" * 150})
            )  # fmt: skip
        if spoilt is not None:
            payloads[at] = spoilt
        insert(self.db, payloads)
        if after:
            seq = value(self.db, "SELECT max(seq) FROM raw_events") - self.size + at + 1
            self.db.execute(after.format(seq=seq))
        started = self.seconds()
        assert process(self.db, self.size).claimed == self.size
        return self.seconds() - started


@pytest.mark.parametrize("kind", KINDS if LONG else ["a constraint"])
def test_one_poison_row_slows_its_batch_at_most_three_times(
    db: psycopg.Connection, kind: str
) -> None:
    spoilt, make, after = KINDS[kind]
    meter = Meter(db, 10_000)
    meter.batch()
    clean, spoiled = [], []
    for at in (0, 6_789, 9_999) if LONG else (6_789,):
        for _ in range(3):
            clean.append(meter.batch())
            if make:
                db.execute(make)
            spoiled.append(meter.batch(spoilt, after, at))
            db.execute(UNDO)
    # Others on the machine only ever add to the time, so the least of each is nearest to its own.
    typical = statistics.median if LONG else min
    ratio = typical(spoiled) / typical(clean)
    print(f"{kind}: {ratio:.2f} times the {typical(clean):.2f} s of a clean batch")
    assert ratio < 3
