"""The objective of every division of videos into parts: each class should have in each part what is wanted of it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Number = TypeVar("Number", float, np.ndarray)


def change(own: Number, wanted: Number, have: Number) -> Number:
    """How the squared distance to the wanted count of a class changes when a part gets `own` more of it.

    The distance is relative to what is wanted, so that a rare class weighs as much as a frequent one. The lower, the
    better; summed over the classes of a unit it says what putting the unit there costs. Of arrays it is taken element
    by element.
    """
    cost: Number = own / wanted * (own - 2 * (wanted - have))
    return cost
