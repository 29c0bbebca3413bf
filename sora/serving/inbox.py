"""`/v1/corrections`: "this is wrong, it is …", and the review of corrections (see `sora.dataset.corrections`).

Whoever may ask for predictions may correct: a token if the server has tokens, this machine if not. Reviewing is a
separate right, since accepted corrections are learned from: tokens of `sora token add NAME --review` have it and, if
there are no tokens, everybody at this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from sora.core.answers import Accepted, Correction, Corrections, Rejected, Sender, Waiting
from sora.core.errors import DiskFull, InputError
from sora.dataset.corrections import MEDIA_TYPES, NEXT, Entry, Inbox, InboxFull, NoEntry
from sora.serving import forms
from sora.serving.explain import unknown_class
from sora.serving.problems import Problem

if TYPE_CHECKING:
    from sora.runtime.predictor import Predictor
    from sora.serving.context import Context

T = TypeVar("T")
_TEXT = {"type": "string", "minLength": 1, "description": "a class; several of a multi-label model joined by |"}
_FIELDS = {"label": _TEXT, "predicted": _TEXT, "version": {"type": "integer", "minimum": 1}}


def add_routes(
    app: FastAPI,
    context: Context,
    inbox: Inbox,
    responses: dict[int | str, dict[str, Any]],
    reviewed: dict[int | str, dict[str, Any]],
) -> None:
    """Adds the routes. `responses`, `reviewed`: the problems that sending and reviewing may answer with, for
    OpenAPI."""

    @app.post(
        "/v1/corrections",
        status_code=201,
        response_class=JSONResponse,
        openapi_extra=forms.body(_FIELDS, tuple(_FIELDS)),
        responses=responses,
        summary="Report that this video was answered wrongly: it is …",
    )
    async def correct(request: Request) -> Correction:
        return Correction(**_shown(await _correct(context, inbox, request)))

    @app.get("/v1/corrections", response_class=JSONResponse, responses=reviewed, summary="The waiting corrections")
    async def listed(request: Request) -> Corrections:
        _check_right(request)
        waiting = await asyncio.to_thread(_waiting, inbox)
        return Corrections(entries=waiting, max_files=inbox.max_files, max_bytes=inbox.max_bytes)

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
        response_class=JSONResponse,
        responses=reviewed,
        summary="Accept into data/, under its label or another",
    )
    async def accept(request: Request, ident: str, label: str | None = None) -> Accepted:
        _check_right(request)
        entry = await _in_inbox(lambda: inbox.find(ident))
        path = await _in_inbox(lambda: inbox.accept(entry.id, label))
        return Accepted(id=entry.id, path=path.as_posix(), next=NEXT)

    @app.post(
        "/v1/corrections/{ident}/reject",
        response_class=JSONResponse,
        responses=reviewed,
        summary="Remove from the inbox for good",
    )
    async def reject(request: Request, ident: str) -> Rejected:
        _check_right(request)
        return Rejected(id=(await _in_inbox(lambda: inbox.reject(ident))).id)


async def _correct(context: Context, inbox: Inbox, request: Request) -> Entry:
    context.served()  # fail before the upload is read
    async with forms.received(context, request, tuple(_FIELDS)) as form:
        predictor = context.served().predictor
        label, predicted, version = _checked(form.fields, predictor)
        await context.decoded(form.upload, predictor.recipe.clip, form.stage)  # nobody reviews what can't be played
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
    """Raises a Problem, 403, if the caller may not review."""
    if not request.state.review:
        raise Problem(
            403,
            "this token may send corrections but not review them",
            fix="use a token that `sora token add NAME --review` made, or `sora data review` on the server's machine",
            kind="no-review",
        )


def _source(request: Request) -> str:
    """Who sent it: the token's name, or the peer's address; no token can have such a name."""
    if request.state.token:
        return str(request.state.token)
    try:
        return f"address {ipaddress.ip_address(request.client.host if request.client else '')}"
    except ValueError:  # a proxy's header held something else
        return "address unknown"


def _waiting(inbox: Inbox) -> tuple[Waiting, ...]:
    known = inbox.sources()
    return tuple(
        Waiting(
            **_shown(entry),
            sent_by=tuple(
                Sender(one.name, one.accepted, one.refused, one.often_refused) for one in inbox.sent_by(entry, known)
            ),
        )
        for entry in inbox.entries()
    )


def _checked(fields: dict[str, str], predictor: Predictor) -> tuple[str, str, int]:
    missing = [name for name in _FIELDS if name not in fields]
    if missing:
        raise Problem(422, f"the form lacks {', '.join(missing)}", fix="send file, label, predicted and version")
    task = predictor.task
    given = {name: task.names(fields[name]) for name in ("label", "predicted")}
    for name, said in given.items():
        unknown = [one for one in said if one not in predictor.classes]
        if unknown or (name == "label" and not said):
            raise unknown_class(unknown[0] if unknown else fields[name], predictor)
    version = fields["version"]
    if not (version.isascii() and version.isdigit() and len(version) <= 9 and int(version) > 0):
        raise Problem(422, f"version is not a number, received {version[:100]!r}", fix="send the answer's `version`")
    return task.join(given["label"]), task.join(given["predicted"]), int(version)


async def _in_inbox(function: Callable[[], T]) -> T:
    """Runs `function` in a thread: it waits for a lock and the disk.

    Raises:
        Problem: 404 no such entry, 409 it can't be accepted like this, 507 the inbox or the disk is full.
    """
    try:
        return await asyncio.to_thread(function)
    except NoEntry as error:
        raise Problem(404, error.message, fix="GET /v1/corrections lists the waiting ones", kind="no-entry") from error
    except InputError as error:
        raise Problem(409, error.message, fix=error.fix, kind="not-acceptable") from error
    except InboxFull as error:
        raise Problem(507, error.message, fix=error.fix, kind="inbox-full") from error
    except DiskFull as error:
        raise Problem(507, "no space left for the clip", fix="the server's operator must make room") from error


def _shown(entry: Entry) -> dict[str, Any]:
    """The fields of a `Correction`, without its sender and its file's name on this server."""
    return {one.name: getattr(entry, one.name) for one in fields(Correction)}
