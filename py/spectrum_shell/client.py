"""Events from Python code, also inside the application's own transaction."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self
from uuid import UUID, uuid4
from weakref import WeakKeyDictionary

import psycopg
from psycopg import sql

from spectrum_shell.connect import open_connection, staging_table
from spectrum_shell.payload import encode_payload

Id = str | int | UUID


class Client:
    """Sends events to Spectrum.

    ``Client("host=... dbname=...")`` opens a connection of its own when the first event is sent
    (``Client()`` goes by SPECTRUM_DSN, else the PG* variables): each call is then kept as soon
    as it returns. If that connection was lost, track() reconnects once and sends the same
    event_id again, so no event counts twice.

    ``Client(connection)`` uses the caller's psycopg connection. Its open transaction decides:
    the events are there if and when the caller commits. Spectrum never commits, rolls back,
    closes or changes the settings of a connection that it was given.

    A client, like a psycopg cursor, is for one thread at a time. As a context manager it closes
    a connection of its own at the end.

    Errors: ValueError and TypeError for what cannot be an event, before anything is sent;
    ``NotInstalled`` where the database has no Spectrum; ``SpectrumError`` where there is no
    connection; psycopg's errors as they come (for example InsufficientPrivilege: see
    ``spectrum.grant_ingest``).
    """

    def __init__(self, dsn_or_connection: str | psycopg.Connection | None = None) -> None:
        self._given: psycopg.Connection | None = None
        self._own: psycopg.Connection | None = None
        self._dsn: str | None = None
        self._tables: WeakKeyDictionary[psycopg.Connection, sql.Identifier] = WeakKeyDictionary()
        if dsn_or_connection is None or isinstance(dsn_or_connection, str):
            self._dsn = dsn_or_connection
        else:
            self._given = _checked_connection(dsn_or_connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the client's own connection; one that was given stays open."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def track(
        self,
        event_type: str,
        *,
        user_id: Id | None = None,
        account_id: Id | None = None,
        properties: Mapping[str, Any] | None = None,
        occurred_at: datetime | None = None,
        event_id: UUID | str | None = None,
        geo: Mapping[str, str] | None = None,
        connection: psycopg.Connection | None = None,
    ) -> UUID:
        """Sends one event and returns its event_id.

        ``occurred_at`` needs a time zone; without it the moment of receipt counts. ``geo`` takes
        country, region, city. ``properties`` takes JSON values and Decimal (kept digit for
        digit), UUID, datetime, date and time (as ISO 8601 text); money goes into the configured
        revenue property, amounts best as Decimal.

        The event_id is made here unless one is given. Give your own (and keep it) where you may
        have to call again after an error: an event_id counts once, however often it is sent.

        ``connection``: another psycopg connection for this call alone, with its open transaction.
        """
        event = make_event(
            event_type,
            user_id=user_id,
            account_id=account_id,
            properties=properties,
            occurred_at=occurred_at,
            event_id=event_id,
            geo=geo,
        )
        self.send(event, connection=connection)
        return UUID(event["event_id"])

    def track_many(
        self,
        events: Iterable[Mapping[str, Any]],
        *,
        connection: psycopg.Connection | None = None,
    ) -> int:
        """Sends many events by one COPY, all of them or none, and returns how many.

        Each is a mapping of track()'s arguments: ``{"event_type": "signup", "user_id": "u1"}``.
        The iterable is read as it is sent, so it may be longer than memory. An error midway,
        also one raised by the iterable, leaves none of them; a transaction of the caller is then
        to be rolled back, as after any failed statement.
        """
        target = self._connection(connection)
        statement = sql.SQL("COPY {} (payload) FROM STDIN").format(self._table(target))
        sent = 0
        with target.cursor() as cursor, cursor.copy(statement) as copy:
            for event in events:
                copy.write_row((encode_payload(make_event(**event)),))
                sent += 1
        return sent

    def send(
        self, payload: Mapping[str, Any], *, connection: psycopg.Connection | None = None
    ) -> None:
        """Sends one payload as it is, with an event_id made here where it has none."""
        identified = payload if payload.get("event_id") else {**payload, "event_id": str(uuid4())}
        document = encode_payload(identified)
        target = self._connection(connection)
        try:
            self._insert(target, document)
        except psycopg.OperationalError:
            if target is not self._own or not target.broken:
                raise
            self._own = None
            self._insert(self._connection(None), document)

    def _insert(self, connection: psycopg.Connection, document: str) -> None:
        statement = sql.SQL("INSERT INTO {} (payload) VALUES (%s::jsonb)")
        with connection.cursor() as cursor:
            cursor.execute(statement.format(self._table(connection)), (document,))

    def _connection(self, connection: psycopg.Connection | None) -> psycopg.Connection:
        if connection is not None:
            return _checked_connection(connection)
        if self._given is not None:
            return self._given
        if self._own is None or self._own.closed:
            self._own = open_connection(self._dsn)
        return self._own

    def _table(self, connection: psycopg.Connection) -> sql.Identifier:
        """The staging table; looked up once a connection."""
        table = self._tables.get(connection)
        if table is None:
            table = self._tables[connection] = staging_table(connection)
        return table


def make_event(
    event_type: str,
    *,
    user_id: Id | None = None,
    account_id: Id | None = None,
    properties: Mapping[str, Any] | None = None,
    occurred_at: datetime | None = None,
    event_id: UUID | str | None = None,
    geo: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The payload of an event; raises ValueError or TypeError for what cannot be one."""
    if not isinstance(event_type, str):
        raise TypeError(f"event_type: a {type(event_type).__name__} is no text")
    if not event_type.strip():
        raise ValueError("event_type: an event needs one")
    fields = {
        "event_id": _checked_event_id(event_id),
        "event_type": event_type,
        "account_id": account_id,
        "user_id": user_id,
        "occurred_at": _checked_time(occurred_at),
        "geo": geo,
        "properties": properties,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _checked_event_id(event_id: UUID | str | None) -> str:
    if event_id is None:
        return str(uuid4())
    try:
        return str(UUID(str(event_id)))
    except ValueError:
        raise ValueError(f"event_id: {event_id!r} is no UUID") from None


def _checked_time(occurred_at: datetime | None) -> datetime | None:
    if occurred_at is None:
        return None
    if not isinstance(occurred_at, datetime):
        raise TypeError(f"occurred_at: a {type(occurred_at).__name__} is no datetime")
    if occurred_at.utcoffset() is None:
        raise ValueError(
            "occurred_at: a datetime needs a time zone, as in datetime.now(timezone.utc)"
        )
    return occurred_at


def _checked_connection(connection: psycopg.Connection) -> psycopg.Connection:
    if not isinstance(connection, psycopg.Connection):
        raise TypeError(
            f"a psycopg (version 3) Connection is needed, not a {type(connection).__module__}."
            f"{type(connection).__qualname__}"
        )
    return connection
