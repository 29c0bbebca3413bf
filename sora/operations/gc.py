"""What grows, and which parts of it no served or recent version needs.

These are kept whole: the champion, the one before it, the newest `keep` versions, and the last `keep` champions that a
rollback can return to: their MLflow runs and models, their cached model files, and every object of DVC's cache that
their stored `data.dvc` and `dvc.lock` name. So are the project's present state and git's last commit. What is not
known for sure is kept: if MLflow does not answer, none of these is removed.

What no version can need (the start of long logs, what interrupted runs and killed processes left) is removed first,
before MLflow is started: on a full disk MLflow needs that room to start.

Remotes (`dvc push`) are never touched: they are the archive.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sora.config import Project
from sora.core.errors import ServiceError
from sora.core.files import abandoned_folders, remove_abandoned_folders, writing
from sora.core.processes import quiet_environment
from sora.core.progress import say
from sora.core.records import ModelVersion
from sora.dataset import versioning
from sora.operations import servers as services
from sora.operations.lock import backup_lock, run_lock
from sora.operations.needed import KEEP, OBJECT, Versions, committed_state, kept_states, objects_of

DAYS = 7  # after which the remains of an interrupted run count as abandoned
LOG_BYTES = 20_000_000  # of a log; the end of a longer one is kept
_LOG_END = 1_000_000
_ACCOUNT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be removed: what it is, what that frees, why it may be removed, and how."""

    what: str
    bytes: int
    why: str
    remove: Callable[[], object]


def collect(
    project: Project,
    open_registry: Callable[[], AbstractContextManager[Versions]],
    *,
    keep: int = KEEP,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Frees what no kept version needs, or with `dry_run` only lists it: `{items: [{what, bytes, why}], bytes}`.

    Args:
        open_registry: may start a server; it is called after what needs no registry was removed.

    Raises:
        RunActive: a run or a backup is active (not with `dry_run`).
        ServiceError: MLflow does not answer, or something can't be removed. What was freed before stays freed.
    """
    with ExitStack() as held:
        if not dry_run:
            held.enter_context(run_lock(project))
            held.enter_context(backup_lock(project))
        # One after the other: finding the next may need the room that the last one freed.
        items = [_freed(project, item, dry_run=dry_run) for item in needless(project)]
        if items and not dry_run:
            say(f"freed {sum(item.bytes for item in items):,} bytes that no version needs; asking MLflow for more …")
        with open_registry() as registry:
            items += [_freed(project, item, dry_run=dry_run) for item in plan(project, registry, keep=keep)]
    listed = [{"what": item.what, "bytes": item.bytes, "why": item.why} for item in items]
    return {"items": listed, "bytes": sum(item.bytes for item in items)}


def _freed(project: Project, item: Item, *, dry_run: bool) -> Item:
    if not dry_run:
        with writing(project.root):
            item.remove()
    return item


def needless(project: Project) -> Iterator[Item]:
    """What can be removed whatever the registry holds. Nothing changes."""
    yield from _long_logs(project)
    yield from _abandoned(project)
    yield from _temporary_folders()
    yield from _unfinished_objects(project, _objects(project))


def plan(project: Project, registry: Versions, *, keep: int = KEEP) -> list[Item]:
    """What else can be removed, in the right order. Nothing changes."""
    versions = registry.versions()
    kept = kept_states(registry, versions, keep)
    states = [*kept.values(), _present(project), committed_state(project)]
    digests = registry.digests() if versions else {}
    objects = _objects(project)
    return [
        *_old_versions(project, registry, [v for v in versions if v.version not in kept]),
        *_unused_objects(project, objects, objects_of(objects, states)),
        *_model_files(project, {digests.get(number, "") for number in kept}),
    ]


def _present(project: Project) -> dict[str, Any]:
    versioning.require_whole(project)  # what a torn file names is not known, so nothing may be removed
    names = ("data.dvc", "dvc.lock")
    return {n: (project.root / n).read_text(encoding="utf-8") for n in names if (project.root / n).is_file()}


# --- MLflow ---------------------------------------------------------------------------------------------------------


def _old_versions(project: Project, registry: Versions, old: list[ModelVersion]) -> Iterator[Item]:
    if not old:
        return
    for one in sorted(old, key=lambda item: item.version):
        yield Item(
            f"version {one.version}, its run and its model",
            sum(_size(place) for place in _artifacts(project.artifacts, one.run_id)),
            "neither served nor recent, and no rollback leads to it",
            lambda number=one.version: registry.delete_version(number),  # type: ignore[misc]
        )
    if project.database("mlflow").is_file():
        yield Item(
            "runs and versions that MLflow marked as deleted",
            0,
            "MLflow only hides what is deleted; bytes as above",
            lambda: _purge(project, registry.tracking_uri),
        )


def _artifacts(artifacts: Path, run_id: str) -> Iterator[Path]:
    """Folders of a run and of its models, among the local server's artifacts."""
    if not run_id:
        return
    yield from artifacts.glob(f"*/{run_id}")
    for described in artifacts.glob("*/models/*/artifacts/MLmodel"):
        if f"run_id: {run_id}" in described.read_text(encoding="utf-8", errors="replace"):
            yield described.parent.parent


def _purge(project: Project, tracking_uri: str) -> None:
    login = services.login(project, "mlflow")
    account = {} if login is None else dict(zip(_ACCOUNT, login.pair, strict=True))
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "mlflow", "gc"),
            *("--backend-store-uri", f"sqlite:///{project.database('mlflow')}"),
            *("--artifacts-destination", str(project.artifacts)),
        ],
        env=quiet_environment(MLFLOW_TRACKING_URI=tracking_uri, **account),
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        raise ServiceError(f"mlflow gc failed: {answer.stderr.strip()[-500:]}", fix="run `sora gc` again")


# --- DVC ------------------------------------------------------------------------------------------------------------


def _objects(project: Project) -> Path:
    """The objects' folder in DVC's cache."""
    return versioning.cache_folder(project) / "files" / "md5"


def _is_shared(project: Project, objects: Path) -> bool:
    """Whether other projects, whose versions are not known here, may use the cache too."""
    return not objects.resolve().is_relative_to(project.root.resolve())


def _unused_objects(project: Project, objects: Path, used: set[str]) -> Iterator[Item]:
    if _is_shared(project, objects):
        return
    names = {file.relative_to(objects).as_posix(): file for file in objects.glob("*/*")}
    unused = [file for name, file in names.items() if OBJECT.fullmatch(name) and name not in used]
    if unused:
        yield Item(
            f"{len(unused)} objects of DVC's cache",
            sum(_size(file) for file in unused),
            "videos and clips that no kept version, the project's present state or its last commit names",
            lambda: _remove_all(unused),
        )


def _unfinished_objects(project: Project, objects: Path) -> Iterator[Item]:
    """Files in the cache that are not objects: drafts, and damaged objects that were set aside (`*.damaged`)."""
    if _is_shared(project, objects):
        return
    old = time.time() - DAYS * 86400
    leftovers = [
        file
        for file in objects.glob("*/*")
        if not OBJECT.fullmatch(file.relative_to(objects).as_posix()) and file.is_file() and file.stat().st_mtime < old
    ]
    if leftovers:
        yield Item(
            f"{len(leftovers)} unfinished or damaged files in DVC's cache",
            sum(_size(file) for file in leftovers),
            f"more than {DAYS} days old; left by a process that was killed, or set aside and replaced",
            lambda: _remove_all(leftovers),
        )


# --- .sora and the temporary folder ---------------------------------------------------------------------------------


def _model_files(project: Project, needed: set[str]) -> Iterator[Item]:
    for folder in _folders(project.cache.models):
        if folder.name not in needed:
            yield Item(
                f"cached model {folder.name[:12]}",
                _size(folder),
                "of no kept version; MLflow has it as long as its version exists",
                partial(_remove_all, [folder]),
            )


def _abandoned(project: Project) -> Iterator[Item]:
    old = time.time() - DAYS * 86400
    for parent in (project.work, project.training):
        for folder in _folders(parent):
            if _last_change(folder) < old:
                yield Item(
                    f"{parent.name}/{folder.name[:12]}",
                    _size(folder),
                    f"of a run that was interrupted and not resumed for {DAYS} days",
                    partial(_remove_all, [folder]),
                )


def _temporary_folders() -> Iterator[Item]:
    folders = abandoned_folders()
    if folders:
        yield Item(
            f"{len(folders)} temporary folders",
            sum(_size(folder) for folder in folders),
            "left by killed processes of Sora",
            remove_abandoned_folders,
        )


def _long_logs(project: Project) -> Iterator[Item]:
    for log in sorted(project.logs.glob("*.log")):
        size = log.stat().st_size
        if size > LOG_BYTES:
            yield Item(
                f"the beginning of {log.name}",
                size - _LOG_END,
                f"longer than {LOG_BYTES // 10**6} MB; its end is kept",
                lambda log=log: _keep_end(log),  # type: ignore[misc]
            )


def _keep_end(log: Path) -> None:
    """Shortens it in place, since a running server keeps appending to this very file."""
    with log.open("r+b") as file:
        file.seek(-_LOG_END, 2)
        end = file.read()
        file.seek(0)
        file.write(end)
        file.truncate()


def _folders(parent: Path) -> list[Path]:
    return sorted(place for place in parent.iterdir() if place.is_dir()) if parent.is_dir() else []


def _last_change(folder: Path) -> float:
    return max(place.stat().st_mtime for place in (folder, *folder.rglob("*")))


def _size(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def _remove_all(places: Iterable[Path]) -> None:
    for place in places:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
