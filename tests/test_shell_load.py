"""`spectrum load`: what a file holds is what raw_events gets, once, whole or not at all."""

from __future__ import annotations

import gzip
import json
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Connect, MakeDb
from shell_command import invoke, run, start


def payloads(db: psycopg.Connection, schema: str = "public") -> list[dict[str, Any]]:
    rows = db.execute(f"SELECT payload FROM {schema}.raw_events ORDER BY seq").fetchall()
    return [payload for (payload,) in rows]


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events.ndjson"
    path.write_text('{"event_type": "visit", "user_id": "u1"}\n{"event_type": "signup"}\n')
    return path


class TestLoad:
    def test_every_kind_of_input_in_one_command(
        self, db: psycopg.Connection, dsn: str, tmp_path: Path, events: Path
    ) -> None:
        packed = tmp_path / "packed.csv.gz"
        packed.write_bytes(gzip.compress(b"event,user\nsignup,u2\n") + gzip.compress(b"buy,u3\n"))
        tabs = tmp_path / "tabs.tsv"
        tabs.write_text("event\tuser\nbuy\tu4\n")
        more = ["--map", "event=event_type", "--map", "user=user_id", "--dsn", dsn]
        assert invoke("load", packed, tabs, *more).code == 0
        semicolons = b"event;user\nleave;u5\n"
        loaded = run("load", "-", "--format", "csv", "--delimiter", ";", *more, stdin=semicolons)
        assert (loaded.code, loaded.err) == (0, "")
        assert loaded.out.startswith("standard input: 1 events in ")
        packed_lines = gzip.compress(events.read_bytes())
        loaded = run("load", "-", "--format", "ndjson", "--dsn", dsn, stdin=packed_lines)
        assert (loaded.code, loaded.err) == (0, "")
        assert [(p["event_type"], p.get("user_id")) for p in payloads(db)] == [
            ("signup", "u2"),
            ("buy", "u3"),
            ("buy", "u4"),
            ("leave", "u5"),
            ("visit", "u1"),
            ("signup", None),
        ]

    def test_loading_again_changes_no_number(
        self, db: psycopg.Connection, dsn: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "shop.csv"
        path.write_text(
            "user_id,event,timestamp\n"
            + "u1,visit,2024-05-01 10:00\n" * 2
            + "u2,visit,2024-05-01 10:00\n"
        )
        load = ["load", "--map", "event=event_type", "--process", "--refresh", "--dsn", dsn]
        first = invoke(*load, path, path)
        assert first.code == 0, first.err
        assert "processed: claimed 6, loaded 3, duplicates 3, failed 0\n" in first.out
        numbers = "SELECT day, dau, wau, mau FROM analytics.active_users ORDER BY account_id, day"
        before = db.execute(numbers).fetchall()
        assert before
        assert "loaded 0, duplicates 3" in invoke(*load, path).out
        assert db.execute(numbers).fetchall() == before
        assert db.execute("SELECT count(*) FROM analytics.events").fetchone() == (3,)

    def test_a_bad_line_stops_its_file_and_those_before_it_stay(
        self, db: psycopg.Connection, dsn: str, tmp_path: Path, events: Path
    ) -> None:
        bad = tmp_path / "bad.ndjson"
        bad.write_text('{"event_type":"a"}\n' * 3000 + "oops\n")
        outcome = invoke("load", events, bad, events, "--dsn", dsn)
        assert outcome.code == 1
        assert outcome.out.startswith(f"{events}: 2 events in ")
        assert f"{bad}, line 3001: JSON is malformed" in outcome.error_line
        assert "nothing of this file was loaded" in outcome.error_line
        assert len(payloads(db)) == 2

    def test_bad_lines_left_out_are_named(
        self, db: psycopg.Connection, dsn: str, tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad.ndjson"
        bad.write_text('{"event_type":"a"}\n' + "oops\n" * 12 + '{"event_type":"b"}\n')
        outcome = invoke("load", "--skip-bad", bad, "--dsn", dsn)
        assert outcome.code == 0
        lines = outcome.err.splitlines()
        assert len(lines) == 11 and lines[0].startswith(f"spectrum: {bad}, line 2: JSON is")
        assert lines[-1] == f"spectrum: {bad}: 12 bad lines in all were left out"
        assert [p["event_type"] for p in payloads(db)] == ["a", "b"]

    def test_a_value_that_only_the_server_can_refuse(
        self, db: psycopg.Connection, dsn: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "numbers.ndjson"
        path.write_text('{"event_type":"a"}\n{"event_type":"a","properties":{"n":1e200000}}\n')
        outcome = invoke("load", "--skip-bad", path, "--dsn", dsn)
        assert outcome.code == 1
        assert "line 2" in outcome.error_line and "SQLSTATE 22003" in outcome.error_line
        assert payloads(db) == []

    def test_backslashes_tabs_and_long_values_arrive_whole(
        self, db: psycopg.Connection, dsn: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "odd.ndjson"
        odd = {"event_type": "\\.", "properties": {"a": "\\N \t\n\r\x01", "long": "é" * 3_000_000}}
        path.write_text(json.dumps(odd, ensure_ascii=False) + "\n" + '{"event_type":\t"a"\r}\r\n')
        assert invoke("load", path, "--dsn", dsn).code == 0
        first, second = payloads(db)
        assert first["event_type"] == "\\." and first["properties"] == odd["properties"]
        assert second["event_type"] == "a"

    def test_the_staging_table_is_found_where_the_extension_lives(
        self, make_db: MakeDb, connect: Connect, events: Path
    ) -> None:
        dsn = make_db("elsewhere", template="")
        db = connect(dsn)
        db.execute('CREATE SCHEMA "Odd one"')
        assert "Odd one.raw_events" in invoke("install", "--schema", "Odd one", "--dsn", dsn).out
        assert invoke("load", events, "--dsn", dsn).code == 0
        assert len(payloads(db, '"Odd one"')) == 2

    def test_inputs_without_events(self, db: psycopg.Connection, dsn: str, tmp_path: Path) -> None:
        empty, header = tmp_path / "empty.ndjson", tmp_path / "header.csv"
        empty.touch()
        header.write_text("event_type,user_id\n")
        outcome = invoke("load", empty, header, "--map", "x=event_type", "--dsn", dsn)
        assert (outcome.code, outcome.out.count(": 0 events in ")) == (1, 1)
        assert 'the column "x", which is not there' in outcome.error_line
        outcome = invoke("load", empty, header, "--dsn", dsn)
        assert (outcome.code, outcome.err, outcome.out.count(": 0 events in ")) == (0, "", 2)

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("cut.ndjson", gzip.compress(random.Random(1).randbytes(5000))[:3000], "is damaged"),
            ("wide.csv", "event_type\nvisit".encode("utf-16"), "iconv -f UTF-16"),
            ("array.json", b'[{"event_type":"a"}]\n', "line 1: no JSON object"),
            ("flat.ndjson", b'{"event_type":"%s"}' % (b"x" * 17 * 1024**2), "longer than 16 MiB"),
            ("cells.csv", b"event_type\n%s" % (b"x" * 17 * 1024**2), "longer than 16 MiB"),
        ],
    )
    def test_files_that_are_something_else(
        self,
        db: psycopg.Connection,
        dsn: str,
        tmp_path: Path,
        name: str,
        content: bytes,
        reason: str,
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        outcome = invoke("load", path, "--dsn", dsn)
        assert outcome.code == 1 and reason in outcome.error_line
        assert payloads(db) == []

    def test_a_mapped_field_that_never_comes_is_said(self, dsn: str, events: Path) -> None:
        outcome = invoke("load", events, "--map", "evnt=event_type", "--dsn", dsn)
        assert outcome.code == 0
        assert outcome.error_line.endswith('no line has the field "evnt" that --map names')

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["-", "-", "--format", "csv"], "can be read once only"),
            (["-"], "standard input has no ending"),
            ([__file__], "has no ending that tells its format"),
            (["missing.csv"], "'missing.csv' does not exist"),
            (["-", "--format", "csv", "--map", "a=b"], 'no payload field "b"'),
            (["-", "--format", "csv", "--delimiter", "::"], "one character is needed"),
        ],
    )
    def test_usage(self, arguments: list[str], reason: str) -> None:
        outcome = invoke("load", *arguments)
        assert outcome.code == 2 and reason in outcome.error_line


class TestUnderWay:
    """Loads that are stopped from outside, and how much they hold in memory."""

    def wait_for_copy(self, db: psycopg.Connection) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            row = db.execute(
                "SELECT pid FROM pg_stat_progress_copy WHERE tuples_processed > 0"
                " AND datname = current_database()"
            ).fetchone()
            if row:
                return row[0]
            time.sleep(0.02)
        raise AssertionError("no COPY in 20 s")

    def test_ctrl_c_leaves_nothing_and_says_so(self, db: psycopg.Connection, dsn: str) -> None:
        load = start("load", "-", "--format", "ndjson", "--dsn", dsn)
        load.stdin.write(b'{"event_type":"a","properties":{"x":"%s"}}\n' % (b"x" * 100) * 30_000)
        load.stdin.flush()
        self.wait_for_copy(db)
        load.send_signal(signal.SIGINT)
        _, err = load.communicate(timeout=20)
        assert load.returncode == 130
        assert b"interrupted: nothing of - was loaded, it is rolled back" in err
        assert len(err.splitlines()) == 1
        assert payloads(db) == []

    def test_a_lost_server_is_said(self, db: psycopg.Connection, dsn: str) -> None:
        load = start("load", "-", "--format", "ndjson", "--dsn", dsn)
        line = b'{"event_type":"a","properties":{"x":"%s"}}\n' % (b"x" * 100)
        load.stdin.write(line * 30_000)
        load.stdin.flush()
        db.execute("SELECT pg_terminate_backend(%s)", (self.wait_for_copy(db),))
        _, err = load.communicate(line * 30_000, timeout=20)
        assert load.returncode == 3
        assert b"the connection to the server was lost" in err and len(err.splitlines()) == 1
        assert payloads(db) == []

    def test_memory_stays_bounded(self, db: psycopg.Connection, dsn: str) -> None:
        load = start("load", "-", "--format", "ndjson", "--dsn", dsn)
        filling = b"x" * 4000
        for number in range(40_000):
            load.stdin.write(b'{"event_type":"a","n":%d,"x":"%b"}\n' % (number, filling))
        load.stdin.flush()
        status = Path(f"/proc/{load.pid}/status").read_text()
        load.communicate(timeout=60)
        assert load.returncode == 0
        peak_kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
        assert peak_kib < 120 * 1024  # of an input of 160 MB
        distinct = "SELECT count(DISTINCT payload ->> 'event_id') FROM raw_events"
        assert db.execute(distinct).fetchone() == (40_000,)
