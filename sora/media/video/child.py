"""The decoding child: `python -m sora.media.video.child OPTIONS`. Tells one file after another its facts or its clips.

It opens strangers' files, so it is the one process that is expected to die: it holds no secret (its environment is
bare), has hard limits on memory, open files and time. Once it has its imports, `sora.core.sandbox` leaves it nothing
but its descriptors. It ends when its socket does, and is killed with its parent.

Protocol: a job is one message of JSON, `{"spec", "known"}` for clips or `{}` for facts, on the SOCK_SEQPACKET socket
that is its standard input, with the file's descriptor. An answer, on standard output, is a 4-byte big-endian length, so
many bytes of JSON, `{"facts"}`, `{"shape", "spans", "seconds"}` or `{"rule", "message", "fix"}`, then the clips' bytes
in C order. The first answer, `{"ready": true, "lacks": […]}`, comes unasked, and each job's is preceded by
`{"taken": true}`: a child that ends before that was not ended by the job's file. One with `"last": true` is followed by
the end of the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict
from typing import Any

from sora.core import sandbox
from sora.core.errors import SoraError, VideoError
from sora.core.processes import die_with

JOB_BYTES = 64 * 1024


def main() -> None:
    options = json.loads(sys.argv[1])
    die_with(options["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the parent decides
    sandbox.limit(options["memory"])
    jobs = socket.socket(fileno=os.dup(0))
    # FFmpeg and OpenCV may print; nothing but answers goes to the pipe.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a clip at once, not in portions of 64 kB that each wake the parent
            fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, 1 << 20)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    try:
        _work(options, jobs, answers)
    except BrokenPipeError:  # the parent went away
        os._exit(0)


def _work(options: dict[str, Any], jobs: socket.socket, answers: Any) -> None:
    # All imports come before the sandbox: afterwards none finds its file.
    import numpy as np

    from sora.core.records import ClipSpec
    from sora.media.video import decode

    decode.import_all()
    if options["clips"]:
        from sora.media.video.spans import prepare_with_spans
    limits = decode.Limits(**options["limits"])
    lacks = sandbox.confine()
    _answer(answers, {"ready": True, "lacks": lacks})
    while True:
        message, descriptors, _, _ = socket.recv_fds(jobs, JOB_BYTES, 1)
        if not message:
            return
        job = json.loads(message)
        (file,) = descriptors
        _answer(answers, {"taken": True})
        # Processor time bounds what a hung read of wall-clock time does not: threads that spin beside each other.
        most = math.ceil(time.process_time() + options["cpu_seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        start = time.perf_counter()
        answer: dict[str, Any]
        body: memoryview | None = None
        try:
            if options["clips"]:
                known = job["known"] and (int(job["known"][0]), float(job["known"][1]))
                spec = ClipSpec.from_dict(job["spec"])
                clips, spans = prepare_with_spans(file, spec, known=known, limits=limits)
                clips = np.ascontiguousarray(clips)
                answer = {"shape": clips.shape, "spans": spans, "seconds": time.perf_counter() - start}
                body = clips.data.cast("B")
            else:
                answer = {"facts": asdict(decode.inspect(file, limits))}
        except VideoError as error:
            answer = {"rule": error.rule, "message": error.message, "fix": error.fix}
        except SoraError as error:
            answer = {"rule": "unreadable", "message": error.message, "fix": error.fix}
        except MemoryError:  # also PyAV's
            answer = {
                "rule": "too_large",
                "message": f"needs more memory than the {options['memory']:,} bytes that a decoder has",
                "fix": "use a smaller picture",
                "last": True,
            }
        except OSError as error:  # PyAV's errors are OSErrors too
            answer = {
                "rule": "unreadable",
                "message": f"can't be decoded within a decoder's rights: {type(error).__name__}",
                "fix": "re-export the video",
                "last": True,
            }
        finally:
            os.close(file)
        _answer(answers, answer, body)
        if answer.get("last"):  # what a failed allocation left behind is not trusted: a fresh process takes over
            return


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
