"""Sora's API for Python programs. Needs only httpx of Sora's libraries.

    from sora.client import Client

    with Client("http://127.0.0.1:8000", token="sora_…") as sora:
        answer = sora.predict("video.mp4")
        print(answer.label, answer.probabilities[answer.label], answer.version)

A busy or starting server is asked again after the time that it names; so is one that can't be reached. Predicting
changes nothing, so asking twice does no harm.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, TypeVar, Union
from urllib.parse import urlsplit

import httpx

from sora.core.addresses import is_loopback
from sora.core.answers import ModelAnswer as Model
from sora.core.answers import PredictAnswer as Answer
from sora.core.answers import Span, Window
from sora.core.errors import ApiProblem, InputError, ServiceError

__all__ = ["Answer", "ApiProblem", "Client", "InputError", "Model", "ServiceError", "Span", "Video", "Window"]

Video = Union[str, "os.PathLike[str]", IO[bytes]]
T = TypeVar("T")
_BUSY = (429, 503)


class Client:
    """A client of one server. Threads may share it.

    Args:
        address: `http://` or `https://`, without a path of the API.
        token: a bearer token, if the server asks for one.
        timeout: seconds that one attempt may take between two signs of life of the server.
        retries: attempts beyond the first if the server is busy, starting or can't be reached.
        longest_wait: the longest wait before one of them, in seconds; if a server asks for more, the client gives up.

    Raises:
        InputError: the address does not begin with http:// or https://.
    """

    def __init__(
        self,
        address: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        timeout: float = 200.0,
        retries: int = 5,
        longest_wait: float = 30.0,
    ) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"the address must be http://… or https://…, received {address!r}", fix="correct it")
        self.address = address.rstrip("/")
        self._retries = retries
        self._longest_wait = longest_wait
        self._client = httpx.Client(
            base_url=self.address,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0)),
            trust_env=not is_loopback(parts.hostname or ""),  # a proxy must not catch a server on this machine
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def predict(self, video: Video, *, timeline: bool = False, embedding: bool = False) -> Answer:
        """The answer for one video.

        Args:
            video: a path, or a binary file (sent from its beginning).
            timeline: the answer per clip, also for a video that is one clip.
            embedding: the video's vector too, as from `sora embed`.

        Raises:
            ApiProblem: the server refused the video (`kind`, `fix`), or is still busy after the last attempt.
            ServiceError: the server can't be reached.
            InputError: there is no such file.
        """
        return _answer(self._send([video], timeline, embedding))

    def predict_all(
        self, videos: Sequence[Video], *, timeline: bool = False, embedding: bool = False
    ) -> list[Answer | ApiProblem]:
        """An answer for each video, in order, all by one version. A refused video has an `ApiProblem` in its
        place, which is not raised.

        One call: the server limits its number of files and their total bytes (`model().limits`).

        Raises:
            ApiProblem: the server refused the call as a whole, or is still busy after the last attempt.
            ServiceError, InputError: see `predict`.
        """
        if len(videos) < 2:
            alone: list[Answer | ApiProblem] = []
            for video in videos:
                try:
                    alone.append(self.predict(video, timeline=timeline, embedding=embedding))
                except ApiProblem as problem:
                    if problem.status in _BUSY or problem.status >= 500 or "filename" not in problem.problem:
                        raise
                    alone.append(problem)
            return alone
        answers = self._send(videos, timeline, embedding)["answers"]
        return [_answer(one) if "label" in one else _problem(int(one["status"]), one) for one in answers]

    def model(self) -> Model:
        """The served version.

        Raises:
            ApiProblem, ServiceError: see `predict`.
        """
        value = self._get("/v1/model")
        older = {"limits": {}, "multilabel": False}  # for a server that does not send them yet
        return _known(Model, {**older, **value, "classes": tuple(value["classes"])})

    def ready(self) -> bool:
        """Whether the server can predict now. Asks once; a server that can't be reached is not ready."""
        try:
            return self._client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    # -- one request, repeated as needed --

    def _get(self, path: str) -> dict[str, Any]:
        return self._answered(lambda: self._client.get(path), again=True)

    def _send(self, videos: Sequence[Video], timeline: bool, embedding: bool) -> dict[str, Any]:
        with ExitStack() as opened:
            files: list[Any] = []
            again = True
            for video in videos:
                stream, name = _opened(video, opened)
                again = again and stream.seekable()  # else it is consumed after the first attempt
                files.append(("file", (name, stream if stream.seekable() else _Stream(stream))))
            query = {name: "1" for name, asked in (("timeline", timeline), ("embedding", embedding)) if asked}
            return self._answered(lambda: self._client.post("/v1/predict", params=query, files=files), again=again)

    def _answered(self, ask: Callable[[], httpx.Response], *, again: bool) -> dict[str, Any]:
        for attempt in range(self._retries + 1):
            last = attempt == self._retries or not again
            try:
                answer = ask()
            except httpx.TransportError as error:
                if last or isinstance(error, httpx.ReadTimeout | httpx.UnsupportedProtocol):
                    raise ServiceError(
                        f"{self.address} does not answer: {error or type(error).__name__}",
                        fix="start it (`sora serve`), or correct the address",
                    ) from error
                time.sleep(self._pause(attempt))
                continue
            if answer.status_code < 400:
                return dict(answer.json())
            named = answer.headers.get("retry-after", "")
            wanted = int(named) if named.isascii() and named.isdigit() else 0
            if last or answer.status_code not in _BUSY or wanted > self._longest_wait:
                raise _problem(answer.status_code, _document(answer))
            time.sleep(wanted + self._pause(attempt))
        raise AssertionError("the last attempt returns or raises")

    def _pause(self, attempt: int) -> float:
        """Seconds before the next attempt: doubling, with jitter, so that clients that were turned away together don't
        come back together."""
        return min(self._longest_wait, 0.2 * float(2**attempt)) * random.uniform(0.5, 1)


class _Stream:
    """A stream that httpx can only read: else it would take a pipe's size, 0, for its length."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.read = stream.read


def _opened(video: Video, opened: ExitStack) -> tuple[IO[bytes], str]:
    """A binary file and the name under which it is sent."""
    if isinstance(video, str | os.PathLike):
        try:
            return opened.enter_context(open(video, "rb")), Path(video).name
        except OSError as error:
            raise InputError(f"can't open {video}: {error.strerror}", fix="name a video file") from error
    name = getattr(video, "name", None)
    return video, Path(name).name if isinstance(name, str) and name else "video"


def _document(answer: httpx.Response) -> dict[str, Any]:
    """The problem document. If the answer is something else, such as a proxy's page, it is made from that."""
    try:
        value = answer.json()
    except ValueError:
        value = None
    if isinstance(value, dict) and "detail" in value:
        return value
    return {"title": answer.reason_phrase, "status": answer.status_code, "detail": answer.text[:300]}


def _problem(status: int, document: Mapping[str, Any]) -> ApiProblem:
    title, detail = document.get("title", ""), document.get("detail", "")
    message = f"{status} {title}: {detail}" if detail else f"{status} {title}"
    fix = document.get("fix") or document.get("mend", "")  # `mend` is what older servers call it
    return ApiProblem(message, fix=str(fix), status=status, problem=dict(document))


def _answer(value: Mapping[str, Any]) -> Answer:
    windows = tuple(_known(Window, window) for window in value.get("timeline") or ())
    span = _known(Span, value["span"]) if value.get("span") else None
    labels = tuple(value["labels"]) if value.get("labels") is not None else None
    made = {"timeline": windows, "span": span, "embedding": tuple(value.get("embedding") or ()), "labels": labels}
    return _known(Answer, {**value, **made})


def _known(kind: type[T], value: Mapping[str, Any]) -> T:
    """A dataclass from an answer; a newer server may send more than it has fields for."""
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: item for name, item in value.items() if name in names})
