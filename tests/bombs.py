"""Files that are small on the disk and cost much to decode."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import av
import cv2
import numpy as np


def raw_h264(path: Path, repeats: int) -> Path:
    """`repeats` times 125 frames of 4096x2304 that show one picture."""
    stretch = path.with_suffix(".one.h264")
    with av.open(str(stretch), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "x264-params": "keyint=125"})
        stream.width, stream.height, stream.pix_fmt = 4096, 2304, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((2304 * 3 // 2, 4096), 128, np.uint8), format="yuv420p")
        for index in range(125):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = stretch.read_bytes()
    stretch.unlink()
    with path.open("wb") as file:
        for _ in range(repeats):
            file.write(data)
    return path


def animated_png(path: Path, side: int = 15_000, frames: int = 4) -> Path:
    """An APNG of `side` x `side` zeros: RGBA, so 900 MB a frame at 15,000."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(4 * side + 1)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))]
    parts.append(chunk(b"acTL", struct.pack(">II", frames, 0)))
    number = 0
    for index in range(frames):
        parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, side, side, 0, 0, 1, 10, 0, 0)))
        number += 1
        if index:
            parts.append(chunk(b"fdAT", struct.pack(">I", number) + pixels))
            number += 1
        else:
            parts.append(chunk(b"IDAT", pixels))
    path.write_bytes(b"".join([*parts, chunk(b"IEND", b"")]))
    return path


def motion_jpeg(path: Path, side: int = 8192, frames: int = 2) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.full((side * 3 // 2, side), 128, np.uint8), format="yuvj420p")
        for index in range(frames):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def many_streams(path: Path, count: int = 2000, frames: int = 10) -> Path:
    """A Matroska file of `count` video streams of 32x32 pixels."""

    def element(name: str, data: bytes) -> bytes:
        return bytes.fromhex(name) + struct.pack(">Q", (1 << 56) | len(data)) + data

    def number(name: str, value: int) -> bytes:
        return element(name, value.to_bytes(4, "big"))

    done, picture = cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))
    assert done
    head = number("4286", 1) + number("42F7", 1) + number("42F2", 4) + number("42F3", 8)
    head += element("4282", b"matroska") + number("4287", 4) + number("4285", 2)
    size = element("E0", number("B0", 32) + number("BA", 32))
    tracks = b"".join(
        element("AE", number("D7", n) + number("73C5", n) + number("83", 1) + element("86", b"V_MJPEG") + size)
        for n in range(1, count + 1)
    )
    blocks = b"".join(
        element("A3", struct.pack(">HhB", 0x4000 | n, 100 * at, 0x80) + picture.tobytes())
        for at in range(frames)
        for n in range(1, count + 1)
    )
    body = element("1549A966", number("2AD7B1", 1_000_000)) + element("1654AE6B", tracks)
    body += element("1F43B675", number("E7", 0) + blocks)
    path.write_bytes(element("1A45DFA3", head) + element("18538067", body))
    return path
