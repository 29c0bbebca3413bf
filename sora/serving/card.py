"""`GET /v1/card`: the served version's card: what it was measured at, what was decided about it and why."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from sora.core.errors import SoraError
from sora.serving.follow import in_thread
from sora.serving.source import ModelSource

if TYPE_CHECKING:
    from sora.core.records import ModelVersion
    from sora.serving.follow import Served
    from sora.serving.service import Service

ASK_SECONDS = 5.0
KEPT_SECONDS = 60.0  # a decision may change: a version is promoted by hand, or rolled back


class CardAnswer(BaseModel):
    """One model version. `decision` and what follows are null where the registry does not tell."""

    version: int
    data_version: str
    run_id: str
    digest: str = Field(description="sha256 of the model file")
    classes: list[str]
    clip: dict[str, Any]
    temperature: float
    metrics: dict[str, float]
    since: str = Field(description="when this server began to answer with it")
    decision: str | None = Field(description="promoted, manual, …: who let it serve")
    reasons: list[str] | None
    created: str | None
    problem: str | None = Field(description="why the registry does not tell")


class _Decisions:
    """What the registry says of a version, asked at most every `KEPT_SECONDS`, and by one question at a time."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._known: dict[int, tuple[ModelVersion | None, float]] = {}
        self._asking: dict[int, asyncio.Future[ModelVersion | None]] = {}

    async def of(self, served: Served) -> ModelVersion | None:
        """Raises SoraError: the registry can't be asked, or has not answered in time."""
        champion = served.champion
        found, at = self._known.get(champion.version, (None, -KEPT_SECONDS))
        if time.monotonic() - at < KEPT_SECONDS:
            return found
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


def add_routes(app: FastAPI, service: Service, source: ModelSource, responses: dict[int | str, dict[str, Any]]) -> None:
    """Adds the route. `responses`: the problems that it may answer with, in OpenAPI's words."""
    decisions = _Decisions(source)

    @app.get("/v1/card", response_model=CardAnswer, responses=responses, summary="The card of what serves now")
    async def card() -> Response:
        served = service.served()
        champion, recipe = served.champion, served.predictor.recipe
        decided, problem = None, None
        try:
            decided = await decisions.of(served)
        except SoraError as error:
            problem = error.message
        return JSONResponse(
            {
                "version": champion.version,
                "data_version": champion.data_version,
                "run_id": champion.run_id,
                "digest": champion.digest,
                "classes": list(recipe.classes),
                "clip": recipe.clip.to_dict(),
                "temperature": recipe.temperature,
                "metrics": champion.metrics,
                "since": served.since,
                "decision": decided.decision if decided else None,
                "reasons": list(decided.reasons) if decided else None,
                "created": decided.created if decided else None,
                "problem": problem,
            }
        )
