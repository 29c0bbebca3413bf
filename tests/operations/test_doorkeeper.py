"""Who may speak to Prefect's and MLflow's servers: the rules, and the attacks on real servers as `sora up` has them."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sora.config import Project
from sora.config.credentials import Login, secret, secret_file
from sora.core.doorkeeper import Doorkeeper
from sora.core.errors import ServiceError
from sora.operations import servers as services
from sora.operations.doctor import doctor
from tests.servers import make_project, prefect_client
from tests.serving.browser import CHROMIUM, chromium

EVIL = "http://evil.example"


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("in")(scope, receive, send)


def _ask(doorkeeper: Doorkeeper, path: str = "/x", method: str = "GET", **headers: str) -> int:
    async def ask() -> int:
        transport = httpx.ASGITransport(doorkeeper)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:5000") as client:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            return (await client.request(method, path, headers=given)).status_code

    return asyncio.run(ask())


def _basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:5000", 200),
        ("127.0.0.1", 200),
        ("LOCALHOST:5000", 200),
        ("[::1]:5000", 200),
        ("evil.example", 403),
        ("evil.example:5000", 403),
        ("127.0.0.1.evil.example:5000", 403),
        ("localhost:5000@evil.example", 403),
        ("10.0.0.7:5000", 403),
        ("", 403),
    ],
)
def test_on_loopback_only_its_own_names_are_answered(host: str, status: int) -> None:
    assert _ask(Doorkeeper(_app), host=host) == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("gpu.example:4200", 200), ("10.0.0.7:4200", 200), ("localhost", 200), ("10.evil.example", 403), ("evil", 403)],
)
def test_off_loopback_its_names_and_any_address(host: str, status: int) -> None:
    assert _ask(Doorkeeper(_app, hosts=frozenset({"gpu.example"})), host=host) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:5000", 200),
        ("http://localhost:5000", 200),
        ("https://127.0.0.1:5000", 200),  # TLS ends before it
        ("http://127.0.0.1:9999", 403),
        ("http://localhost", 403),
        (EVIL, 403),
        ("http://evil.example:5000", 403),
        ("http://127.0.0.1:5000.evil.example", 403),
        ("http://127.0.0.1:5000/path", 403),
        ("http://[broken", 403),
        ("null", 403),
        ("file://", 403),
    ],
)
def test_only_its_own_pages_are_answered(origin: str, status: int) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        assert _ask(Doorkeeper(_app), method=method, origin=origin) == status, method


def test_a_page_of_another_site_may_link_but_not_fetch() -> None:
    assert _ask(Doorkeeper(_app), sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 200
    assert _ask(Doorkeeper(_app), sec_fetch_site="cross-site", sec_fetch_mode="no-cors") == 403


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (_basic("sora:right"), 200),
        (_basic("sora:right").replace("Basic", "basic"), 200),
        (_basic("sora:wrong"), 401),
        (_basic("sora:right "), 401),
        (_basic(""), 401),
        ("Bearer right", 401),
        ("Basic", 401),
        ("Basic !!!", 401),
        ("", 401),
    ],
)
def test_the_login(given: str, status: int) -> None:
    doorkeeper = Doorkeeper(_app, login="sora:right", open_paths=("/health",))
    assert _ask(doorkeeper, authorization=given) == status
    assert _ask(doorkeeper, "/health", authorization=given) == 200
    assert _ask(doorkeeper, "/health", "POST", authorization=given) == status
    assert _ask(doorkeeper, "/health/", authorization=given) == status


# --- the secret -----------------------------------------------------------------------------------------------------


def test_a_secret_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    project = make_project(tmp_path / "one")
    project.state.mkdir(mode=0o755)  # as an older Sora left it
    project.state.chmod(0o755)
    found = secret(project)
    assert stat.S_IMODE(project.state.stat().st_mode) == 0o700
    assert stat.S_IMODE(secret_file(project).stat().st_mode) == 0o600
    assert secret(project) == found and len(found.password) >= 40
    assert found.password not in repr(found)
    assert secret(make_project(tmp_path / "two")) != found
    secret_file(project).chmod(0o644)
    assert secret(project) == found
    assert stat.S_IMODE(secret_file(project).stat().st_mode) == 0o600
    assert [file.name for file in project.state.iterdir()] == ["secret"]


def test_many_that_need_it_at_once_have_one_secret(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    code = (
        "import sys; from pathlib import Path; from sora.config.credentials import secret\n"
        "from sora.config import Project\n"
        "sys.stdin.readline(); print(secret(Project(Path(sys.argv[1]))).auth_string)"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    many = [subprocess.Popen([sys.executable, "-c", code, str(project.root)], **pipes) for _ in range(6)]
    for one in many:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    assert {one.communicate()[0].strip() for one in many} == {secret(project).auth_string}


@pytest.mark.parametrize("text", ["", "sora", "sora:short", "so ra:0123456789abcdef", "sora:0123456789abcdef\nmore"])
def test_a_damaged_secret_is_said(tmp_path: Path, text: str) -> None:
    project = make_project(tmp_path)
    project.state.mkdir()
    secret_file(project).write_text(text)
    with pytest.raises(ServiceError, match="does not hold a secret") as failure:
        secret(project)
    assert "remove the file" in failure.value.fix


# --- the attacks ----------------------------------------------------------------------------------------------------


@dataclass
class Up:
    """A project under `sora up`."""

    project: Project
    printed: str
    process: subprocess.Popen[str]

    @property
    def prefect(self) -> str:
        return services.running(self.project)["prefect"].url

    @property
    def mlflow(self) -> str:
        return services.running(self.project)["mlflow"].url


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    project = make_project(tmp_path_factory.mktemp("up") / "project", "name: tested\nclasses: [a, b]\n")
    command = [sys.executable, "-u", "-m", "sora.cli", "up", "--project", str(project.root)]
    ports = ["--prefect-port", "0", "--mlflow-port", "0", "--api-port", "0"]
    process = subprocess.Popen(
        [*command, *ports], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if "all parts answer" in line:
                break
        else:
            pytest.fail(printed)
        yield Up(project, printed, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _deployment(up: Up) -> str:
    with prefect_client(up.project) as client:
        return str(client.post("/deployments/filter", json={}).json()[0]["id"])


def _attack(marker: Path) -> dict[str, object]:
    command = f"/bin/sh -c 'touch {marker}'"
    return {"state": {"type": "SCHEDULED"}, "job_variables": {"command": command}}


@pytest.mark.slow
def test_nobody_without_the_secret_runs_a_command(up: Up, tmp_path: Path) -> None:
    deployment = _deployment(up)
    host = up.prefect.split("//")[1].split("/")[0]
    right = {"Authorization": _basic(secret(up.project).auth_string)}
    refused = {
        "curl as another user": {},
        "a wrong secret": {"Authorization": _basic("sora:guessed")},
        "a page of another origin": {"Origin": EVIL},
        "one that asks as a form would": {"Origin": EVIL, "Content-Type": "text/plain"},
        "a page on another port": {"Origin": "http://127.0.0.1:1"},
        "a name pointed at this machine": {"Host": "evil.example", "Origin": EVIL},
        "another origin with the secret": {"Origin": EVIL, **right},
        "another host with the secret": {"Host": f"evil.example:{host.split(':')[1]}", **right},
        "the secret without a CSRF token": right,
    }
    for number, (who, headers) in enumerate(refused.items()):
        marker = tmp_path / f"refused-{number}"
        for path, body in (
            ("/deployments/filter", {}),
            (f"/deployments/{deployment}/create_flow_run", _attack(marker)),
            ("/work_pools/filter", {}),
        ):
            content = {"Content-Type": "application/json", **headers}
            answer = httpx.post(up.prefect + path, content=json.dumps(body), headers=content)
            assert answer.status_code in (400, 401, 403), (who, path, answer.status_code)
            assert answer.headers.get("Access-Control-Allow-Origin") in (None, "*"), who
            if answer.status_code != 403 or "CSRF" not in answer.text:
                assert "Access-Control-Allow-Origin" not in answer.headers, who
    asked = {"Origin": EVIL, "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{up.prefect}/deployments/filter", headers=asked)
    assert preflight.status_code == 403 and "Access-Control-Allow-Origin" not in preflight.headers
    assert httpx.get(f"{up.prefect}/deployments/{deployment}").status_code == 401
    # The owner may: so the attack would have worked, and what was refused before did not run.
    owned = tmp_path / "owned"
    with prefect_client(up.project) as client:
        made = client.post(f"/deployments/{deployment}/create_flow_run", json=_attack(owned))
        assert made.status_code in (200, 201), made.text
    end = time.monotonic() + 90
    while not owned.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert owned.exists(), services.log_tail(up.project, "worker")
    assert list(tmp_path.glob("refused-*")) == []


@pytest.mark.slow
def test_a_flow_run_of_the_worker_knows_the_secret(up: Up) -> None:
    """It reports to Prefect and asks MLflow before it finds that this project has no data."""
    with prefect_client(up.project) as client:
        deployment = client.post("/deployments/filter", json={}).json()[0]["id"]
        run = client.post(f"/deployments/{deployment}/create_flow_run", json={}).json()["id"]
        end = time.monotonic() + 240
        state = {"type": "SCHEDULED"}
        while state["type"] not in ("FAILED", "CRASHED", "COMPLETED", "CANCELLED") and time.monotonic() < end:
            time.sleep(1)
            state = client.get(f"/flow_runs/{run}").json()["state"]
    assert state["type"] == "FAILED" and "neither data/ nor data.dvc" in state["message"], state


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/events/in", "/events/out", "/logs/out"])
def test_websockets_ask_as_well(up: Up, path: str) -> None:
    address = up.prefect.replace("http://", "ws://") + path
    with pytest.raises(InvalidStatus):  # 403
        connect(address, origin=EVIL, subprotocols=["prefect"], proxy=None)  # type: ignore[arg-type,list-item]
    with pytest.raises((ConnectionClosed, InvalidStatus)), connect(address, proxy=None) as line:
        line.recv(timeout=10)
    with connect(address, subprotocols=["prefect"], proxy=None) as line:  # type: ignore[list-item]
        line.send(json.dumps({"type": "auth", "token": "sora:guessed"}))
        with pytest.raises(ConnectionClosed):
            line.recv(timeout=10)
    with connect(address, subprotocols=["prefect"], proxy=None) as line:  # type: ignore[list-item]
        line.send(json.dumps({"type": "auth", "token": secret(up.project).auth_string}))
        assert json.loads(line.recv(timeout=10)) == {"type": "auth_success"}


@pytest.mark.slow
def test_mlflow_answers_nobody_without_the_secret(up: Up) -> None:
    login = secret(up.project).pair
    port = up.mlflow.rsplit(":", 1)[1]
    artifact = "/api/2.0/mlflow-artifacts/artifacts/0/stolen/model.keras"
    paths = [
        ("GET", "/"),
        ("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0"),
        ("POST", "/api/2.0/mlflow/experiments/create"),
        ("GET", "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0"),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts?path=0"),
        ("PUT", artifact),
        ("GET", artifact),
        ("GET", "/get-artifact?path=x&run_uuid=y"),
        ("GET", "/graphql"),
        ("GET", "/metrics"),
    ]
    for method, path in paths:
        for auth, headers, status in (
            (None, {}, 401),
            (("sora", "guessed"), {}, 401),
            (login, {"Origin": EVIL}, 403),
            (login, {"Origin": "http://127.0.0.1:1"}, 403),
            (login, {"Host": f"evil.example:{port}"}, 403),
            (login, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ):
            answer = httpx.request(method, up.mlflow + path, auth=auth, headers=headers)
            assert answer.status_code == status, (method, path, headers, answer.status_code)
            assert "Access-Control-Allow-Origin" not in answer.headers
    assert httpx.get(f"{up.mlflow}/health").status_code == 200
    with httpx.Client(base_url=up.mlflow, auth=login) as client:
        assert client.put(artifact, content=b"bytes").status_code == 200
        assert client.get(artifact).content == b"bytes"
        assert client.get("/").status_code == 200


@pytest.mark.slow
def test_the_secret_is_nowhere_but_in_its_file(up: Up) -> None:
    """Not on a command line, not in what Prefect and MLflow store, not in a log, not in what `sora up` prints."""
    word = secret(up.project).password.encode()
    family = [psutil.Process(up.process.pid), *psutil.Process(up.process.pid).children(recursive=True)]
    assert len(family) >= 5
    for process in family:
        assert word not in " ".join(process.cmdline()).encode()
    assert word not in up.printed.encode() and str(secret_file(up.project)) in up.printed
    for file in sorted(up.project.root.rglob("*")):
        if file.is_file() and file != secret_file(up.project):
            assert word not in file.read_bytes(), file
    assert stat.S_IMODE(up.project.state.stat().st_mode) == 0o700


def _secrets(project: Project) -> dict[str, object]:
    return next(check for check in doctor(project)["checks"] if check["name"] == "secrets")


@pytest.mark.slow
def test_doctor_says_who_is_asked(up: Up) -> None:
    found = _secrets(up.project)
    assert found["ok"] and "mlflow and prefect ask for a login" in str(found["detail"])


def test_doctor_says_what_others_may_use(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    assert _secrets(project)["ok"]
    secret(project)
    assert _secrets(project)["ok"]
    project.state.chmod(0o755)
    found = _secrets(project)
    assert not found["ok"] and "chmod 700" in str(found["fix"])
    project.state.chmod(0o700)
    secret_file(project).chmod(0o640)
    found = _secrets(project)
    assert not found["ok"] and "chmod 600" in str(found["fix"])


def test_doctor_names_a_server_that_asks_nobody(tmp_path: Path) -> None:
    """As one that an older Sora started: it goes on, and programs that know the secret still reach it."""
    project = make_project(tmp_path)
    project.state.mkdir(mode=0o700)
    code = (
        "import http.server, sys\n"
        "class Open(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(b'{}')\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Open); print(server.server_port, flush=True)\n"
        "server.serve_forever()"
    )
    old = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert old.stdout is not None
        port = int(old.stdout.readline())
        entry = {
            "pid": old.pid,
            "created": psutil.Process(old.pid).create_time(),
            "url": f"http://127.0.0.1:{port}",
            "started": "2026-01-01T00:00:00+00:00",
            "owner": "up",
        }
        (project.state / "services.json").write_text(json.dumps({"mlflow": entry}))
        check = next(check for check in doctor(project)["checks"] if check["name"] == "secrets")
        assert not check["ok"] and "answers everybody" in check["detail"] and str(old.pid) in check["fix"]
        assert isinstance(services.login(project, "mlflow"), Login)
        with services.servers(project, prefect=False) as addresses:
            assert addresses.mlflow_tracking_uri == f"http://127.0.0.1:{port}"
    finally:
        old.kill()
        old.communicate()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_people_log_in_to_both_pages(up: Up, tmp_path: Path) -> None:
    login = secret(up.project)
    with chromium(tmp_path) as browser:
        browser.call("Page.navigate", url=up.prefect.removesuffix("/api"))
        browser.until("Boolean(document.querySelector('input[type=password]'))", 120)
        browser.js("document.querySelector('input[type=password]').focus()")
        browser.call("Input.insertText", text=login.auth_string)
        browser.press("Enter")
        browser.until("!document.querySelector('input[type=password]') && document.body.innerText.includes('Runs')", 60)
        # As from the form that the browser shows for a 401: it remembers user and password for the pages after it.
        where = up.mlflow.removeprefix("http://")
        browser.open(f"http://{login.user}:{login.password}@{where}/api/2.0/mlflow/experiments/get?experiment_id=0")
        assert "Default" in browser.js("document.body.innerText")
        browser.call("Page.navigate", url=f"{up.mlflow}/")
        browser.until("Boolean(document.body) && document.body.innerText.includes('Experiments')", 120)
