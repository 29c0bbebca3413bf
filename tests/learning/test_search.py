"""The choice by evidence: what is looked at, what is chosen, that it resumes, and what happens without evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora.config import Model, Train
from sora.core.errors import InputError
from sora.learning import probing, search
from sora.learning.search import Evidence, choose
from sora.media.video import flow
from sora.media.video.clips import FLOW_LENGTH
from sora.tasks import SINGLE

AUTO = Model(preset="auto")
TRAIN = Train()


def evidence(
    *, appearance: float = 1.0, motion: float = 1.0, videos: int = 60, units: int = 12, clips: int = 1, seed: int = 0
) -> Evidence:
    """Two classes. Each kind of feature tells them apart as strongly as its number says."""
    chance = np.random.default_rng(seed)
    truth = np.arange(videos) % 2
    owner = np.repeat(np.arange(videos), clips)
    side = np.where(truth[owner] == 1, 1.0, -1.0)[:, None]

    def features(strength: float) -> np.ndarray:
        own = np.zeros((1, 40))
        own[0, :4] = strength
        drawn = np.zeros((len(owner), FLOW_LENGTH), np.float32)
        drawn[:, :40] = chance.normal(0, 1, (len(owner), 40)) + side * own
        return drawn

    return Evidence(
        sha256=np.array([f"{one:064x}" for one in owner], "U64"),
        clip=np.tile(np.arange(clips), videos),
        owner=owner,
        targets=truth[owner],
        truth=truth,
        unit=np.arange(videos) % units,
        is_train=np.arange(videos) >= videos // 5,
        features={"appearance": features(appearance), "motion": features(motion)},
        classes=2,
    )


def chosen(found: search.Choice) -> str:
    return next(one.name for one in found.tried if one.chosen)


def quiet(event: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    ("appearance", "motion", "expected"),
    [(2.0, 0.0, "appearance"), (0.0, 2.0, "motion"), (0.8, 0.8, "both")],
)
def test_the_evidence_decides(appearance: float, motion: float, expected: str, tmp_path: Path) -> None:
    found = choose(evidence(appearance=appearance, motion=motion, videos=200, units=40), AUTO, TRAIN, tmp_path, quiet)
    assert chosen(found) == expected
    assert {one.name for one in found.tried} == {"appearance", "motion", "both"}
    assert tuple(branch.features for branch in found.branches) == search.READS[expected]


def test_two_are_never_worse_than_one_of_them(tmp_path: Path) -> None:
    """Its weights are fitted: the weight 0 for the useless one is among them."""
    found = choose(evidence(appearance=0.0, motion=2.0, videos=200, units=40), AUTO, TRAIN, tmp_path, quiet)
    loss = {one.name: one.log_loss for one in found.tried}
    assert loss["both"] <= min(loss["motion"], loss["appearance"]) + 1e-3


def test_what_is_claimed_holds_for_other_videos(tmp_path: Path) -> None:
    found = choose(evidence(appearance=0.6, motion=0.0, videos=200, units=40), AUTO, TRAIN, tmp_path, quiet)
    others = evidence(appearance=0.6, motion=0.0, videos=2000, units=400, seed=1)
    logits = sum(branch(others.features[branch.features]) for branch in found.branches)
    accuracy = (np.asarray(logits).argmax(axis=1) == others.truth).mean()
    best = next(one for one in found.tried if one.chosen)
    assert best.low - 0.05 <= accuracy <= best.high + 0.05
    assert abs(SINGLE.fit_temperature(np.asarray(logits), others.owner, others.truth) - 1) < 0.5  # calibrated


def test_answers_that_are_held_out_come_from_folds_that_divide_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = evidence()
    seen: list[set[int]] = []
    real = probing.basis

    def spy(features: str, x: np.ndarray, columns: str = "all") -> probing.Basis:
        rows = {tuple(row): place for place, row in enumerate(data.features[features])}
        seen.append({int(data.unit[data.owner[rows[tuple(row)]]]) for row in x})
        return real(features, x, columns)

    monkeypatch.setattr(probing, "basis", spy)
    found = choose(data, AUTO, TRAIN, tmp_path, quiet)
    assert found.held_out is not None and found.held_out.shape == (60, 2)
    folds = seen[: search.FOLDS * len(flow.COLUMNS) : len(flow.COLUMNS)]  # motion is first
    assert all(set(range(12)) - fold for fold in folds)
    assert sum(len(set(range(12)) - fold) for fold in folds) == 12  # every unit is left out once, whole


def test_it_is_the_same_every_time_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, place = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    place.mkdir()
    whole = choose(evidence(), AUTO, TRAIN, first, quiet)
    count = 0
    real = probing.basis

    def dies(features: str, x: np.ndarray, columns: str = "all") -> probing.Basis:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return real(features, x, columns)

    monkeypatch.setattr(probing, "basis", dies)
    with pytest.raises(KeyboardInterrupt):
        choose(evidence(), AUTO, TRAIN, place, quiet)
    count = 100
    again = choose(evidence(), AUTO, TRAIN, place, quiet)
    assert count < 100 + search.FOLDS * (1 + len(flow.COLUMNS))  # the finished folds were not solved again
    assert whole.held_out is not None and again.held_out is not None
    assert np.array_equal(whole.held_out, again.held_out)
    for one, other in zip(whole.branches, again.branches, strict=True):
        assert np.array_equal(one.logits.kernel, other.logits.kernel)


def test_a_torn_fold_is_solved_again(tmp_path: Path) -> None:
    whole = choose(evidence(), AUTO, TRAIN, tmp_path, quiet)
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    again = choose(evidence(), AUTO, TRAIN, tmp_path, quiet)
    assert whole.held_out is not None and again.held_out is not None
    assert np.array_equal(whole.held_out, again.held_out)


def test_one_group_is_no_evidence(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    found = choose(evidence(units=1), AUTO, TRAIN, tmp_path, said.append)
    assert found.held_out is None and found.tried == ()
    assert any("too few groups" in event.get("message", "") for event in said)


def test_several_clips_of_a_video_count_as_one_answer(tmp_path: Path) -> None:
    found = choose(evidence(clips=3), AUTO, TRAIN, tmp_path, quiet)
    assert all(one.videos == 60 for one in found.tried)
    assert found.held_out is not None and len(found.held_out) == 180


def test_without_features_it_says_what_to_set(tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="reads optical flow or a frozen backbone"):
        choose(replace(evidence(), features={}), AUTO, TRAIN, tmp_path, quiet)
    motion = replace(evidence(), features={"motion": evidence().features["motion"]})
    assert chosen(choose(motion, AUTO, TRAIN, tmp_path, quiet)) == "motion"
    with pytest.raises(InputError):
        choose(motion, Model(preset="appearance"), TRAIN, tmp_path, quiet)


def test_a_mirror_that_changes_the_class_is_said(tmp_path: Path) -> None:
    from dataclasses import replace

    data = evidence()
    vectors = np.abs(np.random.default_rng(1).normal(0, 0.1, (60, FLOW_LENGTH))).astype(np.float32)
    vectors[:, 0:96:8] += data.truth[:, None]  # to the right
    vectors[:, 4:96:8] += 1 - data.truth[:, None]  # to the left
    found = choose(replace(data, features={"motion": vectors}), AUTO, TRAIN, tmp_path, quiet, ("left", "right"))
    [note] = found.notes
    assert "'left' looks like 'right'" in note and "train.flip" in note
    same = tmp_path / "same"
    same.mkdir()
    both = vectors + flow.mirrored(vectors)  # its own mirror image
    both[:, 2] += 3 * data.truth
    both = both + flow.mirrored(both)
    assert choose(replace(data, features={"motion": both}), AUTO, TRAIN, same, quiet, ("left", "right")).notes == ()


def test_time_is_bounded(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    found = choose(evidence(), AUTO, Train(minutes=1e-9), tmp_path, said.append)
    assert [one.name for one in found.tried] == ["motion"]  # one at least, the cheapest
    assert any("no time is left for appearance" in event.get("message", "") for event in said)
