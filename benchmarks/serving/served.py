"""What the serving benchmarks share: a project with versions, its server as a user starts it, loads upon it."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import SHARED, SORA, change_params, timed
from sora.config import Project
from sora.dataset import manifest
from sora.serving.source import ModelCache

CLIENTS = 16  # at once, where many ask


def make_project(folder: Path, versions: int = 1, epochs: int = 2) -> Path:
    """A project over fights300 with so many versions, which the pipeline trained; a few epochs each, since what is
    measured does not depend on the weights."""
    project = folder / "fights300"
    timed([*SORA, "init", str(project), "--data", str(SHARED / "fights300")], folder)
    for seed in range(versions):
        change_params(
            project,
            clip={"height": 112, "width": 112, "flow": 0},
            model={"preset": "small"},
            train={"epochs": epochs, "seed": seed},
        )
        timed([*SORA, "run", "--force", "--json"], project)
    return project


def arguments(description: str | None, needs: str = "one with a champion") -> argparse.ArgumentParser:
    """The options of a serving benchmark: `--project` and what it adds."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--project", type=Path, help=f"{needs} [default: fights300, trained for the purpose]")
    return options


@contextmanager
def workplace(given: Path | None, versions: int = 1) -> Iterator[tuple[Path, Path]]:
    """(a temporary folder, the project given or one made in that folder)."""
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        place = Path(name)
        yield place, given.resolve() if given else make_project(place, versions)


def champion_files(project: Path) -> tuple[Path, Path]:
    """The model and the recipe that the project's server served last."""
    cache = ModelCache(Project(project).cache.root)
    champion = cache.champion()
    assert champion is not None
    folder = cache.model_folder(champion.digest)
    return folder / "model.keras", folder / "recipe.json"


def clip_file(project: Path) -> Path:
    """Of the project's videos the first by path of 320x240 pixels and 2 seconds."""
    rows = manifest.read(Project(project).manifest)
    fits = rows[(rows["width"] == 320) & (rows["height"] == 240) & rows["duration"].between(1.9, 2.1)]
    return Project(project).data / str(sorted(fits["path"])[0])


@dataclass
class Server:
    address: str
    process: subprocess.Popen[str]
    began: float  # time.monotonic() before it was started

    def get(self, path: str) -> tuple[int, bytes]:
        """(status, body); status 0: no connection."""
        try:
            with urllib.request.urlopen(f"{self.address}{path}", timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def until_ready(self, seconds: float = 300) -> float:
        """Seconds from the start to the first 200 of /readyz."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.get("/readyz")[0] == 200:
                return time.monotonic() - self.began
            time.sleep(0.02)
        raise SystemExit(f"{self.address} is not ready after {seconds:g} s: {self.get('/readyz')[1].decode()}")


@contextmanager
def serving(project: Path, log: Path, **env: str) -> Iterator[Server]:
    """`sora serve` on a free port; its log goes to a file."""
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*SORA, "serve", "--port", "0"],
            cwd=project,
            env={**os.environ, **env},
            stdout=stream,
            stderr=stream,
            text=True,
        )
    try:
        address = None
        while address is None and process.poll() is None and time.monotonic() < began + 120:
            address = re.search(r"http://[\d.]+:\d+", log.read_text())
            time.sleep(0.005)
        if address is None:
            raise SystemExit(f"sora serve did not start:\n{log.read_text()[-3000:]}")
        yield Server(address[0], process, began)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def settled(project: Path, log: Path, **env: str) -> Iterator[Server]:
    """`serving`, ready, and the MLflow that it starts beside it started."""
    with serving(project, log, **env) as server:
        server.until_ready()
        time.sleep(20)
        yield server


def load(address: str, file: Path, *options: str) -> list[list[Any]]:
    """The rows of `benchmarks.serving.load`."""
    command = [sys.executable, "-m", "benchmarks.serving.load", address, str(file), *options]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows: list[list[Any]] = json.loads(answer)["rows"]
    return rows


def failures(rows: list[list[Any]]) -> dict[str, int]:
    """How many rows have each status other than 200."""
    found: dict[str, int] = {}
    for row in rows:
        if row[2] != 200:
            found[str(row[2])] = found.get(str(row[2]), 0) + 1
    return found


def rate(rows: list[list[Any]]) -> float:
    """Requests a second; all must have been answered."""
    assert not failures(rows), failures(rows)
    seconds: float = max(row[0] + row[1] for row in rows) - min(row[0] for row in rows)
    return len(rows) / seconds
