"""Batches: order, shapes, augmentation and weights, over arrays and over real shards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sora.core.errors import InputError, ServiceError
from sora.core.tensors import TensorSpec
from sora.store.augment import Augmentation
from sora.store.batches import Batch, Batches
from sora.store.shards import ShardSet
from sora.tasks import MULTI, SINGLE
from tests.clips import CLASSES, SPEC, make_shards


class Arrays:
    """A clip source in memory: video i has the clips i, i + 0.5, … each filled with its own value."""

    def __init__(self, videos: int, clips: int = 1) -> None:
        self.tensors = {"video": TensorSpec("video", "uint8", (4, 16, 16, 3))}
        names = [f"{number:064x}" for number in range(videos) for _ in range(clips)]
        self.index = pd.DataFrame({"sha256": names, "clip": list(range(clips)) * videos})
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (videos * clips, 4, 16, 16, 3), np.uint8)

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        assert name == "video"
        found: np.ndarray = self.pixels[rows]
        return found


def parts(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frames, labels, weights)"""
    return batch.inputs["video"], batch.labels, batch.weights


def every(batches: Batches, epoch: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [parts(batch) for batch in batches.epoch(epoch)]


def load(batches: Batches, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return parts(batches.load(epoch, number))


def table(videos: int, classes: int = 2) -> pd.DataFrame:
    return pd.DataFrame(
        {"sha256": [f"{n:064x}" for n in range(videos)], "label_index": [n % classes for n in range(videos)]}
    )


def test_evaluation_keeps_the_order_and_the_last_partial_batch() -> None:
    source = Arrays(5, clips=2)
    batches = Batches(source, table(5), batch=4)
    made = every(batches, 0)
    assert [len(x) for x, _, _ in made] == [4, 4, 2] and len(batches) == 3 and batches.clips == 10
    assert np.array_equal(np.concatenate([x for x, _, _ in made]), source.pixels)
    assert np.concatenate([y for _, y, _ in made]).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert {w.dtype for _, _, w in made} == {np.dtype(np.float32)} and {y.dtype for _, y, _ in made} == {
        np.dtype(np.int64)
    }


@pytest.mark.parametrize("videos", [1, 3, 7, 8])
def test_training_batches_have_one_shape_and_show_every_clip(videos: int) -> None:
    source = Arrays(videos)
    batches = Batches(source, table(videos, 1), batch=4, shuffle_seed=0)
    made = every(batches, 3)
    assert {len(x) for x, _, _ in made} == {4} and len(made) == -(-videos // 4)
    seen = {x.tobytes() for part, _, _ in made for x in part}
    assert seen == {x.tobytes() for x in source.pixels}


def test_a_batch_depends_on_seed_epoch_and_number_only() -> None:
    options: dict[str, Any] = {"batch": 4, "augmentation": Augmentation(flip=True, jitter=True)}
    first = Batches(Arrays(9), table(9), shuffle_seed=1, **options)
    again = Batches(Arrays(9), table(9), shuffle_seed=1, **options)
    list(again.epoch(0))  # what was read before does not matter
    for number in (2, 0, 1):
        for one, other in zip(load(first, 5, number), load(again, 5, number), strict=True):
            assert np.array_equal(one, other)
    other_seed = Batches(Arrays(9), table(9), shuffle_seed=2, **options)
    assert not np.array_equal(load(first, 5, 0)[0], load(other_seed, 5, 0)[0])
    assert not np.array_equal(load(first, 5, 0)[0], load(first, 6, 0)[0])


def test_threads_get_what_one_reader_gets() -> None:
    batches = Batches(Arrays(40), table(40), batch=4, shuffle_seed=0, augmentation=Augmentation(flip=True, jitter=True))
    alone = [x for x, _, _ in every(batches, 0)]
    results: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.__setitem__(n, load(batches, 0, n)[0])) for n in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[n], x) for n, x in enumerate(alone))


def test_a_flip_mirrors_the_whole_clip() -> None:
    source = Arrays(1)
    batches = Batches(source, table(1, 1), batch=64, shuffle_seed=0, augmentation=Augmentation(flip=True))
    kinds = {x.tobytes() for x in load(batches, 0, 0)[0]}
    assert kinds == {source.pixels[0].tobytes(), source.pixels[0][:, :, ::-1].tobytes()}


def test_jitter_is_the_same_for_all_frames_of_a_clip() -> None:
    source = Arrays(1)
    source.pixels[:] = source.pixels[:, :1]  # a still picture stays a still picture
    x = load(Batches(source, table(1, 1), batch=16, shuffle_seed=0, augmentation=Augmentation(jitter=True)), 0, 0)[0]
    assert (x == x[:, :1]).all()
    assert len({clip.tobytes() for clip in x}) == 16
    assert x.shape == (16, 4, 16, 16, 3) and x.dtype == np.uint8


def test_the_source_is_never_altered() -> None:
    source = Arrays(4)
    before = source.pixels.copy()
    list(Batches(source, table(4), batch=2, shuffle_seed=0, augmentation=Augmentation(flip=True, jitter=True)).epoch(0))
    assert np.array_equal(source.pixels, before)


def test_class_weights_make_classes_count_alike() -> None:
    labels = np.array([0, 0, 0, 1])
    weights = SINGLE.weights(labels, SINGLE.class_weights(labels, 2))
    assert weights[labels == 0].sum() == pytest.approx(weights[labels == 1].sum())
    assert weights.mean() == pytest.approx(1)
    one = load(Batches(Arrays(4), table(4).assign(label_index=labels), batch=4, class_weights=True), 0, 0)[2]
    assert np.array_equal(one, weights)


def test_a_small_set_is_shown_several_times_an_epoch_each_clip_as_often() -> None:
    batches = Batches(Arrays(9), table(9, 1), batch=4, shuffle_seed=0, min_batches=9)
    labels = np.concatenate([y for _, y, _ in every(batches, 0)])
    assert len(batches) == 9 and len(labels) == 36
    assert Batches(Arrays(9), table(9, 1), batch=4, min_batches=9).batches == 3  # evaluation sees each once
    shown = Counter(clip.tobytes() for x, _, _ in every(batches, 0) for clip in x)
    assert set(shown.values()) == {4} and len(shown) == 9


def test_an_empty_split_has_no_batches() -> None:
    batches = Batches(Arrays(3), table(0), batch=4)
    assert len(batches) == 0 and list(batches.epoch(0)) == []
    with pytest.raises(IndexError):
        batches.load(0, 0)


def test_a_video_that_the_shards_lack_is_named() -> None:
    with pytest.raises(InputError, match=f"lack 1 of 4 videos, among them {3:064x}"):
        Batches(Arrays(3), table(4), batch=2)


def test_over_real_shards(tmp_path: Path) -> None:
    folder, rows = make_shards(tmp_path, each=4)
    rows = rows.assign(label_index=rows["label"].map({name: n for n, name in enumerate(CLASSES)}))
    shards = ShardSet.open(folder)
    x, y, _ = load(Batches(shards, rows, batch=8), 0, 0)
    assert x.shape == (8, SPEC.frames, SPEC.height, SPEC.width, 3)
    # The bright square's centre moves as the label says: rows, order and labels belong together.
    columns = (x.astype(float).mean(axis=-1) > 200).sum(axis=2)
    centre = (columns * np.arange(SPEC.width)).sum(axis=-1) / columns.sum(axis=-1)
    assert ((centre[:, -2] > centre[:, 0]) == y.astype(bool)).all()
    next(folder.glob("bucket-*.npy")).unlink()
    with pytest.raises(ServiceError, match="bucket-"):
        list(Batches(ShardSet.open(folder), rows, batch=8).epoch(0))


def test_needs_no_backend() -> None:
    code = (
        "import sys, sora.store.batches; sys.exit(any(m in sys.modules for m in ('tensorflow', 'keras', 'jax', 'cv2')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_clip_of_several_classes_has_them_all() -> None:
    rows = table(3).assign(label_index=[(0, 2), (1,), ()])
    [(x, y, w)] = every(Batches(Arrays(3), rows, batch=4, classes=3, task=MULTI), 0)
    assert y.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]] and y.dtype == np.float32 and len(x) == len(w) == 3
