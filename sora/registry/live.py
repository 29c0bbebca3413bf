"""Metrics of an active run, kept while MLflow is away, and the machine's own metrics."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from sora.core.errors import ServiceError
from sora.registry.rest import Rest

_BATCH = 1000  # metrics that MLflow accepts in one request
_LIVE_TIMEOUT = 5.0  # seconds: a hanging server must not delay the training any longer
_PAUSE = 10.0  # seconds after a failure before the next attempt


class MetricBuffer:
    """Sends metrics at once, and keeps them in order for the next attempt if MLflow does not accept them."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._waiting: dict[str, deque[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._not_before = 0.0

    def add(self, run_id: str, metrics: list[dict[str, Any]]) -> None:
        """Never raises if the server is away."""
        with self._lock:
            self._waiting.setdefault(run_id, deque()).extend(metrics)
            if time.monotonic() < self._not_before:
                return
            try:
                self._send(run_id, _LIVE_TIMEOUT)
            except ServiceError:
                self._not_before = time.monotonic() + _PAUSE

    def flush(self, run_id: str) -> None:
        """Sends the kept metrics.

        Raises:
            ServiceError: MLflow does not accept them; they stay kept.
        """
        with self._lock:
            self._send(run_id, None)

    def _send(self, run_id: str, timeout: float | None) -> None:
        waiting = self._waiting.get(run_id, deque())
        while waiting:
            batch = [waiting[i] for i in range(min(_BATCH, len(waiting)))]
            self._rest.post("runs/log-batch", {"run_id": run_id, "metrics": batch}, timeout=timeout)
            for _ in batch:
                waiting.popleft()
        self._waiting.pop(run_id, None)


@contextmanager
def system_metrics(log: Callable[[Mapping[str, float], int], None], interval: float) -> Iterator[None]:
    """Samples the machine every `interval` seconds in a thread and hands `log` the values and the sample's number.

    The names are MLflow's own (`system/cpu_utilization_percentage`, …), so that its page shows them under
    "System metrics". GPUs appear if nvidia-ml-py is installed and there is a card.
    """
    stop = threading.Event()

    def work() -> None:
        step = 0
        psutil.cpu_percent()  # the first call has nothing to compare with and returns 0
        with _gpus() as gpus:
            while not stop.wait(interval):
                log({f"system/{name}": value for name, value in {**_machine(), **gpus()}.items()}, step)
                step += 1

    thread = threading.Thread(target=work, name="sora-system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


def _machine() -> dict[str, float]:
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(".")
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }


@contextmanager
def _gpus() -> Iterator[Callable[[], dict[str, float]]]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no card: each raises its own error
        yield dict
        return
    cards = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

    def sample() -> dict[str, float]:
        values: dict[str, float] = {}
        for index, card in enumerate(cards):
            memory = pynvml.nvmlDeviceGetMemoryInfo(card)
            values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            values[f"gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(card).gpu
        return values

    try:
        yield sample
    finally:
        pynvml.nvmlShutdown()
