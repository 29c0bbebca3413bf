"""The client against a real server, and against one that fails as told: over real sockets."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sora.client import Answer, Client
from sora.core.errors import ApiProblem, InputError, ServiceError
from sora.serving.tokens import TokenFile
from tests.serving.conftest import CLASSES
from tests.serving.standing import Standing, free_port
from tests.videos import make_video

ANSWER = {
    "filename": "x", "label": "a", "probabilities": {"a": 1.0}, "version": 3, "data_version": "d", "clips": 1,
    "seconds": {"model": 0.1}, "of a newer server": [1],
}  # fmt: skip


@pytest.fixture
def sora(api: Standing) -> Iterator[Client]:
    with Client(str(api.client.base_url)) as client:
        yield client


def test_an_answer(sora: Client, video: Path) -> None:
    assert sora.ready()
    answer = sora.predict(video)
    assert isinstance(answer, Answer) and answer.version == 1 and answer.data_version == "data1"
    assert answer.filename == video.name and set(answer.probabilities) == set(CLASSES)
    assert answer.label == max(answer.probabilities, key=answer.probabilities.__getitem__)
    assert answer.timeline == () and answer.span is None and answer.labels is None
    timeline = sora.predict(str(video), timeline=True)
    assert (
        timeline.timeline[0].label == answer.label
        and timeline.span
        and timeline.span.end == timeline.timeline[0].end == 2.0
    )


def test_open_files(sora: Client, video: Path) -> None:
    expected = sora.predict(video).label
    with video.open("rb") as stream:
        stream.seek(100)  # sent from its beginning all the same
        assert sora.predict(stream).label == expected
    assert sora.predict(io.BytesIO(video.read_bytes())).filename == "video"
    read, write = os.pipe()  # can't be read twice
    with os.fdopen(read, "rb") as pipe, ThreadPool(lambda: _fill(write, video.read_bytes())):
        assert sora.predict(pipe).label == expected


def test_the_model(sora: Client) -> None:
    model = sora.model()
    assert model.version == 1 and model.classes == CLASSES and model.metrics == {"test/accuracy": 0.5}
    assert model.limits["files"] == 4 and model.following["registry"] == "ok" and model.multilabel is False


def test_refusals_carry_the_problem_document(sora: Client, tmp_path: Path) -> None:
    text = tmp_path / "a.mp4"
    text.write_text("no video")
    with pytest.raises(ApiProblem) as refused:
        sora.predict(text)
    problem = refused.value
    assert problem.status == 422 and problem.kind == "not-a-video" and problem.problem["rule"] == "not_a_video"
    assert problem.fix and "video" in str(problem)
    text.write_bytes(bytes(2_100_000))
    with pytest.raises(ApiProblem) as large:
        sora.predict(text)
    assert large.value.kind == "too-large" and large.value.problem["max_bytes"] == 2_000_000
    with pytest.raises(InputError, match="absent"):
        sora.predict(tmp_path / "absent.mp4")


def test_several(sora: Client, video: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.mp4"
    text.write_text("no video")
    other = make_video(tmp_path / "other.mp4", seed=9)
    one, two, three = sora.predict_all([video, text, other])
    assert isinstance(one, Answer) and isinstance(three, Answer)
    assert one == _but_seconds(sora.predict(video), one) and three.filename == "other.mp4"
    assert isinstance(two, ApiProblem) and two.kind == "not-a-video"
    assert sora.predict_all([]) == []
    (alone,) = sora.predict_all([text])
    assert isinstance(alone, ApiProblem) and alone.status == 422
    with pytest.raises(ApiProblem) as many:
        sora.predict_all([video] * 5)
    assert many.value.kind == "many-files"


def _but_seconds(answer: Answer, other: Answer) -> Answer:
    from dataclasses import replace

    near = pytest.approx(other.probabilities, abs=1e-4)
    assert answer.probabilities == near
    return replace(answer, seconds=other.seconds, probabilities=other.probabilities)


def test_a_token(api: Standing, video: Path) -> None:
    file = TokenFile(api.folder / "tokens.json")
    token = file.add("program")
    try:
        with Client(str(api.client.base_url), token=token) as client:
            assert client.predict(video).version == 1
        with Client(str(api.client.base_url), token="wrong") as client, pytest.raises(ApiProblem) as refused:
            client.model()
        assert refused.value.status == 401 and refused.value.fix
    finally:
        file.path.unlink()


# -- servers that fail --


class Told(BaseHTTPRequestHandler):
    """Answers as `script` says, a step a request: (status, headers, body), or None to hang up. The last one stays."""

    script: list[Any]
    seen: list[tuple[float, int]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        self.seen.append((time.monotonic(), len(body)))
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if step is None:
            self.close_connection = True
            return
        status, headers, answer = step
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def told(*script: object, port: int = 0) -> Iterator[tuple[str, type[Told]]]:
    handler = type("Handler", (Told,), {"script": list(script), "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
            thread.join()


class ThreadPool:
    """A thread for as long as the block, whose end is waited for."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def _fill(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(data)


Step = tuple[int, dict[str, str], bytes]
BUSY: Step = (
    429,
    {"Retry-After": "0", "Content-Type": "application/problem+json"},
    b'{"detail": "busy", "fix": "wait"}',
)
GOOD: Step = (200, {}, json.dumps(ANSWER).encode())


def test_a_busy_server_is_asked_again_with_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(os.urandom(200_000))
    with told(BUSY, (503, {}, b"<html>"), None, GOOD) as (address, server), Client(address) as client:
        answer = client.predict(file)
    assert answer.version == 3 and len(server.seen) == 4
    assert len({size for _, size in server.seen}) == 1 and server.seen[0][1] > 200_000


@pytest.mark.parametrize("word", ["fix", "mend"])
def test_the_fix_of_this_server_and_of_an_older_one(word: str) -> None:
    """Servers called it `mend` before; the client reads both."""
    refused: Step = (422, {}, json.dumps({"detail": "no video", word: "send a video"}).encode())
    with told(refused) as (address, _), Client(address) as client, pytest.raises(ApiProblem) as problem:
        client.predict(io.BytesIO(b"x"))
    assert problem.value.fix == "send a video"


@pytest.mark.parametrize("labels", [["a", "b"], []])
def test_several_labels_of_one_answer(labels: list[str]) -> None:
    answer: Step = (200, {}, json.dumps({**ANSWER, "labels": labels}).encode())
    with told(answer) as (address, _), Client(address) as client:
        assert client.predict(io.BytesIO(b"video")).labels == tuple(labels)


def test_it_waits_as_long_as_the_server_asks() -> None:
    patient = (503, {"Retry-After": "1"}, b"{}")
    with told(patient, GOOD) as (address, server), Client(address) as client:
        client.predict(io.BytesIO(b"x"))
    (first, _), (second, _) = server.seen
    assert second - first >= 1


def test_it_does_not_wait_for_ever() -> None:
    with told((503, {"Retry-After": "3600"}, b"{}")) as (address, server), Client(address) as client:
        with pytest.raises(ApiProblem):
            client.predict(io.BytesIO(b"x"))
        assert len(server.seen) == 1
    with told(BUSY) as (address, server), Client(address, retries=2) as client:
        with pytest.raises(ApiProblem) as busy:
            client.predict(io.BytesIO(b"x"))
        assert len(server.seen) == 3 and busy.value.status == 429 and busy.value.fix == "wait"


@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 502, 504, 507])
def test_what_a_second_attempt_would_not_change_is_said_at_once(status: int) -> None:
    with told((status, {"Retry-After": "0"}, b"a proxy's page")) as (address, server), Client(address) as client:
        with pytest.raises(ApiProblem, match="a proxy's page") as failed:
            client.predict(io.BytesIO(b"x"))
        assert len(server.seen) == 1 and failed.value.status == status


def test_nobody_there_and_then_somebody() -> None:
    port = free_port()
    with Client(f"http://127.0.0.1:{port}", retries=0) as client:
        assert not client.ready()
        with pytest.raises(ServiceError, match="does not answer"):
            client.predict(io.BytesIO(b"x"))
    found: list[Answer] = []
    with Client(f"http://127.0.0.1:{port}", retries=20, longest_wait=0.3) as client:
        thread = threading.Thread(target=lambda: found.append(client.predict(io.BytesIO(b"x"))))
        thread.start()
        time.sleep(0.2)
        with told(GOOD, port=port):
            thread.join()
    assert found[0].version == 3


def test_a_stream_that_is_gone_is_not_sent_again() -> None:
    read, write = os.pipe()
    with told(None) as (address, server), Client(address) as client, os.fdopen(read, "rb") as pipe:
        _fill(write, b"x" * 1000)
        with pytest.raises(ServiceError):
            client.predict(pipe)
        assert len(server.seen) <= 1


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://x", "", "http://"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InputError):
        Client(address)


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, sora.client\n"
        "heavy = {'numpy', 'pandas', 'fastapi', 'starlette', 'pydantic', 'yaml', 'tensorflow', 'keras', 'mlflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
