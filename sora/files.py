"""Files that are there whole or not at all, and disks that are full."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sora.errors import DiskFull, ServiceError

_TEMPORARY = "sora-tmp-"


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Translates the errors of writing to a disk.

    Raises:
        DiskFull: no space or quota is left.
        ServiceError: anything else that the system says (read-only, not permitted, input/output error).
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left for {what}", mend="make room (`sora gc --dry-run` shows what can go) and run again"
            ) from error
        raise ServiceError(f"can't write {what}: {error.strerror}", mend="make the folder writable") from error


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
    _sweep(Path(tempfile.gettempdir()))
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


def _sweep(place: Path) -> None:
    """Removes this user's temporary folders that no living process holds."""
    for folder in place.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
