"""What the kept versions need: which versions stay whole, and which objects of DVC's cache they name.

`sora gc` removes the rest; `sora backup` includes exactly this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from sora.config import Project
from sora.core.errors import InputError, ServiceError
from sora.core.records import ModelVersion
from sora.dataset.versioning.dvc import git
from sora.registry.history import Move, line

KEEP = 10  # recent versions that stay whole by default
OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")  # the name of an object in DVC's cache


class Versions(Protocol):
    """The part of `registry.Registry` that is used here."""

    tracking_uri: str

    def versions(self) -> list[ModelVersion]: ...
    def history(self) -> list[Move]: ...
    def digests(self) -> dict[int, str]: ...
    def restore_state(self, version: int) -> dict[str, Any]: ...
    def delete_version(self, version: int) -> None: ...


def kept_states(registry: Versions, versions: list[ModelVersion], keep: int) -> dict[int, dict[str, Any]]:
    """The stored states of the versions that stay whole, by number: the served, the recent, those to roll back to."""
    kept = kept_numbers(versions, registry.history() if versions else [], keep)
    return {number: _state(registry, number) for number in sorted(kept)}


def kept_numbers(versions: Iterable[ModelVersion], history: Iterable[Move], keep: int) -> set[int]:
    """The versions with an alias or a pending decision, the newest `keep`, and the last `keep` champions."""
    newest = sorted(versions, key=lambda one: one.version, reverse=True)
    there = {one.version for one in newest}
    named = {one.version for one in newest if one.aliases or one.decision == "pending"}
    return (named | {one.version for one in newest[:keep]} | set(line(history)[-keep:])) & there


def _state(registry: Versions, number: int) -> dict[str, Any]:
    try:
        return registry.restore_state(number)
    except InputError:  # a version made by hand, without a stored state: it needs no DVC objects
        return {}


def committed_state(project: Project) -> dict[str, Any]:
    """What git's last commit names: a fresh clone or `git checkout` returns to it."""
    texts = {name: git(project.root, "show", f"HEAD:{name}") for name in ("data.dvc", "dvc.lock")}
    return {name: text for name, text in texts.items() if text}


def objects_of(cache: Path, states: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names of the objects (`ab/cdef…`, `ab/cdef….dir`) that the states' data.dvc and dvc.lock name.

    Args:
        cache: the folder `files/md5` of DVC's cache.

    Raises:
        ServiceError: a folder's list of files can't be read, so what it needs is not known.
    """
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
    """The md5s of the outputs that a state's files name."""
    data = yaml.safe_load(state.get("data.dvc") or "") or {}
    lock = yaml.safe_load(state.get("dvc.lock") or "") or {}
    stages = list((lock.get("stages") or {}).values())
    for stage in (data, *stages):
        for entry in (*(stage.get("outs") or ()), *(stage.get("deps") or ())):
            if "md5" in entry:
                yield str(entry["md5"])
