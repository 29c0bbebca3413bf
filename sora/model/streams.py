"""The two inputs and the residual network that each goes through.

Feichtenhofer et al. 2019, "SlowFast Networks for Video Recognition": a narrow network on every frame for motion, a wide
one on few frames for appearance. Departs: the narrow network sees signed differences of brightness instead of colour,
lateral connections are optional (see `lateral`), and features are taken at every level of both networks, not only at
the last.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from sora.core.tensors import Shape
from sora.model.residual import FrameConv, ResidualBlock

_LUMA = (0.299, 0.587, 0.114)  # BT.601


@keras.saving.register_keras_serializable(package="sora")
class Motion(keras.layers.Layer):
    """Brightness and its signed change to the previous and to the next frame: what the low network sees.

    With both changes beside the brightness, the first convolution can hold filters that are oriented in space *and*
    time, hence tell left from right. Brightness is centred and scaled by the clip's own mean and deviation, the changes
    by their own root mean square: exposure and contrast drop out. At either end the missing change is 0.

    Input shape: `(batch, time, height, width, rgb)`, uint8 or float in 0 to 255.
    Output shape: `(batch, time, height, width, 3)` float: brightness, change since, change until.

    Example: `Motion()(clips)`.
    """

    def call(self, clips: Any) -> Any:
        # In float32 whatever the policy: squares of differences of bytes overflow half precision.
        x = ops.cast(clips, "float32") / 255.0
        luma = x[..., 0:1] * _LUMA[0] + x[..., 1:2] * _LUMA[1] + x[..., 2:3] * _LUMA[2]
        change = luma[:, 1:] - luma[:, :-1]
        nothing = ops.zeros_like(luma[:, :1])
        everything = (1, 2, 3, 4)
        size = ops.sqrt(ops.mean(ops.square(change), axis=everything, keepdims=True) + 1e-4)
        change = change / size
        mean = ops.mean(luma, axis=everything, keepdims=True)
        deviation = ops.sqrt(ops.mean(ops.square(luma - mean), axis=everything, keepdims=True) + 1e-4)
        since = ops.concatenate([nothing, change], axis=1)
        until = ops.concatenate([change, nothing], axis=1)
        result = ops.concatenate([(luma - mean) / deviation, since, until], axis=-1)
        return ops.cast(result, self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], 3)


@keras.saving.register_keras_serializable(package="sora")
class KeyFrames(keras.layers.Layer):
    """Evenly spaced frames, colours scaled to -1 to 1: what the high network sees.

    Arguments:
        count: frames kept, the middles of as many equal parts of the clip; at most the clip's frames.

    Input shape: `(batch, time, height, width, rgb)`, uint8 or float in 0 to 255.
    Output shape: `(batch, count, height, width, rgb)` float.

    Example: `KeyFrames(4)(clips)`.
    """

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(**options)
        self.count = count

    def call(self, clips: Any) -> Any:
        time = clips.shape[1]
        # One slice per frame: `ops.take` with a list would be a gather, whose gradient is slower than a slice's.
        chosen = [clips[:, index : index + 1] for index in key_frames(time, self.count)]
        x = ops.cast(ops.concatenate(chosen, axis=1), self.compute_dtype)
        return x / 127.5 - 1.0

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], len(key_frames(input_shape[1], self.count)), *input_shape[2:])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "count": self.count}


def pooled(maps: Any) -> Any:
    """The mean over the picture: `(batch, time, height, width, channels)` → `(batch, time, channels)`."""
    return ops.mean(maps, axis=(2, 3))


def key_frames(time: int, count: int) -> tuple[int, ...]:
    """Indices of `count` of `time` frames: the middles of `count` equal parts.

    Raises:
        ValueError: more frames are wanted than there are.
    """
    if not 1 <= count <= time:
        raise ValueError(f"key frames must be 1 to the clip's {time} frames, received {count}")
    return tuple((2 * part + 1) * time // (2 * count) for part in range(count))


@keras.saving.register_keras_serializable(package="sora")
class ResidualStream(keras.layers.Layer):
    """A residual network on every frame that returns each level's features.

    A stem (3x3, stride 2) and `blocks` residual blocks per level; every level halves height and width.
    Each level's features are averaged over the picture: one vector per frame.

    Arguments:
        filters: of each level.
        blocks: residual blocks per level.
        shift: fraction of the channels shifted in time (see `residual.TemporalShift`).
        maps: also return the stem's and every level's maps, for another stream to join.

    Input shape: `(batch, time, height, width, channels)`, or a list of it and of maps that join, the first of them
    beside the stem's output, the next beside the first level's, and so on; at most one per level.
    Output: a list with `(batch, time, filters[level])` for each level; with `maps` followed by one more than levels of
    `(batch, time, height / 2, width / 2, filters[0])`, `(batch, time, height / 4, width / 4, filters[0])`, ….

    Example: `low, middle, high = ResidualStream((16, 32, 64))(Motion()(clips))`.
    """

    def __init__(
        self, filters: tuple[int, ...], *, blocks: int = 1, shift: float = 0.125, maps: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.filters, self.blocks, self.shift, self.maps = tuple(filters), blocks, shift, maps
        self.stem = FrameConv(self.filters[0], 3, stride=2, dtype=self.dtype_policy)
        self.levels = [
            ResidualBlock(width, stride=2 if not block else 1, shift=shift, dtype=self.dtype_policy)
            for width in self.filters
            for block in range(blocks)
        ]

    def build(self, input_shape: Any) -> None:
        own, *joining = _with_maps(input_shape)
        if len(joining) > len(self.filters):
            raise ValueError(f"{len(joining)} maps join a stream of {len(self.filters)} levels")
        self.stem.build(own)
        shape = self.stem.compute_output_shape(own)
        for number, block in enumerate(self.levels):
            if number % self.blocks == 0 and joining:
                shape = (*shape[:-1], shape[-1] + joining.pop(0)[-1])
            block.build(shape)
            shape = block.compute_output_shape(shape)

    def call(self, inputs: Any, training: bool | None = None) -> list[Any]:
        maps = self.feature_maps(inputs, training=training)
        features = [pooled(level) for level in maps[1:]]
        return features + maps if self.maps else features

    def feature_maps(self, inputs: Any, training: bool | None = None) -> list[Any]:
        """The stem's and each level's features before they are averaged: `(batch, time, height, width, channels)`."""
        x, *joining = inputs if isinstance(inputs, list | tuple) else [inputs]
        x = self.stem(x, training=training)
        maps = [x]
        for number, block in enumerate(self.levels):
            if number % self.blocks == 0 and joining:
                x = ops.concatenate([x, joining.pop(0)], axis=-1)
            x = block(x, training=training)
            if (number + 1) % self.blocks == 0:
                maps.append(x)
        return maps

    def compute_output_shape(self, input_shape: Any) -> list[Shape]:
        own = _with_maps(input_shape)[0]
        features: list[Shape] = [(*own[:2], width) for width in self.filters]
        if not self.maps:
            return features
        maps = [self.stem.compute_output_shape(own)]
        for width in self.filters:
            halves = (None if side is None else -(-side // 2) for side in maps[-1][2:4])
            maps.append((*own[:2], *halves, width))
        return features + maps

    def get_config(self) -> dict[str, Any]:
        own = {"filters": list(self.filters), "blocks": self.blocks, "shift": self.shift, "maps": self.maps}
        return {**super().get_config(), **own}


def _with_maps(input_shape: Any) -> list[Shape]:
    """The shapes of a stream's inputs; JSON turns tuples into lists."""
    several = isinstance(input_shape[0], list | tuple)
    return [tuple(shape) for shape in (input_shape if several else [input_shape])]
