"""The worst mistakes of a model: confident and wrong, with frames to look at, `(height, width, rgb) uint8`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sora import tasks
from sora.core.records import ClipSpec, EvalReport
from sora.core.tensors import VIDEO

if TYPE_CHECKING:
    import pandas as pd

FRAMES = 4  # frames of a video in its strip
MOST = 12  # mistakes shown


class Clips(Protocol):
    """The part of `sora.store.shards.ShardSet` that is used here."""

    @property
    def spec(self) -> ClipSpec: ...

    @property
    def index(self) -> pd.DataFrame: ...

    def read(self, name: str, rows: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Mistake:
    path: str
    label: str
    predicted: str
    confidence: float  # in its answer; for a multi-label model in the class that it was most wrong about
    truth: float  # probability that it gave to the true class, or to the truth about that class
    strip: np.ndarray  # see the function `strip`


def worst(report: EvalReport, shards: Clips, most: int = MOST) -> list[Mistake]:
    """Wrong answers, most confident first. A video that is missing in the shards is left out."""
    wrong = [(video, *_confidence(video, report)) for video in report.videos if video["predicted"] != video["label"]]
    wrong.sort(key=lambda entry: (-entry[1], entry[0]["sha256"]))
    if not wrong:
        return []
    rows = shards.index.groupby("sha256").indices
    result = []
    for video, confidence, truth in [entry for entry in wrong if entry[0]["sha256"] in rows][:most]:
        result.append(
            Mistake(
                path=video["path"],
                label=video["label"],
                predicted=video["predicted"] or "none of the classes",
                confidence=confidence,
                truth=truth,
                strip=strip(shards, rows[video["sha256"]]),
            )
        )
    return result


def _confidence(video: dict[str, Any], report: EvalReport) -> tuple[float, float]:
    task = tasks.of(report.multilabel)
    return task.mistake(np.array(video["probabilities"]), task.encode([video["label"]], report.classes)[0])


def strip(shards: Clips, rows: np.ndarray) -> np.ndarray:
    """Frames of the middle one of a video's clips (its `rows` in the index), evenly spaced: `(height, FRAMES * width,
    rgb) uint8`.
    """
    clip = shards.read(VIDEO, rows[len(rows) // 2 : len(rows) // 2 + 1])[0]
    chosen = np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)
    return np.concatenate(list(clip[chosen]), axis=1)
