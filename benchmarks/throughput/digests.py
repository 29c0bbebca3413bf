"""What the digests of shards cost: `python -m benchmarks.throughput.digests [--footage FOLDER] [--rounds N]`.

- GB/s of the digests that Python has, over one clip of 16x112x112 on one core;
- reading and comparing the whole shard set of the footage, as a build does before it keeps a bucket, beside making it;
- one pass over all clips in batches of 16, compared with their digests and not, as the first epoch and the later ones.

What is compared takes turns; the table has medians. Files are in the page cache: a disk adds its own time either way.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import SHARED, table
from benchmarks.throughput.preprocessing import BATCH, spent
from sora.config import Settings
from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO
from sora.dataset import manifest
from sora.store import building
from sora.store.shards import ShardSet

REPEATS = 300  # of one clip, for the digests by themselves


def digests(spec: ClipSpec, rounds: int) -> dict[str, float]:
    """Name → GB/s on one core."""
    clip = np.random.default_rng(0).bytes(spec.frames * spec.height * spec.width * 3)
    ways: dict[str, Callable[[bytes], Any]] = {
        "sha256": lambda data: hashlib.sha256(data).digest(),
        "blake2b": lambda data: hashlib.blake2b(data, digest_size=16).digest(),
        "md5": lambda data: hashlib.md5(data).digest(),
        "crc32": zlib.crc32,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(spent(lambda way=way: [way(clip) for _ in range(REPEATS)]))  # type: ignore[misc]
    return {name: REPEATS * len(clip) / median(values) / 1e9 for name, values in seconds.items()}


def one_pass(found: ShardSet) -> None:
    order = np.random.default_rng(0).permutation(len(found))
    for start in range(0, len(order), BATCH):
        found.read(VIDEO, order[start : start + BATCH])


def stored(footage: Path, rounds: int) -> dict[str, float]:
    """Seconds over the footage's shard set, and its size."""
    settings = Settings()
    with tempfile.TemporaryDirectory(prefix="sora-digests-") as folder:
        out = Path(folder) / "shards"
        rows = manifest.build(footage, settings)
        made = spent(lambda: building.build(rows, (), footage, out, settings.clip.spec()))
        size = sum(file.stat().st_size for file in out.iterdir())
        one_pass(ShardSet.open(out))  # into the page cache
        seconds: dict[str, list[float]] = {"damage": [], "first": [], "later": []}
        for _ in range(rounds):
            found = ShardSet.open(out)
            seconds["damage"].append(spent(found.damage))
            seconds["first"].append(spent(lambda found=found: one_pass(found)))  # type: ignore[misc]
            seconds["later"].append(spent(lambda found=found: one_pass(found)))  # type: ignore[misc]
        return {"clips": len(found), "gigabytes": size / 1e9, "made": made} | {
            name: median(values) for name, values in seconds.items()
        }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--footage", type=Path, default=SHARED / "fights300")
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args()
    rates = digests(Settings().clip.spec(), given.rounds)
    cost = stored(given.footage, given.rounds)
    table("digests, one core", [{"digest": name, "GB/s": f"{rate:.2f}"} for name, rate in rates.items()])
    table(f"the shards of {given.footage.name}", [{name: f"{value:.3f}" for name, value in cost.items()}])
    common.write("digests", {"gigabytes_per_second": rates, "shards": {"footage": given.footage.name, **cost}})


if __name__ == "__main__":
    main()
