"""One class a video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.tasks.task import Task, Words

if TYPE_CHECKING:
    import keras
    import pandas as pd


@dataclass(frozen=True)
class SingleLabel(Task):
    """A video has one class, and the answer is the most probable one, by a softmax.

    A binary head gives two logits (`sora.model.head`), so its task is the same. Targets are `(clips,) int64`, the
    number of the class. A `|` in a label is a character as any other.
    """

    multilabel = False
    schema = 1
    stage_suffix = ""
    exclusive = True
    words = Words(
        accuracy="accuracy",
        majority="majority class",
        always="accuracy of always answering it",
        probability="confidence",
        share="accuracy",
    )

    def names(self, label: str) -> list[str]:
        return [label]

    def join(self, names: Iterable[str]) -> str:
        return next(iter(names), "")

    def is_class(self, name: str) -> bool:
        return True

    def single(self, labels: pd.Series) -> pd.Series:
        return labels

    def known(self, labels: Iterable[str], classes: Sequence[str]) -> np.ndarray:
        wanted = set(classes)
        return np.array([label in wanted for label in labels], bool)

    def index(self, label: str, numbers: Mapping[str, int]) -> int:
        return numbers[label]

    def targets(self, indices: Iterable[int], classes: int) -> np.ndarray:
        return np.array(list(indices), np.int64)

    def dense(self, targets: np.ndarray, classes: int) -> np.ndarray:
        return targets if targets.ndim == 2 else np.eye(classes, dtype=np.float32)[targets.astype(np.int64)]

    def mirrored(self, target: np.ndarray, to: Sequence[int]) -> np.ndarray | None:
        image = np.asarray(to)[target]
        return image if image >= 0 else None

    def class_weights(self, targets: np.ndarray, classes: int) -> np.ndarray:
        """Inverse to the frequency of the class; 1 of a class without clips, which only mirror images can have."""
        weights = np.ones(max(classes, targets.max(initial=-1) + 1), np.float32)
        occurs, counts = np.unique(targets, return_counts=True)
        weights[occurs] = len(targets) / (len(counts) * counts)
        return weights

    def weights(self, targets: np.ndarray, class_weights: np.ndarray) -> np.ndarray:
        weights: np.ndarray = class_weights[targets]
        return weights

    def loss(self, label_smoothing: float) -> keras.losses.Loss:
        """The cross-entropy of the softmax."""
        import keras

        return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing)

    def accuracy(self) -> keras.metrics.Metric:
        import keras

        return keras.metrics.CategoricalAccuracy("accuracy")

    def clip_probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """The softmax of logits / temperature: rows sum to 1."""
        scaled = np.asarray(logits, np.float64) / temperature
        scaled -= scaled.max(axis=1, keepdims=True, initial=-np.inf)
        clips = np.exp(scaled)
        shares: np.ndarray = clips / clips.sum(axis=1, keepdims=True)
        return shares

    def are_probabilities(self, row: np.ndarray) -> bool:
        return bool(np.isfinite(row).all() and abs(row.sum() - 1) <= 1e-6)

    def answered(self, probabilities: np.ndarray) -> np.ndarray:
        best: np.ndarray = np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None]
        return best

    def labels(self, row: np.ndarray, classes: Sequence[str]) -> tuple[str, ...] | None:
        return None

    def answer_among(self, video: Mapping[str, Any], numbers: Mapping[str, int]) -> set[str]:
        """The answer, if it is one of these classes, and else the most probable of them."""
        if video["predicted"] in numbers:
            return {video["predicted"]}
        return {max(numbers, key=lambda name: video["probabilities"][numbers[name]])}

    def log_odds(self, logits: Any, label: Any) -> Any:
        from keras import ops

        own = ops.one_hot(label, logits.shape[-1], dtype="float32")
        others = ops.logsumexp(ops.where(own > 0, -1e30, logits[0]))
        return ops.sum(own * logits[0]) - others

    def margins(self, probabilities: np.ndarray, label: int) -> np.ndarray:
        """The probability of the class less that of the best other one: who sees something else speaks against it."""
        others = np.delete(probabilities, label, axis=1)
        return probabilities[:, label] - (others.max(axis=1) if others.shape[1] else 0.0)

    def log_loss(self, probabilities: np.ndarray, targets: np.ndarray) -> float:
        return float(-np.log(np.clip(probabilities[np.arange(len(targets)), targets], 1e-12, 1)).mean())

    def decisions(self, probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One a video: of its answer, whether it is right."""
        return probabilities.max(axis=1, initial=0), probabilities.argmax(axis=1) == targets

    def mistake(self, row: np.ndarray, target: np.ndarray) -> tuple[float, float]:
        return float(row.max()), float(row[target])

    def averages(self, average_precision: Mapping[str, float]) -> dict[str, float]:
        return {}
