"""The accuracy benchmark: what a fold may see, what the figures mean, SIGKILL and resume over a tiny real set."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.accuracy import crossvalidation, figures, foldfiles
from benchmarks.accuracy.crossvalidation import SETS, Prepared, Protocol
from benchmarks.accuracy.foldfiles import FoldRecord
from sora.config import Settings
from sora.core.errors import InputError, SettingsError
from tests.clips import make_shards

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = [
    "clip.frames=8", "clip.height=32", "clip.width=32", "model.low_filters=[16]", "model.high_filters=[16]",
    "model.key_frames=2", "model.embedding=16", "train.epochs=1", "train.batch=4", "train.min_steps=1",
]  # fmt: skip


def prepared(**changes: Any) -> Prepared:
    """30 videos of 10 people, two classes."""
    number = np.arange(30)
    videos = pd.DataFrame(
        {
            "sha256": [f"{n:064x}" for n in number],
            "path": [f"{'ab'[n % 2]}/{n}.mp4" for n in number],
            "label": [f"{'ab'[n % 2]}" for n in number],
            "group": [f"p{n // 3}" for n in number],
            "brightness": 100.0,
            "duration": 2.0,
            "codec": "h264",
            "unit": number // 3,
        }
    )
    protocol = Protocol("made", Path("nowhere"), **changes)
    return Prepared(protocol, Settings(classes=("a", "b")), videos, Path("nowhere"), None)


def test_every_video_is_judged_once_a_seed_and_no_group_is_on_two_sides() -> None:
    folds = list(crossvalidation.plan(prepared(seeds=2), "commit", inner=False))
    assert len(folds) == 10 and len({fold.key for fold in folds}) == 10
    for seed in (0, 1):
        own = [fold for fold in folds if fold.seed == seed]
        judged = pd.concat([fold.table[fold.table["split"] == "test"] for fold in own])
        assert sorted(judged["sha256"]) == sorted(prepared().videos["sha256"])
        assert {fold.settings.train.seed for fold in own} == {seed}
    for fold in folds:
        assert (fold.table.groupby("group")["split"].nunique() == 1).all()
        assert set(fold.table["split"]) == {"train", "val", "test"}


def test_inner_folds_never_hold_the_outer_one() -> None:
    outer = list(crossvalidation.plan(prepared(seeds=1), "commit", inner=False))
    inner = list(crossvalidation.plan(prepared(seeds=1), "commit", inner=True))
    for one, other in zip(outer, inner, strict=True):
        left_out = set(one.table.loc[one.table["split"] == "test", "sha256"])
        assert set(other.table["split"]) == {"train", "val"} and not left_out & set(other.table["sha256"])
        assert one.key != other.key


def test_leave_one_group_out_and_random_folds() -> None:
    one_out = list(crossvalidation.plan(prepared(folds=0, seeds=1, validation=0.0), "commit", inner=False))
    assert len(one_out) == 10
    for fold in one_out:
        assert fold.table.loc[fold.table["split"] == "test", "group"].nunique() == 1
        assert set(fold.table["split"]) == {"train", "test"}
    leaking = list(crossvalidation.plan(prepared(random=True, seeds=1), "commit", inner=False))
    assert any((fold.table.groupby("group")["split"].nunique() > 1).any() for fold in leaking)


def test_a_folds_name_is_its_configuration_and_commit() -> None:
    def keys(given: Prepared, commit: str = "commit") -> set[str]:
        return {fold.key for fold in crossvalidation.plan(given, commit, inner=False)}

    base = prepared(seeds=1)
    changed = base.settings.model_copy(update={"train": base.settings.train.model_copy(update={"ema": 0.5})})
    elsewhere = base.settings.model_copy(update={"train": base.settings.train.model_copy(update={"work_pool": "gpu"})})
    assert keys(base) == keys(prepared(seeds=1)) == keys(replace(base, settings=elsewhere))
    assert not keys(base) & keys(base, "another") and not keys(base) & keys(replace(base, settings=changed))


def test_changes_are_checked_settings(tmp_path: Path) -> None:
    changed = crossvalidation.settings_of(
        None, ["train.epochs=3", "model.low_filters=[16, 24]", "train.flip=[a, [b, c]]"]
    )
    assert (
        changed.train.epochs == 3 and changed.model.low_filters == (16, 24) and changed.train.flip == ("a", ("b", "c"))
    )
    (tmp_path / "params.yaml").write_text("train: {epochs: 7}")
    assert crossvalidation.settings_of(tmp_path / "params.yaml", ["train.batch=2"]).train.epochs == 7
    assert crossvalidation.settings_of(None, ["model.preset=base"]).model.embedding == 256
    with pytest.raises(SettingsError, match=r"train\.epoches"):
        crossvalidation.settings_of(None, ["train.epoches=3"])
    for wrong in ("train.epochs", "epochs=3", "trains.epochs=3"):
        with pytest.raises(InputError, match="is no change"):
            crossvalidation.settings_of(None, [wrong])


def videos_of(count: int, units: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"sha256": [f"{n:016x}".ljust(64, "f") for n in range(count)], "unit": units})


def record(entry: dict[str, Any]) -> FoldRecord:
    of = {"set": "made", "configuration": "c", "table": "t", "commit": "x", "classes": ("a", "b")}
    return foldfiles.from_answered(entry, seed=entry["seed"], fold=entry["fold"], **of)


def fold(seed: int, number: int, right: list[bool], first: int = 0) -> dict[str, Any]:
    videos = [
        {"sha256": f"{first + n:016x}".ljust(64, "f"), "label": "a", "predicted": "a" if ok else "b",
         "probabilities": [float(ok), float(not ok)]}
        for n, ok in enumerate(right)
    ]  # fmt: skip
    training = {"parameters": 5, "best_epoch": 3, "clips_per_second": 10.0, "seconds": 2.0}
    return {"seed": seed, "fold": number, "videos": videos, "training": training}


def test_the_summary_by_hand() -> None:
    videos = videos_of(4, [0, 0, 1, 1])
    entries = [
        fold(0, 0, [True, True]), fold(0, 1, [True, False], 2), fold(1, 0, [True, False]), fold(1, 1, [False, False], 2)
    ]  # fmt: skip
    folds = [record(entry) for entry in entries]
    found = figures.summarise(folds, videos)
    assert found["by_seed"] == [0.75, 0.25] and found["accuracy"] == 0.5
    assert found["spread"] == pytest.approx(np.std([0.75, 0.25], ddof=1))
    assert found["by_fold"] == [1, 0.5, 0.5, 0] and found["folds"] == 4 and found["videos"] == 4
    assert found["interval"] == "95 %, bootstrap over videos"
    assert found["training_seconds"] == 8 and found["parameters"] == 5 and found["best_epoch"] == 3
    assert figures.summarise(folds[:2], videos)["spread"] is None
    trained = [replace(one, best_epoch=None, clips_per_second=None) for one in folds]  # a baseline
    assert figures.summarise(trained, videos)["best_epoch"] is None


def test_an_entry_says_what_it_lacks(tmp_path: Path) -> None:
    summary = figures.summarise([record(fold(0, 0, [True, False] * 2))], videos_of(4, [0, 0, 1, 1]))
    about = {"name": "made", "leaks": False, "configuration": {"a": 1}, "protocol": "p", "known": []}
    entry = {**about, "incomplete": None, **summary}
    part = {**entry, "incomplete": "1 of 3 folds"}
    assert figures.label_of(entry) == "made"
    assert figures.label_of({**part, "leaks": True}) == "made (leaks) (incomplete: 1 of 3 folds)"
    assert figures.store(part, tmp_path, "accuracy") == [part]
    other = {**entry, "name": "other"}
    figures.store(other, tmp_path, "accuracy")
    assert figures.store(entry, tmp_path, "accuracy") == [entry, other]  # it keeps its place
    # A part takes the place of a whole only of its own configuration, as when folds were taken away.
    assert figures.store({**part, "configuration": {"a": 2}}, tmp_path, "accuracy") == [entry, other]
    assert figures.store(part, tmp_path, "accuracy") == [part, other]
    assert json.loads((tmp_path / "accuracy.json").read_text())["result"] == [part, other]


def test_what_the_sets_ask_for() -> None:
    for protocol in SETS.values():
        settings = crossvalidation.settings_of(None, [*protocol.changes, "train.epochs=3"])
        assert settings.train.epochs == 3
    kth9 = crossvalidation.settings_of(None, list(SETS["kth9"].changes))
    assert kth9.clip.sampling == "window" and SETS["kth9"].folds == 3
    assert SETS["grid"].group_pattern is None and (SETS["grid"].folds, SETS["grid"].seeds) == (5, 1)


def test_videos_that_look_alike_stay_together_unless_the_set_says_so() -> None:
    made = prepared()
    videos = made.videos.assign(signature="0" * 48, group=None)
    together = crossvalidation._units(made.protocol, made.settings, videos)
    apart = crossvalidation._units(replace(made.protocol, near_duplicates=False), made.settings, videos)
    assert len(set(together)) == 1 and len(set(apart)) == 30


def test_videos_that_stand_or_fall_together_make_a_wide_interval() -> None:
    right = np.repeat([1.0, 0.0] * 10, 10)
    alone = figures.bootstrap(right, np.arange(200))
    together = figures.bootstrap(right, np.repeat(np.arange(20), 10))
    assert alone[1] - alone[0] < 0.15 < 0.35 < together[1] - together[0]
    assert figures.bootstrap(np.ones(20), np.arange(20))[0] < 0.9  # all right is no certainty


def killed_after_a_fold(command: list[str], folds: Path) -> Path:
    """Starts the benchmark, kills it when it has finished one fold, and returns that fold's file."""
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (done := list(folds.glob("*/fold.json"))):
        if child.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"no fold was finished: {child.communicate()[1][-2000:]}")
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    return done[0]


def test_killed_and_run_again_it_goes_on_fold_by_fold(tmp_path: Path) -> None:
    """The real thing over 12 tiny videos of 6 groups: two folds of one epoch."""
    make_shards(tmp_path / "tiny", each=6)
    options = ["--data", str(tmp_path / "tiny" / "data"), "--group-pattern", r"/(\d+)\.mp4", "--folds", "2",
               "--seeds", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), *TINY]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.accuracy", *options]
    first = killed_after_a_fold(command, tmp_path / "cache" / "folds")
    before = first.stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert first.stat().st_mtime_ns == before and "| data |" in done.stdout
    files = sorted((tmp_path / "cache" / "folds").glob("*/fold.json"))
    assert len(files) == 2 and not list((tmp_path / "cache" / "folds").glob("*/fit"))
    (files[0].parent / "fit").mkdir()  # as a kill leaves it between a fold's result and its end
    [entry] = json.loads((tmp_path / "out" / "accuracy.json").read_text())["result"]
    assert entry["folds"] == entry["folds_of"] == 2 and entry["videos"] == 12 and 0 <= entry["accuracy"] <= 1
    assert entry["commit"] and entry["changes"] == TINY and entry["low"] <= entry["accuracy"] <= entry["high"]
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    # All is done: nothing is trained, and the entry takes the place of the one before.
    [published] = (tmp_path / "out" / "folds" / "data-folds2").iterdir()  # a digest, for want of a name
    assert sorted(file.name for file in published.iterdir()) == ["0-0.json", "0-1.json"]
    written = [file.stat().st_mtime_ns for file in files]
    for file in published.iterdir():
        if int(file.stem[-1]) == int(files[0].parent.name.split("-")[2]):
            file.unlink()  # killed before it was published, with work left behind
    assert crossvalidation.main([*options, "--limit-folds", "1"]) == 0
    assert crossvalidation.main(options) == 0
    assert [file.stat().st_mtime_ns for file in files] == written and not (files[0].parent / "fit").exists()
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["result"] == [entry]
    # The published files are enough: the cache of trainings may go, and the code may have moved on.
    shutil.rmtree(tmp_path / "cache" / "folds")
    assert crossvalidation.main([*options, "--next", "2"]) == 0
    assert not (tmp_path / "cache" / "folds").exists()
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["result"] == [entry]
