"""`POST /v1/explain`: which moments and which regions of a video decided (see `sora.model.attribution`)."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from sora.core.answers import ExplainAnswer
from sora.serving import forms
from sora.serving.problems import Problem

if TYPE_CHECKING:
    from sora.runtime.predictor import Predictor
    from sora.serving.context import Context

METHOD = "Grad-CAM (Selvaraju et al. 2017) on every level of both networks, of the class's log-odds"
GRID = 16  # rows and columns of the heat maps in an answer, at most


def add_routes(app: FastAPI, context: Context, responses: dict[int | str, dict[str, Any]]) -> None:
    """Adds the route. `responses`: the problems that it may answer with, as OpenAPI describes them."""

    @app.post(
        "/v1/explain",
        response_model=ExplainAnswer,
        response_class=JSONResponse,
        openapi_extra=forms.body({"label": {"type": "string", "description": "the class to explain"}}, ()),
        responses={**responses, 200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
        summary="Which moments and regions of one video decided; only a PNG with `Accept: image/png`",
    )
    async def explain(request: Request) -> ExplainAnswer | Response:
        image, answer = await _explain(context, request)
        if _wants_image(request.headers.get("accept", "")):
            return Response(image, media_type="image/png")
        return answer


async def _explain(context: Context, request: Request) -> tuple[bytes, ExplainAnswer]:
    context.served()  # fail before the upload is read
    start = time.perf_counter()
    async with forms.received(context, request, ("label",)) as form:
        uploaded = time.perf_counter() - start
        served = context.served()
        predictor = served.predictor
        asked = form.fields.get("label")
        if asked is not None and asked not in predictor.classes:
            raise unknown_class(asked, predictor)
        decoded = await context.decoded(form.upload, predictor.recipe.clip, form.stage)
        answered = await context.batcher.answer(predictor, decoded.clips)
        prediction = predictor.answer(answered.probabilities)
        label = predictor.classes.index(asked if asked is not None else prediction.label)
        which = int(answered.probabilities[:, label].argmax())
        clip = decoded.clips[which : which + 1]
        attribute = await asyncio.to_thread(predictor.attribution)  # the first call makes it; not in the model thread
        start = time.perf_counter()
        evidence, odds = await context.batcher.between(lambda: attribute(clip, label))
        explained = time.perf_counter() - start
        image, shown, heat, weights = await asyncio.to_thread(_drawn, clip.video[0], evidence)
    seconds = {
        "upload": uploaded,
        "wait": decoded.waited,
        "decode": decoded.seconds,
        "queue": answered.queued,
        "model": answered.seconds,
        "explain": explained,
    }
    context.metrics.stage.labels("explain").observe(explained)
    request.state.log = {"version": prediction.version, "bytes": form.upload.bytes, "clips": len(decoded.clips)}
    return image, ExplainAnswer(
        filename=form.upload.name,
        label=predictor.classes[label],
        probabilities=prediction.probabilities,
        version=prediction.version,
        data_version=served.champion.data_version,
        method=METHOD,
        clips=len(decoded.clips),
        clip=which,
        log_odds=round(odds, 4),
        weights=weights,
        heat=heat,
        strip=base64.b64encode(image).decode("ascii"),
        strip_frames=shown,
        seconds={name: round(value, 6) for name, value in seconds.items()},
    )


def weighed(evidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only evidence for the class, `(time, rows, columns)` 0 and above, and each frame's share of it, `(time,)`."""
    heat = np.maximum(evidence, 0)
    weights = heat.mean(axis=(1, 2))
    return heat, weights / (weights.sum() or 1.0)


def _drawn(clip: np.ndarray, evidence: np.ndarray) -> tuple[bytes, list[int], list[list[list[float]]], list[float]]:
    from sora.media.video.strip import strip  # imports OpenCV: not before the server is ready

    heat, weights = weighed(evidence)
    image, shown = strip(clip, heat, weights)
    grid = np.round(_coarse(heat) / (heat.max() or 1.0), 3)
    return image, shown, grid.tolist(), [round(float(weight), 5) for weight in weights]


def _coarse(heat: np.ndarray) -> np.ndarray:
    """At most `GRID` rows and columns: means over blocks; the last block may be smaller."""
    for axis in (1, 2):
        step = -(-heat.shape[axis] // GRID)
        starts = np.arange(0, heat.shape[axis], step)
        sizes = np.diff([*starts, heat.shape[axis]])
        sums = np.add.reduceat(heat, starts, axis=axis)
        heat = sums / (sizes[:, None] if axis == 1 else sizes)
    return heat


def unknown_class(label: str, predictor: Predictor) -> Problem:
    """422: a label that the model does not know."""
    names = ", ".join(predictor.classes[:20]) + (", …" if len(predictor.classes) > 20 else "")
    return Problem(
        422, f"version {predictor.version} has no class {label[:100]!r}", fix=f"use one of: {names}", kind="no-class"
    )


def _wants_image(accept: str) -> bool:
    kinds = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    return "image/png" in kinds and "application/json" not in kinds and "*/*" not in kinds
