"""The server's "unsure": only where the champion's recipe has a threshold."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from sora.serving.source import ModelCache
from tests.serving.conftest import Made
from tests.serving.inside import Condition, ready, running, send


def test_the_servers_answer_is_unsure_below_the_threshold(models: list[Made], video: Path, tmp_path: Path) -> None:
    registry = ModelCache(tmp_path / "registry")
    models[0].promote(registry)
    unsure = replace(models[1].recipe, unsure_below=1.5)

    async def story() -> None:
        async with running(tmp_path) as (client, _):
            await _until(ready(client, 1))
            assert "unsure" not in (await send(client, video)).json()
            models[1].put(registry, unsure)
            registry.remember(models[1].champion)
            await _until(ready(client, 2))
            answer = (await send(client, video)).json()
            assert answer["unsure"] is True and answer["label"] in unsure.classes

    asyncio.run(story())


async def _until(condition: Condition) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)
