from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import slots
from flows.slots import Device
from sora.core.errors import ServiceError
from sora.core.processes import start_child


def _active(name: str) -> int:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(name).active_slots


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,2", [Device("gpu", "0"), Device("gpu", "2")]),
        ("GPU-1f, GPU-2e", [Device("gpu", "GPU-1f"), Device("gpu", "GPU-2e")]),
        ("", [Device("cpu", "0")]),
        ("-1", [Device("cpu", "0")]),
        ("1,-1,0", [Device("gpu", "1")]),  # CUDA stops reading at the first that is none
    ],
)
def test_devices_are_those_that_cuda_would_see(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[Device]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slots.devices() == expected


def test_a_broken_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' ; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slots.devices() == [Device("cpu", "0")]
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    assert slots.devices() == [Device("gpu", "0"), Device("gpu", "1")]


def test_a_slot_is_held_names_its_device_to_children_and_is_given_back(prefect_server: str) -> None:
    pair = [Device("gpu", "t0"), Device("gpu", "t1")]
    with slots.device_slot(pair, count=1) as first, slots.device_slot(pair, count=1, wait_seconds=0) as second:
        assert first == {"CUDA_VISIBLE_DEVICES": "t0"}
        assert second == {"CUDA_VISIBLE_DEVICES": "t1"}
        with (
            pytest.raises(ServiceError, match="no device was free"),
            slots.device_slot(pair, count=1, wait_seconds=0),
        ):
            pass
    with (
        slots.device_slot(pair[1:]),
        pytest.raises(ServiceError, match="no device was free"),
        slots.device_slot(pair, wait_seconds=0),  # all of them, and one is taken
    ):
        pass
    with slots.device_slot(pair, wait_seconds=0) as both:
        assert both == {"CUDA_VISIBLE_DEVICES": "t0,t1"}
    with slots.device_slot([Device("cpu", "t")]) as none:
        assert none == {"CUDA_VISIBLE_DEVICES": "-1"}
    assert [_active(device.slot) for device in pair] == [0, 0]


def test_waiting_for_a_slot_is_said_once_and_is_no_error(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a killed run, whose lease has to end first: Prefect would log an error at every look."""
    log, records = logging.getLogger("prefect._internal.concurrency"), []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Keeping()
    log.addHandler(handler)
    monkeypatch.setattr(slots, "_ASK_AGAIN", 0.1)
    try:
        device = Device("cpu", "quiet")
        with (
            slots.device_slot([device], wait_seconds=0),
            pytest.raises(ServiceError, match="no device was free"),
            slots.device_slot([device], wait_seconds=1),
        ):
            pass
        time.sleep(0.5)
        assert records == []
        assert capsys.readouterr().err.count("waiting for a device") == 1
        try:
            raise RuntimeError("something else")
        except RuntimeError:
            log.error("a real error")
        assert records == ["a real error"]
    finally:
        log.removeHandler(handler)


def test_an_error_in_the_body_gives_the_slot_back(prefect_server: str) -> None:
    device = Device("cpu", "error")
    with pytest.raises(RuntimeError, match="training broke"), slots.device_slot([device], wait_seconds=0):
        raise RuntimeError("training broke")
    assert _active(device.slot) == 0


def test_no_server_is_a_clear_error(prefect_server: str) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(ServiceError, match="Prefect"),
        slots.device_slot([Device("cpu", "down")], wait_seconds=0),
    ):
        pass


@pytest.mark.slow
def test_a_killed_holder_frees_its_slot_when_the_lease_runs_out(prefect_server: str) -> None:
    """60 s is the least that the server allows for a lease; it looks for expired ones every 15 s."""
    device = Device("cpu", "killed")
    code = (
        "import time\nfrom flows.slots import *\n"
        "with device_slot([Device('cpu', 'killed')], wait_seconds=0):\n print('held', flush=True)\n time.sleep(600)"
    )
    holder = start_child([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    killed = time.monotonic()
    assert _active(device.slot) == 1
    with slots.device_slot([device], wait_seconds=90):
        took = time.monotonic() - killed
    assert took < 85, took
