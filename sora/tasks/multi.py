"""Any number of classes a video.

Several labels are one string, `bright|left`: sorted, without repeats. So the manifest, the ledger, the rules about
copies and every digest go on with one string a video, and only what counts, learns or answers single classes takes it
apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.core.records import LABEL_SEPARATOR
from sora.tasks.task import Task, Words

if TYPE_CHECKING:
    import keras
    import pandas as pd

THRESHOLD = 0.5  # classes that are at least so probable are answered


@dataclass(frozen=True)
class MultiLabel(Task):
    """Each class has a probability of its own, by a sigmoid, and the answer is all classes of at least `THRESHOLD`.

    It is right when it is an exact match. Targets are `(clips, classes) float32`, or bool: 1 for each class that the
    clip has.
    """

    multilabel = True
    schema = 2  # a Sora that knows schema 1 only would answer by a softmax
    stage_suffix = "-multilabel"
    exclusive = False
    words = Words(
        accuracy="exact match",
        majority="most frequent labels",
        always="accuracy of always answering them",
        probability="probability",
        share="share that has the class",
        answers=(
            "Several labels a video",
            f"An answer holds every class with a probability of at least {THRESHOLD:.1%}, and is right when it is an\n"
            "exact match: all labels of the video and no other. Recall, precision and average precision below are each "
            "class's own.",
            "There is no confusion matrix: a label that is missed is not taken for another one.",
        ),
    )

    def names(self, label: str) -> list[str]:
        """Blanks beside a `|`, and nothing between two, count for nothing."""
        return sorted({name.strip() for name in label.split(LABEL_SEPARATOR)} - {""})

    def join(self, names: Iterable[str]) -> str:
        return LABEL_SEPARATOR.join(sorted(set(names)))

    def is_class(self, name: str) -> bool:
        return LABEL_SEPARATOR not in name

    def single(self, labels: pd.Series) -> pd.Series:
        return labels.str.split(LABEL_SEPARATOR, regex=False).explode()

    def known(self, labels: Iterable[str], classes: Sequence[str]) -> np.ndarray:
        wanted = set(classes)
        return np.array([not wanted.isdisjoint(self.names(label)) for label in labels], bool)

    def index(self, label: str, numbers: Mapping[str, int]) -> tuple[int, ...]:
        """A name that is no class counts for nothing."""
        return tuple(numbers[name] for name in self.names(label) if name in numbers)

    def targets(self, indices: Iterable[Iterable[int]], classes: int) -> np.ndarray:
        indices = list(indices)
        targets = np.zeros((len(indices), classes), np.float32)
        for row, own in zip(targets, indices, strict=True):
            row[list(own)] = 1
        return targets

    def dense(self, targets: np.ndarray, classes: int) -> np.ndarray:
        return targets.astype(np.float32, copy=False)

    def mirrored(self, target: np.ndarray, to: Sequence[int]) -> np.ndarray | None:
        images = np.asarray(to)
        if target[images < 0].any():
            return None
        # Pairs are each other's: the way back is the way there.
        return target[np.where(images < 0, np.arange(len(images)), images)]

    def class_weights(self, targets: np.ndarray, classes: int) -> np.ndarray:
        """Ones: positive weights would move every probability, and threshold and calibration rest on them."""
        return np.ones(classes, np.float32)

    def weights(self, targets: np.ndarray, class_weights: np.ndarray) -> np.ndarray:
        return np.ones(targets.shape[:-1], np.float32)

    def loss(self, label_smoothing: float) -> keras.losses.Loss:
        """The mean of the cross-entropies of a sigmoid for each class."""
        import keras

        return keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=label_smoothing)

    def accuracy(self) -> keras.metrics.Metric:
        import keras

        return keras.metrics.MeanMetricWrapper(_exact, "accuracy")

    def clip_probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """The sigmoid of logits / temperature."""
        return 0.5 + 0.5 * np.tanh(np.asarray(logits, np.float64) / temperature / 2)  # without overflow

    def are_probabilities(self, row: np.ndarray) -> bool:
        return bool(np.isfinite(row).all())

    def answered(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities >= THRESHOLD

    def labels(self, row: np.ndarray, classes: Sequence[str]) -> tuple[str, ...]:
        return tuple(classes[number] for number in np.argsort(-row, kind="stable") if row[number] >= THRESHOLD)

    def answer_among(self, video: Mapping[str, Any], numbers: Mapping[str, int]) -> set[str]:
        return {name for name in self.names(video["predicted"]) if name in numbers}

    def log_odds(self, logits: Any, label: Any) -> Any:
        """The logit itself."""
        from keras import ops

        return ops.sum(ops.one_hot(label, logits.shape[-1], dtype="float32") * logits[0])

    def margins(self, probabilities: np.ndarray, label: int) -> np.ndarray:
        """The probability of the class less the threshold: other classes take nothing from it."""
        return probabilities[:, label] - THRESHOLD

    def log_loss(self, probabilities: np.ndarray, targets: np.ndarray) -> float:
        """Of a video the sum over its classes."""
        given = np.where(targets, probabilities, 1 - probabilities)
        return float(-np.log(np.clip(given, 1e-12, 1)).sum(axis=1).mean())

    def decisions(self, probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One for each class of each video: whether it has it."""
        return probabilities.ravel(), targets.ravel().astype(bool)

    def mistake(self, row: np.ndarray, target: np.ndarray) -> tuple[float, float]:
        """About the class that it was most wrong about."""
        most = float(np.abs(row - target).max())
        return most, 1 - most

    def averages(self, average_precision: Mapping[str, float]) -> dict[str, float]:
        if not average_precision:
            return {}
        return {"mean_average_precision": float(np.mean(list(average_precision.values())))}


def _exact(truth: Any, logits: Any) -> Any:
    """`(batch,)`: 1 where exactly the clip's classes (of a mixed clip: those above a half) have a positive logit."""
    from keras import ops

    return ops.cast(ops.all(ops.equal(truth > 0.5, logits > 0), axis=-1), "float32")
