"""Uploads that cost much: the right answer, soon, and the server goes on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from sora.runtime.predictor import predict_files
from sora.serving.source import ModelCache
from tests.bombs import animated_png, many_streams, motion_jpeg
from tests.serving.conftest import Made
from tests.serving.inside import ready, running, send, until

BOMBS = {
    "jpegs.avi": (motion_jpeg, "8192x8192 pixels"),
    "pixels.apng": (animated_png, "15000x15000 pixels"),
    "streams.mkv": (many_streams, "more than 128 streams"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_it_is_too_large_and_said_at_once(name: str, models: list[Made], video: Path, tmp_path: Path) -> None:
    make, words = BOMBS[name]
    bomb = make(tmp_path / name)
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(ready(client))
            assert (await send(client, video)).status_code == 200
            began = time.monotonic()
            answer = await send(client, bomb)
            assert time.monotonic() - began < 20
            problem = answer.json()
            assert answer.status_code == 413 and problem["rule"] == "too_large" and words in problem["detail"]
            assert (await send(client, video)).status_code == 200
            assert context.pool is not None and context.pool.replaced == 0

    asyncio.run(story())


def test_predicting_from_the_command_line_has_the_same_limits(models: list[Made], video: Path, tmp_path: Path) -> None:
    bomb = motion_jpeg(tmp_path / "jpegs.avi")
    found = predict_files([bomb, tmp_path / "none.mp4", video], models[0].file, models[0].recipe, 1)
    assert "8192x8192 pixels" in found[0]["error"] and "is not a file" in found[1]["error"] and found[2]["label"]
