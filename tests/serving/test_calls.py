"""One call: its deadline, several files, the timeline. The application in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sora.serving.source import ModelCache
from tests.serving.conftest import SPEC, Made
from tests.serving.inside import Condition, ready, running, send, true, until
from tests.videos import make_video


def _files(*named: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", pair) for pair in named]


def answered(client: httpx.AsyncClient, video: Path) -> Condition:
    async def condition() -> bool:
        return (await send(client, video)).status_code == 200

    return condition


def _problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"urn:sora:problem:{kind}" and document["fix"]
    return document


# -- the deadline --


def test_time_that_the_video_took_is_504_and_time_behind_others_503(
    models: list[Made], video: Path, tmp_path: Path
) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path, request_timeout=1.5) as (client, context):
            await until(ready(client))
            await send(client, video)  # the decoder is up
            assert context.pool is not None
            (stopped,) = context.pool.pids
            os.kill(stopped, signal.SIGSTOP)
            one, two = await asyncio.gather(send(client, video), send(client, video))
            assert _problem(one, 504, "deadline")["stage"] == "decode" and "retry-after" not in one.headers
            assert _problem(two, 503, "deadline")["stage"] == "wait" and two.headers["retry-after"]
            assert context.active == 0 and not list(context.folder.iterdir())
            await until(answered(client, video))  # by another decoder
            assert stopped not in context.pool.pids

    asyncio.run(story())


def test_time_spent_waiting_for_the_model_is_503(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    gate = threading.Event()

    async def story() -> None:
        async with running(tmp_path, request_timeout=1) as (client, context):
            await until(ready(client))
            await send(client, video)
            context.batcher._thread.submit(gate.wait)  # the model is at something long
            try:
                answers = await asyncio.gather(*(send(client, video) for _ in range(3)))
            finally:
                gate.set()
            for answer in answers:
                assert _problem(answer, 503, "deadline")["stage"] == "queue" and answer.headers["retry-after"]
            assert len(context.batcher) == 0
            assert (await send(client, video)).status_code == 200

    asyncio.run(story())


def test_the_upload_counts(models: list[Made], tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def slowly() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        await asyncio.sleep(30)

    async def story() -> None:
        async with running(tmp_path, request_timeout=0.3) as (client, context):
            await until(ready(client))
            headers = {"content-type": "multipart/form-data; boundary=b"}
            answer = await client.post("/v1/predict", content=slowly(), headers=headers)
            assert "0.3 s" in _problem(answer, 408, "the-upload-took-too-long")["detail"]
            assert context.active == 0 and not list(context.folder.iterdir())

    asyncio.run(story())


# -- several files --


def test_several_files_get_an_answer_or_a_problem_each(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    content = video.read_bytes()
    other = make_video(tmp_path / "other.mp4", seed=7).read_bytes()

    async def story() -> None:
        async with running(tmp_path, max_files=4) as (client, context):
            await until(ready(client))
            alone = {name: (await client.post("/v1/predict", files=_files((name, data)))).json()
                     for name, data in (("a.mp4", content), ("d.mp4", other))}  # fmt: skip
            assert "answers" not in alone["a.mp4"]
            named = (("a.mp4", content), ("b.txt", b"no video"), ("c.mp4", b""), ("d.mp4", other))
            answer = await client.post("/v1/predict", files=_files(*named))
            assert answer.status_code == 200 and set(answer.json()) == {"answers"}
            found = answer.json()["answers"]
            assert [one["filename"] for one in found] == ["a.mp4", "b.txt", "c.mp4", "d.mp4"]
            for one in (found[0], found[3]):
                expected = alone[one["filename"]]
                assert one.keys() == expected.keys() and one["seconds"].keys() == expected["seconds"].keys()
                assert one["label"] == expected["label"] and one["version"] == 1
                assert one["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
            assert [one["rule"] for one in found[1:3]] == ["not_a_video", "not_a_video"]
            assert all(one["status"] == 422 and one["fix"] for one in found[1:3])
            assert context.active == 0 and not list(context.folder.iterdir())

    asyncio.run(story())


def test_the_deadline_of_a_call_leaves_the_answers_that_were_ready(
    models: list[Made], video: Path, tmp_path: Path
) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    content = video.read_bytes()
    slow = make_video(tmp_path / "slow.mp4", frames=900, fps=25, size=(640, 480)).read_bytes()

    async def story() -> None:
        async with running(tmp_path, request_timeout=1.5) as (client, context):
            await until(ready(client))
            await send(client, video)
            assert context.pool is not None
            (pid,) = context.pool.pids
            asked = asyncio.create_task(
                client.post("/v1/predict", files=_files(("a", content), ("slow", slow), ("b", content)))
            )
            metric = context.metrics.registry.get_sample_value
            await until(true(lambda: metric("sora_batch_clips_count") == 2))  # the first one is with the model
            os.kill(pid, signal.SIGSTOP)
            first, second, third = (await asked).json()["answers"]
            assert first["label"]
            assert second["status"] == 504 and second["filename"] == "slow"
            assert third["status"] == 503 and third["filename"] == "b"
            assert context.active == 0 and not list(context.folder.iterdir())

    asyncio.run(story())


def test_files_and_bytes_of_a_call_are_bounded(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    content = video.read_bytes()

    async def story() -> None:
        async with running(tmp_path, max_files=2, max_bytes=len(content) + 100) as (client, context):
            await until(ready(client))
            assert (await send(client, video)).status_code == 200
            many = await client.post("/v1/predict", files=_files(("a", b""), ("b", b""), ("c", b"")))
            assert "2 files" in _problem(many, 400, "many-files")["detail"]
            both = await client.post("/v1/predict", files=_files(("a", content), ("b", content)))
            assert _problem(both, 413, "too-large")["max_bytes"] == len(content) + 100
            assert context.active == 0 and not list(context.folder.iterdir())
            assert (await client.get("/v1/model")).json()["limits"]["files"] == 2

    asyncio.run(story())


def test_a_failure_of_the_server_fails_the_whole_call(
    models: list[Made], video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    content = video.read_bytes()

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            await until(ready(client))
            monkeypatch.setattr(context.batcher, "answer", None)
            with pytest.raises(TypeError):  # ASGITransport raises what Starlette raises again for the server's log
                await client.post("/v1/predict", files=_files(("a", content), ("b", content)))
            assert context.active == 0 and not list(context.folder.iterdir())

    asyncio.run(story())


# -- the timeline --


def test_a_long_video_has_a_timeline(models: list[Made], video: Path, tmp_path: Path) -> None:
    registry = ModelCache(tmp_path / "registry")
    windows = replace(SPEC, sampling="window", window_seconds=0.5, max_clips=3)
    models[0].put(registry, replace(models[0].recipe, clip=windows))
    registry.remember(models[0].champion)
    short = make_video(tmp_path / "short.mp4", frames=6, fps=12)

    async def story() -> None:
        async with running(tmp_path) as (client, _):
            await until(ready(client))
            body = (await send(client, video)).json()  # 24 frames at 12 a second
            assert body["clips"] == 3
            assert [(w["start"], w["end"]) for w in body["timeline"]] == [(0.0, 0.5), (0.75, 1.25), (1.5, 2.0)]
            for name, mean in body["probabilities"].items():
                assert mean == pytest.approx(sum(w["probabilities"][name] for w in body["timeline"]) / 3)
            for window in body["timeline"]:
                assert window["label"] == max(window["probabilities"], key=window["probabilities"].get)
            assert body["span"]["start"] in (0.0, 0.75, 1.5) and body["span"]["end"] in (0.5, 1.25, 2.0)
            assert "timeline" not in (await send(client, short)).json()
            asked = await client.post("/v1/predict?timeline=1", files=_files(("s", short.read_bytes())))
            assert asked.json()["timeline"][0]["end"] == 0.5 and asked.json()["span"] == {"start": 0.0, "end": 0.5}
            wrong = await client.post("/v1/predict?timeline=perhaps", files=_files(("s", short.read_bytes())))
            assert "timeline" in _problem(wrong, 400, "the-request-cant-be-read")["detail"]

    asyncio.run(story())


def test_one_clip_has_a_timeline_on_request(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path) as (client, _):
            await until(ready(client))
            asked = await client.post("/v1/predict?timeline=1", files=_files(("v", video.read_bytes())))
            body = asked.json()
            assert body["span"] == {"start": 0.0, "end": 2.0}
            assert body["timeline"] == [{**body["span"], **{k: body[k] for k in ("label", "probabilities")}}]

    asyncio.run(story())
