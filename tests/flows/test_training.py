"""Training on another machine: a process worker with its own clone, home and Prefect home; only servers are shared."""

from __future__ import annotations

import contextvars
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows import deployments, training
from flows.records import Night
from flows.training import _Look, _Watch
from sora.config import Project
from sora.config.credentials import secret
from sora.core.errors import ServiceError
from sora.core.processes import quiet_environment
from sora.core.progress import bar
from sora.learning.jobs import TrainResult
from sora.registry import Registry
from tests.videos import make_folder

POOL = "gpu-test"
PARAMS = """
name: remote
classes: [jump, wave]
validate: {min_videos_per_class: 2, near_duplicate_bits: 0, max_rejected: 1.0}
split: {group_pattern: null}
clip: {frames: 4, height: 16, width: 16}
shards: {buckets: 2, workers: 1}
model: {low_filters: [16], high_filters: [16], key_frames: 2, embedding: 8}
train: {epochs: 2, batch: 4, work_pool: gpu-test}
"""


def _git(where: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _dvc(where: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=where, env=quiet_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass
class Site:
    """The nightly's machine, and the clone on the worker's."""

    project: Project
    clone: Path
    registry: Registry

    def night(self) -> Night:
        return Night(self.project, self.project.settings(), self.registry)

    def run(self, work: Path) -> tuple[str, Path]:
        """A new MLflow run and its work folder with a table of splits."""
        from sora.dataset import manifest

        rows = manifest.read(self.project.manifest).sort_values("sha256", ignore_index=True)
        rows["split"] = ["val" if index % 4 == 3 else "train" for index in range(len(rows))]
        work.mkdir(parents=True)
        rows[["sha256", "path", "label", "split"]].to_parquet(work / "table.parquet", index=False)
        return self.registry.runs.start_run(tags={}), work

    def worker(self, home: Path) -> subprocess.Popen[bytes]:
        """As someone would start it on the GPU machine."""
        home.mkdir(parents=True, exist_ok=True)
        environment = quiet_environment(
            HOME=str(home),
            PREFECT_HOME=str(home / "prefect"),
            SORA_PROJECT=str(self.clone),
            MLFLOW_TRACKING_USERNAME=secret(self.project).user,
            MLFLOW_TRACKING_PASSWORD=secret(self.project).password,
            CUDA_VISIBLE_DEVICES="-1",
            PREFECT_WORKER_QUERY_SECONDS="1",
            PREFECT_WORKER_HEARTBEAT_SECONDS="5",
        )
        with (home / "worker.log").open("ab") as log:
            command = ["worker", "start", "--pool", POOL, "--type", "process", "--name", home.name]
            return subprocess.Popen(
                [sys.executable, "-m", "prefect", *command],
                cwd=home,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def _stop(worker: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    """The worker and every process that it started."""
    import psutil

    family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    for process in family:
        try:
            process.send_signal(how)
        except psutil.NoSuchProcess:
            continue
    try:
        worker.wait(20)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@pytest.fixture(scope="module")
def site(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from sora.dataset import versioning
    from sora.operations import project as projects
    from sora.operations.servers import servers

    place = tmp_path_factory.mktemp("site")
    footage = make_folder(place / "footage", groups=6, frames=12, size=(48, 32))
    projects.init(place / "host", footage)
    project = Project(place / "host")
    project.params_file.write_text(PARAMS)
    _dvc(project.root, "remote", "add", "--default", "team", str(place / "bucket"))  # stands for s3://…
    versioning.add(project)
    versioning.reproduce(project)
    _git(project.root, "add", "--all")
    _git(project.root, "commit", "-qm", "a team's project")
    _git(place, "clone", "-q", str(project.root), str(place / "clone"))
    deployments.register(project, prefect_server)
    with servers(project, prefect=False) as addresses:
        yield Site(project, place / "clone", Registry(str(addresses.mlflow_tracking_uri), "remote", secret(project)))


@pytest.mark.slow
def test_a_worker_with_its_own_clone_trains_and_hands_the_model_back(site: Site, tmp_path: Path) -> None:
    run_id, work = site.run(tmp_path / "work")
    notes: list[tuple[int, int, str]] = []
    worker = site.worker(tmp_path / "gpu1")
    try:
        result = training.request_training(
            site.night(),
            run_id,
            work,
            lambda done, total, note="": notes.append((done, total, note)),
        )
    except ServiceError:
        print((tmp_path / "gpu1" / "worker.log").read_text()[-4000:])
        raise
    finally:
        _stop(worker)
    model = Path(result.model)
    assert model == work / "fit" / "model.keras"
    assert model.read_bytes()[:2] == b"PK"
    assert result.epochs == 2 and len(result.history) == 2
    # What the nightly saw while it went, live in MLflow
    answer = site.registry._rest.get("metrics/get-history", run_id=run_id, metric_key="val_loss")
    assert [metric["step"] for metric in answer["metrics"]] == [1, 2]
    # The clone: nothing of it changed, its data was never needed, nothing is left behind
    assert _git(site.clone, "status", "--porcelain") == ""
    assert not (site.clone / "data").exists() and not (site.clone / "prepared").exists()
    assert not (site.clone / ".sora" / "training" / run_id).exists()
    assert not list((site.project.root / ".sora").glob("training"))


@pytest.mark.slow
def test_without_a_worker_the_error_says_how_to_start_one_and_nothing_stays_queued(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client

    monkeypatch.setattr(training, "_look", _without_workers(training._look))
    monkeypatch.setattr(training, "NO_WORKER_SECONDS", 3.0)
    run_id, work = site.run(tmp_path / "work")
    with pytest.raises(ServiceError, match=f"no worker polls the work pool {POOL}") as caught:
        training.request_training(site.night(), run_id, work)
    assert f"prefect worker start --pool {POOL}" in caught.value.fix
    with get_client(sync_client=True) as client:
        states = {run.created: run.state for run in client.read_flow_runs() if run.created is not None}
    newest = states[max(states)]
    assert newest is not None
    assert newest.is_cancelled() or newest.type.value == "CANCELLING"


def _without_workers(look: Any) -> Any:
    """The server takes half a minute to notice that the last test's worker left; its answer is brought forward."""
    from dataclasses import replace

    return lambda flow_run, pool: replace(look(flow_run, pool), workers=0)


@pytest.mark.slow
def test_a_model_that_arrives_damaged_is_refused(site: Site, tmp_path: Path) -> None:
    run_id = site.registry.runs.start_run(tags={})
    model = tmp_path / "model.keras"
    model.write_bytes(b"half a model")
    site.registry.runs.log_path(run_id, model, training.HANDBACK)
    whole = hashlib.sha256(b"a whole model").hexdigest()
    result = {"model": "/theirs/model.keras", "history": [], "model_sha256": whole}
    site.registry.runs.log_text(run_id, f"{training.HANDBACK}/result.json", json.dumps(result))
    with pytest.raises(ServiceError, match="did not arrive whole"):
        training._fetch_back(site.registry.runs, run_id, tmp_path / "fit")
    assert not (tmp_path / "fit" / "model.keras").exists()


@pytest.mark.slow
def test_a_killed_worker_is_noticed_and_a_second_one_goes_on_where_it_was(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of worker, flow and training at once, as a power cut would; then another worker of the same clone."""
    monkeypatch.setattr(training, "SILENCE_SECONDS", 30.0)
    text = site.project.params_file.read_text()
    run_id, work = site.run(tmp_path / "work")
    checkpoint = site.clone / ".sora" / "training" / run_id / "fit" / "checkpoint.npz"
    answers: list[TrainResult | ServiceError] = []

    def ask() -> None:
        try:
            answers.append(training.request_training(site.night(), run_id, work))
        except ServiceError as error:
            answers.append(error)

    worker = site.worker(tmp_path / "gpu2")
    try:
        site.project.params_file.write_text(text.replace("epochs: 2", "epochs: 150, patience: 150"))
        asking = threading.Thread(target=contextvars.copy_context().run, args=(ask,))
        asking.start()
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert time.monotonic() < deadline, (tmp_path / "gpu2" / "worker.log").read_text()[-3000:]
            time.sleep(0.02)
        _stop(worker, signal.SIGKILL)
        asking.join(90)
        assert isinstance(answers[0], ServiceError) and "stopped answering" in answers[0].message
        assert checkpoint.exists()

        worker = site.worker(tmp_path / "gpu3")
        ask()
        result = answers[1]
        assert isinstance(result, TrainResult), (result, (tmp_path / "gpu3" / "worker.log").read_text()[-3000:])
        assert result.epochs == 150 and 1 <= result.resumed_from < 150
        assert [epoch["epoch"] for epoch in result.history] == list(range(1, 151))
    finally:
        site.project.params_file.write_text(text)
        _stop(worker, signal.SIGKILL) if worker.poll() is None else None


# --- patience, without waiting --------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _look(state: str = "RUNNING", *, workers: int = 1, beat: str | None = None) -> _Look:
    return _Look("run", state, final=False, message="", workers=workers, beat=beat)


@pytest.fixture
def watch() -> Iterator[tuple[_Watch, Clock, Any]]:
    clock = Clock()
    with bar("t") as update:
        yield _Watch(POOL, clock), clock, update


def test_a_busy_worker_is_waited_for_and_an_absent_one_is_not(watch: tuple[_Watch, Clock, Any]) -> None:
    it, clock, progress = watch
    for clock.now in range(0, 3600, 30):
        it.answered(_look("SCHEDULED", workers=1), progress)
    for clock.now in range(3600, 3620, 2):  # restarting
        it.answered(_look("SCHEDULED", workers=0), progress)
    it.answered(_look("SCHEDULED", workers=1), progress)
    clock.now += training.NO_WORKER_SECONDS + 1
    with pytest.raises(ServiceError, match="no worker polls"):
        it.answered(_look("SCHEDULED", workers=0), progress)


def test_a_queue_that_never_moves_ends(watch: tuple[_Watch, Clock, Any]) -> None:
    it, clock, progress = watch
    clock.now = training.QUEUE_SECONDS + 1
    with pytest.raises(ServiceError, match="were busy for 12 hours"):
        it.answered(_look("SCHEDULED", workers=3), progress)


def test_a_training_lives_as_long_as_it_beats(watch: tuple[_Watch, Clock, Any]) -> None:
    it, clock, progress = watch
    it.answered(_look("SCHEDULED"), progress)
    for number in range(100):
        clock.now += 60
        it.answered(_look(beat=f"{number} 1/9 loss 0.5"), progress)
    clock.now += training.SILENCE_SECONDS + 1
    with pytest.raises(ServiceError, match="stopped answering"):
        it.answered(_look(beat="99 1/9 loss 0.5"), progress)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_worker_that_took_it_and_died_at_once_is_noticed(watch: tuple[_Watch, Clock, Any], state: str) -> None:
    it, clock, progress = watch
    it.answered(_look(state), progress)
    clock.now += training.SILENCE_SECONDS + 1
    with pytest.raises(ServiceError, match="stopped answering"):
        it.answered(_look(state), progress)


def test_a_server_that_is_away_loses_nobody_unless_it_stays_away(watch: tuple[_Watch, Clock, Any]) -> None:
    it, clock, progress = watch
    it.answered(_look(beat="1 1/9"), progress)
    for _ in range(8):
        clock.now += 100
        it.unanswered(ServiceError("away"))
    it.answered(_look(beat="1 1/9"), progress)  # the same beat as before: the worker could not reach the server either
    clock.now += training.OUTAGE_SECONDS + 1
    with pytest.raises(ServiceError, match="away"):
        it.unanswered(ServiceError("away"))


def test_a_worker_without_a_clone_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sora.core.errors import InputError

    for value in ("", str(tmp_path), str(tmp_path / "nothing")):
        monkeypatch.setenv("SORA_PROJECT", value)
        with pytest.raises(InputError, match="knows no clone"):
            training.own_clone()
    (tmp_path / "params.yaml").touch()
    monkeypatch.setenv("SORA_PROJECT", str(tmp_path))
    assert training.own_clone() == Project(tmp_path)
