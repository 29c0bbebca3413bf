"""The folder that one server keeps uploads in, and what servers that were killed left of theirs.

A server removes its folder when it ends. One that is killed can't, so the next to start does. Whether the owner lives
is told by a lock on the folder itself, which the kernel frees however the owner ends: process numbers would mislead
where containers share a temporary folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sora.core.files import writing

log = logging.getLogger("sora.serving")
PREFIX = "sora-uploads-"


@contextmanager
def workplace() -> Iterator[Path]:
    """A new folder (mode 0700) below the temporary folder, while it is open; removed with all in it at the end.

    Raises:
        DiskFull, ServiceError: it can't be made.
    """
    place = Path(tempfile.gettempdir())
    sweep(place)
    with writing(place):
        folder, lock = _claimed(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(place: Path) -> list[Path]:
    """Removes the folders of this user's dead servers in `place`; returns which. One that is in use, another user's or
    no folder is left."""
    gone = []
    for folder in sorted(place.glob(f"{PREFIX}*")):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid != os.geteuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its server lives
                shutil.rmtree(folder)
                gone.append(folder)
                log.info("removed %s, which a killed server left", folder)
            finally:
                os.close(lock)
    return gone


def _claimed(place: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweep may have met it before it was locked, and have taken it for a dead server's.
        with suppress(FileNotFoundError):
            if os.path.samestat(folder.stat(), os.fstat(lock)):
                return folder, lock
        os.close(lock)
