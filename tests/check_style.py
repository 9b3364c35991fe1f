"""Checks the extension's sources against the rules of this project; prints what breaks them.

With --committing-procedures it prints those instead, one a line, as pgspot wants them named.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_DIR = ROOT / "extension" / "src"
# What users have already may be there, and is changed where it is.
MIGRATIONS = SOURCE_DIR / "80_operations" / "85_migrations.sql"
PACKED = SOURCE_DIR / "60_analytics" / "00_packed.sql"
LINE_LIMIT, ROUTINE_LIMIT, FILE_LIMIT = 100, 90, 500

ROUTINE = re.compile(
    r"^CREATE (?P<kind>FUNCTION|PROCEDURE) (?P<name>[\w.@]+)\s*\((?P<head>.*?)"
    r"AS (?P<quote>\$\w*\$)\n(?P<body>.*?)^(?P=quote)(?P<tail>[^;]*);",
    re.DOTALL | re.MULTILINE,
)
RELATION = re.compile(
    r"^\s*CREATE (?:UNLOGGED )?(?P<kind>TABLE|VIEW|MATERIALIZED VIEW) (?P<name>[\w.@]+)",
    re.MULTILINE,
)
ANY_NAME = r"(?P<name>(?:spectrum|warehouse|analytics)\.\w+)"
CREATED = re.compile(rf"\bCREATE (?:\w+ )*?(?:TABLE|VIEW|FUNCTION|PROCEDURE|AGGREGATE) {ANY_NAME}")
NAMED = re.compile(rf"\b{ANY_NAME}")
SCHEMA = re.compile(r"^\s*CREATE SCHEMA (?P<name>\w+)", re.MULTILINE)
COMMENT = re.compile(
    r"COMMENT ON (?:SCHEMA|TABLE|VIEW|MATERIALIZED VIEW|FUNCTION|PROCEDURE) (?P<name>[\w.@]+)"
)
FORBIDDEN = {
    "CREATE OR REPLACE": re.compile(r"\bOR\s+REPLACE\b", re.IGNORECASE),
    "IF NOT EXISTS": re.compile(r"\bIF\s+NOT\s+EXISTS\b(?!\s*\()", re.IGNORECASE),
}
# What operators may call, who have no right on the tables that it writes; and capture, whose
# callers may not see the key.
DEFINERS = {
    f"spectrum.{verb}_{what}"
    for verb in ("define", "drop")
    for what in ("funnel", "retention", "metric", "feature", "attribution", "paths", "experiment")
} | {"spectrum.request", "spectrum.cancel_task", "spectrum.capture"}

# Data flows one way: a room knows those with lower numbers. But another calendar makes all reports
# anew, and configure() is where it is set.
FROM_ABOVE = {("10_config.sql", "spectrum.rebuild_reports")}

MAY_BE_THERE = ("CREATE OR REPLACE", "IF NOT EXISTS")


def code_of(text: str) -> str:
    """The text without its comments."""
    return re.sub(r"--[^\n]*", "", text)


def named_in(text: str) -> str:
    """The code without what is said in strings, line by line as it was."""
    said = re.compile(r"'(?:[^']|'')*'")
    return said.sub(lambda match: "''" + "\n" * match[0].count("\n"), code_of(text))


def room_of(path: Path) -> int:
    return int(path.relative_to(SOURCE_DIR).parts[0][:2])


def check_rooms(listed: list[Path]) -> Iterator[tuple[Path, int, str]]:
    """What a room names of a higher one, but for what setup() is told in strings."""
    codes = {path: named_in(path.read_text(encoding="utf-8")) for path in listed}
    homes = {
        found["name"]: path for path, code in codes.items() for found in CREATED.finditer(code)
    }
    for path, code in codes.items():
        for found in NAMED.finditer(code):
            name = found["name"]
            home = homes.get(name, path)
            if room_of(home) > room_of(path) and (path.name, name) not in FROM_ABOVE:
                line = code.count("\n", 0, found.start()) + 1
                yield path, line, f"{name} is of a higher room: {home.relative_to(SOURCE_DIR)}"


def listed_sources() -> list[Path]:
    """The Makefile's list, in its order."""
    rule = "print-sources:;@printf '%s\\n' $(SOURCES)"
    listed = subprocess.run(
        ["make", "--silent", "--no-print-directory", f"--eval={rule}", "print-sources"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.split()]


def check_layout(text: str) -> Iterator[tuple[int, str]]:
    lines = text.splitlines()
    if len(lines) > FILE_LIMIT:
        yield len(lines), f"a file of {len(lines)} lines, over {FILE_LIMIT}: split it"
    for number, line in enumerate(lines, start=1):
        if len(line) > LINE_LIMIT:
            yield number, f"{len(line)} columns, over {LINE_LIMIT}"
        if "\t" in line:
            yield number, "a tab"
        if line != line.rstrip():
            yield number, "blanks at the end of the line"
        for name, pattern in FORBIDDEN.items():
            if pattern.search(code_of(line)):
                yield number, name


def commits(routine: re.Match[str]) -> bool:
    """Such a procedure, itself or by one it calls, cannot carry SET search_path: it qualifies
    every name and operator."""
    return bool(
        re.search(r"^ *(COMMIT;|CALL spectrum\._carry_out\()", routine["body"], re.MULTILINE)
    )


def signature(routine: re.Match[str]) -> str:
    """The routine as pgspot names it: argument names and types, without defaults."""
    parameters = re.split(r",\n", routine["head"].partition("\n)")[0])
    types = [re.sub(r"\s+DEFAULT\b.*", "", each.strip(" ()\n")) for each in parameters]
    return f"{routine['name']}({','.join(types) if routine['head'][0] != ')' else ''})"


def check_routines(text: str) -> Iterator[tuple[int, str]]:
    created = len(re.findall(r"^CREATE (?:FUNCTION|PROCEDURE)", text, re.MULTILINE))
    routines = list(ROUTINE.finditer(text))
    if created != len(routines):
        yield 1, f"{created} routines created, {len(routines)} understood: AS before a $$ body?"
    for routine in routines:
        line = text.count("\n", 0, routine.start()) + 1
        name = routine["name"]
        size = routine.group().count("\n") + 1
        # Static DDL reads like a script, whatever its length.
        if size > ROUTINE_LIMIT and "._create_" not in name:
            yield line, f"{name} has {size} lines, over {ROUTINE_LIMIT}"
        pinned = "SET search_path = pg_catalog, pg_temp" in routine["head"]
        if pinned == commits(routine):
            yield line, f"{name}: SET search_path, exactly where the routine does not commit"
        if ("SECURITY DEFINER" in routine["head"].upper()) != (name in DEFINERS):
            yield line, f"{name}: SECURITY DEFINER, exactly where DEFINERS lists the routine"
        if routine["tail"].strip():
            yield line, f"{name}: attributes stand before the body"
        if routine["kind"] == "FUNCTION" and not re.search(
            r"\b(IMMUTABLE|STABLE|VOLATILE)\b", routine["head"]
        ):
            yield line, f"{name}: no volatility"


def check_comments(text: str) -> Iterator[tuple[int, str]]:
    commented = {match["name"] for match in COMMENT.finditer(text)}
    for pattern in (ROUTINE, RELATION, SCHEMA):
        for match in pattern.finditer(text):
            if match["name"] not in commented:
                line = text.count("\n", 0, match.start("name")) + 1
                yield line, f"{match['name']} has no COMMENT ON in its file"


def main(arguments: list[str]) -> int:
    listed = listed_sources()
    if arguments == ["--committing-procedures"]:
        texts = [code_of(path.read_text()) for path in listed]
        routines = [found for text in texts for found in ROUTINE.finditer(text)]
        print(*(signature(routine) for routine in routines if commits(routine)), sep="\n")
        return 0
    problems = [
        f"{path.relative_to(ROOT)}:1: not in the Makefile's SOURCES"
        for path in sorted(SOURCE_DIR.rglob("*.sql"))
        if path not in listed
    ]
    problems += [
        f"{path.relative_to(ROOT)}:{line}: {problem}" for path, line, problem in check_rooms(listed)
    ]
    for path in listed:
        text = path.read_text(encoding="utf-8")
        for check in (check_layout, check_routines, check_comments):
            problems += [
                f"{path.relative_to(ROOT)}:{line}: {problem}"
                for line, problem in check(text)
                if path not in (MIGRATIONS, PACKED) or problem not in MAY_BE_THERE
            ]
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
