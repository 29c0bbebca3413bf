"""The only importer of FFmpeg (PyAV): what a video file is, and its frames, upright.

Files are untrusted. FFmpeg sees bytes, never a name; only the demuxers of `DEMUXERS` may read them; no protocol is
allowed and a demuxer that asks for another file (playlists, references) is refused. So the answer depends only on the
bytes, and facts can be reused by digest. A file comes as a path or, for a process that may open nothing, as an open
descriptor, which is read from its beginning and stays open.

Conversions use swscale's bit-exact paths: the same bytes on every CPU, since their digests are committed. swscale
resizes and converts in one step: 0.17 ms for 640x360 → 112x112, where converting in full and resizing with OpenCV
takes 1.4 ms.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import av
import av.error
import av.logging
import numpy as np
from av.codec.context import Flags
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from sora.core.errors import VideoError
from sora.core.records import RULES
from sora.media.video import seek, signature

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

# Containers and raw streams that hold moving pictures and name no other file. Not here: playlists and lists of files
# (hls, dash, concat, sdp, image2, imf), still images, sound alone, devices, text.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,kux,asf,ogg,mpegts,mpeg,mpegvideo,mxf,nut,nsv,rm,dv,swf,"
    "wtv,dhav,ifv,gif,apng,ivf,obu,av1,h261,h263,h264,hevc,vvc,m4v,vc1,mjpeg,yuv4mpegpipe"
)
# First bytes of the usual containers: tell a broken video from a file that is not a video.
_MAGIC = ((0, b"RIFF"), (0, b"\x1a\x45\xdf\xa3"), (0, b"FLV"), (0, b"OggS"), (0, b"\x30\x26\xb2\x75"), (0, b"GIF8"),
          (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x00\x00\x01\xba"), (0, b"\x00\x00\x01\xb3"))  # fmt: skip
_PLANAR = {"yuv420p", "yuv422p", "yuv444p", "yuv440p", "yuv411p", "yuv410p", "yuva420p", "nv12", "nv21"}
_FULL_RANGE = {"yuvj420p", "yuvj422p", "yuvj444p", "yuvj440p", "yuvj411p"}
_EXACT = Interpolation.BITEXACT | Interpolation.ACCURATE_RND
MAX_STREAMS = 128  # of a file, including sound and subtitles: a broadcast's whole multiplex has some dozens
# FFmpeg's log tells a file beyond a bound from a broken one where its error codes don't.
_BEYOND = re.compile(r"Picture size (\S+) exceeds specified max pixel count|exceeds max_streams")
COVERAGE = 0.9  # of the announced length must decode, or the file is truncated

Fit = Callable[[int, int], tuple[int, int]]  # upright (width, height) → the size wanted
Source = str | os.PathLike[str] | int  # a file's path, or a descriptor of it
Seen = TypeVar("Seen")
Choose = Callable[[int, float], Collection[int]]  # (frames, fps) → the indices wanted


def import_all() -> None:
    """Imports what PyAV would import when a file first needs it: for a process that soon can't open files."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on an untrusted file; None: no bound. Crossing one is a `VideoError` of rule `too_large`."""

    max_bytes: int | None = None
    max_seconds: float | None = None
    max_pixels: int | None = None  # of one frame
    max_frames: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts from decoding a whole file: the fields of `records.VideoRecord`, and what its header claimed."""

    codec: str
    width: int
    height: int
    rotation: int
    frames: int
    fps: float
    duration: float
    audio: bool
    brightness: float
    signature: str
    announced: int  # frames, according to the header; 0: it does not say
    decode_error: str  # FFmpeg's message if decoding broke after `frames` frames; "" if it did not
    truncated: str  # why the file counts as truncated; "" if it does not


def refuse(rule: str, message: str) -> VideoError:
    return VideoError(message, rule=rule, fix=RULES[rule])


class _Bytes:
    """A file without a name: PyAV would hand the name to FFmpeg, whose guesses must not depend on it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _no_other_file(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError("a video may not open other files")


def _words(error: BaseException) -> str:
    """An FFmpeg error without the made-up file name and number."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


@contextmanager
def _opened(path: Source, limits: Limits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """(container, video stream) of a file.

    Raises:
        VideoError: not_a_video, unreadable, too_large.
    """
    with _file(path, limits) as file:
        options = _options(limits)
        try:
            container = _container(file, options)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            _check_log(file, limits)
            file.seek(0)
            head = file.read(16)
            known = any(head[at : at + len(magic)] == magic for at, magic in _MAGIC)
            if known and not isinstance(error, av.error.ArgumentError):
                raise refuse("unreadable", f"its header can't be read: {_words(error)}") from error
            raise refuse("not_a_video", "no video format is recognised in it") from error
        with container:
            if len(container.streams) > MAX_STREAMS:
                raise refuse("too_large", f"more than {MAX_STREAMS} streams")
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise refuse("unreadable", "holds no video stream that can be decoded")
            context: Any = stream.codec_context
            if limits.max_pixels is not None and context.width * context.height > limits.max_pixels:
                raise refuse("too_large", f"{context.width}x{context.height} pixels, allowed are {limits.max_pixels:,}")
            context.options = options
            context.thread_count = 1  # files are decoded side by side; frame threads would blur where an error struck
            context.flags |= Flags.bitexact
            yield container, cast("VideoStream", stream)


@contextmanager
def _file(path: Source, limits: Limits) -> Iterator[IO[bytes]]:
    """A regular file of an allowed size, at its beginning."""
    try:
        if not isinstance(path, int) and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block forever
            raise refuse("not_a_video", "no regular file")
        file = open(path, "rb", buffering=0, closefd=not isinstance(path, int))  # noqa: SIM115
    except OSError as error:
        raise refuse("unreadable", f"can't be opened: {error.strerror}") from error
    with file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise refuse("not_a_video", "the file is empty")
        if limits.max_bytes is not None and size > limits.max_bytes:
            raise refuse("too_large", f"{size:,} bytes, allowed are {limits.max_bytes:,}")
        file.seek(0)
        yield file


def _options(limits: Limits) -> dict[str, str]:
    """Of FFmpeg's decoders."""
    return {} if limits.max_pixels is None else {"max_pixels": str(limits.max_pixels)}


def _container(file: IO[bytes], options: dict[str, str]) -> InputContainer:
    container = av.open(
        _Bytes(file),
        options=options,
        container_options={
            "format_whitelist": DEMUXERS,
            "protocol_whitelist": "none",
            "max_streams": str(MAX_STREAMS + 1),
        },
        io_open=_no_other_file,
        metadata_errors="replace",
        buffer_size=1 << 17,
    )
    return cast("InputContainer", container)  # of the two kinds, what reads


def _check_log(file: IO[bytes], limits: Limits) -> None:
    """Repeats, with FFmpeg's log, the decoding of a file that failed before its first frame, up to its first error.

    Raises:
        VideoError: too_large, if it stopped at a bound.
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as log, suppress(av.error.FFmpegError, OSError, ValueError):
            file.seek(0)
            with _container(file, _options(limits)) as container:
                stream = cast("VideoStream", container.streams.best("video"))
                stream.codec_context.options = _options(limits)
                next(container.decode(stream), None)
    finally:
        av.logging.set_skip_repeated(True)
        av.logging.set_level(level)
    for beyond in filter(None, (_BEYOND.search(message) for _, _, message in log)):
        if beyond[1]:
            raise refuse("too_large", f"{beyond[1]} pixels, allowed are {limits.max_pixels:,}")
        raise refuse("too_large", f"more than {MAX_STREAMS} streams")


def _check_again(path: Source, limits: Limits) -> None:
    """`_check_log` for a file that did open."""
    with _file(path, limits) as file:
        _check_log(file, limits)


class _Clock:
    """Counts decoded frames, and keeps their first and last timestamp and what broke the decoding off."""

    def __init__(self, stream: VideoStream) -> None:
        self.rate: Fraction = stream.average_rate or stream.guessed_rate or Fraction(0)
        self.base: Fraction = stream.time_base or Fraction(1)
        self.count = 0
        self.first: int | None = None
        self.last = 0
        self.broke = ""  # in FFmpeg's words; "" if nothing did

    def tick(self, frame: VideoFrame) -> None:
        self.count += 1
        if frame.pts is not None:
            self.last = frame.pts if self.first is None else max(self.last, frame.pts)
            self.first = frame.pts if self.first is None else min(self.first, frame.pts)

    @property
    def span(self) -> Fraction:
        """Seconds from the first shown frame to the last."""
        return Fraction(0) if self.first is None else (self.last - self.first) * self.base

    @property
    def fps(self) -> float:
        """From the timestamps, or else from the header; 0 if neither tells."""
        rate = (self.count - 1) / self.span if self.span > 0 else self.rate
        return round(float(rate), 3)

    @property
    def duration(self) -> float:
        """Seconds, the last frame included."""
        if self.span > 0:
            return round(float(self.span * self.count / (self.count - 1)), 3)
        return round(float(self.count / self.rate), 3) if self.rate else 0.0


def _frames(container: InputContainer, stream: VideoStream, clock: _Clock, limits: Limits) -> Iterator[VideoFrame]:
    """Decoded frames in display order. FFmpeg's errors pass through; limits are checked on the real frames."""
    for frame in container.decode(stream):
        clock.tick(frame)
        if limits.max_frames is not None and clock.count > limits.max_frames:
            raise refuse("too_large", f"more than {limits.max_frames:,} frames")
        if limits.max_seconds is not None and clock.span > limits.max_seconds:
            raise refuse("too_large", f"longer than {limits.max_seconds:g} seconds")
        if limits.max_pixels is not None and frame.width * frame.height > limits.max_pixels:
            raise refuse("too_large", f"{frame.width}x{frame.height} pixels, allowed are {limits.max_pixels:,}")
        yield frame


@contextmanager
def _noting(clock: _Clock) -> Iterator[None]:
    """Where a frame can't be decoded, the block ends and `clock.broke` says why. Limits and lack of memory pass."""
    try:
        yield
    except VideoError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        clock.broke = _words(error)


def _rotation(frame: VideoFrame) -> int:
    """Degrees clockwise, a multiple of 90, that the stored picture must be turned."""
    return round(-frame.rotation / 90) % 4 * 90


def _announced_seconds(container: InputContainer, stream: VideoStream) -> float:
    """The video's length according to the header; 0 if it does not say."""
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        return float(stream.frames / stream.average_rate)  # FFmpeg cuts an AVI's duration to what its index reaches
    if stream.duration:
        assert stream.time_base is not None
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration and not container.streams.audio else 0.0


def _cells(frame: VideoFrame, reformat: VideoReformatter, turn: int) -> np.ndarray:
    """The frame's `signature.grid`, upright: directly from the luma plane if there is one with 8 bits."""
    full = frame.format.name in _FULL_RANGE or frame.color_range == ColorRange.JPEG
    if frame.format.name in _PLANAR or frame.format.name in _FULL_RANGE:
        plane: Any = frame.planes[0]
        luma = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
    else:
        small = _converted(frame, reformat, "rgb24", lambda width, height: (min(width, 288), min(height, 256)), 0)
        full, luma = True, _luma_of_rgb(small)
    return signature.grid(np.rot90(luma, -turn // 90), full_range=full)


def _luma_of_rgb(picture: np.ndarray) -> np.ndarray:
    return (picture @ np.array([77, 150, 29], np.uint32) >> 8).astype(np.uint8)


class Picture:
    """A decoded frame, upright, in the sizes and colours that are asked for."""

    def __init__(self, frame: VideoFrame, reformat: VideoReformatter) -> None:
        self._frame, self._reformat, self._turn = frame, reformat, _rotation(frame)

    def rgb(self, fit: Fit | None) -> np.ndarray:
        """`(height, width, rgb) uint8`, resized by `fit`."""
        return _converted(self._frame, self._reformat, "rgb24", fit, self._turn)

    def luma(self, width: int, height: int) -> np.ndarray:
        """`(height, width) uint8`: the brightness of all of the picture, 0 to 255."""
        grey = _converted(self._frame, self._reformat, "gray", lambda *_: (width, height), self._turn)
        return np.ascontiguousarray(grey)


def _converted(frame: VideoFrame, reformat: VideoReformatter, colours: str, fit: Fit | None, turn: int) -> np.ndarray:
    """The frame in another pixel format, resized and turned upright."""
    width, height = frame.width, frame.height
    if fit is not None:
        sideways = turn in (90, 270)
        width, height = fit(*((height, width) if sideways else (width, height)))
        if sideways:
            width, height = height, width
    smaller = width <= frame.width and height <= frame.height
    method = Interpolation.AREA if smaller else Interpolation.BILINEAR
    scaled = reformat.reformat(frame, width, height, colours, interpolation=method | _EXACT, threads=1)
    return np.rot90(scaled.to_ndarray(), -turn // 90)


def inspect(path: Source, limits: Limits | None = None) -> Facts:
    """Decodes all of a file once.

    Raises:
        VideoError: not_a_video (no allowed demuxer recognises it), unreadable (no frame decodes), too_large.
    """
    limits = limits or Limits()
    with _opened(path, limits) as (container, stream):
        clock = _Clock(stream)
        grids = signature.Reservoir()
        reformat = VideoReformatter()
        width = height = turn = 0
        with _noting(clock):
            for frame in _frames(container, stream, clock, limits):
                if clock.count == 1:
                    turn = _rotation(frame)
                    width, height = (frame.height, frame.width) if turn in (90, 270) else (frame.width, frame.height)
                if grids.wants(clock.count - 1):
                    grids.add(_cells(frame, reformat, turn))
        if clock.count == 0:
            _check_again(path, limits)
            raise refuse("unreadable", f"no frame decodes: {clock.broke or 'the stream is empty'}")
        truncated = f"decoding broke after {clock.count} frames: {clock.broke}" if clock.broke else ""
        expected = _announced_seconds(container, stream)
        if not clock.broke and clock.span and clock.duration < COVERAGE * expected:
            truncated = f"{clock.duration:g} s decode of {expected:g} s announced"
        return Facts(
            codec=stream.codec_context.codec.canonical_name,
            width=width,
            height=height,
            rotation=turn,
            frames=clock.count,
            fps=clock.fps,
            duration=clock.duration,
            audio=bool(container.streams.audio),
            brightness=grids.brightness(),
            signature=grids.signature(clock.count),
            announced=stream.frames,
            decode_error=clock.broke,
            truncated=truncated,
        )


def read_chosen(
    path: Source,
    choose: Choose,
    look: Callable[[int, Picture], Seen],
    *,
    known: tuple[int, float] | None = None,
    limits: Limits | None = None,
    in_order: bool = False,
) -> tuple[dict[int, Seen], int, float]:
    """What `look` makes of the frames that `choose(frames, fps)` names. It sees each of them once.

    With `known` = (frames, fps) no more is decoded than the chosen frames need (see `seek`), or with `in_order` at
    least nothing after the last of them. Without it, the header's claim is tried first; if it turns out wrong, so that
    other frames must be chosen, the file is decoded again.

    Returns:
        {index: what `look(index, picture)` returned}, frames and fps (`known` if given, else as decoded).

    Raises:
        VideoError: not_a_video, unreadable (a frame chosen does not decode), too_large.
    """
    limits = limits or Limits()
    if known and not in_order:
        try:
            return _sought(path, set(choose(*known)), known[0], look, limits), *known
        except seek.Unsure:
            pass  # then everything is decoded in order
    with _opened(path, limits) as (container, stream):
        clock = _Clock(stream)
        claim = stream.frames or round(_announced_seconds(container, stream) * clock.rate)
        wanted = set(choose(*known) if known else choose(max(1, claim), round(float(clock.rate), 3)))
        last = max(wanted, default=-1) if known else None
        reformat = VideoReformatter()
        pictures: dict[int, Seen] = {}
        with _noting(clock):
            for frame in _frames(container, stream, clock, limits):
                index = clock.count - 1
                if index in wanted:
                    pictures[index] = look(index, Picture(frame, reformat))
                if index == last:
                    break
    if known is None:
        if clock.count == 0:
            _check_again(path, limits)
            raise refuse("unreadable", f"no frame decodes: {clock.broke or 'the stream is empty'}")
        counted = (clock.count, clock.fps)
        if wanted.issuperset(choose(*counted)):
            return pictures, *counted
        return read_chosen(path, choose, look, known=counted, limits=limits, in_order=True)
    missing = wanted.difference(pictures)
    if missing:
        if clock.count == 0:
            _check_again(path, limits)
        why = f": {clock.broke}" if clock.broke else ""
        raise refuse("unreadable", f"frame {min(missing)} is missing, {clock.count} decode{why}")
    return pictures, *known


def _sought(
    path: Source, wanted: set[int], count: int, look: Callable[[int, Picture], Seen], limits: Limits
) -> dict[int, Seen]:
    """`read_chosen`'s result with the least decoding.

    Raises:
        seek.Unsure: only decoding in order gives them.
    """
    with _opened(path, limits) as (container, stream):
        reformat = VideoReformatter()
        try:
            return {
                index: look(index, Picture(frame, reformat))
                for index, frame in seek.frames(container, stream, wanted, count)
            }
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            raise seek.Unsure from error


def read_frames(path: Source, indices: Sequence[int], *, limits: Limits | None = None) -> np.ndarray:
    """The frames of these indices, in the order given, upright.

    Returns:
        (len(indices), height, width, 3) uint8 rgb. A frame of another size is resized to the first one's.

    Raises:
        VideoError: not_a_video, unreadable (a frame asked for does not decode), too_large.
    """
    size: list[tuple[int, int]] = []

    def first_size(width: int, height: int) -> tuple[int, int]:
        size.append((width, height))
        return size[0]

    pictures, *_ = read_chosen(
        path, lambda frames, fps: indices, lambda index, picture: picture.rgb(first_size), known=(0, 0.0), limits=limits
    )
    return np.stack([pictures[index] for index in indices])
