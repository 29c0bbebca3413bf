"""What the sections of params.yaml have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section: unknown keys are errors, and nobody changes a setting.

    Every field has a `description`, the one place that explains it: params.yaml, `sora init` and
    docs/settings.md take it from there. It names the unit. The range is in the field's constraints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
