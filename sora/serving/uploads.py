"""A multipart upload, streamed to a file with our own name; its limits are enforced while it is read.

Not Starlette's form parser: that one has no limit on a file's bytes, so a client could fill the disk before a route
runs. An upload holds one chunk in memory.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sora.serving.problems import Problem

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

OVERHEAD = 64 * 1024  # bytes that a body may have besides its file: boundaries and part headers
MAX_NAME = 255  # characters of the client's file name that are echoed
_FIX = "send multipart/form-data with parts named `file`, as in: curl -F file=@video.mp4 …/v1/predict"


@dataclass(frozen=True, slots=True)
class Upload:
    """One received file. `name` is the client's name for it: only shown, never opened."""

    path: Path
    name: str
    bytes: int

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def check_headers(content_type: str | None, content_length: str | None, max_bytes: int) -> bytes:
    """The multipart boundary; refuses what can't succeed before any byte of the body is read.

    Raises:
        Problem: 415 not multipart, 400 no boundary or a strange length, 413 announced larger than `max_bytes`.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        received = repr(content_type[:100]) if content_type else "none"
        raise Problem(415, f"the content type must be multipart/form-data, received {received}", fix=_FIX)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046
        raise Problem(400, "the content type has no usable multipart boundary", fix=_FIX)
    if content_length is not None:
        if not re.fullmatch(r"[0-9]{1,18}", content_length):
            raise Problem(400, "the content length is not a number", fix=_FIX)
        if int(content_length) > max_bytes + OVERHEAD:
            raise too_large(max_bytes, int(content_length))
    return boundary


def too_large(max_bytes: int, received: int | None = None) -> Problem:
    was = f"{received:,} bytes" if received is not None else "more"
    return Problem(
        413,
        f"a call may have {max_bytes:,} bytes, received {was}",
        fix="send a smaller file or several files in several calls, or have serve.max_bytes raised",
        kind="too-large",
        max_bytes=max_bytes,
    )


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Limits the time of an upload.

    Raises:
        Problem: 408 it took longer.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Problem(
            408,
            f"the upload took longer than {seconds:g} s",
            fix="send a smaller file or use a faster connection",
            headers={"Connection": "close"},
        ) from None


async def receive(
    stream: AsyncIterator[bytes], boundary: bytes, folder: Path, max_bytes: int, max_files: int = 1
) -> list[Upload]:
    """Reads the body of one request: parts named `file`, each into a new file in `folder`.

    Arguments:
        stream: the body's chunks.
        boundary: from `check_headers`.
        folder: a private folder; the files' names in it are random.
        max_bytes: of all files together; one byte more is a 413, and the rest is not read.
        max_files: one more is a 400.

    Returns:
        One or more uploads, in the order of the parts.

    Raises:
        Problem: 400 the body is not such a multipart, 413 too large, 507 the disk is full. No file is left behind then.
    """
    reader = _Reader(folder, max_bytes, max_files)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # bounds count and size of part headers
        total = 0
        async for chunk in stream:
            total += len(chunk)
            if total > max_bytes + OVERHEAD:
                raise too_large(max_bytes)
            parser.write(chunk)
            reader.flush()
        parser.finalize()
        if not reader.complete:
            raise Problem(400, "the body has no complete part named `file`", fix=_FIX)
        return reader.uploads()
    except BaseException as error:
        for part in reader.parts:
            part.path.unlink(missing_ok=True)
        if isinstance(error, FormParserError):
            raise Problem(400, "the body is not well-formed multipart/form-data", fix=_FIX) from error
        if is_full(error):
            raise no_room() from error
        raise
    finally:
        for part in reader.parts:
            part.sink.close()


def is_full(error: BaseException) -> bool:
    """Whether the disk has no space left, or the user no quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room() -> Problem:
    return Problem(
        507,
        "no space left for the upload",
        fix="try again later; the server's operator must make room",
        headers={"Retry-After": "60"},
    )


class _Part:
    """One file of the body, while it arrives."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.path = folder / f"{secrets.token_hex(16)}.upload"
        # Unbuffered: a full disk fails in `write`, not again in `close`.
        self.sink: BinaryIO = open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)  # noqa: SIM115
        self.pending: list[bytes] = []
        self.bytes = 0


class PartReader:
    """The callbacks of a multipart parser, down to each part's disposition. A subclass handles the parts."""

    def __init__(self) -> None:
        self._header = (bytearray(), bytearray())
        self._disposition = b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self.on_data,
            "on_part_end": self.on_end,
        }

    def on_part(self, kind: bytes, options: dict[bytes, bytes]) -> None:
        """A part begins: its disposition and the disposition's options (name, filename)."""
        raise NotImplementedError

    def on_data(self, data: bytes, start: int, end: int) -> None:
        """Bytes of the current part."""
        raise NotImplementedError

    def on_end(self) -> None:
        """The current part is complete."""
        raise NotImplementedError

    def _on_header_end(self) -> None:
        field, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if field.lower() == b"content-disposition":
            self._disposition = value

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition.decode("latin-1"))
        self._disposition = b""
        self.on_part(kind, options)


class _Reader(PartReader):
    """The callbacks of the parser. Data is kept until `flush`, at most one chunk of the body."""

    def __init__(self, folder: Path, max_bytes: int, max_files: int) -> None:
        super().__init__()
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._bytes = 0
        self.parts: list[_Part] = []
        self.complete = False  # the last part that was started has ended

    def uploads(self) -> list[Upload]:
        return [Upload(part.path, part.name, part.bytes) for part in self.parts]

    def on_part(self, kind: bytes, options: dict[bytes, bytes]) -> None:
        if len(self.parts) == self._max_files:
            most = f"{self._max_files} files" if self._max_files > 1 else "one file"
            raise Problem(
                400, f"one call takes {most}, received more", fix="send the others in another call", kind="many-files"
            )
        if kind != b"form-data" or options.get(b"name") != b"file" or b"filename" not in options:
            received = options.get(b"name", b"")[:100].decode("utf-8", "replace")
            raise Problem(400, f"each part must be a file named `file`, received {received!r}", fix=_FIX)
        self.complete = False
        self.parts.append(_Part(self._folder, shown_name(options[b"filename"])))

    def on_data(self, data: bytes, start: int, end: int) -> None:
        self._bytes += end - start
        if self._bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        part = self.parts[-1]
        part.bytes += end - start
        part.pending.append(data[start:end])

    def on_end(self) -> None:
        self.flush()
        self.parts[-1].sink.close()  # one open file per request, however many parts it has
        self.complete = True

    def flush(self) -> None:
        """Writes what has arrived of the current part."""
        part = self.parts[-1] if self.parts else None
        if part is not None and part.pending:
            rest = memoryview(b"".join(part.pending))
            part.pending.clear()
            while rest:
                rest = rest[part.sink.write(rest) :]


def shown_name(raw: bytes) -> str:
    """The client's file name, safe to show and log: its last part, no control characters, bounded."""
    name = raw.decode("utf-8", "replace").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in name if c.isprintable())[:MAX_NAME] or "video"
