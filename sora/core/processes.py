"""Child processes: quiet environments, children that die with their parent, and children that report as they work.

TensorFlow frees GPU memory only when its process ends, so whatever computes with Keras runs as a child:
`run_child("sora.learning.training", job, on_event)`. The child reads the job (a line of JSON) from its standard input,
writes one JSON object per line to the descriptor that SORA_EVENTS names, and ends with {"event": "result", …} or
{"event": "error", …}.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sora.core.errors import DiskFull, ServiceError, SoraError

Event = dict[str, Any]  # what a child says while it works, as JSON: its kind is at "event"
Emit = Callable[[Event], None]
# Turns off every dependency's telemetry, and chatter on standard output.
QUIET_ENV = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
_PR_SET_PDEATHSIG = 1


def quiet_environment(**more: str) -> dict[str, str]:
    """This process's environment with telemetry off. The user's own settings stay."""
    return {**QUIET_ENV, **os.environ, **more}


# What TensorFlow's libraries print while they are imported, whatever their log level.
_NOISE = (
    *(b"absl::InitializeLog", b"port.cc", b"cudart_stub.cc", b"cuda_platform.cc", b"cpu_feature_guard.cc"),
    b"rebuild TensorFlow with",  # the second line of the last
)


@contextmanager
def without_noise() -> Iterator[None]:
    """Holds back standard error (the descriptor), and at the end prints what is not TensorFlow's `_NOISE`."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            kept = b"".join(line for line in held if not any(noise in line for noise in _NOISE))
            while kept:
                kept = kept[os.write(2, kept) :]


def die_with_parent() -> None:
    """In a child: makes the kernel kill it when the parent ends, however it ends (Linux; elsewhere does nothing).

    A training child that outlived its parent would hold the GPU past the lease on it.
    """
    die_with(os.getppid())


def die_with(parent: int) -> None:
    """`die_with_parent` for a child that knows its parent's id: it also ends if the parent has already ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def start_child(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` with a quiet environment, for a process that dies with this one."""
    options.setdefault("env", quiet_environment())
    return subprocess.Popen(command, preexec_fn=die_with_parent, **options)


class Child:
    """`python -m MODULE`, whose main is `child_main`: does one job. It can get ready while it waits for the job.

    A context manager: it is ended with the block.

    Args:
        log: receives its output, if that must be kept.
    """

    def __init__(self, module: str, *, log: Path | None = None, env: dict[str, str] | None = None) -> None:
        self._module = module
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        self._output: IO[bytes] = log.open("a+b") if log is not None else tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        try:
            self._process = start_child(
                [sys.executable, "-m", module],
                env=quiet_environment(SORA_EVENTS=str(write), PYTHONUNBUFFERED="1", **(env or {})),
                pass_fds=(write,),
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
            )
        except BaseException:
            self._output.close()
            os.close(read)
            raise
        finally:
            os.close(write)
        self._events = os.fdopen(read, encoding="utf-8")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._events.close()
        self._output.close()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def result(self, job: dict[str, Any], on_event: Emit = lambda event: None) -> dict[str, Any]:
        """Gives it the job, waits, and returns its result event.

        Raises:
            SoraError: what the child reported, of the class that it reported.
            ServiceError: it ended without a result (killed, crashed); the message holds the end of its output.
        """
        with contextlib.suppress(BrokenPipeError):  # it has already ended: the missing result shows that
            self._stdin.write(json.dumps(job).encode() + b"\n")
            self._stdin.flush()
        result: dict[str, Any] | None = None
        for line in self._events:
            event = json.loads(line)
            if event["event"] in ("result", "error"):
                result = event
            else:
                on_event(event)
        code = self._process.wait()
        if result is None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            raise ServiceError(
                f"{self._module} {how} before it had a result\n{self._tail()}",
                fix="run the same command again: it resumes",
            )
        if result["event"] == "error":
            raise rebuild_error(result)
        return result

    def _tail(self) -> str:
        """The end of what it printed."""
        self._output.seek(0)
        return "\n".join(self._output.read().decode("utf-8", "replace").splitlines()[-15:])


def run_child(
    module: str,
    job: dict[str, Any],
    on_event: Emit = lambda event: None,
    *,
    log: Path | None = None,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A `Child`'s result of a job; raises what `Child.result` does."""
    with Child(module, log=log, env=env) as child:
        return child.result(job, on_event)


def error_event(error: SoraError | OSError) -> Event:
    """What a child reports to its parent about an error; `rebuild_error` makes it an error again."""
    if isinstance(error, SoraError):
        kind, message, fix = type(error).__name__, error.message, error.fix
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(Path.cwd()).free
        kind, message = DiskFull.__name__, f"{error} ({free:,} bytes free)"
        fix = "make room (`sora gc --dry-run` shows what can go) and run again"
    else:
        kind, message, fix = ServiceError.__name__, str(error), ""
    return {"event": "error", "kind": kind, "message": message, "fix": fix, "rule": getattr(error, "rule", None)}


def rebuild_error(event: Event) -> SoraError:
    """The error that `error_event` described, of its class."""
    import sora.core.errors

    kind = getattr(sora.core.errors, event["kind"], ServiceError)
    options = {"rule": event["rule"]} if event.get("rule") else {}
    return kind(event["message"], fix=event.get("fix", ""), **options)


def child_main(body: Callable[[dict[str, Any], Emit], dict[str, Any]]) -> None:
    """The other end of a `Child`: calls `body(job, emit)` with its job and reports what it returned or raised."""
    die_with_parent()
    line = sys.stdin.readline()
    if not line:  # there is no job after all
        return
    job = json.loads(line)
    stream = os.fdopen(int(os.environ["SORA_EVENTS"]), "w", encoding="utf-8", buffering=1)

    def emit(event: Event) -> None:
        stream.write(json.dumps(event) + "\n")

    try:
        emit({**body(job, emit), "event": "result"})
    except (SoraError, OSError) as error:
        emit(error_event(error))
        sys.exit(error.exit_code if isinstance(error, SoraError) else 3)
