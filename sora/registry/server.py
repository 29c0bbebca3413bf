"""MLflow's application behind the doorkeeper: `uvicorn --factory sora.registry.server:create_app`."""

from __future__ import annotations

import os

from starlette.types import ASGIApp

from sora.core.doorkeeper import LOGIN, Doorkeeper, hosts_of
from sora.core.errors import InputError


def create_app() -> ASGIApp:
    """Everything but `/health` needs the login: pages, interface and artifacts.

    Raises:
        InputError: there is no login in the environment; without one MLflow would answer everybody.
    """
    login = os.environ.pop(LOGIN, "")
    if ":" not in login:
        raise InputError(f"{LOGIN} is not set", fix="start the server with `sora up`")
    from mlflow.server.fastapi_app import app

    return Doorkeeper(app, hosts=hosts_of(), login=login, open_paths=("/health",), realm="MLflow")
