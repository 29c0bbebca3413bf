"""Every method of both tasks, by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest

from sora import tasks
from sora.config import parse
from sora.tasks import MULTI, SINGLE, Task

BOTH = pytest.mark.parametrize("task", [SINGLE, MULTI], ids=["single", "multi"])
CLASSES = ("carry", "run", "walk")


def test_the_task_follows_from_the_field_and_from_the_head() -> None:
    assert (tasks.of(False), tasks.of(True)) == (SINGLE, MULTI)
    assert parse("").task == parse("model: {head: binary}").task == SINGLE
    assert parse("model: {head: multilabel}").task == MULTI
    for task in (SINGLE, MULTI):
        assert tasks.of(task.multilabel) is task


@BOTH
def test_a_task_can_not_be_changed(task: Task) -> None:
    with pytest.raises(FrozenInstanceError):
        task.schema = 3  # type: ignore[misc]


def test_what_is_stored_says_which_it_is() -> None:
    assert (SINGLE.multilabel, SINGLE.schema, SINGLE.stage_suffix, SINGLE.exclusive) == (False, 1, "", True)
    assert (MULTI.multilabel, MULTI.schema, MULTI.stage_suffix, MULTI.exclusive) == (True, 2, "-multilabel", False)


def test_the_room_loads_neither_keras_nor_pandas() -> None:
    heavy = "{'tensorflow', 'keras', 'jax', 'pandas', 'scipy'}"
    code = f"import sys, sora.tasks; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_settings_are_read_without_numpy() -> None:
    code = "import sys, sora.config; sora.config.parse(''); print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- labels ----


@pytest.mark.parametrize(
    ("given", "names"),
    [("walk", ["walk"]), ("walk|carry", ["carry", "walk"]), (" walk | carry|walk||", ["carry", "walk"]), ("|", [])],
)
def test_names_are_sorted_bare_and_once(given: str, names: list[str]) -> None:
    assert MULTI.names(given) == MULTI.names(MULTI.join(names)) == names
    assert SINGLE.names(given) == [given] and SINGLE.join([given]) == given


@BOTH
def test_no_label_at_all(task: Task) -> None:
    assert task.join([]) == ""
    assert task.known([], CLASSES).shape == (0,) and task.known([], CLASSES).dtype == bool
    assert len(task.encode([], CLASSES)) == 0 and task.dense(task.encode([], CLASSES), 3).shape == (0, 3)
    column = pd.Series([], dtype=str)
    assert len(task.single(column)) == 0


def test_a_class_is_called_without_the_separator() -> None:
    assert SINGLE.is_class("walk|carry") and MULTI.is_class("walk") and not MULTI.is_class("walk|carry")


def test_single_labels_keep_the_index_of_their_video() -> None:
    column = pd.Series(["carry|walk", "walk", "run|other"])
    assert MULTI.single(column).tolist() == ["carry", "walk", "walk", "run", "other"]
    assert MULTI.single(column).index.tolist() == [0, 0, 1, 2, 2]
    assert SINGLE.single(column) is column


def test_known_labels() -> None:
    given = ["walk", "other", "walk|other", float("nan")]
    assert SINGLE.known(given, CLASSES).tolist() == [True, False, False, False]  # type: ignore[arg-type]
    assert MULTI.known(given[:3], CLASSES).tolist() == [True, False, True]  # type: ignore[arg-type]


# ---- targets ----


def test_targets_of_one_class() -> None:
    found = SINGLE.encode(["walk", "carry"], CLASSES)
    assert found.tolist() == [2, 0] and found.dtype == np.int64
    assert SINGLE.dense(found, 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(KeyError):
        SINGLE.encode(["other"], CLASSES)


def test_targets_of_several_classes() -> None:
    found = MULTI.encode(["carry|walk", "", "run|other"], CLASSES)
    assert found.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]] and found.dtype == np.float32
    assert MULTI.dense(found, 3) is found
    assert MULTI.dense(found.astype(bool), 3).dtype == np.float32


@BOTH
def test_mixed_targets_stay_as_they_are(task: Task) -> None:
    mixed = np.array([[0.25, 0.75]], np.float32)
    assert task.dense(mixed, 2) is mixed


def test_mirror_images() -> None:
    to = [1, 0, 2, -1]
    assert [SINGLE.mirrored(np.int64(number), to) for number in range(4)] == [1, 0, 2, None]  # type: ignore[arg-type]
    swapped = MULTI.mirrored(np.array([1, 0, 1, 0], np.float32), to)
    assert swapped is not None and swapped.tolist() == [0, 1, 1, 0]
    assert MULTI.mirrored(np.array([1, 0, 0, 1], np.float32), to) is None


def test_class_weights() -> None:
    targets = np.array([0, 0, 0, 2])
    weights = SINGLE.class_weights(targets, 4)
    np.testing.assert_allclose(weights, [2 / 3, 1, 2, 1])  # 1 and 3 have no clip
    assert weights.dtype == np.float32 and SINGLE.weights(targets, weights).mean() == pytest.approx(1)
    assert SINGLE.weights(np.array(2), weights) == 2
    assert SINGLE.class_weights(np.zeros(0, np.int64), 2).tolist() == [1, 1]
    several = np.array([[1, 0], [1, 1], [1, 0]], np.float32)
    assert MULTI.weights(several, MULTI.class_weights(several, 2)).tolist() == [1, 1, 1]
    assert MULTI.weights(several[0], MULTI.class_weights(several, 2)) == 1


# ---- answers ----


def test_probabilities_of_clips() -> None:
    logits = np.log([[0.9, 0.1], [0.5, 0.5]])
    np.testing.assert_allclose(SINGLE.clip_probabilities(logits), [[0.9, 0.1], [0.5, 0.5]])
    np.testing.assert_allclose(MULTI.clip_probabilities(np.array([[0.0, np.log(3)]])), [[0.5, 0.75]])
    np.testing.assert_allclose(MULTI.clip_probabilities(np.array([[0.0, np.log(9)]]), 2.0), [[0.5, 0.75]])


@BOTH
def test_probabilities_of_videos(task: Task) -> None:
    logits, owner = np.array([[2.0, 0], [0, 2], [1e4, -1e4]]), np.array([0, 0, 2])
    clips, found = task.clip_probabilities(logits), task.video_probabilities(logits, owner, 3)
    np.testing.assert_allclose(found, [clips[:2].mean(axis=0), [0, 0], clips[2]])  # the second has no clip
    assert task.clip_probabilities(np.zeros((0, 2))).shape == (0, 2)
    assert task.video_probabilities(np.zeros((0, 2)), np.zeros(0, int), 0).shape == (0, 2)


def test_numbers_that_are_no_probabilities() -> None:
    assert SINGLE.are_probabilities(np.array([0.3, 0.7])) and not SINGLE.are_probabilities(np.array([0.7, 0.7]))
    assert MULTI.are_probabilities(np.array([0.7, 0.7]))
    for task in (SINGLE, MULTI):
        assert not task.are_probabilities(np.array([np.nan, 1.0]))


def test_answers() -> None:
    probabilities = np.array([[0.5, 0.2, 0.6], [0.1, 0.3, 0.2]])
    assert SINGLE.answered(probabilities).tolist() == [[0, 0, 1], [0, 1, 0]]
    assert MULTI.answered(probabilities).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert SINGLE.labels(probabilities[0], CLASSES) is None
    assert (
        MULTI.labels(probabilities[0], CLASSES) == ("walk", "carry") and MULTI.labels(probabilities[1], CLASSES) == ()
    )
    for task in (SINGLE, MULTI):
        assert task.answered(np.zeros((0, 3))).shape == (0, 3)


def test_an_answer_among_fewer_classes() -> None:
    numbers = {"carry": 0, "run": 1}
    one = {"predicted": "walk", "probabilities": [0.1, 0.2, 0.7]}
    assert SINGLE.answer_among(one, numbers) == {"run"}
    assert SINGLE.answer_among({**one, "predicted": "carry"}, numbers) == {"carry"}
    assert MULTI.answer_among({"predicted": "carry|walk"}, numbers) == {"carry"}
    assert MULTI.answer_among({"predicted": ""}, numbers) == set()


def test_margins() -> None:
    probabilities = np.array([[0.7, 0.9, 0.1], [0.4, 0.2, 0.3]])
    np.testing.assert_allclose(SINGLE.margins(probabilities, 0), [-0.2, 0.1])
    np.testing.assert_allclose(MULTI.margins(probabilities, 0), [0.2, -0.1])
    np.testing.assert_allclose(SINGLE.margins(np.ones((2, 1)), 0), [1, 1])


# ---- judging ----


def test_log_loss_and_decisions() -> None:
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4]])
    assert SINGLE.log_loss(probabilities, np.array([0, 1])) == pytest.approx(-np.log([0.8, 0.4]).mean())
    several = np.array([[1, 0], [1, 1]], np.float32)
    assert MULTI.log_loss(probabilities, several) == pytest.approx(-np.log([0.8 * 0.8, 0.6 * 0.4]).mean())
    assert [part.tolist() for part in SINGLE.decisions(probabilities, np.array([0, 1]))] == [[0.8, 0.6], [True, False]]
    confidence, right = MULTI.decisions(probabilities, several)
    assert confidence.tolist() == [0.8, 0.2, 0.6, 0.4] and right.tolist() == [True, False, True, True]


@BOTH
def test_of_no_videos_nothing_is_decided_and_nothing_scaled(task: Task) -> None:
    targets = task.encode([], CLASSES)
    assert [len(part) for part in task.decisions(np.zeros((0, 3)), targets)] == [0, 0]
    assert task.fit_temperature(np.zeros((0, 3)), np.zeros(0, int), targets) == 1


def test_the_worst_of_a_mistake() -> None:
    row = np.array([0.7, 0.2, 0.6])
    assert SINGLE.mistake(row, np.array(1)) == (0.7, 0.2)
    assert MULTI.mistake(row, np.array([1, 1, 0], np.float32)) == pytest.approx((0.8, 0.2))


def test_averages_of_a_report() -> None:
    found = {"carry": 0.5, "walk": 1.0}
    assert SINGLE.averages(found) == MULTI.averages({}) == {}
    assert MULTI.averages(found) == {"mean_average_precision": 0.75}


def test_words() -> None:
    assert SINGLE.words.accuracy == "accuracy" and SINGLE.words.answers == ()
    assert MULTI.words.accuracy == "exact match" and "50.0%" in MULTI.words.answers[1]
