"""`sora check`: decode every video of a folder, judge the set, and write the report.

Nothing is written into the checked folder. Facts about a project's videos are kept for the next run, which then
does not decode those videos again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sora.config import Project, Settings
from sora.core.errors import InputError, SoraError
from sora.core.files import atomic, writing
from sora.dataset import ledger, manifest
from sora.dataset.quality import ValidationReport, docs, judge
from sora.dataset.quality.rules import FIXES, SPLITS_LOST

DEFAULT_OUT = "sora-check"
_SHOWN = 10  # rejected videos printed per rule


def check(
    target: Path | Project,
    *,
    settings: Settings | None = None,
    out: Path | None = None,
    reference: dict[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ValidationReport, Path]:
    """Validates a project's data or any folder of labelled videos; returns the report and the folder it is in.

    That folder gets `report.json`, `manifest.parquet` and, with `index.html` as the first page, `data_docs/`.

    Args:
        target: a project, a project's folder or its `data/`, or a folder `<class>/…/<video>`.
        settings: default: the project's; outside a project the defaults, with every class folder as a class.
        out: default: the project's `.sora/check`, or `sora-check` in the working directory.
        reference: accepted videos of each class to compare the balance with; default: the project's last judged run.
        progress: called with (done, total) files.

    Raises:
        InputError: no such folder; `out` is in the folder to check; a `labels.csv` that can't be used.
        DiskFull, ServiceError: the report can't be written.
    """
    project = target if isinstance(target, Project) else _project(target)
    if project is not None:
        from sora.dataset.versioning.stages import reference_counts

        folder = project.data
        settings = settings or project.settings()
        out = out or project.check
        reference = reference if reference is not None else reference_counts(project)
        previous = manifest.read(project.manifest) if project.manifest.exists() else None
        journal = project.journal
    else:
        assert isinstance(target, Path)
        folder = target
        settings = settings or Settings.model_validate({})
        out = out or Path.cwd() / DEFAULT_OUT
        previous, journal = None, out / "manifest.jsonl"
    out = out.resolve()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", fix="name a folder of labelled videos: <class>/<video>")
    if out.is_relative_to(folder.resolve()):
        raise InputError(
            f"the report would go to {out}, inside the folder to check",
            fix="run from another directory or add --out DIR",
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written = out / "manifest.parquet"
    if previous is None and written.exists():  # checked before
        previous = manifest.read(written)
    built = manifest.build(folder, settings, previous=previous, journal=journal, progress=progress)
    manifest.write(built, written)
    if project is None:
        journal.unlink(missing_ok=True)  # the manifest holds everything; a project's next run reads the journal
    judgement = judge(built, settings, reference=reference)
    docs.write(docs_of(out), judgement)
    report = judgement.report
    if project is not None:
        try:
            ledger.require(project.splits_file, ledger.remembered(project))
        except SoraError as error:  # `sora run` would say the same
            report = report.stopped(SPLITS_LOST, error.message)
    with atomic(out / "report.json") as file:
        file.write(json.dumps(report.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n")
    return report, out


def docs_of(out: Path) -> Path:
    """The folder with the Data Docs of a check."""
    return out / "data_docs"


def _project(folder: Path) -> Project | None:
    """The project whose root or data this folder is."""
    folder = folder.resolve()
    root = folder.parent if folder.name == "data" and (folder.parent / "params.yaml").is_file() else folder
    return Project(root) if (root / "params.yaml").is_file() else None


def show(report: ValidationReport, out: Path) -> None:
    """Prints a readable report on standard output."""
    from rich.table import Table

    from sora.core.progress import console as make_console
    from sora.core.progress import markup as escape

    console = make_console(soft_wrap=True)
    console.print(
        f"[bold]{report.videos:,}[/] videos, [green]{report.accepted:,} accepted[/], "
        + (f"[red]{len(report.rejected):,} rejected[/]" if report.rejected else "none rejected")
    )
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for name, count in report.counts.items():
        table.add_row("  " + escape(name), f"{count:,}")
    console.print(table)
    by_rule: dict[str, list[str]] = {}
    for rejection in report.rejected:
        by_rule.setdefault(rejection.rule, []).append(f"    {escape(rejection.path)}: {escape(rejection.detail)}")
    for rule, lines in sorted(by_rule.items()):
        console.print(f"[red]{rule}[/] {len(lines):,} — fix: {escape(FIXES[rule])}")
        console.print("\n".join(lines[:_SHOWN]))
        if len(lines) > _SHOWN:
            console.print(f"    and {len(lines) - _SHOWN:,} more")
    for finding in report.findings("warn"):
        console.print(f"[yellow]{finding.rule}[/]: {escape(finding.detail)}")
        console.print(f"    {escape(FIXES[finding.rule])}")
    for finding in report.findings("stop"):
        console.print(f"[bold red]{finding.rule}[/]: {escape(finding.detail)}")
        console.print(f"    fix: {escape(FIXES[finding.rule])}")
    verdict = "[bold green]trainable[/]" if report.ok else "[bold red]not trainable[/]"
    console.print(f"{verdict}; {report.passed} of {len(report.expectations)} rules hold")
    console.print(f"Data Docs: {escape(str(docs_of(out) / 'index.html'))}")
