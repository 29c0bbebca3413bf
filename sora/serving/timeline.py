"""What a longer video shows when: its clips' answers in order of time, and the span that decided. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sora.core.answers import Window
from sora.core.records import THRESHOLD


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


def deciding(probabilities: np.ndarray, label: int, multilabel: bool = False) -> tuple[int, int]:
    """The run of clips that speaks most for class `label`: its first and last clip, both included.

    A clip speaks with its margin: the probability of the label less that of the best other class. So a clip that sees
    something else speaks against it. The classes of a multi-label model don't exclude each other: there `THRESHOLD`
    replaces the other class. The run with the largest sum is found in one pass (Bentley, "Programming pearls:
    algorithm design techniques", 1984). Of equal runs it is the first and shortest. There is always one: where no clip
    speaks for the label, it is the clip that speaks least against it.
    """
    others = np.delete(probabilities, label, axis=1)
    against = THRESHOLD if multilabel else others.max(axis=1) if others.shape[1] else 0.0
    margins = probabilities[:, label] - against
    best, best_run = -np.inf, (0, 0)
    total, first = 0.0, 0
    for index, margin in enumerate(margins):
        if total <= 0:
            total, first = 0.0, index
        total += float(margin)
        if total > best:
            best, best_run = total, (first, index)
    return best_run
