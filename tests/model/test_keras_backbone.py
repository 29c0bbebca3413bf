"""A user's Keras model, or one of Keras Applications, as a backbone: what is taken, what is refused, what is kept."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import pytest

from sora.config import Model
from sora.core.errors import InputError, ServiceError
from sora.model import attribution, backbone, classifier, keras_backbone, pretrained
from sora.model.keras_backbone import ApplicationPixels, KerasBackbone
from tests.clips import SMALL, SPEC
from tests.model.models import of_pictures, of_videos

CLIPS = np.random.default_rng(0).uniform(-1, 1, (2, 4, 12, 16, 3)).astype(np.float32)


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applications with random weights: nothing is downloaded."""
    for name in keras_backbone.applications():
        real = getattr(keras.applications, name)

        @functools.wraps(real)
        def fake(real: Any = real, **options: Any) -> keras.Model:
            assert options.pop("weights") == "imagenet"
            return real(weights=None, **options)

        monkeypatch.setattr(keras.applications, name, fake)


def test_every_frame_is_seen_alone() -> None:
    model = of_pictures()
    stream = KerasBackbone(model, trainable=False)
    assert not stream.video and stream.channels == (6, 8) and stream.size is None
    found = stream(CLIPS)
    for frame in range(4):
        for level, expected in zip(found, model(CLIPS[:, frame], training=False), strict=True):
            np.testing.assert_allclose(_numpy(level)[:, frame], _numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moments", [False, True])
def test_a_video_is_seen_as_a_whole(moments: bool) -> None:
    model = of_videos(moments=moments)
    stream = KerasBackbone(model, trainable=False)
    assert stream.video and stream.channels == (6,)
    (found,) = stream(CLIPS)
    expected = _numpy(model(CLIPS))
    assert found.shape == (2, 2 if moments else 1, 6)
    np.testing.assert_allclose(_numpy(found), expected if moments else expected[:, None], rtol=1e-5)
    assert stream.compute_output_shape((None, 4, 12, 16, 3)) == [(None, 2 if moments else 1, 6)]


def test_pictures_of_another_size_are_resized() -> None:
    model = of_pictures(24, 20)
    stream = KerasBackbone(model)
    assert stream.size == (24, 20)
    resized = keras.ops.image.resize(CLIPS.reshape(-1, 12, 16, 3), (24, 20), data_format="channels_last")
    for level, expected in zip(stream(CLIPS), model(resized, training=False), strict=True):
        np.testing.assert_allclose(_numpy(level).reshape(8, -1), _numpy(expected), rtol=1e-5, atol=1e-6)


def test_videos_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="videos of 8 frames, received 4"):
        KerasBackbone(of_videos(time=8))(CLIPS)


def test_frozen_or_not_it_keeps_its_statistics(tmp_path: Path) -> None:
    for trainable in (False, True):
        stream = KerasBackbone(of_pictures(), trainable=trainable, name="high")
        pictures = keras.Input(CLIPS.shape[1:])
        levels = [keras.layers.GlobalAveragePooling1D()(level) for level in stream(pictures)]
        model = keras.Model(pictures, keras.layers.Dense(1)(keras.layers.Concatenate()(levels)))
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        before = [weight.copy() for weight in stream.get_weights()]
        model.train_on_batch(CLIPS, np.ones((2, 1), np.float32))
        kept = [np.array_equal(*pair) for pair in zip(before, stream.get_weights(), strict=True)]
        moving = ["moving" in weight.path for weight in stream.weights]
        assert kept == (moving if trainable else [True] * len(kept)) and any(moving)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
        assert len(again.trainable_weights) == len(model.trainable_weights) == 2 + trainable * moving.count(False)
        np.testing.assert_allclose(_numpy(again(CLIPS)), _numpy(model(CLIPS)), rtol=1e-5)


def test_layers_that_the_user_froze_stay_frozen() -> None:
    model = of_pictures()
    model.layers[1].trainable = False
    stream = KerasBackbone(model, trainable=True)
    again = KerasBackbone.from_config(stream.get_config())
    assert len(stream.trainable_weights) == len(again.trainable_weights) == len(model.trainable_weights) > 0
    assert not again.model.layers[1].trainable


def test_a_file_of_the_project_is_a_backbone(tmp_path: Path) -> None:
    (tmp_path / "networks").mkdir()
    model = of_pictures()
    model.save(tmp_path / "networks" / "mine.keras")
    stream = backbone.stream("networks/mine.keras", trainable=False, project=tmp_path, name="high")
    assert isinstance(stream, KerasBackbone) and stream.name == "high" and not stream.trainable
    for level, expected in zip(stream(CLIPS), KerasBackbone(model)(CLIPS), strict=True):
        np.testing.assert_allclose(_numpy(level), _numpy(expected), rtol=1e-5)
    whole = keras.Sequential([keras.Input((None, None, 3)), keras.layers.GlobalAveragePooling2D()])
    whole.save(tmp_path / "whole.keras")
    (means,) = backbone.stream("whole.keras", trainable=False, project=tmp_path)(CLIPS)
    np.testing.assert_allclose(_numpy(means), CLIPS.mean(axis=(2, 3)), rtol=1e-4, atol=1e-5)


def test_a_file_outside_the_project_is_refused(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    of_pictures().save(tmp_path / "mine.keras")
    (project / "link.keras").symlink_to(tmp_path / "mine.keras")
    for path in ("../mine.keras", str(tmp_path / "mine.keras"), "link.keras"):
        with pytest.raises(InputError, match="outside the project"):
            backbone.stream(path, trainable=False, project=project)
    with pytest.raises(InputError, match=r"no backbone other\.keras"):
        backbone.stream("other.keras", trainable=False, project=project)


def test_a_file_that_brings_code_or_is_damaged_is_refused(tmp_path: Path) -> None:
    pictures = keras.Input((8, 8, 3))
    keras.Model(pictures, keras.layers.Lambda(lambda x: x[:, 0, 0])(pictures)).save(tmp_path / "code.keras")
    (tmp_path / "damaged.keras").write_bytes(b"PK\x03\x04")
    for name in ("code.keras", "damaged.keras"):
        with pytest.raises(InputError, match=f"{name} can't be loaded") as raised:
            backbone.stream(name, trainable=False, project=tmp_path)
        assert "Lambda" in raised.value.fix


def _of(shape: tuple[int | None, ...], *layers: keras.layers.Layer, dtype: str = "float32") -> keras.Model:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: _of((8, 8, 3), keras.layers.Conv2D(4, 3)), r"returns \(None, 6, 6, 4\)"),
        (lambda: _of((8, 8, 1), keras.layers.Flatten()), r"takes \(None, 8, 8, 1\)"),
        (lambda: _of((8,), keras.layers.Dense(4)), r"takes \(None, 8\)"),
        (lambda: _of((8, 8, 3), keras.layers.Reshape((8, 24))), r"returns \(None, 8, 24\)"),
        (lambda: _of((8, 8, 3), keras.layers.Rescaling(1.0), keras.layers.Flatten(), dtype="uint8"), "takes uint8"),
    ],
    ids=["maps", "grey", "vectors", "pictures in time", "bytes"],
)
def test_a_model_that_is_no_backbone_is_refused(model: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        KerasBackbone(model())
    model().save(tmp_path / "odd.keras")
    with pytest.raises(InputError, match=f"odd.keras is no backbone.*{says}") as raised:
        backbone.stream("odd.keras", trainable=False, project=tmp_path)
    assert "(batch, channels)" in raised.value.fix


def test_a_model_without_known_inputs_is_refused() -> None:
    for odd in (keras.Sequential([keras.layers.Dense(4)]), keras.layers.Dense(4)):
        with pytest.raises(ValueError, match="known inputs"):
            KerasBackbone(odd)


@pytest.mark.parametrize("name", ["EfficientNetV2B0", "MobileNetV3Small", "VGG16", "MobileNet"])
def test_an_application_sees_pixels_as_it_was_trained_with(name: str, offline: None, tmp_path: Path) -> None:
    """The first two scale pixels of 0 to 255 themselves; then swapped and centred colours, and -1 to 1."""
    stream = backbone.stream(f"applications:{name}", trainable=False, name="high")
    # Smaller pictures: TensorFlow 2.21 gives MobileNetV3 another answer at every call (of 12x16, without Sora).
    clips = np.random.default_rng(0).uniform(-1, 1, (1, 2, 64, 64, 3)).astype(np.float32)
    assert isinstance(stream, KerasBackbone) and stream.size is None and not stream.video
    pictures = keras.Input(clips.shape[1:])
    model = keras.Model(pictures, stream(pictures))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert not model.trainable_weights and not again.trainable_weights
    network = stream.model.layers[-1]
    published = {
        "VGG16": lambda x: x[..., ::-1] - (103.939, 116.779, 123.68),
        "MobileNet": lambda x: x / 127.5 - 1,
    }
    seen = published.get(name, lambda x: x)((clips[0].astype(np.float64) + 1) * 127.5)
    expected = _numpy(network(seen.astype(np.float32), training=False))
    for each in (model, again):
        found = _numpy(keras.tree.flatten(each(clips))[0])
        np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))


def test_an_application_of_one_size_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(keras.applications.NASNetMobile)
    def fixed(**options: object) -> keras.Model:
        return of_pictures(24, 20)

    monkeypatch.setattr(keras.applications, "NASNetMobile", fixed)
    stream = backbone.stream("applications:NASNetMobile", trainable=False)
    assert stream.size == (24, 20) and [tuple(level.shape) for level in stream(CLIPS)] == [(2, 4, 6), (2, 4, 8)]


def test_an_application_that_is_unknown_or_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no application 'ResNet51'") as raised:
        backbone.stream("applications:ResNet51", trainable=False)
    assert "ResNet50" in raised.value.fix
    for name in ("imagenet_utils", "__name__", ""):
        with pytest.raises(ValueError, match="no application"):
            ApplicationPixels(name)

    @functools.wraps(keras.applications.ResNet50)
    def offline(**options: object) -> NoReturn:
        raise Exception("URL fetch failure on https://…\nmore")

    monkeypatch.setattr(keras.applications, "ResNet50", offline)
    with pytest.raises(ServiceError, match=r"ResNet50 can't be downloaded: URL fetch failure on https://…") as failed:
        backbone.stream("applications:ResNet50", trainable=False)
    assert "more" not in failed.value.message and "efficientnet-lite0" in failed.value.fix


def test_one_way_to_each_known_backbone() -> None:
    for name in backbone.BACKBONES:
        found = backbone.stream(name, trainable=False, name="high")
        assert isinstance(found, backbone.BackboneStream) and found.backbone == found.get_config()["backbone"] == name
    for name in ("efficientnet-lite9", "mine.keras"):  # the second: of no project
        with pytest.raises(InputError, match=f"no backbone '{name}'") as raised:
            backbone.stream(name, trainable=False)
        assert "efficientnet-lite1" in raised.value.fix


def test_weights_are_given_to_any_model_with_such_a_network() -> None:
    clips = keras.Input(CLIPS.shape[1:])
    given = KerasBackbone(of_pictures(), name="high")
    model = keras.Model(clips, given(clips))
    before = given.get_weights()
    pretrained.load(model)
    for one, other in zip(before, given.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_classifier_takes_it_and_says_that_it_explains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(kind: str, **options: Any) -> KerasBackbone:
        return KerasBackbone(of_pictures(), **options)

    monkeypatch.setattr(backbone, "stream", given)
    model = classifier.build(Model(**SMALL, backbone="mobilenetv2"), SPEC, 2)
    assert model.get_layer("high").channels == (6, 8) and model.output_shape == (None, 2)
    with pytest.raises(ServiceError, match="no maps of its pictures"):
        attribution.split(model)
