"""Backbones that are Keras models: a user's `.keras` file, or one of Keras Applications.

A model of pictures takes `(batch, height, width, rgb)`, a model of videos `(batch, time, height, width, rgb)`, both
float, -1 to 1. Files are loaded in Keras's safe mode, which runs no code that a file brings. A classifier that was
saved holds the whole model with its weights: it needs neither the file nor a download again.
"""

from __future__ import annotations

import inspect
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
from keras import ops

from sora.core.errors import InputError, ServiceError
from sora.core.tensors import Shape

APPLICATIONS = "applications:"  # before the name of one of Keras Applications
SUFFIX = ".keras"
_ALLOWED = (
    "it takes float pictures (batch, height, width, 3) or videos (batch, time, height, width, 3) and returns "
    "(batch, channels), a list of those, or, of videos, (batch, time, channels)"
)


@keras.saving.register_keras_serializable(package="sora")
class KerasBackbone(keras.layers.Layer):
    """A Keras model as a stream: features of every frame, or of the video as a whole.

    Its normalisations use their stored statistics, and nothing is dropped, also while its weights are trained: a few
    clips would spoil the statistics. It computes in the precision that it was saved with.

    Arguments:
        model: of pictures: `(batch, height, width, rgb)` → `(batch, channels)`; it sees every frame alone. Of videos:
            `(batch, time, height, width, rgb)` → `(batch, channels)` or `(batch, time', channels)`. Instead of one
            output, it may have a list of them, the levels. Float input, -1 to 1.
        trainable: of Keras; False leaves the weights as they are, True trains those that the model itself does not
            hold fixed.

    Input shape: `(batch, time, height, width, rgb)`, -1 to 1. Pictures of another size than the model's are resized
        (bilinear).
    Output: a list of `(batch, time, channels)`, one for each level; of a model of videos `(batch, time', channels)`,
        with time' 1 where the model returns one vector.

    Raises:
        ValueError: the model takes or returns something else, or videos of another number of frames.

    Example: `KerasBackbone(keras.saving.load_model("backbone.keras"), trainable=False)(KeyFrames(4)(clips))`.
    """

    def __init__(self, model: keras.Model, **options: Any) -> None:
        super().__init__(**options)
        _check(model)
        self.model = model
        if not self.trainable:  # type: ignore[has-type]
            # Keras passes it on when it changes, not when it is given.
            self.trainable = True
            self.trainable = False

    @property
    def video(self) -> bool:
        """Whether it looks at frames together."""
        return len(self.model.inputs[0].shape) == 5

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, in pixels, of the pictures that the model asks for; None: it takes any."""
        height, width = self.model.inputs[0].shape[-3:-1]
        return None if height is None or width is None else (height, width)

    @property
    def channels(self) -> tuple[int, ...]:
        """The width of each level's features."""
        return tuple(output.shape[-1] for output in self.model.outputs)

    def build(self, input_shape: Shape) -> None:
        wanted = self.model.inputs[0].shape[1]
        if self.video and wanted not in (None, input_shape[1]):
            raise ValueError(f"the backbone takes videos of {wanted} frames, received {input_shape[1]}")

    def call(self, x: Any) -> list[Any]:
        time, *given = x.shape[1:4]
        frames = ops.reshape(x, (-1, *x.shape[2:]))
        size = self._seen(given)
        if size != tuple(given):
            frames = ops.image.resize(frames, size, interpolation="bilinear", data_format="channels_last")
        seen = ops.reshape(frames, (-1, time, *size, 3)) if self.video else frames
        levels = [ops.cast(level, self.compute_dtype) for level in _listed(self.model(seen, training=False))]
        if not self.video:
            return [ops.reshape(level, (-1, time, level.shape[-1])) for level in levels]
        return [level if len(level.shape) == 3 else ops.expand_dims(level, 1) for level in levels]

    def compute_output_shape(self, input_shape: Shape) -> list[Shape]:
        batch, time, *picture, rgb = input_shape
        if not self.video:
            return [(batch, time, width) for width in self.channels]
        seen = keras.KerasTensor((batch, time, *self._seen(picture), rgb), self.compute_dtype)
        levels = _listed(self.model.compute_output_spec(seen))
        return [tuple(one.shape) if len(one.shape) == 3 else (batch, 1, one.shape[-1]) for one in levels]

    def _seen(self, given: Any) -> tuple[Any, ...]:
        """Height and width of the pictures that the model gets."""
        return tuple(own or side for own, side in zip(self.model.inputs[0].shape[-3:-1], given, strict=True))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KerasBackbone:
        # In the safe mode of the loading around it; by itself Keras's default, which is safe too. Keras empties what it
        # is given.
        model = keras.saving.deserialize_keras_object(deepcopy(config["model"]))
        return cls(**{**config, "model": model})


def _check(model: keras.Model) -> None:
    """
    Raises:
        ValueError: the model does not take or return what a backbone does.
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError("not a functional or sequential model with known inputs")
    takes = [tuple(one.shape) for one in model.inputs]
    returns = [tuple(one.shape) for one in model.outputs]
    rank = len(takes[0])
    if len(takes) != 1 or rank not in (4, 5) or takes[0][-1] != 3:
        raise ValueError(f"it takes {_words(takes)}")
    if not keras.backend.is_float_dtype(model.inputs[0].dtype):
        raise ValueError(f"it takes {model.inputs[0].dtype}")
    ranks = (2,) if rank == 4 else (2, 3)
    if any(len(shape) not in ranks or shape[-1] is None for shape in returns):
        raise ValueError(f"it takes {_words(takes)} and returns {_words(returns)}")


def _words(shapes: list[Shape]) -> str:
    return " and ".join(str(shape) for shape in shapes)


def _listed(value: Any) -> list[Any]:
    return list(keras.tree.flatten(value))


def from_file(path: str, project: Path) -> keras.Model:
    """The model of a `.keras` file, with its weights.

    Arguments:
        path: from the project's folder, and inside it.

    Raises:
        InputError: there is no such file in the project, it can't be loaded in safe mode, or it is no backbone.
    """
    file = (project / path).resolve()
    if not file.is_relative_to(project.resolve()):
        raise InputError(f"the backbone {path} is outside the project", fix=f"copy the file into {project}")
    if file.suffix != SUFFIX or not file.is_file():
        raise InputError(f"there is no backbone {path} in {project}", fix=f"name a {SUFFIX} file of the project")
    try:
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:  # whatever a damaged or hostile file can raise
        raise InputError(
            f"the backbone {path} can't be loaded: {_first_line(error)}",
            fix="save it with model.save of this version of Keras, made of Keras's own layers, without Lambda",
        ) from error
    try:
        _check(model)
    except ValueError as error:
        raise InputError(f"{path} is no backbone: {error}", fix=f"change it so that {_ALLOWED}") from error
    return model


# -- Keras Applications --


@keras.saving.register_keras_serializable(package="sora")
class ApplicationPixels(keras.layers.Layer):
    """Pixels as one of Keras Applications was trained with, by its own `preprocess_input`.

    Arguments:
        application: its name, as in `keras.applications`.

    Input and output shape: `(batch, height, width, rgb)`; the input -1 to 1.

    Raises:
        ValueError: there is no such application.

    Example: `ApplicationPixels("ResNet50")(pictures)`.
    """

    def __init__(self, application: str, **options: Any) -> None:
        super().__init__(**options)
        self.application = application
        self.preprocess = _module(application).preprocess_input

    def call(self, pictures: Any) -> Any:
        return self.preprocess((pictures + 1.0) * 127.5, data_format="channels_last")

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "application": self.application}


def application(name: str) -> keras.Model:
    """One of Keras Applications with its weights from ImageNet, from pixels of -1 to 1 to the mean of its last maps.

    Raises:
        InputError: there is no such application.
        ServiceError: its weights can't be downloaded.
    """
    try:
        pixels = ApplicationPixels(name, name="pixels", dtype="float32")
    except ValueError as error:
        raise InputError(str(error), fix=f"choose one of {', '.join(applications())}") from error
    network = published(name, pooling="avg")
    pictures = keras.Input(network.input_shape[1:], name="pictures")
    return keras.Model(pictures, network(pixels(pictures)), name=name)


def applications() -> tuple[str, ...]:
    """The names in `keras.applications`."""
    return tuple(name for name, value in vars(keras.applications).items() if inspect.isfunction(value))


def published(name: str, **options: Any) -> keras.Model:
    """One of Keras Applications without its classifier, with its weights from ImageNet.

    Raises:
        ServiceError: the weights can't be downloaded.
    """
    try:
        return getattr(keras.applications, name)(weights="imagenet", include_top=False, **options)
    except Exception as error:  # whatever a download can raise
        raise ServiceError(
            f"the weights of {name} can't be downloaded: {_first_line(error)}",
            fix="connect this machine once, or choose `model.backbone: efficientnet-lite0`, which needs no download",
        ) from error


def _module(name: str) -> ModuleType:
    """The module of an application, which has its `preprocess_input`."""
    if name not in applications():
        raise ValueError(f"Keras has no application {name!r}")
    return sys.modules[getattr(keras.applications, name).__module__]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
