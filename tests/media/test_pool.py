from __future__ import annotations

import json
import logging
import os
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sora.config import Settings
from sora.core.errors import DiskFull, ServiceError, VideoError
from sora.core.records import ClipSpec
from sora.core.tensors import Clips
from sora.media import pool
from sora.media.video.transform import prepare_clips
from tests.videos import make_video

BOUNDS = pool.Bounds.of_data(Settings().validate_)
SPEC = ClipSpec(frames=4, height=32, width=32)


def facts(paths: Iterable[Path], bounds: pool.Bounds = BOUNDS, **options: Any) -> list[tuple[Path, Any]]:
    return [
        (job.path, answer)
        for job, answer in pool.each((pool.Job(None, p) for p in paths), bounds, clips=False, **options)
    ]


def decoders() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has just ended: no decoder any more
            if "sora.media.decoder" in child.cmdline():
                found.append(child)
    return found


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    return [make_video(tmp_path / f"{n}.mp4", frames=12 + n, seed=n) for n in range(5)]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14,400 frames: seconds of work, even on a fast machine. A raw stream, so that copies of it can be joined."""
    file = make_video(tmp_path_factory.mktemp("long") / "v.h264", frames=600, size=(640, 480))
    file.write_bytes(file.read_bytes() * 24)
    return file


def test_every_file_once(videos: list[Path]) -> None:
    found = facts(videos, workers=2)
    assert {path: answer.header["facts"]["frames"] for path, answer in found} == {
        path: 12 + n for n, path in enumerate(videos)
    }


def test_clips_are_those_of_decoding_here_in_the_order_asked_for(videos: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "no.mp4"
    text.write_text("no video")
    found = list(pool.in_order([videos[3], text, videos[1]], SPEC, BOUNDS))
    assert isinstance(found[0], Clips) and isinstance(found[2], Clips)
    assert np.array_equal(found[0].video, prepare_clips(videos[3], SPEC))
    assert isinstance(found[1], VideoError) and found[1].rule == "not_a_video"
    assert np.array_equal(found[2].video, prepare_clips(videos[1], SPEC))


def test_nothing_starts_no_process() -> None:
    assert facts([], workers=2) == []


def test_what_is_no_plain_file_is_never_handed_over(videos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(videos[0])
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ("link.mp4", "pipe.mp4", "gone.mp4", "0.mp4")
    found = dict(facts([tmp_path / name for name in names], workers=1))
    rules = [getattr(found[tmp_path / name], "rule", None) for name in names]
    assert rules == ["unreadable", "not_a_video", "unreadable", None]


def test_too_much_processor_time_is_too_slow_and_costs_one_file(videos: list[Path], long_video: Path) -> None:
    found = dict(facts([videos[0], long_video, videos[1]], replace(BOUNDS, cpu_seconds=0.1), workers=1))
    assert found[long_video].rule == "too_slow" and "processor time" in found[long_video].message
    assert found[videos[0]].header["facts"]["frames"] == 12 and found[videos[1]].header["facts"]["frames"] == 13


def test_too_much_time_by_the_clock_is_too_slow(videos: list[Path], long_video: Path) -> None:
    """A decoder that waits spends no processor time: stopped, it is ended all the same."""
    done = threading.Event()

    def stop_it() -> None:
        while not done.wait(0.01):
            for child in decoders():
                if any(long_video.name in name for name in _open_files(child)):
                    with suppress(psutil.NoSuchProcess):  # it was ended for its time
                        child.suspend()

    stopper = threading.Thread(target=stop_it)
    stopper.start()
    try:
        began = time.monotonic()
        found = dict(facts([long_video, videos[0]], replace(BOUNDS, seconds=3), workers=1))
    finally:
        done.set()
        stopper.join()
    assert found[long_video].rule == "too_slow" and time.monotonic() - began < 60
    assert found[videos[0]].header["facts"]["frames"] == 12


def _open_files(process: psutil.Process) -> list[str]:
    try:
        return [os.readlink(f"/proc/{process.pid}/fd/{one}") for one in os.listdir(f"/proc/{process.pid}/fd")]
    except OSError:
        return []


def test_too_little_memory_is_too_large(videos: list[Path]) -> None:
    huge = replace(SPEC, frames=256, height=1024, width=1024)  # 805 MB of clips
    (found,) = pool.in_order([videos[0]], huge, replace(BOUNDS, memory=700_000_000))
    assert isinstance(found, VideoError)
    assert found.rule == "too_large" and "700,000,000 bytes" in found.message


def test_a_decoder_that_cannot_start_is_an_error(videos: list[Path]) -> None:
    with pytest.raises(ServiceError, match="before it was ready"):
        facts(videos, replace(BOUNDS, memory=60_000_000))


def test_a_decoder_has_no_secrets_and_no_other_file(
    videos: list[Path], long_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORA_API_TOKEN", "a-long-enough-token")
    jobs = (pool.Job(None, path) for path in [videos[0], long_video])
    with closing(pool.each(jobs, BOUNDS, clips=False, workers=1)) as answers:
        next(answers)
        (child,) = decoders()
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
        status = Path(f"/proc/{child.pid}/status").read_text()
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        files = _open_files(child)
    assert b"SORA_API_TOKEN" not in environment and b"PATH=" in environment
    assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
    assert all(f"{name}  " in limits for name in ("Max core file size", "Max file size"))
    kinds = {name.split(":")[0] for name in files}
    assert kinds <= {"/dev/null", "pipe", "socket", str(videos[0]), str(long_video)}


def test_leaving_ends_the_processes_at_once(videos: list[Path], long_video: Path) -> None:
    start = time.monotonic()
    jobs = (pool.Job(None, path) for path in [videos[0], long_video, long_video])
    with closing(pool.each(jobs, BOUNDS, clips=False, workers=2)) as answers:
        assert next(answers)[0].path == videos[0]
    assert time.monotonic() - start < 30 and decoders() == []


def test_jobs_are_taken_as_needed(videos: list[Path]) -> None:
    taken = []

    def jobs() -> Iterator[pool.Job[int]]:
        for number in range(100):
            taken.append(number)
            yield pool.Job(number, videos[0])

    with closing(pool.each(jobs(), BOUNDS, clips=False, workers=2)) as answers:
        next(answers)
        assert len(taken) < 10


def said(**tensors: object) -> dict[str, object]:
    return {"tensors": tensors, "spans": None, "seconds": 1}


READY = {"ready": True, "lacks": []}
LIES = {
    "a header without end": struct.pack(">I", 2**32 - 1) + b"{",
    "no JSON": struct.pack(">I", 4) + b"\x80abc",
    "a list": [[]],
    "clips without end": [said(video={"dtype": "uint8", "shape": [10**12, 4, 32, 32, 3]})],
    "another shape": [said(video={"dtype": "uint8", "shape": [1, 4, 32, 32, 4]})],
    "a shape of words": [said(video={"dtype": "uint8", "shape": ["1", 4, 32, 32, 3]})],
    "no shape": [said(video={"dtype": "uint8"})],
    "another dtype": [said(video={"dtype": "float32", "shape": [1, 4, 32, 32, 3]})],
    "another tensor": [said(audio={"dtype": "uint8", "shape": [1, 4, 32, 32, 3]})],
    "one tensor more": [said(video={"dtype": "uint8", "shape": [1, 4, 32, 32, 3]}, audio={})],
    "no tensors": [said()],
    "half an error": [{"rule": "too_large"}],
    "nothing": [],
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_decoder_says_is_not_believed(lie: str, videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a stranger's file had taken the decoder over: an error of that file, and no memory for its claims."""
    told = LIES[lie]
    if isinstance(told, list):
        told = b"".join(struct.pack(">I", len(text)) + text for text in (json.dumps(one).encode() for one in told))
    start = b"".join(struct.pack(">I", len(t)) + t for t in (json.dumps(o).encode() for o in (READY, {"taken": True})))
    code = f"import os\nos.write(1, {start!r})\nos.read(0, 65536)\nos.write(1, {told!r})"
    monkeypatch.setattr(pool, "command", lambda *_: [sys.executable, "-c", code])
    (found,) = pool.in_order(videos[:1], SPEC, BOUNDS)
    assert isinstance(found, VideoError) and found.rule in ("unreadable", "too_slow")


def test_what_the_kernel_lacks_is_said_once(
    videos: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool._say_lacking.cache_clear()
    with caplog.at_level(logging.WARNING, "sora"):
        for _ in range(3):
            pool.check_ready({"ready": True, "lacks": ["Landlock (none)"]})
    assert [record.getMessage() for record in caplog.records] == [
        "decoders are only partly confined: this machine lacks Landlock (none); see `sora doctor`"
    ]
    pool._say_lacking.cache_clear()


def test_disk_full_is_its_own_error(tmp_path: Path) -> None:
    import errno

    from sora.core.files import atomic

    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(DiskFull), atomic(target) as file:
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
