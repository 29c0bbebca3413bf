from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora.core.errors import VideoError
from sora.core.records import ClipSpec, Sampling
from sora.media.video.clips import windows
from sora.media.video.spans import prepare_with_spans, spans
from sora.media.video.transform import prepare_clips
from tests.videos import make_video

WINDOW = ClipSpec(frames=4, height=32, width=32, sampling="window", window_seconds=1.0, max_clips=3)


def test_uniform_is_one_span_of_all() -> None:
    assert spans(24, 12.0, ClipSpec(frames=4)) == [(0.0, 2.0)]


def test_windows_are_spread_from_the_first_frame_to_the_last() -> None:
    assert spans(100, 10.0, WINDOW) == [(0.0, 1.0), (4.5, 5.5), (9.0, 10.0)]
    assert spans(5, 10.0, WINDOW) == [(0.0, 0.5)]  # shorter than a window


def test_without_a_frame_rate_no_seconds_are_made_up() -> None:
    assert spans(10, 0.0, WINDOW) is None


@given(
    frames=st.integers(1, 5000),
    fps=st.floats(0.5, 240),
    sampling=st.sampled_from(["uniform", "window"]),
    seconds=st.floats(0.01, 400),
    clips=st.integers(1, 40),
)
def test_every_clip_takes_its_frames_from_its_span(
    frames: int, fps: float, sampling: Sampling, seconds: float, clips: int
) -> None:
    spec = ClipSpec(frames=5, sampling=sampling, window_seconds=seconds, max_clips=clips)
    found, chosen = spans(frames, fps, spec), windows(frames, fps, spec)
    assert found is not None and len(found) == len(chosen)
    for (start, end), window in zip(found, chosen, strict=True):
        first, last = start * fps, end * fps
        assert first - 0.2 <= window.indices[0] and window.indices[-1] <= last - 0.8
    if sampling == "window":  # all as long, and as long as asked, to the frame
        wanted = min(frames, max(1, round(seconds * fps)))
        assert all(abs((end - start) * fps - wanted) < 0.5 for start, end in found)


@pytest.mark.parametrize("spec", [WINDOW, ClipSpec(frames=4, height=32, width=24, aspect="pad", gamma=0.8)])
def test_the_clips_are_those_that_training_sees(spec: ClipSpec, tmp_path: Path) -> None:
    video = make_video(tmp_path / "long.mp4", frames=60, fps=10, size=(96, 48))
    clips, found = prepare_with_spans(video, spec)
    np.testing.assert_array_equal(clips.video, prepare_clips(video, spec))
    assert found is not None and len(clips) == len(found) == (3 if spec is WINDOW else 1)


def test_the_clips_of_real_footage_are_those_that_training_sees(shared: Path) -> None:
    read = 0
    for file in sorted((shared / "odd").iterdir()):
        try:
            expected = prepare_clips(file, WINDOW)
        except VideoError as error:
            with pytest.raises(VideoError) as again:
                prepare_with_spans(file, WINDOW)
            assert again.value.rule == error.rule
        else:
            np.testing.assert_array_equal(prepare_with_spans(file, WINDOW)[0].video, expected)
            read += 1
    assert read
