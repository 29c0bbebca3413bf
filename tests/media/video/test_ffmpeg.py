from __future__ import annotations

import csv
import ctypes
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sora.core.errors import VideoError
from sora.media.video import ffmpeg
from sora.media.video.ffmpeg import Limits, inspect, read_frames
from tests.videos import make_video

# What the files of odd/ that can't be used are; all others are accepted.
VERDICTS = {
    "made_text.mp4": "not_a_video",
    "made_zero_length.mp4": "not_a_video",
    "moviepy_zero_length.webm": "not_a_video",
    "phpffmpeg_WrongFile.mp4": "unreadable",
    "small_AudioVideoInterleave.avi": "unreadable",
    "small_FlashVideo.flv": "unreadable",
    "small_Mpeg4.mp4": "unreadable",
    "small_WindowsMediaVideo.wmv": "unreadable",
    "small_gif.gif": "unreadable",
    "small_mp4-with-audio.mp4": "unreadable",
    "decord_corrupted.mp4": "truncated",
    "made_truncated.avi": "truncated",
}


def rule_of(path: Path, **options: Any) -> str:
    with pytest.raises(VideoError) as caught:
        inspect(path, **options)
    assert caught.value.fix
    return caught.value.rule


def test_facts_of_a_plain_video(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=24, size=(64, 48), fps=12, audio=True)
    facts = inspect(path)
    assert (facts.codec, facts.width, facts.height, facts.rotation) == ("h264", 64, 48, 0)
    assert (facts.frames, facts.announced, facts.fps, facts.duration) == (24, 24, 12.0, 2.0)
    assert facts.audio and not facts.truncated and not facts.decode_error
    assert 100 < facts.brightness < 160
    assert len(facts.signature) == 48
    assert inspect(path) == facts


def test_brightness_follows_the_picture(tmp_path: Path) -> None:
    dark, bright = (inspect(make_video(tmp_path / f"{b}.mp4", brightness=b)).brightness for b in (70, 180))
    assert 55 < dark < 90 < 165 < bright < 200


@pytest.mark.parametrize(
    "name", ["-i.mp4", "a b.mp4", "file:x.mp4", "http:__x.mp4", "ünï 日本.mp4", "%03d.mp4", "new\nline.mp4"]
)
def test_odd_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_video(tmp_path / "plain.mp4", frames=4).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert inspect(name).frames == 4


def test_odd_files_get_their_verdicts(shared: Path) -> None:
    with (shared / "odd" / "facts.csv").open() as table:
        known = {row["file"]: int(row["frames_decoded"]) for row in csv.DictReader(table)}
    assert len(known) == 32
    for name, frames in known.items():
        verdict, found = None, 0
        try:
            facts = inspect(shared / "odd" / name)
            verdict, found = ("truncated" if facts.truncated else None), facts.frames
        except VideoError as error:
            verdict = error.rule
        assert (name, verdict, found) == (name, VERDICTS.get(name), frames)


def test_av1_is_read(shared: Path) -> None:
    assert inspect(shared / "odd" / "torchcodec_av1_video.mkv").codec == "av1"


def test_real_footage_is_never_truncated(shared: Path) -> None:
    some = [*sorted((shared / "fights300").glob("*/*.mp4"))[::40], *sorted((shared / "steps27").glob("*/*.avi"))[::9]]
    for path in some:
        facts = inspect(path)
        assert not facts.truncated
        assert facts.frames >= facts.announced


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_rotated_video_comes_out_upright(tmp_path: Path, turn: int) -> None:
    """The display matrix turns a stored picture back to the one that was filmed."""
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:16, :20] = 250  # a white corner, top left
    stored = np.rot90(upright, turn // 90)  # counterclockwise, so that the player must turn clockwise
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = stored.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(-turn)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    facts = inspect(path)
    assert (facts.rotation, facts.width, facts.height) == (turn, 64, 48)
    [picture] = read_frames(path, [1])
    assert picture.shape == (48, 64, 3)
    assert picture[4:12, 4:16].min() > 200 and picture[20:].max() < 40


def test_rotated_real_files_have_upright_sizes(shared: Path) -> None:
    sizes = {a: read_frames(shared / "odd" / f"decord_video_{a}.mov", [0]).shape[1:3] for a in (0, 90, 180, 270)}
    assert sizes == {0: (320, 568), 90: (568, 320), 180: (320, 568), 270: (568, 320)}


def test_frames_are_those_that_ffmpeg_decodes(shared: Path) -> None:
    path = shared / "odd" / "c3d_ucf101_v_BaseballPitch_g01_c01.avi"
    with av.open(str(path)) as container:
        direct = [f.to_ndarray(format="rgb24", interpolation="BILINEAR").astype(int) for f in container.decode(video=0)]
    picked = read_frames(path, [100, 3, 3])
    for index, picture in zip([100, 3, 3], picked, strict=True):
        assert np.abs(picture - direct[index]).mean() < 1.5  # bit-exact conversion rounds otherwise


def test_a_frame_that_is_not_there_is_unreadable(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=4)
    with pytest.raises(VideoError, match="frame 7 is missing, 4 decode"):
        read_frames(path, [1, 7])


# --- files that are no video, or would make FFmpeg open others -------------------------------------------------------


class Opened:
    """Tells whether anything opened a file since (Linux's inotify)."""

    def __init__(self, path: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.watch = self.libc.inotify_init1(os.O_NONBLOCK)
        assert self.libc.inotify_add_watch(self.watch, os.fsencode(path), 0x20) >= 0  # IN_OPEN

    def __bool__(self) -> bool:
        try:
            return bool(os.read(self.watch, 4096))
        except BlockingIOError:
            return False


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {name}\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration='
    '"PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="9">'
    "<BaseURL>{name}</BaseURL>"
    '<SegmentList duration="2"><SegmentURL media="{name}"/></SegmentList>'
    "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "subtitles": "[Script Info]\nScriptType: v4.00+\n",
    "script": "import os\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_text_that_names_other_files_is_no_video_and_opens_none(tmp_path: Path, kind: str) -> None:
    target = make_video(tmp_path / "target.mp4", frames=4)
    path = tmp_path / "x.mp4"
    path.write_text(PLAYLISTS[kind].format(name=target.name))
    opened = Opened(target)
    assert rule_of(path) == "not_a_video"
    assert not opened


def test_ffmpeg_unguarded_would_have_opened_it(tmp_path: Path) -> None:
    target = make_video(tmp_path / "target.mp4", frames=4)
    path = tmp_path / "x.mp4"
    path.write_text(PLAYLISTS["ffconcat"].format(name=target.name))
    opened = Opened(target)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4
    assert opened


def test_a_picture_sequence_pattern_is_not_expanded(tmp_path: Path) -> None:
    opened = Opened(make_video(tmp_path / "1.mp4", frames=4))
    assert rule_of(tmp_path / "%d.mp4") == "unreadable"
    assert not opened


def test_a_still_picture_and_sound_are_no_videos(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        wave.sample_rate = 8000
        container.mux(stream.encode(wave))
    assert rule_of(tmp_path / "a.wav") == "not_a_video"
    import cv2

    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "b.png").rename(tmp_path / "b.mp4")
    assert rule_of(tmp_path / "b.mp4") == "not_a_video"


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.mp4")
    assert rule_of(tmp_path / "p.mp4") == "not_a_video"


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    assert rule_of(tmp_path / "none.mp4") == "unreadable"


def test_a_video_cut_off_is_truncated_or_unreadable(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mkv", frames=120, size=(128, 96)).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 3])
    assert "announced" in inspect(cut).truncated
    whole = make_video(tmp_path / "a.mp4", frames=24).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:-400])  # the index stands at the end
    assert rule_of(tmp_path / "cut.mp4") == "unreadable"


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4", frames=24).read_bytes()
    rng = np.random.default_rng(0)
    for number in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(damaged), 12):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "d.mp4").write_bytes(damaged)
        try:
            assert inspect(tmp_path / "d.mp4").frames > 0, number
        except VideoError as error:
            assert error.rule in {"not_a_video", "unreadable"}


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [Limits(max_bytes=100), Limits(max_seconds=1), Limits(max_pixels=64 * 47), Limits(max_frames=23)],
    ids=["bytes", "seconds", "pixels", "frames"],
)
def test_limits_are_kept(tmp_path: Path, limits: Limits) -> None:
    path = make_video(tmp_path / "a.mp4", frames=24, size=(64, 48), fps=12)
    assert rule_of(path, limits=limits) == "too_large"
    with pytest.raises(VideoError) as caught:
        ffmpeg.read_chosen(path, lambda frames, fps: range(frames), lambda index, picture: None, limits=limits)
    assert caught.value.rule == "too_large"


def test_limits_just_met_are_fine(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=24, size=(64, 48), fps=12)
    limits = Limits(max_bytes=path.stat().st_size, max_seconds=2, max_pixels=64 * 48, max_frames=24)
    assert inspect(path, limits).frames == 24
