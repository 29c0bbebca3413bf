"""Every structure that the settings can make, each as small as it gets."""

from __future__ import annotations

from typing import Any

from sora.config import Model
from tests.clips import SMALL

VARIANTS: dict[str, dict[str, Any]] = {
    "concat": {},
    "gated": {"fusion": "gated", "gated_width": 24},
    "gram": {"fusion": "gram", "gram_width": 16},
    "gram of frames": {"fusion": "gram", "gram_width": 16, "gram_vectors": "frame", "key_frames": 8},
    "lateral": {"lateral": True, "low_filters": [16, 24], "high_filters": [24, 32, 40], "blocks": 2},
    "low alone": {"streams": "low", "shift": 0.0},
    "high alone": {"streams": "high"},
    "backbone": {"backbone": "efficientnet-lite0"},
    "binary": {"head": "binary"},
    "multilabel": {"head": "multilabel"},
}


def variant(name: str) -> Model:
    return Model(**{**SMALL, **VARIANTS[name]})
