"""Folds of cross-validation: parts of equal size and similar class shares that divide no unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sora.core.errors import InputError
from sora.dataset import balance


def stratified(labels: Sequence[Any] | np.ndarray, units: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold number of each video, `(videos,) int64`, 0 … folds-1.

    Larger units are placed first, equal ones in an order drawn from `seed`; each goes where the squared distance to the
    wanted number of every class falls most. The result depends on the set of (label, unit) rows, on their order and on
    the seed alone.

    Args:
        labels: the class of each video.
        units: `(videos,) int`: videos with the same number stay together (see `splits.units`).

    Raises:
        InputError: fewer units than folds.
    """
    unit = np.unique(units, return_inverse=True)[1]
    label = pd.factorize(np.asarray(labels), sort=True)[0]
    count = int(unit.max(initial=-1)) + 1
    if not 2 <= folds <= count:
        raise InputError(
            f"{len(unit)} videos of {count} groups (or of no group) can't make {folds} folds",
            fix="use fewer folds (at least 2), or add videos of more people, cameras or sources",
        )
    content = np.zeros((count, int(label.max()) + 1))  # videos of each class in each unit
    np.add.at(content, (unit, label), 1)
    drawn = np.random.default_rng(seed).permutation(count)
    target = content.sum(axis=0) / folds
    have = np.zeros((folds, content.shape[1]))
    place = np.empty(count, np.int64)
    for number in drawn[np.argsort(-content[drawn].sum(axis=1), kind="stable")]:
        own = content[number]
        cost = balance.change(own, target, have).sum(axis=1)
        place[number] = np.lexsort((have.sum(axis=1), cost))[0]
        have[place[number]] += own
    return place[unit]


def with_validation(train: np.ndarray, labels: np.ndarray, units: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which of the videos marked in `train`, `(videos,) bool`, to hold out for early stopping; returns such a mask.

    About `share` of them, by whole units. None if `share` is 0, if there are too few units to divide, or if a
    class would have no video left to train on.
    """
    chosen = np.zeros(len(train), bool)
    rows = np.flatnonzero(train)
    parts = round(1 / share) if share else 0
    if parts >= 2 and len(np.unique(units[rows])) >= parts:
        aside = stratified(labels[rows], units[rows], parts, seed) == 0
        if set(labels[rows[~aside]]) == set(labels[rows]):
            chosen[rows[aside]] = True
    return chosen
