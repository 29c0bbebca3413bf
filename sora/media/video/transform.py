"""From a video file to the clips that a model sees. The only way, for training and for serving: no skew.

A frame is resized while it is converted (see `ffmpeg`), then cropped, colour-normalised and padded, in this order, so
that every step works on as few pixels as possible and black bars stay out of the histogram.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from sora.core.records import ClipSpec, ClipWindow
from sora.core.tensors import FLOW, VIDEO, Clips
from sora.media.video import ffmpeg, flow
from sora.media.video.clips import windows
from sora.media.video.flow import HEIGHT as FLOW_HEIGHT
from sora.media.video.flow import WIDTH as FLOW_WIDTH


def fitted(width: int, height: int, spec: ClipSpec) -> tuple[int, int]:
    """The size (width, height) that a picture is resized to before it is cropped or padded to the clip's size."""
    if spec.aspect == "stretch":
        return spec.width, spec.height
    wide, tall = spec.width * height, spec.height * width
    by_width = wide >= tall if spec.aspect == "crop" else wide <= tall
    if by_width:
        return spec.width, max(1, (2 * wide + width) // (2 * width))
    return max(1, (2 * tall + height) // (2 * height)), spec.height


def finish(picture: np.ndarray, spec: ClipSpec) -> np.ndarray:
    """(height, width, 3) uint8 as `fitted` → (spec.height, spec.width, 3) uint8."""
    height, width = picture.shape[:2]
    top, left = max(0, height - spec.height) // 2, max(0, width - spec.width) // 2
    picture = picture[top : top + spec.height, left : left + spec.width]
    if spec.gamma != 1:
        curve = np.rint(255 * (np.arange(256) / 255) ** spec.gamma).astype(np.uint8)
        picture = curve[picture]
    if spec.equalise != "none":
        colours = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2YCrCb)
        luma = np.ascontiguousarray(colours[..., 0])
        clahe = spec.equalise == "clahe"
        colours[..., 0] = cv2.createCLAHE(2.0, (8, 8)).apply(luma) if clahe else cv2.equalizeHist(luma)
        picture = cv2.cvtColor(colours, cv2.COLOR_YCrCb2RGB)
    height, width = picture.shape[:2]
    if (height, width) == (spec.height, spec.width):
        return picture
    padded = np.zeros((spec.height, spec.width, 3), np.uint8)
    top, left = (spec.height - height) // 2, (spec.width - width) // 2
    padded[top : top + height, left : left + width] = picture
    return padded


def prepare_clips(
    path: ffmpeg.Source,
    spec: ClipSpec,
    *,
    frames: int | None = None,
    fps: float | None = None,
    limits: ffmpeg.Limits | None = None,
    in_order: bool = False,
) -> np.ndarray:
    """The pictures of all clips of a video.

    Args:
        frames, fps: from the manifest, which avoids decoding what the clips do not need. Without them the same clips
            result: the header's claim is tried first, and decoding is repeated if it was wrong.
        in_order: see `ffmpeg.read_chosen`.

    Returns:
        (clips, spec.frames, spec.height, spec.width, 3) uint8 rgb.

    Raises:
        VideoError: not_a_video, unreadable, too_large.
    """
    known = None if frames is None or fps is None else (frames, fps)
    return clips_and_rate(path, spec, known=known, limits=limits, in_order=in_order)[0].video


def clips_and_rate(
    path: ffmpeg.Source,
    spec: ClipSpec,
    *,
    known: tuple[int, float] | None = None,
    limits: ffmpeg.Limits | None = None,
    in_order: bool = False,
) -> tuple[Clips, int, float]:
    """All clips of a video with the tensors that `spec` asks for, and the video's frames and fps that they were chosen
    by. See `prepare_clips`.
    """
    pictures: dict[int, np.ndarray] = {}
    lumas: dict[int, np.ndarray] = {}
    shown: set[int] = set()
    moving: set[int] = set()

    def choose(count: int, rate: float) -> set[int]:
        chosen = windows(count, rate, spec)
        shown.clear()
        shown.update(index for window in chosen for index in window.indices)
        moving.clear()
        moving.update(index for window in chosen for pair in window.pairs for index in pair)
        return shown | moving

    def look(index: int, picture: ffmpeg.Picture) -> None:
        if index in shown:
            pictures[index] = finish(picture.rgb(lambda width, height: fitted(width, height, spec)), spec)
        if index in moving:
            lumas[index] = picture.luma(FLOW_WIDTH, FLOW_HEIGHT)

    _, count, rate = ffmpeg.read_chosen(path, choose, look, known=known, limits=limits, in_order=in_order)
    if shown - pictures.keys() or moving - lumas.keys():  # the header lied: what was shown must be luma now, or reverse
        ffmpeg.read_chosen(path, choose, look, known=(count, rate), limits=limits, in_order=True)
    chosen = windows(count, rate, spec)
    video = np.empty((len(chosen), spec.frames, spec.height, spec.width, 3), np.uint8)
    for window in chosen:
        for position, index in enumerate(window.indices):
            video[window.clip, position] = pictures[index]
    if not spec.flow:
        return Clips({VIDEO: video}), count, rate
    motion = np.stack([flow.vector(*_pairs(window, lumas)) for window in chosen])
    return Clips({VIDEO: video, FLOW: motion}), count, rate


def _pairs(window: ClipWindow, lumas: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    before, after = (np.stack([lumas[pair[side]] for pair in window.pairs]) for side in (0, 1))
    return before, after
