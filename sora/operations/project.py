"""New projects: `sora init DIR --data FOLDER`.

The originals are read, never altered. Every step can be repeated, so an interrupted `init` continues when it is called
again; until it is complete, .sora/init.json says what it was making.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sora.config import Project, of_new_project, params_yaml, parse
from sora.config.credentials import private_state
from sora.core.errors import DiskFull, InputError, ServiceError
from sora.core.files import atomic, writing
from sora.core.progress import Bar
from sora.core.records import RULES
from sora.dataset import versioning
from sora.dataset.scan import BAD_NAME, LABELS, ignored, is_utf8, scan, shown
from sora.dataset.versioning.dvc import environment

_FICLONE = 0x40049409  # ioctl: the new file shares the old one's blocks (Btrfs, XFS, …)
_SPARE = 100_000_000  # bytes that stay free after copying


@dataclass(frozen=True)
class _Source:
    path: str  # in data/, with forward slashes
    file: Path
    size: int


def init(directory: Path, data: Path, *, head: str | None = None, progress: Bar | None = None) -> dict[str, Any]:
    """Makes a project in `directory` from a folder of labelled videos: `{project, videos, classes}`.

    Files without a video's name are left out, `labels.csv` is kept; links are replaced by what they point to.
    `head` is the setting `model.head`: with `multilabel` a row may have several labels, joined by `|`.

    Raises:
        InputError: the folder has no videos of two classes, `directory` can't take them, or git is missing.
        DiskFull, ServiceError: the copies don't fit, or git or DVC failed.
    """
    target, source = directory.absolute().resolve(), data.absolute().resolve()
    _check_places(target, source)
    files = list(_videos(source))
    if not (source / LABELS).is_file():
        _check_classes({file.path.split("/", 1)[0] for file in files if "/" in file.path}, source)
    if not files:
        raise InputError(f"{source} holds no videos", fix="name a folder with <class>/<video>, or with labels.csv")
    made_directory = not target.exists()
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        project = Project(target)
        private_state(project)
        _marker(project).write_text(json.dumps({"source": str(source)}), encoding="utf-8")
    try:
        _copy_all(files, source, project, progress)
        settings = parse("" if head is None else f"model: {{head: {head}}}")
        all_labels = [file.label for file in scan(project.data, settings) if file.label]
        classes = sorted({name for label in all_labels for name in settings.task.names(label)})
        _check_classes(set(classes), source)
    except InputError as error:
        error.message = error.message.replace(str(project.data), str(source))  # the copy is gone: fix the original
        shutil.rmtree(project.data, ignore_errors=True)
        shutil.rmtree(target if made_directory else project.state, ignore_errors=True)
        raise
    with writing(target):
        if not (target / ".git").exists():
            _git(target, "init", "--quiet", "--initial-branch=main")
        _write(target / ".gitignore", template("gitignore"))
        versioning.init(target)
        versioning.add(project)
        _write(project.dvc_yaml, template("dvc.yaml"))
        _write(project.params_file, params_text(_name(target), classes, head))
        _commit(target)
        _marker(project).unlink()
    return {"project": str(target), "videos": len(files), "classes": classes}


def template(name: str) -> str:
    """The text of a file in sora/templates."""
    return (resources.files("sora") / "templates" / name).read_text(encoding="utf-8")


def params_text(name: str, classes: list[str], head: str | None = None) -> str:
    """The params.yaml of a new project with these classes and this `model.head` (None: its default)."""
    model = {} if head is None else {"head": head}
    return params_yaml(of_new_project({"name": name, "classes": classes, "model": model}))


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_places(target: Path, source: Path) -> None:
    if not source.is_dir():
        raise InputError(f"{source} is not a folder", fix="name a folder of labelled videos: --data FOLDER")
    if not is_utf8(str(target)):
        raise InputError(f"the project's folder {shown(str(target))} has a name that is not UTF-8", fix="rename it")
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        raise InputError(f"{target} and {source} overlap", fix="name a folder outside that of the videos")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file", fix="name a new folder")
    if target.is_dir() and any(target.iterdir()):
        try:
            unfinished = json.loads(_marker(Project(target)).read_text(encoding="utf-8"))["source"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{target} is not empty", fix="name a new folder") from None
        if unfinished != str(source):
            raise InputError(
                f"{target} holds an unfinished project of {unfinished}", fix="finish that project, or remove the folder"
            )
    if shutil.which("git") is None:
        raise InputError("git is not installed, and a project is a git repository", fix="install git")


def _check_classes(classes: set[str], source: Path) -> None:
    if len(classes) < 2:
        named = f"only {next(iter(classes))!r}" if classes else "none"
        raise InputError(
            f"a classifier needs videos of two classes, and {source} has {named}",
            fix=f"sort the videos into <class>/ folders, or add {LABELS} (path,label[,group])",
        )


def _marker(project: Project) -> Path:
    return project.init_note


def _name(target: Path) -> str:
    """The folder's name in characters that servers accept."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", target.name).strip("-._")[:64] or "sora"


# --- copies ---------------------------------------------------------------------------------------------------------


def _videos(source: Path) -> Iterator[_Source]:
    """Every file with a video's name, links followed; a folder link that leads back to a parent is left out."""
    pending = [(source, "", frozenset[tuple[int, int]]())]
    while pending:
        folder, below, above = pending.pop()
        facts = folder.stat()
        identity = (facts.st_dev, facts.st_ino)
        if identity in above:
            continue
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder} can't be listed: {error.strerror}", fix="make it readable") from error
        for entry in entries:
            path = below + entry.name
            if ignored(entry.name):
                continue
            if not is_utf8(path):
                raise InputError(f"{source}/{shown(path)}: {BAD_NAME}", fix=RULES["bad_name"])
            if entry.is_dir():
                pending.append((Path(entry.path), path + "/", above | {identity}))
            elif entry.is_file():
                yield _Source(path, Path(entry.path), entry.stat().st_size)
            elif entry.is_symlink():
                raise InputError(f"{entry.path} is a link that leads nowhere", fix="remove it or restore its target")


def _copy_all(files: list[_Source], source: Path, project: Project, progress: Bar | None) -> None:
    copies = list(files)
    if (source / LABELS).is_file():
        copies.append(_Source(LABELS, source / LABELS, (source / LABELS).stat().st_size))
    with writing(project.data):
        project.data.mkdir(exist_ok=True)
        _check_space(copies, project)
        for done, one in enumerate(copies, 1):
            target = project.data / one.path
            if not _is_copy(one, target):
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(one.file, target)
            if progress:
                progress(done, len(copies))


def _is_copy(one: _Source, target: Path) -> bool:
    """Whether an earlier call copied it: a copy gets its name and its time last."""
    try:
        return target.stat().st_size == one.size and target.stat().st_mtime_ns == one.file.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _copy(source: Path, target: Path) -> None:
    """The same bytes under another name, sharing blocks if the file system can."""
    draft = target.with_name(f".{target.name[:200]}.part")
    try:
        try:
            reading = source.open("rb")
        except OSError as error:
            raise InputError(f"{source} can't be read: {error.strerror}", fix="make it readable") from error
        with reading, draft.open("wb") as copy:
            if not _clone(reading.fileno(), copy.fileno()):
                shutil.copyfileobj(reading, copy, 1 << 20)
            facts = os.fstat(reading.fileno())
        os.utime(draft, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _clone(source: int, target: int) -> bool:
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except (ImportError, OSError):
        return False
    return True


def _check_space(copies: list[_Source], project: Project) -> None:
    """Videos are stored in data/ and in DVC's cache; only once if the file system shares blocks."""
    largest = max(copies, key=lambda one: one.size)
    probe = project.probe
    with largest.file.open("rb") as reading, probe.open("wb") as copy:
        shared = _clone(reading.fileno(), copy.fileno())
    probe.unlink()
    missing = sum(one.size for one in copies if not _is_copy(one, project.data / one.path))
    needed = _SPARE if shared else missing + sum(one.size for one in copies) + _SPARE
    free = shutil.disk_usage(project.root).free
    if free < needed:
        raise DiskFull(
            f"{project.root} has {free:,} bytes free, and the videos and DVC's cache need {needed:,}",
            fix="make room, or name a folder on another disk",
        )


# --- git ------------------------------------------------------------------------------------------------------------


def _commit(root: Path) -> None:
    """The only commit that Sora makes."""
    if _git(root, "rev-parse", "--verify", "--quiet", "HEAD", check=False):
        return
    names = [".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "data.dvc", "dvc.yaml", "params.yaml"]
    _git(root, "add", "--", *names)
    identity = []
    if not (_git(root, "config", "user.name", check=False) and _git(root, "config", "user.email", check=False)):
        identity = ["-c", "user.name=Sora", "-c", "user.email=sora@localhost"]
    _git(root, *identity, "-c", "commit.gpgsign=false", "commit", "--quiet", "--no-verify", "-m", "A Sora project")


def _git(root: Path, *arguments: str, check: bool = True) -> str:
    answer = subprocess.run(["git", *arguments], cwd=root, env=environment(), capture_output=True, text=True)
    if check and answer.returncode != 0:
        raise ServiceError(f"git {arguments[0]} in {root} failed: {answer.stderr.strip()}", fix="run `sora init` again")
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _write(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())
