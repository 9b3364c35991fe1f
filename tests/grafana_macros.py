"""What Grafana makes of a query before PostgreSQL sees it.

Two steps, as in Grafana 12: the browser fills in the dashboard's variables, then the PostgreSQL
data source expands its macros. `expand()` does both and raises MacroError where Grafana would show
an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

# $name, [[name]], [[name:format]], ${name}, ${name:format}
VARIABLE = re.compile(r"\$(\w+)|\[\[(\w+?)(?::(\w+))?\]\]|\$\{(\w+)(?::([^}]+))?\}")
MACRO = re.compile(r"\$([_a-zA-Z0-9]+)\(([^)]*)\)")
INTERVAL = re.compile(r"(\d+)(ms|s|m|h|d|w|M|y)")
# Of a month and a year Grafana takes the Julian mean.
SECONDS = {
    "ms": 0.001,
    "s": 1,
    "m": 60,
    "h": 3600,
    "d": 86400,
    "w": 604800,
    "M": 2629800,
    "y": 31557600,
}


class MacroError(Exception):
    """Grafana would refuse this query."""


@dataclass(frozen=True)
class TimeRange:
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Fill:
    """How a $__timeGroup with three arguments fills its gaps."""

    seconds: float
    mode: str
    value: float | None = None


@dataclass(frozen=True)
class Expanded:
    sql: str
    fill: Fill | None = None


Value = str | list[str]


def expand(
    sql: str,
    time_range: TimeRange,
    variables: Mapping[str, Value] | None = None,
    interval: timedelta = timedelta(hours=1),
) -> Expanded:
    milliseconds = round(interval / timedelta(milliseconds=1))
    sql = fill_in_variables(sql, variables or {})
    sql = sql.replace("$__interval_ms", str(milliseconds))
    sql = sql.replace("$__interval", interval_text(interval))
    sql = sql.replace("$__unixEpochFrom()", str(int(time_range.start.timestamp())))
    sql = sql.replace("$__unixEpochTo()", str(int(time_range.end.timestamp())))
    return expand_macros(sql, time_range)


# Variables: the browser's part -------------------------------------------------------------------


def fill_in_variables(sql: str, variables: Mapping[str, Value]) -> str:
    """A name that is no variable stays as it is: a macro, or the user's own business."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2] or match[4]
        if name not in variables:
            return match[0]
        return formatted(variables[name], match[3] or match[5])

    return VARIABLE.sub(value_of, sql)


def formatted(value: Value, how: str | None) -> str:
    values = [value] if isinstance(value, str) else value
    if how == "raw":
        return ",".join(values)
    if how == "csv":
        return ",".join(values)
    if how == "sqlstring":
        # Grafana 12 also puts a backslash before a double quote, which PostgreSQL keeps.
        return ",".join("'" + text.replace("'", "''").replace('"', '\\"') + "'" for text in values)
    if how is None:
        # The data source's own way: a single value comes without quotes around it.
        doubled = [text.replace("'", "''") for text in values]
        return doubled[0] if isinstance(value, str) else ",".join(f"'{text}'" for text in doubled)
    raise MacroError(f"format {how!r} of a variable is not known here")


# Macros: the data source's part ------------------------------------------------------------------


def expand_macros(sql: str, time_range: TimeRange) -> Expanded:
    fills: list[Fill] = []

    def expansion(match: re.Match[str]) -> str:
        name, arguments = match[1], [text.strip(" ") for text in match[2].split(",")]
        # An old habit that Grafana still honours: a comma right after it means that
        # $__timeGroup stands in the SELECT list and is the time column.
        first = sql.find(match[0]) + len(match[0])
        if name == "__timeGroup" and sql[first : first + 1] == ",":
            name = "__timeGroupAlias"
        return macro(name, arguments, time_range, fills)

    return Expanded(MACRO.sub(expansion, sql), fills[-1] if fills else None)


def macro(name: str, arguments: list[str], time_range: TimeRange, fills: list[Fill]) -> str:
    column = arguments[0]
    start, end = time_range.start.timestamp(), time_range.end.timestamp()
    nanoseconds = [
        int(time.timestamp() * 10**6) * 1000 for time in (time_range.start, time_range.end)
    ]
    match name:
        case "__time":
            return f'{column} AS "time"'
        case "__timeEpoch":
            return f'extract(epoch from {column}) as "time"'
        case "__timeFilter":
            return f"{column} BETWEEN '{rfc3339(time_range.start)}' AND '{rfc3339(time_range.end)}'"
        case "__timeFrom":
            return f"'{rfc3339(time_range.start)}'"
        case "__timeTo":
            return f"'{rfc3339(time_range.end)}'"
        case "__timeGroup" | "__unixEpochGroup":
            seconds = go_float(group_seconds(name, arguments, fills))
            value = f"extract(epoch from {column})" if name == "__timeGroup" else f"({column})"
            return f"floor({value}/{seconds})*{seconds}"
        case "__timeGroupAlias" | "__unixEpochGroupAlias":
            return macro(name.removesuffix("Alias"), arguments, time_range, fills) + ' AS "time"'
        case "__unixEpochFilter":
            return f"{column} >= {int(start)} AND {column} <= {int(end)}"
        case "__unixEpochNanoFilter":
            return f"{column} >= {nanoseconds[0]} AND {column} <= {nanoseconds[1]}"
        case "__unixEpochNanoFrom":
            return str(nanoseconds[0])
        case "__unixEpochNanoTo":
            return str(nanoseconds[1])
    raise MacroError(f'unknown macro "{name}"')


def group_seconds(name: str, arguments: list[str], fills: list[Fill]) -> float:
    if len(arguments) < 2:
        raise MacroError(f"macro {name} needs time column and interval and optional fill value")
    seconds = interval_seconds(arguments[1].strip("'"))
    if len(arguments) == 3:
        fills.append(fill_of(seconds, arguments[2]))
    return seconds


def fill_of(seconds: float, how: str) -> Fill:
    if how in ("NULL", "previous"):
        return Fill(seconds, how.lower())
    try:
        return Fill(seconds, "value", float(how))
    except ValueError:
        raise MacroError(f"error parsing fill value {how}") from None


# Go's ways of writing things ---------------------------------------------------------------------


def rfc3339(moment: datetime) -> str:
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat()
    return (text.rstrip("0") if "." in text else text) + "Z"


def interval_seconds(text: str) -> float:
    """5m, 1d, 1h30m; days and more stand alone."""
    parts = INTERVAL.findall(text)
    alone = len(parts) == 1 or all(unit in ("ms", "s", "m", "h") for _, unit in parts)
    if not parts or not alone or "".join(number + unit for number, unit in parts) != text:
        raise MacroError(f"error parsing interval {text}")
    seconds = sum(int(number) * SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise MacroError(f"interval must be positive, got {text}")
    return seconds


def interval_text(interval: timedelta) -> str:
    """The largest unit that fits, rounded down."""
    milliseconds = interval // timedelta(milliseconds=1)
    units = {"y": 365 * 86400000, "d": 86400000, "h": 3600000, "m": 60000, "s": 1000, "ms": 1}
    for unit, size in units.items():
        if milliseconds >= size:
            return f"{milliseconds // size}{unit}"
    return "1ms"


def go_float(value: float) -> str:
    """%v: the fewest digits that are exact, with an exponent from a million on."""
    if 1e-4 <= abs(value) < 1e6:
        return repr(float(value)).removesuffix(".0")
    texts = (f"{value:.{digits}e}" for digits in range(18))
    return next(text for text in texts if float(text) == value)
