"""Standing lifecycle, stickiness, feature adoption and reports of the user's own: whatever comes,
is corrected and is taken back, in whatever batches and refreshes, the views say what the oracles
say of the events that count in the end."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from decimal import Decimal
from random import Random
from typing import Any

import psycopg
import pytest
from histories import Payload, epochs, exploring, loaded, timezones
from hypothesis import given, note
from hypothesis import strategies as st
from oracle_events import ALL, Calendar, Event, read_events, scopes
from oracle_feature_adoption import Definitions, feature_adoption
from oracle_lifecycle import lifecycle
from oracle_stickiness import stickiness_periods
from pipeline import drain, insert, process, rows, value
from test_feature_adoption import some_definitions, some_history
from test_lifecycle import randoms

# How often each user did what, where more than once.
REPORT = """
    CREATE FUNCTION public.repeats(p_users bigint[])
    RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
    LANGUAGE plpgsql STABLE
    AS $$
    BEGIN
        RETURN QUERY
        SELECT scope.account_id, e.user_key, ARRAY[e.event_type, (count(*) % 3)::text],
            count(*) + 0.5
        FROM analytics.events AS e
        CROSS JOIN LATERAL (
            SELECT '*' UNION ALL SELECT e.account_id WHERE e.account_id IS NOT NULL
        ) AS scope (account_id)
        WHERE e.user_key = ANY (p_users)
        GROUP BY scope.account_id, e.user_key, e.event_type
        HAVING count(*) > 1;
    END
    $$
"""

LEFT_BEHIND = """
    SELECT count(*) FROM spectrum.rollup_feature_weeks AS used
    JOIN spectrum.reports AS report ON report.report_id = used.report_id
    WHERE report.state = 'served' AND NOT EXISTS (
        SELECT FROM spectrum.rollup_user_days AS active
        WHERE active.user_key = used.user_key AND active.scope = used.scope
    )
"""


def counting(db: psycopg.Connection) -> list[Event]:
    """The events that count, by what the raw rows say: who counts of copies is shown elsewhere."""
    payloads = rows(db, "SELECT payload FROM raw_events WHERE status = 'done' AND copy_of IS NULL")
    return read_events(payload for (payload,) in payloads)


def shown(db: psycopg.Connection, view: str, order: int) -> list[tuple[Any, ...]]:
    """The rows of a view without as_of, which is its last column."""
    found = [row[:-1] for row in rows(db, f"SELECT * FROM analytics.{view}")]
    return sorted(found, key=lambda row: row[:order])


def compare(db: psycopg.Connection, calendar: Calendar, definitions: Definitions) -> None:
    events = counting(db)
    # A scope in which nobody is known has no rows.
    known = [
        (scope, None if scope == ALL else scope)
        for scope, of_scope in scopes(events)
        if any(event.user for event in of_scope)
    ]
    assert shown(db, "lifecycle_periods", 3) == sorted(
        (scope, kind, *cell)
        for scope, account in known
        for kind in ("day", "week", "month")
        for cell in lifecycle(events, calendar, kind, account=account)
    )
    assert shown(db, "stickiness_periods", 4) == sorted(
        (scope, kind, *cell)
        for scope, account in known
        for kind in ("week", "month")
        for cell in stickiness_periods(events, calendar, kind, account)
    )
    assert shown(db, "feature_adoption", 4) == sorted(
        (scope, *cell)
        for scope, account in known
        for cell in feature_adoption(events, calendar, definitions, account=account)
    )
    # Nothing is kept of who left a scope.
    assert value(db, LEFT_BEHIND) == 0
    repeats: Counter[tuple[Any, ...]] = Counter()
    amounts: Counter[tuple[Any, ...]] = Counter()
    for scope, of_scope in scopes(events):
        times = Counter((event.user, event.event_type) for event in of_scope)
        for (user, event_type), count in times.items():
            if user is not None and count > 1:
                cell = (scope, "repeats", [event_type, str(count % 3)])
                repeats[str(cell)] += 1
                amounts[str(cell)] += Decimal(count) + Decimal("0.5")
    assert {str(row[:3]): row[3:] for row in shown(db, "reports", 3)} == {
        cell: (users, amounts[cell]) for cell, users in repeats.items()
    }


def home(user: str) -> str:
    return f"a{int(user[1:]) % 2}"


def do_something(
    db: psycopg.Connection, random: Random, waiting: list[Payload], is_loyal: bool
) -> None:
    match random.randrange(8):
        case 0 | 1 | 2:
            count = random.choice([1, 3, 20])
            insert(db, [waiting.pop() for _ in range(min(count, len(waiting)))])
        case 3:
            process(db, random.choice([2, 1000]))
        case 4:
            db.execute("SELECT spectrum._refresh_some(%s)", (random.choice([3, 1000]),))
        case 5:
            db.execute("CALL spectrum.refresh_analytics()")
        case change:
            # An event is corrected, or found to be none.
            user = f"u{random.randrange(5)}"
            account = home(user) if is_loyal else f"a{random.randrange(2)}"
            corrected = json.dumps(
                {"user_id": user, "account_id": account} if change == 6 else {"event_type": ""}
            )
            some = rows(db, "SELECT seq FROM raw_events WHERE status = 'done' ORDER BY seq")
            for (seq,) in random.sample(some, min(len(some), random.choice([1, 1, 8]))):
                db.execute(
                    "UPDATE raw_events SET status = 'pending', payload = payload || %s"
                    " WHERE seq = %s", (corrected, seq),
                )  # fmt: skip


def define(db: psycopg.Connection, definitions: Definitions, before: Definitions) -> None:
    for name in before.keys() - definitions.keys():
        db.execute("SELECT spectrum.drop_feature(%s)", (name,))
    for name, (event_type, where) in definitions.items():
        db.execute(
            "SELECT spectrum.define_feature(%s, %s, %s)",
            (name, event_type, None if where is None else json.dumps(where)),
        )


@exploring
@given(random=randoms, timezone=timezones, epoch=epochs, week_start=st.sampled_from([1, 1, 3, 7]))
def test_any_interleaving(
    db: psycopg.Connection, random: Random, timezone: str, epoch: datetime, week_start: int
) -> None:
    history, definitions = some_history(random, epoch), some_definitions(random)
    random.shuffle(history)
    is_loyal = bool(random.randrange(2))
    if is_loyal:
        # A user has one account, until one event, if any, is of another or of none.
        history = [
            event | {"account_id": home(event["user_id"])}
            if "user_id" in event and random.randrange(30)
            else event
            for event in history
        ]
    with loaded(db, [], timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        db.execute(REPORT)
        define(db, definitions, {})
        db.execute("SELECT spectrum.define_report('repeats', 'public.repeats')")
        for _ in range(random.choice([1, 2, 3])):
            while history and random.randrange(25):
                do_something(db, random, history, is_loyal)
            if not random.randrange(3):
                before, definitions = definitions, some_definitions(random)
                define(db, definitions, before)
                db.execute("SELECT spectrum.define_report('repeats', 'public.repeats')")
            if not random.randrange(4):
                timezone = random.choice(["UTC", "America/New_York", "Asia/Kathmandu"])
                db.execute("SELECT spectrum.configure('timezone', %s)", (timezone,))
            drain(db)
            db.execute("CALL spectrum.refresh_analytics()")
            note(f"{timezone} {definitions} {value(db, 'SELECT count(*) FROM raw_events')}")
            compare(db, Calendar(timezone, week_start), definitions)


def event(user: str, day: str, event_type: str = "visit", **rest: Any) -> dict[str, Any]:
    return {
        "event_id": f"{user} {day} {event_type}", "event_type": event_type, "user_id": user,
        "occurred_at": f"2024-{day}T12:00:00Z", **rest,
    }  # fmt: skip


def refresh(db: psycopg.Connection, *events: dict[str, Any]) -> None:
    insert(db, events)
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")


def test_a_cohort_moves(db: psycopg.Connection) -> None:
    """The week of the first event changes by an earlier one that is late, and back when that one
    is taken back: all weeks of the user go along."""
    use = {"event_type": "feature_used", "properties": {"feature": "export"}}
    asked = """
        SELECT to_char(cohort_week, 'MM-DD'), to_char(period, 'MM-DD'), active_users, users,
            first_users
        FROM analytics.feature_adoption WHERE account_id = '*' ORDER BY 1, 2
    """
    refresh(db, event("u1", "05-14") | use, event("u1", "05-21") | use, event("u2", "05-14"))
    assert rows(db, asked) == [("05-13", "05-13", 2, 1, 1), ("05-13", "05-20", 1, 1, 0)]
    refresh(db, event("u1", "05-01", "late"))
    moved = [
        ("04-29", "04-29", 1, 0, 0), ("04-29", "05-13", 1, 1, 1), ("04-29", "05-20", 1, 1, 0),
        ("05-13", "05-13", 1, 0, 0),
    ]  # fmt: skip
    assert rows(db, asked) == moved
    # The first use moves too.
    refresh(db, event("u1", "05-02") | use | {"event_id": "first use"})
    assert rows(db, asked)[:2] == [("04-29", "04-29", 1, 1, 1), ("04-29", "05-13", 1, 1, 0)]
    db.execute(
        "UPDATE raw_events SET status = 'pending', payload = payload - 'event_type'"
        " WHERE payload ->> 'occurred_at' < '2024-05-03'"
    )
    refresh(db)
    assert rows(db, asked) == [("05-13", "05-13", 2, 1, 1), ("05-13", "05-20", 1, 1, 0)]


def test_a_new_session_builds_what_another_defined(db: psycopg.Connection, connect: Any) -> None:
    """Nothing that a refresh lays out for itself is there yet."""
    refresh(db, event("u1", "05-06"), event("u1", "05-13", "feature_used"))
    for statement in (
        "SELECT spectrum.define_feature('visits', 'visit')",
        "SELECT spectrum.define_retention('default', p_period => 'day')",
        "SELECT spectrum._begin_report('lifecycle')",
        "SELECT spectrum._begin_report('stickiness')",
        "SELECT spectrum._begin_report('cohort')",
    ):
        db.execute(statement)
        connect().execute("CALL spectrum.refresh_analytics()")
        assert rows(db, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []


@pytest.mark.parametrize("kind", ["activity", "cohort", "sessions"])
def test_what_others_are_kept_by_is_made_anew(db: psycopg.Connection, kind: str) -> None:
    """Alone it would not tell them of news while it is being built."""
    refresh(db, event("u1", "05-06"), event("u2", "05-06"), event("u2", "05-07", "feature_used"))
    db.execute("""SELECT spectrum.define_attribution('visits', '"visit"')""")
    db.execute("SELECT spectrum.define_paths('any')")
    db.execute("CALL spectrum.refresh_analytics()")
    db.execute("SELECT spectrum.rebuild_reports(%s)", (kind,))
    letter = {"properties": {"utm_source": "letter", "feature": "export"}}
    insert(db, [event("u1", "05-05", "feature_used") | letter, event("u2", "05-20") | letter])
    insert(db, [event("u2", "05-06", "feature_used")])
    drain(db)
    db.execute("SELECT spectrum._refresh_some(1)")
    db.execute("CALL spectrum.refresh_analytics()")
    assert rows(db, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []


def define_function(db: psycopg.Connection, body: str, name: str = "public.said") -> None:
    db.execute(f"""
        CREATE OR REPLACE FUNCTION {name} (p_users bigint[])
        RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
        LANGUAGE sql STABLE AS $$ {body} $$
    """)


def test_a_report_whose_function_fails_is_given_up(db: psycopg.Connection) -> None:
    define_function(
        db,
        """SELECT '*', e.user_key, '{x}'::text[], (e.properties ->> 'n')::numeric
        FROM analytics.events AS e WHERE e.user_key = ANY (p_users)""",
    )
    db.execute("SELECT spectrum.define_report('numbers', 'public.said')")
    refresh(db, event("u1", "05-06", properties={"n": 2}))
    asked = "SELECT cell, users, amount FROM analytics.reports"
    why = "SELECT error_msg FROM spectrum.report_definitions"
    active = "SELECT sum(users_exactly) FROM analytics.stickiness_periods WHERE account_id = '*'"
    assert rows(db, asked) == [(["x"], 1, 2)]
    refresh(db, event("u2", "05-07", properties={"n": "two"}))
    # All other views went on.
    assert rows(db, asked) == [] and value(db, active) == 4
    assert value(db, why) == 'invalid input syntax for type numeric: "two"'
    for bad in ("NULL", "'NaN'", "'Infinity'", "1 / (e.user_key - e.user_key)"):
        define_function(
            db,
            f"""SELECT '*', e.user_key, '{{x}}'::text[], ({bad})::numeric
            FROM analytics.events AS e WHERE e.user_key = ANY (p_users)""",
        )
        db.execute("SELECT spectrum.define_report('numbers', 'public.said')")
        assert value(db, why) is None
        refresh(db)
        assert rows(db, asked) == [] and value(db, why)
    # Mended, and defined again.
    define_function(db, "SELECT '*', unnest(p_users), '{x}'::text[], 1.50")
    db.execute("SELECT spectrum.define_report('numbers', 'public.said')")
    refresh(db)
    assert rows(db, asked) == [(["x"], 2, 3)] and value(db, why) is None
    db.execute("DROP FUNCTION public.said")
    refresh(db, event("u3", "05-08"))
    assert rows(db, asked) == [] and "p_contributions" in value(db, why)
    db.execute("SELECT spectrum.drop_report('numbers')")
    assert rows(db, why) == []


def test_a_report_is_of_the_users_asked_for(db: psycopg.Connection) -> None:
    """Also where the function says more: everybody counts once."""
    define_function(db, "SELECT '*', e.user_key, '{x}'::text[], 1.0 FROM analytics.events AS e")
    db.execute("SELECT spectrum.define_report('everybody', 'public.said')")
    refresh(db, event("u1", "05-06"), event("u1", "05-07"), event("u2", "05-06"))
    refresh(db, event("u3", "05-08"))
    assert rows(db, "SELECT users, amount FROM analytics.reports") == [(3, 4)]
    assert rows(db, "SELECT * FROM spectrum.verify() WHERE NOT ok") == []


SIGNATURE = "(account_id text, user_key bigint, cell text[], amount numeric)"


@pytest.mark.parametrize(
    "function",
    [
        f"f(p_users bigint[]) RETURNS TABLE {SIGNATURE} LANGUAGE sql VOLATILE",
        f"f(users bigint[]) RETURNS TABLE {SIGNATURE} LANGUAGE sql STABLE",
        f"f(p_users integer[]) RETURNS TABLE {SIGNATURE} LANGUAGE sql STABLE",
        "f(p_users bigint[]) RETURNS TABLE (account_id text) LANGUAGE sql STABLE",
        "f(p_users bigint[]) RETURNS SETOF text LANGUAGE sql STABLE",
    ],
)
def test_functions_that_are_none(db: psycopg.Connection, function: str) -> None:
    db.execute("SET check_function_bodies = off")
    db.execute(f"CREATE FUNCTION public.{function} AS 'SELECT 1'")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_contributions") as refusal:
        db.execute("SELECT spectrum.define_report('r', 'public.f')")
    assert "STABLE function (p_users bigint[])" in str(refusal.value.diag.message_hint)


def test_refused(db: psycopg.Connection, make_role: Any) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_contributions"):
        db.execute("SELECT spectrum.define_report('r', NULL)")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_name"):
        db.execute("SELECT spectrum.drop_report('r')")
    define_function(db, "SELECT '*', 1, '{}'::text[], 1.0")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_name"):
        db.execute("SELECT spectrum.define_report('', 'public.said')")
    # Somebody else's function could become another one.
    db.execute(f'ALTER FUNCTION public.said OWNER TO "{make_role("author")}"')
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_contributions"):
        db.execute("SELECT spectrum.define_report('r', 'public.said')")


def test_a_day_that_comes_and_goes_within_one_step_never_was(db: psycopg.Connection) -> None:
    """News of a fact on a day, and of another one that left it, when by now neither is there: a
    batch took the first back while the refresh was at work. Laid out by hand: it is a race."""
    insert(db, [event("u", "02-01")])
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    sums = (
        "SELECT sum(dau), sum(wau), sum(mau) FROM analytics.mv_active_users WHERE account_id = '*'"
    )
    before = rows(db, sums)
    with db.transaction():
        db.execute("SELECT spectrum._clear_news()")
        db.execute("""
            INSERT INTO pg_temp.spectrum_news (sign, scope, user_key, account_key, event_type_key,
                geo_key, occurred_at, event_id, properties)
            SELECT news.sign, 0, dim.user_key, 0, 1, 0, '2024-03-01T00:00:00Z', gen_random_uuid(),
                '{}'
            FROM warehouse.dim_users AS dim, (VALUES (1), (-1)) AS news (sign)
            WHERE dim.user_key <> 0
        """)
        db.execute("SELECT spectrum._scope_news()")
        db.execute("""
            SELECT analytics._maintain_active_users(report_id, 9223372036854775807)
            FROM spectrum.reports WHERE kind = 'activity' AND state = 'served'
        """)
        assert value(db, "SELECT count(*) FROM pg_temp.spectrum_day_changes") == 0
    assert rows(db, sums) == before == [(1, 7, 30)]
