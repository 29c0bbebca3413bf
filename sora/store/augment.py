"""Changes of whole clips that keep their class: NumPy only. A clip is `(time, height, width, rgb) uint8`.

Each kind draws from its own generator (see `batches`). So switching one kind on or off does not change what the
others draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sora.config import Train
from sora.core.tensors import FLOW, VIDEO, Clips
from sora.media.video import flow

VIEWS = ("mirrored", "left", "right")
_SHIFT = 0.08  # of height and width, at most
_CONTRAST = 0.25
_BRIGHTNESS = 25.0  # of 255
_VIEW = 0.04  # of the width
_ASPECT = 4 / 3  # largest aspect ratio of a crop; the smallest is its inverse
_FRACTION = 256  # positions between two pixels: 255 * 256 still fits into 16 bits


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Which changes training makes to its clips. The default: none.

    flip: each clip is shown as its mirror image (left and right) with probability one half.
    mirror: for each class the class of its mirror image: itself, another, or -1: such clips are never mirrored. None:
        each class is its own. For a clip with several classes this holds for each of them.
    jitter: every clip is moved by up to 8 % of its sides and varies in contrast and brightness, the same for all frames
        of the clip.
    speed, crop, noise: see `slower`, `resized_crop` and `noisy`; 0 is off.
    mix_up: the alpha of `mixed`; 0 is off.
    """

    flip: bool = False
    mirror: Sequence[int] | None = None
    jitter: bool = False
    speed: float = 0.0
    crop: float = 0.0
    noise: float = 0.0
    mix_up: float = 0.0

    @classmethod
    def of(cls, train: Train, classes: Sequence[str]) -> Augmentation:
        """The augmentation that the section `train` asks for.

        Raises:
            ValueError: `train.flip` names a class that is not among `classes`.
        """
        return cls(
            flip=train.flip is not False,
            mirror=train.mirrors(classes),
            jitter=train.jitter,
            speed=train.speed,
            crop=train.crop,
            noise=train.noise,
            mix_up=train.mix_up,
        )

    def __bool__(self) -> bool:
        """Whether there is any augmentation."""
        return any((self.flip, self.jitter, self.speed, self.crop, self.noise, self.mix_up))


def flip_and_jitter(clip: np.ndarray, rng: np.random.Generator, *, flip: bool, jitter: bool) -> tuple[np.ndarray, bool]:
    """With `flip` the mirror image (left and right) half of the time. With `jitter` shifts of up to 8 % of the sides,
    changed contrast and brightness, the same for all frames. Also returns whether the clip is mirrored.
    """
    # Drawn whether used or not: switching one of the two off must not change what the other draws.
    mirrored, vertical, horizontal = rng.random() < 0.5, *rng.uniform(-_SHIFT, _SHIFT, 2)
    contrast, brightness = rng.uniform(1 - _CONTRAST, 1 + _CONTRAST), rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    if flip and mirrored:
        clip = clip[:, :, ::-1]
    if jitter:
        levels = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
        height, width = clip.shape[1:3]
        clip = moved(
            levels.clip(0, 255).astype(np.uint8)[clip], round(vertical * height), round(horizontal * width)
        )  # fmt: skip
    return clip, flip and mirrored


def moved(clip: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moves the view `down` and `right` over the picture, in pixels; border pixels are repeated."""
    height, width = clip.shape[1:3]
    rows = (np.arange(height) + down).clip(0, height - 1)
    columns = (np.arange(width) + right).clip(0, width - 1)
    return clip[:, rows][:, :, columns]


def views(clips: Clips, names: Sequence[str]) -> Clips:
    """Every clip, followed by its other views, which the model also gets (test-time augmentation).

    `mirrored` is left-right, also of the tensor `flow`; `left` and `right` move the view 4 % of the width to that side.

    Returns:
        `len(clips) * (1 + len(names))` clips.

    Raises:
        KeyError: no such view.
    """
    if not names:
        return clips
    side = round(_VIEW * clips.video.shape[3])
    make: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mirrored": lambda clip: clip[:, :, ::-1],
        "left": lambda clip: moved(clip, 0, -side),
        "right": lambda clip: moved(clip, 0, side),
    }
    shown = np.stack([view for clip in clips.video for view in (clip, *(make[name](clip) for name in names))])
    tensors = {
        name: np.repeat(tensor, 1 + len(names), axis=0) for name, tensor in clips.tensors.items() if name != VIDEO
    }
    if FLOW in tensors and "mirrored" in names:
        place = slice(1 + list(names).index("mirrored"), None, 1 + len(names))
        tensors[FLOW][place] = flow.mirrored(tensors[FLOW][place])
    return Clips({VIDEO: shown, **tensors})


def resized_crop(clip: np.ndarray, rng: np.random.Generator, most: float) -> np.ndarray:
    """A random part of the picture at full size, the same in all frames. At most the share `most` of the area is lost.

    The random resized crop of Szegedy et al. 2015 (area uniform, aspect log-uniform from 3:4 to 4:3 of the picture's
    own), with areas close to the whole: a small clip of an action has little to spare.
    """
    height, width = clip.shape[1:3]
    area, aspect = rng.uniform(1 - most, 1), np.exp(rng.uniform(-np.log(_ASPECT), np.log(_ASPECT)))
    rows, columns = min(1.0, np.sqrt(area / aspect)) * height, min(1.0, np.sqrt(area * aspect)) * width
    top, left = rng.uniform(0, height - rows), rng.uniform(0, width - columns)
    clip = _resampled(clip, top + (np.arange(height) + 0.5) * rows / height - 0.5, 1)
    return _resampled(clip, left + (np.arange(width) + 0.5) * columns / width - 0.5, 2)


def _resampled(clip: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along one axis, in 16-bit integers: a third of the time of floating point."""
    length = clip.shape[axis]
    scaled = np.round(positions.clip(0, length - 1) * _FRACTION).astype(np.int64)
    first = scaled // _FRACTION
    shape = [1] * clip.ndim
    shape[axis] = -1
    part = (scaled % _FRACTION).astype(np.uint16).reshape(shape)
    low = clip.take(first, axis).astype(np.uint16)
    low *= _FRACTION - part
    high = clip.take((first + 1).clip(max=length - 1), axis).astype(np.uint16)
    high *= part
    low += high
    low >>= 8
    return low.astype(np.uint8)


def slower(clip: np.ndarray, rng: np.random.Generator, most: float) -> np.ndarray:
    """A random span of the clip, stretched over all of its frames, down to 1 / (1 + `most`) of its time: slower motion.

    Frames repeat. Faster motion would need frames that the clip does not hold.
    """
    frames = len(clip)
    span = (frames - 1) / (1 + rng.uniform(0, most))
    start = rng.uniform(0, frames - 1 - span)
    return clip[np.round(start + np.linspace(0, span, frames)).astype(np.int64)]


def noisy(clip: np.ndarray, rng: np.random.Generator, most: float) -> np.ndarray:
    """Adds Gaussian noise with a deviation of up to `most` levels (of 255), new in every pixel of every frame."""
    noise = rng.standard_normal(clip.shape, np.float32)
    noise *= np.float32(rng.uniform(0, most))
    noise += clip
    np.rint(noise, out=noise)
    return noise.clip(0, 255, out=noise).astype(np.uint8)


def mixed(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, rng: np.random.Generator, alpha: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blends every clip of a batch with another one of it: mix-up (Zhang et al. 2018). Each clip has its own share.

    x `(batch, time, height, width, rgb) uint8`, y `(batch, classes) float32`, w `(batch,) float32`, the weights in the
    loss; all three are blended by the same share of Beta(`alpha`, `alpha`).
    """
    other = rng.permutation(len(x))
    share = rng.beta(alpha, alpha, len(x)).astype(np.float32)
    levels = np.round(share * _FRACTION).astype(np.uint16)
    share = (levels / _FRACTION).astype(np.float32)
    result = np.empty_like(x)
    for number, level in enumerate(levels):
        blend = x[number].astype(np.uint16) * level
        blend += x[other[number]].astype(np.uint16) * (_FRACTION - level)
        blend >>= 8
        result[number] = blend
    y = share[:, None] * y + (1 - share[:, None]) * y[other]
    return result, y, share * w + (1 - share) * w[other]
