"""A hundred faults at random moments, and what holds after each: `make faults ARGS="--minutes 10"`.

A case copies a tiny project, starts `sora run` (or `up`), strikes at a moment drawn from the length that a run without
fault takes on this machine, runs `sora run` again, and looks at the invariants (`benchmarks.faults.invariants`). Fault,
scene and moment come from the case's number and `--seed`. `sora reproduce` costs as much as all the rest, so only every
fifth case does it. One JSON file a case in benchmarks/results/faults; a case that has one is not repeated.

`--summary` prints the table for docs/RESULTS.md and ends with 1 where an invariant was broken.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import common
from benchmarks.common import table
from benchmarks.faults.inject import FAULTS, Struck, small_disk
from benchmarks.faults.invariants import Finding, check
from benchmarks.faults.processes import Verb, sora
from benchmarks.faults.scenes import LIMIT, Scenes, case_of, scenes_in
from sora.core.errors import SoraError

RESULTS = common.RESULTS / "faults"
CASES = 100
# How many of a hundred.
SHARES = {
    "kill one process of run": 34,
    "kill all of run": 14,
    "kill one process of up": 6,
    "kill all of up": 4,
    "disk full": 14,
    "mlflow away": 5,
    "mlflow answers 500": 5,
    "prefect away": 5,
    "prefect answers 500": 5,
    "clock a day off": 8,
}
SCENES = {"fitted": 5, "new": 3, "unchanged": 2}
REPRODUCE_EVERY = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen in one case."""

    number: int
    seed: int
    fault: str
    scene: str
    share: float  # of the length of a run at which it strikes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it; one file."""

    plan: Plan
    moment: float  # seconds after the start of the verb that was struck
    length: float  # seconds that a run takes in this scene without a fault
    victims: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float
    commit: str

    @property
    def broken(self) -> list[Finding]:
        return [one for one in self.findings if not one.ok]


def plan(number: int, seed: int) -> Plan:
    """The same for the same number and seed, whatever was run before."""
    faults = [name for name, count in SHARES.items() for _ in range(count)]
    random.Random(seed).shuffle(faults)
    chance = random.Random(f"{seed}/{number}")
    scene = chance.choices(list(SCENES), list(SCENES.values()))[0]
    return Plan(number, seed, faults[number % len(faults)], scene, chance.random())


def one(wanted: Plan, scenes: Scenes, place: Path, commit: str) -> Outcome:
    began = time.monotonic()
    length = scenes.seconds[wanted.scene]
    moment = wanted.share * length
    folder = place / f"case-{wanted.number:03d}"
    with ExitStack() as stack:
        if wanted.fault == "disk full":
            stack.enter_context(small_disk(folder))
            # What commands print goes elsewhere, or their message about the full disk would find no room itself.
            case = stack.enter_context(case_of(scenes, wanted.scene, folder / "case", out=place / f"{folder.name}-out"))
        else:
            case = stack.enter_context(case_of(scenes, wanted.scene, folder))
        try:
            struck = FAULTS[wanted.fault](case, moment, random.Random(f"{wanted.seed}/{wanted.number}/fault"))
        except (RuntimeError, SoraError) as error:  # `up` or a server did not come up, or not again
            struck = Struck((), Finding("struck", False, str(error)[-600:]))
            case.end()
        again = sora(case, "run", "--json", seconds=LIMIT)
        findings = [struck.first, _ran(again)]
        held = check(
            case,
            had_champion=True,
            reproduce=wanted.number % REPRODUCE_EVERY == 0,
            finished=again.process.returncode == 0,
        )
        victims = struck.victims
        findings += held.findings
    return Outcome(wanted, moment, length, victims, tuple(findings), time.monotonic() - began, commit)


def _ran(again: Verb) -> Finding:
    code = again.process.returncode
    return Finding("run again", code == 0, f"ended with {code}" + ("" if code == 0 else f": {again.err[-600:]}"))


def write(outcome: Outcome, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    value = {**asdict(outcome), "broken": [item.what for item in outcome.broken]}
    for name in ("moment", "length", "seconds"):
        value[name] = round(value[name], 2)
    target = folder / f"{outcome.plan.number:03d}.json"
    draft = target.with_suffix(".part")
    # Commands name packages by where this machine has them; a result is committed.
    text = re.sub(r"/[^\s\"]*/(?=site-packages/)", "", json.dumps(value, indent=1))
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(target)


def summary(folder: Path) -> int:
    """Prints the table; 1 where an invariant was broken."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("[0-9]*.json"))]
    if not found:
        print(f"no results in {folder}")
        return 1
    rows: list[dict[str, Any]] = []
    for fault in SHARES:
        cases = [item for item in found if item["plan"]["fault"] == fault]
        if not cases:
            continue
        broken = sorted({name for item in cases for name in item["broken"]})
        rows.append(
            {
                "fault": fault,
                "cases": len(cases),
                "struck": sum(item["victims"][:1] != ["none: it had ended"] for item in cases),
                "all held": sum(not item["broken"] for item in cases),
                "reproduced": sum(
                    any(f["what"] == "reproduce" and f["ok"] for f in item["findings"]) for item in cases
                ),
                "s a case": sum(item["seconds"] for item in cases) / len(cases),
                "broken": "; ".join(broken) or "–",
            }
        )
    table(f"{len(found)} faults at random moments", rows)
    for item in found:
        where = f"{item['plan']['fault']}, {item['plan']['scene']}, at {item['moment']} s"
        for finding in (f for f in item["findings"] if not f["ok"]):
            print(f"\ncase {item['plan']['number']} ({where}): {finding['what']}: {finding['detail']}")
    return int(any(item["broken"] for item in found))


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does: through every block that cleans up. A second one does not disturb that."""
    known = (signal.SIGTERM, signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        for one_signal in known:
            signal.signal(one_signal, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, stop)) for number in known]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10, help="begin no case after so many [default: 10]")
    options.add_argument("--next", type=int, metavar="N", help="so many cases at most")
    options.add_argument("--every", default="0/1", metavar="K/N", help="only the cases K, K+N, K+2N …: several at once")
    options.add_argument("--case", type=int, metavar="NUMBER", help="this one only, again, and keep no result")
    options.add_argument("--seed", type=int, default=12)
    options.add_argument("--scenes", type=Path, help="keep the built projects here for the next piece")
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--summary", action="store_true")
    given = options.parse_args()
    if given.summary:
        return summary(given.results)
    end = time.monotonic() + given.minutes * 60
    first, step = (int(part) for part in given.every.split("/"))
    missing = [n for n in range(first, CASES, step) if not (given.results / f"{n:03d}.json").exists()]
    numbers = [given.case] if given.case is not None else missing[: given.next]
    if not numbers:
        print("all cases have a result")
        return 0
    commit = common.commit(common.REPOSITORY)
    broken = 0
    with _stoppable(), tempfile.TemporaryDirectory(prefix="sora-faults-") as name:
        place = Path(name)
        try:
            scenes = scenes_in(given.scenes or place / "scenes")
            for number in numbers:
                if time.monotonic() > end:
                    break
                outcome = one(plan(number, given.seed), scenes, place, commit)
                if given.case is None:
                    write(outcome, given.results)
                broken += bool(outcome.broken)
                where = f"{outcome.plan.scene} at {outcome.moment:.1f} of {outcome.length:.1f} s"
                how = "BROKEN" if outcome.broken else "all held"
                victims = ", ".join(outcome.victims)[:60]
                print(
                    f"{number:3d} {outcome.plan.fault} / {where} ({victims}), {outcome.seconds:.0f} s: {how}",
                    flush=True,
                )
                for item in outcome.broken:
                    print(f"      {item.what}: {item.detail}", flush=True)
        except KeyboardInterrupt:
            print("stopped; what has a result is kept", file=sys.stderr)
            return 130
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
