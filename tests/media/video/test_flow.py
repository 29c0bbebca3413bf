"""Optical flow: what is seen of motion, where, and that a mirrored clip gives a mirrored vector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sora.core.records import ClipSpec
from sora.core.tensors import FLOW
from sora.media.video import flow
from sora.media.video.clips import FLOW_LENGTH, windows
from sora.media.video.transform import clips_and_rate
from tests.videos import make_video

SPEC = ClipSpec(frames=4, height=32, width=32, flow=8)


def texture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (24, 32), np.uint8).repeat(4, 0).repeat(4, 1)


def moved(right: int, down: int, moments: int = 8) -> tuple[np.ndarray, np.ndarray]:
    before = np.stack([np.roll(texture(), 5 * moment, 1) for moment in range(moments)])
    return before, np.roll(before, (down, right), (1, 2))


@pytest.mark.parametrize(("right", "down", "direction"), [(3, 0, 0), (0, 3, 2), (-3, 0, 4), (0, -3, 6), (2, 2, 1)])
def test_the_strongest_direction_is_that_of_the_motion(right: int, down: int, direction: int) -> None:
    vector = flow.vector(*moved(right, down))
    assert vector.shape == (FLOW_LENGTH,) and vector.dtype == np.float16 and np.isfinite(vector).all()
    cells = vector[: flow.DOWN * flow.ACROSS * flow.DIRECTIONS].reshape(-1, flow.DIRECTIONS)
    assert (cells.argmax(axis=1) == direction).mean() > 0.8
    # All of the picture moves alike: less its median nothing is left.
    assert vector[flow.COLUMNS["cells"]][cells.size :].max() < 0.5 * cells.max()
    assert vector[flow.COLUMNS["order"]].max() < 0.5 * cells.max()


def test_a_still_clip_has_no_motion() -> None:
    before, _ = moved(0, 0)
    vector = flow.vector(before, before)
    assert max(vector[flow.COLUMNS[name]].max() for name in ("cells", "order")) < 0.1


def test_mirroring_the_vector_is_mirroring_the_clip() -> None:
    before, after = moved(3, 1)
    after[:, :48] = before[:, :48]  # only the lower half moves
    seen = flow.vector(before[:, :, ::-1].copy(), after[:, :, ::-1].copy()).astype(np.float32)
    turned = flow.mirrored(flow.vector(before, after)).astype(np.float32)
    assert np.abs(seen - turned).mean() < 0.15 * np.abs(turned).mean()
    assert np.array_equal(flow.mirrored(turned), flow.vector(before, after).astype(np.float32))  # twice is once


def test_the_order_of_two_motions_is_seen() -> None:
    """A square goes right, then left, before a still room; and the other way round."""
    room = texture()
    places = [20, 24, 28, 32, 32, 28, 24, 20]
    before, after = np.stack([room] * 8), np.stack([room] * 8)
    for moment, (place, step) in enumerate(zip(places, [4] * 4 + [-4] * 4, strict=True)):
        before[moment, 40:60, place : place + 24] = texture()[:20, :24]
        after[moment, 40:60, place + step : place + step + 24] = texture()[:20, :24]
    first, second = flow.vector(before, after), flow.vector(before[::-1].copy(), after[::-1].copy())
    assert np.abs(first - second)[flow.COLUMNS["cells"]].max() < 0.01  # without the order they are alike
    order = first[flow.COLUMNS["order"]].reshape(flow.QUARTERS, -1, flow.DIRECTIONS).sum(axis=1)
    assert order[0, 0] > 2 * order[0, 4] and order[-1, 4] > 2 * order[-1, 0]


def test_a_clip_carries_its_motion(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4", frames=24, fps=12, size=(64, 48))
    clips, frames, _ = clips_and_rate(video, SPEC)
    assert frames == 24 and clips.tensors[FLOW].shape == (1, FLOW_LENGTH)
    known, *_ = clips_and_rate(video, SPEC, known=(24, 12.0))
    for name, tensor in clips.tensors.items():
        assert np.array_equal(tensor, known.tensors[name]), name
    plain, *_ = clips_and_rate(video, ClipSpec(frames=4, height=32, width=32))
    assert np.array_equal(plain.video, clips.video) and list(plain.tensors) == ["video"]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_videos_have_pairs_within_them(frames: int) -> None:
    [window] = windows(frames, 10.0, SPEC)
    assert len(window.pairs) == SPEC.flow
    assert all(0 <= first <= second < frames for first, second in window.pairs)


def test_each_window_measures_its_own_motion() -> None:
    spec = ClipSpec(frames=4, height=32, width=32, flow=3, sampling="window", window_seconds=1.0)
    first, *_, last = windows(40, 10.0, spec)
    assert max(index for pair in first.pairs for index in pair) < 10 <= 30 <= min(i for p in last.pairs for i in p)
