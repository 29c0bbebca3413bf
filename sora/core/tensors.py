"""Named tensors: what a clip consists of, from its shard to the model's input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Shape = tuple[Any, ...]  # of a batch, as Keras hands it to layers: numbers, None for a side that is open
VIDEO = "video"  # the name of a clip's frames
_BYTES = {"uint8": 1, "int16": 2, "float16": 2, "float32": 4}  # dtype → bytes of an element


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a clip.

    Raises:
        ValueError: a dtype that Sora doesn't store, or a side below 1.
    """

    name: str
    dtype: str  # as NumPy calls it
    shape: tuple[int, ...]  # of one clip

    def __post_init__(self) -> None:
        if self.dtype not in _BYTES:
            raise ValueError(f"the tensor {self.name!r} has the dtype {self.dtype!r}, not one of {', '.join(_BYTES)}")
        if any(type(side) is not int or side < 1 for side in self.shape):
            raise ValueError(f"the tensor {self.name!r} has the shape {self.shape}")

    @property
    def bytes(self) -> int:
        """The size of one clip."""
        return math.prod(self.shape) * _BYTES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TensorSpec:
        """
        Raises:
            ValueError, TypeError, KeyError: `value` does not describe a tensor.
        """
        return cls(str(value["name"]), str(value["dtype"]), tuple(value["shape"]))
