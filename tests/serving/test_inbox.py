"""Corrections over HTTP: stored once checked, reviewed, and none of it by a path from outside."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from sora.data.inbox import Inbox
from sora.errors import ServiceError
from sora.records import ModelVersion
from sora.serving import card as card_module
from sora.serving.app import create_app
from sora.serving.source import ModelCache
from sora.settings import Project, Serve
from tests.serving.conftest import CLASSES
from tests.videos import make_video

SAID = {"label": "sit", "predicted": "jump", "version": "1"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    make_video(tmp_path / "project" / "data" / "sit" / "old.mp4", seed=9)
    (tmp_path / "project" / "params.yaml").write_text(f"classes: {list(CLASSES)}\n", encoding="utf-8")
    return Project(tmp_path / "project")


@asynccontextmanager
async def running(project: Project, models, *, tokens=(), files: int = 5):
    folder = project.root.parent
    models[0].promote(ModelCache(folder / "registry"))
    app = create_app(
        Serve(poll_seconds=0.05, decode_workers=1),
        ModelCache(folder / "registry"),
        ModelCache(folder / "cache"),
        tokens=tokens,
        inbox=Inbox(project, files, 10_000_000),
    )
    transport = httpx.ASGITransport(app)
    async with (
        app.state.service.running(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
    ):
        async with asyncio.timeout(60):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.02)
        yield client, app.state.service


async def correct(client, video: Path, **fields):
    files = {"file": (video.name, video.read_bytes())}
    return await client.post("/v1/corrections", files=files, data={**SAID, **fields})


def test_a_correction_from_sending_to_data(project, models, video):
    async def story():
        async with running(project, models) as (client, service):
            answer = await correct(client, video)
            assert answer.status_code == 201, answer.text
            entry = answer.json()
            assert entry["filename"] == video.name and entry["label"] == "sit" and entry["version"] == 1
            assert (await correct(client, video, label="<b>wave</b>")).json()["said"] == {"sit": 1, "<b>wave</b>": 1}
            listed = (await client.get("/v1/corrections")).json()
            assert [one["id"] for one in listed["entries"]] == [entry["id"]] and listed["max_files"] == 5
            clip = await client.get(f"/v1/corrections/{entry['id']}/video")
            assert clip.content == video.read_bytes() and clip.headers["content-type"] == "video/mp4"
            assert clip.headers["content-disposition"].startswith("attachment")
            address = f"/v1/corrections/{entry['id']}"
            refused = await client.post(f"{address}/accept")  # a table could hold this label, a folder can't
            assert refused.status_code == 409 and refused.json()["mend"]
            assert (await client.post(f"{address}/accept", params={"label": "swim"})).status_code == 409
            accepted = await client.post(f"{address}/accept", params={"label": "sit"})
            assert accepted.status_code == 200 and "sora run" in accepted.json()["next"]
            assert (project.data / accepted.json()["path"]).read_bytes() == video.read_bytes()
            assert (await client.post(f"{address}/accept")).status_code == 404
            assert service.active == 0 and not list(service.folder.iterdir())

    asyncio.run(story())


def test_rejecting_and_the_quota(project, models, video, tmp_path):
    other = make_video(tmp_path / "other.mp4", seed=5)

    async def story():
        async with running(project, models, files=1) as (client, _):
            entry = (await correct(client, video)).json()
            full = await correct(client, other)
            assert full.status_code == 507 and full.json()["type"].endswith("inbox-full")
            assert (await client.post(f"/v1/corrections/{entry['id']}/reject")).json() == {"id": entry["id"]}
            assert (await correct(client, other)).status_code == 201

    asyncio.run(story())


def test_what_is_no_correction_is_not_stored(project, models, video, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video", encoding="utf-8")

    async def story():
        async with running(project, models) as (client, _):
            for fields in (
                {"label": "swim"}, {"predicted": "swim"}, {"label": ""}, {"version": "one"}, {"version": "0"},
                {"version": "9" * 30}, {"version": "²"}, {"label": "../../x"},
            ):  # fmt: skip
                answer = await correct(client, video, **fields)
                assert answer.status_code == 422 and answer.json()["mend"], answer.text
            files = {"file": (video.name, video.read_bytes())}
            assert (await client.post("/v1/corrections", files=files, data={"label": "sit"})).status_code == 422
            assert (await client.post("/v1/corrections", data=SAID)).status_code == 415  # no multipart without a file
            assert (await client.post("/v1/corrections", files={**files, "label": ("x", b"sit")})).status_code == 400
            twice = [("label", (None, "sit")), ("label", (None, "sit")), ("file", files["file"])]
            assert (await client.post("/v1/corrections", files=twice)).status_code == 400
            assert (await correct(client, text)).status_code == 422
            assert (await client.get("/v1/corrections")).json()["entries"] == []
        assert not (project.state / "inbox").exists()

    asyncio.run(story())


@pytest.mark.parametrize("ident", ["..%2f..%2fparams.yaml", "%2e%2e", "x", "0" * 64, "*"])
def test_an_id_is_never_a_path(project, models, ident):
    async def story():
        async with running(project, models) as (client, _):
            for answer in (
                await client.get(f"/v1/corrections/{ident}/video"),
                await client.post(f"/v1/corrections/{ident}/accept"),
                await client.post(f"/v1/corrections/{ident}/reject"),
            ):
                assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"

    asyncio.run(story())


def test_review_needs_the_token_and_no_other_site(project, models, video):
    token = "a-long-enough-token"

    async def story():
        async with running(project, models, tokens=(token,)) as (client, _):
            for answer in (
                await client.get("/v1/corrections"),
                await correct(client, video),
                await client.post(f"/v1/corrections/{'0' * 64}/accept"),
                await client.post("/v1/explain"),
                await client.get("/v1/card"),
            ):
                assert answer.status_code == 401
            client.headers["authorization"] = f"Bearer {token}"
            assert (await correct(client, video)).status_code == 201
            client.headers["sec-fetch-site"] = "cross-site"
            assert (await client.post(f"/v1/corrections/{'0' * 64}/accept")).status_code == 403

    asyncio.run(story())


def test_the_card_says_what_was_decided(project, models, monkeypatch):
    decided = ModelVersion(1, ("champion",), {}, "data1", "2026-01-01T00:00:00+00:00", "promoted", ("first model",))
    answers = iter([ServiceError("MLflow is away"), decided])
    asked = []

    def decision(self, champion):
        asked.append(champion.version)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def story():
        async with running(project, models) as (client, _):
            card = (await client.get("/v1/card")).json()
            assert card["version"] == 1 and card["data_version"] == "data1"
            assert card["metrics"] == {"test/accuracy": 0.5} and card["classes"] == list(CLASSES)
            assert card["decision"] is None and card["problem"] is None  # a folder of models keeps no decisions
        monkeypatch.setattr(ModelCache, "decision", decision)
        async with running(project, models) as (client, _):
            card = (await client.get("/v1/card")).json()
            assert card["decision"] is None and "away" in card["problem"]
            for _ in range(3):  # asked again after a failure, and then not for each page that looks
                card = (await client.get("/v1/card")).json()
                assert card["decision"] == "promoted" and card["reasons"] == ["first model"] and not card["problem"]
            assert asked == [1, 1]

    asyncio.run(story())


def test_a_registry_that_hangs_does_not_hold_the_card(project, models, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(card_module, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(ModelCache, "decision", lambda self, champion: release.wait(60) and None)

    async def story():
        async with running(project, models) as (client, _):
            card = (await client.get("/v1/card")).json()
            assert card["version"] == 1 and "not answered" in card["problem"]
            release.set()

    asyncio.run(story())
