from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora.core.records import ClipSpec, Sampling
from sora.media.video.clips import spread, windows


def test_uniform_takes_the_middles_of_equal_parts() -> None:
    [window] = windows(32, 25.0, ClipSpec(frames=4))
    assert window.indices == (4, 12, 20, 28)


def test_fewer_frames_than_wanted_repeats_indices_in_order() -> None:
    [window] = windows(3, 25.0, ClipSpec(frames=8))
    assert window.indices == (0, 0, 0, 1, 1, 2, 2, 2)


def test_windows_lie_side_by_side_from_first_to_last_frame() -> None:
    spec = ClipSpec(frames=2, sampling="window", window_seconds=1.0, max_clips=8)
    found = windows(40, 10.0, spec)
    assert [window.clip for window in found] == [0, 1, 2, 3]
    assert [window.indices for window in found] == [(2, 7), (12, 17), (22, 27), (32, 37)]


def test_windows_are_at_most_max_clips_evenly_spread() -> None:
    spec = ClipSpec(frames=2, sampling="window", window_seconds=1.0, max_clips=3)
    assert [window.indices for window in windows(100, 10.0, spec)] == [(2, 7), (47, 52), (92, 97)]


def test_one_window_stands_in_the_middle() -> None:
    spec = ClipSpec(frames=2, sampling="window", window_seconds=1.0)
    assert [window.indices for window in windows(16, 10.0, spec)] == [(5, 10)]


def test_a_video_shorter_than_a_window_gives_one_clip_of_all_of_it() -> None:
    spec = ClipSpec(frames=4, sampling="window", window_seconds=10.0)
    assert [window.indices for window in windows(8, 10.0, spec)] == [(1, 3, 5, 7)]


def test_no_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        windows(0, 25.0, ClipSpec())


@given(
    st.integers(1, 100_000),
    st.floats(0, 1000),
    st.integers(1, 64),
    st.floats(0.01, 100),
    st.integers(1, 50),
    st.sampled_from(["uniform", "window"]),
)
def test_indices_are_inside_the_video_and_in_order(
    frames: int, fps: float, count: int, seconds: float, clips: int, sampling: Sampling
) -> None:
    spec = ClipSpec(frames=count, sampling=sampling, window_seconds=seconds, max_clips=clips)
    found = windows(frames, fps, spec)
    assert 1 <= len(found) <= clips
    for number, window in enumerate(found):
        assert window.clip == number and len(window.indices) == count
        assert list(window.indices) == sorted(window.indices)
        assert window.indices[0] >= 0 and window.indices[-1] < frames
    starts = [window.indices[0] for window in found]
    assert starts == sorted(set(starts)) or len(found) == 1


def test_spread_covers_every_frame_when_counts_agree() -> None:
    assert spread(5, 7, 7) == (5, 6, 7, 8, 9, 10, 11)
