"""What people read in a terminal: lines, tables, and progress on standard error.

Everything that is printed passes through here (a test holds it), because names of files and labels are foreign text:
an escape sequence in one could recolour, retitle or overwrite the reader's terminal. Progress is a bar in a terminal
and one plain line now and then elsewhere (logs, CI).
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Bar(Protocol):
    def __call__(self, done: int, total: int, note: str = "") -> None: ...


# Control characters (C0 but tab and line feed, DEL, C1), what reorders text, other ends of line, and lone surrogates,
# which stand for bytes that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable(text: str) -> str:
    """Text that can't affect a terminal: control characters as `\\x1b`. Tabs and line ends stay."""
    return _UNPRINTABLE.sub(lambda match: _escaped(match[0]), text)


def one_line(text: object) -> str:
    """A name or another single value as `printable`, with line ends and tabs escaped too: it can't pose as a line."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def json_text(text: str) -> str:
    """A JSON document, in which `json.dumps` leaves some of these characters as they are, safe to print anywhere.

    They become JSON's own escapes, so that a parser reads the original text.
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def say(text: str) -> None:
    """One line for a person, on standard error: standard output belongs to `--json`."""
    print(printable(text), file=sys.stderr, flush=True)


def echo(text: str, *, err: bool = False, mark: str = "", colour: str | None = None, bold: bool = False) -> None:
    """A line on standard output or standard error; a `mark` before it is coloured; without one the line is bold."""
    import click

    styled = click.style(mark, fg=colour) + " " if mark else ""
    click.echo(styled + click.style(printable(text), bold=True) if bold else styled + printable(text), err=err)


def console(**options: Any) -> Console:
    """Rich's console, whose texts and cells are `printable` before they are drawn."""
    from rich.console import Console
    from rich.text import Text

    class Safe(Console):
        def render_str(self, text: str, **more: Any) -> Text:
            return super().render_str(printable(text), **more)

    return Safe(highlight=False, **options)


def markup(value: object) -> str:
    """A name or another single value inside Rich's markup."""
    from rich.markup import escape

    return escape(one_line(value))


@contextmanager
def bar(title: str, *, every: float = 5.0) -> Iterator[Bar]:
    """Yields `update(done, total, note="")`. Without a terminal a line is printed at most every `every` seconds."""
    if sys.stderr.isatty():
        with _rich_bar(title) as drawn:
            yield drawn
        return
    last = time.monotonic()

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            say(f"{title}: {done}/{total} {one_line(note)}".rstrip())

    yield update


@contextmanager
def _rich_bar(title: str) -> Iterator[Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=markup(note))

        yield update
