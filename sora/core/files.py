"""Files that are there whole or not at all, and disks that are full."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sora.core.errors import DiskFull, ReadOnly, ServiceError

_ROOM = 32_000_000  # bytes; a new project's servers did not start on disks of 4, 9 and 13 MB
_MAKE_ROOM = (
    "make room and run again: `sora gc --dry-run` shows what of the project can go, and `sora gc` frees first what "
    "needs no room (old logs, abandoned folders)"
)
_REMOUNT = "mount it for writing (mount -o remount,rw …), or move the project to a disk that can be written"
# What libraries and servers say, SQLite among them.
_SAYS_FULL = ("No space left on device", "database or disk is full", "Disk quota exceeded")
_SAYS_READ_ONLY = ("Read-only file system", "attempt to write a readonly database")

_TEMPORARY = "sora-tmp-"


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Translates the errors of writing to a disk.

    Raises:
        DiskFull: no space or quota is left.
        ReadOnly: the file system is mounted read-only.
        ServiceError: anything else that the system says (not permitted, input/output error).
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left for {what}", fix=_MAKE_ROOM) from error
        if error.errno == errno.EROFS:
            raise ReadOnly(f"can't write {what}: its file system is read-only", fix=_REMOUNT) from error
        raise ServiceError(f"can't write {what}: {error.strerror}", fix="make the folder writable") from error


def disk_failure(place: Path, said: str = "") -> DiskFull | ReadOnly | None:
    """The disk as the reason why a server, a child process or another library failed, or None.

    Args:
        place: where that wrote. A disk with less than `_ROOM` bytes free counts as full: whoever filled it has often
            given some back by the time that somebody looks.
        said: what it said of itself; its last words may have been lost for want of room.
    """
    where = next((one for one in (place, *place.parents) if one.exists()), Path("/"))
    try:
        facts = os.statvfs(where)
    except OSError:
        return None
    free = facts.f_bavail * facts.f_frsize
    if facts.f_flag & os.ST_RDONLY or any(word in said for word in _SAYS_READ_ONLY):
        return ReadOnly(f"the file system of {where} is read-only", fix=_REMOUNT)
    if free < _ROOM or any(word in said for word in _SAYS_FULL):
        return DiskFull(f"the disk of {where} is full: {free:,} bytes are free", fix=_MAKE_ROOM)
    return None


def source_digest(package: Path, names: Iterable[str]) -> str:
    """A short name of the code in the modules and folders `names` below `package`: of their paths and bytes."""
    found = hashlib.sha256()
    for name in names:
        place = package / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(f"\0{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic(path: Path, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place once it is complete and on the disk; nothing changes when that fails.

    Args:
        shared: processes that hold no common lock may write it at once; the last one counts.

    Raises:
        DiskFull, ServiceError: see `writing`.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    with writing(path):
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A folder in the system's temporary one, removed with the block. `what` is part of its name.

    A process that is killed leaves its folder behind, with a copy of all data where it was `sora reproduce`. The next
    call removes it: whoever lives holds a lock on its folder, which the kernel frees.
    """
    remove_abandoned_folders()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{what}-"))
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process's sweep was quicker than our lock
            continue
        with suppress(OSError):  # no locks on this file system: then nobody sweeps either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def abandoned_folders() -> list[Path]:
    """This user's temporary folders that no living process holds."""
    folders: list[Path] = []
    _each_abandoned(folders.append)
    return folders


def remove_abandoned_folders() -> None:
    """Removes `abandoned_folders`; none of a process that takes one meanwhile."""
    _each_abandoned(lambda folder: shutil.rmtree(folder, ignore_errors=True))


def _each_abandoned(visit: Callable[[Path], None]) -> None:
    """Calls `visit` for each abandoned temporary folder, while its lock is held."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    visit(folder)
            finally:
                os.close(descriptor)


def write_if_different(path: Path, text: str) -> None:
    """Writes a text file unless it holds this text already: its time of change says when it changed."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic(path) as file:
            file.write(text.encode())
