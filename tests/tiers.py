"""Two tiers of tests: `make test-fast` takes what starts no server, trains nothing and loads no TensorFlow.

A module's tier follows from what it imports and which fixtures its tests ask for, so that nobody has to mark tests by
hand. The mark `slow` puts a test into the full tier that the rule does not see: it starts such a process as a command.

The tests of `tests/faults` that put a run or servers under a fault are a tier of their own, `make test-faults`: each
takes a run or two.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest

# What loads TensorFlow or starts a server. A package stands for its modules.
HEAVY_IMPORTS = (
    "flows",
    "jax",
    "keras",
    "mlflow",
    "prefect",
    "sora.model",
    "sora.registry",
    "sora.serving.app",
    "sora.runtime.predictor",
    "sora.serving.server",
    "sora.learning.training",
    "tensorflow",
    "tests.serving.standing",
    "tests.servers",
)
# What starts a server, trains, or runs a project's stages.
HEAVY_FIXTURES = frozenset(
    {"_prepared_template", "_template", "api", "models", "prefect_server", "registry", "running", "server"}
)
HEAVY_FOLDERS = ("benchmarks", "e2e", "faults")
# The folders of the full tier that take longest: they start first, so that no worker ends with one of them.
LONGEST_FIRST = ("e2e", "faults", "flows", "serving", "registry", "benchmarks")


def is_heavy(item: pytest.Item) -> bool:
    """Whether a test belongs to the full tier only."""
    if item.get_closest_marker("slow") is not None:
        return True
    folder = _folder(item.path)
    return folder in HEAVY_FOLDERS or bool(fixtures_of(item) & HEAVY_FIXTURES) or _imports_heavy(item.path)


def fixtures_of(item: pytest.Item) -> frozenset[str]:
    """Names of all fixtures that a test asks for."""
    return frozenset(getattr(item, "fixturenames", ()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("SORA_FAULTS"):
        for item in items:
            if _folder(item.path) == "faults" and (item.get_closest_marker("slow") or "case" in fixtures_of(item)):
                item.add_marker(pytest.mark.skip(reason="a run or servers under a fault: `make test-faults`"))
    heavy = {id(item): is_heavy(item) for item in items}
    for item in items:
        if heavy[id(item)]:
            item.add_marker(pytest.mark.slow)
    # By file, so that `--dist loadfile` and the fixtures of a module keep its tests together.
    first = {item.path for item in items if heavy[id(item)]}
    items.sort(key=lambda item: (item.path not in first, _rank(item.path)))


def _folder(path: Path) -> str:
    here = Path(__file__).parent
    return path.relative_to(here).parts[0] if path.is_relative_to(here) else ""


def _rank(path: Path) -> int:
    folder = _folder(path)
    return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)


@cache
def _imports_heavy(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return any(f"{name}.".startswith(f"{heavy}.") for name in names for heavy in HEAVY_IMPORTS)
