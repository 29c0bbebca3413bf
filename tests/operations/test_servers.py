from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from sora.cli.supervisor import up
from sora.config import Project
from sora.config.credentials import secret
from sora.core.errors import DatabaseDamaged, InputError, RunActive, ServiceError
from sora.operations import servers as services
from sora.operations.servers import Addresses, Running
from sora.serving.tokens import TokenFile
from tests.servers import make_project

# Opens the servers, says where, and keeps them until it is told to end (or is ended).
OWNER = """
import json, sys
from pathlib import Path
from sora.operations import servers as services
from sora.config import Project
project = Project(Path(sys.argv[1]))
with services.servers(project, prefect=sys.argv[2] == "both") as found:
    print(json.dumps([found.prefect_api_url, found.mlflow_tracking_uri]), flush=True)
    sys.stdin.readline()
"""


def owner(project: Project, which: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWNER, str(project.root), which]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return list(json.loads(line))


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def belongs_to(project: Project) -> list[psutil.Process]:
    """Every process that works in the project's folder or names it."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(project.root) in " ".join([process.cwd(), *process.cmdline()]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_both_servers_are_shared_and_die_with_their_owner(tmp_path: Path) -> None:
    project = make_project(tmp_path / "größe 1")
    first = owner(project, "both")
    try:
        prefect, mlflow = said(first)
        assert httpx.get(f"{prefect}/health").json() is True
        assert httpx.get(f"{mlflow}/health").text == "OK"
        assert httpx.get(prefect.removesuffix("/api")).status_code == 200  # its pages
        begin = time.monotonic()
        with services.servers(project) as found:
            assert found == Addresses(prefect, mlflow)
        assert time.monotonic() - begin < 5
        assert set(services.running(project)) == {"prefect", "mlflow"}  # they were not ours to end
        assert services.mlflow_address(project) == mlflow
        assert (project.state / "prefect" / "prefect.db").exists()

        below = psutil.Process(first.pid).children(recursive=True)
        assert len(below) == 2
        first.kill()
        first.wait(10)
        assert gone(below, 5)
        assert services.running(project) == {}
        assert json.loads((project.state / "services.json").read_text()) != {}  # stale, and known to be
        assert belongs_to(project) == []
        with pytest.raises(ServiceError, match="no MLflow server"):
            services.mlflow_address(project)
    finally:
        first.kill()
        first.communicate()


def test_two_that_start_at_once_share_one_server(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    both = [owner(project, "mlflow"), owner(project, "mlflow")]
    try:
        assert said(both[0]) == said(both[1])
        children = [child for one in both for child in psutil.Process(one.pid).children(recursive=True)]
        assert len(children) == 1
        for one in both:  # Ctrl-C, as the terminal sends it
            one.send_signal(signal.SIGINT)
        for one in both:
            one.communicate(timeout=30)
        assert gone(children, 1)
        assert services.running(project) == {}
    finally:
        for one in both:
            one.kill()
            one.communicate()


@pytest.mark.parametrize("name", ["mlflow", "prefect"])
def test_a_damaged_database_is_said_before_a_server_starts(tmp_path: Path, name: str) -> None:
    project = make_project(tmp_path)
    (project.state / name).mkdir(parents=True)
    (project.state / name / f"{name}.db").write_bytes(b"this is no database" * 100)
    with (
        pytest.raises(DatabaseDamaged, match=rf"{name}'s database .*not a database") as failure,
        services.servers(project),
    ):
        pass
    assert "sora restore" in failure.value.fix and not services.log_file(project, name).exists()
    assert belongs_to(project) == []


def test_a_server_that_ends_at_once_is_said_with_the_log(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    broken = services.Server(name="mlflow", app=("no_such_module:app",), probe="/")
    started: dict[str, subprocess.Popen[bytes]] = {}
    with pytest.raises(ServiceError, match="no_such_module"):
        services.start(project, [broken], started, owner="test")
    services.stop(started.values())


def test_a_read_only_state_folder_is_clear(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.state.write_text("a file in its place")
    with pytest.raises(ServiceError, match=r"\.sora"), services.servers(project):
        pass


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_configured_server_that_is_down(tmp_path: Path, name: str) -> None:
    key = {"prefect": "prefect_api_url", "mlflow": "mlflow_tracking_uri"}[name]
    port = services.free_port("127.0.0.1")
    project = make_project(tmp_path, f"services:\n  {key}: http://127.0.0.1:{port}/api\n")
    with pytest.raises(ServiceError, match="does not answer") as failure, services.servers(project):
        pass
    assert "services" in failure.value.fix


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"mlflow": {"pid": 1}}', '{"mlflow": 3}', "null"],
)
def test_a_damaged_record_counts_as_none(tmp_path: Path, text: str) -> None:
    project = make_project(tmp_path)
    project.state.mkdir()
    (project.state / "services.json").write_text(text)
    assert services.running(project) == {}


def test_a_process_number_that_was_used_again_is_not_ours(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.state.mkdir()
    services.record(project, "mlflow", os.getpid(), "http://127.0.0.1:1", owner="run")
    assert isinstance(services.running(project)["mlflow"], Running)
    entry = json.loads((project.state / "services.json").read_text())
    entry["mlflow"]["created"] -= 5
    (project.state / "services.json").write_text(json.dumps(entry))
    assert services.running(project) == {}


def test_a_taken_port_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert services.free_port("127.0.0.1", port) not in (0, port)
    assert services.free_port("127.0.0.1", port) == port
    with pytest.raises(ServiceError, match="can't listen"):
        services.free_port("192.0.2.1")


def test_up_off_loopback_needs_authentication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path)
    secrets = {
        "PREFECT_SERVER_API_AUTH_STRING": "ann:secret",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32,
        "MLFLOW_AUTH_ADMIN_PASSWORD": "short",
        "SORA_API_TOKEN": "t" * 32,
    }
    for name in secrets:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError) as failure:
        up(project, host="0.0.0.0")
    assert all(name in failure.value.message for name in secrets)
    TokenFile(project.tokens).add("phone")
    with pytest.raises(InputError) as failure:
        up(project, host="0.0.0.0")
    assert "SORA_API_TOKEN" not in failure.value.message and "MLFLOW_AUTH_ADMIN_PASSWORD" in failure.value.message
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="12 characters"):
        up(project, host="0.0.0.0")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "no colon")
    with pytest.raises(InputError, match="colon"):
        up(project, host="0.0.0.0")
    assert belongs_to(project) == []


def test_up_beside_a_run_waits_its_turn(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.state.mkdir()
    services.record(project, "mlflow", os.getpid(), "http://127.0.0.1:1", owner="run")
    with pytest.raises(RunActive, match="sora run"):
        up(project)


@pytest.mark.slow
def test_up_starts_restarts_and_ends_everything(tmp_path: Path) -> None:
    project = make_project(tmp_path, "name: tested\nclasses: [a, b]\n")
    command = [sys.executable, "-u", "-m", "sora.cli", "up", "--project", str(project.root)]
    ports = ["--prefect-port", "0", "--mlflow-port", "0", "--api-port", "0"]
    process = subprocess.Popen([*command, *ports], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "all parts answer" in line:
                break
        else:
            pytest.fail("".join(lines))
        api = next(line.split()[-1] for line in lines if "page and API" in line)
        assert httpx.get(f"{api}/healthz").status_code == 200
        prefect = services.running(project)["prefect"].url
        deployment = httpx.get(f"{prefect}/deployments/name/nightly/tested", auth=secret(project).pair).json()
        assert deployment["schedules"][0]["schedule"]["cron"] == "0 2 * * *"

        before = services.running(project)["mlflow"]
        os.kill(before.pid, signal.SIGKILL)
        for line in process.stdout:
            if "mlflow is started again" in line:
                break
        after = services.running(project)["mlflow"]
        assert (after.url, after.pid != before.pid) == (before.url, True)

        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.communicate(timeout=60)
        assert gone(below, 1)
        assert services.running(project) == {}
        assert belongs_to(project) == []
    finally:
        process.kill()
        process.communicate()
