"""Real servers for tests: one MLflow server for the whole session, started as Sora starts it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from sora.config import Project
from sora.config.credentials import secret, secret_file
from sora.operations.servers import mlflow_server, running, start, stop


def make_project(root: Path, text: str = "name: tested\n") -> Project:
    """A folder with params.yaml and nothing else."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(text, encoding="utf-8")
    return Project(root)


# All servers of a test session have one secret, so that its programs may know it from the environment.
LOGIN = ("sora", "the-secret-of-the-tests-servers")


@contextmanager
def prefect_client(project: Project) -> Iterator[httpx.Client]:
    """A plain HTTP client of the project's own Prefect, with what its server asks for: the secret and a CSRF token."""
    address, login = running(project)["prefect"].url, secret(project).pair
    with httpx.Client(base_url=address, auth=login, timeout=30, trust_env=False) as client:
        token = client.get("/csrf-token", params={"client": "tests"}).raise_for_status().json()["token"]
        client.headers.update({"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "tests"})
        yield client


@contextmanager
def mlflow(root: Path) -> Iterator[tuple[str, int]]:
    """Address and process number of an MLflow server whose state lies in `root/.sora`.

    Clients find its login in the environment, as for any server elsewhere.
    """
    project = make_project(root)
    project.state.mkdir(parents=True, exist_ok=True)
    secret_file(project).write_text(":".join(LOGIN))
    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = LOGIN
    (server,) = start(project, [mlflow_server(project)], owner="test")
    try:
        yield server.url, server.pid
    finally:
        stop([server.process])
