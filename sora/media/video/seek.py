"""Chosen frames of a file without decoding what they don't need.

Two ways to decode less, both with the very frames of decoding everything in order:

- Jump from one wanted frame to the last key frame before the next, if that is after the frames done already.
- In H.264, frames that no other frame refers to (`nal_ref_idc` 0; half of what x264 makes) are decoded only if wanted.

What can be proven wrong is not used: the packets' timestamps must name as many frames as decoding the whole file
found, each once, and every wanted frame must be decoded. Otherwise `Unsure`, and the caller decodes in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

# Containers whose packets have exact timestamps and whose index of key frames can be relied on; codecs whose key
# frames need nothing before them.
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores")


class Unsure(Exception):
    """Only decoding in order gives these frames for certain."""


def frames(container: Any, stream: Any, wanted: Collection[int], count: int) -> Iterator[tuple[int, Any]]:
    """(index, frame) of the wanted frames, in display order.

    Arguments:
        container, stream: of PyAV, just opened.
        wanted: indices among the frames of the whole file, in display order.
        count: frames of the whole file, counted by decoding all of it.

    Raises:
        Unsure: see the module. Frames yielded before it are right anyway.
    """
    context = stream.codec_context
    if container.format.name not in _CONTAINERS or context.name not in _CODECS:
        raise Unsure
    shown, keys = _packets(container, stream, count)
    place = {pts: index for index, pts in enumerate(shown)}
    unused = "NONREF" if context.name == "h264" else "DEFAULT"
    try:
        for key, indices in _runs(sorted(wanted), keys):
            left = {shown[index] for index in indices}
            container.seek(shown[key], stream=stream)
            arrived = False
            for packet in container.demux(stream):
                if packet.size and not arrived:
                    if place.get(packet.pts, count) > key:
                        raise Unsure
                    arrived = True
                context.skip_frame = "DEFAULT" if packet.pts in left else unused
                for frame in packet.decode():
                    if frame.pts in left:
                        if frame.is_corrupt:
                            raise Unsure
                        left.remove(frame.pts)
                        yield place[frame.pts], frame
                if not left:
                    break
            if left:
                raise Unsure
    finally:
        context.skip_frame = "DEFAULT"


def _packets(container: Any, stream: Any, count: int) -> tuple[list[int], list[int]]:
    """All frames' timestamps in display order, and the indices of the key frames."""
    shown, keys = [], []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_discard:
            raise Unsure
        shown.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    shown.sort()
    if len(shown) != count or any(a == b for a, b in pairwise(shown)):
        raise Unsure
    place = {pts: index for index, pts in enumerate(shown)}
    keys = sorted(place[pts] for pts in keys)
    if not keys or keys[0] != 0:
        raise Unsure
    return shown, keys


def _runs(wanted: list[int], keys: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(key frame to start at, wanted frames) of each stretch that is decoded without a jump."""
    run: list[int] = []
    begin = 0
    for index in wanted:
        key = keys[bisect_right(keys, index) - 1]
        if run and key > run[-1] + 1:
            yield begin, run
            run = []
        if not run:
            begin = key
        run.append(index)
    if run:
        yield begin, run
