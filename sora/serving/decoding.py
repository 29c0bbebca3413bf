"""A small pool of decoding processes (`sora.serving.decoder`), seen from the server.

One that dies, hangs or eats too much is killed and replaced, and costs one request a clear answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sora
from sora.errors import ServiceError, VideoError
from sora.records import ClipSpec
from sora.settings import Serve

BOOT_SECONDS = 60.0  # imports of PyAV and OpenCV on a busy machine
GRACE_SECONDS = 0.5  # a client hung up: so long may its decoder go on before it is killed
_PIPE_BYTES = 4 * 2**20

Spans = list[tuple[float, float]]  # as `sora.video.spans` makes them; importing that would load FFmpeg here
_Answer = tuple[np.ndarray, Spans | None, float]  # clips, their spans, seconds that it took


@dataclass(frozen=True, slots=True)
class Decoded:
    """The clips of one video, `(clips, frames, height, width, rgb) uint8`, and what they cost."""

    clips: np.ndarray
    spans: Spans | None  # of the clips; None where the video says nothing of time
    waited: float  # seconds until a decoder was free
    seconds: float  # seconds that decoding took


class DecodePool:
    """`serve.decode_workers` children. Make one, `await start()`, and `await close()` at the end.

    Arguments:
        settings: limits of the section `serve`.
        folder: the only folder that jobs name files in; also the children's working directory.
    """

    def __init__(self, settings: Serve, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task] = set()
        self._endings: set[asyncio.Task] = set()
        self._closed = False
        self.replaced = 0  # decoders that died or were killed, since the start

    async def start(self) -> None:
        for _ in range(self._settings.decode_workers):
            self._add()

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._endings, *(worker.end() for worker in self._workers), return_exceptions=True)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    async def decode(self, path: Path, spec: ClipSpec, *, on_taken: Callable[[], None] = lambda: None) -> Decoded:
        """All clips of one file. `on_taken` is called when a decoder is free and takes it.

        Raises:
            VideoError: the file is no usable video, is beyond a limit, or its decoder died or took too long.
            ServiceError: no decoder could be started.
        """
        start = asyncio.get_running_loop().time()
        while True:
            worker = await self._idle.get()
            waited = asyncio.get_running_loop().time() - start
            try:
                clips, spans, seconds = await self._with(worker, path, spec, on_taken)
            except _DiedIdle:
                continue
            return Decoded(clips, spans, waited, seconds)

    async def _with(self, worker: _Worker, path: Path, spec: ClipSpec, on_taken: Callable[[], None]) -> _Answer:
        # A task of its own, so that a client that hangs up frees its place at once while the decoder is brought back.
        task = asyncio.create_task(self._exchange(worker, path, spec, on_taken))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            asyncio.get_running_loop().call_later(GRACE_SECONDS, lambda: None if task.done() else worker.kill())
            raise

    async def _exchange(self, worker: _Worker, path: Path, spec: ClipSpec, on_taken: Callable[[], None]) -> _Answer:
        timeout = self._settings.decode_timeout
        healthy = False
        try:
            await worker.ready()
            on_taken()
            try:
                answer = await asyncio.wait_for(worker.ask({"path": str(path), "spec": spec.to_dict()}), timeout)
            except TimeoutError:
                raise VideoError(
                    f"took longer than {timeout:g} s to decode",
                    rule="too_slow",
                    mend="cut the video or scale it down, or have serve.decode_timeout raised",
                ) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise VideoError(
                    "the decoder stopped on this file", rule="unreadable", mend="re-export the video and send it again"
                ) from None
            healthy = not (isinstance(answer, dict) and answer.get("last"))
            if isinstance(answer, dict):
                raise VideoError(answer["message"], rule=answer["rule"], mend=answer["mend"])
            return answer
        finally:
            if healthy and worker.usable:
                self._idle.put_nowait(worker)
            else:
                self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.discard(worker)
        # Nobody waits for this: the answer does not depend on how long the system takes to end a process.
        ending = asyncio.create_task(worker.end())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        if not self._closed:
            self.replaced += 1
            self._add()

    def _add(self) -> None:
        worker = _Worker(self._settings, self._folder)
        self._workers.add(worker)
        self._idle.put_nowait(worker)


class _DiedIdle(Exception):
    """A decoder was gone before it took its job: not the file's fault."""


class _Worker:
    """One child. It starts when made; `ready()` waits until it has its imports."""

    def __init__(self, settings: Serve, folder: Path) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self._booted = asyncio.create_task(self._boot(settings, folder))
        self._booted.add_done_callback(lambda done: done.cancelled() or done.exception())  # `ready()` raises it

    async def _boot(self, settings: Serve, folder: Path) -> None:
        options = {
            "parent": os.getpid(),
            "memory": settings.decode_memory,
            "cpu_seconds": settings.decode_timeout * (os.cpu_count() or 1),
            "limits": settings.file_limits(),
        }
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "sora.serving.decoder", json.dumps(options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_bare_environment(),
            cwd=folder,
            limit=_PIPE_BYTES,
        )
        answer = await asyncio.wait_for(self._read(), BOOT_SECONDS)
        assert answer == {"ready": True}, answer

    async def ready(self) -> None:
        try:
            await asyncio.shield(self._booted)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise ServiceError(
                f"no decoder could be started: {type(error).__name__}: {error}",
                mend="free memory or processes on the server, or raise serve.decode_memory",
            ) from error

    @property
    def usable(self) -> bool:
        """It runs, or is still starting."""
        return not self._booted.done() if self.process is None else self.process.returncode is None

    async def ask(self, job: dict[str, Any]) -> Any:
        """The error as a dict, or an `_Answer`.

        Raises:
            _DiedIdle: it ended before it took the job.
            IncompleteReadError: it ended in the middle.
        """
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            await self.process.stdin.drain()
            await self._read()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise _DiedIdle from error
        return await self._read()

    async def _read(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        (length,) = struct.unpack(">I", await self.process.stdout.readexactly(4))
        header = json.loads(await self.process.stdout.readexactly(length))
        if "shape" not in header:
            return header
        shape = tuple(header["shape"])
        data = await self.process.stdout.readexactly(int(np.prod(shape)))
        spans = header["spans"] and [(start, end) for start, end in header["spans"]]
        return np.frombuffer(data, np.uint8).reshape(shape), spans, float(header["seconds"])

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    async def end(self) -> None:
        self._booted.cancel()
        await asyncio.gather(self._booted, return_exceptions=True)
        self.kill()
        if self.process is not None:
            await self.process.wait()


def _bare_environment() -> dict[str, str]:
    """What Python needs and no more: tokens and addresses of other services stay with the server."""
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
