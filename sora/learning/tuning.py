"""`sora tune`: how a set of hyper-parameters is judged, and when a change of the settings is proposed.

Test videos take no part: the ledger's train and validation videos alone are divided into folds, by group as splits
are. A trial trains a model for each fold on the others and is judged on the videos that were left out; part of the
training videos, by group, is kept aside for early stopping. Every trial has the same folds, seed and order, so two
trials differ in their settings only.

Nothing here knows the search itself, which is `sora.learning.study`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.config import Project, Settings, changed, edited
from sora.core import provenance
from sora.core.errors import InputError, RunActive
from sora.core.files import atomic, writing
from sora.core.processes import Emit
from sora.core.statistics import clustered_mean
from sora.core.trials import Metric, Proposal, Setting, Trial, better, plain
from sora.learning import crossval, space
from sora.learning.space import Parameter

if TYPE_CHECKING:
    import pandas as pd

VALIDATION = 0.2  # share of the training videos of a fold, by group, for early stopping
_LEVEL = 0.95  # of the interval, for all compared trials together
_PREPARE = "`sora run` prepares the videos and assigns their splits; it also brings both up to date"

Report = Callable[[int, float], bool]  # (finished fold, mean so far) → whether to give the trial up
Hold = Callable[[], AbstractContextManager[Mapping[str, str]]]  # a device for one fold, with its environment


class TimeIsUp(Exception):
    """The search's time has passed; what was being trained goes on with the next call."""


@dataclass(frozen=True)
class Plan:
    """What is searched, and on which folds."""

    study: str  # its name follows from everything that decides what a trial computes
    settings: Settings  # the project's
    metric: Metric
    parameters: tuple[Parameter, ...]
    folds: tuple[pd.DataFrame, ...]  # a table for each: sha256, path, label, unit, split (`test`: left out and judged)
    units: Mapping[str, int]  # sha256 → the unit that no fold divides


def plan(
    project: Project, *, metric: Metric = "log_loss", folds: int = 3, only: Sequence[str] = (), search: str = ""
) -> Plan:
    """Divides the project's train and validation videos into folds. Nothing is written.

    Args:
        only: names of the parameters to search; empty: all that have an effect.
        search: what else decides the search, such as its algorithm; it becomes part of the study's name.

    Raises:
        InputError: nothing has been prepared yet, there are fewer groups than folds, or `only` is wrong.
    """
    from sora.dataset import folds as folding

    settings = project.settings()
    parameters = space.parameters(settings, only)
    videos = _videos(project, settings)
    labels, units = videos["label"].to_numpy(), videos["unit"].to_numpy()
    seed = settings.train.seed
    outer = folding.stratified(labels, units, folds, seed)
    tables = []
    for number in range(folds):
        train = outer != number
        aside = folding.with_validation(train, labels, units, VALIDATION, seed)
        split = np.where(aside, "val", np.where(train, "train", "test"))
        tables.append(videos[["sha256", "path", "label", "unit"]].assign(split=split))
    what = [
        crossval.configuration(settings),
        provenance.LEARNING,
        [table.to_csv(index=False) for table in tables],
        [repr(one) for one in parameters],
        search,
    ]
    return Plan(
        study=f"{metric}-{crossval.digest(what)[:8]}",
        settings=settings,
        metric=metric,
        parameters=parameters,
        folds=tuple(tables),
        units=dict(zip(videos["sha256"], units.tolist(), strict=True)),
    )


def judge(
    project: Project,
    plan: Plan,
    values: Mapping[str, Setting],
    report: Report,
    *,
    on_event: Callable[[int, dict[str, Any]], None] = lambda fold, event: None,
    hold: Hold = lambda: nullcontext({}),
) -> tuple[float, ...]:
    """Trains and judges one set of values, fold by fold, until `report` gives it up.

    A finished fold is never trained again, an unfinished one goes on after its last epoch.

    Args:
        on_event: gets the fold's number and its events; it may raise `TimeIsUp`.
        hold: is entered around each fold that has to be trained.

    Returns:
        The metric's mean over the first 1, 2, … folds.

    Raises:
        SettingsError: the values don't go together.
        Others: as `crossval.answers`.
    """
    settings = changed(plan.settings, {name: plain(value) for name, value in values.items()})
    scores: list[float] = []
    means: list[float] = []
    for number, table in enumerate(plan.folds):
        place = _place(project, settings, table)
        done = (place / crossval.FOLD_FILE).exists()
        with nullcontext({}) if done else hold() as env:
            answer = crossval.answers(
                place,
                project.shards,
                table,
                settings,
                judged="test",
                features=project.features,
                on_event=_of(number, on_event),
                env=dict(env),
            )
        scores.append(float(answer["metrics"][plan.metric]))
        means.append(float(np.mean(scores)))
        if report(number, means[-1]) and number + 1 < len(plan.folds):
            break
    return tuple(means)


def propose(project: Project, plan: Plan, trials: Sequence[Trial]) -> tuple[Trial | None, Trial | None, Proposal]:
    """The best complete trial, the present settings' own, and what follows from comparing them.

    The best of many trials looks better than it is, on the very videos that chose it. So its interval is wider the more
    trials there are (Bonferroni): a change is proposed if the gain is above zero even so. The interval is over
    videos by group; another seed could move both sides, which it does not see.
    """
    complete = [trial for trial in trials if trial.state == "complete" and trial.score is not None]
    baseline = next((trial for trial in complete if trial.baseline), None)
    best = max(complete, key=lambda one: (better(plan.metric) * (one.score or 0.0), -one.number), default=None)
    if best is None or baseline is None:
        return best, baseline, Proposal({}, "nothing is proposed: the present settings have not been judged yet")
    if best.baseline:
        words = "nothing is proposed: no trial was better than the present settings"
        return best, baseline, Proposal({}, words)
    compared = sum(trial.state != "failed" and not trial.baseline for trial in trials)
    gain, low, high = _gain(project, plan, best, baseline, compared)
    change = {
        name: value for name, value in best.values.items() if plain(value) != plain(space.own(plan.settings, name))
    }
    unit = "of the videos" if plan.metric == "accuracy" else "nats a video"
    size = f"{gain:+.3f} {unit}, 95% interval {low:+.3f} to {high:+.3f} for the best of {compared}"
    if low <= 0 or not change:
        words = (
            f"nothing is proposed: no trial is clearly better than the present settings (trial {best.number}: {size})"
        )
        return best, baseline, Proposal({}, words, gain, low, high, compared)
    text = project.params_file.read_text(encoding="utf-8")
    return (
        best,
        baseline,
        Proposal(
            change,
            f"trial {best.number} is better than the present settings: {size}",
            gain,
            low,
            high,
            compared,
            difference(text, edited(text, {name: plain(value) for name, value in change.items()})),
        ),
    )


def apply(project: Project, plan: Plan, proposal: Proposal) -> bool:
    """Writes the proposed change into params.yaml, whose comments and order stay. Returns whether there was one.

    Raises:
        InputError: params.yaml changed since the search began, or can't be edited.
    """
    if not proposal.changes:
        return False
    text = project.params_file.read_text(encoding="utf-8")
    if project.settings() != plan.settings:
        raise InputError("params.yaml changed while the search ran", fix="run `sora tune` again for the new settings")
    with atomic(project.params_file) as file:
        file.write(edited(text, {name: plain(value) for name, value in proposal.changes.items()}).encode())
    return True


def difference(before: str, after: str) -> str:
    """The unified diff of two texts of params.yaml."""
    import difflib

    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), "params.yaml", "params.yaml (proposed)", n=1
    )
    return "".join(lines)


@contextmanager
def alone(project: Project) -> Iterator[None]:
    """Holds the project's searches: whatever a study says is being tried is left from a process that died.

    Raises:
        RunActive: another `sora tune` is running.
    """
    from filelock import FileLock, Timeout

    with writing(project.tune):
        project.tune.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(project.tune_lock, timeout=0.5):
            yield
    except Timeout as error:
        raise RunActive(
            f"another `sora tune` is running in {project.root}", fix="wait until it ends, or stop it"
        ) from error


def _videos(project: Project, settings: Settings) -> pd.DataFrame:
    """The ledger's train and validation videos as a run would use them, sorted by sha256, with their `unit`."""
    from sora.dataset import manifest, splits, table
    from sora.dataset.quality import quarantine

    try:
        rejected = quarantine.rejected_paths(project)
        rows = manifest.read(project.manifest)
        ledger = splits.read(project.splits_file)
    except (OSError, InputError) as error:
        raise InputError(f"nothing is prepared yet ({error})", fix=_PREPARE) from error
    if not len(ledger) or not project.shards.is_dir():
        missing = "splits.csv" if not len(ledger) else str(project.shards)
        raise InputError(f"nothing is prepared yet ({missing} is missing or empty)", fix=_PREPARE)
    # What has no split yet is left out, and with it what a run would reject for tying two splits together.
    inner = set(ledger.loc[ledger["split"].isin(["train", "val"]), "sha256"])
    return table.usable(rows[rows["sha256"].isin(inner)], rejected, settings.validate_.unit_bits)


def _place(project: Project, settings: Settings, table: pd.DataFrame) -> Path:
    """The folder of one fold of one set of values. Studies share them: the present settings are trained once."""
    what = [crossval.configuration(settings), provenance.LEARNING, table.to_csv(index=False)]
    return project.tune_folds / crossval.digest(what)


def _of(number: int, on_event: Callable[[int, dict[str, Any]], None]) -> Emit:
    return lambda event: on_event(number, event)


def _gain(project: Project, plan: Plan, best: Trial, baseline: Trial, compared: int) -> tuple[float, float, float]:
    """How much better `best` is for a video, and the interval of that."""
    theirs, own = (_by_video(project, plan, trial) for trial in (best, baseline))
    names = sorted(own)
    gains = better(plan.metric) * np.array([theirs[name] - own[name] for name in names])
    units = np.array([plan.units[name] for name in names])
    return clustered_mean(gains, units, 1 - (1 - _LEVEL) / max(compared, 1))


def _by_video(project: Project, plan: Plan, trial: Trial) -> dict[str, float]:
    """sha256 → the metric of this video alone, of a complete trial. Nothing is trained."""
    values = {} if trial.baseline else {name: plain(value) for name, value in trial.values.items()}
    settings = changed(plan.settings, values)
    task, found = settings.task, {}
    for table in plan.folds:
        answer = crossval.answers(_place(project, settings, table), project.shards, table, settings, judged="test")
        for video in answer["videos"]:
            if plan.metric == "accuracy":
                found[video["sha256"]] = float(video["predicted"] == video["label"])
            else:
                probabilities = np.array([video["probabilities"]], float)
                truth = task.encode([video["label"]], settings.classes)
                found[video["sha256"]] = task.log_loss(probabilities, truth)
    return found
