"""Fusion: per-frame features of every level of both networks become one vector per clip."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from sora.core.tensors import Shape


def _statistics(level: Any) -> Any:
    """Mean, deviation and mean absolute change over time: `(batch, time, channels)` → `(batch, 3 * channels)` float32.

    The mean says what is seen, the deviation how much it varies, the change how fast; for one frame only the mean is
    known (the other two are 0).
    """
    level = ops.cast(level, "float32")
    mean = ops.mean(level, axis=1, keepdims=True)
    deviation = ops.sqrt(ops.mean(ops.square(level - mean), axis=1) + 1e-6)
    if level.shape[1] > 1:
        change = ops.mean(ops.abs(level[:, 1:] - level[:, :-1]), axis=1)
    else:
        change = ops.zeros_like(deviation)
    return ops.concatenate([mean[:, 0], deviation, change], axis=-1)


@keras.saving.register_keras_serializable(package="sora")
class ConcatFusion(keras.layers.Layer):
    """The statistics over time of every level's features (see `_statistics`), side by side.

    Each level is normalised by itself, so that deep levels do not drown early ones.

    Input: a list of `(batch, time_i, channels_i)`.
    Output shape: `(batch, 3 * sum(channels_i))`.

    Example: `ConcatFusion()([low_level, high_level])`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.normalisations: list[Any] = []

    def build(self, input_shape: list[Shape]) -> None:
        self.normalisations = [keras.layers.LayerNormalization(dtype=self.dtype_policy) for _ in input_shape]
        for layer, shape in zip(self.normalisations, input_shape, strict=True):
            layer.build((shape[0], 3 * shape[-1]))

    def call(self, features: list[Any]) -> Any:
        pairs = zip(self.normalisations, features, strict=True)
        parts = [layer(ops.cast(_statistics(level), self.compute_dtype)) for layer, level in pairs]
        return ops.concatenate(parts, axis=-1)

    def compute_output_shape(self, input_shape: list[Shape]) -> Shape:
        return (input_shape[0][0], 3 * sum(shape[-1] for shape in input_shape))


@keras.saving.register_keras_serializable(package="sora")
class GatedFusion(keras.layers.Layer):
    """Every level's statistics over time, projected to one width and mixed by gates that the clip itself sets.

    Arevalo et al. 2017, "Gated Multimodal Units for Information Fusion": h_i = tanh(W_i x_i), the result is the sum of
    z_i * h_i. Departs in the gates z: they are made from the mean of the h_i instead of all x_i side by side, and sum
    to 1 over the levels, as in Li et al. 2019, "Selective Kernel Networks"; with six levels the paper's own gates would
    hold more weights than both networks.

    Arguments:
        width: of the result and of each level's h.

    Input: a list of `(batch, time_i, channels_i)`.
    Output shape: `(batch, width)`, entries in -1 to 1.

    Example: `GatedFusion(128)([low_level, high_level])`.
    """

    def __init__(self, width: int = 128, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.normalisations: list[Any] = []
        self.projections: list[Any] = []
        self.gates: Any = None

    def build(self, input_shape: list[Shape]) -> None:
        dtype = self.dtype_policy
        self.normalisations = [keras.layers.LayerNormalization(dtype=dtype) for _ in input_shape]
        self.projections = [keras.layers.Dense(self.width, activation="tanh", dtype=dtype) for _ in input_shape]
        for norm, dense, shape in zip(self.normalisations, self.projections, input_shape, strict=True):
            norm.build((shape[0], 3 * shape[-1]))
            dense.build((shape[0], 3 * shape[-1]))
        if len(input_shape) > 1:  # a single level needs no weighing
            self.gates = keras.layers.Dense(len(input_shape) * self.width, dtype=dtype)
            self.gates.build((input_shape[0][0], self.width))

    def call(self, features: list[Any]) -> Any:
        levels = zip(self.normalisations, self.projections, features, strict=True)
        vectors = [dense(norm(ops.cast(_statistics(x), self.compute_dtype))) for norm, dense, x in levels]
        if self.gates is None:
            return vectors[0]
        h = ops.stack(vectors, axis=1)
        gates = ops.reshape(self.gates(ops.mean(h, axis=1)), (-1, len(vectors), self.width))
        return ops.sum(ops.softmax(gates, axis=1) * h, axis=1)

    def compute_output_shape(self, input_shape: list[Shape]) -> Shape:
        return (input_shape[0][0], self.width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


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

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], input_shape[2], input_shape[2])


@keras.saving.register_keras_serializable(package="sora")
class GramFusion(keras.layers.Layer):
    """Per-frame vectors, projected to one width, and the upper triangle of their Gram matrix.

    The matrix is symmetric: its upper triangle has all of it. It is multiplied by d, so that the dense layer that
    follows gets entries of order 1.

    Arguments:
        width: d, the common width.
        vectors: "level", a vector of each level and frame, n = sum(time_i); or "frame", all levels of a frame side by
            side as one vector, n = time. The article's case is the latter.

    Input: a list of `(batch, time_i, channels_i)`; with "frame" all of the same time.
    Output shape: `(batch, d * (d + 1) / 2)`.

    Raises:
        ValueError: "frame" and levels of different times.

    Example: `GramFusion(64)([low_level, high_level])`.
    """

    def __init__(self, width: int = 64, *, vectors: str = "level", **options: Any) -> None:
        super().__init__(**options)
        if vectors not in ("level", "frame"):
            raise ValueError(f"vectors must be 'level' or 'frame', received {vectors!r}")
        self.width, self.vectors = width, vectors
        self.gram = GramMatrix(dtype=self.dtype_policy)
        self.projections: list[Any] = []
        self.normalisations: list[Any] = []

    def build(self, input_shape: list[Shape]) -> None:
        shapes = input_shape
        if self.vectors == "frame":
            times = sorted({shape[1] for shape in input_shape})
            if len(times) > 1:
                raise ValueError(f"one vector per frame needs levels with the same frames, received {times} frames")
            shapes = [(*input_shape[0][:2], sum(shape[-1] for shape in input_shape))]
        self.projections = [keras.layers.Dense(self.width, use_bias=False, dtype=self.dtype_policy) for _ in shapes]
        self.normalisations = [keras.layers.LayerNormalization(dtype=self.dtype_policy) for _ in shapes]
        for dense, norm, shape in zip(self.projections, self.normalisations, shapes, strict=True):
            dense.build(shape)
            norm.build((*shape[:-1], self.width))
        self.gram.build((shapes[0][0], sum(shape[1] for shape in shapes), self.width))

    def projected(self, features: list[Any]) -> Any:
        """The n vectors: `(batch, n, d)`."""
        if self.vectors == "frame":
            features = [ops.concatenate(features, axis=-1)]
        triples = zip(self.projections, self.normalisations, features, strict=True)
        return ops.concatenate([norm(dense(level)) for dense, norm, level in triples], axis=1)

    def call(self, features: list[Any]) -> Any:
        matrix = self.gram(self.projected(features)) * self.width
        rows = [matrix[:, row, row:] for row in range(self.width)]
        return ops.concatenate(rows, axis=-1)

    def compute_output_shape(self, input_shape: list[Shape]) -> Shape:
        return (input_shape[0][0], self.width * (self.width + 1) // 2)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width, "vectors": self.vectors}
