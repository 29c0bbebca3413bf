"""Which files of a data folder are videos by name, with their labels and groups."""

from __future__ import annotations

import csv
import os
import re
import stat
import unicodedata
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from sora.config import Settings
from sora.core.errors import InputError

LABELS = "labels.csv"
# Not videos by name. Pictures, sound and archives are not here: among videos they are mistakes worth reporting.
_DOCUMENTS = frozenset(
    """
    bib cff cfg csv doc docx dvc html ini json jsonl log lock md md5 ods odt pdf py rst rtf sh sha1 sha256 sha512
    srt sub tex toml tsv txt vtt xls xlsx xml yaml yml
    """.split()  # noqa: SIM905
)
_DOCUMENT_NAMES = re.compile(r"(readme|licen[cs]e|copying|notice|authors|changelog|citation|makefile)[\w-]*", re.I)
UNVERSIONED = frozenset({".git", ".hg", ".dvc"})  # folders that DVC never versions, wherever they are
BAD_NAME = "its name is not UTF-8, and no version of data/ can hold it"
_SYSTEM_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, slots=True)
class Found:
    """One file of the folder. `problem` is a rule of `records.RULES` that holds whatever the file's bytes are."""

    path: str  # relative, with forward slashes
    label: str | None
    group: str | None
    problem: str | None = None
    detail: str = ""


def ignored(name: str, folder: bool = False) -> bool:
    """Whether Sora ignores a file or folder of this name. A class may be called `log`, a video may not."""
    if name.startswith(".") or name.lower() in _SYSTEM_NAMES:
        return True
    stem, _, suffix = name.rpartition(".")
    named = suffix.lower() in _DOCUMENTS if stem else _DOCUMENT_NAMES.fullmatch(name) is not None
    return named and not folder


def scan(folder: Path, settings: Settings) -> list[Found]:
    """All files below `folder` that are videos by name, sorted by path.

    The label is the first folder's name, or comes from `labels.csv` (`path,label[,group]`) if there is one; then
    files that it does not list have no label. With `model.head: multilabel` a row may name several, joined by `|`.
    Links are reported, never followed.

    Raises:
        InputError: no folder; a `labels.csv` that can't be used or names files that don't exist.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", fix="name a folder of labelled videos: <class>/<video>")
    listed = _read_labels(folder / LABELS) if (folder / LABELS).is_file() else None
    pattern = re.compile(settings.split.group_pattern) if settings.split.group_pattern else None
    task = settings.task
    files = []
    for path, problem, detail in _walk(folder, "", listed or {}):
        label, group = (path.split("/", 1)[0] if "/" in path else None), None
        parted = ""  # a folder's name that would be several labels
        if listed is not None:
            label, group = listed.get(_key(path), (None, None))
            if label is not None:
                label = task.join(task.names(label)) or None
        elif label is not None and not task.is_class(label):
            parted, label = label, None
        if group is None and pattern and (match := pattern.search(path)):
            group = next((part for part in match.groups() if part), None)
        if problem is None and label is None:
            problem = "unlabelled"
            detail = f"{LABELS} does not list it" if listed is not None else "lies in no class folder"
            if parted:
                detail = f"a folder gives one label, but is called {parted!r}: list the video in {LABELS}"
        elif problem is None and settings.classes and label is not None:
            unknown = [name for name in task.names(label) if name not in settings.classes]
            if unknown:
                problem, detail = "unknown_label", f"{unknown[0]!r} is none of {', '.join(settings.classes)}"
        files.append(Found(path, label, group, problem, detail))
    if listed:
        missing = sorted(set(listed) - {_key(one.path) for one in files})
        if missing:
            some = ", ".join(repr(path) for path in missing[:10]) + (", …" if len(missing) > 10 else "")
            raise InputError(
                f"{folder / LABELS} lists {len(missing)} files that don't exist: {some}",
                fix="paths are relative to the folder, with forward slashes; correct or remove the rows",
            )
    return sorted(files, key=lambda one: one.path)


def _walk(folder: Path, below: str, listed: Container[str]) -> Iterator[tuple[str, str | None, str]]:
    """(path, problem, detail) of files, and of folders that can't be listed."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        yield below.rstrip("/") or ".", "unreadable", f"the folder can't be listed: {error.strerror}"
        return
    for entry in entries:
        path = below + entry.name
        if not is_utf8(path):
            yield shown(path), "bad_name", BAD_NAME
            continue
        if ignored(entry.name, entry.is_dir(follow_symlinks=False)) and _key(path) not in listed:
            if entry.is_dir(follow_symlinks=False):  # DVC versions what is there anyway
                yield from ((name, "bad_name", BAD_NAME) for name in badly_named(Path(entry.path), path + "/"))
            continue
        if entry.is_symlink():
            yield (
                path,
                "symlink",
                f"links to {os.fsencode(os.readlink(entry.path)).decode('utf-8', 'backslashreplace')}",
            )
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), path + "/", listed)
        elif not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            yield path, "not_a_video", "no regular file"
        else:
            yield path, None, ""


def is_utf8(name: str) -> bool:
    """Whether a name from the file system is UTF-8; Python represents other bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def shown(name: str) -> str:
    """A name with bytes that are not UTF-8 shown as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def badly_named(folder: Path, below: str = "") -> Iterator[str]:
    """Paths below `folder`, as `shown`, whose names are not UTF-8: DVC can't version them. Links are not followed."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        path = below + entry.name
        if not is_utf8(path):
            yield shown(path)
        elif entry.is_dir(follow_symlinks=False) and entry.name not in UNVERSIONED:
            yield from badly_named(Path(entry.path), path + "/")


def _key(path: str) -> str:
    """Names are compared in one Unicode form: a table may come from another system than the files."""
    return unicodedata.normalize("NFC", path)


def _read_labels(file: Path) -> dict[str, tuple[str | None, str | None]]:
    """path → (label, group)."""
    fix = "it needs the first line `path,label` or `path,label,group`, UTF-8, and one line per video"
    rows: dict[str, tuple[str | None, str | None]] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            table = csv.DictReader(text, skipinitialspace=True)
            columns = [(name or "").strip() for name in table.fieldnames or ()]
            if not {"path", "label"} <= set(columns):
                raise InputError(f"{file} has the columns {columns}", fix=fix)
            table.fieldnames = columns
            for row in table:
                cells = {name: (row.get(name) or "").strip() for name in ("path", "label", "group")}
                path = _key(cells["path"].replace("\\", "/").removeprefix("./"))
                value = (cells["label"] or None, cells["group"] or None)
                if rows.setdefault(path, value) != value:
                    raise InputError(f"{file}: line {table.line_num} lists {path!r} twice, differently", fix="keep one")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} can't be read: {error}", fix=fix) from error
    return rows
