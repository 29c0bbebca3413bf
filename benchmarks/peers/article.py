"""The reference article's network and how fast it trains beside the presets: `python -m benchmarks.peers.article`.

The network as printed can't train (its residual blocks have no shortcut, its reshape gives 114,688 outputs a sample);
`network` is a fixed copy, its six convolutions and their full resolution as printed. It sees single frames, so a clip
costs it as many samples as it has frames. Both train on the same number of clips a step, of equal frames and size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import common
from benchmarks.common import table, timed
from sora.config import PRESETS

if TYPE_CHECKING:
    import keras

WIDTHS = (64, 128, 256)


def network(height: int, width: int, outputs: int = 2) -> keras.Model:
    """Two 3x3 convolutions of 64 filters, two of 128, two of 256, all at full resolution; the three levels side by side
    (448 channels); dense 1024, 512, outputs.

    Fixed: each pair has a shortcut (1x1), and the levels are averaged over the picture before the dense layers.

    Input shape: `(batch, height, width, 3)` uint8.
    Output shape: `(batch, outputs)` logits.
    """
    import keras
    from keras import layers

    frames = keras.Input((height, width, 3), dtype="uint8")
    x = layers.Rescaling(1 / 255)(frames)
    levels = []
    for filters in WIDTHS:
        inner = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        inner = layers.Conv2D(filters, 3, padding="same")(inner)
        x = layers.ReLU()(layers.Add()([inner, layers.Conv2D(filters, 1)(x)]))
        levels.append(x)
    x = layers.GlobalAveragePooling2D()(layers.Concatenate()(levels))
    for units in (1024, 512):
        x = layers.Dense(units, activation="relu")(x)
    return keras.Model(frames, layers.Dense(outputs)(x))


def flops(height: int, width: int) -> int:
    """Of one frame, 2 a multiply-add; the dense layers are nothing beside it."""
    total, before = 0, 3
    for filters in WIDTHS:
        total += 2 * height * width * filters * (9 * before + 9 * filters + before)
        before = filters
    return total


def step(which: str, size: int, frames: int, clips: int, steps: int) -> None:
    """In a process of its own: prints the seconds of each training step and the FLOPs of a clip."""
    import keras

    from sora.config import Model
    from sora.core.records import ClipSpec
    from sora.model import classifier, cost

    x = np.random.default_rng(0).integers(0, 255, (clips, frames, size, size, 3), np.uint8)
    y = np.arange(clips) % 2
    if which == "article":
        model, each = network(size, size), frames * flops(size, size)
        x, y = x.reshape(clips * frames, size, size, 3), np.repeat(y, frames)
    else:
        model = classifier.build(Model(preset=which), ClipSpec(frames, size, size), 2)
        each = cost.flops(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(1e-3), loss=loss)
    seconds = []
    for _ in range(steps + 1):  # the first one compiles
        began = time.perf_counter()
        model.train_on_batch(x, y)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds[1:], "flops": each, "parameters": model.count_params()}))


def trained(which: str, size: int, frames: int, clips: int, steps: int) -> dict[str, Any]:
    """A row: clips a second (median step) of a network, by name, at one clip size."""
    options = [which, *map(str, (size, frames, clips, steps))]
    done = timed([sys.executable, "-m", "benchmarks.peers.article", "--child", *options], Path.cwd()).json()
    seconds = median(done["seconds"])
    row = {
        "network": which,
        "clip": f"{frames}x{size}x{size}",
        "clips a step": clips,
        "parameters": done["parameters"],
        "GFLOP a clip": done["flops"] / 1e9,
        "clips/s": clips / seconds,
    }
    print(json.dumps(row), flush=True)
    return row


def measure(rounds: int = 2) -> list[dict[str, Any]]:
    """The preset of the accuracy figures against the article's network, taking turns; one clip a step, since the
    article's network keeps gigabytes for more."""
    pairs = [(trained("small", 112, 16, 1, 30), trained("article", 112, 16, 1, 1)) for _ in range(rounds)]
    return [
        {
            "figure": "training, one clip of 16x112x112 a step: clips/s",
            "ours": median(ours["clips/s"] for ours, _ in pairs),
            "compared with": median(theirs["clips/s"] for _, theirs in pairs),
            "which is": "the article's network, fixed, on the same 16 frames",
            "ratio": median(ours["clips/s"] / theirs["clips/s"] for ours, theirs in pairs),
            "asked": "≥ 50",
        },
        {
            "figure": "a clip of 16x112x112: GFLOP",
            "ours": pairs[0][0]["GFLOP a clip"],
            "compared with": pairs[0][1]["GFLOP a clip"],
            "which is": "the article's network, fixed, on the same 16 frames",
            "ratio": pairs[0][1]["GFLOP a clip"] / pairs[0][0]["GFLOP a clip"],
            "asked": "ours ≤ 1.5",
        },
    ]


def by_size() -> list[dict[str, Any]]:
    """Training throughput of the presets by clip size, 8 clips a step."""
    names = [name for name in PRESETS if name != "article"]
    return [trained(name, size, 16, 8, 4) for name in names for size in (64, 112, 160)]


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """PNG: clips a second against the picture's side, a line a preset."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        sides = [int(row["clip"].split("x")[1]) for row in mine]
        axis.plot(sides, [row["clips/s"] for row in mine], marker="o", label=f"preset {name}")
    axis.set(xscale="log", yscale="log", xlabel="side of the picture, pixels (16 frames)", ylabel="clips/s in training")
    ticks = sorted({int(row["clip"].split("x")[1]) for row in rows})
    axis.set_xticks(ticks, [str(side) for side in ticks])
    axis.minorticks_off()
    decades = range(math.floor(math.log10(min(row["clips/s"] for row in rows))), 4)
    axis.set_yticks([10.0**power for power in decades if 10.0**power <= 2 * max(row["clips/s"] for row in rows)])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        step(given.child[0], *map(int, given.child[1:]))
        return
    result = measure(given.rounds)
    table("the article's network", result)
    common.write("article", result)


if __name__ == "__main__":
    main()
