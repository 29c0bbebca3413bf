"""Whether the servers' databases are whole, looked at without a server and without being in the way of one.

MLflow's holds the registry and every run; Prefect's holds the history of flow runs, which can be done without. Both are
SQLite files below `.sora/`. A file that was cut, overwritten or copied in the middle of a write gives SQLAlchemy's
tracebacks from a server; here it gets a name and a way out.
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
_SECONDS = 3.0  # that looking at one may take: a reader holds MLflow's writers up
_STEPS = 10_000  # of SQLite's machine between two looks at the clock
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_WAL = 2  # in byte 18 of the header


@dataclass(frozen=True, slots=True)
class State:
    """What one database is. `damage` says in words what is wrong; "" where nothing was found."""

    name: str
    file: Path
    exists: bool
    size: int  # bytes
    damage: str
    whole: bool  # looked at to its end

    @property
    def fix(self) -> str:
        """What to do about damage."""
        if self.name == "prefect":
            return (
                f"move {self.file} away: Prefect begins with an empty one, and only the pages of past flow runs are "
                "lost (versions and metrics are MLflow's); or `sora restore` a backup"
            )
        return (
            f"`sora restore` a backup into a new folder; without one, keep {self.file} (`sqlite3 {self.file.name} "
            ".recover` saves what is left of it) and move it away: version numbers then begin anew"
        )


def file_of(project: Project, name: str) -> Path:
    """Where a server's database lies."""
    return project.database(name)


def look(project: Project, name: str) -> State:
    """Opens a database read-only and has SQLite check it, for some seconds at most. Never raises for what it finds."""
    file = file_of(project, name)
    try:
        size = file.stat().st_size
    except OSError:
        return State(name, file, exists=False, size=0, damage="", whole=True)
    if size == 0:
        # A server that was killed in its first second leaves this, too, and then nothing is lost.
        lost = any((file.parent / "artifacts").glob("*/*"))
        return State(name, file, True, 0, "it is empty, though artifacts of runs lie beside it" if lost else "", True)
    damage, whole = _check(file)
    return State(name, file, True, size, damage, whole)


def require(project: Project, names: Iterable[str] = NAMES) -> None:
    """Raises:
    DatabaseDamaged: one of them is.
    """
    for name in names:
        found = look(project, name)
        if found.damage:
            raise DatabaseDamaged(f"{name}'s database {found.file} is damaged: {found.damage}", fix=found.fix)


@contextmanager
def explained(project: Project, names: Iterable[str]) -> Iterator[None]:
    """Says that a database is damaged where that is why the block failed, whatever its error was.

    Raises:
        DatabaseDamaged: in place of an error of a server or a library.
    """
    try:
        yield
    except (InputError, AnswerIsNo, DatabaseDamaged):
        raise
    except Exception as error:
        try:
            require(project, names)
        except DatabaseDamaged as found:
            raise found from error
        raise


def _check(file: Path) -> tuple[str, bool]:
    """(damage, whether it was looked at to the end)."""
    deadline = time.monotonic() + _SECONDS
    try:
        with file.open("rb") as opened:
            header = opened.read(20)
        # Without its log beside it, a database in this mode is used by nobody; opening it plainly would make one.
        alone = header[18:19] == bytes([_WAL]) and not file.with_name(f"{file.name}-wal").exists()
        address = f"{file.absolute().as_uri()}?mode=ro" + ("&immutable=1" if alone else "")
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=1.0)) as database:
            database.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
            tables = database.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0]
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return (str(error), True) if code in _DAMAGE else ("", False)
    except OSError as error:
        return f"it can't be read: {error.strerror}", False
    if said != "ok":
        return said.splitlines()[-1], True
    return ("", True) if tables else ("it has no tables", True)
