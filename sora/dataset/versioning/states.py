"""States of a project: everything needed to return to an earlier one, and returning to it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from sora.config import Project
from sora.core import redaction
from sora.core.errors import InputError, ServiceError, SoraError
from sora.core.progress import say
from sora.dataset.versioning.cache import cache_folder, checkout, fix_from_files, object_file, pull, set_aside
from sora.dataset.versioning.data import data_version
from sora.dataset.versioning.dvc import dvc, git
from sora.dataset.versioning.integrity import require_whole
from sora.dataset.versioning.pipeline import CODE_LOCK, code_hash, stages_of

# The files that name a state of a project; a run stores their texts, and `restore` writes them.
STATE_FILES = ("data.dvc", "dvc.yaml", "dvc.lock", CODE_LOCK, "params.yaml", "splits.csv")


def state(project: Project) -> dict[str, Any]:
    """Everything needed to return to the project's present state.

    The texts of `STATE_FILES` (those that exist) by name, and `git_commit` (None without one), `git_dirty`,
    `data_version`, `code_hash`. params.yaml is without its secrets: the state is stored where others read it.

    Raises:
        InputError: data.dvc or dvc.lock is damaged: nobody could return to it.
    """
    require_whole(project)
    texts = {
        name: (project.root / name).read_text(encoding="utf-8")
        for name in STATE_FILES
        if (project.root / name).is_file()
    }
    if "params.yaml" in texts:
        texts["params.yaml"] = redaction.params_text(texts["params.yaml"])
    commit = git(project.root, "rev-parse", "HEAD")
    changed = git(project.root, "status", "--porcelain") if commit else None
    return {
        **texts,
        "git_commit": commit,
        "git_dirty": bool(changed),
        "data_version": data_version(project),
        "code_hash": code_hash(),
    }


def restore(project: Project, saved: dict[str, Any], target: Path, *, data: bool = True) -> Project:
    """Lays out a saved `state` in the new folder `target`, with the cache and remotes of `project`.

    The project's own files stay as they are. `data=False` omits `data/`: manifest, verdicts and shards suffice to
    evaluate a model.

    Objects of the cache are compared with their names before they are laid out. A damaged one is set aside and replaced
    from the project's own files or the remote, whichever has its bytes; a message says so.

    Raises:
        InputError: the state names no data, or `target` is not empty.
        ServiceError: neither cache nor remote has what the state names, or what they have is damaged (it names it).
    """
    if "data.dvc" not in saved or "dvc.lock" not in saved:
        raise InputError("this version has no stored data.dvc and dvc.lock: it can't be restored")
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty", fix="name a new folder")
    (target / ".dvc").mkdir(parents=True, exist_ok=True)
    for name in STATE_FILES:
        if name in saved:
            (target / name).write_text(saved[name], encoding="utf-8")
    for name in ("config", "config.local"):
        if (project.dvc_home / name).is_file():
            _copy_config(project.dvc_home / name, target / ".dvc" / name)
    cache = cache_folder(project)
    settings = [("core.no_scm", "true"), ("cache.dir", str(cache))]
    for key, value in settings:
        dvc(target, "config", "--local", key, value)
    restored = Project(target)
    targets = [*(["data.dvc"] if data else []), *stages_of(restored)]
    checked: set[str] = set()
    damaged = set_aside(cache, _named(saved, data), checked)
    while True:
        fix_from_files(project, cache, damaged)
        _lay_out(restored, targets, cache, damaged)
        # Nothing from the remote has been checked yet, nor what a damaged list of files named.
        more = set_aside(cache, _named(saved, data), checked)
        if not more:
            break
        twice = [md5 for md5 in more if md5 in damaged]
        if twice:
            raise ServiceError(
                f"the remote's copy of {object_file(cache, twice[0])} ({more[twice[0]]}) is damaged too",
                fix="remove it from the remote, and `dvc push` from a clone that has it whole",
            )
        damaged |= more
        for folder in (restored.data, restored.prepared):
            shutil.rmtree(folder, ignore_errors=True)
    for md5, path in damaged.items():
        place = object_file(cache, md5)
        say(f"{place}, which DVC's cache keeps of {path}, was damaged: it was replaced with a whole copy")
    return restored


def _lay_out(restored: Project, targets: list[str], cache: Path, damaged: dict[str, str]) -> None:
    try:
        checkout(restored, targets)
    except ServiceError:
        try:
            pull(restored, targets)
        except SoraError as error:
            lost = [md5 for md5 in damaged if not object_file(cache, md5).exists()]
            if not lost:
                raise
            places = ", ".join(f"{object_file(cache, md5)} ({damaged[md5]})" for md5 in lost[:3])
            raise ServiceError(
                f"{len(lost)} objects of DVC's cache are damaged, and no remote has them: {places}. Their bytes were "
                f"set aside as *.damaged. DVC says: {error.message}",
                fix="`dvc push` where they are whole and run again, or put the original files back into data/ and "
                "`dvc add data`",
            ) from error


def _named(saved: dict[str, Any], data: bool) -> dict[str, str]:
    """MD5 of an output that a state names → its path."""
    outs = yaml.safe_load(saved["data.dvc"])["outs"] if data else []
    for stage in yaml.safe_load(saved["dvc.lock"])["stages"].values():
        outs = [*outs, *stage.get("outs", ())]
    return {str(out["md5"]): str(out["path"]) for out in outs if "md5" in out}


def code_notes(project: Project, saved: dict[str, Any]) -> list[str]:
    """How the code differs from when `saved` was stored, in words."""
    commit, notes = git(project.root, "rev-parse", "HEAD"), []
    if saved.get("code_hash") not in (None, code_hash()):
        notes.append("the preprocessing code has changed since: the stored clips were used, today's would differ")
    if saved.get("git_commit") != commit:
        notes.append(f"git was at {saved.get('git_commit')} then and is at {commit} now")
    if saved.get("git_dirty"):
        notes.append("there were uncommitted changes then")
    return notes


def _copy_config(source: Path, target: Path) -> None:
    """The same remotes for a repository elsewhere: paths relative to the configuration become absolute."""

    def absolute(match: re.Match[str]) -> str:
        place = match[2].strip()
        return match[0] if "://" in place else match[1] + str((source.parent / place).resolve())

    text = re.sub(r"^(\s*url\s*=\s*)(.+)$", absolute, source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    target.write_text(text, encoding="utf-8")
