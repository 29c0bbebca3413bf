"""What confined decoders cost against an earlier commit: `python -m benchmarks.throughput.confined [--before COMMIT]`.

- `manifest`: files of fights300 again and again, each of other bytes (some are appended), until all are in a manifest.
- `shards`: the clips of as many of them.
- `served`: one clip of one file, again and again, through the server's pool of decoders.

Both trees run by turns in processes of their own, in one run; the ratio is of each pair, the table has medians. The
start of processes (the first files) is left out, so that the ratio is that of a folder of any size. `processor` is the
ratio of processor time, of parent and decoders: on a busy machine the one to read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common
from benchmarks.common import REPOSITORY, SHARED, table

BEFORE = "b072ec4"  # the last commit whose workers decoded footage unconfined
FIGHTS = SHARED / "fights300"
SKIPPED = 20  # files, until all decoders have started
# Run with either tree; prints seconds by the clock and of processor time. Arguments: folder, file, manifest.
SPENT = """
from pathlib import Path
import asyncio, inspect, sys, tempfile, time
import psutil
def spent():
    processes = [psutil.Process(), *psutil.Process().children()]
    return time.perf_counter(), sum(sum(process.cpu_times()[:2]) for process in processes)
marks = {}
def progress(done, total):
    if done in (SKIPPED, total):
        marks[done] = spent()
def told():
    (began, used), (ended, more) = list(marks.values())[:2]
    print(ended - began, more - used)
"""
WORK = {
    "manifest": """
from sora.dataset import manifest
from sora.config import Settings
if __name__ == "__main__":
    found = manifest.build(Path(sys.argv[1]), Settings(), progress=progress)
    told()
    assert found["error"].isna().all()
    manifest.write(found, Path(sys.argv[3]))
""",
    "shards": """
from sora.dataset import manifest; from sora.store import building
from sora.core.records import ClipSpec
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        rows = manifest.read(Path(sys.argv[3]))
        building.build(rows, (), Path(sys.argv[1]), Path(out), ClipSpec(), progress=progress)
    told()
""",
    "served": """
from sora.core.records import ClipSpec
from sora.serving.decode_pool import DecodePool
from sora.config import Serve
async def main():
    with tempfile.TemporaryDirectory() as folder:
        few = len(inspect.signature(DecodePool).parameters) == 1
        pool = DecodePool(Serve(), *([] if few else [Path(folder)]))
        await pool.start()
        for number in range(TIMES + SKIPPED):
            await pool.decode(Path(sys.argv[2]), ClipSpec())
            progress(number + 1, TIMES + SKIPPED)
        await pool.close()
    told()
if __name__ == "__main__":
    asyncio.run(main())
""",
}
TIMES = 200  # of the file that is served
# Where the modules lay before the rooms: text of a script → text for that tree.
LAY = {
    "sora.dataset": "sora.data",
    "sora.store": "sora.data",
    "sora.config": "sora.settings",
    "sora.core.records": "sora.records",
    "sora.serving.decode_pool": "sora.serving.decoding",
}


def copies(folder: Path, count: int) -> Path:
    """`count` small files of other bytes each; returns one."""
    small = sorted((p for p in FIGHTS.rglob("*.mp4")), key=lambda p: (p.stat().st_size, p.name))[:100]
    for number in range(count):
        target = folder / small[number % 100].parent.name / f"{number:05d}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        # A box that every reader skips.
        target.write_bytes(small[number % 100].read_bytes() + b"\0\0\0\x10free" + number.to_bytes(8, "big"))
    return next(folder.rglob("00000.mp4"))


def seconds(tree: Path, work: str, *arguments: Path) -> tuple[float, float]:
    """(by the clock, of processor time)."""
    script = arguments[-1].with_name(f"{work}.py")
    head = SPENT.replace("SKIPPED", str(SKIPPED))
    text = head + WORK[work].replace("TIMES", str(TIMES)).replace("SKIPPED", str(SKIPPED))
    if not (tree / "sora" / "core").is_dir():
        for now, then in LAY.items():
            text = text.replace(now, then)
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    wall, spent = done.stdout.split()[-2:]
    return float(wall), float(spent)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--before", default=BEFORE)
    options.add_argument("--files", type=int, default=1500)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=sorted(WORK), default=list(WORK))
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        work = Path(name)
        old = common.tree_of(given.before, work / "before", "sora")
        one = copies(work / "data", given.files)
        for what in given.only:
            pairs = []
            for number in range(given.rounds):
                trees = [("before", old), ("now", REPOSITORY)]
                pair = {
                    name: seconds(place, what, work / "data", one, work / f"{name}.parquet")
                    for name, place in (trees if number % 2 else trees[::-1])
                }
                (new, new_spent), (earlier, earlier_spent) = pair["now"], pair["before"]
                pairs.append(
                    {
                        "before": earlier,
                        "now": new,
                        "ratio": new / earlier,
                        "processor before": earlier_spent,
                        "processor now": new_spent,
                        "processor": new_spent / earlier_spent,
                    }
                )
                print(json.dumps({what: pairs[-1]}), flush=True)
            middle = {key: median(pair[key] for pair in pairs) for key in pairs[0]}
            rows.append({"work": what, **middle, "rounds": pairs})
    table(
        "confined decoders",
        [{key: row[key] for key in ("work", "before", "now", "ratio", "processor")} for row in rows],
    )
    common.write("confined", {"files": given.files, "before": given.before, "rows": rows})


if __name__ == "__main__":
    main()
