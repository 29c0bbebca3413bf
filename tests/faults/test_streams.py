"""A video with 2,000 streams: `sora check` answers in bounded time and memory, and says what is wrong with it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.videos import make_video

SECONDS = 120.0  # on a machine that is busy; three seconds on a quiet one
BYTES = 8 << 30  # of address space


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, whole box) of each MP4 box in a row."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at : at + size]))
        at += size
    return found


def many_streams(path: Path, streams: int) -> Path:
    """A video whose only track is announced `streams` times. PyAV itself can't write more than a thousand."""
    one = boxes(make_video(path).read_bytes())
    assert one[-1][0] == b"moov", "the index must come last, or the frames' places would be wrong"
    inner = boxes(one[-1][1][8:])
    body = b"".join(box * (streams if kind == b"trak" else 1) for kind, box in inner)
    moov = (len(body) + 8).to_bytes(4, "big") + b"moov" + body
    path.write_bytes(b"".join(box for _, box in one[:-1]) + moov)
    return path


@pytest.mark.timeout(300)
def test_check_of_two_thousand_streams(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for label in ("jump", "wave"):
        for number in range(2):
            make_video(data / label / f"g{number}.mp4", seed=number + 10 * (label == "wave"))
    many_streams(data / "jump" / "streams.mp4", 2000)
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
