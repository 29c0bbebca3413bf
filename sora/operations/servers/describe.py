"""How the project's Prefect and MLflow servers are started: their commands and environments.

Each server is one process: the vendors' start commands run a second process under the first, and that would outlive a
kill. Nothing of the user's own Prefect or MLflow set-up is read or written.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sora.config import Project
from sora.config.credentials import Login, secret
from sora.core import doorkeeper
from sora.core.processes import quiet_environment

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Server:
    """How to start one server. `probe` is a path that answers below 500 once it is ready."""

    name: str
    app: tuple[str, ...]  # uvicorn's application arguments
    probe: str
    url_path: str = ""  # at the end of the clients' address
    env: Mapping[str, str] = field(default_factory=dict)
    database: Path | None = None  # Prefect's, if it is a file
    login: Login | None = None  # the login it asks for; None: accounts of its own

    def environment(self, host: str, port: int) -> dict[str, str]:
        # Prefect's page asks this address, from the reader's browser; it would guess port 4200.
        api = f"http://{host}:{port}/api" if host == LOOPBACK else "/api"
        own = ",".join(f"http://{name}:{port}" for name in (LOOPBACK, "localhost"))
        pages = {"PREFECT_UI_API_URL": api, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": own}
        inherited = quiet_environment(**{**pages, **self.env})
        if doorkeeper.HOSTS not in self.env:
            inherited.pop(doorkeeper.HOSTS, None)
        return inherited

    def command(self, host: str, port: int) -> list[str]:
        options = ["--host", host, "--port", str(port), "--log-level", "warning", "--no-access-log"]
        # Open pages keep connections; they must not delay the shutdown.
        return [sys.executable, "-m", "uvicorn", *self.app, *options, "--timeout-graceful-shutdown", "2"]


def prefect_server(
    project: Project, *, schedules: bool = False, login: Login | None = None, env: Mapping[str, str] | None = None
) -> Server:
    """Prefect's API and pages.

    Args:
        schedules: it also creates scheduled runs and marks late ones (`sora up` only).
        login: what it asks for; by default the project's secret.
    """
    home = project.server_home("prefect")
    asked = login or secret(project)
    on = str(schedules).lower()
    return Server(
        name="prefect",
        app=("--factory", "flows.server:create_app", "--lifespan", "on"),
        probe="/api/health",
        url_path="/api",
        env={
            **prefect_environment(project),
            "PREFECT_SERVER_API_AUTH_STRING": asked.auth_string,
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{project.database('prefect')}",
            # The default keeps leases in memory: a slot held when server and holder die would stay taken forever.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # else it writes into the installed package
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": on,
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": on,
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            **(env or {}),
        },
        database=project.database("prefect"),
        login=asked,
    )


def mlflow_server(project: Project, *, app: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Server:
    """MLflow's API and pages, artifacts through the server. The variables are those that `mlflow server` sets.

    Args:
        app: uvicorn's arguments for an application with accounts of its own; by default all is behind the project's
            secret.
    """
    login = None if app else secret(project)
    database = f"sqlite:///{project.database('mlflow')}"
    return Server(
        name="mlflow",
        app=tuple(app) or ("--factory", "sora.registry.server:create_app"),
        probe="/api/2.0/mlflow/experiments/get?experiment_id=0",  # creates the database; /health does not
        env={
            "_MLFLOW_SERVER_FILE_STORE": database,
            "_MLFLOW_SERVER_REGISTRY_STORE": database,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(project.artifacts),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs of generative models: processes that we don't need
            **({doorkeeper.LOGIN: login.auth_string} if login else {}),
            **(env or {}),
        },
        login=login,
    )


def server_of(project: Project, name: str) -> Server:
    """The server `name` ("prefect", "mlflow") with the project's secret as its login."""
    return prefect_server(project) if name == "prefect" else mlflow_server(project)


def prefect_environment(project: Project) -> dict[str, str]:
    """Keeps Prefect's clients and servers away from the user's own profile."""
    home = project.server_home("prefect")
    return {"PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}
