"""The quarantine: which videos are left out, and why. A list beside the manifest; the videos are never touched."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from sora.core.errors import InputError
from sora.core.files import atomic
from sora.core.records import Rejection


def write(rejections: Iterable[Rejection], path: Path) -> None:
    """Writes the list as JSON, whole or not at all; equal lists give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(entry) for entry in rejections], indent=1, sort_keys=True, ensure_ascii=False)
    with atomic(path) as file:
        file.write(f"{text}\n".encode())


def read(path: Path) -> list[Rejection]:
    """The list that `write` wrote.

    Raises:
        FileNotFoundError: the videos were not validated yet.
        InputError: the file is damaged.
    """
    try:
        return [Rejection(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a quarantine list: {error}", fix="`sora run` makes it again") from error


def paths(path: Path) -> set[str]:
    """Paths in `data/` of the quarantined videos; raises what `read` raises."""
    return {entry.path for entry in read(path)}
