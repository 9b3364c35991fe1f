"""Drives PostgreSQL's own pg_regress over the regression tests of a checkout."""

import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psycopg

from spectrum_shell.errors import Refused, SpectrumError, Usage

_PRINT_RULE = "spectrum-print:;@printf '%s\\n' '$(PG_CONFIG)' '$(REGRESS)' '$(REGRESS_OPTS)'"


def find_checkout(given: str | None) -> Path:
    """The checkout to test: the one given, else the nearest around the current directory,
    else the one that this package was installed from."""
    if given:
        places = [Path(given)]
    else:
        here = Path.cwd()
        places = [here, *here.parents, *Path(__file__).resolve().parents]
    for place in places:
        if (place / "Makefile").is_file() and (place / "regress" / "sql").is_dir():
            return place.resolve()
    raise Usage(
        f"there is no checkout of Spectrum at {given or Path.cwd()}",
        "run it inside one, or name it: --checkout DIRECTORY",
    )


@dataclass(frozen=True)
class Server:
    """Where pg_regress is to connect."""

    host: str
    port: int
    user: str
    password: str

    @classmethod
    def of(cls, connection: psycopg.Connection) -> "Server":
        info = connection.info
        return cls(info.host, info.port, info.user, info.password)


def run_regress(checkout: Path, tests: tuple[str, ...], server: Server) -> int:
    """Runs the tests (all of the Makefile's list, if none is named) and prints the differences.

    pg_regress makes a database of its own on the server. Returns its exit code: 0 all passed,
    1 some failed, 2 they could not be run.
    """
    pg_config, listed, options = _ask_make(checkout)
    chosen = tests or tuple(listed.split())
    if not chosen:
        raise Refused(f"the Makefile in {checkout} names no regression test (REGRESS)")
    pgxs = Path(_output([pg_config, "--pgxs"]))
    driver = pgxs.parent.parent / "test" / "regress" / "pg_regress"
    if not driver.is_file():
        raise SpectrumError(
            f"there is no pg_regress at {driver}",
            "install PostgreSQL's development files, or set PG_CONFIG",
        )
    with tempfile.TemporaryDirectory(prefix="spectrum-regress-") as results:
        command = [
            str(driver),
            *shlex.split(options),
            f"--bindir={_output([pg_config, '--bindir'])}",
            f"--outputdir={results}",
            f"--host={server.host}",
            f"--port={server.port}",
            f"--user={server.user}",
            *chosen,
        ]
        environment = {**os.environ, "PGPASSWORD": server.password}
        code = subprocess.run(command, cwd=checkout, env=environment, check=False).returncode
        differences = Path(results, "regression.diffs")
        if code and differences.is_file():
            sys.stdout.write(differences.read_text(errors="replace"))
    return code


def _ask_make(checkout: Path) -> list[str]:
    """pg_config, the tests and the options, as the Makefile has them."""
    lines = _output(
        [
            "make",
            "-s",
            "-C",
            str(checkout),
            "--no-print-directory",
            f"--eval={_PRINT_RULE}",
            "spectrum-print",
        ]
    ).splitlines()
    return lines[:3]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise SpectrumError(f"there is no {command[0]} here", "install it, or set PATH") from None
    except subprocess.CalledProcessError as error:
        raise SpectrumError(f"{shlex.join(command)} failed: {error.stderr}") from error
    return done.stdout.strip("\n")
