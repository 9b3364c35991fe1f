"""Questions that may be asked of the days that are kept, or of a standing view, say what they say
when asked of the events: with facts that no refresh has counted yet, in any time zone, for ranges
of whole days or not."""

from __future__ import annotations

from datetime import datetime, timedelta
from random import Random

import psycopg
from histories import epochs, exploring, loaded, timezones
from hypothesis import given, note, settings
from hypothesis import strategies as st
from pipeline import drain, event, insert, rows, value
from test_activity_standing import do_something
from test_lifecycle import randoms, some_history

QUESTIONS = [
    "analytics.active_users(%(from)s, %(to)s, %(account)s)",
    "analytics.trend(NULL, %(period)s, %(from)s, %(to)s, p_account => %(account)s)",
    "analytics.trend('visit', %(period)s, %(from)s, %(to)s, p_account => %(account)s)",
    "analytics.trend(NULL, %(period)s, %(from)s, %(to)s, p_breakdown => 'event_type',"
    " p_account => %(account)s)",
    "analytics.trend(NULL, %(period)s, %(from)s, %(to)s, 'users', p_account => %(account)s)",
    "analytics.retention(p_period => %(period)s, p_cohort => %(cohort)s, p_mode => %(mode)s,"
    " p_periods => %(periods)s, p_from => %(from)s, p_to => %(to)s, p_account => %(account)s)",
    "analytics.lifecycle(%(period)s, %(from)s, %(to)s, p_account => %(account)s)",
    "analytics.stickiness(%(period)s, %(from)s, %(to)s, p_account => %(account)s)",
    "analytics.revenue(%(from)s, %(to)s, %(account)s)",
    "analytics.throughput('day', %(from)s, %(to)s, p_account => %(account)s)",
]


def an_end(db: psycopg.Connection, random: Random, epoch: datetime, period: str) -> datetime | None:
    at = epoch + timedelta(hours=random.choice([-999, 0, 5, 24, 150, 600, 1999]), minutes=1)
    match random.randrange(5):
        case 0 | 1:
            return None
        case 2:
            return at
        case _:
            period = random.choice(["day", period])
            start: datetime = value(db, "SELECT spectrum.period_start(%s, %s)", period, at)
            return start


def compare(db: psycopg.Connection, random: Random, epoch: datetime, questions: list[str]) -> None:
    standing = rows(db, "SELECT period_kind, cohort_kind, mode FROM spectrum.retentions")
    for question in questions:
        period, cohort, mode = random.choice([
            *standing,
            (random.choice(["day", "week", "month"]), random.choice(["first", "recurring"]),
             random.choice(["on", "on_or_after"])),
        ])  # fmt: skip
        ends = (an_end(db, random, epoch, period), an_end(db, random, epoch, period))
        if None not in ends:
            ends = tuple(sorted(ends))  # type: ignore[type-var, assignment]
        asked = {
            "from": ends[0],
            "to": ends[1],
            "account": random.choice([None, None, "a0", "nobody"]),
            "period": period,
            "cohort": cohort,
            "mode": mode,
            "periods": random.choice([3, 12, 12, 40]),
        }
        answers = []
        for from_facts in ("off", "on"):
            db.execute("SELECT set_config('spectrum.from_facts', %s, true)", (from_facts,))
            answers.append(db.execute(f"SELECT * FROM {question}", asked).fetchall())
        db.execute("SELECT set_config('spectrum.from_facts', 'off', true)")
        assert answers[0] == answers[1], f"{question} {asked}"


@settings(exploring, max_examples=-(-exploring.max_examples // 2))
@given(random=randoms, timezone=timezones, epoch=epochs, week_start=st.sampled_from([1, 1, 3, 7]))
def test_any_interleaving(
    db: psycopg.Connection, random: Random, timezone: str, epoch: datetime, week_start: int
) -> None:
    history = some_history(random, epoch)
    random.shuffle(history)
    late = [history.pop() for _ in range(len(history) // 3)]
    with loaded(db, [], timezone):
        db.execute("SELECT spectrum.configure('week_start', %s)", (str(week_start),))
        db.execute(
            "SELECT spectrum.define_retention("
            "'mine', p_period => %s, p_cohort => %s, p_mode => %s)",
            (random.choice(["day", "week", "month"]), random.choice(["first", "recurring"]),
             random.choice(["on", "on_or_after"])),
        )  # fmt: skip
        while history and random.randrange(15):
            do_something(db, random, history, False)
        compare(db, random, epoch, random.sample(QUESTIONS, 1))
        # From here on the days are kept, and these events wait for a refresh.
        drain(db)
        db.execute("CALL spectrum.refresh_analytics()")
        insert(db, late)
        drain(db)
        note(f"{timezone} {value(db, 'SELECT count(*) FROM raw_events')}")
        assert value(db, "SELECT analytics._keeps_days(NULL, NULL)")
        compare(db, random, epoch, random.sample(QUESTIONS, 4))
        db.execute("CALL spectrum.refresh_analytics()")
        compare(db, random, epoch, [q for q in QUESTIONS if "retention" in q])


def test_when_they_are_asked(db: psycopg.Connection) -> None:
    """Of whole days, while nothing was taken back, also of what no refresh has counted yet."""

    def is_kept(start: str | None = None) -> object:
        return value(db, "SELECT analytics._keeps_days(%s::timestamptz, NULL)", start)

    seen = "SELECT sum(events), count(DISTINCT day) FROM analytics.event_days WHERE account_id = %s"
    insert(db, [event(user_id="u", occurred_at="2024-05-01T12:00:00Z")])
    drain(db)
    assert is_kept()
    assert rows(db, seen, "*") == [(1, 1)]
    db.execute("CALL spectrum.refresh_analytics()")
    insert(db, [event(user_id=name, occurred_at="2024-05-01T13:00:00Z") for name in "uv"])
    drain(db)
    assert is_kept("2024-05-01Z")
    assert not is_kept("2024-05-01T01:00:00Z")
    assert rows(db, seen, "*") == [(3, 1)]
    assert rows(db, "SELECT day::text, sum(users) FROM analytics.user_day_counts GROUP BY 1") == [
        ("2024-05-01", 2)
    ]
    db.execute(
        "UPDATE raw_events SET payload = payload || '{\"user_id\": \"w\"}', status = 'pending'"
    )
    drain(db)
    assert not is_kept()
    db.execute("CALL spectrum.refresh_analytics()")
    assert is_kept()
    insert(db, [event(user_id="u")])
    drain(db)
    assert is_kept()
    with db.transaction(force_rollback=True):
        db.execute("UPDATE spectrum.news SET events = 10001")
        assert not is_kept()
    db.execute("SELECT spectrum.rebuild_reports('volume')")
    assert not is_kept()


def test_a_retention_that_stands_is_read_where_it_stands(db: psycopg.Connection) -> None:
    """While it is current, and of whole periods: seen by a number that only its table has."""

    def size(arguments: str = "") -> object:
        return value(db, f"SELECT max(cohort_size) FROM analytics.retention({arguments})")

    insert(db, [event(user_id="u", occurred_at="2024-05-01T12:00:00Z")])
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    db.execute("UPDATE analytics.mv_retention_cohorts SET cohort_size = 99")
    assert size() == size("p_periods => 3, p_from => '2024-04-29Z'") == 99
    for other in ("p_periods => 13", "p_period => 'month'", "p_mode => 'on_or_after'",
                  "p_from => '2024-04-30Z'", "'seen'", "p_where => '{}'"):  # fmt: skip
        assert size(other) == 1, other
    assert size("p_account => '*'") is None
    assert size("p_from => '2024-05-06Z'") is None
    with db.transaction(force_rollback=True):
        db.execute("SET LOCAL spectrum.from_facts = on")
        assert size() == 1
    with db.transaction(force_rollback=True):
        db.execute(
            "UPDATE spectrum.horizon SET facts_from = '2024-01-01Z', open_from = '2024-02-01Z'"
        )
        assert size() == 1
    with db.transaction(force_rollback=True):
        db.execute("SELECT spectrum.rebuild_reports('retention')")
        assert size() == 1
    insert(db, [event(user_id="v", occurred_at="2024-05-01T13:00:00Z")])
    drain(db)
    assert size() == 2


def test_users_of_all_parts_are_counted_once(db: psycopg.Connection) -> None:
    """Many users are asked about in parts, for the workers: none is left out or counted twice."""
    for number, key in enumerate([1, 511, 512, 513, 2048, 2049, 4096, 4097, 8000]):
        db.execute(
            "SELECT setval(pg_get_serial_sequence('warehouse.dim_users', 'user_key'), %s, false)",
            (key,),
        )
        name = f"user {number}"
        insert(db, [event(a_step, user_id=name, occurred_at=f"2024-02-10T{hour}:00:00Z")
                    for a_step, hour in (("a", "10"), ("b", "11"))])  # fmt: skip
        drain(db)
    assert value(db, "SELECT max(user_key) FROM warehouse.dim_users") == 8000
    assert value(db, "SELECT cardinality(analytics._user_cuts('-infinity'))") == 5
    for from_facts in ("off", "on"):
        db.execute("SELECT set_config('spectrum.from_facts', %s, false)", (from_facts,))
        assert rows(db, 'SELECT units FROM analytics.funnel(\'["a", "b"]\')') == [(9,), (9,)]
        assert value(db, "SELECT cohort_size FROM analytics.retention() WHERE period = 0") == 9
        assert rows(db, "SELECT dau, mau FROM analytics.active_users()") == [(9, 9)]
