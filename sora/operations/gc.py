"""What grows, and what of it no served or recent version needs.

Kept whole are the champion, the one before it, the newest `keep` versions, and the last `keep` champions that a
rollback can return to: their MLflow runs and models, their cached model files, and every object of DVC's cache that
their stored `data.dvc` and `dvc.lock` name. So are the project's present state and git's last commit. What is not
known for sure is kept: when MLflow does not answer, nothing is planned.

Remotes (`dvc push`) are never touched: they are the archive.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from sora.config import Project
from sora.core.errors import InputError, ServiceError
from sora.core.files import writing
from sora.core.processes import quiet_environment
from sora.core.records import ModelVersion
from sora.dataset import versioning
from sora.dataset.versioning.dvc import git
from sora.operations import servers as services
from sora.operations.lock import backup_lock, run_lock
from sora.registry.history import Move, line

DAYS = 7  # after which what an interrupted run left counts as abandoned
LOG_BYTES = 20_000_000  # of a log; the end of a longer one is kept
_LOG_END = 1_000_000
_ACCOUNT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")


class Versions(Protocol):
    """What is asked of `registry.Registry`."""

    tracking_uri: str

    def versions(self) -> list[ModelVersion]: ...
    def history(self) -> list[Move]: ...
    def digests(self) -> dict[int, str]: ...
    def restore_state(self, version: int) -> dict[str, Any]: ...
    def delete_version(self, version: int) -> None: ...


@dataclass(frozen=True)
class Item:
    """One thing that can go: what it is, what that frees, why it may, and how it is done."""

    what: str
    bytes: int
    why: str
    remove: Callable[[], None]


def collect(project: Project, registry: Versions, *, keep: int = 10, dry_run: bool = False) -> dict[str, Any]:
    """Frees what `plan` lists, or with `dry_run` only lists it: `{items: [{what, bytes, why}], bytes}`.

    Raises:
        RunActive: a run or a backup is active (not with `dry_run`).
        ServiceError: MLflow does not answer, or something can't be removed.
    """
    with ExitStack() as held:
        if not dry_run:
            held.enter_context(run_lock(project))
            held.enter_context(backup_lock(project))
        items = plan(project, registry, keep=keep)
        if not dry_run:
            with writing(project.root):
                for item in items:
                    item.remove()
    told = [{"what": item.what, "bytes": item.bytes, "why": item.why} for item in items]
    return {"items": told, "bytes": sum(item.bytes for item in items)}


def plan(project: Project, registry: Versions, *, keep: int = 10) -> list[Item]:
    """What can go, in the order in which it should. Nothing changes."""
    versions = registry.versions()
    kept = kept_states(registry, versions, keep)
    states = [*kept.values(), _present(project), committed_state(project)]
    digests = registry.digests() if versions else {}
    return [
        *_old_versions(project, registry, [v for v in versions if v.version not in kept]),
        *_cache_objects(project, used_objects(project, states)),
        *_model_files(project, {digests.get(number, "") for number in kept}),
        *_abandoned(project),
        *_long_logs(project),
    ]


def kept_states(registry: Versions, versions: list[ModelVersion], keep: int) -> dict[int, dict[str, Any]]:
    """The stored states of the versions that stay whole, by number: the served, the recent, those to roll back to."""
    kept = _kept(versions, registry.history() if versions else [], keep)
    return {number: _state(registry, number) for number in sorted(kept)}


def _kept(versions: Iterable[ModelVersion], history: Iterable[Move], keep: int) -> set[int]:
    newest = sorted(versions, key=lambda one: one.version, reverse=True)
    there = {one.version for one in newest}
    named = {one.version for one in newest if one.aliases or one.decision == "pending"}
    return (named | {one.version for one in newest[:keep]} | set(line(history)[-keep:])) & there


def _state(registry: Versions, number: int) -> dict[str, Any]:
    try:
        return registry.restore_state(number)
    except InputError:  # made by hand, without a stored state: it needs none of DVC's objects
        return {}


def _present(project: Project) -> dict[str, Any]:
    versioning.require_whole(project)  # what a torn one named is not known: nothing may go
    names = ("data.dvc", "dvc.lock")
    return {n: (project.root / n).read_text(encoding="utf-8") for n in names if (project.root / n).is_file()}


def committed_state(project: Project) -> dict[str, Any]:
    """What git's last commit names: a fresh clone, or `git checkout`, comes back to it."""
    found = {}
    for name in ("data.dvc", "dvc.lock"):
        text = git(project.root, "show", f"HEAD:{name}")
        if text:
            found[name] = text
    return found


# --- MLflow ---------------------------------------------------------------------------------------------------------


def _old_versions(project: Project, registry: Versions, old: list[ModelVersion]) -> Iterator[Item]:
    if not old:
        return
    home = project.state / "mlflow"
    for one in sorted(old, key=lambda item: item.version):
        yield Item(
            f"version {one.version}, its run and its model",
            sum(_size(place) for place in _artifacts(home, one.run_id)),
            "neither served nor recent, and no rollback leads to it",
            lambda number=one.version: registry.delete_version(number),  # type: ignore[misc]
        )
    if (home / "mlflow.db").is_file():
        yield Item(
            "what MLflow holds as deleted",
            0,
            "deleting there only hides; bytes as above",
            lambda: _purge(project, registry.tracking_uri),
        )


def _artifacts(home: Path, run_id: str) -> Iterator[Path]:
    """Folders of a run and of its models, below the embedded server's artifacts."""
    if not run_id:
        return
    yield from (home / "artifacts").glob(f"*/{run_id}")
    for described in (home / "artifacts").glob("*/models/*/artifacts/MLmodel"):
        if f"run_id: {run_id}" in described.read_text(encoding="utf-8", errors="replace"):
            yield described.parent.parent


def _purge(project: Project, tracking_uri: str) -> None:
    home, login = project.state / "mlflow", services.login(project, "mlflow")
    account = {} if login is None else dict(zip(_ACCOUNT, login.pair, strict=True))
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "mlflow", "gc"),
            *("--backend-store-uri", f"sqlite:///{home}/mlflow.db"),
            *("--artifacts-destination", str(home / "artifacts")),
        ],
        env=quiet_environment(MLFLOW_TRACKING_URI=tracking_uri, **account),
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        raise ServiceError(f"mlflow gc failed: {answer.stderr.strip()[-500:]}", fix="run `sora gc` again")


# --- DVC ------------------------------------------------------------------------------------------------------------


def used_objects(project: Project, states: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names of the cache's objects (`ab/cdef…`, `ab/cdef….dir`) that the states' data.dvc and dvc.lock name.

    Raises:
        ServiceError: a folder's list of files can't be read, so that what it needs is not known.
    """
    return objects_of(versioning.cache_folder(project) / "files" / "md5", states)


def objects_of(cache: Path, states: Iterable[Mapping[str, Any]]) -> set[str]:
    """`used_objects` where the cache's folder of objects is known: asking DVC for it takes a second."""
    used: set[str] = set()
    for state in states:
        for md5 in _named(state):
            name = f"{md5[:2]}/{md5[2:]}"
            if name in used:
                continue
            used.add(name)
            if name.endswith(".dir") and (cache / name).is_file():
                used.update(_listed(cache / name))
    return used


def _listed(manifest: Path) -> Iterator[str]:
    try:
        for entry in json.loads(manifest.read_text(encoding="utf-8")):
            yield f"{entry['md5'][:2]}/{entry['md5'][2:]}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"{manifest} is damaged, so what it needs is not known: {error!r}", fix="`dvc fetch`, or remove that file"
        ) from error


def _named(state: Mapping[str, Any]) -> Iterator[str]:
    """md5s of the outputs that a state's texts name."""
    data = yaml.safe_load(state.get("data.dvc") or "") or {}
    lock = yaml.safe_load(state.get("dvc.lock") or "") or {}
    stages = list((lock.get("stages") or {}).values())
    for stage in (data, *stages):
        for entry in (*(stage.get("outs") or ()), *(stage.get("deps") or ())):
            if "md5" in entry:
                yield str(entry["md5"])


def _cache_objects(project: Project, used: set[str]) -> Iterator[Item]:
    cache = versioning.cache_folder(project)
    if not cache.resolve().is_relative_to(project.root.resolve()):
        return  # shared with other projects, whose versions are not known here
    objects = cache / "files" / "md5"
    old = time.time() - DAYS * 86400
    unused, leftovers = [], []
    for file in objects.glob("*/*"):
        name = file.relative_to(objects).as_posix()
        if not OBJECT.fullmatch(name):
            if file.is_file() and file.stat().st_mtime < old:
                leftovers.append(file)
        elif name not in used:
            unused.append(file)
    if unused:
        yield Item(
            f"{len(unused)} objects of DVC's cache",
            sum(_size(file) for file in unused),
            "videos and clips that no kept version, the project's present state or its last commit names",
            lambda: _remove_all(unused),
        )
    if leftovers:
        yield Item(
            f"{len(leftovers)} unfinished files in DVC's cache",
            sum(_size(file) for file in leftovers),
            f"left by a process that was killed more than {DAYS} days ago",
            lambda: _remove_all(leftovers),
        )


# --- .sora ----------------------------------------------------------------------------------------------------------


def _model_files(project: Project, needed: set[str]) -> Iterator[Item]:
    for folder in _folders(project.state / "cache" / "models"):
        if folder.name not in needed:
            yield Item(
                f"cached model {folder.name[:12]}",
                _size(folder),
                "of no kept version; MLflow has it as long as its version is there",
                lambda folder=folder: _remove_all([folder]),  # type: ignore[misc]
            )


def _abandoned(project: Project) -> Iterator[Item]:
    old = time.time() - DAYS * 86400
    for parent in ("work", "training"):
        for folder in _folders(project.state / parent):
            if _last_change(folder) < old:
                yield Item(
                    f"{parent}/{folder.name[:12]}",
                    _size(folder),
                    f"of a run that was interrupted and not taken up again for {DAYS} days",
                    lambda folder=folder: _remove_all([folder]),  # type: ignore[misc]
                )


def _long_logs(project: Project) -> Iterator[Item]:
    for log in sorted((project.state / "logs").glob("*.log")):
        size = log.stat().st_size
        if size > LOG_BYTES:
            yield Item(
                f"the beginning of {log.name}",
                size - _LOG_END,
                f"longer than {LOG_BYTES // 10**6} MB; its end is kept",
                lambda log=log: _keep_end(log),  # type: ignore[misc]
            )


def _keep_end(log: Path) -> None:
    """In place, since a running server goes on writing to this very file (appending)."""
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
