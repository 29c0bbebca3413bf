"""The routes of the API and of the page's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from sora.core.answers import Alive, ModelAnswer, PredictAnswer, PredictAnswers, Ready
from sora.serving.context import Context, Wanted
from sora.serving.metrics import CONTENT_TYPE
from sora.serving.problems import Problem
from sora.serving.schemas import UPLOAD_BODY, problem_answers

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {"page.css": "text/css", "icon.svg": "image/svg+xml"} | dict.fromkeys(
    ("page.js", "dom.js", "model.js", "video.js", "answer.js", "review.js"), "text/javascript"
)


def add_routes(app: FastAPI, context: Context) -> None:
    @app.post(
        "/v1/predict",
        response_model=PredictAnswer | PredictAnswers,
        response_model_exclude_defaults=True,
        response_class=JSONResponse,
        openapi_extra={"requestBody": UPLOAD_BODY},
        responses=problem_answers(400, 401, 403, 408, 413, 415, 422, 429, 503, 504, 507),
        summary="The answer for one video file, or for each of several",
    )
    async def predict(
        request: Request,
        timeline: Annotated[bool, Query(description="the answer per clip, also for a video that is one clip")] = False,
        embedding: Annotated[bool, Query(description="the video's vector too, as from `sora embed`")] = False,
    ) -> PredictAnswer | PredictAnswers:
        return await context.predict(request, Wanted(timeline, embedding))

    @app.get("/v1/model", response_class=JSONResponse, responses=problem_answers(401, 403), summary="What is served")
    async def model() -> ModelAnswer:
        return context.model()

    @app.get("/healthz", responses=problem_answers(403), summary="Is the process alive?")
    async def healthz() -> Alive:
        return Alive(status="alive")

    @app.get("/readyz", responses=problem_answers(403, 503), summary="Can it predict?")
    async def readyz() -> Ready:
        if context.stopping:
            raise Problem(503, "this server is about to stop", fix="ask another one", kind="stopping")
        return Ready(status="ready", version=context.served().champion.version)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problem_answers(401, 403)},
        summary="For Prometheus",
    )
    async def metrics() -> Response:
        return Response(context.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", media_type="text/html", headers={"cache-control": "no-cache"})

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_FILES:
            raise Problem(404, "no such file", fix="open /")
        return FileResponse(PAGE / name, media_type=_PAGE_FILES[name], headers={"cache-control": "no-cache"})
