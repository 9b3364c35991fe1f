"""Files into raw_events: COPY, one transaction a file, all of it or nothing."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

import psycopg
from psycopg import sql

from spectrum_shell.errors import Refused, Usage, explain
from spectrum_shell.identity import EventIds
from spectrum_shell.records import BadLine, read_csv, read_ndjson
from spectrum_shell.source import Source

FORMATS = ("ndjson", "csv")

_FORMAT_BY_ENDING = {
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".json": "ndjson",
    ".csv": "csv",
    ".tsv": "csv",
}
_PACKED_ENDINGS = (".gz", ".gzip")
_REPORTED_BAD_LINES = 10
_ROWS_BETWEEN_REPORTS = 1000

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadOptions:
    """How the input is to be read; ``format`` and ``delimiter`` None go by the file's ending."""

    format: str | None = None
    delimiter: str | None = None
    mapping: dict[str, str] = field(default_factory=dict)
    skip_bad: bool = False


@dataclass
class LoadResult:
    """What came of one file: events sent, lines left out (the first few with their reason),
    sources of the mapping that no line had."""

    name: str
    events: int = 0
    bad_lines: int = 0
    first_bad_lines: list[BadLine] = field(default_factory=list)
    unused_sources: list[str] = field(default_factory=list)
    seconds: float = 0.0


def find_format(path: str, wanted: str | None) -> str:
    """The format by ``--format`` or the file's ending; raises Usage where neither tells it."""
    found = wanted or _FORMAT_BY_ENDING.get(_ending(path))
    if found is None:
        name = "standard input has" if path == "-" else f"{path} has"
        raise Usage(f"{name} no ending that tells its format", "name it: --format ndjson or csv")
    return found


def load_file(
    connection: psycopg.Connection,
    table: sql.Identifier,
    path: str,
    options: LoadOptions,
    on_open: Callable[[Source], Report],
) -> LoadResult:
    """Copies one file's events into raw_events and commits, or raises and leaves nothing.

    ``on_open`` is given the opened input and returns what is called with (bytes read, events)
    now and then. Raises Refused for a bad line (unless they are skipped), a damaged file, or a
    value that the server does not take.
    """
    started = time.monotonic()
    with Source(path) as source:
        report = on_open(source)
        result = LoadResult(source.name)
        unused = set(options.mapping)
        statement = sql.SQL("COPY {} (payload) FROM STDIN").format(table)
        try:
            with connection.transaction(), connection.cursor().copy(statement) as copy:
                records = _read(source, path, options, unused)
                for payload in _good_payloads(records, options, result):
                    copy.write_row((payload,))
                    result.events += 1
                    if result.events % _ROWS_BETWEEN_REPORTS == 0:
                        report(source.bytes_read, result.events)
        except psycopg.DataError as error:
            raise _refused_by_server(source.name, error) from error
        report(source.bytes_read, result.events)
    result.unused_sources = sorted(unused) if result.events else []
    result.seconds = time.monotonic() - started
    return result


def _ending(path: str) -> str:
    name = PurePath(path)
    if name.suffix.lower() in _PACKED_ENDINGS:
        name = name.with_suffix("")
    return name.suffix.lower()


def _read(
    source: Source, path: str, options: LoadOptions, unused: set[str]
) -> Iterator[str | BadLine]:
    ids = EventIds()
    if find_format(path, options.format) == "ndjson":
        return read_ndjson(source.lines(), options.mapping, ids, unused)
    unused.clear()
    delimiter = options.delimiter or ("\t" if _ending(path) == ".tsv" else ",")
    return read_csv(source.lines(), options.mapping, ids, source.name, delimiter)


def _good_payloads(
    records: Iterator[str | BadLine], options: LoadOptions, result: LoadResult
) -> Iterator[str]:
    for record in records:
        if isinstance(record, str):
            yield record
        elif options.skip_bad:
            result.bad_lines += 1
            if len(result.first_bad_lines) < _REPORTED_BAD_LINES:
                result.first_bad_lines.append(record)
        else:
            raise Refused(
                f"{result.name}, line {record.number}: {record.reason}; "
                "nothing of this file was loaded",
                "correct the line, or leave such lines out with --skip-bad",
            )


def _refused_by_server(name: str, error: psycopg.DataError) -> Refused:
    """A value that only the server could judge, as a number beyond its range."""
    place = (error.diag.context or "").replace("\n", ", ")
    cause = explain(error)
    return Refused(
        f"{name}: the server refused an event: {cause.message}; nothing of this file was loaded"
        f" [{place}]",
        cause.todo or "correct that event (COPY counts events, not blank or skipped lines)",
        cause.sqlstate,
    )
