"""The sections that decide what is made from the videos: validate, split, clip, shards."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from sora.config.section import FileBounds, Section
from sora.core.records import ClipSpec


class Validate(FileBounds, Section):
    """Rules about good data. Per-video rules quarantine; four stop or warn about the whole set.

    The last ones limit what a file may cost. A day at 30 frames a second, 8K, and five hours of 1080p are within them.
    """

    min_frames: int = Field(8, ge=1, description="frames that must decode")
    min_seconds: float = Field(0.3, ge=0, description="seconds")
    min_side: int = Field(32, ge=1, description="pixels of the shorter side")
    min_fps: float = Field(4, gt=0, description="frames a second")
    max_fps: float = Field(240, gt=0, description="frames a second")
    duplicates: bool = Field(True, description="exact copies and near-duplicates are quarantined")
    near_duplicate_bits: int = Field(
        10, ge=0, le=64, description="of 192: two videos that differ in at most this many are near-duplicates"
    )
    min_classes: int = Field(2, ge=2, description="classes that have videos; fewer stop the run")
    min_videos_per_class: int = Field(3, ge=1, description="a class with fewer stops the run")
    max_rejected: float = Field(
        0.25, ge=0, le=1, description="share of the videos that may be quarantined; more stops the run"
    )
    max_balance_shift: float = Field(
        0.2,
        ge=0,
        le=1,
        description="total variation of the classes' shares against the last judged run; more is a warning",
    )
    max_bytes: int = Field(
        100_000_000_000, ge=1, description="bytes of a video; beyond this and the next three it is `too_large`"
    )
    max_pixels: int = Field(8192 * 4320, ge=1, description="pixels of a frame; the default is 8192x4320")
    max_frames: int = Field(3_000_000, ge=1, description="frames of a video")
    max_seconds: float = Field(90_000, gt=0, description="seconds that a video lasts; the default is 25 hours")
    max_decode_seconds: float = Field(
        1800,
        gt=0,
        description="seconds of processor time for a video, then it is `too_slow`; some five hours of 1080p",
    )
    decode_memory: int = Field(
        3_000_000_000,
        ge=100_000_000,
        description="bytes, of each process that decodes; a video that needs more is `too_large`",
    )

    @property
    def unit_bits(self) -> int | None:
        """How many bits near-duplicates may differ in to be one unit; None where the rules about them are off."""
        return self.near_duplicate_bits if self.duplicates else None

    def decoding(self) -> dict[str, Any]:
        """Everything that limits the decoding of a file."""
        names = ("max_decode_seconds", "decode_memory")
        return {**self.file_limits(), **{name: getattr(self, name) for name in names}}


class Split(Section):
    """Which videos are for training, validation and test."""

    group_pattern: str | None = Field(
        None,
        description="The same person or thing must not be on both sides. Name the person, camera or source in the "
        "column `group` of data/labels.csv, or set a regular expression for the path whose first capturing group is "
        r"the name, such as 'person(\d+)'.",
    )
    val: float = Field(0.15, gt=0, lt=0.5, description="share of the videos for validation")
    test: float = Field(0.15, gt=0, lt=0.5, description="share of the videos for the test")
    seed: int = Field(0, description="decides between otherwise equal choices")

    @field_validator("group_pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                if re.compile(value).groups < 1:
                    raise ValueError("needs one capturing group, as in 'person(\\d+)'")
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from error
        return value


class Clip(Section):
    """The fields of `records.ClipSpec`, with ranges."""

    frames: int = Field(16, ge=2, le=256, description="frames of a clip")
    height: int = Field(112, ge=16, le=1024, multiple_of=8, description="pixels")
    width: int = Field(112, ge=16, le=1024, multiple_of=8, description="pixels")
    sampling: Literal["uniform", "window"] = Field(
        "uniform", description="over the whole video; `window`: several clips of window_seconds each, for long videos"
    )
    window_seconds: float = Field(2.0, gt=0, le=3600, description="seconds that a clip covers, with `window`")
    max_clips: int = Field(8, ge=1, le=1000, description="maximum number of clips per video, with `window`")
    aspect: Literal["stretch", "crop", "pad"] = Field(
        "crop", description="the middle of the picture; `pad` adds bars, `stretch` distorts"
    )
    gamma: float = Field(1.0, ge=0.1, le=5, description="below 1 brightens dark footage")
    equalise: Literal["none", "histogram", "clahe"] = Field(
        "none", description="`histogram` or `clahe` for dark or flat footage"
    )
    flow: int = Field(
        0,
        ge=0,
        le=256,
        description="moments of a clip at which its motion is measured (optical flow between two neighbouring frames), "
        "for models that read it; 0: none",
    )

    def spec(self) -> ClipSpec:
        return ClipSpec(**self.model_dump())


class Shards(Section):
    """The files that hold the clips."""

    buckets: int = Field(
        16, ge=1, le=4096, description="files; more for many thousands of videos: an added video rewrites one of them"
    )
    workers: int = Field(0, ge=0, le=256, description="processes that decode; 0: one for each core")
