"""Tiny projects in which faults strike: built once, with a champion, and copied for each case.

- `unchanged`: nothing changed since the last judged run.
- `new`: videos were added; a run does everything.
- `fitted`: as `new`, and a run was killed after its training; the next one goes on from there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from benchmarks.common import REPOSITORY, change_params
from benchmarks.faults.processes import Case, Verb, sora
from sora.config import Project
from sora.core.files import source_digest

SceneName = Literal["unchanged", "new", "fitted"]
LIMIT = 300.0  # seconds a verb may take on a busy machine
TINY: dict[str, dict[str, Any]] = {
    "split": {"group_pattern": r"(g\d+)_"},
    "clip": {"frames": 8, "height": 32, "width": 32, "flow": 0},
    "shards": {"buckets": 4, "workers": 1},
    "model": {"preset": "small", "low_filters": [16], "high_filters": [16], "key_frames": 2, "embedding": 16},
    "train": {"epochs": 2, "batch": 8},
    "gate": {"min_test": 2, "max_ece": 1.0},
}


@dataclass(frozen=True, slots=True)
class Scenes:
    """Folders to copy, and how long `sora run` takes in each on this machine, in seconds."""

    folder: Path
    seconds: dict[str, float]


def scenes_in(folder: Path) -> Scenes:
    """Those that were built in `folder` before by the same code, or new ones: for other code nothing is unchanged."""
    known = folder / "built.json"  # written last: what has none is not complete
    code = source_digest(REPOSITORY, ("sora", "flows"))
    if known.is_file():
        built = json.loads(known.read_text(encoding="utf-8"))
        if built["code"] == code:
            return Scenes(folder, built["seconds"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scenes = build(folder)
    known.write_text(json.dumps({"code": code, "seconds": scenes.seconds}), encoding="utf-8")
    return scenes


def build(folder: Path) -> Scenes:
    """Four runs, one of them killed. `folder` gets a project a scene.

    Raises:
        RuntimeError: a run did not end well without any fault.
    """
    case = Case(folder / "building")
    try:
        footage(case.folder / "footage", range(6))
        _well(sora_init(case))
        change_params(case.root, **TINY)
        result = _well(sora(case, "run", "--json", seconds=LIMIT)).json()
        if result["outcome"] != "promoted":
            _well(sora(case, "promote", str(result["version"]), seconds=LIMIT))
        shutil.copytree(case.root, folder / "unchanged", symlinks=True)
        unchanged = _well(sora(case, "run", "--json", seconds=LIMIT)).seconds
        footage(case.root / "data", range(6, 7))
        shutil.copytree(case.root, folder / "new", symlinks=True)
        with Verb(case, "run", "--json") as verb:
            wait_for_step(case, verb, "fit")
            until_fit = verb.seconds
            verb.process.kill()
        case.end()
        shutil.copytree(case.root, folder / "fitted", symlinks=True)
        rest = _well(sora(case, "run", "--json", seconds=LIMIT)).seconds
    finally:
        case.end()
        shutil.rmtree(case.folder, ignore_errors=True)
    # What a run spends on its start is in both halves of the killed one.
    return Scenes(folder, {"unchanged": unchanged, "new": until_fit + max(rest - unchanged, 0.0), "fitted": rest})


@contextmanager
def case_of(scenes: Scenes, scene: str, folder: Path, out: Path | None = None) -> Iterator[Case]:
    """A copy of a scene in the new folder `folder`; at the end its processes are killed and the folder is removed."""
    case = Case(folder, out)
    try:
        shutil.copytree(scenes.folder / scene, case.root, symlinks=True)
        yield case
    finally:
        case.end()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(case.out, ignore_errors=True)


def wait_for_step(case: Case, verb: Verb, step: str, seconds: float = LIMIT) -> None:
    """Until the run has noted a step of its work folder as done."""
    until = time.monotonic() + seconds
    while verb.running and time.monotonic() < until:
        if any(f'"{step}"' in file.read_text() for file in Project(case.root).work.glob("*/steps.json")):
            return
        time.sleep(0.02)
    raise RuntimeError(f"step {step} was not reached:\n{verb.err[-3000:]}")


def sora_init(case: Case) -> Verb:
    case.root.mkdir()
    return sora(case, "init", str(case.root), "--data", str(case.folder / "footage"), seconds=LIMIT)


def footage(folder: Path, groups: range) -> None:
    """`folder/<class>/g<group>_<n>.mp4`: two classes that brightness tells apart, two videos a group."""
    for number, (label, brightness) in enumerate({"dark": 60, "light": 190}.items()):
        for group in groups:
            for take in range(2):
                seed = number * 1000 + group * 10 + take
                _video(folder / label / f"g{group:02d}_{take}.mp4", seed, brightness)


def _video(path: Path, seed: int, brightness: int, size: tuple[int, int] = (64, 48), frames: int = 16) -> None:
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-40, 40, (6, 8, 3))
    picture = np.kron(coarse, np.ones((height // 6 + 1, width // 8 + 1, 1)))[:height, :width] + brightness
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, 12)
        for index in range(frames):
            image = np.roll(picture, 2 * index, axis=1).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _well(verb: Verb) -> Verb:
    if verb.process.returncode:
        raise RuntimeError(f"`sora {' '.join(verb.arguments)}` without a fault:\n{verb.err[-3000:]}")
    return verb
