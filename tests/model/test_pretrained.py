"""ImageNet weights: read without executing anything, folded without changing an answer, scaled as they were trained."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import pytest

from sora.config import Model
from sora.core.errors import InputError, ServiceError
from sora.core.records import ClipSpec
from sora.model import classifier, pretrained
from sora.model.backbone import HEAD, BackboneStream
from tests.clips import SMALL

# Photographs that come with locked packages, and the class of ImageNet that each shows.
KNOWN = {
    "china": ("sklearn", "datasets/images/china.jpg", 698),  # palace
    "flower": ("sklearn", "datasets/images/flower.jpg", 985),  # daisy, the nearest that there is
}
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "-1 to 1": lambda x: x / 127.5 - 1,
    "0 to 1": lambda x: x / 255,
    "mean and deviation": lambda x: (x / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225),
    "as they are": lambda x: x,
}


@pytest.fixture(scope="module")
def tensors() -> pretrained.Tensors:
    return pretrained.lite0_tensors()


@pytest.fixture(scope="module")
def stream(tensors: pretrained.Tensors) -> BackboneStream:
    made = BackboneStream("efficientnet-lite0", trainable=False)
    made.build((None, 1, 224, 224, 3))
    for layer, weights in zip(made.convolutions(), pretrained.folded_weights(tensors), strict=True):
        layer.convolution.set_weights(weights)
    return made


def _photograph(name: str) -> np.ndarray:
    import cv2

    package, file, _ = KNOWN[name]
    found = find_spec(package)
    path = Path(str(found.origin)).parent / file if found else Path(file)
    if not path.is_file():
        pytest.skip(f"{package} has no {file}")
    stored = cv2.imread(str(path))
    assert stored is not None
    picture = cv2.cvtColor(stored, cv2.COLOR_BGR2RGB)
    side = int(min(picture.shape[:2]) * 0.875)
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    picture = picture[top : top + side, left : left + side]
    return cv2.resize(picture, (224, 224), interpolation=cv2.INTER_AREA).astype(np.float32)


@pytest.mark.parametrize("name", KNOWN)
def test_photographs_are_known_best_at_the_scale_that_we_give(
    name: str, stream: BackboneStream, tensors: pretrained.Tensors
) -> None:
    confidence = {}
    for words, scale in SCALES.items():
        features = stream(np.asarray(scale(_photograph(name)), np.float32)[None, None])[-1]
        logits = keras.ops.convert_to_numpy(features)[0, 0] @ tensors["_fc.weight"].T + tensors["_fc.bias"]
        chances = np.exp(logits - logits.max())
        confidence[words] = float(chances[KNOWN[name][2]] / chances.sum())
        if words == "-1 to 1":
            assert logits.argmax() == KNOWN[name][2]
    assert max(confidence, key=confidence.__getitem__) == "-1 to 1", confidence


def test_folding_changes_no_answer() -> None:
    rng = np.random.default_rng(0)
    for depthwise in (False, True):
        kernel = rng.normal(size=(3, 3, 4, 1 if depthwise else 6)).astype(np.float32)
        x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
        statistics = [rng.uniform(0.5, 2, 4 if depthwise else 6).astype(np.float32) for _ in range(4)]
        run = keras.ops.depthwise_conv if depthwise else keras.ops.conv
        plain = keras.ops.convert_to_numpy(run(x, kernel, padding="same"))
        gamma, beta, mean, variance = statistics
        expected = (plain - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        folded, bias = pretrained._fold(kernel, *statistics)
        found = keras.ops.convert_to_numpy(run(x, folded, padding="same")) + bias
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_mobilenet_from_keras_answers_the_same() -> None:
    published = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(64, 64, 3))
    rng = np.random.default_rng(0)  # statistics of a trained network, not those that it starts with
    published.set_weights([np.abs(w) + rng.uniform(0, 0.1, w.shape) if w.ndim == 1 else w
                           for w in published.get_weights()])  # fmt: skip
    ours = BackboneStream("mobilenetv2")
    ours.build((None, 1, 64, 64, 3))
    for layer, weights in zip(ours.convolutions(), pretrained.mobilenet_weights(published), strict=True):
        layer.convolution.set_weights(weights)
    x = rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    expected = keras.ops.convert_to_numpy(published(x, training=False)).mean(axis=(1, 2))
    found = keras.ops.convert_to_numpy(ours(x[:, None])[-1])[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_model_gets_them_and_keeps_them_frozen(tmp_path: Path) -> None:
    config = Model(**SMALL, backbone="efficientnet-lite0")
    model = classifier.build(config, ClipSpec(frames=4, height=32, width=32), 3)
    high = model.get_layer("high")
    assert not high.trainable_weights and len(model.trainable_weights) < len(model.weights) - len(high.weights)
    pretrained.load(model)
    before = high.get_weights()
    model.compile("adam", "mse")
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
    model.train_on_batch(clips, np.ones((2, 3), np.float32))
    for one, other in zip(before, high.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert not again.get_layer("high").trainable_weights
    one, other = (keras.ops.convert_to_numpy(each(clips)) for each in (model, again))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    tuned = classifier.build(config.model_copy(update={"backbone_trainable": True}), ClipSpec(4, 32, 32), 3)
    assert tuned.get_layer("high").trainable_weights


def test_a_pickle_that_would_call_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    header = pickle.dumps(1, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    for state in (pickle.dumps({"weight": Evil()}, 2), pickle.dumps(Evil(), 2), pickle.dumps([1], 2), b"", b"\x80"):
        with pytest.raises(ServiceError, match="tensors"):
            pretrained.read_tensors(io.BytesIO(header + state + pickle.dumps([], 2)))
    assert not (tmp_path / "made").exists()


def test_a_file_that_was_changed_or_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def locate_file(self, name: str) -> Path:
            return tmp_path / "weights.pth"

    monkeypatch.setattr(pretrained, "distribution", lambda name: Found())
    with pytest.raises(ServiceError, match="can't be read"):
        pretrained.lite0_tensors()
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(ServiceError, match="not the published file"):
        pretrained.lite0_tensors()

    def missing(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pretrained, "distribution", missing)
    with pytest.raises(InputError, match="needs the package"):
        pretrained.lite0_tensors()


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**options: object) -> NoReturn:
        raise Exception("URL fetch failure on https://…: None -- Name or service not known")

    monkeypatch.setattr(keras.applications, "MobileNetV2", offline)
    model = classifier.build(Model(**SMALL, backbone="mobilenetv2"), ClipSpec(frames=4, height=32, width=32), 2)
    with pytest.raises(ServiceError, match="can't be downloaded") as raised:
        pretrained.load(model)
    assert "efficientnet-lite0" in raised.value.fix


def test_the_widths_that_the_fusion_reads() -> None:
    found = BackboneStream("efficientnet-lite0").compute_output_shape((None, 4, 112, 112, 3))
    assert [shape[-1] for shape in found] == [40, 112, HEAD]
