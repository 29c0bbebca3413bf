"""The server follows the champion: it is fetched, verified, loaded, warmed and tested off the request path; then one
reference changes. The previous one stays warm, so that a rollback only moves a pointer.

A version that fails is refused; the refusal is also recorded in the registry, and the served one stays.
If the registry can't be reached, the served one stays too; after a restart it is the cache's last good champion.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Thread
from typing import Any, TypeVar

from sora.core.errors import ServiceError, SoraError
from sora.registry import ChampionRef
from sora.runtime.predictor import ModelRefused, Predictor, prepare_backend
from sora.serving.source import ModelCache, ModelSource

log = logging.getLogger("sora.serving")
T = TypeVar("T")
ASK_SECONDS = 5.0
NOTE_ATTEMPTS = 5  # to record a refusal
LONGEST_WAIT = 10.0  # seconds between attempts while a registry or a version keeps failing


@dataclass(frozen=True, slots=True)
class Served:
    """A champion, ready to answer."""

    champion: ChampionRef
    predictor: Predictor
    since: str  # ISO 8601, UTC: when it was first served


@dataclass(frozen=True, slots=True)
class Refusal:
    champion: ChampionRef
    reason: str
    fix: str
    at: str

    @property
    def note(self) -> str:
        """What is recorded with the version: it says where, since the version may work on another machine."""
        return f"{self.reason} (on {socket.gethostname()}, {self.at}; fix: {self.fix})"


class Follower:
    """Holds the served champion. Read `current` once per request and use only that: it may change at any await.

    Arguments:
        source: asked which version is champion, every `poll_seconds`.
        cache: used if the source can't answer and nothing is served yet; remembers each champion that was served.
        on_change, on_refusal: called in the event loop, for metrics.
    """

    def __init__(
        self,
        source: ModelSource,
        cache: ModelCache,
        poll_seconds: float,
        *,
        on_change: Callable[[Served], None] = lambda served: None,
        on_refusal: Callable[[Refusal], None] = lambda refusal: None,
    ) -> None:
        self._source = source
        self._cache = cache
        self._poll_seconds = poll_seconds
        self._on_change = on_change
        self._on_refusal = on_refusal
        self._task: asyncio.Task[None] | None = None
        self._asking: asyncio.Future[ChampionRef | None] | None = None
        self._notes = _Notes(source.refused)
        self.current: Served | None = None
        self.previous: Served | None = None
        self.refused: Refusal | None = None
        self.problem: str | None = None  # why the last request to the registry, or the last fetch, failed
        self.asked: str | None = None  # when it last answered
        self.none = False  # it answered that there is no champion

    async def start(self) -> None:
        # A daemon thread: the backend's import can't be interrupted, and a stop in between must not wait for it.
        in_thread(prepare_backend).add_done_callback(lambda done: done.cancelled() or done.exception())
        self._task = asyncio.create_task(self._run(), name="follower")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                await self.poll()
                failures = 0 if self.problem is None else failures + 1
            except Exception:  # a dead follower would freeze the version silently
                log.exception("following the champion failed")
                self.problem = "following failed, see the log"
                failures += 1
            await asyncio.sleep(min(self._poll_seconds * 2 ** min(failures, 5), max(LONGEST_WAIT, self._poll_seconds)))

    async def poll(self) -> None:
        """Asks once, and applies the answer. Returns when the champion is served, refused, or not available."""
        try:
            champion = await self._ask()
            self.problem, self.asked, self.none = None, _now(), champion is None
        except SoraError as error:
            self._report(error.message)
            champion = None
        if champion is not None:
            if self.refused and not _same(self.refused.champion, champion):
                self.refused = None  # the alias moved on; if it comes back, the version gets another chance
            await self._follow(champion)
        if self.problem is None:
            self._notes.go_on()
        if self.current is None and not self.none:
            await self._fall_back()

    async def _ask(self) -> ChampionRef | None:
        """The source's answer. A source that hangs counts as silent, and is not asked again until it returns."""
        self._asking = self._asking or asyncio.wrap_future(in_thread(self._source.champion))
        done, _ = await asyncio.wait((self._asking,), timeout=ASK_SECONDS)
        if not done:
            raise ServiceError(f"the registry has not answered for {ASK_SECONDS:g} s", fix="see MLflow's log")
        asking, self._asking = self._asking, None
        return asking.result()

    async def _follow(self, champion: ChampionRef) -> None:
        if self.current and _same(self.current.champion, champion):
            return
        if self.refused and _same(self.refused.champion, champion):
            return
        if self.previous and _same(self.previous.champion, champion):
            self._serve(self.previous.predictor, champion)
            return
        await self._load(self._source, champion)

    async def _fall_back(self) -> None:
        """Nothing is served and the registry does not help: the last champion that was served here."""
        try:
            champion = await asyncio.wrap_future(in_thread(self._cache.champion))
        except SoraError as error:
            self.problem = error.message
            return
        if champion is not None and not (self.refused and _same(self.refused.champion, champion)):
            await self._load(self._cache, champion)

    async def _load(self, source: ModelSource, champion: ChampionRef) -> None:
        def load() -> Predictor:
            model_file, recipe = source.fetch(champion)
            if recipe.model_sha256 != champion.digest:
                raise ModelRefused(
                    f"version {champion.version}: its recipe belongs to other bytes", fix="register the version again"
                )
            predictor = Predictor(model_file, recipe, champion.version)
            predictor.check_golden()
            return predictor

        start = time.perf_counter()
        try:
            predictor = await asyncio.wrap_future(in_thread(load))
        except ModelRefused as error:
            self.refused = Refusal(champion, error.message, error.fix, _now())
            log.error("refused version %s: %s", champion.version, error.message)
            self._notes.add(self.refused)
            self._on_refusal(self.refused)
        except (SoraError, OSError, MemoryError) as error:  # may be temporary: the next poll tries again
            self._report(f"version {champion.version} can't be fetched: {getattr(error, 'message', error)}")
        else:
            # Models and libraries stay in memory: collections that walk through all their objects would delay requests.
            gc.unfreeze()  # the model that is dropped now is garbage with cycles
            gc.collect()
            gc.freeze()
            log.info("loaded version %s in %.1f s", champion.version, time.perf_counter() - start)
            self._serve(predictor, champion)

    def _serve(self, predictor: Predictor, champion: ChampionRef) -> None:
        served = Served(champion, predictor, _now())
        self.previous, self.current = self.current, served
        log.info("serving version %s", champion.version)
        self._on_change(served)
        try:
            self._cache.remember(champion)
        except (SoraError, OSError) as error:  # served anyway; only a restart without a registry would miss it
            log.warning("the cache can't remember version %s: %s", champion.version, error)

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("%s", problem)
        self.problem = problem

    def state(self) -> dict[str, Any]:
        """The state for `/v1/model`."""
        refused = self.refused and {
            "version": self.refused.champion.version,
            "reason": self.refused.reason,
            "fix": self.refused.fix,
            "at": self.refused.at,
        }
        return {
            "registry": "unreachable" if self.problem else "ok" if self.asked else "not asked yet",
            "problem": self.problem,
            "asked": self.asked,
            "refused": refused,
            "previous": self.previous.champion.version if self.previous else None,
        }


class _Notes:
    """Records the last refusal in the background: one attempt at a time, and not forever."""

    def __init__(self, write: Callable[[ChampionRef, str], None]) -> None:
        self._write = write
        self._refusal: Refusal | None = None  # not recorded yet
        self._attempts = 0
        self._writing: tuple[Refusal, Future[None]] | None = None

    def add(self, refusal: Refusal) -> None:
        self._refusal, self._attempts = refusal, 0

    def go_on(self) -> None:
        """Checks how the last attempt went and starts the next. Called after each answered poll."""
        if self._writing is not None:
            refusal, writing = self._writing
            if not writing.done():
                return
            self._writing = None
            error = writing.exception()
            if refusal is self._refusal and (error is None or self._attempts >= NOTE_ATTEMPTS):
                self._refusal = None
                if error is not None:
                    log.warning("the refusal can't be recorded: %s", getattr(error, "message", error))
        if self._refusal is not None:
            refusal = self._refusal
            self._attempts += 1
            self._writing = (refusal, in_thread(lambda: self._write(refusal.champion, refusal.note)))


def _same(one: ChampionRef, other: ChampionRef) -> bool:
    return (one.version, one.digest) == (other.version, other.digest)


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Runs `function` in its own daemon thread: a load that hangs blocks neither the pool nor the exit."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # a caller that stops waiting does not stop the thread

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name=getattr(function, "__name__", "call")).start()
    return future


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
