"""Counted costs against counts by hand and TensorFlow's profiler."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from sora.config import Model
from sora.core.records import ClipSpec
from sora.model import classifier, cost, fusion, lateral, residual
from tests.clips import SMALL, SPEC
from tests.model.variants import VARIANTS, variant


def _built(layer: keras.layers.Layer, shape: tuple[int, ...] | list[tuple[int, ...]]) -> keras.layers.Layer:
    layer([keras.Input(one) for one in shape] if isinstance(shape, list) else keras.Input(shape))
    return layer


def test_counted_by_hand() -> None:
    """2 operations a multiply-add: pixels x filters x kernel x channels."""
    convolution = _built(residual.FrameConv(16, 3, stride=2), (4, 8, 8, 3))
    assert cost.flops(convolution) == 2 * 4 * (4 * 4) * 16 * (3 * 3) * 3
    block = _built(residual.ResidualBlock(24, stride=2), (4, 8, 8, 16))
    assert cost.flops(block) == 2 * 4 * (4 * 4) * 24 * (9 * 16 + 9 * 24 + 16)
    still = _built(residual.ResidualBlock(16), (4, 8, 8, 16))
    assert cost.flops(still) == 2 * 4 * (8 * 8) * 16 * (9 * 16 + 9 * 16)
    assert cost.flops(_built(residual.TemporalShift(0.25), (4, 8, 8, 16))) == 0
    # Two key frames, five neighbours' 16 channels each.
    assert cost.flops(_built(lateral.Lateral(32, 2), (4, 8, 8, 16))) == 2 * 2 * (8 * 8) * 32 * (5 * 16)
    # Four frames: a dense layer 6 → 8 each; then 4 x 8 x 8 for the matrix.
    assert cost.flops(_built(fusion.GramFusion(8), [(4, 6)])) == 2 * (4 * 6 * 8 + 4 * 8 * 8)
    # Statistics are 3 x 6 and 3 x 5; the gates 2 x 8 from 8.
    assert cost.flops(_built(fusion.GatedFusion(8), [(4, 6), (1, 5)])) == 2 * (18 * 8 + 15 * 8 + 8 * 16)
    assert cost.flops(_built(fusion.ConcatFusion(), [(4, 6), (1, 5)])) == 0


def test_kept_by_hand() -> None:
    convolution = _built(residual.FrameConv(16, 3, stride=2), (4, 8, 8, 3))
    assert cost.kept(convolution) == 4 * 8 * 8 * 3 + 4 * 4 * 4 * 16
    block = _built(residual.ResidualBlock(16), (4, 8, 8, 16))
    assert cost.kept(block) == 5 * (4 * 8 * 8 * 16)  # two convolutions, in and out, and the sum


def test_memory_adds_up() -> None:
    model = classifier.build(Model(**SMALL), SPEC, 2)
    found = cost.memory(model, 4)
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert found["weights"] == 4 * model.count_params() and found["optimizer"] == 8 * trained
    assert found["total"] == sum(found[name] for name in ("weights", "gradients", "optimizer", "activations"))
    twice = cost.memory(model, 8)
    assert twice["activations"] == 2 * found["activations"] and twice["weights"] == found["weights"]


def test_a_layer_of_unknown_cost_is_refused() -> None:
    with pytest.raises(TypeError, match="EinsumDense 'odd'"):
        cost.flops(_built(keras.layers.EinsumDense("abc,cd->abd", (None, 8), name="odd"), (4, 6)))


@pytest.mark.parametrize("name", VARIANTS)
def test_as_tensorflow_counts(name: str) -> None:
    if keras.config.backend() != "tensorflow":
        pytest.skip("TensorFlow's profiler counts TensorFlow's graphs")
    model = classifier.build(variant(name), SPEC, 2)
    assert cost.flops(model) == _profiled(model, SPEC)


def _profiled(model: keras.Model, spec: ClipSpec) -> int:
    """What TensorFlow's profiler counts in the operations that `cost.flops` counts."""
    import tensorflow as tf

    shape = (1, spec.frames, spec.height, spec.width, 3)

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8)], autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types
    def call(clips: tf.Tensor) -> tf.Tensor:
        return model(clips, training=False)

    graph = call.get_concrete_function().graph
    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    found = profiler.profile(graph, cmd="op", options=options.with_empty_output().build())
    counts: dict[str, int] = {}

    def collect(node: Any) -> None:
        for child in node.children:
            counts[child.name] = child.float_ops
            collect(child)

    collect(found)
    counted = ("Conv2D", "DepthwiseConv2dNative", "MatMul", "BatchMatMul")
    return sum(count for kind, count in counts.items() if kind.startswith(counted))


def test_streams_count_alike_alone_and_together() -> None:
    both, low, high = (
        cost.flops(classifier.build(Model(**{**SMALL, "streams": kind}), SPEC, 2)) for kind in ("both", "low", "high")
    )
    shared = 2 * 16 * 2  # the logits; the embedding's inputs divide between the two
    assert both == low + high - shared
