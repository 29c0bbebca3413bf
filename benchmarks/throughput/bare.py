"""The learning half of the pipeline with nothing around it: splits, fit and evaluation. `pipeline` compares with it."""

from __future__ import annotations

from flows.steps import job_for
from sora.config import Project
from sora.dataset import manifest, splits, table
from sora.dataset.quality import quarantine
from sora.judging import evaluation
from sora.learning import training


def learn(project: Project) -> None:
    """Fits and evaluates on what the stages prepared, in the same child processes as the pipeline uses."""
    settings = project.settings()
    rows = manifest.read(project.manifest)
    rejected = quarantine.rejected_paths(project)
    assignment = splits.assign(rows[~rows["path"].isin(rejected)], splits.read(project.splits_file), settings)
    work = project.state / "bare"
    work.mkdir(parents=True, exist_ok=True)
    joined = table.join(rows, rejected | {item.path for item in assignment.rejections}, assignment.ledger)
    joined.to_parquet(work / "table.parquet", index=False)
    fitted = training.run(job_for(project, work / "table.parquet", settings, work / "fit"), lambda event: None)
    job = evaluation.EvalJob(
        shards=str(project.shards),
        table=str(work / "table.parquet"),
        models=[evaluation.EvalModel("candidate", fitted.model, history=fitted.history, held_out=fitted.held_out)],
        classes=list(settings.classes),
        data=str(project.data),
        out=str(work / "evaluation"),
    )
    evaluation.run(job, lambda event: None)
