"""Full and read-only disks: every verb says so, and what to do. Row 14 of the review.

A small tmpfs is the project's disk; where mounting is not permitted these tests are skipped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sora.cli.failures import unforeseen, with_disk
from sora.core import files
from sora.core.errors import DiskFull, ReadOnly, ServiceError
from sora.core.files import disk_failure, writing
from tests.e2e.conftest import sora
from tests.videos import make_video


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project on a good disk."""
    folder = tmp_path_factory.mktemp("made")
    for label in ("a", "b"):
        for seed in range(3):
            make_video(folder / "videos" / label / f"{seed}.mp4", seed=seed + 10 * (label == "b"))
    done = sora(folder, "init", str(folder / "project"), "--data", str(folder / "videos"))
    assert done.returncode == 0, done.stderr
    return folder


class Disk:
    """A mounted tmpfs."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @property
    def project(self) -> Path:
        return self.place / "project"

    def fill(self) -> None:
        with (self.place / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(b"\0" * 4096)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    return

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.place], check=True)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    size = getattr(request, "param", "9m")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


VERBS = [
    ("check",),
    ("run",),
    ("predict", "video.mp4"),
    ("models",),
    ("token", "add", "phone"),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_disk_with_nothing_free(made: Path, disk: Disk, verb: tuple[str, ...]) -> None:
    shutil.copytree(made / "project", disk.project)
    disk.fill()
    done = sora(disk.project, *verb)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "no space left" in done.stderr or "is full" in done.stderr, done.stderr
    assert "sora gc" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_read_only_disk(made: Path, disk: Disk, verb: tuple[str, ...]) -> None:
    shutil.copytree(made / "project", disk.project)
    disk.read_only()
    done = sora(disk.project, *verb)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "read-only" in done.stderr and "remount,rw" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["4m", "9m", "13m"], indirect=True)
def test_a_disk_that_fills_while_the_servers_start(made: Path, disk: Disk) -> None:
    shutil.copytree(made / "project", disk.project)
    done = sora(disk.project, "run")
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert ("is full" in done.stderr or "no space left" in done.stderr) and "sora gc" in done.stderr, done.stderr
    assert (disk.project / "data" / "a" / "0.mp4").read_bytes() == (made / "videos" / "a" / "0.mp4").read_bytes()


@pytest.mark.parametrize("disk", ["4m"], indirect=True)
def test_init_on_a_small_and_on_a_read_only_disk(made: Path, disk: Disk) -> None:
    done = sora(disk.place, "init", str(disk.project), "--data", str(made / "videos"))
    assert done.returncode == 3 and "bytes free" in done.stderr and "another disk" in done.stderr
    disk.read_only()
    done = sora(disk.place, "init", str(disk.place / "other"), "--data", str(made / "videos"))
    assert done.returncode == 3 and "read-only" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["120m"], indirect=True)
def test_gc_frees_a_disk_with_nothing_free(made: Path, disk: Disk) -> None:
    shutil.copytree(made / "project", disk.project)
    log = disk.project / ".sora" / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"a" * 90_000_000)
    disk.fill()
    done = sora(disk.project, "gc", "--json")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "freed 89,000,000 bytes" in done.stderr
    assert "prefect.log" in json.loads(done.stdout)["items"][0]["what"] and log.stat().st_size == 1_000_000


def test_gc_keeps_what_it_freed_where_that_is_too_little(made: Path, disk: Disk) -> None:
    shutil.copytree(made / "project", disk.project)
    work = disk.project / ".sora" / "work" / "0123"
    work.mkdir(parents=True)
    (work / "table").write_bytes(b"x" * 100_000)
    for place in (work / "table", work):
        os.utime(place, (0, 0))
    disk.fill()
    done = sora(disk.project, "gc")
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "bytes that no version needs" in done.stderr and not work.exists()
    assert ("is full" in done.stderr or "no space left" in done.stderr) and "Traceback" not in done.stderr


def test_doctor_looks_at_disks_that_others_fail_on(made: Path, disk: Disk) -> None:
    shutil.copytree(made / "project", disk.project)
    disk.fill()
    checks = {one["name"]: one for one in json.loads(sora(disk.project, "doctor", "--json").stdout)["checks"]}
    assert not checks["disk"]["ok"] and "sora gc" in checks["disk"]["fix"]
    disk.read_only()
    checks = {one["name"]: one for one in json.loads(sora(disk.project, "doctor", "--json").stdout)["checks"]}
    assert not checks["writable"]["ok"] and "read-only" in checks["writable"]["fix"]


def test_what_a_failure_says_is_heard_also_where_the_disk_looks_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ROOM", 0)
    for said in (
        "[Errno 28] No space left on device: 'x'",
        "(sqlite3.OperationalError) database or disk is full",
    ):
        assert isinstance(disk_failure(tmp_path / "not" / "there", said), DiskFull)
    assert isinstance(disk_failure(tmp_path, "attempt to write a readonly database"), ReadOnly)
    assert disk_failure(tmp_path, "something else") is None
    project = ["--project", str(tmp_path)]
    assert "sora gc" in with_disk(ServiceError("dvc failed: No space left on device", fix="x"), project)
    assert with_disk(ServiceError("dvc failed", fix="x"), project) == "dvc failed\n  fix: x"
    try:
        try:
            raise sqlite3.OperationalError("database or disk is full")
        except sqlite3.OperationalError as cause:
            raise RuntimeError("the flow failed") from cause
    except RuntimeError as error:
        assert "is full" in unforeseen(error, project) and "sora gc" in unforeseen(error, project)
    with pytest.raises(ReadOnly, match="read-only"), writing(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")
