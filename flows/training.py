"""Training on another machine: the `train` flow that a GPU worker runs, and the nightly's request for it.

The two machines share nothing but three servers: Prefect carries the call (run, `dvc.lock`, `params.yaml`), the DVC
remote the shards, MLflow the table of splits, the live metrics and, at the end, the model. The worker runs in its own
clone of the project, named by SORA_PROJECT; remote and credentials are that clone's. It leases a device, and beats
every few seconds, so that the nightly notices a dead worker, whatever it died of.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.client import prefect_client
from flows.records import Night
from flows.steps import job_for, live
from sora.config import Project, Settings, parse
from sora.core import provenance
from sora.core.errors import InputError, ServiceError
from sora.core.processes import Emit
from sora.core.progress import Bar, bar, say
from sora.learning.jobs import HELD_OUT_FILE, TrainResult
from sora.registry import Registry, RunsPort

HANDOVER = PurePosixPath("handover/table.parquet")  # artifacts of the run: to the worker …
HANDBACK = "handback"  # … and back: model.keras, result.json
# The part of a project's state that the worker needs. Not the split ledger: the table holds what is used of it.
STATE = ("data.dvc", "dvc.yaml", "dvc.lock", "preprocessing.lock", "params.yaml")
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 120.0  # without a beat: the worker is lost
NO_WORKER_SECONDS = 60.0  # that a pool may be without a worker: it may be restarting
OUTAGE_SECONDS = 900.0  # that the Prefect server may be away
QUEUE_SECONDS = 12 * 3600.0  # that a run may wait for a worker that is busy
_POLL_SECONDS = 2.0


# --- the worker's side ----------------------------------------------------------------------------------------------


@flow(name="train", persist_result=False)
def train(run_id: str, mlflow: str, state: dict[str, str], table_sha256: str, code: str) -> None:
    """Trains for a nightly that runs elsewhere and hands the model back as artifacts of its MLflow run.

    Args:
        run_id: the MLflow run, which the nightly opened.
        mlflow: address of the MLflow server; MLFLOW_TRACKING_URI on the worker's machine takes precedence.
        state: the texts of `STATE`.
        table_sha256: sha256 of the table of splits, which is an artifact of the run.
        code: `provenance.LEARNING` of the nightly's machine: a model of another version might not even load.
    """
    from flows.slots import device_slot

    clone = own_clone()
    if code != provenance.LEARNING:
        raise InputError(
            f"the training code in this worker ({provenance.LEARNING}) is not the nightly's ({code})",
            fix=f"bring {clone.root} to the nightly's commit, install it, and restart the worker",
        )
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise InputError(f"{run_id!r} is not the id of an MLflow run")
    settings = parse(state["params.yaml"], "the nightly's params.yaml")
    runs = Registry(os.environ.get("MLFLOW_TRACKING_URI") or mlflow, settings.name).runs
    work = clone.training / run_id
    with beating() as beat:
        beat(0, 0, "fetching shards")
        prepared = _fetch(clone, runs, run_id, state, table_sha256, work)
        beat(0, settings.train.epochs, "waiting for a device")
        with device_slot() as environment, runs.system_metrics(run_id):
            get_run_logger().info("training on CUDA_VISIBLE_DEVICES=%s", environment["CUDA_VISIBLE_DEVICES"])
            done = _fit(prepared, settings, work, live(runs, run_id, beat), environment)
        beat(done.epochs, done.epochs, "handing the model back")
        _hand_back(runs, run_id, done)
    shutil.rmtree(work, ignore_errors=True)


def own_clone() -> Project:
    """The worker's own clone of the project.

    Raises:
        InputError: SORA_PROJECT does not name one.
    """
    root = os.environ.get("SORA_PROJECT", "")
    if not root or not (Path(root) / "params.yaml").is_file():
        raise InputError(
            f"this worker knows no clone of the project (SORA_PROJECT={root!r})",
            fix="start it in a clone: SORA_PROJECT=$PWD prefect worker start --pool POOL --type process",
        )
    return Project(Path(root).resolve())


@task(name="fetch shards", cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=5)
def _fetch(
    clone: Project, runs: RunsPort, run_id: str, state: dict[str, str], table_sha256: str, work: Path
) -> Project:
    """Lays out the nightly's state in a separate folder; the clone's files stay as they are."""
    from sora.dataset import versioning

    target = work / "project"
    shutil.rmtree(target, ignore_errors=True)  # of an earlier try; the cache still has the bytes
    work.mkdir(parents=True, exist_ok=True)
    try:
        prepared = versioning.restore(clone, state, target, data=False)
    except ServiceError as error:
        raise ServiceError(
            f"the shards did not arrive: {error.message}",
            fix="give project and clone a DVC remote that both can reach (dvc remote add --default NAME URL)",
        ) from error
    if runs.fetch_file(run_id, str(HANDOVER), work / "table.parquet") != table_sha256:
        raise ServiceError("the table of splits did not arrive whole", fix="run the nightly again")
    return prepared


@task(name="fit", cache_policy=NO_CACHE, persist_result=False)
def _fit(
    prepared: Project,
    settings: Settings,
    work: Path,
    on_event: Emit,
    environment: dict[str, str],
) -> TrainResult:
    from sora.learning import training

    job = job_for(prepared, work / "table.parquet", settings, work / "fit")
    return training.run(job, on_event, log=work / "training.log", env=environment)


@task(name="hand back", cache_policy=NO_CACHE, persist_result=False, retries=4, retry_delay_seconds=15)
def _hand_back(runs: RunsPort, run_id: str, done: TrainResult) -> None:
    """Sends the model, then the result, which says that the model is complete."""
    model = Path(done.model)
    with model.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    runs.flush(run_id)
    runs.log_path(run_id, model, HANDBACK)
    if done.held_out:
        runs.log_path(run_id, Path(done.held_out), HANDBACK)
    runs.log_text(run_id, f"{HANDBACK}/result.json", json.dumps({**done.to_dict(), "model_sha256": sha256}))


@contextmanager
def beating() -> Iterator[Bar]:
    """Yields `beat(done, total, note)`, and shows its last call every `BEAT_SECONDS` as this flow run's progress.

    It is a Prefect progress artifact: people see it in the UI, and `request_training` sees whether it still changes.
    """
    from prefect.artifacts import create_progress_artifact
    from prefect.client.schemas.actions import ArtifactUpdate

    last: tuple[int, int, str] = (0, 0, "starting")
    artifact = create_progress_artifact(0.0, description="0 starting")
    assert isinstance(artifact, UUID)
    stop = threading.Event()

    def beat(done: int, total: int, note: str = "") -> None:
        nonlocal last
        last = (done, total, note)

    def work() -> None:
        number = 0
        while not stop.wait(BEAT_SECONDS):
            number += 1
            done, total, note = last
            text = f"{number} {done}/{total} {note}".rstrip() if total else f"{number} {note}"
            # A server that is away for a while must not end a training of hours.
            with suppress(Exception), prefect_client() as client:
                percent = 100.0 * done / total if total else 0.0
                client.update_artifact(artifact, ArtifactUpdate(data=percent, description=text))

    # The settings of this run (address, credentials) are context variables: a plain thread would not have them.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        stop.set()
        thread.join(10)


# --- the nightly's side ---------------------------------------------------------------------------------------------


def request_training(night: Night, run_id: str, work: Path, progress: Bar | None = None) -> TrainResult:
    """Trains in the work pool `train.work_pool` and returns the result as `training.run` would, the model beside it.

    `work` is the run's folder and holds `table.parquet`; the model arrives as `work/fit/model.keras`. When the caller
    is interrupted, the training is cancelled.

    Raises:
        ServiceError: no worker polls the pool, the worker was lost, training failed there, or the model did not
            arrive whole.
    """
    from prefect.deployments import run_deployment

    from sora.dataset import versioning

    project, settings, runs = night.project, night.settings, night.registry.runs
    pool = settings.train.work_pool
    assert pool is not None
    versioning.push(project, versioning.stages_of(project))
    table = work / "table.parquet"
    runs.log_path(run_id, table, HANDOVER.parent.as_posix())
    texts = versioning.state(project)
    run: Any = run_deployment(
        f"train/{settings.name}",
        parameters={
            "run_id": run_id,
            "mlflow": night.registry.tracking_uri,
            "state": {name: texts[name] for name in STATE if name in texts},
            "table_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
            "code": provenance.LEARNING,
        },
        timeout=0,
    )
    say(f"training in work pool {pool}: flow run {run.name}")
    try:
        with bar("Training") as update:
            _wait(run.id, pool, progress or update)
    except BaseException:
        _cancel(run.id)
        raise
    return _fetch_back(runs, run_id, work / "fit")


def _wait(flow_run: UUID, pool: str, progress: Bar) -> None:
    """Returns when the flow run completed."""
    watch = _Watch(pool)
    while True:
        try:
            look = _look(flow_run, pool)
        except ServiceError as error:
            watch.unanswered(error)
        else:
            if look.state == "COMPLETED":
                return
            if look.final:
                raise ServiceError(
                    f"training in work pool {pool} ended as {look.state.lower()}: {look.message}",
                    fix=f"read the flow run {look.name} in Prefect's UI; `sora run` tries again",
                )
            watch.answered(look, progress)
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class _Look:
    """What Prefect says of a training at one moment."""

    name: str
    state: str  # SCHEDULED, PENDING, RUNNING, COMPLETED, …
    final: bool
    message: str
    workers: int  # workers that poll the pool
    beat: str | None  # what the worker showed last


def _look(flow_run: UUID, pool: str) -> _Look:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.client.schemas.objects import WorkerStatus

    with prefect_client() as client:
        run = client.read_flow_run(flow_run)
        workers = client.read_workers_for_work_pool(pool)
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
        beats = client.read_artifacts(artifact_filter=wanted, limit=1)
    state = run.state
    return _Look(
        name=run.name,
        state=state.type.value if state else "SCHEDULED",
        final=bool(state and state.is_final()),
        message=(state.message if state else None) or "no reason given",
        workers=sum(worker.status == WorkerStatus.ONLINE for worker in workers),
        beat=beats[0].description if beats else None,
    )


class _Watch:
    """How long a training may be silent. Time without an answer from the server does not count as silence."""

    def __init__(self, pool: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._began = self._moved = self._answered = clock()
        self._last: tuple[str, str | None] = ("", None)

    def unanswered(self, error: ServiceError) -> None:
        """Raises `error` when the server has been away for `OUTAGE_SECONDS`."""
        if self._clock() - self._answered > OUTAGE_SECONDS:
            raise error
        self._last = ("", None)  # the next answer counts as a sign of life

    def answered(self, look: _Look, progress: Bar) -> None:
        """
        Raises:
            ServiceError: no worker is working on the training.
        """
        now = self._answered = self._clock()
        if (look.state, look.beat) != self._last or (look.state == "SCHEDULED" and look.workers):
            self._last, self._moved = (look.state, look.beat), now
            if shown := re.fullmatch(r"\d+ (\d+)/(\d+) ?(.*)", look.beat or ""):
                progress(int(shown[1]), int(shown[2]), shown[3])
        still = now - self._moved
        start = f"SORA_PROJECT=$PWD prefect worker start --pool {self._pool} --type process"
        if look.state == "SCHEDULED" and still > NO_WORKER_SECONDS:
            raise ServiceError(
                f"no worker polls the work pool {self._pool}",
                fix=f"on the GPU machine, in a clone of the project: {start}; or clear train.work_pool to train here",
            )
        if look.state == "SCHEDULED" and now - self._began > QUEUE_SECONDS:
            raise ServiceError(
                f"the workers of {self._pool} were busy for {QUEUE_SECONDS / 3600:.0f} hours",
                fix="see their flow runs in Prefect's UI, or start another worker",
            )
        if look.state != "SCHEDULED" and still > SILENCE_SECONDS:
            raise ServiceError(
                f"the worker of {self._pool} stopped answering: no sign of life for {still:.0f} s",
                fix="see whether that machine and its worker are up; the next run resumes at the last epoch",
            )


def _cancel(flow_run: UUID) -> None:
    """Best effort: the caller is already failing with its own error."""
    from prefect.client.schemas.objects import State, StateType

    with suppress(Exception), prefect_client() as client:
        run = client.read_flow_run(flow_run)
        if run.state is not None and not run.state.is_final():
            client.set_flow_run_state(flow_run, State(type=StateType.CANCELLING), force=True)


def _fetch_back(runs: RunsPort, run_id: str, target: Path) -> TrainResult:
    """The result of the worker, its model verified and in `target`."""
    target.mkdir(parents=True, exist_ok=True)
    runs.fetch_file(run_id, f"{HANDBACK}/result.json", target / "result.json")
    result: dict[str, Any] = json.loads((target / "result.json").read_text(encoding="utf-8"))
    model = target / "model.keras"
    arrived = runs.fetch_file(run_id, f"{HANDBACK}/{model.name}", model)
    if arrived != result.pop("model_sha256"):
        model.unlink()
        raise ServiceError("the model of the GPU worker did not arrive whole", fix="run again: it is fetched again")
    held_out = ""
    if result.get("held_out"):
        held_out = str(target / HELD_OUT_FILE)
        runs.fetch_file(run_id, f"{HANDBACK}/{HELD_OUT_FILE}", target / HELD_OUT_FILE)
    return TrainResult.from_dict({**result, "model": str(model), "held_out": held_out})
