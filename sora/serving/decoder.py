"""The decoding child: `python -m sora.serving.decoder OPTIONS`. Turns one uploaded file after another into clips.

It opens strangers' files, so it is the one process that is expected to die: it holds no secret (its environment is
bare), can't write a file, and has hard limits on memory, open files and time. It ends when its standard input does,
and is killed with its parent.

Protocol, on standard input and output: a job is one JSON line `{"path", "spec"}`; an answer is a 4-byte big-endian
length, so many bytes of JSON `{"shape", "spans", "seconds"}` or `{"rule", "message", "mend"}`, then the clips' bytes in
C order. The first answer, `{"ready": true}`, comes unasked, and each job's is preceded by `{"taken": true}`: a child
that ends before that was not ended by the job's file. One with `"last": true` is followed by the end of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from sora.errors import SoraError, VideoError

OPEN_FILES = 64


def main() -> None:
    options = json.loads(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != options["parent"]:  # it ended before the call
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the server decides
    _confine(options["memory"])
    # FFmpeg and OpenCV may print; nothing but answers goes to the pipe.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a clip at once, not in portions of 64 kB that each wake the server
            fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, 1 << 20)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        _work(options, answers)
    except BrokenPipeError:  # the server went away
        os._exit(0)


def _work(options: dict[str, Any], answers: Any) -> None:
    import numpy as np

    from sora.records import ClipSpec
    from sora.video.decode import Limits
    from sora.video.spans import prepare_with_spans

    limits = Limits(**options["limits"])
    _answer(answers, {"ready": True})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        _answer(answers, {"taken": True})
        # Processor time bounds what a hung read of wall-clock time does not: threads that spin beside each other.
        used = time.process_time()
        most = int(used + options["cpu_seconds"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        start = time.perf_counter()
        try:
            clips, spans = prepare_with_spans(Path(job["path"]), ClipSpec.from_dict(job["spec"]), limits=limits)
        except VideoError as error:
            _answer(answers, {"rule": error.rule, "message": error.message, "mend": error.mend})
        except SoraError as error:
            _answer(answers, {"rule": "unreadable", "message": error.message, "mend": error.mend})
        except (MemoryError, OSError) as error:  # PyAV's errors are OSErrors too; out of memory is one of them
            _answer(
                answers,
                {
                    "rule": "unreadable",
                    "message": f"can't be decoded within this server's memory and files: {type(error).__name__}",
                    "mend": "send a smaller picture or re-export the video",
                    "last": True,
                },
            )
            return  # what a failed allocation left behind is not trusted: a fresh process takes over
        else:
            clips = np.ascontiguousarray(clips)
            header = {"shape": clips.shape, "spans": spans, "seconds": time.perf_counter() - start}
            _answer(answers, header, clips.data.cast("B"))


def _confine(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if sys.platform == "linux":
        # A full machine should lose a decoder before it loses the server.
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")


def _answer(stream: Any, header: dict[str, Any], body: memoryview | None = None) -> None:
    text = json.dumps(header).encode()
    _write(stream, memoryview(struct.pack(">I", len(text)) + text))
    if body is not None:
        _write(stream, body)


def _write(stream: Any, data: memoryview) -> None:
    while data:
        data = data[stream.write(data) :]


if __name__ == "__main__":
    main()
