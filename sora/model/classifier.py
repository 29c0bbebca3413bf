"""The two-branch residual fusion classifier, put together.

    clip (T,H,W,3) uint8 ─┬─ Motion ── low network (narrow, every frame) ──┐ a vector a frame
                          │                                                ├─ and level ── fusion ── embedding ── logits
                          └─ KeyFrames ── high network (wide, few frames) ─┘

The reference article's reading: the low-dimensional features (motion, few channels) and the high-dimensional ones
(appearance, many channels) each go through their own deep residual network; features of several levels are fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras

from sora.config import Model
from sora.core.records import ClipSpec
from sora.core.tensors import FLOW, VIDEO, TensorSpec
from sora.media import MODALITY
from sora.model import backbone, probes
from sora.model.fusion import ConcatFusion, GatedFusion, GramFusion
from sora.model.head import BinaryLogits
from sora.model.lateral import Lateral
from sora.model.streams import KeyFrames, Motion, ResidualStream


def build(config: Model, clip: ClipSpec, classes: int) -> keras.Model:
    """A new model with random weights (from Keras's global seed); `pretrained.load` gives a backbone its own. Of a
    probe an unsolved one, to be looked at.

    Input: named `video`, `(batch, clip.frames, clip.height, clip.width, 3)` uint8, pixels as decoded: scaling is
    inside.
    Output shape: `(batch, classes)` float32 logits; with a multi-label head each is for its own sigmoid. The
    layer "embedding" gives `(batch, config.embedding)`.

    Raises:
        ValueError: fewer than 2 classes, a binary head for more, more key frames than frames, or a vector per frame of
            networks that see different frames.
    """
    if classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, received {classes}")
    if config.head == "binary" and classes != 2:
        raise ValueError(f"a binary head needs 2 classes, received {classes}")
    if config.solved:
        return probes.untrained(config, clip, classes)
    clips = keras.Input((clip.frames, clip.height, clip.width, 3), dtype="uint8", name=VIDEO)
    features = _features(config, clips)
    x = _fusion(config)(features)
    x = keras.layers.Dropout(config.dropout, name="dropout")(x)
    x = keras.layers.Dense(config.embedding, activation="gelu", name="embedding")(x)
    x = keras.layers.Dropout(config.dropout, name="embedding_dropout")(x)
    # float32 under any policy: softmax and temperature need the digits.
    if config.head == "binary":
        logits = BinaryLogits(dtype="float32", name="logits")(keras.layers.Dense(1, dtype="float32", name="logit")(x))
    else:  # a multi-label head's logits differ only in their use
        logits = keras.layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(clips, logits, name="sora")


def _features(config: Model, clips: Any) -> list[Any]:
    """The features of every level of the networks in `config.streams`, low one first: `(batch, time, channels)`."""
    options: dict[str, Any] = {"blocks": config.blocks, "shift": config.shift}
    low: list[Any] = []
    maps: list[Any] = []
    if config.streams != "high":
        low = ResidualStream(config.low_filters, maps=config.lateral, name="low", **options)(
            Motion(name="motion")(clips)
        )
        low, maps = low[: len(config.low_filters)], low[len(config.low_filters) :]
    if config.streams == "low":
        return low
    seen = KeyFrames(config.key_frames, name="key_frames")(clips)
    joining = [
        # Twice the map's channels, as in SlowFast.
        Lateral(2 * map_.shape[-1], config.key_frames, name=f"lateral_{number}")(map_)
        for number, map_ in enumerate(maps[: len(config.high_filters)], 1)
    ]
    if config.backbone == "residual":
        high = ResidualStream(config.high_filters, name="high", **options)([seen, *joining] if joining else seen)
    else:
        high = backbone.stream(config.backbone, trainable=config.backbone_trainable, name="high")(seen)
    return [*low, *high]


def _fusion(config: Model) -> keras.layers.Layer:
    if config.fusion == "gram":
        return GramFusion(config.gram_width, vectors=config.gram_vectors, name="gram")
    if config.fusion == "gated":
        return GatedFusion(config.gated_width, name="gated")
    return ConcatFusion(name="concat")


def fed(model: keras.Model, tensors: Mapping[str, Any]) -> Any:
    """The arguments for a model, so that each of its inputs gets the tensor of its name.

    A model's only input takes `video` if no tensor has its name: earlier versions called it `clip`.

    Raises:
        ValueError: an input asks for a missing tensor.
    """
    names = [one.name for one in inputs(model)]
    lacking = [name for name in names if name not in tensors]
    if lacking:
        raise ValueError(f"the model asks for the tensor {lacking[0]!r}, but the clips have {', '.join(tensors)}")
    arrays = [tensors[name] for name in names]
    return arrays[0] if len(arrays) == 1 else arrays


def inputs(model: keras.Model) -> list[TensorSpec]:
    """The tensors that a model takes, in its order."""
    named = [TensorSpec(one.name, one.dtype, tuple(one.shape[1:])) for one in model.inputs]
    return [replace(named[0], name=VIDEO)] if len(named) == 1 and named[0].name != FLOW else named


def misfit(model: keras.Model, clip: ClipSpec, classes: int) -> str:
    """Why a model can't take clips of this spec or does not answer for so many classes; "" if it does."""
    there = MODALITY.tensors(clip)
    for one in inputs(model):
        if one.name not in there:
            return f"it asks for the tensor {one.name!r}, but the clips have {', '.join(there)}"
        if one.shape != there[one.name].shape:
            return f"it takes {one.name} of {one.shape}, but the clips have {there[one.name].shape}"
    if model.output_shape != (None, classes):
        return f"it answers with {model.output_shape}, but there are {classes} classes"
    return ""


def embedding_model(model: keras.Model) -> keras.Model:
    """The part of `model` up to its representation: clips → `(batch, embedding)`. Shares the weights."""
    return keras.Model(model.input, model.get_layer("embedding").output, name="sora_embedding")
