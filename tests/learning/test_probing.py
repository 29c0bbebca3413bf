"""Probes are solved to their optimum, and the model made of them answers as the solution does."""

from __future__ import annotations

import numpy as np
import pytest

from sora.learning import probing
from sora.media.video.clips import FLOW_LENGTH
from sora.tasks import MULTI, SINGLE


def blobs(classes: int, each: int = 20, channels: int = FLOW_LENGTH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    centres = chance.normal(0, 2, (classes, channels))
    targets = np.repeat(np.arange(classes), each)
    return (centres[targets] + chance.normal(0, 1, (len(targets), channels))).astype(np.float32), targets


@pytest.mark.parametrize("features", ["appearance", "motion"])
@pytest.mark.parametrize("classes", [2, 4])
def test_it_learns_what_can_be_learned(features: str, classes: int) -> None:
    x, targets = blobs(classes)
    branch = probing.solve(probing.basis(features, x), targets, classes, SINGLE, 1.0, class_weights=True)
    unseen, truth = blobs(classes, seed=0)
    assert (branch(unseen).argmax(axis=1) == truth).mean() > 0.95


def test_the_rotation_changes_no_answer() -> None:
    from sklearn.linear_model import LogisticRegression

    x, targets = blobs(3, each=10, channels=50)
    branch = probing.solve(probing.basis("appearance", x), targets, 3, SINGLE, 0.1, class_weights=False)
    scaled = (x - x.mean(0)) / x.std(0)
    plain = LogisticRegression(C=0.1, max_iter=2000, tol=1e-8).fit(scaled, targets)
    ours = SINGLE.clip_probabilities(branch(x))
    assert np.abs(ours - plain.predict_proba(scaled)).max() < 2e-3


def test_it_is_the_same_every_time() -> None:
    x, targets = blobs(3)
    first, second = (
        probing.solve(probing.basis("motion", x), targets, 3, SINGLE, 3.0, class_weights=True)(x) for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_a_class_without_a_clip_is_never_the_answer() -> None:
    x, targets = blobs(3)
    kept = targets != 1
    branch = probing.solve(probing.basis("appearance", x[kept]), targets[kept], 3, SINGLE, 1.0, class_weights=True)
    assert set(branch(x).argmax(axis=1)) <= {0, 2}
    only = probing.solve(probing.basis("appearance", x[:20]), targets[:20], 3, SINGLE, 1.0, class_weights=True)
    assert set(only(x).argmax(axis=1)) == {0}


def test_several_labels_are_answered_by_themselves() -> None:
    x, targets = blobs(4)
    labels = np.stack([targets % 2, targets // 2], axis=1).astype(np.float32)
    branch = probing.solve(probing.basis("appearance", x), labels, 2, MULTI, 1.0, class_weights=True)
    assert ((branch(x) > 0) == (labels > 0.5)).mean() > 0.95


def test_constant_channels_are_no_noise() -> None:
    """Half precision and the model's own arithmetic differ in the last digits of a channel that never changes."""
    x, targets = blobs(2)
    x[:, 3] = 0.5
    branch = probing.solve(probing.basis("appearance", x), targets, 2, SINGLE, 1.0, class_weights=True)
    other = x.copy()
    other[:, 3] += 5e-4
    assert np.abs(branch(other) - branch(x)).max() < 0.1


def test_more_clips_than_a_kernel_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "MAX_ANCHORS", 16)
    x, targets = blobs(2, each=40)
    base = probing.basis("motion", x)
    assert base.kernel is not None and len(base.kernel.anchors) == 16 and len(base.vectors) == 80
    branch = probing.solve(base, targets, 2, SINGLE, 3.0, class_weights=True)
    assert (branch(x).argmax(axis=1) == targets).mean() > 0.9


def test_what_is_not_read_changes_nothing() -> None:
    from sora.media.video.flow import COLUMNS

    x, targets = blobs(2)
    branch = probing.solve(probing.basis("motion", x, "cells"), targets, 2, SINGLE, 3.0, class_weights=True)
    other = x.copy()
    other[:, COLUMNS["order"]] = 7
    assert np.array_equal(branch(other), branch(x)) and (branch(x).argmax(axis=1) == targets).all()
