"""A function over many items in processes side by side, where a crash costs one item.

`concurrent.futures` gives up all pending work when one process dies and does not tell which item killed it. Here every
process holds one item at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from sora.errors import ServiceError
from sora.processes import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int = 0,
    crashed: Callable[[Item, str], Result] | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields (item, function(item)) as they are ready. Items are taken one by one as processes become free.

    Processes start as items come, die with this one, and end at once when the generator is closed
    (put it into `contextlib.closing`).

    Args:
        function: of a module's top level; it and the items must be picklable.
        workers: processes; 0: one a core.
        crashed: makes the result of an item whose process died; gets the item and how it died.

    Raises:
        ServiceError: a process died, and `crashed` is not given; or processes can't start.
        Exception: whatever the function raised.
    """
    source = iter(items)
    staff: list[_Worker[Item]] = []
    try:
        while True:
            idle = [worker for worker in staff if not worker.busy]
            while idle or len(staff) < (workers or cores()):
                try:
                    item = next(source)
                except StopIteration:
                    break
                if not idle:
                    idle.append(_Worker(function))
                    staff += idle
                idle.pop().give(item)
            busy: dict[Any, _Worker[Item]] = {worker.pipe: worker for worker in staff if worker.busy}
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]
                try:
                    answer = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    staff.remove(worker)
                    how = worker.died()
                    if not worker.started or crashed is None:
                        raise ServiceError(
                            f"a worker process {how} at {worker.item!r}", mend="run the same command again: it resumes"
                        ) from None
                    yield worker.item, crashed(worker.item, how)
                    continue
                if answer is None:
                    worker.started = True
                    continue
                worker.busy = False
                fine, value = answer
                if not fine:
                    raise value
                yield worker.item, value
    finally:
        for worker in staff:
            worker.end()


class _Worker(Generic[Item]):
    """One process and the item that it works on."""

    item: Item

    def __init__(self, function: Callable[[Item], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()  # or its end would never be seen
        self.busy = self.started = False

    def give(self, item: Item) -> None:
        self.item, self.busy = item, True
        with contextlib.suppress(ConnectionError):  # it died: its pipe says so next
            self.pipe.send(item)

    def died(self) -> str:
        """How the process ended by itself."""
        self.process.join(10)  # the pipe closes a moment before the process is gone
        self.end()
        code = self.process.exitcode or 0
        return f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent()
    pipe.send(None)  # the imports went well
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(item))
        except Exception as error:
            answer = (False, error)
        pipe.send(answer)
