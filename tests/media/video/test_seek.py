"""The short ways give the frames of decoding everything in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av import VideoStream
from av.container import InputContainer

from sora.core.errors import VideoError
from sora.media.video import ffmpeg, seek
from sora.media.video.ffmpeg import Picture, inspect, read_chosen
from tests.media.video.test_ffmpeg import VERDICTS

FRAMES = 90
KINDS = {
    "x264": ("a.mp4", "libx264", {"g": "20"}),
    "x264 in matroska": ("a.mkv", "libx264", {"g": "20"}),
    "x264, one key frame": ("a.mp4", "libx264", {}),
    "x264, open groups": ("a.mp4", "libx264", {"x264-params": "keyint=20:open-gop=1:bframes=3:scenecut=0"}),
    "x264, gradual refresh": ("a.mp4", "libx264", {"x264-params": "keyint=20:intra-refresh=1"}),
    "x264, no b-frames": ("a.mov", "libx264", {"g": "20", "bf": "0"}),
    "x265": ("a.mp4", "libx265", {"x265-params": "keyint=20:log-level=none"}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "20", "lag-in-frames": "10", "auto-alt-ref": "1"}),
    "vp8": ("a.webm", "libvpx", {"g": "20", "lag-in-frames": "10", "auto-alt-ref": "1"}),
    "av1": ("a.mp4", "libsvtav1", {"g": "20", "preset": "12"}),
    "mpeg4": ("a.mp4", "mpeg4", {"g": "20", "bf": "2"}),
    "mpeg2": ("a.mov", "mpeg2video", {"g": "20", "bf": "2"}),
    "mjpeg": ("a.mov", "mjpeg", {}),
    "mpeg-ts": ("a.ts", "libx264", {"g": "20"}),
    "avi": ("a.avi", "mpeg4", {"g": "20"}),
}


def encode(path: Path, codec: str, options: dict[str, str]) -> Path:
    """Noise that moves and changes: every frame differs from every other."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (64, 400, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.time_base = Fraction(1, 30)
        for index in range(FRAMES):
            if index % 30 == 29:
                scene = rng.integers(0, 255, scene.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, 3 * index : 3 * index + 96]), "rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(index: int, picture: Picture) -> np.ndarray:
    return picture.rgb(None)


def in_order(path: Path, indices: Collection[int], known: tuple[int, float]) -> dict[int, np.ndarray]:
    return read_chosen(path, lambda *_: indices, shown, known=known, in_order=True)[0]


def same(found: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[i], expected[i]) for i in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_any_frames_are_those_of_decoding_in_order(kind: str, tmp_path: Path) -> None:
    name, codec, options = KINDS[kind]
    try:
        path = encode(tmp_path / name, codec, options)
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg can't encode {codec}")
    known = inspect(path).frames, 30.0
    assert known[0] in (FRAMES, FRAMES - 1)
    whole = in_order(path, range(known[0]), known)
    rng = np.random.default_rng(1)
    last = known[0] - 1
    picks = [{0}, {last}, {0, last}, {19, 20, 21}, {18, 41, 62}, set(range(3, last, 9)), set(range(known[0]))]
    picks += [set(rng.choice(known[0], rng.integers(1, 12), replace=False).tolist()) for _ in range(20)]
    for pick in picks:
        found, *_ = read_chosen(path, lambda *_, pick=pick: pick, shown, known=known)
        assert same(found, {index: whole[index] for index in pick}), (kind, sorted(pick))


def test_it_decodes_less(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", "libx264", {"g": "20", "bf": "3"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        decoded: list[av.VideoFrame] = []
        real = seek.frames(_Counting(container, decoded), stream, {25, 81}, FRAMES)
        assert [index for index, _ in real] == [25, 81]
    assert len(decoded) < 20


class _Counting:
    """A container that notes every frame that comes out of its decoder."""

    def __init__(self, container: InputContainer, decoded: list[av.VideoFrame]) -> None:
        self._container, self._decoded = container, decoded
        self.format, self.seek = container.format, container.seek

    def demux(self, stream: VideoStream) -> Iterator[_Packet]:
        for packet in self._container.demux(stream):
            yield _Packet(packet, self._decoded)


class _Packet:
    def __init__(self, packet: av.Packet[VideoStream], decoded: list[av.VideoFrame]) -> None:
        self._packet, self._decoded = packet, decoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def decode(self) -> list[av.VideoFrame]:
        frames = self._packet.decode()
        self._decoded += frames
        return frames


def test_a_wrong_count_is_not_trusted(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", "libx264", {"g": "20"})
    with av.open(str(path)) as container, pytest.raises(seek.Unsure):
        list(seek.frames(container, container.streams.video[0], {5}, FRAMES + 1))


def test_real_files_give_the_frames_of_decoding_in_order(shared: Path) -> None:
    sure = 0
    for path in sorted((shared / "odd").iterdir()):
        if path.suffix in (".csv", ".md", ".txt") or path.name in VERDICTS:
            continue
        try:
            frames = inspect(path).frames
        except VideoError:
            continue
        known = frames, 25.0
        pick = set(np.linspace(0, frames - 1, 12).astype(int).tolist())
        try:
            found = ffmpeg._sought(path, pick, frames, shown, ffmpeg.Limits())
        except seek.Unsure:
            continue
        sure += 1
        assert same(found, in_order(path, pick, known)), path.name
    assert sure >= 5
