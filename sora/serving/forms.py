"""A multipart form of one video and a few words, received as `uploads` receives a video alone."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from sora.errors import VideoError
from sora.serving import problems, uploads
from sora.serving.decoding import Decoded
from sora.serving.predictor import Predictor
from sora.serving.problems import Problem

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

    from sora.serving.service import Service

MAX_FIELD = 1000  # bytes of a text field


@dataclass(frozen=True, slots=True)
class Form:
    """The video, and the text fields that came with it."""

    upload: uploads.Upload
    fields: dict[str, str]


@asynccontextmanager
async def received(service: Service, request: Request, fields: Collection[str]) -> AsyncIterator[Form]:
    """One request's form, while it holds one of the server's `serve.queue` places. Its file is removed at the end.

    Arguments:
        fields: names of the text fields that may come beside `file`.

    Raises:
        Problem: 429 no place is free, 408 the upload took too long, and those of `read`.
    """
    settings = service.settings
    if service.active >= settings.queue:
        raise Problem(
            429,
            f"{settings.queue} videos are under way, the most that this server takes",
            mend="try again after the seconds in Retry-After",
            kind="queue-full",
            headers={"Retry-After": "1"},
        )
    service.active += 1
    form: Form | None = None
    try:
        try:
            async with asyncio.timeout(settings.upload_timeout):
                form = await read(request, service.folder, settings.max_bytes, fields)
        except TimeoutError:
            raise Problem(
                408,
                f"the upload took longer than {settings.upload_timeout:g} s",
                mend="send a smaller file or use a faster line",
                headers={"Connection": "close"},
            ) from None
        yield form
    finally:
        service.active -= 1
        if form is not None:
            form.upload.remove()


async def decoded(service: Service, upload: uploads.Upload, predictor: Predictor) -> Decoded:
    """The clips of an upload, as the predictor's recipe wants them.

    Raises:
        Problem: 413 or 422, the video can't be used.
    """
    assert service.pool is not None
    try:
        return await service.pool.decode(upload.path, predictor.recipe.clip)
    except VideoError as error:
        error.message = error.message.replace(str(upload.path), upload.name).replace(upload.path.name, upload.name)
        raise problems.of_video(error, upload.name) from error


async def read(request: Request, folder: Path, max_bytes: int, fields: Collection[str]) -> Form:
    """Reads the body: one part `file` into a new file in `folder`, and each of `fields` once at most.

    Raises:
        Problem: 415 or 400 the body is no such form, 413 too large, 507 the disk is full. No file is left then.
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
            raise _unusable("the body is no well-formed multipart/form-data", fields) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Problem(507, "no space left for the upload", mend="try later; the server's operator must make room",
                          headers={"Retry-After": "60"}) from error  # fmt: skip
        raise


def _unusable(detail: str, fields: Collection[str]) -> Problem:
    words = "".join(f" -F {name}=…" for name in fields)
    return Problem(400, detail, mend=f"send multipart/form-data, as in: curl -F file=@video.mp4{words} …")


class _Reader:
    """The callbacks of the parser. Text is bounded by `MAX_FIELD`, the file by `max_bytes`."""

    def __init__(self, sink: BinaryIO, max_bytes: int, fields: Collection[str]) -> None:
        self._sink = sink
        self._max = max_bytes
        self._fields = fields
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._part = ""
        self._texts: dict[str, bytearray] = {}
        self._pending: list[bytes] = []
        self.filename: str | None = None
        self.bytes = 0
        self.complete = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
        }

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_end(self) -> None:
        field, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if field.lower() == b"content-disposition":
            self._disposition = value

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"")[:100].decode("utf-8", "replace")
        is_file = b"filename" in options
        known = name == "file" if is_file else name in self._fields
        if kind != b"form-data" or not known:
            raise _unusable(f"the form has a part {name!r} that is not asked for", self._fields)
        if name in self._texts or (is_file and self.filename is not None):
            raise _unusable(f"the form has a second part {name!r}", self._fields)
        self._part = name
        if is_file:
            self.filename = uploads.shown_name(options[b"filename"])
        else:
            self._texts[name] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
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

    def _on_part_end(self) -> None:
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
    """The form in OpenAPI's words, for a route's `openapi_extra`. `fields`: name → its JSON schema."""
    video = {"type": "string", "format": "binary", "description": "a video file"}
    schema = {"type": "object", "required": ["file", *required], "properties": {"file": video, **fields}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
