"""Single events: `spectrum track`, and `spectrum_shell.Client` in the application's transaction."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from conftest import Connect, MakeRole
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from shell_command import invoke
from spectrum_shell import Client, NotInstalled


def payloads(db: psycopg.Connection) -> list[dict[str, Any]]:
    rows = db.execute("SELECT payload FROM public.raw_events ORDER BY seq").fetchall()
    return [payload for (payload,) in rows]


@pytest.fixture
def client(dsn: str) -> Iterator[Client]:
    with Client(dsn) as client:
        yield client


class TestTrackCommand:
    def test_every_option(self, db: psycopg.Connection, dsn: str) -> None:
        outcome = invoke(
            *("track", "purchase", "--user", "u1", "--account", "a1", "--at", "2024-05-01T10:00Z"),
            *("--property", "revenue=19.90", "--property", "plan=pro", "--property", "zip=01099"),
            *("--property", "tags=[1,null]", "--property", "note=a=b", "--event-id", "order 7"),
            *("--json", '{"geo": {"country": "DE"}, "properties": {"plan": "x", "n": 1.10}}'),
            *("--dsn", dsn),
        )
        assert outcome == type(outcome)(0, "order 7\n", "")
        assert payloads(db) == [
            {
                "event_id": "order 7",
                "event_type": "purchase",
                "user_id": "u1",
                "account_id": "a1",
                "occurred_at": "2024-05-01T10:00Z",
                "geo": {"country": "DE"},
                "properties": {
                    "n": 1.10,
                    "plan": "pro",
                    "revenue": 19.90,
                    "zip": "01099",
                    "tags": [1, None],
                    "note": "a=b",
                },
            }
        ]
        digits = "SELECT payload #>> '{properties,revenue}' FROM public.raw_events"
        assert db.execute(digits).fetchone() == ("19.90",)

    def test_the_new_id_is_printed(self, db: psycopg.Connection, dsn: str) -> None:
        outcome = invoke("track", "visit", "--dsn", dsn)
        assert payloads(db) == [{"event_type": "visit", "event_id": str(UUID(outcome.out.strip()))}]

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ([], "an event needs an EVENT_TYPE"),
            (["visit", "--at", "yesterday"], '"yesterday" is neither ISO 8601 nor epoch'),
            (["visit", "--property", "plan"], '"plan" is no pair'),
            (["visit", "--json", "[1]"], "no JSON object"),
            (["visit", "--json", "{"], "--json: "),
            (["visit", "--json", '{"properties": 1}', "--property", "a=1"], "is no object"),
        ],
    )
    def test_usage(self, arguments: list[str], reason: str) -> None:
        outcome = invoke("track", *arguments)
        assert outcome.code == 2 and reason in outcome.error_line

    @pytest.mark.parametrize("value", ["a\0b", "NaN\ud800"])
    def test_what_the_server_cannot_hold(self, dsn: str, value: str) -> None:
        outcome = invoke("track", "visit", "--property", f"x={value}", "--dsn", dsn)
        assert outcome.code == 1 and "payload.properties.x: " in outcome.error_line


class TestEncoding:
    def test_values_that_json_lacks(self, client: Client, db: psycopg.Connection) -> None:
        class Plan(StrEnum):
            PRO = "pro"

        berlin = timezone(timedelta(hours=2))
        key = uuid4()
        given = {
            "amount": Decimal("19.90"),
            "huge": 2**80,
            "ratio": 0.1,
            "id": key,
            "day": date(2024, 5, 1),
            "at": datetime(2024, 5, 1, 10, tzinfo=berlin),
            "plan": Plan.PRO,
            "pair": (1, None),
            "nested": {"é": [True, {"x": Decimal("1E+3")}]},
        }
        client.track("purchase", properties=given, occurred_at=datetime(2024, 5, 1, tzinfo=UTC))
        (payload,) = payloads(db)
        assert payload["occurred_at"] == "2024-05-01T00:00:00+00:00"
        assert payload["properties"] == {
            "amount": 19.90,
            "huge": 2**80,
            "ratio": 0.1,
            "id": str(key),
            "day": "2024-05-01",
            "at": "2024-05-01T10:00:00+02:00",
            "plan": "pro",
            "pair": [1, None],
            "nested": {"é": [True, {"x": 1000}]},
        }
        digits = "SELECT payload #>> '{properties,amount}' FROM public.raw_events"
        assert db.execute(digits).fetchone() == ("19.90",)

    @pytest.mark.parametrize(
        ("arguments", "error", "reason"),
        [
            ({"event_type": " "}, ValueError, "event_type: "),
            ({"event_type": None}, TypeError, "event_type: "),
            ({"event_id": "order 7"}, ValueError, "event_id: 'order 7' is no UUID"),
            ({"occurred_at": datetime(2024, 5, 1)}, ValueError, "needs a time zone"),
            ({"occurred_at": "2024-05-01"}, TypeError, "occurred_at: a str is no datetime"),
            ({"properties": {"a": [float("nan")]}}, ValueError, "payload.properties.a[0]: nan"),
            ({"properties": {"a": Decimal("Infinity")}}, ValueError, "payload.properties.a: "),
            ({"properties": {"a": {"b": "\0"}}}, ValueError, "payload.properties.a.b: "),
            ({"properties": {"a\ud800": 1}}, ValueError, "payload.properties: "),
            ({"properties": {1: 1}}, TypeError, "payload.properties: the key 1"),
            ({"properties": {"a": {1, 2}}}, TypeError, "payload.properties.a: a set"),
            ({"properties": {"a": b"x"}}, TypeError, "payload.properties.a: a bytes"),
        ],
    )
    def test_what_can_be_no_event_is_refused_before_it_is_sent(
        self, arguments: dict[str, Any], error: type[Exception], reason: str
    ) -> None:
        with pytest.raises(error) as refused:
            Client("host=nowhere.invalid").track(**{"event_type": "visit"} | arguments)
        assert reason in str(refused.value)


class TestOwnConnection:
    def test_an_event_is_there_when_track_returns(
        self, client: Client, db: psycopg.Connection
    ) -> None:
        given = uuid4()
        made = client.track("visit", user_id=7, account_id=given, geo={"country": "DE"})
        assert client.track("visit", event_id=str(given).upper()) == given
        assert payloads(db) == [
            {
                "event_id": str(made),
                "event_type": "visit",
                "user_id": 7,
                "account_id": str(given),
                "geo": {"country": "DE"},
            },
            {"event_id": str(given), "event_type": "visit"},
        ]

    def test_a_lost_connection_is_made_again(self, client: Client, db: psycopg.Connection) -> None:
        client.track("visit")
        others = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        db.execute(others)
        client.track("visit")
        assert len(payloads(db)) == 2

    def test_many_events_by_copy(self, client: Client, db: psycopg.Connection) -> None:
        events = ({"event_type": "visit", "properties": {"n": n}} for n in range(3000))
        assert client.track_many(events) == 3000
        assert [p["properties"]["n"] for p in payloads(db)] == list(range(3000))
        assert len({p["event_id"] for p in payloads(db)}) == 3000

    def test_many_events_are_all_or_none(self, client: Client, db: psycopg.Connection) -> None:
        def events() -> Iterator[dict[str, Any]]:
            yield {"event_type": "visit"}
            raise LookupError("no more")

        with pytest.raises(LookupError):
            client.track_many(events())
        with pytest.raises(ValueError, match="event_type"):
            client.track_many([{"event_type": "visit"}, {"event_type": ""}])
        with pytest.raises(TypeError, match="user"):
            client.track_many([{"event_type": "visit", "user": "u1"}])
        assert payloads(db) == []
        client.track("visit")
        assert len(payloads(db)) == 1

    def test_no_spectrum_there(self, plain_dsn: str) -> None:
        with Client(plain_dsn) as client, pytest.raises(NotInstalled, match="tests_plain"):
            client.track("visit")


class TestCallersConnection:
    def test_the_caller_decides(self, dsn: str, connect: Connect, db: psycopg.Connection) -> None:
        connection = connect(dsn, autocommit=False, row_factory=dict_row)
        with Client(connection) as client:
            client.track("visit")
            client.track_many([{"event_type": "visit"}])
            assert payloads(db) == []
            connection.rollback()
            assert payloads(db) == []
            client.track("signup")
        assert connection.info.transaction_status == TransactionStatus.INTRANS
        connection.commit()
        assert [p["event_type"] for p in payloads(db)] == ["signup"]

    def test_one_call_in_another_transaction(
        self, client: Client, dsn: str, connect: Connect, db: psycopg.Connection
    ) -> None:
        connection = connect(dsn, autocommit=False)
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        client.track("kept")
        client.track("lost", connection=connection)
        client.track_many([{"event_type": "lost"}], connection=connection)
        assert connection.isolation_level == psycopg.IsolationLevel.SERIALIZABLE
        assert not connection.autocommit
        connection.rollback()
        assert [p["event_type"] for p in payloads(db)] == ["kept"]

    def test_inside_a_transaction_block_and_a_savepoint(self, db: psycopg.Connection) -> None:
        client = Client(db)
        with db.transaction():
            client.track("outer")
            with pytest.raises(LookupError), db.transaction():
                client.track("inner")
                raise LookupError
        assert [p["event_type"] for p in payloads(db)] == ["outer"]

    def test_a_refused_event_leaves_the_transaction_usable(self, db: psycopg.Connection) -> None:
        client = Client(db)
        with db.transaction():
            with pytest.raises(ValueError, match="NUL"):
                client.track("visit", properties={"a": "\0"})
            client.track("visit")
        assert len(payloads(db)) == 1

    @pytest.mark.parametrize("connection", [object(), 7])
    def test_what_is_no_connection(self, client: Client, connection: Any) -> None:
        with pytest.raises(TypeError, match="psycopg"):
            Client(connection)
        with pytest.raises(TypeError, match="psycopg"):
            client.track("visit", connection=connection)

    def test_a_role_that_may_only_ingest(
        self, db: psycopg.Connection, dsn: str, make_role: MakeRole
    ) -> None:
        role = make_role()
        with Client(make_conninfo(dsn, user=role)) as client:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                client.track("visit")
            db.execute("SELECT spectrum.grant_ingest(%s::regrole)", (role,))
            client.track("visit")
            client.track_many([{"event_type": "visit"}])
        assert len(payloads(db)) == 2
