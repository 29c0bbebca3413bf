"""The application that answers for the champion over HTTP; `sora.serving.launch` serves it for a project."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sora import __version__
from sora.config import Serve
from sora.core.errors import ServiceError
from sora.dataset.corrections import Inbox
from sora.serving import card, explain, problems, routes
from sora.serving import inbox as corrections
from sora.serving.context import Context
from sora.serving.guard import Guard
from sora.serving.problems import Problem
from sora.serving.schemas import problem_answers
from sora.serving.source import ModelCache, ModelSource
from sora.serving.tokens import Tokens


def create_app(
    settings: Serve,
    source: ModelSource,
    cache: ModelCache,
    *,
    tokens: Tokens | Sequence[str] = (),
    inbox: Inbox | None = None,
) -> FastAPI:
    """The application. Its `state.context` is the `Context`, which must be `running` while the application answers;
    `listener.serve_until_stopped` sees to that.

    Arguments:
        settings: the section `serve` of params.yaml.
        source: where the server asks for the champion.
        cache: where models are kept, and what is served when `source` can't answer.
        tokens: who may call. If no token is required, only requests to this machine by its own name are answered.
        inbox: takes corrections. Without one there are no routes for them.
    """
    context = Context(settings, source, cache)
    app = FastAPI(
        title="Sora", version=__version__, docs_url=None, redoc_url=None,
        description="A video classifier. Errors are problem documents (RFC 9457) that say the fix.",
    )  # fmt: skip
    app.state.context = context
    app.add_middleware(
        Guard,
        tokens=tokens if isinstance(tokens, Tokens) else Tokens(tokens),
        on_request=context.metrics.count,
        origins=settings.origins,
    )
    _add_errors(app)
    routes.add_routes(app, context)
    uploaded = problem_answers(400, 401, 403, 408, 413, 415, 422, 429, 503, 504, 507)
    explain.add_routes(app, context, uploaded)
    card.add_routes(app, context, source, problem_answers(401, 403, 503))
    if inbox is not None:
        corrections.add_routes(app, context, inbox, uploaded, problem_answers(401, 403, 404, 409, 422, 503, 507))
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        fix = "see /openapi.json for addresses and methods"
        return Problem(error.status_code, str(error.detail), fix=fix, headers=dict(error.headers or {})).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        return Problem(400, wrong, fix="see /openapi.json for what is allowed").response()

    @app.exception_handler(ServiceError)
    async def later(request: Request, error: ServiceError) -> Response:
        return problems.of_service(error).response()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # the client is gone

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        return Problem(500, f"request {request_id} failed inside the server", fix="report the request id").response()
