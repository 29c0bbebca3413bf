"""What the sections of params.yaml have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section: unknown keys are errors, and nobody changes a setting.

    Every field has a `description`, the one place that explains it: params.yaml, `sora init` and
    docs/settings.md take it from there. It names the unit. The range is in the field's constraints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileBounds:
    """A section that bounds what a file may have, each with limits and defaults of its own."""

    def file_limits(self) -> dict[str, Any]:
        """The fields of `sora.media.video.ffmpeg.Limits`."""
        return {name: getattr(self, name) for name in ("max_bytes", "max_seconds", "max_pixels", "max_frames")}
