"""The next server removes the uploads that a killed one left, and never those of a live one."""

from __future__ import annotations

import signal
import stat
import threading
from contextlib import suppress
from pathlib import Path

import httpx

from sora.serving.source import ModelCache
from tests.serving.conftest import Made
from tests.serving.standing import Standing, standing
from tests.videos import make_video


def folders(place: Path) -> list[Path]:
    return sorted(place.glob("sora-tmp-uploads-*"))


def test_sigkill_during_a_prediction_leaves_nothing_after_the_next_start(models: list[Made], tmp_path: Path) -> None:
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


def _ask(server: Standing, video: Path) -> None:
    with suppress(httpx.HTTPError):
        server.send(video)
