"""A tiny real shard set, made of real videos in which nothing but the direction of movement tells the class."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd

from sora.config import Settings
from sora.core.records import ClipSpec
from sora.dataset import manifest
from sora.store import building

CLASSES = ("left", "right")
SPEC = ClipSpec(frames=8, height=32, width=32)
# The smallest model that has all its parts.
SMALL = {"low_filters": [16], "high_filters": [16], "key_frames": 2, "embedding": 16, "dropout": 0.2}


def moving_square(
    label: str, seed: int, frames: int = 12, size: int = 48, levels: tuple[int, int] = (60, 160)
) -> np.ndarray:
    """`(frames, size, size, rgb) uint8`: a square crosses a textured background of its own, left or right."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(*levels, (6, 6, 3)), np.ones((size // 6, size // 6, 1)))
    top, start, step = int(rng.integers(4, 30)), int(rng.integers(0, 8)), int(rng.integers(2, 4))
    result = np.empty((frames, size, size, 3), np.uint8)
    for number in range(frames):
        place = start + number * step
        place = place if label == "right" else size - 12 - place
        image = picture.copy()
        image[top : top + 12, max(0, place) : max(0, place + 12)] = 240
        result[number] = image
    return result


def write_video(path: Path, pictures: np.ndarray) -> None:
    """`(frames, height, width, rgb) uint8` at 12 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *pictures.shape[2:0:-1], "yuv420p"
        stream.time_base = Fraction(1, 12)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Two attributes that have nothing to do with each other: where the square goes, and how light it is behind it.
SEVERAL = ("bright", "dark", "left", "right")


def make_several(folder: Path, each: int = 10) -> Path:
    """Videos of all four pairs of `SEVERAL` in a flat folder, with a labels.csv that joins the two labels of each.

    `each` groups, of one video a pair.
    """
    lines = ["path,label,group"]
    for number, (light, way) in enumerate((light, way) for light in SEVERAL[:2] for way in SEVERAL[2:]):
        for group in range(each):
            levels = (130, 200) if light == "bright" else (15, 75)
            name = f"{number}{group:02}.mp4"
            write_video(folder / name, moving_square(way, 1000 * number + group, levels=levels))
            lines.append(f"{name},{way} | {light},g{group}")  # neither sorted nor bare: it need not be
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_shards(folder: Path, each: int = 8) -> tuple[Path, pd.DataFrame]:
    """Videos below `folder/data`, shards in `folder/shards`; returns the latter and a table: sha256, label, split.

    Of each class the first quarter is validation, the rest training.
    """
    for which, label in enumerate(CLASSES):
        for number in range(each):
            write_video(folder / "data" / label / f"{number:02}.mp4", moving_square(label, seed=100 * which + number))
    found = manifest.build(folder / "data", Settings(classes=CLASSES), workers=1)
    building.build(found, (), folder / "data", folder / "shards", SPEC, buckets=4, workers=1)
    table = found.sort_values("path")[["sha256", "label", "path"]]
    number = table["path"].str.extract(r"(\d+)\.mp4")[0].astype(int)
    table["split"] = np.where(number < each // 4, "val", "train")
    return folder / "shards", table.reset_index(drop=True)
