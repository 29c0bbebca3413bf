"""Children that do one job."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sora.core.errors import InputError, ServiceError
from sora.core.processes import Child, run_child

MODULE = "tests.child"


def test_a_job_goes_in_and_events_and_a_result_come_out(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    long = "ü" * 300_000  # more than a pipe holds
    result = run_child(MODULE, {"do": "work", "text": long}, events.append, log=tmp_path / "logs" / "child.log")
    assert result["text"] == long and [event["event"] for event in events] == ["half"]
    assert (tmp_path / "logs" / "child.log").read_text() == "working\n"


def test_its_error_is_the_callers_and_its_death_has_its_last_words() -> None:
    with pytest.raises(InputError, match="not this one"):
        run_child(MODULE, {"do": "refuse"})
    with pytest.raises(ServiceError, match=r"killed by signal 9 before it had a result\nworking"):
        run_child(MODULE, {"do": "die"})
    with pytest.raises(ServiceError, match="No module named"):
        run_child("tests.absent", {})


def test_it_waits_for_its_job_and_ends_without_one() -> None:
    with Child(MODULE) as child:
        pid = child._process.pid
        time.sleep(0.3)
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)
    with Child(MODULE) as child:
        assert child.result({"do": "work", "text": ""})["pid"] == child._process.pid


def test_an_interrupted_caller_leaves_no_child() -> None:
    seen: list[int] = []

    def interrupt(event: dict[str, Any]) -> None:
        seen.append(event["pid"])
        raise KeyboardInterrupt

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        run_child(MODULE, {"do": "sleep"}, interrupt)
    assert not psutil.pid_exists(seen[0])
    assert len(os.listdir("/proc/self/fd")) == before
