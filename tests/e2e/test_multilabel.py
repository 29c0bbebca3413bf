"""A project whose videos have several labels, as a user types it: init, check, run, predict, serve."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.clips import SEVERAL, SMALL, make_several
from tests.e2e.conftest import SORA, set_params, sora, sora_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    make_several(folder / "footage")
    made = sora_json(folder, "init", str(folder / "project"), "--data", str(folder / "footage"), "--multilabel")
    assert made["videos"] == 40 and made["classes"] == list(SEVERAL)
    project = Path(made["project"])
    assert yaml.safe_load((project / "params.yaml").read_text())["model"]["head"] == "multilabel"
    set_params(
        project,
        clip={"frames": 8, "height": 32, "width": 32},
        shards={"buckets": 2, "workers": 1},
        model={"preset": "small", **SMALL},
        split={"val": 0.2, "test": 0.3},
        train={"epochs": 25, "batch": 8, "patience": 25, "learning_rate": 0.005, "flip": [["left", "right"]]},
        gate={"min_test": 8},
    )
    return project


@pytest.fixture(scope="module")
def first(project: Path) -> dict[str, Any]:
    checked = sora_json(project, "check")
    assert checked["ok"] and checked["accepted"] == 40
    result: dict[str, Any] = sora_json(project, "run")
    assert result["outcome"] == "promoted", result["reasons"]
    return result


def test_a_run_learns_both_attributes(project: Path, first: dict[str, Any]) -> None:
    assert first["metrics"]["test/accuracy"] > 0.5  # exact match; 0.25 by chance
    assert {"test/macro_f1", "test/ece", "test/mean_average_precision"} <= set(first["metrics"])
    assert sora_json(project, "run")["outcome"] == "unchanged"
    assert "There is no confusion matrix" in (project / ".sora" / "last_evaluation" / "index.html").read_text()


def test_predict_and_its_neighbours(project: Path, first: dict[str, Any]) -> None:
    video = project / "data" / "000.mp4"  # bright, left
    [answer] = sora_json(project, "predict", str(video))
    assert set(answer) == {"path", "label", "probabilities", "version", "labels"}
    assert set(answer["probabilities"]) == set(SEVERAL) and answer["label"] in SEVERAL
    shown = sora(project, "predict", str(video)).stdout
    assert re.search(r"000\.mp4: (\w+ \(\d+%\), )?\w+ \(\d+%, version 1\)", shown), shown
    assert "|" in sora_json(project, "similar", str(video))["neighbours"][0]["label"]
    assert len(sora_json(project, "embed", str(video))[0]["vector"]) == SMALL["embedding"]
    assert sora_json(project, "reproduce", "1")["matches"]
    audited = sora(project, "data", "audit")
    assert audited.returncode == 2 and "multilabel" in audited.stderr and "fix" in audited.stderr
    assert "4 classes, head multilabel" in sora(project, "model", "describe").stdout


def test_it_is_served_with_both_labels(project: Path, first: dict[str, Any]) -> None:
    log = project.parent / "serve.log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            [*SORA, "serve", "--port", "0"], cwd=project, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ}
        )
    try:
        end = time.monotonic() + 120
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) and time.monotonic() < end:
            time.sleep(0.1)
        assert address, log.read_text()
        with httpx.Client(base_url=address[0], timeout=60, trust_env=False) as client:
            while client.get("/readyz").status_code != 200 and time.monotonic() < end:
                time.sleep(0.2)
            right = 0
            for number, labels in enumerate((light, way) for light in SEVERAL[:2] for way in SEVERAL[2:]):
                with (project / "data" / f"{number}01.mp4").open("rb") as file:
                    answer = client.post("/v1/predict", files={"file": file}).json()
                right += set(answer["labels"]) == set(labels)
            assert right >= 3, log.read_text()[-2000:]
            assert client.get("/v1/model").json()["multilabel"] is True
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def test_other_heads_read_the_same_table_otherwise(project: Path, first: dict[str, Any]) -> None:
    """The manifest is made anew when the head changes, though no stage of dvc.yaml names it."""
    set_params(project, model={"head": "multiclass"})
    try:
        done = sora(project, "run", "--json")
        assert done.returncode == 1 and "too_few_classes" in done.stderr + done.stdout
    finally:
        set_params(project, model={"head": "multilabel"})
