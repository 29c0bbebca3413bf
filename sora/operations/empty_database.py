"""An empty database for Prefect's server, made once per machine.

On SQLite the migrations take 10 seconds, and every new project's first run would wait for them. The kept file
has tables but no user's rows: the server makes its own secrets when it starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from sora.core.errors import SoraError
from sora.core.files import atomic, temporary_folder
from sora.core.processes import quiet_environment, start_child

SECONDS = 120.0  # that making one may take


def cache() -> Path:
    """Where Sora keeps what all projects of this user can share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sora"


def provide(database: Path) -> None:
    """Puts an empty database at `database` if there is none.

    If that fails, for whatever reason, there is still none, and the server makes one.
    """
    if database.exists():
        return
    kept = cache() / f"prefect-{version('prefect')}.db"
    with contextlib.suppress(OSError, SoraError, sqlite3.Error, subprocess.SubprocessError):
        if not _sound(kept):
            _make(kept)
        with kept.open("rb") as source, atomic(database) as target:
            shutil.copyfileobj(source, target)


def _sound(file: Path) -> bool:
    """Whether it exists and SQLite can read it."""
    if not file.is_file():
        return False
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as database:
        try:
            revision = database.execute("SELECT version_num FROM alembic_version").fetchone()
            return bool(revision) and database.execute("PRAGMA quick_check").fetchone() == ("ok",)
        except sqlite3.DatabaseError:
            return False


def _make(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with temporary_folder("database") as folder:
        draft = folder / "prefect.db"
        child = start_child(
            [sys.executable, "-m", "flows.empty_database", str(draft)],
            env=quiet_environment(PREFECT_HOME=str(folder), PREFECT_PROFILES_PATH=f"{folder}/profiles.toml"),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            code = child.wait(SECONDS)
        finally:
            child.kill()
            child.wait()
        if code or not _sound(draft):
            raise sqlite3.DatabaseError("it could not be made")
        with draft.open("rb") as source, atomic(file, shared=True) as target:
            shutil.copyfileobj(source, target)
