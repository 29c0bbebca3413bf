"""What the tasks give to Keras: losses, metrics and log-odds."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from sora.tasks import MULTI, SINGLE

LOGITS = np.array([[2.0, -1.0, 1.0], [0.5, -3.0, -0.5]], np.float32)


def test_the_loss_is_the_log_loss() -> None:
    one, several = np.array([0, 2]), np.array([[1, 0, 1], [0, 0, 1]], np.float32)
    loss = float(SINGLE.loss(0.0)(SINGLE.dense(one, 3), LOGITS))
    assert loss == pytest.approx(SINGLE.log_loss(SINGLE.clip_probabilities(LOGITS), one), rel=1e-5)
    loss = float(MULTI.loss(0.0)(several, LOGITS))  # the mean over the classes, not their sum
    assert loss == pytest.approx(MULTI.log_loss(MULTI.clip_probabilities(LOGITS), several) / 3, rel=1e-5)
    for task, targets in ((SINGLE, SINGLE.dense(one, 3)), (MULTI, several)):
        assert float(task.loss(0.1)(targets, LOGITS)) != pytest.approx(float(task.loss(0.0)(targets, LOGITS)))


def test_accuracy_counts_answers_that_are_right_in_full() -> None:
    metric = SINGLE.accuracy()
    metric.update_state(SINGLE.dense(np.array([0, 2]), 3), LOGITS)
    assert metric.name == "accuracy" and float(metric.result()) == 0.5
    metric = MULTI.accuracy()
    metric.update_state(np.array([[1, 0, 1], [1, 0, 1]], np.float32), LOGITS)
    assert metric.name == "accuracy" and float(metric.result()) == 0.5
    metric.update_state(np.array([[0.9, 0.1, 0.6], [0.6, 0.4, 0.4]], np.float32), LOGITS)  # mixed
    assert float(metric.result()) == 0.75


@pytest.mark.parametrize("label", range(3))
def test_log_odds_are_those_of_the_probability(label: int) -> None:
    for task in (SINGLE, MULTI):
        share = task.clip_probabilities(LOGITS[:1])[0, label]
        odds = float(task.log_odds(keras.ops.convert_to_tensor(LOGITS[:1]), label))
        assert odds == pytest.approx(np.log(share / (1 - share)), rel=1e-5)
