"""Who may talk to Prefect's and MLflow's servers: ASGI middleware around the vendors' applications.

Loopback is no protection: every user of the machine reaches it, and so does every page open in a browser here, from its
own address (the Origin) or under its own name that it points at this machine (the Host). The servers of a project
answer requests that use the server's name, that come from its own pages or from programs, and that know the
project's secret.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sora.core.addresses import is_loopback

# Environment of a server's process.
HOSTS = "SORA_SERVER_HOSTS"  # names by which others reach it, separated by commas; not set: loopback only
LOGIN = "SORA_SERVER_LOGIN"  # `user:password`


class Doorkeeper:
    """ASGI middleware for HTTP and websockets.

    Args:
        hosts: names that the server answers to besides loopback. An address (`10.0.0.7`) is then also accepted: only a
            name can be pointed at a machine by a stranger. None: only loopback.
        login: `user:password` that every request must carry; None if the application itself asks.
        open_paths: answered (GET, HEAD) without the login: for probes.
        realm: what a browser shows when it asks for the login.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str] | None = None,
        login: str | None = None,
        open_paths: tuple[str, ...] = (),
        realm: str = "sora",
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._login = None if login is None else login.encode()
        self._open = open_paths
        self._challenge = {"WWW-Authenticate": f'Basic realm="{realm}", charset="UTF-8"'}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            status, reason = refusal
            headers = self._challenge if status == 401 else None
            await PlainTextResponse(f"{reason}\n", status, headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        if not self._known(host):
            return 403, "this server does not go by that name"
        origin = headers.get("origin")
        if origin is not None and not _same_site(origin.lower(), host):
            return 403, "a page of another site sent this"
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return 403, "a page of another site sent this"
        probe = scope["path"] in self._open and scope.get("method") in ("GET", "HEAD")
        if self._login is not None and not probe and not self._knows_login(headers.getlist("authorization")):
            return 401, "log in with the user and the password in the project's file .sora/secret"
        return None

    def _known(self, host: str) -> bool:
        name = _name(host)
        if is_loopback(name):
            return True
        if self._hosts is None:
            return False
        return name in self._hosts or _is_address(name)

    def _knows_login(self, given: list[str]) -> bool:
        assert self._login is not None
        scheme, _, text = (given[0] if len(given) == 1 else "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            login = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(login, self._login)


def hosts_of(environment: Mapping[str, str] = os.environ) -> frozenset[str] | None:
    """The names in `HOSTS`; None if it is not set."""
    text = environment.get(HOSTS)
    return None if text is None else frozenset(_name(name.strip().lower()) for name in text.split(",") if name.strip())


def _name(host: str) -> str:
    """A Host header without its port; "" if it is not one."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(:[0-9]{1,5})?", host)
    return match[1].strip("[]") if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_site(origin: str, host: str) -> bool:
    """Whether a page of `origin` is the server's own: the same name and port, or another of loopback's names."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
        return False
    if parts.netloc == host:
        return True
    ours = re.search(r":([0-9]+)$", host)
    same_port = (port or 80) == (int(ours[1]) if ours else 80)
    return same_port and is_loopback(_name(parts.netloc)) and is_loopback(_name(host))
