from __future__ import annotations

import cv2
import numpy as np
import pytest

from sora.media.video.strip import MOST_FRAMES, TILE, chosen_frames, strip


def _decoded(png: bytes) -> np.ndarray:
    stored = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert stored is not None
    return cv2.cvtColor(stored, cv2.COLOR_BGRA2RGBA)


def test_the_heaviest_frame_of_each_part_is_shown() -> None:
    weights = np.zeros(32)
    weights[[1, 6, 31]] = 1
    assert chosen_frames(weights) == [1, 6, 8, 12, 16, 20, 24, 31]
    assert chosen_frames(np.ones(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    "shape", [(1, 16, 16, 3), (16, 112, 112, 3), (12, 64, 96, 3), (256, 32, 8, 3), (4, 512, 16, 3)]
)
def test_a_strip_is_bounded_whatever_the_clip(shape: tuple[int, ...]) -> None:
    clip = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    png, frames = strip(clip, np.zeros((shape[0], 4, 4)), np.zeros(shape[0]))
    picture = _decoded(png)
    assert len(frames) == min(MOST_FRAMES, shape[0]) and picture.shape[2] == 4
    assert picture.shape[0] <= 2 * TILE + 8 and picture.shape[1] <= MOST_FRAMES * (TILE + 4)
    assert len(png) < 1_000_000


def test_heat_shows_where_it_is_and_only_there() -> None:
    clip = np.full((2, 32, 32, 3), 90, np.uint8)
    heat = np.zeros((2, 8, 8))
    heat[1, 2, 6] = 3.0
    picture = _decoded(strip(clip, heat, np.array([0.0, 1.0]))[0]).astype(int)
    tile, second = picture[TILE : 2 * TILE], slice(TILE + 4, 2 * TILE + 4)
    assert (picture[:TILE, :TILE, :3] == 90).all() and (tile[:, :TILE, :3] == 90).all()
    difference = np.abs(tile[:, second, :3] - 90).sum(axis=-1)
    assert np.unravel_index(difference.argmax(), difference.shape)[0] // 16 == 2
    assert difference[:, : TILE // 2].max() == 0 and difference[100:].max() == 0
    bars = picture[2 * TILE :]
    assert (bars[:, :TILE, :3] == 128).all() and (bars[:, second, 0] == 252).all()
