"""Another user's folders and files: the run says which it can't read or write, and goes on once it may."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.processes import Case, Verb
from benchmarks.faults.scenes import LIMIT, Scenes, case_of
from tests.faults.conftest import holds, nobody_left, runs, speaks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SOMEBODY = 64_123  # a user who does not exist
_RIGHTS = "-dac_override,-dac_read_search,-fowner"


def bound() -> list[str]:
    """What goes before a command so that file permissions bind it, whoever runs the tests."""
    if os.geteuid() != 0:
        pytest.skip("giving files to another user takes root")
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not here: root ignores permissions")
    return ["setpriv", f"--bounding-set={_RIGHTS}", "--inh-caps=-all", "--"]


@pytest.fixture(scope="module")
def project(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with case_of(scenes, "unchanged", tmp_path_factory.mktemp("rights") / "case") as case:
        yield case


@pytest.mark.parametrize(
    "place",
    [
        "data/dark",
        "data/dark/g00_0.mp4",
        "splits.csv",
        "params.yaml",
        ".sora",
        ".sora/mlflow/mlflow.db",
        ".sora/logs",
        "prepared",
        ".dvc/cache",
    ],
)
def test_somebody_elses(project: Case, place: str) -> None:
    before = bound()
    target = project.root / place
    kept, owner = target.stat().st_mode, target.stat().st_uid
    os.chown(target, SOMEBODY, -1)
    os.chmod(target, 0o700 if target.is_dir() else 0o600)
    try:
        with Verb(project, "run", "--json", before=before) as verb:
            code = verb.wait(LIMIT)
    finally:
        os.chown(target, owner, -1)
        os.chmod(target, kept)
    speaks(verb)
    # What nobody changed need not be read again; what a run needs can't be passed over in silence.
    assert code in (0, 1, 2, 3)
    nobody_left(project)


def test_all_is_well_with_the_rights_back(project: Case) -> None:
    """After all of those."""
    runs(project)
    holds(project)


def test_the_right_is_really_gone(tmp_path: Path) -> None:
    """The harness itself: without these rights even root reads nothing of a file with mode 000."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    os.chmod(secret, 0)
    done = subprocess.run([*bound(), "cat", str(secret)], capture_output=True, text=True)
    assert done.returncode == 1 and "Permission denied" in done.stderr
