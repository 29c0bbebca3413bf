"""Corrections over HTTP: stored once checked, reviewed, and none of it by a path from outside."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sora.config import Project, Serve
from sora.core.errors import ServiceError
from sora.core.records import ModelVersion
from sora.dataset.corrections import Inbox
from sora.registry import ChampionRef
from sora.serving import card as card_module
from sora.serving.app import create_app
from sora.serving.context import Context
from sora.serving.source import ModelCache
from sora.serving.tokens import TokenFile, Tokens
from tests.serving.conftest import CLASSES, Made
from tests.videos import make_video

SAID = {"label": "sit", "predicted": "jump", "version": "1"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    make_video(tmp_path / "project" / "data" / "sit" / "old.mp4", seed=9)
    (tmp_path / "project" / "params.yaml").write_text(f"classes: {list(CLASSES)}\n", encoding="utf-8")
    return Project(tmp_path / "project")


@asynccontextmanager
async def running(
    project: Project, models: list[Made], *, tokens: Sequence[str] | Tokens = (), files: int = 5, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Context]]:
    folder = project.root.parent
    models[0].promote(ModelCache(folder / "registry"))
    app = create_app(
        Serve(poll_seconds=0.05, decode_workers=1, **settings),
        ModelCache(folder / "registry"),
        ModelCache(folder / "cache"),
        tokens=tokens,
        inbox=Inbox(project, files, 10_000_000),
    )
    transport = httpx.ASGITransport(app)
    async with (
        app.state.context.running(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
    ):
        async with asyncio.timeout(60):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.02)
        yield client, app.state.context


async def correct(client: httpx.AsyncClient, video: Path, **fields: str) -> httpx.Response:
    files = {"file": (video.name, video.read_bytes())}
    return await client.post("/v1/corrections", files=files, data={**SAID, **fields})


def test_a_correction_from_sending_to_data(project: Project, models: list[Made], video: Path) -> None:
    async def story() -> None:
        async with running(project, models) as (client, context):
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
            assert refused.status_code == 409 and refused.json()["fix"]
            assert (await client.post(f"{address}/accept", params={"label": "swim"})).status_code == 409
            accepted = await client.post(f"{address}/accept", params={"label": "sit"})
            assert accepted.status_code == 200 and "sora run" in accepted.json()["next"]
            assert (project.data / accepted.json()["path"]).read_bytes() == video.read_bytes()
            assert (await client.post(f"{address}/accept")).status_code == 404
            assert context.active == 0 and not list(context.folder.iterdir())

    asyncio.run(story())


def test_rejecting_and_the_quota(project: Project, models: list[Made], video: Path, tmp_path: Path) -> None:
    other = make_video(tmp_path / "other.mp4", seed=5)

    async def story() -> None:
        async with running(project, models, files=1) as (client, _):
            entry = (await correct(client, video)).json()
            full = await correct(client, other)
            assert full.status_code == 507 and full.json()["type"].endswith("inbox-full")
            assert (await client.post(f"/v1/corrections/{entry['id']}/reject")).json() == {"id": entry["id"]}
            assert (await correct(client, other)).status_code == 201

    asyncio.run(story())


def test_what_is_no_correction_is_not_stored(project: Project, models: list[Made], video: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video", encoding="utf-8")

    async def story() -> None:
        async with running(project, models) as (client, _):
            for fields in (
                {"label": "swim"}, {"predicted": "swim"}, {"label": ""}, {"version": "one"}, {"version": "0"},
                {"version": "9" * 30}, {"version": "²"}, {"label": "../../x"},
            ):  # fmt: skip
                answer = await correct(client, video, **fields)
                assert answer.status_code == 422 and answer.json()["fix"], answer.text
            files = {"file": (video.name, video.read_bytes())}
            assert (await client.post("/v1/corrections", files=files, data={"label": "sit"})).status_code == 422
            assert (await client.post("/v1/corrections", data=SAID)).status_code == 415  # no multipart without a file
            assert (await client.post("/v1/corrections", files={**files, "label": ("x", b"sit")})).status_code == 400
            twice: list[tuple[str, tuple[str | None, str | bytes]]] = [
                ("label", (None, "sit")),
                ("label", (None, "sit")),
                ("file", files["file"]),
            ]
            assert (await client.post("/v1/corrections", files=twice)).status_code == 400
            assert (await correct(client, text)).status_code == 422
            assert (await client.get("/v1/corrections")).json()["entries"] == []
        assert not (project.state / "inbox").exists()

    asyncio.run(story())


@pytest.mark.parametrize("ident", ["..%2f..%2fparams.yaml", "%2e%2e", "x", "0" * 64, "*"])
def test_an_id_is_never_a_path(project: Project, models: list[Made], ident: str) -> None:
    async def story() -> None:
        async with running(project, models) as (client, _):
            for answer in (
                await client.get(f"/v1/corrections/{ident}/video"),
                await client.post(f"/v1/corrections/{ident}/accept"),
                await client.post(f"/v1/corrections/{ident}/reject"),
            ):
                assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"

    asyncio.run(story())


def test_review_needs_the_token_and_no_other_site(project: Project, models: list[Made], video: Path) -> None:
    token = "a-long-enough-token"

    async def story() -> None:
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
            assert (await correct(client, video)).status_code == 403
            assert (await client.post(f"/v1/corrections/{'0' * 64}/accept")).status_code == 403

    asyncio.run(story())


def test_the_card_says_what_was_decided(project: Project, models: list[Made], monkeypatch: pytest.MonkeyPatch) -> None:
    decided = ModelVersion(1, ("champion",), {}, "data1", "2026-01-01T00:00:00+00:00", "promoted", ("first model",))
    answers: Iterator[ServiceError | ModelVersion] = iter([ServiceError("MLflow is away"), decided])
    asked = []

    def decision(self: object, champion: ChampionRef) -> ModelVersion:
        asked.append(champion.version)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def story() -> None:
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


def test_a_registry_that_hangs_does_not_hold_the_card(
    project: Project, models: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(card_module, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(ModelCache, "decision", lambda self, champion: release.wait(60) and None)

    async def story() -> None:
        async with running(project, models) as (client, _):
            card = (await client.get("/v1/card")).json()
            assert card["version"] == 1 and "not answered" in card["problem"]
            release.set()

    asyncio.run(story())


def test_reviewing_is_a_right_of_its_own(project: Project, models: list[Made], video: Path) -> None:
    file = TokenFile(project.tokens)
    phone, boss = file.add("phone"), file.add("boss", review=True)
    old = json.loads(file.path.read_text())
    for one in old:
        del one["review"]
    given = "a-token-of-the-environment"

    async def story() -> None:
        async with running(project, models, tokens=Tokens([given], file)) as (client, _):
            client.headers["authorization"] = f"Bearer {phone}"
            entry = (await correct(client, video)).json()
            assert "sent_by" not in entry
            address = f"/v1/corrections/{entry['id']}"

            async def asked() -> list[httpx.Response]:
                return [
                    await client.get("/v1/corrections"),
                    await client.get(f"{address}/video"),
                    await client.post(f"{address}/accept"),
                    await client.post(f"{address}/reject"),
                ]

            for token in (phone, given):
                client.headers["authorization"] = f"Bearer {token}"
                for answer in await asked():
                    assert answer.status_code == 403 and answer.json()["type"].endswith("no-review"), answer.text
                    assert "--review" in answer.json()["fix"]
            client.headers["authorization"] = f"Bearer {boss}"
            (waiting,) = (await client.get("/v1/corrections")).json()["entries"]
            assert waiting["id"] == entry["id"]
            assert waiting["sent_by"] == [{"name": "phone", "accepted": 0, "refused": 0, "often_refused": False}]
            assert (await client.get(f"{address}/video")).status_code == 200
            # Tokens that were made before there was the right don't have it.
            file.path.write_text(json.dumps(old))
            assert {answer.status_code for answer in await asked()} == {403}
            assert (await correct(client, video)).status_code == 201

    asyncio.run(story())


def test_a_source_that_is_refused_often_is_named(project: Project, models: list[Made], tmp_path: Path) -> None:
    file = TokenFile(project.tokens)
    tokens = {name: file.add(name, review=name == "boss") for name in ("phone", "camera", "boss")}
    clips = [make_video(tmp_path / f"{seed}.mp4", seed=seed) for seed in range(20, 25)]

    async def story() -> None:
        async with running(project, models, tokens=Tokens((), file)) as (client, _):

            async def act(who: str, verb: str = "", **query: str) -> httpx.Response:
                client.headers["authorization"] = f"Bearer {tokens[who]}"
                return await client.post(f"/v1/corrections/{verb}", params=query)

            async def sent(who: str, clip: Path, **fields: str) -> str:
                client.headers["authorization"] = f"Bearer {tokens[who]}"
                return str((await correct(client, clip, **fields)).json()["id"])

            one = await sent("phone", clips[0])
            assert (await act("boss", f"{one}/reject")).status_code == 200
            two = await sent("phone", clips[1])
            await sent("camera", clips[1], label="jump")  # of one clip they say different things: one of them is right
            assert (await act("boss", f"{two}/accept", label="jump")).status_code == 200
            three = await sent("phone", clips[2])
            assert (await act("boss", f"{three}/reject")).status_code == 200
            await sent("phone", clips[3])
            await sent("camera", clips[4])
            client.headers["authorization"] = f"Bearer {tokens['boss']}"
            waiting = (await client.get("/v1/corrections")).json()["entries"]
            senders = sorted((one for entry in waiting for one in entry["sent_by"]), key=lambda one: one["name"])
            assert senders == [
                {"name": "camera", "accepted": 1, "refused": 0, "often_refused": False},
                {"name": "phone", "accepted": 0, "refused": 3, "often_refused": True},
            ]

    asyncio.run(story())


def test_without_tokens_a_source_is_an_address(project: Project, models: list[Made], video: Path) -> None:
    async def story() -> None:
        async with running(project, models) as (client, _):
            await correct(client, video)
            (waiting,) = (await client.get("/v1/corrections")).json()["entries"]
            assert [one["name"] for one in waiting["sent_by"]] == ["address 127.0.0.1"]

    asyncio.run(story())


OWN = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"origin": "https://evil.example"}, 403),  # row 11 of the review: this and the next were stored
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://127.0.0.1:8001"}, 403),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"origin": "https://127.0.0.1:8000"}, 403),
        ({"origin": "http://localhost:8000"}, 403),  # another name is another origin to a browser, too
        ({"origin": f"{OWN}.evil.example"}, 403),
        ({"origin": f"{OWN}@evil.example"}, 403),
        ({"origin": OWN, "sec-fetch-site": "cross-site"}, 403),
        ({"origin": OWN, "sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "something-new"}, 403),
        ({"origin": OWN}, 201),
        ({"origin": OWN, "sec-fetch-site": "same-origin"}, 201),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1:80"}, 201),
        ({"host": "LOCALHOST:8000", "origin": "http://localhost:8000"}, 201),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, 201),
        ({}, 201),  # curl, our client
        ({"host": "127.0.0.1:9", "origin": "https://sora.example"}, 201),  # serve.origins
    ],
)
def test_only_the_own_page_and_programs_change_anything(
    project: Project, models: list[Made], video: Path, sent: dict[str, str], status: int
) -> None:
    async def story() -> None:
        async with running(project, models, origins=("https://sora.example",)) as (client, _):
            client.headers.update({"host": "127.0.0.1:8000", **sent})
            assert (await client.get("/v1/model")).status_code == 200  # reading is the browser's business
            answer = await correct(client, video)
            assert answer.status_code == status, answer.text
            waiting = (await client.get("/v1/corrections")).json()["entries"]
            assert len(waiting) == (status == 201)
            if status == 403:
                assert answer.json()["fix"]
                for address in ("v1/predict", "v1/explain", f"v1/corrections/{'0' * 64}/accept"):
                    assert (await client.post(f"/{address}")).status_code == 403
                assert (await client.delete("/v1/model")).status_code == 403

    asyncio.run(story())


def test_two_origins_are_none(project: Project, models: list[Made], video: Path) -> None:
    async def story() -> None:
        async with running(project, models) as (client, _):
            headers = [("host", "127.0.0.1:8000"), ("origin", OWN), ("origin", "https://evil.example")]
            answer = await client.post("/v1/corrections", headers=headers)
            assert answer.status_code == 403

    asyncio.run(story())
