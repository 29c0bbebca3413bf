"""Intervals whose data come in clusters."""

from __future__ import annotations

import numpy as np
import pytest

from sora.core.statistics import clustered_mean


def test_clusters_of_one_give_the_t_interval() -> None:
    values = np.array([0.1, 0.4, -0.2, 0.5, 0.3])
    mean, low, high = clustered_mean(values, np.arange(5))
    half = 2.776445 * values.std(ddof=1) / np.sqrt(5)  # the t quantile of 4 degrees of freedom
    assert mean == pytest.approx(0.22) and (low, high) == pytest.approx((0.22 - half, 0.22 + half))


def test_repeating_videos_of_a_group_tells_nothing_new() -> None:
    values, clusters = np.array([0.1, 0.4, -0.2, 0.5]), np.arange(4)
    assert clustered_mean(np.repeat(values, 9), np.repeat(clusters, 9)) == pytest.approx(
        clustered_mean(values, clusters)
    )


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), 5)
    covered = 0
    for _ in range(400):
        values = rng.normal(0, 1, 12)[clusters] + rng.normal(0, 0.5, 60)
        _, low, high = clustered_mean(values, clusters)
        covered += low <= 0 <= high
    assert 0.92 < covered / 400 < 0.98


def test_one_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="two clusters"):
        clustered_mean(np.ones(3), np.zeros(3, int))
