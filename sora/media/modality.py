"""The port of media: how a file becomes named tensors and facts.

A modality is a folder beside this module. Its package offers one `Modality`, which is light: every process may import
it. What opens files is behind `Modality.reader`, and only a confined decoder (`sora.media.decoder`) calls that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sora.core.records import ClipSpec, ClipWindow
from sora.core.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

Known = tuple[int, float]  # a file's length in frames (or samples), and how many of them a second has
Spans = list[tuple[float, float]]  # seconds from the beginning: start and end of each clip, in the order of time
Fact = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Reading:
    """The clips of one file.

    `tensors` has the names, dtypes and shapes of `Modality.tensors`, with the clips as a dimension before the others.
    """

    tensors: Mapping[str, np.ndarray]
    spans: Spans | None  # None if the file has no times


class Reader(Protocol):
    """What opens files of a modality. A module can be one."""

    def prepare(self, *, clips: bool) -> None:
        """Imports everything that `clips`, or else `facts`, will need: afterwards the process can't open files."""
        ...

    def facts(self, file: int, limits: Mapping[str, Any]) -> dict[str, Any]:
        """The facts from reading a whole open file: at least the names of `Modality.facts`, and `truncated`: why it
        counts as truncated, "" if it does not.

        Raises:
            VideoError: the file can't be used, or is beyond a limit.
        """
        ...

    def clips(self, file: int, spec: ClipSpec, known: Known | None, limits: Mapping[str, Any]) -> Reading:
        """All clips of an open file.

        Raises:
            VideoError: the file can't be used, or is beyond a limit.
        """
        ...


@dataclass(frozen=True, slots=True)
class Modality:
    """How a kind of file becomes named tensors and facts."""

    name: str
    facts: Mapping[str, Fact]  # fact → its value if it is unknown; the types are the facts' types
    tensors: Callable[[ClipSpec], dict[str, TensorSpec]]  # what a clip consists of, by name
    windows: Callable[[int, float, ClipSpec], list[ClipWindow]]  # of a file of this length and rate: see `Known`
    reader: Callable[[], Reader]  # imports it
