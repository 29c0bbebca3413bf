"""The project's Prefect and MLflow servers: found if they are up, started if not, ended with who started them.

Each server is one process, a direct child that dies with its parent: the vendors' own start commands put a second
process under the first, which would outlive a kill. State (databases, artifacts, ports, logs) lies below `.sora/`.
Nothing of the user's own Prefect or MLflow set-up is read or written. Both ask for the project's secret, on loopback
too (`sora.config.credentials`), and answer neither foreign pages nor foreign names (`sora.core.doorkeeper`).

What runs is written to `.sora/services.json`: {name: {"pid", "created", "url", "started", "owner", "login"}}; an entry
counts only while the process with that number *and* that creation time lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sora.config import Project
from sora.config.credentials import Login, private_state, secret
from sora.core import doorkeeper
from sora.core.errors import ServiceError
from sora.core.files import disk_failure, writing
from sora.core.processes import quiet_environment, start_child
from sora.core.redaction import without_login
from sora.operations import databases, empty_database

LOOPBACK = "127.0.0.1"
START_SECONDS = 180.0  # 17 s measured for a first start on a cold disk, two minutes on a machine that was busy
STOP_SECONDS = 8.0
_ANSWER_SECONDS = 15.0  # for a server that is up but busy
_FAILING_SECONDS = 5.0  # a server that answers, but only with 5xx, will not get better: a damaged database
_OTHERS_SECONDS = 10.0  # that the owner waits for other processes which use its servers


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the servers answer; None for one that was not asked for."""

    prefect_api_url: str | None = None
    mlflow_tracking_uri: str | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """One entry of services.json."""

    pid: int
    created: float  # when the process began, seconds since the boot (`_created`): numbers are used again, times are not
    url: str
    started: str  # ISO 8601, UTC
    owner: str  # the command that started it: "run", "up"
    login: str = "none"  # what it asks for: the project's "secret", an "account" of its own; "none": an older Sora's


@dataclass(frozen=True, slots=True)
class Server:
    """How to start one server. `probe` is a path that answers below 500 once it is ready."""

    name: str
    app: tuple[str, ...]  # uvicorn's application arguments
    probe: str
    url_path: str = ""  # of what clients are told
    env: Mapping[str, str] = field(default_factory=dict)
    database: Path | None = None  # Prefect's, where it is a file
    login: Login | None = None  # that it asks for; None: accounts of its own

    def environment(self, host: str, port: int) -> dict[str, str]:
        # Prefect's page asks this address, from the reader's browser; it would guess port 4200.
        api = f"http://{host}:{port}/api" if host == LOOPBACK else "/api"
        own = ",".join(f"http://{name}:{port}" for name in (LOOPBACK, "localhost"))
        pages = {"PREFECT_UI_API_URL": api, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": own}
        inherited = quiet_environment(**{**pages, **self.env})
        if doorkeeper.HOSTS not in self.env:
            inherited.pop(doorkeeper.HOSTS, None)
        return inherited

    def command(self, host: str, port: int) -> list[str]:
        options = ["--host", host, "--port", str(port), "--log-level", "warning", "--no-access-log"]
        # Open pages keep connections; they must not hold the end up.
        return [sys.executable, "-m", "uvicorn", *self.app, *options, "--timeout-graceful-shutdown", "2"]


def prefect_server(
    project: Project, *, schedules: bool = False, login: Login | None = None, env: Mapping[str, str] | None = None
) -> Server:
    """Prefect's API and pages.

    Args:
        schedules: it also makes runs from schedules and marks late ones (`sora up` only).
        login: that it asks for; the project's secret where none is given.
    """
    home = project.state / "prefect"
    asked = login or secret(project)
    on = str(schedules).lower()
    return Server(
        name="prefect",
        app=("--factory", "flows.server:create_app", "--lifespan", "on"),
        probe="/api/health",
        url_path="/api",
        env={
            **prefect_environment(project),
            "PREFECT_SERVER_API_AUTH_STRING": asked.auth_string,
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db",
            # The default keeps leases in memory: a slot that is held when server and holder die stays taken for good.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # or it writes into the installed package
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": on,
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": on,
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            **(env or {}),
        },
        database=home / "prefect.db",
        login=asked,
    )


def mlflow_server(project: Project, *, app: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Server:
    """MLflow's API and pages, artifacts through the server. The variables are those that `mlflow server` sets.

    Args:
        app: uvicorn's arguments for an application with accounts of its own; without, all is behind the project's
            secret.
    """
    home = project.state / "mlflow"
    login = None if app else secret(project)
    database = f"sqlite:///{home}/mlflow.db"
    return Server(
        name="mlflow",
        app=tuple(app) or ("--factory", "sora.registry.server:create_app"),
        probe="/api/2.0/mlflow/experiments/get?experiment_id=0",  # makes the database; /health does not
        env={
            "_MLFLOW_SERVER_FILE_STORE": database,
            "_MLFLOW_SERVER_REGISTRY_STORE": database,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(home / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs of generative models: processes that we don't need
            **({doorkeeper.LOGIN: login.auth_string} if login else {}),
            **(env or {}),
        },
        login=login,
    )


def prefect_environment(project: Project) -> dict[str, str]:
    """Keeps Prefect's clients and servers away from the user's own profile."""
    home = project.state / "prefect"
    return {"PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}


def environment(project: Project, addresses: Addresses) -> dict[str, str]:
    """What a process needs in its environment to use the servers at `addresses`."""
    env = prefect_environment(project)
    if addresses.prefect_api_url:
        env["PREFECT_API_URL"] = addresses.prefect_api_url
    if addresses.mlflow_tracking_uri:
        env["MLFLOW_TRACKING_URI"] = addresses.mlflow_tracking_uri
    own = login(project, "prefect")
    if own is not None:
        env["PREFECT_API_AUTH_STRING"] = own.auth_string
    elif given := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        env["PREFECT_API_AUTH_STRING"] = os.environ.get("PREFECT_API_AUTH_STRING", given)
    return env


def login(project: Project, name: str) -> Login | None:
    """What to tell the server `name` ("prefect", "mlflow") of the project.

    None where the environment says it (PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME and _PASSWORD): for servers
    that params.yaml names, those with accounts of their own (`sora up --host`), and while none runs here.
    """
    services = project.settings().services
    if services.prefect_api_url if name == "prefect" else services.mlflow_tracking_uri:
        return None
    return own_login(project, name)


def own_login(project: Project, name: str) -> Login | None:
    """`login` where params.yaml names no server."""
    entry = running(project).get(name)
    return None if entry is None or entry.login == "account" else secret(project)


@contextmanager
def servers(
    project: Project, *, prefect: bool = True, mlflow: bool = True, owner: str = "run", standing: bool = False
) -> Iterator[Addresses]:
    """The addresses of the servers asked for, for as long as it is open.

    Those that params.yaml names (`services`) and those that are up are used; the others are started, side by side, and
    ended at the end, also on Ctrl-C; when this process is killed, they die with it. Call it from a thread that lives
    as long as the servers are to live: Linux ends such children with the *thread* that started them.

    Args:
        standing: for a process that stays (`sora serve`): it copes with a server that goes away, so whoever ends one
            does not wait for it.

    Raises:
        ServiceError: one does not start or does not answer; the end of its log is in the message.
    """
    settings = project.settings().services
    configured = {"prefect": settings.prefect_api_url, "mlflow": settings.mlflow_tracking_uri}
    wanted = [name for name, asked in (("prefect", prefect), ("mlflow", mlflow)) if asked]
    private_state(project)
    for name in wanted:
        if configured[name]:
            _answers_elsewhere(name, str(configured[name]))
    local = [name for name in wanted if not configured[name]]
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        with databases.explained(project, local), _in_use(project, counts=not standing) as others:
            with _exclusive(project):
                urls = {name: entry.url for name, entry in running(project).items() if name in local}
                for name, url in urls.items():
                    wait_ready(project, _server(project, name), url, seconds=_ANSWER_SECONDS)
                missing = [_server(project, name) for name in local if name not in urls]
                urls |= start(project, missing, started, owner=owner)
            try:
                yield Addresses(
                    prefect_api_url=configured["prefect"] or urls.get("prefect"),
                    mlflow_tracking_uri=configured["mlflow"] or urls.get("mlflow"),
                )
            finally:
                if started:
                    others()
    finally:
        stop(started.values())
        forget(project, started)


def mlflow_address(project: Project) -> str:
    """MLflow's address for a process that starts no servers: a flow run, a worker.

    Raises:
        ServiceError: params.yaml names none, none runs here, and MLFLOW_TRACKING_URI is not set.
    """
    configured = project.settings().services.mlflow_tracking_uri
    entry = running(project).get("mlflow")
    address = configured or (entry.url if entry else None) or os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise ServiceError(
            f"no MLflow server runs for {project.root}",
            fix="start one with `sora up`, or set services.mlflow_tracking_uri in params.yaml",
        )
    return address


def running(project: Project) -> dict[str, Running]:
    """The servers of this project that are up on this machine, by name. Entries of dead processes are left out."""
    try:
        text = _record(project).read_text(encoding="utf-8")
        entries = {name: Running(**entry) for name, entry in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or not ours: starting anew writes it again
    return {name: entry for name, entry in entries.items() if _lives(entry)}


def start(
    project: Project,
    wanted: Sequence[Server],
    started: dict[str, subprocess.Popen[bytes]],
    *,
    owner: str,
    host: str = LOOPBACK,
    ports: Mapping[str, int] | None = None,
    seconds: float = START_SECONDS,
) -> dict[str, str]:
    """Starts servers side by side, waits until each is ready, records them, and returns what clients are told.

    Args:
        started: filled as they start, so that the caller can end them whatever happens.
        ports: preferred ones; a free one is taken where there is none or where it is taken.

    Raises:
        ServiceError: one ended or was not ready in time.
    """
    databases.require(project, [server.name for server in wanted])
    urls: dict[str, str] = {}
    said = {server.name: asked_by(project, server) for server in wanted}
    for server in sorted(wanted, key=lambda one: one.database is not None):  # the other starts while it is made
        port = free_port(host, (ports or {}).get(server.name, 0))
        urls[server.name] = f"http://{reachable(host)}:{port}{server.url_path}"
        child = _spawn(project, server, host, port)
        started[server.name] = child
    deadline = time.monotonic() + seconds
    for server in wanted:
        child, url = started[server.name], urls[server.name]
        wait_ready(project, server, url, seconds=deadline - time.monotonic(), child=child)
    for name, url in urls.items():
        record(project, name, started[name].pid, url, owner=owner, login=said[name])
    return urls


def wait_ready(
    project: Project, server: Server, url: str, *, seconds: float, child: subprocess.Popen[bytes] | None = None
) -> None:
    """Waits until the server answers its probe.

    Raises:
        ServiceError: `child` ended, or no good answer came in time.
    """
    import httpx

    base = url.removesuffix(server.url_path)
    auth = server.login.pair if server.login else None
    deadline = time.monotonic() + max(seconds, 0.1)
    said = "no answer"
    failing_since: float | None = None
    with httpx.Client(trust_env=False) as client:
        while True:
            if child is not None and child.poll() is not None:
                how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else "ended"
                raise _failed(project, server, f"the {server.name} server {how} while it started")
            left = deadline - time.monotonic()
            try:
                answer = client.get(base + server.probe, auth=auth, timeout=max(min(left, 10.0), 0.1))
                # 401 is an answer too: it is up and asks who we are.
                if answer.status_code < 500:
                    return
                said = f"status {answer.status_code}"
                failing_since = failing_since or time.monotonic()
            except httpx.HTTPError as error:
                said = str(error) or type(error).__name__
            failing = failing_since is not None and time.monotonic() - failing_since > _FAILING_SECONDS
            if left <= 0 or failing:
                raise _failed(project, server, f"the {server.name} server at {url} does not answer ({said})")
            time.sleep(0.05)


def _failed(project: Project, server: Server, what: str) -> ServiceError:
    """What happened, with the end of the server's log; the disk as the reason where it is one."""
    tail = log_tail(project, server.name)
    disk = disk_failure(project.state, tail)
    if disk is not None:
        disk.message = f"{what}: {disk.message}"
        return disk
    see = f"see {log_file(project, server.name)}; `sora doctor` names its process while it lives"
    return ServiceError(f"{what}\n{tail}", fix=see)


def stop(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """Asks processes to end, all at once, and kills those that have not after `STOP_SECONDS`."""
    children = list(children)
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def asked_by(project: Project, server: Server) -> str:
    """`Running.login` of a server."""
    return "secret" if server.login == secret(project) else "account"


def record(project: Project, name: str, pid: int, url: str, *, owner: str, login: str = "secret") -> None:
    """Writes one server into services.json."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    _write(project, {**running(project), name: Running(pid, _created(pid) or 0.0, url, now, owner, login)})


def forget(project: Project, names: Iterable[str]) -> None:
    """Takes servers out of services.json."""
    gone = set(names)
    if gone:
        _write(project, {name: entry for name, entry in running(project).items() if name not in gone})


def free_port(host: str, preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else one that the system gives."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if port:
                    continue
                raise ServiceError(
                    f"can't listen on {host}: {error}", fix="use an address of this machine, as --host 127.0.0.1"
                ) from error
            return int(probe.getsockname()[1])
    raise AssertionError("port 0 binds or raises")


def reachable(host: str) -> str:
    """The host part of an address that a client here can use for a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return LOOPBACK
    return f"[{host}]" if ":" in host else host


def log_file(project: Project, name: str) -> Path:
    return project.state / "logs" / f"{name}.log"


def log_tail(project: Project, name: str, lines: int = 12) -> str:
    """The end of a server's log."""
    try:
        with log_file(project, name).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 16_384, 0))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def _server(project: Project, name: str) -> Server:
    return prefect_server(project) if name == "prefect" else mlflow_server(project)


def _spawn(project: Project, server: Server, host: str, port: int) -> subprocess.Popen[bytes]:
    log = log_file(project, server.name)
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        (project.state / server.name).mkdir(exist_ok=True)
        if server.database is not None:
            empty_database.provide(server.database)
        with log.open("wb") as sink:
            return start_child(
                server.command(host, port),
                env=server.environment(host, port),
                cwd=project.state / server.name,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # Ctrl-C at the terminal is for us; we end them when what uses them has ended
            )


def _answers_elsewhere(name: str, url: str) -> None:
    import httpx

    probe = f"{url.rstrip('/')}/health"  # the same in both
    try:
        answer = httpx.get(probe, timeout=10, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServiceError(
            f"the {name} server at {without_login(url)} does not answer: {error}",
            fix="start it, or correct or remove its address under `services` in params.yaml",
        ) from error
    if answer.status_code >= 400:
        raise ServiceError(
            f"{without_login(probe)} answers {answer.status_code}: no {name} server is there",
            fix="correct or remove its address under `services` in params.yaml"
            + (" (Prefect's ends with /api)" if name == "prefect" else ""),
        )


def _lives(entry: Running) -> bool:
    """Whether the process that an entry names is still that process."""
    if _created(entry.pid) == entry.created:
        return True
    import psutil

    try:  # an older Sora wrote the time of day at which the process began
        return bool(psutil.Process(entry.pid).create_time() == entry.created)
    except psutil.Error:
        return False


def _created(pid: int) -> float | None:
    """When a living process began, by a clock that nobody sets; None if there is none with this number.

    What psutil gives moves with the calendar: a server would count as dead once the clock was set by a second, and a
    second one be started on the same database.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
            return int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")
        except OSError:  # no Linux
            return float(process.create_time())
    except psutil.Error:
        return None


def _record(project: Project) -> Path:
    return project.state / "services.json"


def _write(project: Project, entries: Mapping[str, Running]) -> None:
    target = _record(project)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    with writing(target):
        draft.write_text(json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=1))
        os.replace(draft, target)


@contextmanager
def _exclusive(project: Project) -> Iterator[None]:
    """One process at a time looks what is up and starts the rest."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(project.state / "services.lock", timeout=START_SECONDS + 10):
            yield
    except Timeout as error:
        raise ServiceError(
            "another process has been starting the servers for three minutes", fix="look for it with `sora doctor`"
        ) from error


@contextmanager
def _in_use(project: Project, *, counts: bool) -> Iterator[Callable[[], None]]:
    """Marks the servers as used by this process. Gives a function that waits, for a while, until nobody else does.

    Without it, a `sora models` beside a `sora run` would lose its server in the middle when the run ends.
    """
    use = project.state / "services.use"
    with writing(use):
        descriptor = os.open(use, os.O_RDWR | os.O_CREAT, 0o644)

    def others_are_done() -> None:
        deadline = time.monotonic() + _OTHERS_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)

    try:
        if counts:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield others_are_done
    finally:
        os.close(descriptor)
