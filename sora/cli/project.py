"""A project from a folder of videos: init, check, and the split ledger."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A folder of labelled videos.")
@click.option("--multilabel", is_flag=True, help="A video may have several labels, joined by | in labels.csv.")
@json_option
@common_options
def init(directory: Path, data: Path, multilabel: bool, as_json: bool) -> None:
    """Make a project in DIR from a folder of labelled videos (copied, never altered)."""
    from sora.core.progress import bar
    from sora.operations import project

    with bar("Copying") as update:
        made = project.init(directory, data, head="multilabel" if multilabel else None, progress=update)
    if as_json:
        print_json(made)
    else:
        echo(f"{made['videos']} videos of {len(made['classes'])} classes: {', '.join(made['classes'])}")
        echo(f"next: cd {made['project']} && sora check && sora run")


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the report goes if FOLDER is not a project.")
@json_option
@common_options
def check(folder: Path | None, out: Path | None, as_json: bool) -> None:
    """Decode every video, validate, and write the report and Data Docs."""
    from sora.core.progress import bar
    from sora.dataset import check as checking

    with bar("Decoding") as update:
        report, place = checking.check(folder if folder is not None else current_project(), out=out, progress=update)
    if as_json:
        print_json(report.contract())
    else:
        checking.show(report, place)
    if not report.ok:
        sys.exit(1)


@click.group()
def splits() -> None:
    """Manage the ledger splits.csv: which video is for training, validation or test."""


@splits.command("restore")
@click.option("--from", "version", type=click.IntRange(min=1), help="What VERSION recorded [default: the last judged].")
@json_option
@common_options
def splits_restore(version: int | None, as_json: bool) -> None:
    """Restore lost or changed rows as a judged run recorded them; new rows stay unless they contradict it."""
    from dataclasses import asdict

    from sora.runtime import lifecycle

    done = lifecycle.restore_splits(current_project(), version)
    if as_json:
        print_json(asdict(done))
        return
    echo(
        f"as {done.source} recorded: {done.returned} rows came back, {done.corrected} were corrected, "
        f"{done.kept} newer ones stay, {done.dropped} were dropped (the next run assigns those); {done.rows} in all"
    )
    if done.copy:
        echo(f"  the previous ledger: {done.copy}", err=True)
