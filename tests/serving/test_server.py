"""One real server process, real uploads over a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sora.core.records import Recipe
from sora.serving.source import ModelCache
from tests.serving.conftest import CLASSES, Made, other_golden
from tests.serving.standing import Standing, standing
from tests.videos import make_video

LIMITS: dict[str, Any] = {
    "max_bytes": 3_000_000,
    "max_seconds": 60,
    "decode_timeout": 20,
    "poll_seconds": 0.1,
    "queue": 32,
    "upload_timeout": 3,
}


@pytest.fixture(scope="module")
def server(models: list[Made], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    folder = tmp_path_factory.mktemp("server")
    models[0].promote(ModelCache(folder / "registry"))
    with standing(folder, **LIMITS) as it:
        it.until_ready()
        yield it
        assert it.process.poll() is None, it.log()


@pytest.fixture(autouse=True)
def nothing_is_left(server: Standing) -> Iterator[None]:
    yield
    server.until(lambda: not server.leftovers(), 10)


def _decoders(server: Standing) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.process.pid).children() if "sora.media.decoder" in child.cmdline()]


def _problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status and document["fix"] and document["detail"] and document["title"]
    assert document["type"].startswith("urn:sora:problem:")
    return document


def test_a_video_is_answered(server: Standing, models: list[Made], video: Path) -> None:
    from sora.runtime.predictor import predict_files

    answer = server.send(video)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    expected = predict_files([video], models[0].file, models[0].recipe, 1)[0]
    assert body["filename"] == video.name and body["version"] == 1 and body["data_version"] == "data1"
    assert body["label"] == expected["label"]
    assert body["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
    assert set(body["seconds"]) == {"upload", "wait", "decode", "queue", "model"}


def test_the_model_says_what_it_is(server: Standing) -> None:
    body = server.client.get("/v1/model").json()
    assert body["version"] == 1 and tuple(body["classes"]) == CLASSES and body["data_version"] == "data1"
    assert body["clip"]["frames"] == 4 and body["metrics"] == {"test/accuracy": 0.5} and body["since"]
    assert body["following"]["refused"] is None and body["following"]["registry"] == "ok"


def test_alive_ready_and_metrics(server: Standing) -> None:
    assert server.client.get("/healthz").json() == {"status": "alive"}
    assert server.client.get("/readyz").json() == {"status": "ready", "version": 1}
    text = server.client.get("/metrics").text
    for name in (
        "sora_requests_total",
        "sora_request_seconds",
        "sora_model_version 1.0",
        "sora_batch_clips",
        "sora_queue",
    ):
        assert name in text


def test_the_page_asks_nobody_else(server: Standing) -> None:
    page = server.client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in ("page.js", "page.css", "icon.svg"):
        assert f"page/{name}" in page.text and server.client.get(f"/page/{name}").status_code == 200
    assert "http://" not in page.text and "https://" not in page.text and "innerHTML" not in page.text
    for outside in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/absent.js"):
        assert server.client.get(outside).status_code == 404


def test_openapi_describes_it(server: Standing) -> None:
    document = server.client.get("/openapi.json").json()
    body = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["required"] == ["file"]
    answers = document["paths"]["/v1/predict"]["post"]["responses"]
    for status in ("413", "422", "429", "503"):
        schema = answers[status]["content"]["application/problem+json"]["schema"]
        assert set(schema["required"]) == {"type", "title", "status", "detail", "fix"}
    assert server.client.get("/docs").status_code == 404  # it would load scripts from elsewhere


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/absent", 404), ("GET", "/v1/predict", 405), ("DELETE", "/v1/model", 405)]
)
def test_unknown_addresses_are_problems(server: Standing, method: str, path: str, status: int) -> None:
    _problem(server.client.request(method, path), status)


def test_odd_files_are_answered_or_refused(server: Standing, shared: Path) -> None:
    files = [file for file in sorted((shared / "odd").iterdir()) if file.suffix != ".csv"]
    replaced = _gauge(server, "sora_decoders_replaced")
    for file in files:
        answer = server.send(file)
        assert answer.status_code in (200, 422), f"{file.name}: {answer.text}"
        if answer.status_code == 422:
            document = _problem(answer, 422)
            assert document["rule"] in ("not_a_video", "unreadable") and ".upload" not in document["detail"]
    assert _gauge(server, "sora_decoders_replaced") == replaced  # none of them needed a new decoder
    assert len(_decoders(server)) == 2


def test_text_and_playlists_open_nothing(server: Standing, tmp_path: Path, video: Path) -> None:
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile '{video}'\n", encoding="utf-8")
    hls = tmp_path / "list.m3u8.mp4"
    hls.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{video}\n#EXT-X-ENDLIST\n", encoding="utf-8")
    for file in (playlist, hls):
        assert _problem(server.send(file), 422)["rule"] == "not_a_video"


def test_names_are_shown_and_never_opened(server: Standing, video: Path) -> None:
    for given, shown in (
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a b.mp4", "a b.mp4"),
        ("<img src=x>.mp4", "<img src=x>.mp4"),
        ("x" * 1000, "x" * 255),
    ):
        assert server.send(video, given).json()["filename"] == shown


def test_too_large_is_refused_before_and_while_it_is_read(server: Standing, tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    large.write_bytes(os.urandom(3_500_000))
    assert _problem(server.send(large), 413)["max_bytes"] == 3_000_000  # by its announced length

    def chunks() -> Iterator[bytes]:  # chunked: no length announced
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.mp4"\r\n\r\n'
        for _ in range(60):
            yield os.urandom(64_000)
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(httpx.WriteError):  # the server hung up on what it does not want
        _problem(server.client.post("/v1/predict", content=chunks(), headers=headers), 413)


def test_too_long_is_refused(server: Standing, tmp_path: Path) -> None:
    long = make_video(tmp_path / "long.mp4", frames=130, fps=2, size=(32, 32))
    document = _problem(server.send(long), 413)
    assert document["rule"] == "too_large" and "60 seconds" in document["detail"]


FORM = "multipart/form-data; boundary=b"


def _part(disposition: bytes, content: bytes = b"x") -> bytes:
    return b"--b\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + content + b"\r\n"


FILE = b'name="file"; filename="x"'
BAD_BODIES = {
    "no multipart": ("application/json", b"{}", 415),
    "no content type": ("", b"x", 415),
    "no boundary": ("multipart/form-data", b"x", 400),
    "long boundary": ("multipart/form-data; boundary=" + "b" * 300, b"x", 400),
    "empty": (FORM, b"", 400),
    "garbage": (FORM, b"\x00\xff" * 500, 400),
    "cut off": (FORM, _part(FILE), 400),
    "another field": (FORM, _part(b'name="path"; filename="x"', b"/etc/passwd") + b"--b--\r\n", 400),
    "no file": (FORM, _part(b'name="file"', b"/etc/passwd") + b"--b--\r\n", 400),
    "a field beside the file": (FORM, _part(FILE) + _part(b'name="path"', b"/etc/passwd") + b"--b--\r\n", 400),
    "cut off in the second file": (FORM, _part(FILE) * 2, 400),
    "too many files": (FORM, _part(FILE, b"") * 17 + b"--b--\r\n", 400),
    "many part headers": (FORM, b"--b\r\n" + b"a: b\r\n" * 5000, 400),
    "endless part header": (FORM, b"--b\r\na: " + b"b" * 100_000, 400),
    "empty file": (FORM, _part(FILE, b"") + b"--b--\r\n", 422),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bodies_that_are_no_upload(server: Standing, case: str) -> None:
    kind, body, status = BAD_BODIES[case]
    _problem(server.client.post("/v1/predict", content=body, headers={"content-type": kind} if kind else {}), status)


def test_a_slow_upload_is_cut_off(server: Standing) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 100000\r\n\r\n--b\r\n"
        )
        line.settimeout(10)
        assert b" 408 " in line.recv(1000).split(b"\r\n")[0]


def test_a_decoder_that_is_killed_costs_one_request(server: Standing, video: Path, tmp_path: Path) -> None:
    """While it works, and while it is idle."""
    slow = make_video(tmp_path / "slow.mp4", frames=500, fps=25, size=(640, 480))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.send, slow)
        server.until(lambda: _gauge(server, "sora_predictions_active") == 1, 10)
        time.sleep(0.1)
        for decoder in _decoders(server):
            os.kill(decoder.pid, signal.SIGKILL)
        answer = waiting.result()
    if answer.status_code != 200:  # on a fast machine it may have been done already
        assert "failed" in _problem(answer, 422)["detail"]
    for _ in range(4):
        assert server.send(video).status_code == 200
    for decoder in _decoders(server):
        decoder.kill()
    time.sleep(0.2)
    for _ in range(4):
        assert server.send(video).status_code == 200
    assert len(_decoders(server)) == 2


def test_a_decoder_that_hangs_is_replaced(server: Standing, video: Path) -> None:
    hung = {decoder.pid for decoder in _decoders(server)}
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: server.send(video), range(2)))
    assert [_problem(answer, 422)["rule"] for answer in answers] == ["too_slow", "too_slow"]
    assert server.send(video).status_code == 200
    assert not hung & {decoder.pid for decoder in _decoders(server)}


def test_a_client_that_hangs_up_frees_its_place(server: Standing, tmp_path: Path, video: Path) -> None:
    slow = make_video(tmp_path / "slow.mp4", frames=300, fps=25, size=(640, 480)).read_bytes()
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.mp4"\r\n\r\n'
    body = head + slow + b"\r\n--b--\r\n"
    lines = []
    for _ in range(4):
        line = socket.create_connection(("127.0.0.1", server.port))
        line.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        lines.append(line)
    for line in lines:
        line.close()
    server.until(lambda: _gauge(server, "sora_predictions_active") == 0, 3)
    assert server.send(video).status_code == 200


def test_many_at_once_share_calls_and_all_are_answered(server: Standing, video: Path) -> None:
    before = _gauge(server, "sora_batch_clips_count")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.send(video).status_code, range(48)))
    assert answers == [200] * 48
    assert _gauge(server, "sora_batch_clips_count") - before <= 48


def test_requests_carry_an_id(server: Standing) -> None:
    assert server.client.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    strange = server.client.get("/healthz", headers={"x-request-id": 'a"b\tc'}).headers["x-request-id"]
    assert len(strange) == 32
    lines = [json.loads(line.split(":", 2)[2]) for line in server.log().splitlines() if "sora.serving.access" in line]
    assert any(line["id"] == "abc-1" and line["route"] == "/healthz" and line["status"] == 200 for line in lines)


def test_without_tokens_only_this_machine_is_answered(server: Standing) -> None:
    """A page elsewhere can make a browser ask any address, by a name that it controls."""
    _problem(server.client.get("/v1/model", headers={"host": "evil.example"}), 403)
    assert server.client.get("/v1/model", headers={"host": "localhost:1"}).status_code == 200
    _problem(server.client.post("/v1/predict", headers={"sec-fetch-site": "cross-site"}), 403)


def test_the_champion_moves_under_load(server: Standing, models: list[Made], video: Path) -> None:
    """No request fails, and each is answered by a version that was champion while it was under way."""
    registry = ModelCache(server.folder / "registry")
    told = {made.version: predict for made, predict in zip(models, _expected(models, video), strict=True)}
    stop = threading.Event()
    seen: list[tuple[int, int, str]] = []

    def client() -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60, trust_env=False) as line:
            while not stop.is_set():
                with video.open("rb") as stream:
                    answer = line.post("/v1/predict", files={"file": stream})
                body = answer.json()
                seen.append((answer.status_code, body.get("version"), body.get("label")))

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        for made in (models[1], models[0], models[1], models[0]):
            made.promote(registry)
            server.until(lambda made=made: server.client.get("/readyz").json()["version"] == made.version, 60)
            server.until(lambda made=made: seen[-1][1] == made.version, 20)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert {status for status, _, _ in seen} == {200}
    assert {(version, label) for _, version, label in seen} == {(v, told[v]["label"]) for v in (1, 2)}


def test_going_back_to_the_one_before_is_a_pointer_move(server: Standing, models: list[Made]) -> None:
    registry = ModelCache(server.folder / "registry")
    for made in (models[1], models[0]):
        made.promote(registry)
        server.until(lambda made=made: server.client.get("/readyz").json()["version"] == made.version, 60)
    start = time.monotonic()
    models[1].promote(registry)
    server.until(lambda: server.client.get("/readyz").json()["version"] == 2, 60)
    assert time.monotonic() - start < 15  # the poll and no loading
    models[0].promote(registry)
    server.until(lambda: server.client.get("/readyz").json()["version"] == 1, 60)


def test_a_version_that_fails_is_refused_and_reported(server: Standing, models: list[Made], video: Path) -> None:
    registry = ModelCache(server.folder / "registry")
    bad = replace(models[0].champion, version=9, digest=_damaged(registry, models[0], other_golden(models[0].recipe)))
    registry.remember(bad)
    server.until(lambda: server.client.get("/v1/model").json()["following"]["refused"], 60)
    refused = server.client.get("/v1/model").json()["following"]["refused"]
    assert refused["version"] == 9 and "differs" in refused["reason"] and refused["fix"]
    assert server.send(video).json()["version"] == 1
    assert "sora_model_refusals_total 1.0" in server.client.get("/metrics").text
    models[0].promote(registry)
    server.until(lambda: server.client.get("/v1/model").json()["following"]["refused"] is None, 60)


def _damaged(registry: ModelCache, made: Made, recipe: Recipe) -> str:
    """The model under another digest, with a recipe that promises other answers."""
    content = b"x" + made.file.read_bytes()  # a zip archive may begin later
    digest = sha256(content).hexdigest()
    folder = registry.model_folder(digest)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.keras").write_bytes(content)
    (folder / "recipe.json").write_text(json.dumps(replace(recipe, model_sha256=digest).to_dict()), encoding="utf-8")
    return digest


def _expected(models: list[Made], video: Path) -> list[dict[str, Any]]:
    from sora.runtime.predictor import predict_files

    return [predict_files([video], made.file, made.recipe, made.version)[0] for made in models]


def _gauge(server: Standing, name: str) -> float:
    for line in server.client.get("/metrics").text.splitlines():
        if line.split(" ")[0] == name:
            return float(line.split(" ")[1])
    raise AssertionError(f"no {name}")
