"""The demo: its month is the same every time, is read rightly, and pg_cron does the work."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from io import StringIO

import psycopg
import pytest
from conftest import Connect, dsn_of, run_sql
from rich.console import Console
from spectrum_shell import demo, demo_show
from spectrum_shell.demo_data import DAYS, FUNNEL
from spectrum_shell.demo_delivery import Month, launch_id, make_month
from spectrum_shell.errors import Refused, SpectrumError

UNTIL = date(2026, 1, 31)
WINDOW = timedelta(days=14)


# The month ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def month() -> Month:
    return make_month(UNTIL)


def fingerprint(month: Month) -> str:
    digest = hashlib.sha256()
    for row in month.rows:
        digest.update(row.id.bytes + row.payload.encode())
    return digest.hexdigest()


def test_a_month_is_made_the_same_again(month: Month) -> None:
    assert fingerprint(make_month(UNTIL)) == fingerprint(month)


def test_another_day_is_another_month(month: Month) -> None:
    other = make_month(UNTIL + timedelta(days=1))
    ids = {row.id for row in month.rows}
    assert [row.id for row in other.rows if row.id in ids] == [launch_id()]


def test_the_month_has_the_promised_size(month: Month) -> None:
    made = month.made
    assert made.rows == len({row.id for row in month.rows}) == len(month.rows)
    assert made.rows == made.events + made.repeats + made.broken.total()
    assert 60_000 <= made.events <= 100_000
    assert made.accounts == 25
    assert 1_400 <= made.users <= 1_500
    assert 0.008 <= made.repeats / made.events <= 0.012
    assert 0.002 <= made.broken.total() / made.events <= 0.004
    assert min(made.broken.values()) >= 5


def good_events(month: Month) -> Iterator[tuple[datetime, dict]]:
    """The events that count, by a reading of the rows that knows nothing of the story."""
    starts = datetime(UNTIL.year, UNTIL.month, UNTIL.day, tzinfo=UTC) - timedelta(days=DAYS - 1)
    seen = set()
    for row in month.rows:
        event = json.loads(row.payload)
        if not isinstance(event, dict) or not isinstance(event.get("event_type"), str):
            continue
        at = event.get("timestamp") or event.get("occurred_at")
        try:
            when = (
                datetime.fromtimestamp(at / 1000, UTC)
                if isinstance(at, int)
                else datetime.fromisoformat(at)
            )
        except (TypeError, ValueError):
            continue
        inside = starts <= when < starts + timedelta(days=DAYS)
        if inside and event["event_id"] not in seen:
            seen.add(event["event_id"])
            yield when, event


def test_the_story_agrees_with_its_rows(month: Month) -> None:
    """Users who went through the funnel, walked through step by step for each of them."""
    times: dict[str, dict[str, list[datetime]]] = defaultdict(lambda: defaultdict(list))
    for when, event in good_events(month):
        if event["event_type"] in FUNNEL and isinstance(event["user_id"], str):
            times[event["user_id"]][event["event_type"]].append(when)
    reached = Counter()
    for steps in times.values():
        best = 0
        for entered in steps[FUNNEL[0]]:
            depth, at = 1, entered
            for step in FUNNEL[1:]:
                later = [when for when in steps[step] if at < when <= entered + WINDOW]
                if not later:
                    break
                depth, at = depth + 1, min(later)
            best = max(best, depth)
        reached.update(FUNNEL[:best])
    assert dict(reached) == month.made.funnel


def test_the_month_has_a_week_and_growth(month: Month) -> None:
    days: dict[date, set[str]] = defaultdict(set)
    for when, event in good_events(month):
        if isinstance(event.get("user_id"), str):
            days[when.date()].add(event["user_id"])
    active = {day: len(users) for day, users in days.items()}
    weekdays = [number for day, number in active.items() if day.weekday() < 5]
    weekends = [number for day, number in active.items() if day.weekday() >= 5]
    assert sum(weekends) / len(weekends) < 0.7 * sum(weekdays) / len(weekdays)
    first, last = sorted(active)[:7], sorted(active)[-7:]
    assert sum(active[day] for day in last) > 1.5 * sum(active[day] for day in first)


# The database ------------------------------------------------------------------------------------


def test_every_number_counts_as_made(month_dsn: str, connect: Connect) -> None:
    db = connect(month_dsn)
    made = make_month(demo.month_to_load(db, None)).made
    pairs = demo_show.compare(db, made)
    assert len(pairs) >= 15
    assert [(what, one, other) for what, one, other in pairs if one != other] == []
    by_type = db.execute("SELECT event_type, count(*) FROM analytics.events GROUP BY 1").fetchall()
    assert dict(by_type) == made.by_type


def test_every_broken_event_failed_and_says_why(month_dsn: str, connect: Connect) -> None:
    db = connect(month_dsn)
    made = make_month(demo.month_to_load(db, None)).made
    expected = Counter()
    for kind, number in made.broken.items():
        expected[kind.split()[0]] += number
    failed = db.execute("""
        SELECT regexp_replace(split_part(error_msg, ':', 1), '^properties[.]', ''), count(*)
        FROM raw_events WHERE status = 'failed' GROUP BY 1
    """).fetchall()
    assert dict(failed) == expected


def test_the_views_are_shown(month_dsn: str, connect: Connect) -> None:
    db = connect(month_dsn)
    console = Console(width=80, record=True, file=StringIO())
    demo_show.show_funnel(console, db)
    demo_show.show_retention(console, db)
    demo_show.show_revenue(console, db)
    demo_show.show_experiment(console, db)
    text = console.export_text()
    for expected in ("4. purchase", "week 0", "EUR", "treatment", "planned half and half: p ="):
        assert expected in text
    assert "…" not in text


def test_another_month_does_not_go_into_the_same_database(month_dsn: str, connect: Connect) -> None:
    with pytest.raises(Refused, match="holds the demo's month until"):
        demo.month_to_load(connect(month_dsn), UNTIL)


def test_the_database_is_made_if_missing(
    tidy_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DATABASE", "tests_demo_new")
    monkeypatch.delenv("PGDATABASE", raising=False)
    monkeypatch.delenv("SPECTRUM_DSN", raising=False)
    try:
        for _ in range(2):
            with demo.open_demo_database(None) as connection:
                assert connection.info.dbname == "tests_demo_new"
                encoding = connection.execute("SHOW server_encoding").fetchone()
                assert encoding == ("UTF8",)
    finally:
        run_sql(dsn_of("postgres"), "DROP DATABASE IF EXISTS tests_demo_new")


# pg_cron -----------------------------------------------------------------------------------------


def run_command(dsn: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spectrum_shell", "demo", "--dsn", dsn, *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"COLUMNS": "160"},
    )


def test_the_demo_by_pg_cron(cron_dsn: str, connect: Connect) -> None:
    """Goes on where an interrupted one stopped, lets pg_cron do the work, and runs twice."""
    db = connect(cron_dsn)
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    demo.define(db)
    demo.load(db, Console(quiet=True), make_month(yesterday).rows[:12_345])

    first = run_command(cron_dsn)
    assert first.returncode == 0, first.stderr
    assert "differs" not in first.stdout
    assert "psql -h" in first.stdout
    assert "every five minutes" in first.stdout
    jobs = db.execute("SELECT schedule, command FROM cron.job").fetchall()
    assert jobs == [("*/5 * * * *", "CALL spectrum.run()")]
    ran = db.execute("SELECT status FROM cron.job_run_details WHERE status <> 'succeeded'")
    assert ran.fetchall() == []
    loaded = snapshot(db)

    second = run_command(cron_dsn)
    assert second.returncode == 0, second.stderr
    assert "nothing changes" in second.stdout
    assert "differs" not in second.stdout
    assert snapshot(db) == loaded

    other = run_command(cron_dsn, "--until", "2020-01-31")
    assert other.returncode == 1
    assert "holds the demo's month until" in other.stderr


def snapshot(db: psycopg.Connection) -> list[tuple]:
    return db.execute("SELECT status, count(*), max(seq) FROM raw_events GROUP BY 1").fetchall()


STUCK = {
    "last_run_error": None,
    "last_run_at": None,
    "cron_last_status": None,
    "cron_last_end": None,
}
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("state", "still_for", "complaint"),
    [
        (STUCK, demo.PATIENCE_SECONDS + 1, "pg_cron did nothing"),
        (
            STUCK | {"cron_last_status": "failed", "cron_last_end": NOON + timedelta(minutes=1)},
            1,
            "pg_cron started the job and it failed",
        ),
        (
            STUCK | {"last_run_error": "out of disk", "last_run_at": NOON + timedelta(minutes=1)},
            1,
            "out of disk",
        ),
    ],
)
def test_a_stuck_demo_says_where_to_look(state: dict, still_for: float, complaint: str) -> None:
    with pytest.raises(SpectrumError, match=complaint) as caught:
        demo.complain_if_stuck(state, NOON, still_for)
    assert "look at" in caught.value.todo


def test_a_demo_that_waits_its_turn_is_not_stuck() -> None:
    before = {"cron_last_status": "failed", "cron_last_end": NOON - timedelta(minutes=1)}
    demo.complain_if_stuck(STUCK | before, NOON, demo.PATIENCE_SECONDS - 1)
