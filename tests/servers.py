"""Servers of a test's own: for what concerns a whole server, as standbys, recovery, pg_upgrade.

Each lives in a directory of its own, listens on a socket there and nowhere else, and is stopped
by its own data directory. As root they run as the user postgres, who has to reach the directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import wait_until
from psycopg.conninfo import make_conninfo

SETTINGS = {
    "port": "5432",  # of a socket: it disturbs nobody
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "listen_addresses": "",
    "min_wal_size": "4MB",
    "max_worker_processes": "20",
    "timezone": "UTC",
}
AS_SERVER = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []


def pg_config(what: str) -> Path:
    program = os.environ.get("PG_CONFIG", "pg_config")
    done = subprocess.run([program, what], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def run(*command: str | Path, cwd: Path = Path("/")) -> str:
    """Runs a command as the server's user; what it prints."""
    done = subprocess.run(
        [*AS_SERVER, *map(str, command)], cwd=cwd, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


class Server:
    """A data directory and what runs on it."""

    def __init__(self, base: Path, name: str, bindir: Path | None = None) -> None:
        self.base, self.data = base, base / name
        self.socket, self.log = base / f"{name}.socket", base / f"{name}.log"
        self.bindir = bindir or pg_config("--bindir")

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        return make_conninfo(host=str(self.socket), port="5432", user=user, dbname=dbname)

    def settings(self, **settings: str) -> None:
        """Adds to postgresql.conf: for the next start."""
        lines = [f"{name.replace('__', '.')} = '{value}'\n" for name, value in settings.items()]
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.writelines(lines)

    def start(self, **settings: str) -> Server:
        run("mkdir", "-p", self.socket)
        self.settings(**SETTINGS | {"unix_socket_directories": str(self.socket)} | settings)
        control = [self.bindir / "pg_ctl", "-D", self.data, "-l", self.log, "-w", "start"]
        # Its output is the log's: a pipe would be held open by the server.
        done = subprocess.run(
            [*AS_SERVER, *map(str, control)], cwd="/", timeout=120, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, self.log.read_text()[-2000:]
        return self

    def control(self, *arguments: str) -> None:
        run(self.bindir / "pg_ctl", "-D", self.data, "-w", *arguments)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is pg_ctl's fast, SIGQUIT its immediate."""
        running = self.data / "postmaster.pid"
        if running.exists():
            os.kill(int(running.read_text().split()[0]), how)
            wait_until(lambda: not running.exists(), timeout=60)

    def base_backup(self, name: str, *arguments: str) -> Server:
        """A copy of the running server, under another name: not started."""
        copy = Server(self.base, name, self.bindir)
        run(self.bindir / "pg_basebackup", "-d", self.dsn(), "-D", copy.data, "-c", "fast",
            "--no-sync", *arguments)  # fmt: skip
        return copy


class Place:
    """Where servers live: a directory that their user can reach."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.servers: list[Server] = []

    def initdb(self, name: str, *arguments: str, bindir: Path | None = None) -> Server:
        server = Server(self.base, name, bindir)
        run(pg_config("--bindir") / "initdb", "-D", server.data, "-U", "postgres", "-E", "UTF8",
            "--locale=C.UTF-8", "--no-sync", "--no-instructions",
            "--wal-segsize=1", *arguments)  # fmt: skip
        return self.keep(server)

    def keep(self, server: Server) -> Server:
        self.servers.append(server)
        return server

    def private_bindir(self) -> tuple[Path, Path]:
        """A bindir whose server looks for extensions in a directory of our own, and that one.

        PostgreSQL finds its files by where its program stands: so the program is a copy, in a
        tree like the real one, and all else there are links.
        """
        root, bindir = self.base / "tree", pg_config("--bindir")
        share, library = pg_config("--sharedir"), pg_config("--pkglibdir")
        within = {path: root / path.relative_to("/") for path in (bindir, share, library)}
        within[bindir].mkdir(parents=True)
        for program in bindir.iterdir():
            if program.name in ("postgres", "pg_ctl"):
                shutil.copy(program, within[bindir])
            else:
                (within[bindir] / program.name).symlink_to(program)
        if not within[library].exists():
            within[library].parent.mkdir(parents=True, exist_ok=True)
            within[library].symlink_to(library)
        extensions = within[share] / "extension"
        extensions.mkdir(parents=True)
        for source, target in ((share, within[share]), (share / "extension", extensions)):
            for path in source.iterdir():
                if path.name != "extension" and not path.name.startswith("spectrum"):
                    (target / path.name).symlink_to(path)
        return within[bindir], extensions


@contextmanager
def servers() -> Iterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="spectrum-"))
    if AS_SERVER:
        shutil.chown(base, "postgres", "postgres")
    place = Place(base)
    try:
        yield place
    finally:
        for server in place.servers:
            server.stop(signal.SIGQUIT)
        shutil.rmtree(base)
