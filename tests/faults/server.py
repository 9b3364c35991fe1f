"""A private PostgreSQL server that may be killed: started, stopped and cleaned up by process id.

fsync is off. What is killed here are processes: what they wrote is in the kernel's cache and is
read back whatever fsync says. It would matter for a loss of power, which no test here can make.
synchronous_commit stays on, as it decides what a client may take for committed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

PG_CONFIG = os.environ.get("PG_CONFIG", "/usr/lib/postgresql/15/bin/pg_config")
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "fsync": "off",
    "jit": "off",
    "max_connections": "60",
    "max_worker_processes": "20",
    "shared_buffers": "128MB",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] %a ",
    "autovacuum_naptime": "5s",
}


def pg_config(what: str) -> str:
    done = subprocess.run([PG_CONFIG, f"--{what}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def children_of(pid: int) -> list[int]:
    """Process ids: of Linux, which has /proc."""
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # After the name, which may hold anything: state, parent.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[1]) == pid:
                children.append(int(entry.name))
    return children


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class Server:
    """`with Server() as server`: a fresh cluster that runs; nothing is left of it at the end."""

    def __init__(self, wal_segment_megabytes: int = 16, **settings: str) -> None:
        self.bin = Path(pg_config("bindir"))
        self.settings = SETTINGS | settings
        if (Path(pg_config("pkglibdir")) / "pg_cron.so").exists():
            self.settings = {
                "shared_preload_libraries": "pg_cron",
                "cron.use_background_workers": "on",
            } | self.settings
        self.place = Path(tempfile.mkdtemp(prefix="spectrum-faults-"))
        self.data, self.log = self.place / "data", self.place / "log"
        # root hands the server to the user postgres, an ordinary user runs it himself.
        self.as_server: dict[str, Any] = {"cwd": self.place}
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(self.place, owner.pw_uid, owner.pw_gid)
            self.as_server |= {
                "user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": [],
                "env": os.environ | {"HOME": str(self.place)},
            }  # fmt: skip
        self.postmaster: subprocess.Popen[bytes] | None = None
        self.wal_segment = wal_segment_megabytes

    def __enter__(self) -> Server:
        try:
            self.run(
                "initdb", "--pgdata", str(self.data), "--username=postgres", "--auth=trust",
                "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions",
                f"--wal-segsize={self.wal_segment}",
            )  # fmt: skip
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def run(self, program: str, *arguments: str) -> None:
        """One of PostgreSQL's programs, as the server's user."""
        done = subprocess.run(
            [self.bin / program, *arguments], **self.as_server, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout}\n{self.tail()}")

    def start(self, **settings: str) -> None:
        # Whatever ends us, SIGKILL too, ends the server.
        command = ["setpriv", "--pdeathsig", "QUIT", "--"]
        command += [str(self.bin / "postgres"), "-D", str(self.data), "-k", str(self.place)]
        for name, value in (self.settings | settings).items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("ab") as log:
            self.postmaster = subprocess.Popen(
                command, **self.as_server, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.wait_for()

    def wait_for(self, timeout: float = 60) -> None:
        """Until it lets clients in."""
        end = time.monotonic() + timeout
        while True:
            assert self.postmaster
            try:
                with psycopg.connect(self.dsn(), connect_timeout=5):
                    return
            except psycopg.OperationalError:
                if time.monotonic() > end or self.postmaster.poll() is not None:
                    raise RuntimeError(f"the server does not come up:\n{self.tail()}") from None
            time.sleep(0.02)

    def stop(self, mode: str = "fast") -> None:
        """By pg_ctl: smart, fast or immediate."""
        self.run("pg_ctl", "stop", "--pgdata", str(self.data), "--mode", mode, "--timeout=60")
        assert self.postmaster
        self.postmaster.wait()
        self.postmaster = None

    def kill_postmaster(self, patience: float = 0.1) -> None:
        """kill -9. Its children end by themselves when they are idle and notice; those at work
        are given some time, in which they may even commit, and are then killed too: a server
        does not start beside them."""
        assert self.postmaster
        orphans = children_of(self.postmaster.pid)
        kill(self.postmaster.pid)
        self.postmaster.wait()
        self.postmaster = None
        self._end(orphans, patience)

    @staticmethod
    def _end(pids: list[int], patience: float) -> None:
        end = time.monotonic() + patience
        while any(map(is_alive, pids)):
            if time.monotonic() > end:
                for pid in pids:
                    kill(pid)
            time.sleep(0.01)

    def remove(self) -> None:
        """Ends it by process id, and its data with it."""
        if self.postmaster and self.postmaster.poll() is None:
            children = children_of(self.postmaster.pid)
            kill(self.postmaster.pid, signal.SIGQUIT)
            try:
                self.postmaster.wait(10)
            except subprocess.TimeoutExpired:
                kill(self.postmaster.pid)
                self.postmaster.wait()
            self._end(children, patience=5)
        shutil.rmtree(self.place, ignore_errors=True)

    def limit_files(self, pid: int, size: str) -> None:
        """The largest file that one backend may write, as its own user may set it."""
        subprocess.run(
            ["prlimit", f"--pid={pid}", f"--fsize={size}:"], **self.as_server, check=True
        )  # fmt: skip

    def tail(self, lines: int = 20) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def dsn(self, dbname: str = "postgres", name: str = "") -> str:
        return make_conninfo(
            host=str(self.place), port=5432, user="postgres", dbname=dbname, application_name=name
        )

    def connect(self, dbname: str = "postgres", name: str = "") -> psycopg.Connection:
        return psycopg.connect(self.dsn(dbname, name), autocommit=True, connect_timeout=10)

    @contextmanager
    def session(self, dbname: str = "postgres", name: str = "") -> Iterator[psycopg.Connection]:
        with self.connect(dbname, name) as connection:
            yield connection
