"""The same weights answer the same on every backend that is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from sora.model import classifier
from tests.clips import SPEC
from tests.model.variants import VARIANTS, variant

# Loads each model as the server would and asks it; prints the backend that answered.
ASK = """
import sys, json
import keras, numpy as np
import sora.model.classifier
folder = sys.argv[1]
clips = np.load(f"{folder}/clips.npy")
for name in json.loads(sys.argv[2]):
    model = keras.saving.load_model(f"{folder}/{name}.keras", compile=False, safe_mode=True)
    np.save(f"{folder}/{name}.npy", keras.ops.convert_to_numpy(model(clips)))
print(keras.backend.backend(), "tensorflow" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_backends_agree(backend: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    shape = (2, SPEC.frames, SPEC.height, SPEC.width, 3)
    clips = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "clips.npy", clips)
    answers = {}
    for seed, name in enumerate(VARIANTS):
        keras.utils.set_random_seed(seed)
        model = classifier.build(variant(name), SPEC, 2)
        rng = np.random.default_rng(seed)  # statistics of normalisations as after training
        model.set_weights([w + rng.uniform(0, 0.1, w.shape).astype(w.dtype) for w in model.get_weights()])
        model.save(tmp_path / f"{name}.keras")
        answers[name] = keras.ops.convert_to_numpy(model(clips))
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path), json.dumps(list(VARIANTS))],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == backend
    for name, expected in answers.items():
        found = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4, err_msg=name)
