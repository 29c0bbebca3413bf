"""The Prefect flow `tune`: a search for hyper-parameters, with a task a trial and a run of MLflow for each.

The search itself is `sora.learning.study`, what a trial computes `sora.learning.tuning`; this module gives them a
device, the time that is left, and a place where people see them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import steps
from flows.slots import device_slot
from sora.config import Project
from sora.core.errors import InputError, ServiceError
from sora.core.files import atomic
from sora.core.processes import Event
from sora.core.progress import Bar, bar, say
from sora.core.trials import Ended, Found, Metric, Setting, plain
from sora.learning import space, tuning
from sora.learning.study import SEARCH, Candidate, Study
from sora.learning.tuning import Plan, Report, TimeIsUp
from sora.registry import RunsPort, RunStatus


@flow(name="tune", persist_result=False, validate_parameters=False)
def tune(
    project: str,
    trials: int = 20,
    minutes: float = 60.0,
    folds: int = 3,
    metric: Metric = "log_loss",
    only: Sequence[str] = (),
) -> Found:
    """Searches until the study has `trials` finished trials or `minutes` have passed; the same call goes on.

    `.sora/tune/index.html` shows the result, MLflow's experiment `NAME/tune` every trial. params.yaml stays as it is.

    Raises:
        InputError: nothing has been prepared yet, there are too few groups, `only` is wrong, or Optuna is missing.
        RunActive: another search is running.
        ServiceError, DiskFull: MLflow or trainings failed; the same call goes on.
    """
    until = time.monotonic() + minutes * 60
    here = Project(Path(project))
    with tuning.alone(here):
        plan = tuning.plan(here, metric=metric, folds=folds, only=only, search=SEARCH)
        if plan.settings.train.work_pool:
            say("trials train on this machine, not in train.work_pool")
        study = open_study(here, plan)
        registry = steps.open_registry(here, plan.settings)
        try:
            return Search(here, plan, study, registry.searches, until, as_task=_as_task).run(trials)
        finally:
            registry.close()


def open_study(project: Project, plan: Plan) -> Study:
    """The plan's study, as far as it has come."""
    return Study(
        project.tune_study(plan.study),
        plan.study,
        plan.parameters,
        {one.name: space.own(plan.settings, one.name) for one in plan.parameters},
        metric=plan.metric,
        folds=len(plan.folds),
        seed=plan.settings.train.seed,
    )


def _as_task(number: int, body: Callable[[], tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """Runs the body of a trial as a task, which Prefect's page shows."""
    made: Any = task(name="trial", task_run_name=f"trial {number}", cache_policy=NO_CACHE, persist_result=False)(body)
    result: tuple[float, ...] | None = made()
    return result


@dataclass(frozen=True, slots=True)
class Search:
    """One call of `tune`: its study, and where trials are logged. `until`: seconds of `time.monotonic`."""

    project: Project
    plan: Plan
    study: Study
    runs: RunsPort
    until: float
    as_task: Callable[[int, Callable[[], tuple[float, ...] | None]], tuple[float, ...] | None]
    hold: Callable[..., AbstractContextManager[Mapping[str, str]]] = device_slot

    def run(self, trials: int) -> Found:
        """Searches, then draws the page and logs it."""
        run_id = self._opened()
        status: RunStatus = "FAILED"
        try:
            with bar("Tuning") as update:

                def judge(candidate: Candidate, report: Report) -> tuple[float, ...]:
                    return self._trial(run_id, candidate, report, update, trials)

                ended = self.study.search(judge, trials=trials)
            found = self._found(ended)
            with atomic(Path(found.page)) as file:
                file.write(self._page(found).encode())
            self.runs.log_path(run_id, Path(found.page))
            if found.best is not None and found.best.score is not None:
                self.runs.log_metrics(run_id, {"best": found.best.score, "trials": float(len(found.trials))})
            self.runs.set_tags(run_id, {"verdict": found.proposal.words})
            status = "FINISHED"
            return found
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self._end(run_id, status)

    def _opened(self) -> str:
        """The study's own run: that of an earlier call, or a new one."""
        if self.study.run is not None:
            with suppress(InputError):  # another MLflow than then
                self.runs.resume(self.study.run)
                return self.study.run
        run_id = self._started(
            f"tune {self.plan.study}",
            {
                "metric": self.plan.metric,
                "folds": len(self.plan.folds),
                **{f"space.{one.name}": str(one) for one in self.plan.parameters},
            },
        )
        self.study.run = run_id
        return run_id

    def _started(self, name: str, params: Mapping[str, Any], parent: str | None = None) -> str:
        tags = {"tune": self.plan.study, "mlflow.source.name": "sora tune"}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        return self.runs.start_run(name, params=params, tags=tags)

    def _trial(self, parent: str, candidate: Candidate, report: Report, update: Bar, trials: int) -> tuple[float, ...]:
        """Judges one candidate, as a task and in a run of its own."""
        run_id = self._run_of(parent, candidate)
        total, folds, before = trials, len(self.plan.folds), candidate.number
        where = f"trial {before + 1} of {total}"

        def on_event(fold: int, event: Event) -> None:
            if time.monotonic() >= self.until:
                raise TimeIsUp
            if event["event"] == "epoch":
                note = f"{where}, fold {fold + 1} of {folds}, epoch {event['epoch']}"
                update(before * folds + fold, total * folds, note)

        def reported(fold: int, mean: float) -> bool:
            self.runs.log_metrics(run_id, {self.plan.metric: mean}, step=fold + 1)
            update(before * folds + fold + 1, total * folds, f"{where}, fold {fold + 1} of {folds} done")
            return report(fold, mean)

        def body() -> tuple[float, ...] | None:
            with suppress(TimeIsUp):  # no failure of the task
                return tuning.judge(
                    self.project, self.plan, candidate.values, reported, on_event=on_event, hold=self._held
                )
            return None

        status: RunStatus = "FAILED"
        try:
            means = self.as_task(candidate.number, body)
            status = "KILLED" if means is None else "FINISHED"
            if means is None:
                raise TimeIsUp
            self.runs.set_tags(run_id, {"trial": "complete" if len(means) == folds else "pruned"})
            return means
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self._end(run_id, status)

    def _run_of(self, parent: str, candidate: Candidate) -> str:
        if candidate.run is not None:
            with suppress(InputError):
                self.runs.resume(candidate.run)
                return candidate.run
        values: dict[str, Setting] = {one.name: space.own(self.plan.settings, one.name) for one in self.plan.parameters}
        values |= candidate.values
        name = "present settings" if candidate.baseline else f"trial {candidate.number}"
        run_id = self._started(name, {key: plain(value) for key, value in values.items()}, parent)
        self.study.note_run(run_id)
        return run_id

    def _end(self, run_id: str, status: RunStatus) -> None:
        with suppress(ServiceError):  # what the study holds counts; MLflow only shows it
            self.runs.finish(run_id, status)

    @contextmanager
    def _held(self) -> Iterator[Mapping[str, str]]:
        """A device for one fold: between two folds a nightly that waits gets it."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeIsUp
        with ExitStack() as stack:
            try:
                environment = stack.enter_context(self.hold(wait_seconds=left))
            except ServiceError as error:
                if time.monotonic() >= self.until:
                    raise TimeIsUp from error
                raise
            yield environment

    def _found(self, ended: Ended) -> Found:
        trials = self.study.trials()
        best, baseline, proposal = tuning.propose(self.project, self.plan, trials)
        return Found(
            study=self.plan.study,
            metric=self.plan.metric,
            trials=trials,
            best=best,
            baseline=baseline,
            importance=self.study.importance(),
            proposal=proposal,
            page=str(self.project.tune_page),
            ended=ended,
        )

    def _page(self, found: Found) -> str:
        from sora.judging.report import search

        name, folds = self.plan.settings.name, len(self.plan.folds)
        return search.render(found, title=name, folds=folds, videos=len(self.plan.units))
