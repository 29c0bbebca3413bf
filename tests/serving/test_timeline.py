from __future__ import annotations

from dataclasses import asdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sora.serving.timeline import deciding, timeline
from sora.tasks import MULTI


def _of(*first: float) -> np.ndarray:
    return np.array([[p, 1 - p] for p in first])


def test_one_entry_a_clip() -> None:
    windows = timeline([(0.0, 2.0), (5.0, 7.0)], ("a", "b"), _of(0.9, 0.2))
    assert asdict(windows[0]) == {"start": 0.0, "end": 2.0, "label": "a", "probabilities": {"a": 0.9, "b": 1 - 0.9}}
    assert windows[1].label == "b"


def test_the_run_that_speaks_most_for_the_label() -> None:
    assert deciding(_of(0.1, 0.9, 0.8, 0.2, 0.6), 0) == (1, 2)
    assert deciding(_of(0.9, 0.45, 0.9, 0.1), 0) == (0, 2)  # a doubt in the middle does not part them
    assert deciding(_of(0.9, 0.1, 0.9), 0) == (0, 0)  # of equals the first
    assert deciding(_of(0.2, 0.4, 0.1), 0) == (1, 1)  # none speaks for it
    assert deciding(_of(0.5), 0) == (0, 0)


def test_a_single_class() -> None:
    assert deciding(np.ones((3, 1)), 0) == (0, 2)


@given(arrays(np.float64, (7, 3), elements=st.floats(0, 1)), st.integers(0, 2))
def test_no_other_run_speaks_more(probabilities: np.ndarray, label: int) -> None:
    margins = probabilities[:, label] - np.delete(probabilities, label, axis=1).max(axis=1)
    first, last = deciding(probabilities, label)
    best = max(margins[i : j + 1].sum() for i in range(7) for j in range(i, 7))
    assert np.isclose(margins[first : last + 1].sum(), best)


def test_of_several_labels_a_clip_speaks_for_one_by_itself() -> None:
    """The other class is there all the time: it takes nothing from the one that decided."""
    both = np.array([[0.2, 0.9], [0.7, 0.9], [0.8, 0.9], [0.3, 0.9]])
    assert deciding(both, 0, MULTI) == (1, 2)
    assert deciding(both, 0) == (2, 2)
