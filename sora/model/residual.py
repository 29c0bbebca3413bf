"""Residual blocks on video: 2-D convolutions on every frame, with time mixed by shifting channels.

Sources: He et al. 2016, "Deep Residual Learning for Image Recognition" (the basic block); Lin, Gan and Han 2019, "TSM:
Temporal Shift Module for Efficient Video Understanding" (the shift inside the residual branch).
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from sora.core.tensors import Shape


@keras.saving.register_keras_serializable(package="sora")
class TemporalShift(keras.layers.Layer):
    """Moves one part of the channels one frame forwards in time and as many one frame back; costs no multiplication.

    TSM (Lin et al. 2019). The ends are filled with zeros, as there.

    Arguments:
        fraction: share of the channels that moves in each direction, 0 to 0.5; rounded down to whole channels.

    Input shape: `(batch, time, height, width, channels)`, or any `(batch, time, ..., channels)`.
    Output shape: the same.

    Example: `TemporalShift(0.125)(x)`.
    """

    def __init__(self, fraction: float = 0.125, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= fraction <= 0.5:
            raise ValueError(f"fraction must be 0 to 0.5, received {fraction}")
        self.fraction = fraction

    def call(self, x: Any) -> Any:
        moved = int(x.shape[-1] * self.fraction)
        if moved == 0 or x.shape[1] == 1:
            return x
        nothing = ops.zeros_like(x[:, :1, ..., :moved])
        later = ops.concatenate([nothing, x[:, :-1, ..., :moved]], axis=1)
        earlier = ops.concatenate([x[:, 1:, ..., moved : 2 * moved], nothing], axis=1)
        return ops.concatenate([later, earlier, x[..., 2 * moved :]], axis=-1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "fraction": self.fraction}


@keras.saving.register_keras_serializable(package="sora")
class FrameConv(keras.layers.Layer):
    """Convolution of each frame by itself, then batch normalisation: batch x time frames are one batch of pictures.

    Statistics are taken over batch, time and place, so that a batch of 16 clips of 16 frames normalises over 256
    pictures; momentum 0.9 suits the few hundred steps of a small data set.

    Arguments:
        filters, size, stride: of the convolution; no bias, the normalisation has one.
        activate: apply ReLU after the normalisation.

    Input shape: `(batch, time, height, width, channels)`.
    Output shape: `(batch, time, ceil(height / stride), ceil(width / stride), filters)`.

    Example: `FrameConv(32, 3, stride=2)(x)`.
    """

    def __init__(self, filters: int, size: int = 3, *, stride: int = 1, activate: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.filters, self.size, self.stride, self.activate = filters, size, stride, activate
        self.convolution = keras.layers.Conv2D(
            filters,
            size,
            strides=stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            dtype=self.dtype_policy,
        )
        self.normalisation = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3, dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        self.convolution.build((None, *input_shape[2:]))
        self.normalisation.build(self.convolution.compute_output_shape((None, *input_shape[2:])))

    def call(self, x: Any, training: bool | None = None) -> Any:
        time = x.shape[1]
        x = self.convolution(ops.reshape(x, (-1, *x.shape[2:])))
        x = self.normalisation(x, training=training)
        if self.activate:
            x = ops.relu(x)
        return ops.reshape(x, (-1, time, *x.shape[1:]))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        height, width = (None if side is None else -(-side // self.stride) for side in input_shape[2:4])
        return (*input_shape[:2], height, width, self.filters)

    def get_config(self) -> dict[str, Any]:
        own = {"filters": self.filters, "size": self.size, "stride": self.stride, "activate": self.activate}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="sora")
class ResidualBlock(keras.layers.Layer):
    """shift → 3x3 → norm → ReLU → 3x3 → norm, added to the shortcut, then ReLU.

    He et al. 2016, basic block, with the residual placement of TSM (the shortcut sees the frames unshifted). Departs in
    the shortcut of a changing shape: average pooling before the 1x1 convolution, so that no pixel is skipped
    (He et al. 2019, "Bag of Tricks", ResNet-D).

    Arguments:
        filters: output channels.
        stride: spatial, of the first convolution.
        shift: fraction of the channels shifted each way in time (see `TemporalShift`); 0 leaves frames apart.

    Input shape: `(batch, time, height, width, channels)`.
    Output shape: `(batch, time, ceil(height / stride), ceil(width / stride), filters)`.

    Example: `ResidualBlock(64, stride=2)(x)`.
    """

    def __init__(self, filters: int, *, stride: int = 1, shift: float = 0.125, **options: Any) -> None:
        super().__init__(**options)
        self.filters, self.stride, self.shift = filters, stride, shift
        self.temporal = TemporalShift(shift, dtype=self.dtype_policy)
        self.first = FrameConv(filters, 3, stride=stride, dtype=self.dtype_policy)
        self.second = FrameConv(filters, 3, activate=False, dtype=self.dtype_policy)
        self.pool = keras.layers.AveragePooling2D(stride, padding="same", dtype=self.dtype_policy)
        self.shortcut: FrameConv | None = None

    def build(self, input_shape: Shape) -> None:
        self.first.build(input_shape)
        self.second.build(self.first.compute_output_shape(input_shape))
        if self.stride > 1 or input_shape[-1] != self.filters:
            self.shortcut = FrameConv(self.filters, 1, activate=False, dtype=self.dtype_policy)
            self.shortcut.build((*self.first.compute_output_shape(input_shape)[:-1], input_shape[-1]))

    def call(self, x: Any, training: bool | None = None) -> Any:
        branch = self.first(self.temporal(x), training=training)
        branch = self.second(branch, training=training)
        if self.shortcut is not None:
            if self.stride > 1:
                time = x.shape[1]
                x = self.pool(ops.reshape(x, (-1, *x.shape[2:])))
                x = ops.reshape(x, (-1, time, *x.shape[1:]))
            x = self.shortcut(x, training=training)
        return ops.relu(branch + x)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return self.first.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "stride": self.stride, "shift": self.shift}
