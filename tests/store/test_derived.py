"""Shards computed from shards: what is reused, what is computed again, and that damage is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from sora.core.errors import ServiceError
from sora.core.tensors import Clips, TensorSpec
from sora.store import derived
from sora.store.derived import derive
from sora.store.shards import INDEX, ShardSet
from tests import clips as made_clips

TENSORS = {"mean": TensorSpec("mean", "float16", (3,))}


class Counting:
    def __init__(self) -> None:
        self.clips = 0

    def __call__(self, clips: Clips) -> Mapping[str, np.ndarray]:
        self.clips += len(clips)
        return {"mean": clips.video.mean(axis=(1, 2, 3)).astype(np.float16)}


def shards_of(folder: Path, each: int) -> ShardSet:
    """Of `each` videos a class."""
    return ShardSet.open(made_clips.make_shards(folder, each)[0])


def means(source: ShardSet) -> np.ndarray:
    every = np.arange(len(source))
    return np.asarray(source.read("video", every).mean(axis=(1, 2, 3)).astype(np.float16))


def test_every_clip_has_its_row(tmp_path: Path) -> None:
    source = shards_of(tmp_path, 4)
    compute = Counting()
    made = derive(source, tmp_path / "out", TENSORS, "code-1", compute)
    bank = ShardSet.open(tmp_path / "out")
    assert made.computed == compute.clips == len(source) == len(bank)
    assert list(bank.index["sha256"]) == list(source.index["sha256"])
    assert np.array_equal(bank.read("mean", np.arange(len(bank))), means(source))


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    source = shards_of(tmp_path, 4)
    derive(source, tmp_path / "out", TENSORS, "code-1", Counting())
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    again = Counting()
    made = derive(source, tmp_path / "out", TENSORS, "code-1", again)
    assert (made.computed, made.buckets_written, again.clips) == (0, 0, 0)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_an_added_video_costs_that_video(tmp_path: Path) -> None:
    source = shards_of(tmp_path, 4)
    derive(source, tmp_path / "out", TENSORS, "code-1", Counting())
    more = shards_of(tmp_path, 5)
    compute = Counting()
    made = derive(more, tmp_path / "out", TENSORS, "code-1", compute)
    assert compute.clips == made.computed == 2 and made.buckets_kept
    bank = ShardSet.open(tmp_path / "out")
    assert np.array_equal(bank.read("mean", np.arange(len(bank))), means(more))


def test_other_code_computes_anew(tmp_path: Path) -> None:
    source = shards_of(tmp_path, 2)
    derive(source, tmp_path / "out", TENSORS, "code-1", Counting())
    assert derive(source, tmp_path / "out", TENSORS, "code-2", Counting()).computed == 4


def test_an_interrupted_build_resumes(tmp_path: Path) -> None:
    source = shards_of(tmp_path, 4)

    class Dies(Counting):
        def __call__(self, clips: Clips) -> Mapping[str, np.ndarray]:
            if self.clips >= 4:
                raise KeyboardInterrupt
            return super().__call__(clips)

    with pytest.raises(KeyboardInterrupt):
        derive(source, tmp_path / "out", TENSORS, "code-1", Dies(), batch=1)
    assert not (tmp_path / "out" / INDEX).exists()
    made = derive(source, tmp_path / "out", TENSORS, "code-1", Counting())
    assert 0 < made.computed < 8
    assert np.array_equal(ShardSet.open(tmp_path / "out").read("mean", np.arange(8)), means(source))
    assert not list((tmp_path / "out").glob(f"*{derived._SUMS}"))


def test_damage_is_noticed_and_made_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shards_of(tmp_path, 4)
    derive(source, tmp_path / "out", TENSORS, "code-1", Counting())
    file = sorted((tmp_path / "out").glob("bucket-*.npy"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ServiceError, match="damaged"):
        ShardSet.open(tmp_path / "out").read("mean", np.arange(8))
    made = derive(source, tmp_path / "out", TENSORS, "code-1", Counting())
    assert made.computed == 1 and "computed again" in capsys.readouterr().err
    assert np.array_equal(ShardSet.open(tmp_path / "out").read("mean", np.arange(8)), means(source))
