"""Lines of input as payloads. Nothing here knows of a database.

A reader yields, in the input's order, the payload of each event as JSON text, or a ``BadLine``
for what cannot be one. Blank lines are no events.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from spectrum_shell.errors import Refused
from spectrum_shell.identity import EventIds
from spectrum_shell.mapping import is_target
from spectrum_shell.payload import encode_json, holds_nul
from spectrum_shell.source import LONGEST_LINE

Fields = dict[str, msgspec.Raw]

_decode_object = msgspec.json.Decoder(Fields).decode
_NULL = msgspec.Raw(b"null")
_MISSING_IDS = (_NULL, msgspec.Raw(b'""'))


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no event, and why."""

    number: int
    reason: str


class _Unfit(Exception):
    """Why the line at hand is no event."""


def read_ndjson(
    lines: Iterable[bytes], mapping: Mapping[str, str], ids: EventIds, unused: set[str]
) -> Iterator[str | BadLine]:
    """Newline-delimited JSON: one object a line, its values kept digit for digit.

    A mapped field moves to its target; one inside objects is named with dots. Where a line has
    no event_id, one is derived from the line's text (blanks around it left out). ``unused``
    holds the mapping's sources; those that turn up are taken out of it.
    """
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        try:
            fields = _parse_object(line)
            if mapping:
                _map_fields(fields, mapping, unused)
            if fields.get("event_id", _NULL) in _MISSING_IDS:
                fields["event_id"] = msgspec.Raw(b'"%b"' % ids.derive(line).encode())
            yield encode_json(fields).decode()
        except _Unfit as unfit:
            yield BadLine(number, str(unfit))


def _parse_object(line: bytes) -> Fields:
    try:
        line.decode()
        fields = _decode_object(line)
    except UnicodeDecodeError as error:
        raise _Unfit(f"byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise _Unfit(f"no JSON object: {error}") from None
    except msgspec.DecodeError as error:
        raise _Unfit(str(error)) from None
    except RecursionError:
        raise _Unfit("nested too deeply") from None
    if holds_nul(line):
        raise _Unfit("holds the character NUL (\\u0000), which cannot be stored")
    return fields


def _map_fields(fields: Fields, mapping: Mapping[str, str], unused: set[str]) -> None:
    # All are taken before any is put, so that two fields can change places.
    taken = [(source, _take(fields, source)) for source in mapping]
    for source, value in taken:
        if value is not None:
            unused.discard(source)
            _put(fields, mapping[source], value)


def _take(fields: Fields, name: str) -> msgspec.Raw | None:
    """Removes the field, or the one inside an object that a dotted name leads to."""
    if name in fields:
        return fields.pop(name)
    head, dot, rest = name.partition(".")
    inner = _parse_inner(fields[head]) if dot and head in fields else None
    if inner is None:
        return None
    value = _take(inner, rest)
    if value is not None:
        fields[head] = msgspec.Raw(encode_json(inner))
    return value


def _put(fields: Fields, target: str, value: msgspec.Raw) -> None:
    head, dot, rest = target.partition(".")
    if dot:
        outer = fields.get(head, _NULL)
        inner = {} if outer == _NULL else _parse_inner(outer)
        if inner is None:
            raise _Unfit(f"{head} is no object, so {target} has no place in it")
        inner[rest] = value
        value = msgspec.Raw(encode_json(inner))
    fields[head] = value


def _parse_inner(value: msgspec.Raw) -> Fields | None:
    """The fields of an object inside a line that is known to be JSON, or None for other values."""
    try:
        return _decode_object(value)
    except msgspec.ValidationError:
        return None


def read_csv(
    lines: Iterable[bytes],
    mapping: Mapping[str, str],
    ids: EventIds,
    name: str,
    delimiter: str = ",",
) -> Iterator[str | BadLine]:
    """CSV with a header: quotes as in RFC 4180, every cell text, empty cells left out.

    A column named like a payload field (also ``geo.country``, ``properties.x``) or mapped to one
    goes there, every other into properties. Columns ``geo`` and ``properties`` hold JSON objects.
    Where a row has no event_id, one is derived from the header and the row's cells, so that
    quoting, line ends and the delimiter do not matter. Raises Refused for an unfit header;
    ``name`` is the input's name in that error.
    """
    csv.field_size_limit(LONGEST_LINE)
    # Bytes that are not UTF-8 become lone surrogates here and are found when a row is encoded.
    texts = (line.decode("utf-8", "surrogateescape") + "\n" for line in lines)
    rows = csv.reader(texts, delimiter=delimiter, strict=True)
    layout: _Layout | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
            if not row:
                continue
            if layout is None:
                layout = _Layout(row, mapping, name)
            else:
                yield layout.payload(row, ids)
        except StopIteration:
            return
        except csv.Error as error:
            if layout is None:
                raise Refused(f"{name}: the header cannot be read: {error}") from error
            yield BadLine(number, str(error))
        except _Unfit as unfit:
            yield BadLine(number, str(unfit))


class _Layout:
    """Where each column of a CSV file goes."""

    def __init__(self, header: list[str], mapping: Mapping[str, str], name: str) -> None:
        _check_header(header, mapping, name)
        targets = [
            mapping.get(column) or (column if is_target(column) else f"properties.{column}")
            for column in header
        ]
        for target in targets:
            if targets.count(target) > 1:
                raise Refused(
                    f'{name}: two columns go to the field "{target}"',
                    "map one of them elsewhere, for example to properties.NAME",
                )
        self._columns = [target.partition(".")[::2] for target in targets]
        self._content_head = "\x1e".join(header) + "\x1d"

    def payload(self, row: list[str], ids: EventIds) -> str:
        if len(row) != len(self._columns):
            raise _Unfit(f"{len(row)} cells, but the header has {len(self._columns)}")
        fields: dict[str, object] = {}
        inner: dict[str, dict[str, object]] = {}
        for (head, key), cell in zip(self._columns, row, strict=True):
            if not cell:
                continue
            if key:
                inner.setdefault(head, {})[key] = cell
            elif head in ("geo", "properties"):
                inner.setdefault(head, {}).update(_parse_cell(head, cell))
            else:
                fields[head] = cell
        try:
            if "event_id" not in fields:
                content = self._content_head + "\x1e".join(row)
                fields["event_id"] = ids.derive(content.encode())
            document = encode_json(fields | inner)
        except UnicodeEncodeError as error:
            byte = ord(error.object[error.start]) & 0xFF
            raise _Unfit(f"byte 0x{byte:02x} is not UTF-8") from None
        if holds_nul(document):
            raise _Unfit("holds the character NUL, which cannot be stored")
        return document.decode()


def _check_header(header: list[str], mapping: Mapping[str, str], name: str) -> None:
    for place, column in enumerate(header, 1):
        if not column:
            raise Refused(f"{name}: column {place} has no name", "give it one in the header")
        if "\0" in column or not column.isprintable():
            raise Refused(
                f"{name}: the name of column {place} is not printable UTF-8 text",
                "is this a CSV file with a header?",
            )
        if header.count(column) > 1:
            raise Refused(
                f'{name}: the header has the column "{column}" twice',
                "give each column a name of its own",
            )
    columns = f"columns are {', '.join(header)}"
    for source in mapping:
        if source not in header:
            raise Refused(f'{name}: --map names the column "{source}", which is not there', columns)
    if "event_type" not in header and "event_type" not in mapping.values():
        raise Refused(
            f"{name}: no column is event_type, which every event needs",
            f"name it: --map COLUMN=event_type; {columns}",
        )


def _parse_cell(column: str, cell: str) -> Fields:
    try:
        return _parse_object(cell.encode("utf-8", "surrogateescape"))
    except _Unfit as unfit:
        raise _Unfit(f"column {column}: {unfit}") from None
