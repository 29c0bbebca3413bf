"""The outermost layer, around every route: request id, security headers, tokens, the Host check, log line, metrics.

Plain ASGI: Starlette's `BaseHTTPMiddleware` would put a task and a queue around every body.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sora.core.addresses import is_loopback
from sora.serving.problems import Problem
from sora.serving.tokens import Tokens

access = logging.getLogger("sora.serving.access")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/", "/healthz", "/readyz", "/openapi.json")  # these answer without a token; so does everything below /page/
_READING = ("GET", "HEAD", "OPTIONS", "TRACE")  # methods that change nothing
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "geolocation=(), microphone=(), payment=()",
}


class Guard:
    """ASGI middleware.

    Arguments:
        tokens: if they are required, `/v1/*` and `/metrics` need one. If not, only requests that name this
            machine as their host are answered, since a page on the internet can make a browser call any address, by a
            name of its own. The token's name is in `request.state.token` ("" without one) and in the log;
            `request.state.review` says whether the caller may decide about corrections.
        origins: of other pages that may send requests that change something.
        on_request: called with (route, method, status, token's name, seconds).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Tokens,
        on_request: Callable[[str, str, int, str, float], None],
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._origins = frozenset(origins)
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        caller = self._tokens.caller(headers.get("authorization"))
        token = caller.name if caller else ""
        # Without tokens every caller is at this machine, like its operator.
        review = caller.review if caller else not self._tokens.required
        scope.setdefault("state", {}).update(request_id=request_id, token=token, review=review)
        start = time.perf_counter()
        status = 499  # the client went away before an answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    out.setdefault(name, value)
                out["x-request-id"] = request_id
                out.setdefault("cache-control", "no-store")
            await send(message)

        try:
            problem = self._refusal(scope, headers, caller is not None)
            await (problem.response() if problem else self._app)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - start
            # The route's template, never the path: so the names in metrics and logs are bounded.
            route = getattr(scope.get("route"), "path", None) or ("/page" if "/page/" in scope["path"] else "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"
            self._on_request(route, method, status, token, seconds)
            line = {
                "event": "request",
                "id": request_id,
                "method": method,
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 1),
                "client": (scope.get("client") or ("",))[0],
                **({"token": token} if token else {}),
                **scope["state"].get("log", {}),
            }
            access.info(json.dumps(line))

    def _refusal(self, scope: Scope, headers: Headers, allowed: bool) -> Problem | None:
        path = scope["path"]
        if self._tokens.required:
            if path not in _OPEN and not path.startswith("/page/") and not allowed:
                return Problem(
                    401,
                    "this server needs a bearer token",
                    fix="send the header `Authorization: Bearer …` with a token that `sora token add NAME` made there",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif not names_this_machine(headers.get("host", "")):
            return Problem(
                403,
                "without tokens, only requests to this machine by its own name are answered",
                fix="call http://127.0.0.1:… or http://localhost:…, or make a token (`sora token add NAME`)",
            )
        if scope["method"] not in _READING and not self._is_own_page(scope, headers):
            return Problem(
                403,
                "a page of another origin sent this",
                fix="use this server's own page, or a program; if a proxy changes the Host header, list the "
                "page's origin in serve.origins",
                kind="other-origin",
            )
        return None

    def _is_own_page(self, scope: Scope, headers: Headers) -> bool:
        """Whether this came from no browser, or from this server's own page in one.

        Browsers state the relation themselves (Sec-Fetch-Site); older ones, or those with a page without TLS, only the
        page's origin. A request with neither comes from a program: a browser adds Origin to whatever changes something.
        """
        origins = headers.getlist("origin")
        if any(origin in self._origins for origin in origins):
            return len(origins) == 1
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site in ("same-origin", "none")
        # uvicorn takes the scheme from a trusted proxy (X-Forwarded-Proto).
        own = f"{scope['scheme']}://{headers.get('host', '')}"
        if not origins:
            return True
        page = _parts(origins[0])
        return len(origins) == 1 and page is not None and page == _parts(own)


def names_this_machine(host: str) -> bool:
    """Whether a Host header, with a port or without, means the loopback interface."""
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::[0-9]{1,5})?", host)
    return is_loopback(bracketed[1] if bracketed else re.sub(r":[0-9]{1,5}$", "", host))


def _parts(origin: str) -> tuple[str, str, int] | None:
    """Scheme, host and port, including a default port; None if it is not an origin (`null`)."""
    matched = re.fullmatch(r"(https?)://([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?", origin)
    if matched is None:
        return None
    scheme, host, port = matched.groups()
    return scheme, host.lower(), int(port) if port else {"http": 80, "https": 443}[scheme]
