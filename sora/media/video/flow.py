"""What moves where: a clip's optical flow as one vector of histograms.

Between a frame and the next one, at `moments` moments of a clip: dense inverse search flow (Kroeger et al. 2016, "Fast
Optical Flow using Dense Inverse Search") of the picture at 128x96. Directions are counted, weighted by magnitude, as in
Dalal et al. 2006, "Human Detection Using Oriented Histograms of Flow and Appearance", section 4. Departs: eight
directions shared between neighbours; counted once as it is and once less the median of the picture, which takes the
camera's own motion away; and the square root of every number, so that few fast pixels don't outweigh all others.
"""

from __future__ import annotations

import numpy as np

from sora.media.video.clips import FLOW_LENGTH

WIDTH, HEIGHT = 128, 96  # pixels of the pictures
DIRECTIONS = 8  # the first is to the right, the third down
DOWN, ACROSS = 3, 4  # cells of the picture, over the whole clip
PARTS = 8  # of the clip, over the whole picture
QUARTERS = 4  # of the clip, in cells
_MEASURES = 3  # of each part: share of still pixels, mean and deviation of the magnitude
_STILL = 0.3  # pixels from one frame to the next
_CELLS = DOWN * ACROSS * DIRECTIONS
_ONE = _CELLS + PARTS * (DIRECTIONS + _MEASURES)
LENGTH = 2 * _ONE + QUARTERS * _CELLS  # as it is, less its median, and the latter once more by quarters of the clip
# What can be read of a vector: where something moves, when it moves where, or all.
COLUMNS: dict[str, np.ndarray] = {
    "cells": np.concatenate([np.arange(_CELLS), _ONE + np.arange(_CELLS)]),
    "order": np.arange(2 * _ONE, LENGTH),
    "all": np.arange(LENGTH),
}
assert LENGTH == FLOW_LENGTH


def vector(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The motion of a clip.

    Input shape: two of `(moments, HEIGHT, WIDTH) uint8`, luma: at each moment a frame and the next one.
    Output shape: `(LENGTH,) float16`.
    """
    import cv2  # here: what only mirrors vectors does without it

    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    start = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    flow = np.stack([search.calc(a, b, start.copy()) for a, b in zip(before, after, strict=True)])
    # Not np.median: it imports a module at its first call, which a confined decoder can't.
    middle = np.partition(flow.reshape(len(flow), -1, 2), HEIGHT * WIDTH // 2, axis=1)[:, HEIGHT * WIDTH // 2]
    steady = flow - middle[:, None, None]
    (as_it_is, _), (less_camera, quarters) = _histograms(flow), _histograms(steady)
    return np.concatenate([as_it_is, less_camera, quarters]).astype(np.float16)


def mirrored(vectors: np.ndarray) -> np.ndarray:
    """What `vector` gives for the clips' mirror images (left and right), of vectors `(…, LENGTH)`."""
    result: np.ndarray = vectors[..., _MIRROR]
    return result


def _histograms(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `(moments, HEIGHT, WIDTH, 2) float32`, in pixels: `(_ONE,)` and `(QUARTERS * _CELLS,) float32`."""
    moments = len(flow)
    right, down = flow[..., 0], flow[..., 1]
    size = np.hypot(right, down)
    turn = np.arctan2(down, right) * (DIRECTIONS / (2 * np.pi))
    low = np.floor(turn)
    share = turn - low
    direction = low.astype(np.int64) % DIRECTIONS
    row = np.arange(HEIGHT) * DOWN // HEIGHT
    column = np.arange(WIDTH) * ACROSS // WIDTH
    part = np.arange(moments) * PARTS // moments
    place = (part[:, None, None] * DOWN + row[:, None]) * ACROSS + column
    count = PARTS * DOWN * ACROSS * DIRECTIONS
    histogram = sum(
        np.bincount(
            (place * DIRECTIONS + (direction + step) % DIRECTIONS).ravel(), (size * weight).ravel(), minlength=count
        )
        for step, weight in ((0, 1 - share), (1, share))
    )
    by_part = np.asarray(histogram).reshape(PARTS, DOWN * ACROSS, DIRECTIONS)
    lengths = np.maximum(np.bincount(part, minlength=PARTS), 1)[:, None]  # fewer moments than parts leave some empty
    cells = by_part.sum(0) * (DOWN * ACROSS / (moments * HEIGHT * WIDTH))
    whole = by_part.sum(1) / (lengths * HEIGHT * WIDTH)
    measures = np.stack([_of_parts(one, part) for one in ((size < _STILL).mean((1, 2)), size.mean((1, 2)),
                                                         size.std((1, 2)))], axis=1)  # fmt: skip
    numbers: np.ndarray = np.sqrt(np.concatenate([cells.ravel(), whole.ravel(), measures.ravel()]))
    of_quarter = lengths[:, :, None].reshape(QUARTERS, -1).sum(1)[:, None, None] * (HEIGHT * WIDTH / (DOWN * ACROSS))
    quarters: np.ndarray = np.sqrt(by_part.reshape(QUARTERS, -1, DOWN * ACROSS, DIRECTIONS).sum(1) / of_quarter)
    return numbers.astype(np.float32), quarters.ravel().astype(np.float32)


def _of_parts(values: np.ndarray, part: np.ndarray) -> np.ndarray:
    sums: np.ndarray = np.bincount(part, values, minlength=PARTS)
    means: np.ndarray = sums / np.maximum(np.bincount(part, minlength=PARTS), 1)
    return means


def _mirror() -> np.ndarray:
    """Where each number of a mirrored vector stands in the original: columns and directions are reversed."""
    turned = (DIRECTIONS // 2 - np.arange(DIRECTIONS)) % DIRECTIONS
    cells = np.arange(_CELLS).reshape(DOWN, ACROSS, DIRECTIONS)[:, ::-1, turned]
    whole = _CELLS + np.arange(PARTS * DIRECTIONS).reshape(PARTS, DIRECTIONS)[:, turned]
    rest = np.arange(_CELLS + PARTS * DIRECTIONS, _ONE)
    one = np.concatenate([cells.ravel(), whole.ravel(), rest])
    quarters = 2 * _ONE + _CELLS * np.arange(QUARTERS)[:, None] + cells.ravel()
    return np.concatenate([one, _ONE + one, quarters.ravel()])


_MIRROR = _mirror()
