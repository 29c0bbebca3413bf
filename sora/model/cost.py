"""What a model costs, counted from its layers' shapes: multiply-adds, and numbers that training keeps in memory."""

from __future__ import annotations

import math
from typing import Any

import keras

from sora.core.tensors import Shape
from sora.model.backbone import BiasConv
from sora.model.fusion import GramMatrix
from sora.model.probes import RbfKernel
from sora.model.residual import FrameConv, ResidualBlock

FLOAT = 4  # bytes
_ADAM = 2  # moments that AdamW keeps per trained weight


def flops(layer: keras.layers.Layer) -> int:
    """Floating-point operations that one clip costs in a built layer or model, 2 per multiply-add.

    Counts convolutions, dense layers and matrix products, as the literature does (He et al. 2016; Feichtenhofer
    et al. 2019): normalisation, activation, pooling and statistics are left out.

    Raises:
        TypeError: an inner layer has a matrix of weights and is of a kind that this function can't count.
    """
    shape = _shape(layer)
    if isinstance(layer, FrameConv):
        return 2 * _numbers(layer.compute_output_shape(shape)) * layer.size**2 * int(shape[-1])
    if isinstance(layer, BiasConv):
        return 2 * _numbers(layer.compute_output_shape(shape)) * layer.size**2 * int(shape[-1] if layer.filters else 1)
    if isinstance(layer, keras.layers.Dense):
        return 2 * _numbers(shape) * int(layer.units)
    if isinstance(layer, RbfKernel):
        return 2 * _numbers(shape) * layer.anchors
    if isinstance(layer, GramMatrix):
        return 2 * _numbers(shape) * int(shape[-1])
    inner = _inner(layer)
    if not inner and any(len(weight.shape) > 1 for weight in layer.weights):
        raise TypeError(f"can't count what {type(layer).__name__} {layer.name!r} costs")
    return sum(flops(part) for part in inner)


def kept(layer: keras.layers.Layer) -> int:
    """About how many numbers of one clip training keeps for the backward pass.

    Every convolution keeps its input (for the gradient of its kernel) and its output (for the normalisation), every
    residual block its sum. A compiler may keep fewer; a framework's own buffers are extra.
    """
    if not layer.trainable:
        return 0  # no gradient goes through it
    if isinstance(layer, FrameConv | BiasConv):
        return _numbers(_shape(layer)) + _numbers(layer.compute_output_shape(_shape(layer)))
    own = _numbers(layer.compute_output_shape(_shape(layer))) if isinstance(layer, ResidualBlock) else 0
    return own + sum(kept(part) for part in _inner(layer))


def memory(model: keras.Model, batch: int) -> dict[str, int]:
    """Estimated bytes of training in float32 with AdamW for one batch (see `kept`).

    Returns {"batch", "weights", "gradients", "optimizer", "activations", "total"}.
    """
    trained = FLOAT * sum(math.prod(weight.shape) for weight in model.trainable_weights)
    parts = {
        "weights": FLOAT * parameters(model),
        "gradients": trained,
        "optimizer": _ADAM * trained,
        "activations": FLOAT * batch * kept(model),
    }
    return {"batch": batch, **parts, "total": sum(parts.values())}


def parameters(layer: keras.layers.Layer) -> int:
    """Numbers in the layer's weights, including the statistics of normalisations."""
    return sum(math.prod(weight.shape) for weight in layer.weights)


def _inner(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _shape(layer: keras.layers.Layer) -> Any:
    """The input shape that the layer was built for; the first dimension is the batch."""
    return (layer.get_build_config() or {}).get("input_shape")


def _numbers(shape: Shape) -> int:
    """The numbers of one clip in a tensor of this shape."""
    return math.prod(shape[1:])
