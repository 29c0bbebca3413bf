"""Which stretch of a video each of its clips stands for, in seconds."""

from __future__ import annotations

import math
from dataclasses import replace

from sora.core.records import ClipSpec
from sora.core.tensors import Clips
from sora.media.modality import Spans
from sora.media.video.clips import windows
from sora.media.video.ffmpeg import Limits, Source
from sora.media.video.transform import clips_and_rate


def spans(frames: int, fps: float, spec: ClipSpec) -> Spans | None:
    """The stretches that `clips.windows` takes its frames from; None if no frame rate is known.

    Frames count as evenly spaced: with a variable frame rate the seconds are those of its mean.
    """
    if fps <= 0:
        return None
    # With at least as many frames as a window holds, `windows` names its first and its last frame.
    every = frames if spec.sampling == "uniform" else min(frames, math.ceil(spec.window_seconds * fps) + 1)
    dense = windows(frames, fps, replace(spec, frames=every, flow=0))
    return [(round(w.indices[0] / fps, 3), round((w.indices[-1] + 1) / fps, 3)) for w in dense]


def prepare_with_spans(
    path: Source, spec: ClipSpec, *, known: tuple[int, float] | None = None, limits: Limits | None = None
) -> tuple[Clips, Spans | None]:
    """`transform.clips_and_rate`'s clips, and the span of each, from one decoding.

    Raises:
        VideoError: not_a_video, unreadable, too_large.
    """
    clips, count, rate = clips_and_rate(path, spec, known=known, limits=limits)
    return clips, spans(count, rate, spec)
