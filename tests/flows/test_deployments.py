from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows import deployments
from sora.config import Project
from sora.core.errors import ServiceError
from sora.core.processes import quiet_environment
from sora.operations import nightly_log


def _project(root: Path, params: str) -> Project:
    root.mkdir(exist_ok=True)
    (root / "params.yaml").write_text(params)
    return Project(root)


def _read(name: str) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(name)


def _facts(deployment: Any) -> dict[str, Any]:
    """What two ways of registering must have alike."""
    return {
        "name": deployment.name,
        "entrypoint": deployment.entrypoint,
        "schedules": [(s.schedule.cron, s.schedule.timezone, s.active, s.slug) for s in deployment.schedules],
        "parameters": deployment.parameters,
        "pool": deployment.work_pool_name,
        "job_variables": deployment.job_variables,
        "tags": deployment.tags,
        "pull_steps": deployment.pull_steps or [],
        "limit": deployment.global_concurrency_limit,
    }


def test_registering_twice_leaves_one_nightly_on_its_schedule(prefect_server: str, tmp_path: Path) -> None:
    project = _project(tmp_path, "name: twice\nschedule: {cron: '30 1 * * *', timezone: Europe/Berlin}\n")
    first = deployments.register(project, prefect_server)
    second = deployments.register(project, prefect_server)
    assert first == second == deployments.Registered("sora-twice", "nightly/twice", None, None)
    facts = _facts(_read("nightly/twice"))
    assert facts == {
        "name": "twice",
        "entrypoint": "flows.nightly.nightly",
        "schedules": [("30 1 * * *", "Europe/Berlin", True, "nightly")],
        "parameters": {"project": str(tmp_path)},
        "pool": "sora-twice",
        "job_variables": {"working_dir": str(tmp_path)},
        "tags": ["sora"],
        "pull_steps": [],
        "limit": None,  # it could stay taken when worker and server are killed
    }
    (tmp_path / "params.yaml").write_text("name: twice\nschedule: {cron: '0 4 * * *'}\n")
    deployments.register(project, prefect_server)
    assert _facts(_read("nightly/twice"))["schedules"] == [("0 4 * * *", "UTC", True, "nightly")]


def test_registering_starts_the_watch_for_missing_nightlies(prefect_server: str, tmp_path: Path) -> None:
    project = _project(tmp_path, "name: watch\n")
    deployments.register(project, prefect_server)
    entry = nightly_log.read(project)
    assert entry is not None and entry.outcome == nightly_log.REGISTERED
    nightly_log.write(project, "promoted", "r1")
    deployments.register(project, prefect_server)
    kept = nightly_log.read(project)
    assert kept is not None and kept.outcome == "promoted"


def test_training_is_a_deployment_of_its_own_in_its_pool(prefect_server: str, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="gpu-theirs", type="process", description="as its owner made it"))
    project = _project(tmp_path, "name: remote\ntrain: {work_pool: gpu-theirs}\n")
    registered = deployments.register(project, prefect_server)
    assert (registered.train, registered.train_pool) == ("train/remote", "gpu-theirs")
    facts = _facts(_read("train/remote"))
    assert facts["entrypoint"] == "flows.training.train"
    assert facts["schedules"] == [] and facts["job_variables"] == {}
    with get_client(sync_client=True) as client:
        assert client.read_work_pool("gpu-theirs").description == "as its owner made it"


def test_no_server_is_a_clear_error(prefect_server: str, tmp_path: Path) -> None:
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    project = _project(tmp_path, "name: down\n")
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(ServiceError, match=r"the Prefect server at http://127\.0\.0\.1:9/api"),
    ):
        deployments.register(project, "http://127.0.0.1:9/api")
    assert nightly_log.read(project) is None


def test_of_the_nights_that_are_due_after_a_weekend_only_the_newest_runs(prefect_server: str, tmp_path: Path) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.objects import FlowRun
    from prefect.flow_engine import run_flow

    project = _project(tmp_path, "name: weekend\nschedule: {cron: '0 2 * * *'}\n")
    deployments.register(project, prefect_server)
    deployment = _read("nightly/weekend").id
    weekend_ago = datetime.now(UTC) - timedelta(days=3)
    with get_client(sync_client=True) as client:
        # As the server's scheduler would have done three days ago.
        client._client.post(
            f"/deployments/{deployment}/schedule",
            json={"start_time": weekend_ago.isoformat(), "min_runs": 5},
        ).raise_for_status()
        found = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))

    def start(run: FlowRun) -> datetime:
        assert run.expected_start_time is not None
        return run.expected_start_time

    runs = sorted(found, key=start)
    due = [run for run in runs if start(run) < datetime.now(UTC)]
    assert len(due) == 3 < len(runs)  # those of tonight and tomorrow count for nothing yet

    @flow
    def asks(project: str) -> str:
        return str(deployments.superseded())

    answers = [run_flow(asks, flow_run=run, parameters=run.parameters) for run in due]
    assert answers == [due[-1].name, due[-1].name, "None"]
    assert asks("here") == "None"  # started by a person


def test_prefect_yaml_says_the_same_as_register(prefect_server: str, repository: Path, tmp_path: Path) -> None:
    for name in ("params.yaml", "prefect.yaml"):
        shutil.copy(repository / name, tmp_path)
    project = Project(tmp_path)
    deployments.register(project, prefect_server)
    name = f"nightly/{project.settings().name}"
    registered = _facts(_read(name))
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=tmp_path,
        env=quiet_environment(PWD=str(tmp_path), PREFECT_API_URL=prefect_server, NO_COLOR="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert _facts(_read(name)) == registered
