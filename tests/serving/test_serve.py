"""`sora serve` of a project with a real MLflow server that comes and goes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from sora.cli import exposure
from sora.config import Project
from sora.core.addresses import is_loopback
from sora.core.errors import InputError, ServiceError
from sora.core.processes import start_child
from sora.core.records import EvalReport
from sora.operations import servers as services
from sora.registry import Registry
from sora.runtime import lifecycle
from sora.serving.guard import names_this_machine
from sora.serving.launch import read_tokens, serve
from sora.serving.listener import listen
from sora.serving.tokens import TokenFile
from tests.serving.conftest import CLASSES, Made, other_golden
from tests.serving.standing import Standing


@contextmanager
def serving(project: Project, *options: str, **env: str) -> Iterator[Standing]:
    project.state.mkdir(exist_ok=True)
    log = project.state / "server.log"
    environment = {**os.environ, "TMPDIR": str(project.state), "PYTHONUNBUFFERED": "1", **env}
    with log.open("wb") as sink:
        command = [sys.executable, "-m", "sora.cli", "serve", "--project", str(project.root), "--port", "0", *options]
        child = start_child(command, env=environment, stdout=sink, stderr=sink)
    try:
        address = None
        end = time.monotonic() + 60
        while address is None and time.monotonic() < end and child.poll() is None:
            address = re.search(r"http://(127\.0\.0\.1|\[::1\]):\d+", log.read_text())
            time.sleep(0.05)
        assert address, log.read_text()
        with httpx.Client(base_url=address[0], timeout=60, trust_env=False) as client:
            yield Standing(child, client, project.state)
    finally:
        child.terminate()
        try:
            child.wait(40)
        except subprocess.TimeoutExpired:
            child.kill()
            raise


def register(registry: Registry, made: Made) -> int:
    run_id = registry.runs.start_run("nightly")
    report = EvalReport("test", CLASSES, {"accuracy": 0.5}, {}, [], [], [], 1.5)
    version = registry.register(run_id, made.file, made.recipe, report, f"data{made.version}")
    registry.runs.finish(run_id, "FINISHED")
    return version


def promote(project: Project, version: int) -> None:
    registry = Registry(services.mlflow_address(project), "tested", services.login(project, "mlflow"))
    registry.promote(version, cache=project.state / "cache" / "models", smoke=lambda file, recipe: None)


@pytest.mark.slow
def test_it_follows_the_champion_of_a_real_registry(
    models: list[Made], video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text("name: tested\nserve: {poll_seconds: 0.2}\n", encoding="utf-8")
    project = Project(tmp_path)

    def serves(it: Standing, version: int) -> Callable[[], bool]:
        return lambda: it.client.get("/readyz").json().get("version") == version

    with services.servers(project, prefect=False) as addresses:
        registry = Registry(str(addresses.mlflow_tracking_uri), "tested", services.login(project, "mlflow"))
        assert [register(registry, made) for made in models] == [1, 2]
    with serving(project) as it:  # no MLflow server is up: it starts one
        it.until(lambda: "sora run" in it.client.get("/readyz").json().get("fix", ""))
        promote(project, 1)
        it.until(serves(it, 1))
        body = it.send(video).json()
        assert body["version"] == 1 and body["data_version"] == "data1"
        assert it.client.get("/v1/model").json()["metrics"] == {"test/accuracy": 0.5}
        promote(project, 2)
        it.until(serves(it, 2))
        cache = project.state / "cache" / "models"
        registry = Registry(services.mlflow_address(project), "tested", services.login(project, "mlflow"))
        registry.rollback(cache=cache, smoke=lambda file, recipe: None)
        it.until(serves(it, 1), 5)
        # Its MLflow server is killed: it serves on and starts another.
        psutil.Process(services.running(project)["mlflow"].pid).kill()
        it.until(lambda: it.client.get("/v1/model").json()["following"]["registry"] == "unreachable", 20)
        assert it.send(video).json()["version"] == 1
        it.until(lambda: it.client.get("/v1/model").json()["following"]["registry"] == "ok")
        promote(project, 2)
        it.until(serves(it, 2))
        # A version that it can't serve: refused, and MLflow knows it.
        registry = Registry(services.mlflow_address(project), "tested", services.login(project, "mlflow"))
        bad = register(registry, Made(models[0].file, other_golden(models[0].recipe), 3))
        promote(project, bad)
        it.until(lambda: it.client.get("/v1/model").json()["following"]["refused"], 20)
        it.until(lambda: any("differs" in reason for reason in registry.get(bad).reasons), 20)
        assert it.send(video).json()["version"] == 2
        # Who promotes what the gate refused is told so.
        registry.set_decision(1, "refused", ["worse: 0.5 against 0.6"])
        assert lifecycle.promote(project, 1)["champion"] == 1
        assert "version 1 was refused (worse: 0.5 against 0.6)" in capsys.readouterr().err
        it.until(serves(it, 1))
        promote(project, 2)
        it.until(serves(it, 2))  # what it serves now is what the next server finds in the cache
        children = psutil.Process(it.process.pid).children(recursive=True)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(30) == 0
        assert not [child for child in children if child.is_running()]
        assert not services.running(project) and not list(project.state.glob("sora-tmp-uploads-*"))
    with serving(project, MLFLOW_TRACKING_URI="http://127.0.0.1:9") as it:  # a registry that is away
        it.until(serves(it, 2))
        assert it.send(video).json()["version"] == 2
        assert it.client.get("/v1/model").json()["following"]["registry"] == "unreachable"


def test_a_stop_while_the_model_loads_is_quick_and_clean(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: tested\n", encoding="utf-8")
    with serving(Project(tmp_path), MLFLOW_TRACKING_URI="http://127.0.0.1:9") as it:
        it.until(lambda: it.client.get("/healthz").status_code == 200)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(15) == 0, it.log()


def test_strangers_need_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text("name: tested\n", encoding="utf-8")
    monkeypatch.delenv("SORA_API_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(InputError, match="token"):
            serve(Project(tmp_path), host, 0)
    with pytest.raises(InputError, match="16"):
        read_tokens("short")
    assert read_tokens("a" * 16 + "," + "b" * 20) == ["a" * 16, "b" * 20]
    tokens = TokenFile(Project(tmp_path).tokens)
    tokens.add("phone")
    tokens.revoke("phone")
    with pytest.raises(InputError, match="token add"):  # a file of tokens that holds none
        serve(Project(tmp_path), "0.0.0.0", 0)
    tokens.add("phone")
    with pytest.raises(ServiceError, match="can't listen"):  # with one it goes on, to an address of another machine
        serve(Project(tmp_path), "192.0.2.1", 0)
    Project(tmp_path).tokens.write_text("{")
    with pytest.raises(ServiceError, match="can't be read"):
        serve(Project(tmp_path), "0.0.0.0", 0)


def test_loopback_in_all_its_spellings_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 16 of the review: `--host ::1` asked for a token."""
    (tmp_path / "params.yaml").write_text("name: tested\n", encoding="utf-8")
    monkeypatch.delenv("SORA_API_TOKEN", raising=False)
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", 0))
        taken.listen()
        for host in ("::1", "127.0.0.1", "127.0.0.2", "localhost", "LOCALHOST", "::ffff:127.0.0.1"):
            with pytest.raises(ServiceError, match="can't listen"):  # it is past the question for tokens
                serve(Project(tmp_path), host, taken.getsockname()[1])
    for host in ("127.0.0.1.example.org", "::2", "::ffff:10.0.0.1", "0.0.0.0", "localhost.example.org"):
        assert not is_loopback(host) and not names_this_machine(host)
    for header in ("[::1]", "[::1]:8000", "127.0.0.2:80", "localhost:1", "[::ffff:127.0.0.1]:8000", "127.0.0.1"):
        assert names_this_machine(header)
    for header in ("", ":80", "[127.0.0.1", "[::1]x", "[::1]:", "evil.example:80", "[::2]:80", "localhost:1:2"):
        assert not names_this_machine(header)


def test_it_serves_on_ipv6_loopback_and_prints_its_address_in_brackets(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: tested\n", encoding="utf-8")
    with serving(Project(tmp_path), "--host", "::1", MLFLOW_TRACKING_URI="http://127.0.0.1:9") as it:
        assert str(it.client.base_url).startswith("http://[::1]:")
        it.until(lambda: it.client.get("/healthz").status_code == 200)
        assert it.client.get("/v1/model").status_code == 200


def test_a_taken_port_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    (tmp_path / "params.yaml").write_text("name: tested\n", encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServiceError, match="can't listen"):
            serve(Project(tmp_path), None, taken.getsockname()[1])


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """TCP_NODELAY on what is accepted: without it each answer took 40 ms more."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_temporary_folder_that_can_not_be_written_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: tested\n", encoding="utf-8")
    code = (
        "import sys, tempfile\nfrom sora.cli import main\n"
        f"tempfile.tempdir = {str(tmp_path / 'absent')!r}\nmain(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--project", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
    )
    assert done.returncode == 3, done.stderr
    assert "can't write" in done.stderr and "absent" in done.stderr and "Traceback" not in done.stderr


def test_serve_and_up_agree_on_what_is_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in exposure._SECRETS:
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost", "LOCALHOST"):
        assert exposure.client_logins(Project(tmp_path), host) == {}
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(InputError, match="other machines can reach"):
            exposure.client_logins(Project(tmp_path), host)
