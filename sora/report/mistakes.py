"""The worst mistakes of a model: confident and wrong, with frames to look at, `(height, width, rgb) uint8`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sora.records import ClipSpec, EvalReport

FRAMES = 4  # of a video in its strip
MOST = 12  # mistakes shown


class Clips(Protocol):
    """What is used of `sora.data.shards.ShardSet`."""

    @property
    def spec(self) -> ClipSpec: ...

    @property
    def index(self) -> Any: ...

    def clips(self, rows: Any) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Mistake:
    path: str
    label: str
    predicted: str
    confidence: float  # in what it answered
    truth: float  # probability that it gave to the true class
    strip: np.ndarray  # see the function `strip`


def worst(report: EvalReport, shards: Clips, most: int = MOST) -> list[Mistake]:
    """Wrong answers by falling confidence. A video that the shards lack is left out."""
    wrong = [video for video in report.videos if video["predicted"] != video["label"]]
    wrong.sort(key=lambda video: (-max(video["probabilities"]), video["sha256"]))
    if not wrong:
        return []
    rows = shards.index.groupby("sha256").indices
    result = []
    for video in [video for video in wrong if video["sha256"] in rows][:most]:
        result.append(
            Mistake(
                path=video["path"],
                label=video["label"],
                predicted=video["predicted"],
                confidence=max(video["probabilities"]),
                truth=video["probabilities"][report.classes.index(video["label"])],
                strip=strip(shards, rows[video["sha256"]]),
            )
        )
    return result


def strip(shards: Clips, rows: np.ndarray) -> np.ndarray:
    """Frames of the middle one of a video's clips (its `rows` of the index), evenly spread: `(height, FRAMES * width,
    rgb) uint8`.
    """
    clip = shards.clips(rows[len(rows) // 2 : len(rows) // 2 + 1])[0]
    chosen = np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)
    return np.concatenate(list(clip[chosen]), axis=1)
