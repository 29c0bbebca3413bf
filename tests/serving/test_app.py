"""The application in this process: starts, faults of the registry, bounds. Real models, decoders and files."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sora.config import Serve
from sora.core.errors import ServiceError, VideoError
from sora.core.tensors import VIDEO, Clips
from sora.registry import ChampionRef
from sora.runtime.predictor import Predictor
from sora.serving import follow, uploads
from sora.serving.app import create_app
from sora.serving.batcher import Batcher
from sora.serving.decode_pool import DecodePool
from sora.serving.source import ModelCache
from tests.serving.conftest import SPEC, Made, other_golden
from tests.serving.inside import ready, running, send, true, until


def test_no_champion_yet_and_then_the_first(models: list[Made], video: Path, tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(true(lambda: context.follower.none))
            for answer in (await client.get("/readyz"), await send(client, video)):
                assert answer.status_code == 503 and answer.headers["retry-after"]
                assert "sora run" in answer.json()["fix"]
            model = (await client.get("/v1/model")).json()
            assert model["version"] is None and model["classes"] == []
            assert (await client.get("/healthz")).status_code == 200
            models[0].promote(ModelCache(tmp_path / "registry"))
            await until(ready(client))
            assert (await send(client, video)).json()["version"] == 1
        assert not context.folder.exists()

    asyncio.run(story())


def test_without_a_registry_the_cache_serves_also_after_a_restart(
    models: list[Made], video: Path, tmp_path: Path
) -> None:
    registry = ModelCache(tmp_path / "registry")
    models[0].promote(registry)
    models[0].put(ModelCache(tmp_path / "cache"))  # as `RegistrySource` leaves it there

    async def first() -> None:
        async with running(tmp_path) as (client, context):
            await until(ready(client))
            (registry.folder / "champion.json").write_text("{broken", encoding="utf-8")
            await until(true(lambda: context.follower.problem))
            assert (await send(client, video)).status_code == 200
            following = (await client.get("/v1/model")).json()["following"]
            assert following["registry"] == "unreachable" and "broken" not in following["problem"][:20]

    async def second() -> None:
        async with running(tmp_path) as (client, context):
            await until(ready(client, 1))
            assert context.follower.problem
            models[1].promote(registry)  # it is back, with another champion
            await until(ready(client, 2))

    asyncio.run(first())
    asyncio.run(second())


def test_nothing_in_the_cache_and_no_registry(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "champion.json").write_text("[]", encoding="utf-8")

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(true(lambda: context.follower.problem))
            answer = await client.get("/readyz")
            assert answer.status_code == 503 and "champion.json" in answer.json()["detail"]

    asyncio.run(story())


def test_a_refused_champion_at_the_start_leaves_the_last_good_one(
    models: list[Made], video: Path, tmp_path: Path
) -> None:
    cache, registry = ModelCache(tmp_path / "cache"), ModelCache(tmp_path / "registry")
    models[0].promote(cache)
    models[1].put(registry, other_golden(models[1].recipe))
    registry.remember(models[1].champion)

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(ready(client))
            assert (await send(client, video)).json()["version"] == 1
            assert context.follower.refused is not None and context.follower.refused.champion.version == 2
        champion = cache.champion()
        assert champion is not None and champion.version == 1

    asyncio.run(story())


def test_a_refusal_is_written_down_with_the_version(
    models: list[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that fails at first, and not for ever."""
    models[0].promote(ModelCache(tmp_path / "cache"))
    registry = ModelCache(tmp_path / "registry")
    models[1].put(registry, other_golden(models[1].recipe))
    registry.remember(models[1].champion)
    write = ModelCache.refused
    tried, failures = 0, 2

    def failing(self: ModelCache, champion: ChampionRef, reason: str) -> None:
        nonlocal tried
        tried += 1
        if tried <= failures:
            raise ServiceError("the registry is read-only", fix="")
        write(self, champion, reason)

    monkeypatch.setattr(ModelCache, "refused", failing)
    note = registry.model_folder(models[1].champion.digest) / "refused.txt"

    async def story() -> None:
        nonlocal tried, failures
        async with running(tmp_path) as (_, context):
            await until(true(note.exists))
            text = note.read_text()
            assert "differs" in text and socket.gethostname() in text
            await asyncio.sleep(0.3)
            current = context.follower.current
            assert tried == 3 and current is not None and current.champion.version == 1
            tried, failures = 0, 100
            models[0].promote(registry)
            await until(true(lambda: context.follower.refused is None))
            registry.remember(models[1].champion)
            await until(true(lambda: tried == follow.NOTE_ATTEMPTS))
            await asyncio.sleep(0.3)
            assert tried == follow.NOTE_ATTEMPTS

    asyncio.run(story())


def test_a_damaged_cache_is_refused(models: list[Made], tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "cache")
    models[0].promote(cache)
    file = cache.model_folder(models[0].champion.digest) / "model.keras"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "champion.json").write_text("no", encoding="utf-8")

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(true(lambda: context.follower.refused))
            answer = await client.get("/readyz")
            assert answer.status_code == 503 and "sha256" in answer.json()["detail"]

    asyncio.run(story())


def test_a_registry_that_hangs_does_not_hold_the_start_up(
    models: list[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "ASK_SECONDS", 0.3)
    models[0].promote(ModelCache(tmp_path / "cache"))
    release = threading.Event()

    class Hanging(ModelCache):
        asked = 0

        def champion(self) -> None:
            self.asked += 1
            release.wait(60)
            return None

    async def story() -> None:
        source = Hanging(tmp_path / "registry")
        app = create_app(Serve(poll_seconds=0.05, decode_workers=1), source, ModelCache(tmp_path / "cache"))
        context = app.state.context
        async with context.running():
            await until(true(lambda: context.follower.current))
            assert "has not answered" in context.follower.problem and source.asked == 1
            release.set()

    asyncio.run(story())


def test_beyond_the_queue_is_429(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path, queue=2, decode_timeout=2) as (client, context):
            await until(ready(client))
            assert (await send(client, video)).status_code == 200
            assert context.pool is not None
            (stopped,) = context.pool.pids
            os.kill(stopped, signal.SIGSTOP)
            under_way = [asyncio.create_task(send(client, video)) for _ in range(2)]
            await until(true(lambda: context.active == 2))
            answer = await send(client, video)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["type"].endswith("queue-full")
            os.kill(stopped, signal.SIGCONT)
            assert [task.status_code for task in await asyncio.gather(*under_way)] == [200, 200]
            assert (await send(client, video)).status_code == 200

    asyncio.run(story())


def test_requests_that_wait_share_one_call(models: list[Made], video: Path, tmp_path: Path) -> None:
    """While the model is busy, what arrives makes the next batch."""
    predictor = Predictor(models[0].file, models[0].recipe, 1)
    other = Predictor(models[1].file, models[1].recipe, 2)
    clips = Clips({VIDEO: np.random.default_rng(0).integers(0, 256, (12, 4, 32, 32, 3), np.uint8)})
    gate = threading.Event()

    class Busy(Predictor):
        def __init__(self) -> None:
            pass

        def probabilities(self, clips: Clips) -> np.ndarray:
            gate.wait(30)
            return np.ones((len(clips), 3))

    async def story() -> tuple[list[int], list[Any]]:
        sizes: list[int] = []
        batcher = Batcher(sizes.append)
        await batcher.start()
        asked = [(Busy(), clips[:1]), *((predictor, clips[i : i + 1]) for i in range(6)), (other, clips[:2])]
        tasks = []
        for who, what in (*asked, (predictor, clips)):
            tasks.append(asyncio.create_task(batcher.answer(who, what)))
            await asyncio.sleep(0.01)
        tasks[4].cancel()  # a client that hung up
        await asyncio.sleep(0.01)
        gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return sizes, answers[1:]

    sizes, answers = asyncio.run(story())
    assert isinstance(answers[3], asyncio.CancelledError)
    # The busy one; five that waited, in calls of at most four; the other model's; a long video in portions.
    assert sizes == [1, 4, 1, 2, 4, 4, 4]
    for i in (0, 1, 2, 4, 5):
        np.testing.assert_allclose(answers[i].probabilities, predictor.probabilities(clips[i : i + 1]), atol=1e-5)
    np.testing.assert_allclose(answers[6].probabilities, other.probabilities(clips[:2]), atol=1e-5)
    np.testing.assert_allclose(answers[7].probabilities, predictor.probabilities(clips), atol=1e-5)


def test_tokens(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    token = "a-long-enough-token"

    async def story() -> None:
        async with running(tmp_path, tokens=("another-token-of-this", token)) as (client, _):
            await until(ready(client))
            for path in ("/", "/page/page.js", "/healthz", "/readyz", "/openapi.json"):
                assert (await client.get(path, headers={"host": "sora.example"})).status_code == 200
            for given in (None, "Bearer wrong", "Basic a", f"bearer {token}x", "Bearer "):
                headers = {"authorization": given} if given else {}
                for answer in (
                    await client.get("/v1/model", headers=headers),
                    await client.get("/metrics", headers=headers),
                    await client.post("/v1/predict", headers=headers),
                ):
                    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            client.headers["authorization"] = "Bearer another-token-of-this"
            assert (await send(client, video)).status_code == 200

    asyncio.run(story())


def test_a_full_disk_says_so_and_leaves_nothing(
    models: list[Made], video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    def full(self: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(ready(client))
            with monkeypatch.context() as patch:
                patch.setattr(uploads._Reader, "flush", full)
                answer = await send(client, video)
            assert answer.status_code == 507 and answer.headers["retry-after"]
            assert not list(context.folder.iterdir())
            assert (await send(client, video)).status_code == 200

    asyncio.run(story())


def test_a_decoder_out_of_memory_costs_one_request(video: Path, tmp_path: Path) -> None:
    huge = replace(SPEC, frames=256, height=1024, width=1024)  # 805 MB of clips

    async def story() -> None:
        pool = DecodePool(Serve(decode_workers=1, decode_memory=700_000_000))
        await pool.start()
        try:
            with pytest.raises(VideoError, match="memory"):
                await pool.decode(video, huge)
            assert (await pool.decode(video, SPEC)).clips.video.shape == (1, 4, 32, 32, 3)
            assert pool.replaced == 1 and len(pool.pids) == 1
        finally:
            await pool.close()

    asyncio.run(story())


def test_a_decoder_holds_no_secret_and_cannot_write(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORA_API_TOKEN", "a-long-enough-token")

    async def story() -> None:
        pool = DecodePool(Serve(decode_workers=1))
        await pool.start()
        try:
            await pool.decode(video, SPEC)
            (pid,) = pool.pids
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            limits = Path(f"/proc/{pid}/limits").read_text()
        finally:
            await pool.close()
        assert b"SORA_API_TOKEN" not in environment
        assert re.search(r"Max file size\s+0 +0", limits) and re.search(r"Max open files\s+64 ", limits)
        assert not psutil.pid_exists(pid)

    asyncio.run(story())


def test_no_decoder_to_be_had_is_503(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path, decode_memory=100_000_000) as (client, _):  # too little to import OpenCV
            await until(ready(client))
            for _ in range(3):
                answer = await send(client, video)
                assert answer.status_code == 503 and "decode_memory" in answer.json()["fix"]

    asyncio.run(story())


def test_an_unexpected_failure_is_a_problem_without_insides(
    models: list[Made], video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(ready(client))
            monkeypatch.setattr(context.batcher, "answer", None)
            with pytest.raises(TypeError):  # ASGITransport raises what Starlette raises again for the server's log
                await send(client, video)
            assert context.active == 0 and not list(context.folder.iterdir())

    asyncio.run(story())
