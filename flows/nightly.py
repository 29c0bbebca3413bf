"""The nightly flow: reproduce the data, assign splits, fit, evaluate, register, judge, promote.

Prefect decides when and where, retries what retrying helps, and shows what happened. It remembers nothing: DVC knows
whether data changed, MLflow what was judged, and a run's own work folder which steps of an interrupted run are done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from flows import alerts, show
from flows.deployments import superseded
from sora.config import Project, Settings
from sora.core import provenance, redaction
from sora.core.errors import DiskFull, RunActive, ServiceError, SoraError
from sora.core.ledger import Recorded
from sora.core.processes import die_with_parent
from sora.core.progress import bar, say
from sora.operations import nightly_log
from sora.operations.lock import run_lock

NO_HISTORY = "no_history"  # tag of a run that found splits dealt before, and no run that dealt them
NO_HISTORY_WORDS = (
    "splits.csv held {rows} videos' splits before this run, and MLflow knows no run that was judged on them: version "
    "numbers begin anew, and how often this test split has judged is not known; fine in a new clone, otherwise .sora/ "
    "or its mlflow.db was lost (`sora restore` brings a backup back)"
)


def _may_pass(_task: Any, _run: Any, state: State) -> bool:
    """Retry only what may pass by itself: a server or child that failed, not a wrong input or a full disk."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, ServiceError) and not isinstance(error, DiskFull)


_step: Any = partial(task, cache_policy=NO_CACHE, persist_result=False)
_retried: Any = partial(_step, retries=2, retry_delay_seconds=5, retry_condition_fn=_may_pass)


@dataclass(frozen=True, slots=True)
class Past:
    """What was judged before this run: the last judged run's tags, its ledger, and what is not known, in words."""

    judged: dict[str, Any] | None
    recorded: Recorded | None
    doubts: tuple[str, ...]


class Work:
    """The work folder of one run: which steps are done, so that a killed run goes on where it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "steps.json"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._done: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._done = {}

    def once(self, step: str, body: Callable[[], Any]) -> Any:
        """The result of `body`, which runs only if no earlier try of this run finished it. JSON values only."""
        if step not in self._done:
            self.note(step, body())
        return self._done[step]

    def note(self, step: str, value: Any) -> None:
        self._done[step] = value
        draft = self._file.with_suffix(".partial")
        draft.write_text(json.dumps(self._done), encoding="utf-8")
        draft.replace(self._file)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def key_of(settings: Settings, data_version: str) -> dict[str, str]:
    """What decides whether anything changed since the last judged run: data, parameters, code."""
    params = json.dumps(settings.of_learning(), sort_keys=True)
    return {
        "data_version": data_version,
        "params_hash": hashlib.sha256(params.encode()).hexdigest()[:16],
        "code_hash": provenance.LEARNING,
    }


@flow(
    name="nightly",
    persist_result=False,
    validate_parameters=False,
    on_failure=[alerts.on_failure],
    on_crashed=[alerts.on_failure],
)
def nightly(project: str, force: bool = False) -> dict[str, Any] | State:
    """Runs the whole cycle once for the project folder `project`; returns what `sora run --json` prints.

    At most one at a time: where the project is locked the flow ends as Cancelled and changes nothing.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        die_with_parent()  # a worker's: no run outlives its worker and holds the project
    here = Project(Path(project))
    newer = superseded()
    if newer is not None:
        return Cancelled(message=f"a newer night is due as well: {newer} does the work of both")
    try:
        with run_lock(here):
            result = _cycle(here, here.settings(), force)
    except RunActive as error:
        return Cancelled(message=error.message)
    except Exception:
        _back_up(here)  # nights that fail are the ones after which a backup is wanted
        raise
    nightly_log.write(here, outcome=result["outcome"], run_id=result["run_id"])
    _back_up(here)
    return result


def _back_up(project: Project) -> None:
    """The backup of `backup.keep`. A failure is told (webhook, doctor, the task's state), and fails nothing else."""
    from sora.operations import backup

    try:
        settings = project.settings()
        if settings.backup.keep:
            _write_backup(project, settings)
    except Exception as error:
        reason, fix = (error.message, error.fix) if isinstance(error, SoraError) else (repr(error), "")
        say(f"the backup failed: {reason}")
        with suppress(OSError, SoraError):  # on the disk that is full
            backup.note_failure(project, reason)
        alerts.backup_failed(project, reason=reason, fix=fix)


@_step(name="back up")
def _write_backup(project: Project, settings: Settings) -> None:
    from sora.operations import backup
    from sora.operations.servers import login, mlflow_address
    from sora.registry import Registry

    registry = Registry(mlflow_address(project), settings.name, login(project, "mlflow"))
    try:
        with bar("Backing up") as update:
            made = backup.nightly(project, settings, registry, progress=update)
    finally:
        registry.close()
    for line in backup.describe(made):
        say(line)


def _cycle(project: Project, settings: Settings, force: bool) -> dict[str, Any]:
    from sora.dataset import ledger
    from sora.operations.servers import login, mlflow_address
    from sora.registry import Registry
    from sora.runtime.lifecycle import alias_lock

    registry = Registry(mlflow_address(project), settings.name, login(project, "mlflow"))
    with alias_lock(project):
        registry.recover()  # a promotion that a crash interrupted
    recorded = registry.judged_ledger()
    judged = registry.last_judged()
    found = ledger.require(project.splits_file, recorded, judged=judged is not None)
    if recorded is not None:
        ledger.remember(project, recorded)
    data_version = _version_data(project)
    key = key_of(settings, data_version)
    if judged and not force and all(judged.get(name) == value for name, value in key.items()):
        say("nothing changed since the last judged run: data, parameters and code are the same")
        result = {
            "outcome": "unchanged",
            "data_version": data_version,
            "run_id": judged["run_id"],
            "version": judged["version"],
            "reasons": ["data, parameters and code are as in the last judged run; --force trains all the same"],
            "metrics": judged["metrics"],
        }
        show.unchanged(result)
        return result

    ran = _reproduce(project)
    get_run_logger().info("DVC ran: %s", ", ".join(ran) or "nothing")
    past = Past(judged, recorded, _doubts(registry, judged, recorded, len(found)))
    return _learn(project, settings, registry, key, past, force)


def _doubts(registry: Any, judged: dict[str, Any] | None, recorded: Recorded | None, rows: int) -> tuple[str, ...]:
    """What is not known of the history although the ledger, which outlives servers, says that there is one."""
    if recorded is not None or not rows:
        return ()
    if judged is not None:
        return ("no judged run's copy of splits.csv can be read in MLflow: it was not compared with anything",)
    runs = list(registry.search_runs(limit=1000))
    if runs and not any(tag["key"] == f"sora.{NO_HISTORY}" for run in runs for tag in run["data"].get("tags", [])):
        return ()  # the first run of this history did not come to its end: it dealt these splits
    return (NO_HISTORY_WORDS.format(rows=rows),)


@_retried(name="version data")
def _version_data(project: Project) -> str:
    from sora.dataset import versioning

    versioning.ensure_data(project)
    return versioning.add(project)


@_retried(name="reproduce")
def _reproduce(project: Project) -> list[str]:
    from sora.dataset import versioning

    return versioning.reproduce(project)


@_step(name="assign splits")
def _assign(project: Project, settings: Settings, target: Path, recorded: Recorded | None) -> dict[str, Any]:
    """Joins manifest, quarantine and ledger into the table of this run."""
    from sora.dataset import ledger, manifest, splits, table
    from sora.dataset.quality import quarantine

    ledger.require(project.splits_file, recorded)  # once more: the stages before may have taken an hour

    rows = manifest.read(project.manifest)
    rejected = quarantine.rejected_paths(project)
    accepted = rows[~rows["path"].isin(rejected)]
    assignment = splits.assign(accepted, splits.read(project.splits_file), settings)
    splits.append(project.splits_file, assignment)
    rejected |= {item.path for item in assignment.rejections}
    joined = table.join(rows, rejected, assignment.ledger)
    joined.to_parquet(target, index=False)
    for note in assignment.notes:
        say(note)
    sizes = joined["split"].value_counts()
    return {
        "videos": len(rows),
        "rejected": len(rejected),
        "split_conflicts": [item.path for item in assignment.rejections],
        "counts": table.counts(joined, settings.multilabel),
        "digest": table.digest(joined),
        "test_digest": table.digest(joined, "test"),
        **{split: int(sizes.get(split, 0)) for split in ("train", "val", "test")},
    }


def _learn(
    project: Project,
    settings: Settings,
    registry: Any,
    key: dict[str, str],
    past: Past,
    force: bool,
) -> dict[str, Any]:
    from sora.dataset import ledger
    from sora.runtime.predictor import Smoke

    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    work = Work(project.work / name)
    table = work.folder / "table.parquet"
    doubts: list[str] = work.once("doubts", lambda: list(past.doubts))  # before splits are dealt: they answer it
    for doubt in doubts:
        say(f"warning: {doubt}")
    facts = _assign(project, settings, table, past.recorded)
    if work.once("splits", lambda: facts["digest"]) != facts["digest"]:
        # The ledger changed under an interrupted run: what it did was for other splits.
        work.remove()
        work = Work(work.folder)
        return _learn(project, settings, registry, key, past, force)

    run_id = work.once("run", lambda: _open_run(project, settings, registry, key, facts))
    if doubts:
        registry.set_tags(run_id, {NO_HISTORY: "true"})
    say(f"splits: {facts['train']} train, {facts['val']} val, {facts['test']} test; {facts['rejected']} quarantined")
    try:
        registry.resume(run_id)
        fitted = work.once("fit", lambda: _fit(project, settings, registry, run_id, work.folder, facts))
        with Smoke() as smoke:  # its child does its imports while the candidate is evaluated
            outcome = _evaluate(project, settings, registry, run_id, work, fitted, table)
            version = work.once(
                "register",
                lambda: _register(registry, run_id, fitted, outcome["candidate"], key, facts),
            )
            decision = work.once(
                "judge",
                lambda: _judge(settings, registry, outcome, facts, key, past.judged, force, version),
            )
            result = {
                "outcome": "refused",
                "data_version": key["data_version"],
                "run_id": run_id,
                "version": version,
                "reasons": [*decision["reasons"], *doubts],
                "metrics": {f"test/{n}": v for n, v in outcome["candidate"]["reports"]["test"]["metrics"].items()},
            }
            if decision["promote"]:
                failure = _promote(project, registry, version, result["reasons"], smoke)
                if failure is None:
                    result["outcome"] = "promoted"
                else:
                    result["reasons"] = [*result["reasons"], failure]
        registry.set_decision(version, result["outcome"], result["reasons"])
        registry.finish(run_id, "FINISHED")
    except KeyboardInterrupt:
        registry.finish(run_id, "KILLED")
        raise
    except Exception:
        registry.finish(run_id, "FAILED")
        raise
    project.reference.write_text(json.dumps(facts["counts"]), encoding="utf-8")
    with suppress(ServiceError):  # a copy for `sora check` and `sora doctor`; the decision stands without it
        if (recorded := registry.judged_ledger()) is not None:
            ledger.remember(project, recorded)
    result["pages"] = show.report(project, registry, result, outcome, facts)
    work.remove()
    return result


@_retried(name="open MLflow run")
def _open_run(project: Project, settings: Settings, registry: Any, key: dict[str, str], facts: dict[str, Any]) -> str:
    from sora.dataset import versioning

    state = versioning.state(project)
    tags = {**key, "splits": facts["digest"], "test_digest": facts["test_digest"]}
    if state["git_commit"]:
        tags["git_commit"] = state["git_commit"]
    run_id = registry.start_run(params=redaction.params(settings.to_dict()), tags=tags)
    registry.log_dataset(run_id, data_version=key["data_version"], counts=facts["counts"], source=str(project.data))
    registry.log_state(run_id, state)
    registry.log_metrics(
        run_id, {f"data/{name}": facts[name] for name in ("videos", "rejected", "train", "val", "test")}, step=0
    )
    for place, target in ((project.docs, "data_docs"), (project.validation, "validation")):
        if place.exists():
            registry.log_path(run_id, place, target)
    return run_id


@_step(name="fit", retries=1, retry_delay_seconds=5, retry_condition_fn=_may_pass)
def _fit(
    project: Project, settings: Settings, registry: Any, run_id: str, work: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Trains here, or in the work pool of `train.work_pool`. A retry resumes at the last finished epoch."""
    if settings.train.work_pool:
        from flows.training import request_training

        return request_training(project, settings, registry, run_id, work)
    from flows.slots import device_slot
    from flows.training import job_for
    from sora.learning import training

    job = job_for(project.shards, work / "table.parquet", settings, work / "fit")
    with device_slot() as environment, bar("Training") as update, registry.system_metrics(run_id):
        done = training.run(job, show.live(registry, run_id, update), log=project.log("training"), env=environment)
    return done.to_dict()


@_step(name="evaluate")
def _evaluate(
    project: Project,
    settings: Settings,
    registry: Any,
    run_id: str,
    work: Work,
    fitted: dict[str, Any],
    table: Path,
) -> dict[str, Any]:
    """Candidate and champion on the same current splits, in one child process."""
    from sora.judging import evaluation

    champion = registry.champion()
    done = work.once("evaluated", lambda: None) or {}
    if done.get("champion_version") == champion and (work.folder / "evaluation.json").exists():
        return json.loads((work.folder / "evaluation.json").read_text(encoding="utf-8"))
    models = [evaluation.EvalModel("candidate", fitted["model"], history=fitted["history"])]
    if champion is not None:
        file, recipe = registry.fetch(champion, project.cache.models)
        models.append(evaluation.EvalModel("champion", str(file), recipe))
    job = evaluation.EvalJob(
        shards=str(project.shards),
        table=str(table),
        models=models,
        classes=list(settings.classes),
        data=str(project.data),
        bounds=settings.validate_.model_dump(),
        out=str(work.folder / "evaluation"),
        views=list(settings.eval.views),
        unsure_precision=settings.unsure.precision,
        multilabel=settings.multilabel,
    )
    with bar("Evaluating") as update:
        found = evaluation.run(job, show.evaluating(update), log=project.log("evaluation"))
    outcome: dict[str, Any] = {name: value.to_dict() for name, value in found.items()}
    outcome["champion_version"] = champion
    (work.folder / "evaluation.json").write_text(json.dumps(outcome), encoding="utf-8")
    work.note("evaluated", {"champion_version": champion})
    return outcome


@_retried(name="register")
def _register(
    registry: Any,
    run_id: str,
    fitted: dict[str, Any],
    candidate: dict[str, Any],
    key: dict[str, str],
    facts: dict[str, Any],
) -> int:
    from sora.core.records import EvalReport, Recipe

    registry.log_path(run_id, Path(candidate["folder"]), "evaluation")
    for split, report in candidate["reports"].items():
        registry.log_metrics(run_id, {f"{split}/{n}": v for n, v in report["metrics"].items()}, step=0)
    return registry.register(
        run_id,
        Path(fitted["model"]),
        Recipe.from_dict(candidate["recipe"]),
        {split: EvalReport.from_dict(report) for split, report in candidate["reports"].items()},
        key["data_version"],
    )


@_step(name="judge")
def _judge(
    settings: Settings,
    registry: Any,
    outcome: dict[str, Any],
    facts: dict[str, Any],
    key: dict[str, str],
    judged: dict[str, Any] | None,
    force: bool,
    version: int,
) -> dict[str, Any]:
    from sora.core.records import EvalReport
    from sora.judging import gate as promotion

    test = {
        name: EvalReport.from_dict(value["reports"]["test"])
        for name, value in outcome.items()
        if name in ("candidate", "champion")
    }
    decision = promotion.decide(
        test["candidate"],
        test.get("champion"),
        settings.gate,
        new_data=judged is None or judged.get("data_version") != key["data_version"],
        times_judged=registry.times_judged(facts["test_digest"]),
        forced=force,
        rolled_back=registry.was_rolled_back(version),
    )
    return {"promote": decision.promote, "reasons": list(decision.reasons), "evidence": decision.evidence}


@_step(name="promote")
def _promote(project: Project, registry: Any, version: int, reasons: list[str], smoke: Any) -> str | None:
    """Moves the alias; a failed smoke prediction puts the old champion back. Returns the failure in words, or None."""
    from sora.core.errors import PromotionFailed
    from sora.runtime.lifecycle import alias_lock, model_cache

    try:
        with alias_lock(project):
            registry.promote(version, cache=model_cache(project), smoke=smoke, reason="; ".join(reasons), by="nightly")
    except PromotionFailed as error:
        return error.message
    return None
