"""The flow `tune` without its servers: what MLflow is told, Ctrl-C, and the bound in time. Training is made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.tune import Search, open_study
from sora.config import Project
from sora.core.errors import ServiceError
from sora.core.trials import Found
from sora.learning import crossval, tuning
from tests.registry.fake import FakeRuns
from tests.searches import Trained


@contextmanager
def free(wait_seconds: float) -> Iterator[dict[str, str]]:
    yield {}


@contextmanager
def taken(wait_seconds: float) -> Iterator[dict[str, str]]:
    time.sleep(max(wait_seconds, 0) + 0.01)
    raise ServiceError("no device was free")
    yield {}


def search(
    project: Project, runs: FakeRuns, trials: int, seconds: float = 60.0, hold: Callable[..., Any] = free
) -> Found:
    plan = tuning.plan(project, only=["train.learning_rate"], folds=2)
    with tuning.alone(project):
        until = time.monotonic() + seconds
        study = open_study(project, plan)
        return Search(project, plan, study, runs, until, as_task=lambda _, body: body(), hold=hold).run(trials)


def test_a_run_for_the_study_and_one_for_each_trial(split_project: Project, made_up: Trained) -> None:
    runs = FakeRuns()
    found = search(split_project, runs, 3)
    parent, *children = runs.all.items()
    assert parent[1].tags["tune"] == found.study and parent[1].tags["verdict"] == found.proposal.words
    assert {run.tags["mlflow.parentRunId"] for _, run in children} == {parent[0]} and len(children) == 3
    assert {run.status for run in runs.all.values()} == {"FINISHED"}
    assert all("judged" not in run.tags for run in runs.all.values())
    for trial, (_, run) in zip(found.trials, children, strict=True):
        assert run.metrics == {"log_loss": trial.score} and run.tags["trial"] == trial.state
    page = Path(found.page)
    assert page == split_project.tune_page and parent[1].files["index.html"] == page.read_bytes()
    text = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text and "<script" not in text and "://" not in text
    assert set(found.to_dict()) >= {"study", "trials", "best", "baseline", "proposal", "applied", "page"}
    again = search(split_project, runs, 4)
    assert len(runs.all) == 5 and again.trials[:3] == found.trials  # the same run of the study, one more trial


def test_ctrl_c_keeps_what_is_done(
    split_project: Project,
    made_up: Trained,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, answers = FakeRuns(), crossval.answers

    def interrupted(*given: Any, **more: Any) -> dict[str, Any]:
        if len(made_up.tables) == 3:
            raise KeyboardInterrupt
        return answers(*given, **more)

    monkeypatch.setattr(crossval, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(split_project, runs, 3)
    assert [run.status for run in runs.all.values()] == ["KILLED", "FINISHED", "KILLED"]
    monkeypatch.setattr(crossval, "answers", answers)
    found = search(split_project, runs, 3)
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    assert len(made_up.tables) == 6  # no fold twice
    assert [run.status for run in runs.all.values()] == ["FINISHED"] * 4


def test_time_is_up(split_project: Project, made_up: Trained) -> None:
    runs = FakeRuns()
    found = search(split_project, runs, 3, seconds=0.0)
    assert found.ended == "minutes" and found.trials == () and found.best is None and found.baseline is None
    assert "have not been judged" in found.proposal.words and Path(found.page).exists()
    assert [run.status for run in runs.all.values()] == ["FINISHED", "KILLED"]
    assert search(split_project, runs, 3, seconds=0.2, hold=taken).ended == "minutes"
    assert search(split_project, runs, 3).ended == "trials"


def test_events_end_a_training_when_time_is_up(
    split_project: Project,
    made_up: Trained,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def endless(*_: Any, on_event: Callable[[dict[str, Any]], None], **__: Any) -> dict[str, Any]:
        for batch in range(10_000):
            time.sleep(0.01)
            on_event({"event": "batch", "epoch": 1, "batch": batch, "batches": 10_000})
        raise AssertionError("it was not ended")

    monkeypatch.setattr(crossval, "answers", endless)
    begun = time.monotonic()
    assert search(split_project, FakeRuns(), 3, seconds=1.0).ended == "minutes"
    assert time.monotonic() - begun < 20


def test_a_clear_gain_is_found(split_project: Project, made_up: Trained) -> None:
    found = search(split_project, FakeRuns(), 12)
    assert found.best is not None and not found.best.baseline
    assert set(found.proposal.changes) == {"train.learning_rate"} and "+  learning_rate: 0.00" in found.proposal.diff
    assert found.proposal.diff.splitlines()[-1].strip("+ ") in Path(found.page).read_text(encoding="utf-8")
