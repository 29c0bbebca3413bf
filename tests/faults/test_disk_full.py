"""The disk is full from some write on: the run says so, loses nothing, and goes on once there is room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.inject import fill, small_disk, until
from benchmarks.faults.processes import Case, Verb
from benchmarks.faults.scenes import LIMIT, Scenes, case_of
from tests.faults.conftest import holds, runs, speaks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def small(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A project that lies, with its temporary folder, on a disk of its own."""
    place = tmp_path_factory.mktemp("full")
    try:
        disk = small_disk(place / "disk")
        disk.__enter__()
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {error}")
    try:
        with case_of(scenes, "fitted", place / "disk" / "case", out=place / "out") as case:
            yield case
    finally:
        disk.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("left", "share"),
    # Before anything is written; when the servers start; in the middle of the flow; after the judgement is near.
    [(0, 0.0), (300_000, 0.0), (0, 0.35), (20_000, 0.6), (0, 0.85)],
)
def test_full(scenes: Scenes, small: Case, left: int, share: float) -> None:
    ballast = small.folder / "ballast"
    with Verb(small, "run", "--json") as verb:
        until(verb, share * scenes.seconds["fitted"])
        fill(ballast, left)
        try:
            verb.wait(LIMIT)
        finally:
            ballast.unlink()
    # That `sora run` names the full disk, whichever process met it, is asked in docs/security.md, section 14.
    speaks(verb)
    holds(small, finished=verb.process.returncode == 0)


def test_room_again(small: Case) -> None:
    """Last: what filled the disk is gone."""
    runs(small)
    holds(small, reproduce=True)


def test_the_ballast_leaves_what_was_asked(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk", megabytes=2):
            fill(tmp_path / "disk" / "ballast", 8192)
            with pytest.raises(OSError, match="No space left"):
                (tmp_path / "disk" / "more").write_bytes(b"x" * 20_000)
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {error}")
    assert not (tmp_path / "disk").exists()
