"""How many channels each level of a backbone has. Here, without Keras, for whoever only needs to know the size."""

from __future__ import annotations

WIDTHS: dict[str, tuple[int, ...]] = {
    "efficientnet-lite0": (40, 112, 1280),
    "mobilenetv2": (32, 96, 1280),
}
