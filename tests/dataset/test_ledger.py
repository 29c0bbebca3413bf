"""The ledger against what was judged: nothing lost, torn or changed goes by, and restoring loses no newer row."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sora.config import Project
from sora.core.errors import InputError, NotTrainable, SplitsLost
from sora.core.ledger import Recorded, Row
from sora.dataset import ledger


def row(number: int, split: str = "train", group: str = "") -> Row:
    return Row(f"{number:064x}", split, group)


JUDGED = Recorded("a" * 32, 3, (row(1), row(2, "test", "p1"), row(3, "val", "p2")))
NEW = (row(4, "train", "p3"), row(5, "test", "p1"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "splits.csv").write_text(ledger.text([*JUDGED.rows, *NEW]))
    return tmp_path / "splits.csv"


DAMAGE: dict[str, bytes | None] = {
    "deleted": None,
    "emptied": b"",
    "only the header": ledger.text([]).encode(),
    "git checkout of an older commit": ledger.text(JUDGED.rows[:2]).encode(),
    "another split": ledger.text([row(1, "test"), *JUDGED.rows[1:]]).encode(),
    "assigned again": ledger.text([replace(one, split="train") for one in JUDGED.rows]).encode(),
    "half a line": ledger.text([*JUDGED.rows, *NEW]).encode()[:-20],
    "noise": bytes(range(256)) * 8,
    "noise in the middle": ledger.text(JUDGED.rows).encode().replace(b",test,", b",\xff\xfe\x00,"),
    "two splits for one video": ledger.text([*JUDGED.rows, row(2, "train")]).encode(),
    "an unknown split": ledger.text([*JUDGED.rows, row(6, "holdout")]).encode(),
}


def damage(file: Path, content: bytes | None) -> None:
    file.unlink() if content is None else file.write_bytes(content)


def test_what_only_grew_is_in_order(file: Path) -> None:
    assert ledger.require(file, JUDGED) == [*JUDGED.rows, *NEW]
    assert ledger.require(file, None) == [*JUDGED.rows, *NEW]
    file.unlink()
    assert ledger.require(file, None) == []  # a new project


@pytest.mark.parametrize("how", DAMAGE)
def test_whatever_is_missing_or_changed_stops_and_comes_back(file: Path, tmp_path: Path, how: str) -> None:
    damage(file, DAMAGE[how])
    with pytest.raises(SplitsLost) as caught:
        ledger.require(file, JUDGED)
    assert isinstance(caught.value, NotTrainable) and caught.value.exit_code == 1
    assert "version 3" in caught.value.message and "sora splits restore" in caught.value.fix
    before = DAMAGE[how]
    done = ledger.restore(file, JUDGED, copies=tmp_path / "copies")
    assert ledger.require(file, JUDGED)[:3] == list(JUDGED.rows)
    assert done.rows == len(ledger.read(file)) and done.source == "version 3"
    if before is None:
        assert done.copy is None and done.returned == 3
    else:
        assert Path(str(done.copy)).read_bytes() == before  # nothing is thrown away
    again = ledger.restore(file, JUDGED, copies=tmp_path / "copies")
    assert (again.returned, again.corrected, again.dropped, again.copy) == (0, 0, 0, None)


def test_newer_rows_stay_unless_they_contradict(file: Path, tmp_path: Path) -> None:
    dealt_anew = [row(1, "test"), row(7, "train", "p1"), row(8, "val", "p9"), row(9)]
    file.write_text(ledger.text(dealt_anew) + "half a li")
    done = ledger.restore(file, JUDGED, copies=tmp_path)
    # 7 would train on person 1, whom the recorded ledger tests.
    assert ledger.read(file) == [*JUDGED.rows, row(8, "val", "p9"), row(9)]
    assert (done.returned, done.corrected, done.kept, done.dropped) == (2, 1, 2, 2)


def test_two_splits_for_a_newer_video_are_not_guessed(file: Path, tmp_path: Path) -> None:
    file.write_text(ledger.text([*JUDGED.rows, row(7, "test"), row(7, "train"), row(8)]))
    assert ledger.restore(file, JUDGED, copies=tmp_path).dropped == 1
    assert ledger.read(file) == [*JUDGED.rows, row(8)]


def test_restoring_what_is_in_order_touches_nothing(file: Path, tmp_path: Path) -> None:
    before = file.stat()
    done = ledger.restore(file, JUDGED, copies=tmp_path / "copies")
    assert done.kept == 2 and done.copy is None and not (tmp_path / "copies").exists()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_damage_without_anything_judged_is_bad_input(file: Path) -> None:
    file.write_bytes(DAMAGE["half a line"] or b"")
    with pytest.raises(InputError, match="is torn"):
        ledger.require(file, None)


def test_judged_runs_whose_copies_are_gone_stop_a_missing_ledger(file: Path) -> None:
    ledger.require(file, None, judged=True)
    file.unlink()
    with pytest.raises(SplitsLost, match="runs were judged"):
        ledger.require(file, None, judged=True)


def test_a_deleted_ledger_that_git_holds_stops_an_empty_registry_too(file: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=file.parent, check=True, capture_output=True)

    git("init", "-q")
    git("add", "splits.csv")
    git("commit", "-qm", "splits")
    ledger.require(file, None)
    file.unlink()
    with pytest.raises(SplitsLost, match="git's last commit") as caught:
        ledger.require(file, None)
    assert "git checkout splits.csv" in caught.value.fix
    git("rm", "-q", "splits.csv")
    git("commit", "-qm", "anew")
    assert ledger.require(file, None) == []


def test_the_copy_on_this_machine_belongs_to_one_name(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: first\n")
    project = Project(tmp_path)
    assert ledger.remembered(project) is None
    ledger.remember(project, JUDGED)
    assert ledger.remembered(project) == JUDGED
    (tmp_path / "params.yaml").write_text("name: second\n")
    assert ledger.remembered(project) is None
    (tmp_path / "params.yaml").write_text("name: first\n")
    (tmp_path / ".sora" / "judged_splits.json").write_text('{"name": "fir')
    assert ledger.remembered(project) is None
