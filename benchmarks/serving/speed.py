"""The speed of serving, against the same work with no server around it: `python -m benchmarks.serving [--project DIR]`.

- `latency`: p50 of one 2 s 320x240 clip by one client, against decoding it and calling the warmed model, bare.
- `throughput`: 16 clients, against two such bare loops side by side, one model thread each.
- `start`: from `sora serve` to ready with the model in the cache, against importing TensorFlow.

Each is measured in rounds that take turns with what it is measured against; the table has medians of the rounds'
ratios. `benchmarks.serving.peers` compares with other servers, `serving_soak` changes the champion under load,
`serving_odd` sends what is no video.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common
from benchmarks.common import table, timed
from benchmarks.serving.served import (
    CLIENTS,
    Server,
    arguments,
    champion_files,
    clip_file,
    failures,
    load,
    rate,
    serving,
    settled,
    workplace,
)
from sora.config import Project
from sora.serving.launch import THREADS, model_threads

FIGURES = {
    "latency": ("one client, p50, ms", "≤ 1.15"),
    "throughput": (f"{CLIENTS} clients, requests/s", "≥ 0.85"),
    "start": ("start to ready, s (bare: import of TensorFlow)", "≤ 1.5"),
}


class Bare:
    """A bare loop in a process of its own. `alone`: its model uses the machine as the server's does; else it is one of
    several and uses one thread."""

    def __init__(self, project: Project, video: Path, alone: bool) -> None:
        threads = {THREADS: str(model_threads(project.settings().serve))}
        limit = threads if alone else {THREADS: "1", "TF_NUM_INTEROP_THREADS": "1"}
        model, recipe = champion_files(project.root)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.bare", str(model), str(recipe), str(video)],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **limit},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        assert self._line() == "ready"

    def ask(self, what: str, amount: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {amount}\n")
        self.process.stdin.flush()

    def spent(self) -> list[float]:
        seconds: list[float] = json.loads(self._line())
        return seconds

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def bare(project: Path, video: Path, alone: bool) -> Iterator[Bare]:
    loop = Bare(Project(project), video, alone)
    try:
        loop.ready()
        yield loop
    finally:
        loop.process.kill()
        loop.process.wait()


def latency(project: Path, server: Server, video: Path, rounds: int, requests: int) -> list[dict[str, float]]:
    found = []
    with bare(project, video, alone=True) as loop:
        load(server.address, video, "--requests", "50")
        for _ in range(rounds):
            loop.ask("requests", requests)
            alone = median(loop.spent())
            rows = load(server.address, video, "--requests", str(requests))
            assert not failures(rows), failures(rows)
            served = median(row[1] for row in rows)
            found.append({"bare": alone * 1e3, "served": served * 1e3, "ratio": served / alone})
            print(json.dumps(found[-1]), flush=True)
    return found


def throughput(project: Path, server: Server, video: Path, rounds: int, seconds: float) -> list[dict[str, float]]:
    found = []
    with ExitStack() as stack:
        loops = [stack.enter_context(bare(project, video, alone=False)) for _ in range(2)]
        load(server.address, video, "--clients", str(CLIENTS), "--seconds", "3")
        for _ in range(rounds):
            for loop in loops:
                loop.ask("seconds", seconds)
            alone = sum(len(loop.spent()) for loop in loops) / seconds
            served = rate(load(server.address, video, "--clients", str(CLIENTS), "--seconds", str(seconds)))
            found.append({"bare": alone, "served": served, "ratio": served / alone})
            print(json.dumps(found[-1]), flush=True)
    return found


def starts(project: Path, place: Path, rounds: int) -> list[dict[str, float]]:
    found = []
    for _ in range(rounds):
        imported = timed([sys.executable, "-c", "import tensorflow"], place).seconds
        with serving(project, place / "serve.log") as server:
            ready = server.until_ready()
        found.append({"bare": imported, "served": ready, "ratio": ready / imported})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--only", nargs="*", choices=list(FIGURES))
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args()
    chosen = given.only or list(FIGURES)
    result: dict[str, Any] = {}
    with workplace(given.project) as (place, project):
        video = clip_file(project)
        with settled(project, place / "serve.log") as server:
            if "latency" in chosen:
                result["latency"] = latency(project, server, video, given.rounds, 200)
            if "throughput" in chosen:
                result["throughput"] = throughput(project, server, video, given.rounds, 10)
        if "start" in chosen:
            result["start"] = starts(project, place, min(given.rounds, 5))
    table(
        "serving, 2 cores, ratios to the bare work in the same run",
        [
            {
                "figure": FIGURES[figure][0],
                **{name: median(row[name] for row in rows) for name in ("bare", "served")},
                "ratio, median (range)": "{:.2f} ({:.2f} to {:.2f})".format(
                    median(row["ratio"] for row in rows),
                    min(row["ratio"] for row in rows),
                    max(row["ratio"] for row in rows),
                ),
                "asked": FIGURES[figure][1],
            }
            for figure, rows in result.items()
        ],
    )
    common.write("serving", result)


if __name__ == "__main__":
    main()
