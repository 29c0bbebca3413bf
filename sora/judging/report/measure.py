"""Measures of a classifier's answers: pure functions on arrays, no model and no file.

Logits are `(clips, classes) float`, `owner` is `(clips,) int`: the video that each clip belongs to, 0 … videos-1.
Probabilities are `(videos, classes) float`, labels `(videos,) int` or, where a video may have several,
`(videos, classes) bool`. The answer for a video is the mean of its clips' softmax(logits / temperature), of a
multi-label model of their sigmoids: what the server gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from sora.core import labels as labelling
from sora.core.records import THRESHOLD, EvalReport, Split

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


def clip_probabilities(logits: np.ndarray, temperature: float = 1.0, multilabel: bool = False) -> np.ndarray:
    """`(clips, classes)` logits → probabilities: rows sum to 1 or, with `multilabel`, each class has its own."""
    scaled = np.asarray(logits, np.float64) / temperature
    if multilabel:
        return 0.5 + 0.5 * np.tanh(scaled / 2)  # the sigmoid, without overflow
    scaled -= scaled.max(axis=1, keepdims=True, initial=-np.inf)
    clips = np.exp(scaled)
    return clips / clips.sum(axis=1, keepdims=True)


def video_probabilities(
    logits: np.ndarray, owner: np.ndarray, videos: int, temperature: float = 1.0, multilabel: bool = False
) -> np.ndarray:
    """`(clips, classes)` logits → `(videos, classes)` probabilities: the mean over a video's clips."""
    clips = clip_probabilities(logits, temperature, multilabel)
    total = np.zeros((videos, clips.shape[1]))
    np.add.at(total, owner, clips)
    return total / np.maximum(np.bincount(owner, minlength=videos), 1)[:, None]


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats; of several labels a video the sum over its classes."""
    if labels.ndim == 2:
        given = np.where(labels, probabilities, 1 - probabilities)
        return float(-np.log(np.clip(given, 1e-12, 1)).sum(axis=1).mean())
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
        probabilities = video_probabilities(logits, owner, len(labels), math.exp(log_temperature), labels.ndim == 2)
        return log_loss(probabilities, labels) * len(labels) + log_temperature**2 / 2

    low, high = (math.log(bound) for bound in TEMPERATURES)
    return float(math.exp(minimize_scalar(cost, bounds=(low, high), method="bounded").x))


def answered(probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
    """`(videos, classes) bool`: the most probable class, or those of at least `records.THRESHOLD`."""
    if multilabel:
        return probabilities >= THRESHOLD
    return np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None]


def decisions(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What calibration is about: probabilities, and whether what they are of was so, `(n,) float` and `(n,) bool`.

    One a video: of the answer, whether it is right. Of several labels a video one a class of each: whether it has it.
    """
    if labels.ndim == 2:
        return probabilities.ravel(), labels.ravel().astype(bool)
    return probabilities.max(axis=1, initial=0), probabilities.argmax(axis=1) == labels


def truth(report: EvalReport) -> np.ndarray:
    """The labels of a report's videos, see the top of this module."""
    if report.multilabel:
        return labelling.hot([video["label"] for video in report.videos], report.classes)
    return np.array([report.classes.index(video["label"]) for video in report.videos], int)


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
        has = [name in labelling.names(video["label"], report.multilabel) for video in report.videos]
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

    Where a video may have several labels, an answer is all classes of at least `records.THRESHOLD`, and right when it
    is an exact match: `accuracy`, `majority` (of the most frequent set of labels) and the slices count so. Recall,
    precision and F1 are each class's own, `ece` pools all classes of all videos, and there is
    `mean_average_precision`, over the classes that occur; there is no confusion, since a missed label is not taken for
    another one.

    Args:
        labels: `(videos,) int`, indices of `classes`, or `(videos, classes) bool`.
        probabilities: `(videos, classes) float`.
        facts: see `slices`.
        metrics: more metrics to carry (latency, the error before calibration).
    """
    count = len(classes)
    order = np.argsort(np.asarray(sha256, str), kind="stable")
    labels, probabilities = np.asarray(labels)[order], np.asarray(probabilities, float).reshape(-1, count)[order]
    facts = {name: [values[i] for i in order] for name, values in (facts or {}).items()}
    multilabel = labels.ndim == 2
    given = labels.astype(bool) if multilabel else np.arange(count) == labels[:, None]
    answers = answered(probabilities, multilabel)
    right = (given == answers).all(axis=1)
    support, claimed, hits = given.sum(axis=0), answers.sum(axis=0), (given & answers).sum(axis=0)

    found: dict[str, float] = {"videos": float(len(labels))}
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
        confidence, so = decisions(probabilities, labels)
        occurs = support + claimed > 0
        low, high = wilson(float(right.sum()), len(right))
        found |= {
            "accuracy": float(right.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": float((2 * hits[occurs] / (support + claimed)[occurs]).mean()) if occurs.any() else 0.0,
            "ece": expected_calibration_error(confidence, so),
            "ece_noise": calibration_noise(confidence),
            "log_loss": log_loss(probabilities, labels),
            "majority": float(np.unique(given, axis=0, return_counts=True)[1].max() / len(labels)),
        }
    result = EvalReport(
        split=split,
        classes=tuple(classes),
        metrics={**found, **(metrics or {})},
        per_class=per_class,
        confusion=[] if multilabel else (given.T.astype(int) @ answers.astype(int)).tolist(),
        slices=slices(facts, right) if len(labels) else [],
        videos=[
            {
                "sha256": sha256[i],
                "path": paths[i],
                "label": _named(given[row], classes),
                "predicted": _named(answers[row], classes),
                "probabilities": [round(float(p), 6) for p in probabilities[row]],
            }
            for row, i in enumerate(order)
        ],
        temperature=float(temperature),
        multilabel=multilabel,
    )
    averages = {name: curve[2] for name, curve in precision_recall(result).items()} if len(labels) else {}
    for name, average in averages.items():
        per_class[name]["average_precision"] = average
    if multilabel and averages:
        result.metrics.setdefault("mean_average_precision", float(np.mean(list(averages.values()))))
    return result


def _named(row: np.ndarray, classes: Sequence[str]) -> str:
    return labelling.join(name for name, is_so in zip(classes, row, strict=True) if is_so)
