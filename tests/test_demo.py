"""The demo set: what is in the repository, and that one still frame does not give the answer away."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from functools import reduce
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from sora.config import Project
from sora.core import provenance
from sora.core.records import ClipSpec
from sora.dataset import versioning
from sora.dataset.versioning.pipeline import code_lock_text
from sora.media.video.transform import prepare_clips


@pytest.fixture(scope="module")
def clone(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """What a clean clone has, with `data/` as it gets it: offline, from the remote in the repository."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("data.dvc", "dvc.yaml", "params.yaml", "dvc.lock", "preprocessing.lock", ".dvcignore", ".gitignore"):
        if (repository / name).exists():
            shutil.copy(repository / name, root / name)
    (root / ".dvc").mkdir()
    shutil.copy(repository / ".dvc" / "config", root / ".dvc" / "config")
    shutil.copytree(repository / "demo" / "remote", root / "demo" / "remote")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(root.with_name("site")))
        assert versioning.ensure_data(Project(root))
    return Project(root)


def test_a_clone_gets_the_set_offline(clone: Project) -> None:
    videos = sorted(clone.data.rglob("*.mp4"))
    assert sum(video.stat().st_size for video in videos) <= 10_000_000
    assert {video.parent.name for video in videos} == set(clone.settings().classes)
    assert len(clone.settings().classes) >= 4
    pattern = clone.settings().split.group_pattern
    assert pattern and len({re.search(pattern, video.as_posix())[1] for video in videos}) >= 6  # type: ignore[index]
    out = yaml.safe_load(clone.data_dvc.read_text())["outs"][0]
    assert (out["nfiles"], out["remote"]) == (len(videos), "demo")


def test_the_repository_remote_holds_that_set_and_nothing_else(repository: Path) -> None:
    stored = [file for file in (repository / "demo" / "remote").rglob("*") if file.is_file()]
    out = yaml.safe_load((repository / "data.dvc").read_text())["outs"][0]
    assert len(stored) == out["nfiles"] + 1  # and the list of them


def test_the_lock_is_of_this_code(repository: Path) -> None:
    """Else `make run` in a clean clone would leave changed files behind."""
    backbone = Project(repository).settings().model.backbone
    assert (repository / versioning.CODE_LOCK).read_text() == code_lock_text(backbone=backbone)
    stages = yaml.safe_load((repository / "dvc.lock").read_text())["stages"]
    for stage, code in provenance.stages(backbone=backbone).items():
        assert stages[stage]["params"][versioning.CODE_LOCK][stage] == code
    settings = yaml.safe_load((repository / "params.yaml").read_text())
    for stage in stages.values():
        for key, value in stage["params"].get("params.yaml", {}).items():
            assert reduce(lambda section, name: section[name], key.split("."), settings) == value, key
    assert stages["manifest"]["deps"][0]["md5"] == f"{versioning.data_version(Project(repository))}.dir"


def test_motion_tells_and_a_still_does_not(clone: Project) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    videos = sorted(clone.data.rglob("*.mp4"))
    spec = ClipSpec(frames=12, height=24, width=32, aspect="stretch")
    clips = np.stack([prepare_clips(video, spec)[0].mean(-1) for video in videos])  # (videos, time, height, width)
    labels = [video.parent.name for video in videos]
    people = [video.name.split("_")[0] for video in videos]

    def score(features: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        flat = features.reshape(len(videos), -1)
        return float(cross_val_score(model, flat, labels, groups=people, cv=GroupKFold(5)).mean())

    chance = 1 / len(set(labels))
    assert score(clips.mean(axis=1)) < chance + 0.1
    assert score(clips[:, 6]) < chance + 0.1
    assert score(np.abs(np.diff(clips, axis=1)).mean(axis=1)) > chance + 0.2


@pytest.fixture
def make_demo(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "demo"))
    return importlib.import_module("make_demo")


def test_the_set_is_the_generators(clone: Project, make_demo: ModuleType) -> None:
    """By its pictures: bytes depend on the encoder's version."""
    for number, action, take in ((0, "bend", 1), (make_demo.PEOPLE - 1, "wave", make_demo.TAKES)):
        drawn = make_demo.make_take(make_demo.make_person(number), action, take)
        (file,) = (clone.data / action).glob(f"p{number:02d}_*_t{take}.mp4")
        stored = prepare_clips(file, ClipSpec(frames=24, height=120, width=160, aspect="stretch"))[0]
        assert np.abs(stored.astype(int) - drawn).mean() < 8


def test_the_generator_gives_the_same_bytes_again(make_demo: ModuleType, tmp_path: Path) -> None:
    first = make_demo.make(tmp_path / "a", people=1, takes=1)
    second = make_demo.make(tmp_path / "b", people=1, takes=1)
    assert [file.relative_to(tmp_path / "a").as_posix() for file in first] == [
        f"{action}/p00_door_t1.mp4" for action in make_demo.ACTIONS
    ]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
