"""A registered model as a function from clips to calibrated probabilities.

For `sora predict`, the server and the smoke test.

TensorFlow, Keras and the model's layers are imported when a `Predictor` is made, not with this module.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora import tasks
from sora.config import Serve
from sora.core.errors import InputError, PromotionFailed, ServiceError
from sora.core.processes import Child, without_noise
from sora.core.records import Prediction, Recipe
from sora.core.tensors import VIDEO, Clips
from sora.media import MODALITY, pool
from sora.store import augment

if TYPE_CHECKING:
    import keras

# Compiled calls are warmed at these, and clips are padded to the next. None is larger: on a CPU a clip costs as much in
# a batch of 8 as of 4, and while half the clients wait for one long call the decoders have nothing to do.
BATCH_SIZES = (1, 2, 4)
MAX_BATCH = BATCH_SIZES[-1]
GOLDEN_TOLERANCE = 2e-3  # difference of a probability: other processors and batch sizes round differently
_load = threading.Lock()  # Keras' loading scope is global state


class ModelRefused(ServiceError):
    """A model file that must not be used: wrong bytes, not loadable, or other answers than its recipe promises."""


class Predictor:
    """One loaded, warmed and callable model version. Making one takes seconds; run it off the request path.

    Arguments:
        model_file: a `.keras` file.
        recipe: what the registry stored with it; `recipe.model_sha256` must match the file.
        version: the registry's number, which every answer carries.

    Raises:
        ModelRefused: the digest differs, loading in safe mode failed, or shapes and classes disagree with the recipe.
    """

    def __init__(self, model_file: Path, recipe: Recipe, version: int) -> None:
        self.task = tasks.of(recipe.multilabel)
        if recipe.schema != self.task.schema:
            raise ModelRefused(
                f"version {version} has a recipe of schema {recipe.schema}, which this Sora does not read",
                fix="use the release of Sora that trained it, or train again",
            )
        if unknown := set(recipe.views) - set(augment.VIEWS):
            raise ModelRefused(
                f"version {version} asks for a view that this Sora does not know: {', '.join(sorted(unknown))}",
                fix="use the release of Sora that trained it, or train again",
            )
        self.recipe = recipe
        self.version = version
        self.classes = recipe.classes
        self.digest = _verified(model_file, recipe, version)
        with _load:
            self._model = _loaded(model_file, recipe, version)
            self._call = _compiled(self._model)
        self._attribute: Callable[[Clips, int], tuple[np.ndarray, float]] | None = None
        for size in BATCH_SIZES:
            logits = self._call(self.blank(size))
            if logits.shape != (size, len(self.classes)):
                raise ModelRefused(
                    f"version {version} answers with shape {logits.shape}, its recipe has {len(self.classes)} classes",
                    fix="register the model with the recipe that it was evaluated with",
                )

    def blank(self, count: int) -> Clips:
        """Clips of zeros."""
        return Clips.blank(MODALITY.tensors(self.recipe.clip), count)

    def probabilities(self, clips: Clips) -> np.ndarray:
        """Calibrated class probabilities of each clip, averaged over its views if the recipe names some.

        Args:
            clips: n ≥ 1, with the tensors of the recipe's clip spec.

        Output shape: `(n, classes) float64`, rows sum to 1; of a multi-label model each class has its own.
        """
        count = len(clips)
        clips = augment.views(clips, self.recipe.views)
        logits = self._batched(self._call, clips)
        shares = self.task.clip_probabilities(logits, self.recipe.temperature)
        mean: np.ndarray = shares.reshape(count, -1, shares.shape[1]).mean(axis=1)
        return mean

    def embeddings(self, clips: Clips) -> np.ndarray:
        """The representation of each clip: the output of the layer before the last. Compiled at the first call.

        Output shape: `(n, width) float64`; the width is the setting `model.embedding` that it was trained with.

        Raises:
            ModelRefused: the model has no layer "embedding": it was not trained by Sora.
        """
        return self._batched(self._embed, clips)

    def prepare_embeddings(self) -> None:
        """Compiles what `embeddings` calls: a server does so outside the thread that predicts.

        Raises:
            ModelRefused: see `embeddings`.
        """
        _ = self._embed

    @cached_property
    def _embed(self) -> Callable[[Clips], np.ndarray]:
        from sora.model import classifier

        try:
            with _load:
                call = _compiled(classifier.embedding_model(self._model))
                call(self.blank(1))  # the first call plans kernels and buffers
            return call
        except ValueError as error:
            raise ModelRefused(
                f"version {self.version} has no representation: {error}", fix="promote a version that Sora trained"
            ) from error

    def _batched(self, call: Callable[[Clips], np.ndarray], clips: Clips) -> np.ndarray:
        """The answers of a compiled call, which is used only in sizes of `BATCH_SIZES`."""
        rows = [self._padded(call, clips[start : start + MAX_BATCH]) for start in range(0, len(clips), MAX_BATCH)]
        return np.concatenate(rows)

    def _padded(self, call: Callable[[Clips], np.ndarray], clips: Clips) -> np.ndarray:
        count = len(clips)
        size = next(size for size in BATCH_SIZES if size >= count)
        return call(clips.padded(size))[:count].astype(np.float64)

    def predict(self, clips: Clips) -> Prediction:
        """The answer for one video: the mean over its clips."""
        return self.answer(self.probabilities(clips))

    def answer(self, probabilities: np.ndarray) -> Prediction:
        """The answer for one video from the probabilities of its clips, `(clips, classes)`."""
        mean = probabilities.mean(axis=0)
        named = {name: float(value) for name, value in zip(self.classes, mean, strict=True)}
        below = self.recipe.unsure_below
        unsure = None if below is None else bool(mean.max() < below)
        labels = self.task.labels(mean, self.classes)
        return Prediction(self.classes[int(mean.argmax())], named, self.version, unsure, labels)

    def attribution(self) -> Callable[[Clips, int], tuple[np.ndarray, float]]:
        """Tells where a class was seen: one clip, a class's index → the evidence,
        `(time, rows, columns) float32` as in `sora.model.attribution.evidence`, and the class's calibrated log-odds.

        Made at the first call, which takes a second or two: call it outside the thread that predicts.

        Raises:
            ServiceError: not with this backend, or not with this model.
        """
        if self._attribute is None:
            with _load:
                self._attribute = self._attribute or _attributing(self._model, self.recipe)
        return self._attribute

    def check_golden(self) -> float:
        """Answers the recipe's made-up clips again; the largest difference from the stored probabilities.

        Raises:
            ModelRefused: a difference beyond `GOLDEN_TOLERANCE`, or the answers are not probabilities.
        """
        from sora.judging.evaluation import golden_clip

        worst = 0.0
        for golden in self.recipe.golden or ({"seed": 0, "probabilities": None},):
            clip = golden_clip(self.recipe.clip, int(golden["seed"]))
            answer = self.probabilities(clip)[0]
            if not self.task.are_probabilities(answer):
                raise ModelRefused(f"version {self.version} answers {answer.tolist()}", fix="train again")
            if golden["probabilities"] is not None:
                worst = max(worst, float(np.abs(answer - np.asarray(golden["probabilities"])).max()))
        if worst > GOLDEN_TOLERANCE:
            raise ModelRefused(
                f"version {self.version} differs by {worst:.4f} from the answers stored with it",
                fix="serve it with the versions of Keras and TensorFlow that trained it, or train again",
            )
        return worst


def _verified(model_file: Path, recipe: Recipe, version: int) -> str:
    try:
        with model_file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelRefused(f"version {version}: can't read {model_file}: {error}", fix="fetch it again") from error
    if digest != recipe.model_sha256:
        raise ModelRefused(
            f"version {version}: {model_file.name} has sha256 {digest[:12]}…, its recipe {recipe.model_sha256[:12]}…",
            fix="remove it from .sora/cache/models and start again; if that fails too, the registry's copy is damaged",
        )
    return digest


def _loaded(model_file: Path, recipe: Recipe, version: int) -> keras.Model:
    prepare_backend()
    import keras

    from sora.model import classifier

    try:
        model = keras.saving.load_model(model_file, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises whatever its archive, JSON or layers raise
        raise ModelRefused(
            f"version {version} can't be loaded: {type(error).__name__}: {str(error)[:300]}",
            fix="serve it with the versions of Keras and Sora that trained it, or train again",
        ) from error
    if wrong := classifier.misfit(model, recipe.clip, len(recipe.classes)):
        raise ModelRefused(
            f"version {version} does not fit its recipe: {wrong}",
            fix="register the model with the recipe that it was evaluated with",
        )
    return model


def _compiled(model: keras.Model) -> Callable[[Clips], np.ndarray]:
    """A function from n clips to `(n, width of the model's output) float`, for any n."""
    import keras

    from sora.model import classifier

    if keras.config.backend() != "tensorflow":
        return lambda clips: np.asarray(model.predict_on_batch(classifier.fed(model, clips.tensors)))
    import tensorflow as tf

    # One trace with a symbolic batch size: ready in 1.3 × TensorFlow's import, against 2.0 × with one a size.
    taken = classifier.inputs(model)
    signature = [tf.TensorSpec((None, *one.shape), one.dtype, name=one.name) for one in taken]

    @tf.function(input_signature=signature, autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types
    def call(*tensors: Any) -> Any:
        return model(tensors[0] if len(tensors) == 1 else list(tensors), training=False)

    function = call.get_concrete_function()
    return lambda clips: function(*(tf.constant(clips.tensors[one.name]) for one in taken)).numpy()


def _attributing(model: keras.Model, recipe: Recipe) -> Callable[[Clips, int], tuple[np.ndarray, float]]:
    import keras

    from sora.model import attribution

    if keras.config.backend() != "tensorflow":  # Keras itself has no gradients
        raise ServiceError("explanations need the TensorFlow backend", fix="serve without KERAS_BACKEND")
    import tensorflow as tf

    parts, task = attribution.split(model), tasks.of(recipe.multilabel)
    taken = MODALITY.tensors(recipe.clip)
    names = [VIDEO, *parts.others]
    signature = [tf.TensorSpec((1, *taken[name].shape), taken[name].dtype, name=name) for name in names]

    @tf.function(input_signature=[tf.TensorSpec((), tf.int32), *signature], autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types
    def call(label: Any, video: Any, *others: Any) -> Any:
        maps = parts.maps(video)
        features = attribution.pooled(maps)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(features)
            logits = parts.head([*features, *others], training=False) / recipe.temperature
            odds = task.log_odds(logits, label)
        return attribution.evidence(maps, tape.gradient(odds, features), parts.key_frames), odds

    function = call.get_concrete_function()

    def attribute(clip: Clips, label: int) -> tuple[np.ndarray, float]:
        evidence, odds = function(tf.constant(label, tf.int32), *(tf.constant(clip.tensors[name]) for name in names))
        return evidence.numpy(), float(odds)

    attribute(Clips.blank(taken, 1), 0)  # the first call plans kernels and buffers
    return attribute


def prepare_backend() -> None:
    """Imports what loading a model needs: the backend, Keras and the project's registered layers.

    The slow part of a start, so the server begins it before it knows which version it will load.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    import sora.model.classifier  # noqa: F401  registers its layers

    if keras.config.backend() == "tensorflow":
        import tensorflow  # noqa: F401


class Smoke:
    """The test after a move of the champion: does it load as in the server, and answer its golden
    clips as its recipe promises? In a child process: the caller (the flow, `sora promote`) never imports TensorFlow.

    For one test. The child starts its imports when it is made, so make it before it is needed; as a context manager
    it ends with the block.
    """

    def __init__(self) -> None:
        self._child = Child("sora.runtime.smoke")

    def __enter__(self) -> Smoke:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()

    def __call__(self, model_file: Path, recipe: Recipe, version: int = 0) -> dict[str, Any]:
        """Returns {"difference": largest difference of a probability, "seconds": of loading and testing}.

        Raises:
            PromotionFailed: it does not load, its digest differs, or its answers do.
        """
        job = {"model_file": str(model_file), "recipe": recipe.to_dict(), "version": version}
        try:
            result = self._child.result(job)
        except ServiceError as error:
            raise PromotionFailed(f"the smoke test failed: {error.message}", fix=error.fix) from error
        return {"difference": result["difference"], "seconds": result["seconds"]}


def clips_of(path: Path, recipe: Recipe, settings: Serve | None = None) -> Clips:
    """A video's clips as a model's recipe needs them.

    Arguments:
        settings: the limits that `sora serve` would hold the file to; default: those of the default settings.

    Raises:
        InputError: no such file, or it can't be read.
        VideoError: it can't be used.
        ServiceError: no decoder could be started.
    """
    with closing(decoded([path], recipe, settings)) as answers:
        clips = next(answers)
    if isinstance(clips, InputError):
        raise clips
    return clips


def decoded(paths: Sequence[Path], recipe: Recipe, settings: Serve | None) -> Generator[Clips | InputError, None, None]:
    """The clips of each file, in the order given, by one confined decoder."""
    bounds = pool.Bounds.of_calls(settings or Serve.model_validate({}))
    # A link is followed, since the user named it; the decoder's files are never links.
    there = [path.resolve() for path in paths if path.is_file()]
    with closing(pool.in_order(there, recipe.clip, bounds)) as clips:
        for path in paths:
            if path.is_file():
                yield next(clips)
            else:
                yield InputError(f"{path} is not a file", fix="name a video file")


def predict_files(
    paths: Sequence[Path], model_file: Path, recipe: Recipe, version: int, settings: Serve | None = None
) -> list[dict[str, Any]]:
    """Answers for video files, in order: `{path, label, probabilities, version}` or `{path, error}`.

    With a threshold in the recipe an answer also has `unsure`; a multi-label model's also has `labels`.

    The model is loaded at the first readable file. A file that can't be used costs only its own answer.

    Arguments:
        settings: the limits that `sora serve` would hold a file to; default: those of the default settings.

    Raises:
        ModelRefused: see `Predictor`.
        ServiceError: no decoder could be started.
    """
    predictor: Predictor | None = None
    answers: list[dict[str, Any]] = []
    with closing(decoded(paths, recipe, settings)) as all_clips:
        for path, clips in zip(paths, all_clips, strict=True):
            if isinstance(clips, InputError):
                answers.append({"path": str(path), "error": clips.message})
                continue
            if predictor is None:
                with without_noise():  # only on a terminal; a server's log keeps it
                    predictor = Predictor(model_file, recipe, version)
            answers.append({"path": str(path), **predictor.predict(clips).to_dict()})
    return answers
