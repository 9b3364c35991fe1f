"""What README.md and docs/*.md show is what happens. Each file runs from top to bottom, in a
database of its own that holds Spectrum (but for the README's):

    ```sql      goes to psql as it stands, a session a block.
    ```python   goes to Python.
    ```text     right after one of these is what it prints; without it the block has to run
                without an error.
    ```console  lines that begin with "$ " go to a shell, the lines below each are what it prints.

A file's blocks work in one directory, which is empty at first. `...` in an output stands for what
differs from run to run; on a line of its own for any lines. `<!-- not run: why -->` before a block
leaves it out, `<!-- needs pg_cron -->` does on a server that has none. Other blocks (```sh, or with
no name) are not run.

After a change of what is printed, `scripts/cluster run test .venv/bin/python tests/test_docs.py
DATABASE FILE...` writes the outputs anew, from an existing database: read the difference.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from conftest import MakeDb, dsn_of, has_extension, run_sql
from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

BLOCK = re.compile(
    r"(?P<before>[^\n]*)\n+(?P<indent> *)```(?P<kind>sql|python|console)\n"
    r"(?P<body>.*?\n)(?P=indent)```\n"
    r"(?:\n(?P=indent)```text\n(?P<shown>.*?)(?P=indent)```\n)?",
    re.DOTALL,
)
COMMAND = re.compile(r"^\$ (?P<command>.*)\n(?P<shown>(?:(?!\$ ).*\n)*)", re.MULTILINE)
PROGRAMS = {"sql": ["psql", "-X"], "python": [sys.executable]}
SHELL = ["bash"]
NEEDS = re.compile(r"<!-- needs (?P<extension>\w+) -->")
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
FAULT = re.compile(r"^(ERROR|Traceback)", re.MULTILINE)
ROLE = re.compile(r"CREATE ROLE (\w+)")


@dataclass(frozen=True)
class Step:
    """One block or one command of a console, and the output that the file shows, if any."""

    line: int
    program: list[str]
    source: str
    shown: str | None
    span: tuple[int, int]
    needs: str | None = None


def read_steps(text: str) -> Iterator[Step]:
    for block in BLOCK.finditer(text):
        if block["before"].startswith("<!-- not run:"):
            continue
        line = text.count("\n", 0, block.start("body")) + 1
        if program := PROGRAMS.get(block["kind"]):
            needs = NEEDS.match(block["before"])
            yield Step(
                line, program, block["body"], block["shown"], block.span("shown"),
                needs and needs["extension"],
            )  # fmt: skip
            continue
        for command in COMMAND.finditer(text, block.start("body"), block.end("body")):
            line = text.count("\n", 0, command.start()) + 1
            yield Step(line, SHELL, command["command"], command["shown"], command.span("shown"))


def steps_of(name: str) -> list[Step]:
    return list(read_steps((ROOT / name).read_text()))


def run_step(step: Step, dsn: str, directory: str) -> str:
    """What the step prints, without blanks at the ends of lines and empty lines at the end."""
    settings = {f"PG{name.upper()}": str(value) for name, value in conninfo_to_dict(dsn).items()}
    settings["PGDATABASE"] = settings.pop("PGDBNAME")
    environment = os.environ | settings | {
        "PATH": ":".join([
            str(Path(sys.executable).parent),
            *filter(None, [os.environ.get("SPECTRUM_DUMP_BINDIR")]),
            os.environ["PATH"],
        ]),
        "SPECTRUM_DSN": "", "PGTZ": "UTC", "LC_ALL": "C.UTF-8", "COLUMNS": "100", "NO_COLOR": "1",
    }  # fmt: skip
    done = subprocess.run(
        step.program, input=step.source, cwd=directory, env=environment, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    lines = [line.rstrip() for line in done.stdout.rstrip().splitlines()]
    return "".join(f"{line}\n" for line in lines)


def matches(printed: str, shown: str) -> bool:
    lines = [
        r"(?:.*\n)*" if line.strip() == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in map(str.rstrip, shown.rstrip().splitlines())
    ]
    return re.fullmatch("".join(lines), printed) is not None


@pytest.fixture
def no_roles(tidy_server: None) -> Iterator[None]:
    """Roles belong to the server: those that the files make go before and after."""
    roles = {role for path in FILES for role in ROLE.findall(path.read_text())}
    statements = [f"DROP ROLE IF EXISTS {role}" for role in sorted(roles)]
    run_sql(dsn_of("postgres"), *statements)
    yield
    run_sql(dsn_of("postgres"), *statements)


@pytest.mark.parametrize("name", [name for name in NAMES if steps_of(name)])
def test_outputs(name: str, no_roles: None, make_db: MakeDb, tmp_path: Path) -> None:
    # The README begins with CREATE EXTENSION.
    dsn = make_db("docs", template="" if name == "README.md" else "spectrum")
    for step in steps_of(name):
        if step.needs and not has_extension(step.needs):
            continue
        printed = run_step(step, dsn, str(tmp_path))
        what = f"{name}:{step.line}\n{step.source}"
        if step.shown is None:
            assert not FAULT.search(printed), f"{what}\n{printed}"
        elif not matches(printed, step.shown):
            assert printed == step.shown, what


def test_a_difference_is_noticed() -> None:
    assert matches("in 0.1 s\nmore\nend\n", "in ... s\n...\nend\n")
    assert not matches("in 0.1 s\nmore\n", "in ... s\n")
    assert not matches("a.b\n", "aXb\n") and not matches("aXb\n", "a.b\n")


def test_every_sqlstate_is_listed() -> None:
    """docs/errors.md is the one list of the codes that Spectrum raises."""
    script = (ROOT / "extension" / "spectrum--1.1.sql").read_text()
    listed = (ROOT / "docs" / "errors.md").read_text()
    for condition in sorted(set(re.findall(r"ERRCODE = '(\w+)'", script))):
        name = "".join(word.capitalize() for word in condition.split("_"))
        assert getattr(psycopg.errors, name).sqlstate in listed, condition


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    for link in LINK.finditer((ROOT / name).read_text()):
        target = (ROOT / name).parent / link["path"] if link["path"] else ROOT / name
        assert target.exists(), f"{name}: {link.group()}"
        assert not link["anchor"] or link["anchor"] in anchors(target), f"{name}: {link.group()}"


def test_the_tests_that_hold_a_promise_are_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    named = {name for path in FILES for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert len(named) > 30
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_there_is_something_to_run() -> None:
    assert len(steps_of("README.md")) >= 3 and len(steps_of("docs/numbers.md")) >= 20


def rewrite(path: Path, dsn: str) -> None:
    """Writes the outputs of a file anew, where they do not match."""
    text = path.read_text()
    with tempfile.TemporaryDirectory() as directory:
        printed = [(step, run_step(step, dsn, directory)) for step in read_steps(text)]
    for step, output in reversed(printed):
        if step.shown is not None and not matches(output, step.shown):
            text = text[: step.span[0]] + output + text[step.span[1] :]
    path.write_text(text)


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        rewrite(Path(argument), psycopg.conninfo.make_conninfo(dbname=sys.argv[1]))
