"""What the Sora of commit 503889d left on disk goes on under today's: nothing is decoded, trained or asked for again.

`tests/fixtures/make_old_project.py` made the archives with that Sora and says what is in them. A test that fails here
says what an upgrade would cost every user. Either the change is a fault, or CHANGELOG.md has to say what is redone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

from sora.config import Project
from sora.config.settings import Settings
from sora.core import provenance
from sora.core.records import Recipe
from sora.dataset import manifest as manifests
from sora.dataset import versioning
from sora.dataset.corrections import Inbox
from sora.media import pool
from sora.operations.servers import mlflow_server, prefect_server, started
from sora.store import building
from sora.store.building import BuildStats
from sora.store.shards import ShardSet
from tests.serving.standing import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FIXTURES = Path(__file__).parent / "fixtures"
SORA = [sys.executable, "-m", "sora.cli"]
STAGES = ["manifest", "validate", "shards"]
MACHINE = {"python", "packages", "git", "dvc", "ffmpeg", "sandbox", "memory", "gpu", "disk"}  # checks of no project


@dataclass(frozen=True)
class Old:
    """An old project, unpacked, and what its Sora answered."""

    project: Project
    facts: dict[str, Any]

    def sora(self, *arguments: str, code: int = 0) -> Any:
        done = subprocess.run(
            [*SORA, *arguments, "--json"], cwd=self.project.root, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, f"sora {' '.join(arguments)}: {done.returncode}\n{done.stderr[-3000:]}"
        return json.loads(done.stdout)

    def model(self, number: int) -> tuple[Path, Recipe]:
        """The file and recipe of a version, as the old registry stored them."""
        run_id = self.facts["runs"][number - 1]["run_id"]
        models = self.project.state / "mlflow" / "artifacts"
        (described,) = (file for file in models.rglob("MLmodel") if f"run_id: {run_id}" in file.read_text())
        recipe = Recipe.from_dict(json.loads((described.parent / "recipe.json").read_text()))
        return described.parent / "data" / "model.keras", recipe


def unpack(folder: Path, name: str = "old_project") -> Old:
    """Lays an archive out. The folder that it was made in is written into what an interrupted run noted: a user's
    project does not move."""
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    noted = folder / "facts.json"
    facts = json.loads(noted.read_text()) if noted.exists() else {}
    project = Project(folder / "project")
    for steps in (project.state / "work").glob("*/*.json"):
        steps.write_text(steps.read_text().replace(facts["root"], str(project.root)))
    return Old(project, facts)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Old:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return unpack(tmp_path)


def accepted(project: Project) -> int:
    rejected = json.loads(project.quarantine.read_text())
    return len(manifests.read(project.manifest)) - len(rejected)


def rebuilt(project: Project) -> BuildStats:
    """Builds the shard set as the stage does; says what that took."""
    settings = project.settings()
    return building.build(
        manifests.read(project.manifest),
        {entry["path"] for entry in json.loads(project.quarantine.read_text())},
        project.data,
        project.shards,
        settings.clip.spec(),
        buckets=settings.shards.buckets,
        workers=1,
        recorded=lambda: versioning.recorded_files(project, project.shards),
    )


def buckets(project: Project) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in project.shards.glob("bucket-*.npy")}


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any video that would be decoded fails the test."""

    def none(jobs: Iterable[pool.Job[Any]], *_: Any, **__: Any) -> Iterator[Any]:
        todo = [job.path for job in jobs]
        assert not todo, f"{len(todo)} videos would be decoded again, as {todo[0]}"
        yield from ()

    monkeypatch.setattr(pool, "each", none)


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["old_project", "old_multilabel"])
@pytest.mark.usefixtures("no_decoder")
def test_no_video_is_decoded_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    project = unpack(tmp_path, name).project
    before = manifests.read(project.manifest)
    after = manifests.build(project.data, project.settings(), previous=before, workers=1)
    pd.testing.assert_frame_equal(after, before)
    kept = buckets(project)
    assert not ShardSet.open(project.shards).has_digests
    assert rebuilt(project) == BuildStats(0, accepted(project), 0, len(kept))
    assert buckets(project) == kept
    opened = ShardSet.open(project.shards)
    assert opened.has_digests and not opened.damage()


@pytest.mark.parametrize("name", ["old_project", "old_multilabel"])
def test_the_stages_run_once_and_keep_what_was_prepared(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    project = unpack(tmp_path, name).project
    rows, quarantine, kept = manifests.read(project.manifest), project.quarantine.read_text(), buckets(project)
    assert versioning.reproduce(project) == STAGES
    pd.testing.assert_frame_equal(manifests.read(project.manifest), rows)
    assert json.loads(project.quarantine.read_text()) == json.loads(quarantine)
    assert buckets(project) == kept, "clips were written again"
    told = json.loads((project.state / "stages" / "shards.json").read_text())
    assert (told["decoded"], told["reused"]) == (0, accepted(project))
    assert versioning.reproduce(project) == []


def test_clips_that_are_not_what_the_old_dvc_recorded_are_made_anew(old: Old) -> None:
    file = sorted(old.project.shards.glob("bucket-*.npy"))[0]
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    stats = rebuilt(old.project)
    assert 0 < stats.decoded == stats.damaged < accepted(old.project)
    assert sorted(old.project.shards.glob("bucket-*.npy"))[0].read_bytes() == whole


def test_a_clone_gets_its_data_and_clips_from_the_old_remote(old: Old) -> None:
    root = old.project.root
    data = {file.relative_to(root): file.read_bytes() for file in old.project.data.rglob("*.mp4")}
    clips = {file.name: file.read_bytes() for file in old.project.shards.iterdir()}
    for place in (old.project.data, old.project.prepared, root / ".dvc" / "cache"):
        shutil.rmtree(place)
    assert versioning.ensure_data(old.project)
    versioning.pull(old.project)
    assert {file.relative_to(root): file.read_bytes() for file in old.project.data.rglob("*.mp4")} == data
    assert {file.name: file.read_bytes() for file in old.project.shards.iterdir()} == clips
    assert rebuilt(old.project).decoded == 0


# --- models ---------------------------------------------------------------------------------------------------------


def test_old_models_answer_as_they_did(old: Old) -> None:
    from sora.runtime.predictor import GOLDEN_TOLERANCE, Predictor, Smoke, predict_files

    for number in (1, 2):
        file, recipe = old.model(number)
        assert recipe.golden and recipe.model_sha256
        assert Predictor(file, recipe, number).check_golden() <= GOLDEN_TOLERANCE
    with Smoke() as smoke:
        assert smoke(file, recipe, 2)["difference"] <= GOLDEN_TOLERANCE
    (answer,) = predict_files([old.project.root / old.facts["asked"]], file, recipe, 2)
    (then,) = old.facts["answer"]
    assert answer["label"] == then["label"]
    assert answer["probabilities"] == pytest.approx(then["probabilities"], abs=GOLDEN_TOLERANCE)


def test_old_parameters_mean_what_they_meant(old: Old) -> None:
    """What the nightly compares: the old run's tags, as the old nightly computed them."""
    from flows.records import RunKey

    settings = old.project.settings()
    assert isinstance(settings, Settings)
    key = RunKey.of(settings, versioning.data_version(old.project) or "")
    assert key.data_version == old.facts["unchanged"]["data_version"]
    assert key.code_hash == provenance.LEARNING
    # The old work folder is named by the key of the interrupted run: the same, but for its epochs.
    text = old.project.params_file.read_text()
    old.project.params_file.write_text(text.replace("  epochs: 2", "  epochs: 3"))
    assert work_name(old.project) == old.facts["interrupted"]


def work_name(project: Project) -> str:
    from flows.records import RunKey

    return RunKey.of(project.settings(), versioning.data_version(project) or "").name


# --- small files ----------------------------------------------------------------------------------------------------


def test_a_waiting_correction_is_accepted(old: Old) -> None:
    settings = old.project.settings()
    inbox = Inbox(old.project, settings.serve.inbox_files, settings.serve.inbox_bytes)
    (entry,) = inbox.entries()
    assert (entry.filename, entry.label, entry.version) == ("my clip.mp4", "left", 2)
    answer = old.sora("data", "review", "--accept", entry.id)
    assert answer and not inbox.entries()
    assert (old.project.data / "left" / "corrections").is_dir()


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    """An old project whose old databases today's servers have opened."""
    folder = tmp_path_factory.mktemp("upgrade")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        old = unpack(folder)
        with started(old.project, [prefect_server(old.project), mlflow_server(old.project)], owner="test"):
            yield old


@contextmanager
def serving(project: Project, **environment: str) -> Iterator[httpx.Client]:
    """`sora serve`, once it is ready."""
    port = free_port()
    log = project.root.parent / "serve.log"
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [*SORA, "serve", "--port", str(port)],
            cwd=project.root,
            env={**os.environ, **environment},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                assert child.poll() is None, log.read_text()
                with suppress(httpx.HTTPError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.2)
            else:
                raise AssertionError(log.read_text())
            yield client
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(60)


def test_nothing_changed_is_unchanged(served: Old) -> None:
    then = served.facts["unchanged"]
    for _ in range(2):
        now = served.sora("run")
        assert now["outcome"] == "unchanged"
        assert {**now, "reasons": []} == {**then, "reasons": []}  # their words may have changed


def test_versions_are_listed_as_before(served: Old) -> None:
    assert served.sora("models") == served.facts["models"]


def test_check_and_doctor_find_nothing_wrong(served: Old) -> None:
    assert served.sora("check")["ok"]
    assert served.project.manifest.is_file()
    checks = {check["name"]: check for check in served.sora("doctor")["checks"]}
    for name, check in checks.items():
        assert check["ok"] or name in MACHINE, check


def test_predict_answers_as_before(served: Old) -> None:
    (then,) = served.facts["answer"]
    (now,) = served.sora("predict", served.facts["asked"])
    assert (now["label"], now["version"]) == (then["label"], then["version"])
    assert now["probabilities"] == pytest.approx(then["probabilities"], abs=2e-3)


def test_the_server_answers_from_the_old_cache_to_the_old_token(served: Old) -> None:
    """MLflow's address leads nowhere, as while it is down: the cache alone answers."""
    cached = {file: file.stat().st_mtime_ns for file in (served.project.state / "cache" / "models").rglob("*.keras")}
    assert cached
    answer = served.facts["served"]
    with serving(served.project, MLFLOW_TRACKING_URI="http://127.0.0.1:9") as client:
        assert client.get("/v1/model").status_code == 401
        client.headers["Authorization"] = f"Bearer {served.facts['token']['token']}"
        with (served.project.root / served.facts["asked"]).open("rb") as file:
            now = client.post("/v1/predict", files={"file": file}).raise_for_status().json()
        assert (now["label"], now["version"]) == (answer["label"], answer["version"])
        assert now["probabilities"] == pytest.approx(answer["probabilities"], abs=2e-3)
        refused = client.get("/v1/corrections")
        assert refused.status_code == 403, "an old token may not review: nobody gave it that right"
    assert {file: file.stat().st_mtime_ns for file in cached} == cached


def test_an_old_version_is_reproduced(served: Old) -> None:
    found = served.sora("reproduce", "1")
    assert found["matches"], found


def test_roll_back_and_promote(served: Old) -> None:
    assert served.sora("rollback") == {"champion": 1, "previous": 2}
    assert served.sora("promote", "2")["champion"] == 2


def test_gc_keeps_what_old_versions_need(served: Old) -> None:
    served.sora("gc", "--keep", "2")
    assert len(served.sora("models")) == 2
    assert served.sora("reproduce", "1")["matches"]


def test_an_interrupted_run_goes_on_after_its_fit(served: Old) -> None:
    work = served.project.state / "work" / served.facts["interrupted"]
    done = json.loads((work / "steps.json").read_text())
    model = Path(done["fit"]["model"]).read_bytes()
    params = served.project.params_file
    params.write_text(params.read_text().replace("  epochs: 2", "  epochs: 3"))
    kept = buckets(served.project)
    result = served.sora("run")
    assert result["outcome"] in ("promoted", "refused") and result["version"] == 3
    assert result["run_id"] == done["run"], "a new run was opened"
    assert not work.exists()
    registered = [file.read_bytes() for file in (served.project.state / "mlflow").rglob("model.keras")]
    assert model in registered, "it trained again"
    assert buckets(served.project) == kept, "clips were written again"
    assert served.sora("run")["outcome"] == "unchanged"
