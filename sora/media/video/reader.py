"""What a confined decoder calls for a video: see `sora.media.modality.Reader`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sora.core.records import ClipSpec
from sora.media.modality import Known, Reading
from sora.media.video import ffmpeg


def prepare(*, clips: bool) -> None:
    """Imports FFmpeg and, for clips, OpenCV."""
    ffmpeg.import_all()
    if clips:
        import sora.media.video.spans  # noqa: F401


def facts(file: int, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ffmpeg.Facts`.

    Raises:
        VideoError: not_a_video, unreadable, too_large.
    """
    return asdict(ffmpeg.inspect(file, ffmpeg.Limits(**limits)))


def clips(file: int, spec: ClipSpec, known: Known | None, limits: Mapping[str, Any]) -> Reading:
    """All clips of a video, by `spans.prepare_with_spans`.

    Raises:
        VideoError: not_a_video, unreadable, too_large.
    """
    from sora.media.video.spans import prepare_with_spans  # not at the top: facts need no OpenCV

    clips, spans = prepare_with_spans(file, spec, known=known, limits=ffmpeg.Limits(**limits))
    return Reading(clips.tensors, spans)
