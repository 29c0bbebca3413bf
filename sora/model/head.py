"""The last step of a binary classifier."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from sora.core.tensors import Shape


@keras.saving.register_keras_serializable(package="sora")
class BinaryLogits(keras.layers.Layer):
    """One logit becomes the pair (0, logit).

    The softmax of the pair is (1 - sigmoid, sigmoid) of the logit, its cross-entropy the binary one, and dividing by a
    temperature commutes: a binary model trains, is calibrated, evaluated and served as any other.

    Input shape: `(batch, 1)`.
    Output shape: `(batch, 2)`.

    Example: `BinaryLogits()(keras.layers.Dense(1)(x))`.
    """

    def call(self, logit: Any) -> Any:
        return ops.concatenate([ops.zeros_like(logit), logit], axis=-1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], 2)
