"""The whole classifier: shapes, names, saving, both fusions, and that it can tell left from right."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from sora.config import PRESETS, Model
from sora.core.records import ClipSpec
from sora.model import classifier, cost, streams
from tests.clips import SMALL, SPEC, moving_square
from tests.model.variants import VARIANTS, variant


def _clips(number: int, spec: ClipSpec = SPEC) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, spec.frames, spec.height, spec.width, 3), np.uint8)


@pytest.mark.parametrize("kind", VARIANTS)
def test_clips_in_logits_out(kind: str, tmp_path: Path) -> None:
    model = classifier.build(variant(kind), SPEC, 2)
    assert model.input_shape == (None, 8, 32, 32, 3) and model.input.dtype == "uint8"
    logits = keras.ops.convert_to_numpy(model(_clips(2)))
    assert logits.shape == (2, 2) and logits.dtype == np.float32
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True, compile=False)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(again(_clips(2))), logits, atol=1e-6)


def test_the_representation_is_an_output_of_its_own() -> None:
    model = classifier.build(Model(**SMALL), SPEC, 2)
    vectors = classifier.embedding_model(model)(_clips(2))
    assert tuple(vectors.shape) == (2, 16)
    logits = model.get_layer("logits")(vectors)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(logits), model(_clips(2)), atol=1e-5)


def test_the_default_model_keeps_its_weights() -> None:
    """Registered versions and interrupted trainings hold these weights in this order."""
    model = classifier.build(Model(), ClipSpec(), 8)
    assert model.count_params() == 520_440
    layout = "\n".join(f"{weight.name} {tuple(weight.shape)}" for weight in model.weights)
    assert hashlib.sha256(layout.encode()).hexdigest()[:16] == "18c543b6475d2691"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_were_made_for(name: str) -> None:
    preset = PRESETS[name]
    model = classifier.build(Model(preset=name), preset.clip, 2)
    known = {
        "demo": 0.105e9,
        "small": 0.670e9,
        "base": 1.314e9,
        "pretrained": 1.191e9,
        "article": 17.48e9,
        "appearance": 12.29e9,
        "motion": 0.0003816e9,
        "probes": 12.29e9,
        "auto": 12.29e9,
    }
    assert cost.flops(model) == pytest.approx(known[name], rel=0.01)


def test_the_articles_case_ten_frames_of_256() -> None:
    """10 frames of 256x256 → ten 256-vectors → one 256x256 matrix (its upper triangle) → "is it running?"."""
    model = classifier.build(Model(preset="article"), PRESETS["article"].clip, 2)
    assert model.input_shape == (None, 10, 256, 256, 3) and model.output_shape == (None, 2)
    features = [*model.get_layer("low").output, *model.get_layer("high").output]
    assert [tuple(x.shape[1:]) for x in features] == [(10, width) for width in (16, 32, 64, 64, 128, 256)]
    gram = model.get_layer("gram")
    assert gram.projections[0].compute_output_shape((None, 10, 560)) == (None, 10, 256)
    assert gram.gram.compute_output_shape((None, 10, 256)) == (None, 256, 256)
    assert gram.output.shape == (None, 256 * 257 // 2)


def test_a_lateral_lets_the_high_network_see_motion() -> None:
    """The same key frames, other frames between: only with laterals do the high network's features differ."""
    one = _clips(1)
    other = one.copy()
    shown = streams.key_frames(8, 2)
    other[:, [number for number in range(8) if number not in shown]] //= 2
    for joined in (False, True):
        model = classifier.build(Model(**SMALL, lateral=joined), SPEC, 2)
        high = keras.Model(model.input, model.get_layer("high").output)
        first, second = (keras.ops.convert_to_numpy(high(clips)[0]) for clips in (one, other))
        assert np.allclose(first, second) != joined


def test_half_precision_ends_in_float32_logits() -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = classifier.build(Model(**SMALL), SPEC, 2)
    finally:
        keras.config.set_dtype_policy(before)
    logits = model(_clips(1))
    assert keras.backend.standardize_dtype(logits.dtype) == "float32" and np.isfinite(logits).all()
    assert model.get_layer("embedding").compute_dtype == "bfloat16"


def test_no_convolution_over_time_and_height_and_width() -> None:
    """LiteRT leaves Conv3D in floating point; a Lambda can't be loaded in safe mode."""
    kinds = {type(layer) for layer in classifier.build(Model(), ClipSpec(), 4)._flatten_layers()}
    assert not kinds & {keras.layers.Conv3D, keras.layers.Lambda}


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes, received 1"):
        classifier.build(Model(**SMALL), SPEC, 1)
    with pytest.raises(ValueError, match="8 frames, received 9"):
        classifier.build(Model(**{**SMALL, "key_frames": 9}), SPEC, 2)
    with pytest.raises(ValueError, match="binary head needs 2 classes, received 3"):
        classifier.build(Model(**SMALL, head="binary"), SPEC, 3)


def test_it_learns_the_direction_of_movement() -> None:
    """Left and right are the same pictures in another order; backgrounds and places of the test are new."""

    def some(seeds: range) -> tuple[np.ndarray, np.ndarray]:
        clips = [
            moving_square(label, seed, frames=8, size=48)[:, 8:40, 8:40]
            for seed in seeds
            for label in ("left", "right")
        ]
        return np.stack(clips), np.tile([0, 1], len(seeds))

    keras.utils.set_random_seed(0)
    model = classifier.build(Model(**SMALL), SPEC, 2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss, metrics=["accuracy"], jit_compile=False)
    model.fit(*some(range(16)), batch_size=16, epochs=6, verbose=0)
    _, accuracy = model.evaluate(*some(range(1000, 1012)), verbose=0)
    assert accuracy >= 0.9


def test_on_another_backend_nothing_here_needs_tensorflow() -> None:
    code = "import sys; sys.modules['tensorflow'] = None; import sora.model.classifier"
    code += ", sora.store.batches, sora.learning.loop"
    environment = {"KERAS_BACKEND": "numpy", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_inputs_ask_for_tensors_by_name_and_models_of_earlier_versions_called_theirs_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = _clips(2)
    for name in ("video", "clip"):
        with monkeypatch.context() as patch:
            patch.setattr(classifier, "VIDEO", name)
            model = classifier.build(Model(**SMALL), SPEC, 2)
        model.save(tmp_path / f"{name}.keras")
        loaded = keras.saving.load_model(tmp_path / f"{name}.keras", compile=False, safe_mode=True)
        assert [one.name for one in loaded.inputs] == [name]
        fed = classifier.fed(loaded, {"audio": None, "video": clips})
        assert fed is clips
        np.testing.assert_array_equal(loaded.predict_on_batch(fed), model.predict_on_batch(clips))
    with pytest.raises(ValueError, match="asks for the tensor 'video', but the clips have audio"):
        classifier.fed(loaded, {"audio": clips})
