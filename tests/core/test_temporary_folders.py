"""What a killed process left in the temporary folder is swept by the next one; what a live one uses never is."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sora.core.errors import ServiceError
from sora.core.files import TEMPORARY, sweep, temporary_folder


def folders(place: Path) -> list[Path]:
    return sorted(place.glob(f"{TEMPORARY}*"))


def test_a_live_folder_stays_whatever_its_process_number_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder("uploads") as used:
        (used / "a.upload").write_bytes(b"x")
        assert sweep(tmp_path) == [] and used.exists()
    assert not used.exists()


def test_other_users_folders_links_and_strange_names_stay(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    (tmp_path / f"{TEMPORARY}link").symlink_to(elsewhere)
    (tmp_path / f"{TEMPORARY}file").write_text("x")
    (tmp_path / "sora-other").mkdir()
    dead = tmp_path / f"{TEMPORARY}dead"
    dead.mkdir(mode=0o700)
    (dead / "link").symlink_to(elsewhere)
    if os.geteuid() == 0:
        other = tmp_path / f"{TEMPORARY}other"
        other.mkdir()
        os.chown(other, 12345, 12345)
    assert sweep(tmp_path) == [dead] and not dead.exists()
    assert (elsewhere / "kept").exists() and (tmp_path / f"{TEMPORARY}link").is_symlink()
    assert (tmp_path / f"{TEMPORARY}file").exists() and (tmp_path / "sora-other").exists()
    assert os.geteuid() != 0 or (tmp_path / f"{TEMPORARY}other").exists()


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock = fcntl.flock
    met: list[list[Path]] = []

    def meet(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not met:
            met.append(sweep(tmp_path))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", meet)
    with temporary_folder("uploads") as used:
        assert len(met[0]) == 1 and used != met[0][0] and folders(tmp_path) == [used]


@pytest.mark.parametrize("count", [8])
def test_servers_that_start_at_once_sweep_none_of_the_others(tmp_path: Path, count: int) -> None:
    code = (
        "import sys\nfrom sora.core.files import temporary_folder\n"
        "with temporary_folder('uploads') as f:\n (f / 'x').write_text('x'); print(f, flush=True); sys.stdin.read()\n"
        " assert (f / 'x').exists()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline()
    assert len(folders(tmp_path)) == count
    for process in processes:
        process.communicate("")
        assert process.returncode == 0
    assert not folders(tmp_path)


def test_a_killed_process_loses_its_folder_to_the_next_sweep(tmp_path: Path) -> None:
    """The lock ends with the process, however it ends, also while a child of it lives on."""
    code = (
        "import subprocess, sys\nfrom sora.core.files import temporary_folder\n"
        "with temporary_folder('uploads') as f:\n (f / 'x.upload').write_text('x')\n"
        " child = subprocess.Popen(['sleep', '60'])\n print(f, child.pid, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    folder, child = process.stdout.readline().split()
    try:
        assert sweep(tmp_path) == []
        process.kill()
        process.wait()
        assert (Path(folder) / "x.upload").exists()
        assert sweep(tmp_path) == [Path(folder)] and not folders(tmp_path)
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_it_says_what_it_removed_and_knows_the_folders_of_an_earlier_sora(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / "sora-uploads-x"
    left.mkdir()
    with caplog.at_level(logging.INFO, "sora.core"):
        assert sweep(tmp_path) == [left] and not left.exists()
    assert f"removed {left}, which a killed process left" in caplog.text


def test_a_temporary_folder_that_can_not_be_written_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(ServiceError, match=r"can't write .*absent"), temporary_folder("uploads"):
        raise AssertionError("it was made")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    with pytest.raises(ServiceError, match="no writable temporary folder") as failed, temporary_folder("uploads"):
        raise AssertionError("it was made")
    assert "TMPDIR" in failed.value.fix
