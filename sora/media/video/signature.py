"""A perceptual signature of a video, and its brightness, from tiny luma grids collected while it is decoded.

The signature is three 64-bit difference hashes (dHash: is a cell brighter than its left neighbour?) of the frames at
1/6, 1/2 and 5/6 of the video. Re-encoding at another bitrate or size changes a few of the 192 bits, another scene about
half. All sums are whole numbers, so that the facts are the same on every CPU.
"""

from __future__ import annotations

import numpy as np

ROWS, COLUMNS = 8, 9
SCALE = 16  # a grid cell is the mean luma times this
KEPT = 64  # grids at most: bounds memory however long the video is
BIAS = SCALE  # neighbours must differ by one level: bits of even areas stay 0 instead of following noise
MIN_BITS_TEXTURE = 12  # cells of 64 that must differ clearly from their neighbour to tell a frame from others
SAMPLES = 16  # pixels per cell and axis that the mean is taken over


def grid(luma: np.ndarray, *, full_range: bool = True) -> np.ndarray:
    """(height, width) uint8 → (8, 9) int32 of `SCALE` times each cell's mean (0 to 255), from a lattice of pixels.

    Without `full_range` the luma runs from 16 to 235, as most videos store it.
    """
    height, width = luma.shape
    thin = luma[:: max(1, height // (ROWS * SAMPLES)), :: max(1, width // (COLUMNS * SAMPLES))]
    edges = [np.arange(count) * size // count for size, count in zip(thin.shape, (ROWS, COLUMNS), strict=True)]
    sums = np.add.reduceat(np.add.reduceat(thin, edges[0], 0, dtype=np.int64), edges[1], 1)
    heights, widths = (np.maximum(1, np.diff(edge, append=size)) for edge, size in zip(edges, thin.shape, strict=True))
    cells = sums * SCALE // (heights[:, None] * widths)
    if not full_range:
        cells = ((cells - 16 * SCALE) * 255 // 219).clip(0, 255 * SCALE)
    return np.asarray(cells, np.int32)


class Reservoir:
    """Every k-th frame's grid of a stream of unknown length; k doubles when `KEPT` are held.

    Which frames are held depends only on their indices, so that the same video gives the same signature.
    """

    def __init__(self) -> None:
        self.stride = 1
        self.grids: list[np.ndarray] = []

    def wants(self, index: int) -> bool:
        """Whether `add` must be called for the frame of this index. Call it for 0, 1, 2, … in turn."""
        return index % self.stride == 0

    def add(self, cells: np.ndarray) -> None:
        self.grids.append(cells)
        if len(self.grids) > KEPT:
            self.grids = self.grids[::2]
            self.stride *= 2

    def brightness(self) -> float:
        """Mean luma, 0 to 255, of the held frames; 0 without any."""
        if not self.grids:
            return 0.0
        total = sum(int(cells.sum()) for cells in self.grids)
        return round(total / (len(self.grids) * ROWS * COLUMNS * SCALE), 2)

    def signature(self, frames: int) -> str:
        """48 hex digits for a video of `frames` frames; "" if two of the three frames have too little texture."""
        if not self.grids:
            return ""
        text, plain = "", 0
        for part in (1, 3, 5):
            nearest = (part * frames // 6 + self.stride // 2) // self.stride
            cells = self.grids[min(nearest, len(self.grids) - 1)]
            step = np.diff(cells, axis=1)
            plain += int((np.abs(step) > BIAS).sum()) < MIN_BITS_TEXTURE
            text += np.packbits(step > BIAS).tobytes().hex()
        return "" if plain >= 2 else text
