"""Rows of results: what was measured, what is to be reached, and whether it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

DIRECTORY = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure: at most `most` or at least `least` is to be reached, if one of them is given."""

    group: str
    what: str
    value: float | None
    unit: str = ""
    most: float | None = None
    least: float | None = None
    made_of: str = ""
    note: str = ""

    @property
    def target(self) -> str:
        if self.most is not None:
            return f"<= {self.most:,g}"
        return "" if self.least is None else f">= {self.least:,g}"

    @property
    def is_met(self) -> bool | None:
        if self.value is None or not self.target:
            return None
        return self.value <= self.most if self.most is not None else self.value >= self.least

    @property
    def verdict(self) -> str:
        if not self.target:
            return ""
        return {True: "met", False: "not met", None: "not measured"}[self.is_met]

    @property
    def shown(self) -> str:
        return "-" if self.value is None else f"{short(self.value)} {self.unit}".rstrip()


def short(value: float) -> str:
    """Three digits that count, or all before the point."""
    size = abs(value)
    digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def ratio(ours: float, theirs: float, unit: str) -> str:
    """What a ratio is made of."""
    return f"{short(ours)} / {short(theirs)} {unit}"


class Notes:
    """Numbers of the notes of a table's rows, for those that are not met."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, row: Row) -> str:
        if not row.note or not row.target or row.is_met:
            return ""
        return f" ({self.numbers.setdefault(row.note, len(self.numbers) + 1)})"


@dataclass
class Part:
    """What one part of a run measured, and the rows that say it."""

    rows: list[Row]
    measures: object
    load: float | None  # the machine's load average when it was over


@dataclass
class Results:
    """One run: how, when and where it was made, and its parts by name."""

    name: str
    command: str
    at: str
    machine: dict[str, object]
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def begin(cls, name: str, command: str, machine: dict[str, object]) -> Results:
        return cls(name, command, datetime.now(UTC).isoformat(timespec="seconds"), machine)

    @classmethod
    def read(cls, name: str) -> Results:
        content = json.loads((DIRECTORY / f"{name}.json").read_text())
        content["parts"] = {
            name: Part([Row(**row) for row in part["rows"]], part["measures"], part["load"])
            for name, part in content["parts"].items()
        }
        return cls(**content)

    def add(self, name: str, measured: tuple[object, list[Row]]) -> None:
        """Takes what a part measured, and writes all that there is so far."""
        self.parts[name] = Part(measured[1], measured[0], os.getloadavg()[0])
        self.write()

    def write(self) -> None:
        DIRECTORY.mkdir(exist_ok=True)
        self.path(".json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    def path(self, suffix: str) -> Path:
        return DIRECTORY / f"{self.name}{suffix}"

    def print(self) -> None:
        console = Console()
        if not console.is_terminal:
            console.width = 120
        table = Table(title=f"{self.command}, {self.at}")
        table.add_column("what")
        for heading in ("reached", "to reach"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("of")
        notes = Notes()
        for group, rows in self.groups():
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
            for row in rows:
                colour = {True: "green", False: "red", None: "default"}[row.is_met]
                verdict = f"[{colour}]{row.verdict}[/{colour}]{notes.mark(row)}"
                table.add_row(row.what, row.shown, row.target, verdict, row.made_of)
        console.print(table)
        for note, number in notes.numbers.items():
            console.print(f"({number}) {note}")
        console.print(f"written to {self.path('.json')}")

    def groups(self, part: str | None = None) -> list[tuple[str, list[Row]]]:
        """The rows of a part, or of all, under their titles, in their order."""
        rows = [
            row
            for name, content in self.parts.items()
            if part in (None, name)
            for row in content.rows
        ]
        titles = list(dict.fromkeys(row.group for row in rows))
        return [(title, [row for row in rows if row.group == title]) for title in titles]
