"""Prefect's application behind the doorkeeper: `uvicorn --factory flows.server:create_app`."""

from __future__ import annotations

from starlette.types import ASGIApp

from sora.core.doorkeeper import Doorkeeper, hosts_of


def create_app() -> ASGIApp:
    """Prefect itself asks for the login (PREFECT_SERVER_API_AUTH_STRING) at every path that shows or does anything: so
    its page, which has a form for it, can load."""
    from prefect.server.api.server import create_app as create_prefect

    return Doorkeeper(create_prefect(), hosts=hosts_of())
