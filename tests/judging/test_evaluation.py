"""Evaluation on real videos, by models whose answers are known: logits that depend on mean brightness alone."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sora.config import Settings
from sora.core.errors import InputError, ServiceError, VideoError
from sora.core.records import ClipSpec, Recipe
from sora.dataset import manifest
from sora.judging import evaluation
from sora.store import building
from tests.videos import make_video

LEVELS = {"dark": 60, "middle": 125, "bright": 190}
SPEC = ClipSpec(frames=4, height=16, width=16)


def brightness_model(path: Path, classes: list[str], spec: ClipSpec = SPEC, sharpness: float = 40.0) -> str:
    """Answers the class nearest in brightness: logit = -sharpness * (mean - level)^2, less what all classes share."""
    import keras

    clips = keras.Input((spec.frames, spec.height, spec.width, 3), dtype="uint8")
    mean = keras.layers.GlobalAveragePooling3D(keepdims=False)(keras.layers.Rescaling(1 / 255)(clips))
    dense = keras.layers.Dense(len(classes))
    model = keras.Model(clips, dense(mean))
    levels = np.array([LEVELS[name] / 255 for name in classes])
    dense.set_weights([np.tile(2 * sharpness * levels / 3, (3, 1)), -sharpness * levels**2])
    model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("evaluation")
    data = folder / "data"
    seed = 0
    for label, level in LEVELS.items():
        for number in range(6):
            seed += 1
            make_video(data / label / f"p{number}.mp4", frames=8, brightness=level, seed=seed)
    make_video(data / "middle" / "p6.mp4", frames=8, brightness=LEVELS["bright"], seed=99)  # to be mistaken
    rows = manifest.build(data, Settings(classes=tuple(LEVELS)), workers=1)
    out = folder / "shards"
    building.build(rows, [], data, out, SPEC, buckets=2, workers=1)
    table = rows[["sha256", "path", "label", "group", "brightness", "duration", "codec"]].copy()
    number = table["path"].str.extract(r"p(\d)")[0].astype(int)
    table["split"] = np.where(number < 2, "train", np.where(number < 4, "val", "test"))
    table["group"] = "person" + number.astype(str)
    file = folder / "table.parquet"
    table.sort_values("sha256").to_parquet(file, index=False)
    return SimpleNamespace(folder=folder, data=data, shards=out, table=table, file=file)


def job(world: SimpleNamespace, out: Path, *models: dict[str, Any], table: Path | None = None) -> evaluation.EvalJob:
    return evaluation.EvalJob(
        shards=str(world.shards),
        table=str(table or world.file),
        models=[evaluation.EvalModel(**model) for model in models],
        classes=list(LEVELS),
        data=str(world.data),
        out=str(out),
        batch=4,
    )


@pytest.fixture(scope="module")
def both(world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Candidate and champion in one child process; the champion knows two classes and has its own clip spec."""
    folder = tmp_path_factory.mktemp("both")
    old = ClipSpec(frames=3, height=24, width=32, aspect="stretch")
    champion = brightness_model(folder / "champion.keras", ["bright", "dark"], old)
    recipe = {
        "clip": old.to_dict(),
        "classes": ["bright", "dark"],
        "temperature": 1.5,
        "schema": 1,
        "golden": [],
        "model_sha256": evaluation.file_digest(Path(champion)),
    }
    history = [{"loss": 1.0, "accuracy": 0.4, "val_loss": 1.1, "val_accuracy": 0.3}, {"loss": 0.5, "val_loss": 0.6}]
    candidate = brightness_model(folder / "candidate.keras", list(LEVELS))
    events: list[dict[str, Any]] = []
    outcome = evaluation.run(
        job(
            world,
            folder / "out",
            {"name": "candidate", "file": candidate, "history": history},
            {"name": "champion", "file": champion, "recipe": Recipe.from_dict(recipe)},
        ),
        events.append,
        log=folder / "log" / "child.log",
    )
    return SimpleNamespace(**outcome, events=events, folder=folder, file=candidate, spec=old)


def test_the_candidate_gets_its_report(both: SimpleNamespace) -> None:
    test = both.candidate.reports["test"]
    assert len(test.videos) == 7 and len(both.candidate.reports["val"].videos) == 6
    assert test.metrics["accuracy"] == pytest.approx(6 / 7)  # the bright video among the middle ones
    [wrong] = [video for video in test.videos if video["predicted"] != video["label"]]
    assert (wrong["path"], wrong["predicted"]) == ("middle/p6.mp4", "bright")
    assert test.metrics["latency_ms"] > 0
    assert {part["slice"] for part in test.slices} == {"brightness", "codec", "group", "duration"}


def test_the_recipe_says_how_to_use_the_model_again(both: SimpleNamespace) -> None:
    recipe = both.candidate.recipe
    assert recipe.classes == tuple(LEVELS) and recipe.clip == SPEC
    assert recipe.model_sha256 == evaluation.file_digest(Path(both.file))
    assert both.candidate.reports["test"].temperature == recipe.temperature != 1
    model = evaluation._load(Path(both.file), recipe)
    assert len(recipe.golden) >= 2
    for golden in recipe.golden:
        again = evaluation._golden(model, recipe, golden["seed"])
        np.testing.assert_allclose(again["probabilities"], golden["probabilities"], atol=1e-6)


def test_a_champion_with_fewer_classes_and_another_clip_spec(both: SimpleNamespace) -> None:
    outcome = both.champion
    assert outcome.recipe.clip == both.spec and outcome.recipe.temperature == 1.5
    test = outcome.reports["test"]
    assert test.classes == ("bright", "dark")
    assert {video["label"] for video in test.videos} == {"bright", "dark"} and test.metrics["accuracy"] == 1
    assert not (outcome.folder / "index.html").exists()


def test_one_page_with_everything_beside_the_report(both: SimpleNamespace) -> None:
    names = {file.name for file in both.candidate.folder.iterdir()}
    plots = {f"{n}.png" for n in ("confusion", "precision_recall", "reliability", "recall", "history", "mistakes")}
    assert names == {"index.html", "report.json", *plots}
    again = evaluation.read(both.candidate.folder)
    assert again.to_dict() == both.candidate.to_dict()
    json.dumps(both.candidate.to_dict(), allow_nan=False)


def test_progress_reaches_the_end(both: SimpleNamespace) -> None:
    last = {event["name"]: (event["done"], event["total"]) for event in both.events}
    assert last == {"candidate": (13, 13), "champion": (8, 8)}


def evaluate(given: evaluation.EvalJob) -> dict[str, evaluation.EvalOutcome]:
    """The child's body, here."""
    evaluation.evaluate(asdict(given), lambda event: None)
    return {model.name: evaluation.read(Path(given.out) / model.name) for model in given.models}


def test_unsure_answers_and_views_travel_in_the_recipe(
    world: SimpleNamespace, both: SimpleNamespace, tmp_path: Path
) -> None:
    model = {"name": "m", "file": both.file}
    given = replace(job(world, tmp_path, model), unsure_precision=0.7, views=["mirrored", "right"])
    outcome = evaluate(given)["m"]
    recipe = outcome.recipe
    assert recipe.views == ("mirrored", "right") and recipe.unsure_below is not None
    test = outcome.reports["test"]
    confidence = np.array([max(video["probabilities"]) for video in test.videos])
    assert test.metrics["coverage"] == pytest.approx((confidence >= recipe.unsure_below - 1e-6).mean())
    assert (
        test.metrics["unsure_below"] == recipe.unsure_below
        and "sure answers" in (tmp_path / "m" / "index.html").read_text()
    )
    assert type(recipe).from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    # The videos are still pictures in their mean: other views change an answer by little, but they do change it.
    ours = np.array([video["probabilities"] for video in test.videos])
    plain = np.array([video["probabilities"] for video in both.candidate.reports["test"].videos])
    assert 0 < np.abs(ours - plain).max() < 0.1
    network = evaluation._load(Path(both.file), recipe)
    for golden in recipe.golden:
        np.testing.assert_allclose(
            evaluation._golden(network, recipe, golden["seed"])["probabilities"], golden["probabilities"], atol=1e-6
        )


def test_a_recipe_of_an_older_release_has_no_threshold_and_no_views(both: SimpleNamespace) -> None:
    stored = both.candidate.recipe.to_dict()
    for name in ("views", "unsure_below"):
        stored.pop(name)
    assert type(both.candidate.recipe).from_dict(stored) == both.candidate.recipe
    assert "coverage" not in both.candidate.reports["test"].metrics


def subset(world: SimpleNamespace, path: Path, keep: pd.Series) -> Path:
    world.table[keep].to_csv(path, index=False)
    return path


@pytest.mark.parametrize("which", ["one", "no test", "class missing", "no val"])
def test_little_to_evaluate(which: str, world: SimpleNamespace, both: SimpleNamespace, tmp_path: Path) -> None:
    path, split = world.table["path"], world.table["split"]
    keep = {
        "one": (path == "dark/p5.mp4") | (split == "val"),
        "no test": split == "val",
        "class missing": world.table["label"] != "bright",
        "no val": split == "test",
    }[which]
    given = job(world, tmp_path, {"name": "m", "file": both.file}, table=subset(world, tmp_path / "table.csv", keep))
    outcome = evaluate(given)["m"]
    test = outcome.reports["test"]
    assert len(test.videos) == {"one": 1, "no test": 0, "class missing": 5, "no val": 7}[which]
    assert (outcome.folder / "index.html").exists() and (outcome.folder / "mistakes.png").exists()
    if which == "no val":
        assert outcome.recipe.temperature == 1
    if which == "no test":
        assert "accuracy" not in test.metrics
    if which == "class missing":
        assert "recall" not in test.per_class["bright"] and test.per_class["bright"]["support"] == 0


def test_answers_do_not_depend_on_the_batch_size(world: SimpleNamespace, both: SimpleNamespace, tmp_path: Path) -> None:
    given = replace(job(world, tmp_path, {"name": "m", "file": both.file}), batch=3)
    for ours, theirs in zip(
        evaluate(given)["m"].reports["test"].videos, both.candidate.reports["test"].videos, strict=True
    ):
        np.testing.assert_allclose(ours["probabilities"], theirs["probabilities"], atol=1e-5)


def test_an_altered_model_file_is_refused(both: SimpleNamespace, world: SimpleNamespace, tmp_path: Path) -> None:
    altered = tmp_path / "altered.keras"
    altered.write_bytes(Path(both.file).read_bytes() + b"x")
    given = job(world, tmp_path, {"name": "m", "file": str(altered), "recipe": both.candidate.recipe})
    with pytest.raises(InputError, match="sha256"):
        evaluate(given)


def test_a_file_that_is_no_model(world: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "no.keras").write_bytes(b"not a model")
    with pytest.raises(InputError, match="can't load the model"):
        evaluate(job(world, tmp_path, {"name": "m", "file": str(tmp_path / "no.keras")}))
    with pytest.raises(InputError, match="can't read the model"):
        evaluate(job(world, tmp_path, {"name": "m", "file": str(tmp_path / "absent.keras")}))


def test_a_model_with_code_in_it_is_not_loaded(world: SimpleNamespace, tmp_path: Path) -> None:
    import keras

    clips = keras.Input((SPEC.frames, SPEC.height, SPEC.width, 3), dtype="uint8")
    mean = keras.layers.GlobalAveragePooling3D()(keras.layers.Rescaling(1 / 255)(clips))
    keras.Model(clips, keras.layers.Lambda(lambda x: x * 2)(mean)).save(tmp_path / "m.keras")
    with pytest.raises(InputError, match="can't load the model"):
        evaluate(job(world, tmp_path, {"name": "m", "file": str(tmp_path / "m.keras")}))


def test_a_model_of_another_shape(world: SimpleNamespace, tmp_path: Path) -> None:
    file = brightness_model(tmp_path / "two.keras", ["dark", "bright"])
    with pytest.raises(InputError, match=r"\(None, 2\), but there are 3 classes"):
        evaluate(job(world, tmp_path, {"name": "m", "file": file}))


def test_a_diverged_model(world: SimpleNamespace, tmp_path: Path) -> None:
    file = brightness_model(tmp_path / "nan.keras", list(LEVELS), sharpness=float("nan"))
    with pytest.raises(ServiceError, match="NaN"):
        evaluate(job(world, tmp_path, {"name": "m", "file": file}))


def test_shards_that_lack_a_video(world: SimpleNamespace, both: SimpleNamespace, tmp_path: Path) -> None:
    more = pd.concat([world.table, world.table.iloc[:1].assign(sha256="0" * 64, path="new.mp4", split="test")])
    more.to_csv(tmp_path / "table.csv", index=False)
    given = job(world, tmp_path, {"name": "m", "file": both.file}, table=tmp_path / "table.csv")
    with pytest.raises(ServiceError, match=r"lack 1 video.*new\.mp4"):
        evaluate(given)
    assert not (tmp_path / "m" / "report.json").exists()


def test_a_video_that_the_champion_needs_is_gone(world: SimpleNamespace, both: SimpleNamespace, tmp_path: Path) -> None:
    champion = {
        "name": "champion",
        "file": str(both.folder / "champion.keras"),
        "recipe": both.champion.recipe,
    }
    with pytest.raises((InputError, VideoError, ServiceError)):
        evaluate(replace(job(world, tmp_path, champion), data=str(tmp_path)))
