from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora.core.errors import PromotionFailed
from sora.core.tensors import VIDEO, Clips
from sora.media.video.transform import prepare_clips
from sora.runtime.predictor import ModelRefused, Predictor, Smoke, predict_files
from tests.serving.conftest import CLASSES, SPEC, Made, other_golden


@pytest.fixture(scope="module")
def predictor(models: list[Made]) -> Predictor:
    return Predictor(models[0].file, models[0].recipe, 1)


def _random(count: int, seed: int) -> Clips:
    return Clips({VIDEO: np.random.default_rng(seed).integers(0, 256, (count, 4, 32, 32, 3), np.uint8)})


def _by_keras(made: Made, clips: np.ndarray) -> np.ndarray:
    import keras

    logits = np.asarray(keras.saving.load_model(made.file, compile=False).predict_on_batch(clips), np.float64)
    powers = np.exp(logits / made.recipe.temperature)
    shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_any_number_of_clips_gets_what_keras_answers(predictor: Predictor, models: list[Made], count: int) -> None:
    clips = _random(count, count)
    answer = predictor.probabilities(clips)
    assert answer.shape == (count, 3)
    np.testing.assert_allclose(answer, _by_keras(models[0], clips.video), atol=1e-4)


def test_padding_does_not_leak_into_answers(predictor: Predictor) -> None:
    clips = _random(5, 0)
    one_by_one = np.concatenate([predictor.probabilities(clip) for clip in clips])
    np.testing.assert_allclose(predictor.probabilities(clips), one_by_one, atol=1e-5)


def test_golden_answers_hold_and_others_are_refused(predictor: Predictor, models: list[Made]) -> None:
    assert predictor.check_golden() < 1e-4
    with pytest.raises(ModelRefused, match="differs by"):
        Predictor(models[0].file, other_golden(models[0].recipe), 1).check_golden()


def test_a_changed_file_is_refused_before_it_is_opened(models: list[Made], tmp_path: Path) -> None:
    changed = tmp_path / "model.keras"
    changed.write_bytes(models[0].file.read_bytes() + b"x")
    with pytest.raises(ModelRefused, match="sha256"):
        Predictor(changed, models[0].recipe, 1)


def test_a_file_that_is_no_model_is_refused(models: list[Made], tmp_path: Path) -> None:
    from hashlib import sha256

    file = tmp_path / "model.keras"
    file.write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(ModelRefused, match="can't be loaded"):
        Predictor(file, replace(models[0].recipe, model_sha256=sha256(file.read_bytes()).hexdigest()), 1)


def test_code_in_a_model_is_not_run(models: list[Made], tmp_path: Path) -> None:
    """A Lambda layer is Python bytecode: safe mode refuses it."""
    from hashlib import sha256

    import keras

    clip = keras.Input((4, 32, 32, 3), dtype="uint8")
    flat = keras.layers.Flatten()(keras.layers.Lambda(lambda x: x)(clip))
    file = tmp_path / "model.keras"
    keras.Model(clip, keras.layers.Dense(3)(flat)).save(file)
    with pytest.raises(ModelRefused, match="can't be loaded"):
        Predictor(file, replace(models[0].recipe, model_sha256=sha256(file.read_bytes()).hexdigest()), 1)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"clip": replace(SPEC, frames=5)}, "takes video of"),
        ({"classes": CLASSES[:2]}, "2 classes"),
        ({"schema": 2}, "schema"),
    ],
)
def test_a_recipe_of_another_model_is_refused(models: list[Made], recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        Predictor(models[0].file, replace(models[0].recipe, **recipe), 1)


def test_files_are_answered_one_by_one_and_bad_ones_say_why(models: list[Made], video: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    answers = predict_files([text, video, tmp_path / "absent.mp4"], models[0].file, models[0].recipe, 7)
    assert [answer["path"] for answer in answers] == [str(text), str(video), str(tmp_path / "absent.mp4")]
    assert "no video format" in answers[0]["error"] and "not a file" in answers[2]["error"]
    expected = _by_keras(models[0], prepare_clips(video, SPEC)).mean(axis=0)
    assert answers[1]["version"] == 7 and answers[1]["label"] == CLASSES[int(expected.argmax())]
    np.testing.assert_allclose(list(answers[1]["probabilities"].values()), expected, atol=1e-4)


def test_unsure_only_where_the_recipe_has_a_threshold(predictor: Predictor, models: list[Made], video: Path) -> None:
    clips = Clips({VIDEO: prepare_clips(video, SPEC)})
    plain = predictor.predict(clips)
    assert plain.unsure is None and "unsure" not in plain.to_dict()
    confidence = plain.probabilities[plain.label]
    for below, unsure in ((confidence + 0.01, True), (confidence - 0.01, False)):
        recipe = replace(models[0].recipe, unsure_below=below)
        [answer] = predict_files([video], models[0].file, recipe, 1)
        assert answer["unsure"] is unsure and answer["label"] == plain.label


def test_views_are_averaged_and_golden_answers_know_them(models: list[Made]) -> None:
    from sora.judging.evaluation import _golden, _load

    recipe = replace(models[0].recipe, views=("mirrored", "left"), golden=())
    recipe = replace(recipe, golden=(_golden(_load(models[0].file, recipe), recipe, 0),))
    viewed = Predictor(models[0].file, recipe, 1)
    assert viewed.check_golden() < 1e-4
    clips = _random(5, 7)
    answer = viewed.probabilities(clips)
    plain = _by_keras(models[0], clips.video)
    mirrored = _by_keras(models[0], clips.video[:, :, :, ::-1])
    left = _by_keras(models[0], clips.video[:, :, :, (np.arange(32) - 1).clip(0)])
    assert answer.shape == (5, 3)
    np.testing.assert_allclose(answer, (plain + mirrored + left) / 3, atol=1e-4)
    with pytest.raises(ModelRefused, match="view"):
        Predictor(models[0].file, replace(models[0].recipe, views=("inside out",)), 1)


def test_smoke_in_a_child(models: list[Made]) -> None:
    with Smoke() as smoke:
        assert smoke(models[0].file, models[0].recipe)["difference"] < 1e-4
    with Smoke() as smoke, pytest.raises(PromotionFailed, match="differs by"):
        smoke(models[0].file, other_golden(models[0].recipe))


@pytest.mark.parametrize("count", [1, 5, 11])
def test_embeddings_are_what_the_last_layer_sees(predictor: Predictor, models: list[Made], count: int) -> None:
    import keras

    clips = _random(count, count)
    vectors = predictor.embeddings(clips)
    assert vectors.shape == (count, 8)
    last = keras.saving.load_model(models[0].file, compile=False).get_layer("logits")
    logits = np.asarray(last(vectors.astype(np.float32)), np.float64) / models[0].recipe.temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(predictor.probabilities(clips), powers / powers.sum(axis=1, keepdims=True), atol=1e-4)
