"""What the network is made of: model describe."""

from __future__ import annotations

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo


@click.group()
@common_options
def model() -> None:
    """Inspect the network: what it is made of and what it costs."""


@model.command()
@click.argument("preset", required=False)
@click.option("--classes", type=click.IntRange(min=2), help="[default: the project's, or 2 with PRESET]")
@click.option("--batch", type=click.IntRange(min=1), help="Batch size of the memory estimate [default: train.batch].")
@json_option
@common_options
def describe(preset: str | None, classes: int | None, batch: int | None, as_json: bool) -> None:
    """Show layers, shapes, parameters, FLOPs per clip and memory for the project's model, or of PRESET."""
    from sora.model import describe as describing

    settings = describing.of_preset(preset) if preset else current_project().settings()
    description = describing.describe(settings, classes=classes, batch=batch)
    if as_json:
        print_json(description)
    else:
        echo(describing.draw(description))
