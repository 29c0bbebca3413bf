"""A tiny real shard set, made of real videos in which nothing but the direction of movement tells the class."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd

from sora.data import manifest, shards
from sora.records import ClipSpec
from sora.settings import Settings

CLASSES = ("left", "right")
SPEC = ClipSpec(frames=8, height=32, width=32)
# The smallest model that has all its parts.
SMALL = {"low_filters": [16], "high_filters": [16], "key_frames": 2, "embedding": 16, "dropout": 0.2}


def moving_square(label: str, seed: int, frames: int = 12, size: int = 48) -> np.ndarray:
    """`(frames, size, size, rgb) uint8`: a square crosses a textured background of its own, left or right."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(60, 160, (6, 6, 3)), np.ones((size // 6, size // 6, 1)))
    top, start, step = int(rng.integers(4, 30)), int(rng.integers(0, 8)), int(rng.integers(2, 4))
    result = np.empty((frames, size, size, 3), np.uint8)
    for number in range(frames):
        place = start + number * step
        place = place if label == "right" else size - 12 - place
        image = picture.copy()
        image[top : top + 12, max(0, place) : max(0, place + 12)] = 240
        result[number] = image
    return result


def make_shards(folder: Path, each: int = 8) -> tuple[Path, pd.DataFrame]:
    """Videos below `folder/data`, shards in `folder/shards`; returns the latter and a table: sha256, label, split.

    Of each class the first quarter is validation, the rest training.
    """
    for which, label in enumerate(CLASSES):
        for number in range(each):
            path = folder / "data" / label / f"{number:02}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures = moving_square(label, seed=100 * which + number)
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=12, options={"preset": "ultrafast"})
                stream.width, stream.height, stream.pix_fmt = *pictures.shape[2:0:-1], "yuv420p"
                stream.time_base = Fraction(1, 12)
                for index, picture in enumerate(pictures):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts = index
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
    found = manifest.build(folder / "data", Settings(classes=CLASSES), workers=1)
    shards.build(found, (), folder / "data", folder / "shards", SPEC, buckets=4, workers=1)
    table = found.sort_values("path")[["sha256", "label", "path"]]
    number = table["path"].str.extract(r"(\d+)\.mp4")[0].astype(int)
    table["split"] = np.where(number < each // 4, "val", "train")
    return folder / "shards", table.reset_index(drop=True)
