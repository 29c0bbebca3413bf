"""The objective of every division of videos into parts: each part should have the wanted number of each class."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Number = TypeVar("Number", float, np.ndarray)


def change(own: Number, wanted: Number, have: Number) -> Number:
    """How the squared distance to the wanted count of a class changes when a part gets `own` more videos of it.

    The distance is relative to the wanted count, so that a rare class weighs as much as a frequent one. Lower is
    better; summed over the classes of a unit it is the cost of putting the unit there. Arrays are handled element
    by element.
    """
    cost: Number = own / wanted * (own - 2 * (wanted - have))
    return cost
