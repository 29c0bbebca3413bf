from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from sora.core.records import ClipSpec, Recipe
from sora.registry import ChampionRef
from sora.serving.source import ModelCache
from tests.serving.standing import Standing, standing
from tests.videos import make_video

SPEC = ClipSpec(frames=4, height=32, width=32)
CLASSES = ("jump", "<b>wave</b>", "sit")  # the second one must never become markup


class Made:
    """A tiny real model: file, recipe, and what Keras itself answers."""

    def __init__(self, file: Path, recipe: Recipe, version: int) -> None:
        self.file, self.recipe, self.version = file, recipe, version
        self.champion = ChampionRef(
            version, recipe.model_sha256, f"data{version}", f"run{version}", {"test/accuracy": 0.5}
        )

    def put(self, cache: ModelCache, recipe: Recipe | None = None) -> None:
        """Makes it fetchable from `cache`."""
        folder = cache.model_folder(self.champion.digest)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.file, folder / "model.keras")
        (folder / "recipe.json").write_text(json.dumps((recipe or self.recipe).to_dict()), encoding="utf-8")

    def promote(self, cache: ModelCache) -> None:
        self.put(cache)
        cache.remember(self.champion)


def make_model(folder: Path, version: int, temperature: float = 1.5) -> Made:
    import keras

    from sora.config import Model
    from sora.judging.evaluation import golden_clip
    from sora.model import classifier

    keras.utils.set_random_seed(version)
    config = Model(low_filters=(16,), high_filters=(16,), key_frames=2, embedding=8)
    model = classifier.build(config, SPEC, len(CLASSES))
    # Random weights answer alike: spread them, so that versions differ visibly.
    logits = model.get_layer("logits")
    logits.set_weights([w * 8 + version for w in logits.get_weights()])
    file = folder / f"v{version}.keras"
    model.save(file)
    golden = []
    for seed in (0, 1):
        raw = np.asarray(model.predict_on_batch(golden_clip(SPEC, seed).video), np.float64)[0] / temperature
        powers = np.exp(raw - raw.max())
        golden.append({"seed": seed, "probabilities": (powers / powers.sum()).tolist()})
    digest = sha256(file.read_bytes()).hexdigest()
    return Made(file, Recipe(SPEC, CLASSES, temperature, golden=tuple(golden), model_sha256=digest), version)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    folder = tmp_path_factory.mktemp("models")
    return [make_model(folder, version) for version in (1, 2)]


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("videos") / "klein ö.mp4")


def other_golden(recipe: Recipe) -> Recipe:
    """A recipe that promises answers which the model does not give."""
    wrong = tuple({**g, "probabilities": g["probabilities"][::-1]} for g in recipe.golden)
    return replace(recipe, golden=wrong)


@pytest.fixture(scope="session")
def api(models: list[Made], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """A real server of version 1 for all tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("api")
    models[0].promote(ModelCache(folder / "registry"))
    with standing(folder, max_bytes=2_000_000, max_files=4, poll_seconds=0.1) as it:
        it.until_ready()
        yield it
        assert it.process.poll() is None, it.log()
        assert not it.leftovers()
