"""Fusion: per-frame features of every level of both networks become one vector a clip."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="sora")
class ConcatFusion(keras.layers.Layer):
    """Mean, deviation and mean absolute change over time of every level's features, side by side.

    The mean says what is seen, the deviation how much it varies, the change how fast; a level of one frame has only
    its mean (the other two are 0). Each level is normalised by itself, so that the deep ones do not drown the early
    ones.

    Input: a list of `(batch, time_i, channels_i)`.
    Output shape: `(batch, 3 * sum(channels_i))`.

    Example: `ConcatFusion()([low_level, high_level])`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.normalisations: list[Any] = []

    def build(self, input_shape: list[tuple]) -> None:
        self.normalisations = [keras.layers.LayerNormalization(dtype=self.dtype_policy) for _ in input_shape]
        for layer, shape in zip(self.normalisations, input_shape, strict=True):
            layer.build((shape[0], 3 * shape[-1]))

    def call(self, features: list[Any]) -> Any:
        parts = []
        for layer, level in zip(self.normalisations, features, strict=True):
            level = ops.cast(level, "float32")
            mean = ops.mean(level, axis=1, keepdims=True)
            deviation = ops.sqrt(ops.mean(ops.square(level - mean), axis=1) + 1e-6)
            if level.shape[1] > 1:
                change = ops.mean(ops.abs(level[:, 1:] - level[:, :-1]), axis=1)
            else:
                change = ops.zeros_like(deviation)
            statistics = ops.concatenate([mean[:, 0], deviation, change], axis=-1)
            parts.append(layer(ops.cast(statistics, self.compute_dtype)))
        return ops.concatenate(parts, axis=-1)

    def compute_output_shape(self, input_shape: list[tuple]) -> tuple:
        return (input_shape[0][0], 3 * sum(shape[-1] for shape in input_shape))


@keras.saving.register_keras_serializable(package="sora")
class GramMatrix(keras.layers.Layer):
    """Second-order fusion: n vectors of width d become their d x d Gram matrix, power-normalised.

    The article's worked case: ten frames give ten 256-vectors, fused into one 256x256 matrix. `vectors^T vectors / n`,
    then the signed square root and the L2 norm of Lin and Maji 2017, "Improved Bilinear Pooling with CNNs"; both in
    float32 whatever the policy. The root is taken as x / sqrt(|x| + 1e-5), whose slope stays finite at 0.

    Input shape: `(batch, n, d)`.
    Output shape: `(batch, d, d)`, symmetric, of norm 1 (0 for vectors of zeros).

    Example: `GramMatrix()(ops.ones((1, 10, 256))).shape == (1, 256, 256)`.
    """

    def call(self, vectors: Any) -> Any:
        vectors = ops.cast(vectors, "float32")
        gram = ops.matmul(ops.transpose(vectors, (0, 2, 1)), vectors) / vectors.shape[1]
        gram = gram / ops.sqrt(ops.abs(gram) + 1e-5)
        norm = ops.sqrt(ops.sum(ops.square(gram), axis=(1, 2), keepdims=True) + 1e-12)
        return ops.cast(gram / norm, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (input_shape[0], input_shape[2], input_shape[2])


@keras.saving.register_keras_serializable(package="sora")
class GramFusion(keras.layers.Layer):
    """Every level's per-frame vectors, brought to one width, and the upper triangle of their Gram matrix.

    The matrix is symmetric: its upper triangle holds all of it. It is multiplied by d, so that the dense layer that
    follows gets entries of order 1.

    Arguments:
        width: d, the common width.

    Input: a list of `(batch, time_i, channels_i)`; n = sum(time_i).
    Output shape: `(batch, d * (d + 1) / 2)`.

    Example: `GramFusion(64)([low_level, high_level])`.
    """

    def __init__(self, width: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.gram = GramMatrix(dtype=self.dtype_policy)
        self.projections: list[Any] = []
        self.normalisations: list[Any] = []

    def build(self, input_shape: list[tuple]) -> None:
        self.projections = [
            keras.layers.Dense(self.width, use_bias=False, dtype=self.dtype_policy) for _ in input_shape
        ]
        self.normalisations = [keras.layers.LayerNormalization(dtype=self.dtype_policy) for _ in input_shape]
        for dense, norm, shape in zip(self.projections, self.normalisations, input_shape, strict=True):
            dense.build(shape)
            norm.build((*shape[:-1], self.width))

    def call(self, features: list[Any]) -> Any:
        pairs = zip(self.projections, self.normalisations, features, strict=True)
        vectors = ops.concatenate([norm(dense(level)) for dense, norm, level in pairs], axis=1)
        matrix = self.gram(vectors) * self.width
        rows = [matrix[:, row, row:] for row in range(self.width)]
        return ops.concatenate(rows, axis=-1)

    def compute_output_shape(self, input_shape: list[tuple]) -> tuple:
        return (input_shape[0][0], self.width * (self.width + 1) // 2)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}
