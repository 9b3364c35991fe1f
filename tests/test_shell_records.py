"""`spectrum load`, before the server: lines become records, with ids of their own."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
