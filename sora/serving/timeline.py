"""What a longer video shows when: its clips' answers in order of time, and the span that decided. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sora.core.answers import Window
from sora.tasks import SINGLE, Task


def timeline(
    spans: Sequence[tuple[float, float]], classes: Sequence[str], probabilities: np.ndarray
) -> tuple[Window, ...]:
    """One window per clip.

    Arguments:
        spans: seconds, one per clip. A long video's clips are apart: what is between them was not examined.
        probabilities: `(clips, classes)`.
    """
    return tuple(
        Window(
            start,
            end,
            label=classes[int(row.argmax())],
            probabilities={name: float(value) for name, value in zip(classes, row, strict=True)},
        )
        for (start, end), row in zip(spans, probabilities, strict=True)
    )


def deciding(probabilities: np.ndarray, label: int, task: Task = SINGLE) -> tuple[int, int]:
    """The run of clips that speaks most for class `label`: its first and last clip, both included.

    A clip speaks with its margin, which the task computes. The run with the largest sum is found in one pass (Bentley,
    "Programming pearls: algorithm design techniques", 1984). Of equal runs it is the first and shortest. There is
    always one: where no clip speaks for the label, it is the clip that speaks least against it.
    """
    best, best_run = -np.inf, (0, 0)
    total, first = 0.0, 0
    for index, margin in enumerate(task.margins(probabilities, label)):
        if total <= 0:
            total, first = 0.0, index
        total += float(margin)
        if total > best:
            best, best_run = total, (first, index)
    return best_run
