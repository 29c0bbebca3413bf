"""SIGKILL of each part of `sora up`, of a nightly in its worker, of one of two machines' workers, of all at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.faults.inject import UP, trigger_nightly, wait_until_up, wait_until_whole
from benchmarks.faults.processes import Case, Verb, kill
from benchmarks.faults.scenes import LIMIT, Scenes, case_of
from flows.deployments import pool_name
from sora.config import Project
from sora.core.processes import start_child
from sora.operations import servers as services
from sora.operations.servers import Addresses
from tests.faults.conftest import holds, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def standing(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verb]:
    with case_of(scenes, "fitted", tmp_path_factory.mktemp("up") / "case") as case, Verb(case, *UP) as verb:
        wait_until_up(verb)
        yield verb


@pytest.mark.parametrize("role", ["decoder", "api", "mlflow", "prefect", "worker"])
def test_a_part_is_started_again(standing: Verb, role: str) -> None:
    before = standing.wait_for(role, LIMIT)
    kill([before])
    wait_for_another(standing, role, before)
    wait_until_whole(standing)


def test_the_training_or_evaluation_of_a_nightly(standing: Verb) -> None:
    """The child of a flow run is killed: the flow fails or retries, the project is free, the next nightly ends it."""
    trigger_nightly(standing.case)
    kill([standing.wait_for("evaluation", LIMIT)])
    until_free(standing.case)
    assert standing.running


def test_a_flow_run(standing: Verb) -> None:
    trigger_nightly(standing.case)
    standing.wait_for("evaluation", LIMIT)
    flow = holder_of_the_run(standing.case)
    flow.kill()
    until_free(standing.case)
    left = [one for role in ("training", "evaluation", "smoke") for one in standing.case.role(role)]
    assert not psutil.wait_procs(left, timeout=20)[1], "children outlive their flow run"
    assert standing.running


def test_one_of_two_machines(standing: Verb) -> None:
    """Two workers of different host names poll one pool; one dies with the nightly that it runs; the other does it."""
    case, project = standing.case, Project(standing.case.root)
    known = services.running(project)
    env = services.environment(project, Addresses(known["prefect"].url, known["mlflow"].url))
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool_name(project.settings())]
    command += ["--type", "process", "--name", "other-machine"]
    if shutil.which("unshare") and os.geteuid() == 0:  # a host name of its own
        command = ["unshare", "--uts", "sh", "-c", 'hostname other-machine; exec "$@"', "sh", *command]
    log = (case.out / "other.log").open("wb")
    other = start_child(
        command, cwd=case.root, env={**case.environment(), **env}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
    )
    try:
        until_said(case, "started!", other)
        trigger_nightly(case)
        standing.wait_for("evaluation", LIMIT)
        runner = worker_of(holder_of_the_run(case))
        runner.kill()
        until_free(case)
        trigger_nightly(case)
        until = time.monotonic() + LIMIT
        while last_nightly(case) < 1 and time.monotonic() < until:
            time.sleep(0.3)
        assert last_nightly(case), "no worker did the next nightly"
    finally:
        other.kill()
        other.wait()
        log.close()
    wait_until_whole(standing)


def test_all_at_once(standing: Verb) -> None:
    """Last. Also the end of `up` itself: nothing is left, and a run by hand goes on."""
    case = standing.case
    kill(case.processes())
    assert standing.wait(30) == -signal.SIGKILL
    holds(case, finished=False)
    runs(case)
    holds(case, reproduce=True)


def wait_for_another(verb: Verb, role: str, before: psutil.Process) -> None:
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        assert verb.running, verb.err[-3000:]
        if any(one.pid != before.pid for one in verb.case.role(role)):
            return
        time.sleep(0.1)
    raise AssertionError(f"no other {role} came:\n{verb.out[-2000:]}{verb.err[-2000:]}")


def holder_of_the_run(case: Case) -> psutil.Process:
    from sora.operations.lock import holder

    active = holder(Project(case.root))
    assert active and active["pid"], "no run is active"
    return psutil.Process(int(active["pid"]))


def worker_of(flow: psutil.Process) -> psutil.Process:
    for one in flow.parents():
        if "worker" in one.cmdline() and "start" in one.cmdline():
            return one
    raise AssertionError(f"{flow} has no worker above it")


def until_free(case: Case) -> None:
    """Until no run holds the project."""
    from sora.operations.lock import holder

    until = time.monotonic() + LIMIT
    while holder(Project(case.root)) is not None:
        assert time.monotonic() < until, "the project is still held"
        time.sleep(0.2)


def until_said(case: Case, word: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + LIMIT
    while word not in (case.out / "other.log").read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < until, (case.out / "other.log").read_text()[-2000:]
        time.sleep(0.2)


def last_nightly(case: Case) -> int:
    """How many good nightlies ended since the scene was built."""
    from sora.operations import nightly_log

    last = nightly_log.read(Project(case.root))
    built = (case.root / "data.dvc").stat().st_mtime
    return int(last is not None and last.finished.timestamp() > built)
