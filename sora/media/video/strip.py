"""A strip of frames with a heat map over them, as a PNG."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

MOST_FRAMES = 8
TILE = 128  # pixels, the longer side of a frame
_GAP = 4  # pixels between frames
_BAR = 8  # pixels, the bar of a frame's weight
_OPAQUE = 0.72  # of the hottest place
_GREY = 128  # of a bar's empty part


def chosen_frames(weights: np.ndarray, most: int = MOST_FRAMES) -> list[int]:
    """Indices of at most `most` frames in order of time: the heaviest of each of as many equal parts."""
    count = min(most, len(weights))
    edges = [part * len(weights) // count for part in range(count + 1)]
    return [start + int(weights[start:end].argmax()) for start, end in pairwise(edges)]


def strip(clip: np.ndarray, heat: np.ndarray, weights: np.ndarray) -> tuple[bytes, list[int]]:
    """Frames above, the same with the heat over them below, and under each a bar of its weight.

    One scale for all frames: the hottest place of the clip is the brightest. A picture has at most `MOST_FRAMES` frames
    whose longer side is `TILE`, whatever the clip's size.

    Arguments:
        clip: `(time, height, width, rgb) uint8`.
        heat: `(time, rows, columns) float`, 0 and above; any rows and columns.
        weights: `(time,) float`, 0 and above.

    Returns:
        The PNG, and the indices of the frames in it.
    """
    frames = chosen_frames(weights)
    height, width = clip.shape[1:3]
    size = (max(1, width * TILE // max(height, width)), max(1, height * TILE // max(height, width)))
    hottest = float(heat.max()) or 1.0
    heaviest = float(weights.max()) or 1.0
    smaller = size[0] <= width
    columns = []
    for index in frames:
        picture = cv2.resize(clip[index], size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
        level = cv2.resize((heat[index] / hottest).astype(np.float32), size, interpolation=cv2.INTER_LINEAR).clip(0, 1)
        colours = cv2.cvtColor(
            cv2.applyColorMap(np.rint(255 * level).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB
        )
        # The square root makes faint heat visible; nothing is drawn where there is none.
        opacity = _OPAQUE * np.sqrt(level)[..., None]
        grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        over = np.rint((1 - opacity) * grey + opacity * colours).astype(np.uint8)
        bar = np.full((_BAR, size[0], 3), _GREY, np.uint8)
        bar[:, : round(size[0] * float(weights[index]) / heaviest)] = (252, 165, 10)  # INFERNO's orange
        columns.append(np.concatenate([picture, over, bar]))
    tall = columns[0].shape[0]
    whole = np.zeros((tall, len(columns) * (size[0] + _GAP) - _GAP, 4), np.uint8)  # the gaps are transparent
    for number, column in enumerate(columns):
        left = number * (size[0] + _GAP)
        whole[:, left : left + size[0], :3] = column
        whole[:, left : left + size[0], 3] = 255
    done, data = cv2.imencode(".png", cv2.cvtColor(whole, cv2.COLOR_RGBA2BGRA))
    assert done
    return data.tobytes(), frames
