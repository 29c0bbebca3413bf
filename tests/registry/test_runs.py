from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from sora.core.errors import InputError, ServiceError
from sora.registry import Registry, Unreachable
from sora.registry.rest import Rest


class Line:
    """A relay to the server that can be cut and joined again on the same port: a server that goes and comes back."""

    def __init__(self, uri: str) -> None:
        self._target = (urlsplit(uri).hostname, urlsplit(uri).port)
        self._open: list[socket.socket] = []
        self.port = 0
        self.join()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def join(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                here, _ = listener.accept()
            except OSError:
                return
            there = socket.create_connection(self._target)
            self._open += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def line(server: SimpleNamespace) -> Iterator[Line]:
    line = Line(server.uri)
    yield line
    line.cut()


def run_of(registry: Registry, run_id: str) -> dict[str, Any]:
    run: dict[str, Any] = registry._rest.get("runs/get", run_id=run_id)["run"]
    return run


def test_a_run_holds_what_was_logged(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "plots" / "deep").mkdir(parents=True)
    (tmp_path / "plots" / "größe 1.txt").write_text("plot")
    (tmp_path / "plots" / "deep" / "page.html").write_text("<p>")
    run_id = registry.runs.start_run(
        "nightly",
        params={"train": {"epochs": 3, "flip": True}, "classes": ["läuft"], "nothing": "", "long": "x" * 9000},
        tags={"data_version": "d1", "git_commit": "c0ffee", "mlflow.note.content": "note"},
    )
    registry.runs.log_metrics(run_id, {"loss": 1.5, "recall/läuft (schnell)": 0.5, "bad": float("nan")}, step=1)
    registry.runs.log_metrics(run_id, {"loss": 0.5}, step=2)
    registry.runs.log_path(run_id, tmp_path / "plots", "evaluation")
    registry.runs.log_path(run_id, tmp_path / "plots" / "größe 1.txt", "single")
    registry.runs.log_dataset(run_id, data_version="a" * 32, counts={"läuft": 2, "steht": 3}, source="data.dvc")
    registry.runs.finish(run_id)

    run = run_of(registry, run_id)
    params = {item["key"]: item["value"] for item in run["data"]["params"]}
    tags = {item["key"]: item["value"] for item in run["data"]["tags"]}
    metrics = {item["key"]: item["value"] for item in run["data"]["metrics"]}
    assert params["train.epochs"] == "3"
    assert params["classes"] == "['läuft']"
    assert len(params["long"]) == 6000
    assert tags["sora.data_version"] == "d1"
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert tags["mlflow.note.content"] == "note"
    assert metrics["loss"] == 0.5
    assert metrics["recall/läuft _schnell_"] == 0.5
    assert run["info"]["status"] == "FINISHED"
    dataset = run["inputs"]["dataset_inputs"][0]["dataset"]
    assert dataset["digest"] == "a" * 32
    assert json.loads(dataset["profile"])["videos"] == {"läuft": 2, "steht": 3}
    root = run["info"]["artifact_uri"]
    assert registry._rest.text(root, "evaluation/größe 1.txt") == "plot"
    assert registry._rest.text(root, "evaluation/deep/page.html") == "<p>"
    assert registry._rest.text(root, "single/größe 1.txt") == "plot"
    environment = json.loads(registry._rest.text(root, "environment.json"))
    assert environment["packages"]["mlflow"]
    assert registry.runs.run_page(run_id).endswith(f"/runs/{run_id}")


def test_the_state_comes_back_as_it_was(registry: Registry) -> None:
    state = {"data.dvc": "outs:\n- md5: a.dir\n", "params.yaml": "name: ä\n", "git_commit": "c0ffee", "dirty": True}
    run_id = registry.runs.start_run()
    registry.runs.log_state(run_id, state)
    assert registry.runs.run_state(run_id) == state


def test_a_run_without_state_says_so(registry: Registry) -> None:
    with pytest.raises(InputError, match="no stored state"):
        registry.runs.run_state(registry.runs.start_run())


def test_resume(registry: Registry) -> None:
    run_id = registry.runs.start_run()
    registry.runs.finish(run_id, "FAILED")
    assert run_of(registry, run_id)["info"]["status"] == "FAILED"
    registry.runs.resume(run_id)
    assert run_of(registry, run_id)["info"]["status"] == "RUNNING"
    with pytest.raises(InputError, match="no run"):
        registry.runs.resume("0" * 32)


def test_more_metrics_and_parameters_than_one_request_takes(registry: Registry) -> None:
    run_id = registry.runs.start_run(params={f"p{i}": i for i in range(130)})
    registry.runs.log_metrics(run_id, {f"m{i}": i for i in range(1200)})
    registry.runs.finish(run_id)
    data = run_of(registry, run_id)["data"]
    assert (len(data["params"]), len(data["metrics"])) == (130, 1200)


def test_metrics_survive_a_server_that_goes_and_comes_back(line: Line, registry: Registry) -> None:
    live = Registry(line.uri, registry.name)
    run_id = live.runs.start_run()
    live.runs.log_metrics(run_id, {"loss": 3.0}, step=1)
    line.cut()
    begin = time.monotonic()
    for step in (2, 3, 4):
        live.runs.log_metrics(run_id, {"loss": 3.0 - step / 2}, step=step)
    assert time.monotonic() - begin < 5  # training is not held up
    with pytest.raises(ServiceError, match="could not be stored") as failure:
        live.runs.finish(run_id)
    assert "kept" in failure.value.fix
    line.join()
    live.runs.finish(run_id)
    history = registry._rest.get("metrics/get-history", run_id=run_id, metric_key="loss")["metrics"]
    assert [(item["step"], item["value"]) for item in history] == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0)]
    live.close()


def test_a_server_that_hangs_holds_training_up_for_seconds_once(
    server: SimpleNamespace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sora.registry.live._LIVE_TIMEOUT", 0.5)
    run_id = registry.runs.start_run()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        for step in range(20):
            registry.runs.log_metrics(run_id, {"loss": 1.0}, step=step)
        assert time.monotonic() - begin < 3
    finally:
        os.kill(server.pid, signal.SIGCONT)
    registry.runs.finish(run_id)
    history = registry._rest.get("metrics/get-history", run_id=run_id, metric_key="loss")["metrics"]
    assert sorted({item["step"] for item in history}) == list(range(20))


def test_system_metrics(registry: Registry) -> None:
    run_id = registry.runs.start_run()
    with registry.runs.system_metrics(run_id, interval=0.05):
        time.sleep(0.5)
    registry.runs.finish(run_id)
    names = {item["key"] for item in run_of(registry, run_id)["data"]["metrics"]}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names


def test_no_server_is_a_clear_error(line: Line) -> None:
    line.cut()
    with pytest.raises(Unreachable, match=r"does not answer") as failure:
        Registry(line.uri, "any").champion()
    assert failure.value.exit_code == 3
    assert "sora up" in failure.value.fix


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "file:///tmp/x", "http://", ""])
def test_only_http_will_do(uri: str) -> None:
    with pytest.raises(InputError, match="http"):
        Registry(uri, "any")


def test_credentials_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives at the server, byte for byte."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sécret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard: list[bytes] = []

        def hear() -> None:
            connection, _ = listener.accept()
            with connection:
                heard.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=hear)
        thread.start()
        with pytest.raises(ServiceError, match="401") as failure:
            Rest(f"http://127.0.0.1:{listener.getsockname()[1]}").get("runs/get", run_id="1")
        thread.join(10)
    expected = base64.b64encode("ann:sécret".encode())
    assert b"Basic " + expected in heard[0]
    assert "MLFLOW_TRACKING_USERNAME" in failure.value.fix


def test_something_else_at_the_address(server: SimpleNamespace) -> None:
    rest = Rest(server.uri)
    with pytest.raises(ServiceError, match="not an MLflow server"):
        rest._call("GET", "/health")
    rest.close()


def test_searches_are_never_taken_for_runs(registry: Registry) -> None:
    """`sora tune` logs into an experiment of its own: nothing that looks for runs, judged or not, finds a trial."""
    parent = registry.searches.start_run("tune x", tags={"tune": "x"})
    tags = {"tune": "x", "mlflow.parentRunId": parent, "judged": "true", "test_digest": "ab12", "version": "1"}
    child = registry.searches.start_run("trial 1", params={"train.learning_rate": 0.1}, tags=tags)
    registry.searches.log_metrics(child, {"log_loss": 0.5}, step=1)
    registry.searches.finish(child)
    registry.searches.finish(parent)
    assert registry.searches.name == f"{registry.runs.name}/tune"
    assert registry.last_judged() is None and registry.judged_ledger() is None
    assert registry.times_judged("ab12") == 0
    assert registry.versions() == [] and registry.champion() is None  # what `sora models` and `sora gc` read
    assert list(registry.runs.search_runs()) == [] and registry.runs.own_tags(10) == []
    found = {run["info"]["run_id"]: run for run in registry.searches.search_runs()}
    assert set(found) == {parent, child}
    assert {"key": "mlflow.parentRunId", "value": parent} in found[child]["data"]["tags"]
