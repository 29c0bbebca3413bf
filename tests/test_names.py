"""File names from elsewhere: not UTF-8, or with control characters in them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sora.cli import main
from sora.config import Project
from sora.core.errors import InputError, NotTrainable
from sora.dataset import versioning
from sora.dataset.check import check, show
from sora.operations import project as projects
from tests.videos import make_folder, make_video

LATIN1 = b"caf\xe9.mp4"
ESCAPE = "\x1b]0;owned\x07\n[bold]all is well.mp4"


def put(folder: Path, name: bytes, content: bytes = b"") -> None:
    target = os.path.join(os.fsencode(folder), name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as file:
        file.write(content)


def sora(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"jump/" + LATIN1, r"jump/caf\xe9.mp4"),
        (b"caf\xe9/1.mp4", r"caf\xe9"),
        (b"jump/caf\xe9.txt", r"jump/caf\xe9.txt"),  # no video by name, and DVC versions it all the same
        (b"jump/.hidden/caf\xe9", r"jump/.hidden/caf\xe9"),
    ],
)
def test_a_name_that_is_not_utf8_stops_check_and_run_alike(
    fresh_project: Project, capsys: pytest.CaptureFixture[str], name: bytes, shown: str
) -> None:
    put(fresh_project.data, name, b"x")
    code, out, _ = sora(capsys, "check", "--json", "--project", str(fresh_project.root))
    report = json.loads(out)
    assert code == 1 and report["ok"] is False
    assert [(one["path"], one["rule"]) for one in report["rejected"] if one["rule"] == "bad_name"] == [
        (shown, "bad_name")
    ]
    code, out, _ = sora(capsys, "check", "--project", str(fresh_project.root))
    assert code == 1 and shown in out and "not UTF-8" in out and "fix: rename" in out
    with pytest.raises(NotTrainable, match="bad_name") as caught:
        versioning.add(fresh_project)
    assert shown in caught.value.message and "rename" in caught.value.fix
    assert (fresh_project.docs.parent / "check" / "data_docs" / "index.html").read_text(encoding="utf-8")
    os.rename(
        os.path.join(os.fsencode(fresh_project.data), name.split(b"/1")[0]),
        os.path.join(os.fsencode(fresh_project.data), b"readme.txt"),
    )
    if (fresh_project.data / "readme.txt").is_dir():
        shutil.rmtree(fresh_project.data / "readme.txt")
    assert len(versioning.add(fresh_project)) == 32


def test_init_refuses_it_and_leaves_nothing(tmp_path: Path) -> None:
    footage = make_folder(tmp_path / "footage", groups=2)
    put(footage, b"jump/" + LATIN1)
    with pytest.raises(InputError, match="not UTF-8") as caught:
        projects.init(tmp_path / "project", footage)
    assert r"jump/caf\xe9.mp4" in caught.value.message and "rename" in caught.value.fix
    assert not (tmp_path / "project").exists()


def test_a_project_in_a_folder_of_such_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9")))
    folder.mkdir()
    (folder / "params.yaml").write_text("name: x\n")
    code, out, err = sora(capsys, "models", "--json", "--project", str(folder))
    assert code == 2 and not out and "not UTF-8" in err
    footage = make_folder(tmp_path / "footage", groups=2)
    with pytest.raises(InputError, match="not UTF-8"):
        projects.init(folder / "new", footage)


def test_escape_sequences_in_names_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "clips", groups=2)
    make_video(folder / "jump" / "short.mp4", seed=7, frames=3).rename(folder / "jump" / ESCAPE)
    (folder / "wave" / ESCAPE).write_bytes(b"no video")
    report, out = check(folder, out=tmp_path / "out")
    assert f"jump/{ESCAPE}" in {one.path for one in report.rejected}
    show(report, out)
    text = capsys.readouterr().out
    assert r"jump/\x1b]0;owned\x07\n[bold]all is well.mp4" in text
    assert (
        "\x1b]" not in text and "\x07" not in text and not any(line.startswith("[bold]") for line in text.split("\n"))
    )
    _, printed, _ = sora(capsys, "check", str(folder), "--out", str(tmp_path / "out"), "--json")
    assert "\x1b" not in printed and f"jump/{ESCAPE}" in {one["path"] for one in json.loads(printed)["rejected"]}
    pages = (tmp_path / "out" / "data_docs" / "index.html").read_text(encoding="utf-8")
    assert "owned" in pages
