"""Statistics of a classifier's answers: pure functions on arrays.

`confidence` is `(n,) float` and `right` `(n,) bool`: probabilities, and whether the events happened. A task's
`decisions` returns both (`sora.tasks`).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

BINS = 15  # of the calibration error, as in Guo et al. 2017


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


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The number of the bin, (low, high] as in Guo et al., of each confidence."""
    number: np.ndarray = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return number


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


def clustered_mean(values: np.ndarray, clusters: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of `values`, `(n,) float`, and its interval if those of one cluster, `(n,) int`, are not independent.

    The variance is that of the clusters' sums of residuals (Liang & Zeger 1986), with t quantiles of one degree of
    freedom less than there are clusters: with few clusters the interval is wide.

    Raises:
        ValueError: fewer than two clusters.
    """
    from scipy.stats import t

    number = np.unique(clusters, return_inverse=True)[1]
    count = int(number.max(initial=-1)) + 1
    if count < 2:
        raise ValueError("an interval needs two clusters")
    mean = float(values.mean())
    residuals = np.bincount(number, weights=values - mean, minlength=count)
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / len(values)
    half = float(t.ppf(0.5 + confidence / 2, count - 1)) * error
    return mean, mean - half, mean + half
