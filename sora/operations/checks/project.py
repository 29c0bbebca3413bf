"""Checks of the project's own files: settings, disk, data, databases, nightlies and backups; no server is asked."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from sora.config import Project
from sora.operations import databases
from sora.operations.checks.check import Check

_FREE_DISK = 2e9  # bytes


def params(project: Project) -> Check:
    settings = project.settings()
    return Check("params", True, f"{settings.name}, classes: {', '.join(settings.classes) or 'none yet'}")


def disk(project: Project) -> Check:
    free = shutil.disk_usage(project.root).free
    ok = free >= _FREE_DISK
    return Check("disk", ok, f"{free / 1e9:.1f} GB free", "" if ok else "make room: `sora gc --dry-run`")


def writable(project: Project) -> Check:
    folder = project.state if project.state.exists() else project.root
    ok = os.access(folder, os.W_OK)
    fix = "" if ok else f"give yourself write permission: chmod u+w {folder}"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        fix = "the file system is read-only: mount it for writing, or move the project to another disk"
    return Check("writable", ok, str(folder), fix)


def data(project: Project) -> Check:
    from sora.dataset.versioning import require_whole

    require_whole(project)
    if not project.data.is_dir():
        return Check("data", False, f"{project.data} is missing", "sora run (it fetches what data.dvc names)")
    if not project.data_dvc.is_file():
        return Check("data", False, "data/ has no version yet", "sora run (it writes data.dvc)")
    import yaml

    recorded = yaml.safe_load(project.data_dvc.read_text(encoding="utf-8"))["outs"][0]
    files, size = 0, 0
    for folder, _, names in os.walk(project.data):
        for name in names:
            files += 1
            size += (Path(folder) / name).lstat().st_size
    if (files, size) == (recorded.get("nfiles"), recorded.get("size")):
        return Check("data", True, f"{files} files, {size / 1e6:.1f} MB, as data.dvc says")
    detail = (
        f"data/ holds {files} files of {size} bytes, data.dvc names {recorded.get('nfiles')} of {recorded.get('size')}"
    )
    return Check("data", False, detail, "sora run (a new data version), or `dvc checkout` (back to the recorded one)")


def run(project: Project) -> Check:
    from sora.operations.lock import holder

    active = holder(project)
    detail = f"a run is active: process {active['pid']}, since {active['since']}" if active else "no run is active"
    return Check("run", True, detail)


def mlflow_database(project: Project) -> Check:
    return _database(project, "mlflow")


def prefect_database(project: Project) -> Check:
    return _database(project, "prefect")


def _database(project: Project, name: str) -> Check:
    state, check = databases.look(project, name), f"{name} database"
    if not state.exists:
        return Check(check, True, "none yet")
    if state.damage:
        return Check(check, False, f"{state.file} is damaged: {state.damage}", state.fix)
    seen = "" if state.whole else "; it is busy or large, so only part of it was read"
    return Check(check, True, f"{state.size / 1e6:.1f} MB{seen}")


def nightly(project: Project) -> Check:
    from sora.operations import nightly_log

    schedule = project.settings().schedule
    planned = f"{schedule.cron} ({schedule.timezone})"
    last = nightly_log.read(project)
    if last is None:
        return Check("nightly", True, f"{planned}; none has run yet, `sora up` starts the schedule")
    overdue = nightly_log.missed(last, datetime.now(UTC), schedule)
    when = f"{last.finished:%Y-%m-%d %H:%M} UTC"
    good = (
        f"the schedule began {when}"
        if last.outcome == nightly_log.REGISTERED
        else f"last good one {when}: {last.outcome}"
    )
    if overdue is not None:
        return Check(
            "nightly",
            False,
            f"{planned}; {good}; the one of {overdue:%Y-%m-%d %H:%M %Z} did not happen",
            "check that `sora up` is running, and read .sora/logs/worker.log; `sora run` makes up for it",
        )
    return Check("nightly", True, f"{planned}; {good}")


def backup(project: Project) -> Check:
    from sora.operations import backup, nightly_log

    settings, last = project.settings(), backup.last(project)
    wanted = settings.backup
    if last is not None and last.failed is not None:
        return Check(
            "backup",
            False,
            f"{last.failed:%Y-%m-%d %H:%M} UTC: {last.reason.partition(chr(10))[0]}; {_last_backup(last.finished)}",
            "see what the message says, then `sora backup FILE`",
        )
    if last is None or last.finished is None:
        detail = (
            "the next nightly makes the first" if wanted.keep else "none was made (`sora backup FILE`, backup.keep)"
        )
        return Check("backup", True, detail)
    detail = f"{_last_backup(last.finished)}: {last.file}"
    if last.damaged:
        return Check(
            "backup", False, f"{detail}; {'; '.join(last.damaged)}", "repair that in the project, then back up again"
        )
    made = nightly_log.Nightly(last.finished, "backup")
    overdue = nightly_log.missed(made, datetime.now(UTC), settings.schedule) if wanted.keep else None
    if overdue is not None:
        fix = "check that `sora up` is running, and read .sora/logs/worker.log; `sora backup FILE` makes one now"
        return Check("backup", False, f"{detail}; none since the nightly of {overdue:%Y-%m-%d %H:%M %Z}", fix)
    folder = project.root / Path(wanted.folder or "").expanduser()
    if wanted.keep and folder.is_dir() and folder.stat().st_dev == project.root.stat().st_dev:
        detail += "; backup.folder is on the project's own disk, whose failure takes both"
    return Check("backup", True, detail)


def _last_backup(finished: datetime | None) -> str:
    if finished is None:
        return "there is no good backup"
    hours = (datetime.now(UTC) - finished).total_seconds() / 3600
    age = f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
    return f"the last good backup is {age} old"
