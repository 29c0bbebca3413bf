"""Batches of clips, from memory-mapped shards to arrays: NumPy only.

What a batch holds depends on nothing but (seed, epoch, number of the batch). So batches may be made ahead and by
several threads, and a training that resumes at an epoch sees what the uninterrupted one saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import pandas as pd

from sora.errors import InputError

_SHIFT = 0.08  # of height and width, at most
_CONTRAST = 0.25
_BRIGHTNESS = 25.0  # of 255


class ClipSource(Protocol):
    """What `sora.data.shards.ShardSet` offers."""

    @property
    def index(self) -> pd.DataFrame: ...

    def clips(self, rows: np.ndarray) -> np.ndarray: ...


class Batches:
    """The clips of the videos of a table, in batches `(x, y, w)`.

    - x `(batch, time, height, width, rgb) uint8`
    - y `(batch,) int64`: index of the class
    - w `(batch,) float32`: weight of the clip in the loss

    Args:
        shards: the clips; its index has the columns sha256, clip.
        table: sha256, label_index; one row a video. A video of several clips counts with all of them.
        batch: clips a batch.
        shuffle_seed: of order and augmentation, for training. The last batch is then filled up with clips drawn anew,
            so that all have one shape. None, for evaluation: the table's order, the last batch may be smaller.
        min_batches: in training an epoch has at least so many; a small table is gone through as often as that takes.
        flip: training shows every second clip, at random, as its mirror image (left and right).
        jitter: training moves every clip by up to 8 % of its sides and varies contrast and brightness, the same for
            all frames of the clip.
        class_weights: weights that make every class count alike; otherwise 1.

    Raises:
        InputError: the shards lack a video of the table.
    """

    def __init__(
        self,
        shards: ClipSource,
        table: pd.DataFrame,
        *,
        batch: int,
        shuffle_seed: int | None = None,
        min_batches: int = 1,
        flip: bool = False,
        jitter: bool = False,
        class_weights: bool = False,
    ) -> None:
        index = shards.index
        places = pd.DataFrame({"sha256": index["sha256"].to_numpy(), "row": np.arange(len(index))})
        joined = table[["sha256", "label_index"]].merge(places, on="sha256", how="left", validate="one_to_many")
        lacking = joined.loc[joined["row"].isna(), "sha256"]
        if len(lacking):
            raise InputError(
                f"the shards lack {len(lacking)} of {len(table)} videos, among them {lacking.iloc[0]}",
                mend="`sora run` prepares what is missing",
            )
        self.shards, self.batch, self.shuffle_seed, self.flip, self.jitter = shards, batch, shuffle_seed, flip, jitter
        self.rows = joined["row"].to_numpy(np.int64)
        self.labels = joined["label_index"].to_numpy(np.int64)
        self.weights = balanced(self.labels) if class_weights else np.ones(len(self.labels), np.float32)
        batches = -(-len(self.rows) // batch)
        self.batches = max(batches, min_batches) if batches and shuffle_seed is not None else batches

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.batches

    @property
    def clips(self) -> int:
        """Different clips an epoch."""
        return len(self.rows)

    def load(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Batch `number` of `epoch`, both counted from 0. May be called from several threads at once."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        order = np.arange(len(self.rows))
        if self.shuffle_seed is not None:
            rng = np.random.default_rng([self.shuffle_seed, epoch])
            times = -(-len(self) * self.batch // len(order))
            order = np.concatenate([rng.permutation(order) for _ in range(times)])
        chosen = order[number * self.batch : (number + 1) * self.batch]
        x = self.shards.clips(self.rows[chosen])
        if self.shuffle_seed is not None and (self.flip or self.jitter):
            x = self._augmented(x, np.random.default_rng([self.shuffle_seed, epoch, number]))
        return x, self.labels[chosen], self.weights[chosen]

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All batches of `epoch`."""
        for number in range(len(self)):
            yield self.load(epoch, number)

    def _augmented(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        result = np.empty_like(x)
        for source, target in zip(x, result, strict=True):
            # Drawn whether used or not: switching one kind of augmentation leaves the others' draws alone.
            mirrored, vertical, horizontal = rng.random() < 0.5, *rng.uniform(-_SHIFT, _SHIFT, 2)
            contrast, brightness = rng.uniform(1 - _CONTRAST, 1 + _CONTRAST), rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
            if self.flip and mirrored:
                source = source[:, :, ::-1]
            if self.jitter:
                height, width = source.shape[1:3]
                levels = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
                source = levels.clip(0, 255).astype(np.uint8)[source]
                # Moving by indices that stop at the border repeats the border's pixels.
                rows = (np.arange(height) + round(vertical * height)).clip(0, height - 1)
                columns = (np.arange(width) + round(horizontal * width)).clip(0, width - 1)
                source = source[:, rows][:, :, columns]
            target[...] = source
        return result


def balanced(labels: np.ndarray) -> np.ndarray:
    """A weight a clip: inverse to the frequency of its class among `labels`, 1 on average. `(n,) float32`."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / (len(counts) * counts[inverse])).astype(np.float32)
