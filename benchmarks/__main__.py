"""The speed benchmarks of preprocessing, loading and training in one run: `make bench`, `python -m benchmarks`.

Under 20 minutes on 2 quiet cores. One table, benchmarks/results/bench.json, docs/images/throughput.png. Others take
longer or need more: `benchmarks.accuracy` and `benchmarks.peers` (hours), `benchmarks.serving`, `benchmarks.faults`.
"""

from __future__ import annotations

import argparse

from benchmarks import common
from benchmarks.peers import article
from benchmarks.throughput import preprocessing


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    result = preprocessing.measure(list(preprocessing.FIGURES), given.rounds) + article.measure()
    sizes = article.by_size()
    article.plot(sizes, common.IMAGES / "throughput.png")
    preprocessing.show(result)
    common.table("training throughput by clip size, 8 clips a step", sizes)
    common.write("bench", {"figures": result, "throughput": sizes})


if __name__ == "__main__":
    main()
