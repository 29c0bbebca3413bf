"""A decoder: `python -m sora.media.decoder OPTIONS`, a confined process that reads one file after another and answers
with its facts or its clips.

It opens strangers' files, so it is the one process that is expected to die. It has no secrets (its environment is
bare), and has hard limits on memory, open files and time. Once its imports are done, `sora.core.sandbox` leaves it
nothing but its descriptors. It ends when its socket does, and is killed with its parent (`sora.media.pool`).

Protocol: a job is one message of JSON, `{"spec", "known"}` for clips or `{}` for facts, on the SOCK_SEQPACKET socket
that is its standard input, with the file's descriptor. An answer, on standard output, is a 4-byte big-endian length, so
many bytes of JSON, and then the bytes of the tensors in C order, in the order in which the JSON names them. The JSON is
`{"facts"}`, `{"tensors": {name: {"dtype", "shape"}}, "spans", "seconds"}` or `{"rule", "message", "fix"}`. The first
answer, `{"ready": true, "lacks": […]}`, comes unasked, and `{"taken": true}` precedes the answer to each job: a decoder
that ends before that was not killed by the job's file. After an answer with `"last": true` the process ends.
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
from typing import Any, BinaryIO, cast

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
    answers = cast(BinaryIO, os.fdopen(os.dup(1), "wb", buffering=0))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a clip at once, not in portions of 64 kB that each wake the parent
            fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, 1 << 20)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    try:
        _work(options, jobs, answers)
    except BrokenPipeError:  # the parent is gone
        os._exit(0)


def _work(options: dict[str, Any], jobs: socket.socket, answers: BinaryIO) -> None:
    # All imports come before the sandbox: afterwards no file can be opened.
    import numpy as np

    from sora.core.records import ClipSpec
    from sora.media import MODALITIES

    reader = MODALITIES[options["modality"]].reader()
    reader.prepare(clips=options["clips"])
    limits = options["limits"]
    lacks = sandbox.confine()
    _answer(answers, {"ready": True, "lacks": lacks})
    while True:
        message, descriptors, _, _ = socket.recv_fds(jobs, JOB_BYTES, 1)
        if not message:
            return
        job = json.loads(message)
        (file,) = descriptors
        _answer(answers, {"taken": True})
        # Processor time limits what wall-clock time does not: threads that spin in parallel.
        most = math.ceil(time.process_time() + options["cpu_seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        start = time.perf_counter()
        answer: dict[str, Any]
        bodies: list[memoryview] = []
        try:
            if options["clips"]:
                known = job["known"] and (int(job["known"][0]), float(job["known"][1]))
                reading = reader.clips(file, ClipSpec.from_dict(job["spec"]), known, limits)
                tensors = {name: np.ascontiguousarray(tensor) for name, tensor in reading.tensors.items()}
                answer = {
                    "tensors": {name: {"dtype": t.dtype.name, "shape": t.shape} for name, t in tensors.items()},
                    "spans": reading.spans,
                    "seconds": time.perf_counter() - start,
                }
                bodies = [tensor.data.cast("B") for tensor in tensors.values()]
            else:
                answer = {"facts": reader.facts(file, limits)}
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
        _answer(answers, answer, *bodies)
        if answer.get("last"):  # the state after a failed allocation is not trusted: a fresh process takes over
            return


def _answer(stream: BinaryIO, header: dict[str, Any], *bodies: memoryview) -> None:
    text = json.dumps(header).encode()
    for part in (memoryview(struct.pack(">I", len(text)) + text), *bodies):
        _write(stream, part)


def _write(stream: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[stream.write(data) :]


if __name__ == "__main__":
    main()
