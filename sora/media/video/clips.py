"""Which frames of a video make its clips. Arithmetic on whole numbers only: the same answer on every machine."""

from __future__ import annotations

from sora.core.records import ClipSpec, ClipWindow

FLOW_LENGTH = 752  # numbers of `flow.vector`, here because processes without OpenCV need to know it


def spread(start: int, length: int, count: int) -> tuple[int, ...]:
    """`count` indices, the middles of equal parts of `[start, start + length)`. Repeats some if `count > length`."""
    return tuple(start + (2 * i + 1) * length // (2 * count) for i in range(count))


def windows(frames: int, fps: float, spec: ClipSpec) -> list[ClipWindow]:
    """The clips of a video with `frames` frames at `fps` frames per second.

    `uniform` gives one clip over the whole video. `window` gives as many spans of `spec.window_seconds` as fit side
    by side, at most `spec.max_clips`, evenly spread from the first frame to the last; a video that is shorter than one
    span gives one clip of the whole video.

    Returns:
        At least one window of `spec.frames` indices and `spec.flow` pairs each, in the order of time.

    Raises:
        ValueError: `frames` is below 1.
    """
    if frames < 1:
        raise ValueError(f"a video of {frames} frames has no clips")
    if spec.sampling == "uniform":
        return [_window(0, 0, frames, frames, spec)]
    length = min(frames, max(1, round(spec.window_seconds * fps)))
    count = max(1, min(spec.max_clips, frames // length))
    room = frames - length
    starts = [room // 2] if count == 1 else [room * i // (count - 1) for i in range(count)]
    return [_window(i, start, length, frames, spec) for i, start in enumerate(starts)]


def _window(clip: int, start: int, length: int, frames: int, spec: ClipSpec) -> ClipWindow:
    moments = spread(start, length - 1, spec.flow) if length > 1 else (start,) * spec.flow
    pairs = tuple((index, min(index + 1, frames - 1)) for index in moments)
    return ClipWindow(clip, spread(start, length, spec.frames), pairs)
