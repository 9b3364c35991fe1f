"""Prints what scripts/test left in build/test/VERSION for each version of PostgreSQL, a row each;
fails where something did or is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

COLUMNS = ("PostgreSQL", "regress", "pytest passed", "skipped", "failed", "pytest s")


def figures(outcome: Path) -> tuple[list[str], bool]:
    regress = (outcome / "regress").read_text()
    right = len(re.findall(r"\.\.\. ok\b|^ok ", regress, re.MULTILINE))
    wrong = len(re.findall(r"\.\.\. FAILED\b|^not ok ", regress, re.MULTILINE))
    suite = ElementTree.parse(outcome / "pytest.xml").getroot().find("testsuite").attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    server = (outcome / "server").read_text().split()[0]
    row = [
        server,
        f"{right} of {right + wrong}",
        *map(str, (passed, skipped, failed)),
        f"{float(suite['time']):.0f}",
    ]
    return row, right > 0 and passed > 0 and wrong + failed == 0


def main(versions: list[str]) -> bool:
    table, all_well = [list(COLUMNS)], True
    for version in versions:
        try:
            row, is_well = figures(Path("build/test") / version)
        except (OSError, ElementTree.ParseError):
            row, is_well = [version, *["-"] * (len(COLUMNS) - 1)], False
        table.append(row)
        all_well = all_well and is_well
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    return all_well


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
