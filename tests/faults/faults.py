"""What goes wrong: one fault a round, at a random moment, where it finds somebody at work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from random import Random

import psycopg

from .server import Server, kill
from .sessions import Work

AT_WORK = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = %s AND state = 'active' AND application_name LIKE ANY (%s)
    ORDER BY random() LIMIT 1
"""
WORKERS = ["worker%"]
ANYBODY = ["worker%", "worker%", "ticker", "refresher%", "keeper", "loader", "shop%"]


def somebody(server: Server, work: Work, names: list[str], random: Random) -> int:
    """The process id of a backend that is at work, a moment later than it was found so."""
    with server.session() as look:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            found = look.execute(AT_WORK, (work.dbname, names)).fetchone()
            if found:
                time.sleep(random.random() * 0.03)
                return found[0]
            time.sleep(0.002)
    raise RuntimeError(f"nobody of {names} is at work")


def kill_backend(names: list[str]) -> Callable[[Server, Work, Random], None]:
    """kill -9: the server notices, ends all other sessions and recovers."""

    def inject(server: Server, work: Work, random: Random) -> None:
        with server.connect() as witness:
            kill(somebody(server, work, [random.choice(names)], random))
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    witness.execute("SELECT 1")
                    time.sleep(0.005)
        server.wait_for()

    return inject


def kill_postmaster(server: Server, work: Work, random: Random) -> None:
    somebody(server, work, WORKERS, random)
    server.kill_postmaster(patience=random.choice([0, 0.02, 0.3]))
    server.start()


def stop_immediately(server: Server, work: Work, random: Random) -> None:
    somebody(server, work, WORKERS, random)
    server.stop("immediate")
    server.start()


def tell(function: str) -> Callable[[Server, Work, Random], None]:
    def inject(server: Server, work: Work, random: Random) -> None:
        for _ in range(6):
            pid = somebody(server, work, [random.choice(ANYBODY)], random)
            with server.session() as db:
                db.execute(f"SELECT {function}(%s)", (pid,))

    return inject


def hurry(server: Server, work: Work, random: Random) -> None:
    """statement_timeout, for all workers but one, for a while."""
    for worker in work.workers[1:]:
        worker.hurried.set()
    time.sleep(0.8)


# By name, with the weight that each has among the rounds.
FAULTS: dict[str, tuple[Callable[[Server, Work, Random], None], int]] = {
    "kill -9 of a worker": (kill_backend(WORKERS), 5),
    "kill -9 of the postmaster": (kill_postmaster, 5),
    "pg_ctl stop -m immediate": (stop_immediately, 3),
    "kill -9 of any backend": (kill_backend(ANYBODY), 2),
    "pg_cancel_backend": (tell("pg_cancel_backend"), 2),
    "pg_terminate_backend": (tell("pg_terminate_backend"), 2),
    "statement_timeout": (hurry, 1),
}
MAIN_KINDS = [*list(FAULTS)[:3], "pg_terminate_backend"]


def plan(rounds: int, random: Random) -> list[str]:
    """Each kind as often as its weight says, in any order."""
    kinds = [name for name, (_, weight) in FAULTS.items() for _ in range(weight)]
    plan = (kinds * (rounds // len(kinds) + 1))[:rounds] if rounds >= len(kinds) else MAIN_KINDS
    plan = (plan * rounds)[:rounds]
    random.shuffle(plan)
    return plan
