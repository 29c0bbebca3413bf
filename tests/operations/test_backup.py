from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from sora.config import Project, parse
from sora.core.errors import DiskFull, InputError, RunActive, ServiceError, SettingsError
from sora.core.records import ModelVersion
from sora.dataset.versioning import version
from sora.operations import backup as backups
from sora.operations import gc, restore
from sora.operations.backup import Made, backup
from sora.operations.doctor import doctor
from sora.operations.lock import backup_lock
from sora.registry.history import Move
from tests.videos import make_video

SECRET = "user:the-auth-string-of-this-machine"


class Versions:
    """What MLflow would say: version 1 is champion. Real MLflow is in tests/e2e/test_backup.py."""

    tracking_uri = "http://127.0.0.1:9"

    def __init__(self, project: Project) -> None:
        self.state = version.state(project)
        self.found = {1: ""}

    def versions(self) -> list[ModelVersion]:
        return [ModelVersion(one, ("champion",), {}, "", "", "promoted", ()) for one in self.found]

    def history(self) -> list[Move]:
        return []

    def digests(self) -> dict[int, str]:
        return dict(self.found)

    def restore_state(self, version: int) -> dict[str, Any]:
        return self.state

    def delete_version(self, version: int) -> None:
        raise AssertionError("a backup deletes nothing")


def fill(project: Project) -> None:
    """Databases, artifacts and the rest of .sora, without the servers that make them."""
    for name, mode in (("mlflow", "delete"), ("prefect", "wal")):
        folder = project.state / name
        folder.mkdir(parents=True)
        with sqlite3.connect(folder / f"{name}.db") as database:
            database.execute(f"PRAGMA journal_mode = {mode}")
            database.execute("CREATE TABLE account (id INTEGER, amount INTEGER)")
            database.executemany("INSERT INTO account VALUES (?, ?)", [(1, 100), (2, 0)])
        database.close()
    for name, text in (
        ("mlflow/artifacts/1/models/m-1/artifacts/data/model.keras", "a model"),
        ("mlflow/auth.db", SECRET),
        ("server-auth", SECRET),
        ("services.json", SECRET),
        ("tokens.json", "[]"),
        ("inbox/ab.json", "{}"),
    ):
        file = project.state / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def project(fresh_project: Project) -> Project:
    fill(fresh_project)
    return fresh_project


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "disk 2"
    folder.mkdir()
    return folder


def made(project: Project, target: Path, **options: Any) -> Made:
    return backup(project, Versions(project), target, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_what_it_holds_and_what_it_leaves_out(project: Project, out: Path) -> None:
    registry = Versions(project)
    before = {name: body for name, body in tree(project.root).items() if ".dvc/tmp" not in name}
    done = backup(project, registry, out / "b.tar")
    after = {name: body for name, body in tree(project.root).items() if ".dvc/tmp" not in name}
    new = set(after) - set(before)
    assert {name for name in new if not name.endswith(("-shm", "-wal"))} <= {
        ".sora/backup.lock",
        ".sora/last_backup.json",
    }
    assert [name for name, body in before.items() if after.get(name) != body and not name.endswith("-shm")] == []
    assert stat.S_IMODE((out / "b.tar").stat().st_mode) == 0o600
    assert done.versions == (1,) and not done.needs_remote and not done.damaged and not done.notes
    with tarfile.open(out / "b.tar") as tar:
        names = tar.getnames()
    assert names[0] == backups.HEAD and names[-1] == backups.MANIFEST
    assert {"db/mlflow.db", "db/prefect.db", "git.bundle", "tree/params.yaml", "tree/data.dvc"} <= set(names)
    assert {"state/tokens.json", "state/inbox/ab.json"} <= set(names)
    assert sum(name.startswith("objects/") for name in names) == 9  # eight videos and their list
    assert SECRET.encode() not in (out / "b.tar").read_bytes()
    assert os.listdir(out) == ["b.tar"]


def test_a_changed_project_comes_back_as_it_was(project: Project, out: Path, tmp_path: Path) -> None:
    root = project.root

    def git(*arguments: str, where: Path = root) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
        done = subprocess.run(["git", *who, *arguments], cwd=where, check=True, capture_output=True, text=True)
        return done.stdout

    for name in ("tool.sh", "gone.txt", "changed.txt"):
        (root / name).write_text("first")
    (root / "tool.sh").chmod(0o755)
    (root / "link").symlink_to("tool.sh")
    git("add", "-A")
    git("commit", "-qm", "second")
    git("checkout", "-qb", "other")
    git("remote", "add", "origin", "https://example.org/x.git")
    git("remote", "add", "odd", "ext::sh -c true")
    (root / "gone.txt").unlink()
    (root / "changed.txt").write_text("second")
    (root / "new.txt").write_text("new")
    (root / "large.bin").write_bytes(b"\0" * (backups._LARGEST_FILE + 1))
    config = root / ".dvc" / "config.local"
    config.write_text(f"['remote \"own\"']\n    url = {root}/.dvc-remote\n['remote \"nas\"']\n    url = /mnt/nas\n")
    make_video(project.data / "wave" / "later.mp4", seed=77)
    gone = next((project.data / "jump").iterdir())
    gone.unlink()
    data, status = tree(project.data), git("status", "--porcelain")

    done = made(project, out / "b.tar")
    assert any("large.bin" in note for note in done.notes)
    shutil.rmtree(root)
    there = tmp_path / "other machine"
    restored = restore.restore(out / "b.tar", there)

    assert restored.data and any("/mnt/nas" in note for note in restored.notes)
    assert tree(there / "data") == data
    assert not (there / "gone.txt").exists() and (there / "changed.txt").read_text() == "second"
    assert os.access(there / "tool.sh", os.X_OK) and os.readlink(there / "link") == "tool.sh"
    assert git("status", "--porcelain", where=there) == status.replace("?? large.bin\n", "")
    assert git("rev-parse", "--abbrev-ref", "HEAD", where=there) == "other\n"
    assert git("log", "--format=%s", where=there).splitlines() == ["second", "A Sora project"]
    assert git("remote", where=there) == "origin\n"  # one that would run a command is left out
    text = (there / ".dvc" / "config.local").read_text()
    assert "url = ../.dvc-remote" in text and "url = /mnt/nas" in text
    assert str(root) not in "".join(
        f.read_text(errors="replace") for f in (there / ".dvc").rglob("*") if f.is_file() and "cache" not in f.parts
    )
    for place, mode in ((there / ".sora", 0o700), (there / ".sora" / "tokens.json", 0o600)):
        assert stat.S_IMODE(place.stat().st_mode) == mode
    with sqlite3.connect(there / ".sora" / "prefect" / "prefect.db") as database:
        assert database.execute("SELECT sum(amount) FROM account").fetchone() == (100,)


def test_prepared_clips_come_back_and_dvc_is_content(prepared_project: Project, out: Path, tmp_path: Path) -> None:
    fill(prepared_project)
    made(prepared_project, out / "b.tar")
    prepared = tree(prepared_project.prepared)
    shutil.rmtree(prepared_project.root)
    restore.restore(out / "b.tar", tmp_path / "there")
    there = Project(tmp_path / "there")
    assert tree(there.prepared) == prepared
    assert version.status(there) == {}


def test_databases_are_whole_while_they_are_written(project: Project, out: Path) -> None:
    """Money moves between two rows in each transaction: any moment holds 100."""
    stop, moved = threading.Event(), [0]

    def move(name: str) -> None:
        database = sqlite3.connect(project.state / name / f"{name}.db", timeout=30)
        while not stop.is_set():
            with database:
                database.execute("UPDATE account SET amount = amount - 1 WHERE id = 1")
                database.execute("UPDATE account SET amount = amount + 1 WHERE id = 2")
                database.execute("INSERT INTO account VALUES (3, 0)")
            moved[0] += 1
        database.close()

    threads = [threading.Thread(target=move, args=(name,)) for name in backups.DATABASES]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            for name in backups.DATABASES:
                with backups.snapshot(project.state / name / f"{name}.db", out) as copy:
                    target = out / f"{number}.db"
                    target.write_bytes(copy.read())
                database = sqlite3.connect(target)
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert database.execute("SELECT sum(amount) FROM account").fetchone() == (100,)
                database.close()
                for file in out.iterdir():
                    file.unlink()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert moved[0] > 20


def test_what_is_registered_meanwhile(project: Project, out: Path, tmp_path: Path) -> None:
    """Databases first: a version that comes later has its model in the backup, and is not named by its database."""
    registry = Versions(project)
    model = project.state / "mlflow" / "artifacts" / "1" / "later.keras"

    def versions() -> list[ModelVersion]:
        model.write_bytes(b"later")
        with sqlite3.connect(project.state / "mlflow" / "mlflow.db") as database:
            database.execute("INSERT INTO account VALUES (9, 9)")
        return []

    registry.versions = versions  # type: ignore[method-assign]
    backup(project, registry, out / "b.tar")
    restore.restore(out / "b.tar", tmp_path / "there")
    there = tmp_path / "there" / ".sora" / "mlflow"
    assert (there / "artifacts" / "1" / "later.keras").read_bytes() == b"later"
    with sqlite3.connect(there / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM account WHERE id = 9").fetchone() == (0,)


def test_damage_in_the_project_is_named(project: Project, out: Path) -> None:
    cache = project.root / ".dvc" / "cache" / "files" / "md5"
    video = next(file for file in sorted(cache.glob("*/*")) if file.suffix != ".dir")
    video.chmod(0o644)
    video.write_bytes(b"noise")
    registry = Versions(project)
    registry.found = {1: "0" * 64}
    done = backup(project, registry, out / "b.tar")
    assert len(done.damaged) == 2 and any("version 1" in one for one in done.damaged)
    assert any(video.parent.name + video.name in one for one in done.damaged)
    check = next(check for check in doctor(project)["checks"] if check["name"] == "backup")
    assert not check["ok"] and "version 1" in check["detail"]


def test_a_damaged_database_or_lock_file_stops_it(project: Project, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "_STEADY_SECONDS", 0.2)
    text = project.data_dvc.read_text()
    project.data_dvc.write_text("outs: [")
    registry = Versions.__new__(Versions)
    registry.state, registry.found = {}, {}
    with pytest.raises(InputError, match=r"data\.dvc is damaged"):
        backup(project, registry, out / "b.tar")
    project.data_dvc.write_text(text)
    file = project.state / "mlflow" / "mlflow.db"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ServiceError, match=r"mlflow\.db can't be copied"):
        backup(project, registry, out / "b.tar")
    assert os.listdir(out) == []


def test_without_data(project: Project, out: Path, tmp_path: Path) -> None:
    done = made(project, out / "b.tar", data=False)
    assert done.needs_remote == (1,) and any("data/" in line for line in backups.describe(done))
    restored = restore.restore(out / "b.tar", tmp_path / "there")
    assert not restored.data and any("dvc pull" in note for note in restored.notes)
    assert not (tmp_path / "there" / "data").exists()  # half a data/ would become a data version


def test_an_object_that_is_missing(project: Project, out: Path, tmp_path: Path) -> None:
    cache = project.root / ".dvc" / "cache" / "files" / "md5"
    next(file for file in sorted(cache.glob("*/*")) if file.suffix != ".dir").unlink()
    shutil.rmtree(project.data)
    done = made(project, out / "b.tar")
    assert done.needs_remote == (1,) and any("not in DVC's cache" in note for note in done.notes)
    restored = restore.restore(out / "b.tar", tmp_path / "there")
    assert not restored.data and not (tmp_path / "there" / "data").exists()


def test_where_it_may_not_go(project: Project, out: Path) -> None:
    (out / "there.tar").write_text("mine")
    for target, said in (
        (project.root / "b.tar", "lies in the project"),
        (out / "there.tar", "there already"),
        (out / "none" / "b.tar", "no folder"),
    ):
        with pytest.raises(InputError, match=said):
            made(project, target)
    assert (out / "there.tar").read_text() == "mine"


def test_a_backup_and_gc_do_not_cross(project: Project, out: Path) -> None:
    with backup_lock(project):
        with pytest.raises(RunActive, match="backup"):
            gc.collect(project, Versions(project))
        with pytest.raises(RunActive):
            made(project, out / "b.tar")
    assert os.listdir(out) == []


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_killed_one_leaves_nothing(project: Project, out: Path, unnamed: bool) -> None:
    """`unnamed`: the file system can make files without a name; where it can't, the next backup sweeps."""
    code = f"""
import os, time, errno
from pathlib import Path
from sora.operations import backup
from sora.config import Project
from tests.operations.test_backup import Versions
if not {unnamed}:
    real = os.open
    def named(path, flags, *rest, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, *rest, **more)
    os.open = named
def progress(done, total, note=""):
    print("working", flush=True)
    time.sleep(60)
project = Project(Path({str(project.root)!r}))
backup.backup(project, Versions(project), Path({str(out / "b.tar")!r}), progress=progress)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "working\n"
        child.send_signal(signal.SIGKILL)
    left = os.listdir(out)
    assert left == [] if unnamed else len(left) == 1
    made(project, out / "b.tar")
    assert os.listdir(out) == ["b.tar"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("a small disk can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_says_so(project: Project, small_disk: Path, out: Path) -> None:
    (project.state / "mlflow" / "artifacts" / "large").write_bytes(os.urandom(300_000))
    with pytest.raises(DiskFull) as error:
        made(project, small_disk / "b.tar")
    assert str(small_disk) in error.value.fix
    assert os.listdir(small_disk) == []
    made(project, out / "b.tar")
    with pytest.raises(DiskFull, match="free"):
        restore.restore(out / "b.tar", small_disk / "there")
    assert os.listdir(small_disk) == []


# --- files that are not what they should be -------------------------------------------------------------------------


@pytest.fixture
def good(project: Project, out: Path) -> Path:
    made(project, out / "b.tar")
    return out / "b.tar"


def refuses(file: Path, tmp_path: Path, said: str) -> None:
    before = tree(tmp_path)
    with pytest.raises(InputError, match=said):
        restore.restore(file, tmp_path / "there")
    assert tree(tmp_path) == before and not (tmp_path / "there").exists()
    (tmp_path / "empty").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=said):
        restore.restore(file, tmp_path / "empty")
    assert os.listdir(tmp_path / "empty") == []


def test_torn_altered_and_foreign_files(good: Path, tmp_path: Path) -> None:
    body = good.read_bytes()
    bad = good.with_name("bad.tar")
    for share in (0.02, 0.3, 0.6, 0.9):
        bad.write_bytes(body[: int(len(body) * share)])
        refuses(bad, tmp_path, "torn|no backup")
    with tarfile.open(good) as tar:
        infos = tar.getmembers()
    for name in ("db/mlflow.db", "git.bundle", "tree/params.yaml", infos[-2].name):
        info = next(info for info in infos if info.name == name)
        place = info.offset_data + info.size // 2
        bad.write_bytes(body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        refuses(bad, tmp_path, "altered")
    for foreign in (b"", b"text", b"\0" * 4096, Path(__file__).read_bytes()):
        bad.write_bytes(foreign)
        refuses(bad, tmp_path, "no backup")
    with tarfile.open(bad, "w") as tar:
        tar.add(__file__, "x.py")
    refuses(bad, tmp_path, "no backup")
    refuses(good.with_name("absent.tar"), tmp_path, "can't read")


def rebuilt(good: Path, change: Callable[[dict[str, tuple[tarfile.TarInfo, bytes]], dict[str, Any]], None]) -> Path:
    """A backup with a manifest that fits, after `change` did something to its members."""
    with tarfile.open(good) as tar:
        members = {info.name: (info, tar.extractfile(info).read()) for info in tar}  # type: ignore[union-attr]
    manifest = json.loads(members.pop(backups.MANIFEST)[1])
    change(members, manifest)
    bad = good.with_name("bad.tar")
    with tarfile.open(bad, "w") as tar:
        for info, body in members.values():
            tar.addfile(info, io.BytesIO(body))
        told = json.dumps(manifest).encode()
        info = tarfile.TarInfo(backups.MANIFEST)
        info.size = len(told)
        tar.addfile(info, io.BytesIO(told))
    return bad


def member(name: str, body: bytes = b"evil", kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
    def change(members: dict[str, tuple[tarfile.TarInfo, bytes]], manifest: dict[str, Any]) -> None:
        import hashlib

        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, len(body) if kind == tarfile.REGTYPE else 0
        members[f"{name} of ours"] = (info, body)
        manifest["members"][name] = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}

    return change


@pytest.mark.parametrize(
    "change",
    [
        member("/etc/evil"),
        member("tree/../../evil"),
        member("tree/.git/hooks/post-checkout"),
        member("tree/.sora/evil"),
        member("tree/prepared/evil"),
        member("state/server-auth"),
        member("objects/ab/evil"),
        member("db/evil.db"),
        member("tree/"),
        member("tree/./evil"),
        member("evil"),
        member("tree/params.yaml"),  # twice
        member("tree/evil", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("tree/evil", kind=tarfile.LNKTYPE, link="tree/params.yaml"),
        member("tree/evil", kind=tarfile.CHRTYPE),
        member("tree/evil", kind=tarfile.FIFOTYPE),
        member("tree/evil", kind=tarfile.DIRTYPE),
        member("tree/params.yaml/evil"),
        lambda members, manifest: manifest["members"].popitem(),
        lambda members, manifest: members.popitem(),
        lambda members, manifest: manifest["members"]["tree/params.yaml"].update(size=1 << 60),
        lambda members, manifest: manifest.update(branch="--upload-pack=evil"),
        lambda members, manifest: manifest.update(more=1),
    ],
)
def test_members_that_have_no_place(good: Path, tmp_path: Path, change: Any) -> None:
    refuses(rebuilt(good, change), tmp_path, "altered|torn")


def test_a_newer_format(good: Path, tmp_path: Path) -> None:
    def newer(members: dict[str, tuple[tarfile.TarInfo, bytes]], manifest: dict[str, Any]) -> None:
        body = json.dumps({"kind": "sora backup", "format": 2}).encode()
        info = members[backups.HEAD][0]
        info.size = len(body)
        members[backups.HEAD] = (info, body)

    refuses(rebuilt(good, newer), tmp_path, "format 2")


def test_a_header_that_asks_for_gigabytes(good: Path, tmp_path: Path) -> None:
    bad = good.with_name("bad.tar")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 34
    with bad.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 20)
    refuses(bad, tmp_path, "no backup")


@pytest.mark.parametrize("name", ["data", ".sora", ".dvc", "params.yaml"])
def test_a_link_in_git_leads_nowhere(project: Project, out: Path, tmp_path: Path, name: str) -> None:
    """A commit may hold a link at any name; nothing may be written through it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    blob = subprocess.run(
        ["git", "hash-object", "-w", "--stdin"],
        input=str(outside),
        cwd=project.root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    tree_text = f"120000 blob {blob}\t{name}\n"
    made_tree = subprocess.run(
        ["git", "mktree"], input=tree_text, cwd=project.root, capture_output=True, text=True, check=True
    ).stdout.strip()
    who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    commit = subprocess.run(
        ["git", *who, "commit-tree", made_tree, "-m", "evil"],
        cwd=project.root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run(["git", "update-ref", "refs/heads/main", commit], cwd=project.root, check=True)
    made(project, out / "b.tar")
    refuses(out / "b.tar", tmp_path, "has a link")
    assert os.listdir(outside) == []


def test_folders_that_can_not_take_it(good: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        restore.restore(good, full)
    with pytest.raises(InputError, match="is a file"):
        restore.restore(good, full / "mine")
    with pytest.raises(InputError, match="no folder"):
        restore.restore(good, tmp_path / "none" / "there")
    (tmp_path / "killed" / restore._WORK).mkdir(parents=True)
    with pytest.raises(InputError, match="killed"):
        restore.restore(good, tmp_path / "killed")
    assert tree(full) == {"mine": b"mine"}


# --- every night ----------------------------------------------------------------------------------------------------


def nightly_settings(project: Project, **changes: Any) -> None:
    value = yaml.safe_load(project.params_file.read_text())
    value["backup"] = changes
    project.params_file.write_text(yaml.safe_dump(value))


def test_old_ones_go_when_the_new_one_is_complete(project: Project, out: Path) -> None:
    nightly_settings(project, keep=2, folder=str(out))
    registry = Versions(project)
    first = Path(backups.nightly(project, project.settings(), registry).file)
    prefix = first.name[: -len("20260101T000000Z.tar")]
    for stamp in ("20200101T000000Z", "20200102T000000Z"):
        (out / f"{prefix}{stamp}.tar").write_bytes(b"old")
    (out / "other-12345678-20200101T000000Z.tar").write_bytes(b"another project's")
    (out / "mine.txt").write_bytes(b"mine")
    first.rename(out / f"{prefix}20200103T000000Z.tar")
    second = Path(backups.nightly(project, project.settings(), registry).file)
    names = set(os.listdir(out))
    assert names == {
        second.name,
        f"{prefix}20200103T000000Z.tar",
        "mine.txt",
        "other-12345678-20200101T000000Z.tar",
    }

    file = project.state / "mlflow" / "mlflow.db"
    file.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(ServiceError):
        backups.nightly(project, project.settings(), registry)
    assert set(os.listdir(out)) == names


def test_a_failed_one_is_told_and_fails_nothing_else(
    project: Project, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import alerts, nightly
    from sora.operations import servers as services

    nightly_settings(project, keep=1, folder=str(out / "not mounted"))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(alerts, "send", lambda webhook, event: told.append(event))
    monkeypatch.setattr(nightly, "_write_backup", nightly._write_backup.fn)  # a flow gives it its run
    monkeypatch.setattr(services, "mlflow_address", lambda project: "http://127.0.0.1:9")
    nightly._back_up(project)
    assert [event["event"] for event in told] == ["backup_failed"] and "not mounted" in told[0]["reason"]
    check = next(check for check in doctor(project)["checks"] if check["name"] == "backup")
    assert not check["ok"] and "not mounted" in check["detail"]
    assert not (out / "not mounted").exists()
    made(project, out / "b.tar")  # a good one by hand ends it
    check = next(check for check in doctor(project)["checks"] if check["name"] == "backup")
    assert check["ok"] and "0 h old" in check["detail"] and str(out / "b.tar") in check["detail"]


def test_doctor_knows_the_age(project: Project, out: Path) -> None:
    def check() -> dict[str, Any]:
        return next(check for check in doctor(project)["checks"] if check["name"] == "backup")

    assert check()["ok"] and "none was made" in check()["detail"]
    nightly_settings(project, keep=1, folder=str(out))
    assert check()["ok"] and "makes the first" in check()["detail"]
    backups._record(project, backups.Last(datetime.now(UTC) - timedelta(days=3), "b.tar"))
    assert not check()["ok"] and "3 days old" in check()["detail"]
    backups._record(project, backups.Last(datetime.now(UTC), "b.tar"))
    assert check()["ok"] and "own disk" in check()["detail"]


def test_the_setting() -> None:
    from sora.config.settings import NOT_OF_LEARNING

    with pytest.raises(SettingsError, match=r"backup\.folder"):
        parse("backup: {keep: 3}")
    assert parse("").backup.keep == 0 and parse("backup: {keep: 3, folder: /mnt/x}").backup.folder == "/mnt/x"
    assert "backup" in NOT_OF_LEARNING  # it makes no model another one
