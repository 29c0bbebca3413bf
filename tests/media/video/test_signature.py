from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from sora.media.video.ffmpeg import inspect
from sora.media.video.signature import KEPT, Reservoir, grid
from tests.videos import make_video


def differ(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def encode_again(source: Path, target: Path, *, scale: float = 1.0, crf: int = 34) -> Path:
    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream("libx264", rate=stream.average_rate, options={"crf": str(crf)})
        copy.width, copy.height = (int(side * scale) // 2 * 2 for side in (stream.width, stream.height))
        copy.pix_fmt = "yuv420p"
        for frame in container.decode(stream):
            out.mux(copy.encode(frame.reformat(copy.width, copy.height, "yuv420p")))
        out.mux(copy.encode())
    return target


def test_grid_holds_means() -> None:
    luma = np.zeros((80, 90), np.uint8)
    luma[:10, 10:20] = 200
    cells = grid(luma)
    assert cells.shape == (8, 9)
    assert cells[0, 1] == 200 * 16 and cells.sum() == 200 * 16


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (1080, 1920), (7, 8)])
def test_grid_of_any_size(shape: tuple[int, int]) -> None:
    assert (grid(np.full(shape, 77, np.uint8)) == 77 * 16).all()


def test_reservoir_is_bounded_and_keeps_its_stride() -> None:
    reservoir = Reservoir()
    for index in range(10_000):
        if reservoir.wants(index):
            reservoir.add(np.full((8, 9), index, np.int32))
        assert len(reservoir.grids) <= KEPT
    assert [int(g[0, 0]) for g in reservoir.grids] == list(range(0, 10_000, reservoir.stride))


def test_a_real_re_encode_stays_close_and_other_videos_do_not(shared: Path, tmp_path: Path) -> None:
    videos = sorted((shared / "fights300" / "fight").glob("*.mp4"))[::40][:3]
    signatures = [inspect(path).signature for path in videos]
    for path, signature in zip(videos, signatures, strict=True):
        assert differ(signature, inspect(encode_again(path, tmp_path / "again.mp4", scale=0.5)).signature) <= 10
    assert min(differ(a, b) for a in signatures for b in signatures if a != b) > 40


def test_flat_and_dark_videos_have_no_signature(tmp_path: Path) -> None:
    path = tmp_path / "flat.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(12):
            picture = np.full((48, 64, 3), 20 + level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert inspect(path).signature == ""


def test_textures_have_one(tmp_path: Path) -> None:
    one, other = (inspect(make_video(tmp_path / f"{seed}.mp4", seed=seed)).signature for seed in (1, 2))
    assert differ(one, other) > 40
