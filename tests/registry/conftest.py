from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sora.core.records import ClipSpec, EvalReport, Recipe
from sora.registry import Registry
from tests.servers import mlflow

_names = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("mlflow")
    with mlflow(root) as (uri, pid):
        yield SimpleNamespace(uri=uri, pid=pid, artifacts=root / ".sora" / "mlflow" / "artifacts")


@pytest.fixture
def registry(server: SimpleNamespace) -> Iterator[Registry]:
    """An experiment and a registered model that no other test uses."""
    registry = Registry(server.uri, f"test-{next(_names)}")
    yield registry
    registry.close()


def recipe(**more: object) -> Recipe:
    return Recipe(clip=ClipSpec(frames=4, height=16, width=16), classes=("läuft", "steht"), **more)  # type: ignore[arg-type]


def report(accuracy: float = 0.9) -> EvalReport:
    return EvalReport(
        split="test",
        classes=("läuft", "steht"),
        metrics={"accuracy": accuracy, "macro_f1": accuracy, "ece": 0.05},
        per_class={},
        confusion=[[1, 0], [0, 1]],
        slices=[],
        videos=[],
        temperature=1.0,
    )


def add_version(registry: Registry, folder: Path, content: bytes, accuracy: float = 0.9, data: str = "d1") -> int:
    """A registered version whose model file holds `content` (no test here needs it to be a network)."""
    file = folder / "model.keras"
    file.write_bytes(content)
    run_id = registry.runs.start_run(tags={"data_version": data})
    version = registry.register(run_id, file, recipe(), report(accuracy), data)
    registry.runs.finish(run_id)
    return version


def answers(file: Path, recipe: Recipe) -> None:
    """A smoke test that is content with any file."""
    assert file.is_file()
    assert recipe.model_sha256


def fails(file: Path, recipe: Recipe) -> None:
    raise RuntimeError("golden answers differ")
