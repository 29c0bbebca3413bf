"""Registers a project with a Prefect server: work pools, `nightly/<name>` with its schedule, `train/<name>`.

Every registration can be repeated. There is no Prefect-side concurrency limit on the nightly: a limit that cancels new
runs stays taken when worker and server are killed together, and would cancel every later night. The project's file
lock, which the kernel releases, allows at most one run at a time.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.client import prefect_client
from sora.config import Project, Settings
from sora.operations import nightly_log

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient

NIGHTLY = "flows.nightly.nightly"
TRAIN = "flows.training.train"


@dataclass(frozen=True, slots=True)
class Registered:
    """Names on the Prefect server."""

    pool: str  # the work pool of the nightly; its worker runs beside the project
    nightly: str  # deployments, "flow/name"
    train: str | None
    train_pool: str | None


def pool_name(settings: Settings) -> str:
    return f"sora-{settings.name}"


def register(project: Project, api_url: str) -> Registered:
    """Creates or updates the project's work pools and deployments on the server at `api_url`.

    The nightly is imported from the installed package in the project's folder, so any folder works and no code
    is sent. Earlier scheduled or late runs are dropped: from now on only the schedule in params.yaml counts.

    Raises:
        ServiceError: the server does not answer, or refuses.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    settings = project.settings()
    with temporary_settings({PREFECT_API_URL: api_url}):
        registered = _register(project, settings)
    if nightly_log.read(project) is None:
        nightly_log.write(project, nightly_log.REGISTERED)  # from now on a missing nightly is noticed
    return registered


def _register(project: Project, settings: Settings) -> Registered:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    pool = pool_name(settings)
    schedule = CronSchedule(cron=settings.schedule.cron, timezone=settings.schedule.timezone)
    with prefect_client() as client:
        _ensure_pool(client, pool)
        _deploy(
            client,
            settings.name,
            NIGHTLY,
            pool,
            schedules=[DeploymentScheduleCreate(schedule=schedule, active=True, slug="nightly")],
            parameters={"project": str(project.root)},
            job_variables={"working_dir": str(project.root)},
        )
        train_pool = settings.train.work_pool
        if train_pool:
            _ensure_pool(client, train_pool)
            # It has no folder: each worker knows its own clone (SORA_PROJECT).
            _deploy(client, settings.name, TRAIN, train_pool)
    return Registered(pool, f"nightly/{settings.name}", f"train/{settings.name}" if train_pool else None, train_pool)


def _ensure_pool(client: SyncPrefectClient, name: str) -> None:
    """Creates a process pool; one that exists, of any type, is left as its owner made it."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        with suppress(ObjectAlreadyExists):  # somebody else was quicker
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))


def _deploy(client: SyncPrefectClient, name: str, entrypoint: str, pool: str, **options: Any) -> None:
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint)
    client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=name,
        entrypoint=entrypoint,
        work_pool_name=pool,
        description=(flow.description or "").split("\n\n")[0],
        tags=["sora"],
        parameter_openapi_schema=parameter_schema(flow).model_dump(),
        enforce_parameter_schema=True,
        **options,
    )


def superseded() -> str | None:
    """In a flow run: the name of a newer scheduled run of the same deployment that is also due, if there is one.

    After a weekend without a worker several nights are due at once. The newest does all the work; the others should
    end as cancelled. None outside a deployment's scheduled run: a run that a person starts is never superseded.
    """
    from datetime import UTC, datetime

    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
    )
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None or not run.auto_scheduled or run.expected_start_time is None:
        return None
    with prefect_client() as client:
        newer = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
            flow_run_filter=FlowRunFilter(
                expected_start_time=FlowRunFilterExpectedStartTime.model_validate(
                    {"after_": run.expected_start_time, "before_": datetime.now(UTC)}
                )
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=20,
        )
    for other in newer:
        # `after_` includes the moment itself
        if other.auto_scheduled and other.expected_start_time and other.expected_start_time > run.expected_start_time:
            return other.name
    return None
