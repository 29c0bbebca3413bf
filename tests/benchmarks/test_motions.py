"""The drawn set: its classes differ in motion alone, it is the same for a seed, and persons stay together."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pandas as pd
import pytest

from benchmarks.accuracy import crossvalidation, motions
from benchmarks.accuracy.crossvalidation import SETS, Prepared
from benchmarks.accuracy.motions import MOTIONS
from sora.config import Settings
from sora.core.errors import InputError
from sora.dataset.scan import scan

PEOPLE = 15


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips as files of a few bytes: for tests that look at names only."""

    def touch(path: Path, frames: Any, fps: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.name} {fps}")

    monkeypatch.setattr(motions, "encode", touch)
    monkeypatch.setattr(motions, "make_clip", lambda *_: None)


def test_every_motion_visits_every_place_equally_often() -> None:
    places = {motion: np.sort(motions.path_of(motion, 48) % 1) for motion in MOTIONS}
    for one, other in zip(MOTIONS[::2], MOTIONS[1::2], strict=True):  # of a pair: the very same places
        np.testing.assert_allclose(places[one], places[other], atol=1e-9)
    for motion in MOTIONS:
        spread = np.histogram((places[motion] + 1e-9) % 1, bins=6, range=(0, 1))[0]
        assert abs(spread - 8).max() <= 1, motion


def test_the_motions_are_what_their_names_say() -> None:
    steps = {motion: np.diff(motions.path_of(motion, 48)) * 48 for motion in MOTIONS}
    for one, other in motions.MIRRORED:
        np.testing.assert_allclose(steps[one], -steps[other])
    for motion, parts in (("slow_then_fast", (1.5, 3)), ("fast_then_slow", (3, 1.5))):
        lengths = [round(48 / part) for part in parts]  # frames: each part is a lap
        np.testing.assert_allclose(steps[motion], np.repeat(parts, lengths)[:-1])
    assert set(steps["right"].round(6)) == {1} and set(steps["right_fast"].round(6)) == {2}
    assert (steps["right_then_left"][:24] > 0).all() and (steps["right_then_left"][24:] < 0).all()
    with pytest.raises(InputError, match="'up' is no motion"):
        motions.path_of("up", 48)


def test_what_the_pixels_show_goes_where_it_should() -> None:
    """In a picture without noise, shake and things that drift, the lane alone changes: it is found again, moved."""
    person = motions.make_person(0)
    scene = [np.zeros_like(person.room) for _ in range(2)]
    for picture, lap in zip(scene, (0.2, 0.3), strict=True):
        motions._draw(picture, person, 50, 60, 0.0, lap)
    lane = [picture[60 : 60 + person.thing.shape[0], 50 : 50 + person.lane].sum(axis=(0, 2)) for picture in scene]
    step = round(person.lane * 0.1)
    right, left = (float((lane[1] * np.roll(lane[0], way * step)).sum()) for way in (1, -1))
    assert right > 1.5 * left
    hanging = np.zeros_like(person.room)
    motions._draw(hanging, person, 50, 60, 0.0, 0.95)  # as much of it is seen at both ends together
    own = hanging[60 : 60 + person.thing.shape[0], 50 : 50 + person.lane].sum()
    assert own == pytest.approx(scene[0][60 : 60 + person.thing.shape[0], 50 : 50 + person.lane].sum(), rel=0.02)


def test_appearance_says_who_it_is_and_not_what_is_done() -> None:
    """Mean and deviation over a clip's frames, whose order they ignore; the nearest mean, of other persons."""
    features, labels, people = [], [], []
    for number in range(PEOPLE):
        person = motions.make_person(number)
        for motion in MOTIONS:
            frames = motions.make_clip(person, motion).astype(np.float32).mean(axis=-1)
            small = [cv2.resize(picture, (32, 24), interpolation=cv2.INTER_AREA) for picture in frames]
            features.append(np.concatenate([np.mean(small, axis=0).ravel(), 3 * np.std(small, axis=0).ravel()]))
            labels.append(motion)
            people.append(number)
    x, label, who = np.array(features), np.array(labels), np.array(people)

    def nearest(learn: np.ndarray, ask: np.ndarray, of: np.ndarray) -> np.ndarray:
        names = np.unique(of)
        means = np.stack([x[learn & (of == name)].mean(axis=0) for name in names])
        answered = names[((x[ask][:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)]
        return np.asarray(answered == of[ask])

    motion_right = np.concatenate([nearest(who % 3 != part, who % 3 == part, label) for part in range(3)])
    person_right = nearest(label != "left", label == "left", who)
    assert motion_right.mean() < 1 / 8 + 0.1  # 3 deviations of chance
    assert person_right.mean() > 0.9


def test_a_seed_gives_the_same_clips(tmp_path: Path) -> None:
    person = motions.make_person(3)
    np.testing.assert_array_equal(motions.make_clip(person, "left"), motions.make_clip(motions.make_person(3), "left"))
    other = motions.make_clip(motions.make_person(3, seed=1), "left", seed=1)
    assert other.shape != (person.frames, 120, 160, 3) or (other != motions.make_clip(person, "left")).mean() > 0.5
    first, second = (motions.make(tmp_path / name, persons=1) for name in ("a", "b"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert len({file.read_bytes() for file in first}) == 8


def test_a_clip_is_a_short_small_video_of_its_person(tmp_path: Path) -> None:
    looks = [motions.make_person(number) for number in range(motions.PERSONS)]
    assert {person.frames % 6 for person in looks} == {0}
    assert all(20 <= person.fps <= 30 and 1.7 < person.frames / person.fps < 2.3 for person in looks)
    assert len({person.fps for person in looks}) > 5 and len({person.room.tobytes() for person in looks}) == 25
    motions.make(tmp_path / "set", persons=2)
    found = scan(tmp_path / "set", Settings())
    wanted = {(motion, group, None) for motion in MOTIONS for group in ("P00", "P01")}
    assert {(one.label, one.group, one.problem) for one in found} == wanted
    with av.open(str(tmp_path / "set" / "left" / "P01.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height, stream.codec_context.name) == (160, 120, "h264")
        assert stream.average_rate == looks[1].fps and stream.frames == looks[1].frames


@pytest.mark.usefixtures("undrawn")
def test_200_clips_25_of_each_motion_and_8_of_each_person(tmp_path: Path) -> None:
    files = motions.make(tmp_path / "set")
    rows = list(csv.DictReader((tmp_path / "set" / "labels.csv").open()))
    assert sorted(tmp_path / "set" / row["path"] for row in rows) == sorted(files) and len(files) == 200
    assert Counter(row["label"] for row in rows) == dict.fromkeys(MOTIONS, 25)
    assert set(Counter(row["group"] for row in rows).values()) == {8}
    assert all(Path(row["path"]).parts == (row["label"], f"{row['group']}.mp4") for row in rows)


@pytest.mark.usefixtures("undrawn")
def test_the_folds_leave_out_five_persons_each() -> None:
    rows = [(f"{number:03d}", motion, f"P{number % 25:02d}") for number, motion in enumerate(MOTIONS * 25)]
    videos = pd.DataFrame(rows, columns=["sha256", "label", "group"])
    videos["unit"] = pd.factorize(videos["group"])[0]
    videos = videos.assign(path="", brightness=0.0, duration=2.0, codec="h264")
    protocol = SETS["motions8"]
    made = Prepared(protocol, crossvalidation.settings_of(None, list(protocol.changes)), videos, Path(), None)
    folds = list(crossvalidation.plan(made, "commit", inner=False))
    assert len(folds) == 15
    for fold in folds:
        left_out = fold.table[fold.table["split"] == "test"]
        assert left_out["group"].nunique() == 5 and set(left_out["label"].value_counts()) == {5}
        assert (fold.table.groupby("group")["split"].nunique() == 1).all()
    # A mirrored clip has its mirror's label.
    mirror = made.settings.train.mirrors(sorted(MOTIONS))
    assert mirror is not None
    named = {one: sorted(MOTIONS)[other] for one, other in zip(sorted(MOTIONS), mirror, strict=True)}
    assert named["left"] == "right" and named["left_then_right"] == "right_then_left"
    assert named["slow_then_fast"] == "slow_then_fast"


@pytest.mark.usefixtures("undrawn")
def test_it_is_drawn_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(motions, "make_clip", killed)
        with pytest.raises(KeyboardInterrupt):
            motions.cached(tmp_path)
    assert not [one for one in tmp_path.iterdir() if not one.name.endswith(".part")]
    folder = motions.cached(tmp_path)
    assert (folder / "labels.csv").is_file() and folder.name.startswith("motions8-")
    assert list(tmp_path.iterdir()) == [folder]  # what was killed is gone
    monkeypatch.setattr(motions, "make", lambda _: pytest.fail("drawn again"))
    assert motions.cached(tmp_path) == folder


@pytest.mark.usefixtures("undrawn")
def test_two_processes_draw_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = motions.make

    def slower(out: Path) -> list[Path]:
        with monkeypatch.context() as patch:
            patch.setattr(motions, "make", make)
            patch.setattr(os, "getpid", lambda: 1)
            motions.cached(tmp_path)
        return make(out)

    monkeypatch.setattr(motions, "make", slower)
    folder = motions.cached(tmp_path)
    assert list(tmp_path.iterdir()) == [folder] and (folder / "labels.csv").is_file()


@pytest.mark.usefixtures("undrawn")
def test_a_folder_with_something_in_it_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert motions.main([str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["mine.txt"]
    assert motions.main([str(tmp_path / "new"), "--seed", "3"]) == 0
    assert "200 clips" in capsys.readouterr().out
