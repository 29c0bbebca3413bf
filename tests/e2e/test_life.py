"""A project's life as a user types it, with a real Prefect server, MLflow server, worker and API. In order."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sora.config import Project
from sora.config.credentials import secret
from tests.e2e.conftest import SORA, Running, sora, sora_json
from tests.servers import prefect_client
from tests.videos import make_video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def first(running: Running) -> dict[str, Any]:
    """The first run."""
    result: dict[str, Any] = sora_json(running.project, "run")
    return result


def served(running: Running, version: int, seconds: float = 40) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = httpx.get(f"{running.api}/v1/model")
        if answer.status_code == 200 and answer.json()["version"] == version:
            model: dict[str, Any] = answer.json()
            return model
        time.sleep(0.3)
    raise AssertionError(f"version {version} is not served: {answer.status_code} {answer.text[:500]}")


def test_everything_answers(running: Running) -> None:
    assert httpx.get(f"{running.prefect}/api/health").status_code == 200
    assert httpx.get(f"{running.mlflow}/health").status_code == 200
    assert httpx.get(f"{running.api}/healthz").status_code == 200


def test_run_reports_the_contract(first: dict[str, Any]) -> None:
    assert first["outcome"] in ("promoted", "refused")
    assert first["version"] == 1 and first["reasons"] and len(first["data_version"]) == 32
    assert {"test/accuracy", "test/macro_f1", "test/ece"} <= set(first["metrics"])


def test_nothing_changed_is_unchanged(running: Running, first: dict[str, Any]) -> None:
    again = sora_json(running.project, "run")
    assert again["outcome"] == "unchanged"
    assert again["data_version"] == first["data_version"] and again["run_id"] == first["run_id"]


def test_the_run_is_in_mlflow_and_prefect(running: Running, first: dict[str, Any]) -> None:
    where, login = f"{running.mlflow}/api/2.0/mlflow/runs/get", secret(Project(running.project)).pair
    run = httpx.get(where, params={"run_id": first["run_id"]}, auth=login).json()["run"]
    assert run["info"]["status"] == "FINISHED"
    names = {metric["key"] for metric in run["data"]["metrics"]}
    assert {"loss", "val_loss", "test/accuracy"} <= names
    inputs = run["inputs"]["dataset_inputs"]
    assert inputs[0]["dataset"]["digest"].startswith(first["data_version"][:8])
    with prefect_client(Project(running.project)) as prefect:
        flows = prefect.post("/flow_runs/filter", json={"sort": "START_TIME_ASC"}).json()
        artifacts = prefect.post("/artifacts/filter", json={}).json()
    assert "COMPLETED" in {flow["state_type"] for flow in flows}
    assert {"nightly", "recall", "confusion"} <= {artifact["key"] for artifact in artifacts}


def test_the_webhook_is_not_stored(running: Running, first: dict[str, Any]) -> None:
    """Neither among MLflow's parameters nor in its artifacts, nor in Prefect's database."""
    state = running.project / ".sora"
    files = [file for file in state.rglob("*") if file.is_file()]
    assert any(file.name == "params.yaml" for file in files) and state / "mlflow" / "mlflow.db" in files
    assert not [file for file in files if b"T0KEN-in-the-path" in file.read_bytes()]
    assert state.stat().st_mode & 0o777 == 0o700


def test_promoted_by_hand_and_served(running: Running, first: dict[str, Any]) -> None:
    assert sora_json(running.project, "promote", "1")["champion"] == 1
    model = served(running, 1)
    assert model["classes"] == ["jump", "wave"]
    video = next((running.project / "data").rglob("*.mp4"))
    answer = sora_json(running.project, "predict", str(video))[0]
    with video.open("rb") as file:
        over_http = httpx.post(f"{running.api}/v1/predict", files={"file": file}, timeout=60).json()
    assert over_http["label"] == answer["label"] and over_http["version"] == answer["version"] == 1
    assert over_http["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-4)


def test_predict_answers_what_it_can(running: Running, first: dict[str, Any], tmp_path: Path) -> None:
    good = next((running.project / "data").rglob("*.mp4"))
    bad = tmp_path / "text.mp4"
    bad.write_text("no video")
    answers = sora_json(running.project, "predict", str(bad), str(good), str(tmp_path / "absent.mp4"), code=2)
    assert "error" in answers[0] and answers[1]["label"] and "error" in answers[2]


def test_new_data_is_judged_anew(running: Running, first: dict[str, Any]) -> None:
    splits = (running.project / "splits.csv").read_text()
    for number in range(2):
        make_video(running.project / "data" / "jump" / f"g20_{number}.mp4", seed=900 + number)
    result = sora_json(running.project, "run")
    assert result["outcome"] in ("promoted", "refused") and result["version"] == 2
    assert result["data_version"] != first["data_version"]
    assert (running.project / "splits.csv").read_text().startswith(splits), "a video changed its split"
    versions = {version["version"]: version for version in sora_json(running.project, "models")}
    assert versions[2]["decision"] == result["outcome"] and versions[2]["reasons"] == result["reasons"]


def test_rollback_and_the_server_follows(running: Running, first: dict[str, Any]) -> None:
    sora_json(running.project, "promote", "2")
    served(running, 2)
    assert sora_json(running.project, "rollback") == {"champion": 1, "previous": 2}
    served(running, 1)
    done = sora(running.project, "rollback", "--json")
    assert done.returncode == 1 and not done.stdout and "fix" in done.stderr


def test_reproduce(running: Running, first: dict[str, Any]) -> None:
    before = subprocess.run(["git", "status", "--short"], cwd=running.project, capture_output=True, text=True).stdout
    result = sora_json(running.project, "reproduce", "1")
    assert result["matches"] and result["metrics"]["test/accuracy"] == first["metrics"]["test/accuracy"]
    after = subprocess.run(["git", "status", "--short"], cwd=running.project, capture_output=True, text=True).stdout
    assert before == after


def test_gc_spares_what_is_needed(running: Running, first: dict[str, Any]) -> None:
    sora_json(running.project, "gc", "--keep", "1")
    assert sora_json(running.project, "reproduce", "1")["matches"]


def test_two_runs_at_once_and_killed_ones_go_on(running: Running, first: dict[str, Any]) -> None:
    long = subprocess.Popen([*SORA, "run", "--force"], cwd=running.project, stderr=subprocess.PIPE, text=True)
    wait_for_step(running.project, "run")
    second = sora(running.project, "run", "--json")
    assert second.returncode == 1 and not second.stdout and "active" in second.stderr
    deployment = trigger_nightly(running)
    assert ended(running, deployment) == "CANCELLED"
    long.kill()
    long.wait(30)
    assert sora_json(running.project, "run", "--force")["outcome"] in ("promoted", "refused")


def test_killed_after_each_step(running: Running, first: dict[str, Any]) -> None:
    """SIGKILL once a step is done, again and again: every try goes on where the last was, to one version."""
    known = len(sora_json(running.project, "models"))
    for step in ("splits", "run", "fit", "evaluated", "register"):
        child = subprocess.Popen([*SORA, "run", "--force"], cwd=running.project, stderr=subprocess.DEVNULL)
        wait_for_step(running.project, step)
        child.kill()
        child.wait(30)
    result = sora_json(running.project, "run", "--force")
    assert result["outcome"] in ("promoted", "refused")
    assert len(sora_json(running.project, "models")) == known + 1


def wait_for_step(project: Path, step: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(f'"{step}"' in file.read_text() for file in (project / ".sora" / "work").glob("*/steps.json")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def trigger_nightly(running: Running) -> str:
    with prefect_client(Project(running.project)) as prefect:
        found = prefect.post("/deployments/filter", json={}).json()
        nightly = next(one for one in found if one["name"] != "train" and one["status"])
        return str(prefect.post(f"/deployments/{nightly['id']}/create_flow_run", json={}).json()["id"])


def ended(running: Running, flow_run: str, seconds: float = 180) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with prefect_client(Project(running.project)) as prefect:
            state: str = prefect.get(f"/flow_runs/{flow_run}").json()["state_type"]
        if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(0.5)
    raise AssertionError("the flow run did not end")


def test_the_scheduled_nightly_runs_in_the_worker(running: Running, first: dict[str, Any]) -> None:
    assert ended(running, trigger_nightly(running)) == "COMPLETED"


def test_doctor_finds_all_in_order(running: Running, first: dict[str, Any]) -> None:
    checks = {check["name"]: check for check in sora_json(running.project, "doctor")["checks"]}
    assert all(set(check) == {"name", "ok", "detail", "fix"} for check in checks.values())
    assert not [check for check in checks.values() if not check["ok"]]


def test_validation_stops_the_run(running: Running, first: dict[str, Any]) -> None:
    """Most videos broken: the run ends with 1 and the champion serves on."""
    data = running.project / "data"
    kept = shutil.copytree(data, running.project.parent / "kept")
    try:
        for video in sorted(data.rglob("*.mp4"))[::2]:
            video.unlink()
            video.write_bytes(b"broken")
        done = sora(running.project, "run", "--json")
        assert done.returncode == 1 and not done.stdout and "rejected" in done.stderr
        assert served(running, httpx.get(f"{running.api}/v1/model").json()["version"])
    finally:
        shutil.rmtree(data)
        shutil.move(kept, data)


def test_ctrl_c_ends_all(running: Running, first: dict[str, Any]) -> None:
    """Last: nothing of `sora up` is left behind."""
    tree = psutil.Process(running.process.pid).children(recursive=True)
    assert len(tree) >= 4
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60) in (0, 130)
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive
