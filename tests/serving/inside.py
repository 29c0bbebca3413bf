"""The application in the test's own process, with real models, decoders and files."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from sora.config import Serve
from sora.serving.app import create_app
from sora.serving.source import ModelCache


@asynccontextmanager
async def running(folder: Path, *, tokens=(), headers=None, **settings):
    """(client, context) of an application over FOLDER/registry and FOLDER/cache."""
    options = {"poll_seconds": 0.05, "decode_workers": 1, **settings}
    app = create_app(Serve(**options), ModelCache(folder / "registry"), ModelCache(folder / "cache"), tokens=tokens)
    context = app.state.context
    transport = httpx.ASGITransport(app)
    async with (
        context.running(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60, headers=headers) as client,
    ):
        yield client, context


async def until(condition, seconds=60.0):
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


def ready(client, version=None):
    async def condition():
        answer = await client.get("/readyz")
        return answer.status_code == 200 and version in (None, answer.json()["version"])

    return condition


async def send(client, video: Path):
    return await client.post("/v1/predict", files={"file": (video.name, video.read_bytes())})


def true(function):
    async def condition():
        return bool(function())

    return condition
