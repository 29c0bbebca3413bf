"""The main job on real footage, from folder to served model: what came out, as a table for docs/RESULTS.md.

`python -m benchmarks.accuracy.life sets` runs `sora init` and `sora run` on steps27 (grouped by person), kth9 and
fights300. `python -m benchmarks.accuracy.life grow` gives a project fights300 in four parts, a night each, under
`sora up`: the decision of each night, how long the server took to follow, then a rollback. Outcomes are reported as
they fall.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import SHARED, SORA, change_params, table, timed

SETS: dict[str, dict[str, dict[str, Any]]] = {
    "steps27": {"split": {"group_pattern": r"A\dP(\d)T"}},
    "kth9": {"split": {"group_pattern": r"person(\d+)"}, "clip": {"sampling": "window", "window_seconds": 2.0}},
    "fights300": {},
}


def sets(place: Path, chosen: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in chosen:
        project = place / name
        timed([*SORA, "init", str(project), "--data", str(SHARED / name)], place)
        change_params(project, **SETS[name])
        check = timed([*SORA, "check", "--json"], project, ok=(0, 1)).json()
        run = timed([*SORA, "run", "--json"], project)
        result = run.json()
        rows.append(
            {
                "set": name,
                "videos": check["videos"],
                "quarantined": len(check["rejected"]),
                "outcome": result["outcome"],
                "test accuracy": result["metrics"]["test/accuracy"],
                "macro-F1": result["metrics"]["test/macro_f1"],
                "ECE": result["metrics"]["test/ece"],
                "s": run.seconds,
                "reasons": "; ".join(result["reasons"]),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def part_of(group: str, path: str, parts: int) -> int:
    """Whole groups go to one part; spread by a hash of the name."""
    import hashlib

    return int(hashlib.sha256((group or path).encode()).hexdigest(), 16) % parts


def grow(place: Path, epochs: int | None, parts: int = 4) -> list[dict[str, Any]]:
    with (SHARED / "fights300" / "labels.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    first = place / "first"
    give(first, [row for row in listed if part_of(row["group"], row["path"], parts) == 0])
    project = place / "growing"
    timed([*SORA, "init", str(project), "--data", str(first)], place)
    if epochs:
        change_params(project, train={"epochs": epochs})
    up = subprocess.Popen(
        [*SORA, "up", "--prefect-port", "0", "--mlflow-port", "0", "--api-port", "8123"],
        cwd=project,
        stdout=(place / "up.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    rows: list[dict[str, Any]] = []
    try:
        wait_for("http://127.0.0.1:8123/healthz", 180)
        for night in range(parts):
            if night:
                known = [row for row in listed if part_of(row["group"], row["path"], parts) <= night]
                give(project / "data", known)
            run = timed([*SORA, "run", "--json"], project)
            result = run.json()
            champion = [
                v["version"] for v in timed([*SORA, "models", "--json"], project).json() if "champion" in v["aliases"]
            ]
            rows.append(
                {
                    "night": night + 1,
                    "videos": sum(1 for _ in (project / "data").rglob("*.mp4")),
                    "outcome": result["outcome"],
                    "version": result["version"],
                    "test accuracy": result["metrics"]["test/accuracy"],
                    "champion": champion[0] if champion else None,
                    "served": followed(champion[0] if champion else None),
                    "s": run.seconds,
                    "reasons": "; ".join(result["reasons"]),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        back = timed([*SORA, "rollback", "--json"], project, ok=(0, 1))
        if back.code == 0:
            moved = back.json()
            rows.append(
                {
                    **dict.fromkeys(rows[0], ""),
                    "night": "rollback",
                    "champion": moved["champion"],
                    "served": followed(moved["champion"]),
                    "s": back.seconds,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        else:
            print("rollback:", back.err)
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(60)
    return rows


def give(folder: Path, rows: list[dict[str, str]]) -> None:
    """The listed videos and their labels.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        target = folder / row["path"]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SHARED / "fights300" / row["path"], target)
            os.chmod(target, 0o644)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "group"])
        writer.writeheader()
        writer.writerows(rows)


def wait_for(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def followed(champion: int | None, seconds: float = 60) -> str:
    """How long until the server answers by `champion`, in words."""
    if champion is None:
        return "no champion"
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8123/v1/model", timeout=5) as answer:
                if json.load(answer)["version"] == champion:
                    return f"{champion}, seen {time.monotonic() - began:.1f} s after the command ended"
        except OSError:
            pass
        time.sleep(0.2)
    return "not followed"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=["sets", "grow"])
    options.add_argument("names", nargs="*", help="of sets; all when none is named")
    options.add_argument("--epochs", type=int, help="of `grow` [default: params.yaml's]")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        place = Path(name)
        rows = sets(place, given.names or list(SETS)) if given.what == "sets" else grow(place, given.epochs)
    table(f"life: {given.what}", rows)
    common.write("_".join(["life", given.what, *given.names]), rows)


if __name__ == "__main__":
    main()
