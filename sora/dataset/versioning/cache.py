"""DVC's cache and remotes: what moves between them, and objects whose bytes don't match their name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

import yaml

from sora.config import Project
from sora.core.files import writing
from sora.dataset.versioning.dvc import dvc
from sora.media import pool


def push(project: Project, targets: list[str] | None = None) -> None:
    """Uploads what the cache holds of `targets` (stage names, data.dvc; default: all) to their remote."""
    dvc(project.root, "push", *(targets or []))


def pull(project: Project, targets: list[str] | None = None) -> None:
    """Downloads `targets` (stage names, data.dvc; default: all) from their remote and puts them in place."""
    dvc(project.root, "pull", *(targets or []))


def checkout(project: Project, targets: list[str] | None = None) -> None:
    """Puts `targets` in place as data.dvc and dvc.lock name them, only from the cache."""
    dvc(project.root, "checkout", "--force", *(targets or []))


def cache_folder(project: Project) -> Path:
    """Where DVC keeps the bytes of this project's data versions."""
    return Path(dvc(project.root, "cache", "dir").strip())


def object_file(cache: Path, md5: str) -> Path:
    """Where the cache keeps the bytes with this MD5; a folder's MD5 ends in `.dir`."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def recorded_files(project: Project, folder: Path) -> dict[str, str]:
    """Names of the files in an output's folder → MD5, from dvc.lock and DVC's cache; {} if they don't have them."""
    try:
        lock = yaml.safe_load(project.dvc_lock.read_text(encoding="utf-8"))
        path = folder.relative_to(project.root).as_posix()
        outs = (out for stage in lock["stages"].values() for out in stage.get("outs", ()))
        md5 = next(out["md5"] for out in outs if out["path"] == path)
        listing = object_file(cache_folder(project), md5).read_bytes()
        if f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir" != md5:
            return {}
        return {entry["relpath"]: entry["md5"] for entry in json.loads(listing)}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, StopIteration):
        return {}


def set_aside(cache: Path, named: dict[str, str], checked: set[str]) -> dict[str, str]:
    """Renames objects whose bytes don't match their name, so that DVC looks for others: MD5 → path of the file.

    Missing objects are skipped. `checked` holds those that are known to be whole, and is extended.
    """

    def whole(md5: str) -> bool | None:
        place = object_file(cache, md5)
        try:
            with place.open("rb") as file:
                digest = _md5(file)
        except FileNotFoundError:
            return None
        except OSError:  # a sector that can't be read
            digest = ""
        if digest == md5.removesuffix(".dir"):
            checked.add(md5)
            return True
        with writing(place):
            os.replace(place, place.with_name(f"{place.name}.damaged"))
        return False

    damaged = {}
    with ThreadPoolExecutor(pool.cores()) as threads:
        files = dict(named)
        for md5 in [md5 for md5 in named if md5.endswith(".dir")]:
            if md5 not in checked and whole(md5) is False:
                damaged[md5] = named[md5]
            if md5 in checked:
                listed = json.loads(object_file(cache, md5).read_bytes())
                files |= {entry["md5"]: f"{named[md5]}/{entry['relpath']}" for entry in listed}
        todo = [md5 for md5 in files if md5 not in checked and md5 not in damaged]
        for md5, state in zip(todo, threads.map(whole, todo), strict=True):
            if state is False:
                damaged[md5] = files[md5]
    return damaged


def fix_from_files(project: Project, cache: Path, damaged: dict[str, str]) -> None:
    """Copies files that are still whole in the project's own folder back into the cache."""
    for md5, path in damaged.items():
        place, source = object_file(cache, md5), project.root / path
        if place.exists() or not source.is_file():
            continue
        draft = place.with_name(f"{place.name}.{os.getpid()}.part")
        with writing(place):
            shutil.copyfile(source, draft)
            with draft.open("rb") as file:
                if _md5(file) == md5:
                    draft.chmod(0o444)  # as DVC keeps them
                    os.replace(draft, place)
            draft.unlink(missing_ok=True)


def _md5(file: BufferedReader) -> str:
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
