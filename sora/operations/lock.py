"""One run at a time per project: a lock that the kernel frees when its holder ends, however it ends.

A schedule's limit does not bind a person at a terminal, and a limit on a server can stay taken after a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from sora.config import Project
from sora.config.credentials import private_state
from sora.core.errors import RunActive


def holder(project: Project) -> dict[str, Any] | None:
    """Who holds the run lock now ({"pid", "since"}), or None when it is free."""
    from filelock import FileLock, Timeout

    path = project.run_lock
    if not path.exists():
        return None
    try:
        with FileLock(path, timeout=0):
            return None
    except Timeout:
        try:
            note: dict[str, Any] = json.loads(project.run_note.read_text(encoding="utf-8"))
            return note
        except (OSError, ValueError):
            return {"pid": None, "since": "unknown"}


def require_free(project: Project) -> None:
    """Early, before servers start: that no run holds the project.

    Raises:
        RunActive: as `run_lock`.
    """
    if (who := holder(project)) is not None:
        raise _held(project, who)


@contextmanager
def run_lock(project: Project) -> Iterator[None]:
    """Holds the project while a run is active.

    Raises:
        RunActive: another process holds it; the message says which and since when.
    """
    from filelock import FileLock, Timeout

    private_state(project)
    # Retried: `holder`, which `sora doctor` calls too, has the lock for an instant, and that must not cost a nightly.
    lock = FileLock(project.run_lock, timeout=0.5, poll_interval=0.02)
    try:
        lock.acquire()
    except Timeout as error:
        who = holder(project) or {"pid": None, "since": "just now"}
        raise _held(project, who) from error
    try:
        note = {"pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        with suppress(OSError):  # the disk may be full: only the lock counts, and `sora gc` must get it
            project.run_note.write_text(json.dumps(note), encoding="utf-8")
        yield
    finally:
        lock.release()


@contextmanager
def backup_lock(project: Project, *, seconds: float = 0.0) -> Iterator[None]:
    """Keeps `sora gc` from removing what a backup is about to read, and two backups apart. Runs continue.

    Args:
        seconds: how long to wait for the other.

    Raises:
        RunActive: another process holds it.
    """
    from filelock import FileLock, Timeout

    project.state.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(project.backup_lock, timeout=seconds):
            yield
    except Timeout as error:
        raise RunActive(
            f"a backup or `sora gc` is running in {project.root}", fix="wait until it has ended, then try again"
        ) from error


def _held(project: Project, who: dict[str, Any]) -> RunActive:
    return RunActive(
        f"a run is already active in {project.root} (process {who['pid']}, since {who['since']})",
        fix="wait until it ends, or stop that process",
    )
