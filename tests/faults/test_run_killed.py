"""SIGKILL of every process of `sora run`, one after the other in one project: every try goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.processes import Case, Verb, kill
from benchmarks.faults.scenes import LIMIT, Scenes, case_of, wait_for_step
from tests.faults.conftest import holds, runs, speaks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def project(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """New videos were added: the first try has everything to do."""
    with case_of(scenes, "new", tmp_path_factory.mktemp("killed") / "case") as case:
        yield case


# In the order in which a run comes to need them. Each is retried by the flow or ends it; neither may lose anything.
@pytest.mark.parametrize("role", ["stage", "dvc", "prefect", "training", "mlflow", "evaluation", "smoke"])
def test_one_process(project: Case, role: str) -> None:
    with Verb(project, "run", "--json") as verb:
        try:
            victim = verb.wait_for(role, LIMIT)
        except AssertionError:
            # What was done before this try is not done again, so an earlier role may not come back.
            assert verb.process.returncode == 0, verb.err[-3000:]
            pytest.skip(f"a run that goes on here needs no {role}")
        kill([victim])
        verb.wait(LIMIT)
        speaks(verb)
    holds(project, finished=verb.process.returncode == 0)


@pytest.mark.parametrize("step", ["run", "fit", "register"])
def test_all_at_once(scenes: Scenes, tmp_path: Path, step: str) -> None:
    with case_of(scenes, "new" if step == "run" else "fitted", tmp_path / "case") as case:
        with Verb(case, "run", "--json") as verb:
            wait_for_step(case, verb, step)
            kill(case.processes())
            verb.wait(30)
        holds(case, finished=False)
        known = len(list_versions(case))
        runs(case)
        holds(case, reproduce=step == "register")
        assert len(list_versions(case)) - known == (0 if step == "register" else 1), "the run did not go on"


def test_the_run_goes_on_to_its_end(project: Case) -> None:
    """Last: after all those kills one run completes, and the champion is what it was registered as."""
    runs(project)
    holds(project, reproduce=True)


def list_versions(case: Case) -> list[int]:
    from sora.lifecycle import models
    from sora.settings import Project

    with case.inside():
        return [version.version for version in models(Project(case.root))]
