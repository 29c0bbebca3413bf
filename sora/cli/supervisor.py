"""`sora up`: Prefect, MLflow, a worker with the nightly schedule and the API on one machine, watched until Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import Protocol, Self

from sora.cli import exposure
from sora.config import Project, Settings
from sora.config.credentials import private_state, secret, secret_file
from sora.core.errors import RunActive, ServiceError
from sora.core.files import temporary_folder
from sora.core.processes import quiet_environment, start_child
from sora.core.progress import echo
from sora.core.redaction import without_login
from sora.operations import nightly_log
from sora.operations import servers as services
from sora.operations.servers import Addresses, RunningServer

_LOOK = 0.3  # seconds between two checks of the parts
_GOOD_LIFE = 60.0  # seconds of life after which a part's next end counts as its first
_LONGEST_PAUSE = 60.0
_NIGHTLY_LOOK = 60.0

Say = Callable[[str], None]


class _Terminated(BaseException):
    """SIGTERM arrived."""


class Part(Protocol):
    """What `sora up` keeps alive: a name, a way to start its process, a way to see that it is ready."""

    @property
    def name(self) -> str: ...

    def start(self, *, again: bool) -> subprocess.Popen[bytes]:
        """Starts the process; `again`: it appends to the previous process's log."""

    def ready(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ServerPart:
    """Prefect or MLflow: started again on the same port, under a new entry of the record."""

    project: Project
    first: RunningServer

    @property
    def name(self) -> str:
        return self.first.name

    def start(self, *, again: bool) -> subprocess.Popen[bytes]:
        one = services.spawn(self.project, self.first.server, self.first.host, self.first.port, again=again)
        login = services.asked_by(self.project, one.server)
        services.record(self.project, one.name, one.pid, one.url, owner="up", login=login)
        return one.process

    def ready(self) -> bool:
        return _answers(self.first.probe)


@dataclass(frozen=True, slots=True)
class ProgramPart:
    """One of Sora's own programs: the worker, which logs that it is ready, or the API, which answers."""

    project: Project
    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    probe: str = ""  # "": it has no address

    def start(self, *, again: bool) -> subprocess.Popen[bytes]:
        return services.run_logged(
            self.project, self.name, list(self.command), env=self.env, cwd=self.project.root, again=again
        )

    def ready(self) -> bool:
        if self.probe:
            return _answers(self.probe)
        return b"started!" in services.log_file(self.project, self.name).read_bytes()


@dataclass(slots=True)
class _Kept:
    """A part and what became of its process."""

    part: Part
    child: subprocess.Popen[bytes] | None
    since: float
    ends: int = 0  # in a row
    again_at: float = 0.0


class Supervisor:
    """Owns processes: starts them, restarts those that end, with growing pauses, and ends them all with its block."""

    def __init__(self, project: Project, on_line: Say) -> None:
        self._project = project
        self._say = on_line
        self._kept: list[_Kept] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say("ending all parts …")
        _end([kept.child for kept in self._kept if kept.child is not None])

    def adopt(self, part: Part, child: subprocess.Popen[bytes]) -> None:
        """Adopts a process that is already running."""
        self._kept.append(_Kept(part, child, time.monotonic()))

    def start(self, part: Part) -> None:
        self.adopt(part, part.start(again=False))

    def wait_until_ready(self) -> None:
        """Waits until every part is ready.

        Raises:
            ServiceError: one ended, or was not ready in time.
        """
        for kept in self._kept:
            self._wait(kept)

    def keep(self) -> None:
        """Checks every part once and restarts what ended, after its pause."""
        now = time.monotonic()
        for kept in self._kept:
            self._keep(kept, now)

    def _wait(self, kept: _Kept) -> None:
        name = kept.part.name
        log = services.log_file(self._project, name)
        deadline = time.monotonic() + services.START_SECONDS
        while time.monotonic() < deadline:
            if kept.child is None or kept.child.poll() is not None:
                raise ServiceError(
                    f"{name} ended while it started\n{services.log_tail(self._project, name)}", fix=f"see {log}"
                )
            if kept.part.ready():
                return
            time.sleep(0.1)
        raise ServiceError(
            f"{name} did not answer within {services.START_SECONDS:.0f} s\n{services.log_tail(self._project, name)}",
            fix=f"see {log}",
        )

    def _keep(self, kept: _Kept, now: float) -> None:
        name = kept.part.name
        if kept.child is not None:
            code = kept.child.poll()
            if code is None:
                return
            kept.ends = 1 if now - kept.since > _GOOD_LIFE else kept.ends + 1
            pause = min(2.0 ** (kept.ends - 1), _LONGEST_PAUSE)
            kept.child, kept.again_at = None, now + pause
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            log = services.log_file(self._project, name)
            self._say(f"{name} {how}; starting it again in {pause:.0f} s (log: {log})")
        elif now >= kept.again_at:
            kept.child = kept.part.start(again=True)
            kept.since = time.monotonic()
            self._say(f"{name} is started again")


def up(
    project: Project,
    *,
    host: str = services.LOOPBACK,
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    api_port: int | None = None,
    on_line: Say = echo,
) -> None:
    """Starts every part, waits until each answers, prints the addresses, and keeps them up until Ctrl-C or SIGTERM.

    A part that ends is restarted, with growing pauses. All parts end with this process, however it ends.

    Args:
        prefect_port, mlflow_port, api_port: preferred ports (`api_port`: `serve.port` of params.yaml); if one is
            taken, a free one is used and printed. 0: any.

    Raises:
        InputError: others can reach the address, and authentication is not set up.
        RunActive: the project's servers belong to another process.
        ServiceError: a part does not start.
        KeyboardInterrupt: Ctrl-C, after all parts have ended.
    """
    settings = project.settings()
    logins = exposure.client_logins(project, host)
    private_state(project)
    ports = {"prefect": prefect_port, "mlflow": mlflow_port}
    with (
        _only_one(project),
        _terminable(),
        _servers(project, settings, host, ports, exposed=bool(logins), on_line=on_line) as servers,
        temporary_folder("worker") as scratch,
        Supervisor(project, on_line) as supervisor,
    ):
        for one in servers:
            supervisor.adopt(ServerPart(project, one), one.process)
        addresses = _addresses(settings, servers)
        env = quiet_environment(**{**services.environment(project, addresses), **logins})
        # The worker registers the schedule and then works, so a restart registers it again. What its flow runs leave
        # in the temporary folder when they are killed (Prefect's `runner_storage`) goes with ours.
        worker = (sys.executable, "-m", "flows.worker", str(project.root))
        supervisor.start(ProgramPart(project, "worker", worker, {**env, "TMPDIR": str(scratch)}))
        port = _api_port(settings, host, api_port, on_line)
        api = f"http://{services.reachable(host)}:{port}"
        serve = ("serve", "--project", str(project.root), "--host", host, "--port", str(port))
        command = (sys.executable, "-m", "sora.cli", *serve)
        supervisor.start(ProgramPart(project, "api", command, env, probe=f"{api}/healthz"))
        supervisor.wait_until_ready()
        own_login = any(one.server.login == secret(project) for one in servers)
        _say_where(project, settings, api, addresses, own_login=own_login, on_line=on_line)
        _watch(project, supervisor, on_line)


@contextmanager
def _servers(
    project: Project, settings: Settings, host: str, ports: Mapping[str, int], *, exposed: bool, on_line: Say
) -> Iterator[list[RunningServer]]:
    """The servers that params.yaml does not place elsewhere."""
    wanted = []
    if not settings.services.prefect_api_url:
        wanted.append(exposure.prefect_server(project, host, exposed=exposed))
    if not settings.services.mlflow_tracking_uri:
        wanted.append(exposure.mlflow_server(project, host, exposed=exposed))
    if wanted:
        on_line(f"starting {' and '.join(server.name for server in wanted)} …")
    with services.started(project, wanted, owner="up", host=host, ports=ports) as servers:
        for one in servers:
            if ports[one.name] not in (0, one.port):
                on_line(f"port {ports[one.name]} is taken: {one.name} uses {one.port}")
        yield servers


def _addresses(settings: Settings, servers: list[RunningServer]) -> Addresses:
    urls = {one.name: one.url for one in servers}
    return Addresses(
        prefect_api_url=settings.services.prefect_api_url or urls["prefect"],
        mlflow_tracking_uri=settings.services.mlflow_tracking_uri or urls["mlflow"],
    )


def _api_port(settings: Settings, host: str, wanted: int | None, on_line: Say) -> int:
    preferred = settings.serve.port if wanted is None else wanted
    port = services.free_port(host, preferred)
    if preferred not in (0, port):
        on_line(f"port {preferred} is taken: the API uses {port}")
    return port


def _answers(address: str) -> bool:
    import httpx

    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code < 500
    except httpx.HTTPError:
        return False


def _say_where(
    project: Project, settings: Settings, api: str, addresses: Addresses, *, own_login: bool, on_line: Say
) -> None:
    schedule = settings.schedule
    rows = [
        ("page and API", api),
        ("Prefect", without_login(str(addresses.prefect_api_url)).removesuffix("/api")),
        ("MLflow", without_login(str(addresses.mlflow_tracking_uri))),
        ("nightly", f"{schedule.cron} ({schedule.timezone})"),
        ("logs", str(project.logs)),
    ]
    if own_login:
        # Not the secret itself: others may read this log.
        login = f"Prefect's page: the line in {secret_file(project)}; MLflow's: the parts before and after its colon"
        rows.insert(3, ("log in", login))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        on_line(f"  {name:<{width}}  {value}")
    on_line("all parts answer; Ctrl-C ends them")


def _watch(project: Project, supervisor: Supervisor, on_line: Say) -> None:
    """Keeps the parts up, and reports a nightly that did not happen. Never returns."""
    look_at_nightly = 0.0
    reported: datetime | None = None
    while True:
        supervisor.keep()
        if time.monotonic() >= look_at_nightly:
            look_at_nightly = time.monotonic() + _NIGHTLY_LOOK
            expected = nightly_log.missed(nightly_log.read(project), datetime.now(UTC), project.settings().schedule)
            if expected is not None and expected != reported:
                reported = expected
                on_line(f"the nightly of {expected.isoformat(timespec='minutes')} did not happen; see `sora doctor`")
            if expected is not None:
                _alert(project)
        time.sleep(_LOOK)


def _alert(project: Project) -> None:
    """Calls the webhook from a separate process: a slow webhook must not delay the watch."""
    start_child(
        [sys.executable, "-m", "flows.alerts", str(project.root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """Ends processes and all their children: a worker's flow run is a separate process."""
    import psutil

    below: list[psutil.Process] = []
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
        with FileLock(project.up_lock, timeout=0):
            others = services.running(project)
            if others:
                entry = next(iter(others.values()))
                raise RunActive(
                    f"a `sora {entry.owner}` (since {entry.started}) is running servers of this project",
                    fix="wait until it ends, then start again",
                )
            yield
    except Timeout as error:
        raise RunActive(f"`sora up` is already running for {project.root}", fix="use it, or stop it first") from error


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block in order, as Ctrl-C does, but is not an error."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _Terminated:
        pass  # asked for: the block has ended in order
    finally:
        signal.signal(signal.SIGTERM, before)
