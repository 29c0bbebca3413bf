"""The rule that puts a test into a tier, and the order that it gives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiers


def _collected(repository: Path, *arguments: str) -> list[str]:
    """Ids of the tests that pytest would run, in its order."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_servers_and_trainings_are_in_the_full_tier_only(repository: Path) -> None:
    paths = [
        "tests/e2e",
        "tests/registry/test_runs.py",
        "tests/serving/test_replicas.py",
        "tests/dataset/versioning/test_stages.py",
    ]
    fast = _collected(repository, "-m", "not slow", *paths)
    assert {name.split("::")[0] for name in fast} <= {"tests/dataset/versioning/test_stages.py"}
    assert not [name for name in fast if "prepared" in name]
    assert len(_collected(repository, *paths)) > len(fast)


def test_what_takes_longest_starts_first(repository: Path) -> None:
    names = _collected(repository, "tests/dataset/test_folds.py", "tests/registry/test_runs.py", "tests/e2e")
    files = list(dict.fromkeys(name.split("::")[0] for name in names))
    ends = [name for name in files if not name.startswith("tests/e2e/")]
    assert ends == files[-2:] == ["tests/registry/test_runs.py", "tests/dataset/test_folds.py"]
    assert {"tests/e2e/test_life.py", "tests/e2e/test_multilabel.py"} <= set(files)


@pytest.mark.parametrize(
    ("source", "heavy"),
    [
        ("import keras", True),
        ("def test():\n    from tensorflow import data", True),
        ("from sora.learning import training", True),
        ("from sora.model.layers import x", True),
        ("from sora.modelling import x", False),
        ("import kerasish", False),
        ("from sora.config import Model\ntext = 'import keras'", False),
    ],
)
def test_imports_decide(tmp_path: Path, source: str, heavy: bool) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(source)
    assert tiers._imports_heavy(file) is heavy


def test_make_runs_the_tiers(repository: Path) -> None:
    text = (repository / "Makefile").read_text(encoding="utf-8")
    assert re.search(r'^test-fast: .*\n\t\$\(PYTEST\) -m "not slow"$', text, re.MULTILINE)
    assert re.search(r"^test: .*\n\t\$\(PYTEST\)$", text, re.MULTILINE), "make test must leave nothing out"
