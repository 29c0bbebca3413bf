"""Draws and encodes the demo set: `python demo/make_demo.py OUT` writes OUT/<action>/p<person>_<camera>_t<take>.mp4.

Four actions by twenty made-up people, four takes each: 320 clips of 2 s, 160x120, h264. Made so that a still frame
says next to nothing: whatever the action, all limbs stand in poses drawn from the same distributions, and only what
*moves* is the action. Every person has colours, proportions, a habit of moving, a room and a camera of their own; the
camera shakes and pans, lamps flicker, things move through the picture, and the sensor is noisy.

The bytes in the repository's DVC remote are the demo set; encoding again with another FFmpeg may give others.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np

ACTIONS = ("bend", "kick", "squat", "wave")
PEOPLE = 20
TAKES = 4
WIDTH, HEIGHT, FPS, FRAMES = 160, 120, 12, 24
_CAMERAS = ("door", "desk", "wall", "yard")


@dataclass(frozen=True)
class Person:
    """How one person looks and moves, and where. Lengths are shares of the figure's height, angles are radians."""

    number: int
    camera: str
    skin: tuple[int, int, int]
    shirt: tuple[int, int, int]
    trousers: tuple[int, int, int]
    height: float  # pixels
    girth: float  # of limbs, pixels
    leg: float  # share of the height
    tempo: float  # cycles a second
    swing: float  # of the moving limb
    room: np.ndarray = field(repr=False)  # (height, width, rgb) float32, larger than the picture
    noise: float = 4.0
    shake: float = 1.0  # pixels


def make_person(number: int, seed: int = 0) -> Person:
    """The same person for the same number and seed."""
    rng = np.random.default_rng([seed, number])

    def colour(low: int, high: int) -> tuple[int, int, int]:
        red, green, blue = (int(v) for v in rng.integers(low, high, 3))
        return red, green, blue

    return Person(
        number=number,
        camera=_CAMERAS[number % len(_CAMERAS)],
        skin=colour(120, 230),
        shirt=colour(20, 235),
        trousers=colour(20, 235),
        height=rng.uniform(78, 92),
        girth=rng.uniform(6, 9),
        leg=rng.uniform(0.44, 0.5),
        tempo=rng.uniform(0.9, 1.5),
        swing=rng.uniform(0.85, 1.15),
        room=_room(rng),
        noise=rng.uniform(2, 5),
        shake=rng.uniform(0.3, 1.0),
    )


def _room(rng: np.random.Generator) -> np.ndarray:
    """A cluttered background, (height, width, rgb) float32, with a margin for the camera's movement."""
    height, width = HEIGHT + 60, WIDTH + 80
    coarse = rng.uniform(50, 200, (4, 5, 3)).astype(np.float32)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(14, 24)):
        shade = [float(v) for v in rng.uniform(20, 235, 3)]
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        if rng.random() < 0.6:
            w, h = int(rng.integers(6, 50)), int(rng.integers(6, 60))
            cv2.rectangle(picture, (x, y), (x + w, y + h), shade, int(rng.choice([-1, 2])))
        else:
            angle = rng.uniform(0, math.pi)
            end = (int(x + 60 * math.cos(angle)), int(y + 60 * math.sin(angle)))
            cv2.line(picture, (x, y), end, shade, int(rng.integers(2, 6)))  # as thick as a limb
    return cv2.GaussianBlur(picture, (3, 3), 0).clip(0, 255)


def make_take(person: Person, action: str, take: int, seed: int = 0) -> np.ndarray:
    """One clip, (frames, height, width, rgb) uint8."""
    rng = np.random.default_rng([seed, person.number, ACTIONS.index(action), take, 7])
    # Where every joint rests: the same distributions for all actions. Angles from straight down, + is to the right.
    arms = [rng.uniform(0.2, 2.7) * side for side in (-1, 1)]
    elbows = [rng.uniform(-0.9, 0.9) for _ in range(2)]
    legs = [rng.uniform(0.05, 0.75) * side for side in (-1, 1)]
    tilt, crouch = rng.uniform(-0.5, 0.5), rng.uniform(0.0, 0.4)
    limb, phase = int(rng.integers(2)), rng.uniform(0, 2 * math.pi)
    tempo = person.tempo * rng.uniform(0.85, 1.15)
    where = np.array([WIDTH / 2 + rng.uniform(-12, 12), HEIGHT * 0.93 + rng.uniform(-5, 3)])
    camera = np.array([40 + rng.uniform(-12, 12), 30 + rng.uniform(-10, 10)])
    pan = rng.uniform(-0.3, 0.3, 2) * (1.0, 0.4)  # pixels a frame
    light, flicker = rng.uniform(0.75, 1.15), rng.uniform(0, 0.04)
    things = [_thing(rng) for _ in range(int(rng.integers(0, 3)))]
    shaken = np.zeros(2)
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for index in range(FRAMES):
        swing = math.sin(2 * math.pi * tempo * index / FPS + phase) * person.swing
        now_arms, now_legs, now_tilt, now_crouch = list(arms), list(legs), tilt, crouch
        if action == "wave":
            now_arms[limb] += 0.95 * swing
        elif action == "kick":
            now_legs[limb] += 0.7 * swing
        elif action == "bend":
            now_tilt += 0.5 * swing
        else:
            now_crouch += 0.27 * swing
        shaken = 0.7 * shaken + rng.normal(0, person.shake, 2)
        view = camera + pan * (index - FRAMES / 2) + shaken
        picture: np.ndarray = cv2.warpAffine(
            person.room,
            np.array([[1, 0, -view[0]], [0, 1, -view[1]]], np.float32),
            (WIDTH, HEIGHT),
            borderMode=cv2.BORDER_REFLECT,
        )
        feet = where - pan * (index - FRAMES / 2) - shaken
        for start, speed, radius, shade in things:
            centre = start + speed * index - shaken
            cv2.circle(picture, (int(centre[0]), int(centre[1])), radius, shade, -1, cv2.LINE_AA)
        _draw(picture, person, feet, now_arms, elbows, now_legs, now_tilt, now_crouch)
        picture *= light * (1 + flicker * rng.normal())
        frames[index] = (picture + rng.normal(0, person.noise, picture.shape)).clip(0, 255)
    return frames


def _thing(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int, tuple[float, float, float]]:
    """Something that passes: where it starts, pixels a frame, radius, colour."""
    red, green, blue = (float(v) for v in rng.uniform(30, 230, 3))
    start, speed = rng.uniform((0, 0), (WIDTH, HEIGHT)), rng.uniform(-4, 4, 2)
    return start, speed, int(rng.integers(3, 8)), (red, green, blue)


def _draw(
    picture: np.ndarray,
    person: Person,
    feet: np.ndarray,
    arms: list[float],
    elbows: list[float],
    legs: list[float],
    tilt: float,
    crouch: float,
) -> None:
    """The figure, feet first: `crouch` shortens the legs' reach and bends the knees outwards."""
    size = person.height
    shank = person.leg * size / 2
    reach = math.cos(min(1.2, max(0.0, crouch) * 1.9))
    hip = feet - (0, 2 * shank * reach)
    neck = hip + _along(math.pi - tilt, 0.34 * size)
    thick = max(2, round(person.girth))
    for side, angle in enumerate(legs):
        outwards = (-1 if side == 0 else 1) * max(0.0, crouch) * 1.6
        knee = hip + _along(angle + outwards, shank)
        foot = knee + _along(angle - outwards, shank)
        _limb(picture, (hip, knee, foot), person.trousers, thick)
    _limb(picture, (hip, neck), person.shirt, round(thick * 1.9))
    for angle, elbow in zip(arms, elbows, strict=True):
        middle = neck + _along(angle, 0.17 * size)
        _limb(picture, (neck, middle), person.shirt, thick)
        _limb(picture, (middle, middle + _along(angle + elbow, 0.17 * size)), person.skin, max(2, thick - 1))
    head = neck + _along(math.pi - tilt, 0.1 * size)
    cv2.circle(picture, (round(head[0]), round(head[1])), round(0.085 * size), person.skin, -1, cv2.LINE_AA)


def _along(angle: float, length: float) -> np.ndarray:
    """From straight down (0) over the right (pi / 2) to straight up (pi); y points down."""
    return np.array([math.sin(angle), math.cos(angle)]) * length


def _limb(picture: np.ndarray, points: tuple[np.ndarray, ...], colour: tuple[int, int, int], thick: int) -> None:
    for start, end in pairwise(points):
        a, b = ((round(p[0] * 16), round(p[1] * 16)) for p in (start, end))  # 4 bits below the pixel
        cv2.line(picture, a, b, [float(v) for v in colour], thick, cv2.LINE_AA, 4)


def encode(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """`frames` (time, height, width, rgb) uint8 as h264.

    One thread and no macroblock tree, with which x264 gave other bytes from call to call for so small a picture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": "27", "preset": "slow", "threads": "1", "x264-params": "no-mbtree=1"}
        )
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = Fraction(1, fps)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make(out: Path, *, people: int = PEOPLE, takes: int = TAKES, seed: int = 0) -> list[Path]:
    """Writes the set below `out`; returns the files. A smaller set is a part of the larger one."""
    made = []
    for number in range(people):
        person = make_person(number, seed)
        for action in ACTIONS:
            for take in range(1, takes + 1):
                path = out / action / f"p{number:02d}_{person.camera}_t{take}.mp4"
                encode(path, make_take(person, action, take, seed))
                made.append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    files = make(out)
    print(f"{len(files)} clips, {sum(f.stat().st_size for f in files):,} bytes")


if __name__ == "__main__":
    main()
