"""What the demo shows at its end: made beside counted, the four main views, and where to go on.

Every number here is read from a view of the schema analytics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import psycopg
from psycopg.rows import dict_row
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spectrum_shell.demo_data import EXPERIMENT
from spectrum_shell.demo_delivery import Made
from spectrum_shell.render import format_value

Row = Mapping[str, Any]
BAR_WIDTH = 14
REVENUE_DAYS = 10
# Background of a retention cell, from the share that came back.
HEAT = ((0.6, "#1d4ed8"), (0.45, "#2563eb"), (0.3, "#3b82f6"), (0.15, "#60a5fa"), (0, "#93c5fd"))


def read(connection: psycopg.Connection, query: str, *values: Any) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, values).fetchall()


def new_table(text_columns: Iterable[str], number_columns: Iterable[str] = ()) -> Table:
    """Two blanks between columns, so that a terminal of 80 columns is wide enough."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )
    for name in text_columns:
        table.add_column(name)
    for name in number_columns:
        table.add_column(name, justify="right")
    return table


def put(console: Console, title: str, table: Table) -> None:
    console.print(f"\n[bold]{escape(title)}[/]")
    console.print(table)


def show_status(console: Console, state: Row) -> None:
    table = new_table(["", ""])
    table.show_header = False
    for name, value in state.items():
        if value is not None:
            table.add_row(name.replace("_", " "), format_value(value))
    put(console, "spectrum.status()", table)


# Made and counted -------------------------------------------------------------------------------


def compare(connection: psycopg.Connection, made: Made) -> list[tuple[str, Any, Any]]:
    """What the generator made beside what the database counts: (what, made, counted)."""
    total = read(
        connection,
        "SELECT count(*) AS events, count(DISTINCT user_id) AS users,"
        " count(DISTINCT account_id) AS accounts FROM analytics.events",
    )[0]
    pairs = [(name, getattr(made, name), total[name]) for name in ("events", "users", "accounts")]
    state = read(connection, "SELECT done, failed FROM analytics.pipeline_status")[0]
    pairs += [("broken, so failed", made.broken.total(), state["failed"])]
    done = state["done"] - total["events"]
    pairs += [("repeats, so done but no event", made.repeats, done)]
    reached = {
        row["event_type"]: row["users"]
        for row in read(
            connection,
            "SELECT event_type, users FROM analytics.conversion_funnels"
            " WHERE account_id = '*' AND funnel = 'sign_up'",
        )
    }
    pairs += [
        (f"users who reached {step}", n, reached.get(step)) for step, n in made.funnel.items()
    ]
    units = {
        row["variant"]: row
        for row in read(
            connection,
            "SELECT DISTINCT variant, units, excluded_units FROM analytics.experiment_results"
            " WHERE account_id = '*' AND experiment = %s",
            EXPERIMENT,
        )
    }
    for variant, number in sorted(made.units.items()):
        pairs.append((f"units in {variant}", number, units.get(variant, {}).get("units")))
    left_out = {row["excluded_units"] for row in units.values()}
    pairs.append(("units left out", made.units_left_out, left_out.pop() if left_out else None))
    money = {
        row["currency"]: row
        for row in read(
            connection,
            "SELECT currency, sum(gross) AS gross, sum(refunds) AS refunds"
            " FROM analytics.revenue_summary WHERE account_id = '*' GROUP BY currency",
        )
    }
    for kind in ("gross", "refunds"):
        for currency, amount in sorted(getattr(made, kind).items()):
            pairs.append((f"{kind} {currency}", amount, money.get(currency, {}).get(kind)))
    return pairs


def show_comparison(console: Console, pairs: Sequence[tuple[str, Any, Any]]) -> None:
    table = new_table([""], ["made", "counted"])
    table.add_column("")
    for what, made, counted in pairs:
        same = Text("=", "green") if made == counted else Text("differs", "bold red")
        table.add_row(what, number(made), number(counted), same)
    put(console, "Made and counted", table)


# The four main views ----------------------------------------------------------------------------


def show_funnel(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT step, event_type, users, rate_from_start, rate_from_previous, median_seconds"
        " FROM analytics.conversion_funnels WHERE account_id = '*' AND funnel = 'sign_up'"
        " ORDER BY step",
    )
    table = new_table(["step", ""], ["users", "of first", "of previous", "median time"])
    largest = max((row["users"] for row in rows), default=0)
    for row in rows:
        table.add_row(
            f"{row['step']}. {row['event_type']}",
            bar(row["users"], largest),
            number(row["users"]),
            percent(row["rate_from_start"]),
            percent(row["rate_from_previous"]),
            duration(row["median_seconds"]),
        )
    put(console, "analytics.conversion_funnels, funnel sign_up", table)


def show_retention(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT cohort, period, cohort_size, rate, is_complete FROM analytics.retention_cohorts"
        " WHERE account_id = '*' AND retention = 'default' ORDER BY cohort, period",
    )
    cells = {(row["cohort"], row["period"]): row for row in rows}
    periods = sorted({period for _, period in cells})
    table = new_table(["cohort"], ["users", *(f"week {period}" for period in periods)])
    for cohort in sorted({cohort for cohort, _ in cells}):
        found = [cells.get((cohort, period)) for period in periods]
        size = next(cell["cohort_size"] for cell in found if cell)
        table.add_row(day(cohort), number(size), *(heat(cell) for cell in found))
    put(console, "analytics.retention_cohorts, by week of the first event (* still runs)", table)


def show_revenue(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT day, currency, orders, gross, refunds, net, paying_users, active_users, arpu"
        " FROM analytics.revenue_summary WHERE account_id = '*' AND day > ("
        "SELECT max(day) - %s FROM analytics.revenue_summary) ORDER BY day, currency",
        REVENUE_DAYS,
    )
    table = new_table(
        ["day", ""], ["orders", "gross", "refunds", "net", "paying", "active", "ARPU"]
    )
    before = None
    for row in rows:
        table.add_row(
            "" if row["day"] == before else day(row["day"]),
            row["currency"],
            *(number(row[name]) for name in ("orders", "gross", "refunds", "net")),
            *(number(row[name]) for name in ("paying_users", "active_users")),
            "-" if row["arpu"] is None else f"{row['arpu']:.3f}",
        )
        before = row["day"]
    put(console, f"analytics.revenue_summary, the last {REVENUE_DAYS} days", table)


def show_experiment(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT metric, variant, is_control, units, excluded_units, value, ci_low, ci_high, lift,"
        " lift_low, lift_high, p_adjusted, srm_p_value, is_reliable"
        " FROM analytics.experiment_results WHERE account_id = '*' AND experiment = %s"
        " ORDER BY metric, NOT is_control, variant",
        EXPERIMENT,
    )
    table = new_table(
        ["metric", "variant"],
        ["value", "95% interval", "lift", "95% interval", "p (Holm)"],
    )
    before = None
    for row in rows:
        comparison: list[str | Text] = []
        if not row["is_control"]:
            comparison = [f"{row['lift']:.0%}", span(row, "lift", ".0%"), p_value(row)]
        table.add_row(
            "" if row["metric"] == before else row["metric"],
            row["variant"],
            f"{row['value']:#.3g}",
            span(row, "ci", "#.3g"),
            *comparison,
        )
        before = row["metric"]
    put(console, f"analytics.experiment_results, experiment {EXPERIMENT}", table)
    if rows:
        units = ", ".join(f"{row['variant']} {row['units']:,}" for row in rows[:2])
        console.print(
            f"Units: {units}; {rows[0]['excluded_units']} saw both and are left out.\n"
            f"Sample ratio against the planned half and half: p = {rows[0]['srm_p_value']:.3f}.",
            style="dim",
        )


# The way on -------------------------------------------------------------------------------------


def psql_command(connection: psycopg.Connection) -> str:
    info = connection.info
    return f"psql -h {info.host} -p {info.port} -U {info.user} -d {info.dbname}"


def show_way_on(console: Console, connection: psycopg.Connection) -> None:
    console.print("\nGo on exploring:", style="bold")
    console.print(f"  {escape(psql_command(connection))}", soft_wrap=True)
    for statement in (
        "SELECT * FROM analytics.funnel('[\"visit\", \"signup\"]', p_breakdown => 'utm_source');",
        "SELECT * FROM analytics.active_users('2000-01-01') ORDER BY day DESC LIMIT 7;",
        "SELECT payload, error_msg FROM raw_events WHERE status = 'failed' LIMIT 5;",
        "SELECT * FROM spectrum.status();",
    ):
        console.print(f"  {escape(statement)}", soft_wrap=True, style="dim")


# Values as a person reads them ------------------------------------------------------------------


def number(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, Decimal) else format_value(value)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def span(row: Row, name: str, form: str) -> str:
    return f"{row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}}"


def day(value: date) -> str:
    return f"{value:%a %d %b}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def bar(value: float, largest: float) -> Text:
    return Text("█" * round(BAR_WIDTH * value / largest if largest else 0), "blue")


def heat(cell: Row | None) -> Text:
    if cell is None or cell["rate"] is None:
        return Text("")
    colour = next(colour for limit, colour in HEAT if cell["rate"] >= limit)
    mark = " " if cell["is_complete"] else "*"
    return Text(f" {cell['rate']:.0%}{mark}", f"bold white on {colour}")


def p_value(row: Row) -> Text:
    if not row["is_reliable"]:
        return Text("too little data", "dim")
    value = row["p_adjusted"]
    text = "< 0.0001" if value < 0.0001 else f"{value:.4f}"
    return Text(text, "bold green" if value < 0.05 else "")
