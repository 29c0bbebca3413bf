"""The bytes of `data/` as a data version, which `data.dvc` names."""

from __future__ import annotations

import os
import stat
from importlib import resources
from pathlib import Path
from typing import Any

from sora.config import Project
from sora.core.errors import InputError, NotTrainable, ServiceError
from sora.core.files import write_if_different
from sora.core.records import RULES
from sora.dataset.scan import BAD_NAME, UNVERSIONED, badly_named
from sora.dataset.versioning.cache import pull
from sora.dataset.versioning.dvc import dvc
from sora.dataset.versioning.integrity import read_whole, require_whole


def init(root: Path) -> None:
    """Makes the git repository `root` a DVC repository with the embedded remote as default. Repeatable."""
    if not (root / ".dvc" / "config").exists():
        dvc(root, "init")
    for name, target in (("dvc_config", ".dvc/config"), ("dvcignore", ".dvcignore")):
        text = (resources.files("sora") / "templates" / name).read_text(encoding="utf-8")
        write_if_different(root / target, text)


def add(project: Project) -> str:
    """Records the bytes of `data/` in `data.dvc` and the cache; returns the data version.

    Raises:
        InputError: `data/` is no folder, is a link, or holds something that can't be versioned; data.dvc or dvc.lock is
            damaged.
        NotTrainable: a name in it is not UTF-8.
        ServiceError: DVC recorded a different number of files than there are.
    """
    require_whole(project)
    bad = sorted(badly_named(project.data))
    if bad:
        some = ", ".join(f"data/{name}" for name in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NotTrainable(f"not trainable: bad_name: {some}: {BAD_NAME}", fix=RULES["bad_name"])
    expected = _count_files(project.data)
    dvc(project.root, "add", "--no-relink", "data")  # relinking would replace links in data/ by copies
    recorded = _data_out(project)
    if recorded.get("nfiles") != expected:
        raise ServiceError(
            f"{project.data} holds {expected} files, but DVC recorded {recorded.get('nfiles')}",
            fix="run again if files were being copied; else look for patterns in .dvcignore that match videos",
        )
    version = data_version(project)
    assert version is not None
    return version


def data_version(project: Project) -> str | None:
    """The md5 of `data` in data.dvc, without `.dir`; None before the first `add`.

    Raises:
        InputError: data.dvc is damaged.
    """
    if not project.data_dvc.exists():
        return None
    return str(_data_out(project)["md5"]).removesuffix(".dir")


def ensure_data(project: Project) -> bool:
    """Gets `data/` from the cache or the remote if a clone has only data.dvc. True if it had to.

    Raises:
        InputError: there is neither `data/` nor data.dvc, or data.dvc is damaged.
        ServiceError: neither the cache nor the remote has the files.
    """
    if project.data.is_dir():
        return False
    if not project.data_dvc.exists():
        raise InputError(
            f"{project.root} has neither data/ nor data.dvc", fix="put the videos into data/<class>/ and run again"
        )
    require_whole(project)
    pull(project, ["data.dvc"])
    return True


def _data_out(project: Project) -> dict[str, Any]:
    out: dict[str, Any] = read_whole(project, "data.dvc")["outs"][0]
    return out


def _count_files(folder: Path) -> int:
    """Counts files below `folder` as DVC should: links to files count, links to folders are not followed."""
    if folder.is_symlink():
        raise InputError(f"{folder} is a link: DVC does not version what a link points to", fix="replace it by a copy")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="put the videos into data/<class>/")
    count = 0
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in UNVERSIONED:
                        folders.append(Path(entry.path))
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    raise InputError(
                        f"{entry.path} is a link that leads nowhere", fix="remove it or restore its target"
                    )
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    continue
                elif not stat.S_ISREG(entry.stat().st_mode):
                    raise InputError(
                        f"{entry.path} is not a regular file (a pipe, socket or device)", fix="move it out of data/"
                    )
                else:
                    count += 1
    return count
