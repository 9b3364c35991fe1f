"""What can go wrong, in one line a person can act on, and the exit code that goes with it."""

import errno
import re
import sqlite3

import psycopg

EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_DATABASE = 3
EXIT_FAULT = 70
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_LONGEST_MESSAGE = 600


class SpectrumError(Exception):
    """An error with its remedy: ``message`` says what is wrong, ``todo`` what to do about it."""

    exit_code = EXIT_DATABASE

    def __init__(self, message: str, todo: str = "", sqlstate: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.todo = todo
        self.sqlstate = sqlstate


class Refused(SpectrumError):
    """The input was refused: a line of a file, a value, a definition."""

    exit_code = EXIT_REFUSED


class Usage(SpectrumError):
    """The command was given something that it does not take."""

    exit_code = EXIT_USAGE


class Interrupted(SpectrumError):
    """The person at the terminal has had enough (Ctrl-C)."""

    exit_code = EXIT_INTERRUPTED


class Fault(SpectrumError):
    """A fault of the shell itself."""

    exit_code = EXIT_FAULT


class CannotConnect(SpectrumError):
    """There is no connection to the database."""


class NotInstalled(SpectrumError):
    """The database has no extension spectrum."""

    def __init__(self, database: str) -> None:
        super().__init__(
            f'Spectrum is not installed in database "{database}"',
            "run: spectrum install (with the same --dsn or PG* variables)",
        )


def one_line(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """The text as one printable line: control characters gone, blanks joined, the end cut off."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def cannot_connect(error: psycopg.OperationalError) -> CannotConnect:
    """Why there is no connection, with the usual remedy for the usual causes."""
    text = one_line(str(error))
    for pattern, todo in _CONNECT_REMEDIES:
        if re.search(pattern, text):
            return CannotConnect(text, todo)
    return CannotConnect(text, "check --dsn, SPECTRUM_DSN or the PG* variables")


def explain(error: BaseException) -> SpectrumError:
    """Any error that a command can meet, as one with a message, a remedy and an exit code."""
    if isinstance(error, SpectrumError):
        return error
    if isinstance(error, psycopg.Error):
        return _explain_database(error)
    if isinstance(error, sqlite3.Error):
        return Refused(f"the temporary file of line counts failed: {error}", "make room in TMPDIR")
    if isinstance(error, OSError):
        return _explain_system(error)
    return Fault(f"{type(error).__name__}: {error}", "run spectrum --debug ... and report it")


def format_error(error: SpectrumError) -> str:
    """The one line for standard error."""
    state = f" (SQLSTATE {error.sqlstate})" if error.sqlstate else ""
    todo = f" - {one_line(error.todo)}" if error.todo else ""
    return f"spectrum: {one_line(error.message)}{state}{todo}"


# Patterns of libpq's English messages: it gives no SQLSTATE for a failed connection.
_CONNECT_REMEDIES = (
    (r'database ".*" does not exist', "name another database, or make this one: createdb NAME"),
    (r'role ".*" does not exist', "name another user, or make this one: createuser NAME"),
    (r"password authentication failed|no password supplied", "check the user and the password"),
    (r"no pg_hba.conf entry|authentication failed", "the server's pg_hba.conf does not admit you"),
    (r"could not translate host name|[Nn]ame or service not known", "check the host's name"),
    (
        r"Connection refused|No such file or directory|timeout expired|Is the server running",
        "is the server running there? Check host and port in --dsn, SPECTRUM_DSN, PGHOST, PGPORT",
    ),
    (r"too many clients|remaining connection slots", "close other connections, or try again later"),
    (r"starting up|shutting down|in recovery", "try again in a moment"),
)

_STATE_REMEDIES = {
    "42501": "ask the database's owner for the right, see spectrum.grant_ingest, "
    "grant_reader, grant_operator",
    "25006": "this server or session is read-only: connect to the primary",
    "53100": "the server's disk is full: make room, then run the command again",
    "55P03": "another session holds the lock: try again in a moment",
    "57014": "cancelled by the server (statement_timeout or an administrator): run it again",
}


def _explain_database(error: psycopg.Error) -> SpectrumError:
    state = error.sqlstate or ""
    diag = error.diag
    lost = isinstance(error, psycopg.OperationalError) and not state
    if lost or state.startswith(("08", "57P")):
        return CannotConnect(
            f"the connection to the server was lost: {diag.message_primary or error}",
            "the open transaction is rolled back; run the command again",
            state,
        )
    message = diag.message_primary or str(error)
    if diag.message_detail:
        message += f": {diag.message_detail}"
    todo = diag.message_hint or _STATE_REMEDIES.get(state, "")
    kind = Refused if state[:2] in ("22", "23") else SpectrumError
    return kind(message, todo, state)


def _explain_system(error: OSError) -> SpectrumError:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return Refused(f"{where}no space left on the device", "make room and run it again")
    return Refused(f"{where}{error.strerror or error}")
