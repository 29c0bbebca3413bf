"""Small real videos for tests, encoded with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def make_video(
    path: Path,
    *,
    frames: int = 24,
    size: tuple[int, int] = (64, 48),
    fps: int = 12,
    codec: str = "libx264",
    seed: int = 0,
    audio: bool = False,
    brightness: int = 128,
) -> Path:
    """A textured background of its own (from `seed`) with a moving square. `size` is (width, height)."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-60, 60, (6, 8, 3))
    picture = np.kron(coarse, np.ones((height // 6 + 1, width // 8 + 1, 1)))[:height, :width] + brightness
    step = rng.integers(1, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for index in range(frames):
            image = picture.copy()
            left = (index * step) % max(1, width - 12)
            image[height // 3 : height // 3 + 12, left : left + 12] = 250
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            wave.sample_rate = 16000
            container.mux(sound.encode(wave))
            container.mux(sound.encode())
    return path


def make_folder(
    folder: Path, classes: tuple[str, ...] = ("jump", "wave"), groups: int = 6, each: int = 1, **options: object
) -> Path:
    """`folder/<class>/g<group>_<n>.mp4`: labelled videos, every one different."""
    seed = 0
    for label in classes:
        for group in range(groups):
            for number in range(each):
                seed += 1
                make_video(folder / label / f"g{group:02d}_{number}.mp4", seed=seed, **options)  # type: ignore[arg-type]
    return folder
