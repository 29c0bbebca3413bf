"""Which moments and which regions speak for a class: Grad-CAM on both networks, at every level.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization": feature maps,
weighted by the gradient of the class's score with respect to their mean over the picture. Both networks of the
classifier end in such means (`streams.pooled`), a vector per frame and level, so the gradient does not go back through
the convolutions: a call costs one pass of the model and a gradient of its small head.

Departs: maps of every level are summed, since the fusion reads them all; a frame has its own weights; and the score
is the class's log-odds (`log_odds` of `sora.tasks`), not its logit, since a number added to all logits of a softmax
changes no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from sora.core.errors import ServiceError
from sora.model import streams


@dataclass(frozen=True, slots=True)
class Parts:
    """A classifier cut in two where its feature maps are averaged over the picture.

    `maps` takes clips, `(batch, time, height, width, rgb)`, and gives each level's maps, `(batch, time_i, height_i,
    width_i, channels_i)`: the low network's levels, then the high one's. `head` takes as many `(batch, time_i,
    channels_i)`, then the tensors `others`, and gives logits. `key_frames` is how many frames the high network sees; 0:
    there is none.
    """

    maps: Callable[[Any], list[Any]]
    head: keras.Model
    key_frames: int
    others: tuple[str, ...]


def split(model: keras.Model) -> Parts:
    """The two parts of a model made by `classifier.build`. They share its weights.

    Raises:
        ServiceError: no network of the model sees every frame, or its backbone gives no maps.
    """
    layers = {layer.name: layer for layer in model.layers}
    low, high = layers.get("low"), layers.get("high")
    if low is None and (high is None or layers["key_frames"].count < model.inputs[0].shape[1]):
        raise ServiceError(
            "this model has no network that sees every frame, so it can't tell moments apart",
            fix="explain a model that sees every frame: the presets `small` or `appearance`",
        )
    if high is not None and not hasattr(high, "feature_maps"):
        raise ServiceError(
            "this model's backbone gives no maps of its pictures, so it can't tell regions apart",
            fix="explain a model with a backbone that comes with Sora, or with `model.streams: low`",
        )
    joining = [layer for name, layer in layers.items() if name.startswith("lateral_")]

    def maps(clips: Any) -> list[Any]:
        lower: list[Any] = []
        stem: Any = None
        if low is not None:
            stem, *lower = low.feature_maps(layers["motion"](clips), training=False)
        if high is None:
            return lower
        seen = layers["key_frames"](clips)
        if joining:
            seen = [seen, *(join(each) for join, each in zip(joining, [stem, *lower], strict=False))]
        return [*lower, *high.feature_maps(seen, training=False)[1:]]

    # A network of one level has no list; one that others join returns its maps after its levels.
    levels = keras.tree.flatten(low.output)[: len(low.filters)] if low is not None else []
    if high is not None:
        levels += keras.tree.flatten(high.output)
    others = {one.name: one for one in model.inputs[1:]}
    head = keras.Model([*levels, *others.values()], model.output)
    return Parts(maps, head, layers["key_frames"].count if high is not None else 0, tuple(others))


def pooled(maps: Sequence[Any]) -> list[Any]:
    """The features that the head reads from each level's maps."""
    return [streams.pooled(level) for level in maps]


def evidence(maps: Sequence[Any], gradients: Sequence[Any], key_frames: int) -> Any:
    """How much each place of each frame speaks for the class (above 0) or against it (below 0).

    Each level's maps times its gradients, resized to the finest level and summed. All levels are in units of the score
    and can be summed: the mean over the picture, summed over frames, is the level's first-order share of it. What a
    key frame shows is divided evenly among the frames that it stands for.

    Input: for one clip, a list of `(1, time_i, height_i, width_i, channels_i)` and one of `(1, time_i, channels_i)`.
    Output shape: `(time, height, width)` of the first, finest level, float32.
    """
    time, rows, columns = maps[0].shape[1:4]
    total = ops.zeros((time, rows, columns), "float32")
    for level, gradient in zip(maps, gradients, strict=True):
        share = ops.einsum("thwc,tc->thw", ops.cast(level[0], "float32"), ops.cast(gradient[0], "float32"))
        if share.shape[1:] != (rows, columns):
            share = ops.image.resize(share[..., None], (rows, columns), interpolation="bilinear")[..., 0]
        if share.shape[0] != time:
            lengths = part_lengths(time, key_frames)
            share = ops.concatenate(
                [ops.repeat(share[part : part + 1] / length, length, axis=0) for part, length in enumerate(lengths)]
            )
        total = total + share
    return total


def part_lengths(time: int, count: int) -> list[int]:
    """How many frames each of `count` key frames stands for: the parts that `streams.key_frames` has the middles of."""
    return [(part + 1) * time // count - part * time // count for part in range(count)]
