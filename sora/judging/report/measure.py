"""All measures of one model on one split, as an `EvalReport`: pure functions on arrays, no model and no file.

Probabilities are `(videos, classes) float`; labels are the targets of the report's task, see `sora.tasks.Task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sora import tasks
from sora.core.records import EvalReport, Split
from sora.core.statistics import calibration_noise, expected_calibration_error, wilson
from sora.tasks import SINGLE, Task

MIN_GROUP = 3  # videos; a smaller group has no slice of its own
WORST_GROUPS = 10


def truth(report: EvalReport) -> np.ndarray:
    """The labels of a report's videos, see the top of this module."""
    return tasks.of(report.multilabel).encode([video["label"] for video in report.videos], report.classes)


def precision_recall(report: EvalReport) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Class → (recall, precision, average precision), one against the rest, of the classes that the split holds."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    names = [tasks.of(report.multilabel).names(video["label"]) for video in report.videos]
    result = {}
    for index, name in enumerate(report.classes):
        has = [name in own for own in names]
        if any(has):
            score = np.array([video["probabilities"][index] for video in report.videos])
            precision, recall, _ = precision_recall_curve(np.array(has), score)
            result[name] = recall, precision, float(average_precision_score(np.array(has), score))
    return result


def _slice(kind: str, value: str, right: np.ndarray) -> dict[str, Any]:
    low, high = wilson(float(right.sum()), len(right))
    return {
        "slice": kind,
        "value": value,
        "videos": len(right),
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
    }


def _thirds(kind: str, names: Sequence[str], unit: str, values: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """A slice for each third of the videos by value; fewer if values are equal."""
    known = np.isfinite(values)
    if not known.any():
        return []
    edges = np.quantile(values[known], (1 / 3, 2 / 3))
    third = np.searchsorted(edges, values, side="left")
    result = []
    for number, name in enumerate(names):
        inside = known & (third == number)
        if inside.any():
            span = f"{values[inside].min():.3g} to {values[inside].max():.3g}{unit}"
            result.append(_slice(kind, f"{name} ({span})", right[inside]))
    return result


def slices(facts: dict[str, Sequence[Any]], right: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy with its interval by brightness, duration, codec and group.

    `facts` holds a sequence, one entry per video, under each known name. Of groups, those with at least
    3 videos and of these the 10 worst.
    """
    result: list[dict[str, Any]] = []
    if "brightness" in facts:
        values = np.asarray(facts["brightness"], float)
        result += _thirds("brightness", ("dark", "middle", "bright"), "", values, right)
    if "duration" in facts:
        result += _thirds("duration", ("short", "middle", "long"), " s", np.asarray(facts["duration"], float), right)
    for kind in ("codec", "group"):
        names = np.array([name if isinstance(name, str) else "" for name in facts.get(kind, ())], object)
        parts = [_slice(kind, name, right[names == name]) for name in sorted(set(names) - {""})]
        if kind == "group":
            parts = sorted((s for s in parts if s["videos"] >= MIN_GROUP), key=lambda s: (s["accuracy"], -s["videos"]))
        result += parts[:WORST_GROUPS]
    return result


def report(
    split: Split,
    classes: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    *,
    sha256: Sequence[str],
    paths: Sequence[str],
    facts: dict[str, Sequence[Any]] | None = None,
    task: Task = SINGLE,
    temperature: float = 1.0,
    metrics: dict[str, float] | None = None,
) -> EvalReport:
    """All measures of one model on one split.

    Of a split without videos only `metrics["videos"]` is known, of a class without videos only its support (and its
    precision, if it was answered): what is not known is left out, never 0. `macro_f1` is over the classes that occur
    as truth or answer. `majority` is the accuracy of always answering this split's own most frequent class, the
    strictest reading. `ece_noise` is `calibration_noise`. Intervals are Wilson's at 95 % and take videos as
    independent; if groups are few and alike, the true interval is wider.

    If a video may have several labels, an answer is all classes of at least `multi.THRESHOLD`, and is right when it
    is an exact match: `accuracy`, `majority` (of the most frequent set of labels) and the slices count so. Recall,
    precision and F1 are each class's own, `ece` pools all classes of all videos, and there is
    `mean_average_precision`, over the classes that occur; there is no confusion, since a missed label is not taken for
    another.

    Args:
        labels: the task's targets, indices of `classes` or a column for each of them.
        probabilities: `(videos, classes) float`.
        facts: see `slices`.
        metrics: more metrics to carry (latency, the error before calibration).
    """
    count = len(classes)
    order = np.argsort(np.asarray(sha256, str), kind="stable")
    labels, probabilities = np.asarray(labels)[order], np.asarray(probabilities, float).reshape(-1, count)[order]
    facts = {name: [values[i] for i in order] for name, values in (facts or {}).items()}
    given = task.dense(labels, count).astype(bool)
    answers = task.answered(probabilities)
    right = (given == answers).all(axis=1)
    support, claimed, hits = given.sum(axis=0), answers.sum(axis=0), (given & answers).sum(axis=0)

    measured: dict[str, float] = {"videos": float(len(labels))}
    per_class: dict[str, dict[str, float]] = {
        name: {"support": float(n)} for name, n in zip(classes, support, strict=True)
    }
    for index, name in enumerate(classes):
        if support[index]:
            low, high = wilson(float(hits[index]), int(support[index]))
            per_class[name] |= {"recall": float(hits[index] / support[index]), "low": low, "high": high}
        if claimed[index]:
            per_class[name]["precision"] = float(hits[index] / claimed[index])
    if len(labels):
        confidence, so = task.decisions(probabilities, labels)
        occurs = support + claimed > 0
        low, high = wilson(float(right.sum()), len(right))
        measured |= {
            "accuracy": float(right.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": float((2 * hits[occurs] / (support + claimed)[occurs]).mean()) if occurs.any() else 0.0,
            "ece": expected_calibration_error(confidence, so),
            "ece_noise": calibration_noise(confidence),
            "log_loss": task.log_loss(probabilities, labels),
            "majority": float(np.unique(given, axis=0, return_counts=True)[1].max() / len(labels)),
        }
    result = EvalReport(
        split=split,
        classes=tuple(classes),
        metrics={**measured, **(metrics or {})},
        per_class=per_class,
        confusion=(given.T.astype(int) @ answers.astype(int)).tolist() if task.exclusive else [],
        slices=slices(facts, right) if len(labels) else [],
        videos=[
            {
                "sha256": sha256[i],
                "path": paths[i],
                "label": _named(given[row], classes, task),
                "predicted": _named(answers[row], classes, task),
                "probabilities": [round(float(p), 6) for p in probabilities[row]],
            }
            for row, i in enumerate(order)
        ],
        temperature=float(temperature),
        multilabel=task.multilabel,
    )
    averages = {name: curve[2] for name, curve in precision_recall(result).items()} if len(labels) else {}
    for name, average in averages.items():
        per_class[name]["average_precision"] = average
    for name, value in task.averages(averages).items():
        result.metrics.setdefault(name, value)
    return result


def _named(row: np.ndarray, classes: Sequence[str], task: Task) -> str:
    return task.join(name for name, is_so in zip(classes, row, strict=True) if is_so)
