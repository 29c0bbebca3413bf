"""`sora backup FILE`: the whole project in one file, while its servers and a run continue.

The file is a plain tar (footage and models don't compress), mode 0600. `sora-backup.json` comes first and says what
it is; `manifest.json` comes last and lists size and sha256 of every other member: without it the file is incomplete.

| member | content |
|---|---|
| `db/` | MLflow's and Prefect's databases, by SQLite's own online backup |
| `artifacts/` | what MLflow keeps of every run and model, registered or not |
| `tree/` | settings, split ledger, DVC's files; files that were changed, or are new and not ignored by git |
| `git.bundle` | every branch and tag with its history |
| `state/` | tokens, the inbox of corrections, Data Docs, when the last nightly was |
| `objects/` | objects of DVC's cache that the served and recent versions, the present state and the last commit need |
| `data/` | footage added since the last data version |

Databases are read first: a model is stored before a database names it, so whatever they name is there.
Left out are the machine's own things (server secrets and accounts, ports, locks, logs), what can be made again (caches,
`prepared/`) and the unfinished work of an active run.

`sora.operations.restore` restores it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import socket
import sqlite3
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field

from sora import __version__
from sora.config import Project, Settings
from sora.core.errors import DiskFull, InputError, ServiceError
from sora.core.files import atomic, sync_folder, writing
from sora.core.progress import Bar
from sora.dataset import versioning
from sora.dataset.versioning.dvc import environment
from sora.operations.lock import backup_lock
from sora.operations.needed import KEEP, Versions, committed_state, kept_states, objects_of

HEAD, MANIFEST, BUNDLE = "sora-backup.json", "manifest.json", "git.bundle"
DATABASES = ("mlflow", "prefect")
_AT = Project(Path())
# What is kept of `.sora/`, by name; the backup's members have the same names.
STATE_FILES = tuple(
    file.name for file in (_AT.tokens, _AT.last_nightly, _AT.alerted, _AT.reference, _AT.validation_side)
)
STATE_FOLDERS = tuple(folder.name for folder in (_AT.inbox, _AT.docs, _AT.last_evaluation))
DVC_FILES = (".dvc/config", ".dvc/config.local", ".dvc/.gitignore", ".dvcignore", ".gitignore")
MADE_AGAIN = ("data", "prepared", ".sora", ".git", ".dvc", ".dvc-remote")  # of these, `tree/` holds only DVC_FILES
_LARGEST_FILE = 50_000_000  # bytes of a file in the work tree; larger ones belong to DVC
_STEADY_SECONDS = 5.0  # how long to wait for a file that DVC is writing


class Member(BaseModel):
    """One file in the backup."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a backup holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    made: str  # ISO 8601, UTC
    root: str  # the project's folder at that time
    data: bool  # whether DVC's objects are included
    versions: tuple[int, ...]
    needs_remote: tuple[int, ...]  # versions whose data is not in it
    branch: str | None = Field(pattern=r"^refs/heads/\S+$")  # `refs/heads/…`; None: no git, or HEAD was detached
    commit: str | None = Field(pattern=r"^[0-9a-f]{40,64}$")
    git_remotes: dict[str, str]
    removed: tuple[str, ...]  # tracked files and footage deleted since they were recorded, as `tree/…`, `data/…`
    notes: tuple[str, ...]
    members: dict[str, Member]


@dataclass(frozen=True, slots=True)
class Made:
    """A finished backup. `needs_remote`: versions that can't be reproduced from it without DVC's remote."""

    file: str
    bytes: int
    seconds: float
    data: bool
    versions: tuple[int, ...]
    needs_remote: tuple[int, ...]
    notes: tuple[str, ...]
    damaged: tuple[str, ...]  # what is damaged in the project itself


@dataclass(frozen=True, slots=True)
class Last:
    """The last completed backup, and the last failure if it came later. Times are aware, UTC."""

    finished: datetime | None = None
    file: str = ""
    damaged: tuple[str, ...] = ()
    failed: datetime | None = None
    reason: str = ""


def backup(
    project: Project,
    registry: Versions,
    target: Path,
    *,
    keep: int = KEEP,
    data: bool = True,
    progress: Bar | None = None,
    wait: float = 0.0,
) -> Made:
    """Writes the project into the new file `target`, which appears whole or not at all.

    Args:
        keep: recent versions whose data is included, besides the served one and those that a rollback leads to.
        data: False omits DVC's objects.
        wait: seconds to wait for another backup to end.

    Raises:
        InputError: `target` exists, lies in the project, or its folder does not exist; data.dvc or dvc.lock is
            damaged.
        RunActive: another backup or `sora gc` is running.
        DiskFull: no room in the folder of `target`.
        ServiceError: a database is damaged, a file can't be read, or MLflow does not answer.
    """
    target = target.absolute()
    check_target(project, target)
    started = time.monotonic()
    with backup_lock(project, seconds=wait):
        try:
            with _new_file(target) as file:
                writer = _Backup(project, target.parent, progress)
                manifest = writer.write(file, registry, keep, data)
        except DiskFull as error:
            raise DiskFull(
                error.message, fix=f"make room in {target.parent}, or name a file on another disk"
            ) from error
        made = Made(
            file=str(target),
            bytes=target.stat().st_size,
            seconds=round(time.monotonic() - started, 1),
            data=data,
            versions=manifest.versions,
            needs_remote=manifest.needs_remote,
            notes=manifest.notes,
            damaged=tuple(writer.damaged),
        )
        _record(project, Last(datetime.now(UTC), made.file, made.damaged))
    return made


def nightly(project: Project, settings: Settings, registry: Versions, *, progress: Bar | None = None) -> Made:
    """Makes a backup in `backup.folder`, then removes all but this project's newest `backup.keep` there.

    Raises what `backup` does, and InputError if the folder does not exist: an empty mount point must not be
    taken for the disk.
    """
    wanted = settings.backup
    folder = (project.root / Path(wanted.folder or "").expanduser()).absolute()
    if not folder.is_dir():
        raise InputError(f"backup.folder {folder} does not exist", fix="mount or make it, or correct params.yaml")
    # The project's path is part of the name: two projects with the same name may share a folder.
    prefix = f"{settings.name}-{hashlib.sha256(str(project.root.resolve()).encode()).hexdigest()[:8]}"
    target = folder / f"{prefix}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar"
    made = backup(project, registry, target, data=wanted.data, progress=progress, wait=600)
    ours = re.compile(rf"{re.escape(prefix)}-\d{{8}}T\d{{6}}Z\.tar")
    others = sorted(one for one in folder.iterdir() if ours.fullmatch(one.name) and one.name != target.name)
    with writing(folder):
        for old in others[: max(len(others) - (wanted.keep - 1), 0)]:
            old.unlink(missing_ok=True)
    return made


def last(project: Project) -> Last | None:
    """What is known about this project's backups; None if there never was one."""
    try:
        value = json.loads(_record_file(project).read_text(encoding="utf-8"))
        times = {name: datetime.fromisoformat(value[name]) if value[name] else None for name in ("finished", "failed")}
        return Last(file=str(value["file"]), damaged=tuple(value["damaged"]), reason=str(value["reason"]), **times)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_failure(project: Project, reason: str) -> None:
    """Records that a backup failed; the last good one stays known."""
    before = last(project) or Last()
    _record(project, Last(before.finished, before.file, before.damaged, datetime.now(UTC), reason))


def _record_file(project: Project) -> Path:
    return project.last_backup


def _record(project: Project, entry: Last) -> None:
    times = {n: t.isoformat() if t else None for n, t in (("finished", entry.finished), ("failed", entry.failed))}
    with atomic(_record_file(project), shared=True) as file:
        file.write(json.dumps({**asdict(entry), **times}).encode())


# --- the file -------------------------------------------------------------------------------------------------------


def check_target(project: Project, target: Path) -> None:
    """Checks that a backup can be written there; raises the InputError of `backup` if not."""
    target = target.absolute()
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent}", fix="make it first")
    if target.parent.resolve().is_relative_to(project.root.resolve()):
        raise InputError(
            f"{target} is inside the project, and would be lost with it",
            fix="name a file elsewhere, preferably on another disk",
        )
    if os.path.lexists(target):
        raise _exists(target)


def _exists(target: Path) -> InputError:
    return InputError(f"{target} already exists", fix="name a new file, or remove that one first")


@contextmanager
def _new_file(target: Path) -> Iterator[IO[bytes]]:
    """A file (0600) that gets its name once it is complete and on disk.

    Until then it has no name if the file system supports that, so that not even SIGKILL leaves anything behind.
    Elsewhere (network and FAT file systems) the next backup into the folder removes it.
    """
    _sweep(target.parent)
    draft: Path | None = None
    with writing(target):
        try:
            descriptor = os.open(target.parent, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
            draft = _draft(target.parent)
            descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            with os.fdopen(descriptor, "r+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                _name(file, draft, target)
            sync_folder(target.parent)
        finally:
            if draft is not None:
                draft.unlink(missing_ok=True)


def _name(file: IO[bytes], draft: Path | None, target: Path) -> None:
    """Never overwrites a file that was created meanwhile."""
    try:
        if draft is None:
            folder = os.open(target.parent, os.O_RDONLY)
            try:  # with a folder's descriptor Python calls linkat(2): only that follows the link in /proc
                os.link(f"/proc/self/fd/{file.fileno()}", target.name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(folder)
            return
        with suppress(PermissionError, NotImplementedError):  # a file system without links
            os.link(draft, target)
            return
        if os.path.lexists(target):
            raise FileExistsError
        os.rename(draft, target)
    except FileExistsError:
        raise _exists(target) from None


def _draft(folder: Path) -> Path:
    return folder / f".sora-backup.{socket.gethostname()}.{os.getpid()}.part"


def _sweep(folder: Path) -> None:
    """Removes what killed backups of this machine left in `folder`."""
    for draft in folder.glob(f".sora-backup.{socket.gethostname()}.*.part"):
        number = draft.name.split(".")[-2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            with suppress(OSError):
                draft.unlink()


# --- what goes into it ----------------------------------------------------------------------------------------------


class _Hashing:
    """Reads `source` and computes digests of what was read."""

    def __init__(self, source: IO[bytes], *, md5: bool) -> None:
        self._source = source
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False) if md5 else None

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(size)
        self.sha256.update(chunk)
        if self.md5 is not None:
            self.md5.update(chunk)
        return chunk


@dataclass(frozen=True)
class _Planned:
    """A file that is to become a member."""

    name: str
    source: Path | bytes
    needed: bool = True  # False: it may be gone by the time it is read (a run or a reviewer removed it)
    md5: str = ""  # of an object of DVC's cache


@dataclass
class _Backup:
    project: Project
    beside: Path  # the folder for snapshots
    progress: Bar | None
    notes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    def write(self, file: IO[bytes], registry: Versions, keep: int, data: bool) -> Manifest:
        made = datetime.now(UTC).isoformat(timespec="seconds")
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as self.tar:
            self._bytes(HEAD, json.dumps({"kind": "sora backup", "format": 1, "sora": __version__}).encode())
            # Databases first: what they name was stored before them.
            for name in DATABASES:
                self._database(name)
            versions = registry.versions()
            states = kept_states(registry, versions, keep)
            tree = self._tree()
            own = {name: body.decode() for name, body in tree.items() if name in ("data.dvc", "dvc.lock")}
            objects = versioning.cache_folder(self.project) / "files" / "md5"
            wanted, short = self._objects(objects, states, own)
            git = _Git(self.project.root)
            footage, removed = self._footage(objects, own) if data else ([], [])
            planned = [
                *self._artifacts(),
                *(_Planned(f"tree/{name}", body) for name, body in sorted(tree.items())),
                *self._changed(git, set(tree)),
                *self._state(),
                *(wanted if data else []),
                *footage,
            ]
            bundle = git.bundle(self.beside)
            self.total = self.done + sum(_size(one.source) for one in planned) + _length(bundle)
            if bundle is not None:
                with bundle:
                    self._stream(BUNDLE, bundle, _length(bundle))
            for one in planned:
                self._add(one)
            self._check_models(registry)
            manifest = Manifest(
                made=made,
                root=str(self.project.root),
                data=data,
                versions=tuple(sorted(one.version for one in versions)),
                needs_remote=tuple(
                    sorted(
                        one.version for one in versions if not data or one.version not in states or one.version in short
                    )
                ),
                branch=git.branch,
                commit=git.commit,
                git_remotes=git.remotes(),
                removed=(*(f"tree/{name}" for name in git.deleted()), *removed),
                notes=(*self.notes, *git.notes, *self.damaged),
                members=self.members,
            )
            self._bytes(MANIFEST, manifest.model_dump_json(indent=1).encode())
        return manifest

    # -- members --

    def _bytes(self, name: str, body: bytes) -> None:
        self._stream(name, io.BytesIO(body), len(body))

    def _add(self, one: _Planned) -> None:
        try:
            one.name.encode()
        except UnicodeEncodeError:
            self.notes.append(f"{os.fsencode(one.name)!r} is left out: its name is not UTF-8")
            return
        if isinstance(one.source, bytes):
            self._bytes(one.name, one.source)
            return
        try:
            # Links are not followed: they could lead anywhere.
            descriptor = os.open(one.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if one.needed:
                raise ServiceError(f"{one.source} vanished during the backup", fix="run `sora backup` again") from None
            return
        except OSError as error:
            raise ServiceError(f"can't read {one.source}: {error.strerror}", fix="make it readable") from error
        with os.fdopen(descriptor, "rb") as source:
            facts = os.fstat(source.fileno())
            executable = bool(facts.st_mode & stat.S_IXUSR)
            md5 = self._stream(
                one.name, source, facts.st_size, facts.st_mtime, executable=executable, md5=bool(one.md5)
            )
        if md5 != one.md5:
            self.damaged.append(f"object {one.md5} of DVC's cache is damaged: `dvc fetch`, or remove it and `dvc pull`")

    def _stream(
        self,
        name: str,
        source: IO[bytes],
        size: int,
        changed: float | None = None,
        *,
        executable: bool = False,
        md5: bool = False,
    ) -> str:
        """Adds `size` bytes; returns their md5 if asked for, else ''."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o700 if executable else 0o600, int(changed or time.time())
        hashing = _Hashing(source, md5=md5)
        try:
            self.tar.addfile(info, hashing)
        except OSError as error:
            if "unexpected end of data" in str(error):
                raise ServiceError(f"{name} became shorter while it was read", fix="run `sora backup` again") from error
            raise
        self.members[name] = Member(size=size, sha256=hashing.sha256.hexdigest())
        self.done += size
        if self.progress and self.total:
            self.progress(self.done // 1_000_000, self.total // 1_000_000, "MB")
        return hashing.md5.hexdigest() if hashing.md5 else ""

    def _database(self, name: str) -> None:
        file = self.project.database(name)
        if not file.is_file():
            configured = self.project.settings().services
            if configured.prefect_api_url if name == "prefect" else configured.mlflow_tracking_uri:
                self.notes.append(
                    f"{name} runs elsewhere (`services` in params.yaml) and is not included: back it up there"
                )
            return
        with snapshot(file, self.beside) as copy:
            self._stream(f"db/{name}.db", copy, _length(copy))

    def _artifacts(self) -> Iterator[_Planned]:
        folder = self.project.artifacts
        for file in _files(folder):
            yield _Planned(f"artifacts/{file.relative_to(folder).as_posix()}", file, needed=False)

    def _check_models(self, registry: Versions) -> None:
        """Every registered model must be among the artifacts, byte for byte."""
        if "db/mlflow.db" not in self.members or self.project.settings().services.mlflow_tracking_uri:
            return
        there = {member.sha256 for name, member in self.members.items() if name.startswith("artifacts/")}
        for number, digest in sorted(registry.digests().items()):
            if digest and digest not in there:
                self.damaged.append(
                    f"the model of version {number} is missing or damaged in MLflow: the backup does not hold all of it"
                )

    def _tree(self) -> dict[str, bytes]:
        """Sora's and DVC's own small files, as they are at one moment."""
        files = {}
        for name in dict.fromkeys((*versioning.STATE_FILES, *DVC_FILES)):
            file = self.project.root / name
            if file.is_file() and not file.is_symlink():
                files[name] = _steady(file) if name in ("data.dvc", "dvc.lock") else file.read_bytes()
        return files

    def _changed(self, git: _Git, known: set[str]) -> Iterator[_Planned]:
        for name in sorted(git.changed() - known):
            if not of_the_tree(name):
                continue
            file = self.project.root / name
            try:
                facts = file.lstat()
            except OSError:
                continue
            if not stat.S_ISREG(facts.st_mode):
                self.notes.append(f"{name} is left out: a changed link or folder that git does not have")
            elif facts.st_size > _LARGEST_FILE:
                self.notes.append(f"{name} is left out: git does not have it, and it is larger than 50 MB")
            else:
                yield _Planned(f"tree/{name}", file, needed=False)

    def _state(self) -> Iterator[_Planned]:
        state = self.project.state
        for name in STATE_FILES:
            if (state / name).is_file():
                yield _Planned(f"state/{name}", state / name, needed=False)
        for folder in STATE_FOLDERS:
            for file in _files(state / folder):
                yield _Planned(f"state/{file.relative_to(state).as_posix()}", file, needed=False)

    def _objects(
        self, cache: Path, states: Mapping[int, Mapping[str, Any]], own: Mapping[str, str]
    ) -> tuple[list[_Planned], set[int]]:
        """Objects of the cache to include, and the versions that need more than the cache has."""
        needed: dict[int | None, set[str]] = {number: objects_of(cache, [state]) for number, state in states.items()}
        needed[None] = objects_of(cache, [own, committed_state(self.project)])
        every = set().union(*needed.values())
        there = {name for name in every if (cache / name).is_file()}
        short = {number for number, names in needed.items() if number is not None and (not names or names - there)}
        if every - there:
            self.notes.append(
                f"{len(every - there)} objects that versions or the last commit name are not in DVC's cache: "
                "they are in its remote, or lost"
            )
        return [
            _Planned(f"objects/{name}", cache / name, md5=name.replace("/", "").removesuffix(".dir"))
            for name in sorted(there)
        ], short

    def _footage(self, cache: Path, own: Mapping[str, str]) -> tuple[list[_Planned], list[str]]:
        """Files in data/ that differ from data.dvc or are not in it, and those of it that were removed."""
        root = self.project.data
        if not root.is_dir() or root.is_symlink():
            return [], []
        listed, since = {}, 0.0
        if "data.dvc" in own:
            md5 = str(yaml.safe_load(own["data.dvc"])["outs"][0]["md5"])
            listing = cache / md5[:2] / md5[2:]
            since = self.project.data_dvc.stat().st_mtime
            if listing.is_file():
                listed = {str(one["relpath"]): str(one["md5"]) for one in json.loads(listing.read_bytes())}
        new, there = [], set()
        for file in _files(root):
            name = file.relative_to(root).as_posix()
            there.add(name)
            kept = cache / listed[name][:2] / listed[name][2:] if name in listed else None
            try:
                facts = file.stat()
                same = kept is not None and kept.stat().st_size == facts.st_size and facts.st_mtime <= since
            except OSError:
                same = False
            if not same:
                new.append(_Planned(f"data/{name}", file, needed=False))
        return new, [f"data/{name}" for name in sorted(set(listed) - there)]


def of_the_tree(name: str) -> bool:
    """Whether `tree/` may hold this file of the work tree."""
    return name in DVC_FILES or PurePosixPath(name).parts[0] not in MADE_AGAIN


@contextmanager
def snapshot(database: Path, beside: Path) -> Iterator[IO[bytes]]:
    """A snapshot of an SQLite database, even while others write to it; the file has no name and is at its start.

    Raises:
        ServiceError: the database is damaged or stays locked.
        DiskFull: no room in `beside`.
    """
    descriptor, name = tempfile.mkstemp(prefix=".sora-backup.", dir=beside)
    with os.fdopen(descriptor, "rb") as copy:
        try:
            try:
                address = f"{database.absolute().as_uri()}?mode=ro"
                with (
                    closing(sqlite3.connect(address, uri=True, timeout=30)) as source,
                    closing(sqlite3.connect(name)) as to,
                ):
                    to.execute("PRAGMA journal_mode = OFF")  # this opens the file: from here on it needs no name
                    os.unlink(name)
                    verdict = source.execute("PRAGMA quick_check(1)").fetchone()[0]
                    if verdict != "ok":
                        raise sqlite3.DatabaseError(verdict)
                    source.backup(to)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)
        except sqlite3.Error as error:
            if "full" in str(error):
                raise DiskFull(f"no space left for a copy of {database.name} in {beside}") from error
            raise ServiceError(
                f"{database} can't be copied: {error}", fix="`sora doctor`; restore an earlier backup if it is damaged"
            ) from error
        yield copy


class _Git:
    """The project's own repository. A repository above the project is not included."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.notes: list[str] = []
        top = self._ask("rev-parse", "--show-toplevel")
        self._own = top is not None and Path(os.fsdecode(top).rstrip("\n")).resolve() == root.resolve()
        if top is not None and not self._own:
            self.notes.append("git's history is not included: the repository is above the project")
        elif top is None:
            self.notes.append("git's history is not included: there is no repository, or no git")
        commit = self._ask("rev-parse", "--verify", "--quiet", "HEAD") if self._own else None
        branch = self._ask("symbolic-ref", "--quiet", "HEAD") if self._own else None
        self.commit = commit.decode().strip() if commit else None
        self.branch = branch.decode().strip() if branch else None

    def bundle(self, beside: Path) -> IO[bytes] | None:
        """Every ref and its history; None without a commit.

        Raises:
            ServiceError: git failed.
        """
        if self.commit is None:
            return None
        if (self._ask("rev-parse", "--is-shallow-repository") or b"").strip() == b"true":
            self.notes.append("git's history is not included: the clone is shallow (`git fetch --unshallow`)")
            self.commit = None
            return None
        with writing(beside):
            file = tempfile.TemporaryFile(dir=beside)  # noqa: SIM115
        command = ["git", "bundle", "create", "--quiet", "-", "--all", "HEAD"]
        done = subprocess.run(command, cwd=self._root, env=environment(), stdout=file, stderr=subprocess.PIPE)
        if done.returncode != 0:
            file.close()
            message = done.stderr.decode("utf-8", "replace").strip()
            if "No space left" in message:
                raise DiskFull(f"no space left for git's history in {beside}")
            raise ServiceError(f"git bundle in {self._root} failed: {message}", fix="`git fsck`")
        file.seek(0)
        return file

    def changed(self) -> set[str]:
        """Tracked files that differ from the last commit, and those that are neither tracked nor ignored."""
        asked = [("ls-files", "-z", "-m", "-o", "--exclude-standard")]
        if self.commit is not None:
            asked.append(("diff", "--name-only", "--no-renames", "-z", "HEAD"))
        return {name for one in asked for name in self._names(*one)} if self._own else set()

    def deleted(self) -> list[str]:
        """Files of the last commit that no longer exist."""
        if self.commit is None:
            return []
        names = self._names("diff", "--name-only", "--no-renames", "--diff-filter=D", "-z", "HEAD")
        gone = [name for name in names if of_the_tree(name) and not os.path.lexists(self._root / name)]
        return sorted(name for name in gone if name.isprintable())  # JSON can't hold a name that is not UTF-8

    def remotes(self) -> dict[str, str]:
        names = os.fsdecode(self._ask("remote") or b"").split() if self._own else []
        urls = {name: self._ask("config", f"remote.{name}.url") for name in names}
        return {name: os.fsdecode(url).strip() for name, url in urls.items() if url}

    def _names(self, *arguments: str) -> list[str]:
        return [os.fsdecode(name) for name in (self._ask(*arguments) or b"").split(b"\0") if name]

    def _ask(self, *arguments: str) -> bytes | None:
        try:
            env = environment(GIT_OPTIONAL_LOCKS="0")  # reading must not refresh an index that somebody else is using
            done = subprocess.run(["git", *arguments], cwd=self._root, env=env, capture_output=True)
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None


def _steady(file: Path) -> bytes:
    """A small YAML file that DVC may be writing: read until it is whole.

    Raises:
        InputError: it stays damaged.
    """
    deadline = time.monotonic() + _STEADY_SECONDS
    while True:
        body = file.read_bytes()
        time.sleep(0.05)
        with suppress(yaml.YAMLError, UnicodeDecodeError):
            if isinstance(yaml.safe_load(body.decode()), dict) and file.read_bytes() == body:
                return body
        if time.monotonic() > deadline:
            raise InputError(f"{file} is damaged", fix=f"restore it: git checkout -- {file.name}")


def _files(folder: Path) -> Iterator[Path]:
    """Regular files below `folder`; links are neither followed nor included."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(place) / name
            with suppress(OSError):
                if stat.S_ISREG(file.lstat().st_mode):
                    yield file


def _size(source: Path | bytes) -> int:
    if isinstance(source, bytes):
        return len(source)
    with suppress(OSError):
        return source.lstat().st_size
    return 0


def _length(file: IO[bytes] | None) -> int:
    return os.fstat(file.fileno()).st_size if file is not None else 0


def describe(made: Made) -> Iterable[str]:
    """Lines to show the user."""
    yield f"{made.file}: {made.bytes:,} bytes in {made.seconds:.0f} s"
    if made.needs_remote:
        listed = ", ".join(map(str, made.needs_remote))
        yield f"  without DVC's remote these versions can be served, but not reproduced: {listed}"
    if not made.data:
        yield "  the videos and clips are not included: only DVC's remote can restore data/"
    for note in made.notes:
        yield f"  {note}"
