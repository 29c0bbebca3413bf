"""The inbox of corrections: clips that got a wrong answer according to users, with the label that they say is right.

`.sora/inbox/<sha256><suffix>` and beside it `<sha256>.json`, written last: without it the clip does not count. Nothing
is learned from a clip before somebody accepts it into `data/`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sora.config import Project
from sora.core.errors import InputError, ServiceError
from sora.core.files import atomic, writing
from sora.dataset.scan import LABELS

log = logging.getLogger("sora.dataset")
FOLDER = "corrections"  # below a class's folder, or below data/ if labels.csv has the labels
SHORT = 12  # digits of the sha256 in an accepted file's name
NEXT = "the next `sora run` makes a new data version"  # printed after a clip was accepted
_LOCK = ".lock"
_LOCK_SECONDS = 30.0
_MOST_SAID = 20  # labels, and sources, kept per clip
_RECORDS = "sources.json"  # beside the clips: the results of the reviews of each source's corrections
_MOST_SOURCES = 200  # kept; the one with the oldest last review is dropped first
_OFTEN = 3  # with this many refused corrections, and more refused than accepted ones, a source is refused often
# First bytes → suffix. The suffix is never the client's, and never one that `scan.ignored` takes for a document.
_MAGIC = (
    (4, b"ftypqt", ".mov"), (4, b"ftyp3g", ".3gp"), (4, b"ftyp", ".mp4"), (4, b"moov", ".mov"), (4, b"mdat", ".mov"),
    (0, b"\x1a\x45\xdf\xa3", ".mkv"), (0, b"RIFF", ".avi"), (0, b"OggS", ".ogv"), (0, b"FLV", ".flv"),
    (0, b"\x30\x26\xb2\x75", ".wmv"), (0, b"GIF8", ".gif"), (0, b"\x89PNG", ".apng"), (0, b"\x00\x00\x01\xba", ".mpg"),
    (0, b"\x00\x00\x01\xb3", ".mpg"), (0, b"DKIF", ".ivf"), (0, b"YUV4MPEG2", ".y4m"), (0, b"\x47", ".ts"),
)  # fmt: skip
MEDIA_TYPES = {
    ".mov": "video/quicktime", ".3gp": "video/3gpp", ".mp4": "video/mp4", ".mkv": "video/x-matroska",
    ".webm": "video/webm", ".avi": "video/x-msvideo", ".ogv": "video/ogg", ".flv": "video/x-flv",
    ".wmv": "video/x-ms-wmv", ".gif": "image/gif", ".apng": "image/apng", ".mpg": "video/mpeg", ".ts": "video/mp2t",
}  # fmt: skip


class InboxFull(ServiceError):
    """The inbox holds as many clips or bytes as `serve.inbox_files` and `serve.inbox_bytes` allow."""


class NoEntry(InputError):
    """No clip with that id is waiting in the inbox."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who sent corrections, and how their reviews ended."""

    name: str  # a token's name, or `address …` if there are no tokens
    accepted: int = 0  # into data/, under the label that the source gave
    refused: int = 0  # rejected, or accepted under another label

    @property
    def often_refused(self) -> bool:
        return self.refused >= _OFTEN and self.refused > self.accepted

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "often_refused": self.often_refused}

    def __str__(self) -> str:
        if not self.accepted + self.refused:
            return f"{self.name}, none of whose corrections was reviewed yet"
        return f"{self.name}, of whose corrections {self.refused} of {self.accepted + self.refused} were refused"


@dataclass(frozen=True, slots=True)
class Entry:
    """One clip that is waiting for review."""

    id: str  # sha256 of its bytes
    suffix: str  # of its container
    bytes: int
    filename: str  # the client's name for it: only shown, never opened
    label: str  # what it is, according to the last sender
    said: dict[str, int]  # label → how often it was sent: a clip may be sent again
    predicted: str  # the model's answer
    version: int  # of the model
    received: str  # ISO 8601, UTC: the first time
    sources: dict[str, str] = field(default_factory=dict)  # sender → the label; empty in old entries

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Inbox:
    """The corrections of one project.

    Arguments:
        project: the owner of `.sora/inbox/`, and of the `data/` that receives accepted clips.
        max_files, max_bytes: of all clips together.
    """

    def __init__(self, project: Project, max_files: int, max_bytes: int) -> None:
        self._project = project
        self.max_files = max_files
        self.max_bytes = max_bytes

    @property
    def folder(self) -> Path:
        return self._project.inbox

    def entries(self) -> list[Entry]:
        """All waiting clips, the newest last."""
        waiting = []
        for file in self.folder.glob("*.json"):
            with suppress(OSError, ValueError, TypeError):  # accepted meanwhile, or not ours
                entry = Entry(**json.loads(file.read_text(encoding="utf-8")))
                if entry.id == file.stem and _is_digest(entry.id):
                    waiting.append(entry)
        return sorted(waiting, key=lambda entry: (entry.received, entry.id))

    def find(self, ident: str) -> Entry:
        """The entry with this id, or whose id starts with these 8 digits or more.

        Raises:
            NoEntry: no entry or several match, or it is not an id.
        """
        if re.fullmatch(r"[0-9a-f]{8,64}", ident):
            matches = [entry for entry in self.entries() if entry.id.startswith(ident)]
            if len(matches) == 1:
                return matches[0]
        raise NoEntry(f"no correction {ident[:80]!r} is waiting", fix="`sora data review` lists those that are")

    def sources(self) -> dict[str, Source]:
        """The records of every source, by name. A source without reviewed corrections is not in it."""
        try:
            kept = json.loads((self.folder / _RECORDS).read_text(encoding="utf-8"))
            sources = [Source(str(one["name"]), int(one["accepted"]), int(one["refused"])) for one in kept]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            # These counts only help a reviewer: without them clips can still be reviewed.
            log.warning("%s can't be read, counting starts again: %s", self.folder / _RECORDS, error)
            return {}
        return {one.name: one for one in sources}

    def sent_by(self, entry: Entry, known: dict[str, Source] | None = None) -> list[Source]:
        """The sources of a clip, the latest sender last. `known`: what `sources` returned."""
        known = self.sources() if known is None else known
        return [known.get(name, Source(name)) for name in entry.sources]

    def _count(self, entry: Entry, label: str | None) -> None:
        """Records a review: `label` is what the clip was accepted under, None if it was rejected."""
        known = self.sources()
        for name, said in entry.sources.items():
            before = known.pop(name, Source(name))
            right = said == label
            known[name] = replace(before, accepted=before.accepted + right, refused=before.refused + (not right))
        kept = [asdict(one) for one in known.values()][-_MOST_SOURCES:]
        with atomic(self.folder / _RECORDS) as sink:
            sink.write(json.dumps(kept, ensure_ascii=False, indent=1).encode())

    def file(self, entry: Entry) -> Path:
        return self.folder / (entry.id + entry.suffix)

    def add(self, video: Path, *, filename: str, label: str, predicted: str, version: int, source: str = "") -> Entry:
        """Stores a clip or, if its bytes are already waiting, only the new label.

        Arguments:
            video: a file that is known to be a usable video; it stays where it is.
            label, predicted: classes, checked by the caller.
            source: who sent it; the reviewer sees how often they were refused.

        Raises:
            InboxFull: the quota does not allow it.
            DiskFull, ServiceError: it can't be written.
        """
        with video.open("rb") as stream:
            ident = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            suffix = suffix_of(stream.read(4096))
        size = video.stat().st_size
        by = {source: label} if source else {}
        with self._locked():
            self._sweep()
            entries = self.entries()
            known = next((entry for entry in entries if entry.id == ident), None)
            if known is not None:
                said = dict(list({**known.said, label: known.said.get(label, 0) + 1}.items())[-_MOST_SAID:])
                sources = {name: one for name, one in known.sources.items() if name != source}
                sources = dict(list({**sources, **by}.items())[-_MOST_SAID:])
                entry = replace(known, label=label, said=said, sources=sources)
            else:
                self._check_room(entries, size)
                now = datetime.now(UTC).isoformat(timespec="seconds")
                entry = Entry(ident, suffix, size, filename, label, {label: 1}, predicted, version, now, by)
                with atomic(self.file(entry)) as sink, video.open("rb") as clip:
                    shutil.copyfileobj(clip, sink)
            with atomic(self.folder / f"{ident}.json") as sink:
                sink.write(json.dumps(entry.to_dict(), ensure_ascii=False, indent=1).encode())
        return entry

    def _sweep(self) -> None:
        """Removes what a crash left: drafts, and clips whose entry was not written or is already gone."""
        ids = {file.stem for file in self.folder.glob("*.json")}
        with writing(self.folder):
            for file in self.folder.iterdir():
                if file.name not in (_LOCK, _RECORDS) and file.stem not in ids and file.is_file():
                    file.unlink(missing_ok=True)

    def _check_room(self, entries: list[Entry], size: int) -> None:
        used = sum(entry.bytes for entry in entries)
        if len(entries) >= self.max_files or used + size > self.max_bytes:
            raise InboxFull(
                f"the inbox holds {len(entries)} of {self.max_files} clips and {used:,} of {self.max_bytes:,} bytes",
                fix="review the waiting clips (`sora data review`), or raise serve.inbox_files and serve.inbox_bytes",
            )

    def accept(self, ident: str, label: str | None = None) -> Path:
        """Copies a clip into `data/` under its label, or another, and removes it from the inbox.

        To `data/<label>/corrections/` or, if `data/labels.csv` has the labels, to `data/corrections/` and a row there.
        After a crash in between, the same call completes it.

        Returns:
            The file's path below `data/`.

        Raises:
            NoEntry: no such clip waits.
            InputError: the label is not a class of the project, or `data/` already holds these bytes.
            DiskFull, ServiceError: it can't be written.
        """
        with self._locked():
            entry = self.find(ident)
            label = label if label is not None else entry.label
            self._check_label(label)
            data = self._project.data
            listed = data / LABELS
            name = f"{entry.id[:SHORT]}{entry.suffix}"
            path = Path(FOLDER, name) if listed.is_file() else Path(label, FOLDER, name)
            target = data / path
            same = [there for there in _same_bytes(data, entry) if there != target]
            if same:
                raise InputError(
                    f"data/ already holds these bytes: {same[0].relative_to(data).as_posix()}",
                    fix="correct the label there, and reject the correction",
                )
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            with atomic(target) as sink, self.file(entry).open("rb") as source:
                shutil.copyfileobj(source, sink)
            if listed.is_file():
                _append_row(listed, path.as_posix(), label)
            self._remove(entry)
            self._count(entry, label)
        return path

    def _check_label(self, label: str) -> None:
        settings = self._project.settings()
        names = settings.task.names(label)
        unknown = [one for one in names if one not in settings.classes]
        if settings.classes and (unknown or not names):
            wrong = unknown[0] if unknown else label
            raise InputError(
                f"{wrong!r} is not one of the classes {', '.join(settings.classes)}", fix="choose one of them"
            )
        in_table = (self._project.data / LABELS).is_file()
        if not in_table and len(names) > 1:
            raise InputError(
                f"a folder gives one label, but {label!r} is {len(names)} labels",
                fix=f"list the videos in {LABELS}, or accept it with --label CLASS",
            )
        if not in_table and (not label.strip(".") or re.search(r"[/\\\x00]", label)):
            raise InputError(f"{label!r} can't be the name of a folder in data/", fix=f"list the videos in {LABELS}")

    def reject(self, ident: str) -> Entry:
        """Removes a clip for good.

        Raises:
            NoEntry: no such clip waits.
        """
        with self._locked():
            entry = self.find(ident)
            self._remove(entry)
            self._count(entry, None)
        return entry

    def _remove(self, entry: Entry) -> None:
        with writing(self.folder):
            (self.folder / f"{entry.id}.json").unlink(missing_ok=True)  # first: from here on the clip does not count
            self.file(entry).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time: several servers and a terminal may work on one inbox."""
        from filelock import FileLock, Timeout

        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                with FileLock(self.folder / _LOCK, timeout=_LOCK_SECONDS):
                    yield
            except Timeout as error:
                raise ServiceError("the inbox has been in use for half a minute", fix="try again") from error


def suffix_of(head: bytes) -> str:
    """The suffix for a video with these first bytes; `.video` if its container is not one of the usual ones."""
    suffix = next((suffix for at, magic, suffix in _MAGIC if head[at : at + len(magic)] == magic), ".video")
    return ".webm" if suffix == ".mkv" and b"webm" in head[:64] else suffix


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _same_bytes(data: Path, entry: Entry) -> Iterator[Path]:
    """Files below `data` with the entry's bytes. Only files of its size are read."""
    for folder, _, names in os.walk(data):
        for name in names:
            file = Path(folder, name)
            with suppress(OSError):
                if file.stat().st_size == entry.bytes:
                    with file.open("rb") as stream:
                        if hashlib.file_digest(stream, "sha256").hexdigest() == entry.id:
                            yield file


def _append_row(table: Path, path: str, label: str) -> None:
    """Adds a video to labels.csv, in the order of its columns. An identical row is left alone."""
    with writing(table):
        text = table.read_bytes().decode("utf-8-sig")
    rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True))
    columns = [name.strip() for name in rows[0]] if rows else []
    if not {"path", "label"} <= set(columns):
        raise InputError(f"{table} has the columns {columns}", fix="it needs the first line `path,label[,group]`")
    known = [dict(zip(columns, row, strict=False)) for row in rows[1:]]
    listed = next((row.get("label") for row in known if row.get("path") == path), None)
    if listed not in (None, label):
        raise InputError(f"{table} already lists {path} as {listed!r}", fix="correct the label there")
    if listed is not None:
        return
    end = "\r\n" if "\r\n" in text else "\n"
    line = io.StringIO()
    csv.writer(line, lineterminator=end).writerow([{"path": path, "label": label}.get(name, "") for name in columns])
    with atomic(table) as sink:
        sink.write((text if text.endswith("\n") else text + end).encode() + line.getvalue().encode())
