"""make bench-docs: writes the tables of docs/performance.md from bench/results/.

Between `<!-- results: NAME PART -->` and `<!-- end -->` stands the table of one part of
bench/results/NAME.json; of the part `machine`, how and where the run was made. With --check nothing
is written, and the exit code is 1 where the document does not show what the results hold.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from results import DIRECTORY, Notes, Results, Row

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
PLACE = re.compile(
    r"(?P<begin><!-- results: (?P<name>[\w-]+) (?P<part>[\w -]+) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def about(results: Results) -> Iterator[str]:
    """How and where a run was made, in sentences."""
    machine = results.machine
    loads = [part.load for part in results.parts.values() if part.load is not None]
    yield f"`{results.command}`, {results.at[:10]}: {machine['cores']} cores"
    if "processor" in machine:
        settings = ", ".join(f"`{name}` {it}" for name, it in machine["settings"].items())
        packages = ", ".join(f"{name} {it}" for name, it in machine["packages"].items())
        yield (
            f" ({machine['processor']}), {int(machine['memory'].split()[0]) / 2**20:.0f} GB; "
            f"{machine['system']}; PostgreSQL {machine['PostgreSQL']}, {packages}; {settings}"
        )
    if loads:
        yield (
            f". The load average was {min(loads):.1f} to {max(loads):.1f}, of which the bench's "
            "own is about 1 to 3"
        )
    yield ".\n"


def table(rows: list[Row], notes: Notes) -> Iterator[str]:
    yield "| what | reached | of | to reach | |\n|---|---|---|---|---|\n"
    for row in rows:
        verdict = row.verdict + notes.mark(row)
        cells = [row.what, row.shown, row.made_of, row.target, verdict]
        yield "".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n"


def shown(name: str, part: str) -> str:
    """What stands between the marks."""
    if not (DIRECTORY / f"{name}.json").exists():
        return "Not measured yet.\n"
    results = Results.read(name)
    if part == "machine":
        return "".join(about(results))
    notes = Notes()
    tables = [
        f"**{title[:1].upper() + title[1:]}**\n\n" + "".join(table(rows, notes)) + "\n"
        for title, rows in results.groups(part)
    ]
    return "".join([*tables, *(f"{number}. {note}\n" for note, number in notes.numbers.items())])


def filled(text: str) -> str:
    """The document with all tables as the results have them."""
    return PLACE.sub(
        lambda place: place["begin"] + shown(place["name"], place["part"]) + place["end"],
        text,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Writes the tables of docs/performance.md from bench/results/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    is_check = parser.parse_args().check
    text = DOCUMENT.read_text()
    new = filled(text)
    if is_check:
        if text != new:
            print("docs/performance.md is not what bench/results/ holds: make bench-docs")
        return int(text != new)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
