"""The application in the test's own process, with real models, decoders and files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from sora.config import Serve
from sora.serving.app import create_app
from sora.serving.context import Context
from sora.serving.source import ModelCache
from sora.serving.tokens import Tokens

Condition = Callable[[], Awaitable[bool]]


@asynccontextmanager
async def running(
    folder: Path, *, tokens: Sequence[str] | Tokens = (), headers: Mapping[str, str] | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Context]]:
    """(client, context) of an application over FOLDER/registry and FOLDER/cache."""
    options = {"poll_seconds": 0.05, "decode_workers": 1, **settings}
    app = create_app(Serve(**options), ModelCache(folder / "registry"), ModelCache(folder / "cache"), tokens=tokens)
    context: Context = app.state.context
    transport = httpx.ASGITransport(app)
    async with (
        context.running(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60, headers=headers) as client,
    ):
        yield client, context


async def until(condition: Condition, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


def ready(client: httpx.AsyncClient, version: int | None = None) -> Condition:
    async def condition() -> bool:
        answer = await client.get("/readyz")
        return answer.status_code == 200 and version in (None, answer.json()["version"])

    return condition


async def send(client: httpx.AsyncClient, video: Path) -> httpx.Response:
    return await client.post("/v1/predict", files={"file": (video.name, video.read_bytes())})


def true(function: Callable[[], object]) -> Condition:
    async def condition() -> bool:
        return bool(function())

    return condition
