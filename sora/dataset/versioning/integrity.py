"""Whether data.dvc and dvc.lock are what DVC wrote, and how to restore a damaged one."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sora.config import Project
from sora.core import provenance
from sora.core.errors import InputError
from sora.dataset.versioning.dvc import git

_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


def require_whole(project: Project) -> None:
    """Checks that data.dvc and dvc.lock, if they exist, are what DVC wrote.

    Raises:
        InputError: one is torn or has merge conflict marks. It says how to get it back; nothing is restored unasked,
            since git's last commit may name other data than the damaged file did.
    """
    for name in ("data.dvc", "dvc.lock"):
        if (project.root / name).exists():
            read_whole(project, name)


def read_whole(project: Project, name: str) -> dict[str, Any]:
    """The content of data.dvc or dvc.lock; raises what `require_whole` does."""
    path = project.root / name
    try:
        text = path.read_text(encoding="utf-8")
        fault = _fault(name, text)
    except (OSError, UnicodeDecodeError) as error:
        text, fault = "", f"can't be read: {error}"
    if fault:
        raise InputError(f"{path} {fault}", fix=_how_to_restore(project, name))
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _fault(name: str, text: str) -> str:
    """What is wrong with the text of a data.dvc or dvc.lock; "" if nothing is."""
    if not text.strip():
        return "is empty"
    if re.search(r"^(<{7}|={7}|>{7})( |$)", text, re.MULTILINE):
        return "holds the conflict marks of an unfinished git merge"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"is torn: it is not YAML ({' '.join(str(error).split())})"
    try:
        if name == "data.dvc":
            entries = [value["outs"][0]]
        else:
            own = [stage for name, stage in value["stages"].items() if name in provenance.STAGES]
            entries = [entry for stage in own for entry in (*stage["deps"], *stage["outs"])]
        wrong = [
            entry for entry in entries if not (entry["path"] and _MD5.fullmatch(str(entry["md5"])) and "size" in entry)
        ]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        return f"is torn: it is not what DVC writes ({error!r})"
    return f"is torn: {wrong[0]} is not what DVC writes of a file" if wrong else ""


def _how_to_restore(project: Project, name: str) -> str:
    last = git(project.root, "show", f"HEAD:./{name}")
    from_git = f"`git checkout HEAD -- {name}` in {project.root} brings back what git's last commit holds"
    if name == "dvc.lock":
        otherwise = f"remove {name}: the next `sora run` writes it again, and keeps what is prepared and intact"
    elif project.data.is_dir():
        otherwise = f"remove {name}: the next `sora run` writes it again from data/"
    else:
        otherwise = f"get {name} from another clone: without data/, nothing else says which data it named"
    if last is None or _fault(name, last):
        return f"{otherwise} (git has no whole copy of it)"
    return f"{from_git}; or {otherwise}"
