"""Data versions and the preprocessing pipeline. By DVC, as `sora.data.dvc` calls it.

`data.dvc` names the bytes of `data/`; `dvc.lock` says from which bytes, parameters and code `prepared/` was made.
A stage that fails hands its error over whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sora.data.dvc import dvc, git
from sora.errors import InputError, ServiceError, SettingsError, SoraError
from sora.files import atomic, temporary_folder
from sora.processes import rebuild_error
from sora.settings import Project, parse
from sora.video import tag

STAGES = ("manifest", "validate", "shards")
CODE_LOCK = "preprocessing.lock"
# What names a state of a project; a run stores these texts, and `restore` writes them.
STATE_FILES = ("data.dvc", "dvc.yaml", "dvc.lock", CODE_LOCK, "params.yaml", "splits.csv")
# Folders that DVC never versions, wherever they stand.
_UNVERSIONED = frozenset({".git", ".hg", ".dvc"})
# Stage → modules whose bytes decide what it makes, beside those that `video.tag` names.
_CODE = {
    "manifest": ("manifest.py", "scan.py", "labels.py"),
    "validate": ("expectations.py", "similar.py", "labels.py"),
    "shards": ("shards.py",),
}
# Stages that read several labels of a video with `model.head: multilabel`. The head is among their code: dvc.yaml of
# projects made before can't depend on it, nor on a setting that params.yaml may leave out.
_OF_LABELS = ("manifest", "validate")
_CODE_HEADER = "# Hashes of the code behind each stage of dvc.yaml. Sora writes this file; git keeps it.\n"


# --- the project's data ---------------------------------------------------------------------------------------------


def init(root: Path) -> None:
    """Makes `root`, a git repository already, a DVC repository with the embedded remote as default. Repeatable."""
    if not (root / ".dvc" / "config").exists():
        dvc(root, "init")
    for name, target in (("dvc_config", ".dvc/config"), ("dvcignore", ".dvcignore")):
        text = (resources.files("sora") / "templates" / name).read_text(encoding="utf-8")
        _write_if_different(root / target, text)


def add(project: Project) -> str:
    """Records the bytes of `data/` in `data.dvc` and the cache; returns the data version.

    Raises:
        InputError: `data/` is no folder, is a link, or holds something that can't be versioned.
        ServiceError: DVC recorded another number of files than there are.
    """
    expected = _count_files(project.data)
    dvc(project.root, "add", "--no-relink", "data")  # relinking would replace links in data/ by copies
    recorded = _data_out(project)
    if recorded.get("nfiles") != expected:
        raise ServiceError(
            f"{project.data} holds {expected} files, but DVC recorded {recorded.get('nfiles')}",
            mend="run again if files were being copied; else look for patterns in .dvcignore that match videos",
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
    """Gets `data/` from the cache or the remote where a clone has only data.dvc. True when it had to.

    Raises:
        InputError: there is neither `data/` nor data.dvc.
        ServiceError: neither the cache nor the remote has the files.
    """
    if project.data.is_dir():
        return False
    if not project.data_dvc.exists():
        raise InputError(
            f"{project.root} has neither data/ nor data.dvc", mend="put the videos into data/<class>/ and run again"
        )
    pull(project, ["data.dvc"])
    return True


def _data_out(project: Project) -> dict[str, Any]:
    try:
        out = yaml.safe_load(project.data_dvc.read_text(encoding="utf-8"))["outs"][0]
        out["md5"]
        return out
    except (OSError, yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{project.data_dvc} is not what DVC writes: {error!r}",
            mend="restore it from git, or remove it and run again",
        ) from error


def _count_files(folder: Path) -> int:
    """Files below `folder` as DVC should count them: links to files count, links to folders are not followed."""
    if folder.is_symlink():
        raise InputError(f"{folder} is a link: DVC does not version what a link points to", mend="replace it by a copy")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", mend="put the videos into data/<class>/")
    count = 0
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _UNVERSIONED:
                        folders.append(Path(entry.path))
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    raise InputError(
                        f"{entry.path} is a link that leads nowhere", mend="remove it or restore its target"
                    )
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    continue
                elif not stat.S_ISREG(entry.stat().st_mode):
                    raise InputError(
                        f"{entry.path} is no regular file (a pipe, socket or device)", mend="move it out of data/"
                    )
                else:
                    count += 1
    return count


# --- the stages -----------------------------------------------------------------------------------------------------


def reproduce(project: Project, *, force: bool = False) -> list[str]:
    """Brings `prepared/` up to date; returns the names of the stages that ran. `force`: all of them, from scratch.

    Raises:
        NotTrainable: a rule about the whole set does not hold.
        SettingsError: params.yaml lacks a section that dvc.yaml names.
        SoraError: what a stage raised.
        RunActive: another DVC command works in this project.
    """
    _check_parameters(project)
    write_code_lock(project)
    with temporary_folder("stage") as folder:
        error_file = folder / "error.json"
        more = {"SORA_STAGE_ERROR": str(error_file), "SORA_STAGE_OWNER": str(os.getpid())}
        if force:
            more["SORA_STAGE_FRESH"] = "1"
        if sys.stderr.isatty():
            more["SORA_STAGE_TTY"] = os.ttyname(sys.stderr.fileno())
        try:
            # DVC's run cache would bring verdicts back without the Data Docs that belong to them.
            options = ["--no-run-cache", *(["--force"] if force else [])]
            output = dvc(project.root, "repro", *options, relay=True, env=more)
        except SoraError as error:
            if error_file.exists():
                raise rebuild_error(json.loads(error_file.read_text(encoding="utf-8"))) from error
            raise
    return re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE)


def status(project: Project) -> dict[str, Any]:
    """What `dvc status` says: {} when data and stages are up to date, else {stage: [what changed]}."""
    return json.loads(dvc(project.root, "status", "--json"))


def code_hashes(multilabel: bool = False) -> dict[str, str]:
    """Stage → hash over the source of what it runs, the versions of the decoders, and the parameters' defaults."""
    video = {"manifest": tag.facts(), "validate": "", "shards": tag.clips()}
    defaults = json.dumps({name: parse("").to_dict()[name] for name in ("validate", "split", "clip", "shards")})
    hashes = {}
    for stage, modules in _CODE.items():
        digest = hashlib.sha256((video[stage] + defaults).encode())
        for module in modules:
            digest.update((Path(__file__).parent / module).read_bytes())
        if multilabel and stage in _OF_LABELS:
            digest.update(b"multilabel")
        hashes[stage] = digest.hexdigest()[:16]
    return hashes


def code_hash() -> str:
    """One name for the preprocessing code as a whole."""
    return hashlib.sha256(_code_lock_text().encode()).hexdigest()[:16]


def write_code_lock(project: Project) -> None:
    """Writes preprocessing.lock where it differs: DVC depends on it, since it can't depend on installed packages."""
    _write_if_different(project.root / CODE_LOCK, _code_lock_text(project.settings().multilabel))


def _code_lock_text(multilabel: bool = False) -> str:
    return _CODE_HEADER + "".join(f"{stage}: {value}\n" for stage, value in code_hashes(multilabel).items())


def _check_parameters(project: Project) -> None:
    """dvc.yaml names keys of params.yaml; DVC needs each to be there, although Sora has defaults for all."""
    given = yaml.safe_load(project.params_file.read_text(encoding="utf-8")) or {}
    try:
        stages = yaml.safe_load((project.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{project.root / 'dvc.yaml'} is not a pipeline: {error!r}",
            mend="restore it from git, or from a new `sora init`",
        ) from error
    defaults = project.settings().to_dict()
    for stage in stages.values():
        for key in stage.get("params", []):
            if not isinstance(key, str):
                continue
            value: Any = given
            default: Any = defaults
            for part in key.split("."):
                default = default.get(part) if isinstance(default, dict) else None
                if not isinstance(value, dict) or part not in value:
                    line = yaml.safe_dump({key: default}, default_flow_style=True, width=1000).strip()
                    raise SettingsError(
                        f"{project.params_file} lacks {key}, which dvc.yaml depends on",
                        mend=f"add it (default: {line})",
                    )
                value = value[part]


# --- remotes --------------------------------------------------------------------------------------------------------


def push(project: Project, targets: list[str] | None = None) -> None:
    """Uploads what the cache holds of `targets` (stage names, data.dvc; all without) to their remote."""
    dvc(project.root, "push", *(targets or []))


def pull(project: Project, targets: list[str] | None = None) -> None:
    """Downloads `targets` (stage names, data.dvc; all without) from their remote and puts them in place."""
    dvc(project.root, "pull", *(targets or []))


def checkout(project: Project, targets: list[str] | None = None) -> None:
    """Puts `targets` in place as data.dvc and dvc.lock name them, from the cache alone."""
    dvc(project.root, "checkout", "--force", *(targets or []))


# --- states ---------------------------------------------------------------------------------------------------------


def state(project: Project) -> dict[str, Any]:
    """All that is needed to come back to what this project is now.

    The texts of `STATE_FILES` (those that exist) by name, and `git_commit` (None without one), `git_dirty`,
    `data_version`, `code_hash`.
    """
    texts = {
        name: (project.root / name).read_text(encoding="utf-8")
        for name in STATE_FILES
        if (project.root / name).is_file()
    }
    commit = git(project.root, "rev-parse", "HEAD")
    changed = git(project.root, "status", "--porcelain") if commit else None
    return {
        **texts,
        "git_commit": commit,
        "git_dirty": bool(changed),
        "data_version": data_version(project),
        "code_hash": code_hash(),
    }


def restore(project: Project, saved: dict[str, Any], target: Path, *, data: bool = True) -> Project:
    """Lays out a saved `state` in the new folder `target`, with the cache and remotes of `project`.

    The project's own files stay as they are. `data=False` leaves `data/` out: manifest, verdicts and shards suffice to
    evaluate a model.

    Raises:
        InputError: the state names no data, or `target` is not empty.
        ServiceError: neither cache nor remote has what the state names.
    """
    if "data.dvc" not in saved or "dvc.lock" not in saved:
        raise InputError("this version has no stored data.dvc and dvc.lock: it can't be restored")
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty", mend="name a new folder")
    (target / ".dvc").mkdir(parents=True, exist_ok=True)
    for name in STATE_FILES:
        if name in saved:
            (target / name).write_text(saved[name], encoding="utf-8")
    for name in ("config", "config.local"):
        if (project.root / ".dvc" / name).is_file():
            _copy_config(project.root / ".dvc" / name, target / ".dvc" / name)
    settings = [("core.no_scm", "true"), ("cache.dir", str(cache_folder(project)))]
    for key, value in settings:
        dvc(target, "config", "--local", key, value)
    restored = Project(target)
    targets = [*(["data.dvc"] if data else []), *STAGES]
    try:
        checkout(restored, targets)
    except ServiceError:
        pull(restored, targets)
    return restored


def code_notes(project: Project, saved: dict[str, Any]) -> list[str]:
    """In words, what of the code differs from when `saved` was stored."""
    now, notes = state(project), []
    if saved.get("code_hash") not in (None, now["code_hash"]):
        notes.append("the preprocessing code has changed since: the stored clips were used, today's would differ")
    if saved.get("git_commit") != now["git_commit"]:
        notes.append(f"git stood at {saved.get('git_commit')} then and stands at {now['git_commit']} now")
    if saved.get("git_dirty"):
        notes.append("files were changed and not committed then")
    return notes


def cache_folder(project: Project) -> Path:
    """Where DVC keeps the bytes of this project's data versions."""
    return Path(dvc(project.root, "cache", "dir").strip())


def _copy_config(source: Path, target: Path) -> None:
    """The same remotes for a repository elsewhere: paths relative to the configuration become absolute."""

    def absolute(match: re.Match[str]) -> str:
        place = match[2].strip()
        return match[0] if "://" in place else match[1] + str((source.parent / place).resolve())

    text = re.sub(r"^(\s*url\s*=\s*)(.+)$", absolute, source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    target.write_text(text, encoding="utf-8")


def _write_if_different(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic(path) as file:
            file.write(text.encode())
