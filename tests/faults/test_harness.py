"""The harness itself: the proxy, the plan, what it finds, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.faults.__main__ import CASES, SHARES, plan, summary
from benchmarks.faults.inject import FAULTS
from benchmarks.faults.invariants import check, spoken
from benchmarks.faults.processes import Case, Verb, role_in, sora
from benchmarks.faults.proxy import Proxy
from benchmarks.faults.scenes import Scenes, case_of
from sora.config import Project
from sora.operations.servers.describe import server_of
from tests.faults.test_webhook import server


def test_the_plan_is_the_same_whenever_it_is_asked() -> None:
    planned = [plan(number, 12) for number in range(CASES)]
    assert planned == [plan(number, 12) for number in range(CASES)]
    assert Counter(one.fault for one in planned) == SHARES and set(SHARES) == set(FAULTS)
    assert planned != [plan(number, 13) for number in range(CASES)]
    assert all(0 <= one.share < 1 for one in planned)


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_servers_are_known_by_what_starts_them(name: str, tmp_path: Path) -> None:
    assert role_in(server_of(Project(tmp_path), name).command("127.0.0.1", 1)) == name
    assert role_in(["python", "-m", "something.else"]) is None


def test_the_proxy_passes_and_fails() -> None:
    with server(200, body=b"hello") as target, Proxy(target.url) as proxy, httpx.Client(trust_env=False) as client:
        assert client.get(proxy.url).text == "hello"
        proxy.turn("failing")
        assert client.get(proxy.url).status_code == 500
        proxy.turn("away")
        with pytest.raises(httpx.TransportError):
            client.get(proxy.url)
        proxy.turn("pass")
        assert client.post(proxy.url, content=b"x" * 300_000).text == "hello"


def test_a_process_is_found_and_ended(tmp_path: Path) -> None:
    """A process is found by its mark although its folder and command line say nothing."""
    case = Case(tmp_path / "case")
    case.root.mkdir()
    child = subprocess.Popen(["sleep", "60"], env=case.environment(), cwd="/")
    try:
        assert [one.pid for one in case.processes()] == [child.pid]
        case.end()
        assert child.wait(5) == -signal.SIGKILL and not case.processes()
    finally:
        child.kill()
        child.wait()


def test_a_failure_without_its_fix_is_a_finding(tmp_path: Path) -> None:
    case = Case(tmp_path / "case")
    case.root.mkdir()
    assert spoken(sora(case, "models", seconds=60)).ok  # no project here: it says so, and what to do
    code = "import sys; sys.stderr.write('it broke'); sys.exit(3)"
    with Verb(case, "models", before=[sys.executable, "-c", code]) as verb:
        verb.wait(60)
    assert not spoken(verb).ok


@pytest.mark.slow
def test_invariants_find_what_is_broken(scenes: Scenes, tmp_path: Path) -> None:
    with case_of(scenes, "unchanged", tmp_path / "case") as case:
        assert not check(case, had_champion=True, reproduce=False).broken
        (case.root / ".sora" / "services.json.1234").write_text("{")
        (case.temporary / "sora-stage-x").mkdir()
        next((case.root / "data").rglob("*.mp4")).unlink()
        broken = {one.what for one in check(case, had_champion=True, reproduce=False).broken}
        assert broken == {"no temporary file", "doctor", "dvc status"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_it_is_stopped(scenes: Scenes, tmp_path: Path, number: signal.Signals) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.faults", "--scenes", str(scenes.folder), "--next", "1"]
    process = subprocess.Popen([*command, "--results", str(tmp_path / "results")], env=env)
    try:
        until = time.monotonic() + 120
        while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(3)
        children = psutil.Process(process.pid).children(recursive=True) or children
        process.send_signal(number)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not list(tmp_path.glob("sora-faults-*"))


def test_the_summary_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = {
        "plan": {"number": 0, "fault": "disk full", "scene": "new"},
        "moment": 1.0,
        "seconds": 20.0,
        "victims": ["0 bytes left"],
        "broken": [],
        "findings": [{"what": "reproduce", "ok": True, "detail": ""}],
    }
    (tmp_path / "000.json").write_text(json.dumps(item))
    assert summary(tmp_path) == 0 and "| disk full | 1 | 1 | 1 |" in capsys.readouterr().out
    item["broken"], item["findings"] = ["doctor"], [{"what": "doctor", "ok": False, "detail": "data"}]
    (tmp_path / "001.json").write_text(json.dumps(item))
    assert summary(tmp_path) == 1 and "doctor: data" in capsys.readouterr().out
