"""A leased slot for each device, so that two trainings never share a GPU, whichever project or machine asks.

A slot is a Prefect global concurrency limit of 1, named `gpu-<host>-<device>` (`cpu-<host>-0` on a machine without a
GPU) and held by a lease that its holder renews. When the holder is killed the lease runs out and the slot is free
again; tag limits would stay taken for good (Prefect issues 9895, 17415). The server must keep leases on disk
(`LEASE_STORAGE`), or its own death leaves the slot taken.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from flows.client import prefect_client
from sora.core.errors import ServiceError
from sora.core.progress import say

LEASE_SECONDS = 60.0  # the least that Prefect's server allows
LEASE_STORAGE = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
_ASK_AGAIN = 5.0  # seconds between two requests for a free slot


@dataclass(frozen=True, slots=True)
class Device:
    """`index` is a value for CUDA_VISIBLE_DEVICES: a number or a UUID; "0" for the processor."""

    kind: str  # gpu | cpu
    index: str

    @property
    def slot(self) -> str:
        # Prefect refuses / % & > < in names.
        host = "".join(c if c.isalnum() or c in "-_." else "-" for c in socket.gethostname())
        return f"{self.kind}-{host}-{self.index}"


def devices() -> list[Device]:
    """This machine's GPUs that this process may use (CUDA_VISIBLE_DEVICES), else its processor; without TensorFlow."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [part.strip() for part in visible.split(",")]
        gpus = list(itertools.takewhile(lambda part: part and not part.startswith("-"), named))  # as CUDA reads it
    else:
        gpus = _installed_gpus()
    return [Device("gpu", index) for index in gpus] or [Device("cpu", "0")]


def _installed_gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # the tool exists, but the driver does not
    return [line.strip() for line in answer.stdout.splitlines() if line.strip().isdigit()]


@contextmanager
def device_slot(
    candidates: Sequence[Device] | None = None, *, count: int = 0, wait_seconds: float = 6 * 3600
) -> Iterator[dict[str, str]]:
    """Holds `count` of the candidates (default: this machine's devices; 0: all of them together) while the body runs.

    Yields the environment that shows a child only those devices. Several are taken in one request, all or
    none, so two holders can't wait for each other. If the lease can't be renewed, the body is interrupted: another
    may hold the device by then.

    Raises:
        ServiceError: none became free within `wait_seconds`, or the Prefect server does not answer.
    """
    usable = list(candidates if candidates is not None else devices())
    _create_limits([device.slot for device in usable])
    with ExitStack() as stack:
        held = _acquire(stack, usable, min(count or len(usable), len(usable)), wait_seconds)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(device.index for device in held if device.kind == "gpu") or "-1"}


def _acquire(stack: ExitStack, usable: list[Device], count: int, wait_seconds: float) -> tuple[Device, ...]:
    """Enters the first available lease into `stack`."""
    from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    until = time.monotonic() + wait_seconds
    logging.getLogger(_QUEUE_LOG).addFilter(_TAKEN)  # for good: Prefect's thread may log after we have its answer
    reported = False
    while True:
        for choice in itertools.combinations(usable, count):
            names = [device.slot for device in choice]
            try:
                stack.enter_context(concurrency(names, strict=True, lease_duration=LEASE_SECONDS, max_retries=0))
                return choice
            except (AcquireConcurrencySlotTimeoutError, ConcurrencySlotAcquisitionError) as error:
                if not _taken(error):
                    raise ServiceError(
                        f"no device slot: {error}", fix="check that the Prefect server answers (`sora doctor`)"
                    ) from error
        if time.monotonic() >= until:
            raise ServiceError(
                f"no device was free for {wait_seconds:.0f} s: {', '.join(device.slot for device in usable)}",
                fix="see who holds it with `prefect gcl ls`; the slot of a holder that died frees itself within 75 s",
            )
        if not reported:
            reported = True
            say("waiting for a device: another run holds it (one that was killed frees it within 75 s)")
        time.sleep(min(_ASK_AGAIN, max(0.1, until - time.monotonic())))


def _taken(error: BaseException) -> bool:
    """Whether the server said 423 Locked."""
    return _locked(error.__cause__)


def _locked(error: BaseException | None) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) == 423


class _TakenIsNoError(logging.Filter):
    """Drops the line that Prefect's queue writes as an error whenever a slot is taken, and no other.

    That answer is normal here: after a killed run it comes every `_ASK_AGAIN` seconds until the lease ends.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not _locked(sys.exc_info()[1])  # logged where the answer is caught


_QUEUE_LOG = "prefect._internal.concurrency"
_TAKEN = _TakenIsNoError()


def _create_limits(names: list[str]) -> None:
    """Creates the missing limits. An existing one is left alone: changing it would reset its taken slots."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with prefect_client() as client:
        for name in names:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                with suppress(ObjectAlreadyExists):  # somebody else was quicker
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
