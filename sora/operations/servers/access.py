"""What a client of the servers needs: addresses, logins, an environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sora.config import Project
from sora.config.credentials import Login, secret
from sora.core.errors import ServiceError
from sora.operations.servers.describe import prefect_environment
from sora.operations.servers.recorded import running


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the servers answer; None for a server that was not asked for."""

    prefect_api_url: str | None = None
    mlflow_tracking_uri: str | None = None


def environment(project: Project, addresses: Addresses) -> dict[str, str]:
    """What a process needs in its environment to use the servers at `addresses`."""
    env = prefect_environment(project)
    if addresses.prefect_api_url:
        env["PREFECT_API_URL"] = addresses.prefect_api_url
    if addresses.mlflow_tracking_uri:
        env["MLFLOW_TRACKING_URI"] = addresses.mlflow_tracking_uri
    own = login(project, "prefect")
    if own is not None:
        env["PREFECT_API_AUTH_STRING"] = own.auth_string
    elif given := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        env["PREFECT_API_AUTH_STRING"] = os.environ.get("PREFECT_API_AUTH_STRING", given)
    return env


def login(project: Project, name: str) -> Login | None:
    """The login for the project's server `name` ("prefect", "mlflow").

    None if the environment has it (PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME and _PASSWORD): for servers
    that params.yaml names, those with accounts of their own (`sora up --host`), and while none runs here.
    """
    services = project.settings().services
    if services.prefect_api_url if name == "prefect" else services.mlflow_tracking_uri:
        return None
    return own_login(project, name)


def own_login(project: Project, name: str) -> Login | None:
    """`login` if params.yaml names no server."""
    entry = running(project).get(name)
    return None if entry is None or entry.login == "account" else secret(project)


def mlflow_address(project: Project) -> str:
    """MLflow's address for a process that starts no servers: a flow run or a worker.

    Raises:
        ServiceError: params.yaml names none, none runs here, and MLFLOW_TRACKING_URI is not set.
    """
    configured = project.settings().services.mlflow_tracking_uri
    entry = running(project).get("mlflow")
    address = configured or (entry.url if entry else None) or os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise ServiceError(
            f"no MLflow server is running for {project.root}",
            fix="start one with `sora up`, or set services.mlflow_tracking_uri in params.yaml",
        )
    return address
