"""The quarantine list: one owner of its form."""

from __future__ import annotations

from pathlib import Path

import pytest

from sora.config import Project
from sora.core.errors import InputError
from sora.core.records import Rejection
from sora.dataset.quality import quarantine


def test_what_is_written_is_read(tmp_path: Path) -> None:
    project = Project(tmp_path)
    file = project.quarantine
    rejections = (Rejection("wave/ä.mp4", "too_short", "it has 3 frames", "ab"), Rejection("b.mp4", "unlabelled", ""))
    quarantine.write(project, rejections)
    assert quarantine.read(project) == rejections
    assert quarantine.rejected_paths(project) == {"wave/ä.mp4", "b.mp4"}
    before = file.read_bytes()
    quarantine.write(project, rejections)
    assert file.read_bytes() == before


def test_an_entry_of_an_older_version_is_read(tmp_path: Path) -> None:
    file = Project(tmp_path).quarantine
    file.parent.mkdir()
    file.write_text('[{"path": "a.mp4", "rule": "duplicate", "detail": ""}]')
    assert quarantine.rejected_paths(Project(tmp_path)) == {"a.mp4"}


@pytest.mark.parametrize("text", ["[{", '[{"rule": "x"}]', '{"a": 1}', "3", '[{"path": "a", "surprise": 1}]', "[null]"])
def test_a_damaged_list_names_the_file(tmp_path: Path, text: str) -> None:
    file = Project(tmp_path).quarantine
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(InputError, match=r"quarantine\.json is not a quarantine list"):
        quarantine.rejected_paths(Project(tmp_path))


def test_without_a_validation_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        quarantine.read(Project(tmp_path))
