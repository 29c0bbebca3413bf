"""Files that exist whole or not at all, and full disks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sora.core.errors import DiskFull, ReadOnly, ServiceError

log = logging.getLogger(__name__)
_ROOM = 32_000_000  # bytes; a new project's servers did not start on disks of 4, 9 and 13 MB
_MAKE_ROOM = (
    "make room and run again: `sora gc --dry-run` shows what can be removed, and `sora gc` first frees what "
    "needs no room (old logs, abandoned folders)"
)
_REMOUNT = "mount it for writing (mount -o remount,rw …), or move the project to a disk that can be written"
# What libraries and servers say, including SQLite.
_SAYS_FULL = ("No space left on device", "database or disk is full", "Disk quota exceeded")
_SAYS_READ_ONLY = ("Read-only file system", "attempt to write a readonly database")

TEMPORARY = "sora-tmp-"
_SWEPT = (f"{TEMPORARY}*", "sora-uploads-*")  # the second: an earlier Sora's servers kept uploads in these


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Translates the errors of writing to a disk.

    Raises:
        DiskFull: no space or quota is left.
        ReadOnly: the file system is mounted read-only.
        ServiceError: any other system error (not permitted, input/output error).
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
    """The disk error because of which a server, a child process or another library failed, or None.

    Args:
        place: where it wrote. A disk with less than `_ROOM` bytes free counts as full: whoever filled it has often
            freed some by the time that somebody looks.
        said: its own message; its last lines may be lost for want of space.
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
    """A short name for the code in the modules and folders `names` below `package`, from their paths and bytes."""
    digest = hashlib.sha256()
    for name in names:
        place = package / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"\0{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic(path: Path, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` once it is complete and on disk; nothing changes if that fails.

    Args:
        shared: processes without a common lock may write it at once; the last one counts.

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
    """A folder (mode 0700) in the system's temporary one, removed with the block. `what` is part of its name.

    A killed process leaves its folder behind: a server with its uploads, `sora reproduce` with a
    copy of all data. The next call removes it. A running process holds a lock on its folder, which the kernel frees
    however the process ends. Process numbers would mislead if containers share a temporary folder.

    Raises:
        DiskFull, ReadOnly, ServiceError: the folder can't be made.
    """
    place = _temporary_place()
    sweep(place)
    with writing(place):
        folder, lock = _claimed(place, what)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def abandoned_folders() -> list[Path]:
    """This user's temporary folders that no running process holds."""
    return _each_abandoned(_temporary_place(), lambda folder: None)


def sweep(place: Path) -> list[Path]:
    """Removes this user's temporary folders in `place` that no running process holds, and returns them. A folder
    in use, one of another user, a link and a file stay."""

    def remove(folder: Path) -> None:
        shutil.rmtree(folder)
        log.info("removed %s, which a killed process left", folder)

    return _each_abandoned(place, remove)


def remove_abandoned_folders() -> list[Path]:
    """`sweep` of the system's temporary folder."""
    return sweep(_temporary_place())


def _each_abandoned(place: Path, visit: Callable[[Path], None]) -> list[Path]:
    """Calls `visit` for each abandoned folder while its lock is held, and returns these folders."""
    visited = []
    for folder in sorted(folder for pattern in _SWEPT for folder in place.glob(pattern)):
        with suppress(OSError):  # another user's, not a folder, or gone meanwhile
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid != os.geteuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
                visit(folder)
                visited.append(folder)
            finally:
                os.close(lock)
    return visited


def _temporary_place() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise ServiceError(
            f"there is no writable temporary folder: {error.strerror}",
            fix="make room there, or set TMPDIR to a folder that can be written",
        ) from error


def _claimed(place: Path, what: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{what}-", dir=place))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process's sweep was quicker than this lock
            continue
        with suppress(OSError):  # this file system has no locks: then nobody sweeps it either
            fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweep may have seen the folder before it was locked, and taken it for a dead process's.
        with suppress(FileNotFoundError):
            if os.path.samestat(folder.stat(), os.fstat(lock)):
                return folder, lock
        os.close(lock)


def write_if_different(path: Path, text: str) -> None:
    """Writes a text file unless it already holds this text: so its modification time says when it changed."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic(path) as file:
            file.write(text.encode())
