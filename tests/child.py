"""A child for `test_processes`: does what its job says."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from sora.core.errors import InputError
from sora.core.processes import Emit, child_main


def body(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    print("working", file=sys.stderr, flush=True)
    if job["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["do"] == "refuse":
        raise InputError("not this one", fix="another")
    if job["do"] == "sleep":
        emit({"event": "asleep", "pid": os.getpid()})
        time.sleep(600)
    emit({"event": "half"})
    return {"pid": os.getpid(), "text": job["text"]}


if __name__ == "__main__":
    child_main(body)
