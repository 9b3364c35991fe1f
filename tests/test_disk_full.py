"""No room left: a clear error, nothing half done, and all goes on once there is room again.

Twice: on a small file system of its own, which takes the right to mount one, and with the largest
size of a file limited for the session alone, which takes none.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from faults.rounds import TEMPLATE
from faults.server import Server
from pipeline import drain, event, facts, insert, process, prove, rows, statuses, value

Shortage = Callable[[], AbstractContextManager[None]]
Full = tuple[psycopg.Connection, Shortage]


def some(first: int, number: int) -> list[dict[str, object]]:
    """Users that nobody has seen, and events that take room."""
    return [
        event(event_id=f"e{n}", user_id=f"u{n}", properties={"filler": f"{n:>0400}"})
        for n in range(first, first + number)
    ]


@pytest.fixture
def small_file_system() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="spectrum-small-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        if mounted.returncode:
            pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
        yield place
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


@pytest.fixture
def on_a_small_disk(private_server: Server, small_file_system: Path) -> Iterator[Full]:
    tables = small_file_system / "tables"
    tables.mkdir()
    shutil.chown(tables, user="postgres")

    @contextmanager
    def shortage() -> Iterator[None]:
        ballast = small_file_system / "ballast"
        # Piece by piece: the server takes some of what is free meanwhile.
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"\0" * 65536) == 65536:
                pass
        try:
            yield
        finally:
            ballast.unlink()

    with private_server.session() as admin:
        admin.execute(f"CREATE TABLESPACE small LOCATION '{tables}'")
        admin.execute(
            f"CREATE DATABASE full_disk TEMPLATE {TEMPLATE} STRATEGY file_copy TABLESPACE small"
        )
        try:
            with private_server.session("full_disk") as db:
                yield db, shortage
        finally:
            admin.execute("DROP DATABASE full_disk WITH (FORCE)")
            admin.execute("DROP TABLESPACE small")


@pytest.fixture
def with_limited_files(private_server: Server) -> Iterator[Full]:
    with private_server.session() as admin:
        admin.execute(f"CREATE DATABASE full_disk TEMPLATE {TEMPLATE} STRATEGY file_copy")
        try:
            with private_server.session("full_disk") as db:
                # Files of the WAL have 1 MB here: what is written there stays below.
                @contextmanager
                def shortage() -> Iterator[None]:
                    private_server.limit_files(db.info.backend_pid, str(2**20))
                    try:
                        yield
                    finally:
                        private_server.limit_files(db.info.backend_pid, "unlimited")

                yield db, shortage
        finally:
            admin.execute("DROP DATABASE full_disk WITH (FORCE)")


@pytest.mark.parametrize("kind", ["on_a_small_disk", "with_limited_files"])
def test_nothing_is_half_done(request: pytest.FixtureRequest, kind: str) -> None:
    db, shortage = request.getfixturevalue(kind)

    def fails(statement: str) -> None:
        with pytest.raises(psycopg.Error) as failed:
            db.execute(statement)
        message = str(failed.value)
        if kind == "on_a_small_disk":
            assert isinstance(failed.value, psycopg.errors.DiskFull)
        assert "could not" in message and "Check free disk space" in message, message

    insert(db, some(0, 3000))
    drain(db)
    db.execute("CALL spectrum.refresh_analytics()")
    prove(db, views=True)
    insert(db, some(3000, 3000))
    as_it_is = (3000, {"done": 3000, "pending": 3000})

    with shortage():
        fails("INSERT INTO raw_events (payload) SELECT payload FROM raw_events LIMIT 500")
        fails("CALL spectrum.process_batch(2000)")
        assert (facts(db), statuses(db)) == as_it_is
        # A run tells, too: which step, and why.
        db.execute("CALL spectrum.run()")
        assert (facts(db), statuses(db)) == as_it_is
        told = value(db, "SELECT message FROM spectrum.health() WHERE check_name = 'last run'")
        assert told.startswith("process: could not "), told
    prove(db, views=True)
    assert process(db, 3000).loaded == 3000

    with shortage():
        fails("CALL spectrum.refresh_analytics()")
    assert value(db, "SELECT uncounted FROM spectrum.status()") == 3000
    db.execute("CALL spectrum.run()")
    assert rows(db, "SELECT ok, message FROM spectrum.health() WHERE check_name = 'last run'")[0][0]
    insert(db, some(6000, 10))
    drain(db)
    prove(db, views=True)
    assert facts(db) == 6010
