"""The split ledger's rows and how to read them, for dataset and registry. Standard library only."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from sora.core.errors import InputError
from sora.core.records import SPLITS

COLUMNS = ("sha256", "split", "group")
HEADER = ",".join(COLUMNS)
_HEXADECIMAL = frozenset("0123456789abcdef")
BY_HAND = (
    "`sora splits restore` brings back what a judged run recorded; or restore it from git (`git checkout splits.csv`), "
    "or correct that line; Sora never guesses a split"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One video. `group` is "" if none is known."""

    sha256: str
    split: str
    group: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """The ledger that a judged run stored. `version` is None if the run registered none."""

    run_id: str
    version: int | None
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return f"version {self.version}" if self.version is not None else f"run {self.run_id[:8]}"


def parse(content: bytes, name: str) -> list[Row]:
    """The rows of a ledger; a video that is listed twice with one split counts once.

    Raises:
        InputError: it is not a ledger, ends in the middle of a line, or gives a video two splits.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"can't read the split ledger {name}: {error}", fix=BY_HAND) from error
    if text and not text.endswith("\n"):
        last = text.count("\n") + 1
        torn = text.splitlines()[-1][:80]
        raise InputError(f"{name}: line {last} is torn (no end of line): {torn!r}", fix=BY_HAND)
    if text.split("\n", 1)[0].rstrip("\r") != HEADER:
        raise InputError(f"{name}: the first line must be {HEADER!r}, not {text[:80].splitlines()[:1]}", fix=BY_HAND)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))[1:]
    except csv.Error as error:
        raise InputError(f"{name} is not CSV: {error}", fix=BY_HAND) from error
    unique: dict[str, Row] = {}
    for number, cells in enumerate(rows, start=2):
        row = row_of(cells)
        if row is None:
            shown = ",".join(cells)[:100]
            raise InputError(f"{name}: row {number} is not `sha256,split,group`: {shown!r}", fix=BY_HAND)
        known = unique.setdefault(row.sha256, row)
        if known.split != row.split:
            raise InputError(
                f"{name}: row {number} puts {row.sha256[:12]}… in {row.split}, an earlier one in {known.split}",
                fix=BY_HAND,
            )
    return list(unique.values())


def row_of(cells: Sequence[str]) -> Row | None:
    """The row with these cells; None if they are not a row."""
    if len(cells) != 3 or len(cells[0]) != 64 or not _HEXADECIMAL.issuperset(cells[0]) or cells[1] not in SPLITS:
        return None
    return Row(*cells)
