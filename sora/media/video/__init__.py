"""Video: frames by FFmpeg (through PyAV), clips, signatures."""

from __future__ import annotations

from sora.core.records import ClipSpec
from sora.core.tensors import FLOW, VIDEO, TensorSpec
from sora.media.modality import Modality, Reader
from sora.media.video.clips import FLOW_LENGTH, windows

__all__ = ["MODALITY", "tensors"]


def tensors(spec: ClipSpec) -> dict[str, TensorSpec]:
    """A clip's frames, `(frames, height, width, rgb) uint8`; with `spec.flow` also its motion, see `flow.vector`."""
    video = TensorSpec(VIDEO, "uint8", (spec.frames, spec.height, spec.width, 3))
    return {VIDEO: video, FLOW: TensorSpec(FLOW, "float16", (FLOW_LENGTH,))} if spec.flow else {VIDEO: video}


def _reader() -> Reader:
    from sora.media.video import reader

    return reader


MODALITY = Modality(
    name="video",
    facts={
        "codec": "", "width": 0, "height": 0, "rotation": 0, "frames": 0, "fps": 0.0, "duration": 0.0, "audio": False,
        "brightness": 0.0, "signature": "",
    },
    tensors=tensors,
    windows=windows,
    reader=_reader,
)  # fmt: skip
