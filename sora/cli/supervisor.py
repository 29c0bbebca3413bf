"""`sora up`: Prefect, MLflow, a worker with the nightly schedule and the API on one machine, watched until Ctrl-C.

Prefect and MLflow ask for the project's secret (`.sora/secret`). On another address than loopback they ask for what the
people there were given, by these environment variables:

    PREFECT_SERVER_API_AUTH_STRING   "user:password" of Prefect's API and pages
    MLFLOW_FLASK_SERVER_SECRET_KEY   signs MLflow's forms; any long random text
    MLFLOW_AUTH_ADMIN_PASSWORD       of MLflow's first user, `admin` or MLFLOW_AUTH_ADMIN_USERNAME

and the API needs SORA_API_TOKEN or a token of `sora token add`. MLflow answers only to names that it knows itself by:
this machine's, the given address and private networks; MLFLOW_SERVER_ALLOWED_HOSTS replaces that list.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from sora.config import Project, Settings
from sora.config.credentials import Login, private_state, secret, secret_file
from sora.core import doorkeeper
from sora.core.addresses import is_loopback
from sora.core.errors import InputError, RunActive, ServiceError
from sora.core.files import writing
from sora.core.processes import quiet_environment, start_child
from sora.core.progress import echo
from sora.core.redaction import without_login
from sora.operations import nightly_log
from sora.operations import servers as services
from sora.operations.servers import Addresses, Running, Server
from sora.serving.tokens import ENVIRONMENT, TokenFile

_LOOK = 0.3  # seconds between two looks at the parts
_GOOD_LIFE = 60.0  # seconds after which a part's next end counts as its first
_LONGEST_PAUSE = 60.0
_NIGHTLY_LOOK = 60.0
# What must be set off loopback, and what it is.
_SECRETS = {
    "PREFECT_SERVER_API_AUTH_STRING": "user:password for Prefect",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "a long random text for MLflow",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "the password of MLflow's user admin, at least 12 characters",
    ENVIRONMENT: "the API's bearer token; or `sora token add NAME`",
}


class _Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass
class Part:
    """One process that is kept alive."""

    name: str
    command: list[str]
    env: dict[str, str]
    cwd: Path
    url: str
    probe: str = ""  # address that answers below 400 once it is ready
    server: Server | None = None
    child: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    ends: int = 0  # in a row
    again_at: float = 0.0


def up(
    project: Project,
    *,
    host: str = services.LOOPBACK,
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    api_port: int | None = None,
    on_line: Callable[[str], None] = echo,
) -> None:
    """Starts every part, waits until each answers, says where, and keeps them up until Ctrl-C or SIGTERM.

    A part that ends is started again, with growing pauses. All parts end with this process, however it ends.

    Args:
        prefect_port, mlflow_port, api_port: preferred ones (`api_port`: `serve.port` of params.yaml); where one is
            taken, a free one is used and said. 0: any.

    Raises:
        InputError: an address that strangers can reach, without authentication.
        RunActive: the project's servers belong to another process.
        ServiceError: a part does not start.
        KeyboardInterrupt: Ctrl-C, after all has ended.
    """
    settings = project.settings()
    secrets = _secrets(project, host)
    private_state(project)
    with _only_one(project), _terminable():
        parts: list[Part] = []
        try:
            addresses = _start_servers(project, settings, host, prefect_port, mlflow_port, secrets, parts, on_line)
            parts += _clients(project, settings, host, api_port, addresses, secrets, on_line)
            for part in parts:
                if part.child is None:
                    _start(project, part)
            for part in parts:
                _wait(project, part)
            _say(project, settings, parts, addresses, on_line)
            _watch(project, parts, on_line)
        except _Terminated:
            pass
        finally:
            on_line("ending all parts …")
            _end(parts)
            services.forget(project, [part.name for part in parts])


def _secrets(project: Project, host: str) -> dict[str, str]:
    """The environment of clients where the servers ask for more than the project's secret; empty on loopback.

    Raises:
        InputError: something is missing.
        ServiceError: the file of tokens is damaged.
    """
    if is_loopback(host):
        return {}
    missing = [f"{name} ({what})" for name, what in _SECRETS.items() if not os.environ.get(name)]
    if TokenFile(project.tokens).tokens():
        missing = [one for one in missing if not one.startswith(f"{ENVIRONMENT} ")]
    if missing:
        raise InputError(
            f"{host} can be reached by others, and nothing asks who they are: not set are {', '.join(missing)}",
            fix="set these environment variables, or leave --host out to stay on this machine",
        )
    if ":" not in os.environ["PREFECT_SERVER_API_AUTH_STRING"]:
        raise InputError("PREFECT_SERVER_API_AUTH_STRING has no colon", fix="use user:password")
    if len(os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]) < 12:
        raise InputError("MLFLOW_AUTH_ADMIN_PASSWORD has fewer than 12 characters", fix="use a longer one")
    if find_spec("flask_wtf") is None:
        raise InputError(
            "MLflow's authentication needs a package that is not installed", fix="pip install 'mlflow[auth]'"
        )
    user = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin")
    return {
        "PREFECT_API_AUTH_STRING": os.environ["PREFECT_SERVER_API_AUTH_STRING"],
        "MLFLOW_TRACKING_USERNAME": os.environ.get("MLFLOW_TRACKING_USERNAME", user),
        "MLFLOW_TRACKING_PASSWORD": os.environ.get(
            "MLFLOW_TRACKING_PASSWORD", os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
        ),
    }


def _start_servers(
    project: Project,
    settings: Settings,
    host: str,
    prefect_port: int,
    mlflow_port: int,
    secrets: dict[str, str],
    parts: list[Part],
    on_line: Callable[[str], None],
) -> Addresses:
    configured = settings.services
    wanted: list[Server] = []
    if not configured.prefect_api_url:
        login = Login.parse(os.environ["PREFECT_SERVER_API_AUTH_STRING"]) if secrets else None
        env = {doorkeeper.HOSTS: ",".join(_names(host))} if secrets else {}
        wanted.append(services.prefect_server(project, schedules=True, login=login, env=env))
    if not configured.mlflow_tracking_uri:
        wanted.append(_mlflow_with_auth(project, host) if secrets else services.mlflow_server(project))
    preferred = {"prefect": prefect_port, "mlflow": mlflow_port}
    if wanted:
        on_line(f"starting {' and '.join(server.name for server in wanted)} …")
    started: dict[str, subprocess.Popen[bytes]] = {}
    urls: dict[str, str] = {}
    try:
        urls = services.start(project, wanted, started, owner="up", host=host, ports=preferred)
    finally:
        for server in wanted:
            if server.name in started:
                port = int(urls[server.name].removesuffix(server.url_path).rsplit(":", 1)[1]) if urls else 0
                parts.append(
                    Part(
                        name=server.name,
                        command=server.command(host, port),
                        env=server.environment(host, port),
                        cwd=project.state / server.name,
                        url=urls.get(server.name, ""),
                        probe=urls.get(server.name, "").removesuffix(server.url_path) + server.probe,
                        server=server,
                        child=started[server.name],
                        since=time.monotonic(),
                    )
                )
                if urls and preferred[server.name] not in (0, port):
                    on_line(f"port {preferred[server.name]} is taken: {server.name} uses {port}")
    return Addresses(
        prefect_api_url=configured.prefect_api_url or urls["prefect"],
        mlflow_tracking_uri=configured.mlflow_tracking_uri or urls["mlflow"],
    )


def _mlflow_with_auth(project: Project, host: str) -> Server:
    home = project.state / "mlflow"
    config = home / "auth.ini"
    with writing(config):
        home.mkdir(parents=True, exist_ok=True)
        config.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{home}/auth.db\nadmin_username = admin\n",
            encoding="utf-8",
        )
    private = ["10.*", "192.168.*", *(f"172.{second}.*" for second in range(16, 32))]
    env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS")
        or ",".join(f"{name},{name}:*" for name in dict.fromkeys(["127.0.0.1", *_names(host), *private])),
    }
    return services.mlflow_server(project, app=("--factory", "mlflow.server.auth:create_app"), env=env)


def _names(host: str) -> list[str]:
    """Names by which others call servers on `host`; MLFLOW_SERVER_ALLOWED_HOSTS gives more, but for its patterns."""
    given = os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", "").split(",")
    names = ["localhost", socket.gethostname(), socket.getfqdn(), host, *(name.strip() for name in given)]
    return list(dict.fromkeys(name for name in names if name and "*" not in name))


def _clients(
    project: Project,
    settings: Settings,
    host: str,
    api_port: int | None,
    addresses: Addresses,
    secrets: dict[str, str],
    on_line: Callable[[str], None],
) -> list[Part]:
    env = quiet_environment(**{**services.environment(project, addresses), **secrets})
    preferred = settings.serve.port if api_port is None else api_port
    port = services.free_port(host, preferred)
    if preferred not in (0, port):
        on_line(f"port {preferred} is taken: the API uses {port}")
    api = f"http://{services.reachable(host)}:{port}"
    python = sys.executable
    serve = [python, "-m", "sora.cli", "serve", "--project", str(project.root), "--host", host, "--port", str(port)]
    return [
        # It registers the schedule, then works; so a restart registers again.
        Part("worker", [python, "-m", "flows.worker", str(project.root)], env, project.root, ""),
        Part("api", serve, env, project.root, api, f"{api}/healthz"),
    ]


def _start(project: Project, part: Part) -> None:
    log = services.log_file(project, part.name)
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab" if part.ends else "wb") as sink:
            part.child = start_child(
                part.command,
                env=part.env,
                cwd=part.cwd,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
    part.since = time.monotonic()
    if part.server is not None:
        login = services.asked_by(project, part.server)
        services.record(project, part.name, part.child.pid, part.url, owner="up", login=login)


def _wait(project: Project, part: Part) -> None:
    """Until a part answers.

    Raises:
        ServiceError: it ended, or did not answer in time.
    """
    import httpx

    deadline = time.monotonic() + services.START_SECONDS
    ready = services.log_file(project, part.name) if part.name == "worker" else None
    while time.monotonic() < deadline:
        if part.child is None or part.child.poll() is not None:
            raise ServiceError(
                f"{part.name} ended while it started\n{services.log_tail(project, part.name)}",
                fix=f"see {services.log_file(project, part.name)}",
            )
        if ready is not None:
            if b"started!" in ready.read_bytes():
                return
        else:
            try:
                if httpx.get(part.probe, timeout=5, trust_env=False).status_code < 500:
                    return
            except httpx.HTTPError:
                pass
        time.sleep(0.1)
    raise ServiceError(
        f"{part.name} did not answer within {services.START_SECONDS:.0f} s\n{services.log_tail(project, part.name)}",
        fix=f"see {services.log_file(project, part.name)}",
    )


def _say(
    project: Project, settings: Settings, parts: list[Part], addresses: Addresses, on_line: Callable[[str], None]
) -> None:
    schedule = settings.schedule
    api = next(part.url for part in parts if part.name == "api")
    rows = [
        ("page and API", api),
        ("Prefect", without_login(str(addresses.prefect_api_url)).removesuffix("/api")),
        ("MLflow", without_login(str(addresses.mlflow_tracking_uri))),
        ("nightly", f"{schedule.cron} ({schedule.timezone})"),
        ("logs", str(project.state / "logs")),
    ]
    if any(part.server is not None and part.server.login == secret(project) for part in parts):
        # Not the secret itself: this may be a log that others read.
        login = f"Prefect's page: the line in {secret_file(project)}; MLflow's: what is before and after its colon"
        rows.insert(3, ("log in", login))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        on_line(f"  {name:<{width}}  {value}")
    on_line("all parts answer; Ctrl-C ends them")


def _watch(project: Project, parts: list[Part], on_line: Callable[[str], None]) -> None:
    """Starts again what ends, and tells when a nightly did not happen. Never returns."""
    look_at_nightly = 0.0
    told: datetime | None = None
    while True:
        now = time.monotonic()
        for part in parts:
            _keep(project, part, now, on_line)
        if now >= look_at_nightly:
            look_at_nightly = now + _NIGHTLY_LOOK
            expected = nightly_log.missed(nightly_log.read(project), datetime.now(UTC), project.settings().schedule)
            if expected is not None and expected != told:
                told = expected
                on_line(f"the nightly of {expected.isoformat(timespec='minutes')} did not happen; see `sora doctor`")
            if expected is not None:
                _alert(project)
        time.sleep(_LOOK)


def _keep(project: Project, part: Part, now: float, on_line: Callable[[str], None]) -> None:
    if part.child is not None:
        code = part.child.poll()
        if code is None:
            return
        part.ends = 1 if now - part.since > _GOOD_LIFE else part.ends + 1
        pause = min(2.0 ** (part.ends - 1), _LONGEST_PAUSE)
        part.child, part.again_at = None, now + pause
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        on_line(f"{part.name} {how}; starting it again in {pause:.0f} s (log: {services.log_file(project, part.name)})")
    elif now >= part.again_at:
        _start(project, part)
        on_line(f"{part.name} is started again")


def _alert(project: Project) -> None:
    """The webhook is told by a process of its own: a slow one must not hold the watch up."""
    start_child(
        [sys.executable, "-m", "flows.alerts", str(project.root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(parts: list[Part]) -> None:
    """Ends all parts with everything below them: a worker's flow run is a process of its own."""
    import psutil

    below: list[psutil.Process] = []
    children = [part.child for part in parts if part.child is not None]
    for child in children:
        try:
            below += psutil.Process(child.pid).children(recursive=True)
        except psutil.Error:
            continue
    for process in below:
        try:
            process.terminate()
        except psutil.Error:
            continue
    services.stop(children)
    _, alive = psutil.wait_procs(below, timeout=2)
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            continue


@contextmanager
def _only_one(project: Project) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        with FileLock(project.state / "up.lock", timeout=0):
            others: dict[str, Running] = services.running(project)
            if others:
                entry = next(iter(others.values()))
                raise RunActive(
                    f"a `sora {entry.owner}` (since {entry.started}) has servers of this project up",
                    fix="wait until it ends, then start again",
                )
            yield
    except Timeout as error:
        raise RunActive(f"`sora up` runs for {project.root} already", fix="use it, or stop it first") from error


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does, but in order: no error."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
