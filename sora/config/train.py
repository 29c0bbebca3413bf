"""The section `train`: how a model learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from sora.config.section import Section

_Mirrors = tuple[str | tuple[str, str], ...]


class Train(Section):
    """Optimiser, augmentation, and where training runs."""

    epochs: int = Field(30, ge=1, le=10_000, description="maximum number of passes over all clips")
    batch: int = Field(16, ge=1, le=4096, description="clips of one optimiser step")
    min_steps: int = Field(
        8,
        ge=1,
        le=10_000,
        description="minimum optimiser steps per epoch: a small set is shown several times in each",
    )
    learning_rate: float = Field(2e-3, gt=0, le=1, description="the peak: the rate warms up, then falls")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="of AdamW")
    label_smoothing: float = Field(0.05, ge=0, lt=0.5, description="share of a label that is spread over all classes")
    patience: int = Field(8, ge=1, description="epochs without a better validation loss, after which training stops")
    # With weights a multi-label model's probabilities would be wrong.
    class_weights: bool = Field(True, description="each class counts equally, however rare; not with head `multilabel`")
    flip: bool | Annotated[_Mirrors, Field(min_length=1)] = Field(
        True,
        description="Clips are also mirrored left to right. A list names the exceptions, as in [never, [turn_left, "
        "turn_right]]: a class that is never mirrored, and two classes that are each other's mirror image.",
    )
    jitter: bool = Field(
        True, description="small shifts and changes of contrast and brightness, the same for all frames of a clip"
    )
    speed: float = Field(0, ge=0, le=4, description="slower motion, down to 1 / (1 + speed); 0: off")
    crop: float = Field(
        0, ge=0, lt=1, description="a random crop that leaves out at most this share of the picture's area; 0: off"
    )
    noise: float = Field(0, ge=0, le=64, description="maximum standard deviation of pixel noise, of 255 levels; 0: off")
    mix_up: float = Field(
        0, ge=0, le=10, description="alpha of mix-up: clips and their labels are blended in pairs; 0: off"
    )
    ema: float = Field(
        0, ge=0, lt=1, description="weights are averaged over epochs; the average keeps this share of itself; 0: off"
    )
    seed: int = Field(0, description="of initial weights, order and augmentation")
    minutes: float = Field(
        10, gt=0, le=10_000, description="with model.preset `auto`: time for trying candidates, cheapest first"
    )
    mixed_precision: Literal["auto", "on", "off"] = Field(
        "auto", description="16-bit arithmetic; auto: on an accelerator"
    )
    work_pool: str | None = Field(None, description="the Prefect work pool of GPU workers; null: train here")

    @field_validator("flip")
    @classmethod
    def _once(cls, value: bool | _Mirrors) -> bool | _Mirrors:
        if not isinstance(value, bool):
            names = [name for entry in value for name in ((entry,) if isinstance(entry, str) else entry)]
            if len(set(names)) != len(names):
                raise ValueError("names a class twice")
        return value

    def mirrors(self, classes: Sequence[str]) -> list[int] | None:
        """For each class the number of its mirror image's class, -1 if it has none; None: each is its own.

        Raises:
            ValueError: `flip` names a class that is not one of them.
        """
        if isinstance(self.flip, bool):
            return None
        result = list(range(len(classes)))
        for entry in self.flip:
            pair = (entry,) if isinstance(entry, str) else entry
            unknown = [name for name in pair if name not in classes]
            if unknown:
                raise ValueError(f"train.flip names {unknown[0]!r}, which is not one of the classes")
            numbers = [list(classes).index(name) for name in pair]
            if len(numbers) == 1:
                result[numbers[0]] = -1
            else:
                result[numbers[0]], result[numbers[1]] = numbers[1], numbers[0]
        return result
