"""Rows of any function as tables on the terminal or as JSON: the columns name themselves."""

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spectrum_shell.errors import one_line

Row = Mapping[str, Any]


class _Console(Console):
    """Rich's console, but a reader that has gone is an error for the command to deal with."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled


def print_json(document: Mapping[str, Any]) -> None:
    """Times as ISO 8601, intervals as seconds."""
    print(json.dumps(document, default=_json_value, ensure_ascii=False, indent=2))


def print_record(title: str, row: Row) -> None:
    """One row, a line a column."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in row.items():
        table.add_row(name.replace("_", " "), _cell(value))
    _Console().print(table)


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Rows with a heading of their column names."""
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    _Console().print(table)


def _cell(value: Any) -> Text:
    if isinstance(value, bool):
        return Text("yes", "green") if value else Text("no", "bold red")
    return Text(format_value(value))


def format_value(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{round(value, 3):,}"
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    if isinstance(value, timedelta):
        return _format_interval(value)
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value, default=_json_value, ensure_ascii=False)
    return one_line(str(value))


def _format_interval(value: timedelta) -> str:
    """The two largest units: 3 d 4 h, 5 min 20 s, 0.4 s."""
    total = value.total_seconds()
    if abs(total) < 60:
        return f"{total:.1f} s"
    sign = "-" if total < 0 else ""
    seconds = round(abs(total))
    units = (
        ("d", seconds // 86400),
        ("h", seconds // 3600 % 24),
        ("min", seconds // 60 % 60),
        ("s", seconds % 60),
    )
    first = next(place for place, (_, count) in enumerate(units) if count)
    shown = (f"{count} {unit}" for unit, count in units[first : first + 2] if count)
    return sign + " ".join(shown)


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no form in JSON")
