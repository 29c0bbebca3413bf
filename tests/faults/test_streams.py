"""A video with 2,000 streams: `sora check` answers in bounded time and memory, and says what is wrong with it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.videos import make_video

SECONDS = 120.0  # on a machine that is busy; three seconds on a quiet one
BYTES = 8 << 30  # of address space


def many_streams(path: Path, streams: int) -> Path:
    with av.open(str(path), "w", format="mov") as container:
        video = [container.add_stream("mpeg4", rate=5) for _ in range(streams)]
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for stream in video:
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
        for stream in video:
            frame.pts = 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.timeout(300)
def test_check_of_two_thousand_streams(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for label in ("jump", "wave"):
        for number in range(2):
            make_video(data / label / f"g{number}.mp4", seed=number + 10 * (label == "wave"))
    many_streams(data / "jump" / "streams.mov", 2000)
    command = [sys.executable, "-m", "sora.cli", "check", str(data), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES)),
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    report = json.loads(done.stdout)
    # Used by its first stream or quarantined by a rule, but counted: never dropped in silence.
    assert report["videos"] == 5
    rejected = {item["path"]: item for item in report["rejected"]}
    assert report["accepted"] + len(rejected) == 5
    assert "Traceback" not in done.stderr
