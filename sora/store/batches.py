"""Batches of clips, from memory-mapped shards to named arrays: NumPy only.

What a batch holds depends only on (seed, epoch, number of the batch). So batches may be made ahead and by several
threads, and a training that resumes at an epoch sees what the uninterrupted one saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd

from sora.core.errors import InputError
from sora.core.tensors import VIDEO, TensorSpec
from sora.store import augment
from sora.store.augment import Augmentation
from sora.tasks import SINGLE, Task

NONE = Augmentation()
# Kind of augmentation → what its generator's seed has besides seed, epoch and number of the batch.
_STREAMS: dict[str, tuple[int, ...]] = {"basic": (), "speed": (1,), "crop": (2,), "noise": (3,), "mix_up": (4,)}


class ClipSource(Protocol):
    """The part of `sora.store.shards.ShardSet` that is used here."""

    @property
    def index(self) -> pd.DataFrame: ...

    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, rows: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Some clips, what they show, and how much each counts.

    inputs: the clips' tensors by name; `video`: `(batch, time, height, width, rgb) uint8`.
    labels: `(batch,) int64`, the index of the class. With mix-up `(batch, classes) float32` whose rows sum to 1. Of a
        multi-label model `(batch, classes) float32`, 1 for each class that the clip has.
    weights: `(batch,) float32`, in the loss.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        """Clips."""
        return len(self.weights)


class Batches:
    """The clips of the videos of a table, in batches.

    Args:
        shards: the clips; its index has the columns sha256, clip.
        table: sha256, label_index (as the task's `index` returns it); one row per video. A video with several clips
            counts with all of them.
        batch: clips per batch.
        shuffle_seed: for training: seed of order and augmentation. The last batch is filled with clips drawn again,
            so that all have one shape. None, for evaluation: the table's order, the last batch may be smaller.
        min_batches: in training an epoch has at least this many. A small table is repeated as often as needed.
        augmentation: for training clips; it changes the tensor `video`.
        classes: how many there are; mix-up and the task `MULTI` need it.
        class_weights: use the task's weights, which make every class count equally; otherwise 1.
        task: what the labels mean.

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
        augmentation: Augmentation = NONE,
        classes: int = 0,
        class_weights: bool = False,
        task: Task = SINGLE,
    ) -> None:
        index = shards.index
        places = pd.DataFrame({"sha256": index["sha256"].to_numpy(), "row": np.arange(len(index))})
        joined = table[["sha256", "label_index"]].merge(places, on="sha256", how="left", validate="one_to_many")
        lacking = joined.loc[joined["row"].isna(), "sha256"]
        if len(lacking):
            raise InputError(
                f"the shards lack {len(lacking)} of {len(table)} videos, among them {lacking.iloc[0]}",
                fix="`sora run` prepares what is missing",
            )
        self.shards, self.batch, self.shuffle_seed = shards, batch, shuffle_seed
        self.augmentation, self.classes, self.task = augmentation, classes, task
        self.rows = joined["row"].to_numpy(np.int64)
        self.labels = task.targets(joined["label_index"], classes)
        self.weights = np.ones(len(joined), np.float32)
        self.class_weights = task.class_weights(self.labels, classes) if class_weights else None
        if self.class_weights is not None:
            self.weights = task.weights(self.labels, self.class_weights)
        batches = -(-len(self.rows) // batch)
        self.batches = max(batches, min_batches) if batches and shuffle_seed is not None else batches

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.batches

    @property
    def clips(self) -> int:
        """Different clips per epoch."""
        return len(self.rows)

    def load(self, epoch: int, number: int) -> Batch:
        """Batch `number` of `epoch`, both counted from 0. Several threads may call it at once.

        Raises:
            IndexError: the epoch has no such batch.
            ServiceError: stored clips are missing or damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        order = np.arange(len(self.rows))
        if self.shuffle_seed is not None:
            rng = np.random.default_rng([self.shuffle_seed, epoch])
            times = -(-len(self) * self.batch // len(order))
            order = np.concatenate([rng.permutation(order) for _ in range(times)])
        chosen = order[number * self.batch : (number + 1) * self.batch]
        inputs = {name: self.shards.read(name, self.rows[chosen]) for name in self.shards.tensors}
        batch = Batch(inputs, self.labels[chosen], self.weights[chosen])
        if self.shuffle_seed is None or not self.augmentation:
            return batch
        draws = {
            kind: np.random.default_rng([self.shuffle_seed, epoch, number, *stream])
            for kind, stream in _STREAMS.items()
        }
        return self._augmented(batch, draws)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """All batches of `epoch`."""
        for number in range(len(self)):
            yield self.load(epoch, number)

    def _augmented(self, batch: Batch, draws: Mapping[str, np.random.Generator]) -> Batch:
        kinds = self.augmentation
        x, y, w = batch.inputs[VIDEO], batch.labels.copy(), batch.weights.copy()
        result = np.empty_like(x)
        for place, source in enumerate(x):
            clip, mirrored = source, False
            if kinds.flip or kinds.jitter:
                mirror = y[place] if kinds.mirror is None else self.task.mirrored(y[place], kinds.mirror)
                clip, mirrored = augment.flip_and_jitter(
                    clip, draws["basic"], flip=kinds.flip and mirror is not None, jitter=kinds.jitter
                )
                if mirrored and mirror is not None and (mirror != y[place]).any():
                    y[place] = mirror
                    if self.class_weights is not None:
                        w[place] = self.task.weights(mirror, self.class_weights)
            if kinds.speed:
                clip = augment.slower(clip, draws["speed"], kinds.speed)
            if kinds.crop:
                clip = augment.resized_crop(clip, draws["crop"], kinds.crop)
            if kinds.noise:
                clip = augment.noisy(clip, draws["noise"], kinds.noise)
            result[place] = clip
        if kinds.mix_up:
            dense = self.task.dense(y, self.classes)
            result, y, w = augment.mixed(result, dense, w, draws["mix_up"], kinds.mix_up)
        return Batch({**batch.inputs, VIDEO: result}, y, w)
