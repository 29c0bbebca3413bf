"""The representation on request: what `sora embed` gives for the same file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sora.client import Client
from sora.runtime.predictor import Predictor, clips_of
from sora.serving.source import ModelCache
from tests.serving.conftest import Made
from tests.serving.inside import ready, running, until
from tests.serving.standing import standing


def test_an_embedding_comes_where_it_is_asked_for(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    predictor = Predictor(models[0].file, models[0].recipe, 1)
    expected = predictor.embeddings(clips_of(video, models[0].recipe)).mean(axis=0)

    async def story() -> tuple[dict[str, Any], ...]:
        async with running(tmp_path) as (client, context):
            await until(ready(client))
            files = [("file", ("a.mp4", video.read_bytes())), ("file", ("b.mp4", video.read_bytes()))]
            plain = (await client.post("/v1/predict", files=files[:1])).json()
            one = (await client.post("/v1/predict?embedding=1", files=files[:1])).json()
            two = (await client.post("/v1/predict?embedding=1", files=files)).json()["answers"]
            assert context.active == 0
            return plain, one, *two

    plain, *asked = asyncio.run(story())
    assert "embedding" not in plain
    for answer in asked:
        assert answer["embedding"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert answer["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-6)


def test_the_client_asks_for_embeddings(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    with standing(tmp_path) as server, Client(str(server.client.base_url)) as sora:
        server.until_ready()
        assert sora.predict(video).embedding == ()
        answer = sora.predict(video, embedding=True)
        both = sora.predict_all([video, video], embedding=True)
        assert len(answer.embedding) > 1 and [getattr(one, "embedding", None) for one in both] == [answer.embedding] * 2
