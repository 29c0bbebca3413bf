"""What confined decoders cost against an earlier commit: `python -m benchmarks.confined [--before COMMIT]`.

- `manifest`: files of fights300 again and again, each of other bytes (some are appended), until all are in a manifest.
- `shards`: the clips of as many of them.
- `served`: one clip of one file through the server's pool of decoders.

Both trees run by turns in processes of their own, in one run; the ratio is of each pair, the table has medians.
`processor` is the same ratio of processor time, of the whole tree and its start: on a busy machine the one to read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common
from benchmarks.common import SHARED, table

REPOSITORY = Path(__file__).resolve().parent.parent
BEFORE = "b072ec4"  # the last commit whose workers decoded footage unconfined
FIGHTS = SHARED / "fights300"
# Run with either tree; prints seconds. The first argument is the folder, the second a file.
WORK = {
    "manifest": """
from pathlib import Path
import sys, time
from sora.data import manifest
from sora.settings import Settings
if __name__ == "__main__":
    began = time.perf_counter()
    found = manifest.build(Path(sys.argv[1]), Settings())
    print(time.perf_counter() - began)
    assert found["error"].isna().all()
    manifest.write(found, Path(sys.argv[3]))
""",
    "shards": """
from pathlib import Path
import sys, tempfile, time
from sora.data import manifest, shards
from sora.records import ClipSpec
if __name__ == "__main__":
    rows = manifest.read(Path(sys.argv[3]))
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        shards.build(rows, (), Path(sys.argv[1]), Path(out), ClipSpec())
        print(time.perf_counter() - began)
""",
    "served": """
from pathlib import Path
import asyncio, inspect, sys, tempfile, time
from sora.records import ClipSpec
from sora.serving.decoding import DecodePool
from sora.settings import Serve
async def main():
    with tempfile.TemporaryDirectory() as folder:
        few = len(inspect.signature(DecodePool).parameters) == 1
        pool = DecodePool(Serve(), *([] if few else [Path(folder)]))
        await pool.start()
        for _ in range(10):
            await pool.decode(Path(sys.argv[2]), ClipSpec())
        began = time.perf_counter()
        for _ in range(200):
            await pool.decode(Path(sys.argv[2]), ClipSpec())
        print((time.perf_counter() - began) / 200)
        await pool.close()
if __name__ == "__main__":
    asyncio.run(main())
""",
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
    script.write_text(WORK[work], encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(done.stdout.split()[-1]), spent


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
        old = work / "before"
        old.mkdir()
        tree = subprocess.run(
            ["git", "-C", str(REPOSITORY), "archive", given.before, "sora"], check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", str(old)], input=tree.stdout, check=True)
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
