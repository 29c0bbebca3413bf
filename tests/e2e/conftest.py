"""A tiny project, and everything of it running: one start for all tests here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.videos import make_folder

SORA = [sys.executable, "-m", "sora.cli"]
TINY: dict[str, dict[str, Any]] = {
    "split": {"group_pattern": r"(g\d+)_"},
    "clip": {"frames": 8, "height": 32, "width": 32, "flow": 0},
    "shards": {"buckets": 4, "workers": 1},
    "model": {"preset": "small", "low_filters": [16], "high_filters": [16], "key_frames": 2, "embedding": 16},
    "train": {"epochs": 2, "batch": 8},
    "gate": {"min_test": 2, "max_ece": 1.0},
    "alert": {"webhook": "http://127.0.0.1:9/T0KEN-in-the-path"},
}


def sora(project: Path, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SORA, *arguments], cwd=project, capture_output=True, text=True, timeout=timeout)


def sora_json(project: Path, *arguments: str, code: int = 0) -> Any:
    done = sora(project, *arguments, "--json")
    assert done.returncode == code, f"sora {' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def set_params(project: Path, **sections: dict[str, Any]) -> None:
    path = project / "params.yaml"
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, changes in sections.items():
        value[section] = {**(value.get(section) or {}), **changes}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")


def make_project(folder: Path) -> Path:
    footage = make_folder(folder / "footage", groups=6, each=2)
    made = sora_json(folder, "init", str(folder / "project"), "--data", str(footage))
    project = Path(made["project"])
    assert made["videos"] == 24 and made["classes"] == ["jump", "wave"]
    set_params(project, **TINY)
    return project


@dataclass
class Running:
    """A project under `sora up`, with the addresses that it printed."""

    project: Path
    process: subprocess.Popen[str]
    prefect: str
    mlflow: str
    api: str


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    project = make_project(tmp_path_factory.mktemp("e2e"))
    log = project.parent / "up.log"
    ports = ("--prefect-port", "0", "--mlflow-port", "0", "--api-port", "0")
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*SORA, "up", *ports], cwd=project, stdout=sink, stderr=subprocess.STDOUT, text=True, env={**os.environ}
        )
    try:
        found = _addresses(process, log)
        yield Running(project, process, found["prefect"], found["mlflow"], found["api"])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _addresses(process: subprocess.Popen[str], log: Path, seconds: float = 180) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text(errors="replace")
        found = {
            name: match[1]
            for name in ("prefect", "mlflow", "api")
            if (match := re.search(rf"(?i){name}\S*\W.*?(http://127\.0\.0\.1:\d+)", text))
        }
        if len(found) == 3 and "Ctrl-C" in text:
            return found
        time.sleep(0.3)
    raise AssertionError(f"sora up did not start:\n{log.read_text(errors='replace')[-4000:]}")
