"""Vectors of videos and their neighbours, of a champion in a real registry, over real shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import yaml

from sora.cli.failures import run_verb
from sora.config import Model, Project
from sora.core.errors import InputError
from sora.core.records import Recipe
from sora.dataset import manifest, splits, versioning
from sora.media.video.transform import prepare_clips
from sora.model import classifier
from sora.registry import Registry
from sora.runtime import representation
from sora.runtime.lifecycle import model_cache
from sora.runtime.predictor import ModelRefused, Predictor
from tests.clips import SMALL
from tests.registry.conftest import answers, report
from tests.servers import mlflow
from tests.videos import make_video


@pytest.fixture(scope="module")
def project(_prepared_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Eight videos in shards, dealt to splits, and a champion with random weights."""
    folder = tmp_path_factory.mktemp("representation")
    shutil.copytree(_prepared_template, folder / "project", symlinks=True)
    project = Project(folder / "project")
    with mlflow(folder / "mlflow") as (uri, _):
        params = yaml.safe_load(project.params_file.read_text())
        params["services"] = {"mlflow_tracking_uri": uri}
        project.params_file.write_text(yaml.safe_dump(params))
        rows = manifest.read(project.manifest)
        splits.append(project.splits_file, splits.assign(rows, splits.read(project.splits_file), project.settings()))
        promote(project, uri, 0)
        yield project


def promote(project: Project, uri: str, seed: int, frames: int | None = None) -> int:
    settings = project.settings()
    spec = settings.clip.model_copy(update={"frames": frames or settings.clip.frames}).spec()
    keras.utils.set_random_seed(seed)
    file = project.root.parent / "model.keras"
    classifier.build(Model(**SMALL), spec, len(settings.classes)).save(file)
    registry = Registry(uri, settings.name)
    run_id = registry.runs.start_run()
    registry.runs.log_state(run_id, versioning.state(project))
    number = registry.register(run_id, file, Recipe(spec, settings.classes), report(), "d")
    registry.runs.finish(run_id)
    registry.promote(number, cache=model_cache(project), smoke=answers, reason="test")
    registry.close()
    return number


def uri_of(project: Project) -> str:
    return str(project.settings().services.mlflow_tracking_uri)


def learned(project: Project) -> list[str]:
    ledger = splits.read(project.splits_file)
    train = set(ledger.loc[ledger["split"] == "train", "sha256"])
    rows = manifest.read(project.manifest)
    return sorted(rows.loc[rows["sha256"].isin(train), "path"])


def caches(project: Project) -> list[Path]:
    return sorted(model_cache(project).glob("*/embeddings-*.npz"))


def run(project: Project, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert run_verb([*arguments, "--project", str(project.root)]) == code
    return capsys.readouterr().out


def by_keras(project: Project, path: Path) -> np.ndarray:
    (file,) = model_cache(project).glob("*/model.keras")
    model = classifier.embedding_model(keras.saving.load_model(file, compile=False))
    mean: np.ndarray = np.asarray(model.predict_on_batch(prepare_clips(path, project.settings().clip.spec()))).mean(
        axis=0
    )
    return mean


def test_vectors_of_files(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, text = make_video(tmp_path / "neu ö.mp4", seed=77), tmp_path / "text.mp4"
    text.write_text("no video")
    found = json.loads(run(project, capsys, "embed", str(new), str(text), "--json", code=2))
    assert found[0]["path"] == str(new) and found[0]["version"] == 1
    np.testing.assert_allclose(found[0]["vector"], by_keras(project, new), atol=1e-5)
    assert found[1].keys() == {"path", "error"} and "no video format" in found[1]["error"]

    out = tmp_path / "vectors.npy"
    run(project, capsys, "embed", str(new), str(text), "--out", str(out), code=2)
    assert not out.exists()  # a row short: rows would stand for the wrong files
    run(project, capsys, "embed", str(new), str(new), "--out", str(out))
    stored = np.load(out, allow_pickle=False)
    assert stored.shape == (2, 16) and stored.dtype == np.float32
    np.testing.assert_allclose(stored[1], found[0]["vector"], atol=1e-6)


@pytest.mark.parametrize("options", [[], ["--json", "--out", "x.npy"], ["--out", "x.csv"]])
def test_one_form_of_output(project: Project, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(project, capsys, "embed", "x.mp4", *options, code=2)


def test_a_training_video_is_its_own_nearest(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    paths = learned(project)
    found = json.loads(run(project, capsys, "similar", str(project.data / paths[0]), "-n", "100", "--json"))
    assert found.keys() == {"path", "version", "neighbours"} and found["version"] == 1
    neighbours = found["neighbours"]
    assert sorted(neighbour["path"] for neighbour in neighbours) == paths, "others than the training videos"
    assert neighbours[0]["path"] == paths[0] and neighbours[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert all(neighbour["label"] == neighbour["path"].split("/")[0] for neighbour in neighbours)
    similarities = [neighbour["similarity"] for neighbour in neighbours]
    assert similarities == sorted(similarities, reverse=True)
    mine, other = (by_keras(project, project.data / neighbours[n]["path"]) for n in (0, 1))
    cosine = mine @ other / np.linalg.norm(mine) / np.linalg.norm(other)
    assert similarities[1] == pytest.approx(cosine, abs=1e-5)
    assert len(run(project, capsys, "similar", str(project.data / paths[0]), "-n", "2").splitlines()) == 2


def test_vectors_are_computed_once_and_only_what_lacks(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    paths = learned(project)
    seen: list[tuple[int, int]] = []

    def ask() -> dict[str, Any]:
        seen.clear()
        return representation.similar(project, project.data / paths[0], progress=lambda *now: seen.append(now))

    def same(found: dict[str, Any]) -> bool:
        """Batches of other sizes round differently."""
        pairs = zip(found["neighbours"], first["neighbours"], strict=True)
        return all(one == {**other, "similarity": pytest.approx(other["similarity"], abs=1e-5)} for one, other in pairs)

    shutil.rmtree(model_cache(project))
    first = ask()
    assert seen[-1] == (len(paths), len(paths))
    (cache,) = caches(project)
    whole = cache.read_bytes()
    assert same(ask()) and not seen and cache.read_bytes() == whole

    with np.load(cache, allow_pickle=False) as stored:
        np.savez(cache, **{name: stored[name][1:] for name in stored.files})  # as if a video had come since
    assert same(ask()) and seen == [(1, 1)]

    for damage in (whole[: len(whole) // 2], b"", b"no archive"):
        cache.write_bytes(damage)
        assert same(ask()) and seen[-1] == (len(paths), len(paths))
        assert "damaged" in capsys.readouterr().err
    np.savez(cache, sha256=np.array([{}], object), clip=np.zeros(1), values=np.zeros((1, 16)))  # needs pickle
    assert same(ask()) and "damaged" in capsys.readouterr().err


def test_a_quarantined_video_is_no_neighbour(project: Project) -> None:
    paths = learned(project)
    before = project.quarantine.read_text()
    try:
        project.quarantine.write_text(json.dumps([{"path": paths[0], "rule": "duplicate", "detail": ""}]))
        found = representation.similar(project, project.data / paths[0], count=100)
        assert sorted(neighbour["path"] for neighbour in found["neighbours"]) == paths[1:]
    finally:
        project.quarantine.write_text(before)


def test_a_file_that_cannot_be_used(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for name, words in (("text.mp4", "no video format"), ("absent.mp4", "not a file")):
        assert run_verb(["similar", str(tmp_path / name), "--project", str(project.root)]) == 2
        assert words in capsys.readouterr().err


def test_a_champion_of_other_clips_and_one_that_learned_what_is_gone(project: Project) -> None:
    """Its training clips are made from the videos, since the shards hold others."""
    number = promote(project, uri_of(project), 1, frames=8)
    paths = learned(project)
    found = representation.similar(project, project.data / paths[-1], count=1)
    assert found["version"] == number and found["neighbours"][0]["path"] == paths[-1]
    assert found["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    ledger = project.splits_file.read_text()
    try:
        project.splits_file.write_text(ledger.replace(",train", ",val"))
        promote(project, uri_of(project), 2)
    finally:
        project.splits_file.write_text(ledger)
    with pytest.raises(InputError, match="none of the videos"):
        representation.similar(project, project.data / paths[0])


def test_nearest_lists_a_video_once_with_its_nearest_clip() -> None:
    sha256 = np.array(["a", "a", "b", "c"])
    values = np.array([[1, 1], [1, 0], [0, 2], [0, 0]], np.float32)
    vectors = representation.Vectors(sha256, np.array([0, 1, 0, 0]), values)
    found = representation.nearest(np.array([3.0, 0.0]), vectors, 5)
    assert found == [("a", 1, 1.0), ("b", 0, 0.0), ("c", 0, 0.0)]
    assert representation.nearest(np.array([0.0, 1.0]), vectors, 1) == [("b", 0, 1.0)]


def test_a_model_without_a_representation_says_so(project: Project, tmp_path: Path) -> None:
    from hashlib import sha256

    spec = project.settings().clip.spec()
    clip = keras.Input((spec.frames, spec.height, spec.width, 3), dtype="uint8")
    pooled = keras.layers.GlobalAveragePooling3D()(keras.layers.Rescaling(1 / 255)(clip))
    file = tmp_path / "model.keras"
    keras.Model(clip, keras.layers.Dense(2)(pooled)).save(file)
    recipe = Recipe(spec, ("a", "b"), model_sha256=sha256(file.read_bytes()).hexdigest())
    predictor = Predictor(file, recipe, 3)
    with pytest.raises(ModelRefused, match="version 3 has no representation"):
        predictor.embeddings(predictor.blank(1))
