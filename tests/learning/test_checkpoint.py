"""Checkpoints: everything comes back, damage is noticed, a full disk leaves the one before."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from sora.core.errors import DiskFull
from sora.learning import checkpoint


def trained(seed: int = 0, units: int = 3) -> keras.Model:
    """A small compiled model with normalisation, and an optimiser that has taken some steps."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    model = keras.Model(
        inputs, keras.layers.Dense(1)(keras.layers.BatchNormalization()(keras.layers.Dense(units)(inputs)))
    )
    model.compile(keras.optimizers.AdamW(0.01), "mse", jit_compile=False)
    for _ in range(3):
        step(model)
    return model


def step(model: keras.Model) -> None:
    model.train_on_batch(np.arange(32, dtype=np.float32).reshape(8, 4) / 32, np.ones((8, 1), np.float32))


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return trained()


@pytest.fixture
def stored(model: keras.Model, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.npz"
    checkpoint.save(path, model, {"best": [np.full(2, 7.0)], "average": []}, {"fingerprint": "f", "epoch": 3})
    return path


def test_a_training_goes_on_from_it_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    one, path = trained(), tmp_path / "checkpoint.npz"
    checkpoint.save(path, one, {"best": [np.full(2, 7.0)], "average": []}, {"fingerprint": "f", "epoch": 3})
    other = trained(seed=1)
    kept, state = checkpoint.load(path, other, "f")
    assert state["epoch"] == 3 and kept["best"][0].tolist() == [7, 7] and kept["average"] == []
    for model in (one, other):
        step(model)
    for left, right in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.npz"]


def _flip(content: bytes) -> bytes:
    place = content.index(b"\x93NUMPY") + 130  # in the numbers of the first array
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def _foreign(_: bytes) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, other=np.zeros(3))
    return stream.getvalue()


def _pickled(_: bytes) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, state=np.array([{"fingerprint": "f"}], dtype=object))
    return stream.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[: len(c) // 2],
        lambda c: c[:-1],
        _flip,
        lambda c: b"",
        lambda c: b"no zip at all",
        _foreign,
        _pickled,
    ],
    ids=["half", "last byte", "flipped", "empty", "text", "foreign", "pickled"],
)
def test_damage_is_noticed_and_alters_nothing(
    model: keras.Model, stored: Path, damage: Callable[[bytes], bytes]
) -> None:
    before = [w.copy() for w in model.get_weights()]
    stored.write_bytes(damage(stored.read_bytes()))
    with pytest.raises(checkpoint.Unusable, match="damaged"):
        checkpoint.load(stored, model, "f")
    assert all(np.array_equal(w, old) for w, old in zip(model.get_weights(), before, strict=True))


def test_of_another_training_or_model_it_is_not_used(model: keras.Model, stored: Path) -> None:
    with pytest.raises(checkpoint.Unusable, match="other data, settings or code"):
        checkpoint.load(stored, model, "g")
    with pytest.raises(checkpoint.Unusable, match="do not fit"):
        checkpoint.load(stored, trained(units=5), "f")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(stored.with_name("none.npz"), model, "f")


def test_a_full_disk_leaves_the_one_before_whole(model: keras.Model, stored: Path) -> None:
    """Its draft is a link to /dev/full: every write says that no space is left."""
    draft = stored.with_name(f".{stored.name}.part")
    draft.symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="no space left"):
        checkpoint.save(stored, model, {}, {"fingerprint": "f", "epoch": 4})
    assert not draft.is_symlink()
    assert checkpoint.load(stored, model, "f")[1]["epoch"] == 3
