"""What the routes share: one model reference, one pool of decoders, one batcher, one folder for uploads. And the path
of a prediction through them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from sora.config import Serve
from sora.core.answers import FileProblem, ModelAnswer, PredictAnswer, PredictAnswers, Span, Window
from sora.core.errors import ServiceError, VideoError
from sora.core.files import temporary_folder
from sora.core.records import ClipSpec
from sora.serving import problems, uploads
from sora.serving import timeline as timelines
from sora.serving.batcher import Batcher
from sora.serving.decode_pool import Decoded, DecodePool
from sora.serving.follow import Follower, Refusal, Served
from sora.serving.metrics import Metrics
from sora.serving.problems import Problem
from sora.serving.source import ModelCache, ModelSource


class Context:
    """The state behind the routes.

    Arguments:
        settings: the section `serve` of params.yaml.
        source: where the server asks for the champion.
        cache: where models are kept, and what is served when `source` can't answer.
    """

    def __init__(self, settings: Serve, source: ModelSource, cache: ModelCache) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.follower = Follower(
            source, cache, settings.poll_seconds, on_change=self._changed, on_refusal=self._refused
        )
        self.batcher = Batcher(self.metrics.batch.observe)
        self.folder = Path()
        self.pool: DecodePool | None = None
        self.stopping = False  # set while proxies are told that this server is about to stop
        self.active = 0  # calls for predictions in progress, from their first byte to their answer

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs everything that answers for the length of the block.

        Raises:
            DiskFull, ServiceError: the temporary folder can't be written.
        """
        with temporary_folder("uploads") as self.folder:
            self.pool = pool = DecodePool(self.settings)
            self.metrics.watch("sora_predictions_active", "Predictions in progress", lambda: self.active)
            self.metrics.watch(
                "sora_queue_clips", "Portions of clips that are waiting for the model", lambda: len(self.batcher)
            )
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

    def _changed(self, served: Served) -> None:
        self.metrics.version.set(served.champion.version)
        self.metrics.changes.inc()

    def _refused(self, refusal: Refusal) -> None:
        self.metrics.refusals.inc()

    def served(self) -> Served:
        """The served champion.

        Raises:
            Problem: 503, there is none yet.
        """
        current = self.follower.current
        if current is not None:
            return current
        follower = self.follower
        if follower.none:
            detail, fix = "there is no champion yet", "run `sora run`: the first version that passes its gate serves"
        elif follower.refused is not None:
            detail, fix = follower.refused.reason, follower.refused.fix
        elif follower.problem is not None:
            detail, fix = follower.problem, "start MLflow (`sora up`); this server retries by itself"
        else:
            detail, fix = "the model is being loaded", "ask again in a few seconds"
        raise Problem(503, detail, fix=fix, kind="no-model", headers={"Retry-After": "5"})

    async def predict(self, request: Request, wanted: Wanted) -> PredictAnswer | PredictAnswers:
        """One call, from its bytes to its answer: for its one file, or for each of several.

        Raises:
            Problem: see `problems`.
        """
        self.served()  # fail before the upload is read
        deadline = self.deadline()
        received: list[uploads.Upload] = []
        with self.place():
            try:
                start = time.perf_counter()
                received = await self._receive(request)
                uploaded = round(time.perf_counter() - start, 6)
                served = self.served()  # one version for the whole call, whatever changes meanwhile
                answers: list[PredictAnswer | FileProblem]
                async with while_connected(request):
                    if len(received) == 1:
                        answers = [await self._one(received[0], served, deadline, wanted)]
                    else:
                        answers = await self._each(received, served, deadline, wanted)
            finally:
                for upload in received:
                    upload.remove()
        answers = [
            replace(answer, seconds={"upload": uploaded, **answer.seconds})
            if isinstance(answer, PredictAnswer)
            else answer
            for answer in answers
        ]
        good = [answer for answer in answers if isinstance(answer, PredictAnswer)]
        for answer in good:
            self._count(answer)
        request.state.log = {
            "version": served.champion.version,
            "bytes": sum(upload.bytes for upload in received),
            "clips": sum(answer.clips for answer in good),
        }
        if len(received) == 1:
            return good[0]
        request.state.log |= {"files": len(received), "refused": len(answers) - len(good)}
        return PredictAnswers(answers=tuple(answers))

    def _count(self, answer: PredictAnswer) -> None:
        for stage, seconds in answer.seconds.items():
            self.metrics.stage.labels(stage).observe(seconds)
        self.metrics.predictions.labels(str(answer.version)).inc()

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the server's `serve.queue` places, from a call's first byte to its answer.

        Raises:
            Problem: 429, no place is free.
        """
        if self.active >= self.settings.queue:
            raise Problem(
                429,
                f"{self.settings.queue} predictions are in progress, the most that this server accepts",
                fix="try again after the seconds in Retry-After",
                kind="queue-full",
                headers={"Retry-After": "1"},
            )
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def _receive(self, request: Request) -> list[uploads.Upload]:
        """The files of a call, at most `serve.max_files`. The caller removes them.

        Raises:
            Problem: 408 too slow, and what `uploads` raises.
        """
        headers, settings = request.headers, self.settings
        most = settings.max_bytes
        boundary = uploads.check_headers(headers.get("content-type"), headers.get("content-length"), most)
        async with uploads.within(min(settings.upload_timeout, settings.request_timeout)):
            return await uploads.receive(request.stream(), boundary, self.folder, most, settings.max_files)

    async def _each(
        self, received: Sequence[uploads.Upload], served: Served, deadline: float, wanted: Wanted
    ) -> list[PredictAnswer | FileProblem]:
        """An answer or a problem for each file. As many at a time as there are decoders: a call with many
        files takes turns with the others."""
        turns = asyncio.Semaphore(self.settings.decode_workers)

        async def one(upload: uploads.Upload) -> PredictAnswer | FileProblem:
            async with turns:
                try:
                    return await self._one(upload, served, deadline, wanted)
                except Problem as problem:
                    return problem.of_file(upload.name)
                except ServiceError as error:
                    return problems.of_service(error).of_file(upload.name)
                finally:
                    upload.remove()

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(upload)) for upload in received]
        except ExceptionGroup as failed:  # the server's own failure: one entry in the log, as with one file
            raise failed.exceptions[0] from failed
        return [task.result() for task in tasks]

    async def _one(self, upload: uploads.Upload, served: Served, deadline: float, wanted: Wanted) -> PredictAnswer:
        async with self.until(deadline) as stage:
            return await self._answer(upload, served, wanted, stage)

    def deadline(self) -> float:
        """When a call that starts now must be answered, by the loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.request_timeout

    @asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[Stage]:
        """The work on one video. It is cancelled at `deadline`, and its place becomes free. The block records
        in the stage that it gets how far it is.

        Raises:
            Problem: 504, the time was spent on this video; 503, it was spent waiting behind others.
        """
        stage = Stage()
        try:
            async with asyncio.timeout_at(deadline):
                yield stage
        except TimeoutError:
            raise problems.of_deadline(self.settings.request_timeout, stage.name) from None

    async def decoded(self, upload: uploads.Upload, spec: ClipSpec, stage: Stage) -> Decoded:
        """The clips of an upload.

        Raises:
            Problem: 413 or 422, the video can't be used.
        """
        assert self.pool is not None
        try:
            clips = await self.pool.decode(upload.path, spec, on_taken=lambda: stage.enter("decode"))
            stage.enter("queue")
            return clips
        except VideoError as error:
            error.message = error.message.replace(str(upload.path), upload.name).replace(upload.path.name, upload.name)
            raise problems.of_video(error, upload.name) from error

    async def _answer(self, upload: uploads.Upload, served: Served, wanted: Wanted, stage: Stage) -> PredictAnswer:
        predictor = served.predictor
        decoded = await self.decoded(upload, predictor.recipe.clip, stage)
        answered = await self.batcher.answer(predictor, decoded.clips)
        prediction = predictor.answer(answered.probabilities)
        embedding: tuple[float, ...] = ()
        if wanted.embedding:
            await asyncio.to_thread(predictor.prepare_embeddings)  # the first call makes it; not in the model thread
            vectors = await self.batcher.embeddings(predictor, decoded.clips)
            embedding = tuple(round(float(value), 6) for value in vectors.mean(axis=0))
        timeline: tuple[Window, ...] = ()
        span: Span | None = None
        if decoded.spans is not None and (wanted.timeline or len(decoded.spans) > 1):
            rows = answered.probabilities
            label = predictor.classes.index(prediction.label)
            first, last = timelines.deciding(rows, label, predictor.task)
            timeline = timelines.timeline(decoded.spans, predictor.classes, rows)
            span = Span(decoded.spans[first][0], decoded.spans[last][1])
        return PredictAnswer(
            filename=upload.name,
            label=prediction.label,
            probabilities=prediction.probabilities,
            version=prediction.version,
            unsure=prediction.unsure,
            labels=prediction.labels,
            data_version=served.champion.data_version,
            clips=len(decoded.clips),
            seconds={
                "wait": round(decoded.waited, 6),
                "decode": round(decoded.seconds, 6),
                "queue": round(answered.queued, 6),
                "model": round(answered.seconds, 6),
            },
            embedding=embedding,
            timeline=timeline,
            span=span,
        )

    def model(self) -> ModelAnswer:
        """What `/v1/model` answers; also before a model is loaded, since it says why there is none."""
        current = self.follower.current
        champion = current.champion if current else None
        recipe = current.predictor.recipe if current else None
        limits = self.settings
        return ModelAnswer(
            version=champion.version if champion else None,
            classes=recipe.classes if recipe else (),
            clip=recipe.clip.to_dict() if recipe else None,
            data_version=champion.data_version if champion else None,
            run_id=champion.run_id if champion else None,
            digest=champion.digest if champion else None,
            temperature=recipe.temperature if recipe else None,
            multilabel=recipe.multilabel if recipe else False,
            metrics=dict(champion.metrics) if champion else {},
            since=current.since if current else None,
            following=self.follower.state(),
            limits={
                "bytes": limits.max_bytes,
                "files": limits.max_files,
                "seconds": limits.max_seconds,
                "pixels": limits.max_pixels,
                "frames": limits.max_frames,
            },
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a call asks for besides the answer itself."""

    timeline: bool = False  # also for a video that is one clip
    embedding: bool = False


class Stage:
    """How far one prediction is: `name` is one of `metrics.STAGES`."""

    def __init__(self) -> None:
        self.name = "wait"

    def enter(self, name: str) -> None:
        self.name = name


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancels the block as soon as the client hangs up. The request's body must have been read.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:  # else somebody else also wants it cancelled
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
