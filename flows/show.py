"""What people see of a run: bars in the terminal, live metrics in MLflow, artifacts in Prefect's UI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext

from sora.config import Project
from sora.core.progress import Bar

Event = dict[str, Any]


def live(registry: Any, run_id: str, update: Bar) -> Callable[[Event], None]:
    """For `training.run`: a bar over all batches, and each epoch's metrics to MLflow as they come."""

    def on_event(event: Event) -> None:
        if event["event"] == "epoch":
            metrics = event["metrics"]
            registry.log_metrics(
                run_id,
                {**metrics, "seconds": event["seconds"], "clips_per_second": event["clips_per_second"]},
                step=event["epoch"],
            )
            known = [(name, metrics[name]) for name in ("loss", "val_loss", "val_accuracy") if name in metrics]
            update(event["epoch"], event["epochs"], "  ".join(f"{name} {value:.3f}" for name, value in known))

    return on_event


def evaluating(update: Bar) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if "done" in event and "total" in event:
            update(event["done"], event["total"], str(event.get("name", "")))

    return on_event


def unchanged(result: dict[str, Any]) -> None:
    if FlowRunContext.get():
        create_markdown_artifact(
            f"**unchanged**: {'; '.join(result['reasons'])} (version {result['version']})",
            key="nightly",
            description="What the nightly did",
        )


def report(
    project: Project, registry: Any, result: dict[str, Any], outcome: dict[str, Any], facts: dict[str, Any]
) -> list[str]:
    """Prefect artifacts of a judged run. Returns the addresses of the pages that show it."""
    candidate = outcome["candidate"]["reports"]["test"]
    champion = outcome.get("champion")
    page = registry.run_page(result["run_id"])
    if FlowRunContext.get():
        create_markdown_artifact(_markdown(result, candidate, champion, facts), key="nightly", description="The result")
        create_table_artifact(_recalls(candidate), key="recall", description="Recall of each class on the test split")
        if candidate["confusion"]:  # a multi-label model has none
            create_table_artifact(_confusion(candidate), key="confusion", description="True class by predicted class")
        create_link_artifact(page, key="mlflow-run", link_text="the run in MLflow", description="Metrics and plots")
    pages = [f"MLflow run: {page}"]
    if (project.docs / "index.html").exists():
        pages.append(f"Data Docs: {project.docs / 'index.html'}")
    kept = project.last_evaluation
    _keep(Path(outcome["candidate"]["folder"]), kept)
    return [*pages, f"evaluation: {kept / 'index.html'}"]


def _keep(source: Path, target: Path) -> None:
    """The page of the last judged run stays readable without any server."""
    import shutil

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def _markdown(
    result: dict[str, Any], candidate: dict[str, Any], champion: dict[str, Any] | None, facts: dict[str, Any]
) -> str:
    rows = ["| metric (test split) | candidate | champion |", "|---|---|---|"]
    theirs = champion["reports"]["test"]["metrics"] if champion else {}
    for name in ("accuracy", "macro_f1", "ece", "log_loss", "latency_ms"):
        if name in candidate["metrics"]:
            other = f"{theirs[name]:.3f}" if name in theirs else "–"
            rows.append(f"| {name} | {candidate['metrics'][name]:.3f} | {other} |")
    reasons = "\n".join(f"- {reason}" for reason in result["reasons"])
    return (
        f"# Version {result['version']}: {result['outcome']}\n\n{reasons}\n\n" + "\n".join(rows) + "\n\n"
        f"data version `{result['data_version']}`: {facts['videos']} videos, {facts['rejected']} quarantined; "
        f"{facts['train']} train, {facts['val']} val, {facts['test']} test\n"
    )


def _recalls(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"class": name, **{k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}}
        for name, values in report["per_class"].items()
    ]


def _confusion(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"true": name, **dict(zip(report["classes"], row, strict=True))}
        for name, row in zip(report["classes"], report["confusion"], strict=True)
    ]
