"""How far a load has come: a progress bar on a terminal, nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from spectrum_shell.load import Report
from spectrum_shell.source import Source


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error that work goes on; gives what changes the text."""
    with Console(stderr=True).status(text) as status:
        yield status.update


class Meter:
    """Shows on standard error, while it is open, how far each input has been read."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def open(self, source: Source) -> Report:
        """A line for this input; what it returns is to be called with (bytes read, events)."""
        task = self._progress.add_task(source.name, total=source.size, rate="")

        def report(bytes_read: int, events: int) -> None:
            elapsed = self._progress.tasks[task].elapsed or 0
            rate = f"{events / elapsed:,.0f} events/s" if elapsed else ""
            self._progress.update(task, completed=bytes_read, rate=rate)

        return report
