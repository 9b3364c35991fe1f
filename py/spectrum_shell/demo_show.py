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
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spectrum_shell.demo_data import EXPERIMENT
from spectrum_shell.demo_delivery import Made
from spectrum_shell.render import format_value

Row = Mapping[str, Any]
BAR_WIDTH = 24
REVENUE_DAYS = 10
# Background of a retention cell, from the share that came back.
HEAT = ((0.6, "#1d4ed8"), (0.45, "#2563eb"), (0.3, "#3b82f6"), (0.15, "#60a5fa"), (0, "#93c5fd"))


def read(connection: psycopg.Connection, query: str, *values: Any) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, values).fetchall()


def new_table(title: str, text_columns: Iterable[str], number_columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for name in text_columns:
        table.add_column(name)
    for name in number_columns:
        table.add_column(name, justify="right")
    return table


def show_status(console: Console, state: Row) -> None:
    table = new_table("spectrum.status()", ["", ""], [])
    table.show_header = False
    for name, value in state.items():
        if value is not None:
            table.add_row(name.replace("_", " "), format_value(value))
    console.print(table)


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
    table = new_table("Made and counted", [""], ["made", "counted"])
    table.add_column("")
    for what, made, counted in pairs:
        same = Text("=", "green") if made == counted else Text("differs", "bold red")
        table.add_row(what, number(made), number(counted), same)
    console.print(table)


# The four main views ----------------------------------------------------------------------------


def show_funnel(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT step, event_type, users, rate_from_start, rate_from_previous, median_seconds"
        " FROM analytics.conversion_funnels WHERE account_id = '*' AND funnel = 'sign_up'"
        " ORDER BY step",
    )
    table = new_table(
        "analytics.conversion_funnels, funnel sign_up",
        ["step", ""],
        ["users", "of the first", "of the one before", "median time to it"],
    )
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
    console.print(table)


def show_retention(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT cohort, period, cohort_size, rate, is_complete FROM analytics.retention_cohorts"
        " WHERE account_id = '*' AND retention = 'default' ORDER BY cohort, period",
    )
    cells = {(row["cohort"], row["period"]): row for row in rows}
    periods = sorted({period for _, period in cells})
    table = new_table(
        "analytics.retention_cohorts, by week of the first event (* still runs)",
        ["cohort"],
        ["users", *(f"week {period}" for period in periods)],
    )
    for cohort in sorted({cohort for cohort, _ in cells}):
        found = [cells.get((cohort, period)) for period in periods]
        size = next(cell["cohort_size"] for cell in found if cell)
        table.add_row(day(cohort), number(size), *(heat(cell) for cell in found))
    console.print(table)


def show_revenue(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT day, currency, orders, gross, refunds, net, paying_users, active_users, arpu"
        " FROM analytics.revenue_summary WHERE account_id = '*' AND day > ("
        "SELECT max(day) - %s FROM analytics.revenue_summary) ORDER BY day, currency",
        REVENUE_DAYS,
    )
    table = new_table(
        f"analytics.revenue_summary, the last {REVENUE_DAYS} days",
        ["day", "currency"],
        ["orders", "gross", "refunds", "net", "paying users", "active users", "per active user"],
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
    console.print(table)


def show_experiment(console: Console, connection: psycopg.Connection) -> None:
    rows = read(
        connection,
        "SELECT metric, variant, is_control, units, conversions, value, ci_low, ci_high, lift,"
        " lift_low, lift_high, p_adjusted, srm_p_value, is_reliable"
        " FROM analytics.experiment_results WHERE account_id = '*' AND experiment = %s"
        " ORDER BY metric, NOT is_control, variant",
        EXPERIMENT,
    )
    table = new_table(
        f"analytics.experiment_results, experiment {EXPERIMENT}",
        ["metric", "variant"],
        ["units", "value", "95% interval", "lift over control", "its interval", "p adjusted"],
    )
    before = None
    for row in rows:
        table.add_row(
            "" if row["metric"] == before else row["metric"],
            row["variant"],
            number(row["units"]),
            f"{row['value']:.3f}",
            f"{row['ci_low']:.3f} to {row['ci_high']:.3f}",
            "" if row["is_control"] else percent(row["lift"]),
            ""
            if row["is_control"]
            else f"{percent(row['lift_low'])} to {percent(row['lift_high'])}",
            "" if row["is_control"] else p_value(row),
        )
        before = row["metric"]
    console.print(table)
    if rows:
        console.print(
            f"  Sample ratio: p = {rows[0]['srm_p_value']:.3f}, so the split is as planned."
            if rows[0]["srm_p_value"] >= 0.001
            else "  Sample ratio mismatch: do not trust these results.",
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


def day(value: date) -> str:
    return f"{value:%a %d %b %Y}"


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
