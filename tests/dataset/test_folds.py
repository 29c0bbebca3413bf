"""Folds: whole units, equal parts, alike in classes, the same for a seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora.core.errors import InputError
from sora.dataset import folds


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=12, max_size=80), st.integers(0, 5))
def test_no_unit_is_divided(rows: list[tuple[int, int]], seed: int) -> None:
    labels, units = (np.array(column) for column in zip(*rows, strict=True))
    parts = min(4, len(set(units)))
    if parts < 2:
        return
    found = folds.stratified(labels, units, parts, seed)
    assert all(len(set(found[units == unit])) == 1 for unit in set(units))
    assert set(found) <= set(range(parts))
    assert np.array_equal(found, folds.stratified(labels, units, parts, seed))


def test_folds_are_of_equal_size_and_alike_in_classes() -> None:
    rng = np.random.default_rng(0)
    units = rng.integers(0, 60, 300)
    labels = rng.integers(0, 2, 300)
    found = folds.stratified(labels, units, 5, seed=1)
    table = np.array([[((found == f) & (labels == c)).sum() for c in (0, 1)] for f in range(5)])
    assert table.min() >= 22 and table.max() <= 38
    assert not np.array_equal(found, folds.stratified(labels, units, 5, seed=2))


def test_too_few_groups_for_the_folds() -> None:
    with pytest.raises(InputError, match="6 videos of 3 groups"):
        folds.stratified(["a", "b"] * 3, np.array([0, 0, 1, 1, 2, 2]), 4, 0)
    with pytest.raises(InputError, match="1 folds"):
        folds.stratified(["a", "b"] * 3, np.arange(6), 1, 0)


def test_validation_is_cut_from_the_training_videos_by_units() -> None:
    labels, units = np.array(["a", "b"] * 20), np.repeat(np.arange(10), 4)
    train = units != 3
    aside = folds.with_validation(train, labels, units, 0.2, seed=0)
    assert aside.any() and not (aside & ~train).any()
    assert all(len(set(aside[units == unit])) == 1 for unit in range(10))
    assert 0.1 < aside.sum() / train.sum() < 0.35


@pytest.mark.parametrize("case", ["share 0", "too few units", "a class would vanish"])
def test_no_validation_where_it_would_cost_too_much(case: str) -> None:
    labels, units = np.array(["a", "b"] * 6), np.repeat(np.arange(6), 2)
    share = 0.0 if case == "share 0" else 0.2
    if case == "too few units":
        units = np.repeat(np.arange(3), 4)
    if case == "a class would vanish":
        labels, units, share = np.array(["a"] * 2 + ["b"] * 2), np.array([0, 0, 1, 1]), 0.5
    assert not folds.with_validation(np.ones(len(labels), bool), labels, units, share, 0).any()
