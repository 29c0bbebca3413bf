"""The two-branch residual fusion classifier, put together.

    clip (T,H,W,3) uint8 ─┬─ Motion ── low network (narrow, every frame) ──┐ a vector a frame
                          │                                                ├─ and level ── fusion ── embedding ── logits
                          └─ KeyFrames ── high network (wide, few frames) ─┘

The reference article's reading: the low-dimensional features (motion, few channels) and the high-dimensional ones
(appearance, many channels) each go through a deep residual network of their own; features of several levels are fused.
"""

from __future__ import annotations

import keras

from sora.model.fusion import ConcatFusion, GramFusion
from sora.model.streams import KeyFrames, Motion, ResidualStream
from sora.records import ClipSpec
from sora.settings import Model


def build(config: Model, clip: ClipSpec, classes: int) -> keras.Model:
    """A new model with random weights (from Keras's global seed).

    Input shape: `(batch, clip.frames, clip.height, clip.width, 3)` uint8, pixels as decoded: scaling is inside.
    Output shape: `(batch, classes)` float32 logits. The layer "embedding" gives `(batch, config.embedding)`.

    Raises:
        ValueError: fewer than 2 classes, or more key frames than frames.
    """
    if classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, received {classes}")
    clips = keras.Input((clip.frames, clip.height, clip.width, 3), dtype="uint8", name="clip")
    low = ResidualStream(config.low_filters, blocks=config.blocks, name="low")(Motion(name="motion")(clips))
    high = ResidualStream(config.high_filters, blocks=config.blocks, name="high")(
        KeyFrames(config.key_frames, name="key_frames")(clips)
    )
    fusion = GramFusion(config.gram_width, name="gram") if config.fusion == "gram" else ConcatFusion(name="concat")
    x = fusion([*low, *high])
    x = keras.layers.Dropout(config.dropout, name="dropout")(x)
    x = keras.layers.Dense(config.embedding, activation="gelu", name="embedding")(x)
    x = keras.layers.Dropout(config.dropout, name="embedding_dropout")(x)
    # float32 under any policy: softmax and temperature need the digits.
    logits = keras.layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(clips, logits, name="sora")


def embedding_model(model: keras.Model) -> keras.Model:
    """The part of `model` up to its representation: clips → `(batch, embedding)`. Shares the weights."""
    return keras.Model(model.input, model.get_layer("embedding").output, name="sora_embedding")
