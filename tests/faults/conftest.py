"""One tiny project, trained once, and copied for each fault. The parts are those of `make faults`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.faults.invariants import Finding, check, spoken
from benchmarks.faults.processes import Case, Verb, role_of, sora
from benchmarks.faults.scenes import LIMIT, Scenes, case_of, scenes_in


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """SORA_FAULTS_SCENES: a folder that keeps them from one session to the next."""
    kept = os.environ.get("SORA_FAULTS_SCENES")
    return scenes_in(Path(kept) if kept else tmp_path_factory.mktemp("scenes") / "built")


@pytest.fixture
def case(scenes: Scenes, tmp_path: Path) -> Iterator[Callable[[str], Case]]:
    """`case("fitted")`: a copy of that scene. Whatever it started ends with the test."""
    with ExitStack() as stack:
        yield lambda scene: stack.enter_context(case_of(scenes, scene, tmp_path / "case"))


def holds(case: Case, *, reproduce: bool = False, finished: bool = True) -> None:
    """Everything that must hold after a fault does."""
    found = check(case, had_champion=True, reproduce=reproduce, finished=finished)
    assert not found.broken, f"after the fault:\n{found}"


def nobody_left(case: Case, seconds: float = 15.0) -> None:
    """All processes of the case have ended, or end by themselves now."""
    until = time.monotonic() + seconds
    while left := case.processes():
        assert time.monotonic() < until, f"orphans: {[(one.pid, role_of(one)) for one in left]}"
        time.sleep(0.1)


def runs(case: Case) -> Verb:
    """`sora run` ends well."""
    verb = sora(case, "run", "--json", seconds=LIMIT)
    assert verb.process.returncode == 0, verb.err[-4000:]
    return verb


def fine(finding: Finding) -> None:
    assert finding.ok, f"{finding.what}: {finding.detail}"


def speaks(verb: Verb) -> None:
    """It ended, and where it failed it says why and what to do."""
    fine(spoken(verb))
