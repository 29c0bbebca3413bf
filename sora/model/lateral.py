"""Lateral connections: what the low network has seen joins the high network (SlowFast, Feichtenhofer et al. 2019)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from sora.core.tensors import Shape
from sora.model.residual import FrameConv
from sora.model.streams import key_frames


@keras.saving.register_keras_serializable(package="sora")
class Lateral(keras.layers.Layer):
    """Maps of every frame become maps of the key frames: a convolution over time, taken at the key frames only.

    SlowFast's "time-strided convolution" (5x1x1), which gained most there, followed by its normalisation and ReLU.
    Written as a 1x1 convolution over the channels of five neighbouring frames side by side, so without Conv3D. Departs
    at the ends: the first and the last frame repeat, where the paper pads with zeros.

    Arguments:
        filters: output channels.
        count: key frames (see `streams.key_frames`).
        span: frames that a key frame is made from, odd.

    Input shape: `(batch, time, height, width, channels)`.
    Output shape: `(batch, count, height, width, filters)`.

    Example: `Lateral(32, count=4)(low_map)`.
    """

    def __init__(self, filters: int, count: int, *, span: int = 5, **options: Any) -> None:
        super().__init__(**options)
        if span < 1 or span % 2 == 0:
            raise ValueError(f"span must be odd, received {span}")
        self.filters, self.count, self.span = filters, count, span
        self.convolution = FrameConv(filters, 1, dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        batch, time, height, width, channels = input_shape
        count = len(key_frames(time, self.count))
        self.convolution.build((batch, count, height, width, self.span * channels))

    def call(self, x: Any, training: bool | None = None) -> Any:
        last = x.shape[1] - 1
        neighbours = []
        for offset in range(-(self.span // 2), self.span // 2 + 1):
            places = [min(max(frame + offset, 0), last) for frame in key_frames(x.shape[1], self.count)]
            neighbours.append(ops.concatenate([x[:, place : place + 1] for place in places], axis=1))
        return self.convolution(ops.concatenate(neighbours, axis=-1), training=training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], self.count, *input_shape[2:4], self.filters)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "count": self.count, "span": self.span}
