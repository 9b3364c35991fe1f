"""The calls of ``spectrum.*`` that the commands make; what they mean is decided there."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from spectrum_shell.connect import extension_schema
from spectrum_shell.errors import Refused, SpectrumError

_CREATE = "CREATE EXTENSION IF NOT EXISTS spectrum"

# What the server says where the extension's files are missing, by version.
_FILES_MISSING = (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile)


def install(connection: psycopg.Connection, schema: str | None) -> str:
    """Creates the extension where it is not there yet; says what it did."""
    present = extension_schema(connection)
    database = connection.info.dbname
    if present is not None:
        if schema is not None and schema != present:
            raise Refused(
                f'Spectrum is installed in database "{database}" already, '
                f'with raw_events in schema "{present}"'
            )
        return f'Spectrum is installed in database "{database}" already: {present}.raw_events'
    statement = sql.SQL(_CREATE)
    if schema is not None:
        statement += sql.SQL(" SCHEMA {}").format(sql.Identifier(schema))
    try:
        connection.execute(statement)
    except _FILES_MISSING as error:
        raise SpectrumError(
            "the extension's files are not on the server",
            "on the server's machine, in Spectrum's checkout: make && make install",
            error.sqlstate or "",
        ) from error
    except psycopg.errors.InvalidSchemaName as error:
        raise Refused(
            f'there is no schema "{schema}" in database "{database}"',
            f"CREATE SCHEMA {schema} first",
            error.sqlstate or "",
        ) from error
    present = extension_schema(connection)
    return f'Installed Spectrum in database "{database}": events go into {present}.raw_events'


def status(connection: psycopg.Connection) -> dict[str, Any]:
    """The one row of spectrum.status()."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute("SELECT * FROM spectrum.status()").fetchone()
    return row or {}


def health(connection: psycopg.Connection) -> list[dict[str, Any]]:
    """The rows of spectrum.health(), one a check."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM spectrum.health()").fetchall()


def schedule(connection: psycopg.Connection, cron: str) -> int:
    """Puts Spectrum on pg_cron; gives the job's id."""
    return _call(connection, "SELECT spectrum.schedule(%s)", (cron,))


def unschedule(connection: psycopg.Connection) -> bool:
    """Takes Spectrum off pg_cron; False where it was not on it."""
    return _call(connection, "SELECT spectrum.unschedule()")


def process_pending(
    connection: psycopg.Connection, on_batch: Callable[[Mapping[str, int]], None]
) -> Mapping[str, int]:
    """Calls process_batch until it claims nothing; gives the sums of what it returned."""
    totals: Counter[str] = Counter()
    while True:
        with connection.cursor(row_factory=dict_row) as cursor:
            batch = cursor.execute("CALL spectrum.process_batch()").fetchone()
        totals.update(batch)
        if not batch["claimed"]:
            return totals
        on_batch(totals)


def refresh(connection: psycopg.Connection) -> None:
    """Brings the analytics views up to the facts."""
    connection.execute("CALL spectrum.refresh_analytics()")


def _call(connection: psycopg.Connection, statement: str, values: tuple = ()) -> Any:
    row = connection.execute(statement, values).fetchone()
    return row[0] if row else None
