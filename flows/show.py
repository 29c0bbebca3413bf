"""What Prefect's UI shows of a night: artifacts of its result."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext

from flows import steps
from flows.records import Case, Evaluation, Night, NightResult
from sora.core.records import EvalReport

_METRICS = ("accuracy", "macro_f1", "ece", "log_loss", "latency_ms")  # in the table, if a report has them


def unchanged(result: NightResult) -> None:
    """An artifact for a night that had nothing to do."""
    if FlowRunContext.get():
        create_markdown_artifact(
            f"**unchanged**: {'; '.join(result.reasons)} (version {result.version})",
            key="nightly",
            description="What the nightly did",
        )


def report(night: Night, case: Case, result: NightResult, evaluation: Evaluation) -> tuple[str, ...]:
    """Artifacts for a judged run. Returns what `steps.publish` does: the addresses of the pages that show it."""
    candidate = evaluation.candidate.reports["test"]
    champion = evaluation.champion.reports["test"] if evaluation.champion else None
    if FlowRunContext.get():
        create_markdown_artifact(_markdown(case, result, candidate, champion), key="nightly", description="The result")
        create_table_artifact(_recalls(candidate), key="recall", description="Recall of each class on the test split")
        if candidate.confusion:  # a multi-label model has none
            create_table_artifact(_confusion(candidate), key="confusion", description="True class by predicted class")
        page = night.registry.runs.run_page(result.run_id)
        create_link_artifact(page, key="mlflow-run", link_text="the run in MLflow", description="Metrics and plots")
    return steps.publish(night, case, result, evaluation)


def _markdown(case: Case, result: NightResult, candidate: EvalReport, champion: EvalReport | None) -> str:
    rows = ["| metric (test split) | candidate | champion |", "|---|---|---|"]
    theirs = champion.metrics if champion else {}
    for name in _METRICS:
        if name in candidate.metrics:
            other = f"{theirs[name]:.3f}" if name in theirs else "–"
            rows.append(f"| {name} | {candidate.metrics[name]:.3f} | {other} |")
    reasons = "\n".join(f"- {reason}" for reason in result.reasons)
    facts = case.facts
    return (
        f"# Version {result.version}: {result.outcome}\n\n{reasons}\n\n" + "\n".join(rows) + "\n\n"
        f"data version `{result.data_version}`: {facts.videos} videos, {facts.rejected} quarantined; "
        f"{facts.train} train, {facts.val} val, {facts.test} test\n"
    )


def _recalls(report: EvalReport) -> list[dict[str, Any]]:
    return [
        {"class": name, **{k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}}
        for name, values in report.per_class.items()
    ]


def _confusion(report: EvalReport) -> list[dict[str, Any]]:
    return [
        {"true": name, **dict(zip(report.classes, row, strict=True))}
        for name, row in zip(report.classes, report.confusion, strict=True)
    ]
