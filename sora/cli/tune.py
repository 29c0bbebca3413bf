"""The search for better settings: tune."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo

if TYPE_CHECKING:
    from sora.core.trials import Found, Metric, Trial


@click.command()
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Finished trials.")
@click.option(
    "--minutes", default=60.0, show_default=True, type=click.FloatRange(0, 10_000, min_open=True), help="Time limit."
)
@click.option("--folds", default=3, show_default=True, type=click.IntRange(2, 20), help="Models of a trial.")
@click.option(
    "--metric", default="log_loss", show_default=True, type=click.Choice(["log_loss", "accuracy"]), help="What counts."
)
@click.option(
    "--only", metavar="NAMES", default="", help="Search these settings only: train.learning_rate,model.dropout"
)
@click.option("--apply", "applies", is_flag=True, help="Write the proposed change into params.yaml.")
@json_option
@common_options
def tune(trials: int, minutes: float, folds: int, metric: Metric, only: str, applies: bool, as_json: bool) -> None:
    """Search for better settings on train and validation videos, and propose a change of params.yaml.

    Called again, it goes on where it was stopped. Test videos take no part.
    """
    from flows.here import tune_here

    found = tune_here(
        current_project(),
        trials=trials,
        minutes=minutes,
        folds=folds,
        metric=metric,
        only=[name.strip() for name in only.split(",") if name.strip()],
        apply=applies,
    )
    if as_json:
        print_json(found.to_dict())
        return
    _show(found, asked=trials)


def _show(found: Found, *, asked: int) -> None:
    echo(found.proposal.words, bold=True)
    for name, trial in (("present settings", found.baseline), ("best trial", found.best)):
        if trial is not None:
            echo(f"  {name}: {_score(found.metric, trial)}")
    if found.proposal.diff:
        echo(found.proposal.diff.rstrip("\n"))
        echo("written into params.yaml" if found.applied else "`sora tune --apply` with the same options writes it")
    if found.ended == "minutes":
        echo(f"time is up after {len(found.trials)} of {asked} trials; the same command goes on", err=True)
    echo(f"  {found.page}", err=True)


def _score(metric: str, trial: Trial) -> str:
    score = "–" if trial.score is None else f"{trial.score:.3f}"
    return f"{metric.replace('_', ' ')} {score} (mean of {len(trial.folds)} folds)"
