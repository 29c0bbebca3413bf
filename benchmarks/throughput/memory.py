"""Peak memory with 300 and with 3,000 videos: it must not grow with their number.

`python -m benchmarks.throughput.memory [--small 300 --large 3000]`. The videos are one short clip remuxed with another
title each (other bytes, the same picture; the duplicate rules are off).
Each step runs as the pipeline runs it, one epoch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import av

from benchmarks import common
from benchmarks.common import SHARED, SORA, change_params, table, timed


def remux(source: Path, target: Path, title: str) -> None:
    """The same packets in a new container with a title of its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        made.metadata["title"] = title
        streams = {s.index: made.add_stream_from_template(s) for s in given.streams.video}
        for packet in given.demux(list(given.streams.video)):
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)


def make(folder: Path, number: int) -> Path:
    """`number` distinct videos of two classes and 30 groups."""
    sources = sorted((SHARED / "fights300").glob("*/*.mp4"))
    small = sorted(sources, key=lambda p: p.stat().st_size)[:20]
    for index in range(number):
        source = small[index % len(small)]
        remux(source, folder / source.parent.name / f"g{index % 30:02d}_{index:05d}.mp4", f"copy {index}")
    return folder


def measure(number: int) -> dict[str, float | int]:
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        place = Path(name)
        project = place / "project"
        timed([*SORA, "init", str(project), "--data", str(make(place / "footage", number))], place)
        change_params(
            project,
            validate={"duplicates": False},
            split={"group_pattern": "(g[0-9]+)_"},
            clip={"frames": 16, "height": 64, "width": 64, "flow": 0},
            model={"preset": "small"},
            train={"epochs": 1},
        )
        check = timed([*SORA, "check", "--json"], project, ok=(0, 1), memory=True)
        run = timed([*SORA, "run", "--json"], project, memory=True)
        return {
            "videos": number,
            "check: peak MB": check.peak / 1e6,
            "run: peak MB": run.peak / 1e6,
            "check: s": check.seconds,
            "run: s": run.seconds,
        }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--small", type=int, default=300)
    options.add_argument("--large", type=int, default=3000)
    given = options.parse_args()
    rows = [measure(given.small), measure(given.large)]
    table("Peak anonymous memory of the process tree, servers included", rows)
    common.write("memory", rows)


if __name__ == "__main__":
    main()
