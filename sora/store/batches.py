"""Batches of clips, from memory-mapped shards to arrays: NumPy only.

What a batch holds depends on nothing but (seed, epoch, number of the batch). So batches may be made ahead and by
several threads, and a training that resumes at an epoch sees what the uninterrupted one saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pandas as pd

from sora.core.errors import InputError
from sora.store import augment

# Kind of augmentation → what its generator's seed has beside seed, epoch and number of the batch.
_STREAMS: dict[str, tuple[int, ...]] = {"basic": (), "speed": (1,), "crop": (2,), "noise": (3,), "mix_up": (4,)}


class ClipSource(Protocol):
    """What `sora.store.shards.ShardSet` offers."""

    @property
    def index(self) -> pd.DataFrame: ...

    def clips(self, rows: np.ndarray) -> np.ndarray: ...


class Batches:
    """The clips of the videos of a table, in batches `(x, y, w)`.

    - x `(batch, time, height, width, rgb) uint8`
    - y `(batch,) int64`: index of the class; with `mix_up` `(batch, classes) float32`, rows sum to 1; with `multilabel`
      `(batch, classes) float32`, 1 for each class that the clip has
    - w `(batch,) float32`: weight of the clip in the loss

    Args:
        shards: the clips; its index has the columns sha256, clip.
        table: sha256, label_index; one row a video. A video of several clips counts with all of them. With `multilabel`
            label_index holds a sequence of indices.
        batch: clips a batch.
        shuffle_seed: of order and augmentation, for training. The last batch is then filled up with clips drawn anew,
            so that all have one shape. None, for evaluation: the table's order, the last batch may be smaller.
        min_batches: in training an epoch has at least so many; a small table is gone through as often as that takes.
        flip: training shows every second clip, at random, as its mirror image (left and right).
        mirror: for each class that of its mirror image: itself, another one, or -1: such clips are never mirrored.
            None: each class is its own. With `multilabel` that holds for each of a clip's classes.
        jitter: training moves every clip by up to 8 % of its sides and varies contrast and brightness, the same for
            all frames of the clip.
        speed, crop, noise: see `augment.slower`, `augment.resized_crop` and `augment.noisy`; 0 is off.
        mix_up: the alpha of `augment.mixed`; 0 is off.
        classes: how many there are; `mix_up` and `multilabel` need it.
        class_weights: weights that make every class count alike; otherwise 1. Not with `multilabel`.
        multilabel: a clip may have several of the classes.

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
        mirror: Sequence[int] | None = None,
        jitter: bool = False,
        speed: float = 0.0,
        crop: float = 0.0,
        noise: float = 0.0,
        mix_up: float = 0.0,
        classes: int = 0,
        class_weights: bool = False,
        multilabel: bool = False,
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
        self.shards, self.batch, self.shuffle_seed, self.flip, self.jitter = shards, batch, shuffle_seed, flip, jitter
        self.mirror, self.speed, self.crop, self.noise = mirror, speed, crop, noise
        self.mix_up, self.classes = mix_up, classes
        kinds = (flip, jitter, speed, crop, noise, mix_up)
        self._augments = shuffle_seed is not None and any(kinds)
        self.rows = joined["row"].to_numpy(np.int64)
        self.weights = np.ones(len(joined), np.float32)
        self.class_weight = np.ones(classes, np.float32)
        if multilabel:
            self.labels = np.zeros((len(joined), classes), np.float32)
            for number, indices in enumerate(joined["label_index"]):
                self.labels[number, list(indices)] = 1
        else:
            self.labels = joined["label_index"].to_numpy(np.int64)
            if class_weights:
                self.weights = balanced(self.labels)
            # Of a class without clips the mirror image of another one is all that there is: it counts as the average.
            self.class_weight = np.ones(max(self.labels.max(initial=-1) + 1, classes), np.float32)
            self.class_weight[self.labels] = self.weights
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
        y, w = self.labels[chosen], self.weights[chosen]
        return self._augmented(x, y, w, epoch, number) if self._augments else (x, y, w)

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All batches of `epoch`."""
        for number in range(len(self)):
            yield self.load(epoch, number)

    def _augmented(
        self, x: np.ndarray, y: np.ndarray, w: np.ndarray, epoch: int, number: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert self.shuffle_seed is not None
        draws = {
            kind: np.random.default_rng([self.shuffle_seed, epoch, number, *stream])
            for kind, stream in _STREAMS.items()
        }
        result, y, w = np.empty_like(x), y.copy(), w.copy()
        for place, source in enumerate(x):
            clip, mirrored = source, False
            if self.flip or self.jitter:
                mirror = self._mirrored(y[place])
                clip, mirrored = augment.flip_and_jitter(
                    clip, draws["basic"], flip=self.flip and mirror is not None, jitter=self.jitter
                )
                if mirrored and mirror is not None and (mirror != y[place]).any():
                    y[place] = mirror
                    if y.ndim == 1:
                        w[place] = self.class_weight[mirror]
            if self.speed:
                clip = augment.slower(clip, draws["speed"], self.speed)
            if self.crop:
                clip = augment.resized_crop(clip, draws["crop"], self.crop)
            if self.noise:
                clip = augment.noisy(clip, draws["noise"], self.noise)
            result[place] = clip
        if not self.mix_up:
            return result, y, w
        y = y if y.ndim == 2 else np.eye(self.classes, dtype=np.float32)[y]
        return augment.mixed(result, y, w, draws["mix_up"], self.mix_up)

    def _mirrored(self, y: np.ndarray) -> np.ndarray | None:
        """The label of a clip's mirror image: an index or `(classes,)`; None: the clip is never mirrored."""
        if self.mirror is None:
            return y
        to = np.asarray(self.mirror)
        if y.ndim == 0:
            return to[y] if to[y] >= 0 else None
        if y[to < 0].any():
            return None
        return y[np.where(to < 0, np.arange(len(to)), to)]  # pairs are each other's: the way back is the way there


def balanced(labels: np.ndarray) -> np.ndarray:
    """A weight a clip: inverse to the frequency of its class among `labels`, 1 on average. `(n,) float32`."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / (len(counts) * counts[inverse])).astype(np.float32)
