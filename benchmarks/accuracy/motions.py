"""Draws `motions8`, 200 clips whose class is a motion and nothing else: `python -m benchmarks.accuracy.motions OUT`.

25 made-up persons, a clip of each of eight motions: OUT/<motion>/P<person>.mp4 and OUT/labels.csv with the person as
group. A thing of the person's own passes along a lane that ends at two posts; what leaves at one post comes back at the
other. In every clip it covers the lane evenly, in whole laps, from a start that is drawn. So a frame, and all frames
without their order, look alike for every motion:

    left, right                         one lap
    left_fast, right_fast               two laps in the same time
    left_then_right, right_then_left    a lap each way
    slow_then_fast, fast_then_slow      a lap in two thirds of the time and one in a third; the direction is drawn

Persons differ in shape, colours, texture, size, lane, room, camera, light, sensor, frame rate and length. Clouds and
small things drift through the picture in directions of their own, and the camera shakes and pans.

The pixels depend on the seed alone; the bytes on the build of FFmpeg, too.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from demo.make_demo import encode
from sora.core.errors import InputError, SoraError
from sora.core.files import source_digest, writing
from sora.core.progress import bar, say

MOTIONS = (
    "left", "right", "left_fast", "right_fast", "left_then_right", "right_then_left", "slow_then_fast", "fast_then_slow"
)  # fmt: skip
# Mirrored, each of a pair is the other. The last two are their own mirror images.
MIRRORED = tuple(zip(MOTIONS[:6:2], MOTIONS[1:6:2], strict=True))
PERSONS = 25
WIDTH, HEIGHT = 160, 120
MARGIN = 24  # pixels around the picture into which the camera moves
SHAPES = ("disc", "square", "diamond", "ring", "bar", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots")


@dataclass(frozen=True)
class Person:
    """How one person's clips look. Lengths are pixels, speeds pixels a second."""

    number: int
    fps: int
    frames: int  # a multiple of 6, so that halves and thirds of a clip are whole frames
    thing: np.ndarray = field(repr=False)  # (side, side, rgb and alpha) float32, colours times alpha
    room: np.ndarray = field(repr=False)  # (height, width, rgb) float32, with the margin
    posts: tuple[float, float, float]  # colour
    lane: int  # its length: a lap
    noise: float  # deviation of a pixel
    shake: float  # deviation of a frame's step
    light: float
    bob: float  # how far the thing goes up and down

    @property
    def group(self) -> str:
        return f"P{self.number:02d}"


def make_person(number: int, seed: int = 0) -> Person:
    """The same person for the same number and seed."""
    rng = np.random.default_rng([seed, number])
    fps = int(rng.integers(20, 31))
    return Person(
        number=number,
        fps=fps,
        frames=6 * round(fps * rng.uniform(1.8, 2.2) / 6),
        thing=_thing(rng),
        room=_room(rng),
        posts=_colour(rng),
        lane=int(rng.integers(84, 105)),  # inside the middle square of the picture, which is what clips show
        noise=rng.uniform(4, 9),
        shake=rng.uniform(0.2, 0.7),
        light=rng.uniform(0.75, 1.15),
        bob=rng.uniform(0, 4),
    )


def _colour(rng: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in rng.uniform(20, 235, 3))
    return red, green, blue


def _thing(rng: np.random.Generator) -> np.ndarray:
    """What moves, (side, side, rgb and alpha) float32; it is drawn four times as large and then shrunk."""
    side = int(rng.integers(18, 27))
    large = 4 * side
    y, x = np.mgrid[:large, :large] / (large / 2) - 1  # -1 … 1
    shape, texture = rng.choice(SHAPES), rng.choice(TEXTURES)
    far = np.hypot(x, y)
    inside = {
        "disc": far < 0.9,
        "square": np.maximum(abs(x), abs(y)) < 0.8,
        "diamond": abs(x) + abs(y) < 0.95,
        "ring": (far < 0.92) & (far > 0.45),
        "bar": (abs(x) < 0.4) & (abs(y) < 0.92),
        "cross": np.minimum(abs(x), abs(y)) < 0.3,
    }[str(shape)] & (np.maximum(abs(x), abs(y)) < 0.95)  # fmt: skip
    fine, angle = rng.uniform(5, 9), rng.uniform(0, math.pi)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    second = {
        "plain": np.zeros_like(inside),
        "stripes": np.sin(fine * along) > 0,
        "checks": np.sin(fine * along) * np.sin(fine * across) > 0,
        "dots": np.sin(fine * along) * np.sin(fine * across) > 0.5,
    }[str(texture)]
    colours = np.where(second[..., None], _colour(rng), _colour(rng)) * inside[..., None]
    picture = np.concatenate([colours, inside[..., None]], axis=-1).astype(np.float32)
    return np.asarray(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA))


def _room(rng: np.random.Generator) -> np.ndarray:
    """A cluttered background, (height, width, rgb) float32, with the margin."""
    height, width = HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
    picture = cv2.resize(
        rng.uniform(50, 200, (4, 5, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    for _ in range(int(rng.integers(10, 20))):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = int(rng.integers(6, 45)), int(rng.integers(6, 45))
        cv2.rectangle(picture, (x, y), (x + w, y + h), _colour(rng), int(rng.choice([-1, 2])))
    return np.asarray(cv2.GaussianBlur(picture, (3, 3), 0).clip(0, 255))


def path_of(motion: str, frames: int) -> np.ndarray:
    """Where the thing is in each frame, `(frames,) float64`, in laps from its start; right is positive.

    Modulo a lap, all motions visit all of the lane equally often. The two of the last pair go to the right here.

    Args:
        frames: a multiple of 6.

    Raises:
        InputError: no motion of this name.
    """
    if motion not in MOTIONS:
        raise InputError(f"{motion!r} is no motion", fix=f"use one of {', '.join(MOTIONS)}")
    at = np.arange(frames) / frames
    if motion == "slow_then_fast":
        return np.where(at < 2 / 3, 1.5 * at, 1 + 3 * (at - 2 / 3))
    if motion == "fast_then_slow":
        return np.where(at < 1 / 3, 3 * at, 1 + 1.5 * (at - 1 / 3))
    sign = -1 if motion.startswith("left") else 1
    if "then" in motion:
        # Half a step aside, so that the way back visits the places between, and none twice in a row.
        return sign * np.where(at < 0.5, 2 * at, 2 * (1 - at) - 1 / frames)
    return sign * at * (2 if motion.endswith("fast") else 1)


def make_clip(person: Person, motion: str, seed: int = 0) -> np.ndarray:
    """One clip, `(frames, height, width, rgb) uint8`. Whatever is drawn here, but the path, knows no motion.

    Raises:
        InputError: no motion of this name.
    """
    laps = path_of(motion, person.frames)
    rng = np.random.default_rng([seed, person.number, MOTIONS.index(motion), 7])
    if MOTIONS.index(motion) >= 6:
        laps = laps * rng.choice([-1, 1])
    laps = laps + rng.random()
    seconds = np.arange(person.frames) / person.fps
    left = MARGIN + (WIDTH - person.lane) // 2 + int(rng.integers(-4, 5))
    top = MARGIN + HEIGHT // 2 - person.thing.shape[0] // 2 + int(rng.integers(-14, 15))
    bobs = person.bob * np.sin(2 * math.pi * (rng.uniform(0.3, 1.2) * seconds + rng.random()))
    pan, view = rng.uniform(-4, 4, 2), np.full(2, float(MARGIN)) + rng.uniform(-5, 5, 2)
    light, flicker = person.light * rng.uniform(0.9, 1.1), rng.uniform(0, 0.03)
    clouds, wind, dense = _clouds(rng), rng.uniform(-30, 30, 2), rng.uniform(10, 25)
    drifting = [
        (rng.uniform((0, 0), (WIDTH, HEIGHT)), rng.uniform(-60, 60, 2), int(rng.integers(2, 6)), _colour(rng))
        for _ in range(int(rng.integers(2, 5)))
    ]
    frames = np.empty((person.frames, HEIGHT, WIDTH, 3), np.uint8)
    shaken = np.zeros(2)
    for number, second in enumerate(seconds):
        shaken = 0.7 * shaken + rng.normal(0, person.shake, 2)
        scene = person.room.copy()
        for start, speed, radius, colour in drifting:
            x, y = (start + speed * second) % (WIDTH, HEIGHT) + MARGIN
            cv2.circle(scene, (round(x * 16), round(y * 16)), radius * 16, colour, -1, cv2.LINE_AA, 4)
        _draw(scene, person, left, top, bobs[number], laps[number] % 1)
        x, y = view + pan * (second - seconds[-1] / 2) + shaken
        picture = cv2.warpAffine(scene, np.array([[1, 0, -x], [0, 1, -y]], np.float32), (WIDTH, HEIGHT))
        x, y = (wind * second) % 64
        shade = cv2.warpAffine(
            clouds, np.array([[1, 0, x], [0, 1, y]], np.float32), (WIDTH, HEIGHT), borderMode=cv2.BORDER_WRAP
        )
        picture = (picture + dense * shade[..., None]) * (light * (1 + flicker * rng.normal()))
        picture += person.noise * rng.standard_normal(picture.shape, np.float32)
        frames[number] = picture.clip(0, 255)
    return frames


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Light and shade that repeats each 64 pixels, `(128, 192) float32`, -1 … 1 or so."""
    tile = np.tile(rng.uniform(-1, 1, (4, 4)).astype(np.float32), (3, 3))
    smooth = cv2.resize(tile, (192, 192), interpolation=cv2.INTER_CUBIC)[64:128, 64:128]
    return np.tile(smooth, (2, 3))


def _draw(scene: np.ndarray, person: Person, left: int, top: int, bob: float, lap: float) -> None:
    """The thing at `lap` (0 … 1) of the lane that begins at (`left`, `top`), and the posts in front of it.

    What hangs over one end of the lane is drawn at the other, so that as much of the thing is seen in every frame.
    """
    side, whole = person.thing.shape[0], math.floor(bob)
    strip = np.zeros((side + 1, person.lane, 4), np.float32)
    for x in (lap * person.lane, (lap - 1) * person.lane):
        moved = np.array([[1, 0, x], [0, 1, bob - whole]], np.float32)
        strip += cv2.warpAffine(person.thing, moved, (person.lane, side + 1))
    rows, columns = slice(top + whole, top + whole + side + 1), slice(left, left + person.lane)
    scene[rows, columns] = scene[rows, columns] * (1 - strip[..., 3:]) + strip[..., :3]
    for x in (left - 4, left + person.lane):
        cv2.rectangle(scene, (x, top - 8), (x + 3, top + side + 8), person.posts, -1)


def make(out: Path, *, persons: int = PERSONS, seed: int = 0) -> list[Path]:
    """Writes the set into `out`, which is new or empty; returns the videos. A smaller set is a part of the larger one.

    Raises:
        InputError: `out` holds something.
        DiskFull, ReadOnly, ServiceError: see `sora.core.files.writing`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder", fix="name a new one")
    made: list[Path] = []
    rows = []
    with bar("Drawing") as update, writing(out):
        for number in range(persons):
            person = make_person(number, seed)
            for motion in MOTIONS:
                file = out / motion / f"{person.group}.mp4"
                encode(file, make_clip(person, motion, seed), person.fps)
                made.append(file)
                rows.append((file.relative_to(out).as_posix(), motion, person.group))
                update(len(made), persons * len(MOTIONS))
        with (out / "labels.csv").open("w", encoding="utf-8", newline="") as table:
            csv.writer(table, lineterminator="\n").writerows([("path", "label", "group"), *rows])
    return made


def cached(cache: Path) -> Path:
    """The set's folder below `cache`, drawn on first use; other code of this module draws another one.

    Raises:
        DiskFull, ReadOnly, ServiceError: see `sora.core.files.writing`.
    """
    folder = cache / f"motions8-{source_digest(Path(__file__).parent, [Path(__file__).name])}"
    if not folder.exists():
        # Under another name until it is complete: a killed run leaves no half set to be measured.
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        shutil.rmtree(draft, ignore_errors=True)
        make(draft)
        with writing(folder):
            try:
                draft.rename(folder)
            except OSError:
                if not folder.exists():  # another process was quicker, with the same pixels
                    raise
                shutil.rmtree(draft)
    return folder


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path, help="a new folder")
    options.add_argument("--seed", type=int, default=0, help="[default: %(default)s]")
    given = options.parse_args(arguments)
    try:
        files = make(given.out, seed=given.seed)
    except SoraError as error:
        say(f"motions8: {error}")
        return error.exit_code
    print(f"{len(files)} clips, {sum(file.stat().st_size for file in files):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
