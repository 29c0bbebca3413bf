"""Several labels of one video as one string, for `model.head: multilabel`.

`bright|left`: sorted, without repeats. So the manifest, the ledger, the rules about copies and every digest still have
one string per video, and only code that counts, learns or answers single classes splits it. Without that head `|` is a
character like any other; `multilabel` says which holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sora.core.records import LABEL_SEPARATOR

if TYPE_CHECKING:
    import pandas as pd


def join(names: Iterable[str]) -> str:
    """The single string; "" for no label."""
    return LABEL_SEPARATOR.join(sorted(set(names)))


def names(label: str, multilabel: bool) -> list[str]:
    """The single labels of a video, sorted. Blanks beside a `|` and empty labels are ignored."""
    if not multilabel:
        return [label]
    return sorted({name.strip() for name in label.split(LABEL_SEPARATOR)} - {""})


def single(labels: pd.Series, multilabel: bool) -> pd.Series:
    """One row per label instead of one per video; a video with several labels has several rows with its index."""
    return labels.str.split(LABEL_SEPARATOR, regex=False).explode() if multilabel else labels


def hot(labels: Iterable[str], classes: Sequence[str]) -> np.ndarray:
    """`(videos, classes) bool`: which of `classes` each video has. A label that is not a class is ignored."""
    label_sets = [set(names(label, True)) for label in labels]
    return np.array([[name in one for name in classes] for one in label_sets], bool).reshape(-1, len(classes))
