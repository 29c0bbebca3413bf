"""What a killed server leaves is swept by the next; what a live one uses never is."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from sora.serving.source import ModelCache
from sora.serving.workplace import PREFIX, sweep, workplace
from tests.serving.standing import standing
from tests.videos import make_video


def folders(place: Path) -> list[Path]:
    return sorted(place.glob(f"{PREFIX}*"))


def test_sigkill_during_a_prediction_leaves_nothing_after_the_next_start(models, tmp_path):
    models[0].promote(ModelCache(tmp_path / "registry"))
    long = make_video(tmp_path / "long.mp4", frames=3000, size=(320, 240))
    place = tmp_path / "tmp"
    with standing(tmp_path, poll_seconds=0.1) as live:  # another server with the same temporary folder
        live.until_ready()
        (used,) = folders(place)
        assert stat.S_IMODE(used.stat().st_mode) == 0o700
        with standing(tmp_path, poll_seconds=0.1) as killed:
            killed.until_ready()
            (own,) = set(folders(place)) - {used}
            asked = threading.Thread(target=lambda: _ask(killed, long), daemon=True)
            asked.start()
            killed.until(lambda: list(own.glob("*.upload")), 30)
            killed.process.send_signal(signal.SIGKILL)
            killed.process.wait(10)
            asked.join(30)
            assert list(own.glob("*.upload"))  # the fault: nobody was left to remove it
        with standing(tmp_path, poll_seconds=0.1) as new:
            new.until(lambda: new.client.get("/healthz").status_code == 200)
            assert not own.exists() and used.exists() and len(folders(place)) == 2
            assert live.send(long).status_code == 200  # its folder still works
    assert not folders(place)


def _ask(server, video: Path) -> None:
    with suppress(httpx.HTTPError):
        server.send(video)


def test_a_live_folder_stays_whatever_its_process_number_says(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with workplace() as used:
        (used / "a.upload").write_bytes(b"x")
        assert sweep(tmp_path) == [] and used.exists()
    assert not used.exists()


def test_other_users_folders_links_and_strange_names_stay(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}file").write_text("x")
    (tmp_path / "sora-other").mkdir()
    dead = tmp_path / f"{PREFIX}dead"
    dead.mkdir(mode=0o700)
    (dead / "link").symlink_to(elsewhere)
    if os.geteuid() == 0:
        other = tmp_path / f"{PREFIX}other"
        other.mkdir()
        os.chown(other, 12345, 12345)
    assert sweep(tmp_path) == [dead] and not dead.exists()
    assert (elsewhere / "kept").exists() and (tmp_path / f"{PREFIX}link").is_symlink()
    assert (tmp_path / f"{PREFIX}file").exists() and (tmp_path / "sora-other").exists()
    assert os.geteuid() != 0 or (tmp_path / f"{PREFIX}other").exists()


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock, met = fcntl.flock, []

    def meet(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not met:
            met.append(sweep(tmp_path))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", meet)
    with workplace() as used:
        assert len(met[0]) == 1 and used != met[0][0] and folders(tmp_path) == [used]


@pytest.mark.parametrize("count", [8])
def test_servers_that_start_at_once_sweep_none_of_the_others(tmp_path, count):
    code = (
        "import sys\nfrom sora.serving.workplace import workplace\n"
        "with workplace() as f:\n (f / 'x').write_text('x'); print(f, flush=True); sys.stdin.read()\n"
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


def test_a_killed_process_loses_its_folder_to_the_next_sweep(tmp_path):
    """The lock ends with the process, however it ends, also while a child of it lives on."""
    code = (
        "import subprocess, sys\nfrom sora.serving.workplace import workplace\n"
        "with workplace() as f:\n (f / 'x.upload').write_text('x')\n"
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
