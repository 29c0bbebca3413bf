"""The champion moves under load: `make bench-soak`, or `python -m benchmarks.serving.soak [--minutes 20]`.

16 clients ask without pause while `sora promote` and `sora rollback`, as a user types them, move the champion again and
again: version 1 → 2 → 1 → 3 → 1 → 2 …, so that each promotion is of a version that the server has to load, and each
rollback one to the version that it kept. The moment when the alias moves is seen by asking MLflow every 50 ms.

Asked: no request fails, none is answered by a version that was never champion or, begun after the first answer by the
new one, by the old; p99 of the requests during a swap (from the alias's move to the first answer by the new version) at
most 3 × p99 outside; a new version answers within 10 s, the previous one within the poll interval + 1 s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import common
from benchmarks.common import SORA, table
from benchmarks.serving.served import CLIENTS, arguments, clip_file, failures, serving, workplace
from sora.config import Project
from sora.operations.servers import login, running
from sora.registry import Registry

SLACK = 1.0  # seconds beyond the poll interval for the version that was kept


class Alias:
    """When the champion changed, as MLflow tells it."""

    def __init__(self, project: Project) -> None:
        self.moves: list[tuple[float, int]] = []  # (time.monotonic(), version)
        self._registry = Registry(running(project)["mlflow"].url, project.settings().name, login(project, "mlflow"))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            asked = time.monotonic()  # it may have moved since: the time until the answer counts against the server
            champion = self._registry.champion_ref()
            if champion and (not self.moves or self.moves[-1][1] != champion.version):
                self.moves.append((asked, champion.version))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def move(project: Path, *verb: str) -> dict[str, Any]:
    start = time.monotonic()
    done = subprocess.run([*SORA, *verb, "--json"], cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"sora {' '.join(verb)}: {done.stderr[-2000:]}")
    return {"verb": verb[0], "start": start, "end": time.monotonic(), **json.loads(done.stdout)}


def judged(rows: list[list[Any]], alias: list[tuple[float, int]], moves: list[dict[str, Any]]) -> dict[str, Any]:
    """What the soak is asked, from the requests, the alias's changes and the commands."""
    ends = sorted((start + seconds, start, version) for start, seconds, status, version in rows if status == 200)
    followed: dict[str, list[float]] = {"promote": [], "rollback": []}
    stale = 0
    swaps: list[tuple[float, float]] = []
    for number, (moved, version) in enumerate(alias[1:], 1):
        until = alias[number + 1][0] if number + 1 < len(alias) else float("inf")
        first = next((end for end, _, answered in ends if moved <= end < until and answered == version), None)
        verb = next(item["verb"] for item in moves if item["start"] <= moved <= item["end"])
        if first is None:
            followed[verb].append(float("inf"))
            continue
        followed[verb].append(first - moved)
        swaps.append((moved, first))
        stale += sum(first < start and end < until and answered != version for end, start, answered in ends)
    champions = {version for _, version in alias}

    def beside(spans: list[tuple[float, float]], start: float, seconds: float) -> bool:
        return any(start < last and first < start + seconds for first, last in spans)

    commands = [(item["start"], item["end"]) for item in moves]
    during = [seconds for start, seconds, *_ in rows if beside(swaps, start, seconds)]
    command = [seconds for start, seconds, *_ in rows if beside(commands, start, seconds)]
    outside = [seconds for start, seconds, *_ in rows if not beside(commands, start, seconds)]
    return {
        "requests": len(rows),
        "failed": sum(failures(rows).values()),
        "statuses": failures(rows),
        "by a version never champion": sum(answered not in champions for *_, answered in ends),
        "by the old version after the new one": stale,
        "promote": followed["promote"],
        "rollback": followed["rollback"],
        "p99 outside ms": p99(outside) * 1e3,
        "p99 during swaps ms": p99(during) * 1e3,
        "p99 while commands run ms": p99(command) * 1e3,
        "p50 outside ms": median(outside) * 1e3,
        "requests during swaps": len(during),
    }


def p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98]


def main() -> None:
    options = arguments(__doc__, "one with 3 versions")
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--moves", type=int, default=20, help="promotions, and as many rollbacks")
    given = options.parse_args()
    seconds = given.minutes * 60
    with workplace(given.project, versions=3) as (place, project):
        home = Project(project)
        video = clip_file(project)
        with serving(project, place / "serve.log") as server:
            server.until_ready()
            end = time.monotonic() + 120
            while "mlflow" not in running(home) and time.monotonic() < end:
                time.sleep(0.5)
            move(project, "promote", "1")
            alias = Alias(home)
            with (place / "rows.json").open("w") as out:
                command = [sys.executable, "-m", "benchmarks.serving.load", server.address, str(video)]
                loads = subprocess.Popen([*command, "--clients", str(CLIENTS), "--seconds", str(seconds)], stdout=out)
                start = time.monotonic()
                moves = []
                for number in range(2 * given.moves):
                    # Spread over the time, with something of no move between two.
                    time.sleep(max(5.0, start + seconds * (number + 0.5) / (2 * given.moves) - time.monotonic()))
                    verb = ("rollback",) if number % 2 else ("promote", str(2 + number // 2 % 2))
                    moves.append(move(project, *verb))
                    print(json.dumps(moves[-1]), flush=True)
                    if loads.poll() is not None:
                        break
                late = max(0.0, time.monotonic() - start - seconds)
                assert loads.wait(seconds + 120) == 0
            alias.close()
        rows = json.loads((place / "rows.json").read_text())["rows"]
    found = judged(rows, alias.moves, moves)
    during = found["p99 during swaps ms"]
    polled = home.settings().serve.poll_seconds
    table(
        f"{given.minutes:g} minutes, {CLIENTS} clients, {len(moves)} moves",
        [
            {"what": "requests", "value": found["requests"], "asked": ""},
            {"what": "failed", "value": found["failed"], "asked": "0"},
            {"what": "by a version never champion", "value": found["by a version never champion"], "asked": "0"},
            {
                "what": "by the old version after the new one",
                "value": found["by the old version after the new one"],
                "asked": "0",
            },
            *(
                {
                    "what": f"{verb}: alias moved → first answer, s, median (most) of {len(found[verb])}",
                    "value": f"{median(found[verb]):.1f} ({max(found[verb]):.1f})",
                    "asked": asked,
                }
                for verb, asked in (("promote", "≤ 10"), ("rollback", f"≤ {polled + SLACK:g}"))
                if found[verb]
            ),
            {"what": "p50 outside, ms", "value": found["p50 outside ms"], "asked": ""},
            {"what": "p99 outside, ms", "value": found["p99 outside ms"], "asked": ""},
            {
                "what": "p99 during swaps, ms",
                "value": f"{during:.0f} ({during / found['p99 outside ms']:.2f} ×)",
                "asked": "≤ 3 ×",
            },
            {
                "what": "p99 while promote and rollback run, ms",
                "value": found["p99 while commands run ms"],
                "asked": "",
            },
        ],
    )
    if late:
        print(f"\nthe moves took {late:.0f} s longer than the load")
    common.write("serving_soak", {**found, "minutes": given.minutes, "moves": len(moves), "late": late})


if __name__ == "__main__":
    main()
