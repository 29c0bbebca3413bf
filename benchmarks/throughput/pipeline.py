"""What the pipeline costs over its bare stages, and a run with nothing changed.

`python -m benchmarks.throughput.pipeline [--epochs N]`: on fights300. Bare: the three stages, training and evaluation
called one after the other in processes of their own, with no DVC, no Prefect, no MLflow. Pipeline: `sora run` from the
same start, once with the servers that it starts and ends itself, once under `sora up` as every nightly runs. Then
`sora run` again with nothing changed, with servers up and without.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.common import SHARED, SORA, change_params, table, timed
from sora.config import Project
from sora.operations import servers as services


def bare(project: Path) -> dict[str, float]:
    """Seconds of each stage by itself."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom sora.config import Project\n"
        "from benchmarks.throughput.bare import learn\nlearn(Project(Path(sys.argv[1])))"
    )
    spent = {}
    for stage in ("manifest", "validate", "shards"):
        spent[stage] = timed([sys.executable, "-m", "sora.stages", stage], project).seconds
    root = str(common.REPOSITORY)
    spent["fit and evaluate"] = timed([sys.executable, "-c", code, str(project)], project, PYTHONPATH=root).seconds
    return spent


@contextmanager
def up(project: Path) -> Iterator[None]:
    """`sora up`, its servers ready."""
    process = subprocess.Popen(
        [*SORA, "up", "--prefect-port", "0", "--mlflow-port", "0", "--api-port", "0"],
        cwd=project,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if {"prefect", "mlflow"} <= services.running(Project(project)).keys():
                break
            time.sleep(1)
        time.sleep(30)  # the worker and the API start after them
        yield
    finally:
        process.terminate()
        process.wait(60)


def unchanged(project: Path, times: int = 3) -> dict[str, float]:
    alone = [timed([*SORA, "run", "--json"], project) for _ in range(times)]
    assert all(done.json()["outcome"] == "unchanged" for done in alone)
    with up(project):
        served = [timed([*SORA, "run", "--json"], project) for _ in range(times)]
    assert all(done.json()["outcome"] == "unchanged" for done in served)
    return {
        "without servers": median(done.seconds for done in alone),
        "servers up": median(done.seconds for done in served),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--epochs", type=int, help="[default: params.yaml's]")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        place = Path(name)
        first, second, third = place / "bare", place / "pipeline", place / "nightly"
        timed([*SORA, "init", str(first), "--data", str(SHARED / "fights300")], place)
        if given.epochs:
            change_params(first, train={"epochs": given.epochs, "patience": given.epochs})
        for other in (second, third):
            shutil.copytree(first, other)
        stages = bare(first)
        run = timed([*SORA, "run", "--json"], second)
        with up(third):
            night = timed([*SORA, "run", "--json"], third)
        result = json.loads(run.out)
        alone = sum(stages.values())
        rows = [{"what": stage, "s": seconds} for stage, seconds in stages.items()]
        rows += [
            {"what": "bare stages together", "s": alone},
            {"what": "sora run, servers of its own", "s": run.seconds},
            {"what": "overhead", "s": f"{run.seconds / alone - 1:.1%}"},
            {"what": "sora run under sora up", "s": night.seconds},
            {"what": "overhead", "s": f"{night.seconds / alone - 1:.1%}"},
        ]
        idle = unchanged(second)
        rows += [{"what": f"sora run, nothing changed, {how} (median of 3)", "s": s} for how, s in idle.items()]
    table("fights300, 2 cores", rows)
    common.write("pipeline", {"rows": rows, "outcome": result})


if __name__ == "__main__":
    main()
