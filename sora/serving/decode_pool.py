"""A small pool of decoders (`sora.media.decoder`), seen from the server.

A decoder that dies, hangs or uses too much is killed and replaced; only one request gets an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora.config import Serve
from sora.core import sandbox
from sora.core.errors import ServiceError, VideoError
from sora.core.records import RULES, ClipSpec
from sora.core.tensors import Clips
from sora.media import MODALITY, pool
from sora.media.modality import Spans

BOOT_SECONDS = 60.0  # imports of PyAV and OpenCV on a busy machine
GRACE_SECONDS = 0.5  # after a client hung up, its decoder may run this long before it is killed
_PIPE_BYTES = 4 * 2**20

_Answer = tuple[Clips, Spans | None, float]  # the clips, their spans, seconds taken


@dataclass(frozen=True, slots=True)
class Decoded:
    """The clips of one file, and the time that they took."""

    clips: Clips
    spans: Spans | None  # of the clips; None if the video has no times
    waited: float  # seconds until a decoder was free
    seconds: float  # seconds of decoding


class DecodePool:
    """`serve.decode_workers` children. Make a pool, `await start()`, and `await close()` at the end.

    Arguments:
        settings: the limits in the section `serve`.
    """

    def __init__(self, settings: Serve) -> None:
        self._settings = settings
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._endings: set[asyncio.Task[object]] = set()
        self._closed = False
        self.replaced = 0  # decoders that died or were killed, since the start

    async def start(self) -> None:
        sandbox.hide_memory()
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
            VideoError: the file is not a usable video, is beyond a limit, or its decoder died or took too long.
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
        # A separate task, so that a client that hangs up frees its place at once while the decoder is recovered.
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
                answer = await asyncio.wait_for(worker.ask(pool.Job(None, path, spec)), timeout)
            except TimeoutError:
                raise VideoError(
                    f"took longer than {timeout:g} s to decode",
                    rule="too_slow",
                    fix="cut the video, scale it down, or have serve.decode_timeout raised",
                ) from None
            except (asyncio.IncompleteReadError, ConnectionError, ValueError, TypeError, KeyError):  # or nonsense
                raise VideoError(
                    "the decoder failed on this file", rule="unreadable", fix="re-export the video and send it again"
                ) from None
            healthy = not (isinstance(answer, dict) and answer.get("last"))
            if isinstance(answer, dict):
                rule = answer["rule"] if answer["rule"] in RULES else "unreadable"
                raise VideoError(str(answer["message"])[:500], rule=rule, fix=str(answer["fix"])[:500])
            return answer
        finally:
            if healthy and worker.usable:
                self._idle.put_nowait(worker)
            else:
                self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.discard(worker)
        # Nobody waits for this: the answer must not depend on how long the system takes to end a process.
        ending = asyncio.create_task(worker.end())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        if not self._closed:
            self.replaced += 1
            self._add()

    def _add(self) -> None:
        worker = _Worker(self._settings)
        self._workers.add(worker)
        self._idle.put_nowait(worker)


class _DiedIdle(Exception):
    """A decoder died before it took its job: not the file's fault."""


class _Worker:
    """One child. It starts when made; `ready()` waits until its imports are done."""

    def __init__(self, settings: Serve) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self._jobs, self._theirs = pool.socket_pair()
        self._jobs.setblocking(False)
        self._booted = asyncio.create_task(self._boot(pool.Bounds.of_calls(settings)))
        self._booted.add_done_callback(lambda done: done.cancelled() or done.exception())  # `ready()` raises it

    async def _boot(self, bounds: pool.Bounds) -> None:
        with self._theirs:
            self.process = await asyncio.create_subprocess_exec(
                *pool.command(bounds, clips=True),
                stdin=self._theirs.fileno(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=pool.bare_environment(),
                cwd="/",
                limit=_PIPE_BYTES,
            )
        pool.check_ready(await asyncio.wait_for(self._header(), BOOT_SECONDS))

    async def ready(self) -> None:
        try:
            await asyncio.shield(self._booted)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            raise ServiceError(
                f"no decoder could be started: {type(error).__name__}: {error}",
                fix="free memory or processes on the server, or raise serve.decode_memory",
            ) from error

    @property
    def usable(self) -> bool:
        """Whether it is running or still starting."""
        return not self._booted.done() if self.process is None else self.process.returncode is None

    async def ask(self, job: pool.Job[None]) -> dict[str, Any] | _Answer:
        """The error as a dict, or an `_Answer`.

        Raises:
            VideoError: the file does not open.
            _DiedIdle: it ended before it took the job.
            IncompleteReadError: it ended midway.
            ValueError, TypeError, KeyError: its answer is invalid.
        """
        assert self.process is not None and self.process.stdout is not None and job.spec is not None
        file = pool.open_file(job.path)
        try:
            # At once: no other job is running.
            socket.send_fds(self._jobs, [job.message()], [file])
            await self._header()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise _DiedIdle from error
        finally:
            os.close(file)
        header = await self._header()
        if "rule" in header:
            return header
        count = pool.clips_in(header, job.spec)
        clips = Clips(
            {
                name: pool.array(await self.process.stdout.readexactly(count * tensor.bytes), tensor)
                for name, tensor in MODALITY.tensors(job.spec).items()
            }
        )
        spans = header["spans"] and [(float(start), float(end)) for start, end in header["spans"]]
        return clips, spans, float(header["seconds"])

    async def _header(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        (length,) = struct.unpack(">I", await self.process.stdout.readexactly(4))
        if length > pool.HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(await self.process.stdout.readexactly(length))
        if not isinstance(header, dict):
            raise ValueError("not an object")
        return header

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    async def end(self) -> None:
        self._jobs.close()
        self._theirs.close()
        self._booted.cancel()
        await asyncio.gather(self._booted, return_exceptions=True)
        self.kill()
        if self.process is not None:
            await self.process.wait()
