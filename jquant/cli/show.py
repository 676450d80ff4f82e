"""What the user sees: progress on standard error, tables, and the one JSON line."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 10.0
errors = Console(stderr=True, highlight=False)


class Bar:
    """One task's progress: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, title: str, progress: Progress | None):
        self.title, self.progress = title, progress
        self.task = None if progress is None else progress.add_task(title, total=None)
        self.started = self.told = time.monotonic()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total`, and what was just done."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, total=total, description=f"{self.title} {text}".strip())
            return
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES:
            return
        self.told = now
        left = (now - self.started) * (total - done) / done if done else None
        print(
            f"{self.title} {done}/{total} {text}".rstrip() + (f", {left:.0f} s left" if left is not None else ""),
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A `Bar` for the time of a with-statement."""
    if not errors.is_terminal:
        yield Bar(title, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        yield Bar(title, progress)


def note(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table on standard output; everything but the first column is aligned right."""
    view = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        view.add_column(header, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        view.add_row(*(str(cell) for cell in row))
    output = Console(highlight=False, markup=False)
    # Redirected output has no width of its own; 160 keeps the longest layer names on one line.
    output.width = output.width if output.is_terminal else 160
    output.print(view)


def result(data: dict[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """The outcome: one JSON object on a line, or readable lines."""
    print(json.dumps(data) if as_json else "\n".join(lines), flush=True)


def size(count: float) -> str:
    """Bytes in the unit a person would use."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
