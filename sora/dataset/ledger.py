"""The split ledger as a file: its rows, those that a judged run recorded, and how lost rows are restored.

`splits.csv` decides which videos the test figures are about. If a row is lost, its video is assigned again, and
yesterday's training videos are in today's test split: the figures rise and mean nothing. So each run stores the ledger
with itself, and the next one compares: all recorded rows must still be there, word for word. Rows may only be added.

Standard library only: `sora doctor` reads ledgers too.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sora.config import Project
from sora.core.errors import InputError, SplitsLost
from sora.core.files import atomic, writing
from sora.core.ledger import BY_HAND, COLUMNS, HEADER, Recorded, Row, parse, row_of
from sora.dataset.versioning.dvc import git

RESTORE = "`sora splits restore` brings back the recorded rows, and keeps new ones"
ANEW = "to assign all videos again on purpose, give the project another `name` in params.yaml: a new history begins"


@dataclass(frozen=True, slots=True)
class Difference:
    """Recorded rows that a ledger lacks (`lost`) or has in another split (`moved`)."""

    lost: tuple[Row, ...]
    moved: tuple[Row, ...]

    def __bool__(self) -> bool:
        return bool(self.lost or self.moved)


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` did, in rows. `copy` is the path of the previous file; None if no file was changed.

    `dropped` counts rows that were not recorded and contradict what was, or could not be read: the next run assigns
    those videos.
    """

    source: str
    rows: int
    returned: int
    corrected: int
    kept: int
    dropped: int
    copy: str | None


def read(path: Path) -> list[Row]:
    """The rows of the ledger; none if there is no file.

    Raises:
        InputError: see `parse`; or the file can't be read.
    """
    return parse(content, str(path)) if (content := _content(path)) is not None else []


def text(rows: Iterable[Row]) -> str:
    """The content of a file with these rows."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((row.sha256, row.split, row.group) for row in rows)
    return out.getvalue()


def compare(recorded: Iterable[Row], now: Iterable[Row]) -> Difference:
    """What of `recorded` is no longer in `now`."""
    split = {row.sha256: row.split for row in now}
    lost, moved = [], []
    for row in recorded:
        if row.sha256 not in split:
            lost.append(row)
        elif split[row.sha256] != row.split:
            moved.append(row)
    return Difference(tuple(lost), tuple(moved))


def require(path: Path, recorded: Recorded | None, *, judged: bool = False) -> list[Row]:
    """The rows of the ledger, which must hold all that the last judged run recorded.

    Args:
        recorded: None if no run was judged, or none whose ledger can be read.
        judged: whether any run was judged.

    Raises:
        SplitsLost: rows are missing or changed, the file is damaged, or it is gone although git's last commit has it.
        InputError: the file is damaged, and there is nothing to restore it from.
    """
    try:
        rows = read(path)
    except InputError as error:
        if recorded is None:
            raise
        raise SplitsLost(f"{error.message}; {recorded.name} was judged on its splits", fix=RESTORE) from error
    if recorded is None:
        if not rows and (judged or _committed(path)):
            who = "runs were judged on its splits" if judged else "git's last commit has it with rows"
            raise SplitsLost(
                f"{path} is gone or empty, and {who}: its videos would be assigned again, and videos that models were "
                "trained on would become test videos",
                fix=f"`git checkout {path.name}`, or `sora restore` a backup; to assign all videos again on purpose, "
                f"commit the removal of {path.name} and give the project another `name` in params.yaml",
            )
        return rows
    if difference := compare(recorded.rows, rows):
        raise SplitsLost(_words(path, recorded, difference, len(rows)), fix=f"{RESTORE}; {ANEW}")
    return rows


def _words(path: Path, recorded: Recorded, difference: Difference, rows: int) -> str:
    what = []
    if difference.lost:
        tests = sum(row.split == "test" for row in difference.lost)
        what.append(f"{len(difference.lost)} of them are missing ({tests} test videos)")
    if difference.moved:
        first = difference.moved[0]
        what.append(f"{len(difference.moved)} are in another split ({first.sha256[:12]}… was {first.split})")
    state = f"{path} has {rows} rows" if path.exists() else f"{path} is missing"
    return (
        f"{recorded.name} was judged on {len(recorded.rows)} videos' splits, and {' and '.join(what)}: {state}. "
        "Assigned again, videos that models were trained on would become test videos, and every figure would flatter"
    )


def restore(path: Path, recorded: Recorded, *, copies: Path) -> Restored:
    """Makes the ledger hold all recorded rows, followed by the rows added since that do not contradict them.

    These contradict: another split for the same video (what was recorded wins), and a split for a group all of whose
    recorded videos are elsewhere. Before a file is changed, it is copied to `copies`.

    Raises:
        DiskFull, ServiceError: it can't be written; the old file remains.
    """
    content = _content(path)
    now, unread = _salvage(content or b"")
    difference = compare(recorded.rows, now)
    own = {row.sha256 for row in recorded.rows}
    sides: dict[str, set[str]] = {}
    for row in recorded.rows:
        if row.group:
            sides.setdefault(row.group, set()).add(row.split)
    new = [row for row in now if row.sha256 not in own]
    kept = [row for row in new if row.split in sides.get(row.group, {row.split})]
    dropped = unread + len(new) - len(kept)
    copy: Path | None = None
    if difference or dropped or content is None:
        if content is not None:
            copy = _keep_copy(content, copies)
        with atomic(path) as file:
            file.write(text([*recorded.rows, *kept]).encode())
    return Restored(
        source=recorded.name,
        rows=len(recorded.rows) + len(kept),
        returned=len(difference.lost),
        corrected=len(difference.moved),
        kept=len(kept),
        dropped=dropped,
        copy=None if copy is None else str(copy),
    )


# --- the copy on this machine, for callers without a server ---------------------------------------------------------


def remember(project: Project, recorded: Recorded) -> None:
    """Keeps what the last judged run recorded in `.sora/`, for `sora check` and `sora doctor`."""
    value = {"name": project.settings().name, **asdict(recorded)}
    place = _remembered_file(project)
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with atomic(place) as file:
        file.write(json.dumps(value).encode())


def remembered(project: Project) -> Recorded | None:
    """What `remember` kept; None if there is nothing, or it has another `name` or can't be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads(_remembered_file(project).read_text(encoding="utf-8"))
        if value["name"] == project.settings().name:
            rows = tuple(Row(**row) for row in value["rows"])
            return Recorded(str(value["run_id"]), value["version"], rows)
    return None


def _remembered_file(project: Project) -> Path:
    return project.judged_splits


# --- parts ----------------------------------------------------------------------------------------------------------


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"can't read the split ledger {path}: {error}", fix=BY_HAND) from error


def _salvage(content: bytes) -> tuple[list[Row], int]:
    """The unambiguous rows of a damaged ledger, and the number of all other lines."""
    lines = content.split(b"\n")
    torn = lines.pop()  # after the last end of line: nothing, or half a line
    unread = int(bool(torn))
    rows: dict[str, Row | None] = {}
    for number, line in enumerate(lines):
        if not line.strip() or (number == 0 and line.strip() == HEADER.encode()):
            continue
        row = None
        with suppress(UnicodeDecodeError, csv.Error, StopIteration):
            row = row_of(next(csv.reader([line.decode("utf-8").rstrip("\r")], strict=True)))
        if row is None:
            unread += 1
        elif row.sha256 not in rows:
            rows[row.sha256] = row
        elif (known := rows[row.sha256]) is not None and known.split != row.split:
            rows[row.sha256] = None  # two splits: neither is believed
    return [row for row in rows.values() if row], unread + sum(row is None for row in rows.values())


def _keep_copy(content: bytes, folder: Path) -> Path:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"splits-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.csv"
    with atomic(place) as file:
        file.write(content)
    return place


def _committed(path: Path) -> bool:
    """Whether git's last commit holds this ledger with rows."""
    held = git(path.parent, "show", f"HEAD:./{path.name}")
    return bool(held) and len(str(held).splitlines()) > 1
