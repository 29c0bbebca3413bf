"""Named sets of model settings: `model.preset` in params.yaml, and what `sora model describe PRESET` shows.

A preset sets the omitted fields of the section `model`; a given field overrides it. It never touches
other sections: clips are DVC's, and a changed model must not decode videos again. `clip` is what a preset was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sora.core.records import ClipSpec


@dataclass(frozen=True, slots=True)
class Preset:
    """`model`: fields of `config.model.Model` that differ from its defaults."""

    about: str
    model: Mapping[str, object]
    clip: ClipSpec = field(default_factory=ClipSpec)


# What a backbone was trained on, and enough moments to tell what moves.
_SEEN = ClipSpec(frames=16, height=224, width=224, flow=16)

PRESETS: dict[str, Preset] = {
    "auto": Preset(
        "the choice by evidence: what follows is tried by cross-validation, the best is trained",
        {"backbone": "efficientnet-lite0"},
        _SEEN,
    ),
    "appearance": Preset(
        "little data, classes that look different: logistic regression on frozen features",
        {"probe": "appearance", "backbone": "efficientnet-lite0"},
        _SEEN,
    ),
    "motion": Preset(
        "little data, classes that move differently: a kernel on histograms of optical flow",
        {"probe": "motion"},
        _SEEN,
    ),
    "probes": Preset(
        "both of these, weighed against each other",
        {"probe": "both", "backbone": "efficientnet-lite0"},
        _SEEN,
    ),
    "demo": Preset(
        "two CPU cores, seconds an epoch",
        {"high_filters": (16, 32)},
        ClipSpec(frames=12, height=64, width=64),
    ),
    "small": Preset("the defaults: a CPU, minutes for a few hundred clips", {}),
    # A fourth level sees 4x4 of the 112 pixels, where width is cheap: 1.3 GFLOP per clip, twice those of `small`.
    "base": Preset(
        "one GPU, or patience",
        {"low_filters": (16, 32, 64, 128), "high_filters": (48, 96, 192, 256), "embedding": 256},
    ),
    # In the high network only the layers that read it are trained: a few hundred clips are enough for that.
    "pretrained": Preset(
        "little data: appearance as ImageNet taught it, motion from scratch",
        {"backbone": "efficientnet-lite0"},
    ),
    # The reference article's worked case. Its 448 channels are the high network's; the low one adds motion.
    "article": Preset(
        "the reference article's case: 10 frames of 256x256, ten 256-vectors, one 256x256 matrix",
        {
            "low_filters": (16, 32, 64),
            "high_filters": (64, 128, 256),
            "key_frames": 10,
            "fusion": "gram",
            "gram_vectors": "frame",
            "gram_width": 256,
        },
        ClipSpec(frames=10, height=256, width=256),
    ),
}
