"""An empty database for Prefect's server, made once a machine.

On SQLite the migrations that make one take 10 seconds, which every new project's first run would wait for. What is kept
holds tables and no row of anybody's: the server makes its own secrets when it starts.
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

SECONDS = 120.0  # that making it may take


def cache() -> Path:
    """Where Sora keeps what every project of this user can share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sora"


def provide(database: Path) -> None:
    """Puts an empty database at `database` where there is none.

    Where that fails, for whatever reason, there is still none: the server makes one.
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
    """It is there, and SQLite can read it."""
    if not file.is_file():
        return False
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as database:
        try:
            found = database.execute("SELECT version_num FROM alembic_version").fetchone()
            return bool(found) and database.execute("PRAGMA quick_check").fetchone() == ("ok",)
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
