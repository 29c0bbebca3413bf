"""The faults themselves. Each runs one verb of a case, strikes it, and puts right what it broke of the machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.invariants import Finding, spoken
from benchmarks.faults.processes import Case, Verb, kill, role_of
from benchmarks.faults.proxy import Mode, Proxy
from benchmarks.faults.scenes import LIMIT
from sora.config import Project
from sora.operations import servers as services
from sora.operations.servers import Addresses

DAY = 86_400
_FAKETIME = "libfaketimeMT.so.1"
UP = ("up", "--prefect-port", "0", "--mlflow-port", "0", "--api-port", "0")


@dataclass(frozen=True, slots=True)
class Struck:
    """What a fault did."""

    victims: tuple[str, ...]  # in words: roles that were killed, bytes that were left, servers that were away
    first: Finding  # how the verb that it struck ended


Fault = Callable[[Case, float, random.Random], Struck]  # case, moment in seconds after the verb's start, chance


# -- kills --


def kill_one(case: Case, moment: float, chance: random.Random) -> Struck:
    """SIGKILL of any one process of a run."""
    return _kill_of_run(case, moment, lambda living: [chance.choice(living)])


def kill_all(case: Case, moment: float, chance: random.Random) -> Struck:
    """SIGKILL of all processes of a run at once: what a power cut does, but for the disk."""
    return _kill_of_run(case, moment, lambda living: living)


def _kill_of_run(case: Case, moment: float, pick: Callable[[list[psutil.Process]], list[psutil.Process]]) -> Struck:
    with Verb(case, "run", "--json") as verb:
        until(verb, moment)
        living = sorted(case.processes(), key=lambda one: one.pid)
        victims = pick(living) if living else []
        roles = tuple(role_of(one) for one in victims)
        kill(victims)
        verb.wait(LIMIT)
    return Struck(roles or ("none: it had ended",), spoken(verb))


def kill_of_up(case: Case, moment: float, chance: random.Random) -> Struck:
    """SIGKILL of any one process of `up` during a nightly of the worker; `up` starts it again, then is stopped."""
    return _kill_of_up(case, moment, lambda living: [chance.choice(living)])


def kill_all_of_up(case: Case, moment: float, chance: random.Random) -> Struck:
    """SIGKILL of all of `up`, itself included."""
    return _kill_of_up(case, moment, lambda living: living)


def _kill_of_up(case: Case, moment: float, pick: Callable[[list[psutil.Process]], list[psutil.Process]]) -> Struck:
    with Verb(case, *UP) as verb:
        wait_until_up(verb)
        trigger_nightly(case)
        until(verb, moment, since=time.monotonic())
        victims = pick(sorted(case.processes(), key=lambda one: one.pid))
        roles = tuple(role_of(one) for one in victims)
        kill(victims)
        time.sleep(1.0)
        if verb.running:
            try:
                wait_until_whole(verb)
            except RuntimeError as error:
                living = ", ".join(sorted(role_of(one) for one in case.processes()))
                return Struck(roles, Finding("struck", False, f"alive: {living}; {error}"[:900]))
            verb.process.terminate()
        verb.wait(60)
    return Struck(roles, spoken(verb))


def wait_until_up(verb: Verb, seconds: float = LIMIT) -> None:
    """Until `sora up` says that all parts answer."""
    _wait(verb, lambda: "Ctrl-C" in verb.out + verb.err, seconds, "all parts answer")


def wait_until_whole(verb: Verb, seconds: float = LIMIT) -> None:
    """Until `sora up` has started again what ended, and both servers answer."""

    def whole() -> bool:
        said = verb.out + verb.err
        if said.count("starting it again") > said.count("is started again"):
            return False
        return {"prefect", "mlflow"} <= set(services.running(Project(verb.case.root))) and all(
            verb.case.role(role) for role in ("prefect", "mlflow", "worker", "api")
        )

    _wait(verb, whole, seconds, "every part is up again")


def _wait(verb: Verb, condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if not verb.running or time.monotonic() > end:
            raise RuntimeError(f"not so: {what}\n{verb.out[-2000:]}\n{verb.err[-2000:]}")
        time.sleep(0.1)


def trigger_nightly(case: Case) -> str:
    """Asks Prefect for a nightly in the worker, as `sora` itself reaches the server; the flow run's id."""
    with case.inside():
        project = Project(case.root)
        known = services.running(project)
        env = services.environment(project, Addresses(known["prefect"].url, known["mlflow"].url))
        code = "import sys; from prefect.deployments import run_deployment as r; print(r(sys.argv[1], timeout=0).id)"
        done = subprocess.run(
            [sys.executable, "-c", code, f"nightly/{project.settings().name}"],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    if done.returncode:
        raise RuntimeError(f"no nightly could be asked for:\n{done.stderr[-2000:]}")
    return done.stdout.split()[-1]


# -- a full disk --


def disk_full(case: Case, moment: float, chance: random.Random) -> Struck:
    """Any write fails from a moment on, or once the few bytes that are left are used. The case lies on a tmpfs."""
    left = chance.choice([0, 4096, 100_000, 1_000_000])
    ballast = case.folder / "ballast"
    with Verb(case, "run", "--json") as verb:
        until(verb, moment)
        fill(ballast, left)
        try:
            verb.wait(LIMIT)
        finally:
            ballast.unlink()
    return Struck((f"{left} bytes left",), spoken(verb))


def fill(ballast: Path, left: int) -> None:
    """Makes a file that leaves `left` bytes on its disk."""
    room = os.statvfs(ballast.parent)
    size = room.f_bavail * room.f_frsize - left
    with ballast.open("wb") as file:
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)


@contextmanager
def small_disk(folder: Path, megabytes: int = 300) -> Iterator[None]:
    """A tmpfs at `folder`.

    Raises:
        PermissionError: this user may not mount one.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0755", "sora-faults", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(f"mount says: {done.stderr.strip()}")
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], capture_output=True, check=False)
            if folder.is_mount():  # somebody's working folder: it goes when that process does
                subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
    finally:
        if folder.is_dir():
            folder.rmdir()


# -- servers that are away --


def away(name: str, mode: Mode) -> Fault:
    """A fault: the server `name` does not answer, or answers 500, for up to 15 seconds. The server itself lives on."""

    def fault(case: Case, moment: float, chance: random.Random) -> Struck:
        seconds = chance.uniform(0.5, 15)
        with proxied(case) as proxies, Verb(case, "run", "--json") as verb:
            until(verb, moment)
            proxies[name].turn(mode)
            until(verb, seconds, since=time.monotonic())
            proxies[name].turn("pass")
            verb.wait(LIMIT)
        return Struck((f"{name} {mode} for {seconds:.1f} s",), spoken(verb))

    return fault


@contextmanager
def proxied(case: Case) -> Iterator[dict[str, Proxy]]:
    """Both servers of the case's project up, each behind a proxy that every verb takes for the server."""
    project = Project(case.root)
    with ExitStack() as stack:
        stack.enter_context(case.inside())
        stack.enter_context(services.servers(project))
        proxies: dict[str, Proxy] = {}
        for name, entry in services.running(project).items():
            proxies[name] = stack.enter_context(Proxy(entry.url))
            services.record(project, name, entry.pid, proxies[name].url, owner=entry.owner)
        yield proxies


# -- a clock that jumps --


def clock(case: Case, moment: float, chance: random.Random) -> Struck:
    """The clock goes a day back or forth at a moment, and some seconds later back again (libfaketime)."""
    jump = chance.choice([-DAY, DAY])
    seconds = chance.uniform(1, 15)
    with Verb(case, "run", "--json", env=fake_clock(case, 0)) as verb:
        until(verb, moment)
        set_clock(case, jump)
        until(verb, seconds, since=time.monotonic())
        set_clock(case, 0)
        verb.wait(LIMIT)
    return Struck((f"{jump / DAY:+.0f} day for {seconds:.1f} s",), spoken(verb))


def fake_clock(case: Case, offset: int) -> dict[str, str]:
    """The environment of processes whose clock `set_clock` sets. Only the calendar's: durations stay true.

    Raises:
        FileNotFoundError: libfaketime is not installed.
    """
    library = next(iter(sorted(Path("/usr/lib").glob(f"*/faketime/{_FAKETIME}"))), None)
    if library is None:
        raise FileNotFoundError(f"{_FAKETIME} is not here (Debian: apt install faketime)")
    set_clock(case, offset)
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(case.folder / "clock"),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "0",
    }


def set_clock(case: Case, offset: int) -> None:
    """Seconds that the clock of the case's processes is off from now on (from a second on, at most)."""
    draft = case.folder / "clock.next"
    draft.write_text(f"{offset:+d}\n", encoding="ascii")
    draft.replace(case.folder / "clock")


# -- when --


def until(verb: Verb, moment: float, *, since: float | None = None) -> None:
    """Waits until `moment` seconds after the verb's start (or `since`), or until it has ended."""
    end = (verb.began if since is None else since) + moment
    while verb.running and time.monotonic() < end:
        time.sleep(0.01)


FAULTS: dict[str, Fault] = {
    "kill one process of run": kill_one,
    "kill all of run": kill_all,
    "kill one process of up": kill_of_up,
    "kill all of up": kill_all_of_up,
    "disk full": disk_full,
    "mlflow away": away("mlflow", "away"),
    "mlflow answers 500": away("mlflow", "failing"),
    "prefect away": away("prefect", "away"),
    "prefect answers 500": away("prefect", "failing"),
    "clock a day off": clock,
}
