"""One harness for every layer: shape, configuration round trip, save and load, gradients, mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from sora.model import backbone, fusion, head, lateral, residual, streams
from sora.model.keras_backbone import ApplicationPixels, KerasBackbone
from tests.model.models import of_pictures, of_videos

VIDEO = (4, 8, 8, 16)  # time, height, width, channels
CLIP = (4, 8, 8, 3)
FEATURES = [(4, 6), (1, 5)]  # (time, channels) of two levels

# name, layer, input shape(s) without batch, output shape(s) without batch
CASES: list[tuple[str, Callable[..., keras.layers.Layer], Any, Any]] = [
    ("shift", lambda **o: residual.TemporalShift(0.25, **o), VIDEO, VIDEO),
    ("shift of one frame", lambda **o: residual.TemporalShift(0.25, **o), (1, 8, 8, 16), (1, 8, 8, 16)),
    ("convolution", lambda **o: residual.FrameConv(16, 3, stride=2, **o), VIDEO, (4, 4, 4, 16)),
    ("convolution, odd", lambda **o: residual.FrameConv(16, 3, stride=2, **o), (4, 7, 5, 16), (4, 4, 3, 16)),
    ("block", lambda **o: residual.ResidualBlock(16, **o), VIDEO, VIDEO),
    ("block, wider", lambda **o: residual.ResidualBlock(24, shift=0, **o), VIDEO, (4, 8, 8, 24)),
    ("block, smaller", lambda **o: residual.ResidualBlock(24, stride=2, **o), (4, 7, 8, 16), (4, 4, 4, 24)),
    ("motion", streams.Motion, CLIP, CLIP),
    ("key frames", lambda **o: streams.KeyFrames(2, **o), CLIP, (2, 8, 8, 3)),
    ("stream", lambda **o: streams.ResidualStream((16, 24), blocks=2, **o), CLIP, [(4, 16), (4, 24)]),
    (
        "stream with maps",
        lambda **o: streams.ResidualStream((16, 24), maps=True, **o),
        (4, 9, 8, 3),
        [(4, 16), (4, 24), (4, 5, 4, 16), (4, 3, 2, 16), (4, 2, 1, 24)],
    ),
    (
        "stream that maps join",
        lambda **o: streams.ResidualStream((16, 24), blocks=2, **o),
        [CLIP, (4, 4, 4, 8), (4, 2, 2, 8)],
        [(4, 16), (4, 24)],
    ),
    (
        "stream that one map joins",
        lambda **o: streams.ResidualStream((16, 24), **o),
        [CLIP, (4, 4, 4, 8)],
        [(4, 16), (4, 24)],
    ),
    ("bias convolution", lambda **o: backbone.BiasConv(24, 3, stride=2, **o), (4, 7, 8, 16), (4, 4, 4, 24)),
    ("depthwise", lambda **o: backbone.BiasConv(None, 5, activate=False, **o), VIDEO, VIDEO),
    ("inverted residual", lambda **o: backbone.InvertedResidual(16, **o), VIDEO, VIDEO),
    (
        "inverted residual, smaller",
        lambda **o: backbone.InvertedResidual(24, size=5, stride=2, expand=1, **o),
        (4, 7, 8, 16),
        (4, 4, 4, 24),
    ),
    (
        "backbone",
        lambda **o: backbone.BackboneStream("efficientnet-lite0", **o),
        (2, 33, 40, 3),
        [(2, 40), (2, 112), (2, 1280)],
    ),
    (
        "other backbone",
        lambda **o: backbone.BackboneStream("mobilenetv2", **o),
        (1, 32, 32, 3),
        [(1, 32), (1, 96), (1, 1280)],
    ),
    ("pictures' backbone", lambda **o: KerasBackbone(of_pictures(), **o), CLIP, [(4, 6), (4, 8)]),
    ("pictures' backbone, resized", lambda **o: KerasBackbone(of_pictures(6, 10), **o), CLIP, [(4, 6), (4, 8)]),
    ("videos' backbone", lambda **o: KerasBackbone(of_videos(), **o), CLIP, (1, 6)),
    ("videos' backbone with moments", lambda **o: KerasBackbone(of_videos(moments=True), **o), CLIP, (2, 6)),
    ("pixels of an application", lambda **o: ApplicationPixels("ResNet50", **o), (8, 8, 3), (8, 8, 3)),
    ("lateral", lambda **o: lateral.Lateral(24, 2, **o), VIDEO, (2, 8, 8, 24)),
    ("lateral of one frame", lambda **o: lateral.Lateral(24, 1, span=3, **o), (1, 8, 8, 16), (1, 8, 8, 24)),
    ("concat", fusion.ConcatFusion, FEATURES, (33,)),
    ("gated", lambda **o: fusion.GatedFusion(8, **o), FEATURES, (8,)),
    ("gated of one level", lambda **o: fusion.GatedFusion(8, **o), FEATURES[:1], (8,)),
    ("gram matrix", fusion.GramMatrix, (4, 6), (6, 6)),
    ("gram", lambda **o: fusion.GramFusion(8, **o), FEATURES, (36,)),
    ("gram of frames", lambda **o: fusion.GramFusion(8, vectors="frame", **o), [(4, 6), (4, 5)], (36,)),
    ("binary logits", head.BinaryLogits, (1,), (2,)),
]
parametrised = pytest.mark.parametrize(("make", "shape", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
BATCH = 3


def _some(shape: Any, seed: int = 0) -> Any:
    if isinstance(shape, list):
        return [_some(one, seed + number) for number, one in enumerate(shape)]
    rng = np.random.default_rng(seed)
    if shape[-1] == 3:  # pixels
        return rng.uniform(0, 255, (BATCH, *shape)).astype(np.float32)
    return rng.normal(size=(BATCH, *shape)).astype(np.float32)


def _model(layer: keras.layers.Layer, shape: Any) -> keras.Model:
    inputs = [keras.Input(one) for one in shape] if isinstance(shape, list) else keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def _flat(value: Any) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v) for v in (value if isinstance(value, list | tuple) else [value])]


@parametrised
def test_shape(make: Callable[..., Any], shape: Any, expected: Any) -> None:
    layer = make()
    expected = expected if isinstance(expected, list) else [expected]
    found = _flat(layer(_some(shape)))
    assert [array.shape[1:] for array in found] == expected
    symbolic = _model(make(), shape).output
    symbolic = symbolic if isinstance(symbolic, list) else [symbolic]
    assert [tuple(one.shape) for one in symbolic] == [(None, *one) for one in expected]
    batched = [(None, *one) for one in shape] if isinstance(shape, list) else (None, *shape)
    computed = layer.compute_output_shape(batched)
    assert (computed if isinstance(computed, list) else [computed]) == [(None, *one) for one in expected]


@parametrised
def test_configuration_round_trip(make: Callable[..., Any], shape: Any, expected: Any) -> None:
    layer = make(name="named")
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    assert keras.saving.get_registered_name(type(layer)).startswith("sora>")
    assert [w.shape for w in _model(again, shape).weights] == [w.shape for w in _model(layer, shape).weights]


@parametrised
def test_saved_and_loaded_it_answers_the_same(
    make: Callable[..., Any], shape: Any, expected: Any, tmp_path: Path
) -> None:
    model = _model(make(), shape)
    rng = np.random.default_rng(1)  # weights of a trained layer, not those it starts with
    model.set_weights([np.abs(w + rng.normal(0, 0.1, w.shape)).astype(w.dtype) for w in model.get_weights()])
    model.save(tmp_path / "layer.keras")
    again = keras.saving.load_model(tmp_path / "layer.keras", safe_mode=True)
    for one, other in zip(_flat(model(_some(shape))), _flat(again(_some(shape))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@parametrised
def test_every_weight_gets_a_finite_gradient(make: Callable[..., Any], shape: Any, expected: Any) -> None:
    model = _model(make(), shape)
    if not model.trainable_weights:
        pytest.skip("no weights")
    outputs = [
        keras.layers.Flatten()(one) for one in (model.output if isinstance(model.output, list) else [model.output])
    ]
    total = outputs[0] if len(outputs) == 1 else keras.layers.Concatenate()(outputs)
    model = keras.Model(model.input, keras.layers.Dense(1)(total))
    before = [w.copy() for w in model.get_weights()]
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    for seed in range(3):
        loss = model.train_on_batch(_some(shape, seed), np.arange(BATCH, dtype=np.float32)[:, None])
        assert np.isfinite(loss)
    names = [w.path for w, old in zip(model.weights, before, strict=True) if w.trainable and np.array_equal(old, w)]
    assert not names, f"unchanged: {names}"
    assert all(np.isfinite(w).all() for w in model.get_weights())


@parametrised
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(make: Callable[..., Any], shape: Any, expected: Any, policy: str) -> None:
    half = make(dtype=policy)
    found = half(_some(shape))
    kinds = {keras.backend.standardize_dtype(v.dtype) for v in (found if isinstance(found, list) else [found])}
    assert kinds == {policy.removeprefix("mixed_")}
    assert {keras.backend.standardize_dtype(w.dtype) for w in half.weights} <= {"float32"}
    full = make()
    exact = _flat(full(_some(shape)))
    half.set_weights(full.get_weights())
    for one, other in zip(_flat(half(_some(shape))), exact, strict=True):
        close = 0.15 * max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one.astype(np.float32), other, atol=close)


def test_shift_moves_each_part_by_one_frame() -> None:
    x = np.arange(3, dtype=np.float32)[None, :, None, None, None] * np.ones((1, 3, 1, 1, 4), np.float32) + 1
    moved = keras.ops.convert_to_numpy(residual.TemporalShift(0.25)(x))[0, :, 0, 0]
    assert moved[:, 0].tolist() == [0, 1, 2] and moved[:, 1].tolist() == [2, 3, 0]
    assert moved[:, 2].tolist() == moved[:, 3].tolist() == [1, 2, 3]


def test_motion_is_signed_and_forgets_exposure() -> None:
    rng = np.random.default_rng(0)
    clip = rng.uniform(60, 120, (1, 5, 8, 8, 3)).astype(np.float32)
    seen = keras.ops.convert_to_numpy(streams.Motion()(clip))
    brighter = keras.ops.convert_to_numpy(streams.Motion()(clip * 1.8 + 20))
    np.testing.assert_allclose(seen, brighter, atol=0.15)
    backwards = keras.ops.convert_to_numpy(streams.Motion()(clip[:, ::-1]))
    np.testing.assert_allclose(seen[..., 1], -backwards[:, ::-1][..., 2], atol=1e-5)
    assert np.abs(seen[:, 1:, ..., 1]).mean() > 0.1
    assert not seen[:, 0, ..., 1].any() and not seen[:, -1, ..., 2].any()


def test_motion_of_a_black_or_still_clip_is_nothing() -> None:
    black = keras.ops.convert_to_numpy(streams.Motion()(np.zeros((1, 4, 8, 8, 3), np.uint8)))
    assert not black.any()


def test_key_frames_are_the_middles_of_equal_parts() -> None:
    assert streams.key_frames(16, 4) == (2, 6, 10, 14)
    assert streams.key_frames(5, 5) == (0, 1, 2, 3, 4) and streams.key_frames(3, 1) == (1,)
    clip = np.arange(16, dtype=np.uint8)[None, :, None, None, None] * np.ones((1, 16, 2, 2, 3), np.uint8)
    shown = keras.ops.convert_to_numpy(streams.KeyFrames(4)(clip))[0, :, 0, 0, 0]
    np.testing.assert_allclose((shown + 1) * 127.5, [2, 6, 10, 14], atol=1e-4)
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=f"16 frames, received {wrong}"):
            streams.key_frames(16, wrong)


def test_gram_matrix_of_the_articles_case() -> None:
    """Ten frames, a 256-vector each: one 256x256 matrix, by the formula done slowly."""
    vectors = np.random.default_rng(0).normal(size=(2, 10, 256)).astype(np.float32)
    matrix = keras.ops.convert_to_numpy(fusion.GramMatrix()(vectors))
    assert matrix.shape == (2, 256, 256)
    np.testing.assert_allclose(matrix, matrix.transpose(0, 2, 1), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=(1, 2)), 1, rtol=1e-5)
    slow = vectors[0].T @ vectors[0] / 10
    slow = np.sign(slow) * np.sqrt(np.abs(slow))
    np.testing.assert_allclose(matrix[0], slow / np.linalg.norm(slow), atol=2e-4)


def test_gram_matrix_of_nothing_is_nothing() -> None:
    assert not keras.ops.convert_to_numpy(fusion.GramMatrix()(np.zeros((1, 4, 6), np.float32))).any()


def test_concat_of_a_still_clip_has_no_deviation() -> None:
    level = np.ones((1, 4, 2), np.float32) * np.array([1.0, 5.0], np.float32)
    layer = fusion.ConcatFusion()
    moving = level * np.arange(4, dtype=np.float32)[None, :, None]
    one, other = (keras.ops.convert_to_numpy(layer([x])) for x in (level, moving))
    assert not np.allclose(one, other, atol=0.1)


def test_a_fraction_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"received 0\.6"):
        residual.TemporalShift(0.6)


def test_a_lateral_is_a_strided_convolution_over_time() -> None:
    """Against Conv3D of 5x1x1 at the key frames; the ends repeat."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 3, 3, 4)).astype(np.float32)
    layer = lateral.Lateral(16, 3)
    layer(x)
    kernel = layer.convolution.convolution.kernel
    slow = keras.layers.Conv3D(16, (5, 1, 1), use_bias=False)
    padded = np.concatenate([x[:, :1], x[:, :1], x, x[:, -1:], x[:, -1:]], axis=1)
    slow.build(padded.shape)
    slow.kernel.assign(keras.ops.reshape(kernel, (5, 1, 1, 4, 16)))
    everywhere = layer.convolution.normalisation(keras.ops.reshape(slow(padded), (-1, 3, 3, 16)), training=False)
    expected = keras.ops.reshape(keras.ops.relu(everywhere), (2, 8, 3, 3, 16))
    expected = keras.ops.convert_to_numpy(expected)[:, list(streams.key_frames(8, 3))]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x)), expected, atol=1e-5)


def test_gates_choose_between_levels() -> None:
    """Gates pushed to one level: the fusion is that level's vector."""
    features = [_some((4, 6)), _some((1, 5), 1)]
    layer = fusion.GatedFusion(8)
    layer(features)
    bias = np.zeros((2, 8), np.float32)
    bias[1] = 100
    layer.gates.set_weights([np.zeros((8, 16), np.float32), bias.reshape(-1)])
    # Of one frame: the mean, a deviation of sqrt(1e-6) and no change.
    only = features[1][:, 0]
    second = layer.projections[1](layer.normalisations[1](np.hstack([only, only * 0 + 1e-3, only * 0])))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(layer(features)), keras.ops.convert_to_numpy(second), atol=1e-6
    )


def test_the_articles_ten_vectors_make_one_matrix() -> None:
    """Ten frames, 560 channels of six levels each → ten 256-vectors → a 256x256 matrix → its upper triangle."""
    features = [_some((10, channels), channels) for channels in (16, 32, 64, 64, 128, 256)]
    layer = fusion.GramFusion(256, vectors="frame")
    assert layer(features).shape == (BATCH, 256 * 257 // 2)
    vectors = layer.projected(features)
    assert tuple(vectors.shape) == (BATCH, 10, 256)
    assert tuple(layer.gram(vectors).shape) == (BATCH, 256, 256)


def test_vectors_of_frames_need_the_same_frames() -> None:
    with pytest.raises(ValueError, match=r"received \[1, 4\] frames"):
        fusion.GramFusion(8, vectors="frame")([_some(shape) for shape in FEATURES])
    with pytest.raises(ValueError, match="received 'video'"):
        fusion.GramFusion(8, vectors="video")


def test_odd_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="odd, received 4"):
        lateral.Lateral(16, 2, span=4)
    with pytest.raises(ValueError, match="3 maps join a stream of 2 levels"):
        streams.ResidualStream((16, 24))([_some(shape) for shape in (CLIP, (4, 4, 4, 8), (4, 2, 2, 8), (4, 1, 1, 8))])


def test_binary_logits_are_a_sigmoid() -> None:
    logit = np.array([[-2.0], [0.0], [3.0]], np.float32)
    shares = keras.ops.convert_to_numpy(keras.ops.softmax(head.BinaryLogits()(logit)))
    np.testing.assert_allclose(shares[:, 1:], 1 / (1 + np.exp(-logit)), atol=1e-6)
