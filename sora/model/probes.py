"""Probes: logistic regression on features that are computed, not learned here.

    video ── key frames ── frozen backbone ── OverTime ──┐  standardised and rotated      ┌─ logits
                                                         ├─────── "embedding" ────────────┤
    flow ─────────────────────────────── RbfKernel ──────┘

`appearance` reads what a backbone sees in every frame (Alain and Bengio 2016, "Understanding intermediate layers using
linear classifier probes") and how that changes. `motion` reads the histograms of optical flow (`sora.media.video.flow`)
through a Gaussian kernel on the training clips. `both` weighs the logits of the two.

The weights are solved to their optimum by `sora.learning.probing`, not by gradient steps on batches. "embedding" is a
rotation of the features, so it loses nothing, and the logits are linear in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import ops

from sora.config import Model
from sora.core.records import ClipSpec
from sora.core.tensors import FLOW, VIDEO, Shape
from sora.media import MODALITY
from sora.model import pretrained
from sora.model.backbone import BackboneStream, stream
from sora.model.streams import KeyFrames

STATISTICS = 4  # of each channel, see `over_time`


def over_time(frames: np.ndarray) -> np.ndarray:
    """Mean, deviation, mean absolute change and mean absolute second change over time.

    The same as the layer `OverTime`, for the bank's tensors.

    Input shape: `(clips, time, channels)`, time 2 or more; of 2 frames there is no second change: it is 0.
    Output shape: `(clips, 4 * channels) float32`.
    """
    x = frames.astype(np.float32)
    change = np.diff(x, axis=1)
    again = np.diff(change, axis=1) if x.shape[1] > 2 else np.zeros_like(change)
    parts = (x.mean(1), x.std(1), np.abs(change).mean(1), np.abs(again).mean(1))
    return np.concatenate(parts, axis=1)


@keras.saving.register_keras_serializable(package="sora")
class OverTime(keras.layers.Layer):
    """Statistics over time of every level's channels, as `over_time`.

    Input: a list of `(batch, time, channels_i)`.
    Output shape: `(batch, 4 * sum(channels_i))` float32.

    Example: `OverTime()(BackboneStream("efficientnet-lite0")(pictures))`.
    """

    def call(self, levels: Any) -> Any:
        levels = levels if isinstance(levels, list | tuple) else [levels]
        x = ops.concatenate([ops.cast(level, "float32") for level in levels], axis=-1)
        change = x[:, 1:] - x[:, :-1]
        again = change[:, 1:] - change[:, :-1] if x.shape[1] > 2 else ops.zeros_like(change)
        mean = ops.mean(x, axis=1, keepdims=True)
        # Below the rounding of the bank's half precision; a root's gradient at 0 has no end.
        deviation = ops.sqrt(ops.mean(ops.square(x - mean), axis=1) + 1e-12)
        parts = [mean[:, 0], deviation, ops.mean(ops.abs(change), axis=1), ops.mean(ops.abs(again), axis=1)]
        return ops.concatenate(parts, axis=-1)

    def compute_output_shape(self, input_shape: Any) -> Shape:
        shapes = input_shape if isinstance(input_shape, list) else [input_shape]
        return (shapes[0][0], STATISTICS * sum(shape[-1] for shape in shapes))


@keras.saving.register_keras_serializable(package="sora")
class RbfKernel(keras.layers.Layer):
    """Similarity to known vectors: `exp(-width * |x - anchor|²)`, of vectors that are standardised first.

    Arguments:
        anchors: how many known vectors.

    Input shape: `(batch, channels)`.
    Output shape: `(batch, anchors)` float32.

    Example: `RbfKernel(200)(flow)`.
    """

    def __init__(self, anchors: int, **options: Any) -> None:
        super().__init__(**options)
        self.anchors = anchors

    def build(self, input_shape: Shape) -> None:
        channels = input_shape[-1]
        self.mean = self.add_weight(name="mean", shape=(channels,), initializer="zeros", trainable=False)
        self.scale = self.add_weight(name="scale", shape=(channels,), initializer="ones", trainable=False)
        self.places = self.add_weight(
            name="places", shape=(self.anchors, channels), initializer="zeros", trainable=False
        )
        self.width = self.add_weight(name="width", shape=(), initializer="ones", trainable=False)

    def call(self, x: Any) -> Any:
        x = (ops.cast(x, "float32") - self.mean) / self.scale
        squares = ops.sum(ops.square(x), axis=1, keepdims=True) + ops.sum(ops.square(self.places), axis=1)
        distance = squares - 2 * ops.matmul(x, ops.transpose(self.places))
        return ops.exp(-self.width * ops.maximum(distance, 0.0))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], self.anchors)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "anchors": self.anchors}


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ kernel + bias`: `(inputs, outputs) float32` and `(outputs,) float32`."""

    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        result: np.ndarray = x @ self.kernel + self.bias
        return result

    def scaled(self, factor: float) -> Linear:
        return Linear(self.kernel * np.float32(factor), self.bias * np.float32(factor))


@dataclass(frozen=True, slots=True)
class Kernel:
    """The weights of `RbfKernel`."""

    mean: np.ndarray
    scale: np.ndarray
    anchors: np.ndarray
    width: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """As the layer: `(n, channels)` → `(n, anchors)`."""
        x = (x.astype(np.float32) - self.mean) / self.scale
        squares = (x * x).sum(1)[:, None] + (self.anchors * self.anchors).sum(1)
        result: np.ndarray = np.exp(-self.width * np.maximum(squares - 2 * x @ self.anchors.T, 0))
        return result


@dataclass(frozen=True, slots=True)
class Branch:
    """One solved probe. `features` names what it reads: "appearance" or "motion"."""

    features: str
    kernel: Kernel | None
    embedding: Linear
    logits: Linear

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logits of `(clips, channels)`: `over_time` of the bank's tensor, or the tensor `flow`."""
        x = features.astype(np.float32) if self.kernel is None else self.kernel(features)
        return self.logits(self.embedding(x))


def assemble(config: Model, clip: ClipSpec, branches: Sequence[Branch]) -> keras.Model:
    """The model of solved probes: from clips to `(batch, classes)` logits, the sum of the branches'.

    Its inputs are those tensors of a clip that the branches read. The layer "embedding" gives their vectors side by
    side. The backbone has its published weights.

    Raises:
        InputError, ServiceError: those weights are missing, damaged or can't be downloaded.
    """
    tensors = MODALITY.tensors(clip)
    inputs, vectors = [], []
    for branch in branches:
        name = VIDEO if branch.features == "appearance" else FLOW
        taken = keras.Input(tensors[name].shape, dtype=tensors[name].dtype, name=name)
        inputs.append(taken)
        if name == VIDEO:
            high = stream(config.backbone, trainable=False, name="high")
            x = OverTime(name="over_time", dtype="float32")(high(KeyFrames(clip.frames, name="key_frames")(taken)))
            if isinstance(high, BackboneStream):
                pretrained.give(high)
        else:
            assert branch.kernel is not None
            layer = RbfKernel(len(branch.kernel.anchors), name="kernel", dtype="float32")
            x = layer(taken)
            layer.set_weights(
                [branch.kernel.mean, branch.kernel.scale, branch.kernel.anchors, np.float32(branch.kernel.width)]
            )
        name = "embedding" if len(branches) == 1 else f"{branch.features}_embedding"
        vectors.append(_dense(branch.embedding, name)(x))
    embedding = keras.layers.Concatenate(name="embedding")(vectors) if len(vectors) > 1 else vectors[0]
    kernel = np.concatenate([branch.logits.kernel for branch in branches])
    bias = sum((branch.logits.bias for branch in branches), np.zeros_like(branches[0].logits.bias))
    logits = _dense(Linear(kernel, bias), "logits")(embedding)
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, logits, name="sora")


def untrained(config: Model, clip: ClipSpec, classes: int, clips: int = 200) -> keras.Model:
    """A model of the size that `clips` training clips would give, all of whose answers are equal. For `auto` it is the
    largest of the probes that it may choose.
    """
    features = {"appearance": ("appearance",), "motion": ("motion",)}.get(config.probe, ("appearance", "motion"))
    shape = MODALITY.tensors(replace(clip, flow=clip.flow or 1))[FLOW].shape
    branches = []
    for one in features:
        channels = clips if one == "motion" else STATISTICS * sum(stream(config.backbone, trainable=False).channels)
        kernel = Kernel(
            np.zeros(shape, np.float32), np.ones(shape, np.float32), np.zeros((clips, *shape), np.float32), 1.0
        )
        embedding = Linear(np.zeros((channels, clips), np.float32), np.zeros(clips, np.float32))
        logits = Linear(np.zeros((clips, classes), np.float32), np.zeros(classes, np.float32))
        branches.append(Branch(one, kernel if one == "motion" else None, embedding, logits))
    return assemble(config, replace(clip, flow=clip.flow or 1), branches)


def _dense(weights: Linear, name: str) -> keras.layers.Layer:
    layer = keras.layers.Dense(weights.kernel.shape[1], dtype="float32", name=name, trainable=False)
    layer.build((None, weights.kernel.shape[0]))
    layer.set_weights([weights.kernel, weights.bias])
    return layer
