"""The whole classifier: shapes, names, saving, both fusions, and that it can tell left from right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from sora.model import classifier
from sora.records import ClipSpec
from sora.settings import Model
from tests.clips import SMALL, SPEC, moving_square


def _clips(number: int, spec: ClipSpec = SPEC) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, spec.frames, spec.height, spec.width, 3), np.uint8)


@pytest.mark.parametrize("kind", ["concat", "gram"])
def test_clips_in_logits_out(kind: str, tmp_path: Path) -> None:
    model = classifier.build(Model(**SMALL, fusion=kind, gram_width=8), SPEC, 3)
    assert model.input_shape == (None, 8, 32, 32, 3) and model.input.dtype == "uint8"
    logits = keras.ops.convert_to_numpy(model(_clips(2)))
    assert logits.shape == (2, 3) and logits.dtype == np.float32
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True, compile=False)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(again(_clips(2))), logits, atol=1e-6)


def test_the_representation_is_an_output_of_its_own() -> None:
    model = classifier.build(Model(**SMALL), SPEC, 2)
    vectors = classifier.embedding_model(model)(_clips(2))
    assert tuple(vectors.shape) == (2, 16)
    logits = model.get_layer("logits")(vectors)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(logits), model(_clips(2)), atol=1e-5)


def test_the_articles_case_ten_frames_of_256() -> None:
    """10 frames of 256x256 → 256-vectors → one 256x256 matrix (its upper triangle) → a class."""
    config = Model(low_filters=(16,), high_filters=(256,), key_frames=10, fusion="gram", gram_width=256)
    model = classifier.build(config, ClipSpec(frames=10, height=256, width=256), 2)
    assert model.get_layer("gram").output.shape == (None, 256 * 257 // 2)
    assert model.get_layer("high").output.shape == (None, 10, 256)


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
    code = (
        "import sys; sys.modules['tensorflow'] = None; import sora.model.classifier, sora.data.batches, sora.model.loop"
    )
    environment = {"KERAS_BACKEND": "numpy", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
