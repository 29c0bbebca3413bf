"""`sora restore FILE DIR`: a project from a backup, on any machine, in any new or empty folder.

The file is not trusted to be whole, or to be a backup at all. Every member's name, kind, size and sha256 is checked
against the manifest before it counts; nothing is written outside DIR, and DIR gets its `params.yaml` last, when all
else is in place. One thing needs a person's judgement: like any project, a restored one runs the commands in its
`dvc.yaml`, so restore only files from people whose code you would run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import yaml
from pydantic import ValidationError

from sora.config import Project
from sora.core.errors import DiskFull, InputError, ServiceError
from sora.core.files import sync_folder, writing
from sora.core.progress import Bar
from sora.dataset import versioning
from sora.dataset.versioning.dvc import dvc, environment
from sora.operations.backup import (
    BUNDLE,
    DATABASES,
    HEAD,
    MADE_AGAIN,
    MANIFEST,
    STATE_FILES,
    STATE_FOLDERS,
    Manifest,
    of_the_tree,
)
from sora.operations.needed import OBJECT, objects_of

_WORK = ".sora-restoring"  # in DIR during the restore
_LARGEST_MANIFEST = 256_000_000  # bytes
_LARGEST_NAME = 65_536  # bytes of a tar header that holds a long name
_SPARE = 100_000_000  # bytes that stay free
_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_REMOTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_REMOTE_URL = re.compile(r"(https?|ssh|git)://\S+|[\w.-]+@[\w.-]+:[\w./~-]\S*|/[^\n\0]*")


@dataclass(frozen=True, slots=True)
class Restored:
    """A restored project. `data`: whether data/ and what was prepared from it are in place."""

    project: str
    made: str
    versions: tuple[int, ...]
    data: bool
    needs_remote: tuple[int, ...]
    notes: tuple[str, ...]


def restore(file: Path, directory: Path, *, progress: Bar | None = None) -> Restored:
    """Makes the project that the backup `file` holds in `directory`, which is new or empty.

    Raises:
        InputError: `file` is no backup, torn, altered, or from a newer Sora; `directory` is not empty; git is missing.
        DiskFull: no room in `directory`.
        ServiceError: the disk, git or DVC failed. Nothing is left in any of these cases.
    """
    target = directory.absolute()
    if shutil.which("git") is None:
        raise InputError("git is not installed, and a project is a git repository", fix="install git")
    with _opened(file) as (tar, infos, manifest):
        made_directory = _check_directory(target)
        work = target / _WORK
        try:
            with writing(target):
                work.mkdir(mode=0o700)
                _check_space(target, manifest)
            return _Restore(file, tar, infos, manifest, target, work, progress).run()
        except BaseException:
            _remove_all(work)
            if made_directory:
                with suppress(OSError):
                    target.rmdir()
            raise


# --- the file -------------------------------------------------------------------------------------------------------


class _Info(tarfile.TarInfo):
    """A header that claims gigabytes for a name is refused before they are read."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _LONG_HEADERS and self.size > _LARGEST_NAME:
            raise tarfile.HeaderError("a name is too long")
        return super()._proc_member(tar)  # type: ignore[misc]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, tarfile.TarInfo], Manifest]]:
    """The open backup, its members' headers by name, and its manifest. Every header is checked against it."""
    foreign = InputError(f"{file} is not a Sora backup", fix="name a file that `sora backup` wrote")
    try:
        stream = file.open("rb")
    except OSError as error:
        raise InputError(f"can't read {file}: {error.strerror}", fix="name a file that `sora backup` wrote") from error
    with stream:
        infos: dict[str, tarfile.TarInfo] = {}
        try:
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Info, encoding="utf-8") as tar:
                for number, info in enumerate(tar):
                    if number == 0:
                        _check_head(file, tar, info, foreign)
                    if not info.isreg() or info.name in infos or not _placed(info.name):
                        raise _altered(file, info.name)
                    infos[info.name] = info
                if not infos:
                    raise foreign
                if MANIFEST not in infos:
                    raise _torn(file)
                yield tar, infos, _manifest(file, tar, infos)
        except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            raise (_torn(file) if infos else foreign) from error


def _check_head(file: Path, tar: tarfile.TarFile, info: tarfile.TarInfo, foreign: InputError) -> None:
    if info.name != HEAD or not info.isreg() or info.size > 10_000:
        raise foreign
    try:
        head = json.loads(_reader(tar, info).read())
        kind, number = head["kind"], head["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise foreign from error
    if kind != "sora backup":
        raise foreign
    if number != 1:
        raise InputError(f"{file} has format {number}; this Sora reads 1", fix="restore it with the Sora that made it")


def _manifest(file: Path, tar: tarfile.TarFile, infos: dict[str, tarfile.TarInfo]) -> Manifest:
    info = infos[MANIFEST]
    if info.size > _LARGEST_MANIFEST:
        raise _altered(file, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(_reader(tar, info).read())
    except ValidationError as error:
        raise _altered(file, MANIFEST) from error
    if set(manifest.members) != set(infos) - {MANIFEST}:
        odd = sorted(set(manifest.members) ^ (set(infos) - {MANIFEST}))
        raise _altered(file, odd[0])
    for name, member in manifest.members.items():
        if infos[name].size != member.size:
            raise _altered(file, name)
    return manifest


def _placed(name: str) -> bool:
    """Whether a member of this name belongs in a project: only such names are ever written."""
    path = PurePosixPath(name)
    if path.is_absolute() or str(path) != name or ".." in path.parts or "\0" in name or len(name) > 4096:
        return False
    if name in (HEAD, MANIFEST, BUNDLE):
        return True
    kind, _, rest = name.partition("/")
    if not rest:
        return False
    if kind == "objects":
        return OBJECT.fullmatch(rest) is not None
    if kind == "db":
        return rest in {f"{one}.db" for one in DATABASES}
    if kind == "state":
        return rest in STATE_FILES or rest.partition("/")[0] in STATE_FOLDERS
    if kind == "tree":
        return of_the_tree(rest)
    return kind in ("artifacts", "data")


def _reader(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    reader = tar.extractfile(info)
    if reader is None:
        raise tarfile.ReadError("not a regular file")
    return reader


def _torn(file: Path) -> InputError:
    return InputError(f"{file} is torn: its end is missing", fix="copy it again from its origin, or use another one")


def _altered(file: Path, name: str) -> InputError:
    return InputError(
        f"{file} was altered, or damaged: {name[:200]!r} is not what its manifest says", fix="use another backup"
    )


# --- the folder -----------------------------------------------------------------------------------------------------


def _check_directory(target: Path) -> bool:
    """Makes the folder if needed; returns whether it did."""
    if target.is_dir():
        names = sorted(os.listdir(target))
        if _WORK in names:
            raise InputError(f"{target} holds what a killed `sora restore` left", fix="remove it, then try again")
        if names:
            raise InputError(f"{target} is not empty", fix="name a new folder")
        return False
    if os.path.lexists(target):
        raise InputError(f"{target} is a file", fix="name a new folder")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent}", fix="make it first")
    with writing(target):
        target.mkdir(mode=0o755)
    return True


def _check_space(target: Path, manifest: Manifest) -> None:
    """DVC's objects are stored in its cache and, copied, in data/ and prepared/."""
    twice = sum(member.size for name, member in manifest.members.items() if name.startswith("objects/"))
    needed = sum(member.size for member in manifest.members.values()) + twice + _SPARE
    free = shutil.disk_usage(target).free
    if free < needed:
        raise DiskFull(
            f"{target} has {free:,} bytes free, and the project can need {needed:,}",
            fix="make room, or name a folder on another disk",
        )


def _remove_all(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Restore:
    file: Path
    tar: tarfile.TarFile
    infos: dict[str, tarfile.TarInfo]
    manifest: Manifest
    target: Path
    work: Path
    progress: Bar | None
    done: int = 0

    def __post_init__(self) -> None:
        self.root = self.work / "project"  # moved up when it is complete
        self.cache = self.root / ".dvc" / "cache" / "files" / "md5"
        self.notes = list(self.manifest.notes)

    def run(self) -> Restored:
        with writing(self.root):
            self.root.mkdir()
            Project(self.root).state.mkdir(mode=0o700)
            self._git()
            links = self._links()
            for name in self.manifest.members:
                if name not in (HEAD, BUNDLE) and not name.startswith("data/"):
                    self._extract(name, self._place(name))
            for name in self.manifest.removed:
                if name.startswith("tree/") and _placed(name):
                    self._place(name).unlink(missing_ok=True)
            data = self._dvc()
            for name in self.manifest.members:
                if name.startswith("data/"):
                    self._extract(name, self._place(name))
            for name in self.manifest.removed if data else ():
                if name.startswith("data/") and _placed(name):
                    self._place(name).unlink(missing_ok=True)
            self._relink(links)
            project = Project(self.root)
            project.settings()
            self._move_up()
        return Restored(
            project=str(self.target),
            made=self.manifest.made,
            versions=self.manifest.versions,
            data=data,
            needs_remote=self.manifest.needs_remote,
            notes=tuple(self.notes),
        )

    # -- files --

    def _place(self, name: str) -> Path:
        kind, _, rest = name.partition("/")
        if kind == "objects":
            return self.cache / rest
        if kind == "db":
            return Project(self.root).database(Path(rest).stem)
        if kind == "artifacts":
            return Project(self.root).artifacts / rest
        if kind == "state":
            return Project(self.root).state / rest
        return self.root / rest if kind == "tree" else Project(self.root).data / rest

    def _extract(self, name: str, target: Path) -> None:
        """Writes one member; removes it if it is not what the manifest says."""
        info, wanted = self.infos[name], self.manifest.members[name]
        private = name.startswith(("db/", "state/")) or name.endswith("/config.local")
        mode = 0o600 if private else 0o755 if info.mode & 0o100 else 0o444 if name.startswith("objects/") else 0o644
        digest = hashlib.sha256()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            # Never through a link, and never over an existing file.
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise _altered(self.file, name) from error
        with os.fdopen(descriptor, "wb") as sink:
            source, left = _reader(self.tar, info), wanted.size
            while left:
                chunk = source.read(min(1 << 20, left))
                if not chunk:
                    raise _torn(self.file)
                digest.update(chunk)
                sink.write(chunk)
                left -= len(chunk)
            if digest.hexdigest() != wanted.sha256:
                raise _altered(self.file, name)
            os.fchmod(sink.fileno(), mode)
        os.utime(target, (info.mtime, info.mtime))
        self.done += wanted.size
        if self.progress:
            total = sum(member.size for member in self.manifest.members.values())
            self.progress(self.done // 1_000_000, total // 1_000_000, "MB")

    def _move_up(self) -> None:
        """Moves all into the folder itself; params.yaml last, since it makes a folder a project."""
        shutil.rmtree(self.root / ".dvc" / "tmp", ignore_errors=True)
        names = sorted(os.listdir(self.root), key=lambda name: name == "params.yaml")
        if self.root.name in names or _WORK in names:
            raise _altered(self.file, _WORK)
        moved = []
        try:
            for name in names:
                os.rename(self.root / name, self.target / name)
                moved.append(name)
        except BaseException:
            for name in moved:
                os.rename(self.target / name, self.root / name)
            raise
        shutil.rmtree(self.work)
        sync_folder(self.target)

    # -- git --

    def _git(self) -> None:
        """The repository with all its refs, and the last commit's files. Links become files for the time being."""
        self._ask("init", "--quiet", "--initial-branch=main")
        for name, url in self.manifest.git_remotes.items():
            if _REMOTE_NAME.fullmatch(name) and _REMOTE_URL.fullmatch(url):
                self._ask("remote", "add", "--", name, url)
        if BUNDLE not in self.manifest.members:
            return
        bundle = self.work / "git.bundle"
        self._extract(BUNDLE, bundle)
        self._ask("fetch", "--quiet", "--update-head-ok", "--no-tags", str(bundle), "+refs/*:refs/*")
        self._ask("fetch", "--quiet", "--no-tags", str(bundle), "HEAD")
        bundle.unlink()
        branch, commit = self.manifest.branch, self.manifest.commit or ""
        if branch is not None:
            self._ask("check-ref-format", branch)
            self._ask("symbolic-ref", "HEAD", branch)
        else:
            self._ask("update-ref", "--no-deref", "HEAD", commit)
        if self._ask("rev-parse", "HEAD").strip() != commit:
            # Somebody committed between the two reads: the bundle's state counts.
            self.notes.append(f"git was at {commit[:12]} when the backup began, and is slightly later now")
        self._ask("reset", "--quiet", "--hard", "HEAD")

    def _links(self) -> list[str]:
        """Links that git tracks; none may be where Sora is going to write."""
        entries = self._ask("ls-files", "--stage", "-z").split("\0")
        links = [entry.split("\t", 1)[1] for entry in entries if entry.startswith("120000 ")]
        for name in links:
            if name.split("/")[0] in MADE_AGAIN or f"tree/{name}" in self.manifest.members:
                raise InputError(f"{self.file} has a link at {name}", fix="restore only backups that Sora made")
        return links

    def _relink(self, links: Iterable[str]) -> None:
        if links:
            with suppress(ServiceError):  # core.symlinks is not set where git did not write it
                self._ask("config", "--unset", "core.symlinks")
            self._ask("checkout-index", "--force", "--index", "-z", "--stdin", stdin="\0".join(links), symlinks=True)

    def _ask(self, *arguments: str, stdin: str = "", symlinks: bool = False) -> str:
        command = ["git", "-c", "core.hooksPath=/dev/null", *([] if symlinks else ["-c", "core.symlinks=false"])]
        done = subprocess.run(
            [*command, *arguments],
            cwd=self.root,
            env=environment(),
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
        )
        message = done.stderr.decode("utf-8", "replace").strip()
        if done.returncode != 0:
            if "No space left" in message:
                raise DiskFull(f"no space left for {self.target}", fix="make room, or name a folder on another disk")
            raise ServiceError(
                f"git {arguments[0]} failed while {self.file} was restored: {message}", fix="use another backup"
            )
        return done.stdout.decode("utf-8", "surrogateescape")

    # -- DVC --

    def _dvc(self) -> bool:
        """Sets up remotes and cache for this machine; checks out data/ and prepared/ if all their objects are there."""
        config = self.root / ".dvc"
        if not (config / "config").is_file():
            return False
        for name in ("config", "config.local"):
            if (config / name).is_file():
                self._readdress(config / name)
        own = self.root / ".dvc" / "cache"
        if versioning.cache_folder(Project(self.root)).resolve() != own.resolve():
            dvc(self.root, "cache", "dir", "--local", ".dvc/cache")
            self.notes.append(
                "DVC's cache is now in the project (.dvc/config.local); before, it was shared with others"
            )
        data, prepared = self._text("data.dvc"), self._text("dvc.lock")
        if not data or not self._whole(data):
            self.notes.append("data/ is not in place: `dvc pull`, or `sora run`, gets it from DVC's remote")
            return False
        lock = yaml.safe_load(prepared or "") or {}
        outs = [out for stage in (lock.get("stages") or {}).values() for out in stage.get("outs") or ()]
        stages = [name for name in versioning.stages_of(Project(self.root)) if name in (lock.get("stages") or {})]
        whole = bool(outs) and self._whole(yaml.safe_dump({"outs": outs}))
        if outs and not whole:
            self.notes.append("prepared/ is not in place: the next `sora run` makes it")
        versioning.checkout(Project(self.root), ["data.dvc", *(stages if whole else [])])
        return True

    def _whole(self, named: str) -> bool:
        return all((self.cache / name).is_file() for name in objects_of(self.cache, [{"data.dvc": named}]))

    def _text(self, name: str) -> str:
        file = self.root / name
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def _readdress(self, config: Path) -> None:
        """Remotes in the project are named relative to it; others stay where they were."""
        old = Path(self.manifest.root)

        def here(match: re.Match[str]) -> str:
            place = match[2].strip()
            if "://" in place or place.startswith("remote:"):
                return match[0]
            absolute = Path(os.path.normpath(old / ".dvc" / place))
            if absolute.is_relative_to(old):
                return match[1] + os.path.join("..", absolute.relative_to(old))
            self.notes.append(
                f"a DVC remote is the folder {absolute}" + ("" if absolute.is_dir() else ", which does not exist here")
            )
            return match[1] + str(absolute)

        text = config.read_text(encoding="utf-8")
        changed = re.sub(r"^(\s*url\s*=\s*)(.+)$", here, text, flags=re.MULTILINE)
        if changed != text:
            config.write_text(changed, encoding="utf-8")


def describe(restored: Restored) -> Iterable[str]:
    """Lines for a person."""
    versions = f"versions {', '.join(map(str, restored.versions))}" if restored.versions else "no version yet"
    yield f"{restored.project}: as it was {restored.made}, {versions}"
    for note in restored.notes:
        yield f"  {note}"
    yield f"next: cd {restored.project} && sora doctor"
