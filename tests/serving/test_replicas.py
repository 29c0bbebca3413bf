"""Two servers that share one folder, as behind a reverse proxy."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sora.client import Client
from sora.core.errors import SoraError
from sora.core.processes import start_child
from sora.serving.source import ModelCache
from sora.serving.tokens import TokenFile
from tests.programs import find, needs
from tests.serving.conftest import Made
from tests.serving.standing import Standing, free_port, standing

HAPROXY = find("haproxy")


def test_two_replicas_follow_one_champion_and_one_file_of_tokens(
    api: Standing, models: list[Made], video: Path
) -> None:
    registry = ModelCache(api.folder / "registry")
    with standing(api.folder, poll_seconds=0.1) as other:
        other.until_ready()
        both = [api, other]
        answers = [Client(str(it.client.base_url)).predict(video) for it in both]
        assert {(one.version, one.label) for one in answers} == {(1, answers[0].label)}
        try:
            for made in (models[1], models[0], models[1]):
                made.promote(registry)
                for it in both:
                    it.until(lambda it=it, made=made: it.client.get("/readyz").json()["version"] == made.version)
            remembered = json.loads((api.folder / "cache" / "champion.json").read_text())
            assert remembered["version"] == 2 and not list((api.folder / "cache").glob("*.part"))
        finally:
            models[0].promote(registry)
        for it in both:
            it.until(lambda it=it: it.client.get("/readyz").json()["version"] == 1)
        file = TokenFile(api.folder / "tokens.json")
        try:
            token = file.add("proxy")
            for it in both:
                assert it.client.get("/v1/model").status_code == 401
                with Client(str(it.client.base_url), token=token) as client:
                    assert client.model().version == 1
        finally:
            file.path.unlink(missing_ok=True)
        with Client(str(other.client.base_url), retries=0) as client:
            other.process.terminate()
            assert other.process.wait(30) == 0
            assert not client.ready()
        assert api.client.get("/readyz").status_code == 200
    assert len(list((api.folder / "tmp").glob("sora-tmp-uploads-*"))) <= 1


def test_a_stop_is_shown_before_it_is_done(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))
    with standing(tmp_path, poll_seconds=0.1, drain_seconds=60) as server:
        server.until_ready()
        server.process.terminate()
        server.until(lambda: server.client.get("/readyz").status_code == 503)
        assert server.client.get("/readyz").json()["type"].endswith("stopping")
        assert server.client.get("/healthz").status_code == 200
        assert server.send(video).status_code == 200
        server.process.terminate()  # who does not want to wait says so
        assert server.process.wait(20) == 0


@needs("haproxy")
def test_behind_a_proxy_a_replica_can_stop_and_the_champion_move_and_no_call_fails(
    api: Standing, models: list[Made], video: Path, tmp_path: Path
) -> None:
    """The configuration of infra/ with this test's ports; callers ask without pause all the while."""
    registry = ModelCache(api.folder / "registry")
    before = _predictions(api)
    with standing(api.folder, poll_seconds=0.1, drain_seconds=5) as other:
        other.until_ready()
        with _proxy([api.port, other.port], tmp_path) as address, _callers(address, video, 6) as answers:
            _until(lambda: len(answers) >= 20)
            models[1].promote(registry)
            try:
                _until(lambda: [version for _, version in answers[-10:]] == [2] * 10)
                assert _predictions(api) > before and _predictions(other) > 0
                other.process.terminate()
                assert other.process.wait(30) == 0
                after = len(answers)
                _until(lambda: len(answers) >= after + 20)
            finally:
                models[0].promote(registry)
            _until(lambda: answers[-1][1] == 1)
        assert {error for error, _ in answers} == {""}
        assert {version for _, version in answers} == {1, 2}
    api.until(lambda: api.client.get("/readyz").json()["version"] == 1)


@contextmanager
def _proxy(ports: list[int], folder: Path) -> Iterator[str]:
    text = (Path(__file__).parents[2] / "infra" / "haproxy.cfg").read_text()
    front = free_port()
    for written, port in zip((8080, 8001, 8002), (front, *ports), strict=True):
        assert f"127.0.0.1:{written}\n" in text
        text = text.replace(f"127.0.0.1:{written}\n", f"127.0.0.1:{port}\n")
    config = folder / "haproxy.cfg"
    config.write_text(text)
    with (folder / "haproxy.log").open("wb") as log:
        assert HAPROXY is not None
        child = start_child([HAPROXY, "-f", str(config)], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{front}"
    try:
        with Client(address, retries=0) as client:
            _until(client.ready)
        yield address
    finally:
        child.terminate()
        child.wait(20)


@contextmanager
def _callers(address: str, video: Path, count: int) -> Iterator[list[tuple[str, int]]]:
    """Threads that ask until the block ends; the list grows by (the error or "", version)."""
    answers: list[tuple[str, int]] = []
    ended = threading.Event()

    def ask() -> None:
        with Client(address, retries=0) as client:
            while not ended.is_set():
                try:
                    answers.append(("", client.predict(video).version))
                except SoraError as error:
                    answers.append((str(error), 0))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _predictions(server: Standing) -> float:
    text = server.client.get("/metrics").text
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("sora_predictions_total{")
    )


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
