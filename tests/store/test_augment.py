"""Augmentations of whole clips: what each keeps, its range, and that a batch depends on its number alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sora.core.tensors import VIDEO, Clips
from sora.store import augment
from sora.store.augment import Augmentation
from sora.store.batches import Batches
from sora.tasks import MULTI
from tests.store.test_batches import Arrays, every, load, table

OFTEN = range(30)


def clip(frames: int = 8, height: int = 20, width: int = 28) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def ramp() -> np.ndarray:
    """A still picture whose value is its column, 4 levels a pixel."""
    return np.broadcast_to((np.arange(60, dtype=np.uint8) * 4)[None, None, :, None], (4, 60, 60, 3)).copy()


def test_with_the_defaults_batches_are_what_they_always_were() -> None:
    """Measured results rest on these bytes: what is new must leave them alone."""
    batches = Batches(
        Arrays(9),
        table(9),
        batch=4,
        shuffle_seed=3,
        min_batches=4,
        class_weights=True,
        augmentation=Augmentation(flip=True, jitter=True),
    )
    digest = hashlib.sha256()
    for x, y, w in every(batches, 2):
        assert (x.dtype, y.dtype, w.dtype) == (np.dtype(np.uint8), np.dtype(np.int64), np.dtype(np.float32))
        for part in (x, y, w):
            digest.update(part.tobytes())
    assert digest.hexdigest() == "93dafc4f616645792ed33e25543e6250f6c8b79abb1696cf2dfc74da8b3ab043"


def test_a_crop_is_a_part_of_the_picture_at_full_size_the_same_of_all_frames() -> None:
    picture = ramp()
    steps = set()
    for seed in OFTEN:
        found = augment.resized_crop(picture, np.random.default_rng(seed), 0.5)
        assert found.shape == picture.shape and found.dtype == np.uint8 and (found == found[:1]).all()
        rise = np.diff(found[0, 0, :, 0].astype(int))
        assert (rise >= 0).all()  # columns keep their order
        share = (int(found[0, 0, -1, 0]) - int(found[0, 0, 0, 0])) / 236
        assert 0.5 < share <= 1  # sqrt(area * 3/4) at least
        steps.add(round(share, 2))
    assert len(steps) > 10


def test_a_crop_of_nothing_is_the_clip() -> None:
    found = augment._resampled(clip(), np.arange(28.0), 2)
    assert np.array_equal(found, clip())
    between = augment._resampled(ramp(), np.arange(59) + 0.5, 2)
    assert (between[0, 0, :, 0] == np.arange(59) * 4 + 2).all()


def test_slower_motion_is_frames_of_the_clip_in_their_order() -> None:
    number = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    spans = set()
    for seed in OFTEN:
        found = augment.slower(number, np.random.default_rng(seed), 1.0)[:, 0, 0, 0].astype(int)
        assert len(found) == 16 and (np.diff(found) >= 0).all() and (np.diff(found) <= 1).all()
        spans.add(found[-1] - found[0])
    assert min(spans) >= 7 and max(spans) <= 15 and len(spans) > 4


def test_noise_is_new_in_every_frame_and_bounded() -> None:
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    deviations = []
    for seed in OFTEN:
        found = augment.noisy(grey, np.random.default_rng(seed), 12.0)
        assert found.dtype == np.uint8 and not np.array_equal(found[0], found[1])
        assert abs(found.mean() - 128) < 0.5
        deviations.append(found.std())
    assert max(deviations) < 13 and min(deviations) < 4
    white = augment.noisy(np.full((2, 8, 8, 3), 255, np.uint8), np.random.default_rng(1), 12.0)
    assert white.min() > 180  # it does not wrap around


def test_mixed_clips_and_labels_are_blended_by_the_same_share() -> None:
    x = np.zeros((8, 2, 4, 4, 3), np.uint8)
    x[4:] = 200
    y = np.eye(2, dtype=np.float32)[[0] * 4 + [1] * 4]
    w = np.where(y[:, 1] > 0, 3.0, 1.0).astype(np.float32)
    mixed, soft, weights = augment.mixed(x, y, w, np.random.default_rng(0), 1.0)
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed[:, 0, 0, 0, 0] / 200, soft[:, 1], atol=0.01)
    np.testing.assert_allclose(weights, 1 + 2 * soft[:, 1], rtol=1e-5)
    assert ((soft > 0.05) & (soft < 0.95)).any()


def everything(seed: int = 1) -> Batches:
    kinds = Augmentation(flip=True, jitter=True, crop=0.3, speed=0.5, noise=6.0, mix_up=0.4)
    return Batches(Arrays(9), table(9), batch=4, shuffle_seed=seed, augmentation=kinds, classes=2, class_weights=True)


def test_all_of_it_depends_on_seed_epoch_and_number_only() -> None:
    first, again = everything(), everything()
    list(again.epoch(0))
    for number in (2, 0, 1):
        for one, other in zip(load(first, 5, number), load(again, 5, number), strict=True):
            assert np.array_equal(one, other)
    x, y, w = load(first, 5, 0)
    assert x.dtype == np.uint8 and y.shape == (4, 2) and y.dtype == np.float32 and w.dtype == np.float32
    assert not np.array_equal(x, load(first, 6, 0)[0]) and not np.array_equal(x, load(everything(2), 5, 0)[0])


@pytest.mark.parametrize("kind", ["crop", "speed", "noise"])
def test_a_kind_that_is_switched_leaves_what_others_draw_alone(kind: str) -> None:
    """Flips are drawn alike with and without it: the same clips are mirrored."""
    source = Arrays(1)
    source.pixels[:] = np.arange(16, dtype=np.uint8)[None, None, None, :, None] * 12  # brighter to the right

    def mirrored(**options: float) -> np.ndarray:
        kinds = Augmentation(flip=True, **options)  # type: ignore[arg-type]
        batches = Batches(source, table(1, 1), batch=32, shuffle_seed=0, augmentation=kinds, classes=1)
        x = load(batches, 0, 0)[0].astype(float)
        found: np.ndarray = x[:, :, :, 0].mean(axis=(1, 2, 3)) > x[:, :, :, -1].mean(axis=(1, 2, 3))
        return found

    plain = mirrored()
    assert 5 < plain.sum() < 27
    assert np.array_equal(mirrored(**{kind: 0.3}), plain)


def test_classes_that_have_a_side_are_not_mirrored_or_swap() -> None:
    source = Arrays(3)
    rows = table(3, 3)
    kinds = Augmentation(flip=True, mirror=[1, 0, -1])
    batches = Batches(source, rows, batch=60, shuffle_seed=0, augmentation=kinds, class_weights=True)
    x, y, _ = load(batches, 0, 0)
    turned = 0
    for clip_, label in zip(x, y, strict=True):
        number = next(
            n
            for n in range(3)
            if clip_.tobytes() in (source.pixels[n].tobytes(), source.pixels[n][:, :, ::-1].tobytes())
        )
        is_turned = clip_.tobytes() != source.pixels[number].tobytes()
        turned += is_turned
        assert number != 2 or not is_turned
        assert label == ({0: 1, 1: 0, 2: 2}[number] if is_turned else number)
    assert turned > 10


def test_a_clip_that_becomes_another_class_weighs_as_that_class() -> None:
    rows = table(4, 2).assign(label_index=[0, 0, 0, 1])
    kinds = Augmentation(flip=True, mirror=[1, 0])
    batches = Batches(Arrays(4), rows, batch=40, shuffle_seed=0, augmentation=kinds, class_weights=True)
    _, y, w = load(batches, 0, 0)
    assert len({(int(label), float(weight)) for label, weight in zip(y, w, strict=True)}) == 2


def test_views_are_beside_their_clip() -> None:
    clips = np.stack([clip(), 255 - clip()])
    found = augment.views(Clips({VIDEO: clips}), ("mirrored", "left", "right")).video
    assert found.shape == (8, *clips.shape[1:])
    assert np.array_equal(found[[0, 4]], clips) and np.array_equal(found[5], clips[1][:, :, ::-1])
    assert np.array_equal(found[2][:, :, 1:], clips[0][:, :, :-1]) and np.array_equal(
        found[3][:, :, :-1], clips[0][:, :, 1:]
    )
    given = Clips({VIDEO: clips})
    assert augment.views(given, ()) is given
    with pytest.raises(KeyError):
        augment.views(given, ("upside down",))


def test_a_mirrored_clip_of_several_classes_swaps_each_and_one_that_has_a_side_stays() -> None:
    source = Arrays(3)
    rows = table(3).assign(label_index=[(0, 2), (1,), (2, 3)])
    options = {"classes": 4, "task": MULTI, "class_weights": True}
    kinds = Augmentation(flip=True, mirror=[1, 0, 2, -1])
    batches = Batches(source, rows, batch=60, shuffle_seed=0, augmentation=kinds, **options)  # type: ignore[arg-type]
    x, y, w = load(batches, 0, 0)
    seen = set()
    for clip_, label in zip(x, y, strict=True):
        plain = [n for n in range(3) if clip_.tobytes() == source.pixels[n].tobytes()]
        turned = [n for n in range(3) if clip_.tobytes() == source.pixels[n][:, :, ::-1].tobytes()]
        seen.add((*(plain or turned), bool(turned), tuple(np.flatnonzero(label).tolist())))
    assert seen == {(0, False, (0, 2)), (0, True, (1, 2)), (1, False, (1,)), (1, True, (0,)), (2, False, (2, 3))}
    assert y.dtype == np.float32 and set(w.tolist()) == {1.0}  # class weights are not for several labels


def test_several_labels_are_mixed_up_by_share() -> None:
    rows = table(2).assign(label_index=[(0, 2), (1, 2)])
    batches = Batches(
        Arrays(2), rows, batch=32, shuffle_seed=0, augmentation=Augmentation(mix_up=0.4), classes=3, task=MULTI
    )
    _, soft, _ = load(batches, 0, 0)
    np.testing.assert_allclose(soft[:, 0] + soft[:, 1], 1, rtol=1e-5)
    np.testing.assert_allclose(soft[:, 2], 1)
    assert ((soft[:, 0] > 0.05) & (soft[:, 0] < 0.95)).any()
