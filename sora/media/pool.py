"""Decodes files in parallel with `sora.media.decoder` (confined processes); a crash costs one file.

A file is opened here and handed over as a descriptor. Facts and clips come back as JSON and bytes, never as pickles,
and are checked: a stranger's file may have taken over the decoder. Every decoder holds one file at a time, stays for
the next one, and dies with this process.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import sora
from sora.config import Serve, Validate
from sora.core import sandbox
from sora.core.errors import ServiceError, VideoError
from sora.core.records import RULES, ClipSpec
from sora.core.tensors import Clips, TensorSpec
from sora.media import MODALITY, Modality
from sora.media.modality import Known

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")

BOOT_SECONDS = 120.0  # imports of PyAV and OpenCV on a busy machine
HEADER_BYTES = 1 << 20
PATIENCE = 4  # a file may take this many times its processor time by the clock
_REST_SECONDS = 60.0  # from an answer's first byte to its last
log = logging.getLogger("sora")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a file may cost: the fields of `sora.media.video.ffmpeg.Limits`, bytes of memory, and seconds."""

    limits: dict[str, Any]
    memory: int
    cpu_seconds: float
    seconds: float  # by the clock

    @classmethod
    def of_data(cls, settings: Validate) -> Bounds:
        """For the project's own footage."""
        spent = settings.max_decode_seconds
        return cls(settings.file_limits(), settings.decode_memory, spent, max(60.0, PATIENCE * spent))

    @classmethod
    def of_calls(cls, settings: Serve) -> Bounds:
        """For files sent for prediction."""
        spent = settings.decode_timeout
        cores = os.cpu_count() or 1  # a server adds its own limit by the clock
        return cls(settings.file_limits(), settings.decode_memory, spent * cores, max(60.0, PATIENCE * spent))


@dataclass(frozen=True, slots=True)
class Job(Generic[Item]):
    """One file to decode, and the caller's key for it. Without a `spec` its facts are wanted."""

    item: Item
    path: Path
    spec: ClipSpec | None = None
    known: Known | None = None  # from the manifest

    def message(self) -> bytes:
        return json.dumps({"spec": self.spec.to_dict(), "known": self.known} if self.spec else {}).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """A decoder's answer: JSON and, for a job for clips, their number and the bytes of each tensor."""

    header: dict[str, Any]
    clips: int = 0
    bodies: Mapping[str, bytearray] = field(default_factory=dict)


class Crashed(VideoError):
    """The decoder died: because of the file, or of the machine."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(paths: Iterable[Path], spec: ClipSpec, bounds: Bounds) -> Generator[Clips | VideoError, None, None]:
    """Each file's clips, in the order given, by one decoder.

    Raises:
        ServiceError: it can't be started.
    """
    expected = MODALITY.tensors(spec)
    jobs = (Job(None, path, spec) for path in paths)
    with closing(each(jobs, bounds, clips=True, workers=1)) as answers:
        for _, answer in answers:
            if isinstance(answer, VideoError):
                yield answer
            else:
                yield Clips({name: array(body, expected[name]) for name, body in answer.bodies.items()})


def array(body: bytes | bytearray, tensor: TensorSpec) -> np.ndarray:
    """The bytes of a tensor as an array whose first dimension is the clips."""
    import numpy as np

    return np.frombuffer(body, tensor.dtype).reshape(-1, *tensor.shape)


def command(bounds: Bounds, clips: bool, modality: Modality = MODALITY) -> list[str]:
    """Starts a decoder; its standard input must be a `socket_pair`'s other end, its standard output a pipe."""
    options = {
        "parent": os.getpid(),
        "modality": modality.name,
        "clips": clips,
        "memory": bounds.memory,
        "cpu_seconds": bounds.cpu_seconds,
        "limits": bounds.limits,
    }
    return [sys.executable, "-P", "-m", "sora.media.decoder", json.dumps(options)]


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """(ours, the decoder's) ends of the socket for jobs."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def bare_environment() -> dict[str, str]:
    """Only what Python needs: tokens and addresses of other services stay in this process."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        **keep,
        "PYTHONPATH": str(Path(sora.__file__).resolve().parents[1]),
        # One thread each and few arenas: address space is limited.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OPENCV_FOR_THREADS_NUM": "1",
        "MALLOC_ARENA_MAX": "2",
    }


def open_file(path: Path) -> int:
    """A descriptor of a regular file (not a link) to hand to a decoder.

    Raises:
        VideoError: not_a_video, unreadable.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
    except OSError as error:
        raise VideoError(
            f"can't be opened: {error.strerror}", rule="unreadable", fix="give yourself the right to read it"
        ) from error
    os.close(file)
    raise VideoError("no regular file", rule="not_a_video", fix=RULES["not_a_video"])


def check_ready(answer: dict[str, Any]) -> None:
    """Reads a decoder's first answer. Warns once per process about what the kernel could not forbid.

    Raises:
        ServiceError: it is not such an answer.
    """
    if answer.get("ready") is not True:
        raise ServiceError("a decoder's first answer was invalid", fix="run `sora doctor`")
    if answer.get("lacks"):
        _say_lacking(", ".join(map(str, answer["lacks"])))


@cache
def _say_lacking(what: str) -> None:
    log.warning("decoders are only partly confined: this machine lacks %s; see `sora doctor`", what)


def clips_in(header: dict[str, Any], spec: ClipSpec, modality: Modality = MODALITY) -> int:
    """How many clips follow an answer. Their tensors are those of `modality.tensors(spec)`, in its order.

    Raises:
        ValueError: other tensors than clips of this spec have, or more clips than a file can have.
    """
    tensors, expected = header.get("tensors"), modality.tensors(spec)
    if not isinstance(tensors, dict) or list(tensors) != list(expected):
        raise ValueError(f"tensors {str(tensors)[:100]}")
    counts = []
    for name, tensor in expected.items():
        one = tensors[name]
        shape = one.get("shape") if isinstance(one, dict) else None
        if not isinstance(shape, list) or shape[1:] != list(tensor.shape) or one.get("dtype") != tensor.dtype:
            raise ValueError(f"a tensor {name!r} of {str(one)[:100]}")
        counts.append(shape[0])
    most = spec.max_clips if spec.sampling == "window" else 1
    count = counts[0]
    if type(count) is not int or not 1 <= count <= most or counts != [count] * len(counts):
        raise ValueError(f"{str(counts)[:100]} clips")
    return count


class Decoder:
    """One decoder, started when made. `usable` says whether it takes another file; `end()` it."""

    def __init__(self, bounds: Bounds, *, clips: bool, modality: Modality = MODALITY) -> None:
        sandbox.hide_memory()
        self._bounds, self._modality = bounds, modality
        self._job: Job[Any] | None = None
        self._deadline = time.monotonic() + BOOT_SECONDS
        self.started = self._taken = False
        self.usable = True
        self._jobs, theirs = socket_pair()
        try:
            self._process = subprocess.Popen(
                command(bounds, clips, modality), env=bare_environment(), cwd="/",
                stdin=theirs.fileno(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            self._jobs.close()
            raise ServiceError(f"no decoder could be started: {error}", fix="free memory or processes") from error
        finally:
            theirs.close()
        assert self._process.stdout is not None
        self.pipe = self._process.stdout.fileno()

    @property
    def busy(self) -> bool:
        return self._job is not None

    @property
    def remaining(self) -> float:
        """Seconds until the file has taken too long."""
        return max(0.0, self._deadline - time.monotonic())

    def give(self, job: Job[Any]) -> None:
        """
        Raises:
            VideoError: the file does not open; the decoder is still free.
        """
        file = open_file(job.path)
        try:
            socket.send_fds(self._jobs, [job.message()], [file])
        except (BrokenPipeError, ConnectionError):
            pass  # it died: its pipe will show that next
        finally:
            os.close(file)
        self._job = job
        if self.started:
            self._deadline = time.monotonic() + self._bounds.seconds

    def take(self) -> Answer | None:
        """Its answer, once its pipe can be read or its time is up. None: nothing about its file yet.

        Raises:
            VideoError: the file is not a usable video, is beyond a bound, or killed the decoder (`Crashed`).
            ServiceError: the decoder did not start.
        """
        try:
            header = self._header()
            if not self.started:
                check_ready(header)
                self.started, self._deadline = True, time.monotonic() + self._bounds.seconds
                return None
            if not self._taken:
                self._taken = True
                return None
            job, answer = self._job, Answer(header)
            assert job is not None
            if "rule" in header:
                raise VideoError(
                    str(header["message"])[:500],
                    rule=header["rule"] if header["rule"] in RULES else "unreadable",
                    fix=str(header["fix"])[:500],
                )
            if job.spec is not None:
                answer = self._clips(header, job.spec)
            self._free(usable=True)
            return answer
        except VideoError:
            self._free(usable=not header.get("last"))
            raise
        except TimeoutError:
            self._free(usable=False)
            raise self._slow() from None
        except EOFError:
            how = self._died()
            self._free(usable=False)
            if not self.started:
                raise ServiceError(
                    f"a decoder {how} before it was ready",
                    fix="free memory, raise decode_memory, or run `sora doctor`",
                ) from None
            if how.endswith("(SIGXCPU)"):
                raise self._slow() from None
            raise Crashed(f"it {how}", rule="unreadable", fix=RULES["unreadable"]) from None
        except (ValueError, TypeError, KeyError) as error:  # its answer is invalid
            self._free(usable=False)
            raise Crashed(f"it answered nonsense: {error}", rule="unreadable", fix=RULES["unreadable"]) from error

    def _clips(self, header: dict[str, Any], spec: ClipSpec) -> Answer:
        count, until = clips_in(header, spec, self._modality), time.monotonic() + _REST_SECONDS
        bodies = {}
        for name, tensor in self._modality.tensors(spec).items():
            bodies[name] = bytearray(count * tensor.bytes)
            self._fill(memoryview(bodies[name]), until)
        return Answer(header, count, bodies)

    def end(self) -> None:
        self.usable = False
        self._jobs.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _free(self, *, usable: bool) -> None:
        self._job, self._taken = None, False
        if not usable:
            self.end()

    def _died(self) -> str:
        """How the process ended by itself."""
        try:
            code = self._process.wait(10)  # the pipe closes a moment before the process is gone
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"

    def _slow(self) -> VideoError:
        bounds = self._bounds
        return VideoError(
            f"takes more than {bounds.cpu_seconds:g} s of processor time, or {bounds.seconds:g} s, to decode",
            rule="too_slow",
            fix=RULES["too_slow"],
        )

    def _header(self) -> dict[str, Any]:
        if not wait([self.pipe], self.remaining):
            raise TimeoutError
        until = time.monotonic() + _REST_SECONDS
        length = bytearray(4)
        self._fill(memoryview(length), until)
        (size,) = struct.unpack(">I", length)
        if size > HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        text = bytearray(size)
        self._fill(memoryview(text), until)
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        return header

    def _fill(self, target: memoryview, until: float) -> None:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self.pipe, select.POLLIN)
        while target:
            if not poll.poll(max(0, until - time.monotonic()) * 1000):
                raise TimeoutError
            count = self._process.stdout.readinto(target)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            target = target[count:]


def each(
    jobs: Iterable[Job[Item]], bounds: Bounds, *, clips: bool, workers: int = 0, modality: Modality = MODALITY
) -> Generator[tuple[Job[Item], Answer | VideoError], None, None]:
    """Yields each job with its answer, or with the reason why there is none, as soon as it is ready.

    Jobs are taken one by one as decoders become free; with one worker, answers come in the order of the jobs. Decoders
    start as jobs arrive, and end at once when the generator is closed (put it into `contextlib.closing`).

    Args:
        clips: whether the jobs ask for clips; otherwise all ask for facts.
        workers: decoders; 0: one per core.
        modality: the kind of the files.

    Raises:
        ServiceError: decoders can't start.
    """
    source = iter(jobs)
    staff: list[Decoder] = []
    held: dict[Decoder, Job[Item]] = {}
    try:
        while True:
            idle = [decoder for decoder in staff if not decoder.busy]
            while idle or len(staff) < (workers or cores()):
                try:
                    job = next(source)
                except StopIteration:
                    break
                if not idle:
                    idle.append(Decoder(bounds, clips=clips, modality=modality))
                    staff += idle
                try:
                    idle[-1].give(job)
                except VideoError as error:
                    yield job, error
                    continue
                held[idle.pop()] = job
            if not held:
                return
            soonest = min(decoder.remaining for decoder in held)
            ready = set(wait([decoder.pipe for decoder in held], soonest))
            for decoder in [one for one in held if one.pipe in ready or not one.remaining]:
                answer: Answer | VideoError | None
                try:
                    answer = decoder.take()
                except VideoError as error:
                    answer = error
                if not decoder.usable:
                    staff.remove(decoder)
                if answer is not None:
                    yield held.pop(decoder), answer
    finally:
        for decoder in staff:
            decoder.end()
