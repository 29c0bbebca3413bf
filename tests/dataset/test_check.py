"""`sora check`, on real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sora.config import Project, Settings
from sora.core.errors import InputError
from sora.dataset import check as checking
from sora.dataset import manifest
from sora.dataset.check import check, show
from sora.dataset.quality import ValidationReport
from sora.dataset.quality.rules import FIXES
from tests.videos import make_folder, make_video

SMALL = Settings.model_validate({"validate": {"max_rejected": 0.5}})


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three, in it a cut, a short, a doubled and a stray video, a text file and a name with markup."""
    folder = make_folder(tmp_path_factory.mktemp("videos") / "clips", groups=3)
    whole = make_video(folder / "jump" / "cut.mp4", seed=50, frames=60)
    whole.write_bytes(whole.read_bytes()[:-400])
    make_video(folder / "jump" / "kurz [bold] é.mp4", seed=51, frames=3)
    shutil.copy(folder / "wave" / "g00_0.mp4", folder / "wave" / "z copy.mp4")
    make_video(folder / "stray.mp4", seed=52)
    (folder / "wave" / "text.mp4").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    (folder / "README.md").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def checked(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ValidationReport, Path]:
    """Checked while the folder was read-only."""
    before = snapshot(videos)
    for folder in (videos, *[p for p in videos.rglob("*") if p.is_dir()]):
        folder.chmod(0o555)
    try:
        report, out = check(videos, settings=SMALL, out=tmp_path_factory.mktemp("out") / "below")
    finally:
        for folder in (videos, *[p for p in videos.rglob("*") if p.is_dir()]):
            folder.chmod(0o755)
    assert snapshot(videos) == before  # permissions do not bind root
    return report, out


def test_a_folder_is_checked_and_every_bad_file_named(checked: tuple[ValidationReport, Path]) -> None:
    report, out = checked
    rules = {r.path: r.rule for r in report.rejected}
    assert rules.pop("jump/cut.mp4") in ("truncated", "unreadable")
    assert rules == {
        "jump/kurz [bold] é.mp4": "too_short",
        "stray.mp4": "unlabelled",
        "wave/text.mp4": "not_a_video",
        "wave/z copy.mp4": "duplicate",
    }
    assert report.ok and report.counts == {"jump": 3, "wave": 3}
    assert sorted(p.name for p in out.iterdir()) == ["data_docs", "manifest.parquet", "report.json"]
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    assert len(manifest.read(out / "manifest.parquet")) == report.videos == 11
    assert (out / "data_docs" / "index.html").exists()


def test_people_see_counts_rules_fixes_and_where_the_pages_are(
    checked: tuple[ValidationReport, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report, out = checked
    show(report, out)
    text = capsys.readouterr().out
    assert "11 videos, 6 accepted, 5 rejected" in text
    assert "jump/kurz [bold] é.mp4: 3 decodable frames, at least 8 are needed" in text
    assert FIXES["too_short"] in text and str(out / "data_docs" / "index.html") in text
    assert "trainable" in text


def test_the_default_place_is_the_working_directory(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report, out = check(videos)
    assert out == tmp_path / checking.DEFAULT_OUT
    assert not report.ok and "too_many_rejected" in {e.rule for e in report.findings("stop")}  # 5 of 11


def test_a_report_into_the_checked_folder_is_refused(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(videos)
    before = snapshot(videos)
    with pytest.raises(InputError, match="inside the folder to check") as caught:
        check(Path("."))
    assert "--out" in caught.value.fix and snapshot(videos) == before


def test_no_folder_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        check(tmp_path / "nothing", out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    report, out = check(tmp_path / "empty", out=tmp_path / "out")
    assert not report.ok and report.findings("stop")[0].rule == "no_videos"
    show(report, out)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    make_folder(root / "data", groups=3)
    (root / "params.yaml").write_text("classes: [jump, wave]\nsplit: {group_pattern: '/(g\\d+)_'}\n")
    return Project(root)


def test_a_project_is_found_by_its_folder_and_by_its_data(project: Project) -> None:
    (project.data / "dance").mkdir()
    shutil.move(project.data / "wave" / "g00_0.mp4", project.data / "dance" / "1.mp4")
    results = [check(target, progress=None) for target in (project, project.root, project.data)]
    for report, out in results:
        assert out == project.state / "check"
        assert [r.rule for r in report.rejected] == ["unknown_label"]
        assert not report.ok  # of wave only two are left
    assert set(manifest.read(results[0][1] / "manifest.parquet")["group"]) >= {"g00", "g01", "g02"}
    assert sorted(p.name for p in project.root.iterdir()) == [".sora", "data", "params.yaml"]


def test_what_a_check_decoded_is_not_decoded_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    check(project)
    make_video(project.data / "jump" / "new.mp4", seed=77)
    lines = project.journal.read_text().count("\n")
    assert lines == 6
    report, _ = check(project)
    assert report.videos == 7 and project.journal.read_text().count("\n") == lines + 1


def test_the_balance_is_compared_with_the_last_judged_run(project: Project) -> None:
    project.state.mkdir()
    (project.state / "reference.json").write_text(json.dumps({"jump": 1, "wave": 9}))
    report, _ = check(project)
    assert [e.rule for e in report.findings("warn")] == ["balance_shifted"]


# ------------------------------------------------------------------------------------------------- real footage

ODD = {
    "decord_corrupted.mp4": "truncated",
    "made_truncated.avi": "truncated",
    "decord_unordered.mov": "too_short",
    "decord_video_0.mov": "too_short",
    "decord_video_180.mov": "too_short",
    "decord_video_270.mov": "too_short",
    "decord_video_90.mov": "too_short",
    "moviepy_bitmap.mp4": "too_short",
    "small_webm.webm": "too_short",
    "made_text.mp4": "not_a_video",
    "made_zero_length.mp4": "not_a_video",
    "moviepy_zero_length.webm": "not_a_video",
    "phpffmpeg_WrongFile.mp4": "unreadable",
    "small_AudioVideoInterleave.avi": "unreadable",
    "small_FlashVideo.flv": "unreadable",
    "small_gif.gif": "unreadable",
    "small_Mpeg4.mp4": "unreadable",
    "small_mp4-with-audio.mp4": "unreadable",
    "small_WindowsMediaVideo.wmv": "unreadable",
}


def test_every_odd_file_gets_its_verdict(shared: Path, tmp_path: Path) -> None:
    files = sorted(p for p in (shared / "odd").iterdir() if p.suffix != ".csv")
    for number, file in enumerate(files):
        target = tmp_path / "odd" / ("one", "two")[number % 2] / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    report, _ = check(tmp_path / "odd", out=tmp_path / "out")
    assert {Path(r.path).name: r.rule for r in report.rejected} == ODD
    assert report.videos == 32 and report.accepted == 13


def test_good_real_footage_is_not_rejected(shared: Path, tmp_path: Path) -> None:
    report, _ = check(shared / "steps27", out=tmp_path / "out")
    assert report.ok and not report.rejected and report.counts == {"action1": 9, "action2": 9, "action3": 9}
