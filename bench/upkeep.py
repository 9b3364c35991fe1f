"""make bench-upkeep: what it costs to keep senders apart, to forget users and to purge facts."""

from __future__ import annotations

import statistics

import click
import psycopg
from rich.console import Console
from rich.table import Table
from server import Cost, cost, database, refresh, value
from stream import DEFINITIONS, History, prepare, send

GUARDS = {
    "account_share": "0.5", "max_properties": "1000", "max_payload_bytes": "1048576",
    "max_new_event_types": "1000", "max_new_places": "10000", "max_new_accounts": "1000000",
}  # fmt: skip
# In the order of receipt, and each cap as high as it goes.
NO_GUARDS = {
    "account_share": "1", "max_properties": "10000000", "max_payload_bytes": "1000000000",
    "max_new_event_types": "2147483647", "max_new_places": "2147483647",
    "max_new_accounts": "2147483647",
}  # fmt: skip
BATCHES, PAIRS = 5, 8
FLOOD, OTHERS = 300_000, 1_000
SEND_AS = """
    INSERT INTO raw_events (payload)
    SELECT payload || jsonb_build_object('account_id', %s::text)
    FROM bench.payloads(%s, %s) AS payload
"""
# Of the last that were sent.
WAITING = f"""
    SELECT count(*) FROM (SELECT status FROM raw_events ORDER BY seq DESC LIMIT {OTHERS}) AS last
    WHERE status = 'pending'
"""
USERS = """
    (SELECT user_id, count(*) FROM analytics.events GROUP BY 1 HAVING count(*) = 9 LIMIT 1)
    UNION ALL
    (SELECT user_id, count(*) FROM analytics.events GROUP BY 1 ORDER BY 2 DESC LIMIT 1)
"""
MONTHS = """
    SELECT facts_from, (SELECT array_agg((name, is_attached)) FROM spectrum._fact_months())
    FROM spectrum.horizon
"""


def choose(connection: psycopg.Connection, settings: dict[str, str]) -> None:
    for setting, chosen in settings.items():
        connection.execute("SELECT spectrum.configure(%s, %s)", (setting, chosen))


def batches(connection: psycopg.Connection, count: int) -> int:
    taken = 0
    for _ in range(count):
        row = connection.execute("CALL spectrum.process_batch()").fetchone()
        assert row is not None
        taken += row[0]
    return taken


def guards(connection: psycopg.Connection) -> str:
    """Batches of what waits, with the guards and without, by turns."""
    spent: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(PAIRS):
        for is_on in (True, False) if turn % 2 else (False, True):
            choose(connection, GUARDS if is_on else NO_GUARDS)
            one = cost(lambda: batches(connection, BATCHES), connection)
            spent[is_on].append(one.cpu_seconds)
    choose(connection, GUARDS)
    on, off = spent[True], spent[False]
    ratio = statistics.median(map(float.__truediv__, on, off))
    return f"{ratio:.3f} (median of {PAIRS} pairs; least of each {min(on) / min(off):.3f})"


def flood(connection: psycopg.Connection, first: int) -> tuple[str, Cost]:
    """One account sends much, then another a little: how long until that is facts."""
    connection.execute(SEND_AS, ("loud", first, first + FLOOD - 1))
    connection.execute(SEND_AS, ("quiet", first + FLOOD, first + FLOOD + OTHERS - 1))
    taken: list[int] = []

    def take() -> None:
        while value(connection, WAITING):
            taken.append(batches(connection, 1))

    spent = cost(take, connection)
    return f"{OTHERS:,} events behind a flood of {FLOOD:,}: in batch {len(taken)}", spent


def work_on(
    connection: psycopg.Connection, kind: str, *arguments: str
) -> list[tuple[object, Cost]]:
    """A task step by step, with what months of facts there are after each."""
    task = value(
        connection,
        "SELECT spectrum.request('{}', jsonb_build_object({}))".format(
            kind, ", ".join(f"'{argument}'" for argument in arguments)
        ),
    )
    steps: list[tuple[object, Cost]] = []
    going_on = [True]
    while going_on[-1]:
        spent = cost(
            lambda: going_on.append(
                bool(value(connection, f"SELECT spectrum._work_on_task({task})"))
            ),
            connection,
        )
        steps.append((connection.execute(MONTHS).fetchone(), spent))
    if value(connection, f"SELECT state FROM spectrum.tasks WHERE task_id = {task}") != "done":
        raise SystemExit(f"task {task} was not finished")
    return steps


def total(spent: list[Cost]) -> Cost:
    return Cost(
        sum(one.seconds for one in spent),
        sum(one.cpu_seconds for one in spent),
        sum(one.wal_bytes for one in spent),
    )


def purge(connection: psycopg.Connection) -> list[tuple[str, Cost]]:
    """All months that are old enough; the steps that move something by what they moved."""
    before: object = connection.execute(MONTHS).fetchone()
    moved: dict[str, list[Cost]] = {}
    for after, spent in work_on(connection, "purge_facts", "older_than", "3 months"):
        (was_from, was), (is_from, months) = before, after  # type: ignore[misc]
        kind = (
            "freeze" if is_from != was_from
            else "drop" if len(months or ()) < len(was or ())
            else "detach" if months != was
            else "close and count"
        )  # fmt: skip
        moved.setdefault(kind, []).append(spent)
        before = after
    return [(f"purge: {kind}", total(spent)) for kind, spent in moved.items()]


@click.command(context_settings={"show_default": True})
@click.option("--events", envvar="BENCH_EVENTS", show_envvar=True, default=1_000_000,
              type=click.IntRange(min=900_000), help="Events of the month.")  # fmt: skip
def main(events: int) -> None:
    """Measures caps and fair claiming, a flood, forgetting and purging, in a month of events."""
    table = Table("what", "processor s", "s", "WAL, MB")
    history = History("month", events, events // 20, days=31)

    def show(what: str, spent: Cost) -> None:
        row = f"{spent.cpu_seconds:.2f}", f"{spent.seconds:.2f}", f"{spent.wal_bytes / 1e6:.1f}"
        table.add_row(what, *row)
        Console(stderr=True).print(what, *row)

    with database("spectrum_bench") as connection:
        prepare(connection, history)
        connection.execute(DEFINITIONS)
        send(connection, 0, events)
        dear = guards(connection)
        Console(stderr=True).print(dear)
        for _ in range(3):
            connection.execute("CALL spectrum.run()")
        refresh(connection)
        connection.execute("VACUUM (ANALYZE)")
        for user, count in connection.execute(USERS).fetchall():
            steps = work_on(connection, "forget_user", "user_id", user)
            show(f"forget_user: {count:,} events", total([spent for _, spent in steps]))
        show(*flood(connection, events))
        while batches(connection, 1):
            pass
        refresh(connection)
        for what, spent in purge(connection):
            show(what, spent)
    console = Console(width=120)
    console.print(table)
    console.print(f"A batch with caps and fair claiming takes {dear} of what it takes without.")


if __name__ == "__main__":
    main()
