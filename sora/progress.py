"""Progress on standard error: bars in a terminal, one plain line now and then elsewhere (logs, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def say(text: str) -> None:
    """One line for a person, on standard error: standard output belongs to `--json`."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, *, every: float = 5.0) -> Iterator[Bar]:
    """Yields `update(done, total, note="")`. Without a terminal a line is printed at most each `every` seconds."""
    if sys.stderr.isatty():
        with _rich_bar(title) as drawn:
            yield drawn
        return
    last = time.monotonic()

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            say(f"{title}: {done}/{total} {note}".rstrip())

    yield update


@contextmanager
def _rich_bar(title: str) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield update
