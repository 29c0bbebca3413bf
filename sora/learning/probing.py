"""Solves probes (`sora.model.probes`) on features in memory: seconds, and the same result every time."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.media.video.flow import COLUMNS
from sora.model.probes import Branch, Kernel, Linear

if TYPE_CHECKING:
    from sora.tasks import Task

MAX_ANCHORS = 1024  # of the kernel: a served model carries them
MAX_EMBEDDING = 1024
_FLAT = 1e-2  # a channel's scale is at least this share of the median channel's
_LEFT_OUT = 1e12  # scale of a column that is not read
_ABSENT = -30.0  # logit of a class without a training clip
_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Setting:
    """How a probe is solved: the inverse of its penalty, and the part of the features that it reads, see
    `flow.COLUMNS`.
    """

    strength: float
    columns: str = "all"

    def __str__(self) -> str:
        return f"{self.strength:g} {self.columns}"


SETTINGS: dict[str, tuple[Setting, ...]] = {  # feature → settings to choose from
    "appearance": tuple(Setting(strength) for strength in (1e-3, 1e-2, 1e-1, 1.0)),
    "motion": tuple(Setting(strength, columns) for columns in COLUMNS for strength in (1.0, 3.0, 10.0, 30.0)),
}
DEFAULTS = {"appearance": Setting(1e-1), "motion": Setting(10.0)}  # where nothing can be compared


@dataclass(frozen=True, slots=True)
class Basis:
    """Features of training clips in the form that logistic regression is solved in.

    `vectors` is `(clips, width)`; `kernel` and `embedding` lead from features to them.
    """

    features: str
    kernel: Kernel | None
    embedding: Linear
    vectors: np.ndarray


def basis(features: str, x: np.ndarray, columns: str = "all") -> Basis:
    """Standardises and rotates `(clips, channels) float32`, of motion only the named columns.

    Regularised logistic regression looks at nothing outside the span of its training clips (the representer theorem:
    Schölkopf, Herbrich and Smola 2001), so the rotation onto that span changes no answer and leaves as many numbers as
    there are clips. With more than `MAX_EMBEDDING` clips the directions of most variance are kept.
    """
    x = x.astype(np.float32)
    mean, scale = x.mean(0), x.std(0)
    scale = np.maximum(scale, max(_FLAT * float(np.median(scale)), 1e-6)).astype(np.float32)
    if features == "motion":
        scale[np.setdiff1d(np.arange(len(scale)), COLUMNS[columns])] = _LEFT_OUT
        kernel = _kernel(x, mean, scale)
        values = kernel(x)
        mean, scale = np.zeros(values.shape[1], np.float32), np.ones(values.shape[1], np.float32)
        # The kernel's own coordinates (Williams and Seeger 2001, "Using the Nyström method", section 3).
        among = kernel(kernel.anchors * kernel.scale + kernel.mean)
        size, directions = np.linalg.eigh(among.astype(np.float64))
        keep = size > 1e-6 * size[-1]
        turn = (directions[:, keep] / np.sqrt(size[keep])).astype(np.float32)[:, -MAX_EMBEDDING:]
    else:
        kernel = None
        values = (x - mean) / scale
        turn = _directions(values)[:, :MAX_EMBEDDING]
    embedding = Linear(turn / scale[:, None], -(mean / scale) @ turn)
    inputs = x if kernel is None else values
    return Basis(features, kernel, embedding, embedding(inputs))


def _kernel(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Kernel:
    """Anchors are the clips, evenly chosen if there are too many; the width is that of the median distance."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_ANCHORS)).round().astype(int))
    anchors = ((x[chosen] - mean) / scale).astype(np.float32)
    some = anchors[:: max(1, len(anchors) // 256)]
    squares = (some * some).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * some @ some.T, 0)
    apart = distances[np.triu_indices(len(some), 1)]
    middle = float(np.median(apart)) if len(apart) else 1.0
    return Kernel(mean, scale, anchors, 1.0 / max(middle, 1e-6))


def _directions(values: np.ndarray) -> np.ndarray:
    """The right singular vectors of `(clips, channels)`, those of most variance first: `(channels, rank)`."""
    if values.shape[0] <= values.shape[1]:
        size, left = np.linalg.eigh((values @ values.T).astype(np.float64))
        size, left = size[::-1], left[:, ::-1]
        keep = size > 1e-7 * max(size[0], 1e-12)
        found: np.ndarray = values.T @ (left[:, keep] / np.sqrt(size[keep]))
        return found.astype(np.float32)
    size, right = np.linalg.eigh((values.T @ values).astype(np.float64))
    keep = size > 1e-7 * max(size[-1], 1e-12)
    kept: np.ndarray = right[:, keep][:, ::-1]
    return kept.astype(np.float32)


def solve(
    base: Basis, targets: np.ndarray, classes: int, task: Task, strength: float, *, class_weights: bool
) -> Branch:
    """Logistic regression on a basis: multinomial, or one for each class of a multi-label task.

    Args:
        targets: of the basis' clips, see `sora.tasks.Task.targets`.
        strength: the inverse of the L2 penalty (scikit-learn's C).
    """
    weights = task.weights(targets, task.class_weights(targets, classes)) if class_weights else None
    if task.multilabel:
        parts = [_binary(base.vectors, targets[:, number] > 0.5, strength, weights) for number in range(classes)]
        kernel = np.stack([part[0] for part in parts], axis=1)
        return Branch(base.features, base.kernel, base.embedding, Linear(kernel, np.array([p[1] for p in parts], "f4")))
    present = np.unique(targets)
    kernel, bias = np.zeros((base.vectors.shape[1], classes), np.float32), np.full(classes, _ABSENT, np.float32)
    if len(present) == 1:
        bias[present] = 0.0
    elif len(present) == 2:
        weight, offset = _binary(base.vectors, targets == present[1], strength, weights)
        for place, sign in zip(present, (-0.5, 0.5), strict=True):
            kernel[:, place], bias[place] = sign * weight, sign * offset
    else:
        model = _fitted(base.vectors, targets, strength, weights)
        kernel[:, present], bias[present] = model.coef_.T, model.intercept_
    return Branch(base.features, base.kernel, base.embedding, Linear(kernel, bias))


def _binary(
    x: np.ndarray, positive: np.ndarray, strength: float, weights: np.ndarray | None
) -> tuple[np.ndarray, float]:
    if positive.all() or not positive.any():
        return np.zeros(x.shape[1], np.float32), -_ABSENT if positive.all() else _ABSENT
    model = _fitted(x, positive.astype(int), strength, weights)
    return model.coef_[0].astype(np.float32), float(model.intercept_[0])


def _fitted(x: np.ndarray, targets: np.ndarray, strength: float, weights: np.ndarray | None) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # then it is as near as that many steps come
        return model.fit(x.astype(np.float64), targets, sample_weight=weights)
