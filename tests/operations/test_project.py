from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sora.config import Project, Settings, of_new_project, parse
from sora.core.errors import DiskFull, InputError, SettingsError
from sora.dataset import versioning
from sora.operations import project as projects
from tests.videos import make_folder, make_video


@pytest.fixture(autouse=True)
def _own_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()
    }


def test_this_repository_and_new_projects_have_one_pipeline(repository: Path) -> None:
    assert (repository / "dvc.yaml").read_text() == projects.template("dvc.yaml")
    assert (repository / ".dvcignore").read_text() == projects.template("dvcignore")


def test_the_template_shows_every_default(repository: Path) -> None:
    text = projects.params_text("sora", ["a", "b"])
    assert parse(text) == of_new_project({"name": "sora", "classes": ["a", "b"]})
    given, known = yaml.safe_load(text), Settings(name="sora").to_dict()
    assert given.keys() == known.keys()
    for section in ("validate", "split", "clip", "shards", "train", "gate", "schedule", "alert", "services"):
        assert given[section].keys() == known[section].keys()
    assert parse((repository / "params.yaml").read_text()).classes


def test_odd_class_names_survive_yaml() -> None:
    names = ["no", "1e3", "a: b", "été 'x'", "#", "null", "yes {x}"]
    assert parse(projects.params_text("sora", names)).classes == tuple(names)


def test_a_folder_becomes_a_project(tmp_path: Path) -> None:
    videos = make_folder(tmp_path / "videos", groups=2, frames=8)
    (videos / "README.md").write_text("not a video")
    make_video(videos / "été 2" / "ein Spaß.mp4", frames=8, seed=90)
    before = snapshot(videos)
    outer = tmp_path / "outer"
    subprocess.run(["git", "init", "-q", str(outer)], check=True)  # DIR inside another repository: it gets its own
    seen: list[tuple[int, int]] = []
    made = projects.init(
        outer / "My project!", videos, progress=lambda done, total, note="": seen.append((done, total))
    )
    project = Project(outer / "My project!")
    assert made == {"project": str(project.root), "videos": 5, "classes": ["jump", "wave", "été 2"]}
    assert seen[-1] == (5, 5)
    assert snapshot(videos) == before
    settings = project.settings()
    assert (settings.name, settings.classes) == ("My-project", ("jump", "wave", "été 2"))
    assert versioning.data_version(project)
    git: dict[str, Any] = {"cwd": project.root, "capture_output": True, "text": True, "check": True}
    assert subprocess.run(["git", "status", "--porcelain"], **git).stdout == ""
    assert subprocess.run(["git", "rev-list", "--count", "HEAD"], **git).stdout.strip() == "1"
    assert not (project.data / "README.md").exists()
    assert not (project.state / "init.json").exists()
    with pytest.raises(InputError, match="not empty"):
        projects.init(project.root, videos)


def test_labels_links_and_no_git_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = tmp_path / "videos"
    elsewhere = make_folder(tmp_path / "elsewhere", groups=2, frames=8)
    (videos / "sub").mkdir(parents=True)
    (videos / "sub" / "linked").symlink_to(elsewhere / "jump")
    (videos / "sub" / "loop").symlink_to(videos)
    (videos / "one.mp4").symlink_to(elsewhere / "wave" / "g00_0.mp4")
    with (videos / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("path", "label", "group"), ("one.mp4", "still", "p1"), ("sub/linked/g00_0.mp4", "up", "p2")])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    made = projects.init(tmp_path / "project", videos)
    assert (made["videos"], made["classes"]) == (3, ["still", "up"])
    data = tmp_path / "project" / "data"
    assert sorted(str(f.relative_to(data)) for f in data.rglob("*") if f.is_file()) == [
        "labels.csv",
        "one.mp4",
        "sub/linked/g00_0.mp4",
        "sub/linked/g01_0.mp4",
    ]
    assert not any(f.is_symlink() for f in data.rglob("*"))
    assert (data / "labels.csv").read_bytes() == (videos / "labels.csv").read_bytes()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "is not a folder"),
        ("empty", "none"),
        ("one class", "only 'jump'"),
        ("unlabelled", "none"),
        ("inside", "overlap"),
        ("around", "overlap"),
        ("file", "is a file"),
        ("not empty", "is not empty"),
        ("broken link", "leads nowhere"),
        ("labels of one class", "only 'a'"),
        ("no git", "git is not installed"),
    ],
)
def test_refused_before_anything_is_made(
    what: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, target = tmp_path / "videos", tmp_path / "project"
    for label in ("jump", "wave"):
        (videos / label).mkdir(parents=True)
        (videos / label / "a.mp4").write_bytes(b"by name")
    if what == "missing":
        videos = tmp_path / "nowhere"
    elif what == "empty":
        shutil.rmtree(videos)
        videos.mkdir()
    elif what == "one class":
        shutil.rmtree(videos / "wave")
    elif what == "unlabelled":
        shutil.rmtree(videos)
        videos.mkdir()
        (videos / "a.mp4").write_bytes(b"by name")
    elif what == "inside":
        target = videos / "project"
    elif what == "around":
        target = tmp_path
    elif what == "file":
        target.write_text("")
    elif what == "not empty":
        target.mkdir()
        (target / "thesis.txt").write_text("precious")
    elif what == "broken link":
        (videos / "wave" / "b.mp4").symlink_to("nowhere")
    elif what == "labels of one class":
        (videos / "labels.csv").write_text("path,label\njump/a.mp4,a\n")
    elif what == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words) as caught:
        projects.init(target, videos)
    assert caught.value.fix
    assert sorted(tmp_path.rglob("*")) == before


def test_killed_while_copying_it_goes_on(tmp_path: Path) -> None:
    videos = make_folder(tmp_path / "videos", groups=2, frames=8)
    target = tmp_path / "project"
    call = (
        "import sys, time; from pathlib import Path; from sora.operations import project\n"
        "project.init(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda done, total, note='': time.sleep(60))"
    )
    child = subprocess.Popen([sys.executable, "-c", call, str(target), str(videos)])
    end = time.monotonic() + 60
    while not list((target / "data").rglob("*.mp4")):
        assert time.monotonic() < end
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(InputError, match="unfinished project of"):
        projects.init(target, shutil.copytree(videos, tmp_path / "others"))
    (first,) = (target / "data").rglob("*.mp4")
    copied = first.stat().st_ino
    assert projects.init(target, videos)["videos"] == 4
    assert first.stat().st_ino == copied
    assert not list(target.rglob("*.part"))


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="needs to mount a small disk")
def test_a_disk_that_is_too_small_is_told_before_copying(tmp_path: Path) -> None:
    videos = make_folder(tmp_path / "videos", groups=1, frames=8)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(DiskFull, match="bytes free"):
            projects.init(disk / "project", videos)
        assert not list((disk / "project").rglob("*.mp4"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {flip: []}", "train.flip"),
        ("train: {flip: [a, [a, b]]}", "names a class twice"),
        ("{classes: [a, b], train: {flip: [c]}}", "'c', which is not one of the classes"),
        ("{train: {flip: [a]}, eval: {views: [mirrored]}}", "needs train.flip: true"),
        ("eval: {views: [left, left]}", "names a view twice"),
        ("unsure: {precision: 1.0}", "unsure.precision"),
        ("train: {ema: 1.0}", "train.ema"),
    ],
)
def test_settings_of_training_that_can_not_be(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(text)


def test_exceptions_from_flipping() -> None:
    train = parse("{classes: [a, b, c, d], train: {flip: [b, [a, d]]}}").train
    assert train.mirrors(["a", "b", "c", "d"]) == [3, -1, 2, 0]
    assert parse("").train.mirrors(["a", "b"]) is None
