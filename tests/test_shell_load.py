"""`spectrum load`: what a file holds is what raw_events gets, once, whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import psycopg
import pytest
from conftest import Connect, MakeDb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shell_command import invoke, run, start
from spectrum_shell.errors import Refused, Usage
from spectrum_shell.identity import NAMESPACE, EventIds, Occurrences
from spectrum_shell.mapping import parse_mapping
from spectrum_shell.records import BadLine, read_csv, read_ndjson

Records = list[dict[str, Any] | BadLine]


def parse(records: Iterable[str | BadLine]) -> Records:
    return [r if isinstance(r, BadLine) else json.loads(r) for r in records]


def ndjson(text: str | bytes, **mapping: str) -> Records:
    lines = (text.encode() if isinstance(text, str) else text).split(b"\n")
    return parse(read_ndjson(lines, mapping, EventIds(), set(mapping)))


def read_rows(text: str | bytes, delimiter: str = ",", **mapping: str) -> Records:
    lines = (text.encode() if isinstance(text, str) else text).removesuffix(b"\n").split(b"\n")
    return parse(read_csv(lines, mapping, EventIds(), "file.csv", delimiter))


def payloads(db: psycopg.Connection, schema: str = "public") -> list[dict[str, Any]]:
    rows = db.execute(f"SELECT payload FROM {schema}.raw_events ORDER BY seq").fetchall()
    return [payload for (payload,) in rows]


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events.ndjson"
    path.write_text('{"event_type": "visit", "user_id": "u1"}\n{"event_type": "signup"}\n')
    return path


class TestDerivedIds:
    def test_first_occurrence_is_the_uuid5_of_the_line(self) -> None:
        line = '{"event_type":"é"}'
        (event,) = ndjson(f"  {line}\r")
        assert event["event_id"] == str(uuid5(NAMESPACE, line))

    def test_equal_lines_are_told_apart_by_their_number(self) -> None:
        line = '{"event_type":"a"}'
        ids = [event["event_id"] for event in ndjson(f"{line}\n{line}\n{line}")]
        assert ids == [
            str(uuid5(NAMESPACE, line)),
            str(uuid5(NAMESPACE, line + "\0002")),
            str(uuid5(NAMESPACE, line + "\0003")),
        ]

    def test_a_file_that_has_grown_keeps_its_ids(self) -> None:
        before = '{"event_type":"a"}\n{"event_type":"a"}\n'
        ids = [event["event_id"] for event in ndjson(before + '{"event_type":"b"}\n' + before)]
        assert ids[:2] == [event["event_id"] for event in ndjson(before)]
        assert len(set(ids)) == 5

    def test_a_mapping_does_not_change_them(self) -> None:
        line = '{"event": "a"}'
        assert ndjson(line)[0]["event_id"] == ndjson(line, event="event_type")[0]["event_id"]

    @pytest.mark.parametrize("given_id", ["null", '""'])
    def test_an_empty_id_is_none(self, given_id: str) -> None:
        (event,) = ndjson(f'{{"event_type":"a","event_id":{given_id}}}')
        assert UUID(event["event_id"]).version == 5

    @pytest.mark.parametrize("given_id", ['"order 7"', "7", '" "'])
    def test_an_id_of_the_input_stays(self, given_id: str) -> None:
        (event,) = ndjson(f'{{"event_type":"a","event_id":{given_id}}}')
        assert event["event_id"] == json.loads(given_id)

    def test_csv_ids_do_not_depend_on_quotes_line_ends_or_delimiter(self) -> None:
        plain = read_rows("event_type,a,b\nvisit,1,x y\nvisit,1,x y\n")
        quoted = read_rows('"event_type","a","b"\r\n"visit","1","x y"\r\n"visit",1,"x y"\r\n')
        tabbed = read_rows("event_type\ta\tb\nvisit\t1\tx y\nvisit\t1\tx y", "\t")
        assert plain == quoted == tabbed
        assert plain[0]["event_id"] != plain[1]["event_id"]

    def test_counts_are_exact_beyond_what_memory_holds(self) -> None:
        chance = random.Random(1)
        digests = [chance.randbytes(20) for _ in range(300)]
        occurrences, expected = Occurrences(memory_entries=7), Counter()
        for digest in chance.choices(digests, k=3000):
            expected[digest] += 1
            assert occurrences.count(digest) == expected[digest]


class TestNdjson:
    def test_values_keep_every_digit(self) -> None:
        numbers = "[1.10, 1e400, 12345678901234567890123, -0.0, 5E-324]"
        line = b'{"properties": {"n": %s}, "event_type": "a"}' % numbers.encode()
        (payload,) = read_ndjson([line], {}, EventIds(), set())
        assert numbers in payload

    def test_blank_lines_are_no_events_but_count(self) -> None:
        assert ndjson("\n \r\n\t\nx")[0] == BadLine(
            4, "JSON is malformed: invalid character (byte 0)"
        )

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"[1]", "no JSON object"),
            (b'"a"', "no JSON object"),
            (b"null", "no JSON object"),
            (b'{"event_type": "a"', "truncated"),
            (b'{"event_type": "a"} {}', "trailing characters"),
            (b'{"event_type": NaN}', "invalid"),
            (b'{"event_type": "\xff"}', "byte 0xff is not UTF-8"),
            (b'{"event_type": "\\u0000"}', "character NUL"),
            (b'{"a\\\\\\u0000": 1}', "character NUL"),
            (b'{"event_type": "\\ud800"}', ""),
            (b'{"event_type": "\\udc00\\ud800"}', ""),
            (b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}", "nested too deeply"),
        ],
    )
    def test_what_is_no_event_is_named(self, line: bytes, reason: str) -> None:
        bad, good = ndjson(line + b'\n{"event_type":"b"}')
        assert isinstance(bad, BadLine) and bad.number == 1 and reason in bad.reason
        assert good["event_type"] == "b"

    def test_text_that_only_looks_like_nul_passes(self) -> None:
        (event,) = ndjson(r'{"event_type": "\\u0000 \ud83d\ude00"}')
        assert event["event_type"] == "\\u0000 \U0001f600"

    def test_mapped_fields_move(self) -> None:
        (event,) = ndjson(
            '{"event":"a","who":{"id":7,"x":1},"land":"DE","price":1.50,"geo":{"city":"Ulm"}}',
            **{
                "event": "event_type",
                "who.id": "user_id",
                "land": "geo.country",
                "price": "properties.revenue",
            },
        )
        del event["event_id"]
        assert event == {
            "event_type": "a",
            "user_id": 7,
            "who": {"x": 1},
            "geo": {"city": "Ulm", "country": "DE"},
            "properties": {"revenue": 1.50},
        }

    def test_fields_can_change_places(self) -> None:
        (event,) = ndjson(
            '{"event_type":"a","user_id":1,"account_id":2}',
            user_id="account_id",
            account_id="user_id",
        )
        assert (event["user_id"], event["account_id"]) == (2, 1)

    def test_a_field_named_with_a_dot_comes_before_a_path(self) -> None:
        (event,) = ndjson('{"a.b":"x","a":{"b":"y"}}', **{"a.b": "event_type"})
        assert event["event_type"] == "x" and event["a"] == {"b": "y"}

    def test_no_place_in_what_is_no_object(self) -> None:
        (bad,) = ndjson('{"event_type":"a","geo":"DE","land":"DE"}', land="geo.country")
        assert bad == BadLine(1, "geo is no object, so geo.country has no place in it")


class TestCsv:
    def test_columns_find_their_place(self) -> None:
        text = (
            "event,user_id,timestamp,geo.country,properties.plan,colour,empty,price\n"
            'visit,u1,2024-05-01 10:00,DE,pro,"a ""red"", one",,9.90\n'
        )
        (event,) = read_rows(text, event="event_type", price="properties.revenue")
        del event["event_id"]
        assert event == {
            "event_type": "visit",
            "user_id": "u1",
            "timestamp": "2024-05-01 10:00",
            "geo": {"country": "DE"},
            "properties": {"plan": "pro", "colour": 'a "red", one', "revenue": "9.90"},
        }

    def test_json_columns(self) -> None:
        text = 'event_type,properties,x\na,"{""n"": 1.50, ""x"": 1}",2\nb,[1],2\n'
        event, bad = read_rows(text)
        assert event["properties"] == {"n": 1.50, "x": "2"}
        assert isinstance(bad, BadLine) and bad.reason.startswith("column properties: no JSON")

    def test_line_ends_inside_quotes_and_a_byte_order_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_bytes('\ufeffevent_type,note\r\nvisit,"one\r\ntwo"\r\n'.encode())
        assert read_rows(path.read_bytes()[3:])[0]["properties"] == {"note": "one\r\ntwo"}

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ("visit", "1 cells, but the header has 2"),
            ("visit,1,2", "3 cells, but the header has 2"),
            ('visit,"1" x', "expected after"),
            ("visit,\0", "character NUL"),
        ],
    )
    def test_bad_rows_are_named(self, row: str, reason: str) -> None:
        first, bad, last = read_rows(f'event_type,x\nvisit,"a\nb"\n{row}\nvisit,2\n')
        assert isinstance(bad, BadLine) and bad.number == 4 and reason in bad.reason
        assert first["properties"] == {"x": "a\nb"} and last["properties"] == {"x": "2"}

    def test_bytes_that_are_not_utf8_are_named(self) -> None:
        (bad,) = read_rows(b"event_type,x\nvisit,M\xfcller\n")
        assert bad == BadLine(2, "byte 0xfc is not UTF-8")

    def test_a_quote_that_does_not_end(self) -> None:
        (bad,) = read_rows('event_type,x\nvisit,"open\n')
        assert bad == BadLine(2, "unexpected end of data")

    @pytest.mark.parametrize(
        ("header", "mapping", "reason"),
        [
            ("event,user_id", {}, "no column is event_type"),
            ("event_type,", {}, "column 2 has no name"),
            ("event_type,a,a", {}, 'the column "a" twice'),
            ("event_type,a", {"b": "user_id"}, 'the column "b", which is not there'),
            ("event_type,user_id,who", {"who": "user_id"}, 'two columns go to the field "user_id"'),
            ("event_type,a\x1b[2J", {}, "column 2 is not printable"),
        ],
    )
    def test_headers_that_cannot_be_right(
        self, header: str, mapping: dict[str, str], reason: str
    ) -> None:
        with pytest.raises(Refused, match=None) as refused:
            read_rows(f"{header}\n1,2\n", **mapping)
        assert reason in refused.value.message

    @settings(max_examples=60)
    @given(
        st.lists(
            st.tuples(
                *[st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)] * 2
            )
        )
    )
    def test_what_a_writer_writes_comes_back(self, rows: list[tuple[str, str]]) -> None:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([("event_type", "x"), *rows])
        events = read_rows(file.getvalue())
        assert [(e["event_type"], e["properties"]["x"]) for e in events] == rows


class TestMapping:
    @pytest.mark.parametrize(
        ("pairs", "reason"),
        [
            (["event"], "is no pair"),
            (["=event_type"], "is no pair"),
            (["event=event_name"], 'no payload field "event_name"'),
            (["x=geo.planet"], 'no payload field "geo.planet"'),
            (["x=properties."], 'no payload field "properties."'),
            (["a=user_id", "b=user_id"], 'the target "user_id" twice'),
            (["a=user_id", "a=account_id"], 'the source "a" twice'),
        ],
    )
    def test_what_is_no_mapping(self, pairs: list[str], reason: str) -> None:
        with pytest.raises(Usage) as usage:
            parse_mapping(pairs)
        assert reason in usage.value.message

    def test_a_source_may_hold_an_equals_sign(self) -> None:
        assert parse_mapping(["a=b=user_id"]) == {"a=b": "user_id"}


# Pieces of JSON that are right or wrong depending on their neighbours.
JSON_PIECES = (
    *(r"\u0000", r"\ud83d", r"\ude00", r"\u0041", r"\u12", r"\x41", r"\n", r"\/", r"\\", r"\""),
    *("{", "}", "[", "]", ",", ":", '"k"', '"a":1', "true", "null", "x", "é", " ", "\t", "\r"),
    *("1", "-0", "01", "1.5", "1.", ".5", "1e5", "1e+5", "e", "-"),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(JSON_PIECES), max_size=6), st.booleans())
def test_the_reader_and_the_server_agree_on_what_is_json(
    db: psycopg.Connection, pieces: list[str], quoted: bool
) -> None:
    inner = "".join(pieces)
    line = f'{{"a":"{inner}"}}' if quoted else f'{{"a":{inner}}}'
    (record,) = read_ndjson([line.encode()], {}, EventIds(), set())
    try:
        db.execute("SELECT %s::jsonb", (line,))
        taken = True
    except psycopg.DataError:
        taken = False
    assert taken == isinstance(record, str), (line, record)


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
