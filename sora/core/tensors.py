"""Named tensors: what a clip consists of, from its shard to the model's input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[Any, ...]  # of a batch, as Keras hands it to layers: numbers, None for a side that is open
VIDEO = "video"  # the name of a clip's frames
FLOW = "flow"  # the name of its motion (`sora.media.video.flow`)
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


@dataclass(frozen=True, slots=True, eq=False)
class Clips:
    """Some clips: their tensors by name, each with the clips as its first dimension."""

    tensors: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | np.ndarray) -> Clips:
        """Some of them; a slice copies nothing."""
        return Clips({name: tensor[rows] for name, tensor in self.tensors.items()})

    def __iter__(self) -> Iterator[Clips]:
        """One clip after the other, each as `Clips` of length 1."""
        return (self[row : row + 1] for row in range(len(self)))

    @property
    def video(self) -> np.ndarray:
        """`(clips, frames, height, width, rgb) uint8`."""
        return self.tensors[VIDEO]

    @classmethod
    def blank(cls, tensors: Mapping[str, TensorSpec], count: int) -> Clips:
        """Clips of zeros."""
        import numpy as np

        return cls({name: np.zeros((count, *one.shape), one.dtype) for name, one in tensors.items()})

    @classmethod
    def joined(cls, parts: Sequence[Clips]) -> Clips:
        """All clips of `parts`, which have the same tensors."""
        import numpy as np

        if len(parts) == 1:
            return parts[0]
        return cls({name: np.concatenate([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def padded(self, count: int) -> Clips:
        """`count` clips: those here, then zeros."""
        import numpy as np

        more = count - len(self)
        if more <= 0:
            return self
        return Clips(
            {
                name: np.concatenate([tensor, np.zeros((more, *tensor.shape[1:]), tensor.dtype)])
                for name, tensor in self.tensors.items()
            }
        )
