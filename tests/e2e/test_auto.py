"""What `sora init` writes: the model is chosen by evidence. From a folder of videos to an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora.config import Project
from sora.operations import servers
from sora.store.shards import ShardSet
from tests.clips import CLASSES, moving_square, write_video
from tests.e2e.conftest import SORA, set_params, sora, sora_json

AUTO: dict[str, dict[str, Any]] = {
    "split": {"group_pattern": r"(g\d+)_"},
    "clip": {"frames": 8, "height": 32, "width": 32},
    "shards": {"buckets": 4, "workers": 1},
    "gate": {"min_test": 2, "max_ece": 1.0},
}


def footage(folder: Path, groups: range) -> Path:
    for which, label in enumerate(CLASSES):
        for group in groups:
            for number in range(2):
                seed = 1000 * which + 10 * group + number
                write_video(folder / label / f"g{group}_{number}.mp4", moving_square(label, seed=seed, frames=16))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    made = sora_json(folder, "init", str(folder / "project"), "--data", str(footage(folder / "footage", range(8))))
    place = Path(made["project"])
    text = (place / "params.yaml").read_text()
    assert "preset: auto" in text and "height: 224" in text and "flow: 16" in text
    set_params(place, **AUTO)
    return place


@pytest.fixture(scope="module")
def first(project: Path) -> dict[str, Any]:
    """The first run, which is killed once while it searches."""
    kept = project / ".sora" / "work"
    child = subprocess.Popen(
        [*SORA, "run", "--json"], cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while not list(kept.glob("*/fit/search-*/motion-1.npz")) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done: dict[str, Any] = sora_json(project, "run")
    return done


def test_the_first_run_serves_a_model(first: dict[str, Any], project: Path) -> None:
    assert first["outcome"] == "promoted" and first["version"] == 1
    [taken] = [reason for reason in first["reasons"] if "was taken by cross-validation" in reason]
    assert all(name in taken for name in ("motion", "appearance", "both"))
    assert taken.startswith(("motion", "both"))  # the pictures of both classes are alike
    assert any("'left' looks like 'right'" in reason for reason in first["reasons"])
    assert first["metrics"]["test/accuracy"] > 0.7
    page = (project / ".sora" / "last_evaluation" / "index.html").read_text()
    assert "What was tried" in page and "(taken)" in page


def test_what_was_tried_are_child_runs(first: dict[str, Any], project: Path) -> None:
    import httpx

    one = Project(project)
    with servers.servers(one):
        where, login = servers.mlflow_address(one), servers.login(one, "mlflow")
        body = {"experiment_ids": ["1"], "filter": f"tags.`mlflow.parentRunId` = '{first['run_id']}'"}
        assert login is not None
        answer = httpx.post(f"{where}/api/2.0/mlflow/runs/search", json=body, auth=login.pair, timeout=60).json()
    names = {run["info"]["run_name"] for run in answer["runs"]}
    assert names == {"tried: motion", "tried: appearance", "tried: both"}
    # They are no judged runs: nothing has changed since the one that was.
    assert sora_json(project, "run")["outcome"] == "unchanged"


def test_it_answers_and_reproduces(first: dict[str, Any], project: Path) -> None:
    video = next((project / "data" / "left").glob("*.mp4"))
    [answer] = sora_json(project, "predict", str(video))
    assert answer["version"] == 1 and set(answer["probabilities"]) == set(CLASSES)
    [vector] = sora_json(project, "embed", str(video))
    assert len(vector["vector"]) > 2 and np.isfinite(vector["vector"]).all()
    assert sora_json(project, "similar", str(video))["neighbours"][0]["path"]
    again = sora_json(project, "reproduce", "1")
    assert again["matches"], again


def test_an_added_video_costs_that_video(first: dict[str, Any], project: Path) -> None:
    write_video(project / "data" / "left" / "g1_9.mp4", moving_square("left", seed=77, frames=16))
    before = ShardSet.open(project / "prepared" / "features")
    done = sora(project, "run", "--json", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    after = ShardSet.open(project / "prepared" / "features")
    assert len(after) == len(before) + 1
    counts = json.loads((project / ".sora" / "stages" / "features.json").read_text())
    assert counts["computed"] == 1
    assert set(os.listdir(project / "prepared" / "features")) == {"index.parquet", *after.files.values()}


def test_a_damaged_feature_is_computed_again(first: dict[str, Any], project: Path) -> None:
    file = sorted((project / "prepared" / "features").glob("bucket-*.npy"))[0]
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.chmod(0o644)
    file.write_bytes(content)
    done = sora(project, "run", "--force", "--json", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "computed again" in done.stderr
    assert ShardSet.open(project / "prepared" / "features").damage() == []


def test_without_the_stage_it_says_how_to_get_it(project: Path) -> None:
    pipeline = project / "dvc.yaml"
    text = pipeline.read_text()
    pipeline.write_text(text[: text.index("  features:")])
    done = sora(project, "run", "--force", "--json")
    assert done.returncode == 2 and "python -m sora.stages template > dvc.yaml" in done.stderr
    pipeline.write_text(text)
