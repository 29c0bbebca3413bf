"""Measures of a classifier's answers: pure functions on arrays, no model and no file.

Logits are `(clips, classes) float`, `owner` is `(clips,) int`: the video that each clip belongs to, 0 … videos-1.
Probabilities are `(videos, classes) float`, labels `(videos,) int`. The answer for a video is the mean of its clips'
softmax(logits / temperature): what the server gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from sora.records import EvalReport, Split

BINS = 15  # of the calibration error, as in Guo et al. 2017
TEMPERATURES = (0.25, 10.0)
MIN_GROUP = 3  # videos; a smaller group has no slice of its own
WORST_GROUPS = 10


def wilson(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval of a proportion (Wilson 1927). With no trials: (0, 1), nothing is known."""
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At 0 and at all successes the bound is exact; rounding would leave 1e-17 there.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (
        1.0 if successes == trials else min(1.0, centre + half)
    )


def video_probabilities(logits: np.ndarray, owner: np.ndarray, videos: int, temperature: float = 1.0) -> np.ndarray:
    """`(clips, classes)` logits → `(videos, classes)` probabilities: the mean over a video's clips."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True, initial=-np.inf)
    clips = np.exp(scaled)
    clips /= clips.sum(axis=1, keepdims=True)
    total = np.zeros((videos, clips.shape[1]))
    np.add.at(total, owner, clips)
    return total / np.maximum(np.bincount(owner, minlength=videos), 1)[:, None]


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats."""
    return float(-np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)).mean())


def fit_temperature(logits: np.ndarray, owner: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the videos' negative log-likelihood, within 0.25 to 10; 1.0 without videos.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", with two departures: the likelihood is that of the
    mean over a video's clips, which is what is served; and ln(temperature) has a standard normal prior, worth less than
    one video, without which a validation set of three videos, all right, would drive the answer to the bound.
    """
    if len(labels) == 0:
        return 1.0
    from scipy.optimize import minimize_scalar

    def cost(log_temperature: float) -> float:
        probabilities = video_probabilities(logits, owner, len(labels), math.exp(log_temperature))
        return log_loss(probabilities, labels) * len(labels) + log_temperature**2 / 2

    low, high = (math.log(bound) for bound in TEMPERATURES)
    return float(math.exp(minimize_scalar(cost, bounds=(low, high), method="bounded").x))


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Number of the bin, (low, high] as in Guo et al., that each confidence falls into."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, videos) of every bin of equal width that holds a video."""
    where = _bin(confidence, bins)
    result = []
    for number in np.unique(where):
        inside = where == number
        result.append((float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    return result


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by videos (Guo et al. 2017)."""
    if len(confidence) == 0:
        return 0.0
    return float(np.abs(np.bincount(_bin(confidence, bins), weights=confidence - right)).sum() / len(confidence))


def calibration_noise(confidence: np.ndarray, quantile: float = 0.95, draws: int = 200) -> float:
    """The calibration error that a *perfectly* calibrated model with these confidences stays below, by chance.

    Consistency resampling (Bröcker & Smith 2007): outcomes are drawn with the confidences as their probabilities. With
    confidences spread from 0.55 to 1 it is 0.20 with 30 videos, 0.15 with 60 and 0.04 with 1000, so that a limit of 0.1
    would refuse the best of models on a small test.
    """
    if len(confidence) == 0:
        return 0.0
    rng = np.random.default_rng(0)
    errors = [expected_calibration_error(confidence, rng.random(len(confidence)) < confidence) for _ in range(draws)]
    return float(np.quantile(errors, quantile))


def unsure_below(confidence: np.ndarray, right: np.ndarray, precision: float) -> float:
    """The lowest confidence from which on answers are right with the wanted precision; those below it are unsure.

    Selective classification (Geifman & El-Yaniv 2017), with the precision of the n most confident answers estimated by
    the rule of succession, (right + 1) / (n + 2), in place of their bound, which a validation set of some dozens never
    meets: for 0.9 it takes eight right answers in a row, where the plain share would trust the first one.

    Args:
        confidence: `(videos,) float`, of the answer given.
        right: `(videos,) bool`.

    Returns:
        A confidence; just above 1, so that every answer is unsure, where no threshold gives the precision.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, hits = confidence[order], np.cumsum(right[order])
    known = (hits + 1) / (np.arange(len(order)) + 3)
    last = np.append(ranked[1:] < ranked[:-1], True) if len(ranked) else np.zeros(0, bool)  # equals stay together
    good = np.flatnonzero((known >= precision) & last)
    return float(ranked[good[-1]]) if len(good) else math.nextafter(1, 2)


def selective(confidence: np.ndarray, right: np.ndarray, below: float) -> dict[str, float]:
    """`coverage`: share of the videos with at least the confidence `below`; `sure_precision`: share of those right."""
    sure = confidence >= below
    found = {"coverage": float(sure.mean())} if len(sure) else {}
    return found | ({"sure_precision": float(right[sure].mean())} if sure.any() else {})


def precision_recall(report: EvalReport) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Class → (recall, precision, average precision), one against the rest, of the classes that the split holds."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    result = {}
    for index, name in enumerate(report.classes):
        truth = np.array([video["label"] == name for video in report.videos], bool)
        if truth.any():
            score = np.array([video["probabilities"][index] for video in report.videos])
            precision, recall, _ = precision_recall_curve(truth, score)
            result[name] = recall, precision, float(average_precision_score(truth, score))
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
    """A slice for each third of the videos by value; fewer where values are equal."""
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

    `facts` holds a sequence, one entry a video, under each of those names that is known. Of groups, those with at least
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
        found = [_slice(kind, name, right[names == name]) for name in sorted(set(names) - {""})]
        if kind == "group":
            found = sorted((s for s in found if s["videos"] >= MIN_GROUP), key=lambda s: (s["accuracy"], -s["videos"]))
        result += found[:WORST_GROUPS]
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
    temperature: float = 1.0,
    metrics: dict[str, float] | None = None,
) -> EvalReport:
    """All measures of one model on one split.

    Of a split without videos only `metrics["videos"]` is known, and of a class without videos only its support (and its
    precision, when it was answered): what is not known is left out, never 0. `macro_f1` is over the classes that occur
    as truth or answer. `majority` is the accuracy of always answering this split's own most frequent class, the
    strictest reading. `ece_noise` is `calibration_noise`. Intervals are Wilson's at 95 % and take videos as
    independent; where groups are few and alike, the truth is wider.

    Args:
        labels: `(videos,) int`, indices of `classes`.
        probabilities: `(videos, classes) float`.
        facts: see `slices`.
        metrics: more metrics to carry (latency, the error before calibration).
    """
    count = len(classes)
    order = np.argsort(np.asarray(sha256, str), kind="stable")
    labels, probabilities = np.asarray(labels, int)[order], np.asarray(probabilities, float).reshape(-1, count)[order]
    facts = {name: [values[i] for i in order] for name, values in (facts or {}).items()}
    predicted = probabilities.argmax(axis=1)
    right = predicted == labels
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (labels, predicted), 1)
    support, answered, hits = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()

    found: dict[str, float] = {"videos": float(len(labels))}
    per_class: dict[str, dict[str, float]] = {
        name: {"support": float(n)} for name, n in zip(classes, support, strict=True)
    }
    for index, name in enumerate(classes):
        if support[index]:
            low, high = wilson(float(hits[index]), int(support[index]))
            per_class[name] |= {"recall": float(hits[index] / support[index]), "low": low, "high": high}
        if answered[index]:
            per_class[name]["precision"] = float(hits[index] / answered[index])
    if len(labels):
        from sklearn.metrics import f1_score

        confidence = probabilities.max(axis=1)
        low, high = wilson(float(right.sum()), len(right))
        found |= {
            "accuracy": float(right.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
            "ece": expected_calibration_error(confidence, right),
            "ece_noise": calibration_noise(confidence),
            "log_loss": log_loss(probabilities, labels),
            "majority": float(support.max() / len(labels)),
        }
    result = EvalReport(
        split=split,
        classes=tuple(classes),
        metrics={**found, **(metrics or {})},
        per_class=per_class,
        confusion=confusion.tolist(),
        slices=slices(facts, right) if len(labels) else [],
        videos=[
            {
                "sha256": sha256[i],
                "path": paths[i],
                "label": classes[labels[row]],
                "predicted": classes[predicted[row]],
                "probabilities": [round(float(p), 6) for p in probabilities[row]],
            }
            for row, i in enumerate(order)
        ],
        temperature=float(temperature),
    )
    for name, (_, _, average) in precision_recall(result).items() if len(labels) else ():
        per_class[name]["average_precision"] = average
    return result
