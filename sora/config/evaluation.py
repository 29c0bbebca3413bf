"""The sections that decide how a model is judged: eval, unsure, gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from sora.config.section import Section


class Eval(Section):
    """How a model is queried. It is part of the recipe, so that the server asks as the evaluation did."""

    views: tuple[Literal["mirrored", "left", "right"], ...] = Field(  # see `sora.store.augment.views`
        (),
        description="averaged with each clip's own answer: mirrored, left, right; each costs one more model call",
    )

    @field_validator("views")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a view twice")
        return value


class Unsure(Section):
    """Answers below a confidence that is calibrated on validation are marked as unsure."""

    precision: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the other answers that should be right, such as 0.95; null: no answer is marked",
    )


class Gate(Section):
    """What a candidate must show before it replaces the champion."""

    mode: Literal["better", "not_worse", "auto"] = Field(
        "auto", description="not_worse with new data, better without; `not_worse` or `better`: always that one"
    )
    margin: float = Field(
        0.02, ge=0, le=0.5, description="with not_worse: an accuracy that is lower by this much is still not worse"
    )
    min_test: int = Field(30, ge=1, description="test videos; with fewer, only the first model is promoted")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the paired tests on accuracy and on single classes")
    max_class_drop: float = Field(0.15, ge=0, le=1, description="by which the recall of a class may fall")
    max_ece: float = Field(0.25, ge=0, le=1, description="expected calibration error")
    max_latency_ms: float = Field(2000, gt=0, description="milliseconds of a model call with one clip")
