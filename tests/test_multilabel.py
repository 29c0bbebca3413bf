"""`model.head: multilabel` from a labels.csv to a served answer, on real videos of two independent attributes."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sora.config import Project, parse
from sora.core.errors import InputError
from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO, Clips
from sora.dataset import manifest, splits
from sora.dataset import table as tables
from sora.dataset.quality import validate
from sora.judging import evaluation
from sora.judging import gate as promotion
from sora.learning import audit, crossval, training
from sora.learning.jobs import TrainJob
from sora.registry import ChampionRef
from sora.runtime.predictor import ModelRefused, Predictor, Smoke, predict_files
from sora.serving.source import ModelCache
from sora.store import building
from sora.tasks import MULTI
from tests.clips import SEVERAL, SMALL, make_several
from tests.serving.inside import ready, running, send, until

SPEC = ClipSpec(frames=8, height=32, width=32)
SETTINGS = parse(
    f"""
classes: [bright, dark, left, right]
clip: {json.dumps({"frames": 8, "height": 32, "width": 32})}
model: {json.dumps({**SMALL, "head": "multilabel"})}
train: {{epochs: 25, batch: 8, patience: 25, learning_rate: 0.005, mix_up: 0.2, flip: [[left, right]]}}
split: {{val: 0.2, test: 0.3}}
gate: {{min_test: 8, max_ece: 1.0}}
"""
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The nightly's steps by hand: manifest, validation, splits, shards, training, evaluation."""
    folder = tmp_path_factory.mktemp("several")
    data = make_several(folder / "data")
    rows = manifest.build(data, SETTINGS, workers=1)
    valid = validate(rows, SETTINGS)
    assignment = splits.assign(rows, splits.read(folder / "none.csv"), SETTINGS)
    table = tables.join(rows, (), assignment.ledger)
    table.to_parquet(folder / "table.parquet", index=False)
    building.build(rows, (), data, folder / "shards", SPEC, buckets=2, workers=1)
    values = SETTINGS.to_dict()
    job = TrainJob(
        shards=str(folder / "shards"),
        table=str(folder / "table.parquet"),
        classes=SEVERAL,
        model=values["model"],
        train=values["train"],
        clip=SPEC.to_dict(),
        out=str(folder / "fit"),
    )
    fitted = training.run(job)
    judging = evaluation.EvalJob(
        shards=job.shards,
        table=job.table,
        models=[evaluation.EvalModel("candidate", fitted.model, history=fitted.history)],
        classes=list(SEVERAL),
        data=str(data),
        out=str(folder / "evaluation"),
        multilabel=True,
    )
    outcome = evaluation.run(judging)["candidate"]
    return SimpleNamespace(
        folder=folder, data=data, rows=rows, valid=valid, table=table, job=job, fitted=fitted, judging=judging,
        outcome=outcome, file=Path(fitted.model), recipe=outcome.recipe, test=outcome.reports["test"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def predictor(world: SimpleNamespace) -> Predictor:
    return Predictor(world.file, world.recipe, 1)


def videos(world: SimpleNamespace, split: str = "test") -> pd.DataFrame:
    return world.table[world.table["split"] == split]


# ---- data ----


def test_one_label_string_a_video_and_single_labels_counted(world: SimpleNamespace) -> None:
    assert set(world.rows["label"]) == {"bright|left", "bright|right", "dark|left", "dark|right"}
    assert world.valid.ok and world.valid.accepted == 40
    assert world.valid.counts == dict.fromkeys(SEVERAL, 20) == tables.counts(world.table, MULTI)
    single = MULTI.single(world.table["label"])
    assert (pd.crosstab(single, world.table["split"].loc[single.index].to_numpy()) > 0).all(axis=None)


# ---- training and evaluation ----


def test_both_attributes_are_learned(world: SimpleNamespace) -> None:
    """By chance a video's two labels are right together one time in four."""
    test = world.test
    assert test.multilabel and test.metrics["videos"] == 12 and test.metrics["accuracy"] > 0.5
    assert test.metrics["majority"] == 0.25 and test.metrics["macro_f1"] > 0.75
    assert test.metrics["mean_average_precision"] > 0.85
    assert set(world.fitted.history[0]) >= {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert world.fitted.history[-1]["val_accuracy"] > 0.5
    assert {part["slice"] for part in test.slices} == {"brightness", "codec", "group", "duration"}
    assert test.confusion == [] and set(test.per_class) == set(SEVERAL)


def test_the_recipe_says_what_the_logits_are(world: SimpleNamespace) -> None:
    recipe = world.recipe
    assert recipe.multilabel and recipe.schema == 2 and recipe.temperature != 1
    assert type(recipe).from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert evaluation.read(world.outcome.folder).to_dict() == world.outcome.to_dict()


def test_the_page_has_no_confusion_and_says_why(world: SimpleNamespace) -> None:
    names = {file.name for file in world.outcome.folder.iterdir()}
    assert "confusion.png" not in names and {"precision_recall.png", "reliability.png", "recall.png"} <= names
    text = (world.outcome.folder / "index.html").read_text()
    assert "There is no confusion matrix" in text and "exact match" in text and "mean average precision" in text


def evaluate(world: SimpleNamespace, tmp_path: Path, recipe: Any, table: pd.DataFrame) -> evaluation.EvalOutcome:
    table.to_parquet(tmp_path / "table.parquet", index=False)
    model = evaluation.EvalModel("m", str(world.file), recipe)
    value = {
        **vars(world.judging),
        "models": [asdict(model)],
        "table": str(tmp_path / "table.parquet"),
        "out": str(tmp_path),
    }
    evaluation.evaluate(value, lambda event: None)
    return evaluation.read(tmp_path / "m")


def test_evaluated_again_as_champion_it_is_the_same(world: SimpleNamespace, tmp_path: Path) -> None:
    again = evaluate(world, tmp_path, world.recipe, world.table).reports["test"]
    assert again.metrics["log_loss"] == pytest.approx(world.test.metrics["log_loss"], abs=1e-4)
    assert not (tmp_path / "m" / "index.html").exists()


def test_labels_that_a_champion_never_heard_of_are_left_out(world: SimpleNamespace, tmp_path: Path) -> None:
    table = world.table.copy()
    test = table.index[table["split"] == "test"]
    table.loc[test[0], "label"] = "new"
    table.loc[test[1], "label"] += "|new"
    report = evaluate(world, tmp_path, world.recipe, table).reports["test"]
    assert len(report.videos) == 11 and not any("new" in video["label"] for video in report.videos)


@pytest.mark.parametrize(
    ("label", "words"), [("dark|up", "not a class: 'up'"), ("bright|left", "of class 'dark', 'right'")]
)
def test_a_table_that_can_not_be_trained_on(world: SimpleNamespace, tmp_path: Path, label: str, words: str) -> None:
    world.table.assign(label=label).to_parquet(tmp_path / "table.parquet", index=False)
    job = TrainJob(**{**vars(world.job), "table": str(tmp_path / "table.parquet"), "out": str(tmp_path)})
    with pytest.raises(InputError, match=words):
        training.fit(job)


def test_the_gate_promotes_the_first_and_finds_itself_no_worse(world: SimpleNamespace) -> None:
    first = promotion.decide(world.test, None, SETTINGS.gate, new_data=True)
    assert first.promote and any("always answering 'bright|left'" in reason for reason in first.reasons)
    same = promotion.decide(world.test, world.test, SETTINGS.gate, new_data=True)
    assert same.promote and same.evidence["pairs"] == 12


# ---- prediction ----


def test_answers_are_sigmoids_and_golden_ones_hold(world: SimpleNamespace, predictor: Predictor) -> None:
    clips = Clips({VIDEO: np.random.default_rng(0).integers(0, 256, (5, 8, 32, 32, 3), np.uint8)})
    expected = 1 / (1 + np.exp(-predictor._call(clips) / world.recipe.temperature))
    np.testing.assert_allclose(predictor.probabilities(clips), expected, atol=1e-5)
    assert predictor.check_golden() < 1e-4
    with Smoke() as smoke:
        assert smoke(world.file, world.recipe)["difference"] < 1e-4


def test_a_recipe_that_hides_it_is_refused(world: SimpleNamespace) -> None:
    """A Sora that knows no multi-label model reads schema 1 only."""
    stored = {**world.recipe.to_dict(), "multilabel": False}
    with pytest.raises(ModelRefused, match="schema 2"):
        Predictor(world.file, type(world.recipe).from_dict(stored), 1)


def test_labels_are_those_of_half_and_more_the_likeliest_first(predictor: Predictor) -> None:
    answer = predictor.answer(np.array([[0.9, 0.1, 0.6, 0.2], [0.7, 0.1, 1.0, 0.7]]))
    assert answer.to_dict()["labels"] == ["bright", "left"]
    assert answer.label == "bright" and answer.probabilities["right"] == pytest.approx(0.45)
    none = predictor.answer(np.array([[0.1, 0.2, 0.4, 0.3]])).to_dict()
    assert none["labels"] == [] and none["label"] == "left" and "unsure" not in none


def test_files_are_answered_as_evaluated(world: SimpleNamespace) -> None:
    rows = videos(world)
    answers = predict_files([world.data / path for path in rows["path"]], world.file, world.recipe, 3)
    report = {video["path"]: video for video in world.test.videos}
    for path, answer in zip(rows["path"], answers, strict=True):
        assert MULTI.join(answer["labels"]) == report[path]["predicted"]
        np.testing.assert_allclose(list(answer["probabilities"].values()), report[path]["probabilities"], atol=1e-4)


def test_an_explanation_is_of_one_class_alone(world: SimpleNamespace, predictor: Predictor) -> None:
    from sora.media.video.transform import prepare_clips

    clip = Clips({VIDEO: prepare_clips(world.data / videos(world)["path"].iloc[0], SPEC)})
    odds = [predictor.attribution()(clip, label)[1] for label in range(4)]
    share = predictor.probabilities(clip)[0]
    np.testing.assert_allclose(odds, np.log(share / (1 - share)), atol=1e-3)


def test_it_is_served_and_answers_with_two_labels(world: SimpleNamespace, tmp_path: Path) -> None:
    registry = ModelCache(tmp_path / "registry")
    champion = ChampionRef(4, world.recipe.model_sha256, "data4", "run4", {"test/accuracy": 0.9})
    folder = registry.model_folder(champion.digest)
    folder.mkdir(parents=True)
    shutil.copy(world.file, folder / "model.keras")
    (folder / "recipe.json").write_text(json.dumps(world.recipe.to_dict()))
    registry.remember(champion)
    right = next(video for video in world.test.videos if video["predicted"] == video["label"])
    file = world.data / right["path"]

    async def story() -> None:
        async with running(tmp_path) as (client, _):
            await until(ready(client, 4))
            answer = (await send(client, file)).json()
            assert sorted(answer["labels"]) == right["label"].split("|") and len(answer["labels"]) == 2
            assert answer["label"] == answer["labels"][0] and answer["version"] == 4
            assert all(answer["probabilities"][name] >= 0.5 for name in answer["labels"])
            assert sum(answer["probabilities"].values()) > 1.2
            model = (await client.get("/v1/model")).json()
            assert model["multilabel"] is True and model["classes"] == list(SEVERAL)
            files = {"file": (file.name, file.read_bytes())}
            timed = (await client.post("/v1/predict?timeline=1&embedding=1", files=files)).json()
            assert timed["timeline"][0]["label"] == answer["label"] and timed["span"] and timed["embedding"]
            why = (await client.post("/v1/explain", files=files, data={"label": "left"})).json()
            assert why["label"] == "left" and why["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-4)
            schema = (await client.get("/openapi.json")).json()["components"]["schemas"]["PredictAnswer"]
            assert "labels" in schema["properties"] and "labels" not in schema["required"]

    asyncio.run(story())


def test_a_fold_of_a_cross_validation_is_of_several_labels_too(world: SimpleNamespace, tmp_path: Path) -> None:
    short = SETTINGS.model_copy(update={"train": SETTINGS.train.model_copy(update={"epochs": 1})})
    fold = crossval.answers(tmp_path / "fold", world.folder / "shards", world.table, short, judged="test")
    assert len(fold["videos"]) == 12 and "mean_average_precision" in fold["metrics"]
    assert {video["label"] for video in fold["videos"]} == set(world.rows["label"])


# ---- what does not go together ----


def test_the_audit_says_that_it_is_not_for_this(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("model: {head: multilabel}\nclasses: [a, b]\n")
    with pytest.raises(InputError, match="multilabel") as caught:
        audit.audit(Project(tmp_path))
    assert caught.value.fix
