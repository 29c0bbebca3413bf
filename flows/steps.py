"""The steps of a night as plain functions: data, splits, run, training, evaluation, registration, verdict, promotion.

Nothing here knows Prefect. `flows.cycle` puts the steps in order, and `flows.nightly` makes tasks of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.records import Case, Evaluation, Night, NightResult, SplitFacts
from flows.work import EVALUATED, Evaluated, Work
from sora.config import Project, Settings
from sora.core import redaction
from sora.core.errors import PromotionFailed
from sora.core.ledger import Recorded
from sora.core.processes import Emit, Event
from sora.core.progress import Bar, bar, say
from sora.core.records import Decision, Tried
from sora.learning.jobs import TrainJob, TrainResult
from sora.registry import Registry, RunsPort, Smoke

if TYPE_CHECKING:
    from sora.judging.evaluation import EvalJob


def open_registry(project: Project, settings: Settings) -> Registry:
    """The registry of the MLflow server that is up."""
    from sora.operations.servers import login, mlflow_address

    return Registry(mlflow_address(project), settings.name, login(project, "mlflow"))


def back_up(project: Project, settings: Settings) -> None:
    """Writes the backup of `backup.keep` and prints the result."""
    from sora.operations import backup

    registry = open_registry(project, settings)
    try:
        with bar("Backing up") as update:
            made = backup.nightly(project, settings, registry, progress=update)
    finally:
        registry.close()
    for line in backup.describe(made):
        say(line)


def version_data(project: Project) -> str:
    """Records the bytes of `data/` in DVC; returns the data version."""
    from sora.dataset import versioning

    versioning.ensure_data(project)
    return versioning.add(project)


def reproduce(project: Project) -> list[str]:
    """Brings `prepared/` up to date; returns the names of the stages that ran."""
    from sora.dataset import versioning

    return versioning.reproduce(project)


def assign(night: Night, target: Path, recorded: Recorded | None) -> SplitFacts:
    """Joins manifest, quarantine and split ledger into the table of this run, the Parquet file `target`.

    Raises:
        SplitsLost: the ledger lacks rows of `recorded`.
    """
    from sora.dataset import ledger, manifest, splits, table
    from sora.dataset.quality import quarantine

    project, settings = night.project, night.settings
    ledger.require(project.splits_file, recorded)  # again: the earlier stages may have taken an hour
    rows = manifest.read(project.manifest)
    rejected = quarantine.rejected_paths(project)
    accepted = rows[~rows["path"].isin(rejected)]
    assignment = splits.assign(accepted, splits.read(project.splits_file), settings)
    splits.append(project.splits_file, assignment)
    rejected |= {item.path for item in assignment.rejections}
    joined = table.join(rows, rejected, assignment.ledger, settings.validate_.unit_bits)
    joined.to_parquet(target, index=False)
    for note in assignment.notes:
        say(note)
    sizes = joined["split"].value_counts()
    return SplitFacts(
        videos=len(rows),
        rejected=len(rejected),
        train=int(sizes.get("train", 0)),
        val=int(sizes.get("val", 0)),
        test=int(sizes.get("test", 0)),
        counts=table.counts(joined, settings.task),
        digest=table.digest(joined),
        test_digest=table.digest(joined, "test"),
    )


def open_run(night: Night, case: Case) -> str:
    """Starts the MLflow run with all that is known before training; returns its id."""
    from sora.dataset import versioning

    project, runs, facts = night.project, night.registry.runs, case.facts
    state = versioning.state(project)
    tags = {**case.key.to_tags(), "splits": facts.digest, "test_digest": facts.test_digest}
    if state["git_commit"]:
        tags["git_commit"] = state["git_commit"]
    run_id = runs.start_run(params=redaction.params(night.settings.to_dict()), tags=tags)
    runs.log_dataset(run_id, data_version=case.key.data_version, counts=facts.counts, source=str(project.data))
    runs.log_state(run_id, state)
    runs.log_metrics(run_id, facts.metrics(), step=0)
    for place, target in ((project.docs, "data_docs"), (project.validation, "validation")):
        if place.exists():
            runs.log_path(run_id, place, target)
    return run_id


def job_for(prepared: Project, table: Path, settings: Settings, out: Path) -> TrainJob:
    """The training job for a project's clips and table; `out` keeps what a resumed training continues from."""
    values = settings.to_dict()
    return TrainJob(
        shards=str(prepared.shards),
        features=str(prepared.features),
        table=str(table),
        classes=list(settings.classes),
        model=values["model"],
        train=values["train"],
        clip=settings.clip.spec().to_dict(),
        out=str(out),
    )


def fit(night: Night, run_id: str, work: Work, environment: Mapping[str, str] | None = None) -> TrainResult:
    """Trains on this machine; `environment` is added to the child's (CUDA_VISIBLE_DEVICES).

    The same call again resumes after the last finished epoch.
    """
    from sora.learning import training

    job = job_for(night.project, work.table, night.settings, work.fit)
    log = night.project.log("training")
    with bar("Training") as update, night.registry.runs.system_metrics(run_id):
        return training.run(job, live(night.registry.runs, run_id, update), log=log, env=dict(environment or {}))


def evaluate(night: Night, work: Work, fitted: TrainResult) -> Evaluation:
    """Evaluates candidate and champion on the same current splits, in one child process.

    An earlier try's evaluation counts as long as the champion is still the same.
    """
    from sora.judging import evaluation

    champion = night.registry.champion()
    if (known := _evaluated(work, champion)) is not None:
        return known
    log = night.project.log("evaluation")
    with bar("Evaluating") as update:
        outcomes = evaluation.run(_evaluation_job(night, work, fitted, champion), evaluating(update), log=log)
    result = Evaluation(outcomes["candidate"], outcomes.get("champion"), champion)
    work.evaluation.with_suffix(".json").write_text(json.dumps(result.to_dict()), encoding="utf-8")
    work.note(EVALUATED, Evaluated(champion))
    return result


def _evaluated(work: Work, champion: int | None) -> Evaluation | None:
    if work.get(EVALUATED) != Evaluated(champion):
        return None
    try:
        stored = json.loads(work.evaluation.with_suffix(".json").read_text(encoding="utf-8"))
        return Evaluation.from_dict(stored)
    except (OSError, KeyError, TypeError, ValueError):
        return None  # it is evaluated again


def _evaluation_job(night: Night, work: Work, fitted: TrainResult, champion: int | None) -> EvalJob:
    from sora.judging.evaluation import EvalJob, EvalModel
    from sora.runtime.lifecycle import model_cache

    project, settings = night.project, night.settings
    models = [
        EvalModel("candidate", fitted.model, history=fitted.history, tried=fitted.tried, held_out=fitted.held_out)
    ]
    if champion is not None:
        file, recipe = night.registry.fetch(champion, model_cache(project))
        models.append(EvalModel("champion", str(file), recipe))
    return EvalJob(
        shards=str(project.shards),
        table=str(work.table),
        models=models,
        classes=list(settings.classes),
        data=str(project.data),
        bounds=settings.validate_.model_dump(),
        out=str(work.evaluation),
        views=list(settings.eval.views),
        unsure_precision=settings.unsure.precision,
        multilabel=settings.task.multilabel,
    )


def register(night: Night, case: Case, run_id: str, fitted: TrainResult, evaluation: Evaluation) -> int:
    """Stores the evaluation with the run and registers the model; returns its version."""
    candidate, registry = evaluation.candidate, night.registry
    registry.runs.log_path(run_id, candidate.folder, "evaluation")
    registry.runs.log_candidates(run_id, fitted.tried)
    for split, report in candidate.reports.items():
        registry.runs.log_metrics(run_id, {f"{split}/{name}": v for name, v in report.metrics.items()}, step=0)
    return registry.register(run_id, Path(fitted.model), candidate.recipe, candidate.reports, case.key.data_version)


def judge(night: Night, case: Case, evaluation: Evaluation, version: int) -> Decision:
    """Lets the gate decide."""
    from sora.judging import gate

    champion = evaluation.champion
    return gate.decide(
        evaluation.candidate.reports["test"],
        champion.reports["test"] if champion else None,
        night.settings.gate,
        new_data=case.new_data,
        times_judged=night.registry.times_judged(case.facts.test_digest),
        forced=case.forced,
        rolled_back=night.registry.was_rolled_back(version),
    )


def in_words(tried: Sequence[Tried]) -> tuple[str, ...]:
    """What a search compared, as one of the reasons; none where nothing was."""
    if not tried:
        return ()
    figures = ", ".join(
        f"{one.name} {one.accuracy:.3f} ({one.low:.3f} to {one.high:.3f}; log-loss {one.log_loss:.3f})"
        for one in sorted(tried, key=lambda one: one.log_loss)
    )
    taken = next(one.name for one in tried if one.chosen)
    return (f"{taken} was taken by cross-validation on {tried[0].videos} videos of training and validation: {figures}",)


def promote(night: Night, version: int, reasons: Sequence[str], smoke: Smoke) -> str | None:
    """Moves the alias; a failed smoke prediction restores the old champion. Returns the failure in words, or None."""
    from sora.runtime.lifecycle import alias_lock, model_cache

    cache = model_cache(night.project)
    try:
        with alias_lock(night.project):
            night.registry.promote(version, cache=cache, smoke=smoke, reason="; ".join(reasons), by="nightly")
    except PromotionFailed as error:
        return error.message
    return None


def publish(night: Night, case: Case, result: NightResult, evaluation: Evaluation) -> tuple[str, ...]:
    """Keeps the evaluation page, which needs no server. Returns the addresses of all pages of the run."""
    pages = [f"MLflow run: {night.registry.runs.run_page(result.run_id)}"]
    if (night.project.docs_page).exists():
        pages.append(f"Data Docs: {night.project.docs_page}")
    kept = night.project.last_evaluation
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(evaluation.candidate.folder, kept)
    return (*pages, f"evaluation: {kept / 'index.html'}")


def live(runs: RunsPort, run_id: str, update: Bar) -> Emit:
    """For `training.run`: a bar over all epochs, and each epoch's metrics to MLflow as they arrive.

    A search has folds of candidates instead.
    """

    def on_event(event: Event) -> None:
        if event["event"] == "search":
            update(event["done"], event["total"], f"trying {event['candidate']}")
        if event["event"] == "epoch":
            metrics = event["metrics"]
            runs.log_metrics(
                run_id,
                {**metrics, "seconds": event["seconds"], "clips_per_second": event["clips_per_second"]},
                step=event["epoch"],
            )
            known = [(name, metrics[name]) for name in ("loss", "val_loss", "val_accuracy") if name in metrics]
            update(event["epoch"], event["epochs"], "  ".join(f"{name} {value:.3f}" for name, value in known))

    return on_event


def evaluating(update: Bar) -> Emit:
    """For `evaluation.run`: a bar over the videos of each model."""

    def on_event(event: Event) -> None:
        if "done" in event and "total" in event:
            update(event["done"], event["total"], str(event.get("name", "")))

    return on_event
