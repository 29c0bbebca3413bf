"""What the pipeline costs over its bare stages, and a run with nothing changed.

`python -m benchmarks.pipeline [--epochs N]`: on fights300. Bare: the three stages, training and evaluation called one
after the other in processes of their own, with no DVC, no Prefect, no MLflow. Pipeline: `sora run` from the same start,
servers and their start included. Then `sora run` again with nothing changed, with servers up and without.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.common import SHARED, SORA, change_params, table, timed

HEAVY = ("tensorflow", "keras", "great_expectations")


def bare(project: Path) -> dict[str, float]:
    """Seconds of each stage by itself."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom sora.settings import Project\n"
        "from benchmarks.bare import learn\nlearn(Project(Path(sys.argv[1])))"
    )
    spent = {}
    for stage in ("manifest", "validate", "shards"):
        spent[stage] = timed([sys.executable, "-m", "sora.stages", stage], project).seconds
    root = str(Path(__file__).resolve().parent.parent)
    spent["fit and evaluate"] = timed([sys.executable, "-c", code, str(project)], project, PYTHONPATH=root).seconds
    return spent


def unchanged(project: Path, times: int = 3) -> dict[str, float]:
    alone = [timed([*SORA, "run", "--json"], project) for _ in range(times)]
    assert all(done.json()["outcome"] == "unchanged" for done in alone)
    up = subprocess.Popen(
        [*SORA, "up", "--prefect-port", "0", "--mlflow-port", "0", "--api-port", "0"],
        cwd=project,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            checks = timed([*SORA, "doctor", "--json"], project, ok=(0, 1)).json()["checks"]
            if all(check["ok"] for check in checks if check["name"] in ("prefect", "mlflow", "api")):
                break
            time.sleep(1)
        served = [timed([*SORA, "run", "--json"], project) for _ in range(times)]
    finally:
        up.terminate()
        up.wait(60)
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
        first, second = place / "bare", place / "pipeline"
        timed([*SORA, "init", str(first), "--data", str(SHARED / "fights300")], place)
        if given.epochs:
            change_params(first, train={"epochs": given.epochs, "patience": given.epochs})
        shutil.copytree(first, second)
        stages = bare(first)
        run = timed([*SORA, "run", "--json"], second)
        result = json.loads(run.out)
        alone = sum(stages.values())
        rows = [{"what": stage, "s": seconds} for stage, seconds in stages.items()]
        rows += [
            {"what": "bare stages together", "s": alone},
            {"what": "sora run", "s": run.seconds},
            {"what": "overhead", "s": f"{run.seconds / alone - 1:.1%}"},
        ]
        idle = unchanged(second)
        rows += [{"what": f"sora run, nothing changed, {how} (median of 3)", "s": s} for how, s in idle.items()]
    table("fights300, 2 cores", rows)
    common.write("pipeline", {"rows": rows, "outcome": result})


if __name__ == "__main__":
    main()
