from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora.core.errors import VideoError
from sora.core.records import Aspect, ClipSpec, Equalise
from sora.media.video import ffmpeg
from sora.media.video.ffmpeg import inspect, read_frames
from sora.media.video.transform import finish, fitted, prepare_clips
from tests.videos import make_video

SMALL = ClipSpec(frames=4, height=32, width=32)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "a.mp4", frames=24, size=(96, 48), fps=12)


@pytest.mark.parametrize("aspect", ["stretch", "crop", "pad"])
def test_clips_have_the_shape_asked_for(video: Path, aspect: Aspect) -> None:
    clips = prepare_clips(video, ClipSpec(frames=4, height=40, width=24, aspect=aspect))
    assert clips.shape == (1, 4, 40, 24, 3) and clips.dtype == np.uint8


def test_aspect_sizes() -> None:
    wide = ClipSpec(height=32, width=32, aspect="crop")
    assert fitted(96, 48, wide) == (64, 32)
    assert fitted(48, 96, wide) == (32, 64)
    pad = ClipSpec(height=32, width=32, aspect="pad")
    assert fitted(96, 48, pad) == (32, 16)
    assert fitted(48, 96, pad) == (16, 32)
    assert fitted(10_000, 1, pad) == (32, 1)
    assert fitted(96, 48, ClipSpec(height=32, width=40, aspect="stretch")) == (40, 32)


@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (33, 31), (1920, 1080), (112, 200)])
def test_fitted_covers_or_fits(aspect: Aspect, size: tuple[int, int]) -> None:
    spec = ClipSpec(height=112, width=112, aspect=aspect)
    width, height = fitted(*size, spec)
    assert (width >= 112 and height >= 112) if aspect == "crop" else (1 <= width <= 112 and 1 <= height <= 112)


def test_padding_is_black_and_stays_out_of_equalisation(video: Path) -> None:
    clips = prepare_clips(video, ClipSpec(frames=2, height=32, width=32, aspect="pad", equalise="histogram", gamma=0.5))
    assert (clips[:, :, :8] == 0).all() and (clips[:, :, -8:] == 0).all()
    assert clips[:, :, 10:22].mean() > 60


def test_known_facts_give_the_same_clips(video: Path) -> None:
    facts = inspect(video)
    for spec in (SMALL, ClipSpec(frames=4, height=32, width=32, sampling="window", window_seconds=0.5)):
        known = prepare_clips(video, spec, frames=facts.frames, fps=facts.fps)
        assert np.array_equal(known, prepare_clips(video, spec))


def test_a_header_that_lies_gives_the_same_clips(shared: Path) -> None:
    path = shared / "odd" / "made_truncated.avi"  # announces 325 frames, has 116
    facts = inspect(path)
    assert np.array_equal(prepare_clips(path, SMALL), prepare_clips(path, SMALL, frames=116, fps=facts.fps))


def test_an_honest_header_is_decoded_once(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = ffmpeg._opened

    def counted(*args: Any) -> Any:
        opened.append(1)
        return real(*args)

    monkeypatch.setattr(ffmpeg, "_opened", counted)
    prepare_clips(video, SMALL)
    assert opened == [1]


def test_windows_become_clips(video: Path) -> None:
    spec = ClipSpec(frames=2, height=32, width=32, sampling="window", window_seconds=0.5, max_clips=3)
    assert prepare_clips(video, spec).shape == (3, 2, 32, 32, 3)


def test_clips_look_like_the_frames(video: Path) -> None:
    spec = ClipSpec(frames=4, height=48, width=96, aspect="stretch")
    assert np.array_equal(prepare_clips(video, spec)[0], read_frames(video, [3, 9, 15, 21]))


def test_tiny_pictures_grow(shared: Path) -> None:
    clips = prepare_clips(shared / "odd" / "moviepy_bitmap.mp4", SMALL)
    assert clips.shape == (1, 4, 32, 32, 3)


def test_gamma_brightens_dark_footage() -> None:
    picture = np.full((32, 32, 3), 40, np.uint8)
    assert finish(picture, ClipSpec(height=32, width=32, gamma=0.5)).mean() == 101
    assert finish(picture, ClipSpec(height=32, width=32)).mean() == 40


@pytest.mark.parametrize("method", ["histogram", "clahe"])
def test_equalisation_widens_contrast(method: Equalise) -> None:
    picture = np.random.default_rng(0).integers(20, 50, (32, 32, 1), np.uint8).repeat(3, 2)
    out = finish(picture, ClipSpec(height=32, width=32, equalise=method))
    assert out.std() > 2 * picture.std()


def test_more_frames_than_there_are_is_an_error(video: Path) -> None:
    with pytest.raises(VideoError, match="is missing"):
        prepare_clips(video, SMALL, frames=240, fps=12.0)
