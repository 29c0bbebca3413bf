"""The quarantine: `prepared/quarantine.json`, the list of the videos that rules left out. No file is ever moved."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from sora.config import Project
from sora.core.errors import InputError
from sora.core.files import atomic, writing
from sora.core.records import Rejection


def write(project: Project, rejections: Iterable[Rejection]) -> None:
    """Makes the quarantine hold these videos and no others.

    Raises:
        DiskFull, ServiceError: it can't be written; the old list remains.
    """
    place = project.quarantine
    value = [asdict(rejection) for rejection in rejections]
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with atomic(place) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read(project: Project) -> tuple[Rejection, ...]:
    """The videos that the last validation left out, by path.

    Raises:
        OSError: nothing has been validated yet (FileNotFoundError), or the list can't be read.
        InputError: the file is damaged.
    """
    text = project.quarantine.read_text(encoding="utf-8")
    try:
        return tuple(Rejection(**entry) for entry in json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{project.quarantine} is not a quarantine list: {error}", fix="`sora run` writes it again"
        ) from error


def rejected_paths(project: Project) -> set[str]:
    """The paths of those videos, relative to the data folder; raises what `read` does."""
    return {rejection.path for rejection in read(project)}
