"""The references: what they answer by hand, over real clips, and through the command on the same folds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import common
from benchmarks.accuracy import baselines, crossvalidation, foldfiles
from benchmarks.accuracy.baselines import BASELINES, Task
from sora.core.tensors import VIDEO
from sora.store.shards import ShardSet
from tests.clips import make_shards

CLASSES = ("a", "b", "c")


def task(labels: list[str], asked: int = 2) -> Task:
    learn = pd.DataFrame({"sha256": [f"l{n}" for n in range(len(labels))], "label": labels})
    return Task(Path(), CLASSES, learn, pd.DataFrame({"sha256": [f"x{n}" for n in range(asked)], "label": "a"}))


def levels(shards: Path, videos: tuple[str, ...]) -> np.ndarray:
    """A feature that tells the learnt videos apart: their number."""
    return np.array([[float(name[1:])] for name in videos], np.float32)


def test_the_majority_by_hand() -> None:
    guess = baselines.majority(task(["b", "b", "b", "c"]))
    np.testing.assert_allclose(guess.probabilities, [[0, 0.75, 0.25]] * 2)
    assert guess.parameters == 0
    table = pd.DataFrame({"sha256": ["1", "2", "3"], "label": ["b", "a", "a"], "split": ["train", "val", "test"]})
    answered = baselines.answers(BASELINES["majority"], Path(), CLASSES, table, "test")
    # What is kept aside is learnt from, too; of equal classes the first is answered.
    assert [(one["sha256"], one["label"], one["predicted"]) for one in answered["videos"]] == [("3", "a", "a")]
    assert answered["videos"][0]["probabilities"] == [0.5, 0.5, 0] and answered["train"] == 2
    inner = baselines.answers(BASELINES["majority"], Path(), CLASSES, table[:2], "val")
    assert [one["predicted"] for one in inner["videos"]] == ["b"]


def test_a_probe_answers_for_classes_that_it_has_seen() -> None:
    probe = baselines.probe("numbers", levels, regularisation=10.0, reads="numbers")
    guess = probe.guess(task(["a", "a", "c", "c"], asked=4))
    np.testing.assert_allclose(guess.probabilities.sum(axis=1), 1)
    assert (guess.probabilities[:, 1] == 0).all()  # no video of "b" to learn from
    assert [CLASSES[n] for n in guess.probabilities.argmax(axis=1)] == ["a", "a", "c", "c"]
    assert guess.parameters == 2 and probe.settings == {"reads": "numbers", "C": 10.0}
    one = probe.guess(task(["b", "b"]))
    np.testing.assert_allclose(one.probabilities, [[0, 1, 0]] * 2)


def test_mean_images_are_grey_means_of_all_clips(tmp_path: Path) -> None:
    shards, table = make_shards(tmp_path, each=2)
    videos = tuple(sorted(table["sha256"]))
    found = baselines.mean_images(shards, videos)
    stored = ShardSet.open(shards)
    assert found.shape == (4, 32 * 32) and found.dtype == np.float32 and not found.flags.writeable
    for number, video in enumerate(videos):
        rows = np.flatnonzero(stored.index["sha256"] == video)
        frames = stored.read(VIDEO, rows).astype(np.float64).reshape(-1, 32, 32, 3)
        np.testing.assert_allclose(
            found[number].reshape(32, 32), frames.mean(axis=0) @ [0.299, 0.587, 0.114], rtol=0, atol=0.1
        )
    with pytest.raises(KeyError):
        baselines.mean_images(shards, ("0" * 64,))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for 12 tiny videos of 6 groups in 3 folds; the commit is "one"."""
    monkeypatch.setattr(common, "commit", lambda _: "one")
    make_shards(tmp_path / "tiny", each=6)
    return ["--data", str(tmp_path / "tiny" / "data"), "--group-pattern", r"/(\d+)\.mp4", "--seeds", "1",
            "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]  # fmt: skip


def entries(out: Path) -> dict[str, dict[str, object]]:
    return {one["name"]: one for one in json.loads((out / "accuracy.json").read_text())["result"]}


def test_folds_in_pieces(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*tiny, "--folds", "3", "--baseline", "majority"]
    folder = tmp_path / "out" / "folds" / "data-folds3" / "majority"
    assert crossvalidation.main([*options, "--next", "0"]) == 0  # nothing is there, and nothing is to be done
    assert not (tmp_path / "out").exists() and "0 of 3 folds are done" in capsys.readouterr().err
    for done in (1, 2):
        assert crossvalidation.main([*options, "--next", "1"]) == 0
        assert sorted(one.name for one in folder.iterdir()) == [f"0-{fold}.json" for fold in range(done)]
        said = capsys.readouterr()
        assert f"data majority (incomplete: {done} of 3 folds)" in said.out
        entry = entries(tmp_path / "out")["data majority"]
        assert (entry["folds"], entry["folds_of"], entry["incomplete"]) == (done, 3, f"{done} of 3 folds")
    monkeypatch.setattr(common, "commit", lambda _: "two")
    assert crossvalidation.main([*options, "--next", "5"]) == 0
    entry = entries(tmp_path / "out")["data majority"]
    assert (entry["folds"], entry["incomplete"], entry["commit"]) == (3, None, "one, two")
    assert "incomplete" not in capsys.readouterr().out
    assert [foldfiles.read(folder / f"0-{fold}.json").commit for fold in range(3)] == ["one", "one", "two"]
    # All is there: nothing is computed. With --fresh it is, in pieces too, where another commit did it.
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "answers", lambda *_: pytest.fail("computed again"))
        assert crossvalidation.main(options) == 0
    assert crossvalidation.main([*options, "--fresh", "--next", "1"]) == 0
    assert [foldfiles.read(folder / f"0-{fold}.json").commit for fold in range(3)] == ["two", "one", "two"]
    assert crossvalidation.main([*options, "--fresh"]) == 0
    assert entries(tmp_path / "out")["data majority"]["commit"] == "two"


def test_baselines_have_the_folds_of_the_configuration(tmp_path: Path, tiny: list[str]) -> None:
    for name in BASELINES:
        # The probes read what `auto` prepares.
        read = ["model.preset=auto", "clip.frames=8", "clip.height=32", "clip.width=32"] if "probe" in name else []
        assert crossvalidation.main([*tiny, "--folds", "2", "--baseline", name, *read]) == 0
    folds = tmp_path / "out" / "folds" / "data-folds2"
    one, other = ([foldfiles.read(folds / name / f"0-{n}.json") for n in (0, 1)] for name in ("majority", "mean-image"))
    assert [record.table for record in one] == [record.table for record in other]
    assert {record.configuration for record in one}.isdisjoint(record.configuration for record in other)
    for first, second in zip(one, other, strict=True):
        assert [(a.sha256, a.label) for a in first.answers] == [(a.sha256, a.label) for a in second.answers]
    assert entries(tmp_path / "out")["data majority"]["accuracy"] == 0.5
    assert entries(tmp_path / "out")["data mean-image"]["best_epoch"] is None


def test_another_configuration_never_counts_for_the_first(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, "--folds", "2", "--baseline", "mean-image"]
    assert crossvalidation.main([*options, "--name", "sizes"]) == 0
    before = entries(tmp_path / "out")["data mean-image sizes"]
    smaller = ["clip.height=32", "clip.width=32"]
    capsys.readouterr()
    # Under the same name, its first fold takes the place of the other's, whose complete figure stays meanwhile.
    assert crossvalidation.main([*options, "--name", "sizes", "--next", "1", *smaller]) == 0
    said = capsys.readouterr().err
    assert "2 folds are of another configuration" in said and "too few to replace" in said
    assert entries(tmp_path / "out")["data mean-image sizes"] == before
    assert crossvalidation.main([*options, "--name", "sizes", *smaller]) == 0
    assert entries(tmp_path / "out")["data mean-image sizes"]["configuration"] != before["configuration"]
    # Without a name, a changed configuration has a folder of its own.
    assert crossvalidation.main(options) == crossvalidation.main([*options, *smaller]) == 0
    names = sorted(one.name for one in (tmp_path / "out" / "folds" / "data-folds2").iterdir())
    assert names[0].startswith("mean-image") and "mean-image-sizes" in names and len(names) == 3


def test_what_is_asked_wrongly(tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [*tiny, "--folds", "2"]
    for name in ("default", "majority-2", "…"):
        assert crossvalidation.main([*options, "--baseline", "majority", "--name", name]) == 2
        assert "is taken, or has no letter" in capsys.readouterr().err
    for wrong in (["--next", "-1"], ["--next", "1", "--inner"], ["--baseline", "none"]):
        with pytest.raises(SystemExit, match="2"):
            crossvalidation.main([*options, *wrong])
    assert crossvalidation.main([*options, "--baseline", "majority", "model.head=multilabel"]) == 2
    assert "answers one class a video" in capsys.readouterr().err
    assert crossvalidation.main([*options, "--baseline", "majority"]) == 0
    file = tmp_path / "out" / "folds" / "data-folds2" / "majority" / "0-1.json"
    file.write_text("<<<<<<< HEAD")
    assert crossvalidation.main([*options, "--baseline", "majority"]) == 2
    assert "0-1.json is no finished fold" in capsys.readouterr().err
