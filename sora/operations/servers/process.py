"""Server processes: started, waited for, ended. Each is a direct child that dies with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sora.config import Project
from sora.core.errors import ServiceError
from sora.core.files import disk_failure, writing
from sora.core.processes import start_child
from sora.operations import databases, empty_database
from sora.operations.servers.describe import LOOPBACK, Server
from sora.operations.servers.recorded import asked_by, forget, record

START_SECONDS = 180.0  # a first start took 17 s on a cold disk, and two minutes on a busy machine
STOP_SECONDS = 8.0
_FAILING_SECONDS = 5.0  # a server that answers, but only with 5xx, will not get better: a damaged database


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that this process started and must end."""

    server: Server
    host: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"http://{reachable(self.host)}:{self.port}{self.server.url_path}"

    @property
    def probe(self) -> str:
        """An address that answers below 500 once the server is ready."""
        return f"http://{reachable(self.host)}:{self.port}{self.server.probe}"


@contextmanager
def started(
    project: Project,
    wanted: Sequence[Server],
    *,
    owner: str,
    host: str = LOOPBACK,
    ports: Mapping[str, int] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[list[RunningServer]]:
    """`start` for the length of a block: at its end the servers are ended and removed from the record."""
    servers = start(project, wanted, owner=owner, host=host, ports=ports, seconds=seconds)
    try:
        yield servers
    finally:
        stop(one.process for one in servers)
        forget(project, [one.name for one in servers])


def start(
    project: Project,
    wanted: Sequence[Server],
    *,
    owner: str,
    host: str = LOOPBACK,
    ports: Mapping[str, int] | None = None,
    seconds: float = START_SECONDS,
) -> list[RunningServer]:
    """Starts servers in parallel, waits until each is ready, and records them. If one fails, all are ended.

    Args:
        ports: preferred ports; a free one is used if none is given or it is taken.

    Raises:
        DatabaseDamaged: a server's database is damaged. Nothing was started.
        ServiceError: one ended or was not ready in time.
    """
    databases.require(project, [server.name for server in wanted])
    logins = {server.name: asked_by(project, server) for server in wanted}
    servers: list[RunningServer] = []
    recorded: list[str] = []
    try:
        for server in sorted(wanted, key=lambda one: one.database is not None):  # the other starts meanwhile
            port = free_port(host, (ports or {}).get(server.name, 0))
            servers.append(spawn(project, server, host, port))
        deadline = time.monotonic() + seconds
        for one in servers:
            wait_ready(project, one.server, one.url, seconds=deadline - time.monotonic(), child=one.process)
        for one in servers:
            record(project, one.name, one.pid, one.url, owner=owner, login=logins[one.name])
            recorded.append(one.name)
    except BaseException:
        stop(one.process for one in servers)
        forget(project, recorded)
        raise
    return servers


def spawn(project: Project, server: Server, host: str, port: int, *, again: bool = False) -> RunningServer:
    """Starts one server and waits for nothing. `again`: it appends to the previous process's log."""
    with writing(project.state):
        project.server_home(server.name).mkdir(parents=True, exist_ok=True)
        if server.database is not None:
            empty_database.provide(server.database)
    process = run_logged(
        project,
        server.name,
        server.command(host, port),
        env=server.environment(host, port),
        cwd=project.server_home(server.name),
        again=again,
    )
    return RunningServer(server, host, port, process)


def run_logged(
    project: Project, name: str, command: list[str], *, env: Mapping[str, str], cwd: Path, again: bool = False
) -> subprocess.Popen[bytes]:
    """Starts a child whose output goes to the log `name`, which `again` continues."""
    log = log_file(project, name)
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab" if again else "wb") as sink:
            return start_child(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # Ctrl-C at the terminal is for us; we end servers after their users
            )


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
    status = "no answer"
    failing_since: float | None = None
    with httpx.Client(trust_env=False) as client:
        while True:
            if child is not None and child.poll() is not None:
                how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else "ended"
                raise _failed(project, server, f"the {server.name} server {how} while it started")
            left = deadline - time.monotonic()
            try:
                answer = client.get(base + server.probe, auth=auth, timeout=max(min(left, 10.0), 0.1))
                # 401 is an answer too: the server is up and asks for a login.
                if answer.status_code < 500:
                    return
                status = f"status {answer.status_code}"
                failing_since = failing_since or time.monotonic()
            except httpx.HTTPError as error:
                status = str(error) or type(error).__name__
            failing = failing_since is not None and time.monotonic() - failing_since > _FAILING_SECONDS
            if left <= 0 or failing:
                raise _failed(project, server, f"the {server.name} server at {url} does not answer ({status})")
            time.sleep(0.05)


def _failed(project: Project, server: Server, what: str) -> ServiceError:
    """The error, with the end of the server's log; it names the disk if the disk is the reason."""
    tail = log_tail(project, server.name)
    disk = disk_failure(project.state, tail)
    if disk is not None:
        disk.message = f"{what}: {disk.message}"
        return disk
    see = f"see {log_file(project, server.name)}; `sora doctor` names its process while it runs"
    return ServiceError(f"{what}\n{tail}", fix=see)


def stop(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """Asks all processes to end at once, and kills those still running after `STOP_SECONDS`."""
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


def free_port(host: str, preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else a port that the system chooses."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if port:
                    continue
                raise ServiceError(
                    f"can't listen on {host}: {error}", fix="use an address of this machine, such as --host 127.0.0.1"
                ) from error
            return int(probe.getsockname()[1])
    raise AssertionError("port 0 binds or raises")


def reachable(host: str) -> str:
    """The host part of an address that a client here can use for a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return LOOPBACK
    return f"[{host}]" if ":" in host else host


def log_file(project: Project, name: str) -> Path:
    return project.log(name)


def log_tail(project: Project, name: str, lines: int = 12) -> str:
    """The end of a server's log."""
    try:
        with log_file(project, name).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 16_384, 0))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"
