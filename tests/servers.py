"""Real servers for tests: one MLflow server for the whole session, started as Sora starts it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sora.services import mlflow_server, start, stop
from sora.settings import Project


def make_project(root: Path, text: str = "name: tested\n") -> Project:
    """A folder with params.yaml and nothing else."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(text, encoding="utf-8")
    return Project(root)


@contextmanager
def mlflow(root: Path) -> Iterator[tuple[str, int]]:
    """Address and process number of an MLflow server whose state lies in `root/.sora`."""
    project = make_project(root)
    project.state.mkdir(parents=True, exist_ok=True)
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        uri = start(project, [mlflow_server(project)], started, owner="test")["mlflow"]
        yield uri, started["mlflow"].pid
    finally:
        stop(started.values())
