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
    """Where the servers answer; None for one that was not asked for."""

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
    """What to tell the server `name` ("prefect", "mlflow") of the project.

    None where the environment says it (PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME and _PASSWORD): for servers
    that params.yaml names, those with accounts of their own (`sora up --host`), and while none runs here.
    """
    services = project.settings().services
    if services.prefect_api_url if name == "prefect" else services.mlflow_tracking_uri:
        return None
    return own_login(project, name)


def own_login(project: Project, name: str) -> Login | None:
    """`login` where params.yaml names no server."""
    entry = running(project).get(name)
    return None if entry is None or entry.login == "account" else secret(project)


def mlflow_address(project: Project) -> str:
    """MLflow's address for a process that starts no servers: a flow run, a worker.

    Raises:
        ServiceError: params.yaml names none, none runs here, and MLFLOW_TRACKING_URI is not set.
    """
    configured = project.settings().services.mlflow_tracking_uri
    entry = running(project).get("mlflow")
    address = configured or (entry.url if entry else None) or os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise ServiceError(
            f"no MLflow server runs for {project.root}",
            fix="start one with `sora up`, or set services.mlflow_tracking_uri in params.yaml",
        )
    return address
