"""The search: a made-up objective, killed and resumed, pruned, bounded in time."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sora.config import Settings
from sora.core.errors import InputError, ServiceError, SettingsError
from sora.learning import space, study
from sora.learning.study import Candidate, Study
from sora.learning.tuning import Report, TimeIsUp

NAMES = ["train.learning_rate", "model.dropout", "model.low_filters", "train.epochs"]
FOLDS = 3


def opened(folder: Path, seed: int = 0) -> Study:
    parameters = space.parameters(Settings(), NAMES)
    own = {one.name: space.own(Settings(), one.name) for one in parameters}
    return Study(folder / "a b.db", "made-up", parameters, own, metric="log_loss", folds=FOLDS, seed=seed)


def judged(candidate: Candidate, report: Report) -> Sequence[float]:
    """Best at a learning rate of 0.006."""
    rate = candidate.values.get("train.learning_rate", 0.002)
    assert isinstance(rate, float)
    means: list[float] = []
    for fold in range(FOLDS):
        means.append(abs(math.log(rate / 0.006)) + 0.1 * fold)
        if report(fold, means[-1]) and fold + 1 < FOLDS:
            break
    return means


def test_it_finds_what_is_better_and_gives_the_worse_up(tmp_path: Path) -> None:
    search = opened(tmp_path)
    assert search.search(judged, trials=20) == "trials"
    trials = search.trials()
    assert [trial.number for trial in trials] == list(range(20))
    assert trials[0].baseline and not any(trial.baseline for trial in trials[1:])
    assert trials[0].values == {name: space.own(Settings(), name) for name in NAMES}
    states = [trial.state for trial in trials]
    assert set(states) == {"complete", "pruned"} and "pruned" not in states[: study.UNPRUNED]
    assert all(len(trial.folds) == FOLDS for trial in trials if trial.state == "complete")
    assert all(len(trial.folds) < FOLDS for trial in trials if trial.state == "pruned")
    best = min(trial.folds[-1] for trial in trials if trial.state == "complete")
    assert best < trials[0].folds[-1] - 0.5
    assert next(iter(search.importance())) == "train.learning_rate"
    assert search.search(judged, trials=20) == "trials" and len(search.trials()) == 20


CHILD = """
import sys, time
from pathlib import Path
from tests.learning.test_study import judged, opened
def slow(candidate, report):
    print(candidate.number, flush=True)
    time.sleep(0.15)
    return judged(candidate, report)
opened(Path(sys.argv[1])).search(slow, trials=10)
"""


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.16])
def test_killed_at_any_moment_it_goes_on_to_the_same_trials(tmp_path: Path, moment: float) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    for stop in (0, 3, 4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(killed)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= stop:
                break
        time.sleep(moment)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    search = opened(killed)
    search.search(judged, trials=10)
    reference = opened(whole)
    reference.search(judged, trials=10)
    kept, expected = search.trials(), reference.trials()
    assert [(one.state, one.values, one.folds) for one in kept] == [
        (one.state, one.values, one.folds) for one in expected
    ]


def test_time_that_is_up_leaves_the_trial_for_the_next_call(tmp_path: Path) -> None:
    search = opened(tmp_path)
    seen: list[Candidate] = []

    def timed(candidate: Candidate, report: Report) -> Sequence[float]:
        seen.append(candidate)
        search.note_run(f"run {candidate.number}")
        if len(seen) == 3:
            report(0, 1.0)
            raise TimeIsUp
        return judged(candidate, report)

    assert search.search(timed, trials=5) == "minutes"
    assert len(search.trials()) == 2
    search = opened(tmp_path)
    assert search.search(timed, trials=5) == "trials"
    assert (seen[3].number, seen[3].values, seen[3].run) == (2, seen[2].values, "run 2")
    assert [one.number for one in seen] == [0, 1, 2, 2, 3, 4]


def test_a_trial_that_fails_is_told_and_the_search_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(candidate: Candidate, report: Report) -> Sequence[float]:
        if candidate.number == 2:
            raise InputError("the loss diverged")
        return judged(candidate, report)

    search = opened(tmp_path)
    search.search(failing, trials=4)
    assert [trial.state for trial in search.trials()] == ["complete", "complete", "failed", "complete"]
    assert "trial 2 failed: the loss diverged" in capsys.readouterr().err


def test_failing_settings_or_three_failures_in_a_row_end_it(tmp_path: Path) -> None:
    def never(candidate: Candidate, report: Report) -> Sequence[float]:
        raise ServiceError("no memory")

    def only_the_first(candidate: Candidate, report: Report) -> Sequence[float]:
        return judged(candidate, report) if candidate.baseline else never(candidate, report)

    search = opened(tmp_path)
    with pytest.raises(ServiceError, match="no memory"):
        search.search(never, trials=5)
    assert search.trials() == ()
    with pytest.raises(ServiceError, match="no memory"):
        opened(tmp_path).search(only_the_first, trials=9)
    assert [trial.state for trial in opened(tmp_path).trials()] == ["complete", "failed", "failed"]


def test_a_damaged_file_is_named_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "a b.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ServiceError, match=r"a b\.db") as caught:
        opened(tmp_path)
    assert "remove that file" in caught.value.fix


def test_without_optuna_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="Optuna") as caught:
        study.require()
    assert "pip install" in caught.value.fix


def test_parameters_fit_the_settings() -> None:
    """The project's own value is always within bounds, and what has no effect is not searched."""
    odd = Settings.model_validate(
        {
            "train": {"learning_rate": 0.5, "weight_decay": 0, "epochs": 1, "ema": 0.97, "flip": ["never"]},
            "model": {"preset": "pretrained", "streams": "high"},
        }
    )
    known = {one.name: one for one in space.parameters(odd)}
    assert "train.flip" not in known and not {"model.blocks", "model.low_filters", "model.high_filters"} & set(known)
    rate, ema, epochs = known["train.learning_rate"], known["train.ema"], known["train.epochs"]
    assert isinstance(rate, space.Real) and rate.high == 0.5
    assert isinstance(epochs, space.Whole) and epochs.low == 1
    assert isinstance(ema, space.Choice) and 0.97 in ema.options
    decay = known["train.weight_decay"]
    assert space.nearest(decay, 0.0) == 1e-6
    with pytest.raises(InputError, match=r"train\.batch") as caught:
        space.parameters(odd, ["train.batch"])
    assert "model.dropout" in caught.value.fix


def test_every_searched_value_is_a_setting() -> None:
    from sora.config import changed
    from sora.core.trials import plain

    for one in space.parameters(Settings()):
        ends = one.options if isinstance(one, space.Choice) else (one.low, one.high)
        for value in ends:
            try:
                changed(Settings(), {one.name: plain(value)})
            except SettingsError as error:
                pytest.fail(f"{one.name}: {error}")
