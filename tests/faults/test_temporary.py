"""What a killed process left in the temporary folder is removed by the next that needs one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sora.core.files import temporary_folder

_HOLD = """
import sys, time
from sora.core.files import temporary_folder
with temporary_folder("reproduce") as folder:
    (folder / "copy").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_killed_process_leaves_nothing_for_long(place: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", _HOLD], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        theirs = Path(child.stdout.readline().strip())
        with temporary_folder("stage") as mine:
            assert theirs.is_dir() and (theirs / "copy").exists(), "a living process lost its folder"
            assert mine.is_dir() and mine != theirs
    finally:
        child.kill()
        child.wait()
    assert theirs.is_dir()
    with temporary_folder("stage") as mine:
        assert not theirs.exists() and mine.is_dir()
    assert not list(place.iterdir())


def test_what_others_put_there_stays(place: Path) -> None:
    (place / "sora-notes").mkdir()
    (place / "outside").mkdir()
    (place / "sora-tmp-link").symlink_to(place / "outside")
    (place / "sora-tmp-file").write_text("a file of that name")
    with temporary_folder("text"):
        pass
    assert {one.name for one in place.iterdir()} == {"sora-notes", "outside", "sora-tmp-link", "sora-tmp-file"}


def test_two_in_one_process(place: Path) -> None:
    with temporary_folder("text") as one, temporary_folder("text") as other:
        assert one.is_dir() and other.is_dir() and one != other
