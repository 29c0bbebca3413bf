"""Requests that arrive together share one compiled call.

A batch waits for nobody: while the model works on one batch, the clips that arrive queue up for the next. So a lone
client loses no time, and many clients fill the batches by themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from sora.core.tensors import Clips
from sora.runtime.predictor import MAX_BATCH, Predictor

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Item:
    predictor: Predictor
    clips: Clips
    answer: asyncio.Future[tuple[np.ndarray, float, float]]
    start: float


@dataclass(frozen=True, slots=True)
class Answered:
    """`probabilities` is `(clips, classes)`; seconds in the queue and in the model."""

    probabilities: np.ndarray
    queued: float
    seconds: float


class Batcher:
    """One model thread and its queue. `await start()`, then `answer` from any task, then `await close()`.

    The queue is bounded where requests are admitted (`context`), not here: each admitted request has at most as many
    entries as there are decoders.
    """

    def __init__(self, on_batch: Callable[[int], None] = lambda size: None) -> None:
        self._waiting: deque[_Item] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._on_batch = on_batch

    async def start(self) -> None:
        self._task = asyncio.create_task(self._work(), name="batcher")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for item in self._waiting:
            item.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self._waiting)

    async def answer(self, predictor: Predictor, clips: Clips) -> Answered:
        """Probabilities of one video's clips from that predictor.

        A long video is sent in portions, one after the other, so that it takes turns with others.
        """
        loop = asyncio.get_running_loop()
        queued = seconds = 0.0
        rows = []
        for first in range(0, len(clips), MAX_BATCH):
            item = _Item(predictor, clips[first : first + MAX_BATCH], loop.create_future(), loop.time())
            self._waiting.append(item)
            self._arrived.set()
            try:
                probabilities, began, ended = await item.answer
            except asyncio.CancelledError:
                if item in self._waiting:  # the client hung up: free its place at once
                    self._waiting.remove(item)
                raise
            queued += began - item.start
            seconds += ended - began
            rows.append(probabilities)
        return Answered(np.concatenate(rows), queued, seconds)

    async def embeddings(self, predictor: Predictor, clips: Clips) -> np.ndarray:
        """The representation of each of one video's clips, `(n, width)`: in portions, between the batches of others."""
        rows = []
        for first in range(0, len(clips), MAX_BATCH):
            some = clips[first : first + MAX_BATCH]
            rows.append(await self.between(partial(predictor.embeddings, some)))
        return np.concatenate(rows)

    async def between(self, function: Callable[[], T]) -> T:
        """Runs `function` in the model thread after the current batch. One at a time: after it comes the next batch."""
        async with self._turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next()
            if not batch:
                self._arrived.clear()
                continue
            clips = Clips.joined([item.clips for item in batch])
            self._on_batch(len(clips))
            began = loop.time()
            try:
                probabilities = await loop.run_in_executor(self._thread, batch[0].predictor.probabilities, clips)
            except asyncio.CancelledError:
                for item in batch:
                    item.answer.cancel()
                raise
            except Exception as error:  # if the model fails, that is the answer to each of them
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            ended = loop.time()
            first = 0
            for item in batch:
                if not item.answer.done():
                    item.answer.set_result((probabilities[first : first + len(item.clips)], began, ended))
                first += len(item.clips)

    def _next(self) -> list[_Item]:
        """The longest-waiting item and those behind it that fit into its batch and ask the same predictor."""
        batch: list[_Item] = []
        room = MAX_BATCH
        for item in list(self._waiting):
            if batch and item.predictor is not batch[0].predictor:
                continue
            if len(item.clips) > room:
                break
            batch.append(item)
            self._waiting.remove(item)
            room -= len(item.clips)
        return batch
