"""The dashboards: well-formed, and every query of every panel and variable gives what its panel
needs, on the demo's month, as a reader who may see nothing but the standing views."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import MakeRole, run_sql
from grafana_macros import Fill, MacroError, TimeRange, expand
from psycopg.conninfo import make_conninfo

GRAFANA = Path(__file__).resolve().parents[1] / "dashboards" / "grafana"
BOARDS = {path.stem: json.loads(path.read_text()) for path in GRAFANA.glob("dashboards/*.json")}
UIDS = {
    "overview": "spectrum-overview",
    "funnels": "spectrum-funnels",
    "retention": "spectrum-retention",
    "revenue": "spectrum-revenue",
    "experiments": "spectrum-experiments",
    "pipeline": "spectrum-pipeline",
}
DATA_SOURCE = {"type": "grafana-postgresql-datasource", "uid": "spectrum"}
QUOTED_ACCOUNT = "O'Brien & Sons"
INTRUDER = "x' OR '' = '"

NUMBERS = {"int2", "int4", "int8", "float4", "float8", "numeric"}
TIMES = {"timestamptz", "timestamp", "date"}
# A relation after FROM or JOIN; extract(epoch FROM ...) names none.
RELATION = re.compile(r"\b(?:FROM|JOIN)\s+([a-z_][\w.]*)")
EXTRACT = re.compile(r"extract\(epoch FROM")


@dataclass(frozen=True)
class Query:
    """A query of a panel, or of a variable (then it has no panel)."""

    board: str
    name: str
    sql: str
    panel: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.board}: {self.name}"


def panel_queries() -> Iterator[Query]:
    for board, dashboard in BOARDS.items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield Query(board, panel["title"], target["rawSql"], panel)


def variable_queries() -> Iterator[Query]:
    for board, dashboard in BOARDS.items():
        for variable in dashboard["templating"]["list"]:
            yield Query(board, variable["name"], variable["query"])


PANEL_QUERIES = list(panel_queries())
VARIABLE_QUERIES = list(variable_queries())
every_board = pytest.mark.parametrize("board", sorted(BOARDS))
every_panel_query = pytest.mark.parametrize("query", PANEL_QUERIES, ids=str)
every_query = pytest.mark.parametrize("query", PANEL_QUERIES + VARIABLE_QUERIES, ids=str)


# The files ---------------------------------------------------------------------------------------


def test_the_six_dashboards_keep_their_uids() -> None:
    assert {board: dashboard["uid"] for board, dashboard in BOARDS.items()} == UIDS


@every_board
def test_every_panel_explains_itself(board: str) -> None:
    assert BOARDS[board]["title"]
    assert BOARDS[board]["description"]
    for panel in BOARDS[board]["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    for variable in BOARDS[board]["templating"]["list"]:
        assert variable["label"]
        assert variable["description"].endswith(".")


@every_board
def test_panels_have_their_own_place(board: str) -> None:
    panels = BOARDS[board]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert columns.stop <= 24
        assert not cells & taken
        taken |= cells


@every_board
def test_everything_reads_the_provisioned_data_source(board: str) -> None:
    dashboard = BOARDS[board]
    sources = [variable["datasource"] for variable in dashboard["templating"]["list"]]
    for panel in dashboard["panels"]:
        sources += [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert all(source == DATA_SOURCE for source in sources)
    provisioned = (GRAFANA / "provisioning/datasources/spectrum.yml").read_text()
    for name, value in DATA_SOURCE.items():
        assert re.search(rf"^ +{name}: {value}$", provisioned, re.MULTILINE)


@every_query
def test_queries_name_nothing_but_the_schema_analytics(query: Query) -> None:
    named = RELATION.findall(EXTRACT.sub("", query.sql))
    assert named
    assert all(relation.startswith("analytics.") for relation in named)


@every_query
def test_variables_are_always_quoted(query: Query) -> None:
    names = [variable["name"] for variable in BOARDS[query.board]["templating"]["list"]]
    for name in names:
        uses = re.findall(rf"\$(?:\{{{name}\b[^}}]*\}}|{name}\b)|\[\[{name}\b.*?\]\]", query.sql)
        assert set(uses) <= {f"${{{name}:sqlstring}}"}


# The queries on the demo's month -----------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(month_dsn: str, make_role: MakeRole) -> Iterator[psycopg.Connection]:
    """A connection as a role that has grant_reader() and nothing else."""
    role = make_role("dashboards")
    run_sql(month_dsn, f"SELECT spectrum.grant_reader('{role}')")
    dsn = make_conninfo(month_dsn, user=role, password=None)
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection
    run_sql(month_dsn, f"DROP OWNED BY {role}")


@dataclass(frozen=True)
class Answer:
    names: list[str]
    types: list[str]
    rows: list[tuple[Any, ...]]

    def column(self, name: str) -> list[Any]:
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def type_of(self, name: str) -> str:
        return self.types[self.names.index(name)]


def ask(reader: psycopg.Connection, query: Query, variables: dict[str, Any]) -> Answer:
    time_range = time_range_of(BOARDS[query.board])
    short = time_range.end - time_range.start < timedelta(days=1)
    interval = timedelta(minutes=1) if short else timedelta(hours=1)
    with reader.cursor() as cursor:
        cursor.execute(expand(query.sql, time_range, variables, interval).sql)
        types = [psycopg.adapters.types[column.type_code].name for column in cursor.description]
        return Answer([column.name for column in cursor.description], types, cursor.fetchall())


def time_range_of(dashboard: dict[str, Any]) -> TimeRange:
    """The range that the dashboard opens with: now-30d to now."""
    now = datetime.now(UTC)
    number, unit = re.fullmatch(r"now-(\d+)([dh])", dashboard["time"]["from"]).groups()
    assert dashboard["time"]["to"] == "now"
    back = timedelta(days=int(number)) if unit == "d" else timedelta(hours=int(number))
    return TimeRange(now - back, now)


def settings_of(reader: psycopg.Connection, board: str, account: str) -> Iterator[dict[str, Any]]:
    """What a person can choose: the account, and each option of one further variable."""
    chosen: dict[str, Any] = {}
    choices: dict[str, list[str]] = {}
    for variable in BOARDS[board]["templating"]["list"]:
        name = variable["name"]
        choices[name] = options(ask(reader, Query(board, name, variable["query"]), chosen))
        assert choices[name], f"{board}: the variable {name} has no option"
        chosen[name] = choices[name] if variable["multi"] else choices[name][0]
        if name == "account":
            assert account in choices[name]
            chosen[name], choices[name] = account, [account]
    yield chosen
    for name, values in choices.items():
        for value in values:
            yield chosen | {name: value}


def options(answer: Answer) -> list[str]:
    name = "__value" if "__value" in answer.names else answer.names[0]
    return [str(value) for value in answer.column(name)]


@every_panel_query
@pytest.mark.parametrize("account", ["*", QUOTED_ACCOUNT])
def test_every_panel_gets_the_rows_it_needs(
    reader: psycopg.Connection, query: Query, account: str
) -> None:
    for variables in settings_of(reader, query.board, account):
        # A panel that is repeated for each value of a variable never sees several of them.
        if not isinstance(variables.get(query.panel.get("repeat")), list):
            check_shape(query.panel, ask(reader, query, variables))


def check_shape(panel: dict[str, Any], answer: Answer) -> None:
    assert answer.rows
    assert len(set(answer.names)) == len(answer.names)
    if panel["type"] == "timeseries":
        check_series(answer)
    elif panel["type"] == "stat":
        assert len(answer.rows) == len(answer.names) == 1
        assert answer.types[0] in NUMBERS
        assert answer.rows[0][0] is not None
    elif panel["type"] == "barchart":
        x_field = panel["options"]["xField"]
        assert answer.type_of(x_field) == "text"
        assert len(set(answer.column(x_field))) == len(answer.rows)
        rest = [name for name in answer.names if name != x_field]
        assert rest
        assert all(answer.type_of(name) in NUMBERS for name in rest)
    else:
        assert panel["type"] == "table"
        assert any(kind in NUMBERS for kind in answer.types)
    fields = set(answer.names)
    for transformation in panel.get("transformations", []):
        fields = matrix_fields(transformation, answer)
    for override in panel["fieldConfig"]["overrides"]:
        assert override["matcher"]["options"] in fields


def check_series(answer: Answer) -> None:
    """A time column in ascending order, numbers, and perhaps one text that tells series apart."""
    times = answer.column("time")
    assert answer.type_of("time") in TIMES | NUMBERS
    assert None not in times
    assert all(earlier <= later for earlier, later in pairwise(times))
    labels = [name for name in answer.names if answer.type_of(name) == "text"]
    assert labels in ([], ["metric"])
    points = list(zip(times, *(answer.column(name) for name in labels), strict=True))
    assert len(set(points)) == len(points)
    values = [name for name in answer.names if name not in ("time", *labels)]
    assert values
    assert all(answer.type_of(name) in NUMBERS for name in values)
    assert any(value is not None for name in values for value in answer.column(name))


def matrix_fields(transformation: dict[str, Any], answer: Answer) -> set[str]:
    """Fields after "grouping to matrix": one a value of the column field, and the corner."""
    assert transformation["id"] == "groupingToMatrix"
    row, column, value = (
        transformation["options"][name] for name in ("rowField", "columnField", "valueField")
    )
    assert answer.type_of(value) in NUMBERS
    cells = list(zip(answer.column(row), answer.column(column), strict=True))
    assert len(set(cells)) == len(cells)
    return {f"{row}\\{column}", *(str(name) for name in answer.column(column))}


def test_an_account_with_a_quote_gets_its_own_numbers(reader: psycopg.Connection) -> None:
    query = next(query for query in PANEL_QUERIES if str(query) == "overview: Active users")
    answer = ask(reader, query, {"account": QUOTED_ACCOUNT, "currency": "USD"})
    expected = reader.execute(
        "SELECT day, dau, wau, mau FROM analytics.active_users WHERE account_id = %s ORDER BY day",
        (QUOTED_ACCOUNT,),
    ).fetchall()
    assert answer.rows == expected[-len(answer.rows) :]


@pytest.mark.parametrize(
    "query", [query for query in PANEL_QUERIES if "${account:sqlstring}" in query.sql], ids=str
)
def test_an_account_cannot_write_sql(reader: psycopg.Connection, query: Query) -> None:
    settings = next(settings_of(reader, query.board, "*"))
    answer = ask(reader, query, settings | {"account": INTRUDER})
    assert all(value is None for row in answer.rows for value in row)


def test_the_reader_sees_nothing_else(reader: psycopg.Connection) -> None:
    for forbidden in ("raw_events", "warehouse.fact_events", "spectrum.config", "analytics.events"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute(f"SELECT FROM {forbidden}")


# The macros, by the answers that Grafana's own tests expect ---------------------------------------

FIVE_MINUTES = TimeRange(
    datetime(2018, 4, 12, 18, tzinfo=UTC), datetime(2018, 4, 12, 18, 5, tzinfo=UTC)
)
HALF_SECONDS = TimeRange(
    datetime(1960, 2, 1, 7, 0, 0, 500000, tzinfo=UTC),
    datetime(1980, 2, 3, 8, 0, 0, 500000, tzinfo=UTC),
)


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("select $__time(c)", 'select c AS "time"'),
        ("select min($__time(c))", 'select min(c AS "time")'),
        ("$__timeEpoch(c)", 'extract(epoch from c) as "time"'),
        ("$__timeFilter(c)", "c BETWEEN '2018-04-12T18:00:00Z' AND '2018-04-12T18:05:00Z'"),
        ("$__timeFrom()", "'2018-04-12T18:00:00Z'"),
        ("$__timeTo()", "'2018-04-12T18:05:00Z'"),
        ("$__timeGroup(c,'5m'), v", 'floor(extract(epoch from c)/300)*300 AS "time", v'),
        ("$__timeGroup(c,'5m') as t", "floor(extract(epoch from c)/300)*300 as t"),
        ("$__timeGroup(c , '5m')", "floor(extract(epoch from c)/300)*300"),
        ("$__timeGroupAlias(c, 5m)", 'floor(extract(epoch from c)/300)*300 AS "time"'),
        ("$__timeGroup(c,'12d')", "floor(extract(epoch from c)/1.0368e+06)*1.0368e+06"),
        ("$__timeGroup(c,'20ms')", "floor(extract(epoch from c)/0.02)*0.02"),
        ("$__timeGroup(c,$__interval)", "floor(extract(epoch from c)/3600)*3600"),
        ("$__unixEpochFilter(c)", "c >= 1523556000 AND c <= 1523556300"),
        ("$__unixEpochFrom() $__unixEpochTo()", "1523556000 1523556300"),
        (
            "$__unixEpochNanoFilter(c)",
            "c >= 1523556000000000000 AND c <= 1523556300000000000",
        ),
        ("$__unixEpochNanoFrom()", "1523556000000000000"),
        ("$__unixEpochNanoTo()", "1523556300000000000"),
        ("$__unixEpochGroup(a+b,'5m')", "floor((a+b)/300)*300"),
        ("$__unixEpochGroupAlias(a+b,'5m')", 'floor((a+b)/300)*300 AS "time"'),
        ("$__interval $__interval_ms", "1h 3600000"),
        ("${who:sqlstring}", "'test''value'"),
        ("${many:sqlstring}", "'test','test''value2'"),
        ("'$who' '${who}' '[[who]]'", "'test''value' 'test''value' 'test''value'"),
        ("IN ($many)", "IN ('test','test''value2')"),
        ("${who:raw} ${many:csv}", "test'value test,test'value2"),
        ("$other ${other:sqlstring}", "$other ${other:sqlstring}"),
    ],
)
def test_macros_and_variables(written: str, sent: str) -> None:
    variables = {"who": "test'value", "many": ["test", "test'value2"]}
    assert expand(written, FIVE_MINUTES, variables).sql == sent


def test_macros_keep_fractions_of_seconds() -> None:
    sent = "c BETWEEN '1960-02-01T07:00:00.5Z' AND '1980-02-03T08:00:00.5Z'"
    assert expand("$__timeFilter(c)", HALF_SECONDS).sql == sent


@pytest.mark.parametrize(
    ("argument", "fill"),
    [
        ("NULL", Fill(300, "null")),
        ("previous", Fill(300, "previous")),
        ("0", Fill(300, "value", 0)),
    ],
)
def test_groups_fill_gaps(argument: str, fill: Fill) -> None:
    assert expand(f"$__timeGroup(c, '5m', {argument})", FIVE_MINUTES).fill == fill


@pytest.mark.parametrize(
    "written",
    ["$__nothing(c)", "$__timeGroup(c)", "$__timeGroup(c,'x')", "$__timeGroup(c,'1h','x')"],
)
def test_wrong_macros_are_errors(written: str) -> None:
    with pytest.raises(MacroError):
        expand(written, FIVE_MINUTES)
