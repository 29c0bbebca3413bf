"""SIGKILL of every process of `sora run`, one after the other in one project: every try goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from benchmarks.faults.processes import Case, Verb, kill
from benchmarks.faults.scenes import LIMIT, Scenes, case_of, wait_for_step
from tests.faults.conftest import holds, nobody_left, runs, speaks

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
    nobody_left(project)  # everything else is looked at once, at the end


def test_the_run_goes_on_to_its_end(project: Case) -> None:
    """Last: after all those kills one run completes, and the champion is what it was registered as."""
    runs(project)
    holds(project, reproduce=True)


def test_all_at_once(case: Callable[[str], Case]) -> None:
    """After the new version was registered, before it was judged: it is judged, not made again."""
    here = case("fitted")
    with Verb(here, "run", "--json") as verb:
        wait_for_step(here, verb, "register")
        kill(here.processes())
        verb.wait(30)
    holds(here, finished=False)
    known = list_versions(here)
    runs(here)
    holds(here, reproduce=True)
    assert list_versions(here) == known


def list_versions(case: Case) -> list[int]:
    from sora.config import Project
    from sora.runtime.lifecycle import models

    with case.inside():
        return [version.version for version in models(Project(case.root))]
