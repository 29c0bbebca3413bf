"""`/v1/corrections`: "this is wrong, it is …", and the review of what was said (see `sora.dataset.corrections`).

Whoever may ask for predictions may correct: a token where the server has tokens, this machine where not. Reviewing is a
right of its own, since what is accepted is learned from: tokens of `sora token add NAME --review` have it, and, where
there are no tokens, whoever is at this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field

from sora.core import labels
from sora.core.errors import DiskFull, InputError
from sora.dataset.corrections import MEDIA_TYPES, NEXT, Entry, Inbox, InboxFull, NoEntry
from sora.serving import forms
from sora.serving.explain import unknown_class
from sora.serving.problems import Problem

if TYPE_CHECKING:
    from sora.runtime.predictor import Predictor
    from sora.serving.service import Service

T = TypeVar("T")
_TEXT = {"type": "string", "minLength": 1, "description": "a class; several of a multi-label model joined by |"}
_FIELDS = {"label": _TEXT, "predicted": _TEXT, "version": {"type": "integer", "minimum": 1}}


class Sender(BaseModel):
    """Who sent a correction, and how the reviews of theirs went."""

    name: str = Field(description="a token's name; `address …` of one that came without a token")
    accepted: int
    refused: int = Field(description="rejected, or accepted under another label than they said")
    often_refused: bool


class Correction(BaseModel):
    """A clip that waits for review."""

    id: str = Field(description="sha256 of the clip")
    filename: str
    label: str = Field(description="what it is, by the last who said so")
    said: dict[str, int] = Field(description="label → how often it was said")
    predicted: str
    version: int
    bytes: int
    received: str


class Waiting(Correction):
    """A clip as its reviewer sees it."""

    sent_by: list[Sender]


class Corrections(BaseModel):
    """The inbox, the newest last, and its quota."""

    entries: list[Waiting]
    max_files: int
    max_bytes: int


class Accepted(BaseModel):
    """`path` is below data/; `next` says what makes it count."""

    id: str
    path: str
    next: str


class Rejected(BaseModel):
    id: str


def add_routes(
    app: FastAPI,
    service: Service,
    inbox: Inbox,
    responses: dict[int | str, dict[str, Any]],
    reviewed: dict[int | str, dict[str, Any]],
) -> None:
    """Adds the routes. `responses`, `reviewed`: the problems that sending and reviewing may answer with, in OpenAPI's
    words."""

    @app.post(
        "/v1/corrections",
        status_code=201,
        response_model=Correction,
        openapi_extra=forms.body(_FIELDS, tuple(_FIELDS)),
        responses=responses,
        summary="This video was answered wrongly: it is …",
    )
    async def correct(request: Request) -> Response:
        return JSONResponse(_shown(await _correct(service, inbox, request)), status_code=201)

    @app.get("/v1/corrections", response_model=Corrections, responses=reviewed, summary="What waits for review")
    async def listed(request: Request) -> Response:
        _check_right(request)
        waiting = await asyncio.to_thread(_waiting, inbox)
        limits = {"max_files": inbox.max_files, "max_bytes": inbox.max_bytes}
        return JSONResponse({"entries": waiting, **limits})

    @app.get(
        "/v1/corrections/{ident}/video",
        response_class=FileResponse,
        responses=reviewed,
        summary="The clip itself",
    )
    async def video(request: Request, ident: str) -> Response:
        _check_right(request)
        entry = await _in_inbox(lambda: inbox.find(ident))
        kind = MEDIA_TYPES.get(entry.suffix, "application/octet-stream")
        return FileResponse(inbox.file(entry), media_type=kind, filename=f"{entry.id[:12]}{entry.suffix}")

    @app.post(
        "/v1/corrections/{ident}/accept",
        response_model=Accepted,
        responses=reviewed,
        summary="Into data/, under its label or another",
    )
    async def accept(request: Request, ident: str, label: str | None = None) -> Response:
        _check_right(request)
        entry = await _in_inbox(lambda: inbox.find(ident))
        path = await _in_inbox(lambda: inbox.accept(entry.id, label))
        return JSONResponse({"id": entry.id, "path": path.as_posix(), "next": NEXT})

    @app.post(
        "/v1/corrections/{ident}/reject",
        response_model=Rejected,
        responses=reviewed,
        summary="Out of the inbox, for good",
    )
    async def reject(request: Request, ident: str) -> Response:
        _check_right(request)
        return JSONResponse({"id": (await _in_inbox(lambda: inbox.reject(ident))).id})


async def _correct(service: Service, inbox: Inbox, request: Request) -> Entry:
    service.served()  # fail before the upload is read
    async with forms.received(service, request, tuple(_FIELDS)) as form:
        predictor = service.served().predictor
        label, predicted, version = _checked(form.fields, predictor)
        await service.decoded(form.upload, predictor.recipe.clip, form.stage)  # nobody reviews what can't be played
        entry = await _in_inbox(
            lambda: inbox.add(
                form.upload.path,
                filename=form.upload.name,
                label=label,
                predicted=predicted,
                version=version,
                source=_source(request),
            )
        )
        request.state.log = {"version": version, "bytes": form.upload.bytes, "correction": entry.id[:12]}
        return entry


def _check_right(request: Request) -> None:
    """Raises a Problem, 403, where the caller may not review."""
    if not request.state.review:
        raise Problem(
            403,
            "this token may send corrections and not review them",
            fix="use a token that `sora token add NAME --review` made, or `sora data review` on the server's machine",
            kind="no-review",
        )


def _source(request: Request) -> str:
    """Who says so: the token's name, or the peer's address, which no token can be named like."""
    if request.state.token:
        return str(request.state.token)
    try:
        return f"address {ipaddress.ip_address(request.client.host if request.client else '')}"
    except ValueError:  # a proxy's header said something else
        return "address unknown"


def _waiting(inbox: Inbox) -> list[dict[str, Any]]:
    known = inbox.sources()
    return [
        {**_shown(entry), "sent_by": [one.to_dict() for one in inbox.sent_by(entry, known)]}
        for entry in inbox.entries()
    ]


def _checked(fields: dict[str, str], predictor: Predictor) -> tuple[str, str, int]:
    missing = [name for name in _FIELDS if name not in fields]
    if missing:
        raise Problem(422, f"the form lacks {', '.join(missing)}", fix="send file, label, predicted and version")
    multilabel = predictor.recipe.multilabel
    given = {name: labels.names(fields[name], multilabel) for name in ("label", "predicted")}
    for name, found in given.items():
        unknown = [one for one in found if one not in predictor.classes]
        if unknown or (name == "label" and not found):
            raise unknown_class(unknown[0] if unknown else fields[name], predictor)
    version = fields["version"]
    if not (version.isascii() and version.isdigit() and len(version) <= 9 and int(version) > 0):
        raise Problem(422, f"the version is no number, received {version[:100]!r}", fix="send the answer's `version`")
    return labels.join(given["label"]), labels.join(given["predicted"]), int(version)


async def _in_inbox(function: Callable[[], T]) -> T:
    """Runs `function` in a thread: it waits for a lock and the disk.

    Raises:
        Problem: 404 no such entry, 409 it can't be accepted so, 507 the inbox or the disk is full.
    """
    try:
        return await asyncio.to_thread(function)
    except NoEntry as error:
        raise Problem(404, error.message, fix="GET /v1/corrections lists what waits", kind="no-entry") from error
    except InputError as error:
        raise Problem(409, error.message, fix=error.fix, kind="not-acceptable") from error
    except InboxFull as error:
        raise Problem(507, error.message, fix=error.fix, kind="inbox-full") from error
    except DiskFull as error:
        raise Problem(507, "no space left for the clip", fix="the server's operator must make room") from error


def _shown(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in entry.to_dict().items() if name in Correction.model_fields}
