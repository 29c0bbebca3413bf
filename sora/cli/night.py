"""The nightly by hand, and the evaluation of a past version repeated: run, reproduce."""

from __future__ import annotations

import sys

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo


@click.command()
@click.option("--force", is_flag=True, help="Train and judge even if nothing changed; promote on little evidence.")
@json_option
@common_options
def run(force: bool, as_json: bool) -> None:
    """Run the nightly flow once, here and now."""
    from flows.here import run_here

    result = run_here(current_project(), force=force)
    if as_json:
        print_json(result)
        return
    version = f" version {result['version']}" if result["version"] is not None else ""
    echo(f"{result['outcome']}{version}", bold=True)
    for reason in result["reasons"]:
        echo(f"  {reason}")
    shown = {k: v for k, v in result["metrics"].items() if k in ("test/accuracy", "test/macro_f1", "test/ece")}
    if shown:
        echo("  " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    for place in result["pages"]:
        echo(f"  {place}", err=True)


@click.command()
@click.argument("version", type=click.IntRange(min=1))
@json_option
@common_options
def reproduce(version: int, as_json: bool) -> None:
    """Restore VERSION's data, parameters and splits, evaluate it again and compare."""
    from sora.runtime import lifecycle

    result = lifecycle.reproduce(current_project(), version)
    if as_json:
        print_json(result)
    else:
        echo(f"version {version}: {'matches' if result['matches'] else 'does NOT match'} what was recorded")
        for name, recorded in sorted(result["recorded"].items()):
            echo(f"  {name}: recorded {recorded:.4f}, now {result['metrics'].get(name, float('nan')):.4f}")
        for note in result.get("notes", []):
            echo(f"  {note}")
    if not result["matches"]:
        sys.exit(1)
