"""The champion over HTTP: `create_app` makes the application, `serve` runs it for a project."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sora import __version__
from sora.errors import ServiceError, VideoError
from sora.serving import problems, uploads
from sora.serving.batcher import Batcher
from sora.serving.decoding import DecodePool
from sora.serving.follow import Follower, Refusal, Served
from sora.serving.guard import Guard, Tokens
from sora.serving.metrics import CONTENT_TYPE, Metrics
from sora.serving.problems import Problem
from sora.serving.source import ModelCache, ModelSource
from sora.settings import Serve

if TYPE_CHECKING:
    from sora.settings import Project

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
T = TypeVar("T")


class PredictAnswer(BaseModel):
    """The answer for one video: probabilities are the mean over its clips, calibrated."""

    filename: str
    label: str
    probabilities: dict[str, float]
    version: int
    data_version: str
    clips: int
    seconds: dict[str, float] = Field(description="by stage: upload, wait, decode, queue, model")
    unsure: bool | None = Field(None, description="below the model's threshold; absent where it has none")


class ModelAnswer(BaseModel):
    """What serves now, and how following the champion goes."""

    version: int | None
    classes: list[str]
    clip: dict[str, Any] | None
    data_version: str | None
    run_id: str | None
    digest: str | None
    temperature: float | None
    metrics: dict[str, float]
    since: str | None
    following: dict[str, Any]
    limits: dict[str, float]


class ProblemAnswer(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    mend: str


class Service:
    """What the routes share: one model reference, one decoding pool, one batcher, one folder for uploads."""

    def __init__(self, settings: Serve, source: ModelSource, cache: ModelCache) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.follower = Follower(
            source, cache, settings.poll_seconds, on_change=self._changed, on_refusal=self._refused
        )
        self.batcher = Batcher(self.metrics.batch.observe)
        self.folder = Path()
        self.pool: DecodePool | None = None
        self.active = 0  # predictions under way, from their first byte to their answer

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.folder = Path(tempfile.mkdtemp(prefix="sora-serve-"))
        self.pool = pool = DecodePool(self.settings, self.folder)
        self.metrics.watch("sora_predictions_active", "Predictions under way", lambda: self.active)
        self.metrics.watch("sora_queue_clips", "Portions of clips that wait for the model", lambda: len(self.batcher))
        self.metrics.watch("sora_decoders_replaced", "Decoders that died or were killed", lambda: pool.replaced)
        try:
            await self.pool.start()
            await self.batcher.start()
            await self.follower.start()
            yield
        finally:
            await self.follower.close()
            await self.batcher.close()
            await self.pool.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _changed(self, served: Served) -> None:
        self.metrics.version.set(served.champion.version)
        self.metrics.changes.inc()

    def _refused(self, refusal: Refusal) -> None:
        self.metrics.refusals.inc()

    def served(self) -> Served:
        """What serves now.

        Raises:
            Problem: 503, nothing does yet.
        """
        current = self.follower.current
        if current is not None:
            return current
        follower = self.follower
        if follower.none:
            detail, mend = "there is no champion yet", "run `sora run`: the first version that passes its gate serves"
        elif follower.refused is not None:
            detail, mend = follower.refused.reason, follower.refused.mend
        elif follower.problem is not None:
            detail, mend = follower.problem, "start MLflow (`sora up`); this server asks again by itself"
        else:
            detail, mend = "the model is being loaded", "ask again in a few seconds"
        raise Problem(503, detail, mend=mend, kind="no-model", headers={"Retry-After": "5"})

    async def predict(self, request: Request) -> dict[str, Any]:
        """One upload, from its bytes to its answer.

        Raises:
            Problem: see `problems`.
        """
        self.served()  # fail before the upload is read
        if self.active >= self.settings.queue:
            raise Problem(
                429,
                f"{self.settings.queue} predictions are under way, the most that this server takes",
                mend="try again after the seconds in Retry-After",
                kind="queue-full",
                headers={"Retry-After": "1"},
            )
        self.active += 1
        upload: uploads.Upload | None = None
        try:
            start = time.perf_counter()
            upload = await self._receive(request)
            uploaded = time.perf_counter() - start
            answer = await _unless_gone(request, self._answer(upload))
        finally:
            self.active -= 1
            if upload is not None:
                upload.remove()
        answer["seconds"] = {"upload": round(uploaded, 6), **answer["seconds"]}
        for stage, seconds in answer["seconds"].items():
            self.metrics.stage.labels(stage).observe(seconds)
        self.metrics.predictions.labels(str(answer["version"])).inc()
        request.state.log = {"version": answer["version"], "bytes": upload.bytes, "clips": answer["clips"]}
        return answer

    async def _receive(self, request: Request) -> uploads.Upload:
        headers, most = request.headers, self.settings.max_bytes
        boundary = uploads.check_headers(headers.get("content-type"), headers.get("content-length"), most)
        try:
            async with asyncio.timeout(self.settings.upload_timeout):
                return await uploads.receive(request.stream(), boundary, self.folder, most)
        except TimeoutError:
            raise Problem(
                408,
                f"the upload took longer than {self.settings.upload_timeout:g} s",
                mend="send a smaller file or use a faster line",
                headers={"Connection": "close"},
            ) from None

    async def _answer(self, upload: uploads.Upload) -> dict[str, Any]:
        assert self.pool is not None
        served = self.served()  # one version from the clip spec to the answer, whatever changes meanwhile
        predictor = served.predictor
        try:
            decoded = await self.pool.decode(upload.path, predictor.recipe.clip)
        except VideoError as error:
            error.message = error.message.replace(str(upload.path), upload.name).replace(upload.path.name, upload.name)
            raise problems.of_video(error, upload.name) from error
        answered = await self.batcher.answer(predictor, decoded.clips)
        prediction = predictor.answer(answered.probabilities)
        return {
            "filename": upload.name,
            **prediction.to_dict(),
            "data_version": served.champion.data_version,
            "clips": len(decoded.clips),
            "seconds": {
                "wait": round(decoded.waited, 6),
                "decode": round(decoded.seconds, 6),
                "queue": round(answered.queued, 6),
                "model": round(answered.seconds, 6),
            },
        }

    def model(self) -> dict[str, Any]:
        """The body of `/v1/model`; it answers before a model is loaded too, since it says why there is none."""
        current = self.follower.current
        champion = current.champion if current else None
        recipe = current.predictor.recipe if current else None
        limits = self.settings
        return {
            "version": champion.version if champion else None,
            "classes": list(recipe.classes) if recipe else [],
            "clip": recipe.clip.to_dict() if recipe else None,
            "data_version": champion.data_version if champion else None,
            "run_id": champion.run_id if champion else None,
            "digest": champion.digest if champion else None,
            "temperature": recipe.temperature if recipe else None,
            "metrics": champion.metrics if champion else {},
            "since": current.since if current else None,
            "following": self.follower.state(),
            "limits": {
                "bytes": limits.max_bytes,
                "seconds": limits.max_seconds,
                "pixels": limits.max_pixels,
                "frames": limits.max_frames,
            },
        }


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up (raises ClientDisconnect then)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(settings: Serve, source: ModelSource, cache: ModelCache, *, tokens: Sequence[str] = ()) -> FastAPI:
    """The application; its `state.service` is the `Service`.

    Arguments:
        settings: the section `serve` of params.yaml.
        source: where the champion is asked for.
        cache: where models are kept, and what is served when `source` can't answer.
        tokens: bearer tokens; none: only loopback requests are answered.
    """
    service = Service(settings, source, cache)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="Sora", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="A video classifier. Errors are problem documents (RFC 9457) that say the mend.",
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(
        Guard,
        tokens=Tokens(tokens),
        on_request=lambda route, method, status, seconds: _count(service.metrics, route, method, status, seconds),
    )
    _add_errors(app)
    _add_routes(app, service)
    return app


def _count(metrics: Metrics, route: str, method: str, status: int, seconds: float) -> None:
    metrics.requests.labels(route, method, str(status)).inc()
    metrics.latency.labels(route).observe(seconds)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        mend = "see /openapi.json for addresses and methods"
        return Problem(error.status_code, str(error.detail), mend=mend, headers=dict(error.headers or {})).response()

    @app.exception_handler(ServiceError)
    async def service(request: Request, error: ServiceError) -> Response:
        return Problem(503, error.message, mend=error.mend or "try again", headers={"Retry-After": "5"}).response()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        return Problem(500, f"request {request_id} failed inside the server", mend="report the request id").response()


def _problem_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {problems.MEDIA_TYPE: {"schema": ProblemAnswer.model_json_schema()}}
    return {status: {"description": problems.TITLES[status], "content": content} for status in statuses}


_UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary", "description": "a video file"}},
            }
        }
    },
}


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/predict",
        response_model=PredictAnswer,
        openapi_extra={"requestBody": _UPLOAD_BODY},
        responses=_problem_answers(400, 401, 408, 413, 415, 422, 429, 503, 507),
        summary="The answer for one video file",
    )
    async def predict(request: Request) -> Response:
        return JSONResponse(await service.predict(request))

    @app.get("/v1/model", response_model=ModelAnswer, responses=_problem_answers(401), summary="What serves now")
    async def model() -> Response:
        return JSONResponse(service.model())

    @app.get("/healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", responses=_problem_answers(503), summary="Can it predict?")
    async def readyz() -> dict[str, Any]:
        return {"status": "ready", "version": service.served().champion.version}

    @app.get("/metrics", response_class=Response, responses=_problem_answers(401), summary="For Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", media_type="text/html", headers={"cache-control": "no-cache"})

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_FILES:
            raise Problem(404, "no such file", mend="open /")
        return FileResponse(PAGE / name, media_type=_PAGE_FILES[name], headers={"cache-control": "no-cache"})


def serve(project: Project, host: str | None = None, port: int | None = None) -> None:
    """Serves the project's champion until SIGTERM or Ctrl-C; see `sora.serving.run`."""
    from sora.serving.run import run

    run(project, host, port)
