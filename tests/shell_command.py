"""Runs the command `spectrum` for the tests of the shell."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass

from click.testing import CliRunner
from spectrum_shell.cli import cli

COMMAND = [sys.executable, "-m", "spectrum_shell"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """What standard error says, which must be one line."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def invoke(*arguments: object) -> Outcome:
    """The command inside this process: quick, for all but standard input and signals."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    return Outcome(result.exit_code, result.stdout, result.stderr)


def run(*arguments: object, stdin: bytes = b"") -> Outcome:
    """The command as a process of its own."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, check=False, timeout=60
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    """The command as a process under way, its three streams in pipes.

    Ctrl-C reaches it even where the tests themselves run in the background, which ignores it.
    """
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
