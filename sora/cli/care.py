"""The project's health and its copies: doctor, backup, restore."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo

if TYPE_CHECKING:
    from sora.config import Project


@click.command()
@json_option
@common_options
def doctor(as_json: bool) -> None:
    """Show what is installed, reachable and running, and how to fix what is not."""
    from sora.core.errors import SettingsError
    from sora.operations import doctor as doctoring

    try:
        project: Project | None = current_project()
    except SettingsError:
        project = None
    if as_json:
        print_json(doctoring.doctor(project))
        return
    for check in doctoring.examine(project):
        mark, colour = ("ok  ", "green") if check.ok else ("FIX", "red")
        echo(f"{check.name}: {check.detail}", mark=mark, colour=colour)
        if not check.ok and check.fix:
            echo(f"       → {check.fix}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--without-data", is_flag=True, help="Leave the videos and clips out: DVC's remote must have them.")
@click.option("--keep", type=click.IntRange(min=1), help="Recent versions whose data is included [default: 10].")
@json_option
@common_options
def backup(file: Path, without_data: bool, keep: int | None, as_json: bool) -> None:
    """Write the whole project into the new FILE, while servers and runs continue. It holds secrets: keep it safe."""
    from dataclasses import asdict

    from sora.core.progress import bar
    from sora.operations.backup import describe
    from sora.runtime import lifecycle

    with bar("Backing up") as update:
        made = lifecycle.backup(current_project(), file, keep=keep, data=not without_data, progress=update)
    if as_json:
        print_json(asdict(made))
        return
    for line in describe(made):
        echo(line)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@common_options
def restore(file: Path, directory: Path, as_json: bool) -> None:
    """Restore the project in the backup FILE into the new or empty folder DIR."""
    from dataclasses import asdict

    from sora.core.progress import bar
    from sora.operations import restore as restoring

    with bar("Restoring") as update:
        restored = restoring.restore(file, directory, progress=update)
    if as_json:
        print_json(asdict(restored))
        return
    for line in restoring.describe(restored):
        echo(line)
