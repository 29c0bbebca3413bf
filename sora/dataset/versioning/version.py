"""Data versions and the preprocessing pipeline. By DVC, as `sora.dataset.versioning.dvc` calls it.

`data.dvc` names the bytes of `data/`; `dvc.lock` says from which bytes, parameters and code `prepared/` was made.
A stage that fails hands its error over whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sora.config import Project, Settings, parse
from sora.core import provenance, redaction
from sora.core.errors import InputError, NotTrainable, ServiceError, SettingsError, SoraError
from sora.core.files import atomic, temporary_folder, writing
from sora.core.processes import rebuild_error
from sora.core.progress import say
from sora.core.records import RULES
from sora.dataset.scan import BAD_NAME, UNVERSIONED, badly_named
from sora.dataset.versioning.dvc import dvc, git
from sora.media import pool

STAGES = ("manifest", "validate", "shards")
CODE_LOCK = "preprocessing.lock"
# What names a state of a project; a run stores these texts, and `restore` writes them.
STATE_FILES = ("data.dvc", "dvc.yaml", "dvc.lock", CODE_LOCK, "params.yaml", "splits.csv")
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
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
        InputError: `data/` is no folder, is a link, or holds something that can't be versioned; data.dvc or dvc.lock is
            damaged.
        NotTrainable: a name in it is not UTF-8.
        ServiceError: DVC recorded another number of files than there are.
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
    """Gets `data/` from the cache or the remote where a clone has only data.dvc. True when it had to.

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
    return _read_whole(project, "data.dvc")["outs"][0]


def require_whole(project: Project) -> None:
    """Checks that data.dvc and dvc.lock, where they are there, are what DVC wrote.

    Raises:
        InputError: one is torn or holds the marks of a merge. It says how to get it back; nothing is restored unasked,
            since git's last commit may name other data than the damaged file did.
    """
    for name in ("data.dvc", "dvc.lock"):
        if (project.root / name).exists():
            _read_whole(project, name)


def _read_whole(project: Project, name: str) -> dict[str, Any]:
    path = project.root / name
    try:
        text = path.read_text(encoding="utf-8")
        fault = _fault(name, text)
    except (OSError, UnicodeDecodeError) as error:
        text, fault = "", f"can't be read: {error}"
    if fault:
        raise InputError(f"{path} {fault}", fix=_how_to_restore(project, name))
    return yaml.safe_load(text)


def _fault(name: str, text: str) -> str:
    """What is wrong with the text of a data.dvc or dvc.lock; "" when nothing is."""
    if not text.strip():
        return "is empty"
    if re.search(r"^(<{7}|={7}|>{7})( |$)", text, re.MULTILINE):
        return "holds the conflict marks of an unfinished git merge"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"is torn: it is no YAML ({' '.join(str(error).split())})"
    try:
        if name == "data.dvc":
            entries = [value["outs"][0]]
        else:
            own = [stage for name, stage in value["stages"].items() if name in STAGES]
            entries = [entry for stage in own for entry in (*stage["deps"], *stage["outs"])]
        wrong = [entry for entry in entries if not (entry["path"] and _MD5.fullmatch(str(entry["md5"])))]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        return f"is torn: it is not what DVC writes ({error!r})"
    return f"is torn: {wrong[0]['md5']!r} is no MD5" if wrong else ""


def _how_to_restore(project: Project, name: str) -> str:
    last = git(project.root, "show", f"HEAD:./{name}")
    from_git = f"`git checkout HEAD -- {name}` in {project.root} brings back what git's last commit holds"
    if name == "dvc.lock":
        anew = f"remove {name}: the next `sora run` writes it anew, and keeps what is prepared and intact"
    elif project.data.is_dir():
        anew = f"remove {name}: the next `sora run` writes it anew from data/"
    else:
        anew = f"get {name} from another clone: without data/ nothing else says which data it named"
    if last is None or _fault(name, last):
        return f"{anew} (git has no whole copy of it)"
    return f"{from_git}; or {anew}"


def _count_files(folder: Path) -> int:
    """Files below `folder` as DVC should count them: links to files count, links to folders are not followed."""
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
                        f"{entry.path} is no regular file (a pipe, socket or device)", fix="move it out of data/"
                    )
                else:
                    count += 1
    return count


# --- the stages -----------------------------------------------------------------------------------------------------


def reproduce(project: Project, *, force: bool = False) -> list[str]:
    """Brings `prepared/` up to date; returns the names of the stages that ran. `force`: all of them, from scratch.

    The clips that training reads next are those that were written: damaged ones are made anew, here or in the stage.

    Raises:
        NotTrainable: a rule about the whole set does not hold.
        SettingsError: params.yaml lacks a section that dvc.yaml names.
        SoraError: what a stage raised.
        RunActive: another DVC command works in this project.
        InputError: data.dvc or dvc.lock is damaged.
    """
    require_whole(project)
    _check_parameters(project)
    write_code_lock(project)
    ran = _repro(project, *(["--force"] if force else []), fresh=force)
    # The stage compares what it finds with the digests. But DVC knows files by size and time: where a disk forgot bits,
    # it sees nothing to do.
    if "shards" not in ran and _shards_are_damaged(project):
        ran += _repro(project, "--force", "--single-item", "shards")
    return ran


def _shards_are_damaged(project: Project) -> bool:
    from sora.store.shards import ShardSet

    try:
        return bool(ShardSet.open(project.shards).damage())
    except InputError:
        return True


def _repro(project: Project, *options: str, fresh: bool = False) -> list[str]:
    with temporary_folder("stage") as folder:
        error_file = folder / "error.json"
        more = {"SORA_STAGE_ERROR": str(error_file), "SORA_STAGE_OWNER": str(os.getpid())}
        if fresh:
            more["SORA_STAGE_FRESH"] = "1"
        if sys.stderr.isatty():
            more["SORA_STAGE_TTY"] = os.ttyname(sys.stderr.fileno())
        try:
            # DVC's run cache would bring verdicts back without the Data Docs that belong to them.
            output = dvc(project.root, "repro", "--no-run-cache", *options, relay=True, env=more)
        except SoraError as error:
            if error_file.exists():
                raise rebuild_error(json.loads(error_file.read_text(encoding="utf-8"))) from error
            raise
    return re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE)


def recorded_files(project: Project, folder: Path) -> dict[str, str]:
    """Names of the files of an output's folder → MD5, as dvc.lock and DVC's cache have them; {} where they don't."""
    try:
        lock = yaml.safe_load(project.dvc_lock.read_text(encoding="utf-8"))
        path = folder.relative_to(project.root).as_posix()
        outs = (out for stage in lock["stages"].values() for out in stage.get("outs", ()))
        md5 = next(out["md5"] for out in outs if out["path"] == path)
        listing = _object(cache_folder(project), md5).read_bytes()
        if f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir" != md5:
            return {}
        return {entry["relpath"]: entry["md5"] for entry in json.loads(listing)}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, StopIteration):
        return {}


def status(project: Project) -> dict[str, Any]:
    """What `dvc status` says: {} when data and stages are up to date, else {stage: [what changed]}."""
    require_whole(project)
    return json.loads(dvc(project.root, "status", "--json"))


def code_hash() -> str:
    """One name for the preprocessing code as a whole."""
    return hashlib.sha256(_code_lock_text().encode()).hexdigest()[:16]


def write_code_lock(project: Project) -> None:
    """Writes preprocessing.lock where it differs: DVC depends on it, since it can't depend on installed packages."""
    settings = project.settings()
    _write_if_different(project.code_lock, _code_lock_text(settings.multilabel, _bounds(settings)))


def _code_lock_text(multilabel: bool = False, bounds: str = "") -> str:
    names = provenance.stages(multilabel, bounds)
    return _CODE_HEADER + "".join(f"{stage}: {name}\n" for stage, name in names.items())


def _bounds(settings: Settings) -> str:
    """The bounds that the manifest depends on; "" for the default ones. Not in dvc.yaml: they may be left out."""
    bounds = settings.validate_.decoding()
    return "" if bounds == parse("").validate_.decoding() else json.dumps(bounds, sort_keys=True)


def _check_parameters(project: Project) -> None:
    """dvc.yaml names keys of params.yaml; DVC needs each to be there, although Sora has defaults for all."""
    given = yaml.safe_load(project.params_file.read_text(encoding="utf-8")) or {}
    try:
        stages = yaml.safe_load(project.dvc_yaml.read_text(encoding="utf-8"))["stages"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{project.dvc_yaml} is not a pipeline: {error!r}",
            fix="restore it from git, or from a new `sora init`",
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
                        fix=f"add it (default: {line})",
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
    `data_version`, `code_hash`. params.yaml is without its secrets: the state is stored where others read it.

    Raises:
        InputError: data.dvc or dvc.lock is damaged: nobody could come back to it.
    """
    require_whole(project)
    texts = {
        name: (project.root / name).read_text(encoding="utf-8")
        for name in STATE_FILES
        if (project.root / name).is_file()
    }
    if "params.yaml" in texts:
        texts["params.yaml"] = redaction.params_text(texts["params.yaml"])
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

    Objects of the cache are compared with their names before they are laid out. A damaged one is set aside, and taken
    from the project's own files or the remote, whichever has its bytes; that is said.

    Raises:
        InputError: the state names no data, or `target` is not empty.
        ServiceError: neither cache nor remote has what the state names, or what they have is damaged (it names it).
    """
    if "data.dvc" not in saved or "dvc.lock" not in saved:
        raise InputError("this version has no stored data.dvc and dvc.lock: it can't be restored")
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty", fix="name a new folder")
    (target / ".dvc").mkdir(parents=True, exist_ok=True)
    for name in STATE_FILES:
        if name in saved:
            (target / name).write_text(saved[name], encoding="utf-8")
    for name in ("config", "config.local"):
        if (project.dvc_home / name).is_file():
            _copy_config(project.dvc_home / name, target / ".dvc" / name)
    cache = cache_folder(project)
    settings = [("core.no_scm", "true"), ("cache.dir", str(cache))]
    for key, value in settings:
        dvc(target, "config", "--local", key, value)
    restored = Project(target)
    targets = [*(["data.dvc"] if data else []), *STAGES]
    checked: set[str] = set()
    damaged = _set_aside(cache, _named(saved, data), checked)
    while True:
        _fix_from_files(project, cache, damaged)
        _lay_out(restored, targets, cache, damaged)
        # Of what came from the remote nothing was checked yet, nor what a damaged list of files named.
        more = _set_aside(cache, _named(saved, data), checked)
        if not more:
            break
        twice = [md5 for md5 in more if md5 in damaged]
        if twice:
            raise ServiceError(
                f"the remote's copy of {_object(cache, twice[0])} ({more[twice[0]]}) is damaged, too",
                fix="remove it from the remote, and `dvc push` from a clone that has it whole",
            )
        damaged |= more
        for folder in (restored.data, restored.prepared):
            shutil.rmtree(folder, ignore_errors=True)
    for md5, path in damaged.items():
        say(f"{_object(cache, md5)}, which DVC's cache keeps of {path}, was damaged: it was replaced by a whole copy")
    return restored


def _lay_out(restored: Project, targets: list[str], cache: Path, damaged: dict[str, str]) -> None:
    try:
        checkout(restored, targets)
    except ServiceError:
        try:
            pull(restored, targets)
        except SoraError as error:
            lost = [md5 for md5 in damaged if not _object(cache, md5).exists()]
            if not lost:
                raise
            places = ", ".join(f"{_object(cache, md5)} ({damaged[md5]})" for md5 in lost[:3])
            raise ServiceError(
                f"{len(lost)} objects of DVC's cache are damaged, and no remote has them: {places}. Their bytes were "
                f"set aside as *.damaged. DVC says: {error.message}",
                fix="`dvc push` where they are whole and run again, or put the original files back into data/ and "
                "`dvc add data`",
            ) from error


def _named(saved: dict[str, Any], data: bool) -> dict[str, str]:
    """MD5 of an output that a state names → its path."""
    outs = yaml.safe_load(saved["data.dvc"])["outs"] if data else []
    for stage in yaml.safe_load(saved["dvc.lock"])["stages"].values():
        outs = [*outs, *stage.get("outs", ())]
    return {str(out["md5"]): str(out["path"]) for out in outs if "md5" in out}


def _set_aside(cache: Path, named: dict[str, str], checked: set[str]) -> dict[str, str]:
    """Renames objects whose bytes are not those of their name, so that DVC looks for others: MD5 → path of the file.

    Objects that are missing are passed over. `checked` holds what was found whole, and gets more.
    """

    def whole(md5: str) -> bool | None:
        place = _object(cache, md5)
        try:
            with place.open("rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except FileNotFoundError:
            return None
        except OSError:  # a sector that can't be read
            found = ""
        if found == md5.removesuffix(".dir"):
            checked.add(md5)
            return True
        with writing(place):
            os.replace(place, place.with_name(f"{place.name}.damaged"))
        return False

    damaged = {}
    with ThreadPoolExecutor(pool.cores()) as threads:
        files = dict(named)
        for md5 in [md5 for md5 in named if md5.endswith(".dir")]:
            if md5 not in checked and whole(md5) is False:
                damaged[md5] = named[md5]
            if md5 in checked:
                listed = json.loads(_object(cache, md5).read_bytes())
                files |= {entry["md5"]: f"{named[md5]}/{entry['relpath']}" for entry in listed}
        todo = [md5 for md5 in files if md5 not in checked and md5 not in damaged]
        for md5, state in zip(todo, threads.map(whole, todo), strict=True):
            if state is False:
                damaged[md5] = files[md5]
    return damaged


def _fix_from_files(project: Project, cache: Path, damaged: dict[str, str]) -> None:
    """Copies what the project's own folder still has whole back into the cache."""
    for md5, path in damaged.items():
        place, source = _object(cache, md5), project.root / path
        if place.exists() or not source.is_file():
            continue
        draft = place.with_name(f"{place.name}.{os.getpid()}.part")
        with writing(place):
            shutil.copyfile(source, draft)
            with draft.open("rb") as file:
                if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5:
                    draft.chmod(0o444)  # as DVC keeps them
                    os.replace(draft, place)
            draft.unlink(missing_ok=True)


def code_notes(project: Project, saved: dict[str, Any]) -> list[str]:
    """In words, what of the code differs from when `saved` was stored."""
    commit, notes = git(project.root, "rev-parse", "HEAD"), []
    if saved.get("code_hash") not in (None, code_hash()):
        notes.append("the preprocessing code has changed since: the stored clips were used, today's would differ")
    if saved.get("git_commit") != commit:
        notes.append(f"git stood at {saved.get('git_commit')} then and stands at {commit} now")
    if saved.get("git_dirty"):
        notes.append("files were changed and not committed then")
    return notes


def cache_folder(project: Project) -> Path:
    """Where DVC keeps the bytes of this project's data versions."""
    return Path(dvc(project.root, "cache", "dir").strip())


def _object(cache: Path, md5: str) -> Path:
    return cache / "files" / "md5" / md5[:2] / md5[2:]


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
