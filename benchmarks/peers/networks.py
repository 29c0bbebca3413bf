"""Peers of Sora's classifier, written from their papers to be trained from scratch on the same clips.

Common departures: batch normalisation with momentum 0.9, as in Sora, since a small set makes a few hundred steps;
no stochastic depth; pixels are scaled inside.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import layers, ops

from benchmarks.peers import article
from sora.core.records import ClipSpec
from sora.core.tensors import Shape
from sora.model import cost

Triple = tuple[int, int, int]  # time, height, width


@keras.saving.register_keras_serializable(package="benchmarks")
class DepthwiseConv3D(layers.Layer):
    """Convolution over time, height and width of every channel by itself, without a bias.

    Keras has none, and TensorFlow has no gradient of a grouped Conv3D on a CPU. This is the same sum, as one 2-D
    depthwise convolution for each of the kernel's frames. Padded with zeros to the same size.

    Arguments:
        kernel_size: time (odd), height, width.
        stride: of height and width.

    Input shape: `(batch, time, height, width, channels)`.
    Output shape: `(batch, time, ceil(height / stride), ceil(width / stride), channels)`.
    """

    def __init__(self, kernel_size: Triple, stride: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.kernel_size, self.stride = tuple(kernel_size), stride

    def build(self, input_shape: Shape) -> None:
        # In this order He's initialisation sees the kernel's volume as the inputs of a neuron.
        self.kernel = self.add_weight(
            shape=(*self.kernel_size, input_shape[-1]), initializer="he_normal", name="kernel"
        )  # fmt: skip

    def call(self, x: Any) -> Any:
        time, reach = x.shape[1], self.kernel_size[0] // 2
        frames = ops.reshape(x, (-1, *x.shape[2:]))
        total = None
        for number in range(self.kernel_size[0]):
            if self.kernel_size[1:] == (1, 1) and self.stride == 1:
                part = frames * self.kernel[number, 0, 0]
            else:
                part = ops.depthwise_conv(
                    frames, ops.expand_dims(self.kernel[number], -1), strides=self.stride, padding="same"
                )  # fmt: skip
            part = ops.reshape(part, (-1, time, *part.shape[1:]))
            ahead = number - reach  # this part of the kernel sees the frame so far ahead of the one that it adds to
            width = min(abs(ahead), time)
            if ahead > 0:
                part = ops.pad(part[:, width:], [(0, 0), (0, width), (0, 0), (0, 0), (0, 0)])
            elif ahead < 0:
                part = ops.pad(part[:, : time - width], [(0, 0), (width, 0), (0, 0), (0, 0), (0, 0)])
            total = part if total is None else total + part
        return total

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        height, width = (-(-side // self.stride) for side in input_shape[2:4])
        return (*input_shape[:2], height, width, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kernel_size": self.kernel_size, "stride": self.stride}


def flops(model: keras.Model) -> int:
    """Floating-point operations of one clip, 2 a multiply-add, counted as `sora.model.cost.flops` does.

    Raises:
        TypeError: as there.
    """
    total = 0
    for layer in model.layers:
        if isinstance(layer, layers.Conv3D | DepthwiseConv3D):
            inputs = 1 if isinstance(layer, DepthwiseConv3D) else layer.input.shape[-1]
            total += 2 * math.prod(layer.output.shape[1:]) * math.prod(layer.kernel_size) * inputs
        else:
            total += cost.flops(layer)
    return total


def r3d_18(clip: ClipSpec, classes: int) -> keras.Model:
    """R3D-18: a residual network of 18 layers whose convolutions are all 3x3x3.

    Tran et al. 2018, "A Closer Look at Spatiotemporal Convolutions for Action Recognition", table 1. Shortcuts of a
    changing shape are 1x1x1 convolutions.

    Input shape: `(batch, clip.frames, clip.height, clip.width, 3)` uint8.
    Output shape: `(batch, classes)` logits.
    """
    clips, x = _pixels(clip)
    x = layers.ReLU()(_normalised(_convolution(x, 64, (3, 7, 7), (1, 2, 2))))
    for filters in (64, 128, 256, 512):
        for block in range(2):
            stride = 2 if filters > 64 and block == 0 else 1
            shortcut = x if stride == 1 else _normalised(_convolution(x, filters, (1, 1, 1), stride))
            x = layers.ReLU()(_normalised(_convolution(x, filters, (3, 3, 3), stride)))
            x = _normalised(_convolution(x, filters, (3, 3, 3)))
            x = layers.ReLU()(layers.Add()([x, shortcut]))
    x = layers.GlobalAveragePooling3D()(x)
    return keras.Model(clips, layers.Dense(classes)(x), name="r3d_18")


def x3d_xs(clip: ClipSpec, classes: int, frames: int | None = None) -> keras.Model:
    """X3D-XS: narrow inverted bottlenecks with depthwise 3x3x3 convolutions.

    Feichtenhofer 2020, "X3D: Expanding Architectures for Efficient Video Recognition": table 1, with the expansion of
    XS (width 2, bottleneck 2.25, depth 2.2), squeeze and excitation in every second block, and widths as in the
    author's code. The paper's own clip has 4 frames of 160x160.

    Arguments:
        frames: looks only at so many of the clip's frames, evenly spaced; None: at all.

    Input shape: `(batch, clip.frames, clip.height, clip.width, 3)` uint8.
    Output shape: `(batch, classes)` logits.

    Raises:
        ValueError: more frames than the clip has.
    """
    clips, x = _pixels(clip, frames)
    x = _convolution(x, 24, (1, 3, 3), (1, 2, 2))
    x = layers.ReLU()(_normalised(DepthwiseConv3D((5, 1, 1))(x)))
    inner = 0
    for filters, depth in ((24, 3), (48, 5), (96, 11), (192, 7)):
        inner = filters * 9 // 4
        for block in range(depth):
            stride = 1 if block else 2
            shortcut = x
            if stride == 2:
                shortcut = _convolution(x, filters, (1, 1, 1), (1, 2, 2))
                if x.shape[-1] != filters:
                    shortcut = _normalised(shortcut)
            x = layers.ReLU()(_normalised(_convolution(x, inner, (1, 1, 1))))
            x = _normalised(DepthwiseConv3D((3, 3, 3), stride)(x))
            if block % 2 == 0:
                x = _excited(x, _divisible(inner / 16), "relu")
            x = layers.Activation("swish")(x)
            x = _normalised(_convolution(x, filters, (1, 1, 1)))
            x = layers.ReLU()(layers.Add()([x, shortcut]))
    x = layers.ReLU()(_normalised(_convolution(x, inner, (1, 1, 1))))
    x = layers.GlobalAveragePooling3D()(x)
    x = layers.Dense(2048, use_bias=False, activation="relu", kernel_initializer="he_normal")(x)
    x = layers.Dropout(0.5)(x)
    return keras.Model(clips, layers.Dense(classes)(x), name="x3d_xs")


def x3d_xs_4(clip: ClipSpec, classes: int) -> keras.Model:
    """`x3d_xs` on 4 of the clip's frames, so many as in its paper."""
    return x3d_xs(clip, classes, 4)


# Filters, and of each block the width of its expansion and its kernel; every row but the fourth halves the picture.
_MOVINET_A0: tuple[tuple[int, int, tuple[tuple[int, Triple], ...]], ...] = (
    (8, 2, ((24, (1, 5, 5)),)),
    (32, 2, ((80, (3, 3, 3)), (80, (3, 3, 3)), (80, (3, 3, 3)))),
    (56, 2, ((184, (5, 3, 3)), (112, (3, 3, 3)), (184, (3, 3, 3)))),
    (56, 1, ((184, (5, 3, 3)), (184, (3, 3, 3)), (184, (3, 3, 3)), (184, (3, 3, 3)))),
    (104, 2, ((384, (5, 3, 3)), (280, (1, 5, 5)), (280, (1, 5, 5)), (344, (1, 5, 5)))),
)


def movinet_a0(clip: ClipSpec, classes: int) -> keras.Model:
    """MoViNet-A0, the base network without stream buffers: mobile inverted bottlenecks found by a search.

    Kondratyuk et al. 2021, "MoViNets: Mobile Video Networks for Efficient Video Recognition", with the widths of the
    authors' code. Departs in how a block begins as its shortcut: the last normalisation's scale is zero at first, in
    place of another scale behind it. The paper's own clip has 50 frames of 172x172.

    Input shape: `(batch, clip.frames, clip.height, clip.width, 3)` uint8.
    Output shape: `(batch, classes)` logits.
    """
    clips, x = _pixels(clip)
    x = layers.Activation("swish")(_normalised(_convolution(x, 8, (1, 3, 3), (1, 2, 2))))
    for filters, first, blocks in _MOVINET_A0:
        for number, (expanded, kernel) in enumerate(blocks):
            stride = 1 if number else first
            shortcut = x
            if stride == 2:
                shortcut = layers.AveragePooling3D((1, 3, 3), (1, 2, 2), padding="same")(shortcut)
            if stride == 2 or x.shape[-1] != filters:
                shortcut = _normalised(_convolution(shortcut, filters, (1, 1, 1)))
            x = layers.Activation("swish")(_normalised(_convolution(x, expanded, (1, 1, 1))))
            x = layers.Activation("swish")(_normalised(DepthwiseConv3D(kernel, stride)(x)))
            x = _excited(x, _divisible(expanded / 4), "swish")
            x = _normalised(_convolution(x, filters, (1, 1, 1)), gamma="zeros")
            x = layers.Add()([x, shortcut])
    x = layers.Activation("swish")(_normalised(_convolution(x, 480, (1, 1, 1))))
    x = layers.GlobalAveragePooling3D()(x)
    x = layers.Dense(2048, activation="swish", kernel_initializer="he_normal")(x)
    x = layers.Dropout(0.2)(x)
    return keras.Model(clips, layers.Dense(classes)(x), name="movinet_a0")


def article_frame(clip: ClipSpec, classes: int, side: int) -> keras.Model:
    """The reference article's network, fixed (`benchmarks.peers.article.network`), on one frame of a clip made smaller.

    Input shape: `(batch, clip.height, clip.width, 3)` uint8.
    Output shape: `(batch, classes)` logits.
    """
    frames = keras.Input((clip.height, clip.width, 3), dtype="uint8")
    small = ops.image.resize(ops.cast(frames, "float32"), (side, side), antialias=True)
    inner = article.network(side, side, classes)
    return keras.Model(frames, inner(ops.cast(ops.round(small), "uint8")), name="article_frame")


def of_frames(frame: keras.Model, clip: ClipSpec) -> keras.Model:
    """A network of clips out of one of frames, whose weights it shares: the mean of the frames' probabilities.

    Input shape: `(batch, clip.frames, clip.height, clip.width, 3)` uint8.
    Output shape: `(batch, classes)`: logarithms of probabilities, whose softmax they are.
    """
    clips = keras.Input((clip.frames, clip.height, clip.width, 3), dtype="uint8")
    logits = frame(ops.reshape(clips, (-1, clip.height, clip.width, 3)))
    shares = ops.reshape(ops.softmax(logits), (-1, clip.frames, logits.shape[-1]))
    return keras.Model(clips, ops.log(ops.mean(shares, axis=1) + 1e-7), name="of_frames")


def _pixels(clip: ClipSpec, frames: int | None = None) -> tuple[Any, Any]:
    """The input and, of `frames` of its frames, pixels of about mean 0 and deviation 1."""
    clips = keras.Input((clip.frames, clip.height, clip.width, 3), dtype="uint8", name="clip")
    x = clips
    if frames is not None:
        if frames > clip.frames:
            raise ValueError(f"{frames} frames are wanted of a clip of {clip.frames}")
        step = clip.frames // frames
        x = x[:, step // 2 : step // 2 + step * frames : step]
    return clips, layers.Rescaling(1 / (255 * 0.225), offset=-0.45 / 0.225)(x)


def _convolution(x: Any, filters: int, size: Triple, stride: int | Triple = 1) -> Any:
    return layers.Conv3D(
        filters, size, strides=stride, padding="same", use_bias=False, kernel_initializer="he_normal"
    )(x)  # fmt: skip


def _normalised(x: Any, gamma: str = "ones") -> Any:
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, gamma_initializer=gamma)(x)


def _excited(x: Any, width: int, activation: str) -> Any:
    """Squeeze and excitation (Hu et al. 2018) over time and place."""
    share = layers.Dense(width, activation=activation)(layers.GlobalAveragePooling3D()(x))
    share = layers.Dense(x.shape[-1], activation="sigmoid")(share)
    return layers.Multiply()([x, layers.Reshape((1, 1, 1, x.shape[-1]))(share)])


def _divisible(width: float) -> int:
    """The nearest multiple of 8, at least 8 and not under 90 % (Sandler et al. 2018)."""
    near = max(8, int(width + 4) // 8 * 8)
    return near if near >= 0.9 * width else near + 8
