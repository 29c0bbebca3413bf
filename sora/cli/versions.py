"""The versions in the registry: models, promote, rollback, gc."""

from __future__ import annotations

from typing import Any

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo


@click.command()
@json_option
@common_options
def models(as_json: bool) -> None:
    """List every version: aliases, metrics, data version, when and why."""
    from sora.runtime import lifecycle

    versions = [version.to_dict() for version in lifecycle.models(current_project())]
    if as_json:
        keys = ("version", "aliases", "metrics", "data_version", "created", "decision", "reasons")
        print_json([{key: version[key] for key in keys} for version in versions])
        return
    from rich.table import Table

    from sora.core.progress import console as make_console
    from sora.core.progress import markup as escape

    console = make_console()
    table = Table("version", "alias", "accuracy", "macro F1", "data", "created", "decision", box=None, pad_edge=False)
    for version in versions:
        metrics = version["metrics"]
        table.add_row(
            str(version["version"]),
            ", ".join(version["aliases"]),
            *(f"{metrics[name]:.3f}" if name in metrics else "" for name in ("test/accuracy", "test/macro_f1")),
            version["data_version"][:8],
            version["created"][:16].replace("T", " "),
            version["decision"],
        )
    console.print(table if versions else "no version yet: `sora run` makes the first")
    for version in versions:
        # Reasons are sentences: in the table their column would be one word wide.
        if version["reasons"]:
            console.print(f"\nversion {version['version']}: {escape(version['decision'])}", soft_wrap=True)
        for reason in version["reasons"]:
            console.print(f"  {escape(reason)}", soft_wrap=True)


@click.command()
@click.argument("version", type=click.IntRange(min=1))
@json_option
@common_options
def promote(version: int, as_json: bool) -> None:
    """Make VERSION the champion."""
    from sora.runtime import lifecycle

    _moved(lifecycle.promote(current_project(), version), as_json)


@click.command()
@click.option("--to", type=click.IntRange(min=1), help="A version that was champion before.")
@json_option
@common_options
def rollback(to: int | None, as_json: bool) -> None:
    """Make the champion before this one the champion again."""
    from sora.runtime import lifecycle

    _moved(lifecycle.rollback(current_project(), to), as_json)


def _moved(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        echo(f"champion: version {result['champion']}, previous: {result['previous'] or 'none'}")


@click.command()
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@click.option("--keep", default=10, show_default=True, type=click.IntRange(min=1), help="Versions to keep whole.")
@json_option
@common_options
def gc(dry_run: bool, keep: int, as_json: bool) -> None:
    """Remove what no served or recent version needs: DVC cache, old runs and versions, work folders, logs."""
    from sora.runtime import lifecycle

    result = lifecycle.gc(current_project(), keep=keep, dry_run=dry_run)
    if as_json:
        print_json(result)
        return
    for item in result["items"]:
        echo(f"{item['bytes']:>14,}  {item['what']}  ({item['why']})")
    echo(f"{result['bytes']:>14,}  bytes {'would be' if dry_run else 'were'} freed")
