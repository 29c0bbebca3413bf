"""A multipart form with one video and some text fields, received like a lone video in `uploads`."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.requests import Request

from sora.serving import uploads
from sora.serving.context import Stage, while_connected
from sora.serving.problems import Problem

if TYPE_CHECKING:
    from sora.serving.context import Context

MAX_FIELD = 1000  # bytes of a text field


@dataclass(frozen=True, slots=True)
class Form:
    """The video, and the text fields that came with it."""

    upload: uploads.Upload
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class Received(Form):
    """A form, and how far the work on it is."""

    stage: Stage


@asynccontextmanager
async def received(context: Context, request: Request, fields: Collection[str]) -> AsyncIterator[Received]:
    """One request's form, while it holds one of the server's `serve.queue` places. The block is cancelled at the
    request's deadline and when the client hangs up; the form's file is removed at the end.

    Arguments:
        fields: names of the text fields that may accompany `file`.

    Raises:
        Problem: 429 no place is free, 408 the upload took too long, 503 or 504 the time is up, and those of `read`.
    """
    settings, deadline = context.settings, context.deadline()
    with context.place():
        async with uploads.within(min(settings.upload_timeout, settings.request_timeout)):
            form = await read(request, context.folder, settings.max_bytes, fields)
        try:
            async with while_connected(request), context.until(deadline) as stage:
                yield Received(form.upload, form.fields, stage)
        finally:
            form.upload.remove()


async def read(request: Request, folder: Path, max_bytes: int, fields: Collection[str]) -> Form:
    """Reads the body: one part `file` into a new file in `folder`, and each of `fields` at most once.

    Raises:
        Problem: 415 or 400 the body is not such a form, 413 too large, 507 the disk is full. No file is left then.
    """
    boundary = uploads.check_headers(
        request.headers.get("content-type"), request.headers.get("content-length"), max_bytes
    )
    path = folder / f"{secrets.token_hex(16)}.upload"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
            reader = _Reader(sink, max_bytes, fields)
            parser = MultipartParser(boundary, reader.callbacks())
            total = 0
            async for chunk in request.stream():
                total += len(chunk)
                if total > max_bytes + uploads.OVERHEAD:
                    raise uploads.too_large(max_bytes)
                parser.write(chunk)
                reader.flush()
            parser.finalize()
        if reader.filename is None or not reader.complete:
            raise _unusable("the body has no complete part named `file`", fields)
        return Form(uploads.Upload(path, reader.filename, reader.bytes), reader.text())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, FormParserError):
            raise _unusable("the body is not well-formed multipart/form-data", fields) from error
        if uploads.is_full(error):
            raise uploads.no_room() from error
        raise


def _unusable(detail: str, fields: Collection[str]) -> Problem:
    words = "".join(f" -F {name}=…" for name in fields)
    return Problem(400, detail, fix=f"send multipart/form-data, as in: curl -F file=@video.mp4{words} …")


class _Reader(uploads.PartReader):
    """The callbacks of the parser. Text is bounded by `MAX_FIELD`, the file by `max_bytes`."""

    def __init__(self, sink: BinaryIO, max_bytes: int, fields: Collection[str]) -> None:
        super().__init__()
        self._sink = sink
        self._max = max_bytes
        self._fields = fields
        self._part = ""
        self._texts: dict[str, bytearray] = {}
        self._pending: list[bytes] = []
        self.filename: str | None = None
        self.bytes = 0
        self.complete = False

    def on_part(self, kind: bytes, options: dict[bytes, bytes]) -> None:
        name = options.get(b"name", b"")[:100].decode("utf-8", "replace")
        is_file = b"filename" in options
        known = name == "file" if is_file else name in self._fields
        if kind != b"form-data" or not known:
            raise _unusable(f"the form has an unexpected part {name!r}", self._fields)
        if name in self._texts or (is_file and self.filename is not None):
            raise _unusable(f"the form has a second part {name!r}", self._fields)
        self._part = name
        if is_file:
            self.filename = uploads.shown_name(options[b"filename"])
        else:
            self._texts[name] = bytearray()

    def on_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self.bytes += end - start
            if self.bytes > self._max:
                raise uploads.too_large(self._max)
            self._pending.append(data[start:end])
            return
        text = self._texts[self._part]
        text.extend(data[start:end])
        if len(text) > MAX_FIELD:
            raise _unusable(f"the field {self._part!r} has more than {MAX_FIELD} bytes", self._fields)

    def on_end(self) -> None:
        if self._part == "file":
            self.complete = True

    def flush(self) -> None:
        self._sink.writelines(self._pending)
        self._pending.clear()

    def text(self) -> dict[str, str]:
        try:
            return {name: bytes(value).decode("utf-8") for name, value in self._texts.items()}
        except UnicodeDecodeError:
            raise _unusable("a text field is not UTF-8", self._fields) from None


def body(fields: dict[str, dict[str, Any]], required: Collection[str]) -> dict[str, Any]:
    """The form as OpenAPI describes it, for a route's `openapi_extra`. `fields`: name → its JSON schema."""
    video = {"type": "string", "format": "binary", "description": "a video file"}
    schema = {"type": "object", "required": ["file", *required], "properties": {"file": video, **fields}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
