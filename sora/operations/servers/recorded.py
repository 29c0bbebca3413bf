"""Which servers of the project run: `.sora/services.json`.

{name: {"pid", "created", "url", "started", "owner", "login"}}. An entry counts only while the process with that number
*and* that creation time lives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sora.config import Project
from sora.config.credentials import secret
from sora.core.files import atomic
from sora.operations.servers.describe import Server


@dataclass(frozen=True, slots=True)
class Running:
    """One entry of services.json."""

    pid: int
    created: float  # when the process began, seconds since boot (`_created`): process numbers are reused, times are not
    url: str
    started: str  # ISO 8601, UTC
    owner: str  # the command that started it: "run", "up"
    login: str = "none"  # what it asks for: the project's "secret", an "account" of its own; "none": an older Sora


def running(project: Project) -> dict[str, Running]:
    """The servers of this project that are up on this machine, by name. Entries of dead processes are left out."""
    try:
        text = _record(project).read_text(encoding="utf-8")
        entries = {name: Running(**entry) for name, entry in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or not ours: the next start writes it again
    return {name: entry for name, entry in entries.items() if _lives(entry)}


def asked_by(project: Project, server: Server) -> str:
    """`Running.login` of a server."""
    return "secret" if server.login == secret(project) else "account"


def record(project: Project, name: str, pid: int, url: str, *, owner: str, login: str = "secret") -> None:
    """Writes one server into services.json."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    _write(project, {**running(project), name: Running(pid, _created(pid) or 0.0, url, now, owner, login)})


def forget(project: Project, names: Iterable[str]) -> None:
    """Removes servers from services.json."""
    gone = set(names)
    if gone:
        _write(project, {name: entry for name, entry in running(project).items() if name not in gone})


def _lives(entry: Running) -> bool:
    """Whether the process that an entry names is still that process."""
    if _created(entry.pid) == entry.created:
        return True
    import psutil

    try:  # an older Sora wrote the time of day at which the process began
        return bool(psutil.Process(entry.pid).create_time() == entry.created)
    except psutil.Error:
        return False


def _created(pid: int) -> float | None:
    """When a running process began, by a clock that nobody can set; None if no process has this number.

    psutil's times move with the calendar: a server would count as dead once the clock was set by a second, and a
    second server would be started on the same database.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
            return int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")
        except OSError:  # not Linux
            return float(process.create_time())
    except psutil.Error:
        return None


def _record(project: Project) -> Path:
    return project.services


def _write(project: Project, entries: Mapping[str, Running]) -> None:
    with atomic(_record(project), shared=True) as file:
        file.write(json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=1).encode())
