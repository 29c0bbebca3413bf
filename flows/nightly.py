"""The nightly flow: the steps of `flows.steps` as Prefect tasks, with retries, alerts and the backup around them.

Prefect decides when and where, retries where that helps, and shows what happened. It remembers nothing: DVC knows
whether data changed, MLflow what was judged, and a run's own work folder which steps of an interrupted run are done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from flows import alerts, cycle, show, steps
from flows.deployments import superseded
from flows.records import Night, NightResult
from flows.work import Work
from sora.config import Project
from sora.core.errors import DiskFull, RunActive, ServiceError, SoraError
from sora.core.processes import die_with_parent
from sora.core.progress import say
from sora.learning.jobs import TrainResult
from sora.operations import nightly_log
from sora.operations.lock import run_lock

P = ParamSpec("P")
R = TypeVar("R")


def _may_pass(_task: object, _run: object, state: State) -> bool:
    """Retry only what may resolve itself: a failed server or child, not a wrong input or a full disk."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, ServiceError) and not isinstance(error, DiskFull)


def _task(name: str, step: Callable[P, R], *, retries: int = 0) -> Callable[P, R]:
    """The step as a task, which runs again up to `retries` times if that may help."""
    again: dict[str, Any] = {"retry_delay_seconds": 5, "retry_condition_fn": _may_pass} if retries else {}
    made = task(name=name, cache_policy=NO_CACHE, persist_result=False, retries=retries, **again)(step)
    return cast("Callable[P, R]", made)


def _reproduce(project: Project) -> list[str]:
    ran = steps.reproduce(project)
    get_run_logger().info("DVC ran: %s", ", ".join(ran) or "nothing")
    return ran


def _fit(night: Night, run_id: str, work: Work) -> TrainResult:
    """Trains here, or in the work pool of `train.work_pool`. A retry resumes at the last finished epoch."""
    if night.settings.train.work_pool:
        from flows.training import request_training

        return request_training(night, run_id, work.folder)
    from flows.slots import device_slot

    with device_slot() as environment:
        return steps.fit(night, run_id, work, environment)


_write_backup = _task("back up", steps.back_up)
TASKS = cycle.Steps(
    version_data=_task("version data", steps.version_data, retries=2),
    reproduce=_task("reproduce", _reproduce, retries=2),
    assign=_task("assign splits", steps.assign),
    open_run=_task("open MLflow run", steps.open_run, retries=2),
    fit=_task("fit", _fit, retries=1),
    evaluate=_task("evaluate", steps.evaluate),
    register=_task("register", steps.register, retries=2),
    judge=_task("judge", steps.judge),
    promote=_task("promote", steps.promote),
    publish=show.report,
)


@flow(
    name="nightly",
    persist_result=False,
    validate_parameters=False,
    on_failure=[alerts.on_failure],
    on_crashed=[alerts.on_failure],
)
def nightly(project: str, force: bool = False) -> NightResult | State:
    """Runs the whole cycle once for the project folder `project`.

    At most one run holds a project: if another one does, the flow ends as Cancelled and changes nothing.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        die_with_parent()  # in a worker: no run outlives its worker and keeps holding the project
    here = Project(Path(project))
    newer = superseded()
    if newer is not None:
        return Cancelled(message=f"a newer night is also due: {newer} does the work of both")
    try:
        with run_lock(here):
            result = _cycle(here, force)
    except RunActive as error:
        return Cancelled(message=error.message)
    except Exception:
        _back_up(here)  # a backup matters most after nights that fail
        raise
    nightly_log.write(here, outcome=result.outcome, run_id=result.run_id)
    _back_up(here)
    return result


def _cycle(project: Project, force: bool) -> NightResult:
    settings = project.settings()
    result = cycle.run(Night(project, settings, steps.open_registry(project, settings)), force=force, steps=TASKS)
    if result.outcome == "unchanged":
        show.unchanged(result)
    return result


def _back_up(project: Project) -> None:
    """The backup of `backup.keep`. A failure is reported (webhook, doctor, the task's state) and fails nothing else."""
    from sora.operations import backup

    try:
        settings = project.settings()
        if settings.backup.keep:
            _write_backup(project, settings)
    except Exception as error:
        reason, fix = (error.message, error.fix) if isinstance(error, SoraError) else (repr(error), "")
        say(f"the backup failed: {reason}")
        with suppress(OSError, SoraError):  # the disk may be full
            backup.note_failure(project, reason)
        alerts.backup_failed(project, reason=reason, fix=fix)
