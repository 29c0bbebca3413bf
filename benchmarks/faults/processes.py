"""The processes of one case: started with a mark, found again whatever they became, ended without exception."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.common import SORA
from sora.core.processes import start_child

MARK = "SORA_FAULTS_CASE"
# Role → what its command line holds. The first that fits names the process.
_ROLES = (
    ("prefect", ("flows.server:",)),
    ("mlflow", ("sora.registry.server:",)),
    ("worker", ("flows.worker", "prefect worker start")),
    ("flow run", ("prefect.engine", "prefect flow-run execute", "prefect.flow_engine")),
    ("training", ("sora.learning.training",)),
    ("evaluation", ("sora.judging.evaluation",)),
    ("smoke", ("sora.runtime.smoke",)),
    ("decoder", ("sora.media.decoder",)),
    ("api", ("sora.cli serve",)),
    ("up", ("sora.cli up",)),
    ("run", ("sora.cli run",)),
    ("stage", ("sora.stages",)),
    ("dvc", ("-m dvc", "bin/dvc")),
    ("pool", ("multiprocessing.spawn", "multiprocessing.resource_tracker")),
)


class Case:
    """A folder of one case: `project/`, `tmp/` (its temporary folder), `out/` (what commands printed)."""

    def __init__(self, folder: Path, out: Path | None = None) -> None:
        self.folder = folder
        self.root = folder / "project"
        self.temporary = folder / "tmp"
        self.out = out or folder / "out"
        for one in (self.temporary, self.out):
            one.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """For everything of this case: a mark to find it by, and temporary and cache folders of its own."""
        return {
            **os.environ,
            MARK: str(self.folder),
            "TMPDIR": str(self.temporary),
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
        }

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This process, too, works with the case's environment: for Sora's functions that are called here."""
        mine, before = self.environment(), dict(os.environ)
        os.environ.update(mine)
        tempfile.tempdir = None
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
            tempfile.tempdir = None

    def processes(self) -> list[psutil.Process]:
        """Every living process of the case but this one: by its mark, its folder or its command line."""
        here = str(self.folder)
        return [one for one in psutil.process_iter() if one.pid != os.getpid() and _belongs(one, here)]

    def role(self, name: str) -> list[psutil.Process]:
        return [one for one in self.processes() if role_of(one) == name]

    def end(self) -> None:
        """Kills what is left, until nothing is."""
        for _ in range(50):
            left = self.processes()
            if not left:
                return
            kill(left)
            time.sleep(0.1)  # not psutil's wait: it would take the exit codes of our own children


def _belongs(process: psutil.Process, folder: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.Error:
        return False
    with suppress(psutil.Error):
        if process.environ().get(MARK) == folder:
            return True
    with suppress(psutil.Error):
        if f"{process.cwd()}/".startswith(f"{folder}/"):
            return True
    with suppress(psutil.Error):
        return any(f"{folder}/" in f"{word}/" for word in process.cmdline())
    return False


def role_of(process: psutil.Process) -> str:
    """What the process does, in a word; its program's name where nobody knows it."""
    try:
        return role_in(process.cmdline()) or str(process.name())
    except psutil.Error:
        return "gone"


def role_in(command: Sequence[str]) -> str | None:
    """The role of a process with this command line; None if nobody knows it."""
    line = " ".join(command)
    return next((name for name, words in _ROLES if any(word in line for word in words)), None)


def kill(processes: Sequence[psutil.Process], number: int = signal.SIGKILL) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


class Verb:
    """`sora ARGUMENTS` in a case's project, under way. A context manager: nothing of it outlives the block."""

    def __init__(
        self, case: Case, *arguments: str, before: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.case = case
        self.arguments = arguments
        self.began = time.monotonic()
        number = len(list(case.out.iterdir())) // 2
        self._out, self._err = case.out / f"{number:02d}.out", case.out / f"{number:02d}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = start_child(
                [*before, *SORA, *arguments],
                cwd=case.root,
                env={**case.environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> Verb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float) -> int | None:
        """The exit code. Negative: the signal that killed it. None: it is still under way."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode

    def wait_for(self, role: str, seconds: float) -> psutil.Process:
        """The first process of this role. Asks often: some live for a second.

        Raises:
            AssertionError: the verb ended, or the time is over.
        """
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            found = self.case.role(role)
            if found:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"no {role} was seen; `sora {' '.join(self.arguments)}` said:\n{self.err[-3000:]}")

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def json(self) -> Any:
        return json.loads(self.out)


def sora(case: Case, *arguments: str, seconds: float, **options: Any) -> Verb:
    """A verb that has ended."""
    with Verb(case, *arguments, **options) as verb:
        verb.wait(seconds)
    return verb
