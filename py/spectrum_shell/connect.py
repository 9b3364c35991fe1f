"""The connection: where to, and where the extension keeps its staging table."""

import os

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row

from spectrum_shell.errors import NotInstalled, Usage, cannot_connect

_CONNECT_TIMEOUT_SECONDS = 10


def open_connection(dsn: str | None = None) -> psycopg.Connection:
    """A new connection in autocommit mode.

    ``dsn`` is a libpq connection string or URI; without it ``SPECTRUM_DSN`` counts, then the
    usual PG* variables. Raises ``CannotConnect`` or, for a malformed string, ``Usage``.
    """
    conninfo = dsn or os.environ.get("SPECTRUM_DSN") or ""
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError as error:
        raise Usage(
            f"the connection string is malformed: {error}",
            "write host=... dbname=... or postgresql://user@host/dbname",
        ) from error
    settings = {"fallback_application_name": "spectrum"}
    if "connect_timeout" not in given and "PGCONNECT_TIMEOUT" not in os.environ:
        settings["connect_timeout"] = str(_CONNECT_TIMEOUT_SECONDS)
    try:
        return psycopg.connect(conninfo, autocommit=True, client_encoding="utf8", **settings)
    except psycopg.OperationalError as error:
        raise cannot_connect(error) from error


def extension_schema(connection: psycopg.Connection) -> str | None:
    """The schema that the extension was created in, or None where it is not installed."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            "SELECT n.nspname FROM pg_catalog.pg_extension AS e"
            " JOIN pg_catalog.pg_namespace AS n ON n.oid = e.extnamespace"
            " WHERE e.extname = 'spectrum'"
        )
        row = cursor.fetchone()
    return row[0] if row else None


def require_schema(connection: psycopg.Connection) -> str:
    """The extension's schema; raises ``NotInstalled`` where there is none."""
    schema = extension_schema(connection)
    if schema is None:
        raise NotInstalled(connection.info.dbname)
    return schema


def staging_table(connection: psycopg.Connection) -> sql.Identifier:
    """``raw_events`` with its schema, ready to stand in a statement."""
    return sql.Identifier(require_schema(connection), "raw_events")
