"""Whether the servers' databases are whole, checked without a server and without disturbing one.

MLflow's holds the registry and every run; Prefect's holds the history of flow runs, which is dispensable. Both are
SQLite files below `.sora/`. With a file that was cut, overwritten or copied in mid-write a server prints SQLAlchemy's
tracebacks; here the damage gets a name and a fix.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sora.config import Project
from sora.core.errors import AnswerIsNo, DatabaseDamaged, InputError

NAMES = ("mlflow", "prefect")
_SECONDS = 3.0  # that checking one may take: a reader delays MLflow's writers
_STEPS = 10_000  # of SQLite's virtual machine between two looks at the clock
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_WAL = 2  # in byte 18 of the header


@dataclass(frozen=True, slots=True)
class State:
    """The state of one database. `damage` says in words what is wrong; "" if nothing is."""

    name: str
    file: Path
    exists: bool
    size: int  # bytes
    damage: str
    whole: bool  # checked to its end

    @property
    def fix(self) -> str:
        """What to do about damage."""
        if self.name == "prefect":
            return (
                f"move {self.file} away: Prefect starts with an empty one, and only the pages of past flow runs are "
                "lost (MLflow has versions and metrics); or `sora restore` a backup"
            )
        return (
            f"`sora restore` a backup into a new folder; without one, keep {self.file} (`sqlite3 {self.file.name} "
            ".recover` saves what is left of it) and move it away: version numbers then start again at 1"
        )


def file_of(project: Project, name: str) -> Path:
    """Where a server's database lies."""
    return project.database(name)


def look(project: Project, name: str) -> State:
    """Opens a database read-only and has SQLite check it, for a few seconds at most. Never raises for what it finds."""
    file = file_of(project, name)
    try:
        size = file.stat().st_size
    except OSError:
        return State(name, file, exists=False, size=0, damage="", whole=True)
    if size == 0:
        # A server that was killed in its first second also leaves an empty file, and then nothing is lost.
        lost = any((file.parent / "artifacts").glob("*/*"))
        return State(name, file, True, 0, "it is empty, but artifacts of runs are next to it" if lost else "", True)
    damage, whole = _check(file)
    return State(name, file, True, size, damage, whole)


def require(project: Project, names: Iterable[str] = NAMES) -> None:
    """Raises:
    DatabaseDamaged: one of them is.
    """
    for name in names:
        state = look(project, name)
        if state.damage:
            raise DatabaseDamaged(f"{name}'s database {state.file} is damaged: {state.damage}", fix=state.fix)


@contextmanager
def explained(project: Project, names: Iterable[str]) -> Iterator[None]:
    """Reports a damaged database if the block failed because of one, whatever the error was.

    Raises:
        DatabaseDamaged: instead of a server's or a library's error.
    """
    try:
        yield
    except (InputError, AnswerIsNo, DatabaseDamaged):
        raise
    except Exception as error:
        try:
            require(project, names)
        except DatabaseDamaged as damaged:
            raise damaged from error
        raise


def _check(file: Path) -> tuple[str, bool]:
    """(damage, whether it was checked to the end)."""
    deadline = time.monotonic() + _SECONDS
    try:
        with file.open("rb") as opened:
            header = opened.read(20)
        # In this mode a database without its log is not in use; opening it normally would create the log.
        alone = header[18:19] == bytes([_WAL]) and not file.with_name(f"{file.name}-wal").exists()
        address = f"{file.absolute().as_uri()}?mode=ro" + ("&immutable=1" if alone else "")
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=1.0)) as database:
            database.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
            tables = database.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0]
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return (str(error), True) if code in _DAMAGE else ("", False)
    except OSError as error:
        return f"it can't be read: {error.strerror}", False
    if verdict != "ok":
        return verdict.splitlines()[-1], True
    return ("", True) if tables else ("it has no tables", True)
