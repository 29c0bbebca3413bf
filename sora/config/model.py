"""The section `model`: which network is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sora.config.presets import PRESETS
from sora.config.section import Section

if TYPE_CHECKING:
    from sora.tasks import Task


class Model(Section):
    """The two-branch residual fusion model (`sora/model/classifier.py`), a probe, or the choice among them (`auto`).

    An omitted field comes from the preset, and what the preset does not name has the default shown here.
    """

    preset: Literal["auto", "appearance", "motion", "probes", "demo", "small", "base", "pretrained", "article"] = Field(
        "small",
        description="`auto` tries several by cross-validation and keeps the best; `sora model describe base` shows the "
        "layers, FLOPs and memory of `base`",
    )
    # See `sora/model/probes.py`.
    probe: Literal["none", "appearance", "motion", "both"] = Field(
        "none",
        description="With `none` networks are trained. Otherwise logistic regression reads features that are computed "
        "once: what a frozen backbone sees (`appearance`), histograms of optical flow (`motion`, needs clip.flow), or "
        "`both`.",
    )
    streams: Literal["both", "low", "high"] = Field("both", description="`low`: motion alone; `high`: appearance alone")
    low_filters: tuple[int, ...] = Field(
        (16, 32, 64),
        description="of the motion network, one number for each of 1 to 6 levels: 16 to 2048, a multiple of 8",
    )
    high_filters: tuple[int, ...] = Field((32, 64, 128), description="of the appearance network, likewise")
    # See `sora/model/backbone.py`.
    backbone: Literal["residual", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "mobilenetv2"] = (
        Field(
            "residual",
            description="The appearance network: from scratch (`residual`), or one that was trained on ImageNet: "
            "appearance from little data. The weights of `efficientnet-lite0` come with the installation, those of "
            "`efficientnet-lite1` and `efficientnet-lite2` with its extra `backbones`, and those of `mobilenetv2` are "
            "downloaded once.",
        )
    )
    backbone_trainable: bool = Field(
        False, description="the weights from ImageNet are trained too, not only the layers that read their features"
    )
    blocks: int = Field(1, ge=1, le=8, description="residual blocks of each level")
    shift: float = Field(
        0.125,
        ge=0,
        le=0.5,
        description="share of the channels that each block shifts one frame forward and back; 0 keeps frames apart",
    )
    lateral: bool = Field(
        False, description="the motion network's maps join the appearance network's before each of its levels"
    )
    key_frames: int = Field(4, ge=1, le=64, description="frames that the appearance network sees")
    fusion: Literal["concat", "gated", "gram"] = Field(
        "concat", description="how the features of all levels are joined: `concat`, `gated` or `gram`"
    )
    gated_width: int = Field(
        128, ge=8, le=2048, description="with fusion `gated`: every level is projected to this width"
    )
    gram_width: int = Field(
        64, ge=8, le=512, description="with fusion `gram`: every feature vector is projected to this width"
    )
    gram_vectors: Literal["level", "frame"] = Field(
        "level", description="with fusion `gram`: one vector for each level and frame; `frame`: one for each frame"
    )
    embedding: int = Field(128, ge=8, le=4096, description="width of the vector before the head")
    dropout: float = Field(0.3, ge=0, lt=1, description="share of the values that training drops around the embedding")
    head: Literal["multiclass", "binary", "multilabel"] = Field(
        "multiclass",
        description="`binary`: one logit, for 2 classes; `multilabel`: a video has one class or several",
    )

    @property
    def solved(self) -> bool:
        """Whether a probe is solved, instead of a network being trained."""
        return self.preset == "auto" or self.probe != "none"

    @property
    def bank(self) -> bool:
        """Whether the features of the frozen backbone are kept for every clip."""
        return self.backbone != "residual" and (self.preset == "auto" or self.probe in ("appearance", "both"))

    @property
    def task(self) -> Task:
        """What the head's answers mean."""
        from sora import tasks  # here, since it loads NumPy, which not every command needs

        return tasks.of(self.head == "multilabel")

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, value: Any) -> Any:
        if isinstance(value, dict):
            preset = value.get("preset", cls.model_fields["preset"].default)
            if isinstance(preset, str) and preset in PRESETS:  # the field itself reports any other
                return {**PRESETS[preset].model, **value}
        return value

    @field_validator("low_filters", "high_filters")
    @classmethod
    def _filters(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        # Narrower than 16 crashed TensorFlow 2.21 with oneDNN 3 of 3 times (docs/decisions/0018-network.md).
        if not 1 <= len(value) <= 6 or any(v < 16 or v > 2048 or v % 8 for v in value):
            raise ValueError("needs 1 to 6 levels of 16 to 2048 filters, each a multiple of 8")
        return value

    @field_validator("lateral")
    @classmethod
    def _joins_two(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("streams") != "both":
            raise ValueError(f"joins two networks, but model.streams is {info.data.get('streams')}")
        if value and info.data.get("backbone") != "residual":
            raise ValueError(f"joins residual networks, but model.backbone is {info.data.get('backbone')}")
        return value

    @model_validator(mode="after")
    def _probe_reads_a_backbone(self) -> Model:
        if self.probe in ("appearance", "both") and self.backbone == "residual":
            raise ValueError(f"probe {self.probe} reads a backbone, but model.backbone is residual")
        return self
