"""Child processes: quiet environments, children that die with their parent, and children that report as they work.

TensorFlow gives GPU memory back only when its process ends, so whatever computes with Keras runs as a child:
`run_child("sora.training", job, on_event)`. The child reads the job (JSON) from the file that its first argument
names, writes one JSON object a line to the descriptor that SORA_EVENTS names, and ends with {"event": "result", …}
or {"event": "error", …}.
"""

from __future__ import annotations

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
from typing import Any

from sora.errors import DiskFull, ServiceError, SoraError

# Telemetry of every dependency off, and no chatter on standard output.
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
    """This process's environment with telemetry off. What the user set stays as set."""
    return {**QUIET_ENV, **os.environ, **more}


# What TensorFlow's libraries write while they are imported, whatever the level of their log.
_NOISE = (b"absl::InitializeLog", b"port.cc", b"cudart_stub.cc", b"cuda_platform.cc", b"cpu_feature_guard.cc")


@contextmanager
def without_noise() -> Iterator[None]:
    """Holds standard error back, descriptor and all, and lets through at the end what is not TensorFlow's `_NOISE`."""
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
    """In a child: be killed when the parent ends, however it ends (Linux; elsewhere nothing happens).

    A training child that outlived its parent would hold the GPU past the lease on it.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)


def start_child(command: list[str], **options: Any) -> subprocess.Popen:
    """`subprocess.Popen` with a quiet environment, of a process that dies with this one."""
    options.setdefault("env", quiet_environment())
    return subprocess.Popen(command, preexec_fn=die_with_parent, **options)


def run_child(
    module: str,
    job: dict[str, Any],
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    *,
    log: Path | None = None,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `python -m MODULE JOBFILE` and returns its result event.

    Raises:
        SoraError: what the child reported, of the class that it reported.
        ServiceError: the child ended without a result (killed, crashed); the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="sora-job-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        output = log or Path(folder) / "output.log"
        output.parent.mkdir(parents=True, exist_ok=True)
        read, write = os.pipe()
        result: dict[str, Any] | None = None
        with output.open("ab") as sink:
            child = start_child(
                [sys.executable, "-m", module, str(job_file)],
                env=quiet_environment(SORA_EVENTS=str(write), PYTHONUNBUFFERED="1", **(env or {})),
                pass_fds=(write,),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
            os.close(write)
            try:
                with os.fdopen(read, encoding="utf-8") as events:
                    for line in events:
                        event = json.loads(line)
                        if event["event"] in ("result", "error"):
                            result = event
                        else:
                            on_event(event)
                code = child.wait()
            except BaseException:
                child.terminate()
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                raise
        if result is None:
            tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            raise ServiceError(
                f"{module} {how} before it had a result\n{tail}", mend="run the same command again: it resumes"
            )
        if result["event"] == "error":
            raise rebuild_error(result)
        return result


def error_event(error: SoraError | OSError) -> dict[str, Any]:
    """What a child tells its parent about an error; `rebuild_error` makes it an error again."""
    if isinstance(error, SoraError):
        kind, message, mend = type(error).__name__, error.message, error.mend
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(Path.cwd()).free
        kind, message = DiskFull.__name__, f"{error} ({free:,} bytes free)"
        mend = "make room (`sora gc --dry-run` shows what can go) and run again"
    else:
        kind, message, mend = ServiceError.__name__, str(error), ""
    return {"event": "error", "kind": kind, "message": message, "mend": mend, "rule": getattr(error, "rule", None)}


def rebuild_error(event: dict[str, Any]) -> SoraError:
    """The error that `error_event` described, of its class."""
    import sora.errors

    kind = getattr(sora.errors, event["kind"], ServiceError)
    options = {"rule": event["rule"]} if event.get("rule") else {}
    return kind(event["message"], mend=event.get("mend", ""), **options)


def child_main(body: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]) -> None:
    """The other end of `run_child`: calls `body(job, emit)` and reports what it returned or raised."""
    die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    stream = os.fdopen(int(os.environ["SORA_EVENTS"]), "w", encoding="utf-8", buffering=1)

    def emit(event: dict[str, Any]) -> None:
        stream.write(json.dumps(event) + "\n")

    try:
        emit({**body(job, emit), "event": "result"})
    except (SoraError, OSError) as error:
        emit(error_event(error))
        sys.exit(error.exit_code if isinstance(error, SoraError) else 3)
