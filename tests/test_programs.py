"""A test that lacks its program is skipped on a developer's machine and fails in CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import PROGRAMS

NEEDY = """
import pytest
from tests import programs

@programs.needs("haproxy")
def test_marked():
    pass

def test_by_hand():
    pytest.skip("Chromium is not here")

def test_other():
    pytest.skip("needs the right to mount")
"""
MODULE = """
import pytest
pytest.skip("faketime is not installed", allow_module_level=True)
"""


CONFTEST = """
from tests import programs
from tests.programs import pytest_make_collect_report, pytest_runtest_makereport
programs.find = lambda package: None
"""


def _run(repository: Path, folder: Path, ci: str | None) -> str:
    """What pytest says of the tests in `folder` on a machine that has none of the programs."""
    (folder / "conftest.py").write_text(CONFTEST)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(repository)}
    environment.pop("SORA_CI", None)
    if ci is not None:
        environment["SORA_CI"] = ci
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-ra", str(folder)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "test_needy.py").write_text(NEEDY)
    return tmp_path


@pytest.mark.parametrize("ci", [None, "0"])
def test_without_the_switch_a_lacking_program_skips(repository: Path, folder: Path, ci: str | None) -> None:
    said = _run(repository, folder, ci)
    assert re.search(r"\b3 skipped in", said), said
    assert "haproxy is not installed (Debian: apt install haproxy)" in said


def test_in_ci_it_fails_and_other_skips_stay(repository: Path, folder: Path) -> None:
    said = _run(repository, folder, "1")
    assert "SORA_CI=1 allows no skip for want of a program. haproxy is not installed" in said
    assert re.search(r"\b1 failed, 1 skipped, 1 error in", said), said
    assert "SKIPPED [1]" in said and "needs the right to mount" in said


def test_in_ci_a_whole_module_that_skips_itself_fails_too(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text(MODULE)
    said = _run(repository, tmp_path, "1")
    assert "SORA_CI=1 allows no skip for want of a program. faketime" in said
    assert re.search(r"\b1 error in", said), said
    assert "1 skipped" in _run(repository, tmp_path, None)


def test_ci_installs_every_program_that_tests_name(repository: Path) -> None:
    script = (repository / ".ci" / "run").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^for program in ([\w ]+); do$", script, re.MULTILINE)
    assert sorted(listed.split()) == sorted(PROGRAMS)
    assert "export SORA_CI=1" in script
