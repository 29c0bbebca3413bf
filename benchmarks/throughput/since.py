"""`make bench` of an earlier commit and of this tree by turns: `python -m benchmarks.throughput.since COMMIT`.

Each figure of `preprocessing`, and training of the preset `small`, runs in the tree of that commit and in this one, one
after the other, as often as --rounds says; the first one changes. The ratio is that of each pair. One JSON file a pair
in benchmarks/results/since; a pair that has one is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common
from benchmarks.common import REPOSITORY, SHARED, table, timed

RESULTS = common.RESULTS / "since"
FIGURES = ("training", "decode", "long", "batches", "added", "rows")
TRAINING = ("small", "112", "16", "8", "12")  # preset, side, frames, clips a step, steps


def figures_of(tree: Path, figure: str) -> dict[str, float]:
    """What is measured → seconds, or clips a second."""
    modules = tree / "benchmarks"
    if figure == "training":
        module = "benchmarks.peers.article" if (modules / "peers").is_dir() else "benchmarks.article"
        done = timed([sys.executable, "-m", module, "--child", *TRAINING], tree, PYTHONPATH=str(tree)).json()
        return {"training step of 8 clips of 16x112x112, preset small: s": median(done["seconds"])}
    module = "benchmarks.throughput.preprocessing" if (modules / "throughput").is_dir() else "benchmarks.preprocessing"
    timed([sys.executable, "-m", module, "--only", figure, "--rounds", "1"], tree, PYTHONPATH=str(tree))
    rows = json.loads((modules / "results" / "preprocessing.json").read_text(encoding="utf-8"))["result"]
    return {row["figure"]: row["ours"] for row in rows}


def summary(folder: Path) -> None:
    """Prints the table of medians."""
    pairs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    names = dict.fromkeys(name for pair in pairs for name in pair["now"] if name in pair["before"])
    rows: list[dict[str, Any]] = []
    for name in names:
        mine = [pair for pair in pairs if name in pair["now"] and name in pair["before"]]
        ratios = [pair["now"][name] / pair["before"][name] for pair in mine]
        rows.append(
            {
                "figure": name,
                "before": median(pair["before"][name] for pair in mine),
                "now": median(pair["now"][name] for pair in mine),
                "now / before": median(ratios),
                "of each pair": ", ".join(f"{ratio:.2f}" for ratio in ratios),
            }
        )
    table(f"before: {pairs[0]['commits'][0][:7]}", rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commit", help="the earlier one")
    options.add_argument("--only", nargs="*", choices=FIGURES, default=list(FIGURES))
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--minutes", type=float, default=14, help="begin no pair after so many [default: 14]")
    given = options.parse_args()
    end = time.monotonic() + given.minutes * 60
    commits = [
        subprocess.run(
            ["git", "-C", str(REPOSITORY), "rev-parse", given.commit], check=True, capture_output=True, text=True
        ).stdout.strip(),
        common.commit(REPOSITORY),
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sora-since-") as name:
        trees = {"before": common.tree_of(given.commit, Path(name) / "before"), "now": REPOSITORY}
        (Path(name) / "shared").symlink_to(SHARED.parent)  # benchmarks look for the footage beside their tree
        for number in range(given.rounds):
            for figure in given.only:
                file = RESULTS / f"{figure}-{number}.json"
                if file.exists() or time.monotonic() > end:
                    continue
                order = ("before", "now") if number % 2 else ("now", "before")
                pair = {which: figures_of(trees[which], figure) for which in order}
                file.write_text(json.dumps({"commits": commits, **pair}, indent=1) + "\n", encoding="utf-8")
                print(json.dumps({figure: pair}), flush=True)
    (common.RESULTS / "preprocessing.json").unlink(missing_ok=True)  # of one round: `make bench` has its own
    summary(RESULTS)


if __name__ == "__main__":
    main()
