"""Statistics of a classifier's answers: pure functions on arrays.

Logits are `(clips, classes) float`, `owner` is `(clips,) int`: the video that each clip belongs to, 0 … videos-1.
Probabilities are `(videos, classes) float`, labels `(videos,) int` or, if a video may have several,
`(videos, classes) bool`. The answer for a video is the mean of its clips' softmax(logits / temperature), for a
multi-label model of their sigmoids: what the server answers.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from sora.core.records import THRESHOLD

BINS = 15  # of the calibration error, as in Guo et al. 2017
TEMPERATURES = (0.25, 10.0)


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
    """Mean negative log-likelihood, in nats; with several labels per video the sum over its classes."""
    if labels.ndim == 2:
        likelihood = np.where(labels, probabilities, 1 - probabilities)
        return float(-np.log(np.clip(likelihood, 1e-12, 1)).sum(axis=1).mean())
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
    """What calibration compares: probabilities, and whether the events happened, `(n,) float` and `(n,) bool`.

    One per video: whether its answer is right. With several labels, one per video and class: whether the video has it.
    """
    if labels.ndim == 2:
        return probabilities.ravel(), labels.ravel().astype(bool)
    return probabilities.max(axis=1, initial=0), probabilities.argmax(axis=1) == labels


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The number of the bin, (low, high] as in Guo et al., of each confidence."""
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
    """Mean distance between confidence and accuracy over bins of equal width, weighted by videos (Guo et al. 2017)."""
    if len(confidence) == 0:
        return 0.0
    return float(np.abs(np.bincount(_bin(confidence, bins), weights=confidence - right)).sum() / len(confidence))


def calibration_noise(confidence: np.ndarray, quantile: float = 0.95, draws: int = 200) -> float:
    """The bound below which a *perfectly* calibrated model's calibration error stays by chance at these confidences.

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
        confidence: `(videos,) float`, of the given answer.
        right: `(videos,) bool`.

    Returns:
        A confidence; just above 1, so that every answer is unsure, if no threshold gives the precision.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, hits = confidence[order], np.cumsum(right[order])
    known = (hits + 1) / (np.arange(len(order)) + 3)
    last = np.append(ranked[1:] < ranked[:-1], True) if len(ranked) else np.zeros(0, bool)  # ties stay together
    good = np.flatnonzero((known >= precision) & last)
    return float(ranked[good[-1]]) if len(good) else math.nextafter(1, 2)


def selective(confidence: np.ndarray, right: np.ndarray, below: float) -> dict[str, float]:
    """`coverage`: share of the videos with at least the confidence `below`; `sure_precision`: share of those right."""
    sure = confidence >= below
    measured = {"coverage": float(sure.mean())} if len(sure) else {}
    return measured | ({"sure_precision": float(right[sure].mean())} if sure.any() else {})
