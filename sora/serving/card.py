"""`GET /v1/card`: the served version's card: its metrics, what was decided about it and why."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from sora.core.answers import CardAnswer
from sora.core.errors import SoraError
from sora.serving.follow import in_thread
from sora.serving.source import ModelSource

if TYPE_CHECKING:
    from sora.core.records import ModelVersion
    from sora.serving.context import Context
    from sora.serving.follow import Served

ASK_SECONDS = 5.0
KEPT_SECONDS = 60.0  # a decision may change: a version is promoted by hand, or rolled back


class _Decisions:
    """What the registry says about a version, asked at most every `KEPT_SECONDS`, one request at a time."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._known: dict[int, tuple[ModelVersion | None, float]] = {}
        self._asking: dict[int, asyncio.Future[ModelVersion | None]] = {}

    async def of(self, served: Served) -> ModelVersion | None:
        """Raises SoraError: the registry can't be asked, or has not answered in time."""
        champion = served.champion
        known, at = self._known.get(champion.version, (None, -KEPT_SECONDS))
        if time.monotonic() - at < KEPT_SECONDS:
            return known
        asking = self._asking.get(champion.version)
        if asking is None:
            asking = asyncio.wrap_future(in_thread(lambda: self._source.decision(champion)))
            self._asking[champion.version] = asking
        done, _ = await asyncio.wait((asking,), timeout=ASK_SECONDS)
        if not done:
            raise SoraError(f"the registry has not answered for {ASK_SECONDS:g} s")
        self._asking.pop(champion.version, None)
        self._known = {champion.version: (asking.result(), time.monotonic())}
        return asking.result()


def add_routes(app: FastAPI, context: Context, source: ModelSource, responses: dict[int | str, dict[str, Any]]) -> None:
    """Adds the route. `responses`: the problems that it may answer with, as OpenAPI describes them."""
    decisions = _Decisions(source)

    @app.get("/v1/card", response_class=JSONResponse, responses=responses, summary="The card of the served version")
    async def card() -> CardAnswer:
        served = context.served()
        champion, recipe = served.champion, served.predictor.recipe
        decided, problem = None, None
        try:
            decided = await decisions.of(served)
        except SoraError as error:
            problem = error.message
        return CardAnswer(
            version=champion.version,
            data_version=champion.data_version,
            run_id=champion.run_id,
            digest=champion.digest,
            classes=recipe.classes,
            clip=recipe.clip.to_dict(),
            temperature=recipe.temperature,
            metrics=dict(champion.metrics),
            since=served.since,
            decision=decided.decision if decided else None,
            reasons=decided.reasons if decided else None,
            created=decided.created if decided else None,
            problem=problem,
        )
