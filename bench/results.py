"""Rows of results: what was measured, what is to be reached, and whether it was."""

from __future__ import annotations

import json
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
        """The value as tables show it: three digits that count."""
        if self.value is None:
            return "-"
        digits = 0 if abs(self.value) >= 100 else 1 if abs(self.value) >= 10 else 2
        if 0 < abs(self.value) < 0.1:
            digits = 4
        return f"{self.value:,.{digits}f} {self.unit}".rstrip()


@dataclass
class Part:
    """What one part of a run measured, and the rows that say it."""

    rows: list[Row]
    measures: object


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
            name: Part([Row(**row) for row in part["rows"]], part["measures"])
            for name, part in content["parts"].items()
        }
        return cls(**content)

    def add(self, name: str, measured: tuple[object, list[Row]]) -> None:
        """Takes what a part measured, and writes all that there is so far."""
        self.parts[name] = Part(measured[1], measured[0])
        self.write()

    def write(self) -> None:
        DIRECTORY.mkdir(exist_ok=True)
        self.path(".json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    def path(self, suffix: str) -> Path:
        return DIRECTORY / f"{self.name}{suffix}"

    def print(self, console: Console) -> None:
        table = Table(title=f"{self.command}, {self.at}")
        table.add_column("what")
        for heading in ("reached", "to reach"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        notes: dict[str, int] = {}
        for group, rows in self.groups():
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
            for row in rows:
                colour = {True: "green", False: "red", None: "default"}[row.is_met]
                mark = ""
                if row.note and not row.is_met:
                    mark = f" ({notes.setdefault(row.note, len(notes) + 1)})"
                table.add_row(
                    row.what + mark, row.shown, row.target, f"[{colour}]{row.verdict}[/{colour}]"
                )
        console.print(table)
        for note, number in notes.items():
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
